"""Training of any model that has `params` and `loss(X, y)`, by stochastic gradient descent or one of its relatives."""

import copy
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from normext._blas import blas_for_products
from normext._files import json_numbers, new_file, open_plain
from normext.cs231n import optim
from normext.cs231n._keys import check_keys

__all__ = ["Solver"]

HISTORIES = ("loss_history", "train_acc_history", "val_acc_history")


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
        After every epoch save ``<checkpoint_name>_epoch_<epoch>.npz``, for `load_checkpoint`. It is also there for
        ``np.load(..., allow_pickle=False)``: ``params/<name>``, ``bn_params/<layer>/<name>`` of a model that has them,
        both of the best so far (``best_...``), ``optim_configs/<parameter>/<name>``, the state of the random generator,
        and ``solver``, a JSON text with the settings and the histories.

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
        If a keyword, the update rule or one of its settings is not known, a count is not positive, or the data are
        missing, empty or of different lengths.
    FileNotFoundError
        If the folder of `checkpoint_name` does not exist.

    Notes
    -----
    While it trains or measures an accuracy, NumPy's BLAS runs on one thread, where the largest weights times the batch
    size are fewer than 2**30 multiplications: more threads would wait for each other, the longer the more other
    programs run. The number of threads that BLAS had is restored after that. It takes threadpoolctl (``pip install
    threadpoolctl``); without it BLAS keeps its threads, and ``OPENBLAS_NUM_THREADS=1`` (or MKL's) in the environment
    does the same for the whole process.

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
        check_keys(self.optim_config, "optim_config", optim.KEYS)
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
        self._epochs_before = 0  # of the `num_epochs` of the next training: those of a checkpoint

    def train(self) -> None:
        """Run `num_epochs` epochs, then put the parameters back that were best on the validation data.

        Batch normalization's running statistics, where the model keeps them in ``bn_params``, go back with the
        parameters that they belong to. After `load_checkpoint` the epochs that were done then are counted in.
        """
        with self._blas(self.batch_size):
            self._train()

    def _train(self):
        per_epoch = iterations_per_epoch(len(self.X_train), self.batch_size)
        num_iterations = self.num_epochs * per_epoch
        first, self._epochs_before = 1 + self._epochs_before * per_epoch, 0
        for iteration in range(first, num_iterations + 1):
            self._step()
            if self.verbose and (iteration - 1) % self.print_every == 0:
                print(f"(Iteration {iteration} / {num_iterations}) loss: {self.loss_history[-1]:f}")
            epoch_ends = iteration % per_epoch == 0
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

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Take a training up where it was when the checkpoint was saved; `train` then does the epochs that are left.

        Make the model, the data and this Solver as they were, and call this before `train`. `num_epochs` may be
        another: it is that of the epochs in all, and those done before count. NumPy's global random generator gets the
        state that it had, so that the training ends as it would have without the interruption, to the last bit.

        What the checkpoint says is checked before anything is changed, but for the running statistics: the layers check
        these when they meet them. It is no program, so that somebody else's can do no more than train another net.

        Parameters
        ----------
        path : path
            A file that a Solver saved under its `checkpoint_name`.

        Raises
        ------
        ValueError
            If the file is damaged or no checkpoint, or a setting, the number of examples or a parameter's name, shape
            or dtype was another. Nothing is changed then.
        OSError
            If it cannot be read.

        Examples
        --------
        A training of five epochs that ends after three, and the other two.

        >>> import os, tempfile
        >>> import numpy as np
        >>> from normext.cs231n.classifiers.fc_net import FullyConnectedNet
        >>> X = np.random.RandomState(0).randn(60, 5)
        >>> y = (X[:, 0] > 0).astype(int)
        >>> data = {"X_train": X[:50], "y_train": y[:50], "X_val": X[50:], "y_val": y[50:]}
        >>> def solver(num_epochs, **options):
        ...     np.random.seed(0)
        ...     net = FullyConnectedNet([10], input_dim=5, num_classes=2, normalization="batchnorm")
        ...     return Solver(net, data, "adam", batch_size=25, num_epochs=num_epochs, verbose=False, **options)
        >>> whole = solver(5)
        >>> whole.train()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     solver(3, checkpoint_name=os.path.join(folder, "run")).train()
        ...     resumed = solver(5)
        ...     resumed.load_checkpoint(os.path.join(folder, "run_epoch_3.npz"))
        >>> resumed.epoch, len(resumed.loss_history)
        (3, 6)
        >>> resumed.train()
        >>> resumed.loss_history == whole.loss_history
        True
        """
        arrays = self._read_checkpoint(path)
        try:
            self._restore(arrays)
        except Exception as error:  # what is in a damaged file can be wrong in any way
            message = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)} does not fit this training, or is damaged: {message}") from error

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
        with self._blas(_count(batch_size, "batch_size")):
            return float(self._hits(X, y, sample, range(total), batch_size) / total)

    def _blas(self, batch_size):
        """BLAS with as many threads as pay for the rows of a batch by the largest weights."""
        return blas_for_products(batch_size * max(map(np.size, self.model.params.values()), default=0))

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

    def _settings(self):
        """What decides a training beside the model, in JSON's own types."""
        names = ("optim_config", "lr_decay", "batch_size", "num_train_samples", "num_val_samples")
        settings = {name: getattr(self, name) for name in names}
        settings["update_rule"] = self.update_rule.__name__
        settings["examples"] = [len(self.X_train), len(self.X_val)]
        # Numbers of NumPy's are not JSON's.
        return json.loads(json.dumps(settings, default=lambda value: np.asarray(value).tolist()))

    def _save_checkpoint(self):
        state = {
            "params": self.model.params,
            "best_params": self.best_params,
            "bn_params": dict(enumerate(getattr(self.model, "bn_params", []))),
            "best_bn_params": dict(enumerate(self._best_bn_params or [])),
            "optim_configs": self.optim_configs,
            "random": self._random.get_state(legacy=False),
        }
        histories = {name: [float(value) for value in getattr(self, name)] for name in HISTORIES}
        arrays = dict(_flat(state))
        arrays["solver"] = np.array(json.dumps({**self._settings(), "epoch": self.epoch, **histories}))
        path = f"{self.checkpoint_name}_epoch_{self.epoch}.npz"
        with new_file(path) as file:
            np.savez(file, **arrays)
        if self.verbose:
            print(f"Saving checkpoint to {path}")

    def _read_checkpoint(self, path):
        """The arrays of a checkpoint, by name. They take no more memory than the file has bytes."""
        with open_plain(path) as file:
            try:
                archive = zipfile.ZipFile(file)
                members = archive.infolist()
                # A few packed bytes can become any number of them, and the same bytes can have many names.
                packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
                if packed or sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                    raise ValueError("its arrays are packed")
                return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}
            except Exception as error:  # a damaged file can fail in any way at all
                raise ValueError(f"{os.fspath(path)} is not a checkpoint, or is damaged: {error}") from error

    def _restore(self, arrays):
        """Take up the state that the arrays of a checkpoint hold, all of it or, after an error, nothing."""
        saved = json.loads(arrays["solver"].item())
        for name, here in self._settings().items():
            if saved[name] != here:
                raise ValueError(f"{name} is {here!r} here, and was {saved[name]!r:.200}")
        epoch, histories = saved["epoch"], {name: json_numbers(saved[name], (None,)) for name in HISTORIES}
        if type(epoch) is not int or epoch < 1 or not all(histories.values()):
            raise ValueError("epochs and histories must be those of a training")

        params, best_params = (_parameters(arrays, name, self.model.params) for name in ("params", "best_params"))
        layers = getattr(self.model, "bn_params", [])
        bn_params, best_bn_params = (_layers(arrays, name, layers) for name in ("bn_params", "best_bn_params"))
        configs = {name: _part(arrays, f"optim_configs/{name}") for name in params}
        for name, config in configs.items():
            if "learning_rate" not in config:
                raise ValueError(f"there is no optim_configs/{name}/learning_rate")
            try:  # whether the rule takes it
                self.update_rule(params[name], np.zeros_like(params[name]), dict(config))
            except ValueError as error:
                raise ValueError(f"optim_configs/{name}: {error}") from None
        random_state = _random_state(arrays)

        self._random.set_state(random_state)
        self.model.params.update(params)
        if layers:
            self.model.bn_params = bn_params
            self._best_bn_params = best_bn_params
        self.best_params, self.optim_configs = best_params, configs
        self.epoch, self._epochs_before = epoch, min(epoch, self.num_epochs)
        for name, values in histories.items():
            setattr(self, name, values)
        self.best_val_acc = max(self.val_acc_history)


