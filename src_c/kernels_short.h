/* Short rows with statistics of their own; included from kernels_template.h.
 *
 * What a row's sums across a vector cost, a root and a division, it costs however short it is. So
 * many rows at a time are turned into the columns of a tile on the stack: number j of row r is at
 * tile[j * lanes + r], what happens along the rows happens to whole vectors, one lane for each row,
 * and roots and divisions are shared out likewise. Then the tile is turned back.
 *
 *     rows of x, n = 3      tile: n x lanes
 *     a0 a1 a2              a0 b0 c0 ...
 *     b0 b1 b2              a1 b1 c1 ...
 *     c0 c1 c2              a2 b2 c2 ...
 *
 * A lane's numbers are added up in one order on every instruction set, whatever rows are beside it:
 * a row's bits do not depend on them, nor on their number, nor on where it lies.
 *
 * A tile is read as a whole before any of it is written, so that y may be x, and dx dy or x. */

enum {
    /* The most numbers in a row for which a tile is faster than rows by themselves: on a Zen 4 those
     * of 36 floats take 12 ns and 21; back, those of 32 take 16 ns and 13 with AVX-512, 17 and 19
     * with AVX2. Few rows, which do not fill a tile, speak for less. */
    SHORT = 40,
    SHORT_BACKWARD = 32,
    /* Groups have more to do for each: those of 7 x 7 take 22 ns in tiles, and 30 on their way
     * back. */
    SHORT_GROUP = 64,
    /* 8 KiB: two of them and what they are made of stay in an L1 cache of 32 KiB. */
    TILE = SHORT_GROUP * LANES,
    /* Of few numbers so many rows, whose steps wait for each other seldom enough. */
    TILE_ROWS = 4 * LANES,
    SIDE = BY_TYPE(f32_SIDE, f64_SIDE),
    TALL = BY_TYPE(f32_TALL, f64_TALL),
};

/* So many rows of n numbers, in lanes that are whole vectors; those beyond the rows are 0. */
typedef struct {
    ptrdiff_t rows, n, lanes;
} tile_shape;

/* From memory tiles come in small helpings: while one is computed, the next is on its way. */
NX_INLINE tile_shape tile_of(ptrdiff_t rows, ptrdiff_t n, int streaming)
{
    ptrdiff_t most = (streaming ? TILE / 8 : TILE) / n / LANES * LANES;
    most = most > TILE_ROWS ? TILE_ROWS : most < LANES ? LANES : most;
    if (rows > most) rows = most;
    return (tile_shape){rows, n, (rows + WIDEST - 1) / WIDEST * WIDEST};
}

/* q[j][i] = p[i][j] */
NX_INLINE void turn_by_number(const C *NX_RESTRICT p, ptrdiff_t p_stride, C *NX_RESTRICT q,
                              ptrdiff_t q_stride, nx_block b)
{
    for (ptrdiff_t i = 0; i < b.rows; i++)
        for (ptrdiff_t j = 0; j < b.n; j++) q[j * q_stride + i] = p[i * p_stride + j];
}

/* The same by f(p, p_stride, q, q_stride) for `height` rows of `width` numbers, of which the last
 * may overlap. */
#define TURN_BY(f, height, width)                                                      \
    for (ptrdiff_t i = 0; i < b.rows; i += height)                                     \
        for (ptrdiff_t j = 0; j < b.n; j += width) {                                   \
            const ptrdiff_t row = i + height <= b.rows ? i : b.rows - height;          \
            const ptrdiff_t col = j + width <= b.n ? j : b.n - width;                  \
            f(p + row * p_stride + col, p_stride, q + col * q_stride + row, q_stride); \
        }

/* Of 1 to 3 numbers side by side the compiler makes vectors, if it knows how many they are. What
 * lies `ahead`, where that is not 0, is asked for. */
NX_OUTLINE void turn_in(const C *p, ptrdiff_t p_stride, C *q, ptrdiff_t q_stride, nx_block b,
                        ptrdiff_t ahead)
{
    /* As many lines as the numbers that are turned; of rows side by side in the end all. */
#define TURN_TALL(from, from_stride, to, to_stride)               \
    do {                                                          \
        for (int k = 0; ahead && k < TALL * SIDE; k += WIDEST)    \
            NX_PREFETCH(p + i * p_stride + j * TALL + k + ahead); \
        transpose_tall(from, from_stride, to, to_stride);         \
    } while (0)
    if (b.rows >= TALL && b.n >= SIDE) TURN_BY(TURN_TALL, TALL, SIDE)
    else if (b.rows >= SIDE && b.n >= SIDE) TURN_BY(transpose_square, SIDE, SIDE)
    else if (b.n == 1 && p_stride == 1) turn_by_number(p, 1, q, q_stride, (nx_block){b.rows, 1});
    else if (b.n == 2 && p_stride == 2) turn_by_number(p, 2, q, q_stride, (nx_block){b.rows, 2});
    else if (b.n == 3 && p_stride == 3) turn_by_number(p, 3, q, q_stride, (nx_block){b.rows, 3});
    else turn_by_number(p, p_stride, q, q_stride, b);
#undef TURN_TALL
}

