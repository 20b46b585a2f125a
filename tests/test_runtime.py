"""Threads, instruction sets, and what a build and a process run on."""

import os
import subprocess
import sys

import numpy as np
import pytest

import normext
from normext._core.runtime import config

SHAPES = [(32, 64), (512, 768), (5000, 16), (300, 5000), (3, 200_000), (64, 3, 40, 40), (2, 2, 300, 300)]

# Every output of every norm for every shape, as one file of bytes.
OUTPUTS = f"""
import sys
import numpy as np
import normext

def outputs():
    for dtype in (np.float16, np.float32, np.float64):
        for shape in {SHAPES}:
            rng = np.random.default_rng(0)
            x, dy = rng.normal(5, 1, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
            for norm, parameter, options in (
                ("batch_norm", shape[1], dict()),
                ("batch_norm", shape[-1], dict(axis=-1, activation="relu")),
                ("layer_norm", shape[-1], dict()),
                ("layer_norm", shape[-1], dict(residual=dy)),
                ("instance_norm", shape[1], dict()),
                ("instance_norm", shape[-1], dict(axis=-1)),
            ):
                if norm == "instance_norm" and np.prod(shape) > 2**18:
                    continue  # a call for each of many channels takes long
                gamma = rng.normal(size=parameter).astype(dtype)
                y, *_, cache = getattr(normext, norm)(x, gamma, gamma, **options)
                yield y.tobytes()
                for gradient in getattr(normext, norm + "_backward")(dy, cache):
                    yield gradient.tobytes()
"""


def run(code, **environment):
    unset = ("NORMEXT_ISA", "NORMEXT_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, check=False
    )


def test_bits_do_not_depend_on_threads():
    scope = {}
    exec(OUTPUTS, scope)
    with normext.threads(1):
        alone = list(scope["outputs"]())
    for n in (1, 2, 3, 4, 8):
        with normext.threads(n):
            assert list(scope["outputs"]()) == alone


# Every 16-bit float there is, as it is and times a float32 that makes it round; in both geometries.
CONVERSIONS = """
import numpy as np
import normext

try:
    from ml_dtypes import bfloat16 as types
    types = [np.float16, types]
except ImportError:
    types = [np.float16]
for dtype in types:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    for shape in ((1, -1), (1, 1, -1), (-1, 1)):
        x = every.reshape(shape)
        for gamma in (1, 1 / 3, 1e-3):
            gamma = np.full(x.shape[1], gamma, np.float32)
            running = {"running_mean": np.zeros(x.shape[1]), "running_var": np.ones(x.shape[1])}
            y, _ = normext.batch_norm(x, gamma, eps=0, training=False, **running)
            wanted = (x.astype(np.float32) * gamma[0]).astype(dtype)
            np.testing.assert_array_equal(y.view(np.uint16) & 0x7FFF, wanted.view(np.uint16) & 0x7FFF)
            assert ((y < 0) == (wanted < 0)).all()
    x = np.array([[np.nan, np.inf, -np.inf, 1, 65519, 65520]] * 3).astype(dtype)
    running = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    y, _ = normext.batch_norm(x.T.copy(), eps=0, training=False, **running)
    np.testing.assert_array_equal(y.astype(np.float32), x.T.astype(np.float32))
print("exact")
"""


@pytest.mark.parametrize("isa", config()["supported here"])
def test_16_bit_conversions_are_exact(isa):
    done = run(CONVERSIONS, NORMEXT_ISA=isa)
    assert done.stdout == b"exact\n", done.stderr.decode()


@pytest.mark.skipif("avx512" not in config()["supported here"], reason="needs AVX-512 beside AVX2")
def test_bits_do_not_depend_on_avx2_or_avx512():
    code = OUTPUTS + "sys.stdout.buffer.write(b''.join(outputs()))"
    avx2, avx512 = run(code, NORMEXT_ISA="avx2"), run(code, NORMEXT_ISA="avx512")
    assert avx2.returncode == avx512.returncode == 0
    assert avx2.stdout == avx512.stdout and avx2.stdout


