# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Calls that go by copied blocks.

Those whose arrays cannot be walked where they lie: strided along the innermost axis, byte-swapped,
unaligned. And backward passes of which the numbers are out of range: there the copies are scaled,
and of float64. Each block is copied to where it is contiguous, walked there, and its result copied
back.
"""

from libc.math cimport frexp, ldexp
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from normext cimport (
    NORMEXT_APPLY, NORMEXT_BATCH_NORM, NORMEXT_FLOAT32, NORMEXT_FLOAT64,
    NORMEXT_NO_MEMORY, NORMEXT_OK, NORMEXT_SUMS, NORMEXT_WHOLE, nx_array, nx_io, nx_norm,
)
from normext._core.kernels cimport (
    nx_block, nx_finish_moments, nx_kernels, nx_merge_share, nx_moments, nx_near,
    nx_rescale_columns, nx_rows,
)
from normext._core.runtime cimport kernels_for
from normext._core.sizes cimport is_group_norm, numbers_of, parameters_of, statistics_of
from normext._core.walk cimport (
    MAX_ARRAYS, MAX_NDIM, NOTHING, Walk, distance, fill_strides, moved_axes, walk_backward,
    walk_forward,
)

cdef enum:
    BLOCK = 1 << 15  # elements copied at a time: they stay in the second-level cache

# The arrays of a detour.
cdef enum:
    X
    Y  # or dx
    DY
    OTHER  # the residual, or dsum

cdef inline int computed_in(int type) noexcept nogil:
    """The type that parameters have, too."""
    return NORMEXT_FLOAT64 if type == NORMEXT_FLOAT64 else NORMEXT_FLOAT32


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
    char *memory  # of what follows
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


cdef int start_detour(const nx_norm *norm, bint wide, Detour *d) noexcept nogil:
    """The cut: along which axes, in what steps. Memory for copies of all arrays, also `wide`."""
    cdef int order[MAX_NDIM]
    cdef int i, j, axis, last, copies = 0
    cdef Py_ssize_t size = numbers_of(norm, 0, norm.ndim), most = 1
    cdef char *memory
    for i in range(norm.ndim):
        order[i] = i
    if is_group_norm(norm):
        moved_axes(norm, 1, order)
    d.norm, d.itemsize = norm[0], kernels_for(norm.type, False).itemsize
    d.norm.shape, d.norm.axis = &d.length[0], 1 if is_group_norm(norm) else norm.axis
    for i in range(MAX_ARRAYS):
        if d.of[i].data != NULL:
            set_array(norm, d, i, d.of[i], order)
    # Statistics along the axes that are not cut are of one block.
    if norm.kind == NORMEXT_BATCH_NORM:
        last = norm.ndim
    else:
        last = 1 if is_group_norm(norm) else norm.axis
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
    for i in range(MAX_ARRAYS):
        copies += i == Y or d.of[i].data != NULL
    memory = <char *> malloc(copies * most * (d.itemsize + (sizeof(double) if wide else 0)) + 1)
    d.memory = memory
    if memory == NULL:
        return NORMEXT_NO_MEMORY
    for i in range(MAX_ARRAYS):
        if wide and (i == Y or d.of[i].data != NULL):
            d.wide[i] = <double *> memory
            memory += most * sizeof(double)
    for i in range(MAX_ARRAYS):
        if i == Y or d.of[i].data != NULL:
            d.raw[i] = memory
            memory += most * d.itemsize
    return NORMEXT_OK


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


ctypedef fused word:
    uint16_t
    uint32_t
    uint64_t


cdef inline word other_order(word v) noexcept nogil:
    """The bytes in the other order; compilers know this as one instruction."""
    if word is uint16_t:
        return <uint16_t> (v << 8 | v >> 8)
    elif word is uint32_t:
        v = (v & 0xff00ff) << 8 | (v >> 8 & 0xff00ff)
        return v << 16 | v >> 16
    else:
        v = (v & <uint64_t> 0xff00ff00ff00ff) << 8 | (v >> 8 & <uint64_t> 0xff00ff00ff00ff)
        v = (v & <uint64_t> 0xffff0000ffff) << 16 | (v >> 16 & <uint64_t> 0xffff0000ffff)
        return v << 32 | v >> 32


# n numbers, `step` bytes apart, and where they are copied to.
cdef struct Span:
    const char *source
    char *to
    Py_ssize_t step, to_step, n


cdef inline void copy_words(word *kind, const Span *span, bint swapped) noexcept nogil:
    """Numbers as large as a word, at any address; `kind` is not looked at."""
    cdef const char *source = span.source  # in locals, as what is written might be the span
    cdef char *to = span.to
    cdef Py_ssize_t i, n = span.n, step = span.step, to_step = span.to_step
    cdef word v
    if swapped and step == sizeof(word) and to_step == sizeof(word):  # as vectors
        for i in range(n):
            memcpy(&v, source + i * sizeof(word), sizeof(word))
            v = other_order(v)
            memcpy(to + i * sizeof(word), &v, sizeof(word))
    elif swapped:
        for i in range(n):
            memcpy(&v, source + i * step, sizeof(word))
            v = other_order(v)
            memcpy(to + i * to_step, &v, sizeof(word))
    else:
        for i in range(n):
            memcpy(to + i * to_step, source + i * step, sizeof(word))


cdef void copy_numbers(const Span *span, int itemsize, bint swapped) noexcept nogil:
    if span.step == itemsize and span.to_step == itemsize and not swapped:
        memcpy(span.to, span.source, span.n * itemsize)
    elif itemsize == 2:
        copy_words(<uint16_t *> NULL, span, swapped)
    elif itemsize == 4:
        copy_words(<uint32_t *> NULL, span, swapped)
    else:
        copy_words(<uint64_t *> NULL, span, swapped)


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
    cdef Span span
    for i in range(ndim - 1, -1, -1):
        packed[i], index[i] = step, 0
        step *= d.length[i]
        there += d.start[i] * strides[i]
        if d.length[i] > 1 and (d.length[fast] == 1
                                or distance(strides[i]) < distance(strides[fast])):
            fast = i
    while True:
        if back:
            span = Span(here, there, packed[fast], strides[fast], d.length[fast])
        else:
            span = Span(there, here, strides[fast], packed[fast], d.length[fast])
        copy_numbers(&span, d.itemsize, d.of[which].swapped)
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
    """A block's statistics out of those of all, or back; both are contiguous."""
    cdef Py_ssize_t index[MAX_NDIM]
    cdef Py_ssize_t at, axis_at, channels
    cdef int i
    if d.norm.kind == NORMEXT_BATCH_NORM:
        at, channels = d.start[d.norm.axis], d.length[d.norm.axis]
        memcpy(all + at if back else part, part if back else all + at, channels * sizeof(double))
        return
    if is_group_norm(&d.norm):
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
    cdef double *end = numbers + block_numbers(d)
    if d.norm.kind == NORMEXT_BATCH_NORM:
        together = numbers_of(&d.norm, d.norm.axis + 1, d.norm.ndim)
    else:
        together = block_numbers(d) // statistics
    while numbers < end:
        if together == 1:  # as vectors
            for i in range(statistics):
                numbers[i] *= scale[i]
        else:
            for i in range(statistics):
                for j in range(i * together, (i + 1) * together):
                    numbers[j] *= scale[i]
        numbers += statistics * together


