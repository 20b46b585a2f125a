"""The norms as functions of JAX: for `jax.jit`, `jax.grad` and `jax.vmap`, computed on the CPU by normext's loops.

Names and arguments are those of `normext`, but nothing is updated in place: `batch_norm` returns new running
statistics.
`docs/jax.md` says what it gains and what it does not do.

XLA calls through its foreign function interface: the loops themselves where ``normext._jax`` was built, and otherwise
normext's functions for NumPy arrays, which costs more for each call and gives the same bits.
"""

import atexit
import math
import operator
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from normext._version import how_to_install

try:
    import jax
except ImportError as error:
    raise ImportError(f"normext.jax needs jax: {how_to_install('jax')}") from error
import jax.numpy as jnp
from jax.typing import ArrayLike

import normext
from normext import _jax_ctypes
from normext.functional import new_cache

try:
    from normext import _jax
except ImportError:
    _jax = None

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_DTYPES = ("float32", "float64", "float16", "bfloat16")


class _Norm(IntEnum):  # as _jax.pyx numbers them
    LAYER = 0
    RMS = 1
    GROUP = 2
    BATCH = 3
    BATCH_GIVEN = 4  # with given statistics


class _How(NamedTuple):
    """What a call does, apart from its arrays."""

    norm: _Norm
    groups: int  # of channels that share their statistics, in an example
    eps: float
    way: str  # whose handlers, a key of _HANDLERS


# The functions for NumPy arrays ---------------------------------------------------------------------------------------

# In these and in the handlers of _jax.pyx x is (outer, channels, inner), as in normext.h: what layer and RMS norm call
# a row is `channels` numbers. Statistics are float64 in two halves of uint32, (n, 2), as JAX has no float64 unless
# jax_enable_x64 is set. A parameter that is not there, or a result that is not wanted, is an array without numbers.


def _normalize_arrays(arguments: Sequence[np.ndarray], results: Sequence[np.ndarray], how: _How) -> None:
    """Fill in y, the statistics for the backward pass, and the batch's mean and variance where those are of it."""
    x, gamma, beta, running_mean, running_var = arguments
    y, mean, rstd, batch_mean, batch_var = results
    gamma, beta = (p if p.size else None for p in (gamma, beta))
    if how.norm == _Norm.LAYER:
        _, cache = normext.layer_norm(x[..., 0], gamma, beta, eps=how.eps, out=y[..., 0])
    elif how.norm == _Norm.RMS:
        _, cache = normext.rms_norm(x[..., 0], gamma, eps=how.eps, out=y[..., 0])
    elif how.norm == _Norm.GROUP:
        _, cache = normext.group_norm(x, how.groups, gamma, beta, eps=how.eps, out=y)
    else:
        training = how.norm == _Norm.BATCH
        if training:
            batch_mean[:] = batch_var[:] = 0
            running_mean, running_var = batch_mean, batch_var  # with a momentum of 0 they become the batch's
        running = {"running_mean": running_mean, "running_var": running_var, "momentum": 0.0}
        _, cache = normext.batch_norm(x, gamma, beta, training=training, eps=how.eps, out=y, **running)
    for to, statistic in ((mean, cache.mean), (rstd, cache.rstd)):
        to[...] = statistic.reshape(-1, 1).view(np.uint32)


