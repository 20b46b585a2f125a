"""The twin: every norm of normext in plain NumPy, written to be read beside its derivation.

The compiled code is checked against this module. Everything is computed in the dtype of `x` with the textbook formulas,
so in float32 it also shows what those formulas lose far from zero; as a yardstick, give it float64.

With ``xhat = (x - mean) * rstd``, ``rstd = 1 / sqrt(var + eps)`` and ``y = gamma * xhat + beta``, all norms differ only
in the axes over which a statistic is taken (`stat_axes`) and over which a parameter is shared (`param_axes`).

References
----------
.. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
       Shift", ICML 2015, https://arxiv.org/abs/1502.03167
.. [2] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
.. [3] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494
.. [4] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, https://arxiv.org/abs/1910.07467
"""

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_staged",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]


class Cache(NamedTuple):
    """What a backward pass needs of its forward pass; the compiled cache has the same attributes."""

    x: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    mean: np.ndarray  # one number per channel (batch norm) or row (layer norm)
    rstd: np.ndarray  # 1 / sqrt(var + eps), alike
    axis: int
    eps: float
    training: bool
    activation: str | None = None


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    running_mean: np.ndarray | None = None,
    running_var: np.ndarray | None = None,
    training: bool = True,
    momentum: float = 0.9,
    unbiased: bool = False,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
) -> tuple[np.ndarray, Cache]:
    """Normalize each channel over the batch (Algorithm 1 of [1]_); see `normext.batch_norm`.

    Examples
    --------
    >>> y, cache = batch_norm([[1.0, 2.0], [3.0, 6.0]], eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    x = _floating(x)
    axis, channels, others = _batch_axes(x, axis)
    if training:
        mean, var = x.mean(others), x.var(others)
        kept = x.var(others, ddof=1) if unbiased else var
        for running, batch in ((running_mean, mean), (running_var, kept)):
            if running is not None:
                running[...] = momentum * running + (1 - momentum) * batch
    else:
        mean, var = running_mean, running_var
    rstd = _rstd(var, eps)
    gamma, beta = _as_dtype(gamma, x), _as_dtype(beta, x)
    y = _affine(x, *(_reshape(p, channels) for p in (mean, rstd, gamma, beta)))
    return y if activation is None else np.maximum(y, 0), Cache(
        x, gamma, beta, mean, rstd, axis, eps, training, activation
    )


def batch_norm_backward(dy: Any, cache: Cache) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of `batch_norm` in the simplified (closed) form; see `normext.batch_norm_backward`."""
    _, channels, others = _batch_axes(cache.x, cache.axis)
    mean, rstd, gamma, beta = (_reshape(p, channels) for p in (cache.mean, cache.rstd, cache.gamma, cache.beta))
    if cache.activation is not None:
        dy = np.where(_affine(cache.x, mean, rstd, gamma, beta) <= 0, 0, dy)  # where y is NaN, dy passes
    return _gradients(dy, cache, mean, rstd, gamma, stat_axes=others, param_axes=others)


