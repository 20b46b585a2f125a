"""Exactness on data where textbook formulas lose their digits, and with it ``normext check --accuracy``.

float32 data far from zero, with wild outliers, constant, or at the ends of float32's range, and gradients far from
zero: what batch and layer norm make of them, forward and backward, against the same in float64; beside it the textbook
formula in NumPy (in float32), and PyTorch and JAX where they are installed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

import normext
from normext import reference
from normext.gradcheck import relative_error

__all__ = ["CASES", "LIMIT", "PROGRAMS", "Case", "Row", "check_accuracy", "errors", "exact", "format_table"]

#: The most that an element of y may be off (one above 8, an outlier: relative to a quarter of it), and the most that a
#: gradient may be off, relative to its largest element. Some roundings of float32, 6e-8 of a number each.
LIMIT = 2e-6

#: Ours, the textbook formula of `normext.reference` in float32, and two frameworks.
PROGRAMS = ("normext", "NumPy", "PyTorch", "JAX")

#: y, dx, dgamma, dbeta of x, dy, gamma, beta and eps; statistics along axis 0 (batch norm) or 1 (layer norm).
Norm = Callable[..., tuple[np.ndarray, ...]]


class Case(NamedTuple):
    """Data for a norm, and the most that it may be off."""

    name: str
    norm: str  # "batch norm", of columns, or "layer norm", of rows
    draw: Callable[[], np.ndarray]  # x in float32, two axes
    eps: float = 1e-5
    dy_size: float = 1.0  # standard deviation of dy
    dy_offset: float = 0.0  # its mean
    limit: float = LIMIT  # of y; that of gradients is LIMIT

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x, dy, gamma and beta in float32, always the same; gamma is 1, so that y is what tables of errors show."""
        x = self.draw()
        dy = self.dy_offset + self.dy_size * np.random.default_rng(1).standard_normal(x.shape)
        gamma = np.ones(x.shape[1])
        return tuple(a.astype(np.float32) for a in (x, dy, gamma, 0 * gamma))


class Row(NamedTuple):
    """The errors of one case by one program."""

    case: Case
    program: str
    y: float
    gradients: float  # the largest of dx, dgamma and dbeta

    @property
    def ok(self) -> bool:
        """Whether they keep the limits; NaN does not."""
        return self.y <= self.case.limit and self.gradients <= LIMIT


