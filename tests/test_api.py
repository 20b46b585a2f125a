"""The table of functions for C and Cython: an example package built on it gives what the Python functions give."""

import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from norm_cases import DTYPES, Case, Placed, forward_and_backward
from odd_inputs import EPS, LAYOUTS, check_all
from same_bits import Draw

import normext
from normext._core.arrays import batch_backward_apply, batch_backward_sums, batch_moments

pytest.importorskip("Cython")
pytest.importorskip("setuptools")

EXAMPLE = Path(__file__).parent / "example"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Its modules, by name."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    modules = {}
    for name in ("in_c", "in_cython"):
        spec = importlib.util.spec_from_file_location(name, folder / (name + sysconfig.get_config_var("EXT_SUFFIX")))
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


def arrays(shape, channels, dtype):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    gamma, beta = rng.uniform(0.5, 1.5, (2, channels)).astype(dtype)
    return x, dy, gamma, beta


def same(found, wanted):
    """Bit by bit; gradients of parameters come as float64 and are rounded by the Python functions."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        np.testing.assert_array_equal(a.astype(b.dtype), b)


WIDE = pytest.mark.parametrize("dtype", ["float32", "float64"])


@WIDE
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 200), (3, 100_000)])
def test_rows(example, shape, dtype):
    call = example["in_cython"]
    x, dy, gamma, beta = arrays(shape, shape[1], dtype)
    y, cache = normext.layer_norm(x, gamma, beta)
    found, mean, rstd = call.normalize_rows(x, gamma, beta, True, 1e-5)
    same([found, mean, rstd], [y, cache.mean, cache.rstd])
    same(call.rows_backward(dy, x, gamma, True, mean, rstd), normext.layer_norm_backward(dy, cache))
    y, cache = normext.rms_norm(x, gamma)
    found, mean, rstd = call.normalize_rows(x, gamma, beta, False, 1e-6)
    same([found, rstd], [y, cache.rstd])
    same(call.rows_backward(dy, x, gamma, False, mean, rstd)[:2], normext.rms_norm_backward(dy, cache))


@WIDE
@pytest.mark.parametrize("shape", [(2, 1, 1), (64, 100, 1), (3000, 40, 1), (5, 6, 49), (4, 3, 40_000)])
def test_channels(example, shape, dtype):
    call = example["in_cython"]
    x, dy, gamma, beta = arrays(shape, shape[1], dtype)
    running_mean, running_var = np.zeros(shape[1]), np.zeros(shape[1])
    y, cache = normext.batch_norm(x, gamma, beta, running_mean=running_mean, running_var=running_var, momentum=0)
    mean, rstd = np.empty((2, shape[1]))
    same(call.normalize_channels(x, gamma, beta, True, 1e-5, mean, rstd), [y, running_var])
    same([mean, rstd], [cache.mean, cache.rstd])
    same(call.channels_backward(dy, x, gamma, True, mean, rstd), normext.batch_norm_backward(dy, cache))
    y, cache = normext.batch_norm(x, gamma, beta, running_mean=running_mean, running_var=running_var, training=False)
    same(call.normalize_channels(x, gamma, beta, False, 1e-5, cache.mean, cache.rstd)[:1], [y])
    same(call.channels_backward(dy, x, gamma, False, cache.mean, cache.rstd), normext.batch_norm_backward(dy, cache))


@WIDE
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6, 49), (2, 6, 10_000)])
def test_groups(example, shape, groups, dtype):
    call = example["in_cython"]
    x, dy, gamma, beta = arrays(shape, shape[1], dtype)
    y, cache = normext.group_norm(x, groups, gamma, beta)
    found, mean, rstd = call.normalize_groups(x, groups, gamma, beta, 1e-5)
    same([found, mean, rstd], [y, cache.mean.ravel(), cache.rstd.ravel()])
    same(call.groups_backward(dy, x, groups, gamma, mean, rstd), normext.group_norm_backward(dy, cache))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_odd_inputs(example, norm):
    """The example's memoryviews take contiguous arrays of two dtypes that can be written to, and say so of others."""
    call = example["in_cython"]

    def caller(norm, x, gamma, beta, dy):
        gamma, beta, dy = (np.ascontiguousarray(a, x.dtype) for a in (gamma, beta, dy))
        if norm == "batch_norm":
            mean, rstd = np.empty((2, x.shape[1]))
            y, _ = call.normalize_channels(x, gamma, beta, True, EPS, mean, rstd)
            return y, *call.channels_backward(dy, x, gamma, True, mean, rstd)
        if norm == "group_norm":
            y, mean, rstd = call.normalize_groups(x, 2, gamma, beta, EPS)
            return y, *call.groups_backward(dy, x, 2, gamma, mean, rstd)
        centred, rows, shape = norm == "layer_norm", x.reshape(-1, x.shape[-1]), x.shape
        if not np.shares_memory(rows, x):
            raise ValueError("not contiguous")
        y, mean, rstd = call.normalize_rows(rows, gamma, beta, centred, EPS)
        dx, dgamma, dbeta = call.rows_backward(dy.reshape(rows.shape), rows, gamma, centred, mean, rstd)
        return y.reshape(shape), dx.reshape(shape), dgamma, dbeta if centred else None

    def refused(name, odd):
        x = odd.value
        plain = (
            x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative and x.dtype.name in ("float32", "float64")
        )
        return not plain or (x.ndim != 3 and norm in ("group_norm", "batch_norm"))

    def skipped(name, odd):
        """Arrays are its callers' to make; it looks at the first number of each."""
        x = odd.value
        return odd.argument != "x" or type(x) is not np.ndarray or x.size == 0 or x.ndim == 0 or x.dtype.names

    check_all(caller, norm, skip=skipped, refuse=refused)


