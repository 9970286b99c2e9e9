#include "layers.h"

#include "lanes.h"
#include "random.h"
#include "runtime.h"
#include "share.h"

/* relu and the choice of the largest need no arithmetic, with bits as lanes.h orders them. */
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
/* A NaN of either sign as the positive one. */
#define ORDERED(type, bits) \
    (((bits) & MAGNITUDE_##type) > INFINITY_##type ? NAN_##type : (bits))

/* x or zero. As arithmetic: a choice would make loads conditional, and loops scalar. */
EVK_INLINE float where(int condition, float x) {
    return float_of(bits_of(x) & -(uint32_t)(condition != 0));
}

#define where_float32 where
EVK_INLINE uint16_t where_bfloat16(int condition, uint16_t x) {
    return (uint16_t)(x & -(condition != 0));
}

/* relu's gradient: that of z, where relu lets it through. */
EVK_INLINE float behind_relu(float gradient, float z) { return where(!(z <= 0.0f), gradient); }

#define LAYERS(type)                                                                           \
    /* One row of pooled pixels from two of the image. */                                      \
    EVK_CLONES static void pool_row_##type(const BITS_##type *top, const BITS_##type *bottom,  \
                                           BITS_##type *y, uint8_t *code, int64_t pixels,      \
                                           int64_t channels) {                                 \
        for (int64_t i = 0; i < pixels; ++i) {                                                 \
            const BITS_##type *restrict a = top + 2 * i * channels;                            \
            const BITS_##type *restrict b = bottom + 2 * i * channels;                         \
            BITS_##type *restrict into = y + i * channels;                                     \
            uint8_t *restrict chosen = code + i * channels;                                    \
            for (int64_t c = 0; c < channels; ++c) {                                           \
                const BITS_##type x0 = ORDERED(type, a[c]), x1 = ORDERED(type, a[channels + c]);\
                const BITS_##type x2 = ORDERED(type, b[c]), x3 = ORDERED(type, b[channels + c]);\
                const BITS_##type upper = LARGER(x0, x1), lower = LARGER(x2, x3);              \
                const BITS_##type largest = LARGER(upper, lower);                              \
                const BITS_##type in_upper = x0 == largest ? 0 : 1;                            \
                const BITS_##type in_lower = x2 == largest ? 2 : 3;                            \
                const BITS_##type place = upper == largest ? in_upper : in_lower;              \
                chosen[c] = (uint8_t)(largest > 0 ? place : EVK_NOWHERE);                      \
                into[c] = LARGER(largest, 0);                                                  \
            }                                                                                  \
        }                                                                                      \
    }                                                                                          \
                                                                                               \
    /* The gradient of four pixels from that of the one they were pooled to; adds it up. */    \
    EVK_INLINE void spread_##type(const STORED_##type *restrict gradient,                      \
                                  const uint8_t *restrict code, STORED_##type *restrict top,   \
                                  STORED_##type *restrict bottom, float *restrict sums,        \
                                  float scale, int64_t channels, int64_t n) {                  \
        for (int64_t c = 0; c < n; ++c) {                                                      \
            const STORED_##type stored = store_##type(load_##type(gradient[c]) * scale);       \
            top[c] = where_##type(code[c] == 0, stored);                                       \
            top[c + channels] = where_##type(code[c] == 1, stored);                            \
            bottom[c] = where_##type(code[c] == 2, stored);                                    \
            bottom[c + channels] = where_##type(code[c] == 3, stored);                         \
        }                                                                                      \
        for (int64_t c = 0; c < n; ++c)                                                        \
            sums[c] += where(code[c] != EVK_NOWHERE, load_##type(gradient[c]) * scale);        \
    }                                                                                          \
    /* Two rows of the image's gradient from one of pooled pixels. */                          \
    EVK_CLONES static void spread_row_##type(                                                  \
        const STORED_##type *gradient, const uint8_t *code, STORED_##type *top,                \
        STORED_##type *bottom, float *sums, float scale, int64_t pixels, int64_t channels) {   \
        for (int64_t i = 0; i < pixels; ++i, top += channels, bottom += channels) {            \
            int64_t c = 0;                                                                     \
            for (; c + LANES <= channels; c += LANES, gradient += LANES, code += LANES,        \
                                          top += LANES, bottom += LANES)                       \
                spread_##type(gradient, code, top, bottom, sums + c, scale, channels, LANES);  \
            const int64_t rest = channels - c;                                                 \
            spread_##type(gradient, code, top, bottom, sums + c, scale, channels, rest);       \
            gradient += rest, code += rest, top += rest, bottom += rest;                       \
        }                                                                                      \
    }                                                                                          \
                                                                                               \
    /* At most EVK_RANDOM_BITS elements. */                                                    \
    EVK_CLONES static void drop_##type(STORED_##type *restrict y, uint8_t *restrict code,      \
                                       const uint16_t *restrict bits, uint32_t threshold,      \
                                       float scale, int64_t n) {                               \
        for (int64_t i = 0; i < n; ++i)                                                        \
            y[i] = store_##type(load_##type(y[i]) * (bits[i] >= threshold ? scale : 0.0f));    \
        for (int64_t i = 0; code && i < n; ++i)                                                \
            code[i] = bits[i] >= threshold ? code[i] : EVK_NOWHERE;                            \
    }                                                                                          \
                                                                                               \
    EVK_CLONES static void relu_##type(BITS_##type *y, int64_t n) {                            \
        for (int64_t i = 0; i < n; ++i) {                                                      \
            const BITS_##type x = ORDERED(type, y[i]);                                         \
            y[i] = LARGER(x, 0);                                                               \
        }                                                                                      \
    }                                                                                          \
                                                                                               \
    EVK_CLONES static void relu_backward_##type(const STORED_##type *restrict gradient,        \
                                                const STORED_##type *restrict y,               \
                                                STORED_##type *restrict result, float scale,   \
                                                int64_t n) {                                   \
        for (int64_t i = 0; i < n; ++i) {                                                      \
            const float exact = load_##type(gradient[i]) * scale;                              \
            result[i] = store_##type(behind_relu(exact, load_##type(y[i])));                   \
        }                                                                                      \
    }

