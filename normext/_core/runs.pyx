# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics over contiguous runs: batch norm of N,C,H,W, layer, RMS and group norm.

A group whose numbers fit the cache is one task: its statistics, then its result, while the group is still there. Large groups are
split into parts that threads share, first for the statistics, then for the result. The split depends on the shape alone and
partial sums are put together in its order, so that the number of threads changes no bit. Second passes go backwards, to meet first
what is still in cache.
"""

from cython.parallel cimport prange

import numpy as np

from normext._core.kernels cimport (
    Operand,
    affine_of,
    affines_of,
    ceil_div,
    element,
    nx_finish_moments,
    nx_kernels,
    nx_merge,
    nx_moments,
    nx_relu_mask,
    nx_rescale,
    restore_pivot,
)
from normext._core.old_kernels cimport run_moments, run_affine, run_is_far, run_dots, row_dots, run_combine, row_statistics, rows_backward, groups_backward, add_runs, old_normalize_rows
from normext._core.runtime cimport threads_for

cdef enum:
    PARTS = 32  # tasks to split the work into, where groups are few and large
    GROUP_PARTED = 1 << 16  # elements from which a group may be split
    CHUNK_ROWS = 32  # rows of layer norm whose x and dy are met twice, the second time in cache
    STRIP = 256  # columns of a task that sums down all rows
    RUNS_AT_ONCE = 64  # whose coefficients are held on the stack
    GROUPS_AT_ONCE = 8  # whose statistics are taken together

# The blocks of a group, numbered run by run: one block is several short runs, or a piece of a long one.
cdef struct Block:
    Py_ssize_t run, runs, start, n


cdef inline Py_ssize_t block_count(Runs shape, Py_ssize_t size) noexcept nogil:
    if shape.n > size:
        return shape.runs * ceil_div(shape.n, size)
    return ceil_div(shape.runs, size // shape.n)


cdef inline Block block_at(Runs shape, Py_ssize_t size, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t per_run, runs, start
    if shape.n > size:
        per_run = ceil_div(shape.n, size)
        start = index % per_run * size
        return Block(index // per_run, 1, start, min(size, shape.n - start))
    runs = size // shape.n
    return Block(index * runs, min(runs, shape.runs - index * runs), 0, shape.n)


cdef inline Py_ssize_t part_count(Runs shape, Py_ssize_t blocks) noexcept nogil:
    """Into how many parts each group is split."""
    if shape.groups >= PARTS or shape.runs * shape.n < GROUP_PARTED:
        return 1
    return min(blocks, ceil_div(PARTS, shape.groups))


cdef inline char *at(Operand x, Py_ssize_t itemsize, Py_ssize_t group, Block b) noexcept nogil:
    return x.data + (group * x.group_stride + b.run * x.run_stride + b.start) * itemsize


cdef inline char *maybe_at(Operand x, Py_ssize_t itemsize, Py_ssize_t group, Block b) noexcept nogil:
    return NULL if x.data == NULL else at(x, itemsize, group, b)


cdef inline char *row_at(Operand x, Py_ssize_t itemsize, Py_ssize_t row) noexcept nogil:
    return NULL if x.data == NULL else x.data + row * x.group_stride * itemsize


cdef inline const char *along(const nx_kernels *k, const char *gamma, Block b) noexcept nogil:
    if gamma == NULL:
        return NULL
    return gamma + b.start * k.parameter_size


# Forward ---------------------------------------------------------------------------------------------------------------------


cdef inline Runs joined(Runs shape, Operand x) noexcept nogil:
    """The same groups as one long run each, where their runs lie one after the other."""
    return Runs(shape.groups, 1, shape.runs * shape.n, shape.channels) if x.run_stride == shape.n else shape


cdef void group_moments(const nx_kernels *k, Runs shape, Operand x, bint centred, double scale, Py_ssize_t group, Py_ssize_t part,
                        Py_ssize_t parts, nx_moments *m) noexcept nogil:
    cdef Py_ssize_t index, blocks
    cdef Block b
    shape = joined(shape, x)
    blocks = block_count(shape, k.row_block)
    m.count = m.mean = m.m2 = 0
    for index in range(part * blocks // parts, (part + 1) * blocks // parts):
        b = block_at(shape, k.row_block, index)
        run_moments(k, at(x, k.itemsize, group, b), x.run_stride, b.runs, b.n, centred, scale, m)


cdef void group_affine(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                       Parameters kind, bint relu, Py_ssize_t group, Py_ssize_t first, Py_ssize_t last, double mean,
                       double rstd) noexcept nogil:
    cdef Py_ssize_t index, end, r, channel
    cdef double zero = 0
    cdef double scale[RUNS_AT_ONCE]
    cdef double shift[RUNS_AT_ONCE]
    cdef double means[RUNS_AT_ONCE]
    cdef Block b
    if kind == PER_GROUP:
        affine_of(k, gamma, beta, group, rstd, scale, shift)
    elif kind == PER_RUN:
        for r in range(min(<Py_ssize_t> RUNS_AT_ONCE, shape.runs)):
            means[r] = mean
    for index in range(last - 1, first - 1, -1):
        b = block_at(shape, k.row_block, index)
        if kind == ALONG_RUN:
            run_affine(k, at(x, k.itemsize, group, b), x.run_stride, at(y, k.itemsize, group, b), y.run_stride, b.runs, b.n,
                         &mean, &rstd, &zero, 0, along(k, gamma, b), along(k, beta, b), False)
        elif kind == PER_GROUP:
            run_affine(k, at(x, k.itemsize, group, b), x.run_stride, at(y, k.itemsize, group, b), y.run_stride, b.runs, b.n,
                         &mean, scale, shift, 0, NULL, NULL, relu)
        else:
            end = b.run + b.runs
            while b.run < end:
                channel = (group * shape.runs + b.run) % shape.channels
                b.runs = min(<Py_ssize_t> RUNS_AT_ONCE, end - b.run)
                for r in range(b.runs):
                    affine_of(k, gamma, beta, channel + r, rstd, scale + r, shift + r)
                run_affine(k, at(x, k.itemsize, group, b), x.run_stride, at(y, k.itemsize, group, b), y.run_stride, b.runs, b.n,
                             means, scale, shift, 1, NULL, NULL, relu)
                b.run += b.runs


cdef void normalize_group(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                          Parameters kind, Statistics statistics, double eps, bint relu, Py_ssize_t group, Py_ssize_t blocks,
                          double *mean, double *rstd, double *var) noexcept nogil:
    cdef nx_moments m
    cdef double scale
    if statistics != GIVEN:
        group_moments(k, shape, x, statistics == CENTRED, 1, group, 0, 1, &m)
        scale = nx_rescale(&k.range, m)
        if scale != 1:
            group_moments(k, shape, x, statistics == CENTRED, scale, group, 0, 1, &m)
        nx_finish_moments(m, scale, eps, mean + group, rstd + group, NULL if var == NULL else var + group)
    if y.data != NULL:
        group_affine(k, shape, x, y, gamma, beta, kind, relu, group, 0, blocks, mean[group], rstd[group])


cdef void normalize_some_rows(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                              bint centred, double eps, Py_ssize_t task, Py_ssize_t tasks, double *mean,
                              double *rstd) noexcept nogil:
    cdef Py_ssize_t first = task * shape.groups // tasks, rows = (task + 1) * shape.groups // tasks - first
    old_normalize_rows(k, row_at(x, k.itemsize, first), x.group_stride, row_at(y, k.itemsize, first), y.group_stride, rows, shape.n,
                     centred, eps, gamma, beta, mean + first, rstd + first)


cdef void normalize_some_groups(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                                Parameters kind, bint centred, double eps, bint relu, Py_ssize_t task, Py_ssize_t tasks,
                                Py_ssize_t blocks, double *mean, double *rstd) noexcept nogil:
    """Groups that are one short row each, some at a time."""
    cdef Py_ssize_t first = task * shape.groups // tasks, last = (task + 1) * shape.groups // tasks, end, group
    while first < last:
        end = min(first + GROUPS_AT_ONCE, last)
        row_statistics(k, row_at(x, k.itemsize, first), x.group_stride, end - first, shape.runs * shape.n, centred, eps, mean + first,
                         rstd + first)
        for group in range(first, end):
            group_affine(k, shape, x, y, gamma, beta, kind, relu, group, 0, blocks, mean[group], rstd[group])
        first = end


cdef int normalize_runs(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                        Parameters kind, Statistics statistics, double eps, bint relu, double *mean, double *rstd,
                        double *var) except -1:
    """y = gamma * (x - mean) * rstd + beta, with relu 0 where that is less (not ALONG_RUN).

    Parameters
    ----------
    gamma, beta : may be NULL.
    statistics : unless GIVEN, mean, rstd and var (may be NULL) are computed and stored.
    y : no more than the statistics is done where its data is NULL.
    """
    cdef Py_ssize_t blocks = block_count(shape, k.row_block), parts = part_count(shape, blocks)
    cdef Py_ssize_t group, part, task, tasks = shape.groups * parts
    cdef int threads = threads_for(tasks, tasks // parts * shape.runs * shape.n)
    cdef double[:, :, ::1] partial
    cdef double[::1] scale
    cdef bint again
    cdef nx_moments m
    if kind == ALONG_RUN and statistics != GIVEN and blocks == 1 and y.data != NULL:
        if shape.groups * shape.n < GROUP_PARTED // 2:  # so little that letting go of the GIL would show
            normalize_some_rows(k, shape, x, y, gamma, beta, statistics == CENTRED, eps, 0, 1, mean, rstd)
            return 0
        tasks = threads  # each row is on its own, and no bit depends on the split
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_some_rows(k, shape, x, y, gamma, beta, statistics == CENTRED, eps, task, tasks, mean, rstd)
        return 0
    if statistics != GIVEN and var == NULL and y.data != NULL and joined(shape, x).runs == 1 and shape.runs * shape.n <= k.row_block:
        tasks = threads
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_some_groups(k, shape, x, y, gamma, beta, kind, statistics == CENTRED, eps, relu, task, tasks, blocks, mean, rstd)
        return 0
    if parts == 1:
        for group in prange(shape.groups, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_group(k, shape, x, y, gamma, beta, kind, statistics, eps, relu, group, blocks, mean, rstd, var)
        return 0
    if statistics != GIVEN:
        partial, scale = np.empty((shape.groups, parts, 3)), np.ones(shape.groups)
        for attempt in range(2):  # the second with scales that the first has found
            for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
                group_moments(k, shape, x, statistics == CENTRED, scale[task // parts], task // parts, task % parts, parts,
                              <nx_moments *> &partial[task // parts, task % parts, 0])
            again = False
            for group in range(shape.groups):
                m = nx_moments(0, 0, 0)
                for part in range(parts):
                    nx_merge(&m, (<nx_moments *> &partial[group, part, 0])[0])
                nx_finish_moments(m, scale[group], eps, mean + group, rstd + group, NULL if var == NULL else var + group)
                if attempt == 0:
                    scale[group] = nx_rescale(&k.range, m)
                    again = again or scale[group] != 1
            if not again:
                break
    if y.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        group_affine(k, shape, x, y, gamma, beta, kind, relu, task // parts, task % parts * blocks // parts,
                     (task % parts + 1) * blocks // parts, mean[task // parts], rstd[task // parts])
    return 0


cdef void affine_block(const nx_kernels *k, Runs shape, Operand x, Operand y, bint relu, Py_ssize_t group, Py_ssize_t index,
                       const double *mean, const double *scale, const double *shift) noexcept nogil:
    cdef Block b = block_at(shape, k.row_block, index)
    run_affine(k, at(x, k.itemsize, group, b), x.run_stride, at(y, k.itemsize, group, b), y.run_stride, b.runs, b.n, mean + b.run,
                 scale + b.run, shift + b.run, 1, NULL, NULL, relu)


cdef int affine_runs(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta, bint relu,
                     const double *mean, const double *rstd) except -1:
    """y = gamma * (x - mean) * rstd + beta, where run r of every group has number r of each: memory is walked in its order."""
    cdef Py_ssize_t blocks = block_count(shape, k.row_block), task, tasks = shape.groups * blocks
    cdef int threads = threads_for(tasks, shape.groups * shape.runs * shape.n)
    cdef double[:, ::1] coefficients = np.empty((2, shape.runs))
    cdef double *scale = &coefficients[0, 0]
    cdef double *shift = &coefficients[1, 0]
    affines_of(k, gamma, beta, 0, shape.runs, rstd, scale, shift)
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        affine_block(k, shape, x, y, relu, task // blocks, task % blocks, mean, scale, shift)
    return 0


cdef void normalize_some_sums(const nx_kernels *k, Runs shape, Operand x, Operand residual, Operand total, Operand y, const char *gamma,
                              const char *beta, Statistics statistics, double eps, Py_ssize_t first, Py_ssize_t blocks, double *mean,
                              double *rstd) noexcept nogil:
    cdef Py_ssize_t row, rows = min(<Py_ssize_t> CHUNK_ROWS, shape.groups - first)
    add_runs(k, row_at(x, k.itemsize, first), x.group_stride, row_at(residual, k.itemsize, first), residual.group_stride,
               row_at(total, k.itemsize, first), total.group_stride, rows, shape.n)
    if blocks == 1:
        old_normalize_rows(k, row_at(total, k.itemsize, first), total.group_stride, row_at(y, k.itemsize, first), y.group_stride, rows,
                         shape.n, statistics == CENTRED, eps, gamma, beta, mean + first, rstd + first)
        return
    for row in range(first, first + rows):
        normalize_group(k, shape, total, y, gamma, beta, ALONG_RUN, statistics, eps, False, row, blocks, mean, rstd, NULL)


cdef void add_part(const nx_kernels *k, Runs shape, Operand x, Operand residual, Operand total, Py_ssize_t task,
                   Py_ssize_t parts) noexcept nogil:
    cdef Py_ssize_t row = task // parts, start = task % parts * shape.n // parts
    cdef Block b = Block(0, 1, start, (task % parts + 1) * shape.n // parts - start)
    add_runs(k, at(x, k.itemsize, row, b), 0, at(residual, k.itemsize, row, b), 0, at(total, k.itemsize, row, b), 0, 1, b.n)


cdef int normalize_sums(const nx_kernels *k, Runs shape, Operand x, Operand residual, Operand total, Operand y, const char *gamma,
                        const char *beta, Statistics statistics, double eps, double *mean, double *rstd) except -1:
    """total = x + residual, and y as normalize_runs makes it of total (one run a group, ALONG_RUN), bit by bit.

    Some rows are added up and then normalized while they are in cache.
    """
    cdef Py_ssize_t blocks = block_count(shape, k.row_block), parts = part_count(shape, blocks)
    cdef Py_ssize_t task, tasks = ceil_div(shape.groups, CHUNK_ROWS) if parts == 1 else shape.groups * parts
    cdef int threads = threads_for(tasks, shape.groups * shape.n)
    if parts == 1:
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            normalize_some_sums(k, shape, x, residual, total, y, gamma, beta, statistics, eps, task * CHUNK_ROWS, blocks, mean, rstd)
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        add_part(k, shape, x, residual, total, task, parts)
    return normalize_runs(k, shape, total, y, gamma, beta, ALONG_RUN, statistics, eps, False, mean, rstd, NULL)


# Backward --------------------------------------------------------------------------------------------------------------------


cdef void group_dots(const nx_kernels *k, Runs shape, Operand x, Operand dy, const char *gamma, const char *beta, Parameters kind,
                     bint relu, Py_ssize_t group, Py_ssize_t first, Py_ssize_t last, double mean, double rstd, const double *pivot,
                     double *sum, double *dot) noexcept nogil:
    cdef Py_ssize_t index
    cdef Block b
    cdef double scale, shift
    cdef nx_relu_mask gate = nx_relu_mask(&scale, &shift)
    if kind == PER_GROUP:
        affine_of(k, gamma, beta, group, rstd, &scale, &shift)
        gamma = NULL
    sum[0] = dot[0] = 0
    for index in range(first, last):
        b = block_at(shape, k.row_block, index)
        run_dots(k, at(x, k.itemsize, group, b), x.run_stride, at(dy, k.itemsize, group, b), dy.run_stride, b.runs, b.n, mean,
                   pivot, along(k, gamma, b), &gate if relu else NULL, sum, dot, 0)


cdef bint is_far(const nx_kernels *k, Operand dy, const char *gamma, Parameters kind, Statistics statistics, Py_ssize_t group,
                 Py_ssize_t n, double mean) noexcept nogil:
    """Whether the sums of a group's gradients, with this mean, are to be taken about it (nx_near in kernels.h says why)."""
    return statistics == CENTRED and run_is_far(k, dy.data + group * dy.group_stride * k.itemsize, n, gamma if kind == ALONG_RUN else NULL,
                                                  mean)


