"""Convolution and max pooling at speed, with the signatures of the naive ones in `normext.cs231n.layers`.

A convolution is a matrix product with the windows as columns. These are made a block at a time, small enough to be
still in cache when the product reads them, and made again in the backward pass: extra memory is bounded by the block,
not by the batch. One thread makes a block: the product's threads are the BLAS's, and to put one set of threads to sleep
and wake the other for every block costs more than it saves, and very much more where other programs want the cores.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from normext._core import windows as _windows
from normext.cs231n.im2col import conv_windows, pool_windows
from normext.windows import Windows, contiguous_floats

__all__ = [
    "conv_backward_fast",
    "conv_backward_im2col",
    "conv_backward_strides",
    "conv_forward_fast",
    "conv_forward_im2col",
    "conv_forward_strides",
    "max_pool_backward_fast",
    "max_pool_backward_im2col",
    "max_pool_backward_reshape",
    "max_pool_forward_fast",
    "max_pool_forward_im2col",
    "max_pool_forward_reshape",
]

BLOCK_BYTES = 1 << 20  # of columns: half of a second-level cache of today


def conv_forward_fast(x: Any, w: Any, b: Any, conv_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Convolution (cross-correlation, as in all networks) of images with filters.

    Parameters
    ----------
    x : array_like of float32 or float64, shape (N, C, H, W)
    w : array_like, shape (F, C, HH, WW)
    b : array_like, shape (F,)
    conv_param : dict
        ``stride``: distance between windows. ``pad``: zeros around the image, on each side.

    Returns
    -------
    out : ndarray, shape (N, F, H', W')
        ``H' = (H + 2 * pad - HH) / stride + 1``, and W' alike; in the wider dtype of x and w.
    cache : opaque
        For `conv_backward_fast`. It refers to x and w.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, the windows do not fit the image without a remainder, or conv_param has
        another key.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2))
    >>> out, cache = conv_forward_fast(x, w, np.zeros(1), {"stride": 1, "pad": 0})
    >>> out[0, 0]
    array([[ 8., 12.],
           [20., 24.]])
    """
    x, w, b = contiguous_floats(x, "x"), contiguous_floats(w, "w"), contiguous_floats(b, "b")
    if x.ndim != 4 or w.ndim != 4 or b.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x (N, C, H, W), w (F, C, HH, WW) and b (F,) must fit, got {x.shape}, {w.shape} and {b.shape}"
        )
    dtype = np.result_type(x, w)
    x, w, b = (a.astype(dtype, copy=False) for a in (x, w, b))
    g = conv_windows(x, w, conv_param)
    F = len(w)
    out = np.empty((len(x), F, *g.output), dtype)
    flat_w, flat_out = w.reshape(F, -1), out.reshape(len(x), F, math.prod(g.output))
    for images, rows, cols in _blocks(x, g):
        result = flat_out[images, :, rows.start * g.output[1] : rows.stop * g.output[1]]
        np.matmul(flat_w, cols, out=result)
        result += b[:, None]
    return out, (x, w, g)


