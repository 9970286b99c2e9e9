/* Random bits that depend on where they are used alone, not on what was drawn before. */
#ifndef EVK_RANDOM_H
#define EVK_RANDOM_H

#include "philox.h"

/* `philox`, for whoever loads the library. */
void evk_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t random[4]);

/* 16 random bits for each of the elements [first, first + n) of a stream, which must lie in one
 * block of 256: eight elements share a counter. `bits` has room for EVK_RANDOM_BITS numbers.
 *
 * Returns where in `bits` those of the first element are. */
const uint16_t *evk_random_bits(uint16_t *bits, const evk_stream *stream, int64_t first,
                                int64_t n);

enum { EVK_RANDOM_BITS = 256 };

#endif
