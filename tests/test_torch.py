"""`normext.torch`: PyTorch's norms, their gradients and modules, beside PyTorch's own."""

import copy
import doctest
import gc
import importlib.util
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

import normext
from normext._version import how_to_install

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own, some of which are once a process
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.autograd import forward_ad
    from torch.library import opcheck

    import normext.torch as ours

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[1]
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
SIXTEEN = [torch.float16, *([torch.bfloat16] if importlib.util.find_spec("ml_dtypes") else [])]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture
def own_sizes():
    """For the tests that are about which sizes the loops take."""


@pytest.fixture(autouse=True)
def every_size(request, monkeypatch):
    """Without `own_sizes` the loops take small tensors too."""
    torch.manual_seed(0)
    if "own_sizes" not in request.fixturenames:
        for norm in ours._SMALLEST:
            monkeypatch.setitem(ours._SMALLEST, norm, ours._Smallest(1, 1))


def by_loops(y):
    """Whether normext made a tensor: PyTorch's memory can be resized, NumPy's cannot."""
    return not y.untyped_storage().resizable()


def call(functions, norm, x, weight=None, bias=None, *, training=True, running=None, eps=1e-5):
    """One call of the norm with channels along axis 1, or over all axes from the second; both modules take it."""
    if norm == "batch_norm":
        mean, var = (None, None) if running is None else running
        return functions.batch_norm(x, mean, var, weight, bias, training, 0.3, eps)
    if norm == "layer_norm":
        return functions.layer_norm(x, x.shape[1:], weight, bias, eps)
    if norm == "rms_norm":
        return functions.rms_norm(x, x.shape[1:], weight, eps)
    if norm == "group_norm":
        return functions.group_norm(x, 2, weight, bias, eps)
    return functions.instance_norm(x, None, None, weight, bias, True, 0.1, eps)


def parameters(norm, x, affine="both", dtype=None):
    shape = x.shape[1:] if norm in ("layer_norm", "rms_norm") else x.shape[1:2]
    weight = 1 + torch.randn(shape, dtype=dtype or x.dtype) / 4
    bias = torch.randn(shape, dtype=dtype or x.dtype)
    return (
        weight if affine in ("both", "weight") else None,
        bias if affine in ("both", "bias") and norm != "rms_norm" else None,
    )


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def some(shape, layout="contiguous", dtype=torch.float64):
    """Random numbers about 1 that lie as the name says."""
    x = 1 + 2 * torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "strided":
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


GEOMETRIES = [
    *[(norm, (5, 4), "contiguous") for norm in ("batch_norm", "layer_norm", "rms_norm", "group_norm")],
    *[(norm, (3, 4, 3), layout) for norm in NORMS for layout in ("contiguous", "strided", "permuted")],
    *[(norm, (2, 4, 3, 2), layout) for norm in NORMS for layout in ("contiguous", "channels_last", "strided")],
    *[(norm, (2, 4, 2, 1, 3), layout) for norm in NORMS for layout in ("contiguous", "channels_last")],
]


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, shape, layout", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN], ids=str)
def test_equal_to_pytorch(norm, shape, layout, dtype):
    for affine in ("both", "weight", "bias", "none"):
        check_against_pytorch(norm, shape, layout, dtype, affine)


def check_against_pytorch(norm, shape, layout, dtype, affine):
    x, dy = some(shape, layout, dtype), some(shape, dtype=dtype)
    tensors = leaves(x, *parameters(norm, x, affine))
    y = call(ours, norm, *tensors)
    if norm == "rms_norm" and layout == "channels_last":  # which the rows are not in: y is copied to lie so again
        assert y.grad_fn.name() == "CloneBackward0" and y.grad_fn.next_functions[0][0].name() == "_NormBackward"
    else:
        assert y.grad_fn.name() == "_NormBackward" and by_loops(y)
    with torch.no_grad():
        assert torch.equal(call(ours, norm, *tensors), y)
    wide = leaves(*(None if t is None else t.double() for t in tensors))
    if norm == "group_norm" and affine == "bias":  # PyTorch's backward pass fails without a weight
        wide[1] = torch.ones_like(wide[2])
    theirs = call(F, norm, *wide)
    limit = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), theirs, **limit)
    y.backward(dy)
    theirs.backward(dy.double())
    for mine, other in zip(tensors, wide):
        if mine is not None:
            assert mine.grad.dtype == dtype and mine.grad.shape == mine.shape
            scale = max(1, other.grad.abs().max().item())
            torch.testing.assert_close(mine.grad.double() / scale, other.grad / scale, **limit)


@pytest.mark.parametrize("norm, shape, layout", GEOMETRIES)
def test_gradients_of_first_and_second_order(norm, shape, layout):
    for affine in ("both", "weight", "none") if layout == "contiguous" else ("both",):
        x = some(shape, layout).requires_grad_()
        weight, bias = (None if p is None else p.requires_grad_() for p in parameters(norm, x.detach(), affine))
        tensors = [t for t in (x, weight, bias) if t is not None]

        def of(x, *given, weight=weight, bias=bias):
            given = iter(given)
            return call(ours, norm, x, *(None if p is None else next(given) for p in (weight, bias)), eps=0.1)

        y = of(*tensors)
        assert "_NormBackward" in (y.grad_fn.name(), y.grad_fn.next_functions[0][0].name())
        assert torch.autograd.gradcheck(of, tensors, fast_mode=len(shape) > 3)
        assert torch.autograd.gradgradcheck(of, tensors, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_in_evaluation(layout):
    x = some((2, 4, 3, 2), layout).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters("batch_norm", x.detach()))
    running = torch.randn(4, dtype=torch.float64), 0.5 + torch.rand(4, dtype=torch.float64)

    def of(x, weight, bias):
        return call(ours, "batch_norm", x, weight, bias, training=False, running=running)

    assert of(x, weight, bias).grad_fn.name() == "_NormBackward"
    assert torch.autograd.gradcheck(of, (x, weight, bias))
    assert torch.autograd.gradgradcheck(of, (x, weight, bias))


def plainly(norm, x):
    """The norm in operations that know all derivatives, without parameters."""
    axes = {"batch_norm": (0, 2), "instance_norm": (2,), "layer_norm": (1, 2), "rms_norm": (1, 2), "group_norm": (2, 3)}
    z = x.reshape(x.shape[0], 2, -1, x.shape[2]) if norm == "group_norm" else x
    z = z if norm == "rms_norm" else z - z.mean(axes[norm], keepdim=True)
    return (z / (z.square().mean(axes[norm], keepdim=True) + 1e-5).sqrt()).reshape(x.shape)


