/* The one place where loops go on threads. */
#ifndef NX_TASKS_H
#define NX_TASKS_H

#include <stddef.h>

/* Runs f(job, 0) to f(job, tasks - 1) on so many threads. One thread needs no
 * parallel region, which takes a microsecond and may find no memory. */
static inline void nx_run_on(int threads, void (*f)(const void *job, ptrdiff_t task),
                             const void *job, ptrdiff_t tasks)
{
#ifdef _OPENMP
    if (threads > 1) {
        ptrdiff_t task; /* MSVC's OpenMP wants it declared here */
#pragma omp parallel for num_threads(threads) schedule(static)
        for (task = 0; task < tasks; task++) f(job, task);
        return;
    }
#endif
    (void)threads;
    for (ptrdiff_t task = 0; task < tasks; task++) f(job, task);
}

#endif
