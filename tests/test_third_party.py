"""What others test their norms with, and their norms: ONNX, PyTorch, Keras, Flax; each skips where it is not installed.

PyTorch's samples of operators are in test_torch.
"""

import importlib.util
import os

import numpy as np
import pytest

import normext

# ONNX ------------------------------------------------------------


def onnx_attributes(node):
    from onnx.helper import get_attribute_value

    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}


def batch_normalization(x, scale, bias, mean, var, epsilon=1e-5, momentum=0.9, training_mode=0, spatial=1):
    mean, var = mean.copy(), var.copy()
    options = {"running_mean": mean, "running_var": var, "training": bool(training_mode), "momentum": momentum}
    y, _ = normext.batch_norm(x, scale, bias, eps=epsilon, **options)
    return (y, mean, var) if training_mode else (y,)


def layer_normalization(x, scale, bias=None, axis=-1, epsilon=1e-5, stash_type=1):
    y, cache = normext.layer_norm(x, scale, bias, axis=axis, eps=epsilon)
    kept = x.shape[: cache.axis] + (1,) * (x.ndim - cache.axis)
    return y, cache.mean.reshape(kept), cache.rstd.reshape(kept)


def group_normalization(x, scale, bias, num_groups, epsilon=1e-5, stash_type=1):
    y, _ = normext.group_norm(x, num_groups, scale, bias, eps=epsilon)
    return (y,)


def instance_normalization(x, scale, bias, epsilon=1e-5):
    y, _ = normext.instance_norm(x, scale, bias, eps=epsilon)
    return (y,)


def rms_normalization(x, scale, axis=-1, epsilon=1e-5, stash_type=1):
    y, _ = normext.rms_norm(x, scale, axis=axis, eps=epsilon)
    return (y,)


ONNX_OPERATORS = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "RMSNormalization": rms_normalization,
}


@pytest.mark.filterwarnings("ignore")  # onnx' own
def test_onnx_node_tests():
    """Those of one node; where onnx writes the same out in other operators, there is nothing of ours to run."""
    pytest.importorskip("onnx")
    from onnx.backend.test.loader import load_model_tests

    seen = dict.fromkeys(ONNX_OPERATORS, 0)
    for case in load_model_tests(kind="node"):
        nodes = case.model.graph.node
        if len(nodes) != 1 or nodes[0].op_type not in ONNX_OPERATORS:
            continue
        for inputs, outputs in case.data_sets:
            found = ONNX_OPERATORS[nodes[0].op_type](*inputs, **onnx_attributes(nodes[0]))
            for mine, theirs in zip(found, outputs):
                np.testing.assert_allclose(mine, theirs, rtol=case.rtol, atol=max(case.atol, 1e-6), err_msg=case.name)
        seen[nodes[0].op_type] += 1
    assert all(seen.values()), seen
    print(f"{sum(seen.values())} node tests: {seen}")


