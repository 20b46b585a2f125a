# cython: boundscheck=False, wraparound=False
"""Every function of normext's table, called without the GIL.

Those for named layouts take memoryviews; `Norm` and `Arrays` describe any norm of any arrays.
"""

import numpy as np

from normext cimport (
    NORMEXT_APPLY,
    NORMEXT_BATCH_NORM,
    NORMEXT_BFLOAT16,
    NORMEXT_FLOAT16,
    NORMEXT_FLOAT32,
    NORMEXT_FLOAT64,
    NORMEXT_GROUP_NORM,
    NORMEXT_LAYER_NORM,
    NORMEXT_MAX_NDIM,
    NORMEXT_NO_MEMORY,
    NORMEXT_OK,
    NORMEXT_RMS_NORM,
    NORMEXT_SUMS,
    NORMEXT_WHOLE,
    normext_api,
    normext_import,
    nx_array,
    nx_io,
    nx_norm,
)

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
    cdef Py_ssize_t rows = x.shape[0], n = x.shape[1]
    cdef int status
    with nogil:
        status = api.normalize_rows(type_of(gamma[0]), rows, n, &x[0, 0], n, &y[0, 0], n, &gamma[0],
                                    &beta[0] if centred else NULL, centred, eps, &mean[0], &rstd[0])
    check(status)
    return np.asarray(y), np.asarray(mean), np.asarray(rstd)


