# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Calls whose arrays can be walked where they lie: how, and by which loops.

The arrays' axes become (group, row, n), or a call is not walked: then blocks.pyx copies what cannot
be, a block at a time, and the copies are walked.
"""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from normext cimport (
    NORMEXT_APPLY, NORMEXT_BATCH_NORM, NORMEXT_NO_MEMORY, NORMEXT_OK,
    NORMEXT_RMS_NORM, NORMEXT_SUMS, nx_array, nx_io, nx_norm,
)
from normext._core.call cimport ABOUT_ZERO, ALONG_ROW, CENTRED, GIVEN, PER_GROUP, PER_ROW, Call
from normext._core.columns cimport (
    column_groups_backward, columns_backward, normalize_column_groups, normalize_columns,
)
from normext._core.kernels cimport nx_groups
from normext._core.rows cimport (
    affine_rows, are_runs, grouped_backward, layer_backward, look_ahead, normalize_rows,
    normalize_runs, normalize_sums, rows_backward,
)
from normext._core.runtime cimport kernels_for, norm_kernels
from normext._core.sizes cimport is_group_norm, numbers_of

cdef enum:
    # Pixels of an image up to which batch norm of twice as many images goes down columns. A pass
    # over (682, 6, 2, 2) takes 5 us so and 26 along rows; (638, 67, 7, 7) 555 and 660, but
    # (386, 67, 9, 9) 830 and 590.
    SMALL_IMAGE = 64
    # Numbers of a piece from which on its result goes around the caches, forward. Shorter ones are
    # read and written in turns so quick that the processor overlaps them: rows of 100 floats, in 32
    # MiB, take 3.3 ms so and 4.3 around the caches.
    PIECE = 128

# The arrays that a call walks together, and where their place in it is to be noted.
cdef struct Arrays:
    int count
    bint copies  # of a block: their channels come first, whatever the number of pixels
    nx_array of[MAX_ARRAYS]
    nx_groups *to[MAX_ARRAYS]
    Py_ssize_t strides[MAX_ARRAYS][MAX_NDIM]  # in bytes; filled in by `fill_strides`


cdef inline void add_array(Arrays *a, nx_array array, nx_groups *to) noexcept nogil:
    if array.data != NULL:
        a.of[a.count], a.to[a.count] = array, to
        a.count += 1


cdef inline bint all_contiguous(const Arrays *a, Py_ssize_t itemsize) noexcept nogil:
    """As far as that is known without a look at strides."""
    cdef int i
    for i in range(a.count):
        if a.of[i].strides != NULL or a.of[i].swapped or <uintptr_t> a.of[i].data % itemsize:
            return False
    return True


cdef void fill_strides(const nx_norm *norm, Py_ssize_t itemsize, const Py_ssize_t *given,
                       Py_ssize_t *strides) noexcept nogil:
    cdef Py_ssize_t step = itemsize
    cdef int i
    for i in range(norm.ndim - 1, -1, -1):
        strides[i] = step if given == NULL else given[i]
        step *= norm.shape[i]


cdef bint walkable(const nx_norm *norm, Arrays *a, Py_ssize_t itemsize) noexcept nogil:
    """Native byte order, aligned, and strides that are whole elements; fills in the strides."""
    cdef int i, axis
    for i in range(a.count):
        fill_strides(norm, itemsize, a.of[i].strides, a.strides[i])
        if a.of[i].swapped or <uintptr_t> a.of[i].data % itemsize:
            return False
        for axis in range(norm.ndim):
            if a.strides[i][axis] % itemsize:
                return False
    return True


cdef bint contiguous_in(const nx_norm *norm, const Arrays *a, Py_ssize_t itemsize,
                        const int *order) noexcept nogil:
    """Whether all arrays are contiguous with their axes in that order."""
    cdef Py_ssize_t step
    cdef int i, at, axis
    for i in range(a.count):
        step = itemsize
        for at in range(norm.ndim - 1, -1, -1):
            axis = order[at]
            if norm.shape[axis] != 1:
                if a.strides[i][axis] != step:
                    return False
                step *= norm.shape[axis]
    return True


# Axes of which neighbours have become one where all arrays lie so.
cdef struct Merged:
    int count
    Py_ssize_t length[MAX_NDIM]
    Py_ssize_t strides[MAX_ARRAYS][MAX_NDIM]


cdef void merge_axes(const nx_norm *norm, const Arrays *a, const int *axes, int count,
                     Merged *m) noexcept nogil:
    cdef Py_ssize_t length
    cdef int at, i, axis, last
    cdef bint joins
    m.count = 0
    for at in range(count):
        axis, last = axes[at], m.count - 1
        length = norm.shape[axis]
        if length == 1:
            continue
        joins = m.count > 0
        for i in range(a.count):
            joins = joins and m.strides[i][last] == length * a.strides[i][axis]
        if joins:
            m.length[last] *= length
        else:
            m.length[m.count] = length
            m.count += 1
        for i in range(a.count):
            m.strides[i][m.count - 1] = a.strides[i][axis]


cdef bint all_are(const Arrays *a, const Merged *m, int at, Py_ssize_t stride) noexcept nogil:
    """Whether a merged axis has that stride in all arrays."""
    cdef int i
    for i in range(a.count):
        if m.strides[i][at] != stride:
            return False
    return True


cdef Py_ssize_t distance(Py_ssize_t stride) noexcept nogil:
    return -stride if stride < 0 else stride


cdef void sort_by_stride(const Py_ssize_t *strides, int *axes, int count) noexcept nogil:
    """The axes with the largest strides first; of equals, the first."""
    cdef int i, j, axis
    for i in range(1, count):
        axis, j = axes[i], i
        while j > 0 and distance(strides[axes[j - 1]]) < distance(strides[axis]):
            axes[j] = axes[j - 1]
            j -= 1
        axes[j] = axis


cdef bint are_columns(const Arrays *a, Py_ssize_t channels, Py_ssize_t outer,
                      Py_ssize_t inner) noexcept nogil:
    """Whether images are so small and many that each pixel is better taken for a column."""
    cdef int i
    if inner > SMALL_IMAGE or outer < 2 * inner:
        return False
    for i in range(a.count):
        if channels > 1 and a.to[i].group != inner:
            return False
    return True


cdef Way batch_layout(const nx_norm *norm, Arrays *a, Call *c) noexcept nogil:
    """(outer, channels, inner), where inner is contiguous, or 1 and the channels are contiguous."""
    cdef Py_ssize_t itemsize = c.k.itemsize, channels = norm.shape[norm.axis], outer, inner
    cdef int i, axis, count = 0
    cdef int axes[MAX_NDIM]
    cdef Merged m
    cdef bint by_columns = False
    if all_contiguous(a, itemsize):
        outer, inner = numbers_of(norm, 0, norm.axis), numbers_of(norm, norm.axis + 1, norm.ndim)
        if channels == 1:
            outer, inner = 1, outer * inner
        for i in range(a.count):
            a.to[i][0] = nx_groups(a.of[i].data, inner, channels * inner)
        by_columns = inner == 1
    else:
        if not walkable(norm, a, itemsize):
            return BLOCKS
        for axis in range(norm.ndim):
            if axis != norm.axis:
                axes[count] = axis
                count += 1
        sort_by_stride(a.strides[0], axes, count)
        merge_axes(norm, a, axes, count, &m)
        outer = inner = 1
        if m.count > 0 and all_are(a, &m, m.count - 1, itemsize):
            m.count -= 1
            inner = m.length[m.count]
        else:
            by_columns = True
            for i in range(a.count):
                by_columns = by_columns and (channels == 1 or a.strides[i][norm.axis] == itemsize)
            if not by_columns:
                return BLOCKS
        if m.count > 1:
            return BLOCKS
        if m.count == 1:
            outer = m.length[0]
        for i in range(a.count):
            a.to[i][0] = nx_groups(a.of[i].data, a.strides[i][norm.axis] // itemsize,
                                   m.strides[i][0] // itemsize if m.count == 1 else 0)
    c.groups, c.rows, c.n = channels, outer, channels if by_columns else inner
    c.per_group = 1
    if by_columns or not are_columns(a, channels, outer, inner):
        return COLUMNS if by_columns else ROWS
    c.n, c.per_group = channels * inner, inner
    return COLUMNS


cdef Way row_layout(const nx_norm *norm, Arrays *a, Call *c) noexcept nogil:
    """Rows, contiguous and any distance apart."""
    cdef Py_ssize_t itemsize = c.k.itemsize
    cdef int i
    cdef int axes[MAX_NDIM]
    cdef Merged rows, row
    c.groups, c.rows = numbers_of(norm, 0, norm.axis), 1
    c.n = numbers_of(norm, norm.axis, norm.ndim)
    if all_contiguous(a, itemsize):
        for i in range(a.count):
            a.to[i][0] = nx_groups(a.of[i].data, c.n, 0)
        return LAYERS
    if not walkable(norm, a, itemsize):
        return BLOCKS
    for i in range(norm.ndim):
        axes[i] = i
    merge_axes(norm, a, axes, norm.axis, &rows)
    merge_axes(norm, a, axes + norm.axis, norm.ndim - norm.axis, &row)
    if rows.count > 1 or row.count > 1 or (row.count == 1 and not all_are(a, &row, 0, itemsize)):
        return BLOCKS
    for i in range(a.count):
        a.to[i][0] = nx_groups(a.of[i].data,
                               rows.strides[i][0] // itemsize if rows.count == 1 else 0, 0)
    return LAYERS


cdef void moved_axes(const nx_norm *norm, int to, int *order) noexcept nogil:
    """The order of axes where that of the channels comes at place `to`."""
    cdef int at, axis = 0
    for at in range(norm.ndim):
        if at == to:
            order[at] = norm.axis
            continue
        if axis == norm.axis:
            axis += 1
        order[at] = axis
        axis += 1


cdef Way group_layout(const nx_norm *norm, Arrays *a, Call *c) noexcept nogil:
    """Examples of groups of channels, with the channels first or last."""
    cdef Py_ssize_t itemsize = c.k.itemsize, N = norm.shape[0], channels = norm.shape[norm.axis]
    cdef Py_ssize_t pixels = numbers_of(norm, 0, norm.ndim) // (N * channels)
    cdef int i
    cdef int order[MAX_NDIM]
    cdef Way way
    if all_contiguous(a, itemsize) and (norm.axis == 1 or pixels == 1):
        way = ONE_PIXEL if pixels == 1 and not a.copies else CHANNELS_FIRST
    else:
        if not walkable(norm, a, itemsize):
            return BLOCKS
        for i in range(norm.ndim):
            order[i] = i
        if pixels == 1 and contiguous_in(norm, a, itemsize, order):
            way = ONE_PIXEL
        else:
            moved_axes(norm, 1, order)
            way = CHANNELS_FIRST
            if not contiguous_in(norm, a, itemsize, order):
                moved_axes(norm, norm.ndim - 1, order)
                way = CHANNELS_LAST
                if not contiguous_in(norm, a, itemsize, order):
                    return BLOCKS
    c.channels, c.per_group = channels, channels // norm.groups
    if way == CHANNELS_FIRST:
        c.groups, c.rows, c.n = N * norm.groups, c.per_group, pixels
    elif way == CHANNELS_LAST:
        c.groups, c.rows, c.n = N, pixels, channels
    else:
        c.groups, c.rows, c.n = N, 1, c.per_group
    for i in range(a.count):
        if way == ONE_PIXEL:
            a.to[i][0] = nx_groups(a.of[i].data, channels, 0)
        else:
            a.to[i][0] = nx_groups(a.of[i].data, c.rows * c.n, c.n)
    return way


cdef Way layout(const nx_norm *norm, Arrays *a, Call *c) noexcept nogil:
    """How the arrays are walked together; fills in their sizes and places in the call."""
    if norm.kind == NORMEXT_BATCH_NORM:
        return batch_layout(norm, a, c)
    return group_layout(norm, a, c) if is_group_norm(norm) else row_layout(norm, a, c)


cdef void begin(const nx_norm *norm, const nx_io *io, Call *c) noexcept nogil:
    memset(c, 0, sizeof(Call))
    c.k = kernels_for(norm.type, False)  # for sizes; `choose` says which ones write the results
    c.gamma, c.beta = <const char *> io.gamma, <const char *> io.beta
    c.eps, c.relu = norm.eps, norm.relu
    c.mean, c.rstd, c.dgamma, c.dbeta = io.mean, io.rstd, io.dgamma, io.dbeta
    c.statistics = CENTRED if norm.training else GIVEN
    if norm.kind == NORMEXT_BATCH_NORM:
        c.parameters = PER_GROUP
    elif is_group_norm(norm):
        c.parameters = PER_ROW
    else:
        c.parameters = ALONG_ROW
        if norm.kind == NORMEXT_RMS_NORM:
            c.statistics = ABOUT_ZERO


cdef inline void choose(const nx_norm *norm, Call *c, Way way, int arrays, nx_groups read,
                        nx_groups written) noexcept nogil:
    """The kernels for a call that reads and writes so many arrays."""
    cdef Py_ssize_t numbers = numbers_of(norm, 0, norm.ndim), together = c.n, piece = c.rows * c.n
    cdef bint forth = arrays == 2
    # Pieces that a kernel writes as one run, where they follow each other; and tiles of short ones.
    if (way == LAYERS and written.group == c.n) or (way == CHANNELS_FIRST and forth):
        if piece <= c.k.short_group or (piece <= c.k.row_block and (piece >= PIECE or not forth)):
            together = numbers
    if way == CHANNELS_LAST and forth and are_runs(c):
        together = c.per_group
    elif (way == COLUMNS or way == CHANNELS_LAST) and written.row == c.n:
        together *= c.rows
    # Rows that are read once, and written at once in order, are as fast through the last cache as
    # they are around it, while it holds both.
    if way == ROWS and c.statistics == GIVEN:
        arrays //= 2
    c.k = norm_kernels(norm.type, arrays * numbers, together, read.data != written.data)
    if c.k != kernels_for(norm.type, False):
        if way == COLUMNS or way == CHANNELS_LAST:
            c.ahead = 1
        elif way != ONE_PIXEL:
            look_ahead(c, 1 if forth else 2)


cdef inline void step_to(nx_groups *a, Py_ssize_t bytes) noexcept nogil:
    if a.data != NULL:
        a.data = <char *> a.data + bytes


cdef int pixel_groups(const nx_norm *norm, const Call *c, bint back) noexcept nogil:
    """Group by group, as layer norm; the statistics lie (N, groups)."""
    cdef Call g = c[0]
    cdef Py_ssize_t group, i, at, N = c.groups
    cdef int status = NORMEXT_OK
    cdef double *work = <double *> malloc(2 * N * sizeof(double))
    if work == NULL:
        return NORMEXT_NO_MEMORY
    g.mean, g.rstd, g.parameters, g.count = work, work + N, ALONG_ROW, <double> c.n
    for group in range(norm.groups):
        if back:
            for i in range(N):
                at = i * norm.groups + group
                g.mean[i], g.rstd[i] = c.mean[at], c.rstd[at]
            status = layer_backward(&g)
            g.dgamma, g.dbeta = g.dgamma + c.n, g.dbeta + c.n
        else:
            status = normalize_rows(&g)
            for i in range(N):
                at = i * norm.groups + group
                c.mean[at], c.rstd[at] = g.mean[i], g.rstd[i]
        if status != NORMEXT_OK:
            break
        step_to(&g.x, c.n * c.k.itemsize)
        step_to(&g.y, c.n * c.k.itemsize)
        step_to(&g.dy, c.n * c.k.itemsize)
        step_to(&g.dx, c.n * c.k.itemsize)
        if g.gamma != NULL:
            g.gamma += c.n * c.k.parameter_size
        if g.beta != NULL:
            g.beta += c.n * c.k.parameter_size
    free(work)
    return status


cdef int walk_forward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil:
    """The way, and unless that is by blocks, mean, rstd, var and y (if it has data).

    Running statistics are not looked at here.
    """
    cdef Call c
    cdef Arrays a
    begin(norm, io, &c)
    a.count, a.copies, c.var = 0, w.copy, w.var
    add_array(&a, io.x, &c.x)
    add_array(&a, io.residual, &c.residual)
    if io.residual.data != NULL:
        add_array(&a, io.sum, &c.sum)
    add_array(&a, io.y, &c.y)
    w.way = layout(norm, &a, &c)
    if w.way == BLOCKS:
        return NORMEXT_OK
    choose(norm, &c, w.way, 2, c.sum if io.residual.data != NULL else c.x, c.y)
    if w.way == COLUMNS:
        return normalize_columns(&c)
    if w.way == ROWS and c.statistics == GIVEN:
        c.groups, c.rows = c.rows, c.groups
        c.x = nx_groups(c.x.data, c.x.row, c.x.group)
        c.y = nx_groups(c.y.data, c.y.row, c.y.group)
        return affine_rows(&c)
    if w.way == CHANNELS_LAST:
        return normalize_runs(&c) if are_runs(&c) else normalize_column_groups(&c)
    if w.way == ONE_PIXEL:
        return pixel_groups(norm, &c, False)
    return normalize_rows(&c) if io.residual.data == NULL else normalize_sums(&c)


cdef int walk_backward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil:
    """The way, and unless that is by blocks, dx and the sums.

    Those of batch norm are written to dbeta and, as dots, to dgamma, or are there already; those of
    the other norms are added to dbeta and dgamma.
    """
    cdef Call c
    cdef Arrays a
    begin(norm, io, &c)
    a.count, a.copies, c.pivots = 0, w.copy, w.pivots
    add_array(&a, io.x, &c.x)
    add_array(&a, io.dy, &c.dy)
    if io.part != NORMEXT_SUMS:
        add_array(&a, io.dx, &c.dx)
    add_array(&a, io.dsum, &c.addend)
    w.way = layout(norm, &a, &c)
    if w.way == BLOCKS:
        return NORMEXT_OK
    choose(norm, &c, w.way, 3, c.dy, c.dx)
    if norm.kind == NORMEXT_BATCH_NORM:
        c.sums, c.dots, c.given = io.dbeta, io.dgamma, io.part == NORMEXT_APPLY
        c.count = io.count
        return columns_backward(&c) if w.way == COLUMNS else rows_backward(&c)
    c.count = <double> c.n
    if w.way == CHANNELS_FIRST:
        return grouped_backward(&c)
    if w.way == CHANNELS_LAST:
        return column_groups_backward(&c)
    return pixel_groups(norm, &c, True) if w.way == ONE_PIXEL else layer_backward(&c)
