"""Each kernel of src_c/kernels_list.h by itself, for each element type and instruction set that this machine runs.

What a kernel takes is read from the list; what it must give is computed here from the same numbers, in plain NumPy and
float64. Run as a program it prints how long each takes, in nanoseconds for each number of a block.
"""

import ctypes
import itertools
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from normext._core import runtime

LIST = Path(__file__).parents[1] / "src_c" / "kernels_list.h"
if not LIST.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

pointer, size, real = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double


def struct(name, fields, **nested):
    """A struct of kernels.h, of "type names"."""
    types = {"p": pointer, "z": size, "d": real, "i": ctypes.c_int, **nested}
    members = [(n, types[kind]) for kind, *names in map(str.split, fields.split(";")) for n in names]
    return type(name, (ctypes.Structure,), {"_fields_": members})


Rows = struct("nx_rows", "p data; z stride")
Groups = struct("nx_groups", "p data; z group row")
Block = struct("nx_block", "z rows n")
Columns = struct("nx_columns", "z examples rows n")
Affine = struct("nx_affine", "p mean scale shift; z step ahead")
ReluMask = struct("nx_relu_mask", "p scale shift")
Backward = struct("nx_backward", "block block; rows x dy dx addend; p gamma relu; z ahead", block=Block, rows=Rows)
ColBackward = struct("nx_col_backward", "block block; groups x dy dx; p relu; i ahead", block=Columns, groups=Groups)
Sums = struct("nx_sums", "p sum dot; z step")
Line = struct("nx_line", "p mean pivot factor slope constant; z step")
Layer = struct("nx_layer", "i centred; d eps; p gamma beta")
Grouping = struct("nx_grouping", "z groups rows n; p gamma beta; z channel channels")
Window = struct("nx_window", "z kh kw step")
Adam = struct("nx_adam", "p w dw m v next_w next_m next_v; d beta1 beta2 rate epsilon")
Head = struct(
    "head", "z itemsize parameter_size row_block col_rows col_block short_group; d tiny enlarge shrink near_zero"
)

BY_VALUE = {"int": ctypes.c_int, "double": real, "ptrdiff_t": size, "void": None}
BY_VALUE |= {s.__name__: s for s in (Rows, Groups, Block, Columns, Sums)}


def listed():
    """Name -> which macro it is listed with, and its type, in the order of the table."""
    text = re.sub(r"/\*.*?\*/", "", LIST.read_text(), flags=re.S)
    kernels = {}
    for macro, name, result, arguments in re.findall(r"NX_(\w+)\(\s*(\w+),\s*(\w+),\s*\((.*?)\)\)", text, re.S):
        types = [pointer if "*" in a else BY_VALUE[a.split()[-2]] for a in arguments.split(",")]
        kernels[name] = macro, ctypes.CFUNCTYPE(BY_VALUE[result], *types)
    return kernels


KERNELS = listed()


