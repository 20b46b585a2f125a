# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics over rows of contiguous numbers: batch norm of N,C,H,W, layer, RMS and group norm.

Four sizes of work:

    row    n numbers that lie one after the other
    block  several short rows, or a part of a long one: what a kernel takes at once, and the first
           cache holds
    chunk  the blocks of a part of a large group, or some rows of layer norm, whose sums are made
           together
    task   what a thread is given: a chunk, or some groups that are small

A group whose numbers fit the cache is one task: its statistics, then its result, while the group is
still there. Large groups are split into chunks, first for the statistics, then for the result. The
split depends on the shape alone and partial sums are put together in its order, so that the number
of threads changes no bit. Second passes go backwards, to meet first what is still in cache.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memset

from normext cimport NORMEXT_NO_MEMORY, NORMEXT_OK
from normext._core.call cimport (
    ALONG_ROW, CENTRED, GIVEN, PER_GROUP, PER_ROW, Call, Job, gamma_of, rows_at,
)
from normext._core.kernels cimport (
    affine_of, ceil_div, nx_affine, nx_backward, nx_block, nx_constant,
    nx_finish_moments, nx_grouping, nx_groups, nx_layer, nx_line, nx_merge,
    nx_moments, nx_relu_mask, nx_rescale, nx_rows, nx_slope, nx_sums, restore_pivot,
)
from normext._core.runtime cimport run_on, run_tasks, team_for

cdef enum:
    # Into so many chunks the work is split where groups are few and large: for 64 threads. The bits
    # depend on it, and so not on the machine.
    CHUNKS = 64
    # With fewer chunks of rows, large arrays are split along the columns too.
    FEW_CHUNKS = 16
    # Elements from which a group may be split: what two threads are started for (runtime.pyx); and
    # of a chunk at least.
    SPLIT = 1 << 16
    TASK = 1 << 15
    # Rows of layer norm whose sums down the columns are made as floats, before they are added up in
    # double: 8 times 4 of them.
    CHUNK_ROWS = 32
    # Bytes of x and dy that are met twice, the second time in cache: half of a second-level cache.
    CACHED = 1 << 19
    # Columns of a task that sums down all rows: 4 KiB of a row of floats.
    STRIP = 1024
    # Columns of a task that adds up the sums of chunks: 1 KiB of each.
    COLUMNS = 128
    # Rows whose coefficients are held on the stack: 3 arrays of 512 bytes.
    ROWS_AT_ONCE = 64

# The rows of a group.
cdef struct Shape:
    Py_ssize_t rows, n

# A block of a group, which are numbered row by row.
cdef struct Block:
    Py_ssize_t row, rows, start, n

# A group's blocks from first up to last.
cdef struct Chunk:
    Py_ssize_t group, first, last


