/* The primitives of kernels.h, written once over the element type T, named E, and the type C, named EC, that it is computed in. They
 * are one and the same but for 16-bit floats, which loads and stores convert. This file has what reads elements and makes sums;
 * kernels_write.h, included at its end, what writes them. */

#define FN(name) NX_OP(E, name)  /* loads and stores of elements, and the functions of this file */
#define OP(name) NX_OP(EC, name) /* arithmetic, and loads and stores of coefficients and sums */
#define V OP(t)
#define W OP(W)
#define LANES ((ptrdiff_t)(128 / sizeof(C))) /* a sum has this many lanes on every instruction set: 2 AVX-512 or 4 AVX2 vectors */
#define NV (LANES / W)
#define RUN_BLOCK ((ptrdiff_t)(16384 / sizeof(C))) /* x and y of a block stay in the L1 cache together */
#define PIECE (8 * LANES)
#define COL_ROWS 128
#define COL_BLOCK (COL_ROWS * 64)
#define STRIP ((ptrdiff_t)(4096 / sizeof(C))) /* columns whose coefficients and sums are held on the stack, in the L1 cache */
#define PADDED (STRIP + UNIT)                 /* a vector of coefficients may begin at any of them */
#define GROUP 8 /* rows that share one load and store of a column's sums */
#define ZERO OP(set)(0)
#define UNIT ((ptrdiff_t)(64 / sizeof(C))) /* a vector of the widest instruction set, whichever this one is */

NX_INLINE V FN(some)(const T *p, ptrdiff_t left, int whole, V fill) { return whole ? FN(load)(p) : FN(load_n)(p, left, fill); }
NX_INLINE V FN(coefficients)(const C *p, ptrdiff_t left, int whole) { return whole ? OP(load)(p) : OP(load_n)(p, left, ZERO); }

/* How many of n numbers lie before the first aligned vector. */
NX_INLINE ptrdiff_t FN(unaligned)(const T *p, ptrdiff_t n)
{
    ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)p % (W * sizeof(T)) / sizeof(T));
    return head < n ? head : n;
}

/* Runs ----------------------------------------------------------------------------------------------------------------------- */

NX_INLINE C FN(sum_lanes)(V *lanes)
{
    for (int half = NV / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = OP(add)(lanes[k], lanes[k + half]);
    return OP(sum)(lanes[0]);
}

/* The mean, roughly. */
NX_INLINE double FN(run_mean)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, C scale)
{
    V s[NV], factor = OP(set)(scale), zero = ZERO;
    for (int k = 0; k < NV; k++) s[k] = zero;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(FN(load)(x + i + k * W), factor, s[k]);
        for (int k = 0; k < NV && i < n; k++, i += W) s[k] = OP(fma)(FN(some)(x + i, n - i, n - i >= W, zero), factor, s[k]);
    }
    return (double)FN(sum_lanes)(s) / ((double)runs * (double)n) / scale;
}

/* How many runs make up a piece: adding up in two levels, within a piece and over the pieces, keeps the rounding error of long sums
 * small; and the squares of multiples of some 2^-k have low bits that rounding would lose more often down than up, one by one. */
NX_INLINE ptrdiff_t FN(runs_together)(ptrdiff_t left, ptrdiff_t n)
{
    ptrdiff_t runs = n < PIECE ? PIECE / n : 1;
    return left < runs ? left : runs;
}

/* Adds a piece to the lanes of sum and squares, through lanes of its own. */
NX_INLINE void FN(moments_piece)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, V p, V factor, V offset, V *sum,
                                 V *squares)
{
    V s[NV], q[NV];
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int k = 0; k < NV; k++) {
                V d = OP(fma)(FN(load)(x + i + k * W), factor, offset);
                s[k] = OP(add)(s[k], d);
                q[k] = OP(fma)(d, d, q[k]);
            }
        for (int k = 0; k < NV && i < n; k++, i += W) {
            V d = OP(fma)(FN(some)(x + i, n - i, n - i >= W, p), factor, offset);
            s[k] = OP(add)(s[k], d);
            q[k] = OP(fma)(d, d, q[k]);
        }
    }
    for (int k = 0; k < NV; k++) {
        sum[k] = OP(add)(sum[k], s[k]);
        squares[k] = OP(add)(squares[k], q[k]);
    }
}

