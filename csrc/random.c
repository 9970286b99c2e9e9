#include "random.h"

#include "kernels.h"

void evk_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t random[4]) {
    const quad result = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    for (int i = 0; i < 4; ++i) random[i] = result.words[i];
}

EVK_CLONES const uint16_t *evk_random_bits(uint16_t *bits, const evk_stream *stream,
                                           int64_t first, int64_t n) {
    const uint64_t eighth = (uint64_t)first / 8;
    const int64_t counters = (first % 8 + n + 7) / 8;
    for (int64_t i = 0; i < counters; ++i) {
        const quad random = random_eight(stream, eighth + (uint64_t)i);
        for (int j = 0; j < 4; ++j) {
            bits[8 * i + 2 * j] = (uint16_t)random.words[j];
            bits[8 * i + 2 * j + 1] = (uint16_t)(random.words[j] >> 16);
        }
    }
    return bits + first % 8;
}
