# The C primitives as Cython sees them (src_c/kernels.h says what each does), and what both geometries share.

cdef extern from "kernels.h" nogil:
    ctypedef struct nx_moments:
        double count, mean, m2

    void nx_merge(nx_moments *m, nx_moments other)
    double inverse_std "nx_inverse_std"(double variance, double eps)
    void nx_finish_moments(nx_moments m, bint centred, double eps, double *mean, double *rstd, double *var)

    ctypedef struct nx_kernels:
        ptrdiff_t itemsize, run_block, col_rows
        void (*run_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, nx_moments *m) noexcept nogil
        void (*col_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, double count, double *mean,
                            double *m2) noexcept nogil
        void (*run_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n,
                           double mean, double scale, double shift, const void *gamma, const void *beta) noexcept nogil
        void (*col_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t cols,
                           const double *mean, const double *scale, const double *shift) noexcept nogil
        void (*run_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n,
                         double mean, const void *gamma, double *sum, double *dot) noexcept nogil
        void (*col_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t rows,
                         ptrdiff_t cols, const double *mean, double *sum, double *dot) noexcept nogil
        void (*row_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t rows,
                         ptrdiff_t cols, const double *mean, const double *scale, double *sum, double *dot) noexcept nogil
        void (*run_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx,
                            ptrdiff_t dx_stride, ptrdiff_t runs, ptrdiff_t n, double mean, double g_mean, double a,
                            double b, double c, const void *gamma) noexcept nogil
        void (*col_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx,
                            ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t cols, const double *mean, const double *dy_mean,
                            const double *a, const double *b) noexcept nogil
        void (*normalize_rows)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n,
                               bint centred, double eps, const void *gamma, const void *beta, double *mean,
                               double *rstd) noexcept nogil
        void (*rows_backward)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx,
                              ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t n, bint centred, const void *gamma,
                              const double *mean, const double *rstd) noexcept nogil
        void (*transpose)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, void *y,
                          ptrdiff_t y_stride) noexcept nogil
        void (*add)(const void *x, void *y, ptrdiff_t n) noexcept nogil
        void (*pool_row)(const void *x, ptrdiff_t x_stride, ptrdiff_t kh, ptrdiff_t kw, ptrdiff_t step, ptrdiff_t n, void *y,
                         void *winner, int winner_size) noexcept nogil

    enum:
        NX_FLOAT32
        NX_FLOAT64

    ctypedef struct nx_isa:
        const char *name
        int (*supported)() noexcept nogil
        const nx_kernels *tables[2]

    const nx_isa nx_isas[]
    const int nx_isa_count
    const char *nx_compiler()


# An array of a layout that the kernels walk: element (group, run, i) lies at data + (group * group_stride + run * run_stride + i)
# elements. Columns are the same with a row for a run.
cdef struct Operand:
    char *data
    Py_ssize_t group_stride, run_stride


cdef inline double element(const nx_kernels *k, const char *p, Py_ssize_t i) noexcept nogil:
    """The i-th number of a contiguous parameter of the kernels' type."""
    return (<const float *> p)[i] if k.itemsize == 4 else (<const double *> p)[i]


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b
