"""The batch size: batch norm needs large batches, layer norm does not mind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from normext.studies.plots import NORM_STYLES, panels
from normext.studies.report_text import late, listed, percent, points, setup, table
from normext.studies.study import Result, Study
from normext.studies.training import NORM_NAMES, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BatchSize"]

SIZES = (5, 10, 50)
# Larger batches are darker; markers tell them apart too.
SIZE_STYLES = {
    5: {"color": "#56B4E9", "marker": "v", "markersize": 5},
    10: {"color": "#0072B2", "marker": "o", "markersize": 4},
    50: {"color": "#000000", "marker": "D", "markersize": 4},
}


class BatchSize(Study):
    """Batches of several sizes with one norm, each from three seeds.

    Parameters
    ----------
    norm : str
        ``"batch"`` or ``"layer"``.
    """

    description = (
        "A net of six layers (five hidden of 100) is trained with batch norm or layer norm in batches of 5, 10 and "
        "50, and without normalization in batches of 5; each from three seeds. Answers how the batch size matters "
        "with that norm, and why. Plots: training and validation accuracy over the epochs."
    )

    def __init__(self, norm: str):
        self.normalization = norm + "norm"
        self.norm = NORM_NAMES[self.normalization]
        self.name = f"batch-size-{norm}"
        self.title = f"The batch size with {self.norm}"

    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        return [
            Training(
                name=f"{NORM_NAMES[norm].replace(' ', '-')}-batch-{size}-seed-{seed + i}",
                data=data,
                hidden_dims=(100,) * 5,
                normalization=norm,
                weight_scale=2e-2,
                batch_size=size,
                learning_rate=10**-3.5,
                epochs=5 if quick else 10,
                seed=seed + i,
            )
            for norm, sizes in ((None, SIZES[:1]), (self.normalization, SIZES))
            for size in sizes
            for i in range(3)
        ]

    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        figure, (train, val) = panels(["Training accuracy", "Validation accuracy"], "epoch")
        for (norm, size), group in _groups(results).items():
            style = NORM_STYLES[None] if norm is None else SIZE_STYLES[size]
            for ax, name in ((train, "train_acc_history"), (val, "val_acc_history")):
                curves = np.array([getattr(history, name) for _, history in group])
                curves = curves[:, 1:]  # From the first epoch on: before it all are at the level of guessing.
                epochs = range(1, curves.shape[1] + 1)
                ax.plot(epochs, curves.mean(axis=0), label=f"{NORM_NAMES[norm]}, batches of {size}", **style)
                ax.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15, lw=0)
        figure.legend(*train.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("Mean of three seeds, band from the lowest to the highest", fontsize="medium")
        return {self.name: figure}

    def report(self, results: Sequence[Result]) -> str:
        groups = _groups(results)
        rows = [
            [
                f"{NORM_NAMES[norm]}, batches of {size}",
                percent(np.mean([max(history.train_acc_history) for _, history in group])),
                percent(np.mean([max(history.val_acc_history) for _, history in group])),
                percent(np.mean(late(group))),
                f"{100 * np.std(late(group), ddof=1):.1f}",
            ]
            for (norm, size), group in groups.items()
        ]
        header = ["mean of the seeds", "best train", "best val", "late val", "late val, deviation of the seeds"]
        change, error = _change(groups, self.normalization, "val_acc_history")
        train_change, train_error = _change(groups, self.normalization, "train_acc_history")
        statement = (
            f"Late means the mean over the second half of the epochs. From batches of {SIZES[0]} to batches of "
            f"{SIZES[-1]} the late accuracy with {self.norm} changes by {100 * change:+.1f} ± {points(error)} on the "
            f"validation images and by {100 * train_change:+.1f} ± {points(train_error)} on the training images "
            "(standard error over the seeds). A change on the validation images counts here if it is more than two "
            f"standard errors. Without normalization, in batches of {SIZES[0]}, it is "
            f"{percent(np.mean(late(groups[None, SIZES[0]])))} on these."
        )
        verdict = self._batch_verdict if self.normalization == "batchnorm" else self._layer_verdict
        return "\n\n".join(
            [setup([of for of, _ in results]), table(header, rows), statement, *verdict(change, error, results)]
        )

    def _batch_verdict(self, change: float, error: float, results: Sequence[Result]) -> list[str]:
        if change <= 2 * error:
            return ["**This run does not show the expected effect,** that batch norm gets better with the batch size."]
        return [
            "**So batch norm gets better with the batch size.**",
            (
                "Why: it takes the mean and the variance from the batch. The mean of m images is off by 1 / sqrt(m) of "
                f"a standard deviation, {listed(f'{percent(size**-0.5)} at {size}' for size in SIZES)}. What a net "
                "makes of an image so depends on the other images in the batch, at random; and in evaluation the "
                "running averages stand in, which fit the noisy statistics of small batches worse. Small batches make "
                "the gradients noisy too, with any norm: how much of the change that is, the same study with layer "
                "norm tells."
            ),
        ]

    def _layer_verdict(self, change: float, error: float, results: Sequence[Result]) -> list[str]:
        updates = (
            f"The updates do depend on the batch size, with any norm: {_updates(results)}, each from so many images."
        )
        if abs(change) > 2 * error:
            return [
                "**This run does not show the expected effect,** that with layer norm the batch size hardly matters.",
                f"It cannot be the statistics, which are those of each image alone. {updates}",
            ]
        return [
            "**So with layer norm the batch size hardly matters** on the validation images.",
            (
                f"Why: the mean and the variance are those of an image's own {results[0].training.hidden_dims[0]} "
                f"features, and no other image takes part. {updates}"
            ),
        ]


def _groups(results: Sequence[Result]) -> dict[tuple[str | None, int], list[Result]]:
    """The results of all seeds, by normalization and batch size."""
    groups: dict[tuple[str | None, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.training.normalization, result.training.batch_size), []).append(result)
    return groups


def _change(groups: dict[tuple[str | None, int], list[Result]], norm: str, name: str) -> tuple[float, float]:
    """The change of the late accuracy from the smallest to the largest batches, and its standard error."""
    small, large = (late(groups[norm, size], name) for size in (SIZES[0], SIZES[-1]))
    error = np.sqrt((np.var(large, ddof=1) + np.var(small, ddof=1)) / len(small))
    return float(np.mean(large) - np.mean(small)), float(error)


def _updates(results: Sequence[Result]) -> str:
    counts = {training.batch_size: len(history.loss_history) // training.epochs for training, history in results}
    return listed(f"{count} in an epoch at {size}" for size, count in counts.items())
