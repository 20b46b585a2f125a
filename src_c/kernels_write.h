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
                               const double *rstd)
{
    const void *gamma = of->gamma;
    const nx_rows addend = of->addend;
#define BACKWARD(gamma, addend) \
    WR(layer_backward_loop)(with(*of, gamma, NULL, addend), centred, mean, rstd)
    if (gamma && addend.data) BACKWARD(gamma, addend);
    else if (gamma) BACKWARD(gamma, none);
    else if (addend.data) BACKWARD(NULL, addend);
    else BACKWARD(NULL, none);
#undef BACKWARD
}

static ptrdiff_t WR(group_backward)(nx_groups x, nx_groups dy, nx_groups dx, const nx_grouping *g,
                                    const double *mean, const double *rstd, double *dbeta,
                                    double *dgamma)
{
    const ptrdiff_t rows = g->rows, n = g->n;
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
        const nx_affine some = {map->mean + at, map->scale + at, map->shift + at, 0};
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