def rows_backward(real[:, ::1] dy, real[:, ::1] x, real[::1] gamma, bint centred, double[::1] mean,
                  double[::1] rstd):
    cdef real[:, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef Py_ssize_t rows = x.shape[0], n = x.shape[1]
    cdef int status
    with nogil:
        status = api.rows_backward(type_of(gamma[0]), rows, n, &x[0, 0], n, &dy[0, 0], n, &dx[0, 0],
                                   n, &gamma[0], centred, &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def normalize_channels(real[:, :, ::1] x, real[::1] gamma, real[::1] beta, bint training,
                       double eps, double[::1] mean, double[::1] rstd):
    """y and var of batch norm of (outer, channels, inner).

    mean and rstd are written in training, and otherwise read.
    """
    cdef real[:, :, ::1] y = new(x)
    cdef double[::1] var = np.zeros(x.shape[1])
    cdef int status
    with nogil:
        status = api.normalize_channels(type_of(gamma[0]), x.shape[0], x.shape[1], x.shape[2],
                                        &x[0, 0, 0], &y[0, 0, 0], &gamma[0], &beta[0], training,
                                        eps, &mean[0], &rstd[0], &var[0])
    check(status)
    return np.asarray(y), np.asarray(var)


def channels_backward(real[:, :, ::1] dy, real[:, :, ::1] x, real[::1] gamma, bint training,
                      double[::1] mean, double[::1] rstd):
    cdef real[:, :, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef int status
    with nogil:
        status = api.channels_backward(type_of(gamma[0]), x.shape[0], x.shape[1], x.shape[2],
                                       &x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &gamma[0], training,
                                       &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def normalize_groups(real[:, :, ::1] x, Py_ssize_t groups, real[::1] gamma, real[::1] beta,
                     double eps):
    """y, mean, rstd of group norm of (outer, channels, inner)."""
    cdef real[:, :, ::1] y = new(x)
    cdef double[::1] mean = np.empty(x.shape[0] * groups)
    cdef double[::1] rstd = np.empty(x.shape[0] * groups)
    cdef int status
    with nogil:
        status = api.normalize_groups(type_of(gamma[0]), x.shape[0], groups, x.shape[1] // groups,
                                      x.shape[2], &x[0, 0, 0], &y[0, 0, 0], &gamma[0], &beta[0],
                                      eps, &mean[0], &rstd[0])
    check(status)
    return np.asarray(y), np.asarray(mean), np.asarray(rstd)


def groups_backward(real[:, :, ::1] dy, real[:, :, ::1] x, Py_ssize_t groups, real[::1] gamma,
                    double[::1] mean, double[::1] rstd):
    cdef real[:, :, ::1] dx = new(x)
    cdef double[::1] dgamma = np.empty(x.shape[1])
    cdef double[::1] dbeta = np.empty(x.shape[1])
    cdef int status
    with nogil:
        status = api.groups_backward(type_of(gamma[0]), x.shape[0], groups, x.shape[1] // groups,
                                     x.shape[2], &x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &gamma[0],
                                     &mean[0], &rstd[0], &dgamma[0], &dbeta[0])
    check(status)
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)


def statuses():
    """What comes of arguments that are wrong, and of no elements."""
    cdef float x = 1
    cdef double one = 1
    return [
        api.normalize_rows(7, 1, 1, &x, 1, &x, 1, NULL, NULL, 1, 0, &one, &one),
        api.normalize_rows(NORMEXT_FLOAT32, -1, 1, &x, 1, &x, 1, NULL, NULL, 1, 0, &one, &one),
        api.normalize_rows(NORMEXT_FLOAT32, 1, 1, NULL, 1, &x, 1, NULL, NULL, 1, 0, &one, &one),
        api.channels_backward(NORMEXT_FLOAT32, 1, 1, 1, &x, &x, &x, NULL, 1, &one, &one, NULL,
                              &one),
        api.normalize_groups(NORMEXT_FLOAT32, 1, 1, -1, 1, &x, &x, NULL, NULL, 0, &one, &one),
        api.normalize_channels(NORMEXT_FLOAT32, 0, 3, 1, NULL, NULL, NULL, NULL, 1, 0, NULL, NULL,
                               NULL),
    ]


# Any norm of any arrays --------------------------------------------------------------------------

KINDS = {
    "batch_norm": NORMEXT_BATCH_NORM,
    "group_norm": NORMEXT_GROUP_NORM,
    "instance_norm": NORMEXT_GROUP_NORM,  # a group a channel
    "layer_norm": NORMEXT_LAYER_NORM,
    "rms_norm": NORMEXT_RMS_NORM,
}
TYPES = {
    "float32": NORMEXT_FLOAT32,
    "float64": NORMEXT_FLOAT64,
    "float16": NORMEXT_FLOAT16,
    "bfloat16": NORMEXT_BFLOAT16,
}
PARTS = {"whole": NORMEXT_WHOLE, "sums": NORMEXT_SUMS, "apply": NORMEXT_APPLY}


cdef class Arrays:
    """The arrays of a call, by the names of nx_io and running_mean and running_var; kept alive."""

    cdef nx_io c
    cdef Py_ssize_t strides[7][NORMEXT_MAX_NDIM]
    cdef dict given

    def __init__(self, *, double momentum=0, bint unbiased=False, str part="whole", double count=0,
                 **given):
        self.given = given
        self.c.x, self.c.y = self.array("x", 0), self.array("y", 1)
        self.c.residual, self.c.sum = self.array("residual", 2), self.array("sum", 3)
        self.c.dy, self.c.dx = self.array("dy", 4), self.array("dx", 5)
        self.c.dsum = self.array("dsum", 6)
        self.c.gamma, self.c.beta = self.pointer("gamma"), self.pointer("beta")
        self.c.mean = <double *> self.pointer("mean")
        self.c.rstd = <double *> self.pointer("rstd")
        self.c.var = <double *> self.pointer("var")
        self.c.dgamma = <double *> self.pointer("dgamma")
        self.c.dbeta = <double *> self.pointer("dbeta")
        self.c.running.mean = self.pointer("running_mean")
        self.c.running.var = self.pointer("running_var")
        self.c.running.single_mean = self.is_single("running_mean")
        self.c.running.single_var = self.is_single("running_var")
        self.c.running.momentum, self.c.running.unbiased = momentum, unbiased
        self.c.part, self.c.count = PARTS.get(part, 7), count

    cdef void *pointer(self, str name) except? NULL:
        """NULL where there is none."""
        a = self.given.get(name)
        return NULL if a is None else <void *> <size_t> a.ctypes.data

    cdef bint is_single(self, str name) except -1:
        return self.given.get(name) is not None and self.given[name].dtype == np.float32

    cdef nx_array array(self, str name, int place) except *:
        cdef nx_array a = nx_array(self.pointer(name), NULL, False)
        if a.data != NULL:
            a.swapped = not self.given[name].dtype.isnative
            if not self.given[name].flags.c_contiguous:
                for i, stride in enumerate(self.given[name].strides):
                    self.strides[place][i] = stride
                a.strides = self.strides[place]
        return a


cdef class Norm:
    """A norm, with the memory of its shape; what its functions return is what the table's do."""

    cdef nx_norm c
    cdef Py_ssize_t shape[NORMEXT_MAX_NDIM]

    def __init__(self, str kind, str dtype, tuple shape, int axis, *, Py_ssize_t groups=0,
                 bint training=True, bint relu=False, double eps=1e-5):
        for i, length in enumerate(shape[:NORMEXT_MAX_NDIM]):
            self.shape[i] = length
        self.c = nx_norm(KINDS.get(kind, 7), TYPES.get(dtype, 7), len(shape), &self.shape[0], axis,
                         groups, training, relu, eps)

    def check(self):
        return api.check(&self.c)

    def forward(self, Arrays arrays):
        cdef int status
        with nogil:
            status = api.forward(&self.c, &arrays.c)
        return status

    def backward(self, Arrays arrays):
        cdef int status
        with nogil:
            status = api.backward(&self.c, &arrays.c)
        return status
