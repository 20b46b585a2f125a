"""Batch and layer norm against the NumPy twin, over shapes, layouts and options; and what they promise at the edges."""

import doctest
import itertools
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from odd_inputs import LAYOUTS

import normext
import normext._core.arrays
import normext._core.runtime
import normext.functional
from normext import reference
from normext._core.arrays import Norm
from normext.gradcheck import numerical_gradient, relative_error

# A few roundings of the type, over the largest number in an array.
LIMIT = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-12}

# Shape and channel axis: both geometries; one block, several, and several parts; vectors full and not.
BATCH_SHAPES = [
    ((5, 4), 1),
    ((50, 100), 1),
    ((300, 3), 1),
    ((1, 4), 1),
    ((7,), 0),
    ((6, 1), 1),
    ((130, 1030), 1),
    ((4, 20000), 1),
    ((70000, 2), 1),
    ((2000, 70), 1),
    ((3, 7, 5, 6), 1),
    ((3, 5, 6, 7), -1),
    ((100, 3, 7, 7), 1),
    ((8, 3, 100, 100), 1),
    ((2, 2, 200, 200), 0),
]
# Shape and first normalized axis.
LAYER_SHAPES = [
    ((5, 4), 1),
    ((50, 100), -1),
    ((7,), 0),
    ((6, 1), 1),
    ((1, 1), 1),
    ((3, 7, 5, 6), 1),
    ((3, 7, 5, 6), -1),
    ((3, 4, 5), 0),
    ((5000, 3), 1),
    ((2000, 64), 1),
    ((600, 700), 1),
    ((40, 3000), 1),
    ((3, 70000), 1),
    ((1, 300000), 1),
]
# Shape, channel axis, number of groups.
GROUP_SHAPES = [
    ((4, 12), 1, 3),
    ((3, 8, 5, 7), 1, 4),
    ((3, 5, 7, 8), -1, 2),
    ((2, 4, 9), 1, 1),
    ((2, 4, 9), 1, 4),
    ((1, 2, 300, 300), 1, 1),
    ((300, 6, 5, 5), 1, 3),
    ((2, 3, 4, 5, 6), 1, 3),
    ((2, 5, 6, 4), 2, 3),
    ((300, 32), 1, 4),
    ((5, 6), 1, 6),
    ((40, 1, 1, 60), -1, 3),
    ((4, 7, 3, 40), -1, 10),
    ((2, 9, 8, 1200), -1, 2),
    ((2, 150, 7, 1030), -1, 1030),
    ((3, 300, 300, 5), -1, 1),
]


def float64(a):
    return None if a is None else np.asarray(a, np.float64)


def assert_same(ours, twins, dtype, limit=None):
    for our, twin in zip(ours, twins, strict=True):
        if twin is None:
            assert our is None
        else:
            assert our.dtype == dtype
            assert our.shape == twin.shape
            assert relative_error(our, twin) <= (limit or LIMIT[np.dtype(dtype)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), BATCH_SHAPES)
def test_batch_norm_equals_twin(rng, shape, axis, dtype):
    for with_gamma, with_beta, training in itertools.product((True, False), repeat=3):
        channels = shape[axis]
        x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        gamma = rng.normal(size=channels).astype(dtype) if with_gamma else None
        beta = rng.normal(size=channels).astype(dtype) if with_beta else None
        ours = dict(running_mean=rng.normal(size=channels), running_var=rng.uniform(0.5, 2, channels))
        if training and x.size == channels:  # one number has no variance to learn from
            ours = {}
        twins = {name: r.copy() for name, r in ours.items()}
        options = dict(training=training, momentum=0.8, eps=1e-3, axis=axis)
        y, cache = normext.batch_norm(x, gamma, beta, **ours, **options)
        y_twin, cache_twin = reference.batch_norm(float64(x), float64(gamma), float64(beta), **twins, **options)
        assert_same([y], [y_twin], dtype)
        assert_same(ours.values(), twins.values(), np.float64, LIMIT[x.dtype])
        assert_same(
            normext.batch_norm_backward(dy, cache),
            reference.batch_norm_backward(float64(dy), cache_twin),
            dtype,
            LIMIT[x.dtype],
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), LAYER_SHAPES)
def test_layer_norm_equals_twin(rng, shape, axis, dtype):
    for with_gamma, with_beta in itertools.product((True, False), repeat=2):
        x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        gamma = rng.normal(size=shape[axis:]).astype(dtype) if with_gamma else None
        beta = rng.normal(size=shape[axis:]).astype(dtype) if with_beta else None
        y, cache = normext.layer_norm(x, gamma, beta, axis=axis, eps=1e-3)
        y_twin, cache_twin = reference.layer_norm(float64(x), float64(gamma), float64(beta), axis=axis, eps=1e-3)
        assert_same([y], [y_twin], dtype)
        assert_same(
            normext.layer_norm_backward(dy, cache), reference.layer_norm_backward(float64(dy), cache_twin), dtype
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis", "num_groups"), GROUP_SHAPES)
def test_group_norm_equals_twin(rng, shape, axis, num_groups, dtype):
    for with_gamma, with_beta in itertools.product((True, False), repeat=2):
        x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        gamma = rng.normal(size=shape[axis]).astype(dtype) if with_gamma else None
        beta = rng.normal(size=shape[axis]).astype(dtype) if with_beta else None
        y, cache = normext.group_norm(x, num_groups, gamma, beta, axis=axis, eps=1e-3)
        y_twin, cache_twin = reference.group_norm(
            float64(x), num_groups, float64(gamma), float64(beta), axis=axis, eps=1e-3
        )
        assert_same([y], [y_twin], dtype)
        assert_same(
            normext.group_norm_backward(dy, cache), reference.group_norm_backward(float64(dy), cache_twin), dtype
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# Not for rows of one number: there xhat is 1 but for eps, and what is left of dx is what a cancellation leaves.
@pytest.mark.parametrize(("shape", "axis"), [case for case in LAYER_SHAPES if np.prod(case[0][case[1] :]) > 1])
def test_rms_norm_equals_twin(rng, shape, axis, dtype):
    for with_gamma in (True, False):
        x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        gamma = rng.normal(size=shape[axis:]).astype(dtype) if with_gamma else None
        y, cache = normext.rms_norm(x, gamma, axis=axis, eps=1e-3)
        y_twin, cache_twin = reference.rms_norm(float64(x), float64(gamma), axis=axis, eps=1e-3)
        assert_same([y], [y_twin], dtype)
        assert_same(normext.rms_norm_backward(dy, cache), reference.rms_norm_backward(float64(dy), cache_twin), dtype)


# Fusions ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), BATCH_SHAPES)
def test_relu_after_batch_norm_equals_twin(rng, shape, axis, dtype):
    for with_parameters, training in itertools.product((True, False), repeat=2):
        channels = shape[axis]
        x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
        gamma, beta = rng.normal(size=(2, channels)).astype(dtype) if with_parameters else (None, None)
        running = dict(running_mean=rng.normal(size=channels), running_var=rng.uniform(0.5, 2, channels))
        options = dict(training=training, axis=axis, activation="relu", **(running if not training else {}))
        y, cache = normext.batch_norm(x, gamma, beta, **options)
        y_twin, cache_twin = reference.batch_norm(float64(x), float64(gamma), float64(beta), **options)
        assert cache.activation == "relu"
        assert_same([y], [y_twin], dtype)
        # Where the twin's y is a rounding from 0, the mask may differ from ours.
        sure = np.abs(reference.batch_norm(x, gamma, beta, **{**options, "activation": None})[0]) > 1e-4
        dy *= sure
        assert_same(
            normext.batch_norm_backward(dy, cache), reference.batch_norm_backward(float64(dy), cache_twin), dtype
        )


def test_relu_mask_is_that_of_the_forward_pass(rng):
    """Bit by bit, also where y is a rounding away from 0 and in 16-bit storage."""
    for dtype, shape in itertools.product((np.float16, np.float32, np.float64), ((500, 40), (30, 7, 9, 9))):
        x = rng.normal(3, 2, shape).astype(dtype)
        centre = x.mean(axis=(0, *range(2, x.ndim)), dtype=np.float64)
        running = dict(running_mean=centre, running_var=np.full(shape[1], 1e-4))
        x[0] = (centre.reshape(-1, *[1] * (x.ndim - 2)) + rng.normal(0, 1e-7, shape[1:])).astype(dtype)
        y, cache = normext.batch_norm(x, training=False, activation="relu", **running)
        plain, _ = normext.batch_norm(x, training=False, **running)
        np.testing.assert_array_equal(y, np.maximum(plain, 0))
        dx, *_ = normext.batch_norm_backward(np.ones_like(x), cache)
        if dtype != np.float16:  # a float16 y may be 0 for underflow
            np.testing.assert_array_equal(dx != 0, y > 0)


def test_relu_lets_nan_through():
    for shape in ((4, 3), (4, 3, 5, 5)):
        x = np.ones(shape)
        x[0, 1] = np.nan
        y, _ = normext.batch_norm(x, activation="relu")
        assert np.isnan(y[:, 1]).all() and not np.isnan(y[:, [0, 2]]).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), LAYER_SHAPES)