cdef inline const char *block_parameter(const Detour *d, const void *p,
                                        Py_ssize_t size) noexcept nogil:
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
    status = start_detour(norm, False, &d)
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
    free(d.memory)
    return NORMEXT_OK


cdef int block_moments(Detour *d, const double *scale, nx_io *part, double *var) noexcept nogil:
    """Mean and variance of a block's channels, of numbers times `scale`, NULL for 1."""
    cdef nx_norm norm = d.norm
    cdef Py_ssize_t n = block_numbers(d)
    cdef Walk walk = Walk(NOTHING, True, NULL, NULL)
    copy_block(d, X, False)
    part.x.data = d.raw[X]
    if scale != NULL:  # which the type that is computed in can carry
        kernels_for(norm.type, False).widen(d.raw[X], n, d.wide[X])
        multiply(d, d.wide[X], scale + d.start[norm.axis])
        norm.type, part.x.data = computed_in(norm.type), d.wide[Y]
        kernels_for(norm.type, False).narrow(d.wide[X], n, d.wide[Y])
    walk.var = var
    return walk_forward(&norm, part, &walk)


cdef int moments_by_blocks(const nx_norm *norm, const nx_io *io, Detour *d,
                           double *var) noexcept nogil:
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
                nx_merge_share(io.mean + c, m2 + c, mean[j], n * mean[2 * channels + j], seen[c],
                               n / total)
                seen[c] = total
            if not next_block(d):
                break
        if status != NORMEXT_OK or attempt == 1 or not nx_rescale_columns(
                &kernels_for(norm.type, False).range, channels, count, io.mean, m2, scale):
            break
        scales = scale
    if status == NORMEXT_OK:
        for c in range(channels):
            nx_finish_moments(nx_moments(count, io.mean[c], m2[c]),
                              1 if scales == NULL else scales[c], norm.eps, io.mean + c,
                              io.rstd + c, NULL if var == NULL else var + c)
    free(work)
    return status


