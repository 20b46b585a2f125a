"""What is chosen once, at import: the instruction set and the number of threads."""

import operator
import os

from normext cimport NORMEXT_NO_MEMORY, NORMEXT_OK
from normext._core.cores import cpu_quota
from normext._core.kernels cimport (
    NX_BFLOAT16,
    NX_FLOAT16,
    NX_FLOAT32,
    NX_FLOAT64,
    nx_cache,
    nx_compiler,
    nx_isa_count,
    nx_isas,
    nx_kernels,
)

cdef extern from "threads.h" nogil:
    const int NX_OPENMP
    int omp_get_max_threads() noexcept
    int omp_get_num_procs() noexcept
    int nx_watch_forks() noexcept
    int nx_team(int threads) noexcept

cdef enum:
    ELEMENTS_PER_THREAD = 1 << 15  # some 10 microseconds: to start a thread on less takes longer
    STREAMED_ROW = 512  # elements that lie together: of 32 cache lines two are filled in part

cdef int chosen_isa
cdef int num_threads
cdef int openmp_threads  # OpenMP's own number, at import

# Bytes that a call reads and writes from which on its result goes around the caches. Stores into
# the last cache first read the line that they write over. Measured with 1 and 32 MiB of second and
# last cache: from results of 4 MiB on it takes no longer around them, from 12 MiB on half as long,
# also if they are read again next. A last cache that many cores share is not one's own: so the
# second counts too.
cdef Py_ssize_t streamed = min(nx_cache(3) // 2, 12 * nx_cache(2))


cdef const nx_kernels *kernels_for(int element_type, bint stream) noexcept nogil:
    return nx_isas[chosen_isa].tables[stream][element_type]


cdef const nx_kernels *norm_kernels(int element_type, Py_ssize_t elements, Py_ssize_t n,
                                    bint fresh) noexcept nogil:
    """Those for a call that reads and writes so many elements; n of its result lie together.

    A large result goes around the caches, unless it is written over what was just read into them
    (and so is not fresh), or in pieces so short that much of it lies in cache lines that it fills
    in part only.
    """
    cdef const nx_kernels *kernels = kernels_for(element_type, False)
    if fresh and elements * kernels.itemsize >= streamed and n >= STREAMED_ROW:
        return kernels_for(element_type, True)
    return kernels


# Whether norms.pyx says which way each call goes, and for it, the most threads of a call so far.
cdef bint tracing = os.environ.get("NORMEXT_TRACE", "0") not in ("", "0")
cdef int most_threads = 1


cdef int team_for(Py_ssize_t tasks, Py_ssize_t elements) noexcept nogil:
    """How many threads there are for so many tasks over so many elements.

    0 where there is no memory. Results never depend on it.
    """
    global most_threads
    cdef int limit, threads = max(1, min(num_threads, tasks, elements // ELEMENTS_PER_THREAD))
    if threads > 1:
        limit = omp_get_max_threads()
        if limit < openmp_threads:  # somebody has lowered it since: threadpoolctl, or a C program
            threads = min(threads, limit)
    if threads > 1:
        threads = nx_team(threads)
        if tracing:
            most_threads = max(threads, most_threads)
    return threads


cdef int threads_for(Py_ssize_t tasks, Py_ssize_t elements) except 0:
    """The same for loops that OpenMP runs itself."""
    cdef int threads = nx_team(max(1, team_for(tasks, elements)))
    if threads == 0:
        raise MemoryError("no memory for a parallel region")
    return threads


cdef int run_tasks(Task f, const void *job, Py_ssize_t tasks, Py_ssize_t elements) noexcept nogil:
    """`run_on` as many threads as there are for so many elements."""
    cdef int threads = team_for(tasks, elements)
    if threads == 0:
        return NORMEXT_NO_MEMORY
    run_on(threads, f, job, tasks)
    return NORMEXT_OK


cdef int threads_used() noexcept nogil:
    """The most threads of any call since this was asked before."""
    global most_threads
    cdef int used = most_threads
    most_threads = 1
    return used


cdef const char *isa_name() noexcept nogil:
    return nx_isas[chosen_isa].name


cdef list isa_names(bint supported_only):
    return [
        nx_isas[i].name.decode()
        for i in range(nx_isa_count)
        if not supported_only or nx_isas[i].supported()
    ]


cdef int choose_isa() except -1:
    built, supported = isa_names(False), isa_names(True)
    wanted = os.environ.get("NORMEXT_ISA") or supported[-1]
    if wanted not in built:
        raise ImportError(
            f"NORMEXT_ISA={wanted!r} is unknown to this build, which has {', '.join(built)}"
        )
    if wanted not in supported:
        raise ImportError(
            f"NORMEXT_ISA={wanted!r} is not supported by this processor and system; "
            f"{', '.join(supported)} would be"
        )
    return built.index(wanted)


cdef int default_num_threads() except -1:
    wanted = os.environ.get("NORMEXT_NUM_THREADS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ImportError(f"NORMEXT_NUM_THREADS={wanted!r} must be a positive integer")
        return min(int(wanted), 1 << 16)
    # A list there is one number per nesting level.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) >= 1:
        return min(int(wanted), 1 << 16)
    # OpenMP knows which cores this process may run on even where it has bound this thread to one of
    # them (OMP_PROC_BIND). Python's number can be lowered (PYTHON_CPU_COUNT, from 3.13 on).
    return min(omp_get_num_procs(), os.cpu_count() or 1, cpu_quota() or 1 << 16)


chosen_isa = choose_isa()
num_threads = default_num_threads()
openmp_threads = omp_get_max_threads()
if nx_watch_forks() != 0:
    raise MemoryError("no memory to register what must be done before a fork")


def get_num_threads():
    """The number of threads that a call may use.

    Returns
    -------
    int
        At import that is ``NORMEXT_NUM_THREADS`` from the environment, else ``OMP_NUM_THREADS``,
        else one for each core that this process may run on, and no more than its control group has
        time for. Where threadpoolctl limits OpenMP to fewer, or the system starts no more, calls
        use fewer, and this number stays.

    See Also
    --------
    set_num_threads, threads

    Examples
    --------
    >>> import normext
    >>> with normext.threads(1):
    ...     normext.get_num_threads()
    1
    """
    return num_threads


def set_num_threads(n):
    """Set the number of threads that a call may use, in this process from now on.

    Small arrays are left to one thread all the same. Results are bit-identical for every number of
    threads. In a build without OpenMP the number is kept but one thread does the work. A child of
    ``os.fork()`` keeps the number and starts threads of its own.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is less than 1.

    See Also
    --------
    threads : the same for the length of a block.

    Examples
    --------
    >>> import normext
    >>> before = normext.get_num_threads()
    >>> normext.set_num_threads(2)
    >>> normext.get_num_threads()
    2
    >>> normext.set_num_threads(before)
    """
    global num_threads
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {type(n).__name__}") from None
    if not 1 <= count <= 1 << 16:
        raise ValueError(f"n must be from 1 to {1 << 16}, got {count}")
    num_threads = count


def config():
    """What this build and this process run on, as a dict; `normext.show_config` prints it."""
    return {
        "compiler": nx_compiler().decode(),
        "instruction sets built": isa_names(False),
        "supported here": isa_names(True),
        "in use": nx_isas[chosen_isa].name.decode(),
        "OpenMP": NX_OPENMP or None,
        "threads": num_threads,
        "caches": [f"{nx_cache(level) >> 10} KiB" for level in (2, 3)],
    }


def kernel_tables():
    """For tests: the addresses of the tables of kernels that this machine runs, by instruction set,
    element type and whether they write around the caches."""
    types = {NX_FLOAT32: "float32", NX_FLOAT64: "float64", NX_FLOAT16: "float16",
             NX_BFLOAT16: "bfloat16"}
    return {
        (nx_isas[i].name.decode(), name, bool(stream)): <size_t> nx_isas[i].tables[stream][type]
        for i in range(nx_isa_count) if nx_isas[i].supported()
        for type, name in types.items() for stream in range(2)
    }
