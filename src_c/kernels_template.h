/* The kernels of kernels.h, written once for any element type. Takes these macros:
 *
 *     NX_ISA, NX_TYPE  names, of which the tables' names are made
 *     T                the type of the elements
 *     C, V             the type that they are computed in, and a vector of it: T is C but for
 *                      16-bit floats, which loads and stores convert
 *     T_INT            an integer type as wide as T where T is C, otherwise undefined
 *     T_NARROW         a double as a C that is to be stored, where T is not C
 *     T_UNDERFLOW      a positive result up to this becomes 0 when it is stored
 *
 * This file has what reads elements and makes sums; kernels_write.h, included at its end, what
 * writes them. */
#if !defined(NX_ISA) || !defined(NX_TYPE) || !defined(T) || !defined(C) || !defined(V) || \
    !defined(T_UNDERFLOW) || defined(T_INT) == defined(T_NARROW)
#error "kernels_template.h takes NX_ISA, NX_TYPE, T, C, V and T_UNDERFLOW"
#endif

#define NX_JOIN_(a, b, c) a##_##b##_##c
#define NX_JOIN(a, b, c) NX_JOIN_(a, b, c)

#define BY_TYPE(single, wide) (sizeof(C) == sizeof(float) ? (single) : (wide))
#define ZERO splat((C)0)

enum {
    W = sizeof(V) / sizeof(C),
    /* A vector of the widest instruction set, whichever this one is. */
    WIDEST = 64 / sizeof(C),
    /* A sum has this many lanes on every instruction set, so that all round alike: two vectors of
     * AVX-512, four of AVX2. An addition takes 4 cycles; two sums of four vectors each, as most
     * loops here have, keep both units that add busy for that long. */
    LANES = 2 * WIDEST,
    NV = LANES / W,
    HALF_NV = NV / 2, /* of sums that are made for several rows at a time */
    /* Sums are made on two levels; so many numbers are added up on the first. A lane then makes 8
     * additions there and, in a block of rows, 16 on the second level, with the rounding errors of
     * 24 additions and not of 128. These may not even cancel: numbers that are multiples of some
     * 2^-k, as those of images are, have squares whose last bits are alike, and added one by one to
     * a long sum they would be rounded down more often than up. */
    FIRST_SUM = 8 * LANES,
    /* 16 KiB: x and y, or x and dy, of a block stay in an L1 cache of 32 KiB together. */
    ROW_BLOCK = 16384 / sizeof(C),
    /* 128 additions for a column, 8 and 16 on the two levels likewise; where rows are folded, up to
     * 24 on the second. */
    COL_ROWS = 128,
    /* Columns whose coefficients and sums are held on the stack, in 4 KiB for each: the seven of dx
     * stay in the L1 cache. */
    COLS_AT_ONCE = 4096 / sizeof(C),
    /* Blocks of few columns may have more rows, where these can be folded into many lanes. */
    COL_BLOCK = COL_ROWS * COLS_AT_ONCE / 2,
    /* A vector of coefficients may begin at any of them. */
    PADDED = COLS_AT_ONCE + WIDEST,
    /* Rows that are added up on the first level, in registers: a column's sums are loaded and
     * stored once for 8 of its numbers. */
    ROWS_AT_ONCE = 8,
    /* Rows that are written together, for which a column's coefficients are loaded once. */
    ROWS_WRITTEN = 4,
    /* At least so many rows, or all there are, make a column's pivot, and less than twice as many:
     * its distance from the mean is then a sixth of the standard deviation. */
    SAMPLE = 32,
    /* Short rows that go through each step together. Rows of 48 floats, normalized with AVX-512 on
     * a Zen 4, take 39 ns each one by one, 23 with 4, 20 with 8 and 19 with 16. */
    INTERLEAVED = 8,
    /* Rows of fewer numbers go around the caches together, if at all. */
    SHORT_RUN = 512,
};

/* Squares of float have all their 24 digits from 2^-126 on; those below do not show beside a
 * variance of 2^-102 = 2.0e-31 or more. 2^100 makes of the smallest number, 2^-149, one whose
 * square is 2^-98 = 3.2e-30; 2^-80 of the largest, 2^128, one whose square is 2^96. The ulp of a
 * mean from 2^-22 on is 2^-46 or more, with a square of 2^-92 = 2.0e-28 or more. Likewise those of
 * double: 53 digits from 2^-1022 on, which make 2^-969 = 2.0e-292, and numbers from 2^-1074 to
 * 2^1024. */
#define RANGE                                                                       \
    {BY_TYPE(1e-30, 1e-290), BY_TYPE(0x1p100, 0x1p600), BY_TYPE(0x1p-80, 0x1p-540), \
     BY_TYPE(0x1p-22, 0x1p-300)}
static const nx_range range = RANGE;

/* Statistics up to this, and from its inverse on, are applied in C: 8 (and 18) digits are left to
 * what comes of them before C overflows, at 3.4e38 (1.8e308), or loses digits, at 1.2e-38
 * (2.2e-308). */
#define LARGE BY_TYPE(1e30, 1e290)

/* Rows of few columns that lie one after the other in memory are folded, so that they fill whole
 * vectors: `fold` of them are taken for one of `lanes` numbers, and what is left for one of `tail`
 * numbers. Of 100 rows of 6 columns of float, 8 at a time make 12 rows of 48 lanes and a tail of 24.
 * A column then has `fold` lanes, which share its coefficients and whose sums are its sum. Of many
 * rows so many are folded that memory is gone through in stretches which its prefetcher follows. */
typedef struct {
    ptrdiff_t fold, lanes, rows, tail;
} nx_fold;

static nx_fold fold_rows(nx_block b, int adjacent)
{
    ptrdiff_t fold = 1, most, times;
    if (adjacent && b.n <= COLS_AT_ONCE / 2) {
        while (fold < WIDEST && fold * b.n % WIDEST) fold *= 2;
        most = COLS_AT_ONCE / b.n < b.rows / 64 ? COLS_AT_ONCE / b.n : b.rows / 64;
        times = most / fold;
        /* An odd number: rows 4 KiB apart, of which there are 8 at once, are all kept in the same
         * few places of an L1 cache. */
        if (times > 1) fold *= times - (times % 2 == 0);
        while (fold * b.n > COLS_AT_ONCE || b.rows < 4 * fold) fold = fold == 1 ? 0 : fold / 2;
    }
    /* Of few rows that are longer than a vector, no more than whole vectors. */
    if (b.n > WIDEST && fold * b.n % WIDEST && b.rows < 64 * fold) fold = 1;
    if (fold <= 1) return (nx_fold){1, b.n, b.rows, 0};
    return (nx_fold){fold, fold * b.n, b.rows / fold, b.rows % fold * b.n};
}

NX_INLINE V some(const T *p, ptrdiff_t left, int whole, V fill)
{ return whole ? load(p) : load_n(p, left, fill); }
NX_INLINE V coefficients(const C *p, ptrdiff_t left, int whole)
{ return whole ? load(p) : load_n(p, left, ZERO); }

/* How many of n numbers lie before the first aligned vector. */
NX_INLINE ptrdiff_t unaligned(const T *p, ptrdiff_t n)
{
    ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)p % (W * sizeof(T)) / sizeof(T));
    return head < n ? head : n;
}

/* From number i of row r on. */
NX_INLINE nx_rows rows_at(nx_rows x, ptrdiff_t r, ptrdiff_t i)
{ return (nx_rows){(T *)x.data + r * x.stride + i, x.stride}; }

static const nx_rows none = {NULL, 0};

/* Some rows of a backward pass, or of each a part, from number i of row r on: for its sums, */
NX_INLINE nx_backward sums_part(nx_backward of, ptrdiff_t r, ptrdiff_t i, nx_block block)
{
    of.block = block;
    of.x = rows_at(of.x, r, i);
    of.dy = rows_at(of.dy, r, i);
    if (of.gamma) of.gamma = (const C *)of.gamma + i;
    return of;
}

