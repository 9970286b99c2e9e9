#include "staging.h"

#include <string.h>

#include "kernels.h"

/* Formats and the arithmetic types in which they are used: format, storage type, arithmetic type,
 * and what makes a number of the arithmetic type ready for the format's store function. */
#define PAIRS(PAIR)                                \
    PAIR(float32, float, float, )                  \
    PAIR(bfloat16, uint16_t, float, )              \
    PAIR(float16, uint16_t, float, )               \
    PAIR(float64, double, double, )                \
    PAIR(float32, float, double, (float))          \
    PAIR(bfloat16, uint16_t, double, narrowed)

/* Dense elements have a loop of their own: only that one becomes plain vector loads and stores. */
#define FUNCTIONS(format, storage, real, ready)                                                 \
    EVK_CLONES static void gather_##format##_##real(void *buffer, const void *tensor,           \
                                                    int64_t stride, int64_t n) {                \
        real *restrict to = buffer;                                                             \
        const storage *restrict from = tensor;                                                  \
        if (stride == 1)                                                                        \
            for (int64_t i = 0; i < n; ++i) to[i] = load_##format(from[i]);                     \
        else                                                                                    \
            for (int64_t i = 0; i < n; ++i) to[i] = load_##format(from[i * stride]);            \
    }                                                                                           \
    EVK_CLONES static void scatter_##format##_##real(const void *buffer, void *tensor,          \
                                                     int64_t stride, int64_t n) {               \
        const real *restrict from = buffer;                                                     \
        storage *restrict to = tensor;                                                          \
        if (stride == 1)                                                                        \
            for (int64_t i = 0; i < n; ++i) to[i] = store_##format(ready(from[i]));             \
        else                                                                                    \
            for (int64_t i = 0; i < n; ++i) to[i * stride] = store_##format(ready(from[i]));    \
    }

PAIRS(FUNCTIONS)

#define STOCHASTIC(real, ready)                                                                 \
    EVK_CLONES static void scatter_stochastic_##real(const void *buffer, void *tensor,          \
                                                     int64_t stride, int64_t n,                 \
                                                     const uint16_t *restrict random) {         \
        const real *restrict from = buffer;                                                     \
        uint16_t *restrict to = tensor;                                                         \
        if (stride == 1)                                                                        \
            for (int64_t i = 0; i < n; ++i)                                                     \
                to[i] = store_bfloat16_stochastic(ready(from[i]), random[i]);                   \
        else                                                                                    \
            for (int64_t i = 0; i < n; ++i)                                                     \
                to[i * stride] = store_bfloat16_stochastic(ready(from[i]), random[i]);          \
    }

STOCHASTIC(float, )
STOCHASTIC(double, narrowed)

static const int64_t SIZES[] = {
    [EVK_FLOAT32] = 4, [EVK_FLOAT64] = 8, [EVK_BFLOAT16] = 2, [EVK_FLOAT16] = 2};

/* [whether arithmetic is in double][format] */
static void (*const GATHER[2][4])(void *, const void *, int64_t, int64_t) = {
    {[EVK_FLOAT32] = gather_float32_float,
     [EVK_BFLOAT16] = gather_bfloat16_float,
     [EVK_FLOAT16] = gather_float16_float},
    {[EVK_FLOAT32] = gather_float32_double,
     [EVK_FLOAT64] = gather_float64_double,
     [EVK_BFLOAT16] = gather_bfloat16_double}};

static void (*const SCATTER[2][4])(const void *, void *, int64_t, int64_t) = {
    {[EVK_FLOAT32] = scatter_float32_float,
     [EVK_BFLOAT16] = scatter_bfloat16_float,
     [EVK_FLOAT16] = scatter_float16_float},
    {[EVK_FLOAT32] = scatter_float32_double,
     [EVK_FLOAT64] = scatter_float64_double,
     [EVK_BFLOAT16] = scatter_bfloat16_double}};

