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

NX_INLINE void WR(affine_vector)(const T *x, T *y, ptrdiff_t left, int whole, V p, V a, V b,
                                 const C *gamma, const C *beta, int relu)
{
    V v = mul_add(sub(some(x, left, whole, p), p), a, b), c = ZERO, d = ZERO;
    if (gamma) c = coefficients(gamma, left, whole);
    if (beta) d = coefficients(beta, left, whole);
    if (gamma && beta) v = mul_add(v, c, d);
    else if (gamma) v = mul(v, c);
    else if (beta) v = add(v, d);
    WR(put)(y, left, whole, relu ? greater(ZERO, v) : v);
}

NX_INLINE void WR(affine_loop)(nx_rows x_, nx_rows y_, nx_block b, nx_affine map, const C *gamma,
                               const C *beta, int relu)
{
    const T *x = x_.data;
    T *y = y_.data;
    V p = ZERO, scale = ZERO, shift = ZERO;
    for (ptrdiff_t r = 0; r < b.rows; r++, x += x_.stride, y += y_.stride) {
        if (far_out(*map.mean, *map.scale)) {
            affine_far_out(x, y, b.n, &(nx_affine){map.mean, map.scale, map.shift, 0}, gamma, beta,
                           relu);
        } else {
            if (r == 0 || map.step) {
                p = splat((C)*map.mean);
                scale = splat((C)*map.scale);
                shift = splat(pivot_shift(*map.mean, *map.scale, *map.shift));
            }
#define VECTOR(i, left, whole)                                                              \
    WR(affine_vector)(x + i, y + i, left, whole, p, scale, shift, gamma ? gamma + i : NULL, \
                      beta ? beta + i : NULL, relu)
            EACH_VECTOR(y, b.n, VECTOR);
#undef VECTOR
        }
        map.mean += map.step, map.scale += map.step, map.shift += map.step;
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
        const nx_rows some_x = rows_at(x, first, 0);
        const nx_block some = {count, b.n};
        const nx_affine map = {mean + first, rstd + first, zeros, 1};
        statistics_interleaved(some_x, some, norm->centred, norm->eps, mean + first, rstd + first);
        WR(row_affine)(some_x, rows_at(y, first, 0), some, &map, norm->gamma, norm->beta, 0);
    }
}