/* and whole rows for dx as well. */
NX_INLINE nx_backward rows_part(nx_backward of, ptrdiff_t r, nx_block block)
{
    of.dx = rows_at(of.dx, r, 0);
    if (of.addend.data) of.addend = rows_at(of.addend, r, 0);
    return sums_part(of, r, 0, block);
}

/* A backward pass with these: for what is NULL or none here no code is made. */
NX_INLINE nx_backward with(nx_backward of, const void *gamma, const nx_relu_mask *relu,
                           nx_rows addend)
{
    of.gamma = gamma;
    of.relu = relu;
    of.addend = addend;
    return of;
}

/* Rows ------------------------------------------------------------------------------------- */

/* The sum of all lanes of some vectors, by halves; the loops are of constant lengths, so that the
 * compiler unrolls them and keeps the vectors in registers. */
NX_INLINE C sum_lanes(V *lanes, int vectors)
{
#define ADD_HALF(half)  \
    if (vectors > half) \
        for (int k = 0; k < half; k++) lanes[k] = add(lanes[k], lanes[k + half])
    ADD_HALF(16);
    ADD_HALF(8);
    ADD_HALF(4);
    ADD_HALF(2);
    ADD_HALF(1);
#undef ADD_HALF
    return total(lanes[0]);
}

/* The mean, roughly. */
NX_INLINE double row_mean(nx_rows x, nx_block b, C scale)
{
    const T *row = x.data;
    V s[NV], factor = splat(scale), zero = ZERO;
    for (int k = 0; k < NV; k++) s[k] = zero;
    for (ptrdiff_t r = 0; r < b.rows; r++, row += x.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) s[k] = mul_add(load(row + i + k * W), factor, s[k]);
        for (int k = 0; k < NV && i < b.n; k++, i += W)
            s[k] = mul_add(some(row + i, b.n - i, b.n - i >= W, zero), factor, s[k]);
    }
    return (double)sum_lanes(s, NV) / ((double)b.rows * (double)b.n) / scale;
}

/* The mean of a sample of a block: of the numbers at four places, a vector's worth at each. */
NX_INLINE double sample_mean(nx_rows x, nx_block b, C scale)
{
    const ptrdiff_t width = b.n < WIDEST ? b.n : WIDEST;
    V s[HALF_NV], factor = splat(scale);
    if (b.rows * b.n <= 4 * WIDEST) return row_mean(x, b, scale);
    for (int k = 0; k < HALF_NV; k++) s[k] = ZERO;
    for (ptrdiff_t place = 0; place < 4; place++) {
        const T *p = rows_at(x, place * b.rows / 4, place * (b.n - width) / 3).data;
        for (ptrdiff_t k = 0, i = 0; k < HALF_NV && i < width; k++, i += W)
            s[k] = mul_add(some(p + i, width - i, width - i >= W, ZERO), factor, s[k]);
    }
    return (double)sum_lanes(s, HALF_NV) / (4 * (double)width) / scale;
}

/* How many rows of n numbers the first level of sums adds up. */
NX_INLINE ptrdiff_t rows_of_first_sum(ptrdiff_t left, ptrdiff_t n)
{
    ptrdiff_t rows = n < FIRST_SUM ? FIRST_SUM / n : 1;
    return left < rows ? left : rows;
}

/* Adds FIRST_SUM numbers at most to the lanes of sum and squares, through lanes of its own. */
NX_INLINE void first_moments(nx_rows x, nx_block b, V p, V factor, V offset, V *sum, V *squares)
{
    const T *row = x.data;
    V s[NV], q[NV];
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t r = 0; r < b.rows; r++, row += x.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) {
                V d = mul_add(load(row + i + k * W), factor, offset);
                s[k] = add(s[k], d);
                q[k] = mul_add(d, d, q[k]);
            }
        for (int k = 0; k < NV && i < b.n; k++, i += W) {
            V d = mul_add(some(row + i, b.n - i, b.n - i >= W, p), factor, offset);
            s[k] = add(s[k], d);
            q[k] = mul_add(d, d, q[k]);
        }
    }
    for (int k = 0; k < NV; k++) {
        sum[k] = add(sum[k], s[k]);
        squares[k] = add(squares[k], q[k]);
    }
}

/* The sum of (x - pivot) * scale, and of its squares. */
NX_INLINE void row_powers(nx_rows x, nx_block b, C pivot, C scale, double *sum, double *squares)
{
    V s[NV], q[NV], factor = splat(scale), p = splat(pivot), offset = splat(-pivot * scale);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    for (ptrdiff_t count, left = b.rows; left > 0; left -= count, x = rows_at(x, count, 0)) {
        count = b.rows == 1 ? 1 : rows_of_first_sum(left, b.n);
        for (ptrdiff_t i = 0; i < b.n; i += FIRST_SUM) {
            nx_block first = {count, b.n - i < FIRST_SUM ? b.n - i : FIRST_SUM};
            first_moments(rows_at(x, 0, i), first, p, factor, offset, s, q);
        }
    }
    *sum = sum_lanes(s, NV);
    *squares = sum_lanes(q, NV);
}

/* Moments of x * scale, from powers about a pivot, or about zero. */
NX_INLINE nx_moments moments(double count, int centred, C pivot, C scale, double sum,
                             double squares)
{
    double mean = sum / count, m2 = squares - sum * mean;
    if (!centred) return (nx_moments){count, 0, squares};
    return (nx_moments){count, (double)pivot * scale + mean, m2 < 0 ? 0 : m2};
}

/* Squares are taken about a pivot near the mean: those of 10000 +- 1 would have no digit left for
 * the variance. That of a block is guessed from a sample. Where the guess is a distance d from the
 * mean, the squares are too large by d * d, which is subtracted again and leaves a rounding error
 * that is small beside d * d. Up to the standard deviation that does not matter; where it is more (a
 * wild outlier was in the sample), the block is gone through once more, about the mean found. */
NX_INLINE int missed(nx_moments m, double pivot)
{
    double distance = m.mean - pivot;
    return distance * distance * m.count > m.m2;
}

NX_OUTLINE nx_moments moments_about(nx_rows x, nx_block b, C pivot, C scale)
{
    double sum, squares;
    row_powers(x, b, pivot, scale, &sum, &squares);
    return moments((double)b.rows * (double)b.n, 1, pivot, scale, sum, squares);
}

/* Adds a block's moments to m. For later blocks the mean of all before is the pivot: the merged m2
 * has a share of the square of their distance in it, whatever the pivot. */
NX_INLINE void add_moments(nx_rows x, nx_block b, int centred, C scale, nx_moments *m)
{
    const int first = m->count == 0;
    double sum, squares;
    nx_moments added;
    C pivot = 0;
    if (centred) pivot = (C)(first ? sample_mean(x, b, scale) : m->mean / scale);
    row_powers(x, b, pivot, scale, &sum, &squares);
    added = moments((double)b.rows * (double)b.n, centred, pivot, scale, sum, squares);
    if (centred && first && missed(added, (double)pivot * scale))
        added = moments_about(x, b, (C)(added.mean / scale), scale);
    nx_merge(m, added);
}

NX_OUTLINE void row_moments(nx_rows x, nx_block b, int centred, double scale, nx_moments *m)
{ add_moments(x, b, centred, (C)scale, m); }

/* Whether a map's mean and scale are at the ends of the range of C: a deviation from the mean may
 * overflow, or the scale. */
NX_INLINE int far_out(double mean, double scale)
{
    return (fabs(mean) > LARGE) | (fabs(scale) > LARGE) |
           ((fabs(scale) < 1 / LARGE) & (scale != 0));
}

/* How many of n maps come before the first that is. */
NX_INLINE ptrdiff_t ordinary(const double *mean, const double *scale, ptrdiff_t n)
{
    int any = 0;
    for (ptrdiff_t j = 0; j < n; j++) any |= far_out(mean[j], scale[j]);
    if (!any) return n;
    for (ptrdiff_t j = 0; j < n; j++)
        if (far_out(mean[j], scale[j])) return j;
    return n;
}

NX_INLINE double element(const T *p)
{
#ifdef T_INT
    return *p;
#else
    C lanes[W];
    store(lanes, load_n(p, 1, ZERO));
    return lanes[0];
#endif
}

