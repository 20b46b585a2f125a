"""Second order: the backward passes of `batch_norm_backward` and `layer_norm_backward`, in plain NumPy.

A loss that holds a gradient, such as a gradient penalty, needs them. They are not compiled: each is about a dozen NumPy
operations on arrays of the size of x.

Derivation
----------
Take the m numbers of one channel (batch norm) or row (layer norm) as vectors, ``1`` as the vector of ones, and
``mean(a)`` as the mean of the elements of a::

    xhat = r (x - mean(x))        r = 1 / sqrt(var(x) + eps)        g = gamma dy
    P a  = a - mean(a) 1 - mean(a xhat) xhat                        a symmetric matrix: u'Pg = g'Pu
    dx   = r P g                  dgamma = sum(dy xhat)             dbeta = sum(dy)

(With ``eps = 0``, P is the projection that removes the mean and what moves the size of xhat. An eps makes
``mean(xhat^2) = var / (var + eps)`` a little less than 1. Nothing below needs it to be 1, so eps is exact.)

Some scalar L has the gradients u by dx, v by dgamma and w by dbeta. Its dependence on dy, gamma and x is that of ::

    S = u' r P g + sum(v dy xhat) + sum(w dy)

1. S is linear in dy and in gamma, and P is symmetric. With ``p = r P u``::

    dS/d(dy) = gamma p + v xhat + w            dS/d(gamma) = sum(dy p)

2. x acts through xhat and through r. From ``u'Pg = u'g - m mean(u) mean(g) - m mean(u xhat) mean(g xhat)``::

    dS/d(xhat) = h = v dy - r (mean(g xhat) u + mean(u xhat) g)
    dS/dr          = u'Pg = m mean(g p) / r

3. Both pass on to x. For xhat this is the first-order backward pass, r P; for r it is ``dr/dx = -r^2 xhat / m``::

    dS/dx = r P h - r xhat mean(g p) = r (h - mean(h) - xhat (mean(h xhat) + mean(g p)))

In evaluation mean and r are constants: P is the identity, ``h = v dy``, and r passes nothing on.

The two norms differ in the axes over which a statistic is taken (`stat_axes`) and over which a parameter is shared
(`param_axes`), and in nothing else.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from normext._core.arrays import Cache, checked_cache

__all__ = ["batch_norm_backward_backward", "layer_norm_backward_backward"]

_Results = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def batch_norm_backward_backward(
    ddx: ArrayLike,
    dy: ArrayLike,
    cache: Cache,
    *,
    ddgamma: ArrayLike | None = None,
    ddbeta: ArrayLike | None = None,
) -> _Results:
    """Gradients of `batch_norm_backward` with respect to dy, x and gamma.

    `batch_norm_backward` makes dx, dgamma and dbeta of dy, x and gamma. A loss that depends on them, such as a gradient
    penalty [1]_, has gradients with respect to them, and this function passes those on. It is what PyTorch does in the
    second of two backward passes, the first with ``create_graph=True``. In training mean and variance depend on x; in
    evaluation they are constants. This pass is NumPy, not compiled; the module `normext.second_order` derives it.

    Parameters
    ----------
    ddx : array_like
        The gradient of the loss with respect to dx, in the shape of x.
    dy : array_like
        What `batch_norm_backward` was given, in the shape of x. The cache does not hold it.
    cache : object
        What the call of `normext.batch_norm` returned, not after ``out=x``. x must not have changed since.
    ddgamma, ddbeta : array_like, shape (C,), optional
        The gradients of the loss with respect to dgamma and dbeta. Default: 0. Only for a parameter that was given.

    Returns
    -------
    ddy : ndarray
        The gradient of the loss with respect to dy, in the shape and dtype of x.
    dx : ndarray
        The gradient of the loss with respect to x, through `batch_norm_backward` alone: where dy depends on y, ddy
        still has to pass through what made dy of y, and on through `batch_norm_backward`. In the shape and dtype of x.
    dgamma : ndarray, shape (C,), or None
        The same for gamma, in the dtype of x; None if gamma was None. (beta does not occur in the first backward pass.)

    Raises
    ------
    TypeError
        If an array does not hold real numbers, or cache is not one of `normext.batch_norm`.
    ValueError
        If a shape does not fit, ddgamma or ddbeta is given where the parameter was None, or the call had an activation.

    See Also
    --------
    layer_norm_backward_backward : the same for layer norm.

    Notes
    -----
    All is computed in float64, and rounded once where x is float32. At most five float64 arrays of the size of x exist
    at a time, two of which become the results.

    References
    ----------
    .. [1] I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin and A. Courville, "Improved Training of Wasserstein GANs",
           NIPS 2017, https://arxiv.org/abs/1704.00028

    Examples
    --------
    The penalty ``sum(dx**2) / 2`` has the gradient dx with respect to dx:

    >>> import numpy as np
    >>> import normext
    >>> from normext.second_order import batch_norm_backward_backward
    >>> x, dy = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 3.0]])
    >>> y, cache = normext.batch_norm(x, gamma=np.ones(2), eps=0.0)
    >>> dx, dgamma, _ = normext.batch_norm_backward(dy, cache)
    >>> penalty_ddy, penalty_dx, penalty_dgamma = batch_norm_backward_backward(dx, dy, cache)

    Twice the x halves dx, which is also proportional to dy and to gamma. So, by Euler's theorem, along each of them the
    penalty changes by its own size, twice:

    >>> along = [(penalty_ddy * dy).sum(), -(penalty_dx * x).sum(), penalty_dgamma.sum()]
    >>> np.allclose(along, (dx**2).sum())
    True
    """
    x = checked_cache(cache, "batch_norm").x
    if cache.activation is not None:
        raise ValueError(f"cache is of a call with activation={cache.activation!r}, which has no second order here")
    channels = [n if i == cache.axis else 1 for i, n in enumerate(x.shape)]
    others = tuple(i for i in range(x.ndim) if i != cache.axis)
    return _second_order(ddx, dy, cache, ddgamma, ddbeta, channels, channels, stat_axes=others, param_axes=others)


def layer_norm_backward_backward(
    ddx: ArrayLike,
    dy: ArrayLike,
    cache: Cache,
    *,
    ddgamma: ArrayLike | None = None,
    ddbeta: ArrayLike | None = None,
) -> _Results:
    """Gradients of `layer_norm_backward` with respect to dy, x and gamma.

    `batch_norm_backward_backward`, rows and columns changed over. This pass is NumPy, not compiled; the module
    `normext.second_order` derives it.

    Parameters
    ----------
    ddx : array_like
        The gradient of the loss with respect to dx, in the shape of x.
    dy : array_like
        What `layer_norm_backward` was given, in the shape of x. The cache does not hold it.
    cache : object
        What the call of `normext.layer_norm` returned, not after ``out=x``. x must not have changed since.
    ddgamma, ddbeta : array_like, shape ``x.shape[axis:]``, optional
        The gradients of the loss with respect to dgamma and dbeta. Default: 0. Only for a parameter that was given.

    Returns
    -------
    ddy : ndarray
        The gradient of the loss with respect to dy, in the shape and dtype of x.
    dx : ndarray
        The gradient of the loss with respect to x, through `layer_norm_backward` alone: where dy depends on y, ddy
        still has to pass through what made dy of y, and on through `layer_norm_backward`. In the shape and dtype of x.
    dgamma : ndarray, shape ``x.shape[axis:]``, or None
        The same for gamma, in the dtype of x; None if gamma was None. (beta does not occur in the first backward pass.)

    Raises
    ------
    TypeError
        If an array does not hold real numbers, or cache is not one of `normext.layer_norm`.
    ValueError
        If a shape does not fit, or ddgamma or ddbeta is given where the parameter was None.

    See Also
    --------
    batch_norm_backward_backward : the same for batch norm, with notes on precision and memory.

    Examples
    --------
    The gradient of the penalty ``sum(dx**2) / 2``, which does not change when all x of a row move together:

    >>> import numpy as np
    >>> import normext
    >>> from normext.second_order import layer_norm_backward_backward
    >>> x, dy = np.array([[1.0, 2.0, 6.0], [3.0, 6.0, 5.0]]), np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 5.0]])
    >>> y, cache = normext.layer_norm(x)
    >>> dx, _, _ = normext.layer_norm_backward(dy, cache)
    >>> penalty_ddy, penalty_dx, penalty_dgamma = layer_norm_backward_backward(dx, dy, cache)
    >>> np.allclose(penalty_dx.sum(axis=1), 0)
    True
    >>> penalty_dgamma is None
    True
    """
    x, axis = checked_cache(cache, "layer_norm").x, cache.axis
    rows, columns = x.shape[:axis] + (1,) * (x.ndim - axis), x.shape[axis:]
    stat_axes, param_axes = tuple(range(axis, x.ndim)), tuple(range(axis))
    return _second_order(ddx, dy, cache, ddgamma, ddbeta, rows, columns, stat_axes, param_axes)


def _second_order(ddx, dy, cache, ddgamma, ddbeta, stat_shape, param_shape, stat_axes, param_axes) -> _Results:
    """The formulas of the derivation, in its letters; `stat_shape` and `param_shape` broadcast against x."""
    x, dtype = cache.x, cache.x.dtype.newbyteorder("=")
    u, dy = _checked("ddx", ddx, "x", x), _checked("dy", dy, "x", x)
    v, w = _checked("ddgamma", ddgamma, "gamma", cache.gamma), _checked("ddbeta", ddbeta, "beta", cache.beta)
    # In float64, although they are small: what they are multiplied with becomes float64 too.
    gamma, v, w = (None if a is None else np.reshape(a, param_shape).astype(np.float64) for a in (cache.gamma, v, w))
    r = cache.rstd.reshape(stat_shape)

    def mean(a):
        return a.mean(stat_axes, dtype=np.float64, keepdims=True)

    xhat = x - cache.mean.reshape(stat_shape)
    if cache.training:
        # The mean of float32 numbers is known to about 1e-8 of their spread: a dy or ddx far from zero multiplies that.
        xhat -= mean(xhat)
    xhat *= r

    def normalization_backward(a, through_r=0.0):
        """Step 3: ``r P a``, and what r passes on."""
        if not cache.training:
            return a * r
        result = xhat * -(mean(a * xhat) + through_r)
        result += a
        for _ in range(2):  # a far mean is known to 1e-14 of itself, which a far dy would multiply
            result -= mean(result)
        result *= r
        return result

    p = normalization_backward(u)
    dgamma = None if gamma is None else (dy * p).sum(param_axes).astype(dtype)
    h = np.zeros_like(p) if v is None else dy * v
    through_r = 0.0
    if cache.training:
        g = dy if gamma is None else dy * gamma
        through_r = mean(g * p)
        h -= u * (r * mean(g * xhat))
        h -= g * (r * mean(u * xhat))
        del g  # before the next array of this size
    dx = normalization_backward(h, through_r).astype(dtype, copy=False)
    ddy = p
    if gamma is not None:
        ddy *= gamma
    if v is not None:
        ddy += xhat * v
    if w is not None:
        ddy += w
    return ddy.astype(dtype, copy=False), dx, dgamma


def _checked(name: str, gradient: Any, of: str, like: np.ndarray | None) -> np.ndarray | None:
    """The gradient as an array of real numbers in the shape of `like`; only a parameter's may be None."""
    if gradient is None and of != "x":
        return None
    gradient = np.asarray(gradient)
    if not np.can_cast(gradient.dtype, np.float64):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {gradient.dtype}")
    if like is None:
        raise ValueError(f"{name} must be None, as {of} was, got shape {gradient.shape}")
    if gradient.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {of}, {like.shape}, got {gradient.shape}")
    return gradient
