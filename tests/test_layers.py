"""Layers as objects: what they keep between calls, their state, population statistics, folding; and against PyTorch."""

import copy
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest

import normext
from normext.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, fold_batch_norm, population_stats

F64 = {"dtype": np.float64}

# A layer, the shape of its x, the function and its backward as the layer should call them.
LAYERS = {
    "batch_norm": (
        lambda **kw: BatchNorm(3, **kw),
        (4, 3, 5),
        lambda x, p: normext.batch_norm(x, *p),
        normext.batch_norm_backward,
    ),
    "batch_norm channels last": (
        lambda **kw: BatchNorm(3, axis=-1, **kw),
        (4, 5, 3),
        lambda x, p: normext.batch_norm(x, *p, axis=-1),
        normext.batch_norm_backward,
    ),
    "layer_norm": (
        lambda **kw: LayerNorm((3, 5), **kw),
        (4, 3, 5),
        lambda x, p: normext.layer_norm(x, *p, axis=1),
        normext.layer_norm_backward,
    ),
    "rms_norm": (
        lambda **kw: RMSNorm(5, **kw),
        (4, 3, 5),
        lambda x, p: normext.rms_norm(x, *p),
        normext.rms_norm_backward,
    ),
    "group_norm": (
        lambda **kw: GroupNorm(2, 6, **kw),
        (4, 6, 5),
        lambda x, p: normext.group_norm(x, 2, *p),
        normext.group_norm_backward,
    ),
    "instance_norm": (
        lambda **kw: InstanceNorm(3, **kw),
        (4, 3, 5),
        lambda x, p: normext.instance_norm(x, *p),
        normext.instance_norm_backward,
    ),
}


@pytest.fixture(params=LAYERS)
def case(request):
    return LAYERS[request.param]


def trained(layer, rng):
    """The layer with parameters and statistics that are not the initial ones."""
    for p in layer.params.values():
        p[...] = rng.normal(1, 0.5, p.shape)
    if isinstance(layer, BatchNorm):
        # Such as float32 holds: a state of a float32 layer has no more.
        layer.running_mean[...] = rng.normal(2, 1, layer.num_features).astype(np.float32)
        layer.running_var[...] = rng.uniform(0.5, 4, layer.num_features).astype(np.float32)
        layer.num_batches_tracked[...] = 7
    return layer


# Forward and backward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_gives_what_its_function_gives(case, affine, dtype, rng):
    make, shape, function, backward = case
    layer = trained(make(affine=affine, dtype=dtype), rng)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    y, cache = function(x, tuple(layer.params.values()))
    dx, *gradients = backward(dy, cache)
    for _ in range(2):  # gradients are overwritten, not added up
        np.testing.assert_array_equal(layer(x), y)
        np.testing.assert_array_equal(layer.backward(dy), dx)
        assert len(layer.grads) == (len(gradients) if affine else 0)
        for name, gradient in zip(layer.grads, gradients):
            np.testing.assert_array_equal(layer.grads[name], gradient)
            assert layer.grads[name].dtype == dtype


def test_x_may_have_another_dtype_than_the_layer(case, rng):
    make, shape, _, _ = case
    layer = make(dtype=np.float32)
    x = rng.normal(size=shape)
    assert layer(x).dtype == np.float64
    assert layer.backward(x).dtype == np.float64
    assert all(g.dtype == np.float32 for g in layer.grads.values())
    assert layer(x.tolist()).dtype == np.float64


def test_params_grads_and_running_statistics_stay_the_same_arrays(case, rng):
    make, shape, _, _ = case
    layer = make(**F64)
    arrays = [*layer.params.values(), *layer.grads.values(), *layer._state().values()]
    before = [a.copy() for a in layer.grads.values()]
    x = rng.normal(size=shape)
    layer(x)
    layer.backward(rng.normal(size=shape))
    layer.load_state_dict({name: a + 1 for name, a in layer.state_dict().items()})
    after = [*layer.params.values(), *layer.grads.values(), *layer._state().values()]
    assert all(a is b for a, b in zip(arrays, after))
    assert all((a != b).any() for a, b in zip(before, layer.grads.values()))