def test_from_c_on_many_threads_without_the_gil(example):
    x = np.random.default_rng(0).normal(size=(16, 100, 3000)).astype(np.float32)
    wanted, _ = normext.layer_norm(x)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(example["in_c"].layer_norm_in_place, x))
    np.testing.assert_array_equal(x, wanted)


def test_wrong_arguments(example):
    bad, fine = -1, 0
    assert example["in_cython"].statuses() == [bad] * 5 + [fine]
    with pytest.raises(TypeError, match="matrix of float32"):
        example["in_c"].layer_norm_in_place(np.ones(3))


# Any norm of any arrays: `check`, `forward` and `backward` ------------------------------------------------------------

SHAPE = (5, 12, 30, 20)  # more numbers than are copied at once
CASES = {
    "batch norm": Case("batch_norm", SHAPE, 1, "", running=True),
    "batch norm, channels last": Case("batch_norm", SHAPE, 3, "", running=True, relu=True),
    "batch norm, unbiased": Case("batch_norm", SHAPE, 1, "", running=True, unbiased=True),
    "batch norm in evaluation": Case("batch_norm", SHAPE, 1, "", training=False),
    "batch norm in evaluation, relu": Case("batch_norm", SHAPE, 0, "", training=False, relu=True),
    "batch norm and relu": Case("batch_norm", SHAPE, 1, "", relu=True),
    "layer norm": Case("layer_norm", SHAPE, 2, ""),
    "layer norm of a sum": Case("layer_norm", SHAPE, 3, "", residual=True),
    "layer norm of all": Case("layer_norm", SHAPE, 0, "", gamma=False, beta=False),
    "RMS norm": Case("rms_norm", SHAPE, 3, ""),
    "RMS norm of a sum": Case("rms_norm", SHAPE, 1, "", residual=True),
    "group norm": Case("group_norm", SHAPE, 1, "", groups=3),
    "group norm, channels last": Case("group_norm", SHAPE, 3, "", groups=5, beta=False),
    "group norm of pixels": Case("group_norm", (40, 12, 1, 1), 1, "", groups=2),
    "instance norm": Case("instance_norm", SHAPE, 1, ""),
}
PLACES = LAYOUTS | {
    "plain": lambda a: a,
    "transposed": lambda a: a.T.copy().T,
    "channels last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1),
    "broadcast": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
}
NORMS = pytest.mark.parametrize("name", CASES)
BATCH_NORMS = pytest.mark.parametrize("name", [name for name in CASES if name.startswith("batch norm")])
TYPES = pytest.mark.parametrize("dtype", DTYPES)
OK, BAD_ARGUMENT = 0, -1
RUNNING = ("running_mean", "running_var")
LAID = {"x", "residual", "dy", "dsum", "out", "dx_out"}  # in the shape of x


