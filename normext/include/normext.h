/* The loops of normext for callers in C and Cython: a table of functions in a capsule.
 *
 *     #include "normext.h"     compiled with normext.get_include() on the include path; no linking
 *
 *     const normext_api *api = normext_import();     once, holding the GIL; NULL with an exception
 *     ptrdiff_t shape[] = {rows, n};
 *     nx_norm norm = {.kind = NORMEXT_LAYER_NORM, .type = NORMEXT_FLOAT32, .ndim = 2,
 *                     .shape = shape, .axis = 1, .training = 1, .eps = 1e-5};
 *     nx_io io = {.x = {x}, .y = {y}, .gamma = gamma, .beta = beta, .mean = mean, .rstd = rstd};
 *     int status = api->forward(&norm, &io);
 *
 * A norm is described once, by an nx_norm; one call's arrays are an nx_io. What a call does not use
 * is left zero. The functions may be called from any thread, with the GIL or without: they never
 * take it. They work on as many threads as `normext.set_num_threads` allows, and compute the same
 * bits as the Python functions, which call them too.
 *
 * They return NORMEXT_OK or what is wrong; results are not to be used then. That pointers, shapes
 * and strides are right, and that arrays do not overlap, is the caller's part: y may be x (with a
 * residual, not the sum), and dx may be dy, in the same layout; nothing else may share memory.
 */
#ifndef NORMEXT_H
#define NORMEXT_H

#include <Python.h>

#include <stddef.h>

/* Of the table described here. A table with the same number or a larger one has all that is
 * described; what is added, comes at its end. */
#define NORMEXT_API_VERSION 1

enum { NORMEXT_FLOAT32, NORMEXT_FLOAT64, NORMEXT_FLOAT16, NORMEXT_BFLOAT16 };

enum {
    NORMEXT_BATCH_NORM, /* statistics of each channel, over all other axes */
    NORMEXT_GROUP_NORM, /* of a group of channels of an example; a group a channel: instance norm */
    NORMEXT_LAYER_NORM, /* of each row: `axis` and all axes after it, together */
    NORMEXT_RMS_NORM /* of each row, about zero: the mean is 0, the variance the mean square */
};

/* What is wrong: negative, by name. */
enum {
    NORMEXT_OK = 0,
    NORMEXT_BAD_ARGUMENT = -1, /* a pointer is NULL that must not be, or something does not fit */
    NORMEXT_NO_MEMORY = -2,
    NORMEXT_BAD_KIND = -3,
    NORMEXT_BAD_TYPE = -4,
    NORMEXT_BAD_SHAPE = -5, /* too many axes or numbers, or a negative length */
    NORMEXT_BAD_AXIS = -6, /* it is not one of the axes; of group norm, also 0 */
    NORMEXT_BAD_GROUPS = -7, /* they do not divide the channels */
    NORMEXT_BAD_EPS = -8, /* negative, or more than 1e300 */
    NORMEXT_NO_CHANNELS = -9,
    NORMEXT_NO_NUMBERS = -10 /* nothing to take a mean of */
};

enum { NORMEXT_MAX_NDIM = 64 }; /* NumPy's, since 2.0 */

/* A normalization: all that does not depend on the data. */
typedef struct {
    int kind, type; /* of x, y, residual, sum, dy, dx and dsum */
    int ndim;
    const ptrdiff_t *shape; /* of these arrays */
    int axis; /* of the channels; of layer and RMS norm, the first that is normalized. From 0 on */
    ptrdiff_t groups; /* of group norm: they divide the channels */
    int training; /* 1: the statistics are those of x; 0 (batch norm only): they are given */
    int relu; /* batch norm: y = max(0, y) */
    double eps; /* added to the variance */
} nx_norm;

/* An array in the shape of x, at any address. */
typedef struct {
    void *data;
    const ptrdiff_t *strides; /* of each axis, in bytes, of any sign; NULL where it is contiguous */
    int swapped; /* whether the bytes of a number are in the other order */
} nx_array;

/* Running statistics of batch norm, a number for each channel, contiguous: in training
 *     running = momentum * running + (1 - momentum) * batch,
 * and without training they give mean and rstd. Each may be NULL: it is not updated, or, of both,
 * the nx_io's mean and rstd are given. */
