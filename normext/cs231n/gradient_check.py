"""The assignment's names for numerical gradients; the difference itself is `normext.gradcheck.numerical_gradient`."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normext.gradcheck import numerical_gradient

__all__ = [
    "eval_numerical_gradient",
    "eval_numerical_gradient_array",
    "eval_numerical_gradient_blobs",
    "eval_numerical_gradient_net",
    "grad_check_sparse",
]


def eval_numerical_gradient(
    f: Callable[[np.ndarray], Any], x: np.ndarray, verbose: bool = True, h: float = 1e-5
) -> np.ndarray:
    """Gradient of a function that returns one number.

    Parameters
    ----------
    f : callable
        Called with x, changed in place and put back: it may ignore its argument and read x where it lies.
    x : ndarray of float64 or float32
        In float32 the result is good to a few digits only, and better with a larger h.
    verbose : bool, default True
        Print every index and its gradient.
    h : float, default 1e-5
        Half the distance between the two points.

    Returns
    -------
    ndarray of float64
        In the shape of x.

    Raises
    ------
    TypeError
        If x is not an array of floats.

    Examples
    --------
    >>> import numpy as np
    >>> eval_numerical_gradient(lambda x: (x**2).sum(), np.array([1.0, 3.0]), verbose=False).round(6)
    array([2., 6.])
    """
    gradient = _gradient(f, x, None, h)
    if verbose:
        for index in np.ndindex(gradient.shape):
            print(index, gradient[index])
    return gradient


def eval_numerical_gradient_array(
    f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, df: Any, h: float = 1e-5
) -> np.ndarray:
    """Gradient of ``sum(f(x) * df)``, for a function that returns an array.

    Parameters
    ----------
    f : callable
        Called with x, changed in place and put back.
    x : ndarray of float64 or float32
    df : array_like
        The gradient from above, in the shape of ``f(x)``.
    h : float, default 1e-5
        Half the distance between the two points.

    Returns
    -------
    ndarray of float64
        In the shape of x.

    Raises
    ------
    TypeError
        If x is not an array of floats.

    Examples
    --------
    >>> import numpy as np
    >>> eval_numerical_gradient_array(lambda x: x**2, np.array([1.0, 3.0]), np.array([1.0, 10.0])).round(6)
    array([ 2., 60.])
    """
    return _gradient(f, x, df, h)


def eval_numerical_gradient_blobs(
    f: Callable[..., Any], inputs: Sequence[Any], output: Any, h: float = 1e-5
) -> list[np.ndarray]:
    """Gradients of a function that reads blobs and writes one; a blob has values (`vals`) and gradients (`diffs`).

    Parameters
    ----------
    f : callable
        Called as ``f(*inputs, output)``; writes ``output.vals``.
    inputs : sequence of blobs
    output : blob
        ``output.diffs`` is the gradient from above.
    h : float, default 1e-5
        Half the distance between the two points.

    Returns
    -------
    list of ndarray of float64
        One an input, in the shape of its `vals`.

    Raises
    ------
    TypeError
        If an input's `vals` is not an array of floats.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace as Blob
    >>> x, out = Blob(vals=np.array([1.0, 3.0])), Blob(vals=np.zeros(2), diffs=np.ones(2))
    >>> def square(x, out):
    ...     out.vals[:] = x.vals**2
    >>> eval_numerical_gradient_blobs(square, (x,), out)[0].round(6)
    array([2., 6.])
    """

    def values(_):
        f(*inputs, output)
        return output.vals

    return [_gradient(values, blob.vals, output.diffs, h) for blob in inputs]


def eval_numerical_gradient_net(net: Any, inputs: Sequence[Any], output: Any, h: float = 1e-5) -> list[np.ndarray]:
    """Gradients of a network whose ``forward()`` reads the input blobs and writes the output blob.

    Parameters
    ----------
    net : object
        With a method ``forward()``.
    inputs, output, h
        As for `eval_numerical_gradient_blobs`.

    Returns
    -------
    list of ndarray of float64
        One an input, in the shape of its `vals`.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace as Blob
    >>> x, out = Blob(vals=np.array([1.0, 3.0])), Blob(vals=np.zeros(2), diffs=np.ones(2))
    >>> net = Blob(forward=lambda: np.square(x.vals, out=out.vals))
    >>> eval_numerical_gradient_net(net, (x,), out)[0].round(6)
    array([2., 6.])
    """
    return eval_numerical_gradient_blobs(lambda *blobs: net.forward(), inputs, output, h)


def grad_check_sparse(
    f: Callable[[np.ndarray], Any], x: np.ndarray, analytic_grad: np.ndarray, num_checks: int = 10, h: float = 1e-5
) -> None:
    """Compare a gradient with the numerical one at a few elements, drawn with Python's `random`, and print both.

    Parameters
    ----------
    f : callable
        Returns one number. Called with x, changed in place and put back.
    x : ndarray of float64 or float32
    analytic_grad : ndarray
        The gradient to check, in the shape of x.
    num_checks : int, default 10
        How many elements to compare.
    h : float, default 1e-5
        Half the distance between the two points.

    Raises
    ------
    TypeError
        If x is not an array of floats.

    Examples
    --------
    >>> import numpy as np
    >>> grad_check_sparse(lambda x: (3 * x).sum(), np.zeros((2, 2)), np.full((2, 2), 1.0), num_checks=1)
    numerical: 3.000000 analytic: 1.000000, relative error: 5.000000e-01
    """
    for _ in range(num_checks):
        index = tuple(random.randrange(n) for n in x.shape)
        # The ellipsis makes it a view, an array of no axes, rather than a copy of the number.
        numerical = float(_gradient(lambda _: f(x), x[(*index, ...)], None, h))
        analytic = float(analytic_grad[index])
        scale = abs(numerical) + abs(analytic)
        error = abs(numerical - analytic) / scale if scale else 0.0
        print(f"numerical: {numerical:f} analytic: {analytic:f}, relative error: {error:e}")


def _gradient(f, x, df, h):
    """`numerical_gradient`, for float32 too: the points are laid out in float64, and rounded as they are put into x."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        return numerical_gradient(f, x, df, h=h)

    def at(points):
        x[...] = points
        return f(x)

    original = x.copy()
    try:
        return numerical_gradient(at, x.astype(np.float64), df, h=h)
    finally:
        x[...] = original