def test_residual_equals_addition_before(rng, shape, axis, dtype):
    x, residual, dy, dsum = (rng.normal(1, 2, shape).astype(dtype) for _ in range(4))
    gamma = rng.normal(size=shape[axis:])
    for norm in ("layer_norm", "rms_norm"):
        forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
        y, total, cache = forward(x, gamma, axis=axis, residual=residual)
        y_plain, cache_plain = forward(x + residual, gamma, axis=axis)
        assert cache.x is total
        np.testing.assert_array_equal(total, x + residual)
        np.testing.assert_array_equal(y, y_plain)
        dx, dgamma, *_ = backward(dy, cache, dsum=dsum)
        dx_plain, dgamma_plain, *_ = backward(dy, cache_plain)
        np.testing.assert_array_equal(dgamma, dgamma_plain)
        two_roundings = {np.dtype(np.float16): 2e-3}.get(x.dtype, LIMIT.get(x.dtype))
        assert relative_error(dx, float64(dx_plain) + dsum) < two_roundings


def test_residual_and_twin(rng):
    x, residual, dy, dsum = rng.normal(size=(4, 20, 30))
    gamma = rng.normal(size=30)
    for norm in ("layer_norm", "rms_norm"):
        ours = getattr(normext, norm)(x, gamma, residual=residual)
        twins = getattr(reference, norm)(x, gamma, residual=residual)
        assert_same(ours[:2], twins[:2], x.dtype)
        assert_same(
            getattr(normext, norm + "_backward")(dy, ours[2], dsum=dsum),
            getattr(reference, norm + "_backward")(dy, twins[2], dsum=dsum),
            x.dtype,
        )


def test_residual_leaves_a_backward_pass_after_writing_over_x(rng):
    x, residual, dy = rng.normal(size=(3, 100, 20))
    y, total, cache = normext.layer_norm(x.copy(), residual=residual)
    inside = x.copy()
    y_inside, total_inside, cache_inside = normext.layer_norm(inside, residual=residual, out=inside)
    assert y_inside is inside
    np.testing.assert_array_equal(y_inside, y)
    np.testing.assert_array_equal(total_inside, total)
    np.testing.assert_array_equal(
        normext.layer_norm_backward(dy, cache_inside)[0], normext.layer_norm_backward(dy, cache)[0]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: normext.batch_norm(x, activation="gelu"), "activation must be 'relu' or None, got 'gelu'"),
        (lambda x: normext.layer_norm(x, residual=x[1:]), r"residual must have the shape of x, \(4, 3\), got \(3, 3\)"),
        (lambda x: normext.layer_norm(x, residual=x, out=x), "out must share no memory with residual"),
        (
            lambda x: normext.layer_norm_backward(x, normext.layer_norm(x)[1], dsum=x.T),
            r"dsum must have the shape of x, \(4, 3\), got \(3, 4\)",
        ),
        (
            lambda x: normext.layer_norm_backward(x, normext.layer_norm(x.copy())[1], dsum=x[:], out=x),
            "out must share no memory with dsum",
        ),
    ],
)
def test_bad_fusion_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("axis", [1, -1])
def test_instance_norm_equals_twin(rng, axis):
    x, dy = rng.normal(3, 2, (4, 6, 5, 7)), rng.normal(size=(4, 6, 5, 7))
    gamma, beta = rng.normal(size=(2, x.shape[axis]))
    y, cache = normext.instance_norm(x, gamma, beta, axis=axis)
    y_twin, cache_twin = reference.instance_norm(x, gamma, beta, axis=axis)
    assert_same([y], [y_twin], x.dtype)
    assert_same(normext.instance_norm_backward(dy, cache), reference.instance_norm_backward(dy, cache_twin), x.dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 64), (300, 500), (4, 6, 20, 20), (50_000, 3)])
