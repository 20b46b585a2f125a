/* The primitives of kernels.h, written once over the element type T, named E, and the type C, named EC, that it is computed in. They
 * are one and the same but for 16-bit floats, which loads and stores convert. */

#define FN(name) NX_OP(E, name)  /* loads and stores of elements, and the functions of this file */
#define OP(name) NX_OP(EC, name) /* arithmetic, and loads and stores of coefficients and sums */
#define V OP(t)
#define W OP(W)
#define LANES ((ptrdiff_t)(128 / sizeof(C))) /* a sum has this many lanes on every instruction set: 2 AVX-512 or 4 AVX2 vectors */
#define NV (LANES / W)
#define RUN_BLOCK ((ptrdiff_t)(16384 / sizeof(C))) /* x and y of a block stay in the L1 cache together */
#define PIECE (8 * LANES)
#define COL_ROWS 128
#define STRIP ((ptrdiff_t)(4096 / sizeof(C))) /* columns whose coefficients and sums are held on the stack, in the L1 cache */
#define GROUP 8 /* rows that share one load and store of a column's sums */
#define ZERO OP(set)(0)

/* Runs ----------------------------------------------------------------------------------------------------------------------- */

NX_INLINE C FN(sum_lanes)(V *lanes)
{
    for (int half = NV / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = OP(add)(lanes[k], lanes[k + half]);
    return OP(sum)(lanes[0]);
}

NX_INLINE double FN(run_sum)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, C scale)
{
    V s[NV], factor = OP(set)(scale), zero = ZERO;
    for (int k = 0; k < NV; k++) s[k] = zero;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(FN(load)(x + i + k * W), factor, s[k]);
        if (i < n)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(FN(load_n)(x + i + k * W, n - i - k * W, zero), factor, s[k]);
    }
    return (double)FN(sum_lanes)(s) / scale;
}

/* Adds a piece of a run to the lanes of sum and squares, through lanes of its own. Adding up in two levels keeps the rounding error of
 * long sums small; and the squares of multiples of some 2^-k have low bits that rounding would lose more often down than up, one by
 * one. */
NX_INLINE void FN(moments_piece)(const T *x, ptrdiff_t n, V p, V factor, V offset, V *sum, V *squares)
{
    V s[NV], q[NV];
    ptrdiff_t i = 0;
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < NV; k++) {
            V d = OP(fma)(FN(load)(x + i + k * W), factor, offset);
            s[k] = OP(add)(s[k], d);
            q[k] = OP(fma)(d, d, q[k]);
        }
    if (i < n)
        for (int k = 0; k < NV; k++) {
            V d = OP(fma)(FN(load_n)(x + i + k * W, n - i - k * W, p), factor, offset);
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
NX_INLINE nx_moments FN(run_moments_scaled)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, const nx_moments *m, C scale)
{
    double count = (double)runs * (double)n;
    C pivot = (C)(m->count > 0 ? m->mean : FN(run_sum)(x, x_stride, runs, n, scale) / count);
    V s[NV], q[NV], factor = OP(set)(scale), p = OP(set)(pivot), offset = OP(set)(-pivot * scale);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride)
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            FN(moments_piece)(x + i, n - i < PIECE ? n - i : PIECE, p, factor, offset, s, q);
    double sum = FN(sum_lanes)(s), m2 = FN(sum_lanes)(q) - sum * (sum / count);
    return (nx_moments){count, pivot + sum / count / scale, m2 < 0 ? 0 : m2 / scale / scale};
}

/* With a mean of 1 or more there is no underflow to mend: a deviation is 0 or some 1e-8 of the mean, and the rescaled mean itself
 * could overflow. */
NX_INLINE void FN(add_moments)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, nx_moments *m)
{
    nx_moments block = FN(run_moments_scaled)(x, x_stride, runs, n, m, 1);
    if (!isfinite(block.m2))
        block = FN(run_moments_scaled)(x, x_stride, runs, n, m, 1 / T_RESCALE);
    else if (block.m2 < T_TINY * block.count && fabs(block.mean) < 1)
        block = FN(run_moments_scaled)(x, x_stride, runs, n, m, T_RESCALE);
    nx_merge(m, block);
}

static void FN(run_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, nx_moments *m)
{
    FN(add_moments)(x, x_stride, runs, n, m);
}

