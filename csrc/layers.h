/* The layers of small networks between their products: read once, written once.
 *
 * Activations are images x height x width x channels, one after another, float32 or bfloat16
 * (EVK_FLOAT32, EVK_BFLOAT16); arithmetic is in float, stores round once. Random bits are those of
 * a stream keyed by `seed`, 16 for each element of the output by its place in memory, so nothing
 * depends on `threads`. Mirrored by evokernels/tasks/layers.py. */
#ifndef EVK_LAYERS_H
#define EVK_LAYERS_H

#include <stdint.h>

/* Dropout: an element is kept where its 16 random bits are at least `threshold`, and multiplied
 * by `scale` = 65536 / (65536 - threshold); a threshold of 0 keeps all. */
typedef struct {
    uint64_t seed;
    uint32_t threshold;
    float scale;
} evk_dropout;

/* Of an image before pooling; pooling cuts off the last row and column where they are odd. */
typedef struct {
    int64_t images, height, width, channels;
} evk_images;

/* Where the gradient of a pooled element goes: one of the four it was chosen from, in reading
 * order, or nowhere, because relu or dropout made it zero. */
enum { EVK_NOWHERE = 4 };

/* y = dropout(max of four(relu(x))); `code` has a byte for each element of y. */
void evk_pool(const void *x, void *y, uint8_t *code, const evk_images *images,
              const evk_dropout *dropout, int32_t format, int32_t threads);

/* The gradient of x from that of y, every element of it. `sums`, where not NULL, is float
 * (images, channels): the gradient summed over the places of each image. */
void evk_pool_backward(const void *gradient, const uint8_t *code, void *result, float *sums,
                       const evk_images *images, float scale, int32_t format, int32_t threads);

/* Channels that the next two work on together; theirs must be a multiple of it. */
enum { EVK_LANES = 16 };

/* y = max of four(relu(convolution of x)), of grey images: x is float (images, height, width),
 * padded by one zero on each side; `weights` float (10, channels): one row a tap of the 3 x 3, in
 * reading order, and the bias. Nothing of the size of the convolution is ever in memory. */
void evk_convolve_pool(const float *x, const float *weights, void *y, uint8_t *code,
                       const evk_images *images, int32_t format, int32_t threads);

/* What each image adds to the gradient of `weights`: `sums` is float (images, 10, channels). */
void evk_convolve_pool_backward(const void *gradient, const uint8_t *code, const float *x,
                                float *sums, const evk_images *images, int32_t format,
                                int32_t threads);

/* y = dropout(relu(y)), n elements. */
void evk_relu(void *y, int64_t n, const evk_dropout *dropout, int32_t format, int32_t threads);

/* The gradient before relu and dropout; y is what `evk_relu` left. */
void evk_relu_backward(const void *gradient, const void *y, void *result, int64_t n, float scale,
                       int32_t format, int32_t threads);

/* y (matrices, columns, rows) of x (matrices, rows, columns): of images, pixels for channels. */
void evk_transpose(const void *x, void *y, int64_t matrices, int64_t rows, int64_t columns,
                   int32_t format, int32_t threads);

/* What a batch norm keeps; float (channels,) each. */
typedef struct {
    const float *weight, *bias;
    float *running_mean, *running_variance;
    float momentum, epsilon;
} evk_norm;

/* Rows of which sums are taken together, in float around the first of them. */
enum { EVK_NORM_ROWS = 256 };

/* y = relu(batch_norm(x)) of x (rows, channels), rows > 1, with the statistics of the batch; moves
 * the running ones. `saved` is float (4, channels): mean, 1 / standard deviation, that times
 * weight, bias; `sums` is room for as
 * many floats as (ceil(rows / EVK_NORM_ROWS), 2, channels). */
void evk_norm_relu(const void *x, void *y, const evk_norm *norm, float *saved, float *sums,
                   int64_t rows, int64_t channels, int32_t format, int32_t threads);

/* The same with given statistics: `saved` is read, except its second row. */
void evk_scale_relu(const void *x, void *y, const float *saved, int64_t rows, int64_t channels,
                    int32_t format, int32_t threads);

/* Gradients of x, and of weight and bias, float (2, channels) in `parameters`; `saved` and
 * `sums` as before. */
void evk_norm_relu_backward(const void *gradient, const void *x, const float *saved, void *result,
                            float *parameters, float *sums, int64_t rows, int64_t channels,
                            int32_t format, int32_t threads);

#endif
