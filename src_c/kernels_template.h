/* The primitives of kernels.h, written once over the element type T, named E, and the type C, named EC, that it is computed in. They
 * are one and the same but for 16-bit floats, which loads and stores convert. This file has what reads elements and makes sums;
 * kernels_write.h, included at its end, what writes them. */

#define FN(name) NX_OP(E, name) /* loads and stores of elements, and the functions of this file */
#define OP(name) NX_OP(EC, name) /* arithmetic, and loads and stores of coefficients and sums */
#define V OP(t)
#define W OP(W)
#define LANES            \
    ((ptrdiff_t)(128 /   \
                 sizeof( \
                     C))) /* a sum has this many lanes on every instruction set: 2 AVX-512 or 4 AVX2 vectors */
#define NV (LANES / W)
#define ROW_BLOCK \
    ((ptrdiff_t)(16384 / sizeof(C))) /* x and y of a block stay in the L1 cache together */
#define PIECE (8 * LANES)
#define COL_ROWS 128
#define COL_BLOCK (COL_ROWS * 64)
#define STRIP            \
    ((ptrdiff_t)(4096 /  \
                 sizeof( \
                     C))) /* columns whose coefficients and sums are held on the stack, in the L1 cache */
#define PADDED (STRIP + UNIT) /* a vector of coefficients may begin at any of them */
#define GROUP 8 /* rows that share one load and store of a column's sums */
#define ZERO OP(set)(0)
#define UNIT          \
    ((ptrdiff_t)(64 / \
                 sizeof(C))) /* a vector of the widest instruction set, whichever this one is */

NX_INLINE V FN(some)(const T *p, ptrdiff_t left, int whole, V fill)
{ return whole ? FN(load)(p) : FN(load_n)(p, left, fill); }
NX_INLINE V FN(coefficients)(const C *p, ptrdiff_t left, int whole)
{ return whole ? OP(load)(p) : OP(load_n)(p, left, ZERO); }

/* How many of n numbers lie before the first aligned vector. */
NX_INLINE ptrdiff_t FN(unaligned)(const T *p, ptrdiff_t n)
{
    ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)p % (W * sizeof(T)) / sizeof(T));
    return head < n ? head : n;
}

/* From number i of row r on. */
NX_INLINE nx_rows FN(from)(nx_rows x, ptrdiff_t r, ptrdiff_t i)
{ return (nx_rows){(T *)x.data + r * x.stride + i, x.stride}; }

/* Rows ------------------------------------------------------------------------------------- */

NX_INLINE C FN(sum_lanes)(V *lanes)
{
    for (int half = NV / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = OP(add)(lanes[k], lanes[k + half]);
    return OP(sum)(lanes[0]);
}

/* The mean, roughly. */
NX_INLINE double FN(row_mean)(nx_rows x, nx_block b, C scale)
{
    const T *row = x.data;
    V s[NV], factor = OP(set)(scale), zero = ZERO;
    for (int k = 0; k < NV; k++) s[k] = zero;
    for (ptrdiff_t r = 0; r < b.rows; r++, row += x.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) s[k] = OP(fma)(FN(load)(row + i + k * W), factor, s[k]);
        for (int k = 0; k < NV && i < b.n; k++, i += W)
            s[k] = OP(fma)(FN(some)(row + i, b.n - i, b.n - i >= W, zero), factor, s[k]);
    }
    return (double)FN(sum_lanes)(s) / ((double)b.rows * (double)b.n) / scale;
}

/* How many rows make up a piece: adding up in two levels, within a piece and over the pieces, keeps
 * the rounding error of long sums small; and the squares of multiples of some 2^-k have low bits
 * that rounding would lose more often down than up, one by one. */
NX_INLINE ptrdiff_t FN(rows_together)(ptrdiff_t left, ptrdiff_t n)
{
    ptrdiff_t rows = n < PIECE ? PIECE / n : 1;
    return left < rows ? left : rows;
}

