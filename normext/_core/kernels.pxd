# The C primitives as Cython sees them (src_c/kernels.h and kernels_list.h say what each does), and
# what both geometries share.


cdef extern from "kernels.h" nogil:
    ctypedef struct nx_moments:
        double count, mean, m2

    void nx_merge_share(double *mean, double *m2, double other_mean, double other_m2,
                        double count, double share)
    void nx_merge(nx_moments *m, nx_moments other)
    bint nx_near(double g, double mean)
    ctypedef struct nx_range:
        double tiny, enlarge, shrink, near_zero

    double nx_rescale(const nx_range *range, nx_moments m)
    bint nx_rescale_columns(const nx_range *range, ptrdiff_t n, double count, const double *mean,
                            const double *m2, double *scale)
    void nx_finish_moments(nx_moments m, double scale, double eps, double *mean, double *rstd,
                           double *var)

    ctypedef struct nx_rows:
        void *data
        ptrdiff_t stride

    ctypedef struct nx_groups:
        void *data
        ptrdiff_t group, row

    ctypedef struct nx_block:
        ptrdiff_t rows, n

    ctypedef struct nx_columns:
        ptrdiff_t examples, rows, n

    ctypedef struct nx_affine:
        const double *mean
        const double *scale
        const double *shift
        ptrdiff_t step, ahead

    ctypedef struct nx_relu_mask:
        const double *scale
        const double *shift

    ctypedef struct nx_backward:
        nx_block block
        nx_rows x, dy, dx, addend
        const void *gamma
        const nx_relu_mask *relu
        ptrdiff_t ahead

    ctypedef struct nx_col_backward:
        nx_columns block
        nx_groups x, dy, dx
        const nx_relu_mask *relu
        bint ahead

    ctypedef struct nx_sums:
        double *sum
        double *dot
        ptrdiff_t step

    ctypedef struct nx_line:
        const double *mean
        const double *pivot
        const double *factor
        const double *slope
        const double *constant
        ptrdiff_t step

    double nx_slope(double factor, double rstd, double dot_mean)
    double nx_constant(double factor, double g_mean)

    ctypedef struct nx_layer:
        int centred
        double eps
        const void *gamma
        const void *beta

    ctypedef struct nx_grouping:
        ptrdiff_t groups, rows, n
        const void *gamma
        const void *beta
        ptrdiff_t channel, channels

    ctypedef struct nx_window:
        ptrdiff_t kh, kw, step

    ctypedef struct nx_adam:
        const void *w
        const void *dw
        const void *m
        const void *v
        void *next_w
        void *next_m
        void *next_v
        double beta1, beta2, rate, epsilon

    ctypedef struct nx_kernels:
        ptrdiff_t itemsize, parameter_size, row_block, col_block, col_rows, short_group
        nx_range range
        void (*row_moments)(nx_rows x, nx_block b, bint centred, double scale,
                            nx_moments *m) noexcept nogil
        void (*col_pivots)(nx_groups x, nx_columns b, double *pivot) noexcept nogil
        void (*col_powers)(nx_groups x, nx_columns b, const double *scale, const double *pivot,
                           double *sum, double *squares) noexcept nogil
        bint (*col_rescale)(ptrdiff_t n, double count, const double *sum, const double *squares,
                            double *pivot, double *scale) noexcept nogil
        void (*col_statistics)(ptrdiff_t n, double count, double eps, const double *scale,
                               const double *pivot, const double *sum, const double *squares,
                               double *mean, double *rstd, double *var) noexcept nogil
        void (*affines)(const void *gamma, const void *beta, ptrdiff_t examples, ptrdiff_t n,
                        const double *rstd, double *scale, double *shift) noexcept nogil
        void (*col_lines)(ptrdiff_t n, double each, const double *rstd, const double *factor,
                          const double *sum, const double *dot, double *mean, double *slope,
                          double *constant) noexcept nogil
        void (*row_affine)(nx_rows x, nx_rows y, nx_block b, const nx_affine *map,
                           const void *gamma, const void *beta, bint relu) noexcept nogil
        void (*col_affine)(nx_groups x, nx_groups y, nx_columns b, const nx_affine *map,
                           bint relu) noexcept nogil
        bint (*row_is_far)(const void *dy, ptrdiff_t n, const void *gamma,
                           double mean) noexcept nogil
        bint (*cols_are_far)(nx_groups dy, nx_columns b, const double *sum, double count,
                             double *pivot) noexcept nogil
        void (*row_dots)(const nx_backward *of, double mean, const double *pivot,
                         nx_sums sums) noexcept nogil
        void (*col_dots)(const nx_col_backward *of, const double *mean, const double *pivot,
                         nx_sums sums) noexcept nogil
        void (*row_dx)(const nx_backward *of, const nx_line *line) noexcept nogil
        void (*col_dx)(const nx_col_backward *of, const nx_line *line) noexcept nogil
        void (*layer_forward)(nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean,
                              double *rstd) noexcept nogil
        void (*layer_dots)(const nx_backward *of, bint centred, const double *mean,
                           const double *rstd, nx_sums sums, double *dbeta,
                           double *dgamma) noexcept nogil
        void (*layer_backward)(const nx_backward *of, bint centred, const double *mean,
                               const double *rstd, double *dbeta, double *dgamma) noexcept nogil
        void (*group_forward)(nx_groups x, nx_groups y, const nx_grouping *g, double eps, bint relu,
                              double *mean, double *rstd) noexcept nogil
        ptrdiff_t (*group_backward)(nx_groups x, nx_groups dy, nx_groups dx, const nx_grouping *g,
                                    const double *mean, const double *rstd, double *dbeta,
                                    double *dgamma) noexcept nogil
        void (*add_rows)(nx_rows a, nx_rows b, nx_rows sum, nx_block block) noexcept nogil
        void (*widen)(const void *x, ptrdiff_t n, double *y) noexcept nogil
        void (*narrow)(const double *x, ptrdiff_t n, void *y) noexcept nogil
        void (*inverse_stds)(double *variance, ptrdiff_t n, double eps) noexcept nogil
        bint (*any_outside)(const double *p, ptrdiff_t n, double least,
                            double largest) noexcept nogil
        void (*multiply)(double *a, const double *b, ptrdiff_t n) noexcept nogil
        void (*update_running)(void *s, bint single, ptrdiff_t n, double momentum, double share,
                               const double *batch) noexcept nogil
        void (*transpose)(nx_rows x, nx_block b, nx_rows y) noexcept nogil
        void (*pool_row)(nx_rows x, const nx_window *window, ptrdiff_t n, void *y, void *winner,
                         int winner_size) noexcept nogil
        void (*adam)(const nx_adam *step, ptrdiff_t n) noexcept nogil

    enum:
        NX_FLOAT32
        NX_FLOAT64
        NX_FLOAT16
        NX_BFLOAT16
        NX_TYPES

    ctypedef struct nx_isa:
        const char *name
        int (*supported)() noexcept nogil
        const nx_kernels *tables[2][NX_TYPES]

    const nx_isa nx_isas[]
    const int nx_isa_count
    ptrdiff_t nx_cache(int level)
    const char *nx_compiler()


