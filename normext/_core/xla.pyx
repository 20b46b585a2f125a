# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The norms as XLA calls them: two handlers, in capsules, for `normext.jax` to register.

A handler takes arrays, all contiguous, and as attributes what an nx_norm holds, and calls `forward`
or `backward`. It never takes the GIL, so that a program may end while XLA computes.

    x, y, dy, dx                             in the shape of x
    mean, rstd                               two uint32 for each float64, as JAX may have no float64
    gamma, beta, dgamma, dbeta, running ...  no numbers for what there is not

Before these axes are any number of axes of `jax.vmap`, the same for all, of length 1 in arguments
that do not have that axis.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from normext cimport (
    NORMEXT_BATCH_NORM,
    NORMEXT_BFLOAT16,
    NORMEXT_FLOAT16,
    NORMEXT_FLOAT32,
    NORMEXT_FLOAT64,
    NORMEXT_MAX_NDIM,
    NORMEXT_NO_MEMORY,
    NORMEXT_OK,
    nx_io,
    nx_norm,
)
from normext._core.norms cimport backward, check, forward
from normext._core.sizes cimport is_row_norm, parameters_of, statistics_of

# XLA's foreign function interface, as xla/ffi/api/c_api.h in jaxlib declares it: so much of its
# versions 0.1 to 0.3 as is used here. Structs of versions 0.x only grow at their ends. They are
# repeated here so that no build asks for jaxlib; tests/test_jax.py compares them with the header.

cdef enum:
    XLA_FFI_API_MAJOR = 0
    XLA_FFI_API_MINOR = 3
    XLA_FFI_Extension_Metadata = 1
    XLA_FFI_Error_Code_INVALID_ARGUMENT = 3
    XLA_FFI_Error_Code_RESOURCE_EXHAUSTED = 8
    XLA_FFI_DataType_S64 = 5
    XLA_FFI_DataType_U32 = 8
    XLA_FFI_DataType_F16 = 10
    XLA_FFI_DataType_F32 = 11
    XLA_FFI_DataType_F64 = 12
    XLA_FFI_DataType_BF16 = 16
    XLA_FFI_AttrType_SCALAR = 3

cdef struct XLA_FFI_Extension_Base:
    size_t struct_size
    int type
    XLA_FFI_Extension_Base *next

cdef struct XLA_FFI_Api_Version:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    int major_version
    int minor_version

cdef struct XLA_FFI_Metadata:
    size_t struct_size
    XLA_FFI_Api_Version api_version
    uint32_t traits

cdef struct XLA_FFI_Metadata_Extension:
    XLA_FFI_Extension_Base extension_base
    XLA_FFI_Metadata *metadata

cdef struct XLA_FFI_Error_Create_Args:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    const char *message
    int errc

cdef struct XLA_FFI_Api:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    XLA_FFI_Api_Version api_version
    const void *internal_api
    void *(*XLA_FFI_Error_Create)(XLA_FFI_Error_Create_Args *args) noexcept nogil

cdef struct XLA_FFI_Buffer:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    int dtype
    void *data
    int64_t rank
    int64_t *dims

cdef struct XLA_FFI_Scalar:
    int dtype
    void *value

cdef struct XLA_FFI_Args:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    int64_t size
    int *types
    void **args

cdef struct XLA_FFI_Rets:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    int64_t size
    int *types
    void **rets

cdef struct XLA_FFI_Attrs:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    int64_t size
    int *types
    void **names
    void **attrs

cdef struct XLA_FFI_CallFrame:
    size_t struct_size
    XLA_FFI_Extension_Base *extension_start
    const XLA_FFI_Api *api
    void *ctx
    int stage
    XLA_FFI_Args args
    XLA_FFI_Rets rets
    XLA_FFI_Attrs attrs


cdef void *failure(const XLA_FFI_CallFrame *frame, int code, const char *message) noexcept nogil:
    cdef XLA_FFI_Error_Create_Args args
    args.struct_size, args.extension_start = sizeof(args), NULL
    args.message, args.errc = message, code
    return frame.api.XLA_FFI_Error_Create(&args)


cdef bint asks_for_version(const XLA_FFI_CallFrame *frame) noexcept nogil:
    """Whether XLA wants to know the handler's version, as it does when that is registered.

    The answer is XLA's own, as far as the structs are known here: it serves those before for some
    time only, those after never. With 0.1 it does not say its own here.
    """
    cdef XLA_FFI_Metadata *metadata
    if frame.extension_start == NULL or frame.extension_start.type != XLA_FFI_Extension_Metadata:
        return False
    metadata = (<XLA_FFI_Metadata_Extension *> frame.extension_start).metadata
    metadata.api_version.major_version = XLA_FFI_API_MAJOR
    metadata.api_version.minor_version = (
        1 if frame.api == NULL else min(XLA_FFI_API_MINOR, frame.api.api_version.minor_version))
    metadata.traits = 0
    return True


