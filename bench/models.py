"""Whole models in PyTorch, as they are and after `normext.torch.accelerate`, and what their norms take of a step."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.timing import Entrant
from normext.studies.report_text import table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BEGIN", "BUDGETS", "END", "PEERS", "TURN", "Case", "cases", "entrants", "page_figures", "text"]

PEERS = ("pytorch",)
# A turn is long beside the milliseconds for which threads that have done their part go on spinning.
TURN = 0.1
BUDGETS = {False: 1.0, True: 0.15}

BEGIN, END = "<!-- models -->", "<!-- end of models -->"  # what stands between them in docs/pytorch.md is written here
# The same norms on inputs of the same shapes, without the rest of the model.
ALONE = {"PyTorch": "normext off, norms alone", "normext": "normext on, norms alone"}

CLASSES, IMAGE, TOKENS, WIDTH, BLOCKS, HEADS, VOCABULARY = 10, 64, 128, 256, 4, 4, 256


@dataclass(frozen=True)
class Case:
    """Steps of one model at one batch size."""

    model: str
    step: str  # training (loss, gradients, update) or inference
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.step} batch {self.batch} {self.dtype}"

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}


def cases(quick: bool, dtypes: Iterable[str]) -> list[Case]:
    return [
        Case(model, step, batch, dtype)
        for dtype in dtypes
        if not dtype.endswith("16")
        for model in MODELS
        for step in ("training", "inference")
        for batch in ((8,) if quick else (1, 8, 32))
        if not (model == "MLP" and step == "training" and batch == 1)  # batch norm of one number
    ]


def entrants(case: Case, peers: Sequence[str], threads: int) -> dict[str, Entrant]:
    """The model accelerated and as it is, from the same weights and on the same batch; and the norms of both alone."""
    import torch

    import normext.torch

    torch.manual_seed(0)
    model, x, y = MODELS[case.model](case.batch, getattr(torch, case.dtype))
    model = model.to(getattr(torch, case.dtype)).train(case.step == "training")
    accelerated = copy.deepcopy(model)
    normext.torch.accelerate(accelerated)
    models = {"normext": accelerated, **({"PyTorch": model} if "pytorch" in peers else {})}
    norms = {side: norms_alone(of, x, case.step) for side, of in models.items()}
    make = training if case.step == "training" else inference
    return {
        **{side: make(of, x, y) for side, of in models.items()},
        **{ALONE[side]: call for side, call in norms.items()},
    }


def norms_alone(model: "nn.Module", x: Any, step: str) -> Entrant:
    """What the norms of a model do in a step: all forward passes, and in training all backward passes."""
    import torch
    from torch import nn

    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm)
    norms = [copy.deepcopy(module) for module in model.modules() if isinstance(module, kinds)]
    inputs: list[Any] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(x)
    model.load_state_dict(state)  # running statistics
    for hook in hooks:
        hook.remove()
    inputs = [torch.randn_like(x).requires_grad_(step == "training") for x in inputs]
    gradients = [torch.randn_like(x) for x in inputs]

    def call() -> None:
        if step == "inference":
            with torch.inference_mode():
                for norm, x in zip(norms, inputs):
                    norm(x)
            return
        for norm, x in zip(norms, inputs):
            norm.zero_grad()
            x.grad = None
        torch.autograd.backward([norm(x) for norm, x in zip(norms, inputs)], gradients)

    return Entrant(call)


def training(model: "nn.Module", x: Any, y: Any) -> Entrant:
    import torch

    # So little that a thousand steps later it is still the same model.
    rule = torch.optim.SGD(model.parameters(), lr=1e-7)

    def step() -> float:
        rule.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        rule.step()
        return loss.item()

    return Entrant(step, lambda loss: [np.array([loss, step(), step()])])


def inference(model: "nn.Module", x: Any, y: Any) -> Entrant:
    import torch

    def step() -> Any:
        with torch.inference_mode():
            return model(x)

    return Entrant(step, lambda result: [result.numpy()])


# Models ---------------------------------------------------------------------------------------------------------------


def resnet(batch: int, dtype: Any) -> tuple["nn.Module", Any, Any]:
    """ResNet-18 (K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) on images of 64 x 64."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, channels: int, stride: int) -> None:
            super().__init__()
            self.main = nn.Sequential(
                nn.Conv2d(before, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.shortcut = nn.Identity()
            if stride != 1 or before != channels:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
                )

        def forward(self, x: Any) -> Any:
            return torch.relu(self.main(x) + self.shortcut(x))

    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        *(Block(*stage) for stage in [*stages, (512, 512, 1)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )
    return model, torch.randn(batch, 3, IMAGE, IMAGE, dtype=dtype), torch.randint(CLASSES, (batch,))


def gpt(batch: int, dtype: Any, norm: str = "LayerNorm") -> tuple["nn.Module", Any, Any]:
    """Blocks of attention and two linear layers, the norms before them; logits of the next token of 256."""
    import torch
    from torch import nn

    new_norm = getattr(nn, norm)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = new_norm(WIDTH), new_norm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Any) -> Any:
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
            )
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        *(Block() for _ in range(BLOCKS)),
        new_norm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY),
        nn.Flatten(0, 1),
    )
    return model, torch.randint(VOCABULARY, (batch, TOKENS)), torch.randint(VOCABULARY, (batch * TOKENS,))


