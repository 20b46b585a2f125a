"""Normalization for NumPy, compiled: batch, layer, group, instance and RMS norm, forward and backward.

>>> import numpy as np
>>> import normext
>>> x = np.random.default_rng(0).normal(5, 3, size=(4, 6)).astype(np.float32)
>>> y, cache = normext.layer_norm(x)
>>> dx, dgamma, dbeta = normext.layer_norm_backward(np.ones_like(y), cache)
"""

from normext._config import get_include, show_config, threads
from normext._core import api as _api  # noqa: F401 - the capsule that normext.h looks for
from normext._core.memory import set_memory_cache
from normext._core.runtime import get_num_threads, set_num_threads
from normext._version import __version__
from normext.functional import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from normext.layers import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    fold_batch_norm,
    population_stats,
)
from normext.second_order import batch_norm_backward_backward, layer_norm_backward_backward
from normext.windows import col2im, im2col

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_backward",
    "col2im",
    "fold_batch_norm",
    "get_include",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "im2col",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_backward_backward",
    "population_stats",
    "rms_norm",
    "rms_norm_backward",
    "set_memory_cache",
    "set_num_threads",
    "show_config",
    "threads",
]
