/* A lock, forks and pages, as far as `memory.pyx` asks for them: all that depends on the system. */
#ifndef NX_PAGES_H
#define NX_PAGES_H

#include <stddef.h>

#ifdef _WIN32
#include <windows.h>

static SRWLOCK nx_gate = SRWLOCK_INIT;

static void nx_lock(void) { AcquireSRWLockExclusive(&nx_gate); }
static void nx_unlock(void) { ReleaseSRWLockExclusive(&nx_gate); }
static int nx_around_forks(void (*before)(void), void (*after)(void))
{
    (void)before, (void)after;
    return 0;
}
#else
#include <pthread.h>
#include <sys/mman.h>

static pthread_mutex_t nx_gate = PTHREAD_MUTEX_INITIALIZER;

static void nx_lock(void) { pthread_mutex_lock(&nx_gate); }
static void nx_unlock(void) { pthread_mutex_unlock(&nx_gate); }
static int nx_around_forks(void (*before)(void), void (*after)(void))
{ return pthread_atfork(before, after, after); }
#endif

/* Linux's huge pages take 512 faults less each, where they are asked for before the first write:
 * so not of malloc, whose memory may have been used before. And while they are idle the system may
 * take them if memory is short: to say so (MADV_FREE) costs half a microsecond each, of small pages
 * as much as to write them. Then their numbers are lost; whoever writes to them has them again. */
#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
static void *nx_map(size_t size)
{
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}
static void nx_unmap(void *pages, size_t size) { munmap(pages, size); }
static void nx_make_huge(void *pages, size_t size) { madvise(pages, size, MADV_HUGEPAGE); }
static void nx_leave(void *pages, size_t size) { madvise(pages, size, MADV_FREE); }
#else /* `memory.pyx` finds no huge pages */
static void *nx_map(size_t size) { return (void)size, NULL; }
static void nx_unmap(void *pages, size_t size) { (void)pages, (void)size; }
static void nx_make_huge(void *pages, size_t size) { (void)pages, (void)size; }
static void nx_leave(void *pages, size_t size) { (void)pages, (void)size; }
#endif

#endif
