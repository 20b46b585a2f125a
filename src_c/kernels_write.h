/* What writes elements; included from kernels_template.h twice, with STREAM 0 and 1. Streaming
 * stores go around the caches: memory that is too large to be met there again is not read into them
 * first, only to be written over. They need whole aligned vectors, so that a row begins with what is
 * left to the next of these. x86 orders them before whatever comes after the next locked
 * instruction, which is how threads, and Python's own lock, hand memory on. */

NX_INLINE void WR(put)(T *p, ptrdiff_t left, int whole, V v)
{
    if (!whole) FN(store_n)(p, left, v);
    else if (STREAM) FN(stream)(p, v);
    else FN(store)(p, v);
}

/* f(position, numbers, whether they are a whole vector) */
#define EACH_VECTOR(y, n, f)                             \
    do {                                                 \
        ptrdiff_t i_ = STREAM ? FN(unaligned)(y, n) : 0; \
        if (i_) f(0, i_, 0);                             \
        for (; i_ + W <= (n); i_ += W) f(i_, W, 1);      \
        if (i_ < (n)) f(i_, (n) - i_, 0);                \
    } while (0)

NX_INLINE void WR(affine_vector)(const T *x, T *y, ptrdiff_t left, int whole, V p, V a, V b,
                                 const C *gamma, const C *beta, int relu)
{
    V v = OP(fma)(OP(sub)(FN(some)(x, left, whole, p), p), a, b), c = ZERO, d = ZERO;
    if (gamma) c = FN(coefficients)(gamma, left, whole);
    if (beta) d = FN(coefficients)(beta, left, whole);
    if (gamma && beta) v = OP(fma)(v, c, d);
    else if (gamma) v = OP(mul)(v, c);
    else if (beta) v = OP(add)(v, d);
    WR(put)(y, left, whole, relu ? OP(max)(ZERO, v) : v);
}

/* The same by way of double, for means and scales at the ends of the range of C: rare, and slow. */
NX_OUTLINE void WR(affine_far_out)(const T *x, T *y, ptrdiff_t n, const nx_affine *map,
                                   const C *gamma, const C *beta, int relu)
{
    const double mean = *map->mean, scale = *map->scale, shift = *map->shift;
    const double half =
        fabs(scale) < 1 ? 0.5 : 1; /* of what may overflow before it is scaled down */
    C lanes[W];
    for (ptrdiff_t i = 0; i < n; i += W) {
        ptrdiff_t left = n - i;
        OP(store)(lanes, FN(some)(x + i, left, left >= W, ZERO));
        for (ptrdiff_t k = 0; k < W && k < left; k++) {
            double v = ((double)lanes[k] * half - mean * half) * scale / half + shift;
            if (gamma) v *= (double)gamma[i + k];
            if (beta) v += (double)beta[i + k];
            lanes[k] = (C)(relu && v <= 0 ? 0 : v);
        }
        if (left >= W) FN(store)(y + i, OP(load)(lanes));
        else FN(store_n)(y + i, left, OP(load)(lanes));
    }
}

