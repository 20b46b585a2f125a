# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""NumPy's arrays: what a norm and its arguments must be, results, and what a backward pass needs.

`forward` and `backward` are all that runs; which way a call goes, norms.pyx decides.
"""

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.string cimport memcmp, memcpy, memset

import os
import zlib

import numpy as np

from normext cimport (
    NORMEXT_APPLY, NORMEXT_BATCH_NORM, NORMEXT_BFLOAT16, NORMEXT_FLOAT16, NORMEXT_FLOAT32,
    NORMEXT_FLOAT64, NORMEXT_GROUP_NORM, NORMEXT_LAYER_NORM, NORMEXT_NO_CHANNELS,
    NORMEXT_NO_MEMORY, NORMEXT_NO_NUMBERS, NORMEXT_OK, NORMEXT_RMS_NORM, NORMEXT_SUMS,
    nx_array, nx_io, nx_norm,
)
from normext._core cimport norms
from normext._core.memory cimport empty, empty_like
from normext._core.runtime cimport kernels_for, run_tasks
from normext._core.sizes cimport (
    is_group_norm, is_row_norm, numbers_of, parameters_of, statistics_of,
)

cdef enum:
    LITTLE = 1 << 15  # elements, some 10 microseconds: up to there letting go of the GIL would show
    FEW = 256  # numbers of a parameter whose gradients are made on the stack, in 4 KiB

cnp.import_array()

# Whether backward passes look for a change of what their caches refer to. That reads it once more
# in each pass.
cdef bint debugging = os.environ.get("NORMEXT_DEBUG", "0") not in ("", "0")


# What a norm is ----------------------------------------------------------------------------------


KINDS = {
    "batch_norm": NORMEXT_BATCH_NORM,
    "layer_norm": NORMEXT_LAYER_NORM,
    "rms_norm": NORMEXT_RMS_NORM,
    "group_norm": NORMEXT_GROUP_NORM,
    "instance_norm": NORMEXT_GROUP_NORM,
}


cdef int element_type(object dtype) except -1:
    cdef int number = dtype.num
    if number == cnp.NPY_FLOAT:
        return NORMEXT_FLOAT32
    if number == cnp.NPY_DOUBLE:
        return NORMEXT_FLOAT64
    if number == cnp.NPY_FLOAT16:
        return NORMEXT_FLOAT16
    if dtype.name == "bfloat16":
        return NORMEXT_BFLOAT16
    raise TypeError(
        f"dtype must be float32, float64, float16 or bfloat16, got {dtype}"
    )


cdef inline int type_of(cnp.ndarray x) noexcept:
    """Of one that `floating_array` has let through."""
    cdef int number = cnp.PyArray_TYPE(x)
    if number == cnp.NPY_FLOAT:
        return NORMEXT_FLOAT32
    if number == cnp.NPY_DOUBLE:
        return NORMEXT_FLOAT64
    return NORMEXT_FLOAT16 if number == cnp.NPY_FLOAT16 else NORMEXT_BFLOAT16


@cython.freelist(8)
@cython.final
cdef class Norm:
    """A normalization: all that does not depend on the data, checked once.

    Parameters
    ----------
    kind : {'batch_norm', 'layer_norm', 'rms_norm', 'group_norm', 'instance_norm'}
    shape : tuple of int
        Of x.
    dtype : dtype
        Of x: float32, float64, float16 or bfloat16.
    axis : int, optional
        The channel axis; of layer and RMS norm, the first normalized axis. Default: 1 and -1.
    groups : int, default 1
        Of group norm. Instance norm has one for each channel.
    eps : float, optional
        Added to the variance. Default: 1e-5, and 1e-6 of RMS norm.
    training : bool, default True
        Whether batch norm takes the batch's statistics or given ones.
    activation : {'relu', None}, default None
        What follows batch norm.

    Raises
    ------
    TypeError, ValueError
        As the function of that name.

    Examples
    --------
    >>> from normext._core.arrays import Norm
    >>> norm = Norm("group_norm", (2, 6, 4, 4), "float32", groups=3)
    >>> norm
    Norm('group_norm', (2, 6, 4, 4), 'float32', axis=1, groups=3, eps=1e-05)
    >>> norm == Norm("group_norm", (2, 6, 4, 4), "float32", axis=-3, groups=3)
    True
    >>> Norm("group_norm", (2, 6, 4, 4), "float32", groups=4)
    Traceback (most recent call last):
    ValueError: num_groups must divide the 6 channels, got 4
    """

    cdef nx_norm c
    cdef Py_ssize_t few[6]
    cdef readonly str kind
    cdef readonly object dtype
    cdef tuple how  # what it was made of, beside shape and dtype, in `norm_for`

    def __init__(self, kind, shape, dtype, *, axis=None, groups=1, eps=None, training=True,
                 activation=None):
        cdef Py_ssize_t[64] dims
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        by_row = kind in ("layer_norm", "rms_norm")
        if len(shape) > 64:
            raise ValueError(f"shape must have at most 64 axes, got {len(shape)}")
        for i, length in enumerate(shape):
            dims[i] = length
        dtype = np.dtype(dtype)
        how = (
            kind,
            (-1 if by_row else 1) if axis is None else axis,
            groups,
            (1e-6 if kind == "rms_norm" else 1e-5) if eps is None else eps,
            training,
            activation,
        )
        describe(self, how, len(shape), dims, element_type(dtype))
        self.dtype = dtype.newbyteorder("=")

    def __dealloc__(self):
        if self.c.shape != &self.few[0]:
            PyMem_Free(<void *> self.c.shape)

    def fits(self, x):
        """Whether x is an array of its shape and dtype."""
        return cnp.PyArray_CheckExact(x) and fits(self, x)

    @property
    def shape(self):
        return shape_of(self.c.ndim, self.c.shape)

    @property
    def axis(self):
        return self.c.axis

    @property
    def groups(self):
        return self.c.groups

    @property
    def eps(self):
        return self.c.eps

    @property
    def training(self):
        return self.c.training

    @property
    def activation(self):
        return "relu" if self.c.relu else None

    @property
    def parameter_shape(self):
        """Of gamma and beta."""
        cdef const Py_ssize_t *dims
        cdef int ndim = parameter_axes(self, &dims)
        return shape_of(ndim, dims)

    @property
    def statistics(self):
        """How many means there are, and as many rstds."""
        return statistics_of(&self.c)

    def __reduce__(self):
        return norm_of, (self.kind, self.shape, self.dtype, self._options())

    def _options(self):
        options = {"axis": self.c.axis, "groups": self.c.groups, "eps": self.c.eps}
        options |= {"training": self.training, "activation": self.activation}
        return options

    def _key(self):
        return self.kind, self.shape, self.dtype, *self._options().values()

    def __eq__(self, other):
        return isinstance(other, Norm) and self._key() == (<Norm> other)._key()

    def __hash__(self):
        return hash(self._key())

    def __repr__(self):
        usual = {"groups": 1, "training": True, "activation": None}
        options = [
            f"{k}={v!r}" for k, v in self._options().items() if k not in usual or v != usual[k]
        ]
        return f"Norm({self.kind!r}, {self.shape}, {self.dtype.name!r}, {', '.join(options)})"


cdef inline bint fits(Norm norm, cnp.ndarray x) noexcept:
    return (cnp.PyArray_TYPE(x) == (<cnp.dtype> norm.dtype).type_num
            and same_dims(x, norm.c.ndim, norm.c.shape))


def norm_of(kind, shape, dtype, options):
    """For pickles."""
    return Norm(kind, shape, dtype, **options)


cdef int describe(Norm norm, tuple how, int ndim, const Py_ssize_t *dims, int type) except -1:
    """Fill in and check: `how` is kind, axis, groups, eps, training and activation."""
    cdef size_t size = ndim * sizeof(Py_ssize_t)
    cdef int wrong
    kind, axis, groups, eps, training, activation = how
    norm.kind, norm.c.kind, norm.c.type, norm.c.ndim = kind, KINDS[kind], type, ndim
    norm.c.axis = checked_axis(axis, ndim)  # a number has none: from here on there are dims
    norm.c.shape = &norm.few[0] if ndim <= 6 else <Py_ssize_t *> PyMem_Malloc(size)
    if norm.c.shape == NULL:
        raise MemoryError("no memory for a shape")
    memcpy(<void *> norm.c.shape, dims, size)
    norm.c.training = checked_bool(training, "training")
    norm.c.eps = checked_number(eps, "eps", 0, 1e300)
    norm.c.relu = checked_activation(activation)
    if is_group_norm(&norm.c):
        try:
            norm.c.groups = dims[norm.c.axis] if kind == "instance_norm" else groups
        except (TypeError, OverflowError):
            raise TypeError(f"num_groups must be an integer, got {groups!r}") from None
        if norm.c.axis == 0:
            raise ValueError("axis must not be 0, where the examples are")
    else:
        norm.c.groups = 1
    wrong = norms.check(&norm.c)
    if wrong != NORMEXT_OK:
        raise_wrong(norm, wrong)
    return 0


cdef int raise_wrong(Norm norm, int wrong) except -1:
    """What `check` has found, in words."""
    where = f"shape {norm.shape}, axis {norm.c.axis}"
    if wrong == NORMEXT_NO_CHANNELS:
        raise ValueError(f"x has no channels: {where}")
    if wrong == NORMEXT_NO_NUMBERS and norm.c.kind == NORMEXT_BATCH_NORM:
        raise ValueError(f"x has no rows to take a mean of in training: shape {norm.shape}")
    if wrong == NORMEXT_NO_NUMBERS:
        things = "groups" if is_group_norm(&norm.c) else "rows"
        raise ValueError(f"x has {things} without numbers: {where}")
    if is_group_norm(&norm.c):
        channels = norm.c.shape[norm.c.axis]
        raise ValueError(f"num_groups must divide the {channels} channels, got {norm.c.groups}")
    raise ValueError(f"{norm.kind} has no activation and nothing but training: {where}")


# What a backward pass needs ----------------------------------------------------------------------


@cython.freelist(8)
@cython.final
cdef class Cache:
    """What a backward pass needs of its forward pass: references and statistics, no copy of x.

    Attributes
    ----------
    norm : Norm
        What was done; `axis`, `eps`, `training` and `activation` are its.
    x, gamma, beta : ndarray
        The arguments; gamma and beta in the dtype of x (float32 if that has 16 bits), or None. With
        a residual, x is the sum.
    mean, rstd : ndarray of float64
        Mean and ``1 / sqrt(variance + eps)`` of each channel (batch norm), row (layer norm) or
        group of each example.
    """

    cdef readonly Norm norm
    cdef readonly cnp.ndarray x, gamma, beta
    cdef cnp.ndarray statistics  # mean, then rstd; or two arrays:
    cdef cnp.ndarray own_mean, own_rstd
    cdef bint in_place
    # How x lay in the forward pass. Its caller can give it another shape, other strides or another
    # dtype in place.
    cdef char *x_data
    cdef object x_dtype
    cdef Py_ssize_t few[6]
    cdef Py_ssize_t *x_strides
    cdef dict checksums  # of the arrays that a backward pass reads, by name, with NORMEXT_DEBUG

    def __dealloc__(self):
        if self.x_strides != &self.few[0]:
            PyMem_Free(self.x_strides)

    @property
    def mean(self):
        return self.own_mean if self.statistics is None else self.statistics[0, ...]

    @property
    def rstd(self):
        return self.own_rstd if self.statistics is None else self.statistics[1, ...]

    @property
    def axis(self):
        return self.norm.axis

    @property
    def eps(self):
        return self.norm.eps

    @property
    def training(self):
        return self.norm.training

    @property
    def activation(self):
        return self.norm.activation


def new_cache(Norm norm not None, cnp.ndarray x not None, cnp.ndarray gamma, cnp.ndarray beta,
              cnp.ndarray mean not None, cnp.ndarray rstd not None):
    """From its parts; `normext.torch` puts together again what autograd has kept apart."""
    cdef Cache cache = cache_of(norm, x, gamma, beta)
    cache.own_mean, cache.own_rstd = mean, rstd
    return cache


cdef Cache cache_of(Norm norm, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta):
    cdef Cache cache = Cache.__new__(Cache)
    cdef size_t size = cnp.PyArray_NDIM(x) * sizeof(Py_ssize_t)
    cache.norm, cache.x, cache.gamma, cache.beta = norm, x, gamma, beta
    cache.x_data, cache.x_dtype = data(x), x.descr
    cache.x_strides = &cache.few[0]
    if cnp.PyArray_NDIM(x) > 6:
        cache.x_strides = <Py_ssize_t *> PyMem_Malloc(size)
    if cache.x_strides == NULL:
        raise MemoryError("no memory for what a backward pass needs")
    memcpy(cache.x_strides, strides_of(x), size)
    return cache


cdef bint x_lies_as_it_did(Cache c) noexcept:
    cdef size_t size = c.norm.c.ndim * sizeof(Py_ssize_t)
    return (cnp.PyArray_NDIM(c.x) == c.norm.c.ndim and data(c.x) == c.x_data
            and c.x.descr is c.x_dtype
            and memcmp(dims_of(c.x), c.norm.c.shape, size) == 0
            and memcmp(strides_of(c.x), c.x_strides, size) == 0)


cdef dict checksums_of(Cache c):
    checksums = {}
    for name, a in (("x", c.x), ("gamma", c.gamma), ("beta", c.beta)):
        if a is not None and a.size:
            checksums[name] = zlib.crc32(np.ascontiguousarray(a).view(np.uint8).data)
    return checksums


cpdef Cache checked_cache(object cache, str kind):
    """The cache, if it is of that norm and still has its x."""
    cdef Cache c
    if not isinstance(cache, Cache) or (<Cache> cache).norm.kind != kind:
        what = type(cache).__name__
        if isinstance(cache, Cache):
            what = f"that of {(<Cache> cache).norm.kind}"
        raise TypeError(f"cache must be what {kind} returned, got {what}")
    c = cache
    if c.in_place:
        raise ValueError(
            f"cache is of a call {kind}(x, ..., out=x), which wrote over the x that its gradients "
            "need"
        )
    if not x_lies_as_it_did(c):
        raise ValueError(
            f"x must be as {kind} had it, of shape {c.norm.shape} and dtype {c.x_dtype}, but its "
            "shape, strides or dtype were changed in place; it has shape "
            f"{np.shape(c.x)} and dtype {c.x.dtype}"
        )
    if c.checksums is not None:
        for name, checksum in checksums_of(c).items():
            if checksum != c.checksums[name]:
                raise ValueError(
                    f"{name} must be as {kind} had it, but its numbers were changed before the "
                    "backward pass"
                )
    return c


# Arguments ---------------------------------------------------------------------------------------


cdef inline char *data(cnp.ndarray a) noexcept:
    return NULL if a is None else <char *> cnp.PyArray_DATA(a)


cdef inline double *doubles(cnp.ndarray a) noexcept:
    return NULL if a is None else <double *> cnp.PyArray_DATA(a)


cdef inline const Py_ssize_t *dims_of(cnp.ndarray a) noexcept:
    return <const Py_ssize_t *> cnp.PyArray_DIMS(a)


cdef inline const Py_ssize_t *strides_of(cnp.ndarray a) noexcept:
    return <const Py_ssize_t *> cnp.PyArray_STRIDES(a)


cdef cnp.ndarray as_array(object a, str name):
    """NumPy would drop a mask without a word."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array, as its mask would be lost: fill it first (filled) "
            "or leave out what it hides"
        )
    return np.asarray(a)


