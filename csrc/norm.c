#include "lanes.h"
#include "share.h"

/* Channels are worked on in blocks of two vectors; one sum need not wait for the other. In bfloat16
 * they are the even and the odd channels: those are the halves of 32-bit words, so that widening
 * and narrowing take an instruction or two and no permutation. */
enum { BLOCK = 2 * LANES };

/* Bytes to fetch ahead: rows are done with faster than the processor foresees which ones follow. */
enum { AHEAD = 4096 };

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef struct {
    vector of[2];
} pair;

#define EACH_VECTOR(k) for (int k = 0; k < 2; ++k)
#define INLINED static inline __attribute__((always_inline))

/* The first n of a block of numbers as they lie in memory, and zeros; and back. */
typedef struct {
    words of[2];
} block;

#define FETCH(into, from, n) \
    (memset(&(into), 0, sizeof(into)), memcpy(&(into), from, (size_t)(n) * sizeof *(from)))
#define STORE(from, to, n) memcpy(to, &(from), (size_t)(n) * sizeof *(to))

#define SPLIT_float32(block, k) ((vector)(block).of[k])
#define SPLIT_bfloat16(block, k) \
    ((vector)((k) == UPPER ? (block).of[0] & 0xffff0000u : (block).of[0] << 16))
#define JOIN_float32(block, pair) EACH_VECTOR(k) (block).of[k] = (words)(pair).of[k]
#define JOIN_bfloat16(block, pair) \
    ((block).of[0] = (words)ROUNDED((pair).of[!UPPER]) >> 16 | \
                     ((words)ROUNDED((pair).of[UPPER]) & 0xffff0000u))

/* Which element of two lies in the upper half of a word. */
enum { UPPER = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ };

/* To nearest even in the upper half of each word. No NaN is rounded to anything else: arithmetic
 * has those of its operands, and all of these have zeros in the lower half. */
#define ROUNDED(floats) ((integers)(floats) + 0x7fff + ((integers)(floats) >> 16 & 1))

/* Floats with every NaN the same one. */
#define WITHOUT_PAYLOAD(words) \
    (((words) & ~NANS(words)) | (NANS(words) & NAN_float32))
#define NANS(words) ((words) << 1 > (uint32_t)INFINITY_float32 << 1)

/* Floats, one a channel, in the order of the vectors. */
#define ARRANGED_float32(block, k) ((vector)(block).of[k])
#define ARRANGED_bfloat16(block, k)                                                            \
    ((k) ? SHUFFLED((vector)(block).of[0], (vector)(block).of[1], 1, 3, 5, 7, 9, 11, 13, 15,   \
                    17, 19, 21, 23, 25, 27, 29, 31)                                            \
         : SHUFFLED((vector)(block).of[0], (vector)(block).of[1], 0, 2, 4, 6, 8, 10, 12, 14,   \
                    16, 18, 20, 22, 24, 26, 28, 30))
#define REARRANGED_float32(block, pair) JOIN_float32(block, pair)
#define REARRANGED_bfloat16(block, pair)                                                       \
    ((block).of[0] = (words)FIRST_HALVES((pair).of[0], (pair).of[1]),                          \
     (block).of[1] = (words)LAST_HALVES((pair).of[0], (pair).of[1]))

/* relu's gradient: that of z, where relu lets it through. */
#define BEHIND_RELU(gradient, z) ((vector)((integers)(gradient) & ~((z) <= 0.0f)))

/* A function of all channels from one of a block. */
#define IN_BLOCKS(name, ...)                                                                   \
    for (int64_t c = 0; c < channels; c += BLOCK) {                                            \
        if (channels - c >= BLOCK)                                                             \
            name(__VA_ARGS__, BLOCK); /* a constant: vectors stay in registers */              \
        else                                                                                   \
            name(__VA_ARGS__, channels - c);                                                   \
    }