def test_a_step_of_an_optimizer_that_holds_the_arrays_is_seen_by_the_layer(case, rng):
    make, shape, _, _ = case
    layer = make(**F64)
    held = [(layer.params[name], layer.grads[name]) for name in layer.params]
    x, target = rng.normal(size=(2, *shape))
    losses = []
    for _ in range(20):
        error = layer(x) - target
        losses.append((error**2).sum())
        layer.backward(2 * error)
        for p, dp in held:
            p -= 0.005 * dp
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_backward_without_a_call_is_refused(case, rng):
    make, shape, _, _ = case
    layer = make()
    dy = np.ones(shape)
    with pytest.raises(RuntimeError, match="backward needs a call of the layer before it"):
        layer.backward(dy)
    layer(rng.normal(size=shape))
    with pytest.raises(ValueError, match="dy must have the shape of x"):
        layer.backward(dy[1:])
    layer.backward(dy)  # the refused one did not count
    with pytest.raises(RuntimeError, match="backward needs a call of the layer before it"):
        layer.backward(dy)


def test_a_layer_lets_go_of_x_after_backward_and_at_the_next_call(case, rng):
    make, shape, _, _ = case
    layer = make().eval()
    x = rng.normal(size=shape)
    gone = weakref.ref(x)
    layer(x)
    layer(np.ones(shape))
    del x
    assert gone() is None

    x = rng.normal(size=shape)
    gone = weakref.ref(x)
    layer(x)
    layer.backward(np.ones(shape))
    del x
    assert gone() is None


CHANGES = [
    (lambda: BatchNorm(4), (6, 4, 4), {"eps": 0.5, "axis": 2}),
    (lambda: BatchNorm(4), (6, 4), {"training": False, "momentum": 0.5}),
    (lambda: LayerNorm(4), (6, 4, 4), {"eps": 0.5, "normalized_shape": (4, 4), "params": {}}),
    (lambda: RMSNorm(4), (6, 4), {"eps": 0.5}),
    (lambda: GroupNorm(2, 4), (6, 4, 4), {"eps": 0.5, "axis": -1, "num_groups": 1}),
    (lambda: InstanceNorm(4), (6, 4, 4), {"eps": 0.5, "axis": 2}),
]


@pytest.mark.parametrize(("make", "shape", "changes"), CHANGES)
def test_an_option_that_is_changed_counts_from_the_next_call(make, shape, changes, rng):
    x = rng.normal(3, 2, shape).astype(np.float32)
    layer, changed_at_once = make(), make()
    layer(x)
    for name, value in changes.items():
        setattr(layer, name, value)
        setattr(changed_at_once, name, value)
    if isinstance(layer, BatchNorm):
        layer.load_state_dict(changed_at_once.state_dict())
    np.testing.assert_array_equal(layer(x), changed_at_once(x))
    layer.eps = -1.0
    with pytest.raises(ValueError, match="eps must be from 0"):
        layer(x)


def test_batches_of_any_shape_and_dtype_may_follow_each_other(case, rng):
    make, shape, function, _ = case
    layer = make(affine=False)
    x = rng.normal(3, 2, (2, *shape))
    for batch in (x[0], x[0].astype(np.float32), x[0][:1], x[0][:1].astype(np.int8), x[0].astype(">f8"), x[1]):
        np.testing.assert_array_equal(layer(batch), function(batch, ())[0])


# Running statistics --------------------------------------------------------------------------------------------------


def test_train_and_eval_switch_and_return_the_layer(case):
    layer = case[0]()
    assert layer.training
    assert layer.eval() is layer and not layer.training
    assert layer.train() is layer and layer.training


def test_running_statistics_follow_the_momentum_with_the_biased_variance(rng):
    layer = BatchNorm(3, momentum=0.7, **F64)
    x = rng.normal(3, 2, (5, 3))
    layer(x)
    np.testing.assert_allclose(layer.running_mean, 0.3 * x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, 0.7 + 0.3 * x.var(0), rtol=1e-14)
    assert layer.num_batches_tracked == 1


