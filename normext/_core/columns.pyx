# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics down columns: batch norm of (N, D) and N,H,W,C, and group norm of the latter.

The rows are walked in memory order. Work is split into strips of columns and, where there are many rows, chunks of rows: by the
shape alone, and the chunks' sums are put together in their order, so that the number of threads changes no bit. Second passes go
backwards, to meet first what is still in cache.
"""

from cython.parallel cimport prange
from libc.string cimport memcpy

import numpy as np

from normext._core.kernels cimport (
    Operand,
    Running,
    affines_of,
    ceil_div,
    element,
    nx_finish_moments,
    nx_inverse_stds,
    nx_kernels,
    nx_merge,
    nx_moments,
    nx_relu_mask,
    nx_rescale,
    nx_rescale_columns,
    read_moments,
    restore_pivot,
    update_moments,
)
from normext._core.old_kernels cimport col_moments, col_affine, cols_are_far, col_dots, col_combine
from normext._core.runtime cimport threads_for

cdef enum:
    TASKS = 32  # tasks to split the work into
    CHUNKED = 1 << 16  # elements from which rows may be split
    STRIP = 512  # columns of a task; their coefficients are on its stack


cdef inline Py_ssize_t block_rows(const nx_kernels *k, Py_ssize_t cols) noexcept nogil:
    """Rows of a block of so many columns."""
    return max(k.col_rows, k.col_block // cols)


cdef inline Py_ssize_t chunk_count(Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t in_block) noexcept nogil:
    """Into how many chunks the rows are split."""
    if rows * cols < CHUNKED:
        return 1
    return min(ceil_div(rows, in_block), ceil_div(TASKS, ceil_div(cols, STRIP)))


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


cdef void tile_moments(const nx_kernels *k, Tile t, Operand x, const double *scale, double *mean, double *m2) noexcept nogil:
    cdef Py_ssize_t block, start, j
    for j in range(t.cols):
        mean[j] = m2[j] = 0
    for block in range(ceil_div(t.rows, block_rows(k, t.cols))):
        start = block * block_rows(k, t.cols)
        col_moments(k, at(x, k.itemsize, t.row + start, t.col), x.run_stride, min(block_rows(k, t.cols), t.rows - start), t.cols,
                      scale, <double> start, mean, m2)


cdef inline void finish_moments(double rows, Py_ssize_t col, Py_ssize_t cols, double eps, double *scale, double *mean,
                                double *m2_to_rstd, double *var, const Running *running) noexcept nogil:
    """`scale`, NULL for 1, is of the columns from `col` on, and written over."""
    cdef Py_ssize_t j
    for j in range(col, col + cols):
        if scale == NULL:
            m2_to_rstd[j] /= rows
        else:  # rstd may be a number where the variance is none
            nx_finish_moments(nx_moments(rows, mean[j], m2_to_rstd[j]), scale[j - col], eps, mean + j, scale + j - col, m2_to_rstd + j)
    if var != NULL:
        memcpy(var + col, m2_to_rstd + col, cols * sizeof(double))
    if running != NULL:
        update_moments(running, col, cols, mean + col, m2_to_rstd + col)
    if scale == NULL:
        nx_inverse_stds(m2_to_rstd + col, cols, eps)
    else:
        memcpy(m2_to_rstd + col, scale, cols * sizeof(double))


cdef void tile_affine(const nx_kernels *k, Tile t, Operand x, Operand y, const char *gamma, const char *beta, bint relu,
                      const double *mean, const double *rstd) noexcept nogil:
    cdef double scale[STRIP]
    cdef double shift[STRIP]
    cdef Py_ssize_t block, start
    affines_of(k, gamma, beta, t.col, t.cols, rstd + t.col, scale, shift)
    for block in range(ceil_div(t.rows, block_rows(k, t.cols)) - 1, -1, -1):
        start = block * block_rows(k, t.cols)
        col_affine(k, at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(y, k.itemsize, t.row + start, t.col),
                     y.run_stride, min(block_rows(k, t.cols), t.rows - start), t.cols, mean + t.col, scale, shift,
                     relu)


cdef void normalize_tile(const nx_kernels *k, Tile t, Operand x, Operand y, const char *gamma, const char *beta,
                         bint training, double eps, bint relu, double *mean, double *rstd, double *var,
                         const Running *running) noexcept nogil:
    """All rows of a strip."""
    cdef double scale[STRIP]
    cdef bint again
    if training:
        tile_moments(k, t, x, NULL, mean + t.col, rstd + t.col)
        again = nx_rescale_columns(&k.range, t.cols, <double> t.rows, mean + t.col, rstd + t.col, scale)
        if again:
            tile_moments(k, t, x, scale, mean + t.col, rstd + t.col)
        finish_moments(<double> t.rows, t.col, t.cols, eps, scale if again else NULL, mean, rstd, var, running)
    elif running != NULL:
        read_moments(running, t.col, t.cols, eps, mean + t.col, rstd + t.col)
    if y.data != NULL:
        tile_affine(k, t, x, y, gamma, beta, relu, mean, rstd)


cdef int normalize_columns(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand y, const char *gamma,
                           const char *beta, bint training, double eps, bint relu, double *mean, double *rstd, double *var,
                           const Running *running) except -1:
    """y = gamma * (x - mean) * rstd + beta, with one of each for a column; see `runs.normalize_runs`.

    Parameters
    ----------
    running : may be NULL. In training it is updated; in evaluation mean and rstd are taken from it (and otherwise given).
    """
    cdef Py_ssize_t chunks = chunk_count(rows, cols, block_rows(k, cols)), strips = ceil_div(cols, STRIP), tasks = chunks * strips
    cdef Py_ssize_t task, chunk, j
    cdef int threads = threads_for(tasks, rows * cols)
    cdef double[:, :, ::1] partial
    cdef double[::1] work
    cdef double *scale = NULL
    cdef nx_moments m
    if tasks == 1:  # so little work that letting go of the GIL, and a parallel region of one thread, would show
        normalize_tile(k, tile_at(0, 1, rows, cols), x, y, gamma, beta, training, eps, relu, mean, rstd, var, running)
        return 0
    if chunks == 1:
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_tile(k, tile_at(task, 1, rows, cols), x, y, gamma, beta, training, eps, relu, mean, rstd, var, running)
        return 0
    if training:
        partial, work = np.empty((chunks, 2, cols)), np.empty(cols)
        for _attempt in range(2):  # the second with scales that the first has found
            for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
                tile_moments(k, tile_at(task, chunks, rows, cols), x, scale + task % strips * STRIP if scale != NULL else NULL,
                             &partial[task // strips, 0, task % strips * STRIP], &partial[task // strips, 1, task % strips * STRIP])
            for j in range(cols):
                m = nx_moments(0, 0, 0)
                for chunk in range(chunks):
                    nx_merge(&m, nx_moments(<double> ((chunk + 1) * rows // chunks - chunk * rows // chunks),
                                            partial[chunk, 0, j], partial[chunk, 1, j]))
                mean[j], rstd[j] = m.mean, m.m2
            if scale != NULL or not nx_rescale_columns(&k.range, cols, <double> rows, mean, rstd, &work[0]):
                break
            scale = &work[0]
        finish_moments(<double> rows, 0, cols, eps, scale, mean, rstd, var, running)
    elif running != NULL:
        read_moments(running, 0, cols, eps, mean, rstd)
    if y.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        tile_affine(k, tile_at(tasks - 1 - task, chunks, rows, cols), x, y, gamma, beta, relu, mean, rstd)
    return 0


# Backward --------------------------------------------------------------------------------------------------------------------


cdef void tile_dots(const nx_kernels *k, Tile t, Operand x, Operand dy, const char *gamma, const char *beta, bint relu,
                    const double *mean, const double *rstd, const double *pivots, double *sums, double *dots) noexcept nogil:
    """`pivots`, of the tile's columns, may be NULL."""
    cdef double scale[STRIP]
    cdef double shift[STRIP]
    cdef nx_relu_mask gate = nx_relu_mask(&scale[0], &shift[0])
    cdef Py_ssize_t block, start, j
    for j in range(t.cols):
        sums[j] = dots[j] = 0
    if relu:
        affines_of(k, gamma, beta, t.col, t.cols, rstd + t.col, scale, shift)
    for block in range(ceil_div(t.rows, block_rows(k, t.cols))):
        start = block * block_rows(k, t.cols)
        col_dots(k, at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(dy, k.itemsize, t.row + start, t.col),
                   dy.run_stride, min(block_rows(k, t.cols), t.rows - start), t.cols, mean + t.col, pivots,
                   &gate if relu else NULL, sums, dots)


