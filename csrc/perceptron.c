#include "perceptron.h"

#include "kernels.h"
#include "share.h"

#ifdef EVK_DISPATCH
#include <immintrin.h>
#endif

/* Samples lie side by side: each row of a block is one number of EVK_SAMPLES samples. What a block
 * needs on its way through the layers stays in the caches next to the core. */
enum { LANES = 16, STRETCH = 16 * EVK_SAMPLES };

/* Multiplications below which waking other threads costs more than they save. */
enum { SMALL = 1 << 22 };

static int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Multiplication and addition in one where the processor can: each sum is taken in the order of
 * the inputs, so that its bits are the same wherever it can. */
#if defined(__GNUC__) && !defined(__clang__)
#define FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define FUSED
#endif

#define LOAD(type, from)                                                                       \
    (__extension__({                                                                           \
        type loaded;                                                                           \
        memcpy(&loaded, from, sizeof loaded);                                                  \
        loaded;                                                                                \
    }))

void evk_arrange(const float *rows, int64_t samples, int64_t columns, float *blocks) {
    for (; samples > 0; samples -= EVK_SAMPLES) {
        const int64_t n = samples < EVK_SAMPLES ? samples : EVK_SAMPLES;
        for (int64_t first = 0; first < columns; first += LANES) { /* a cache line of each row */
            const int64_t end = first + LANES < columns ? first + LANES : columns;
            for (int64_t c = first; c < end; ++c, blocks += EVK_SAMPLES) {
                for (int64_t s = 0; s < n; ++s) blocks[s] = rows[s * columns + c];
                for (int64_t s = n; s < EVK_SAMPLES; ++s) blocks[s] = 0;
            }
        }
        rows += n * columns;
    }
}

typedef void (*product)(const evk_dense *layer, const float *weight, const float *bias,
                        const float *x, float *y);

/* Outputs whose sums are in registers together, and the most vectors of samples for each; inputs
 * that meet all outputs before the next ones are fetched from farther caches. */
enum { TILE = 5, ROW = 8, DEPTH = 64 };

/* y (outputs, EVK_SAMPLES) of x (inputs, EVK_SAMPLES), relu included. Written for vectors of the
 * processor's own length: gcc takes longer ones apart, number by number. `columns` of them and
 * TILE outputs, or twice as many and half the outputs, are as many sums as there are registers
 * for, and enough of them that none waits for the one before it. `largest` is the larger one of a
 * floor and a number, or the number where it is NaN. */
