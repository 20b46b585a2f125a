"""Instrumented builds: ``python tests/instrument.py address|threads|memcheck|faults|coverage [ARGUMENT ...]``.

address   AddressSanitizer and UndefinedBehaviorSanitizer, on the tests of everything compiled
threads   ThreadSanitizer, on the loops as they run on threads
memcheck  valgrind's memcheck, on a few calls of everything compiled
faults    every allocation fails once, in calls of everything, and no call leaves anything half done (`faults.py`)
coverage  lines and branches of the Python code, lines of the Cython and C code

GCC on Linux is needed, for memcheck valgrind, and for coverage the extra ``coverage``. The build is made in a temporary
copy of the source tree, but for faults, which takes normext as Python finds it. The exit status is 0 where nothing was
found. Arguments after the first go to pytest (address and coverage).
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The tests that are about what is compiled.
COMPILED = (
    "tests/test_norms.py",
    "tests/test_api.py",
    "tests/test_windows.py",
    "tests/test_accuracy.py",
    "tests/test_runtime.py",
    "tests/test_memory.py",
)

# GCC's OpenMP library is not compiled for ThreadSanitizer, which does not see how its threads wait for each other and
# takes whatever they share for a race. This stands in for it where the compiled modules start threads; other calls go
# to the library itself.
OPENMP = """
#include <pthread.h>
typedef struct { void (*work)(void *); void *data; int index, count; } Member;
static __thread Member self = {0, 0, 0, 1};
static void *run(void *member)
{
    self = *(Member *)member;
    self.work(self.data);
    return 0;
}
int omp_get_thread_num(void) { return self.index; }
int omp_get_num_threads(void) { return self.count; }
int omp_get_max_threads(void) { return 64; }
void GOMP_parallel(void (*work)(void *), void *data, unsigned count, unsigned flags)
{
    Member outer = self, members[count];
    pthread_t threads[count];
    for (unsigned i = 0; i < count; i++) members[i] = (Member){work, data, (int)i, (int)count};
    for (unsigned i = 1; i < count; i++)
        if (pthread_create(&threads[i], 0, run, &members[i])) __builtin_abort();
    run(&members[0]);
    for (unsigned i = 1; i < count; i++) pthread_join(threads[i], 0);
    self = outer;
}
"""

# Every compiled loop, in every geometry, over arrays of the shapes and on the numbers of threads that are given.
CALLS = """
import json, sys
import numpy as np
import normext
from normext.cs231n.fast_layers import max_pool_backward_fast, max_pool_forward_fast

def look(*arrays):  # memcheck tells of numbers that nobody wrote once something depends on them
    for array in arrays:
        assert array is None or np.isfinite(array).all()

def use(norm, x, *parameters, **options):
    *outputs, cache = getattr(normext, norm)(x, *parameters, **options)
    look(*outputs, *getattr(normext, norm + "_backward")(outputs[0], cache))

shapes, numbers_of_threads = json.loads(sys.argv[1])
for threads in numbers_of_threads:
    normext.set_num_threads(threads)
    for dtype in (np.float16, np.float32, np.float64):
        for shape in shapes:
            x = np.random.default_rng(0).normal(size=shape).astype(dtype)
            for axis in (1, -1):
                ones = np.ones(shape[axis], dtype)
                use("batch_norm", x, ones, ones, axis=axis, activation="relu")
                use("batch_norm", x, axis=axis, running_mean=0 * ones, running_var=ones.copy())
                use("batch_norm", x, axis=axis, running_mean=0 * ones, running_var=ones, training=False)
                use("group_norm", x, 2, ones, ones, axis=axis)
                use("instance_norm", x, axis=axis)
            use("layer_norm", x, ones, ones, residual=x)
            use("rms_norm", x, ones)
            use("layer_norm", x.T)
            if x.ndim == 4 and dtype != np.float16:
                columns = normext.im2col(x, 3, padding=1)
                pooled, cache = max_pool_forward_fast(x, {"pool_height": 2, "pool_width": 2, "stride": 2})
                look(columns, normext.col2im(columns, x.shape, 3, padding=1))
                look(pooled, max_pool_backward_fast(pooled, cache))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CHECKS)
    chosen, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        status = CHECKS[chosen.what](Path(folder).resolve(), rest)
    print(f"{chosen.what}: {'failed, see above' if status else 'passed'}")
    return status