NX_OUTLINE void turn_out(const C *p, ptrdiff_t p_stride, C *q, ptrdiff_t q_stride, nx_block b)
{
    if (b.n >= TALL && b.rows >= SIDE) TURN_BY(transpose_wide, SIDE, TALL)
    else if (b.n >= SIDE && b.rows >= SIDE) TURN_BY(transpose_square, SIDE, SIDE)
    else if (b.rows == 1 && q_stride == 1) turn_by_number(p, p_stride, q, 1, (nx_block){1, b.n});
    else if (b.rows == 2 && q_stride == 2) turn_by_number(p, p_stride, q, 2, (nx_block){2, b.n});
    else if (b.rows == 3 && q_stride == 3) turn_by_number(p, p_stride, q, 3, (nx_block){3, b.n});
    else turn_by_number(p, p_stride, q, q_stride, b);
}
#undef TURN_BY

/* Rows that lie one after the other, as one long one. */
NX_INLINE nx_block joined(nx_rows x, nx_block b)
{ return x.stride == b.n ? (nx_block){1, b.rows * b.n} : b; }

static void tile_in(nx_rows x, tile_shape t, C *tile, int streaming)
{
    const nx_block b = {t.rows, t.n};
    const ptrdiff_t ahead = streaming && x.stride == t.n ? t.rows * t.n : 0; /* the next tile */
    if (t.rows < t.lanes) memset(tile, 0, (size_t)(t.n * t.lanes) * sizeof(C));
#ifdef T_INT
    turn_in(x.data, x.stride, tile, t.lanes, b, ahead);
#else
    C stretch[TILE];
    const nx_block rows = joined(x, b);
    for (ptrdiff_t r = 0; r < rows.rows; r++) {
        const T *from = (const T *)x.data + r * x.stride;
        C *to = stretch + r * t.n;
        ptrdiff_t i = 0;
        for (; i + W <= rows.n; i += W) {
            if (ahead) NX_PREFETCH(from + i + ahead);
            store(to + i, load(from + i));
        }
        if (i < rows.n) store_n(to + i, rows.n - i, load_n(from + i, rows.n - i, ZERO));
    }
    turn_in(stretch, t.n, tile, t.lanes, b, 0);
#endif
}

/* Rows of a tile, from row `first` on. */
static void tile_out(const C *tile, tile_shape t, ptrdiff_t first, nx_rows y, ptrdiff_t count,
                     int streaming)
{
    const nx_block turned = {t.n, count};
#ifdef T_INT
    if (!streaming) {
        turn_out(tile + first, t.lanes, y.data, y.stride, turned);
        return;
    }
#endif
    C stretch[TILE];
    turn_out(tile + first, t.lanes, stretch, t.n, turned);
    const nx_block rows = joined(y, (nx_block){count, t.n});
    for (ptrdiff_t r = 0; r < rows.rows; r++) {
        const C *from = stretch + r * t.n;
        T *to = (T *)y.data + r * y.stride;
        ptrdiff_t i = streaming ? unaligned(to, rows.n) : 0;
        if (i) store_n(to, i, load_n(from, i, ZERO));
        if (streaming)
            for (; i + W <= rows.n; i += W) stream(to + i, load(from + i));
        else
            for (; i + W <= rows.n; i += W) store(to + i, load(from + i));
        if (i < rows.n) store_n(to + i, rows.n - i, load_n(from + i, rows.n - i, ZERO));
    }
}

/* f(first lane, vectors) for LANES at a time, and for half as many that may be left. The number of
 * vectors is a constant: loops over them are unrolled, and they stay in registers. */
#define EACH_LANES(f)                                         \
    do {                                                      \
        ptrdiff_t l_ = 0;                                     \
        for (; l_ + LANES <= t.lanes; l_ += LANES) f(l_, NV); \
        if (l_ < t.lanes) f(l_, NV / 2);                      \
    } while (0)
#define EACH_REGISTER(k) for (int k = 0; k < vectors; k++)

