from normext cimport nx_io, nx_norm

cdef int add_by_blocks(const nx_norm *norm, const nx_io *io) noexcept nogil
cdef int forward_by_blocks(const nx_norm *norm, const nx_io *io, double *var) noexcept nogil
cdef int backward_by_blocks(const nx_norm *norm, const nx_io *io, bint wide) noexcept nogil