def address(folder: Path, arguments: Sequence[str]) -> int:
    # Python's own flags define what happens when a signed number overflows, and hide it.
    build(folder, "-g -fno-wrapv -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer")
    # It does not see masked loads and stores of AVX2 and AVX-512; the baseline goes through the same memory by element.
    results = [
        run(
            # What they say before they end the process goes past Python.
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *(arguments or COMPILED)),
            folder=folder,
            NORMEXT_ISA=isa,
            LD_PRELOAD=f"{library('libasan.so')} {library('libubsan.so')}",
            ASAN_OPTIONS="detect_leaks=0",  # of Python there are many, which it frees at its end or never
            UBSAN_OPTIONS="print_stacktrace=1",
        )
        for isa in ("baseline", "")  # the best one
    ]
    return max(results)


def threads(folder: Path, _: Sequence[str]) -> int:
    build(folder, "-g -fsanitize=thread")
    (folder / "openmp.c").write_text(OPENMP)
    # In Cython's code for prange the thread with the last turn may leave its number for all to see while another thread
    # still copies the number before the first, which it never uses.
    (folder / "suppressions").write_text("race_top:_omp_fn.\n")
    compiler = ["gcc", "-shared", "-fPIC", "-g", "-fsanitize=thread", "openmp.c", "-o", "libopenmp.so", "-pthread"]
    subprocess.run(compiler, cwd=folder, check=True)
    # ThreadSanitizer needs the addresses that it counts on; some systems spread them too far.
    fixed = ["setarch", "--addr-no-randomize"]
    if subprocess.run([*fixed, "true"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        fixed = []
    shapes = [(5000, 40), (40, 5000), (6, 100_000), (8, 6, 50, 50), (2, 4, 200, 200)]
    return run(
        *("-c", CALLS, json.dumps([shapes, [2, 5]])),
        folder=folder,
        before=fixed,
        LD_PRELOAD=f"{library('libtsan.so')} {folder / 'libopenmp.so'}",
        TSAN_OPTIONS=f"ignore_noninstrumented_modules=1 suppressions={folder / 'suppressions'}",
    )


def memcheck(folder: Path, _: Sequence[str]) -> int:
    build(folder, "-g")
    report = folder / "memcheck.xml"
    options = ("--quiet", "--xml=yes", "--error-limit=no", "--track-origins=yes")
    shapes = [(2, 2), (3, 70), (130, 34), (3, 4, 6, 8), (2, 6, 18, 10)]
    status = run(
        *("-c", CALLS, json.dumps([shapes, [1]])),
        folder=folder,
        before=["valgrind", *options, f"--xml-file={report}"],
        PYTHONMALLOC="malloc",
        NORMEXT_ISA="avx2",  # valgrind knows no AVX-512
    )
    # Python and NumPy have findings of their own. Ours have a frame of ours: where it happened or where memory is from.
    # What a module keeps until the process ends may look lost, since Python points into the middle of its objects.
    errors = [e for e in ElementTree.parse(report).iter("error") if e.findtext("kind") != "Leak_PossiblyLost"]
    found = [error for error in errors if f"{folder}/normext/" in "".join(error.itertext())]
    for error in found:
        print(error.findtext("what") or error.findtext("xwhat/text"))
        for frame in error.iter("frame"):
            print("   ", frame.findtext("fn"), frame.findtext("file"), frame.findtext("line"))
    return status or len(found) > 0


def faults(folder: Path, _: Sequence[str]) -> int:
    library, progress = folder / "libfaults.so", folder / "progress"
    compiler = ["gcc", "-shared", "-fPIC", "-O1", str(ROOT / "tests/faults.c"), "-o", str(library), "-ldl"]
    subprocess.run(compiler, check=True)
    progress.write_bytes(bytes(16))
    # With malloc for Python's objects too, each of them is an allocation.
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}
    tried: Counter[str] = Counter()
    wrong: dict[str, dict[str, list[int]]] = {}
    call, step, status, name = 0, 0, 1, ""
    while status != 0:
        command = [sys.executable, str(ROOT / "tests/faults.py"), str(call), str(step), str(progress)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=folder, env=environment, check=False, **pipes)
        for line in done.stdout.splitlines():
            what, number, found = json.loads(line)
            if what == "call":
                name = found
            else:
                tried[name] += 1
                for words in found:
                    wrong.setdefault(name, {}).setdefault(words, []).append(number)
        status = done.returncode
        if status != 0:  # it goes on after the step that it did not survive
            before, (call, step) = (call, step), struct.unpack("qq", progress.read_bytes())
            if (call, step) == before:
                sys.exit(done.stderr)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            tried[name] += 1
            wrong.setdefault(name, {}).setdefault(f"ended the process with {status} {last}", []).append(step)
    for name, count in tried.items():
        print(f"{name}: {count} tried")
        for words, steps in wrong.get(name, {}).items():
            print(
                f"    {words}: {len(steps)} times, at steps {', '.join(map(str, steps[:8]))}{' ...' * (len(steps) > 8)}"
            )
    print(f"{sum(tried.values())} allocations and amounts of memory of {len(tried)} calls, {len(wrong)} with findings")
    return int(bool(wrong))


def coverage(folder: Path, arguments: Sequence[str]) -> int:
    build(folder, "--coverage -fprofile-abs-path -fprofile-update=atomic", line_directives=True)
    status = run("-m", "coverage", "run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, folder=folder)
    for isa in ("baseline", "avx2"):
        status |= run("-m", "pytest", "-q", "-p", "no:cacheprovider", *COMPILED, folder=folder, NORMEXT_ISA=isa)
    status |= run("-m", "coverage", "combine", "--quiet", folder=folder)
    status |= run("-m", "coverage", "report", folder=folder)
    # Cython's own code comes from files that are not here; a kernel is several functions in one line, one per type; and
    # all that Cython makes of a module has names that gcovr takes for internal.
    gcovr = "-m gcovr --gcov-ignore-errors=source_not_found --merge-mode-functions=separate --merge-lines".split()
    gcovr += ["--include-internal-functions", r"--filter=normext/.*\.pyx", "--filter=src_c/"]
    for objects in sorted(path for path in folder.glob("build/temp*/*") if any(path.rglob("*.gcno"))):
        print(f"\n{objects.name}", flush=True)
        status |= run(*gcovr, str(objects), folder=folder)
    return status


def build(folder: Path, flags: str, line_directives: bool = False) -> None:
    built = build_copy(folder, flags, line_directives=line_directives)
    if built.returncode != 0 or "building without OpenMP" in built.stderr:
        sys.exit(built.stderr)


def copy(folder: Path) -> None:
    """Copy the source tree to a folder, without what was built in it but with Cython's C code."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("src_c", "normext", "tests", "bench", "docs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for made in ROOT.glob("build/temp*/cython"):
        shutil.copytree(made, folder / made.relative_to(ROOT))


def build_copy(
    folder: Path, flags: str = "", *, optimize: str = "-O1", openmp: bool = True, line_directives: bool = False
) -> subprocess.CompletedProcess[str]:
    """Copy the source tree to a folder and build it there in place, with flags for compiler and linker besides its own.

    C code in the source tree that Cython made and that is not older than its source is used as it is, unless
    line_directives asks for C code that refers to its source line by line.
    """
    copy(folder)
    # What setup.py says comes after CFLAGS.
    changes = [(r'"-O\d"', f'"{optimize}"')]
    if line_directives:
        changes += [(r"(cythonize\([^)]*)\)", r"\1, emit_linenums=True, force=True)")]
    setup = (folder / "setup.py").read_text()
    for what, by in changes:
        setup, replaced = re.subn(what, by, setup)
        assert replaced == 1
    (folder / "setup.py").write_text(setup)
    return build_again(folder, flags, openmp=openmp)


def build_again(folder: Path, flags: str = "", *, openmp: bool = True) -> subprocess.CompletedProcess[str]:
    """Build what has changed in a copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": "",
        "NORMEXT_OPENMP": str(int(openmp)),
        "CC": f"{os.environ.get('CC', 'gcc')} {flags}",  # for setup.py's trial program too, which knows no LDFLAGS
        "CFLAGS": flags,  # after Python's own
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace", f"--parallel={os.cpu_count()}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(*arguments: str, folder: Path, before: Sequence[str] = (), **environment: str) -> int:
    """Run Python on what was built."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1", **environment}
    return subprocess.run([*before, sys.executable, *arguments], cwd=folder, env=environment, check=False).returncode


CHECKS = {"address": address, "threads": threads, "memcheck": memcheck, "faults": faults, "coverage": coverage}

if __name__ == "__main__":
    sys.exit(main())