/* Adds a piece to the lanes of sum and squares, through lanes of its own. */
NX_INLINE void FN(moments_piece)(nx_rows x, nx_block b, V p, V factor, V offset, V *sum, V *squares)
{
    const T *row = x.data;
    V s[NV], q[NV];
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < b.rows; r++, row += x.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) {
                V d = OP(fma)(FN(load)(row + i + k * W), factor, offset);
                s[k] = OP(add)(s[k], d);
                q[k] = OP(fma)(d, d, q[k]);
            }
        for (int k = 0; k < NV && i < b.n; k++, i += W) {
            V d = OP(fma)(FN(some)(row + i, b.n - i, b.n - i >= W, p), factor, offset);
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
NX_INLINE void FN(row_powers)(nx_rows x, nx_block b, C pivot, C scale, double *sum, double *squares)
{
    V s[NV], q[NV], factor = OP(set)(scale), p = OP(set)(pivot), offset = OP(set)(-pivot * scale);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t count, left = b.rows; left > 0; left -= count, x = FN(from)(x, count, 0)) {
        count = FN(rows_together)(left, b.n);
        for (ptrdiff_t i = 0; i < b.n; i += PIECE) {
            nx_block piece = {count, b.n - i < PIECE ? b.n - i : PIECE};
            FN(moments_piece)(FN(from)(x, 0, i), piece, p, factor, offset, s, q);
        }
    }
    *sum = FN(sum_lanes)(s);
    *squares = FN(sum_lanes)(q);
}

/* Moments of x * scale, from powers about a pivot, or about zero. */
NX_INLINE nx_moments FN(moments)(double count, int centred, C pivot, C scale, double sum,
                                 double squares)
{
    double mean = sum / count, m2 = squares - sum * mean;
    if (!centred) return (nx_moments){count, 0, squares};
    return (nx_moments){count, (double)pivot * scale + mean, m2 < 0 ? 0 : m2};
}

/* Moments about a pivot near the mean. The first block's pivot is its own mean, roughly; later
 * ones' the mean so far, whose distance to the block's mean then enters the merged m2 anyway, with a
 * larger factor than its rounding error has. */
NX_INLINE void FN(add_moments)(nx_rows x, nx_block b, int centred, C scale, nx_moments *m)
{
    double count = (double)b.rows * (double)b.n, sum, squares;
    C pivot = 0;
    if (centred) pivot = (C)(m->count > 0 ? m->mean / scale : FN(row_mean)(x, b, scale));
    FN(row_powers)(x, b, pivot, scale, &sum, &squares);
    nx_merge(m, FN(moments)(count, centred, pivot, scale, sum, squares));
}

static void FN(row_moments)(nx_rows x, nx_block b, int centred, double scale, nx_moments *m)
{ FN(add_moments)(x, b, centred, (C)scale, m); }

static const nx_range FN(range) = T_RANGE;

/* Whether a map's mean and scale are at the ends of the range of C: a deviation from the mean may
 * overflow, or the scale. */
NX_INLINE int FN(far_out)(double mean, double scale)
{
    return (fabs(mean) > T_LARGE) | (fabs(scale) > T_LARGE) |
           ((fabs(scale) < 1 / T_LARGE) & (scale != 0));
}

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

/* (x - mean) * scale + shift = (x - pivot) * scale + this, with the mean rounded to C for a pivot. */
NX_INLINE C FN(pivot_shift)(double mean, double scale, double shift)
{ return (C)(shift - (mean - (C)mean) * scale); }

/* The affine map under a relu, about its pivot: a gradient passes where the map's result, found again
 * from x as it was found in the forward pass, is above zero. */
typedef struct {
    V scale, shift;
} FN(relu_mask);

NX_INLINE FN(relu_mask) FN(mask_of)(const nx_relu_mask *relu, double mean)
{
    C shift = FN(pivot_shift)(mean, *relu->scale, *relu->shift);
    return (FN(relu_mask)){OP(set)((C)*relu->scale), OP(set)(shift)};
}

NX_INLINE V FN(masked)(V g, V d, FN(relu_mask) mask)
{
    V y = OP(fma)(d, mask.scale, mask.shift);
    return OP(keep_positive)(g, T_UNDERFLOW ? OP(sub)(y, OP(set)(T_UNDERFLOW)) : y);
}

/* What a relu or gamma, and a pivot, make of a vector of dy: each of them may be NULL. The pivot
 * comes with its sign changed. */
NX_INLINE V FN(gradient)(V dy, V d, const V *gamma, const FN(relu_mask) * mask,
                         const V *minus_pivot)
{
    /* before a far product is rounded */
    if (gamma && minus_pivot) return OP(fma_once)(dy, *gamma, *minus_pivot);
    V g = gamma ? OP(mul)(dy, *gamma) : mask ? FN(masked)(dy, d, *mask) : dy;
    return minus_pivot ? OP(add)(g, *minus_pivot) : g;
}

/* v with zeros from lane n on. */
NX_INLINE V FN(first_lanes)(V v, ptrdiff_t n)
{
    static const C ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return OP(keep_positive)(v, OP(load_n)(ones, n, ZERO));
}