cdef cnp.ndarray floating_array(object a, str name):
    """a as an array of floats, of any strides: itself if it is one, integers as float64."""
    cdef cnp.ndarray array = a if cnp.PyArray_CheckExact(a) else as_array(a, name)
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT or number == cnp.NPY_DOUBLE or number == cnp.NPY_FLOAT16:
        return array
    if array.dtype.name == "bfloat16":
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    raise TypeError(
        f"{name} must be an array of float32, float64, float16 or bfloat16 (or of integers, taken "
        f"as float64), got dtype {array.dtype}"
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


cdef bint same_dims(cnp.ndarray a, int ndim, const Py_ssize_t *dims) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != ndim:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) != dims[i]:
            return False
    return True


cdef tuple shape_of(int ndim, const Py_ssize_t *dims):
    cdef list lengths = []
    for i in range(ndim):
        lengths.append(dims[i])
    return tuple(lengths)


cdef cnp.ndarray parameter(object p, str name, cnp.ndarray x, int ndim, const Py_ssize_t *dims):
    """gamma or beta: contiguous, in the type that x is computed in; None stays None."""
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


cdef cnp.ndarray like_x(object a, str name, cnp.ndarray x):
    """An array that must have the shape of x, in the dtype of x or converted to it."""
    cdef cnp.ndarray array = floating_array(a, name)
    if not same_dims(array, cnp.PyArray_NDIM(x), dims_of(x)):
        raise ValueError(f"{name} must have the shape of x, {np.shape(x)}, got {np.shape(array)}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        array = array.astype(x.dtype.newbyteorder("="))
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


cdef int check_own_memory(cnp.ndarray out) except -1:
    """That it has memory for every element."""
    cdef int i
    for i in range(cnp.PyArray_NDIM(out)):
        if (cnp.PyArray_STRIDE(out, i) == 0 and cnp.PyArray_DIM(out, i) > 1
                and cnp.PyArray_SIZE(out) > 0):
            raise ValueError(
                "out must have its own memory for every element, got strides "
                f"{(<object> out).strides}"
            )
    return 0


cdef cnp.ndarray result_array(object out, cnp.ndarray x, cnp.ndarray over, str over_name,
                              tuple inputs):
    """`out`, checked, or a new array in the layout and dtype of x.

    out may be the very memory of `over`, whose numbers are each read before its own is written; it
    may share none with `inputs`, pairs of names and arrays.
    """
    cdef cnp.ndarray array
    if out is None:
        return empty_like(x)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, got {type(out).__name__}")
    if not cnp.PyArray_CheckExact(out):
        as_array(out, "out")  # what is returned is out itself
    array = out
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"out must have dtype {x.dtype.newbyteorder('=')}, got {array.dtype}")
    if not same_dims(array, cnp.PyArray_NDIM(x), dims_of(x)):
        raise ValueError(f"out must have shape {np.shape(x)}, got {np.shape(array)}")
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError("out must be writable, but it is read-only")
    check_own_memory(array)
    if not same_memory(array, over) and overlaps(array, over):
        raise ValueError(
            f"out must be {over_name} itself or share no memory with it, but it overlaps "
            f"{over_name}"
        )
    for name, other in inputs:
        if other is not None and overlaps(array, other):
            raise ValueError(f"out must share no memory with {name}, but they overlap")
    return array


