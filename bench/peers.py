"""The sides of the comparison of norms: normext, the textbook formula in NumPy, PyTorch, JAX, numba, and the limit."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

import normext
from bench.cases import BOTH, Case, Data, cases, copies_to_move, data_of, drawn
from bench.timing import Copy, Entrant
from normext import reference

__all__ = ["BUDGETS", "PEERS", "TURN", "cases", "drawn", "entrants"]

PEERS = ("limit", "pytorch", "jax", "numba", "numpy")
TURN = 2e-4  # seconds: thousands of times the clock's resolution
BUDGETS = {False: 0.08, True: 0.02}  # seconds for each entrant of a case; quick or not
MOMENTUM = 0.9


def entrants(case: Case, peers: Sequence[str], threads: int) -> dict[str, Entrant]:
    """All sides of a case by name, normext first; a peer that has no such operation is left out."""
    data = data_of(case)
    sides = library_entrants("normext", normext, case, data)
    if case.series:
        peers = [peer for peer in peers if peer == "limit"]
    for peer in peers:
        sides |= _peer(peer, threads).entrants(case, data)
    return sides


@cache
def _peer(name: str, threads: int) -> Any:
    return {"numpy": NumPy, "pytorch": PyTorch, "jax": JAX, "numba": Numba, "limit": Limit}[name](threads)


def require_threads(peer: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{peer} would run on {found} threads, {wanted} are wanted")


def forward_then_backward(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Callable[[], Any]:
    """A step of training: y and the gradients, with what the forward pass has just given."""

    def both() -> Any:
        result = forward()
        return result[0], *backward(result)

    return both


# normext and NumPy ----------------------------------------------------------------------------------------------------


def library_entrants(name: str, library: Any, case: Case, data: Data) -> dict[str, Entrant]:
    """The norms of normext or of its reference, which have the same signatures; normext also with ``out=``."""
    norm, backward = getattr(library, f"{case.norm}_norm"), getattr(library, f"{case.norm}_norm_backward")
    groups = (case.plan.groups,) if case.norm == "group" else ()
    arguments = [data.x, *groups, data.gamma, *([] if case.norm == "rms" else [data.beta])]
    keywords: dict[str, Any] = {"axis": case.plan.axis} if case.layout == "NHWC" else {}
    if case.norm == "batch":
        # Its own, for a forward pass changes them.
        keywords |= {"running_mean": data.running_mean.copy(), "running_var": data.running_var.copy()}
    if case.step == "evaluation":
        keywords["training"] = False
    forward = partial(norm, *arguments, **keywords)
    _, given = forward()

    def side(**out: np.ndarray) -> Entrant:
        y_out = {"out": out["y"]} if out else {}
        dx_out = {"out": out["dx"]} if out else {}
        if case.step == "backward":
            return Entrant(partial(backward, data.dy, given, **dx_out), tuple)
        run = partial(forward, **y_out)
        if case.step == BOTH:
            return Entrant(forward_then_backward(run, lambda r: backward(data.dy, r[1], **dx_out)), tuple)
        return Entrant(run, lambda result: result[:1])

    sides = {name: side()}
    if library is normext:
        sides[f"{name} out="] = side(y=np.empty_like(data.x), dx=np.empty_like(data.x))
    return sides


class NumPy:
    """The textbook formulas of `normext.reference`, one NumPy operation after the other; NumPy's run on one thread."""

    def __init__(self, threads: int) -> None:
        pass

    def entrants(self, case: Case, data: Data) -> dict[str, Entrant]:
        return library_entrants("NumPy", reference, case, data)


# PyTorch --------------------------------------------------------------------------------------------------------------