def _gradients_of_arrays(
    x: np.ndarray,
    dy: np.ndarray,
    gamma: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    norm: int,
    groups: int,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """dx, dgamma (None without a gamma) and dbeta (None for RMS norm), of the float64 statistics of a forward pass."""
    name = {_Norm.LAYER: "layer_norm", _Norm.RMS: "rms_norm", _Norm.GROUP: "group_norm"}.get(_Norm(norm), "batch_norm")
    shape = x.shape
    if norm in (_Norm.LAYER, _Norm.RMS):
        x, dy, out = (None if a is None else a[..., 0] for a in (x, dy, out))
    elif norm == _Norm.GROUP:
        mean, rstd = mean.reshape(-1, groups), rstd.reshape(-1, groups)
    # Of beta a backward pass wants to know only whether there is one.
    cache = new_cache(name, x, gamma, mean, mean, rstd, 1, 0.0, norm != _Norm.BATCH_GIVEN, False)
    dx, dgamma, *dbeta = getattr(normext, name + "_backward")(dy, cache, out=out)
    return dx.reshape(shape), dgamma, *(dbeta or [None])


def _differentiate_arrays(arguments: Sequence[np.ndarray], results: Sequence[np.ndarray], how: _How) -> None:
    """Fill in dx, dgamma and dbeta."""
    x, dy, gamma, mean, rstd = arguments
    mean, rstd = (s.view(np.float64).reshape(-1) for s in (mean, rstd))
    gradients = _gradients_of_arrays(
        x, dy, gamma if gamma.size else None, mean, rstd, how.norm, how.groups, out=results[0]
    )
    for to, gradient in zip(results[1:], gradients[1:]):
        if to.size:
            to[...] = gradient


def _over_batch(function: Callable[..., None]) -> Callable[..., None]:
    """The function, called for each item along the axes that `jax.vmap` put before those of the arrays."""

    def each(arguments: list[np.ndarray], results: list[np.ndarray], eps: float, groups: int, norm: int) -> None:
        how = _How(_Norm(norm), int(groups), float(eps), "python")
        if function is _normalize_arrays and norm <= _Norm.GROUP and all(p.size == p.shape[-1] for p in arguments[1:]):
            # Each example is normalized by itself, and nothing tells the items apart: they are one, with more examples.
            x, *parameters = arguments
            y, mean, rstd, *none = results
            arguments = [x.reshape(-1, *x.shape[-2:]), *(p.reshape(-1) for p in parameters)]
            results = [y.reshape(arguments[0].shape), mean.reshape(-1, 2), rstd.reshape(-1, 2), *none]
        batch = results[0].shape[:-3]
        arguments = [np.broadcast_to(a, batch + a.shape[len(batch) :]) for a in arguments]
        for item in np.ndindex(batch):
            function([a[item] for a in arguments], [r[item] for r in results], how)

    return each


# The calls ------------------------------------------------------------------------------------------------------------


_HANDLERS = {
    "python": {
        "forward": _jax_ctypes.handler(_over_batch(_normalize_arrays)),
        "backward": _jax_ctypes.handler(_over_batch(_differentiate_arrays)),
    }
}
if _jax is not None:
    _HANDLERS["compiled"] = _jax.handlers
_way = "python" if _jax is None else "compiled"

for _name, _handlers in _HANDLERS.items():
    for _pass, _handler in _handlers.items():
        jax.ffi.register_ffi_target(f"normext_{_pass}_{_name}", _handler, platform="cpu")


@atexit.register
def _close() -> None:
    jax.effects_barrier()  # what has effects comes to its end; other results nobody will see
    for module in (_jax, _jax_ctypes):
        if module is not None:
            module.close()


def _varying(a: jax.Array) -> frozenset[Any]:
    """The axes of a `jax.shard_map` along which an array differs from device to device, as far as JAX keeps account."""
    kind = jax.typeof(a) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "manual_axis_type", kind)  # from JAX 0.10 on
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def _vary_alike(arrays: Sequence[jax.Array | None], *others: jax.Array) -> list[jax.Array | None]:
    """The arrays, which all count as varying along the axes along which one of them, or one of others, does.

    A foreign function wants that of its arguments, and JAX cannot know it of its results. To a gradient it means that
    those of the devices are added up.
    """
    axes = frozenset().union(*(_varying(a) for a in (*arrays, *others) if a is not None))
    if not axes:
        return list(arrays)
    cast = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary
    return [None if a is None else cast(a, tuple(axes - _varying(a))) for a in arrays]


def _call(name: str, how: _How, results: list[Any], *arrays: jax.Array) -> Any:
    call = jax.ffi.ffi_call(f"normext_{name}_{how.way}", results, vmap_method="expand_dims")
    arrays = _vary_alike(arrays)
    computed = call(*arrays, norm=np.int64(how.norm), groups=np.int64(how.groups), eps=np.float64(how.eps))
    return _vary_alike(computed, *arrays)


