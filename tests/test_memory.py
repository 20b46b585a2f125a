"""Large results lie in memory that earlier ones gave back, and are arrays like any other."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy._core import _multiarray_umath
from numpy._core.multiarray import get_handler_name

import normext
from normext._core.memory import memory_cache
from normext.cs231n import optim

MIB = 1 << 20
ORDINARY = get_handler_name()


@pytest.fixture(autouse=True)
def cache():
    """Nothing is kept, and room for 64 MiB."""
    before = normext.set_memory_cache(0)
    normext.set_memory_cache(64 * MIB)
    yield
    normext.set_memory_cache(before)


def x_of(size, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(size // 256 // np.dtype(dtype).itemsize, 256)).astype(dtype)


def result(x):
    return normext.layer_norm(x)[0]


def address(a):
    return a.ctypes.data


def kept():
    return memory_cache()[1]


def run(program, **environment):
    """What the program prints; it must end well."""
    inherited = {name: value for name, value in os.environ.items() if name != "NORMEXT_MEMORY_CACHE"}
    imports = "import os, sys, threading\nimport numpy as np\nimport normext\n"
    imports += "from normext._core.memory import memory_cache\n"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", imports + program]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Arrays like any other ------------------------------------------------------------


def test_a_result_owns_its_data():
    y = result(x_of(MIB))
    assert type(y) is np.ndarray and y.base is None
    assert y.flags.owndata and y.flags.writeable and y.flags.c_contiguous and y.flags.aligned


@pytest.mark.parametrize("size, handler", [(MIB - 1024, ORDINARY), (MIB, "normext")])
def test_large_results_alone_have_an_allocator_of_their_own(size, handler):
    assert get_handler_name(result(x_of(size))) == handler
    assert get_handler_name() == ORDINARY


def test_results_keep_their_numbers_while_others_come_and_go():
    x = x_of(2 * MIB)
    expected = result(x)
    rng, alive = np.random.default_rng(0), []
    for _ in range(60):
        alive.append(result(x))
        if len(alive) > 4:
            np.multiply(alive.pop(rng.integers(5)), np.nan)
        assert len({address(y) for y in alive}) == len(alive)
    for y in alive:
        assert y.tobytes() == expected.tobytes()


def test_memory_is_not_given_to_another_while_a_view_of_it_lives():
    x = x_of(MIB)
    y = result(x)
    expected, view = y[3:5].copy(), y[3:5]
    del y
    assert kept() == 0
    z = result(-x)
    assert not np.shares_memory(view, z)
    assert np.array_equal(view, expected)


@pytest.mark.parametrize("size", [0.5, 1.9, 2, 2.1, 7])
def test_a_result_can_be_resized(size):
    y = result(x_of(2 * MIB))
    numbers = int(size * MIB / 4)
    expected = np.zeros(numbers, np.float32)
    expected[: y.size] = y.ravel()[:numbers]
    y.resize(numbers, refcheck=False)
    assert np.array_equal(y, expected)
    assert y.flags.owndata
    other = result(x_of(2 * MIB))
    assert not np.shares_memory(y, other)


def test_tracemalloc_counts_what_arrays_have_and_not_what_is_kept():
    def traced():
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, domain)])
        return sum(trace.size for trace in snapshot.traces)

    domain = np.lib.tracemalloc_domain
    x = x_of(3 * MIB)
    tracemalloc.start()
    try:
        before = traced()
        y = result(x)
        assert 3 * MIB <= traced() - before < 3.1 * MIB
        del y
        assert kept() == 3 * MIB
        assert traced() - before < 0.1 * MIB
    finally:
        tracemalloc.stop()


# Reuse ------------------------------------------------------------


LAYOUTS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "permuted": lambda x: x.reshape(-1, 8, 256).transpose(1, 2, 0),
    "reversed": lambda x: x[::-1, ::-1],
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_result_lies_where_the_last_one_lay(layout):
    x = LAYOUTS[layout](x_of(2 * MIB))
    ordinary = np.empty_like(x, x.dtype.newbyteorder("="))
    y = result(x)
    where, expected = address(y), y.copy()
    assert y.strides == ordinary.strides and y.dtype == ordinary.dtype
    del y
    y = result(x)
    assert address(y) == where
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_of_other_dtypes_too(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = x_of(2 * MIB, dtype)
    y = result(x)
    where = address(y)
    del y
    assert address(result(x)) == where


def test_gradients_sums_statistics_and_parameters_lie_there_too():
    x = np.ones((1 << 17, 2))
    y, total, cache = normext.layer_norm(x, residual=x)
    dx, _, _ = normext.layer_norm_backward(x, cache)
    w, config = optim.adam(x, x, {"learning_rate": 1e-3})
    for a in (y, total, dx, cache.mean.base, w.base, config["m"].base, config["v"].base):
        assert get_handler_name(a) == "normext"


def test_a_result_somewhat_smaller_is_served_and_a_much_smaller_one_is_not():
    y = result(x_of(4 * MIB))
    where = address(y)
    del y
    assert address(result(x_of(int(3.8 * MIB)))) == where
    assert address(result(x_of(2 * MIB))) != where


@pytest.mark.parametrize("size", [1.01, 1.99, 2.01, 5.1, 9])
def test_no_more_than_an_eighth_of_a_block_is_left_unused(size):
    y = result(x_of(int(size * MIB)))
    has = y.nbytes
    del y
    assert has <= kept() <= has * 9 / 8


def huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_results_begin_with_a_page_and_from_4_MiB_on_with_a_huge_one(size):
    assert address(result(x_of(size * MIB))) % (2 * MIB if huge_pages() and size >= 4 else 4096) == 0


@pytest.mark.skipif(not huge_pages(), reason="needs Linux's huge pages")
def test_the_system_may_take_what_is_kept():
    def left_to_it():
        return sum(int(line.split()[1]) for line in maps.read_text().splitlines() if line.startswith("LazyFree"))

    maps = Path("/proc/self/smaps")
    before, y = left_to_it(), result(x_of(16 * MIB))
    assert left_to_it() == before
    del y
    assert left_to_it() - before > 15 * 1024  # in KiB; the kernel may not have come to the last ones


# NumPy's table of functions, for what only allocators of others do.
POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
NEW_CAPSULE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
API = ctypes.cast(POINTER(_multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(API[304])


def handler_of(a):
    """The capsule: the last field of an array, after its header, seven words and two numbers."""
    return ctypes.cast(id(a) + object.__basicsize__ + 9 * 8, ctypes.POINTER(ctypes.py_object))[0]


@pytest.mark.skipif(sys.maxsize < 1 << 32 or bool(sys.flags.debug), reason="knows the fields of 64 bits")
def test_zeros_are_zeros_where_a_result_lay():
    y = result(x_of(2 * MIB))
    where, ours = address(y), handler_of(y)
    del y
    before = set_handler(ours)
    try:
        zeros, small = np.zeros(2 * MIB, np.uint8), np.zeros(5000, np.uint8)
    finally:
        set_handler(before)
    assert address(zeros) == where
    assert not zeros.any() and not small.any()


@pytest.mark.skipif(sys.maxsize < 1 << 32, reason="knows the fields of 64 bits")
def test_an_allocator_that_somebody_has_set_is_left_alone():
    x = x_of(MIB)
    theirs = NEW_CAPSULE(POINTER(handler_of(result(x)), b"mem_handler"), b"mem_handler", None)
    before = set_handler(theirs)
    try:
        assert handler_of(result(x)) is theirs
        assert set_handler(theirs) is theirs
    finally:
        set_handler(before)


# How much is kept ------------------------------------------------------------


def test_what_was_given_back_longest_ago_goes_first():
    normext.set_memory_cache(8 * MIB)
    x = x_of(2 * MIB)
    results = [result(x) for _ in range(7)]
    where = [address(y) for y in results]
    while results:
        del results[0]
        assert kept() <= 8 * MIB
    assert kept() == 8 * MIB
    again = [result(x) for _ in range(4)]
    assert [address(y) for y in again] == where[:2:-1]
    assert kept() == 0


def test_a_result_beyond_the_bound_is_not_kept_and_pushes_nothing_out():
    normext.set_memory_cache(4 * MIB)
    small, large = result(x_of(2 * MIB)), result(x_of(5 * MIB))
    del small
    del large
    assert kept() == 2 * MIB


def test_a_lower_bound_holds_at_once_and_0_turns_it_off():
    x = x_of(2 * MIB)
    results = [result(x) for _ in range(4)]
    y = results[0]
    del results
    assert kept() == 6 * MIB
    assert normext.set_memory_cache(5 * MIB) == 64 * MIB
    assert kept() == 4 * MIB
    assert normext.set_memory_cache(0) == 5 * MIB
    assert kept() == 0
    assert get_handler_name(result(x)) == ORDINARY
    del y
    assert kept() == 0
    assert normext.set_memory_cache(5 * MIB) == 0


@pytest.mark.parametrize(
    "bad, error, words",
    [(1.5, TypeError, "an integer, got float"), (-1, ValueError, "got -1"), (1 << 64, ValueError, "")],
)
def test_bounds_that_are_none(bad, error, words):
    with pytest.raises(error, match=f"size must be .*{words}"):
        normext.set_memory_cache(bad)
    assert memory_cache()[0] == 64 * MIB


@pytest.mark.parametrize("given, bound", [("0", 0), ("5000000", 5_000_000), (str(1 << 70), sys.maxsize)])
def test_the_environment_says_how_much(given, bound):
    assert run("print(memory_cache())", NORMEXT_MEMORY_CACHE=given) == f"({bound}, 0)\n"


@pytest.mark.parametrize("given", ["-1", "1GB", "1e9", " "])
def test_the_environment_says_nonsense(given):
    with pytest.raises(AssertionError, match=f"ImportError: NORMEXT_MEMORY_CACHE={given!r} must be a number of bytes"):
        run("", NORMEXT_MEMORY_CACHE=given)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the machine's memory is not known")
def test_by_default_no_more_than_an_eighth_of_the_machines_memory():
    bound, _ = eval(run("print(memory_cache())", NORMEXT_MEMORY_CACHE=""))
    assert MIB < bound <= os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 8
    assert bound <= 1 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_what_is_kept_goes_when_memory_runs_out_and_then_numpy_says_so():
    run("""
