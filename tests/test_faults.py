"""Long jobs that are killed or run out of space lose nothing finished, and calls by the million leak nothing."""

import gc
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from tiny_study import TinyStudy

import normext
from normext.cs231n.classifiers.fc_net import FullyConnectedNet
from normext.cs231n.solver import Solver
from normext.studies.study import run_studies


@pytest.fixture(scope="module")
def whole(points, tmp_path_factory):
    """The results of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run_studies([TinyStudy()], points, out)
    return results(out / "tiny")


def results(folder):
    """All that a study leaves, but for the seconds that it took."""
    records = {path.name: json.loads(path.read_text()) for path in sorted((folder / "trainings").glob("[!.]*"))}
    for record in records.values():
        del record["history"]["seconds"]
    return records, *((folder / f"{name}.csv").read_bytes() for name in ("losses", "accuracies"))


def finished(folder):
    """The records of trainings, as they lie there; each of them must be whole."""
    found = {path: path.read_bytes() for path in (folder / "trainings").glob("[!.]*")}
    for content in found.values():
        json.loads(content)
    return found


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_a_child(f):
    """Call f in a child of fork, and return the child's exit status; it has no more to say."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            f()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What a study does to its files tells Python's audit hooks of it first.
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir", "tempfile.mkstemp"}


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_study_killed_before_any_touch_of_a_file_loses_the_training_in_progress_at_most(
    points, whole, tmp_path, capfd
):
    moments = 0
    while True:
        out = tmp_path / str(moments)

        def killed(moment=moments, out=out):
            left = [moment]

            def hook(event, arguments):
                # Modules that are imported do not count.
                if event in TOUCHES and any(str(out) in str(argument) for argument in arguments):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1

            sys.addaudithook(hook)
            run_studies([TinyStudy()], points, out)

        status = in_a_child(killed)
        before = finished(out / "tiny")
        run_studies([TinyStudy()], points, out)
        assert {path: path.read_bytes() for path in before} == before
        assert results(out / "tiny") == whole
        told = capfd.readouterr().out
        assert not before or f"{len(before)} of 3 trainings are finished already" in told
        if status == 0:
            break
        assert status == -signal.SIGKILL
        moments += 1
    assert moments >= 12  # records, tables and report, each opened and renamed


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("room", [0, 1, 100, 400, 600, 2000])
def test_files_cut_off_in_the_middle_lose_the_training_in_progress_at_most(points, whole, tmp_path, room):
    """A limit of the size of files stands in for a disk that is full: the write fails when some of it is written."""
    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            run_studies([TinyStudy()], points, tmp_path)
        except OSError as error:
            assert "cannot write" in str(error) and str(tmp_path) in str(error)
            os._exit(7)

    assert in_a_child(limited) == (7 if room < 2000 else 0)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    before = finished(tmp_path / "tiny")
    run_studies([TinyStudy()], points, tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    assert results(tmp_path / "tiny") == whole


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_is_told_and_the_study_goes_on_when_there_is_room(points, whole, tmp_path):
    disk, data = tmp_path / "disk", tmp_path / "points.npz"
    disk.mkdir()
    np.savez(data, **points.arrays)
    program = f"""
import numpy as np
from pathlib import Path
from normext.studies.data import Data
from test_faults import TinyStudy, results, run_studies
points = Data("points", "points", dict(np.load({str(data)!r})))
disk = Path({str(disk)!r})
try:
    run_studies([TinyStudy()], points, disk)
    raise SystemExit("there was room")
except OSError as error:
    assert "cannot write" in str(error) and "No space left on device" in str(error), error
assert not [path for path in (disk / "tiny").rglob("*") if path.name.startswith(".")]
(disk / "filler").unlink()
run_studies([TinyStudy()], points, disk)
Path({str(tmp_path / "results")!r}).write_text(repr(results(disk / "tiny")))
"""
    script = f"""
        mount -t tmpfs -o size=40k tmpfs {disk} || exit 77
        head -c 36000 /dev/zero > {disk}/filler
        "$0" -c "$1"
    """
    paths = os.path.dirname(os.path.dirname(normext.__file__)), os.path.dirname(__file__)
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--mount", "sh", "-c", script, sys.executable, program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip("may not mount")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results").read_text() == repr(whole)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_checkpoint_is_whole_or_not_there(tmp_path, points):
    """Read without running what a file might ask for: no pickle in it."""
    resource = pytest.importorskip("resource")

    def train(room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        model = FullyConnectedNet((5,), input_dim=4, normalization="batchnorm", seed=1)
        name = str(tmp_path / "checkpoint")
        Solver(model, points.arrays, num_epochs=2, batch_size=5, verbose=False, checkpoint_name=name).train()

    assert in_a_child(lambda: train(1000)) == 1
    assert list(tmp_path.iterdir()) == []
    assert in_a_child(lambda: train(10**6)) == 0
    for path in tmp_path.iterdir():
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays.files)
    assert len(list(tmp_path.iterdir())) == 2


