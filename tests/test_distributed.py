"""Batch norm and training on several ranks: real MPI, started from here; `mpi_programs` is what runs."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from normext._version import how_to_install

PROGRAMS = Path(__file__).with_name("mpi_programs.py")
# Not imported: that would need mpi4py, and start MPI in this process.
CHECKS = re.findall(r"^@check\ndef (\w+)", PROGRAMS.read_text(), re.M)

ENVIRONMENT = {
    **os.environ,
    **{f"{library}_NUM_THREADS": "1" for library in ("NORMEXT", "OMP", "OPENBLAS")},
    # Open MPI by itself refuses to start as root, as in containers, and more ranks than there are cores.
    **{"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    **{"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"},
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def launcher():
    """The one that came with this Python's packages, or else the system's."""
    return shutil.which("mpiexec", path=str(Path(sys.prefix) / "bin")) or shutil.which("mpiexec")


needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or launcher() is None,
    reason="needs mpi4py and mpiexec: pip install mpi4py mpich",
)


def started(ranks, *arguments, timeout=100, **environment):
    """The finished job, with its output; a job that hangs is ended and fails."""
    command = [launcher(), "-n", str(ranks), sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own, to be ended as a whole.
    with subprocess.Popen(command, **pipes, env=ENVIRONMENT | environment, start_new_session=True) as job:
        try:
            out, err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            out, err = job.communicate()
            pytest.fail(f"{ranks} ranks did not end in {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(command, job.returncode, out, err)


@cache
def outcome(ranks):
    job = started(ranks, PROGRAMS, "main")
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    assert found["ranks"] == ranks, f"mpiexec and mpi4py are of different MPIs: {launcher()}, {found['library']}"
    return found["failures"]


@needs_mpi
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_on_ranks(ranks, name):
    assert not outcome(ranks)[name], outcome(ranks)[name]


@needs_mpi
@pytest.mark.parametrize(("program", "words"), [("fault", "ValueError: "), ("interrupted", "KeyboardInterrupt")])
def test_a_rank_that_raises_ends_the_job(program, words):
    job = started(3, PROGRAMS, program, timeout=30)
    assert job.returncode != 0
    assert "rank 2 of 3 ends the job:\nTraceback" in job.stderr
    assert words in job.stderr


@needs_mpi
def test_ranks_that_never_meet_give_up_and_say_who_waits_where():
    job = started(3, PROGRAMS, "elsewhere", timeout=60, NORMEXT_MPI_TIMEOUT="2")
    errors = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("[")]
    assert len(errors) == 3, job.stderr
    for first, second in errors:
        assert first == second  # the communicator cannot be used again
        for rank, comm in enumerate(("MPI_COMM_WORLD", "MPI_COMM_WORLD", "mine")):
            assert f"sync_batch_norm with comm {comm} of ranks 0, 1, 2 on rank {rank}" in first


@needs_mpi
def test_a_rank_that_does_not_come():
    job = started(2, PROGRAMS, "alone", timeout=60, NORMEXT_MPI_TIMEOUT="2")
    assert "sync_batch_norm waited for other ranks: " in job.stdout
    assert "of ranks 0, 1 on rank 0; no word on rank 1" in job.stdout


@needs_mpi
def test_a_study_on_ranks_learns_as_in_one_process(tmp_path):
    pytest.importorskip("matplotlib"), pytest.importorskip("tqdm"), pytest.importorskip("sklearn")
    study = ("-m", "normext", "study", "deep", "--quick", "--out")
    job = started(2, *study, tmp_path / "ranks", "--mpi")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("deep: report in") == 1
    alone = subprocess.run([sys.executable, *study, tmp_path / "one"], env=ENVIRONMENT, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("ranks", "one")]
    assert files[0] == files[1]
    for norm in ("no-norm", "batch-norm"):
        records = [tmp_path / name / "deep/trainings" / f"{norm}.json" for name in ("ranks", "one")]
        ours, theirs = (np.array(json.loads(path.read_text())["history"]["loss_history"]) for path in records)
        np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-3)  # in float32
        assert len(ours) == len(theirs)
    again = started(2, *study, tmp_path / "ranks", "--mpi")
    assert "2 of 2 trainings are finished already" in again.stdout


def without_mpi4py(*statements):
    code = "; ".join(["import sys", "sys.modules['mpi4py'] = None", *statements])
    return subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)


def test_without_mpi4py_the_import_says_what_to_install():
    error = without_mpi4py("import normext.distributed").stderr
    assert f"ImportError: normext.distributed needs mpi4py: {how_to_install('mpi')}" in error


def test_without_mpi4py_a_study_says_what_to_install(tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["study", "deep", "--mpi", "--out", str(tmp_path)]
    job = without_mpi4py("from normext.cli import main", f"sys.exit(main({arguments!r}))")
    assert job.returncode == 2
    assert job.stderr.startswith(f"normext: error: normext.distributed needs mpi4py: {how_to_install('mpi')}")