/* The sum of (x - pivot) * scale, and of its squares. */
NX_INLINE void FN(run_powers)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, C pivot, C scale, double *sum,
                              double *squares)
{
    V s[NV], q[NV], factor = OP(set)(scale), p = OP(set)(pivot), offset = OP(set)(-pivot * scale);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t count; runs > 0; runs -= count, x += count * x_stride) {
        count = FN(runs_together)(runs, n);
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            FN(moments_piece)(x + i, x_stride, count, n - i < PIECE ? n - i : PIECE, p, factor, offset, s, q);
    }
    *sum = FN(sum_lanes)(s);
    *squares = FN(sum_lanes)(q);
}

/* Moments of x * scale, from powers about a pivot, or about zero. */
NX_INLINE nx_moments FN(moments)(double count, int centred, C pivot, C scale, double sum, double squares)
{
    double mean = sum / count, m2 = squares - sum * mean;
    if (!centred) return (nx_moments){count, 0, squares};
    return (nx_moments){count, (double)pivot * scale + mean, m2 < 0 ? 0 : m2};
}

/* Moments about a pivot near the mean. The first block's pivot is its own mean, roughly; later ones' the mean so far, whose distance to
 * the block's mean then enters the merged m2 anyway, with a larger factor than its rounding error has. */
NX_INLINE void FN(add_moments)(const T *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, int centred, C scale, nx_moments *m)
{
    double count = (double)runs * (double)n, sum, squares;
    C pivot = 0;
    if (centred) pivot = (C)(m->count > 0 ? m->mean / scale : FN(run_mean)(x, x_stride, runs, n, scale));
    FN(run_powers)(x, x_stride, runs, n, pivot, scale, &sum, &squares);
    nx_merge(m, FN(moments)(count, centred, pivot, scale, sum, squares));
}

static void FN(run_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, int centred, double scale, nx_moments *m)
{ FN(add_moments)(x, x_stride, runs, n, centred, (C)scale, m); }

static const nx_range FN(range) = T_RANGE;

/* Whether a map's mean and scale are at the ends of the range of C: a deviation from the mean may overflow, or the scale. */
NX_INLINE int FN(far_out)(double mean, double scale)
{ return (fabs(mean) > T_LARGE) | (fabs(scale) > T_LARGE) | ((fabs(scale) < 1 / T_LARGE) & (scale != 0)); }

/* How many of n maps come before the first that is. */
NX_INLINE ptrdiff_t FN(ordinary)(const double *mean, const double *scale, ptrdiff_t n)
{
    int any = 0;
    for (ptrdiff_t j = 0; j < n; j++) any |= FN(far_out)(mean[j], scale[j]);
    if (!any) return n;
    for (ptrdiff_t j = 0; j < n; j++)
        if (FN(far_out)(mean[j], scale[j])) return j;
    return n;
}

NX_INLINE double FN(element)(const T *p)
{
#ifdef T_INT
    return *p;
#else
    C lanes[W];
    OP(store)(lanes, FN(load_n)(p, 1, ZERO));
    return lanes[0];
#endif
}

/* (x - mean) * scale + shift = (x - pivot) * scale + rest, with the mean rounded to C for a pivot. */
NX_INLINE C FN(rest)(double mean, double scale, double shift) { return (C)(shift - (mean - (C)mean) * scale); }

/* The affine map under a relu, whose backward pass lets a gradient through where the map's result, found again from x as it was found
 * in the forward pass, is above zero. */
typedef struct {
    V scale, rest;
} FN(gate);

NX_INLINE V FN(through)(V g, V d, FN(gate) gate)
{
    V y = OP(fma)(d, gate.scale, gate.rest);
    return OP(keep_positive)(g, T_UNDERFLOW ? OP(sub)(y, OP(set)(T_UNDERFLOW)) : y);
}

/* What a relu or gamma, and a pivot, make of a vector of dy: each of them may be NULL. The pivot comes with its sign changed. */
NX_INLINE V FN(gradient)(V dy, V d, const V *gamma, const FN(gate) * gate, const V *minus_pivot)
{
    if (gamma && minus_pivot) return OP(fma_once)(dy, *gamma, *minus_pivot); /* before a far product is rounded */
    V g = gamma ? OP(mul)(dy, *gamma) : gate ? FN(through)(dy, d, *gate) : dy;
    return minus_pivot ? OP(add)(g, *minus_pivot) : g;
}