def test_16_bit_storage(rng, shape, dtype):
    """What float32 gives for the same numbers, rounded once to the storage type."""
    dtype = np.dtype(np.float16 if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    for norm in ("batch_norm", "layer_norm", "rms_norm"):
        gamma = rng.normal(size=shape[1] if norm == "batch_norm" else shape[-1])
        forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
        for parameter_dtype in (dtype, np.float32):
            parameter = gamma.astype(parameter_dtype)
            y, cache = forward(x, parameter)
            y32, cache32 = forward(x.astype(np.float32), parameter.astype(np.float32))
            dx, dgamma, *_ = backward(dy, cache)
            dx32, dgamma32, *_ = backward(dy.astype(np.float32), cache32)
            assert y.dtype == dx.dtype == dtype and dgamma.dtype == np.float32
            # Blocks differ from those of float32, and so, rarely, does the last bit before that rounding.
            assert np.mean(y != y32.astype(dtype)) < 1e-3
            assert np.mean(dx != dx32.astype(dtype)) < 1e-3
            assert relative_error(y.astype(float), y32) < float(2.0**-8 if dtype.name == "bfloat16" else 2.0**-11)
            assert relative_error(dgamma, dgamma32) < 1e-6


def test_bad_group_norm_arguments():
    x = np.ones((2, 6, 4))
    for arguments, error, message in (
        ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels, got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must divide the 6 channels, got 0"),
        ({"num_groups": 1.5}, TypeError, "num_groups must be an integer"),
        ({"num_groups": 2, "axis": 0}, ValueError, "axis must not be 0"),
        ({"num_groups": 2, "gamma": np.ones(4)}, ValueError, r"gamma must have shape \(6,\), got \(4,\)"),
    ):
        with pytest.raises(error, match=message):
            normext.group_norm(x, **arguments)
    with pytest.raises(ValueError, match="groups without numbers"):
        normext.group_norm(np.ones((2, 6, 0)), 2)
    y, cache = normext.group_norm(np.ones((0, 6, 4)), 2, np.ones(6))
    assert y.shape == (0, 6, 4)
    np.testing.assert_array_equal(normext.group_norm_backward(y, cache)[1], np.zeros(6))


def test_twin_gradients_three_ways(rng):
    x, gamma, beta, dy = (rng.normal(size=s) for s in ((6, 3, 4), 3, 3, (6, 3, 4)))
    _, cache = reference.batch_norm(x, gamma, beta)
    closed, staged = reference.batch_norm_backward(dy, cache), reference.batch_norm_backward_staged(dy, cache)
    numerical = [
        numerical_gradient(lambda x: reference.batch_norm(x, gamma, beta)[0], x, dy),
        numerical_gradient(lambda gamma: reference.batch_norm(x, gamma, beta)[0], gamma, dy),
        numerical_gradient(lambda beta: reference.batch_norm(x, gamma, beta)[0], beta, dy),
    ]
    for c, s, n in zip(closed, staged, numerical, strict=True):
        assert relative_error(c, s) < 1e-13
        assert relative_error(c, n) < 1e-8


def test_staged_twin_takes_the_compiled_cache(rng):
    x, gamma, dy = rng.normal(size=(20, 5)), rng.normal(size=5), rng.normal(size=(20, 5))
    _, cache = normext.batch_norm(x, gamma, np.zeros(5))
    assert_same(normext.batch_norm_backward(dy, cache), reference.batch_norm_backward_staged(dy, cache), np.float64)


# Layouts ------------------------------------------------------------


@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(40, 30), (6, 5, 4, 7), (5, 300, 120), (3, 100000)])
def test_layouts(rng, shape, layout, with_out):
    """Strides, byte order and alignment change a result by rounding at most; `out` may have a layout of its own."""
    x, dy = rng.normal(3, 2, shape), rng.normal(size=shape)
    x_, dy_ = LAYOUTS[layout](x.copy()), LAYOUTS[layout](dy.copy())
    np.testing.assert_array_equal(x_, x)
    for axis in (0, 1, -1):
        gamma, beta = rng.normal(size=shape[axis]), rng.normal(size=shape[axis])
        out = [
            np.full(shape, np.nan) if layout == "read-only" else LAYOUTS[layout](np.full(shape, np.nan))
            for _ in range(4)
        ]
        outs = [dict(out=o) if with_out else {} for o in out]
        statistics = dict(running_mean=rng.normal(size=shape[axis]), running_var=rng.uniform(0.5, 2, shape[axis]))
        for training in (True, False):
            twin, cache_twin = reference.batch_norm(x, gamma, beta, axis=axis, training=training, **statistics)
            y, cache = normext.batch_norm(x_, gamma, beta, axis=axis, training=training, **outs[0], **statistics)
            assert not with_out or y is out[0]
            assert relative_error(y, twin) < 1e-12
            gradients = normext.batch_norm_backward(dy_, cache, **outs[1])
            for our, other in zip(gradients, reference.batch_norm_backward(dy, cache_twin), strict=True):
                assert relative_error(our, other) < 1e-12
        if axis != 0:
            twin, cache_twin = reference.group_norm(x, 1, axis=axis)
            y, cache = normext.group_norm(x_, 1, axis=axis, **outs[0])
            assert relative_error(y, twin) < 1e-12
            gradients = normext.group_norm_backward(dy_, cache, **outs[1])
            assert relative_error(gradients[0], reference.group_norm_backward(dy, cache_twin)[0]) < 1e-12
        gamma, beta = rng.normal(size=shape[axis:]), rng.normal(size=shape[axis:])
        twin, cache_twin = reference.layer_norm(x, gamma, beta, axis=axis)
        y, cache = normext.layer_norm(x_, gamma, beta, axis=axis, **outs[2])
        assert relative_error(y, twin) < 1e-12
        gradients = normext.layer_norm_backward(dy_, cache, **outs[3])
        for our, other in zip(gradients, reference.layer_norm_backward(dy, cache_twin), strict=True):
            assert relative_error(our, other) < 1e-12


def test_result_of_swapped_bytes_is_native():
    y, _ = normext.layer_norm(np.arange(6.0).reshape(2, 3).astype(">f4"))
    assert y.dtype == np.dtype("=f4")


