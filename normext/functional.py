"""The public functions: words and defaults.

What a call fuses with the norm is named by an argument of the forward pass, and saves a pass of its own through memory
both ways: ``activation='relu'`` of batch norm, whose backward pass finds the mask again from x, and ``residual=r`` of
layer and RMS norm, which return the sum ``x + r`` too and take its own gradient as `dsum`.
"""

from typing import Any, Literal, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normext._core.arrays import Cache, backward, forward

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

Floats: TypeAlias = NDArray[np.floating[Any]]
Gradients: TypeAlias = tuple[Floats, Floats | None, Floats | None]


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    running_mean: Floats | None = None,
    running_var: Floats | None = None,
    training: bool = True,
    momentum: float = 0.9,
    unbiased: bool = False,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Literal["relu"] | None = None,
    out: Floats | None = None,
) -> tuple[Floats, Cache]:
    """Normalize each channel of x over the batch: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    Algorithm 1 of [1]_. In training, mean and (biased) variance are those of the batch, taken for each channel over all
    other axes; in evaluation they are the running ones.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides: (N, D), (N, C, H, W) with ``axis=1``, (N, H, W, C) with ``axis=-1``. Integers are
        taken as float64. float16 and bfloat16 (the dtype of ml_dtypes) are storage: converted a block at a time,
        computed in float32.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x, or to float32 if that has 16 bits, as are their
        gradients. Default: 1 and 0.
    running_mean, running_var : ndarray of floats, shape (C,), optional
        Running statistics. In training they are updated in place where given, ``running = momentum * running + (1 -
        momentum) * batch``; in evaluation both are needed. They are given by name: second and third come gamma and
        beta, not these, as in PyTorch.
    training : bool, default True
        Whether to normalize with the batch's statistics or with the running ones.
    momentum : float, default 0.9
        The share of the old running statistics that an update keeps, from 0 to 1. PyTorch's momentum is one minus this.
    unbiased : bool, default False
        Whether `running_var` is that of an unbiased estimate, as PyTorch keeps it: of the batch's sum of squares
        divided by one less than the count. The batch itself is normalized with the biased variance in either case.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    axis : int, default 1
        The channel axis.
    activation : {'relu', None}, default None
        With 'relu', what is returned is ``maximum(y, 0)``, and the backward pass goes through both. It is done where
        the numbers are in registers: a relu of its own would read and write all of y once more, and its backward pass
        dy, dx and a mask. No mask is kept; the backward pass finds it again from x.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x``
        the backward pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A channel that is constant gives exactly beta.
    cache : object
        For `batch_norm_backward`. It refers to x and gamma and holds two float64 numbers for each channel. These must
        not be changed before the backward pass, which sees it, and raises, only with ``NORMEXT_DEBUG=1`` in the
        environment.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or training or unbiased is not a bool.
    ValueError
        If a shape does not fit; in training, if there is nothing to take a mean of, or running statistics are to be
        updated (or `unbiased` is set) and a channel has one number alone; in evaluation, if a running statistic is
        missing; if a running statistic that is to be updated or `out` is read-only or overlaps an argument other than
        as said; if momentum or eps is out of range, or the activation is unknown. `numpy.exceptions.AxisError`, which
        is one, if axis is out of range.

    See Also
    --------
    layer_norm : normalizes each row instead.

    Notes
    -----
    Statistics are accumulated about a pivot near the mean, in blocks that are merged in float64 [2]_, so that data far
    from zero lose nothing. Results are bit-identical for every number of threads.

    Numbers of any size are normalized, those whose variance is beyond float64 (from about 1e154 on) too; a running
    variance is then infinite. A channel that holds a NaN or an infinity has NaN for statistics and becomes NaN; its
    neighbours do not change. Only a constant channel with eps 0, and one of float64 whose numbers lie within 6e-309,
    where the formula has no number, gives beta.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
           Variances", Stanford STAN-CS-79-773, 1979

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> y, cache = normext.batch_norm(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> y, cache = normext.batch_norm(x, running_mean=running_mean, running_var=running_var)
    >>> running_mean
    array([0.2, 0.4])
    >>> y, cache = normext.batch_norm(x, running_var=running_var, momentum=0.0, unbiased=True)
    >>> running_var
    array([2., 8.])
    """
    running = running_mean, running_var, momentum, unbiased
    return forward(x, ("batch_norm", axis, 1, eps, training, activation), gamma, beta, running, None, out)