typedef struct {
    void *mean, *var;
    int single_mean, single_var; /* of float, and not double */
    double momentum;
    int unbiased; /* var learns n / (n - 1) times the variance that x is normalized with; n > 1 */
} nx_running;

/* The parts of batch norm's backward pass, for channels whose numbers lie in several processes. */
enum {
    NORMEXT_WHOLE,
    NORMEXT_SUMS, /* only sum(dy) into dbeta and sum(dy * (x - mean)) into dgamma */
    NORMEXT_APPLY /* only dx, from such sums over `count` numbers of each channel */
};

/* One call's arrays. gamma and beta, of x's type, or of float where it has 16 bits, are contiguous;
 * NULL means 1 and 0. Statistics and gradients of parameters are double. */
typedef struct {
    nx_array x, y; /* forward; y.data may be NULL: the statistics alone */
    nx_array residual, sum; /* layer and RMS norm: what is normalized is sum = x + residual */
    nx_array dy, dx; /* backward, with the x (or sum) and the statistics of forward */
    nx_array dsum; /* of layer and RMS norm: what came back to sum from elsewhere, is added to dx */
    const void *gamma, *beta;
    double *mean, *rstd; /* of a channel, row, or group of an example; 1 / sqrt(variance + eps) */
    double *var; /* batch norm in training: the biased variance of x, where not NULL */
    nx_running running;
    double *dgamma, *dbeta; /* sum(dy * xhat) and sum(dy), in the shape of gamma; never NULL */
    int part;
    double count;
} nx_io;

typedef struct {
    int version;

    /* Layer norm (centred = 1) and RMS norm (centred = 0, where beta is NULL) of `rows` rows of `n`
     * contiguous numbers; strides count elements. */
    int (*normalize_rows)(int type, ptrdiff_t rows, ptrdiff_t n, const void *x, ptrdiff_t x_stride,
                          void *y, ptrdiff_t y_stride, const void *gamma, const void *beta,
                          int centred, double eps, double *mean, double *rstd);
    int (*rows_backward)(int type, ptrdiff_t rows, ptrdiff_t n, const void *x, ptrdiff_t x_stride,
                         const void *dy, ptrdiff_t dy_stride, void *dx, ptrdiff_t dx_stride,
                         const void *gamma, int centred, const double *mean, const double *rstd,
                         double *dgamma, double *dbeta);

    /* Batch norm of contiguous (outer, channels, inner): N,C,H,W with inner = H * W; N,D and
     * N,H,W,C with inner = 1. In training mean, rstd and, unless it is NULL, var are computed;
     * otherwise mean and rstd are given. */
    int (*normalize_channels)(int type, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner,
                              const void *x, void *y, const void *gamma, const void *beta,
                              int training, double eps, double *mean, double *rstd, double *var);
    int (*channels_backward)(int type, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner,
                             const void *x, const void *dy, void *dx, const void *gamma,
                             int training, const double *mean, const double *rstd, double *dgamma,
                             double *dbeta);

    /* Group norm of contiguous (outer, groups * per_group channels, inner). */
    int (*normalize_groups)(int type, ptrdiff_t outer, ptrdiff_t groups, ptrdiff_t per_group,
                            ptrdiff_t inner, const void *x, void *y, const void *gamma,
                            const void *beta, double eps, double *mean, double *rstd);
    int (*groups_backward)(int type, ptrdiff_t outer, ptrdiff_t groups, ptrdiff_t per_group,
                           ptrdiff_t inner, const void *x, const void *dy, void *dx,
                           const void *gamma, const double *mean, const double *rstd,
                           double *dgamma, double *dbeta);

    /* Any norm of any array. The functions above are these, for the layouts that they name. */
    int (*check)(const nx_norm *norm); /* what is wrong with it */
    int (*forward)(const nx_norm *norm, const nx_io *io);
    int (*backward)(const nx_norm *norm, const nx_io *io);
} normext_api;

static inline const normext_api *normext_import(void)
{
    const normext_api *api = (const normext_api *)PyCapsule_Import("normext._core.api.table", 0);
    if (api && api->version < NORMEXT_API_VERSION) {
        PyErr_Format(PyExc_ImportError,
                     "compiled for version %d of normext's table of functions, but the installed "
                     "normext has %d",
                     NORMEXT_API_VERSION, api->version);
        return NULL;
    }
    return api;
}

#endif