def test_broadcast_input():
    row = np.arange(4.0)
    y, _ = normext.batch_norm(np.broadcast_to(row, (9, 4)))
    np.testing.assert_array_equal(y, np.zeros((9, 4)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_and_axis_equals_twin(data):
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=9))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = data.draw(hnp.arrays(dtype, shape, elements=st.floats(-100, 100, width=32)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    dy = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    permutation = data.draw(st.permutations(range(len(shape))))
    # The same numbers, in another memory order.
    x_ = np.transpose(np.transpose(x, permutation).copy(), np.argsort(permutation))
    for norm in ("batch_norm", "layer_norm"):
        y, cache = getattr(normext, norm)(x_, eps=1.0, axis=axis)
        y_twin, cache_twin = getattr(reference, norm)(float64(x), eps=1.0, axis=axis)
        np.testing.assert_allclose(y, y_twin, rtol=LIMIT[x.dtype], atol=5 * LIMIT[x.dtype])
        dx = getattr(normext, norm + "_backward")(dy, cache)[0]
        dx_twin = getattr(reference, norm + "_backward")(float64(dy), cache_twin)[0]
        np.testing.assert_allclose(dx, dx_twin, rtol=LIMIT[x.dtype], atol=5 * LIMIT[x.dtype])


# Memory ------------------------------------------------------------


def peak_of(f, *args, **kwargs):
    tracemalloc.start()
    try:
        f(*args, **kwargs)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["C", "Fortran", "byte-swapped", "spread", "last axis reversed"])
def test_no_copy_of_x(rng, layout):
    """With `out` given, forward and backward need memory for channels, rows and a block, whatever the layout."""
    x = LAYOUTS[layout](rng.normal(size=(64, 256, 128)))
    out = np.empty_like(x)
    for norm, options in (
        ("batch_norm", {}),
        ("batch_norm", {"activation": "relu"}),
        ("layer_norm", {}),
        ("rms_norm", {"axis": 1}),
        ("group_norm", {"num_groups": 4}),
        ("group_norm", {"num_groups": 4, "axis": -1}),
        ("instance_norm", {}),
    ):
        forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
        assert peak_of(forward, x, out=out, **options) < x.nbytes // 8
        _, cache = forward(x, **options)
        assert peak_of(backward, x, cache, out=out) < x.nbytes // 8


def test_residual_needs_the_sum_and_no_more(rng):
    x = rng.normal(size=(2048, 1024))
    out = np.empty_like(x)
    assert peak_of(normext.layer_norm, x, residual=x, out=out) < 1.125 * x.nbytes
    _, _, cache = normext.layer_norm(x, residual=x)
    assert peak_of(normext.layer_norm_backward, x, cache, dsum=x, out=out) < x.nbytes // 8


def test_cache_refers_to_x(rng):
    x = rng.normal(size=(50, 20))
    for norm in (normext.batch_norm, normext.layer_norm):
        _, cache = norm(x)
        assert cache.x is x
        assert cache.mean.size + cache.rstd.size <= 2 * 50


# Running statistics ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8"])
def test_running_statistics_are_updated_in_place(rng, dtype):
    x = rng.normal(3, 2, (50, 4)).astype(np.float32)
    running_mean, running_var = np.zeros(8, dtype)[::2], np.ones(4, dtype)
    normext.batch_norm(x, running_mean=running_mean, running_var=running_var, momentum=0.75)
    np.testing.assert_allclose(running_mean, 0.25 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running_var, 0.75 + 0.25 * x.var(0), rtol=1e-5)


@pytest.mark.parametrize("shape, axis", [((50, 4), 1), ((50, 4, 3), 1), ((30_000, 4), 1), ((20, 4, 60, 60), 1)])
@pytest.mark.parametrize("kind", ["contiguous", "every second number"])
def test_the_running_variance_of_an_unbiased_estimate(rng, shape, axis, kind):
    x = rng.normal(3, 2, shape) if kind == "contiguous" else rng.normal(3, 2, (*shape, 2))[..., 0]
    results = {}
    for unbiased in (False, True):
        running_mean, running_var = np.zeros(4), np.ones(4)
        running = dict(running_mean=running_mean, running_var=running_var)
        y, _ = normext.batch_norm(x, **running, momentum=0.75, unbiased=unbiased, axis=axis)
        var = np.moveaxis(x, axis, -1).reshape(-1, 4).var(0, ddof=int(unbiased))
        np.testing.assert_allclose(running_var, 0.75 + 0.25 * var, rtol=1e-13)
        results[unbiased] = y, running_mean
    np.testing.assert_array_equal(results[True][0], results[False][0])  # normalized with the biased one
    np.testing.assert_array_equal(results[True][1], results[False][1])


def test_one_number_has_no_unbiased_estimate():
    running_var = np.ones(3)
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"more than one number a channel.*\(1, 3"):
            normext.batch_norm(np.zeros(shape), running_var=running_var, unbiased=True)
    np.testing.assert_array_equal(running_var, 1)
    normext.batch_norm(
        np.zeros((1, 3)), running_mean=np.zeros(3), running_var=running_var, training=False, unbiased=True
    )
    with pytest.raises(TypeError, match="unbiased"):
        normext.batch_norm(np.zeros((2, 3)), running_var=running_var, unbiased="yes")


def test_evaluation_leaves_running_statistics(rng):
    running = dict(running_mean=rng.normal(size=4), running_var=rng.uniform(1, 2, 4))
    before = {name: r.copy() for name, r in running.items()}
    for r in running.values():
        r.setflags(write=False)
    normext.batch_norm(rng.normal(size=(5, 4)), training=False, **running)
    for name in running:
        np.testing.assert_array_equal(running[name], before[name])


def test_gamma_of_integers(rng):
    x = rng.normal(size=(10, 3)).astype(np.float32)
    y, cache = normext.batch_norm(x, np.array([1, 2, 3]), [11, 12, 13])
    assert y.dtype == np.float32 and cache.gamma.dtype == np.float32
    np.testing.assert_allclose(y.mean(0), [11, 12, 13], rtol=1e-6)
    np.testing.assert_allclose(y.std(0), [1, 2, 3], rtol=1e-4)


def test_integer_x_is_taken_as_float64():
    y, _ = normext.layer_norm([[1, 3], [2, 6]], eps=0)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [[-1, 1], [-1, 1]])


# Edges ------------------------------------------------------------