/* (x - mean) * scale + shift = (x - pivot) * scale + rest, with the mean rounded to C for a pivot. */
NX_INLINE C FN(rest)(double mean, double scale, double shift) { return (C)(shift - (mean - (C)mean) * scale); }

NX_INLINE void FN(affine_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                               double scale, double shift, const C *gamma, const C *beta, int relu)
{
    V p = OP(set)((C)mean), a = OP(set)((C)scale), b = OP(set)(FN(rest)(mean, scale, shift)), zero = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, y += y_stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) {
            V v = OP(fma)(OP(sub)(FN(load)(x + i), p), a, b);
            if (gamma && beta) v = OP(fma)(v, OP(load)(gamma + i), OP(load)(beta + i));
            else if (gamma) v = OP(mul)(v, OP(load)(gamma + i));
            else if (beta) v = OP(add)(v, OP(load)(beta + i));
            if (relu) v = OP(max)(zero, v);
            FN(store)(y + i, v);
        }
        if (i < n) {
            V v = OP(fma)(OP(sub)(FN(load_n)(x + i, n - i, p), p), a, b);
            if (gamma && beta) v = OP(fma)(v, OP(load_n)(gamma + i, n - i, zero), OP(load_n)(beta + i, n - i, zero));
            else if (gamma) v = OP(mul)(v, OP(load_n)(gamma + i, n - i, zero));
            else if (beta) v = OP(add)(v, OP(load_n)(beta + i, n - i, zero));
            if (relu) v = OP(max)(zero, v);
            FN(store_n)(y + i, n - i, v);
        }
    }
}

static void FN(run_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                           double scale, double shift, const void *gamma, const void *beta, int relu)
{
    /* One loop each, so that none asks for every vector what there is to do. */
    if (gamma && beta) FN(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, gamma, beta, 0);
    else if (gamma) FN(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, gamma, NULL, 0);
    else if (beta) FN(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, NULL, beta, 0);
    else if (relu) FN(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, NULL, NULL, 1);
    else FN(affine_loop)(x, x_stride, y, y_stride, runs, n, mean, scale, shift, NULL, NULL, 0);
}

/* The affine map under a relu, whose backward pass lets a gradient through where the map's result, found again from x as it was found
 * in the forward pass, is above zero. */
typedef struct {
    V scale, rest;
} FN(gate);

NX_INLINE V FN(through)(V g, V d, FN(gate) gate) { return OP(keep_positive)(g, OP(fma)(d, gate.scale, gate.rest)); }

NX_INLINE void FN(dots_piece)(const T *x, const T *dy, ptrdiff_t n, V p, const C *gamma, const FN(gate) *gate, V *sum, V *dot)
{
    V s[NV], q[NV], zero = ZERO;
    ptrdiff_t i = 0;
    for (int k = 0; k < NV; k++) s[k] = q[k] = zero;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < NV; k++) {
            V g = FN(load)(dy + i + k * W), d = OP(sub)(FN(load)(x + i + k * W), p);
            if (gamma) g = OP(mul)(g, OP(load)(gamma + i + k * W));
            if (gate) g = FN(through)(g, d, *gate);
            s[k] = OP(add)(s[k], g);
            q[k] = OP(fma)(g, d, q[k]);
        }
    if (i < n)
        for (int k = 0; k < NV; k++) {
            ptrdiff_t left = n - i - k * W;
            V g = FN(load_n)(dy + i + k * W, left, zero), d = OP(sub)(FN(load_n)(x + i + k * W, left, p), p);
            if (gamma) g = OP(mul)(g, OP(load_n)(gamma + i + k * W, left, zero));
            if (gate) g = FN(through)(g, d, *gate);
            s[k] = OP(add)(s[k], g);
            q[k] = OP(fma)(g, d, q[k]);
        }
    for (int k = 0; k < NV; k++) {
        sum[k] = OP(add)(sum[k], s[k]);
        dot[k] = OP(add)(dot[k], q[k]);
    }
}

NX_INLINE void FN(dots_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                             const C *gamma, const nx_relu *relu, double *sum, double *dot)
{
    C pivot = (C)mean;
    V s[NV], q[NV], p = OP(set)(pivot);
    FN(gate) gate;
    if (relu) gate = (FN(gate)){OP(set)((C)*relu->scale), OP(set)(FN(rest)(mean, *relu->scale, *relu->shift))};
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride)
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            FN(dots_piece)(x + i, dy + i, n - i < PIECE ? n - i : PIECE, p, gamma ? gamma + i : NULL, relu ? &gate : NULL, s, q);
    double block_sum = FN(sum_lanes)(s);
    *sum += block_sum;
    *dot += FN(sum_lanes)(q) - (mean - pivot) * block_sum;
}

