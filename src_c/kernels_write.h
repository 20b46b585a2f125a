/* What writes elements; included from kernels_template.h twice, with STREAM 0 and 1. Streaming stores go around the caches: memory that
 * is too large to be met there again is not read into them first, only to be written over. They need whole aligned vectors, so that a run
 * begins with what is left to the next of these. x86 orders them before whatever comes after the next locked instruction, which is how
 * threads, and Python's own lock, hand memory on. */

NX_INLINE void WR(put)(T *p, ptrdiff_t left, int whole, V v)
{
    if (!whole) FN(store_n)(p, left, v);
    else if (STREAM) FN(stream)(p, v);
    else FN(store)(p, v);
}

/* f(position, numbers, whether they are a whole vector) */
#define EACH_VECTOR(y, n, f)                             \
    do {                                                 \
        ptrdiff_t i_ = STREAM ? FN(unaligned)(y, n) : 0; \
        if (i_) f(0, i_, 0);                             \
        for (; i_ + W <= (n); i_ += W) f(i_, W, 1);      \
        if (i_ < (n)) f(i_, (n) - i_, 0);                \
    } while (0)

NX_INLINE void WR(affine_vector)(const T *x, T *y, ptrdiff_t left, int whole, V p, V a, V b, const C *gamma, const C *beta, int relu)
{
    V v = OP(fma)(OP(sub)(FN(some)(x, left, whole, p), p), a, b);
    if (gamma && beta) v = OP(fma)(v, FN(coefficients)(gamma, left, whole), FN(coefficients)(beta, left, whole));
    else if (gamma) v = OP(mul)(v, FN(coefficients)(gamma, left, whole));
    else if (beta) v = OP(add)(v, FN(coefficients)(beta, left, whole));
    WR(put)(y, left, whole, relu ? OP(max)(ZERO, v) : v);
}

/* The same by way of double, for means and scales at the ends of the range of C: rare, and slow. */
NX_OUTLINE void WR(affine_far_out)(const T *x, T *y, ptrdiff_t n, double mean, double scale, double shift, const C *gamma,
                                   const C *beta, int relu)
{
    const double half = fabs(scale) < 1 ? 0.5 : 1; /* of what may overflow before it is scaled down */
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        ptrdiff_t left = n - i;
        OP(store)(lanes, FN(some)(x + i, left, left >= W, ZERO));
        for (ptrdiff_t k = 0; k < W && k < left; k++) {
            double v = ((double)lanes[k] * half - mean * half) * scale / half + shift;
            if (gamma) v *= (double)gamma[i + k];
            if (beta) v += (double)beta[i + k];
            lanes[k] = (C)(relu && v <= 0 ? 0 : v);
        }
        if (left >= W) FN(store)(y + i, OP(load)(lanes));
        else FN(store_n)(y + i, left, OP(load)(lanes));
    }
}

NX_INLINE void WR(affine_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n,
                               const double *mean, const double *scale, const double *shift, ptrdiff_t step, const C *gamma,
                               const C *beta, int relu)
{
    V p = ZERO, a = ZERO, b = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, y += y_stride, mean += step, scale += step, shift += step) {
        if (FN(far_out)(*mean, *scale)) {
            WR(affine_far_out)(x, y, n, *mean, *scale, *shift, gamma, beta, relu);
            continue;
        }
        if (r == 0 || step) {
            p = OP(set)((C)*mean);
            a = OP(set)((C)*scale);
            b = OP(set)(FN(rest)(*mean, *scale, *shift));
        }
#define VECTOR(i, left, whole) \
    WR(affine_vector)(x + i, y + i, left, whole, p, a, b, gamma ? gamma + i : NULL, beta ? beta + i : NULL, relu)
        EACH_VECTOR(y, n, VECTOR);
#undef VECTOR
    }
}