def _forward(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array | None,
    how: _How,
) -> tuple[tuple[jax.Array, ...], Any]:
    """y and the batch's mean and variance, and what the backward pass wants."""
    computing = _computing_dtype(x)
    outer, channels, _ = x.shape
    statistics = channels if how.norm >= _Norm.BATCH else outer * how.groups
    own = channels if how.norm == _Norm.BATCH else 0
    results = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *[jax.ShapeDtypeStruct((statistics, 2), np.uint32)] * 2,
        *[jax.ShapeDtypeStruct((own,), computing)] * 2,
    ]
    parameters = (jnp.empty(0, computing) if p is None else p for p in (gamma, beta, mean, var))
    y, mean, rstd, *of_batch = _call("forward", how, results, x, *parameters)
    return (y, *of_batch), (x, gamma, beta, mean, rstd)


def _backward(how: _How, residuals: Any, cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    x, gamma, beta, mean, rstd = residuals
    computing = _computing_dtype(x)
    wanted = gamma is not None, beta is not None
    results = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *(jax.ShapeDtypeStruct((x.shape[1] if want else 0,), computing) for want in wanted),
    ]
    g = jnp.empty(0, computing) if gamma is None else gamma
    dx, dgamma, dbeta = _call("backward", how, results, x, cotangents[0], g, mean, rstd)
    return dx, dgamma if wanted[0] else None, dbeta if wanted[1] else None, None, None


@partial(jax.jit, static_argnums=5)
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalize(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array | None,
    how: _How,
) -> tuple[jax.Array, ...]:
    """y, and mean and variance of the batch; only y has a gradient."""
    return _forward(x, gamma, beta, mean, var, how)[0]


_normalize.__wrapped__.defvjp(_forward, _backward)


