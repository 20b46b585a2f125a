"""normext.cs231n's networks, update rules and Solver."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

from normext._core import updates
from normext.cs231n import layer_utils, optim
from normext.cs231n.classifiers.fc_net import FullyConnectedNet, TwoLayerNet
from normext.cs231n.gradient_check import eval_numerical_gradient
from normext.cs231n.solver import Solver
from normext.gradcheck import numerical_gradient

load_digits = pytest.importorskip("sklearn.datasets").load_digits

NORMALIZATIONS = [None, "batchnorm", "layernorm", "rmsnorm", "groupnorm"]


@pytest.fixture(scope="module")
def digits():
    """1000 images for training and 500 for validation, centred; (N, 1, 8, 8)."""
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 1, 8, 8) - X.mean()
    return {"X_train": X[:1000], "y_train": y[:1000], "X_val": X[1000:1500], "y_val": y[1000:1500]}


def net_of(normalization, hidden_dims, **settings):
    if normalization == "groupnorm":
        settings["num_groups"] = 2
    return FullyConnectedNet(hidden_dims, normalization=normalization, **settings)


def first(data, n):
    return {**data, "X_train": data["X_train"][:n], "y_train": data["y_train"][:n]}


# --- the networks -----------------------------------------------------------------------------------------------------


def test_weights_come_from_the_global_generator_in_order_and_are_cast():
    np.random.seed(7)
    net = FullyConnectedNet([4, 3], input_dim=5, num_classes=2, weight_scale=0.5, normalization="batchnorm")
    np.random.seed(7)
    for name, shape in {"W1": (5, 4), "W2": (4, 3), "W3": (3, 2)}.items():
        np.testing.assert_array_equal(net.params[name], (0.5 * np.random.randn(*shape)).astype(np.float32))
    for layer, size in {1: 4, 2: 3, 3: 2}.items():
        np.testing.assert_array_equal(net.params[f"b{layer}"], np.zeros(size))
    for layer, size in {1: 4, 2: 3}.items():
        np.testing.assert_array_equal(net.params[f"gamma{layer}"], np.ones(size))
        np.testing.assert_array_equal(net.params[f"beta{layer}"], np.zeros(size))
    assert len(net.params) == 10  # none for the last layer
    assert {p.dtype for p in net.params.values()} == {np.dtype(np.float32)}


def test_layer_settings_are_lists_and_dicts_whose_mode_follows_the_call():
    net = FullyConnectedNet([4, 3], input_dim=5, normalization="batchnorm", dropout_keep_ratio=0.5, seed=3)
    assert len(net.bn_params) == 2
    assert (net.dropout_param["p"], net.dropout_param["seed"]) == (0.5, 3)
    X = np.random.randn(6, 5)
    net.loss(X, np.arange(6))
    assert {p["mode"] for p in [*net.bn_params, net.dropout_param]} == {"train"}
    net.loss(X)
    assert {p["mode"] for p in [*net.bn_params, net.dropout_param]} == {"test"}
    assert set(net.bn_params[0]) == {"mode", "running_mean", "running_var"}

    plain = FullyConnectedNet([4, 3], input_dim=5)
    assert (plain.bn_params, plain.dropout_param) == ([], {})


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dropout_keep_ratio", [1, 0.75])
@pytest.mark.parametrize("reg", [0, 3.14])
def test_gradients_of_every_combination(normalization, dropout_keep_ratio, reg):
    np.random.seed(231)
    X, y = np.random.randn(5, 2, 6), np.random.randint(10, size=5)
    net = net_of(
        normalization,
        [8, 6],
        input_dim=12,
        dropout_keep_ratio=dropout_keep_ratio,
        seed=123,
        reg=reg,
        weight_scale=0.3,
        dtype=np.float64,
    )
    # Away from where it starts: off the kink of the relu, and with gamma and beta that matter.
    for name, p in net.params.items():
        if name[0] != "W":
            p += 0.3 * np.random.randn(*p.shape)
    _, grads = net.loss(X, y)
    assert grads.keys() == net.params.keys()
    for name, p in net.params.items():
        numerical = eval_numerical_gradient(lambda _: net.loss(X, y)[0], p, verbose=False)
        np.testing.assert_allclose(grads[name], numerical, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    "normalization, reg, published",
    [
        (None, 0, 2.3004790897684924),
        (None, 3.14, 7.052114776533016),
        ("batchnorm", 0, 2.2611955101340957),
        ("batchnorm", 3.14, 6.996533220108303),
    ],
)
def test_initial_losses_are_the_published_ones(normalization, reg, published):
    """As any right solution of the course's notebooks prints them; a notebook's second net draws after its first."""
    np.random.seed(231)
    X, y = np.random.randn(2, 15), np.random.randint(10, size=2)
    for each_reg in (0, 3.14):
        net = FullyConnectedNet(
            [20, 30], input_dim=15, reg=each_reg, weight_scale=5e-2, dtype=np.float64, normalization=normalization
        )
        if each_reg == reg:
            break
    assert net.loss(X, y)[0] == pytest.approx(published, rel=1e-12)


def test_regularization_adds_half_the_squared_weights_and_spares_the_rest():
    np.random.seed(0)
    net = FullyConnectedNet([6], input_dim=4, normalization="layernorm", weight_scale=1, dtype=np.float64)
    X, y = np.random.randn(3, 4), np.array([0, 5, 9])
    plain_loss, plain = net.loss(X, y)
    net.reg = 0.7
    loss, grads = net.loss(X, y)
    weights = net.params["W1"], net.params["W2"]
    assert loss - plain_loss == pytest.approx(0.5 * 0.7 * sum((w**2).sum() for w in weights))
    for name, grad in grads.items():
        np.testing.assert_allclose(grad - plain[name], 0.7 * net.params[name] if name[0] == "W" else 0, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_scores_are_those_of_test_mode(normalization):
    np.random.seed(0)
    net = net_of(normalization, [6], input_dim=4, dropout_keep_ratio=0.5, weight_scale=1, dtype=np.float64)
    X = np.random.randn(30, 4)
    for _ in range(3):
        net.loss(X, np.arange(30) % 10)
    p = net.params
    a = X @ p["W1"] + p["b1"]
    if normalization == "batchnorm":  # the running statistics of three batches like X, from zero
        weight = 1 - 0.9**3
        a = (a - weight * a.mean(axis=0)) / np.sqrt(weight * a.var(axis=0) + 1e-5)
    if normalization == "layernorm":
        a = (a - a.mean(axis=1, keepdims=True)) / np.sqrt(a.var(axis=1, keepdims=True) + 1e-5)
    if normalization == "rmsnorm":
        a = a / np.sqrt((a**2).mean(axis=1, keepdims=True) + 1e-6)
    if normalization == "groupnorm":
        groups = a.reshape(30, 2, 3)
        groups = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-5)
        a = groups.reshape(30, 6)
    np.testing.assert_allclose(net.loss(X), np.maximum(a, 0) @ p["W2"] + p["b2"], rtol=1e-9, atol=1e-12)
    assert net.loss(X[:0]).shape == (0, 10)


def test_rmsnorm_only_scales():
    net = FullyConnectedNet([4, 3], input_dim=5, normalization="rmsnorm")
    assert net.params.keys() == {"W1", "b1", "gamma1", "W2", "b2", "gamma2", "W3", "b3"}
    np.testing.assert_array_equal(net.params["gamma2"], np.ones(3))
    assert net.bn_params == [{"mode": "train"}] * 2


def test_groupnorm_of_one_group_is_layernorm_and_of_more_is_not():
    X, nets = np.random.randn(6, 5), []
    for settings in (
        {"normalization": "layernorm"},
        {"normalization": "groupnorm", "num_groups": 1},
        {"normalization": "groupnorm", "num_groups": 4},
    ):
        np.random.seed(0)
        nets.append(FullyConnectedNet([8, 12], input_dim=5, weight_scale=1, dtype=np.float64, **settings))
    layer, one, four = (net.loss(X) for net in nets)
    np.testing.assert_allclose(one, layer, rtol=1e-9, atol=1e-12)
    assert np.abs(four - layer).max() > 0.1
    assert [bn_param["num_groups"] for bn_param in nets[2].bn_params] == [4, 4]


@pytest.mark.parametrize(
    "normalization, norm_param", [("rmsnorm", {}), ("rmsnorm", {"eps": 0.5}), ("groupnorm", {"num_groups": 2})]
)
def test_affine_norm_relu_gradients(normalization, norm_param):
    rng = np.random.default_rng(231)
    inputs = [rng.standard_normal(shape) for shape in [(5, 2, 2), (4, 6), 6, 6, 6]]
    if normalization == "rmsnorm":
        inputs[4] = None

    def forward():
        return layer_utils.affine_norm_relu_forward(*inputs, norm_param, normalization)

    out, cache = forward()
    dout = rng.standard_normal(out.shape)
    gradients = layer_utils.affine_norm_relu_backward(dout, cache)
    assert (gradients[4] is None) == (inputs[4] is None)
    for x, gradient in zip(inputs, gradients, strict=True):
        if x is not None:
            numerical = numerical_gradient(lambda _: forward()[0], x, dout)
            np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "normalization, beta, error, message",
    [
        ("rmsnorm", np.zeros(4), ValueError, r"^beta must be None for 'rmsnorm', which only scales, got shape \(4,\)"),
        ("groupnorm", np.zeros(4), TypeError, "^num_groups must be an integer, got None"),
        ("instancenorm", None, ValueError, "one of 'batchnorm', 'layernorm', 'rmsnorm', 'groupnorm', got 'instancen"),
    ],
)
def test_affine_norm_relu_refuses_what_does_not_fit(normalization, beta, error, message):
    with pytest.raises(error, match=message):
        layer_utils.affine_norm_relu_forward(np.eye(4), np.eye(4), np.zeros(4), np.ones(4), beta, {}, normalization)


def test_dropout_with_a_seed_drops_the_same_units_every_time():
    X, y = np.random.randn(20, 5), np.arange(20) % 10
    seeded = FullyConnectedNet([50], input_dim=5, dropout_keep_ratio=0.5, weight_scale=1, seed=123)
    assert seeded.loss(X, y)[0] == seeded.loss(X, y)[0]
    free = FullyConnectedNet([50], input_dim=5, dropout_keep_ratio=0.5, weight_scale=1)
    assert free.loss(X, y)[0] != free.loss(X, y)[0]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_network_computes_in_its_dtype_whatever_the_data(normalization):
    X, y = np.random.randint(0, 256, (6, 5)).astype(np.uint8), np.arange(6)
    for dtype in (np.float32, np.float64):
        net = net_of(normalization, [4], input_dim=5, dtype=dtype)
        loss, grads = net.loss(X, y)
        assert isinstance(loss, float)
        assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}
        assert net.loss(X).dtype == dtype


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"normalization": "BatchNorm"},
            "^normalization must be one of 'batchnorm', 'layernorm', 'rmsnorm', 'groupnorm' or None, got 'BatchNorm'$",
        ),
        ({"normalization": ""}, "^normalization must"),
        # One number for each statistic: see NORMALIZATIONS.
        ({"normalization": "instancenorm"}, "^normalization must be one of 'batchnorm', .*, got 'instancenorm'$"),
        ({"normalization": "groupnorm"}, "^num_groups must be given for .* got num_groups None for 'groupnorm'"),
        ({"normalization": "layernorm", "num_groups": 2}, "no other, got num_groups 2 for 'layernorm'"),
        ({"num_groups": 2}, "^num_groups must be given .* got num_groups 2 for None"),
        (
            {"normalization": "groupnorm", "num_groups": 4, "hidden_dims": [8, 10]},
            r"^num_groups must be .* divides every hidden size .*, got 4 for the sizes \[8, 10\]",
        ),
        ({"normalization": "groupnorm", "num_groups": 10}, "^num_groups must be .* two features or more in a group"),
        ({"normalization": "groupnorm", "num_groups": 0}, "^num_groups must be a whole number .*, got 0 "),
        ({"normalization": "groupnorm", "num_groups": 2.0}, "^num_groups must be a whole number .*, got 2.0 "),
        ({"normalization": "groupnorm", "num_groups": "2"}, "^num_groups must be a whole number .*, got '2' "),
        ({"dropout_keep_ratio": 0}, "^dropout_keep_ratio must"),
        ({"dropout_keep_ratio": 1.5}, "^dropout_keep_ratio must"),
        ({"dtype": np.int32}, "^dtype must be float32 or float64, got int32"),
        ({"hidden_dims": [10, 0]}, "must be positive"),
        ({"num_classes": 0}, "must be positive"),
    ],
)
def test_network_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        FullyConnectedNet(**{"hidden_dims": [10], **arguments})


def test_network_refuses_bad_data():
    net = FullyConnectedNet([4], input_dim=5)
    with pytest.raises(ValueError, match=r"must fit, got \(2, 6\)"):
        net.loss(np.zeros((2, 6)))
    with pytest.raises(ValueError, match="^y must hold labels from 0 to 9, got 3 to 10"):
        net.loss(np.zeros((2, 5)), [3, 10])
    with pytest.raises(TypeError):
        net.loss(np.zeros((2, 5), complex))


def test_two_layer_net_computes_its_formula_and_the_published_losses():
    net = TwoLayerNet(input_dim=5, hidden_dim=50, num_classes=7, weight_scale=1e-3)
    assert net.params["W1"].std() == pytest.approx(1e-3, rel=0.3)
    net.params = {
        "W1": np.linspace(-0.7, 0.3, 5 * 50).reshape(5, 50),
        "b1": np.linspace(-0.1, 0.9, 50),
        "W2": np.linspace(-0.3, 0.4, 50 * 7).reshape(50, 7),
        "b2": np.linspace(-0.9, 0.1, 7),
    }
    X, y = np.linspace(-5.5, 4.5, 3 * 5).reshape(5, 3).T, np.asarray([0, 5, 1])
    p = net.params
    np.testing.assert_allclose(net.loss(X), np.maximum(X @ p["W1"] + p["b1"], 0) @ p["W2"] + p["b2"], rtol=1e-12)
    assert net.loss(X, y)[0] == pytest.approx(3.4702243556, abs=1e-10)
    net.reg = 1.0
    assert net.loss(X, y)[0] == pytest.approx(26.5948426952, abs=1e-10)


# --- update rules -----------------------------------------------------------------------------------------------------


def sgd(w, dw, s, t, learning_rate=0.01):
    return w - learning_rate * dw


def sgd_momentum(w, dw, s, t, learning_rate=0.01, momentum=0.9):
    s["velocity"] = momentum * s.get("velocity", 0) - learning_rate * dw
    return w + s["velocity"]


def rmsprop(w, dw, s, t, learning_rate=0.01, decay_rate=0.99, epsilon=1e-8):
    s["cache"] = decay_rate * s.get("cache", 0) + (1 - decay_rate) * dw**2
    return w - learning_rate * dw / (np.sqrt(s["cache"]) + epsilon)


def adam(w, dw, s, t, learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8):
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * dw
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * dw**2
    s["t"] = t
    return w - learning_rate * (s["m"] / (1 - beta1**t)) / (np.sqrt(s["v"] / (1 - beta2**t)) + epsilon)


RULES = {
    sgd: {"learning_rate": 0.3},
    sgd_momentum: {"learning_rate": 0.3, "momentum": 0.5},
    rmsprop: {"learning_rate": 0.3, "decay_rate": 0.7, "epsilon": 0.1},
    adam: {"learning_rate": 0.3, "beta1": 0.6, "beta2": 0.8, "epsilon": 0.1},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("defaults", [True, False])
def test_update_rule_is_its_formula_over_many_steps(rule, defaults):
    rng = np.random.default_rng(0)
    settings = {} if defaults else RULES[rule]
    w = expected = rng.standard_normal((4, 5))
    config, state = (None, {}) if defaults else (dict(settings), {})
    for t in range(1, 6):
        dw = rng.standard_normal((4, 5))
        w, config = getattr(optim, rule.__name__)(w, dw, config)
        expected = rule(expected, dw, state, t, **settings)
        np.testing.assert_allclose(w, expected, rtol=1e-12)
        for name, value in state.items():
            np.testing.assert_allclose(config[name], value, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_update_rule_changes_no_array_in_place_and_writes_into_the_config_it_was_given(rule):
    w, dw = np.linspace(-0.4, 0.6, 20).reshape(4, 5), np.linspace(-0.6, 0.4, 20).reshape(4, 5)
    state = {name: np.linspace(0.6, 0.9, 20).reshape(4, 5) for name in ("velocity", "cache", "m", "v")}
    before = {name: a.copy() for name, a in {"w": w, "dw": dw, **state}.items()}
    config = {"learning_rate": 1e-2, "t": 5, **state}
    next_w, returned = getattr(optim, rule.__name__)(w, dw, config=config)
    assert returned is config
    assert not np.shares_memory(next_w, w)
    for name, a in {"w": w, "dw": dw, **state}.items():
        np.testing.assert_array_equal(a, before[name])
    expected = dict(before)
    np.testing.assert_allclose(next_w, rule(w, dw, expected, 6, learning_rate=1e-2), rtol=1e-12)
    for name in state:
        np.testing.assert_allclose(config[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_update_rule_keeps_the_dtype_of_w(rule):
    """A learning rate of np.float64, as from ``10 ** np.random.uniform(-4, -3)``, must not widen a float32 network."""
    config = {"learning_rate": np.float64(1e-3)}
    w = np.ones((3, 2), np.float32)
    for dtype in (np.float32, np.float64):
        w, config = getattr(optim, rule.__name__)(w, np.ones((3, 2), dtype), config)
        assert w.dtype == np.float32
        assert {a.dtype for a in config.values() if isinstance(a, np.ndarray)} <= {np.dtype(np.float32)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_update_rule_takes_a_parameter_of_any_shape(rule):
    for shape in [(), (0,), (2, 3, 4)]:
        next_w, _ = getattr(optim, rule.__name__)(np.ones(shape), np.ones(shape))
        assert np.shape(next_w) == shape
    transposed = np.ones((4, 3)).T
    assert getattr(optim, rule.__name__)(transposed, np.ones((3, 4)))[0].shape == (3, 4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_update_rule_refuses_a_gradient_of_another_shape(rule):
    with pytest.raises(ValueError, match=r"^dw must have the shape of w, \(3, 2\), got \(2,\)"):
        getattr(optim, rule.__name__)(np.ones((3, 2)), np.ones(2))


STATES = {"velocity": sgd_momentum, "cache": rmsprop, "m": adam, "v": adam}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), (3, 2, 1), (0,)])
def test_update_rule_refuses_the_state_of_another_parameter(state, shape):
    """As of one config for b and then W. Adam read beyond its end; the others stretched it, as NumPy does."""
    config = {state: np.ones(shape)}
    got = re.escape(f"got float64 of shape {shape}")
    with pytest.raises(
        ValueError, match=rf"^config\['{state}'\] must be an array of the shape of w, \(3, 2\), .* {got}"
    ):
        getattr(optim, STATES[state].__name__)(np.ones((3, 2)), np.ones((3, 2)), config)
    assert list(config) == [state]


@pytest.mark.parametrize("rule", [sgd_momentum, rmsprop, adam], ids=lambda rule: rule.__name__)
def test_update_rule_takes_one_number_for_a_state_as_its_formula_does(rule):
    rng = np.random.default_rng(0)
    w, dw = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    state = {name: 0.5 for name, of in STATES.items() if of is rule}
    next_w, config = getattr(optim, rule.__name__)(w, dw, dict(state))
    np.testing.assert_allclose(next_w, rule(w, dw, state, 1), rtol=1e-12)
    assert {np.shape(config[name]) for name, of in STATES.items() if of is rule} == {(4, 5)}


@pytest.mark.parametrize(
    "rule, config, message",
    [
        (adam, {"learning_rte": 1e-3}, "config has no 'learning_rte': its keys are 'learning_rate', "),
        (adam, {"m": "zeros"}, r"config\['m'\] must be an array .* got <U5"),
        (adam, {"v": None}, r"config\['v'\] must be an array .* got object"),
        (adam, {"t": 1.5}, r"config\['t'\] must be a whole number from 0 up, got 1.5"),
        (adam, {"t": -1}, r"config\['t'\] must be a whole number from 0 up, got -1"),
        (adam, {"t": np.nan}, r"config\['t'\] must be a number, got nan"),
        (adam, {"beta1": 1}, r"config\['beta1'\] must be from 0 up, and below 1, got 1.0"),
        (adam, {"beta2": 1.5}, r"config\['beta2'\] must be from 0 up, and below 1, got 1.5"),
        (sgd, {"learning_rate": None}, r"config\['learning_rate'\] must be a number, got None"),
        (rmsprop, {"epsilon": np.ones(2)}, r"config\['epsilon'\] must be a number, got array"),
        (sgd_momentum, {"momentum": "big"}, r"config\['momentum'\] must be a number, got 'big'"),
    ],
)
def test_update_rule_refuses_settings_that_cannot_be(rule, config, message):
    before = dict(config)
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(optim, rule.__name__)(np.ones(3), np.ones(3), config)
    assert config == before


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_update_rule_refuses_whole_numbers_which_would_cut_the_gradient_off(rule):
    with pytest.raises(TypeError, match="^w must be an array of floats, got dtype int64"):
        getattr(optim, rule.__name__)(np.ones(3, np.int64), np.full(3, 0.5))


def test_the_compiled_step_of_adam_checks_what_it_is_given():
    good, numbers = np.ones((4, 6)), (0.9, 0.999, 1e-3, 1e-8)
    for bad in (good[:3], good[:, ::2], good.T, good.astype(np.float32), good.astype(">f8"), np.ones(24, "i8")):
        for place in range(4):
            arrays = [good] * 4
            arrays[place] = bad
            with pytest.raises(ValueError, match="must be contiguous arrays of one size and type"):
                updates.adam(*arrays, *numbers)
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        updates.adam(*[np.ones(3, np.int64)] * 4, *numbers)
    with pytest.raises(TypeError):
        updates.adam(good, good, None, good, *numbers)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_of_adam_is_its_formula_to_the_bit(dtype):
    """With or without vectors, on every instruction set: each operation rounds as NumPy's does."""
    rng = np.random.default_rng(0)
    w, dw, m = rng.standard_normal((3, 1003)).astype(dtype)
    v = rng.random(1003).astype(dtype)
    numbers = beta1, beta2, rate, epsilon = 0.9, 0.999, 1e-3, 1e-8
    for n in (*range(40), 1003):
        a = [array[:n] for array in (w, dw, m, v)]
        next_m = a[2] * dtype(beta1) + a[1] * dtype(1 - beta1)
        next_v = a[3] * dtype(beta2) + a[1] * a[1] * dtype(1 - beta2)
        next_w = a[0] - next_m / (np.sqrt(next_v) + dtype(epsilon)) * dtype(rate)
        for result, expected in zip(updates.adam(*a, *numbers), (next_w, next_m, next_v), strict=True):
            np.testing.assert_array_equal(result, expected)


