# One call of the loops, as norms.pyx has worked it out of an nx_norm and an nx_io.

from normext._core.kernels cimport element, nx_groups, nx_kernels, nx_rows


# Where mean and rstd come from: they are given, and constants to the backward pass; or they are the
# numbers' own; or their own about zero (RMS norm: the mean is 0 and the variance the mean square).
cdef enum Statistics:
    GIVEN
    CENTRED
    ABOUT_ZERO

# What gamma and beta have a number for: a group (batch norm), a row of it (group norm: row r of
# group g has that of channel (g * rows + r) % channels), or a position along the row (layer norm).
cdef enum Parameters:
    PER_GROUP
    PER_ROW
    ALONG_ROW

# Where sums over rows come in any geometry, they go to dbeta and dgamma; see kernels_list.h for
# `sums` and `dots`.
cdef struct Call:
    const nx_kernels *k
    Statistics statistics
    Parameters parameters
    bint relu
    double eps
    # Along rows: so many groups, each of `rows` rows of `n` contiguous numbers that share one
    # statistic; a channel of N,C,H,W is N rows of H * W, a row of layer norm is one. Down columns:
    # `rows` rows of `n` columns, of which `per_group` in a row share a statistic, and of group norm
    # so many groups (examples). `channels` is for parameters PER_ROW.
    Py_ssize_t groups, rows, n, channels, per_group
    Py_ssize_t ahead  # not 0 in large calls: how far along rows (see nx_backward); down columns, 1
    nx_groups x, y, residual, sum, dy, dx, addend
    const char *gamma
    const char *beta
    double *mean
    double *rstd
    double *var  # may be NULL
    double *dbeta
    double *dgamma
    # Batch norm's backward pass: whether sums and dots are given or to be stored; how many numbers
    # share a statistic; what is taken off dy before dots are summed (may be NULL).
    double *sums
    double *dots
    bint given
    double count
    const double *pivots

# What the tasks of a call need besides; each module says what it keeps where.
cdef struct Job:
    const Call *call
    Py_ssize_t blocks, chunks, tasks
    double *partial
    double *adjust


cdef inline nx_rows rows_at(nx_groups a, Py_ssize_t itemsize, Py_ssize_t group) noexcept nogil:
    """Groups that are one row each, from one of them on; no data where there are none."""
    if a.data == NULL:
        return nx_rows(NULL, 0)
    return nx_rows(<char *> a.data + group * a.group * itemsize, a.group)


cdef inline double gamma_of(const Call *c, Py_ssize_t channel) noexcept nogil:
    return 1 if c.gamma == NULL else element(c.k, c.gamma, channel)
