/* Elements of any format and layout, to and from buffers of the arithmetic type. */
#ifndef EVK_STAGING_H
#define EVK_STAGING_H

#include <stdint.h>

#include "runtime.h"

/* Elements in a buffer: buffers of doubles for all operands stay in the first-level cache. */
enum { EVK_BLOCK = 256 };

/* More dimensions of more than one element than any tensor has. */
enum { EVK_DIMENSIONS = 64 };

/* An element of a tensor: its place in each dimension, and its offset in memory. */
typedef struct {
    const evk_layout *layout;
    int64_t offset; /* in elements */
    int64_t index[EVK_DIMENSIONS];
} evk_cursor;

/* The element numbered `i`; a layout of NULL has one element after another. */
void evk_place(evk_cursor *cursor, const evk_layout *layout, int64_t i);

/* Load n elements, from the cursor on, into a buffer of float or double; the cursor moves on. */
void evk_gather(void *buffer, const void *tensor, evk_cursor *cursor, int format, int float64,
                int64_t n);

/* Store a buffer, rounded once: bfloat16 with 16 random bits an element where `random` is not
 * NULL, everything else to nearest even. */
void evk_scatter(const void *buffer, void *tensor, evk_cursor *cursor, int format, int float64,
                 int64_t n, const uint16_t *random);

/* Write zeros. */
void evk_clear(void *tensor, evk_cursor *cursor, int format, int64_t n);

/* Bytes of an element. */
int64_t evk_size(int format);

#endif