/* For positions from j on, as many as the first level of sums adds up. */
#define EACH_FIRST(j, end)     \
    for (ptrdiff_t j = 0, end; \
         j < t.n && (end = t.n - j < ROWS_AT_ONCE ? t.n : j + ROWS_AT_ONCE, 1); j = end)

NX_INLINE void clear(V *v, int vectors)
{
    EACH_REGISTER (k) v[k] = ZERO;
}
NX_INLINE void load_lanes(const C *p, V *v, int vectors)
{
    EACH_REGISTER (k) v[k] = load(p + k * W);
}
NX_INLINE void store_lanes(C *p, const V *v, int vectors)
{
    EACH_REGISTER (k) store(p + k * W, v[k]);
}
NX_INLINE void add_vectors(V *sum, const V *v, int vectors)
{
    EACH_REGISTER (k) sum[k] = add(sum[k], v[k]);
}

/* The mean of each lane, roughly, and the sums about it of numbers and of their squares; or 0, 0
 * and the sum of squares. */
NX_INLINE void lane_powers(const C *tile, tile_shape t, int centred, C *pivot, C *sum, C *squares,
                           int vectors)
{
    V p[NV], s[NV], q[NV];
    clear(p, vectors);
    if (centred) {
        EACH_FIRST (j, end) {
            load_lanes(tile + j * t.lanes, s, vectors);
            for (ptrdiff_t i = j + 1; i < end; i++)
                EACH_REGISTER (k) s[k] = add(s[k], load(tile + i * t.lanes + k * W));
            add_vectors(p, s, vectors);
        }
        const V share = splat((C)(1 / (double)t.n));
        EACH_REGISTER (k) p[k] = mul(p[k], share);
    }
    clear(s, vectors);
    clear(q, vectors);
    EACH_FIRST (j, end) {
        V first_s[NV], first_q[NV];
        clear(first_s, vectors);
        clear(first_q, vectors);
        for (ptrdiff_t i = j; i < end; i++)
            EACH_REGISTER (k) {
                V d = sub(load(tile + i * t.lanes + k * W), p[k]);
                first_s[k] = add(first_s[k], d);
                first_q[k] = mul_add(d, d, first_q[k]);
            }
        add_vectors(s, first_s, vectors);
        add_vectors(q, first_q, vectors);
    }
    if (!centred) clear(s, vectors);
    store_lanes(pivot, p, vectors);
    store_lanes(sum, s, vectors);
    store_lanes(squares, q, vectors);
}

/* Each row's mean and sum of squares about it. Of numbers that are all the same, the pivot is a few
 * of their last bits away; the sums about it are exact then, and what m2 is not 0 by is the
 * rounding of the formula. Any other row's m2 is 1e-5 of its squares and more. */
NX_OUTLINE void tile_moments(const C *tile, tile_shape t, int centred, double *NX_RESTRICT mean,
                             double *NX_RESTRICT m2)
{
    const double each = 1 / (double)t.n;
    C pivot[TILE_ROWS], sum[TILE_ROWS], squares[TILE_ROWS];
#define POWERS(l, vectors) \
    lane_powers(tile + l, t, centred, pivot + l, sum + l, squares + l, vectors)
    EACH_LANES(POWERS);
#undef POWERS
    for (ptrdiff_t r = 0; r < t.rows; r++) {
        double rest = sum[r] * each, about_mean = squares[r] - sum[r] * rest;
        mean[r] = pivot[r] + rest;
        m2[r] = about_mean < squares[r] * 0x1p-40 ? 0 : about_mean;
    }
}

/* nx_finish_moments of rows whose squares were out of range, or lost digits: a tile that is the
 * same times a scale for each row has others. */
NX_OUTLINE void tile_rescaled(const C *tile, tile_shape t, int centred, double eps,
                              const double *scale, double *mean, double *rstd)
{
    C scaled[TILE];
    double scaled_mean[TILE_ROWS], m2[TILE_ROWS];
    for (ptrdiff_t i = 0; i < t.n * t.lanes; i++) {
        const ptrdiff_t r = i % t.lanes;
        scaled[i] = r < t.rows ? tile[i] * (C)scale[r] : 0;
    }
    tile_moments(scaled, t, centred, scaled_mean, m2);
    for (ptrdiff_t r = 0; r < t.rows; r++)
        if (scale[r] != 1)
            nx_finish_moments((nx_moments){(double)t.n, scaled_mean[r], m2[r]}, scale[r], eps,
                              mean + r, rstd + r, NULL);
}

