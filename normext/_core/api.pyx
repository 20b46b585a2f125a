# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The door as C callers see it: the table of functions of include/normext.h, in a capsule."""

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memset

from normext cimport (
    NORMEXT_API_VERSION, NORMEXT_APPLY, NORMEXT_BAD_ARGUMENT, NORMEXT_BATCH_NORM,
    NORMEXT_FLOAT32, NORMEXT_FLOAT64, NORMEXT_GROUP_NORM, NORMEXT_LAYER_NORM, NORMEXT_NO_MEMORY,
    NORMEXT_OK, NORMEXT_RMS_NORM, NORMEXT_SUMS, NORMEXT_WHOLE, normext_api, nx_array, nx_io,
    nx_norm,
)
from normext._core cimport norms
from normext._core.sizes cimport is_row_norm, numbers_of


cdef bint are_bad_forward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    """Whether a pointer is missing, or one is there that the norm has no use for."""
    cdef Py_ssize_t numbers = numbers_of(norm, 0, norm.ndim)
    if numbers and (io.x.data == NULL or io.mean == NULL or io.rstd == NULL):
        return True
    if norm.kind != NORMEXT_BATCH_NORM:
        if numbers and io.y.data == NULL:
            return True
        return io.residual.data != NULL and (io.sum.data == NULL or not is_row_norm(norm))
    if io.residual.data != NULL:
        return True
    if norm.training:
        return io.running.unbiased and io.running.var != NULL and numbers == norm.shape[norm.axis]
    if io.running.mean == NULL:
        return io.running.var != NULL
    return io.running.var == NULL or io.mean == NULL or io.rstd == NULL


cdef bint are_bad_backward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    if io.dgamma == NULL or io.dbeta == NULL:
        return True
    if numbers_of(norm, 0, norm.ndim) and (
            io.x.data == NULL or io.dy.data == NULL or io.mean == NULL or io.rstd == NULL
            or (io.dx.data == NULL and io.part != NORMEXT_SUMS)):
        return True
    if io.dsum.data != NULL and not is_row_norm(norm):
        return True
    if io.part == NORMEXT_APPLY and not io.count > 0:
        return True
    return io.part != NORMEXT_WHOLE and (
        norm.kind != NORMEXT_BATCH_NORM or not NORMEXT_WHOLE <= io.part <= NORMEXT_APPLY
    )


cdef int checked_forward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef int status = norms.check(norm)
    if status == NORMEXT_OK and are_bad_forward(norm, io):
        status = NORMEXT_BAD_ARGUMENT
    return norms.forward(norm, io) if status == NORMEXT_OK else status


cdef int checked_backward(const nx_norm *norm, const nx_io *io) noexcept nogil:
    cdef int status = norms.check(norm)
    if status == NORMEXT_OK and are_bad_backward(norm, io):
        status = NORMEXT_BAD_ARGUMENT
    return norms.backward(norm, io) if status == NORMEXT_OK else status


# The functions of the first table, for the layouts that they name. All that is wrong has one name.


cdef inline int plainly(int status) noexcept nogil:
    return status if status == NORMEXT_OK or status == NORMEXT_NO_MEMORY else NORMEXT_BAD_ARGUMENT


cdef inline nx_array array_of(const void *data, const Py_ssize_t *strides) noexcept nogil:
    return nx_array(<void *> data, strides, False)


cdef inline nx_io io_of(const void *x, const void *gamma, const double *mean,
                        const double *rstd) noexcept nogil:
    cdef nx_io io
    memset(&io, 0, sizeof(nx_io))
    io.x, io.gamma = array_of(x, NULL), gamma
    io.mean, io.rstd = <double *> mean, <double *> rstd
    return io


cdef inline Py_ssize_t size_of(int type) noexcept nogil:
    return 4 if type == NORMEXT_FLOAT32 else 8 if type == NORMEXT_FLOAT64 else 2


cdef int normalize_rows(
        int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride, void *y,
        Py_ssize_t y_stride, const void *gamma, const void *beta, int centred, double eps,
        double *mean, double *rstd) noexcept nogil:
    cdef Py_ssize_t size = size_of(type)
    cdef Py_ssize_t[2] shape = [rows, n]
    cdef Py_ssize_t[2] x_strides = [x_stride * size, size]
    cdef Py_ssize_t[2] y_strides = [y_stride * size, size]
    cdef nx_norm norm = nx_norm(NORMEXT_LAYER_NORM if centred else NORMEXT_RMS_NORM, type, 2,
                                &shape[0], 1, 1, True, False, eps)
    cdef nx_io io = io_of(NULL, gamma, mean, rstd)
    io.x, io.y, io.beta = array_of(x, x_strides), array_of(y, y_strides), beta
    return NORMEXT_OK if rows >= 0 and n == 0 else plainly(checked_forward(&norm, &io))