/* (x - mean) * scale + shift = (x - pivot) * scale + this, the pivot being the mean as a C. */
NX_INLINE C pivot_shift(double mean, double scale, double shift)
{ return (C)(shift - (mean - (C)mean) * scale); }

/* An affine map by way of double, for means and scales at the ends of the range of C: rare, and
 * slow. */
NX_OUTLINE void affine_far_out(const T *x, T *y, ptrdiff_t n, const nx_affine *map, const C *gamma,
                               const C *beta, int relu)
{
    const double mean = *map->mean, scale = *map->scale, shift = *map->shift;
    const double half = fabs(scale) < 1 ? 0.5 : 1; /* x - mean may overflow; not half of it */
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        ptrdiff_t left = n - i;
        store(lanes, some(x + i, left, left >= W, ZERO));
        for (ptrdiff_t k = 0; k < W && k < left; k++) {
            double v = ((double)lanes[k] * half - mean * half) * scale / half + shift;
            if (gamma) v *= (double)gamma[i + k];
            if (beta) v += (double)beta[i + k];
            lanes[k] = (C)(relu && v <= 0 ? 0 : v);
        }
        if (left >= W) store(y + i, load(lanes));
        else store_n(y + i, left, load(lanes));
    }
}

NX_INLINE nx_affine map_at(nx_affine map, ptrdiff_t r)
{
    map.mean += r * map.step, map.scale += r * map.step, map.shift += r * map.step;
    return map;
}

/* The affine map under a relu, about its pivot: a gradient passes where the map's result, found
 * again from x as it was found in the forward pass, is above zero. */
typedef struct {
    V scale, shift;
} relu_mask;

NX_INLINE relu_mask mask_of(const nx_relu_mask *relu, double mean)
{
    C shift = pivot_shift(mean, *relu->scale, *relu->shift);
    return (relu_mask){splat((C)*relu->scale), splat(shift)};
}

NX_INLINE V masked(V g, V d, relu_mask mask)
{
    V y = mul_add(d, mask.scale, mask.shift);
    return keep_positive(g, T_UNDERFLOW ? sub(y, splat((C)T_UNDERFLOW)) : y);
}

/* nx_line about pivots of C, what their rounding leaves being in the constant; and a relu mask. */
typedef struct {
    V x_pivot, minus_pivot, factor, slope, constant;
    relu_mask mask;
} line_vectors;

/* The coefficients of some columns: a line and a relu mask for each, about the columns' pivots. */
typedef struct {
    const C *x_pivot, *minus_pivot, *factor, *slope, *constant, *mask_scale, *mask_shift;
} line_columns;

/* What a relu or gamma, and a pivot, make of a vector of dy: each of them may be NULL. The pivot
 * comes with its sign changed. */
NX_INLINE V gradient(V dy, V d, const V *gamma, const relu_mask *mask, const V *minus_pivot)
{
    /* before a far product is rounded */
    if (gamma && minus_pivot) return mul_add_once(dy, *gamma, *minus_pivot);
    V g = gamma ? mul(dy, *gamma) : mask ? masked(dy, d, *mask) : dy;
    return minus_pivot ? add(g, *minus_pivot) : g;
}

/* v with zeros from lane n on. */
NX_INLINE V first_lanes(V v, ptrdiff_t n)
{
    static const C ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return keep_positive(v, load_n(ones, n, ZERO));
}

NX_INLINE void first_dots(nx_backward of, V p, const V *minus_pivot, const relu_mask *mask, V *sum,
                          V *dot)
{
    const T *x = of.x.data, *dy = of.dy.data;
    const C *gamma = of.gamma;
    const nx_block b = of.block;
    V s[NV], q[NV], zero = ZERO, c = ZERO;
    for (int k = 0; k < NV; k++) s[k] = q[k] = zero;
    for (ptrdiff_t r = 0; r < b.rows; r++, x += of.x.stride, dy += of.dy.stride) {
        ptrdiff_t i = 0;
        for (; i + LANES <= b.n; i += LANES)
            for (int k = 0; k < NV; k++) {
                if (of.ahead) NX_PREFETCH(x + i + k * W + of.ahead);
                V d = sub(load(x + i + k * W), p);
                if (gamma) c = load(gamma + i + k * W);
                V g = load(dy + i + k * W);
                g = gradient(g, d, gamma ? &c : NULL, mask, minus_pivot);
                s[k] = add(s[k], g);
                q[k] = mul_add(g, d, q[k]);
            }
        for (int k = 0; k < NV && i < b.n; k++, i += W) {
            ptrdiff_t left = b.n - i;
            int whole = left >= W;
            V d = sub(some(x + i, left, whole, p), p);
            if (gamma) c = coefficients(gamma + i, left, whole);
            V g = some(dy + i, left, whole, zero);
            g = gradient(g, d, gamma ? &c : NULL, mask, minus_pivot);
            if (minus_pivot) g = first_lanes(g, left);
            s[k] = add(s[k], g);
            q[k] = mul_add(g, d, q[k]);
        }
    }
    for (int k = 0; k < NV; k++) {
        sum[k] = add(sum[k], s[k]);
        dot[k] = add(dot[k], q[k]);
    }
}

NX_INLINE void dots_loop(nx_backward of, double mean, const double *pivot, nx_sums sums)
{
    const nx_block b = of.block;
    const C x_pivot = (C)mean, g_pivot = pivot ? (C)*pivot : 0;
    const V p = splat(x_pivot), minus_pivot = splat(-g_pivot);
    V s[NV], q[NV];
    relu_mask mask;
    if (of.relu) mask = mask_of(of.relu, mean);
    for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
    const double numbers = (double)(sums.step ? 1 : b.rows) * (double)b.n;
    for (ptrdiff_t count, left = b.rows; left > 0; left -= count) {
        count = sums.step || b.rows == 1 ? 1 : rows_of_first_sum(left, b.n);
        for (ptrdiff_t i = 0; i < b.n; i += FIRST_SUM) {
            nx_block first = {count, b.n - i < FIRST_SUM ? b.n - i : FIRST_SUM};
            first_dots(sums_part(of, 0, i, first), p, pivot ? &minus_pivot : NULL,
                       of.relu ? &mask : NULL, s, q);
        }
        of = sums_part(of, count, 0, b);
        if (!sums.step && count < left) continue;
        double block_sum = sum_lanes(s, NV);
        *sums.sum += pivot ? numbers * g_pivot + block_sum : block_sum;
        *sums.dot += sum_lanes(q, NV) - (mean - x_pivot) * block_sum;
        for (int k = 0; k < NV; k++) s[k] = q[k] = ZERO;
        sums.sum += sums.step;
        sums.dot += sums.step;
    }
}

/* The same about a pivot: rare, and so one loop for all cases. */
NX_OUTLINE void dots_about(const nx_backward *of, double mean, const double *pivot, nx_sums sums)
{ dots_loop(*of, mean, pivot, sums); }

NX_OUTLINE void row_dots(const nx_backward *of, double mean, const double *pivot, nx_sums sums)
{
    if (pivot) dots_about(of, mean, pivot, sums);
    else if (of->gamma) dots_loop(with(*of, of->gamma, NULL, none), mean, NULL, sums);
    else if (of->relu) dots_loop(with(*of, NULL, of->relu, none), mean, NULL, sums);
    else dots_loop(with(*of, NULL, NULL, none), mean, NULL, sums);
}

static int row_is_far(const void *dy_, ptrdiff_t n, const void *gamma_, double mean)
{
    const T *dy = dy_;
    const C *gamma = gamma_;
    for (int i = 1; i < 8; i += 2) {
        ptrdiff_t j = i * n / 8;
        double g = gamma ? element(dy + j) * (double)gamma[j] : element(dy + j);
        if (!nx_near(g, mean)) return 0;
    }
    return n > 1;
}

/* The same where it is asked of many short rows: one number most often tells. */
NX_INLINE int is_far(const T *dy, ptrdiff_t n, const C *gamma, double mean)
{
    ptrdiff_t j = n / 2;
    double g = gamma ? element(dy + j) * (double)gamma[j] : element(dy + j);
    return nx_near(g, mean) && row_is_far(dy, n, gamma, mean);
}

