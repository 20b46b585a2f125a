"""Where layer norm fails: rows of very few features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from normext.studies.plots import NORM_STYLES, panels
from normext.studies.report_text import listed, percent, points, setup, table
from normext.studies.study import Result, Study
from normext.studies.training import NORM_NAMES, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerWidth"]

SMALL = 0.02  # A difference of accuracies below this hardly matters.


class LayerWidth(Study):
    """Nets with one narrow hidden layer: none, batch norm, layer norm."""

    name = "layer-width"
    title = "Where layer norm fails: few features"
    description = (
        "Nets with one hidden layer of 2 to 64 features are trained without normalization, with batch norm and with "
        "layer norm, each from three seeds. Answers at which widths layer norm fails, and why. Plots: accuracies "
        "against the width."
    )

    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        return [
            Training(
                name=f"{NORM_NAMES[norm].replace(' ', '-')}-width-{width}-seed-{seed + i}",
                data=data,
                hidden_dims=(width,),
                normalization=norm,
                weight_scale=2e-2,
                batch_size=50,
                learning_rate=1e-2,
                epochs=5 if quick else 10,
                seed=seed + i,
            )
            for width in ((2, 4, 16, 64) if quick else (2, 3, 4, 6, 8, 16, 32, 64))
            for norm in NORM_NAMES
            for i in range(3)
        ]

    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        figure, axes = panels(["Best training accuracy", "Best validation accuracy"], "features in the hidden layer")
        for ax, name in zip(axes, ("train_acc_history", "val_acc_history")):
            best = _best(results, name)
            widths = list(best)
            for norm in NORM_NAMES:
                seeds = np.array([best[width][norm] for width in widths])
                style = NORM_STYLES[norm]
                ax.plot(widths, seeds.mean(axis=1), label=NORM_NAMES[norm], **style)
                ax.fill_between(widths, seeds.min(axis=1), seeds.max(axis=1), color=style["color"], alpha=0.15, lw=0)
            ax.set_xscale("log", base=2)
            ax.set_xticks(widths, map(str, widths))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle("Mean of three seeds, band from the lowest to the highest", fontsize="medium")
        return {self.name: figure}

    def report(self, results: Sequence[Result]) -> str:
        best = {
            width: {norm: float(np.mean(seeds)) for norm, seeds in by_norm.items()}
            for width, by_norm in _best(results, "val_acc_history").items()
        }
        figures = table(
            ["best val, mean of the seeds", *NORM_NAMES.values()],
            [[f"{width} features", *map(percent, means.values())] for width, means in best.items()],
        )
        change = {width: means["layernorm"] - means["batchnorm"] for width, means in best.items()}
        fails = [width for width, difference in change.items() if difference < -SMALL]
        narrow, wide = min(best), max(best)
        statement = (
            f"From batch norm to layer norm the best validation accuracy changes by {points(change[narrow])} with "
            f"{narrow} features and by {points(change[wide])} with {wide}. Layer norm is more than {points(SMALL)} "
            f"behind with {listed(fails) or 'no number of'} features."
        )
        if change[narrow] < -max(SMALL, 2 * abs(change[wide])):
            conclusion = [
                "**So layer norm fails where a row has very few features.**",
                (
                    "Why: it takes the mean and the variance from the features of one image, and so takes two numbers "
                    "out of what the layer says about that image. Of many features that is little, of few it is most: "
                    "of 2 features one becomes +1 and the other -1, and only which of them was larger is left. Batch "
                    "norm takes its statistics from the images of the batch, whatever the number of features."
                ),
            ]
        else:
            conclusion = [
                "**This run does not show the expected effect,** that layer norm fails with very few features."
            ]
        return "\n\n".join([setup([of for of, _ in results]), figures, statement, *conclusion])


def _best(results: Sequence[Result], name: str) -> dict[int, dict[str | None, list[float]]]:
    """The best accuracy of each seed, by width and normalization."""
    best: dict[int, dict[str | None, list[float]]] = {}
    for training, history in results:
        by_norm = best.setdefault(training.hidden_dims[0], {})
        by_norm.setdefault(training.normalization, []).append(max(getattr(history, name)))
    return best
