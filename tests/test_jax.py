"""normext.jax against the plain formulas differentiated by JAX in float64."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normext
from normext._version import how_to_install

# What is compiled here runs once: less time for its compilation. Set before JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

jax = pytest.importorskip("jax", reason="normext.jax needs jax")
import jax.numpy as jnp  # noqa: E402 - see above
from jax.test_util import check_grads  # noqa: E402

import normext.jax  # noqa: E402
from normext._core.arrays import KINDS, Norm  # noqa: E402

RTOL = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
EPS = 1e-3


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def plain(name, x, *parameters, groups=1, axis=1):
    """The formula as one writes it, of arrays with the channels along that axis; for rows, the first axis of a row."""
    axis %= x.ndim
    wide = jnp.moveaxis(x, axis, 1) if name in ("group", "instance") else x
    shape = wide.shape
    if name in ("layer", "rms"):
        over, view = tuple(range(axis, x.ndim)), x.shape[axis:]
    elif name == "batch":
        over, view = tuple(i for i in range(x.ndim) if i != axis), (-1, *[1] * (x.ndim - axis - 1))
    else:
        groups = shape[1] if name == "instance" else groups
        wide = wide.reshape(shape[0], groups, -1)
        over, view = (2,), (-1, *[1] * (x.ndim - 2))
    mean = 0 if name == "rms" else wide.mean(over, keepdims=True)
    y = (wide - mean) / jnp.sqrt(((wide - mean) ** 2).mean(over, keepdims=True) + EPS)
    y = y.reshape(shape)
    for p, combine in zip(parameters, (jnp.multiply, jnp.add)):
        y = combine(y, p.reshape(view))
    return jnp.moveaxis(y, 1, axis) if name in ("group", "instance") else y


def ours(name, x, *parameters, groups=None, **options):
    function = getattr(normext.jax, name + "_norm")
    return function(x, *([] if groups is None else [groups]), *parameters, eps=EPS, **options)


CASES = [
    ("batch", (7, 5), {"axis": 1}),
    ("batch", (4, 3, 5, 2), {"axis": 1}),
    ("batch", (4, 3, 2, 5), {"axis": -1}),
    ("batch", (5, 6), {"axis": 0}),
    ("layer", (6,), {"axis": -1}),
    ("layer", (4, 9), {"axis": -1}),
    ("layer", (2, 3, 4, 5), {"axis": 2}),
    ("layer", (3, 4), {"axis": 0}),
    ("rms", (3, 4, 8), {"axis": -1}),
    ("group", (3, 6, 4, 2), {"groups": 3, "axis": 1}),
    ("group", (3, 4, 2, 6), {"groups": 2, "axis": -1}),
    ("group", (4, 6), {"groups": 2, "axis": 1}),
    ("instance", (2, 3, 4, 5), {"axis": 1}),
    ("instance", (2, 5, 3), {"axis": -1}),
]
NAMES = [f"{name}-{'x'.join(map(str, shape))}-{options['axis']}" for name, shape, options in CASES]


def arrays(name, shape, options, seed=0):
    """x, gamma and, but for RMS norm, beta; and what the results are weighted with, for gradients worth a look."""
    rng = np.random.default_rng(seed)
    axis = options["axis"]
    parameter = shape[axis:] if name in ("layer", "rms") else (shape[axis],)
    parameters = rng.normal(size=(1 if name == "rms" else 2, *parameter))
    return [rng.normal(1, 2, shape), *parameters], rng.normal(size=shape)


def weighted(function, name, weights, options):
    return lambda *args: (function(name, *args, **options) * weights).sum()


def both(function, name, weights, options):
    """y and the gradients, in one list, compiled: one compilation in place of one for each operation of a formula."""

    def results(*args):
        y, pull = jax.vjp(lambda *args: function(name, *args, **options), *args)
        return [y, *pull(weights.astype(y.dtype))]

    return jax.jit(results)


def assert_all_close(actual, wanted, rtol):
    for a, w in zip(actual, wanted, strict=True):
        a, w = np.asarray(a, np.float64), np.asarray(w)
        np.testing.assert_allclose(a, w, rtol=rtol, atol=rtol * max(1, abs(w).max()))


@pytest.mark.parametrize(("name", "shape", "options"), CASES, ids=NAMES)
def test_values_and_gradients_are_those_of_the_plain_formula(name, shape, options, x64):
    args, weights = arrays(name, shape, options)
    theirs = both(plain, name, weights, options)(*args)
    assert_all_close(both(ours, name, weights, options)(*args), theirs, RTOL["float64"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_other_dtypes(name, dtype, x64):
    shape, options = (
        (4, 6, 5),
        {"axis": -1 if name in ("layer", "rms") else 1} | ({"groups": 2} if name == "group" else {}),
    )
    args, weights = arrays(name, shape, options)
    *args, weights = (jnp.asarray(a, dtype) for a in (*args, weights))
    results = both(ours, name, weights, options)(*args)
    assert [r.dtype for r in results] == [dtype] * (1 + len(args))
    *exact, weights = (jnp.asarray(a, np.float64) for a in (*args, weights))
    assert_all_close(results, both(plain, name, weights, options)(*exact), RTOL[dtype])


@pytest.mark.parametrize(("name", "shape", "options"), CASES[::3], ids=NAMES[::3])
def test_numerical_gradients(name, shape, options, x64):
    args, _ = arrays(name, shape, options)
    check_grads(lambda *args: ours(name, *args, **options), args, order=1, modes=["rev"])


@pytest.mark.parametrize(("name", "shape", "options"), CASES[1::4] + CASES[8:9], ids=NAMES[1::4] + NAMES[8:9])
def test_vmap(name, shape, options, x64):
    """A batch of x, of parameters, of both, and batches of batches: the same as one after the other."""
    drawn = [arrays(name, shape, options, seed)[0] for seed in range(3)]
    results = both(ours, name, arrays(name, shape, options)[1], options)
    x, *parameters = (jnp.stack(a) for a in zip(*drawn))
    rest = len(parameters)
    single = {(i, j): results(x[i], *(p[j] for p in parameters)) for i in range(3) for j in range(3)}
    of_x = jax.jit(jax.vmap(results, (0, *[None] * rest)))(x, *(p[1] for p in parameters))
    of_parameters = jax.jit(jax.vmap(results, (None, *[0] * rest)))(x[1], *parameters)
    of_both = jax.jit(jax.vmap(results))(x, *parameters)
    nested = jax.jit(jax.vmap(jax.vmap(results, (0, *[None] * rest)), (None, *[0] * rest)))(x, *parameters)
    for i in range(3):
        assert_all_close([r[i] for r in of_x], single[i, 1], 1e-13)
        assert_all_close([r[i] for r in of_parameters], single[1, i], 1e-13)
        assert_all_close([r[i] for r in of_both], single[i, i], 1e-13)
        assert_all_close([r[2, i] for r in nested], single[i, 2], 1e-13)


@pytest.mark.parametrize(("name", "axis", "options"), [("batch", 0, {}), ("layer", 1, {}), ("group", 1, {"groups": 1})])
def test_data_far_from_zero_lose_nothing(name, axis, options):
    """In float32, without float64 in JAX: y, and the gradient, for which the statistics are kept in float64."""
    assert not jax.config.jax_enable_x64
    rng = np.random.default_rng(0)
    x = (1e4 + rng.normal(size=(64, 256))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    exact = x.astype(np.float64)
    xhat = (exact - exact.mean(axis, keepdims=True)) / np.sqrt(exact.var(axis, keepdims=True) + EPS)
    options = {"axis": 1, **options}
    y, pull = jax.vjp(lambda x: ours(name, x, **options), x)
    np.testing.assert_allclose(y, xhat, rtol=0, atol=2e-6)
    dx = dy - dy.mean(axis, keepdims=True) - xhat * (dy * xhat).mean(axis, keepdims=True)
    dx /= np.sqrt(exact.var(axis, keepdims=True) + EPS)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dx, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("batch", "float32"), ("layer", "bfloat16"), ("rms", "float32"), ("group", "float32")]
)
def test_gradients_of_deviations_beyond_float32(name, dtype, x64):
    options = {"axis": 1} | ({"groups": 2} if name == "group" else {})
    args, weights = arrays(name, (5, 6), options)
    args[0] *= 1e25
    *args, weights = (jnp.asarray(a, dtype) for a in (*args, weights))
    y, dx, *others = both(ours, name, weights, options)(*args)
    *exact, weights = (jnp.asarray(a, np.float64) for a in (*args, weights))
    exact_y, exact_dx, *exact_others = both(plain, name, weights, options)(*exact)
    assert_all_close([y, *others], [exact_y, *exact_others], RTOL[dtype])
    assert_all_close([np.asarray(dx, np.float64) * 1e25], [exact_dx * 1e25], RTOL[dtype])


def test_bits_are_those_of_normext():
    x = np.random.default_rng(0).normal(3, 2, (64, 100)).astype(np.float32)
    gamma, beta = np.linspace(0.5, 2, 200, dtype=np.float32).reshape(2, 100)
    for name in ("batch_norm", "layer_norm"):
        y, cache = getattr(normext, name)(x, gamma, beta)
        jax_y, pull = jax.vjp(getattr(normext.jax, name), x, gamma, beta)
        np.testing.assert_array_equal(jax_y, y)
        for a, b in zip(pull(jnp.asarray(y)), getattr(normext, name + "_backward")(y, cache)):
            np.testing.assert_array_equal(a, b)


def test_running_statistics():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (8, 4, 5)).astype(np.float32)
    start = np.zeros(4, np.float32), np.ones(4, np.float32)
    step = jax.jit(lambda x, m, v: normext.jax.batch_norm(x, running_mean=m, running_var=v, momentum=0.75))
    y, mean, var = step(x, *start)
    np.testing.assert_array_equal(y, normext.jax.batch_norm(x))
    np.testing.assert_allclose(mean, 0.25 * x.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, 0.75 + 0.25 * x.var((0, 2)), rtol=1e-6)
    np.testing.assert_array_equal(start[0], 0)
    y, *same = normext.jax.batch_norm(x, running_mean=mean, running_var=var, training=False)
    np.testing.assert_array_equal(same, [mean, var])
    wanted, _ = normext.batch_norm(x, running_mean=np.array(mean), running_var=np.array(var), training=False)
    np.testing.assert_array_equal(y, wanted)


def test_evaluation_has_the_gradient_of_an_affine_map(x64):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 6, 3, 4))
    gamma, beta, mean = rng.normal(size=(3, 3))
    var = rng.uniform(0.5, 2, 3)

    def loss(x, gamma, beta, mean, var):
        y, _, _ = normext.jax.batch_norm(x, gamma, beta, running_mean=mean, running_var=var, training=False, eps=EPS)
        return (y * weights).sum()

    def formula(x, gamma, beta):
        m, r, g, b = (p.reshape(-1, 1) for p in (mean, 1 / np.sqrt(var + EPS), gamma, beta))
        return (((x - m) * r * g + b) * weights).sum()

    gradients = jax.grad(loss, (0, 1, 2, 3, 4))(x, gamma, beta, mean, var)
    assert_all_close(gradients[:3], jax.grad(formula, (0, 1, 2))(x, gamma, beta), 1e-12)
    for constant in gradients[3:]:
        np.testing.assert_array_equal(constant, 0)


def test_a_network_under_grad_of_vmap_and_scan():
    """As nets are written: a norm of one example within vmap, within scan, within grad, within jit."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 12)), np.float32)
    gamma = jnp.linspace(0.5, 1.5, 36).reshape(3, 12)

    def loss(norm, gamma):
        def layer(h, g):
            return jax.vmap(lambda row: norm(row, g))(h) + jnp.tanh(h), None

        return (jax.lax.scan(layer, x, gamma)[0] ** 3).mean()

    mine = jax.jit(jax.grad(lambda g: loss(lambda r, g: normext.jax.layer_norm(r, g, eps=EPS), g)))(gamma)
    theirs = jax.grad(lambda g: loss(lambda r, g: plain("layer", r, g, axis=0), g))(gamma)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_in_nothing_out():
    for y in (
        normext.jax.layer_norm(jnp.zeros((0, 4)), jnp.ones(4)),
        normext.jax.group_norm(jnp.zeros((0, 4, 2)), 2),
        normext.jax.batch_norm(jnp.zeros((0, 4)), running_mean=jnp.zeros(4), running_var=jnp.ones(4), training=False)[
            0
        ],
    ):
        assert y.size == 0
    gradient = jax.grad(lambda gamma: normext.jax.layer_norm(jnp.zeros((0, 4)), gamma).sum())(jnp.ones(4))
    np.testing.assert_array_equal(gradient, 0)


