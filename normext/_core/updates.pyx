# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Loops over the parameters of a net that an update rule changes: one pass through memory instead of a dozen."""

from cython.parallel cimport prange
cimport numpy as cnp

from normext._core.kernels cimport NX_FLOAT32, NX_FLOAT64, ceil_div, nx_kernels
from normext._core.runtime cimport kernels_for, threads_for

cnp.import_array()

cdef enum:
    PIECE = 1 << 15  # elements of a task


def adam(cnp.ndarray w not None, cnp.ndarray dw not None, cnp.ndarray m not None, cnp.ndarray v not None,
         double beta1, double beta2, double rate, double epsilon):
    """A step of Adam (kernels.h): next_w, next_m and next_v, new arrays. Those given are of one size and type, float32 or float64."""
    cdef int kind = cnp.PyArray_TYPE(w)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(w), piece, at, tasks = ceil_div(n, PIECE)
    cdef cnp.ndarray array
    for array in (w, dw, m, v):
        if cnp.PyArray_TYPE(array) != kind or cnp.PyArray_SIZE(array) != n or not cnp.PyArray_ISCARRAY_RO(array):
            raise ValueError("w, dw, m and v must be contiguous arrays of one size and type")
    if kind != cnp.NPY_FLOAT and kind != cnp.NPY_DOUBLE:
        raise TypeError(f"w, dw, m and v must be of float32 or float64, got {w.dtype}")
    cdef cnp.ndarray next_w = cnp.PyArray_EMPTY(w.ndim, cnp.PyArray_DIMS(w), kind, 0)
    cdef cnp.ndarray next_m = cnp.PyArray_EMPTY(w.ndim, cnp.PyArray_DIMS(w), kind, 0)
    cdef cnp.ndarray next_v = cnp.PyArray_EMPTY(w.ndim, cnp.PyArray_DIMS(w), kind, 0)
    cdef const nx_kernels *k = kernels_for(NX_FLOAT64 if kind == cnp.NPY_DOUBLE else NX_FLOAT32, False)
    cdef int threads = threads_for(tasks, n)
    cdef char *w_ = <char *> cnp.PyArray_DATA(w)
    cdef char *dw_ = <char *> cnp.PyArray_DATA(dw)
    cdef char *m_ = <char *> cnp.PyArray_DATA(m)
    cdef char *v_ = <char *> cnp.PyArray_DATA(v)
    cdef char *next_w_ = <char *> cnp.PyArray_DATA(next_w)
    cdef char *next_m_ = <char *> cnp.PyArray_DATA(next_m)
    cdef char *next_v_ = <char *> cnp.PyArray_DATA(next_v)
    if tasks == 1:
        k.adam(w_, dw_, m_, v_, next_w_, next_m_, next_v_, n, beta1, beta2, rate, epsilon)
        return next_w, next_m, next_v
    for piece in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        at = piece * PIECE * k.itemsize
        k.adam(w_ + at, dw_ + at, m_ + at, v_ + at, next_w_ + at, next_m_ + at, next_v_ + at, min(<Py_ssize_t> PIECE, n - piece * PIECE),
               beta1, beta2, rate, epsilon)
    return next_w, next_m, next_v
