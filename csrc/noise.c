#include "noise.h"

#include "kernels.h"

enum { LANES = 16 };      /* quarters that are worked on together, as vectors do */
enum { RUN = 4 * LANES }; /* and their elements */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The elements of LANES quarters, each step for all of them before the next one. */
EVK_CLONES static void normal_run(float *restrict values, const evk_noise *noise,
                                  uint64_t quarter) {
    uint32_t words[4][LANES];
    float normals[4][LANES];
    for (int k = 0; k < LANES; ++k) {
        const quad drawn = noise_words(noise, quarter + k);
        for (int j = 0; j < 4; ++j) words[j][k] = drawn.words[j];
    }
    for (int j = 0; j < 4; j += 2)
        for (int k = 0; k < LANES; ++k)
            normal_pair(words[j][k], words[j + 1][k], &normals[j][k], &normals[j + 1][k]);
    for (int k = 0; k < LANES; ++k)
        for (int j = 0; j < 4; ++j) values[4 * k + j] = normals[j][k];
}

void evk_normal(float *values, const evk_noise *noise, int64_t first, int64_t n) {
    while (n > 0) {
        const int64_t skipped = first % 4, run = smaller(n, RUN - skipped);
        if (run == RUN)
            normal_run(values, noise, (uint64_t)first / 4);
        else {
            float whole[RUN];
            normal_run(whole, noise, (uint64_t)first / 4);
            memcpy(values, whole + skipped, run * sizeof(float));
        }
        values += run, first += run, n -= run;
    }
}
