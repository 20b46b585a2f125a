"""NumPy's warnings of what overflows, turned off: the compiled loops give none, whatever the array."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def quietly(function: Callable[..., T], *arguments: Any) -> T:
    """Call it without such warnings.

    Around the whole of a call's work, for a Ctrl-C is noticed here, before and after it; and in Python, for NumPy may
    return nothing and no error where it has no memory, at which a ``with`` that Cython has compiled ends the process.
    """
    with np.errstate(all="ignore"):
        return function(*arguments)
