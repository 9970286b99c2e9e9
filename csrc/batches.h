/* Batches of images, gathered, augmented and normalised in one pass over them.
 *
 * Mirrored by evokernels/tasks/images.py. */
#ifndef EVK_BATCHES_H
#define EVK_BATCHES_H

#include <stdint.h>

/* Images of a split that go into a batch, and what is done to them; one number an image of the
 * batch in each array. */
typedef struct {
    const int64_t *chosen;
    const uint8_t *mirrored;
    const int64_t *down, *right; /* where the crop begins in the image; may be outside */
    int64_t images, channels, height, width;
} evk_batch;

/* y (images, height, width, channels) from `split`, images of channels x height x width. `levels`
 * is float (channels, 256): what each byte becomes; what a crop has from outside is black, 0. */
void evk_make_batch(const uint8_t *split, const float *levels, float *y, const evk_batch *batch);

#endif
