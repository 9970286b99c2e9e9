#include "runtime.h"

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

/* Elements below which waking other threads costs more than they save. */
enum { SMALL = 1 << 15 };
/* Where one thread's share ends, in elements: whole cache lines of every element type. */
enum { SHARE = 64 };
/* Elements gathered at a time from a tensor that does not lie densely. */
enum { GATHERED = 256 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Offset in elements of logical element `i`, counted in row-major order. */
static int64_t offset_of(int64_t i, const evk_layout *layout, const int64_t *strides) {
    int64_t offset = 0;
    for (int64_t d = layout->dimensions; d-- > 0; i /= layout->shape[d])
        offset += i % layout->shape[d] * strides[d];
    return offset;
}

/* Copy `n` elements, from the `first` on, between a strided tensor and a dense buffer. */
static void copy(char *tensor, char *buffer, int64_t size, int64_t first, int64_t n,
                 const evk_layout *layout, int operand, int into_tensor) {
    for (int64_t i = 0; i < n; ++i) {
        char *element = tensor + offset_of(first + i, layout, layout->strides[operand]) * size;
        if (into_tensor)
            memcpy(element, buffer + i * size, size);
        else
            memcpy(buffer + i * size, element, size);
    }
}

/* Elements [first, end) of a tensor that does not lie densely: through dense buffers. */
static void update_strided(const evk_tensor *t, const void *gradient, const double *scalars,
                           int64_t first, int64_t end) {
    double buffers[4][GATHERED]; /* the largest element is a double */
    char *const tensors[4] = {t->p, (char *)gradient, t->m, t->v};
    const int64_t sizes[4] = {t->element_size, t->element_size, t->moment_size, t->moment_size};
    for (; first < end; first += GATHERED) {
        const int64_t n = smaller(GATHERED, end - first);
        for (int k = 0; k < 4; ++k)
            if (tensors[k])
                copy(tensors[k], (char *)buffers[k], sizes[k], first, n, t->layout, k, 0);
        t->kernel(buffers[0], buffers[1], buffers[2], buffers[3], n, scalars);
        for (int k = 0; k < 4; ++k)
            if (tensors[k] && k != 1)
                copy(tensors[k], (char *)buffers[k], sizes[k], first, n, t->layout, k, 1);
    }
}

static char *advanced(void *tensor, int64_t bytes) {
    return tensor ? (char *)tensor + bytes : NULL;
}

/* Elements [first, end) of one tensor. */
static void update(const evk_tensor *t, const void *gradient, const double *scalars,
                   int64_t first, int64_t end) {
    if (t->layout) {
        update_strided(t, gradient, scalars, first, end);
        return;
    }
    t->kernel(advanced(t->p, first * t->element_size),
              advanced((void *)gradient, first * t->element_size),
              advanced(t->m, first * t->moment_size), advanced(t->v, first * t->moment_size),
              end - first, scalars);
}

/* Elements [first, end) of all tensors laid end to end. */
static void update_range(const evk_tensor *tensors, const void *const *gradients,
                         const double *const *scalars, const int32_t *rows, int64_t count,
                         int64_t first, int64_t end) {
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < end; ++i) {
        if (!gradients[i]) continue;
        const int64_t low = larger(first - start, 0);
        const int64_t high = smaller(end - start, tensors[i].elements);
        if (low < high) update(&tensors[i], gradients[i], scalars[rows[i]], low, high);
        start += tensors[i].elements;
    }
}

void evk_step(const evk_tensor *tensors, const void *const *gradients,
              const double *const *scalars, const int32_t *rows, int64_t count, int32_t threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (gradients[i]) total += tensors[i].elements;
#ifdef _OPENMP
    if (total > SMALL && threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            const int64_t share = (total / team / SHARE + 1) * SHARE;
            update_range(tensors, gradients, scalars, rows, count, self * share,
                         smaller((self + 1) * share, total));
        }
        return;
    }
#endif
    (void)threads;
    update_range(tensors, gradients, scalars, rows, count, 0, total);
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