static void FN(run_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n,
                         double mean, const void *gamma, const nx_relu *relu, double *sum, double *dot)
{
    if (gamma) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, gamma, NULL, sum, dot);
    else if (relu) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, relu, sum, dot);
    else FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, NULL, sum, dot);
}

NX_INLINE void FN(combine_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                ptrdiff_t runs, ptrdiff_t n, double mean, double g_mean, double a, double b, double c, const C *gamma,
                                const nx_relu *relu, const T *more, ptrdiff_t more_stride)
{
    C x_pivot = (C)mean, g_pivot = (C)g_mean;
    V xp = OP(set)(x_pivot), gp = OP(set)(g_pivot), va = OP(set)((C)a), vb = OP(set)((C)b), zero = ZERO;
    V rest = OP(set)((C)(c - a * (g_mean - g_pivot) - b * (mean - x_pivot)));
    FN(gate) gate;
    if (relu) gate = (FN(gate)){OP(set)((C)*relu->scale), OP(set)(FN(rest)(mean, *relu->scale, *relu->shift))};
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride, dx += dx_stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) {
            V g = FN(load)(dy + i), d = OP(sub)(FN(load)(x + i), xp);
            if (gamma) g = OP(mul)(g, OP(load)(gamma + i));
            if (relu) g = FN(through)(g, d, gate);
            V v = OP(fma)(OP(sub)(g, gp), va, OP(fma)(d, vb, rest));
            if (more) v = OP(add)(v, FN(load)(more + r * more_stride + i));
            FN(store)(dx + i, v);
        }
        if (i < n) {
            V g = FN(load_n)(dy + i, n - i, zero), d = OP(sub)(FN(load_n)(x + i, n - i, zero), xp);
            if (gamma) g = OP(mul)(g, OP(load_n)(gamma + i, n - i, zero));
            if (relu) g = FN(through)(g, d, gate);
            V v = OP(fma)(OP(sub)(g, gp), va, OP(fma)(d, vb, rest));
            if (more) v = OP(add)(v, FN(load_n)(more + r * more_stride + i, n - i, zero));
            FN(store_n)(dx + i, n - i, v);
        }
    }
}

static void FN(run_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                            ptrdiff_t runs, ptrdiff_t n, double mean, double g_mean, double a, double b, double c, const void *gamma,
                            const nx_relu *relu, const void *more, ptrdiff_t more_stride)
{
#define COMBINE(gamma, relu, more) \
    FN(combine_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, runs, n, mean, g_mean, a, b, c, gamma, relu, more, more_stride)
    if (gamma && more) COMBINE(gamma, NULL, more);
    else if (gamma) COMBINE(gamma, NULL, NULL);
    else if (more) COMBINE(NULL, NULL, more);
    else if (relu) COMBINE(NULL, relu, NULL);
    else COMBINE(NULL, NULL, NULL);
#undef COMBINE
}

NX_INLINE void FN(normalize_rows_loop)(const T *x, ptrdiff_t x_stride, T *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n,
                                       int centred, double eps, const C *gamma, const C *beta, double *mean, double *rstd)
{
    for (ptrdiff_t r = 0; r < rows; r++, x += x_stride, y += y_stride) {
        nx_moments m = {0, 0, 0};
        FN(add_moments)(x, 0, 1, n, &m);
        nx_finish_moments(m, centred, eps, mean + r, rstd + r, NULL);
        FN(affine_loop)(x, 0, y, 0, 1, n, mean[r], rstd[r], 0, gamma, beta, 0);
    }
}

static void FN(normalize_rows)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, int centred,
                               double eps, const void *gamma, const void *beta, double *mean, double *rstd)
{
    if (gamma && beta) FN(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, beta, mean, rstd);
    else if (gamma) FN(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, gamma, NULL, mean, rstd);
    else if (beta) FN(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, beta, mean, rstd);
    else FN(normalize_rows_loop)(x, x_stride, y, y_stride, rows, n, centred, eps, NULL, NULL, mean, rstd);
}