# A call ------------------------------------------------------------------------------------------


cdef struct Batch:
    nx_norm norm  # of one item of the batch that jax.vmap makes
    Py_ssize_t shape[NORMEXT_MAX_NDIM + 1]
    double momentum
    int parameter_dtype
    Py_ssize_t parameters, statistics  # how many numbers they have
    int axes  # of the batch
    const int64_t *lengths  # of those axes
    Py_ssize_t items


cdef inline const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int i) noexcept nogil:
    return <const XLA_FFI_Buffer *> frame.args.args[i]


cdef inline const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int i) noexcept nogil:
    return <const XLA_FFI_Buffer *> frame.rets.rets[i]


cdef bint read_attribute(const XLA_FFI_CallFrame *frame, int i, int dtype, void *to) noexcept nogil:
    """Attributes are sorted by name. Those of a norm have 8 bytes each."""
    cdef const XLA_FFI_Scalar *scalar = <const XLA_FFI_Scalar *> frame.attrs.attrs[i]
    if frame.attrs.types[i] != XLA_FFI_AttrType_SCALAR or scalar.dtype != dtype:
        return False
    memcpy(to, scalar.value, 8)
    return True


cdef inline int element_type(int dtype) noexcept nogil:
    """-1 for what no norm takes."""
    if dtype == XLA_FFI_DataType_F32:
        return NORMEXT_FLOAT32
    if dtype == XLA_FFI_DataType_F64:
        return NORMEXT_FLOAT64
    if dtype == XLA_FFI_DataType_F16:
        return NORMEXT_FLOAT16
    return NORMEXT_BFLOAT16 if dtype == XLA_FFI_DataType_BF16 else -1


cdef inline Py_ssize_t product(const int64_t *dims, int n) noexcept nogil:
    cdef Py_ssize_t p = 1
    cdef int i
    for i in range(n):
        p *= dims[i]
    return p


cdef bint read_call(const XLA_FFI_CallFrame *frame, int args, int rets, Batch *b) noexcept nogil:
    """Fill in the call from its attributes and the shape of its first result (y or dx)."""
    cdef const XLA_FFI_Buffer *y
    cdef int64_t axis, groups, kind, ndim, training
    cdef int S64 = XLA_FFI_DataType_S64, F64 = XLA_FFI_DataType_F64, i
    if (frame.args.size != args or frame.rets.size != rets or frame.attrs.size != 7
            or not read_attribute(frame, 0, S64, &axis)
            or not read_attribute(frame, 1, F64, &b.norm.eps)
            or not read_attribute(frame, 2, S64, &groups)
            or not read_attribute(frame, 3, S64, &kind)
            or not read_attribute(frame, 4, F64, &b.momentum)
            or not read_attribute(frame, 5, S64, &ndim)
            or not read_attribute(frame, 6, S64, &training)):
        return False
    y = result(frame, 0)
    if not 0 <= axis < ndim <= min(y.rank, NORMEXT_MAX_NDIM):
        return False
    b.axes, b.lengths = y.rank - ndim, y.dims
    b.items = product(b.lengths, b.axes)
    b.norm.kind, b.norm.type = kind, element_type(y.dtype)
    b.norm.groups, b.norm.training, b.norm.relu = groups, training, False
    b.norm.ndim, b.norm.shape, b.norm.axis = ndim, &b.shape[1], axis
    for i in range(ndim):
        b.shape[1 + i] = y.dims[b.axes + i]
    if is_row_norm(&b.norm):
        # With an axis before all others, as an item may be one row: so they too can become one.
        b.shape[0] = 1
        b.norm.ndim, b.norm.shape, b.norm.axis = ndim + 1, b.shape, axis + 1
    if check(&b.norm) != NORMEXT_OK:
        return False
    b.parameters, b.statistics = parameters_of(&b.norm), statistics_of(&b.norm)
    b.parameter_dtype = F64 if y.dtype == F64 else XLA_FFI_DataType_F32
    return True


cdef inline Py_ssize_t numbers(const XLA_FFI_Buffer *a, const Batch *b) noexcept nogil:
    """Of one item."""
    return product(a.dims + b.axes, a.rank - b.axes)


cdef inline bint is_whole(const XLA_FFI_Buffer *a, const Batch *b) noexcept nogil:
    """Whether each item has its own."""
    return product(a.dims, b.axes) == b.items


cdef inline bint is_shared(const XLA_FFI_Buffer *a, const Batch *b) noexcept nogil:
    """Whether all items have the same, or none."""
    return product(a.dims, b.axes) == 1


