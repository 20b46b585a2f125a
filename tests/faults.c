/* Preloaded into Python by `faults.py`: once armed, the k-th allocation fails, or start of a thread, and none after it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long left, live;
static atomic_int fired;

/* OpenMP ends the process where it gets no memory, in every program. normext asks for as much just before, and that is what fails. */
static int is_openmp(void *caller)
{
    Dl_info info;
    return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "gomp");
}

static int fails(void *caller)
{
    /* Disarmed it stays at 0 or below. */
    if (atomic_load_explicit(&left, memory_order_relaxed) <= 0 || atomic_fetch_sub(&left, 1) != 1)
        return 0;
    if (is_openmp(caller)) {
        atomic_store(&left, 1); /* the next one, then */
        return 0;
    }
    atomic_store(&fired, 1);
    errno = ENOMEM;
    return 1;
}

static void *counted(void *memory)
{
    if (memory) atomic_fetch_add_explicit(&live, 1, memory_order_relaxed);
    return memory;
}

void faults_arm(long k)
{
    atomic_store(&fired, 0);
    atomic_store(&left, k);
}

/* Whether the k-th allocation came and failed. */
int faults_disarm(void)
{
    atomic_store(&left, 0);
    return atomic_load(&fired);
}

/* Blocks of memory that were not given back. */
long faults_live(void) { return atomic_load(&live); }

void *malloc(size_t size)
{ return fails(__builtin_return_address(0)) ? NULL : counted(__libc_malloc(size)); }

void *calloc(size_t n, size_t size)
{ return fails(__builtin_return_address(0)) ? NULL : counted(__libc_calloc(n, size)); }

void *realloc(void *memory, size_t size)
{
    if (size > 0 && fails(__builtin_return_address(0))) return NULL;
    void *grown = __libc_realloc(memory, size);
    if (memory == NULL) counted(grown);
    if (memory != NULL && size == 0) atomic_fetch_sub_explicit(&live, 1, memory_order_relaxed);
    return grown;
}

void *memalign(size_t alignment, size_t size)
{ return fails(__builtin_return_address(0)) ? NULL : counted(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    void *found = memalign(alignment, size);
    if (found == NULL) return ENOMEM;
    *memory = found;
    return 0;
}

void free(void *memory)
{
    if (memory) atomic_fetch_sub_explicit(&live, 1, memory_order_relaxed);
    __libc_free(memory);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                   void *argument)
{
    int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
        dlsym(RTLD_NEXT, "pthread_create");
    return fails(__builtin_return_address(0)) ? EAGAIN : create(thread, attributes, run, argument);
}