import resource
from numpy._core.multiarray import get_handler_name
x = np.zeros((1 << 16, 256), np.float32)
normext.layer_norm(x)
assert memory_cache()[1] >= 1 << 26
small = x[: 1 << 15].copy()
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (20 << 20), -1))
y = normext.layer_norm(small)[0]
assert memory_cache()[1] == 0
try:
    normext.layer_norm(x)
    raise SystemExit("there was memory")
except MemoryError:
    assert get_handler_name() == "default_allocator"
""")


# Threads, forks, the end ------------------------------------------------------------


def test_many_threads_make_and_free():
    normext.set_memory_cache(12 * MIB)
    xs = [x_of(size) for size in (MIB, int(1.1 * MIB), 2 * MIB, 4 * MIB)]
    expected = [result(x).tobytes() for x in xs]
    passed_on, wrong = [], []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            i = rng.integers(len(xs))
            y = result(xs[i])
            passed_on.append((i, y))
            i, other = passed_on.pop(0)
            if other.tobytes() != expected[i]:
                wrong.append(i)
            other[...] = np.nan

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept() <= 12 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_gives_back_what_is_kept_and_both_go_on():
    run("""
x = np.random.default_rng(0).normal(size=(1024, 512))
expected = normext.layer_norm(x)[0].tobytes()
alive, other = normext.layer_norm(x)[0], normext.layer_norm(x)[0]
del other
assert memory_cache()[1] > 0
child = os.fork()
assert memory_cache()[1] == 0
del alive
assert memory_cache()[1] >= 1 << 22
assert normext.layer_norm(x)[0].tobytes() == expected
if child:
    assert os.waitpid(child, 0)[1] == 0
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_while_other_threads_make_and_free():
    run("""
normext.set_num_threads(1)
x = np.random.default_rng(0).normal(size=(512, 512))
expected = normext.layer_norm(x)[0].tobytes()
stop = threading.Event()
def loop():
    while not stop.is_set():
        normext.layer_norm(x)
threads = [threading.Thread(target=loop) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        for _ in range(3):
            good = normext.layer_norm(x)[0].tobytes() == expected
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
""")


def test_results_that_outlive_the_modules():
    run("""
class Last:
    def __del__(self):
        self.y.resize(1 << 20, refcheck=False)
        del self.y
last = Last()
last.y, _ = normext.layer_norm(np.ones((1024, 256)))
last.myself = last
sys.last = last
sys.modules["at the very end"] = normext.layer_norm(np.ones((1024, 256)))[0]
""")
