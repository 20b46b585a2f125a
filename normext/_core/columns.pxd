from normext._core.kernels cimport Operand, nx_kernels

cdef int normalize_columns(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand y, const char *gamma,
                           const char *beta, bint training, double eps, double *mean, double *rstd, double *var) except -1
cdef int columns_backward(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand dy, Operand dx,
                          const char *gamma, bint training, bint given, double count, const double *mean,
                          const double *rstd, double *sums, double *dots) except -1