NX_INLINE void FN(dots_piece)(nx_rows x_, nx_rows dy_, nx_block b, V p, const V *minus_pivot,
                              const C *gamma, const FN(relu_mask) * mask, V *sum, V *dot)
{
    const T *x = x_.data, *dy = dy_.data;
    V s[NV], q[NV], zero = ZERO, c = ZERO;
    for (int k = 0; k < NV; k++) s[k] = q[k] = zero;
    for (ptrdiff_t r = 0; r < b.rows; r++, x += x_.stride, dy += dy_.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) {
                V d = OP(sub)(FN(load)(x + i + k * W), p);
                if (gamma) c = OP(load)(gamma + i + k * W);
                V g = FN(load)(dy + i + k * W);
                g = FN(gradient)(g, d, gamma ? &c : NULL, mask, minus_pivot);
                s[k] = OP(add)(s[k], g);
                q[k] = OP(fma)(g, d, q[k]);
            }
        for (int k = 0; k < NV && i < b.n; k++, i += W) {
            ptrdiff_t left = b.n - i;
            int whole = left >= W;
            V d = OP(sub)(FN(some)(x + i, left, whole, p), p);
            if (gamma) c = FN(coefficients)(gamma + i, left, whole);
            V g = FN(some)(dy + i, left, whole, zero);
            g = FN(gradient)(g, d, gamma ? &c : NULL, mask, minus_pivot);
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

NX_INLINE void FN(dots_loop)(nx_rows x, nx_rows dy, nx_block b, double mean, const double *pivot,
                             const C *gamma, const nx_relu_mask *relu, nx_sums sums)
{
    const C x_pivot = (C)mean, g_pivot = pivot ? (C)*pivot : 0;
    const V p = OP(set)(x_pivot), minus_pivot = OP(set)(-g_pivot);
    V s[NV], q[NV];
    FN(relu_mask) mask;
    if (relu) mask = FN(mask_of)(relu, mean);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    const double numbers = (double)(sums.step ? 1 : b.rows) * (double)b.n;
    for (ptrdiff_t count, left = b.rows; left > 0; left -= count) {
        count = sums.step ? 1 : FN(rows_together)(left, b.n);
        for (ptrdiff_t i = 0; i < b.n; i += PIECE) {
            nx_block piece = {count, b.n - i < PIECE ? b.n - i : PIECE};
            FN(dots_piece)(FN(from)(x, 0, i), FN(from)(dy, 0, i), piece, p,
                           pivot ? &minus_pivot : NULL, gamma ? gamma + i : NULL,
                           relu ? &mask : NULL, s, q);
        }
        x = FN(from)(x, count, 0);
        dy = FN(from)(dy, count, 0);
        if (!sums.step && count < left) continue;
        double block_sum = FN(sum_lanes)(s);
        *sums.sum += pivot ? numbers * g_pivot + block_sum : block_sum;
        *sums.dot += FN(sum_lanes)(q) - (mean - x_pivot) * block_sum;
        for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
        sums.sum += sums.step;
        sums.dot += sums.step;
    }
}

/* The same about a pivot: out of line, for it is rare. */
NX_OUTLINE void FN(dots_about)(nx_rows x, nx_rows dy, nx_block b, double mean, const double *pivot,
                               const C *gamma, const nx_relu_mask *relu, nx_sums sums)
{
    if (gamma) FN(dots_loop)(x, dy, b, mean, pivot, gamma, NULL, sums);
    else if (relu) FN(dots_loop)(x, dy, b, mean, pivot, NULL, relu, sums);
    else FN(dots_loop)(x, dy, b, mean, pivot, NULL, NULL, sums);
}

static void FN(row_dots)(nx_rows x, nx_rows dy, nx_block b, double mean, const double *pivot,
                         const void *gamma, const nx_relu_mask *relu, nx_sums sums)
{
    if (pivot) FN(dots_about)(x, dy, b, mean, pivot, gamma, relu, sums);
    else if (gamma) FN(dots_loop)(x, dy, b, mean, NULL, gamma, NULL, sums);
    else if (relu) FN(dots_loop)(x, dy, b, mean, NULL, NULL, relu, sums);
    else FN(dots_loop)(x, dy, b, mean, NULL, NULL, NULL, sums);
}

/* The sums of one row of a block. */
NX_INLINE void FN(dots_of_row)(nx_rows x, nx_rows dy, nx_block b, ptrdiff_t r, double mean,
                               const C *gamma, double *sum, double *dot)
{
    *sum = *dot = 0;
    FN(dots_loop)(FN(from)(x, r, 0), FN(from)(dy, r, 0), (nx_block){1, b.n}, mean, NULL, gamma,
                  NULL, (nx_sums){sum, dot, 0});
}

static int FN(row_is_far)(const void *dy_, ptrdiff_t n, const void *gamma_, double mean)
{
    const T *dy = dy_;
    const C *gamma = gamma_;
    for (int i = 1; i < 8; i += 2) {
        ptrdiff_t j = i * n / 8;
        double g = gamma ? FN(element)(dy + j) * (double)gamma[j] : FN(element)(dy + j);
        if (!nx_near(g, mean)) return 0;
    }
    return n > 1;
}

/* The same where it is asked of many short rows: one number most often tells. */
NX_INLINE int FN(is_far)(const T *dy, ptrdiff_t n, const C *gamma, double mean)
{
    ptrdiff_t j = n / 2;
    double g = gamma ? FN(element)(dy + j) * (double)gamma[j] : FN(element)(dy + j);
    return nx_near(g, mean) && FN(row_is_far)(dy, n, gamma, mean);
}

/* Some rows go through each step interleaved, and while in the L1 cache: what one has to wait for in
 * its statistics (a dozen additions, divisions and a root, each needing the one before) the others
 * fill with work. */
#define INTERLEAVED 8
NX_INLINE ptrdiff_t FN(rows_interleaved)(ptrdiff_t left, ptrdiff_t n)
{
    ptrdiff_t rows = n * INTERLEAVED <= ROW_BLOCK ? INTERLEAVED : n < ROW_BLOCK ? ROW_BLOCK / n : 1;
    return left < rows ? left : rows;
}

NX_INLINE void FN(statistics_interleaved)(nx_rows x, nx_block b, int centred, double eps,
                                          double *mean, double *rstd)
{
    C pivot[INTERLEAVED];
    double sum[INTERLEAVED], squares[INTERLEAVED];
    const nx_block row = {1, b.n};
    for (ptrdiff_t r = 0; r < b.rows; r++)
        pivot[r] = centred ? (C)FN(row_mean)(FN(from)(x, r, 0), row, 1) : 0;
    for (ptrdiff_t r = 0; r < b.rows; r++)
        FN(row_powers)(FN(from)(x, r, 0), row, pivot[r], 1, sum + r, squares + r);
    for (ptrdiff_t r = 0; r < b.rows; r++) {
        nx_moments m = FN(moments)((double)b.n, centred, pivot[r], 1, sum[r], squares[r]);
        double scale = nx_rescale(&FN(range), m);
        if (scale != 1) {
            m = (nx_moments){0, 0, 0};
            FN(add_moments)(FN(from)(x, r, 0), row, centred, (C)scale, &m);
        }
        nx_finish_moments(m, scale, eps, mean + r, rstd + r, NULL);
    }
}

static void FN(layer_statistics)(nx_rows x, nx_block b, int centred, double eps, double *mean,
                                 double *rstd)
{
    for (ptrdiff_t first = 0, count; first < b.rows; first += count) {
        count = FN(rows_interleaved)(b.rows - first, b.n);
        FN(statistics_interleaved)(FN(from)(x, first, 0), (nx_block){count, b.n}, centred, eps,
                                   mean + first, rstd + first);
    }
}

static void FN(add_rows)(nx_rows a_, nx_rows b_, nx_rows sum_, nx_block block)
{
    const T *a = a_.data, *b = b_.data;
    T *sum = sum_.data;
    const ptrdiff_t n = block.n;
    for (ptrdiff_t r = 0; r < block.rows; r++, a += a_.stride, b += b_.stride, sum += sum_.stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) FN(store)(sum + i, OP(add)(FN(load)(a + i), FN(load)(b + i)));
        if (i == n) continue;
        V tail = OP(add)(FN(load_n)(a + i, n - i, ZERO), FN(load_n)(b + i, n - i, ZERO));
        FN(store_n)(sum + i, n - i, tail);
    }
}

static void FN(widen)(const void *x_, ptrdiff_t n, double *y)
{
    const T *x = x_;
#ifdef T_INT
    for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i];
#else
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        OP(store)(lanes, FN(some)(x + i, n - i, n - i >= W, ZERO));
        for (ptrdiff_t k = 0; k < W && i + k < n; k++) y[i + k] = lanes[k];
    }
