# New arrays, whose numbers are whatever lies there; large ones in memory that others gave back.

cimport numpy as cnp

cdef enum:
    LARGE = 1 << 20  # bytes: below it malloc has memory at hand

cdef cnp.ndarray empty_of_many(int ndim, const Py_ssize_t *dims, int type_number,
                               Py_ssize_t numbers)
cdef cnp.ndarray empty_like_strided(cnp.ndarray x)


cdef inline cnp.ndarray empty(int ndim, const Py_ssize_t *dims, int type_number):
    """Contiguous."""
    cdef Py_ssize_t numbers = 1
    cdef int i
    for i in range(ndim):
        numbers *= dims[i]
    if numbers >= LARGE // 8:  # of 8 bytes at most
        return empty_of_many(ndim, dims, type_number, numbers)
    return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *> dims, type_number, 0)


cdef inline cnp.ndarray empty_like(cnp.ndarray x):
    """In the layout of x, of its dtype in the machine's order of bytes."""
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        return empty(cnp.PyArray_NDIM(x), <Py_ssize_t *> cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x))
    return empty_like_strided(x)
