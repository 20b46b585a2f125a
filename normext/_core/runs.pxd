from normext._core.kernels cimport Operand, nx_kernels

# So many groups, each of `runs` runs of `n` contiguous numbers that share one statistic: a channel of N,C,H,W is N runs of H*W, a
# row of layer norm is one run.
cdef struct Runs:
    Py_ssize_t groups, runs, n

cdef int normalize_runs(const nx_kernels *k, Runs shape, Operand x, Operand y, const char *gamma, const char *beta,
                        bint elementwise, bint training, double eps, double *mean, double *rstd, double *var) except -1
cdef int runs_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma,
                       bint elementwise, bint training, bint given, double count, const double *mean, const double *rstd,
                       double *sums, double *dots) except -1
cdef int layer_backward(const nx_kernels *k, Runs shape, Operand x, Operand dy, Operand dx, const char *gamma,
                        const double *mean, const double *rstd, double *dbeta, double *dgamma) except -1
