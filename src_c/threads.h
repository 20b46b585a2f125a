/* OpenMP and the threads of the system, as far as `runtime.pyx` asks for them: all that depends on
 * the compiler. */
#ifndef NX_THREADS_H
#define NX_THREADS_H

#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
enum { NX_OPENMP = _OPENMP };
#else
enum { NX_OPENMP = 0 };
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_procs(void) { return 1; }
#endif

#if defined(_OPENMP) && !defined(_WIN32)
#include <pthread.h>
#include <stdlib.h>

static int nx_forks; /* how often OpenMP's threads have come to an end before a fork */

/* GCC's OpenMP keeps the threads of a parallel region for the next one. A child of fork() has none
 * of them, takes them for its own and waits for ever. So they end before a fork, and parent and
 * child start new ones when they need them. Other OpenMP libraries see to this themselves. */
static void nx_before_fork(void)
{
    nx_forks++;
#if defined(__GNUC__) && !defined(__clang__)
    omp_pause_resource_all(omp_pause_soft);
#endif
}

static int nx_watch_forks(void) { return pthread_atfork(nx_before_fork, NULL, NULL); }

static void *nx_pass(void *gate)
{
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* How many threads, up to so many, a team of `there` threads can become: the others are started,
 * and end again. 0 where there is no memory. */
static int nx_could_be(int threads, int there)
{
    /* More than OpenMP will want for its own account of a team, which finds it free again. */
    pthread_t *volatile others = malloc((size_t)(threads + 8) * 1024);
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    int started = 0;
    if (others == NULL) return 0;
    pthread_mutex_lock(&gate);
    while (there + started < threads && pthread_create(&others[started], NULL, nx_pass, &gate) == 0)
        started++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    free(others);
    return there + started < threads ? there + started : threads;
}

/* How many threads the next parallel region of the calling thread gets if it asks for so many:
 * fewer where the system has no more, and 0 where there is no memory for one. OpenMP ends the
 * process when it can start no thread or has no memory, with one thread too. So both are tried
 * before, and a region without work takes what those that follow find: OpenMP keeps the last team.
 * It ends threads that a smaller team does not need; to have had them a moment ago is enough, for
 * to try costs as much as to start them. */
static int nx_team(int threads)
{
    static _Thread_local struct {
        int now, most, forks;
        double tried; /* when that many were there, in seconds */
    } team = {1, 1, 0, 0};
    double time;
    if (threads == 1) {
        void *volatile room = malloc(2048); /* for a team of one */
        free(room);
        return room != NULL;
    }
    if (team.forks != nx_forks) {
        team.now = team.most = 1;
        team.forks = nx_forks;
    }
    if (threads == team.now) return threads;
    time = omp_get_wtime();
    if (threads > team.most || time - team.tried > 0.1) {
        team.most = threads = nx_could_be(threads, team.now);
        team.tried = time;
        if (threads > 1) {
            int present = 0; /* fewer, where OpenMP has a limit of its own */
#pragma omp parallel num_threads(threads) reduction(+ : present)
            present += 1;
            team.now = present;
        }
    } else {
        team.now = threads;
    }
    return threads;
}
#else
static int nx_watch_forks(void) { return 0; }
static int nx_team(int threads) { return threads; }
#endif

#endif