NX_INLINE void FN(rows_backward_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, T *dx, ptrdiff_t dx_stride,
                                      ptrdiff_t rows, ptrdiff_t n, int centred, const C *gamma, const double *mean,
                                      const double *rstd, const T *more, ptrdiff_t more_stride)
{
    for (ptrdiff_t r = 0; r < rows; r++, x += x_stride, dy += dy_stride, dx += dx_stride) {
        double sum = 0, dot = 0;
        FN(dots_loop)(x, 0, dy, 0, 1, n, mean[r], gamma, NULL, &sum, &dot);
        FN(combine_loop)(x, 0, dy, 0, dx, 0, 1, n, mean[r], centred ? sum / (double)n : 0, rstd[r],
                         -rstd[r] * rstd[r] * rstd[r] * (dot / (double)n), 0, gamma, NULL, more ? more + r * more_stride : NULL, 0);
    }
}

static void FN(rows_backward)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                              ptrdiff_t rows, ptrdiff_t n, int centred, const void *gamma, const double *mean, const double *rstd,
                              const void *more, ptrdiff_t more_stride)
{
#define ROWS(gamma, more) \
    FN(rows_backward_loop)(x, x_stride, dy, dy_stride, dx, dx_stride, rows, n, centred, gamma, mean, rstd, more, more_stride)
    if (gamma && more) ROWS(gamma, more);
    else if (gamma) ROWS(gamma, NULL);
    else if (more) ROWS(NULL, more);
    else ROWS(NULL, NULL);
#undef ROWS
}

static void FN(add_runs)(const void *a_, ptrdiff_t a_stride, const void *b_, ptrdiff_t b_stride, void *sum_, ptrdiff_t sum_stride,
                         ptrdiff_t runs, ptrdiff_t n)
{
    const T *x = a_, *dy = b_;
    T *y = sum_;
    for (ptrdiff_t r = 0; r < runs; r++, x += a_stride, dy += b_stride, y += sum_stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) FN(store)(y + i, OP(add)(FN(load)(x + i), FN(load)(dy + i)));
        if (i < n) FN(store_n)(y + i, n - i, OP(add)(FN(load_n)(x + i, n - i, ZERO), FN(load_n)(dy + i, n - i, ZERO)));
    }
}

/* Columns -------------------------------------------------------------------------------------------------------------------- *
 *
 * A strip of columns at a time; within it row by row, so that memory is read in order, GROUP rows abreast, whose sums are added to
 * the strip's (two levels, as in moments_piece). The strip's coefficients and sums are arrays of C on the stack, padded to whole
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

NX_INLINE void FN(col_sum_group)(const T *x, ptrdiff_t x_stride, int rows, ptrdiff_t cols, const C *factor, C *s)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = OP(load)(s + j), f = OP(load)(factor + j);
        if (cols - j >= W)
            for (int r = 0; r < rows; r++) sum = OP(fma)(FN(load)(x + r * x_stride + j), f, sum);
        else
            for (int r = 0; r < rows; r++) sum = OP(fma)(FN(load_n)(x + r * x_stride + j, cols - j, ZERO), f, sum);
        OP(store)(s + j, sum);
    }
}

NX_INLINE void FN(col_moments_group)(const T *x, ptrdiff_t x_stride, int rows, ptrdiff_t cols, const C *factor, const C *offset, C *s,
                                     C *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, squares = ZERO, f = OP(load)(factor + j), o = OP(load)(offset + j);
        for (int r = 0; r < rows; r++) {
            const T *row = x + r * x_stride + j;
            V v = cols - j >= W ? FN(load)(row) : FN(load_n)(row, cols - j, ZERO);
            V d = OP(fma)(v, f, o);
            sum = OP(add)(sum, d);
            squares = OP(fma)(d, d, squares);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), squares));
    }
}

/* Whether the squares of a block's column left the range of C. */
NX_INLINE int FN(out_of_range)(C squares, C pivot, ptrdiff_t rows)
{
    return (!isfinite(squares)) | ((squares < T_TINY * (C)rows) & (pivot < 1) & (pivot > -1));
}

