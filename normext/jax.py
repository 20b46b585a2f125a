"""The norms as functions of JAX: for `jax.jit`, `jax.grad` and `jax.vmap`, computed on the CPU by normext's loops.

Names and arguments are those of `normext`, but nothing is updated in place: `batch_norm` returns new running
statistics.
`docs/jax.md` says what it gains and what it does not do.

XLA calls the loops through its foreign function interface, without Python: see _core/xla.pyx.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from normext._version import how_to_install

try:
    import jax
except ImportError as error:
    raise ImportError(f"normext.jax needs jax: {how_to_install('jax')}") from error
import jax.numpy as jnp
from jax.typing import ArrayLike

from normext._core import xla
from normext._core.arrays import KINDS, Norm

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_DTYPES = ("float32", "float64", "float16", "bfloat16")

# The calls ------------------------------------------------------------------------------------------------------------

for _pass, _handler in xla.handlers.items():
    jax.ffi.register_ffi_target(f"normext_{_pass}", _handler, platform="cpu")


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


def _call(name: str, norm: Norm, momentum: float, results: list[Any], *arrays: jax.Array | None) -> Any:
    """What is None among arrays and results goes as one without numbers."""
    none = jax.ShapeDtypeStruct((0,), _computing_dtype(norm.dtype))
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in (none if r is None else r for r in results)]
    arrays = _vary_alike([jnp.empty(0, none.dtype) if a is None else a for a in arrays])
    attributes = {
        "kind": np.int64(KINDS[norm.kind]),
        "ndim": np.int64(len(norm.shape)),
        "axis": np.int64(norm.axis),
        "groups": np.int64(norm.groups),
        "training": np.int64(norm.training),
        "eps": np.float64(norm.eps),
        "momentum": np.float64(momentum),
    }
    call = jax.ffi.ffi_call(f"normext_{name}", results, vmap_method="expand_dims")
    return _vary_alike(call(*arrays, **attributes), *arrays)


def _forward(
    norm: Norm,
    momentum: float,
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    *running: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], Any]:
    """y and, in training, new running mean and variance; and what the backward pass wants."""
    statistic = jax.ShapeDtypeStruct((norm.statistics, 2), np.uint32)  # float64, which JAX may not have
    results = [x, statistic, statistic, *(r if norm.training else None for r in running)]
    y, mean, rstd, *new = _call("forward", norm, momentum, results, x, gamma, beta, *running)
    return (y, *new), (x, gamma, beta, mean, rstd)


def _backward(norm: Norm, momentum: float, residuals: Any, cotangents: Any) -> tuple[jax.Array | None, ...]:
    x, gamma, beta, mean, rstd = residuals
    results = [x, gamma, beta]
    gradients = _call("backward", norm, momentum, results, x, cotangents[0], gamma, mean, rstd)
    # Running statistics count as constants.
    return *(None if a is None else g for a, g in zip(results, gradients)), None, None


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(norm: Norm, momentum: float, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """y and, in training, new running statistics, of x, gamma, beta and both running statistics."""
    return _forward(norm, momentum, *arrays)[0]


_normalize.__wrapped__.defvjp(_forward, _backward)


# Arguments ------------------------------------------------------------------------------------------------------------


def _computing_dtype(dtype: Any) -> Any:
    """The dtype that numbers are computed in, and that parameters come in: float32 in place of 16 bits."""
    return np.float64 if dtype == np.float64 else np.float32


def _array(a: ArrayLike, name: str) -> jax.Array:
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, as its mask would be lost")
    return jnp.asarray(a)


def _floats(a: ArrayLike) -> jax.Array:
    x = _array(a, "x")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"x must be an array of {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got dtype {x.dtype}")
    return x


def _number(value: float, name: str, high: float) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number that is known when JAX traces, got {type(value).__name__}")
    if not 0 <= value <= high:
        raise ValueError(f"{name} must be from 0 to {high:g}, got {value!r}")
    return float(value)


def _norm(kind: str, x: jax.Array, eps: float, **options: Any) -> Norm:
    return Norm(kind, x.shape, x.dtype, eps=_number(eps, "eps", 1e300), **options)


def _parameter(p: ArrayLike | None, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """gamma, beta or a running statistic, in that dtype; None stays None."""
    if p is None:
        return None
    array = _array(p, name)
    if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array.astype(dtype)


def _normalized(
    norm: Norm,
    x: jax.Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    momentum: float = 0.0,
    running: Sequence[jax.Array | None] = (None, None),
) -> tuple[jax.Array, ...]:
    """y and, in training, new running statistics."""
    parameters = [
        _parameter(p, name, norm.parameter_shape, _computing_dtype(norm.dtype))
        for name, p in (("gamma", gamma), ("beta", beta))
    ]
    return _normalize(norm, momentum, *_vary_alike([x, *parameters, *running]))


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
    if not isinstance(training, (bool, np.bool_)):
        raise TypeError(f"training must be True or False, known when JAX traces, got {type(training).__name__}")
    momentum = _number(momentum, "momentum", 1)
    norm = _norm("batch_norm", x, eps, axis=axis, training=bool(training))
    given = {"running_mean": running_mean, "running_var": running_var}
    for (name, statistic), other in zip(given.items(), reversed(given.values())):
        if statistic is None and not training:
            raise ValueError(f"{name} is needed with training=False, got None")
        if statistic is None and other is not None:
            raise ValueError(f"{name} is needed too, as both running statistics are or neither, got None")
    if running_mean is None:
        return _normalized(norm, x, gamma, beta)[0]
    running = [_array(statistic, name) for name, statistic in given.items()]
    computed = []
    for name, statistic in zip(given, running):
        if not jnp.issubdtype(statistic.dtype, jnp.floating):
            raise TypeError(f"{name} must be an array of floats, got dtype {statistic.dtype}")
        computed.append(_parameter(statistic, name, norm.parameter_shape, _computing_dtype(statistic.dtype)))
    y, *new = _normalized(norm, x, gamma, beta, momentum, computed)
    if training:
        running = [n.astype(r.dtype) for n, r in zip(new, running)]
    return y, *running


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
    x = _floats(x)
    return _normalized(_norm("layer_norm", x, eps, axis=axis), x, gamma, beta)[0]


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
    x = _floats(x)
    return _normalized(_norm("rms_norm", x, eps, axis=axis), x, gamma, None)[0]


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
        Examples along the first axis, channels along `axis`.
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
    return _normalized(_norm("group_norm", x, eps, axis=axis, groups=num_groups), x, gamma, beta)[0]


def instance_norm(
    x: ArrayLike, gamma: ArrayLike | None = None, beta: ArrayLike | None = None, *, axis: int = 1, eps: float = 1e-5
) -> jax.Array:
    """Normalize each channel of each example: `group_norm` with a group for each channel.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16
        Examples along the first axis, channels along `axis`.
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
    return _normalized(_norm("instance_norm", x, eps, axis=axis), x, gamma, beta)[0]