cdef void tile_combine(const nx_kernels *k, Tile t, double count, Operand x, Operand dy, Operand dx, const char *gamma,
                       const char *beta, bint training, bint relu, const double *mean, const double *rstd, const double *sums,
                       const double *dots) noexcept nogil:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) for g = gamma * dy and xhat = (x - mean) * rstd."""
    cdef double a[STRIP]
    cdef double shift[STRIP]
    cdef double slope[STRIP]
    cdef double dy_mean[STRIP]
    cdef double constant[STRIP]
    cdef double each = 1 / count
    cdef nx_relu_mask gate = nx_relu_mask(&a[0], &shift[0])
    cdef Py_ssize_t j, c, block, start
    affines_of(k, gamma, beta, t.col, t.cols, rstd + t.col, a, shift)
    for j in range(t.cols):
        c = t.col + j
        slope[j] = -a[j] * rstd[c] * rstd[c] * (dots[c] * each) if training else 0
        dy_mean[j] = sums[c] * each if training else 0
        constant[j] = -a[j] * dy_mean[j]
    for block in range(ceil_div(t.rows, block_rows(k, t.cols)) - 1, -1, -1):
        start = block * block_rows(k, t.cols)
        if training or relu:
            col_combine(k, at(x, k.itemsize, t.row + start, t.col), x.run_stride, at(dy, k.itemsize, t.row + start, t.col),
                          dy.run_stride, at(dx, k.itemsize, t.row + start, t.col), dx.run_stride,
                          min(block_rows(k, t.cols), t.rows - start), t.cols, mean + t.col, dy_mean, a, slope, constant,
                          &gate if relu else NULL)
        else:  # the statistics are constants, and x does not matter: slope and dy_mean are zeros
            col_affine(k, at(dy, k.itemsize, t.row + start, t.col), dy.run_stride, at(dx, k.itemsize, t.row + start, t.col),
                         dx.run_stride, min(block_rows(k, t.cols), t.rows - start), t.cols, dy_mean, a, slope, False)


cdef void backward_tile(const nx_kernels *k, Tile t, Operand x, Operand dy, Operand dx, const char *gamma, const char *beta,
                        bint training, bint relu, bint given, double count, const double *mean, const double *rstd,
                        const double *pivots, double *sums, double *dots) noexcept nogil:
    """All rows of a strip."""
    cdef double found[STRIP]
    if not given:
        tile_dots(k, t, x, dy, gamma, beta, relu, mean, rstd, pivots + t.col if pivots != NULL else NULL, sums + t.col, dots + t.col)
        if training and dx.data != NULL and cols_are_far(k, at(dy, k.itemsize, t.row, t.col), dy.run_stride, t.rows, t.cols,
                                                           sums + t.col, count, found):
            tile_dots(k, t, x, dy, gamma, beta, relu, mean, rstd, found, sums + t.col, dots + t.col)
    if dx.data != NULL:
        tile_combine(k, t, count, x, dy, dx, gamma, beta, training, relu, mean, rstd, sums, dots)


cdef int columns_backward(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand dy, Operand dx,
                          const char *gamma, const char *beta, bint training, bint relu, bint given, double count,
                          const double *mean, const double *rstd, const double *pivots, double *sums, double *dots) except -1:
    """The gradient dx and, for each column, sum(dy) and sum(dy * (x - mean)); see `runs.runs_backward`."""
    cdef Py_ssize_t chunks = chunk_count(rows, cols, block_rows(k, cols)), strips = ceil_div(cols, STRIP), tasks = chunks * strips
    cdef Py_ssize_t task, chunk, j
    cdef int threads = threads_for(tasks, rows * cols)
    cdef double[:, :, ::1] partial
    cdef double[::1] found
    if tasks == 1:
        backward_tile(k, tile_at(0, 1, rows, cols), x, dy, dx, gamma, beta, training, relu, given, count, mean, rstd, pivots, sums, dots)
        return 0
    if chunks == 1:
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            backward_tile(k, tile_at(task, 1, rows, cols), x, dy, dx, gamma, beta, training, relu, given, count, mean, rstd, pivots,
                          sums, dots)
        return 0
    if not given:
        partial, found = np.empty((chunks, 2, cols)), np.empty(cols)
        for attempt in range(2):  # the second about pivots that the first has found
            for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
                tile_dots(k, tile_at(task, chunks, rows, cols), x, dy, gamma, beta, relu, mean, rstd,
                          pivots + task % strips * STRIP if pivots != NULL else NULL, &partial[task // strips, 0, task % strips * STRIP],
                          &partial[task // strips, 1, task % strips * STRIP])
            for j in range(cols):
                sums[j] = dots[j] = 0
                for chunk in range(chunks):
                    sums[j] += partial[chunk, 0, j]
                    dots[j] += partial[chunk, 1, j]
            if attempt == 1 or not training or dx.data == NULL:
                break
            if not cols_are_far(k, dy.data, dy.run_stride, rows, cols, sums, count, &found[0]):
                break
            pivots = &found[0]
    if dx.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        tile_combine(k, tile_at(tasks - 1 - task, chunks, rows, cols), count, x, dy, dx, gamma, beta, training, relu, mean, rstd, sums,
                     dots)
    return 0


# Group norm, channels last ---------------------------------------------------------------------------------------------------

# A task is an example and some of its groups; a tile, at most STRIP columns of them. The columns' moments make the groups'.


cdef inline Py_ssize_t groups_of_task(Py_ssize_t per_group) noexcept nogil:
    return max(1, STRIP // per_group)


cdef inline Operand example(Operand x, Py_ssize_t itemsize, Py_ssize_t index) noexcept nogil:
    return Operand(x.data + index * x.group_stride * itemsize, 0, x.run_stride)


cdef inline Py_ssize_t tile_count(ColumnGroups shape, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    return ceil_div((last - first) * shape.per_group, STRIP)


cdef inline Tile group_tile(ColumnGroups shape, Py_ssize_t first, Py_ssize_t last, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t col = first * shape.per_group + index * STRIP
    return Tile(0, 0, shape.rows, col, min(<Py_ssize_t> STRIP, last * shape.per_group - col))


cdef void spread(ColumnGroups shape, Py_ssize_t first, Py_ssize_t last, const double *mean, const double *rstd, double *column_mean,
                 double *column_rstd) noexcept nogil:
    """Each group's statistics, once for each of its columns."""
    cdef Py_ssize_t group, j
    for group in range(first, last):
        for j in range(group * shape.per_group, (group + 1) * shape.per_group):
            column_mean[j] = mean[group]
            column_rstd[j] = rstd[group]