cdef inline void set_array(nx_array *to, cnp.ndarray a) noexcept:
    to.data = cnp.PyArray_DATA(a)
    to.strides = NULL if is_plain(a) else strides_of(a)
    to.swapped = not cnp.PyArray_ISNOTSWAPPED(a)


cdef int run(const nx_norm *norm, const nx_io *io, bint back, Py_ssize_t elements) except -1:
    """Without the GIL, unless there is so little to do that letting go of it would show."""
    cdef int status
    if elements <= LITTLE:
        status = norms.backward(norm, io) if back else norms.forward(norm, io)
    else:
        with nogil:
            status = norms.backward(norm, io) if back else norms.forward(norm, io)
    if status == NORMEXT_NO_MEMORY:
        raise MemoryError("no memory for a call's work")
    if status != NORMEXT_OK:
        raise SystemError(f"the loops refused a call that had been checked: {status}")
    return 0


# Running statistics ------------------------------------------------------------------------------


cdef cnp.ndarray running_statistic(object r, str name, const Py_ssize_t *channels, bint updated):
    cdef cnp.ndarray array
    if r is None:
        return None
    if not isinstance(r, np.ndarray) or (<object> r).dtype.kind != "f":
        raise TypeError(
            f"{name} must be an ndarray of floats, got {getattr(r, 'dtype', type(r).__name__)}"
        )
    array = r if cnp.PyArray_CheckExact(r) else as_array(r, name)
    if not same_dims(array, 1, channels):
        raise ValueError(f"{name} must have shape ({channels[0]},), got {np.shape(array)}")
    if updated and not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name} is updated in place in training, but it is read-only")
    if (updated and cnp.PyArray_DIM(array, 0) > 1
            and abs(cnp.PyArray_STRIDE(array, 0)) < cnp.PyArray_ITEMSIZE(array)):
        raise ValueError(
            f"{name} must have its own memory for every channel, got strides "
            f"{(<object> array).strides}"
        )
    return array