/* v with zeros from lane n on. */
NX_INLINE V FN(first_lanes)(V v, ptrdiff_t n)
{
    static const C ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return OP(keep_positive)(v, OP(load_n)(ones, n, ZERO));
}

NX_INLINE void FN(dots_piece)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n, V p,
                              const V *minus_pivot, const C *gamma, const FN(gate) * gate, V *sum, V *dot)
{
    V s[NV], q[NV], zero = ZERO, c = ZERO;
    for (int k = 0; k < NV; k++) s[k] = q[k] = zero;
    for (ptrdiff_t r = 0; r < runs; r++, x += x_stride, dy += dy_stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int k = 0; k < NV; k++) {
                V d = OP(sub)(FN(load)(x + i + k * W), p);
                if (gamma) c = OP(load)(gamma + i + k * W);
                V g = FN(gradient)(FN(load)(dy + i + k * W), d, gamma ? &c : NULL, gate, minus_pivot);
                s[k] = OP(add)(s[k], g);
                q[k] = OP(fma)(g, d, q[k]);
            }
        for (int k = 0; k < NV && i < n; k++, i += W) {
            ptrdiff_t left = n - i;
            int whole = left >= W;
            V d = OP(sub)(FN(some)(x + i, left, whole, p), p);
            if (gamma) c = FN(coefficients)(gamma + i, left, whole);
            V g = FN(gradient)(FN(some)(dy + i, left, whole, zero), d, gamma ? &c : NULL, gate, minus_pivot);
            if (minus_pivot) g = FN(first_lanes)(g, left);
            s[k] = OP(add)(s[k], g);
            q[k] = OP(fma)(g, d, q[k]);
        }
    }
    for (int k = 0; k < NV; k++) {
        sum[k] = OP(add)(sum[k], s[k]);
        dot[k] = OP(add)(dot[k], q[k]);
    }
}

NX_INLINE void FN(dots_loop)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                             const double *pivot, const C *gamma, const nx_relu *relu, double *sum, double *dot, ptrdiff_t step)
{
    const C x_pivot = (C)mean, g_pivot = pivot ? (C)*pivot : 0;
    const V p = OP(set)(x_pivot), minus_pivot = OP(set)(-g_pivot);
    V s[NV], q[NV];
    FN(gate) gate;
    if (relu) gate = (FN(gate)){OP(set)((C)*relu->scale), OP(set)(FN(rest)(mean, *relu->scale, *relu->shift))};
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    const double numbers = (double)(step ? 1 : runs) * (double)n;
    for (ptrdiff_t count; runs > 0; runs -= count, x += count * x_stride, dy += count * dy_stride) {
        count = step ? 1 : FN(runs_together)(runs, n);
        for (ptrdiff_t i = 0; i < n; i += PIECE)
            FN(dots_piece)(x + i, x_stride, dy + i, dy_stride, count, n - i < PIECE ? n - i : PIECE, p, pivot ? &minus_pivot : NULL,
                           gamma ? gamma + i : NULL, relu ? &gate : NULL, s, q);
        if (!step && count < runs) continue;
        double block_sum = FN(sum_lanes)(s);
        *sum += pivot ? numbers * g_pivot + block_sum : block_sum;
        *dot += FN(sum_lanes)(q) - (mean - x_pivot) * block_sum;
        for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
        sum += step;
        dot += step;
    }
}

/* The same about a pivot: out of line, for it is rare. */
NX_OUTLINE void FN(dots_about)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n,
                               double mean, const double *pivot, const C *gamma, const nx_relu *relu, double *sum, double *dot,
                               ptrdiff_t step)
{
    if (gamma) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, pivot, gamma, NULL, sum, dot, step);
    else if (relu) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, pivot, NULL, relu, sum, dot, step);
    else FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, pivot, NULL, NULL, sum, dot, step);
}

static void FN(run_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n,
                         double mean, const double *pivot, const void *gamma, const nx_relu *relu, double *sum, double *dot,
                         ptrdiff_t step)
{
    if (pivot) FN(dots_about)(x, x_stride, dy, dy_stride, runs, n, mean, pivot, gamma, relu, sum, dot, step);
    else if (gamma) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, gamma, NULL, sum, dot, step);
    else if (relu) FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, NULL, relu, sum, dot, step);
    else FN(dots_loop)(x, x_stride, dy, dy_stride, runs, n, mean, NULL, NULL, NULL, sum, dot, step);
}

