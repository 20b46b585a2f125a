"""First-order update rules: ``rule(w, dw, config=None) -> (next_w, config)``.

w is a parameter, dw its gradient, in the same shape. config holds the settings and the state of the rule: it is filled
with the defaults, brought up to date and returned, and goes into the next call. No array is changed in place: next_w
and the state are new arrays, in the dtype of w.
"""

from typing import Any

import numpy as np

from normext._core import updates
from normext.cs231n._keys import check_keys

__all__ = ["adam", "rmsprop", "sgd", "sgd_momentum"]

Config = dict[str, Any]

# One set for all rules, so that a net may go on under another rule.
KEYS = ("learning_rate", "momentum", "velocity", "decay_rate", "epsilon", "cache", "beta1", "beta2", "m", "v", "t")


def sgd(w: np.ndarray, dw: Any, config: Config | None = None) -> tuple[np.ndarray, Config]:
    """Stochastic gradient descent, ``w - learning_rate * dw``.

    Parameters
    ----------
    w, dw : ndarray
    config : dict, optional
        ``learning_rate`` (default 1e-2).

    Returns
    -------
    next_w : ndarray
    config : dict

    Raises
    ------
    ValueError
        If dw does not have the shape of w, or config has a key that no rule has.
    TypeError
        If w is not an array of floats.

    Examples
    --------
    >>> import numpy as np
    >>> sgd(np.array([1.0]), np.array([2.0]), {"learning_rate": 0.25})[0]
    array([0.5])
    """
    w, dw, config = _prepare(w, dw, config, learning_rate=1e-2)
    step = np.multiply(dw, config["learning_rate"], out=np.empty_like(w))
    return np.subtract(w, step, out=step), config


def sgd_momentum(w: np.ndarray, dw: Any, config: Config | None = None) -> tuple[np.ndarray, Config]:
    """Gradient descent with momentum [1]_: ``v = momentum * v - learning_rate * dw``, and ``w + v``.

    Parameters
    ----------
    w, dw : ndarray
    config : dict, optional
        ``learning_rate`` (default 1e-2), ``momentum`` (0.9), ``velocity`` (zeros).

    Returns
    -------
    next_w : ndarray
    config : dict

    Raises
    ------
    ValueError
        If dw does not have the shape of w, or config has a key that no rule has, a setting that is not a number, or a
        state of another shape. Config is then left as it was.
    TypeError
        If w is not an array of floats.

    References
    ----------
    .. [1] B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    Examples
    --------
    >>> import numpy as np
    >>> w, config = sgd_momentum(np.array([1.0]), np.array([2.0]), {"learning_rate": 0.25, "velocity": np.array([1.0])})
    >>> w, config["velocity"]
    (array([1.4]), array([0.4]))
    """
    w, dw, config = _prepare(w, dw, config, ("velocity",), learning_rate=1e-2, momentum=0.9)
    step = np.multiply(dw, config["learning_rate"], out=np.empty_like(w))
    velocity = config["velocity"] * config["momentum"]
    velocity -= step
    config["velocity"] = velocity
    return np.add(w, velocity, out=step), config


def rmsprop(w: np.ndarray, dw: Any, config: Config | None = None) -> tuple[np.ndarray, Config]:
    """RMSProp [1]_: the step of every element is divided by a running root mean square of its gradient.

    ``cache = decay_rate * cache + (1 - decay_rate) * dw**2``, and ``w - learning_rate * dw / (sqrt(cache) + epsilon)``.

    Parameters
    ----------
    w, dw : ndarray
    config : dict, optional
        ``learning_rate`` (default 1e-2), ``decay_rate`` (0.99), ``epsilon`` (1e-8), ``cache`` (zeros).

    Returns
    -------
    next_w : ndarray
    config : dict

    Raises
    ------
    ValueError
        If dw does not have the shape of w, or config has a key that no rule has, a setting that is not a number, or a
        state of another shape. Config is then left as it was.
    TypeError
        If w is not an array of floats.

    References
    ----------
    .. [1] T. Tieleman and G. Hinton, "Lecture 6.5 - rmsprop", Coursera: Neural Networks for Machine Learning, 2012.

    Examples
    --------
    >>> import numpy as np
    >>> w, config = rmsprop(np.array([1.0]), np.array([2.0]), {"decay_rate": 0.75})
    >>> w, config["cache"]
    (array([0.98]), array([1.]))
    """
    w, dw, config = _prepare(w, dw, config, ("cache",), learning_rate=1e-2, decay_rate=0.99, epsilon=1e-8)
    step = np.multiply(dw, dw, out=np.empty_like(w))
    step *= 1 - config["decay_rate"]
    cache = config["cache"] * config["decay_rate"]
    cache += step
    config["cache"] = cache
    np.sqrt(cache, out=step)
    step += config["epsilon"]
    np.divide(dw, step, out=step)
    step *= config["learning_rate"]
    return np.subtract(w, step, out=step), config