def test_momentum_none_averages_over_all_batches(rng):
    layer = BatchNorm(3, momentum=None, **F64)
    batches = rng.normal(3, 2, (6, 5, 3))
    for count, batch in enumerate(batches, start=1):
        layer(batch)
        np.testing.assert_allclose(layer.running_mean, batches[:count].mean((0, 1)), rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, batches[:count].var(1).mean(0), rtol=1e-13)
    assert layer.num_batches_tracked == 6


def test_evaluation_uses_the_running_statistics_and_leaves_them(rng):
    layer = trained(BatchNorm(3, **F64), rng).eval()
    before = layer.state_dict()
    x, dy = rng.normal(size=(2, 5, 3))
    rstd = 1 / np.sqrt(layer.running_var + layer.eps)
    expected = layer.params["gamma"] * (x - layer.running_mean) * rstd + layer.params["beta"]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(layer.backward(dy), dy * rstd * layer.params["gamma"], rtol=1e-13)
    assert layer(np.empty((0, 3))).shape == (0, 3)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_refused_batch_leaves_the_running_statistics(rng):
    layer = BatchNorm(3)
    for x in (np.empty((0, 3)), np.ones((4, 2)), np.ones(3), np.ones((4, 3), complex)):
        with pytest.raises((ValueError, TypeError)):
            layer(x)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any() and (layer.running_var == 1).all()


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_evaluation_of_float32_data_far_from_zero_is_as_exact_as_training(offset, rng):
    x = (offset + rng.standard_normal((20000, 4))).astype(np.float32)
    layer = BatchNorm(4, momentum=0.0)
    layer(x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + layer.eps)
    np.testing.assert_allclose(layer.eval()(x), expected, atol=2e-6)
    assert {name: a.dtype for name, a in layer.state_dict().items() if a.ndim} == dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), np.dtype(np.float32)
    )


def test_training_with_one_number_a_channel_is_refused_and_poisons_nothing(rng):
    layer = BatchNorm(3)
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="one number a channel"):
            layer(rng.normal(size=shape))
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any() and (layer.running_var == 1).all()
    assert layer.eval()(np.ones((1, 3))).shape == (1, 3)


# Attributes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, pytorchs", [("gamma", "weight"), ("beta", "bias")])
def test_parameters_are_attributes_that_are_assigned_in_place(case, name, pytorchs, rng):
    make, shape, _, _ = case
    layer, same = make(**F64), make(**F64)
    if name not in layer.params:
        assert layer.beta is None and layer.bias is None
        with pytest.raises(AttributeError, match="has no beta to assign to"):
            layer.bias = np.zeros(5)
        return
    array = layer.params[name]
    setattr(layer, pytorchs, rng.normal(size=array.shape).tolist())
    same.params[name][...] = array
    assert getattr(layer, name) is getattr(layer, pytorchs) is layer.params[name] is array
    x = rng.normal(size=shape)
    np.testing.assert_array_equal(layer(x), same(x))
    before = array.copy()
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        setattr(layer, name, np.ones(17))
    with pytest.raises(TypeError, match=f"{name} must be convertible to float64, got dtype complex128"):
        setattr(layer, name, np.ones(array.shape, complex))
    np.testing.assert_array_equal(array, before)
    assert getattr(make(affine=False), name) is None


def test_running_statistics_are_assigned_in_place():
    layer = BatchNorm(2)
    held = layer.running_var
    layer.running_var, layer.num_batches_tracked = [4, 9], 3
    assert held is layer.running_var and held.tolist() == [4, 9] and layer.num_batches_tracked == 3
    with pytest.raises(ValueError, match=r"running_var must have shape \(2,\), got \(1,\)"):
        layer.running_var = [1.0]


def test_an_unknown_attribute_is_refused_but_a_subclass_may_have_its_own(case):
    layer = case[0]()
    with pytest.raises(AttributeError, match="running_vra"):
        layer.running_vra = 1

    class Counted(type(layer)):
        def __init__(self):
            self.calls = 0

    assert Counted().calls == 0


# State, copies, repr -------------------------------------------------------------------------------------------------


def test_state_travels_between_layers_and_is_a_copy(case, rng):
    make, shape, _, _ = case
    source, target = trained(make(), rng).eval(), make(**F64).eval()
    state = source.state_dict()
    target.load_state_dict(state)
    x = rng.normal(size=shape)
    expected = source(x)
    np.testing.assert_array_equal(target(x), expected)
    for array in state.values():
        array[...] = 9
    np.testing.assert_array_equal(source(x), expected)
    np.testing.assert_array_equal(target(x), expected)


