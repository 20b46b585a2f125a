"""Statistics of float32 data far from zero, and other data on which textbook formulas fail, against float64."""

import numpy as np
import pytest

import normext

OFFSETS = [0, 1e2, 1e4, 1e6]
LAYOUTS = {
    "N,D": lambda x: (x, 1),
    "Fortran": lambda x: (np.asfortranarray(x), 1),
    "N,C,L": lambda x: (x.reshape(100, -1, x.shape[1]).transpose(0, 2, 1).copy(), 1),
    "N,L,C": lambda x: (x.reshape(100, -1, x.shape[1]), -1),
}


def exact(x, axes, eps=1e-5):
    x = x.astype(np.float64)
    deviation = x - x.mean(axes, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(axes, keepdims=True) + eps)


def others(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_batch_norm_far_from_zero(offset, layout):
    x = (offset + np.random.default_rng(0).standard_normal((100_000, 16))).astype(np.float32)
    x, axis = LAYOUTS[layout](x)
    y, _ = normext.batch_norm(x, axis=axis)
    assert np.abs(y - exact(x, others(x, axis))).max() <= 2e-6


@pytest.mark.parametrize("shape", [(16, 100_000), (64, 512), (1000, 7)])
@pytest.mark.parametrize("offset", OFFSETS)
def test_layer_norm_far_from_zero(offset, shape):
    x = (offset + np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    y, _ = normext.layer_norm(x)
    assert np.abs(y - exact(x, 1)).max() <= 2e-6


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_far_from_zero(offset):
    """Relative to the largest gradient, float32 far from zero gives what float64 gives for the same numbers."""
    rng = np.random.default_rng(0)
    x = (offset + rng.standard_normal((20_000, 16))).astype(np.float32)
    dy, gamma = rng.standard_normal(x.shape).astype(np.float32), np.ones(16, np.float32)
    for norm in ("batch_norm", "layer_norm"):
        forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
        single = backward(dy, forward(x, gamma, gamma)[1])
        double = backward(dy.astype(np.float64), forward(x.astype(np.float64), gamma, gamma)[1])
        for s, d in zip(single, double, strict=True):
            assert np.abs(s - d).max() <= 2e-6 * np.abs(d).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outlier", [1e4, 1e6, 1e8, 1e30])
def test_outlier_first_spoils_nothing(outlier, layout):
    x = (3 + np.random.default_rng(0).standard_normal((100_000, 16))).astype(np.float32)
    x[0] = outlier
    x, axis = LAYOUTS[layout](x)
    y, _ = normext.batch_norm(x, axis=axis)
    # The outlier itself comes to sqrt(100000) = 316, where a float32 is known to 2e-5 at best.
    error, expected = np.abs(y - exact(x, others(x, axis))), exact(x, others(x, axis))
    assert error[np.abs(expected) < 100].max() <= 2e-6
    assert (error / np.abs(expected))[np.abs(expected) > 100].max() <= 1e-6


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


def test_one_channel_out_of_range_leaves_its_neighbours():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 20)).astype(np.float32)
    alone, _ = normext.batch_norm(x)
    x[:, 7] *= 1e30
    x[:, 11] = 0
    y, _ = normext.batch_norm(x)
    np.testing.assert_array_equal(np.delete(y, [7, 11], axis=1), np.delete(alone, [7, 11], axis=1))
    np.testing.assert_array_equal(y[:, 11], 0)
