from normext._core.call cimport Call

cdef int normalize_rows(const Call *c) noexcept nogil
cdef int affine_rows(const Call *c) noexcept nogil
cdef int normalize_sums(const Call *c) noexcept nogil
cdef int rows_backward(const Call *c) noexcept nogil
cdef int layer_backward(const Call *c) noexcept nogil
cdef int grouped_backward(const Call *c) noexcept nogil
cdef void look_ahead(Call *c, int arrays) noexcept nogil
cdef bint are_runs(const Call *c) noexcept nogil
cdef int normalize_runs(const Call *c) noexcept nogil
