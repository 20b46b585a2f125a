/* What writes elements; included from kernels_template.h twice, with the macro STREAM 0 and 1.
 * Streaming stores go around the caches: memory that is too large to be met there again is not read
 * into them first, only to be written over. They need whole aligned vectors, so that a row begins
 * with what is left to the next of these. x86 orders them before whatever comes after the next
 * locked instruction, which is how threads, and Python's own lock, hand memory on. */
#ifndef STREAM
#error "kernels_write.h takes STREAM"
#endif

#if STREAM
#define WR(name) stream_##name
#define TABLE NX_JOIN(nx_stream, NX_ISA, NX_TYPE)
#else
#define WR(name) name
#define TABLE NX_JOIN(nx, NX_ISA, NX_TYPE)
#endif

NX_INLINE void WR(put)(T *p, ptrdiff_t left, int whole, V v)
{
    if (!whole) store_n(p, left, v);
    else if (STREAM) stream(p, v);
    else store(p, v);
}

/* f(position, numbers, whether they are a whole vector) */
#define EACH_VECTOR(y, n, f)                         \
    do {                                             \
        ptrdiff_t i_ = STREAM ? unaligned(y, n) : 0; \
        if (i_) f(0, i_, 0);                         \
        for (; i_ + W <= (n); i_ += W) f(i_, W, 1);  \
        if (i_ < (n)) f(i_, (n) - i_, 0);            \
    } while (0)

/* A vector of each of `rows` rows, which share gamma and beta. */
NX_INLINE void WR(affine_vector)(nx_rows x, nx_rows y, ptrdiff_t rows, ptrdiff_t i, ptrdiff_t left,
                                 int whole, const V *p, const V *scale, const V *shift,
                                 const C *gamma, const C *beta, int relu, ptrdiff_t ahead)
{
    V c = ZERO, d = ZERO;
    if (gamma) c = coefficients(gamma + i, left, whole);
    if (beta) d = coefficients(beta + i, left, whole);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const T *from = (const T *)x.data + r * x.stride + i;
        if (ahead) NX_PREFETCH(from + ahead);
        V v = mul_add(sub(some(from, left, whole, p[r]), p[r]), scale[r], shift[r]);
        if (gamma && beta) v = mul_add(v, c, d);
        else if (gamma) v = mul(v, c);
        else if (beta) v = add(v, d);
        WR(put)((T *)y.data + r * y.stride + i, left, whole, relu ? greater(ZERO, v) : v);
    }
}

NX_INLINE void WR(affine_rows)(nx_rows x, nx_rows y, ptrdiff_t rows, ptrdiff_t n, nx_affine map,
                               const C *gamma, const C *beta, int relu)
{
    V p[2], scale[2], shift[2];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const nx_affine of_row = map_at(map, r);
        p[r] = splat((C)*of_row.mean);
        scale[r] = splat((C)*of_row.scale);
        shift[r] = splat(pivot_shift(*of_row.mean, *of_row.scale, *of_row.shift));
    }
#define VECTOR(i, left, whole) \
    WR(affine_vector)(x, y, rows, i, left, whole, p, scale, shift, gamma, beta, relu, map.ahead)
    EACH_VECTOR((T *)y.data, n, VECTOR);
#undef VECTOR
}

/* Two rows at a time, where their vectors are aligned alike, if there is a gamma or beta, which then
 * is loaded once. Otherwise it is better to write memory in order: images of 256 numbers, evaluated
 * in 16 MiB, took twice as long. */
NX_INLINE void WR(affine_loop)(nx_rows x, nx_rows y, nx_block b, nx_affine map, const C *gamma,
                               const C *beta, int relu)
{
    const int alike = (gamma || beta) && (!STREAM || y.stride % W == 0);
    for (ptrdiff_t r = 0; r < b.rows;) {
        const nx_affine here = map_at(map, r), next = map_at(map, r + 1);
        const nx_rows from = rows_at(x, r, 0), to = rows_at(y, r, 0);
        if (far_out(*here.mean, *here.scale)) {
            affine_far_out(from.data, to.data, b.n, &here, gamma, beta, relu);
            r += 1;
        } else if (alike && r + 1 < b.rows && !far_out(*next.mean, *next.scale)) {
            WR(affine_rows)(from, to, 2, b.n, here, gamma, beta, relu);
            r += 2;
        } else {
            WR(affine_rows)(from, to, 1, b.n, here, gamma, beta, relu);
            r += 1;
        }
    }
}