cdef inline bint surely_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    return a is None or b is None or in_one_piece(a, b) and not in_reach(a, b)


cdef int check_apart(cnp.ndarray mean, cnp.ndarray var, tuple read) except -1:
    """Statistics that are updated share no memory with each other, nor with what is `read`."""
    if not surely_apart(mean, var) and overlaps(mean, var):
        raise ValueError(
            "running_mean and running_var must be two arrays that share no memory, but they overlap"
        )
    for name, array in read:
        for running_name, running in (("running_mean", mean), ("running_var", var)):
            if not surely_apart(running, array) and overlaps(running, array):
                raise ValueError(
                    f"{running_name} is updated in place and must share no memory with {name}, but "
                    "they overlap"
                )
    return 0


cdef inline bint surely_apart_from_all(cnp.ndarray a, cnp.ndarray x, cnp.ndarray gamma,
                                       cnp.ndarray beta) noexcept:
    return surely_apart(a, x) and surely_apart(a, gamma) and surely_apart(a, beta)


cdef bint is_taken(cnp.ndarray s) noexcept:
    """Whether the loops take a statistic as it lies; None too."""
    return s is None or is_plain(s) and cnp.PyArray_TYPE(s) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)


cdef cnp.ndarray float64(cnp.ndarray p):
    return None if p is None else p.astype(np.float64)


