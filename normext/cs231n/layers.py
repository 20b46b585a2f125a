"""The layers of the assignment: every one is a forward function and its backward.

``*_forward`` returns ``(out, cache)``; ``*_backward(dout, cache)`` takes the gradient of the loss by `out` and returns
the gradients by the inputs, in their order. N is the number of examples in the batch and D of features; of scores, C is
the number of classes; of images (N, C, H, W), C is that of channels, H the height and W the width. Arrays are float32
or float64, and results have the dtype of the data; whole numbers are taken as float64. A cache refers to the inputs
rather than copying them, so do not change those in place between the two passes.
"""

import math
from typing import Any

import numpy as np

from normext import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from normext.cs231n._keys import check_keys
from normext.cs231n.im2col import conv_windows, pad, pool_windows, unpad
from normext.reference import batch_norm_backward_staged

__all__ = [
    "affine_backward",
    "affine_forward",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_forward",
    "conv_backward_naive",
    "conv_forward_naive",
    "dropout_backward",
    "dropout_forward",
    "layernorm_backward",
    "layernorm_forward",
    "max_pool_backward_naive",
    "max_pool_forward_naive",
    "relu_backward",
    "relu_forward",
    "softmax_loss",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
    "svm_loss",
]


def affine_forward(x: Any, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Any]:
    """A fully connected layer: ``out = x @ w + b``, with every example of x laid out as one row.

    Parameters
    ----------
    x : array_like, shape (N, d1, ..., dk)
        With D = d1 * ... * dk.
    w : ndarray, shape (D, M)
    b : ndarray, shape (M,)

    Returns
    -------
    out : ndarray, shape (N, M)
    cache : opaque
        For `affine_backward`.

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    TypeError
        If x does not hold real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = affine_forward([[1.0, 2.0]], np.eye(2), np.array([10.0, 20.0]))
    >>> out
    array([[11., 22.]])
    """
    x, w, b = _floats(x, "x"), _floats(w, "w"), _floats(b, "b")
    if x.ndim < 2 or b.ndim != 1 or w.shape != (math.prod(x.shape[1:]), len(b)):
        raise ValueError(
            f"x (N, d1, ..., dk), w (d1 * ... * dk, M) and b (M,) must fit, got {x.shape}, {w.shape} and {b.shape}"
        )
    out = _rows(x) @ w
    out += b
    return out, (x, w)