NX_INLINE void WR(affine_loop)(nx_rows x_, nx_rows y_, nx_block b, nx_affine map, const C *gamma,
                               const C *beta, int relu)
{
    const T *x = x_.data;
    T *y = y_.data;
    V p = ZERO, scale = ZERO, shift = ZERO;
    for (ptrdiff_t r = 0; r < b.rows; r++, x += x_.stride, y += y_.stride) {
        if (FN(far_out)(*map.mean, *map.scale)) {
            WR(affine_far_out)(x, y, b.n, &(nx_affine){map.mean, map.scale, map.shift, 0}, gamma,
                               beta, relu);
        } else {
            if (r == 0 || map.step) {
                p = OP(set)((C)*map.mean);
                scale = OP(set)((C)*map.scale);
                shift = OP(set)(FN(pivot_shift)(*map.mean, *map.scale, *map.shift));
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

static void WR(row_affine)(nx_rows x, nx_rows y, nx_block b, const nx_affine *map,
                           const void *gamma, const void *beta, int relu)
{
    /* One loop each, so that none asks for every vector what there is to do. */
    if (gamma && beta) WR(affine_loop)(x, y, b, *map, gamma, beta, 0);
    else if (gamma) WR(affine_loop)(x, y, b, *map, gamma, NULL, 0);
    else if (beta) WR(affine_loop)(x, y, b, *map, NULL, beta, 0);
    else if (relu) WR(affine_loop)(x, y, b, *map, NULL, NULL, 1);
    else WR(affine_loop)(x, y, b, *map, NULL, NULL, 0);
}

/* nx_line about pivots of C: what their rounding leaves is in the constant. */
typedef struct {
    V x_pivot, minus_pivot, factor, slope, constant;
} WR(line);

/* Unless dy is far from zero, a product with gamma is rounded as it was when the pivot was found: a
 * row of one number gives exactly 0. */
NX_INLINE void WR(dx_vector)(const T *x, const T *dy, T *dx, ptrdiff_t left, int whole,
                             const WR(line) * line, const C *gamma, const FN(relu_mask) * mask,
                             int far, const T *addend)
{
    V d = OP(sub)(FN(some)(x, left, whole, ZERO), line->x_pivot), c = ZERO;
    if (gamma) c = FN(coefficients)(gamma, left, whole);
    V g = FN(some)(dy, left, whole, ZERO);
    if (far) g = FN(gradient)(g, d, gamma ? &c : NULL, mask, &line->minus_pivot);
    else g = OP(add)(FN(gradient)(g, d, gamma ? &c : NULL, mask, NULL), line->minus_pivot);
    V v = OP(fma)(g, line->factor, OP(fma)(d, line->slope, line->constant));
    if (addend) v = OP(add)(v, FN(some)(addend, left, whole, ZERO));
    WR(put)(dx, left, whole, v);
}

NX_INLINE void WR(dx_loop)(nx_rows x_, nx_rows dy_, nx_rows dx_, nx_block b, nx_line line,
                           const C *gamma, const nx_relu_mask *relu, int far, nx_rows addend_)
{
    const T *x = x_.data, *dy = dy_.data, *addend = addend_.data;
    T *dx = dx_.data;
    const double mean = *line.mean, slope = *line.slope, constant = *line.constant;
    const C x_pivot = (C)mean, g_pivot = (C)*line.pivot;
    WR(line) l = {OP(set)(x_pivot), OP(set)(-g_pivot), ZERO, OP(set)((C)slope), ZERO};
    FN(relu_mask) mask;
    if (relu) mask = FN(mask_of)(relu, mean);
    for (ptrdiff_t r = 0; r < b.rows; r++, x += x_.stride, dy += dy_.stride, dx += dx_.stride) {
        if (r == 0 || line.step) {
            double factor = line.factor[r * line.step];
            l.factor = OP(set)((C)factor);
            l.constant = OP(set)((C)(constant + factor * g_pivot - slope * (mean - x_pivot)));
        }
#define VECTOR(i, left, whole)                                                      \
    WR(dx_vector)(x + i, dy + i, dx + i, left, whole, &l, gamma ? gamma + i : NULL, \
                  relu ? &mask : NULL, far, addend ? addend + i : NULL)
        EACH_VECTOR(dx, b.n, VECTOR);
#undef VECTOR
        if (addend) addend += addend_.stride;
    }
}

static void WR(row_dx)(nx_rows x, nx_rows dy, nx_rows dx, nx_block b, const nx_line *line,
                       const void *gamma, const nx_relu_mask *relu, nx_rows addend)
{
    const nx_rows none = {NULL, 0};
    if (gamma && b.n == 1) WR(dx_loop)(x, dy, dx, b, *line, gamma, NULL, 0, addend);
    else if (gamma && addend.data) WR(dx_loop)(x, dy, dx, b, *line, gamma, NULL, 1, addend);
    else if (gamma) WR(dx_loop)(x, dy, dx, b, *line, gamma, NULL, 1, none);
    else if (addend.data) WR(dx_loop)(x, dy, dx, b, *line, NULL, NULL, 1, addend);
    else if (relu) WR(dx_loop)(x, dy, dx, b, *line, NULL, relu, 1, none);
    else WR(dx_loop)(x, dy, dx, b, *line, NULL, NULL, 1, none);
}

NX_INLINE void WR(layer_forward_loop)(nx_rows x, nx_rows y, nx_block b, nx_layer norm, double *mean,
                                      double *rstd)
{
    const double zero = 0;
    for (ptrdiff_t first = 0, count; first < b.rows; first += count) {
        count = FN(rows_interleaved)(b.rows - first, b.n);
        FN(statistics_interleaved)(FN(from)(x, first, 0), (nx_block){count, b.n}, norm.centred,
                                   norm.eps, mean + first, rstd + first);
        for (ptrdiff_t r = first; r < first + count; r++)
            WR(affine_loop)(FN(from)(x, r, 0), FN(from)(y, r, 0), (nx_block){1, b.n},
                            (nx_affine){mean + r, rstd + r, &zero, 0}, norm.gamma, norm.beta, 0);
    }
}

static void WR(layer_forward)(nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean,
                              double *rstd)
{
    const int centred = norm->centred;
    const double eps = norm->eps;
    const void *gamma = norm->gamma, *beta = norm->beta;
#define FORWARD(gamma, beta) \
    WR(layer_forward_loop)(x, y, b, (nx_layer){centred, eps, gamma, beta}, mean, rstd)
    if (gamma && beta) FORWARD(gamma, beta);
    else if (gamma) FORWARD(gamma, NULL);
    else if (beta) FORWARD(NULL, beta);
    else FORWARD(NULL, NULL);
#undef FORWARD
}

NX_INLINE void WR(layer_backward_loop)(nx_rows x, nx_rows dy, nx_rows dx, nx_block b, nx_layer norm,
                                       const double *mean, const double *rstd, nx_rows addend)
{
    double sum[INTERLEAVED], dot[INTERLEAVED], each = 1 / (double)b.n;
    const nx_block row = {1, b.n};
    for (ptrdiff_t count, first = 0; first < b.rows; first += count) {
        count = FN(rows_interleaved)(b.rows - first, b.n);
        for (ptrdiff_t i = 0; i < count; i++)
            FN(dots_of_row)(x, dy, b, first + i, mean[first + i], norm.gamma, sum + i, dot + i);
        for (ptrdiff_t i = 0; i < count; i++) {
            ptrdiff_t r = first + i;
            const nx_rows xr = FN(from)(x, r, 0), dyr = FN(from)(dy, r, 0);
            double g_mean = norm.centred ? sum[i] * each : 0;
            int far = FN(is_far)(dyr.data, b.n, norm.gamma, g_mean);
            if (far) {
                sum[i] = dot[i] = 0;
                FN(dots_about)(xr, dyr, row, mean[r], &g_mean, norm.gamma, NULL,
                               (nx_sums){sum + i, dot + i, 0});
                g_mean = sum[i] * each;
            }
            double slope = nx_slope(rstd[r], rstd[r], dot[i] * each),
                   constant = nx_constant(rstd[r], g_mean);
            nx_line line = {mean + r, &g_mean, rstd + r, &slope, &constant, 0};
            nx_rows addend_row = {NULL, 0};
            if (addend.data) addend_row = FN(from)(addend, r, 0);
            if (far)
                WR(row_dx)(xr, dyr, FN(from)(dx, r, 0), row, &line, norm.gamma, NULL, addend_row);
            else
                WR(dx_loop)(xr, dyr, FN(from)(dx, r, 0), row, line, norm.gamma, NULL, 0,
                            addend_row);
        }
    }
}

static void WR(layer_backward)(nx_rows x, nx_rows dy, nx_rows dx, nx_block b, const nx_layer *norm,
                               const double *mean, const double *rstd, nx_rows addend)
{
    const int centred = norm->centred;
    const void *gamma = norm->gamma;
    const nx_rows none = {NULL, 0};
#define BACKWARD(gamma, addend) \
    WR(layer_backward_loop)(x, dy, dx, b, (nx_layer){centred, 0, gamma, NULL}, mean, rstd, addend)
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
        const nx_rows x_ = {(T *)x.data + i * x.group, x.row},
                      dy_ = {(T *)dy.data + i * dy.group, dy.row},
                      dx_ = {(T *)dx.data + i * dx.group, dx.row};
        double dy_sum = 0, g_sum = 0, g_dot = 0;
        for (ptrdiff_t r = 0; r < rows; r++) {
            double factor = gamma ? (double)gamma[channel + r] : 1, sum, dot;
            FN(dots_of_row)(x_, dy_, row, r, mean[i], NULL, &sum, &dot);
            dbeta[r] = sum;
            dgamma[r] = dot * rstd[i];
            dy_sum += dbeta[r];
            g_sum += factor * dbeta[r];
            g_dot += factor * dgamma[r];
        }
        if (FN(is_far)(dy_.data, n, NULL, dy_sum * each)) return i;
        /* g_dot holds one rstd already */
        double slope = nx_slope(1, rstd[i], g_dot * each),
               constant = nx_constant(rstd[i], g_sum * each);
        for (ptrdiff_t r = 0; r < rows; r++) {
            double factor = gamma ? rstd[i] * (double)gamma[channel + r] : rstd[i];
            WR(dx_loop)(FN(from)(x_, r, 0), FN(from)(dy_, r, 0), FN(from)(dx_, r, 0), row,
                        (nx_line){mean + i, &zero, &factor, &slope, &constant, 0}, NULL, NULL, 0,
                        (nx_rows){NULL, 0});
        }
        channel += rows;
        if (channel == g->channels) channel = 0;
    }
    return g->groups;
}

NX_INLINE void WR(col_affine_row)(const T *x, T *y, ptrdiff_t cols, const C *pivot, const C *scale,
                                  const C *shift, int relu)
{
#define VECTOR(j, left, whole)                                                  \
    do {                                                                        \
        V d = OP(sub)(FN(some)(x + j, left, whole, ZERO), OP(load)(pivot + j)); \
        V v = OP(fma)(d, OP(load)(scale + j), OP(load)(shift + j));             \
        WR(put)(y + j, left, whole, relu ? OP(max)(ZERO, v) : v);               \
    } while (0)
    EACH_VECTOR(y, cols, VECTOR);
#undef VECTOR
}

static void WR(col_affine)(nx_rows x_, nx_rows y_, nx_block b, const nx_affine *map, int relu)
{
    const double *mean = map->mean, *scale = map->scale, *shift = map->shift;
    C pivot[PADDED], strip_scale[PADDED], strip_shift[PADDED];
    for (ptrdiff_t j0 = 0, width; j0 < b.n; j0 += width) {
        width = FN(ordinary)(mean + j0, scale + j0, b.n - j0 < STRIP ? b.n - j0 : STRIP);
        if (width == 0) {
            width = 1;
            nx_affine one = {mean + j0, scale + j0, shift + j0, 0};
            for (ptrdiff_t r = 0; r < b.rows; r++)
                WR(affine_far_out)(FN(from)(x_, r, j0).data, FN(from)(y_, r, j0).data, 1, &one,
                                   NULL, NULL, relu);
            continue;
        }
        nx_fold folded =
            fold_rows(b.rows, width, x_.stride == width && y_.stride == width, UNIT, STRIP);
        const nx_rows x = FN(strip)(x_, j0, folded), y = FN(strip)(y_, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) {
            pivot[j] = (C)mean[j0 + j];
            strip_scale[j] = (C)scale[j0 + j];
            strip_shift[j] = FN(pivot_shift)(mean[j0 + j], scale[j0 + j], shift[j0 + j]);
        }
        FN(spread)(pivot, folded);
        FN(spread)(strip_scale, folded);
        FN(spread)(strip_shift, folded);
#define AFFINE(r, n, relu)                                                                    \
    WR(col_affine_row)(FN(from)(x, r, 0).data, FN(from)(y, r, 0).data, n, pivot, strip_scale, \
                       strip_shift, relu)
#define AFFINE_ROW(r, n) AFFINE(r, n, 0)
#define RELU_ROW(r, n) AFFINE(r, n, 1)
        if (relu) EACH_ROW(folded, RELU_ROW);
        else EACH_ROW(folded, AFFINE_ROW);
#undef AFFINE
#undef AFFINE_ROW
#undef RELU_ROW
    }
}

/* The coefficients of a strip's columns: a line and a relu mask for each. */
typedef struct {
    C x_pivot[PADDED], minus_pivot[PADDED], factor[PADDED], slope[PADDED], constant[PADDED];
    C mask_scale[PADDED], mask_shift[PADDED];
} WR(lines);

NX_INLINE void WR(col_dx_row)(const T *x, const T *dy, T *dx, ptrdiff_t cols,
                              const WR(lines) * NX_RESTRICT lines, int relu)
{
#define VECTOR(j, left, whole)                                                                     \
    do {                                                                                           \
        V d = OP(sub)(FN(some)(x + j, left, whole, ZERO), OP(load)(lines->x_pivot + j));           \
        V minus = OP(load)(lines->minus_pivot + j);                                                \
        FN(relu_mask) mask;                                                                        \
        if (relu)                                                                                  \
            mask =                                                                                 \
                (FN(relu_mask)){OP(load)(lines->mask_scale + j), OP(load)(lines->mask_shift + j)}; \
        V g = FN(gradient)(FN(some)(dy + j, left, whole, ZERO), d, NULL, relu ? &mask : NULL,      \
                           &minus);                                                                \
        V line = OP(fma)(d, OP(load)(lines->slope + j), OP(load)(lines->constant + j));            \
        WR(put)(dx + j, left, whole, OP(fma)(g, OP(load)(lines->factor + j), line));               \
    } while (0)
    EACH_VECTOR(dx, cols, VECTOR);
#undef VECTOR
}

static void WR(col_dx)(nx_rows x_, nx_rows dy_, nx_rows dx_, nx_block b, const nx_line *line,
                       const nx_relu_mask *relu)
{
    WR(lines) lines;
    STRIPS (j0, width) {
        const int adjacent = x_.stride == width && dy_.stride == width && dx_.stride == width;
        nx_fold folded = fold_rows(b.rows, width, adjacent, UNIT, STRIP);
        const nx_rows x = FN(strip)(x_, j0, folded), dy = FN(strip)(dy_, j0, folded),
                      dx = FN(strip)(dx_, j0, folded);
        for (ptrdiff_t j = 0; j < width; j++) {
            const double mean = line->mean[j0 + j], factor = line->factor[j0 + j],
                         slope = line->slope[j0 + j];
            const C x_pivot = (C)mean, minus_pivot = -(C)line->pivot[j0 + j];
            lines.x_pivot[j] = x_pivot;
            lines.minus_pivot[j] = minus_pivot;
            lines.factor[j] = (C)factor;
            lines.slope[j] = (C)slope;
            lines.constant[j] =
                (C)(line->constant[j0 + j] - factor * minus_pivot - slope * (mean - x_pivot));
        }
        FN(spread)(lines.x_pivot, folded);
        FN(spread)(lines.minus_pivot, folded);
        FN(spread)(lines.factor, folded);
        FN(spread)(lines.slope, folded);
        FN(spread)(lines.constant, folded);
        if (relu) FN(masks)(relu, line->mean, j0, folded, lines.mask_scale, lines.mask_shift);
#define DX(r, n, relu)                                                                          \
    WR(col_dx_row)(FN(from)(x, r, 0).data, FN(from)(dy, r, 0).data, FN(from)(dx, r, 0).data, n, \
                   &lines, relu)
#define DX_ROW(r, n) DX(r, n, 0)
#define MASKED_ROW(r, n) DX(r, n, 1)
        if (relu) EACH_ROW(folded, MASKED_ROW);
        else EACH_ROW(folded, DX_ROW);
#undef DX
#undef DX_ROW
#undef MASKED_ROW
    }
}

#define NX_WRITER(name, result, arguments) .name = WR(name),
#define NX_KERNEL(name, result, arguments) .name = FN(name),
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
    .range = T_RANGE,
#include "kernels_list.h"
};

#undef NX_WRITER
#undef NX_KERNEL
#undef NX_WIDE
#undef STREAM
#undef TABLE
#undef WR
#undef EACH_VECTOR
