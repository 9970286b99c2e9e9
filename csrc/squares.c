/* The sum of the squares of all gradients, the same for every number of threads: a chunk's length
 * depends on the number of elements alone, and the sums of chunks are added in order. */
#ifdef _OPENMP
#include <fenv.h>
#include <omp.h>
#endif

#include "kernels.h"
#include "runtime.h"
#include "staging.h"

enum { CHUNKS = 4096 };          /* at most: their sums are kept, whatever the size of the model */
enum { SHORTEST_CHUNK = 8192 };  /* in elements: shorter ones would not be worth a thread */
enum { LANES = 16 };             /* sums that grow side by side, as vectors do */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Multiplied, then added: not fused, which a processor without it would have to emulate. */
#define ADD_SQUARES(real)                                                                       \
    EVK_CLONES static void add_squares_##real(double *restrict lanes, const real *restrict x,   \
                                              int64_t n) {                                      \
        double sums[LANES];                                                                     \
        for (int k = 0; k < LANES; ++k) sums[k] = lanes[k];                                     \
        int64_t i = 0;                                                                          \
        for (; i + LANES <= n; i += LANES)                                                      \
            for (int k = 0; k < LANES; ++k) sums[k] += (double)x[i + k] * (double)x[i + k];     \
        for (int k = 0; i + k < n; ++k) sums[k] += (double)x[i + k] * (double)x[i + k];         \
        for (int k = 0; k < LANES; ++k) lanes[k] = sums[k];                                     \
    }

ADD_SQUARES(float)
ADD_SQUARES(double)

static void add_squares(double *lanes, const void *x, int float64, int64_t n) {
    if (float64)
        add_squares_double(lanes, x, n);
    else
        add_squares_float(lanes, x, n);
}

/* Elements [first, end) of one gradient. */
static void add_gradient(double *lanes, const evk_tensor *t, const char *gradient, int64_t first,
                         int64_t end) {
    const int format = t->formats[EVK_G];
    const int arithmetic = t->float64 ? EVK_FLOAT64 : EVK_FLOAT32;
    if (!t->layouts[EVK_G] && format == arithmetic) {
        add_squares(lanes, gradient + first * evk_size(format), t->float64, end - first);
        return;
    }
    double buffer[EVK_BLOCK];
    evk_cursor cursor;
    evk_place(&cursor, t->layouts[EVK_G], first);
    for (int64_t n; first < end; first += n) {
        n = smaller(EVK_BLOCK, end - first);
        evk_gather(buffer, gradient, &cursor, format, t->float64, n);
        add_squares(lanes, buffer, t->float64, n);
    }
}

/* Gradients laid end to end, walked from front to back. */
typedef struct {
    const evk_tensor *tensors;
    void *const *gradients;
    int64_t count, tensor, start; /* the tensor at hand and where it starts */
} walk;

/* Elements [first, end), which must not lie before those of an earlier call. */
static double chunk_sum(walk *at, int64_t first, int64_t end) {
    double lanes[LANES] = {0};
    for (; at->tensor < at->count; ++at->tensor) {
        const evk_tensor *t = &at->tensors[at->tensor];
        if (!at->gradients[at->tensor]) continue;
        const int64_t low = first > at->start ? first - at->start : 0;
        const int64_t high = smaller(end - at->start, t->elements);
        if (low < high) add_gradient(lanes, t, at->gradients[at->tensor], low, high);
        if (at->start + t->elements >= end) break; /* the next chunk may begin in this tensor */
        at->start += t->elements;
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return lanes[0];
}

/* Chunks [first, end). */
static void chunk_sums(const evk_tensor *tensors, void *const *gradients, int64_t count,
                       int64_t length, int64_t total, int64_t first, int64_t end, double *sums) {
    walk at = {tensors, gradients, count, 0, 0};
    for (int64_t c = first; c < end; ++c)
        sums[c] = chunk_sum(&at, c * length, smaller((c + 1) * length, total));
}

double evk_sum_of_squares(const evk_tensor *tensors, void *const *gradients, int64_t count,
                          int32_t threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (gradients[i]) total += tensors[i].elements;
    int64_t length = (total / CHUNKS / EVK_BLOCK + 1) * EVK_BLOCK;
    if (length < SHORTEST_CHUNK) length = SHORTEST_CHUNK;
    const int64_t chunks = (total + length - 1) / length;
    double sums[CHUNKS];
#ifdef _OPENMP
    if (threads > 1 && chunks > 1) {
        fenv_t callers; /* as in evk_step */
        fegetenv(&callers);
#pragma omp parallel num_threads(threads)
        {
            const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
            fenv_t own;
            if (self) fegetenv(&own), fesetenv(&callers);
            chunk_sums(tensors, gradients, count, length, total, chunks * self / team,
                       chunks * (self + 1) / team, sums);
            if (self) fesetenv(&own);
        }
    } else
#endif
        chunk_sums(tensors, gradients, count, length, total, 0, chunks, sums);
    (void)threads;
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c];
    return sum;
}
