#include "layers.h"

#include "kernels.h"
#include "random.h"
#include "runtime.h"
#include "share.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t bytes(int32_t format) { return format == EVK_BFLOAT16 ? 2 : 4; }

/* relu and the choice of the largest need no arithmetic: as integers, the bits of positive
 * numbers are ordered as the numbers are, NaN above infinity, and all negative ones are below 0. */
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

enum { LANES = EVK_LANES };

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
    }                                                                                          \
                                                                                               \
    /* Sums over rows of x and x * x, both around the first row. */                            \
    EVK_CLONES static void add_moments_##type(const STORED_##type *restrict x,                 \
                                              float *restrict first, float *restrict second,   \
                                              int64_t rows, int64_t channels) {                \
        for (int64_t r = 1; r < rows; ++r)                                                     \
            for (int64_t c = 0; c < channels; ++c) {                                           \
                const float d = load_##type(x[r * channels + c]) - load_##type(x[c]);          \
                first[c] += d;                                                                 \
                second[c] += d * d;                                                            \
            }                                                                                  \
    }                                                                                          \
                                                                                               \
    EVK_CLONES static void scale_relu_##type(const STORED_##type *restrict x,                  \
                                             STORED_##type *restrict y,                        \
                                             const float *restrict mean,                       \
                                             const float *restrict factor,                     \
                                             const float *restrict bias, int64_t rows,         \
                                             int64_t channels) {                               \
        for (int64_t r = 0; r < rows; ++r)                                                     \
            for (int64_t c = 0; c < channels; ++c) {                                           \
                const float centred = load_##type(x[r * channels + c]) - mean[c];              \
                const float z = centred * factor[c] + bias[c];                                 \
                y[r * channels + c] = store_##type(behind_relu(z, z));                         \
            }                                                                                  \
    }                                                                                          \
                                                                                               \
    /* Sums over rows of the gradient behind relu, alone and times the centred x. */           \
    EVK_CLONES static void add_products_##type(                                                \
        const STORED_##type *restrict gradient, const STORED_##type *restrict x,               \
        const float *restrict mean, const float *restrict factor,                              \
        const float *restrict bias, float *restrict first, float *restrict second,             \
        int64_t rows, int64_t channels) {                                                      \
        for (int64_t r = 0; r < rows; ++r)                                                     \
            for (int64_t c = 0; c < channels; ++c) {                                           \
                const float centred = load_##type(x[r * channels + c]) - mean[c];              \
                const float z = centred * factor[c] + bias[c];                                 \
                const float g = behind_relu(load_##type(gradient[r * channels + c]), z);       \
                first[c] += g;                                                                 \
                second[c] += g * centred;                                                      \
            }                                                                                  \
    }                                                                                          \
                                                                                               \
    /* result = factor * g + slope * (x - mean) + offset. */                                   \
    EVK_CLONES static void norm_backward_##type(                                               \
        const STORED_##type *restrict gradient, const STORED_##type *restrict x,               \
        const float *restrict mean, const float *restrict factor,                              \
        const float *restrict bias, const float *restrict slope,                               \
        const float *restrict offset, STORED_##type *restrict result, int64_t rows,            \
        int64_t channels) {                                                                    \
        for (int64_t r = 0; r < rows; ++r)                                                     \
            for (int64_t c = 0; c < channels; ++c) {                                           \
                const float centred = load_##type(x[r * channels + c]) - mean[c];              \
                const float z = centred * factor[c] + bias[c];                                 \
                const float g = behind_relu(load_##type(gradient[r * channels + c]), z);       \
                result[r * channels + c] =                                                     \
                    store_##type(g * factor[c] + (centred * slope[c] + offset[c]));            \
            }                                                                                  \
    }

LAYERS(float32)
LAYERS(bfloat16)

/* The function of a name for the format at hand. */
#define CALL(format, name, ...) \
    ((format) == EVK_BFLOAT16 ? name##_bfloat16(__VA_ARGS__) : name##_float32(__VA_ARGS__))

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

/* One number for each of LANES channels. */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t small __attribute__((vector_size(LANES)));

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

#define LOAD(type, from)                                                                       \
    (__extension__({                                                                           \
        type loaded;                                                                           \
        memcpy(&loaded, from, sizeof loaded);                                                  \
        loaded;                                                                                \
    }))

/* Bits of positive floats, or of the NaN above, as they are stored, and back. */
#define ROUNDED_float32(bits) (bits)
#define ROUNDED_bfloat16(bits) (((bits) + 0x7fff + ((bits) >> 16 & 1)) >> 16)
#define WIDENED_float32(bits) (bits)
#define WIDENED_bfloat16(bits) (__builtin_convertvector(bits, integers) << 16)

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

/* Of batch norms, forward and backward. */
typedef struct {
    const void *gradient;
    const void *x;
    void *y;
    const float *saved; /* float (4, channels), see below */
    const float *slope, *offset;
    float *sums; /* float (parts, 2, channels) */
    int64_t rows, channels;
    int32_t format;
} norming;

/* What each row of `saved` has. */
enum { MEAN, INVERSE, FACTOR, BETA };

static int64_t parts_of(int64_t rows) { return (rows + EVK_NORM_ROWS - 1) / EVK_NORM_ROWS; }

static int64_t rows_in(const norming *t, int64_t part) {
    return smaller(EVK_NORM_ROWS, t->rows - part * EVK_NORM_ROWS);
}

/* The first element of a part of a tensor. */
static void *part_of(const norming *t, const void *tensor, int64_t part) {
    return (char *)tensor + part * EVK_NORM_ROWS * t->channels * bytes(t->format);
}

static const float *saved_row(const norming *t, int row) { return t->saved + row * t->channels; }

static void moments_of_parts(const void *task, int64_t first, int64_t end) {
    const norming *t = task;
    for (int64_t part = first; part < end; ++part) {
        float *sums = t->sums + part * 2 * t->channels;
        memset(sums, 0, 2 * t->channels * sizeof *sums);
        CALL(t->format, add_moments, part_of(t, t->x, part), sums, sums + t->channels,
             rows_in(t, part), t->channels);
    }
}

static void scale_parts(const void *task, int64_t first, int64_t end) {
    const norming *t = task;
    for (int64_t part = first; part < end; ++part)
        CALL(t->format, scale_relu, part_of(t, t->x, part), part_of(t, t->y, part),
             saved_row(t, MEAN), saved_row(t, FACTOR), saved_row(t, BETA), rows_in(t, part),
             t->channels);
}

static void products_of_parts(const void *task, int64_t first, int64_t end) {
    const norming *t = task;
    for (int64_t part = first; part < end; ++part) {
        float *sums = t->sums + part * 2 * t->channels;
        memset(sums, 0, 2 * t->channels * sizeof *sums);
        CALL(t->format, add_products, part_of(t, t->gradient, part), part_of(t, t->x, part),
             saved_row(t, MEAN), saved_row(t, FACTOR), saved_row(t, BETA), sums,
             sums + t->channels, rows_in(t, part), t->channels);
    }
}

static void norm_backward_parts(const void *task, int64_t first, int64_t end) {
    const norming *t = task;
    for (int64_t part = first; part < end; ++part)
        CALL(t->format, norm_backward, part_of(t, t->gradient, part), part_of(t, t->x, part),
             saved_row(t, MEAN), saved_row(t, FACTOR), saved_row(t, BETA), t->slope, t->offset,
             part_of(t, t->y, part), rows_in(t, part), t->channels);
}

static float element(const norming *t, const void *tensor, int64_t i) {
    return t->format == EVK_BFLOAT16 ? load_bfloat16(((const uint16_t *)tensor)[i])
                                     : ((const float *)tensor)[i];
}

/* Mean and sum of squares around it of one channel, from those of the parts: Chan, Golub &
 * LeVeque 1983, "Algorithms for computing the sample variance". */
static void join_moments(const norming *t, int64_t channel, double *mean, double *squares) {
    double seen = 0;
    *mean = *squares = 0;
    for (int64_t part = 0; part < parts_of(t->rows); ++part) {
        const float *sums = t->sums + part * 2 * t->channels;
        const double n = (double)rows_in(t, part);
        const double shift = (double)sums[channel] / n;
        const double delta = element(t, part_of(t, t->x, part), channel) + shift - *mean;
        seen += n;
        *mean += delta * (n / seen);
        *squares += sums[t->channels + channel] - n * shift * shift +
                    delta * delta * (n * (seen - n) / seen);
    }
    *squares = *squares < 0 ? 0 : *squares; /* of equal numbers, rounded; NaN stays */
}

void evk_norm_relu(const void *x, void *y, const evk_norm *norm, float *saved, float *sums,
                   int64_t rows, int64_t channels, int32_t format, int32_t threads) {
    const norming task = {.x = x, .y = y, .saved = saved, .sums = sums, .rows = rows,
                          .channels = channels, .format = format};
    share_out(moments_of_parts, &task, parts_of(rows), threads);
    for (int64_t c = 0; c < channels; ++c) {
        double mean, squares;
        join_moments(&task, c, &mean, &squares);
        const double inverse = 1 / sqrt(squares / (double)rows + norm->epsilon);
        saved[MEAN * channels + c] = (float)mean;
        saved[INVERSE * channels + c] = (float)inverse;
        saved[FACTOR * channels + c] = (float)(norm->weight[c] * inverse);
        saved[BETA * channels + c] = norm->bias[c];
        norm->running_mean[c] += norm->momentum * ((float)mean - norm->running_mean[c]);
        norm->running_variance[c] +=
            norm->momentum * ((float)(squares / (double)(rows - 1)) - norm->running_variance[c]);
    }
    share_out(scale_parts, &task, parts_of(rows), threads);
}

void evk_scale_relu(const void *x, void *y, const float *saved, int64_t rows, int64_t channels,
                    int32_t format, int32_t threads) {
    const norming task = {.x = x, .y = y, .saved = saved, .rows = rows, .channels = channels,
                          .format = format};
    share_out(scale_parts, &task, parts_of(rows), threads);
}

void evk_norm_relu_backward(const void *gradient, const void *x, const float *saved, void *result,
                            float *parameters, float *sums, int64_t rows, int64_t channels,
                            int32_t format, int32_t threads) {
    norming task = {.gradient = gradient, .x = x, .y = result, .saved = saved, .sums = sums,
                    .rows = rows, .channels = channels, .format = format};
    share_out(products_of_parts, &task, parts_of(rows), threads);
    float *slope = sums, *offset = sums + channels; /* once all has been added up */
    for (int64_t c = 0; c < channels; ++c) {
        double first = 0, second = 0;
        for (int64_t part = 0; part < parts_of(rows); ++part) {
            first += sums[part * 2 * channels + c];
            second += sums[(part * 2 + 1) * channels + c];
        }
        const double inverse = saved[INVERSE * channels + c];
        const double factor = saved[FACTOR * channels + c];
        parameters[c] = (float)(second * inverse);
        parameters[channels + c] = (float)first;
        slope[c] = (float)(-factor * inverse * inverse * second / (double)rows);
        offset[c] = (float)(-factor * first / (double)rows);
    }
    task.slope = slope;
    task.offset = offset;
    share_out(norm_backward_parts, &task, parts_of(rows), threads);
}