NX_OUTLINE void WR(row_affine)(nx_rows x, nx_rows y, nx_block b, const nx_affine *map,
                               const void *gamma, const void *beta, int relu)
{
    /* One loop each, so that none asks for every vector what there is to do. */
    if (gamma && beta) WR(affine_loop)(x, y, b, *map, gamma, beta, 0);
    else if (gamma) WR(affine_loop)(x, y, b, *map, gamma, NULL, 0);
    else if (beta) WR(affine_loop)(x, y, b, *map, NULL, beta, 0);
    else if (relu) WR(affine_loop)(x, y, b, *map, NULL, NULL, 1);
    else WR(affine_loop)(x, y, b, *map, NULL, NULL, 0);
}

/* Unless dy is far from zero, a product with gamma is rounded as it was when the pivot was found: a
 * row of one number gives exactly 0. */
NX_INLINE void WR(dx_vector)(nx_backward of, ptrdiff_t i, ptrdiff_t left, int whole,
                             const line_vectors *line, int far)
{
    const T *x = of.x.data, *dy = of.dy.data, *addend = of.addend.data;
    const C *gamma = of.gamma;
    const relu_mask *mask = of.relu ? &line->mask : NULL;
    if (of.ahead) NX_PREFETCH(dy + i + of.ahead);
    V d = sub(some(x + i, left, whole, ZERO), line->x_pivot), c = ZERO;
    if (gamma) c = coefficients(gamma + i, left, whole);
    V g = some(dy + i, left, whole, ZERO);
    if (far) g = gradient(g, d, gamma ? &c : NULL, mask, &line->minus_pivot);
    else g = add(gradient(g, d, gamma ? &c : NULL, mask, NULL), line->minus_pivot);
    V v = mul_add(g, line->factor, mul_add(d, line->slope, line->constant));
    if (addend) v = add(v, some(addend + i, left, whole, ZERO));
    WR(put)((T *)of.dx.data + i, left, whole, v);
}

NX_INLINE void WR(dx_loop)(nx_backward of, nx_line line, int far)
{
    const nx_block b = of.block;
    const double mean = *line.mean, slope = *line.slope, constant = *line.constant;
    const C x_pivot = (C)mean, g_pivot = (C)*line.pivot;
    line_vectors l = {
        .x_pivot = splat(x_pivot), .minus_pivot = splat(-g_pivot), .slope = splat((C)slope)};
    if (of.relu) l.mask = mask_of(of.relu, mean);
    for (ptrdiff_t r = 0; r < b.rows; r++, of = rows_part(of, 1, b)) {
        if (r == 0 || line.step) {
            double factor = line.factor[r * line.step];
            l.factor = splat((C)factor);
            l.constant = splat((C)(constant + factor * g_pivot - slope * (mean - x_pivot)));
        }
#define VECTOR(i, left, whole) WR(dx_vector)(of, i, left, whole, &l, far)
        EACH_VECTOR(of.dx.data, b.n, VECTOR);
#undef VECTOR
    }
}

NX_OUTLINE void WR(row_dx)(const nx_backward *of, const nx_line *line)
{
    const void *gamma = of->gamma;
    if (gamma && of->block.n == 1) WR(dx_loop)(with(*of, gamma, NULL, of->addend), *line, 0);
    else if (gamma && of->addend.data) WR(dx_loop)(with(*of, gamma, NULL, of->addend), *line, 1);
    else if (gamma) WR(dx_loop)(with(*of, gamma, NULL, none), *line, 1);
    else if (of->addend.data) WR(dx_loop)(with(*of, NULL, NULL, of->addend), *line, 1);
    else if (of->relu) WR(dx_loop)(with(*of, NULL, of->relu, none), *line, 1);
    else WR(dx_loop)(with(*of, NULL, NULL, none), *line, 1);
}

/* Short rows that lie one after the other are made in a buffer, and go around the caches as one run
 * of numbers: by themselves, they would each end in lines of which they are a part. */
#if STREAM
static void stream_run(const T *from, T *to, ptrdiff_t n)
{
#define VECTOR(i, left, whole) WR(put)(to + i, left, whole, some(from + i, left, whole, ZERO))
    EACH_VECTOR(to, n, VECTOR);
#undef VECTOR
}
#endif

