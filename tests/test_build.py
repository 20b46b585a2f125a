"""The source tree builds in place, also for one thread, and into packages; what it builds works."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import normext

ROOT = Path(__file__).parent.parent
CORE = ROOT / "normext" / "_core"

if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("Cython")
pytest.importorskip("setuptools")

from instrument import build_again, build_copy, copy  # noqa: E402 - it needs what the lines above ask for


def succeed(*command, **options):
    """Run a command without this process's idea of where modules are; its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a build in place, for one thread and in a hurry."""
    folder = tmp_path_factory.mktemp("built").resolve()
    result = build_copy(folder, optimize="-O0", openmp=False)
    assert result.returncode == 0, result.stderr
    assert "building without OpenMP" in result.stderr
    return folder


def test_build_in_place_without_openmp(built):
    code = """if True:
        import sys, numpy as np, normext
        from normext._core.runtime import config
        assert normext.__file__.startswith(sys.argv[1]), normext.__file__
        assert config()["OpenMP"] is None
        with normext.threads(4):
            x = np.random.default_rng(0).normal(size=(600, 700))
            y, cache = normext.batch_norm(x)
            np.testing.assert_allclose(y.std(0), 1, rtol=1e-4)
            normext.batch_norm_backward(x, cache)
        normext.show_config()
    """
    assert "no (one thread)" in succeed(sys.executable, "-c", code, str(built), cwd=built)


@pytest.mark.skipif(os.name == "nt", reason="reads the commands of compilers that are called as GCC is")
@pytest.mark.parametrize(
    ("touched", "compiled"),
    [
        (None, []),
        ("normext/_core/updates.pyx", ["updates.c"]),
        (
            "normext/include/normext.h",
            sorted([*(f"{path.stem}.c" for path in CORE.glob("*.pyx")), "dispatch.c", "functional.c"]),
        ),
        ("src_c/dispatch.c", ["dispatch.c", "runtime.c"]),
        pytest.param("src_c/simd.h", ["dispatch.c", *["kernels.c"] * 3 * 4, "runtime.c"], marks=pytest.mark.slow),
    ],
)
def test_only_what_is_not_up_to_date_is_compiled(built, touched, compiled):
    if touched:
        (built / touched).touch()
    result = build_again(built, openmp=False)
    assert result.returncode == 0, result.stderr
    assert sorted(Path(path).name for path in re.findall(r" -c (\S+)", result.stdout)) == compiled


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm of GNU's binutils")
def test_modules_export_what_python_looks_for_and_nothing_else(built):
    modules = sorted(built.glob("normext/**/*.so"))
    assert len(modules) >= 7
    for path in modules:
        symbols = [line.split()[2] for line in succeed("nm", "-D", "--defined-only", str(path)).splitlines()]
        assert symbols == [f"PyInit_{path.name.partition('.')[0]}"]


def test_source_that_is_not_compiled_says_so(tmp_path):
    """Also where it stands in the way of a normext that is installed."""
    copied = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "normext", tmp_path / "normext", ignore=copied)
    command = [sys.executable, "-c", "import normext"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = f"has not been compiled for this Python: run python -m pip install -e . in {tmp_path.resolve()}"
    assert f"ImportError: {tmp_path.resolve() / 'normext'} {told}" == done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_packages(tmp_path):
    """The sdist has what the build needs and nothing else; its wheel runs in an environment that has nothing else."""
    pytest.importorskip("build.__main__")  # and not the folder of the source tree
    tree = tmp_path / "tree"
    tree.mkdir()
    copy(tree)
    succeed(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(tree), cwd=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")

    with tarfile.open(sdist) as archive:
        held = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    sources = {
        path for path in ROOT.glob("normext/**/*") if path.suffix in (".py", ".pyi", ".pyx", ".pxd", ".h", ".typed")
    }
    sources |= {path for path in ROOT.glob("src_c/*") if path.suffix in (".c", ".h")}
    top = {Path(name) for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")}
    made = {Path(name) for name in ("PKG-INFO", "setup.cfg")}
    assert {path for path in held if path.parts[0] != "normext.egg-info"} - made == top | {
        path.relative_to(ROOT) for path in sources
    }

    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
        assert sum(info.file_size for info in archive.infolist()) < 10e6
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata).decode().splitlines()
    for line in (f"Version: {normext.__version__}", "License-Expression: BSD-3-Clause", "License-File: LICENSE"):
        assert line in metadata
    compiled = {path for path in held if path.suffix in (".so", ".pyd")}
    modules = {path.stem for path in ROOT.glob("normext/**/*.pyx")}
    assert {path.name.split(".")[0] for path in compiled} == modules
    for_callers = {ROOT / "normext/__init__.pxd", ROOT / "normext/include/normext.h"}
    run = {path for path in sources if path.suffix in (".py", ".pyi", ".typed")}
    assert held - compiled == {path.relative_to(ROOT) for path in run | for_callers}

    venv.create(tmp_path / "alone", with_pip=True)
    binaries = tmp_path / "alone" / ("Scripts" if os.name == "nt" else "bin")
    succeed(str(binaries / "python"), "-m", "pip", "install", str(wheel))
    assert "all within their limits" in succeed(str(binaries / "normext"), "check", cwd=tmp_path)