cdef void group_combine(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                        const char *beta, Parameters kind, Statistics statistics, bint relu, double count, Py_ssize_t group,
                        Py_ssize_t first, Py_ssize_t last, double mean, double rstd, double sum, double dot) noexcept nogil:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + more for g = gamma * dy and xhat = (x - mean) * rstd.

    Statistics about zero have no mean to pass a gradient through: the middle term is not there.
    """
    cdef Py_ssize_t index
    cdef Block b
    cdef double zero = 0, a = rstd, shift, g_mean = sum / count if statistics == CENTRED else 0, slope
    cdef nx_relu_mask gate = nx_relu_mask(&a, &shift)
    if kind == PER_GROUP:
        affine_of(k, gamma, beta, group, rstd, &a, &shift)
        gamma = NULL
    slope = 0 if statistics == GIVEN else -a * rstd * rstd * (dot / count)
    for index in range(last - 1, first - 1, -1):
        b = block_at(shape, k.row_block, index)
        if statistics != GIVEN or relu:
            run_combine(k, at(x, k.itemsize, group, b), x.run_stride, at(dy, k.itemsize, group, b), dy.run_stride,
                          at(dx, k.itemsize, group, b), dx.run_stride, b.runs, b.n, mean, g_mean, &a, 0, slope, -a * g_mean,
                          along(k, gamma, b), &gate if relu else NULL, maybe_at(more, k.itemsize, group, b), more.run_stride)
        else:  # the statistics are constants, and x does not matter
            run_affine(k, at(dy, k.itemsize, group, b), dy.run_stride, at(dx, k.itemsize, group, b), dx.run_stride, b.runs, b.n,
                         &zero, &a, &zero, 0, along(k, gamma, b), NULL, False)


cdef void backward_group(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                         const char *beta, Parameters kind, Statistics statistics, bint relu, bint given, double count,
                         Py_ssize_t group, Py_ssize_t blocks, double mean, double rstd, const double *pivots, double *sum,
                         double *dot) noexcept nogil:
    cdef double pivot
    if not given:
        group_dots(k, shape, x, dy, gamma, beta, kind, relu, group, 0, blocks, mean, rstd, pivots + group if pivots != NULL else NULL, sum,
                   dot)
        pivot = sum[0] / count
        if dx.data != NULL and is_far(k, dy, gamma, kind, statistics, group, shape.n, pivot):
            group_dots(k, shape, x, dy, gamma, beta, kind, relu, group, 0, blocks, mean, rstd, &pivot, sum, dot)
    if dx.data != NULL:
        group_combine(k, shape, x, dy, more, dx, gamma, beta, kind, statistics, relu, count, group, 0, blocks, mean, rstd, sum[0],
                      dot[0])


cdef int runs_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                       const char *beta, Parameters kind, Statistics statistics, bint relu, bint given, double count,
                       const double *mean, const double *rstd, const double *pivots, double *sums, double *dots) except -1:
    """The gradient dx and, for each group, sum(g) and sum(g * (x - mean)).

    Parameters
    ----------
    more : added to dx; its data may be NULL.
    gamma, beta : may be NULL; g is ``gamma * dy`` where they are ALONG_RUN, and dy where they are PER_GROUP.
    relu : whether dy counts as 0 where y was not above 0 (PER_GROUP only).
    given : whether sums and dots hold the sums already, or they are to be computed and stored.
    count : how many numbers share a statistic.
    pivots : subtracted from each group's g in the second sum; may be NULL. Where all numbers of a group are here, its own is found.
    dx : no more than the sums, of what may be parts of groups, is done where its data is NULL.
    """
    cdef Py_ssize_t blocks = block_count(shape, k.row_block), parts = part_count(shape, blocks)
    cdef Py_ssize_t group, part, task, tasks = shape.groups * parts
    cdef int threads = threads_for(tasks, shape.groups * shape.runs * shape.n)
    cdef double[:, :, ::1] partial
    cdef double[::1] pivot
    cdef const double *about
    cdef bint again
    if parts == 1:
        for group in prange(shape.groups, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            backward_group(k, shape, x, dy, more, dx, gamma, beta, kind, statistics, relu, given, count, group, blocks, mean[group],
                           rstd[group], pivots, sums + group, dots + group)
        return 0
    if not given:
        partial, pivot, about = np.empty((shape.groups, parts, 2)), np.zeros(shape.groups), pivots
        for attempt in range(2):  # the second about pivots that the first has found
            for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
                group_dots(k, shape, x, dy, gamma, beta, kind, relu, task // parts, task % parts * blocks // parts,
                           (task % parts + 1) * blocks // parts, mean[task // parts], rstd[task // parts],
                           about + task // parts if about != NULL else NULL,
                           &partial[task // parts, task % parts, 0], &partial[task // parts, task % parts, 1])
            again = False
            for group in range(shape.groups):
                sums[group] = dots[group] = 0
                for part in range(parts):
                    sums[group] += partial[group, part, 0]
                    dots[group] += partial[group, part, 1]
                if attempt == 0 and dx.data != NULL and is_far(k, dy, gamma, kind, statistics, group, shape.n, sums[group] / count):
                    pivot[group], again = sums[group] / count, True
            if not again:
                break
            about = &pivot[0]
    if dx.data == NULL:
        return 0
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        group_combine(k, shape, x, dy, more, dx, gamma, beta, kind, statistics, relu, count, task // parts,
                      task % parts * blocks // parts, (task % parts + 1) * blocks // parts, mean[task // parts], rstd[task // parts],
                      sums[task // parts], dots[task // parts])
    return 0


cdef void backward_rows(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                        Statistics statistics, Py_ssize_t first, Py_ssize_t last, const double *mean, const double *rstd,
                        double *dbeta, double *dgamma) noexcept nogil:
    """dx of some rows, and their sums added to dbeta and dgamma: first the latter, since dx may be written over dy."""
    cdef Py_ssize_t row, blocks = block_count(shape, k.row_block), start = first, end
    cdef double sum, dot
    while start < last:
        end = min(start + CHUNK_ROWS, last)
        row_dots(k, row_at(x, k.itemsize, start), x.group_stride, row_at(dy, k.itemsize, start), dy.group_stride, end - start,
                   shape.n, mean + start, rstd + start, dbeta, dgamma)
        if blocks == 1:
            rows_backward(k, row_at(x, k.itemsize, start), x.group_stride, row_at(dy, k.itemsize, start), dy.group_stride,
                            row_at(dx, k.itemsize, start), dx.group_stride, end - start, shape.n, statistics == CENTRED, gamma,
                            mean + start, rstd + start, row_at(more, k.itemsize, start), more.group_stride)
        else:
            for row in range(start, end):
                backward_group(k, shape, x, dy, more, dx, gamma, NULL, ALONG_RUN, statistics, False, False, <double> shape.n, row,
                               blocks, mean[row], rstd[row], NULL, &sum, &dot)
        start = end


cdef void sum_rows(const nx_kernels *k, Runs shape, Operand x, Operand dy, Py_ssize_t column, const double *mean,
                   const double *rstd, double *dbeta, double *dgamma) noexcept nogil:
    """The sums over all rows for a strip of columns."""
    cdef Py_ssize_t block, start
    for block in range(ceil_div(shape.groups, k.col_rows)):
        start = block * k.col_rows
        row_dots(k, x.data + (start * x.group_stride + column) * k.itemsize, x.group_stride,
                   dy.data + (start * dy.group_stride + column) * k.itemsize, dy.group_stride,
                   min(k.col_rows, shape.groups - start), min(<Py_ssize_t> STRIP, shape.n - column), mean + start, rstd + start,
                   dbeta + column, dgamma + column)


cdef int layer_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                        Statistics statistics, const double *mean, const double *rstd, double *dbeta,
                        double *dgamma) except -1:
    """The gradient dx of rows (one run a group) and, added to dbeta and dgamma, sum(dy) and sum(dy * xhat) over the rows.

    `more` is added to dx; its data may be NULL.
    """
    cdef Py_ssize_t chunks = max(1, min(<Py_ssize_t> PARTS, shape.groups // CHUNK_ROWS))
    cdef Py_ssize_t task, j, elements = shape.groups * shape.n
    cdef int threads
    cdef double[:, :, ::1] partial
    cdef double[:, ::1] sums
    if chunks == 1 and elements < GROUP_PARTED:
        backward_rows(k, shape, x, dy, more, dx, gamma, statistics, 0, shape.groups, mean, rstd, dbeta, dgamma)
        return 0
    if chunks < PARTS // 4:  # too few rows to share out: strips of columns instead, and the rows' runs in parts
        threads = threads_for(ceil_div(shape.n, STRIP), elements)
        for task in prange(ceil_div(shape.n, STRIP), nogil=True, num_threads=threads, use_threads_if=threads > 1,
                           schedule="static"):
            sum_rows(k, shape, x, dy, task * STRIP, mean, rstd, dbeta, dgamma)
        sums = np.empty((2, shape.groups))
        return runs_backward(k, shape, x, dy, more, dx, gamma, NULL, ALONG_RUN, statistics, False, False, <double> shape.n, mean, rstd,
                             NULL, &sums[0, 0], &sums[1, 0])
    partial = np.zeros((chunks, 2, shape.n))
    threads = threads_for(chunks, elements)
    for task in prange(chunks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        backward_rows(k, shape, x, dy, more, dx, gamma, statistics, task * shape.groups // chunks,
                      (task + 1) * shape.groups // chunks, mean, rstd, &partial[task, 0, 0], &partial[task, 1, 0])
    for task in range(chunks):
        for j in range(shape.n):
            dbeta[j] += partial[task, 0, j]
            dgamma[j] += partial[task, 1, j]
    return 0


cdef void run_dots_of_group(const nx_kernels *k, Runs shape, Operand x, Operand dy, Py_ssize_t group, double mean, const double *pivot,
                            double *sums, double *dots) noexcept nogil:
    cdef Py_ssize_t r, index
    cdef Block b
    for r in range(shape.runs):
        sums[r] = dots[r] = 0
    for index in range(block_count(shape, k.row_block)):
        b = block_at(shape, k.row_block, index)
        run_dots(k, at(x, k.itemsize, group, b), x.run_stride, at(dy, k.itemsize, group, b), dy.run_stride, b.runs, b.n, mean, pivot,
                   NULL, NULL, sums + b.run, dots + b.run, 1)


cdef void run_deviations(const nx_kernels *k, Runs shape, Operand x, Py_ssize_t group, double mean, double *deviations) noexcept nogil:
    """Each run's sum of x - mean."""
    cdef Py_ssize_t r
    cdef nx_moments m
    cdef Runs one = Runs(shape.groups, 1, shape.n, shape.channels)
    cdef Operand run = Operand(x.data, x.group_stride, 0)
    for r in range(shape.runs):
        run.data = x.data + r * x.run_stride * k.itemsize
        group_moments(k, one, run, True, 1, group, 0, 1, &m)
        deviations[r] = m.count * (m.mean - mean)