cdef bint fits(const XLA_FFI_Buffer *a, const Batch *b, int dtype, Py_ssize_t n) noexcept nogil:
    """Whether an array has n numbers of that dtype for an item."""
    cdef int i
    if a.dtype != dtype or a.rank < b.axes or numbers(a, b) != n:
        return False
    for i in range(b.axes):
        if a.dims[i] != b.lengths[i] and a.dims[i] != 1:
            return False
    return True


cdef inline bint fits_or_none(const XLA_FFI_Buffer *a, const Batch *b, int dtype,
                              Py_ssize_t n) noexcept nogil:
    return fits(a, b, dtype, n) or fits(a, b, dtype, 0)


cdef inline Py_ssize_t itemsize(int dtype) noexcept nogil:
    if dtype == XLA_FFI_DataType_F64:
        return 8
    return 4 if dtype == XLA_FFI_DataType_F32 or dtype == XLA_FFI_DataType_U32 else 2


cdef void *item(const XLA_FFI_Buffer *a, const Batch *b, Py_ssize_t i) noexcept nogil:
    """The numbers of item i; NULL where there are none."""
    cdef Py_ssize_t n = numbers(a, b), index = 0, stride = 1
    cdef int axis
    if n == 0:
        return NULL
    for axis in range(b.axes - 1, -1, -1):
        if a.dims[axis] != 1:
            index += i % b.lengths[axis] * stride
            stride *= a.dims[axis]
        i //= b.lengths[axis]
    return <char *> a.data + index * n * itemsize(a.dtype)


cdef inline void join_items(Batch *b) noexcept nogil:
    """Make one item of all, with more examples: where these do not share statistics."""
    if b.norm.kind != NORMEXT_BATCH_NORM and b.items > 1:
        (<Py_ssize_t *> b.norm.shape)[0] *= b.items
        b.items = 1


cdef void *ended(const XLA_FFI_CallFrame *frame, int status) noexcept nogil:
    if status == NORMEXT_OK:
        return NULL
    if status == NORMEXT_NO_MEMORY:
        return failure(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "normext: no memory")
    return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "normext: a norm was refused")


# The handlers ------------------------------------------------------------------------------------


cdef bint running_fits(const XLA_FFI_Buffer *old, const XLA_FFI_Buffer *new,
                       const Batch *b) noexcept nogil:
    """In training there may be one, and is one anew; in evaluation it is needed."""
    cdef Py_ssize_t n = b.parameters if b.norm.kind == NORMEXT_BATCH_NORM else 0
    if old.dtype != XLA_FFI_DataType_F32 and old.dtype != XLA_FFI_DataType_F64:
        return False
    if not b.norm.training:
        return fits(old, b, old.dtype, n) and fits(new, b, new.dtype, 0)
    return (fits_or_none(old, b, old.dtype, n) and fits(new, b, old.dtype, numbers(old, b))
            and is_whole(new, b))


cdef void *running_item(const XLA_FFI_Buffer *old, const XLA_FFI_Buffer *new, const Batch *b,
                        Py_ssize_t i) noexcept nogil:
    """In training a copy, to be updated."""
    cdef void *copy = item(new, b, i)
    if copy == NULL:
        return item(old, b, i)
    memcpy(copy, item(old, b, i), numbers(old, b) * itemsize(old.dtype))
    return copy


cdef void *handle_forward(const XLA_FFI_CallFrame *frame) noexcept nogil:
    """x, gamma, beta, running_mean, running_var -> y, mean, rstd, and both running anew."""
    cdef Batch b
    cdef nx_io io
    cdef const XLA_FFI_Buffer *x
    cdef const XLA_FFI_Buffer *gamma
    cdef const XLA_FFI_Buffer *beta
    cdef const XLA_FFI_Buffer *y
    cdef const XLA_FFI_Buffer *mean
    cdef const XLA_FFI_Buffer *rstd
    cdef Py_ssize_t i
    cdef int status = NORMEXT_OK
    if asks_for_version(frame):
        return NULL
    if not read_call(frame, 5, 5, &b):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                       "normext: not a call of its forward passes")
    x, gamma, beta = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    y, mean, rstd = result(frame, 0), result(frame, 1), result(frame, 2)
    if not (fits(x, &b, y.dtype, numbers(y, &b))
            and fits_or_none(gamma, &b, b.parameter_dtype, b.parameters)
            and fits_or_none(beta, &b, b.parameter_dtype, b.parameters)
            and fits(mean, &b, XLA_FFI_DataType_U32, 2 * b.statistics) and is_whole(mean, &b)
            and fits(rstd, &b, XLA_FFI_DataType_U32, 2 * b.statistics) and is_whole(rstd, &b)
            and running_fits(argument(frame, 3), result(frame, 3), &b)
            and running_fits(argument(frame, 4), result(frame, 4), &b)):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                       "normext: arrays do not fit together")
    if is_whole(x, &b) and is_shared(gamma, &b) and is_shared(beta, &b):
        join_items(&b)
    memset(&io, 0, sizeof(io))
    io.running.momentum = b.momentum
    io.running.single_mean = argument(frame, 3).dtype == XLA_FFI_DataType_F32
    io.running.single_var = argument(frame, 4).dtype == XLA_FFI_DataType_F32
    for i in range(b.items):
        io.x.data, io.y.data = item(x, &b, i), item(y, &b, i)
        io.gamma, io.beta = item(gamma, &b, i), item(beta, &b, i)
        io.mean, io.rstd = <double *> item(mean, &b, i), <double *> item(rstd, &b, i)
        io.running.mean = running_item(argument(frame, 3), result(frame, 3), &b, i)
        io.running.var = running_item(argument(frame, 4), result(frame, 4), &b, i)
        status = forward(&b.norm, &io)
        if status != NORMEXT_OK:
            break
    return ended(frame, status)


