#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define SPIN_NANOSECONDS 60000 /* how long a thread looks for more work before it sleeps */
#define CLOSED (INT64_MAX / 2) /* a number that no task has */

typedef struct {
    PoolTask task;
    void *context;
} Work;

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t knock = PTHREAD_COND_INITIALIZER;
static pthread_t threads[MAX_THREADS];
static atomic_int num_workers;
static int wanted_threads;
static int has_fork_handler;
static Work work;
/* Each thread has a range of the tasks, and its next number; neighbours in number are neighbours in memory, too. */
static struct {
    _Alignas(64) _Atomic int64_t next;
    int64_t end;
} ranges[MAX_THREADS];
static atomic_uint round_number; /* a new one is new work */
static atomic_int num_inside, num_asleep;
static atomic_int ending;
static atomic_uint round_at_start; /* of the workers */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void close_ranges(void) {
    for (int i = 0; i <= num_workers; i++) atomic_store(&ranges[i].next, CLOSED);
}

/* A thread goes through its own range, then helps with the others'. It counts as inside before it takes a number, and a
 * round is over once the ranges are closed and nobody is inside: a thread that comes late, or gets no processor before
 * it has a task, holds up nobody. `work` and the ends are read with a number of an open round only. */
static void take_tasks(int self) {
    atomic_fetch_add(&num_inside, 1);
    for (int i = 0, num_ranges = num_workers + 1; i < num_ranges; i++) {
        int range = (self + i) % num_ranges;
        for (;;) {
            int64_t index = atomic_fetch_add(&ranges[range].next, 1);
            if (index >= CLOSED || index >= ranges[range].end) break;
            work.task(work.context, index);
        }
    }
    atomic_fetch_sub(&num_inside, 1);
}

/* Wait until the round is no longer `seen`: looking for a while, then asleep. */
static unsigned wait_for_round(unsigned seen) {
    unsigned current;
    int64_t until = 0;
    for (unsigned looks = 0;; looks++) {
        if ((current = atomic_load_explicit(&round_number, memory_order_acquire)) != seen) return current;
        relax();
        if (looks % 64) continue;
        int64_t time = now();
        if (!until) until = time + SPIN_NANOSECONDS;
        if (time > until) break;
    }
    pthread_mutex_lock(&door);
    atomic_fetch_add(&num_asleep, 1);
    while ((current = atomic_load(&round_number)) == seen) pthread_cond_wait(&knock, &door);
    atomic_fetch_sub(&num_asleep, 1);
    pthread_mutex_unlock(&door);
    return current;
}

static void *worker(void *number) {
    unsigned seen = round_at_start;
    for (;;) {
        seen = wait_for_round(seen);
        if (atomic_load(&ending)) return NULL;
        take_tasks((int)(intptr_t)number);
    }
}

static void new_round(void) {
    atomic_fetch_add(&round_number, 1);
    if (!atomic_load(&num_asleep)) return;
    pthread_mutex_lock(&door);
    pthread_cond_broadcast(&knock);
    pthread_mutex_unlock(&door);
}

/* A forked child has none of the threads, and perhaps a lock that nobody will open. */
static void after_fork(void) {
    static const pthread_mutex_t open = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t quiet = PTHREAD_COND_INITIALIZER;
    turn = open, door = open, knock = quiet;
    close_ranges();
    num_workers = 0;
    atomic_store(&num_asleep, 0);
    atomic_store(&num_inside, 0);
    atomic_store(&ending, 0);
}

static void start_workers(void) {
    if (!has_fork_handler) has_fork_handler = !pthread_atfork(NULL, NULL, after_fork);
    int wanted = pool_threads() - 1;
    while (num_workers < wanted) {
        round_at_start = atomic_load(&round_number);
        atomic_store(&ranges[num_workers + 1].next, CLOSED);
        void *number = (void *)(intptr_t)(num_workers + 1);
        if (pthread_create(&threads[num_workers], NULL, worker, number)) return;
        num_workers++;
    }
}

void pool_lock(void) { pthread_mutex_lock(&turn); }

void pool_unlock(void) { pthread_mutex_unlock(&turn); }

int pool_threads(void) {
    if (!wanted_threads) {
        int count = (int)sysconf(_SC_NPROCESSORS_ONLN);
        wanted_threads = count < MAX_THREADS ? count : MAX_THREADS;
    }
    return wanted_threads;
}

int pool_set_threads(int num_threads) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return -1;
    pool_end();
    wanted_threads = num_threads;
    return 0;
}

void pool_end(void) {
    if (!num_workers) return;
    atomic_store(&ending, 1);
    new_round();
    for (int i = 0; i < num_workers; i++) pthread_join(threads[i], NULL);
    num_workers = 0;
    atomic_store(&ending, 0);
}

void pool_run(PoolTask task, void *context, int64_t num_tasks) {
    if (num_tasks > 1) start_workers();
    if (num_tasks <= 1 || !num_workers) {
        for (int64_t i = 0; i < num_tasks; i++) task(context, i);
        return;
    }
    work = (Work){task, context};
    for (int i = 0; i <= num_workers; i++) ranges[i].end = num_tasks * (i + 1) / (num_workers + 1);
    for (int i = 0; i <= num_workers; i++) atomic_store(&ranges[i].next, num_tasks * i / (num_workers + 1));
    new_round();
    take_tasks(0);
    close_ranges();
    for (unsigned looks = 0; atomic_load(&num_inside); looks++) {
        relax();
        if (looks > 1u << 14) sched_yield(); /* another program has our thread's processor */
    }
}

static void *workspace;
static int64_t workspace_bytes;

void *pool_workspace(int64_t bytes) {
    if (bytes > workspace_bytes) {
        pool_free_workspace();
        workspace = aligned_alloc(64, (size_t)((bytes + 63) & ~(int64_t)63));
        if (workspace) workspace_bytes = bytes;
    }
    return workspace;
}

int64_t pool_workspace_bytes(void) { return workspace_bytes; }

void pool_free_workspace(void) {
    free(workspace);
    workspace = NULL;
    workspace_bytes = 0;
}