def test_a_state_may_hold_lists(rng):
    layer = BatchNorm(2)
    layer.load_state_dict(
        {"weight": [1, 2], "bias": [3, 4], "running_mean": [5.5, 6], "running_var": [7, 8], "num_batches_tracked": 9}
    )
    assert layer.num_batches_tracked == 9 and layer.num_batches_tracked.shape == ()
    np.testing.assert_array_equal(layer.running_mean, [5.5, 6])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"bias": None}, ValueError, ["missing 'bias'"]),
        (
            {"bias": None, "running_var": None, "scale": 1, "k": 2},
            ValueError,
            ["'bias'", "'running_var'", "'scale'", "'k'"],
        ),
        ({"running_var": np.ones(4)}, ValueError, ["state['running_var']", "(3,)", "(4,)"]),
        ({"num_batches_tracked": np.ones(1, int)}, ValueError, ["state['num_batches_tracked']", "()", "(1,)"]),
        ({"num_batches_tracked": 1.5}, TypeError, ["state['num_batches_tracked']", "int64", "float64"]),
        ({"running_mean": np.ones(3, complex)}, TypeError, ["state['running_mean']", "complex128"]),
        ({"bias": ["a", "b", "c"]}, TypeError, ["state['bias']"]),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_is_loaded(change, error, words, rng):
    layer = trained(BatchNorm(3, **F64), rng)
    before = layer.state_dict()
    state = {name: a + 1 for name, a in before.items()} | change
    with pytest.raises(error) as caught:
        layer.load_state_dict({name: value for name, value in state.items() if value is not None})
    assert all(word in str(caught.value) for word in words), caught.value
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_state_must_be_a_mapping():
    with pytest.raises(TypeError, match="state must be a mapping"):
        LayerNorm(2).load_state_dict([1, 2])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_pickle_and_deepcopy_give_an_independent_equal_layer_without_x(case, twin, rng):
    make, shape, _, _ = case
    layer = trained(make(), rng).eval()
    big = np.ones((1000, *shape[1:]))
    layer(big)
    other = twin(layer)
    assert len(pickle.dumps(layer)) < big.nbytes / 4
    with pytest.raises(RuntimeError):
        other.backward(big)
    layer.backward(big)  # copying took nothing from the layer itself
    assert repr(other) == repr(layer) and other.training == layer.training
    x = rng.normal(size=shape)
    expected = layer(x)
    np.testing.assert_array_equal(other(x), expected)
    other.train()(x)
    other.backward(x)
    for p, dp in zip(other.params.values(), other.grads.values()):
        p -= dp
    np.testing.assert_array_equal(layer(x), expected)


def test_a_shallow_copy_shares_the_arrays_but_not_x(case, rng):
    make, shape, _, _ = case
    layer = make()
    layer(rng.normal(size=shape))
    other = copy.copy(layer)
    assert all(other.params[name] is p for name, p in layer.params.items())
    with pytest.raises(RuntimeError):
        other.backward(np.ones(shape))


@pytest.mark.parametrize(
    "layer, text",
    [
        (BatchNorm(64), "BatchNorm(64, momentum=0.9, eps=1e-05)"),
        (
            BatchNorm(np.int64(4), momentum=None, eps=0, affine=False, axis=-1, dtype=np.float64),
            "BatchNorm(4, momentum=None, eps=0.0, affine=False, axis=-1, dtype='float64')",
        ),
        (LayerNorm(8), "LayerNorm((8,), eps=1e-05)"),
        (RMSNorm((2, 4), affine=False), "RMSNorm((2, 4), eps=1e-06, affine=False)"),
        (GroupNorm(4, 8, axis=-1), "GroupNorm(4, 8, eps=1e-05, axis=-1)"),
        (InstanceNorm(3, eps=np.float32(0.5)), "InstanceNorm(3, eps=0.5)"),
    ],
)
def test_repr_is_as_the_layer_was_made(layer, text):
    assert repr(layer) == text
    assert repr(eval(text)) == text


