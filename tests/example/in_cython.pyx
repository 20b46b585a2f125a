# cython: boundscheck=False, wraparound=False
"""Every function of normext's table, called on memoryviews without the GIL."""

import numpy as np

from normext cimport NORMEXT_FLOAT32, NORMEXT_FLOAT64, NORMEXT_NO_MEMORY, NORMEXT_OK, normext_api, normext_import

ctypedef fused real:
    float
    double

cdef const normext_api *api = normext_import()

version = api.version


cdef int check(int status) except -1:
    if status == NORMEXT_NO_MEMORY:
        raise MemoryError
    if status != NORMEXT_OK:
        raise ValueError(f"normext returned {status}")
    return 0


cdef inline int type_of(real x) noexcept nogil:
    return NORMEXT_FLOAT32 if real is float else NORMEXT_FLOAT64


cdef new(like):
    return np.empty_like(np.asarray(like))


def normalize_rows(real[:, ::1] x, real[::1] gamma, real[::1] beta, bint centred, double eps):
    """y, mean, rstd of layer norm, or of RMS norm where not centred."""
    cdef real[:, ::1] y = new(x)
    cdef double[::1] mean = np.empty(x.shape[0])
    cdef double[::1] rstd = np.empty(x.shape[0])
    cdef int status
    with nogil:
        status = api.normalize_rows(type_of(gamma[0]), x.shape[0], x.shape[1], &x[0, 0], x.shape[1], &y[0, 0], x.shape[1], &gamma[0],
                                    &beta[0] if centred else NULL, centred, eps, &mean[0], &rstd[0])
    check(status)
    return np.asarray(y), np.asarray(mean), np.asarray(rstd)


def rows_backward(real[:, ::1] dy, real[:, ::1] x, real[::1] gamma, bint centred, double[::1] mean, double[::1] rstd):
    cdef real[:, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef int status
    with nogil:
        status = api.rows_backward(type_of(gamma[0]), x.shape[0], x.shape[1], &x[0, 0], x.shape[1], &dy[0, 0], x.shape[1], &dx[0, 0],
                                   x.shape[1], &gamma[0], centred, &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def normalize_channels(real[:, :, ::1] x, real[::1] gamma, real[::1] beta, bint training, double eps, double[::1] mean,
                       double[::1] rstd):
    """y and var of batch norm of (outer, channels, inner); mean and rstd are written in training, and otherwise read."""
    cdef real[:, :, ::1] y = new(x)
    cdef double[::1] var = np.zeros(x.shape[1])
    cdef int status
    with nogil:
        status = api.normalize_channels(type_of(gamma[0]), x.shape[0], x.shape[1], x.shape[2], &x[0, 0, 0], &y[0, 0, 0], &gamma[0],
                                        &beta[0], training, eps, &mean[0], &rstd[0], &var[0])
    check(status)
    return np.asarray(y), np.asarray(var)


def channels_backward(real[:, :, ::1] dy, real[:, :, ::1] x, real[::1] gamma, bint training, double[::1] mean, double[::1] rstd):
    cdef real[:, :, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef int status
    with nogil:
        status = api.channels_backward(type_of(gamma[0]), x.shape[0], x.shape[1], x.shape[2], &x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0],
                                       &gamma[0], training, &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def normalize_groups(real[:, :, ::1] x, Py_ssize_t groups, real[::1] gamma, real[::1] beta, double eps):
    """y, mean, rstd of group norm of (outer, channels, inner)."""
    cdef real[:, :, ::1] y = new(x)
    cdef double[::1] mean = np.empty(x.shape[0] * groups)
    cdef double[::1] rstd = np.empty(x.shape[0] * groups)
    cdef int status
    with nogil:
        status = api.normalize_groups(type_of(gamma[0]), x.shape[0], groups, x.shape[1] // groups, x.shape[2], &x[0, 0, 0],
                                      &y[0, 0, 0], &gamma[0], &beta[0], eps, &mean[0], &rstd[0])
    check(status)
    return np.asarray(y), np.asarray(mean), np.asarray(rstd)


def groups_backward(real[:, :, ::1] dy, real[:, :, ::1] x, Py_ssize_t groups, real[::1] gamma, double[::1] mean, double[::1] rstd):
    cdef real[:, :, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef int status
    with nogil:
        status = api.groups_backward(type_of(gamma[0]), x.shape[0], groups, x.shape[1] // groups, x.shape[2], &x[0, 0, 0], &dy[0, 0, 0],
                                     &dx[0, 0, 0], &gamma[0], &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def statuses():
    """What comes of arguments that are wrong, and of no elements."""
    cdef float x = 1
    cdef double statistic = 1
    return [
        api.normalize_rows(7, 1, 1, &x, 1, &x, 1, NULL, NULL, 1, 0, &statistic, &statistic),
        api.normalize_rows(NORMEXT_FLOAT32, -1, 1, &x, 1, &x, 1, NULL, NULL, 1, 0, &statistic, &statistic),
        api.normalize_rows(NORMEXT_FLOAT32, 1, 1, NULL, 1, &x, 1, NULL, NULL, 1, 0, &statistic, &statistic),
        api.channels_backward(NORMEXT_FLOAT32, 1, 1, 1, &x, &x, &x, NULL, 1, &statistic, &statistic, NULL, &statistic),
        api.normalize_groups(NORMEXT_FLOAT32, 1, 1, -1, 1, &x, &x, NULL, NULL, 0, &statistic, &statistic),
        api.normalize_channels(NORMEXT_FLOAT32, 0, 3, 1, NULL, NULL, NULL, NULL, 1, 0, NULL, NULL, NULL),
    ]
