/* Standard normal numbers that depend on their place alone: which seed, generation, member of a
 * population, tensor and element. They are made where they are used and never stored. */
#ifndef EVK_NOISE_H
#define EVK_NOISE_H

#include "philox.h"

/* What tells the noise of one tensor, for one member of one generation, from all other noise. */
typedef struct {
    uint64_t seed;
    uint32_t generation, member, position; /* of the tensor in its model: below 2^24 */
} evk_noise;

/* The words behind elements 4 * quarter, …, 4 * quarter + 3 of a tensor. */
EVK_INLINE quad noise_words(const evk_noise *noise, uint64_t quarter) {
    /* tensors have fewer than 2^42 elements, so the upper bits are free for the tensor */
    return philox((uint32_t)quarter, (uint32_t)(quarter >> 32) | noise->position << 8,
                  noise->member, noise->generation, (uint32_t)noise->seed,
                  (uint32_t)(noise->seed >> 32));
}

/* Elements [first, first + n) of a tensor's noise. */
void evk_normal(float *values, const evk_noise *noise, int64_t first, int64_t n);

#endif