def batch_norm_backward(dy: ArrayLike, cache: Cache, *, out: Floats | None = None) -> Gradients:
    """Gradients of `batch_norm` with respect to x, gamma and beta.

    In training, with ``xhat = (x - mean) * rstd`` and m numbers in a channel ([1]_, section 3, simplified): ``dx =
    gamma * rstd * (dy - sum(dy) / m - xhat * sum(dy * xhat) / m)``. In evaluation the statistics are constants and ``dx
    = gamma * rstd * dy``. After ``activation='relu'``, dy counts as 0 where y, as it was returned, was not above 0 (nor
    NaN).

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `batch_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `batch_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.batch_norm(np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]), gamma=np.ones(2))
    >>> dx, dgamma, dbeta = normext.batch_norm_backward(np.ones((3, 2)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a channel move together
    True
    >>> dbeta is None
    True
    """
    return backward(dy, cache, "batch_norm", None, out)


@overload
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    axis: int = ...,
    eps: float = ...,
    residual: None = ...,
    out: Floats | None = ...,
) -> tuple[Floats, Cache]: ...
@overload
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    *,
    axis: int = ...,
    eps: float = ...,
    residual: ArrayLike,
    out: Floats | None = ...,
) -> tuple[Floats, Floats, Cache]: ...
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    out: Floats | None = None,
) -> tuple[Floats, Cache] | tuple[Floats, Floats, Cache]:
    """Normalize each row of x: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    [1]_, section 3. A row is `axis` and all axes after it together; its mean and (biased) variance are its own, in
    training and evaluation alike.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides. Integers are taken as float64; float16 and bfloat16 as by `batch_norm`.
    gamma, beta : array_like, shape ``x.shape[axis:]``, optional
        Scale and shift of each position in a row, converted to the dtype of x. Default: 1 and 0.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    residual : array_like, optional
        In the shape of x, converted to its dtype. What is normalized is then ``x + residual``, which is returned too,
        as the blocks of a transformer need it. Rows are added up and normalized while they are in cache: an addition of
        its own would write all of the sum and have it read again.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x``
        without a residual the backward pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A row that is constant gives exactly beta.
    sum : ndarray
        ``x + residual``, in the shape and dtype of x. Only with a residual.
    cache : object
        For `layer_norm_backward`. It refers to x (or the sum) and gamma and holds two float64 numbers for each row; x
        must not be changed before the backward pass.

    Raises
    ------
    TypeError
        If a dtype is not one of the above.
    ValueError
        If a shape does not fit, a row has no numbers, `out` is read-only or overlaps an argument other than as said, or
        eps is negative. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    See Also
    --------
    batch_norm : normalizes each channel over the batch, and says how the statistics are taken.

    Notes
    -----
    A row that holds a NaN or an infinity becomes NaN; the others do not change. A constant row gives beta without an
    eps too.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    >>> import normext
    >>> y, cache = normext.layer_norm([[1.0, 3.0], [2.0, 6.0]], gamma=[1.0, 10.0], eps=0.0)
    >>> y
    array([[-1., 10.],
           [-1., 10.]])
    >>> y, total, cache = normext.layer_norm([[1.0, 3.0]], residual=[[1.0, 1.0]])
    >>> total
    array([[2., 4.]])
    """
    return forward(x, ("layer_norm", axis, 1, eps, True, None), gamma, beta, None, residual, out)


def layer_norm_backward(
    dy: ArrayLike, cache: Cache, *, dsum: ArrayLike | None = None, out: Floats | None = None
) -> Gradients:
    """Gradients of `layer_norm` with respect to x, gamma and beta.

    With ``xhat = (x - mean) * rstd``, ``g = gamma * dy`` and n numbers in a row, ``dx = rstd * (g - sum(g) / n - xhat *
    sum(g * xhat) / n)``: batch norm's ([1]_, section 3), rows and columns changed over.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `layer_norm` returned.
    dsum : array_like, optional
        The gradient with respect to the sum that a call with a residual returned, from where else it went; it is added
        to dx before that is written.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given. With a residual it is the gradient of that, too.
    dgamma, dbeta : ndarray, shape ``x.shape[axis:]``, or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `layer_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
           Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.layer_norm([[1.0, 3.0, 5.0]], gamma=[1.0, 1.0, 1.0], beta=[0.0, 0.0, 0.0])
    >>> dx, dgamma, dbeta = normext.layer_norm_backward(np.ones((1, 3)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a row move together
    True
    >>> dbeta
    array([1., 1., 1.])
    """
    return backward(dy, cache, "layer_norm", dsum, out)


