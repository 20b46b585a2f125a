/* The primitives: what happens to one block of contiguous runs of numbers. No allocation, no threads, no Python.
 *
 * There is one table of them per element type and instruction set. x, dy, y and dx are of the element type; gamma and beta too, or
 * float where that has 16 bits; statistics and coefficients are double. Strides count elements. A block is small enough (nx_kernels.run_block elements,
 * nx_kernels.col_rows rows) that sums in the element type lose nothing that shows; whoever calls splits the work and adds the
 * blocks' sums up in double.
 *
 * The elements go through two shapes of block:
 *
 *   runs      `runs` runs of `n` contiguous numbers, a stride apart, that belong to one statistic
 *             (a row of layer norm; one channel's images in batch norm of N,C,H,W)
 *   columns   `rows` rows of `cols` contiguous numbers, a stride apart, with a statistic for each column
 *             (batch norm of N,D and N,H,W,C)
 *
 * Wherever a mean is taken off x (or a gradient), it is split into a pivot of the element type and a small rest: x - pivot is exact for x near the
 * pivot, so that data far from zero lose nothing.
 */
#ifndef NORMEXT_KERNELS_H
#define NORMEXT_KERNELS_H

#include <float.h>
#include <math.h>
#include <stddef.h>

/* Count, mean and sum of squared deviations from the mean of the numbers seen so far. About zero (RMS norm) the mean is 0, and m2 the sum
 * of squares.
 *
 * They are those of x * scale, where scale is a power of two that keeps the squares in range, one for all numbers that share a statistic:
 * 1, and where that is found to fail (`nx_rescale`) another, with which all of them are gone through once more. */
typedef struct {
    double count, mean, m2;
} nx_moments;

/* The squares of an element type: a variance below `tiny` has lost digits to denormals, and is taken anew of numbers `enlarge` times as
 * large; one that has overflowed, of numbers `shrink` times as large. Any number times one of both has a square in range. */
typedef struct {
    double tiny, enlarge, shrink, near_zero;
} nx_range;

/* Merges the moments of two sets of numbers: T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm
 * for Computing Sample Variances", 1979, equation 2.1. The other set is `share` of the whole, and `count` the first's size. */
static inline void nx_merge_share(double *mean, double *m2, double other_mean, double other_m2, double count, double share)
{
    double delta = other_mean - *mean;
    *mean += delta * share;
    *m2 += other_m2 + delta * delta * (count * share);
}

static inline void nx_merge(nx_moments *m, nx_moments other)
{
    if (other.count == 0) return;
    if (m->count == 0) {
        *m = other;
        return;
    }
    nx_merge_share(&m->mean, &m->m2, other.mean, other.m2, m->count, other.count / (m->count + other.count));
    m->count += other.count;
}

/* The scale that moments taken with scale 1 need. With a mean that is not near zero there is no underflow to mend: a deviation is 0 or an
 * ulp of the mean at least, whose square is a normal number. Enlarged, the square of an ulp could overflow. */
static inline double nx_rescale(const nx_range *range, nx_moments m)
{
    if (!(m.m2 <= DBL_MAX)) return range->shrink;
    return (m.m2 < range->tiny * m.count) & (fabs(m.mean) < range->near_zero) ? range->enlarge : 1;
}

/* Whether any of n columns needs another than 1, and then all their scales. */
static inline int nx_rescale_columns(const nx_range *range, ptrdiff_t n, double count, const double *mean, const double *m2,
                                     double *scale)
{
    double any = 0; /* in the type of the numbers, to become vectors */
    for (ptrdiff_t j = 0; j < n; j++)
        any +=
            (m2[j] <= DBL_MAX ? 0.0 : 1.0) + (m2[j] < range->tiny * count ? 1.0 : 0.0) * (fabs(mean[j]) < range->near_zero ? 1.0 : 0.0);
    if (any == 0) return 0;
    for (ptrdiff_t j = 0; j < n; j++) scale[j] = nx_rescale(range, (nx_moments){count, mean[j], m2[j]});
    return 1;
}

/* 1 / sqrt(variance + eps), and 0 where both are 0: a constant gives beta even without an eps. The variance is that of x * scale. The
 * inverse is a number where the variance itself is none; numbers of float64 that lie so close, less than 6e-309, that there is none for
 * the inverse either count as a constant. */