def affine_backward(
    dout: Any, cache: Any, *, input_gradient: bool = True
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Gradients of `affine_forward`: ``dx = dout @ w.T``, ``dw = x.T @ dout``, ``db = sum of dout's rows``.

    Parameters
    ----------
    dout : array_like, shape (N, M)
    cache : opaque
        From `affine_forward`.
    input_gradient : bool, default True
        False leaves dx out and gives None for it. The first layer of a network does not need it, and where the input is
        wide it is a third of the layer's work.

    Returns
    -------
    dx : ndarray, shape (N, d1, ..., dk), or None
    dw : ndarray, shape (D, M)
    db : ndarray, shape (M,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = affine_forward([[1.0, 2.0]], np.array([[3.0], [4.0]]), np.zeros(1))
    >>> dx, dw, db = affine_backward([[1.0]], cache)
    >>> dx, dw.T, db
    (array([[3., 4.]]), array([[1., 2.]]), array([1.]))
    """
    x, w = cache
    dout = _upstream(dout, (len(x), w.shape[1]))
    dx = (dout @ w.T).reshape(x.shape) if input_gradient else None
    return dx, _rows(x).T @ dout, dout.sum(axis=0)


def relu_forward(x: Any) -> tuple[np.ndarray, Any]:
    """The rectifier, ``out = max(0, x)``, element by element. NaN stays NaN.

    Parameters
    ----------
    x : array_like
        Of any shape.

    Returns
    -------
    out : ndarray
        In the shape of x.
    cache : opaque
        For `relu_backward`.

    Raises
    ------
    TypeError
        If x does not hold real numbers.

    Examples
    --------
    >>> relu_forward([-1.0, 2.0])[0]
    array([0., 2.])
    """
    x = _floats(x, "x")
    return np.maximum(x, 0), x


def relu_backward(dout: Any, cache: Any) -> np.ndarray:
    """Gradient of `relu_forward`: dout where x was positive, 0 elsewhere (at 0 too).

    Parameters
    ----------
    dout : array_like
        In the shape of out.
    cache : opaque
        From `relu_forward`.

    Returns
    -------
    ndarray
        dx.

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = relu_forward([-1.0, 2.0])
    >>> relu_backward([5.0, 5.0], cache)
    array([0., 5.])
    """
    return _upstream(dout, cache.shape) * (cache > 0)


def softmax_loss(x: Any, y: Any) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of the softmax of the scores, and its gradient.

    ``loss_i = log(sum_j exp(x_ij)) - x_i,y_i`` ([1]_, section 6.2.2.3). The row's largest score is subtracted first, so
    that no exponential overflows, and everything is computed in float64, whatever x is.

    Parameters
    ----------
    x : array_like, shape (N, C)
        Scores, of any size.
    y : array_like of int, shape (N,)
        Labels from 0 to C - 1.

    Returns
    -------
    loss : float
    dx : ndarray, shape (N, C)
        In the dtype of x.

    Raises
    ------
    ValueError
        If x is not (N, C) with at least one row, or y does not hold N whole numbers from 0 to C - 1.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press, 2016.

    Examples
    --------
    >>> loss, dx = softmax_loss([[1e300, 0.0]], [1])
    >>> loss, dx
    (1e+300, array([[ 1., -1.]]))
    """
    x, y = _scores_and_labels(x, y)
    rows = np.arange(len(x))
    # Beyond float64 a difference is minus infinity, and its exponential 0, and a loss is infinite: both are right.
    with np.errstate(over="ignore"):
        shifted = np.subtract(x, x.max(axis=1, keepdims=True), dtype=np.float64)
        probabilities = np.exp(shifted)
        sums = probabilities.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(sums[:, 0]) - shifted[rows, y])
    probabilities /= sums
    probabilities[rows, y] -= 1
    probabilities /= len(x)
    return float(loss), probabilities.astype(x.dtype, copy=False)


def svm_loss(x: Any, y: Any) -> tuple[float, np.ndarray]:
    """Multiclass hinge loss with margin 1, and its gradient.

    ``loss_i = sum over j != y_i of max(0, x_ij - x_i,y_i + 1)``, averaged over the rows [1]_; computed in float64,
    whatever x is.

    Parameters
    ----------
    x : array_like, shape (N, C)
        Scores, of any size.
    y : array_like of int, shape (N,)
        Labels from 0 to C - 1.

    Returns
    -------
    loss : float
    dx : ndarray, shape (N, C)
        In the dtype of x.

    Raises
    ------
    ValueError
        If x is not (N, C) with at least one row, or y does not hold N whole numbers from 0 to C - 1.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] J. Weston and C. Watkins, "Support Vector Machines for Multi-Class Pattern Recognition", ESANN 1999.

    Examples
    --------
    >>> svm_loss([[3.0, 2.5, 1.0]], [0])
    (0.5, array([[-1.,  1.,  0.]]))
    """
    x, y = _scores_and_labels(x, y)
    rows = np.arange(len(x))
    with np.errstate(over="ignore"):  # a margin beyond float64 is infinite, and so is the loss
        margins = np.subtract(x, x[rows, y, None], dtype=np.float64)
        margins += 1
        np.maximum(margins, 0, out=margins)
        margins[rows, y] = 0
        loss = margins.sum() / len(x)
    dx = np.sign(margins, out=margins)
    dx[rows, y] = -dx.sum(axis=1)
    dx /= len(x)
    return float(loss), dx.astype(x.dtype, copy=False)


def batchnorm_forward(x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Batch normalization of every feature (column) of x: `normext.batch_norm`, with its settings in a dict [1]_.

    Parameters
    ----------
    x : array_like, shape (N, D)
    gamma, beta : array_like, shape (D,)
        Scale and shift.
    bn_param : dict
        - ``mode``: 'train' normalizes with the mean and the biased variance of the batch; 'test' with the running ones.
          Required.
        - ``eps``: added to the variance, default 1e-5.
        - ``momentum``: default 0.9. In training ``running = momentum * running + (1 - momentum) * batch``.
        - ``running_mean``, ``running_var``: shape (D,), default zeros. In both modes new arrays are written back
          here; the ones that were here stay as they are.

    Returns
    -------
    out : ndarray, shape (N, D)
    cache : opaque
        For `batchnorm_backward` and `batchnorm_backward_alt`.

    Raises
    ------
    ValueError
        If the mode is neither 'train' nor 'test', a shape does not fit, or bn_param has a key that no norm has.
        bn_param is then left as it was.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167, Algorithm 1.

    Examples
    --------
    >>> bn_param = {"mode": "train", "eps": 0.0}
    >>> out, cache = batchnorm_forward([[1.0, 2.0], [3.0, 6.0]], [1, 1], [0, 0], bn_param)
    >>> out
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> bn_param["running_mean"]
    array([0.2, 0.4])
    """
    return batchnorm_with(batch_norm, _matrix(x, "x"), gamma, beta, bn_param)


def batchnorm_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batchnorm_forward`, stage by stage through its computation graph.

    The graph has nine nodes: mean, deviation, its square, variance, standard deviation, its inverse, normalized,
    scaled, shifted. Each is undone in turn, from the last to the first, in plain NumPy: read
    `normext.reference.batch_norm_backward_staged`, which is this function's whole work, beside the drawing of the
    graph. For speed take `batchnorm_backward_alt`. After a forward pass in test mode the graph is only its end: the
    statistics are constants, dx is ``dout * gamma / std``, and both functions do the same.

    Parameters
    ----------
    dout : array_like, shape (N, D)
    cache : opaque
        From `batchnorm_forward`.

    Returns
    -------
    dx : ndarray, shape (N, D)
    dgamma, dbeta : ndarray, shape (D,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = batchnorm_forward([[1.0], [3.0], [5.0]], [1.0], [0.0], {"mode": "train"})
    >>> dx, dgamma, dbeta = batchnorm_backward([[1.0], [2.0], [3.0]], cache)
    >>> dbeta
    array([6.])
    """
    dout = _upstream(dout, cache.x.shape)
    return batch_norm_backward_staged(dout, cache) if cache.training else batch_norm_backward(dout, cache)


def batchnorm_backward_alt(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batchnorm_forward` in the closed form, compiled: `normext.batch_norm_backward`.

    Parameters
    ----------
    dout : array_like, shape (N, D)
    cache : opaque
        From `batchnorm_forward`.

    Returns
    -------
    dx : ndarray, shape (N, D)
    dgamma, dbeta : ndarray, shape (D,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = batchnorm_forward([[1.0], [3.0], [5.0]], [1.0], [0.0], {"mode": "train"})
    >>> dx, dgamma, dbeta = batchnorm_backward_alt([[1.0], [2.0], [3.0]], cache)
    >>> dbeta
    array([6.])
    """
    return batch_norm_backward(_upstream(dout, cache.x.shape), cache)


def layernorm_forward(x: Any, gamma: Any, beta: Any, ln_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Layer normalization of every example (row) of x, in training and at test time alike: `normext.layer_norm` [1]_.

    Parameters
    ----------
    x : array_like, shape (N, D)
    gamma, beta : array_like, shape (D,)
        Scale and shift.
    ln_param : dict
        ``eps``, added to the variance, default 1e-5. What batch norm has besides, as the mode, is left alone.

    Returns
    -------
    out : ndarray, shape (N, D)
    cache : opaque
        For `layernorm_backward`.

    Raises
    ------
    ValueError
        If a shape does not fit, or ln_param has a key that no norm has.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450,
           section 3.

    Examples
    --------
    >>> layernorm_forward([[1.0, 3.0], [2.0, 6.0]], [1, 1], [0, 0], {"eps": 0.0})[0]
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    check_keys(ln_param, "ln_param")
    return layer_norm(_matrix(x, "x"), gamma, beta, eps=ln_param.get("eps", 1e-5))


def layernorm_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `layernorm_forward`, compiled: `normext.layer_norm_backward`.

    Parameters
    ----------
    dout : array_like, shape (N, D)
    cache : opaque
        From `layernorm_forward`.

    Returns
    -------
    dx : ndarray, shape (N, D)
    dgamma, dbeta : ndarray, shape (D,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = layernorm_forward([[1.0, 3.0], [2.0, 6.0]], [1, 1], [0, 0], {})
    >>> dx, dgamma, dbeta = layernorm_backward([[1.0, 2.0], [3.0, 4.0]], cache)
    >>> dbeta
    array([4., 6.])
    """
    return layer_norm_backward(_upstream(dout, cache.x.shape), cache)


def dropout_forward(x: Any, dropout_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Inverted dropout: in training every element is kept with probability p and then divided by p [1]_.

    Parameters
    ----------
    x : array_like
        Of any shape.
    dropout_param : dict
        - ``p``: probability to keep an element, above 0 and up to 1. Required.
        - ``mode``: 'train' drops; 'test' returns x as it is. Required.
        - ``seed``: optional; in training NumPy's global generator is seeded with it first, so that a gradient check
          drops the same elements every time.

    Returns
    -------
    out : ndarray
        In the shape of x.
    cache : opaque
        For `dropout_backward`.

    Raises
    ------
    ValueError
        If the mode is neither 'train' nor 'test', p is not above 0 and up to 1, or dropout_param has another key.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.

    Examples
    --------
    >>> out, cache = dropout_forward([1.0, 1.0, 1.0, 1.0], {"p": 0.5, "mode": "train", "seed": 231})
    >>> out
    array([0., 0., 2., 2.])
    """
    x = _floats(x, "x")
    check_keys(dropout_param, "dropout_param", ("p", "mode", "seed"))
    mode, p = dropout_param.get("mode"), dropout_param.get("p")
    if mode not in ("train", "test"):
        raise ValueError(f'Invalid forward dropout mode "{mode}"')
    if p is None or not 0 < p <= 1:
        raise ValueError(f"p, the probability to keep an element, must be above 0 and up to 1, got {p}")
    if mode == "test":
        return x, None
    if dropout_param.get("seed") is not None:
        np.random.seed(dropout_param["seed"])
    mask = np.divide(np.random.rand(*x.shape) < p, p, dtype=x.dtype)
    return x * mask, mask


def dropout_backward(dout: Any, cache: Any) -> np.ndarray:
    """Gradient of `dropout_forward`: what was dropped gets none, what was kept is divided by p too.

    Parameters
    ----------
    dout : array_like
        In the shape of out.
    cache : opaque
        From `dropout_forward`.

    Returns
    -------
    ndarray
        dx.

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = dropout_forward([1.0, 1.0, 1.0, 1.0], {"p": 0.5, "mode": "train", "seed": 231})
    >>> dropout_backward([3.0, 3.0, 3.0, 3.0], cache)
    array([0., 0., 6., 6.])
    """
    return _floats(dout, "dout") if cache is None else _upstream(dout, cache.shape) * cache


def conv_forward_naive(x: Any, w: Any, b: Any, conv_param: dict[str, int]) -> tuple[np.ndarray, Any]:
    """A convolutional layer, one output at a time: the product of a filter and a window, summed, plus a bias.

    ``out[n, f, i, j] = sum(window * w[f]) + b[f]``. The window of image n is as large as the filter and starts i
    strides down and j strides across in the padded image. (Mathematics turns the filter by 180 degrees first and calls
    this cross-correlation; a net that learns its filters need not [1]_.) For speed take
    `normext.cs231n.fast_layers.conv_forward_fast`.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
    w : array_like, shape (F, C, HH, WW)
        F filters.
    b : array_like, shape (F,)
        A bias for each filter.
    conv_param : dict
        ``stride``, the steps from one window to the next, and ``pad``, the rows and columns of zeros on every side of
        an image. Both are required.

    Returns
    -------
    out : ndarray, shape (N, F, 1 + (H + 2 * pad - HH) / stride, 1 + (W + 2 * pad - WW) / stride)
    cache : opaque
        For `conv_backward_naive`.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, the last window does not end where the padded image does, or conv_param
        has another key.
    TypeError
        If x, w or b does not hold real numbers.

    References
    ----------
    .. [1] I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press, 2016, section 9.1.

    Examples
    --------
    >>> out, cache = conv_forward_naive([[[[1.0, 2.0, 4.0]]]], [[[[-1.0, 1.0]]]], [0.5], {"stride": 1, "pad": 0})
    >>> out
    array([[[[1.5, 2.5]]]])
    """
    x, w, b = _images(x, "x"), _floats(w, "w"), _floats(b, "b")
    if w.ndim != 4 or w.shape[1] != x.shape[1] or b.shape != w.shape[:1]:
        raise ValueError(
            f"x (N, C, H, W), w (F, C, HH, WW) and b (F,) must fit, got {x.shape}, {w.shape} and {b.shape}"
        )
    g = conv_windows(x, w, conv_param)
    padded = pad(x, g.padding)
    out = np.empty((len(x), len(w), *g.output), np.result_type(x, w))
    for n, f, i, j in np.ndindex(out.shape):
        rows, columns = _window(g, i, j)
        out[n, f, i, j] = np.sum(padded[n, :, rows, columns] * w[f]) + b[f]
    return out, (x, w, g)


def conv_backward_naive(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `conv_forward_naive`, one output at a time.

    Of ``sum(window * w[f]) + b[f]`` the gradient by the window is the filter, and that by the filter is the window.

    Parameters
    ----------
    dout : array_like
        In the shape of out.
    cache : opaque
        From `conv_forward_naive`.

    Returns
    -------
    dx, dw, db : ndarray
        In the shapes of x, w and b.

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = conv_forward_naive([[[[1.0, 2.0, 4.0]]]], [[[[-1.0, 1.0]]]], [0.5], {"stride": 1, "pad": 0})
    >>> dx, dw, db = conv_backward_naive([[[[1.0, 10.0]]]], cache)
    >>> dx, dw, db
    (array([[[[-1., -9., 10.]]]]), array([[[[21., 42.]]]]), array([11.]))
    """
    x, w, g = cache
    dout = _upstream(dout, (len(x), len(w), *g.output))
    padded = pad(x, g.padding)
    dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
    for (n, f, i, j), gradient in np.ndenumerate(dout):
        rows, columns = _window(g, i, j)
        dpadded[n, :, rows, columns] += gradient * w[f]
        dw[f] += gradient * padded[n, :, rows, columns]
    return unpad(dpadded, g.padding), dw, dout.sum(axis=(0, 2, 3))


def max_pool_forward_naive(x: Any, pool_param: dict[str, int]) -> tuple[np.ndarray, Any]:
    """Max pooling, one output at a time: the largest number in a window of a channel. NaN wins, as in NumPy's max.

    For speed take `normext.cs231n.fast_layers.max_pool_forward_fast`.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
    pool_param : dict
        ``pool_height`` and ``pool_width``, the size of a window, and ``stride``, the steps from one window to the next:
        a stride below the size makes them overlap. All are required.

    Returns
    -------
    out : ndarray, shape (N, C, 1 + (H - pool_height) / stride, 1 + (W - pool_width) / stride)
    cache : opaque
        For `max_pool_backward_naive`.

    Raises
    ------
    ValueError
        If x does not have four axes, the last window does not end where the image does, or pool_param has another key.
    TypeError
        If x does not hold real numbers.

    Examples
    --------
    >>> out, cache = max_pool_forward_naive([[[[1.0, 2.0, 2.0]]]], {"pool_height": 1, "pool_width": 2, "stride": 1})
    >>> out
    array([[[[2., 2.]]]])
    """
    x = _images(x, "x")
    g = pool_windows(x, pool_param)
    out = np.empty((*x.shape[:2], *g.output), x.dtype)
    for n, c, i, j in np.ndindex(out.shape):
        rows, columns = _window(g, i, j)
        out[n, c, i, j] = x[n, c, rows, columns].max()
    return out, (x, g)


def max_pool_backward_naive(dout: Any, cache: Any) -> np.ndarray:
    """Gradient of `max_pool_forward_naive`: a window's goes to its largest number, and of equal ones to the first.

    Parameters
    ----------
    dout : array_like
        In the shape of out.
    cache : opaque
        From `max_pool_forward_naive`.

    Returns
    -------
    ndarray, shape (N, C, H, W)
        dx.

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = max_pool_forward_naive([[[[1.0, 2.0, 2.0]]]], {"pool_height": 1, "pool_width": 2, "stride": 1})
    >>> max_pool_backward_naive([[[[10.0, 5.0]]]], cache)
    array([[[[ 0., 15.,  0.]]]])
    """
    x, g = cache
    dout = _upstream(dout, (*x.shape[:2], *g.output))
    dx = np.zeros_like(x)
    for (n, c, i, j), gradient in np.ndenumerate(dout):
        rows, columns = _window(g, i, j)
        largest = np.unravel_index(x[n, c, rows, columns].argmax(), g.kernel)
        dx[n, c, rows, columns][largest] += gradient
    return dx


def spatial_batchnorm_forward(x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Batch normalization of every channel of images, over all images and pixels: `normext.batch_norm` [1]_.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
    gamma, beta : array_like, shape (C,)
        Scale and shift.
    bn_param : dict
        As for `batchnorm_forward`; the running statistics have the shape (C,).

    Returns
    -------
    out : ndarray, shape (N, C, H, W)
    cache : opaque
        For `spatial_batchnorm_backward`.

    Raises
    ------
    ValueError
        If the mode is neither 'train' nor 'test', a shape does not fit, or bn_param has a key that no norm has.
        bn_param is then left as it was.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167, section 3.2.

    Examples
    --------
    >>> bn_param = {"mode": "train", "eps": 0.0}
    >>> spatial_batchnorm_forward([[[[1.0, 3.0]]], [[[3.0, 1.0]]]], [1], [0], bn_param)[0].ravel()
    array([-1.,  1.,  1., -1.])
    """
    return batchnorm_with(batch_norm, _images(x, "x"), gamma, beta, bn_param)


def spatial_batchnorm_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `spatial_batchnorm_forward`, compiled: `normext.batch_norm_backward`.

    Parameters
    ----------
    dout : array_like, shape (N, C, H, W)
    cache : opaque
        From `spatial_batchnorm_forward`.

    Returns
    -------
    dx : ndarray, shape (N, C, H, W)
    dgamma, dbeta : ndarray, shape (C,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> out, cache = spatial_batchnorm_forward([[[[1.0, 3.0]]]], [1], [0], {"mode": "train"})
    >>> dx, dgamma, dbeta = spatial_batchnorm_backward([[[[1.0, 2.0]]]], cache)
    >>> dbeta
    array([3.])
    """
    return batch_norm_backward(_upstream(dout, cache.x.shape), cache)


def spatial_groupnorm_forward(
    x: Any, gamma: Any, beta: Any, G: int, gn_param: dict[str, Any]
) -> tuple[np.ndarray, Any]:
    """Normalization of every image's channels in G groups, in training and test alike: `normext.group_norm` [1]_.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
    gamma, beta : array_like, shape (1, C, 1, 1)
        Scale and shift of every channel.
    G : int
        Number of groups; it divides C.
    gn_param : dict
        ``eps``, added to the variance, default 1e-5. What batch norm has besides, as the mode, is left alone.

    Returns
    -------
    out : ndarray, shape (N, C, H, W)
    cache : opaque
        For `spatial_groupnorm_backward`.

    Raises
    ------
    ValueError
        If a shape does not fit, G does not divide C, or gn_param has a key that no norm has.
    TypeError
        If x does not hold real numbers.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494, section 3.

    Examples
    --------
    >>> x, one = np.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 4, 1, 1), np.ones((1, 4, 1, 1))
    >>> spatial_groupnorm_forward(x, one, 0 * one, 2, {"eps": 0.0})[0].ravel()
    array([-1.,  1., -1.,  1.])
    """
    x = _images(x, "x")
    check_keys(gn_param, "gn_param")
    per_channel = (1, x.shape[1], 1, 1)
    for name, values in (("gamma", gamma), ("beta", beta)):
        if np.shape(values) != per_channel:
            raise ValueError(f"{name} must have the shape (1, C, 1, 1) = {per_channel}, got {np.shape(values)}")
    return group_norm(x, G, np.ravel(gamma), np.ravel(beta), eps=gn_param.get("eps", 1e-5))


def spatial_groupnorm_backward(dout: Any, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `spatial_groupnorm_forward`, compiled: `normext.group_norm_backward`.

    Parameters
    ----------
    dout : array_like, shape (N, C, H, W)
    cache : opaque
        From `spatial_groupnorm_forward`.

    Returns
    -------
    dx : ndarray, shape (N, C, H, W)
    dgamma, dbeta : ndarray, shape (1, C, 1, 1)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> x, one = np.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 4, 1, 1), np.ones((1, 4, 1, 1))
    >>> out, cache = spatial_groupnorm_forward(x, one, 0 * one, 2, {})
    >>> dx, dgamma, dbeta = spatial_groupnorm_backward(x, cache)
    >>> dbeta.shape
    (1, 4, 1, 1)
    """
    dx, dgamma, dbeta = group_norm_backward(_upstream(dout, cache.x.shape), cache)
    return dx, dgamma.reshape(1, -1, 1, 1), dbeta.reshape(1, -1, 1, 1)


def batchnorm_with(norm, x, gamma, beta, bn_param):
    """`batchnorm_forward` of every channel, axis 1 of x, by `norm`, which is called as `normext.batch_norm` is."""
    check_keys(bn_param, "bn_param")
    mode = bn_param.get("mode")
    if mode not in ("train", "test"):
        raise ValueError(f'Invalid forward batchnorm mode "{mode}"')
    running_mean, running_var = (_running(bn_param, key, x) for key in ("running_mean", "running_var"))
    out, cache = norm(
        x,
        gamma,
        beta,
        running_mean=running_mean,
        running_var=running_var,
        training=mode == "train",
        momentum=bn_param.get("momentum", 0.9),
        eps=bn_param.get("eps", 1e-5),
    )
    bn_param["running_mean"], bn_param["running_var"] = running_mean, running_var
    return out, cache


def _floats(values, name):
    """An array of floats: whole numbers become float64, as in NumPy's own arithmetic."""
    values = np.asarray(values)
    if values.dtype.kind in "iub":
        return values.astype(np.float64)
    if values.dtype.kind != "f":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    return values


def _matrix(values, name):
    values = _floats(values, name)
    if values.ndim != 2:
        raise ValueError(f"{name} must have two axes (N, D), got shape {values.shape}")
    return values


def _images(values, name):
    values = _floats(values, name)
    if values.ndim != 4:
        raise ValueError(f"{name} must have four axes (N, C, H, W), got shape {values.shape}")
    return values


def _rows(x):
    # Not reshape(N, -1): that has no answer when there are no rows.
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _upstream(dout, shape):
    """`dout`, which must have the shape of out: NumPy would broadcast a wrong one without a word."""
    dout = _floats(dout, "dout")
    if dout.shape != shape:
        raise ValueError(f"dout must have the shape of out, {shape}, got {dout.shape}")
    return dout


def _running(bn_param, key, x):
    """The running statistic under `key` in a new array, at least as precise as x; zeros where there is none yet."""
    given = bn_param.get(key)
    if given is None:
        return np.zeros(x.shape[1], x.dtype)
    given = np.asarray(given)
    return given.astype(np.result_type(given, x))


def _window(g, i, j):
    """Rows and columns of the window that is i-th from the top and j-th from the left."""
    top, left = i * g.stride[0], j * g.stride[1]
    return slice(top, top + g.kernel[0]), slice(left, left + g.kernel[1])


def _scores_and_labels(x, y):
    x, y = _matrix(x, "x"), np.asarray(y)
    if len(x) == 0:
        raise ValueError(f"x must have at least one row, got shape {x.shape}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(f"y must hold {len(x)} whole numbers, one a row of x, got shape {y.shape}, dtype {y.dtype}")
    if y.min() < 0 or y.max() >= x.shape[1]:
        raise ValueError(f"y must hold labels from 0 to {x.shape[1] - 1}, got {y.min()} to {y.max()}")
    return x, y
