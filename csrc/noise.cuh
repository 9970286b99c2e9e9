/* What csrc/perturb.h does on a CPU, in one launch for all tensors of a device: the same bits. Needs
 * EVK_THREADS and EVK_DENSE. Records are mirrored by evokernels/kernels/noise_device.py. */
#ifndef EVK_NOISE_CUH
#define EVK_NOISE_CUH

#include "device.cuh"
#include "noise.h"

struct Noisy {
    void *target, *centre;
    int64_t elements, format, position;
    int64_t target_layout, centre_layout; /* where in the table of layouts, or EVK_DENSE */
    int64_t chunk_end; /* chunks of this tensor and of all before it */
};

struct Words {
    void *tensors; /* a Noisy each */
    void *layouts; /* int64: dimensions, then size and stride of each, the innermost last */
    void *weights; /* double: of each member, for an estimate */
    int64_t tensor_count, chunk_count, members;
    uint64_t seed;
    int64_t generation, member;
    double scale;
};

/* Elements of one thread, from one counter; a block has as many as make a chunk. */
constexpr int QUARTER = 4;

#define EVK_WITH_FORMAT(number, ...)                                                         \
    switch (number) { /* as EVK_FLOAT32 and so on of csrc/runtime.h */                       \
        case 0: { using Format = Float32; __VA_ARGS__; break; }                              \
        case 1: { using Format = Float64; __VA_ARGS__; break; }                              \
        case 2: { using Format = Bfloat16; __VA_ARGS__; break; }                             \
        default: { using Format = Float16; __VA_ARGS__; }                                    \
    }

EVK_INLINE void draw_quarter(const Words &words, const Noisy &tensor, int64_t member,
                             int64_t quarter, float *drawn) {
    const evk_noise noise = {words.seed, static_cast<uint32_t>(words.generation),
                             static_cast<uint32_t>(member),
                             static_cast<uint32_t>(tensor.position)};
    const quad four = noise_words(&noise, quarter);
    normal_pair(four.words[0], four.words[1], drawn, drawn + 1);
    normal_pair(four.words[2], four.words[3], drawn + 2, drawn + 3);
}

template <typename Format>
EVK_INLINE void perturb_quarter(const Words &words, const Noisy &tensor, int64_t quarter) {
    using Stored = typename Format::Stored;
    using Real = decltype(Format::load(Stored{}));
    const int64_t *layouts = global<const int64_t>(words.layouts);
    Stored *target = global<Stored>(tensor.target);
    const Stored *centre = global<const Stored>(tensor.centre);
    float drawn[QUARTER];
    draw_quarter(words, tensor, words.member, quarter, drawn);
#pragma unroll
    for (int j = 0; j < QUARTER; ++j) {
        const int64_t i = QUARTER * quarter + j;
        if (i >= tensor.elements) break;
        const Real from = Format::load(centre[offset_of(i, layouts, tensor.centre_layout)]);
        const Real moved = from + static_cast<Real>(words.scale) * static_cast<Real>(drawn[j]);
        target[offset_of(i, layouts, tensor.target_layout)] = Format::store(moved, 0);
    }
}

template <typename Format>
EVK_INLINE void estimate_quarter(const Words &words, const Noisy &tensor, int64_t quarter) {
    using Stored = typename Format::Stored;
    using Real = decltype(Format::load(Stored{}));
    const int64_t *layouts = global<const int64_t>(words.layouts);
    const double *weights = global<const double>(words.weights);
    Stored *target = global<Stored>(tensor.target);
    double sums[QUARTER] = {0, 0, 0, 0};
    EVK_ROLLED
    for (int64_t member = 0; member < words.members; ++member) {
        const double weight = weights[member];
        if (weight == 0) continue;
        float drawn[QUARTER];
        draw_quarter(words, tensor, member, quarter, drawn);
#pragma unroll
        for (int j = 0; j < QUARTER; ++j) sums[j] += weight * static_cast<double>(drawn[j]);
    }
#pragma unroll
    for (int j = 0; j < QUARTER; ++j) {
        const int64_t i = QUARTER * quarter + j;
        if (i >= tensor.elements) break;
        const Real sum = static_cast<Real>(sums[j]);
        target[offset_of(i, layouts, tensor.target_layout)] = Format::store(sum, 0);
    }
}

/* The tensor in which a chunk lies: the first whose chunks end behind it. */
EVK_INLINE int64_t tensor_with(const Words &words, int64_t chunk) {
    const Noisy *tensors = global<const Noisy>(words.tensors);
    int64_t low = 0, high = words.tensor_count - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (tensors[middle].chunk_end <= chunk)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct Nothing {};

template <bool ESTIMATE>
EVK_INLINE void noise_block(const Words &words, Nothing &, int64_t block, int64_t blocks) {
    const Noisy *tensors = global<const Noisy>(words.tensors);
    for (int64_t c = block; c < words.chunk_count; c += blocks) {
        const int64_t place = tensor_with(words, c);
        const Noisy &tensor = tensors[place];
        const int64_t within = c - (place ? tensors[place - 1].chunk_end : 0);
        EVK_EACH_THREAD(thread) {
            const int64_t quarter = within * EVK_THREADS + thread;
            if (QUARTER * quarter < tensor.elements) {
                EVK_WITH_FORMAT(tensor.format,
                                if (ESTIMATE) estimate_quarter<Format>(words, tensor, quarter);
                                else perturb_quarter<Format>(words, tensor, quarter))
            }
        }
    }
}

EVK_KERNEL(evk_perturb, Nothing, noise_block<false>, EVK_BLOCKS_AN_SM)
EVK_KERNEL(evk_estimate, Nothing, noise_block<true>, EVK_BLOCKS_AN_SM)

#endif
