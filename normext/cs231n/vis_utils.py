"""Many images as one, to look at with ``plt.imshow``."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["vis_grid", "vis_nn", "visualize_grid"]


def visualize_grid(Xs: np.ndarray, ubound: float = 255.0, padding: int = 1) -> np.ndarray:
    """Images in a square grid, each stretched to the whole range of brightness by itself.

    Parameters
    ----------
    Xs : ndarray, shape (N, H, W, C)
        Images, or filters, with numbers of any size.
    ubound : float, default 255.0
        Brightness goes from 0 to this. An image of one colour is black.
    padding : int, default 1
        Black pixels between two images.

    Returns
    -------
    ndarray of float64
        Of C channels; with ``n = ceil(sqrt(N))``, n * H + (n - 1) * padding rows, and columns alike.

    Raises
    ------
    ValueError
        If Xs does not have four axes, or is empty.

    Examples
    --------
    >>> import numpy as np
    >>> visualize_grid(np.arange(12.0).reshape(3, 2, 2, 1), ubound=3)[..., 0]
    array([[0., 1., 0., 0., 1.],
           [2., 3., 0., 2., 3.],
           [0., 0., 0., 0., 0.],
           [0., 1., 0., 0., 0.],
           [2., 3., 0., 0., 0.]])
    """
    Xs = _images(Xs)
    canvas = _mosaic([ubound * _stretched(image) for image in Xs], _side(Xs), _side(Xs), padding, 0.0)
    rows, columns = canvas.shape[0] - padding, canvas.shape[1] - padding
    return canvas[:rows, :columns]


def vis_grid(Xs: np.ndarray) -> np.ndarray:
    """Images in a square grid with one dark pixel after each, all stretched to 0 .. 1 together.

    Parameters
    ----------
    Xs : ndarray, shape (N, H, W, C)

    Returns
    -------
    ndarray of float64
        Of C channels; with ``n = ceil(sqrt(N))``, n * (H + 1) rows, n * (W + 1) columns.

    Raises
    ------
    ValueError
        If Xs does not have four axes, or is empty.

    Examples
    --------
    >>> import numpy as np
    >>> vis_grid(np.arange(9.0).reshape(1, 3, 3, 1)).shape
    (4, 4, 1)
    """
    Xs = _images(Xs)
    return _stretched(_mosaic(Xs, _side(Xs), _side(Xs), 1, Xs.min()))


def vis_nn(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of images, say an image and its nearest neighbours each, all stretched to 0 .. 1 together.

    Parameters
    ----------
    rows : sequence of sequences of ndarray, shape (H, W, C)
        As many images in every row.

    Returns
    -------
    ndarray of float64
        Of C channels and H + 1 pixels down and W + 1 across for every image: one dark one after each.

    Raises
    ------
    ValueError
        If the rows do not have as many images each, the images not the same shape, or there are none.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(9.0).reshape(3, 3, 1)
    >>> vis_nn([[image, image], [image, image], [image, image]]).shape
    (12, 8, 1)
    """
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows must hold as many images each, got {[len(row) for row in rows]}")
    images = _images(np.stack([image for row in rows for image in row]))
    return _stretched(_mosaic(images, len(rows), len(rows[0]), 1, images.min()))


def _images(images):
    images = np.asarray(images)
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"the images must have the shape (N, H, W, C) and not be empty, got {images.shape}")
    return images


def _side(images):
    return math.isqrt(len(images) - 1) + 1


def _mosaic(images, rows, columns, gap, background):
    """Images on a canvas, row by row, `gap` pixels of background below and right of each."""
    height, width, channels = images[0].shape
    canvas = np.full((rows * (height + gap), columns * (width + gap), channels), background, np.float64)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _stretched(image):
    """From the darkest to the brightest, 0 to 1."""
    low, high = image.min(), image.max()
    return np.zeros(image.shape) if low == high else (image - low) / (high - low)
