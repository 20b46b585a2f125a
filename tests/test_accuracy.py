"""Statistics of float32 data far from zero, and other data on which textbook formulas fail, against float64."""

import numpy as np
import pytest

import normext
from normext import accuracy, reference

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


# Other norms and all their layouts -----------------------------------------------------------------------------------

GEOMETRIES = {  # norm, shape, options; and whether the arrays are strided, so that the loops get copies
    "columns": ("batch", (60, 7), {}, False),
    "many columns": ("batch", (20, 700), {}, False),
    "tall columns": ("batch", (40_000, 5), {}, False),
    "channels first": ("batch", (6, 5, 9, 7), {}, False),
    "channels last": ("batch", (6, 9, 7, 5), {"axis": -1}, False),
    "large channels": ("batch", (2, 3, 200, 300), {}, False),
    "copied channels": ("batch", (40, 6, 30, 9), {}, True),
    "layer": ("layer", (50, 33), {}, False),
    "few long rows": ("layer", (3, 100_001), {}, False),
    "many rows": ("layer", (3000, 16), {}, False),
    "copied rows": ("layer", (9, 30), {}, True),
    "rms": ("rms", (50, 33), {}, False),
    "long rms": ("rms", (3, 70_001), {}, False),
    "groups": ("group", (4, 6, 9, 7), {"num_groups": 3}, False),
    "groups, channels last": ("group", (4, 9, 7, 6), {"num_groups": 3, "axis": -1}, False),
    "groups of one pixel": ("group", (40, 12), {"num_groups": 3}, False),
    "large groups": ("group", (2, 6, 80, 90), {"num_groups": 2}, False),
    "copied groups": ("group", (4, 6, 5, 5), {"num_groups": 3}, True),
    "instance": ("instance", (4, 6, 9, 7), {}, False),
    "instance, channels last": ("instance", (4, 9, 7, 6), {"axis": -1}, False),
}


def in_layout(a, strided):
    if strided:
        a = np.repeat(a, 2, axis=-1)[..., ::2]
    return a


def parameters_of(geometry, dtype, rng):
    """gamma, and beta where there is one, by name."""
    norm, shape, options, _ = GEOMETRIES[geometry]
    axis = options.get("axis", -1 if norm in ("layer", "rms") else 1)
    gamma = (1 + 0.3 * rng.standard_normal(shape[axis])).astype(dtype)
    return {"gamma": gamma} if norm == "rms" else {"gamma": gamma, "beta": np.full_like(gamma, 0.3)}


def run(module, geometry, x, dy, parameters, **options):
    """y, dx and the gradients of the parameters."""
    name = GEOMETRIES[geometry][0] + "_norm"
    y, cache = getattr(module, name)(x, **parameters, **options, **GEOMETRIES[geometry][2])
    return y, *getattr(module, name + "_backward")(dy, cache)