LAYERS(float32)
LAYERS(bfloat16)

/* Elements [first, end) of y. */
static void drop(void *y, uint8_t *code, const evk_dropout *dropout, int32_t format,
                 int64_t first, int64_t end) {
    const evk_stream stream = {.seed = dropout->seed};
    uint16_t buffer[EVK_RANDOM_BITS];
    for (int64_t n; first < end; first += n) {
        n = smaller(EVK_RANDOM_BITS - first % EVK_RANDOM_BITS, end - first);
        const uint16_t *bits = evk_random_bits(buffer, &stream, first, n);
        CALL(format, drop, (void *)((char *)y + first * bytes(format)), code ? code + first : code,
             bits, dropout->threshold, dropout->scale, n);
    }
}

typedef struct {
    const void *x;
    void *y;
    uint8_t *code;
    const evk_images *images;
    const evk_dropout *dropout;
    int32_t format;
} pooling;

static void pool_images(const void *task, int64_t first, int64_t end) {
    const pooling *t = task;
    const evk_images *of = t->images;
    const int64_t row = of->width * of->channels;
    const int64_t pooled = of->width / 2 * of->channels;
    const int64_t size = bytes(t->format);
    for (int64_t n = first; n < end; ++n)
        for (int64_t h = 0; h < of->height / 2; ++h) {
            const int64_t at = (n * (of->height / 2) + h) * pooled;
            const char *top = (const char *)t->x + (n * of->height + 2 * h) * row * size;
            CALL(t->format, pool_row, (const void *)top, (const void *)(top + row * size),
                 (void *)((char *)t->y + at * size), t->code + at, of->width / 2, of->channels);
            if (t->dropout->threshold)
                drop(t->y, t->code, t->dropout, t->format, at, at + pooled);
        }
}

void evk_pool(const void *x, void *y, uint8_t *code, const evk_images *images,
              const evk_dropout *dropout, int32_t format, int32_t threads) {
    const pooling task = {x, y, code, images, dropout, format};
    share_out(pool_images, &task, images->images, threads);
}

typedef struct {
    const void *gradient;
    const uint8_t *code;
    void *result;
    float *sums;
    const evk_images *images;
    float scale;
    int32_t format;
} spreading;

