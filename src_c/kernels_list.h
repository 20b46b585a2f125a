/* Every kernel once: name, result, arguments. Whoever includes this says what to make of them:
 * members of a table, what fills it, or a test for each (tests/test_kernels.py). NX_WRITER is for
 * those that have a second version, which writes around the caches; NX_WIDE for those that 16-bit
 * floats have none of. */

/* Adds the block's numbers, times scale, to m. */
NX_KERNEL(row_moments, void, (nx_rows x, nx_block b, int centred, double scale, nx_moments *m))
/* A number near the mean of each column, by a sample of the rows; 0 where that is not finite. */
NX_KERNEL(col_pivots, void, (nx_groups x, nx_columns b, double *pivot))
/* Adds the sums of d = x * scale[j] - pivot[j], and of d * d; scale NULL means 1. A pivot is taken
 * as a number of gamma's type, here and below. */
NX_KERNEL(col_powers, void,
          (nx_groups x, nx_columns b, const double *scale, const double *pivot, double *sum,
           double *squares))
/* Whether the sums of any column, of `count` numbers taken with scale 1, are to be taken once more;
 * then with these scales and pivots. */
NX_KERNEL(col_rescale, int,
          (ptrdiff_t n, double count, const double *sum, const double *squares, double *pivot,
           double *scale))
/* As nx_finish_moments, from such sums; scale NULL means 1, and var may be NULL. */
NX_KERNEL(col_statistics, void,
          (ptrdiff_t n, double count, double eps, const double *scale, const double *pivot,
           const double *sum, const double *squares, double *mean, double *rstd, double *var))

/* The factors and shifts of n maps, for so many examples: rstd * gamma and beta; NULL means 1 and
 * 0. Without beta, shift may be NULL. */
NX_KERNEL(affines, void,
          (const void *gamma, const void *beta, ptrdiff_t examples, ptrdiff_t n, const double *rstd,
           double *scale, double *shift))
/* The lines of columns of 1 / `each` numbers with such factors, about the means of dy. */
NX_KERNEL(col_lines, void,
          (ptrdiff_t n, double each, const double *rstd, const double *factor, const double *sum,
           const double *dot, double *mean, double *slope, double *constant))

/* y = gamma * ((x - mean) * scale + shift) + beta; gamma and beta run along the row, NULL means 1
 * and 0. With relu, here and below, 0 where that is less (gamma and beta are NULL then). */
NX_WRITER(row_affine, void,
          (nx_rows x, nx_rows y, nx_block b, const nx_affine *map, const void *gamma,
           const void *beta, int relu))
/* y = (x - mean[j]) * scale[j] + shift[j] */
NX_WRITER(col_affine, void,
          (nx_groups x, nx_groups y, nx_columns b, const nx_affine *map, int relu))

/* Whether gradients gamma * dy with this mean are far from zero (nx_near), by a sample of a row. */
NX_KERNEL(row_is_far, int, (const void *dy, ptrdiff_t n, const void *gamma, double mean))
/* Whether those of any column are, by some of its rows, and pivots for all: the means of those
 * columns, 0 for others. */
NX_KERNEL(cols_are_far, int,
          (nx_groups dy, nx_columns b, const double *sum, double count, double *pivot))

/* Adds the sums of g and of (g - *pivot) * (x - mean); NULL means a pivot of 0. */
NX_KERNEL(row_dots, void, (const nx_backward *of, double mean, const double *pivot, nx_sums sums))
NX_KERNEL(col_dots, void,
          (const nx_col_backward *of, const double *mean, const double *pivot, nx_sums sums))

/* dx, as nx_line says; a relu is given without addend. */
NX_WRITER(row_dx, void, (const nx_backward *of, const nx_line *line))
NX_WRITER(col_dx, void, (const nx_col_backward *of, const nx_line *line))

/* Rows that are each one block with statistics of their own: as row_moments and nx_finish_moments,
 * then row_affine, but without what calling them a row at a time costs. */
NX_WRITER(layer_forward, void,
          (nx_rows x, nx_rows y, nx_block b, const nx_layer *norm, double *mean, double *rstd))
/* Adds a row's sums of g and of g * xhat to sum[r] and dot[r], and those of dy and of dy * xhat over
 * the rows to dbeta[j] and dgamma[j]. xhat is (x - mean[r]) * rstd[r]. Rows that are not centred
 * have no sums, and no dbeta. */
NX_KERNEL(layer_dots, void,
          (const nx_backward *of, int centred, const double *mean, const double *rstd, nx_sums sums,
           double *dbeta, double *dgamma))
/* The same of rows that are each one block, whose sums are not wanted, and their dx. */
NX_WRITER(layer_backward, void,
          (const nx_backward *of, int centred, const double *mean, const double *rstd,
           double *dbeta, double *dgamma))
/* Likewise groups of rows, one block each; with relu, 0 where y is less. Those of more than
 * `short_group` numbers lie one row after the other. */
NX_WRITER(group_forward, void,
          (nx_groups x, nx_groups y, const nx_grouping *g, double eps, int relu, double *mean,
           double *rstd))
/* Groups of rows, one block each, on their way back. The sum of dy over a row goes to *dbeta, that of
 * dy * (x - mean) * rstd to *dgamma, and so on row by row. Stops at a group whose dy is far from
 * zero, and returns how many came before it. */
NX_WRITER(group_backward, ptrdiff_t,
          (nx_groups x, nx_groups dy, nx_groups dx, const nx_grouping *g, const double *mean,
           const double *rstd, double *dbeta, double *dgamma))

/* sum = a + b, which may be one of them */
NX_KERNEL(add_rows, void, (nx_rows a, nx_rows b, nx_rows sum, nx_block block))

/* Numbers as double, and back: rounded to nearest, and once (but bfloat16 as ml_dtypes rounds it,
 * by way of float). */
NX_KERNEL(widen, void, (const void *x, ptrdiff_t n, double *y))
NX_KERNEL(narrow, void, (const double *x, ptrdiff_t n, void *y))

/* Numbers that are double whatever the elements: nx_inverse_stds; whether any that is not 0 is
 * outside a range; a *= b; and momentum * s + share * batch, where s is of float or double. */
NX_KERNEL(inverse_stds, void, (double *variance, ptrdiff_t n, double eps))
NX_KERNEL(any_outside, int, (const double *p, ptrdiff_t n, double least, double largest))
NX_KERNEL(multiply, void, (double *a, const double *b, ptrdiff_t n))
NX_KERNEL(update_running, void,
          (void *s, int single, ptrdiff_t n, double momentum, double share, const double *batch))

/* float and double only: */
/* y[j][i] = x[i][j] for the rows i and columns j of a block */
NX_WIDE(transpose, void, (nx_rows x, nx_block b, nx_rows y))
/* The largest number of each of n windows that begin in row x, and its position in the window; the
 * first of equals, and the first NaN. winner is of uint8_t or int32_t, by winner_size. */
NX_WIDE(pool_row, void,
        (nx_rows x, const nx_window *window, ptrdiff_t n, void *y, void *winner, int winner_size))
NX_WIDE(adam, void, (const nx_adam *step, ptrdiff_t n))
