# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics down columns: batch norm of (N, D) and N,H,W,C, and group norm of the latter.

The sizes of work are those of rows.pyx: here a row is the columns' numbers at one place, a block
some rows of some columns, and a chunk the blocks of a task. Rows are walked in memory order. Work
is split along the columns and, where there are many rows, along these: by the shape alone, and the
chunks' sums are put together in their order, so that the number of threads changes no bit. Second
passes go backwards, to meet first what is still in cache.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from normext cimport NORMEXT_NO_MEMORY, NORMEXT_OK
from normext._core.call cimport GIVEN, Call, Job, gamma_of
from normext._core.kernels cimport (
    affines_of, ceil_div, nx_affine, nx_backward, nx_block, nx_constant, nx_finish_moments,
    nx_groups, nx_inverse_stds, nx_line, nx_merge, nx_merge_equal, nx_moments, nx_relu_mask,
    nx_rescale, nx_rescale_columns, nx_rows, nx_slope, nx_sums, restore_pivot,
)
from normext._core.runtime cimport run_on, run_tasks, team_for

cdef enum:
    CHUNKS = 32  # as in rows.pyx
    SPLIT = 1 << 16  # likewise
    # Columns of a task, whose coefficients are on its stack: up to 5 arrays of 4 KiB, of which
    # those that a kernel reads at a time fit the L1 cache.
    COLUMNS = 512

# Some rows of some columns.
cdef struct Chunk:
    Py_ssize_t row, rows, col, cols