def conv_backward_fast(
    dout: Any, cache: Any, *, input_gradient: bool = True
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Gradients of `conv_forward_fast`.

    Parameters
    ----------
    dout : array_like, shape (N, F, H', W')
    cache : opaque
        From `conv_forward_fast`.
    input_gradient : bool, default True
        False leaves dx out and gives None for it: the first layer of a network does not need it.

    Returns
    -------
    dx : ndarray, shape (N, C, H, W), or None
    dw : ndarray, shape (F, C, HH, WW)
    db : ndarray, shape (F,)

    Raises
    ------
    ValueError
        If dout does not have the shape of out.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2))
    >>> out, cache = conv_forward_fast(x, w, np.zeros(1), {"stride": 1, "pad": 0})
    >>> dx, dw, db = conv_backward_fast(np.ones_like(out), cache)
    >>> dw[0, 0], db
    (array([[ 8., 12.],
           [20., 24.]]), array([4.]))
    """
    x, w, g = cache
    F = len(w)
    dout = _upstream(dout, (len(x), F, *g.output), x.dtype)
    flat_w, flat_dout = w.reshape(F, -1), dout.reshape(len(x), F, math.prod(g.output))
    dx, dw = np.zeros_like(x) if input_gradient else None, np.zeros_like(flat_w)
    for images, rows, cols in _blocks(x, g):
        gradient = flat_dout[images, :, rows.start * g.output[1] : rows.stop * g.output[1]]
        dw += np.matmul(gradient, cols.transpose(0, 2, 1)).sum(axis=0)
        if dx is None:
            continue
        if _pointwise(g):
            np.matmul(flat_w.T, gradient, out=dx[images].reshape(cols.shape))
        else:
            np.matmul(flat_w.T, gradient, out=cols)  # over the columns, which are done with
            _windows.scatter(cols, dx[images], g, rows.start, rows.stop, one_thread=True)
    return dx, dw.reshape(w.shape), dout.sum(axis=(0, 2, 3))


def max_pool_forward_fast(x: Any, pool_param: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """The largest number of every window. NaN is larger than all, as in NumPy's max.

    Parameters
    ----------
    x : array_like of float32 or float64, shape (N, C, H, W)
    pool_param : dict
        ``pool_height`` and ``pool_width`` of the window; ``stride``, the distance between windows, which may overlap.

    Returns
    -------
    out : ndarray, shape (N, C, H', W')
        ``H' = (H - pool_height) / stride + 1``, and W' alike.
    cache : opaque
        For `max_pool_backward_fast`: the position of each window's winner, in one byte for windows of up to 256.

    Raises
    ------
    ValueError
        If x has not four axes, the windows do not fit the image without a remainder, or pool_param has another key.

    Examples
    --------
    >>> import numpy as np
    >>> pool_param = {"pool_height": 2, "pool_width": 2, "stride": 2}
    >>> out, cache = max_pool_forward_fast(np.arange(16.0).reshape(1, 1, 4, 4), pool_param)
    >>> out[0, 0]
    array([[ 5.,  7.],
           [13., 15.]])
    """
    x = contiguous_floats(x, "x")
    if x.ndim != 4:
        raise ValueError(f"x must have four axes (N, C, H, W), got shape {x.shape}")
    g = pool_windows(x, pool_param)
    planes = x.shape[0] * x.shape[1]
    out = np.empty((*x.shape[:2], *g.output), x.dtype)
    winner = np.empty((planes, *g.output), np.uint8 if math.prod(g.kernel) <= 256 else np.int32)
    _windows.max_pool(x.reshape(planes, *x.shape[2:]), out.reshape(winner.shape), winner, g)
    return out, (winner, x.shape, x.dtype, g)


def max_pool_backward_fast(dout: Any, cache: Any) -> np.ndarray:
    """Gradient of `max_pool_forward_fast`: every number goes to its window's winner, the first of equals.

    Parameters
    ----------
    dout : array_like, shape (N, C, H', W')
    cache : opaque
        From `max_pool_forward_fast`.

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
    >>> import numpy as np
    >>> pool_param = {"pool_height": 2, "pool_width": 2, "stride": 2}
    >>> out, cache = max_pool_forward_fast(np.array([[[[1.0, 5.0], [2.0, 5.0]]]]), pool_param)
    >>> max_pool_backward_fast([[[[7.0]]]], cache)[0, 0]
    array([[0., 7.],
           [0., 0.]])
    """
    winner, shape, dtype, g = cache
    dout = _upstream(dout, (*shape[:2], *g.output), dtype)
    dx = np.empty(shape, dtype)
    _windows.max_pool_backward(dout.reshape(winner.shape), winner, dx.reshape(len(winner), *shape[2:]), g)
    return dx


# The course has several ways to the same results; here the names are one.
conv_forward_im2col = conv_forward_strides = conv_forward_fast
conv_backward_im2col = conv_backward_strides = conv_backward_fast
max_pool_forward_im2col = max_pool_forward_reshape = max_pool_forward_fast
max_pool_backward_im2col = max_pool_backward_reshape = max_pool_backward_fast


def _pointwise(g):
    """Whether the windows are the pixels, and the images their own columns."""
    return g.kernel == g.stride == (1, 1) and g.padding == (0, 0)


def _blocks(x: np.ndarray, g: Windows) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """The columns (images, C * kh * kw, windows) of some images, or of some output rows of one, in turn.

    Each is in the same memory as the one before, and may be written over, unless `_pointwise`.
    """
    N, K = len(x), x.shape[1] * math.prod(g.kernel)
    down, across = g.output
    row_bytes = max(1, K * across * x.itemsize)
    images = min(N, max(1, BLOCK_BYTES // (row_bytes * down)))
    rows = down if images > 1 or _pointwise(g) else min(down, max(1, BLOCK_BYTES // row_bytes))
    memory = np.empty(0 if _pointwise(g) else images * K * rows * across, x.dtype)
    for start in range(0, N, max(1, images)):
        image_slice = slice(start, min(start + images, N))
        count = image_slice.stop - start
        for first in range(0, down, rows):
            row_slice = slice(first, min(first + rows, down))
            shape = (count, K, (row_slice.stop - first) * across)
            if _pointwise(g):
                cols = x[image_slice].reshape(shape)
            else:
                cols = memory[: math.prod(shape)].reshape(shape)
                _windows.gather(x[image_slice], cols, g, first, row_slice.stop, one_thread=True)
            yield image_slice, row_slice, cols


def _upstream(dout, shape, dtype):
    dout = contiguous_floats(dout, "dout")
    if dout.shape != shape:
        raise ValueError(f"dout must have the shape of out, {shape}, got {dout.shape}")
    return dout.astype(dtype, copy=False)
