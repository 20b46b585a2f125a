"""Threads beside other threads, processes and signals: no call hangs, and all give the bits of a call on its own.

Each test runs a program of its own, which is killed when it hangs.
"""

import os
import subprocess
import sys

import pytest

import normext._core.runtime

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OPENMP = normext._core.runtime.config()["OpenMP"]
needs_openmp = pytest.mark.skipif(not OPENMP, reason="built without OpenMP")

# Work for all threads that are allowed, and what comes of it.
START = """
import hashlib, os, signal, sys, threading, time
import numpy as np
import normext

x = np.random.default_rng(0).standard_normal((1500, 512)).astype(np.float32)

def work(_=None):
    y, cache = normext.layer_norm(x, np.ones(512), np.ones(512))
    z, cache2 = normext.batch_norm(y)
    results = (y, z, *normext.layer_norm_backward(z, cache), *normext.batch_norm_backward(y, cache2))
    return hashlib.sha256(b"".join(a.tobytes() for a in results if a is not None)).hexdigest()

def running_threads():
    return len(os.listdir("/proc/self/task"))
"""


def run(program, **environment):
    """What the program prints; it must end well, within a minute."""
    unset = ("NORMEXT_NUM_THREADS", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + program],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its children hang too
            pytest.fail(f"the program hangs\n{process.communicate()}")
    assert process.returncode == 0, err
    return out


# Fork ------------------------------------------------------------

# GCC's OpenMP waits for ever in a child whose parent has used threads, unless these end before the fork.


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"], ids=["Python", "C"])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_child_of_a_parent_that_has_used_all_threads(fork, threads):
    """And its own child; each with as many threads as the parent had, which goes on as before."""
    run(f"""
import ctypes
normext.set_num_threads({threads})
expected = work()
generation = 0
while generation < 3:
    child = {fork}()
    if child:
        assert work() == expected
        assert os.waitpid(child, 0)[1] == 0
        break
    generation += 1
    assert work() == expected
    assert normext.get_num_threads() == {threads}
    if sys.platform == "linux" and {bool(OPENMP)}:
        assert running_threads() >= {threads}, running_threads()
""")


def test_fork_while_another_thread_is_in_a_call():
    run("""
normext.set_num_threads(2)
expected = work()
stop = threading.Event()
wrong = []
def loop():
    while not stop.is_set():
        if work() != expected:
            wrong.append(1)
threads = [threading.Thread(target=loop) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert not wrong
""")


def test_servers_workers_that_are_forked_before_the_first_request():
    """As gunicorn and uWSGI do: load, warm up, fork workers, restart one that ends; requests come through pipes."""
    run("""
normext.set_num_threads(4)
expected = work()

def start():
    requests, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        while os.read(requests[0], 1) == b"?":
            os.write(answers[1], work().encode())
        os._exit(0)
    return pid, requests[1], answers[0]

workers = [start() for _ in range(3)]
for turn in range(3):
    for _, requests, _ in workers:
        os.write(requests, b"?")  # they work at the same time, and so does their parent
    assert work() == expected
    for _, _, answers in workers:
        assert os.read(answers, 64).decode() == expected
    pid, requests, _ = workers.pop(0)
    os.write(requests, b".")
    assert os.waitpid(pid, 0)[1] == 0
    workers.append(start())
for pid, requests, _ in workers:
    os.write(requests, b".")
    os.waitpid(pid, 0)
""")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method, tmp_path):
    (tmp_path / "program.py").write_text(
        START
        + f"""
import multiprocessing

if __name__ == "__main__":
    normext.set_num_threads(2)
    expected = work()
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert pool.map(work, range(4)) == [expected] * 4
    assert work() == expected
"""
    )
    run(f"import subprocess; subprocess.run([sys.executable, {str(tmp_path / 'program.py')!r}], check=True)")


# Many threads of Python ------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_many_threads_of_python_at_once(threads):
    run(f"""
from concurrent.futures import ThreadPoolExecutor
normext.set_num_threads({threads})
expected = work()
with ThreadPoolExecutor(8) as pool:
    assert set(pool.map(work, range(40))) == {{expected}}
""")


def test_threads_of_python_that_change_the_number_of_threads():
    run("""
from concurrent.futures import ThreadPoolExecutor
expected = work()
def changing(n):
    normext.set_num_threads(n % 8 + 1)
    return work()
with ThreadPoolExecutor(6) as pool:
    assert set(pool.map(changing, range(48))) == {expected}
""")