#endif
}

static void FN(narrow)(const double *x, ptrdiff_t n, void *y_)
{
    T *y = y_;
#ifdef T_INT
    for (ptrdiff_t i = 0; i < n; i++) y[i] = (T)x[i];
#else
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        for (ptrdiff_t k = 0; k < W; k++) lanes[k] = i + k < n ? round_to_odd(x[i + k]) : 0;
        FN(store_n)(y + i, n - i, OP(load)(lanes));
    }
#endif
}

/* Columns ---------------------------------------------------------------------------------- *
 *
 * A strip of columns at a time; within it row by row, so that memory is read in order, GROUP rows
 * interleaved, whose sums are added to the strip's (two levels, as in moments_piece). The strip's
 * coefficients and sums are arrays of C on the stack, padded to whole vectors. Each loop is written
 * for any number of rows; with a constant there the compiler unrolls it. */

#define STRIPS(j0, width)                                                                       \
    for (ptrdiff_t j0 = 0, width; j0 < b.n && (width = b.n - j0 < STRIP ? b.n - j0 : STRIP, 1); \
         j0 += STRIP)

/* f(first row, rows, numbers in a row), for GROUP rows at a time, then one by one, then the tail. */
#define ROW_GROUPS(folded, f)                                                          \
    do {                                                                               \
        ptrdiff_t i_ = 0;                                                              \
        for (; i_ + GROUP <= (folded).rows; i_ += GROUP) f(i_, GROUP, (folded).lanes); \
        for (; i_ < (folded).rows; i_++) f(i_, 1, (folded).lanes);                     \
        if ((folded).tail) f(i_, 1, (folded).tail);                                    \
    } while (0)

