#include "noise.h"

#include "kernels.h"

/* Box & Muller 1958: two uniform numbers become two normal ones. */
static void normal_pair(uint32_t a, uint32_t b, float *values) {
    const double u = ((a >> 9) + 0.5) * 0x1p-23, turn = (b >> 8) * 0x1p-24;
    const double radius = sqrt(-2 * log(u)), angle = 6.283185307179586 * turn;
    values[0] = (float)(radius * cos(angle));
    values[1] = (float)(radius * sin(angle));
}

void evk_normal(float *values, const evk_noise *noise, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n;) {
        const quad words = noise_words(noise, (uint64_t)i / 4);
        float four[4];
        normal_pair(words.words[0], words.words[1], four);
        normal_pair(words.words[2], words.words[3], four + 2);
        for (int64_t j = i % 4; j < 4 && i < first + n; ++j, ++i) values[i - first] = four[j];
    }
}