static void WR(run_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n,
                           const double *mean, const double *scale, const double *shift, ptrdiff_t step, const void *gamma,
                           const void *beta, int relu)
{
    /* One loop each, so that none asks for every vector what there is to do. */
#define AFFINE(gamma, beta, relu) WR(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, step, gamma, beta, relu)
    if (gamma && beta) AFFINE(gamma, beta, 0);
    else if (gamma) AFFINE(gamma, NULL, 0);
    else if (beta) AFFINE(NULL, beta, 0);
    else if (relu) AFFINE(NULL, NULL, 1);
    else AFFINE(NULL, NULL, 0);
#undef AFFINE
}

/* Unless dy is far from zero, a product with gamma is rounded as it was when the pivot was found: a row of one number gives exactly 0. */
NX_INLINE void WR(combine_vector)(const T *x, const T *dy, T *dx, ptrdiff_t left, int whole, V x_pivot, V minus_pivot, V a, V b, V rest,
                                  const C *gamma, const FN(gate) * gate, int far, const T *more)
{
    V d = OP(sub)(FN(some)(x, left, whole, ZERO), x_pivot), c = ZERO;
    if (gamma) c = FN(coefficients)(gamma, left, whole);
    V g = FN(some)(dy, left, whole, ZERO);
    if (far) g = FN(gradient)(g, d, gamma ? &c : NULL, gate, &minus_pivot);
    else g = OP(add)(FN(gradient)(g, d, gamma ? &c : NULL, gate, NULL), minus_pivot);
    V v = OP(fma)(g, a, OP(fma)(d, b, rest));
    if (more) v = OP(add)(v, FN(some)(more, left, whole, ZERO));
    WR(put)(dx, left, whole, v);
}

NX_INLINE void WR(combine_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                ptrdiff_t runs, ptrdiff_t n, double mean, double pivot, const double *a, ptrdiff_t step, double b,
                                double c, const C *gamma, const nx_relu *relu, int far, const T *more, ptrdiff_t more_stride)
{
    const C x_pivot = (C)mean, g_pivot = (C)pivot;
    const V xp = OP(set)(x_pivot), minus = OP(set)(-g_pivot), vb = OP(set)((C)b);
    FN(gate) gate;
    if (relu) gate = (FN(gate)){OP(set)((C)*relu->scale), OP(set)(FN(rest)(mean, *relu->scale, *relu->shift))};
    V va = ZERO, rest = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride, dx += dx_stride, a += step) {
        if (r == 0 || step) {
            va = OP(set)((C)*a);
            rest = OP(set)((C)(c + *a * g_pivot - b * (mean - x_pivot)));
        }
#define VECTOR(i, left, whole)                                                                                                     \
    WR(combine_vector)(x + i, dy + i, dx + i, left, whole, xp, minus, va, vb, rest, gamma ? gamma + i : NULL, relu ? &gate : NULL, \
                       far, more ? more + i : NULL)
        EACH_VECTOR(dx, n, VECTOR);
#undef VECTOR
        if (more) more += more_stride;
    }
}

static void WR(run_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                            ptrdiff_t runs, ptrdiff_t n, double mean, double pivot, const double *a, ptrdiff_t step, double b, double c,
                            const void *gamma, const nx_relu *relu, const void *more, ptrdiff_t more_stride)
{
#define COMBINE(gamma, relu, far, more)                                                                                      \
    WR(combine_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, runs, n, mean, pivot, a, step, b, c, gamma, relu, far, more, \
                     more_stride)
    if (gamma && n == 1) COMBINE(gamma, NULL, 0, more);
    else if (gamma && more) COMBINE(gamma, NULL, 1, more);
    else if (gamma) COMBINE(gamma, NULL, 1, NULL);
    else if (more) COMBINE(NULL, NULL, 1, more);
    else if (relu) COMBINE(NULL, relu, 1, NULL);
    else COMBINE(NULL, NULL, 1, NULL);
#undef COMBINE
}

NX_INLINE void WR(normalize_rows_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n,
                                       int centred, double eps, const C *gamma, const C *beta, double *mean, double *rstd)
{
    const double zero = 0;
    for (ptrdiff_t count; rows > 0; rows -= count, x += count * x_stride, y += count * y_stride, mean += count, rstd += count) {
        count = FN(rows_abreast)(rows, n);
        FN(statistics_abreast)(x, x_stride, count, n, centred, eps, mean, rstd);
        for (ptrdiff_t r = 0; r < count; r++)
            WR(affine_loop)(x + r * x_stride, 0, y + r * y_stride, 0, 1, n, mean + r, rstd + r, &zero, 0, gamma, beta, 0);
    }
}