@overload
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    *,
    axis: int = ...,
    eps: float = ...,
    residual: None = ...,
    out: Floats | None = ...,
) -> tuple[Floats, Cache]: ...
@overload
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = ...,
    *,
    axis: int = ...,
    eps: float = ...,
    residual: ArrayLike,
    out: Floats | None = ...,
) -> tuple[Floats, Floats, Cache]: ...
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-6,
    residual: ArrayLike | None = None,
    out: Floats | None = None,
) -> tuple[Floats, Cache] | tuple[Floats, Floats, Cache]:
    """Divide each row of x by its root mean square: ``y = gamma * x / sqrt(mean(x**2) + eps)``.

    [1]_, section 4. Layer norm without the mean: a row is `axis` and all axes after it together.

    Parameters
    ----------
    x : array_like of float32 or float64
        Of any rank and any strides. Integers are taken as float64; float16 and bfloat16 as by `batch_norm`.
    gamma : array_like, shape ``x.shape[axis:]``, optional
        Scale of each position in a row, converted to the dtype of x. Default: 1.
    axis : int, default -1
        The first normalized axis.
    eps : float, default 1e-6
        Added to the mean square. Not negative.
    residual : array_like, optional
        As for `layer_norm`: what is normalized is ``x + residual``, which is returned too.
    out : ndarray, optional
        As for `layer_norm`.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given. A row of zeros gives zeros.
    sum : ndarray
        ``x + residual``, in the shape and dtype of x. Only with a residual.
    cache : object
        For `rms_norm_backward`. It refers to x (or the sum) and gamma and holds two float64 numbers for each row (the
        mean is 0).

    Raises
    ------
    TypeError
        If a dtype is not one of the above.
    ValueError
        If a shape does not fit, a row has no numbers, `out` is read-only or overlaps an argument other than as said, or
        eps is negative. `numpy.exceptions.AxisError`, which is one, if axis is out of range.

    Notes
    -----
    A row that holds a NaN becomes NaN. One with an infinity has an infinite root mean square, and what is divided by it
    is 0, or NaN where x is infinite itself; its gradients are NaN.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
           https://arxiv.org/abs/1910.07467

    Examples
    --------
    >>> import normext
    >>> y, cache = normext.rms_norm([[3.0, 4.0, 0.0, 0.0]], eps=0.0)
    >>> y
    array([[1.2, 1.6, 0. , 0. ]])
    """
    return forward(x, ("rms_norm", axis, 1, eps, True, None), gamma, None, None, residual, out)


def rms_norm_backward(
    dy: ArrayLike, cache: Cache, *, dsum: ArrayLike | None = None, out: Floats | None = None
) -> tuple[Floats, Floats | None]:
    """Gradients of `rms_norm` with respect to x and gamma.

    With ``xhat = x * rstd``, ``g = gamma * dy`` and n numbers in a row, ``dx = rstd * (g - xhat * sum(g * xhat) / n)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `rms_norm` returned.
    dsum : array_like, optional
        The gradient with respect to the sum that a call with a residual returned, from where else it went; it is added
        to dx before that is written.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given. With a residual it is the gradient of that, too.
    dgamma : ndarray, shape ``x.shape[axis:]``, or None
        In the dtype of x; None if gamma was None.

    Raises
    ------
    TypeError
        If cache is not one of `rms_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> x = np.array([[3.0, 4.0]])
    >>> y, cache = normext.rms_norm(x, eps=0.0)
    >>> dx, dgamma = normext.rms_norm_backward(x, cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when x grows
    True
    """
    return backward(dy, cache, "rms_norm", dsum, out)[:2]