def iterations_per_epoch(num_train: int, batch_size: int) -> int:
    """How many batches, drawn at random, are taken for as many examples as there are."""
    return max(num_train // batch_size, 1)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a tree of dicts, as arrays, under names like those of files."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
            continue
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"a checkpoint holds arrays, numbers and texts, and {prefix}{name} is {value!r:.100}")
        yield prefix + str(name), array


def _part(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """A dict of the lowest level of what `_flat` was given, with Python's own numbers and texts again."""
    found = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
    return {key: array if array.ndim else array.item() for key, array in found.items() if "/" not in key}


def _parameters(
    arrays: Mapping[str, np.ndarray], prefix: str, params: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint under the names of the parameters, which they must be like."""
    found = {key.removeprefix(f"{prefix}/"): array for key, array in arrays.items() if key.startswith(f"{prefix}/")}
    if found.keys() != params.keys():
        raise ValueError(f"{prefix} must be {', '.join(params)}, got {', '.join(found)}")
    for name, w in params.items():
        if _kind(found[name]) != _kind(w):
            raise ValueError(f"{prefix}/{name} must be {_kind(w)}, got {_kind(found[name])}")
    return found


def _layers(arrays: Mapping[str, np.ndarray], prefix: str, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dict of a checkpoint for each layer, with at least what the layer has in its own."""
    found = [_part(arrays, f"{prefix}/{layer}") for layer in range(len(layers))]
    names = {key.split("/")[1] for key in arrays if key.startswith(f"{prefix}/")}
    if any(own.keys() - part for own, part in zip(layers, found)) or names - set(map(str, range(len(layers)))):
        raise ValueError(f"{prefix} must be those of {len(layers)} layers, got {', '.join(sorted(names)) or 'none'}")
    return found


def _random_state(arrays):
    """The state of the random generator, as ``set_state`` takes it. NumPy would take any, and read beyond its end."""
    names = ("bit_generator", "state/key", "state/pos", "has_gauss", "gauss")
    generator, key, pos, has_gauss, gauss = (arrays[f"random/{name}"] for name in names)
    state = generator.item(), key, pos.item(), has_gauss.item(), gauss.item()
    ours = np.random.RandomState(0).get_state()
    alike = all(type(value) is type(own) for value, own in zip(state, ours))
    if not alike or state[0] != ours[0] or _kind(key) != _kind(ours[1]) or not 0 <= state[2] <= len(key):
        raise ValueError("random is not the state of a generator of NumPy's")
    return state


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # At the end, moreover, the checksum is compared.
            raise ValueError(f"{member.filename} is longer than its array")
        # In this machine's byte order.
        return array.astype(array.dtype.newbyteorder("="), copy=False)


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