static void tile_statistics(const C *tile, tile_shape t, int centred, double eps,
                            double *NX_RESTRICT mean, double *NX_RESTRICT rstd)
{
    const double numbers = (double)t.n, each = 1 / numbers;
    double m2[TILE_ROWS], scale[TILE_ROWS];
    tile_moments(tile, t, centred, mean, m2);
    for (ptrdiff_t r = 0; r < t.rows; r++) rstd[r] = m2[r] * each;
    nx_inverse_stds(rstd, t.rows, eps);
    if (nx_rescale_columns(&range, t.rows, numbers, mean, m2, scale))
        tile_rescaled(tile, t, centred, eps, scale, mean, rstd);
}

/* Coefficients of each row in C: xhat = (x - pivot) * scale + shift. Those of lanes without a row
 * are 0. */
typedef struct {
    C pivot[TILE_ROWS], scale[TILE_ROWS], shift[TILE_ROWS];
} tile_line;

NX_INLINE void tile_map(tile_line *line, tile_shape t, const double *NX_RESTRICT mean,
                        const double *NX_RESTRICT scales, const C *NX_RESTRICT shifts)
{
    C *NX_RESTRICT pivot = line->pivot, *NX_RESTRICT scale = line->scale,
                   *NX_RESTRICT shift = line->shift;
    for (ptrdiff_t r = 0; r < t.rows; r++) {
        pivot[r] = (C)mean[r];
        scale[r] = (C)scales[r];
        shift[r] = pivot_shift(mean[r], scales[r], shifts ? (double)shifts[r] : 0);
    }
    for (ptrdiff_t r = t.rows; r < t.lanes; r++) pivot[r] = scale[r] = shift[r] = 0;
}

NX_INLINE void tile_standardize(tile_line *line, tile_shape t, const double *mean,
                                const double *rstd)
{ tile_map(line, t, mean, rstd, NULL); }

/* gamma * xhat + beta, with relu 0 where that is less */
NX_INLINE void lane_affine(C *tile, tile_shape t, const tile_line *line, ptrdiff_t l,
                           const C *gamma, const C *beta, int relu, int vectors)
{
    V p[NV], a[NV], b[NV], g = ZERO, h = ZERO;
    load_lanes(line->pivot + l, p, vectors);
    load_lanes(line->scale + l, a, vectors);
    load_lanes(line->shift + l, b, vectors);
    for (ptrdiff_t j = 0; j < t.n; j++) {
        C *numbers = tile + j * t.lanes + l;
        if (gamma) g = splat(gamma[j]);
        if (beta) h = splat(beta[j]);
        EACH_REGISTER (k) {
            V v = mul_add(sub(load(numbers + k * W), p[k]), a[k], b[k]);
            if (gamma && beta) v = mul_add(v, g, h);
            else if (gamma) v = mul(v, g);
            else if (beta) v = add(v, h);
            store(numbers + k * W, relu ? greater(ZERO, v) : v);
        }
    }
}

NX_INLINE void tile_affine(C *tile, tile_shape t, const tile_line *line, const C *gamma,
                           const C *beta, int relu)
{
#define AFFINE(l, vectors) lane_affine(tile, t, line, l, gamma, beta, relu, vectors)
    EACH_LANES(AFFINE);
#undef AFFINE
}

/* The layer_... of kernels_list.h for rows of SHORT numbers at most. */
NX_OUTLINE void short_forward(nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean,
                              double *rstd, int streaming)
{
    static const double zero = 0;
    const C *gamma = norm->gamma, *beta = norm->beta;
    C tile[TILE];
    tile_line line;
    tile_shape t;
    for (ptrdiff_t first = 0; first < b.rows; first += t.rows) {
        t = tile_of(b.rows - first, b.n, streaming);
        tile_in(rows_at(x, first, 0), t, tile, streaming);
        tile_statistics(tile, t, norm->centred, norm->eps, mean + first, rstd + first);
        tile_standardize(&line, t, mean + first, rstd + first);
        if (gamma && beta) tile_affine(tile, t, &line, gamma, beta, 0);
        else if (gamma) tile_affine(tile, t, &line, gamma, NULL, 0);
        else if (beta) tile_affine(tile, t, &line, NULL, beta, 0);
        else tile_affine(tile, t, &line, NULL, NULL, 0);
        for (ptrdiff_t r = 0, fit; r < t.rows; r += fit + 1) {
            ptrdiff_t far = first + r;
            fit = ordinary(mean + far, rstd + far, t.rows - r);
            if (fit) tile_out(tile, t, r, rows_at(y, far, 0), fit, streaming);
            if (r + fit == t.rows) break;
            far += fit;
            affine_far_out(rows_at(x, far, 0).data, rows_at(y, far, 0).data, b.n,
                           &(nx_affine){mean + far, rstd + far, &zero, 0, 0}, gamma, beta, 0);
        }
    }
}