# Leaks ------------------------------------------------------------


def resident():
    """Bytes of memory in use by the process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def good_calls():
    """A few calls by every way through: new and given results, blocks that are copied, fusions, windows, objects."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((6, 4)).astype(np.float32)
    gamma, running = np.ones(4, np.float32), (np.zeros(4), np.ones(4))
    out, swapped, image = np.empty_like(small), small.astype(">f4"), rng.standard_normal((2, 4, 3, 3))
    layer = normext.BatchNorm(4)
    norms = [(normext.batch_norm, normext.batch_norm_backward), (normext.layer_norm, normext.layer_norm_backward)]

    def calls():
        for x, options in ((small, {}), (small, {"out": out}), (swapped, {}), (small.astype(np.float16), {})):
            for forward, backward in norms:
                _, cache = forward(x, gamma, gamma, **options)
                backward(small, cache, **options)
        normext.batch_norm(small, gamma, running_mean=running[0], running_var=running[1], activation="relu")
        _, _, cache = normext.rms_norm(small, gamma, residual=small)
        normext.rms_norm_backward(small, cache, dsum=small)
        for axis in (1, -1):
            _, cache = normext.group_norm(image if axis == 1 else image.transpose(0, 2, 3, 1), 2, axis=axis)
        normext.group_norm_backward(image.transpose(0, 2, 3, 1), cache)
        normext.col2im(normext.im2col(image, 2), image.shape, 2)
        layer(small)
        layer.backward(small)

    return calls


def large_calls():
    """Calls that threads share."""
    x = np.random.default_rng(0).standard_normal((64, 4, 40, 40))

    def calls():
        normext.batch_norm_backward(x, normext.batch_norm(x)[1])
        normext.group_norm_backward(x, normext.group_norm(x, 2)[1])
        normext.layer_norm_backward(x, normext.layer_norm(x, axis=1)[1])

    return calls


def failing_calls():
    x, gamma = np.ones((6, 4)), np.ones(5)
    read_only = np.zeros(4)
    read_only.setflags(write=False)
    _, cache = normext.layer_norm(x)
    failures = (
        lambda: normext.batch_norm(x, gamma),
        lambda: normext.batch_norm(x, running_mean=read_only),
        lambda: normext.batch_norm(x.astype(complex)),
        lambda: normext.batch_norm(x, out=x[:, ::-1]),
        lambda: normext.batch_norm(x, axis=7),
        lambda: normext.batch_norm(x, training=False),
        lambda: normext.layer_norm(x, eps=-1.0),
        lambda: normext.layer_norm(x, residual=x[1:]),
        lambda: normext.layer_norm_backward(x.T, cache),
        lambda: normext.batch_norm_backward(x, cache),
        lambda: normext.group_norm(x, 3),
        lambda: normext.group_norm(x, "two"),
        lambda: normext.im2col(x, 2),
        lambda: normext.set_num_threads(0),
    )

    def calls():
        for failure in failures:
            with pytest.raises((TypeError, ValueError)):
                failure()

    return calls


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "rounds", "calls"), [(good_calls, 3000, 30), (large_calls, 30, 6), (failing_calls, 300, 14)]
)
def test_calls_leave_memory_flat(kind, rounds, calls):
    """Of what Python and NumPy hold nothing is left over, and the process does not grow."""
    repeat = kind()
    for _ in range(rounds // 10):
        repeat()
    gc.collect()
    tracemalloc.start()
    try:
        repeat()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(rounds // 30 + 1):
            repeat()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()
    before = resident()
    for _ in range(rounds):
        repeat()
    gc.collect()
    # Eight bytes a call would be more than this.
    assert resident() - before < max(8 * rounds * calls, 1 << 20)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_million_small_calls_leave_memory_flat():
    x = np.ones((3, 4), np.float32)
    norm, backward = normext.layer_norm, normext.layer_norm_backward

    def calls(count):
        for _ in range(count):
            _, cache = norm(x, eps=1e-5)
            backward(x, cache)

    calls(10_000)
    before = resident()
    calls(500_000)
    assert resident() - before < 1 << 20  # about a byte a call