cdef inline double element(const nx_kernels *k, const char *p, Py_ssize_t i) noexcept nogil:
    """The i-th number of a contiguous parameter of the kernels' type."""
    return (<const float *> p)[i] if k.parameter_size == 4 else (<const double *> p)[i]


cdef inline void affine_of(const nx_kernels *k, const char *gamma, const char *beta,
                           Py_ssize_t channel, double rstd, double *scale,
                           double *shift) noexcept nogil:
    """What a channel's deviations from the mean are multiplied by, and what is added.

    gamma and beta may be NULL.
    """
    scale[0] = rstd if gamma == NULL else rstd * element(k, gamma, channel)
    shift[0] = 0 if beta == NULL else element(k, beta, channel)


cdef inline double restore_pivot(const nx_kernels *k, const char *gamma, Py_ssize_t channel,
                                 Py_ssize_t channels, double pivot, double *deviations,
                                 double *dots) noexcept nogil:
    """Add what a pivot took from the dots of a group's channels; return the sum of gamma * dots.

    `deviations` are the channels' sums of x - mean. In theory those of a group add up to 0, and the
    mean of gamma does not matter to what they are multiplied by: both are taken out before rounding
    errors are multiplied by a large pivot.
    """
    cdef Py_ssize_t c
    cdef double sum = 0, middle = 0, excess = 0, factor, rest
    for c in range(channels):
        excess += deviations[c] / channels
        middle += (1 if gamma == NULL else element(k, gamma, channel + c)) / channels
    for c in range(channels):
        factor = 1 if gamma == NULL else element(k, gamma, channel + c)
        rest = pivot * (deviations[c] - excess)
        sum += factor * dots[c] + (factor - middle) * rest
        dots[c] += rest
    return sum


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b
