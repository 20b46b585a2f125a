"""PyTorch's norms with normext's loops: the functions of `torch.nn.functional`, and a switch for whole models.

`batch_norm`, `layer_norm`, `group_norm`, `instance_norm` and `rms_norm` take PyTorch's arguments and mean by them what
PyTorch means. `accelerate` puts them into the norm modules of a model, `restore` takes them out.

Tensors and arrays share their memory, both ways. What the loops do not take (another device, a dtype or an argument
that does not fit, a transform of `torch.func`, ...), and what is so small that PyTorch is done sooner, is left to
PyTorch's own function, which also raises its own errors. With ``always=True`` the size does not matter, and what the
loops do not take is an error.

There are two ways in. Eager calls go through `torch.autograd.Function`, or straight to the loops where no gradient is
wanted: a custom operator of `torch.library` costs some 20 microseconds more. `torch.compile` sees the operators
``normext::norm`` and ``normext::norm_backward``, and keeps them whole.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from normext._version import how_to_install

try:
    import torch
except ImportError as error:
    raise ImportError(f"normext.torch needs torch: {how_to_install('torch')}") from error
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function, forward_ad
from torch.autograd.graph import increment_version
from torch.nn import functional as F

import normext
from normext._core.arrays import Cache, Norm, backward, forward, new_cache

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "accelerate",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "restore",
    "rms_norm",
]

_DTYPES = {getattr(torch, name): np.dtype(name) for name in ("float32", "float64", "float16")}
try:
    from ml_dtypes import bfloat16
except ImportError:
    pass
else:
    _DTYPES[torch.bfloat16] = np.dtype(bfloat16)

_KINDS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")  # instance norm is group norm with a channel a group
_Running: TypeAlias = tuple[Tensor, Tensor, float]  # batch norm's mean, variance and momentum, as PyTorch has them

_TENSORS = (Tensor, nn.Parameter)  # no other subclass: it would be told of PyTorch's functions, not of these
_NARROW = (torch.float16, torch.bfloat16)  # computed in float32
_ROWS = ("layer_norm", "rms_norm")  # normalize rows, and the others channels

# By the number of axes: the memory format with the channels last, its axes in the order of memory, and back.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_TO_LAST = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
_TO_FIRST = {4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}


# Tensors and arrays ---------------------------------------------------------------------------------------------------


def _array(t: Tensor, last: bool = False) -> np.ndarray:
    """The memory of a tensor as an array, whose channels are the last axis if they lie last.

    NumPy knows bfloat16 through ml_dtypes alone.
    """
    if t.dtype == torch.bfloat16:
        a = t.detach().resolve_neg().view(torch.int16).numpy().view(_DTYPES[t.dtype])
    else:
        a = t.numpy(force=True)  # which detaches it, and negates a copy of a view that is to be negated when it is read
    return a.transpose(_TO_LAST[a.ndim]) if last else a


def _tensor(a: np.ndarray, last: bool) -> Tensor:
    """The way back."""
    # Memory from NumPy, not from torch.empty: a large array of its is in huge pages where the system has them, and
    # takes half the time to fill.
    if last:
        a = a.transpose(_TO_FIRST[a.ndim])
    return torch.from_numpy(a) if a.dtype.kind == "f" else torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)


def _walkable(x: Tensor, kind: str) -> Tensor:
    """x, or a copy of it, in the memory format of PyTorch's result."""
    if x.is_contiguous():
        return x
    if kind not in ("batch_norm", "group_norm"):
        return x.contiguous()
    # One image may lie in channels_last with a stride for the batch that PyTorch does not suggest that format for.
    last = _CHANNELS_LAST.get(x.dim())
    if kind == "batch_norm" and last is not None and x.is_contiguous(memory_format=last):
        return x
    return x.contiguous(memory_format=suggest_memory_format(x))


# The passes, compiled -------------------------------------------------------------------------------------------------