/* Merges the sums of columns, about their pivots and times their factors, into mean and m2. */
NX_INLINE void FN(merge_columns)(ptrdiff_t cols, ptrdiff_t rows, const C *pivot, const C *factor, const C *s, const C *q, double count,
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
static void FN(col_moments_strip)(const T *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, double count, double *mean, double *m2,
                                  const C *factor, int again)
{
    C pivot[STRIP], offset[STRIP], s[STRIP], q[STRIP];
    ptrdiff_t padded = (cols + W - 1) / W * W;
    for (ptrdiff_t j = 0; j < padded; j++) s[j] = q[j] = 0;
    if (count == 0) {
#define SUM_GROUP(n) FN(col_sum_group)(x + i * x_stride, x_stride, n, cols, factor, s)
        ROW_GROUPS(rows, i, SUM_GROUP);
#undef SUM_GROUP
        for (ptrdiff_t j = 0; j < cols; j++) pivot[j] = (C)((double)s[j] / factor[j] / (double)rows);
    } else {
        for (ptrdiff_t j = 0; j < cols; j++) pivot[j] = (C)mean[j];
    }
    for (ptrdiff_t j = cols; j < padded; j++) pivot[j] = 0;
    for (ptrdiff_t j = 0; j < padded; j++) {
        offset[j] = -pivot[j] * factor[j];
        s[j] = 0;
    }
#define MOMENTS_GROUP(n) FN(col_moments_group)(x + i * x_stride, x_stride, n, cols, factor, offset, s, q)
    ROW_GROUPS(rows, i, MOMENTS_GROUP);
#undef MOMENTS_GROUP
    int bad = 0;
    for (ptrdiff_t j = 0; j < cols; j++) bad |= FN(out_of_range)(q[j], pivot[j], rows);
    if (again || !bad) {
        FN(merge_columns)(cols, rows, pivot, factor, s, q, count, mean, m2);
        return;
    }
    for (ptrdiff_t j0 = 0; j0 < cols; j0 += W) {
        ptrdiff_t width = cols - j0 < W ? cols - j0 : W;
        C rescaled[W];
        bad = 0;
        for (ptrdiff_t j = 0; j < W; j++) {
            int out = FN(out_of_range)(q[j0 + j], pivot[j0 + j], rows);
            rescaled[j] = !out ? 1 : isfinite(q[j0 + j]) ? T_RESCALE : 1 / T_RESCALE;
            bad |= j < width && out;
        }
        if (bad) FN(col_moments_strip)(x + j0, x_stride, rows, width, count, mean + j0, m2 + j0, rescaled, 1);
        else FN(merge_columns)(width, rows, pivot + j0, factor + j0, s + j0, q + j0, count, mean + j0, m2 + j0);
    }
}

static void FN(col_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, double count, double *mean, double *m2)
{
    C ones[STRIP];
    for (ptrdiff_t j = 0; j < STRIP && j < cols + W; j++) ones[j] = 1;
    STRIPS (j0, width)
        FN(col_moments_strip)((const T *)x + j0, x_stride, rows, width, count, mean + j0, m2 + j0, ones, 0);
}

/* What is written goes row by row: half as many streams through memory as GROUP rows of both would be. */
NX_INLINE void FN(col_affine_row)(const T *x, T *y, ptrdiff_t cols, const C *pivot, const C *scale, const C *rest, int relu)
{
    ptrdiff_t j = 0;
    for (; j + W <= cols; j += W) {
        V v = OP(fma)(OP(sub)(FN(load)(x + j), OP(load)(pivot + j)), OP(load)(scale + j), OP(load)(rest + j));
        FN(store)(y + j, relu ? OP(max)(ZERO, v) : v);
    }
    if (j < cols) {
        V v = OP(fma)(OP(sub)(FN(load_n)(x + j, cols - j, ZERO), OP(load)(pivot + j)), OP(load)(scale + j), OP(load)(rest + j));
        FN(store_n)(y + j, cols - j, relu ? OP(max)(ZERO, v) : v);
    }
}

static void FN(col_affine)(const void *x_, ptrdiff_t x_stride, void *y_, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t cols,
                           const double *mean, const double *scale, const double *shift, int relu)
{
    C pivot[STRIP], a[STRIP], b[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0;
        T *y = (T *)y_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (C)mean[j0 + j];
            a[j] = (C)scale[j0 + j];
            b[j] = FN(rest)(mean[j0 + j], scale[j0 + j], shift[j0 + j]);
        }
        if (relu)
            for (ptrdiff_t i = 0; i < rows; i++) FN(col_affine_row)(x + i * x_stride, y + i * y_stride, width, pivot, a, b, 1);
        else
            for (ptrdiff_t i = 0; i < rows; i++) FN(col_affine_row)(x + i * x_stride, y + i * y_stride, width, pivot, a, b, 0);
    }
}

