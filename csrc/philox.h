/* Philox4x32-10: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3":
 * numbers that depend on a counter and a key alone. */
#ifndef EVK_PHILOX_H
#define EVK_PHILOX_H

#include "portable.h"

typedef struct {
    uint32_t words[4];
} quad;

EVK_INLINE quad philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                       uint32_t k1) {
    EVK_ROLLED
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const quad result = {{c0, c1, c2, c3}};
    return result;
}

/* What tells the random bits of one tensor in one step from all others. */
typedef struct {
    uint64_t seed;
    uint32_t operand, position, t;
} evk_stream;

/* 16 random bits for each of the elements 8 * eighth, …, 8 * eighth + 7 of a stream: those of
 * element i are the half i % 2, the lower one first, of word i % 8 / 2. */
EVK_INLINE quad random_eight(const evk_stream *stream, uint64_t eighth) {
    /* tensors have fewer than 2^63 elements, so the four upper bits are free for the operand: the
     * two highest for p, g, m and v, the others for averages */
    const uint32_t operand = (stream->operand & 3) << 30 | stream->operand >> 2 << 28;
    return philox((uint32_t)eighth, (uint32_t)(eighth >> 32) | operand, stream->position,
                  stream->t, (uint32_t)stream->seed, (uint32_t)(stream->seed >> 32));
}

#endif
