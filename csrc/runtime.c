#include "runtime.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <fenv.h>
#include <omp.h>
#endif

#include "kernels.h"
#include "random.h"
#include "staging.h"

/* Elements below which waking other threads costs more than they save. */
enum { SMALL = 1 << 15 };
/* Where one thread's share ends, in elements: whole cache lines of every element type. */
enum { SHARE = 64 };
/* Elements after which gradients are cleared: still in the cache, and many enough for a kernel. */
enum { CLEARED = 2048 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Zeros into elements [first, end) of a gradient. */
static void clear_gradient(const evk_tensor *t, void *gradient, int64_t first, int64_t end) {
    evk_cursor cursor;
    evk_place(&cursor, t->layouts[EVK_G], first);
    evk_clear(gradient, &cursor, t->formats[EVK_G], end - first);
}

/* Elements [first, end) by a kernel that reads and writes the tensors themselves. */
static void update_direct(const evk_tensor *t, void *gradient, const evk_numbers *numbers,
                          int64_t first, int64_t end) {
    void *operands[EVK_OPERANDS];
    for (int k = 0; k < t->operands; ++k) {
        char *tensor = k == EVK_G ? gradient : t->tensors[k];
        operands[k] = tensor ? tensor + first * evk_size(t->formats[k]) : NULL;
    }
    t->kernel(operands, end - first, numbers->scalars);
}

/* Elements [first, end) by a kernel of the arithmetic type: what is stored or lies otherwise goes
 * through buffers, block by block. */
static void update_staged(const evk_tensor *t, void *gradient, const evk_numbers *numbers,
                          int64_t first, int64_t end, int clear) {
    double buffers[EVK_OPERANDS][EVK_BLOCK]; /* the larger arithmetic type */
    uint16_t bits[EVK_RANDOM_BITS];
    evk_cursor reading[EVK_OPERANDS], writing[EVK_OPERANDS];
    char *tensors[EVK_OPERANDS];
    const int arithmetic = t->float64 ? EVK_FLOAT64 : EVK_FLOAT32;
    int in_place[EVK_OPERANDS];
    for (int k = 0; k < t->operands; ++k) {
        tensors[k] = k == EVK_G ? gradient : t->tensors[k];
        in_place[k] = !tensors[k] || (!t->layouts[k] && t->formats[k] == arithmetic);
        evk_place(&reading[k], t->layouts[k], first);
        evk_place(&writing[k], t->layouts[k], first);
    }
    for (int64_t n; first < end; first += n) {
        /* blocks begin where they do for every number of threads: random bits come in eights */
        n = smaller(EVK_BLOCK - first % EVK_BLOCK, end - first);
        void *operands[EVK_OPERANDS];
        for (int k = 0; k < t->operands; ++k) {
            operands[k] = buffers[k];
            if (!tensors[k])
                operands[k] = NULL;
            else if (in_place[k])
                operands[k] = tensors[k] + first * evk_size(arithmetic);
            else
                evk_gather(buffers[k], tensors[k], &reading[k], t->formats[k], t->float64, n);
        }
        t->kernel(operands, n, numbers->scalars);
        for (int k = 0; k < t->operands; ++k) {
            if (in_place[k] || k == EVK_G) continue;
            const uint16_t *random = NULL;
            if (t->stochastic && t->formats[k] == EVK_BFLOAT16) {
                const evk_stream stream = {t->seed, k, t->position, (uint32_t)numbers->t};
                random = evk_random_bits(bits, &stream, first, n);
            }
            evk_scatter(buffers[k], tensors[k], &writing[k], t->formats[k], t->float64, n, random);
        }
        if (clear) evk_clear(gradient, &writing[EVK_G], t->formats[EVK_G], n);
    }
}

void evk_update(const evk_tensor *t, void *gradient, const evk_numbers *numbers, int64_t first,
                int64_t end, int32_t clear) {
    if (t->staged) {
        update_staged(t, gradient, numbers, first, end, clear);
        return;
    }
    const int64_t block = clear ? CLEARED : end - first;
    for (int64_t n; first < end; first += n) {
        n = smaller(block, end - first);
        update_direct(t, gradient, numbers, first, first + n);
        if (clear) clear_gradient(t, gradient, first, first + n);
    }
}

/* Elements [first, end) of all tensors laid end to end. */
static void update_range(const evk_tensor *tensors, void *const *gradients,
                         const evk_numbers *numbers, const int32_t *rows, int64_t count,
                         int64_t first, int64_t end, int clear) {
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < end; ++i) {
        if (!gradients[i]) continue;
        const int64_t low = larger(first - start, 0);
        const int64_t high = smaller(end - start, tensors[i].elements);
        if (low < high)
            evk_update(&tensors[i], gradients[i], &numbers[rows[i]], low, high, clear);
        start += tensors[i].elements;
    }
}

