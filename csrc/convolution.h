/* The gradient of the weights of a 3 x 3 convolution, padded by 1, in steps of 1: images as in
 * layers.h. Mirrored by evokernels/tasks/layers.py. */
#ifndef EVK_CONVOLUTION_H
#define EVK_CONVOLUTION_H

#include <stdint.h>

#include "layers.h"

/* 1 where this build and this processor have `evk_convolution_weights` (x86-64 with AVX512-BF16,
 * and without AMX, which multiplies faster and is torch's to use); else 0: do not call it then. */
int32_t evk_has_convolution_weights(void);

/* Images whose sums are taken together, one after another; outputs are padded to a multiple. */
enum { EVK_GROUP_IMAGES = 32, EVK_GROUP_OUTPUTS = 32 };

/* How many floats one thread needs room for, with images of x and so many channels of the
 * gradient. */
int64_t evk_convolution_room(const evk_images *images, int64_t outputs, int32_t format);

/* What each group of images adds to the gradient of the weights. `gradient` has `outputs`
 * channels, `x` what `images` says; `sums` is float (ceil(images / EVK_GROUP_IMAGES), 3, 3,
 * channels, outputs rounded up to a multiple of EVK_GROUP_OUTPUTS), what is behind `outputs`
 * means nothing; `room` is float (threads, evk_convolution_room). Products of bfloat16 are
 * exact and added up in float; subnormal numbers of bfloat16 count as zero. Nothing depends on
 * `threads`. */
void evk_convolution_weights(const void *gradient, const void *x, float *sums, void *room,
                             const evk_images *images, int64_t outputs, int32_t format,
                             int32_t threads);

#endif