int64_t evk_size(int format) { return SIZES[format]; }

void evk_place(evk_cursor *cursor, const evk_layout *layout, int64_t i) {
    static const int64_t endless = INT64_MAX, one = 1;
    static const evk_layout dense = {1, &endless, &one};
    cursor->layout = layout ? layout : &dense;
    cursor->offset = 0;
    for (int64_t d = cursor->layout->dimensions; d-- > 0; i /= cursor->layout->shape[d]) {
        cursor->index[d] = i % cursor->layout->shape[d];
        cursor->offset += cursor->index[d] * cursor->layout->strides[d];
    }
}

/* How many of the next n elements lie in one row of the innermost dimension. */
static int64_t run_length(const evk_cursor *cursor, int64_t n) {
    const int64_t d = cursor->layout->dimensions - 1;
    const int64_t left = cursor->layout->shape[d] - cursor->index[d];
    return left < n ? left : n;
}

static int64_t run_stride(const evk_cursor *cursor) {
    return cursor->layout->strides[cursor->layout->dimensions - 1];
}

/* Move on by no more than the row has left. */
static void advance(evk_cursor *cursor, int64_t run) {
    const int64_t *shape = cursor->layout->shape, *strides = cursor->layout->strides;
    int64_t d = cursor->layout->dimensions - 1;
    cursor->index[d] += run;
    cursor->offset += run * strides[d];
    for (; d > 0 && cursor->index[d] == shape[d]; --d) {
        cursor->index[d] = 0;
        cursor->index[d - 1] += 1;
        cursor->offset += strides[d - 1] - shape[d] * strides[d];
    }
}

void evk_gather(void *buffer, const void *tensor, evk_cursor *cursor, int format, int float64,
                int64_t n) {
    const int64_t size = float64 ? sizeof(double) : sizeof(float);
    const int64_t stride = run_stride(cursor);
    for (int64_t done = 0, run; done < n; done += run) {
        run = run_length(cursor, n - done);
        GATHER[float64][format]((char *)buffer + done * size,
                                (const char *)tensor + cursor->offset * SIZES[format], stride, run);
        advance(cursor, run);
    }
}

void evk_scatter(const void *buffer, void *tensor, evk_cursor *cursor, int format, int float64,
                 int64_t n, const uint16_t *random) {
    const int64_t size = float64 ? sizeof(double) : sizeof(float);
    const int64_t stride = run_stride(cursor);
    for (int64_t done = 0, run; done < n; done += run) {
        run = run_length(cursor, n - done);
        const char *from = (const char *)buffer + done * size;
        char *to = (char *)tensor + cursor->offset * SIZES[format];
        if (!random || format != EVK_BFLOAT16)
            SCATTER[float64][format](from, to, stride, run);
        else if (float64)
            scatter_stochastic_double(from, to, stride, run, random + done);
        else
            scatter_stochastic_float(from, to, stride, run, random + done);
        advance(cursor, run);
    }
}

/* Zeros in every `stride`-th element. */
static void clear_strided(char *to, int64_t stride, int64_t size, int64_t n) {
    if (size == sizeof(uint16_t))
        for (int64_t i = 0; i < n; ++i) ((uint16_t *)to)[i * stride] = 0;
    else if (size == sizeof(float))
        for (int64_t i = 0; i < n; ++i) ((float *)to)[i * stride] = 0;
    else
        for (int64_t i = 0; i < n; ++i) ((double *)to)[i * stride] = 0;
}

void evk_clear(void *tensor, evk_cursor *cursor, int format, int64_t n) {
    const int64_t size = SIZES[format], stride = run_stride(cursor);
    for (int64_t done = 0, run; done < n; done += run) {
        run = run_length(cursor, n - done);
        char *to = (char *)tensor + cursor->offset * size;
        if (stride == 1)
            memset(to, 0, run * size);
        else
            clear_strided(to, stride, size, run);
        advance(cursor, run);
    }
}