@lru_cache  # it takes a microsecond, and a model asks for the same few again and again
def _norm_of(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, kind: str, size: int, eps: float, training: bool
) -> Norm:
    """The norm that the loops compute, from what PyTorch's operators can be given: shapes, numbers and strings.

    `kind` is one of `_KINDS`, and `size` is the number of axes that a row has (layer and RMS norm) or of groups (group
    norm). The shape is that of x; where its channels lie last in memory, they are the last axis of the loops' arrays.
    """
    axis = -size if kind in _ROWS else 1
    if last:
        shape, axis = (shape[0], *shape[2:], shape[1]), -1
    groups = size if kind == "group_norm" else 1
    return Norm(kind, shape, _DTYPES[dtype], axis=axis, groups=groups, eps=eps, training=training)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: _Running | None, norm: Norm
) -> tuple[Tensor, Cache]:
    if torch.get_num_threads() != normext.get_num_threads():
        with normext.threads(torch.get_num_threads()):
            return _forward(x, weight, bias, running, norm)
    last, arrays = not x.is_contiguous(), None
    gamma, beta = None if weight is None else _array(weight), None if bias is None else _array(bias)
    if running is not None:
        mean, var, momentum = running
        arrays = mean.numpy(), var.numpy(), 1 - momentum if norm.training else 1.0, True
    y, cache = forward(_array(x, last), norm, gamma, beta, arrays, None, None)
    if running is not None and norm.training:
        increment_version((mean, var))
    return _tensor(y, last), cache


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: np.ndarray | None,
    statistics: tuple[np.ndarray, np.ndarray],
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, each in its dtype; gamma is the weight as the forward pass had it."""
    if torch.get_num_threads() != normext.get_num_threads():
        with normext.threads(torch.get_num_threads()):
            return _backward(dy, x, weight, bias, gamma, statistics, norm)
    last = not x.is_contiguous()
    d = _array(dy.contiguous(memory_format=_CHANNELS_LAST[x.dim()]) if last else dy.contiguous(), last)
    # A cache that is kept would keep x, and it is autograd that must, so that what saves memory for it, such as
    # checkpoints, works. Of beta a backward pass wants to know only whether there is one.
    cache = new_cache(norm, _array(x, last), gamma, None if bias is None else statistics[0], *statistics)
    dx, *parameters = backward(d, cache, norm.kind, None, None)
    dgamma, dbeta = (None if p is None else torch.from_numpy(p) for p in parameters)
    if x.dtype in _NARROW and (weight if bias is None else bias) is not None:
        dgamma, dbeta = (None if p is None else g.to(p.dtype) for p, g in ((weight, dgamma), (bias, dbeta)))
    dx = _tensor(dx, last)
    if norm.kind == "rms_norm" and not dy.is_contiguous():
        dx = torch.empty_like(dy).copy_(dx)  # as dy lies, because PyTorch's is made by operations element by element
    return dx, dgamma, dbeta


# The second order -----------------------------------------------------------------------------------------------------


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Sequence[Tensor],
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `_backward` computes, in operations that PyTorch differentiates, and maps over a batch of gradients.

    The formulas are in the docstrings of `normext.batch_norm_backward` and its like. Statistics are taken again, for
    they depend on x; the mean that is known is taken off before, so that data far from zero lose nothing.
    """
    # As arrays in which the statistics are those of `stats`, and the parameters are shared along `shared`.
    if norm.kind == "group_norm":
        shape = x.shape[0], norm.groups, x.shape[1] // norm.groups, -1
        groups, channels, stats, shared = (*shape[:2], 1, 1), (1, *shape[1:3], 1), (2, 3), (0, 3)
    elif norm.kind == "batch_norm":
        groups = channels = (1, x.shape[1], 1)
        shape, stats, shared = (*x.shape[:2], -1), (0, 2), (0, 2)
    else:
        groups, channels = (-1, 1), (1, -1)
        shape, stats, shared = (x.shape[: norm.axis].numel(), -1), (1,), (0,)
    mean, rstd = statistics
    wide = torch.float32 if x.dtype in _NARROW else x.dtype
    x_, dy = x.to(wide).reshape(shape), dy.to(wide).reshape(shape)
    g = dy if weight is None else dy * weight.to(wide).reshape(channels)
    if norm.training:
        xhat = x_ - mean.to(wide).reshape(groups)
        if norm.kind != "rms_norm":
            xhat = xhat - xhat.mean(stats, keepdim=True)
        r = (xhat.square().mean(stats, keepdim=True) + norm.eps).rsqrt()
        xhat = xhat * r
        dx = g - xhat * (g * xhat).mean(stats, keepdim=True)
        if norm.kind != "rms_norm":
            dx = dx - g.mean(stats, keepdim=True)
        dx = dx * r
    else:
        r = rstd.to(wide).reshape(groups)
        xhat, dx = (x_ - mean.to(wide).reshape(groups)) * r, g * r
    dweight = None if weight is None else (dy * xhat).sum(shared).reshape(weight.shape).to(weight.dtype)
    dbias = None if bias is None else dy.sum(shared).reshape(bias.shape).to(bias.dtype)
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias


