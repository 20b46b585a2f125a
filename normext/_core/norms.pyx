# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What a norm is, and how a call of it is run: the one door that all callers come through.

    check      what is wrong with a norm
    forward    running statistics, and which way:
    backward     walked where it lies    the arrays' axes become (group, row, n): `layout`;
                                         rows.pyx and columns.pyx have the loops
                 by copied blocks        what cannot be walked, and, backward, what float32 cannot
                                         carry: each block is walked where it was copied to

normext.h describes the arguments. Nothing here holds the GIL.
"""

from libc.math cimport fabs, frexp, ldexp
from libc.stdint cimport uintptr_t
from libc.stdio cimport fputs, snprintf, stderr
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from normext cimport (
    NORMEXT_APPLY,
    NORMEXT_BAD_ARGUMENT,
    NORMEXT_BAD_AXIS,
    NORMEXT_BAD_EPS,
    NORMEXT_BAD_GROUPS,
    NORMEXT_BAD_KIND,
    NORMEXT_BAD_SHAPE,
    NORMEXT_BAD_TYPE,
    NORMEXT_BATCH_NORM,
    NORMEXT_BFLOAT16,
    NORMEXT_FLOAT32,
    NORMEXT_FLOAT64,
    NORMEXT_GROUP_NORM,
    NORMEXT_LAYER_NORM,
    NORMEXT_MAX_NDIM,
    NORMEXT_NO_CHANNELS,
    NORMEXT_NO_MEMORY,
    NORMEXT_NO_NUMBERS,
    NORMEXT_OK,
    NORMEXT_RMS_NORM,
    NORMEXT_SUMS,
    NORMEXT_WHOLE,
    nx_array,
    nx_io,
    nx_norm,
    nx_running,
)
from normext._core.call cimport (
    ABOUT_ZERO,
    ALONG_ROW,
    CENTRED,
    GIVEN,
    PER_GROUP,
    PER_ROW,
    Call,
)
from normext._core.columns cimport (
    column_groups_backward,
    columns_backward,
    normalize_column_groups,
    normalize_columns,
)
from normext._core.kernels cimport (
    nx_any_outside,
    nx_block,
    nx_finish_moments,
    nx_groups,
    nx_inverse_stds,
    nx_kernels,
    nx_merge_share,
    nx_moments,
    nx_near,
    nx_rescale_columns,
    nx_rows,
)
from normext._core.rows cimport (
    affine_rows,
    grouped_backward,
    layer_backward,
    normalize_rows,
    normalize_sums,
    rows_backward,
)
from normext._core.runtime cimport isa_name, kernels_for, norm_kernels, threads_used, tracing

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int timespec_get(timespec *ts, int base)
    int TIME_UTC


# What a norm is ----------------------------------------------------------------------------------


cdef inline Py_ssize_t numbers_of(const nx_norm *norm, int first, int last) noexcept nogil:
    """How many there are along the axes first to last."""
    cdef Py_ssize_t product = 1
    cdef int i
    for i in range(first, last):
        product *= norm.shape[i]
    return product


cdef int check(const nx_norm *norm) noexcept nogil:
    cdef Py_ssize_t numbers = 1, channels
    cdef int i
    if not NORMEXT_BATCH_NORM <= norm.kind <= NORMEXT_RMS_NORM:
        return NORMEXT_BAD_KIND
    if not NORMEXT_FLOAT32 <= norm.type <= NORMEXT_BFLOAT16:
        return NORMEXT_BAD_TYPE
    if not 0 <= norm.ndim <= NORMEXT_MAX_NDIM or (norm.ndim > 0 and norm.shape == NULL):
        return NORMEXT_BAD_SHAPE
    if not 0 <= norm.axis < norm.ndim or (norm.kind == NORMEXT_GROUP_NORM and norm.axis == 0):
        return NORMEXT_BAD_AXIS
    for i in range(norm.ndim):
        if norm.shape[i] < 0 or (norm.shape[i] > 0 and numbers > (<Py_ssize_t> 1 << 59) // norm.shape[i]):
            return NORMEXT_BAD_SHAPE
        numbers *= max(<Py_ssize_t> 1, norm.shape[i])
    if not 0 <= norm.eps <= 1e300:
        return NORMEXT_BAD_EPS
    if norm.kind != NORMEXT_BATCH_NORM and (norm.relu or not norm.training):
        return NORMEXT_BAD_ARGUMENT
    numbers, channels = numbers_of(norm, 0, norm.ndim), norm.shape[norm.axis]
    if norm.kind == NORMEXT_BATCH_NORM:
        if channels == 0:
            return NORMEXT_NO_CHANNELS
        if norm.training and numbers == 0:
            return NORMEXT_NO_NUMBERS
    elif norm.kind == NORMEXT_GROUP_NORM:
        if norm.groups < 1 or channels % norm.groups:
            return NORMEXT_BAD_GROUPS
        if numbers == 0 and norm.shape[0] != 0:
            return NORMEXT_NO_NUMBERS
    elif numbers_of(norm, norm.axis, norm.ndim) == 0:
        return NORMEXT_NO_NUMBERS
    return NORMEXT_OK


cdef inline bint is_row_norm(const nx_norm *norm) noexcept nogil:
    return norm.kind == NORMEXT_LAYER_NORM or norm.kind == NORMEXT_RMS_NORM


cdef inline Py_ssize_t statistics_of(const nx_norm *norm) noexcept nogil:
    """How many there are."""
    if norm.kind == NORMEXT_BATCH_NORM:
        return norm.shape[norm.axis]
    if norm.kind == NORMEXT_GROUP_NORM:
        return norm.shape[0] * norm.groups
    return numbers_of(norm, 0, norm.axis)


cdef inline Py_ssize_t parameters_of(const nx_norm *norm) noexcept nogil:
    """How many numbers gamma and beta have."""
    if is_row_norm(norm):
        return numbers_of(norm, norm.axis, norm.ndim)
    return norm.shape[norm.axis]


# Running statistics ------------------------------------------------------------------------------


cdef void read_statistic(const void *s, bint single, Py_ssize_t n, double *to) noexcept nogil:
    cdef Py_ssize_t i
    if single:
        for i in range(n):
            to[i] = (<const float *> s)[i]
    else:
        memcpy(to, s, n * sizeof(double))


cdef void update_statistic(void *s, bint single, Py_ssize_t n, double momentum, double share,
                           const double *batch) noexcept nogil:
    """``momentum * s + share * batch``; nothing where there is no s."""
    cdef Py_ssize_t i
    if s == NULL:
        return
    if single:
        for i in range(n):
            (<float *> s)[i] = <float> (momentum * (<float *> s)[i] + share * batch[i])
    else:
        for i in range(n):
            (<double *> s)[i] = momentum * (<double *> s)[i] + share * batch[i]


cdef void update_running(const nx_norm *norm, const nx_running *running, const double *mean,
                         const double *var) noexcept nogil:
    """From the batch's mean and biased variance."""
    cdef Py_ssize_t channels = norm.shape[norm.axis], numbers = numbers_of(norm, 0, norm.ndim)
    cdef double share = 1 - running.momentum, correction = 1
    if running.unbiased:
        correction = <double> numbers / (numbers - channels)
    update_statistic(running.mean, running.single_mean, channels, running.momentum, share, mean)
    update_statistic(running.var, running.single_var, channels, running.momentum, share * correction,
                     var)


