/* What a launch is given: the records of the host, behind words that are an argument. They are read
 * where they are needed; what a kernel keeps across its loops would take registers. */
#ifndef EVK_LAUNCH_CUH
#define EVK_LAUNCH_CUH

#include "device.cuh"

EVK_INLINE const Chunk &chunk_of(const Words &words, int64_t i) {
    return global<const Chunk>(words.header.chunks)[i];
}

EVK_INLINE const Tensor &tensor_of(const Words &words, int64_t i) {
    return global<const Tensor>(words.header.tensors)[i];
}

EVK_INLINE double &count_of(const Words &words, int64_t tensor) {
    return global<double>(words.header.counts)[tensor];
}

EVK_INLINE const Group &group_of(const Words &words, int64_t i) {
    return reinterpret_cast<const Group *>(words.rest)[i];
}

EVK_INLINE void *gradient_of(const Words &words, int64_t tensor) {
    const Group *behind_groups = &group_of(words, words.header.group_count);
    return reinterpret_cast<void *const *>(behind_groups)[tensor];
}

/* Whether this block is the last of the launch to ask. It then sees what all others have written,
 * and they have read what they will. */
EVK_INLINE bool is_last(const Words &words, int64_t blocks, bool &last) {
    uint32_t *ticket = global<uint32_t>(words.header.ticket);
    EVK_BARRIER();
    EVK_EACH_THREAD(thread) {
        if (thread == 0) {
            __threadfence();
            last = atomicAdd(ticket, 1u) == blocks - 1;
            if (last) *ticket = 0; /* for the next launch */
            __threadfence();
        }
    }
    EVK_BARRIER();
    return last;
}

#endif
