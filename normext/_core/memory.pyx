# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Memory for large results: what earlier ones gave back is kept for those to come.

New memory is dear: the system gives it page by page, each at its first write and cleared. A pass
over an array of 64 MiB takes twice as long when its result lies in new memory. So NumPy makes large
arrays with an allocator of ours (NEP 49), set for the length of one allocation. They are arrays
like any other, own their data, and free them through the allocator that they came from.
"""

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport PyObject
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcpy
cimport numpy as cnp

import operator
import os
import sys

import numpy as np

cdef extern from "numpy/arrayobject.h":  # which declarations of older NumPy lack
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *ctx, size_t size) noexcept nogil
        void *(*calloc)(void *ctx, size_t count, size_t size) noexcept nogil
        void *(*realloc)(void *ctx, void *memory, size_t size) noexcept nogil
        void (*free)(void *ctx, void *memory, size_t size) noexcept nogil

    ctypedef struct PyDataMem_Handler:
        char *name
        unsigned char version
        PyDataMemAllocator allocator

    PyObject *PyDataMem_DefaultHandler
    object PyDataMem_SetHandler(object handler)
    object PyDataMem_GetHandler()

cdef extern from "pages.h" nogil:
    void nx_lock() noexcept
    void nx_unlock() noexcept
    int nx_around_forks(void (*before)() noexcept nogil, void (*after)() noexcept nogil) noexcept
    void *nx_map(size_t size) noexcept
    void nx_unmap(void *pages, size_t size) noexcept
    void nx_make_huge(void *pages, size_t size) noexcept
    void nx_leave(void *pages, size_t size) noexcept

cdef enum:
    PAGE = 1 << 12
    HUGE_PAGE = 1 << 21
    HUGE = 1 << 22  # bytes: from there on NumPy too asks for huge pages

cnp.import_array()


# Blocks ------------------------------------------------------------------------------------------


cdef struct Block:  # what is known of the memory that follows it
    Block *newer  # of those given back
    Block *older
    void *start  # for free
    size_t capacity


# Those given back and not taken again, and how many bytes they have; changed with the lock held.
cdef Block *newest = NULL
cdef Block *oldest = NULL
cdef size_t idle = 0
cdef size_t limit  # what idle may be; who reads it without the lock does no harm with an old one
cdef bint huge_pages  # whether the system has them


cdef inline void *memory_of(Block *block) noexcept nogil:
    return block + 1


cdef inline Block *block_of(void *memory) noexcept nogil:
    return <Block *> memory - 1


cdef size_t capacity_for(size_t size) noexcept nogil:
    """Eight capacities from each power of two to the next, so that a block serves all that are
    about as large."""
    cdef size_t step = LARGE >> 3
    if size < LARGE:
        return size
    while step << 4 <= size:
        step <<= 1
    return (size + step - 1) & ~(step - 1)


cdef inline size_t in_huge_pages(size_t capacity) noexcept nogil:
    """How many bytes of a block are whole huge pages."""
    return capacity & ~<size_t> (HUGE_PAGE - 1) if huge_pages and capacity >= HUGE else 0


cdef inline size_t alignment_of(size_t capacity) noexcept nogil:
    """A page, since stores around the caches fill whole lines.

    And because malloc's memory often begins some bytes further into a page than x. Then what is
    read of x seems to wait for what was written just before: addresses are compared within a page.
    """
    return HUGE_PAGE if in_huge_pages(capacity) else PAGE


cdef inline size_t size_of(size_t capacity) noexcept nogil:
    """With room for the description and the alignment; what is not written takes no memory."""
    return sizeof(Block) + alignment_of(capacity) + capacity


cdef Block *new_block(size_t capacity) noexcept nogil:
    cdef size_t pages = in_huge_pages(capacity), size = size_of(capacity)
    cdef char *start = <char *> (nx_map(size) if pages else malloc(size))
    cdef char *memory
    cdef Block *block
    if start == NULL:
        return NULL
    memory = start + size - capacity
    memory -= <uintptr_t> memory % alignment_of(capacity)
    if pages:
        nx_make_huge(memory, pages)
    block = block_of(memory)
    block.start, block.capacity = start, capacity
    return block


cdef void free_block(Block *block) noexcept nogil:
    if in_huge_pages(block.capacity):
        nx_unmap(block.start, size_of(block.capacity))
    else:
        free(block.start)


cdef void link(Block *block) noexcept nogil:
    global newest, oldest, idle
    block.newer, block.older = NULL, newest
    if newest == NULL:
        oldest = block
    else:
        newest.newer = block
    newest = block
    idle += block.capacity


cdef void unlink(Block *block) noexcept nogil:
    global newest, oldest, idle
    if block.newer == NULL:
        newest = block.older
    else:
        block.newer.older = block.older
    if block.older == NULL:
        oldest = block.newer
    else:
        block.older.newer = block.newer
    idle -= block.capacity


cdef void drop_beyond(size_t bytes) noexcept nogil:
    """Those given back longest ago, until so many bytes are left."""
    cdef Block *block
    while idle > bytes:
        block = oldest
        unlink(block)
        free_block(block)


cdef Block *take(size_t capacity) noexcept nogil:
    """The one given back last, of which the caches may still hold some; NULL if there is none."""
    cdef Block *block
    nx_lock()
    block = newest
    while block != NULL and block.capacity != capacity:
        block = block.older
    if block != NULL:
        unlink(block)
    nx_unlock()
    return block


# What the system does around fork(): to keep idle memory would have parent and child copy it.


cdef void before_fork() noexcept nogil:
    nx_lock()
    drop_beyond(0)


cdef void after_fork() noexcept nogil:
    nx_unlock()


# NumPy's interface -------------------------------------------------------------------------------


# Small ones come here too: a large array may be resized, and Python may free and make others while
# NumPy makes ours.


cdef void *allocate(void *_, size_t size) noexcept nogil:
    cdef size_t capacity = capacity_for(size)
    cdef Block *block = take(capacity)
    if block == NULL:
        block = new_block(capacity)
    if block == NULL:
        nx_lock()
        drop_beyond(0)
        nx_unlock()
        block = new_block(capacity)
    return NULL if block == NULL else memory_of(block)


cdef void *allocate_zeros(void *_, size_t count, size_t size) noexcept nogil:
    cdef void *memory
    if size != 0 and count > <size_t> -1 // size:
        return NULL
    memory = allocate(NULL, count * size)
    if memory != NULL:
        memset(memory, 0, count * size)
    return memory


cdef void *reallocate(void *_, void *memory, size_t size) noexcept nogil:
    cdef size_t capacity = block_of(memory).capacity
    cdef void *other
    if capacity_for(size) == capacity:
        return memory
    other = allocate(NULL, size)
    if other != NULL:
        memcpy(other, memory, min(size, capacity))
        give_back(NULL, memory, capacity)
    return other


cdef void give_back(void *_, void *memory, size_t size) noexcept nogil:
    cdef Block *block = block_of(memory)
    cdef size_t pages = in_huge_pages(block.capacity)
    if block.capacity < LARGE or block.capacity > limit:
        free_block(block)
        return
    if pages:
        nx_leave(memory, pages)
    nx_lock()
    link(block)
    drop_beyond(limit)
    nx_unlock()


# Arrays keep the capsule, and the modules of a process stay loaded: so both outlive every array.
cdef PyDataMem_Handler handler
strcpy(handler.name, b"normext")
handler.version = 1
handler.allocator.malloc = allocate
handler.allocator.calloc = allocate_zeros
handler.allocator.realloc = reallocate
handler.allocator.free = give_back
cdef object ours = PyCapsule_New(&handler, b"mem_handler", NULL)


cdef object begin():
    """Arrays are made with our allocator, until NumPy is given back what this returns.

    Not where somebody has set another one, or turned ours off.
    """
    before = PyDataMem_GetHandler()
    if limit and <PyObject *> before == PyDataMem_DefaultHandler:
        PyDataMem_SetHandler(ours)
    return before


cdef cnp.ndarray empty_of_many(int ndim, const Py_ssize_t *dims, int type_number,
                               Py_ssize_t numbers):
    if numbers * cnp.PyArray_DescrFromType(type_number).itemsize < LARGE:
        return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *> dims, type_number, 0)
    before = begin()
    try:
        return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *> dims, type_number, 0)
    finally:
        PyDataMem_SetHandler(before)


cdef cnp.ndarray empty_like_strided(cnp.ndarray x):
    dtype = x.dtype.newbyteorder("=")
    if cnp.PyArray_NBYTES(x) < LARGE:
        return np.empty_like(x, dtype, subok=False)
    before = begin()
    try:
        return np.empty_like(x, dtype, subok=False)
    finally:
        PyDataMem_SetHandler(before)


# How much is kept --------------------------------------------------------------------------------


cdef bint has_huge_pages() except -1:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return "[never]" not in file.read()
    except OSError:  # not Linux
        return False


cdef size_t default_limit() except? 0:
    """Four results of 256 MiB where the system may take their memory, one where it may not; but no
    more than an eighth of what the machine has."""
    cdef size_t size = 1 << 30 if huge_pages else 1 << 28
    wanted = os.environ.get("NORMEXT_MEMORY_CACHE")
    if wanted:
        if not wanted.isdecimal():
            raise ImportError(f"NORMEXT_MEMORY_CACHE={wanted!r} must be a number of bytes")
        return min(int(wanted), sys.maxsize)
    try:
        return min(size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return size


huge_pages = has_huge_pages()
limit = default_limit()
if nx_around_forks(before_fork, after_fork) != 0:
    raise MemoryError("no memory to register what must be done before a fork")


def set_memory_cache(size):
    """Set how much memory of freed results is kept for those to come, in this process from now on.

    Results of 1 MiB and more are written where earlier ones of about their size lay; in new memory
    a call takes twice as long beyond 32 MiB. What was given back longest ago goes first, and all
    goes before a fork and when memory runs out. On Linux with huge pages the system takes what it
    needs from those of 4 MiB and more.

    Parameters
    ----------
    size : int
        In bytes. 0 gives back all that is kept and leaves results to NumPy's own allocator. At
        import that is ``NORMEXT_MEMORY_CACHE`` from the environment, else 1 GiB (256 MiB without
        huge pages), or an eighth of the machine's memory where that is less.

    Returns
    -------
    int
        The number before.

    Raises
    ------
    TypeError
        If size is not an integer.
    ValueError
        If size is negative.

    Examples
    --------
    >>> import normext
    >>> before = normext.set_memory_cache(0)  # gives back all that is kept
    >>> normext.set_memory_cache(before)
    0
    """
    global limit
    cdef size_t before = limit
    try:
        count = operator.index(size)
    except TypeError:
        raise TypeError(f"size must be an integer, got {type(size).__name__}") from None
    if not 0 <= count <= sys.maxsize:
        raise ValueError(f"size must be from 0 to {sys.maxsize}, got {count}")
    nx_lock()
    limit = count
    drop_beyond(limit)
    nx_unlock()
    return before


def memory_cache():
    """How many bytes may be kept, and how many are; for `normext.show_config` and tests."""
    return limit, idle