@pytest.mark.parametrize(
    "make, error, word",
    [
        (lambda: BatchNorm(0), ValueError, "num_features"),
        (lambda: BatchNorm(2.5), TypeError, "num_features"),
        (lambda: BatchNorm(2, momentum=1.5), ValueError, "momentum"),
        (lambda: BatchNorm(2, momentum="0.9"), TypeError, "momentum"),
        (lambda: BatchNorm(2, axis=None), TypeError, "axis"),
        (lambda: BatchNorm(2, dtype=int), TypeError, "dtype"),
        (lambda: LayerNorm(()), ValueError, "normalized_shape"),
        (lambda: LayerNorm((2, -1)), ValueError, "normalized_shape"),
        (lambda: LayerNorm("ab"), TypeError, "normalized_shape"),
        (lambda: RMSNorm(2, eps=-1), ValueError, "eps"),
        (lambda: RMSNorm(2, eps=float("nan")), ValueError, "eps"),
        (lambda: GroupNorm(3, 4), ValueError, "num_groups"),
        (lambda: GroupNorm(2, 4, axis=0), ValueError, "axis"),
        (lambda: InstanceNorm(2, axis=0), ValueError, "axis"),
    ],
)
def test_bad_arguments_are_named(make, error, word):
    with pytest.raises(error, match=word):
        make()


@pytest.mark.parametrize("affine", [True, False])
def test_an_x_that_does_not_fit_is_refused_with_or_without_parameters(case, affine):
    make, shape, _, _ = case
    with pytest.raises(ValueError, match=r"x must have .*, got"):
        make(affine=affine)(np.ones([n + 1 for n in shape]))
    with pytest.raises(ValueError, match="x"):
        make(affine=affine)(1.0)


# Population statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_population_stats_are_those_of_the_batches_laid_end_to_end(training, rng):
    # Sizes that differ, batches that drift, channels far from zero: where an average of averages is far off.
    sizes = [1, 50, 3, 128, 17]
    offset = np.array([0.0, 1e4, -1e6])
    batches = [rng.normal(5 * i, 1 + i, (n, 3, 4)) + offset[:, None] for i, n in enumerate(sizes)]
    layer = trained(BatchNorm(3, **F64), rng)
    layer.training = training
    assert population_stats(layer, iter(batches)) is None
    everything = np.concatenate(batches) - offset[:, None]
    np.testing.assert_allclose(layer.running_mean, everything.mean((0, 2)) + offset, rtol=1e-12)
    # Far from zero the data themselves are rounded, at 1e6 to 1e-10.
    np.testing.assert_allclose(layer.running_var[0], everything.var((0, 2))[0], rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, everything.var((0, 2)), rtol=1e-10)
    assert layer.num_batches_tracked == len(sizes)
    assert layer.training == training


def test_population_stats_of_float32_data_lose_nothing(rng):
    batches = [(1e4 + rng.normal(size=(n, 4))).astype(np.float32) for n in (1000, 10, 300)]
    layer = BatchNorm(4, **F64)
    population_stats(layer, batches)
    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(layer.running_mean, everything.mean(0), rtol=1e-9)
    np.testing.assert_allclose(layer.running_var, everything.var(0), rtol=1e-6)


