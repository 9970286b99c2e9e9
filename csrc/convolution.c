#include "convolution.h"

#include <string.h>

#include "kernels.h"
#include "runtime.h"
#include "share.h"

static int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Everything is done in words of 32 bits, each multiplied and added by one lane: a float, or the
 * bfloat16 of two rows that lie below each other, of which the processor adds both products.
 *
 * An image is packed into rows of words. Row i of x has the image's row i - 1, with a zero pixel
 * at both ends, and above it in bfloat16 the image's row i; rows outside the image are zero. So
 * the row of the gradient that begins with the image's row h meets rows h, h + 1 and h + 2 of x:
 * one for each row of the weights. */
typedef struct {
    int64_t rows_a_word, x_row, x_rows, gradient_row, gradient_rows, padded_outputs;
} packing;

enum { LANES = EVK_LANES, WORD = 4, CACHE_LINE = 64 };

static packing packing_of(const evk_images *images, int64_t outputs, int32_t format) {
    const int64_t each = format == EVK_BFLOAT16 ? 2 : 1;
    const int64_t rows = (images->height + each - 1) / each;
    const int64_t padded = rounded_up(outputs, EVK_GROUP_OUTPUTS);
    return (packing){
        .rows_a_word = each,
        .x_row = (images->width + 2) * images->channels,
        .x_rows = each * rows + 3 - each,
        .gradient_row = images->width * padded,
        .gradient_rows = rows,
        .padded_outputs = padded,
    };
}

static int64_t words_of_x(const packing *p) { return rounded_up(p->x_rows * p->x_row, LANES); }

int64_t evk_convolution_room(const evk_images *images, int64_t outputs, int32_t format) {
    const packing p = packing_of(images, outputs, format);
    return words_of_x(&p) + p.gradient_rows * p.gradient_row;
}

#if defined(EVK_DISPATCH) && __GNUC__ >= 11

#include <immintrin.h>

#define EVK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

int32_t evk_has_convolution_weights(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") &&
           !__builtin_cpu_supports("amx-bf16");
}

typedef struct {
    const void *gradient, *x;
    float *sums;
    void *room;
    const evk_images *images;
    int64_t outputs;
    packing packing;
    int32_t format;
    int64_t groups, slots;
} weighing;

/* What the next image will need, asked for while this one is worked on, some lines a row. */
typedef struct {
    uintptr_t at;
    int64_t lines;
} stream;

static stream stream_of(const void *image, int64_t image_bytes, int64_t rows) {
    return (stream){(uintptr_t)image, (image_bytes + rows * CACHE_LINE - 1) / (rows * CACHE_LINE)};
}

static inline void fetch(stream *next) {
    for (int64_t i = 0; i < next->lines; ++i, next->at += CACHE_LINE)
        _mm_prefetch((const char *)next->at, _MM_HINT_T1);
}

/* Rows of sums that are in registers together. They come in threes, one for each column of the
 * weights, so that every number of channels has its blocks. */
enum { BLOCK = 12 };

/* Where a block begins: the words it is made of, and its sums. */
typedef struct {
    const uint32_t *x, *gradient;
    float *sums;
} block;

/* sums (`rows`, EVK_GROUP_OUTPUTS) += words of x at each pixel (`rows` of them) times words of
 * the gradient (EVK_GROUP_OUTPUTS of them). */