static int FN(run_is_far)(const void *dy_, ptrdiff_t n, const void *gamma_, double mean)
{
    const T *dy = dy_;
    const C *gamma = gamma_;
    for (int i = 1; i < 8; i += 2) {
        ptrdiff_t j = i * n / 8;
        if (!nx_near(gamma ? FN(element)(dy + j) * (double)gamma[j] : FN(element)(dy + j), mean)) return 0;
    }
    return n > 1;
}

/* The same where it is asked of many short runs: one number most often tells. */
NX_INLINE int FN(is_far)(const T *dy, ptrdiff_t n, const C *gamma, double mean)
{
    ptrdiff_t j = n / 2;
    double g = gamma ? FN(element)(dy + j) * (double)gamma[j] : FN(element)(dy + j);
    return nx_near(g, mean) && FN(run_is_far)(dy, n, gamma, mean);
}

/* Some rows go through each step together, and while in the L1 cache: what one has to wait for in its statistics (a dozen additions,
 * divisions and a root, each needing the one before) the others fill with work. */
#define ABREAST 8
NX_INLINE ptrdiff_t FN(rows_abreast)(ptrdiff_t left, ptrdiff_t n)
{
    ptrdiff_t rows = n * ABREAST <= RUN_BLOCK ? ABREAST : n < RUN_BLOCK ? RUN_BLOCK / n : 1;
    return left < rows ? left : rows;
}

NX_INLINE void FN(statistics_abreast)(const T *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t n, int centred, double eps,
                                      double *mean, double *rstd)
{
    C pivot[ABREAST];
    double sum[ABREAST], squares[ABREAST];
    for (ptrdiff_t r = 0; r < rows; r++) pivot[r] = centred ? (C)FN(run_mean)(x + r * x_stride, 0, 1, n, 1) : 0;
    for (ptrdiff_t r = 0; r < rows; r++) FN(run_powers)(x + r * x_stride, 0, 1, n, pivot[r], 1, sum + r, squares + r);
    for (ptrdiff_t r = 0; r < rows; r++) {
        nx_moments m = FN(moments)((double)n, centred, pivot[r], 1, sum[r], squares[r]);
        double scale = nx_rescale(&FN(range), m);
        if (scale != 1) {
            m = (nx_moments){0, 0, 0};
            FN(add_moments)(x + r * x_stride, 0, 1, n, centred, (C)scale, &m);
        }
        nx_finish_moments(m, scale, eps, mean + r, rstd + r, NULL);
    }
}

static void FN(row_statistics)(const void *x_, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t n, int centred, double eps, double *mean,
                               double *rstd)
{
    const T *x = x_;
    for (ptrdiff_t count; rows > 0; rows -= count, x += count * x_stride, mean += count, rstd += count) {
        count = FN(rows_abreast)(rows, n);
        FN(statistics_abreast)(x, x_stride, count, n, centred, eps, mean, rstd);
    }
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

#define STRIPS(j0, width) for (ptrdiff_t j0 = 0, width; j0 < cols && (width = cols - j0 < STRIP ? cols - j0 : STRIP, 1); j0 += STRIP)

/* f(first row, rows, numbers in a row), for GROUP rows at a time, then one by one, then for the rest. */
#define ROW_GROUPS(folded, f)                                                          \
    do {                                                                               \
        ptrdiff_t i_ = 0;                                                              \
        for (; i_ + GROUP <= (folded).rows; i_ += GROUP) f(i_, GROUP, (folded).lanes); \
        for (; i_ < (folded).rows; i_++) f(i_, 1, (folded).lanes);                     \
        if ((folded).rest) f(i_, 1, (folded).rest);                                    \
    } while (0)

/* The same row by row. What is written goes so: half as many streams through memory as GROUP rows of both would be. */
#define EACH_ROW(folded, f)                                                     \
    do {                                                                        \
        for (ptrdiff_t i_ = 0; i_ < (folded).rows; i_++) f(i_, (folded).lanes); \
        if ((folded).rest) f((folded).rows, (folded).rest);                     \
    } while (0)

/* A column's coefficients for all its lanes. */
NX_INLINE void FN(spread)(C *p, nx_fold folded)
{
    ptrdiff_t cols = folded.lanes / folded.fold;
    for (ptrdiff_t j = cols; j < folded.lanes; j++) p[j] = p[j - cols];
}

/* The sums of the columns' lanes. */
NX_INLINE void FN(lane_sums)(const C *NX_RESTRICT s, nx_fold folded, double *NX_RESTRICT sum)
{
    ptrdiff_t cols = folded.lanes / folded.fold;
    for (ptrdiff_t j = 0; j < cols; j++) sum[j] = s[j];
    for (ptrdiff_t l = cols; l < folded.lanes; l += cols)
        for (ptrdiff_t j = 0; j < cols; j++) sum[j] += s[l + j];
}

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

NX_INLINE void FN(col_moments_group)(const T *x, ptrdiff_t x_stride, int rows, ptrdiff_t cols, const C *pivot, const C *factor,
                                     const C *offset, C *s, C *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, squares = ZERO, f = OP(load)(factor + j), o = OP(load)(offset + j);
        for (int r = 0; r < rows; r++) {
            const T *row = x + r * x_stride + j;
            V v = cols - j >= W ? FN(load)(row) : FN(load_n)(row, cols - j, OP(load)(pivot + j));
            V d = OP(fma)(v, f, o);
            sum = OP(add)(sum, d);
            squares = OP(fma)(d, d, squares);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), squares));
    }
}

