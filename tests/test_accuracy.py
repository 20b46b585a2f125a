"""Statistics of float32 data far from zero, and other data on which textbook formulas fail, against float64."""

import numpy as np
import pytest

import normext
from normext import accuracy

LAYOUTS = {
    "N,D": lambda x: (x, 1),
    "Fortran": lambda x: (np.asfortranarray(x), 1),
    "N,C,L": lambda x: (x.reshape(100, -1, x.shape[1]).transpose(0, 2, 1).copy(), 1),
    "N,L,C": lambda x: (x.reshape(100, -1, x.shape[1]), -1),
}


def exact(x, axis, eps=1e-5):
    deviation = x.astype(np.float64)
    deviation -= deviation.mean(axis, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(axis, keepdims=True) + eps)


def name_of(case):
    return f"{case.norm}, {case.name}"


@pytest.mark.parametrize("case", accuracy.CASES, ids=name_of)
def test_case_of_the_published_table(case):
    ours, *_ = accuracy.check_accuracy([case], ["normext"])
    assert ours.ok, ours


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "N,D"])
@pytest.mark.parametrize("case", [case for case in accuracy.CASES if case.norm == "batch norm"], ids=name_of)
def test_case_in_another_layout(case, layout):
    arguments = case.arguments()
    (x, axis), (dy, _) = (LAYOUTS[layout](a) for a in arguments[:2])
    y, cache = normext.batch_norm(x, *arguments[2:], eps=case.eps, axis=axis)
    dx, dgamma, dbeta = normext.batch_norm_backward(dy, cache)
    back = (np.moveaxis(a, axis, -1).reshape(arguments[0].shape) for a in (y, dx))
    found = accuracy.errors(case, (*back, dgamma, dbeta), accuracy.exact(case, *arguments))
    assert accuracy.Row(case, "normext", *found).ok, found


@pytest.mark.parametrize("shape", [(64, 512), (1000, 7)])
@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_layer_norm_far_from_zero(offset, shape):
    x = (offset + np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    y, _ = normext.layer_norm(x)
    assert np.abs(y - exact(x, 1)).max() <= 2e-6


def test_the_table_tells_a_formula_that_fails():
    """The check can fail, and the textbook formula fails it in the first digit."""
    case = next(case for case in accuracy.CASES if case.name == "offset 10000")
    ours, formula = accuracy.check_accuracy([case], ["normext", "NumPy"])
    assert ours.ok and not formula.ok
    assert 1 < formula.y < 10 and ours.y < 2e-6
    assert not ours._replace(y=float("nan")).ok and not ours._replace(gradients=float("inf")).ok


def test_sorted_data():
    """Every block's mean is far from the others'."""
    x = np.sort(np.random.default_rng(0).standard_normal((100_000, 8)).astype(np.float32) + 100, axis=0)
    y, _ = normext.batch_norm(x)
    assert np.abs(y - exact(x, 0)).max() <= 2e-6
    y, _ = normext.layer_norm(np.ascontiguousarray(x.T))
    assert np.abs(y - exact(x, 0).T).max() <= 2e-6


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0, 1.1, -123456.789, 1e6 + 0.5, 1e-30, 1e-40, 3e38, -1e30])
def test_constant_gives_exactly_beta(value, dtype, eps):
    for rows, columns in ((1000, 37), (5, 3), (100_000, 2), (2, 9000)):
        x = np.full((rows, columns), value, dtype)
        beta = np.arange(columns, dtype=dtype) + dtype(0.1)
        y, cache = normext.batch_norm(x, beta=beta, eps=eps)
        np.testing.assert_array_equal(y, np.broadcast_to(beta, x.shape))
        assert (cache.mean == x[0]).all()
        y, _ = normext.layer_norm(x, beta=beta, eps=eps)
        np.testing.assert_array_equal(y, np.broadcast_to(beta, x.shape))
        y, _ = normext.batch_norm(x.reshape(rows, 1, columns), beta=beta[:1], eps=eps)
        np.testing.assert_array_equal(y, np.full((rows, 1, columns), beta[0]))


@pytest.mark.parametrize("scale", [1e37, 1e19, 1e-19, 1e-30, 1e-36])
def test_squares_out_of_range(scale):
    """The square of a deviation overflows float32, or vanishes in it."""
    x = (scale * np.random.default_rng(0).standard_normal((1000, 37))).astype(np.float32)
    expected = exact(x.astype(np.float64), 0, eps=0.0)
    y, _ = normext.batch_norm(x, eps=0.0)
    assert np.abs(y - expected).max() <= 2e-6
    y, _ = normext.layer_norm(np.ascontiguousarray(x.T), eps=0.0)
    assert np.abs(y - expected.T).max() <= 2e-6


def test_largest_numbers_with_alternating_sign():
    x = np.where(np.arange(1000)[:, None] % 2, 3e38, -3e38) * np.ones((1, 5))
    for y in (normext.batch_norm(x.astype(np.float32))[0], normext.layer_norm(x.T.astype(np.float32).copy())[0].T):
        np.testing.assert_allclose(y, np.sign(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fill", [0, 0.25, -3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_stretch_of_equal_numbers_among_others(dtype, fill, reverse):
    """Padding, or what a relu leaves: a block without a deviation of its own, far from the mean of the others."""
    for size in (1e-4, 0.3, 1.0):
        x = np.full((3, 20_000), fill, dtype)
        x[:, :5000] = size * np.random.default_rng(0).standard_normal((3, 5000))
        x = np.ascontiguousarray(x[:, ::-1]) if reverse else x
        rows = (
            normext.layer_norm(x)[0],
            normext.batch_norm(x.T.copy())[0].T,
            normext.batch_norm(x.reshape(1, 3, -1))[0].reshape(x.shape),
            normext.group_norm(x.reshape(1, 3, -1), 3)[0].reshape(x.shape),
        )
        for y in rows:
            assert np.abs(y - exact(x, 1)).max() <= 2e-6


def test_one_channel_out_of_range_leaves_its_neighbours():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 20)).astype(np.float32)
    alone, _ = normext.batch_norm(x)
    x[:, 7] *= 1e30
    x[:, 11] = 0
    y, _ = normext.batch_norm(x)
    np.testing.assert_array_equal(np.delete(y, [7, 11], axis=1), np.delete(alone, [7, 11], axis=1))
    np.testing.assert_array_equal(y[:, 11], 0)