/* The gates of a strip's columns. */
NX_INLINE void FN(gates)(const nx_relu *relu, const double *mean, ptrdiff_t j0, ptrdiff_t width, C *scale, C *rest)
{
    for (ptrdiff_t j = 0; j < width; j++) {
        scale[j] = (C)relu->scale[j0 + j];
        rest[j] = FN(rest)(mean[j0 + j], relu->scale[j0 + j], relu->shift[j0 + j]);
    }
}

NX_INLINE void FN(col_dots_group)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, int rows, ptrdiff_t cols,
                                  const C *pivot, const C *scale, const C *rest, C *s, C *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, dot = ZERO, p = OP(load)(pivot + j);
        FN(gate) gate;
        if (scale) gate = (FN(gate)){OP(load)(scale + j), OP(load)(rest + j)};
        for (int r = 0; r < rows; r++) {
            const T *xr = x + r * x_stride + j, *gr = dy + r * dy_stride + j;
            V d = OP(sub)(cols - j >= W ? FN(load)(xr) : FN(load_n)(xr, cols - j, p), p);
            V g = cols - j >= W ? FN(load)(gr) : FN(load_n)(gr, cols - j, ZERO);
            if (scale) g = FN(through)(g, d, gate);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, d, dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void FN(col_dots)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                         const double *mean, const nx_relu *relu, double *sum, double *dot)
{
    C pivot[STRIP], scale[STRIP], rest[STRIP], s[STRIP], q[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (C)mean[j0 + j];
            s[j] = q[j] = 0;
        }
        if (relu) FN(gates)(relu, mean, j0, width, scale, rest);
#define DOTS_GROUP(n) FN(col_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, pivot, scale, rest, s, q)
        if (relu) ROW_GROUPS(rows, i, DOTS_GROUP);
#undef DOTS_GROUP
#define DOTS_GROUP(n) FN(col_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, pivot, NULL, NULL, s, q)
        if (!relu) ROW_GROUPS(rows, i, DOTS_GROUP);
#undef DOTS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += s[j];
            dot[j0 + j] += q[j] - (mean[j0 + j] - pivot[j]) * s[j];
        }
    }
}

NX_INLINE void FN(row_dots_group)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, int rows, ptrdiff_t cols,
                                  const double *mean, const double *scale, C *s, C *q)
{
    V p[GROUP], a[GROUP], b[GROUP];
    for (int r = 0; r < rows; r++) {
        C pivot = (C)mean[r];
        p[r] = OP(set)(pivot);
        a[r] = OP(set)((C)scale[r]);
        b[r] = OP(set)((C)((pivot - mean[r]) * scale[r]));
    }
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, dot = ZERO;
        for (int r = 0; r < rows; r++) {
            const T *xr = x + r * x_stride + j, *gr = dy + r * dy_stride + j;
            V v = cols - j >= W ? FN(load)(xr) : FN(load_n)(xr, cols - j, p[r]);
            V g = cols - j >= W ? FN(load)(gr) : FN(load_n)(gr, cols - j, ZERO);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, OP(fma)(OP(sub)(v, p[r]), a[r], b[r]), dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void FN(row_dots)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                         const double *mean, const double *scale, double *sum, double *dot)
{
    C s[STRIP], q[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) s[j] = q[j] = 0;
#define DOTS_GROUP(n) FN(row_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, mean + i, scale + i, s, q)
        ROW_GROUPS(rows, i, DOTS_GROUP);
#undef DOTS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += s[j];
            dot[j0 + j] += q[j];
        }
    }
}

NX_INLINE void FN(col_combine_row)(const T *x, const T *dy, T *dx, ptrdiff_t cols, const C *x_pivot, const C *dy_pivot, const C *a,
                                   const C *b, const C *rest, const C *gate_scale, const C *gate_rest)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        const ptrdiff_t left = cols - j;
        V d = OP(sub)(left >= W ? FN(load)(x + j) : FN(load_n)(x + j, left, ZERO), OP(load)(x_pivot + j));
        V g = left >= W ? FN(load)(dy + j) : FN(load_n)(dy + j, left, ZERO);
        if (gate_scale) g = FN(through)(g, d, (FN(gate)){OP(load)(gate_scale + j), OP(load)(gate_rest + j)});
        g = OP(sub)(g, OP(load)(dy_pivot + j));
        V v = OP(fma)(g, OP(load)(a + j), OP(fma)(d, OP(load)(b + j), OP(load)(rest + j)));
        if (left >= W) FN(store)(dx + j, v);
        else FN(store_n)(dx + j, left, v);
    }
}