def test_process_pool():
    run("""
import concurrent.futures, multiprocessing
normext.set_num_threads(2)
expected = work()
with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    assert set(pool.map(work, range(6))) == {expected}
""")


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(backend):
    pytest.importorskip("joblib")
    run(f"""
from joblib import Parallel, delayed
normext.set_num_threads(2)
expected = work()
assert set(Parallel(2, backend={backend!r})(delayed(work)() for _ in range(6))) == {{expected}}
assert work() == expected
""")


# Threadpoolctl ------------------------------------------------------------

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")


@needs_openmp
def test_threadpoolctl_sees_the_openmp_that_is_used():
    pytest.importorskip("threadpoolctl")
    run("""
from threadpoolctl import threadpool_info
listed = {os.path.realpath(library["filepath"]) for library in threadpool_info() if library["user_api"] == "openmp"}
assert listed
if sys.platform == "linux":
    used = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    assert listed == used, (listed, used)
""")


@needs_openmp
@needs_proc
def test_as_many_threads_as_were_set_run_also_on_fewer_cores():
    out = run("normext.set_num_threads(8); before = running_threads(); work(); print(running_threads() - before)")
    assert out.split() == ["7"]


@needs_openmp
@needs_proc
@pytest.mark.parametrize("limit", [1, 3])
def test_threadpoolctl_limits_the_threads(limit):
    pytest.importorskip("threadpoolctl")
    out = run(
        f"""
from threadpoolctl import threadpool_limits
before = running_threads()
with threadpool_limits({limit}, user_api="openmp"):
    limited = work()
    print(running_threads() - before)
assert work() == limited
print(running_threads() - before)
""",
        OMP_NUM_THREADS="6",
    )
    assert out.split() == [str(limit - 1), "5"]


# BLAS beside training ------------------------------------------------------------

# A net of no layers that tells with how many threads BLAS runs while it trains; before and after there are two.
TRAINING = """
from threadpoolctl import threadpool_info
from normext._blas import WORTH_THREADS, blas_for_products
from normext.cs231n.solver import Solver

def blas():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

class Net:
    def __init__(self, work=lambda: None):
        self.params, self.seen, self.work = {"w": np.zeros(3)}, set(), work

    def loss(self, X, y=None):
        self.seen |= blas()
        self.work()
        return np.zeros((len(X), 2)) if y is None else (0.0, {"w": np.zeros(3)})

data = {"X_train": np.zeros((9, 1)), "y_train": np.zeros(9, int), "X_val": np.zeros((9, 1)), "y_val": np.zeros(9, int)}

def solver(net):
    return Solver(net, data, batch_size=3, num_epochs=2, verbose=False)

if blas() != {2}:
    print("no BLAS with threads that can be set")
    sys.exit()
"""


def run_training(program):
    pytest.importorskip("threadpoolctl")
    if out := run(TRAINING + program, OPENBLAS_NUM_THREADS="2"):
        pytest.skip(out)


def test_solver_limits_blas_and_gives_its_threads_back():
    run_training("""
net = Net()
solver(net).train()
assert net.seen == {1} and blas() == {2}, (net.seen, blas())
net = Net()
solver(net).check_accuracy(data["X_val"], data["y_val"])
assert net.seen == {1} and blas() == {2}, (net.seen, blas())
try:
    solver(Net(lambda: 1 / 0)).train()
except ZeroDivisionError:
    assert blas() == {2}, blas()
""")


def test_solvers_in_several_threads_of_python_leave_blas_as_it_was():
    run_training("""
begun = threading.Event()
nets = [Net(lambda: (begun.set(), time.sleep(0.02))), Net(), Net(lambda: time.sleep(0.04))]
threads = [threading.Thread(target=solver(net).train) for net in nets]
threads[0].start()
begun.wait()
for thread in threads[1:]:
    thread.start()
for thread in threads:
    thread.join()
assert nets[0].seen == {1} and blas() == {2}, (nets[0].seen, blas())
""")


def test_large_products_have_all_threads_of_blas():
    run_training("""
for multiplications, threads in ((WORTH_THREADS - 1, 1), (WORTH_THREADS, 2)):
    with blas_for_products(multiplications):
        assert blas() == {threads}, (multiplications, blas())
""")


