# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics down columns: batch norm of (N, D) and N,H,W,C.

The rows are walked in memory order. Work is split into strips of columns and, where there are many rows, chunks of rows: by the
shape alone, and the chunks' sums are put together in their order, so that the number of threads changes no bit. Second passes go
backwards, to meet first what is still in cache.
"""

from cython.parallel cimport prange

import numpy as np

from normext._core.kernels cimport Operand, ceil_div, element, inverse_std, nx_kernels, nx_merge, nx_moments
from normext._core.runtime cimport threads_for

cdef enum:
    TASKS = 32  # tasks to split the work into
    CHUNKED = 1 << 16  # elements from which rows may be split
    STRIP = 512  # columns of a task; their coefficients are on its stack


cdef inline Py_ssize_t chunk_count(Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t col_rows) noexcept nogil:
    """Into how many chunks the rows are split."""
    if rows * cols < CHUNKED:
        return 1
    return min(ceil_div(rows, col_rows), ceil_div(TASKS, ceil_div(cols, STRIP)))


# A task: some rows of some columns.
cdef struct Tile:
    Py_ssize_t chunk, row, rows, col, cols


cdef inline Tile tile_at(Py_ssize_t task, Py_ssize_t chunks, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t strips = ceil_div(cols, STRIP), chunk = task // strips, col = task % strips * STRIP
    cdef Py_ssize_t row = chunk * rows // chunks
    return Tile(chunk, row, (chunk + 1) * rows // chunks - row, col, min(<Py_ssize_t> STRIP, cols - col))


cdef inline char *at(Operand x, Py_ssize_t itemsize, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    return x.data + (row * x.run_stride + col) * itemsize


# Forward ---------------------------------------------------------------------------------------------------------------------


cdef void tile_moments(const nx_kernels *k, Tile t, Operand x, double *mean, double *m2) noexcept nogil:
    cdef Py_ssize_t block, start, j
    for j in range(t.cols):
        mean[j] = m2[j] = 0
    for block in range(ceil_div(t.rows, k.col_rows)):
        start = block * k.col_rows
        k.col_moments(at(x, k.itemsize, t.row + start, t.col), x.run_stride, min(k.col_rows, t.rows - start), t.cols,
                      <double> start, mean, m2)


cdef inline void finish_moments(double rows, Py_ssize_t cols, double eps, double *m2_to_rstd, double *var) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(cols):
        if var != NULL:
            var[j] = m2_to_rstd[j] / rows
        m2_to_rstd[j] = inverse_std(m2_to_rstd[j] / rows, eps)


cdef void tile_affine(const nx_kernels *k, Tile t, Operand x, Operand y, const char *gamma, const char *beta,
                      const double *mean, const double *rstd) noexcept nogil:
    cdef double scale[STRIP]
    cdef double shift[STRIP]
    cdef Py_ssize_t j, block, start
    for j in range(t.cols):
        scale[j] = rstd[t.col + j] if gamma == NULL else rstd[t.col + j] * element(k, gamma, t.col + j)
        shift[j] = 0 if beta == NULL else element(k, beta, t.col + j)
    for block in range(ceil_div(t.rows, k.col_rows) - 1, -1, -1):
        start = block * k.col_rows
        k.col_affine(at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(y, k.itemsize, t.row + start, t.col),
                     y.run_stride, min(k.col_rows, t.rows - start), t.cols, mean + t.col, scale, shift)


cdef void normalize_tile(const nx_kernels *k, Tile t, Operand x, Operand y, const char *gamma, const char *beta,
                         bint training, double eps, double *mean, double *rstd, double *var) noexcept nogil:
    """All rows of a strip."""
    if training:
        tile_moments(k, t, x, mean + t.col, rstd + t.col)
        finish_moments(<double> t.rows, t.cols, eps, rstd + t.col, NULL if var == NULL else var + t.col)
    if y.data != NULL:
        tile_affine(k, t, x, y, gamma, beta, mean, rstd)


cdef int normalize_columns(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand y, const char *gamma,
                           const char *beta, bint training, double eps, double *mean, double *rstd, double *var) except -1:
    """y = gamma * (x - mean) * rstd + beta, with one of each for a column; see `runs.normalize_runs`."""
    cdef Py_ssize_t chunks = chunk_count(rows, cols, k.col_rows), strips = ceil_div(cols, STRIP), tasks = chunks * strips
    cdef Py_ssize_t task, chunk, j
    cdef int threads = threads_for(tasks, rows * cols)
    cdef double[:, :, ::1] partial
    cdef nx_moments m
    if chunks == 1:
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_tile(k, tile_at(task, 1, rows, cols), x, y, gamma, beta, training, eps, mean, rstd, var)
        return 0
    if training:
        partial = np.empty((chunks, 2, cols))
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            tile_moments(k, tile_at(task, chunks, rows, cols), x, &partial[task // strips, 0, task % strips * STRIP],
                         &partial[task // strips, 1, task % strips * STRIP])
        for j in range(cols):
            m = nx_moments(0, 0, 0)
            for chunk in range(chunks):
                nx_merge(&m, nx_moments(<double> ((chunk + 1) * rows // chunks - chunk * rows // chunks),
                                        partial[chunk, 0, j], partial[chunk, 1, j]))
            mean[j], rstd[j] = m.mean, m.m2
        finish_moments(<double> rows, cols, eps, rstd, var)
    if y.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        tile_affine(k, tile_at(tasks - 1 - task, chunks, rows, cols), x, y, gamma, beta, mean, rstd)
    return 0


# Backward --------------------------------------------------------------------------------------------------------------------


cdef void tile_dots(const nx_kernels *k, Tile t, Operand x, Operand dy, const double *mean, double *sums,
                    double *dots) noexcept nogil:
    cdef Py_ssize_t block, start, j
    for j in range(t.cols):
        sums[j] = dots[j] = 0
    for block in range(ceil_div(t.rows, k.col_rows)):
        start = block * k.col_rows
        k.col_dots(at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(dy, k.itemsize, t.row + start, t.col),
                   dy.run_stride, min(k.col_rows, t.rows - start), t.cols, mean + t.col, sums, dots)


cdef void tile_combine(const nx_kernels *k, Tile t, double count, Operand x, Operand dy, Operand dx, const char *gamma,
                       bint training, const double *mean, const double *rstd, const double *sums,
                       const double *dots) noexcept nogil:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) for g = gamma * dy and xhat = (x - mean) * rstd."""
    cdef double a[STRIP]
    cdef double slope[STRIP]
    cdef double dy_mean[STRIP]
    cdef Py_ssize_t j, c, block, start
    for j in range(t.cols):
        c = t.col + j
        a[j] = rstd[c] if gamma == NULL else rstd[c] * element(k, gamma, c)
        slope[j] = -a[j] * rstd[c] * rstd[c] * (dots[c] / count) if training else 0
        dy_mean[j] = sums[c] / count if training else 0
    for block in range(ceil_div(t.rows, k.col_rows) - 1, -1, -1):
        start = block * k.col_rows
        if training:
            k.col_combine(at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(dy, k.itemsize, t.row + start, t.col),
                          dy.run_stride, at(dx, k.itemsize, t.row + start, t.col), dx.run_stride,
                          min(k.col_rows, t.rows - start), t.cols, mean + t.col, dy_mean, a, slope)
        else:  # the statistics are constants, and x does not matter: slope and dy_mean are zeros
            k.col_affine(at(dy, k.itemsize, t.row + start, t.col), dy.run_stride, at(dx, k.itemsize, t.row + start, t.col),
                         dx.run_stride, min(k.col_rows, t.rows - start), t.cols, dy_mean, a, slope)