@pytest.mark.parametrize("isa", config()["instruction sets built"])
def test_every_instruction_set_is_right(isa):
    """Equal to the twin, on each instruction set that was built; with every number of lanes left over."""
    if isa not in config()["supported here"]:
        pytest.skip(f"{isa} is not supported here")
    code = """if True:
        import numpy as np
        import normext
        from normext import reference
        from normext.gradcheck import relative_error

        rng = np.random.default_rng(0)
        for dtype, limit in ((np.float32, 2e-6), (np.float64, 1e-12)):
            for n in list(range(1, 70)) + [127, 128, 129, 1030, 5000]:
                for rows in (1, 3, 17, 129):
                    x, dy, gamma = (rng.normal(size=s).astype(dtype) for s in ((rows, n), (rows, n), n))
                    for norm in ("batch_norm", "layer_norm"):
                        y, cache = getattr(normext, norm)(x, gamma, gamma, eps=0.1)
                        y64, cache64 = getattr(reference, norm)(*(a.astype(float) for a in (x, gamma, gamma)), eps=0.1)
                        ours = (y, *getattr(normext, norm + "_backward")(dy, cache))
                        twins = (y64, *getattr(reference, norm + "_backward")(dy.astype(float), cache64))
                        for our, twin in zip(ours, twins, strict=True):
                            assert relative_error(our, twin) <= limit, (norm, dtype, rows, n, relative_error(our, twin))
    """
    result = run(code, NORMEXT_ISA=isa)
    assert result.returncode == 0, result.stderr.decode()


def test_instruction_set_that_is_unknown():
    result = run("import normext", NORMEXT_ISA="sse9")
    assert result.returncode == 1
    assert b"ImportError: NORMEXT_ISA='sse9' is unknown to this build, which has baseline" in result.stderr


def test_instruction_set_from_the_environment():
    result = run("import normext; normext.show_config()", NORMEXT_ISA="baseline")
    assert any(line.split() == ["in", "use", "baseline"] for line in result.stdout.decode().splitlines())


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"NORMEXT_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"NORMEXT_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        (
            {"OMP_NUM_THREADS": "many"},
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        ),
    ],
)
def test_threads_from_the_environment(environment, threads):
    result = run("import normext; print(normext.get_num_threads())", **environment)
    assert result.stdout.split() == [str(threads).encode()]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_threads_from_the_environment_that_are_no_number(value):
    result = run("import normext", NORMEXT_NUM_THREADS=value)
    assert f"ImportError: NORMEXT_NUM_THREADS='{value}' must be a positive integer".encode() in result.stderr


def test_set_num_threads():
    before = normext.get_num_threads()
    with normext.threads(np.int64(3)):
        assert normext.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), normext.threads(1):
            raise ZeroDivisionError
        assert normext.get_num_threads() == 3
    assert normext.get_num_threads() == before
    for bad, error in ((0, ValueError), (-1, ValueError), (10**9, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="n must be"):
            normext.set_num_threads(bad)
    assert normext.get_num_threads() == before


def test_show_config(capsys):
    normext.show_config()
    shown = capsys.readouterr().out
    for word in (normext.__version__, "compiler", "instruction sets built", "in use", "OpenMP", "threads"):
        assert word in shown


def test_idle_threads_go_to_sleep():
    """GCC's OpenMP is told so, unless the environment says otherwise, and the environment is left as it was."""
    code = "import os; before = dict(os.environ); import normext; assert dict(os.environ) == before"
    spins = {}
    for name, value in (("default", {}), ("own", {"GOMP_SPINCOUNT": "77"}), ("policy", {"OMP_WAIT_POLICY": "ACTIVE"})):
        result = run(code, OMP_DISPLAY_ENV="VERBOSE", **value)
        assert result.returncode == 0, result.stderr
        spins[name] = [line for line in result.stderr.decode().splitlines() if "GOMP_SPINCOUNT" in line]
    if not spins["default"]:
        pytest.skip("built without GCC's OpenMP")
    assert ["1000" in line for line in spins["default"]] == [True]
    assert ["77" in line for line in spins["own"]] == [True]
    assert ["1000" in line for line in spins["policy"]] == [False]
