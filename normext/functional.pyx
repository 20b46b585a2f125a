"""The public functions: they check arguments, allocate results and call the compiled loops.

Arrays whose memory the loops can walk are used where they lie. Others (strided along the innermost axis, byte-swapped, unaligned)
are copied a block at a time.

What a call fuses with the norm is named by an argument of the forward pass, and saves a pass of its own through memory both ways:
``activation='relu'`` of batch norm, whose backward pass finds the mask again from x, and ``residual=r`` of layer and RMS norm, which
return the sum ``x + r`` too and take its own gradient as `dsum`.
"""

cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.string cimport memcmp, memcpy

import os
import zlib

import numpy as np

from normext._core.columns cimport (
    ColumnGroups,
    column_groups_backward,
    columns_backward,
    normalize_column_groups,
    normalize_columns,
)
from normext._core.kernels cimport (
    NX_BFLOAT16,
    NX_FLOAT16,
    NX_FLOAT32,
    NX_FLOAT64,
    Operand,
    Running,
    Statistic,
    nx_any_outside,
    nx_finish_moments,
    nx_kernels,
    nx_moments,
    nx_rescale_columns,
    read_moments,
    update_moments,
)
from normext._core.runs cimport (
    ABOUT_ZERO,
    ALONG_RUN,
    CENTRED,
    GIVEN,
    PER_GROUP,
    PER_RUN,
    Runs,
    Statistics,
    affine_runs,
    grouped_backward,
    layer_backward,
    normalize_runs,
    normalize_sums,
    runs_backward,
)
from normext._core.runtime cimport norm_kernels

from normext._core.warnings_off import quietly

cdef enum:
    BLOCK = 1 << 15  # elements copied at a time from an array that cannot be walked: they stay in the second-level cache

cnp.import_array()

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

# Whether backward passes look for a change of what their caches refer to. That reads it once more in each pass.
cdef bint debugging = os.environ.get("NORMEXT_DEBUG", "0") not in ("", "0")


cdef class Cache:
    """What a backward pass needs of its forward pass: references and statistics, no copy of x.

    Attributes
    ----------
    x, gamma, beta : ndarray
        The arguments; gamma and beta in the dtype of x (float32 if that has 16 bits), or None. With a residual, x is the sum.
    mean, rstd : ndarray of float64
        Mean and ``1 / sqrt(variance + eps)`` of each channel (batch norm) or row (layer norm).
    axis : int
        Not negative.
    eps : float
    training : bool
        Whether the statistics are those of x and depend on it.
    activation : {'relu', None}
        What followed the norm in the same call.
    """

    cdef readonly cnp.ndarray x, gamma, beta, mean, rstd
    cdef readonly int axis
    cdef readonly double eps
    cdef readonly bint training
    cdef readonly str activation
    cdef str norm
    cdef bint in_place
    # What x was in the forward pass. Its caller can give it another shape, other strides or another dtype in place.
    cdef char *x_data
    cdef object x_dtype
    cdef int x_ndim
    cdef cnp.npy_intp *x_layout  # its shape, then its strides
    cdef dict checksums  # of the arrays that a backward pass reads, by name, with NORMEXT_DEBUG

    def __dealloc__(self):
        PyMem_Free(self.x_layout)


cpdef Cache new_cache(str norm, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean, cnp.ndarray rstd, int axis,
                      double eps, bint training, bint in_place, str activation=None):
    """From its parts; `normext.torch` puts together again what autograd has kept apart."""
    cdef Cache cache = Cache.__new__(Cache)
    cdef int ndim = cnp.PyArray_NDIM(x)
    cache.norm = norm
    cache.x, cache.gamma, cache.beta, cache.mean, cache.rstd = x, gamma, beta, mean, rstd
    cache.axis, cache.eps, cache.training, cache.in_place, cache.activation = axis, eps, training, in_place, activation
    cache.x_data, cache.x_dtype, cache.x_ndim = data(x), x.descr, ndim
    cache.x_layout = <cnp.npy_intp *> PyMem_Malloc(2 * ndim * sizeof(cnp.npy_intp))
    if cache.x_layout == NULL:
        raise MemoryError("no memory for what a backward pass needs")
    memcpy(cache.x_layout, cnp.PyArray_DIMS(x), ndim * sizeof(cnp.npy_intp))
    memcpy(cache.x_layout + ndim, cnp.PyArray_STRIDES(x), ndim * sizeof(cnp.npy_intp))
    return cache


cdef bint x_lies_as_it_did(Cache c) noexcept:
    cdef size_t bytes = c.x_ndim * sizeof(cnp.npy_intp)
    return (cnp.PyArray_NDIM(c.x) == c.x_ndim and data(c.x) == c.x_data and c.x.descr is c.x_dtype
            and memcmp(cnp.PyArray_DIMS(c.x), c.x_layout, bytes) == 0
            and memcmp(cnp.PyArray_STRIDES(c.x), c.x_layout + c.x_ndim, bytes) == 0)


cdef dict checksums_of(Cache c):
    arrays = {"x": c.x, "gamma": c.gamma, "beta": c.beta}
    return {name: zlib.crc32(np.ascontiguousarray(a).view(np.uint8).data) for name, a in arrays.items() if a is not None and a.size}


cdef Cache finished(Cache c):
    """The cache when all that it refers to has been written."""
    if debugging and not c.in_place:
        c.checksums = checksums_of(c)
    return c


# Arguments -------------------------------------------------------------------------------------------------------------------


cdef int bfloat16 = -1  # its type number, once ml_dtypes has given it one and an array of it came by


cdef cnp.ndarray as_array(object a, str name):
    """NumPy would drop a mask without a word."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, as its mask would be lost: fill it first (filled) or leave out what it hides")
    return np.asarray(a)


cdef cnp.ndarray floating_array(object a, str name):
    """a as an array of floats, of any strides and byte order: itself if it is one, integers as float64."""
    global bfloat16
    cdef cnp.ndarray array = a if cnp.PyArray_CheckExact(a) else as_array(a, name)
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT or cnp.PyArray_TYPE(array) == cnp.NPY_DOUBLE:
        return array
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16:
        return array
    if array.dtype.name == "bfloat16":
        bfloat16 = cnp.PyArray_TYPE(array)
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    raise TypeError(
        f"{name} must be an array of float32, float64, float16 or bfloat16 (or of integers, taken as float64), got dtype {array.dtype}"
    )


cdef inline int computing_type(cnp.ndarray x) noexcept:
    """The type that x is computed in: its own, or float32 if that has 16 bits."""
    return cnp.NPY_DOUBLE if cnp.PyArray_TYPE(x) == cnp.NPY_DOUBLE else cnp.NPY_FLOAT


cdef object computing_dtype(cnp.ndarray x):
    return np.float64 if computing_type(x) == cnp.NPY_DOUBLE else np.float32


cdef inline bint is_plain(cnp.ndarray x) noexcept:
    """Contiguous, aligned and native."""
    return cnp.PyArray_ISCARRAY_RO(x)


cdef int checked_axis(object axis, int ndim) except -1:
    cdef Py_ssize_t i
    try:
        i = axis
    except (TypeError, OverflowError):
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    if not -ndim <= i < ndim:
        raise np.exceptions.AxisError(i, ndim, "axis")
    return i + ndim if i < 0 else i


cdef bint checked_bool(object value, str name) except -1:
    if value is True or value is False:
        return value
    if isinstance(value, (np.bool_, int)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


cdef bint checked_activation(object activation) except -1:
    """Whether it is a relu."""
    if activation is not None and activation != "relu":
        raise ValueError(f"activation must be 'relu' or None, got {activation!r}")
    return activation is not None


cdef double checked_number(object value, str name, double low, double high) except? -1:
    cdef double number
    try:
        number = value
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    return number


cdef bint same_dims(cnp.ndarray a, int ndim, const cnp.npy_intp *dims) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != ndim:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) != dims[i]:
            return False
    return True


cdef tuple shape_of(int ndim, const cnp.npy_intp *dims):
    return tuple([dims[i] for i in range(ndim)])


cdef cnp.ndarray parameter(object p, str name, cnp.ndarray x, int ndim, const cnp.npy_intp *dims):
    """gamma or beta: contiguous, in the type that x is computed in, of the wanted shape; None stays None."""
    cdef cnp.ndarray array
    if p is None:
        return None
    if not (cnp.PyArray_CheckExact(p) and cnp.PyArray_TYPE(<cnp.ndarray> p) == computing_type(x)
            and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> p)):
        array = as_array(p, name)
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}")
        if same_dims(array, ndim, dims):
            p = np.array(array, computing_dtype(x), order="C")
        else:
            p = array
    array = p
    if not same_dims(array, ndim, dims):
        raise ValueError(f"{name} must have shape {shape_of(ndim, dims)}, got {np.shape(array)}")
    return array


cdef cnp.ndarray running_statistic(object r, str name, cnp.npy_intp channels, bint updated):
    cdef cnp.ndarray array
    if r is None:
        return None
    if not isinstance(r, np.ndarray) or (<object> r).dtype.kind != "f":
        raise TypeError(f"{name} must be an ndarray of floats, got {getattr(r, 'dtype', type(r).__name__)}")
    array = r if cnp.PyArray_CheckExact(r) else as_array(r, name)
    if not same_dims(array, 1, &channels):
        raise ValueError(f"{name} must have shape ({channels},), got {np.shape(array)}")
    if updated and not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name} is updated in place in training, but it is read-only")
    return array


cdef bint same_memory(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether element for element two arrays of one shape and dtype are the same memory."""
    cdef int i
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i) and cnp.PyArray_DIM(a, i) > 1:
            return False
    return cnp.PyArray_ISNOTSWAPPED(a) == cnp.PyArray_ISNOTSWAPPED(b)