cdef tuple set_running(nx_io *io, Norm norm, tuple running, cnp.ndarray x, cnp.ndarray gamma,
                       cnp.ndarray beta):
    """Checks running_mean, running_var, momentum and unbiased, and has the call use them.

    Returns the copies that it uses, where it does not take the arrays as they lie, or else None.
    """
    cdef cnp.ndarray mean, var
    cdef const Py_ssize_t *channels = norm.c.shape + norm.c.axis
    given_mean, given_var, momentum, unbiased = running
    io.running.unbiased = checked_bool(unbiased, "unbiased")
    io.running.momentum = checked_number(momentum, "momentum", 0, 1)
    mean = running_statistic(given_mean, "running_mean", channels, norm.c.training)
    var = running_statistic(given_var, "running_var", channels, norm.c.training)
    if not norm.c.training:
        if mean is None or var is None:
            missing = "running_mean" if mean is None else "running_var"
            raise ValueError(f"{missing} is needed with training=False, got None")
    elif (numbers_of(&norm.c, 0, norm.c.ndim) == channels[0]
            and (io.running.unbiased
                 or io.running.momentum < 1 and not (mean is None and var is None))):
        raise ValueError(
            "x must have more than one number a channel where running statistics are updated, as "
            f"the variance of one is no estimate: got shape {norm.shape}, axis {norm.c.axis}; "
            "training=False uses running statistics as they are"
        )
    elif not (surely_apart(mean, var) and surely_apart_from_all(mean, x, gamma, beta)
              and surely_apart_from_all(var, x, gamma, beta)):
        check_apart(mean, var, (("x", x), ("gamma", gamma), ("beta", beta)))
    copied = not (is_taken(mean) and is_taken(var))
    if copied:
        mean, var = float64(mean), float64(var)
    io.running.mean, io.running.var = data(mean), data(var)
    io.running.single_mean = mean is not None and cnp.PyArray_TYPE(mean) == cnp.NPY_FLOAT
    io.running.single_var = var is not None and cnp.PyArray_TYPE(var) == cnp.NPY_FLOAT
    return (mean, var) if copied else None