def test_one_row_gives_beta_and_no_gradient(rng):
    for dtype in (np.float32, np.float64):
        x, gamma, beta, dy = (rng.normal(size=s).astype(dtype) for s in ((1, 70), 70, 70, (1, 70)))
        y, cache = normext.batch_norm(x, gamma, beta)
        np.testing.assert_array_equal(y, beta[None])
        dx, dgamma, dbeta = normext.batch_norm_backward(dy, cache)
        np.testing.assert_array_equal(dx, 0)
        np.testing.assert_array_equal(dgamma, 0)
        np.testing.assert_array_equal(dbeta, dy[0])


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype, power", [(np.float32, -60), (np.float32, 60), (np.float64, 600)])
def test_an_array_that_is_one_row_goes_backward_at_any_scale(norm, dtype, power, rng):
    """A scale that is a power of two changes exponents alone: y is the same, and dx has the inverse scale."""
    forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
    x, dy, gamma = rng.normal(1, 2, (3, 3, 4)).astype(dtype)
    y, cache = forward(x, gamma, axis=0, eps=0.0)
    dx, dgamma, *_ = backward(dy, cache)
    scale = dtype(2.0**power)
    scaled_y, cache = forward(scale * x, gamma, axis=0, eps=0.0)
    scaled_dx, scaled_dgamma, *_ = backward(dy, cache)
    np.testing.assert_array_equal(scaled_y, y)
    assert relative_error(scale * scaled_dx, dx) < LIMIT[np.dtype(dtype)]
    assert relative_error(scaled_dgamma, dgamma) < LIMIT[np.dtype(dtype)]


def test_empty_batch_in_evaluation():
    running = dict(running_mean=np.zeros(3), running_var=np.ones(3))
    y, cache = normext.batch_norm(np.empty((0, 3), np.float32), training=False, **running)
    assert y.shape == (0, 3) and y.dtype == np.float32
    y, cache = normext.batch_norm(np.empty((0, 3)), np.ones(3), np.ones(3), training=False, **running)
    dx, dgamma, dbeta = normext.batch_norm_backward(np.empty((0, 3)), cache)
    assert dx.shape == (0, 3)
    np.testing.assert_array_equal([dgamma, dbeta], np.zeros((2, 3)))