static inline double nx_inverse_std(double variance, double scale, double eps)
{
    double sum = variance + eps * scale * scale, inverse;
    if (!(sum <= DBL_MAX)) return 1 / sqrt(variance / scale / scale + eps); /* eps is too large to be scaled */
    inverse = scale / sqrt(sum);
    return sum != 0 && inverse <= DBL_MAX ? inverse : 0;
}

/* The same for n variances at once, in place, with scale 1: without a branch in the loop it becomes vectors. */
static inline void nx_inverse_stds(double *variance, ptrdiff_t n, double eps)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        double sum = variance[i] + eps, inverse = 1 / sqrt(sum);
        variance[i] = sum != 0 ? inverse : 0;
    }
}

/* Whether any of n numbers that are not 0 is outside a range. A sum of ones, in the type of the numbers, becomes vectors. */
static inline int nx_any_outside(const double *p, ptrdiff_t n, double least, double largest)
{
    double outside = 0;
    for (ptrdiff_t i = 0; i < n; i++) outside += (p[i] > largest ? 1.0 : 0.0) + (p[i] < least ? 1.0 : 0.0) - (p[i] <= 0 ? 1.0 : 0.0);
    return outside != 0;
}

/* Mean, variance and 1 / sqrt(variance + eps) of x, from the moments of x * scale. */
static inline void nx_finish_moments(nx_moments m, double scale, double eps, double *mean, double *rstd, double *var)
{
    double variance = m.m2 / m.count;
    *mean = m.mean / scale;
    *rstd = nx_inverse_std(variance, scale, eps);
    if (var) *var = variance / scale / scale;
}

/* Whether a sample of gradients says that all are far from zero, beside the distances between them. Sums of dy * (x - mean) then lose
 * digits that cancel in theory, for x - mean adds up to 0: they are taken once more, with this mean subtracted from dy. */
static inline int nx_near(double g, double mean) { return fabs(g - mean) < fabs(mean) / 4; }

/* The affine map y = (x - mean) * scale + shift that a relu follows: one scale and shift for each column, or one of each for a run. A
 * backward pass given it takes dy for 0 where that y, found again from x, is not above zero. */
typedef struct {
    const double *scale, *shift;
} nx_relu;

