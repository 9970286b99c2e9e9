/* What the kernels of a GPU are made of, whatever the rule: threads, memory, elements.
 *
 * Kernels are written in phases. EVK_EACH_THREAD (thread) { … } is the work of one thread, and
 * EVK_BARRIER() lets all threads of the block see what the others have written to shared memory.
 * Whatever stands outside of a phase is the same for the whole block, and what one phase leaves for
 * the next is in shared memory. So blocks and threads can also be loops, and the same source runs
 * on a host, where whoever compiles it says what the names below mean.
 */
#ifndef EVK_DEVICE_CUH
#define EVK_DEVICE_CUH

#include "numeric.h"
#include "functions.h"
#include "philox.h"

#ifdef __CUDACC_RTC__

/* How many blocks a multiprocessor should hold at least. Three quarters of an sm_75, which holds 1,024
 * threads; newer ones hold 1,536 or 2,048 with as many registers, and two blocks ask for more memory
 * at a time than its latency needs. */
#define EVK_BLOCKS_AN_SM (__CUDA_ARCH__ < 800 ? 3 : 2)

/* The block of words is an argument of the kernel itself: read where it is needed, never copied. */
#define EVK_KERNEL(name, Shared, block_function, blocks)                                     \
    extern "C" __global__ void __launch_bounds__(EVK_THREADS, blocks)                        \
        name(const __grid_constant__ Words words) {                                          \
        __shared__ Shared shared;                                                            \
        block_function(words, shared, blockIdx.x, gridDim.x);                                \
    }
#define EVK_EACH_THREAD(thread) if (const int thread = threadIdx.x; true)
#define EVK_BARRIER() __syncthreads()
/* What was read from memory is read again from here on. */
#define EVK_FORGET() asm volatile("" ::: "memory")
/* A function that is not worth a copy wherever it is called. */
#define EVK_APART static __device__ __noinline__

/* An address from a table, as one of global memory: or else every access would first ask in which
 * memory it lies. */
template <typename T>
EVK_INLINE T *global(void *address) {
    __builtin_assume(__isGlobal(address));
    return static_cast<T *>(address);
}

/* Of the C library, what the operations are spelled with and NVRTC lacks. */
EVK_INLINE double copysign(int x, double y) { return copysign(static_cast<double>(x), y); }

template <typename X, typename Y>
EVK_INLINE bool islessgreater(X x, Y y) {
    return x < y || x > y;
}

#endif

/* Elements of 16 bytes in registers, which are loaded and stored at a time. Registers have no
 * addresses: every index must be a constant once loops are unrolled. */
struct alignas(16) Sixteen {
    uint32_t words[4];
};

template <typename T>
struct Vector {
    static constexpr int SIZE = sizeof(Sixteen) / sizeof(T);
    Sixteen bytes;
};

/* Whether vectors can begin at an address. */
EVK_INLINE bool fits_vectors(const void *address) {
    return reinterpret_cast<uint64_t>(address) % sizeof(Sixteen) == 0;
}

template <typename T>
EVK_INLINE void load_vector(Vector<T> &x, const T *from) {
    x.bytes = *reinterpret_cast<const Sixteen *>(from);
}

template <typename T>
EVK_INLINE void store_vector(T *to, const Vector<T> &x) {
    *reinterpret_cast<Sixteen *>(to) = x.bytes;
}

/* Element `i` of a longer row, of which the vector holds the part where `i` is. */
EVK_INLINE uint16_t get(const Vector<uint16_t> &x, int i) {
    return static_cast<uint16_t>(x.bytes.words[i % 8 / 2] >> 16 * (i % 2));
}

EVK_INLINE float get(const Vector<float> &x, int i) { return float_of(x.bytes.words[i % 4]); }

EVK_INLINE double get(const Vector<double> &x, int i) {
    const uint32_t *words = &x.bytes.words[i % 2 * 2];
    const uint64_t bits = words[0] | static_cast<uint64_t>(words[1]) << 32;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

EVK_INLINE void set(Vector<uint16_t> &x, int i, uint16_t value) {
    uint32_t &word = x.bytes.words[i % 8 / 2];
    const uint32_t bits = value;
    word = i % 2 ? (word & 0xffff) | bits << 16 : (word & 0xffff0000) | bits;
}

EVK_INLINE void set(Vector<float> &x, int i, float value) {
    x.bytes.words[i % 4] = bits_of(value);
}

EVK_INLINE void set(Vector<double> &x, int i, double value) {
    uint32_t *words = &x.bytes.words[i % 2 * 2];
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
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
    EVK_ROLLED
    for (int64_t d = layouts[layout]; d-- > 0;) {
        const int64_t size = rows[2 * d], stride = rows[2 * d + 1], outer = i / size;
        offset += (i - outer * size) * stride; /* one division: they are slow */
        i = outer;
    }
    return offset;
}

#endif
