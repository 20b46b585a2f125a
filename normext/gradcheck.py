"""Numerical gradients and relative errors, and with them the checks behind ``normext check``."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from normext import reference
from normext.functional import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)

__all__ = ["LAYERS", "LIMITS", "Layer", "Row", "check_layers", "format_rows", "numerical_gradient", "relative_error"]


def numerical_gradient(f: Callable[[np.ndarray], Any], x: np.ndarray, df: Any = None, *, h: float = 1e-5) -> np.ndarray:
    """Gradient of ``sum(f(x) * df)`` with respect to x, by centred differences.

    Every element of x in turn is moved by h both ways: ``(f(x + h) - f(x - h)) / 2h``, exact to O(h**2). The error is
    least near ``h = cbrt(machine epsilon)``, about 6e-6 in float64 [1]_.

    Parameters
    ----------
    f : callable
        Function of one array. It is called with x itself, changed in place and put back, so it may also ignore its
        argument and read x where it lies (a network's parameter, say).
    x : ndarray of float64
        Where to take the gradient. Unchanged on return.
    df : array_like, optional
        The gradient that arrives from above, in the shape of ``f(x)``. Default: ones.
    h : float, default 1e-5
        Half the distance between the two points.

    Returns
    -------
    ndarray of float64
        In the shape of x.

    Raises
    ------
    TypeError
        If x is not an array of float64: in less precision the difference drowns.

    References
    ----------
    .. [1] W. H. Press et al., "Numerical Recipes", 3rd ed., 2007, section 5.7.

    Examples
    --------
    >>> import numpy as np
    >>> numerical_gradient(lambda x: x**2, np.array([1.0, 3.0])).round(6)
    array([2., 6.])
    """
    if not isinstance(x, np.ndarray) or x.dtype != np.float64:
        raise TypeError(f"x must be an ndarray of float64, got {getattr(x, 'dtype', type(x).__name__)}")
    df = 1.0 if df is None else np.asarray(df)
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        here = x[index]
        x[index] = here + h
        above = np.array(f(x), copy=True)
        x[index] = here - h
        below = np.array(f(x), copy=True)
        x[index] = here
        gradient[index] = np.sum((above - below) * df) / (2 * h)
    return gradient


def relative_error(a: Any, b: Any) -> float:
    """Largest difference between a and b over the largest magnitude in either: 0 is equal, 2 is opposite.

    One scale for the whole array, so that an element that should be zero and is 1e-17 does not count as wholly wrong.

    Parameters
    ----------
    a, b : array_like
        Of the same shape.

    Returns
    -------
    float
        NaN where either has one.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> relative_error([1.0, 1.5], [1.0, 2.0])
    0.25
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {a.shape} and {b.shape}")
    scale = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
    return 0.0 if scale == 0 else float(np.abs(a - b).max() / scale)


class Layer(NamedTuple):
    """A compiled layer and the input to check it on.

    The twin is found by name: the function of `normext.reference` that is called as ``norm[0]`` is.
    """

    name: str
    norm: tuple[Callable[..., tuple], Callable[..., tuple]]  # forward, backward
    shape: tuple[int, ...]  # of x
    parameters: dict[str, tuple[int, ...]]  # shapes of gamma and beta, as far as the layer has them
    options: Mapping[str, Any] = MappingProxyType({})  # what else forward is given


class Row(NamedTuple):
    """One comparison: the relative error of one result of one layer, and the most that it may be."""

    layer: str
    comparison: str  # a key of LIMITS
    quantity: str  # y, dx, dgamma or dbeta
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error keeps the limit; NaN does not."""
        return self.error <= self.limit


def _affine(*shape: int) -> dict[str, tuple[int, ...]]:
    return {"gamma": shape, "beta": shape}


_BATCH = batch_norm, batch_norm_backward
_LAYER = layer_norm, layer_norm_backward
_GROUP = group_norm, group_norm_backward
_INSTANCE = instance_norm, instance_norm_backward
_RMS = rms_norm, rms_norm_backward
_RESIDUAL = {"residual": np.arange(17 * 19).reshape(17, 19) % 7 / 4 - 1}
_EVALUATION = {"training": False, "running_mean": np.linspace(-1, 2, 19), "running_var": np.linspace(0.5, 4, 19)}

# 19 is above 16, the most float32 numbers that one vector holds, and odd: whole vectors and a remainder both occur.
LAYERS: tuple[Layer, ...] = (
    Layer("batch norm (N, D)", _BATCH, (23, 19), _affine(19)),
    Layer("batch norm (N, C, H, W)", _BATCH, (3, 5, 7, 3), _affine(5)),
    Layer("batch norm (N, H, W, C)", _BATCH, (3, 3, 2, 19), _affine(19), {"axis": -1}),
    Layer("batch norm (N, D), evaluation", _BATCH, (23, 19), _affine(19), _EVALUATION),
    Layer("batch norm (N, C, H, W), evaluation", _BATCH, (2, 19, 3, 3), _affine(19), _EVALUATION),
    Layer("batch norm (N, D), no gamma, beta", _BATCH, (23, 19), {}),
    Layer("batch norm (N, D), relu", _BATCH, (23, 19), _affine(19), {"activation": "relu"}),
    Layer("batch norm (N, C, H, W), relu", _BATCH, (3, 5, 7, 3), _affine(5), {"activation": "relu"}),
    Layer("layer norm, last axis", _LAYER, (17, 19), _affine(19)),
    Layer("layer norm, last three axes", _LAYER, (7, 3, 5, 3), _affine(3, 5, 3), {"axis": 1}),
    Layer("layer norm, no gamma, beta", _LAYER, (17, 19), {}),
    Layer("layer norm, residual", _LAYER, (17, 19), _affine(19), _RESIDUAL),
    Layer("group norm (N, C, H, W)", _GROUP, (3, 6, 5, 3), _affine(6), {"num_groups": 2}),
    Layer("group norm (N, H, W, C)", _GROUP, (3, 5, 3, 6), _affine(6), {"num_groups": 3, "axis": -1}),
    Layer("group norm (N, C)", _GROUP, (7, 12), _affine(12), {"num_groups": 3}),
    Layer("instance norm (N, C, H, W)", _INSTANCE, (3, 4, 5, 3), _affine(4)),
    Layer("RMS norm, last axis", _RMS, (17, 19), {"gamma": (19,)}),
    Layer("RMS norm, last three axes, no gamma", _RMS, (7, 3, 5, 3), {}, {"axis": 1}),
    Layer("RMS norm, residual", _RMS, (17, 19), {"gamma": (19,)}, _RESIDUAL),
)

# The most that rounding explains.
LIMITS: dict[str, float] = {
    # Centred differences with h = 1e-5 cut off at h**2 / 6 times the third derivative (up to 100 here): 2e-9. Each of
    # the 400 terms of the sum is rounded by about 1e-15, divided by 2h; they add up like a random walk: 1e-9.
    "numerical": 1e-8,
    # Sums of up to 400 float64 terms in two different orders: 400 * 1.1e-16 = 4e-14 at worst; then terms of dx cancel.
    "twin": 1e-12,
    # A dozen float32 roundings of 6e-8, in dx on terms that cancel.
    "float32": 2e-6,
    # Two roundings to the storage type: of the sum with a residual, and of the result.
    "float16": 2 * 2.0**-11,
    "bfloat16": 2 * 2.0**-8,
}


def check_layers(layers: Iterable[Layer] | None = None) -> list[Row]:
    """Check the results of each layer in several ways.

    - *numerical*: the gradients against centred differences of the forward pass, in float64.
    - *twin*: y and the gradients against `normext.reference`, in float64.
    - *float32*: y and the gradients in float32 against the same in float64. The input is exact in both.
    - *float16*, and *bfloat16* where ml_dtypes is installed: likewise, with x and dy stored so.

    Parameters
    ----------
    layers : iterable of Layer, optional
        Which layers. Default: `LAYERS`, all that are compiled.

    Returns
    -------
    list of Row
        For each layer, comparison and result one. A result that is missing or of the wrong shape has an infinite error.

    Examples
    --------
    >>> rows = check_layers(LAYERS[:1])
    >>> [row.quantity for row in rows if row.comparison == "numerical"]
    ['dx', 'dgamma', 'dbeta']
    >>> all(row.ok for row in rows)
    True
    """
    return [row for layer in (LAYERS if layers is None else layers) for row in _check_layer(layer)]


def format_rows(rows: Iterable[Row]) -> str:
    """The rows as a table: a line for each layer and comparison, the limit beside the errors.

    Parameters
    ----------
    rows : iterable of Row
        What `check_layers` returns.

    Returns
    -------
    str
        Several lines without a final newline.

    Examples
    --------
    >>> print(format_rows([Row("batch norm", "twin", "y", 1e-16, 1e-12), Row("batch norm", "twin", "dx", 0.5, 1e-12)]))
    layer                                against           y       dx   dgamma    dbeta    limit
    batch norm                           twin        1.0e-16  5.0e-01        -        -  1.0e-12  FAIL
    """
    quantities = ("y", "dx", "dgamma", "dbeta")
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.layer, row.comparison), {})[row.quantity] = row
    table = [f"{'layer':<36} {'against':<10}" + "".join(f"{quantity:>9}" for quantity in (*quantities, "limit"))]
    for (layer, comparison), found in lines.items():
        errors = "".join(f"{found[q].error:>9.1e}" if q in found else f"{'-':>9}" for q in quantities)
        limit = min(row.limit for row in found.values())
        verdict = "ok" if all(row.ok for row in found.values()) else "FAIL"
        table.append(f"{layer:<36} {comparison:<10}{errors}{limit:>9.1e}  {verdict}")
    return "\n".join(table)


def _check_layer(layer: Layer) -> list[Row]:
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], offset: float, scale: float) -> np.ndarray:
        """Random numbers in float64 that float32 holds exactly."""
        return (offset + scale * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)

    x, dy = draw(layer.shape, 1, 2), draw(layer.shape, 0, 1)
    parameters = {name: draw(shape, 1, 0.5) for name, shape in layer.parameters.items()}
    name = layer.norm[0].__name__
    twin = getattr(reference, name), getattr(reference, name + "_backward")

    double = _results(layer.norm, x, dy, parameters, layer.options)
    numerical = {
        "d" + of: numerical_gradient(lambda _: layer.norm[0](x, **parameters, **layer.options)[0], at, dy)
        for of, at in {"x": x, **parameters}.items()
    }
    comparisons = {
        "numerical": (double, numerical),
        "twin": (double, _results(twin, x, dy, parameters, layer.options)),
    }
    for dtype in _narrow_dtypes():
        stored = [a.astype(dtype) for a in (x, dy)]
        wide = [a.astype(np.float64) for a in stored]
        comparisons[dtype.name] = tuple(_results(layer.norm, *a, parameters, layer.options) for a in (stored, wide))
    return [
        Row(layer.name, comparison, quantity, _error(found.get(quantity), wanted), LIMITS[comparison])
        for comparison, (found, expected) in comparisons.items()
        for quantity, wanted in expected.items()
    ]


def _narrow_dtypes() -> list[np.dtype]:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return [np.dtype(np.float32), np.dtype(np.float16)]
    return [np.dtype(np.float32), np.dtype(np.float16), np.dtype(bfloat16)]


def _results(norm, x, dy, parameters, options) -> dict[str, np.ndarray]:
    forward, backward = norm
    y, *_, cache = forward(x, **parameters, **options)
    gradients = zip(("dx", "dgamma", "dbeta"), backward(dy, cache))
    return {"y": y, **{name: gradient for name, gradient in gradients if gradient is not None}}


def _error(found: np.ndarray | None, wanted: np.ndarray) -> float:
    return relative_error(found, wanted) if np.shape(found) == wanted.shape else np.inf
