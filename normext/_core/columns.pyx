# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics down columns: batch norm of (N, D), N,H,W,C, small N,C,H,W; group norm of N,H,W,C.

The sizes of work are those of rows.pyx: here a row is the columns' numbers at one place, a block
some rows of some columns, and a chunk the blocks of a task. `per_group` columns in a row share a
statistic: one in batch norm, but in N,C,H,W a channel's pixels; in group norm a group's channels.
Their sums are made as those of any columns, and then added up.

Rows are walked in memory order. Work is split along the columns and, where there are many rows,
along these: by the shape alone, and the chunks' sums are put together in their order, so that the
number of threads changes no bit. Second passes go backwards, to meet first what is still in cache.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from normext cimport NORMEXT_NO_MEMORY, NORMEXT_OK
from normext._core.call cimport GIVEN, PER_ROW, Call
from normext._core.kernels cimport (
    ceil_div, nx_affine, nx_col_backward, nx_columns, nx_constant, nx_groups, nx_line,
    nx_relu_mask, nx_slope, nx_sums, restore_pivot,
)
from normext._core.runtime cimport Task, run_on, run_tasks, team_for

cdef enum:
    # Into so many chunks large arrays are split: two for each of 64 threads. The bits depend on it.
    CHUNKS = 128
    SPLIT = 1 << 16  # as in rows.pyx
    # Columns that are summed at a time: memory is read in stretches of 4 KiB; their sums and
    # pivots, arrays as long, are half of an L1 cache. With 512, 4096 x 1024 floats took 1.3 times
    # as long.
    COLUMNS = 1024
    # Rows of a chunk at least, whose sums have to be put together with those of others.
    SUMMED = 96
    # Columns that are written at a time: the more, the fewer ends of rows; and their rows at least,
    # for which coefficients are made.
    WRITTEN = 1024
    WRITTEN_ROWS = 32
    # Columns whose chunks are put together by a task.
    MERGED = 64

# Some rows of some columns; or of all columns of several examples of group norm.
cdef struct Chunk:
    Py_ssize_t example, examples, row, rows, col, cols

# How rows of columns are split: into strips of so many columns, and these into chunks.
cdef struct Split:
    Py_ssize_t width, across, chunks

# What the backward pass of some examples has for each of their columns. The dots become those of
# xhat.
cdef struct Work:
    double *sums
    double *dots
    double *mean
    double *rstd
    double *slope
    double *constant
    double *pivots
    double *deviations

# What tasks of a large call need. `sums` has a row of sums and one of squares (or dots) for each
# chunk, `pivots` and `scales` a number for each column, and `again` one for each of `merged` tasks
# that put chunks together: whether all are to be taken once more. That is done where `scales` is
# not NULL; in the backward pass these are the pivots of dy then. `work` is for group norm.
cdef struct Job:
    const Call *call
    Split split
    Py_ssize_t merged
    double *sums
    double *pivots
    double *scales
    double *again
    Work work


