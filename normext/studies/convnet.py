"""A convolutional net: with spatial batch norm it bears larger learning rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normext.studies.data import Data
from normext.studies.plots import NORM_STYLES, panels
from normext.studies.report_text import late, listed, percent, points, setup, table
from normext.studies.study import Result, Study
from normext.studies.training import NORM_NAMES, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConvNet", "ConvTraining"]

NORMS = (None, "batchnorm")
CLOSE = 0.05  # A rate whose accuracy comes this close to that of the net's best rate is one that it bears.


@dataclass(frozen=True)
class ConvTraining(Training):
    """A training of a `normext.cs231n.classifiers.cnn.ThreeLayerConvNet`; `hidden_dims` is the size of its one layer.

    Attributes
    ----------
    num_filters, filter_size : int
        Of the convolution.
    """

    num_filters: int
    filter_size: int

    def filters_shape(self, data: Data) -> tuple[int, ...] | None:
        return (self.num_filters, data.arrays["X_train"].shape[1], self.filter_size, self.filter_size)

    def model(self, data: Data) -> Any:
        from normext.cs231n.classifiers.cnn import ThreeLayerConvNet

        return ThreeLayerConvNet(
            data.arrays["X_train"].shape[1:],
            num_filters=self.num_filters,
            filter_size=self.filter_size,
            hidden_dim=self.hidden_dims[0],
            weight_scale=self.weight_scale,
            normalization=self.normalization,
        )


class ConvNet(Study):
    """Nets with and without spatial batch norm at several learning rates."""

    name = "convnet"
    title = "A convolutional net with and without spatial batch norm"
    description = (
        "A net of three layers, the first convolutional, is trained with and without spatial batch norm at three "
        "learning rates, each from three seeds. Answers which learning rates it bears with batch norm and without, and "
        "why. Plots: loss and accuracies over the training, and the filters that came of it."
    )

    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        return [
            ConvTraining(
                name=f"{NORM_NAMES[norm].replace(' ', '-')}-rate-{rate}-seed-{seed + i}",
                data=data,
                hidden_dims=(100,),
                normalization=norm,
                weight_scale=1e-3,
                batch_size=50,
                learning_rate=rate,
                epochs=6 if quick else 10,
                seed=seed + i,
                num_filters=32,
                filter_size=5,
            )
            for norm in NORMS
            for rate in ((0.001, 0.01) if quick else (0.001, 0.003, 0.01))
            for i in range(3)
        ]

    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        return {
            "loss": _curves(results, "Training loss", {"loss_history": ""}, log=True),
            "accuracy": _curves(
                results, "Accuracy", {"train_acc_history": ", training", "val_acc_history": ", validation"}
            ),
            "filters": _filters(results),
        }

    def report(self, results: Sequence[Result]) -> str:
        groups = _groups(results)
        rates = list(dict.fromkeys(rate for _, rate in groups))
        accuracy = {key: float(np.mean(late(group))) for key, group in groups.items()}
        rows = [
            [
                f"{NORM_NAMES[norm]}, learning rate {rate}",
                percent(np.mean([max(history.val_acc_history) for _, history in group])),
                percent(accuracy[norm, rate]),
                f"{100 * np.std(late(group), ddof=1):.1f}",
                percent(np.mean(late(group, "train_acc_history"))),
                f"{np.mean([history.final_loss for _, history in group]):.3g}",
            ]
            for (norm, rate), group in groups.items()
        ]
        header = ["mean of the seeds", "best val", "late val", "its deviation", "late train", "final loss"]
        best = {norm: max(accuracy[norm, rate] for rate in rates) for norm in NORMS}
        borne = {norm: [rate for rate in rates if accuracy[norm, rate] > best[norm] - CLOSE] for norm in NORMS}
        net = results[0].training
        assert isinstance(net, ConvTraining)
        about = (
            f"{net.num_filters} filters of {net.filter_size} x {net.filter_size}, 2 x 2 max pooling, a hidden layer of "
            f"{net.hidden_dims[0]}, then the layer of scores, where the norm, if any, comes after the filters"
        )
        changes = listed(
            f"{100 * (accuracy['batchnorm', rate] - accuracy[None, rate]):+.1f} points at {rate}" for rate in rates
        )
        statement = (
            "Late means the mean over the second half of the epochs. From the net without normalization to that with "
            f"batch norm the late validation accuracy changes by {changes}. Within {points(CLOSE)} of the best that "
            f"it reaches itself is the net without normalization at {listed(borne[None])}, the net with batch norm at "
            f"{listed(borne['batchnorm'])}."
        )
        if max(borne["batchnorm"]) > max(borne[None]):
            conclusion = [
                "**So with spatial batch norm the net bears a larger learning rate.**",
                _why(groups, max(borne["batchnorm"])),
            ]
        else:
            conclusion = [
                "**This run does not show the expected effect,** that with batch norm the net bears a larger learning "
                "rate."
            ]
        picture = "The picture shows the filters of the first seed, each stretched to the whole range of brightness."
        return "\n\n".join(
            [setup([of for of, _ in results], about), table(header, rows), statement, *conclusion, picture]
        )


def _groups(results: Sequence[Result]) -> dict[tuple[str | None, float], list[Result]]:
    """The results of all seeds, by normalization and learning rate."""
    groups: dict[tuple[str | None, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.training.normalization, result.training.learning_rate), []).append(result)
    return groups


def _why(groups: dict[tuple[str | None, float], list[Result]], rate: float) -> str:
    def size(norm: str | None) -> float:
        filters = np.array([history.filters for _, history in groups[norm, rate]])
        return float(np.sqrt(np.mean(filters**2)))

    return (
        "Why: batch norm takes the size of a filter's output out again, so that a filter twice as large gives the same "
        "output and has half the gradient (Ioffe and Szegedy, 2015, section 3.3). A step that is too long does no more "
        "than make the filter larger, and the next steps smaller beside it. Without the norm it makes the signals of "
        "all layers that follow larger, and their gradients. At a learning rate of "
        f"{rate} the root mean square of the filters becomes {size('batchnorm'):.2g} with batch norm and "
        f"{size(None):.2g} without, from {groups[None, rate][0].training.weight_scale:g}."
    )


def _curves(results: Sequence[Result], title: str, histories: dict[str, str], *, log: bool = False) -> "Figure":
    """A plot for each learning rate: the mean of the seeds, and a band from the lowest to the highest."""
    groups = _groups(results)
    rates = list(dict.fromkeys(rate for _, rate in groups))
    figure, axes = panels([f"{title}, learning rate {rate}" for rate in rates], "epoch")
    for ax in axes:  # before the curves: a band without a finite number cannot be put on the scale later
        ax.set_yscale("log" if log else "linear")
    for (norm, rate), group in groups.items():
        ax, style = axes[rates.index(rate)], NORM_STYLES[norm]
        for (name, suffix), line in zip(histories.items(), ("-", "--")):
            curves = np.array([getattr(history, name) for _, history in group])
            count, epochs = curves.shape[1], group[0].training.epochs
            x = np.linspace(0, epochs, count)
            label = NORM_NAMES[norm] + suffix
            ax.plot(x, curves.mean(axis=0), ls=line, lw=1, markevery=count // epochs, label=label, **style)
            ax.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15, lw=0)
    if not log:
        for ax in axes:
            ax.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Mean of three seeds, band from the lowest to the highest", fontsize="medium")
    return figure


def _filters(results: Sequence[Result]) -> "Figure":
    """The filters of the first seed: norms in rows, learning rates in columns."""
    from matplotlib.figure import Figure

    from normext.cs231n.vis_utils import visualize_grid

    first = {key: group[0] for key, group in _groups(results).items()}
    columns = len(first) // len(NORMS)
    figure = Figure(figsize=(3 * columns, 3.3 * len(NORMS)), layout="constrained")
    for ax, ((norm, rate), (_, history)) in zip(figure.subplots(len(NORMS), columns).flat, first.items()):
        filters = np.array(history.filters).transpose(0, 2, 3, 1)
        picture = visualize_grid(np.where(np.isfinite(filters), filters, 0), ubound=1)
        # Three channels are colours; one is made three, so that grey is grey.
        ax.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)), interpolation="nearest")
        ax.set_title(f"{NORM_NAMES[norm]}, learning rate {rate}", fontsize="medium")
        ax.set_axis_off()
    return figure
