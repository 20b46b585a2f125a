"""The norms as objects that own their parameters, gradients and, for batch norm, running statistics.

A layer is called for the forward pass, and `backward` is called for the backward pass. All formulas are those of
`normext.functional`; here is only what a training loop keeps between the calls. In place of ``torch.nn`` layers: the
state has PyTorch's names, so checkpoints travel both ways, but `BatchNorm` says what differs in meaning.
"""

import inspect
import numbers
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from normext._core.arrays import Norm, batch_moments, forward
from normext.functional import (
    batch_norm,
    batch_norm_backward,
    group_norm_backward,
    instance_norm_backward,
    layer_norm_backward,
    rms_norm_backward,
)

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "fold_batch_norm", "population_stats"]

_Self = TypeVar("_Self", bound="_Norm")

_INITIAL = {"gamma": np.ones, "beta": np.zeros}
_PYTORCH_NAMES = {"gamma": "weight", "beta": "bias"}


def _array(holder: str, name: str) -> property:
    """An array that a layer keeps in a dict of the name `holder`, as an attribute; None where it is not there.

    What is assigned is copied into it: whoever holds the array, an optimizer say, sees it too.
    """

    def get(layer: "_Norm") -> np.ndarray | None:
        return getattr(layer, holder).get(name)

    def copy_into(layer: "_Norm", value: ArrayLike) -> None:
        array = get(layer)
        if array is None:
            raise AttributeError(f"{layer!r} has no {name} to assign to")
        array[...] = _entry(name, value, array)

    return property(get, copy_into, doc=f"The array {name}, or None. What is assigned is copied into it.")


def _option(name: str) -> property:
    """What a layer does, as an attribute; with another value the layer describes its norm anew."""
    slot = f"_{name}"

    def change(layer: "_Norm", value: Any) -> None:
        setattr(layer, slot, value)
        layer._norm = None

    return property(operator.attrgetter(slot), change)


