"""NumPy's BLAS and its threads, seen and limited by threadpoolctl where that is installed."""

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from threadpoolctl import ThreadpoolController
except ImportError:
    ThreadpoolController = None

__all__ = ["blas_for_products", "describe_blas"]

# Threads of BLAS wait for each other several times in a product. Where other programs want the cores too, each wait
# can last until the system gives a thread its core back: milliseconds, for a product of some microseconds. Products of
# fewer multiplications than this, some 30 ms of one core, have more to lose by that than to win.
FEWEST_MULTIPLICATIONS = 1 << 30


@contextmanager
def blas_for_products(multiplications: int) -> Iterator[None]:
    """Keep BLAS to one thread for the length of a block, unless its products have very many multiplications.

    It has the threads that it had before when the block ends. Without threadpoolctl nothing is changed.

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
    if ThreadpoolController is None or multiplications >= FEWEST_MULTIPLICATIONS:
        yield
        return
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


def describe_blas() -> str:
    """BLAS and its number of threads, for people."""
    if ThreadpoolController is None:
        return "threads not known (threadpoolctl is not installed)"
    libraries = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(
        f"{library['internal_api']} {library['version']}, threads {library['num_threads']}" for library in libraries
    )