cdef inline bint in_one_piece(cnp.ndarray a, cnp.ndarray b) noexcept:
    return cnp.PyArray_ISONESEGMENT(a) and cnp.PyArray_ISONESEGMENT(b)


cdef inline bint in_reach(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two arrays that are each in one piece share memory."""
    return data(a) < data(b) + cnp.PyArray_NBYTES(b) and data(b) < data(a) + cnp.PyArray_NBYTES(a)


cdef bint overlaps(cnp.ndarray a, cnp.ndarray b) except -1:
    if in_one_piece(a, b):
        return in_reach(a, b)
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


cdef cnp.ndarray result_array(object out, cnp.ndarray x, cnp.ndarray over, str over_name, tuple inputs):
    """`out`, checked, or a new array in the layout and dtype of x.

    out may be the very memory of `over`, whose numbers are each read before its own is written; it may share none with `inputs`.
    """
    cdef cnp.ndarray array
    cdef int i
    if out is None:
        if cnp.PyArray_IS_C_CONTIGUOUS(x):
            return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
        return np.empty_like(x, dtype=x.dtype.newbyteorder("="), subok=False)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}")
    if not cnp.PyArray_CheckExact(out):
        as_array(out, "out")  # what is returned is out itself
    array = out
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"out must have dtype {x.dtype.newbyteorder('=')}, got {array.dtype}")
    if not same_dims(array, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x)):
        raise ValueError(f"out must have shape {np.shape(x)}, got {np.shape(array)}")
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError("out must be writable, but it is read-only")
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_STRIDE(array, i) == 0 and cnp.PyArray_DIM(array, i) > 1 and cnp.PyArray_SIZE(array) > 0:
            raise ValueError(f"out must have its own memory for every element, got strides {(<object> array).strides}")
    if not same_memory(array, over) and overlaps(array, over):
        raise ValueError(f"out must be {over_name} itself or share no memory with it, but it overlaps {over_name}")
    for name, other in inputs:
        if other is not None and overlaps(array, other):
            raise ValueError(f"out must share no memory with {name}, but they overlap")
    return array


cdef inline char *data(cnp.ndarray a) noexcept:
    return NULL if a is None else <char *> cnp.PyArray_DATA(a)


cdef inline double *doubles(cnp.ndarray a) noexcept:
    return NULL if a is None else <double *> cnp.PyArray_DATA(a)


cdef inline const nx_kernels *kernels_of(cnp.ndarray x, Py_ssize_t n, const char *read, const char *written) noexcept:
    cdef int number = cnp.PyArray_TYPE(x), element_type
    if number == cnp.NPY_FLOAT:
        element_type = NX_FLOAT32
    elif number == cnp.NPY_DOUBLE:
        element_type = NX_FLOAT64
    else:
        element_type = NX_FLOAT16 if number == cnp.NPY_FLOAT16 else NX_BFLOAT16
    return norm_kernels(element_type, cnp.PyArray_SIZE(x), n, read, written)


cdef inline cnp.ndarray empty(int ndim, const cnp.npy_intp *dims, int type_number):
    return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *> dims, type_number, 0)


cdef inline cnp.ndarray empty_like(cnp.ndarray block):
    """NumPy's own runs a few lines of Python, at which a Ctrl-C would end a call half way."""
    return empty(cnp.PyArray_NDIM(block), cnp.PyArray_DIMS(block), cnp.PyArray_TYPE(block))


cdef cnp.ndarray parameter_gradient(const double *sums, const double *factor, int ndim, const cnp.npy_intp *dims, cnp.ndarray x):
    """``sums * factor`` (1 if that is NULL) as an array in the shape of a parameter and the type that x is computed in."""
    cdef int type_number = computing_type(x)
    cdef cnp.ndarray gradient = empty(ndim, dims, type_number)
    cdef Py_ssize_t i
    if type_number == cnp.NPY_FLOAT:
        for i in range(cnp.PyArray_SIZE(gradient)):
            (<float *> cnp.PyArray_DATA(gradient))[i] = <float> (sums[i] if factor == NULL else sums[i] * factor[i])
    else:
        for i in range(cnp.PyArray_SIZE(gradient)):
            doubles(gradient)[i] = sums[i] if factor == NULL else sums[i] * factor[i]
    return gradient


# Layouts ---------------------------------------------------------------------------------------------------------------------

# Batch norm's view of up to three arrays of one shape: (outer, channel, inner), where inner is contiguous in all of them, or is 1 and
# the channels are contiguous; the latter is walked down columns.
cdef struct BatchLayout:
    Py_ssize_t outer, channels, inner
    bint columns
    Operand operands[3]


cdef list merge_axes(tuple arrays, axes):
    """[length, (stride in each array, in bytes)] of the axes, where neighbours become one if all arrays lie so."""
    cdef list merged = []
    for i in axes:
        length, strides = arrays[0].shape[i], tuple([a.strides[i] for a in arrays])
        if length == 1:
            continue
        if merged and all([outer == length * inner for outer, inner in zip(merged[-1][1], strides)]):
            merged[-1] = (merged[-1][0] * length, strides)
        else:
            merged.append((length, strides))
    return merged


cdef bint walkable(tuple arrays):
    """Native byte order, aligned, and strides that are whole elements."""
    return all([cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray> a) and all([s % a.itemsize == 0 for s in a.strides]) for a in arrays])


