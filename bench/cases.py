"""What is normalized: norms, steps, layouts, shapes and dtypes, chosen or drawn; the data; and what must move."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench.timing import private_cache
from normext._core.arrays import Norm
from normext._version import how_to_install

__all__ = ["BOTH", "Case", "Data", "cases", "copies_to_move", "data_of", "drawn"]

BOTH = "forward + backward"


@dataclass(frozen=True)
class Case:
    """One operation on one array.

    Attributes
    ----------
    norm : {'batch', 'layer', 'rms', 'group', 'instance'}
    step : {'forward', 'backward', 'evaluation', 'forward + backward'}
    layout : {'ND', 'NCHW', 'NHWC'}
        Where the channels are; layer and RMS norm are over the last axis.
    shape : tuple of int
    dtype : str
    series : str
        The curve to which the case belongs in the chart of time against size, which is drawn of normext and the limit
        alone; "" for a case that all peers take part in.
    seed : int, optional
        What the case was drawn with.
    """

    norm: str
    step: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    series: str = ""
    seed: int | None = None

    @property
    def name(self) -> str:
        layout = "" if self.layout == "ND" else f" {self.layout}"
        kind = " series" if self.series else ""
        drawn = "" if self.seed is None else f" seed {self.seed}"
        return f"{self.norm} norm{layout} {self.step}{kind} {'x'.join(map(str, self.shape))} {self.dtype}{drawn}"

    @cached_property
    def plan(self) -> Norm:
        """What is normalized, and how."""
        axis = 1 if self.layout == "NCHW" else len(self.shape) - 1
        groups = _groups(self.shape[axis]) if self.norm == "group" else 1
        training = self.step != "evaluation"
        return Norm(f"{self.norm}_norm", self.shape, _dtype(self.dtype), axis=axis, groups=groups, training=training)

    @property
    def channels(self) -> int:
        """Or the numbers of a row, of layer and RMS norm: as many as gamma has."""
        return self.plan.parameter_shape[0]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def nbytes(self) -> int:
        """Of x alone."""
        return self.size * self.itemsize

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name, "size": self.size, "copies": copies_to_move(self)}


def _groups(channels: int) -> int:
    """32, or as many fewer as the channels can be divided into, two or more to a group."""
    return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 2), default=1)


# Shapes ---------------------------------------------------------------------------------------------------------------

STEPS = {"batch": ("forward", "backward", "evaluation")}
# From the smallest over sizes that fit a cache to 256 MiB of float32; among them few and odd numbers of channels, few
# examples, tall and thin, and wide.
SHAPES = {
    ("batch", "ND"): [
        *[(1, 64), (32, 64), (50, 100), (2, 1000), (256, 3), (256, 7), (500, 100), (512, 768), (4096, 1024)],
        *[(1_000_000, 16), (4, 1_000_000), (65536, 1024)],
    ],
    ("batch", "NCHW"): [(2, 3, 32, 32), (100, 3, 32, 32), (32, 64, 7, 7), (32, 64, 56, 56), (64, 256, 64, 64)],
    ("batch", "NHWC"): [(100, 32, 32, 3), (32, 7, 7, 64), (32, 56, 56, 64), (64, 64, 64, 256)],
    ("layer", "ND"): [
        *[(1, 64), (32, 64), (2, 1000), (256, 3), (256, 7), (1024, 100), (512, 768), (4096, 1024)],
        *[(1_000_000, 16), (4, 1_000_000), (65536, 1024)],
    ],
    ("rms", "ND"): [(32, 64), (512, 768), (4096, 1024), (1_000_000, 16), (65536, 1024)],
    ("group", "NCHW"): [(32, 64, 7, 7), (32, 64, 56, 56), (64, 256, 64, 64)],
    ("instance", "NCHW"): [(100, 3, 32, 32), (32, 64, 7, 7), (32, 64, 56, 56), (64, 256, 64, 64)],
}
QUICK = {(32, 64), (512, 768), (4096, 1024), (32, 64, 7, 7), (32, 64, 56, 56), (32, 56, 56, 64)}
TOGETHER = {(32, 64), (512, 768), (4096, 1024), (32, 64, 56, 56)}  # forward and backward as one step of training
SIXTEEN_BITS = {(32, 64), (512, 768), (4096, 1024), (32, 64, 56, 56)}  # of batch and layer norm

# A power of two next to its neighbours, and a larger one; the number of rows is the size over the second.
SERIES_WIDTHS = {1023: 1024, 1024: 1024, 1025: 1024, 4096: 4096}
SERIES_SIZES = [2**k for k in (13, 16, 19, 22, 24, 26)]  # numbers in the array: 32 KiB to 256 MiB of float32


def cases(quick: bool, dtypes: Iterable[str]) -> list[Case]:
    """All cases, those on the same array next to each other."""
    return [case for dtype in dtypes for case in [*_compared(quick, dtype), *_series(quick, dtype)]]


def _compared(quick: bool, dtype: str) -> Iterator[Case]:
    for (norm, layout), shapes in SHAPES.items():
        for shape in shapes:
            if quick and shape not in QUICK:
                continue
            if dtype.endswith("16") and not (norm in ("batch", "layer") and shape in SIXTEEN_BITS):
                continue
            for step in STEPS.get(norm, ("forward", "backward")):
                yield Case(norm, step, layout, shape, dtype)
            if shape in TOGETHER:
                yield Case(norm, BOTH, layout, shape, dtype)


def _series(quick: bool, dtype: str) -> Iterator[Case]:
    if dtype.endswith("16"):
        return
    sizes = [SERIES_SIZES[i] for i in (0, 2, 3)] if quick else SERIES_SIZES
    for norm, layout in SHAPES:
        if layout == "NHWC":  # the same as ND
            continue
        for size in sizes:
            if layout == "ND":
                shapes = {f"D = {width}": (size // about, width) for width, about in SERIES_WIDTHS.items()}
            else:
                shapes = {"C = 16, 16 x 16": (size // 2**12, 16, 16, 16)}
            for series, shape in shapes.items():
                if shape[0] >= 2:
                    for step in STEPS.get(norm, ("forward", "backward")):
                        yield Case(norm, step, layout, shape, dtype, series)


# Drawn ----------------------------------------------------------------------------------------------------------------

DRAWN = 60  # cases a seed
SMALLEST, LARGEST = 1 << 10, 256 << 20  # bytes of x
WIDEST = 100_000  # numbers of a row, channels, or pixels of an image
OPERATIONS = [
    (norm, layout, step)
    for norm, layouts in {
        **{"batch": ("ND", "NCHW", "NHWC"), "layer": ("ND",), "rms": ("ND",)},
        **{"group": ("NCHW", "NHWC"), "instance": ("NCHW", "NHWC")},
    }.items()
    for layout in layouts
    for step in STEPS.get(norm, ("forward", "backward"))
]


def drawn(seeds: Iterable[int], dtypes: Iterable[str]) -> list[Case]:
    """Cases that nobody chose, `DRAWN` for each seed and dtype, the same ones on every machine.

    The bytes of x are log-uniform from `SMALLEST` to `LARGEST`; the width is log-uniform from 1 to `WIDEST`, or to what
    x has, and every other one is odd. It is the length of the last axis of (N, D), and of images, which are square, the
    number of channels or of pixels; what is left is shared out log-uniformly. Every norm, layout and step comes twice
    or more. A statistic is of two numbers or more where PyTorch's modules ask for that: not in layer and RMS norm.
    """
    return [case for dtype in dtypes for seed in seeds for case in _drawn(seed, dtype)]


def _drawn(seed: int, dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(OPERATIONS)) for _ in range(0, DRAWN, len(OPERATIONS))]
    for i, operation in enumerate(np.concatenate(rounds)[:DRAWN]):
        norm, layout, step = OPERATIONS[operation]
        while True:
            shape = _shape(rng, layout, _dtype(dtype).itemsize, odd=i % 2)
            case = Case(norm, step, layout, shape, dtype, seed=seed)
            enough = 1 if norm in ("layer", "rms") else 2
            if SMALLEST <= case.nbytes <= LARGEST and case.size >= enough * case.plan.statistics:
                break
        yield case


def _shape(rng: np.random.Generator, layout: str, itemsize: int, odd: int) -> tuple[int, ...]:
    def log_uniform(low: float, high: float) -> float:
        return low * (high / low) ** rng.random()

    def of_parity(number: float) -> int:
        return int(number) | 1 if odd else (int(number) + 1) // 2 * 2

    numbers = log_uniform(SMALLEST, LARGEST) / itemsize
    width = log_uniform(1, min(WIDEST, numbers))
    if layout == "ND":
        width = of_parity(width)
        return max(1, round(numbers / width)), width
    other = log_uniform(1, min(WIDEST, max(1, numbers / width)))
    if rng.random() < 0.5:
        channels, side = of_parity(width), int(math.sqrt(other))
    else:
        channels, side = int(other), min(of_parity(math.sqrt(width)), math.isqrt(WIDEST) - odd)
    examples = max(1, round(numbers / (channels * side * side)))
    return (examples, channels, side, side) if layout == "NCHW" else (examples, side, side, channels)


# Data -----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The arrays of a case; parameters are of float32 where x has 16 bits."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray


def data_of(case: Case) -> Data:
    """The data of a case, the same for every step, peer and number of threads; do not write to them."""
    return _data(case.shape, case.channels, case.dtype)


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], channels: int, dtype: str) -> Data:
    rng = np.random.default_rng(0)

    def normal(mean: float, std: float) -> np.ndarray:
        # A million numbers, over and over: the norms do not see that, and it takes less time than new ones.
        block = mean + std * rng.standard_normal(min(math.prod(shape), 1_000_003))
        return np.resize(block.astype(_dtype(dtype)), shape)

    parameters = rng.uniform(0.5, 1.5, (4, channels)).astype(np.float64 if dtype == "float64" else np.float32)
    return Data(normal(1, 2), normal(0, 1), *(p.copy() for p in parameters))


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"bfloat16 needs ml_dtypes: {how_to_install('bench')}") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


# The limit ------------------------------------------------------------------------------------------------------------


def copies_to_move(case: Case, cache: int | None = None) -> float:
    """The least that must be moved, in copies of x: the limit is the time of `bench.timing.Copy` times this.

    A copy reads x and writes as much. A forward pass reads x and writes y: 1. A backward pass reads x and dy and writes
    dx: 1.5. What it reads it reads **twice**, which makes 1.5 and 2.5, if that is more than a core's own cache holds
    (`bench.timing.private_cache`), and so is not there any more when, the statistics being known, it is normalized: in
    batch norm all of x (and dy), in the others what one statistic is taken of: a row, or a group of channels of one
    example. An evaluation knows them before: 1. Parameters and statistics are not counted.

    Parameters
    ----------
    case : Case
    cache : int, optional
        Bytes of a core's own cache. Default: this machine's.
    """
    if case.step == BOTH:
        return sum(copies_to_move(replace(case, step=step), cache) for step in ("forward", "backward"))
    arrays = 2 if case.step == "backward" else 1  # that are read
    together = case.nbytes if case.norm == "batch" else case.nbytes // case.plan.statistics
    once = case.step == "evaluation" or arrays * together <= (private_cache() if cache is None else cache)
    return ((1 if once else 2) * arrays + 1) / 2