cdef int forward_by_blocks(const nx_norm *norm, const nx_io *io, double *var) noexcept nogil:
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Detour d
    cdef nx_io part
    cdef Walk walk = Walk(NOTHING, True, NULL, NULL)
    cdef Py_ssize_t most
    cdef int status
    cdef double *statistics = NULL  # of a block
    memset(d.of, 0, sizeof(d.of))
    d.of[X], d.of[Y] = io.x, io.y
    status = start_detour(norm, norm.kind == NORMEXT_BATCH_NORM, &d)
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
        part.mean, part.rstd = statistics, statistics + most
        part.x.data, part.y.data = d.raw[X], d.raw[Y]
        if statistics == NULL:
            status = NORMEXT_NO_MEMORY
        first_block(&d)
        while status == NORMEXT_OK:
            copy_block(&d, X, False)
            copy_statistics(&d, io.mean, part.mean, False)
            copy_statistics(&d, io.rstd, part.rstd, False)
            part.gamma = block_parameter(&d, io.gamma, k.parameter_size)
            part.beta = block_parameter(&d, io.beta, k.parameter_size)
            status = walk_forward(&d.norm, &part, &walk)
            copy_statistics(&d, io.mean, part.mean, True)
            copy_statistics(&d, io.rstd, part.rstd, True)
            copy_block(&d, Y, True)
            if not next_block(&d):
                break
        free(statistics)
    free(d.memory)
    return status


cdef bint find_far_pivots(const nx_norm *norm, const nx_io *io, const double *sums,
                          double *pivots) noexcept nogil:
    """Whether gradients of any channel are far from zero, by some of them, and pivots for all."""
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Py_ssize_t strides[MAX_NDIM]
    cdef Py_ssize_t c
    cdef const char *p
    cdef char number[8]
    cdef Span span
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
            span = Span(p, &number[0], k.itemsize, k.itemsize, 1)
            copy_numbers(&span, k.itemsize, io.dy.swapped)
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
            kernels_for(computed_in(norm.type), False).widen(io.gamma, parameters, s.gamma)
    return NORMEXT_OK


cdef int mask_block(const Detour *d, const nx_io *io, double *work) noexcept nogil:
    """Set dy to 0 where the relu's result, found again as in the forward pass, is not above 0."""
    cdef const nx_kernels *k = kernels_for(d.norm.type, False)
    cdef nx_norm norm = d.norm
    cdef nx_io part
    cdef Walk walk = Walk(NOTHING, True, NULL, NULL)
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
    status = walk_forward(&norm, &part, &walk)
    if status == NORMEXT_OK:
        k.widen(d.raw[Y], block_numbers(d), d.wide[Y])
        for i in range(block_numbers(d)):
            if d.wide[Y][i] <= 0:
                memset(d.raw[DY] + i * d.itemsize, 0, d.itemsize)
    return status


