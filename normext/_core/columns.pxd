from normext._core.kernels cimport Operand, Running, nx_kernels

# Group norm of N,H,W,C: so many examples of `rows` rows of `groups` groups of `per_group` columns each.
cdef struct ColumnGroups:
    Py_ssize_t examples, rows, groups, per_group

cdef int normalize_columns(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand y, const char *gamma,
                           const char *beta, bint training, double eps, bint relu, double *mean, double *rstd, double *var,
                           const Running *running) except -1
cdef int columns_backward(const nx_kernels *k, Py_ssize_t rows, Py_ssize_t cols, Operand x, Operand dy, Operand dx,
                          const char *gamma, const char *beta, bint training, bint relu, bint given, double count,
                          const double *mean, const double *rstd, const double *pivots, double *sums, double *dots) except -1
cdef int normalize_column_groups(const nx_kernels *k, ColumnGroups shape, Operand x, Operand y, const char *gamma, const char *beta,
                                 double eps, double *mean, double *rstd) except -1
cdef int column_groups_backward(const nx_kernels *k, ColumnGroups shape, Operand x, Operand dy, Operand dx, const char *gamma,
                                const double *mean, const double *rstd, double *sums, double *dots) except -1