# --- Solver -----------------------------------------------------------------------------------------------------------


class Mean:
    """The smallest model there is: one parameter, loss 0.5 * (w - x)**2, averaged; class 0 as soon as w > 0."""

    def __init__(self):
        self.params = {"w": np.array([-1.0])}
        self.batches = []

    def loss(self, X, y=None):
        w = self.params["w"][0]
        if y is None:
            return np.tile([w, 0.0], (len(X), 1))
        self.batches.append(X[:, 0].copy())
        return 0.5 * np.mean((w - X) ** 2), {"w": np.array([np.mean(w - X)])}


NUMBERS = {
    "X_train": np.arange(20.0)[:, None],
    "y_train": np.arange(20) % 2,
    "X_val": np.arange(10.0)[:, None],
    "y_val": np.array([0] * 7 + [1] * 3),
}


def solve(model, data, **settings):
    solver = Solver(model, data, **{"verbose": False, **settings})
    solver.train()
    return solver


def test_solver_draws_batches_and_follows_the_gradient():
    model = Mean()
    np.random.seed(5)
    solver = solve(model, NUMBERS, batch_size=8, num_epochs=3, optim_config={"learning_rate": 0.1}, lr_decay=0.5)
    assert len(model.batches) == len(solver.loss_history) == 3 * (20 // 8)

    np.random.seed(5)
    w, rate = -1.0, 0.1
    for i, (batch, loss) in enumerate(zip(model.batches, solver.loss_history, strict=True)):
        np.testing.assert_array_equal(batch, NUMBERS["X_train"][np.random.choice(20, 8), 0])
        assert loss == pytest.approx(0.5 * np.mean((w - batch) ** 2))
        w -= rate * np.mean(w - batch)
        if i % 2 == 1:
            rate *= 0.5
    assert solver.optim_configs["w"]["learning_rate"] == pytest.approx(rate)


def test_solver_takes_a_batch_larger_than_the_data():
    assert len(solve(Mean(), NUMBERS, batch_size=50, num_epochs=4).loss_history) == 4


def test_solver_puts_the_best_parameters_back():
    """The rate is so high that w is thrown from side to side, further each time: right, wrong, right, wrong."""
    model = Mean()
    data = {**NUMBERS, "X_train": np.zeros((4, 1)), "y_train": np.zeros(4, int)}
    solver = solve(model, data, batch_size=4, num_epochs=4, optim_config={"learning_rate": 2.5})
    assert solver.val_acc_history == [0.7, 0.3, 0.7, 0.3]
    assert solver.train_acc_history == [1, 0, 1, 0]
    assert solver.best_val_acc == 0.7
    assert model.params["w"] == solver.best_params["w"] == 1.5  # -1 - 2.5 * (-1 - 0); the first of the two


def test_solver_checks_after_the_first_iteration_and_every_epoch():
    solver = solve(Mean(), NUMBERS, batch_size=5, num_epochs=3)
    assert len(solver.train_acc_history) == len(solver.val_acc_history) == 4
    assert solver.epoch == 3


def test_solver_trains_on_and_puts_the_best_back_with_its_running_statistics(digits):
    np.random.seed(0)
    net = FullyConnectedNet([20], input_dim=64, normalization="batchnorm", weight_scale=0.1)
    data = first(digits, 100)
    solver = solve(net, data, batch_size=25, num_epochs=6, update_rule="adam", optim_config={"learning_rate": 1e-2})
    best, best_val_acc = {name: p.copy() for name, p in solver.best_params.items()}, solver.best_val_acc
    for config in solver.optim_configs.values():
        config["learning_rate"] = 1e3  # nothing good can come of it
    solver.train()
    assert len(solver.loss_history) == 2 * 6 * 4
    assert solver.val_acc_history[-1] < solver.best_val_acc == best_val_acc
    for name, p in net.params.items():
        np.testing.assert_array_equal(p, best[name])
    assert solver.check_accuracy(data["X_val"], data["y_val"]) == best_val_acc


def test_solver_prints_as_the_course_does(capsys):
    np.random.seed(0)
    solve(Mean(), NUMBERS, batch_size=5, num_epochs=2, print_every=3, verbose=True)
    kinds = [line.split(")")[0] + ")" for line in capsys.readouterr().out.splitlines()]
    assert kinds == [
        "(Iteration 1 / 8)",
        "(Epoch 0 / 2)",
        "(Iteration 4 / 8)",
        "(Epoch 1 / 2)",
        "(Iteration 7 / 8)",
        "(Epoch 2 / 2)",
    ]
    model = Mean()
    data = {name: value[:1] for name, value in NUMBERS.items()}
    solve(model, data, num_epochs=1, verbose=True)
    assert (
        capsys.readouterr().out
        == "(Iteration 1 / 1) loss: 0.500000\n(Epoch 1 / 1) train acc: 0.000000; val_acc: 0.000000\n"
    )
    solve(Mean(), NUMBERS)
    assert capsys.readouterr().out == ""


def test_check_accuracy_counts_hits():
    model = SimpleNamespace(params={}, loss=lambda X: X)
    solver = Solver(model, NUMBERS)
    scores = np.eye(3)[np.array([0, 1, 2, 0, 1, 2, 0])]
    y = np.array([0, 1, 2, 2, 1, 0, 0])
    for batch_size in (1, 3, 7, 100):
        assert solver.check_accuracy(scores, y, batch_size=batch_size) == pytest.approx(5 / 7)
    np.random.seed(0)
    sample = np.random.choice(7, 4)
    np.random.seed(0)
    expected = (scores.argmax(axis=1) == y)[sample].mean()
    assert solver.check_accuracy(scores, y, num_samples=4, batch_size=3) == expected
    assert solver.check_accuracy(scores, y, num_samples=7) == pytest.approx(5 / 7)
    with pytest.raises(ValueError, match="^X must hold at least one"):
        solver.check_accuracy(scores[:0], y[:0])
    with pytest.raises(ValueError, match="^y must hold one label an example of X"):
        solver.check_accuracy(scores, y[:3])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_training_is_the_same_for_the_same_seed(normalization, digits):
    def train(seed):
        np.random.seed(seed)
        net = net_of(normalization, [30, 30], input_dim=64, dropout_keep_ratio=0.8, weight_scale=0.1)
        return solve(net, first(digits, 200), num_epochs=2, batch_size=20, update_rule="adam", num_train_samples=50)

    one, same, other = train(1), train(1), train(2)
    assert one.loss_history == same.loss_history
    assert one.train_acc_history == same.train_acc_history
    assert one.loss_history != other.loss_history
    for name, p in one.model.params.items():
        np.testing.assert_array_equal(p, same.model.params[name])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("update_rule", ["sgd", "sgd_momentum", "rmsprop", "adam"])
def test_network_overfits_fifty_images(normalization, update_rule, digits):
    np.random.seed(231)
    net = net_of(normalization, [50, 50], input_dim=64, weight_scale=0.1)
    data = first(digits, 50)
    rate = {"sgd": 0.05, "sgd_momentum": 0.01, "rmsprop": 1e-3, "adam": 3e-3}[update_rule]
    solver = solve(
        net, data, num_epochs=40, batch_size=25, update_rule=update_rule, optim_config={"learning_rate": rate}
    )
    assert max(solver.train_acc_history) > 0.95
    assert np.mean(solver.loss_history[-10:]) < 0.5 * solver.loss_history[0]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"learning_rate": 1, "epochs": 2}, ValueError, "^Unrecognized arguments 'learning_rate', 'epochs'"),
        ({"update_rule": "adagrad"}, ValueError, "^update_rule must be one of .*'adam'.*, got 'adagrad'"),
        ({"update_rule": "__doc__"}, ValueError, "^update_rule"),
        ({"optim_config": {"lr": 1}}, ValueError, "^optim_config has no 'lr': its keys are 'learning_rate'"),
        ({"batch_size": 0}, ValueError, "^batch_size must be a whole number from 1 up, got 0"),
        ({"batch_size": 2.5}, ValueError, "^batch_size"),
        ({"num_epochs": 0}, ValueError, "^num_epochs"),
        ({"print_every": 0}, ValueError, "^print_every"),
        ({"num_train_samples": 0}, ValueError, "^num_train_samples"),
        ({"num_val_samples": -1}, ValueError, "^num_val_samples"),
        ({"checkpoint_name": "no/such/folder/run"}, FileNotFoundError, "no folder 'no/such/folder'"),
    ],
)
def test_solver_refuses_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        Solver(Mean(), NUMBERS, **changes)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"X_train": NUMBERS["X_train"], "X_val": NUMBERS["X_val"]}, "^data must have X_train and y_train: no y_train"),
        ({**NUMBERS, "X_train": np.zeros((0, 1)), "y_train": np.zeros(0)}, "^X_train must hold at least one example"),
        ({**NUMBERS, "X_val": np.zeros((0, 1)), "y_val": np.zeros(0)}, "^X_val must hold at least one example"),
        ({**NUMBERS, "y_train": np.zeros(19)}, "^y_train must hold one label an example of X_train"),
    ],
)
def test_solver_refuses_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        Solver(Mean(), data)


