# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What a norm is, and how a call of it is run: the one door that all callers come through.

    check      what is wrong with a norm
    forward    running statistics, and which way: where the arrays lie (walk.pyx), or by copied
    backward   blocks (blocks.pyx)

normext.h describes the arguments. Nothing here holds the GIL.
"""

from libc.stdio cimport fputs, snprintf, stderr
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from normext cimport (
    NORMEXT_APPLY, NORMEXT_BAD_ARGUMENT, NORMEXT_BAD_AXIS, NORMEXT_BAD_EPS, NORMEXT_BAD_GROUPS,
    NORMEXT_BAD_KIND, NORMEXT_BAD_SHAPE, NORMEXT_BAD_TYPE, NORMEXT_BATCH_NORM, NORMEXT_BFLOAT16,
    NORMEXT_FLOAT32, NORMEXT_FLOAT64, NORMEXT_MAX_NDIM, NORMEXT_NO_CHANNELS,
    NORMEXT_NO_MEMORY, NORMEXT_NO_NUMBERS, NORMEXT_OK, NORMEXT_RMS_NORM, NORMEXT_WHOLE, nx_io,
    nx_norm, nx_running,
)
from normext._core.blocks cimport add_by_blocks, backward_by_blocks, forward_by_blocks
from normext._core.kernels cimport ceil_div, nx_kernels
from normext._core.runtime cimport (
    Task, isa_name, kernels_for, run_tasks, threads_used, tracing,
)
from normext._core.sizes cimport is_group_norm, numbers_of, parameters_of, statistics_of
from normext._core.walk cimport (
    BLOCKS, CHANNELS_FIRST, CHANNELS_LAST, COLUMNS, LAYERS, NOTHING, ONE_PIXEL, ROWS, Walk,
    Way, walk_backward, walk_forward,
)

cdef enum:
    CHANNELS = 4096  # of a task
    MOST_TASKS = 64

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int timespec_get(timespec *ts, int base)
    int TIME_UTC


# What a norm is ----------------------------------------------------------------------------------


cdef int check(const nx_norm *norm) noexcept nogil:
    cdef Py_ssize_t numbers, channels
    cdef double most = 1  # numbers, were no length 0
    cdef int i
    if not NORMEXT_BATCH_NORM <= norm.kind <= NORMEXT_RMS_NORM:
        return NORMEXT_BAD_KIND
    if not NORMEXT_FLOAT32 <= norm.type <= NORMEXT_BFLOAT16:
        return NORMEXT_BAD_TYPE
    if not 0 <= norm.ndim <= NORMEXT_MAX_NDIM or (norm.ndim > 0 and norm.shape == NULL):
        return NORMEXT_BAD_SHAPE
    if not 0 <= norm.axis < norm.ndim or (is_group_norm(norm) and norm.axis == 0):
        return NORMEXT_BAD_AXIS
    for i in range(norm.ndim):
        most *= max(<Py_ssize_t> 1, norm.shape[i])
        if norm.shape[i] < 0 or most > 1e18:
            return NORMEXT_BAD_SHAPE
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
    elif is_group_norm(norm):
        if norm.groups < 1 or channels % norm.groups:
            return NORMEXT_BAD_GROUPS
        if numbers == 0 and norm.shape[0] != 0:
            return NORMEXT_NO_NUMBERS
    elif numbers_of(norm, norm.axis, norm.ndim) == 0:
        return NORMEXT_NO_NUMBERS
    return NORMEXT_OK


# Running statistics ------------------------------------------------------------------------------


cdef void read_statistic(const void *s, bint single, Py_ssize_t n, double *to) noexcept nogil:
    if single:
        kernels_for(NORMEXT_FLOAT32, False).widen(s, n, to)
    else:
        memcpy(to, s, n * sizeof(double))


# Running statistics and the batch's, of which a task takes some.
cdef struct Update:
    const nx_running *running
    Py_ssize_t channels
    double momentum, mean_share, var_share
    const double *mean
    const double *var


cdef inline void update_some(void *s, bint single, Py_ssize_t first, Py_ssize_t n, double momentum,
                             double share, const double *batch) noexcept nogil:
    """``momentum * s + share * batch``; nothing where there is no s."""
    if s != NULL:
        s = <char *> s + first * (sizeof(float) if single else sizeof(double))
        kernels_for(NORMEXT_FLOAT64, False).update_running(s, single, n, momentum, share,
                                                           batch + first)


cdef void update_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Update *u = <const Update *> job
    cdef Py_ssize_t first = task * CHANNELS, n = min(<Py_ssize_t> CHANNELS, u.channels - first)
    update_some(u.running.mean, u.running.single_mean, first, n, u.momentum, u.mean_share, u.mean)
    update_some(u.running.var, u.running.single_var, first, n, u.momentum, u.var_share, u.var)


cdef int update_running(const nx_norm *norm, const nx_running *running, const double *mean,
                        const double *var) noexcept nogil:
    """From the batch's mean and biased variance."""
    cdef Py_ssize_t channels = norm.shape[norm.axis], numbers = numbers_of(norm, 0, norm.ndim)
    cdef double share = 1 - running.momentum, correction = 1
    cdef Update u
    if running.unbiased:
        correction = <double> numbers / (numbers - channels)
    u = Update(running, channels, running.momentum, share, share * correction, mean, var)
    return run_tasks(update_task, &u, ceil_div(channels, CHANNELS), channels)


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