static void WR(layer_forward)(nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean,
                              double *rstd)
{
    static const double zeros[INTERLEAVED];
    if (b.n <= SHORT) {
        short_forward(x, y, b, norm, mean, rstd, STREAM);
        return;
    }
    for (ptrdiff_t first = 0, count; first < b.rows; first += count) {
        count = rows_interleaved(b.rows - first, b.n, ROW_BLOCK);
        const nx_rows some_x = rows_at(x, first, 0), some_y = rows_at(y, first, 0);
        const nx_block some = {count, b.n};
        const nx_affine map = {mean + first, rstd + first, zeros, 1, STREAM ? count * x.stride : 0};
        statistics_interleaved(some_x, some, norm->centred, norm->eps, mean + first, rstd + first);
#if STREAM
        if (b.n < SHORT_RUN && y.stride == b.n) {
            T run[ROW_BLOCK];
            row_affine(some_x, (nx_rows){run, b.n}, some, &map, norm->gamma, norm->beta, 0);
            stream_run(run, some_y.data, count * b.n);
            continue;
        }
#endif
        WR(row_affine)(some_x, some_y, some, &map, norm->gamma, norm->beta, 0);
    }
}

/* dx of rows whose sums are known, the dots being those of xhat. */
NX_INLINE void WR(layer_dx)(nx_backward of, int centred, const double *mean, const double *rstd,
                            const double *sum, const double *dot)
{
    const ptrdiff_t rows = of.block.rows, n = of.block.n;
    const double each = 1 / (double)n;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const nx_backward row = rows_part(of, r, (nx_block){1, n});
        double g_mean = centred ? sum[r] * each : 0, slope = nx_slope(1, rstd[r], dot[r] * each);
        const int far = is_far(row.dy.data, n, row.gamma, g_mean);
        if (far) {
            const nx_backward far_row = row;
            double far_sum = 0, far_dot = 0;
            dots_about(&far_row, mean[r], &g_mean, (nx_sums){&far_sum, &far_dot, 0});
            g_mean = far_sum * each;
            slope = nx_slope(rstd[r], rstd[r], far_dot * each);
        }
        const double constant = nx_constant(rstd[r], g_mean);
        const nx_line line = {mean + r, &g_mean, rstd + r, &slope, &constant, 0};
        if (far) {
            const nx_backward far_row = row;
            WR(row_dx)(&far_row, &line);
        } else {
            WR(dx_loop)(row, line, 0);
        }
    }
}

/* One loop for each case. */
NX_OUTLINE void WR(layer_dx_any)(const nx_backward *of, int centred, const double *mean,
                                 const double *rstd, const double *sum, const double *dot)
{
    const void *gamma = of->gamma;
#define DX(gamma, addend) \
    WR(layer_dx)(with(*of, gamma, NULL, addend), centred, mean, rstd, sum, dot)
    if (gamma && of->addend.data) DX(gamma, of->addend);
    else if (gamma) DX(gamma, none);
    else if (of->addend.data) DX(NULL, of->addend);
    else DX(NULL, none);
#undef DX
}

static void WR(layer_backward)(const nx_backward *of, int centred, const double *mean,
                               const double *rstd, double *dbeta, double *dgamma)
{
    enum { FOLDED = 32 }; /* rows whose sums down the columns are C: 8 times ROWS_TOGETHER */
    C s[ROW_BLOCK + WIDEST], q[ROW_BLOCK + WIDEST];
    const ptrdiff_t rows = of->block.rows, n = of->block.n;
    if (n <= SHORT_BACKWARD) {
        short_backward(of, centred, mean, rstd, dbeta, dgamma, STREAM);
        return;
    }
    for (ptrdiff_t first = 0, count; first < rows; first += count) {
        double sum[FOLDED] = {0}, dot[FOLDED] = {0};
        const ptrdiff_t left = FOLDED - first % FOLDED;
        count = rows_together(rows - first < left ? rows - first : left, n);
        nx_backward some = rows_part(*of, first, (nx_block){count, n});
        some.ahead = STREAM ? count * some.x.stride : 0; /* dy most often lies alike */
        if (left == FOLDED) {
            memset(s, 0, (n + WIDEST) * sizeof(C));
            memset(q, 0, (n + WIDEST) * sizeof(C));
        }
        layer_dots_any(&some, centred, mean + first, rstd + first, sum, dot, s, q);
#if STREAM
        if (n < SHORT_RUN && of->dx.stride == n) {
            T run[ROW_BLOCK], *to = some.dx.data;
            some.dx.data = run;
            layer_dx_any(&some, centred, mean + first, rstd + first, sum, dot);
            stream_run(run, to, count * n);
        } else
#endif
            WR(layer_dx_any)(&some, centred, mean + first, rstd + first, sum, dot);
        if (count == left || first + count == rows) {
            if (centred) add_to(dbeta, s, n);
            add_to(dgamma, q, n);
        }
    }
}

