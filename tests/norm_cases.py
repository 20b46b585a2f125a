"""Norms drawn at random: what to call, on which numbers, and where in memory they lie.

Run as a program, it reads cases from its input, one a line, and answers each with a digest of all results, so that
processes that were started with different instruction sets can be compared.
"""

import hashlib
import json
import math
import sys
from typing import Any, NamedTuple

import numpy as np

import normext
from normext._core.arrays import Norm

NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
DTYPES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
try:
    from ml_dtypes import bfloat16
except ImportError:
    pass
else:
    DTYPES["bfloat16"] = np.dtype(bfloat16)


class Case(NamedTuple):
    """A call of a norm, its data and the call of its backward pass."""

    norm: str
    shape: tuple[int, ...]
    axis: int  # not negative
    dtype: str
    groups: int = 1
    gamma: bool = True
    beta: bool = True
    eps: float = 1e-5
    running: bool = False  # running statistics are given
    unbiased: bool = False  # where a channel has two numbers
    training: bool = True
    relu: bool = False
    residual: bool = False
    # Or "lattice": eighths, many of them equal; "padded": equal ones at the end; "constant"; "uneven": each position on
    # the axis has a scale of its own; "broken": a NaN or an infinity or two.
    kind: str = "normal"
    offset: float = 0.0
    scale: float = 1.0
    dy_offset: float = 0.0
    seed: int = 0

    @property
    def plan(self) -> Norm:
        """What is to be done; an error where no norm is like that."""
        options: dict[str, Any] = {"axis": self.axis, "eps": self.eps}
        if self.norm == "group_norm":
            options["groups"] = self.groups
        if self.norm == "batch_norm":
            options |= {"training": self.training, "activation": "relu" if self.relu else None}
        return Norm(self.norm, self.shape, DTYPES[self.dtype], **options)

    @property
    def by_row(self) -> bool:
        """Whether what is normalized together is the axis and all after it."""
        return self.norm in ("layer_norm", "rms_norm")

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """That of gamma and beta, for a shape that no norm takes too."""
        return self.shape[self.axis :] if self.by_row else self.shape[self.axis : self.axis + 1]

    @property
    def channels_to(self) -> int:
        """The axis that the channels must come to for the numbers of a statistic to lie together."""
        return self.axis if self.by_row else int(self.norm != "batch_norm")

    def statistics(self, a: np.ndarray) -> np.ndarray:
        """The numbers of an array in the shape of x as (statistic, numbers that it is of)."""
        return np.moveaxis(a, self.axis, self.channels_to).reshape(self.plan.statistics, -1)

    def put_back(self, numbers: np.ndarray) -> np.ndarray:
        """The inverse of `statistics`."""
        moved = np.moveaxis(np.empty(self.shape, np.bool_), self.axis, self.channels_to).shape
        return np.moveaxis(numbers.reshape(moved), self.channels_to, self.axis)

    def draw(self) -> dict[str, np.ndarray]:
        """x, residual, dy and dsum in the case's dtype; gamma, beta and running statistics in a dtype of their own."""
        rng = np.random.default_rng(self.seed)
        unit = rng.standard_normal(self.shape)
        if self.kind == "lattice":
            unit = np.round(unit * 8) / 8
        elif self.kind == "padded":
            unit.reshape(-1)[rng.integers(unit.size) :] = 0
        elif self.kind == "constant":
            unit = np.ones(self.shape)
        elif self.kind == "uneven":
            scales = 10.0 ** rng.uniform(-30, 30, self.shape[self.axis])
            unit = np.moveaxis(np.moveaxis(unit, self.axis, -1) * scales, -1, self.axis)
        elif self.kind == "broken":
            unit.reshape(-1)[rng.integers(unit.size, size=2)] = rng.choice([np.nan, np.inf, -np.inf], 2)
        wide = np.float64 if self.dtype == "float64" else np.float32
        arrays = {"x": self.offset + self.scale * unit}
        arrays |= {name: rng.standard_normal(self.shape) for name in ("residual", "dy", "dsum")}
        arrays["dy"] += self.dy_offset
        arrays = {name: a.astype(DTYPES[self.dtype]) for name, a in arrays.items()}
        arrays |= {name: rng.normal(1, 0.5, self.parameter_shape).astype(wide) for name in ("gamma", "beta")}
        channels = self.shape[self.axis]
        arrays["running_mean"] = self.offset + self.scale * rng.standard_normal(channels)
        arrays["running_var"] = (self.scale * rng.uniform(0.5, 2, channels)) ** 2
        return arrays

    def arguments(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """What the forward pass is given beside x."""
        given: dict[str, Any] = {"eps": self.eps, "axis": self.axis}
        if self.gamma:
            given["gamma"] = arrays["gamma"]
        if self.beta and self.norm != "rms_norm":
            given["beta"] = arrays["beta"]
        if self.norm == "group_norm":
            given["num_groups"] = self.groups
        if self.norm == "batch_norm":
            given |= {"training": self.training, "activation": "relu" if self.relu else None}
            several = math.prod(self.shape) > self.shape[self.axis]  # one number has no variance to learn from
            given["unbiased"] = self.unbiased and several
            if self.running and several or not self.training:
                given |= {name: arrays[name] for name in ("running_mean", "running_var")}
        if self.fused:
            given["residual"] = arrays["residual"]
        return given

    @property
    def fused(self) -> bool:
        """Whether a residual is added."""
        return self.residual and self.by_row


def forward_and_backward(
    case: Case, arrays: dict[str, np.ndarray], module: Any = normext, out=None, dx_out=None
) -> dict:
    """All results by name; running statistics are changed where they lie."""
    outs = [{} if a is None else {"out": a} for a in (out, dx_out)]
    y, *sums, cache = getattr(module, case.norm)(arrays["x"], **case.arguments(arrays), **outs[0])
    assert module is not normext or cache.norm == case.plan
    fused = {"dsum": arrays["dsum"]} if case.fused else {}
    gradients = getattr(module, case.norm + "_backward")(arrays["dy"], cache, **fused, **outs[1])
    results = {"y": y, "mean": cache.mean, "rstd": cache.rstd}
    results |= dict(zip(("sum",), sums)) | dict(zip(("dx", "dgamma", "dbeta"), gradients))
    return {name: result for name, result in results.items() if result is not None}


def bits(case: Case, arrays: dict[str, np.ndarray], **outs) -> bytes:
    """A digest of all results, running statistics among them."""
    arrays = arrays | {name: arrays[name].copy() for name in ("running_mean", "running_var")}
    results = forward_and_backward(case, arrays, **outs)
    digest = hashlib.sha256()
    for a in (*results.values(), arrays["running_mean"], arrays["running_var"]):
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.digest()


class Layout(NamedTuple):
    """Where an array lies: in the middle of a buffer, at any address, its axes in any order and with any steps."""

    order: tuple[int, ...]  # the axes from the outermost in memory to the innermost
    steps: tuple[int, ...]  # of each axis, in elements that lie between; may be negative
    shift: int = 0  # bytes that the array is moved by
    swapped: bool = False  # bytes in the other order

    @classmethod
    def plain(cls, ndim: int, shift: int = 0) -> "Layout":
        """Contiguous."""
        return cls(tuple(range(ndim)), (1,) * ndim, shift)


class Placed:
    """An array with canaries: bytes 0xFF, a NaN in every type, before and after it and between its elements.

    Code that reads them gets NaN, and code that writes there is found by `intact`.
    """

    margin = 256  # bytes

    def __init__(self, a: np.ndarray, layout: Layout):
        self.layout, self.shape = layout, a.shape
        self.dtype = a.dtype.newbyteorder() if layout.swapped else a.dtype
        extents = [(n - 1) * abs(s) + 1 for n, s in zip(a.shape, layout.steps, strict=True)]
        self.extents = [extents[i] for i in layout.order]
        nbytes = math.prod(self.extents) * a.itemsize
        self.buffer = np.full(nbytes + 2 * self.margin + layout.shift, 0xFF, np.uint8)
        self.inside = slice(self.margin + layout.shift, self.margin + layout.shift + nbytes)
        self.array = self._elements(self.buffer).view(self.dtype)
        self.array[...] = a
        self.before = self.buffer.copy()

    def _elements(self, buffer: np.ndarray) -> np.ndarray:
        memory = buffer[self.inside].view(f"u{self.dtype.itemsize}").reshape(self.extents)
        memory = memory[tuple(slice(None, None, self.layout.steps[i]) for i in self.layout.order)]
        return memory.transpose(np.argsort(self.layout.order))

    def intact(self, elements_too: bool) -> bool:
        """Whether all bytes around the elements, and these if they should be, are what they were."""
        now = self.buffer
        if not elements_too:
            now = now.copy()
            self._elements(now)[...] = self._elements(self.before)
        return np.array_equal(now, self.before)


def main() -> None:
    """Answer each case, a line of JSON, with the digest of its results."""
    for line in sys.stdin:
        fields = json.loads(line)
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        print(bits(case, case.draw()).hex(), flush=True)


if __name__ == "__main__":
    main()