static int by_start(const void *a, const void *b) {
    const evk_span *one = a, *other = b;
    return (one->start > other->start) - (one->start < other->start);
}

/* Whether clearing one element of a gradient may change another one. */
static int share_memory(const evk_tensor *tensors, void *const *gradients, int64_t count,
                        evk_span *spans) {
    int sorted = 1;
    for (int64_t i = 0; i < count; ++i) {
        const evk_tensor *t = &tensors[spans[i].tensor];
        const char *start = gradients[spans[i].tensor];
        int64_t reach = t->elements - 1;
        const evk_layout *layout = t->layouts[EVK_G];
        if (layout) {
            reach = 0;
            for (int64_t d = 0; d < layout->dimensions; ++d)
                reach += (layout->shape[d] - 1) * layout->strides[d];
        }
        if (start && t->gradient_overlaps) return 1;
        spans[i].start = start;
        spans[i].end = start ? start + (reach + 1) * evk_size(t->formats[EVK_G]) : NULL;
        sorted &= i == 0 || by_start(&spans[i - 1], &spans[i]) <= 0;
    }
    /* allocators hand out the same addresses step after step: mostly there is nothing to sort */
    if (!sorted) qsort(spans, count, sizeof *spans, by_start);
    for (int64_t i = 1; i < count; ++i)
        if (spans[i].start < spans[i - 1].end) return 1;
    return 0;
}

/* What all gradients add up to. */
static int64_t elements_of(const evk_tensor *tensors, void *const *gradients, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (gradients[i]) total += tensors[i].elements;
    return total;
}

void evk_step(const evk_tensor *tensors, void *const *gradients, const evk_numbers *numbers,
              const int32_t *rows, int64_t count, int32_t threads, int32_t clear,
              evk_span *spans) {
    const int64_t total = elements_of(tensors, gradients, count);
    const int clear_afterwards = clear && share_memory(tensors, gradients, count, spans);
    const int clear_at_once = clear && !clear_afterwards;
#ifdef _OPENMP
    if (threads > 1 && total > SMALL) {
        fenv_t callers; /* flush-to-zero mode is each thread's own: all compute as the caller does */
        fegetenv(&callers);
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            const int64_t share = (total / team / SHARE + 1) * SHARE;
            fenv_t own;
            if (self) fegetenv(&own), fesetenv(&callers);
            update_range(tensors, gradients, numbers, rows, count, self * share,
                         smaller((self + 1) * share, total), clear_at_once);
            if (self) fesetenv(&own);
        }
    } else
#endif
        update_range(tensors, gradients, numbers, rows, count, 0, total, clear_at_once);
    (void)threads;
    for (int64_t i = 0; clear_afterwards && i < count; ++i)
        if (gradients[i]) clear_gradient(&tensors[i], gradients[i], 0, tensors[i].elements);
}

const char *evk_instruction_set(void) {
#ifdef EVK_DISPATCH
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
    return "x86-64";
#else
    return "baseline";
#endif
}
