/* Grid and block on a host: what csrc/device.cuh leaves to whoever compiles it.
 *
 * Both are loops. Blocks run in descending order and threads in a scattered one, so that a result
 * that depends on either is another one; shared memory begins as NaN.
 *
 * With EVK_REAL_THREADS both are threads of the host, for ThreadSanitizer to see what no loop
 * shows: a barrier or a fence that is missing. */
#include <math.h>
#include <string.h>

#ifdef EVK_REAL_THREADS

#include <pthread.h>

#include <memory>
#include <thread>
#include <vector>

/* Two barriers in turns: who leaves one late must not be taken to have seen what others did until
 * they came to the next one. */
template <typename Shared>
struct Block {
    Shared shared;
    pthread_barrier_t barriers[2];
};

static thread_local int this_thread, turn;
static thread_local pthread_barrier_t *these_barriers;

#define EVK_KERNEL(name, Shared, block_function, least)                         \
    extern "C" void name(const Words *words, int64_t blocks) {                  \
        const std::unique_ptr<Block<Shared>[]> all(new Block<Shared>[blocks]);  \
        std::vector<std::thread> threads;                                       \
        for (int64_t i = 0; i < blocks; ++i) {                                  \
            for (pthread_barrier_t &barrier : all[i].barriers)                  \
                pthread_barrier_init(&barrier, nullptr, EVK_THREADS);           \
            for (int thread = 0; thread < EVK_THREADS; ++thread)                \
                threads.emplace_back([=, &all] {                                \
                    this_thread = thread;                                       \
                    these_barriers = all[i].barriers;                           \
                    block_function(*words, all[i].shared, i, blocks);           \
                });                                                             \
        }                                                                       \
        for (std::thread &thread : threads) thread.join();                      \
    }
#define EVK_EACH_THREAD(thread) if (const int thread = this_thread; true)
#define EVK_BARRIER() pthread_barrier_wait(&these_barriers[turn ^= 1])

/* An atomic operation alone orders nothing but itself; behind a fence it publishes what was written
 * before. */
static thread_local bool fenced;

static void __threadfence() { fenced = true; }

static unsigned atomicAdd(unsigned *number, unsigned more) {
    return fenced ? __atomic_fetch_add(number, more, __ATOMIC_ACQ_REL)
                  : __atomic_fetch_add(number, more, __ATOMIC_RELAXED);
}

#else

#define EVK_KERNEL(name, Shared, block_function, least)                         \
    extern "C" void name(const Words *words, int64_t blocks) {                  \
        for (int64_t block = blocks; block-- > 0;) {                            \
            Shared shared;                                                      \
            memset(reinterpret_cast<void *>(&shared), 0xff, sizeof shared);     \
            block_function(*words, shared, block, blocks);                      \
        }                                                                       \
    }
#define EVK_EACH_THREAD(thread)                                                 \
    for (int turn = 0, thread = 77; turn < EVK_THREADS;                         \
         ++turn, thread = (thread + 101) % EVK_THREADS)
#define EVK_BARRIER()

static void __threadfence() {}

static unsigned atomicAdd(unsigned *number, unsigned more) {
    const unsigned before = *number;
    *number += more;
    return before;
}

#endif

#define EVK_FORGET()
#define EVK_APART static

template <typename T>
static T *global(void *address) {
    return static_cast<T *>(address);
}

static double cospi(double x) { return cos(3.141592653589793 * x); }