cdef nx_moments moments_of_columns(Py_ssize_t rows, Py_ssize_t columns, const double *mean, const double *m2) noexcept nogil:
    """`nx_merge` of columns that are equally long; without a division for each."""
    cdef double offset = 0, squares = 0, spread = 0, middle
    cdef Py_ssize_t j
    for j in range(columns):
        offset += mean[j] - mean[0]
    middle = mean[0] + offset / columns
    for j in range(columns):
        squares += m2[j]
        spread += (mean[j] - middle) * (mean[j] - middle)
    return nx_moments(<double> rows * <double> columns, middle, squares + rows * spread)


cdef void normalize_example(const nx_kernels *k, ColumnGroups shape, Operand x, Operand y, const char *gamma, const char *beta,
                            double eps, Py_ssize_t first, Py_ssize_t last, double *mean, double *rstd, double *column_mean,
                            double *column_rstd, double *column_scale) noexcept nogil:
    """Groups first to last of an example; the columns' arrays are work space."""
    cdef Py_ssize_t group, index, j, c, attempt
    cdef double *scales = NULL  # of the columns, a group's all alike
    cdef nx_moments m
    cdef Tile t
    cdef bint again
    for attempt in range(2):  # the second with scales that the first has found
        for index in range(tile_count(shape, first, last)):
            t = group_tile(shape, first, last, index)
            tile_moments(k, t, x, scales + t.col if scales != NULL else NULL, column_mean + t.col, column_rstd + t.col)
        again = False
        for group in range(first, last):
            j = group * shape.per_group
            m = moments_of_columns(shape.rows, shape.per_group, column_mean + j, column_rstd + j)
            nx_finish_moments(m, scales[j] if scales != NULL else 1, eps, mean + group, rstd + group, NULL)
            if attempt == 0:
                for c in range(j, j + shape.per_group):
                    column_scale[c] = nx_rescale(&k.range, m)
                again |= column_scale[j] != 1
        if not again:
            break
        scales = column_scale
    spread(shape, first, last, mean, rstd, column_mean, column_rstd)
    for index in range(tile_count(shape, first, last)):
        tile_affine(k, group_tile(shape, first, last, index), x, y, gamma, beta, False, column_mean, column_rstd)


