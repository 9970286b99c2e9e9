/* e^x, log(1 + x) and tanh as straight-line code: selects, no branches and no tables, so that every
 * compiler turns a loop over them into vector code, for every instruction set with the same bits.
 *
 * Over all floats the errors are at most 0.77, 0.90 and 0.79 units in the last place; of doubles 0.74,
 * 0.83 and 0.86 have been seen (python_tests/test_functions.py). Zeros keep their sign, NaN stays,
 * infinity is the limit, subnormal numbers come in and out. */
#ifndef EVK_FUNCTIONS_H
#define EVK_FUNCTIONS_H

#include "portable.h"

#ifdef __CUDACC_RTC__

EVK_INLINE float evk_expf(float x) { return expf(x); }
EVK_INLINE double evk_exp(double x) { return exp(x); }
EVK_INLINE float evk_log1pf(float x) { return log1pf(x); }
EVK_INLINE double evk_log1p(double x) { return log1p(x); }
EVK_INLINE float evk_tanhf(float x) { return tanhf(x); }
EVK_INLINE double evk_tanh(double x) { return tanh(x); }

#else

/* e^r = 1 + r + r^2 * this, for |r| <= log(2) / 2: interpolated at Chebyshev's nodes, off by less
 * than a hundredth of the last place of e^r. */
EVK_INLINE float evk_exp_rest_float(float r) {
    const float high = 0x1.1110ep-7f + r * (0x1.6d43bp-10f + r * 0x1.a1256cp-13f);
    return 0.5f + r * (0x1.555556p-3f + r * (0x1.5554e8p-5f + r * high));
}

EVK_INLINE double evk_exp_rest_double(double r) {
    const double high =
        0x1.a01a01a7cebcdp-13 +
        r * (0x1.a019b8ca26fcfp-16 +
             r * (0x1.71de0d85293b8p-19 + r * (0x1.2891d4ffbb0f9p-22 + r * 0x1.af390ba7e6f47p-26)));
    const double low = 0x1.11111111109a6p-7 + r * (0x1.6c16c1789d1d7p-10 + r * high);
    return 0x1.0000000000001p-1 +
           r * (0x1.5555555555556p-3 + r * (0x1.5555555553d37p-5 + r * low));
}

/* log(1 + f) = f - f^2 / 2 + s * (f^2 / 2 + this), s = f / (2 + f), z = s^2: the polynomials of
 * FreeBSD's msun, e_logf.c and e_log.c (Sun Microsystems 1993). */
EVK_INLINE float evk_log_rest_float(float z) {
    const float high = 0x91e9ee.0p-25f + z * 0xf89e26.0p-26f;
    return z * (0xaaaaaa.0p-24f + z * (0xccce13.0p-25f + z * high));
}

EVK_INLINE double evk_log_rest_double(double z) {
    const double high = 2.222219843214978396e-01 +
                        z * (1.818357216161805012e-01 +
                             z * (1.531383769920937332e-01 + z * 1.479819860511658591e-01));
    return z * (6.666666666666735130e-01 +
                z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 + z * high)));
}

/* tanh(a) = a + a * quotient for a < 0.625, z = a^2: the approximations of Moshier's Cephes,
 * tanhf.c and tanh.c (1992). */
EVK_INLINE float evk_tanh_dividend_float(float z) {
    const float high = 2.06390887954e-2f + z * -5.70498872745e-3f;
    return z * (-3.33332819422e-1f + z * (1.33314422036e-1f + z * (-5.37397155531e-2f + z * high)));
}

EVK_INLINE float evk_tanh_divisor_float(float z) {
    (void)z;
    return 1;
}

EVK_INLINE double evk_tanh_dividend_double(double z) {
    return z * (-1.61468768441708447952e3 +
                z * (-9.92877231001918586564e1 + z * -9.64399179425052238628e-1));
}

EVK_INLINE double evk_tanh_divisor_double(double z) {
    return 4.84406305325125486048e3 +
           z * (2.23548839060100448583e3 + z * (1.12811678491632931402e2 + z));
}

/* For a type: the suffix of its functions, the unsigned integer of its size, the bits of its
 * fraction, the bias of its exponent; log(2) in two numbers, the first short enough to be
 * multiplied with an exponent exactly; the bits of sqrt(1/2) rounded down; where e^x is 0 and where
 * it is infinite; from where on tanh(x / 2) is 1. */
