"""Settings for all tests and the processes that they start."""

import os

# The matrices here are small: threads of NumPy's BLAS cost more than they save, above all where they share their cores
# with other work. Set before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