/* Some rows go through each step interleaved: what one has to wait for in its statistics (a dozen
 * additions, divisions and a root, each needing the one before) the others fill with work. All
 * steps find them in the L1 cache, which holds `most` of their numbers: ROW_BLOCK, or where a third
 * array comes to x and y, two thirds of that. (With ROW_BLOCK, rows of 512 floats take 97 ns and
 * not 75 on their way back.) */
NX_INLINE ptrdiff_t rows_interleaved(ptrdiff_t left, ptrdiff_t n, ptrdiff_t most)
{
    ptrdiff_t rows = n * INTERLEAVED <= most ? INTERLEAVED : n < most ? most / n : 1;
    return left < rows ? left : rows;
}

/* The statistics of a row whose pivot was missed, or that needs another scale than 1. */
NX_OUTLINE void statistics_again(nx_rows x, ptrdiff_t n, int centred, double eps, double *mean,
                                 double *rstd)
{
    nx_moments m = {0, 0, 0};
    double scale;
    row_moments(x, (nx_block){1, n}, centred, 1, &m);
    scale = nx_rescale(&range, m);
    if (scale != 1) {
        m = (nx_moments){0, 0, 0};
        row_moments(x, (nx_block){1, n}, centred, scale, &m);
    }
    nx_finish_moments(m, scale, eps, mean, rstd, NULL);
}

NX_OUTLINE void statistics_interleaved(nx_rows x, nx_block b, int centred, double eps, double *mean,
                                       double *rstd)
{
    C pivot[INTERLEAVED] = {0};
    double sum[INTERLEAVED] = {0}, squares[INTERLEAVED] = {0}, offset[INTERLEAVED], m2[INTERLEAVED],
           wrong[INTERLEAVED], inverse[INTERLEAVED], any = 0;
    const nx_block row = {1, b.n};
    const double n = (double)b.n;
    if (centred)
        for (ptrdiff_t r = 0; r < b.rows; r++) pivot[r] = (C)sample_mean(rows_at(x, r, 0), row, 1);
    for (ptrdiff_t r = 0; r < b.rows; r++)
        row_powers(rows_at(x, r, 0), row, pivot[r], 1, sum + r, squares + r);
    /* Without a branch, and of a constant length, these become vectors: as nx_finish_moments. */
    for (int r = 0; r < INTERLEAVED; r++) {
        offset[r] = centred ? sum[r] / n : 0;
        m2[r] = squares[r] - sum[r] * offset[r];
        m2[r] = m2[r] < 0 ? 0 : m2[r];
        wrong[r] = (m2[r] <= DBL_MAX ? 0.0 : 1.0) + (m2[r] < range.tiny * n ? 1.0 : 0.0) +
                   (offset[r] * offset[r] * n > m2[r] ? 1.0 : 0.0);
        inverse[r] = m2[r] / n + eps;
    }
    for (int r = 0; r < INTERLEAVED; r++) inverse[r] = 1 / sqrt(inverse[r]);
    for (int r = 0; r < INTERLEAVED; r++) any += wrong[r];
    for (ptrdiff_t r = 0; r < b.rows; r++) {
        mean[r] = pivot[r] + offset[r];
        rstd[r] = inverse[r];
    }
    for (ptrdiff_t r = 0; r < b.rows && any != 0; r++)
        if (wrong[r] != 0)
            statistics_again(rows_at(x, r, 0), b.n, centred, eps, mean + r, rstd + r);
}

/* Rows of a backward pass that go through its first step together: gamma and the sums down the
 * columns are loaded once for all of them. With 4 rows, their sums and coefficients are 16
 * registers. */
enum { ROWS_TOGETHER = 4 };

/* Adds the part of `rows` rows from i on, a vector each at most: g and g * xhat to the rows' sums
 * and dots, dy and dy * xhat to those of the columns. */
NX_INLINE void layer_dots_vector(nx_backward of, ptrdiff_t rows, int centred, ptrdiff_t i,
                                 ptrdiff_t left, int whole, const V *p, const V *scale,
                                 const V *shift, V *sum, V *dot, C *col_sum, C *col_dot)
{
    V c = ZERO, s = ZERO, q = ZERO;
    if (of.gamma) c = coefficients((const C *)of.gamma + i, left, whole);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const T *x = (const T *)of.x.data + r * of.x.stride + i;
        const T *dy = (const T *)of.dy.data + r * of.dy.stride + i;
        if (of.ahead) NX_PREFETCH(x + of.ahead);
        V xhat = mul_add(sub(some(x, left, whole, p[r]), p[r]), scale[r], shift[r]);
        V g = some(dy, left, whole, ZERO);
        g = hold(g);
        if (centred) s = r ? add(s, g) : g;
        q = r ? mul_add(g, xhat, q) : mul(g, xhat);
        if (of.gamma) g = mul(g, c);
        if (centred) sum[r] = add(sum[r], g);
        dot[r] = mul_add(g, xhat, dot[r]);
    }
    if (centred) store(col_sum + i, add(load(col_sum + i), s));
    store(col_dot + i, add(load(col_dot + i), q));
}

/* The sums of g and of g * xhat of each of `rows` rows, and of all of them down the columns, added
 * to col_sum and col_dot, which are padded to whole vectors. About zero no sum of g is needed. */
NX_INLINE void layer_dots_rows(nx_backward of, ptrdiff_t rows, int centred, const double *mean,
                               const double *rstd, double *sum, double *dot, C *col_sum, C *col_dot)
{
    V p[ROWS_TOGETHER], scale[ROWS_TOGETHER], shift[ROWS_TOGETHER];
    V s[HALF_NV][ROWS_TOGETHER], q[HALF_NV][ROWS_TOGETHER];
    V all_s[ROWS_TOGETHER][HALF_NV], all_q[ROWS_TOGETHER][HALF_NV];
    for (ptrdiff_t r = 0; r < rows; r++) {
        C pivot = (C)mean[r];
        p[r] = splat(pivot);
        scale[r] = splat((C)rstd[r]);
        shift[r] = splat((C)((pivot - mean[r]) * rstd[r]));
        for (int k = 0; k < HALF_NV; k++) all_s[r][k] = all_q[r][k] = ZERO;
    }
#define VECTOR(k, i, left, whole)                                                              \
    layer_dots_vector(of, rows, centred, i, left, whole, p, scale, shift, s[k], q[k], col_sum, \
                      col_dot)
    for (ptrdiff_t first = 0; first < of.block.n; first += FIRST_SUM) {
        const ptrdiff_t end = of.block.n - first < FIRST_SUM ? of.block.n : first + FIRST_SUM;
        ptrdiff_t i = first;
        for (int k = 0; k < HALF_NV; k++)
            for (ptrdiff_t r = 0; r < rows; r++) s[k][r] = q[k][r] = ZERO;
        for (; i + WIDEST <= end; i += WIDEST)
            for (int k = 0; k < HALF_NV; k++) VECTOR(k, i + k * W, W, 1);
        for (int k = 0; k < HALF_NV && i < end; k++, i += W) VECTOR(k, i, end - i, end - i >= W);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (int k = 0; k < HALF_NV; k++) {
                all_s[r][k] = add(all_s[r][k], s[k][r]);
                all_q[r][k] = add(all_q[r][k], q[k][r]);
            }
    }
#undef VECTOR
    for (ptrdiff_t r = 0; r < rows; r++) {
        if (centred) sum[r] += sum_lanes(all_s[r], HALF_NV);
        dot[r] += sum_lanes(all_q[r], HALF_NV);
    }
}

/* The same of any number of rows; one loop for each case. */
NX_INLINE void layer_dots_of(nx_backward of, int centred, const double *mean, const double *rstd,
                             double *sum, double *dot, C *col_sum, C *col_dot)
{
    ptrdiff_t r = 0;
    for (; r + ROWS_TOGETHER <= of.block.rows; r += ROWS_TOGETHER)
        layer_dots_rows(sums_part(of, r, 0, of.block), ROWS_TOGETHER, centred, mean + r, rstd + r,
                        sum + r, dot + r, col_sum, col_dot);
    for (; r < of.block.rows; r++)
        layer_dots_rows(sums_part(of, r, 0, of.block), 1, centred, mean + r, rstd + r, sum + r,
                        dot + r, col_sum, col_dot);
}