@pytest.mark.parametrize("shape, axis", [((0, 3), 1), ((3, 0), 0), ((2, 3, 0), 1), ((0, 3, 2, 2), 1), ((2, 0, 3), -1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_empty_arrays_of_every_layout(shape, axis, order):
    x = np.empty(shape, order=order)
    running_mean, running_var = np.ones(3), np.full(3, 4.0)
    out = np.empty(shape)
    y, cache = normext.batch_norm(
        x, running_mean=running_mean, running_var=running_var, training=False, eps=0, axis=axis, out=out
    )
    assert y is out
    np.testing.assert_array_equal([cache.mean, cache.rstd], [[1] * 3, [0.5] * 3])
    dx, _, _ = normext.batch_norm_backward(x, cache)
    assert dx.shape == shape


def test_layer_norm_of_no_rows():
    y, cache = normext.layer_norm(np.empty((0, 3)), np.ones(3))
    dx, dgamma, dbeta = normext.layer_norm_backward(y, cache)
    assert y.shape == dx.shape == (0, 3) and dbeta is None
    np.testing.assert_array_equal(dgamma, np.zeros(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row_or_column(rng, bad):
    for shape in ((300, 40), (300, 3), (20, 5000)):
        x = rng.normal(size=shape)
        x[7, 2] = bad
        others = np.arange(shape[1]) != 2
        y, cache = normext.batch_norm(x)
        assert np.isfinite(y[:, others]).all() and not np.isfinite(y[7, 2])
        dx = normext.batch_norm_backward(x[::-1].copy(), cache)[0]
        assert np.isfinite(dx[:, others]).all()
        others = np.arange(shape[0]) != 7
        y, cache = normext.layer_norm(x)
        assert np.isfinite(y[others]).all() and not np.isfinite(y[7, 2])
        dx = normext.layer_norm_backward(np.ones(shape), cache)[0]
        assert np.isfinite(dx[others]).all()


def test_infinity_in_evaluation_stays_where_it_is(rng):
    x = rng.normal(size=(50, 4))
    x[7, 2] = np.inf
    y, cache = normext.batch_norm(x, running_mean=np.zeros(4), running_var=np.ones(4), training=False)
    assert np.isfinite(y).sum() == y.size - 1
    assert np.isfinite(normext.batch_norm_backward(np.ones((50, 4)), cache)[0]).all()


# Short rows ------------------------------------------------------------


def short_rows(norm, dtype, rng, rows, n):
    """What a norm makes of rows, checked against the twin."""
    forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
    x, dy = (rng.normal(m, 1, (rows, n)).astype(dtype) for m in (3, 0))
    parameters = [rng.normal(1, 1, n).astype(dtype) for _ in range(1 + (norm == "layer_norm"))]
    y, cache = forward(x, *parameters)
    dx, *gradients = backward(dy, cache)
    twin, twin_cache = getattr(reference, norm)(*(a.astype(np.float64) for a in (x, *parameters)))
    wanted = getattr(reference, norm + "_backward")(dy.astype(np.float64), twin_cache)
    limit = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, twin, rtol=limit, atol=limit * (1 + np.abs(twin).max()))
    for ours, expected in zip((dx, *gradients), wanted, strict=True):
        # a row of one or two numbers has an rstd of any size
        scale = (np.abs(cache.rstd).max() if ours is dx else 1) * (1 + np.abs(dy).max()) * max(1, len(dy) ** 0.5)
        np.testing.assert_allclose(ours, expected, rtol=limit, atol=limit * scale)
    return forward, backward, x, dy, parameters, y, dx


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_short_rows_of_every_length(norm, dtype, rng):
    """As the twin; and a row has the same bits wherever it lies and whatever is beside it."""
    for n in range(1, 71):
        rows = int(rng.choice([1, 2, 31, 33, 65, 128, 129, 300]))
        forward, backward, x, dy, parameters, y, dx = short_rows(norm, dtype, rng, rows, n)
        some = rng.permutation(rows)[: rows // 2 + 1]
        room = np.zeros((2, len(some), n + 3), dtype)
        apart, dy_apart = room[:, :, 1 : n + 1]
        apart[...], dy_apart[...] = x[some], dy[some]
        kept = apart.copy()
        beside = [np.nan, np.inf, 0, np.finfo(dtype).max ** 0.65][n % 4]  # whose square is out of range
        if rows > 1:
            apart[0] = beside
        with np.errstate(invalid="ignore", over="ignore"):
            other, cache = forward(apart, *parameters)
            other_dx = backward(dy_apart, cache)[0]
        np.testing.assert_array_equal(other[rows > 1 :], y[some][rows > 1 :])
        if not 1 < beside < np.inf:  # with which dx is computed in float64
            np.testing.assert_array_equal(other_dx[rows > 1 :], dx[some][rows > 1 :])
        inside = forward(kept, *parameters, out=kept)[0]
        np.testing.assert_array_equal(inside, y[some])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_short_groups_wherever_they_lie(dtype, rng):
    for channels, groups, size in ((6, 6, (5, 5)), (6, 3, (5, 5)), (6, 6, (7, 7)), (6, 2, (3, 7))):
        shape = (23, channels, *size)
        x, dy = (rng.normal(m, 1, shape).astype(dtype) for m in (3, 0))
        gamma, beta = rng.normal(1, 1, (2, channels)).astype(dtype)
        y, cache = normext.group_norm(x, groups, gamma, beta)
        dx, *gradients = normext.group_norm_backward(dy, cache)
        apart, dy_apart = np.zeros((2, 23, channels, 2, *size), dtype)[:, :, :, 0]
        apart[...], dy_apart[...] = x, dy
        other, cache = normext.group_norm(apart, groups, gamma, beta)
        other_dx, *other_gradients = normext.group_norm_backward(dy_apart, cache)
        for ours, others in zip((y, dx, *gradients), (other, other_dx, *other_gradients), strict=True):
            np.testing.assert_array_equal(others, ours)
        twin, _ = reference.group_norm(x.astype(np.float64), groups, gamma, beta)
        np.testing.assert_allclose(y, twin, rtol=20 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)


def test_gradients_of_short_rows_that_are_far_from_zero(rng):
    """What all have in common changes nothing, and what it is multiplied by adds up to nothing."""
    for n in (2, 3, 7, 16, 31, 64):
        x, dy = rng.normal(3, 1, (40, n)).astype(np.float32), rng.integers(-8, 8, (40, n)).astype(np.float32) / 8
        gamma = np.full(n, 1.25, np.float32)
        _, cache = normext.layer_norm(x, gamma, eps=0.1)
        near, far = (normext.layer_norm_backward(dy + np.float32(offset), cache)[0] for offset in (0, 1000))
        np.testing.assert_allclose(far, near, atol=2e-5)


# In place ------------------------------------------------------------


@pytest.mark.parametrize("layout", ["C", "Fortran", "spread", "byte-swapped"])
def test_in_place(rng, layout):
    x, gamma = rng.normal(size=(300, 400)), rng.normal(size=400)
    for norm in ("batch_norm", "layer_norm"):
        forward, backward = getattr(normext, norm), getattr(normext, norm + "_backward")
        inside = LAYOUTS[layout](x.copy())
        y, cache = forward(inside, gamma, out=inside)
        assert y is inside
        np.testing.assert_allclose(y, forward(x, gamma)[0], rtol=1e-10, atol=1e-12)
        with pytest.raises(ValueError, match="wrote over the x"):
            backward(x, cache)
        _, cache = forward(x, gamma)
        dy = rng.normal(size=x.shape)
        expected = backward(dy, cache)
        inside = LAYOUTS[layout](dy.copy())
        for our, other in zip(backward(inside, cache, out=inside)[:2], expected[:2], strict=True):
            np.testing.assert_allclose(our, other, rtol=1e-9, atol=1e-11)


# Bad input ------------------------------------------------------------

X = np.arange(12.0).reshape(4, 3)
RUNNING = dict(running_mean=np.zeros(3), running_var=np.ones(3))
READ_ONLY = np.zeros(3)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=np.array([["a"]])), TypeError, "x must be an array of float32, float64.*<U1"),
        (dict(x=X.astype(complex)), TypeError, "x must be .*complex128"),
        (dict(x=X.astype(object)), TypeError, "x must be .*object"),
        (dict(x=X, gamma=["a", "b", "c"]), TypeError, "gamma must be"),
        (dict(x=X, gamma=np.ones(4)), ValueError, r"gamma must have shape \(3,\), got \(4,\)"),
        (dict(x=X, gamma=np.ones((1, 3))), ValueError, r"gamma must have shape \(3,\), got \(1, 3\)"),
        (dict(x=X, beta=1.0), ValueError, r"beta must have shape \(3,\), got \(\)"),
        (dict(x=X, axis=2), ValueError, "axis 2 is out of bounds"),
        (dict(x=X, axis=-3), ValueError, "axis -3 is out of bounds"),
        (dict(x=X, axis="rows"), TypeError, "axis must be an integer"),
        (dict(x=X, eps=-1e-5), ValueError, "eps must be from 0"),
        (dict(x=X, eps=np.nan), ValueError, "eps must be from 0"),
        (dict(x=X, eps="small"), TypeError, "eps must be a number"),
        (dict(x=3.0), ValueError, "out of bounds"),
        (dict(x=X, out=np.empty((3, 4))), ValueError, r"out must have shape \(4, 3\), got \(3, 4\)"),
        (dict(x=X, out=np.empty((4, 3), np.float32)), TypeError, "out must have dtype float64, got float32"),
        (dict(x=X, out=[[0.0] * 3] * 4), TypeError, "out must be an ndarray"),
        (dict(x=X, out=np.broadcast_to(0.0, (4, 3))), ValueError, "out must be writable"),
        (dict(x=X, out=np.lib.stride_tricks.as_strided(np.zeros(3), (4, 3), (0, 8))), ValueError, "its own memory"),
    ],
)
def test_bad_arguments(arguments, error, message):
    for norm in (normext.batch_norm, normext.layer_norm):
        with pytest.raises(error, match=message):
            norm(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(training="test"), TypeError, "training must be True or False, got 'test'"),
        (dict(momentum=1.5), ValueError, "momentum must be from 0 to 1, got 1.5"),
        (dict(training=False), ValueError, "running_mean is needed with training=False"),
        (dict(training=False, running_mean=np.zeros(3)), ValueError, "running_var is needed with training=False"),
        (dict(running_mean=np.zeros(4)), ValueError, r"running_mean must have shape \(3,\), got \(4,\)"),
        (dict(running_var=[1.0, 1.0, 1.0]), TypeError, "running_var must be an ndarray of floats, got list"),
        (dict(running_var=np.ones(3, int)), TypeError, "running_var must be an ndarray of floats, got int64"),
        (dict(running_mean=READ_ONLY), ValueError, "running_mean is updated in place .* read-only"),
        (
            dict(running_mean=RUNNING["running_mean"], running_var=RUNNING["running_mean"]),
            ValueError,
            "must be two arrays",
        ),
    ],
)
def test_bad_batch_norm_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        normext.batch_norm(X, **arguments)


