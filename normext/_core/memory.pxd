cimport numpy as cnp

# New arrays, whose numbers are whatever lies there; large ones in memory that others gave back.
cdef cnp.ndarray empty(int ndim, const Py_ssize_t *dims, int type_number)
cdef cnp.ndarray empty_like(cnp.ndarray x)  # in the layout of x, of its dtype in native bytes