cdef void copy_numbers(cnp.ndarray source, cnp.ndarray to) noexcept:
    """From a contiguous array to one of its dtype and any stride, with nothing that could fail."""
    cdef Py_ssize_t i, size
    if to is None:
        return
    size = cnp.PyArray_ITEMSIZE(to)
    for i in range(cnp.PyArray_DIM(to, 0)):
        memcpy(data(to) + i * cnp.PyArray_STRIDE(to, 0), data(source) + i * size, size)


cdef int store_running(tuple running, tuple copies) except -1:
    """Back to where they were given: both, or none."""
    rounded = []
    for given, copy in zip(running, copies):
        rounded.append(None if copy is None else copy.astype(given.dtype))
    for given, copy in zip(running, rounded):
        copy_numbers(copy, given)
    return 0


# The passes --------------------------------------------------------------------------------------


# The norms of recent calls: a call that is made again finds its norm here, checked.
cdef enum:
    RECENT = 16
cdef list recent = [None] * RECENT


cdef inline bint is_of(Norm norm, tuple how, cnp.ndarray x) noexcept:
    """Whether a norm is of x and of the very same objects: 1.0 may be refused where 1 was not."""
    return (norm.how[0] is how[0] and norm.how[1] is how[1] and norm.how[2] is how[2]
            and norm.how[3] is how[3] and norm.how[4] is how[4] and norm.how[5] is how[5]
            and fits(norm, x))


cdef Norm norm_for(object norm, cnp.ndarray x):
    """A Norm: the one that is given, or of what it takes beside shape and dtype, as a tuple."""
    cdef Norm made
    cdef size_t slot = type_of(x)
    cdef int i
    if isinstance(norm, Norm):
        made = norm
        if not fits(made, x):
            raise ValueError(
                f"x must be of shape {made.shape} and {made.dtype}, got {np.shape(x)} and {x.dtype}"
            )
        return made
    for i in range(cnp.PyArray_NDIM(x)):
        slot = 31 * slot + <size_t> cnp.PyArray_DIM(x, i)
    slot = (slot ^ (slot >> 7) ^ (<size_t> <void *> (<tuple> norm)[0] >> 5)) % RECENT
    made = recent[slot]
    if made is not None and is_of(made, norm, x):
        return made
    made = Norm.__new__(Norm)
    made.how = norm
    made.dtype = x.descr if cnp.PyArray_ISNOTSWAPPED(x) else x.dtype.newbyteorder("=")
    describe(made, norm, cnp.PyArray_NDIM(x), dims_of(x), type_of(x))
    _, axis, groups, eps, _, _ = made.how
    if type(axis) is int and type(groups) is int and type(eps) is float:  # what nobody can change
        recent[slot] = made
    return made


cdef inline int parameter_axes(Norm norm, const Py_ssize_t **dims) noexcept:
    """Those of gamma and beta."""
    dims[0] = norm.c.shape + norm.c.axis
    return norm.c.ndim - norm.c.axis if is_row_norm(&norm.c) else 1


