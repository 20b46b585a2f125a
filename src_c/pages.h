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

/* Linux's huge pages: 512 faults less each, and MADV_FREE, which lets the system take them while
 * they are idle, should memory be short, costs half a microsecond each. Of small pages it would
 * cost as much as to write them. What they hold is then lost; whoever writes them has them again.
 * A system that knows neither says no, and nothing is lost. */
#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
static void nx_want_huge_pages(void *pages, size_t size) { madvise(pages, size, MADV_HUGEPAGE); }
static void nx_leave_pages(void *pages, size_t size) { madvise(pages, size, MADV_FREE); }
#else
static void nx_want_huge_pages(void *pages, size_t size) { (void)pages, (void)size; }
static void nx_leave_pages(void *pages, size_t size) { (void)pages, (void)size; }
#endif

#endif