def third_derivative(of, x):
    y = of(x).pow(3).sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        y = dx.pow(2).sum()
    return torch.autograd.grad(y, x)[0]


@pytest.mark.parametrize("norm", NORMS)
def test_third_order(norm):
    x = some((3, 4, 3)).requires_grad_()
    found, expected = (third_derivative(of, x) for of in (lambda x: call(ours, norm, x), lambda x: plainly(norm, x)))
    torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_third_order_of_small_models_where_it_is_asked_for(norm, own_sizes):
    x = some((3, 4, 3)).requires_grad_()
    expected = third_derivative(lambda x: plainly(norm, x), x)
    modules = {
        "batch_norm": nn.BatchNorm1d(4),
        "layer_norm": nn.LayerNorm((4, 3)),
        "rms_norm": nn.RMSNorm((4, 3), eps=1e-5),
        "group_norm": nn.GroupNorm(2, 4),
        "instance_norm": nn.InstanceNorm1d(4),
    }
    module = modules[norm].double()
    ours.accelerate(module, always=True)
    assert (third_derivative(module, x) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_gradients_that_are_wanted(norm):
    x = some((3, 4, 5))
    weight, bias = parameters(norm, x)
    for which in (0, 1, 2):
        tensors = [x, weight, bias]
        if tensors[which] is None:
            continue
        tensors[which] = tensors[which].clone().requires_grad_()
        call(ours, norm, *tensors).square().sum().backward()
        twin = [t if t is None else t.detach() for t in tensors]
        twin[which] = twin[which].clone().requires_grad_()
        call(F, norm, *twin).square().sum().backward()
        torch.testing.assert_close(tensors[which].grad, twin[which].grad, rtol=1e-9, atol=1e-9)
        assert all(t is None or t.grad is None for i, t in enumerate(tensors) if i != which)


@pytest.mark.parametrize("norm", NORMS)
def test_expanded_and_zero_gradients(norm):
    x = some((3, 4, 5)).requires_grad_()
    call(ours, norm, x).sum().backward()  # dy is one number for all elements
    first = x.grad.clone()
    x.grad = None
    call(F, norm, x).sum().backward()
    torch.testing.assert_close(first, x.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_mixed_dtypes(norm, dtype):
    x = some((4, 6, 5), dtype=dtype)
    tensors = leaves(x, *parameters(norm, x, dtype=torch.float32))
    twins = leaves(*tensors)
    y, theirs = call(ours, norm, *tensors), call(F, norm, *twins)
    assert y.grad_fn.name() == "_NormBackward" and y.dtype == theirs.dtype == dtype
    torch.testing.assert_close(y, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    y.sum().backward()
    theirs.sum().backward()
    for mine, other in zip(tensors, twins):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.grad.dtype == other.grad.dtype
            torch.testing.assert_close(mine.grad, other.grad, rtol=5 * TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("functions", [ours, F], ids=["normext", "PyTorch"])
def test_numbers_far_from_zero(functions):
    """Ours are exact; that PyTorch's are not says that this can tell."""
    x = 1e4 + torch.randn(64, 3, 8, 8)
    results = {
        "batch": functions.batch_norm(x, None, None, training=True),
        "instance": functions.instance_norm(x),
        "group": functions.group_norm(x, 3),
        "layer": functions.layer_norm(x, x.shape[1:]),
    }
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2, 3), "layer": (1, 2, 3)}
    wide = x.double()
    errors = []
    for name, y in results.items():
        var, mean = torch.var_mean(wide, axes[name], correction=0, keepdim=True)
        errors.append((y - (wide - mean) / (var + 1e-5).sqrt()).abs().max().item())
    if functions is ours:
        assert max(errors) < 4e-6
    else:
        assert max(errors) > 1e-4, errors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("norm", NORMS)
def test_infinities_and_nans_spread_as_in_pytorch(norm, bad, layout):
    for shape in ((3, 4, 5, 3), (2, 4, 60, 70)):
        for dtype in (torch.float32, torch.float64):
            x = some(shape, layout, dtype)
            x[1, 2, 3, 1] = bad
            results = []
            for functions in (ours, F):
                (twin,) = leaves(x)
                y = call(functions, norm, twin)
                results.append((y.detach(), *torch.autograd.grad(y, twin, torch.ones_like(y))))
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found.isnan(), expected.isnan())
                torch.testing.assert_close(found.isinf(), expected.isinf())


@pytest.mark.parametrize("eps", [0.0, 1e-60])
@pytest.mark.parametrize("norm", NORMS)
def test_constant_data_without_eps_give_what_pytorch_gives(norm, eps):
    x = torch.zeros(3, 4, 5)
    x[1:] = 0.1
    if norm == "batch_norm" and eps == 0:
        with pytest.raises(ValueError, match="eps must be positive"):
            call(ours, norm, x, eps=eps)
    else:
        found, expected = (call(functions, norm, x, eps=eps) for functions in (ours, F))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# Running statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_are_pytorchs(layout, dtype):
    running = torch.randn(4).to(dtype), (0.5 + torch.rand(4)).to(dtype)
    theirs = [r.clone() for r in running]
    for _ in range(3):
        x = some((3, 4, 5, 2), layout, dtype)
        y = call(ours, "batch_norm", x, running=running)
        assert by_loops(y)
        call(F, "batch_norm", x, running=theirs)
    limit = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]} if dtype in SIXTEEN else {}
    torch.testing.assert_close(list(running), theirs, **limit)
    evaluated = call(ours, "batch_norm", x, training=False, running=running)
    assert by_loops(evaluated)
    expected = call(F, "batch_norm", x, training=False, running=running)
    torch.testing.assert_close(evaluated, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_momentum_of_0_leaves_every_bit():
    running = torch.randn(1000), torch.rand(1000)
    before = [r.clone() for r in running]
    x = torch.randn(7, 1000)
    for _ in range(20):
        ours.batch_norm(x, *running, training=True, momentum=0.0)
    assert all(map(torch.equal, running, before))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_an_interrupt_leaves_running_statistics_before_or_after_an_update(dtype):
    x, start = torch.randn(5, 4, dtype=dtype), (torch.randn(4).to(dtype), torch.rand(4).to(dtype))
    end = [r.clone() for r in start]
    ours.batch_norm(x, *end, training=True)
    steps, seen = 0, set()
    while True:
        running, left = [r.clone() for r in start], steps

        def interrupt(frame, event, _):  # before one bytecode after the other of this module
            nonlocal left
            if frame.f_code.co_filename != ours.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            ours.batch_norm(x, *running, training=True)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        seen.add(tuple(map(torch.equal, running, end)))
        assert all(map(torch.equal, running, start)) or all(map(torch.equal, running, end))
        steps += 1
    assert seen == {(False, False), (True, True)}


def test_an_update_of_running_statistics_is_seen_by_autograd():
    running = torch.zeros(4), torch.ones(4)
    factor = torch.ones(4, requires_grad=True)
    product = factor * running[0]  # its backward pass needs the old running mean
    call(ours, "batch_norm", torch.randn(5, 4), running=running)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_modules_keep_the_same_state(momentum, track, affine):
    theirs = nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=track).double()
    mine = copy.deepcopy(theirs)
    assert ours.accelerate(mine) == 1
    for training in (True, True, False, True, False):
        x = some((3, 4, 2, 2))
        for module in (mine, theirs):
            module.train(training)
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
    assert torch.is_tensor(mine.num_batches_tracked) == track


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm", "instance_norm", "layer_norm"])
def test_no_copy_is_made(norm, dtype, layout):
    if norm in ("layer_norm", "instance_norm") and layout == "channels_last":
        pytest.skip("PyTorch's results are contiguous there, and a copy of x is")
    x = some((2048, 512) if norm == "layer_norm" else (16, 32, 64, 32), layout, dtype)
    nbytes = x.numel() * x.element_size()
    tensors = leaves(x, *parameters(norm, x))
    dy = torch.ones_like(tensors[0])
    call(ours, norm, *tensors)
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tracemalloc.start()
        try:
            y = call(ours, norm, *tensors)
            forward = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            dx, *_ = torch.autograd.grad(y, [t for t in tensors if t is not None], dy)
            backward = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert nbytes <= forward < 1.2 * nbytes  # y, and nothing of that size
    assert 2 * nbytes <= backward < 2.3 * nbytes  # y and dx
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) < 0.2 * nbytes
    assert y.stride() == dx.stride() == x.stride()


