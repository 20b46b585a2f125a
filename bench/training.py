"""Whole training: the assignment's net of six layers with normext, in plain NumPy, and in eager PyTorch."""

import atexit
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.timing import Entrant
from normext import reference
from normext._blas import blas_for_products
from normext.cs231n import optim
from normext.cs231n.classifiers.fc_net import FullyConnectedNet

__all__ = ["BUDGETS", "PEERS", "TURN", "Case", "cases", "entrants"]

PEERS = ("numpy", "pytorch")
# A turn is long beside the 25 ms for which the threads of NumPy's BLAS go on spinning after the turn before.
TURN = 0.12
BUDGETS = {False: 2.0, True: 0.25}

HIDDEN, INPUTS, CLASSES, IMAGES = [100] * 5, 3 * 32 * 32, 10, 1000
WEIGHT_SCALE, LEARNING_RATE = 2e-2, 1e-3  # and Adam, as in the assignment's experiment with deep nets

# What `Solver.train` does for the length of a training lasts here as long as the process: turns are taken elsewhere.
LIMITS = contextlib.ExitStack()
atexit.register(LIMITS.close)


@dataclass(frozen=True)
class Case:
    """Steps of training (loss, gradients, update) of one net at one batch size."""

    normalization: str | None
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"training {self.normalization or 'none'} batch {self.batch} {self.dtype}"

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}


def cases(quick: bool, dtypes: Iterable[str]) -> list[Case]:
    return [
        Case(normalization, batch, dtype)
        for dtype in dtypes
        if not dtype.endswith("16")
        for batch in ((50,) if quick else (50, 500))
        for normalization in ("batchnorm", "layernorm", None)
    ]


def entrants(case: Case, peers: Sequence[str], threads: int) -> dict[str, Entrant]:
    """All sides from the same weights and on the same batches, which are parts of made-up images in their order.

    NumPy's BLAS, which normext and plain NumPy use, runs on as many threads as pay.
    """
    LIMITS.enter_context(blas_for_products(case.batch * INPUTS * HIDDEN[0]))
    np.random.seed(0)
    net = FullyConnectedNet(
        HIDDEN, INPUTS, CLASSES, normalization=case.normalization, weight_scale=WEIGHT_SCALE, dtype=np.dtype(case.dtype)
    )
    weights = {name: array.copy() for name, array in net.params.items()}
    rng = np.random.default_rng(0)
    images = (64 * rng.standard_normal((IMAGES, INPUTS))).astype(case.dtype)  # pixels are from -128 to 127
    labels = rng.integers(CLASSES, size=IMAGES)
    starts = range(0, IMAGES, case.batch)
    batches = [(images[start : start + case.batch], labels[start : start + case.batch]) for start in starts]

    sides = {"normext": _side(normext_step(net, batches))}
    if "numpy" in peers:
        sides["NumPy"] = _side(numpy_step(case, weights, batches))
    if "pytorch" in peers:
        sides["PyTorch"] = _side(torch_step(case, weights, batches))
    return sides


def _side(step: Callable[[], float]) -> Entrant:
    """Compared by the losses of the first three steps."""
    return Entrant(step, lambda loss: [np.array([loss, step(), step()])])


def normext_step(net: FullyConnectedNet, batches: list[Any]) -> Callable[[], float]:
    turn: Iterator[Any] = itertools.cycle(batches)
    configs = {name: {"learning_rate": LEARNING_RATE} for name in net.params}

    def step() -> float:
        loss, grads = net.loss(*next(turn))
        for name, w in net.params.items():
            net.params[name], configs[name] = optim.adam(w, grads[name], configs[name])
        return loss

    return step


def numpy_step(case: Case, p: dict[str, np.ndarray], batches: list[Any]) -> Callable[[], float]:
    """The same as one writes it from the textbook: every layer, the loss and the rule in a few NumPy operations."""
    turn: Iterator[Any] = itertools.cycle(batches)
    p = {name: array.copy() for name, array in p.items()}
    layers = len(HIDDEN) + 1
    m, v = ({name: np.zeros_like(array) for name, array in p.items()} for _ in range(2))
    running = [{"running_mean": np.zeros(h, case.dtype), "running_var": np.zeros(h, case.dtype)} for h in HIDDEN]
    backwards = {"batchnorm": reference.batch_norm_backward, "layernorm": reference.layer_norm_backward}
    count = itertools.count(1)

    def loss_and_grads(x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        inputs, norm_caches, before_relu = [], [], []
        for i in range(1, layers + 1):
            inputs.append(x)
            x = x @ p[f"W{i}"] + p[f"b{i}"]
            if i == layers:
                break
            if case.normalization == "batchnorm":
                x, cache = reference.batch_norm(x, p[f"gamma{i}"], p[f"beta{i}"], **running[i - 1])
                norm_caches.append(cache)
            elif case.normalization == "layernorm":
                x, cache = reference.layer_norm(x, p[f"gamma{i}"], p[f"beta{i}"])
                norm_caches.append(cache)
            before_relu.append(x)
            x = np.maximum(x, 0)

        rows = np.arange(len(y))
        shifted = x - x.max(axis=1, keepdims=True)
        probabilities = np.exp(shifted)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        loss = -np.log(probabilities[rows, y]).mean()
        d = probabilities
        d[rows, y] -= 1
        d /= len(y)

        grads = {}
        for i in range(layers, 0, -1):
            if i < layers:
                d = d * (before_relu[i - 1] > 0)
                if case.normalization is not None:
                    d, grads[f"gamma{i}"], grads[f"beta{i}"] = backwards[case.normalization](d, norm_caches[i - 1])
            grads[f"W{i}"], grads[f"b{i}"] = inputs[i - 1].T @ d, d.sum(axis=0)
            d = d @ p[f"W{i}"].T
        return float(loss), grads

    def step() -> float:
        loss, grads = loss_and_grads(*next(turn))
        t = next(count)
        for name, g in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            mhat, vhat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.999**t)
            p[name] = p[name] - LEARNING_RATE * mhat / (np.sqrt(vhat) + 1e-8)
        return loss

    return step


def torch_step(case: Case, weights: dict[str, np.ndarray], batches: list[Any]) -> Callable[[], float]:
    """Modules, autograd and `torch.optim.Adam`, all with their defaults."""
    import torch
    from torch import nn

    norm = {"batchnorm": nn.BatchNorm1d, "layernorm": nn.LayerNorm, None: None}[case.normalization]
    modules: list[nn.Module] = []
    names: list[str] = []
    sizes = [INPUTS, *HIDDEN, CLASSES]
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
        modules.append(nn.Linear(fan_in, fan_out))
        names += [f"W{i}", f"b{i}"]
        if i <= len(HIDDEN):
            if norm is not None:
                modules.append(norm(fan_out))
                names += [f"gamma{i}", f"beta{i}"]
            modules.append(nn.ReLU())
    net = nn.Sequential(*modules).to(getattr(torch, case.dtype))
    with torch.no_grad():
        for name, parameter in zip(names, net.parameters(), strict=True):
            parameter.copy_(torch.from_numpy(weights[name]).t())
    rule = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    turn = itertools.cycle([tuple(map(torch.from_numpy, batch)) for batch in batches])

    def step() -> float:
        x, y = next(turn)
        rule.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        rule.step()
        return loss.item()

    return step
