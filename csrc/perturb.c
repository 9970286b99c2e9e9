#include "perturb.h"

#include "kernels.h"
#include "share.h"
#include "staging.h"

enum { SMALL = 32 * 1024 }; /* numbers below which waking other threads costs more than they save */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Multiplied, then added: not fused, which a processor without it would have to emulate. */
#define ADD_SCALED(real)                                                                         \
    EVK_CLONES static void add_scaled_##real(void *restrict to, const float *restrict noise,     \
                                             double scale, int64_t n) {                          \
        real *values = to;                                                                       \
        for (int64_t i = 0; i < n; ++i) values[i] += (real)scale * (real)noise[i];               \
    }

ADD_SCALED(float)
ADD_SCALED(double)

/* What to do with each block of elements of all tensors. */
typedef struct task {
    void (*on_block)(const struct task *task, const evk_noisy *tensor, int64_t first, int64_t n);
    const evk_noisy *tensors;
    uint64_t seed;
    uint32_t generation, member;
    const double *weights; /* or the only one */
    int64_t members;
} task;

static evk_noise noise_of(const task *task, const evk_noisy *tensor, uint32_t member) {
    const evk_noise noise = {task->seed, task->generation, member, tensor->position};
    return noise;
}

static void perturb_block(const task *task, const evk_noisy *tensor, int64_t first, int64_t n) {
    const int float64 = tensor->format == EVK_FLOAT64;
    const evk_noise noise = noise_of(task, tensor, task->member);
    float drawn[EVK_BLOCK];
    double values[EVK_BLOCK];
    evk_cursor cursor;
    evk_normal(drawn, &noise, first, n);
    evk_place(&cursor, tensor->centre_layout, first);
    evk_gather(values, tensor->centre, &cursor, tensor->format, float64, n);
    (float64 ? add_scaled_double : add_scaled_float)(values, drawn, *task->weights, n);
    evk_place(&cursor, tensor->target_layout, first);
    evk_scatter(values, tensor->target, &cursor, tensor->format, float64, n, NULL);
}

static void estimate_block(const task *task, const evk_noisy *tensor, int64_t first, int64_t n) {
    const int float64 = tensor->format == EVK_FLOAT64;
    float drawn[EVK_BLOCK];
    double sums[EVK_BLOCK] = {0};
    for (int64_t k = 0; k < task->members; ++k) {
        if (task->weights[k] == 0) continue;
        const evk_noise noise = noise_of(task, tensor, (uint32_t)k);
        evk_normal(drawn, &noise, first, n);
        add_scaled_double(sums, drawn, task->weights[k], n);
    }
    float rounded[EVK_BLOCK];
    for (int64_t i = 0; i < n && !float64; ++i) rounded[i] = (float)sums[i];
    evk_cursor cursor;
    evk_place(&cursor, tensor->target_layout, first);
    evk_scatter(float64 ? (void *)sums : rounded, tensor->target, &cursor, tensor->format, float64,
                n, NULL);
}

static int64_t blocks_of(const evk_noisy *tensor) {
    return (tensor->elements + EVK_BLOCK - 1) / EVK_BLOCK;
}

/* Blocks [block, end) of all tensors, one tensor after another. */
static void do_blocks(const void *given, int64_t block, int64_t end) {
    const task *task = given;
    for (const evk_noisy *tensor = task->tensors; block < end; ++tensor) {
        const int64_t blocks = blocks_of(tensor);
        for (int64_t b = block; b < smaller(blocks, end); ++b)
            task->on_block(task, tensor, b * EVK_BLOCK,
                           smaller(EVK_BLOCK, tensor->elements - b * EVK_BLOCK));
        block = block > blocks ? block - blocks : 0;
        end -= blocks;
    }
}

static void share_blocks(const task *task, int64_t count, int32_t threads) {
    int64_t blocks = 0, elements = 0;
    for (int64_t i = 0; i < count; ++i) {
        blocks += blocks_of(&task->tensors[i]);
        elements += task->tensors[i].elements;
    }
    share_out(do_blocks, task, blocks, elements * task->members > SMALL ? threads : 1);
}

void evk_perturb(const evk_noisy *tensors, int64_t count, uint64_t seed, uint32_t generation,
                 uint32_t member, double scale, int32_t threads) {
    const task task = {perturb_block, tensors, seed, generation, member, &scale, 1};
    share_blocks(&task, count, threads);
}

void evk_estimate(const evk_noisy *tensors, int64_t count, uint64_t seed, uint32_t generation,
                  const double *weights, int64_t members, int32_t threads) {
    const task task = {estimate_block, tensors, seed, generation, 0, weights, members};
    share_blocks(&task, count, threads);
}
