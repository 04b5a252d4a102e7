/* One pool of threads for all kernels. Its threads sleep between calls, except for a short while after one. */
#pragma once
#include <stdint.h>

typedef void (*PoolTask)(void *context, int64_t index);

void pool_lock(void); /* calls take turns: one runs at a time */
void pool_unlock(void);
int pool_set_threads(int num_threads);
int pool_threads(void);
void pool_end(void);

/* Run task(context, 0 … num_tasks - 1) on all threads, each taking the next free number; returns when all are done. */
void pool_run(PoolTask task, void *context, int64_t num_tasks);

/* Memory for intermediate values, kept from call to call, aligned to 64 bytes; NULL where there is none. What was there
 * before is lost. */
void *pool_workspace(int64_t bytes);
int64_t pool_workspace_bytes(void);
void pool_free_workspace(void);
