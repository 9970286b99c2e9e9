#include "batches.h"

static int64_t within(int64_t x, int64_t end) { return x < 0 ? 0 : x < end ? x : end; }

/* One channel of one row; `step` is 1 or, from right to left, -1. */
static void make_row(const uint8_t *from, int64_t step, const float *levels, float *y,
                     int64_t channels, int64_t pixels) {
    for (int64_t i = 0; i < pixels; ++i) y[i * channels] = levels[from[i * step]];
}

static void make_black(const float *levels, float *y, int64_t channels, int64_t pixels) {
    for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) y[i * channels + c] = levels[256 * c];
}

static void make_image(const uint8_t *image, const float *levels, float *y, const evk_batch *of,
                       int64_t i) {
    const int64_t width = of->width, height = of->height, channels = of->channels;
    const int64_t down = of->down[i], right = of->right[i];
    /* columns of the crop that lie in the image, and where the first of them comes from */
    const int64_t first = within(-right, width), end = within(width - right, width);
    const int mirrored = of->mirrored[i];
    const int64_t column = mirrored ? width - 1 - (first + right) : first + right;
    for (int64_t h = 0; h < height; ++h, y += width * channels) {
        if (h + down < 0 || h + down >= height || first >= end) {
            make_black(levels, y, channels, width);
            continue;
        }
        make_black(levels, y, channels, first);
        for (int64_t c = 0; c < channels; ++c)
            make_row(image + (c * height + h + down) * width + column, mirrored ? -1 : 1,
                     levels + 256 * c, y + first * channels + c, channels, end - first);
        make_black(levels, y + end * channels, channels, width - end);
    }
}

void evk_make_batch(const uint8_t *split, const float *levels, float *y, const evk_batch *batch) {
    const int64_t size = batch->channels * batch->height * batch->width;
    for (int64_t i = 0; i < batch->images; ++i)
        make_image(split + batch->chosen[i] * size, levels, y + i * size, batch, i);
}
