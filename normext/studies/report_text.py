"""Words and tables that the reports share."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from normext.studies.training import NORM_NAMES, History, Training

__all__ = ["gain", "late", "listed", "percent", "points", "setup", "table"]


def percent(share: float) -> str:
    """A share of 1 in per cent.

    Examples
    --------
    >>> percent(0.9712)
    '97.1 %'
    """
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points.

    Examples
    --------
    >>> points(0.0123)
    '1.2 points'
    """
    return f"{100 * difference:.1f} points"


def listed(items: Iterable[object]) -> str:
    """The items as in a sentence.

    Examples
    --------
    >>> listed([5, 10, 50])
    '5, 10 and 50'
    """
    words = [str(item) for item in items]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers.

    Examples
    --------
    >>> print(table(["norm", "accuracy"], [["none", "50 %"]]))
    | norm | accuracy |
    | --- | ---: |
    | none | 50 % |
    """
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ruler, *rows))


def setup(trainings: Sequence[Training], net: str | None = None) -> str:
    """One sentence on what the trainings have in common and in what they differ.

    Parameters
    ----------
    trainings : sequence of Training
        All of a study, of one depth.
    net : str, optional
        What the net is. Default: its hidden layers.

    Returns
    -------
    str
    """

    def values(field: str) -> str:
        different = list(dict.fromkeys(getattr(training, field) for training in trainings))
        if len(different) > 6:
            return f"{min(different):g} to {max(different):g} ({len(different)} values)"
        return listed(f"{value:g}" for value in different)

    norms = listed(dict.fromkeys(NORM_NAMES[training.normalization] for training in trainings))
    if net is None:
        depth = len(trainings[0].hidden_dims)
        widths = listed(dict.fromkeys(training.hidden_dims[0] for training in trainings))
        net = f"{depth} hidden layer{'s' * (depth > 1)} of {widths}, then the layer of scores"
    return (
        f"Setup: {net}; {norms}; weight scale {values('weight_scale')}, batch size {values('batch_size')}, "
        f"Adam with learning rate {values('learning_rate')}, {values('epochs')} epochs, seed {values('seed')}."
    )


def late(results: Iterable[tuple[Training, History]], name: str = "val_acc_history") -> list[float]:
    """The accuracy over the second half of the epochs, of each training.

    Parameters
    ----------
    results : iterable of Result
        The trainings.
    name : str, default "val_acc_history"
        Which accuracy: the name of a history.

    Returns
    -------
    list of float
    """
    return [float(np.mean(getattr(history, name)[-((of.epochs + 1) // 2) :])) for of, history in results]


def gain(training: Training) -> float:
    """The factor by which a hidden layer without normalization changes the size of its signals at first.

    With rectifiers and n inputs it is ``weight_scale * sqrt(n / 2)`` [1]_.

    Parameters
    ----------
    training : Training
        Of a net whose first hidden layer has the size of the others.

    Returns
    -------
    float

    References
    ----------
    .. [1] K. He, X. Zhang, S. Ren and J. Sun, "Delving Deep into Rectifiers", ICCV 2015, section 2.2.

    Examples
    --------
    >>> from normext.studies.training import Training
    >>> gain(Training("", "", (50, 50), None, weight_scale=0.2, batch_size=1, learning_rate=1.0, epochs=1, seed=0))
    1.0
    """
    return training.weight_scale * math.sqrt(training.hidden_dims[0] / 2)
