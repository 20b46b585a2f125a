"""Layers that are mostly used together, as one: a sandwich has one forward, one cache and one backward."""

from typing import Any

import numpy as np

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

#: The normalizations of a fully connected network: name -> (forward, backward).
NORMALIZATIONS = {
    "batchnorm": (batchnorm_forward, batchnorm_backward_alt),
    "layernorm": (layernorm_forward, layernorm_backward),
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
        Scale and shift of the normalization.
    norm_param : dict
        The normalization's settings: see `batchnorm_forward`, `layernorm_forward`.
    normalization : {'batchnorm', 'layernorm'}, default 'batchnorm'

    Returns
    -------
    out : ndarray, shape (N, M)
    cache : opaque
        For `affine_norm_relu_backward`.

    Raises
    ------
    ValueError
        If the normalization is not one of these.

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
    forward, backward = NORMALIZATIONS[normalization]
    out, affine_cache = affine_forward(x, w, b)
    out, norm_cache = forward(out, gamma, beta, norm_param)
    out, relu_cache = relu_forward(out)
    return out, (affine_cache, norm_cache, backward, relu_cache)


def affine_norm_relu_backward(
    dout: Any, cache: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `affine_norm_relu_forward`.

    Parameters
    ----------
    dout : array_like, shape (N, M)
    cache : opaque
        From `affine_norm_relu_forward`.

    Returns
    -------
    dx, dw, db, dgamma, dbeta : ndarray
        In the shapes of x, w, b, gamma and beta.

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
    dnorm, dgamma, dbeta = norm_backward(relu_backward(dout, relu_cache), norm_cache)
    return *affine_backward(dnorm, affine_cache), dgamma, dbeta


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
