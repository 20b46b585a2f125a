"""The table of functions for C and Cython: an example package built on it gives what the Python functions give."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from odd_inputs import EPS, check_all

import normext

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


DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
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


@DTYPES
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


@DTYPES
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


def test_version(example):
    header = (Path(normext.get_include()) / "normext.h").read_text()
    assert f"#define NORMEXT_API_VERSION {example['in_cython'].version}\n" in header


def test_an_older_normext_is_refused(tmp_path):
    """A header that knows more functions than the installed table has."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    header = (Path(normext.get_include()) / "normext.h").read_text()
    newer = header.replace("#define NORMEXT_API_VERSION 1\n", "#define NORMEXT_API_VERSION 2\n")
    assert newer != header
    (tmp_path / "normext.h").write_text(newer)  # found first, being beside what includes it
    code = (
        "from setuptools import Extension, setup; import normext;"
        "setup(ext_modules=[Extension('in_c', ['in_c.c'], include_dirs=[normext.get_include()])])"
    )
    (tmp_path / "setup.py").write_text(code)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=True)
    load = [sys.executable, "-c", "import in_c"]
    loaded = subprocess.run(load, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "compiled for version 2 of normext's table of functions, but the installed normext has 1" in loaded.stderr