static void FN(col_combine)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, void *dx_, ptrdiff_t dx_stride,
                            ptrdiff_t rows, ptrdiff_t cols, const double *mean, const double *dy_mean, const double *a, const double *b,
                            const double *c, const nx_relu *relu)
{
    C x_pivot[STRIP], dy_pivot[STRIP], ta[STRIP], tb[STRIP], rest[STRIP], gate_scale[STRIP], gate_rest[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        T *dx = (T *)dx_ + j0;
        for (ptrdiff_t j = 0; j < width; j++) {
            x_pivot[j] = (C)mean[j0 + j];
            dy_pivot[j] = (C)dy_mean[j0 + j];
            ta[j] = (C)a[j0 + j];
            tb[j] = (C)b[j0 + j];
            rest[j] = (C)((c ? c[j0 + j] : 0) - a[j0 + j] * (dy_mean[j0 + j] - dy_pivot[j]) - b[j0 + j] * (mean[j0 + j] - x_pivot[j]));
        }
        if (relu) FN(gates)(relu, mean, j0, width, gate_scale, gate_rest);
#define COMBINE_ROW(i, scale, shift)                                                                                               \
    FN(col_combine_row)(x + i * x_stride, dy + i * dy_stride, dx + i * dx_stride, width, x_pivot, dy_pivot, ta, tb, rest, scale, shift)
        if (relu)
            for (ptrdiff_t i = 0; i < rows; i++) COMBINE_ROW(i, gate_scale, gate_rest);
        else
            for (ptrdiff_t i = 0; i < rows; i++) COMBINE_ROW(i, NULL, NULL);
#undef COMBINE_ROW
    }
}

#ifdef T_INT
/* Windows over images --------------------------------------------------------------------------------------------------------- */

static void FN(transpose_rows)(const void *x_, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, void *y_, ptrdiff_t y_stride)
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

#define POOL_BLOCK 128

NX_INLINE void FN(pool_position)(const T *x, ptrdiff_t step, ptrdiff_t n, T_INT position, T *NX_RESTRICT best,
                                 T_INT *NX_RESTRICT winner)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        T v = x[i * step];
        int better = !(v <= best[i]) & (best[i] == best[i]);
        best[i] = better ? v : best[i];
        winner[i] = better ? position : winner[i];
    }
}

static void FN(pool_row)(const void *x_, ptrdiff_t x_stride, ptrdiff_t kh, ptrdiff_t kw, ptrdiff_t step, ptrdiff_t n, void *y,
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
            if (step == 1) FN(pool_position)(from, 1, count, (T_INT)k, best, position);
            else if (step == 2) FN(pool_position)(from, 2, count, (T_INT)k, best, position);
            else FN(pool_position)(from, step, count, (T_INT)k, best, position);
        }
        for (ptrdiff_t i = 0; i < count; i++) ((T *)y)[start + i] = best[i];
        if (winner_size == 1)
            for (ptrdiff_t i = 0; i < count; i++) ((uint8_t *)winner)[start + i] = (uint8_t)position[i];
        else
            for (ptrdiff_t i = 0; i < count; i++) ((int32_t *)winner)[start + i] = (int32_t)position[i];
    }
}
#endif

const nx_kernels NX_JOIN(nx, NX_ISA, E) = {
    sizeof(T),
    sizeof(C),
    RUN_BLOCK,
    COL_ROWS,
    FN(run_moments),
    FN(col_moments),
    FN(run_affine),
    FN(col_affine),
    FN(run_dots),
    FN(col_dots),
    FN(row_dots),
    FN(run_combine),
    FN(col_combine),
    FN(normalize_rows),
    FN(rows_backward),
    FN(add_runs),
#ifdef T_INT
    FN(transpose_rows),
    FN(pool_row),
#else
    NULL,
    NULL,
#endif
};

#undef FN
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
#undef C
#undef EC
#undef T_INT
#undef POOL_BLOCK
#undef T_TINY
#undef T_RESCALE
