"""The compiled loops: which blocks, on which thread, and how their sums are put together."""

import os
from importlib.util import find_spec
from pathlib import Path

if find_spec("normext._core.runtime") is None:
    folder = Path(__file__).parents[1]
    raise ImportError(
        f"{folder} has not been compiled for this Python: run python -m pip install -e . in {folder.parent}"
    )

# GCC's OpenMP reads its settings when it is loaded, which is here. Left alone, a thread that has nothing to do burns
# its core for some milliseconds in case more comes, while NumPy's BLAS, whose turn it is in a network, wants that core.
# A tenth of a millisecond still lets calls that follow at once find the threads awake.
_SPIN = {"GOMP_SPINCOUNT": "1000"}
if os.environ.keys().isdisjoint({"OMP_WAIT_POLICY", *_SPIN}):
    os.environ.update(_SPIN)
    try:  # any module that runs loops on threads loads it
        from normext._core import columns as columns
    finally:
        for name in _SPIN:
            del os.environ[name]