#define PRODUCT(name, lanes, columns, largest, TARGET)                                         \
    typedef float vector_##name __attribute__((vector_size(4 * lanes)));                       \
                                                                                               \
    /* Adds `depth` inputs to sums that begin with `bias`, or, where it is NULL, with y. */    \
    __attribute__((always_inline)) FUSED TARGET static inline void tile_##name(                \
        const int outputs, const int vectors, int64_t depth, int64_t inputs,                   \
        const float *weight, const float *bias, const float *x, float *y, float floor) {       \
        const vector_##name low = (vector_##name){0} + floor;                                  \
        for (int s = 0; s < EVK_SAMPLES; s += vectors * lanes) {                               \
            vector_##name sums[TILE][ROW];                                                     \
            _Pragma("GCC unroll 8") for (int o = 0; o < outputs; ++o)                          \
                _Pragma("GCC unroll 8") for (int v = 0; v < vectors; ++v)                      \
                    sums[o][v] =                                                               \
                        bias ? (vector_##name){0} + bias[o]                                    \
                             : LOAD(vector_##name, y + o * EVK_SAMPLES + s + v * lanes);       \
            for (int64_t i = 0; i < depth; ++i)                                                \
                _Pragma("GCC unroll 8") for (int v = 0; v < vectors; ++v) {                    \
                    const vector_##name in =                                                   \
                        LOAD(vector_##name, x + i * EVK_SAMPLES + s + v * lanes);              \
                    _Pragma("GCC unroll 8") for (int o = 0; o < outputs; ++o)                  \
                        sums[o][v] += weight[o * inputs + i] * in;                             \
                }                                                                              \
            _Pragma("GCC unroll 8") for (int o = 0; o < outputs; ++o)                          \
                _Pragma("GCC unroll 8") for (int v = 0; v < vectors; ++v) {                    \
                    const vector_##name kept = largest(low, sums[o][v]);                       \
                    memcpy(y + o * EVK_SAMPLES + s + v * lanes, &kept, sizeof kept);           \
                }                                                                              \
        }                                                                                      \
    }                                                                                          \
                                                                                               \
    FUSED TARGET static void multiply_##name(const evk_dense *layer, const float *weight,      \
                                             const float *bias, const float *x, float *y) {    \
        const int64_t inputs = layer->inputs;                                                  \
        for (int64_t i = 0; i == 0 || i < inputs; i += DEPTH) {                                \
            const int64_t depth = inputs - i < DEPTH ? inputs - i : DEPTH;                     \
            const int relu = layer->activation == EVK_RELU && i + depth == inputs;             \
            const float floor = relu ? 0.0f : -INFINITY, *from = x + i * EVK_SAMPLES;          \
            for (int64_t o = 0; o < layer->outputs; o += TILE) {                               \
                const float *w = weight + o * inputs + i, *start = i ? 0 : bias + o;           \
                float *to = y + o * EVK_SAMPLES;                                               \
                switch (layer->outputs - o) {                                                  \
                    case 1: ADD(name, 1, 2 * columns); break;                                  \
                    case 2: ADD(name, 2, 2 * columns); break;                                  \
                    case 3: ADD(name, 3, columns); break;                                      \
                    case 4: ADD(name, 4, columns); break;                                      \
                    default: ADD(name, TILE, columns);                                         \
                }                                                                              \
            }                                                                                  \
        }                                                                                      \
    }

#define ADD(name, outputs, vectors)                                                            \
    tile_##name(outputs, vectors, depth, inputs, w, start, from, to, floor)

typedef int32_t integers_any __attribute__((vector_size(16)));

#define LARGER(low, x)                                                                         \
    ((vector_any)(((integers_any)(low) & ((x) < (low))) |                                      \
                  ((integers_any)(x) & ~((x) < (low)))))

PRODUCT(any, 4, 2, LARGER, )

#ifdef EVK_DISPATCH
/* these give the second number where either is NaN */
PRODUCT(v3, 8, 2, _mm256_max_ps, __attribute__((target("arch=x86-64-v3"))))
PRODUCT(v4, 16, 4, _mm512_max_ps, __attribute__((target("arch=x86-64-v4"))))
#endif

static product product_here(void) {
#ifdef EVK_DISPATCH
    if (__builtin_cpu_supports("x86-64-v4")) return multiply_v4;
    if (__builtin_cpu_supports("x86-64-v3")) return multiply_v3;
#endif
    return multiply_any;
}

/* e^x = scale * (1 + rest). */
typedef struct {
    float scale, rest;
} power;

/* For |x| <= 87, where the scale is a normal number. */
EVK_INLINE power power_of(float x) {
    const float shift = 0x1.8p23f, shifted = x * 1.442695041f + shift; /* rounded to an integer */
    const float whole = shifted - shift;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2, in two parts */
    /* |r| <= ln 2 / 2: the next term of the series is below 2^-27 */
    const float tail = 1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)));
    const float rest = r + r * r * (0.5f + r * (1.0f / 6 + r * tail));
    const power result = {float_of((bits_of(shifted) << 23) + bits_of(1.0f)), rest};
    return result;
}

/* e^x for x <= 0, at least e^-87. */
EVK_INLINE float decayed(float x) {
    const power p = power_of(x < -87.0f ? -87.0f : x);
    return p.scale + p.scale * p.rest;
}

/* From 10 on it is 1. */
EVK_INLINE float tanh_of(float x) {
    const float size = fabsf(x);
    const power p = power_of(2 * (size > 10.0f ? 10.0f : size));
    const float less_one = p.scale * p.rest + (p.scale - 1); /* keeps the digits of a small x */
    return copysignf(less_one / (less_one + 2), x);
}

EVK_INLINE float sigmoid_of(float x) {
    const float z = decayed(-fabsf(x));
    return (x < 0.0f ? z : 1.0f) / (1.0f + z);
}