def _second_order(
    grads: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Sequence[Tensor],
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of dy, x and weight, of those of dx, dweight and dbias."""

    def first_order(dy, x, weight=None):
        return tuple(g for g in _gradients(dy, x, weight, bias, statistics, norm) if g is not None)

    _, vjp = torch.func.vjp(first_order, dy, x, *(() if weight is None else (weight,)))
    given = vjp(tuple(grad for grad, of in zip(grads, (x, weight, bias)) if of is not None))
    return given if weight is not None else (*given, None)


# For eager calls ------------------------------------------------------------------------------------------------------


def _transformed(t: Tensor) -> bool:
    """Whether PyTorch does more with a tensor than compute: maps, traces, ... For that it knows its own operations."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_legacy_batchedtensor(t)  # as by `torch.autograd.grad(is_grads_batched=True)`
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


class _Norm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, norm):
        y, cache = _forward(x, weight, bias, running, norm)
        # Of bias nothing is needed but that it is there: it may change before the backward pass.
        ctx.rest = bias, cache.gamma, (cache.mean, cache.rstd), norm
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx, dy):
        if _transformed(dy):
            bias, _, statistics, norm = ctx.rest
            statistics = [torch.from_numpy(s) for s in statistics]
            return *_gradients(dy, *ctx.saved_tensors, bias, statistics, norm), None, None
        gradients = _NormBackward.apply if torch.is_grad_enabled() else _backward
        return *gradients(dy, *ctx.saved_tensors, *ctx.rest), None, None


class _NormBackward(Function):
    @staticmethod
    def forward(ctx, dy, x, weight, bias, gamma, statistics, norm):
        ctx.rest = bias, [torch.from_numpy(s) for s in statistics], norm
        ctx.save_for_backward(dy, x, weight)
        return _backward(dy, x, weight, bias, gamma, statistics, norm)

    @staticmethod
    def backward(ctx, *grads):
        return *_second_order(grads, *ctx.saved_tensors, *ctx.rest), None, None, None, None


# For torch.compile ----------------------------------------------------------------------------------------------------

# Operators return tensors alone: an empty one stands for none.


def _statistics_shape(x: Tensor, kind: str, size: int) -> Sequence[int]:
    if kind in _ROWS:
        return x.shape[: x.dim() - size]
    return x.shape[1:2] if kind == "batch_norm" else (x.shape[0], size)


def _check_devices(*tensors: Tensor | None) -> None:
    """In the operators' shapes alone, which are what is called if any of the tensors has no memory."""
    if len({t.device for t in tensors if t is not None}) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(map(_described, tensors))}")


def _checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, size: int, eps: float, training: bool
) -> tuple[Tensor, Norm]:
    """For the operators, which anybody may call: a walkable x and its norm, if the functions below let them through."""
    if forward_ad._current_level >= 0:  # PyTorch would take the tangents for zeros
        raise RuntimeError("normext::norm has no forward-mode derivatives: call normext.torch's functions")
    # Words that go with no x, before x is looked at. Norm, which knows more kinds, is made of an x that fits.
    if norm not in _KINDS:
        raise ValueError(f"norm must be one of {', '.join(_KINDS)}, got {norm!r}")
    if norm == "rms_norm" and bias is not None:
        raise ValueError(f"rms_norm must have no bias, got {_described(bias)}")
    if norm != "batch_norm" and not training:
        raise ValueError(f"{norm} must have training=True, got False")
    row = x.shape[-size:] if 0 < size <= x.dim() else ()
    if misfit := _misfit(norm, row if norm in _ROWS else size, x, weight, bias, eps):
        raise ValueError(misfit)
    x = _walkable(x, norm)
    return x, _norm_of(x.shape, x.dtype, not x.is_contiguous(), norm, size, eps, training)


