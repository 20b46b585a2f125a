/* The primitives of kernels.h, written once over the element type T with the vectors E of simd.h. */

#define OP(name) NX_OP(E, name)
#define V OP(t)
#define W OP(W)
#define LANES ((ptrdiff_t)(128 / sizeof(T))) /* a sum has this many lanes on every instruction set: 2 AVX-512 or 4 AVX2 vectors */
#define NV (LANES / W)
#define RUN_BLOCK ((ptrdiff_t)(16384 / sizeof(T))) /* x and y of a block stay in the L1 cache together */
#define PIECE (8 * LANES)
#define COL_ROWS 128
#define STRIP ((ptrdiff_t)(4096 / sizeof(T))) /* columns whose coefficients and sums are held on the stack, in the L1 cache */
#define GROUP 8 /* rows that share one load and store of a column's sums */
#define ZERO OP(set)(0)

/* Runs ----------------------------------------------------------------------------------------------------------------------- */

NX_INLINE T OP(sum_lanes)(V *lanes)
{
    for (int half = NV / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = OP(add)(lanes[k], lanes[k + half]);
    return OP(sum)(lanes[0]);
}

NX_INLINE double OP(run_sum)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, T scale)
{
    V s[NV], factor = OP(set)(scale), zero = ZERO;
    for (int k = 0; k < NV; k++) s[k] = zero;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(OP(load)(x + i + k * W), factor, s[k]);
        if (i < n)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(OP(load_n)(x + i + k * W, n - i - k * W, zero), factor, s[k]);
    }
    return (double)OP(sum_lanes)(s) / scale;
}

/* Adds a piece of a run to the lanes of sum and squares, through lanes of its own. Adding up in two levels keeps the rounding error of
 * long sums small; and the squares of multiples of some 2^-k have low bits that rounding would lose more often down than up, one by
 * one. */
NX_INLINE void OP(moments_piece)(const T *x, ptrdiff_t n, V p, V factor, V offset, V *sum, V *squares)
{
    V s[NV], q[NV];
    ptrdiff_t i = 0;
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < NV; k++) {
            V d = OP(fma)(OP(load)(x + i + k * W), factor, offset);
            s[k] = OP(add)(s[k], d);
            q[k] = OP(fma)(d, d, q[k]);
        }
    if (i < n)
        for (int k = 0; k < NV; k++) {
            V d = OP(fma)(OP(load_n)(x + i + k * W, n - i - k * W, p), factor, offset);
            s[k] = OP(add)(s[k], d);
            q[k] = OP(fma)(d, d, q[k]);
        }
    for (int k = 0; k < NV; k++) {
        sum[k] = OP(add)(sum[k], s[k]);
        squares[k] = OP(add)(squares[k], q[k]);
    }
}

/* Moments about a pivot near the mean. The first block's pivot is its own mean, roughly; later ones' the mean so far, whose
 * distance to the block's mean then enters the merged m2 anyway, with a larger factor than its rounding error has.
 * `scale`, a power of two, keeps the squares in range. */
NX_INLINE nx_moments OP(run_moments_scaled)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, const nx_moments *m, T scale)
{
    double count = (double)runs * (double)n;
    T pivot = (T)(m->count > 0 ? m->mean : OP(run_sum)(x, x_stride, runs, n, scale) / count);
    V s[NV], q[NV], factor = OP(set)(scale), p = OP(set)(pivot), offset = OP(set)(-pivot * scale);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride)
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            OP(moments_piece)(x + i, n - i < PIECE ? n - i : PIECE, p, factor, offset, s, q);
    double sum = OP(sum_lanes)(s), m2 = OP(sum_lanes)(q) - sum * (sum / count);
    return (nx_moments){count, pivot + sum / count / scale, m2 < 0 ? 0 : m2 / scale / scale};
}

/* With a mean of 1 or more there is no underflow to mend: a deviation is 0 or some 1e-8 of the mean, and the rescaled mean itself
 * could overflow. */