cdef int normalize_column_groups(const nx_kernels *k, ColumnGroups shape, Operand x, Operand y, const char *gamma, const char *beta,
                                 double eps, double *mean, double *rstd) except -1:
    """y = gamma * (x - mean) * rstd + beta, with a mean and rstd for each group of each example, a gamma and beta for each column."""
    cdef Py_ssize_t step = groups_of_task(shape.per_group), strips = ceil_div(shape.groups, step), task, tasks = shape.examples * strips
    cdef Py_ssize_t n, group, cols = shape.groups * shape.per_group
    cdef int threads = threads_for(tasks, shape.examples * shape.rows * cols)
    cdef double[:, :, ::1] work = np.empty((shape.examples, 3, cols))
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        n, group = task // strips, task % strips * step
        normalize_example(k, shape, example(x, k.itemsize, n), example(y, k.itemsize, n), gamma, beta, eps, group,
                          min(group + step, shape.groups), mean + n * shape.groups, rstd + n * shape.groups, &work[n, 0, 0],
                          &work[n, 1, 0], &work[n, 2, 0])
    return 0


cdef void example_backward(const nx_kernels *k, ColumnGroups shape, Operand x, Operand dy, Operand dx, const char *gamma,
                           Py_ssize_t first, Py_ssize_t last, const double *mean, const double *rstd, double *sums, double *dots,
                           double *column_mean, double *column_rstd, double *slope, double *rest, double *pivots,
                           double *deviations) noexcept nogil:
    """The formula of `runs.group_combine`, where every column of a group has a gamma of its own."""
    cdef double scale[STRIP]
    cdef double zero[STRIP]
    cdef double sum, dot, n = <double> shape.rows * <double> shape.per_group
    cdef Py_ssize_t group, index, j, c, block, start
    cdef bint far
    cdef Tile t
    spread(shape, first, last, mean, rstd, column_mean, column_rstd)
    for index in range(tile_count(shape, first, last)):
        t = group_tile(shape, first, last, index)
        tile_dots(k, t, x, dy, NULL, NULL, False, column_mean, column_rstd, NULL, sums + t.col, dots + t.col)
    far = False
    for group in range(first, last):
        j = group * shape.per_group
        sum = 0
        for c in range(j, j + shape.per_group):
            sum += sums[c]
        far |= cols_are_far(k, at(dy, k.itemsize, 0, j), dy.run_stride, shape.rows, 1, &sum, n, pivots + j)
        for c in range(j + 1, j + shape.per_group):
            pivots[c] = pivots[j]
    if far:
        for index in range(tile_count(shape, first, last)):
            t = group_tile(shape, first, last, index)
            tile_moments(k, t, x, NULL, deviations + t.col, slope + t.col)
            tile_dots(k, t, x, dy, NULL, NULL, False, column_mean, column_rstd, pivots + t.col, sums + t.col, dots + t.col)
        for j in range(first * shape.per_group, last * shape.per_group):
            deviations[j] = shape.rows * (deviations[j] - column_mean[j])
    for group in range(first, last):
        j = group * shape.per_group
        sum = dot = 0
        if far:
            dot = restore_pivot(k, gamma, j, shape.per_group, pivots[j], deviations + j, dots + j)
        for c in range(j, j + shape.per_group):
            sum += sums[c] if gamma == NULL else sums[c] * element(k, gamma, c)
            if not far:
                dot += dots[c] if gamma == NULL else dots[c] * element(k, gamma, c)
            dots[c] *= rstd[group]
        for c in range(j, j + shape.per_group):
            slope[c] = -rstd[group] * rstd[group] * rstd[group] * (dot / n)
            rest[c] = -rstd[group] * (sum / n)
    for index in range(tile_count(shape, first, last)):
        t = group_tile(shape, first, last, index)
        affines_of(k, gamma, NULL, t.col, t.cols, column_rstd + t.col, scale, zero)
        for block in range(ceil_div(t.rows, block_rows(k, t.cols)) - 1, -1, -1):
            start = block * block_rows(k, t.cols)
            col_combine(k, at(x, k.itemsize, start, t.col), x.run_stride, at(dy, k.itemsize, start, t.col), dy.run_stride,
                          at(dx, k.itemsize, start, t.col), dx.run_stride, min(block_rows(k, t.cols), t.rows - start), t.cols,
                          column_mean + t.col, pivots + t.col, scale, slope + t.col, rest + t.col, NULL)


cdef int column_groups_backward(const nx_kernels *k, ColumnGroups shape, Operand x, Operand dy, Operand dx, const char *gamma,
                                const double *mean, const double *rstd, double *sums, double *dots) except -1:
    """The gradient dx and, for each column of each example, sum(dy) and sum(dy * xhat)."""
    cdef Py_ssize_t step = groups_of_task(shape.per_group), strips = ceil_div(shape.groups, step), task, tasks = shape.examples * strips
    cdef Py_ssize_t n, group, cols = shape.groups * shape.per_group
    cdef int threads = threads_for(tasks, shape.examples * shape.rows * cols)
    cdef double[:, :, ::1] work = np.empty((shape.examples, 6, cols))
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        n, group = task // strips, task % strips * step
        example_backward(k, shape, example(x, k.itemsize, n), example(dy, k.itemsize, n), example(dx, k.itemsize, n), gamma, group,
                         min(group + step, shape.groups), mean + n * shape.groups, rstd + n * shape.groups, sums + n * cols,
                         dots + n * cols, &work[n, 0, 0], &work[n, 1, 0], &work[n, 2, 0], &work[n, 3, 0], &work[n, 4, 0], &work[n, 5, 0])
    return 0