def test_population_stats_of_every_batch_norm_in_a_model(rng):
    """Each layer's statistics are of what reaches it when those before it normalize with the batch's own."""
    w = rng.normal(size=(3, 4))
    first, second = trained(BatchNorm(3, **F64), rng), trained(BatchNorm(4, **F64), rng).eval()
    others = LayerNorm(4, **F64)
    seen = [], []

    def model(x):
        seen[0].append(x)
        hidden = np.maximum(first(x), 0) @ w
        seen[1].append(hidden)
        return others(second(hidden))

    batches = [rng.normal(i, 2, (n, 3)) for i, n in enumerate((30, 7, 12))]
    gamma, beta = first.params["gamma"], first.params["beta"]
    population_stats(model, batches)
    for batch, hidden in zip(batches, seen[1]):
        expected = np.maximum(normext.batch_norm(batch, gamma, beta)[0], 0) @ w
        np.testing.assert_allclose(hidden, expected, rtol=1e-12)
    for layer, inputs in zip((first, second), seen):
        inputs = np.concatenate(inputs)
        np.testing.assert_allclose(layer.running_mean, inputs.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(layer.running_var, inputs.var(0), rtol=1e-12)
    assert first.training and not second.training


def test_population_stats_of_a_layer_that_is_used_twice_count_both(rng):
    layer = BatchNorm(2, **F64)
    a, b = rng.normal(1, 1, (5, 2)), rng.normal(4, 2, (8, 2))
    population_stats(lambda pair: [layer(x) for x in pair], [(a, b)])
    both = np.concatenate([a, b])
    np.testing.assert_allclose(layer.running_mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, both.var(0), rtol=1e-12)


def test_population_stats_leave_layers_outside_the_model_alone(rng):
    """Batches that come from a network, and a network that trains in another thread meanwhile."""
    layer, source, elsewhere, alone = (BatchNorm(2, **F64) for _ in range(4))
    batches = rng.normal(3, 1, (4, 9, 2))
    for batch in batches:
        alone(batch)

    def model(x):
        thread = threading.Thread(target=elsewhere, args=(batches[int(elsewhere.num_batches_tracked)],))
        thread.start()
        thread.join()
        return layer(x)

    population_stats(model, (source(batch) for batch in batches))
    for other in (source, elsewhere):
        np.testing.assert_array_equal(other.running_mean, alone.running_mean)
        np.testing.assert_array_equal(other.running_var, alone.running_var)
    np.testing.assert_allclose(layer.running_mean, 0, atol=1e-12)


def test_population_stats_that_are_stopped_change_nothing(rng):
    layer = trained(BatchNorm(2), rng)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="x must have 2 channels"):
        population_stats(layer, [np.ones((4, 2)), np.ones((4, 3))])
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    layer(np.ones((4, 2)))  # and the next call is an ordinary one again
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def test_population_stats_of_nothing_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        population_stats(BatchNorm(2), [])
    with pytest.raises(ValueError, match="layer_or_model called no BatchNorm"):
        population_stats(LayerNorm(2), [np.ones((3, 2))])
    with pytest.raises(TypeError, match="layer_or_model must be callable"):
        population_stats([BatchNorm(2)], [np.ones((3, 2))])


def test_population_stats_need_no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    layer = BatchNorm(1)
    population_stats(layer, [[[1.0], [3.0]]])
    assert layer.running_mean == 2


# Folding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (4, 3, 5), (4, 4, 4, 4), (4, 2, 2, 2, 2)])
def test_a_folded_batch_norm_gives_what_the_two_layers_give(shape, bias, affine, rng):
    layer = trained(BatchNorm(4, affine=affine, **F64), rng).eval()
    w, b = rng.normal(size=shape), rng.normal(size=4) if bias else None
    before = w.copy()
    if len(shape) == 2:
        x = rng.normal(size=(7, shape[0]))
        apply = np.matmul
    else:
        # A convolution at one position: all that a fold can tell apart.
        x = rng.normal(size=(7, *shape[1:]))

        def apply(x, w):
            return np.tensordot(x, w, axes=(range(1, w.ndim), range(1, w.ndim)))

    folded_w, folded_b = fold_batch_norm(w, b, layer, output_axis=1 if w.ndim == 2 else 0)
    expected = layer(apply(x, w) + (0 if b is None else b))
    np.testing.assert_allclose(apply(x, folded_w) + folded_b, expected, rtol=1e-12, atol=1e-12)
    assert folded_w.shape == shape and folded_b.shape == (4,)
    np.testing.assert_array_equal(w, before)


def test_a_folded_batch_norm_in_the_convolution_of_the_assignment(rng):
    from normext.cs231n.layers import conv_forward_naive

    layer = trained(BatchNorm(4, **F64), rng).eval()
    x, w, b = rng.normal(size=(2, 3, 6, 5)), rng.normal(size=(4, 3, 3, 3)), rng.normal(size=4)
    options = {"stride": 1, "pad": 1}
    expected = layer(conv_forward_naive(x, w, b, options)[0])
    folded = conv_forward_naive(x, *fold_batch_norm(w, b, layer, output_axis=0), options)[0]
    np.testing.assert_allclose(folded, expected, rtol=1e-12, atol=1e-12)


