/* Work sharing over the OpenMP runtime that torch has already loaded, so that both use one pool of threads. */
#ifndef MOESAIC_THREADS_H
#define MOESAIC_THREADS_H

/* One task. `worker` is below the number of threads and is held by one thread at a time. */
typedef void (*moesaic_task)(void *context, long task, int worker);

/* Runs tasks 0..tasks-1, each once, on at most `threads` threads; returns when all are done. */
void moesaic_parallel(int threads, long tasks, moesaic_task run, void *context);

/* Scratch memory of the calling thread, 64-byte aligned, at least `bytes` long; valid until its next call. NULL if
 * there is no memory. `slot` separates buffers that live at the same time. */
enum { MOESAIC_SCRATCH_SLOTS = 14 };
void *moesaic_scratch(int slot, long bytes);

#endif
