"""Windows over images as columns, and back: with these a convolution is one matrix product."""

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normext._core import windows as _windows

__all__ = ["col2im", "im2col"]

Pair = int | tuple[int, int]


class Windows(NamedTuple):
    """How windows lie over images, and how many there are down and across: checked, as the compiled loops take it."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]

    @classmethod
    def over(cls, size: tuple[int, int], kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> "Windows":
        """The windows over images of that height and width; a last one that would stick out is left out."""
        kernel, stride = _pair(kernel_size, "kernel_size", 1), _pair(stride, "stride", 1)
        padding, dilation = _pair(padding, "padding", 0), _pair(dilation, "dilation", 1)
        room = [n + 2 * p - d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)]
        if min(room) < 1:
            raise ValueError(
                f"kernel_size {kernel} with dilation {dilation} does not fit images of {size[0]} x {size[1]} with "
                f"padding {padding}"
            )
        down, across = ((n - 1) // s + 1 for n, s in zip(room, stride, strict=True))
        return cls(kernel, stride, padding, dilation, (down, across))


def im2col(
    x: ArrayLike,
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Lay every window of every image out as a column (PyTorch's ``unfold``).

    With ``w`` of shape (F, C, kh, kw), ``w.reshape(F, -1) @ im2col(x, (kh, kw))`` is the convolution
    (cross-correlation) of x with w, in the shape (N, F, out_h * out_w): [1]_.

    Parameters
    ----------
    x : array_like of float32 or float64, shape (N, C, H, W)
        Integers are taken as float64. Copied if it is not contiguous.
    kernel_size : int or (int, int)
        Height and width (kh, kw) of the window; one number stands for both, here and below.
    stride : int or (int, int), default 1
        Distance between windows.
    padding : int or (int, int), default 0
        Zeros around the image, on each side. No padded copy is made.
    dilation : int or (int, int), default 1
        Distance between the numbers of a window.
    out : ndarray, shape (N, C * kh * kw, out_h * out_w), optional
        Where to write the columns: contiguous, in the dtype of x, and apart from x.

    Returns
    -------
    ndarray, shape (N, C * kh * kw, out_h * out_w)
        Rows in the order (C, kh, kw), windows in the order (out_h, out_w), with
        ``out_h = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``; `out` if that was given.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or a size is not an integer.
    ValueError
        If x has not four axes, the window does not fit the image, a size is out of range, or `out` does not fit.

    See Also
    --------
    col2im : its adjoint.

    References
    ----------
    .. [1] K. Chellapilla, S. Puri and P. Simard, "High Performance Convolutional Neural Networks for Document
           Processing", IWFHR 2006.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> normext.im2col(x, 2)
    array([[[0., 1., 3., 4.],
            [1., 2., 4., 5.],
            [3., 4., 6., 7.],
            [4., 5., 7., 8.]]])
    """
    x = contiguous_floats(x, "x")
    if x.ndim != 4:
        raise ValueError(f"x must have four axes (N, C, H, W), got shape {x.shape}")
    N, C, H, W = x.shape
    g = Windows.over((H, W), kernel_size, stride, padding, dilation)
    cols = _result(out, (N, C * math.prod(g.kernel), math.prod(g.output)), x, "x")
    _windows.gather(x, cols, g)
    return cols


def col2im(
    cols: ArrayLike,
    x_shape: tuple[int, int, int, int],
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Add columns up to images (PyTorch's ``fold``): the adjoint of `im2col`, and so its gradient.

    Every number of an image is the sum of the numbers of `cols` that `im2col` would copy it to:
    ``vdot(im2col(x), cols) == vdot(x, col2im(cols))``.

    Parameters
    ----------
    cols : array_like of float32 or float64, shape (N, C * kh * kw, out_h * out_w)
        Integers are taken as float64. Copied if it is not contiguous.
    x_shape : (int, int, int, int)
        Shape (N, C, H, W) of the images.
    kernel_size, stride, padding, dilation : int or (int, int)
        As for `im2col`.
    out : ndarray, shape (N, C, H, W), optional
        Where to write the images: contiguous, in the dtype of cols, and apart from cols.

    Returns
    -------
    ndarray, shape (N, C, H, W)
        `out` if that was given.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or a size is not an integer.
    ValueError
        If cols has not the shape that goes with the other arguments, the window does not fit the image, a size is out
        of range, or `out` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> normext.col2im(np.ones((1, 4, 4)), (1, 1, 3, 3), 2)  # how many windows each pixel is in
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    cols = contiguous_floats(cols, "cols")
    x_shape = tuple(_size(n, "x_shape", 0) for n in x_shape)
    if len(x_shape) != 4:
        raise ValueError(f"x_shape must have four numbers (N, C, H, W), got {x_shape}")
    N, C, H, W = x_shape
    g = Windows.over((H, W), kernel_size, stride, padding, dilation)
    wanted = (N, C * math.prod(g.kernel), math.prod(g.output))
    if cols.shape != wanted:
        raise ValueError(f"cols must have shape {wanted} for x_shape {x_shape} and these windows, got {cols.shape}")
    x = _result(out, x_shape, cols, "cols")
    x[...] = 0
    _windows.scatter(cols, x, g)
    return x


def contiguous_floats(a: ArrayLike, name: str) -> NDArray[Any]:
    """`a` as a contiguous array of float32 or float64, integers as float64."""
    a = np.asarray(a)
    if a.dtype.kind in "iub":
        a = a.astype(np.float64)
    if a.dtype.kind != "f" or a.dtype.itemsize not in (4, 8):
        raise TypeError(
            f"{name} must be an array of float32 or float64 (or of integers, taken as float64), got dtype {a.dtype}"
        )
    return np.require(a, a.dtype.newbyteorder("="), ["C", "A"])


def _result(out, shape, source, source_name):
    if out is None:
        return np.empty(shape, source.dtype)
    if not isinstance(out, np.ndarray) or out.dtype != source.dtype:
        raise TypeError(f"out must be an ndarray of {source.dtype}, got {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise ValueError("out must be contiguous, aligned and writable")
    if np.may_share_memory(out, source):
        raise ValueError(f"out must share no memory with {source_name}, but they overlap")
    return out


def _pair(value, name, least):
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or a pair of them, got {value!r}")
    return _size(pair[0], name, least), _size(pair[1], name, least)


def _size(value, name, least):
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be of integers, got {value!r}") from None
    if not least <= size < 2**31:
        raise ValueError(f"{name} must be from {least} to 2**31 - 1, got {size}")
    return size