cdef inline Py_ssize_t block_rows(const Call *c, Chunk t) noexcept nogil:
    """Rows of a block: more where they lie together and can be folded (kernels_template.h)."""
    if c.x.row != t.cols or (c.dy.data != NULL and c.dy.row != t.cols):
        return c.k.col_rows
    return max(c.k.col_rows, c.k.col_block // t.cols)


cdef inline Py_ssize_t block_count(const Call *c, Chunk t) noexcept nogil:
    return ceil_div(t.rows, block_rows(c, t))


cdef inline nx_columns block_at(const Call *c, Chunk t, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t rows = min(block_rows(c, t), t.rows - index * block_rows(c, t))
    return nx_columns(t.examples, rows, t.cols)


cdef inline nx_groups place(const Call *c, nx_groups a, Py_ssize_t example, Py_ssize_t row,
                            Py_ssize_t col) noexcept nogil:
    """An array from one place on; no data where there is none."""
    if a.data == NULL:
        return a
    return nx_groups(
        <char *> a.data + (example * a.group + row * a.row + col) * c.k.itemsize, a.group, a.row
    )


cdef inline nx_groups at(const Call *c, nx_groups a, Chunk t, Py_ssize_t block) noexcept nogil:
    """An array from a chunk's block on."""
    return place(c, a, t.example, t.row + block * block_rows(c, t), t.col)


cdef inline Split split_of(const Call *c, Py_ssize_t most, Py_ssize_t least) noexcept nogil:
    """Into strips of `most` columns at most, whole groups where these are not wider.

    Chunks have `least` rows or more.
    """
    cdef Py_ssize_t step = c.per_group if c.per_group <= most else 1
    cdef Py_ssize_t across = ceil_div(c.n, most // step * step)
    cdef Py_ssize_t width = ceil_div(c.n // step, across), numbers = c.rows * c.n, chunks = 1
    if step == 1:
        width = (width + 15) // 16 * 16  # vectors and cache lines
    width = min(width * step, c.n)
    across = ceil_div(c.n, width)
    if numbers >= SPLIT:
        chunks = min(c.rows // least, numbers // (SPLIT // 2), ceil_div(CHUNKS, across))
    return Split(width, across, max(<Py_ssize_t> 1, chunks))


cdef inline Chunk chunk_at(const Call *c, Split s, Py_ssize_t task) noexcept nogil:
    cdef Py_ssize_t chunk = task // s.across, col = task % s.across * s.width
    cdef Py_ssize_t row = chunk * c.rows // s.chunks
    return Chunk(0, 1, row, (chunk + 1) * c.rows // s.chunks - row, col, min(s.width, c.n - col))


# Groups of columns -------------------------------------------------------------------------------


cdef inline void expand(const double *numbers, Py_ssize_t per_group, Py_ssize_t first,
                        Py_ssize_t cols, double *to) noexcept nogil:
    """Groups' numbers, once for each of the columns from `first` on. May be in place."""
    cdef Py_ssize_t group, j, begin, end = cols
    cdef double number
    for group in range((first + cols - 1) // per_group, -1, -1):
        begin, number = max(<Py_ssize_t> 0, group * per_group - first), numbers[group]
        for j in range(begin, end):
            to[j] = number
        end = begin


cdef inline double sum_of(const double *numbers, Py_ssize_t n) noexcept nogil:
    """In four parts, so that no addition has to wait for the one before."""
    cdef double a = 0, b = 0, c = 0, d = 0
    cdef Py_ssize_t i
    for i in range(n // 4):
        a += numbers[4 * i]
        b += numbers[4 * i + 1]
        c += numbers[4 * i + 2]
        d += numbers[4 * i + 3]
    for i in range(n // 4 * 4, n):
        a += numbers[i]
    return (a + b) + (c + d)


cdef inline void share_pivots(double *pivot, Py_ssize_t per_group, Py_ssize_t cols) noexcept nogil:
    """Each group's mean, for all of its columns: of constants exactly."""
    cdef Py_ssize_t group, first, j
    cdef double rest
    if per_group == 1:
        return
    for group in range(cols // per_group):
        first, rest = group * per_group, 0
        for j in range(first, first + per_group):
            rest += pivot[j] - pivot[first]
        rest = pivot[first] + rest / per_group
        for j in range(first, first + per_group):
            pivot[j] = rest


cdef void add_chunks(const double *sums, Py_ssize_t chunks, Py_ssize_t step, Py_ssize_t per_group,
                     Py_ssize_t groups, double *to) noexcept nogil:
    """Groups' sums from those of their columns, which each chunk has, `step` apart."""
    cdef Py_ssize_t group
    if chunks == 1 and per_group == 1:
        memcpy(to, sums, groups * sizeof(double))
        return
    memset(to, 0, groups * sizeof(double))
    for _ in range(chunks):
        if per_group == 1:
            for group in range(groups):
                to[group] += sums[group]
        else:
            for group in range(groups):
                to[group] += sum_of(sums + group * per_group, per_group)
        sums += step


cdef bint finish_groups(const Call *c, Py_ssize_t first, Py_ssize_t groups, bint again,
                        double *pivot, double *scale, const double *sums, Py_ssize_t chunks,
                        Py_ssize_t step) noexcept nogil:
    """Statistics of groups from sums (and, `step` on, squares) of their columns.

    Or whether these are to be taken again, with `pivot` and `scale` as they are then.
    """
    cdef double[MERGED] p, s, sum, squares
    cdef double count = <double> c.rows * <double> c.per_group
    cdef Py_ssize_t per_group = c.per_group, some, j, col = 0
    cdef double *var
    cdef bint once_more = False
    while groups > 0:
        var = NULL if c.var == NULL else c.var + first
        if per_group == 1 and chunks == 1:
            if not again and c.k.col_rescale(groups, count, sums, sums + step, pivot, scale):
                return True
            c.k.col_statistics(groups, count, c.eps, scale if again else NULL, pivot, sums,
                               sums + step, c.mean + first, c.rstd + first, var)
            return False
        some = min(groups, <Py_ssize_t> MERGED)
        add_chunks(sums + col, chunks, 2 * step, per_group, some, sum)
        add_chunks(sums + step + col, chunks, 2 * step, per_group, some, squares)
        for j in range(some):
            p[j] = pivot[col + j * per_group]
            s[j] = scale[col + j * per_group] if again else 1
        if not again and c.k.col_rescale(some, count, sum, squares, p, s):
            once_more = True
        expand(p, per_group, 0, some * per_group, pivot + col)
        expand(s, per_group, 0, some * per_group, scale + col)
        if not once_more:
            c.k.col_statistics(some, count, c.eps, s if again else NULL, p, sum, squares,
                               c.mean + first, c.rstd + first, var)
        first, groups, col = first + some, groups - some, col + some * per_group
    return once_more


# What columns are normalized by.
cdef struct Columns:
    const double *mean
    const double *rstd
    const double *scale
    const double *shift


cdef inline const char *parameter(const Call *c, const char *p, Py_ssize_t i) noexcept nogil:
    """gamma or beta from number i on; NULL where there is none."""
    return NULL if p == NULL else p + i * c.k.parameter_size


cdef inline Columns columns_of(const Call *c, Chunk t, bint maps, double *work) noexcept nogil:
    """Of a chunk's columns, with or without `maps`; `work` has room for 5 numbers of each."""
    cdef Py_ssize_t group = t.col // c.per_group, first = t.col % c.per_group
    cdef Py_ssize_t numbers = t.examples * t.cols, statistics = t.example * (c.n // c.per_group)
    cdef const double *mean = c.mean + statistics + group
    cdef const double *rstd = c.rstd + statistics + group
    cdef double *scale = work + 2 * numbers
    cdef double *shift = scale + numbers
    cdef double *expanded = shift + numbers
    if maps and c.per_group > 1 and c.parameters != PER_ROW:
        c.k.affines(parameter(c, c.gamma, group), parameter(c, c.beta, group), 1,
                    ceil_div(first + t.cols, c.per_group), rstd, scale, shift)
        expand(shift, c.per_group, first, numbers, expanded)
        expand(scale, c.per_group, first, numbers, shift)
        scale, shift = shift, expanded
    if c.per_group > 1:
        expand(mean, c.per_group, first, numbers, work)
        expand(rstd, c.per_group, first, numbers, work + numbers)
        mean, rstd = work, work + numbers
    if maps and (c.per_group == 1 or c.parameters == PER_ROW):
        c.k.affines(parameter(c, c.gamma, t.col), parameter(c, c.beta, t.col), t.examples, t.cols,
                    rstd, scale, shift)
    return Columns(mean, rstd, scale, shift)


# Forward -----------------------------------------------------------------------------------------


cdef void chunk_powers(const Call *c, Chunk t, const double *scale, const double *pivot,
                       double *sum, double *squares) noexcept nogil:
    """Of a chunk's columns, of numbers times `scale` (NULL for 1), about `pivot`."""
    cdef Py_ssize_t block
    memset(sum, 0, t.examples * t.cols * sizeof(double))
    memset(squares, 0, t.examples * t.cols * sizeof(double))
    for block in range(block_count(c, t)):
        c.k.col_powers(at(c, c.x, t, block), block_at(c, t, block), scale, pivot, sum, squares)


cdef void all_statistics(const Call *c, Chunk t, double *work) noexcept nogil:
    """Of all rows of whole groups; `work` has room for 4 numbers of each column."""
    cdef Py_ssize_t numbers = t.examples * t.cols
    cdef double *scale = work + numbers
    cdef double *sum = scale + numbers
    cdef double *squares = sum + numbers
    cdef Py_ssize_t first = t.example * (c.n // c.per_group) + t.col // c.per_group
    cdef bint again
    c.k.col_pivots(at(c, c.x, t, 0), nx_columns(t.examples, t.rows, t.cols), work)
    share_pivots(work, c.per_group, numbers)
    for again in range(2):  # with pivots and scales that the first attempt has found
        chunk_powers(c, t, scale if again else NULL, work, sum, squares)
        if not finish_groups(c, first, numbers // c.per_group, again, work, scale, sum, 1, numbers):
            return


cdef inline Chunk part_of(Chunk t, Py_ssize_t part) noexcept nogil:
    """So many of a chunk's columns as are written at a time."""
    cdef Py_ssize_t col = t.col + part * WRITTEN, end = t.col + t.cols
    t.col, t.cols = col, min(<Py_ssize_t> WRITTEN, end - col)
    return t


cdef inline Py_ssize_t part_count(Chunk t) noexcept nogil:
    return ceil_div(t.cols, WRITTEN)


cdef void chunk_affine(const Call *c, Chunk t) noexcept nogil:
    cdef double[5 * WRITTEN] work
    cdef Py_ssize_t i
    cdef Columns by
    cdef nx_affine map
    cdef Chunk part
    for i in range(part_count(t)):
        part = part_of(t, i)
        by = columns_of(c, part, True, work)
        map = nx_affine(by.mean, by.scale, by.shift, 1, 0)
        c.k.col_affine(at(c, c.x, part, 0), at(c, c.y, part, 0),
                       nx_columns(part.examples, part.rows, part.cols), &map, c.relu)


cdef void normalize_task(const void *job, Py_ssize_t task) noexcept nogil:
    """All rows of some columns."""
    cdef const Call *c = (<const Job *> job).call
    cdef Chunk t = chunk_at(c, (<const Job *> job).split, task)
    cdef double[4 * COLUMNS] work
    if c.statistics != GIVEN:
        all_statistics(c, t, work)
    if c.y.data != NULL:
        chunk_affine(c, t)


cdef inline Py_ssize_t groups_merged(const Call *c) noexcept nogil:
    """Groups whose chunks are put together by a task."""
    return max(<Py_ssize_t> 1, MERGED // c.per_group)


cdef inline Chunk merged_at(const Call *c, Py_ssize_t task) noexcept nogil:
    """All rows of the columns whose chunks are put together by a task."""
    cdef Py_ssize_t width = groups_merged(c) * c.per_group
    return Chunk(0, 1, 0, c.rows, task * width, min(width, c.n - task * width))


cdef void pivots_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Chunk t = merged_at(c, task)
    c.k.col_pivots(at(c, c.x, t, 0), nx_columns(1, t.rows, t.cols), j.pivots + t.col)
    share_pivots(j.pivots + t.col, c.per_group, t.cols)


cdef inline double *sums_of(const Job *j, Py_ssize_t chunk, Py_ssize_t col) noexcept nogil:
    """Where the sums of a chunk's columns begin; n further on, their squares or dots."""
    return j.sums + 2 * chunk * j.call.n + col


cdef inline const double *from_column(const double *numbers, Py_ssize_t col) noexcept nogil:
    return NULL if numbers == NULL else numbers + col


cdef void powers_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Chunk t = chunk_at(j.call, j.split, task)
    cdef double *sums = sums_of(j, task // j.split.across, t.col)
    chunk_powers(j.call, t, from_column(j.scales, t.col), j.pivots + t.col, sums, sums + j.call.n)


cdef void statistics_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Chunk t = merged_at(c, task)
    j.again[task] = finish_groups(
        c, t.col // c.per_group, t.cols // c.per_group, j.scales != NULL, j.pivots + t.col,
        j.pivots + c.n + t.col, sums_of(j, 0, t.col), j.split.chunks, c.n,
    )


cdef void affine_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_affine(j.call, chunk_at(j.call, j.split, j.split.across * j.split.chunks - 1 - task))


cdef int begin(const Call *c, Job *j, int *threads) noexcept nogil:
    """A call of columns: its split, and memory where rows are split."""
    cdef Py_ssize_t chunks
    j.call, j.split, j.sums, j.scales = c, split_of(c, COLUMNS, SUMMED), NULL, NULL
    threads[0] = team_for(j.split.across * j.split.chunks, c.rows * c.n)
    if threads[0] == 0:
        return NORMEXT_NO_MEMORY
    if j.split.chunks > 1:
        j.merged, chunks = ceil_div(c.n, groups_merged(c) * c.per_group), j.split.chunks
        j.sums = <double *> malloc(((2 * chunks + 2) * c.n + j.merged) * sizeof(double))
        if j.sums == NULL:
            return NORMEXT_NO_MEMORY
        j.pivots = j.sums + 2 * chunks * c.n
        j.again = j.pivots + 2 * c.n
    return NORMEXT_OK


cdef bint any_again(const Job *j) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(j.merged):
        if j.again[i] != 0:
            return True
    return False


cdef void large_statistics(const Call *c, Job *j, int threads) noexcept nogil:
    """The statistics of columns whose rows are split."""
    cdef Py_ssize_t tasks = j.split.across * j.split.chunks
    run_on(threads, pivots_task, j, j.merged)
    run_on(threads, powers_task, j, tasks)
    run_on(threads, statistics_task, j, j.merged)
    if any_again(j):  # with pivots and scales that the first attempt has found
        j.scales = j.pivots + c.n
        run_on(threads, powers_task, j, tasks)
        run_on(threads, statistics_task, j, j.merged)


cdef int normalize_columns(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta, one of each for a group; see rows.normalize_rows."""
    cdef Job j
    cdef int threads, status = begin(c, &j, &threads)
    if status != NORMEXT_OK:
        return status
    if j.split.chunks == 1:
        run_on(threads, normalize_task, &j, j.split.across)
        return NORMEXT_OK
    if c.statistics != GIVEN:
        large_statistics(c, &j, threads)
    if c.y.data != NULL:
        j.split = split_of(c, WRITTEN, WRITTEN_ROWS)
        run_on(threads, affine_task, &j, j.split.across * j.split.chunks)
    free(j.sums)
    return NORMEXT_OK


# Backward ----------------------------------------------------------------------------------------


cdef void chunk_dots(const Call *c, Chunk t, const double *pivots, double *sum,
                     double *dot) noexcept nogil:
    """The sums of the chunk's columns, whose `pivots` may be NULL."""
    cdef double[5 * COLUMNS] work
    cdef Columns by = columns_of(c, t, c.relu, work)
    cdef nx_relu_mask mask = nx_relu_mask(by.scale, by.shift)
    cdef const nx_relu_mask *relu = &mask if c.relu else NULL
    cdef nx_col_backward of
    cdef Py_ssize_t block
    memset(sum, 0, t.examples * t.cols * sizeof(double))
    memset(dot, 0, t.examples * t.cols * sizeof(double))
    for block in range(block_count(c, t)):
        of = nx_col_backward(block_at(c, t, block), at(c, c.x, t, block), at(c, c.dy, t, block),
                             c.dx, relu, c.ahead != 0)
        c.k.col_dots(&of, by.mean, pivots, nx_sums(sum, dot, 1))


cdef void chunk_dx(const Call *c, Chunk t) noexcept nogil:
    """dx of a chunk, with the sums and dots of its groups."""
    cdef double[5 * WRITTEN] work
    cdef double[5 * WRITTEN] lines
    cdef double *dy_mean = lines
    cdef double *slope = dy_mean + WRITTEN
    cdef double *constant = slope + WRITTEN
    cdef double *columns_sums = constant + WRITTEN
    cdef double *columns_dots = columns_sums + WRITTEN
    cdef bint own = c.statistics != GIVEN
    cdef Py_ssize_t i, group, first
    cdef const double *sums
    cdef const double *dots
    cdef Columns by
    cdef nx_relu_mask mask
    cdef const nx_relu_mask *relu = &mask if c.relu else NULL
    cdef nx_line line
    cdef nx_affine map
    cdef nx_col_backward of
    cdef Chunk part
    if not own:
        memset(lines, 0, 3 * WRITTEN * sizeof(double))
    for i in range(part_count(t)):
        part = part_of(t, i)
        by = columns_of(c, part, True, work)
        if own:
            group, first = part.col // c.per_group, part.col % c.per_group
            sums, dots = c.sums + group, c.dots + group
            if c.per_group > 1:
                expand(sums, c.per_group, first, part.cols, columns_sums)
                expand(dots, c.per_group, first, part.cols, columns_dots)
                sums, dots = columns_sums, columns_dots
            c.k.col_lines(part.examples * part.cols, 1 / c.count, by.rstd, by.scale, sums, dots,
                          dy_mean, slope, constant)
        mask = nx_relu_mask(by.scale, by.shift)
        of = nx_col_backward(nx_columns(part.examples, part.rows, part.cols),
                             at(c, c.x, part, 0), at(c, c.dy, part, 0), at(c, c.dx, part, 0), relu,
                             False)
        if own or c.relu:
            line = nx_line(by.mean, dy_mean, by.scale, slope, constant, 1)
            c.k.col_dx(&of, &line)
        else:  # the statistics are constants, and x does not matter: slope and dy_mean are zeros
            map = nx_affine(dy_mean, by.scale, slope, 1, 0)
            c.k.col_affine(of.dy, of.dx, of.block, &map, False)


cdef bint finish_dots(const Call *c, Chunk t, const double *sums, Py_ssize_t chunks,
                      Py_ssize_t step, double *pivots) noexcept nogil:
    """Sums and dots of groups from those of their columns.

    Or whether these are to be taken again about `pivots`, which may be NULL.
    """
    cdef Py_ssize_t group, first = t.col // c.per_group, groups = t.cols // c.per_group
    cdef bint far = False
    cdef Chunk column
    add_chunks(sums, chunks, 2 * step, c.per_group, groups, c.sums + first)
    add_chunks(sums + step, chunks, 2 * step, c.per_group, groups, c.dots + first)
    if pivots == NULL or c.statistics == GIVEN or c.dx.data == NULL:
        return False
    if c.per_group == 1:
        return c.k.cols_are_far(at(c, c.dy, t, 0), nx_columns(1, t.rows, t.cols), c.sums + first,
                                c.count, pivots)
    for group in range(groups):
        column = Chunk(0, 1, 0, c.rows, t.col + group * c.per_group, 1)
        far |= c.k.cols_are_far(at(c, c.dy, column, 0), nx_columns(1, c.rows, 1),
                                c.sums + first + group, c.count, pivots + group)
    expand(pivots, c.per_group, 0, t.cols, pivots)
    return far


cdef inline const double *given_pivots(const Call *c, Chunk t, double *work) noexcept nogil:
    """Those of a chunk's columns; NULL where there are none."""
    if c.pivots == NULL or c.per_group == 1:
        return from_column(c.pivots, t.col)
    expand(c.pivots + t.col // c.per_group, c.per_group, t.col % c.per_group, t.cols, work)
    return work


cdef void backward_task(const void *job, Py_ssize_t task) noexcept nogil:
    """All rows of some columns."""
    cdef const Call *c = (<const Job *> job).call
    cdef Chunk t = chunk_at(c, (<const Job *> job).split, task)
    cdef double[COLUMNS] pivots
    cdef double[2 * COLUMNS] sums
    if not c.given:
        chunk_dots(c, t, given_pivots(c, t, pivots), sums, sums + COLUMNS)
        if finish_dots(c, t, sums, 1, COLUMNS, pivots):
            chunk_dots(c, t, pivots, sums, sums + COLUMNS)
            finish_dots(c, t, sums, 1, COLUMNS, NULL)
    if c.dx.data != NULL:
        chunk_dx(c, t)


cdef void dots_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Chunk t = chunk_at(c, j.split, task)
    cdef double *sums = sums_of(j, task // j.split.across, t.col)
    cdef double[COLUMNS] work
    chunk_dots(c, t, given_pivots(c, t, work) if j.scales == NULL else j.scales + t.col, sums,
               sums + c.n)


cdef void merge_dots_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Chunk t = merged_at(j.call, task)
    j.again[task] = finish_dots(j.call, t, sums_of(j, 0, t.col), j.split.chunks, j.call.n,
                                j.pivots + t.col if j.scales == NULL else NULL)


cdef void dx_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    chunk_dx(j.call, chunk_at(j.call, j.split, j.split.across * j.split.chunks - 1 - task))


cdef void large_dots(const Call *c, Job *j, int threads) noexcept nogil:
    """The sums of columns whose rows are split."""
    cdef Py_ssize_t tasks = j.split.across * j.split.chunks
    run_on(threads, dots_task, j, tasks)
    run_on(threads, merge_dots_task, j, j.merged)
    if any_again(j):  # about pivots that the first attempt has found
        j.scales = j.pivots
        run_on(threads, dots_task, j, tasks)
        run_on(threads, merge_dots_task, j, j.merged)


cdef int columns_backward(const Call *c) noexcept nogil:
    """The gradient dx and, for each group, its sum and dot; see rows.rows_backward."""
    cdef Job j
    cdef int threads, status = begin(c, &j, &threads)
    if status != NORMEXT_OK:
        return status
    if j.split.chunks == 1:
        run_on(threads, backward_task, &j, j.split.across)
        return NORMEXT_OK
    if not c.given:
        large_dots(c, &j, threads)
    if c.dx.data != NULL:
        j.split = split_of(c, WRITTEN, WRITTEN_ROWS)
        run_on(threads, dx_task, &j, j.split.across * j.split.chunks)
    free(j.sums)
    return NORMEXT_OK


# Group norm, channels last -----------------------------------------------------------------------

# An example has statistics of its own. Small ones are tasks, several at a time; the rows of large
# ones are split as those of batch norm.

cdef enum:
    FORWARD_NUMBERS = 4  # for a column of those that are done together
    BACKWARD_NUMBERS = 10  # of Work, and a task's sums and dots

# `work` has room for `numbers` of each task; in the backward pass its sums and dots come first.
cdef struct Examples:
    const Call *call
    Py_ssize_t tasks, at_once, numbers
    double *work


cdef inline Call call_of(const Call *c, Py_ssize_t example) noexcept nogil:
    """The call from one example on, with the statistics of its groups."""
    cdef Call of = c[0]
    cdef Py_ssize_t groups = c.n // c.per_group
    of.x, of.y = place(c, c.x, example, 0, 0), place(c, c.y, example, 0, 0)
    of.dy, of.dx = place(c, c.dy, example, 0, 0), place(c, c.dx, example, 0, 0)
    of.mean, of.rstd = c.mean + example * groups, c.rstd + example * groups
    return of


cdef bint are_large(const Call *c) noexcept nogil:
    """Whether examples are so few and large that the rows of each are split."""
    return c.groups < CHUNKS // 2 and split_of(c, COLUMNS, SUMMED).chunks > 1


cdef int run_examples(const Call *c, Task f, Py_ssize_t numbers, Examples *j) noexcept nogil:
    """The tasks of small examples; some of them have room for `numbers` of each column."""
    cdef Py_ssize_t at_once = max(<Py_ssize_t> 1, COLUMNS // c.n)
    j[0] = Examples(c, min(ceil_div(c.groups, at_once), <Py_ssize_t> CHUNKS), at_once,
                    numbers * at_once * c.n, NULL)
    j.work = <double *> malloc(j.tasks * j.numbers * sizeof(double))
    if j.work == NULL:
        return NORMEXT_NO_MEMORY
    return run_tasks(f, j, j.tasks, c.groups * c.rows * c.n)


cdef void normalize_examples_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Examples *j = <const Examples *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t last = (task + 1) * c.groups // j.tasks
    cdef Chunk t = Chunk(task * c.groups // j.tasks, 0, 0, c.rows, 0, c.n)
    while t.example < last:
        t.examples = min(j.at_once, last - t.example)
        all_statistics(c, t, j.work + task * j.numbers)
        chunk_affine(c, t)
        t.example += t.examples


cdef int normalize_column_groups(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta.

    There are a mean and rstd for each group of each example, a gamma and beta for each column.
    """
    cdef Examples j
    cdef Call of_example
    cdef Py_ssize_t example
    cdef int status = NORMEXT_OK
    if are_large(c):
        for example in range(c.groups):
            of_example = call_of(c, example)
            status = normalize_columns(&of_example)
            if status != NORMEXT_OK:
                break
        return status
    status = run_examples(c, normalize_examples_task, FORWARD_NUMBERS, &j)
    free(j.work)
    return status


cdef inline Work work_at(double *p, Py_ssize_t numbers) noexcept nogil:
    return Work(p, p + numbers, p + 2 * numbers, p + 3 * numbers, p + 4 * numbers, p + 5 * numbers,
                p + 6 * numbers, p + 7 * numbers)


cdef void dots_of_columns(const Call *c, Chunk t, const double *pivots, Work w) noexcept nogil:
    cdef Py_ssize_t col
    cdef Chunk some = t
    if t.cols <= COLUMNS:
        chunk_dots(c, t, pivots, w.sums, w.dots)
        return
    while some.col < t.cols:
        col, some.cols = some.col, min(<Py_ssize_t> COLUMNS, t.cols - some.col)
        chunk_dots(c, some, from_column(pivots, col), w.sums + col, w.dots + col)
        some.col += COLUMNS


cdef bint are_far(const Call *c, Chunk t, Work w) noexcept nogil:
    """Whether the gradients of any group are far from zero, and pivots for all columns."""
    cdef nx_columns block = nx_columns(t.examples, t.rows, t.cols)
    cdef Py_ssize_t group, col, groups = t.examples * t.cols // c.per_group
    cdef double pivot, each = 1 / (<double> c.rows * <double> c.per_group)
    cdef double *mean = w.slope  # not yet in use
    if c.per_group == 1:
        return c.k.cols_are_far(c.dy, block, w.sums, <double> c.rows, w.pivots)
    for group in range(groups):
        mean[group] = sum_of(w.sums + group * c.per_group, c.per_group) * each
    expand(mean, c.per_group, 0, t.examples * t.cols, mean)
    if not c.k.cols_are_far(c.dy, block, mean, 1, w.pivots):
        return False
    for group in range(groups):  # those that all columns agree on
        pivot = w.pivots[group * c.per_group]
        for col in range(group * c.per_group, (group + 1) * c.per_group):
            pivot = pivot if w.pivots[col] != 0 else 0
        w.pivots[group] = pivot
    expand(w.pivots, c.per_group, 0, t.examples * t.cols, w.pivots)
    return True


cdef void find_deviations(const Call *c, Chunk t, Work w) noexcept nogil:
    """Each column's sum of x - mean."""
    cdef double pivot
    cdef Py_ssize_t i
    chunk_powers(c, t, NULL, w.mean, w.deviations, w.slope)
    for i in range(t.examples * t.cols):
        pivot = <float> w.mean[i] if c.k.parameter_size == sizeof(float) else w.mean[i]
        w.deviations[i] += t.rows * (pivot - w.mean[i])


cdef void find_lines(const Call *c, Chunk t, Work w, bint far) noexcept nogil:
    """Each column's slope and constant."""
    cdef double sum, dot, r, each = 1 / (<double> c.rows * <double> c.per_group)
    cdef Py_ssize_t group, first, numbers = t.examples * t.cols, groups = numbers // c.per_group
    cdef double *gamma_sums = w.slope  # each read before it is written over
    cdef double *gamma_dots = w.constant
    c.k.affines(c.gamma, NULL, t.examples, t.cols, w.dots, gamma_dots, NULL)
    c.k.affines(c.gamma, NULL, t.examples, t.cols, w.sums, gamma_sums, NULL)
    for group in range(groups):
        first, r = group * c.per_group, c.rstd[group]
        sum = sum_of(gamma_sums + first, c.per_group)
        if far:
            dot = restore_pivot(c.k, c.gamma, first % c.n, c.per_group, w.pivots[first],
                                w.deviations + first, w.dots + first)
        else:
            dot = sum_of(gamma_dots + first, c.per_group)
        w.slope[group], w.constant[group] = nx_slope(r, r, dot * each), nx_constant(r, sum * each)
    expand(w.slope, c.per_group, 0, numbers, w.slope)
    expand(w.constant, c.per_group, 0, numbers, w.constant)
    c.k.multiply(w.dots, w.rstd, numbers)


cdef void dx_of_columns(const Call *c, Chunk t, Work w) noexcept nogil:
    cdef double[WRITTEN] factor
    cdef Py_ssize_t i
    cdef nx_line line
    cdef nx_col_backward of
    cdef Chunk part
    for i in range(part_count(t)):
        part = part_of(t, i)
        c.k.affines(parameter(c, c.gamma, part.col), NULL, part.examples, part.cols,
                    w.rstd + part.col, factor, NULL)
        line = nx_line(w.mean + part.col, w.pivots + part.col, &factor[0], w.slope + part.col,
                       w.constant + part.col, 1)
        of = nx_col_backward(nx_columns(part.examples, part.rows, part.cols), at(c, c.x, part, 0),
                             at(c, c.dy, part, 0), at(c, c.dx, part, 0), NULL, False)
        c.k.col_dx(&of, &line)


cdef inline Call call_of_columns(const Call *c, Py_ssize_t examples, Work w) noexcept nogil:
    """The call with a statistic for each column, for their sums."""
    cdef Call of = c[0]
    expand(c.mean, c.per_group, 0, examples * c.n, w.mean)
    expand(c.rstd, c.per_group, 0, examples * c.n, w.rstd)
    of.mean, of.rstd, of.per_group, of.pivots, of.dx.data = w.mean, w.rstd, 1, NULL, NULL
    of.sums, of.dots, of.count = w.sums, w.dots, <double> c.rows
    return of


cdef void examples_backward(const Call *c, Py_ssize_t examples, Work w) noexcept nogil:
    """chunk_dx where the columns of a group share a statistic, and each has a gamma of its own.

    Of the call's first examples.
    """
    cdef Chunk t = Chunk(0, examples, 0, c.rows, 0, c.n)
    cdef Call columns = call_of_columns(c, examples, w)
    cdef bint far
    dots_of_columns(&columns, t, NULL, w)
    far = are_far(c, t, w)
    if far:
        if c.per_group > 1:
            find_deviations(c, t, w)
        dots_of_columns(&columns, t, w.pivots, w)
    if c.per_group == 1:  # as of batch norm
        columns.dx = c.dx
        chunk_dx(&columns, t)
        c.k.multiply(w.dots, w.rstd, examples * c.n)
        return
    find_lines(c, t, w, far)
    dx_of_columns(c, t, w)


cdef void dx_of_columns_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    dx_of_columns(j.call, chunk_at(j.call, j.split, j.split.across * j.split.chunks - 1 - task),
                  j.work)


cdef int large_example_backward(const Call *c, Work w) noexcept nogil:
    """The same of one example, whose rows are split."""
    cdef Chunk t = Chunk(0, 1, 0, c.rows, 0, c.n)
    cdef Call columns = call_of_columns(c, 1, w)
    cdef bint far
    cdef Job j
    cdef int threads, status
    if c.per_group == 1:  # as of batch norm
        columns.dx = c.dx
        status = columns_backward(&columns)
        c.k.multiply(w.dots, w.rstd, c.n)
        return status
    status = begin(&columns, &j, &threads)
    if status != NORMEXT_OK:
        return status
    large_dots(&columns, &j, threads)
    far = are_far(c, t, w)
    if far:
        find_deviations(c, t, w)
        columns.pivots, j.scales = w.pivots, NULL
        large_dots(&columns, &j, threads)
    find_lines(c, t, w, far)
    j.call, j.split, j.work = c, split_of(c, WRITTEN, WRITTEN_ROWS), w
    run_on(threads, dx_of_columns_task, &j, j.split.across * j.split.chunks)
    free(j.sums)
    return NORMEXT_OK


cdef void examples_backward_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Some examples; their sums and dots are added up at the beginning of the task's `work`."""
    cdef const Examples *j = <const Examples *> job
    cdef const Call *c = j.call
    cdef double *total = j.work + task * j.numbers
    cdef Py_ssize_t last = (task + 1) * c.groups // j.tasks, first, examples, e, i
    cdef Call of
    cdef Work w
    memset(total, 0, 2 * c.n * sizeof(double))
    first = task * c.groups // j.tasks
    while first < last:
        of, examples = call_of(c, first), min(j.at_once, last - first)
        w = work_at(total + 2 * c.n, examples * c.n)
        examples_backward(&of, examples, w)
        for e in range(examples):
            for i in range(c.n):
                total[i] += w.sums[e * c.n + i]
                total[c.n + i] += w.dots[e * c.n + i]
        first += examples


cdef void add_examples_task(const void *job, Py_ssize_t task) noexcept nogil:
    """The sums and dots of some columns, over all tasks."""
    cdef const Examples *j = <const Examples *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t col
    cdef double *sums = j.work
    for _ in range(j.tasks):
        for col in range(task * MERGED, min((task + 1) * MERGED, c.n)):
            c.dbeta[col] += sums[col]
            c.dgamma[col] += sums[c.n + col]
        sums += j.numbers


cdef int large_examples_backward(const Call *c) noexcept nogil:
    cdef Py_ssize_t example, col
    cdef Call of
    cdef int status = NORMEXT_OK
    cdef Work w = work_at(<double *> malloc(BACKWARD_NUMBERS * c.n * sizeof(double)), c.n)
    if w.sums == NULL:
        return NORMEXT_NO_MEMORY
    for example in range(c.groups):
        of = call_of(c, example)
        status = large_example_backward(&of, w)
        if status != NORMEXT_OK:
            break
        for col in range(c.n):
            c.dbeta[col] += w.sums[col]
            c.dgamma[col] += w.dots[col]
    free(w.sums)
    return status


cdef int column_groups_backward(const Call *c) noexcept nogil:
    """dx; each column's sum(dy) and sum(dy * xhat) are added to dbeta and dgamma."""
    cdef Examples j
    cdef int status
    if are_large(c):
        return large_examples_backward(c)
    status = run_examples(c, examples_backward_task, BACKWARD_NUMBERS, &j)
    if status == NORMEXT_OK:
        status = run_tasks(add_examples_task, &j, ceil_div(c.n, MERGED), j.tasks * c.n)
    free(j.work)
    return status
