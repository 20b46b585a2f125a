# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Loops over the parameters of a net that an update rule changes: one pass through memory instead
of a dozen."""

from cython.parallel cimport prange
cimport numpy as cnp

from normext._core.kernels cimport NX_FLOAT32, NX_FLOAT64, ceil_div, nx_adam, nx_kernels
from normext._core.memory cimport empty_like
from normext._core.runtime cimport kernels_for, threads_for

cnp.import_array()

cdef enum:
    TASK = 1 << 15  # elements of a task


cdef void adam_task(const nx_kernels *k, nx_adam step, Py_ssize_t first,
                    Py_ssize_t n) noexcept nogil:
    """n parameters of a step from the first on."""
    cdef Py_ssize_t at = first * k.itemsize
    step.w, step.dw = <const char *> step.w + at, <const char *> step.dw + at
    step.m, step.v = <const char *> step.m + at, <const char *> step.v + at
    step.next_w = <char *> step.next_w + at
    step.next_m, step.next_v = <char *> step.next_m + at, <char *> step.next_v + at
    k.adam(&step, n)


def adam(cnp.ndarray w not None, cnp.ndarray dw not None, cnp.ndarray m not None,
         cnp.ndarray v not None, double beta1, double beta2, double rate, double epsilon):
    """A step of Adam (kernels.h): next_w, next_m and next_v, new arrays.

    Those given are of one size and type, float32 or float64.
    """
    cdef int kind = cnp.PyArray_TYPE(w)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(w), task, tasks = ceil_div(n, TASK)
    cdef cnp.ndarray array
    for array in (w, dw, m, v):
        if (cnp.PyArray_TYPE(array) != kind or cnp.PyArray_SIZE(array) != n
                or not cnp.PyArray_ISCARRAY_RO(array)):
            raise ValueError("w, dw, m and v must be contiguous arrays of one size and type")
    if kind != cnp.NPY_FLOAT and kind != cnp.NPY_DOUBLE:
        raise TypeError(f"w, dw, m and v must be of float32 or float64, got {w.dtype}")
    cdef cnp.ndarray next_w = empty_like(w), next_m = empty_like(w), next_v = empty_like(w)
    cdef int type = NX_FLOAT64 if kind == cnp.NPY_DOUBLE else NX_FLOAT32
    cdef const nx_kernels *k = kernels_for(type, False)
    cdef int threads = threads_for(tasks, n)
    cdef nx_adam step = nx_adam(
        cnp.PyArray_DATA(w), cnp.PyArray_DATA(dw), cnp.PyArray_DATA(m), cnp.PyArray_DATA(v),
        cnp.PyArray_DATA(next_w), cnp.PyArray_DATA(next_m), cnp.PyArray_DATA(next_v),
        beta1, beta2, rate, epsilon)
    if tasks == 1:
        k.adam(&step, n)
        return next_w, next_m, next_v
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1,
                       schedule="static"):
        adam_task(k, step, task * TASK, min(<Py_ssize_t> TASK, n - task * TASK))
    return next_w, next_m, next_v
