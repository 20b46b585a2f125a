from normext cimport nx_io, nx_norm

cdef int check(const nx_norm *norm) noexcept nogil
cdef int forward(const nx_norm *norm, const nx_io *io) noexcept nogil
cdef int backward(const nx_norm *norm, const nx_io *io) noexcept nogil
