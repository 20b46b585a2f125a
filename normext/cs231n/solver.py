"""Training of any model that has `params` and `loss(X, y)`, by stochastic gradient descent or one of its relatives."""

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from normext.cs231n import optim

__all__ = ["Solver"]


class Solver:
    """Trains a model on batches drawn at random, and watches its accuracy on training and validation data.

    Batches are drawn with ``np.random.choice(num_train, batch_size)``, from NumPy's global generator: after
    ``np.random.seed(s)``, and a model built after that, a training is the same every time.

    Parameters
    ----------
    model : object
        With ``params``, a dict of arrays, ``loss(X, y)`` -> (loss, grads) with grads a dict under the same names, and
        ``loss(X)`` -> scores (N, C).
    data : mapping
        ``X_train``, ``y_train``, ``X_val``, ``y_val``: examples and their labels. Other entries are left alone.
    update_rule : {'sgd', 'sgd_momentum', 'rmsprop', 'adam'}, default 'sgd'
        A function of `normext.cs231n.optim`.
    optim_config : dict, optional
        Settings of the update rule, such as ``learning_rate``; every parameter gets a copy. Default: the rule's own.
    lr_decay : float, default 1.0
        The learning rate is multiplied by this after every epoch.
    batch_size : int, default 100
    num_epochs : int, default 10
    print_every : int, default 10
        Print the loss every so many iterations.
    verbose : bool, default True
        False prints nothing.
    num_train_samples : int or None, default 1000
        Training accuracy is measured on so many examples, drawn at random; None is all of them.
    num_val_samples : int or None, default None
        The same for validation.
    checkpoint_name : str, optional
        After every epoch save ``<checkpoint_name>_epoch_<epoch>.npz``, which ``np.load(..., allow_pickle=False)``
        reads: ``params/<name>``, ``bn_params/<layer>/<name>`` of a model that has them, and ``solver``, a JSON text
        with the settings and the histories.

    Attributes
    ----------
    loss_history : list of float
        One an iteration.
    train_acc_history, val_acc_history : list of float
        After the first iteration, after every epoch.
    best_val_acc : float
        The best of `val_acc_history`; -1.0 before training.
    best_params : dict of str to ndarray
        The parameters that reached it.
    epoch : int
        Epochs done.

    Raises
    ------
    ValueError
        If a keyword or the update rule is not known, a count is not positive, or the data are missing, empty or of
        different lengths.
    FileNotFoundError
        If the folder of `checkpoint_name` does not exist.

    Examples
    --------
    >>> import numpy as np
    >>> from normext.cs231n.classifiers.fc_net import FullyConnectedNet
    >>> np.random.seed(0)
    >>> X = np.random.randn(60, 5)
    >>> y = (X[:, 0] > 0).astype(int)
    >>> data = {"X_train": X[:50], "y_train": y[:50], "X_val": X[50:], "y_val": y[50:]}
    >>> solver = Solver(
    ...     FullyConnectedNet([10], input_dim=5, num_classes=2, weight_scale=0.5),
    ...     data, update_rule="adam", optim_config={"learning_rate": 1e-2}, batch_size=25, num_epochs=20, verbose=False)
    >>> solver.train()
    >>> len(solver.loss_history), solver.best_val_acc > 0.7
    (40, True)
    """

    _random: Any = np.random  # what batches and samples are drawn from

    def __init__(
        self,
        model: Any,
        data: Mapping[str, Any],
        update_rule: str = "sgd",
        optim_config: Mapping[str, Any] | None = None,
        lr_decay: float = 1.0,
        batch_size: int = 100,
        num_epochs: int = 10,
        print_every: int = 10,
        verbose: bool = True,
        num_train_samples: int | None = 1000,
        num_val_samples: int | None = None,
        checkpoint_name: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"Unrecognized arguments {', '.join(map(repr, unknown))}")
        if update_rule not in optim.__all__:
            raise ValueError(f"update_rule must be one of {', '.join(map(repr, optim.__all__))}, got {update_rule!r}")
        if checkpoint_name is not None and not os.path.isdir(os.path.dirname(checkpoint_name) or "."):
            raise FileNotFoundError(f"checkpoint_name: no folder {os.path.dirname(checkpoint_name)!r}")
        self.model = model
        self.X_train, self.y_train = _examples(data, "X_train", "y_train")
        self.X_val, self.y_val = _examples(data, "X_val", "y_val")
        self.update_rule = getattr(optim, update_rule)
        self.optim_config = dict(optim_config or {})
        self.lr_decay = lr_decay
        self.batch_size = _count(batch_size, "batch_size")
        self.num_epochs = _count(num_epochs, "num_epochs")
        self.print_every = _count(print_every, "print_every")
        self.verbose = verbose
        self.num_train_samples = None if num_train_samples is None else _count(num_train_samples, "num_train_samples")
        self.num_val_samples = None if num_val_samples is None else _count(num_val_samples, "num_val_samples")
        self.checkpoint_name = checkpoint_name

        self.optim_configs = {name: dict(self.optim_config) for name in model.params}
        self.epoch = 0
        self.loss_history: list[float] = []
        self.train_acc_history: list[float] = []
        self.val_acc_history: list[float] = []
        self.best_val_acc = -1.0
        self.best_params: dict[str, np.ndarray] = {}
        self._best_bn_params: Any = None

    def train(self) -> None:
        """Run `num_epochs` epochs, then put the parameters back that were best on the validation data.

        Batch normalization's running statistics, where the model keeps them in ``bn_params``, go back with the
        parameters that they belong to.
        """
        iterations_per_epoch = max(len(self.X_train) // self.batch_size, 1)
        num_iterations = self.num_epochs * iterations_per_epoch
        for iteration in range(1, num_iterations + 1):
            self._step()
            if self.verbose and (iteration - 1) % self.print_every == 0:
                print(f"(Iteration {iteration} / {num_iterations}) loss: {self.loss_history[-1]:f}")
            epoch_ends = iteration % iterations_per_epoch == 0
            if epoch_ends:
                self.epoch += 1
                for config in self.optim_configs.values():
                    config["learning_rate"] *= self.lr_decay
            if epoch_ends or iteration == 1:
                self._check()
            if epoch_ends and self.checkpoint_name is not None:
                self._save_checkpoint()
        # Copies, for the model may be trained on.
        self.model.params = copy.deepcopy(self.best_params)
        if self._best_bn_params is not None:
            self.model.bn_params = copy.deepcopy(self._best_bn_params)

    def check_accuracy(self, X: Any, y: Any, num_samples: int | None = None, batch_size: int = 100) -> float:
        """Fraction of the examples whose highest score is that of their label.

        Parameters
        ----------
        X : array_like, shape (N, d1, ..., dk)
        y : array_like of int, shape (N,)
        num_samples : int, optional
            Measure on so many examples, drawn at random, where there are more. Default: all.
        batch_size : int, default 100
            Examples given to the model at a time, to spare memory.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If there are no examples, or their number is not that of the labels.
        """
        X, y = _examples({"X": X, "y": y}, "X", "y")
        sample = None
        if num_samples is not None and len(X) > num_samples:
            sample = self._random.choice(len(X), num_samples)
        total = len(X) if sample is None else num_samples
        return float(self._hits(X, y, sample, range(total), _count(batch_size, "batch_size")) / total)

    def _step(self):
        """One iteration: a batch, its gradients, an update of every parameter."""
        loss, grads = self._loss(self._random.choice(len(self.X_train), self.batch_size))
        self.loss_history.append(loss)
        for name, w in self.model.params.items():
            update = self.update_rule(w, grads[name], self.optim_configs[name])
            self.model.params[name], self.optim_configs[name] = update

    def _loss(self, batch):
        """The loss of these training examples, and its gradients."""
        return self.model.loss(self.X_train[batch], self.y_train[batch])

    def _hits(self, X, y, sample, rows, batch_size):
        """How many examples get the highest score for their label, of some consecutive rows of X or of the sample."""
        hits = 0
        for start in range(rows.start, rows.stop, batch_size):
            batch = slice(start, min(start + batch_size, rows.stop))
            chosen = batch if sample is None else sample[batch]
            hits += np.count_nonzero(self.model.loss(X[chosen]).argmax(axis=1) == y[chosen])
        return hits

    def _check(self):
        """Measure both accuracies, and keep the parameters if they are the best so far."""
        train_acc = self.check_accuracy(self.X_train, self.y_train, self.num_train_samples)
        val_acc = self.check_accuracy(self.X_val, self.y_val, self.num_val_samples)
        self.train_acc_history.append(train_acc)
        self.val_acc_history.append(val_acc)
        if self.verbose:
            print(f"(Epoch {self.epoch} / {self.num_epochs}) train acc: {train_acc:f}; val_acc: {val_acc:f}")
        if val_acc > self.best_val_acc:
            self.best_val_acc = val_acc
            self.best_params = copy.deepcopy(self.model.params)
            self._best_bn_params = copy.deepcopy(getattr(self.model, "bn_params", None))

    def _save_checkpoint(self):
        arrays = {f"params/{name}": w for name, w in self.model.params.items()}
        for layer, bn_param in enumerate(getattr(self.model, "bn_params", [])):
            arrays |= {f"bn_params/{layer}/{name}": np.asarray(value) for name, value in bn_param.items()}
        names = ("optim_config", "lr_decay", "batch_size", "num_train_samples", "num_val_samples", "epoch")
        histories = ("loss_history", "train_acc_history", "val_acc_history")
        settings = {name: getattr(self, name) for name in names + histories}
        settings["update_rule"] = self.update_rule.__name__
        # Numbers of NumPy's are not JSON's.
        arrays["solver"] = np.array(json.dumps(settings, default=lambda value: np.asarray(value).tolist()))

        path = f"{self.checkpoint_name}_epoch_{self.epoch}.npz"
        try:
            with open(f"{path}.tmp", "wb") as file:
                np.savez(file, **arrays)
                # Without this, a power cut could find the new name on the disk and not yet what is in the file.
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        finally:  # after a failure: after success it is gone already
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.tmp")
        if self.verbose:
            print(f"Saving checkpoint to {path}")


def _examples(data, X_name, y_name):
    missing = [name for name in (X_name, y_name) if name not in data]
    if missing:
        raise ValueError(f"data must have {X_name} and {y_name}: no {' and no '.join(missing)}")
    X, y = np.asarray(data[X_name]), np.asarray(data[y_name])
    if X.ndim == 0 or len(X) == 0:
        raise ValueError(f"{X_name} must hold at least one example, got shape {X.shape}")
    if y.shape != X.shape[:1]:
        raise ValueError(f"{y_name} must hold one label an example of {X_name}, got shapes {y.shape} and {X.shape}")
    return X, y


def _count(value, name):
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
    return value