class PyTorch:
    """The native operators of aten with autograd off, and, for whole steps, the module with autograd on.

    RMS norm has no native backward on the CPU: it is autograd's walk through a graph that was made before. Instance
    norm is, as in PyTorch itself, batch norm of the examples as channels, with N,H,W,C copied to N,C,H,W before. Of the
    operators only batch norm's takes an output. N,H,W,C is PyTorch's channels_last.
    """

    def __init__(self, threads: int) -> None:
        import torch

        require_threads("PyTorch", torch.get_num_threads(), threads)
        self.torch = torch

    def entrants(self, case: Case, data: Data) -> dict[str, Entrant]:
        without_autograd = partial(self.torch.set_grad_enabled, False)
        with_autograd = partial(self.torch.set_grad_enabled, True)
        without_autograd()
        arrays = self.tensor(data.x, case), self.tensor(data.dy, case), *map(self.tensor, data[2:])
        forward, backward = getattr(self, f"{case.norm}_norm")(case, *arrays)
        result = partial(self.arrays, case)
        if case.step == "backward":
            # What a forward pass saves is made here, and not timed; RMS norm's graph needs autograd.
            before = with_autograd if case.norm == "rms" else without_autograd
            before()
            call = partial(backward, forward())
            without_autograd()
            # It adds dgamma and dbeta of 16-bit data up in 16 bits: of many rows no digit is right.
            compared = slice(1) if case.itemsize == 2 else slice(None)
            return {"PyTorch": Entrant(call, lambda r: result(r[compared]), before)}
        if case.step == BOTH:
            module = self.module(case, arrays)
            before = with_autograd if case.norm == "rms" else without_autograd
            return {
                "PyTorch": Entrant(forward_then_backward(forward, backward), result, before),
                "PyTorch autograd": Entrant(self.training_step(module, *arrays[:2]), result, with_autograd),
            }
        sides = {"PyTorch": Entrant(forward, lambda r: result(r)[:1], without_autograd)}
        if case.norm == "batch":
            sides["PyTorch out="] = Entrant(
                self.batch_norm_out(case, *arrays), lambda r: result(r)[:1], without_autograd
            )
        return sides

    def tensor(self, array: np.ndarray, case: Case | None = None) -> Any:
        """The same memory; images with the channels last are seen as N,C,H,W, as PyTorch wants them."""
        if array.dtype.name == "bfloat16":
            tensor = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if case is not None and case.layout == "NHWC" else tensor

    def arrays(self, case: Case, results: Any) -> list[np.ndarray]:
        found = []
        for tensor in results:
            tensor = tensor.detach()
            if case.layout == "NHWC" and tensor.ndim == 4:
                tensor = tensor.permute(0, 2, 3, 1)
            found.append((tensor.float() if case.itemsize == 2 else tensor).numpy())
        return found

    # Each gives the forward call, and the backward call that takes what the forward one returned.

    def batch_norm(self, case: Case, x: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        mean, var, training = mean.clone(), var.clone(), case.plan.training
        native = self.torch.ops.aten.native_batch_norm_backward.default
        forward = partial(
            self.torch.native_batch_norm, x, gamma, beta, mean, var, training, 1 - MOMENTUM, case.plan.eps
        )
        return forward, lambda r: native(dy, x, gamma, mean, var, r[1], r[2], True, case.plan.eps, [True, True, True])

    def batch_norm_out(self, case: Case, x: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        training = case.plan.training
        saved = {"save_mean": self.torch.empty_like(mean), "save_invstd": self.torch.empty_like(mean)}
        return partial(
            self.torch.ops.aten.native_batch_norm.out,
            *(x, gamma, beta, mean.clone(), var.clone(), training, 1 - MOMENTUM, case.plan.eps),
            **(saved if training else {name: empty[:0] for name, empty in saved.items()}),
            out=self.torch.empty_like(x),
        )

    def layer_norm(self, case: Case, x: Any, dy: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        native, shape = self.torch.ops.aten.native_layer_norm_backward.default, [case.channels]
        forward = partial(self.torch.native_layer_norm, x, shape, gamma, beta, case.plan.eps)
        return forward, lambda r: native(dy, x, shape, r[1], r[2], gamma, beta, [True, True, True])

    def rms_norm(self, case: Case, x: Any, dy: Any, gamma: Any, *_: Any) -> Any:
        if case.step != "forward":
            x, gamma = x.clone().requires_grad_(), gamma.clone().requires_grad_()
        grad = partial(self.torch.autograd.grad, retain_graph=case.step == "backward")

        def forward() -> Any:
            return (self.torch.rms_norm(x, (case.channels,), gamma, case.plan.eps),)

        return forward, lambda r: grad(r[0], [x, gamma], dy)

    def group_norm(self, case: Case, x: Any, dy: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        N, C, inner, G = *x.shape[:2], math.prod(x.shape[2:]), case.plan.groups
        native = self.torch.ops.aten.native_group_norm_backward.default
        forward = partial(self.torch.native_group_norm, x, gamma, beta, N, C, inner, G, case.plan.eps)
        return forward, lambda r: native(dy, x, r[1], r[2], gamma, N, C, inner, G, [True, True, True])

    def instance_norm(self, case: Case, x: Any, dy: Any, gamma: Any, beta: Any, *_: Any) -> Any:
        torch, (N, C) = self.torch, x.shape[:2]
        native = torch.ops.aten.native_batch_norm_backward.default
        as_channels = (1, N * C, *x.shape[2:])
        kept = x.contiguous()  # by the forward pass for the backward one

        def forward() -> Any:
            view = x.contiguous().view(as_channels)
            y, mean, rstd = torch.native_batch_norm(
                view, gamma.repeat(N), beta.repeat(N), None, None, True, 1 - MOMENTUM, case.plan.eps
            )
            return y.view(x.shape), mean, rstd

        def backward(r: Any) -> Any:
            upstream, view = dy.contiguous().view(as_channels), kept.view(as_channels)
            dx, dgamma, dbeta = native(
                upstream, view, gamma.repeat(N), None, None, r[1], r[2], True, case.plan.eps, [True, True, True]
            )
            return dx.view(x.shape), dgamma.view(N, C).sum(0), dbeta.view(N, C).sum(0)

        return forward, backward

    def module(self, case: Case, arrays: Any) -> Any:
        nn = self.torch.nn
        _, _, gamma, beta, _, _ = arrays
        C = case.channels
        module = {
            "batch": lambda: (nn.BatchNorm1d if case.layout == "ND" else nn.BatchNorm2d)(
                C, case.plan.eps, 1 - MOMENTUM
            ),
            "layer": lambda: nn.LayerNorm(C, case.plan.eps),
            "rms": lambda: nn.RMSNorm(C, case.plan.eps),
            "group": lambda: nn.GroupNorm(case.plan.groups, C, case.plan.eps),
            "instance": lambda: nn.InstanceNorm2d(C, case.plan.eps, affine=True),
        }[case.norm]()
        module = module.to(gamma.dtype)
        for parameter, values in zip(module.parameters(), (gamma, beta)):
            parameter.copy_(values)
        return module

    def training_step(self, module: Any, x: Any, dy: Any) -> Callable[[], Any]:
        x = x.detach().requires_grad_()
        wanted, grad = [x, *module.parameters()], self.torch.autograd.grad
        for parameter in wanted:
            parameter.requires_grad_()

        def step() -> Any:
            y = module(x)
            return y, *grad(y, wanted, dy)

        return step


# JAX ------------------------------------------------------------------------------------------------------------------


class JAX:
    """The formulas as one writes them with jax.numpy, compiled by jit; statistics of 16-bit data in float32.

    JAX takes its threads from the cores that the process may use. float64 is switched on for such cases only.
    """

    def __init__(self, threads: int) -> None:
        import jax

        self.jax = jax

    def entrants(self, case: Case, data: Data) -> dict[str, Entrant]:
        jax = self.jax
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        forward, backward = self.functions(case)
        x, dy, *parameters = (jax.numpy.asarray(array) for array in data)

        def both(x: Any, dy: Any, *parameters: Any) -> Any:
            y, *statistics = forward(x, *parameters)
            return y, *backward(dy, x, parameters[0], *statistics[:2]), statistics

        if case.step == "backward":
            function, given = backward, (dy, x, parameters[0], *jax.jit(forward)(x, *parameters)[1:3])
        elif case.step == BOTH:
            function, given = both, (x, dy, *parameters)
        else:
            function, given = forward, (x, *parameters)
        compiled = jax.jit(function)
        # Statistics are results too, or the compiler would leave them out, but they are not compared.
        compared = {"backward": slice(None), BOTH: slice(0, -1)}.get(case.step, slice(0, 1))
        return {
            "JAX": Entrant(
                lambda: jax.block_until_ready(compiled(*given)),
                lambda result: [np.asarray(array) for array in result[compared]],
            )
        }

    def functions(self, case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """forward(x, gamma, beta, running_mean, running_var) and backward(dy, x, gamma, mean, rstd)."""
        jnp, ndim = self.jax.numpy, len(case.shape)
        view, parameter = case.shape, tuple(case.channels if i == case.plan.axis else 1 for i in range(ndim))
        others = tuple(i for i in range(ndim) if i != case.plan.axis)
        stat_axes, param_axes = others, others
        if case.norm in ("layer", "rms"):
            stat_axes = (case.plan.axis,)
        elif case.norm in ("group", "instance"):
            at = case.plan.axis
            groups = (case.plan.groups, case.channels // case.plan.groups)
            view, parameter = ((*s[:at], *groups, *s[at + 1 :]) for s in (case.shape, (1,) * ndim))
            param_axes = tuple(i for i in range(ndim + 1) if i not in (at, at + 1))
            stat_axes = (*param_axes[1:], at + 1)
        computing = jnp.float64 if case.dtype == "float64" else jnp.float32

        def wide(a: Any) -> Any:
            return a.reshape(view).astype(computing)

        def forward(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any) -> Any:
            v, running = wide(x), ()
            if case.step == "evaluation":
                mean, var = running_mean.reshape(parameter), running_var.reshape(parameter)
            elif case.norm == "rms":
                mean, var = jnp.zeros(()), jnp.mean(v * v, stat_axes, keepdims=True)
            else:
                mean, var = jnp.mean(v, stat_axes, keepdims=True), jnp.var(v, stat_axes, keepdims=True)
                if case.norm == "batch":
                    pairs = (running_mean, mean), (running_var, var)
                    running = tuple(MOMENTUM * old + (1 - MOMENTUM) * new.reshape(-1) for old, new in pairs)
            rstd = self.jax.lax.rsqrt(var + case.plan.eps)
            y = (v - mean) * rstd * gamma.reshape(parameter)
            if case.norm != "rms":
                y = y + beta.reshape(parameter)
            return y.reshape(x.shape).astype(x.dtype), mean, rstd, *running

        def backward(dy: Any, x: Any, gamma: Any, mean: Any, rstd: Any) -> Any:
            dy, xhat = wide(dy), (wide(x) - mean) * rstd
            g = dy * gamma.reshape(parameter)
            centre = 0 if case.norm == "rms" else jnp.mean(g, stat_axes, keepdims=True)
            dx = rstd * (g - centre - xhat * jnp.mean(g * xhat, stat_axes, keepdims=True))
            dx = dx.reshape(x.shape).astype(x.dtype)
            dgamma = jnp.sum(dy * xhat, param_axes).reshape(-1)
            return (dx, dgamma) if case.norm == "rms" else (dx, dgamma, jnp.sum(dy, param_axes).reshape(-1))

        return forward, backward


# numba ----------------------------------------------------------------------------------------------------------------


class Numba:
    """Loops as one writes them by hand (`bench.numba_loops`): batch norm and layer norm of float32 and float64."""

    def __init__(self, threads: int) -> None:
        import numba

        from bench import numba_loops

        require_threads("numba", numba.get_num_threads(), threads)
        self.loops, self.threads = numba_loops, threads

    def entrants(self, case: Case, data: Data) -> dict[str, Entrant]:
        if case.norm not in ("batch", "layer") or case.itemsize == 2:
            return {}
        shape = (*case.shape[:2], -1) if case.layout == "NCHW" else (-1, case.channels)
        kind = "rows" if case.norm == "layer" else "runs" if case.layout == "NCHW" else "columns"
        x, dy = data.x.reshape(shape), data.dy.reshape(shape)
        forward_loop, backward_loop = getattr(self.loops, f"{kind}_forward"), getattr(self.loops, f"{kind}_backward")
        running = data.running_mean.copy(), data.running_var.copy()
        forward_more = {
            "columns": (*running, MOMENTUM, case.plan.eps, self.threads),
            "runs": (*running, MOMENTUM, case.plan.eps),
            "rows": (case.plan.eps,),
        }[kind]
        backward_more = () if kind == "runs" else (self.threads,)
        forward = partial(forward_loop, x, data.gamma, data.beta, *forward_more)

        def arrays(result: Any) -> list[np.ndarray]:
            return [a.reshape(case.shape) if a.size == case.size and a.ndim > 1 else a for a in result]

        if case.step == "forward":
            return {"numba": Entrant(forward, lambda r: arrays(r[:1]))}
        if case.step == "evaluation":
            apply = partial(
                getattr(self.loops, f"{kind}_evaluation"), x, data.gamma, data.beta, *running, case.plan.eps
            )
            return {"numba": Entrant(apply, lambda y: arrays([y]))}
        _, mean, rstd = forward()
        if case.step == "backward":
            return {"numba": Entrant(partial(backward_loop, dy, x, data.gamma, mean, rstd, *backward_more), arrays)}
        call = forward_then_backward(forward, lambda r: backward_loop(dy, x, data.gamma, r[1], r[2], *backward_more))
        return {"numba": Entrant(call, arrays)}


# The limit ------------------------------------------------------------------------------------------------------------


class Limit:
    """The time of a plain copy of x, as often as `bench.cases.copies_to_move` says."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def entrants(self, case: Case, data: Data) -> dict[str, Entrant]:
        return {"limit": Entrant(Copy(data.x, self.threads).call, scale=copies_to_move(case))}
