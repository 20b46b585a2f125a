from normext._core.kernels cimport Operand, nx_kernels

# What gamma and beta have a number for: a group (batch norm), a run (group norm: run r of group g has that of channel
# (g * runs + r) % channels), or a position along the run (layer norm).
cdef enum Parameters:
    PER_GROUP
    PER_RUN
    ALONG_RUN

# Where mean and rstd come from: they are given, and constants to the backward pass; or they are the group's own; or its own about
# zero (RMS norm: the mean is 0 and the variance the mean square).
cdef enum Statistics:
    GIVEN
    CENTRED
    ABOUT_ZERO

# So many groups, each of `runs` runs of `n` contiguous numbers that share one statistic: a channel of N,C,H,W is N runs of H*W, a
# row of layer norm is one run. `channels` is for parameters PER_RUN.
cdef struct Runs:
    Py_ssize_t groups, runs, n, channels

cdef int normalize_runs(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                        Parameters kind, Statistics statistics, double eps, bint relu, double *mean, double *rstd,
                        double *var) except -1
cdef int affine_runs(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta, bint relu,
                     const double *mean, const double *rstd) except -1
cdef int normalize_sums(const nx_kernels *k, Runs shape, Operand x, Operand residual, Operand total, Operand y, const char *gamma,
                        const char *beta, Statistics statistics, double eps, double *mean, double *rstd) except -1
cdef int runs_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                       const char *beta, Parameters kind, Statistics statistics, bint relu, bint given, double count,
                       const double *mean, const double *rstd, const double *pivots, double *sums, double *dots) except -1
cdef int layer_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand more, Operand dx, const char *gamma,
                        Statistics statistics, const double *mean, const double *rstd, double *dbeta,
                        double *dgamma) except -1
cdef int grouped_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma,
                          const double *mean, const double *rstd, double *sums, double *dots, double *deviations) except -1