cdef cnp.ndarray new_statistics(Norm norm):
    """Mean and rstd as one array: to make another takes as long as a small call's work."""
    cdef Py_ssize_t[65] dims
    cdef int i, ndim = 1
    dims[0] = 2
    if norm.c.kind == NORMEXT_BATCH_NORM:
        dims[1] = norm.c.shape[norm.c.axis]
    elif is_group_norm(&norm.c):
        dims[1], dims[2], ndim = norm.c.shape[0], norm.c.groups, 2
    else:
        ndim = norm.c.axis
        for i in range(ndim):
            dims[1 + i] = norm.c.shape[i]
    return empty(1 + ndim, dims, cnp.NPY_DOUBLE)


cpdef tuple forward(object x, object norm, object gamma, object beta, tuple running,
                    object residual, object out):
    """The forward pass of any norm: y and the cache, and with a residual the sum between them.

    Parameters
    ----------
    norm : Norm or tuple
        Of x; as a tuple, (kind, axis, groups, eps, training, activation).
    running : tuple or None
        Of batch norm: running_mean, running_var, momentum and unbiased.
    x, gamma, beta, residual, out
        As the functions of `normext.functional` have them.
    """
    cdef cnp.ndarray x_ = floating_array(x, "x"), total = x_, y, residual_ = None
    cdef Norm n = norm_for(norm, x_)
    cdef const Py_ssize_t *dims
    cdef int ndim = parameter_axes(n, &dims)
    cdef cnp.ndarray gamma_ = parameter(gamma, "gamma", x_, ndim, dims)
    cdef cnp.ndarray beta_ = parameter(beta, "beta", x_, ndim, dims)
    cdef nx_io io
    cdef tuple inputs = (), copies = None, result
    cdef Cache cache
    memset(&io, 0, sizeof(nx_io))
    if running is not None:
        copies = set_running(&io, n, running, x_, gamma_, beta_)
    if residual is not None:
        residual_ = like_x(residual, "residual", x_)
    if out is not None:
        inputs = ("gamma", gamma_), ("beta", beta_), ("residual", residual_)
        if running is not None:
            inputs += ("running_mean", running[0]), ("running_var", running[1])
    y = result_array(out, x_, x_, "x", inputs)
    set_array(&io.x, x_)
    set_array(&io.y, y)
    if residual_ is not None:
        total = empty_like(x_)
        set_array(&io.residual, residual_)
        set_array(&io.sum, total)
    # All memory is had before the loops update running statistics: they are updated both or, with
    # a MemoryError, neither.
    cache = cache_of(n, total, gamma_, beta_)
    cache.in_place, cache.statistics = out is not None and same_memory(y, total), new_statistics(n)
    io.gamma, io.beta, io.mean = data(gamma_), data(beta_), doubles(cache.statistics)
    io.rstd = io.mean + cnp.PyArray_SIZE(cache.statistics) // 2
    result = (y, cache) if residual_ is None else (y, total, cache)
    run(&n.c, &io, False, cnp.PyArray_SIZE(x_))
    if copies is not None and n.c.training:
        store_running(running, copies)
    if debugging and not cache.in_place:
        cache.checksums = checksums_of(cache)  # now that all it refers to has been written
    return result


cdef struct Sums:
    const double *sums
    float *singles
    Py_ssize_t count, tasks


cdef void narrow_task(const void *job, Py_ssize_t task) noexcept nogil:
    cdef const Sums *s = <const Sums *> job
    cdef Py_ssize_t first = task * s.count // s.tasks, last = (task + 1) * s.count // s.tasks
    kernels_for(NORMEXT_FLOAT32, False).narrow(s.sums + first, last - first, s.singles + first)


cdef cnp.ndarray gradient(const double *sums, int ndim, const Py_ssize_t *dims, cnp.ndarray x):
    """In the shape of a parameter and the type that x is computed in."""
    cdef int type_number = computing_type(x)
    cdef cnp.ndarray array = empty(ndim, dims, type_number)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(array)
    cdef Sums s = Sums(sums, <float *> cnp.PyArray_DATA(array), n, max(1, n >> 12))
    if type_number != cnp.NPY_FLOAT:
        memcpy(doubles(array), sums, n * sizeof(double))
    elif run_tasks(narrow_task, &s, s.tasks, n) != NORMEXT_OK:
        raise MemoryError("no memory for gradients")
    return array


cdef cnp.ndarray gradient_array(object out, Cache c, cnp.ndarray dy, cnp.ndarray dsum):
    """Where dx goes: over dy at most, and over nothing that a backward pass still reads."""
    cdef tuple inputs = ()
    if out is not None:
        inputs = ("x", c.x), ("gamma", c.gamma), ("beta", c.beta), ("dsum", dsum)
        inputs += ("cache.mean", c.mean), ("cache.rstd", c.rstd)
    return result_array(out, c.x, dy, "dy", inputs)