static void spread_images(const void *task, int64_t first, int64_t end) {
    const spreading *t = task;
    const evk_images *of = t->images;
    const int64_t size = bytes(t->format);
    const int64_t row = of->width * of->channels * size;
    const int64_t pooled = of->width / 2 * of->channels;
    for (int64_t n = first; n < end; ++n) {
        float *sums = t->sums + n * of->channels;
        memset(sums, 0, of->channels * sizeof *sums);
        for (int64_t h = 0; h < of->height / 2; ++h) {
            const int64_t at = (n * (of->height / 2) + h) * pooled;
            char *top = (char *)t->result + (n * of->height + 2 * h) * row;
            const void *gradient = (const char *)t->gradient + at * size;
            CALL(t->format, spread_row, gradient, t->code + at, (void *)top, (void *)(top + row),
                 sums, t->scale, of->width / 2, of->channels);
            if (of->width % 2)
                for (char *end_of = top + row; end_of <= top + 2 * row; end_of += row)
                    memset(end_of - of->channels * size, 0, of->channels * size);
        }
        if (of->height % 2)
            memset((char *)t->result + ((n + 1) * of->height - 1) * row, 0, row);
    }
}

void evk_pool_backward(const void *gradient, const uint8_t *code, void *result, float *sums,
                       const evk_images *images, float scale, int32_t format, int32_t threads) {
    const spreading task = {gradient, code, result, sums, images, scale, format};
    share_out(spread_images, &task, images->images, threads);
}

enum { TAPS = 9, BIAS = TAPS, WEIGHTS };

/* Multiplication and addition in one where the processor can, as the products of other layers have
 * it: half the instructions. The last bits of a convolution are those of the instruction set. */
#if defined(__GNUC__) && !defined(__clang__)
#define FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define FUSED
#endif

/* Both for one pooled row and LANES channels; `x` are four rows of the padded image, `width` long,
 * as they begin; the rest of an operand begins at the first of these channels. */
#define CONVOLUTION(type, narrow)                                                              \
    FUSED EVK_CLONES static void convolve_row_##type(                                          \
        const float *x, int64_t width, const float *weights, BITS_##type *y, uint8_t *code,    \
        int64_t pixels, int64_t channels) {                                                    \
        for (int64_t i = 0; i < pixels; ++i, x += 2, y += channels, code += channels) {        \
            integers largest = {0}, place = largest + EVK_NOWHERE;                             \
            for (int k = 0; k < 4; ++k) {                                                      \
                const float *corner = x + k / 2 * width + k % 2;                               \
                vector sum = LOAD(vector, weights + BIAS * channels);                          \
                for (int t = 0; t < TAPS; ++t)                                                 \
                    sum += LOAD(vector, weights + t * channels) *                              \
                           corner[t / 3 * width + t % 3];                                      \
                integers bits = (integers)sum;                                                 \
                const integers nan = (bits & MAGNITUDE_float32) > INFINITY_float32;            \
                bits = (bits & ~nan) | (nan & NAN_float32);                                    \
                const integers larger = bits > largest;                                        \
                largest = (largest & ~larger) | (bits & larger);                               \
                place = (place & ~larger) | (larger & k);                                      \
            }                                                                                  \
            const narrow stored = __builtin_convertvector(ROUNDED_##type(largest), narrow);    \
            const small chosen = __builtin_convertvector(place, small);                        \
            memcpy(y, &stored, sizeof stored);                                                 \
            memcpy(code, &chosen, sizeof chosen);                                              \
        }                                                                                      \
    }                                                                                          \
                                                                                               \
    FUSED EVK_CLONES static void convolve_row_backward_##type(                                 \
        const STORED_##type *gradient, const uint8_t *code, const float *x, int64_t width,     \
        float *sums, int64_t pixels, int64_t channels) {                                       \
        vector sum[WEIGHTS];                                                                   \
        for (int t = 0; t < WEIGHTS; ++t) sum[t] = LOAD(vector, sums + t * channels);          \
        for (int64_t i = 0; i < pixels; ++i, x += 2, gradient += channels, code += channels) { \
            const integers g = WIDENED_##type(LOAD(narrow, gradient));                         \
            const integers place = __builtin_convertvector(LOAD(small, code), integers);       \
            sum[BIAS] += (vector)(g & (place != EVK_NOWHERE));                                 \
            for (int k = 0; k < 4; ++k) {                                                      \
                const float *corner = x + k / 2 * width + k % 2;                               \
                const vector mine = (vector)(g & (place == k));                                \
                for (int t = 0; t < TAPS; ++t) sum[t] += mine * corner[t / 3 * width + t % 3]; \
            }                                                                                  \
        }                                                                                      \
        for (int t = 0; t < WEIGHTS; ++t)                                                      \
            memcpy(sums + t * channels, &sum[t], sizeof sum[t]);                               \
    }

CONVOLUTION(float32, integers)
CONVOLUTION(bfloat16, halves)

typedef struct {
    const float *x, *weights;
    const void *gradient;
    void *y;
    uint8_t *code;
    float *sums;
    const evk_images *images;
    int32_t format;
} convolving;

