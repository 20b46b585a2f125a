"""The backward passes of the backward passes: against centred differences, PyTorch and themselves in float64."""

import tracemalloc

import numpy as np
import pytest

import normext
from normext import batch_norm, batch_norm_backward, layer_norm, layer_norm_backward
from normext.gradcheck import numerical_gradient, relative_error
from normext.second_order import batch_norm_backward_backward, layer_norm_backward_backward

BATCH = batch_norm, batch_norm_backward, batch_norm_backward_backward
LAYER = layer_norm, layer_norm_backward, layer_norm_backward_backward
EVALUATION = {"training": False, "running_mean": np.array([0.5, -1.0, 2.0]), "running_var": np.array([0.5, 1.0, 4.0])}

# Norm, shape of x, options. An eps that is not small shows where xhat is taken to have variance 1.
CASES = {
    "batch (N, D)": (BATCH, (6, 3), {}),
    "batch (N, D), large eps": (BATCH, (6, 3), {"eps": 0.7}),
    "batch (N, C, H, W)": (BATCH, (2, 3, 2, 4), {}),
    "batch (N, H, W, C)": (BATCH, (2, 4, 2, 3), {"axis": -1}),
    "batch (N, D), evaluation": (BATCH, (6, 3), EVALUATION),
    "batch (N, C, H, W), evaluation": (BATCH, (2, 3, 2, 2), EVALUATION),
    "layer, last axis": (LAYER, (4, 5), {}),
    "layer, last axis, large eps": (LAYER, (4, 5), {"eps": 0.7}),
    "layer, last three axes": (LAYER, (3, 2, 2, 3), {"axis": 1}),
    "layer, last axis of three": (LAYER, (2, 3, 5), {}),
    "layer, all axes": (LAYER, (2, 5), {"axis": 0}),
    "layer, one row": (LAYER, (1, 7), {}),
}
cases = pytest.mark.parametrize("case", CASES)


def drawn(case, affine=True, seed=0):
    """x, dy, ddx; gamma, beta, ddgamma, ddbeta, each None if not `affine`. float32 holds all of them exactly."""
    norm, shape, options = CASES[case]
    axis = options.get("axis", 1 if norm is BATCH else -1)
    parameter = (shape[axis],) if norm is BATCH else shape[axis:]
    rng = np.random.default_rng(seed)

    def draw(shape, offset, scale):
        return (offset + scale * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)

    arrays = draw(shape, 1, 2), draw(shape, 0, 1), draw(shape, 0.5, 1)
    return *arrays, *(draw(parameter, offset, 1) if affine else None for offset in (1, 0, 0, 0))


def results(case, arrays):
    (forward, _, second), _, options = CASES[case]
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = arrays
    _, cache = forward(x, gamma, beta, **options)
    return second(ddx, dy, cache, ddgamma=ddgamma, ddbeta=ddbeta)


@cases
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_the_numerical_ones_of_the_compiled_backward_pass(case, affine):
    (forward, backward, _), _, options = CASES[case]
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = arrays = drawn(case, affine)

    def scalar(_):
        given = zip(backward(dy, forward(x, gamma, beta, **options)[1]), (ddx, ddgamma, ddbeta))
        return sum((gradient * upstream).sum() for gradient, upstream in given if gradient is not None)

    ddy, dx, dgamma = results(case, arrays)
    assert relative_error(ddy, numerical_gradient(scalar, dy)) < 1e-7
    assert relative_error(dx, numerical_gradient(scalar, x)) < 1e-7
    if affine:
        assert relative_error(dgamma, numerical_gradient(scalar, gamma)) < 1e-7
    else:
        assert dgamma is None