NX_INLINE void WR(layer_backward_loop)(nx_backward of, int centred, const double *mean,
                                       const double *rstd)
{
    double sums[INTERLEAVED], dots[INTERLEAVED], each = 1 / (double)of.block.n;
    const ptrdiff_t rows = of.block.rows, n = of.block.n;
    for (ptrdiff_t count, first = 0; first < rows; first += count) {
        count = rows_interleaved(rows - first, n, ROW_BLOCK * 2 / 3);
        const nx_backward some = sums_part(of, first, 0, (nx_block){count, n});
        dots_interleaved(&some, mean + first, sums, dots);
        for (ptrdiff_t i = 0; i < count; i++) {
            const ptrdiff_t r = first + i;
            const nx_backward row = rows_part(of, r, (nx_block){1, n});
            double sum = sums[i], dot = dots[i], g_mean = centred ? sum * each : 0;
            const int far = is_far(row.dy.data, n, row.gamma, g_mean);
            if (far) {
                const nx_backward far_row = row;
                sum = dot = 0;
                dots_about(&far_row, mean[r], &g_mean, (nx_sums){&sum, &dot, 0});
                g_mean = sum * each;
            }
            const double slope = nx_slope(rstd[r], rstd[r], dot * each);
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
}

static void WR(layer_backward)(const nx_backward *of, int centred, const double *mean,
                               const double *rstd, double *dbeta, double *dgamma)
{
    enum { TWICE = 32 }; /* rows whose x and dy are met again in a second-level cache */
    const nx_block b = of->block;
    if (b.n <= SHORT_BACKWARD) {
        short_backward(of, centred, mean, rstd, dbeta, dgamma, STREAM);
        return;
    }
    for (ptrdiff_t first = 0; first < b.rows; first += TWICE) {
        const ptrdiff_t rows = b.rows - first < TWICE ? b.rows - first : TWICE;
        const nx_backward part = rows_part(*of, first, (nx_block){rows, b.n});
        const void *gamma = part.gamma;
        const nx_rows addend = part.addend;
        layer_parameters(&part, mean + first, rstd + first, dbeta, dgamma);
#define BACKWARD(gamma, addend) \
    WR(layer_backward_loop)(with(part, gamma, NULL, addend), centred, mean + first, rstd + first)
        if (gamma && addend.data) BACKWARD(gamma, addend);
        else if (gamma) BACKWARD(gamma, none);
        else if (addend.data) BACKWARD(NULL, addend);
        else BACKWARD(NULL, none);
#undef BACKWARD
    }
}

static void WR(group_forward)(nx_groups x, nx_groups y, const nx_grouping *g, double eps, int relu,
                              double *mean, double *rstd)
{ short_groups_forward(x, y, g, eps, relu, mean, rstd, STREAM); }

static ptrdiff_t WR(group_backward)(nx_groups x, nx_groups dy, nx_groups dx, const nx_grouping *g,
                                    const double *mean, const double *rstd, double *dbeta,
                                    double *dgamma)
{
    const ptrdiff_t rows = g->rows, n = g->n;
    if (rows * n <= SHORT)
        return short_groups_backward(x, dy, dx, g, mean, rstd, dbeta, dgamma, STREAM);
    const C *gamma = g->gamma;
    const nx_block row = {1, n};
    const double each = 1 / ((double)rows * (double)n), zero = 0;
    ptrdiff_t channel = g->channel;
    for (ptrdiff_t i = 0; i < g->groups; i++, dbeta += rows, dgamma += rows) {
        const nx_backward of = {.x = {(T *)x.data + i * x.group, x.row},
                                .dy = {(T *)dy.data + i * dy.group, dy.row},
                                .dx = {(T *)dx.data + i * dx.group, dx.row}};
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
        if (is_far(of.dy.data, n, NULL, dy_sum * each)) return i;
        /* g_dot holds one rstd already */
        double slope = nx_slope(1, rstd[i], g_dot * each),
               constant = nx_constant(rstd[i], g_sum * each);
        for (ptrdiff_t r = 0; r < rows; r++) {
            double factor = gamma ? rstd[i] * (double)gamma[channel + r] : rstd[i];
            WR(dx_loop)(rows_part(of, r, row),
                        (nx_line){mean + i, &zero, &factor, &slope, &constant, 0}, 0);
        }
        channel += rows;
        if (channel == g->channels) channel = 0;
    }
    return g->groups;
}

NX_INLINE void WR(col_affine_row)(const T *x, T *y, ptrdiff_t cols, const C *pivot, const C *scale,
                                  const C *shift, int relu)
{
#define VECTOR(j, left, whole)                                      \
    do {                                                            \
        V d = sub(some(x + j, left, whole, ZERO), load(pivot + j)); \
        V v = mul_add(d, load(scale + j), load(shift + j));         \
        WR(put)(y + j, left, whole, relu ? greater(ZERO, v) : v);   \
    } while (0)
    EACH_VECTOR(y, cols, VECTOR);
#undef VECTOR
}

static void WR(col_affine)(nx_rows x_, nx_rows y_, nx_block b, const nx_affine *map, int relu)
{
    const double *mean = map->mean, *scale = map->scale, *shift = map->shift;
    C pivots[PADDED], scales[PADDED], shifts[PADDED];
    for (ptrdiff_t j0 = 0, width; j0 < b.n; j0 += width) {
        width = ordinary(mean + j0, scale + j0, b.n - j0 < COLS_AT_ONCE ? b.n - j0 : COLS_AT_ONCE);
        if (width == 0) {
            const nx_affine far = {mean + j0, scale + j0, shift + j0, 0};
            width = 1;
            for (ptrdiff_t r = 0; r < b.rows; r++)
                affine_far_out(rows_at(x_, r, j0).data, rows_at(y_, r, j0).data, 1, &far, NULL,
                               NULL, relu);
            continue;
        }
        const int adjacent = x_.stride == width && y_.stride == width;
        const nx_fold folded = fold_rows((nx_block){b.rows, width}, adjacent);
        const nx_rows x = columns_at(x_, j0, folded), y = columns_at(y_, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) {
            pivots[j] = (C)mean[j0 + j];
            scales[j] = (C)scale[j0 + j];
            shifts[j] = pivot_shift(mean[j0 + j], scale[j0 + j], shift[j0 + j]);
        }
        spread(pivots, folded);
        spread(scales, folded);
        spread(shifts, folded);
#define AFFINE(r, n, relu)                                                                      \
    WR(col_affine_row)(rows_at(x, r, 0).data, rows_at(y, r, 0).data, n, pivots, scales, shifts, \
                       relu)
#define AFFINE_ROW(r, n) AFFINE(r, n, 0)
#define RELU_ROW(r, n) AFFINE(r, n, 1)
        if (relu) EACH_ROW(folded, RELU_ROW);
        else EACH_ROW(folded, AFFINE_ROW);
#undef AFFINE
#undef AFFINE_ROW
#undef RELU_ROW
    }
}

NX_INLINE void WR(col_dx_row)(const T *x, const T *dy, T *dx, ptrdiff_t cols, line_columns l,
                              int relu)
{
#define VECTOR(j, left, whole)                                                                 \
    do {                                                                                       \
        V d = sub(some(x + j, left, whole, ZERO), load(l.x_pivot + j));                        \
        V minus = load(l.minus_pivot + j);                                                     \
        relu_mask mask;                                                                        \
        if (relu) mask = (relu_mask){load(l.mask_scale + j), load(l.mask_shift + j)};          \
        V g = gradient(some(dy + j, left, whole, ZERO), d, NULL, relu ? &mask : NULL, &minus); \
        V rest = mul_add(d, load(l.slope + j), load(l.constant + j));                          \
        WR(put)(dx + j, left, whole, mul_add(g, load(l.factor + j), rest));                    \
    } while (0)
    EACH_VECTOR(dx, cols, VECTOR);
#undef VECTOR
}

static void WR(col_dx)(const nx_backward *of, const nx_line *line)
{
    const nx_block b = of->block;
    C x_pivot[PADDED], minus_pivot[PADDED], factor[PADDED], slope[PADDED], constant[PADDED],
        mask_scale[PADDED], mask_shift[PADDED];
    EACH_COLUMNS(j0, width)
    {
        const int adjacent =
            of->x.stride == width && of->dy.stride == width && of->dx.stride == width;
        const nx_fold folded = fold_rows((nx_block){b.rows, width}, adjacent);
        const nx_rows x = columns_at(of->x, j0, folded), dy = columns_at(of->dy, j0, folded),
                      dx = columns_at(of->dx, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) {
            const double a = line->factor[j0 + j], b = line->slope[j0 + j],
                         mean = line->mean[j0 + j];
            x_pivot[j] = (C)mean;
            minus_pivot[j] = -(C)line->pivot[j0 + j];
            factor[j] = (C)a;
            slope[j] = (C)b;
            constant[j] =
                (C)(line->constant[j0 + j] - a * minus_pivot[j] - b * (mean - x_pivot[j]));
        }
        spread(x_pivot, folded);
        spread(minus_pivot, folded);
        spread(factor, folded);
        spread(slope, folded);
        spread(constant, folded);
        if (of->relu) masks(of->relu, line->mean, j0, folded, mask_scale, mask_shift);
        const line_columns l = {x_pivot,  minus_pivot, factor,    slope,
                                constant, mask_scale,  mask_shift};
#define DX(r, n, relu)                                                                          \
    WR(col_dx_row)(rows_at(x, r, 0).data, rows_at(dy, r, 0).data, rows_at(dx, r, 0).data, n, l, \
                   relu)
#define DX_ROW(r, n) DX(r, n, 0)
#define MASKED_ROW(r, n) DX(r, n, 1)
        if (of->relu) EACH_ROW(folded, MASKED_ROW);
        else EACH_ROW(folded, DX_ROW);
#undef DX
#undef DX_ROW
#undef MASKED_ROW
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
    .short_group = SHORT,
    .range = RANGE,
#include "kernels_list.h"
};

#undef NX_WRITER
#undef NX_KERNEL
#undef NX_WIDE
#undef WR
#undef TABLE
#undef EACH_VECTOR