__attribute__((always_inline)) EVK_AVX512 static inline void accumulate(
    const int rows, const int paired, block at, const weighing *t, stream next[2]) {
    enum { VECTORS = EVK_GROUP_OUTPUTS / LANES };
    const packing *p = &t->packing;
    __m512 sums[BLOCK][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            sums[r][v] = _mm512_setzero_ps();
    for (int64_t h = 0; h < p->gradient_rows; ++h, at.x += p->rows_a_word * p->x_row) {
        const uint32_t *x = at.x;
        fetch(&next[0]);
        fetch(&next[1]);
        for (int64_t w = 0; w < t->images->width; ++w) {
            __m512i gradient[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v)
                gradient[v] = _mm512_loadu_si512(at.gradient + v * LANES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) {
                const __m512i one = _mm512_set1_epi32((int32_t)x[r]);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v] = paired ? _mm512_dpbf16_ps(sums[r][v], (__m512bh)one,
                                                           (__m512bh)gradient[v])
                                        : _mm512_fmadd_ps(_mm512_castsi512_ps(one),
                                                          _mm512_castsi512_ps(gradient[v]),
                                                          sums[r][v]);
            }
            x += t->images->channels;
            at.gradient += p->padded_outputs;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            float *of_all = at.sums + r * p->padded_outputs + v * LANES;
            _mm512_storeu_ps(of_all, _mm512_add_ps(_mm512_loadu_ps(of_all), sums[r][v]));
        }
}

/* `rows` left, of which at most BLOCK are done; `paired` must be a literal where this is called. */
__attribute__((always_inline)) EVK_AVX512 static inline void accumulate_rows(
    int64_t rows, const int paired, block at, const weighing *t, stream next[2]) {
    switch (rows) {
        case 3: accumulate(3, paired, at, t, next); break;
        case 6: accumulate(6, paired, at, t, next); break;
        case 9: accumulate(9, paired, at, t, next); break;
        default: accumulate(BLOCK, paired, at, t, next);
    }
}

/* words[i] = upper[i] below lower[i]; NULL is zeros. */
EVK_AVX512 static void pack_pairs(const uint16_t *upper, const uint16_t *lower, uint32_t *words,
                                  int64_t n) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from_lower = _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)),
                                                 16);
    const __m512i first = _mm512_or_si512(count, from_lower);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(LANES));
    const __m512i zero = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const __m512i a = upper ? _mm512_loadu_si512(upper + i) : zero;
        const __m512i b = lower ? _mm512_loadu_si512(lower + i) : zero;
        _mm512_storeu_si512(words + i, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(words + i + LANES, _mm512_permutex2var_epi16(a, second, b));
    }
    for (; i < n; ++i)
        words[i] = (upper ? upper[i] : 0u) | (uint32_t)(lower ? lower[i] : 0u) << 16;
}

/* The words of the image's row `row`, of `length` elements, and in bfloat16 of the one below it:
 * `n` of them from `from` on. */
static void pack(const void *image, int64_t row, int64_t length, int64_t from, uint32_t *words,
                 int64_t n, const weighing *t) {
    const int64_t height = t->images->height, at = row * length + from;
    const int upper = row >= 0 && row < height, lower = row + 1 < height;
    if (t->format == EVK_BFLOAT16)
        pack_pairs(upper ? (const uint16_t *)image + at : 0,
                   lower ? (const uint16_t *)image + at + length : 0, words, n);
    else if (upper)
        memcpy(words, (const float *)image + at, n * WORD);
    else
        memset(words, 0, n * WORD);
}

static void pack_x(const void *image, uint32_t *words, const weighing *t) {
    const int64_t pixel = t->images->channels, length = t->images->width * pixel;
    for (int64_t i = 0; i < t->packing.x_rows; ++i)
        pack(image, i - 1, length, 0, words + i * t->packing.x_row + pixel, length, t);
}

static void pack_gradient(const void *image, uint32_t *words, const weighing *t) {
    const packing *p = &t->packing;
    const int64_t length = t->images->width * t->outputs;
    /* pixel by pixel only where there are lanes to leave out */
    const int64_t piece = p->padded_outputs == t->outputs ? length : t->outputs;
    for (int64_t i = 0; i < p->gradient_rows; ++i) {
        uint32_t *into = words + i * p->gradient_row;
        for (int64_t from = 0; from < length; from += piece, into += p->padded_outputs)
            pack(image, i * p->rows_a_word, length, from, into, piece, t);
    }
}

