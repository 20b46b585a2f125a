"""normext.gradcheck: right results pass, and each kind of wrong one is caught."""

from importlib.util import find_spec

import numpy as np
import pytest

from normext import batch_norm, batch_norm_backward, layer_norm, layer_norm_backward
from normext.gradcheck import (
    LAYERS,
    LIMITS,
    Layer,
    Row,
    _narrow_dtypes,
    check_layers,
    format_rows,
    numerical_gradient,
    relative_error,
)


def failures(norm):
    """What fails for these forward and backward functions: {(comparison, quantity)}."""
    layer = Layer("suspect", norm, (6, 5), {"gamma": (5,), "beta": (5,)})
    return {(row.comparison, row.quantity) for row in check_layers([layer]) if not row.ok}


def named(forward, name="batch_norm"):
    """The function under the name of the one that it stands in for, by which the twin is found."""
    forward.__name__ = name
    return forward


def test_every_layer_passes_with_room():
    rows = check_layers()
    assert {row.layer for row in rows} == {layer.name for layer in LAYERS}
    assert [row for row in rows if not row.ok] == []
    without = set() if find_spec("ml_dtypes") else {"bfloat16"}
    assert {row.comparison for row in rows} == set(LIMITS) - without


def test_a_layer_is_compared_in_all_its_results():
    rows = check_layers([Layer("affine", (layer_norm, layer_norm_backward), (4, 3), {"gamma": (3,), "beta": (3,)})])
    gradients = ["dx", "dgamma", "dbeta"]
    assert [(row.comparison, row.quantity) for row in rows] == [
        *(("numerical", quantity) for quantity in gradients),
        *(("twin", quantity) for quantity in ["y", *gradients]),
        *((dtype.name, quantity) for dtype in _narrow_dtypes() for quantity in ["y", *gradients]),
    ]


def test_right_functions_have_no_failures():
    assert failures((batch_norm, batch_norm_backward)) == set()


@pytest.mark.parametrize("index, quantity", [(0, "dx"), (1, "dgamma"), (2, "dbeta")])
def test_a_wrong_gradient_fails_in_that_gradient_alone(index, quantity):
    def backward(dy, cache):
        gradients = list(batch_norm_backward(dy, cache))
        gradients[index] = gradients[index] * 1.00001
        return tuple(gradients)

    # float32 against float64 compares the layer with itself, and both are wrong alike.
    assert failures((batch_norm, backward)) == {("numerical", quantity), ("twin", quantity)}


def test_a_wrong_result_with_its_own_right_gradients_fails_against_the_twin():
    def forward(x, *args, **options):
        return batch_norm(x, *args, **options, eps=1e-3)

    wrong = failures((named(forward), batch_norm_backward))
    assert ("twin", "y") in wrong
    assert ("numerical", "dx") not in wrong


def test_too_little_precision_in_float32_fails_only_there():
    def forward(x, *args, **options):
        y, cache = batch_norm(x, *args, **options)
        return (y.astype(np.float16).astype(np.float32) if x.dtype == np.float32 else y), cache

    assert failures((named(forward), batch_norm_backward)) == {("float32", "y")}


def test_a_missing_gradient_fails():
    def backward(dy, cache):
        return *batch_norm_backward(dy, cache)[:2], None

    assert {quantity for _, quantity in failures((batch_norm, backward))} == {"dbeta"}


def test_a_gradient_of_the_wrong_shape_fails():
    def backward(dy, cache):
        dx, dgamma, dbeta = batch_norm_backward(dy, cache)
        return dx.sum(axis=0), dgamma, dbeta

    assert ("numerical", "dx") in failures((batch_norm, backward))


def test_nan_fails():
    def backward(dy, cache):
        dx, dgamma, dbeta = batch_norm_backward(dy, cache)
        return dx * np.nan, dgamma, dbeta

    assert ("twin", "dx") in failures((batch_norm, backward))


def test_checking_leaves_running_statistics_alone():
    before = [np.copy(layer.options["running_mean"]) for layer in LAYERS if "running_mean" in layer.options]
    check_layers()
    after = [layer.options["running_mean"] for layer in LAYERS if "running_mean" in layer.options]
    assert before and all(map(np.array_equal, before, after))


def test_the_table_shows_every_error_and_marks_the_line_that_fails():
    rows = [
        Row("a", "twin", "y", 1e-16, 1e-12),
        Row("a", "twin", "dx", 3e-12, 1e-12),
        Row("b", "twin", "y", 0.0, 1e-12),
    ]
    _, first, second = format_rows(rows).splitlines()
    assert first.split() == ["a", "twin", "1.0e-16", "3.0e-12", "-", "-", "1.0e-12", "FAIL"]
    assert second.split() == ["b", "twin", "0.0e+00", "-", "-", "-", "1.0e-12", "ok"]


def test_numerical_gradient_of_a_known_function():
    x, df = np.array([[0.5, -1.0], [2.0, 3.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    before = x.copy()
    np.testing.assert_allclose(numerical_gradient(np.sin, x, df), np.cos(x) * df, rtol=1e-9)
    np.testing.assert_array_equal(x, before)


def test_numerical_gradient_of_a_function_that_returns_its_argument():
    np.testing.assert_allclose(numerical_gradient(lambda x: x, np.array([1.0, 2.0])), [1.0, 1.0], rtol=1e-9)


@pytest.mark.parametrize("x", [np.ones(3, np.float32), np.ones(3, int), [1.0, 2.0]])
def test_numerical_gradient_wants_float64(x):
    with pytest.raises(TypeError, match="x must be an ndarray of float64"):
        numerical_gradient(np.sin, x)


@pytest.mark.parametrize(
    "a, b, error", [([0, 0], [0, 0], 0), ([1, -2], [1, 2], 2), ([4, 1e-9], [4, 0], 2.5e-10), ([], [], 0)]
)
def test_relative_error(a, b, error):
    assert relative_error(a, b) == pytest.approx(error)


def test_relative_error_of_nan_is_nan():
    assert np.isnan(relative_error([1.0, np.nan], [1.0, 2.0]))


def test_relative_error_wants_equal_shapes():
    with pytest.raises(ValueError, match="a and b must have the same shape"):
        relative_error(np.ones(3), np.ones(4))
