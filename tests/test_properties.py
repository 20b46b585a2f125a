"""Properties of all norms, over shapes, strides, dtypes, axes, parameters and data drawn at random.

The default run is short. Thousands of cases each: ``python -m pytest tests/test_properties.py
--hypothesis-profile=thorough``.
"""

import contextlib
import json
import math
import os
import subprocess
import sys

import norm_cases
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from norm_cases import DTYPES, NORMS, Case, Layout, Placed, bits, forward_and_backward

import normext
from normext import reference
from normext._core.runtime import config

# The unit roundoff of what a case is computed in, and of what it is stored in if that is less exact.
COMPUTED = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
STORED = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0, "float64": 0}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 0}
ROUNDINGS = 16  # as many as an element may go through


# What is drawn ------------------------------------------------------------


@st.composite
def shapes(draw, min_dims=1, max_elements=20_000):
    """Small, with now and then a long axis: whole vectors and blocks, and remainders of them."""
    shape = list(draw(hnp.array_shapes(min_dims=min_dims, max_dims=4, max_side=7)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(shape) - 1))
        room = max(1, max_elements // (math.prod(shape) // shape[at]))
        shape[at] = draw(
            st.integers(1, room) | st.sampled_from([n for n in (16, 64, 65, 256, 257, 1000, 4099) if n <= room] or [1])
        )
    return tuple(shape)


SMALL_SHAPES = shapes()


@st.composite
def large_shapes(draw):
    """Of up to a quarter of a million numbers, which several threads share; few or many rows, channels and pixels."""
    elements = int(2 ** draw(st.floats(16.5, 18)))
    pixels = draw(st.sampled_from([(), (1,), (3,), (49,), (7, 7), (60, 60)]))
    channels = int(2 ** draw(st.floats(0, math.log2(elements / math.prod(pixels)))))
    return (elements // math.prod(pixels) // channels, channels, *pixels)


@st.composite
def cases(draw, shapes=SMALL_SHAPES, norms=NORMS, dtypes=tuple(DTYPES), max_groups=10**6, **fixed):
    norm = draw(st.sampled_from(norms))
    grouped = norm in ("group_norm", "instance_norm")
    shape = draw(shapes)
    if grouped and len(shape) == 1:
        shape = (*shape, draw(st.integers(1, 7)))
    axis = draw(st.integers(1 if grouped else 0, len(shape) - 1))
    dtype = draw(st.sampled_from(dtypes))
    groups = 1
    if grouped:
        possible = [g for g in range(1, min(shape[axis], max_groups) + 1) if shape[axis] % g == 0]
        groups = draw(st.sampled_from(possible))
        norm = norm if shape[axis] <= max_groups else "group_norm"
    fields = {
        "gamma": draw(st.booleans()),
        "beta": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        "running": draw(st.booleans()),
        "unbiased": draw(st.booleans()),
        "training": draw(st.sampled_from([True, True, False])),
        "relu": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "kind": draw(st.sampled_from(["normal", "padded", "lattice", "constant"])),
        "offset": draw(st.sampled_from([0.0, 1.0, -3.0, 100.0, 1e4])),
        "scale": draw(st.sampled_from([1.0, 0.01, 30.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return Case(norm, shape, axis, dtype, groups, **fields | fixed)


@st.composite
def layouts(draw, ndim, dtype):
    if draw(st.booleans()):
        return Layout.plain(ndim, shift=dtype.itemsize * draw(st.integers(0, 16)))
    return Layout(
        tuple(draw(st.permutations(range(ndim)))),
        tuple(draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in range(ndim)),
        draw(st.integers(0, 64)),
        # The dtype of ml_dtypes has one order only.
        dtype.kind == "f" and draw(st.sampled_from([False, False, True])),
    )


# The twin ------------------------------------------------------------


def widest(a):
    return a.astype(np.float64).astype(np.longdouble)


def expected(case, arrays, x):
    """What the twin makes of it in the widest type, and how far from it rounding may lead, element by element."""
    wide = {name: widest(a) for name, a in arrays.items()} | {"x": widest(x)}
    plain = case._replace(residual=False)  # x is the sum already
    parameters = {name: wide[name].copy() for name in ("running_mean", "running_var")}
    wanted = forward_and_backward(plain, wide | parameters, reference)
    bare = plain._replace(gamma=False, beta=False, relu=False)
    xhat = forward_and_backward(bare, wide | {name: wide[name].copy() for name in parameters}, reference)["y"]
    wanted |= {name: parameters[name] for name in parameters if case.norm == "batch_norm" and case.running}

    def repeated(parameter):
        if case.norm in ("layer_norm", "rms_norm"):
            return parameter
        return parameter.reshape([-1 if i == case.axis else 1 for i in range(x.ndim)])

    def mean(a):
        numbers = case.statistics(a)
        return case.put_back(np.repeat(numbers.mean(1, keepdims=True), numbers.shape[1], 1))

    ones = np.ones(x.shape, np.longdouble)
    gamma = abs(repeated(wide["gamma"])) if case.gamma else ones
    beta = abs(repeated(wide["beta"])) if "beta" in case.arguments(wide) else 0 * ones
    numbers = case.statistics(ones)
    rstd, centre = (
        case.put_back(np.repeat(wanted[name].reshape(-1, 1), numbers.shape[1], 1)) for name in ("rstd", "mean")
    )
    dy = abs(wide["dy"])
    if case.relu and case.norm == "batch_norm":
        before = forward_and_backward(
            plain._replace(relu=False), wide | {n: wide[n].copy() for n in parameters}, reference
        )
        dy = dy * (before["y"] > 0)
    unit = ROUNDINGS * COMPUTED[case.dtype]
    # Of xhat: its own roundings, and that of a mean in float64.
    slack = unit * (abs(xhat) + 1) + ROUNDINGS * 2.0**-53 * abs(centre) * rstd
    terms = gamma * dy
    if case.training or case.norm != "batch_norm":
        terms = terms + mean(gamma * dy) + (abs(xhat) + slack / unit) * mean(gamma * dy * (abs(xhat) + slack / unit))
    sums = (
        tuple(i for i in range(x.ndim) if i < case.axis)
        if case.norm in ("layer_norm", "rms_norm")
        else tuple(i for i in range(x.ndim) if i != case.axis)
    )
    bounds = {
        "y": gamma * slack + unit * beta,
        "dx": unit * rstd * terms,
        "dgamma": (dy * (unit * abs(xhat) + slack)).sum(sums),
        "dbeta": unit * dy.sum(sums),
    }
    if case.fused:
        wanted["dx"] = wanted["dx"] + wide["dsum"]
        bounds["dx"] = bounds["dx"] + unit * abs(wide["dsum"])
    for name in ("y", "dx"):
        bounds[name] = bounds[name] + STORED[case.dtype] * (abs(wanted[name]) + bounds[name]) + SMALLEST[case.dtype]
    for name in ("running_mean", "running_var"):
        if name in wanted:
            bounds[name] = (unit + np.finfo(arrays[name].dtype).eps) * (abs(wanted[name]) + 2.0**-100)
            if name == "running_mean":  # whose terms may cancel
                bounds[name] += unit * (abs(wanted["mean"]) + abs(wide[name]))
    return wanted, bounds, None if not case.relu else before["y"] if case.norm == "batch_norm" else None


@given(data=st.data())
def test_equal_to_the_twin_and_no_byte_elsewhere_is_touched(data):
    """Whatever the shape, the dtype, the layout and the options, new results or `out`, in place or not."""
    case = data.draw(cases(), "case")
    dtype, ndim = DTYPES[case.dtype], len(case.shape)
    if case.dtype == "float16":
        case = case._replace(offset=min(case.offset, 100.0))
    arrays = case.draw()
    inputs = ["x", "dy"] + ["residual", "dsum"] * case.fused
    placed = {name: Placed(arrays[name], data.draw(layouts(ndim, dtype), name)) for name in inputs}
    for name in ("gamma", "beta"):
        at = data.draw(layouts(arrays[name].ndim, arrays[name].dtype), name)
        placed[name] = Placed(arrays[name], at)
    for name in ("running_mean", "running_var"):
        kind = np.dtype(data.draw(st.sampled_from([np.float32, np.float64])))
        placed[name] = Placed(arrays[name].astype(kind), data.draw(layouts(1, kind), name))
    arrays = {
        name: a.astype(placed[name].array.dtype.newbyteorder("=")) if name in placed else a
        for name, a in arrays.items()
    }
    x = arrays["x"] + arrays["residual"] if case.fused else arrays["x"]
    assume(np.isfinite(x.astype(np.float64)).all())
    wanted, bounds, before_relu = expected(case, arrays, x)
    if before_relu is not None:  # near 0 a rounding decides whether dy counts
        sure = abs(before_relu) > 2 * bounds["y"]
        arrays["dy"] = arrays["dy"] * sure.astype(dtype)
        placed["dy"] = Placed(arrays["dy"], placed["dy"].layout)
        wanted, bounds, _ = expected(case, arrays, x)

    outs, overwritten = {}, set()
    for name, over in (("out", "x"), ("dx_out", "dy")):
        where = data.draw(st.sampled_from(["new", "out", over]), name)
        if where == "out":
            placed[name] = Placed(np.zeros(case.shape, dtype), data.draw(layouts(ndim, dtype), name))
            outs[name] = placed[name].array
            overwritten.add(name)
        elif where == over and (case.fused or over == "dy"):
            outs[name] = placed[over].array
            overwritten.add(over)
    if case.norm == "batch_norm" and case.training and case.running:
        overwritten |= {"running_mean", "running_var"}

    views = {name: placed[name].array if name in placed else a for name, a in arrays.items()}
    with normext.threads(data.draw(st.integers(1, 8), "threads")):
        results = forward_and_backward(case, views, **outs)

    for name, place in placed.items():
        assert place.intact(elements_too=name not in overwritten), name
    if case.fused:
        np.testing.assert_array_equal(results["sum"], x)
    assert results["y"].dtype.newbyteorder("=") == results["dx"].dtype.newbyteorder("=") == dtype
    results |= {name: views[name] for name in ("running_mean", "running_var")}
    for name in bounds.keys() & wanted.keys():
        assert results[name].shape == wanted[name].shape
        error = abs(widest(results[name]) - wanted[name])
        assert (error <= bounds[name]).all(), (name, float((error / bounds[name]).max()))


# Invariances ------------------------------------------------------------


def run(case, arrays):
    return forward_and_backward(case, arrays | {n: arrays[n].copy() for n in ("running_mean", "running_var")})


def eighths(case, **others):
    """A case whose numbers are eighths, few bits of a float32, so that sums and products of them are exact."""
    return case._replace(kind="lattice", offset=0.0, scale=1.0, residual=False, **others)


def spread_of(case, x):
    """Each statistic's variance."""
    return case.statistics(x.astype(np.float64)).var(1)


@given(case=cases(dtypes=("float32", "float64"), training=True, eps=0.0), power=st.integers(-20, 20))
def test_scaling_x_by_a_power_of_two_changes_no_bit_of_y(case, power):
    """And scales dx by its inverse: all that a norm does with x then happens to the same digits."""
    case = eighths(case)
    arrays = case.draw()
    assume((spread_of(case, arrays["x"]) > 0).all())
    results, scaled = (run(case, arrays | {"x": arrays["x"] * arrays["x"].dtype.type(f)}) for f in (1, 2.0**power))
    for name in ("y", "dgamma", "dbeta"):
        if name in results:
            np.testing.assert_array_equal(scaled[name], results[name])
    np.testing.assert_array_equal(scaled["dx"] * results["dx"].dtype.type(2.0**power), results["dx"])


@given(case=cases(dtypes=("float32", "float64"), training=True, running=False), shift=st.integers(-(10**5), 10**5))
def test_shifting_x_changes_nothing(case, shift):
    assume(case.norm != "rms_norm")
    case = eighths(case, eps=1e-3, relu=False)
    arrays = case.draw()
    moved = arrays | {"x": arrays["x"] + arrays["x"].dtype.type(shift)}
    wanted, bounds, _ = expected(case, arrays, arrays["x"])
    here, there = run(case, arrays), run(case, moved)
    # What float64 knows of a mean so far away, through xhat into all that depends on it.
    drift = 2.0**-50 * abs(shift) / math.sqrt(case.eps) / COMPUTED[case.dtype]
    for name, bound in bounds.items():
        if name in here:
            assert (abs(there[name] - here[name]) <= 2 * (1 + drift) * bound).all(), name


@given(case=cases(dtypes=tuple(DTYPES)), order_seed=st.integers(0, 2**32 - 1))
def test_each_statistic_is_on_its_own(case, order_seed):
    """Rows of layer and RMS norm, examples of group norm, channels of batch norm: in another order, the same bits."""
    arrays = case.draw()
    along = case.axis if case.norm == "batch_norm" else 0
    if along == case.axis and case.norm in ("layer_norm", "rms_norm"):
        assume(False)  # one row
    order = np.random.default_rng(order_seed).permutation(case.shape[along])
    permuted = {name: a.take(order, along) if a.shape == case.shape else a for name, a in arrays.items()}
    if case.norm == "batch_norm":
        for name in ("gamma", "beta", "running_mean", "running_var"):
            permuted[name] = arrays[name][order]
    results, others = run(case, arrays), run(case, permuted)
    for name in ("y", "dx"):
        np.testing.assert_array_equal(others[name], results[name].take(order, along))
    if case.norm == "batch_norm":
        for name in {"dgamma", "dbeta"} & results.keys():
            np.testing.assert_array_equal(others[name], results[name][order])


@given(case=cases(norms=("batch_norm",), dtypes=("float32", "float64"), shapes=shapes(min_dims=2)), data=st.data())
def test_batch_statistics_do_not_depend_on_the_order_or_the_batches(case, data):
    """Of all examples at once, of them in another order, and of batches merged by `population_stats`."""
    case = case._replace(axis=len(case.shape) - 1, training=True, kind="normal")
    arrays = case.draw()
    x, channels = arrays["x"], case.shape[-1]
    assume(x.size > channels)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(x) - 1)), max_size=5)) & set(range(1, len(x))))
    whole, merged = (normext.BatchNorm(channels, axis=-1, momentum=0.0, dtype=np.float64) for _ in range(2))
    whole(x)
    normext.population_stats(merged, np.split(x, cuts))
    unit = ROUNDINGS * COMPUTED[case.dtype]
    mean_drift = ROUNDINGS * 2.0**-53 * abs(case.offset)
    np.testing.assert_allclose(merged.running_mean, whole.running_mean, rtol=unit, atol=unit * case.scale + mean_drift)
    np.testing.assert_allclose(
        merged.running_var, whole.running_var, rtol=unit, atol=(unit * case.scale + mean_drift) * case.scale
    )
    order = np.random.default_rng(case.seed).permutation(len(x))
    y, _ = normext.batch_norm(x, axis=-1, eps=1.0)
    y_other, _ = normext.batch_norm(x[order], axis=-1, eps=1.0)
    np.testing.assert_allclose(y_other, y[order], rtol=unit, atol=unit + mean_drift)


@given(case=cases(dtypes=("float32", "float64"), training=True, running=False, residual=False))
def test_dx_is_orthogonal_to_what_changes_nothing(case):
    """y stays when all x of a statistic move together (not RMS norm's) or, without an eps, grow together."""
    case = case._replace(eps=0.0, kind="normal", relu=False)
    arrays = case.draw()
    assume(case.statistics(arrays["x"]).shape[1] > 1)
    assume((spread_of(case, arrays["x"]) > 1e-6 * case.scale**2).all())
    results = run(case, arrays)
    wide = {name: widest(arrays[name]) for name in ("x", "gamma", "beta", "running_mean", "running_var", "dy", "dsum")}
    xhat = case.statistics(forward_and_backward(case._replace(gamma=False, beta=False), wide, reference)["y"])
    _, bounds, _ = expected(case, arrays, arrays["x"])
    dx, bound = case.statistics(widest(results["dx"])), case.statistics(bounds["dx"])
    if case.norm != "rms_norm":
        assert (abs(dx.sum(1)) <= bound.sum(1)).all()
    assert (abs((dx * xhat).sum(1)) <= (bound * abs(xhat)).sum(1)).all()


# Bits ------------------------------------------------------------


@given(case=cases(shapes=large_shapes(), max_groups=32), data=st.data())
def test_bits_depend_on_nothing_but_the_numbers(case, data):
    """Not on the number of threads, nor on the run, nor on `out`, nor on where arrays lie in memory."""
    arrays = case.draw()
    with normext.threads(1):
        alone = bits(case, arrays)
    for threads in data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=2), "threads"):
        elsewhere = dict(arrays)
        for name in ("x", "dy", "residual", "dsum"):
            shift = data.draw(st.integers(0, 40), f"shift of {name}") * arrays[name].itemsize
            elsewhere[name] = Placed(arrays[name], Layout.plain(len(case.shape), shift)).array
        outs = {}
        for name in ("out", "dx_out"):
            if data.draw(st.booleans(), name):
                shift = data.draw(st.integers(0, 40)) * arrays["x"].itemsize
                empty = np.empty(case.shape, arrays["x"].dtype)
                outs[name] = Placed(empty, Layout.plain(len(case.shape), shift)).array
        with normext.threads(threads):
            assert bits(case, elsewhere, **outs) == alone