cdef void trace(const nx_norm *norm, const char *what, const char *way,
                double began) noexcept nogil:
    """A line about a call, for whoever wants to know which way it went (docs/architecture.md)."""
    cdef const char **kinds = ["batch norm", "group norm", "layer norm", "RMS norm"]
    cdef const char **types = ["float32", "float64", "float16", "bfloat16"]
    cdef char[2048] line  # more than 64 axes and all else take
    cdef int i, threads = threads_used(), n
    n = snprintf(line, sizeof(line), "normext: %s %s, %s (", kinds[norm.kind], what,
                 types[norm.type])
    for i in range(norm.ndim):
        n += snprintf(line + n, sizeof(line) - n, "%s%zd", b", " if i else b"", norm.shape[i])
    snprintf(line + n, sizeof(line) - n, ") axis %d: %s, %s, %d thread%s, %.3f ms\n", norm.axis,
             way, isa_name(), threads, b"" if threads == 1 else b"s", milliseconds() - began)
    fputs(line, stderr)  # whole, whatever other threads write


cdef int run_forward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil:
    cdef nx_io of_sum
    cdef int status = walk_forward(norm, io, w)
    if status != NORMEXT_OK or w.way != BLOCKS:
        return status
    if io.residual.data == NULL:
        return forward_by_blocks(norm, io, w.var)
    status = add_by_blocks(norm, io)
    if status != NORMEXT_OK:
        return status
    of_sum = io[0]
    of_sum.x, of_sum.residual.data = io.sum, NULL
    status = walk_forward(norm, &of_sum, w)
    if status != NORMEXT_OK or w.way != BLOCKS:
        w.way = BLOCKS
        return status
    return forward_by_blocks(norm, &of_sum, w.var)


cdef int batch_forward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil:
    """The pass, and running statistics, which change when all memory has been had."""
    cdef Py_ssize_t channels = norm.shape[norm.axis]
    cdef double few[256]
    cdef double *var = io.var
    cdef int status = NORMEXT_OK
    if not norm.training and io.running.mean != NULL:
        read_statistic(io.running.mean, io.running.single_mean, channels, io.mean)
        read_statistic(io.running.var, io.running.single_var, channels, io.rstd)
        kernels_for(norm.type, False).inverse_stds(io.rstd, channels, norm.eps)
    if numbers_of(norm, 0, norm.ndim) == 0:
        return NORMEXT_OK
    if norm.training and var == NULL and io.running.var != NULL:
        var = &few[0] if channels <= 256 else <double *> malloc(channels * sizeof(double))
        if var == NULL:
            return NORMEXT_NO_MEMORY
    w.var = var
    status = run_forward(norm, io, w)
    if status == NORMEXT_OK and norm.training:
        status = update_running(norm, &io.running, io.mean, var)
    if var != &few[0] and var != io.var:
        free(var)
    return status


cdef int forward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef Walk walk = Walk(NOTHING, False, NULL, NULL)
    cdef double began = milliseconds() if tracing else 0
    cdef int status = NORMEXT_OK
    if norm.kind == NORMEXT_BATCH_NORM:
        status = batch_forward(norm, io, &walk)
    elif numbers_of(norm, 0, norm.ndim) != 0:
        status = run_forward(norm, io, &walk)
    if tracing:
        trace(norm, "forward", way_name(walk.way, False), began)
    return status


