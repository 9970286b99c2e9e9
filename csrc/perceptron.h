/* What each member of a population loses on some samples, where the members are small networks of
 * dense layers. Mirrored by evokernels/es/perceptron.py. */
#ifndef EVK_PERCEPTRON_H
#define EVK_PERCEPTRON_H

#include "perturb.h"

/* Samples that go through all layers together. */
enum { EVK_SAMPLES = 128 };

/* What follows a product. */
enum { EVK_IDENTITY, EVK_RELU, EVK_TANH, EVK_SIGMOID };

/* Sum of squared differences; sum of cross entropies, in nats; how many samples have their class
 * not ahead of all others (of equal ones the first is), or a NaN among their outputs. */
enum { EVK_SQUARES, EVK_CROSS_ENTROPY, EVK_MISTAKES };

/* y = activation(weight x + bias). */
typedef struct {
    int64_t inputs, outputs;
    evk_noisy weight; /* float (outputs, inputs), without a target */
    evk_noisy bias;   /* float (outputs), likewise; no elements: there is none */
    int32_t activation;
} evk_dense;

/* Member i has `scales[i]` times noise number `noises[i]` added. */
typedef struct {
    uint64_t seed;
    uint32_t generation;
    const uint32_t *noises;
    const double *scales;
    int64_t members;
} evk_population;

/* `x` is float (blocks, inputs, EVK_SAMPLES) and `y`, for squares, float (blocks, outputs,
 * EVK_SAMPLES), else int32 (blocks, EVK_SAMPLES), each from 0 and below outputs. Of the last block
 * only what is left of `samples` counts. */
typedef struct {
    const float *x;
    const void *y;
    int64_t samples;
    int32_t loss;
} evk_samples;

/* blocks (ceil(samples / EVK_SAMPLES), columns, EVK_SAMPLES) of rows (samples, columns), zeros
 * behind the last one. */
void evk_arrange(const float *rows, int64_t samples, int64_t columns, float *blocks);

/* How many floats one thread needs room for. */
int64_t evk_perceptron_room(const evk_dense *layers, int64_t count);

/* How many doubles are needed for sums on the way. */
int64_t evk_perceptron_sums(const evk_population *population, const evk_samples *samples);

/* losses (members), added up in double in an order that does not depend on `threads`; `room` is
 * float (threads, evk_perceptron_room), `sums` double (evk_perceptron_sums). */
void evk_population_losses(const evk_dense *layers, int64_t count,
                           const evk_population *population, const evk_samples *samples,
                           double *losses, float *room, double *sums, int32_t threads);

#endif