def batch_norm_backward_staged(dy: Any, cache: Cache) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of `batch_norm` by walking its computation graph: nine steps forward, each undone in turn.

    The batch was normalized with its own statistics (``training=True``). The cache may be that of `normext.batch_norm`.
    """
    _, channels, others = _batch_axes(cache.x, cache.axis)
    x, m = cache.x, cache.x.size // cache.x.shape[cache.axis]
    gamma = 1.0 if cache.gamma is None else _reshape(cache.gamma, channels)

    # Forward, as in the drawing of the graph: every intermediate result has a name.
    mu = x.sum(others, keepdims=True) / m  # 1  mean
    centred = x - mu  # 2  deviation
    squared = centred**2  # 3  squared deviation
    var = squared.sum(others, keepdims=True) / m  # 4  variance
    std = np.sqrt(var + cache.eps)  # 5  standard deviation
    rstd = 1 / std  # 6  its inverse
    xhat = centred * rstd  # 7  normalized
    # scaled = gamma * xhat                                     8  scaled
    # y = scaled + beta                                         9  shifted

    # Backward, from 9 to 1: a sum passes its gradient to both terms, a broadcast sums its gradient up again.
    dscaled, dbeta = dy, dy.sum(others)  # 9
    dgamma, dxhat = (dscaled * xhat).sum(others), dscaled * gamma  # 8
    dcentred, drstd = dxhat * rstd, (dxhat * centred).sum(others, keepdims=True)  # 7
    dstd = -drstd / std**2  # 6
    dvar = dstd / (2 * std)  # 5
    dsquared = np.broadcast_to(dvar / m, x.shape)  # 4
    dcentred = dcentred + 2 * centred * dsquared  # 3
    dx, dmu = dcentred, -dcentred.sum(others, keepdims=True)  # 2
    dx = dx + dmu / m  # 1
    return dx, None if cache.gamma is None else dgamma, None if cache.beta is None else dbeta


def layer_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int = -1, eps: float = 1e-5, residual: Any = None
) -> tuple:
    """Normalize each row, that is `axis` and all axes after it together ([2]_, section 3); see `normext.layer_norm`.

    Examples
    --------
    >>> y, cache = layer_norm([[1.0, 3.0], [2.0, 6.0]], eps=0.0)
    >>> y
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    x = _floating(x) if residual is None else _floating(x) + residual
    axis, rows, row_axes = _layer_axes(x, axis)
    mean, var = x.mean(row_axes), x.var(row_axes)
    rstd = _rstd(var, eps)
    gamma, beta = _as_dtype(gamma, x), _as_dtype(beta, x)
    y = _affine(x, _reshape(mean, rows), _reshape(rstd, rows), gamma, beta)
    cache = Cache(x, gamma, beta, mean, rstd, axis, eps, True)
    return (y, cache) if residual is None else (y, x, cache)


def layer_norm_backward(
    dy: Any, cache: Cache, *, dsum: Any = 0
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of `layer_norm`: batch norm's, rows and columns changed over; see `normext.layer_norm_backward`."""
    axis, rows, row_axes = _layer_axes(cache.x, cache.axis)
    mean, rstd = _reshape(cache.mean, rows), _reshape(cache.rstd, rows)
    dx, dgamma, dbeta = _gradients(
        dy, cache, mean, rstd, cache.gamma, stat_axes=row_axes, param_axes=tuple(range(axis))
    )
    return dx + dsum, dgamma, dbeta


def group_norm(
    x: Any, num_groups: int, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5
) -> tuple[np.ndarray, Cache]:
    """Normalize each group of channels of each example ([3]_, section 3.1); see `normext.group_norm`.

    Examples
    --------
    >>> y, cache = group_norm([[1.0, 3.0, 2.0, 6.0]], 2, eps=0.0)
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """
    x = _floating(x)
    axis, channels, _ = _batch_axes(x, axis)
    grouped = _grouped(x, axis, num_groups)
    group_axes = tuple(range(2, grouped.ndim))
    mean, var = grouped.mean(group_axes), grouped.var(group_axes)
    rstd = _rstd(var, eps)
    gamma, beta = _as_dtype(gamma, x), _as_dtype(beta, x)
    statistics = (_per_channel(p, x, axis) for p in (mean, rstd))
    y = _affine(x, *statistics, _reshape(gamma, channels), _reshape(beta, channels))
    return y, Cache(x, gamma, beta, mean, rstd, axis, eps, True)


def group_norm_backward(dy: Any, cache: Cache) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of `group_norm`: layer norm's, with a group for a row; see `normext.group_norm_backward`."""
    x, axis = cache.x, cache.axis
    _, channels, others = _batch_axes(x, axis)
    xhat = (x - _per_channel(cache.mean, x, axis)) * _per_channel(cache.rstd, x, axis)
    g = dy if cache.gamma is None else dy * _reshape(cache.gamma, channels)
    num_groups = cache.mean.shape[1]
    mean_g, slope = (_per_channel(_group_means(a, axis, num_groups), x, axis) for a in (g, g * xhat))
    dx = _per_channel(cache.rstd, x, axis) * (g - mean_g - xhat * slope)
    dgamma = None if cache.gamma is None else (dy * xhat).sum(others)
    dbeta = None if cache.beta is None else dy.sum(others)
    return dx, dgamma, dbeta


def instance_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5
) -> tuple[np.ndarray, Cache]:
    """Normalize each channel of each example: group norm with a group for each; see `normext.instance_norm`."""
    x = _floating(x)
    return group_norm(x, x.shape[axis], gamma, beta, axis=axis, eps=eps)