def test_checkpoints_hold_the_network_and_the_histories_without_pickle(tmp_path, digits):
    np.random.seed(0)
    net = FullyConnectedNet([20], input_dim=64, normalization="batchnorm", weight_scale=0.1)
    solver = Solver(
        net,
        first(digits, 100),
        num_epochs=2,
        batch_size=50,
        update_rule="adam",
        optim_config={"learning_rate": np.float32(0.25)},
        verbose=False,
        checkpoint_name=str(tmp_path / "run"),
    )
    solver.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run_epoch_1.npz", "run_epoch_2.npz"]  # and no temporary file

    with np.load(tmp_path / "run_epoch_2.npz", allow_pickle=False) as checkpoint:
        saved = {name: checkpoint[name] for name in checkpoint.files}
    settings = json.loads(str(saved.pop("solver")))
    assert settings["update_rule"] == "adam"
    assert settings["optim_config"] == {"learning_rate": 0.25}
    assert settings["epoch"] == 2
    assert settings["loss_history"] == solver.loss_history
    assert settings["val_acc_history"] == solver.val_acc_history

    other = FullyConnectedNet([20], input_dim=64, normalization="batchnorm")
    other.params = {name.removeprefix("params/"): a for name, a in saved.items() if name.startswith("params/")}
    other.bn_params = [{key: saved[f"bn_params/0/{key}"] for key in ("running_mean", "running_var")}]
    accuracy = Solver(other, digits).check_accuracy(digits["X_val"], digits["y_val"])
    assert accuracy == solver.val_acc_history[-1]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    model = Mean()
    solver = Solver(model, NUMBERS, num_epochs=1, verbose=False, checkpoint_name=str(tmp_path / "run"))
    (tmp_path / "run_epoch_1.npz").mkdir()  # in the way
    with pytest.raises(OSError):
        solver.train()
    assert [p.name for p in tmp_path.iterdir()] == ["run_epoch_1.npz"]


