#include "noise.h"

#include "kernels.h"

/* Into each copy of its callers, to become vector code there. */
#define INLINED static inline __attribute__((always_inline))

/* Quarters that are worked on together, as vectors do: more of them keep the processor busy, fewer
 * waste less where a tensor ends. */
enum { LONG = 64, SHORT = 16 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The elements of some quarters, each step for all of them before the next one. */
INLINED void normal_run(float *restrict values, const evk_noise *noise, uint64_t quarter,
                        int quarters) {
    uint32_t words[4][LONG];
    float normals[4][LONG];
    for (int k = 0; k < quarters; ++k) {
        const quad drawn = noise_words(noise, quarter + k);
        for (int j = 0; j < 4; ++j) words[j][k] = drawn.words[j];
    }
    for (int j = 0; j < 4; j += 2)
        for (int k = 0; k < quarters; ++k)
            normal_pair(words[j][k], words[j + 1][k], &normals[j][k], &normals[j + 1][k]);
    for (int k = 0; k < quarters; ++k)
        for (int j = 0; j < 4; ++j) values[4 * k + j] = normals[j][k];
}

EVK_CLONES static void long_run(float *values, const evk_noise *noise, uint64_t quarter) {
    normal_run(values, noise, quarter, LONG);
}

EVK_CLONES static void short_run(float *values, const evk_noise *noise, uint64_t quarter) {
    normal_run(values, noise, quarter, SHORT);
}

void evk_normal(float *values, const evk_noise *noise, int64_t first, int64_t n) {
    while (n > 0) {
        const uint64_t quarter = (uint64_t)first / 4;
        int64_t run = 4 * LONG;
        if (first % 4 == 0 && n >= run)
            long_run(values, noise, quarter);
        else {
            float whole[4 * SHORT];
            run = smaller(n, 4 * SHORT - first % 4);
            short_run(whole, noise, quarter);
            memcpy(values, whole + first % 4, run * sizeof(float));
        }
        values += run, first += run, n -= run;
    }
}