instance_norm_backward = group_norm_backward


def rms_norm(x: Any, gamma: Any = None, *, axis: int = -1, eps: float = 1e-6, residual: Any = None) -> tuple:
    """Divide each row by its root mean square ([4]_, section 4); see `normext.rms_norm`.

    Examples
    --------
    >>> y, cache = rms_norm([[3.0, 4.0, 0.0, 0.0]], eps=0.0)
    >>> y
    array([[1.2, 1.6, 0. , 0. ]])
    """
    x = _floating(x) if residual is None else _floating(x) + residual
    axis, rows, row_axes = _layer_axes(x, axis)
    mean, rstd = np.zeros(x.shape[:axis]), _rstd((x**2).mean(row_axes), eps)
    gamma = _as_dtype(gamma, x)
    y = _affine(x, 0, _reshape(rstd, rows), gamma, None)
    cache = Cache(x, gamma, None, mean, rstd, axis, eps, True)
    return (y, cache) if residual is None else (y, x, cache)


def rms_norm_backward(dy: Any, cache: Cache, *, dsum: Any = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of `rms_norm`: of ``g = gamma * dy``, what moves the size of xhat is taken out."""
    axis, rows, row_axes = _layer_axes(cache.x, cache.axis)
    rstd = _reshape(cache.rstd, rows)
    xhat = cache.x * rstd
    g = dy if cache.gamma is None else dy * cache.gamma
    dx = rstd * (g - xhat * (g * xhat).mean(row_axes, keepdims=True))
    return dx + dsum, None if cache.gamma is None else (dy * xhat).sum(tuple(range(axis)))


def _grouped(x, axis, num_groups):
    """x as (N, groups, channels of a group, ...)."""
    x = np.moveaxis(x, axis, 1)
    return x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:])


def _group_means(x, axis, num_groups):
    grouped = _grouped(x, axis, num_groups)
    return grouped.mean(tuple(range(2, grouped.ndim)))


def _per_channel(p, x, axis):
    """A statistic (N, groups) of each group, repeated for its channels and broadcast against x."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return np.repeat(p, x.shape[axis] // p.shape[1], axis=1).reshape(shape)


def _affine(x, mean, rstd, gamma, beta):
    """``y = gamma * xhat + beta``, where a parameter that is None is left out."""
    y = (x - mean) * rstd
    if gamma is not None:
        y = y * gamma
    return y if beta is None else y + beta


def _gradients(dy, cache, mean, rstd, gamma, stat_axes, param_axes):
    """The closed form: of ``g = gamma * dy``, what moves the mean or the variance of xhat is taken out."""
    xhat = (cache.x - mean) * rstd
    dx = dy if gamma is None else dy * gamma
    if cache.training:
        slope = (dx * xhat).mean(stat_axes, keepdims=True)
        dx = dx - dx.mean(stat_axes, keepdims=True) - xhat * slope
    dgamma = None if cache.gamma is None else (dy * xhat).sum(param_axes)
    dbeta = None if cache.beta is None else dy.sum(param_axes)
    return dx * rstd, dgamma, dbeta


def _rstd(var, eps):
    """``1 / sqrt(var + eps)``, and 0 where both are 0: a constant gives beta even without an eps."""
    std = np.sqrt(var + eps)
    return np.divide(1, std, out=np.zeros_like(std), where=std != 0)


def _batch_axes(x, axis):
    """The channel axis, the shape of a parameter broadcast against x, and the axes of the batch."""
    axis = range(x.ndim)[axis]
    others = tuple(i for i in range(x.ndim) if i != axis)
    return axis, [n if i == axis else 1 for i, n in enumerate(x.shape)], others


def _layer_axes(x, axis):
    """The first normalized axis, the shape of a row statistic broadcast against x, and the axes of a row."""
    axis = range(x.ndim)[axis]
    return axis, x.shape[:axis] + (1,) * (x.ndim - axis), tuple(range(axis, x.ndim))


def _reshape(p, shape):
    return None if p is None else np.reshape(p, shape)


def _as_dtype(p, x):
    return None if p is None else np.asarray(p, x.dtype)


def _floating(x):
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float64)
