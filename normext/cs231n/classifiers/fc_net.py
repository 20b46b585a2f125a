"""Fully connected networks of any depth, with normalization and dropout if wanted.

As in the course, ``from normext.cs231n.classifiers.fc_net import *`` gives the layers as well as the networks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from normext.cs231n import layer_utils, layers
from normext.cs231n.layer_utils import *
from normext.cs231n.layer_utils import NORMALIZATIONS
from normext.cs231n.layers import *
from normext.cs231n.layers import (
    affine_backward,
    affine_forward,
    dropout_backward,
    dropout_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
)

__all__ = ["FullyConnectedNet", "TwoLayerNet"]
__all__ += layers.__all__
__all__ += layer_utils.__all__


class FullyConnectedNet:
    """{affine - [normalization] - relu - [dropout]} x (L - 1) - affine - softmax, for L - 1 hidden layers.

    Weights are drawn from a normal distribution of mean 0 by NumPy's global generator, W1 first, and cast to `dtype`:
    after ``np.random.seed(s)`` a network is the same every time. Biases and beta start at 0, gamma at 1.

    Parameters
    ----------
    hidden_dims : sequence of int
        Size of each hidden layer.
    input_dim : int, default 3 * 32 * 32
    num_classes : int, default 10
    dropout_keep_ratio : float, default 1
        Probability to keep a unit; 1 is no dropout.
    normalization : {'batchnorm', 'layernorm', 'rmsnorm', 'groupnorm', None}, default None
        Of the hidden layers, between affine and relu: see `affine_norm_relu_forward`.
    reg : float, default 0.0
        Strength of the L2 penalty ``0.5 * reg * sum(W**2)``, on the weights W only.
    weight_scale : float, default 1e-2
        Standard deviation of the initial weights.
    dtype : float32 or float64, default np.float32
        Of all computation. Use float64 for numerical gradients.
    seed : int, optional
        Seed of the dropout layers, so that they drop the same units at every call.
    num_groups : int, optional
        For 'groupnorm', and required there: how many groups of neighbouring features a hidden layer is split into. It
        divides every hidden size and leaves two features or more in a group: a single one would always become 0.

    Attributes
    ----------
    params : dict of str to ndarray
        W1, b1, W2, b2, ... and, where there is a normalization, gamma1, beta1, ... of the hidden layers; 'rmsnorm' has
        no beta.
    bn_params : list of dict
        One a hidden layer where there is a normalization, with its settings; batch normalization keeps its running
        statistics here.
    dropout_param : dict
        Settings of the dropout layers; empty without dropout.
    norm : Normalization or None
        The functions of the normalization. Training on several ranks puts others here, which span the ranks.
    share : float
        Which part of a batch X is, 1.0 at first: loss and gradients are multiplied by it, so that those of all parts
        add up to those of the batch. With a share of 0, X may have no rows.

    Raises
    ------
    ValueError
        If the normalization or the dtype is not one of these, a size is not positive, the ratio is not in (0, 1], or
        num_groups does not fit the hidden sizes, is missing or is not for this normalization.

    Examples
    --------
    >>> import numpy as np
    >>> np.random.seed(0)
    >>> net = FullyConnectedNet([20, 30], input_dim=15, normalization="batchnorm")
    >>> X, y = np.random.randn(8, 15), np.arange(8)
    >>> loss, grads = net.loss(X, y)
    >>> sorted(grads)
    ['W1', 'W2', 'W3', 'b1', 'b2', 'b3', 'beta1', 'beta2', 'gamma1', 'gamma2']
    >>> net.loss(X).shape
    (8, 10)
    """

    def __init__(
        self,
        hidden_dims: Sequence[int],
        input_dim: int = 3 * 32 * 32,
        num_classes: int = 10,
        dropout_keep_ratio: float = 1,
        normalization: str | None = None,
        reg: float = 0.0,
        weight_scale: float = 1e-2,
        dtype: Any = np.float32,
        seed: int | None = None,
        *,
        num_groups: int | None = None,
    ) -> None:
        sizes = [input_dim, *hidden_dims, num_classes]
        if min(sizes) < 1:
            raise ValueError(f"input_dim, hidden_dims and num_classes must be positive, got {sizes}")
        if normalization is not None and normalization not in NORMALIZATIONS:
            known = ", ".join(map(repr, NORMALIZATIONS))
            raise ValueError(f"normalization must be one of {known} or None, got {normalization!r}")
        settings = _group_settings(normalization, num_groups, sizes[1:-1])
        if not 0 < dropout_keep_ratio <= 1:
            raise ValueError(f"dropout_keep_ratio must be above 0 and up to 1, got {dropout_keep_ratio}")
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64, got {np.dtype(dtype)}")
        self.normalization = normalization
        self.norm = None if normalization is None else NORMALIZATIONS[normalization]
        self.share = 1.0
        self.use_dropout = dropout_keep_ratio != 1
        self.reg = reg
        self.num_layers = len(sizes) - 1
        self.dtype = dtype

        self.params: dict[str, np.ndarray] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            self.params[f"W{layer}"] = np.random.normal(0, weight_scale, (fan_in, fan_out)).astype(dtype)
            self.params[f"b{layer}"] = np.zeros(fan_out, dtype)
            if self.norm is not None and layer < self.num_layers:
                for name, initial in self.norm.parameters.items():
                    self.params[f"{name}{layer}"] = np.full(fan_out, initial, dtype)

        normalized = hidden_dims if normalization is not None else ()
        self.bn_params: list[dict[str, Any]] = [dict(settings) for _ in normalized]
        self.dropout_param: dict[str, Any] = {"p": dropout_keep_ratio} if self.use_dropout else {}
        if self.use_dropout and seed is not None:
            self.dropout_param["seed"] = seed
        self._set_mode("train")

    def loss(self, X: Any, y: Any = None) -> Any:
        """Scores of the classes in test mode, or, given the labels, the loss and its gradients in training mode.

        Parameters
        ----------
        X : array_like, shape (N, d1, ..., dk)
            N examples of d1 * ... * dk = input_dim numbers.
        y : array_like of int, shape (N,), optional
            Labels from 0 to num_classes - 1.

        Returns
        -------
        scores : ndarray, shape (N, num_classes)
            If y is None.
        loss, grads : float, dict of str to ndarray
            Otherwise; grads has the names and shapes of `params`.

        Raises
        ------
        ValueError
            If X does not fit input_dim, or y does not hold N labels in range.
        TypeError
            If X does not hold real numbers.
        """
        X = np.asarray(X)
        X = X.astype(self.dtype, casting="same_kind", copy=False)
        self._set_mode("test" if y is None else "train")

        out, caches = X, []
        for layer in range(1, self.num_layers):
            out, cache = self._hidden_forward(layer, out)
            caches.append(cache)
        last = self.num_layers
        scores, affine_cache = affine_forward(out, self.params[f"W{last}"], self.params[f"b{last}"])
        if y is None:
            return scores

        loss, dout = softmax_loss(scores, y) if self.share else (0.0, scores)
        if self.share != 1:
            loss, dout = loss * self.share, dout * self.share
        reg = self.reg * self.share
        grads: dict[str, np.ndarray] = {}
        for layer in range(last, 0, -1):
            if layer < last:
                dout, affine_cache = self._hidden_backward(layer, dout, caches.pop(), grads)
            # Nothing lies before the first layer that would ask for the gradient by X.
            dout, dw, db = affine_backward(dout, affine_cache, input_gradient=layer > 1)
            if reg:
                w = self.params[f"W{layer}"]
                loss += 0.5 * reg * float(np.vdot(w, w))
                dw += reg * w
            grads[f"W{layer}"], grads[f"b{layer}"] = dw, db
        return loss, grads

    def _hidden_forward(self, layer, out):
        """affine - [norm] - relu - [dropout]; a cache for each."""
        norm_cache = dropout_cache = None
        out, affine_cache = affine_forward(out, self.params[f"W{layer}"], self.params[f"b{layer}"])
        if self.norm is not None:
            parameters = (self.params[f"{name}{layer}"] for name in self.norm.parameters)
            out, norm_cache = self.norm.forward(out, *parameters, self.bn_params[layer - 1])
        out, relu_cache = relu_forward(out)
        if self.use_dropout:
            out, dropout_cache = dropout_forward(out, self.dropout_param)
        return out, (affine_cache, norm_cache, relu_cache, dropout_cache)

    def _hidden_backward(self, layer, dout, cache, grads):
        """The gradient by the output of the layer's affine part, and the cache of that part."""
        affine_cache, norm_cache, relu_cache, dropout_cache = cache
        if self.use_dropout:
            dout = dropout_backward(dout, dropout_cache)
        dout = relu_backward(dout, relu_cache)
        if self.norm is not None:
            dout, *gradients = self.norm.backward(dout, norm_cache)
            for name, gradient in zip(self.norm.parameters, gradients, strict=True):
                grads[f"{name}{layer}"] = gradient
        return dout, affine_cache

    def _set_mode(self, mode):
        for param in [*self.bn_params, *([self.dropout_param] if self.use_dropout else [])]:
            param["mode"] = mode