cdef int rows_backward(
        int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride,
        const void *dy, Py_ssize_t dy_stride, void *dx, Py_ssize_t dx_stride, const void *gamma,
        int centred, const double *mean, const double *rstd, double *dgamma,
        double *dbeta) noexcept nogil:
    cdef Py_ssize_t size = size_of(type)
    cdef Py_ssize_t[2] shape = [rows, n]
    cdef Py_ssize_t[2] x_strides = [x_stride * size, size]
    cdef Py_ssize_t[2] dy_strides = [dy_stride * size, size]
    cdef Py_ssize_t[2] dx_strides = [dx_stride * size, size]
    cdef nx_norm norm = nx_norm(NORMEXT_LAYER_NORM if centred else NORMEXT_RMS_NORM, type, 2,
                                &shape[0], 1, 1, True, False, 0)
    cdef nx_io io = io_of(NULL, gamma, mean, rstd)
    io.x, io.dy, io.dx = array_of(x, x_strides), array_of(dy, dy_strides), array_of(dx, dx_strides)
    io.dgamma, io.dbeta = dgamma, dbeta
    return NORMEXT_OK if rows >= 0 and n == 0 else plainly(checked_backward(&norm, &io))


cdef int normalize_channels(
        int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x, void *y,
        const void *gamma, const void *beta, int training, double eps, double *mean, double *rstd,
        double *var) noexcept nogil:
    cdef Py_ssize_t[3] shape = [outer, channels, inner]
    cdef nx_norm norm = nx_norm(NORMEXT_BATCH_NORM, type, 3, &shape[0], 1, 1, training != 0, False,
                                eps)
    cdef nx_io io = io_of(x, gamma, mean, rstd)
    io.y, io.beta, io.var = array_of(y, NULL), beta, var
    if outer >= 0 and channels >= 0 and inner >= 0 and outer * channels * inner == 0:
        return NORMEXT_OK
    return NORMEXT_BAD_ARGUMENT if y == NULL else plainly(checked_forward(&norm, &io))


cdef int channels_backward(
        int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x,
        const void *dy, void *dx, const void *gamma, int training, const double *mean,
        const double *rstd, double *dgamma, double *dbeta) noexcept nogil:
    cdef Py_ssize_t[3] shape = [outer, channels, inner]
    cdef nx_norm norm = nx_norm(NORMEXT_BATCH_NORM, type, 3, &shape[0], 1, 1, training != 0, False,
                                0)
    cdef nx_io io = io_of(x, gamma, mean, rstd)
    io.dy, io.dx, io.dgamma, io.dbeta = array_of(dy, NULL), array_of(dx, NULL), dgamma, dbeta
    if outer >= 0 and inner >= 0 and outer * inner == 0:
        norm.training = False  # nothing to take a mean of, and nothing to do
    return NORMEXT_OK if outer >= 0 and channels == 0 else plainly(checked_backward(&norm, &io))


cdef int normalize_groups(
        int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner,
        const void *x, void *y, const void *gamma, const void *beta, double eps, double *mean,
        double *rstd) noexcept nogil:
    cdef Py_ssize_t[3] shape = [outer, groups * per_group, inner]
    cdef nx_norm norm = nx_norm(NORMEXT_GROUP_NORM, type, 3, &shape[0], 1, groups, True, False, eps)
    cdef nx_io io = io_of(x, gamma, mean, rstd)
    io.y, io.beta = array_of(y, NULL), beta
    if outer >= 0 and groups >= 0 and per_group >= 0 and outer * groups * per_group * inner == 0:
        return NORMEXT_OK
    return plainly(checked_forward(&norm, &io))


cdef int groups_backward(
        int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner,
        const void *x, const void *dy, void *dx, const void *gamma, const double *mean,
        const double *rstd, double *dgamma, double *dbeta) noexcept nogil:
    cdef Py_ssize_t[3] shape = [outer, groups * per_group, inner]
    cdef nx_norm norm = nx_norm(NORMEXT_GROUP_NORM, type, 3, &shape[0], 1, groups, True, False, 0)
    cdef nx_io io = io_of(x, gamma, mean, rstd)
    io.dy, io.dx, io.dgamma, io.dbeta = array_of(dy, NULL), array_of(dx, NULL), dgamma, dbeta
    if outer >= 0 and inner == 0:
        shape[0] = 0  # the gradients of parameters alone
    return NORMEXT_OK if groups * per_group == 0 else plainly(checked_backward(&norm, &io))


cdef normext_api functions = normext_api(
    NORMEXT_API_VERSION,
    normalize_rows,
    rows_backward,
    normalize_channels,
    channels_backward,
    normalize_groups,
    groups_backward,
    norms.check,
    checked_forward,
    checked_backward,
)

table = PyCapsule_New(&functions, "normext._core.api.table", NULL)