cdef inline Py_ssize_t block_count(Shape s, Py_ssize_t size) noexcept nogil:
    if s.n > size:
        return s.rows * ceil_div(s.n, size)
    return ceil_div(s.rows, size // s.n)


cdef inline Block block_at(Shape s, Py_ssize_t size, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t per_row, rows, start
    if s.n > size:
        per_row = ceil_div(s.n, size)
        start = index % per_row * size
        return Block(index // per_row, 1, start, min(size, s.n - start))
    rows = size // s.n
    return Block(index * rows, min(rows, s.rows - index * rows), 0, s.n)


cdef inline Shape shape_of(const Call *c) noexcept nogil:
    return Shape(c.rows, c.n)


cdef inline Shape joined(const Call *c) noexcept nogil:
    """The same numbers as one long row, where a group's rows lie one after the other."""
    return Shape(1, c.rows * c.n) if c.x.row == c.n else Shape(c.rows, c.n)


cdef inline Job job_of(const Call *c) noexcept nogil:
    """The blocks of a group, into how many chunks each is split, and how many there are in all."""
    cdef Py_ssize_t blocks = block_count(shape_of(c), c.k.row_block), chunks = 1
    if c.groups < CHUNKS and c.rows * c.n >= SPLIT:
        chunks = min(blocks, ceil_div(CHUNKS, c.groups))
    return Job(c, blocks, chunks, c.groups * chunks, NULL, NULL)


cdef inline nx_rows at(const Call *c, nx_groups a, Py_ssize_t group, Block b) noexcept nogil:
    """A block's rows in an array; no data where there is none."""
    if a.data == NULL:
        return nx_rows(NULL, 0)
    return nx_rows(
        <char *> a.data + (group * a.group + b.row * a.row + b.start) * c.k.itemsize, a.row
    )


cdef inline const char *along(const Call *c, const char *p, Block b) noexcept nogil:
    """Where the parameters of a block begin that run along the rows; NULL for others."""
    if p == NULL or c.parameters != ALONG_ROW:
        return NULL
    return p + b.start * c.k.parameter_size


cdef inline Chunk chunk_at(const Job *j, Py_ssize_t task) noexcept nogil:
    cdef Py_ssize_t chunk = task % j.chunks
    return Chunk(task // j.chunks, chunk * j.blocks // j.chunks,
                 (chunk + 1) * j.blocks // j.chunks)


cdef inline Py_ssize_t first_of(const Job *j, Py_ssize_t task, Py_ssize_t things) noexcept nogil:
    """Where the share of a task in so many things begins, and that of the one before ends."""
    return task * things // j.tasks


cdef void look_ahead(Call *c, int arrays) noexcept nogil:
    """Set `ahead` to the distance from a group, as far as it is one piece of work, to the next.

    Of a large call whose groups, so many arrays of them, stay in cache between the two passes.
    Where x alone is read, and row by row, the processor itself looks ahead as well.
    """
    cdef Py_ssize_t groups = 1
    if c.parameters == ALONG_ROW:
        if arrays == 1 or c.n <= c.k.row_block:
            return
        groups = rows_at_once(c)
    if groups * arrays * c.rows * c.n * c.k.itemsize <= CACHED:
        c.ahead = groups * c.x.group


# Forward -----------------------------------------------------------------------------------------


cdef void group_moments(const Call *c, Py_ssize_t group, Py_ssize_t chunk, Py_ssize_t chunks,
                        double scale, nx_moments *m) noexcept nogil:
    cdef Shape s = joined(c)
    cdef Py_ssize_t index, blocks = block_count(s, c.k.row_block)
    cdef Block b
    m.count = m.mean = m.m2 = 0
    for index in range(chunk * blocks // chunks, (chunk + 1) * blocks // chunks):
        b = block_at(s, c.k.row_block, index)
        c.k.row_moments(at(c, c.x, group, b), nx_block(b.rows, b.n), c.statistics == CENTRED, scale,
                        m)


cdef void group_affine(const Call *c, Py_ssize_t group, Py_ssize_t first,
                       Py_ssize_t last) noexcept nogil:
    """y of a chunk, which comes in registers.

    As a struct it would be stored, and to be loaded wait for all that was streamed before: a
    quarter of the time of short groups.
    """
    cdef Py_ssize_t index, end, r, channel
    cdef double zero = 0, mean = c.mean[group], rstd = c.rstd[group]
    cdef double scale[ROWS_AT_ONCE]
    cdef double shift[ROWS_AT_ONCE]
    cdef double means[ROWS_AT_ONCE]
    cdef nx_affine map = nx_affine(&mean, &rstd, &zero, 0, c.ahead)
    cdef Block b
    if c.parameters == PER_GROUP:
        affine_of(c.k, c.gamma, c.beta, group, rstd, scale, shift)
        map = nx_affine(&mean, &scale[0], &shift[0], 0, c.ahead)
    elif c.parameters == PER_ROW:
        for r in range(min(<Py_ssize_t> ROWS_AT_ONCE, c.rows)):
            means[r] = mean
        map = nx_affine(&means[0], &scale[0], &shift[0], 1, c.ahead)
    for index in range(last - 1, first - 1, -1):
        b = block_at(shape_of(c), c.k.row_block, index)
        if c.parameters != PER_ROW:
            c.k.row_affine(at(c, c.x, group, b), at(c, c.y, group, b), nx_block(b.rows, b.n), &map,
                           along(c, c.gamma, b), along(c, c.beta, b), c.relu)
            continue
        end = b.row + b.rows
        while b.row < end:
            channel = (group * c.rows + b.row) % c.channels
            b.rows = min(<Py_ssize_t> ROWS_AT_ONCE, end - b.row)
            for r in range(b.rows):
                affine_of(c.k, c.gamma, c.beta, channel + r, rstd, scale + r, shift + r)
            c.k.row_affine(at(c, c.x, group, b), at(c, c.y, group, b), nx_block(b.rows, b.n), &map,
                           NULL, NULL, c.relu)
            b.row += b.rows


cdef inline void finish_group(const Call *c, Py_ssize_t group, nx_moments m,
                              double scale) noexcept nogil:
    nx_finish_moments(m, scale, c.eps, c.mean + group, c.rstd + group,
                      NULL if c.var == NULL else c.var + group)


cdef void normalize_group(const Call *c, Py_ssize_t group, Py_ssize_t blocks) noexcept nogil:
    cdef nx_moments m
    cdef double scale
    if c.statistics != GIVEN:
        group_moments(c, group, 0, 1, 1, &m)
        scale = nx_rescale(&c.k.range, m)
        if scale != 1:
            group_moments(c, group, 0, 1, scale, &m)
        finish_group(c, group, m, scale)
    if c.y.data != NULL:
        group_affine(c, group, 0, blocks)


cdef void group_task(const void *job, Py_ssize_t task) noexcept nogil:
    normalize_group((<const Job *> job).call, task, (<const Job *> job).blocks)


cdef void layer_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Some rows of layer norm, each of which is one block."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t first = first_of(j, task, c.groups), last = first_of(j, task + 1, c.groups)
    cdef nx_layer norm = nx_layer(c.statistics == CENTRED, c.eps, c.gamma, c.beta)
    c.k.layer_forward(rows_at(c.x, c.k.itemsize, first), rows_at(c.y, c.k.itemsize, first),
                      nx_block(last - first, c.n), &norm, c.mean + first, c.rstd + first)


cdef inline nx_groups groups_at(const Call *c, nx_groups a, Py_ssize_t group) noexcept nogil:
    return nx_groups(<char *> a.data + group * a.group * c.k.itemsize, a.group, a.row)


cdef inline nx_grouping grouping_of(const Call *c, Py_ssize_t first,
                                    Py_ssize_t last) noexcept nogil:
    """Some groups with parameters PER_ROW."""
    return nx_grouping(last - first, c.rows, c.n, c.gamma, c.beta, first * c.rows % c.channels,
                       c.channels)


cdef void short_groups_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Some groups, each of which is one block."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t first = first_of(j, task, c.groups), last = first_of(j, task + 1, c.groups)
    cdef nx_grouping g = grouping_of(c, first, last)
    c.k.group_forward(groups_at(c, c.x, first), groups_at(c, c.y, first), &g, c.eps, c.relu,
                      c.mean + first, c.rstd + first)


cdef void moments_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A chunk's moments, into `partial`, of numbers times the group's scale, in `adjust`."""
    cdef const Job *j = <const Job *> job
    group_moments(j.call, task // j.chunks, task % j.chunks, j.chunks, j.adjust[task // j.chunks],
                  <nx_moments *> j.partial + task)


cdef void affine_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Chunk t = chunk_at(j, task)
    group_affine(j.call, t.group, t.first, t.last)


cdef int moments_in_chunks(const Call *c, Job *j, int threads) noexcept nogil:
    """The statistics of groups that are split."""
    cdef Py_ssize_t group, chunk, attempt
    cdef bint again
    cdef nx_moments m
    j.partial = <double *> malloc(j.tasks * sizeof(nx_moments) + c.groups * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    j.adjust = <double *> (<nx_moments *> j.partial + j.tasks)
    for group in range(c.groups):
        j.adjust[group] = 1
    for attempt in range(2):  # the second with scales that the first has found
        run_on(threads, moments_task, j, j.tasks)
        again = False
        for group in range(c.groups):
            m = nx_moments(0, 0, 0)
            for chunk in range(j.chunks):
                nx_merge(&m, (<nx_moments *> j.partial)[group * j.chunks + chunk])
            finish_group(c, group, m, j.adjust[group])
            if attempt == 0:
                j.adjust[group] = nx_rescale(&c.k.range, m)
                again = again or j.adjust[group] != 1
        if not again:
            break
    free(j.partial)
    return NORMEXT_OK


cdef int normalize_rows(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta, with relu 0 where that is less (not ALONG_ROW).

    Unless they are GIVEN, mean, rstd and var are computed and stored; no more is done where y has
    no data.
    """
    cdef Job j = job_of(c)
    cdef int status, threads = team_for(j.tasks, c.groups * c.rows * c.n)
    cdef bint own = c.statistics != GIVEN and c.y.data != NULL
    if threads == 0:
        return NORMEXT_NO_MEMORY
    if own and c.parameters == ALONG_ROW and c.rows == 1 and j.blocks == 1:
        j.tasks = threads  # each row is on its own, and no bit depends on the split
        run_on(threads, layer_task, &j, j.tasks)
        return NORMEXT_OK
    # Not batch norm, whose bits would depend on whether its variances are wanted, too.
    if own and c.parameters == PER_ROW and (
            c.rows * c.n <= c.k.short_group
            or (joined(c).rows == 1 and c.rows * c.n <= c.k.row_block)):
        j.tasks = threads
        run_on(threads, short_groups_task, &j, j.tasks)
        return NORMEXT_OK
    if j.chunks == 1:
        run_on(threads, group_task, &j, c.groups)
        return NORMEXT_OK
    if c.statistics != GIVEN:
        status = moments_in_chunks(c, &j, threads)
        if status != NORMEXT_OK:
            return status
    if c.y.data != NULL:
        run_on(threads, affine_task, &j, j.tasks)
    return NORMEXT_OK


cdef bint are_runs(const Call *c) noexcept nogil:
    """Whether group norm with the channels last goes along its groups' runs of channels.

    That is better than down the channels where they fill some vectors.
    """
    return c.per_group >= 32


cdef Call run_of(const Call *c, Py_ssize_t index) noexcept nogil:
    """One group of an example: a row is a pixel, along which gamma and beta lie."""
    cdef Call g = c[0]
    cdef Py_ssize_t groups = c.n // c.per_group, channel = index % groups * c.per_group
    cdef Py_ssize_t example = index // groups, size = c.k.itemsize
    g.groups, g.n, g.parameters, g.ahead = 1, c.per_group, ALONG_ROW, 0
    g.x.data = <char *> c.x.data + (example * c.x.group + channel) * size
    g.y.data = <char *> c.y.data + (example * c.y.group + channel) * size
    if c.gamma != NULL:
        g.gamma = c.gamma + channel * c.k.parameter_size
    if c.beta != NULL:
        g.beta = c.beta + channel * c.k.parameter_size
    g.mean, g.rstd = c.mean + index, c.rstd + index
    return g


cdef void runs_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Some groups of all examples."""
    cdef const Job *j = <const Job *> job
    cdef Call g
    cdef Py_ssize_t index
    for index in range(first_of(j, task, j.chunks), first_of(j, task + 1, j.chunks)):
        g = run_of(j.call, index)
        normalize_group(&g, 0, j.blocks)


cdef int normalize_runs(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta, with the channels last."""
    cdef Py_ssize_t index, groups = c.groups * (c.n // c.per_group), numbers = c.rows * c.per_group
    cdef Call g = run_of(c, 0)
    cdef Job j = Job(c, block_count(shape_of(&g), c.k.row_block), groups, 0, NULL, NULL)
    cdef int status = NORMEXT_OK
    if groups >= CHUNKS or numbers < SPLIT:
        j.tasks = team_for(groups, groups * numbers)
        if j.tasks == 0:
            return NORMEXT_NO_MEMORY
        run_on(<int> j.tasks, runs_task, &j, j.tasks)  # no bit depends on the split
        return NORMEXT_OK
    for index in range(groups):
        g = run_of(c, index)
        status = normalize_rows(&g)
        if status != NORMEXT_OK:
            break
    return status


cdef void affine_block_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A block of a group; `partial` has the scales of its rows, then the shifts."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t group = task // j.blocks
    cdef Block b = block_at(shape_of(c), c.k.row_block, task % j.blocks)
    cdef nx_affine map = nx_affine(c.mean + b.row, j.partial + b.row, j.partial + c.rows + b.row, 1,
                                   0)
    c.k.row_affine(at(c, c.x, group, b), at(c, c.y, group, b), nx_block(b.rows, b.n), &map, NULL,
                   NULL, c.relu)


cdef int affine_rows(const Call *c) noexcept nogil:
    """y = gamma * (x - mean) * rstd + beta, where row r of every group has number r of each.

    So memory is walked in its order.
    """
    cdef Job j = job_of(c)
    cdef int status
    j.partial = <double *> malloc(2 * c.rows * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    c.k.affines(c.gamma, c.beta, 1, c.rows, c.rstd, j.partial, j.partial + c.rows)
    status = run_tasks(affine_block_task, &j, c.groups * j.blocks, c.groups * c.rows * c.n)
    free(j.partial)
    return status


cdef void sums_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Some rows are added up and then normalized, while they are in cache."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t row, first = task * CHUNK_ROWS, size = c.k.itemsize
    cdef nx_block b = nx_block(min(<Py_ssize_t> CHUNK_ROWS, c.groups - first), c.n)
    cdef nx_layer norm = nx_layer(c.statistics == CENTRED, c.eps, c.gamma, c.beta)
    c.k.add_rows(rows_at(c.x, size, first), rows_at(c.residual, size, first),
                 rows_at(c.sum, size, first), b)
    if j.blocks == 1:
        c.k.layer_forward(rows_at(c.sum, size, first), rows_at(c.y, size, first), b, &norm,
                          c.mean + first, c.rstd + first)
        return
    cdef Call of_sum = c[0]
    of_sum.x = c.sum
    for row in range(first, first + b.rows):
        normalize_group(&of_sum, row, j.blocks)


cdef void add_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A chunk of a long row."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t row = task // j.chunks, chunk = task % j.chunks, start = chunk * c.n // j.chunks
    cdef Block b = Block(0, 1, start, (chunk + 1) * c.n // j.chunks - start)
    c.k.add_rows(at(c, c.x, row, b), at(c, c.residual, row, b), at(c, c.sum, row, b),
                 nx_block(1, b.n))


cdef int normalize_sums(const Call *c) noexcept nogil:
    """sum = x + residual, and y as normalize_rows makes it of sum (ALONG_ROW), bit by bit."""
    cdef Job j = job_of(c)
    cdef int status
    if j.chunks == 1:
        return run_tasks(sums_task, &j, ceil_div(c.groups, CHUNK_ROWS), c.groups * c.n)
    status = run_tasks(add_task, &j, j.tasks, c.groups * c.n)
    if status != NORMEXT_OK:
        return status
    cdef Call of_sum = c[0]
    of_sum.x = c.sum
    return normalize_rows(&of_sum)


# Backward ----------------------------------------------------------------------------------------


cdef inline nx_backward backward_of(const Call *c, Py_ssize_t group, Block b,
                                    const nx_relu_mask *relu) noexcept nogil:
    """The backward pass of a block."""
    return nx_backward(
        nx_block(b.rows, b.n), at(c, c.x, group, b), at(c, c.dy, group, b), at(c, c.dx, group, b),
        at(c, c.addend, group, b), along(c, c.gamma, b), relu, c.ahead,
    )


cdef void group_dots(const Call *c, Chunk t, const double *pivot, nx_sums sums) noexcept nogil:
    cdef Py_ssize_t index
    cdef Block b
    cdef nx_backward of
    cdef double scale, shift
    cdef nx_relu_mask mask = nx_relu_mask(&scale, &shift)
    cdef nx_relu_mask *relu = &mask if c.relu else NULL
    cdef nx_rows none = nx_rows(NULL, 0)
    if c.parameters == PER_GROUP:
        affine_of(c.k, c.gamma, c.beta, t.group, c.rstd[t.group], &scale, &shift)
    sums.sum[0] = sums.dot[0] = 0
    for index in range(t.first, t.last):
        b = block_at(shape_of(c), c.k.row_block, index)
        of = nx_backward(
            nx_block(b.rows, b.n), at(c, c.x, t.group, b), at(c, c.dy, t.group, b), none, none,
            along(c, c.gamma, b), relu, c.ahead,
        )
        c.k.row_dots(&of, c.mean[t.group], pivot, sums)


cdef bint is_far(const Call *c, Py_ssize_t group, double mean) noexcept nogil:
    """Whether a group's gradients, with this mean, are far from zero (nx_near: why it matters)."""
    return c.statistics == CENTRED and c.k.row_is_far(
        <char *> c.dy.data + group * c.dy.group * c.k.itemsize, c.n,
        c.gamma if c.parameters == ALONG_ROW else NULL, mean
    )


cdef void group_dx(const Call *c, Chunk t, double sum, double dot) noexcept nogil:
    """dx, with the sum and dot of the chunk's group.

    Statistics about zero have no mean to pass a gradient through: that of g counts as 0.
    """
    cdef Py_ssize_t index, group = t.group
    cdef Block b
    cdef nx_backward of
    cdef double zero = 0, rstd = c.rstd[group], factor = rstd, shift, slope, constant
    cdef double g_mean = sum / c.count if c.statistics == CENTRED else 0
    cdef nx_relu_mask mask = nx_relu_mask(&factor, &shift)
    cdef nx_affine map = nx_affine(&zero, &factor, &zero, 0, 0)
    cdef nx_line line = nx_line(c.mean + group, &g_mean, &factor, &slope, &constant, 0)
    if c.parameters == PER_GROUP:
        affine_of(c.k, c.gamma, c.beta, group, rstd, &factor, &shift)
    slope = 0 if c.statistics == GIVEN else nx_slope(factor, rstd, dot / c.count)
    constant = nx_constant(factor, g_mean)
    for index in range(t.last - 1, t.first - 1, -1):
        b = block_at(shape_of(c), c.k.row_block, index)
        of = backward_of(c, group, b, &mask if c.relu else NULL)
        if c.statistics != GIVEN or c.relu:
            c.k.row_dx(&of, &line)
        else:  # the statistics are constants, and x does not matter
            c.k.row_affine(of.dy, of.dx, of.block, &map, of.gamma, NULL, False)


cdef void backward_group(const Call *c, Chunk whole, nx_sums sums) noexcept nogil:
    cdef double pivot
    if not c.given:
        group_dots(c, whole, NULL if c.pivots == NULL else c.pivots + whole.group, sums)
        pivot = sums.sum[0] / c.count
        if c.dx.data != NULL and is_far(c, whole.group, pivot):
            group_dots(c, whole, &pivot, sums)
    if c.dx.data != NULL:
        group_dx(c, whole, sums.sum[0], sums.dot[0])


cdef void backward_group_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    backward_group(j.call, Chunk(task, 0, j.blocks),
                   nx_sums(j.call.sums + task, j.call.dots + task, 0))


cdef void dots_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A chunk's sum and dot, into `partial`, about the group's pivot in `adjust` (NULL: none)."""
    cdef const Job *j = <const Job *> job
    group_dots(j.call, chunk_at(j, task),
               NULL if j.adjust == NULL else j.adjust + task // j.chunks,
               nx_sums(j.partial + 2 * task, j.partial + 2 * task + 1, 0))


cdef void dx_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef Chunk t = chunk_at(j, task)
    group_dx(j.call, t, j.call.sums[t.group], j.call.dots[t.group])


cdef int dots_in_chunks(const Call *c, Job *j, int threads) noexcept nogil:
    """The sums of groups that are split."""
    cdef Py_ssize_t group, chunk, attempt
    cdef double *pivot
    cdef double mean
    cdef bint again
    j.partial = <double *> malloc((2 * j.tasks + c.groups) * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    pivot, j.adjust = j.partial + 2 * j.tasks, <double *> c.pivots
    for attempt in range(2):  # the second about pivots that the first has found
        run_on(threads, dots_task, j, j.tasks)
        again = False
        for group in range(c.groups):
            c.sums[group] = c.dots[group] = 0
            for chunk in range(j.chunks):
                c.sums[group] += j.partial[2 * (group * j.chunks + chunk)]
                c.dots[group] += j.partial[2 * (group * j.chunks + chunk) + 1]
            if attempt == 0:
                mean, pivot[group] = c.sums[group] / c.count, 0
                if c.dx.data != NULL and is_far(c, group, mean):
                    pivot[group], again = mean, True
        if not again:
            break
        j.adjust = pivot
    free(j.partial)
    return NORMEXT_OK


cdef int rows_backward(const Call *c) noexcept nogil:
    """The gradient dx and, for each group, its sum and dot.

    g is ``gamma * dy`` where gamma is ALONG_ROW, and dy where it is PER_GROUP. No more than the
    sums, of what may be parts of groups, is done where dx has no data.
    """
    cdef Job j = job_of(c)
    cdef int status, threads = team_for(j.tasks, c.groups * c.rows * c.n)
    if threads == 0:
        return NORMEXT_NO_MEMORY
    if j.chunks == 1:
        run_on(threads, backward_group_task, &j, c.groups)
        return NORMEXT_OK
    if not c.given:
        status = dots_in_chunks(c, &j, threads)
        if status != NORMEXT_OK:
            return status
    if c.dx.data != NULL:
        run_on(threads, dx_task, &j, j.tasks)
    return NORMEXT_OK


cdef inline nx_backward backward_of_rows(const Call *c, Py_ssize_t first, Py_ssize_t rows,
                                         Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """The backward pass of some rows, one a group, or of a part of each, from `start` on."""
    cdef Block part = Block(0, 1, start, n)
    cdef nx_backward of = backward_of(c, first, part, NULL)
    of.block.rows = rows
    of.x.stride, of.dy.stride, of.dx.stride = c.x.group, c.dy.group, c.dx.group
    of.addend.stride = c.addend.group
    return of


cdef void finish_dots(const Call *c, Py_ssize_t row, double *sum, double *dot) noexcept nogil:
    """From the dot of xhat to that of x - mean; of gradients far from zero, about their mean."""
    cdef double pivot = sum[0] / c.count
    if is_far(c, row, pivot):
        group_dots(c, Chunk(row, 0, block_count(shape_of(c), c.k.row_block)), &pivot,
                   nx_sums(sum, dot, 0))
    elif c.rstd[row] != 0:
        dot[0] /= c.rstd[row]


cdef void dots_of_rows(const Call *c, Py_ssize_t first, Py_ssize_t rows, Py_ssize_t start,
                       Py_ssize_t end, nx_sums sums, double *dbeta,
                       double *dgamma) noexcept nogil:
    """The sums of a part of some rows, added to theirs and to those of the columns."""
    cdef nx_backward of
    cdef Py_ssize_t n
    while start < end:
        n = min(c.k.row_block, end - start)
        of = backward_of_rows(c, first, rows, start, n)
        c.k.layer_dots(&of, c.statistics == CENTRED, c.mean + first, c.rstd + first, sums,
                       dbeta + start, dgamma + start)
        start += n


cdef inline Py_ssize_t rows_at_once(const Call *c) noexcept nogil:
    """Long rows of layer norm's backward pass that go together, and stay in cache meanwhile."""
    return max(1, min(<Py_ssize_t> CHUNK_ROWS, CACHED // (2 * c.n * c.k.itemsize)))


cdef void backward_layers(const Call *c, Py_ssize_t first, Py_ssize_t last, double *dbeta,
                          double *dgamma) noexcept nogil:
    """dx of some rows, and their sums added to dbeta and dgamma."""
    cdef Py_ssize_t row, rows, blocks = block_count(shape_of(c), c.k.row_block)
    cdef nx_backward of
    cdef double sum[CHUNK_ROWS]
    cdef double dot[CHUNK_ROWS]
    if c.n <= c.k.row_block:
        of = backward_of_rows(c, first, last - first, 0, c.n)
        c.k.layer_backward(&of, c.statistics == CENTRED, c.mean + first, c.rstd + first, dbeta,
                           dgamma)
        return
    while first < last:
        rows = min(rows_at_once(c), last - first)
        for row in range(rows):
            sum[row] = dot[row] = 0
        dots_of_rows(c, first, rows, 0, c.n, nx_sums(&sum[0], &dot[0], 1), dbeta, dgamma)
        for row in range(rows - 1, -1, -1):
            finish_dots(c, first + row, &sum[row], &dot[row])
            group_dx(c, Chunk(first + row, 0, blocks), sum[row], dot[row])
        first += rows


cdef inline double *parameters_of(const Job *j, Py_ssize_t chunk) noexcept nogil:
    """Where the sums of a chunk of rows down the columns go: dbeta, then dgamma."""
    return j.partial + 2 * chunk * j.call.n


cdef void layer_chunk_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef double *dbeta = parameters_of(j, task)
    memset(dbeta, 0, 2 * c.n * sizeof(double))
    backward_layers(c, first_of(j, task, c.groups), first_of(j, task + 1, c.groups), dbeta,
                    dbeta + c.n)


# Sums down the columns, of which chunks of rows, or examples, have some each: dbeta's and, `second`
# numbers further, dgamma's.
cdef struct Parts:
    double *sums
    Py_ssize_t count, step, second, columns
    double *dbeta
    double *dgamma


cdef inline double *part_of(const Parts *p, Py_ssize_t i) noexcept nogil:
    """The i-th part of all, or of CHUNKS at most."""
    return p.sums + (i if p.count <= CHUNKS else i * p.count // CHUNKS) * p.step


cdef void fold_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Many parts become CHUNKS."""
    cdef const Parts *p = <const Parts *> job
    cdef double *sum = part_of(p, task)
    cdef double *end = part_of(p, task + 1)
    cdef double *part = sum + p.step
    cdef Py_ssize_t j
    while part < end:
        for j in range(p.columns):
            sum[j] += part[j]
            sum[p.second + j] += part[p.second + j]
        part += p.step


cdef void parameters_task(const void *job, Py_ssize_t task) noexcept nogil:
    """The sums of all parts for some columns, in their order."""
    cdef const Parts *p = <const Parts *> job
    cdef Py_ssize_t i, j, first = task * COLUMNS, last = min(first + COLUMNS, p.columns)
    cdef const double *part
    cdef double *dbeta = p.dbeta
    cdef double *dgamma = p.dgamma
    for i in range(min(p.count, <Py_ssize_t> CHUNKS)):
        part = part_of(p, i)
        for j in range(first, last):
            dbeta[j] += part[j]
            dgamma[j] += part[p.second + j]


cdef int add_parts(Parts p, Py_ssize_t elements) noexcept nogil:
    """Add them to dbeta and dgamma."""
    cdef int status = NORMEXT_OK
    if p.count > CHUNKS:
        status = run_tasks(fold_task, &p, CHUNKS, elements)
    if status == NORMEXT_OK:
        status = run_tasks(parameters_task, &p, ceil_div(p.columns, COLUMNS), elements)
    return status


cdef void strip_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A strip of columns of a chunk of rows; the rows' sums go to `adjust`, strip by strip."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t chunk = task // j.blocks, strip = task % j.blocks, row, start = strip * STRIP
    cdef Py_ssize_t first = chunk * CHUNK_ROWS, end = min(start + STRIP, c.n)
    cdef Py_ssize_t rows = min(<Py_ssize_t> CHUNK_ROWS, c.groups - first)
    cdef double *dbeta = c.dbeta
    cdef double *dgamma = c.dgamma
    cdef double *sums = j.adjust + 2 * strip * c.groups
    if j.chunks > 1:
        dbeta = parameters_of(j, chunk)
        dgamma = dbeta + c.n
        memset(dbeta + start, 0, (end - start) * sizeof(double))
        memset(dgamma + start, 0, (end - start) * sizeof(double))
    for row in range(first, first + rows):
        sums[row] = sums[c.groups + row] = 0
    dots_of_rows(c, first, rows, start, end, nx_sums(sums + first, sums + c.groups + first, 1),
                 dbeta, dgamma)


cdef void strip_sums_task(const void *job, Py_ssize_t task) noexcept nogil:
    """A row's sum and dot, of all strips in their order."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t strip
    cdef double sum = 0, dot = 0
    for strip in range(j.blocks):
        sum += j.adjust[2 * strip * c.groups + task]
        dot += j.adjust[(2 * strip + 1) * c.groups + task]
    finish_dots(c, task, &sum, &dot)
    c.sums[task], c.dots[task] = sum, dot


cdef int strips_backward(const Call *c) noexcept nogil:
    """layer_backward of few rows, which cannot be shared out: strips of columns are, for the sums,
    and then chunks of each row."""
    cdef Job j = Job(c, ceil_div(c.n, STRIP), ceil_div(c.groups, CHUNK_ROWS), 0, NULL, NULL)
    cdef Py_ssize_t elements = c.groups * c.n
    cdef Call of_rows = c[0]
    cdef int status
    j.partial = <double *> malloc((2 * j.chunks * c.n + 2 * (j.blocks + 1) * c.groups)
                                  * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    j.adjust = j.partial + 2 * j.chunks * c.n
    of_rows.sums = j.adjust + 2 * j.blocks * c.groups
    of_rows.dots, of_rows.given, j.call = of_rows.sums + c.groups, True, &of_rows
    status = run_tasks(strip_task, &j, j.chunks * j.blocks, elements)
    if status == NORMEXT_OK and j.chunks > 1:
        status = add_parts(Parts(j.partial, j.chunks, 2 * c.n, c.n, c.n, c.dbeta, c.dgamma),
                           elements)
    if status == NORMEXT_OK:
        status = run_tasks(strip_sums_task, &j, c.groups, elements)
    if status == NORMEXT_OK:
        status = rows_backward(&of_rows)
    free(j.partial)
    return status


cdef int layer_backward(const Call *c) noexcept nogil:
    """dx of rows (one a group); sums of dy and dy * xhat over them are added to dbeta, dgamma."""
    cdef Job j
    cdef Py_ssize_t elements = c.groups * c.n, tasks = elements // TASK
    cdef int status
    if elements < SPLIT:
        backward_layers(c, 0, c.groups, c.dbeta, c.dgamma)
        return NORMEXT_OK
    j = Job(c, 0, 0, min(tasks, <Py_ssize_t> CHUNKS, c.groups // CHUNK_ROWS), NULL, NULL)
    if j.tasks < min(tasks, <Py_ssize_t> FEW_CHUNKS):
        return strips_backward(c)
    j.chunks, j.partial = j.tasks, <double *> malloc(2 * j.tasks * c.n * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    status = run_tasks(layer_chunk_task, &j, j.tasks, elements)
    if status == NORMEXT_OK:
        status = add_parts(Parts(j.partial, j.tasks, 2 * c.n, c.n, c.n, c.dbeta, c.dgamma),
                           elements)
    free(j.partial)
    return status


# Group norm: every row of a group has a gamma of its own. `partial` holds, for each row of each
# group, sum(dy), then sum(dy * xhat), then work space.


cdef void row_dots_of_group(const Call *c, Py_ssize_t group, const double *pivot,
                            nx_sums sums) noexcept nogil:
    cdef Py_ssize_t r, index
    cdef Block b
    cdef nx_backward of
    for r in range(c.rows):
        sums.sum[r] = sums.dot[r] = 0
    for index in range(block_count(shape_of(c), c.k.row_block)):
        b = block_at(shape_of(c), c.k.row_block, index)
        of = backward_of(c, group, b, NULL)
        c.k.row_dots(&of, c.mean[group], pivot, nx_sums(sums.sum + b.row, sums.dot + b.row, 1))


cdef void row_deviations(const Call *c, Py_ssize_t group, double *deviations) noexcept nogil:
    """Each row's sum of x - mean."""
    cdef Py_ssize_t r
    cdef nx_moments m
    cdef Call row = c[0]
    row.rows, row.x.row, row.statistics = 1, 0, CENTRED
    for r in range(c.rows):
        row.x.data = <char *> c.x.data + r * c.x.row * c.k.itemsize
        group_moments(&row, group, 0, 1, 1, &m)
        deviations[r] = m.count * (m.mean - c.mean[group])


cdef void backward_rows_of_group(const Call *c, Py_ssize_t group, nx_sums sums,
                                 double *deviations) noexcept nogil:
    """group_dx where every row has a gamma; the kernel `group_backward` does it to short groups."""
    cdef Py_ssize_t r, index, end, channel = group * c.rows % c.channels
    cdef double sum = 0, dot = 0, n = <double> c.rows * <double> c.n, pivot = 0
    cdef double rstd = c.rstd[group], slope, constant
    cdef double factor[ROWS_AT_ONCE]
    cdef nx_line line = nx_line(c.mean + group, &pivot, &factor[0], &slope, &constant, 1)
    cdef nx_backward of
    cdef Block b
    row_dots_of_group(c, group, NULL, sums)
    for r in range(c.rows):
        pivot += sums.sum[r] / n
    if is_far(c, group, pivot):
        row_deviations(c, group, deviations)
        row_dots_of_group(c, group, &pivot, sums)
        dot = restore_pivot(c.k, c.gamma, channel, c.rows, pivot, deviations, sums.dot)
    else:
        for r in range(c.rows):
            dot += sums.dot[r] * gamma_of(c, channel + r)
    for r in range(c.rows):
        sum += sums.sum[r] * gamma_of(c, channel + r)
    slope, constant = nx_slope(rstd, rstd, dot / n), nx_constant(rstd, sum / n)
    for index in range(block_count(shape_of(c), c.k.row_block) - 1, -1, -1):
        b = block_at(shape_of(c), c.k.row_block, index)
        end = b.row + b.rows
        while b.row < end:
            b.rows = min(<Py_ssize_t> ROWS_AT_ONCE, end - b.row)
            for r in range(b.rows):
                factor[r] = rstd * gamma_of(c, channel + b.row + r)
            of = backward_of(c, group, b, NULL)
            c.k.row_dx(&of, &line)
            b.row += b.rows
    for r in range(c.rows):
        sums.dot[r] *= rstd


cdef inline nx_sums sums_of(const Job *j, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t rows = j.call.groups * j.call.rows
    return nx_sums(j.partial + group * j.call.rows, j.partial + rows + group * j.call.rows, 1)


cdef inline double *work_of(const Job *j, Py_ssize_t group) noexcept nogil:
    return j.partial + (2 * j.call.groups + group) * j.call.rows


cdef void backward_short_groups_task(const void *job, Py_ssize_t task) noexcept nogil:
    """Short groups, in one go but for those that are far from zero."""
    cdef const Job *j = <const Job *> job
    cdef const Call *c = j.call
    cdef Py_ssize_t first = first_of(j, task, c.groups), last = first_of(j, task + 1, c.groups)
    cdef nx_grouping g
    cdef nx_sums sums
    while True:
        g, sums = grouping_of(c, first, last), sums_of(j, first)
        first += c.k.group_backward(groups_at(c, c.x, first), groups_at(c, c.dy, first),
                                    groups_at(c, c.dx, first), &g, c.mean + first, c.rstd + first,
                                    sums.sum, sums.dot)
        if first == last:
            return
        backward_rows_of_group(c, first, sums_of(j, first), work_of(j, first))
        first += 1


cdef void backward_rows_of_group_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Job *j = <const Job *> job
    backward_rows_of_group(j.call, task, sums_of(j, task), work_of(j, task))


cdef int grouped_backward(const Call *c) noexcept nogil:
    """dx; each channel's sum(dy) and sum(dy * xhat) are added to dbeta and dgamma."""
    cdef Job j = job_of(c)
    cdef Py_ssize_t rows = c.groups * c.rows, channels = c.channels
    cdef int status, threads = team_for(c.groups, rows * c.n)
    if threads == 0:
        return NORMEXT_NO_MEMORY
    j.partial = <double *> malloc(3 * rows * sizeof(double))
    if j.partial == NULL:
        return NORMEXT_NO_MEMORY
    if j.blocks == 1:
        j.tasks = threads  # each group is on its own, and no bit depends on the split
        run_on(threads, backward_short_groups_task, &j, j.tasks)
    else:
        run_on(threads, backward_rows_of_group_task, &j, c.groups)
    status = add_parts(Parts(j.partial, rows // channels, channels, rows, channels, c.dbeta,
                             c.dgamma), rows * c.n)
    free(j.partial)
    return status