/* y of some groups whose statistics are there; the maps of some rows at a time are on the stack. */
NX_INLINE void WR(groups_affine)(nx_groups x, nx_groups y, const nx_grouping *g, ptrdiff_t first,
                                 ptrdiff_t count, const double *mean, const double *rstd,
                                 ptrdiff_t ahead, int relu)
{
    enum { MAPS = 64 };
    const ptrdiff_t rows = g->rows, n = g->n;
    const C *gamma = g->gamma, *beta = g->beta;
    double means[MAPS], scales[MAPS], shifts[MAPS];
    const nx_affine map = {means, scales, shifts, 1, ahead};
    ptrdiff_t channel = (g->channel + first * rows) % g->channels;
    for (ptrdiff_t i = 0, r = 0, m = 0; i < count; m = 0) {
        const nx_rows from = {(T *)x.data + i * x.group + r * x.row, x.row};
        const nx_rows to = {(T *)y.data + i * y.group + r * y.row, y.row};
        /* the next group's rows follow, where nothing lies between them */
        const int follow = x.group == rows * x.row && y.group == rows * y.row;
        do {
            means[m] = mean[first + i];
            scales[m] = rstd[first + i] * (gamma ? (double)gamma[channel] : 1);
            shifts[m++] = beta ? (double)beta[channel] : 0;
            if (++channel == g->channels) channel = 0;
            if (++r == rows) i++, r = 0;
        } while (m < MAPS && i < count && (r > 0 || follow));
        WR(row_affine)(from, to, (nx_block){m, n}, &map, NULL, NULL, relu);
    }
}

static void WR(group_forward)(nx_groups x, nx_groups y, const nx_grouping *g, double eps, int relu,
                              double *mean, double *rstd)
{
    const ptrdiff_t numbers = g->rows * g->n;
    if (numbers <= SHORT_GROUP) {
        short_groups_forward(x, y, g, eps, relu, mean, rstd, STREAM);
        return;
    }
    for (ptrdiff_t first = 0, count; first < g->groups; first += count) {
        count = rows_interleaved(g->groups - first, numbers, ROW_BLOCK);
        nx_groups from = x, to = y;
        from.data = (T *)x.data + first * x.group;
        to.data = (T *)y.data + first * y.group;
        statistics_interleaved((nx_rows){from.data, x.group}, (nx_block){count, numbers}, 1, eps,
                               mean + first, rstd + first);
#if STREAM
        if (g->n < SHORT_RUN && y.row == g->n && y.group == numbers) {
            T run[ROW_BLOCK];
            groups_affine(from, (nx_groups){run, numbers, g->n}, g, first, count, mean, rstd,
                          count * x.group, relu);
            stream_run(run, to.data, count * numbers);
            continue;
        }
#endif
        WR(groups_affine)(from, to, g, first, count, mean, rstd, STREAM ? count * x.group : 0,
                          relu);
    }
}