cdef void write_doubles(const double *source, const XLA_FFI_Buffer *a, const Batch *b,
                        Py_ssize_t i) noexcept nogil:
    """As item i of an array of floats."""
    cdef void *to = item(a, b, i)
    cdef Py_ssize_t j
    for j in range(numbers(a, b)):
        if a.dtype == XLA_FFI_DataType_F32:
            (<float *> to)[j] = <float> source[j]
        else:
            (<double *> to)[j] = source[j]


cdef void *handle_backward(const XLA_FFI_CallFrame *frame) noexcept nogil:
    """x, dy, gamma, mean, rstd -> dx, dgamma, dbeta, of which the last two may not be wanted."""
    cdef Batch b
    cdef nx_io io
    cdef const XLA_FFI_Buffer *x
    cdef const XLA_FFI_Buffer *dy
    cdef const XLA_FFI_Buffer *gamma
    cdef const XLA_FFI_Buffer *mean
    cdef const XLA_FFI_Buffer *rstd
    cdef const XLA_FFI_Buffer *dx
    cdef const XLA_FFI_Buffer *dgamma
    cdef const XLA_FFI_Buffer *dbeta
    cdef Py_ssize_t i
    cdef int status = NORMEXT_OK
    if asks_for_version(frame):
        return NULL
    if not read_call(frame, 5, 3, &b):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                       "normext: not a call of its backward passes")
    x, dy, gamma = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    mean, rstd = argument(frame, 3), argument(frame, 4)
    dx, dgamma, dbeta = result(frame, 0), result(frame, 1), result(frame, 2)
    if not (fits(x, &b, dx.dtype, numbers(dx, &b)) and fits(dy, &b, dx.dtype, numbers(dx, &b))
            and fits_or_none(gamma, &b, b.parameter_dtype, b.parameters)
            and fits(mean, &b, XLA_FFI_DataType_U32, 2 * b.statistics)
            and fits(rstd, &b, XLA_FFI_DataType_U32, 2 * b.statistics)
            and fits_or_none(dgamma, &b, b.parameter_dtype, b.parameters) and is_whole(dgamma, &b)
            and fits_or_none(dbeta, &b, b.parameter_dtype, b.parameters) and is_whole(dbeta, &b)):
        return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                       "normext: arrays do not fit together")
    if (numbers(dgamma, &b) == 0 and numbers(dbeta, &b) == 0 and is_shared(gamma, &b)
            and is_whole(x, &b) and is_whole(dy, &b) and is_whole(mean, &b) and is_whole(rstd, &b)):
        join_items(&b)
    memset(&io, 0, sizeof(io))
    io.dgamma = <double *> malloc(2 * b.parameters * sizeof(double))
    io.dbeta = io.dgamma + b.parameters
    if io.dgamma == NULL:
        return ended(frame, NORMEXT_NO_MEMORY)
    for i in range(b.items):
        io.x.data, io.dy.data, io.dx.data = item(x, &b, i), item(dy, &b, i), item(dx, &b, i)
        io.gamma = item(gamma, &b, i)
        io.mean, io.rstd = <double *> item(mean, &b, i), <double *> item(rstd, &b, i)
        status = backward(&b.norm, &io)
        if status != NORMEXT_OK:
            break
        write_doubles(io.dgamma, dgamma, &b, i)
        write_doubles(io.dbeta, dbeta, &b, i)
    free(io.dgamma)
    return ended(frame, status)


handlers = {
    "forward": PyCapsule_New(<void *> &handle_forward, NULL, NULL),
    "backward": PyCapsule_New(<void *> &handle_backward, NULL, NULL),
}