cdef void backward_tile(const nx_kernels *k, Tile t, Operand x, Operand dy, Operand dx, const char *gamma, bint training,
                        bint given, double count, const double *mean, const double *rstd, double *sums,
                        double *dots) noexcept nogil:
    """All rows of a strip."""
    if not given:
        tile_dots(k, t, x, dy, mean, sums + t.col, dots + t.col)
    if dx.data != NULL:
        tile_combine(k, t, count, x, dy, dx, gamma, training, mean, rstd, sums, dots)


cdef int columns_backward(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand dy, Operand dx,
                          const char *gamma, bint training, bint given, double count, const double *mean,
                          const double *rstd, double *sums, double *dots) except -1:
    """The gradient dx and, for each column, sum(dy) and sum(dy * (x - mean)); see `runs.runs_backward`."""
    cdef Py_ssize_t chunks = chunk_count(rows, cols, k.col_rows), strips = ceil_div(cols, STRIP), tasks = chunks * strips
    cdef Py_ssize_t task, chunk, j
    cdef int threads = threads_for(tasks, rows * cols)
    cdef double[:, :, ::1] partial
    if chunks == 1:
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            backward_tile(k, tile_at(task, 1, rows, cols), x, dy, dx, gamma, training, given, count, mean, rstd,
                          sums, dots)
        return 0
    if not given:
        partial = np.empty((chunks, 2, cols))
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            tile_dots(k, tile_at(task, chunks, rows, cols), x, dy, mean, &partial[task // strips, 0, task % strips * STRIP],
                      &partial[task // strips, 1, task % strips * STRIP])
        for j in range(cols):
            sums[j] = dots[j] = 0
            for chunk in range(chunks):
                sums[j] += partial[chunk, 0, j]
                dots[j] += partial[chunk, 1, j]
    if dx.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        tile_combine(k, tile_at(tasks - 1 - task, chunks, rows, cols), count, x, dy, dx, gamma, training, mean, rstd, sums, dots)
    return 0