def test_nothing_to_normalize():
    with pytest.raises(ValueError, match=r"x has no rows.*\(0, 3\)"):
        normext.batch_norm(np.empty((0, 3)))
    with pytest.raises(ValueError, match=r"x has no rows.*\(2, 3, 0\)"):
        normext.batch_norm(np.empty((2, 3, 0)))
    with pytest.raises(ValueError, match=r"x has no channels.*\(4, 0\)"):
        normext.batch_norm(np.empty((4, 0)))
    with pytest.raises(ValueError, match=r"rows without numbers.*\(4, 0\)"):
        normext.layer_norm(np.empty((4, 0)))


def test_failed_call_changes_nothing():
    running_mean, running_var, out = np.zeros(3), np.ones(3), np.full((4, 3), 7.0)
    with pytest.raises(ValueError, match="beta"):
        normext.batch_norm(X, beta=np.ones(2), running_mean=running_mean, running_var=running_var, out=out)
    with pytest.raises(ValueError, match="running_var"):
        normext.batch_norm(X, running_mean=running_mean, running_var=READ_ONLY, out=out)
    np.testing.assert_array_equal(running_mean, 0)
    np.testing.assert_array_equal(out, 7)


def test_overlap_is_refused():
    memory = np.arange(40.0)
    x, shifted = memory[:12].reshape(4, 3), memory[3:15].reshape(4, 3)
    for norm in (normext.batch_norm, normext.layer_norm):
        with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
            norm(x, out=shifted)
        with pytest.raises(ValueError, match="out must be x itself"):
            norm(X, out=X[::-1])
        with pytest.raises(ValueError, match="out must share no memory with gamma"):
            norm(X, gamma=memory[2:5], out=x)
        _, cache = norm(X)
        with pytest.raises(ValueError, match="out must share no memory with x"):
            getattr(normext, norm.__name__ + "_backward")(np.ones((4, 3)), cache, out=X)
        with pytest.raises(ValueError, match="out must be dy itself"):
            getattr(normext, norm.__name__ + "_backward")(x, cache, out=shifted)
    with pytest.raises(ValueError, match="out must share no memory with running_var"):
        normext.batch_norm(X, running_mean=np.zeros(3), running_var=memory[4:7], out=x)
    y, _ = normext.batch_norm(memory[0:24:2].reshape(4, 3), out=memory[1:25:2].reshape(4, 3))  # interleaved, but apart
    assert np.isfinite(y).all()


def test_bad_backward_arguments():
    _, batch_cache = normext.batch_norm(X)
    _, layer_cache = normext.layer_norm(X)
    with pytest.raises(TypeError, match="cache must be what batch_norm returned, got that of layer_norm"):
        normext.batch_norm_backward(X, layer_cache)
    with pytest.raises(TypeError, match="cache must be what layer_norm returned, got tuple"):
        normext.layer_norm_backward(X, (1, 2))
    for backward, cache in ((normext.batch_norm_backward, batch_cache), (normext.layer_norm_backward, layer_cache)):
        with pytest.raises(ValueError, match=r"dy must have the shape of x, \(4, 3\), got \(3, 4\)"):
            backward(X.T, cache)
        with pytest.raises(TypeError, match="dy must be"):
            backward(X.astype(complex), cache)


@pytest.mark.parametrize("module", [normext._core.arrays, normext._core.memory, normext._core.runtime])
def test_examples_of_compiled_modules(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# The norm as a thing -------------------------------------------------------------------------------------------------

SIMILAR = [
    Norm("layer_norm", (6, 4), np.float32),
    Norm("layer_norm", (6, 4), np.float64),
    Norm("layer_norm", (6, 4), np.float32, axis=0),
    Norm("layer_norm", (6, 4), np.float32, eps=1e-6),
    Norm("rms_norm", (6, 4), np.float32),
    Norm("batch_norm", (6, 4), np.float32),
    Norm("batch_norm", (6, 4), np.float32, training=False),
    Norm("batch_norm", (6, 4), np.float32, activation="relu"),
    Norm("group_norm", (6, 4), np.float32, groups=4),
    Norm("instance_norm", (6, 4), np.float32),  # the same numbers, but the errors of another function
    Norm("batch_norm", (6, 4, 1, 1, 1, 1, 1), np.float32),
]


def test_norms_are_equal_where_all_of_them_is():
    assert len(set(SIMILAR)) == len(SIMILAR)
    for norm in SIMILAR:
        for other in (pickle.loads(pickle.dumps(norm)), eval(repr(norm), {"Norm": Norm})):
            assert other == norm and hash(other) == hash(norm) and repr(other) == repr(norm)
    assert Norm("layer_norm", (6, 4), ">f4", axis=-1, eps=1e-5) == SIMILAR[0] != "layer_norm"


def test_a_norm_fits_arrays_of_its_shape_and_dtype():
    norm = Norm("layer_norm", (6, 4), np.float32)
    x = np.zeros((6, 4), np.float32)
    assert all(norm.fits(a) for a in (x, x[::-1], np.asfortranarray(x), x.astype(">f4")))
    others = (x[1:], x[None], x.T, x.astype(np.float64), x.astype(np.int32), np.ma.masked_array(x), x.tolist(), None)
    assert not any(norm.fits(a) for a in others)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("softmax", (6, 4), "f4"), ValueError, "kind must be one of batch_norm, .*, got 'softmax'"),
        (("layer_norm", (6, 4), "i4"), TypeError, "dtype must be float32, .*, got int32"),
        (("layer_norm", (6, 4, 0), "f4"), ValueError, "x has rows without numbers"),
        (("batch_norm", (6,), "f4"), np.exceptions.AxisError, "axis 1 is out of bounds"),
        (("batch_norm", (1,) * 65, "f4"), ValueError, "shape must have at most 64 axes, got 65"),
    ],
)
def test_what_is_no_norm_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Norm(*arguments)
    with pytest.raises(ValueError, match="layer_norm has no activation"):
        Norm("layer_norm", (6, 4), "f4", activation="relu")


# What the caller does to his arrays ----------------------------------------------------------------------------------