NX_OUTLINE void layer_dots_any(const nx_backward *of, int centred, const double *mean,
                               const double *rstd, double *sum, double *dot, C *col_sum, C *col_dot)
{
#define DOTS(gamma, centred) \
    layer_dots_of(with(*of, gamma, NULL, none), centred, mean, rstd, sum, dot, col_sum, col_dot)
    if (of->gamma && centred) DOTS(of->gamma, 1);
    else if (of->gamma) DOTS(of->gamma, 0);
    else if (centred) DOTS(NULL, 1);
    else DOTS(NULL, 0);
#undef DOTS
}

/* Sums down columns, which are added up as C first, on their way to those in double. */
NX_INLINE void add_to(double *NX_RESTRICT sum, const C *NX_RESTRICT some, ptrdiff_t n)
{
    for (ptrdiff_t j = 0; j < n; j++) sum[j] += some[j];
}

static void layer_dots(const nx_backward *of, int centred, const double *mean, const double *rstd,
                       nx_sums sums, double *dbeta, double *dgamma)
{
    C s[ROW_BLOCK + WIDEST], q[ROW_BLOCK + WIDEST];
    const ptrdiff_t n = of->block.n;
    memset(s, 0, (n + WIDEST) * sizeof(C));
    memset(q, 0, (n + WIDEST) * sizeof(C));
    layer_dots_any(of, centred, mean, rstd, sums.sum, sums.dot, s, q);
    if (centred) add_to(dbeta, s, n);
    add_to(dgamma, q, n);
}

/* Rows of a backward pass whose x and dy are met twice, the second time in the L1 cache where that
 * holds several of them. */
NX_INLINE ptrdiff_t rows_together(ptrdiff_t left, ptrdiff_t n)
{
    const ptrdiff_t rows = ROW_BLOCK / n / ROWS_TOGETHER * ROWS_TOGETHER,
                    least = rows < ROWS_TOGETHER ? ROWS_TOGETHER : rows;
    return left < least ? left : least;
}

#include "kernels_short.h"

static void add_rows(nx_rows a_, nx_rows b_, nx_rows sum_, nx_block block)
{
    const T *a = a_.data, *b = b_.data;
    T *sum = sum_.data;
    const ptrdiff_t n = block.n;
    for (ptrdiff_t r = 0; r < block.rows; r++, a += a_.stride, b += b_.stride, sum += sum_.stride) {
        ptrdiff_t i = 0;
        for (; i + W <= n; i += W) store(sum + i, add(load(a + i), load(b + i)));
        if (i == n) continue;
        V tail = add(load_n(a + i, n - i, ZERO), load_n(b + i, n - i, ZERO));
        store_n(sum + i, n - i, tail);
    }
}

static void widen(const void *x_, ptrdiff_t n, double *y)
{
    const T *x = x_;
#ifdef T_INT
    for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i];
#else
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        store(lanes, some(x + i, n - i, n - i >= W, ZERO));
        for (ptrdiff_t k = 0; k < W && i + k < n; k++) y[i + k] = lanes[k];
    }
#endif
}

static void narrow(const double *x, ptrdiff_t n, void *y_)
{
    T *y = y_;
#ifdef T_INT
    for (ptrdiff_t i = 0; i < n; i++) y[i] = (T)x[i];
#else
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        for (ptrdiff_t k = 0; k < W; k++) lanes[k] = i + k < n ? T_NARROW(x[i + k]) : 0;
        store_n(y + i, n - i, load(lanes));
    }
#endif
}

static void inverse_stds(double *variance, ptrdiff_t n, double eps)
{ nx_inverse_stds(variance, n, eps); }

static int any_outside(const double *p, ptrdiff_t n, double least, double largest)
{
    int64_t outside = 0; /* as wide as the numbers, to become vectors */
    for (ptrdiff_t i = 0; i < n; i++) outside |= ((p[i] < least) & (p[i] > 0)) | (p[i] > largest);
    return outside != 0;
}

static void multiply(double *NX_RESTRICT a, const double *NX_RESTRICT b, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) a[i] *= b[i];
}

static void update_running(void *s, int single, ptrdiff_t n, double momentum, double share,
                           const double *NX_RESTRICT batch)
{
    float *NX_RESTRICT f = s;
    double *NX_RESTRICT d = s;
    if (single)
        for (ptrdiff_t i = 0; i < n; i++) f[i] = (float)(momentum * f[i] + share * batch[i]);
    else
        for (ptrdiff_t i = 0; i < n; i++) d[i] = momentum * d[i] + share * batch[i];
}

/* Columns ---------------------------------------------------------------------------------- *
 *
 * COLS_AT_ONCE columns at a time; within them row by row, so that memory is read in order,
 * ROWS_AT_ONCE rows interleaved, whose sums are added to the columns' (two levels, as in rows).
 * Coefficients and sums are arrays of C on the stack, padded to whole vectors. */

#define EACH_COLUMNS(j0, width)   \
    for (ptrdiff_t j0 = 0, width; \
         j0 < b.n && (width = b.n - j0 < COLS_AT_ONCE ? b.n - j0 : COLS_AT_ONCE, 1); j0 += width)

/* f(first row, rows, numbers in a row), for ROWS_AT_ONCE rows at a time, as a constant with which
 * the compiler unrolls a loop over them, then for those that are left, then for the tail. */
#define EACH_ROWS(folded, f)                                           \
    do {                                                               \
        ptrdiff_t i_ = 0;                                              \
        for (; i_ + ROWS_AT_ONCE <= (folded).rows; i_ += ROWS_AT_ONCE) \
            f(i_, ROWS_AT_ONCE, (folded).lanes);                       \
        const ptrdiff_t left_ = (folded).rows - i_;                    \
        if (left_) f(i_, left_, (folded).lanes);                       \
        if ((folded).tail) f(i_ + left_, 1, (folded).tail);            \
    } while (0)

/* What is gone through at a time: columns of an example, or all of several. The numbers that each
 * column has begin at number `at`; `stride` of those on the stack belong to an example. */
typedef struct {
    ptrdiff_t example, examples, col, width, at, stride;
    nx_fold folded;
} nx_part;

/* `around` asks for a vector more of each example's coefficients. */
NX_INLINE nx_part part_at(nx_columns b, int adjacent, int around, ptrdiff_t example, ptrdiff_t col)
{
    const ptrdiff_t width = b.n - col < COLS_AT_ONCE ? b.n - col : COLS_AT_ONCE;
    nx_part p = {example, 1, col, width, example * b.n + col, 0, {0, 0, 0, 0}};
    p.folded = fold_rows((nx_block){b.rows, width}, adjacent && width == b.n);
    p.stride = p.folded.fold == 1 && !around ? width : p.folded.lanes + WIDEST;
    if (width == b.n) {
        p.examples = PADDED / (p.folded.lanes + WIDEST);
        if (p.examples > b.examples - example) p.examples = b.examples - example;
    }
    return p;
}

#define EACH_PART(p, b, adjacent, around)                                                       \
    for (nx_part p = part_at(b, adjacent, around, 0, 0); p.example < (b).examples;              \
         p = p.col + p.width < (b).n ? part_at(b, adjacent, around, p.example, p.col + p.width) \
             : p.example + p.examples < (b).examples                                            \
                 ? part_at(b, adjacent, around, p.example + p.examples, 0)                      \
                 : (nx_part){.example = (b).examples})

/* An example's rows of a part. */
NX_INLINE nx_rows part_rows(nx_groups x, nx_part p, ptrdiff_t e)
{ return (nx_rows){(T *)x.data + (p.example + e) * x.group + p.col, p.folded.fold * x.row}; }