@torch.library.custom_op("normext::norm", mutates_args=(), device_types="cpu")
def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: str,
    size: int,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, rstd and, for batch norm in training, the unbiased variance."""
    x, plan = _checked(x, weight, bias, norm, size, eps, training)
    if norm == "batch_norm":
        if misfit := _running_misfit(x, weight, bias, running_mean, running_var, training, 1.0):
            raise ValueError(misfit)
    elif running_mean is not None or running_var is not None:
        raise ValueError(f"{norm} must have no running statistics, got some")
    var = x.new_empty(0, dtype=torch.float64)
    if norm == "batch_norm" and training:
        running_mean, var = (x.new_zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
        running_var = var
    running = (running_mean, running_var, 1.0) if norm == "batch_norm" else None
    y, cache = _forward(x, weight, bias, running, plan)
    return y, torch.from_numpy(cache.mean), torch.from_numpy(cache.rstd), var


@_norm.register_fake
def _(x, weight, bias, running_mean, running_var, norm, size, eps, training):
    _check_devices(x, weight, bias, running_mean, running_var)
    statistics = _statistics_shape(x, norm, size)
    mean, rstd = (x.new_empty(statistics, dtype=torch.float64) for _ in range(2))
    var = x.new_empty(statistics if norm == "batch_norm" and training else 0, dtype=torch.float64)
    return torch.empty_like(_walkable(x, norm)), mean, rstd, var


@torch.library.custom_op("normext::norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    size: int,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = _checked(x, weight, bias, norm, size, eps, training)
    of_statistics = _statistics_shape(x, norm, size), torch.float64
    for name, t, (shape, dtype) in (
        ("dy", dy, (x.shape, x.dtype)),
        ("mean", mean, of_statistics),
        ("rstd", rstd, of_statistics),
    ):
        if not (t.shape == shape and t.dtype == dtype and t.is_cpu and t.layout is torch.strided):
            raise ValueError(f"{name} must be on the CPU, of shape {tuple(shape)} and {dtype}, got {_described(t)}")
    wide = np.float64 if x.dtype == torch.float64 else np.float32
    gamma = None if weight is None else np.ascontiguousarray(_array(weight), wide)
    statistics = _array(mean.contiguous()), _array(rstd.contiguous())
    gradients = _backward(dy, x, weight, bias, gamma, statistics, plan)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_norm_backward.register_fake
def _(dy, x, weight, bias, mean, rstd, norm, size, eps, training):
    _check_devices(dy, x, weight, bias, mean, rstd)
    dx = torch.empty_like(dy) if norm == "rms_norm" else torch.empty_like(_walkable(x, norm))
    return dx, *(x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))


def _save_norm(ctx, inputs, output):
    x, weight, bias, _, _, *ctx.how = inputs
    _, mean, rstd, _ = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _norm_autograd(ctx, dy, *_):
    x, weight, bias, *statistics = ctx.saved_tensors
    gradients = _norm_backward(dy, x, weight, bias, *statistics, *ctx.how)
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad)]
    return *wanted, *[None] * 6


def _save_norm_backward(ctx, inputs, output):
    dy, x, weight, bias, mean, rstd, *ctx.how = inputs
    ctx.save_for_backward(dy, x, weight, bias, mean, rstd)


def _norm_backward_autograd(ctx, *grads):
    dy, x, weight, bias, *statistics = ctx.saved_tensors
    norm = _norm_of(tuple(map(int, x.shape)), x.dtype, False, *ctx.how)  # how x lies is not asked there
    return *_second_order(grads, dy, x, weight, bias, statistics, norm), *[None] * 7


_norm.register_autograd(_norm_autograd, setup_context=_save_norm)
_norm_backward.register_autograd(_norm_backward_autograd, setup_context=_save_norm_backward)


# The functions --------------------------------------------------------------------------------------------------------


_EPS = {dtype: torch.finfo(torch.float32 if dtype in _NARROW else dtype).eps for dtype in _DTYPES}


class _Smallest(NamedTuple):
    """How many numbers x must have at least, without and with a backward pass."""

    inference: int
    training: int


# Below, PyTorch's own functions are done sooner. A call costs here some 10 microseconds more than there, and with its
# backward pass some 50, all in Python; the loops have to win that back. Measured in float32 with PyTorch 2.13, on one
# and two cores of an EPYC of the fourth generation, and before of a Xeon, both with AVX-512: the power of two from
# which on no size took longer on either, two cores, whose last cache holds 4 to 16 MiB of results, deciding most often.
_SMALLEST = {
    "batch_norm": _Smallest(1 << 15, 1 << 17),
    "batch_norm of small images": _Smallest(1 << 16, 1 << 17),
    "batch_norm by columns": _Smallest(1 << 23, 1 << 22),
    "batch_norm in evaluation": _Smallest(1 << 23, 1 << 22),
    "batch_norm in evaluation by columns": _Smallest(1 << 24, 1 << 23),
    "layer_norm": _Smallest(1 << 22, 1 << 21),
    "rms_norm": _Smallest(1 << 11, 1 << 11),
    "group_norm": _Smallest(1 << 24, 1 << 22),
    "instance_norm": _Smallest(1 << 12, 1 << 14),
}
_SMALL_IMAGE = 64  # pixels; batch norm of fewer gains less


def _pays(kind: str, x: Any, training: Any = True) -> bool:
    """Whether the loops are done sooner than PyTorch's own function."""
    if not isinstance(x, Tensor) or x.is_nested or (x.dim() < 2 and kind not in _ROWS):
        return False
    case, n = kind, x.numel()
    if kind == "batch_norm":
        examples, channels, *_ = x.shape
        columns = " by columns" if x.dim() == 2 or not x.is_contiguous() else ""
        small = "" if columns or n >= _SMALL_IMAGE * examples * channels else " of small images"
        case += (small if training else " in evaluation") + columns
    return n >= _SMALLEST[case][torch.is_grad_enabled() and x.requires_grad]


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a {type(value).__name__} of {value.dtype} on {value.device}, {value.layout}, of shape {tuple(value.shape)}"


