from typing import Any, Literal, SupportsIndex, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

_Floats = NDArray[np.floating[Any]]
_Gradients = tuple[_Floats, _Floats | None, _Floats | None]

class Cache:
    @property
    def x(self) -> _Floats: ...
    @property
    def gamma(self) -> _Floats | None: ...
    @property
    def beta(self) -> _Floats | None: ...
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def rstd(self) -> NDArray[np.float64]: ...
    @property
    def axis(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def training(self) -> bool: ...
    @property
    def activation(self) -> Literal["relu"] | None: ...

def new_cache(
    norm: str,
    x: _Floats,
    gamma: _Floats | None,
    beta: _Floats | None,
    mean: NDArray[np.float64],
    rstd: NDArray[np.float64],
    axis: int,
    eps: float,
    training: bool,
    in_place: bool,
    activation: Literal["relu"] | None = None,
) -> Cache: ...
def checked_cache(cache: Cache, norm: str) -> Cache: ...
def batch_moments(x: ArrayLike, axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def batch_backward_sums(dy: ArrayLike, cache: Cache) -> NDArray[np.float64]: ...
def batch_backward_apply(
    dy: ArrayLike, cache: Cache, sums: NDArray[np.float64], count: float, *, out: _Floats | None = None
) -> _Floats: ...
def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    running_mean: _Floats | None = None,
    running_var: _Floats | None = None,
    training: bool = True,
    momentum: float = 0.9,
    unbiased: bool = False,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Literal["relu"] | None = None,
    out: _Floats | None = None,
) -> tuple[_Floats, Cache]: ...
def batch_norm_backward(dy: ArrayLike, cache: Cache, *, out: _Floats | None = None) -> _Gradients: ...
@overload
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    residual: None = None,
    out: _Floats | None = None,
) -> tuple[_Floats, Cache]: ...
@overload
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    residual: ArrayLike,
    out: _Floats | None = None,
) -> tuple[_Floats, _Floats, Cache]: ...
def layer_norm_backward(
    dy: ArrayLike, cache: Cache, *, dsum: ArrayLike | None = None, out: _Floats | None = None
) -> _Gradients: ...
def group_norm(
    x: ArrayLike,
    num_groups: SupportsIndex,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: _Floats | None = None,
) -> tuple[_Floats, Cache]: ...
def group_norm_backward(dy: ArrayLike, cache: Cache, *, out: _Floats | None = None) -> _Gradients: ...
@overload
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-6,
    residual: None = None,
    out: _Floats | None = None,
) -> tuple[_Floats, Cache]: ...
@overload
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-6,
    residual: ArrayLike,
    out: _Floats | None = None,
) -> tuple[_Floats, _Floats, Cache]: ...
def rms_norm_backward(
    dy: ArrayLike, cache: Cache, *, dsum: ArrayLike | None = None, out: _Floats | None = None
) -> tuple[_Floats, _Floats | None]: ...
def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: _Floats | None = None,
) -> tuple[_Floats, Cache]: ...
def instance_norm_backward(dy: ArrayLike, cache: Cache, *, out: _Floats | None = None) -> _Gradients: ...