NX_INLINE void OP(add_moments)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, nx_moments *m)
{
    nx_moments block = OP(run_moments_scaled)(x, x_stride, runs, n, m, 1);
    if (!isfinite(block.m2))
        block = OP(run_moments_scaled)(x, x_stride, runs, n, m, 1 / T_RESCALE);
    else if (block.m2 < T_TINY * block.count && fabs(block.mean) < 1)
        block = OP(run_moments_scaled)(x, x_stride, runs, n, m, T_RESCALE);
    nx_merge(m, block);
}

static void OP(run_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, nx_moments *m)
{
    OP(add_moments)(x, x_stride, runs, n, m);
}

NX_INLINE void OP(affine_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                               double scale, double shift, const T *gamma, const T *beta)
{
    T pivot = (T)mean;
    V p = OP(set)(pivot), a = OP(set)((T)scale), b = OP(set)((T)(shift - (mean - pivot) * scale)), zero = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, y += y_stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) {
            V v = OP(fma)(OP(sub)(OP(load)(x + i), p), a, b);
            if (gamma && beta) v = OP(fma)(v, OP(load)(gamma + i), OP(load)(beta + i));
            else if (gamma) v = OP(mul)(v, OP(load)(gamma + i));
            else if (beta) v = OP(add)(v, OP(load)(beta + i));
            OP(store)(y + i, v);
        }
        if (i < n) {
            V v = OP(fma)(OP(sub)(OP(load_n)(x + i, n - i, p), p), a, b);
            if (gamma && beta) v = OP(fma)(v, OP(load_n)(gamma + i, n - i, zero), OP(load_n)(beta + i, n - i, zero));
            else if (gamma) v = OP(mul)(v, OP(load_n)(gamma + i, n - i, zero));
            else if (beta) v = OP(add)(v, OP(load_n)(beta + i, n - i, zero));
            OP(store_n)(y + i, n - i, v);
        }
    }
}

static void OP(run_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                           double scale, double shift, const void *gamma, const void *beta)
{
    /* One loop each, so that none asks for every vector what there is to load. */
    if (gamma && beta) OP(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, gamma, beta);
    else if (gamma) OP(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, gamma, NULL);
    else if (beta) OP(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, NULL, beta);
    else OP(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, NULL, NULL);
}

NX_INLINE void OP(dots_piece)(const T *x, const T *dy, ptrdiff_t n, V p, const T *gamma, V *sum, V *dot)
{
    V s[NV], q[NV], zero = ZERO;
    ptrdiff_t i = 0;
    for (int k = 0; k < NV; k++) s[k] = q[k] = zero;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < NV; k++) {
            V g = OP(load)(dy + i + k * W);
            if (gamma) g = OP(mul)(g, OP(load)(gamma + i + k * W));
            s[k] = OP(add)(s[k], g);
            q[k] = OP(fma)(g, OP(sub)(OP(load)(x + i + k * W), p), q[k]);
        }
    if (i < n)
        for (int k = 0; k < NV; k++) {
            ptrdiff_t left = n - i - k * W;
            V g = OP(load_n)(dy + i + k * W, left, zero);
            if (gamma) g = OP(mul)(g, OP(load_n)(gamma + i + k * W, left, zero));
            s[k] = OP(add)(s[k], g);
            q[k] = OP(fma)(g, OP(sub)(OP(load_n)(x + i + k * W, left, p), p), q[k]);
        }
    for (int k = 0; k < NV; k++) {
        sum[k] = OP(add)(sum[k], s[k]);
        dot[k] = OP(add)(dot[k], q[k]);
    }
}

NX_INLINE void OP(dots_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                             const T *gamma, double *sum, double *dot)
{
    T pivot = (T)mean;
    V s[NV], q[NV], p = OP(set)(pivot);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride)
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            OP(dots_piece)(x + i, dy + i, n - i < PIECE ? n - i : PIECE, p, gamma ? gamma + i : NULL, s, q);
    double block_sum = OP(sum_lanes)(s);
    *sum += block_sum;
    *dot += OP(sum_lanes)(q) - (mean - pivot) * block_sum;
}

