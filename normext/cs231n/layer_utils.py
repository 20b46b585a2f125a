"""Layers that are mostly used together, as one: a sandwich has one forward, one cache and one backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normext import group_norm, group_norm_backward, rms_norm, rms_norm_backward
from normext.cs231n._keys import check_keys
from normext.cs231n.fast_layers import (
    conv_backward_fast,
    conv_forward_fast,
    max_pool_backward_fast,
    max_pool_forward_fast,
)
from normext.cs231n.layers import (
    affine_backward,
    affine_forward,
    batchnorm_backward_alt,
    batchnorm_forward,
    layernorm_backward,
    layernorm_forward,
    relu_backward,
    relu_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)

__all__ = [
    "affine_norm_relu_backward",
    "affine_norm_relu_forward",
    "affine_relu_backward",
    "affine_relu_forward",
    "conv_bn_relu_backward",
    "conv_bn_relu_forward",
    "conv_relu_backward",
    "conv_relu_forward",
    "conv_relu_pool_backward",
    "conv_relu_pool_forward",
]


def _groupnorm_forward(x, gamma, beta, norm_param):
    check_keys(norm_param, "norm_param")
    return group_norm(x, norm_param.get("num_groups"), gamma, beta, eps=norm_param.get("eps", 1e-5))


def _rmsnorm_forward(x, gamma, norm_param):
    check_keys(norm_param, "norm_param")
    return rms_norm(x, gamma, eps=norm_param.get("eps", 1e-6))


class Normalization(NamedTuple):
    """A normalization of rows (N, M), as fully connected networks use it."""

    #: ``forward(x, *parameters, norm_param) -> (out, cache)``
    forward: Callable[..., tuple[np.ndarray, Any]]
    #: ``backward(dout, cache) -> (dx, *gradients of the parameters)``
    backward: Callable[..., tuple[Any, ...]]
    #: What every number of a parameter starts at, by name, in the order of the arguments.
    parameters: dict[str, float]


SCALE = {"gamma": 1.0}
SCALE_AND_SHIFT = {"gamma": 1.0, "beta": 0.0}

# Instance normalization is for images: of a row every number would be a channel of its own, and become 0.
NORMALIZATIONS = {
    "batchnorm": Normalization(batchnorm_forward, batchnorm_backward_alt, SCALE_AND_SHIFT),
    "layernorm": Normalization(layernorm_forward, layernorm_backward, SCALE_AND_SHIFT),
    "rmsnorm": Normalization(_rmsnorm_forward, rms_norm_backward, SCALE),
    "groupnorm": Normalization(_groupnorm_forward, group_norm_backward, SCALE_AND_SHIFT),
}


def affine_relu_forward(x: Any, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Any]:
    """`affine_forward`, then `relu_forward`.

    Parameters
    ----------
    x, w, b
        As for `affine_forward`.

    Returns
    -------
    out : ndarray, shape (N, M)
    cache : opaque
        For `affine_relu_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> affine_relu_forward([[1.0, -2.0]], np.eye(2), np.zeros(2))[0]
    array([[1., 0.]])
    """
    out, affine_cache = affine_forward(x, w, b)
    out, relu_cache = relu_forward(out)
    return out, (affine_cache, relu_cache)


def affine_relu_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `affine_relu_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, M)
    cache : opaque
        From `affine_relu_forward`.

    Returns
    -------
    dx, dw, db : ndarray
        In the shapes of x, w and b.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = affine_relu_forward([[1.0, -2.0]], np.eye(2), np.zeros(2))
    >>> affine_relu_backward([[1.0, 1.0]], cache)[0]
    array([[1., 0.]])
    """
    affine_cache, relu_cache = cache
    return affine_backward(relu_backward(dout, relu_cache), affine_cache)


def affine_norm_relu_forward(
    x: Any,
    w: np.ndarray,
    b: np.ndarray,
    gamma: Any,
    beta: Any,
    norm_param: dict[str, Any],
    normalization: str = "batchnorm",
) -> tuple[np.ndarray, Any]:
    """`affine_forward`, a normalization, then `relu_forward`.

    Parameters
    ----------
    x, w, b
        As for `affine_forward`.
    gamma, beta : array_like, shape (M,)
        Scale and shift of the normalization. 'rmsnorm' only scales: its beta is None.
    norm_param : dict
        The normalization's settings. For 'batchnorm' and 'layernorm' see `batchnorm_forward` and `layernorm_forward`.
        For 'rmsnorm' (`normext.rms_norm` [1]_) ``eps``, default 1e-6. For 'groupnorm' (`normext.group_norm` [2]_, where
        each of the M features is a channel) ``num_groups``, required, which divides M, and ``eps``, default 1e-5.
    normalization : {'batchnorm', 'layernorm', 'rmsnorm', 'groupnorm'}, default 'batchnorm'

    Returns
    -------
    out : ndarray, shape (N, M)
    cache : opaque
        For `affine_norm_relu_backward`.

    Raises
    ------
    ValueError
        If the normalization is not one of these, or has no beta and one is given.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
           https://arxiv.org/abs/1910.07467
    .. [2] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> x, one, zero = [[1.0, -2.0], [3.0, -4.0]], np.ones(2), np.zeros(2)
    >>> affine_norm_relu_forward(x, np.eye(2), zero, one, zero, {"eps": 0.0}, "layernorm")[0]
    array([[1., 0.],
           [1., 0.]])
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {normalization!r}")
    norm = NORMALIZATIONS[normalization]
    if beta is not None and "beta" not in norm.parameters:
        raise ValueError(f"beta must be None for {normalization!r}, which only scales, got shape {np.shape(beta)}")
    parameters = (gamma, beta)[: len(norm.parameters)]
    out, affine_cache = affine_forward(x, w, b)
    out, norm_cache = norm.forward(out, *parameters, norm_param)
    out, relu_cache = relu_forward(out)
    return out, (affine_cache, norm_cache, norm.backward, relu_cache)