cdef void backward_runs_of_group(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma,
                                 Py_ssize_t group, double mean, double rstd, double *sums, double *dots,
                                 double *deviations) noexcept nogil:
    """group_combine's formula where every run of a group has a gamma of its own; `groups_backward` does the same to short groups.

    `deviations` is work space, a number for each run.
    """
    cdef Py_ssize_t r, index, end, channel = group * shape.runs % shape.channels, blocks = block_count(shape, k.row_block)
    cdef double sum = 0, dot = 0, n = <double> shape.runs * <double> shape.n, pivot = 0
    cdef double a[RUNS_AT_ONCE]
    cdef Block b
    run_dots_of_group(k, shape, x, dy, group, mean, NULL, sums, dots)
    for r in range(shape.runs):
        pivot += sums[r] / n
    if is_far(k, dy, NULL, PER_RUN, CENTRED, group, shape.n, pivot):
        run_deviations(k, shape, x, group, mean, deviations)
        run_dots_of_group(k, shape, x, dy, group, mean, &pivot, sums, dots)
        dot = restore_pivot(k, gamma, channel, shape.runs, pivot, deviations, dots)
    else:
        for r in range(shape.runs):
            dot += dots[r] if gamma == NULL else dots[r] * element(k, gamma, channel + r)
    for r in range(shape.runs):
        sum += sums[r] if gamma == NULL else sums[r] * element(k, gamma, channel + r)
    for index in range(blocks - 1, -1, -1):
        b = block_at(shape, k.row_block, index)
        end = b.run + b.runs
        while b.run < end:
            b.runs = min(<Py_ssize_t> RUNS_AT_ONCE, end - b.run)
            for r in range(b.runs):
                a[r] = rstd if gamma == NULL else rstd * element(k, gamma, channel + b.run + r)
            run_combine(k, at(x, k.itemsize, group, b), x.run_stride, at(dy, k.itemsize, group, b), dy.run_stride,
                          at(dx, k.itemsize, group, b), dx.run_stride, b.runs, b.n, mean, pivot, a, 1,
                          -rstd * rstd * rstd * (dot / n), -rstd * (sum / n), NULL, NULL, NULL, 0)
            b.run += b.runs
    for r in range(shape.runs):
        dots[r] *= rstd