/* f(width) with a few widths as constants: the loops over them are no loops then. */
#define BY_WIDTH(width, f) \
    switch (width) {       \
    case 1:                \
        f(1);              \
        break;             \
    case 2:                \
        f(2);              \
        break;             \
    case 3:                \
        f(3);              \
        break;             \
    case 4:                \
        f(4);              \
        break;             \
    case 5:                \
        f(5);              \
        break;             \
    case 6:                \
        f(6);              \
        break;             \
    case 7:                \
        f(7);              \
        break;             \
    case 8:                \
        f(8);              \
        break;             \
    default:               \
        f(width);          \
    }

NX_INLINE void repeat_columns(C *c, nx_part p, ptrdiff_t width)
{
    for (ptrdiff_t e = p.examples - 1; e >= 0; e--) {
        C *to = c + e * p.stride;
        const C *from = c + e * width;
        ptrdiff_t j = width;
        if (width <= 8) {
            C columns[8];
            for (ptrdiff_t i = 0; i < width; i++) columns[i] = from[i];
            for (j = 0; j + width <= p.stride; j += width)
                for (ptrdiff_t i = 0; i < width; i++) to[j + i] = columns[i];
            for (ptrdiff_t i = 0; j + i < p.stride; i++) to[j + i] = columns[i];
            continue;
        }
        memmove(to, from, width * sizeof *to);
        for (ptrdiff_t n; j < p.stride; j += n) {
            n = j < p.stride - j ? j : p.stride - j; /* as many as there are */
            memcpy(to + j, to, n * sizeof *to);
        }
    }
}

/* From a coefficient for each column to one for each lane. */
NX_OUTLINE void to_lanes(C *c, nx_part p)
{
    const ptrdiff_t numbers = p.examples * p.width;
    if (p.stride == p.width) {
        for (ptrdiff_t j = 0; j < WIDEST; j++) c[numbers + j] = 0; /* as much as is looked at */
        return;
    }
#define REPEAT(width) repeat_columns(c, p, width)
    BY_WIDTH(p.width, REPEAT)
#undef REPEAT
}

/* Sums of a part's lanes, zeros to begin with, */
NX_INLINE void no_sums(C *s, nx_part p)
{
    const ptrdiff_t numbers = p.examples * p.stride + WIDEST;
    memset(s, 0, (numbers < PADDED ? numbers : PADDED) * sizeof *s);
}

NX_INLINE void sum_columns(const C *NX_RESTRICT s, nx_part p, ptrdiff_t width, int added,
                           double *NX_RESTRICT sum)
{
    for (ptrdiff_t e = 0; e < p.examples; e++, s += p.stride, sum += width)
        for (ptrdiff_t l = 0; l < p.folded.lanes; l += width) {
            if (l == 0 && !added)
                for (ptrdiff_t j = 0; j < width; j++) sum[j] = s[j];
            else
                for (ptrdiff_t j = 0; j < width; j++) sum[j] += s[l + j];
        }
}

/* and added up for each column, or `added` to its sum. */
NX_OUTLINE void column_sums(const C *s, nx_part p, int added, double *sum)
{
    if (p.folded.fold == 1) { /* no lanes between the examples' columns */
        p.folded.lanes = p.width *= p.examples;
        p.examples = 1;
    }
#define SUM(width) sum_columns(s, p, width, added, sum)
    BY_WIDTH(p.width, SUM)
#undef SUM
}

/* Adds a share of what the rows differ from the first. */
NX_INLINE void col_pivots_rows(nx_rows x, nx_block b, const C *first, C *s)
{
    const V share = splat((C)(1.0 / SAMPLE));
    for (ptrdiff_t j = 0; j < b.n; j += W) {
        V sum = load(s + j), p = load(first + j);
        for (ptrdiff_t r = 0; r < b.rows; r++) {
            const T *row = (const T *)x.data + r * x.stride + j;
            V v = b.n - j >= W ? load(row) : load_n(row, b.n - j, p);
            sum = mul_add(sub(v, p), share, sum);
        }
        store(s + j, sum);
    }
}

NX_INLINE void pivots_from(const C *NX_RESTRICT first, const double *NX_RESTRICT sum, nx_part p,
                           double share, double *NX_RESTRICT pivot)
{
    for (ptrdiff_t e = 0; e < p.examples; e++, first += p.stride)
        for (ptrdiff_t j = 0; j < p.width; j++, sum++, pivot++) {
            C near_mean = (C)(first[j] + *sum * share);
            *pivot = near_mean - near_mean == 0 ? near_mean : 0;
        }
}

/* The first row is taken off, so that a constant is found exactly. */
static void col_pivots(nx_groups x, nx_columns b, double *pivot)
{
    /* Few short rows are rather all folded. */
    const ptrdiff_t step =
        b.rows / SAMPLE > 1 && b.rows * b.n > SAMPLE * 2 * WIDEST ? b.rows / SAMPLE : 1;
    const nx_groups sampled = {x.data, x.group, step * x.row};
    const nx_columns sample = {b.examples, (b.rows + step - 1) / step, b.n};
    C first[PADDED], s[PADDED];
    double sum[PADDED];
    EACH_PART(p, sample, sampled.row == b.n, 0)
    {
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const T *row = part_rows(x, p, e).data;
            for (ptrdiff_t j = 0; j < p.width; j += W) {
                const ptrdiff_t left = p.width - j;
                const V v = some(row + j, left, left >= W, ZERO);
                if (left >= W) store(first + e * p.width + j, v);
                else store_n(first + e * p.width + j, left, v);
            }
        }
        to_lanes(first, p);
        no_sums(s, p);
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const nx_rows rows_ = part_rows(sampled, p, e);
#define PIVOTS_ROWS(i, rows, n)                                                      \
    col_pivots_rows(rows_at(rows_, i, 0), (nx_block){rows, n}, first + e * p.stride, \
                    s + e * p.stride)
            EACH_ROWS(p.folded, PIVOTS_ROWS);
#undef PIVOTS_ROWS
        }
        column_sums(s, p, 0, sum);
        pivots_from(first, sum, p, (double)SAMPLE / (double)sample.rows, pivot + p.at);
    }
}

/* factor may be NULL. */
/* Vectors of a row that are read one after the other: a row's lines are then done with before those
 * of the next are met, which in the first-level cache may lie in the same few places. */
enum { ALONG = 4 };

/* `vectors` of them from column j on, the last of `left` numbers. */
NX_INLINE void col_powers_vectors(nx_rows x, ptrdiff_t rows, ptrdiff_t left, int vectors,
                                  const C *pivot, const C *factor, C *s, C *q)
{
    V sum[ALONG], squares[ALONG], p[ALONG], f[ALONG], minus[ALONG];
    for (int k = 0; k < vectors; k++) {
        sum[k] = squares[k] = f[k] = minus[k] = ZERO;
        p[k] = load(pivot + k * W);
        if (factor) f[k] = load(factor + k * W), minus[k] = sub(ZERO, p[k]);
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int k = 0; k < vectors; k++) {
            const T *row = (const T *)x.data + r * x.stride + k * W;
            V v = left >= W ? load(row) : load_n(row, left, p[k]);
            V d = factor ? mul_add(v, f[k], minus[k]) : sub(v, p[k]);
            if (factor && left < W) d = first_lanes(d, left);
            sum[k] = add(sum[k], d);
            squares[k] = mul_add(d, d, squares[k]);
        }
    for (int k = 0; k < vectors; k++) {
        store(s + k * W, add(load(s + k * W), sum[k]));
        store(q + k * W, add(load(q + k * W), squares[k]));
    }
}

NX_INLINE void col_powers_rows(nx_rows x, nx_block b, const C *pivot, const C *factor, C *s, C *q)
{
    ptrdiff_t j = 0;
#define POWERS(left, vectors)                                              \
    col_powers_vectors(rows_at(x, 0, j), b.rows, left, vectors, pivot + j, \
                       factor ? factor + j : NULL, s + j, q + j)
    for (; j + ALONG * W <= b.n; j += ALONG * W) POWERS(W, ALONG);
    for (; j + W <= b.n; j += W) POWERS(W, 1);
    if (j < b.n) POWERS(b.n - j, 1);
#undef POWERS
}