static ptrdiff_t WR(group_backward)(nx_groups x, nx_groups dy, nx_groups dx, const nx_grouping *g,
                                    const double *mean, const double *rstd, double *dbeta,
                                    double *dgamma)
{
    const ptrdiff_t rows = g->rows, n = g->n;
    if (rows * n <= SHORT_GROUP)
        return short_groups_backward(x, dy, dx, g, mean, rstd, dbeta, dgamma, STREAM);
    const C *gamma = g->gamma;
    const nx_block row = {1, n};
    const double each = 1 / ((double)rows * (double)n), zero = 0;
    const int run = STREAM && n < SHORT_RUN && dx.row == n && dx.group == rows * n;
    ptrdiff_t channel = g->channel, i = 0;
#if STREAM
    T numbers[ROW_BLOCK], *to = NULL;
    ptrdiff_t filled = 0;
#endif
    for (; i < g->groups; i++, dbeta += rows, dgamma += rows) {
        nx_backward of = {.x = {(T *)x.data + i * x.group, x.row},
                          .dy = {(T *)dy.data + i * dy.group, dy.row},
                          .dx = {(T *)dx.data + i * dx.group, dx.row},
                          .ahead = STREAM ? x.group : 0}; /* dy lies alike */
        double dy_sum = 0, g_sum = 0, g_dot = 0;
        for (ptrdiff_t r = 0; r < rows; r++) {
            double factor = gamma ? (double)gamma[channel + r] : 1, sum = 0, dot = 0;
            dots_loop(sums_part(of, r, 0, row), mean[i], NULL, (nx_sums){&sum, &dot, 0});
            dbeta[r] = sum;
            dgamma[r] = dot * rstd[i];
            dy_sum += dbeta[r];
            g_sum += factor * dbeta[r];
            g_dot += factor * dgamma[r];
        }
        if (is_far(of.dy.data, n, NULL, dy_sum * each)) break;
        /* g_dot holds one rstd already */
        double slope = nx_slope(1, rstd[i], g_dot * each),
               constant = nx_constant(rstd[i], g_sum * each);
#if STREAM
        if (run && filled + rows * n > ROW_BLOCK) {
            stream_run(numbers, to, filled);
            filled = 0;
        }
        if (run) {
            if (filled == 0) to = of.dx.data;
            of.dx.data = numbers + filled;
            filled += rows * n;
        }
#endif
        for (ptrdiff_t r = 0; r < rows; r++) {
            double factor = gamma ? rstd[i] * (double)gamma[channel + r] : rstd[i];
            const nx_line line = {mean + i, &zero, &factor, &slope, &constant, 0};
            if (run) dx_loop(rows_part(of, r, row), line, 0);
            else WR(dx_loop)(rows_part(of, r, row), line, 0);
        }
        channel += rows;
        if (channel == g->channels) channel = 0;
    }
#if STREAM
    if (run) stream_run(numbers, to, filled);
#endif
    return i;
}

/* f(row, first number in it, rows, first coefficient, numbers) for all rows of columns. Around the
 * caches memory is written in order, and where rows lie together they are one, through which aligned
 * vectors go, and through the coefficients again and again. Otherwise ROWS_WRITTEN rows are written
 * together, for which coefficients are loaded once. */
#define EACH_WRITTEN(b, adjacent, folded, y, f)                                    \
    do {                                                                           \
        ptrdiff_t r_ = 0;                                                          \
        if (STREAM && (adjacent)) {                                                \
            const ptrdiff_t numbers_ = (b).rows * (folded).lanes / (folded).fold;  \
            ptrdiff_t n_ = unaligned((y).data, numbers_), j_ = 0;                  \
            for (ptrdiff_t i_ = 0; i_ < numbers_; i_ += n_) {                      \
                if (i_ > 0 || n_ == 0) n_ = ((folded).lanes - j_ + W - 1) / W * W; \
                if (n_ > numbers_ - i_) n_ = numbers_ - i_;                        \
                f(0, i_, 1, j_, n_);                                               \
                j_ = (j_ + n_) % (folded).lanes;                                   \
            }                                                                      \
        } else {                                                                   \
            if (!STREAM)                                                           \
                for (; r_ + ROWS_WRITTEN <= (folded).rows; r_ += ROWS_WRITTEN)     \
                    f(r_, 0, ROWS_WRITTEN, 0, (folded).lanes);                     \
            for (; r_ < (folded).rows; r_++) f(r_, 0, 1, 0, (folded).lanes);       \
            if ((folded).tail) f(r_, 0, 1, 0, (folded).tail);                      \
        }                                                                          \
    } while (0)

NX_INLINE void WR(col_affine_loop)(nx_rows x_, nx_rows y_, nx_block b, const C *pivot,
                                   const C *scale, const C *shift, int relu)
{
    const T *x = x_.data;
    T *y = y_.data;
#define VECTOR(j, left, whole)                                                        \
    do {                                                                              \
        const V p = load(pivot + j), a = load(scale + j), c = load(shift + j);        \
        for (ptrdiff_t r = 0; r < b.rows; r++) {                                      \
            V d = sub(some(x + r * x_.stride + j, left, whole, ZERO), p);             \
            V v = mul_add(d, a, c);                                                   \
            WR(put)(y + r * y_.stride + j, left, whole, relu ? greater(ZERO, v) : v); \
        }                                                                             \
    } while (0)
    EACH_VECTOR(y, b.n, VECTOR);
#undef VECTOR
}