class _Norm(ABC):
    """What all norms share: parameters and gradients, the mode, the cache between two passes, the state.

    A subclass gives `_check`, `_how`, the `_backward` that belongs to it, and an attribute for each argument.
    """

    # So that a misspelt attribute is an AttributeError. A class that is derived elsewhere may have more of its own.
    __slots__ = ("__weakref__", "_cache", "_eps", "_norm", "_training", "affine", "dtype", "grads", "params")

    eps, training = _option("eps"), _option("training")

    gamma, beta = _array("params", "gamma"), _array("params", "beta")
    weight, bias = gamma, beta  # as PyTorch calls them

    _backward: ClassVar[Callable[..., tuple[Any, ...]]]

    def __init__(
        self, shape: tuple[int, ...], eps: float, affine: bool, dtype: DTypeLike, parameters: tuple[str, ...]
    ) -> None:
        self.eps = _number(eps, "eps", 0, 1e300)
        self.affine = bool(affine)
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.params = {name: _INITIAL[name](shape, self.dtype) for name in parameters} if affine else {}
        self.grads = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.training = True
        self._cache: Any = None

    @abstractmethod
    def _check(self, x: np.ndarray) -> None:
        """Refuse an x of another shape than the layer is for."""

    @abstractmethod
    def _how(self) -> tuple[Any, ...]:
        """What a norm is beside the shape and dtype of x, as `forward` takes it."""

    def _normalize(self, x: np.ndarray, running: tuple[Any, ...] | None = None) -> tuple[np.ndarray, Any]:
        """The result and the cache of the function; running statistics are given as to `forward`."""
        # The norm of the last call: to look one up among many by shape and dtype takes longer than to make a new one.
        norm: Norm | tuple[Any, ...] | None = self._norm
        if norm is None or not norm.fits(x):
            self._check(x)
            norm = self._how()
        params = self.params
        y, cache = forward(x, norm, params.get("gamma"), params.get("beta"), running, None, None)
        self._norm = cache.norm
        return y, cache

    _forward = _normalize

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Normalize x.

        Until `backward` or the next call the layer refers to x, which must not be changed before the backward pass.
        Without a backward pass, as in inference, there is nothing to do.

        Parameters
        ----------
        x : array_like of float32 or float64
            Integers are taken as float64.

        Returns
        -------
        ndarray
            In the shape and dtype of x.

        Raises
        ------
        TypeError, ValueError
            If x does not fit the layer, and as the function of the layer's name.

        Examples
        --------
        >>> LayerNorm(2, eps=0.0)([[1.0, 3.0], [2.0, 6.0]])
        array([[-1.,  1.],
               [-1.,  1.]])
        """
        y, self._cache = self._forward(x if isinstance(x, np.ndarray) else np.asarray(x))
        return y

    def backward(self, dy: ArrayLike) -> np.ndarray:
        """The gradient with respect to the x of the last call; `grads` is overwritten, not added to.

        It lets go of x, so that there is one backward pass for each call.

        Parameters
        ----------
        dy : array_like
            The gradient with respect to the layer's result, in its shape.

        Returns
        -------
        ndarray
            dx, in the shape and dtype of x.

        Raises
        ------
        RuntimeError
            If the layer was not called since the last backward pass.
        ValueError
            If dy does not have the shape of x.

        Examples
        --------
        >>> layer = LayerNorm(2)
        >>> y = layer(np.array([[1.0, 3.0], [2.0, 6.0]]))
        >>> dx = layer.backward(np.ones((2, 2)))
        >>> layer.grads["beta"]
        array([2., 2.], dtype=float32)
        """
        if self._cache is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}.backward needs a call of the layer before it, one for each backward")
        dx, *gradients = self._backward(dy, self._cache)
        for name, gradient in zip(("gamma", "beta"), gradients):
            if gradient is not None:
                self.grads[name][...] = gradient
        self._cache = None
        return dx

    def train(self: _Self) -> _Self:
        """Go to training mode (``training = True``), in which a layer starts. It matters to `BatchNorm` only.

        Returns
        -------
        The layer itself.

        Examples
        --------
        >>> BatchNorm(2).eval().train().training
        True
        """
        self.training = True
        return self

    def eval(self: _Self) -> _Self:
        """Go to evaluation mode (``training = False``). It matters to `BatchNorm` only.

        Returns
        -------
        The layer itself.

        Examples
        --------
        >>> BatchNorm(2).eval().training
        False
        """
        self.training = False
        return self

    def _state(self) -> dict[str, np.ndarray]:
        """The arrays of the state themselves, under PyTorch's names."""
        return {_PYTORCH_NAMES[name]: p for name, p in self.params.items()}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of the parameters and running statistics, under PyTorch's names and in the layer's dtype.

        `BatchNorm` says which of the numbers PyTorch understands in another way. For PyTorch wrap each in
        ``torch.from_numpy``.

        Returns
        -------
        dict
            ``weight`` is gamma, ``bias`` is beta; `BatchNorm` has ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` (an int64 array of shape ()) besides.

        Examples
        --------
        >>> RMSNorm(2).state_dict()
        {'weight': array([1., 1.], dtype=float32)}
        >>> list(BatchNorm(2).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        return {
            name: array.astype(self.dtype if array.dtype.kind == "f" else array.dtype)
            for name, array in self._state().items()
        }

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy a state into the layer's arrays, in place. If anything is wrong with it, nothing is loaded.

        Numbers are copied as they are; `BatchNorm` says which of them PyTorch means in another way.

        Parameters
        ----------
        state : mapping of str to array_like
            With exactly the keys of `state_dict`. Tensors of PyTorch on the CPU may be given as they are, or as their
            ``.numpy()``. They are converted to the layer's dtype.

        Raises
        ------
        TypeError
            If state is not a mapping, or an entry does not hold numbers of the right kind.
        ValueError
            If keys are missing or unexpected, or a shape does not fit.

        Examples
        --------
        >>> layer = RMSNorm(2)
        >>> layer.load_state_dict({"weight": [2.0, 3.0]})
        >>> layer.params["gamma"]
        array([2., 3.], dtype=float32)
        >>> layer.load_state_dict({"gamma": [2.0, 3.0]})
        Traceback (most recent call last):
        ...
        ValueError: state must have the keys of RMSNorm((2,), eps=1e-06): missing 'weight', unexpected 'gamma'
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        own = self._state()
        wrong = [f"missing {name!r}" for name in own if name not in state]
        wrong += [f"unexpected {name!r}" for name in state if name not in own]
        if wrong:
            raise ValueError(f"state must have the keys of {self!r}: {', '.join(wrong)}")
        # All are converted before the first is written.
        new = {name: _entry(f"state[{name!r}]", state[name], array) for name, array in own.items()}
        for name, array in own.items():
            array[...] = new[name]

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """For pickle and copy: without the cache, which refers to the last x."""
        names = {name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())} - {"__weakref__"}
        slots = {name: getattr(self, name) for name in names} | {"_cache": None, "_norm": None}
        return getattr(self, "__dict__", None), slots

    def __repr__(self) -> str:
        """As the layer was made; of the options only momentum, eps and what is not the default."""
        shown = []
        for name, argument in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            text = repr(value.name if isinstance(value, np.dtype) else value)
            if argument.kind is not argument.KEYWORD_ONLY:
                shown.append(text)
            elif name in ("momentum", "eps") or value != argument.default:
                shown.append(f"{name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"


class BatchNorm(_Norm):
    """`normext.batch_norm` [1]_ as a layer: each channel is normalized over the batch.

    In training it uses the batch's mean and variance and brings the running ones up to date; in evaluation it uses the
    running ones. For rows (N, D), signals (N, C, L), images (N, C, H, W) and volumes alike; ``axis=-1`` for channels
    last.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    momentum : float or None, default 0.9
        The share of the old running statistics that each batch leaves, from 0 to 1. **PyTorch's momentum is one minus
        this**: its 0.1 is 0.9 here. None is the plain average over all batches since the layer was made (as in
        PyTorch): of the new statistics the share ``1 / num_batches_tracked`` is taken.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    affine : bool, default True
        Whether there are gamma and beta.
    axis : int, default 1
        The channel axis.
    dtype : float32 or float64, default float32
        Of parameters, gradients and `state_dict`; x may have another.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        gamma and beta, shape (C,), and their gradients after `backward`. The layer writes into these arrays and never
        replaces them, so an optimizer may hold them; empty with ``affine=False``.
    gamma, beta : ndarray or None
        Those of `params`; also under PyTorch's names, weight and bias. What is assigned is copied into the array.
    running_mean, running_var : ndarray of float64, shape (C,)
        Start at 0 and 1; updated in place. Of float32 they would lose, in evaluation, what training keeps of data far
        from zero; `state_dict` has them in the layer's dtype, as PyTorch wants them.
    num_batches_tracked : ndarray of int64, shape ()
        The batches seen in training.
    training : bool
        Set by `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the above; called in training, ValueError if a channel has one number alone: it has no
        variance to learn from.

    See Also
    --------
    population_stats : exact statistics in place of the running averages.
    fold_batch_norm : a trained layer folded into the weights before it.

    Notes
    -----
    What differs from ``torch.nn.BatchNorm1d`` to ``3d``. Neither is converted by `load_state_dict` or `state_dict`:

    - momentum is one minus PyTorch's. It is not part of a state.
    - PyTorch normalizes with the biased variance (divided by the count m of a channel's numbers in a batch), as here,
      but keeps the average of the unbiased one (divided by m - 1). Here the running variance is the biased one too. In
      evaluation a loaded checkpoint gives what PyTorch gives, from the same numbers. To go on training as if it had
      been trained here, multiply ``running_var`` by ``(m - 1) / m``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> layer = BatchNorm(2, eps=0.0)
    >>> layer
    BatchNorm(2, momentum=0.9, eps=0.0)
    >>> layer([[1.0, 2.0], [3.0, 6.0]])
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> dx = layer.backward([[1.0, 0.0], [1.0, 0.0]])
    >>> layer.grads["beta"]
    array([2., 0.], dtype=float32)
    >>> layer.running_mean
    array([0.2, 0.4])
    >>> y = layer.eval()([[1.0, 2.0]])  # with the running statistics
    """

    __slots__ = ("_axis", "_num_features", "_statistics", "momentum")

    axis, num_features = _option("axis"), _option("num_features")
    running_mean, running_var = _array("_statistics", "running_mean"), _array("_statistics", "running_var")
    num_batches_tracked = _array("_statistics", "num_batches_tracked")

    _backward = staticmethod(batch_norm_backward)

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.9,
        eps: float = 1e-5,
        affine: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _count(num_features, "num_features")
        self.momentum = None if momentum is None else _number(momentum, "momentum", 0, 1)
        self.axis = _integer(axis, "axis")
        super().__init__((self.num_features,), eps, affine, dtype, ("gamma", "beta"))
        self._statistics = {
            "running_mean": np.zeros(self.num_features),
            "running_var": np.ones(self.num_features),
            "num_batches_tracked": np.zeros((), np.int64),
        }

    def _forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        populations = _populations.get()
        if populations is not None:
            y, cache, count, mean, var = self._normalize_with_moments(x)
            populations.setdefault(self, _Population()).add(count, mean, var)
            return y, cache
        statistics = self._statistics
        mean, var = statistics["running_mean"], statistics["running_var"]
        if not self._training:
            return self._normalize(x, (mean, var, 1.0, False))
        tracked = statistics["num_batches_tracked"]
        count = tracked.item()
        momentum = 1 - 1 / (count + 1) if self.momentum is None else self.momentum
        # Counted first: once running statistics are updated, nothing may fail any more. (``tracked += 1`` would take as
        # long as half the call of a small batch.)
        tracked[()] = count + 1
        try:
            return self._normalize(x, (mean, var, momentum, False))
        except BaseException:
            tracked[()] = count
            raise

    def _normalize_with_moments(self, x: np.ndarray) -> tuple[np.ndarray, Any, float, np.ndarray, np.ndarray]:
        """y and cache as in training; then how many numbers of a channel the batch has, their mean and variance."""
        self._check(x)
        mean, var = batch_moments(x, self.axis)
        y, cache = batch_norm(
            x, **self.params, running_mean=mean, running_var=var, training=False, eps=self.eps, axis=self.axis
        )
        return y, cache, x.size // self.num_features, mean, var

    def _check(self, x: np.ndarray) -> None:
        _check_channels(x, self.axis, self.num_features)

    def _how(self) -> tuple[Any, ...]:
        return "batch_norm", self.axis, 1, self.eps, bool(self.training), None

    def _state(self) -> dict[str, np.ndarray]:
        return super()._state() | self._statistics


class LayerNorm(_Norm):
    """`normext.layer_norm` as a layer: each row is normalized with its own statistics, in both modes alike.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        The shape of a row, which is the end of the shape of x.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    affine : bool, default True
        Whether there are gamma and beta (PyTorch's ``elementwise_affine``).
    dtype : float32 or float64, default float32
        Of parameters and gradients; x may have another.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        gamma and beta in the shape of a row, and their gradients; as in `BatchNorm`.
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the above.

    Examples
    --------
    >>> layer = LayerNorm((2, 2), eps=0.0)
    >>> layer
    LayerNorm((2, 2), eps=0.0)
    >>> layer([[[1.0, 3.0], [3.0, 1.0]]])
    array([[[-1.,  1.],
            [ 1., -1.]]])
    """

    __slots__ = ("_normalized_shape",)

    normalized_shape = _option("normalized_shape")

    _backward = staticmethod(layer_norm_backward)

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _row_shape(normalized_shape)
        super().__init__(self.normalized_shape, eps, affine, dtype, ("gamma", "beta"))

    def _check(self, x: np.ndarray) -> None:
        _check_rows(x, self.normalized_shape)

    def _how(self) -> tuple[Any, ...]:
        return "layer_norm", -len(self.normalized_shape), 1, self.eps, True, None


class RMSNorm(_Norm):
    """`normext.rms_norm` as a layer: each row is divided by its root mean square, in both modes alike.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        The shape of a row, which is the end of the shape of x.
    eps : float, default 1e-6
        Added to the mean square. Not negative. PyTorch's default is the machine epsilon of x's dtype.
    affine : bool, default True
        Whether there is a gamma (PyTorch's ``elementwise_affine``). There is no beta.
    dtype : float32 or float64, default float32
        Of gamma and its gradient; x may have another.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        gamma in the shape of a row, and its gradient; as in `BatchNorm`.
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the above.

    Examples
    --------
    >>> layer = RMSNorm(4, eps=0.0)
    >>> layer
    RMSNorm((4,), eps=0.0)
    >>> layer([[3.0, 4.0, 0.0, 0.0]])
    array([[1.2, 1.6, 0. , 0. ]])
    """

    __slots__ = ("_normalized_shape",)

    normalized_shape = _option("normalized_shape")

    _backward = staticmethod(rms_norm_backward)

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-6,
        affine: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _row_shape(normalized_shape)
        super().__init__(self.normalized_shape, eps, affine, dtype, ("gamma",))

    def _check(self, x: np.ndarray) -> None:
        _check_rows(x, self.normalized_shape)

    def _how(self) -> tuple[Any, ...]:
        return "rms_norm", -len(self.normalized_shape), 1, self.eps, True, None


class GroupNorm(_Norm):
    """`normext.group_norm` as a layer: each group of channels of each example is normalized, in both modes alike.

    Parameters
    ----------
    num_groups : int
        Divides num_channels.
    num_channels : int
        The number of channels C.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    affine : bool, default True
        Whether there are gamma and beta.
    axis : int, default 1
        The channel axis. Not 0.
    dtype : float32 or float64, default float32
        Of parameters and gradients; x may have another.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        gamma and beta, shape (C,), and their gradients; as in `BatchNorm`.
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the above.

    Examples
    --------
    >>> layer = GroupNorm(2, 4, eps=0.0)
    >>> layer
    GroupNorm(2, 4, eps=0.0)
    >>> layer([[1.0, 3.0, 2.0, 6.0]])
    array([[-1.,  1., -1.,  1.]])
    """

    __slots__ = ("_axis", "_num_channels", "_num_groups")

    axis, num_channels, num_groups = _option("axis"), _option("num_channels"), _option("num_groups")

    _backward = staticmethod(group_norm_backward)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups = _count(num_groups, "num_groups")
        self.num_channels = _count(num_channels, "num_channels")
        if self.num_channels % self.num_groups:
            raise ValueError(f"num_groups must divide the {num_channels} channels, got {num_groups}")
        self.axis = _example_axis(axis)
        super().__init__((self.num_channels,), eps, affine, dtype, ("gamma", "beta"))

    def _check(self, x: np.ndarray) -> None:
        _check_channels(x, self.axis, self.num_channels)

    def _how(self) -> tuple[Any, ...]:
        return "group_norm", self.axis, self.num_groups, self.eps, True, None


class InstanceNorm(_Norm):
    """`normext.instance_norm` as a layer: each channel of each example is normalized, in both modes alike.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    affine : bool, default True
        Whether there are gamma and beta. PyTorch's default is False.
    axis : int, default 1
        The channel axis. Not 0.
    dtype : float32 or float64, default float32
        Of parameters and gradients; x may have another.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        gamma and beta, shape (C,), and their gradients; as in `BatchNorm`.
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the above.

    Examples
    --------
    >>> layer = InstanceNorm(2, eps=0.0)
    >>> layer
    InstanceNorm(2, eps=0.0)
    >>> layer([[[1.0, 3.0], [2.0, 6.0]]])
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    __slots__ = ("_axis", "_num_features")

    axis, num_features = _option("axis"), _option("num_features")

    _backward = staticmethod(instance_norm_backward)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _count(num_features, "num_features")
        self.axis = _example_axis(axis)
        super().__init__((self.num_features,), eps, affine, dtype, ("gamma", "beta"))

    def _check(self, x: np.ndarray) -> None:
        _check_channels(x, self.axis, self.num_features)

    def _how(self) -> tuple[Any, ...]:
        return "instance_norm", self.axis, 1, self.eps, True, None


# Population statistics -----------------------------------------------------------------------------------------------


@dataclass
class _Population:
    """Mean and sum of squared deviations, in float64, of all the numbers of each channel so far."""

    count: float = 0
    mean: Any = 0.0
    m2: Any = 0.0
    batches: int = 0

    def add(self, count: float, mean: np.ndarray, var: np.ndarray) -> None:
        """Merge a batch in (Chan, Golub and LeVeque, "Updating Formulae", 1979)."""
        total = self.count + count
        delta = mean - self.mean
        self.m2 = self.m2 + count * var + delta * delta * (self.count * (count / total))
        self.mean = self.mean + delta * (count / total)
        self.count, self.batches = total, self.batches + 1


# While `population_stats` runs a model, where its batch norms note what they see; else None. The layers are found by
# being called, so that a model may be any function; a context variable keeps models in other threads out of it.
_populations: ContextVar[dict[BatchNorm, _Population] | None] = ContextVar("normext_populations", default=None)


def population_stats(layer_or_model: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Replace the running averages of batch norms by the exact mean and variance over all batches given.

    The paper's own behaviour at test time ([1]_, section 3.1 and Algorithm 2): after training, statistics with fixed
    weights over the data instead of averages over weights that have moved on. The model is called on each batch, and
    every `BatchNorm` that it calls normalizes with the batch's statistics, as in training and whatever its mode, while
    what it sees is counted. Batches may differ in size: they are merged in float64 by their counts [2]_, which gives
    the statistics of all of them laid end to end.

    Parameters
    ----------
    layer_or_model : BatchNorm or callable
        A layer, or a model: anything that is called with a batch and calls its layers, in this thread. Whatever else
        in it depends on a mode (dropout, say) is in the mode that you leave it in.
    batches : iterable
        Inputs for the layer or model, gone through once. A progress bar is shown on a terminal where tqdm is
        installed, if it takes long.

    Raises
    ------
    ValueError
        If batches is empty, or the model calls no `BatchNorm`.
    TypeError
        If layer_or_model cannot be called.

    See Also
    --------
    fold_batch_norm

    Notes
    -----
    The variance is the biased one, as everywhere here, of the whole: the spread of the batches' means is part of it.
    The paper averages the batches' variances and multiplies by m / (m - 1).

    ``num_batches_tracked`` becomes the number of batches. Modes and parameters stay as they are. If an exception stops
    the run, no statistic is changed.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
           Variances", Stanford STAN-CS-79-773, 1979

    Examples
    --------
    >>> layer = BatchNorm(1)
    >>> population_stats(layer, [np.array([[1.0], [2.0]]), np.array([[6.0]])])
    >>> layer.running_mean, layer.running_var.round(3)
    (array([3.]), array([4.667]))

    A model is any function that calls its layers:

    >>> first, second = BatchNorm(2), BatchNorm(2)
    >>> population_stats(lambda x: second(np.maximum(first(x), 0)), np.random.default_rng(0).normal(size=(9, 50, 2)))
    >>> int(first.num_batches_tracked), int(second.num_batches_tracked)
    (9, 9)
    """
    if not callable(layer_or_model):
        raise TypeError(f"layer_or_model must be callable on a batch, got {type(layer_or_model).__name__}")
    populations: dict[BatchNorm, _Population] = {}
    batch = None
    for batch in _with_progress(batches):
        # Only for the call: batches may themselves come from a network.
        token = _populations.set(populations)
        try:
            layer_or_model(batch)
        finally:
            _populations.reset(token)
    if not populations:
        what = "batches is empty" if batch is None else "layer_or_model called no BatchNorm"
        raise ValueError(f"{what}: there is nothing to take statistics of")
    # All is computed before anything is written: where memory runs out, no layer is half updated.
    found = [(layer, p.mean, p.m2 / p.count, np.asarray(p.batches)) for layer, p in populations.items()]
    for layer, mean, var, count in found:
        layer.running_mean[...], layer.running_var[...], layer.num_batches_tracked[...] = mean, var, count


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    # disable=None: no bar without a terminal.
    return tqdm(batches, desc="population statistics", unit="batch", delay=2, leave=False, disable=None)


def fold_batch_norm(
    w: ArrayLike, b: ArrayLike | None, layer: BatchNorm, *, output_axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fold a batch norm in evaluation mode into the affine layer or convolution before it.

    There batch norm is ``y = scale * (x - mean) + beta`` with ``scale = gamma / sqrt(var + eps)`` for each channel, so
    that the weights ``scale * w`` and ``scale * (b - mean) + beta`` give its result in one step.

    Parameters
    ----------
    w : array_like
        The weights, with M = ``layer.num_features`` outputs along `output_axis`.
    b : array_like, shape (M,), or None
        The bias. None for a layer without one.
    layer : BatchNorm
        In evaluation mode, as in training its result is not a fixed function.
    output_axis : int
        1 for ``x @ w + b`` with w (D, M); 0 for a convolution's (F, C, HH, WW) and for PyTorch's ``Linear``, whose
        weights are (M, D). It has no default: of a square w nobody could tell.

    Returns
    -------
    w, b : ndarray
        New arrays in the shapes of w and (M,), both in the dtype of w (of integers float64). Computed in float64.

    Raises
    ------
    TypeError
        If layer is not a `BatchNorm`, w or b does not hold real numbers, or output_axis is not an integer.
    ValueError
        If w has fewer than two axes, shapes do not fit, or the layer is in training mode. `numpy.exceptions.AxisError`,
        which is one, if output_axis is out of range.

    See Also
    --------
    population_stats

    Examples
    --------
    >>> layer = BatchNorm(2, dtype=np.float64).eval()
    >>> layer.running_mean[...], layer.running_var[...] = [1.0, 2.0], [4.0, 9.0]
    >>> x, w = np.array([[1.0, 2.0, 3.0]]), np.arange(6.0).reshape(3, 2)
    >>> folded_w, folded_b = fold_batch_norm(w, None, layer, output_axis=1)
    >>> np.allclose(x @ folded_w + folded_b, layer(x @ w))
    True
    """
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be a BatchNorm, got {type(layer).__name__}")
    if layer.training:
        raise ValueError("layer must be in evaluation mode, got one in training: call its eval() first")
    w = _real_array(w, "w")
    channels = layer.num_features
    b = np.zeros(channels) if b is None else _real_array(b, "b")
    output_axis = _integer(output_axis, "output_axis")
    if w.ndim < 2:
        raise ValueError(f"w must have an axis of inputs and one of outputs at least, got shape {w.shape}")
    if not -w.ndim <= output_axis < w.ndim:
        raise np.exceptions.AxisError(output_axis, w.ndim, "output_axis")
    if w.shape[output_axis] != channels:
        raise ValueError(f"w must have {channels} outputs, as layer has, on axis {output_axis}, got shape {w.shape}")
    if b.shape != (channels,):
        raise ValueError(f"b must have shape ({channels},), got {b.shape}")
    # The cache of an empty batch holds the statistics as batch_norm uses them, in float64.
    nothing, mean, var = np.empty((0, channels)), layer.running_mean, layer.running_var
    _, cache = batch_norm(nothing, running_mean=mean, running_var=var, training=False, eps=layer.eps)
    scale = cache.rstd * layer.params.get("gamma", 1.0)
    folded_b = scale * (b - cache.mean) + layer.params.get("beta", 0.0)
    folded_w = np.moveaxis(np.moveaxis(w, output_axis, -1) * scale, -1, output_axis)
    return folded_w.astype(w.dtype), folded_b.astype(w.dtype)


# Arguments -----------------------------------------------------------------------------------------------------------


def _number(value: Any, name: str, low: float, high: float) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    return number


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _count(value: Any, name: str) -> int:
    count = _integer(value, name)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def _example_axis(axis: Any) -> int:
    """The channel axis of a norm that keeps examples apart."""
    axis = _integer(axis, "axis")
    if axis == 0:
        raise ValueError("axis must not be 0, where the examples are")
    return axis


def _row_shape(normalized_shape: Any) -> tuple[int, ...]:
    lengths = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if not lengths:
        raise ValueError("normalized_shape must name at least one axis, got ()")
    return tuple(_count(length, "normalized_shape") for length in lengths)


def _check_channels(x: np.ndarray, axis: int, channels: int) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise np.exceptions.AxisError(axis, x.ndim, "x has too few axes for the layer's channel axis")
    if x.shape[axis] != channels:
        raise ValueError(f"x must have {channels} channels on axis {axis}, got shape {x.shape}")


def _check_rows(x: np.ndarray, row_shape: tuple[int, ...]) -> None:
    if x.shape[-len(row_shape) :] != row_shape:
        raise ValueError(f"x must have a shape that ends in {row_shape}, got {x.shape}")


def _entry(name: str, value: Any, own: np.ndarray) -> np.ndarray:
    """A new array in the shape and dtype of the layer's own."""
    value = np.asarray(value)
    if not np.can_cast(value.dtype, own.dtype, "same_kind"):
        raise TypeError(f"{name} must be convertible to {own.dtype}, got dtype {value.dtype}")
    if value.shape != own.shape:
        raise ValueError(f"{name} must have shape {own.shape}, got {value.shape}")
    return value.astype(own.dtype)


def _real_array(a: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(a)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return array if array.dtype.kind == "f" else array.astype(np.float64)