cdef int load_block(Detour *d, const nx_io *io, const Scaled *s, nx_norm *norm,
                    nx_io *part) noexcept nogil:
    """Copies of a block of x, dy and dsum, and the norm and call that are walked with them."""
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


cdef inline nx_io as_contiguous(const nx_io *io) noexcept nogil:
    """A call's pointers and numbers for the walk of a block: its arrays are contiguous."""
    cdef nx_io part = io[0]
    part.x.strides = part.dy.strides = part.dx.strides = part.dsum.strides = NULL
    part.x.swapped = part.dy.swapped = part.dx.swapped = part.dsum.swapped = False
    part.dsum.data = NULL
    part.beta = NULL  # a relu's mask is in the copy of dy; of another type, it would be too short
    return part


cdef int sum_blocks(Detour *d, const nx_io *io, const Scaled *s,
                    const double *pivots) noexcept nogil:
    """Batch norm's sums, and dots of x as it is scaled, into dbeta and dgamma."""
    cdef Py_ssize_t j, c, axis = d.norm.axis
    cdef nx_norm norm
    cdef nx_io part = as_contiguous(io)
    cdef Walk walk = Walk(NOTHING, True, NULL, NULL)
    cdef int status
    cdef double *sums = s.work + 3 * d.shape[axis]
    for c in range(d.shape[axis]):
        io.dbeta[c] = io.dgamma[c] = 0
    part.part, part.dbeta, part.dgamma = NORMEXT_SUMS, sums, sums + d.shape[axis]
    first_block(d)
    while True:
        status = load_block(d, io, s, &norm, &part)
        if status == NORMEXT_OK:
            walk.pivots = NULL if pivots == NULL else pivots + d.start[axis]
            status = walk_backward(&norm, &part, &walk)
        if status != NORMEXT_OK:
            return status
        for j in range(d.length[axis]):
            io.dbeta[d.start[axis] + j] += part.dbeta[j]
            io.dgamma[d.start[axis] + j] += part.dgamma[j]
        if not next_block(d):
            return NORMEXT_OK


cdef int dx_blocks(Detour *d, const nx_io *io, const Scaled *s) noexcept nogil:
    """dx, and the sums of all norms but batch norm, whose are given."""
    cdef nx_norm norm
    cdef nx_io part = as_contiguous(io)
    cdef Walk walk = Walk(NOTHING, True, NULL, NULL)
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
            status = walk_backward(&norm, &part, &walk)
        if status != NORMEXT_OK:
            return status
        store_block(d, s)
        if not next_block(d):
            return NORMEXT_OK


cdef int batch_by_blocks(const nx_norm *norm, const nx_io *io, Detour *d,
                         Scaled *s) noexcept nogil:
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
    if s.scale != NULL and io.part == NORMEXT_WHOLE:
        for c in range(channels):
            io.dgamma[c] *= s.rstd[c]
    elif s.scale != NULL and io.part == NORMEXT_SUMS:
        for c in range(channels):
            io.dgamma[c] /= s.scale[c]
    return status


cdef int backward_by_blocks(const nx_norm *norm, const nx_io *io, bint wide) noexcept nogil:
    cdef Detour d
    cdef Scaled s
    cdef int status
    memset(d.of, 0, sizeof(d.of))
    d.of[X], d.of[DY], d.of[OTHER] = io.x, io.dy, io.dsum
    if io.part != NORMEXT_SUMS:
        d.of[Y] = io.dx
    status = start_detour(norm, wide or norm.relu, &d)
    if status != NORMEXT_OK:
        return status
    status = start_scaled(norm, io, wide, &s)
    if status == NORMEXT_OK:
        if norm.kind == NORMEXT_BATCH_NORM:
            status = batch_by_blocks(norm, io, &d, &s)
        else:
            status = dx_blocks(&d, io, &s)
        free(s.pivots)
    free(d.memory)
    return status