/* The same row by row. What is written goes so: half as many streams through memory as GROUP rows of
 * both would be. */
#define EACH_ROW(folded, f)                                                     \
    do {                                                                        \
        for (ptrdiff_t i_ = 0; i_ < (folded).rows; i_++) f(i_, (folded).lanes); \
        if ((folded).tail) f((folded).rows, (folded).tail);                     \
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

/* A strip's columns of x, as folded. */
NX_INLINE nx_rows FN(strip)(nx_rows x, ptrdiff_t j0, nx_fold folded)
{ return (nx_rows){(T *)x.data + j0, folded.fold * x.stride}; }

NX_INLINE void FN(col_sum_group)(nx_rows x_, nx_block b, const C *factor, C *s)
{
    const T *x = x_.data;
    for (ptrdiff_t j = 0; j < b.n; j += W) {
        V sum = OP(load)(s + j), f = OP(load)(factor + j);
        for (ptrdiff_t r = 0; r < b.rows; r++)
            sum = OP(fma)(FN(some)(x + r * x_.stride + j, b.n - j, b.n - j >= W, ZERO), f, sum);
        OP(store)(s + j, sum);
    }
}

NX_INLINE void FN(col_moments_group)(nx_rows x, nx_block b, const C *pivot, const C *factor,
                                     const C *offset, C *s, C *q)
{
    for (ptrdiff_t j = 0; j < b.n; j += W) {
        V sum = ZERO, squares = ZERO, f = OP(load)(factor + j), o = OP(load)(offset + j);
        for (ptrdiff_t r = 0; r < b.rows; r++) {
            const T *row = (const T *)x.data + r * x.stride + j;
            V v = b.n - j >= W ? FN(load)(row) : FN(load_n)(row, b.n - j, OP(load)(pivot + j));
            V d = OP(fma)(v, f, o);
            sum = OP(add)(sum, d);
            squares = OP(fma)(d, d, squares);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), squares));
    }
}

