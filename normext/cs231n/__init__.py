"""Stanford CS231n's assignment on normalization, working and compiled, under the assignment's own module names.

A student's ``cs231n/layers.py`` can be the one line ``from normext.cs231n.layers import *``, and so for every other
module; the course's notebooks then run on it as they are. See https://cs231n.github.io.
"""