def numbers(case, place, running=np.float64):
    """The arrays of a case, those in the shape of x where they are to lie."""
    arrays = case.draw()
    arrays["residual"] = (arrays["residual"] * case.scale).astype(arrays["x"].dtype)
    arrays |= {name: place(arrays[name]) for name in ("x", "residual", "dy", "dsum")}
    return arrays | {name: arrays[name].astype(running) for name in RUNNING}


def room(case, place):
    """For a result."""
    array = place(np.zeros(case.shape, DTYPES[case.dtype]))
    return array if array.flags.writeable and 0 not in array.strides else np.zeros(case.shape, DTYPES[case.dtype])


def described(call, case):
    plan = case.plan
    options = {"groups": plan.groups, "training": plan.training, "relu": plan.activation == "relu", "eps": plan.eps}
    return call.Norm(plan.kind, plan.dtype.name, plan.shape, plan.axis, **options)


def results_of(call, case, arrays, out, dx_out):
    """What `forward_and_backward` gives, but of the table's functions."""
    norm, given, x = described(call, case), case.arguments(arrays), arrays["x"]
    mean, rstd = np.empty((2, case.plan.statistics))
    forward = {name: given.get(name) for name in ("gamma", "beta", "residual", *RUNNING)}
    total = np.empty_like(x, x.dtype.newbyteorder("=")) if case.fused else None
    running = {"momentum": 0.9, "unbiased": given.get("unbiased", False)}
    forward |= {"x": x, "y": out, "sum": total, "mean": mean, "rstd": rstd}
    assert norm.forward(call.Arrays(**forward, **running)) == OK
    dgamma, dbeta = np.full((2, *case.parameter_shape), np.nan)
    backward = {"x": total if case.fused else x, "dy": arrays["dy"], "dx": dx_out, "mean": mean, "rstd": rstd}
    backward |= {"gamma": given.get("gamma"), "beta": given.get("beta"), "dgamma": dgamma, "dbeta": dbeta}
    backward |= {"dsum": arrays["dsum"]} if case.fused else {}
    assert norm.backward(call.Arrays(**backward)) == OK
    return {"y": out, "sum": total, "dx": dx_out, "mean": mean, "rstd": rstd, "dgamma": dgamma, "dbeta": dbeta}


def same_bits(found, wanted):
    for name, b in wanted.items():
        b = np.ascontiguousarray(b, b.dtype.newbyteorder("="))
        assert found[name].reshape(b.shape).astype(b.dtype, order="C").tobytes() == b.tobytes(), name


def compare(call, case, place, running=np.float64):
    """The functions of the table with those of Python, which are returned."""
    arrays, others = numbers(case, place, running), numbers(case, place, running)
    with np.errstate(all="ignore"):
        wanted = forward_and_backward(case, arrays, out=room(case, place), dx_out=room(case, place))
        found = results_of(call, case, others, room(case, place), room(case, place))
    same_bits(found | others, wanted | {name: arrays[name] for name in RUNNING})
    return wanted


@NORMS
@pytest.mark.parametrize(
    ("place", "dtype"),
    [(place, "float32") for place in PLACES]
    + [(place, dtype) for place in ("plain", "spread", "unaligned") for dtype in DTYPES if dtype != "float32"]
    + [("byte-swapped", "float16"), ("byte-swapped", "float64")],
)
def test_any_norm_of_any_array(example, name, dtype, place):
    case = CASES[name]
    compare(example["in_cython"], case._replace(dtype=dtype, eps=0.25 if case.training else 1e-5), PLACES[place])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers are drawn up to the ends of the range
def test_random_calls(example):
    """Those of tests/same_bits.py: arrays of one call lie each in its own way."""
    seen = 0
    for trial in (Draw(1, number).trial() for number in range(200)):
        case, places = trial.case, trial.layouts
        if not 0 < math.prod(case.shape) < 100_000:
            continue
        found, wanted = {}, {}
        for results, call in ((found, partial(results_of, example["in_cython"])), (wanted, forward_and_backward)):
            arrays = case.draw() | {"out": np.zeros_like(case.draw()["x"]), "dx_out": np.zeros_like(case.draw()["x"])}
            arrays |= {name: Placed(arrays[name], places[name]).array for name in LAID.intersection(places)}
            results |= call(case, arrays, out=arrays["out"], dx_out=arrays["dx_out"])
            results |= {name: arrays[name] for name in RUNNING}
        same_bits(found, wanted)
        seen += 1
    assert seen > 100