static void OP(run_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n,
                         double mean, const void *gamma, double *sum, double *dot)
{
    if (gamma) OP(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, gamma, sum, dot);
    else OP(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, sum, dot);
}

NX_INLINE void OP(combine_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                ptrdiff_t runs, ptrdiff_t n, double mean, double g_mean, double a, double b, double c, const T *gamma)
{
    T x_pivot = (T)mean, g_pivot = (T)g_mean;
    V xp = OP(set)(x_pivot), gp = OP(set)(g_pivot), va = OP(set)((T)a), vb = OP(set)((T)b), zero = ZERO;
    V rest = OP(set)((T)(c - a * (g_mean - g_pivot) - b * (mean - x_pivot)));
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride, dx += dx_stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) {
            V g = OP(load)(dy + i);
            if (gamma) g = OP(mul)(g, OP(load)(gamma + i));
            V v = OP(fma)(OP(sub)(OP(load)(x + i), xp), vb, rest);
            OP(store)(dx + i, OP(fma)(OP(sub)(g, gp), va, v));
        }
        if (i < n) {
            V g = OP(load_n)(dy + i, n - i, zero);
            if (gamma) g = OP(mul)(g, OP(load_n)(gamma + i, n - i, zero));
            V v = OP(fma)(OP(sub)(OP(load_n)(x + i, n - i, zero), xp), vb, rest);
            OP(store_n)(dx + i, n - i, OP(fma)(OP(sub)(g, gp), va, v));
        }
    }
}

static void OP(run_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                            ptrdiff_t runs, ptrdiff_t n, double mean, double g_mean, double a, double b, double c, const void *gamma)
{
    if (gamma) OP(combine_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, runs, n, mean, g_mean, a, b, c, gamma);
    else OP(combine_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, runs, n, mean, g_mean, a, b, c, NULL);
}

NX_INLINE void OP(normalize_rows_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n,
                                       int centred, double eps, const T *gamma, const T *beta, double *mean, double *rstd)
{
    for (ptrdiff_t r = 0; r < rows; r++, x += x_stride, y += y_stride) {
        nx_moments m = {0, 0, 0};
        OP(add_moments)(x, 0, 1, n, &m);
        nx_finish_moments(m, centred, eps, mean + r, rstd + r, NULL);
        OP(affine_loop)(x, 0, y, 0, 1, n, mean[r], rstd[r], 0, gamma, beta);
    }
}

static void OP(normalize_rows)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, int centred,
                               double eps, const void *gamma, const void *beta, double *mean, double *rstd)
{
    if (gamma && beta) OP(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, beta, mean, rstd);
    else if (gamma) OP(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, NULL, mean, rstd);
    else if (beta) OP(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, beta, mean, rstd);
    else OP(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, NULL, mean, rstd);
}

NX_INLINE void OP(rows_backward_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                      ptrdiff_t rows, ptrdiff_t n, int centred, const T *gamma, const double *mean,
                                      const double *rstd)
{
    for (ptrdiff_t r = 0; r < rows; r++, x += x_stride, dy += dy_stride, dx += dx_stride) {
        double sum = 0, dot = 0;
        OP(dots_loop)(x, 0, dy, 0, 1, n, mean[r], gamma, &sum, &dot);
        OP(combine_loop)(x, 0, dy, 0, dx, 0, 1, n, mean[r], centred ? sum / (double)n : 0, rstd[r],
                         -rstd[r] * rstd[r] * rstd[r] * (dot / (double)n), 0, gamma);
    }
}

static void OP(rows_backward)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                              ptrdiff_t rows, ptrdiff_t n, int centred, const void *gamma, const double *mean, const double *rstd)
{
    if (gamma) OP(rows_backward_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, rows, n, centred, gamma, mean, rstd);
    else OP(rows_backward_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, rows, n, centred, NULL, mean, rstd);
}

/* Columns -------------------------------------------------------------------------------------------------------------------- *
 *
 * A strip of columns at a time; within it row by row, so that memory is read in order, GROUP rows abreast, whose sums are added to
 * the strip's (two levels, as in moments_piece). The strip's coefficients and sums are arrays of T on the stack, padded to whole
 * vectors. Each loop is written for `rows` rows at once; with a constant there the compiler unrolls it. */