/* Pixels in each row of a padded image. */
static int64_t padded_width(const evk_images *of) { return of->width + 2; }

static void convolve_images(const void *task, int64_t first, int64_t end) {
    const convolving *t = task;
    const evk_images *of = t->images;
    const int64_t rows = of->height / 2, pixels = of->width / 2, width = padded_width(of);
    for (int64_t n = first; n < end; ++n)
        for (int64_t h = 0; h < rows; ++h)
            for (int64_t c = 0; c < of->channels; c += LANES) {
                const int64_t at = (n * rows + h) * pixels * of->channels + c;
                const float *x = t->x + (n * (of->height + 2) + 2 * h) * width;
                CALL(t->format, convolve_row, x, width, t->weights + c,
                     (void *)((char *)t->y + at * bytes(t->format)), t->code + at, pixels,
                     of->channels);
            }
}

void evk_convolve_pool(const float *x, const float *weights, void *y, uint8_t *code,
                       const evk_images *images, int32_t format, int32_t threads) {
    const convolving task = {.x = x, .weights = weights, .y = y, .code = code, .images = images,
                             .format = format};
    share_out(convolve_images, &task, images->images, threads);
}

static void convolve_images_backward(const void *task, int64_t first, int64_t end) {
    const convolving *t = task;
    const evk_images *of = t->images;
    const int64_t rows = of->height / 2, pixels = of->width / 2, width = padded_width(of);
    memset(t->sums + first * WEIGHTS * of->channels, 0,
           (end - first) * WEIGHTS * of->channels * sizeof *t->sums);
    for (int64_t n = first; n < end; ++n)
        for (int64_t h = 0; h < rows; ++h)
            for (int64_t c = 0; c < of->channels; c += LANES) {
                const int64_t at = (n * rows + h) * pixels * of->channels + c;
                const float *x = t->x + (n * (of->height + 2) + 2 * h) * width;
                CALL(t->format, convolve_row_backward,
                     (const void *)((const char *)t->gradient + at * bytes(t->format)),
                     t->code + at, x, width, t->sums + n * WEIGHTS * of->channels + c, pixels,
                     of->channels);
            }
}

void evk_convolve_pool_backward(const void *gradient, const uint8_t *code, const float *x,
                                float *sums, const evk_images *images, int32_t format,
                                int32_t threads) {
    const convolving task = {.x = x, .gradient = gradient, .code = (uint8_t *)code, .sums = sums,
                             .images = images, .format = format};
    share_out(convolve_images_backward, &task, images->images, threads);
}

typedef struct {
    const void *gradient;
    const void *x;
    void *y;
    int64_t n;
    const evk_dropout *dropout;
    float scale;
    int32_t format;
} rectifying;

/* Blocks of EVK_RANDOM_BITS elements. */
static void relu_blocks(const void *task, int64_t first, int64_t end) {
    const rectifying *t = task;
    const int64_t from = first * EVK_RANDOM_BITS, to = smaller(end * EVK_RANDOM_BITS, t->n);
    CALL(t->format, relu, (void *)((char *)t->y + from * bytes(t->format)), to - from);
    if (t->dropout->threshold) drop(t->y, 0, t->dropout, t->format, from, to);
}

static int64_t blocks_of(int64_t n) { return (n + EVK_RANDOM_BITS - 1) / EVK_RANDOM_BITS; }

void evk_relu(void *y, int64_t n, const evk_dropout *dropout, int32_t format, int32_t threads) {
    const rectifying task = {.y = y, .n = n, .dropout = dropout, .format = format};
    share_out(relu_blocks, &task, blocks_of(n), threads);
}

static void relu_backward_blocks(const void *task, int64_t first, int64_t end) {
    const rectifying *t = task;
    const int64_t from = first * EVK_RANDOM_BITS, to = smaller(end * EVK_RANDOM_BITS, t->n);
    const int64_t at = from * bytes(t->format);
    CALL(t->format, relu_backward, (const void *)((const char *)t->gradient + at),
         (const void *)((const char *)t->x + at), (void *)((char *)t->y + at), t->scale,
         to - from);
}

void evk_relu_backward(const void *gradient, const void *y, void *result, int64_t n, float scale,
                       int32_t format, int32_t threads) {
    const rectifying task = {.gradient = gradient, .x = y, .y = result, .n = n, .scale = scale,
                             .format = format};
    share_out(relu_backward_blocks, &task, blocks_of(n), threads);
}
