#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

/* GOMP_parallel of the runtime in use, or NULL: then a call starts threads of its own. Set once, when loaded. */
static parallel_region region;

void moesaic_use_openmp(void *gomp_parallel) { region = (parallel_region)gomp_parallel; }

typedef struct {
    moesaic_task run;
    void *context;
    long tasks;
    atomic_long next;
    atomic_int worker;
} job;

static void *work(void *data) {
    job *shared = data;
    int worker = atomic_fetch_add(&shared->worker, 1);
    for (;;) {
        long task = atomic_fetch_add(&shared->next, 1);
        if (task >= shared->tasks) return NULL;
        shared->run(shared->context, task, worker);
    }
}

static void work_in_region(void *data) { work(data); }

void moesaic_parallel(int threads, long tasks, moesaic_task run, void *context) {
    if (threads > tasks) threads = (int)tasks;
    if (threads <= 1) {
        for (long task = 0; task < tasks; task++) run(context, task, 0);
        return;
    }
    job shared = {.run = run, .context = context, .tasks = tasks};
    if (region) {
        region(work_in_region, &shared, (unsigned)threads, 0);
        return;
    }
    pthread_t others[256];
    int started = 0;
    if (threads > 256) threads = 256;
    while (started < threads - 1 && pthread_create(&others[started], NULL, work, &shared) == 0) started++;
    work(&shared);
    while (started > 0) pthread_join(others[--started], NULL);
}

static _Thread_local struct {
    void *memory;
    long bytes;
} scratch[MOESAIC_SCRATCH_SLOTS];

void *moesaic_scratch(int slot, long bytes) {
    if (bytes > scratch[slot].bytes) {
        free(scratch[slot].memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        scratch[slot].memory = aligned_alloc(64, (size_t)bytes);
        scratch[slot].bytes = scratch[slot].memory ? bytes : 0;
    }
    return scratch[slot].memory;
}
