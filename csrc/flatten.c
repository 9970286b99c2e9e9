#include "lanes.h"
#include "share.h"

/* As first rows interleaved with last ones: the upper bit of a row becomes the lowest of a column,
 * and after four times rows are columns. */
#define INTERLEAVE(from, into)                                                                 \
    for (int i = 0; i < LANES / 2; ++i) {                                                      \
        into[2 * i] = FIRST_HALVES(from[i], from[i + LANES / 2]);                              \
        into[2 * i + 1] = LAST_HALVES(from[i], from[i + LANES / 2]);                           \
    }

#define TRANSPOSE(type, narrow)                                                                \
    /* LANES x LANES of x (…, columns) to y (…, rows). */                                      \
    static inline __attribute__((always_inline)) void transpose_tile_##type(                   \
        const STORED_##type *x, STORED_##type *y, int64_t rows, int64_t columns) {             \
        narrow a[LANES], b[LANES];                                                             \
        for (int i = 0; i < LANES; ++i) a[i] = LOAD(narrow, x + i * columns);                  \
        INTERLEAVE(a, b)                                                                       \
        INTERLEAVE(b, a)                                                                       \
        INTERLEAVE(a, b)                                                                       \
        INTERLEAVE(b, a)                                                                       \
        for (int i = 0; i < LANES; ++i) memcpy(y + i * rows, &a[i], sizeof a[i]);              \
    }                                                                                          \
    EVK_CLONES static void transpose_##type(const STORED_##type *x, STORED_##type *y,          \
                                            int64_t rows, int64_t columns) {                   \
        if (rows < LANES || columns < LANES) {                                                 \
            for (int64_t r = 0; r < rows; ++r)                                                 \
                for (int64_t c = 0; c < columns; ++c) y[c * rows + r] = x[r * columns + c];    \
            return;                                                                            \
        }                                                                                      \
        for (int64_t r = 0; r < rows; r += LANES)                                              \
            for (int64_t c = 0; c < columns; c += LANES) {                                     \
                /* the last tiles overlap those before them */                                 \
                const int64_t row = smaller(r, rows - LANES);                                  \
                const int64_t column = smaller(c, columns - LANES);                            \
                transpose_tile_##type(x + row * columns + column, y + column * rows + row,     \
                                      rows, columns);                                          \
            }                                                                                  \
    }

TRANSPOSE(float32, vector)
TRANSPOSE(bfloat16, halves)

typedef struct {
    const void *x;
    void *y;
    int64_t rows, columns;
    int32_t format;
} transposing;

static void transpose_matrices(const void *task, int64_t first, int64_t end) {
    const transposing *t = task;
    const int64_t size = t->rows * t->columns * bytes(t->format);
    for (int64_t n = first; n < end; ++n)
        CALL(t->format, transpose, (const void *)((const char *)t->x + n * size),
             (void *)((char *)t->y + n * size), t->rows, t->columns);
}

void evk_transpose(const void *x, void *y, int64_t matrices, int64_t rows, int64_t columns,
                   int32_t format, int32_t threads) {
    const transposing task = {x, y, rows, columns, format};
    share_out(transpose_matrices, &task, matrices, threads);
}