def group_norm(
    x: ArrayLike,
    num_groups: SupportsIndex,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Floats | None = None,
) -> tuple[Floats, Cache]:
    """Normalize each group of channels of each example: ``y = gamma * (x - mean) / sqrt(var + eps) + beta``.

    [1]_. The channels are split into groups of neighbours; mean and (biased) variance are those of a group in one
    example, over its channels and all axes but the first. One group is layer norm (but for the shape of gamma), a group
    for each channel is instance norm.

    Parameters
    ----------
    x : array_like of float32 or float64
        Examples along the first axis, channels along `axis`. Integers are taken as float64; float16 and bfloat16 as by
        `batch_norm`.
    num_groups : int
        Divides the number of channels C.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x. Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    out : ndarray, optional
        Where to write y, in the shape and dtype of x. It may be x itself; any other overlap is refused. After ``out=x``
        the backward pass is refused, as x is gone.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given.
    cache : object
        For `group_norm_backward`. It refers to x and gamma and holds two float64 numbers for each group of each
        example.

    Raises
    ------
    TypeError
        If a dtype is not one of the above, or num_groups is not an integer.
    ValueError
        If num_groups does not divide the channels, a shape does not fit, a group has no numbers, `out` is read-only or
        overlaps an argument other than as said, or eps is negative. `numpy.exceptions.AxisError`, which is one, if axis
        is out of range.

    Notes
    -----
    A group that holds a NaN or an infinity becomes NaN; the others do not change. A constant group gives beta without
    an eps too.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.group_norm(np.array([[1.0, 3.0, 2.0, 6.0]]), 2, eps=0.0)
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """
    return forward(x, ("group_norm", axis, num_groups, eps, True, None), gamma, beta, None, None, out)


def group_norm_backward(dy: ArrayLike, cache: Cache, *, out: Floats | None = None) -> Gradients:
    """Gradients of `group_norm` with respect to x, gamma and beta.

    With ``xhat = (x - mean) * rstd``, ``g = gamma * dy`` and n numbers in a group,
    ``dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)``.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `group_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError
        If cache is not one of `group_norm`, or a dtype does not fit.
    ValueError
        If the shape of dy or `out` does not fit, `out` is read-only or overlaps, or x was normalized in place.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.group_norm(np.array([[1.0, 3.0, 2.0, 6.0]]), 2, beta=np.zeros(4))
    >>> dx, dgamma, dbeta = normext.group_norm_backward(np.ones((1, 4)), cache)
    >>> bool(abs(dx).max() < 1e-15)  # y does not change when all x of a group move together
    True
    """
    return backward(dy, cache, "group_norm", None, out)


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Floats | None = None,
) -> tuple[Floats, Cache]:
    """Normalize each channel of each example: `group_norm` with a group for each channel.

    [1]_.

    Parameters
    ----------
    x : array_like of float32 or float64
        Examples along the first axis, channels along `axis`. Integers are taken as float64; float16 and bfloat16 as by
        `batch_norm`.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, converted to the dtype of x. Default: 1 and 0.
    axis : int, default 1
        The channel axis. Not 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.
    out : ndarray, optional
        As for `group_norm`.

    Returns
    -------
    y : ndarray
        In the shape and dtype of x; `out` if that was given.
    cache : object
        For `instance_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`; ValueError if there are no channels.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
           Stylization", 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.instance_norm(np.array([[[1.0, 3.0], [2.0, 6.0]]]), eps=0.0)
    >>> y
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return forward(x, ("instance_norm", axis, 1, eps, True, None), gamma, beta, None, None, out)


def instance_norm_backward(dy: ArrayLike, cache: Cache, *, out: Floats | None = None) -> Gradients:
    """Gradients of `instance_norm` with respect to x, gamma and beta; see `group_norm_backward`.

    Parameters
    ----------
    dy : array_like
        The gradient with respect to y, in the shape of x; converted to the dtype of x.
    cache : object
        What the call of `instance_norm` returned.
    out : ndarray, optional
        Where to write dx, in the shape and dtype of x. It may be dy itself; any other overlap is refused.

    Returns
    -------
    dx : ndarray
        In the shape and dtype of x; `out` if that was given.
    dgamma, dbeta : ndarray, shape (C,), or None
        In the dtype of x (float32 if that has 16 bits); None for a parameter that was None.

    Raises
    ------
    TypeError, ValueError
        As `group_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import normext
    >>> y, cache = normext.instance_norm(np.array([[[1.0, 3.0], [2.0, 6.0]]]), beta=np.zeros(2))
    >>> dx, dgamma, dbeta = normext.instance_norm_backward(np.ones((1, 2, 2)), cache)
    >>> dbeta
    array([2., 2.])
    """
    return backward(dy, cache, "instance_norm", None, out)
