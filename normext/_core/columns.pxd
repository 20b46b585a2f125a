from normext._core.call cimport Call

cdef int normalize_columns(const Call *c) noexcept nogil
cdef int columns_backward(const Call *c) noexcept nogil
cdef int normalize_column_groups(const Call *c) noexcept nogil
cdef int column_groups_backward(const Call *c) noexcept nogil
