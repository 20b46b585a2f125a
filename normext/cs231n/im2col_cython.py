"""Columns out of images and back, as the course's compiled extension lays them out: the batch innermost."""

from typing import Any

import numpy as np

from normext._core import windows as _windows
from normext.windows import Windows, contiguous_floats

__all__ = ["col2im_6d_cython", "col2im_cython", "im2col_cython"]


def im2col_cython(x: Any, field_height: int, field_width: int, padding: int, stride: int) -> np.ndarray:
    """Every window of every image as a column.

    Parameters
    ----------
    x : array_like of float32 or float64, shape (N, C, H, W)
    field_height, field_width : int
        Of the window.
    padding : int
        Zeros around the image, on each side.
    stride : int
        Distance between windows.

    Returns
    -------
    ndarray, shape (C * field_height * field_width, out_h * out_w * N)
        Columns in the order (out_h, out_w, N).

    Raises
    ------
    ValueError
        If x has not four axes, or the window does not fit the image.

    See Also
    --------
    normext.im2col : with the batch outermost, dilation, and sizes that differ between height and width.

    Examples
    --------
    >>> import numpy as np
    >>> im2col_cython(np.arange(9.0).reshape(1, 1, 3, 3), 2, 2, 0, 1)[0]
    array([0., 1., 3., 4.])
    """
    x = contiguous_floats(x, "x")
    if x.ndim != 4:
        raise ValueError(f"x must have four axes (N, C, H, W), got shape {x.shape}")
    N, C, H, W = x.shape
    g = Windows.over((H, W), (field_height, field_width), stride, padding, 1)
    cols = np.empty((C * field_height * field_width, g.output[0] * g.output[1] * N), x.dtype)
    _windows.gather_batch_innermost(x, cols, g)
    return cols


def col2im_cython(
    cols: Any, N: int, C: int, H: int, W: int, field_height: int, field_width: int, padding: int, stride: int
) -> np.ndarray:
    """Add columns up to images: the adjoint of `im2col_cython`.

    Parameters
    ----------
    cols : array_like of float32 or float64, shape (C * field_height * field_width, out_h * out_w * N)
    N, C, H, W : int
        Shape of the images.
    field_height, field_width, padding, stride : int
        As for `im2col_cython`.

    Returns
    -------
    ndarray, shape (N, C, H, W)

    Raises
    ------
    ValueError
        If cols has not the shape that goes with the other arguments, or the window does not fit the image.

    Examples
    --------
    >>> import numpy as np
    >>> col2im_cython(np.ones((4, 4)), 1, 1, 3, 3, 2, 2, 0, 1)[0, 0]
    array([[1., 2., 1.],
           [2., 4., 2.],
           [1., 2., 1.]])
    """
    cols = contiguous_floats(cols, "cols")
    g = Windows.over((H, W), (field_height, field_width), stride, padding, 1)
    _check_shape(cols, (C * field_height * field_width, g.output[0] * g.output[1] * N))
    x = np.empty((N, C, H, W), cols.dtype)
    _windows.scatter_batch_innermost(cols, x, g)
    return x


def col2im_6d_cython(cols: Any, N: int, C: int, H: int, W: int, HH: int, WW: int, pad: int, stride: int) -> np.ndarray:
    """Add columns with six axes up to images.

    Parameters
    ----------
    cols : array_like of float32 or float64, shape (C, HH, WW, N, out_h, out_w)
    N, C, H, W : int
        Shape of the images.
    HH, WW : int
        Of the window.
    pad, stride : int
        As for `im2col_cython`.

    Returns
    -------
    ndarray, shape (N, C, H, W)

    Raises
    ------
    ValueError
        If cols has not the shape that goes with the other arguments, or the window does not fit the image.

    Examples
    --------
    >>> import numpy as np
    >>> col2im_6d_cython(np.ones((1, 2, 2, 1, 2, 2)), 1, 1, 3, 3, 2, 2, 0, 1)[0, 0]
    array([[1., 2., 1.],
           [2., 4., 2.],
           [1., 2., 1.]])
    """
    cols = contiguous_floats(cols, "cols")
    g = Windows.over((H, W), (HH, WW), stride, pad, 1)
    _check_shape(cols, (C, HH, WW, N, *g.output))
    x = np.zeros((N, C, H, W), cols.dtype)
    _windows.scatter(cols.reshape(C * HH * WW, N, g.output[0] * g.output[1]), x, g, channels_first=True)
    return x


def _check_shape(cols, shape):
    if cols.shape != shape:
        raise ValueError(f"cols must have shape {shape} for these images and windows, got {cols.shape}")