#define NORM(type)                                                                             \
    INLINED pair floats_##type(const float *from, int64_t n) {                                 \
        block b;                                                                               \
        FETCH(b, from, n);                                                                     \
        EACH_VECTOR(k) b.of[k] = WITHOUT_PAYLOAD(b.of[k]);                                     \
        return (pair){{ARRANGED_##type(b, 0), ARRANGED_##type(b, 1)}};                         \
    }                                                                                          \
    INLINED void put_floats_##type(pair sums, float *to, int64_t n) {                          \
        block b;                                                                               \
        REARRANGED_##type(b, sums);                                                            \
        STORE(b, to, n);                                                                       \
    }                                                                                          \
    INLINED pair load_##type##s(const STORED_##type *from, int64_t n) {                        \
        block b;                                                                               \
        FETCH(b, from, n);                                                                     \
        __builtin_prefetch((const char *)from + AHEAD);                                        \
        return (pair){{SPLIT_##type(b, 0), SPLIT_##type(b, 1)}};                               \
    }                                                                                          \
    INLINED void store_##type##s(pair exact, STORED_##type *to, int64_t n) {                   \
        block b;                                                                               \
        JOIN_##type(b, exact);                                                                 \
        STORE(b, to, n);                                                                       \
    }                                                                                          \
                                                                                               \
    /* Sums over rows of x and x * x, both around the first row. */                            \
    INLINED void moments_##type(const STORED_##type *x, float *first, float *second,           \
                                int64_t rows, int64_t channels, int64_t n) {                   \
        const pair around = load_##type##s(x, n);                                              \
        pair sum = {{{0}}}, squares = {{{0}}};                                                 \
        for (int64_t r = 1; r < rows; ++r) {                                                   \
            const pair values = load_##type##s(x + r * channels, n);                           \
            EACH_VECTOR(k) {                                                                   \
                const vector d = values.of[k] - around.of[k];                                  \
                sum.of[k] += d;                                                                \
                squares.of[k] += d * d;                                                        \
            }                                                                                  \
        }                                                                                      \
        put_floats_##type(sum, first, n);                                                      \
        put_floats_##type(squares, second, n);                                                 \
    }                                                                                          \
    EVK_CLONES static void take_moments_##type(const STORED_##type *x, float *first,           \
                                               float *second, int64_t rows,                    \
                                               int64_t channels) {                             \
        IN_BLOCKS(moments_##type, x + c, first + c, second + c, rows, channels)                \
    }                                                                                          \
                                                                                               \
    INLINED void scaled_##type(const STORED_##type *x, STORED_##type *y, const float *mean,    \
                               const float *factor, const float *bias, int64_t rows,           \
                               int64_t channels, int64_t n) {                                  \
        const pair middle = floats_##type(mean, n), scale = floats_##type(factor, n);          \
        const pair shift = floats_##type(bias, n);                                             \
        for (int64_t r = 0; r < rows; ++r, x += channels, y += channels) {                     \
            pair values = load_##type##s(x, n);                                                \
            EACH_VECTOR(k) {                                                                   \
                const vector centred = values.of[k] - middle.of[k];                            \
                const vector z = centred * scale.of[k] + shift.of[k];                          \
                values.of[k] = BEHIND_RELU(z, z);                                              \
            }                                                                                  \
            store_##type##s(values, y, n);                                                     \
        }                                                                                      \
    }                                                                                          \
    EVK_CLONES static void scale_relu_##type(                                                  \
        const STORED_##type *x, STORED_##type *y, const float *mean, const float *factor,      \
        const float *bias, int64_t rows, int64_t channels) {                                   \
        IN_BLOCKS(scaled_##type, x + c, y + c, mean + c, factor + c, bias + c, rows, channels) \
    }                                                                                          \
                                                                                               \
    /* Sums over rows of the gradient behind relu, alone and times the centred x. */           \
    INLINED void products_##type(const STORED_##type *gradient, const STORED_##type *x,        \
                                 const float *mean, const float *factor, const float *bias,    \
                                 float *first, float *second, int64_t rows, int64_t channels,  \
                                 int64_t n) {                                                  \
        const pair middle = floats_##type(mean, n), scale = floats_##type(factor, n);          \
        const pair shift = floats_##type(bias, n);                                             \
        pair sum = {{{0}}}, products = {{{0}}};                                                \
        for (int64_t r = 0; r < rows; ++r, x += channels, gradient += channels) {              \
            const pair values = load_##type##s(x, n), after = load_##type##s(gradient, n);     \
            EACH_VECTOR(k) {                                                                   \
                const vector centred = values.of[k] - middle.of[k];                            \
                const vector z = centred * scale.of[k] + shift.of[k];                          \
                const vector g = BEHIND_RELU(after.of[k], z);                                  \
                sum.of[k] += g;                                                                \
                products.of[k] += g * centred;                                                 \
            }                                                                                  \
        }                                                                                      \
        put_floats_##type(sum, first, n);                                                      \
        put_floats_##type(products, second, n);                                                \
    }                                                                                          \
    EVK_CLONES static void take_products_##type(                                               \
        const STORED_##type *gradient, const STORED_##type *x, const float *mean,              \
        const float *factor, const float *bias, float *first, float *second, int64_t rows,     \
        int64_t channels) {                                                                    \
        IN_BLOCKS(products_##type, gradient + c, x + c, mean + c, factor + c, bias + c,        \
                  first + c, second + c, rows, channels)                                       \
    }                                                                                          \
                                                                                               \
    /* result = factor * g + slope * (x - mean) + offset. */                                   \
    INLINED void backward_##type(const STORED_##type *gradient, const STORED_##type *x,        \
                                 const float *mean, const float *factor, const float *bias,    \
                                 const float *slope, const float *offset,                      \
                                 STORED_##type *result, int64_t rows, int64_t channels,        \
                                 int64_t n) {                                                  \
        const pair middle = floats_##type(mean, n), scale = floats_##type(factor, n);          \
        const pair shift = floats_##type(bias, n), steep = floats_##type(slope, n);            \
        const pair moved = floats_##type(offset, n);                                           \
        for (int64_t r = 0; r < rows;                                                          \
             ++r, x += channels, gradient += channels, result += channels) {                   \
            const pair values = load_##type##s(x, n), after = load_##type##s(gradient, n);     \
            pair before;                                                                       \
            EACH_VECTOR(k) {                                                                   \
                const vector centred = values.of[k] - middle.of[k];                            \
                const vector z = centred * scale.of[k] + shift.of[k];                          \
                const vector g = BEHIND_RELU(after.of[k], z);                                  \
                before.of[k] = g * scale.of[k] + (centred * steep.of[k] + moved.of[k]);        \
            }                                                                                  \
            store_##type##s(before, result, n);                                                \
        }                                                                                      \
    }                                                                                          \
    EVK_CLONES static void norm_backward_##type(                                               \
        const STORED_##type *gradient, const STORED_##type *x, const float *mean,              \
        const float *factor, const float *bias, const float *slope, const float *offset,       \
        STORED_##type *result, int64_t rows, int64_t channels) {                               \
        IN_BLOCKS(backward_##type, gradient + c, x + c, mean + c, factor + c, bias + c,        \
                  slope + c, offset + c, result + c, rows, channels)                           \
    }

NORM(float32)
NORM(bfloat16)

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
        CALL(t->format, take_moments, part_of(t, t->x, part), sums, sums + t->channels,
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
        CALL(t->format, take_products, part_of(t, t->gradient, part), part_of(t, t->x, part),
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