# --- Going on from a checkpoint ---------------------------------------------------------------------------------------


def deep(digits, *, normalization="batchnorm", keep=1.0, seed=3, **settings):
    """A Solver of a net of two hidden layers, from a seed."""
    np.random.seed(seed)
    net = net_of(normalization, [30, 30], input_dim=64, dropout_keep_ratio=keep, weight_scale=0.1)
    options = {"update_rule": "adam", "num_epochs": 4, "batch_size": 20, "num_train_samples": 50, "lr_decay": 0.9}
    return Solver(net, first(digits, 100), verbose=False, **{**options, **settings})


def state_of(solver):
    """Everything that a training leaves behind, comparable."""
    names = ("loss_history", "train_acc_history", "val_acc_history", "best_val_acc", "epoch")
    dicts = [solver.model.params, solver.best_params, *solver.optim_configs.values(), *solver.model.bn_params]
    bits = [{name: np.asarray(value).tobytes() for name, value in each.items()} for each in dicts]
    return [getattr(solver, name) for name in names], bits, str(np.random.get_state())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("update_rule", ["sgd", "sgd_momentum", "rmsprop", "adam"])
def test_a_resumed_training_ends_with_the_same_bits(normalization, update_rule, digits, tmp_path):
    settings = {"normalization": normalization, "update_rule": update_rule, "keep": 0.8}
    whole = deep(digits, **settings, checkpoint_name=str(tmp_path / "run"))
    whole.train()
    expected = state_of(whole)
    for epoch in (1, 3, 4):  # after the last there is nothing left but to put the best parameters back
        resumed = deep(digits, **settings, seed=99)
        resumed.load_checkpoint(tmp_path / f"run_epoch_{epoch}.npz")
        assert resumed.epoch == epoch and len(resumed.loss_history) == 5 * epoch
        resumed.train()
        assert state_of(resumed) == expected