/* The gradients of a position's beta and gamma, in WIDEST lanes on every instruction set: those of
 * the other half of LANES are added to them first. After FOLDED rows they go to the doubles. */
typedef struct {
    C dbeta[WIDEST], dgamma[WIDEST];
} position_sums;

NX_INLINE void add_halves(C *sum, const V *v, int vectors)
{
    for (int k = 0; k < NV / 2; k++)
        store(sum + k * W, add(load(sum + k * W), vectors == NV ? add(v[k], v[k + NV / 2]) : v[k]));
}

NX_INLINE double fold(C *sums)
{
    V lanes[NV];
    clear(lanes, NV);
    for (int k = 0; k < NV / 2; k++) {
        lanes[k] = load(sums + k * W);
        store(sums + k * W, ZERO);
    }
    return (double)sum_lanes(lanes, NV);
}

/* The first half of a backward pass: x becomes xhat. The pivot is the mean of gamma * dy, roughly
 * (nx_near says what it is for), or 0 about zero, where it does not matter. */
NX_INLINE void lane_xhat(C *x, const C *dy, tile_shape t, int centred, const tile_line *line,
                         ptrdiff_t l, const C *gamma, position_sums *sums, V *minus_pivot,
                         int vectors)
{
    const V share = splat((C)(-1 / (double)t.n));
    V p[NV], a[NV], b[NV], s[NV];
    load_lanes(line->pivot + l, p, vectors);
    load_lanes(line->scale + l, a, vectors);
    load_lanes(line->shift + l, b, vectors);
    clear(s, vectors);
    EACH_FIRST (j, end) {
        V first_s[NV], g[NV], products[NV], c = ZERO;
        clear(first_s, vectors);
        for (ptrdiff_t i = j; i < end; i++) {
            if (gamma) c = splat(gamma[i]);
            EACH_REGISTER (k) {
                V h = mul_add(sub(load(x + i * t.lanes + k * W), p[k]), a[k], b[k]);
                g[k] = load(dy + i * t.lanes + k * W);
                products[k] = mul(g[k], h);
                store(x + i * t.lanes + k * W, h);
                first_s[k] = add(first_s[k], gamma ? mul(g[k], c) : g[k]);
            }
            if (centred) add_halves(sums[i].dbeta, g, vectors);
            add_halves(sums[i].dgamma, products, vectors);
        }
        add_vectors(s, first_s, vectors);
    }
    EACH_REGISTER (k) minus_pivot[k] = centred ? mul(s[k], share) : ZERO;
}

/* The second: dy becomes gamma * dy - pivot, and added up. The product is rounded with the pivot
 * taken off, but in a row of one number, whose gradient is to be 0 exactly. */
NX_INLINE void lane_dots(const C *xhat, C *dy, tile_shape t, const V *minus_pivot, const C *gamma,
                         C *sum, C *dot, int vectors)
{
    V s[NV], q[NV];
    clear(s, vectors);
    clear(q, vectors);
    EACH_FIRST (j, end) {
        V first_s[NV], first_q[NV], c = ZERO;
        clear(first_s, vectors);
        clear(first_q, vectors);
        for (ptrdiff_t i = j; i < end; i++) {
            if (gamma) c = splat(gamma[i]);
            EACH_REGISTER (k) {
                /* Both are loaded first: whole tiles apart, they would wait for what is stored. */
                V g = load(dy + i * t.lanes + k * W), h = load(xhat + i * t.lanes + k * W);
                if (gamma && t.n == 1) g = add(mul(g, c), minus_pivot[k]);
                else g = gradient(g, g, gamma ? &c : NULL, NULL, minus_pivot + k);
                store(dy + i * t.lanes + k * W, g);
                first_s[k] = add(first_s[k], g);
                first_q[k] = mul_add(g, h, first_q[k]);
            }
        }
        add_vectors(s, first_s, vectors);
        add_vectors(q, first_q, vectors);
    }
    store_lanes(sum, s, vectors);
    store_lanes(dot, q, vectors);
}

/* xhat becomes dx = scale * dy + pivot * xhat + shift. */
NX_INLINE void lane_dx(C *xhat, const C *dy, tile_shape t, const tile_line *line, ptrdiff_t l,
                       int vectors)
{
    V slope[NV], factor[NV], constant[NV];
    load_lanes(line->pivot + l, slope, vectors);
    load_lanes(line->scale + l, factor, vectors);
    load_lanes(line->shift + l, constant, vectors);
    for (ptrdiff_t i = l; i < t.n * t.lanes; i += t.lanes)
        EACH_REGISTER (k) {
            V rest = mul_add(load(xhat + i + k * W), slope[k], constant[k]);
            store(xhat + i + k * W, mul_add(load(dy + i + k * W), factor[k], rest));
        }
}

