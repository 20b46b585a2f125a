"""What is normalized: norms, steps, layouts, shapes and dtypes; the data; and the bytes that must move."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench.timing import private_cache
from normext._core.arrays import Norm
from normext._version import how_to_install

__all__ = ["BOTH", "Case", "Data", "Traffic", "cases", "data_of", "traffic"]

BOTH = "forward + backward"
CACHE_LINE = 64


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
    """

    norm: str
    step: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    series: str = ""

    @property
    def name(self) -> str:
        layout = "" if self.layout == "ND" else f" {self.layout}"
        kind = " series" if self.series else ""
        return f"{self.norm} norm{layout} {self.step}{kind} {'x'.join(map(str, self.shape))} {self.dtype}"

    @cached_property
    def plan(self) -> Norm:
        """What is normalized, and how."""
        axis = 1 if self.layout == "NCHW" else len(self.shape) - 1
        groups = min(32, self.shape[axis] // 2) if self.norm == "group" else 1
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

    def facts(self) -> dict[str, Any]:
        moved, working_set = traffic(self)
        return {**asdict(self), "name": self.name, "size": self.size, "moved": moved, "working_set": working_set}


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


class Traffic(NamedTuple):
    """Bytes that must be read and written, and those of all arrays that are touched, each counted once."""

    moved: int
    working_set: int


def traffic(case: Case, cache: int | None = None) -> Traffic:
    """The fewest bytes between the core and the memory level where the arrays of a case lie.

    - The result (y or dx) is written once. Nothing is read in order to be written over.
    - A forward pass reads x, a backward pass x and dy. They are read **once**, if what one statistic is taken of fits
      into a core's own cache (`bench.timing.private_cache`) and so is there still when it is normalized, else
      **twice**. That is one row (layer, RMS norm), one group of channels of one example (group, instance norm), one
      channel of N,C,H,W (batch norm), or, down columns, the channels that share a cache line; in a backward pass, of
      both x and dy. So a batch norm of (4096, 1024) float32 reads x once (256 KiB of a line of channels), and one of
      (1000000, 16) twice (61 MiB). An evaluation reads x once.
    - Parameters and statistics are counted too, in the dtype of the parameters: they matter where there are few rows.
      A forward pass reads gamma and beta and writes two statistics (RMS norm: no beta, one statistic), in batch norm
      it also reads and writes the running ones; a backward pass reads gamma and the statistics and writes dgamma and
      dbeta.

    The limit is the time of a copy (`bench.timing.Copy`) as large as the working set, times moved / working set. Pages
    that are not there yet are not in it: it is compared with calls that have ``out=``.

    Parameters
    ----------
    case : Case
    cache : int, optional
        Bytes of a core's own cache. Default: this machine's.
    """
    if case.step == BOTH:
        forward, backward = (traffic(Case(case.norm, step, *_rest(case)), cache) for step in ("forward", "backward"))
        # y and dx are two results; x, gamma and the statistics are in both working sets.
        return Traffic(forward.moved + backward.moved, forward.working_set + 2 * case.size * case.itemsize)
    array, parameter = case.size * case.itemsize, case.channels * max(4, case.itemsize)
    affine = stats = 1 if case.norm == "rms" else 2
    statistic = case.plan.statistics * max(4, case.itemsize)
    if case.step == "evaluation":
        small = affine * parameter + 2 * statistic
        return Traffic(2 * array + small, 2 * array + small)
    read = 2 if case.step == "backward" else 1  # arrays
    small = stats * statistic + affine * parameter + (parameter if case.step == "backward" else 0)
    updated = 2 * parameter if case.norm == "batch" and case.step == "forward" else 0  # running, read and written
    times = 1 if read * _piece(case) <= (private_cache() if cache is None else cache) else 2
    return Traffic((times * read + 1) * array + small + 2 * updated, (read + 1) * array + small + updated)


def _rest(case: Case) -> tuple[Any, ...]:
    return case.layout, case.shape, case.dtype


def _piece(case: Case) -> int:
    """Bytes of the least part of x that can be normalized apart from the rest."""
    one = case.size // case.plan.statistics * case.itemsize
    down_columns = case.norm == "batch" and case.layout != "NCHW"
    return one * min(case.channels, CACHE_LINE // case.itemsize) if down_columns else one
