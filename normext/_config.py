"""What the library runs on, told and set from Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from normext._blas import describe_blas
from normext._core.memory import memory_cache
from normext._core.runtime import config, get_num_threads, set_num_threads
from normext._version import __version__

__all__ = ["get_include", "show_config", "threads"]


def get_include() -> str:
    """The folder of the C header ``normext.h``, for compilers' include paths.

    The header tells how C code calls the compiled loops; for Cython there is ``from normext cimport normext_api,
    normext_import`` beside it. Nothing needs to be linked.

    Returns
    -------
    str

    Examples
    --------
    >>> import os
    >>> import normext
    >>> os.listdir(normext.get_include())
    ['normext.h']
    """
    return str(Path(__file__).parent / "include")


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let calls use n threads for the length of a ``with`` block.

    Parameters
    ----------
    n : int
        At least 1. The number is the process's, not this Python thread's.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is less than 1.

    Examples
    --------
    >>> import normext
    >>> with normext.threads(2):
    ...     normext.get_num_threads()
    2
    """
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def show_config() -> None:
    """Print version, compiler, instruction sets built and chosen, threads, memory kept, and BLAS with its own threads.

    Examples
    --------
    >>> import normext
    >>> normext.show_config()  # doctest: +ELLIPSIS
    normext ...
    """
    limit, kept = memory_cache()
    memory = f"{kept / 2**20:g} of at most {limit / 2**20:g} MiB kept for results"
    rows = {"normext": __version__, "NumPy": np.__version__, **config(), "memory": memory, "BLAS": describe_blas()}
    for name, value in rows.items():
        text = ", ".join(value) if isinstance(value, list) else value if value is not None else "no (one thread)"
        print(f"{name:<24}{text}")
