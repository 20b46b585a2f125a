"""normext.cs231n.layers, layer_utils and gradient_check, against plain formulas and numerical gradients."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from normext.cs231n import fast_layers, gradient_check, layer_utils, layers
from normext.gradcheck import numerical_gradient, relative_error

LIMIT = 1e-7  # for centred differences in float64


def check_gradients(forward, inputs, backward, rng, limit=LIMIT):
    """`forward(*inputs) -> out, cache` and `backward(dout, cache)`, which gives a gradient for every input."""
    out, cache = forward(*inputs)
    dout = rng.standard_normal(out.shape)
    gradients = backward(dout, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(inputs)
    for x, gradient in zip(inputs, gradients, strict=True):
        numerical = numerical_gradient(lambda _: forward(*inputs)[0], x, dout)
        assert gradient.shape == x.shape
        assert relative_error(numerical, gradient) < limit


# --- affine -----------------------------------------------------------------------------------------------------------


def test_affine_forward_is_a_weighted_sum_of_every_feature(rng):
    x, w, b = rng.standard_normal((3, 2, 4)), rng.standard_normal((8, 5)), rng.standard_normal(5)
    expected = [[sum(x[n].flat[d] * w[d, m] for d in range(8)) + b[m] for m in range(5)] for n in range(3)]
    np.testing.assert_allclose(layers.affine_forward(x, w, b)[0], expected, rtol=1e-12)


def test_affine_gradients(rng):
    inputs = rng.standard_normal((4, 2, 3)), rng.standard_normal((6, 5)), rng.standard_normal(5)
    check_gradients(layers.affine_forward, inputs, layers.affine_backward, rng)


def test_affine_backward_leaves_out_the_input_gradient_and_nothing_else(rng):
    out, cache = layers.affine_forward(rng.standard_normal((4, 3)), rng.standard_normal((3, 2)), np.zeros(2))
    dx, dw, db = layers.affine_backward(out, cache, input_gradient=False)
    assert dx is None
    _, expected_dw, expected_db = layers.affine_backward(out, cache)
    np.testing.assert_array_equal(dw, expected_dw)
    np.testing.assert_array_equal(db, expected_db)


@pytest.mark.parametrize(
    "x, w, b",
    [
        ((4, 3), (2, 5), (5,)),
        ((4, 3), (3, 5), (1,)),
        ((4, 3), (3, 5), (1, 5)),
        ((3,), (3, 5), (5,)),
        ((4, 3), (3,), ()),
    ],
)
def test_affine_refuses_shapes_that_do_not_fit(x, w, b):
    with pytest.raises(ValueError, match="must fit"):
        layers.affine_forward(np.zeros(x), np.zeros(w), np.zeros(b))


def test_affine_of_no_rows_has_no_rows():
    assert layers.affine_forward(np.zeros((0, 2, 2)), np.zeros((4, 3)), np.zeros(3))[0].shape == (0, 3)


# --- relu -------------------------------------------------------------------------------------------------------------


def test_relu_keeps_what_is_positive_and_nan(rng):
    out, _ = layers.relu_forward([-1.5, -0.0, 0.0, 2.5, np.nan])
    np.testing.assert_array_equal(out, [0, 0, 0, 2.5, np.nan])


def test_relu_gradient(rng):
    x = rng.standard_normal((4, 5))
    x[np.abs(x) < 0.1] = 0.5  # no numerical gradient at the kink
    check_gradients(layers.relu_forward, (x,), layers.relu_backward, rng)


# --- losses -----------------------------------------------------------------------------------------------------------


def softmax_loss_by_rows(x, y):
    return np.mean([np.log(np.sum(np.exp(row))) - row[label] for row, label in zip(x, y, strict=True)])


def svm_loss_by_rows(x, y):
    return np.mean(
        [
            sum(max(0.0, row[j] - row[label] + 1) for j in range(len(row)) if j != label)
            for row, label in zip(x, y, strict=True)
        ]
    )


LOSSES = [(layers.softmax_loss, softmax_loss_by_rows), (layers.svm_loss, svm_loss_by_rows)]


@pytest.mark.parametrize("loss, expected", LOSSES)
def test_loss_is_its_definition_and_its_gradient_the_numerical_one(loss, expected, rng):
    x, y = 3 * rng.standard_normal((20, 6)), rng.integers(0, 6, 20)
    value, dx = loss(x, y)
    assert value == pytest.approx(expected(x, y), rel=1e-12)
    assert relative_error(numerical_gradient(lambda x: loss(x, y)[0], x), dx) < LIMIT


@pytest.mark.parametrize("loss, initial", [(layers.softmax_loss, np.log(10)), (layers.svm_loss, 9.0)])
def test_loss_of_small_random_scores_is_that_of_guessing(loss, initial, rng):
    x, y = 0.001 * rng.standard_normal((50, 10)), rng.integers(0, 10, 50)
    assert loss(x, y)[0] == pytest.approx(initial, abs=0.01)


@pytest.mark.parametrize("loss", [layers.softmax_loss, layers.svm_loss])
@pytest.mark.parametrize("dtype, big", [(np.float32, 3e38), (np.float64, 4e307)])
def test_loss_is_stable_for_scores_of_any_size(loss, dtype, big):
    x = np.array([[big, -big, 0], [-big, -big, big]], dtype)
    value, dx = loss(x, [1, 2])
    # Row 0 gives 2 * big (svm: big more), row 1 nothing.
    steps = 2 if loss is layers.softmax_loss else 3
    assert value == pytest.approx(steps * float(dtype(big)) / 2, rel=1e-6)
    assert dx.dtype == dtype
    np.testing.assert_allclose(dx[0], [0.5, -0.5, 0] if loss is layers.softmax_loss else [0.5, -1, 0.5])
    np.testing.assert_allclose(dx[1], 0)


@pytest.mark.parametrize("loss", [layers.softmax_loss, layers.svm_loss])
def test_loss_beyond_the_largest_float_is_infinite_with_a_right_gradient(loss):
    value, dx = loss([[1.7e308, -1.7e308]], [1])
    assert value == np.inf
    np.testing.assert_array_equal(dx, [[1, -1]])


@pytest.mark.parametrize("loss", [layers.softmax_loss, layers.svm_loss])
@pytest.mark.parametrize(
    "y", [[0, 1, 3], [0, 1, -1], [0, 1], [[0], [1], [2]], [0.0, 1.0, 2.0], ["a", "b", "c"], [True, False, True]]
)
def test_loss_refuses_wrong_labels_by_name(loss, y):
    with pytest.raises(ValueError, match="^y must hold"):
        loss(np.zeros((3, 3)), np.array(y))


@pytest.mark.parametrize("loss", [layers.softmax_loss, layers.svm_loss])
def test_loss_refuses_scores_that_are_not_a_matrix_or_empty(loss):
    with pytest.raises(ValueError, match="^x must have two axes"):
        loss(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ValueError, match="^x must have at least one row"):
        loss(np.zeros((0, 3)), np.zeros(0, int))


# --- batch normalization ----------------------------------------------------------------------------------------------


def test_batchnorm_centres_and_scales_every_feature(rng):
    x = np.maximum(0, rng.standard_normal((200, 50)) @ rng.standard_normal((50, 60))) @ rng.standard_normal((60, 3))
    out, _ = layers.batchnorm_forward(x, np.ones(3), np.zeros(3), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-6)
    # Whole numbers for gamma and beta, as a person types them.
    out, _ = layers.batchnorm_forward(x, np.asarray([1, 2, 3]), np.asarray([11, 12, 13]), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=0), [11, 12, 13])
    np.testing.assert_allclose(out.std(axis=0), [1, 2, 3], rtol=1e-6)


def test_batchnorm_takes_whole_numbers_as_float64():
    out, _ = layers.batchnorm_forward(np.array([[1, 10], [3, 30]]), [1, 1], [0, 0], {"mode": "train", "eps": 0.0})
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, [[-1, -1], [1, 1]])


def test_batchnorm_running_statistics_are_moving_averages_in_new_arrays(rng):
    bn_param = {"mode": "train", "momentum": 0.8}
    mean, var = np.zeros(4), np.zeros(4)
    for _ in range(5):
        before = dict(bn_param)
        x = 3 * rng.standard_normal((30, 4)) + 7
        layers.batchnorm_forward(x, np.ones(4), np.zeros(4), bn_param)
        if "running_mean" in before:
            np.testing.assert_allclose(before["running_mean"], mean, rtol=1e-12)  # not changed under the caller's hands
            np.testing.assert_allclose(before["running_var"], var, rtol=1e-12)
        mean, var = 0.8 * mean + 0.2 * x.mean(axis=0), 0.8 * var + 0.2 * x.var(axis=0)
        np.testing.assert_allclose(bn_param["running_mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(bn_param["running_var"], var, rtol=1e-12)


def test_batchnorm_in_test_mode_uses_the_running_statistics_and_writes_them_back(rng):
    x, gamma, beta = rng.standard_normal((6, 3)), rng.standard_normal(3), rng.standard_normal(3)
    mean, var = rng.standard_normal(3), rng.random(3) + 0.5
    bn_param = {"mode": "test", "running_mean": mean, "running_var": var, "eps": 1e-3}
    out, _ = layers.batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, gamma * (x - mean) / np.sqrt(var + 1e-3) + beta, rtol=1e-12)
    np.testing.assert_array_equal(bn_param["running_mean"], mean)
    np.testing.assert_array_equal(bn_param["running_var"], var)

    fresh = {"mode": "test"}
    layers.batchnorm_forward(x, gamma, beta, fresh)
    np.testing.assert_array_equal(fresh["running_mean"], np.zeros(3))
    np.testing.assert_array_equal(fresh["running_var"], np.zeros(3))


def test_batchnorm_after_many_batches_normalizes_new_data_at_test_time(rng):
    bn_param = {"mode": "train"}
    for _ in range(50):
        layers.batchnorm_forward(5 * rng.standard_normal((200, 3)) + 12, np.ones(3), np.zeros(3), bn_param)
    bn_param["mode"] = "test"
    out, _ = layers.batchnorm_forward(5 * rng.standard_normal((2000, 3)) + 12, np.ones(3), np.zeros(3), bn_param)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=0.15)


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("backward", [layers.batchnorm_backward, layers.batchnorm_backward_alt])
def test_batchnorm_gradients_in_both_modes(backward, mode, rng):
    inputs = 5 * rng.standard_normal((4, 5)) + 12, rng.standard_normal(5), rng.standard_normal(5)
    statistics = {"running_mean": 12 + rng.standard_normal(5), "running_var": 20 + rng.random(5)}

    def forward(x, gamma, beta):
        return layers.batchnorm_forward(x, gamma, beta, {"mode": mode, **statistics})

    check_gradients(forward, inputs, backward, rng)


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_batchnorm_backward_alt_equals_the_staged_one(dtype, limit, rng):
    x = (5 * rng.standard_normal((100, 500)) + 12).astype(dtype)
    gamma, beta = rng.standard_normal((2, 500)).astype(dtype)
    _, cache = layers.batchnorm_forward(x, gamma, beta, {"mode": "train"})
    dout = rng.standard_normal((100, 500)).astype(dtype)
    staged, closed = layers.batchnorm_backward(dout, cache), layers.batchnorm_backward_alt(dout, cache)
    for a, b in zip(staged, closed, strict=True):
        assert a.dtype == b.dtype == dtype
        assert relative_error(a, b) < limit


@pytest.mark.parametrize("bn_param", [{}, {"mode": "training"}, {"mode": None}])
def test_batchnorm_refuses_another_mode(bn_param):
    with pytest.raises(ValueError, match=f'^Invalid forward batchnorm mode "{bn_param.get("mode")}"$'):
        layers.batchnorm_forward(np.zeros((3, 2)), np.ones(2), np.zeros(2), bn_param)


def test_batchnorm_that_fails_leaves_bn_param_alone():
    bn_param = {"mode": "train"}
    with pytest.raises(ValueError):
        layers.batchnorm_forward(np.zeros((3, 2)), np.ones(5), np.zeros(2), bn_param)
    assert bn_param == {"mode": "train"}


# --- layer normalization ----------------------------------------------------------------------------------------------


def test_layernorm_centres_and_scales_every_row(rng):
    x = 4 * rng.standard_normal((6, 300)) - 3
    out, _ = layers.layernorm_forward(x, np.full(300, 3), np.full(300, 5), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=1), 5)
    np.testing.assert_allclose(out.std(axis=1), 3, rtol=1e-6)


def test_layernorm_is_batchnorm_with_rows_and_columns_changed_over(rng):
    x = rng.standard_normal((4, 7))
    by_rows, _ = layers.layernorm_forward(x, np.ones(7), np.zeros(7), {"eps": 1e-3})
    by_columns, _ = layers.batchnorm_forward(x.T, np.ones(4), np.zeros(4), {"mode": "train", "eps": 1e-3})
    np.testing.assert_allclose(by_rows, by_columns.T, rtol=1e-10, atol=1e-12)


def test_layernorm_is_the_same_in_training_and_test_and_keeps_no_statistics(rng):
    x, gamma, beta = rng.standard_normal((4, 5)), rng.standard_normal(5), rng.standard_normal(5)
    train, test = {"mode": "train"}, {"mode": "test"}
    np.testing.assert_array_equal(
        layers.layernorm_forward(x, gamma, beta, train)[0], layers.layernorm_forward(x, gamma, beta, test)[0]
    )
    assert (train, test) == ({"mode": "train"}, {"mode": "test"})


def test_layernorm_gradients(rng):
    inputs = 5 * rng.standard_normal((4, 5)) + 12, rng.standard_normal(5), rng.standard_normal(5)
    check_gradients(
        lambda x, gamma, beta: layers.layernorm_forward(x, gamma, beta, {}), inputs, layers.layernorm_backward, rng
    )


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
def test_norms_refuse_what_is_not_a_matrix(shape):
    one = np.ones(shape[-1])
    with pytest.raises(ValueError, match="^x must have two axes"):
        layers.batchnorm_forward(np.zeros(shape), one, one, {"mode": "train"})
    with pytest.raises(ValueError, match="^x must have two axes"):
        layers.layernorm_forward(np.zeros(shape), one, one, {})


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.25, 0.4, 0.7, 1])
def test_dropout_keeps_the_fraction_p_and_the_mean(p):
    np.random.seed(231)
    x = np.random.randn(500, 500) + 10
    out, _ = layers.dropout_forward(x, {"mode": "train", "p": p})
    assert (out != 0).mean() == pytest.approx(p, abs=0.01)
    assert out.mean() == pytest.approx(10, abs=0.1)
    np.testing.assert_allclose(out[out != 0], x[out != 0] / p)


def test_dropout_at_test_time_is_the_identity(rng):
    x = rng.standard_normal((5, 6))
    out, cache = layers.dropout_forward(x, {"mode": "test", "p": 0.3})
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(layers.dropout_backward(x, cache), x)


def test_dropout_gradient_with_a_seed(rng):
    param = {"mode": "train", "p": 0.6, "seed": 123}
    x = rng.standard_normal((10, 10)) + 10
    check_gradients(lambda x: layers.dropout_forward(x, param), (x,), layers.dropout_backward, rng)


def test_dropout_backward_belongs_to_its_forward_whatever_the_mode_is_by_then(rng):
    param = {"mode": "train", "p": 0.5, "seed": 1}
    out, cache = layers.dropout_forward(np.ones((4, 4)), param)
    param["mode"] = "test"
    np.testing.assert_array_equal(layers.dropout_backward(np.ones((4, 4)), cache), out)


@pytest.mark.parametrize("p", [0, -0.1, 1.5, None])
def test_dropout_refuses_a_p_that_is_no_probability_to_keep(p):
    with pytest.raises(ValueError, match="^p, the probability"):
        layers.dropout_forward(np.zeros(3), {"mode": "train", "p": p})


def test_dropout_refuses_another_mode():
    with pytest.raises(ValueError, match='dropout mode "eval"'):
        layers.dropout_forward(np.zeros(3), {"mode": "eval", "p": 0.5})


# --- all layers -------------------------------------------------------------------------------------------------------

FORWARDS = {
    "affine": (
        lambda x: layers.affine_forward(x, np.eye(3, dtype=x.dtype), np.zeros(3, x.dtype)),
        layers.affine_backward,
    ),
    "relu": (layers.relu_forward, layers.relu_backward),
    "batchnorm": (
        lambda x: layers.batchnorm_forward(x, np.ones(3), np.zeros(3), {"mode": "train"}),
        layers.batchnorm_backward,
    ),
    "batchnorm_alt": (
        lambda x: layers.batchnorm_forward(x, np.ones(3), np.zeros(3), {"mode": "train"}),
        layers.batchnorm_backward_alt,
    ),
    "layernorm": (lambda x: layers.layernorm_forward(x, np.ones(3), np.zeros(3), {}), layers.layernorm_backward),
    "dropout": (lambda x: layers.dropout_forward(x, {"mode": "train", "p": 0.5}), layers.dropout_backward),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layer_stays_in_the_dtype_of_its_data(name, dtype, rng):
    forward, backward = FORWARDS[name]
    out, cache = forward(rng.standard_normal((4, 3)).astype(dtype))
    gradients = backward(np.ones((4, 3), dtype), cache)
    assert out.dtype == dtype
    assert {g.dtype for g in (gradients if isinstance(gradients, tuple) else (gradients,))} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", FORWARDS)
def test_layer_leaves_its_inputs_alone(name, rng):
    forward, backward = FORWARDS[name]
    x, dout = rng.standard_normal((2, 4, 3))
    x_before, dout_before = x.copy(), dout.copy()
    _, cache = forward(x)
    backward(dout, cache)
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(dout, dout_before)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (3,), (4, 3, 1)])
def test_layer_refuses_a_dout_of_another_shape(name, shape, rng):
    forward, backward = FORWARDS[name]
    _, cache = forward(rng.standard_normal((4, 3)))
    with pytest.raises(ValueError, match=r"^dout must have the shape of out, \(4, 3\)"):
        backward(np.ones(shape), cache)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("dtype", [complex, object, str])
def test_layer_refuses_what_is_no_real_number(name, dtype):
    with pytest.raises(TypeError, match="^x must hold real numbers"):
        FORWARDS[name][0](np.ones((4, 3)).astype(dtype))


# --- sandwiches -------------------------------------------------------------------------------------------------------


# What every dict of settings may hold, with the function that takes it.
SETTINGS = {
    "bn_param": (
        lambda p: layers.batchnorm_forward(np.eye(3), np.ones(3), np.zeros(3), p),
        {"mode": "train", "eps": 1e-5, "momentum": 0.9, "running_mean": np.zeros(3), "running_var": np.zeros(3)},
    ),
    "ln_param": (
        lambda p: layers.layernorm_forward(np.eye(3), np.ones(3), np.zeros(3), p),
        {"eps": 1e-5, "mode": "train"},
    ),
    "gn_param": (
        lambda p: layers.spatial_groupnorm_forward(IMAGE, np.ones((1, 2, 1, 1)), np.zeros((1, 2, 1, 1)), 2, p),
        {"eps": 1e-5, "mode": "train"},
    ),
    "dropout_param": (lambda p: layers.dropout_forward(np.eye(3), p), {"mode": "train", "p": 0.5, "seed": 1}),
    "conv_param": (lambda p: layers.conv_forward_naive(IMAGE, FILTERS, np.zeros(1), p), {"stride": 1, "pad": 1}),
    "conv_param, fast": (lambda p: fast_layers.conv_forward_fast(IMAGE, FILTERS, [0], p), {"stride": 1, "pad": 1}),
    "pool_param": (
        lambda p: layers.max_pool_forward_naive(IMAGE, p),
        {"pool_height": 2, "pool_width": 2, "stride": 2},
    ),
    "pool_param, fast": (
        lambda p: fast_layers.max_pool_forward_fast(IMAGE, p),
        {"pool_height": 2, "pool_width": 2, "stride": 2},
    ),
    "norm_param": (
        lambda p: layer_utils.affine_norm_relu_forward(np.eye(4), np.eye(4), np.ones(4), None, None, p, "groupnorm"),
        {"num_groups": 2, "eps": 1e-5},
    ),
}
IMAGE, FILTERS = np.ones((1, 2, 4, 4)), np.ones((1, 2, 3, 3))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_not_known_is_refused_by_name(name):
    forward, settings = SETTINGS[name]
    name = name.split(",")[0]
    forward(dict(settings))
    given = {**settings, "momentun": 0.5}
    with pytest.raises(ValueError, match=f"^{name} has no 'momentun': its keys are '"):
        forward(given)
    assert given.keys() == settings.keys() | {"momentun"}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith(("conv", "pool"))])
def test_a_setting_that_is_missing_is_asked_for_by_name(name):
    forward, settings = SETTINGS[name]
    for key in settings:
        with pytest.raises(ValueError, match=f"^{name.split(',')[0]} must have '{key}'"):
            forward({other: value for other, value in settings.items() if other != key})


def test_affine_relu_gradients(rng):
    inputs = rng.standard_normal((3, 2, 2)), rng.standard_normal((4, 5)), rng.standard_normal(5)
    check_gradients(layer_utils.affine_relu_forward, inputs, layer_utils.affine_relu_backward, rng)


@pytest.mark.parametrize("normalization", ["batchnorm", "layernorm"])
def test_affine_norm_relu_gradients(normalization, rng):
    inputs = tuple(rng.standard_normal(shape) for shape in [(5, 2, 2), (4, 6), (6,), (6,), (6,)])

    def forward(x, w, b, gamma, beta):
        return layer_utils.affine_norm_relu_forward(x, w, b, gamma, beta, {"mode": "train"}, normalization)

    # The gradient by b of batch normalization is zero: a shift of a column is taken out again.
    out, cache = forward(*inputs)
    dout = rng.standard_normal(out.shape)
    gradients = layer_utils.affine_norm_relu_backward(dout, cache)
    for x, gradient in zip(inputs, gradients, strict=True):
        numerical = numerical_gradient(lambda _: forward(*inputs)[0], x, dout)
        np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-8)


def test_affine_norm_relu_is_its_three_layers(rng):
    x, w = rng.standard_normal((5, 4)), rng.standard_normal((4, 6))
    out, _ = layer_utils.affine_norm_relu_forward(x, w, np.zeros(6), np.ones(6), np.zeros(6), {"mode": "train"})
    a = x @ w
    np.testing.assert_allclose(out, np.maximum(0, (a - a.mean(axis=0)) / np.sqrt(a.var(axis=0) + 1e-5)), atol=1e-12)


# --- gradient_check ---------------------------------------------------------------------------------------------------


def test_eval_numerical_gradient_of_a_number(capsys):
    x = np.array([[1.0, 2.0], [3.0, -4.0]])
    gradient = gradient_check.eval_numerical_gradient(lambda x: float((x**3).sum()), x, verbose=False)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-8)
    np.testing.assert_array_equal(x, [[1, 2], [3, -4]])
    assert capsys.readouterr().out == ""
    gradient_check.eval_numerical_gradient(lambda x: float(x.sum()), x)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(")")[0] + ")" for line in lines] == ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"]
    assert float(lines[0].split(")")[1]) == pytest.approx(1)


def test_eval_numerical_gradient_in_float32_moves_x_where_it_lies(rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    before = x.copy()
    gradient = gradient_check.eval_numerical_gradient(lambda _: (x.astype(float) ** 2).sum(), x, verbose=False, h=1e-2)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(x, before)


def test_eval_numerical_gradient_in_float32_puts_x_back_after_an_error():
    x = np.ones(3, np.float32)
    with pytest.raises(ZeroDivisionError):
        gradient_check.eval_numerical_gradient(lambda _: 1 // 0, x, verbose=False)
    np.testing.assert_array_equal(x, 1)


def test_eval_numerical_gradient_refuses_whole_numbers():
    with pytest.raises(TypeError, match="^x must be an ndarray of float64"):
        gradient_check.eval_numerical_gradient(lambda x: x.sum(), np.arange(3), verbose=False)


def test_eval_numerical_gradient_array(rng):
    x, w, df = rng.standard_normal((3, 4)), rng.standard_normal((4, 2)), rng.standard_normal((3, 2))
    gradient = gradient_check.eval_numerical_gradient_array(lambda x: x @ w, x, df)
    np.testing.assert_allclose(gradient, df @ w.T, rtol=1e-8)


def test_eval_numerical_gradient_of_blobs_and_nets(rng):
    a, b = (SimpleNamespace(vals=rng.standard_normal((2, 3))) for _ in range(2))
    out = SimpleNamespace(vals=np.zeros((2, 3)), diffs=rng.standard_normal((2, 3)))

    def product(a, b, out):
        out.vals[:] = a.vals * b.vals

    net = SimpleNamespace(forward=lambda: product(a, b, out))
    for da, db in (
        gradient_check.eval_numerical_gradient_blobs(product, (a, b), out),
        gradient_check.eval_numerical_gradient_net(net, (a, b), out),
    ):
        np.testing.assert_allclose(da, out.diffs * b.vals, rtol=1e-7)
        np.testing.assert_allclose(db, out.diffs * a.vals, rtol=1e-7)


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-6), (np.float32, 0.05)])
def test_grad_check_sparse_tells_a_right_gradient_from_a_wrong_one(dtype, limit, capsys, rng):
    x = (rng.random((4, 5)) + 1).astype(dtype)
    before = x.copy()

    def errors(gradient):
        random.seed(0)
        gradient_check.grad_check_sparse(lambda x: (x.astype(float) ** 2).sum(), x, gradient, num_checks=7, h=1e-4)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 7
        assert all(line.startswith("numerical: ") and " analytic: " in line for line in lines)
        return [float(line.split("relative error: ")[1]) for line in lines]

    assert max(errors(2 * x)) < limit
    assert min(errors(3 * x)) > 0.1
    np.testing.assert_array_equal(x, before)


def test_grad_check_sparse_of_a_zero_gradient_has_no_error(capsys):
    gradient_check.grad_check_sparse(lambda x: 1.0, np.ones(2), np.zeros(2), num_checks=1)
    assert capsys.readouterr().out == "numerical: 0.000000 analytic: 0.000000, relative error: 0.000000e+00\n"