static void WR(normalize_rows)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, int centred,
                               double eps, const void *gamma, const void *beta, double *mean, double *rstd)
{
    if (gamma && beta) WR(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, beta, mean, rstd);
    else if (gamma) WR(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, NULL, mean, rstd);
    else if (beta) WR(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, beta, mean, rstd);
    else WR(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, NULL, mean, rstd);
}

NX_INLINE void WR(rows_backward_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                      ptrdiff_t rows, ptrdiff_t n, int centred, const C *gamma, const double *mean, const double *rstd,
                                      const T *more, ptrdiff_t more_stride)
{
    double sum[ABREAST], dot[ABREAST], each = 1 / (double)n;
    for (ptrdiff_t count, first = 0; first < rows; first += count) {
        count = FN(rows_abreast)(rows - first, n);
        for (ptrdiff_t i = 0; i < count; i++) {
            ptrdiff_t r = first + i;
            sum[i] = dot[i] = 0;
            FN(dots_loop)(x + r * x_stride, 0, dy + r * dy_stride, 0, 1, n, mean[r], NULL, gamma, NULL, sum + i, dot + i, 0);
        }
        for (ptrdiff_t i = 0; i < count; i++) {
            ptrdiff_t r = first + i;
            double g_mean = centred ? sum[i] * each : 0;
            const T *more_row = more ? more + r * more_stride : NULL;
            int far = FN(is_far)(dy + r * dy_stride, n, gamma, g_mean);
            if (far) {
                sum[i] = dot[i] = 0;
                FN(dots_about)(x + r * x_stride, 0, dy + r * dy_stride, 0, 1, n, mean[r], &g_mean, gamma, NULL, sum + i, dot + i, 0);
                g_mean = sum[i] * each;
            }
            double slope = -rstd[r] * rstd[r] * rstd[r] * (dot[i] * each), constant = -rstd[r] * g_mean;
            if (far)
                WR(run_combine)(x + r * x_stride, 0, dy + r * dy_stride, 0, dx + r * dx_stride, 0, 1, n, mean[r], g_mean, rstd + r, 0,
                                slope, constant, gamma, NULL, more_row, 0);
            else
                WR(combine_loop)(x + r * x_stride, 0, dy + r * dy_stride, 0, dx + r * dx_stride, 0, 1, n, mean[r], g_mean, rstd + r, 0,
                                 slope, constant, gamma, NULL, 0, more_row, 0);
        }
    }
}

static void WR(rows_backward)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                              ptrdiff_t rows, ptrdiff_t n, int centred, const void *gamma, const double *mean, const double *rstd,
                              const void *more, ptrdiff_t more_stride)
{
#define ROWS(gamma, more) \
    WR(rows_backward_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, rows, n, centred, gamma, mean, rstd, more, more_stride)
    if (gamma && more) ROWS(gamma, more);
    else if (gamma) ROWS(gamma, NULL);
    else if (more) ROWS(NULL, more);
    else ROWS(NULL, NULL);
#undef ROWS
}