NX_INLINE void tile_dx(C *xhat, const C *dy, tile_shape t, const tile_line *line)
{
#define DX(l, vectors) lane_dx(xhat, dy, t, line, l, vectors)
    EACH_LANES(DX);
#undef DX
}

/* The sums of a backward pass before dx. */
NX_INLINE void lane_gradients(C *x, C *dy, tile_shape t, int centred, const tile_line *line,
                              ptrdiff_t l, const C *gamma, position_sums *sums, C *sum, C *dot,
                              int vectors)
{
    V minus_pivot[NV];
    lane_xhat(x + l, dy + l, t, centred, line, l, gamma, sums, minus_pivot, vectors);
    lane_dots(x + l, dy + l, t, minus_pivot, gamma, sum + l, dot + l, vectors);
}

/* A tile of x becomes that of dx. dy is taken about a pivot (nx_near says what for) near its mean,
 * if that matters: to rows about zero it does not. */
NX_INLINE void tile_backward(C *x, C *dy, tile_shape t, int centred, const double *mean,
                             const double *rstd, const C *gamma, position_sums *sums)
{
    const double each = 1 / (double)t.n;
    tile_line line;
    C sum[TILE_ROWS], dot[TILE_ROWS];
    tile_standardize(&line, t, mean, rstd);
#define GRADIENTS(l, vectors) \
    lane_gradients(x, dy, t, centred, &line, l, gamma, sums, sum, dot, vectors)
    EACH_LANES(GRADIENTS);
#undef GRADIENTS
    for (ptrdiff_t r = 0; r < t.rows; r++) {
        line.pivot[r] = (C)(-rstd[r] * (dot[r] * each));
        line.shift[r] = centred ? (C)nx_constant(rstd[r], sum[r] * each) : 0;
    }
    tile_dx(x, dy, t, &line);
}

NX_OUTLINE void short_backward(const nx_backward *of, int centred, const double *mean,
                               const double *rstd, double *dbeta, double *dgamma, int streaming)
{
    enum { FOLDED = 12 * LANES }; /* a multiple of every tile's rows: the bits are the same */
    const nx_block b = of->block;
    const C *gamma = of->gamma;
    C x[TILE], dy[TILE];
    tile_shape t;
    ptrdiff_t added = 0;
    position_sums sums[SHORT_BACKWARD];
    memset(sums, 0, (size_t)b.n * sizeof *sums);
    for (ptrdiff_t first = 0; first < b.rows; first += t.rows) {
        t = tile_of(b.rows - first, b.n, streaming);
        const nx_backward part = rows_part(*of, first, (nx_block){t.rows, t.n});
        tile_in(part.x, t, x, streaming);
        tile_in(part.dy, t, dy, streaming);
        if (gamma) tile_backward(x, dy, t, centred, mean + first, rstd + first, gamma, sums);
        else tile_backward(x, dy, t, centred, mean + first, rstd + first, NULL, sums);
        if (part.addend.data) {
            tile_in(part.addend, t, dy, streaming);
            for (ptrdiff_t i = 0; i < t.n * t.lanes; i += W)
                store(x + i, add(load(x + i), load(dy + i)));
        }
        tile_out(x, t, 0, part.dx, t.rows, streaming);
        added += t.rows;
        if (added == FOLDED || first + t.rows == b.rows) {
            for (ptrdiff_t j = 0; j < b.n; j++) {
                if (centred) dbeta[j] += fold(sums[j].dbeta);
                dgamma[j] += fold(sums[j].dgamma);
            }
            added = 0;
        }
    }
}

/* Groups of rows with a gamma and beta for each row: a tile of SHORT_GROUP numbers a group at most. */

NX_INLINE nx_rows groups_row(nx_groups x, ptrdiff_t group, ptrdiff_t row)
{ return (nx_rows){(T *)x.data + group * x.group + row * x.row, x.group}; }

/* Row by row, unless a group's rows lie one after the other. */
static void groups_in(nx_groups x, ptrdiff_t first, ptrdiff_t rows, tile_shape t, C *tile,
                      int streaming)
{
    const tile_shape part = {t.rows, t.n / rows, t.lanes};
    if (x.row == part.n || rows == 1) {
        tile_in(groups_row(x, first, 0), t, tile, streaming);
        return;
    }
    for (ptrdiff_t k = 0; k < rows; k++)
        tile_in(groups_row(x, first, k), part, tile + k * part.n * t.lanes, streaming);
}

