"""The source tree builds in place, also for one thread, and what it builds works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_build_in_place_without_openmp(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("src_c", "normext"):
        built = ["*.so", "*.pyd"] + ["*.c"] * (name == "normext")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(*built))
    environment = {**os.environ, "NORMEXT_OPENMP": "0", "PYTHONPATH": ""}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "building without OpenMP" in result.stderr
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
    run = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no (one thread)" in result.stdout