EVK_CLONES static void apply_tanh(float *y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = tanh_of(y[i]);
}

EVK_CLONES static void apply_sigmoid(float *y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = sigmoid_of(y[i]);
}

/* The losses of a block of n samples: z (outputs, EVK_SAMPLES), y as evk_samples has it. */

EVK_INLINE double square(double x) { return x * x; }

/* Added to `sums`, that of each sample to one of them: they are added up once a stretch. */
EVK_CLONES static void squares(const float *z, const float *y, int64_t outputs, int64_t n,
                               double *restrict sums) {
    for (; outputs; --outputs, z += EVK_SAMPLES, y += EVK_SAMPLES) {
        int64_t s = 0;
        for (; s + LANES <= n; s += LANES)
            for (int l = 0; l < LANES; ++l) sums[l] += square(z[s + l] - y[s + l]);
        for (; s < n; ++s) sums[s % LANES] += square(z[s] - y[s]);
    }
}

EVK_CLONES static double cross_entropy(const float *z, const int32_t *y, int64_t outputs,
                                       int64_t n) {
    float largest[EVK_SAMPLES], own[EVK_SAMPLES] = {0}, total[EVK_SAMPLES] = {0};
    memcpy(largest, z, sizeof largest);
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t s = 0; s < EVK_SAMPLES; ++s) {
            const float one = z[o * EVK_SAMPLES + s];
            largest[s] = one > largest[s] ? one : largest[s];
            own[s] = y[s] == o ? one : own[s];
        }
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t s = 0; s < EVK_SAMPLES; ++s)
            total[s] += decayed(z[o * EVK_SAMPLES + s] - largest[s]);
    double sum = 0, factors = 1; /* the sum of their logarithms is the logarithm of the product */
    for (int64_t s = 0; s < n; ++s) {
        sum += largest[s] - own[s];
        factors *= total[s];
        if (factors > 0x1p900) sum += log(factors), factors = 1;
    }
    return sum + log(factors);
}

EVK_CLONES static double mistakes(const float *z, const int32_t *y, int64_t outputs, int64_t n) {
    float largest[EVK_SAMPLES];
    int32_t place[EVK_SAMPLES] = {0}, broken[EVK_SAMPLES] = {0};
    memcpy(largest, z, sizeof largest);
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t s = 0; s < EVK_SAMPLES; ++s) {
            const float one = z[o * EVK_SAMPLES + s];
            place[s] = one > largest[s] ? (int32_t)o : place[s];
            largest[s] = one > largest[s] ? one : largest[s];
            broken[s] |= one != one;
        }
    int64_t wrong = 0;
    for (int64_t s = 0; s < n; ++s) wrong += broken[s] | (place[s] != y[s]);
    return wrong;
}

typedef struct {
    const evk_dense *layers;
    int64_t count;
    const evk_population *population;
    const evk_samples *samples;
    float *room;
    double *sums;
    product multiply;
    int64_t numbers, row; /* of a member, and of a layer's outputs: floats */
    int64_t stretches, slots;
} scoring;

static int64_t numbers_of(const evk_dense *layer) {
    return layer->weight.elements + layer->outputs;
}

static int64_t numbers_in(const evk_dense *layers, int64_t count) {
    int64_t numbers = 0;
    for (int64_t k = 0; k < count; ++k) numbers += numbers_of(&layers[k]);
    return rounded_up(numbers, LANES);
}

static int64_t widest_row(const evk_dense *layers, int64_t count) {
    int64_t widest = 0;
    for (int64_t k = 0; k < count; ++k)
        widest = widest < layers[k].outputs ? layers[k].outputs : widest;
    return widest * EVK_SAMPLES;
}

int64_t evk_perceptron_room(const evk_dense *layers, int64_t count) {
    return numbers_in(layers, count) + 2 * widest_row(layers, count);
}

static int64_t stretches_of(const evk_samples *samples) {
    return (samples->samples + STRETCH - 1) / STRETCH;
}

int64_t evk_perceptron_sums(const evk_population *population, const evk_samples *samples) {
    return population->members * stretches_of(samples);
}