def rms_gpt(batch: int, dtype: Any) -> tuple["nn.Module", Any, Any]:
    return gpt(batch, dtype, "RMSNorm")


def mlp(batch: int, dtype: Any) -> tuple["nn.Module", Any, Any]:
    """Three hidden layers of 512 with batch norm."""
    import torch
    from torch import nn

    sizes, layers = (784, 512, 512, 512), []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))
    return model, torch.randn(batch, sizes[0], dtype=dtype), torch.randint(CLASSES, (batch,))


MODELS: dict[str, Callable[[int, Any], tuple["nn.Module", Any, Any]]] = {
    "ResNet-18": resnet,
    "GPT": gpt,
    "GPT with RMS norm": rms_gpt,
    "MLP": mlp,
}


# Report ---------------------------------------------------------------------------------------------------------------


def _row(record: dict[str, Any]) -> list[str]:
    times = {side: taken["median"] for side, taken in record["times"].items()}
    before, after = (1e3 * times[side] for side in ("PyTorch", "normext"))
    norms_before, norms_after = (1e3 * times[ALONE[side]] for side in ("PyTorch", "normext"))
    ratio = record["ratios"]["PyTorch"]
    return [
        f"{record['model']}, {record['step']}, batch {record['batch']}, threads {record['threads']}",
        *(f"{before:.3g}", f"{after:.3g}", f"{ratio['median']:.2f} [{ratio['q1']:.2f} {ratio['q3']:.2f}]"),
        *(f"{norms_before:.3g}", f"{norms_after:.3g}", f"{norms_before / norms_after:.2f}"),
        *(f"{100 * norms_before / before:.0f} %", f"{100 * norms_after / after:.0f} %"),
    ]


def text(records: list[dict[str, Any]]) -> str:
    """A row for each case."""
    columns = ["step", "before, ms", "after, ms", "before / after", "norms before, ms", "after, ms", "before / after"]
    columns += ["norms' share before", "after"]
    return (
        "One step before and after `normext.torch.accelerate`, and what its norms take alone: the same modules on "
        "inputs of the same shapes, forward and in training backward.\n\n"
        + table(columns, [_row(r) for r in records if "PyTorch" in r["times"]])
    )


def page_figures(folder: Path) -> str:
    """What is written into docs/pytorch.md: the table, and what it was measured on.

    Raises
    ------
    FileNotFoundError
        If there are no results of models.
    """
    results = json.loads((folder / "models.json").read_text())
    on = results["machine"]
    machine = f"{on['processor']}, {on['cores']} cores, PyTorch {on['versions']['torch']}, float32."
    return f"{machine}{' A quick run.' if results['quick'] else ''} {text(results['records'])}"