/* One row, or ROWS_WRITTEN: loops with constants, which the compiler unrolls. */
NX_OUTLINE void WR(col_affine_rows)(nx_rows x, nx_rows y, nx_block b, const C *pivot,
                                    const C *scale, const C *shift, int relu)
{
    const nx_block one = {1, b.n}, some = {ROWS_WRITTEN, b.n};
    if (b.rows == 1 && relu) WR(col_affine_loop)(x, y, one, pivot, scale, shift, 1);
    else if (b.rows == 1) WR(col_affine_loop)(x, y, one, pivot, scale, shift, 0);
    else if (relu) WR(col_affine_loop)(x, y, some, pivot, scale, shift, 1);
    else WR(col_affine_loop)(x, y, some, pivot, scale, shift, 0);
}

/* Columns none of whose maps is at the ends of the range. */
NX_OUTLINE void WR(col_affine_ordinary)(nx_groups x_, nx_groups y_, nx_columns b, nx_affine map,
                                        int relu)
{
    C pivots[PADDED], scales[PADDED], shifts[PADDED];
    const int adjacent = x_.row == b.n && y_.row == b.n;
    EACH_PART(p, b, adjacent, STREAM)
    {
        const double *mean = map.mean + p.at, *scale = map.scale + p.at, *shift = map.shift + p.at;
        for (ptrdiff_t j = 0; j < p.examples * p.width; j++) {
            pivots[j] = (C)mean[j];
            scales[j] = (C)scale[j];
            shifts[j] = pivot_shift(mean[j], scale[j], shift[j]);
        }
        to_lanes(pivots, p);
        to_lanes(scales, p);
        to_lanes(shifts, p);
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const nx_rows x = part_rows(x_, p, e), y = part_rows(y_, p, e);
            const C *pivot = pivots + e * p.stride, *a = scales + e * p.stride,
                    *c = shifts + e * p.stride;
#define AFFINE_ROWS(r, i, rows, j, n)                                                              \
    WR(col_affine_rows)(rows_at(x, r, i), rows_at(y, r, i), (nx_block){rows, n}, pivot + j, a + j, \
                        c + j, relu)
            EACH_WRITTEN(b, adjacent && p.width == b.n, p.folded, y, AFFINE_ROWS);
#undef AFFINE_ROWS
        }
    }
}

static void WR(col_affine)(nx_groups x, nx_groups y, nx_columns b, const nx_affine *map, int relu)
{
    const ptrdiff_t numbers = b.examples * b.n;
    if (ordinary(map->mean, map->scale, numbers) == numbers) {
        WR(col_affine_ordinary)(x, y, b, *map, relu);
        return;
    }
    for (ptrdiff_t at = 0, width; at < numbers; at += width) {
        const ptrdiff_t e = at / b.n, j = at % b.n;
        const nx_affine some = {map->mean + at, map->scale + at, map->shift + at, 0, 0};
        const nx_groups xe = {(T *)x.data + e * x.group + j, 0, x.row},
                        ye = {(T *)y.data + e * y.group + j, 0, y.row};
        width = ordinary(some.mean, some.scale, b.n - j);
        if (width > 0) {
            WR(col_affine_ordinary)(xe, ye, (nx_columns){1, b.rows, width}, some, relu);
            continue;
        }
        width = 1;
        for (ptrdiff_t r = 0; r < b.rows; r++)
            affine_far_out((T *)xe.data + r * x.row, (T *)ye.data + r * y.row, 1, &some, NULL, NULL,
                           relu);
    }
}