# What is done to a number of each channel, row or parameter, of which there may be as many as
# numbers of x: a task takes a share.
cdef struct Each:
    const nx_kernels *k
    double *numbers
    const double *factors
    Py_ssize_t count, tasks
    double least, largest
    bint *outside  # what each task has found


cdef inline Py_ssize_t share_of(const Each *e, Py_ssize_t task) noexcept nogil:
    return task * e.count // e.tasks


cdef void zero_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Each *e = <const Each *> job
    cdef Py_ssize_t first = share_of(e, task)
    memset(e.numbers + first, 0, (share_of(e, task + 1) - first) * sizeof(double))


cdef void multiply_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Each *e = <const Each *> job
    cdef Py_ssize_t first = share_of(e, task)
    e.k.multiply(e.numbers + first, e.factors + first, share_of(e, task + 1) - first)


cdef void outside_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Each *e = <const Each *> job
    cdef Py_ssize_t first = share_of(e, task)
    e.outside[task] = e.k.any_outside(e.numbers + first, share_of(e, task + 1) - first, e.least,
                                      e.largest)


cdef inline int do_each(Task f, Each *e) noexcept nogil:
    e.tasks = max(1, min(<Py_ssize_t> MOST_TASKS, e.count // CHANNELS))
    if e.tasks == 1:
        f(e, 0)
        return NORMEXT_OK
    return run_tasks(f, e, e.tasks, e.count)


cdef int zero(double *numbers, Py_ssize_t count) noexcept nogil:
    cdef Each e = Each(NULL, numbers, NULL, count, 1, 0, 0, NULL)
    return do_each(zero_task, &e)


cdef int multiply(const nx_kernels *k, double *numbers, const double *factors,
                  Py_ssize_t count) noexcept nogil:
    cdef Each e = Each(k, numbers, factors, count, 1, 0, 0, NULL)
    return do_each(multiply_task, &e)


cdef int find_outside(const nx_kernels *k, double *numbers, Py_ssize_t count, double largest,
                      bint *any_is) noexcept nogil:
    """Whether any number that is not 0 is above `largest` or below its inverse."""
    cdef bint outside[MOST_TASKS]
    cdef Each e = Each(k, numbers, NULL, count, 1, 1 / largest, largest, &outside[0])
    cdef int task, status = do_each(outside_task, &e)
    if status == NORMEXT_OK:
        any_is[0] = False
        for task in range(e.tasks):
            any_is[0] |= outside[task]
    return status


cdef int backward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef Walk walk = Walk(NOTHING, False, NULL, NULL)
    cdef double began = milliseconds() if tracing else 0
    cdef double largest = 1e100 if norm.type == NORMEXT_FLOAT64 else 1e10
    cdef const nx_kernels *k = kernels_for(norm.type, False)
    cdef Py_ssize_t numbers = numbers_of(norm, 0, norm.ndim), parameters = parameters_of(norm)
    cdef nx_io call = io[0]
    cdef bint wide = False
    cdef int status = NORMEXT_OK
    if io.part != NORMEXT_APPLY and (norm.kind != NORMEXT_BATCH_NORM or numbers == 0):
        status = zero(io.dgamma, parameters)
        if status == NORMEXT_OK:
            status = zero(io.dbeta, parameters)
    if norm.kind == NORMEXT_BATCH_NORM and io.part != NORMEXT_APPLY:
        call.count = <double> (numbers // parameters)
    if numbers != 0 and status == NORMEXT_OK:
        # rstd is cubed, and sums of dy * (x - mean) are taken: deviations, and their inverses, must
        # not be such that these overflow or underflow. The cube of 1e10 leaves a factor of 1e8 to
        # what it is multiplied by, before float is at its end; 1e100 does to double. Such data are
        # rare.
        status = find_outside(k, io.rstd, statistics_of(norm), largest, &wide)
        if wide:
            walk.way = BLOCKS
        elif status == NORMEXT_OK:
            status = walk_backward(norm, &call, &walk)
        if status == NORMEXT_OK and walk.way == BLOCKS:
            status = backward_by_blocks(norm, &call, wide)
        if (status == NORMEXT_OK and norm.kind == NORMEXT_BATCH_NORM and io.part == NORMEXT_WHOLE
                and not wide):
            status = multiply(k, io.dgamma, io.rstd, parameters)  # from dots
    if tracing:
        trace(norm, "backward", way_name(walk.way, wide), began)
    return status