def adam(w: np.ndarray, dw: Any, config: Config | None = None) -> tuple[np.ndarray, Config]:
    """Adam [1]_: momentum and a running mean square of the gradient, both corrected for their start at zero.

    ``t = t + 1``, ``m = beta1 * m + (1 - beta1) * dw``, ``v = beta2 * v + (1 - beta2) * dw**2``, and
    ``w - learning_rate * mhat / (sqrt(vhat) + epsilon)`` with ``mhat = m / (1 - beta1**t)``,
    ``vhat = v / (1 - beta2**t)``.

    Parameters
    ----------
    w, dw : ndarray
    config : dict, optional
        ``learning_rate`` (default 1e-3), ``beta1`` (0.9), ``beta2`` (0.999), ``epsilon`` (1e-8), ``m`` and ``v``
        (zeros), ``t`` (0), the number of steps taken.

    Returns
    -------
    next_w : ndarray
    config : dict

    Raises
    ------
    ValueError
        If dw does not have the shape of w, or config has a key that no rule has, a setting that is not a number, or a
        state of another shape. Config is then left as it was.
    TypeError
        If w is not an array of floats.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015,
           https://arxiv.org/abs/1412.6980

    Examples
    --------
    >>> import numpy as np
    >>> w, config = adam(np.array([1.0]), np.array([2.0]), {"learning_rate": 0.25})
    >>> w.round(6), config["t"]
    (array([0.75]), 1)
    """
    w, dw, config = _prepare(w, dw, config, ("m", "v"), learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, t=0)
    beta1, beta2, t = config["beta1"], config["beta2"], config["t"] + 1
    # Both corrections are one number each, so they go into the rate and epsilon and cost no pass over the array.
    correction = (1 - beta2**t) ** 0.5
    rate, epsilon = config["learning_rate"] * correction / (1 - beta1**t), config["epsilon"] * correction
    dtype = w.dtype if w.dtype in (np.float32, np.float64) else np.dtype(np.float64)
    now = [np.ascontiguousarray(a, dtype.newbyteorder("=")) for a in (w, dw, config["m"], config["v"])]
    following = updates.adam(*now, beta1, beta2, rate, epsilon)
    next_w, m, v = (a.astype(w.dtype, copy=False).reshape(w.shape) for a in following)
    config.update(m=m, v=v, t=t)
    return next_w, config


def _prepare(w, dw, config, state=(), **settings):
    """w and dw as arrays, and config with all that was missing in it: settings, and zeros for the state.

    Config is changed once all is checked, and not at all where something is wrong.
    """
    w = np.asarray(w)
    if w.dtype.kind != "f":
        raise TypeError(f"w must be an array of floats, got dtype {w.dtype}")
    dw = np.asarray(dw, w.dtype)
    if dw.shape != w.shape:
        raise ValueError(f"dw must have the shape of w, {w.shape}, got {dw.shape}")
    config = {} if config is None else config
    check_keys(config, "config", KEYS)
    complete = {name: _setting(config, name, default) for name, default in settings.items()}
    complete |= {name: _state(config, name, w) for name in state}
    config.update(complete)
    return w, dw, config


def _setting(config, name, default):
    # As Python's own number: a NumPy float64 would turn arrays of float32 into float64.
    try:
        value = type(default)(config.get(name, default))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"config[{name!r}] must be a number, got {config[name]!r:.100}") from None
    if name == "t" and (value != config.get(name, value) or value < 0):
        raise ValueError(f"config['t'] must be a whole number from 0 up, got {config[name]!r:.100}")
    if name in ("beta1", "beta2") and not 0 <= value < 1:
        raise ValueError(f"config[{name!r}] must be from 0 up, and below 1, got {value}")
    return value


def _state(config, name, w):
    if name not in config:
        return np.zeros_like(w)
    value = np.asarray(config[name])
    # One number stands for an array full of it, as it does in the formulas. Any other shape that NumPy would stretch is
    # the state of another parameter.
    if value.dtype.kind not in "iuf" or value.shape not in ((), w.shape):
        raise ValueError(
            f"config[{name!r}] must be an array of the shape of w, {w.shape}, or one number, got {value.dtype} of "
            f"shape {value.shape}: every parameter has a config of its own"
        )
    return value.astype(w.dtype, copy=False) if value.shape == w.shape else np.full_like(w, value)
