/* The loops of normext for callers in C and Cython: a table of functions that `normext` hands out in a capsule.
 *
 *     #include "normext.h"                     compiled with normext.get_include() on the include path; nothing to link
 *
 *     const normext_api *api = normext_import();            once, holding the GIL; NULL with a Python exception set
 *     if (!api) return NULL;
 *     int status = api->normalize_rows(NORMEXT_FLOAT32, rows, n, x, n, y, n, gamma, beta, 1, 1e-5, mean, rstd);
 *
 * The functions may be called from any thread, with the GIL or without. They take it for a moment to start and let go of it while they
 * work, on as many threads as `normext.set_num_threads` allows; so do not call them while holding a lock that a thread with the GIL may
 * wait for. They compute the same bits as the Python functions.
 *
 * Elements: x, y, dy and dx are of one type; gamma and beta are of it too, or float where it has 16 bits, and may be NULL (1 and 0).
 * Statistics and gradients of parameters are double. y may be x and dx may be dy; nothing else may overlap. Backward passes of 32 and 16
 * bits want rstd to be 0 or from 1e-10 to 1e10 (the Python functions turn to float64 elsewhere).
 *
 * The functions return NORMEXT_OK or what is wrong; the results are not to be used then. Where x has no elements, only the gradients of
 * parameters are written (zeros).
 */
#ifndef NORMEXT_H
#define NORMEXT_H

#include <Python.h>

#include <stddef.h>

/* Of the table described here. A table with the same number or a larger one has all that is described; what is added, comes at its end. */
#define NORMEXT_API_VERSION 1

enum { NORMEXT_FLOAT32, NORMEXT_FLOAT64, NORMEXT_FLOAT16, NORMEXT_BFLOAT16 };

enum { NORMEXT_OK = 0, NORMEXT_BAD_ARGUMENT = -1, NORMEXT_NO_MEMORY = -2 };

typedef struct {
    int version;

    /* Layer norm (centred = 1) and RMS norm (centred = 0, where mean becomes 0 and beta is NULL) of `rows` rows of `n` contiguous numbers;
     * strides count elements. mean and rstd: `rows` numbers each, for the backward pass.
     *     y = gamma * (x - mean) * rstd + beta,   rstd = 1 / sqrt(variance + eps)
     * dgamma = sum(dy * xhat) and dbeta = sum(dy) over the rows: `n` numbers each, written in both cases. */
    int (*normalize_rows)(int type, ptrdiff_t rows, ptrdiff_t n, const void *x, ptrdiff_t x_stride, void *y, ptrdiff_t y_stride,
                          const void *gamma, const void *beta, int centred, double eps, double *mean, double *rstd);
    int (*rows_backward)(int type, ptrdiff_t rows, ptrdiff_t n, const void *x, ptrdiff_t x_stride, const void *dy, ptrdiff_t dy_stride,
                         void *dx, ptrdiff_t dx_stride, const void *gamma, int centred, const double *mean, const double *rstd,
                         double *dgamma, double *dbeta);

    /* Batch norm of contiguous (outer, channels, inner): N,C,H,W with inner = H * W; N,D and N,H,W,C with inner = 1, down columns. mean,
     * rstd, dgamma and dbeta have `channels` numbers. In training (1) mean, rstd and, unless it is NULL, var (the biased one) are
     * computed; otherwise (0) mean and rstd are given, and constants to the backward pass. */
    int (*normalize_channels)(int type, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *x, void *y, const void *gamma,
                              const void *beta, int training, double eps, double *mean, double *rstd, double *var);
    int (*channels_backward)(int type, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *x, const void *dy, void *dx,
                             const void *gamma, int training, const double *mean, const double *rstd, double *dgamma, double *dbeta);

    /* Group norm of contiguous (outer, groups * per_group channels, inner); instance norm with per_group = 1. mean and rstd have
     * outer * groups numbers, dgamma and dbeta one for each channel. */
    int (*normalize_groups)(int type, ptrdiff_t outer, ptrdiff_t groups, ptrdiff_t per_group, ptrdiff_t inner, const void *x, void *y,
                            const void *gamma, const void *beta, double eps, double *mean, double *rstd);
    int (*groups_backward)(int type, ptrdiff_t outer, ptrdiff_t groups, ptrdiff_t per_group, ptrdiff_t inner, const void *x,
                           const void *dy, void *dx, const void *gamma, const double *mean, const double *rstd, double *dgamma,
                           double *dbeta);
} normext_api;

static inline const normext_api *normext_import(void)
{
    const normext_api *api = (const normext_api *)PyCapsule_Import("normext._core.api.table", 0);
    if (api && api->version < NORMEXT_API_VERSION) {
        PyErr_Format(PyExc_ImportError, "compiled for version %d of normext's table of functions, but the installed normext has %d",
                     NORMEXT_API_VERSION, api->version);
        return NULL;
    }
    return api;
}

#endif
