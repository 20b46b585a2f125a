"""A package that calls normext's loops from C and from Cython: ``python setup.py build_ext --inplace``."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import normext

setup(
    name="example",
    ext_modules=cythonize(
        [
            Extension("in_c", ["in_c.c"], include_dirs=[normext.get_include()]),
            Extension("in_cython", ["in_cython.pyx"], include_dirs=[normext.get_include()]),
        ],
        language_level=3,
    ),
)