def formats(t):
    """Whether a tensor is contiguous, and whether in channels_last: what `view` can do with it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return t.is_contiguous(), last is not None and t.is_contiguous(memory_format=last)


def laid_out(shape):
    """Random numbers in all layouts that matter, float64."""
    for layout in ("contiguous", "strided", "permuted"):
        yield some(shape, layout)
    yield some(shape).transpose(0, 1).contiguous().transpose(0, 1)
    yield some((1, *shape[1:])).expand(shape)
    if len(shape) > 3:
        wide = some((shape[0], 2 * shape[1], *shape[2:]), "channels_last")
        yield from (some(shape, "channels_last"), wide[:, ::2], wide[:, : shape[1]])


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 2, 1, 6), (3, 4, 1, 1), (2, 4, 3, 2, 2), (3, 4, 5), (5, 4)])
@pytest.mark.parametrize("norm", [*NORMS, "batch_norm in evaluation"])
def test_memory_formats_are_pytorchs(norm, shape):
    if norm == "instance_norm" and shape[2:] in ((), (1, 1)):
        pytest.skip("PyTorch refuses it")
    options = {"training": False, "running": torch.ones(2, shape[1], dtype=torch.float64)} if " " in norm else {}
    for x in laid_out(shape):
        x.requires_grad_()
        y, expected = (call(functions, norm.split()[0], x, **options) for functions in (ours, F))
        assert formats(y) == formats(expected), x.stride()
        for dy in laid_out(shape):
            dx, wanted = (torch.autograd.grad(a, x, dy, retain_graph=True)[0] for a in (y, expected))
            assert formats(dx) == formats(wanted), (x.stride(), dy.stride())


def test_the_memory_format_of_one_image_that_came_from_an_array_is_pytorchs():
    x = torch.from_numpy(np.random.default_rng(0).random((5, 6, 4))).permute(2, 0, 1)[None]
    assert x.is_contiguous(memory_format=torch.channels_last) and x.stride(0) == 4
    for norm in NORMS:
        assert formats(call(ours, norm, x)) == formats(call(F, norm, x))


def test_what_is_saved_is_x_itself():
    x = torch.randn(8, 4, requires_grad=True)
    y = ours.layer_norm(x, (4,))
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


def test_a_changed_x_is_noticed():
    x = torch.randn(8, 4, requires_grad=True)
    copied = x * 1
    y = ours.layer_norm(copied, (4,))
    copied.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "instance_norm"])
def test_a_changed_weight_is_noticed_as_in_pytorch(norm, dtype):
    """In instance norm PyTorch multiplies by a copy of it, and has no need to."""
    x = some((3, 4, 5), dtype=dtype).requires_grad_()
    for wanted in (True, False):
        for functions in (ours, F):
            weight, _ = parameters(norm, x, dtype=torch.float32)
            y = call(functions, norm, x, weight.requires_grad_(wanted))
            with torch.no_grad():
                weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_a_bias_may_change_before_the_backward_pass():
    x, bias = torch.randn(8, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    y = ours.layer_norm(x, (4,), None, bias)
    with torch.no_grad():
        bias.add_(1)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 8.0))


def test_a_weight_replaced_past_autograd_leaves_the_backward_pass_that_of_the_forward_pass():
    x = torch.randn(8, 64, requires_grad=True)
    weight = nn.Parameter(1 + torch.rand(64))
    dy = torch.randn(8, 64)
    (expected,) = torch.autograd.grad(F.layer_norm(x, (64,), weight), x, dy)
    y = ours.layer_norm(x, (64,), weight)
    weight.data = torch.ones(2)  # too few for the loops, which check nothing
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, expected)


X, W, S = torch.randn(3, 4, 5), torch.ones(4), torch.zeros(4, dtype=torch.float64)
HOW = {"norm": "batch_norm", "size": 0, "eps": 1e-5, "training": True}
FORWARD = {"x": X, "weight": W, "bias": W, "running_mean": None, "running_var": None} | HOW
BACKWARD = {"dy": X, "x": X, "weight": W, "bias": W, "mean": S, "rstd": S} | HOW
BY_BOTH = {
    "an unknown norm": ({"norm": "norm"}, "norm must be one of batch_norm, "),
    "integers": ({"x": X.long()}, "input must be a dense tensor of .*int64"),
    "another device": ({"x": X.to("meta")}, "one device, got .* meta"),
    "a weight on another device": ({"weight": W.to("meta")}, "one device, got .* meta"),
    "no numbers": ({"x": X[:0]}, r"input must have numbers .*\(0, 4, 5\)"),
    "no channels": ({"x": X[0, 0], "weight": None, "bias": None}, "an axis of channels"),
    "a longer weight": ({"weight": torch.ones(5)}, r"weight must be .*shape \(4,\).* got .*\(5,\)"),
    "a wider weight": ({"weight": W.double()}, "weight must be .*input's dtype.* got .*float64"),
    "a weight with steps": ({"weight": torch.ones(8)[::2]}, "weight must be contiguous"),
    "a shorter bias": ({"bias": W[:3]}, r"bias must be .*\(4,\).* got .*\(3,\)"),
    "dtypes that differ": ({"x": X.half(), "dy": X.half(), "bias": W.half()}, "weight and bias must have one dtype"),
    "no eps": ({"eps": 0.0}, "eps must be"),
    "groups that do not divide": ({"norm": "group_norm", "size": 3}, "number of groups must divide the 4 channels"),
    "no groups": ({"norm": "group_norm", "size": 0}, "number of groups must divide"),
    "rows of no axes": ({"norm": "layer_norm", "size": 0}, "normalized_shape must be"),
    "rows of all axes and more": ({"norm": "layer_norm", "size": 4}, "normalized_shape must be"),
    "a bias of RMS norm": ({"norm": "rms_norm", "size": 1, "weight": None, "bias": torch.ones(5)}, "no bias"),
    "layer norm in evaluation": ({"norm": "layer_norm", "size": 1, "training": False}, "must have training=True"),
}
BY_FORWARD = {
    "one number a channel": ({"x": X[:1, :, :1]}, "more than one number a channel"),
    "a running mean alone": ({"running_mean": W}, "running_var must be .*got None"),
    "no running statistics": ({"training": False}, "running_mean must be .*got None"),
    "a shorter running mean": ({"running_mean": W[:3], "running_var": W, "training": False}, r"running_mean .*\(3,\)"),
    "wider ones": ({"running_mean": S, "running_var": S, "training": False}, "running_mean must be .*float32.*float64"),
    "those of layer norm": (
        {"norm": "layer_norm", "size": 1, "weight": None, "bias": None, "running_mean": W, "running_var": W},
        "layer_norm must have no running statistics",
    ),
}
BY_BACKWARD = {
    "a shorter dy": ({"dy": X[:2]}, r"dy must be .*\(3, 4, 5\).* got .*\(2, 4, 5\)"),
    "a wider dy": ({"dy": X.double()}, "dy must be .*float32.* got .*float64"),
    "a shorter mean": ({"mean": S[:2]}, r"mean must be .*\(4,\).* got .*\(2,\)"),
    "a longer rstd": ({"rstd": torch.zeros(5).double()}, r"rstd must be .*\(4,\).* got .*\(5,\)"),
    "a mean of float32": ({"mean": W}, "mean must be .*float64.* got .*float32"),
}


@pytest.mark.parametrize("case", [*BY_BOTH, *BY_FORWARD])
def test_the_operator_checks_its_arguments(case):
    given, message = (BY_BOTH | BY_FORWARD)[case]
    torch.ops.normext.norm(**FORWARD)
    with pytest.raises(ValueError, match=message):
        torch.ops.normext.norm(**FORWARD | {name: value for name, value in given.items() if name in FORWARD})


@pytest.mark.parametrize("case", [*BY_BOTH, *BY_BACKWARD])
def test_the_operator_of_the_backward_pass_checks_its_arguments(case):
    given, message = (BY_BOTH | BY_BACKWARD)[case]
    torch.ops.normext.norm_backward(**BACKWARD)
    with pytest.raises(ValueError, match=message):
        torch.ops.normext.norm_backward(**BACKWARD | given)


def test_the_operator_refuses_tangents():
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: torch.ops.normext.norm(**FORWARD | {"x": x})[0], (X,), (X,))


@pytest.mark.parametrize("layout", ["strided", "permuted", "channels_last"])
def test_the_operators_take_any_strides(layout):
    for norm, size in (("batch_norm", 0), ("group_norm", 2), ("layer_norm", 1), ("rms_norm", 1)):
        x, dy = some((3, 4, 5, 2), layout).requires_grad_(), some((3, 4, 5, 2), layout)
        y, mean, rstd, _ = torch.ops.normext.norm(x, None, None, None, None, norm, size, 1e-5, True)
        opcheck(torch.ops.normext.norm.default, (x, None, None, None, None, norm, size, 1e-5, True))
        how = norm, size, 1e-5, True
        statistics = torch.stack((mean, rstd), -1).detach().unbind(-1)  # with steps
        dx, *_ = torch.ops.normext.norm_backward(dy, x, None, None, *statistics, *how)
        torch.testing.assert_close(dx.detach(), torch.autograd.grad(y, x, dy)[0])
        opcheck(torch.ops.normext.norm_backward.default, (dy, x, None, None, *statistics, *how))


def test_checkpointing_keeps_no_x():
    freed = []
    x = torch.randn(64, 32, requires_grad=True)

    def block(x):
        between = x * 2
        weakref.finalize(between, freed.append, True)
        return ours.layer_norm(between, (32,)).square()

    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    gc.collect()
    assert freed  # else the norm holds its input, which the checkpoint is to free
    y.sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.layer_norm(twin * 2, (32,)).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_results_can_be_written_to_and_in_place_operations_follow():
    x = torch.randn(8, 4, requires_grad=True)
    y = ours.layer_norm(x, (4,)).relu_()
    y.sum().backward()
    grad, x.grad = x.grad, None
    F.layer_norm(x, (4,)).relu_().sum().backward()
    torch.testing.assert_close(grad, x.grad)


# PyTorch's own samples ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operators():
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    return {op.name: op for op in op_db}


def run_sample(function, sample):
    """The result, the gradients, and all tensors that it was given (some are updated), or the error."""

    def fresh(value):
        return value.detach().clone().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value

    arguments = [fresh(value) for value in (sample.input, *sample.args)]
    options = {name: fresh(value) for name, value in sample.kwargs.items()}
    tensors = [value for value in (*arguments, *options.values()) if torch.is_tensor(value)]
    try:
        y = function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)
    wanted = [t for t in tensors if t.requires_grad]
    torch.manual_seed(1)
    gradients = torch.autograd.grad(y, wanted, torch.randn_like(y), allow_unused=True) if y.requires_grad else ()
    return [y, *gradients, *tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_pytorchs_samples(norm, dtype, operators):
    operator = operators[f"nn.functional.{norm}"]
    samples = list(operator.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 3
    function = getattr(ours, norm)
    for sample in samples:
        found, expected = run_sample(function, sample), run_sample(operator.op, sample)
        if isinstance(expected, tuple):
            assert found == expected
            continue
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                scale = max(1, theirs.detach().abs().nan_to_num().max().item()) if theirs.numel() else 1
                limit = TOLERANCE[dtype]
                torch.testing.assert_close(mine / scale, theirs / scale, rtol=limit, atol=limit, equal_nan=True)


@pytest.mark.parametrize("kind", [theirs.__name__ for theirs in ours._OURS])
def test_pytorchs_samples_of_modules(kind):
    """In all memory formats: the values, the gradients and how they lie."""
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    info = next(info for info in module_db if info.module_cls.__name__ == kind)
    compared = 0
    for training, last in itertools.product((True, False), (True, False)):
        options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
        for sample in info.module_inputs_func(info, **options):
            (x,) = sample.forward_input.args
            if last:
                if x.dim() not in ours._CHANNELS_LAST:
                    continue
                x = x.detach().contiguous(memory_format=ours._CHANNELS_LAST[x.dim()]).requires_grad_()
            theirs = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            theirs.double().train(training)
            mine = copy.deepcopy(theirs)
            assert ours.accelerate(mine) == 1
            found, expected = ([y := module(x), *torch.autograd.grad(y.square().sum(), x)] for module in (mine, theirs))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
                assert formats(a) == formats(b)
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("norm", NORMS)
def test_pytorchs_errors(norm, operators):
    operator, function = operators[f"nn.functional.{norm}"], getattr(ours, norm)
    if operator.error_inputs_func is None:
        pytest.skip("PyTorch has none for this norm")
    for case in operator.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            function(sample.input, *sample.args, **sample.kwargs)


WRONG = {
    "weight of another shape": lambda f: f.layer_norm(torch.zeros(3, 4), (4,), torch.ones(3)),
    "rows of another shape": lambda f: f.layer_norm(torch.zeros(3, 4), (3,)),
    "no axes": lambda f: f.layer_norm(torch.zeros(3, 4), ()),
    "integers": lambda f: f.layer_norm(torch.zeros(3, 4, dtype=torch.int64), (4,)),
    "complex": lambda f: f.rms_norm(torch.zeros(3, 4, dtype=torch.complex64), (4,), None, -1.0),
    "float32 weight of float64": lambda f: f.layer_norm(torch.zeros(3, 4).double(), (4,), torch.ones(4)),
    "one value a channel": lambda f: f.batch_norm(torch.zeros(1, 4), None, None, training=True),
    "no running statistics": lambda f: f.batch_norm(torch.zeros(3, 4), None, None),
    "running mean of another shape": lambda f: f.batch_norm(torch.zeros(3, 4), torch.zeros(3), torch.ones(4)),
    "groups that do not fit": lambda f: f.group_norm(torch.zeros(3, 4), 3),
    "no groups": lambda f: f.group_norm(torch.zeros(3, 4), 0),
    "one element an instance": lambda f: f.instance_norm(torch.zeros(3, 4, 1)),
    "an array": lambda f: f.layer_norm(np.zeros((3, 4)), (4,)),
    "batch norm without eps": lambda f: f.batch_norm(torch.zeros(3, 4), None, None, training=True, eps=0.0),
    "a running mean that is one number": lambda f: f.batch_norm(
        torch.randn(3, 4), torch.zeros(1).expand(4), torch.ones(4), training=True
    ),
    "text for eps": lambda f: f.layer_norm(torch.zeros(3, 4), (4,), None, None, "1e-5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_pytorchs(case):
    def outcome(functions):
        try:
            return WRONG[case](functions).shape
        except Exception as error:
            return type(error), str(error)

    assert outcome(ours) == outcome(F)


# What is left to PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_transforms_of_torch_func(norm):
    x, v = some((3, 4, 5)), some((3, 4, 5))
    weight, bias = parameters(norm, x)

    def loss(functions):
        return lambda x: call(functions, norm, x, weight, bias).pow(3).sum()

    for transform in (
        torch.func.grad,
        lambda f: lambda x: torch.func.jvp(f, (x,), (v,)),
        lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        torch.func.hessian,
        lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(transform(loss(ours))(x), transform(loss(F))(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_batches_of_gradients(norm):
    """Of what the loops have computed already: the formula in PyTorch's operations takes their place."""
    x = some((3, 4, 5))
    weight, bias = parameters(norm, x)
    given = (x, weight) if bias is None else (x, weight, bias)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    limit = {"rtol": 1e-9, "atol": 1e-9}

    def of(functions):
        return lambda *tensors: call(functions, norm, *tensors)

    expected = jacobian(of(F), given)
    for create in (True, False):
        found = jacobian(of(ours), given, vectorize=True, create_graph=create)
        torch.testing.assert_close(found, expected, **limit)
    cubes = [lambda *tensors, f=functions: of(f)(*tensors).pow(3).sum() for functions in (ours, F)]
    torch.testing.assert_close(hessian(cubes[0], given, vectorize=True), hessian(cubes[1], given), **limit)

    leaf = x.clone().requires_grad_()
    y = of(ours)(leaf, *given[1:])
    assert y.grad_fn.name() == "_NormBackward"
    dys = torch.eye(y.numel(), dtype=x.dtype).reshape(-1, *y.shape)
    rows = expected[0].reshape(-1, *x.shape)
    (found,) = torch.autograd.grad(y, leaf, dys, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, rows, **limit)
    (found,) = torch.func.vmap(lambda dy: torch.autograd.grad(y, leaf, dy, retain_graph=True))(dys)
    torch.testing.assert_close(found, rows, **limit)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_with_a_tangent(norm):
    x = some((3, 4, 5)).requires_grad_()
    dy, tangent = some((3, 4, 5)), some((3, 4, 5))
    y = call(ours, norm, x)
    assert y.grad_fn.name() == "_NormBackward"
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent), retain_graph=True)
        found = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(found, torch.autograd.grad(y, x, tangent)[0])  # dx is linear in dy