@BATCH_NORMS
@pytest.mark.parametrize("running", ["float32", "float64"])
@pytest.mark.parametrize("place", ["plain", "spread"])
def test_running_statistics_of_both_types(example, name, running, place):
    case = CASES[name]._replace(dtype="float32", offset=3, scale=2)
    compare(example["in_cython"], case, PLACES[place], running)


@NORMS
@pytest.mark.parametrize("place", ["plain", "spread"])
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-13), ("bfloat16", 1e13), ("float64", 1e-120)])
def test_beyond_what_is_computed_in(example, name, dtype, scale, place):
    """The backward pass takes a way of its own, in float64 and by powers of two."""
    if dtype not in DTYPES:
        pytest.skip("needs ml_dtypes")
    case = CASES[name]._replace(dtype=dtype, scale=scale, eps=0)
    rstd = compare(example["in_cython"], case, PLACES[place])["rstd"]
    largest = 1e100 if dtype == "float64" else 1e10
    assert rstd.max() > largest or rstd.min() < 1 / largest


@NORMS
@pytest.mark.parametrize("place", ["plain", "spread"])
def test_in_place(example, name, place):
    """y may be x, with a residual the sum, and dx may be dy."""
    case = CASES[name]._replace(dtype="float32")
    wanted = forward_and_backward(case, numbers(case, PLACES[place]))
    arrays = numbers(case, PLACES[place])
    found = results_of(example["in_cython"], case, arrays, room(case, PLACES[place]), arrays["dy"])
    same_bits(found, wanted)
    norm, statistics = described(example["in_cython"], case), np.empty((2, case.plan.statistics))
    given = case.arguments(numbers(case, PLACES[place]))
    call = {name: given.get(name) for name in ("gamma", "beta", "residual", *RUNNING)}
    call |= {"x": arrays["x"], "y": arrays["x"], "mean": statistics[0], "rstd": statistics[1]}
    call["sum"] = found["sum"]
    if case.fused:
        call["y"] = room(case, PLACES[place])
    assert norm.forward(example["in_cython"].Arrays(**call)) == OK
    same_bits({"y": call["y"]}, {"y": wanted["y"]})


@TYPES
@pytest.mark.parametrize("place", ["plain", "channels last", "spread"])
def test_statistics_alone(example, dtype, place):
    case = CASES["batch norm"]._replace(dtype=dtype)
    x = numbers(case, PLACES[place])["x"]
    mean, rstd, var = np.empty((3, SHAPE[1]))
    arrays = example["in_cython"].Arrays(x=x, mean=mean, rstd=rstd, var=var)
    assert described(example["in_cython"], case).forward(arrays) == OK
    same([mean, var], batch_moments(x, 1))


@TYPES
@pytest.mark.parametrize("place", ["plain", "channels last", "spread"])
def test_given_statistics(example, dtype, place):
    """Evaluation without running statistics: mean and rstd are taken as they are."""
    case = CASES["batch norm in evaluation"]._replace(dtype=dtype)
    arrays = numbers(case, PLACES[place])
    y, cache = normext.batch_norm(arrays["x"], out=room(case, PLACES[place]), **case.arguments(arrays))
    found = room(case, PLACES[place])
    given = {"gamma": arrays["gamma"], "beta": arrays["beta"], "mean": cache.mean.copy(), "rstd": cache.rstd.copy()}
    call = example["in_cython"].Arrays(x=arrays["x"], y=found, **given)
    assert described(example["in_cython"], case).forward(call) == OK
    same_bits({"y": found}, {"y": y})