def test_a_resumed_training_may_go_on_for_longer_and_again(digits, tmp_path):
    deep(digits, num_epochs=2, checkpoint_name=str(tmp_path / "run")).train()
    solver = deep(digits, num_epochs=5)
    solver.load_checkpoint(tmp_path / "run_epoch_2.npz")
    solver.train()
    assert solver.epoch == 5
    solver.train()  # as ever: so many epochs more
    assert solver.epoch == 10 and len(solver.loss_history) == 50


def test_a_resumed_training_prints_where_it_is(digits, tmp_path, capsys):
    deep(digits, num_epochs=2, checkpoint_name=str(tmp_path / "run")).train()
    solver = deep(digits, num_epochs=3, print_every=5)
    solver.verbose = True
    solver.load_checkpoint(tmp_path / "run_epoch_2.npz")
    solver.train()
    kinds = [line.split(")")[0] + ")" for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["(Iteration 11 / 15)", "(Epoch 3 / 3)"]


@pytest.fixture
def checkpoint(digits, tmp_path):
    deep(digits, num_epochs=1, checkpoint_name=str(tmp_path / "run")).train()
    return tmp_path / "run_epoch_1.npz"


def altered(checkpoint, **changes):
    """The checkpoint with other arrays, or without those that are None."""
    with np.load(checkpoint) as saved:
        arrays = {name: saved[name] for name in saved.files}
    arrays |= {name.replace("__", "/"): value for name, value in changes.items()}
    np.savez(checkpoint, **{name: value for name, value in arrays.items() if value is not None})


def assert_refused(solver, checkpoint, message):
    """Loading it raises, and changes nothing."""
    before = state_of(solver)
    with pytest.raises(ValueError, match=rf"run_epoch_1.npz does not fit this training, or is damaged: {message}"):
        solver.load_checkpoint(checkpoint)
    assert state_of(solver) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"update_rule": "sgd"}, "update_rule is 'sgd' here, and was 'adam'"),
        ({"batch_size": 10}, "batch_size is 10 here, and was 20"),
        ({"lr_decay": 1.0}, "lr_decay is 1.0 here, and was 0.9"),
        ({"optim_config": {"learning_rate": 0.5}}, "optim_config is {'learning_rate': 0.5} here, and was {}"),
        ({"num_train_samples": None}, "num_train_samples is None here, and was 50"),
        ({"normalization": None}, "params must be W1, b1, .*, got .*gamma1"),
        ({"normalization": "rmsnorm"}, "params must be .*gamma1.*, got .*beta1"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(settings, message, checkpoint, digits):
    assert_refused(deep(digits, **settings), checkpoint, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"params__W1": np.ones((64, 20), np.float32)},
            r"params/W1 must be float32 of shape \(64, 30\), got .*\(64, 20\)",
        ),
        ({"best_params__b1": np.ones(30)}, "best_params/b1 must be float32 .*, got float64"),
        ({"params__W9": np.ones(3)}, "params must be W1, .*, got .*W9"),
        ({"params__W1": None}, "params must be W1"),
        (
            {"optim_configs__W1__m": np.ones(3)},
            r"optim_configs/W1: config\['m'\] must be .*, got float64 of shape \(3,\)",
        ),
        ({"optim_configs__W1__learning_rate": None}, "there is no optim_configs/W1/learning_rate"),
        ({"bn_params__0__mode": None}, "bn_params must be those of 2 layers"),
        ({"best_bn_params__2__mode": np.array("test")}, "best_bn_params must be those of 2 layers, got 0, 1, 2"),
        ({"random__state__pos": np.array(10**6)}, "random is not the state of a generator"),
        ({"random__state__pos": np.array(-1)}, "random is not the state of a generator"),
        ({"random__state__key": np.zeros(3, np.uint32)}, "random is not the state of a generator"),
        ({"random__state__key": np.zeros(624, np.uint64)}, "random is not the state of a generator"),
        ({"random__gauss": np.array("0")}, "random is not the state of a generator"),
        ({"random__bit_generator": np.array("PCG64")}, "random is not the state of a generator"),
        ({"random__has_gauss": None}, "KeyError: 'random/has_gauss'"),
        ({"solver": None}, "KeyError: 'solver'"),
        ({"solver": np.array("[" * 100_000)}, "RecursionError"),
        ({"solver": np.array("{}")}, "KeyError"),
        ({"solver": np.ones(3)}, ""),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(changes, message, checkpoint, digits):
    altered(checkpoint, **changes)
    assert_refused(deep(digits), checkpoint, message)


