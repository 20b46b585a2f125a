# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The loops as XLA calls them: two handlers, in capsules, for `normext.jax` to register.

Built only where jaxlib and its headers are (see setup.py); without it `normext.jax` has the handlers of _jax_ctypes.py, in Python.

Arguments and results are contiguous arrays. Their last axes are

    x, y, dy, dx                        (outer, channels, inner)
    mean, rstd                          (statistics, 2): float64 in two halves of uint32, for JAX may have no float64
    gamma, beta, dgamma, dbeta, ...     (channels,), or (0,) for what there is not

and before them are any number of axes of `jax.vmap`, the same for all, of length 1 in arguments that do not have that axis.
"""

cimport numpy as cnp

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_New
from cpython.pythread cimport WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_release_lock, PyThread_type_lock
from libc.stdint cimport int64_t, uintptr_t

import time

from normext cimport (
    NORMEXT_BAD_ARGUMENT,
    NORMEXT_BFLOAT16,
    NORMEXT_FLOAT16,
    NORMEXT_FLOAT32,
    NORMEXT_FLOAT64,
    NORMEXT_NO_MEMORY,
    NORMEXT_OK,
    normext_api,
    normext_import,
)
from normext._core.kernels cimport nx_any_outside, nx_inverse_stds

cnp.import_array()

cdef extern from "xla/ffi/api/c_api.h" nogil:
    enum:
        XLA_FFI_API_MAJOR
        XLA_FFI_API_MINOR
        XLA_FFI_Api_Version_STRUCT_SIZE
        XLA_FFI_Error_Create_Args_STRUCT_SIZE

    ctypedef enum XLA_FFI_Error_Code:
        XLA_FFI_Error_Code_CANCELLED
        XLA_FFI_Error_Code_INVALID_ARGUMENT
        XLA_FFI_Error_Code_RESOURCE_EXHAUSTED
        XLA_FFI_Error_Code_INTERNAL

    ctypedef enum XLA_FFI_DataType:
        XLA_FFI_DataType_S64
        XLA_FFI_DataType_U32
        XLA_FFI_DataType_F16
        XLA_FFI_DataType_F32
        XLA_FFI_DataType_F64
        XLA_FFI_DataType_BF16

    ctypedef enum XLA_FFI_Extension_Type:
        XLA_FFI_Extension_Metadata

    ctypedef enum XLA_FFI_AttrType:
        XLA_FFI_AttrType_SCALAR

    ctypedef struct XLA_FFI_Error:
        pass

    ctypedef struct XLA_FFI_Extension_Base:
        XLA_FFI_Extension_Type type

    ctypedef struct XLA_FFI_Api_Version:
        size_t struct_size
        XLA_FFI_Extension_Base *extension_start
        int major_version
        int minor_version

    ctypedef struct XLA_FFI_Metadata:
        XLA_FFI_Api_Version api_version
        int traits

    ctypedef struct XLA_FFI_Metadata_Extension:
        XLA_FFI_Metadata *metadata

    ctypedef struct XLA_FFI_Error_Create_Args:
        size_t struct_size
        XLA_FFI_Extension_Base *extension_start
        const char *message
        XLA_FFI_Error_Code errc

    ctypedef struct XLA_FFI_Api:
        XLA_FFI_Error *(*XLA_FFI_Error_Create)(XLA_FFI_Error_Create_Args *args) noexcept nogil

    ctypedef struct XLA_FFI_Buffer:
        XLA_FFI_DataType dtype
        void *data
        int64_t rank
        int64_t *dims

    ctypedef struct XLA_FFI_Scalar:
        XLA_FFI_DataType dtype
        void *value

    ctypedef struct XLA_FFI_Args:
        int64_t size
        void **args

    ctypedef struct XLA_FFI_Rets:
        int64_t size
        void **rets

    ctypedef struct XLA_FFI_Attrs:
        int64_t size
        XLA_FFI_AttrType *types
        void **attrs

    ctypedef struct XLA_FFI_CallFrame:
        XLA_FFI_Extension_Base *extension_start
        const XLA_FFI_Api *api
        XLA_FFI_Args args
        XLA_FFI_Rets rets
        XLA_FFI_Attrs attrs

cdef const normext_api *api = normext_import()

cdef enum Norm:  # as `normext.jax` numbers them
    LAYER
    RMS
    GROUP
    BATCH
    BATCH_GIVEN  # with given statistics

cdef struct Call:
    int norm, type
    XLA_FFI_DataType computing  # the type of parameters
    double eps
    Py_ssize_t outer, channels, inner, groups, statistics, batch  # batch: how many items the axes of vmap make
    int axes  # of vmap
    const int64_t *lengths  # of those axes


# What comes from XLA ---------------------------------------------------------------------------------------------------------


cdef XLA_FFI_Error *failure(XLA_FFI_CallFrame *frame, XLA_FFI_Error_Code code, const char *message) noexcept nogil:
    cdef XLA_FFI_Error_Create_Args args
    args.struct_size, args.extension_start = XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL
    args.message, args.errc = message, code
    return frame.api.XLA_FFI_Error_Create(&args)


cdef bint asks_for_version(XLA_FFI_CallFrame *frame) noexcept nogil:
    """Whether XLA wants to know what a handler was compiled for, as it does when that is registered; answers it."""
    cdef XLA_FFI_Metadata *metadata
    if frame.extension_start == NULL or frame.extension_start.type != XLA_FFI_Extension_Metadata:
        return False
    metadata = (<XLA_FFI_Metadata_Extension *> frame.extension_start).metadata
    metadata.api_version = XLA_FFI_Api_Version(XLA_FFI_Api_Version_STRUCT_SIZE, NULL, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR)
    metadata.traits = 0
    return True


cdef inline const XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int i) noexcept:
    return <const XLA_FFI_Buffer *> frame.args.args[i]


cdef inline const XLA_FFI_Buffer *result(XLA_FFI_CallFrame *frame, int i) noexcept:
    return <const XLA_FFI_Buffer *> frame.rets.rets[i]


cdef inline const XLA_FFI_Scalar *attribute(XLA_FFI_CallFrame *frame, int i, XLA_FFI_DataType dtype) noexcept:
    cdef const XLA_FFI_Scalar *scalar = <const XLA_FFI_Scalar *> frame.attrs.attrs[i]
    return scalar if frame.attrs.types[i] == XLA_FFI_AttrType_SCALAR and scalar.dtype == dtype else NULL


cdef bint read_call(XLA_FFI_CallFrame *frame, int args, int rets, Call *c) noexcept:
    """Fill in the call: attributes and, from the first result (y or dx), sizes."""
    cdef const XLA_FFI_Buffer *y
    cdef const XLA_FFI_Scalar *eps
    cdef const XLA_FFI_Scalar *groups
    cdef const XLA_FFI_Scalar *norm
    cdef int i
    if frame.args.size != args or frame.rets.size != rets or frame.attrs.size != 3:
        return False
    eps, groups = attribute(frame, 0, XLA_FFI_DataType_F64), attribute(frame, 1, XLA_FFI_DataType_S64)  # sorted by name
    norm = attribute(frame, 2, XLA_FFI_DataType_S64)
    y = result(frame, 0)
    if eps == NULL or groups == NULL or norm == NULL or y.rank < 3:
        return False
    c.eps, c.groups, c.norm = (<double *> eps.value)[0], (<int64_t *> groups.value)[0], (<int64_t *> norm.value)[0]
    if y.dtype == XLA_FFI_DataType_F32:
        c.type = NORMEXT_FLOAT32
    elif y.dtype == XLA_FFI_DataType_F64:
        c.type = NORMEXT_FLOAT64
    elif y.dtype == XLA_FFI_DataType_F16:
        c.type = NORMEXT_FLOAT16
    elif y.dtype == XLA_FFI_DataType_BF16:
        c.type = NORMEXT_BFLOAT16
    else:
        return False
    c.computing = XLA_FFI_DataType_F64 if c.type == NORMEXT_FLOAT64 else XLA_FFI_DataType_F32
    c.axes, c.lengths, c.batch = y.rank - 3, y.dims, 1
    for i in range(c.axes):
        c.batch *= c.lengths[i]
    c.outer, c.channels, c.inner = y.dims[c.axes], y.dims[c.axes + 1], y.dims[c.axes + 2]
    if not LAYER <= c.norm <= BATCH_GIVEN or c.groups < 1 or c.channels % c.groups:
        return False
    if c.norm in (LAYER, RMS) and c.inner != 1:
        return False
    c.statistics = c.outer * c.groups if c.norm in (LAYER, RMS, GROUP) else c.channels
    return True


cdef bint is_array(const XLA_FFI_Buffer *a, const Call *c, XLA_FFI_DataType dtype, bint whole, int rank, Py_ssize_t n0, Py_ssize_t n1=0,
                   Py_ssize_t n2=0) noexcept:
    """Whether an array is of that dtype and shape; whole: with all axes of vmap, as results are."""
    cdef int i
    if a.dtype != dtype or a.rank != c.axes + rank or <uintptr_t> a.data % 8:
        return False
    for i in range(c.axes):
        if a.dims[i] != c.lengths[i] and (whole or a.dims[i] != 1):
            return False
    return (a.dims[c.axes] == n0 and (rank < 2 or a.dims[c.axes + 1] == n1) and (rank < 3 or a.dims[c.axes + 2] == n2))


cdef inline bint is_x(const XLA_FFI_Buffer *a, const Call *c, const XLA_FFI_Buffer *y, bint whole) noexcept:
    return is_array(a, c, y.dtype, whole, 3, c.outer, c.channels, c.inner)


cdef inline bint is_statistic(const XLA_FFI_Buffer *a, const Call *c, bint whole) noexcept:
    return is_array(a, c, XLA_FFI_DataType_U32, whole, 2, c.statistics, 2)


cdef inline bint is_gradient(const XLA_FFI_Buffer *a, const Call *c) noexcept:
    return is_array(a, c, c.computing, True, 1, c.channels) or is_array(a, c, c.computing, True, 1, 0)


cdef inline bint is_parameter(const XLA_FFI_Buffer *a, const Call *c) noexcept:
    return is_array(a, c, c.computing, False, 1, c.channels) or is_array(a, c, c.computing, False, 1, 0)


cdef char *item(const XLA_FFI_Buffer *a, const Call *c, Py_ssize_t i) noexcept:
    """Item i of the batch; NULL for what has no numbers."""
    cdef Py_ssize_t index = 0, stride = 1, size, along
    cdef int axis
    size = 4 if a.dtype in (XLA_FFI_DataType_F32, XLA_FFI_DataType_U32) else 8 if a.dtype == XLA_FFI_DataType_F64 else 2
    for axis in range(c.axes, a.rank):
        size *= a.dims[axis]
    if size == 0:
        return NULL
    for axis in range(c.axes - 1, -1, -1):
        along, i = i % c.lengths[axis], i // c.lengths[axis]
        if a.dims[axis] != 1:
            index += along * stride
            stride *= a.dims[axis]
    return <char *> a.data + index * size


cdef bint is_shared(const XLA_FFI_Buffer *a, const Call *c) noexcept:
    """Whether all items of the batch have one and the same, or none."""
    cdef int i
    for i in range(c.axes):
        if a.dims[i] != 1:
            return False
    return True


cdef inline void join_items(Call *c) noexcept:
    """Make one item of the batch, where each example is normalized by itself and nothing tells the items apart."""
    if c.norm in (LAYER, RMS, GROUP):
        c.outer *= c.batch
        c.statistics *= c.batch
        c.batch = min(c.batch, 1)


cdef void read_doubles(const char *source, XLA_FFI_DataType dtype, Py_ssize_t n, double *to) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = (<const float *> source)[i] if dtype == XLA_FFI_DataType_F32 else (<const double *> source)[i]


cdef void write_doubles(const double *source, Py_ssize_t n, XLA_FFI_DataType dtype, char *to) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        if dtype == XLA_FFI_DataType_F32:
            (<float *> to)[i] = <float> source[i]
        else:
            (<double *> to)[i] = source[i]


# The handlers ----------------------------------------------------------------------------------------------------------------

# A handler holds the GIL, which the loops let go of while they work: taken once, not anew for each item of a batch.


cdef XLA_FFI_Error *ended(XLA_FFI_CallFrame *frame, int status) noexcept:
    if status == NORMEXT_OK:
        return NULL
    if status == NORMEXT_NO_MEMORY:
        return failure(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "normext: no memory")
    return failure(frame, XLA_FFI_Error_Code_INTERNAL, "normext: a loop refused its arguments")


cdef XLA_FFI_Error *run_forward(XLA_FFI_CallFrame *frame) noexcept with gil:
    """x, gamma, beta, given mean, given variance -> y, mean, rstd, and the mean and variance of a batch as parameters are."""
    cdef Call c
    cdef const XLA_FFI_Buffer *x
    cdef const XLA_FFI_Buffer *y
    cdef Py_ssize_t i, given, own
    cdef double *var
    cdef double *mean
    cdef double *rstd
    cdef char *x_
    cdef char *y_
    cdef char *gamma
    cdef char *beta
    cdef int status = NORMEXT_OK
    if not read_call(frame, 5, 5, &c):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "normext: not a call of its forward passes")
    x, y = argument(frame, 0), result(frame, 0)
    given, own = c.channels if c.norm == BATCH_GIVEN else 0, c.channels if c.norm == BATCH else 0
    if not (is_x(x, &c, y, False) and is_x(y, &c, y, True) and is_parameter(argument(frame, 1), &c)
            and is_parameter(argument(frame, 2), &c) and is_array(argument(frame, 3), &c, c.computing, False, 1, given)
            and is_array(argument(frame, 4), &c, c.computing, False, 1, given) and is_statistic(result(frame, 1), &c, True)
            and is_statistic(result(frame, 2), &c, True) and is_array(result(frame, 3), &c, c.computing, True, 1, own)
            and is_array(result(frame, 4), &c, c.computing, True, 1, own)):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "normext: arrays do not fit together")
    if is_x(x, &c, y, True) and is_shared(argument(frame, 1), &c) and is_shared(argument(frame, 2), &c):
        join_items(&c)
    var = <double *> PyMem_Malloc(max(1, own) * sizeof(double))
    if var == NULL:
        return failure(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "normext: no memory")
    for i in range(c.batch):
        x_, y_, gamma, beta = item(x, &c, i), item(y, &c, i), item(argument(frame, 1), &c, i), item(argument(frame, 2), &c, i)
        mean, rstd = <double *> item(result(frame, 1), &c, i), <double *> item(result(frame, 2), &c, i)
        if c.norm == LAYER or c.norm == RMS:
            status = api.normalize_rows(c.type, c.outer, c.channels, x_, c.channels, y_, c.channels, gamma, beta, c.norm == LAYER, c.eps,
                                        mean, rstd)
        elif c.norm == GROUP:
            status = api.normalize_groups(c.type, c.outer, c.groups, c.channels // c.groups, c.inner, x_, y_, gamma, beta, c.eps, mean,
                                          rstd)
        else:
            if given:
                read_doubles(item(argument(frame, 3), &c, i), c.computing, given, mean)
                read_doubles(item(argument(frame, 4), &c, i), c.computing, given, rstd)
                nx_inverse_stds(rstd, given, c.eps)
            status = api.normalize_channels(c.type, c.outer, c.channels, c.inner, x_, y_, gamma, beta, own != 0, c.eps, mean, rstd, var)
            write_doubles(mean, own, c.computing, item(result(frame, 3), &c, i))
            write_doubles(var, own, c.computing, item(result(frame, 4), &c, i))
        if status != NORMEXT_OK:
            break
    PyMem_Free(var)
    return ended(frame, status)


cdef XLA_FFI_Error *run_backward(XLA_FFI_CallFrame *frame) noexcept with gil:
    """x, dy, gamma, mean, rstd -> dx, dgamma, dbeta, of which the last two may be asked for or not."""
    cdef Call c
    cdef const XLA_FFI_Buffer *dx
    cdef Py_ssize_t i
    cdef double *dgamma
    cdef double *dbeta
    cdef double *mean
    cdef double *rstd
    cdef char *x_
    cdef char *dy_
    cdef char *dx_
    cdef char *gamma
    cdef int status = NORMEXT_OK
    if not read_call(frame, 5, 3, &c):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "normext: not a call of its backward passes")
    dx = result(frame, 0)
    if not (is_x(argument(frame, 0), &c, dx, False) and is_x(argument(frame, 1), &c, dx, False) and is_parameter(argument(frame, 2), &c)
            and is_statistic(argument(frame, 3), &c, False) and is_statistic(argument(frame, 4), &c, False)
            and is_x(dx, &c, dx, True) and is_gradient(result(frame, 1), &c) and is_gradient(result(frame, 2), &c)):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "normext: arrays do not fit together")
    dgamma = <double *> PyMem_Malloc(2 * c.channels * sizeof(double))
    if dgamma == NULL:
        return failure(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "normext: no memory")
    dbeta = dgamma + c.channels
    if (result(frame, 1).dims[c.axes] == 0 and result(frame, 2).dims[c.axes] == 0 and is_shared(argument(frame, 2), &c)
            and is_x(argument(frame, 0), &c, dx, True) and is_x(argument(frame, 1), &c, dx, True)
            and is_statistic(argument(frame, 3), &c, True) and is_statistic(argument(frame, 4), &c, True)):
        join_items(&c)
    for i in range(c.batch):
        x_, dy_, dx_ = item(argument(frame, 0), &c, i), item(argument(frame, 1), &c, i), item(dx, &c, i)
        gamma = item(argument(frame, 2), &c, i)
        mean, rstd = <double *> item(argument(frame, 3), &c, i), <double *> item(argument(frame, 4), &c, i)
        if c.type != NORMEXT_FLOAT64 and nx_any_outside(rstd, c.statistics, 1e-10, 1e10):
            try:
                wide_backward(&c, x_, dy_, gamma, mean, rstd, dx_, dgamma, dbeta)
            except MemoryError:
                status = NORMEXT_NO_MEMORY
            except Exception:
                status = NORMEXT_BAD_ARGUMENT
        elif c.norm == LAYER or c.norm == RMS:
            status = api.rows_backward(c.type, c.outer, c.channels, x_, c.channels, dy_, c.channels, dx_, c.channels, gamma,
                                       c.norm == LAYER, mean, rstd, dgamma, dbeta)
        elif c.norm == GROUP:
            status = api.groups_backward(c.type, c.outer, c.groups, c.channels // c.groups, c.inner, x_, dy_, dx_, gamma, mean, rstd,
                                         dgamma, dbeta)
        else:
            status = api.channels_backward(c.type, c.outer, c.channels, c.inner, x_, dy_, dx_, gamma, c.norm == BATCH, mean, rstd, dgamma,
                                           dbeta)
        if status != NORMEXT_OK:
            break
        write_doubles(dgamma, result(frame, 1).dims[c.axes], c.computing, item(result(frame, 1), &c, i))
        write_doubles(dbeta, result(frame, 2).dims[c.axes], c.computing, item(result(frame, 2), &c, i))
    PyMem_Free(dgamma)
    return ended(frame, status)


# Deviations beyond what 32 bits carry: normext's functions for arrays turn to float64 there ------------------------------------


cdef object view(const void *data, int type_number, tuple shape):
    cdef cnp.npy_intp[3] dims = [1, 1, 1]
    cdef int i
    for i in range(len(shape)):
        dims[i] = shape[i]
    return cnp.PyArray_SimpleNewFromData(len(shape), dims, type_number, <void *> data)


cdef object elements(const void *data, int type, tuple shape):
    if type == NORMEXT_BFLOAT16:
        return view(data, cnp.NPY_UINT16, shape).view("bfloat16")
    return view(data, cnp.NPY_FLOAT16 if type == NORMEXT_FLOAT16 else cnp.NPY_FLOAT, shape)


cdef int wide_backward(const Call *c, const void *x, const void *dy, const void *gamma, const double *mean, const double *rstd, void *dx,
                       double *dgamma, double *dbeta) except -1:
    from normext.jax import _gradients_of_arrays

    shape, channels, statistics = (c.outer, c.channels, c.inner), (c.channels,), (c.statistics,)
    gradients = _gradients_of_arrays(
        elements(x, c.type, shape),
        elements(dy, c.type, shape),
        None if gamma == NULL else view(gamma, cnp.NPY_FLOAT, channels),
        view(mean, cnp.NPY_DOUBLE, statistics),
        view(rstd, cnp.NPY_DOUBLE, statistics),
        c.norm,
        c.groups,
    )
    for to, gradient in zip((elements(dx, c.type, shape), view(dgamma, cnp.NPY_DOUBLE, channels), view(dbeta, cnp.NPY_DOUBLE, channels)),
                            gradients):
        if gradient is not None:
            to[...] = gradient
    return 0


# The end of the program ------------------------------------------------------------------------------------------------------

# JAX lets a program end while XLA still computes. A thread that asks for the GIL then never gets it, and the program would hang.
cdef PyThread_type_lock gate = PyThread_allocate_lock()
cdef int running = 0
cdef bint closed = False

ctypedef XLA_FFI_Error *(*Handler)(XLA_FFI_CallFrame *) noexcept nogil


cdef XLA_FFI_Error *handle(XLA_FFI_CallFrame *frame, Handler handler) noexcept nogil:
    global running
    cdef XLA_FFI_Error *error
    cdef bint refused
    if asks_for_version(frame):
        return NULL
    PyThread_acquire_lock(gate, WAIT_LOCK)
    refused = closed
    running += not refused
    PyThread_release_lock(gate)
    if refused:
        return failure(frame, XLA_FFI_Error_Code_CANCELLED, "normext: the program ends")
    error = handler(frame)
    PyThread_acquire_lock(gate, WAIT_LOCK)
    running -= 1
    PyThread_release_lock(gate)
    return error


cdef XLA_FFI_Error *forward(XLA_FFI_CallFrame *frame) noexcept nogil:
    return handle(frame, run_forward)


cdef XLA_FFI_Error *backward(XLA_FFI_CallFrame *frame) noexcept nogil:
    return handle(frame, run_backward)


def close():
    """Let the calls that run come to their end, and no more begin."""
    global closed
    PyThread_acquire_lock(gate, WAIT_LOCK)
    closed = True
    PyThread_release_lock(gate)
    while running:
        time.sleep(1e-3)


handlers = {
    "forward": PyCapsule_New(<void *> &forward, NULL, NULL),
    "backward": PyCapsule_New(<void *> &backward, NULL, NULL),
}