#define EVK_FUNCTIONS(real, f, word, FRACTION, BIAS, LN2_HIGH, LN2_LOW, ROOT, LOW, HIGH, ONE_FROM) \
    EVK_INLINE word evk_word_of_##real(real x) {                                                   \
        word bits;                                                                                 \
        memcpy(&bits, &x, sizeof bits);                                                            \
        return bits;                                                                               \
    }                                                                                              \
                                                                                                   \
    EVK_INLINE real evk_##real##_of(word bits) {                                                   \
        real x;                                                                                    \
        memcpy(&x, &bits, sizeof x);                                                               \
        return x;                                                                                  \
    }                                                                                              \
                                                                                                   \
    /* Added to a number, it is rounded to a whole one, which is in the lower bits. */             \
    static const real evk_whole_##real = (real)(3ull << (FRACTION - 1));                           \
                                                                                                   \
    /* 2^n for the exponents of normal numbers. */                                                 \
    EVK_INLINE real evk_power_##real(real n) {                                                     \
        return evk_##real##_of((evk_word_of_##real(n + evk_whole_##real) + BIAS) << FRACTION);     \
    }                                                                                              \
                                                                                                   \
    /* e^x as (sum + low) * 2^n, of which `low` is below the last place of `sum`: x reduced as by  \
     * Cody and Waite (1980), the rounding errors of 1 + r and of r itself kept. */                \
    typedef struct {                                                                               \
        real sum, low, n;                                                                          \
    } evk_exponential_##real;                                                                      \
                                                                                                   \
    EVK_INLINE evk_exponential_##real evk_reduced_exp_##real(real x) {                             \
        const real n = (x * (real)1.4426950408889634 + evk_whole_##real) - evk_whole_##real;       \
        const real near = x - n * LN2_HIGH, r = near - n * LN2_LOW;                                \
        const real r_low = (near - r) - n * LN2_LOW, sum = 1 + r;                                  \
        const real low = (r - (sum - 1)) + (r_low + r * r * evk_exp_rest_##real(r));               \
        const evk_exponential_##real result = {sum, low, n};                                       \
        return result;                                                                             \
    }                                                                                              \
                                                                                                   \
    EVK_INLINE real evk_exp##f(real x) {                                                           \
        const real below = x > HIGH ? HIGH : x, within = below < LOW ? LOW : below;                \
        const evk_exponential_##real e = evk_reduced_exp_##real(within);                           \
        /* in two steps: 2^n alone may be too large or too small */                                \
        const real half = (e.n * (real)0.5 + evk_whole_##real) - evk_whole_##real;                 \
        return (e.sum + e.low) * evk_power_##real(half) * evk_power_##real(e.n - half);            \
    }                                                                                              \
                                                                                                   \
    EVK_INLINE real evk_log1p##f(real x) {                                                         \
        /* 1 + x = u + lost = 2^k * (1 + f + f_low), exactly */                                    \
        const real u = 1 + x, up = u - 1, lost = (1 - (u - up)) + (x - up);                        \
        const word bits = evk_word_of_##real(u) - (word)ROOT + evk_word_of_##real(1);              \
        const word exponent = bits >> FRACTION;                                                    \
        const word fraction = bits & (((word)1 << FRACTION) - 1);                                  \
        const word counted = evk_word_of_##real((real)(1ull << FRACTION)) | exponent;              \
        const real k = evk_##real##_of(counted) - ((real)(1ull << FRACTION) + BIAS);               \
        const real scale = evk_##real##_of((2 * BIAS - exponent) << FRACTION);                     \
        const real rest = u < (real)(8ull << FRACTION) ? lost * scale : 0;                         \
        const real near = evk_##real##_of(fraction + ROOT) - 1;                                    \
        const real f_ = near + rest, f_low = rest - (f_ - near);                                   \
        const real s = f_ / (2 + f_), half = (real)0.5 * f_ * f_;                                  \
        const real small = s * (half + evk_log_rest_##real(s * s)) + (k * LN2_LOW + f_low);        \
        const real sum = k * LN2_HIGH - ((half - small) - f_);                                     \
        const real finite = x == 0 ? x : sum; /* the sign of zero */                               \
        const real from_minus_one = x == -1 ? -(real)INFINITY : (real)NAN;                         \
        const real inside = x < (real)INFINITY ? finite : x;                                       \
        return x > -1 ? inside : from_minus_one;                                                   \
    }                                                                                              \
                                                                                                   \
    EVK_INLINE real evk_tanh##f(real x) {                                                          \
        const real a = fabs##f(x), z = a * a;                                                      \
        /* 1 - 2 / (e^2a + 1), the rounding errors of the divisor and of the difference kept */    \
        const evk_exponential_##real e =                                                           \
            evk_reduced_exp_##real(2 * a > ONE_FROM ? (real)ONE_FROM : 2 * a);                     \
        const real power = evk_power_##real(e.n), high = e.sum * power, sum = high + 1;            \
        const real rest = (1 - (sum - high)) + e.low * power, divisor = sum + rest;                \
        const int is_small = a < (real)0.625;                                                      \
        const real quotient = (is_small ? evk_tanh_dividend_##real(z) : 2) /                       \
                              (is_small ? evk_tanh_divisor_##real(z) : divisor);                   \
        const real near = 1 - quotient, lost = (1 - near) - quotient;                              \
        const real of_divisor = (real)0.5 * quotient * quotient * (rest - (divisor - sum));        \
        const real large = near + (lost + of_divisor);                                             \
        return copysign##f(is_small ? a + a * quotient : large, x);                                \
    }

EVK_FUNCTIONS(float, f, uint32_t, 23, 127, 0x1.62e4p-1f, 0x1.7f7d1cp-20f, 0x3f3504f3u, -104, 89, 20)
EVK_FUNCTIONS(double, , uint64_t, 52, 1023, 0x1.62e42feep-1, 0x1.a39ef35793c76p-33,
              0x3fe6a09e00000000u, -746, 710, 44)

#endif

#endif
