"""NumPy's BLAS and its threads, seen and limited through threadpoolctl where that is installed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["blas_for_products", "describe_blas"]

# The threads of BLAS wait for each other within a product. Where other programs want the cores too, a wait lasts until
# the system gives the last thread its core back: milliseconds, in a product that takes a tenth of one. With so many
# multiplications or more (25 ms of one core and up) that loses less than threads win where there is nobody else.
WORTH_THREADS = 1 << 30

_limited = threading.Lock()


@contextmanager
def blas_for_products(multiplications: int) -> Iterator[None]:
    """BLAS on one thread for the length of a block, unless its products are large enough for more.

    After the block BLAS has the threads that it had before. The number is the process's: of blocks that run at the same
    time, in several threads of Python, the first sets it and takes it back. Without threadpoolctl nothing is changed.

    Parameters
    ----------
    multiplications : int
        Of the largest product: ``m * k * n`` where (m, k) is multiplied by (k, n).

    Examples
    --------
    >>> import numpy as np
    >>> with blas_for_products(50 * 3072 * 100):
    ...     (np.ones((50, 3072)) @ np.ones((3072, 100))).shape
    (50, 100)
    """
    libraries = _libraries() if multiplications < WORTH_THREADS else None
    if libraries is None or not _limited.acquire(blocking=False):
        yield
        return
    try:
        with libraries.limit(limits=1):
            yield
    finally:
        _limited.release()


def describe_blas() -> str:
    """The BLAS of this process and its threads, in words."""
    libraries = _libraries()
    if libraries is None:
        built: Any = np.show_config(mode="dicts")
        blas = built["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}, threads unknown (threadpoolctl is not installed)"
    told = [f"{each['internal_api']} {each['version']}, threads {each['num_threads']}" for each in libraries.info()]
    return "; ".join(told) or "not known to threadpoolctl"


def _libraries() -> Any:
    """Those of BLAS that are loaded, as threadpoolctl has them; None without it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")