#define STRIPS(j0, width)                                                                                              \
    for (ptrdiff_t j0 = 0, width; j0 < cols && (width = cols - j0 < STRIP ? cols - j0 : STRIP, 1); j0 += STRIP)

/* Calls f(first row, rows) with GROUP rows at a time, then one by one. */
#define ROW_GROUPS(rows, i, f)                                                                                         \
    do {                                                                                                               \
        ptrdiff_t i = 0;                                                                                               \
        for (; i + GROUP <= (rows); i += GROUP) { f(GROUP); }                                                          \
        for (; i < (rows); i++) { f(1); }                                                                              \
    } while (0)

NX_INLINE void OP(col_sum_group)(const T *x, ptrdiff_t x_stride, int rows, ptrdiff_t cols, const T *factor, T *s)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = OP(load)(s + j), f = OP(load)(factor + j);
        if (cols - j >= W)
            for (int r = 0; r < rows; r++) sum = OP(fma)(OP(load)(x + r * x_stride + j), f, sum);
        else
            for (int r = 0; r < rows; r++) sum = OP(fma)(OP(load_n)(x + r * x_stride + j, cols - j, ZERO), f, sum);
        OP(store)(s + j, sum);
    }
}

NX_INLINE void OP(col_moments_group)(const T *x, ptrdiff_t x_stride, int rows, ptrdiff_t cols, const T *factor, const T *offset, T *s,
                                     T *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, squares = ZERO, f = OP(load)(factor + j), o = OP(load)(offset + j);
        for (int r = 0; r < rows; r++) {
            const T *row = x + r * x_stride + j;
            V v = cols - j >= W ? OP(load)(row) : OP(load_n)(row, cols - j, ZERO);
            V d = OP(fma)(v, f, o);
            sum = OP(add)(sum, d);
            squares = OP(fma)(d, d, squares);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), squares));
    }
}

/* Whether the squares of a block's column left the range of T. */
NX_INLINE int OP(out_of_range)(T squares, T pivot, ptrdiff_t rows)
{
    return (!isfinite(squares)) | ((squares < T_TINY * (T)rows) & (pivot < 1) & (pivot > -1));
}

/* Merges the sums of columns, about their pivots and times their factors, into mean and m2. */
NX_INLINE void OP(merge_columns)(ptrdiff_t cols, ptrdiff_t rows, const T *pivot, const T *factor, const T *s, const T *q, double count,
                                 double *NX_RESTRICT mean, double *NX_RESTRICT m2)
{
    double n = (double)rows, each = 1 / n, share = n / (count + n);
    for (ptrdiff_t j = 0; j < cols; j++) {
        double back = 1 / (double)factor[j], sum = s[j], block_m2 = q[j] - sum * (sum * each);
        double block_mean = pivot[j] + sum * each * back;
        block_m2 = block_m2 < 0 ? 0 : block_m2 * back * back;
        if (count == 0) {
            mean[j] = block_mean;
            m2[j] = block_m2;
        } else {
            nx_merge_share(mean + j, m2 + j, block_mean, block_m2, count, share);
        }
    }
}

/* The moments of a strip's block of rows, merged into mean and m2; see run_moments_scaled. A column that was found out of range
 * with factor 1 is done again with another: one vector of columns at a time, in which the good ones keep theirs. */
