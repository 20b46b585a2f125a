"""Settings for all tests and the processes that they start."""

import os
from importlib.util import find_spec
from pathlib import Path

# The matrices here are small: threads of NumPy's BLAS cost more than they save, above all where they share their cores
# with other work. Set before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same normext there as here, which need not be installed.
_root = Path(find_spec("normext").origin).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_root), os.environ.get("PYTHONPATH")]))

import numpy as np  # noqa: E402 - see above
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same cases in every run, so that a change of the code is what makes a test fail; and many others, on demand.
_always = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("short", max_examples=100, derandomize=True, **_always)
settings.register_profile("thorough", max_examples=3000, **_always)
settings.load_profile("short")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def points():
    """Twenty random points of ten classes."""
    from normext.studies.data import Data

    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((30, 4)), rng.integers(0, 10, 30)
    return Data("points", "points", {"X_train": X[:20], "y_train": y[:20], "X_val": X[20:], "y_val": y[20:]})
