"""Windows of images: columns and back, convolution and pooling, beside plain loops, NumPy and PyTorch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

import normext
from bench.timing import Entrant
from normext.cs231n import fast_layers
from normext.cs231n.im2col_cython import col2im_6d_cython, col2im_cython, im2col_cython

__all__ = ["BUDGETS", "PEERS", "TURN", "Case", "cases", "entrants"]

PEERS = ("cython", "numpy", "pytorch")
# A turn is long beside the milliseconds for which a BLAS's threads go on spinning after the turn before.
TURN = 3e-2
BUDGETS = {False: 0.6, True: 0.1}

SHAPES = [((100, 3, 31, 31), 25, 2), ((32, 64, 56, 56), 64, 1)]  # images, filters, stride; windows of 3 x 3, pad 1
OPERATIONS = (
    *("im2col_cython", "col2im_cython", "col2im_6d_cython", "im2col", "col2im"),
    *("conv forward", "conv backward", "max pool forward", "max pool backward"),
)
POOL = {"pool_height": 2, "pool_width": 2, "stride": 2}


@dataclass(frozen=True)
class Case:
    """One operation on images of one shape."""

    operation: str
    shape: tuple[int, int, int, int]
    filters: int
    stride: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))} {self.dtype}"

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}


def cases(quick: bool, dtypes: Iterable[str]) -> list[Case]:
    shapes = SHAPES[:1] if quick else SHAPES
    wide = [dtype for dtype in dtypes if not dtype.endswith("16")]
    return [Case(operation, *shape, dtype) for dtype in wide for shape in shapes for operation in OPERATIONS]


def entrants(case: Case, peers: Sequence[str], threads: int) -> dict[str, Entrant]:
    """All sides of a case by name, normext first."""
    rng = np.random.default_rng(0)
    (N, C, H, W), s = case.shape, case.stride
    x = rng.standard_normal(case.shape, case.dtype)
    w, b = rng.standard_normal((case.filters, C, 3, 3), case.dtype), np.zeros(case.filters, case.dtype)
    cols = im2col_cython(x, 3, 3, 1, s)
    out_h, out_w = (H - 1) // s + 1, (W - 1) // s + 1
    six = rng.standard_normal((C, 3, 3, N, out_h, out_w), case.dtype)
    unfolded = normext.im2col(x, 3, stride=s, padding=1)
    conv_param = {"stride": s, "pad": 1}
    out, conv_cache = fast_layers.conv_forward_fast(x, w, b, conv_param)
    even = np.ascontiguousarray(x[:, :, : H // 2 * 2, : W // 2 * 2])
    pooled, pool_cache = fast_layers.max_pool_forward_fast(even, POOL)

    def one(call: Callable[[], Any]) -> Entrant:
        return Entrant(call, lambda result: [result])

    def first(call: Callable[[], Any]) -> Entrant:
        return Entrant(call, lambda result: result[:1])

    ours = {
        "im2col_cython": lambda: one(lambda: im2col_cython(x, 3, 3, 1, s)),
        "col2im_cython": lambda: one(lambda: col2im_cython(cols, *case.shape, 3, 3, 1, s)),
        "col2im_6d_cython": lambda: one(lambda: col2im_6d_cython(six, *case.shape, 3, 3, 1, s)),
        "im2col": lambda: one(lambda: normext.im2col(x, 3, stride=s, padding=1)),
        "col2im": lambda: one(lambda: normext.col2im(unfolded, x.shape, 3, stride=s, padding=1)),
        "conv forward": lambda: first(lambda: fast_layers.conv_forward_fast(x, w, b, conv_param)),
        "conv backward": lambda: Entrant(lambda: fast_layers.conv_backward_fast(out, conv_cache), tuple),
        "max pool forward": lambda: first(lambda: fast_layers.max_pool_forward_fast(even, POOL)),
        "max pool backward": lambda: one(lambda: fast_layers.max_pool_backward_fast(pooled, pool_cache)),
    }
    sides = {"normext": ours[case.operation]()}

    if "cython" in peers and case.operation.endswith("_cython"):
        loops = _plain_loops()
        sides["plain loops"] = {
            "im2col_cython": lambda: one(lambda: loops.im2col(x, 3, 1, s)),
            "col2im_cython": lambda: one(lambda: loops.col2im(cols, *case.shape, 3, 1, s)),
            "col2im_6d_cython": lambda: one(lambda: loops.col2im_6d(six, *case.shape, 3, 1, s)),
        }[case.operation]()
    if "numpy" in peers and case.operation.endswith("_cython"):
        spare = np.empty_like(cols)
        sides |= {"np.copyto": Entrant(lambda: np.copyto(spare, cols)), "a new copy": Entrant(cols.copy)}
    if "numpy" in peers and case.operation == "conv forward":

        def strided() -> np.ndarray:
            padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
            n, c, h, v = padded.strides
            windows = np.lib.stride_tricks.as_strided(padded, (C, 3, 3, N, out_h, out_w), (c, h, v, n, s * h, s * v))
            product = w.reshape(len(w), -1).dot(np.ascontiguousarray(windows).reshape(C * 9, -1)) + b[:, None]
            return np.ascontiguousarray(product.reshape(len(w), N, out_h, out_w).transpose(1, 0, 2, 3))

        sides["as_strided and dot"] = one(strided)
    if "pytorch" in peers and not case.operation.endswith("_cython"):
        sides["PyTorch"] = _torch_side(case, x, w, b, out, even, pooled, unfolded)
    return sides


@cache
def _plain_loops() -> Any:
    """The loops of `bench/plain_loops.pyx`, compiled now."""
    import pyximport

    pyximport.install(language_level=3)
    from bench import plain_loops

    return plain_loops


def _torch_side(case: Case, *arrays: np.ndarray) -> Entrant:
    import torch

    torch.set_grad_enabled(False)
    functional, aten, s = torch.nn.functional, torch.ops.aten, case.stride
    x, w, b, out, even, pooled, unfolded = (torch.from_numpy(a) for a in arrays)
    size = x.shape[2:]
    _, index = functional.max_pool2d(even, 2, 2, return_indices=True)
    calls: dict[str, Callable[[], Any]] = {
        "im2col": lambda: functional.unfold(x, 3, padding=1, stride=s),
        "col2im": lambda: functional.fold(unfolded, size, 3, padding=1, stride=s),
        "conv forward": lambda: functional.conv2d(x, w, b, stride=s, padding=1),
        "conv backward": lambda: aten.convolution_backward(
            out, x, w, [len(b)], [s] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        ),
        "max pool forward": lambda: functional.max_pool2d(even, 2, 2, return_indices=True),
        "max pool backward": lambda: aten.max_pool2d_with_indices_backward(
            pooled, even, [2, 2], [2, 2], [0, 0], [1, 1], False, index
        ),
    }
    # A single tensor is one result; of several, the indices of the maxima are not compared.
    tensors = {"conv backward": list, "max pool forward": lambda r: r[:1]}.get(case.operation, lambda r: [r])
    return Entrant(calls[case.operation], lambda result: [tensor.numpy() for tensor in tensors(result)])