static void OP(col_moments_strip)(const T *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, double count, double *mean, double *m2,
                                  const T *factor, int again)
{
    T pivot[STRIP], offset[STRIP], s[STRIP], q[STRIP];
    ptrdiff_t padded = (cols + W - 1) / W * W;
    for (ptrdiff_t j = 0; j < padded; j++) s[j] = q[j] = 0;
    if (count == 0) {
#define SUM_GROUP(n) OP(col_sum_group)(x + i * x_stride, x_stride, n, cols, factor, s)
        ROW_GROUPS(rows, i, SUM_GROUP);
#undef SUM_GROUP
        for (ptrdiff_t j = 0; j < cols; j++) pivot[j] = (T)((double)s[j] / factor[j] / (double)rows);
    } else {
        for (ptrdiff_t j = 0; j < cols; j++) pivot[j] = (T)mean[j];
    }
    for (ptrdiff_t j = cols; j < padded; j++) pivot[j] = 0;
    for (ptrdiff_t j = 0; j < padded; j++) {
        offset[j] = -pivot[j] * factor[j];
        s[j] = 0;
    }
#define MOMENTS_GROUP(n) OP(col_moments_group)(x + i * x_stride, x_stride, n, cols, factor, offset, s, q)
    ROW_GROUPS(rows, i, MOMENTS_GROUP);
#undef MOMENTS_GROUP
    int bad = 0;
    for (ptrdiff_t j = 0; j < cols; j++) bad |= OP(out_of_range)(q[j], pivot[j], rows);
    if (again || !bad) {
        OP(merge_columns)(cols, rows, pivot, factor, s, q, count, mean, m2);
        return;
    }
    for (ptrdiff_t j0 = 0; j0 < cols; j0 += W) {
        ptrdiff_t width = cols - j0 < W ? cols - j0 : W;
        T rescaled[W];
        bad = 0;
        for (ptrdiff_t j = 0; j < W; j++) {
            int out = OP(out_of_range)(q[j0 + j], pivot[j0 + j], rows);
            rescaled[j] = !out ? 1 : isfinite(q[j0 + j]) ? T_RESCALE : 1 / T_RESCALE;
            bad |= j < width && out;
        }
        if (bad) OP(col_moments_strip)(x + j0, x_stride, rows, width, count, mean + j0, m2 + j0, rescaled, 1);
        else OP(merge_columns)(width, rows, pivot + j0, factor + j0, s + j0, q + j0, count, mean + j0, m2 + j0);
    }
}

static void OP(col_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, double count, double *mean, double *m2)
{
    T ones[STRIP];
    for (ptrdiff_t j = 0; j < STRIP && j < cols + W; j++) ones[j] = 1;
    STRIPS (j0, width)
        OP(col_moments_strip)((const T *)x + j0, x_stride, rows, width, count, mean + j0, m2 + j0, ones, 0);
}

/* What is written goes row by row: half as many streams through memory as GROUP rows of both would be. */
NX_INLINE void OP(col_affine_row)(const T *x, T *y, ptrdiff_t cols, const T *pivot, const T *scale, const T *shift)
{
    ptrdiff_t j = 0;
    for (; j + W <= cols; j += W) {
        V d = OP(sub)(OP(load)(x + j), OP(load)(pivot + j));
        OP(store)(y + j, OP(fma)(d, OP(load)(scale + j), OP(load)(shift + j)));
    }
    if (j < cols) {
        V d = OP(sub)(OP(load_n)(x + j, cols - j, ZERO), OP(load)(pivot + j));
        OP(store_n)(y + j, cols - j, OP(fma)(d, OP(load)(scale + j), OP(load)(shift + j)));
    }
}

static void OP(col_affine)(const void *x_, ptrdiff_t x_stride, void *y_, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t cols,
                           const double *mean, const double *scale, const double *shift)
{
    T pivot[STRIP], a[STRIP], b[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0;
        T *y = (T *)y_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (T)mean[j0 + j];
            a[j] = (T)scale[j0 + j];
            b[j] = (T)(shift[j0 + j] - (mean[j0 + j] - pivot[j]) * scale[j0 + j]);
        }
        for (ptrdiff_t i = 0; i < rows; i++) OP(col_affine_row)(x + i * x_stride, y + i * y_stride, width, pivot, a, b);
    }
}

