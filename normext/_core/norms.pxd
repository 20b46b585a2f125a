from normext cimport nx_io, nx_norm

cdef int check(const nx_norm *norm) noexcept nogil
cdef int forward(const nx_norm *norm, const nx_io *io) noexcept nogil
cdef int backward(const nx_norm *norm, const nx_io *io) noexcept nogil


cdef inline Py_ssize_t numbers_of(const nx_norm *norm, int first, int last) noexcept nogil:
    """How many there are along the axes first to last."""
    cdef Py_ssize_t product = 1
    cdef int i
    for i in range(first, last):
        product *= norm.shape[i]
    return product
