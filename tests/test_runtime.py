"""Threads, instruction sets, and what a build and a process run on."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normext
from normext._core.cores import cpu_quota
from normext._core.runtime import config

OPENMP = config()["OpenMP"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AVAILABLE = min(CORES, cpu_quota() or CORES) if OPENMP else 1

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
    unset += ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "PYTHON_CPU_COUNT")
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


QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")


@pytest.mark.skipif(QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64")
@pytest.mark.parametrize(
    ("processor", "chosen"),
    [("Haswell", "avx2"), *[(f"Haswell,-{feature}", "baseline") for feature in ("avx2", "bmi2", "f16c", "fma")]],
)
def test_an_instruction_set_is_chosen_where_the_processor_has_all_of_it(processor, chosen):
    code = f"""if True:
        from normext._core.runtime import config
        assert config()["supported here"][-1] == {chosen!r}, config()
    """
    done = subprocess.run([QEMU, "-cpu", processor, sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_instruction_set_that_is_unknown():
    result = run("import normext", NORMEXT_ISA="sse9")
    assert result.returncode == 1
    assert b"ImportError: NORMEXT_ISA='sse9' is unknown to this build, which has baseline" in result.stderr


def test_instruction_set_from_the_environment():
    result = run("import normext; normext.show_config()", NORMEXT_ISA="baseline")
    assert any(line.split() == ["in", "use", "baseline"] for line in result.stdout.decode().splitlines())


TRACED = """
import numpy as np
import normext

x = np.random.default_rng(0).normal(size=(8, 32, 28, 28)).astype(np.float32)
_, cache = normext.batch_norm(x)
normext.batch_norm_backward(x, cache)
normext.batch_norm(x.reshape(-1, 28), axis=-1)
normext.layer_norm(x.astype(np.float64)[0])
normext.rms_norm(x[..., ::2])
normext.group_norm(np.moveaxis(x[:1], 1, -1).copy(), 4, axis=-1)
_, cache = normext.layer_norm(1e-20 * x[:1, 0], eps=0)
normext.layer_norm_backward(x[:1, 0], cache)
normext.instance_norm(np.zeros((0, 3), np.float16))
"""
WAYS = """
batch norm forward, float32 (8, 32, 28, 28) axis 1: along rows, baseline, MANY
batch norm backward, float32 (8, 32, 28, 28) axis 1: along rows, baseline, MANY
batch norm forward, float32 (7168, 28) axis 1: down columns, baseline, MANY
layer norm forward, float64 (32, 28, 28) axis 2: row by row, baseline, ONE
RMS norm forward, float32 (8, 32, 28, 14) axis 3: by copied blocks, baseline, ONE
group norm forward, float32 (1, 28, 28, 32) axis 3: down columns, baseline, ONE
layer norm forward, float32 (1, 28, 28) axis 2: row by row, baseline, ONE
layer norm backward, float32 (1, 28, 28) axis 2: by blocks copied to float64, baseline, ONE
group norm forward, float16 (0, 3) axis 1: nothing to do, baseline, ONE
"""


def test_a_trace_says_which_way_each_call_went():
    found = run(TRACED, NORMEXT_TRACE="1", NORMEXT_ISA="baseline", NORMEXT_NUM_THREADS="2")
    lines = found.stderr.decode().split("normext: ")[1:]
    ways = WAYS.replace("MANY", "2 threads" if OPENMP else "1 thread").replace("ONE", "1 thread").strip()
    assert [line.rpartition(", ")[0] for line in lines] == ways.splitlines()
    assert all(float(line.rpartition(", ")[2].removesuffix(" ms\n")) >= 0 for line in lines)
    assert run(TRACED, NORMEXT_TRACE="0").stderr == b""


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"NORMEXT_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"NORMEXT_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "many"}, AVAILABLE),
    ],
)
def test_threads_from_the_environment(environment, threads):
    result = run("import normext; print(normext.get_num_threads())", **environment)
    assert result.stdout.split() == [str(threads).encode()]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_threads_from_the_environment_that_are_no_number(value):
    result = run("import normext", NORMEXT_NUM_THREADS=value)
    assert f"ImportError: NORMEXT_NUM_THREADS='{value}' must be a positive integer".encode() in result.stderr


@pytest.mark.skipif(not OPENMP, reason="built without OpenMP")
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cannot bind threads to cores")
@pytest.mark.parametrize(
    "environment",
    [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "cores"}, {"GOMP_CPU_AFFINITY": "0-1023"}],
    ids=lambda environment: next(iter(environment)),
)
def test_threads_that_openmp_binds_to_cores(environment):
    """It binds the thread that imports normext as well, which then may run on one core; the others have theirs."""
    result = run("import normext; print(normext.get_num_threads())", **environment)
    assert result.stdout.split() == [str(AVAILABLE).encode()], result.stderr


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python has no such setting before 3.13")
def test_threads_where_python_is_told_of_fewer_cores():
    result = run("import normext; print(normext.get_num_threads())", PYTHON_CPU_COUNT="1")
    assert result.stdout.split() == [b"1"]


# Files of control groups, and the cores that they allow: version 2, version 1, and both beside each other.
GROUPS = {
    "none": ({"proc/self/cgroup": "0::/\n"}, None),
    "another system": ({}, None),
    "no limit": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
    "two cores": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
    "one and a half": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "75000 50000\n"}, 2),
    "a tenth": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "10000 100000\n"}, 1),
    "the group above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
        3,
    ),
    "the host's path in a container": (
        {"proc/self/cgroup": "0::/docker/123\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
        4,
    ),
    "a path above the container's": (
        {"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
        4,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
        5,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "not what was expected": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "\n"}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_quota_of_control_groups(name, tmp_path):
    files, cores = GROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert cpu_quota(tmp_path) == cores


def test_threads_in_a_control_group_with_a_quota():
    """Of the real system, where groups can be made: as root, outside a container."""
    top = next((top for top in map(Path, ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup")) if top.is_dir()), Path("/none"))
    group = top / f"normext-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    try:
        try:
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_quota_us").write_text("100000")
                (group / "cpu.cfs_period_us").write_text("100000")
            else:
                (group / "cpu.max").write_text("100000 100000")
        except OSError as error:
            pytest.skip(f"cannot limit a control group: {error}")
        code = (
            f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); import normext; print(normext.get_num_threads())"
        )
        result = run(code)
        assert result.stdout.split() == [b"1"], result.stderr
    finally:
        group.rmdir()


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
    words = ("compiler", "instruction sets built", "in use", "OpenMP", "threads", "memory", "BLAS")
    for word in (normext.__version__, *words):
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