def worst(results, wanted):
    """The largest error of each, relative to its largest number."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [1e6, -1e4])
def test_gradients_far_from_zero(geometry, dtype, offset, rng):
    _, shape, _, strided = GEOMETRIES[geometry]
    x = in_layout(rng.standard_normal(shape).astype(dtype), strided)
    dy = in_layout((offset + rng.standard_normal(shape)).astype(dtype), strided)
    parameters = parameters_of(geometry, dtype, rng)
    for gamma in (parameters["gamma"], np.full_like(parameters["gamma"], 1.1)):  # with the latter most of dy cancels
        parameters["gamma"] = gamma
        wide = {name: a.astype(np.longdouble) for name, a in parameters.items()}
        wanted = run(reference, geometry, x.astype(np.longdouble), dy.astype(np.longdouble), wide)
        # Where a long double is but a double, the twin is no better than the latter limit.
        assert worst(run(normext, geometry, x, dy, parameters), wanted) <= (2e-6 if dtype == np.float32 else 1e-7)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (np.float32, 2.0**-138),
        (np.float32, 2.0**-130),
        (np.float32, 2.0**125),
        (np.float64, 2.0**-1000),
        (np.float64, 2.0**-520),
        (np.float64, 2.0**513),
        (np.float64, 2.0**1020),
    ],
)
def test_numbers_of_any_size(geometry, dtype, scale, rng):
    """Normalized with eps 0, they are what they are near 1; dx has their inverse size."""
    norm, shape, _, strided = GEOMETRIES[geometry]
    dy_scale = min(scale, 1) * (2.0**100 if scale < 1 else 1)  # so that dx is in range
    x = in_layout((np.clip(rng.standard_normal(shape), -4, 4) * scale).astype(dtype), strided)
    dy = in_layout((rng.standard_normal(shape) * dy_scale).astype(dtype), strided)
    parameters = parameters_of(geometry, dtype, rng)
    y, dx, *gradients = (a.astype(np.float64) for a in run(normext, geometry, x, dy, parameters, eps=0.0))
    wide = {name: a.astype(np.float64) for name, a in parameters.items()}
    ordinary, unit = (a.astype(np.float64) / by for a, by in ((x, scale), (dy, dy_scale)))
    wanted_y, wanted_dx, *wanted = run(reference, geometry, ordinary, unit, wide, eps=0.0)
    limit = 2e-6 if dtype == np.float32 else 1e-12
    assert worst([y, *(a / dy_scale for a in gradients)], [wanted_y, *wanted]) <= limit
    if dy_scale / scale > np.finfo(dtype).smallest_normal * 2**30:  # or dx has lost its digits to denormals
        assert worst([dx / dy_scale * scale], [wanted_dx]) <= limit


def test_running_variance_beyond_float64():
    x = np.random.default_rng(0).standard_normal((50, 3)) * 1e200
    running_mean, running_var = np.zeros(3), np.ones(3)
    y, _ = normext.batch_norm(x, running_mean=running_mean, running_var=running_var)
    assert np.isinf(running_var).all() and np.isfinite(running_mean).all()
    assert np.abs(y - exact(x / 1e200, 0, eps=0.0)).max() <= 1e-13


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_rule_of_what_is_not_finite(geometry, dtype, value, eps, rng):
    """What shares a statistic with it is NaN (RMS norm of an infinity: 0, and NaN in its place), and nothing else."""
    norm, shape, _, strided = GEOMETRIES[geometry]
    x = rng.standard_normal(shape).astype(dtype)
    dy = in_layout(rng.standard_normal(shape).astype(dtype), strided)
    parameters = parameters_of(geometry, np.float64 if dtype == np.float64 else np.float32, rng)
    clean = run(normext, geometry, in_layout(x, strided), dy, parameters, eps=eps)
    x.flat[x.size // 2 + 1] = value
    results = run(normext, geometry, in_layout(x, strided), dy, parameters, eps=eps)
    with np.errstate(all="ignore"):
        wanted = run(reference, geometry, x.astype(np.float64), dy.astype(np.float64), parameters, eps=eps)
    for a, b in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert np.isnan(a).any() or a is results[-1]  # dbeta does not depend on x
    for a, before in zip(results[:2], clean, strict=False):
        kept = np.isfinite(a) & (a != 0)
        np.testing.assert_array_equal(a[kept], before[kept])
        assert norm == "rms" or not (a[np.isfinite(a)] == 0).all()


def test_one_far_gradient_leaves_its_neighbours(rng):
    x, dy = (rng.standard_normal((64, 30)).astype(np.float32) for _ in range(2))
    far = dy.copy()
    far[:, 7] += 1e6
    for columns in (True, False):
        a, b, c = (x, dy, far) if columns else (x.T.copy(), dy.T.copy(), far.T.copy())
        norm, backward = (
            (normext.batch_norm, normext.batch_norm_backward)
            if columns
            else (normext.layer_norm, normext.layer_norm_backward)
        )
        alone, together = (backward(g, norm(a)[1])[0] for g in (b, c))
        np.testing.assert_array_equal(np.delete(alone, 7, axis=columns * 1), np.delete(together, 7, axis=columns * 1))


@pytest.mark.parametrize("outlier", [0, 1e12, -1e30])
def test_an_outlier_among_the_first_gradients(outlier, rng):
    """It is one of the numbers that tell where the others are, at most."""
    for shape in ((5000, 3), (3, 5000)):
        x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        dy[:1, :1] = outlier
        norm = "batch" if shape[0] > shape[1] else "layer"
        cache = getattr(normext, norm + "_norm")(x, gamma=np.ones(shape[1], np.float32))[1]
        wanted = getattr(reference, norm + "_norm")(x.astype(np.float64), gamma=np.ones(shape[1]))[1]
        results = getattr(normext, norm + "_norm_backward")(dy, cache)[:2]
        assert worst(results, getattr(reference, norm + "_norm_backward")(dy.astype(np.float64), wanted)[:2]) <= 2e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("geometry", ["columns", "channels first", "channels last", "copied channels"])
def test_relu_gate_where_y_underflows(geometry, dtype, rng):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype)
    _, shape, options, strided = GEOMETRIES[geometry]
    least = 2.0**-24 if dtype == np.float16 else 2.0**-133
    x = in_layout(rng.standard_normal(shape).astype(dtype), strided)
    axis = options.get("axis", 1)
    gamma = np.full(shape[axis], least, np.float32)  # y is some of the smallest numbers, or half of one
    y, cache = normext.batch_norm(x, gamma, axis=axis, activation="relu")
    assert 0.6 < (np.asarray(y, np.float32) == 0).mean() < 0.8
    _, dgamma, _ = normext.batch_norm_backward(np.ones(shape, dtype), cache)
    _, channels, _ = normext.batch_norm_backward((np.asarray(y, np.float32) > 0).astype(dtype), cache)
    np.testing.assert_array_equal(dgamma, channels)
    beta = np.zeros(shape[axis], np.float32)
    y, cache = normext.batch_norm(x, gamma, beta, axis=axis, activation="relu")
    dbeta = normext.batch_norm_backward(np.ones(shape, dtype), cache)[2]
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    np.testing.assert_array_equal(dbeta, (np.asarray(y, np.float32) > 0).sum(others))


def test_one_channel_out_of_range_leaves_its_neighbours():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 20)).astype(np.float32)
    alone, _ = normext.batch_norm(x)
    x[:, 7] *= 1e30
    x[:, 11] = 0
    y, _ = normext.batch_norm(x)
    np.testing.assert_array_equal(np.delete(y, [7, 11], axis=1), np.delete(alone, [7, 11], axis=1))
    np.testing.assert_array_equal(y[:, 11], 0)


def test_copied_constant_channels():
    """Blocks of copies are merged here too; a mean of the first, times its scale, has no square."""
    for value in (0.125, 0, 1e-300, 1e300):
        x = in_layout(np.full((3, 2, 4), value), True)
        y, cache = normext.batch_norm(x)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_array_equal(cache.mean, value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [0.1, 1 / 3, -0.9, 1e-3, 1e-5, 1e-30])
def test_a_constant_gives_exactly_zero_however_its_mean_is_rounded(dtype, number):
    """Its deviations from the mean are 0 or an ulp, and no scale may make something of that."""
    for n in [*range(1, 40), 100, 1000, 4097]:
        for norm, shape, options in (
            ("batch_norm", (n, 3), {}),
            ("batch_norm", (2, 3, n), {}),
            ("batch_norm", (n, 3, 2), {"axis": 0}),
            ("layer_norm", (3, n), {}),
            ("group_norm", (3, 4, n), {"num_groups": 2}),
            ("group_norm", (3, n, 4), {"num_groups": 2, "axis": -1}),
            ("group_norm", (3, n), {"num_groups": 1}),
            ("instance_norm", (3, 4, n), {}),
        ):
            x = np.full(shape, number, dtype)
            for constant in (x, np.repeat(x, 2, -1)[..., ::2]):
                for eps in (0.0, 1e-5):
                    y, _ = getattr(normext, norm)(constant, eps=eps, **options)
                    assert not y.any(), (norm, shape, eps)