def test_a_constant_row_gives_beta_and_no_parameters_are_ones_and_zeros():
    beta = jnp.arange(5.0)
    np.testing.assert_array_equal(normext.jax.layer_norm(jnp.full((3, 5), 7.1), None, beta), [beta] * 3)
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(normext.jax.layer_norm(x), normext.jax.layer_norm(x, jnp.ones(5), jnp.zeros(5)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x: n.layer_norm(x.astype(int)), TypeError, "x must be an array of float32, .* got dtype int32"),
        (lambda n, x: n.layer_norm(x, jnp.ones(3)), ValueError, r"gamma must have shape \(4,\), got \(3,\)"),
        (
            lambda n, x: n.layer_norm(x, None, 1j * x[0]),
            TypeError,
            "beta must be an array of numbers, got dtype complex",
        ),
        (lambda n, x: n.layer_norm(x, axis=2), ValueError, "axis 2 is out of bounds for array of dimension 2"),
        (lambda n, x: n.layer_norm(x, axis=0.5), TypeError, "axis must be an integer, got 0.5"),
        (lambda n, x: n.layer_norm(x[:, :0]), ValueError, r"x has rows without numbers: shape \(6, 0\)"),
        (lambda n, x: n.rms_norm(x, eps=-1), ValueError, "eps must be from 0 to 1e.300, got -1"),
        (lambda n, x: n.batch_norm(x, momentum=2), ValueError, "momentum must be from 0 to 1, got 2"),
        (lambda n, x: n.batch_norm(x, training=None), TypeError, "training must be True or False, .* got NoneType"),
        (lambda n, x: n.batch_norm(x[:, :0]), ValueError, "x has no channels"),
        (lambda n, x: n.batch_norm(x[:0]), ValueError, "x has no rows to take a mean of in training"),
        (lambda n, x: n.batch_norm(x, training=False), ValueError, "running_mean is needed with training=False"),
        (lambda n, x: n.batch_norm(x, running_mean=x[0]), ValueError, "running_var is needed too"),
        (
            lambda n, x: n.batch_norm(x, running_mean=x[0], running_var=x[0].astype(int)),
            TypeError,
            "running_var must be an array of floats, got dtype int32",
        ),
        (
            lambda n, x: n.batch_norm(x, running_mean=x[0], running_var=x[0, :2]),
            ValueError,
            r"running_var must have shape \(4,\), got \(2,\)",
        ),
        (lambda n, x: n.group_norm(x, 3), ValueError, "num_groups must divide the 4 channels, got 3"),
        (lambda n, x: n.group_norm(x, 2.0), TypeError, "num_groups must be an integer, got 2.0"),
        (lambda n, x: n.group_norm(x, 2, axis=0), ValueError, "axis must not be 0"),
        (lambda n, x: n.group_norm(x[:, :0], 1), ValueError, "x has groups without numbers"),
        (
            lambda n, x: jax.jit(lambda e: n.layer_norm(x, eps=e))(1e-5),
            TypeError,
            "eps must be a number that is known when JAX traces",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(normext.jax, jnp.ones((6, 4)))


def test_the_handlers_refuse_what_does_not_fit():
    """Sizes are checked against the arrays that XLA hands over, before anything is read or written."""
    norm = Norm("group_norm", (6, 4), np.float32, axis=1, groups=1, eps=0.0)
    attributes = {name: np.int64(getattr(norm, name)) for name in ("axis", "groups", "training")}
    attributes |= {"kind": np.int64(KINDS[norm.kind]), "ndim": np.int64(2)}
    attributes |= {"eps": np.float64(norm.eps), "momentum": np.float64(0)}
    x, p, u, none = (jax.ShapeDtypeStruct(*s) for s in (((6, 4), "f4"), ((4,), "f4"), ((6, 2), "u4"), ((0,), "f4")))

    def call(args, results, **changes):
        zeros = [jnp.zeros(a.shape, a.dtype) for a in args]
        return jax.ffi.ffi_call("normext_forward", results)(*zeros, **(attributes | changes))[0].block_until_ready()

    good = [x, p, p, none, none], [x, u, u, none, none]
    call(*good)
    short, long = jax.ShapeDtypeStruct((3,), "f4"), jax.ShapeDtypeStruct((7, 4), "f4")
    for i, j, wrong in [(0, 1, short), (0, 1, u), (1, 1, p), (1, 0, long), (0, 3, p)]:
        bad = [list(good[0]), list(good[1])]
        bad[i][j] = wrong
        with pytest.raises(Exception, match="arrays do not fit together"):
            call(*bad)
    for changes in ({"kind": np.int64(7)}, {"groups": np.int64(3)}, {"eps": np.float32(1)}, {"more": np.int64(0)}):
        with pytest.raises(Exception, match="not a call of its forward passes"):
            call(*good, **changes)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_structs_lie_as_in_the_header_of_jaxlib():
    """Each member that _core/xla.pyx declares has its place and size there, and each constant its value."""
    source = (Path(__file__).parents[1] / "normext/_core/xla.pyx").read_text()
    constants = re.findall(r"^    (XLA_FFI_\w+) = (\d+)$", source, re.M)
    structs = re.findall(r"^cdef struct (XLA_FFI_\w+):\n((?:    .+\n)+)", source, re.M)
    assert constants
    assert structs

    def same(ours, theirs):
        return f'_Static_assert({ours} == {theirs}, "{ours}");'

    program = ['#include "xla/ffi/api/c_api.h"', *(f"typedef struct Our_{name} Our_{name};" for name, _ in structs)]
    program += [same(name, value) for name, value in constants if name != "XLA_FFI_API_MINOR"]
    for name, body in structs:
        lines = [line.replace(" noexcept nogil", "") for line in body.splitlines()]
        members = [re.search(r"(\w+)(\)\(.+)?$", line)[1] for line in lines]
        fields = "; ".join(re.sub(r"\b(XLA_FFI_\w+)(?!\w|\)\()", r"Our_\1", line) for line in lines)
        program.append(f"struct Our_{name} {{ {fields}; }};")
        for member in members:
            program.append(same(f"offsetof(Our_{name}, {member})", f"offsetof({name}, {member})"))
            program.append(same(f"sizeof(((Our_{name} *)0)->{member})", f"sizeof((({name} *)0)->{member})"))
    compile = ["cc", "-std=c11", "-fsyntax-only", "-I", jax.ffi.include_dir(), "-x", "c", "-"]
    done = subprocess.run(compile, input="\n".join(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_may_end_while_xla_computes():
    program = """
import jax, jax.numpy as jnp, normext.jax
@jax.jit
def f(x):
    for _ in range(20):
        x = normext.jax.layer_norm(x) + jnp.sin(x)
    return x
x = f(jnp.ones((1024, 1024))).block_until_ready()
for _ in range(3):
    x = f(x)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map")
def test_shard_map_over_several_devices():
    """Rows on four devices, parameters on all: values and gradients of the whole, with JAX's check of what varies.

    And the other way round: x on all devices, of each of which the parameters are its own.
    """
    program = """
import jax, jax.numpy as jnp, numpy as np, normext.jax
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
x, weights = np.random.default_rng(0).normal(1, 2, (2, 8, 6, 5)).astype(np.float32)
norms = [
    (lambda x, g, b: normext.jax.layer_norm(x, g, b, axis=1), (6, 5)),
    (lambda x, g, b: normext.jax.rms_norm(x, g) + b, (5,)),
    (lambda x, g, b: normext.jax.group_norm(x, 3, g, b), (6,)),
    (lambda x, g, b: normext.jax.batch_norm(
        x, g, b, running_mean=jnp.ones(6), running_var=jnp.ones(6), training=False)[0], (6,)),
]
for norm, shape in norms:
    g, b = jnp.linspace(0.5, 2, 2 * int(np.prod(shape)), dtype=np.float32).reshape(2, *shape)
    rows = jax.shard_map(norm, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d"))
    wanted, pull = jax.vjp(norm, x, g, b)
    found, pull_rows = jax.vjp(jax.jit(rows), x, g, b)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    for a, w in zip(pull_rows(jnp.asarray(weights)), pull(jnp.asarray(weights)), strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-4)
    of_each = jnp.stack([g * i for i in range(1, 5)])
    each = jax.shard_map(
        lambda x, g, b: norm(x, g[0], b)[None], mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P("d"))
    loss = lambda f: lambda x, g: (f(x, g) ** 2).sum()
    wanted = jax.grad(loss(lambda x, g: jax.vmap(norm, (None, 0, None))(x, g, b)), (0, 1))(x, of_each)
    found = jax.grad(loss(lambda x, g: each(x, g, b)), (0, 1))(x, of_each)
    for a, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-4, atol=1e-3)
train = lambda x, g: normext.jax.batch_norm(x, g, running_mean=jnp.zeros(6), running_var=jnp.ones(6))
sharded = jax.shard_map(train, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
y, means, _ = sharded(x, jnp.ones(6))
np.testing.assert_allclose(means.reshape(4, 6), 0.1 * x.reshape(4, 2, 6, 5).mean((1, 3)), rtol=1e-5)
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_without_jax_the_import_says_what_is_needed():
    program = "import sys; sys.modules['jax'] = None; import normext.jax"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"ImportError: normext.jax needs jax: {how_to_install('jax')}" in result.stderr
