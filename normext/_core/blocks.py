"""Arrays that the loops cannot walk, a block at a time: what NumPy does of that.

What overflows does so in silence, as in the kernels. Not in Cython: where memory is short NumPy may return nothing and
no error either, at which a ``with`` that Cython has compiled reads what is not there.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BLOCK = 1 << 15  # elements copied at a time: they stay in the second-level cache

Index = tuple[slice, ...]


def blocks(shape: Sequence[int], axes: Sequence[int]) -> Iterator[Index]:
    """Indices that cut an array into blocks of about BLOCK elements, along the longest of `axes`, then the next."""
    index = [slice(None)] * len(shape)

    def cut(axes, size):
        if size <= BLOCK or not axes:
            yield tuple(index)
            return
        axis = axes[0]
        step = max(1, shape[axis] * BLOCK // size)
        for start in range(0, shape[axis], step):
            index[axis] = slice(start, min(start + step, shape[axis]))
            yield from cut(axes[1:], size // shape[axis] * step)
        index[axis] = slice(None)

    return cut(sorted(axes, key=lambda i: -shape[i]), math.prod(shape))


def scaled(block: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The block times a scale, where it lies."""
    with np.errstate(all="ignore"):
        return np.multiply(block, scale, out=block)


def put_block(to: np.ndarray, index: Any, block: np.ndarray, scale: Any = None, more: Any = None) -> None:
    """Store a block, times a scale and plus what else there is."""
    with np.errstate(all="ignore"):
        if scale is not None:
            block *= scale
        if more is not None:
            block += more
        to[index] = block


def merge_block(
    count: np.ndarray, mean: np.ndarray, m2: np.ndarray, n: float, block_mean: np.ndarray, block_var: np.ndarray
) -> None:
    """Add n numbers of each channel to its moments: the merge of kernels.h, for all channels of a block at once."""
    total = count + n
    np.copyto(mean, block_mean, where=count == 0)  # as it is
    with np.errstate(all="ignore"):
        delta = block_mean - mean
        m2 += n * block_var + delta * delta * (count * (n / total))
        mean += delta * (n / total)
    count[:] = total


def close_gate(dy: np.ndarray, y: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Set dy to 0 where y, stored in that dtype, is not above 0."""
    with np.errstate(all="ignore"):
        dy[y.astype(dtype) <= 0] = 0