/* A member's numbers: of each layer the weight, then the bias, zeros where it has none. */
static void make_member(const scoring *t, int64_t member, float *numbers) {
    const evk_population *of = t->population;
    for (int64_t k = 0; k < t->count; ++k) {
        evk_noisy tensors[] = {t->layers[k].weight, t->layers[k].bias};
        tensors[0].target = numbers;
        tensors[1].target = memset(numbers + tensors[0].elements, 0,
                                   t->layers[k].outputs * sizeof *numbers);
        evk_perturb(tensors, 2, of->seed, of->generation, of->noises[member], of->scales[member],
                    1);
        numbers += numbers_of(&t->layers[k]);
    }
}

/* The loss of a block, or a part of it: the rest is added to `sums`; `rows` is room for two layers'
 * outputs. */
static double block_loss(const scoring *t, const float *numbers, float *rows, int64_t block,
                         double *sums) {
    const float *x = t->samples->x + block * t->layers[0].inputs * EVK_SAMPLES;
    for (int64_t k = 0; k < t->count; ++k) {
        const evk_dense *layer = &t->layers[k];
        float *y = rows + k % 2 * t->row;
        t->multiply(layer, numbers, numbers + layer->weight.elements, x, y);
        if (layer->activation == EVK_TANH) apply_tanh(y, layer->outputs * EVK_SAMPLES);
        if (layer->activation == EVK_SIGMOID) apply_sigmoid(y, layer->outputs * EVK_SAMPLES);
        numbers += numbers_of(layer);
        x = y;
    }
    const int64_t outputs = t->layers[t->count - 1].outputs, first = block * EVK_SAMPLES;
    const int64_t left = t->samples->samples - first, n = left < EVK_SAMPLES ? left : EVK_SAMPLES;
    const int32_t *classes = (const int32_t *)t->samples->y + first;
    switch (t->samples->loss) {
        case EVK_SQUARES:
            squares(x, (const float *)t->samples->y + first * outputs, outputs, n, sums);
            return 0;
        case EVK_CROSS_ENTROPY: return cross_entropy(x, classes, outputs, n);
        default: return mistakes(x, classes, outputs, n);
    }
}

/* Every member meets every stretch of samples; they fall to the slots in that order, so that each
 * slot makes few members. */
static void score_slots(const void *task, int64_t first, int64_t end) {
    const scoring *t = task;
    const int64_t items = t->population->members * t->stretches;
    const int64_t blocks = (t->samples->samples + EVK_SAMPLES - 1) / EVK_SAMPLES;
    for (int64_t slot = first; slot < end; ++slot) {
        float *numbers = t->room + slot * (t->numbers + 2 * t->row);
        float *rows = numbers + t->numbers;
        int64_t made = -1;
        for (int64_t i = items * slot / t->slots; i < items * (slot + 1) / t->slots; ++i) {
            const int64_t member = i / t->stretches;
            if (member != made) make_member(t, made = member, numbers);
            double sum = 0, sums[LANES] = {0};
            int64_t block = i % t->stretches * (STRETCH / EVK_SAMPLES);
            const int64_t stop = block + STRETCH / EVK_SAMPLES;
            for (; block < stop && block < blocks; ++block)
                sum += block_loss(t, numbers, rows, block, sums);
            for (int l = 0; l < LANES; ++l) sum += sums[l];
            t->sums[i] = sum;
        }
    }
}

void evk_population_losses(const evk_dense *layers, int64_t count,
                           const evk_population *population, const evk_samples *samples,
                           double *losses, float *room, double *sums, int32_t threads) {
    const int64_t numbers = numbers_in(layers, count);
    if ((double)numbers * population->members * samples->samples <= SMALL) threads = 1;
    const scoring task = {
        .layers = layers, .count = count, .population = population, .samples = samples,
        .room = room, .sums = sums, .multiply = product_here(),
        .numbers = numbers, .row = widest_row(layers, count),
        .stretches = stretches_of(samples), .slots = threads,
    };
    share_out(score_slots, &task, threads, threads);
    for (int64_t m = 0; m < population->members; ++m) {
        double sum = 0;
        for (int64_t i = 0; i < task.stretches; ++i) sum += sums[m * task.stretches + i];
        losses[m] = sum;
    }
}