class TwoLayerNet(FullyConnectedNet):
    """affine - relu - affine - softmax, in float64: `FullyConnectedNet` with one hidden layer.

    Parameters
    ----------
    input_dim : int, default 3 * 32 * 32
    hidden_dim : int, default 100
    num_classes : int, default 10
    weight_scale : float, default 1e-3
        Standard deviation of the initial weights.
    reg : float, default 0.0
        Strength of the L2 penalty on W1 and W2.

    Examples
    --------
    >>> import numpy as np
    >>> sorted(TwoLayerNet(input_dim=4, hidden_dim=3, num_classes=2).params)
    ['W1', 'W2', 'b1', 'b2']
    """

    def __init__(
        self,
        input_dim: int = 3 * 32 * 32,
        hidden_dim: int = 100,
        num_classes: int = 10,
        weight_scale: float = 1e-3,
        reg: float = 0.0,
    ) -> None:
        super().__init__([hidden_dim], input_dim, num_classes, reg=reg, weight_scale=weight_scale, dtype=np.float64)


def _group_settings(normalization, num_groups, hidden_dims):
    """What a group norm needs to know, checked; nothing for the other norms."""
    if (num_groups is not None) != (normalization == "groupnorm"):
        raise ValueError(
            "num_groups must be given for normalization 'groupnorm' and for no other, "
            f"got num_groups {num_groups!r} for {normalization!r}"
        )
    if num_groups is None:
        return {}
    whole = isinstance(num_groups, (int, np.integer)) and num_groups >= 1
    if not whole or any(size % num_groups or size == num_groups for size in hidden_dims):
        raise ValueError(
            "num_groups must be a whole number that divides every hidden size and leaves two features or more in a "
            f"group, got {num_groups!r} for the sizes {hidden_dims}"
        )
    return {"num_groups": num_groups}