# Where arrays can be walked ----------------------------------------------------------------------

# How the loops go through the arrays of a call. Of ONE_PIXEL, a group is a row, as for layer norm.
cdef enum Way:
    ROWS
    COLUMNS
    LAYERS
    CHANNELS_FIRST
    CHANNELS_LAST
    ONE_PIXEL
    BLOCKS
    NOTHING

cdef enum:
    MAX_NDIM = 64  # NORMEXT_MAX_NDIM
    MAX_ARRAYS = 4

# The arrays that a call walks together, and where their place in it is to be noted.
cdef struct Arrays:
    int count
    bint copies  # of a block
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


cdef inline Py_ssize_t distance(Py_ssize_t stride) noexcept nogil:
    return -stride if stride < 0 else stride


cdef void sort_by_stride(const nx_norm *norm, const Py_ssize_t *strides, int *axes,
                         int count) noexcept nogil:
    """The axes with the largest strides first; of equals, the first."""
    cdef int i, j, axis
    for i in range(1, count):
        axis, j = axes[i], i
        while j > 0 and distance(strides[axes[j - 1]]) < distance(strides[axis]):
            axes[j] = axes[j - 1]
            j -= 1
        axes[j] = axis


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
        sort_by_stride(norm, a.strides[0], axes, count)
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
    return COLUMNS if by_columns else ROWS


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
    """Examples of groups of channels, with the channels first or last.

    The copy of a block has them first, whatever the number of pixels.
    """
    cdef Py_ssize_t itemsize = c.k.itemsize, N = norm.shape[0], channels = norm.shape[norm.axis]
    cdef Py_ssize_t pixels = numbers_of(norm, 0, norm.ndim) // (N * channels)
    cdef int i
    cdef int order[MAX_NDIM]
    cdef Way way = BLOCKS
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
        if way == CHANNELS_FIRST:
            a.to[i][0] = nx_groups(a.of[i].data, c.rows * c.n, c.n)
        elif way == CHANNELS_LAST:
            a.to[i][0] = nx_groups(a.of[i].data, c.rows * c.n, c.n)
        else:
            a.to[i][0] = nx_groups(a.of[i].data, channels, 0)
    return way


cdef Way layout(const nx_norm *norm, Arrays *a, Call *c) noexcept nogil:
    """How the arrays are walked together; fills in their sizes and places in the call."""
    if norm.kind == NORMEXT_BATCH_NORM:
        return batch_layout(norm, a, c)
    return group_layout(norm, a, c) if norm.kind == NORMEXT_GROUP_NORM else row_layout(norm, a, c)


cdef void begin(const nx_norm *norm, const nx_io *io, Call *c) noexcept nogil:
    memset(c, 0, sizeof(Call))
    c.k = kernels_for(norm.type, False)  # for its sizes; which one writes the results, `choose` says
    c.eps, c.relu, c.gamma, c.beta = norm.eps, norm.relu, <const char *> io.gamma, <const char *> io.beta
    c.mean, c.rstd, c.dgamma, c.dbeta = io.mean, io.rstd, io.dgamma, io.dbeta
    c.statistics = CENTRED if norm.training else GIVEN
    if norm.kind == NORMEXT_BATCH_NORM:
        c.parameters = PER_GROUP
    elif norm.kind == NORMEXT_GROUP_NORM:
        c.parameters = PER_ROW
    else:
        c.parameters = ALONG_ROW
        if norm.kind == NORMEXT_RMS_NORM:
            c.statistics = ABOUT_ZERO


cdef inline void choose(const nx_norm *norm, Call *c, const void *read,
                        const void *written) noexcept nogil:
    c.k = norm_kernels(norm.type, numbers_of(norm, 0, norm.ndim), c.n, read, written)


cdef inline void step_to(nx_groups *a, Py_ssize_t bytes) noexcept nogil:
    if a.data != NULL:
        a.data = <char *> a.data + bytes


cdef int pixel_groups(const nx_norm *norm, const Call *c, bint back) noexcept nogil:
    """Group by group, as layer norm; the statistics lie (N, groups)."""
    cdef Call g = c[0]
    cdef Py_ssize_t group, i, N = c.groups
    cdef int status = NORMEXT_OK
    cdef double *work = <double *> malloc(2 * N * sizeof(double))
    if work == NULL:
        return NORMEXT_NO_MEMORY
    g.mean, g.rstd, g.parameters, g.count = work, work + N, ALONG_ROW, <double> c.n
    for group in range(norm.groups):
        if back:
            for i in range(N):
                g.mean[i], g.rstd[i] = c.mean[i * norm.groups + group], c.rstd[i * norm.groups + group]
            status = layer_backward(&g)
            g.dgamma, g.dbeta = g.dgamma + c.n, g.dbeta + c.n
        else:
            status = normalize_rows(&g)
            for i in range(N):
                c.mean[i * norm.groups + group], c.rstd[i * norm.groups + group] = g.mean[i], g.rstd[i]
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


