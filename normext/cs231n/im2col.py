"""Windows of images as the columns of a matrix, by fancy indexing: the reference of `normext.cs231n.im2col_cython`.

N is the number of images, C of channels, H and W their height and width. The matrix has a row for every position in a
window, (channel, row, column) in this order, and a column for every window, (row, column, image) in this order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from normext.cs231n._keys import check_keys
from normext.windows import Windows

__all__ = ["col2im_indices", "get_im2col_indices", "im2col_indices"]


def get_im2col_indices(
    x_shape: Sequence[int], field_height: int, field_width: int, padding: int = 1, stride: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the numbers of every window lie in a padded image.

    Parameters
    ----------
    x_shape : sequence of int
        (N, C, H, W), of the images without padding.
    field_height, field_width : int
        Size of a window.
    padding : int, default 1
        Rows and columns of zeros on every side.
    stride : int, default 1
        Steps from a window to the next, down and across.

    Returns
    -------
    k, i, j : ndarray of int
        Channel (C * field_height * field_width, 1), row and column (both (C * field_height * field_width,
        out_height * out_width)): ``padded[:, k, i, j]`` are the windows.

    Raises
    ------
    ValueError
        If the windows do not fit.

    Examples
    --------
    >>> k, i, j = get_im2col_indices((1, 1, 2, 3), 2, 2, padding=0)
    >>> j
    array([[0, 1],
           [1, 2],
           [0, 1],
           [1, 2]])
    """
    if len(x_shape) != 4:
        raise ValueError(f"x_shape must have four numbers (N, C, H, W), got {tuple(x_shape)}")
    _, C, H, W = x_shape
    g = exact_windows((H, W), (field_height, field_width), stride, padding)
    k, row, column = np.indices((C, *g.kernel)).reshape(3, -1, 1)
    top, left = np.indices(g.output).reshape(2, -1)
    return k, row + stride * top, column + stride * left


def im2col_indices(x: Any, field_height: int, field_width: int, padding: int = 1, stride: int = 1) -> np.ndarray:
    """The windows of all images, a column each.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
    field_height, field_width, padding, stride
        As for `get_im2col_indices`.

    Returns
    -------
    ndarray, shape (C * field_height * field_width, out_height * out_width * N)
        In the dtype of x.

    Raises
    ------
    ValueError
        If the windows do not fit.

    Examples
    --------
    >>> im2col_indices([[[[0, 1, 2], [3, 4, 5]]]], 2, 2, padding=0)
    array([[0, 1],
           [1, 2],
           [3, 4],
           [4, 5]])
    """
    x = np.asarray(x)
    k, i, j = get_im2col_indices(x.shape, field_height, field_width, padding, stride)
    windows = pad(x, (padding, padding))[:, k, i, j]
    return windows.transpose(1, 2, 0).reshape(len(i), i.shape[1] * len(x))


def col2im_indices(
    cols: Any, x_shape: Sequence[int], field_height: int = 3, field_width: int = 3, padding: int = 1, stride: int = 1
) -> np.ndarray:
    """The adjoint of `im2col_indices`: every number is added to where it came from; where windows overlap, they add up.

    Parameters
    ----------
    cols : array_like, shape (C * field_height * field_width, out_height * out_width * N)
    x_shape : sequence of int
        (N, C, H, W).
    field_height, field_width : int, default 3
        Size of a window.
    padding, stride
        As for `get_im2col_indices`.

    Returns
    -------
    ndarray, shape (N, C, H, W)
        In the dtype of cols.

    Raises
    ------
    ValueError
        If the windows do not fit, or cols does not have the shape that they give.

    Examples
    --------
    >>> col2im_indices(np.ones((4, 2)), (1, 1, 2, 3), 2, 2, padding=0)
    array([[[[1., 2., 1.],
             [1., 2., 1.]]]])
    """
    cols = np.asarray(cols)
    k, i, j = get_im2col_indices(x_shape, field_height, field_width, padding, stride)
    N, C, H, W = x_shape
    if cols.shape != (len(i), i.shape[1] * N):
        raise ValueError(f"cols must have the shape {(len(i), i.shape[1] * N)}, got {cols.shape}")
    padded = np.zeros((N, C, H + 2 * padding, W + 2 * padding), cols.dtype)
    # Not +=, which adds once where a place comes twice.
    np.add.at(padded, (slice(None), k, i, j), cols.reshape(*i.shape, N).transpose(2, 0, 1))
    return unpad(padded, (padding, padding))


def exact_windows(size: tuple[int, int], field: tuple[int, int], stride: int, padding: int) -> Windows:
    """Windows over images of that height and width which leave nothing over at the end of a row or column.

    Parameters
    ----------
    size : (int, int)
        Height and width of the images.
    field : (int, int)
        Height and width of a window.
    stride, padding : int
        As for `get_im2col_indices`.

    Returns
    -------
    Windows

    Raises
    ------
    ValueError
        If the windows do not fit.

    Examples
    --------
    >>> exact_windows((32, 32), (5, 5), stride=1, padding=2).output
    (32, 32)
    """
    g = Windows.over(size, field, stride, padding, 1)
    for side, n, k, s, p in zip(("height", "width"), size, g.kernel, g.stride, g.padding):
        if (n + 2 * p - k) % s:
            raise ValueError(
                f"windows of {side} {k} at stride {s} do not fit the image's {side} {n} with padding {p}: "
                f"{n} + 2 * {p} - {k} is not a multiple of {s}"
            )
    return g


def conv_windows(x: np.ndarray, w: np.ndarray, conv_param: dict[str, int]) -> Windows:
    """The windows of a convolution of the images x with the filters w.

    Examples
    --------
    >>> conv_windows(np.ones((1, 3, 32, 32)), np.ones((8, 3, 5, 5)), {"stride": 1, "pad": 2}).output
    (32, 32)
    """
    keys = ("stride", "pad")
    check_keys(conv_param, "conv_param", keys, required=keys)
    return exact_windows(x.shape[2:], w.shape[2:], conv_param["stride"], conv_param["pad"])


def pool_windows(x: np.ndarray, pool_param: dict[str, int]) -> Windows:
    """The windows of a pooling of the images x.

    Examples
    --------
    >>> pool_windows(np.ones((1, 3, 32, 32)), {"pool_height": 2, "pool_width": 2, "stride": 2}).output
    (16, 16)
    """
    keys = ("pool_height", "pool_width", "stride")
    check_keys(pool_param, "pool_param", keys, required=keys)
    return exact_windows(x.shape[2:], (pool_param["pool_height"], pool_param["pool_width"]), pool_param["stride"], 0)


def pad(x: np.ndarray, padding: tuple[int, int]) -> np.ndarray:
    """The images x (N, C, H, W) with so many rows of zeros above and below, columns of zeros on the left and right.

    Examples
    --------
    >>> pad(np.ones((1, 1, 1, 2)), (0, 1))
    array([[[[0., 1., 1., 0.]]]])
    """
    rows, columns = padding
    return np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns)))


def unpad(x: np.ndarray, padding: tuple[int, int]) -> np.ndarray:
    """What `pad` was given: the images without their outer rows and columns.

    Examples
    --------
    >>> unpad(np.array([[[[0, 1, 1, 0]]]]), (0, 1))
    array([[[[1, 1]]]])
    """
    (rows, columns), (height, width) = padding, x.shape[2:]
    return x[:, :, rows : height - rows, columns : width - columns]
