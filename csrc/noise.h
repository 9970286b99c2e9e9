/* Standard normal numbers that depend on their place alone: which seed, generation, member of a
 * population, tensor and element. They are made where they are used and never stored.
 *
 * Every device computes the same bits: conversions, additions, multiplications, one root, each
 * rounded once; no compiler may fuse them (-ffp-contract=off, --fmad=false). */
#ifndef EVK_NOISE_H
#define EVK_NOISE_H

#include "numeric.h"
#include "philox.h"

/* What tells the noise of one tensor, for one member of one generation, from all other noise. */
typedef struct {
    uint64_t seed;
    uint32_t generation, member, position; /* of the tensor in its model: below 2^24 - 1 */
} evk_noise;

/* The words behind elements 4 * quarter, …, 4 * quarter + 3 of a tensor. */
EVK_INLINE quad noise_words(const evk_noise *noise, uint64_t quarter) {
    /* tensors have fewer than 2^42 elements, so the upper bits are free for the tensor; never 0
     * there, where stochastic rounding has its counters */
    return philox((uint32_t)quarter, (uint32_t)(quarter >> 32) | (noise->position + 1) << 8,
                  noise->member, noise->generation, (uint32_t)noise->seed,
                  (uint32_t)(noise->seed >> 32));
}

/* sqrt(-2 log u) for u = (word / 2 + 1/2) / 2^31, at most 6.66. The logarithm is that of a number
 * f + 1 in [sqrt(1/2), sqrt(2)) and that of a power of two; -2 log(f + 1) = f (-2 + f Q(f)), Q of
 * degree 7 with the smallest largest relative error, 3e-8. */
EVK_INLINE float normal_radius(uint32_t word) {
    const uint32_t root_half = 0x3f3504f3u;
    const uint32_t bits = bits_of((float)(int32_t)(word >> 1) + 0.5f) - root_half;
    const float exponent = (float)(((int32_t)bits >> 23) - 31);
    const float f = float_of((bits & 0x007fffffu) + root_half) - 1.0f;
    float q = -0x1.65c778p-3f;
    q = q * f + 0x1.25049ep-2f;
    q = q * f - 0x1.318526p-2f;
    q = q * f + 0x1.535d30p-2f;
    q = q * f - 0x1.98d2c0p-2f;
    q = q * f + 0x1.00049ap-1f;
    q = q * f - 0x1.5556f4p-1f;
    q = q * f + 0x1.fffffap-1f;
    return sqrtf(f * (q * f - 2.0f) - exponent * 0x1.62e430p+0f);
}

/* A point of the unit circle: the angle pi/2 t for t = the lower 30 bits, signed, / 2^30, which
 * lies in [-pi/4, pi/4); bit 31 turns the sign of x, bit 30 swaps x and y. Polynomials as above,
 * relative errors 4e-8 (cosine) and 4e-9 (sine). */
EVK_INLINE void normal_direction(uint32_t word, float *x, float *y) {
    const float t = (float)(int32_t)(word << 2) * 0x1p-32f, tt = t * t;
    float cosine = -0x1.4e844ap-6f, sine = -0x1.2d9302p-8f;
    cosine = cosine * tt + 0x1.03b090p-2f;
    cosine = cosine * tt - 0x1.3bd39cp+0f;
    cosine = cosine * tt + 1.0f;
    sine = sine * tt + 0x1.465e92p-4f;
    sine = sine * tt - 0x1.4abbbap-1f;
    sine = sine * tt + 0x1.921fb6p+0f;
    sine = sine * t;
    cosine = float_of(bits_of(cosine) ^ (word & 0x80000000u));
    *x = word & 0x40000000u ? sine : cosine;
    *y = word & 0x40000000u ? cosine : sine;
}

/* Box & Muller 1958: two uniform words become two normal numbers. */
EVK_INLINE void normal_pair(uint32_t a, uint32_t b, float *first, float *second) {
    const float radius = normal_radius(a);
    normal_direction(b, first, second);
    *first *= radius;
    *second *= radius;
}

#ifndef __CUDACC_RTC__

/* Elements [first, first + n) of a tensor's noise. */
void evk_normal(float *values, const evk_noise *noise, int64_t first, int64_t n);

#endif

#endif