@pytest.fixture(scope="module")
def instruction_sets():
    """A function that gives the digests of a case's results on AVX2 and AVX-512."""
    names = ("avx2", "avx512")
    if not set(names) <= set(config()["supported here"]):
        pytest.skip("needs AVX-512 beside AVX2")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, norm_cases.__file__],
                    env=os.environ | {"NORMEXT_ISA": name},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for name in names
        ]

        def digests(case):
            for process in processes:
                process.stdin.write(json.dumps(case._asdict()) + "\n")
                process.stdin.flush()
            return [process.stdout.readline() for process in processes]

        yield digests
        for process in processes:
            process.stdin.close()


@given(case=cases() | cases(shapes=large_shapes(), max_groups=32))
def test_bits_do_not_depend_on_avx2_or_avx512(case, instruction_sets):
    avx2, avx512 = instruction_sets(case)
    assert avx2 == avx512 and len(avx2) == 65


# Windows ------------------------------------------------------------


@given(data=st.data())
def test_windows_are_adjoint_and_write_nowhere_else(data):
    dtype = np.dtype(data.draw(st.sampled_from([np.float32, np.float64])))
    shape = data.draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=9))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = (data.draw(pair, name) for name in ("kernel", "stride", "dilation"))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), "padding")
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(shape[2:], padding, dilation, kernel)))
    options = dict(stride=stride, padding=padding, dilation=dilation)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def placed(a):
        return Placed(a, Layout.plain(a.ndim, data.draw(st.integers(0, 9)) * dtype.itemsize))

    x = placed(rng.standard_normal(shape).astype(dtype))
    like = normext.im2col(x.array, kernel, **options)
    cols, out, back = placed(rng.standard_normal(like.shape).astype(dtype)), placed(like * 0), placed(x.array * 0)
    assert normext.im2col(x.array, kernel, out=out.array, **options) is out.array
    np.testing.assert_array_equal(out.array, like)
    normext.col2im(cols.array, shape, kernel, out=back.array, **options)
    assert all(place.intact(place in (x, cols)) for place in (x, cols, out, back))
    terms = widest(like) * widest(cols.array)
    limit = 64 * COMPUTED[dtype.name] * (abs(terms).sum() + 1)
    assert abs(terms.sum() - (widest(x.array) * widest(back.array)).sum()) <= limit


# Anything at all ------------------------------------------------------------

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=2),
    st.lists(st.floats(width=32), max_size=3),
    hnp.arrays(
        hnp.scalar_dtypes() | st.sampled_from([np.dtype(object), np.dtype("f4,f8")]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        fill=st.nothing(),
    ),
    st.builds(
        lambda dtype, shape: np.ones(shape, dtype), st.sampled_from(list(DTYPES.values())), hnp.array_shapes(min_side=0)
    ),
)
OPTIONS = ["gamma", "beta", "axis", "eps", "out", "num_groups", "residual", "running_mean", "running_var", "training"]


@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_anything_at_all_gives_a_result_or_an_error_that_tells(data):
    """Numbers of any kind, objects that are none, empty arrays: no crash, and no exception but the documented ones."""
    norm = data.draw(st.sampled_from(NORMS))
    options = data.draw(st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, max_size=3))
    with contextlib.suppress(TypeError, ValueError):
        y, *_, cache = getattr(normext, norm)(data.draw(ANYTHING), **options)
        getattr(normext, norm + "_backward")(data.draw(st.just(y) | ANYTHING), cache)