@cases
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_pytorch(case, affine):
    torch = pytest.importorskip("torch")
    (forward, _, _), _, options = CASES[case]
    arrays = drawn(case, affine)
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = (None if a is None else torch.tensor(a) for a in arrays)
    for a in (x, dy, gamma, beta):
        if a is not None:
            a.requires_grad_()
    eps, axis = options.get("eps", 1e-5), options.get("axis", -1)
    if forward is layer_norm:
        y = torch.nn.functional.layer_norm(x, x.shape[axis:], gamma, beta, eps)
    else:
        mean, var = (torch.tensor(options[k]) if k in options else None for k in ("running_mean", "running_var"))
        channels_first = x.movedim(-1, 1) if "axis" in options else x
        y = torch.nn.functional.batch_norm(
            channels_first, mean, var, gamma, beta, options.get("training", True), 0.1, eps
        )
        y = y.movedim(1, -1) if "axis" in options else y
    inputs = [a for a in (x, gamma, beta) if a is not None]
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    upstream = [a for a in (ddx, ddgamma, ddbeta) if a is not None]
    expected = torch.autograd.grad(
        first, [a for a in (dy, x, gamma) if a is not None], upstream, materialize_grads=True
    )
    found = [a for a in results(case, arrays) if a is not None]
    assert len(found) == len(expected)
    for name, a, b in zip(("ddy", "dx", "dgamma"), found, expected):
        assert relative_error(a, b.numpy()) < 1e-9, name


@cases
@pytest.mark.parametrize("affine", [True, False])
def test_float32_is_the_rounded_float64(case, affine):
    arrays = drawn(case, affine)
    single = results(case, [None if a is None else a.astype(np.float32) for a in arrays])
    for name, a, b in zip(("ddy", "dx", "dgamma"), single, results(case, arrays)):
        if b is None:
            assert a is None
        else:
            assert a.dtype == np.float32 and a.shape == b.shape
            # One rounding, 6e-8, of the result; and the statistics of the compiled forward pass in float32.
            assert relative_error(a, b) < 1e-6, name


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("which", ["x", "dy", "ddx"])
def test_float32_far_from_zero_loses_nothing(which, offset):
    """What a mean takes out again must not have taken digits with it."""
    rng = np.random.default_rng(0)
    arrays = dict(zip(("x", "dy", "ddx"), rng.standard_normal((3, 2000, 5))))
    arrays[which] += offset
    single = [a.astype(np.float32) for a in arrays.values()]
    gamma = rng.standard_normal(5).astype(np.float32)

    def second_order(x, dy, ddx):
        return batch_norm_backward_backward(ddx, dy, batch_norm(x, gamma)[1])

    for a, b in zip(second_order(*single), second_order(*(a.astype(np.float64) for a in single))):
        assert relative_error(a, b) < 1e-6


def test_without_ddgamma_and_ddbeta_they_are_zero():
    for case in ("batch (N, D)", "batch (N, D), evaluation", "layer, last axis"):
        arrays = drawn(case)
        zeros = results(case, (*arrays[:5], np.zeros_like(arrays[5]), np.zeros_like(arrays[6])))
        for a, b in zip(results(case, (*arrays[:5], None, None)), zeros):
            np.testing.assert_array_equal(a, b)


def test_in_evaluation_dx_depends_on_x_through_dgamma_alone():
    x, dy, ddx, gamma, beta, ddgamma, _ = drawn("batch (N, D), evaluation")
    _, cache = batch_norm(x, gamma, beta, **EVALUATION)
    assert not batch_norm_backward_backward(ddx, dy, cache)[1].any()
    _, dx, _ = batch_norm_backward_backward(ddx, dy, cache, ddgamma=ddgamma)
    np.testing.assert_allclose(dx, ddgamma * dy / np.sqrt(EVALUATION["running_var"] + 1e-5), rtol=1e-14)


def test_any_strides_and_any_number_types():
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = arrays = drawn("batch (N, C, H, W)")
    expected = results("batch (N, C, H, W)", arrays)
    x = np.asfortranarray(x)
    dy, ddx = np.repeat(dy, 2, axis=-1)[..., ::2], ddx.astype(">f8")
    found = results("batch (N, C, H, W)", (x, dy, ddx, gamma, beta, ddgamma.tolist(), ddbeta.astype(np.float32)))
    for a, b in zip(found, expected):
        assert a.dtype == np.float64 and a.dtype.isnative
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    ones = np.ones((2, 3), int)
    assert all(
        a.dtype == np.float64 for a in layer_norm_backward_backward(ones, ones, layer_norm([[1, 2, 4]] * 2)[1])[:2]
    )