@pytest.mark.parametrize("norm", NORMS)
def test_forward_mode(norm):
    x, v = some((3, 4, 5)), some((3, 4, 5))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        mine, theirs = (forward_ad.unpack_dual(call(functions, norm, dual)) for functions in (ours, F))
        assert mine.tangent is not None
        torch.testing.assert_close(mine.tangent, theirs.tangent)


@pytest.mark.parametrize("norm", NORMS)
def test_tensors_without_memory(norm):
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert call(ours, norm, torch.empty(3, 4, 5, device="meta")).device.type == "meta"
    with FakeTensorMode():
        y = call(ours, norm, torch.empty(3, 4, 5))
    assert type(y).__name__ == "FakeTensor" and y.shape == (3, 4, 5)


@pytest.mark.parametrize("norm", NORMS)
def test_tracing_records_operations_and_not_numbers(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: call(ours, norm, x), (torch.randn(3, 4, 5),))
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(traced(x), call(F, norm, x))


def test_a_subclass_of_tensor_is_told_of_pytorchs_function():
    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    called = []
    y = ours.layer_norm(torch.randn(3, 4).as_subclass(Told), (4,))
    assert isinstance(y, Told) and F.layer_norm in called


def test_modes_see_pytorchs_operation():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        y = ours.layer_norm(torch.randn(3, 4), (4,))
    assert not by_loops(y)


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1.0])
def test_odd_eps(eps):
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours.layer_norm(x, (4,), eps=eps), F.layer_norm(x, (4,), eps=eps), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, *SIXTEEN], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_views_that_are_negated_when_they_are_read(norm, dtype):
    """As the imaginary part of a conjugate is: x, the parameters or dy."""
    x, dy = some((3, 4, 5), dtype=dtype), some((3, 4, 5), dtype=dtype)
    tensors = [x, *parameters(norm, x)]
    results = []
    for views in (lambda t: torch._neg_view(-t), torch.clone):
        given = [None if t is None else t.clone().requires_grad_() for t in tensors]
        y = call(ours, norm, *(None if t is None else views(t) for t in given))
        assert y.grad_fn.name() == "_NormBackward"
        wanted = [t for t in given if t is not None]
        first = torch.autograd.grad(y, wanted, views(dy), create_graph=True)
        results.append([y, *first, *torch.autograd.grad(first[0].square().sum(), given[0])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    z = torch.randn(3, 4, 5, dtype=torch.complex128)
    torch.testing.assert_close(call(ours, norm, z.conj().imag), call(F, norm, z.conj().imag))


def test_empty_and_sparse_tensors():
    assert ours.layer_norm(torch.zeros(0, 4), (4,)).shape == (0, 4)
    with pytest.raises(RuntimeError):
        ours.layer_norm(torch.eye(4).to_sparse(), (4,))


def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    weight, bias = torch.randn(4), torch.randn(4)
    for mine, theirs in zip(ours.layer_norm(nested, (4,), weight, bias).unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(mine, F.layer_norm(theirs, (4,), weight, bias))


def test_rms_norm_takes_pytorchs_eps():
    for dtype in (torch.float64, torch.float32, *SIXTEEN):
        x = torch.full((2, 4), 1e-4, dtype=dtype)
        y = ours.rms_norm(x, (4,))
        assert by_loops(y)
        torch.testing.assert_close(y, F.rms_norm(x, (4,)), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_small_tensors_are_left_to_pytorch_and_large_ones_are_not(norm, own_sizes):
    for shape, large in (((4, 8, 2, 2), False), ((256, 64, 32, 32), True)):
        for grad in (False, True):
            y = call(ours, norm, torch.randn(shape).requires_grad_(grad))
            assert by_loops(y) == large


@pytest.mark.parametrize("norm", NORMS)
def test_always(norm, own_sizes):
    x = torch.randn(3, 4, 5)
    assert not by_loops(call(ours, norm, x))
    rows = (x.shape[1:],)
    size = {"group_norm": (2,), "batch_norm": (None, None), "layer_norm": rows, "rms_norm": rows}.get(norm, ())
    training = {"training": True} if norm == "batch_norm" else {}
    function, options = getattr(ours, norm), training | {"always": True}
    y = function(x, *size, **options)
    assert by_loops(y)
    torch.testing.assert_close(y, getattr(F, norm)(x, *size, **training))
    message = "normext does not take this call: input must be a dense tensor of .*int64"
    with pytest.raises(ValueError, match=message):
        function(x.long(), *size, **options)
    with pytest.raises(ValueError, match="transforms"):
        torch.func.grad(lambda x: function(x, *size, **options).sum())(x)
    with pytest.raises(ValueError, match="must be contiguous .*got a Tensor"):
        function(x, *size, weight=torch.ones(3), **options)
    with pytest.raises(ValueError, match="eps must be a number from 1.2e-38"):
        function(x, *size, eps=0.0, **options)


def test_always_says_what_is_wrong_with_statistics():
    x, mean, var = torch.randn(3, 4, 5), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="no running statistics"):
        ours.instance_norm(x, mean, var, always=True)
    with pytest.raises(ValueError, match=r"running_var must be .*\(4,\) and torch.float32.*got None"):
        ours.batch_norm(x, mean, None, always=True)
    with pytest.raises(ValueError, match="more than one number a channel"):
        ours.batch_norm(x[:1, :, 0], mean, var, training=True, always=True)
    with pytest.raises(ValueError, match="momentum must be a number from 0 to 1, got 2"):
        ours.batch_norm(x, mean, var, training=True, momentum=2, always=True)
    with pytest.raises(ValueError, match="training must be True or False, got 1"):
        ours.batch_norm(x, mean, var, training=1, always=True)


def test_models_that_always_run_through_the_loops(own_sizes):
    model = every_norm()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    assert ours.accelerate(model) == 6
    assert ours.accelerate(model, always=True) == 0  # they are ours already, and are told so
    norms = [module for module in model.modules() if type(module) in ours._THEIRS]
    assert len(norms) == 6 and all(module.always for module in norms)
    outputs = []
    for module in (twin := copy.deepcopy(model)).modules():
        if type(module) in ours._THEIRS:
            module.register_forward_hook(lambda _, __, y: outputs.append(by_loops(y)))
    torch.testing.assert_close(twin(x), expected)
    assert outputs == [True] * 6
    assert ours.restore(model) == 6 and not any("always" in vars(module) for module in model.modules())


# Autograd's modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_gives_the_same_dtype(norm):
    for dtype in (torch.float32, *SIXTEEN):
        x = torch.randn(4, 6, 5, dtype=dtype)
        for cast in SIXTEEN:
            with torch.autocast("cpu", cast):
                weight, bias = parameters(norm, x, dtype=torch.float32)
                y, theirs = call(ours, norm, x, weight, bias), call(F, norm, x, weight, bias)
                assert by_loops(y)
            assert y.dtype == theirs.dtype
            torch.testing.assert_close(y, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, norm):
    x = torch.randn(3, 4, 5, requires_grad=True)
    running = torch.zeros(4), torch.ones(4)
    with mode():
        y = call(ours, norm, x, running=running)
        inside = torch.zeros(4), torch.ones(4)  # tensors of inference mode have no version
        call(ours, norm, torch.randn(3, 4, 5), running=inside)
    assert by_loops(y) and not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(y, call(F, norm, x.detach()))


def test_backward_in_other_threads_at_once():
    """Autograd's passes of several Python threads, with PyTorch's and normext's own threads."""
    x = torch.randn(64, 4, 40, 40)
    results, before = {}, torch.get_num_threads()

    def work(i):
        twin = x.clone().requires_grad_()
        for _ in range(5):
            twin.grad = None
            call(ours, "batch_norm", torch.relu(twin)).square().sum().backward()
        results[i] = twin.grad

    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(results) == 4
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results.values())


def test_pytorchs_number_of_threads_holds_for_the_call_alone():
    before, ours_before = torch.get_num_threads(), normext.get_num_threads()
    x = torch.randn(64, 4, 40, 40)
    seen = []
    try:
        torch.set_num_threads(ours_before + 1)
        expected = call(ours, "batch_norm", x)
        torch.set_num_threads(1)
        assert torch.equal(call(ours, "batch_norm", x), expected)
        seen.append(normext.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [ours_before]


# torch.compile --------------------------------------------------------------------------------------------------------

OPERATOR_CALLS = {
    "batch": ((3, 4, 2, 2), (4,), "batch_norm", 0, True),
    "batch, evaluation": ((3, 4, 2, 2), (4,), "batch_norm", 0, False),
    "layer": ((3, 4, 2), (4, 2), "layer_norm", 2, True),
    "rms": ((3, 4), (4,), "rms_norm", 1, True),
    "group": ((3, 4, 2), (4,), "group_norm", 2, True),
    "group of one pixel": ((3, 4), (4,), "group_norm", 2, True),
}


@pytest.mark.parametrize("case", OPERATOR_CALLS)
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(case, affine):
    shape, of_parameter, norm, size, training = OPERATOR_CALLS[case]
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(of_parameter, requires_grad=True) if affine else None
    bias = torch.randn(of_parameter, requires_grad=True) if affine and norm != "rms_norm" else None
    running = (None, None) if training else (torch.randn(4), torch.rand(4) + 0.5)
    how = norm, size, 0.1, training
    opcheck(torch.ops.normext.norm.default, (x, weight, bias, *running, *how))
    _, mean, rstd, _ = torch.ops.normext.norm(x, weight, bias, *running, *how)
    dy = torch.randn(shape, requires_grad=True)
    opcheck(torch.ops.normext.norm_backward.default, (dy, x, weight, bias, mean.detach(), rstd.detach(), *how))


def test_opcheck_channels_last():
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    opcheck(torch.ops.normext.norm.default, (x, None, None, None, None, "batch_norm", 0, 1e-5, True))
    opcheck(torch.ops.normext.norm.default, (x, None, None, None, None, "group_norm", 2, 1e-5, True))


@pytest.mark.parametrize("case", OPERATOR_CALLS)
def test_the_operators_have_a_second_order(case):
    shape, of_parameter, norm, size, training = OPERATOR_CALLS[case]
    shapes = shape, of_parameter, of_parameter
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    running = (None, None) if training else (torch.randn(4).double(), torch.rand(4).double() + 0.5)
    given = (x, weight) if norm == "rms_norm" else (x, weight, bias)

    def of(x, weight, bias=None):
        return torch.ops.normext.norm(x, weight, bias, *running, norm, size, 0.1, training)[0]

    assert torch.autograd.gradgradcheck(of, given, fast_mode=True)


def every_norm():
    """A small net with all norms: 6 of them ours."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        *(nn.Flatten(), nn.Linear(8 * 36, 16), nn.LayerNorm(16), nn.RMSNorm(16), nn.BatchNorm1d(16)),
    ).double()


def test_compiled_whole():
    theirs = every_norm()
    mine = copy.deepcopy(theirs)
    assert ours.accelerate(mine) == 6
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append([node.target for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    compiled = torch.compile(mine, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for training in (True, True, False):
        for module in (mine, theirs):
            module.train(training)
            module.zero_grad()
        y, expected = compiled(x), theirs(x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)
    assert [sum("normext.norm" in str(target) for target in graph) for graph in graphs] == [6, 6]


def test_compiled_by_inductor():
    compiled = torch.compile(lambda x, w: ours.rms_norm(x, (8,), w), fullgraph=True)
    x, weight = torch.randn(4, 8), torch.randn(8)
    try:
        y = compiled(x, weight)
    except Exception as error:
        if "compiler" in str(error).lower() and "not found" in str(error).lower():
            pytest.skip("there is no C++ compiler")
        raise
    assert torch.equal(y, ours.rms_norm(x, (8,), weight))


@pytest.mark.parametrize("norm", NORMS)
def test_transforms_of_torch_func_compiled(norm):
    """They are PyTorch's, compiled too: of the operators' forward derivatives it would make zeros."""
    x = some((3, 4, 5))

    def loss(functions):
        return lambda x: call(functions, norm, x).pow(3).sum(-1)

    transforms = {
        "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
        "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    }
    if norm == "rms_norm":  # PyTorch compiles forward derivatives of no other
        transforms["jvp"] = lambda f: lambda x: torch.func.jvp(f, (x,), (x.square(),))[1]
    for transform in transforms.values():
        torch._dynamo.reset()
        compiled = torch.compile(transform(loss(ours)), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), transform(loss(F))(x))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_do_not_need_normext(strict):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = ours.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    program = torch.export.export(Net(), (torch.randn(3, 4),), strict=strict)
    assert "normext" not in str(program.graph)
    x = torch.randn(3, 4)
    torch.testing.assert_close(program.module()(x), F.layer_norm(x, (4,)))


# Models ---------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x):
        y = torch.relu(self.norms[0](self.one(x)))
        return torch.relu(x + self.norms[1](self.two(y)))


def resnet():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), Residual(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.RMSNorm(16), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 16), encoder, nn.Flatten(), nn.Linear(80, 5))


MODELS = {"resnet": (resnet, (6, 3, 8, 8), 5), "transformer": (transformer, (6, 5, 6), 5)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_give_the_same_numbers(name, layout):
    build, shape, count = MODELS[name]
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("it has no images")
    theirs = build().double()
    if layout == "channels_last":
        theirs = theirs.to(memory_format=torch.channels_last)
    mine = copy.deepcopy(theirs)
    assert ours.accelerate(mine) == count
    losses = []
    for model in (mine, theirs):
        torch.manual_seed(1)
        rule = torch.optim.Adam(model.parameters(), lr=1e-2)
        of = []
        for _ in range(5):
            x, labels = torch.randn(shape, dtype=torch.float64), torch.randint(5, shape[:1])
            if layout == "channels_last":
                x = x.contiguous(memory_format=torch.channels_last)
            rule.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            rule.step()
            of.append(loss.item())
        model.eval()
        with torch.no_grad():
            of.append(model(x))
        losses.append(of)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-8)


KINDS = {
    nn.BatchNorm1d: (nn.BatchNorm1d(4), (5, 4)),
    nn.BatchNorm2d: (nn.BatchNorm2d(4), (5, 4, 3, 2)),
    nn.BatchNorm3d: (nn.BatchNorm3d(4), (5, 4, 3, 2, 2)),
    nn.InstanceNorm1d: (nn.InstanceNorm1d(4, affine=True), (5, 4, 3)),
    nn.InstanceNorm2d: (nn.InstanceNorm2d(4), (5, 4, 3, 2)),
    nn.InstanceNorm3d: (nn.InstanceNorm3d(4, affine=True), (5, 4, 3, 2, 2)),
    nn.GroupNorm: (nn.GroupNorm(2, 4), (5, 4, 3)),
    nn.LayerNorm: (nn.LayerNorm((4, 3)), (5, 4, 3)),
    nn.RMSNorm: (nn.RMSNorm((4, 3)), (5, 4, 3)),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_module_runs_through_the_loops(kind):
    theirs, shape = KINDS[kind]
    mine = copy.deepcopy(theirs)
    assert ours.accelerate(mine) == 1
    assert isinstance(mine, kind) and type(mine) is getattr(ours, kind.__name__) and repr(mine) == repr(theirs)
    x = torch.randn(shape)
    y = mine(x)
    assert by_loops(y)
    torch.testing.assert_close(y, copy.deepcopy(theirs)(x))
    if kind.__name__.startswith("InstanceNorm"):
        torch.testing.assert_close(mine(x[0]), copy.deepcopy(theirs)(x[0]))  # an example without a batch
    with pytest.raises((ValueError, RuntimeError)) as found:
        mine(torch.randn(2))
    with pytest.raises(found.type) as expected:
        copy.deepcopy(theirs)(torch.randn(2))
    assert str(found.value) == str(expected.value)


def test_accelerate_keeps_everything_but_the_class():
    model = resnet().eval()
    keys, tensors = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    rule = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    rule.step()
    state = rule.state[model[1].weight]["momentum_buffer"]
    calls.clear()
    assert ours.accelerate(model) == 5
    assert ours.accelerate(model) == 0
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert rule.state[model[1].weight]["momentum_buffer"] is state
    assert not any(module.training for module in model.modules())
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["before", "forward"]
    assert ours.restore(model) == 5
    assert ours.restore(model) == 0
    assert type(model[1]) is nn.BatchNorm2d
    resnet().load_state_dict(model.state_dict())


def test_shared_modules_count_once_and_derived_ones_are_left():
    class Derived(nn.LayerNorm):
        pass

    shared = nn.LayerNorm(4)
    model = nn.Sequential(shared, shared, Derived(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(), nn.Identity())
    assert ours.accelerate(model) == 1
    assert [type(m) for m in model[2:5]] == [Derived, nn.SyncBatchNorm, nn.LazyBatchNorm1d]


def test_accelerated_models_can_be_copied_and_saved():
    model = resnet().eval()
    ours.accelerate(model)
    x = torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin[1]) is ours.BatchNorm2d
        assert torch.equal(twin(x), model(x))
        assert ours.restore(twin) == 5
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resnet().load_state_dict(torch.load(file, weights_only=True))


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_the_same_models(tmp_path):
    sys.path.append(str(ROOT))  # bench is not installed
    from bench import models, report, worker

    chosen = [case for case in models.cases(True, ["float32"]) if case.model in ("MLP", "GPT with RMS norm")]
    records = []
    for case in chosen:
        sides = models.entrants(case, ["pytorch"], 1)
        assert list(sides)[:2] == ["normext", "PyTorch"]
        assert worker.disagreements(sides, case.dtype) == {}
        times = {side: {"median": seconds} for side, seconds in zip(sides, (2.0, 3.0, 0.5, 1.0))}
        ratios = {"PyTorch": {"median": 1.5, "q1": 1.4, "q3": 1.6}}
        records.append({**case.facts(), "threads": 1, "times": times, "ratios": ratios})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{models.BEGIN}\nold\n{models.END}\nafter\n")
    report.write_between(page, models.BEGIN, models.END, models.text(records))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| MLP, training, batch 8, threads 1 | 3e+03 | 2e+03 | 1.50 [1.40 1.60] |" in text
    assert models.BEGIN in (ROOT / "docs" / "pytorch.md").read_text()


# Packaging ------------------------------------------------------------------------------------------------------------


def test_without_torch_the_import_says_what_to_install():
    hidden = "import sys; sys.modules['torch'] = None; import normext; import normext.torch"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert f"ImportError: normext.torch needs torch: {how_to_install('torch')}" in done.stderr


def test_without_ml_dtypes_bfloat16_is_left_to_pytorch():
    program = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "import torch, normext.torch\n"
        "x = torch.randn(200, 600)\n"
        "print([normext.torch.rms_norm(x.to(d), (600,)).untyped_storage().resizable()"
        " for d in (torch.float32, torch.bfloat16)])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[False, True]", done.stderr


def test_the_examples_of_the_documentation_run():
    results = doctest.testfile(str(ROOT / "docs" / "pytorch.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 3 and results.failed == 0