def test_folded_weights_keep_their_dtype(rng):
    layer = trained(BatchNorm(4), rng).eval()
    for dtype, result in ((np.float32, np.float32), (np.float64, np.float64), (int, np.float64)):
        w, b = fold_batch_norm(np.ones((3, 4), dtype), np.ones(4), layer, output_axis=1)
        assert w.dtype == b.dtype == result


@pytest.mark.parametrize(
    "w, b, output_axis, words",
    [
        (np.ones((4, 3)), None, 1, "w must have 4 outputs.* on axis 1, got shape"),
        (np.ones((3, 4, 2, 2)), None, 0, "w must have 4 outputs.* on axis 0, got shape"),
        (np.ones(4), None, 0, "w must have an axis of inputs and one of outputs"),
        (np.ones((3, 4)), None, 2, "output_axis: axis 2 is out of bounds for array of dimension 2"),
        (np.ones((3, 4)), np.ones(3), 1, r"b must have shape \(4,\), got \(3,\)"),
        (np.ones((3, 4)), np.ones((1, 4)), 1, "b must have shape"),
    ],
)
def test_weights_that_do_not_fit_the_batch_norm_are_refused(w, b, output_axis, words):
    with pytest.raises(ValueError, match=words):
        fold_batch_norm(w, b, BatchNorm(4).eval(), output_axis=output_axis)


def test_which_axis_of_square_weights_is_the_output_must_be_said(rng):
    layer = trained(BatchNorm(4, **F64), rng).eval()
    x, w = rng.normal(size=(7, 4)), rng.normal(size=(4, 4))
    with pytest.raises(TypeError, match="output_axis"):
        fold_batch_norm(w, None, layer)
    folded, b = fold_batch_norm(w, None, layer, output_axis=1)
    np.testing.assert_allclose(x @ folded + b, layer(x @ w), rtol=1e-12, atol=1e-12)
    for axis in (0, -2):
        folded, b = fold_batch_norm(w.T, None, layer, output_axis=axis)  # as PyTorch keeps it
        np.testing.assert_allclose(x @ folded.T + b, layer(x @ w), rtol=1e-12, atol=1e-12)


def test_only_a_batch_norm_in_evaluation_mode_can_be_folded():
    with pytest.raises(ValueError, match="layer must be in evaluation mode"):
        fold_batch_norm(np.ones((3, 4)), None, BatchNorm(4), output_axis=1)
    with pytest.raises(TypeError, match="layer must be a BatchNorm"):
        fold_batch_norm(np.ones((3, 4)), None, LayerNorm(4), output_axis=1)
    with pytest.raises(TypeError, match="w must be an array of real numbers"):
        fold_batch_norm(np.ones((3, 4), complex), None, BatchNorm(4).eval(), output_axis=1)


# PyTorch -------------------------------------------------------------------------------------------------------------

# Our layer, PyTorch's class and its arguments, the shape of x with channels at axis 1.
PYTORCH = {
    "BatchNorm1d (N, D)": (lambda: BatchNorm(5, **F64), "BatchNorm1d", (5,), {}, (6, 5)),
    "BatchNorm1d (N, C, L)": (lambda: BatchNorm(5, **F64), "BatchNorm1d", (5,), {}, (6, 5, 7)),
    "BatchNorm2d": (lambda: BatchNorm(5, **F64), "BatchNorm2d", (5,), {}, (3, 5, 4, 6)),
    "BatchNorm3d": (lambda: BatchNorm(5, **F64), "BatchNorm3d", (5,), {}, (2, 5, 3, 2, 4)),
    "BatchNorm momentum": (lambda: BatchNorm(5, momentum=0.75, **F64), "BatchNorm1d", (5,), {"momentum": 0.25}, (6, 5)),
    "BatchNorm cumulative": (
        lambda: BatchNorm(5, momentum=None, **F64),
        "BatchNorm1d",
        (5,),
        {"momentum": None},
        (6, 5),
    ),
    "BatchNorm plain": (lambda: BatchNorm(5, affine=False, **F64), "BatchNorm1d", (5,), {"affine": False}, (6, 5)),
    "LayerNorm": (lambda: LayerNorm(5, **F64), "LayerNorm", (5,), {}, (6, 3, 5)),
    "LayerNorm of two axes": (
        lambda: LayerNorm((3, 5), eps=0.1, **F64),
        "LayerNorm",
        ((3, 5),),
        {"eps": 0.1},
        (6, 3, 5),
    ),
    "RMSNorm": (lambda: RMSNorm(5, **F64), "RMSNorm", (5,), {"eps": 1e-6}, (6, 3, 5)),
    "GroupNorm": (lambda: GroupNorm(2, 6, **F64), "GroupNorm", (2, 6), {}, (3, 6, 4, 5)),
    "InstanceNorm2d": (lambda: InstanceNorm(5, **F64), "InstanceNorm2d", (5,), {"affine": True}, (3, 5, 4, 6)),
    "InstanceNorm1d": (lambda: InstanceNorm(5, affine=False, **F64), "InstanceNorm1d", (5,), {}, (3, 5, 6)),
}