@TYPES
@pytest.mark.parametrize("place", ["plain", "channels last", "spread"])
@pytest.mark.parametrize("scale", [1.0, 1e-13])
def test_batch_norm_in_parts(example, dtype, scale, place):
    """For channels whose numbers lie in three processes with the same numbers."""
    case = CASES["batch norm"]._replace(dtype=dtype, scale=1.0 if dtype == "float16" else scale, eps=0)
    arrays, norm = numbers(case, PLACES[place]), described(example["in_cython"], case)
    _, cache = normext.batch_norm(arrays["x"], **case.arguments(arrays))
    sums, count = np.empty((2, SHAPE[1])), 3.0 * arrays["x"].size // SHAPE[1]
    call = {"x": arrays["x"], "dy": arrays["dy"], "gamma": arrays["gamma"], "beta": arrays["beta"]}
    call |= {"mean": cache.mean.copy(), "rstd": cache.rstd.copy(), "dbeta": sums[0], "dgamma": sums[1]}
    assert norm.backward(example["in_cython"].Arrays(part="sums", **call)) == OK
    same([sums], [batch_backward_sums(arrays["dy"], cache)])
    sums *= 3
    wanted = batch_backward_apply(arrays["dy"], cache, sums, count, out=room(case, PLACES[place]))
    dx = room(case, PLACES[place])
    assert norm.backward(example["in_cython"].Arrays(part="apply", count=count, dx=dx, **call)) == OK
    same_bits({"dx": dx}, {"dx": wanted})


