"""One training: what it is, running it, and its record on disk."""

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normext._files import json_numbers, new_file, read_file
from normext.studies.data import Data

__all__ = ["NORM_NAMES", "History", "Training", "load_history", "load_record", "save_history", "specification"]

RECORD_LIMIT = 1 << 26  # bytes: a thousand times what the longest training here leaves
NORM_NAMES: dict[str | None, str] = {None: "no norm", "batchnorm": "batch norm", "layernorm": "layer norm"}


@dataclass(frozen=True)
class History:
    """What a training leaves behind.

    Attributes
    ----------
    loss_history : list of float
        The loss of every iteration. NaN and infinite where the training diverged: a result like any other.
    train_acc_history, val_acc_history : list of float
        Accuracies in 0..1 after the first iteration and after each epoch, so that the index is the epoch.
    seconds : float
        How long the training took.
    filters : list, optional
        The filters that a convolutional net ends with, (F, C, HH, WW) as lists of lists. None of another net.
    """

    loss_history: list[float]
    train_acc_history: list[float]
    val_acc_history: list[float]
    seconds: float
    filters: list[Any] | None = None

    @property
    def diverged(self) -> bool:
        """Whether a loss was not a finite number."""
        return not all(map(math.isfinite, self.loss_history))

    @property
    def final_loss(self) -> float:
        """Mean of the last 100 losses."""
        with np.errstate(all="ignore"):
            return float(np.mean(self.loss_history[-100:]))


@dataclass(frozen=True)
class Training:
    """Everything that decides the result of a training of a fully connected net by Adam.

    Attributes
    ----------
    name : str
        What the training is called within its study, and its file.
    data : str
        The name of the data.
    hidden_dims : tuple of int
        Sizes of the hidden layers.
    normalization : str or None
        ``"batchnorm"``, ``"layernorm"`` or None.
    weight_scale : float
        Standard deviation of the initial weights.
    batch_size, learning_rate, epochs, seed
        As `normext.cs231n.solver.Solver` takes them; the seed is that of NumPy's global generator.
    """

    name: str
    data: str
    hidden_dims: tuple[int, ...]
    normalization: str | None
    weight_scale: float
    batch_size: int
    learning_rate: float
    epochs: int
    seed: int

    def model(self, data: Data) -> Any:
        """The untrained net."""
        from normext.cs231n.classifiers.fc_net import FullyConnectedNet

        return FullyConnectedNet(
            self.hidden_dims,
            input_dim=data.arrays["X_train"][0].size,
            normalization=self.normalization,
            weight_scale=self.weight_scale,
        )

    def filters_shape(self, data: Data) -> tuple[int, ...] | None:
        """The shape of the filters in the history; None of a net that has none."""
        return None

    def run(self, data: Data, comm: Any = None) -> History:
        """Train, from the seed to the last epoch; on all ranks of an MPI communicator where one is given."""
        solver_type: Any
        if comm is None:
            from normext.cs231n.solver import Solver as solver_type
        else:
            from normext.distributed import DataParallelSolver

            solver_type = partial(DataParallelSolver, comm=comm)
        start = time.perf_counter()
        np.random.seed(self.seed)
        solver = solver_type(
            self.model(data),
            data.arrays,
            update_rule="adam",
            optim_config={"learning_rate": self.learning_rate},
            batch_size=self.batch_size,
            num_epochs=self.epochs,
            verbose=False,
        )
        with np.errstate(all="ignore"):  # A training that diverges is a result, told in its history.
            solver.train()
        return History(
            [float(loss) for loss in solver.loss_history],
            [float(accuracy) for accuracy in solver.train_acc_history],
            [float(accuracy) for accuracy in solver.val_acc_history],
            time.perf_counter() - start,
            solver.model.params["W1"].tolist() if self.filters_shape(data) else None,
        )


def save_history(path: Path, training: Training, history: History) -> None:
    """Write the record of a finished training as strict JSON.

    JSON has no NaN and no infinity: they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
    ``float()`` reads back.

    Parameters
    ----------
    path : Path
        The file. It is replaced in one step.
    training : Training
        What was trained; it goes into the record.
    history : History
        What came of it.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    record = {"specification": specification(training), "history": _strict(asdict(history))}
    with new_file(path) as file:
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


def load_record(path: Path) -> dict[str, Any]:
    """What a file says: the specification of a training, and its history, unchecked.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        ``specification`` and ``history``, both dicts. Empty where there is no file, or it is damaged or no record.
    """
    try:
        record = json.loads(read_file(path, RECORD_LIMIT))
    except (FileNotFoundError, ValueError, RecursionError):  # Not there, truncated, or nested too deep.
        return {}
    parts = ("specification", "history")
    return record if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in parts) else {}


def load_history(path: Path, training: Training, data: Data) -> History | None:
    """The history in a record that `save_history` wrote.

    Parameters
    ----------
    path : Path
        The file.
    training : Training
        What should be in it.
    data : Data
        What was trained on.

    Returns
    -------
    History or None
        None where there is no file, or it is damaged, or the record of another training: where it does not hold what
        such a training leaves, to the number of its losses.
    """
    from normext.cs231n.solver import iterations_per_epoch

    record = load_record(path)
    if record.get("specification") != specification(training):
        return None
    history, shape = record["history"], training.filters_shape(data)
    per_epoch = iterations_per_epoch(len(data.arrays["X_train"]), training.batch_size)
    checks = training.epochs + (per_epoch > 1)  # the first iteration may be an epoch
    try:
        losses = json_numbers(history["loss_history"], (training.epochs * per_epoch,))
        accuracies = json_numbers([history[f"{name}_acc_history"] for name in ("train", "val")], (2, checks))
        seconds, filters = json_numbers(history["seconds"], ()), history["filters"]
        if shape is not None:
            filters = json_numbers(filters, shape)
        elif filters is not None:
            return None
    except (ValueError, KeyError, OverflowError):  # Damaged, or not ours.
        return None
    sensible = 0 <= seconds < math.inf and all(0 <= value <= 1 for curve in accuracies for value in curve)
    return History(losses, *accuracies, seconds, filters) if sensible else None


def specification(training: Training) -> dict[str, Any]:
    """What the record of a training says of it: its fields, as they come back from JSON."""
    return json.loads(json.dumps(asdict(training)))


def _strict(value):
    """The value with strings for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