# PyTorch ------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorchs_samples_of_modules(dtype, training, monkeypatch):
    """Every module of normext.torch on PyTorch's own samples of it, in the compiled loops whatever the size."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    import warnings

    import normext.torch as ours

    for norm in ours._SMALLEST:
        monkeypatch.setitem(ours._SMALLEST, norm, ours._Smallest(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db

    limit, compared = {"float64": 1e-10, "float32": 3e-5}[dtype], 0
    for info in module_db:
        name = info.module_cls.__name__
        if not hasattr(ours, name) or name not in ours.__all__:
            continue
        samples = info.module_inputs_func(
            info, device="cpu", dtype=getattr(torch, dtype), requires_grad=True, training=training
        )
        for sample in samples:
            outcomes = []
            for kind in (ours, torch.nn):
                torch.manual_seed(0)
                made = sample.constructor_input
                module = getattr(kind, name)(*made.args, **made.kwargs).to(getattr(torch, dtype)).train(training)
                given = [
                    a.detach().clone().requires_grad_() if torch.is_tensor(a) else a for a in sample.forward_input.args
                ]
                y = module(*given, **sample.forward_input.kwargs)
                torch.manual_seed(1)
                gradients = torch.autograd.grad(y, [*given, *module.parameters()], torch.randn_like(y))
                outcomes.append([y, *gradients, *module.buffers()])
            for mine, theirs in zip(*outcomes, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=limit, atol=10 * limit, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared > 50
    print(f"{compared} samples")


# Keras ------------------------------------------------------------

needs_keras = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("keras", "jax")), reason="needs keras, and jax for it"
)


@needs_keras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("shape", "axis"), [((8, 6), -1), ((4, 5, 3, 6), -1), ((4, 6, 5, 3), 1)])
def test_keras(shape, axis):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    rng = np.random.default_rng(0)
    x, channels = rng.normal(3, 2, shape).astype(np.float32), shape[axis]
    gamma, beta = rng.normal(1, 0.5, (2, channels)).astype(np.float32)

    def close(found, wanted):
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-4, atol=1e-5)

    layer = keras.layers.BatchNormalization(axis=axis, momentum=0.75, epsilon=1e-3)
    layer.build(shape)
    layer.set_weights([gamma, beta, beta, np.exp(gamma)])
    running = beta.copy(), np.exp(gamma)
    for training in (True, False):
        options = {"running_mean": running[0], "running_var": running[1], "momentum": 0.75, "training": training}
        y, _ = normext.batch_norm(x, gamma, beta, axis=axis, eps=1e-3, **options)
        close(layer(x, training=training), y)
        for mine, theirs in zip(running, layer.get_weights()[2:]):
            close(theirs, mine)

    layer = keras.layers.GroupNormalization(groups=3, axis=axis, epsilon=1e-3)
    layer.build(shape)
    layer.set_weights([gamma, beta])
    close(layer(x), normext.group_norm(x, 3, gamma, beta, axis=axis, eps=1e-3)[0])
    if axis == -1:
        layer = keras.layers.LayerNormalization(epsilon=1e-3)
        layer.build(shape)
        layer.set_weights([gamma, beta])
        close(layer(x), normext.layer_norm(x, gamma, beta, eps=1e-3)[0])
        layer = keras.layers.RMSNormalization(epsilon=1e-3)
        layer.build(shape)
        layer.set_weights([gamma])
        close(layer(x), normext.rms_norm(x, gamma, eps=1e-3)[0])


# Flax ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(8, 6), (4, 5, 6), (4, 5, 3, 6)])
def test_flax(shape):
    """Values, and gradients of x, scale and bias; channels are last in Flax."""
    linen = pytest.importorskip("flax.linen")
    import jax

    import normext.jax as ours

    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    scale, bias = rng.normal(1, 0.5, (2, shape[-1])).astype(np.float32)
    eps = {"epsilon": 1e-3}
    pairs = {
        "LayerNorm": (linen.LayerNorm(**eps), lambda x, g, b: ours.layer_norm(x, g, b, eps=1e-3)),
        "GroupNorm": (linen.GroupNorm(3, **eps), lambda x, g, b: ours.group_norm(x, 3, g, b, axis=-1, eps=1e-3)),
        "BatchNorm": (
            linen.BatchNorm(use_running_average=False, **eps),
            lambda x, g, b: ours.batch_norm(x, g, b, axis=-1, eps=1e-3),
        ),
        "RMSNorm": (linen.RMSNorm(**eps), lambda x, g: ours.rms_norm(x, g, eps=1e-3)),
    }
    if len(shape) > 2:
        pairs["InstanceNorm"] = (
            linen.InstanceNorm(**eps),
            lambda x, g, b: ours.instance_norm(x, g, b, axis=-1, eps=1e-3),
        )
    for name, (module, norm) in pairs.items():
        parameters = [scale] if name == "RMSNorm" else [scale, bias]
        state = {"batch_stats": {"mean": 0 * bias, "var": 1 + 0 * bias}} if name == "BatchNorm" else {}

        def theirs(x, *parameters, module=module, state=state):
            variables = {"params": dict(zip(("scale", "bias"), parameters)), **state}
            y = module.apply(variables, x, mutable=list(state))
            return y[0]

        wanted, pull = jax.vjp(theirs, x, *parameters)
        found, own_pull = jax.vjp(norm, x, *parameters)
        for mine, other in zip([found, *own_pull(dy)], [wanted, *pull(dy)], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3, err_msg=name)
