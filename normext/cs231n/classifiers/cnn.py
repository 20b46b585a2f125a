"""A small convolutional network, with normalization if wanted.

As in the course, ``from normext.cs231n.classifiers.cnn import *`` gives the layers as well as the network.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from normext.cs231n import fast_layers, layer_utils, layers
from normext.cs231n.fast_layers import *
from normext.cs231n.fast_layers import (
    conv_backward_fast,
    conv_forward_fast,
    max_pool_backward_fast,
    max_pool_forward_fast,
)
from normext.cs231n.layer_utils import *
from normext.cs231n.layer_utils import (
    SCALE_AND_SHIFT,
    Normalization,
    affine_relu_backward,
    affine_relu_forward,
)
from normext.cs231n.layers import *
from normext.cs231n.layers import (
    affine_backward,
    affine_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
    spatial_groupnorm_backward,
    spatial_groupnorm_forward,
)

__all__ = ["ThreeLayerConvNet"]
__all__ += layers.__all__
__all__ += fast_layers.__all__
__all__ += layer_utils.__all__

POOL_PARAM = {"pool_height": 2, "pool_width": 2, "stride": 2}

# Besides batch norm, every norm here is a group norm: into how many groups it splits so many filters.
NUM_GROUPS = {
    "layernorm": lambda filters: 1,
    "groupnorm": lambda filters: math.gcd(8, filters),
    "instancenorm": lambda filters: filters,
}


class ThreeLayerConvNet:
    """conv - [normalization] - relu - 2x2 max pool - affine - relu - affine - softmax.

    The convolution has stride 1, and padding that keeps the size of the image. Weights are drawn from a normal
    distribution of mean 0 by NumPy's global generator, W1, W2, W3 in this order, and cast to `dtype`: after
    ``np.random.seed(s)`` a network is the same every time. Biases and beta start at 0, gamma at 1.

    Parameters
    ----------
    input_dim : tuple of int, default (3, 32, 32)
        Channels, height and width of an image, height and width even.
    num_filters : int, default 32
    filter_size : int, default 7
        Height and width of a filter, odd.
    hidden_dim : int, default 100
        Size of the first affine layer.
    num_classes : int, default 10
    weight_scale : float, default 1e-3
        Standard deviation of the initial weights.
    reg : float, default 0.0
        Strength of the L2 penalty ``0.5 * reg * sum(W**2)``, on the weights W only.
    dtype : float32 or float64, default np.float32
        Of all computation. Use float64 for numerical gradients.
    normalization : {'batchnorm', 'layernorm', 'groupnorm', 'instancenorm', None}, default None
        Of the convolution's output, with one gamma and one beta for each filter:

        - 'batchnorm': of each filter's outputs, over the batch and all pixels (`spatial_batchnorm_forward`).
        - 'groupnorm': of each example's groups of filters (`spatial_groupnorm_forward`). The number of groups is the
          largest of 8, 4, 2, 1 that divides `num_filters`.
        - 'layernorm': of each example as a whole, all filters and pixels: one group. This is the form in which [1]_
          compares it with the other norms. `normext.layer_norm` of the last three axes would have a gamma for each
          pixel too, and so treat the places of an image differently, which a convolution does not.
        - 'instancenorm': of each filter's outputs for each example [2]_: a group for each filter.

    Attributes
    ----------
    params : dict of str to ndarray
        W1 (num_filters, C, filter_size, filter_size), b1, W2, b2, W3, b3 and, with a normalization, gamma1 and beta1.
    bn_params : list of dict
        One where there is a normalization; batch normalization keeps its running statistics here.
    norm : Normalization or None
        The functions of the normalization. Training on several ranks puts others here, which span the ranks.
    share : float
        As `normext.cs231n.classifiers.fc_net.FullyConnectedNet` has it.

    Raises
    ------
    ValueError
        If a size is not positive, the height or the width is odd, the filter size even, or the normalization or the
        dtype not one of these.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494, section 3.1.
    .. [2] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
           Stylization", 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> np.random.seed(0)
    >>> net = ThreeLayerConvNet(input_dim=(1, 8, 8), num_filters=4, filter_size=3, normalization="batchnorm")
    >>> X, y = np.random.randn(5, 1, 8, 8), np.arange(5)
    >>> loss, grads = net.loss(X, y)
    >>> sorted(grads)
    ['W1', 'W2', 'W3', 'b1', 'b2', 'b3', 'beta1', 'gamma1']
    >>> net.loss(X).shape
    (5, 10)
    """

    def __init__(
        self,
        input_dim: tuple[int, int, int] = (3, 32, 32),
        num_filters: int = 32,
        filter_size: int = 7,
        hidden_dim: int = 100,
        num_classes: int = 10,
        weight_scale: float = 1e-3,
        reg: float = 0.0,
        dtype: Any = np.float32,
        normalization: str | None = None,
    ) -> None:
        self.input_dim = tuple(input_dim)
        if len(self.input_dim) != 3:
            raise ValueError(f"input_dim must be (channels, height, width), got {self.input_dim}")
        channels, height, width = self.input_dim
        sizes = [*self.input_dim, num_filters, filter_size, hidden_dim, num_classes]
        if min(sizes) < 1:
            raise ValueError(
                f"input_dim, num_filters, filter_size, hidden_dim and num_classes must be positive, got {sizes}"
            )
        if height % 2 or width % 2:
            raise ValueError(f"height and width must be even, for the 2x2 pooling, got input_dim {self.input_dim}")
        if filter_size % 2 == 0:
            raise ValueError(f"filter_size must be odd, for padding to keep the size of an image, got {filter_size}")
        if normalization not in (None, "batchnorm", *NUM_GROUPS):
            known = ", ".join(map(repr, ("batchnorm", *NUM_GROUPS)))
            raise ValueError(f"normalization must be one of {known} or None, got {normalization!r}")
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64, got {np.dtype(dtype)}")
        self.normalization = normalization
        self.norm = None if normalization is None else _norm(normalization, num_filters)
        self.share = 1.0
        self.reg = reg
        self.dtype = dtype
        self.conv_param = {"stride": 1, "pad": filter_size // 2}

        weights = (
            (num_filters, (num_filters, channels, filter_size, filter_size)),
            (hidden_dim, (num_filters * (height // 2) * (width // 2), hidden_dim)),
            (num_classes, (hidden_dim, num_classes)),
        )
        self.params: dict[str, np.ndarray] = {}
        for layer, (outputs, shape) in enumerate(weights, start=1):
            self.params[f"W{layer}"] = np.random.normal(0, weight_scale, shape).astype(dtype)
            self.params[f"b{layer}"] = np.zeros(outputs, dtype)
        self.bn_params: list[dict[str, Any]] = []
        if normalization is not None:
            shape = (num_filters,) if normalization == "batchnorm" else (1, num_filters, 1, 1)
            self.params["gamma1"], self.params["beta1"] = np.ones(shape, dtype), np.zeros(shape, dtype)
            self.bn_params.append({"mode": "train"})

    def loss(self, X: Any, y: Any = None) -> Any:
        """Scores of the classes in test mode, or, given the labels, the loss and its gradients in training mode.

        Parameters
        ----------
        X : array_like, shape (N, C, H, W)
            N images of the shape `input_dim`.
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
        if X.shape[1:] != self.input_dim:
            raise ValueError(f"X must have the shape (N, {', '.join(map(str, self.input_dim))}), got {X.shape}")
        X = X.astype(self.dtype, casting="same_kind", copy=False)
        for bn_param in self.bn_params:
            bn_param["mode"] = "test" if y is None else "train"

        p = self.params
        out, conv_cache = conv_forward_fast(X, p["W1"], p["b1"], self.conv_param)
        if self.norm is not None:
            out, norm_cache = self.norm.forward(out, p["gamma1"], p["beta1"], self.bn_params[0])
        out, relu_cache = relu_forward(out)
        out, pool_cache = max_pool_forward_fast(out, POOL_PARAM)
        out, hidden_cache = affine_relu_forward(out, p["W2"], p["b2"])
        scores, scores_cache = affine_forward(out, p["W3"], p["b3"])
        if y is None:
            return scores

        loss, dout = softmax_loss(scores, y) if self.share else (0.0, scores)
        if self.share != 1:
            loss, dout = loss * self.share, dout * self.share
        reg = self.reg * self.share
        grads: dict[str, np.ndarray] = {}
        dout, grads["W3"], grads["b3"] = affine_backward(dout, scores_cache)
        dout, grads["W2"], grads["b2"] = affine_relu_backward(dout, hidden_cache)
        dout = relu_backward(max_pool_backward_fast(dout, pool_cache), relu_cache)
        if self.norm is not None:
            dout, grads["gamma1"], grads["beta1"] = self.norm.backward(dout, norm_cache)
        _, grads["W1"], grads["b1"] = conv_backward_fast(dout, conv_cache, input_gradient=False)
        if reg:
            for name in ("W1", "W2", "W3"):
                loss += 0.5 * reg * float(np.vdot(p[name], p[name]))
                grads[name] += reg * p[name]
        return loss, grads


def _norm(normalization, num_filters):
    if normalization == "batchnorm":
        return Normalization(spatial_batchnorm_forward, spatial_batchnorm_backward, SCALE_AND_SHIFT)
    forward = partial(_groupnorm_forward, num_groups=NUM_GROUPS[normalization](num_filters))
    return Normalization(forward, spatial_groupnorm_backward, SCALE_AND_SHIFT)


def _groupnorm_forward(x, gamma, beta, gn_param, num_groups):
    return spatial_groupnorm_forward(x, gamma, beta, num_groups, gn_param)