WRONG = {
    "fine": (OK, ("layer_norm", "float32", (2, 3), 1), {}),
    "nothing in a shape that is fine": (OK, ("layer_norm", "float32", (0, 3), 1), {}),
    "as many axes as there may be": (OK, ("layer_norm", "float32", (1,) * 64, 63), {}),
    "relu of layer norm": (-1, ("layer_norm", "float32", (2, 3), 1), {"relu": True}),
    "evaluation of group norm": (-1, ("group_norm", "float32", (2, 3), 1), {"training": False, "groups": 1}),
    "kind": (-3, ("local response norm", "float32", (2, 3), 1), {}),
    "type": (-4, ("batch_norm", "int8", (2, 3), 1), {}),
    "too many axes": (-5, ("batch_norm", "float32", (1,) * 65, 1), {}),
    "a negative length": (-5, ("batch_norm", "float32", (2, -3), 1), {}),
    "too many numbers": (-5, ("batch_norm", "float32", (2**30, 2**30), 1), {}),
    "axis": (-6, ("batch_norm", "float32", (2, 3), 2), {}),
    "a negative axis": (-6, ("batch_norm", "float32", (2, 3), -1), {}),
    "axis 0 of group norm": (-6, ("group_norm", "float32", (2, 3), 0), {"groups": 1}),
    "groups": (-7, ("group_norm", "float32", (2, 3), 1), {"groups": 2}),
    "no groups": (-7, ("group_norm", "float32", (2, 3), 1), {"groups": 0}),
    "eps": (-8, ("rms_norm", "float32", (2, 3), 1), {"eps": -1}),
    "eps is none": (-8, ("rms_norm", "float32", (2, 3), 1), {"eps": float("nan")}),
    "no channels": (-9, ("batch_norm", "float32", (2, 0), 1), {}),
    "no numbers in a channel": (-10, ("batch_norm", "float32", (0, 2), 1), {}),
    "no numbers in a group": (-10, ("group_norm", "float32", (2, 2, 0), 1), {"groups": 1}),
    "no numbers in a row": (-10, ("layer_norm", "float32", (2, 0), 1), {}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_has_a_name(example, what):
    """A number of NORMEXT_OK to NORMEXT_NO_NUMBERS; the passes return it too, before they look at an array."""
    status, arguments, options = WRONG[what]
    norm, nothing = example["in_cython"].Norm(*arguments, **options), example["in_cython"].Arrays()
    assert norm.check() == status
    if status != OK:
        assert norm.forward(nothing) == norm.backward(nothing) == status


ROOM = np.ones(6)
FORWARD = {name: ROOM for name in ("x", "y", "mean", "rstd")}
BACKWARD = {name: ROOM for name in ("x", "dy", "dx", "mean", "rstd", "dgamma", "dbeta")}
LAYER = ("layer_norm", "float64", (2, 3), 1), {}
BATCH = ("batch_norm", "float64", (2, 3), 1), {}
EVALUATION = ("batch_norm", "float64", (2, 3), 1), {"training": False}
GROUPS = ("group_norm", "float64", (2, 3), 1), {"groups": 1}
REFUSED = {
    "residual without a sum": ("forward", LAYER, FORWARD | {"residual": ROOM}),
    "residual of batch norm": ("forward", BATCH, FORWARD | {"residual": ROOM, "sum": ROOM}),
    "residual of group norm": ("forward", GROUPS, FORWARD | {"residual": ROOM, "sum": ROOM}),
    "running_mean alone": ("forward", EVALUATION, FORWARD | {"running_mean": ROOM}),
    "running_var alone": ("forward", EVALUATION, FORWARD | {"running_var": ROOM}),
    "running statistics, but no room for mean": (
        "forward",
        (("batch_norm", "float64", (0, 3), 1), {"training": False}),
        {"rstd": ROOM, "running_mean": ROOM, "running_var": ROOM},
    ),
    "an unbiased variance of one number": (
        "forward",
        (("batch_norm", "float64", (1, 3), 1), {}),
        FORWARD | {"running_var": ROOM, "unbiased": True},
    ),
    "dsum of batch norm": ("backward", BATCH, BACKWARD | {"dsum": ROOM}),
    "dsum of group norm": ("backward", GROUPS, BACKWARD | {"dsum": ROOM}),
    "a part of layer norm": ("backward", LAYER, BACKWARD | {"part": "sums"}),
    "a part that there is not": ("backward", BATCH, BACKWARD | {"part": "half"}),
    "no count": ("backward", BATCH, BACKWARD | {"part": "apply"}),
}
REFUSED |= {f"{name} NULL": ("forward", LAYER, FORWARD | {name: None}) for name in FORWARD}
REFUSED |= {f"{name} NULL, backward": ("backward", LAYER, BACKWARD | {name: None}) for name in BACKWARD}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(example, what):
    way, (arguments, options), arrays = REFUSED[what]
    norm = example["in_cython"].Norm(*arguments, **options)
    assert norm.check() == OK
    assert getattr(norm, way)(example["in_cython"].Arrays(**arrays)) == BAD_ARGUMENT
    assert (ROOM == 1).all()


@pytest.mark.parametrize("case", [LAYER, GROUPS, EVALUATION])
def test_no_numbers_need_no_memory(example, case):
    (kind, dtype, _, axis), options = case
    norm, (dgamma, dbeta) = example["in_cython"].Norm(kind, dtype, (0, 3), axis, **options), np.ones((2, 3))
    assert norm.forward(example["in_cython"].Arrays()) == OK
    assert norm.backward(example["in_cython"].Arrays(dgamma=dgamma, dbeta=dbeta)) == OK
    assert not dgamma.any() and not dbeta.any()


@pytest.mark.parametrize("place", ["plain", "spread"])
def test_any_norm_on_many_threads_without_the_gil(example, place):
    call, cases = example["in_cython"], [case._replace(dtype="float32") for case in CASES.values()] * 2
    wanted = [forward_and_backward(case, numbers(case, PLACES[place])) for case in cases]

    def run(case):
        return results_of(
            call, case, numbers(case, PLACES[place]), room(case, PLACES[place]), room(case, PLACES[place])
        )

    with ThreadPoolExecutor(4) as pool:
        for found, other in zip(pool.map(run, cases), wanted):
            same_bits(found, other)


def test_a_thread_that_never_gets_the_gil(example):
    """It would wait for ever, so a process of its own is what does."""
    code = (
        "import numpy as np, in_c, normext;"
        "x = np.random.default_rng(0).normal(size=(500, 3000)).astype('f'); wanted, _ = normext.layer_norm(x);"
        "in_c.layer_norm_on_another_thread(x); assert (x == wanted).all()"
    )
    folder = Path(example["in_c"].__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)


def test_version(example):
    header = (Path(normext.get_include()) / "normext.h").read_text()
    assert f"#define NORMEXT_API_VERSION {example['in_cython'].version}\n" in header


def test_an_older_normext_is_refused(tmp_path):
    """A header that knows more functions than the installed table has."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    header = (Path(normext.get_include()) / "normext.h").read_text()
    newer = header.replace("#define NORMEXT_API_VERSION 1\n", "#define NORMEXT_API_VERSION 2\n")
    assert newer != header
    (tmp_path / "normext.h").write_text(newer)  # found first
    code = (
        "from setuptools import Extension, setup; import normext;"
        "setup(ext_modules=[Extension('in_c', ['in_c.c'], include_dirs=['.', normext.get_include()])])"
    )
    (tmp_path / "setup.py").write_text(code)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=True)
    load = [sys.executable, "-c", "import in_c"]
    loaded = subprocess.run(load, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "compiled for version 2 of normext's table of functions, but the installed normext has 1" in loaded.stderr