NX_INLINE void OP(col_dots_group)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, int rows, ptrdiff_t cols,
                                  const T *pivot, T *s, T *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, dot = ZERO, p = OP(load)(pivot + j);
        for (int r = 0; r < rows; r++) {
            const T *xr = x + r * x_stride + j, *gr = dy + r * dy_stride + j;
            V v = cols - j >= W ? OP(load)(xr) : OP(load_n)(xr, cols - j, p);
            V g = cols - j >= W ? OP(load)(gr) : OP(load_n)(gr, cols - j, ZERO);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, OP(sub)(v, p), dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void OP(col_dots)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                         const double *mean, double *sum, double *dot)
{
    T pivot[STRIP], s[STRIP], q[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (T)mean[j0 + j];
            s[j] = q[j] = 0;
        }
#define DOTS_GROUP(n) OP(col_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, pivot, s, q)
        ROW_GROUPS(rows, i, DOTS_GROUP);
#undef DOTS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += s[j];
            dot[j0 + j] += q[j] - (mean[j0 + j] - pivot[j]) * s[j];
        }
    }
}

NX_INLINE void OP(row_dots_group)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, int rows, ptrdiff_t cols,
                                  const double *mean, const double *scale, T *s, T *q)
{
    V p[GROUP], a[GROUP], b[GROUP];
    for (int r = 0; r < rows; r++) {
        T pivot = (T)mean[r];
        p[r] = OP(set)(pivot);
        a[r] = OP(set)((T)scale[r]);
        b[r] = OP(set)((T)((pivot - mean[r]) * scale[r]));
    }
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, dot = ZERO;
        for (int r = 0; r < rows; r++) {
            const T *xr = x + r * x_stride + j, *gr = dy + r * dy_stride + j;
            V v = cols - j >= W ? OP(load)(xr) : OP(load_n)(xr, cols - j, p[r]);
            V g = cols - j >= W ? OP(load)(gr) : OP(load_n)(gr, cols - j, ZERO);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, OP(fma)(OP(sub)(v, p[r]), a[r], b[r]), dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void OP(row_dots)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                         const double *mean, const double *scale, double *sum, double *dot)
{
    T s[STRIP], q[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) s[j] = q[j] = 0;
#define DOTS_GROUP(n) OP(row_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, mean + i, scale + i, s, q)
        ROW_GROUPS(rows, i, DOTS_GROUP);
#undef DOTS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += s[j];
            dot[j0 + j] += q[j];
        }
    }
}

NX_INLINE void OP(col_combine_row)(const T *x, const T *dy, T *dx, ptrdiff_t cols, const T *x_pivot, const T *dy_pivot, const T *a,
                                   const T *b, const T *rest)
{
    ptrdiff_t j = 0;
    for (; j + W <= cols; j += W) {
        V v = OP(fma)(OP(sub)(OP(load)(x + j), OP(load)(x_pivot + j)), OP(load)(b + j), OP(load)(rest + j));
        OP(store)(dx + j, OP(fma)(OP(sub)(OP(load)(dy + j), OP(load)(dy_pivot + j)), OP(load)(a + j), v));
    }
    if (j < cols) {
        ptrdiff_t left = cols - j;
        V v = OP(fma)(OP(sub)(OP(load_n)(x + j, left, ZERO), OP(load)(x_pivot + j)), OP(load)(b + j), OP(load)(rest + j));
        OP(store_n)(dx + j, left, OP(fma)(OP(sub)(OP(load_n)(dy + j, left, ZERO), OP(load)(dy_pivot + j)), OP(load)(a + j), v));
    }
}

static void OP(col_combine)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, void *dx_, ptrdiff_t dx_stride,
                            ptrdiff_t rows, ptrdiff_t cols, const double *mean, const double *dy_mean, const double *a, const double *b)
{
    T x_pivot[STRIP], dy_pivot[STRIP], ta[STRIP], tb[STRIP], rest[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        T *dx = (T *)dx_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            x_pivot[j] = (T)mean[j0 + j];
            dy_pivot[j] = (T)dy_mean[j0 + j];
            ta[j] = (T)a[j0 + j];
            tb[j] = (T)b[j0 + j];
            rest[j] = (T)(-a[j0 + j] * (dy_mean[j0 + j] - dy_pivot[j]) - b[j0 + j] * (mean[j0 + j] - x_pivot[j]));
        }
        for (ptrdiff_t i = 0; i < rows; i++)
            OP(col_combine_row)(x + i * x_stride, dy + i * dy_stride, dx + i * dx_stride, width, x_pivot, dy_pivot, ta, tb, rest);
    }
}