class Table:
    """The kernels of an instruction set and element type, and arrays as they take them."""

    def __init__(self, isa, dtype, stream, address):
        self.isa, self.dtype, self.stream = isa, dtype, stream
        self.head = Head.from_address(address)
        addresses = (pointer * len(KERNELS)).from_address(address + ctypes.sizeof(Head))
        self.kernels = {name: kind(a) for (name, (_, kind)), a in zip(KERNELS.items(), addresses, strict=True) if a}
        self.wide = np.dtype(np.float64 if dtype == "float64" else np.float32)  # that the kernels compute in
        self.stored = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        self.eps = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]

    def encode(self, a):
        """Numbers as elements, cut off where they do not fit."""
        a = np.asarray(a, self.wide)
        return (a.view(np.uint32) >> 16).astype(np.uint16) if self.dtype == "bfloat16" else a.astype(self.stored)

    def decode(self, a):
        """Elements as float64."""
        return ((a.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else a).astype(np.float64)


TABLES = [Table(*key, address) for key, address in runtime.kernel_tables().items()]


class Memory:
    """Rows of elements, some room apart and at an odd address; all around them are bytes 0xFF, a NaN in every type."""

    def __init__(self, table, numbers, room=3):
        self.table = table
        elements = table.encode(numbers)
        outer, n = int(np.prod(elements.shape[:-1])), elements.shape[-1]
        self.shape, self.stride, margin = elements.shape, n + room, 64 + table.stored.itemsize
        self.bytes = np.full(2 * margin + outer * self.stride * elements.itemsize, 0xFF, np.uint8)
        memory = self.bytes[margin : self.bytes.size - margin].view(table.stored)
        self.array = memory.reshape(outer, self.stride)[:, :n]
        self.array[...] = elements.reshape(outer, n)
        self.rows = Rows(memory.ctypes.data, self.stride)
        self.groups = Groups(memory.ctypes.data, self.stride * (outer // self.shape[0]), self.stride)

    def numbers(self):
        """What lies there now, in float64; asserts that all around it is as it was."""
        around, own = self.bytes.copy(), self.array.copy()
        self.array.view(np.uint8)[...] = 0xFF
        intact = (self.bytes == 0xFF).all()
        self.array[...], self.bytes[...] = own, around
        assert intact, "something else was written over"
        return self.table.decode(own).reshape(self.shape)


def near(table, actual, expected, stored=True, terms=1, scale=1):
    """Whether results are those of float64 but for rounding.

    That is of elements, if they are `stored`, and of sums of so many numbers, up to `scale`, in the type computed in.
    """
    eps, scale = np.finfo(table.wide).eps, np.abs(expected).max(initial=scale)
    np.testing.assert_allclose(
        actual, expected, rtol=2 * table.eps if stored else 0, atol=(8 + terms**0.5) * 4 * eps * scale
    )


def p(a):
    """The address of an array; NULL for none."""
    return None if a is None else a.ctypes.data


def ref(s):
    """A struct by its address."""
    return ctypes.addressof(s)


def doubles(*a):
    return np.array(a, np.float64)


NONE, NO_GROUPS = Rows(None, 0), Groups(None, 0, 0)
EPS = 1e-3


# What follows is named as the kernels are. Each yields arguments for a block of `rows` rows of n numbers, is sent the
# result, looks at what was written, and goes on to the next case.


def row_moments(t, rng, rows, n):
    x = Memory(t, rng.normal(3, 1, (rows, n)))
    seen = rng.normal(3, 1, 7)
    for centred, scale, before in itertools.product((True, False), (1, 0.5), (False, True)):
        values = np.concatenate([seen[: 7 * before], scale * x.numbers().ravel()])
        if before:
            mean = seen.mean() if centred else 0
            m = doubles(7, mean, ((seen - mean) ** 2).sum())
        else:
            m = np.zeros(3)
        yield x.rows, Block(rows, n), centred, scale, p(m)
        mean = values.mean() if centred else 0
        assert m[0] == values.size
        near(t, m[1], mean, stored=False, terms=n)
        near(t, m[2], ((values - mean) ** 2).sum(), stored=False, terms=rows * n)


# Of columns: how many examples, and how much room there is between rows.
EXAMPLES = ((1, 0), (1, 2), (5, 0), (5, 1))


def col_pivots(t, rng, rows, n):
    for e, room in EXAMPLES:
        block, pivot = Columns(e, rows, n), np.full((e, n), np.nan)
        values = rng.normal(3, 1, (e, rows, n))
        values[..., n // 2] = values[:, :1, n // 2]
        x = Memory(t, values, room)
        yield x.groups, block, p(pivot)
        np.testing.assert_array_equal(pivot[:, n // 2], x.numbers()[:, 0, n // 2])  # of a constant exactly
        np.testing.assert_array_equal(pivot, pivot.astype(t.wide))
        assert np.abs(np.delete(pivot, n // 2, 1) - 3).max(initial=0) < (5 if rows < 32 else 1)
        x = Memory(t, np.full((e, rows, n), np.inf), room)
        yield x.groups, block, p(pivot)
        assert (pivot == 0).all()


def col_powers(t, rng, rows, n):
    for (e, room), scaled in itertools.product(EXAMPLES, (False, True)):
        x = Memory(t, rng.normal(3, 1, (e, rows, n)), room)
        pivot = rng.integers(8, 16, (e, n)) / 4
        scale = 2.0 ** rng.integers(-2, 3, (e, n)) if scaled else np.ones((e, n))
        total, squares = np.ones((2, e, n))
        yield x.groups, Columns(e, rows, n), p(scale) if scaled else None, p(pivot), p(total), p(squares)
        d = scale[:, None] * x.numbers() - pivot[:, None]
        near(t, total, 1 + d.sum(1), stored=False, terms=rows)
        near(t, squares, 1 + (d**2).sum(1), stored=False, terms=rows)


def col_rescale(t, rng, rows, n):
    """Numbers and their sums are made up: what is asked is how far these are from the pivot and from the range."""
    count, j = 100.0, n // 2
    cases = {  # what one column has -> what it should then have
        "in order": (0.5, 1.0, None),
        "far from the mean": (2.0, 4.5, (1, 5.0)),
        "overflown": (0.0, np.inf, (t.head.shrink, 3.0)),
        "all overflown": (np.nan, np.nan, (t.head.shrink, 3.0)),
    }
    for offset, square, expected in cases.values():
        total, squares, pivot, scale = np.full(n, 50.0), np.full(n, 100.0), np.full(n, 3.0), np.full(n, np.nan)
        total[j], squares[j] = count * offset, count * square
        again = yield n, count, p(total), p(squares), p(pivot), p(scale)
        assert again == (expected is not None)
        if expected:
            others = np.arange(n) != j
            assert (scale[j], pivot[j]) == (expected[0], expected[1] * expected[0])
            assert (scale[others] == 1).all() and (pivot[others] == 3).all()
    total, squares, pivot, scale = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    again = yield n, count, p(total), p(squares), p(pivot), p(scale)
    assert again and (scale == t.head.enlarge).all() and (pivot == 0).all()


def col_statistics(t, rng, rows, n):
    count, pivot = 50.0, rng.integers(-8, 8, n) / 4.0
    d = rng.normal(0.1, 1, (50, n))
    total, squares = d.sum(0), (d**2).sum(0)
    for scaled, with_var in itertools.product((False, True), (False, True)):
        scale = 2.0 ** rng.integers(-2, 3, n) if scaled else np.ones(n)
        mean, rstd, var = (np.full(n, np.nan) for _ in range(3))
        yield (n, count, EPS, p(scale) if scaled else None, p(pivot), p(total), p(squares), p(mean), p(rstd),
               p(var) if with_var else None)  # fmt: skip
        x = (pivot + d) / scale
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(rstd, 1 / np.sqrt(x.var(0) + EPS), rtol=1e-12)
        if with_var:
            np.testing.assert_allclose(var, x.var(0), rtol=1e-12)


def affines(t, rng, rows, n):
    rstd = rng.uniform(0.5, 2, (3, n))
    for with_gamma, with_beta in itertools.product((False, True), (False, True)):
        (gamma, g), (beta, b) = parameters(t, rng, n, with_gamma), parameters(t, rng, n, with_beta)
        scale, shift = np.full((2, 3, n), np.nan)
        yield p(gamma), p(beta), 3, n, p(rstd), p(scale), p(shift)
        np.testing.assert_array_equal(scale, rstd if g is None else rstd * g)
        np.testing.assert_array_equal(shift, np.broadcast_to(0 if b is None else b, (3, n)))


def col_lines(t, rng, rows, n):
    rstd, factor, total, dot = rng.uniform(0.5, 2, (4, n))
    mean, slope, constant = np.full((3, n), np.nan)
    yield n, 0.25, p(rstd), p(factor), p(total), p(dot), p(mean), p(slope), p(constant)
    np.testing.assert_array_equal(mean, total / 4)
    np.testing.assert_allclose(slope, -factor * rstd**2 * dot / 4, rtol=1e-14)
    np.testing.assert_array_equal(constant, -factor * mean)


def parameters(t, rng, n, given):
    """gamma or beta, as the kernels take it, or NULL and what stands for it."""
    a = rng.normal(1, 0.5, n).astype(t.wide)
    return (a, a.astype(np.float64)) if given else (None, None)


def row_affine(t, rng, rows, n):
    x, y = Memory(t, rng.normal(3, 1, (rows, n))), Memory(t, np.zeros((rows, n)), room=2)
    far = 1e200 if t.wide == np.float64 else 1e20  # beyond T_LARGE, with its square
    for step, kind, end in itertools.product((0, 1), ("", "gamma", "beta", "gamma beta", "relu"), (False, True)):
        mean, scale, shift = rng.normal(3, 1, rows), rng.uniform(0.5, 2, rows), rng.normal(0, 1, rows)
        if end:
            scale[0] = 1 / far / far
        gamma, g = parameters(t, rng, n, "gamma" in kind)
        beta, b = parameters(t, rng, n, "beta" in kind)
        map_ = Affine(p(mean), p(scale), p(shift), step)
        yield x.rows, y.rows, Block(rows, n), ref(map_), p(gamma), p(beta), kind == "relu"
        r = np.arange(rows)[:, None] * step
        expected = (x.numbers() - mean[r]) * scale[r] + shift[r]
        expected = (expected if g is None else g * expected) + (0 if b is None else b)
        near(t, y.numbers(), np.maximum(expected, 0) if kind == "relu" else expected)


def col_affine(t, rng, rows, n):
    for (e, room), relu, end in itertools.product(EXAMPLES, (False, True), (False, True)):
        x, y = Memory(t, rng.normal(3, 1, (e, rows, n)), room), Memory(t, np.zeros((e, rows, n)), room)
        mean, scale, shift = rng.normal(3, 1, (e, n)), rng.uniform(0.5, 2, (e, n)), rng.normal(0, 1, (e, n))
        if end:
            scale[e // 2, n // 2] = 1e-300 if t.wide == np.float64 else 1e-35
        map_ = Affine(p(mean), p(scale), p(shift), 0)
        yield x.groups, y.groups, Columns(e, rows, n), ref(map_), relu
        expected = (x.numbers() - mean[:, None]) * scale[:, None] + shift[:, None]
        near(t, y.numbers(), np.maximum(expected, 0) if relu else expected)


def row_is_far(t, rng, rows, n):
    for offset, with_gamma in itertools.product((0, 100), (False, True)):
        dy = Memory(t, offset + rng.normal(0, 1, (1, n)))
        gamma = np.full(n, 0.5, t.wide) if with_gamma else None
        g = dy.numbers() * (0.5 if with_gamma else 1)
        far = yield dy.rows.data, n, p(gamma), g.mean() if n > 1 else g.sum()
        assert far == (offset > 0 and n > 1)


def cols_are_far(t, rng, rows, n):
    for e, offset in itertools.product((1, 3), (0, 100)):
        dy = rng.normal(0, 1, (e, rows, n))
        dy[-1, :, n // 2] += offset
        dy = Memory(t, dy)
        total, pivot = dy.numbers().sum(1), np.full((e, n), np.nan)
        far = yield dy.groups, Columns(e, rows, n), p(total), rows, p(pivot)
        if rows > 2 and offset:
            assert far
        if rows > 2:  # of few, a sample may be near their mean by chance
            np.testing.assert_allclose(pivot[-1, n // 2], total[-1, n // 2] / rows if offset else 0)


def gradient(dy, x, kind, gamma=None, mean=0, scale=1, shift=0):
    """g: gamma * dy, or dy where a relu let it through."""
    if kind == "gamma":
        return gamma * dy
    return np.where((x - mean) * scale + shift > 0, dy, 0) if kind == "relu" else dy


def row_dots(t, rng, rows, n):
    x, dy = Memory(t, rng.normal(3, 1, (rows, n))), Memory(t, rng.normal(0, 1, (rows, n)), room=2)
    mean, scale, shift, pivot = doubles(3.1), doubles(0.7), doubles(0.123456789), doubles(0.5)
    for kind, pivoted, step in itertools.product(("", "gamma", "relu"), (False, True), (0, 1)):
        gamma, g64 = parameters(t, rng, n, kind == "gamma")
        relu = ReluMask(p(scale), p(shift))
        total, dot = np.ones(rows), np.ones(rows)
        of = Backward(Block(rows, n), x.rows, dy.rows, NONE, NONE, p(gamma), ref(relu) if kind == "relu" else None)
        yield ref(of), mean[0], p(pivot) if pivoted else None, Sums(p(total), p(dot), step)
        g = gradient(dy.numbers(), x.numbers(), kind, g64, mean, scale, shift)
        dots = (g - pivot * pivoted) * (x.numbers() - mean)
        for actual, each in ((total, g.sum(1)), (dot, dots.sum(1))):
            expected = np.ones(rows) + (each if step else 0)
            expected[0] = 1 + (each[0] if step else each.sum())
            near(t, actual, expected, stored=False, terms=rows * n, scale=np.abs(dots).max())


def col_dots(t, rng, rows, n):
    for (e, room), kind, pivoted in itertools.product(EXAMPLES, ("", "relu"), (False, True)):
        x, dy = (Memory(t, rng.normal(m, 1, (e, rows, n)), room) for m in (3, 0))
        mean, pivot = rng.normal(3, 1, (e, n)), rng.integers(-3, 4, (e, n)) / 4
        scale, shift = rng.uniform(0.5, 2, (e, n)), rng.normal(0, 1, (e, n))
        relu = ReluMask(p(scale), p(shift))
        total, dot = np.ones((2, e, n))
        of = ColBackward(Columns(e, rows, n), x.groups, dy.groups, NO_GROUPS, ref(relu) if kind else None)
        yield ref(of), p(mean), p(pivot) if pivoted else None, Sums(p(total), p(dot), 1)
        m, a, b, offset = (v[:, None] for v in (mean, scale, shift, pivot))
        g = gradient(dy.numbers(), x.numbers(), kind, None, m, a, b)
        near(t, total, 1 + g.sum(1), stored=False, terms=rows)
        near(t, dot, 1 + ((g - offset * pivoted) * (x.numbers() - m)).sum(1), stored=False, terms=rows)


def row_dx(t, rng, rows, n):
    x, dy, addend = (Memory(t, rng.normal(m, 1, (rows, n)), room) for m, room in ((3, 3), (0, 2), (0, 1)))
    dx = Memory(t, np.zeros((rows, n)), room=4)
    mean, pivot, slope, constant = doubles(3.1), doubles(0.3), doubles(-0.2), doubles(0.4)
    scale, shift, factor = doubles(0.7), doubles(0.123456789), rng.uniform(0.5, 2, rows)
    for kind, step in itertools.product(("", "gamma", "relu", "addend", "gamma addend"), (0, 1)):
        gamma, g64 = parameters(t, rng, n, "gamma" in kind)
        relu = ReluMask(p(scale), p(shift))
        line = Line(p(mean), p(pivot), p(factor), p(slope), p(constant), step)
        more, mask = addend.rows if "addend" in kind else NONE, ref(relu) if kind == "relu" else None
        of = Backward(Block(rows, n), x.rows, dy.rows, dx.rows, more, p(gamma), mask)
        yield ref(of), ref(line)
        g = gradient(dy.numbers(), x.numbers(), kind.split(" ")[0], g64, mean, scale, shift)
        expected = factor[np.arange(rows) * step][:, None] * g + slope * (x.numbers() - mean) + constant
        near(t, dx.numbers(), expected + (addend.numbers() if "addend" in kind else 0))


def col_dx(t, rng, rows, n):
    for (e, room), kind in itertools.product(EXAMPLES, ("", "relu")):
        x, dy, dx = (Memory(t, rng.normal(m, s, (e, rows, n)), room) for m, s in ((3, 1), (0, 1), (0, 0)))
        mean, pivot, slope, constant = (rng.normal(m, 1, (e, n)) for m in (3, 0, 0, 0))
        scale, shift = rng.uniform(0.5, 2, (e, n)), rng.normal(0, 1, (e, n))
        relu = ReluMask(p(scale), p(shift))
        line = Line(p(mean), p(pivot), p(scale), p(slope), p(constant), 0)
        of = ColBackward(Columns(e, rows, n), x.groups, dy.groups, dx.groups, ref(relu) if kind else None)
        yield ref(of), ref(line)
        m, a, b, slope_, constant_ = (v[:, None] for v in (mean, scale, shift, slope, constant))
        g = gradient(dy.numbers(), x.numbers(), kind, None, m, a, b)
        near(t, dx.numbers(), a * g + slope_ * (x.numbers() - m) + constant_)


def statistics(x, centred, axis=-1):
    mean = x.mean(axis) if centred else np.zeros(x.shape[:-1])
    return mean, 1 / np.sqrt(((x - mean[..., None]) ** 2).mean(axis) + EPS)


def layer_forward(t, rng, rows, n):
    x, y = Memory(t, rng.normal(3, 1, (rows, n))), Memory(t, np.zeros((rows, n)), room=2)
    for centred, kind in itertools.product((True, False), ("", "gamma", "beta", "gamma beta")):
        gamma, g = parameters(t, rng, n, "gamma" in kind)
        beta, b = parameters(t, rng, n, "beta" in kind)
        norm, mean, rstd = Layer(centred, EPS, p(gamma), p(beta)), np.empty(rows), np.empty(rows)
        yield x.rows, y.rows, Block(rows, n), ref(norm), p(mean), p(rstd)
        expected_mean, expected_rstd = statistics(x.numbers(), centred)
        near(t, mean, expected_mean, stored=False, terms=n)
        near(t, rstd, expected_rstd, stored=False, terms=n)
        expected = (x.numbers() - expected_mean[:, None]) * expected_rstd[:, None]
        expected = (expected if g is None else g * expected) + (0 if b is None else b)
        near(t, y.numbers(), expected, terms=n)
    if t.dtype == "float16":
        return
    values = x.numbers()
    values[rows // 2] *= 1e200 if t.dtype == "float64" else 1e25  # whose squares are out of range
    x = Memory(t, values)
    for centred in (True, False):
        norm, mean, rstd = Layer(centred, EPS, None, None), np.full(rows, np.nan), np.full(rows, np.nan)
        yield x.rows, y.rows, Block(rows, n), ref(norm), p(mean), p(rstd)
        unit = np.abs(x.numbers()).max(1)
        scaled = x.numbers() / unit[:, None]
        expected, _ = statistics(scaled, centred)
        variance = ((scaled - expected[:, None]) ** 2).mean(1)
        near(t, mean / unit, expected, stored=False, terms=n)
        np.testing.assert_allclose(rstd, 1 / np.hypot(np.sqrt(variance) * unit, np.sqrt(EPS)), rtol=1e-4)


def backward(x, g, mean, rstd, centred=True):
    """dx of rows with statistics of their own, but for what gamma has done to g."""
    xhat = (x - mean[..., None]) * rstd[..., None]
    g_mean = g.mean(-1, keepdims=True) if centred else 0
    return rstd[..., None] * (g - g_mean - xhat * (g * xhat).mean(-1, keepdims=True))


def parameter_gradients(t, x, dy, mean, rstd, centred, dbeta, dgamma):
    """Whether the sums over rows were added to ones; about zero there is no dbeta."""
    products = dy.numbers() * (x.numbers() - mean[:, None]) * rstd[:, None]
    near(t, dgamma, 1 + products.sum(0), stored=False, terms=len(products), scale=np.abs(products).max())
    if centred:
        each = dy.numbers()
        near(t, dbeta, 1 + each.sum(0), stored=False, terms=len(each), scale=np.abs(each).max())


def layer_backward(t, rng, rows, n):
    x, addend = Memory(t, rng.normal(3, 1, (rows, n))), Memory(t, rng.normal(0, 1, (rows, n)), room=1)
    dx, one_run = Memory(t, np.zeros((rows, n)), room=4), Memory(t, np.zeros((rows, n)), room=0)
    for centred, kind, far in itertools.product((True, False), ("", "gamma", "addend", "gamma addend"), (0, 100)):
        dy = Memory(t, rng.normal(far * (np.arange(rows) % 2)[:, None], 1, (rows, n)), room=2)
        gamma, g = parameters(t, rng, n, "gamma" in kind)
        mean, rstd = statistics(x.numbers(), centred)
        more = addend.rows if "addend" in kind else NONE
        expected = backward(x.numbers(), dy.numbers() * (1 if g is None else g), mean, rstd, centred)
        expected = expected + (addend.numbers() if "addend" in kind else 0)
        for into in (dx, one_run):
            of = Backward(Block(rows, n), x.rows, dy.rows, into.rows, more, p(gamma), None)
            dbeta, dgamma = np.ones(n), np.ones(n)
            yield ref(of), centred, p(mean), p(rstd), p(dbeta), p(dgamma)
            parameter_gradients(t, x, dy, mean, rstd, centred, dbeta, dgamma)
            near(t, into.numbers(), expected, terms=n, scale=rstd.max() * np.abs(dy.numbers()).max())


def layer_dots(t, rng, rows, n):
    x, dy = Memory(t, rng.normal(3, 1, (rows, n))), Memory(t, rng.normal(0, 1, (rows, n)), room=2)
    for centred, with_gamma in itertools.product((True, False), (False, True)):
        gamma, g = parameters(t, rng, n, with_gamma)
        mean, rstd = statistics(x.numbers(), centred)
        dbeta, dgamma, sums, dots = np.ones(n), np.ones(n), np.ones(rows), np.ones(rows)
        of = Backward(Block(rows, n), x.rows, dy.rows, NONE, NONE, p(gamma), None, ahead=n)
        yield ref(of), centred, p(mean), p(rstd), Sums(p(sums), p(dots), 1), p(dbeta), p(dgamma)
        parameter_gradients(t, x, dy, mean, rstd, centred, dbeta, dgamma)
        g = dy.numbers() * (1 if g is None else g)
        xhat = (x.numbers() - mean[:, None]) * rstd[:, None]
        near(t, dots, 1 + (g * xhat).sum(1), stored=False, terms=n, scale=np.abs(g * xhat).max())
        if centred:
            near(t, sums, 1 + g.sum(1), stored=False, terms=n, scale=np.abs(g).max())


def group_forward(t, rng, rows, n):
    rows = min(rows, 7)
    groups, channels, first, room = 40, 2 * rows, rows, 3 if rows * n <= t.head.short_group else 0
    x = Memory(t, rng.normal(3, 1, (groups, rows, n)), room)
    y = Memory(t, np.zeros((groups, rows, n)), room)
    mean, rstd = np.empty(groups), np.empty(groups)
    channel = (first + np.arange(groups * rows)) % channels
    for kind, relu in itertools.product(("", "gamma", "beta", "gamma beta"), (False, True)):
        gamma, g = parameters(t, rng, channels, "gamma" in kind)
        beta, b = parameters(t, rng, channels, "beta" in kind)
        grouping = Grouping(groups, rows, n, p(gamma), p(beta), first, channels)
        yield x.groups, y.groups, ref(grouping), EPS, relu, p(mean), p(rstd)
        expected_mean, expected_rstd = statistics(x.numbers().reshape(groups, -1), True)
        near(t, mean, expected_mean, stored=False, terms=rows * n)
        near(t, rstd, expected_rstd, stored=False, terms=rows * n)
        expected = (x.numbers() - expected_mean[:, None, None]) * expected_rstd[:, None, None]
        for by, parameter in ((np.multiply, g), (np.add, b)):
            if parameter is not None:
                expected = by(expected, parameter[channel].reshape(groups, rows, 1))
        near(t, y.numbers(), np.maximum(expected, 0) if relu else expected, terms=rows * n)


def group_backward(t, rng, rows, n):
    groups, channels, first = 4, 2 * rows, rows
    x = Memory(t, rng.normal(3, 1, (groups, rows, n)))
    dx = Memory(t, np.zeros((groups, rows, n)), room=4)
    for with_gamma, far in itertools.product((False, True), (False, True)):
        dy = rng.normal(0, 1, (groups, rows, n))
        dy[2] += 100 * far
        dy = Memory(t, dy, room=2)
        gamma, g64 = parameters(t, rng, channels, with_gamma)
        mean, rstd = (s.reshape(groups) for s in statistics(x.numbers().reshape(groups, -1), True))
        dbeta, dgamma = np.full((groups, rows), np.nan), np.full((groups, rows), np.nan)
        grouping = Grouping(groups, rows, n, p(gamma), None, first, channels)
        done = yield x.groups, dy.groups, dx.groups, ref(grouping), p(mean), p(rstd), p(dbeta), p(dgamma)
        assert done == (2 if far and n > 1 else groups) or n < 8, "of few numbers, any may be near their mean"
        xhat = (x.numbers() - mean[:, None, None]) * rstd[:, None, None]
        near(t, dbeta[:done], dy.numbers().sum(-1)[:done], stored=False, terms=n)
        near(t, dgamma[:done], (dy.numbers() * xhat).sum(-1)[:done], stored=False, terms=n)
        channel = (first + np.arange(groups * rows)) % channels
        g = dy.numbers() * (g64[channel].reshape(groups, rows, 1) if with_gamma else 1)
        expected = backward(*(a.reshape(groups, -1) for a in (x.numbers(), g)), mean, rstd)
        scale = rstd.max() * np.abs(dy.numbers()).max()
        near(t, dx.numbers()[:done], expected.reshape(dx.shape)[:done], terms=n, scale=scale)


def add_rows(t, rng, rows, n):
    a, b, into = (Memory(t, rng.normal(0, 1, (rows, n)), room) for room in (3, 2, 1))
    expected = a.numbers() + b.numbers()
    for total in (into, b):
        yield a.rows, b.rows, total.rows, Block(rows, n)
        near(t, total.numbers(), expected)


def widen(t, rng, rows, n):
    x, y = Memory(t, rng.normal(0, 1, (1, n))), np.full(n + 1, np.nan)
    yield x.rows.data, n, p(y)
    np.testing.assert_array_equal(y[:n], x.numbers()[0])
    assert np.isnan(y[n])


def narrow(t, rng, rows, n):
    x, y = rng.normal(0, 1, n) * 10.0 ** rng.integers(-9, 6, n), Memory(t, np.zeros((1, n)))
    with np.errstate(over="ignore", under="ignore"):
        # Ties of float16, and next to them: what rounds twice, by way of float32, errs there.
        ties = np.float16(x[::3]).astype(np.float64) * (1 + 2.0**-11)
        x[::3] = np.where(ties < 6e4, ties * (1 + rng.integers(-1, 2, ties.size) * 2.0**-40), 1)
    yield p(x), n, y.rows.data
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(np.float32 if t.dtype == "bfloat16" else t.stored)
    half_an_ulp = 2**-8 if t.dtype == "bfloat16" else 0
    np.testing.assert_allclose(y.numbers()[0], expected.astype(np.float64), rtol=half_an_ulp)


def transpose(t, rng, rows, n):
    x, y = Memory(t, rng.normal(0, 1, (rows, n))), Memory(t, np.zeros((n, rows)), room=2)
    yield x.rows, Block(rows, n), y.rows
    np.testing.assert_array_equal(y.numbers(), x.numbers().T)


def inverse_stds(t, rng, rows, n):
    variance = rng.uniform(0, 2, n)
    variance[n // 2] = 0
    for eps in (EPS, 0.0):
        rstd = variance.copy()
        yield p(rstd), n, eps
        expected = np.divide(1, np.sqrt(variance + eps), out=np.zeros(n), where=variance + eps > 0)
        np.testing.assert_array_equal(rstd, expected)


def any_outside(t, rng, rows, n):
    a = rng.uniform(1, 2, n)
    for value, expected in ((1.5, 0), (0, 0), (0.5, 1), (3, 1), (np.inf, 1)):
        a[n // 2] = value
        outside = yield p(a), n, 0.75, 2.5
        assert outside == expected


def multiply(t, rng, rows, n):
    a, b = rng.normal(0, 1, (2, n))
    product = a.copy()
    yield p(product), p(b), n
    np.testing.assert_array_equal(product, a * b)


def update_running(t, rng, rows, n):
    batch = rng.normal(0, 1, n)
    for dtype in (np.float32, np.float64):
        running = rng.normal(0, 1, n).astype(dtype)
        expected = (0.9 * running.astype(np.float64) + 0.2 * batch).astype(dtype)
        yield p(running), dtype == np.float32, n, 0.9, 0.2, p(batch)
        np.testing.assert_array_equal(running, expected)


def pool_row(t, rng, rows, n):
    for step, (kh, kw), winner_type in itertools.product((1, 2, 3), ((1, 1), (2, 2), (3, 2)), (np.uint8, np.int32)):
        x = Memory(t, rng.integers(0, 5, (kh, (n - 1) * step + kw)))
        x.array[0, n // 2] = np.nan
        y, winner = Memory(t, np.zeros((1, n))), np.zeros(n, winner_type)
        window = Window(kh, kw, step)
        yield x.rows, ref(window), n, y.rows.data, p(winner), winner.itemsize
        windows = np.lib.stride_tricks.sliding_window_view(x.numbers(), (kh, kw))[0, ::step].reshape(n, -1)
        np.testing.assert_array_equal(winner, windows.argmax(1))  # of equals the first, and the first NaN
        np.testing.assert_array_equal(y.numbers()[0], windows.max(1))


def adam(t, rng, rows, n):
    w, dw, m, v = (Memory(t, rng.uniform(0.1, 1, (1, n))) for _ in range(4))
    results = [Memory(t, np.zeros((1, n))) for _ in range(3)]
    step = Adam(*(a.rows.data for a in (w, dw, m, v, *results)), 0.9, 0.99, 0.01, 1e-8)
    yield ref(step), n
    next_m, next_v = 0.9 * m.numbers() + 0.1 * dw.numbers(), 0.99 * v.numbers() + 0.01 * dw.numbers() ** 2
    expected = w.numbers() - 0.01 * next_m / (np.sqrt(next_v) + 1e-8), next_m, next_v
    for actual, result in zip(results, expected, strict=True):
        near(t, actual.numbers(), result)


def test_every_kernel_is_tested_and_in_every_table():
    assert all(callable(globals().get(name)) for name in KERNELS)
    for t in TABLES:
        wide = t.dtype in ("float32", "float64")
        assert set(t.kernels) == {name for name, (macro, _) in KERNELS.items() if wide or macro != "WIDE"}
        assert t.head.itemsize == t.stored.itemsize
        assert t.head.parameter_size == t.wide.itemsize


def blocks(t):
    """Rows and numbers in them: around the lengths of vectors, of sums on the first level, of columns at once."""
    vector = 64 // t.wide.itemsize
    yield from itertools.product((1, 9), (1, 2, vector - 1, vector, 2 * vector + 3))
    yield from ((2, 5), (40, 3), (133, 6), (259, 4), (33, 63))
    yield from ((1, 16 * vector + 1), (3, 64 * vector + 1), (1, t.head.row_block))


@pytest.mark.parametrize(
    ("t", "name"),
    [
        pytest.param(t, name, id=f"{name}-{t.isa}-{t.dtype}" + "-stream" * t.stream)
        for t in TABLES
        for name in t.kernels
        if KERNELS[name][0] == "WRITER" or not t.stream
    ],
)
def test_kernel(t, name):
    for rows, n in blocks(t):
        calls = globals()[name](t, np.random.default_rng((rows, n)), rows, n)
        arguments = next(calls)
        while arguments is not None:
            arguments = step(calls, t.kernels[name](*arguments))


def step(calls, result):
    try:
        return calls.send(result)
    except StopIteration:
        return None


def main(rows=8, n=500):
    """Print the nanoseconds for each number, the least of many calls, on the first case of each kernel."""
    only = sys.argv[1:] or [runtime.config()["in use"]]
    tables = [t for t in TABLES if t.isa in only]
    print(f"{rows} x {n}".ljust(18), *(f"{t.dtype}{'-s' * t.stream}".rjust(11) for t in tables))
    for name in KERNELS:
        print(name.ljust(18), *(nanoseconds(t, name, rows, n).rjust(11) for t in tables))


def nanoseconds(t, name, rows, n):
    if name not in t.kernels:
        return ""
    calls = globals()[name](t, np.random.default_rng(0), rows, n)
    arguments, kernel, least = next(calls), t.kernels[name], float("inf")
    numbers = (
        n if name in ("widen", "narrow", "adam", "pool_row") else rows * n * (4 if name == "group_backward" else 1)
    )
    for _ in range(200):
        begin = time.perf_counter_ns()
        for _ in range(10):
            kernel(*arguments)
        least = min(least, (time.perf_counter_ns() - begin) / 10)
    return f"{least / numbers:.3f}"


if __name__ == "__main__":
    main()
