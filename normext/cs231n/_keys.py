"""The dicts of settings that the assignment's functions take: what may be in them, and what must."""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["NORM_KEYS", "check_keys"]

# One set for all norms, for the course gives layer norm a mode too, and a net may give all norms the same dict.
NORM_KEYS = ("mode", "eps", "momentum", "running_mean", "running_var", "num_groups")


def check_keys(
    given: Mapping[str, Any], name: str, known: Collection[str] = NORM_KEYS, required: Collection[str] = ()
) -> None:
    """Refuse a key that is not known, for it is a typo and would do nothing, and ask for one that is missing.

    Parameters
    ----------
    given : mapping
        The settings.
    name : str
        What they are called.
    known, required : collection of str
        The keys that may be in it, and those of them that must.

    Raises
    ------
    ValueError
        If one is not known, or missing.

    Examples
    --------
    >>> check_keys({"stride": 1, "padding": 1}, "conv_param", ("stride", "pad"))
    Traceback (most recent call last):
    ValueError: conv_param has no 'padding': its keys are 'stride', 'pad'
    """
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has no {key!r}: its keys are {', '.join(map(repr, known))}")
    for key in required:
        if key not in given:
            raise ValueError(f"{name} must have {key!r}")