@pytest.mark.parametrize(
    "change",
    [{"epoch": 0}, {"epoch": "1"}, {"loss_history": "12345"}, {"val_acc_history": []}, {"train_acc_history": [[0.5]]}],
    ids=str,
)
def test_a_checkpoint_with_histories_that_cannot_be_is_refused(change, checkpoint, digits):
    with np.load(checkpoint) as saved:
        settings = json.loads(str(saved["solver"]))
    altered(checkpoint, solver=np.array(json.dumps({**settings, **change})))
    with pytest.raises(ValueError, match="run_epoch_1.npz does not fit this training, or is damaged"):
        deep(digits).load_checkpoint(checkpoint)


def test_a_file_that_is_no_checkpoint_is_refused(checkpoint, digits, tmp_path):
    solver = deep(digits)
    with np.load(checkpoint) as saved:
        arrays = dict(saved)
    others = {"text.npz": b"text", "empty.npz": b"", "array.npy": b"", "packed.npz": b"", "objects.npz": b""}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez_compressed(tmp_path / "packed.npz", **arrays)  # a few bytes could become any number
    np.savez(tmp_path / "objects.npz", **arrays, more=np.array([print]))
    for name in others:
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint, or is damaged"):
            solver.load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        solver.load_checkpoint(tmp_path / "missing.npz")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.npz")
        with pytest.raises(ValueError, match="pipe.npz is not a plain file"):
            solver.load_checkpoint(tmp_path / "pipe.npz")