/* Merges the sums of columns, about their pivots and times their factors, into mean and m2. */
NX_INLINE void FN(merge_columns)(ptrdiff_t cols, ptrdiff_t rows, const C *NX_RESTRICT pivot, const C *NX_RESTRICT factor,
                                 const double *NX_RESTRICT sum, const double *NX_RESTRICT squares, double count,
                                 double *NX_RESTRICT mean, double *NX_RESTRICT m2)
{
    double n = (double)rows, each = 1 / n, share = n / (count + n);
    for (ptrdiff_t j = 0; j < cols; j++) {
        double block_m2 = squares[j] - sum[j] * (sum[j] * each), block_mean = (double)pivot[j] * factor[j] + sum[j] * each;
        block_m2 = block_m2 < 0 ? 0 : block_m2;
        if (count == 0) {
            mean[j] = block_mean;
            m2[j] = block_m2;
        } else {
            nx_merge_share(mean + j, m2 + j, block_mean, block_m2, count, share);
        }
    }
}

/* The pivots are as those of add_moments. */
static void FN(col_moments)(const void *x_, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, const double *scale, double count,
                            double *mean, double *m2)
{
    C factor[STRIP], pivot[STRIP], offset[STRIP], s[STRIP], q[STRIP];
    double sum[STRIP], squares[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0;
        nx_fold folded = fold_rows(rows, width, x_stride == width, UNIT, STRIP);
        const ptrdiff_t step = folded.fold * x_stride, padded = (folded.lanes + W - 1) / W * W;
        for (ptrdiff_t j = 0; j < width; j++) factor[j] = scale ? (C)scale[j0 + j] : 1;
        FN(spread)(factor, folded);
        for (ptrdiff_t j = 0; j < padded; j++) s[j] = q[j] = 0;
        if (count == 0) {
#define SUM_GROUP(i, n, width) FN(col_sum_group)(x + i * step, step, n, width, factor, s)
            ROW_GROUPS(folded, SUM_GROUP);
#undef SUM_GROUP
            FN(lane_sums)(s, folded, sum);
            for (ptrdiff_t j = 0; j < width; j++) pivot[j] = (C)(sum[j] / ((double)factor[j] * (double)rows));
        } else {
            for (ptrdiff_t j = 0; j < width; j++) pivot[j] = (C)(mean[j0 + j] / factor[j]);
        }
        FN(spread)(pivot, folded);
        for (ptrdiff_t j = folded.lanes; j < padded; j++) pivot[j] = factor[j] = 0;
        for (ptrdiff_t j = 0; j < padded; j++) {
            offset[j] = -pivot[j] * factor[j];
            s[j] = 0;
        }
#define MOMENTS_GROUP(i, n, width) FN(col_moments_group)(x + i * step, step, n, width, pivot, factor, offset, s, q)
        ROW_GROUPS(folded, MOMENTS_GROUP);
#undef MOMENTS_GROUP
        FN(lane_sums)(s, folded, sum);
        FN(lane_sums)(q, folded, squares);
        FN(merge_columns)(width, rows, pivot, factor, sum, squares, count, mean + j0, m2 + j0);
    }
}