cdef inline Py_ssize_t block_rows(const Call *c, Chunk t) noexcept nogil:
    """Rows of a block of so many columns."""
    return max(c.k.col_rows, c.k.col_block // t.cols)


cdef inline Py_ssize_t block_count(const Call *c, Chunk t) noexcept nogil:
    return ceil_div(t.rows, block_rows(c, t))


cdef inline nx_block block_at(const Call *c, Chunk t, Py_ssize_t index) noexcept nogil:
    return nx_block(min(block_rows(c, t), t.rows - index * block_rows(c, t)), t.cols)


cdef inline nx_rows at(const Call *c, nx_groups a, Chunk t, Py_ssize_t block) noexcept nogil:
    """The rows of a chunk's block in an array; no data where there is none."""
    if a.data == NULL:
        return nx_rows(NULL, 0)
    cdef Py_ssize_t row = t.row + block * block_rows(c, t)
    return nx_rows(<char *> a.data + (row * a.row + t.col) * c.k.itemsize, a.row)


cdef inline Job job_of(const Call *c) noexcept nogil:
    """`blocks`: into how many the columns are split; then the rows' chunks, and all tasks."""
    cdef Py_ssize_t across = ceil_div(c.n, COLUMNS), chunks = 1
    if c.rows * c.n >= SPLIT:
        chunks = min(block_count(c, Chunk(0, c.rows, 0, c.n)), ceil_div(CHUNKS, across))
    return Job(c, across, chunks, across * chunks, NULL, NULL)


cdef inline Chunk chunk_at(const Job *j, Py_ssize_t task) noexcept nogil:
    cdef const Call *c = j.call
    cdef Py_ssize_t chunk = task // j.blocks, col = task % j.blocks * COLUMNS
    cdef Py_ssize_t row = chunk * c.rows // j.chunks
    return Chunk(row, (chunk + 1) * c.rows // j.chunks - row, col,
                 min(<Py_ssize_t> COLUMNS, c.n - col))


# Forward -----------------------------------------------------------------------------------------


cdef void chunk_moments(const Call *c, Chunk t, const double *scale, double *mean,
                        double *m2) noexcept nogil:
    """Of numbers times `scale`, NULL for 1; all of the chunk's columns."""
    cdef Py_ssize_t block, j
    for j in range(t.cols):
        mean[j] = m2[j] = 0
    for block in range(block_count(c, t)):
        c.k.col_moments(at(c, c.x, t, block), block_at(c, t, block), scale,
                        <double> (block * block_rows(c, t)), mean, m2)


cdef void finish_columns(const Call *c, Py_ssize_t col, Py_ssize_t cols,
                         double *scale) noexcept nogil:
    """mean, rstd and var of columns from their moments, the m2 of which lie in rstd.

    `scale`, NULL for 1, is of the columns from `col` on, and written over.
    """
    cdef Py_ssize_t j
    cdef double *m2_to_rstd = c.rstd
    for j in range(col, col + cols):
        if scale == NULL:
            m2_to_rstd[j] /= <double> c.rows
        else:  # rstd may be a number where the variance is none
            nx_finish_moments(nx_moments(<double> c.rows, c.mean[j], m2_to_rstd[j]), scale[j - col],
                              c.eps, c.mean + j, scale + j - col, m2_to_rstd + j)
    if c.var != NULL:
        memcpy(c.var + col, m2_to_rstd + col, cols * sizeof(double))
    if scale == NULL:
        nx_inverse_stds(m2_to_rstd + col, cols, c.eps)
    else:
        memcpy(m2_to_rstd + col, scale, cols * sizeof(double))


cdef void chunk_affine(const Call *c, Chunk t, const double *mean,
                       const double *rstd) noexcept nogil:
    """y of a chunk; mean and rstd are those of the array's columns."""
    cdef double scale[COLUMNS]
    cdef double shift[COLUMNS]
    cdef nx_affine map = nx_affine(mean + t.col, &scale[0], &shift[0], 1, 0)
    cdef Py_ssize_t block
    affines_of(c.k, c.gamma, c.beta, t.col, t.cols, rstd + t.col, scale, shift)
    for block in range(block_count(c, t) - 1, -1, -1):
        c.k.col_affine(at(c, c.x, t, block), at(c, c.y, t, block), block_at(c, t, block), &map,
                       c.relu)


cdef void normalize_task(const void *job, Py_ssize_t task) noexcept nogil:
    """All rows of some columns."""
    cdef const Call *c = (<const Job *> job).call
    cdef Chunk t = chunk_at(<const Job *> job, task)
    cdef double scale[COLUMNS]
    cdef bint again
    if c.statistics != GIVEN:
        chunk_moments(c, t, NULL, c.mean + t.col, c.rstd + t.col)
        again = nx_rescale_columns(&c.k.range, t.cols, <double> t.rows, c.mean + t.col,
                                   c.rstd + t.col, scale)
        if again:
            chunk_moments(c, t, scale, c.mean + t.col, c.rstd + t.col)
        finish_columns(c, t.col, t.cols, scale if again else NULL)
    if c.y.data != NULL:
        chunk_affine(c, t, c.mean, c.rstd)


cdef inline double *partial_of(const Job *j, Py_ssize_t task, int which) noexcept nogil:
    """Where a chunk's means (0) or m2 (1), or its sums and dots, go: row by row of chunks."""
    return j.partial + (2 * (task // j.blocks) + which) * j.call.n + task % j.blocks * COLUMNS


cdef inline double *adjust_of(const Job *j, Py_ssize_t task) noexcept nogil:
    return NULL if j.adjust == NULL else j.adjust + task % j.blocks * COLUMNS


cdef void moments_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_moments(j.call, chunk_at(j, task), adjust_of(j, task), partial_of(j, task, 0),
                  partial_of(j, task, 1))


cdef void affine_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_affine(j.call, chunk_at(j, j.tasks - 1 - task), j.call.mean, j.call.rstd)


cdef int moments_in_chunks(const Call *c, Job *j, int threads) noexcept nogil:
    """The statistics of columns whose rows are split."""
    cdef Py_ssize_t col, chunk
    cdef double *scale
    cdef double rows
    cdef nx_moments m
    j.partial = <double *> malloc((2 * j.chunks + 1) * c.n * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    scale = j.partial + 2 * j.chunks * c.n
    while True:
        run_on(threads, moments_task, j, j.tasks)
        for col in range(c.n):
            m = nx_moments(0, 0, 0)
            for chunk in range(j.chunks):
                rows = <double> ((chunk + 1) * c.rows // j.chunks - chunk * c.rows // j.chunks)
                nx_merge(&m, nx_moments(rows, j.partial[2 * chunk * c.n + col],
                                        j.partial[(2 * chunk + 1) * c.n + col]))
            c.mean[col], c.rstd[col] = m.mean, m.m2
        if j.adjust != NULL or not nx_rescale_columns(&c.k.range, c.n, <double> c.rows, c.mean,
                                                      c.rstd, scale):
            break
        j.adjust = scale  # once more, with scales that the first attempt has found
    finish_columns(c, 0, c.n, j.adjust)
    free(j.partial)
    return NORMEXT_OK


cdef int normalize_columns(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta, one of each for a column; see rows.normalize_rows."""
    cdef Job j = job_of(c)
    cdef int status, threads = team_for(j.tasks, c.rows * c.n)
    if threads == 0:
        return NORMEXT_NO_MEMORY
    if j.chunks == 1:
        run_on(threads, normalize_task, &j, j.tasks)
        return NORMEXT_OK
    if c.statistics != GIVEN:
        status = moments_in_chunks(c, &j, threads)
        if status != NORMEXT_OK:
            return status
    if c.y.data != NULL:
        run_on(threads, affine_task, &j, j.tasks)
    return NORMEXT_OK


# Backward ----------------------------------------------------------------------------------------


cdef inline nx_backward backward_of(const Call *c, Chunk t, Py_ssize_t block,
                                    const nx_relu_mask *relu) noexcept nogil:
    """The backward pass of a chunk's block."""
    cdef nx_backward of
    of.block, of.x, of.dy = block_at(c, t, block), at(c, c.x, t, block), at(c, c.dy, t, block)
    of.dx, of.addend = at(c, c.dx, t, block), nx_rows(NULL, 0)
    of.gamma, of.relu, of.ahead = NULL, relu, 0
    return of


cdef void chunk_dots(const Call *c, Chunk t, const double *pivots, nx_sums sums) noexcept nogil:
    """The sums of the chunk's columns, whose `pivots` may be NULL."""
    cdef double scale[COLUMNS]
    cdef double shift[COLUMNS]
    cdef nx_relu_mask mask = nx_relu_mask(&scale[0], &shift[0])
    cdef nx_backward of
    cdef Py_ssize_t block, j
    for j in range(t.cols):
        sums.sum[j] = sums.dot[j] = 0
    if c.relu:
        affines_of(c.k, c.gamma, c.beta, t.col, t.cols, c.rstd + t.col, scale, shift)
    for block in range(block_count(c, t)):
        of = backward_of(c, t, block, &mask if c.relu else NULL)
        c.k.col_dots(&of, c.mean + t.col, pivots, sums)


cdef void chunk_dx(const Call *c, Chunk t) noexcept nogil:
    cdef double factor[COLUMNS]
    cdef double shift[COLUMNS]
    cdef double slope[COLUMNS]
    cdef double dy_mean[COLUMNS]
    cdef double constant[COLUMNS]
    # Pointers of its own, for the loop to become vectors.
    cdef const double *rstd = c.rstd + t.col
    cdef const double *sums = c.sums + t.col
    cdef const double *dots = c.dots + t.col
    cdef double each = 1 / c.count
    cdef bint own = c.statistics != GIVEN
    cdef nx_relu_mask mask = nx_relu_mask(&factor[0], &shift[0])
    cdef nx_line line = nx_line(c.mean + t.col, &dy_mean[0], &factor[0], &slope[0], &constant[0], 1)
    cdef nx_affine map = nx_affine(&dy_mean[0], &factor[0], &slope[0], 1, 0)
    cdef nx_backward of
    cdef Py_ssize_t j, block
    affines_of(c.k, c.gamma, c.beta, t.col, t.cols, rstd, factor, shift)
    for j in range(t.cols):
        slope[j] = nx_slope(factor[j], rstd[j], dots[j] * each) if own else 0
        dy_mean[j] = sums[j] * each if own else 0
        constant[j] = nx_constant(factor[j], dy_mean[j])
    for block in range(block_count(c, t) - 1, -1, -1):
        of = backward_of(c, t, block, &mask if c.relu else NULL)
        if own or c.relu:
            c.k.col_dx(&of, &line)
        else:  # the statistics are constants, and x does not matter: slope and dy_mean are zeros
            c.k.col_affine(of.dy, of.dx, of.block, &map, False)


cdef inline const double *pivots_of(const Call *c, Chunk t) noexcept nogil:
    return NULL if c.pivots == NULL else c.pivots + t.col


cdef void backward_task(const void *job, Py_ssize_t task) noexcept nogil:
    """All rows of some columns."""
    cdef const Call *c = (<const Job *> job).call
    cdef Chunk t = chunk_at(<const Job *> job, task)
    cdef nx_sums sums = nx_sums(c.sums + t.col, c.dots + t.col, 1)
    cdef double pivots[COLUMNS]
    if not c.given:
        chunk_dots(c, t, pivots_of(c, t), sums)
        if c.statistics != GIVEN and c.dx.data != NULL and c.k.cols_are_far(
                at(c, c.dy, t, 0), nx_block(t.rows, t.cols), sums.sum, c.count, pivots):
            chunk_dots(c, t, pivots, sums)
    if c.dx.data != NULL:
        chunk_dx(c, t)


cdef void dots_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_dots(j.call, chunk_at(j, task), adjust_of(j, task),
               nx_sums(partial_of(j, task, 0), partial_of(j, task, 1), 1))


cdef void dx_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_dx(j.call, chunk_at(j, j.tasks - 1 - task))


cdef int dots_in_chunks(const Call *c, Job *j, int threads) noexcept nogil:
    """The sums of columns whose rows are split."""
    cdef Py_ssize_t col, chunk, attempt
    cdef double *pivots
    j.partial = <double *> malloc((2 * j.chunks + 1) * c.n * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    pivots, j.adjust = j.partial + 2 * j.chunks * c.n, <double *> c.pivots
    for attempt in range(2):  # the second about pivots that the first has found
        run_on(threads, dots_task, j, j.tasks)
        for col in range(c.n):
            c.sums[col] = c.dots[col] = 0
            for chunk in range(j.chunks):
                c.sums[col] += j.partial[2 * chunk * c.n + col]
                c.dots[col] += j.partial[(2 * chunk + 1) * c.n + col]
        if attempt == 1 or c.statistics == GIVEN or c.dx.data == NULL or not c.k.cols_are_far(
                nx_rows(c.dy.data, c.dy.row), nx_block(c.rows, c.n), c.sums, c.count, pivots):
            break
        j.adjust = pivots
    free(j.partial)
    return NORMEXT_OK


cdef int columns_backward(const Call *c) noexcept nogil:
    """The gradient dx and, for each column, its sum and dot; see rows.rows_backward."""
    cdef Job j = job_of(c)
    cdef int status, threads = team_for(j.tasks, c.rows * c.n)
    if threads == 0:
        return NORMEXT_NO_MEMORY
    if j.chunks == 1:
        run_on(threads, backward_task, &j, j.tasks)
        return NORMEXT_OK
    if not c.given:
        status = dots_in_chunks(c, &j, threads)
        if status != NORMEXT_OK:
            return status
    if c.dx.data != NULL:
        run_on(threads, dx_task, &j, j.tasks)
    return NORMEXT_OK


# Group norm, channels last -----------------------------------------------------------------------

# A task is an example and some of its groups. The columns' moments make the groups'. `partial` has,
# for each example, several numbers for each column.

cdef enum:
    FORWARD_NUMBERS = 3
    BACKWARD_NUMBERS = 8

# An example's groups first to last, and numbers for its columns; in what order, the passes say.
cdef struct Example:
    Py_ssize_t index, first, last
    double *columns


cdef inline Py_ssize_t groups_of_task(const Call *c) noexcept nogil:
    return max(1, COLUMNS // c.per_group)


cdef inline Example example_at(const Job *j, Py_ssize_t task, int numbers) noexcept nogil:
    cdef const Call *c = j.call
    cdef Py_ssize_t groups = c.n // c.per_group, step = groups_of_task(c)
    cdef Py_ssize_t n = task // j.blocks, first = task % j.blocks * step
    return Example(n, first, min(first + step, groups), j.partial + n * numbers * c.n)


cdef inline Call call_of(const Call *c, Example e) noexcept nogil:
    """The call for one example, with the statistics of its groups."""
    cdef Call of_example = c[0]
    cdef Py_ssize_t size = c.k.itemsize, groups = c.n // c.per_group
    of_example.x.data = <char *> c.x.data + e.index * c.x.group * size
    of_example.y.data = <char *> c.y.data + e.index * c.y.group * size
    of_example.dy.data = <char *> c.dy.data + e.index * c.dy.group * size
    of_example.dx.data = <char *> c.dx.data + e.index * c.dx.group * size
    of_example.mean = c.mean + e.index * groups
    of_example.rstd = c.rstd + e.index * groups
    return of_example


cdef inline Py_ssize_t chunks_of(const Call *c, Example e) noexcept nogil:
    return ceil_div((e.last - e.first) * c.per_group, COLUMNS)


cdef inline Chunk chunk_of(const Call *c, Example e, Py_ssize_t index) noexcept nogil:
    """All rows of some of the example's columns."""
    cdef Py_ssize_t col = e.first * c.per_group + index * COLUMNS
    return Chunk(0, c.rows, col, min(<Py_ssize_t> COLUMNS, e.last * c.per_group - col))


cdef void spread(const Call *c, Example e, double *mean, double *rstd) noexcept nogil:
    """Each group's statistics, once for each of its columns."""
    cdef Py_ssize_t group, j
    for group in range(e.first, e.last):
        for j in range(group * c.per_group, (group + 1) * c.per_group):
            mean[j] = c.mean[group]
            rstd[j] = c.rstd[group]


cdef void normalize_example(const Call *c, Example e) noexcept nogil:
    cdef Py_ssize_t group, index, j, col, attempt
    cdef double *mean = e.columns
    cdef double *rstd = mean + c.n
    cdef double *scale = rstd + c.n
    cdef double *scales = NULL  # of the columns, a group's all alike
    cdef nx_moments m
    cdef Chunk t
    cdef bint again
    for attempt in range(2):  # the second with scales that the first has found
        for index in range(chunks_of(c, e)):
            t = chunk_of(c, e, index)
            chunk_moments(c, t, NULL if scales == NULL else scales + t.col, mean + t.col,
                          rstd + t.col)
        again = False
        for group in range(e.first, e.last):
            j = group * c.per_group
            m = nx_merge_equal(<double> c.rows, c.per_group, mean + j, rstd + j)
            nx_finish_moments(m, 1 if scales == NULL else scales[j], c.eps, c.mean + group,
                              c.rstd + group, NULL)
            if attempt == 0:
                for col in range(j, j + c.per_group):
                    scale[col] = nx_rescale(&c.k.range, m)
                again |= scale[j] != 1
        if not again:
            break
        scales = scale
    spread(c, e, mean, rstd)
    for index in range(chunks_of(c, e)):
        chunk_affine(c, chunk_of(c, e, index), mean, rstd)


cdef void normalize_example_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Example e = example_at(j, task, FORWARD_NUMBERS)
    cdef Call of_example = call_of(j.call, e)
    normalize_example(&of_example, e)


cdef int run_examples(const Call *c, Job *j, bint backward) noexcept nogil:
    j.blocks = ceil_div(c.n // c.per_group, groups_of_task(c))
    j.partial = <double *> malloc(
        c.groups * c.n * (BACKWARD_NUMBERS if backward else FORWARD_NUMBERS) * sizeof(double)
    )
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    return run_tasks(example_backward_task if backward else normalize_example_task, j,
                     c.groups * j.blocks, c.groups * c.rows * c.n)


cdef int normalize_column_groups(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta.

    There are a mean and rstd for each group of each example, a gamma and beta for each column.
    """
    cdef Job j = Job(c, 0, 1, 0, NULL, NULL)
    cdef int status = run_examples(c, &j, False)
    free(j.partial)
    return status


cdef void example_backward(const Call *c, Example e) noexcept nogil:
    """chunk_dx where the columns of a group share a statistic, and each has a gamma of its own."""
    cdef double *sums = e.columns  # then dots, which become those of xhat
    cdef double *dots = sums + c.n
    cdef double *mean = dots + c.n
    cdef double *rstd = mean + c.n
    cdef double *slope = rstd + c.n
    cdef double *constant = slope + c.n
    cdef double *pivots = constant + c.n
    cdef double *deviations = pivots + c.n
    cdef double factor[COLUMNS]
    cdef double zero[COLUMNS]
    cdef double sum, dot, r, n = <double> c.rows * <double> c.per_group
    cdef Py_ssize_t group, index, j, col, block
    cdef nx_line line
    cdef nx_backward of
    cdef bint far = False
    cdef Chunk t
    cdef Call of_columns = c[0]
    of_columns.mean, of_columns.rstd = mean, rstd
    spread(c, e, mean, rstd)
    for index in range(chunks_of(c, e)):
        t = chunk_of(c, e, index)
        chunk_dots(&of_columns, t, NULL, nx_sums(sums + t.col, dots + t.col, 1))
    for group in range(e.first, e.last):
        j = group * c.per_group
        sum = 0
        for col in range(j, j + c.per_group):
            sum += sums[col]
        t = Chunk(0, c.rows, j, 1)
        far |= c.k.cols_are_far(at(c, c.dy, t, 0), nx_block(c.rows, 1), &sum, n, pivots + j)
        for col in range(j + 1, j + c.per_group):
            pivots[col] = pivots[j]
    if far:
        for index in range(chunks_of(c, e)):
            t = chunk_of(c, e, index)
            chunk_moments(c, t, NULL, deviations + t.col, slope + t.col)
            chunk_dots(&of_columns, t, pivots + t.col, nx_sums(sums + t.col, dots + t.col, 1))
        for j in range(e.first * c.per_group, e.last * c.per_group):
            deviations[j] = c.rows * (deviations[j] - mean[j])
    for group in range(e.first, e.last):
        j, r = group * c.per_group, c.rstd[group]
        sum = dot = 0
        if far:
            dot = restore_pivot(c.k, c.gamma, j, c.per_group, pivots[j], deviations + j, dots + j)
        for col in range(j, j + c.per_group):
            sum += sums[col] * gamma_of(c, col)
            if not far:
                dot += dots[col] * gamma_of(c, col)
            dots[col] *= r
        for col in range(j, j + c.per_group):
            slope[col], constant[col] = nx_slope(r, r, dot / n), nx_constant(r, sum / n)
    for index in range(chunks_of(c, e)):
        t = chunk_of(c, e, index)
        affines_of(c.k, c.gamma, NULL, t.col, t.cols, rstd + t.col, factor, zero)
        line = nx_line(mean + t.col, pivots + t.col, &factor[0], slope + t.col, constant + t.col, 1)
        for block in range(block_count(c, t) - 1, -1, -1):
            of = backward_of(c, t, block, NULL)
            c.k.col_dx(&of, &line)


cdef void example_backward_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Example e = example_at(j, task, BACKWARD_NUMBERS)
    cdef Call of_example = call_of(j.call, e)
    example_backward(&of_example, e)


cdef int column_groups_backward(const Call *c) noexcept nogil:
    """dx; each column's sum(dy) and sum(dy * xhat) are added to dbeta and dgamma."""
    cdef Job j = Job(c, 0, 1, 0, NULL, NULL)
    cdef int status = run_examples(c, &j, True)
    cdef Py_ssize_t n, col
    cdef double *sums
    if status == NORMEXT_OK:
        for n in range(c.groups):
            sums = j.partial + n * BACKWARD_NUMBERS * c.n
            for col in range(c.n):
                c.dbeta[col] += sums[col]
                c.dgamma[col] += sums[c.n + col]
    free(j.partial)
    return status
