# The kernels under the arguments that they had, until the loops are rewritten.
from normext._core.kernels cimport *


cdef inline nx_rows rows(const void *data, ptrdiff_t stride) noexcept nogil:
    return nx_rows(<void *> data, stride)

cdef inline void run_moments(const nx_kernels *k, const void *x, ptrdiff_t xs, ptrdiff_t runs, ptrdiff_t n, bint centred, double scale, nx_moments *m) noexcept nogil:
    k.row_moments(rows(x, xs), nx_block(runs, n), centred, scale, m)

cdef inline void col_moments(const nx_kernels *k, const void *x, ptrdiff_t xs, ptrdiff_t r, ptrdiff_t cols, const double *scale, double count, double *mean, double *m2) noexcept nogil:
    k.col_moments(rows(x, xs), nx_block(r, cols), scale, count, mean, m2)

cdef inline void run_affine(const nx_kernels *k, const void *x, ptrdiff_t xs, void *y, ptrdiff_t ys, ptrdiff_t runs, ptrdiff_t n, const double *mean, const double *scale, const double *shift, ptrdiff_t step, const void *gamma, const void *beta, bint relu) noexcept nogil:
    cdef nx_affine map = nx_affine(mean, scale, shift, step)
    k.row_affine(rows(x, xs), rows(y, ys), nx_block(runs, n), &map, gamma, beta, relu)

cdef inline void col_affine(const nx_kernels *k, const void *x, ptrdiff_t xs, void *y, ptrdiff_t ys, ptrdiff_t runs, ptrdiff_t n, const double *mean, const double *scale, const double *shift, bint relu) noexcept nogil:
    cdef nx_affine map = nx_affine(mean, scale, shift, 0)
    k.col_affine(rows(x, xs), rows(y, ys), nx_block(runs, n), &map, relu)

cdef inline bint run_is_far(const nx_kernels *k, const void *dy, ptrdiff_t n, const void *gamma, double mean) noexcept nogil:
    return k.row_is_far(dy, n, gamma, mean)

cdef inline bint cols_are_far(const nx_kernels *k, const void *dy, ptrdiff_t s, ptrdiff_t r, ptrdiff_t cols, const double *sum, double count, double *pivot) noexcept nogil:
    return k.cols_are_far(rows(dy, s), nx_block(r, cols), sum, count, pivot)

cdef inline void run_dots(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, ptrdiff_t runs, ptrdiff_t n, double mean, const double *pivot, const void *gamma, const nx_relu_mask *relu, double *sum, double *dot, ptrdiff_t step) noexcept nogil:
    k.row_dots(rows(x, xs), rows(dy, ds), nx_block(runs, n), mean, pivot, gamma, relu, nx_sums(sum, dot, step))

cdef inline void col_dots(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, ptrdiff_t runs, ptrdiff_t n, const double *mean, const double *pivot, const nx_relu_mask *relu, double *sum, double *dot) noexcept nogil:
    k.col_dots(rows(x, xs), rows(dy, ds), nx_block(runs, n), mean, pivot, relu, nx_sums(sum, dot, 1))

cdef inline void row_dots(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, ptrdiff_t r, ptrdiff_t cols, const double *mean, const double *rstd, double *sum, double *dot) noexcept nogil:
    k.layer_parameters(rows(x, xs), rows(dy, ds), nx_block(r, cols), mean, rstd, sum, dot)

cdef inline void run_combine(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, void *dx, ptrdiff_t dxs, ptrdiff_t runs, ptrdiff_t n, double mean, double pivot, const double *a, ptrdiff_t step, double b, double c, const void *gamma, const nx_relu_mask *relu, const void *more, ptrdiff_t ms) noexcept nogil:
    cdef nx_line line = nx_line(&mean, &pivot, a, &b, &c, step)
    k.row_dx(rows(x, xs), rows(dy, ds), rows(dx, dxs), nx_block(runs, n), &line, gamma, relu, rows(more, ms))

cdef inline void col_combine(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, void *dx, ptrdiff_t dxs, ptrdiff_t r, ptrdiff_t cols, const double *mean, const double *pivot, const double *a, const double *b, const double *c, const nx_relu_mask *relu) noexcept nogil:
    cdef nx_line line = nx_line(mean, pivot, a, b, c, 0)
    k.col_dx(rows(x, xs), rows(dy, ds), rows(dx, dxs), nx_block(r, cols), &line, relu)

cdef inline void row_statistics(const nx_kernels *k, const void *x, ptrdiff_t xs, ptrdiff_t r, ptrdiff_t n, bint centred, double eps, double *mean, double *rstd) noexcept nogil:
    k.layer_statistics(rows(x, xs), nx_block(r, n), centred, eps, mean, rstd)

cdef inline void old_normalize_rows(const nx_kernels *k, const void *x, ptrdiff_t xs, void *y, ptrdiff_t ys, ptrdiff_t r, ptrdiff_t n, bint centred, double eps, const void *gamma, const void *beta, double *mean, double *rstd) noexcept nogil:
    cdef nx_layer norm = nx_layer(centred, eps, gamma, beta)
    k.layer_forward(rows(x, xs), rows(y, ys), nx_block(r, n), &norm, mean, rstd)

cdef inline void rows_backward(const nx_kernels *k, const void *x, ptrdiff_t xs, const void *dy, ptrdiff_t ds, void *dx, ptrdiff_t dxs, ptrdiff_t r, ptrdiff_t n, bint centred, const void *gamma, const double *mean, const double *rstd, const void *more, ptrdiff_t ms) noexcept nogil:
    cdef nx_layer norm = nx_layer(centred, 0, gamma, NULL)
    k.layer_backward(rows(x, xs), rows(dy, ds), rows(dx, dxs), nx_block(r, n), &norm, mean, rstd, rows(more, ms))

cdef inline ptrdiff_t groups_backward(const nx_kernels *k, const void *x, ptrdiff_t xg, ptrdiff_t xs, const void *dy, ptrdiff_t dg, ptrdiff_t ds, void *dx, ptrdiff_t dxg, ptrdiff_t dxs, ptrdiff_t groups, ptrdiff_t runs, ptrdiff_t n, const void *gamma, ptrdiff_t channel, ptrdiff_t channels, const double *mean, const double *rstd, double *sum, double *dot) noexcept nogil:
    cdef nx_grouping g = nx_grouping(groups, runs, n, gamma, channel, channels)
    return k.group_backward(nx_groups(<void *> x, xg, xs), nx_groups(<void *> dy, dg, ds), nx_groups(dx, dxg, dxs), &g, mean, rstd, sum, dot)

cdef inline void add_runs(const nx_kernels *k, const void *a, ptrdiff_t a_s, const void *b, ptrdiff_t bs, void *s, ptrdiff_t ss, ptrdiff_t r, ptrdiff_t n) noexcept nogil:
    k.add_rows(rows(a, a_s), rows(b, bs), rows(s, ss), nx_block(r, n))