# Each norm's forward pass, with its own arguments but x and parameters, and its backward pass.
NORMS = {
    "batch_norm": (normext.batch_norm, normext.batch_norm_backward),
    "layer_norm": (normext.layer_norm, normext.layer_norm_backward),
    "rms_norm": (normext.rms_norm, normext.rms_norm_backward),
    "group_norm": (lambda x: normext.group_norm(x, 2), normext.group_norm_backward),
    "instance_norm": (normext.instance_norm, normext.instance_norm_backward),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: setattr(x, "shape", (-1,)),
        lambda x: setattr(x, "shape", (5, 4, 6)),
        lambda x: setattr(x, "shape", (6, 4, 5, 1)),
        lambda x: setattr(x, "dtype", np.int64),
        lambda x: setattr(x, "dtype", x.dtype.newbyteorder()),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
def test_x_that_was_reshaped_in_place_is_refused_by_the_backward_pass(norm, change, rng):
    forward, backward = NORMS[norm]
    x = rng.normal(size=(6, 4, 5))
    _, cache = forward(x)
    change(x)
    with pytest.raises(ValueError, match=rf"^x must be as {norm} had it, of shape \(6, 4, 5\) and dtype float64"):
        backward(np.ones((6, 4, 5)), cache)
    x.dtype = np.float64
    x.shape = (6, 4, 5)
    backward(np.ones((6, 4, 5)), cache)


@pytest.mark.parametrize("name", ["x", "gamma", "beta", "running_mean", "running_var", "residual", "out", "dy", "dsum"])
def test_masked_arrays_are_refused(name):
    x = np.ones((4, 3))
    masked = np.ma.masked_equal(np.ones(3) if name in ("gamma", "beta", "running_mean", "running_var") else x, 1)
    calls = {
        "x": lambda: [forward(masked) for forward, _ in NORMS.values()],
        "dy": lambda: normext.batch_norm_backward(masked, normext.batch_norm(x)[1]),
        "dsum": lambda: normext.layer_norm_backward(x, normext.layer_norm(x, residual=x)[2], dsum=masked),
        "residual": lambda: normext.layer_norm(x, residual=masked),
    }
    with pytest.raises(TypeError, match=f"^{name} must not be a masked array"):
        calls.get(name, lambda: normext.batch_norm(x, **{name: masked}))()


@pytest.mark.parametrize("norm", ["group_norm", "instance_norm"])
def test_a_cache_of_the_norm_beside_is_refused_by_its_name(norm):
    other = {"group_norm": "instance_norm", "instance_norm": "group_norm"}[norm]
    _, cache = NORMS[other][0](np.ones((2, 4, 3)))
    with pytest.raises(TypeError, match=f"cache must be what {norm} returned, got that of {other}"):
        NORMS[norm][1](np.ones((2, 4, 3)), cache)


@pytest.mark.parametrize(
    "name, other, arguments",
    [
        ("running_mean", "running_var", lambda m: dict(running_mean=m[:4], running_var=m[2:6])),
        ("running_mean", "running_var", lambda m: dict(running_mean=m[:8:2], running_var=m[6:10])),
        ("running_var", "gamma", lambda m: dict(running_var=m[:4], gamma=m[:4])),
        ("running_mean", "beta", lambda m: dict(running_mean=m[1:5], beta=m[:4])),
        ("running_mean", "x", lambda m: dict(running_mean=m[:4], x=m.reshape(3, 4))),
        ("running_var", "x", lambda m: dict(running_var=m[:4], x=m.reshape(4, 3).T)),
    ],
)
def test_running_statistics_that_share_memory_are_refused(name, other, arguments):
    memory = np.arange(12.0)
    with pytest.raises(ValueError, match=f"{name}.*{other}.* overlap"):
        normext.batch_norm(**{"x": np.ones((5, 4))} | arguments(memory))
    np.testing.assert_array_equal(memory, np.arange(12.0))


def test_a_running_statistic_of_one_number_for_all_channels_is_refused():
    one = np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,))
    with pytest.raises(ValueError, match="running_var must have its own memory for every channel"):
        normext.batch_norm(np.ones((5, 4)), running_var=one)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_running_statistics_learn_nothing_from_one_number(shape, rng):
    x, beta = rng.normal(size=shape), rng.normal(size=3)
    running = dict(running_mean=np.zeros(3), running_var=np.ones(3))
    for some in (running, {"running_mean": running["running_mean"]}, {"running_var": running["running_var"]}):
        with pytest.raises(ValueError, match="x must have more than one number a channel where running statistics"):
            normext.batch_norm(x, **some)
    assert not running["running_mean"].any() and (running["running_var"] == 1).all()
    y, cache = normext.batch_norm(x, beta=beta)
    np.testing.assert_array_equal(y.ravel(), beta)
    assert not normext.batch_norm_backward(x, cache)[0].any()
    normext.batch_norm(x, **running, momentum=1.0)  # nothing is learned
    normext.batch_norm(x, **running, training=False)


DEBUGGED = """
import numpy as np, normext
x, dy, gamma = np.random.default_rng(0).normal(size=(3, 6, 4, 5)), np.ones((6, 4, 5)), np.ones(4)
x = x[:, :, :, ::2][0] if {strided} else x[0].copy()
dy = np.ones(x.shape)
for norm, first in [("batch_norm", ()), ("group_norm", (2,)), ("instance_norm", ())]:
    _, cache = getattr(normext, norm)(x, *first, gamma=gamma)
    backward = getattr(normext, norm + "_backward")
    backward(dy, cache)
    for array in (x, gamma):
        kept = array.copy()
        array[..., 0] += 1
        try:
            backward(dy, cache)
        except ValueError as error:
            print(error)
        array[...] = kept
        backward(dy, cache)
_, total, cache = normext.layer_norm(x, residual=x)
total[0] = 0
try:
    normext.layer_norm_backward(dy, cache)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("debug, lines", [("1", 7), ("0", 0), ("", 0)])
def test_arrays_that_are_changed_between_the_passes_are_seen_where_that_is_asked_for(strided, debug, lines):
    environment = dict(os.environ, NORMEXT_DEBUG=debug)
    program = [sys.executable, "-c", DEBUGGED.format(strided=strided)]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    printed = run.stdout.splitlines()
    assert len(printed) == lines
    if lines:
        assert printed[:2] == [
            f"{name} must be as batch_norm had it, but its numbers were changed before the backward pass"
            for name in ("x", "gamma")
        ]