static void groups_out(const C *tile, tile_shape t, ptrdiff_t r, nx_groups y, ptrdiff_t first,
                       ptrdiff_t rows, ptrdiff_t count, int streaming)
{
    const tile_shape part = {t.rows, t.n / rows, t.lanes};
    if (y.row == part.n || rows == 1) {
        tile_out(tile, t, r, groups_row(y, first + r, 0), count, streaming);
        return;
    }
    for (ptrdiff_t k = 0; k < rows; k++)
        tile_out(tile + k * part.n * t.lanes, part, r, groups_row(y, first + r, k), count,
                 streaming);
}

/* The parameters of row k of some groups, one for each lane; NULL means `otherwise`. */
NX_INLINE void lane_parameters(const C *p, C otherwise, const nx_grouping *g, ptrdiff_t first,
                               ptrdiff_t k, ptrdiff_t count, C *lanes)
{
    ptrdiff_t channel = (g->channel + first * g->rows + k) % g->channels;
    for (ptrdiff_t r = 0; r < count; r++) {
        lanes[r] = p ? p[channel] : otherwise;
        channel += g->rows;
        if (channel >= g->channels) channel -= g->channels;
    }
}

NX_OUTLINE void short_groups_forward(nx_groups x, nx_groups y, const nx_grouping *g, double eps,
                                     int relu, double *mean, double *rstd, int streaming)
{
    const ptrdiff_t rows = g->rows, n = g->n;
    C tile[TILE], gamma[TILE_ROWS], beta[TILE_ROWS];
    double scale[TILE_ROWS];
    tile_line line;
    tile_shape t;
    for (ptrdiff_t first = 0; first < g->groups; first += t.rows) {
        unsigned char far[TILE_ROWS] = {0};
        int any_far = 0;
        t = tile_of(g->groups - first, rows * n, streaming);
        groups_in(x, first, rows, t, tile, streaming);
        tile_statistics(tile, t, 1, eps, mean + first, rstd + first);
        for (ptrdiff_t k = 0; k < rows; k++) {
            const tile_shape part = {t.rows, n, t.lanes};
            C *numbers = tile + k * n * t.lanes;
            lane_parameters(g->gamma, 1, g, first, k, t.rows, gamma);
            lane_parameters(g->beta, 0, g, first, k, t.rows, beta);
            for (ptrdiff_t r = 0; r < t.rows; r++) scale[r] = rstd[first + r] * (double)gamma[r];
            tile_map(&line, t, mean + first, scale, beta);
            if (relu) tile_affine(numbers, part, &line, NULL, NULL, 1);
            else tile_affine(numbers, part, &line, NULL, NULL, 0);
            if (ordinary(mean + first, scale, t.rows) == t.rows) continue;
            any_far = 1;
            for (ptrdiff_t r = 0; r < t.rows; r++) far[r] |= far_out(mean[first + r], scale[r]);
        }
        if (!any_far) {
            groups_out(tile, t, 0, y, first, rows, t.rows, streaming);
            continue;
        }
        for (ptrdiff_t r = 0; r < t.rows; r++) {
            if (!far[r]) {
                groups_out(tile, t, r, y, first, rows, 1, streaming);
                continue;
            }
            for (ptrdiff_t k = 0; k < rows; k++) {
                double shift;
                lane_parameters(g->gamma, 1, g, first + r, k, 1, gamma);
                lane_parameters(g->beta, 0, g, first + r, k, 1, beta);
                *scale = rstd[first + r] * (double)*gamma;
                shift = *beta;
                affine_far_out(groups_row(x, first + r, k).data, groups_row(y, first + r, k).data,
                               n, &(nx_affine){mean + first + r, scale, &shift, 0, 0}, NULL, NULL,
                               relu);
            }
        }
    }
}

/* dy and dy * xhat of a row of each group are added up; x becomes xhat. */
NX_INLINE void lane_sums_of_row(C *x, const C *dy, tile_shape t, const tile_line *line, ptrdiff_t l,
                                C *sum, C *dot, int vectors)
{
    V p[NV], a[NV], b[NV], s[NV], q[NV];
    load_lanes(line->pivot + l, p, vectors);
    load_lanes(line->scale + l, a, vectors);
    load_lanes(line->shift + l, b, vectors);
    clear(s, vectors);
    clear(q, vectors);
    EACH_FIRST (j, end) {
        V first_s[NV], first_q[NV];
        clear(first_s, vectors);
        clear(first_q, vectors);
        for (ptrdiff_t i = j; i < end; i++)
            EACH_REGISTER (k) {
                V h = mul_add(sub(load(x + i * t.lanes + k * W), p[k]), a[k], b[k]);
                V g = load(dy + i * t.lanes + k * W);
                store(x + i * t.lanes + k * W, h);
                first_s[k] = add(first_s[k], g);
                first_q[k] = mul_add(g, h, first_q[k]);
            }
        add_vectors(s, first_s, vectors);
        add_vectors(q, first_q, vectors);
    }
    store_lanes(sum, s, vectors);
    store_lanes(dot, q, vectors);
}