def test_a_damaged_checkpoint_is_refused_wherever_it_is_damaged(checkpoint, digits):
    """Two bytes here and there are changed in turn, and the file is cut there: nothing passes that differs."""
    solver, whole, random = deep(digits), checkpoint.read_bytes(), np.random.default_rng(0)
    solver.load_checkpoint(checkpoint)
    expected = state_of(solver)
    for place in random.integers(0, len(whole), len(whole) // 300):
        for damaged in (bytearray(whole), bytearray(whole[:place])):
            damaged[place : place + 2] = random.bytes(min(2, len(damaged) - place))
            checkpoint.write_bytes(damaged)
            try:
                solver.load_checkpoint(checkpoint)
            except ValueError as error:
                assert "run_epoch_1.npz" in str(error)
            assert state_of(solver) == expected


def test_a_checkpoint_that_cannot_hold_the_model_says_so(tmp_path):
    model = Mean()
    model.bn_params = [{"running_mean": None}]
    solver = Solver(model, NUMBERS, num_epochs=1, verbose=False, checkpoint_name=str(tmp_path / "run"))
    with pytest.raises(TypeError, match="^a checkpoint holds arrays, .*, and bn_params/0/running_mean is None"):
        solver.train()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("run_epoch_1.npz", "run_epoch_1.npz.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    Solver(Mean(), NUMBERS, num_epochs=1, verbose=False, checkpoint_name=str(tmp_path / "run")).train()
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "run_epoch_1.npz").is_symlink()