def test_blas_without_threadpoolctl():
    """Training goes on with the threads that BLAS has, and the configuration says what is not known."""
    out = run("""
sys.modules["threadpoolctl"] = None
from normext.cs231n.solver import Solver
class Net:
    params = {"w": np.zeros(3)}
    def loss(self, X, y=None):
        return np.zeros((len(X), 2)) if y is None else (0.0, {"w": np.zeros(3)})
data = {"X_train": np.zeros((9, 1)), "y_train": np.zeros(9, int), "X_val": np.zeros((9, 1)), "y_val": np.zeros(9, int)}
Solver(Net(), data, batch_size=3, num_epochs=1, verbose=False).train()
normext.show_config()
""")
    assert "threads unknown (threadpoolctl is not installed)" in out.splitlines()[-1]


# Where the system has no more threads, or no memory ------------------------------------------------------------

# OpenMP would end the process.

ROOM = """
import contextlib, resource
megabyte = 2**20
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]  # of a thread, too

@contextlib.contextmanager
def room_for(size):
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + int(size), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

normext.set_num_threads(1)
expected = work()
"""


@needs_openmp
@needs_proc
def test_a_call_does_with_the_threads_that_there_are():
    """First there is room for the results and not for another thread's stack, then for one, then for all."""
    out = run(
        "x = x[:300]"  # the results find room in what the heap has
        + ROOM
        + """
before = running_threads()
normext.set_num_threads(3)
if not 6 * megabyte <= stack <= 1024 * megabyte:
    print("stack", stack)
    sys.exit()
for stacks in (0.75, 1.75, 10):
    with room_for(stacks * stack):
        assert work() == expected
        print(running_threads() - before)
"""
    )
    if out.startswith("stack"):
        pytest.skip(f"threads here have a {out.strip()}")
    assert out.split() == ["0", "1", "2"]


@needs_openmp
@needs_proc
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_call_without_memory_raises(threads):
    run(
        ROOM
        + f"""
normext.set_num_threads({threads})
outcomes = []
for size in [*range(0, 4 * megabyte, megabyte // 16), *range(4 * megabyte, 64 * megabyte, megabyte)]:
    with room_for(size):
        try:
            outcomes.append(work() == expected)
        except MemoryError:
            outcomes.append(None)
assert None in outcomes and True in outcomes and False not in outcomes, outcomes
"""
    )


# Signals ------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
@pytest.mark.parametrize("layout", ["plain", "copied"])
def test_ctrl_c_ends_after_the_call(layout, norm):
    """With all of `out` written, or nothing if it came before the work began; forward and backward."""
    run(f"""
import itertools
shape = (40, 48, 30, 30)
options = dict(num_groups=4) if {norm!r} == "group_norm" else {{}}
forward, backward = getattr(normext, {norm!r}), getattr(normext, {norm!r} + "_backward")
x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
if {layout!r} == "copied":  # bytes in the other order: blocks are copied one by one
    x = x.astype(x.dtype.newbyteorder())
expected, cache = forward(x, **options)
gradient = backward(x, cache)[0]
stop = [0, 0]
for call, wanted in (
    (lambda out: forward(x, out=out, **options), expected),
    (lambda out: backward(x, cache, out=out), gradient),
):
    start = time.perf_counter()
    call(np.empty(shape, np.float32))
    duration = time.perf_counter() - start
    for part in range(8):
        out = np.full(shape, np.nan, np.float32)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, duration * (part + 0.5) / 8)
            call(out)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
        written = ~np.isnan(out)
        assert not written.any() or np.array_equal(out, wanted), (part, written.mean())
        stop[int(written.all())] += 1
assert stop[1] > 0, stop
""")


def test_an_interrupted_call_has_updated_both_running_statistics_or_none():
    run("""
x = np.random.default_rng(0).standard_normal((4000, 300)).astype(">f4")
wanted = np.zeros(300), np.ones(300)
normext.batch_norm(x, running_mean=wanted[0], running_var=wanted[1])
signal.signal(signal.SIGALRM, signal.default_int_handler)
for part in range(20):
    running = np.zeros(300), np.ones(300)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3 * (part + 1))
        normext.batch_norm(x, running_mean=running[0], running_var=running[1])
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    whole = [np.array_equal(a, b) for a, b in zip(running, wanted)]
    none = [(running[0] == 0).all(), (running[1] == 1).all()]
    assert all(whole) or all(none), (whole, none)
""")
