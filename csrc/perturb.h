/* Noise added to the tensors of a model, and the sum of a whole population's noise. Mirrored by
 * evokernels/kernels/noise.py. */
#ifndef EVK_PERTURB_H
#define EVK_PERTURB_H

#include "noise.h"
#include "runtime.h"

/* A tensor that gets noise added or the sum of many members' noise. Elements count row by row,
 * however they lie in memory: layouts have that order; NULL: one element after another. Arithmetic
 * is in double for tensors of EVK_FLOAT64, else in float. */
typedef struct {
    void *target;
    const void *centre; /* of the target's format; unused by evk_estimate */
    const evk_layout *target_layout, *centre_layout;
    int64_t elements;
    int32_t format;
    uint32_t position; /* of the tensor in its model: below 2^24 - 1 */
} evk_noisy;

/* target = centre + scale * noise, for one member. The result does not depend on `threads`. */
void evk_perturb(const evk_noisy *tensors, int64_t count, uint64_t seed, uint32_t generation,
                 uint32_t member, double scale, int32_t threads);

/* target = the sum of weights[k] times the noise of member k, added up in double from 0 to
 * `members`: one pass over the tensors, whatever the number of members. */
void evk_estimate(const evk_noisy *tensors, int64_t count, uint64_t seed, uint32_t generation,
                  const double *weights, int64_t members, int32_t threads);

#endif
