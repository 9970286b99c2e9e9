/* The sum of the squares of all gradients of a launch in float64, the same in every run: each chunk
 * has a sum of its own, and the last block adds those up in an order that nothing changes. */
#ifndef EVK_SQUARES_CUH
#define EVK_SQUARES_CUH

#include "launch.cuh"

struct Sums {
    double of_thread[EVK_THREADS];
    bool last; /* whether this block is the last one at work */
};

/* This thread's share of a chunk. Fused: the same for float32, whose squares are exact, and a third
 * less work for the few double units of small GPUs, which cost more time here than memory does. */
template <typename Kind>
EVK_INLINE double sum_squares(const Words &words, const Tensor &tensor, void *gradient,
                              const Chunk &chunk, int thread) {
    using Stored = typename Kind::Parameter::Stored;
    constexpr int N = Vector<Stored>::SIZE;
    const Stored *g = global<const Stored>(gradient);
    const int64_t *layouts = global<const int64_t>(words.header.layouts);
    double sum = 0;
    int64_t done = chunk.first;
    const int64_t layout = tensor.layouts[EVK_OPERAND_G];
    if (layout == EVK_DENSE && fits_vectors(gradient)) {
        done += (chunk.end - chunk.first) / N * N;
        for (int64_t i = chunk.first + thread * N; i < done; i += EVK_THREADS * N) {
            Vector<Stored> gs;
            load_vector(gs, g + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const double x = Kind::Parameter::load(get(gs, j));
                sum = fma(x, x, sum);
            }
        }
    }
    for (int64_t i = done + thread; i < chunk.end; i += EVK_THREADS) {
        const double x = Kind::Parameter::load(g[offset_of(i, layouts, layout)]);
        sum = fma(x, x, sum);
    }
    return sum;
}

/* What the threads have, in the first. */
EVK_INLINE void add_up(Sums &sums) {
    EVK_BARRIER();
    for (int width = EVK_THREADS / 2; width > 0; width /= 2) {
        EVK_EACH_THREAD(thread) {
            if (thread < width) sums.of_thread[thread] += sums.of_thread[thread + width];
        }
        EVK_BARRIER();
    }
}

EVK_INLINE void squares_block(const Words &words, Sums &sums, int64_t block, int64_t blocks) {
    const Header &header = words.header;
    /* volatile: other blocks write them too */
    volatile double *partial_sums = global<double>(header.partial_sums);
    for (int64_t c = block; c < header.chunk_count; c += blocks) {
        const Chunk &chunk = chunk_of(words, c);
        const Tensor &tensor = tensor_of(words, chunk.tensor);
        void *gradient = gradient_of(words, chunk.tensor);
        EVK_EACH_THREAD(thread) {
            double sum = 0;
            if (gradient)
                EVK_WITH_KIND(tensor.kind,
                              sum = sum_squares<Kind>(words, tensor, gradient, chunk, thread))
            sums.of_thread[thread] = sum;
        }
        add_up(sums);
        EVK_EACH_THREAD(thread) {
            if (thread == 0) partial_sums[c] = sums.of_thread[0];
        }
    }
    if (!is_last(words, blocks, sums.last)) return;
    EVK_EACH_THREAD(thread) {
        double sum = 0;
        for (int64_t c = thread; c < header.chunk_count; c += EVK_THREADS) sum += partial_sums[c];
        sums.of_thread[thread] = sum;
    }
    add_up(sums);
    EVK_EACH_THREAD(thread) {
        double *squares = global<double>(header.squares);
        if (thread == 0) *squares = (header.go_on ? *squares : 0) + sums.of_thread[0];
    }
}

EVK_KERNEL(evk_squares, Sums, squares_block, EVK_BLOCKS_AN_SM)

#endif
