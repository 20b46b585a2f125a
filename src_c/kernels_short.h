/* Short rows with statistics of their own; included from kernels_template.h.
 *
 * A row that does not fill a few vectors costs what its sums across a vector cost, a root and a
 * division, however short it is. So TILE rows at a time are turned into the columns of a tile on
 * the stack: number j of row r is at tile[j * TILE + r], what happens along the rows happens to
 * whole vectors of rows, one lane for each, and roots and divisions are shared out likewise. Then
 * the tile is turned back.
 *
 *     rows of x, n = 3      tile: n x TILE
 *     a0 a1 a2              a0 b0 c0 ...
 *     b0 b1 b2              a1 b1 c1 ...
 *     c0 c1 c2              a2 b2 c2 ...
 *
 * A row's lane is added up in one order on every instruction set, whatever rows are beside it: its
 * bits do not depend on them, nor on their number, nor on where it lies. What is rare (statistics
 * at the ends of the range) is done to the row alone, as to longer ones.
 *
 * A tile is read as a whole before any of it is written, so that y may be x, and dx dy or x. */

enum {
    SHORT = 64,
    TILE = LANES,
    SIDE = BY_TYPE(f32_SIDE, f64_SIDE),
};

/* q[j][i] = p[i][j], by squares, the last of which may overlap. */
NX_INLINE void turn(const C *p, ptrdiff_t p_stride, C *q, ptrdiff_t q_stride, nx_block b)
{
    if (b.rows < SIDE || b.n < SIDE) {
        for (ptrdiff_t i = 0; i < b.rows; i++)
            for (ptrdiff_t j = 0; j < b.n; j++) q[j * q_stride + i] = p[i * p_stride + j];
        return;
    }
    for (ptrdiff_t i = 0; i < b.rows; i += SIDE) {
        const ptrdiff_t row = i + SIDE <= b.rows ? i : b.rows - SIDE;
        for (ptrdiff_t j = 0; j < b.n; j += SIDE) {
            const ptrdiff_t col = j + SIDE <= b.n ? j : b.n - SIDE;
            transpose_square(p + row * p_stride + col, p_stride, q + col * q_stride + row,
                             q_stride);
        }
    }
}

/* Rows that lie one after the other, as one long one. */
NX_INLINE nx_block joined(nx_rows x, nx_block b)
{ return x.stride == b.n ? (nx_block){1, b.rows * b.n} : b; }

/* TILE rows at most; the lanes beyond them become 0. */
static void tile_in(nx_rows x, nx_block b, C *tile)
{
#ifdef T_INT
    turn(x.data, x.stride, tile, TILE, b);
#else
    C stretch[TILE * SHORT];
    const nx_block rows = joined(x, b);
    for (ptrdiff_t r = 0; r < rows.rows; r++) {
        const T *from = (const T *)x.data + r * x.stride;
        C *to = stretch + r * b.n;
        ptrdiff_t i = 0;
        for (; i + W <= rows.n; i += W) store(to + i, load(from + i));
        if (i < rows.n) store_n(to + i, rows.n - i, load_n(from + i, rows.n - i, ZERO));
    }
    turn(stretch, b.n, tile, TILE, b);
#endif
    if (b.rows == TILE) return;
    for (ptrdiff_t j = 0; j < b.n; j++)
        for (ptrdiff_t r = b.rows; r < TILE; r++) tile[j * TILE + r] = 0;
}