cdef int walk_forward(const nx_norm *norm, const nx_io *io, double *var, Way *way) noexcept nogil:
    """The way, and unless that is by blocks, mean, rstd, var (may be NULL) and y (if it has data).

    Running statistics are not looked at here. `way` says by BLOCKS where it is the copy of a block
    that is to be walked.
    """
    cdef Call c
    cdef Arrays a
    begin(norm, io, &c)
    a.count, a.copies, c.var = 0, way[0] == BLOCKS, var
    add_array(&a, io.x, &c.x)
    add_array(&a, io.residual, &c.residual)
    if io.residual.data != NULL:
        add_array(&a, io.sum, &c.sum)
    add_array(&a, io.y, &c.y)
    way[0] = layout(norm, &a, &c)
    if way[0] == BLOCKS:
        return NORMEXT_OK
    choose(norm, &c, NULL if io.residual.data != NULL else c.x.data, c.y.data)
    if way[0] == COLUMNS:
        return normalize_columns(&c)
    if way[0] == ROWS and c.statistics == GIVEN:
        c.groups, c.rows = c.rows, c.groups
        c.x = nx_groups(c.x.data, c.x.row, c.x.group)
        c.y = nx_groups(c.y.data, c.y.row, c.y.group)
        return affine_rows(&c)
    if way[0] == CHANNELS_LAST:
        return normalize_column_groups(&c)
    if way[0] == ONE_PIXEL:
        return pixel_groups(norm, &c, False)
    return normalize_rows(&c) if io.residual.data == NULL else normalize_sums(&c)


cdef int walk_backward(const nx_norm *norm, const nx_io *io, const double *pivots,
                       Way *way) noexcept nogil:
    """The way, and unless that is by blocks, dx and the sums.

    Those of batch norm are written to dbeta and, as dots, to dgamma, or are there already; those of
    the other norms are added to dbeta and dgamma. `pivots` (may be NULL) are batch norm's.
    """
    cdef Call c
    cdef Arrays a
    begin(norm, io, &c)
    a.count, a.copies, c.pivots = 0, way[0] == BLOCKS, pivots
    add_array(&a, io.x, &c.x)
    add_array(&a, io.dy, &c.dy)
    if io.part != NORMEXT_SUMS:
        add_array(&a, io.dx, &c.dx)
    add_array(&a, io.dsum, &c.addend)
    way[0] = layout(norm, &a, &c)
    if way[0] == BLOCKS:
        return NORMEXT_OK
    choose(norm, &c, c.dy.data, c.dx.data)
    if norm.kind == NORMEXT_BATCH_NORM:
        c.sums, c.dots, c.given = io.dbeta, io.dgamma, io.part == NORMEXT_APPLY
        c.count = io.count
        return columns_backward(&c) if way[0] == COLUMNS else rows_backward(&c)
    c.count = <double> c.n
    if way[0] == CHANNELS_FIRST:
        return grouped_backward(&c)
    if way[0] == CHANNELS_LAST:
        return column_groups_backward(&c)
    return pixel_groups(norm, &c, True) if way[0] == ONE_PIXEL else layer_backward(&c)


# By copied blocks --------------------------------------------------------------------------------

cdef enum:
    BLOCK = 1 << 15  # elements copied at a time: they stay in the second-level cache

# The arrays of a detour.
cdef enum:
    X
    Y  # or dx
    DY
    OTHER  # the residual, or dsum

# An array as copies are made of it, cut along some of its axes.
cdef struct Detour:
    nx_norm norm  # with the axes in the order that copies have, and the shape of a block
    Py_ssize_t itemsize
    Py_ssize_t shape[MAX_NDIM]
    nx_array of[MAX_ARRAYS]
    Py_ssize_t strides[MAX_ARRAYS][MAX_NDIM]
    int cuts
    int cut[MAX_NDIM]  # the axes that are cut, the outermost of the loops first
    Py_ssize_t step[MAX_NDIM]
    Py_ssize_t start[MAX_NDIM]  # of the block
    Py_ssize_t length[MAX_NDIM]
    char *raw[MAX_ARRAYS]  # copies, of the arrays' type
    double *wide[MAX_ARRAYS]  # the same as double


cdef void set_array(const nx_norm *norm, Detour *d, int which, nx_array array,
                    const int *order) noexcept nogil:
    cdef Py_ssize_t strides[MAX_NDIM]
    cdef int i
    d.of[which] = array
    fill_strides(norm, d.itemsize, array.strides, strides)
    for i in range(norm.ndim):
        d.strides[which][i] = strides[order[i]]