def _normal(*shape: int, offset: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return (offset + scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def _outlier_first(*shape: int, outlier: float) -> np.ndarray:
    x = _normal(*shape, offset=3)
    x[0, 0 if shape[0] < shape[1] else slice(None)] = outlier
    return x


def _constant(*shape: int) -> np.ndarray:
    """Each row or column, along the longer axis, is one number many times."""
    values = np.array([0, 1.1, -123456.789, 1e6 + 0.5, 1e-30, 1e-40, 3e38, -1e30], np.float32)
    return np.broadcast_to(values if shape[0] > shape[1] else values[:, None], shape).copy()


def _alternating(*shape: int, huge: float, tiny: float) -> np.ndarray:
    """Every second number is huge, of alternating sign, and every other tiny."""
    i = np.add(*np.indices(shape))
    return np.where(i % 2, tiny, np.where(i % 4, huge, -huge)).astype(np.float32)


def _cases() -> Iterator[Case]:
    for norm, shape, few in (("batch norm", (100_000, 16), (100_000, 8)), ("layer norm", (16, 100_000), (8, 100_000))):
        for offset in (0, 1e2, 1e4, 1e6):
            yield Case(f"offset {offset:g}", norm, lambda shape=shape, offset=offset: _normal(*shape, offset=offset))
        for outlier in (1e4, 1e8, 1e30):
            yield Case(
                f"outlier {outlier:g} first",
                norm,
                lambda shape=shape, outlier=outlier: _outlier_first(*shape, outlier=outlier),
            )
        yield Case("constant", norm, lambda few=few: _constant(*few), limit=0.0)
        for huge, tiny in ((1e20, 1e-20), (3e38, 1e-40)):
            yield Case(
                f"alternating {huge:g}, {tiny:g}",
                norm,
                lambda shape=shape, huge=huge, tiny=tiny: _alternating(*shape, huge=huge, tiny=tiny),
            )
        for dy_offset in (1e2, 1e4, 1e6):
            yield Case(f"dy offset {dy_offset:g}", norm, lambda shape=shape: _normal(*shape), dy_offset=dy_offset)
        # The smallest are denormals; there a dy of size 1 would have gradients beyond float32.
        scales = ((1e37, 1.0), (1e19, 1.0), (1e-19, 1.0), (1e-36, 1e-6), (1e-38, 1e-6), (1e-42, 1e-10))
        for scale, dy_size in scales:
            yield Case(
                f"scale {scale:g}, eps 0",
                norm,
                lambda shape=shape, scale=scale: _normal(*shape, scale=scale),
                eps=0.0,
                dy_size=dy_size,
            )


CASES: tuple[Case, ...] = tuple(_cases())


def exact(case: Case, x: np.ndarray, dy: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, ...]:
    """y, dx, dgamma and dbeta in float64.

    Parameters
    ----------
    case : Case
        Names the norm and its eps.
    x, dy, gamma, beta : ndarray
        As `Case.arguments` gives them.

    Returns
    -------
    tuple of ndarray of float64

    Notes
    -----
    float64 knows the mean of numbers near 1e6 to 1e-10, which is exact beside float32. A constant is not, by 1e-16 of
    itself, which eps = 1e-5 leaves visible in 3e38: it is taken out before.

    Examples
    --------
    >>> case = CASES[0]
    >>> y, dx, dgamma, dbeta = exact(case, *case.arguments())
    >>> y.dtype, bool(abs(y.mean(0)).max() < 1e-12)
    (dtype('float64'), True)
    """
    axis = 0 if case.norm == "batch norm" else 1
    x = x.astype(np.float64)
    for _ in range(2):
        x = x - x.mean(axis, keepdims=True)
    return _twin(case.norm, x, dy.astype(np.float64), gamma, beta, case.eps)


def errors(case: Case, results: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> tuple[float, float]:
    """The worst error of y and the worst relative error of a gradient.

    Parameters
    ----------
    case : Case
        Whose results they are.
    results, wanted : iterable of ndarray
        y, dx, dgamma and dbeta by some program, and those of `exact`.

    Returns
    -------
    y, gradients : float
        NaN where a number that should be finite is not.

    Examples
    --------
    >>> errors(CASES[0], np.ones((4, 3)), np.ones((4, 3)))
    (0.0, 0.0)
    """
    (y, *gradients), (wanted_y, *wanted_gradients) = results, wanted
    size = np.abs(wanted_y)
    off = np.abs(y - wanted_y) / np.where(size > 8, size / 4, 1)
    return float(off.max()), max(relative_error(g, w) for g, w in zip(gradients, wanted_gradients, strict=True))


def check_accuracy(cases: Iterable[Case] = CASES, programs: Sequence[str] = PROGRAMS) -> list[Row]:
    """Measure every case by every program that is there.

    Parameters
    ----------
    cases : iterable of Case, default CASES
        Which.
    programs : sequence of str, default PROGRAMS
        Which; PyTorch and JAX are left out where they are not installed.

    Returns
    -------
    list of Row
        For each case one of each program. Only normext's must keep the limits.

    Examples
    --------
    >>> case = next(case for case in CASES if case.name == "offset 10000")
    >>> ours, formula = check_accuracy([case], ["normext", "NumPy"])
    >>> ours.ok, formula.ok
    (True, False)
    """
    norms = {}
    for program in programs:
        with contextlib.suppress(ImportError):
            norms[program] = _LOADERS[program]()
    rows = []
    for case in cases:
        arguments = case.arguments()
        wanted = exact(case, *arguments)
        for program, norm in norms.items():
            with np.errstate(all="ignore"):  # what overflows shows in the errors
                rows.append(Row(case, program, *errors(case, norm(case.norm, *arguments, case.eps), wanted)))
    return rows


def format_table(rows: Iterable[Row]) -> str:
    """The rows as a table: a line for each case, the programs side by side, ours beside its limits.

    Parameters
    ----------
    rows : iterable of Row
        What `check_accuracy` returns.

    Returns
    -------
    str
        Several lines without a final newline.

    Examples
    --------
    >>> rows = [Row(CASES[0], "normext", 1e-7, 1e-7), Row(CASES[0], "NumPy", 6e-5, 4e-6)]
    >>> print(format_table(rows))
    worst error, y | gradients               normext            NumPy             limits
    batch norm  offset 0                   1.0e-07 1.0e-07   6.0e-05 4.0e-06   2.0e-06 2.0e-06  ok
    """
    by_case: dict[Case, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.program] = row
    programs = list(next(iter(by_case.values())))
    table = [f"{'worst error, y | gradients':<36}" + "".join(f"{name:^18}" for name in [*programs, "limits"]).rstrip()]
    for case, found in by_case.items():
        pairs = [(found[program].y, found[program].gradients) for program in programs] + [(case.limit, LIMIT)]
        line = f"{case.norm}  {case.name:<24}" + "".join(f"  {y:>8.1e} {gradients:.1e}" for y, gradients in pairs)
        table.append(f"{line}  {'ok' if found['normext'].ok else 'FAIL'}")
    return "\n".join(table)


def _ours(norm, x, dy, gamma, beta, eps):
    name = norm.replace(" ", "_")
    y, cache = getattr(normext, name)(x, gamma, beta, eps=eps)
    return y, *getattr(normext, name + "_backward")(dy, cache)


def _twin(norm, x, dy, gamma, beta, eps):
    name = norm.replace(" ", "_")
    y, cache = getattr(reference, name)(x, gamma, beta, eps=eps)
    return y, *getattr(reference, name + "_backward")(dy, cache)


def _pytorch() -> Norm:
    import torch

    def run(norm, x, dy, gamma, beta, eps):
        leaves = [torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta)]
        if norm == "batch norm":
            positive = max(eps, 1e-300)  # it refuses 0
            y = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=positive)
        else:
            y = torch.nn.functional.layer_norm(leaves[0], x.shape[1:], *leaves[1:], eps=eps)
        y.backward(torch.from_numpy(dy))
        return y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)

    return run


def _jax() -> Norm:
    import jax
    import jax.numpy as jnp

    def run(norm, x, dy, gamma, beta, eps):
        axis = 0 if norm == "batch norm" else 1

        @jax.jit
        def forward(x, gamma, beta):
            mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
            return (x - mean) / jnp.sqrt(variance + eps) * gamma + beta

        y, backward = jax.vjp(forward, x, gamma, beta)
        return tuple(np.asarray(a) for a in (y, *backward(dy)))

    return run


_LOADERS: dict[str, Callable[[], Norm]] = {
    "normext": lambda: _ours,
    "NumPy": lambda: _twin,
    "PyTorch": _pytorch,
    "JAX": _jax,
}