cdef void backward_some_groups(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma, Py_ssize_t first,
                               Py_ssize_t last, const double *mean, const double *rstd, double *sums, double *dots,
                               double *deviations) noexcept nogil:
    """Short groups, in one go but for those that are far from zero."""
    while True:
        first += groups_backward(k, row_at(x, k.itemsize, first), x.group_stride, x.run_stride, row_at(dy, k.itemsize, first),
                                   dy.group_stride, dy.run_stride, row_at(dx, k.itemsize, first), dx.group_stride, dx.run_stride,
                                   last - first, shape.runs, shape.n, gamma, first * shape.runs % shape.channels, shape.channels,
                                   mean + first, rstd + first, sums + first * shape.runs, dots + first * shape.runs)
        if first == last:
            return
        backward_runs_of_group(k, shape, x, dy, dx, gamma, first, mean[first], rstd[first], sums + first * shape.runs,
                               dots + first * shape.runs, deviations + first * shape.runs)
        first += 1


cdef int grouped_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma,
                          const double *mean, const double *rstd, double *sums, double *dots, double *deviations) except -1:
    """The gradient dx and, for each run of each group, sum(dy) and sum(dy * xhat); gamma is PER_RUN.

    `deviations` is work space, a number for each run of each group.
    """
    cdef Py_ssize_t group, task, tasks
    cdef int threads = threads_for(shape.groups, shape.groups * shape.runs * shape.n)
    if block_count(shape, k.row_block) == 1:
        tasks = threads  # each group is on its own, and no bit depends on the split
        for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            backward_some_groups(k, shape, x, dy, dx, gamma, task * shape.groups // tasks, (task + 1) * shape.groups // tasks, mean, rstd,
                                 sums, dots, deviations)
        return 0
    for group in prange(shape.groups, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        backward_runs_of_group(k, shape, x, dy, dx, gamma, group, mean[group], rstd[group], sums + group * shape.runs,
                               dots + group * shape.runs, deviations + group * shape.runs)
    return 0