cdef int start_detour(const nx_norm *norm, Detour *d) noexcept nogil:
    """The cut: along which axes, and in what steps. Memory for copies of all arrays."""
    cdef int order[MAX_NDIM]
    cdef int i, j, axis, last
    cdef Py_ssize_t size = numbers_of(norm, 0, norm.ndim), most = 1
    cdef char *memory
    for i in range(norm.ndim):
        order[i] = i
    if norm.kind == NORMEXT_GROUP_NORM:
        moved_axes(norm, 1, order)
    d.norm, d.itemsize = norm[0], kernels_for(norm.type, False).itemsize
    d.norm.shape, d.norm.axis = &d.length[0], 1 if norm.kind == NORMEXT_GROUP_NORM else norm.axis
    for i in range(MAX_ARRAYS):
        if d.of[i].data != NULL:
            set_array(norm, d, i, d.of[i], order)
    # Statistics along the axes that are not cut are of one block.
    if norm.kind == NORMEXT_BATCH_NORM:
        last = norm.ndim
    else:
        last = 1 if norm.kind == NORMEXT_GROUP_NORM else norm.axis
    d.cuts = last
    for i in range(norm.ndim):
        d.shape[i] = d.step[i] = norm.shape[order[i]]
    for i in range(last):  # the longest first; of equals, the first
        axis, j = i, i
        while j > 0 and d.shape[d.cut[j - 1]] < d.shape[axis]:
            d.cut[j] = d.cut[j - 1]
            j -= 1
        d.cut[j] = axis
    for i in range(d.cuts):
        axis = d.cut[i]
        if size <= BLOCK:
            break
        d.step[axis] = max(<Py_ssize_t> 1, d.shape[axis] * BLOCK // size)
        size = size // d.shape[axis] * d.step[axis]
    for i in range(norm.ndim):
        d.start[i], d.length[i] = 0, d.step[i]
        most *= d.step[i]
    memory = <char *> malloc(most * MAX_ARRAYS * (d.itemsize + sizeof(double)) + 1)
    if memory == NULL:
        return NORMEXT_NO_MEMORY
    for i in range(MAX_ARRAYS):
        d.wide[i] = <double *> memory + i * most
        d.raw[i] = memory + MAX_ARRAYS * most * sizeof(double) + i * most * d.itemsize
    return NORMEXT_OK


cdef void end_detour(Detour *d) noexcept nogil:
    free(d.wide[0])


cdef void first_block(Detour *d) noexcept nogil:
    cdef int i
    for i in range(d.norm.ndim):
        d.start[i], d.length[i] = 0, min(d.step[i], d.shape[i])


cdef bint next_block(Detour *d) noexcept nogil:
    """False after the last."""
    cdef int i, axis
    for i in range(d.cuts - 1, -1, -1):
        axis = d.cut[i]
        d.start[axis] += d.step[axis]
        if d.start[axis] < d.shape[axis]:
            d.length[axis] = min(d.step[axis], d.shape[axis] - d.start[axis])
            return True
        d.start[axis], d.length[axis] = 0, min(d.step[axis], d.shape[axis])
    return False


cdef inline Py_ssize_t block_numbers(const Detour *d) noexcept nogil:
    return numbers_of(&d.norm, 0, d.norm.ndim)


cdef void copy_numbers(char *to, Py_ssize_t to_step, const char *source, Py_ssize_t step, Py_ssize_t n,
                       int itemsize, bint swapped) noexcept nogil:
    cdef Py_ssize_t i
    cdef int b
    if swapped:
        for i in range(n):
            for b in range(itemsize):
                to[i * to_step + b] = source[i * step + itemsize - 1 - b]
    elif step == itemsize and to_step == itemsize:
        memcpy(to, source, n * itemsize)
    elif itemsize == 2:
        for i in range(n):
            memcpy(to + i * to_step, source + i * step, 2)
    elif itemsize == 4:
        for i in range(n):
            memcpy(to + i * to_step, source + i * step, 4)
    else:
        for i in range(n):
            memcpy(to + i * to_step, source + i * step, 8)


cdef void copy_block(const Detour *d, int which, bint back) noexcept nogil:
    """The block of an array into its copy, or back.

    The innermost loop goes along the axis on which the array's numbers lie closest.
    """
    cdef const Py_ssize_t *strides = d.strides[which]
    cdef Py_ssize_t packed[MAX_NDIM]
    cdef Py_ssize_t index[MAX_NDIM]
    cdef Py_ssize_t step = d.itemsize
    cdef int i, ndim = d.norm.ndim, fast = ndim - 1
    cdef char *there = <char *> d.of[which].data
    cdef char *here = d.raw[which]
    for i in range(ndim - 1, -1, -1):
        packed[i], index[i] = step, 0
        step *= d.length[i]
        there += d.start[i] * strides[i]
        if d.length[i] > 1 and (d.length[fast] == 1 or distance(strides[i]) < distance(strides[fast])):
            fast = i
    while True:
        if back:
            copy_numbers(there, strides[fast], here, packed[fast], d.length[fast], d.itemsize,
                         d.of[which].swapped)
        else:
            copy_numbers(here, packed[fast], there, strides[fast], d.length[fast], d.itemsize,
                         d.of[which].swapped)
        for i in range(ndim - 1, -1, -1):
            if i == fast:
                continue
            index[i] += 1
            there += strides[i]
            here += packed[i]
            if index[i] < d.length[i]:
                break
            there -= d.length[i] * strides[i]
            here -= d.length[i] * packed[i]
            index[i] = 0
        else:
            return


cdef void copy_statistics(const Detour *d, double *all, double *part, bint back) noexcept nogil:
    """A block's statistics out of those of all, or back: contiguous both, in the axes that are cut."""
    cdef Py_ssize_t index[MAX_NDIM]
    cdef Py_ssize_t at, axis_at, channels
    cdef int i
    if d.norm.kind == NORMEXT_BATCH_NORM:
        at, channels = d.start[d.norm.axis], d.length[d.norm.axis]
        memcpy(all + at if back else part, part if back else all + at, channels * sizeof(double))
        return
    if d.norm.kind == NORMEXT_GROUP_NORM:
        at, channels = d.start[0] * d.norm.groups, d.length[0] * d.norm.groups
        memcpy(all + at if back else part, part if back else all + at, channels * sizeof(double))
        return
    for i in range(d.norm.axis):
        index[i] = 0
    while True:
        at = axis_at = 0
        for i in range(d.norm.axis):
            at = at * d.shape[i] + d.start[i] + index[i]
            axis_at = axis_at * d.length[i] + index[i]
        if back:
            all[at] = part[axis_at]
        else:
            part[axis_at] = all[at]
        for i in range(d.norm.axis - 1, -1, -1):
            index[i] += 1
            if index[i] < d.length[i]:
                break
            index[i] = 0
        else:
            return


cdef void multiply(const Detour *d, double *numbers, const double *scale) noexcept nogil:
    """A block's numbers by their statistics' scales."""
    cdef Py_ssize_t i, j, statistics = statistics_of(&d.norm), together
    if d.norm.kind == NORMEXT_BATCH_NORM:
        together = numbers_of(&d.norm, d.norm.axis + 1, d.norm.ndim)
    else:
        together = block_numbers(d) // statistics
    for i in range(block_numbers(d) // together):
        for j in range(i * together, (i + 1) * together):
            numbers[j] *= scale[i % statistics]


cdef inline const char *block_parameter(const Detour *d, const void *p, Py_ssize_t size) noexcept nogil:
    """Those of the block's channels."""
    if p == NULL or d.norm.kind != NORMEXT_BATCH_NORM:
        return <const char *> p
    return <const char *> p + d.start[d.norm.axis] * size


cdef int add_by_blocks(const nx_norm *norm, const nx_io *io) noexcept nogil:
    """sum = x + residual"""
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Detour d
    cdef int status
    memset(d.of, 0, sizeof(d.of))
    d.of[X], d.of[OTHER], d.of[Y] = io.x, io.residual, io.sum
    status = start_detour(norm, &d)
    if status != NORMEXT_OK:
        return status
    first_block(&d)
    while True:
        copy_block(&d, X, False)
        copy_block(&d, OTHER, False)
        k.add_rows(nx_rows(d.raw[X], 0), nx_rows(d.raw[OTHER], 0), nx_rows(d.raw[Y], 0),
                   nx_block(1, block_numbers(&d)))
        copy_block(&d, Y, True)
        if not next_block(&d):
            break
    end_detour(&d)
    return NORMEXT_OK


cdef int block_moments(Detour *d, const double *scale, nx_io *part, double *var) noexcept nogil:
    """Mean and variance of a block's channels, of numbers times `scale`, NULL for 1."""
    cdef nx_norm norm = d.norm
    cdef Py_ssize_t n = block_numbers(d)
    cdef Way way = BLOCKS
    copy_block(d, X, False)
    if scale != NULL:  # which the type that is computed in can carry
        kernels_for(norm.type, False).widen(d.raw[X], n, d.wide[X])
        multiply(d, d.wide[X], scale + d.start[norm.axis])
        if norm.type != NORMEXT_FLOAT64:
            norm.type = NORMEXT_FLOAT32
            kernels_for(norm.type, False).narrow(d.wide[X], n, d.wide[Y])
            part.x.data = d.wide[Y]
        else:
            part.x.data = d.wide[X]
    else:
        part.x.data = d.raw[X]
    return walk_forward(&norm, part, var, &way)


cdef int moments_by_blocks(const nx_norm *norm, const nx_io *io, Detour *d, double *var) noexcept nogil:
    """Each channel's mean, rstd and var of batch norm."""
    cdef Py_ssize_t channels = norm.shape[norm.axis], j, c, n
    cdef double count = <double> (numbers_of(norm, 0, norm.ndim) // channels), total
    cdef double *work = <double *> malloc(6 * channels * sizeof(double))
    cdef double *m2 = work
    cdef double *seen = m2 + channels
    cdef double *scale = seen + channels
    cdef double *scales = NULL
    cdef double *mean = scale + channels  # of a block, as rstd and var are
    cdef nx_io part
    cdef int status = NORMEXT_OK, attempt
    if work == NULL:
        return NORMEXT_NO_MEMORY
    memset(&part, 0, sizeof(nx_io))
    part.mean, part.rstd = mean, mean + channels
    d.norm.training, d.norm.relu = True, False
    for attempt in range(2):  # the second with scales that the first has found
        for c in range(channels):
            io.mean[c] = m2[c] = seen[c] = 0
        first_block(d)
        while True:
            status = block_moments(d, scales, &part, mean + 2 * channels)
            if status != NORMEXT_OK:
                break
            n = block_numbers(d) // d.length[norm.axis]
            for j in range(d.length[norm.axis]):
                c = d.start[norm.axis] + j
                total = seen[c] + n
                if seen[c] == 0:
                    io.mean[c] = mean[j]
                nx_merge_share(io.mean + c, m2 + c, mean[j], n * mean[2 * channels + j], seen[c], n / total)
                seen[c] = total
            if not next_block(d):
                break
        if status != NORMEXT_OK or attempt == 1 or not nx_rescale_columns(
                &kernels_for(norm.type, False).range, channels, count, io.mean, m2, scale):
            break
        scales = scale
    if status == NORMEXT_OK:
        for c in range(channels):
            nx_finish_moments(nx_moments(count, io.mean[c], m2[c]), 1 if scales == NULL else scales[c],
                              norm.eps, io.mean + c, io.rstd + c, NULL if var == NULL else var + c)
    free(work)
    return status


cdef int forward_by_blocks(const nx_norm *norm, const nx_io *io, double *var) noexcept nogil:
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Detour d
    cdef nx_io part
    cdef Way way = BLOCKS
    cdef Py_ssize_t most
    cdef int status
    cdef double *statistics = NULL  # of a block
    memset(d.of, 0, sizeof(d.of))
    d.of[X], d.of[Y] = io.x, io.y
    status = start_detour(norm, &d)
    if status != NORMEXT_OK:
        return status
    most = statistics_of(&d.norm)
    if norm.kind == NORMEXT_BATCH_NORM:
        if norm.training:
            status = moments_by_blocks(norm, io, &d, var)
        d.norm.training, d.norm.relu = False, norm.relu
    if status == NORMEXT_OK and io.y.data != NULL:
        memset(&part, 0, sizeof(nx_io))
        statistics = <double *> malloc(2 * most * sizeof(double))
        part.mean, part.rstd, part.x.data, part.y.data = statistics, statistics + most, d.raw[X], d.raw[Y]
        if statistics == NULL:
            status = NORMEXT_NO_MEMORY
        first_block(&d)
        while status == NORMEXT_OK:
            copy_block(&d, X, False)
            copy_statistics(&d, io.mean, part.mean, False)
            copy_statistics(&d, io.rstd, part.rstd, False)
            part.gamma = block_parameter(&d, io.gamma, k.parameter_size)
            part.beta = block_parameter(&d, io.beta, k.parameter_size)
            way = BLOCKS
            status = walk_forward(&d.norm, &part, NULL, &way)
            copy_statistics(&d, io.mean, part.mean, True)
            copy_statistics(&d, io.rstd, part.rstd, True)
            copy_block(&d, Y, True)
            if not next_block(&d):
                break
        free(statistics)
    end_detour(&d)
    return status


cdef bint find_far_pivots(const nx_norm *norm, const nx_io *io, const double *sums,
                          double *pivots) noexcept nogil:
    """Whether gradients of any channel are far from zero, by some of them, and pivots for all."""
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Py_ssize_t strides[MAX_NDIM]
    cdef Py_ssize_t c
    cdef const char *p
    cdef char number[8]
    cdef double dy, mean
    cdef int i, axis
    cdef bint far, any = False
    fill_strides(norm, k.itemsize, io.dy.strides, strides)
    for c in range(norm.shape[norm.axis]):
        mean, far = sums[c] / io.count, True
        for i in range(1, 8, 2):
            p = <const char *> io.dy.data + c * strides[norm.axis]
            for axis in range(norm.ndim):
                if axis != norm.axis:
                    p += i * norm.shape[axis] // 8 * strides[axis]
            copy_numbers(number, k.itemsize, p, k.itemsize, 1, k.itemsize, io.dy.swapped)
            k.widen(number, 1, &dy)
            far = far and nx_near(dy, mean)
        pivots[c] = mean if far else 0
        any = any or far
    return any


# What a backward pass that goes by blocks has for all of them. Where deviations are out of range,
# x is multiplied by powers of two, and mean, rstd and gamma are those that then fit, as double.
cdef struct Scaled:
    double *scale  # NULL where there are none
    double *mean
    double *rstd
    double *gamma
    double *pivots  # batch norm's
    double *work  # of a block: mean, rstd, scale, and batch norm's two sums


cdef double scale_for(double rstd) noexcept nogil:
    """The power of two that brings deviations with that rstd near 1."""
    cdef int exponent = 0
    frexp(rstd if rstd > 0 else 1, &exponent)
    return ldexp(1.0, min(1000, max(-1000, exponent)))


cdef int start_scaled(const nx_norm *norm, const nx_io *io, bint wide, Scaled *s) noexcept nogil:
    cdef Py_ssize_t i, n = statistics_of(norm), parameters = parameters_of(norm)
    cdef double *memory = <double *> malloc((9 * n + parameters) * sizeof(double))
    if memory == NULL:
        return NORMEXT_NO_MEMORY
    s.pivots, s.work, s.mean, s.rstd = memory, memory + n, io.mean, io.rstd
    s.scale = s.gamma = NULL
    if wide:
        s.scale, s.mean, s.rstd = memory + 6 * n, memory + 7 * n, memory + 8 * n
        for i in range(n):
            s.scale[i] = scale_for(io.rstd[i])
            s.mean[i], s.rstd[i] = io.mean[i] * s.scale[i], io.rstd[i] / s.scale[i]
        if io.gamma != NULL:
            s.gamma = memory + 9 * n
            kernels_for(NORMEXT_FLOAT64 if norm.type == NORMEXT_FLOAT64 else NORMEXT_FLOAT32, False).widen(
                io.gamma, parameters, s.gamma)
    return NORMEXT_OK


cdef int mask_block(const Detour *d, const nx_io *io, double *work) noexcept nogil:
    """Set dy to 0 where the relu's result, found again as in the forward pass, is not above 0."""
    cdef const nx_kernels *k = kernels_for(d.norm.type, False)
    cdef nx_norm norm = d.norm
    cdef nx_io part
    cdef Way way = BLOCKS
    cdef Py_ssize_t i
    cdef int status
    memset(&part, 0, sizeof(nx_io))
    norm.training, norm.relu = False, True
    part.x.data, part.y.data = d.raw[X], d.raw[Y]
    part.mean, part.rstd = work, work + d.length[norm.axis]
    copy_statistics(d, io.mean, part.mean, False)
    copy_statistics(d, io.rstd, part.rstd, False)
    part.gamma = block_parameter(d, io.gamma, k.parameter_size)
    part.beta = block_parameter(d, io.beta, k.parameter_size)
    way = BLOCKS
    status = walk_forward(&norm, &part, NULL, &way)
    if status == NORMEXT_OK:
        k.widen(d.raw[Y], block_numbers(d), d.wide[Y])
        for i in range(block_numbers(d)):
            if d.wide[Y][i] <= 0:
                memset(d.raw[DY] + i * d.itemsize, 0, d.itemsize)
    return status


cdef int load_block(Detour *d, const nx_io *io, const Scaled *s, nx_norm *norm, nx_io *part) noexcept nogil:
    """Copies of a block of x, dy and dsum, and the norm and call that are to be walked with them."""
    cdef const nx_kernels *k = kernels_for(d.norm.type, False)
    cdef Py_ssize_t n = block_numbers(d), statistics = statistics_of(&d.norm)
    cdef double *scale = s.work + 2 * statistics
    cdef int status = NORMEXT_OK
    norm[0] = d.norm
    copy_block(d, X, False)
    copy_block(d, DY, False)
    if d.of[OTHER].data != NULL:
        copy_block(d, OTHER, False)
    if norm.relu:
        status = mask_block(d, io, s.work)
        norm.relu = False
    if s.scale == NULL:
        part.x.data, part.dy.data, part.dx.data = d.raw[X], d.raw[DY], d.raw[Y]
        part.dsum.data = NULL if d.of[OTHER].data == NULL else d.raw[OTHER]
        part.gamma = block_parameter(d, io.gamma, k.parameter_size)
    else:
        copy_statistics(d, s.scale, scale, False)
        k.widen(d.raw[DY], n, d.wide[DY])
        k.widen(d.raw[X], n, d.wide[X])
        multiply(d, d.wide[X], scale)
        norm.type = NORMEXT_FLOAT64
        part.x.data, part.dy.data, part.dx.data = d.wide[X], d.wide[DY], d.wide[Y]
        part.gamma = block_parameter(d, s.gamma, sizeof(double))
    part.mean, part.rstd = s.work, s.work + statistics
    copy_statistics(d, s.mean, part.mean, False)
    copy_statistics(d, s.rstd, part.rstd, False)
    return status


cdef void store_block(Detour *d, const Scaled *s) noexcept nogil:
    cdef const nx_kernels *k = kernels_for(d.norm.type, False)
    cdef Py_ssize_t i, n = block_numbers(d)
    if s.scale != NULL:
        multiply(d, d.wide[Y], s.work + 2 * statistics_of(&d.norm))
        if d.of[OTHER].data != NULL:
            k.widen(d.raw[OTHER], n, d.wide[OTHER])
            for i in range(n):
                d.wide[Y][i] += d.wide[OTHER][i]
        k.narrow(d.wide[Y], n, d.raw[Y])
    copy_block(d, Y, True)


cdef int sum_blocks(Detour *d, const nx_io *io, const Scaled *s, const double *pivots) noexcept nogil:
    """Batch norm's sums, and dots of x as it is scaled, into dbeta and dgamma."""
    cdef Py_ssize_t j, c, axis = d.norm.axis
    cdef nx_norm norm
    cdef nx_io part = io[0]
    cdef Way way = BLOCKS
    cdef int status
    cdef double *sums = s.work + 3 * d.shape[axis]
    for c in range(d.shape[axis]):
        io.dbeta[c] = io.dgamma[c] = 0
    part = as_contiguous(io)
    part.part, part.dbeta, part.dgamma = NORMEXT_SUMS, sums, sums + d.shape[axis]
    first_block(d)
    while True:
        status = load_block(d, io, s, &norm, &part)
        if status == NORMEXT_OK:
            way = BLOCKS
            status = walk_backward(&norm, &part, NULL if pivots == NULL else pivots + d.start[axis], &way)
        if status != NORMEXT_OK:
            return status
        for j in range(d.length[axis]):
            io.dbeta[d.start[axis] + j] += part.dbeta[j]
            io.dgamma[d.start[axis] + j] += part.dgamma[j]
        if not next_block(d):
            return NORMEXT_OK


cdef inline nx_io as_contiguous(const nx_io *io) noexcept nogil:
    """A call's pointers and numbers for the walk of a block: its arrays are contiguous."""
    cdef nx_io part = io[0]
    part.x.strides = part.dy.strides = part.dx.strides = part.dsum.strides = NULL
    part.x.swapped = part.dy.swapped = part.dx.swapped = part.dsum.swapped = False
    part.dsum.data = NULL
    return part


cdef int dx_blocks(Detour *d, const nx_io *io, const Scaled *s) noexcept nogil:
    """dx, and the sums of all norms but batch norm, whose are given."""
    cdef nx_norm norm
    cdef nx_io part = as_contiguous(io)
    cdef Way way = BLOCKS
    cdef int status
    cdef Py_ssize_t c
    part.part = NORMEXT_APPLY
    first_block(d)
    while True:
        status = load_block(d, io, s, &norm, &part)
        if status == NORMEXT_OK:
            if norm.kind == NORMEXT_BATCH_NORM:
                c = d.start[norm.axis]
                part.dbeta, part.dgamma = io.dbeta + c, io.dgamma + c
            way = BLOCKS
            status = walk_backward(&norm, &part, NULL, &way)
        if status != NORMEXT_OK:
            return status
        store_block(d, s)
        if not next_block(d):
            return NORMEXT_OK


cdef int batch_by_blocks(const nx_norm *norm, const nx_io *io, Detour *d, Scaled *s) noexcept nogil:
    """All sums first, then dx; or one of both."""
    cdef Py_ssize_t c, channels = norm.shape[norm.axis]
    cdef int status = NORMEXT_OK
    cdef nx_io given
    if io.part != NORMEXT_APPLY:
        status = sum_blocks(d, io, s, NULL)
        if status == NORMEXT_OK and io.part == NORMEXT_WHOLE and norm.training and find_far_pivots(
                norm, io, io.dbeta, s.pivots):
            status = sum_blocks(d, io, s, s.pivots)
    if status == NORMEXT_OK and io.part != NORMEXT_SUMS:
        given = io[0]
        if io.part == NORMEXT_APPLY and s.scale != NULL:
            given.dgamma = s.pivots  # not used otherwise
            for c in range(channels):
                given.dgamma[c] = io.dgamma[c] * s.scale[c]
        status = dx_blocks(d, &given, s)
    if s.scale != NULL and io.part != NORMEXT_APPLY:
        for c in range(channels):
            io.dgamma[c] = io.dgamma[c] * s.rstd[c] if io.part == NORMEXT_WHOLE else io.dgamma[c] / s.scale[c]
    return status


cdef int backward_by_blocks(const nx_norm *norm, const nx_io *io, bint wide) noexcept nogil:
    cdef Detour d
    cdef Scaled s
    cdef int status
    memset(d.of, 0, sizeof(d.of))
    d.of[X], d.of[DY], d.of[OTHER] = io.x, io.dy, io.dsum
    if io.part != NORMEXT_SUMS:
        d.of[Y] = io.dx
    status = start_detour(norm, &d)
    if status != NORMEXT_OK:
        return status
    status = start_scaled(norm, io, wide, &s)
    if status == NORMEXT_OK:
        if norm.kind == NORMEXT_BATCH_NORM:
            status = batch_by_blocks(norm, io, &d, &s)
        else:
            status = dx_blocks(&d, io, &s)
        free(s.pivots)
    end_detour(&d)
    return status


# The door ----------------------------------------------------------------------------------------


cdef double milliseconds() noexcept nogil:
    cdef timespec t
    timespec_get(&t, TIME_UTC)
    return 1e3 * t.tv_sec + 1e-6 * t.tv_nsec


cdef const char *way_name(Way way, bint wide) noexcept nogil:
    if way == ROWS or way == CHANNELS_FIRST:
        return "along rows"
    if way == COLUMNS or way == CHANNELS_LAST:
        return "down columns"
    if way == LAYERS or way == ONE_PIXEL:
        return "row by row"
    if way == BLOCKS:
        return "by blocks copied to float64" if wide else "by copied blocks"
    return "nothing to do"


cdef void trace(const nx_norm *norm, const char *what, const char *way, double began) noexcept nogil:
    """A line about a call, for whoever wants to know which way it went (docs/architecture.md)."""
    cdef const char **kinds = ["batch norm", "group norm", "layer norm", "RMS norm"]
    cdef const char **types = ["float32", "float64", "float16", "bfloat16"]
    cdef char[2048] line  # more than 64 axes and all else take
    cdef int i, threads = threads_used(), n
    n = snprintf(line, sizeof(line), "normext: %s %s, %s (", kinds[norm.kind], what, types[norm.type])
    for i in range(norm.ndim):
        n += snprintf(line + n, sizeof(line) - n, "%s%zd", b", " if i else b"", norm.shape[i])
    snprintf(line + n, sizeof(line) - n, ") axis %d: %s, %s, %d thread%s, %.3f ms\n", norm.axis, way,
             isa_name(), threads, b"" if threads == 1 else b"s", milliseconds() - began)
    fputs(line, stderr)  # whole, whatever other threads write


cdef int run_forward(const nx_norm *norm, const nx_io *io, double *var, Way *way) noexcept nogil:
    cdef nx_io of_sum
    cdef int status = walk_forward(norm, io, var, way)
    if status != NORMEXT_OK or way[0] != BLOCKS:
        return status
    if io.residual.data == NULL:
        return forward_by_blocks(norm, io, var)
    status = add_by_blocks(norm, io)
    if status != NORMEXT_OK:
        return status
    of_sum = io[0]
    of_sum.x, of_sum.residual.data, way[0] = io.sum, NULL, NOTHING
    status = walk_forward(norm, &of_sum, var, way)
    if status != NORMEXT_OK or way[0] != BLOCKS:
        way[0] = BLOCKS
        return status
    return forward_by_blocks(norm, &of_sum, var)


cdef int batch_forward(const nx_norm *norm, const nx_io *io, Way *way) noexcept nogil:
    """Around the pass, what becomes of running statistics; all memory is had before these change."""
    cdef Py_ssize_t channels = norm.shape[norm.axis]
    cdef double few[256]
    cdef double *var = io.var
    cdef int status = NORMEXT_OK
    if not norm.training and io.running.mean != NULL:
        read_statistic(io.running.mean, io.running.single_mean, channels, io.mean)
        read_statistic(io.running.var, io.running.single_var, channels, io.rstd)
        nx_inverse_stds(io.rstd, channels, norm.eps)
    if numbers_of(norm, 0, norm.ndim) == 0:
        return NORMEXT_OK
    if norm.training and var == NULL and io.running.var != NULL:
        var = &few[0] if channels <= 256 else <double *> malloc(channels * sizeof(double))
        if var == NULL:
            return NORMEXT_NO_MEMORY
    status = run_forward(norm, io, var, way)
    if status == NORMEXT_OK and norm.training:
        update_running(norm, &io.running, io.mean, var)
    if var != &few[0] and var != io.var:
        free(var)
    return status


cdef int forward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef Way way = NOTHING
    cdef double began = milliseconds() if tracing else 0
    cdef int status = NORMEXT_OK
    if norm.kind == NORMEXT_BATCH_NORM:
        status = batch_forward(norm, io, &way)
    elif numbers_of(norm, 0, norm.ndim) != 0:
        status = run_forward(norm, io, NULL, &way)
    if tracing:
        trace(norm, "forward", way_name(way, False), began)
    return status


cdef int backward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef Way way = NOTHING
    cdef double began = milliseconds() if tracing else 0
    cdef double largest = 1e100 if norm.type == NORMEXT_FLOAT64 else 1e10
    cdef Py_ssize_t c, numbers = numbers_of(norm, 0, norm.ndim), parameters = parameters_of(norm)
    cdef nx_io call = io[0]
    cdef bint wide = False
    cdef int status = NORMEXT_OK
    if io.part != NORMEXT_APPLY:
        memset(io.dgamma, 0, parameters * sizeof(double))
        memset(io.dbeta, 0, parameters * sizeof(double))
    if norm.kind == NORMEXT_BATCH_NORM and io.part != NORMEXT_APPLY:
        call.count = <double> (numbers // parameters)
    if numbers != 0:
        # rstd is cubed, and sums of dy * (x - mean) are taken: deviations must not be such that these
        # overflow, or underflow. Data with such deviations are rare.
        wide = nx_any_outside(io.rstd, statistics_of(norm), 1 / largest, largest)
        if wide:
            way = BLOCKS
        else:
            status = walk_backward(norm, &call, NULL, &way)
        if status == NORMEXT_OK and way == BLOCKS:
            status = backward_by_blocks(norm, &call, wide)
        if status == NORMEXT_OK and norm.kind == NORMEXT_BATCH_NORM and io.part == NORMEXT_WHOLE and not wide:
            for c in range(parameters):  # from dots
                io.dgamma[c] *= io.rstd[c]
    if tracing:
        trace(norm, "backward", way_name(way, wide), began)
    return status