def _misfit(kind: str, size: Any, x: Any, weight: Any, bias: Any, eps: Any) -> str | None:
    """For what the loops do not take a call, in words; None if they do.

    Of layer and RMS norm, size is the shape of a row; of group norm, the number of groups. `Norm` checks these too, but
    where they are wrong PyTorch is to raise its own error, and `torch.compile`, which reads this, knows no `Norm`.
    """
    if not (type(x) in _TENSORS and x.dtype in _DTYPES and x.is_cpu and x.layout is torch.strided and not x.is_nested):
        return f"input must be a dense tensor of {', '.join(map(str, _DTYPES))} on the CPU, got {_described(x)}"
    n, statistics = x.numel(), 0
    if kind in _ROWS:
        shape = tuple(size) if isinstance(size, (tuple, list)) else ()
        if not shape or x.shape[-len(shape) :] != shape:
            return f"normalized_shape must be that of input's last axes, got {size!r} and {_described(x)}"
    elif x.dim() < 2:
        return f"input must have an axis of channels, got {_described(x)}"
    else:
        examples, channels, *_ = x.shape
        shape = (channels,)
        if kind == "group_norm":
            if not (isinstance(size, int) and 0 < size and channels % size == 0):
                return f"the number of groups must divide the {channels} channels, got {size!r}"
            statistics = size
        elif kind == "instance_norm":
            statistics = examples * channels
    if n in (0, statistics):  # PyTorch makes an error of channels of one number, and of one example with such groups
        return f"input must have numbers to normalize, more than one, got {_described(x)}"
    # PyTorch takes a smaller eps for 0 where it computes in float32, and gives NaN where all numbers are equal.
    if not (type(eps) in (float, int) and 2.0**-126 <= eps < math.inf):
        return f"eps must be a number from {2.0**-126:.1e} on, got {eps!r}"
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not (
            type(p) in _TENSORS
            and (p.dtype is x.dtype or (p.dtype is torch.float32 and x.dtype in _NARROW))
            and p.shape == shape
            and p.is_contiguous()
            and p.is_cpu
        ):
            wanted = (
                f"contiguous on the CPU, of shape {tuple(shape)} and input's dtype (or float32 if that has 16 bits)"
            )
            return f"{name} must be {wanted}, got {_described(p)}"
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        return f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}"
    return None