static ptrdiff_t WR(groups_backward)(const void *x_, ptrdiff_t x_group, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_group,
                                     ptrdiff_t dy_stride, void *dx_, ptrdiff_t dx_group, ptrdiff_t dx_stride, ptrdiff_t groups,
                                     ptrdiff_t runs, ptrdiff_t n, const void *gamma_, ptrdiff_t channel, ptrdiff_t channels,
                                     const double *mean, const double *rstd, double *sum, double *dot)
{
    const T *x = x_, *dy = dy_;
    T *dx = dx_;
    const C *gamma = gamma_;
    const double each = 1 / ((double)runs * (double)n);
    for (ptrdiff_t g = 0; g < groups; g++, x += x_group, dy += dy_group, dx += dx_group, sum += runs, dot += runs) {
        double dy_sum = 0, g_sum = 0, g_dot = 0;
        for (ptrdiff_t r = 0; r < runs; r++) {
            double factor = gamma ? (double)gamma[channel + r] : 1;
            double run_sum = 0, run_dot = 0;
            FN(dots_loop)(x + r * x_stride, 0, dy + r * dy_stride, 0, 1, n, mean[g], NULL, NULL, NULL, &run_sum, &run_dot, 0);
            sum[r] = run_sum;
            dot[r] = run_dot * rstd[g];
            dy_sum += sum[r];
            g_sum += factor * sum[r];
            g_dot += factor * dot[r];
        }
        if (FN(is_far)(dy, n, NULL, dy_sum * each)) return g;
        double slope = -rstd[g] * rstd[g] * (g_dot * each), constant = -rstd[g] * (g_sum * each);
        for (ptrdiff_t r = 0; r < runs; r++) {
            double a = gamma ? rstd[g] * (double)gamma[channel + r] : rstd[g];
            WR(combine_loop)(x + r * x_stride, 0, dy + r * dy_stride, 0, dx + r * dx_stride, 0, 1, n, mean[g], 0, &a, 0, slope,
                             constant, NULL, NULL, 0, NULL, 0);
        }
        channel += runs;
        if (channel == channels) channel = 0;
    }
    return groups;
}

NX_INLINE void WR(col_affine_row)(const T *x, T *y, ptrdiff_t cols, const C *pivot, const C *scale, const C *rest, int relu)
{
#define VECTOR(j, left, whole)                                                  \
    do {                                                                        \
        V d = OP(sub)(FN(some)(x + j, left, whole, ZERO), OP(load)(pivot + j)); \
        V v = OP(fma)(d, OP(load)(scale + j), OP(load)(rest + j));              \
        WR(put)(y + j, left, whole, relu ? OP(max)(ZERO, v) : v);               \
    } while (0)
    EACH_VECTOR(y, cols, VECTOR);
#undef VECTOR
}

static void WR(col_affine)(const void *x_, ptrdiff_t x_stride, void *y_, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t cols,
                           const double *mean, const double *scale, const double *shift, int relu)
{
    C pivot[PADDED], a[PADDED], b[PADDED];
    for (ptrdiff_t j0 = 0, width; j0 < cols; j0 += width) {
        const T *x = (const T *)x_ + j0;
        T *y = (T *)y_ + j0;
        width = FN(ordinary)(mean + j0, scale + j0, cols - j0 < STRIP ? cols - j0 : STRIP);
        if (width == 0) {
            width = 1;
            for (ptrdiff_t i = 0; i < rows; i++)
                WR(affine_far_out)(x + i * x_stride, y + i * y_stride, 1, mean[j0], scale[j0], shift[j0], NULL, NULL, relu);
            continue;
        }
        nx_fold folded = fold_rows(rows, width, x_stride == width && y_stride == width, UNIT, STRIP);
        const ptrdiff_t x_step = folded.fold * x_stride, y_step = folded.fold * y_stride;
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (C)mean[j0 + j];
            a[j] = (C)scale[j0 + j];
            b[j] = FN(rest)(mean[j0 + j], scale[j0 + j], shift[j0 + j]);
        }
        FN(spread)(pivot, folded);
        FN(spread)(a, folded);
        FN(spread)(b, folded);
#define AFFINE_ROW(i, n) WR(col_affine_row)(x + i * x_step, y + i * y_step, n, pivot, a, b, 0)
#define RELU_ROW(i, n) WR(col_affine_row)(x + i * x_step, y + i * y_step, n, pivot, a, b, 1)
        if (relu) EACH_ROW(folded, RELU_ROW);
        else EACH_ROW(folded, AFFINE_ROW);
#undef AFFINE_ROW
#undef RELU_ROW
    }
}

