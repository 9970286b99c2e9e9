#include "random.h"

#include "kernels.h"

typedef struct {
    uint32_t words[4];
} quad;

static inline quad philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                          uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (quad){{c0, c1, c2, c3}};
}

void evk_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t random[4]) {
    const quad result = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    for (int i = 0; i < 4; ++i) random[i] = result.words[i];
}

EVK_CLONES const uint16_t *evk_random_bits(uint16_t *bits, const evk_stream *stream,
                                           int64_t first, int64_t n) {
    const uint64_t eighth = (uint64_t)first / 8;
    const uint32_t c0 = (uint32_t)eighth, position = stream->position, t = stream->t;
    /* tensors have fewer than 2^63 elements, so the two upper bits are free for the operand */
    const uint32_t c1 = (uint32_t)(eighth >> 32) | stream->operand << 30;
    const uint32_t k0 = (uint32_t)stream->seed, k1 = (uint32_t)(stream->seed >> 32);
    const int64_t counters = (first % 8 + n + 7) / 8; /* within a block, c0 does not overflow */
    for (int64_t i = 0; i < counters; ++i) {
        const quad random = philox(c0 + (uint32_t)i, c1, position, t, k0, k1);
        for (int j = 0; j < 4; ++j) {
            bits[8 * i + 2 * j] = (uint16_t)random.words[j];
            bits[8 * i + 2 * j + 1] = (uint16_t)(random.words[j] >> 16);
        }
    }
    return bits + first % 8;
}