def _running_misfit(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, training: Any, momentum: Any
) -> str | None:
    """The same of batch norm's other arguments."""
    shape = x.shape[1:2]
    if type(training) is not bool:
        return f"training must be True or False, got {training!r}"
    if training:
        if x.numel() == shape[0]:
            return f"input must have more than one number a channel in training, got {_described(x)}"
        if not (isinstance(momentum, (float, int)) and 0 <= momentum <= 1):
            return f"momentum must be a number from 0 to 1, got {momentum!r}"
        if mean is None and var is None:
            return None
    parameter = bias if weight is None else weight
    dtypes = (x.dtype, torch.float32 if x.dtype in _NARROW else x.dtype) if parameter is None else (parameter.dtype,)
    for name, running in (("running_mean", mean), ("running_var", var)):
        if not (
            type(running) in _TENSORS
            and running.shape == shape
            and running.dtype in dtypes
            and running.is_cpu
            and running.layout is torch.strided
            and running.is_contiguous()
            and not running.requires_grad
        ):
            wanted = f"contiguous on the CPU, of shape {tuple(shape)} and {dtypes[-1]}, without a gradient"
            return f"{name} must be {wanted}, got {_described(running)}"
    return None


def _takes(misfit: str | None, x: Tensor, always: bool) -> bool:
    """Whether the loops take a call; an error where they always should."""
    if misfit is None and (
        _transformed(x)
        if not torch.compiler.is_compiling()
        else torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
    ):
        misfit = "transforms, modes, traces and exported programs are of PyTorch's own operations"
    if misfit is not None and always:
        raise ValueError(f"normext does not take this call: {misfit}")
    return misfit is None


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: tuple[str, int, float, bool],
    running: _Running | None = None,
) -> Tensor:
    """A call that the loops take; `how` are the last arguments of `_norm_of`."""
    if torch.compiler.is_compiling():
        mean, var, momentum = running or (None, None, 0.0)
        y, batch_mean, _, batch_var = _norm(x, weight, bias, mean, var, *how)
        if how[3] and mean is not None:
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), momentum)
                var.lerp_(batch_var.to(var.dtype), momentum)
        return y
    norm = _norm_of(x.shape, x.dtype, not x.is_contiguous(), *how)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Norm.apply(x, weight, bias, running, norm)
    return _forward(x, weight, bias, running, norm)[0]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    always: bool = False,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, computed by `normext.batch_norm`.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        float32, float64, float16, or bfloat16 where ml_dtypes is installed.
    running_mean, running_var : Tensor of shape (C,), or None
        In training they are updated in place where given, as PyTorch updates them: by the unbiased variance.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift. Default: 1 and 0.
    training : bool, default False
        Whether to normalize with the batch's statistics or with the running ones.
    momentum : float, default 0.1
        The share of the batch's statistics in the updated running ones: one minus that of `normext.batch_norm`.
    eps : float, default 1e-5
        Added to the variance.
    always : bool, default False
        Have the loops compute calls of any size, and raise an error where they do not take one, in place of leaving it
        to PyTorch's function.

    Returns
    -------
    Tensor
        In the shape, dtype and memory format of input.

    Raises
    ------
    ValueError, RuntimeError
        As PyTorch's own function, which is called where these arguments do not fit; with `always`, ValueError.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> normext.torch.batch_norm(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), mean, var, training=True, eps=1e-8)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> mean
    tensor([0.2000, 0.4000])
    """
    if not (
        (always or _pays("batch_norm", input, training))
        and _takes(
            _misfit("batch_norm", None, input, weight, bias, eps)
            or _running_misfit(input, weight, bias, running_mean, running_var, training, momentum),
            input,
            always,
        )
    ):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x, how = _walkable(input, "batch_norm"), ("batch_norm", 0, eps, training)
    if running_mean is None:
        return _normalized(x, weight, bias, how)
    mean, var, narrow = running_mean, running_var, running_mean.dtype in _NARROW
    if narrow:
        mean, var = mean.float(), var.float()
    y = _normalized(x, weight, bias, how, (mean, var, momentum))
    if narrow and training:
        torch._foreach_copy_([running_mean, running_var], [mean, var])  # one call, that no interrupt parts
    return y


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    always: bool = False,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, computed by `normext.layer_norm`.

    Parameters
    ----------
    input : Tensor, shape (..., *normalized_shape)
        As of `batch_norm`.
    normalized_shape : sequence of int
        The shape of a row: of the last axes, over which mean and variance are taken.
    weight, bias : Tensor of shape normalized_shape, optional
        Scale and shift. Default: 1 and 0.
    eps : float, default 1e-5
        Added to the variance.
    always : bool, default False
        As of `batch_norm`.

    Returns
    -------
    Tensor
        In the shape and dtype of input, contiguous.

    Raises
    ------
    TypeError, RuntimeError
        As PyTorch's own function, which is called where these arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> normext.torch.layer_norm(torch.tensor([[1.0, 3.0], [2.0, 6.0]]), [2], eps=1e-8)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    if (always or _pays("layer_norm", input)) and _takes(
        _misfit("layer_norm", normalized_shape, input, weight, bias, eps), input, always
    ):
        x = _walkable(input, "layer_norm")
        return _normalized(x, weight, bias, ("layer_norm", len(normalized_shape), eps, True))
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    always: bool = False,
) -> Tensor:
    """`torch.nn.functional.rms_norm`, computed by `normext.rms_norm`.

    Parameters
    ----------
    input : Tensor, shape (..., *normalized_shape)
        As of `batch_norm`.
    normalized_shape : sequence of int
        The shape of a row: of the last axes, over which the mean square is taken.
    weight : Tensor of shape normalized_shape, optional
        Scale. Default: 1.
    eps : float, optional
        Added to the mean square. Default: as PyTorch has it, that of the type in which input is computed: 1.2e-7, or
        2.2e-16 for float64.
    always : bool, default False
        As of `batch_norm`.

    Returns
    -------
    Tensor
        In the shape and dtype of input, contiguous.

    Raises
    ------
    TypeError, RuntimeError
        As PyTorch's own function, which is called where these arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> normext.torch.rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), [4])
    tensor([[1.2000, 1.6000, 0.0000, 0.0000]])
    """
    added = _EPS.get(getattr(input, "dtype", None)) if eps is None else eps
    if (always or _pays("rms_norm", input)) and _takes(
        _misfit("rms_norm", normalized_shape, input, weight, None, added), input, always
    ):
        x = _walkable(input, "rms_norm")
        y = _normalized(x, weight, None, ("rms_norm", len(normalized_shape), added, True))
        return y if input.is_contiguous() else y.contiguous(memory_format=suggest_memory_format(input))
    return F.rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    always: bool = False,
) -> Tensor:
    """`torch.nn.functional.group_norm`, computed by `normext.group_norm`.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As of `batch_norm`.
    num_groups : int
        Divides C. Mean and variance are taken over a group of neighbouring channels of one example.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift. Default: 1 and 0.
    eps : float, default 1e-5
        Added to the variance.
    always : bool, default False
        As of `batch_norm`.

    Returns
    -------
    Tensor
        In the shape, dtype and memory format of input.

    Raises
    ------
    ValueError, RuntimeError
        As PyTorch's own function, which is called where these arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> normext.torch.group_norm(torch.tensor([[1.0, 3.0, 2.0, 6.0]]), 2, eps=0.0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    if (always or _pays("group_norm", input)) and _takes(
        _misfit("group_norm", num_groups, input, weight, bias, eps), input, always
    ):
        return _normalized(_walkable(input, "group_norm"), weight, bias, ("group_norm", num_groups, eps, True))
    return F.group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    always: bool = False,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, computed by `normext.instance_norm`.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As of `batch_norm`.
    running_mean, running_var, use_input_stats, momentum
        As PyTorch has them. With running statistics the loops do not take the call.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift. Default: 1 and 0.
    eps : float, default 1e-5
        Added to the variance.
    always : bool, default False
        As of `batch_norm`.

    Returns
    -------
    Tensor
        In the shape and dtype of input, contiguous.

    Raises
    ------
    ValueError, RuntimeError
        As of `batch_norm`.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> normext.torch.instance_norm(torch.tensor([[[1.0, 3.0], [2.0, 6.0]]]), eps=0.0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    own = use_input_stats is True and running_mean is None and running_var is None
    if (always or _pays("instance_norm", input)) and _takes(
        _misfit("instance_norm", None, input, weight, bias, eps) if own else "there must be no running statistics",
        input,
        always,
    ):
        x = _walkable(input, "instance_norm")
        return _normalized(x, weight, bias, ("group_norm", input.shape[1], eps, True))
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


# The modules ----------------------------------------------------------------------------------------------------------


class _Ours:
    always = False  # as the functions have it


class _BatchNorm(_Ours):
    """What `torch.nn.BatchNorm1d` and its like do, with `batch_norm` above."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        own = self.training or self.running_mean is None  # the batch's own statistics
        running = (self.running_mean, self.running_var) if self.track_running_stats or not own else (None, None)
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean of all batches so far
                momentum = 1 / float(self.num_batches_tracked)
        momentum = 0.0 if momentum is None else momentum
        return batch_norm(input, *running, self.weight, self.bias, own, momentum, self.eps, always=self.always)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with `batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with `batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with `batch_norm`."""


class LayerNorm(_Ours, nn.LayerNorm):
    """`torch.nn.LayerNorm` with `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, always=self.always)


class RMSNorm(_Ours, nn.RMSNorm):
    """`torch.nn.RMSNorm` with `rms_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return rms_norm(input, self.normalized_shape, self.weight, self.eps, always=self.always)


class GroupNorm(_Ours, nn.GroupNorm):
    """`torch.nn.GroupNorm` with `group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, always=self.always)