/* Merges the sums of columns, about their pivots and times their factors, into mean and m2. */
NX_INLINE void FN(merge_columns)(nx_block b, const C *NX_RESTRICT pivot,
                                 const C *NX_RESTRICT factor, const double *NX_RESTRICT sum,
                                 const double *NX_RESTRICT squares, double count,
                                 double *NX_RESTRICT mean, double *NX_RESTRICT m2)
{
    double n = (double)b.rows, each = 1 / n, share = n / (count + n);
    for (ptrdiff_t j = 0; j < b.n; j++) {
        double block_m2 = squares[j] - sum[j] * (sum[j] * each);
        double block_mean = (double)pivot[j] * factor[j] + sum[j] * each;
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
static void FN(col_moments)(nx_rows x_, nx_block b, const double *scale, double count, double *mean,
                            double *m2)
{
    C factor[STRIP], pivot[STRIP], offset[STRIP], s[STRIP], q[STRIP];
    double sum[STRIP], squares[STRIP];
    STRIPS (j0, width) {
        nx_fold folded = fold_rows(b.rows, width, x_.stride == width, UNIT, STRIP);
        const nx_rows x = FN(strip)(x_, j0, folded);
        const ptrdiff_t padded = (folded.lanes + W - 1) / W * W;
        for (ptrdiff_t j = 0; j < width; j++) factor[j] = scale ? (C)scale[j0 + j] : 1;
        FN(spread)(factor, folded);
        for (ptrdiff_t j = 0; j < padded; j++) s[j] = q[j] = 0;
        if (count == 0) {
#define SUM_GROUP(i, rows, n) FN(col_sum_group)(FN(from)(x, i, 0), (nx_block){rows, n}, factor, s)
            ROW_GROUPS(folded, SUM_GROUP);
#undef SUM_GROUP
            FN(lane_sums)(s, folded, sum);
            for (ptrdiff_t j = 0; j < width; j++)
                pivot[j] = (C)(sum[j] / ((double)factor[j] * (double)b.rows));
        } else {
            for (ptrdiff_t j = 0; j < width; j++) pivot[j] = (C)(mean[j0 + j] / factor[j]);
        }
        FN(spread)(pivot, folded);
        for (ptrdiff_t j = folded.lanes; j < padded; j++) pivot[j] = factor[j] = 0;
        for (ptrdiff_t j = 0; j < padded; j++) {
            offset[j] = -pivot[j] * factor[j];
            s[j] = 0;
        }
#define MOMENTS_GROUP(i, rows, n) \
    FN(col_moments_group)(FN(from)(x, i, 0), (nx_block){rows, n}, pivot, factor, offset, s, q)
        ROW_GROUPS(folded, MOMENTS_GROUP);
#undef MOMENTS_GROUP
        FN(lane_sums)(s, folded, sum);
        FN(lane_sums)(q, folded, squares);
        FN(merge_columns)((nx_block){b.rows, width}, pivot, factor, sum, squares, count, mean + j0,
                          m2 + j0);
    }
}

/* The relu masks of a strip's columns, about their pivots. */
NX_INLINE void FN(masks)(const nx_relu_mask *relu, const double *mean, ptrdiff_t j0, nx_fold folded,
                         C *scale, C *shift)
{
    for (ptrdiff_t j = 0, width = folded.lanes / folded.fold; j < width; j++) {
        scale[j] = (C)relu->scale[j0 + j];
        shift[j] = FN(pivot_shift)(mean[j0 + j], relu->scale[j0 + j], relu->shift[j0 + j]);
    }
    FN(spread)(scale, folded);
    FN(spread)(shift, folded);
}

/* minus_pivot and scale may be NULL, and shift then does not matter. */
NX_INLINE void FN(col_dots_group)(nx_rows x, nx_rows dy, nx_block b, const C *x_pivot,
                                  const C *minus_pivot, const C *scale, const C *shift, C *s, C *q)
{
    for (ptrdiff_t j = 0; j < b.n; j += W) {
        V sum = ZERO, dot = ZERO, p = OP(load)(x_pivot + j), minus = ZERO;
        FN(relu_mask) mask;
        if (minus_pivot) minus = OP(load)(minus_pivot + j);
        if (scale) mask = (FN(relu_mask)){OP(load)(scale + j), OP(load)(shift + j)};
        for (ptrdiff_t r = 0; r < b.rows; r++) {
            const T *xr = (const T *)x.data + r * x.stride + j;
            const T *gr = (const T *)dy.data + r * dy.stride + j;
            V d = OP(sub)(b.n - j >= W ? FN(load)(xr) : FN(load_n)(xr, b.n - j, p), p);
            V g = b.n - j >= W ? FN(load)(gr) : FN(load_n)(gr, b.n - j, ZERO);
            g = FN(gradient)(g, d, NULL, scale ? &mask : NULL, minus_pivot ? &minus : NULL);
            if (minus_pivot && b.n - j < W) g = FN(first_lanes)(g, b.n - j);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, d, dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void FN(col_dots)(nx_rows x_, nx_rows dy_, nx_block b, const double *mean,
                         const double *pivot, const nx_relu_mask *relu, nx_sums sums)
{
    C x_pivot[STRIP], minus[PADDED], scale[STRIP], shift[STRIP], s[STRIP], q[STRIP];
    double block_sum[STRIP], block_dot[STRIP];
    STRIPS (j0, width) {
        const int adjacent = x_.stride == width && dy_.stride == width;
        nx_fold folded = fold_rows(b.rows, width, adjacent, UNIT, STRIP);
        const nx_rows x = FN(strip)(x_, j0, folded), dy = FN(strip)(dy_, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) x_pivot[j] = (C)mean[j0 + j];
        for (ptrdiff_t j = 0; j < width; j++) minus[j] = pivot ? -(C)pivot[j0 + j] : 0;
        FN(spread)(x_pivot, folded);
        FN(spread)(minus, folded);
        for (ptrdiff_t j = 0; j < folded.lanes; j++) s[j] = q[j] = 0;
        if (relu) FN(masks)(relu, mean, j0, folded, scale, shift);
#define DOTS(i, rows, n, minus, scale)                                                             \
    FN(col_dots_group)(FN(from)(x, i, 0), FN(from)(dy, i, 0), (nx_block){rows, n}, x_pivot, minus, \
                       scale, shift, s, q)
#define DOTS_GROUP(i, rows, n) DOTS(i, rows, n, NULL, NULL)
#define MASKED_GROUP(i, rows, n) DOTS(i, rows, n, NULL, scale)
#define PIVOTED_GROUP(i, rows, n) DOTS(i, rows, n, minus, NULL)
#define PIVOTED_MASKED_GROUP(i, rows, n) DOTS(i, rows, n, minus, scale)
        if (pivot && relu) ROW_GROUPS(folded, PIVOTED_MASKED_GROUP);
        else if (pivot) ROW_GROUPS(folded, PIVOTED_GROUP);
        else if (relu) ROW_GROUPS(folded, MASKED_GROUP);
        else ROW_GROUPS(folded, DOTS_GROUP);
#undef DOTS
#undef DOTS_GROUP
#undef MASKED_GROUP
#undef PIVOTED_GROUP
#undef PIVOTED_MASKED_GROUP
        FN(lane_sums)(s, folded, block_sum);
        FN(lane_sums)(q, folded, block_dot);
        for (ptrdiff_t j = 0; j < width; j++) {
            sums.sum[j0 + j] += block_sum[j] - (double)b.rows * (double)minus[j];
            sums.dot[j0 + j] += block_dot[j] - (mean[j0 + j] - x_pivot[j]) * block_sum[j];
        }
    }
}

static int FN(cols_are_far)(nx_rows dy_, nx_block b, const double *sum, double count, double *pivot)
{
    C sample[PADDED];
    int any = 0;
    STRIPS (j0, width) {
        const T *dy = (const T *)dy_.data + j0, *middle = dy + b.rows / 2 * dy_.stride;
        double near = 0, each = 1 / count;
        for (ptrdiff_t j = 0; j < width; j += W)
            OP(store)(sample + j, FN(some)(middle + j, width - j, width - j >= W, ZERO));
        for (ptrdiff_t j = 0; j < width; j++) {
            double mean = sum[j0 + j] * each, is_near = nx_near(sample[j], mean) ? 1.0 : 0.0;
            pivot[j0 + j] = is_near != 0 ? mean : 0;
            near += is_near;
        }
        for (ptrdiff_t j = 0; j < width && near > 0; j++) {
            int far = pivot[j0 + j] != 0 && b.rows > 1;
            for (int i = 1; i < 8 && far; i += 2) {
                double g = FN(element)(dy + i * b.rows / 8 * dy_.stride + j);
                far = nx_near(g, pivot[j0 + j]);
            }
            if (!far) pivot[j0 + j] = 0;
            any |= far;
        }
    }
    return any;
}

NX_INLINE void FN(layer_parameters_group)(nx_rows x, nx_rows dy, nx_block b, const double *mean,
                                          const double *rstd, C *s, C *q)
{
    V p[GROUP], scale[GROUP], shift[GROUP];
    for (ptrdiff_t r = 0; r < b.rows; r++) {
        C pivot = (C)mean[r];
        p[r] = OP(set)(pivot);
        scale[r] = OP(set)((C)rstd[r]);
        shift[r] = OP(set)((C)((pivot - mean[r]) * rstd[r]));
    }
    for (ptrdiff_t j = 0; j < b.n; j += W) {
        V sum = ZERO, dot = ZERO;
        for (ptrdiff_t r = 0; r < b.rows; r++) {
            const T *xr = (const T *)x.data + r * x.stride + j;
            const T *gr = (const T *)dy.data + r * dy.stride + j;
            V v = b.n - j >= W ? FN(load)(xr) : FN(load_n)(xr, b.n - j, p[r]);
            V g = b.n - j >= W ? FN(load)(gr) : FN(load_n)(gr, b.n - j, ZERO);
            sum = OP(add)(sum, g);
            dot = OP(fma)(g, OP(fma)(OP(sub)(v, p[r]), scale[r], shift[r]), dot);
        }
        OP(store)(s + j, OP(add)(OP(load)(s + j), sum));
        OP(store)(q + j, OP(add)(OP(load)(q + j), dot));
    }
}

static void FN(layer_parameters)(nx_rows x_, nx_rows dy_, nx_block b, const double *mean,
                                 const double *rstd, double *dbeta, double *dgamma)
{
    C s[STRIP], q[STRIP];
    STRIPS (j0, width) {
        nx_fold folded = {1, width, b.rows, 0};
        const nx_rows x = FN(strip)(x_, j0, folded), dy = FN(strip)(dy_, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) s[j] = q[j] = 0;
#define PARAMETERS_GROUP(i, rows, n)                                                       \
    FN(layer_parameters_group)(FN(from)(x, i, 0), FN(from)(dy, i, 0), (nx_block){rows, n}, \
                               mean + i, rstd + i, s, q)
        ROW_GROUPS(folded, PARAMETERS_GROUP);
#undef PARAMETERS_GROUP
        for (ptrdiff_t j = 0; j < width; j++) {
            dbeta[j0 + j] += s[j];
            dgamma[j0 + j] += q[j];
        }
    }
}

#ifdef T_INT
/* Windows over images ---------------------------------------------------------------------- */

static void FN(transpose)(nx_rows x_, nx_block b, nx_rows y_)
{
    const T *x = x_.data;
    T *y = y_.data;
    const ptrdiff_t side = OP(SIDE), whole_rows = b.rows / side * side, whole_n = b.n / side * side;
    for (ptrdiff_t j = 0; j < whole_n; j += side)
        for (ptrdiff_t i = 0; i < whole_rows; i += side)
            OP(transpose_square)(x + i * x_.stride + j, x_.stride, y + j * y_.stride + i,
                                 y_.stride);
    for (ptrdiff_t i = 0; i < b.rows; i++)
        for (ptrdiff_t j = i < whole_rows ? whole_n : 0; j < b.n; j++)
            y[j * y_.stride + i] = x[i * x_.stride + j];
}

#define POOL_BLOCK 128

NX_INLINE void FN(pool_position)(const T *x, ptrdiff_t step, ptrdiff_t n, T_INT position,
                                 T *NX_RESTRICT best, T_INT *NX_RESTRICT winner)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        T v = x[i * step];
        int better = !(v <= best[i]) & (best[i] == best[i]);
        best[i] = better ? v : best[i];
        winner[i] = better ? position : winner[i];
    }
}

static void FN(pool_row)(nx_rows x_, const nx_window *window, ptrdiff_t n, void *y, void *winner,
                         int winner_size)
{
    const ptrdiff_t step = window->step, kw = window->kw, positions = window->kh * kw;
    T best[POOL_BLOCK];
    T_INT position[POOL_BLOCK];
    for (ptrdiff_t start = 0; start < n; start += POOL_BLOCK) {
        const T *x = (const T *)x_.data + start * step;
        ptrdiff_t count = n - start < POOL_BLOCK ? n - start : POOL_BLOCK;
        for (ptrdiff_t i = 0; i < count; i++) {
            best[i] = x[i * step];
            position[i] = 0;
        }
        for (ptrdiff_t k = 1; k < positions; k++) {
            const T *from = x + k / kw * x_.stride + k % kw;
            /* With the common steps as constants the compiler uses vectors. */
            if (step == 1) FN(pool_position)(from, 1, count, (T_INT)k, best, position);
            else if (step == 2) FN(pool_position)(from, 2, count, (T_INT)k, best, position);
            else FN(pool_position)(from, step, count, (T_INT)k, best, position);
        }
        for (ptrdiff_t i = 0; i < count; i++) ((T *)y)[start + i] = best[i];
        if (winner_size == 1)
            for (ptrdiff_t i = 0; i < count; i++)
                ((uint8_t *)winner)[start + i] = (uint8_t)position[i];
        else
            for (ptrdiff_t i = 0; i < count; i++)
                ((int32_t *)winner)[start + i] = (int32_t)position[i];
    }
}

/* gcc makes use of restrict on parameters, and not on the local pointers of a block: without this
 * function there would be no vectors. */
NX_INLINE void FN(adam_loop)(const nx_adam *step_, ptrdiff_t n, const T *NX_RESTRICT dw,
                             T *NX_RESTRICT next_w, T *NX_RESTRICT next_m, T *NX_RESTRICT next_v)
{
    const T *w = step_->w, *m = step_->m, *v = step_->v;
    const T keep_m = (T)step_->beta1, add_m = (T)(1 - step_->beta1), keep_v = (T)step_->beta2,
            add_v = (T)(1 - step_->beta2), step = (T)step_->rate, small = (T)step_->epsilon;
    for (ptrdiff_t i = 0; i < n; i++) {
        next_m[i] = m[i] * keep_m + dw[i] * add_m;
        next_v[i] = v[i] * keep_v + dw[i] * dw[i] * add_v;
        next_w[i] = w[i] - next_m[i] / (T_SQRT(next_v[i]) + small) * step;
    }
}

static void FN(adam)(const nx_adam *step, ptrdiff_t n)
{ FN(adam_loop)(step, n, step->dw, step->next_w, step->next_m, step->next_v); }
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
#undef ROW_BLOCK
#undef PIECE
#undef COL_ROWS
#undef STRIP
#undef PADDED
#undef GROUP
#undef ZERO
#undef INTERLEAVED
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