/* The gates of a strip's columns. */
NX_INLINE void FN(gates)(const nx_relu *relu, const double *mean, ptrdiff_t j0, ptrdiff_t width, nx_fold folded, C *scale, C *rest)
{
    for (ptrdiff_t j = 0; j < width; j++) {
        scale[j] = (C)relu->scale[j0 + j];
        rest[j] = FN(rest)(mean[j0 + j], relu->scale[j0 + j], relu->shift[j0 + j]);
    }
    FN(spread)(scale, folded);
    FN(spread)(rest, folded);
}

NX_INLINE void FN(col_dots_group)(const T *x, ptrdiff_t x_stride, const T *dy, ptrdiff_t dy_stride, int rows, ptrdiff_t cols,
                                  const C *x_pivot, const C *minus_pivot, const C *scale, const C *rest, C *s, C *q)
{
    for (ptrdiff_t j = 0; j < cols; j += W) {
        V sum = ZERO, dot = ZERO, p = OP(load)(x_pivot + j), minus = ZERO;
        FN(gate) gate;
        if (minus_pivot) minus = OP(load)(minus_pivot + j);
        if (scale) gate = (FN(gate)){OP(load)(scale + j), OP(load)(rest + j)};
        for (int r = 0; r < rows; r++) {
            const T *xr = x + r * x_stride + j, *gr = dy + r * dy_stride + j;
            V d = OP(sub)(cols - j >= W ? FN(load)(xr) : FN(load_n)(xr, cols - j, p), p);
            V g = cols - j >= W ? FN(load)(gr) : FN(load_n)(gr, cols - j, ZERO);
            g = FN(gradient)(g, d, NULL, scale ? &gate : NULL, minus_pivot ? &minus : NULL);
            if (minus_pivot && cols - j < W) g = FN(first_lanes)(g, cols - j);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, d, dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void FN(col_dots)(const void *x_, ptrdiff_t x_stride, const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                         const double *mean, const double *pivot, const nx_relu *relu, double *sum, double *dot)
{
    C x_pivot[STRIP], minus[PADDED], scale[STRIP], rest[STRIP], s[STRIP], q[STRIP];
    double block_sum[STRIP], block_dot[STRIP];
    STRIPS (j0, width) {
        const T *x = (const T *)x_ + j0, *dy = (const T *)dy_ + j0;
        nx_fold folded = fold_rows(rows, width, x_stride == width && dy_stride == width, UNIT, STRIP);
        const ptrdiff_t x_step = folded.fold * x_stride, dy_step = folded.fold * dy_stride;
        for (ptrdiff_t j = 0; j < width; j++) x_pivot[j] = (C)mean[j0 + j];
        for (ptrdiff_t j = 0; j < width; j++) minus[j] = pivot ? -(C)pivot[j0 + j] : 0;
        FN(spread)(x_pivot, folded);
        FN(spread)(minus, folded);
        for (ptrdiff_t j = 0; j < folded.lanes; j++) s[j] = q[j] = 0;
        if (relu) FN(gates)(relu, mean, j0, width, folded, scale, rest);
#define DOTS(i, n, width, minus, scale) \
    FN(col_dots_group)(x + i * x_step, x_step, dy + i * dy_step, dy_step, n, width, x_pivot, minus, scale, rest, s, q)
#define DOTS_GROUP(i, n, width) DOTS(i, n, width, NULL, NULL)
#define GATED_GROUP(i, n, width) DOTS(i, n, width, NULL, scale)
#define PIVOTED_GROUP(i, n, width) DOTS(i, n, width, minus, NULL)
#define PIVOTED_GATED_GROUP(i, n, width) DOTS(i, n, width, minus, scale)
        if (pivot && relu) ROW_GROUPS(folded, PIVOTED_GATED_GROUP);
        else if (pivot) ROW_GROUPS(folded, PIVOTED_GROUP);
        else if (relu) ROW_GROUPS(folded, GATED_GROUP);
        else ROW_GROUPS(folded, DOTS_GROUP);
#undef DOTS
#undef DOTS_GROUP
#undef GATED_GROUP
#undef PIVOTED_GROUP
#undef PIVOTED_GATED_GROUP
        FN(lane_sums)(s, folded, block_sum);
        FN(lane_sums)(q, folded, block_dot);
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += block_sum[j] - (double)rows * (double)minus[j];
            dot[j0 + j] += block_dot[j] - (mean[j0 + j] - x_pivot[j]) * block_sum[j];
        }
    }
}

static int FN(cols_are_far)(const void *dy_, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols, const double *sum, double count,
                            double *pivot)
{
    C sample[PADDED];
    int any = 0;
    STRIPS (j0, width) {
        const T *dy = (const T *)dy_ + j0, *middle = dy + rows / 2 * dy_stride;
        double near = 0, each = 1 / count;
        for (ptrdiff_t j = 0; j < width; j += W) OP(store)(sample + j, FN(some)(middle + j, width - j, width - j >= W, ZERO));
        for (ptrdiff_t j = 0; j < width; j++) {
            double mean = sum[j0 + j] * each, is_near = nx_near(sample[j], mean) ? 1.0 : 0.0;
            pivot[j0 + j] = is_near != 0 ? mean : 0;
            near += is_near;
        }
        for (ptrdiff_t j = 0; j < width && near > 0; j++) {
            int far = pivot[j0 + j] != 0 && rows > 1;
            for (int i = 1; i < 8 && far; i += 2) far = nx_near(FN(element)(dy + i * rows / 8 * dy_stride + j), pivot[j0 + j]);
            if (!far) pivot[j0 + j] = 0;
            any |= far;
        }
    }
    return any;
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
        nx_fold folded = {1, width, rows, 0};
        for (ptrdiff_t j = 0; j < width; j++) s[j] = q[j] = 0;
#define DOTS_GROUP(i, n, width) \
    FN(row_dots_group)(x + i * x_stride, x_stride, dy + i * dy_stride, dy_stride, n, width, mean + i, scale + i, s, q)
        ROW_GROUPS(folded, DOTS_GROUP);
#undef DOTS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            sum[j0 + j] += s[j];
            dot[j0 + j] += q[j];
        }
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
        for (ptrdiff_t i = 0; i < whole_rows; i += side) OP(transpose)(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
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
static void FN(adam)(const void *NX_RESTRICT w_, const void *NX_RESTRICT dw_, const void *NX_RESTRICT m_, const void *NX_RESTRICT v_,
                     void *NX_RESTRICT next_w_, void *NX_RESTRICT next_m_, void *NX_RESTRICT next_v_, ptrdiff_t n, double beta1,
                     double beta2, double rate, double epsilon)
{
    /* gcc makes use of restrict on parameters, and not on the local pointers of a block: with it here there would be no vectors. */
    const T *w = w_, *dw = dw_, *m = m_, *v = v_;
    T *next_w = next_w_, *next_m = next_m_, *next_v = next_v_;
    const T keep_m = (T)beta1, add_m = (T)(1 - beta1), keep_v = (T)beta2, add_v = (T)(1 - beta2), step = (T)rate, small = (T)epsilon;
    for (ptrdiff_t i = 0; i < n; i++) {
        next_m[i] = m[i] * keep_m + dw[i] * add_m;
        next_v[i] = v[i] * keep_v + dw[i] * dw[i] * add_v;
        next_w[i] = w[i] - next_m[i] / (T_SQRT(next_v[i]) + small) * step;
    }
}
#endif

#define STREAM 0
#define TABLE NX_JOIN(nx, NX_ISA, E)
#define WR(name) NX_OP(E, name)
#include "kernels_write.h"

#define STREAM 1
#define TABLE NX_JOIN(nx_stream, NX_ISA, E)
#define WR(name) NX_OP(NX_OP(E, stream), name)
#include "kernels_write.h"

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
#undef PADDED
#undef GROUP
#undef ZERO
#undef ABREAST
#undef UNIT
#undef COL_BLOCK
#undef T
#undef E
#undef C
#undef EC
#undef T_INT
#undef T_SQRT
#undef POOL_BLOCK
#undef T_RANGE
#undef T_LARGE
#undef T_UNDERFLOW