def affine_norm_relu_backward(
    dout: Any, cache: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of `affine_norm_relu_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, M)
    cache : opaque
        From `affine_norm_relu_forward`.

    Returns
    -------
    dx, dw, db, dgamma, dbeta : ndarray
        In the shapes of x, w, b, gamma and beta; dbeta is None where there is no beta.

    Examples
    --------
    >>> import numpy as np
    >>> x, one, zero = [[1.0, -2.0], [3.0, -4.0]], np.ones(2), np.zeros(2)
    >>> out, cache = affine_norm_relu_forward(x, np.eye(2), zero, one, zero, {"mode": "train"})
    >>> dx, dw, db, dgamma, dbeta = affine_norm_relu_backward(np.ones((2, 2)), cache)
    >>> dbeta
    array([1., 1.])
    """
    affine_cache, norm_cache, norm_backward, relu_cache = cache
    dnorm, dgamma, *dbeta = norm_backward(relu_backward(dout, relu_cache), norm_cache)
    return *affine_backward(dnorm, affine_cache), dgamma, dbeta[0] if dbeta else None


def conv_relu_forward(x: Any, w: Any, b: Any, conv_param: dict[str, int]) -> tuple[np.ndarray, Any]:
    """`conv_forward_fast`, then `relu_forward`.

    Parameters
    ----------
    x, w, b, conv_param
        As for `conv_forward_fast`.

    Returns
    -------
    out : ndarray, shape (N, F, out_height, out_width)
    cache : opaque
        For `conv_relu_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> conv_relu_forward(x, w, b, {"stride": 1, "pad": 0})[0]
    array([[[[0., 3.]]]])
    """
    out, conv_cache = conv_forward_fast(x, w, b, conv_param)
    out, relu_cache = relu_forward(out)
    return out, (conv_cache, relu_cache)


def conv_relu_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `conv_relu_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, F, out_height, out_width)
    cache : opaque
        From `conv_relu_forward`.

    Returns
    -------
    dx, dw, db : ndarray
        In the shapes of x, w and b.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> out, cache = conv_relu_forward(x, w, b, {"stride": 1, "pad": 0})
    >>> conv_relu_backward(np.ones_like(out), cache)[0]
    array([[[[0., 1., 1.]]]])
    """
    conv_cache, relu_cache = cache
    return conv_backward_fast(relu_backward(dout, relu_cache), conv_cache)


def conv_bn_relu_forward(
    x: Any, w: Any, b: Any, gamma: Any, beta: Any, conv_param: dict[str, int], bn_param: dict[str, Any]
) -> tuple[np.ndarray, Any]:
    """`conv_forward_fast`, `spatial_batchnorm_forward`, then `relu_forward`.

    Parameters
    ----------
    x, w, b, conv_param
        As for `conv_forward_fast`.
    gamma, beta, bn_param
        As for `spatial_batchnorm_forward`, where each of the F filters makes a channel.

    Returns
    -------
    out : ndarray, shape (N, F, out_height, out_width)
    cache : opaque
        For `conv_bn_relu_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> bn_param = {"mode": "train", "eps": 0.0}
    >>> conv_bn_relu_forward(x, w, b, np.ones(1), np.zeros(1), {"stride": 1, "pad": 0}, bn_param)[0]
    array([[[[0., 1.]]]])
    """
    out, conv_cache = conv_forward_fast(x, w, b, conv_param)
    out, norm_cache = spatial_batchnorm_forward(out, gamma, beta, bn_param)
    out, relu_cache = relu_forward(out)
    return out, (conv_cache, norm_cache, relu_cache)


def conv_bn_relu_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `conv_bn_relu_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, F, out_height, out_width)
    cache : opaque
        From `conv_bn_relu_forward`.

    Returns
    -------
    dx, dw, db, dgamma, dbeta : ndarray
        In the shapes of x, w, b, gamma and beta.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> conv_param, bn_param = {"stride": 1, "pad": 0}, {"mode": "train"}
    >>> out, cache = conv_bn_relu_forward(x, w, b, np.ones(1), np.zeros(1), conv_param, bn_param)
    >>> dx, dw, db, dgamma, dbeta = conv_bn_relu_backward(np.ones_like(out), cache)
    >>> dbeta
    array([1.])
    """
    conv_cache, norm_cache, relu_cache = cache
    dnorm, dgamma, dbeta = spatial_batchnorm_backward(relu_backward(dout, relu_cache), norm_cache)
    return *conv_backward_fast(dnorm, conv_cache), dgamma, dbeta


def conv_relu_pool_forward(
    x: Any, w: Any, b: Any, conv_param: dict[str, int], pool_param: dict[str, int]
) -> tuple[np.ndarray, Any]:
    """`conv_relu_forward`, then `max_pool_forward_fast`.

    Parameters
    ----------
    x, w, b, conv_param
        As for `conv_forward_fast`.
    pool_param
        As for `max_pool_forward_fast`.

    Returns
    -------
    out : ndarray, shape (N, F, out_height, out_width)
        Of the pooling.
    cache : opaque
        For `conv_relu_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> pool_param = {"pool_height": 1, "pool_width": 2, "stride": 1}
    >>> conv_relu_pool_forward(x, w, b, {"stride": 1, "pad": 0}, pool_param)[0]
    array([[[[3.]]]])
    """
    out, conv_cache = conv_relu_forward(x, w, b, conv_param)
    out, pool_cache = max_pool_forward_fast(out, pool_param)
    return out, (conv_cache, pool_cache)


def conv_relu_pool_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `conv_relu_pool_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, F, out_height, out_width)
    cache : opaque
        From `conv_relu_pool_forward`.

    Returns
    -------
    dx, dw, db : ndarray
        In the shapes of x, w and b.

    Examples
    --------
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, -2.0, 5.0]]]]), np.array([[[[1.0, 1.0]]]]), np.zeros(1)
    >>> pool_param = {"pool_height": 1, "pool_width": 2, "stride": 1}
    >>> out, cache = conv_relu_pool_forward(x, w, b, {"stride": 1, "pad": 0}, pool_param)
    >>> conv_relu_pool_backward(np.ones_like(out), cache)[0]
    array([[[[0., 1., 1.]]]])
    """
    conv_cache, pool_cache = cache
    return conv_relu_backward(max_pool_backward_fast(dout, pool_cache), conv_cache)
