"""One training: what it is, running it, and its record on disk."""

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normext.studies.data import Data
from normext.studies.storage import write_file

__all__ = ["NORM_NAMES", "History", "Training", "load_history", "save_history"]

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
        weights = solver.model.params["W1"]
        return History(
            [float(loss) for loss in solver.loss_history],
            [float(accuracy) for accuracy in solver.train_acc_history],
            [float(accuracy) for accuracy in solver.val_acc_history],
            time.perf_counter() - start,
            weights.tolist() if weights.ndim == 4 else None,
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
    record = {"specification": asdict(training), "history": _strict(asdict(history))}
    write_file(path, json.dumps(record, allow_nan=False) + "\n")


def load_history(path: Path, training: Training) -> History | None:
    """The history in a record that `save_history` wrote.

    Parameters
    ----------
    path : Path
        The file.
    training : Training
        What should be in it.

    Returns
    -------
    History or None
        None where there is no file, or it is damaged, or the record of another training.
    """
    try:
        record = json.loads(path.read_bytes())
        if record["specification"] != json.loads(json.dumps(asdict(training))):
            return None
        history = record["history"]
        curves = [[float(value) for value in history[f"{name}_history"]] for name in ("loss", "train_acc", "val_acc")]
        filters = history["filters"]
        if filters is not None:
            filters = np.array(filters, np.float64).tolist()
        return History(*curves, float(history["seconds"]), filters) if all(curves) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # Truncated, or not ours.
        return None


def _strict(value):
    """The value with strings for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
