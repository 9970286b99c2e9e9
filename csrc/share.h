/* Work shared out to threads. */
#ifndef EVK_SHARE_H
#define EVK_SHARE_H

#include <stdint.h>

#ifdef _OPENMP
#include <fenv.h>
#include <omp.h>
#endif

/* Does the items [first, end). */
typedef void (*work)(const void *task, int64_t first, int64_t end);

/* All of `count` items, in one range a thread. */
static inline void share_out(work do_range, const void *task, int64_t count, int32_t threads) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
        fenv_t callers; /* flush-to-zero is each thread's own: all compute as the caller does */
        fegetenv(&callers);
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            fenv_t own;
            if (self) fegetenv(&own), fesetenv(&callers);
            do_range(task, count * self / team, count * (self + 1) / team);
            if (self) fesetenv(&own);
        }
        return;
    }
#endif
    (void)threads;
    do_range(task, 0, count);
}

#endif