NX_INLINE void WR(col_dx_loop)(nx_rows x_, nx_rows dy_, nx_rows dx_, nx_block b,
                               const line_columns *l, ptrdiff_t j0, int relu)
{
    const T *x = x_.data, *dy = dy_.data;
    T *dx = dx_.data;
    const C *x_pivot = l->x_pivot + j0, *minus_pivot = l->minus_pivot + j0,
            *factor = l->factor + j0, *slope = l->slope + j0, *constant = l->constant + j0,
            *mask_scale = l->mask_scale + j0, *mask_shift = l->mask_shift + j0;
#define VECTOR(j, left, whole)                                                              \
    do {                                                                                    \
        const V p = load(x_pivot + j), minus = load(minus_pivot + j), a = load(factor + j), \
                s = load(slope + j), c = load(constant + j);                                \
        relu_mask mask;                                                                     \
        if (relu) mask = (relu_mask){load(mask_scale + j), load(mask_shift + j)};           \
        for (ptrdiff_t r = 0; r < b.rows; r++) {                                            \
            V d = sub(some(x + r * x_.stride + j, left, whole, ZERO), p);                   \
            V g = some(dy + r * dy_.stride + j, left, whole, ZERO);                         \
            g = gradient(g, d, NULL, relu ? &mask : NULL, &minus);                          \
            WR(put)(dx + r * dx_.stride + j, left, whole, mul_add(g, a, mul_add(d, s, c))); \
        }                                                                                   \
    } while (0)
    EACH_VECTOR(dx, b.n, VECTOR);
#undef VECTOR
}

NX_OUTLINE void WR(col_dx_rows)(nx_rows x, nx_rows dy, nx_rows dx, nx_block b,
                                const line_columns *l, ptrdiff_t j, int relu)
{
    const nx_block one = {1, b.n}, some = {ROWS_WRITTEN, b.n};
    if (b.rows == 1 && relu) WR(col_dx_loop)(x, dy, dx, one, l, j, 1);
    else if (b.rows == 1) WR(col_dx_loop)(x, dy, dx, one, l, j, 0);
    else if (relu) WR(col_dx_loop)(x, dy, dx, some, l, j, 1);
    else WR(col_dx_loop)(x, dy, dx, some, l, j, 0);
}

static void WR(col_dx)(const nx_col_backward *of, const nx_line *line)
{
    const nx_columns b = of->block;
    C x_pivot[PADDED], minus_pivot[PADDED], factor[PADDED], slope[PADDED], constant[PADDED],
        mask_scale[PADDED], mask_shift[PADDED];
    const line_columns l = {x_pivot, minus_pivot, factor, slope, constant, mask_scale, mask_shift};
    const int adjacent = of->x.row == b.n && of->dy.row == b.n && of->dx.row == b.n;
    EACH_PART(p, b, adjacent, STREAM)
    {
        for (ptrdiff_t j = 0; j < p.examples * p.width; j++) {
            const double a = line->factor[p.at + j], b = line->slope[p.at + j],
                         mean = line->mean[p.at + j];
            x_pivot[j] = (C)mean;
            minus_pivot[j] = -(C)line->pivot[p.at + j];
            factor[j] = (C)a;
            slope[j] = (C)b;
            constant[j] =
                (C)(line->constant[p.at + j] - a * minus_pivot[j] - b * (mean - x_pivot[j]));
        }
        to_lanes(x_pivot, p);
        to_lanes(minus_pivot, p);
        to_lanes(factor, p);
        to_lanes(slope, p);
        to_lanes(constant, p);
        if (of->relu) masks(of->relu, line->mean, p, mask_scale, mask_shift);
        for (ptrdiff_t e = 0; e < p.examples; e++) {
            const nx_rows x = part_rows(of->x, p, e), dy = part_rows(of->dy, p, e),
                          dx = part_rows(of->dx, p, e);
#define DX_ROWS(r, i, rows, j, n)                                                                \
    WR(col_dx_rows)(rows_at(x, r, i), rows_at(dy, r, i), rows_at(dx, r, i), (nx_block){rows, n}, \
                    &l, e * p.stride + j, of->relu != NULL)
            EACH_WRITTEN(b, adjacent && p.width == b.n, p.folded, dx, DX_ROWS);
#undef DX_ROWS
        }
    }
}

#define NX_WRITER(name, result, arguments) .name = WR(name),
#define NX_KERNEL(name, result, arguments) .name = name,
#ifdef T_INT
#define NX_WIDE NX_KERNEL
#else
#define NX_WIDE(name, result, arguments)
#endif

const nx_kernels TABLE = {
    .itemsize = sizeof(T),
    .parameter_size = sizeof(C),
    .row_block = ROW_BLOCK,
    .col_block = COL_BLOCK,
    .col_rows = COL_ROWS,
    .short_group = SHORT_GROUP,
    .range = RANGE,
#include "kernels_list.h"
};

#undef NX_WRITER
#undef NX_KERNEL
#undef NX_WIDE
#undef WR
#undef TABLE
#undef EACH_VECTOR
#undef EACH_WRITTEN