def test_edges():
    one_row = batch_norm(np.array([[1.0, -2.0]]), np.ones(2))[1]
    ddy, dx, dgamma = batch_norm_backward_backward(np.ones((1, 2)), np.ones((1, 2)), one_row)
    assert not ddy.any() and not dx.any() and not dgamma.any()  # dx is 0 whatever dy is

    constant = layer_norm(np.full((2, 3), 5.0), eps=0.0)[1]
    assert not any(a.any() for a in layer_norm_backward_backward(np.ones((2, 3)), np.ones((2, 3)), constant)[:2])

    nothing = np.empty((0, 3))
    for second, cache in (
        (batch_norm_backward_backward, batch_norm(nothing, np.ones(3), **EVALUATION)[1]),
        (layer_norm_backward_backward, layer_norm(nothing, np.ones(3))[1]),
    ):
        ddy, dx, dgamma = second(nothing, nothing, cache)
        assert ddy.shape == dx.shape == (0, 3)
        np.testing.assert_array_equal(dgamma, np.zeros(3))

    single_numbers = batch_norm(np.array([1.0, 2.0]), np.ones(2), axis=0)[1]  # a channel of one number each
    assert not batch_norm_backward_backward(np.ones(2), np.ones(2), single_numbers)[1].any()


@pytest.mark.parametrize("norm", [BATCH, LAYER], ids=["batch", "layer"])
def test_arguments_are_left_alone(norm):
    forward, _, second = norm
    rng = np.random.default_rng(0)
    x, dy, ddx = rng.standard_normal((3, 4, 5))
    gamma, beta, ddgamma, ddbeta = rng.standard_normal((4, 5))
    inputs = x, dy, ddx, gamma, beta, ddgamma, ddbeta
    _, cache = forward(x, gamma, beta)
    inputs = *inputs, cache.mean, cache.rstd
    before = [a.copy() for a in inputs]
    found = second(ddx, dy, cache, ddgamma=ddgamma, ddbeta=ddbeta)
    for a, b in zip(inputs, before):
        np.testing.assert_array_equal(a, b)
    assert not any(np.shares_memory(a, b) for a in found for b in inputs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", [BATCH, LAYER], ids=["batch", "layer"])
def test_no_more_than_five_arrays_of_float64_at_a_time(norm, dtype):
    forward, _, second = norm
    x, gamma = np.random.default_rng(0).standard_normal((400, 400)).astype(dtype), np.ones(400)
    _, cache = forward(x, gamma, gamma)
    tracemalloc.start()
    try:
        second(x, x, cache, ddgamma=gamma, ddbeta=gamma)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5.3 * 8 * x.size


@pytest.mark.parametrize("norm", [BATCH, LAYER], ids=["batch", "layer"])
def test_bad_input_is_named(norm):
    forward, _, second = norm
    x = np.random.default_rng(0).standard_normal((4, 3))
    _, cache = forward(x, np.ones(3), np.ones(3))
    for arguments, named, error, message in (
        ((x.T, x, cache), {}, ValueError, r"ddx must have the shape of x, \(4, 3\), got \(3, 4\)"),
        ((x, x[0], cache), {}, ValueError, r"dy must have the shape of x, \(4, 3\), got \(3,\)"),
        ((None, x, cache), {}, TypeError, "ddx must be an array of real numbers, got dtype object"),
        ((x, x * 1j, cache), {}, TypeError, "dy must be an array of real numbers, got dtype complex128"),
        ((x, x, cache), {"ddgamma": x}, ValueError, r"ddgamma must have the shape of gamma, \(3,\), got \(4, 3\)"),
        ((x, x, cache), {"ddbeta": 1.0}, ValueError, r"ddbeta must have the shape of beta, \(3,\), got \(\)"),
        ((x, x, cache), {"ddgamma": ["a"] * 3}, TypeError, "ddgamma must be an array of real numbers, got dtype <U1"),
        ((x, x, forward(x)[1]), {"ddgamma": np.ones(3)}, ValueError, "ddgamma must be None, as gamma was"),
        ((x, x, forward(x)[1]), {"ddbeta": np.ones(3)}, ValueError, "ddbeta must be None, as beta was"),
        ((x, x, {}), {}, TypeError, f"cache must be what {forward.__name__} returned, got dict"),
    ):
        with pytest.raises(error, match=message):
            second(*arguments, **named)


def test_the_cache_of_another_norm_is_refused():
    x = np.random.default_rng(0).standard_normal((4, 6))
    for second, cache in (
        (batch_norm_backward_backward, layer_norm(x)[1]),
        (batch_norm_backward_backward, normext.rms_norm(x)[1]),
        (batch_norm_backward_backward, normext.group_norm(x, 2)[1]),
        (layer_norm_backward_backward, batch_norm(x)[1]),
        (layer_norm_backward_backward, normext.instance_norm(x)[1]),
    ):
        with pytest.raises(TypeError, match="cache must be what .*_norm returned, got that of .*_norm"):
            second(x, x, cache)


@pytest.mark.parametrize("norm", [BATCH, LAYER], ids=["batch", "layer"])
def test_gradient_penalty_of_a_critic(norm):
    """Of D(x) = sum(tanh(norm(x W)) v), the penalty mean((|dD/dx| - 1)^2) and its gradients by W, gamma and beta."""
    forward, backward, second = norm
    rng = np.random.default_rng(0)
    x, W, v = rng.standard_normal((5, 4)), rng.standard_normal((4, 6)), rng.standard_normal(6)
    gamma, beta = 1 + 0.3 * rng.standard_normal(6), 0.3 * rng.standard_normal(6)

    def input_gradient():
        y, cache = forward(x @ W, gamma, beta)
        dy = v * (1 - np.tanh(y) ** 2)
        da, _, _ = backward(dy, cache)
        return da @ W.T, da, dy, y, cache

    def penalty(_):
        return ((np.linalg.norm(input_gradient()[0], axis=1) - 1) ** 2).mean()

    dx, da, dy, y, cache = input_gradient()
    size = np.linalg.norm(dx, axis=1, keepdims=True)
    penalty_dx = 2 * (size - 1) * dx / size / len(x)
    penalty_dy, penalty_a, penalty_gamma = second(penalty_dx @ W, dy, cache)
    # dy depends on y: the derivative of v (1 - tanh(y)^2) is -2 tanh(y) dy.
    a_through_y, gamma_through_y, penalty_beta = backward(penalty_dy * -2 * np.tanh(y) * dy, cache)
    penalty_W = x.T @ (penalty_a + a_through_y) + penalty_dx.T @ da

    assert relative_error(penalty_W, numerical_gradient(penalty, W)) < 1e-7
    assert relative_error(penalty_gamma + gamma_through_y, numerical_gradient(penalty, gamma)) < 1e-7
    assert relative_error(penalty_beta, numerical_gradient(penalty, beta)) < 1e-7


@pytest.mark.parametrize("norm", [BATCH, LAYER])
def test_gradients_far_from_zero(norm):
    """What all ddx have in common drops out, and so does what all dy of a channel have, in digits too."""
    forward, _, second = norm
    rng = np.random.default_rng(0)
    x, dy, ddx = (np.round(rng.standard_normal((5000, 6)) * 2**16) / 2**16 for _ in range(3))
    x, dy, ddx = (x, dy, ddx) if norm is BATCH else (x.T.copy(), dy.T.copy(), ddx.T.copy())
    _, cache = forward(x, gamma=np.linspace(1, 2, x.shape[1]))
    near = second(ddx, dy, cache, ddgamma=np.ones(x.shape[1]))
    far = second(ddx + 2**20, dy + 2**20 if norm is BATCH else dy, cache, ddgamma=np.ones(x.shape[1]))
    assert max(relative_error(a, b) for a, b in zip(far, near, strict=True)) <= 1e-8