/* How many groups come before the first whose dy is far from zero; row_is_far of each. */
NX_INLINE ptrdiff_t near_zero(const C *dy, tile_shape t, ptrdiff_t n, const double *sum)
{
    const double each = 1 / (double)t.n;
    double far[TILE_ROWS];
    int any = 0;
    if (n == 1) return t.rows;
    for (ptrdiff_t r = 0; r < t.rows; r++) far[r] = 1;
    for (int i = 1; i < 8; i += 2) {
        const C *sample = dy + i * n / 8 * t.lanes;
        for (ptrdiff_t r = 0; r < t.rows; r++)
            far[r] = nx_near(sample[r], sum[r] * each) ? far[r] : 0;
    }
    for (ptrdiff_t r = 0; r < t.rows; r++) any |= far[r] != 0;
    for (ptrdiff_t r = 0; any && r < t.rows; r++)
        if (far[r] != 0) return r;
    return t.rows;
}

NX_OUTLINE ptrdiff_t short_groups_backward(nx_groups x_, nx_groups dy_, nx_groups dx,
                                           const nx_grouping *g, const double *mean,
                                           const double *rstd, double *dbeta, double *dgamma,
                                           int streaming)
{
    const ptrdiff_t rows = g->rows, n = g->n;
    const double each = 1 / ((double)rows * (double)n);
    C x[TILE], dy[TILE], gamma[TILE_ROWS], sum[TILE_ROWS], dot[TILE_ROWS];
    double dy_sum[TILE_ROWS], g_sum[TILE_ROWS], g_dot[TILE_ROWS];
    tile_line line;
    tile_shape t;
    for (ptrdiff_t first = 0; first < g->groups; first += t.rows) {
        t = tile_of(g->groups - first, rows * n, streaming);
        const tile_shape part = {t.rows, n, t.lanes};
        groups_in(x_, first, rows, t, x, streaming);
        groups_in(dy_, first, rows, t, dy, streaming);
        tile_standardize(&line, t, mean + first, rstd + first);
        for (ptrdiff_t r = 0; r < t.rows; r++) dy_sum[r] = g_sum[r] = g_dot[r] = 0;
        for (ptrdiff_t k = 0; k < rows; k++) {
            const ptrdiff_t at = k * n * t.lanes;
            double *NX_RESTRICT to_dbeta = dbeta + first * rows + k,
                                *NX_RESTRICT to_dgamma = dgamma + first * rows + k;
            lane_parameters(g->gamma, 1, g, first, k, t.rows, gamma);
#define SUMS(l, vectors) \
    lane_sums_of_row(x + at + l, dy + at + l, part, &line, l, sum + l, dot + l, vectors)
            EACH_LANES(SUMS);
#undef SUMS
            for (ptrdiff_t r = 0; r < t.rows; r++) {
                dy_sum[r] += sum[r];
                g_sum[r] += (double)gamma[r] * sum[r];
                g_dot[r] += (double)gamma[r] * dot[r];
            }
            for (ptrdiff_t r = 0; r < t.rows; r++) {
                to_dbeta[r * rows] = sum[r];
                to_dgamma[r * rows] = dot[r];
            }
        }
        const ptrdiff_t near = near_zero(dy, t, n, dy_sum);
        for (ptrdiff_t r = 0; r < t.rows; r++) {
            line.pivot[r] = (C)(-rstd[first + r] * (g_dot[r] * each));
            line.shift[r] = (C)(-rstd[first + r] * (g_sum[r] * each));
        }
        for (ptrdiff_t k = 0; k < rows; k++) {
            const ptrdiff_t at = k * n * t.lanes;
            lane_parameters(g->gamma, 1, g, first, k, t.rows, gamma);
            for (ptrdiff_t r = 0; r < t.rows; r++)
                line.scale[r] = (C)(rstd[first + r] * (double)gamma[r]);
            tile_dx(x + at, dy + at, part, &line);
        }
        groups_out(x, t, 0, dx, first, rows, near, streaming);
        if (near < t.rows) return first + near;
    }
    return g->groups;
}
