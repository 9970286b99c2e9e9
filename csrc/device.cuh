/* What the kernels of a GPU are made of, whatever the rule: threads, memory, elements.
 *
 * Kernels are written in phases. EVK_EACH_THREAD (thread) { … } is the work of one thread, EVK_BARRIER()
 * lets every thread of the block see what the others have written to shared memory. Whatever stands
 * outside of a phase is the same for the whole block, and what one phase leaves for the next is in
 * shared memory. So blocks and threads can also be loops, and the same source runs on a host, where
 * these macros, `global`, `volatile_load` and `Kernel`'s atomics are defined by whoever compiles it.
 */
#ifndef EVK_DEVICE_CUH
#define EVK_DEVICE_CUH

#include "numeric.h"
#include "philox.h"

#ifdef __CUDACC_RTC__

/* The block of words is an argument of the kernel itself: read where it is needed, never copied. */
#define EVK_KERNEL(name, Shared, block_function)                                             \
    extern "C" __global__ void __launch_bounds__(EVK_THREADS, EVK_BLOCKS_AN_SM)              \
        name(const __grid_constant__ Words words) {                                          \
        __shared__ Shared shared;                                                            \
        block_function(words, shared, blockIdx.x, gridDim.x);                                \
    }
#define EVK_EACH_THREAD(thread) if (const int thread = threadIdx.x; true)
#define EVK_BARRIER() __syncthreads()
/* A function that is not worth a copy wherever it is called. */
#define EVK_APART static __device__ __noinline__

/* An address from a table, as one of global memory: or else every access would first ask in which
 * memory it lies. */
template <typename T>
EVK_INLINE T *global(void *address) {
    __builtin_assume(__isGlobal(address));
    return static_cast<T *>(address);
}

template <typename X, typename Y>
EVK_INLINE bool islessgreater(X x, Y y) {
    return x < y || x > y;
}

#endif

/* N elements in registers, loaded and stored 16 bytes at a time. Indices must be constants once
 * loops are unrolled: registers have no addresses. */
struct alignas(16) Sixteen {
    uint32_t words[4];
};

template <typename T, int N>
struct Vector {
    static constexpr int PARTS = N * sizeof(T) / sizeof(Sixteen);
    static_assert(PARTS * sizeof(Sixteen) == N * sizeof(T), "whole accesses");
    Sixteen parts[PARTS];
};

EVK_INLINE uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

EVK_INLINE double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Whether vectors can begin at an address. */
EVK_INLINE bool fits_vectors(const void *address) {
    return reinterpret_cast<uint64_t>(address) % sizeof(Sixteen) == 0;
}

template <typename T, int N>
EVK_INLINE Vector<T, N> load_vector(const T *from) {
    Vector<T, N> x;
    for (int i = 0; i < x.PARTS; ++i) x.parts[i] = reinterpret_cast<const Sixteen *>(from)[i];
    return x;
}

template <typename T, int N>
EVK_INLINE void store_vector(T *to, const Vector<T, N> &x) {
    for (int i = 0; i < x.PARTS; ++i) reinterpret_cast<Sixteen *>(to)[i] = x.parts[i];
}

template <int N>
EVK_INLINE uint16_t get(const Vector<uint16_t, N> &x, int i) {
    return static_cast<uint16_t>(x.parts[i / 8].words[i % 8 / 2] >> 16 * (i % 2));
}

template <int N>
EVK_INLINE float get(const Vector<float, N> &x, int i) {
    return float_of(x.parts[i / 4].words[i % 4]);
}

template <int N>
EVK_INLINE double get(const Vector<double, N> &x, int i) {
    const uint32_t *words = &x.parts[i / 2].words[i % 2 * 2];
    return double_of(words[0] | static_cast<uint64_t>(words[1]) << 32);
}

template <int N>
EVK_INLINE void set(Vector<uint16_t, N> &x, int i, uint16_t value) {
    uint32_t &word = x.parts[i / 8].words[i % 8 / 2];
    word = i % 2 ? (word & 0xffff) | static_cast<uint32_t>(value) << 16 : (word & 0xffff0000) | value;
}

template <int N>
EVK_INLINE void set(Vector<float, N> &x, int i, float value) {
    x.parts[i / 4].words[i % 4] = bits_of(value);
}

template <int N>
EVK_INLINE void set(Vector<double, N> &x, int i, double value) {
    uint32_t *words = &x.parts[i / 2].words[i % 2 * 2];
    const uint64_t bits = bits_of(value);
    words[0] = static_cast<uint32_t>(bits);
    words[1] = static_cast<uint32_t>(bits >> 32);
}

/* How elements of each dtype are stored. Arithmetic is in float or double; what is stored is
 * rounded once, bfloat16 with 16 random bits where ROUNDS_RANDOMLY. */
struct Float32 {
    using Stored = float;
    static constexpr bool ROUNDS_RANDOMLY = false;
    EVK_INLINE float load(float x) { return x; }
    EVK_INLINE float store(float x, uint16_t) { return x; }
    EVK_INLINE float store(double x, uint16_t) { return static_cast<float>(x); }
};

struct Float64 {
    using Stored = double;
    static constexpr bool ROUNDS_RANDOMLY = false;
    EVK_INLINE double load(double x) { return x; }
    EVK_INLINE double store(double x, uint16_t) { return x; }
};

struct Float16 {
    using Stored = uint16_t;
    static constexpr bool ROUNDS_RANDOMLY = false;
    EVK_INLINE float load(uint16_t x) { return load_float16(x); }
    EVK_INLINE uint16_t store(float x, uint16_t) { return store_float16(x); }
};

struct Bfloat16 {
    using Stored = uint16_t;
    static constexpr bool ROUNDS_RANDOMLY = false;
    EVK_INLINE float load(uint16_t x) { return load_bfloat16(x); }
    EVK_INLINE uint16_t store(float x, uint16_t) { return store_bfloat16(x); }
    EVK_INLINE uint16_t store(double x, uint16_t) { return store_bfloat16(narrowed(x)); }
};

struct StochasticBfloat16 {
    using Stored = uint16_t;
    static constexpr bool ROUNDS_RANDOMLY = true;
    EVK_INLINE float load(uint16_t x) { return load_bfloat16(x); }
    EVK_INLINE uint16_t store(float x, uint16_t random) {
        return store_bfloat16_stochastic(x, random);
    }
    EVK_INLINE uint16_t store(double x, uint16_t random) {
        return store_bfloat16_stochastic(narrowed(x), random);
    }
};

/* The random bits of element `i` among its eight; selects, because `i` may be no constant. */
EVK_INLINE uint16_t random_of(const quad &eight, int i) {
    const uint32_t low = i & 2 ? eight.words[1] : eight.words[0];
    const uint32_t high = i & 2 ? eight.words[3] : eight.words[2];
    return static_cast<uint16_t>((i & 4 ? high : low) >> 16 * (i & 1));
}

/* Where element `i` of a tensor lies, counted in the memory order of its parameter: rows of a size
 * and a stride each, the innermost last. */
EVK_INLINE int64_t offset_of(int64_t i, const int64_t *layouts, int64_t layout) {
    if (layout == EVK_DENSE) return i;
    const int64_t *rows = layouts + layout + 1;
    int64_t offset = 0;
    for (int64_t d = layouts[layout]; d-- > 0; i /= rows[2 * d])
        offset += i % rows[2 * d] * rows[2 * d + 1];
    return offset;
}

/* Whether this block is the last of the launch to ask. It then sees what all others have written,
 * and they have read what they will. */
EVK_INLINE bool is_last(uint32_t *ticket, int64_t blocks, bool &last) {
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