cdef bint batch_layout(tuple arrays, int axis, BatchLayout *layout) except -1:
    """Fill in the layout; False where there is none."""
    cdef cnp.ndarray a, first = arrays[0]
    cdef Py_ssize_t i, outer = 1, inner = 1
    cdef bint contiguous = True
    for i in range(axis):
        outer *= cnp.PyArray_DIM(first, i)
    for i in range(axis + 1, cnp.PyArray_NDIM(first)):
        inner *= cnp.PyArray_DIM(first, i)
    layout.channels = cnp.PyArray_DIM(first, axis)
    for array in arrays:
        contiguous = contiguous and is_plain(array)
    if contiguous:
        if layout.channels == 1:
            outer, inner = 1, outer * inner
        layout.outer, layout.inner, layout.columns = outer, inner, inner == 1
        for i in range(len(arrays)):
            layout.operands[i] = Operand(data(arrays[i]), inner, layout.channels * inner)
        return True
    if not walkable(arrays):
        return False
    others = sorted([i for i in range(first.ndim) if i != axis], key=lambda i: -abs((<object> first).strides[i]))
    merged = merge_axes(arrays, others)
    itemsizes = tuple([a.itemsize for a in arrays])
    layout.inner, layout.columns = 1, False
    if merged and merged[-1][1] == itemsizes:
        layout.inner, _ = merged.pop()
    elif layout.channels == 1 or tuple([a.strides[axis] for a in arrays]) == itemsizes:
        layout.columns = True
    else:
        return False
    if len(merged) > 1:
        return False
    layout.outer, strides = merged[0] if merged else (1, (0,) * len(arrays))
    for i in range(len(arrays)):
        a = arrays[i]
        layout.operands[i] = Operand(data(a), cnp.PyArray_STRIDE(a, axis) // a.itemsize, strides[i] // a.itemsize)
    return True


cdef bint row_layout(tuple arrays, int axis, Runs *shape, Operand *operands) except -1:
    """Layer norm's view of up to four arrays of one shape, (row, contiguous run); False where there is none."""
    cdef cnp.ndarray a, first = arrays[0]
    cdef Py_ssize_t i
    cdef bint contiguous = True
    shape.groups = shape.runs = shape.n = 1
    for i in range(cnp.PyArray_NDIM(first)):
        if i < axis:
            shape.groups *= cnp.PyArray_DIM(first, i)
        else:
            shape.n *= cnp.PyArray_DIM(first, i)
    for array in arrays:
        contiguous = contiguous and is_plain(array)
    if contiguous:
        for i in range(len(arrays)):
            operands[i] = Operand(data(arrays[i]), shape.n, 0)
        return True
    if not walkable(arrays):
        return False
    rows, columns = merge_axes(arrays, range(axis)), merge_axes(arrays, range(axis, first.ndim))
    if len(rows) > 1 or len(columns) > 1 or (columns and columns[0][1] != tuple([a.itemsize for a in arrays])):
        return False
    for i in range(len(arrays)):
        a = arrays[i]
        operands[i] = Operand(data(a), rows[0][1][i] // a.itemsize if rows else 0, 0)
    return True


def blocks(tuple shape, axes):
    """Indices that cut an array into blocks of about BLOCK elements, along the longest of `axes`, then the next."""
    index = [slice(None)] * len(shape)

    def cut(axes, size):
        if size <= BLOCK or not axes:
            yield tuple(index)
            return
        axis = axes[0]
        step = max(1, shape[axis] * BLOCK // size)
        for start in range(0, shape[axis], step):
            index[axis] = slice(start, min(start + step, shape[axis]))
            yield from cut(axes[1:], size // shape[axis] * step)
        index[axis] = slice(None)

    size = 1
    for length in shape:
        size *= length
    return cut(sorted(axes, key=lambda i: -shape[i]), size)


cdef cnp.ndarray block_copy(cnp.ndarray a, tuple index, bint wide=False):
    """A block as the kernels want it: contiguous and native, and in the type that it is computed in, or in float64."""
    return np.array(a[index], dtype=np.float64 if wide else computing_dtype(a), order="C")


cdef cnp.ndarray out_of_range(cnp.ndarray x, cnp.ndarray rstd):
    """None, or powers of two that bring deviations with those rstd near 1, where a backward pass could overflow, or underflow.

    It multiplies by the cube of rstd and sums dy * (x - mean). Data with such deviations are rare: their blocks are copied, scaled so,
    and computed in float64.
    """
    cdef double largest = 1e100 if computing_type(x) == cnp.NPY_DOUBLE else 1e10
    if not nx_any_outside(doubles(rstd), cnp.PyArray_SIZE(rstd), 1 / largest, largest):
        return None
    _, exponents = np.frexp(np.where(rstd > 0, rstd, 1))
    return np.ldexp(1.0, np.clip(exponents, -1000, 1000))


cdef cnp.ndarray scaled_copy(cnp.ndarray a, tuple index, object scale):
    """A block, in float64 and times a scale of as many axes, if there is one."""
    return block_copy(a, index) if scale is None else block_copy(a, index, True) * scale


cdef cnp.ndarray float64(cnp.ndarray p):
    return None if p is None else p.astype(np.float64)


cdef int put_block(cnp.ndarray to, object index, cnp.ndarray block, object scale=None, object more=None) except -1:
    """Store a block, times a scale and plus what else there is."""
    if scale is not None:
        block *= scale
    if more is not None:
        block += more
    to[index] = block
    return 0


# Batch norm ------------------------------------------------------------------------------------------------------------------


cdef int batch_forward(BatchLayout *layout, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, bint training, double eps, bint relu,
                       double *mean, double *rstd, double *var, const Running *running) except -1:
    """Operands x, y, in either geometry; see `normalize_columns`."""
    cdef Operand x_ = layout.operands[0], y_ = layout.operands[1]
    cdef const nx_kernels *kernels = kernels_of(x, layout.channels if layout.columns else layout.inner, x_.data, y_.data)
    if layout.columns:
        return normalize_columns(kernels, layout.outer, layout.channels, layout.operands[0], layout.operands[1], data(gamma),
                                 data(beta), training, eps, relu, mean, rstd, var, running)
    if not training:
        if running != NULL:
            read_moments(running, 0, layout.channels, eps, mean, rstd)
        return affine_runs(kernels, Runs(layout.outer, layout.channels, layout.inner, 0),
                           Operand(x_.data, x_.run_stride, x_.group_stride), Operand(y_.data, y_.run_stride, y_.group_stride),
                           data(gamma), data(beta), relu, mean, rstd)
    normalize_runs(kernels, Runs(layout.channels, layout.outer, layout.inner, 0), layout.operands[0], layout.operands[1], data(gamma),
                   data(beta), PER_GROUP, CENTRED, eps, relu, mean, rstd, var)
    if running != NULL:
        update_moments(running, 0, layout.channels, mean, var)
    return 0


cdef int batch_backward(BatchLayout *layout, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, bint training, bint relu, bint given,
                        double count, const double *mean, const double *rstd, const double *pivots, double *sums,
                        double *dots) except -1:
    """Operands x, dy, dx, in either geometry."""
    cdef const nx_kernels *kernels = kernels_of(x, layout.channels if layout.columns else layout.inner, layout.operands[1].data,
                                                layout.operands[2].data)
    if layout.columns:
        return columns_backward(kernels, layout.outer, layout.channels, layout.operands[0], layout.operands[1],
                                layout.operands[2], data(gamma), data(beta), training, relu, given, count, mean, rstd, pivots, sums, dots)
    return runs_backward(kernels, Runs(layout.channels, layout.outer, layout.inner, 0), layout.operands[0], layout.operands[1],
                         Operand(NULL, 0, 0), layout.operands[2], data(gamma), data(beta), PER_GROUP, CENTRED if training else GIVEN,
                         relu, given, count, mean, rstd, pivots, sums, dots)


cdef object per_channel(cnp.ndarray p, int ndim, int axis):
    """One number for each channel, broadcast against x."""
    return None if p is None else (<object> p).reshape([-1 if i == axis else 1 for i in range(ndim)])


def moments_by_blocks(cnp.ndarray x, int axis, double eps, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray var):
    """Each channel's mean, inverse standard deviation and variance, of an array that has no layout."""
    cdef BatchLayout layout
    cdef cnp.ndarray x_block, block_mean, block_rstd, block_var, m2, scale = None
    cdef Py_ssize_t all_channels = mean.shape[0], j
    cdef double size = <double> (x.size // x.shape[axis])
    for attempt in range(2):  # the second with scales that the first has found
        count, mean[:], m2 = np.zeros(all_channels), 0, np.zeros(all_channels)
        for index in blocks((<object> x).shape, range(x.ndim)):
            x_block, channels = block_copy(x, index), index[axis]
            if scale is not None:
                x_block *= per_channel(scale[channels], x.ndim, axis)
            block_mean, block_rstd, block_var = np.empty((3, x_block.shape[axis]))
            batch_layout((x_block,), axis, &layout)
            layout.operands[1].data = NULL
            batch_forward(&layout, x_block, None, None, True, eps, False, doubles(block_mean), doubles(block_rstd), doubles(block_var),
                          NULL)
            n = x_block.size // x_block.shape[axis]
            # The merge of kernels.h, for all channels of the block at once; the first block's mean as it is.
            total = count[channels] + n
            mean[channels] = np.where(count[channels] == 0, block_mean, mean[channels])
            delta = block_mean - mean[channels]
            m2[channels] += n * block_var + delta * delta * (count[channels] * (n / total))
            mean[channels] += delta * (n / total)
            count[channels] = total
        if attempt == 0:
            scale = np.ones(all_channels)
            if not nx_rescale_columns(&kernels_of(x, 0, NULL, NULL).range, all_channels, size, doubles(mean), doubles(m2),
                                      doubles(scale)):
                break
    for j in range(all_channels):
        nx_finish_moments(nx_moments(size, doubles(mean)[j], doubles(m2)[j]), doubles(scale)[j], eps, doubles(mean) + j,
                          doubles(rstd) + j, doubles(var) + j)


def batch_forward_by_blocks(cnp.ndarray x, cnp.ndarray y, int axis, cnp.ndarray gamma, cnp.ndarray beta, double eps, bint relu,
                            cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray var):
    """batch_forward for arrays that have no layout. With a var it is training: mean, rstd and var are computed."""
    cdef BatchLayout layout
    cdef cnp.ndarray x_block, y_block
    if var is not None:
        moments_by_blocks(x, axis, eps, mean, rstd, var)
    for index in blocks((<object> x).shape, range(x.ndim)):
        x_block = block_copy(x, index)
        y_block = empty_like(x_block)
        channels = index[axis]
        batch_layout((x_block, y_block), axis, &layout)
        batch_forward(&layout, x_block, None if gamma is None else gamma[channels], None if beta is None else beta[channels], False,
                      eps, relu, doubles(mean[channels]), doubles(rstd[channels]), NULL, NULL)
        put_block(y, index, y_block)


cdef int gate_block(cnp.ndarray x, tuple index, int axis, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray mean, cnp.ndarray rstd,
                    cnp.ndarray dy_block) except -1:
    """Set dy to 0 where the relu's result, found again as in the forward pass, is not above 0."""
    cdef BatchLayout layout
    cdef cnp.ndarray x_block = block_copy(x, index), y_block = empty_like(x_block)
    batch_layout((x_block, y_block), axis, &layout)
    batch_forward(&layout, x_block, gamma, beta, False, 0, True, doubles(mean), doubles(rstd), NULL, NULL)
    dy_block[y_block.astype(x.dtype) <= 0] = 0
    return 0


cdef cnp.ndarray far_pivots(cnp.ndarray dy, int axis, cnp.ndarray sums, double count):
    """The means of channels whose gradients are far from zero, by some of them, and 0 for others; None if there are none."""
    mean = sums / count
    far = np.ones(mean.shape[0], bool)
    for i in range(1, 8, 2):
        sample = dy[tuple([slice(None) if j == axis else i * dy.shape[j] // 8 for j in range(dy.ndim)])]
        far &= abs(sample.astype(np.float64) - mean) < abs(mean) / 4  # nx_near of kernels.h
    return np.where(far, mean, 0) if far.any() else None


def batch_backward_by_blocks(cnp.ndarray x, cnp.ndarray dy, cnp.ndarray dx, int axis, cnp.ndarray gamma, cnp.ndarray beta, bint training,
                             bint relu, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray scale, cnp.ndarray sums, cnp.ndarray dots,
                             tuple passes, double count):
    """batch_backward for arrays that have no layout, or are out of range: all sums first, then dx; or one of both.

    Where x is scaled, so are the dots.
    """
    cdef BatchLayout layout
    cdef cnp.ndarray x_block, dy_block, dx_block, block_sums, block_dots, pivots = None
    cdef cnp.ndarray factors = gamma, scaled_mean = mean, scaled_rstd = rstd
    cdef list left = list(passes)
    cdef bint given
    if scale is not None:
        factors, scaled_mean, scaled_rstd = float64(gamma), mean * scale, rstd / scale
    while left:
        given = left.pop(0)
        if not given:
            sums[:] = dots[:] = 0
        for index in blocks((<object> x).shape, range(x.ndim)):
            channels = index[axis]
            block_scale = None if scale is None else per_channel(scale[channels], x.ndim, axis)
            x_block, dy_block = scaled_copy(x, index, block_scale), block_copy(dy, index, scale is not None)
            if relu:
                gate_block(x, index, axis, None if gamma is None else gamma[channels], None if beta is None else beta[channels],
                           mean[channels], rstd[channels], dy_block)
            dx_block = empty_like(x_block)
            block_sums, block_dots = (sums[channels], dots[channels]) if given else np.empty((2, x_block.shape[axis]))
            batch_layout((x_block, dy_block, dx_block), axis, &layout)
            if not given:
                layout.operands[2].data = NULL
            batch_backward(&layout, x_block, None if factors is None else factors[channels], None, training, False, given, count,
                           doubles(scaled_mean[channels]), doubles(scaled_rstd[channels]),
                           NULL if pivots is None else doubles(pivots[channels]), doubles(block_sums), doubles(block_dots))
            if given:
                put_block(dx, index, dx_block, block_scale)
            else:
                sums[channels] += block_sums
                dots[channels] += block_dots
        if training and left and pivots is None:  # all numbers of a channel are here
            pivots = far_pivots(dy, axis, sums, count)
            if pivots is not None:
                left.insert(0, False)  # the sums again, about them


cdef bint is_plain_statistic(cnp.ndarray s) noexcept:
    """Whether the loops take it as it lies; None too."""
    return s is None or is_plain(s) and cnp.PyArray_TYPE(s) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)


cdef Statistic statistic(cnp.ndarray s) noexcept:
    return Statistic(data(s), s is not None and cnp.PyArray_TYPE(s) == cnp.NPY_FLOAT)


cdef void copy_numbers(cnp.ndarray source, cnp.ndarray to) noexcept:
    """From a contiguous array to one of the same dtype and any stride, with nothing that could fail. None is nothing to copy."""
    cdef Py_ssize_t i, size
    if to is None:
        return
    size = cnp.PyArray_ITEMSIZE(to)
    for i in range(cnp.PyArray_DIM(to, 0)):
        memcpy(data(to) + i * cnp.PyArray_STRIDE(to, 0), data(source) + i * size, size)


cdef bint surely_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    return a is None or b is None or in_one_piece(a, b) and not in_reach(a, b)


cdef int check_updated(cnp.ndarray mean, cnp.ndarray var, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta) except -1:
    """Running statistics that are updated in place share no memory with each other or with what is read."""
    cdef cnp.ndarray running
    if (surely_apart(mean, var) and surely_apart(mean, x) and surely_apart(mean, gamma) and surely_apart(mean, beta)
            and surely_apart(var, x) and surely_apart(var, gamma) and surely_apart(var, beta)):
        return 0
    if mean is not None and var is not None and overlaps(mean, var):
        raise ValueError("running_mean and running_var must be two arrays that share no memory, but they overlap")
    for name, array in (("running_mean", mean), ("running_var", var)):
        if array is None:
            continue
        running = array
        if cnp.PyArray_DIM(running, 0) > 1 and abs(cnp.PyArray_STRIDE(running, 0)) < cnp.PyArray_ITEMSIZE(running):
            raise ValueError(f"{name} must have its own memory for every channel, got strides {(<object> running).strides}")
        for read, other in (("x", x), ("gamma", gamma), ("beta", beta)):
            if other is not None and overlaps(running, other):
                raise ValueError(f"{name} is updated in place and must share no memory with {read}, but they overlap")
    return 0


def batch_norm(x, gamma=None, beta=None, *, running_mean=None, running_var=None, training=True, momentum=0.9, unbiased=False, eps=1e-5,
               axis=1, activation=None, out=None):
    """Normalize each channel of x over the batch: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    Algorithm 1 of [1]_. In training, mean and (biased) variance are those of the batch, taken for each channel over all other axes;
    in evaluation they are the running ones.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides: (N, D), (N, C, H, W) with ``axis=1``, (N, H, W, C) with ``axis=-1``. Integers are taken as
        float64. float16 and bfloat16 (the dtype of ml_dtypes) are storage: converted a block at a time, computed in float32.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x, or to float32 if that has 16 bits, as are their gradients.
        Default: 1 and 0.
    running_mean, running_var : ndarray of floats, shape (C,), optional
        Running statistics. In training they are updated in place where given,
        ``running = momentum * running + (1 - momentum) * batch``; in evaluation both are needed. They are given by name: second and
        third come gamma and beta, not these, as in PyTorch.
    training : bool, default True
        Whether to normalize with the batch's statistics or with the running ones.
    momentum : float, default 0.9
        The share of the old running statistics that an update keeps, from 0 to 1. PyTorch's momentum is one minus this.
    unbiased : bool, default False
        Whether `running_var` is that of an unbiased estimate, as PyTorch keeps it: of the batch's sum of squares divided by one less
        than the count. The batch itself is normalized with the biased variance in either case.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    axis : int, default 1
        The channel axis.
    activation : {'relu', None}, default None
        With 'relu', what is returned is ``maximum(y, 0)``, and the backward pass goes through both. It is done where the numbers are
        in registers: a relu of its own would read and write all of y once more, and its backward pass dy, dx and a mask. No mask is
        kept; the backward pass finds it again from x.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x`` the backward
        pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A channel that is constant gives exactly beta.
    cache : object
        For `batch_norm_backward`. It refers to x and gamma and holds two float64 numbers for each channel. These must not be changed
        before the backward pass, which sees it, and raises, only with ``NORMEXT_DEBUG=1`` in the environment.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or training or unbiased is not a bool.
    ValueError
        If a shape does not fit; in training, if there is nothing to take a mean of, or running statistics are to be updated (or
        `unbiased` is set) and a channel has one number alone; in evaluation, if a running statistic is missing; if a running statistic
        that is to be updated or `out` is read-only or overlaps an argument other than as said; if momentum or eps is out of range, or
        the activation is unknown. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    See Also
    --------
    layer_norm : normalizes each row instead.

    Notes
    -----
    Statistics are accumulated about a pivot near the mean, in blocks that are merged in float64 [2]_, so that data far from zero
    lose nothing. Results are bit-identical for every number of threads.

    Numbers of any size are normalized, those whose variance is beyond float64 (from about 1e154 on) too; a running variance is then
    infinite. A channel that holds a NaN or an infinity has NaN for statistics and becomes NaN; its neighbours do not change. Only a
    constant channel with eps 0, and one of float64 whose numbers lie within 6e-309, where the formula has no number, gives beta.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
           ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
           Stanford STAN-CS-79-773, 1979

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> y, cache = normext.batch_norm(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> y, cache = normext.batch_norm(x, running_mean=running_mean, running_var=running_var)
    >>> running_mean
    array([0.2, 0.4])
    >>> y, cache = normext.batch_norm(x, running_var=running_var, momentum=0.0, unbiased=True)
    >>> running_var
    array([2., 8.])
    """
    cdef BatchLayout layout
    cdef Running running
    cdef Cache cache
    cdef cnp.ndarray x_ = floating_array(x, "x"), y, mean, rstd, plain_mean, plain_var, var = None
    cdef int axis_ = checked_axis(axis, cnp.PyArray_NDIM(x_))
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x_, axis_)
    cdef cnp.ndarray gamma_ = parameter(gamma, "gamma", x_, 1, &channels), beta_ = parameter(beta, "beta", x_, 1, &channels)
    cdef bint training_ = checked_bool(training, "training"), unbiased_ = checked_bool(unbiased, "unbiased")
    cdef double momentum_ = checked_number(momentum, "momentum", 0, 1), eps_ = checked_number(eps, "eps", 0, 1e300)
    cdef cnp.ndarray running_mean_ = running_statistic(running_mean, "running_mean", channels, training_)
    cdef cnp.ndarray running_var_ = running_statistic(running_var, "running_var", channels, training_)
    cdef bint relu = checked_activation(activation)
    if channels == 0:
        raise ValueError(f"x has no channels: shape {np.shape(x_)}, axis {axis_}")
    if training_:
        if cnp.PyArray_SIZE(x_) == 0:
            raise ValueError(f"x has no rows to take a mean of in training: shape {np.shape(x_)}")
        if cnp.PyArray_SIZE(x_) == channels and (unbiased_ or momentum_ < 1 and not (running_mean is None and running_var is None)):
            raise ValueError("x must have more than one number a channel where running statistics are updated, as the variance of one is "
                             f"no estimate: got shape {np.shape(x_)}, axis {axis_}; training=False uses running statistics as they are")
        check_updated(running_mean_, running_var_, x_, gamma_, beta_)
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is needed with training=False, got None")
    y = result_array(out, x_, x_, "x", () if out is None else (("gamma", gamma_), ("beta", beta_), ("running_mean", running_mean_),
                                                               ("running_var", running_var_)))
    mean, rstd = empty(1, &channels, cnp.NPY_DOUBLE), empty(1, &channels, cnp.NPY_DOUBLE)
    running.momentum, running.correction = momentum_, 1
    if training_ and unbiased_:
        running.correction = (<double> cnp.PyArray_SIZE(x_)) / (cnp.PyArray_SIZE(x_) - channels)
    plain_mean, plain_var = running_mean_, running_var_
    if not (is_plain_statistic(running_mean_) and is_plain_statistic(running_var_)):
        plain_mean, plain_var = float64(running_mean_), float64(running_var_)
    running.mean, running.var = statistic(plain_mean), statistic(plain_var)
    # All memory is had before the loops update running statistics: they are updated both or, with a MemoryError, neither.
    cache = new_cache("batch_norm", x_, gamma_, beta_, mean, rstd, axis_, eps_, training_, out is not None and same_memory(y, x_),
                      activation)
    result = (y, cache)
    if cnp.PyArray_SIZE(x_) == 0:  # in evaluation
        read_moments(&running, 0, channels, eps_, doubles(mean), doubles(rstd))
    elif batch_layout((x_, y), axis_, &layout):
        if training_ and running_var_ is not None and not layout.columns:
            var = empty(1, &channels, cnp.NPY_DOUBLE)
        batch_forward(&layout, x_, gamma_, beta_, training_, eps_, relu, doubles(mean), doubles(rstd), doubles(var), &running)
    else:
        if training_:
            var = empty(1, &channels, cnp.NPY_DOUBLE)
        else:
            read_moments(&running, 0, channels, eps_, doubles(mean), doubles(rstd))
        quietly(batch_forward_by_blocks, x_, y, axis_, gamma_, beta_, eps_, relu, mean, rstd, var)
        if training_:
            update_moments(&running, 0, channels, doubles(mean), doubles(var))
    if training_ and not (plain_mean is running_mean_ and plain_var is running_var_):
        new_mean = None if running_mean_ is None else plain_mean.astype(running_mean_.dtype)
        new_var = None if running_var_ is None else plain_var.astype(running_var_.dtype)
        copy_numbers(new_mean, running_mean_)
        copy_numbers(new_var, running_var_)
    finished(cache)
    return result


cpdef Cache checked_cache(object cache, str norm):
    """The cache, if it is of that norm and still has its x."""
    cdef Cache c
    if not isinstance(cache, Cache) or (<Cache> cache).norm != norm:
        what = f"that of {(<Cache> cache).norm}" if isinstance(cache, Cache) else type(cache).__name__
        raise TypeError(f"cache must be what {norm} returned, got {what}")
    c = cache
    if c.in_place:
        raise ValueError(f"cache is of a call {norm}(x, ..., out=x), which wrote over the x that its gradients need")
    if not x_lies_as_it_did(c):
        raise ValueError(f"x must be as {norm} had it, of shape {shape_of(c.x_ndim, c.x_layout)} and dtype {c.x_dtype}, but its shape, "
                         f"strides or dtype were changed in place; it has shape {np.shape(c.x)} and dtype {c.x.dtype}")
    if c.checksums is not None:
        for name, checksum in checksums_of(c).items():
            if checksum != c.checksums[name]:
                raise ValueError(f"{name} must be as {norm} had it, but its numbers were changed before the backward pass")
    return c


cdef cnp.ndarray gradient_array(object out, Cache c, cnp.ndarray dy, cnp.ndarray dsum=None):
    """Where dx goes: over dy at most, and over nothing that a backward pass still reads."""
    cdef tuple inputs = ()
    if out is not None:
        inputs = (("x", c.x), ("gamma", c.gamma), ("beta", c.beta), ("cache.mean", c.mean), ("cache.rstd", c.rstd), ("dsum", dsum))
    return result_array(out, c.x, dy, "dy", inputs)


cdef cnp.ndarray like_x(object a, str name, cnp.ndarray x):
    """An array that must have the shape of x, in the dtype of x or converted to it."""
    cdef cnp.ndarray array = floating_array(a, name)
    if not same_dims(array, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x)):
        raise ValueError(f"{name} must have the shape of x, {np.shape(x)}, got {np.shape(array)}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        array = array.astype(x.dtype.newbyteorder("="))
    return array


def batch_norm_backward(dy, cache, *, out=None):
    """Gradients of `batch_norm` with respect to x, gamma and beta.

    In training, with ``xhat = (x - mean) * rstd`` and m numbers in a channel ([1]_, section 3, simplified):
    ``dx = gamma * rstd * (dy - sum(dy) / m - xhat * sum(dy * xhat) / m)``. In evaluation the statistics are constants and
    ``dx = gamma * rstd * dy``. After ``activation='relu'``, dy counts as 0 where y, as it was returned, was not above 0 (nor NaN).

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `batch_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `batch_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
           ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.batch_norm(np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]), gamma=np.ones(2))
    >>> dx, dgamma, dbeta = normext.batch_norm_backward(np.ones((3, 2)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a channel move together
    True
    >>> dbeta is None
    True
    """
    cdef Cache c = checked_cache(cache, "batch_norm")
    cdef BatchLayout layout
    cdef cnp.ndarray x = c.x, dy_ = like_x(dy, "dy", x), dx, sums
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x, c.axis)
    cdef cnp.npy_intp[2] two_channels = [2, channels]
    cdef double *dots
    cdef cnp.ndarray scale = out_of_range(x, c.rstd), rstd = c.rstd if scale is None else c.rstd / scale
    dx = gradient_array(out, c, dy_)
    sums = cnp.PyArray_EMPTY(2, two_channels, cnp.NPY_DOUBLE, 0)
    dots = doubles(sums) + channels
    if cnp.PyArray_SIZE(x) == 0:
        sums[...] = 0
    elif scale is None and batch_layout((x, dy_, dx), c.axis, &layout):
        batch_backward(&layout, x, c.gamma, c.beta, c.training, c.activation is not None, False,
                       <double> (cnp.PyArray_SIZE(x) // channels), doubles(c.mean), doubles(c.rstd), NULL, doubles(sums), dots)
    else:
        quietly(batch_backward_by_blocks, x, dy_, dx, c.axis, c.gamma, c.beta, c.training, c.activation is not None, c.mean, c.rstd,
                scale, sums[0], sums[1], (False, True), <double> (cnp.PyArray_SIZE(x) // channels))
    return (
        dx,
        None if c.gamma is None else parameter_gradient(dots, doubles(rstd), 1, &channels, x),
        None if c.beta is None else parameter_gradient(doubles(sums), NULL, 1, &channels, x),
    )


# Batch norm in parts ---------------------------------------------------------------------------------------------------------

# What `normext.distributed` puts messages between: `batch_norm` in evaluation is the part that is missing here.


def batch_moments(x, axis):
    """Mean and biased variance of each channel, (C,) in float64: the first pass of `batch_norm` alone."""
    cdef BatchLayout layout
    cdef cnp.ndarray x_ = floating_array(x, "x"), mean, rstd, var
    cdef int axis_ = checked_axis(axis, cnp.PyArray_NDIM(x_))
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x_, axis_)
    mean, rstd, var = np.zeros(channels), np.empty(channels), np.zeros(channels)
    if cnp.PyArray_SIZE(x_) == 0:
        return mean, var
    if batch_layout((x_,), axis_, &layout):
        layout.operands[1].data = NULL
        batch_forward(&layout, x_, None, None, True, 0.0, False, doubles(mean), doubles(rstd), doubles(var), NULL)
    else:
        quietly(moments_by_blocks, x_, axis_, 0, mean, rstd, var)
    return mean, var


def batch_backward_sums(dy, cache):
    """(2, C) in float64: sum(dy) and sum(dy * (x - mean)), with the cache of `batch_norm`: its backward pass's first half."""
    cdef Cache c = checked_cache(cache, "batch_norm")
    cdef BatchLayout layout
    cdef cnp.ndarray x = c.x, dy_ = like_x(dy, "dy", x), sums = np.zeros((2, x.shape[c.axis]))
    cdef cnp.ndarray scale = out_of_range(x, c.rstd)
    if cnp.PyArray_SIZE(x) == 0:
        return sums
    if scale is None and batch_layout((x, dy_, x), c.axis, &layout):
        layout.operands[2].data = NULL
        batch_backward(&layout, x, c.gamma, c.beta, True, c.activation is not None, False, 1.0, doubles(c.mean), doubles(c.rstd),
                       NULL, doubles(sums), doubles(sums) + x.shape[c.axis])
    else:
        quietly(batch_backward_by_blocks, x, dy_, dy_, c.axis, c.gamma, c.beta, True, c.activation is not None, c.mean, c.rstd,
                scale, sums[0], sums[1], (False,), 1.0)
        if scale is not None:
            sums[1] /= scale
    return sums


def batch_backward_apply(dy, cache, sums, count, *, out=None):
    """dx, from what `batch_backward_sums` gave for `count` numbers of a channel: its second half."""
    cdef Cache c = checked_cache(cache, "batch_norm")
    cdef BatchLayout layout
    cdef cnp.ndarray x = c.x, dy_ = like_x(dy, "dy", x), dx = gradient_array(out, c, dy_), sums_ = np.ascontiguousarray(sums)
    cdef cnp.ndarray scale = out_of_range(x, c.rstd)
    if cnp.PyArray_SIZE(x) == 0:
        return dx
    if scale is None and batch_layout((x, dy_, dx), c.axis, &layout):
        batch_backward(&layout, x, c.gamma, c.beta, True, c.activation is not None, True, count, doubles(c.mean), doubles(c.rstd),
                       NULL, doubles(sums_), doubles(sums_) + x.shape[c.axis])
    else:
        quietly(batch_backward_by_blocks, x, dy_, dx, c.axis, c.gamma, c.beta, True, c.activation is not None, c.mean, c.rstd,
                scale, sums_[0], sums_[1] if scale is None else sums_[1] * scale, (True,), count)
    return dx


# Layer and RMS norm ----------------------------------------------------------------------------------------------------------


def layer_forward_by_blocks(cnp.ndarray x, cnp.ndarray y, int axis, cnp.ndarray gamma, cnp.ndarray beta, Statistics statistics,
                            double eps, cnp.ndarray mean, cnp.ndarray rstd):
    """Rows that cannot be walked, some at a time."""
    cdef Runs shape
    cdef Operand[2] operands
    cdef cnp.ndarray x_block, y_block, block_mean, block_rstd
    for index in blocks((<object> x).shape, range(axis)):
        x_block = block_copy(x, index)
        y_block = empty_like(x_block)
        block_mean, block_rstd = np.empty((<object> x_block).shape[:axis]), np.empty((<object> x_block).shape[:axis])
        row_layout((x_block, y_block), axis, &shape, operands)
        normalize_runs(kernels_of(x_block, 0, NULL, NULL), shape, operands[0], operands[1], data(gamma), data(beta), ALONG_RUN,
                       statistics, eps, False, doubles(block_mean), doubles(block_rstd), NULL)
        put_block(y, index, y_block)
        mean[index[:axis]], rstd[index[:axis]] = block_mean, block_rstd


def layer_backward_by_blocks(cnp.ndarray x, cnp.ndarray dy, cnp.ndarray dx, int axis, cnp.ndarray gamma, Statistics statistics,
                             cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray scale, cnp.ndarray dsum, cnp.ndarray sums):
    """Rows that cannot be walked, or are out of range."""
    cdef Runs shape
    cdef Operand[3] operands
    cdef cnp.ndarray x_block, dy_block, dx_block
    cdef bint wide = scale is not None
    if wide:
        gamma, mean, rstd = float64(gamma), mean * scale, rstd / scale
    for index in blocks((<object> x).shape, range(axis)):
        block_scale = (<object> scale[index[:axis]]).reshape((<object> x[index]).shape[:axis] + (1,) * (x.ndim - axis)) if wide else None
        x_block, dy_block = scaled_copy(x, index, block_scale), block_copy(dy, index, wide)
        dx_block = empty_like(x_block)
        row_layout((x_block, dy_block, dx_block), axis, &shape, operands)
        layer_backward(kernels_of(x_block, 0, NULL, NULL), shape, operands[0], operands[1], Operand(NULL, 0, 0), operands[2],
                       data(gamma), statistics, doubles(np.ascontiguousarray(mean[index[:axis]])),
                       doubles(np.ascontiguousarray(rstd[index[:axis]])), doubles(sums), doubles(sums) + sums.shape[1])
        put_block(dx, index, dx_block, block_scale, None if dsum is None else block_copy(dsum, index, wide))


cdef tuple normalize_rows(str norm, object x, object gamma, object beta, object axis, object eps, object residual, object out):
    """Layer norm and RMS norm: arguments, result and cache; with a residual, the sum before the cache."""
    cdef Statistics statistics = CENTRED if norm == "layer_norm" else ABOUT_ZERO
    cdef Runs shape
    cdef Operand[4] operands
    cdef cnp.ndarray x_ = floating_array(x, "x"), y, mean, rstd, residual_ = None, total = x_
    cdef int axis_ = checked_axis(axis, cnp.PyArray_NDIM(x_)), row_ndim = cnp.PyArray_NDIM(x_) - axis_
    cdef const cnp.npy_intp *row_dims = cnp.PyArray_DIMS(x_) + axis_
    cdef cnp.ndarray gamma_ = parameter(gamma, "gamma", x_, row_ndim, row_dims)
    cdef cnp.ndarray beta_ = parameter(beta, "beta", x_, row_ndim, row_dims)
    cdef double eps_ = checked_number(eps, "eps", 0, 1e300)
    cdef int i
    for i in range(row_ndim):
        if row_dims[i] == 0:
            raise ValueError(f"x has rows without numbers: shape {np.shape(x_)}, axis {axis_}")
    if residual is not None:
        residual_ = like_x(residual, "residual", x_)
    y = result_array(out, x_, x_, "x", () if out is None else (("gamma", gamma_), ("beta", beta_), ("residual", residual_)))
    mean, rstd = empty(axis_, cnp.PyArray_DIMS(x_), cnp.NPY_DOUBLE), empty(axis_, cnp.PyArray_DIMS(x_), cnp.NPY_DOUBLE)
    if residual_ is not None:
        total = result_array(None, x_, x_, "x", ())
    if cnp.PyArray_SIZE(x_) == 0:
        pass
    elif residual_ is not None and row_layout((x_, residual_, total, y), axis_, &shape, operands):
        normalize_sums(kernels_of(x_, shape.n, NULL, operands[3].data), shape, operands[0], operands[1], operands[2], operands[3],
                       data(gamma_), data(beta_), statistics, eps_, doubles(mean), doubles(rstd))
    else:
        if residual_ is not None:
            np.add(x_, residual_, out=total)
        if row_layout((total, y), axis_, &shape, operands):
            normalize_runs(kernels_of(x_, shape.n, operands[0].data, operands[1].data), shape, operands[0], operands[1], data(gamma_),
                           data(beta_), ALONG_RUN, statistics, eps_, False, doubles(mean), doubles(rstd), NULL)
        else:
            quietly(layer_forward_by_blocks, total, y, axis_, gamma_, beta_, statistics, eps_, mean, rstd)
    cache = finished(new_cache(norm, total, gamma_, beta_, mean, rstd, axis_, eps_, True, out is not None and same_memory(y, total)))
    return (y, cache) if residual_ is None else (y, total, cache)


cdef tuple gradients_of_rows(str norm, object dy, object cache, object dsum, object out):
    """dx, dgamma and dbeta of layer norm and RMS norm."""
    cdef Statistics statistics = CENTRED if norm == "layer_norm" else ABOUT_ZERO
    cdef Cache c = checked_cache(cache, norm)
    cdef Runs shape
    cdef Operand[4] operands
    cdef cnp.ndarray x = c.x, dy_ = like_x(dy, "dy", x), dsum_ = None, dx, sums
    cdef int row_ndim = cnp.PyArray_NDIM(x) - c.axis
    cdef const cnp.npy_intp *row_dims = cnp.PyArray_DIMS(x) + c.axis
    cdef cnp.npy_intp[2] sums_shape = [2, 1]
    cdef double *dgamma
    cdef int i
    cdef cnp.ndarray scale = out_of_range(x, c.rstd)
    if dsum is not None:
        dsum_ = like_x(dsum, "dsum", x)
    dx = gradient_array(out, c, dy_, dsum_)
    for i in range(row_ndim):
        sums_shape[1] *= row_dims[i]
    sums = cnp.PyArray_ZEROS(2, sums_shape, cnp.NPY_DOUBLE, 0)
    dgamma = doubles(sums) + sums_shape[1]
    operands[3] = Operand(NULL, 0, 0)
    if cnp.PyArray_SIZE(x) == 0:
        pass
    elif scale is None and row_layout((x, dy_, dx) if dsum_ is None else (x, dy_, dx, dsum_), c.axis, &shape, operands):
        layer_backward(kernels_of(x, shape.n, operands[1].data, operands[2].data), shape, operands[0], operands[1], operands[3],
                       operands[2], data(c.gamma), statistics, doubles(c.mean), doubles(c.rstd), doubles(sums), dgamma)
    else:
        quietly(layer_backward_by_blocks, x, dy_, dx, c.axis, c.gamma, statistics, c.mean, c.rstd, scale, dsum_, sums)
    return (
        dx,
        None if c.gamma is None else parameter_gradient(dgamma, NULL, row_ndim, row_dims, x),
        None if c.beta is None else parameter_gradient(doubles(sums), NULL, row_ndim, row_dims, x),
    )


def layer_norm(x, gamma=None, beta=None, *, axis=-1, eps=1e-5, residual=None, out=None):
    """Normalize each row of x: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    [1]_, section 3. A row is `axis` and all axes after it together; its mean and (biased) variance are its own, in training and
    evaluation alike.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides. Integers are taken as float64; float16 and bfloat16 as by `batch_norm`.
    gamma, beta : array_like, shape ``x.shape[axis:]``, optional
        Scale and shift of each position in a row, converted to the dtype of x. Default: 1 and 0.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    residual : array_like, optional
        In the shape of x, converted to its dtype. What is normalized is then ``x + residual``, which is returned too, as the blocks of
        a transformer need it. Rows are added up and normalized while they are in cache: an addition of its own would write all of
        the sum and have it read again.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x`` without a
        residual the backward pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A row that is constant gives exactly beta.
    sum : ndarray
        ``x + residual``, in the shape and dtype of x. Only with a residual.
    cache : object
        For `layer_norm_backward`. It refers to x (or the sum) and gamma and holds two float64 numbers for each row; x must not be
        changed before the backward pass.

    Raises
    ------
    TypeError
        If a dtype is not one of the above.
    ValueError
        If a shape does not fit, a row has no numbers, `out` is read-only or overlaps an argument other than as said, or eps is
        negative. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    See Also
    --------
    batch_norm : normalizes each channel over the batch, and says how the statistics are taken.

    Notes
    -----
    A row that holds a NaN or an infinity becomes NaN; the others do not change. A constant row gives beta without an eps too.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    >>> import normext
    >>> y, cache = normext.layer_norm([[1.0, 3.0], [2.0, 6.0]], gamma=[1.0, 10.0], eps=0.0)
    >>> y
    array([[-1., 10.],
           [-1., 10.]])
    >>> y, total, cache = normext.layer_norm([[1.0, 3.0]], residual=[[1.0, 1.0]])
    >>> total
    array([[2., 4.]])
    """
    return normalize_rows("layer_norm", x, gamma, beta, axis, eps, residual, out)


def layer_norm_backward(dy, cache, *, dsum=None, out=None):
    """Gradients of `layer_norm` with respect to x, gamma and beta.

    With ``xhat = (x - mean) * rstd``, ``g = gamma * dy`` and n numbers in a row,
    ``dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)``: batch norm's ([1]_, section 3), rows and columns changed over.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `layer_norm` returned.
    dsum : array_like, optional
        The gradient with respect to the sum that a call with a residual returned, from where else it went; it is added to dx before
        that is written.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given. With a residual it is the gradient of that, too.
    dgamma, dbeta : ndarray, shape ``x.shape[axis:]``, or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `layer_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
           ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.layer_norm([[1.0, 3.0, 5.0]], gamma=[1.0, 1.0, 1.0], beta=[0.0, 0.0, 0.0])
    >>> dx, dgamma, dbeta = normext.layer_norm_backward(np.ones((1, 3)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a row move together
    True
    >>> dbeta
    array([1., 1., 1.])
    """
    return gradients_of_rows("layer_norm", dy, cache, dsum, out)


def rms_norm(x, gamma=None, *, axis=-1, eps=1e-6, residual=None, out=None):
    """Divide each row of x by its root mean square: ``y = gamma * x / sqrt(mean(x**2) + eps)``.

    [1]_, section 4. Layer norm without the mean: a row is `axis` and all axes after it together.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides. Integers are taken as float64; float16 and bfloat16 as by `batch_norm`.
    gamma : array_like, shape ``x.shape[axis:]``, optional
        Scale of each position in a row, converted to the dtype of x. Default: 1.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-6
        Added to the mean square. Not negative.
    residual : array_like, optional
        As for `layer_norm`: what is normalized is ``x + residual``, which is returned too.
    out : ndarray, optional
        As for `layer_norm`.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A row of zeros gives zeros.
    sum : ndarray
        ``x + residual``, in the shape and dtype of x. Only with a residual.
    cache : object
        For `rms_norm_backward`. It refers to x (or the sum) and gamma and holds two float64 numbers for each row (the mean is 0).

    Raises
    ------
    TypeError
        If a dtype is not one of the above.
    ValueError
        If a shape does not fit, a row has no numbers, `out` is read-only or overlaps an argument other than as said, or eps is
        negative. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    Notes
    -----
    A row that holds a NaN becomes NaN. One with an infinity has an infinite root mean square, and what is divided by it is 0, or NaN
    where x is infinite itself; its gradients are NaN.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, https://arxiv.org/abs/1910.07467

    Examples
    --------
    >>> import normext
    >>> y, cache = normext.rms_norm([[3.0, 4.0, 0.0, 0.0]], eps=0.0)
    >>> y
    array([[1.2, 1.6, 0. , 0. ]])
    """
    return normalize_rows("rms_norm", x, gamma, None, axis, eps, residual, out)


def rms_norm_backward(dy, cache, *, dsum=None, out=None):
    """Gradients of `rms_norm` with respect to x and gamma.

    With ``xhat = x * rstd``, ``g = gamma * dy`` and n numbers in a row, ``dx = rstd * (g - xhat * sum(g * xhat) / n)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `rms_norm` returned.
    dsum : array_like, optional
        The gradient with respect to the sum that a call with a residual returned, from where else it went; it is added to dx before
        that is written.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given. With a residual it is the gradient of that, too.
    dgamma : ndarray, shape ``x.shape[axis:]``, or None
        In the dtype of x; None if gamma was None.

    Raises
    ------
    TypeError
        If cache is not one of `rms_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> x = np.array([[3.0, 4.0]])
    >>> y, cache = normext.rms_norm(x, eps=0.0)
    >>> dx, dgamma = normext.rms_norm_backward(x, cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when x grows
    True
    """
    dx, dgamma, _ = gradients_of_rows("rms_norm", dy, cache, dsum, out)
    return dx, dgamma


# Group norm ------------------------------------------------------------------------------------------------------------------


# How examples lie in memory. With one number for each channel, a group is a run of its own, as a row is for layer norm.
cdef enum GroupLayout:
    CHANNELS_FIRST
    CHANNELS_LAST
    ONE_PIXEL
    COPIED


cdef tuple moved(tuple arrays, int axis, int to):
    cdef list views = []
    if axis == to:
        return arrays
    for a in arrays:  # a comprehension of Cython 3.3 frees its item twice where there is no memory for the list
        view = np.moveaxis(a, axis, to)
        views.append(view)
    return tuple(views)


cdef tuple group_layout(tuple arrays, int axis):
    """The layout of all arrays, and views of them with the channel axis where it wants them."""
    cdef tuple first, last
    cdef cnp.ndarray x = arrays[0]
    if cnp.PyArray_SIZE(x) == x.shape[0] * x.shape[axis] and all([is_plain(a) for a in arrays]):
        return ONE_PIXEL, arrays
    first = moved(arrays, axis, 1)
    if all([is_plain(a) for a in first]):
        return CHANNELS_FIRST, first
    last = moved(arrays, axis, x.ndim - 1)
    if all([is_plain(a) for a in last]):
        return CHANNELS_LAST, last
    return COPIED, first


cdef Runs channel_runs(cnp.ndarray x, Py_ssize_t num_groups):
    """x (N, C, ...) as groups of channels, each channel a run."""
    cdef Py_ssize_t N = x.shape[0], C = x.shape[1]
    return Runs(N * num_groups, C // num_groups, x.size // (N * C), C)


cdef Operand runs_operand(cnp.ndarray a, Runs shape):
    return Operand(data(a), shape.runs * shape.n, shape.n)


cdef ColumnGroups channel_columns(cnp.ndarray x, Py_ssize_t num_groups):
    """x (N, ..., C) as groups of columns."""
    cdef Py_ssize_t N = x.shape[0], C = x.shape[x.ndim - 1]
    return ColumnGroups(N, x.size // (N * C), num_groups, C // num_groups)


cdef Operand columns_operand(cnp.ndarray a, ColumnGroups shape):
    cdef Py_ssize_t C = shape.groups * shape.per_group
    return Operand(data(a), shape.rows * C, C)


cdef Operand group_operand(cnp.ndarray a, Py_ssize_t group, Py_ssize_t per_group):
    """One group of examples of one pixel: rows for layer norm."""
    return Operand(data(a) + group * per_group * cnp.PyArray_ITEMSIZE(a), cnp.PyArray_SIZE(a) // a.shape[0], 0)


cdef char *group_parameter(cnp.ndarray p, Py_ssize_t group, Py_ssize_t per_group):
    if p is None:
        return NULL
    return data(p) + group * per_group * cnp.PyArray_ITEMSIZE(p)


cpdef tuple group_forward(cnp.ndarray x, cnp.ndarray y, int axis, Py_ssize_t groups, cnp.ndarray gamma, cnp.ndarray beta, double eps):
    """Writes y; returns mean and rstd, (N, groups)."""
    cdef Py_ssize_t N = x.shape[0], per_group = x.shape[axis] // groups, group
    cdef cnp.ndarray mean, rstd, x_view, y_view, x_block, y_block
    cdef Runs runs
    cdef ColumnGroups columns
    layout, (x_view, y_view) = group_layout((x, y), axis)
    if layout == ONE_PIXEL:
        mean, rstd = np.empty((groups, N)), np.empty((groups, N))
        for group in range(groups):
            normalize_runs(kernels_of(x, per_group, data(x), data(y)), Runs(N, 1, per_group, 0), group_operand(x_view, group, per_group),
                           group_operand(y_view, group, per_group), group_parameter(gamma, group, per_group),
                           group_parameter(beta, group, per_group), ALONG_RUN, CENTRED, eps, False, doubles(mean) + group * N,
                           doubles(rstd) + group * N, NULL)
        return mean.T, rstd.T
    mean, rstd = np.empty((N, groups)), np.empty((N, groups))
    if layout == CHANNELS_LAST:
        columns = channel_columns(x_view, groups)
        normalize_column_groups(kernels_of(x, groups * per_group, data(x), data(y)), columns, columns_operand(x_view, columns),
                                columns_operand(y_view, columns), data(gamma), data(beta), eps, doubles(mean), doubles(rstd))
        return mean, rstd
    for index in [(slice(0, N),)] if layout == CHANNELS_FIRST else blocks((<object> x_view).shape, (0,)):
        piece, x_block, y_block = index[0], x_view, y_view
        if layout == COPIED:
            x_block = block_copy(x_view, (piece,))
            y_block = empty_like(x_block)
        runs = channel_runs(x_block, groups)
        normalize_runs(kernels_of(x_block, runs.n, data(x_block), data(y_block)), runs, runs_operand(x_block, runs),
                       runs_operand(y_block, runs), data(gamma), data(beta), PER_RUN, CENTRED, eps, False, doubles(mean[piece]),
                       doubles(rstd[piece]), NULL)
        if layout == COPIED:
            put_block(y_view, piece, y_block)
    return mean, rstd


cdef void add_rows(Py_ssize_t rows, Py_ssize_t n, const double *x, double *sum) noexcept:
    cdef Py_ssize_t i, j
    for i in range(rows):
        for j in range(n):
            sum[j] += x[i * n + j]


cpdef int group_backward(cnp.ndarray x, cnp.ndarray dy, cnp.ndarray dx, int axis, cnp.ndarray gamma, cnp.ndarray mean, cnp.ndarray rstd,
                         cnp.ndarray scale, cnp.ndarray dgamma, cnp.ndarray dbeta) except -1:
    """Writes dx, and adds the sums over all examples of dy * xhat and dy to dgamma and dbeta."""
    cdef Py_ssize_t N = x.shape[0], groups = mean.shape[1], per_group = x.shape[axis] // groups, group
    cdef cnp.ndarray work, x_view, dy_view, dx_view, x_block, dy_block, dx_block
    cdef Runs runs
    cdef ColumnGroups columns
    cdef cnp.ndarray block_scale = None
    cdef bint wide = scale is not None
    cdef double *sums  # sum(dy) and sum(dy * xhat) of every channel of every example
    cdef double *dots
    layout, (x_view, dy_view, dx_view) = group_layout((x, dy, dx), axis)
    if wide:
        layout, (x_view, dy_view, dx_view), gamma = COPIED, moved((x, dy, dx), axis, 1), float64(gamma)
        mean, rstd = mean * scale, rstd / scale
    if layout == ONE_PIXEL:
        mean, rstd = np.ascontiguousarray(mean.T), np.ascontiguousarray(rstd.T)
        for group in range(groups):
            layer_backward(kernels_of(x, per_group, data(dy), data(dx)), Runs(N, 1, per_group, 0), group_operand(x_view, group, per_group),
                           group_operand(dy_view, group, per_group), Operand(NULL, 0, 0), group_operand(dx_view, group, per_group),
                           group_parameter(gamma, group, per_group), CENTRED, doubles(mean) + group * N, doubles(rstd) + group * N,
                           doubles(dbeta) + group * per_group, doubles(dgamma) + group * per_group)
        return 0
    mean, rstd = np.ascontiguousarray(mean), np.ascontiguousarray(rstd)
    work = np.empty((3, N, groups * per_group))
    sums, dots = doubles(work), doubles(work) + N * groups * per_group
    if layout == CHANNELS_LAST:
        columns = channel_columns(x_view, groups)
        column_groups_backward(kernels_of(x, groups * per_group, data(dy), data(dx)), columns, columns_operand(x_view, columns),
                               columns_operand(dy_view, columns), columns_operand(dx_view, columns), data(gamma), doubles(mean),
                               doubles(rstd), sums, dots)
    else:
        for index in [(slice(0, N),)] if layout == CHANNELS_FIRST else blocks((<object> x_view).shape, (0,)):
            piece, x_block, dy_block, dx_block = index[0], x_view, dy_view, dx_view
            if layout == COPIED:
                if wide:
                    block_scale = (<object> scale[piece]).repeat(per_group, 1).reshape((-1, groups * per_group) + (1,) * (x.ndim - 2))
                x_block, dy_block = scaled_copy(x_view, (piece,), block_scale), block_copy(dy_view, (piece,), wide)
                dx_block = empty_like(x_block)
            runs = channel_runs(x_block, groups)
            grouped_backward(kernels_of(x_block, runs.n, data(dy_block), data(dx_block)), runs, runs_operand(x_block, runs),
                             runs_operand(dy_block, runs), runs_operand(dx_block, runs), data(gamma), doubles(mean[piece]),
                             doubles(rstd[piece]), doubles(work[0, piece]), doubles(work[1, piece]), doubles(work[2, piece]))
            if layout == COPIED:
                put_block(dx_view, piece, dx_block, block_scale)
    add_rows(N, groups * per_group, sums, doubles(dbeta))
    add_rows(N, groups * per_group, dots, doubles(dgamma))
    return 0


cdef tuple normalize_groups(str norm, object x, object num_groups, object gamma, object beta, object axis, object eps, object out):
    """Group norm and instance norm: arguments, result and cache."""
    cdef cnp.ndarray x_ = floating_array(x, "x"), y, mean, rstd
    cdef int axis_ = checked_axis(axis, cnp.PyArray_NDIM(x_))
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x_, axis_)
    cdef cnp.ndarray gamma_ = parameter(gamma, "gamma", x_, 1, &channels), beta_ = parameter(beta, "beta", x_, 1, &channels)
    cdef double eps_ = checked_number(eps, "eps", 0, 1e300)
    cdef Py_ssize_t groups
    try:
        groups = num_groups
    except (TypeError, OverflowError):
        raise TypeError(f"num_groups must be an integer, got {num_groups!r}") from None
    if axis_ == 0:
        raise ValueError("axis must not be 0, where the examples are")
    if groups < 1 or channels % groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {groups}")
    if cnp.PyArray_SIZE(x_) == 0 and cnp.PyArray_DIM(x_, 0) != 0:
        raise ValueError(f"x has groups without numbers: shape {np.shape(x_)}, axis {axis_}")
    y = result_array(out, x_, x_, "x", () if out is None else (("gamma", gamma_), ("beta", beta_)))
    if cnp.PyArray_SIZE(x_) == 0:
        mean, rstd = np.empty((x_.shape[0], groups)), np.empty((x_.shape[0], groups))
    elif is_plain(x_) and is_plain(y):
        mean, rstd = group_forward(x_, y, axis_, groups, gamma_, beta_, eps_)
    else:
        mean, rstd = quietly(group_forward, x_, y, axis_, groups, gamma_, beta_, eps_)
    return y, finished(new_cache(norm, x_, gamma_, beta_, mean, rstd, axis_, eps_, True, out is not None and same_memory(y, x_)))


cdef tuple gradients_of_groups(str norm, object dy, object cache, object out):
    """dx, dgamma and dbeta of group norm and instance norm."""
    cdef Cache c = checked_cache(cache, norm)
    cdef cnp.ndarray x = c.x, dy_ = like_x(dy, "dy", x), dx = gradient_array(out, c, dy_)
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x, c.axis)
    cdef cnp.ndarray dgamma = np.zeros(channels), dbeta = np.zeros(channels)
    if cnp.PyArray_SIZE(x) != 0:
        scale = out_of_range(x, c.rstd)
        if scale is None and is_plain(x) and is_plain(dy_) and is_plain(dx):
            group_backward(x, dy_, dx, c.axis, c.gamma, c.mean, c.rstd, None, dgamma, dbeta)
        else:
            quietly(group_backward, x, dy_, dx, c.axis, c.gamma, c.mean, c.rstd, scale, dgamma, dbeta)
    return (
        dx,
        None if c.gamma is None else parameter_gradient(doubles(dgamma), NULL, 1, &channels, x),
        None if c.beta is None else parameter_gradient(doubles(dbeta), NULL, 1, &channels, x),
    )


def group_norm(x, num_groups, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalize each group of channels of each example: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    [1]_. The channels are split into groups of neighbours; mean and (biased) variance are those of a group in one example, over its
    channels and all axes but the first. One group is layer norm (but for the shape of gamma), a group for each channel is instance
    norm.

    Parameters
    ----------
    x : array_like of float32 or float64
        Examples along the first axis, channels along `axis`. Integers are taken as float64; float16 and bfloat16 as by
        `batch_norm`.
    num_groups : int
        Divides the number of channels C.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x. Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x`` the backward
        pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given.
    cache : object
        For `group_norm_backward`. It refers to x and gamma and holds two float64 numbers for each group of each example.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or num_groups is not an integer.
    ValueError
        If num_groups does not divide the channels, a shape does not fit, a group has no numbers, `out` is read-only or overlaps an
        argument other than as said, or eps is negative. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    Notes
    -----
    A group that holds a NaN or an infinity becomes NaN; the others do not change. A constant group gives beta without an eps too.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.group_norm(np.array([[1.0, 3.0, 2.0, 6.0]]), 2, eps=0.0)
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """
    return normalize_groups("group_norm", x, num_groups, gamma, beta, axis, eps, out)


def group_norm_backward(dy, cache, *, out=None):
    """Gradients of `group_norm` with respect to x, gamma and beta.

    With ``xhat = (x - mean) * rstd``, ``g = gamma * dy`` and n numbers in a group,
    ``dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `group_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `group_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.group_norm(np.array([[1.0, 3.0, 2.0, 6.0]]), 2, beta=np.zeros(4))
    >>> dx, dgamma, dbeta = normext.group_norm_backward(np.ones((1, 4)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a group move together
    True
    """
    return gradients_of_groups("group_norm", dy, cache, out)


# Instance norm ---------------------------------------------------------------------------------------------------------------


def instance_norm(x, gamma=None, beta=None, *, axis=1, eps=1e-5, out=None):
    """Normalize each channel of each example: `group_norm` with a group for each channel.

    [1]_.

    Parameters
    ----------
    x : array_like of float32 or float64
        Examples along the first axis, channels along `axis`. Integers are taken as float64; float16 and bfloat16 as by
        `batch_norm`.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x. Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    out : ndarray, optional
        As for `group_norm`.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given.
    cache : object
        For `instance_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`; ValueError if there are no channels.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
           https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.instance_norm(np.array([[[1.0, 3.0], [2.0, 6.0]]]), eps=0.0)
    >>> y
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    cdef cnp.ndarray x_ = floating_array(x, "x")
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(x_, checked_axis(axis, cnp.PyArray_NDIM(x_)))
    return normalize_groups("instance_norm", x_, channels, gamma, beta, axis, eps, out)


def instance_norm_backward(dy, cache, *, out=None):
    """Gradients of `instance_norm` with respect to x, gamma and beta; see `group_norm_backward`.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `instance_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError, ValueError
        As `group_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.instance_norm(np.array([[[1.0, 3.0], [2.0, 6.0]]]), beta=np.zeros(2))
    >>> dx, dgamma, dbeta = normext.instance_norm_backward(np.ones((1, 2, 2)), cache)
    >>> dbeta
    array([2., 2.])
    """
    return gradients_of_groups("instance_norm", dy, cache, out)