def pytorch_pair(name):
    torch = pytest.importorskip("torch")
    make, torch_class, arguments, options, shape = PYTORCH[name]
    return torch, make(), getattr(torch.nn, torch_class)(*arguments, dtype=torch.float64, **options), shape


@pytest.mark.parametrize("name", PYTORCH)
def test_layers_equal_pytorchs_in_training_and_evaluation(name, rng):
    torch, layer, module, shape = pytorch_pair(name)
    trained(layer, rng)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in layer.state_dict().items()})
    m = np.prod(shape) // shape[1]
    for training in (True, True, True, False):
        x, dy = rng.normal(3, 2, (2, *shape))
        layer.train() if training else layer.eval()
        module.train(training)
        x_torch = torch.from_numpy(x).requires_grad_()
        module.zero_grad()
        y_torch = module(x_torch)
        y_torch.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(layer(x), y_torch.detach(), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(layer.backward(dy), x_torch.grad, rtol=1e-10, atol=1e-10)
        for ours, theirs in (("gamma", "weight"), ("beta", "bias")):
            if ours in layer.grads:
                np.testing.assert_allclose(layer.grads[ours], getattr(module, theirs).grad, rtol=1e-10, atol=1e-10)
        if isinstance(layer, BatchNorm):
            np.testing.assert_allclose(layer.running_mean, module.running_mean, rtol=1e-10)
            assert layer.num_batches_tracked == module.num_batches_tracked
            if training:
                # PyTorch's running variance takes up m / (m - 1) times what ours does.
                batch_var = x.var(axis=tuple(i for i in range(x.ndim) if i != 1))
                share = 1 - layer.momentum if layer.momentum is not None else 1 / int(layer.num_batches_tracked)
                gap = share * batch_var / (m - 1)
                np.testing.assert_allclose(module.running_var.numpy() - layer.running_var, gap, rtol=1e-9)
            layer.load_state_dict(module.state_dict())  # the two go on from the same numbers


@pytest.mark.parametrize("name", PYTORCH)
def test_a_checkpoint_travels_both_ways_unchanged(name, rng):
    torch, layer, module, _ = pytorch_pair(name)
    if layer.params:
        torch.nn.init.normal_(module.weight)
    theirs = module.state_dict()
    for state in (theirs, {key: value.numpy() for key, value in theirs.items()}):
        layer.load_state_dict(state)
        back = layer.state_dict()
        assert list(back) == list(theirs)
        for key, value in theirs.items():
            np.testing.assert_array_equal(back[key], value)
            assert back[key].dtype == value.numpy().dtype and back[key].shape == tuple(value.shape)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in trained(layer, rng).state_dict().items()})
    for key, value in module.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[key], value)


def test_a_float32_checkpoint_of_pytorch_evaluates_alike(rng):
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm2d(3)
    for _ in range(5):
        module(torch.from_numpy(rng.normal(2, 3, (4, 3, 5, 5)).astype(np.float32)))
    layer = BatchNorm(3)
    layer.load_state_dict(module.state_dict())
    x = rng.normal(2, 3, (4, 3, 5, 5)).astype(np.float32)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layer.eval()(x), expected, atol=2e-6)
