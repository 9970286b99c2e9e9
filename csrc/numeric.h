/* Loading and storing elements: storage types are float, double and the two 16-bit formats,
 * arithmetic is in float or double. Stores round once, to nearest even, or stochastically.
 *
 * The 16-bit conversions are integer arithmetic with selects, no branches: every compiler turns
 * them into vector code for every instruction set, and none depends on flush-to-zero mode. */
#ifndef EVK_NUMERIC_H
#define EVK_NUMERIC_H

#include "portable.h"

EVK_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

EVK_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

EVK_INLINE float load_float32(float x) { return x; }
EVK_INLINE float store_float32(float x) { return x; }

EVK_INLINE double load_float64(double x) { return x; }
EVK_INLINE double store_float64(double x) { return x; }

/* bfloat16 is the upper half of a float. */
EVK_INLINE float load_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

EVK_INLINE uint16_t store_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7fc0); /* rounding could carry a NaN into infinity */
}

/* Rounded up with the probability that makes the mean exact, by 16 random bits. From the largest
 * finite bfloat16 on there is no next one to make a mean with: there to nearest, so that exactly
 * the same numbers overflow. */
EVK_INLINE uint16_t store_bfloat16_stochastic(float x, uint16_t random) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = 0x7fff + (bits >> 16 & 1);
    const uint32_t rounded = (bits + ((bits & 0x7fffffff) >= 0x7f7f0000 ? nearest : random)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7fc0);
}

/* A double as a float from which a bfloat16 is rounded as from the double itself: towards zero,
 * the last bit set where anything was lost (Boldo & Melquiond 2008, rounding to odd). */
EVK_INLINE float narrowed(double x) {
    const float near = (float)x;
    const uint32_t bits = bits_of(near) - (fabs((double)near) > fabs(x));
    return x == x ? float_of(bits | ((double)near != x)) : near;
}

#ifdef __CUDACC_RTC__

/* The processor's own conversions: one instruction, to nearest even. */
EVK_INLINE float load_float16(uint16_t x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}

EVK_INLINE uint16_t store_float16(float x) {
    uint16_t rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
}

#else

/* float16: 5 exponent bits (bias 15, float: 127) and 10 of mantissa (float: 23). */
EVK_INLINE float load_float16(uint16_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t exponent = x & 0x7c00;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23); /* infinity and NaN */
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t bits = exponent == 0 ? subnormal : exponent == 0x7c00 ? special : normal;
    return float_of(bits | (uint32_t)(x & 0x8000) << 16);
}

EVK_INLINE uint16_t store_float16(float x) {
    const uint32_t sign = bits_of(x) & 0x80000000u;
    const uint32_t magnitude = bits_of(x) ^ sign;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    /* adding 0.5 leaves the bits of a float16 subnormal, correctly rounded, at the bottom */
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t bits = magnitude >= 0x47800000u  ? special
                          : magnitude < 0x38800000u ? subnormal
                                                    : normal;
    return (uint16_t)(bits | sign >> 16);
}

#endif

#endif