/* Adds image n to the sums of its group; `words` has zeros where nothing is packed. */
EVK_AVX512 static void weigh_image(const weighing *t, int64_t n, uint32_t *words, float *sums) {
    const packing *p = &t->packing;
    const int64_t pixels = t->images->height * t->images->width;
    const int64_t element = t->format == EVK_BFLOAT16 ? 2 : 4;
    const int64_t x_bytes = pixels * t->images->channels * element;
    const int64_t gradient_bytes = pixels * t->outputs * element;
    const char *x = (const char *)t->x + n * x_bytes;
    const char *gradient = (const char *)t->gradient + n * gradient_bytes;
    const int64_t rows = 3 * t->images->channels; /* of sums, for each row of the weights */
    const int64_t blocks =
        3 * ((rows + BLOCK - 1) / BLOCK) * (p->padded_outputs / EVK_GROUP_OUTPUTS);
    const int64_t fetches = blocks * p->gradient_rows;
    stream next[2] = {stream_of(x + x_bytes, x_bytes, fetches),
                      stream_of(gradient + gradient_bytes, gradient_bytes, fetches)};
    uint32_t *gradient_words = words + words_of_x(p);
    pack_x(x, words, t);
    pack_gradient(gradient, gradient_words, t);
    for (int64_t k = 0; k < 3; ++k)
        for (int64_t r = 0; r < rows; r += BLOCK)
            for (int64_t o = 0; o < p->padded_outputs; o += EVK_GROUP_OUTPUTS) {
                const block at = {words + k * p->x_row + r, gradient_words + o,
                                  sums + (k * rows + r) * p->padded_outputs + o};
                if (t->format == EVK_BFLOAT16)
                    accumulate_rows(rows - r, 1, at, t, next);
                else
                    accumulate_rows(rows - r, 0, at, t, next);
            }
}

/* The groups of images that fall to each slot, one after another in the slot's own room. */
static void weigh_groups(const void *task, int64_t first, int64_t end) {
    const weighing *t = task;
    const int64_t room = evk_convolution_room(t->images, t->outputs, t->format);
    const int64_t in_sums = 9 * t->images->channels * t->packing.padded_outputs;
    for (int64_t slot = first; slot < end; ++slot) {
        uint32_t *words = (uint32_t *)t->room + slot * room;
        memset(words, 0, room * WORD);
        const int64_t stop = t->groups * (slot + 1) / t->slots;
        for (int64_t group = t->groups * slot / t->slots; group < stop; ++group) {
            float *sums = t->sums + group * in_sums;
            memset(sums, 0, in_sums * sizeof *sums);
            const int64_t from = group * EVK_GROUP_IMAGES;
            for (int64_t n = from; n < from + EVK_GROUP_IMAGES && n < t->images->images; ++n)
                weigh_image(t, n, words, sums);
        }
    }
}

void evk_convolution_weights(const void *gradient, const void *x, float *sums, void *room,
                             const evk_images *images, int64_t outputs, int32_t format,
                             int32_t threads) {
    const weighing task = {
        .gradient = gradient, .x = x, .sums = sums, .room = room, .images = images,
        .outputs = outputs, .packing = packing_of(images, outputs, format), .format = format,
        .groups = (images->images + EVK_GROUP_IMAGES - 1) / EVK_GROUP_IMAGES, .slots = threads,
    };
    share_out(weigh_groups, &task, threads, threads);
}

#else

#include <stdlib.h>

int32_t evk_has_convolution_weights(void) { return 0; }

void evk_convolution_weights(const void *gradient, const void *x, float *sums, void *room,
                             const evk_images *images, int64_t outputs, int32_t format,
                             int32_t threads) {
    (void)gradient, (void)x, (void)sums, (void)room;
    (void)images, (void)outputs, (void)format, (void)threads;
    abort();
}

#endif