NX_INLINE void WR(col_combine_row)(const T *x, const T *dy, T *dx, ptrdiff_t cols, const C *x_pivot, const C *minus_pivot, const C *a,
                                   const C *b, const C *rest, const C *gate_scale, const C *gate_rest)
{
#define VECTOR(j, left, whole)                                                                                       \
    do {                                                                                                             \
        V d = OP(sub)(FN(some)(x + j, left, whole, ZERO), OP(load)(x_pivot + j)), minus = OP(load)(minus_pivot + j); \
        FN(gate) gate;                                                                                               \
        if (gate_scale) gate = (FN(gate)){OP(load)(gate_scale + j), OP(load)(gate_rest + j)};                        \
        V g = FN(gradient)(FN(some)(dy + j, left, whole, ZERO), d, NULL, gate_scale ? &gate : NULL, &minus);         \
        WR(put)(dx + j, left, whole, OP(fma)(g, OP(load)(a + j), OP(fma)(d, OP(load)(b + j), OP(load)(rest + j))));  \
    } while (0)
    EACH_VECTOR(dx, cols, VECTOR);
#undef VECTOR
}

static void WR(col_combine)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, void *dx_, ptrdiff_t dx_stride,
                            ptrdiff_t rows, ptrdiff_t cols, const double *mean, const double *pivot, const double *a, const double *b,
                            const double *c, const nx_relu *relu)
{
    C x_pivot[PADDED], minus[PADDED], ta[PADDED], tb[PADDED], rest[PADDED], gate_scale[PADDED], gate_rest[PADDED];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        T *dx = (T *)dx_ + j0;
        nx_fold folded = fold_rows(rows, width, x_stride == width && dy_stride == width && dx_stride == width, UNIT, STRIP);
        const ptrdiff_t x_step = folded.fold * x_stride, dy_step = folded.fold * dy_stride, dx_step = folded.fold * dx_stride;
        for (ptrdiff_t j = 0; j < width; j++) {
            x_pivot[j] = (C)mean[j0 + j];
            minus[j] = -(C)pivot[j0 + j];
            ta[j] = (C)a[j0 + j];
            tb[j] = (C)b[j0 + j];
            rest[j] = (C)(c[j0 + j] - a[j0 + j] * minus[j] - b[j0 + j] * (mean[j0 + j] - x_pivot[j]));
        }
        FN(spread)(x_pivot, folded);
        FN(spread)(minus, folded);
        FN(spread)(ta, folded);
        FN(spread)(tb, folded);
        FN(spread)(rest, folded);
#define COMBINE(i, n, scale, shift) \
    WR(col_combine_row)(x + i * x_step, dy + i * dy_step, dx + i * dx_step, n, x_pivot, minus, ta, tb, rest, scale, shift)
#define COMBINE_ROW(i, n) COMBINE(i, n, NULL, NULL)
#define GATED_ROW(i, n) COMBINE(i, n, gate_scale, gate_rest)
        if (relu) {
            FN(gates)(relu, mean, j0, width, folded, gate_scale, gate_rest);
            EACH_ROW(folded, GATED_ROW);
        } else {
            EACH_ROW(folded, COMBINE_ROW);
        }
#undef COMBINE
#undef COMBINE_ROW
#undef GATED_ROW
    }
}

const nx_kernels TABLE = {
    .itemsize = sizeof(T),
    .parameter_size = sizeof(C),
    .run_block = RUN_BLOCK,
    .col_block = COL_BLOCK,
    .col_rows = COL_ROWS,
    .range = T_RANGE,
    .run_moments = FN(run_moments),
    .col_moments = FN(col_moments),
    .run_affine = WR(run_affine),
    .col_affine = WR(col_affine),
    .run_is_far = FN(run_is_far),
    .cols_are_far = FN(cols_are_far),
    .run_dots = FN(run_dots),
    .col_dots = FN(col_dots),
    .row_dots = FN(row_dots),
    .run_combine = WR(run_combine),
    .col_combine = WR(col_combine),
    .row_statistics = FN(row_statistics),
    .normalize_rows = WR(normalize_rows),
    .rows_backward = WR(rows_backward),
    .groups_backward = WR(groups_backward),
    .add_runs = FN(add_runs),
#ifdef T_INT
    .transpose = FN(transpose_rows),
    .pool_row = FN(pool_row),
    .adam = FN(adam),
#endif
};

#undef STREAM
#undef TABLE
#undef WR
#undef EACH_VECTOR
