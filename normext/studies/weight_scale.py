"""The scale of the initial weights: without normalization only a narrow band of scales trains a deep net."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from normext.studies.plots import NORM_STYLES, panels
from normext.studies.report_text import gain, percent, points, setup, table
from normext.studies.study import Result, Study
from normext.studies.training import NORM_NAMES, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["WeightScale"]

NEAR = 0.05  # A scale trains well if its validation accuracy comes this near to the best of the run,
STUCK = 0.2  # and not at all if its training accuracy stays below twice that of guessing.
EPS = 1e-5  # The default of the layers.


class WeightScale(Study):
    """A deeper net from many initial scales, with batch norm and without."""

    name = "weight-scale"
    title = "The scale of the initial weights"
    description = (
        "A net of eight layers (seven hidden of 50) is trained from initial weights of many scales, 1e-4 to 1, with "
        "and without batch norm. Answers how the scale matters with and without normalization, and why. Plots: best "
        "validation accuracy, best training accuracy and final training loss against the scale."
    )

    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        return [
            Training(
                name=f"{NORM_NAMES[norm].replace(' ', '-')}-scale-{scale:.2e}",
                data=data,
                hidden_dims=(50,) * 7,
                normalization=norm,
                weight_scale=float(scale),
                batch_size=50,
                learning_rate=1e-3,
                epochs=5 if quick else 10,
                seed=seed,
            )
            for scale in np.logspace(-4, 0, 9 if quick else 20)
            for norm in (None, "batchnorm")
        ]

    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        titles = ["Best validation accuracy", "Best training accuracy", "Final training loss"]
        figure, (val, train, loss) = panels(titles, "scale of the initial weights")
        for ax in (val, train, loss):
            ax.set_xscale("log")
        loss.set_yscale("log")  # before the curves: one without a finite number cannot be put on the scale later
        for norm in (None, "batchnorm"):
            curve = _curve(results, norm)
            scales = [training.weight_scale for training, _ in curve]
            style = NORM_STYLES[norm]
            val.plot(scales, [max(history.val_acc_history) for _, history in curve], label=NORM_NAMES[norm], **style)
            train.plot(scales, [max(history.train_acc_history) for _, history in curve], **style)
            final = np.array([history.final_loss for _, history in curve])
            loss.plot(scales, np.where(np.isfinite(final), final, np.nan), **style)
            diverged = [scale for scale, value in zip(scales, final) if not np.isfinite(value)]
            if diverged:  # Near the top, wherever the axis ends: these losses have no place on it.
                top = [0.97] * len(diverged)
                loss.plot(diverged, top, "x", color=style["color"], transform=loss.get_xaxis_transform())
                loss.set_title("Final training loss (x: not finite)")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return {"weight-scale": figure}

    def report(self, results: Sequence[Result]) -> str:
        plain, normed = _curve(results, None), _curve(results, "batchnorm")
        best = max(max(history.val_acc_history) for _, history in results)
        good = [
            [of.weight_scale for of, history in curve if max(history.val_acc_history) >= best - NEAR]
            for curve in (plain, normed)
        ]
        statements = [f"The best validation accuracy of the run is {percent(best)}."]
        statements += [_statement(curve, scales) for curve, scales in zip((plain, normed), good)]
        counts = f"{len(good[1])} of {len(normed)} scales train well with it, {len(good[0])} without"
        if len(good[1]) > len(good[0]):
            conclusion = [
                f"**So with batch norm more scales train:** {counts}.",
                _why(plain[0].training, plain[-1].training, good[1]),
            ]
        else:
            conclusion = [f"**This run does not show the expected effect,** more scales that train: {counts}."]
        return "\n\n".join(
            [setup([of for of, _ in results]), _figures(plain, normed), "\n".join(statements), *conclusion]
        )


def _curve(results: Sequence[Result], normalization: str | None) -> list[Result]:
    return [result for result in results if result.training.normalization == normalization]


def _figures(plain: list[Result], normed: list[Result]) -> str:
    norms = [NORM_NAMES[curve[0].training.normalization] for curve in (plain, normed)]
    header = ["scale", *(f"{what}, {norm}" for what in ("best val", "best train", "final loss") for norm in norms)]
    rows = [
        [
            f"{training.weight_scale:.3g}",
            *(percent(max(history.val_acc_history)) for history in (without, with_norm)),
            *(percent(max(history.train_acc_history)) for history in (without, with_norm)),
            *(f"{history.final_loss:.3g}" for history in (without, with_norm)),
        ]
        for (training, without), (_, with_norm) in zip(plain, normed)
    ]
    return table(header, rows)


def _statement(curve: list[Result], good: list[float]) -> str:
    """What one curve says: its best scale, how many are near the best of the run, do not learn, or diverge."""
    top, history = max(curve, key=lambda result: max(result.history.val_acc_history))
    stuck = [of.weight_scale for of, history in curve if max(history.train_acc_history) < STUCK]
    diverged = [of.weight_scale for of, history in curve if history.diverged]
    parts = [
        f"{len(good)} of {len(curve)} scales come within {points(NEAR)} of it{_span(good)}",
        f"the best is {percent(max(history.val_acc_history))} at {top.weight_scale:.3g}",
        f"{len(stuck)} stay below {percent(STUCK)} even on the training images{_span(stuck)}",
        f"{len(diverged)} diverge{_span(diverged)}",
    ]
    return f"- With {NORM_NAMES[top.normalization]}: {'; '.join(parts)}."


def _span(scales: list[float]) -> str:
    """Where the scales lie, in brackets."""
    if not scales:
        return ""
    return f" ({min(scales):.3g})" if len(scales) == 1 else f" (between {min(scales):.3g} and {max(scales):.3g})"


def _why(first: Training, last: Training, good: list[float]) -> str:
    """Why batch norm trains with more scales, from the trainings at both ends and the scales that are good with it."""
    width, depth = first.hidden_dims[0], len(first.hidden_dims)
    sentences = [
        (
            "Why: without normalization a hidden layer changes the size of the signals at first by a factor of scale * "
            "sqrt(n / 2), n inputs (He et al., 2015), and that of the gradients on their way back alike. With n = "
            f"{width} the factor is 1 at a scale of {math.sqrt(2 / width):.2g}. Over {depth} layers the smallest scale "
            f"leaves {gain(first) ** depth:.0e} of them, and the largest makes them {gain(last) ** depth:.0e} times as "
            "large. Batch norm divides every layer's output by its own standard deviation, and the scale of the "
            "weights cancels."
        )
    ]
    if first.weight_scale < min(first.learning_rate, *good):
        sentences.append(
            f"Not at the lower end: Adam's first steps have the size of the learning rate, {first.learning_rate:g}, "
            "whatever the gradients, and weights that are smaller lose their random start to them; and below a "
            f"scale of about sqrt(2 eps / n) = {math.sqrt(2 * EPS / width):.1g} the variance of a layer's output is "
            f"less than the eps = {EPS:g} added to it."
        )
    if last.weight_scale > max(good):
        sentences.append(
            "Nor at the upper end: the same steps take long to turn weights that are large; and the last layer is "
            "not normalized, so that the scores start out too large."
        )
    return " ".join(sentences)