static void tile_out(const C *tile, nx_rows y, nx_block b, int streaming)
{
#ifdef T_INT
    if (!streaming) {
        turn(tile, TILE, y.data, y.stride, (nx_block){b.n, b.rows});
        return;
    }
#endif
    C stretch[TILE * SHORT];
    turn(tile, TILE, stretch, b.n, (nx_block){b.n, b.rows});
    const nx_block rows = joined(y, b);
    for (ptrdiff_t r = 0; r < rows.rows; r++) {
        const C *from = stretch + r * b.n;
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

/* What is done to each vector of lanes; unrolled. */
#define EACH_LANES for (int k = 0; k < NV; k++)

/* For positions from j on, as many as the first level of sums adds up. */
#define EACH_FIRST(j, end)                                                                      \
    for (ptrdiff_t j = 0, end; j < n && (end = n - j < ROWS_AT_ONCE ? n : j + ROWS_AT_ONCE, 1); \
         j = end)

NX_INLINE void clear(V *v) { EACH_LANES v[k] = ZERO; }
NX_INLINE void load_lanes(const C *p, V *v) { EACH_LANES v[k] = load(p + k * W); }
NX_INLINE void store_lanes(C *p, const V *v) { EACH_LANES store(p + k * W, v[k]); }
NX_INLINE void add_vectors(V *sum, const V *v) { EACH_LANES sum[k] = add(sum[k], v[k]); }

/* Each row's statistics. The pivot is its mean, roughly. Of numbers that are all the same, the
 * pivot is a few of their last bits away; the sums about it are exact then, and what m2 is not 0 by
 * is the rounding of the formula. Any other row's m2 is 1e-5 of its squares and more. */
static void tile_statistics(const C *tile, nx_rows x, nx_block b, int centred, double eps,
                            double *mean, double *rstd)
{
    const ptrdiff_t n = b.n;
    const double each = 1 / (double)n;
    /* Beside such an eps it does not show what digits a small variance has lost. */
    const double least = eps > range.tiny / DBL_EPSILON ? 0 : range.tiny * (double)n;
    C pivot[TILE], sum[TILE], squares[TILE];
    double unfit[TILE], any = 0;
    V p[NV], s[NV], q[NV];
    clear(p);
    if (centred) {
        EACH_FIRST(j, end)
        {
            load_lanes(tile + j * TILE, s);
            for (ptrdiff_t i = j + 1; i < end; i++)
                EACH_LANES s[k] = add(s[k], load(tile + i * TILE + k * W));
            add_vectors(p, s);
        }
        const V share = splat((C)each);
        EACH_LANES p[k] = mul(p[k], share);
    }
    clear(s);
    clear(q);
    EACH_FIRST(j, end)
    {
        V first_s[NV], first_q[NV];
        clear(first_s);
        clear(first_q);
        for (ptrdiff_t i = j; i < end; i++) EACH_LANES
            {
                V d = sub(load(tile + i * TILE + k * W), p[k]);
                first_s[k] = add(first_s[k], d);
                first_q[k] = mul_add(d, d, first_q[k]);
            }
        add_vectors(s, first_s);
        add_vectors(q, first_q);
    }
    store_lanes(pivot, p);
    store_lanes(sum, s);
    store_lanes(squares, q);
    for (ptrdiff_t r = 0; r < TILE; r++) {
        double rest = centred ? sum[r] * each : 0, m2 = squares[r] - sum[r] * rest;
        double middle = pivot[r] + rest;
        m2 = m2 < squares[r] * 0x1p-40 ? 0 : m2;
        mean[r] = middle;
        rstd[r] = m2 * each;
        unfit[r] = (m2 <= DBL_MAX ? 0.0 : 1.0) +
                   (m2 < least ? 1.0 : 0.0) * (fabs(middle) < range.near_zero ? 1.0 : 0.0);
        any += unfit[r];
    }
    nx_inverse_stds(rstd, TILE, eps);
    for (ptrdiff_t r = 0; r < b.rows && any != 0; r++)
        if (unfit[r] != 0)
            statistics_interleaved(rows_at(x, r, 0), (nx_block){1, n}, centred, eps, mean + r,
                                   rstd + r);
}

/* tile = gamma * ((tile - mean) * rstd) + beta */
NX_INLINE void tile_affine(C *tile, ptrdiff_t n, const double *mean, const double *rstd,
                           const C *gamma, const C *beta)
{
    C pivot[TILE], scale[TILE], shift[TILE];
    V p[NV], a[NV], b[NV], g = ZERO, h = ZERO;
    for (ptrdiff_t r = 0; r < TILE; r++) {
        pivot[r] = (C)mean[r];
        scale[r] = (C)rstd[r];
        shift[r] = pivot_shift(mean[r], rstd[r], 0);
    }
    load_lanes(pivot, p);
    load_lanes(scale, a);
    load_lanes(shift, b);
    for (ptrdiff_t j = 0; j < n; j++) {
        C *numbers = tile + j * TILE;
        if (gamma) g = splat(gamma[j]);
        if (beta) h = splat(beta[j]);
        EACH_LANES
        {
            V v = mul_add(sub(load(numbers + k * W), p[k]), a[k], b[k]);
            if (gamma && beta) v = mul_add(v, g, h);
            else if (gamma) v = mul(v, g);
            else if (beta) v = add(v, h);
            store(numbers + k * W, v);
        }
    }
}

/* The layer_... of kernels_list.h for rows of SHORT numbers at most. */
static void short_statistics(nx_rows x, nx_block b, int centred, double eps, double *mean,
                             double *rstd)
{
    C tile[SHORT * TILE];
    double tile_mean[TILE], tile_rstd[TILE];
    for (ptrdiff_t first = 0; first < b.rows; first += TILE) {
        const nx_rows rows = rows_at(x, first, 0);
        const nx_block some = {b.rows - first < TILE ? b.rows - first : TILE, b.n};
        tile_in(rows, some, tile);
        tile_statistics(tile, rows, some, centred, eps, tile_mean, tile_rstd);
        memcpy(mean + first, tile_mean, (size_t)some.rows * sizeof(double));
        memcpy(rstd + first, tile_rstd, (size_t)some.rows * sizeof(double));
    }
}

NX_OUTLINE void short_forward(nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean,
                              double *rstd, int streaming)
{
    static const double zero = 0;
    const C *gamma = norm->gamma, *beta = norm->beta;
    C tile[SHORT * TILE];
    double tile_mean[TILE], tile_rstd[TILE];
    for (ptrdiff_t first = 0; first < b.rows; first += TILE) {
        const nx_block some = {b.rows - first < TILE ? b.rows - first : TILE, b.n};
        tile_in(rows_at(x, first, 0), some, tile);
        tile_statistics(tile, rows_at(x, first, 0), some, norm->centred, norm->eps, tile_mean,
                        tile_rstd);
        memcpy(mean + first, tile_mean, (size_t)some.rows * sizeof(double));
        memcpy(rstd + first, tile_rstd, (size_t)some.rows * sizeof(double));
        if (gamma && beta) tile_affine(tile, b.n, tile_mean, tile_rstd, gamma, beta);
        else if (gamma) tile_affine(tile, b.n, tile_mean, tile_rstd, gamma, NULL);
        else if (beta) tile_affine(tile, b.n, tile_mean, tile_rstd, NULL, beta);
        else tile_affine(tile, b.n, tile_mean, tile_rstd, NULL, NULL);
        for (ptrdiff_t r = 0, fit; r < some.rows; r += fit + 1) {
            fit = ordinary(tile_mean + r, tile_rstd + r, some.rows - r);
            if (fit) tile_out(tile + r, rows_at(y, first + r, 0), (nx_block){fit, b.n}, streaming);
            if (r + fit == some.rows) break;
            const ptrdiff_t far = first + r + fit;
            affine_far_out(rows_at(x, far, 0).data, rows_at(y, far, 0).data, b.n,
                           &(nx_affine){mean + far, rstd + far, &zero, 0, 0}, gamma, beta, 0);
        }
    }
}

/* The gradients of each position's gamma and beta, in WIDEST lanes on every instruction set: those
 * of the tile's other half are added to them first. After FOLDED rows they go to the doubles. */
typedef struct {
    C dbeta[SHORT * WIDEST], dgamma[SHORT * WIDEST];
} short_sums;

NX_INLINE void add_halves(C *sum, const V *v)
{
    for (int k = 0; k < NV / 2; k++)
        store(sum + k * W, add(load(sum + k * W), add(v[k], v[k + NV / 2])));
}

NX_INLINE void fold(C *sums, ptrdiff_t n, double *to)
{
    for (ptrdiff_t j = 0; j < n; j++) {
        V lanes[NV];
        clear(lanes);
        for (int k = 0; k < NV / 2; k++) {
            lanes[k] = load(sums + j * WIDEST + k * W);
            store(sums + j * WIDEST + k * W, ZERO);
        }
        to[j] += (double)sum_lanes(lanes, NV);
    }
}

/* A tile of x becomes its xhat, one of dy gamma * dy - pivot, and then that of x dx. The pivot is
 * the mean of gamma * dy, roughly (nx_near says what it is for), or 0 where that does not matter.
 * The product is rounded with it taken off already, but in a row of one number, whose gradient is
 * to be 0 exactly. */
NX_INLINE void tile_backward(C *x, C *dy, ptrdiff_t n, int centred, const double *mean,
                             const double *rstd, const C *gamma, short_sums *sums)
{
    const double each = 1 / (double)n;
    C pivot[TILE], scale[TILE], shift[TILE], sum[TILE], dot[TILE];
    V p[NV], a[NV], b[NV], s[NV], q[NV];
    for (ptrdiff_t r = 0; r < TILE; r++) {
        pivot[r] = (C)mean[r];
        scale[r] = (C)rstd[r];
        shift[r] = pivot_shift(mean[r], rstd[r], 0);
    }
    load_lanes(pivot, p);
    load_lanes(scale, a);
    load_lanes(shift, b);
    clear(s);
    EACH_FIRST(j, end)
    {
        V first_s[NV], g[NV], products[NV], c = ZERO;
        clear(first_s);
        for (ptrdiff_t i = j; i < end; i++) {
            if (gamma) c = splat(gamma[i]);
            EACH_LANES
            {
                V h = mul_add(sub(load(x + i * TILE + k * W), p[k]), a[k], b[k]);
                g[k] = load(dy + i * TILE + k * W);
                products[k] = mul(g[k], h);
                store(x + i * TILE + k * W, h);
                first_s[k] = add(first_s[k], gamma ? mul(g[k], c) : g[k]);
            }
            add_halves(sums->dbeta + i * WIDEST, g);
            add_halves(sums->dgamma + i * WIDEST, products);
        }
        add_vectors(s, first_s);
    }
    const V minus_share = splat(centred ? -(C)each : 0);
    V minus[NV];
    EACH_LANES minus[k] = mul(s[k], minus_share);
    if (n == 1 && gamma) {
        const V c = splat(*gamma);
        EACH_LANES store(dy + k * W, mul(load(dy + k * W), c));
        gamma = NULL;
    }
    clear(s);
    clear(q);
    EACH_FIRST(j, end)
    {
        V first_s[NV], first_q[NV], c = ZERO;
        clear(first_s);
        clear(first_q);
        for (ptrdiff_t i = j; i < end; i++) {
            if (gamma) c = splat(gamma[i]);
            EACH_LANES
            {
                V g = load(dy + i * TILE + k * W);
                g = gradient(g, g, gamma ? &c : NULL, NULL, &minus[k]);
                store(dy + i * TILE + k * W, g);
                first_s[k] = add(first_s[k], g);
                first_q[k] = mul_add(g, load(x + i * TILE + k * W), first_q[k]);
            }
        }
        add_vectors(s, first_s);
        add_vectors(q, first_q);
    }
    store_lanes(sum, s);
    store_lanes(dot, q);
    for (ptrdiff_t r = 0; r < TILE; r++) {
        pivot[r] = (C)(-rstd[r] * (dot[r] * each));
        shift[r] = centred ? (C)(-rstd[r] * (sum[r] * each)) : 0;
    }
    load_lanes(pivot, p);
    load_lanes(shift, b);
    for (ptrdiff_t j = 0; j < n; j++) EACH_LANES
        {
            V rest = mul_add(load(x + j * TILE + k * W), p[k], b[k]);
            store(x + j * TILE + k * W, mul_add(load(dy + j * TILE + k * W), a[k], rest));
        }
}

NX_OUTLINE void short_backward(const nx_backward *of, int centred, const double *mean,
                               const double *rstd, double *dbeta, double *dgamma, int streaming)
{
    enum { FOLDED = 16 * TILE };
    const nx_block b = of->block;
    const C *gamma = of->gamma;
    C x[SHORT * TILE], dy[SHORT * TILE];
    double tile_mean[TILE], tile_rstd[TILE];
    short_sums sums;
    memset(sums.dbeta, 0, (size_t)b.n * WIDEST * sizeof(C));
    memset(sums.dgamma, 0, (size_t)b.n * WIDEST * sizeof(C));
    for (ptrdiff_t first = 0; first < b.rows; first += TILE) {
        const nx_block some = {b.rows - first < TILE ? b.rows - first : TILE, b.n};
        const nx_backward part = rows_part(*of, first, some);
        for (ptrdiff_t r = 0; r < TILE; r++) tile_mean[r] = tile_rstd[r] = 0;
        memcpy(tile_mean, mean + first, (size_t)some.rows * sizeof(double));
        memcpy(tile_rstd, rstd + first, (size_t)some.rows * sizeof(double));
        tile_in(part.x, some, x);
        tile_in(part.dy, some, dy);
        if (gamma) tile_backward(x, dy, b.n, centred, tile_mean, tile_rstd, gamma, &sums);
        else tile_backward(x, dy, b.n, centred, tile_mean, tile_rstd, NULL, &sums);
        if (part.addend.data) {
            tile_in(part.addend, some, dy);
            for (ptrdiff_t i = 0; i < b.n * TILE; i += W)
                store(x + i, add(load(x + i), load(dy + i)));
        }
        tile_out(x, part.dx, some, streaming);
        if ((first + TILE) % FOLDED == 0 || first + TILE >= b.rows) {
            fold(sums.dbeta, b.n, dbeta);
            fold(sums.dgamma, b.n, dgamma);
        }
    }
}