static void col_powers(nx_groups x, nx_columns b, const double *scale, const double *pivot,
                       double *sum, double *squares)
{
    C factor[PADDED], centre[PADDED], s[PADDED], q[PADDED];
    EACH_PART(p, b, x.row == b.n, 0)
    {
        const ptrdiff_t numbers = p.examples * p.width;
        for (ptrdiff_t j = 0; j < numbers; j++) centre[j] = (C)pivot[p.at + j];
        to_lanes(centre, p);
        if (scale) {
            for (ptrdiff_t j = 0; j < numbers; j++) factor[j] = (C)scale[p.at + j];
            to_lanes(factor, p);
        }
        no_sums(s, p);
        no_sums(q, p);
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const nx_rows rows_ = part_rows(x, p, e);
            const ptrdiff_t at = e * p.stride;
#define POWERS(i, rows, n, factor) \
    col_powers_rows(rows_at(rows_, i, 0), (nx_block){rows, n}, centre + at, factor, s + at, q + at)
#define POWERS_ROWS(i, rows, n) POWERS(i, rows, n, NULL)
#define SCALED_ROWS(i, rows, n) POWERS(i, rows, n, factor + at)
            if (scale) EACH_ROWS(p.folded, SCALED_ROWS);
            else EACH_ROWS(p.folded, POWERS_ROWS);
#undef POWERS
#undef POWERS_ROWS
#undef SCALED_ROWS
        }
        column_sums(s, p, 1, sum + p.at);
        column_sums(q, p, 1, squares + p.at);
    }
}

/* Where the sums of a column say that they should be taken again: the squares are out of range, or
 * its mean is farther from the pivot than numbers are from the mean, which costs more than a bit.
 * A sum of ones, as wide as the numbers, becomes vectors. */
NX_INLINE int64_t ask_again(double count, double each, double pivot, double sum, double squares)
{
    const double offset = sum * each, m2 = squares - sum * offset, far = offset * offset * count;
    return (m2 <= DBL_MAX ? 0 : 1) + (far > m2 ? 1 : 0) +
           (m2 < range.tiny * count ? 1 : 0) * (fabs(pivot + offset) < range.near_zero ? 1 : 0);
}

NX_INLINE int any_again(ptrdiff_t n, double count, const double *NX_RESTRICT sum,
                        const double *NX_RESTRICT squares, const double *NX_RESTRICT pivot)
{
    const double each = 1 / count;
    int64_t any = 0;
    for (ptrdiff_t j = 0; j < n; j++)
        any += ask_again(count, each, (C)pivot[j], sum[j], squares[j]);
    return any != 0;
}

static int col_rescale(ptrdiff_t n, double count, const double *sum, const double *squares,
                       double *pivot, double *scale)
{
    const double each = 1 / count;
    if (!any_again(n, count, sum, squares, pivot)) return 0;
    for (ptrdiff_t j = 0; j < n; j++) {
        const double offset = sum[j] * each, mean = (C)pivot[j] + offset;
        const int again = ask_again(count, each, (C)pivot[j], sum[j], squares[j]) != 0;
        scale[j] = nx_rescale(&range, (nx_moments){count, mean, squares[j] - sum[j] * offset});
        if (again) pivot[j] = (fabs(mean) <= DBL_MAX ? mean : pivot[j]) * scale[j];
    }
    return 1;
}

/* Without a branch in the loop it becomes vectors. */
NX_INLINE void means_and_variances(ptrdiff_t n, double count, const double *NX_RESTRICT pivot,
                                   const double *NX_RESTRICT sum, const double *NX_RESTRICT squares,
                                   double *NX_RESTRICT mean, double *NX_RESTRICT var)
{
    const double each = 1 / count;
    for (ptrdiff_t j = 0; j < n; j++) {
        const double offset = sum[j] * each, m2 = squares[j] - sum[j] * offset;
        mean[j] = (C)pivot[j] + offset;
        var[j] = m2 < 0 ? 0 : m2 * each;
    }
}

static void col_statistics(ptrdiff_t n, double count, double eps, const double *scale,
                           const double *pivot, const double *sum, const double *squares,
                           double *mean, double *rstd, double *var)
{
    means_and_variances(n, count, pivot, sum, squares, mean, rstd);
    if (!scale) {
        if (var) memcpy(var, rstd, n * sizeof *var);
        nx_inverse_stds(rstd, n, eps);
        return;
    }
    for (ptrdiff_t j = 0; j < n; j++)
        nx_finish_moments((nx_moments){1, mean[j], rstd[j]}, scale[j], eps, mean + j, rstd + j,
                          var ? var + j : NULL);
}

static void affines(const void *gamma_, const void *beta_, ptrdiff_t examples, ptrdiff_t n,
                    const double *NX_RESTRICT rstd, double *NX_RESTRICT scale,
                    double *NX_RESTRICT shift)
{
    const C *gamma = gamma_, *beta = beta_;
    for (ptrdiff_t at = 0; at < examples * n; at += n) {
        if (gamma)
            for (ptrdiff_t j = 0; j < n; j++) scale[at + j] = rstd[at + j] * gamma[j];
        else
            for (ptrdiff_t j = 0; j < n; j++) scale[at + j] = rstd[at + j];
        if (beta)
            for (ptrdiff_t j = 0; j < n; j++) shift[at + j] = beta[j];
        else if (shift)
            for (ptrdiff_t j = 0; j < n; j++) shift[at + j] = 0;
    }
}

static void col_lines(ptrdiff_t n, double each, const double *NX_RESTRICT rstd,
                      const double *NX_RESTRICT factor, const double *NX_RESTRICT sum,
                      const double *NX_RESTRICT dot, double *NX_RESTRICT mean,
                      double *NX_RESTRICT slope, double *NX_RESTRICT constant)
{
    for (ptrdiff_t j = 0; j < n; j++) {
        mean[j] = sum[j] * each;
        slope[j] = nx_slope(factor[j], rstd[j], dot[j] * each);
        constant[j] = nx_constant(factor[j], mean[j]);
    }
}

/* The relu masks of columns, about their pivots. */
NX_INLINE void masks(const nx_relu_mask *relu, const double *mean, nx_part p, C *scale, C *shift)
{
    for (ptrdiff_t j = 0; j < p.examples * p.width; j++) {
        const double a = relu->scale[p.at + j];
        scale[j] = (C)a;
        shift[j] = pivot_shift(mean[p.at + j], a, relu->shift[p.at + j]);
    }
    to_lanes(scale, p);
    to_lanes(shift, p);
}

