"""Deep nets: a net of six layers learns faster with batch norm."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from normext.studies.plots import NORM_STYLES, panels
from normext.studies.report_text import gain, percent, points, setup, table
from normext.studies.study import Result, Study
from normext.studies.training import NORM_NAMES, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Deep"]


class Deep(Study):
    """One net with batch norm and one without."""

    name = "deep"
    title = "Deep nets with and without batch norm"
    description = (
        "A net of six layers (five hidden of 100) is trained with and without batch norm. "
        "Answers how much faster it learns with it. Plots: loss, training and validation accuracy over the training."
    )

    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        return [
            Training(
                name=NORM_NAMES[norm].replace(" ", "-"),
                data=data,
                hidden_dims=(100,) * 5,
                normalization=norm,
                weight_scale=2e-2,
                batch_size=50,
                learning_rate=1e-3,
                epochs=5 if quick else 10,
                seed=seed,
            )
            for norm in (None, "batchnorm")
        ]

    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        figure, (loss, train, val) = panels(["Training loss", "Training accuracy", "Validation accuracy"], "epoch")
        loss.set_xlabel("iteration")
        for training, history in results:
            style = NORM_STYLES[training.normalization]
            iterations = range(1, len(history.loss_history) + 1)
            name = NORM_NAMES[training.normalization]
            loss.plot(iterations, history.loss_history, lw=1, markevery=20, label=name, **style)
            train.plot(history.train_acc_history, **style)
            val.plot(history.val_acc_history, **style)
        loss.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return {"deep": figure}

    def report(self, results: Sequence[Result]) -> str:
        plain, normed = (history for _, history in results)
        figures = table(
            ["", "train, first epoch", "train, mean of the epochs", "best train", "best val", "final loss"],
            [
                [
                    NORM_NAMES[of.normalization],
                    percent(history.train_acc_history[1]),
                    percent(np.mean(history.train_acc_history[1:])),
                    percent(max(history.train_acc_history)),
                    percent(max(history.val_acc_history)),
                    f"{history.final_loss:.3g}",
                ]
                for of, history in results
            ],
        )
        best = max(plain.train_acc_history)
        when = plain.train_acc_history.index(best)
        there = [epoch for epoch, accuracy in enumerate(normed.train_acc_history) if accuracy >= best]
        statement = (
            f"After the first epoch the training accuracy is {percent(normed.train_acc_history[1])} with batch norm "
            f"and {percent(plain.train_acc_history[1])} without. The best training accuracy without, {percent(best)}, "
            f"comes in epoch {when}; batch norm {f'is there in epoch {there[0]}' if there else 'does not reach it'}. "
            f"On the validation images the best is {percent(max(normed.val_acc_history))} with batch norm and "
            f"{percent(max(plain.val_acc_history))} without."
        )
        lead = float(np.mean(normed.train_acc_history[1:]) - np.mean(plain.train_acc_history[1:]))
        if lead > 0.02:
            conclusion = [
                (
                    f"**So with batch norm the net learns faster:** its training accuracy is {points(lead)} higher in "
                    "the mean of the epochs."
                ),
                _why(results[0].training),
            ]
        else:
            conclusion = [
                (
                    "**This run does not show the expected effect,** that with batch norm the training accuracy rises "
                    f"much faster: the mean of the epochs differs by {points(lead)}."
                )
            ]
        return "\n\n".join([setup([of for of, _ in results]), figures, statement, *conclusion])


def _why(training: Training) -> str:
    factor, depth = gain(training), len(training.hidden_dims)
    return (
        "Why: without normalization each hidden layer changes the size of the signals by a factor of about "
        f"{factor:.2g} at first (weight scale times the root of half the inputs; He et al., 2015), and that of the "
        f"gradients on their way back alike. Over {depth} layers that makes {factor**depth:.1g}, and the net has to "
        "mend it before it can learn. Batch norm gives every layer inputs of unit size, whatever the layers below "
        "do, so that all layers learn from the start."
    )