class _InstanceNorm(_Ours):
    """What `torch.nn.InstanceNorm1d` and its like do, with `instance_norm` above: they call this with a batch."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        own = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        running = self.running_mean, self.running_var
        return instance_norm(input, *running, self.weight, self.bias, own, momentum, self.eps, always=self.always)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with `instance_norm`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with `instance_norm`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with `instance_norm`."""


_OURS = {
    getattr(nn, ours.__name__): ours
    for ours in (
        *(BatchNorm1d, BatchNorm2d, BatchNorm3d, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
        *(GroupNorm, LayerNorm, RMSNorm),
    )
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _exchange(model: nn.Module, classes: dict[type, type]) -> int:
    modules = [module for module in model.modules() if type(module) in classes]
    for module in modules:
        module.__class__ = classes[type(module)]
        vars(module).pop("always", None)
    return len(modules)


def accelerate(model: nn.Module, *, always: bool = False) -> int:
    """Have the norms of a model computed by normext.

    Its modules `BatchNorm1d`, `2d` and `3d`, `InstanceNorm1d`, `2d` and `3d`, `GroupNorm`, `LayerNorm` and `RMSNorm` of
    `torch.nn` become those of this module, in place: parameters, buffers, hooks, mode and the keys of the state stay.
    Modules of other classes that are derived from these, such as `SyncBatchNorm`, are left as they are.

    Parameters
    ----------
    model : torch.nn.Module
        It may be a norm itself.
    always : bool, default False
        Have the loops compute every call of these modules, whatever its size, and raise an error where they do not take
        one, in place of leaving it to PyTorch's function. It is kept as the modules' attribute `always`.

    Returns
    -------
    int
        How many modules were changed; one that occurs in several places counts once.

    See Also
    --------
    restore : the way back.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> normext.torch.accelerate(model)
    1
    >>> normext.torch.restore(model)
    1
    """
    changed = _exchange(model, _OURS)
    for module in model.modules():
        if type(module) in _THEIRS:
            module.always = always
    return changed


def restore(model: nn.Module) -> int:
    """Undo `accelerate`.

    Parameters
    ----------
    model : torch.nn.Module
        One that may have been accelerated, in part or as a whole.

    Returns
    -------
    int
        How many modules were changed.

    Examples
    --------
    >>> import torch
    >>> import normext.torch
    >>> normext.torch.restore(torch.nn.LayerNorm(4))
    0
    """
    return _exchange(model, _THEIRS)