NX_INLINE void col_dots_vectors(nx_rows x, nx_rows dy, ptrdiff_t rows, ptrdiff_t left, int vectors,
                                line_columns l, int ahead, C *s, C *q)
{
    V sum[ALONG], dot[ALONG], p[ALONG], minus[ALONG];
    relu_mask mask[ALONG];
    for (int k = 0; k < vectors; k++) {
        sum[k] = dot[k] = minus[k] = ZERO;
        p[k] = load(l.x_pivot + k * W);
        if (l.minus_pivot) minus[k] = load(l.minus_pivot + k * W);
        if (l.mask_scale)
            mask[k] = (relu_mask){load(l.mask_scale + k * W), load(l.mask_shift + k * W)};
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (int k = 0; k < vectors; k++) {
            const T *xr = (const T *)x.data + r * x.stride + k * W;
            const T *gr = (const T *)dy.data + r * dy.stride + k * W;
            if (ahead) {
                NX_PREFETCH(xr + ROWS_AT_ONCE * x.stride);
                NX_PREFETCH(gr + ROWS_AT_ONCE * dy.stride);
            }
            V d = sub(left >= W ? load(xr) : load_n(xr, left, p[k]), p[k]);
            V g = left >= W ? load(gr) : load_n(gr, left, ZERO);
            g = gradient(g, d, NULL, l.mask_scale ? mask + k : NULL,
                         l.minus_pivot ? minus + k : NULL);
            if (l.minus_pivot && left < W) g = first_lanes(g, left);
            sum[k] = add(sum[k], g);
            dot[k] = mul_add(g, d, dot[k]);
        }
    for (int k = 0; k < vectors; k++) {
        store(s + k * W, add(load(s + k * W), sum[k]));
        store(q + k * W, add(load(q + k * W), dot[k]));
    }
}

/* minus_pivot may be NULL, and the mask's scale. Whether the rows after these are asked for `ahead`:
 * see nx_backward. */
NX_INLINE void col_dots_rows(nx_rows x, nx_rows dy, nx_block b, line_columns l, int ahead, C *s,
                             C *q)
{
    ptrdiff_t j = 0;
#define LINES                                                               \
    (line_columns){.x_pivot = l.x_pivot + j,                                \
                   .minus_pivot = l.minus_pivot ? l.minus_pivot + j : NULL, \
                   .mask_scale = l.mask_scale ? l.mask_scale + j : NULL,    \
                   .mask_shift = l.mask_scale ? l.mask_shift + j : NULL}
#define DOTS(left, vectors)                                                                    \
    col_dots_vectors(rows_at(x, 0, j), rows_at(dy, 0, j), b.rows, left, vectors, LINES, ahead, \
                     s + j, q + j)
    for (; j + ALONG * W <= b.n; j += ALONG * W) DOTS(W, ALONG);
    for (; j + W <= b.n; j += W) DOTS(W, 1);
    if (j < b.n) DOTS(b.n - j, 1);
#undef DOTS
#undef LINES
}

static void col_dots(const nx_col_backward *of, const double *mean, const double *pivot,
                     nx_sums sums)
{
    const nx_columns b = of->block;
    C x_pivot[PADDED], minus[PADDED], scale[PADDED], shift[PADDED], s[PADDED], q[PADDED];
    double part_sum[PADDED], part_dot[PADDED];
    EACH_PART(p, b, of->x.row == b.n && of->dy.row == b.n, 0)
    {
        const ptrdiff_t numbers = p.examples * p.width;
        for (ptrdiff_t j = 0; j < numbers; j++) x_pivot[j] = (C)mean[p.at + j];
        to_lanes(x_pivot, p);
        if (pivot) {
            for (ptrdiff_t j = 0; j < numbers; j++) minus[j] = -(C)pivot[p.at + j];
            to_lanes(minus, p);
        }
        if (of->relu) masks(of->relu, mean, p, scale, shift);
        no_sums(s, p);
        no_sums(q, p);
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const nx_rows x = part_rows(of->x, p, e), dy = part_rows(of->dy, p, e);
            const ptrdiff_t at = e * p.stride;
#define DOTS(i, rows, n, minus, scale)                                      \
    col_dots_rows(rows_at(x, i, 0), rows_at(dy, i, 0), (nx_block){rows, n}, \
                  (line_columns){.x_pivot = x_pivot + at,                   \
                                 .minus_pivot = minus,                      \
                                 .mask_scale = scale,                       \
                                 .mask_shift = shift + at},                 \
                  of->ahead, s + at, q + at)
#define DOTS_ROWS(i, rows, n) DOTS(i, rows, n, NULL, NULL)
#define MASKED_ROWS(i, rows, n) DOTS(i, rows, n, NULL, scale + at)
#define PIVOTED_ROWS(i, rows, n) DOTS(i, rows, n, minus + at, NULL)
#define PIVOTED_MASKED_ROWS(i, rows, n) DOTS(i, rows, n, minus + at, scale + at)
            if (pivot && of->relu) EACH_ROWS(p.folded, PIVOTED_MASKED_ROWS);
            else if (pivot) EACH_ROWS(p.folded, PIVOTED_ROWS);
            else if (of->relu) EACH_ROWS(p.folded, MASKED_ROWS);
            else EACH_ROWS(p.folded, DOTS_ROWS);
#undef DOTS
#undef DOTS_ROWS
#undef MASKED_ROWS
#undef PIVOTED_ROWS
#undef PIVOTED_MASKED_ROWS
        }
        column_sums(s, p, 0, part_sum);
        column_sums(q, p, 0, part_dot);
        for (ptrdiff_t j = 0; j < numbers; j++) {
            const double about = pivot ? (double)(C)pivot[p.at + j] : 0, m = mean[p.at + j];
            sums.sum[p.at + j] += part_sum[j] + (double)b.rows * about;
            sums.dot[p.at + j] += part_dot[j] - (m - (C)m) * part_sum[j];
        }
    }
}

/* Keeps the pivots of columns that a row's numbers are near; whether there are any. */
NX_INLINE int keep_near(const C *NX_RESTRICT sample, ptrdiff_t n, double *NX_RESTRICT pivot)
{
    int64_t any = 0; /* as wide as the numbers, to become vectors */
    for (ptrdiff_t j = 0; j < n; j++) {
        double kept = nx_near(sample[j], pivot[j]) ? pivot[j] : 0;
        pivot[j] = kept;
        any |= kept != 0 ? 1 : 0;
    }
    return any != 0;
}

static int cols_are_far(nx_groups dy, nx_columns b, const double *sum, double count, double *pivot)
{
    static const int eighths[] = {4, 1, 3, 5, 7};
    const double each = b.rows > 1 ? 1 / count : 0;
    C sample[PADDED];
    int any = 0;
    for (ptrdiff_t j = 0; j < b.examples * b.n; j++) pivot[j] = sum[j] * each;
    for (ptrdiff_t e = 0; e < b.examples; e++, pivot += b.n) EACH_COLUMNS(j0, width)
        {
            int some_near = 1;
            for (int i = 0; i < 5 && some_near; i++) {
                const T *row = (const T *)dy.data + e * dy.group + eighths[i] * b.rows / 8 * dy.row;
                for (ptrdiff_t j = 0; j < width; j += W)
                    store(sample + j, some(row + j0 + j, width - j, width - j >= W, ZERO));
                some_near = keep_near(sample, width, pivot + j0);
            }
            any |= some_near;
        }
    return any;
}

#ifdef T_INT
/* Windows over images ---------------------------------------------------------------------- */

static void transpose(nx_rows x, nx_block b, nx_rows y)
{ turn_in(x.data, x.stride, y.data, y.stride, b, 0); }

/* Windows whose largest numbers so far are on the stack; long enough to be many vectors. */
#define POOL_BLOCK 128

NX_INLINE void pool_position(const T *x, ptrdiff_t step, ptrdiff_t n, T_INT position,
                             T *NX_RESTRICT best, T_INT *NX_RESTRICT winner)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        T v = x[i * step];
        int better = !(v <= best[i]) & (best[i] == best[i]);
        best[i] = better ? v : best[i];
        winner[i] = better ? position : winner[i];
    }
}

static void pool_row(nx_rows x_, const nx_window *window, ptrdiff_t n, void *y, void *winner,
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
            if (step == 1) pool_position(from, 1, count, (T_INT)k, best, position);
            else if (step == 2) pool_position(from, 2, count, (T_INT)k, best, position);
            else pool_position(from, step, count, (T_INT)k, best, position);
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
NX_INLINE void adam_loop(const nx_adam *step_, ptrdiff_t n, const T *NX_RESTRICT dw,
                         T *NX_RESTRICT next_w, T *NX_RESTRICT next_m, T *NX_RESTRICT next_v)
{
    const T *w = step_->w, *m = step_->m, *v = step_->v;
    const T keep_m = (T)step_->beta1, add_m = (T)(1 - step_->beta1), keep_v = (T)step_->beta2,
            add_v = (T)(1 - step_->beta2), step = (T)step_->rate, small = (T)step_->epsilon;
    for (ptrdiff_t i = 0; i < n; i++) {
        next_m[i] = m[i] * keep_m + dw[i] * add_m;
        next_v[i] = v[i] * keep_v + dw[i] * dw[i] * add_v;
        next_w[i] = w[i] - next_m[i] / (root(next_v[i]) + small) * step;
    }
}

static void adam(const nx_adam *step, ptrdiff_t n)
{ adam_loop(step, n, step->dw, step->next_w, step->next_m, step->next_v); }
#endif

#define STREAM 0
#include "kernels_write.h"
#undef STREAM

#define STREAM 1
#include "kernels_write.h"