cdef void set_backward(nx_io *io, Cache c, cnp.ndarray dy, cnp.ndarray dx) noexcept:
    memset(io, 0, sizeof(nx_io))
    set_array(&io.x, c.x)
    set_array(&io.dy, dy)
    if dx is not None:
        set_array(&io.dx, dx)
    io.gamma, io.beta = data(c.gamma), data(c.beta)
    if c.statistics is None:
        io.mean, io.rstd = doubles(c.own_mean), doubles(c.own_rstd)
    else:
        io.mean = doubles(c.statistics)
        io.rstd = io.mean + cnp.PyArray_SIZE(c.statistics) // 2


cpdef tuple backward(object dy, object cache, str kind, object dsum, object out):
    """The backward pass of any norm: dx, dgamma and dbeta."""
    cdef Cache c = checked_cache(cache, kind)
    cdef cnp.ndarray dy_ = like_x(dy, "dy", c.x), dsum_ = None, dx
    cdef const Py_ssize_t *dims
    cdef int ndim = parameter_axes(c.norm, &dims)
    cdef Py_ssize_t n = parameters_of(&c.norm.c)
    cdef double few[2 * FEW]
    cdef double *sums = &few[0]
    cdef nx_io io
    if dsum is not None:
        dsum_ = like_x(dsum, "dsum", c.x)
    dx = gradient_array(out, c, dy_, dsum_)
    set_backward(&io, c, dy_, dx)
    if dsum_ is not None:
        set_array(&io.dsum, dsum_)
    if n > FEW:
        sums = <double *> PyMem_Malloc(2 * n * sizeof(double))
        if sums == NULL:
            raise MemoryError("no memory for gradients")
    io.dgamma, io.dbeta = sums, sums + n
    try:
        run(&c.norm.c, &io, True, cnp.PyArray_SIZE(c.x))
        return (
            dx,
            None if c.gamma is None else gradient(io.dgamma, ndim, dims, c.x),
            None if c.beta is None else gradient(io.dbeta, ndim, dims, c.x),
        )
    finally:
        if sums != &few[0]:
            PyMem_Free(sums)


# Batch norm in parts -----------------------------------------------------------------------------

# What `normext.distributed` puts messages between: `batch_norm` in evaluation is the part that is
# missing here.


def batch_moments(x, axis):
    """Mean and biased variance of each channel, (C,) in float64: `batch_norm`'s first pass."""
    cdef cnp.ndarray x_ = floating_array(x, "x"), mean, rstd, var
    cdef Norm n
    cdef nx_io io
    channels = np.shape(x_)[checked_axis(axis, cnp.PyArray_NDIM(x_))]
    mean, rstd, var = np.zeros(channels), np.empty(channels), np.zeros(channels)
    if cnp.PyArray_SIZE(x_) == 0:
        return mean, var
    n = norm_for(("batch_norm", axis, 1, 0.0, True, None), x_)
    memset(&io, 0, sizeof(nx_io))
    set_array(&io.x, x_)
    io.mean, io.rstd, io.var = doubles(mean), doubles(rstd), doubles(var)
    run(&n.c, &io, False, cnp.PyArray_SIZE(x_))
    return mean, var


cdef int run_part(int part, Cache c, cnp.ndarray dy, cnp.ndarray dx, cnp.ndarray sums,
                  double count) except -1:
    cdef nx_io io
    cdef nx_norm norm = c.norm.c
    norm.training = True
    set_backward(&io, c, dy, dx)
    io.part, io.dbeta, io.count = part, doubles(sums), count
    io.dgamma = io.dbeta + norm.shape[norm.axis]
    return run(&norm, &io, True, cnp.PyArray_SIZE(c.x))


def batch_backward_sums(dy, cache):
    """(2, C) in float64: sum(dy) and sum(dy * (x - mean)), with the cache of `batch_norm`.

    The first half of its backward pass.
    """
    cdef Cache c = checked_cache(cache, "batch_norm")
    cdef cnp.ndarray dy_ = like_x(dy, "dy", c.x)
    cdef cnp.ndarray sums = np.zeros((2, c.norm.c.shape[c.norm.c.axis]))
    run_part(NORMEXT_SUMS, c, dy_, None, sums, 1)
    return sums


def batch_backward_apply(dy, cache, sums, count, *, out=None):
    """dx, from what `batch_backward_sums` gave for `count` numbers of a channel: the other half."""
    cdef Cache c = checked_cache(cache, "batch_norm")
    cdef cnp.ndarray dy_ = like_x(dy, "dy", c.x), dx = gradient_array(out, c, dy_, None)
    run_part(NORMEXT_APPLY, c, dy_, dx, np.ascontiguousarray(sums, np.float64), count)
    return dx
