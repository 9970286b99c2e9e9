/* Channels worked on together, as vectors, and floats as their bits. */
#ifndef EVK_LANES_H
#define EVK_LANES_H

#include "kernels.h"
#include "layers.h"
#include "runtime.h"

enum { LANES = EVK_LANES };

/* One number for each of LANES channels. */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t small __attribute__((vector_size(LANES)));

/* As integers, the bits of positive numbers are ordered as the numbers are, NaN above infinity,
 * and all negative ones are below 0. */
#define BITS_float32 int32_t
#define BITS_bfloat16 int16_t
#define STORED_float32 float
#define STORED_bfloat16 uint16_t
#define MAGNITUDE_float32 0x7fffffff
#define MAGNITUDE_bfloat16 0x7fff
#define INFINITY_float32 0x7f800000
#define INFINITY_bfloat16 0x7f80
#define NAN_float32 0x7fc00000
#define NAN_bfloat16 0x7fc0

EVK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

EVK_INLINE int64_t bytes(int32_t format) { return format == EVK_BFLOAT16 ? 2 : 4; }

/* The function of a name for the format at hand. */
#define CALL(format, name, ...) \
    ((format) == EVK_BFLOAT16 ? name##_bfloat16(__VA_ARGS__) : name##_float32(__VA_ARGS__))

#define LOAD(type, from)                                                                       \
    (__extension__({                                                                           \
        type loaded;                                                                           \
        memcpy(&loaded, from, sizeof loaded);                                                  \
        loaded;                                                                                \
    }))

/* A vector of these places in two. */
#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* which has the other one from version 12 on only */
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (PLACES(a)){__VA_ARGS__})
#define PLACES(a)                                                                              \
    __typeof__(__builtin_choose_expr(sizeof(a) == sizeof(integers), (integers){0}, (shorts){0}))
#endif

/* Two vectors interleaved: their first halves, and their last ones. */
#define FIRST_HALVES(a, b)                                                                     \
    SHUFFLED(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define LAST_HALVES(a, b)                                                                      \
    SHUFFLED(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* Bits of positive floats, or of the NaN above, as they are stored, and back. */
#define ROUNDED_float32(bits) (bits)
#define ROUNDED_bfloat16(bits) (((bits) + 0x7fff + ((bits) >> 16 & 1)) >> 16)
#define WIDENED_float32(bits) (bits)
#define WIDENED_bfloat16(bits) (__builtin_convertvector(bits, integers) << 16)

#endif