def _normalized(how: _How, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    return _normalize(*_vary_alike(arrays), how)


# Arguments ------------------------------------------------------------------------------------------------------------


def _computing_dtype(x: jax.Array) -> Any:
    """The dtype that x is computed in, and that parameters come in: its own, or float32 if that has 16 bits."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _array(a: ArrayLike, name: str) -> jax.Array:
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, as its mask would be lost")
    return jnp.asarray(a)


def _floats(a: ArrayLike) -> jax.Array:
    x = _array(a, "x")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"x must be an array of {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got dtype {x.dtype}")
    return x


def _axis(axis: int, ndim: int) -> int:
    try:
        i = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    if not -ndim <= i < ndim:
        raise np.exceptions.AxisError(i, ndim, "axis")
    return i % ndim


def _number(value: float, name: str, high: float) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number that is known when JAX traces, got {type(value).__name__}")
    if not 0 <= value <= high:
        raise ValueError(f"{name} must be from 0 to {high:g}, got {value!r}")
    return float(value)


def _parameter(p: ArrayLike | None, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """gamma, beta or a running statistic, as one axis, in that dtype; None stays None."""
    if p is None:
        return None
    array = _array(p, name)
    if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array.reshape(-1).astype(dtype)


# The norms ------------------------------------------------------------------------------------------------------------


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    training: bool = True,
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis: int = 1,
) -> Any:
    """Normalize each channel of x over the batch, as `normext.batch_norm` does.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Of any rank: (N, D), (N, C, H, W) with ``axis=1``, (N, H, W, C) with ``axis=-1``.
        16 bits are computed in float32.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x, or to float32 if that has 16 bits.
        Default: 1 and 0.
    running_mean, running_var : array_like of floats, shape (C,), optional
        Running statistics, both or neither. In evaluation they are needed.
    training : bool, default True
        Whether to normalize with the batch's statistics or with the running ones. Known when JAX traces.
    momentum : float, default 0.9
        The share of the old running statistics that is kept, from 0 to 1.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    axis : int, default 1
        The channel axis.

    Returns
    -------
    y : jax.Array
        In the shape and dtype of x. Without running statistics it is all that is returned.
    new_running_mean, new_running_var : jax.Array, shape (C,)
        In training ``momentum * running + (1 - momentum) * batch``, with the biased variance; in evaluation the running
        statistics as they were. In their own dtype.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or training is not a bool.
    ValueError
        If a shape does not fit, in training there is nothing to take a mean of, a running statistic is missing, or
        momentum or eps is out of range. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    See Also
    --------
    normext.batch_norm : the same for NumPy arrays, with the sources of the formulas.

    Notes
    -----
    Running statistics count as constants, old ones and new ones: they have no gradient.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import normext.jax
    >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    >>> print(normext.jax.batch_norm(x, eps=0.0))
    [[-1. -1.]
     [ 1.  1.]]
    >>> y, mean, var = normext.jax.batch_norm(x, running_mean=jnp.zeros(2), running_var=jnp.ones(2), momentum=0.5)
    >>> print(mean)
    [1. 2.]
    """
    x = _floats(x)
    axis = _axis(axis, x.ndim)
    channels = x.shape[axis]
    computing = _computing_dtype(x)
    gamma = _parameter(gamma, "gamma", (channels,), computing)
    beta = _parameter(beta, "beta", (channels,), computing)
    if not isinstance(training, (bool, np.bool_)):
        raise TypeError(f"training must be True or False, known when JAX traces, got {type(training).__name__}")
    momentum, eps = _number(momentum, "momentum", 1), _number(eps, "eps", 1e300)
    if channels == 0:
        raise ValueError(f"x has no channels: shape {x.shape}, axis {axis}")
    if training and x.size == 0:
        raise ValueError(f"x has no rows to take a mean of in training: shape {x.shape}")
    given = {"running_mean": running_mean, "running_var": running_var}
    for (name, statistic), other in zip(given.items(), reversed(given.values())):
        if statistic is None and not training:
            raise ValueError(f"{name} is needed with training=False, got None")
        if statistic is None and other is not None:
            raise ValueError(f"{name} is needed too, as both running statistics are or neither, got None")
    running = []
    for name, statistic in given.items():
        if statistic is not None:
            array = jax.lax.stop_gradient(_array(statistic, name))
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise TypeError(f"{name} must be an array of floats, got dtype {array.dtype}")
            _parameter(array, name, (channels,), computing)
            running.append(array)
    if x.size == 0:
        return x, *running
    how = _How(_Norm.BATCH if training else _Norm.BATCH_GIVEN, 1, eps, _way)
    constants = (None, None) if training else tuple(r.astype(computing) for r in running)
    rows = x.reshape(math.prod(x.shape[:axis]), channels, math.prod(x.shape[axis + 1 :]))
    y, *of_batch = _normalized(how, rows, gamma, beta, *constants)
    y = y.reshape(x.shape)
    if not running:
        return y
    if training:
        of_batch = jax.lax.stop_gradient(of_batch)
        running = [(momentum * r + (1 - momentum) * b).astype(r.dtype) for r, b in zip(running, of_batch)]
    return y, *running


def _normalize_rows(
    norm: _Norm, x: ArrayLike, gamma: ArrayLike | None, beta: ArrayLike | None, axis: int, eps: float
) -> jax.Array:
    x = _floats(x)
    axis = _axis(axis, x.ndim)
    row = x.shape[axis:]
    gamma = _parameter(gamma, "gamma", row, _computing_dtype(x))
    beta = _parameter(beta, "beta", row, _computing_dtype(x))
    how = _How(norm, 1, _number(eps, "eps", 1e300), _way)
    if 0 in row:
        raise ValueError(f"x has rows without numbers: shape {x.shape}, axis {axis}")
    if x.size == 0:
        return x
    rows = x.reshape(-1, math.prod(row), 1)
    return _normalized(how, rows, gamma, beta, None, None)[0].reshape(x.shape)


def layer_norm(
    x: ArrayLike, gamma: ArrayLike | None = None, beta: ArrayLike | None = None, *, axis: int = -1, eps: float = 1e-5
) -> jax.Array:
    """Normalize each row of x, as `normext.layer_norm` does.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Of any rank. A row is `axis` and all axes after it together.
    gamma, beta : array_like, shape ``x.shape[axis:]``, optional
        Scale and shift of each position in a row, converted to the dtype of x, or to float32 if that has 16 bits.
        Default: 1 and 0.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    jax.Array
        In the shape and dtype of x. A row that is constant gives exactly beta.

    Raises
    ------
    TypeError
        If a dtype is not one of the above.
    ValueError
        If a shape does not fit, a row has no numbers, or eps is negative. `numpy.exceptions.AxisError`, which is one,
        if axis is out of range.

    See Also
    --------
    normext.layer_norm : the same for NumPy arrays, with the source of the formula.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import normext.jax
    >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
    >>> print(jax.jit(normext.jax.layer_norm)(x, jnp.array([1.0, 10.0])).round(2))
    [[-1. 10.]
     [-1. 10.]]
    >>> print(jax.grad(lambda beta: normext.jax.layer_norm(x, beta=beta).sum())(jnp.zeros(2)))
    [2. 2.]
    """
    return _normalize_rows(_Norm.LAYER, x, gamma, beta, axis, eps)


def rms_norm(x: ArrayLike, gamma: ArrayLike | None = None, *, axis: int = -1, eps: float = 1e-6) -> jax.Array:
    """Divide each row of x by its root mean square, as `normext.rms_norm` does.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Of any rank. A row is `axis` and all axes after it together.
    gamma : array_like, shape ``x.shape[axis:]``, optional
        Scale of each position in a row, converted to the dtype of x, or to float32 if that has 16 bits. Default: 1.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-6
        Added to the mean square. Not negative.

    Returns
    -------
    jax.Array
        In the shape and dtype of x. A row of zeros gives zeros.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`.

    See Also
    --------
    normext.rms_norm : the same for NumPy arrays, with the source of the formula.

    Examples
    --------
    >>> import normext.jax
    >>> print(normext.jax.rms_norm([[3.0, 4.0, 0.0, 0.0]], eps=0.0))
    [[1.2 1.6 0.  0. ]]
    """
    return _normalize_rows(_Norm.RMS, x, gamma, None, axis, eps)


def group_norm(
    x: ArrayLike,
    num_groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalize each group of channels of each example, as `normext.group_norm` does.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Examples along the first axis, channels along `axis`. Where that is not 1, x is transposed before and y after.
    num_groups : int
        Divides the number of channels C.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x, or to float32 if that has 16 bits.
        Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    jax.Array
        In the shape and dtype of x.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or num_groups is not an integer.
    ValueError
        If num_groups does not divide the channels, a shape does not fit, a group has no numbers, or eps is negative.
        `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    See Also
    --------
    normext.group_norm : the same for NumPy arrays, with the source of the formula.

    Examples
    --------
    >>> import normext.jax
    >>> print(normext.jax.group_norm([[1.0, 3.0, 2.0, 6.0]], 2, eps=0.0))
    [[-1.  1. -1.  1.]]
    """
    x = _floats(x)
    axis = _axis(axis, x.ndim)
    channels = x.shape[axis]
    gamma = _parameter(gamma, "gamma", (channels,), _computing_dtype(x))
    beta = _parameter(beta, "beta", (channels,), _computing_dtype(x))
    try:
        groups = operator.index(num_groups)
    except TypeError:
        raise TypeError(f"num_groups must be an integer, got {num_groups!r}") from None
    how = _How(_Norm.GROUP, groups, _number(eps, "eps", 1e300), _way)
    if axis == 0:
        raise ValueError("axis must not be 0, where the examples are")
    if groups < 1 or channels % groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {groups}")
    if x.size == 0 and x.shape[0] != 0:
        raise ValueError(f"x has groups without numbers: shape {x.shape}, axis {axis}")
    if x.size == 0:
        return x
    first = jnp.moveaxis(x, axis, 1)
    y = _normalized(how, first.reshape(x.shape[0], channels, -1), gamma, beta, None, None)[0]
    return jnp.moveaxis(y.reshape(first.shape), 1, axis)


def instance_norm(
    x: ArrayLike, gamma: ArrayLike | None = None, beta: ArrayLike | None = None, *, axis: int = 1, eps: float = 1e-5
) -> jax.Array:
    """Normalize each channel of each example: `group_norm` with a group for each channel.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Examples along the first axis, channels along `axis`. Where that is not 1, x is transposed before and y after.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x, or to float32 if that has 16 bits.
        Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    jax.Array
        In the shape and dtype of x.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`; ValueError if there are no channels.

    See Also
    --------
    normext.instance_norm : the same for NumPy arrays, with the source of the formula.

    Examples
    --------
    >>> import normext.jax
    >>> print(normext.jax.instance_norm([[[1.0, 3.0], [2.0, 6.0]]], eps=0.0))
    [[[-1.  1.]
      [-1.  1.]]]
    """
    x = _floats(x)
    return group_norm(x, x.shape[_axis(axis, x.ndim)], gamma, beta, axis=axis, eps=eps)