/* Windows over images --------------------------------------------------------------------------------------------------------- */

static void OP(transpose_rows)(const void *x_, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, void *y_, ptrdiff_t y_stride)
{
    const T *x = x_;
    T *y = y_;
    const ptrdiff_t side = OP(SIDE), whole_rows = rows / side * side, whole_cols = cols / side * side;
    for (ptrdiff_t j = 0; j < whole_cols; j += side)
        for (ptrdiff_t i = 0; i < whole_rows; i += side)
            OP(transpose)(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t j = i < whole_rows ? whole_cols : 0; j < cols; j++) y[j * y_stride + i] = x[i * x_stride + j];
}

static void OP(add_run)(const void *x_, void *y_, ptrdiff_t n)
{
    const T *x = x_;
    T *y = y_;
    ptrdiff_t i = 0;
    for (; i + W <= n; i += W) OP(store)(y + i, OP(add)(OP(load)(y + i), OP(load)(x + i)));
    for (; i < n; i++) y[i] += x[i];
}

#define POOL_BLOCK 128

NX_INLINE void OP(pool_position)(const T *x, ptrdiff_t step, ptrdiff_t n, T_INT position, T *NX_RESTRICT best,
                                 T_INT *NX_RESTRICT winner)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        T v = x[i * step];
        int better = !(v <= best[i]) & (best[i] == best[i]);
        best[i] = better ? v : best[i];
        winner[i] = better ? position : winner[i];
    }
}

static void OP(pool_row)(const void *x_, ptrdiff_t x_stride, ptrdiff_t kh, ptrdiff_t kw, ptrdiff_t step, ptrdiff_t n, void *y,
                         void *winner, int winner_size)
{
    T best[POOL_BLOCK];
    T_INT position[POOL_BLOCK];
    for (ptrdiff_t start = 0; start < n; start += POOL_BLOCK) {
        const T *x = (const T *)x_ + start * step;
        ptrdiff_t count = n - start < POOL_BLOCK ? n - start : POOL_BLOCK;
        for (ptrdiff_t i = 0; i < count; i++) {
            best[i] = x[i * step];
            position[i] = 0;
        }
        for (ptrdiff_t k = 1; k < kh * kw; k++) {
            const T *from = x + k / kw * x_stride + k % kw;
            /* With the common steps as constants the compiler uses vectors. */
            if (step == 1) OP(pool_position)(from, 1, count, (T_INT)k, best, position);
            else if (step == 2) OP(pool_position)(from, 2, count, (T_INT)k, best, position);
            else OP(pool_position)(from, step, count, (T_INT)k, best, position);
        }
        for (ptrdiff_t i = 0; i < count; i++) ((T *)y)[start + i] = best[i];
        if (winner_size == 1)
            for (ptrdiff_t i = 0; i < count; i++) ((uint8_t *)winner)[start + i] = (uint8_t)position[i];
        else
            for (ptrdiff_t i = 0; i < count; i++) ((int32_t *)winner)[start + i] = (int32_t)position[i];
    }
}

const nx_kernels NX_JOIN(nx, NX_ISA, E) = {
    sizeof(T),
    RUN_BLOCK,
    COL_ROWS,
    OP(run_moments),
    OP(col_moments),
    OP(run_affine),
    OP(col_affine),
    OP(run_dots),
    OP(col_dots),
    OP(row_dots),
    OP(run_combine),
    OP(col_combine),
    OP(normalize_rows),
    OP(rows_backward),
    OP(transpose_rows),
    OP(add_run),
    OP(pool_row),
};

#undef OP
#undef V
#undef W
#undef LANES
#undef NV
#undef RUN_BLOCK
#undef PIECE
#undef COL_ROWS
#undef STRIP
#undef GROUP
#undef ZERO
#undef T
#undef E
#undef T_INT
#undef POOL_BLOCK
#undef T_TINY
#undef T_RESCALE