typedef struct {
    ptrdiff_t itemsize;
    ptrdiff_t parameter_size; /* of gamma and beta's type: float for 16-bit elements, otherwise that of the elements */
    ptrdiff_t run_block; /* most elements in a block of runs, if it holds more than one run or part of one */
    ptrdiff_t col_block; /* most elements in a block of columns that holds more than col_rows rows */
    ptrdiff_t col_rows;  /* rows that a block of any number of columns may hold */
    nx_range range;

    /* Adds the block's numbers, times scale, to m. */
    void (*run_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t runs, ptrdiff_t n, int centred, double scale, nx_moments *m);
    /* Adds each column's numbers, times scale[j] (NULL means 1), to mean[j], m2[j], which hold `count` numbers already. */
    void (*col_moments)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, const double *scale, double count,
                        double *mean, double *m2);

    /* y = gamma * ((x - mean) * scale + shift) + beta; gamma and beta run along the run, NULL means 1 and 0. mean, scale and shift are
     * one each for all runs (step 0), or one each for a run (step 1). */
    void (*run_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t runs, ptrdiff_t n, const double *mean,
                       const double *scale, const double *shift, ptrdiff_t step, const void *gamma, const void *beta, int relu);
    /* y = (x - mean[j]) * scale[j] + shift[j]; with relu, here and above, 0 where that is less (above, gamma and beta are NULL then) */
    void (*col_affine)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t cols,
                       const double *mean, const double *scale, const double *shift, int relu);

    /* Whether gradients gamma * dy with this mean are far from zero, by a sample of a run. */
    int (*run_is_far)(const void *dy, ptrdiff_t n, const void *gamma, double mean);
    /* Whether those of any column are, by some of its rows, and pivots for all: the means of those columns, and 0 for others. */
    int (*cols_are_far)(const void *dy, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols, const double *sum, double count,
                        double *pivot);
    /* With g = gamma * dy: adds the sum of g to *sum and that of (g - *pivot) * (x - mean) to *dot; NULL means 0. A relu may be given
     * instead of gamma. With step 1 the sums of run r go to sum[r] and dot[r]. */
    void (*run_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t runs, ptrdiff_t n, double mean,
                     const double *pivot, const void *gamma, const nx_relu *relu, double *sum, double *dot, ptrdiff_t step);
    /* Adds column j's sum of dy to sum[j] and that of (dy - pivot[j]) * (x - mean[j]) to dot[j]. */
    void (*col_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                     const double *mean, const double *pivot, const nx_relu *relu, double *sum, double *dot);
    /* The same with one mean and scale for each row: adds the sum of dy * (x - mean[i]) * scale[i] over the rows i to dot[j]. */
    void (*row_dots)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, ptrdiff_t rows, ptrdiff_t cols,
                     const double *mean, const double *scale, double *sum, double *dot);

    /* dx = a * g + b * (x - mean) + c + more with g = gamma * dy, from which a pivot near its mean is subtracted first; a relu may be
     * given instead of gamma and more. With step 1, run r has a[r]. */
    void (*run_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                        ptrdiff_t runs, ptrdiff_t n, double mean, double pivot, const double *a, ptrdiff_t step, double b, double c,
                        const void *gamma, const nx_relu *relu, const void *more, ptrdiff_t more_stride);
    /* dx = a[j] * dy + b[j] * (x - mean[j]) + c[j], likewise */
    void (*col_combine)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                        ptrdiff_t rows, ptrdiff_t cols, const double *mean, const double *pivot, const double *a, const double *b,
                        const double *c, const nx_relu *relu);

    /* Rows that are each one block with statistics of its own: as run_moments and nx_finish_moments, then also run_affine, and as run_dots
     * and run_combine, one after the other, but without what calling them a row at a time costs. */
    void (*row_statistics)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t n, int centred, double eps, double *mean,
                           double *rstd);
    void (*normalize_rows)(const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, int centred,
                           double eps, const void *gamma, const void *beta, double *mean, double *rstd);
    void (*rows_backward)(const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                          ptrdiff_t rows, ptrdiff_t n, int centred, const void *gamma, const double *mean, const double *rstd,
                          const void *more, ptrdiff_t more_stride);
    /* Likewise groups of runs, one block each, whose runs have numbers of gamma of their own: run r of the first group has gamma[channel
     * + r], and after `channels` of them the first one follows. The sum of dy over a run goes to *sum, that of dy * (x - mean) * rstd to
     * *dot, and so on run by run. Stops at a group whose dy is far from zero, and returns how many came before it. */
    ptrdiff_t (*groups_backward)(const void *x, ptrdiff_t x_group, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_group,
                                 ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_group, ptrdiff_t dx_stride, ptrdiff_t groups,
                                 ptrdiff_t runs, ptrdiff_t n, const void *gamma, ptrdiff_t channel, ptrdiff_t channels,
                                 const double *mean, const double *rstd, double *sum, double *dot);

    /* sum = a + b, which may be one of them */
    void (*add_runs)(const void *a, ptrdiff_t a_stride, const void *b, ptrdiff_t b_stride, void *sum, ptrdiff_t sum_stride,
                     ptrdiff_t runs, ptrdiff_t n);

    /* float and double only: */
    /* y[j][i] = x[i][j] for i < rows, j < cols */
    void (*transpose)(const void *x, ptrdiff_t x_stride, ptrdiff_t rows, ptrdiff_t cols, void *y, ptrdiff_t y_stride);
    /* The largest number of each of n windows of kh x kw numbers, `step` apart, that begin in row x, and its position in the window;
     * the first of equals, and the first NaN. winner is of uint8_t or int32_t, by winner_size. */
    void (*pool_row)(const void *x, ptrdiff_t x_stride, ptrdiff_t kh, ptrdiff_t kw, ptrdiff_t step, ptrdiff_t n, void *y, void *winner,
                     int winner_size);
    /* A step of Adam: next_m = beta1 * m + (1 - beta1) * dw, next_v = beta2 * v + (1 - beta2) * dw * dw,
     * next_w = w - rate * next_m / (sqrt(next_v) + epsilon) */
    void (*adam)(const void *w, const void *dw, const void *m, const void *v, void *next_w, void *next_m, void *next_v, ptrdiff_t n,
                 double beta1, double beta2, double rate, double epsilon);
} nx_kernels;

enum { NX_FLOAT32, NX_FLOAT64, NX_FLOAT16, NX_BFLOAT16, NX_TYPES };

/* The instruction sets built, in rising order: name, whether this processor and its operating system run it, one table per type, and one
 * that writes around the caches. */
typedef struct {
    const char *name;
    int (*supported)(void);
    const nx_kernels *tables[2][NX_TYPES];
} nx_isa;

extern const nx_isa nx_isas[];
extern const int nx_isa_count;

const char *nx_compiler(void);

#endif
