/* Grid and block as loops: what csrc/device.cuh leaves to whoever compiles it for a host.
 *
 * Blocks run in descending order and threads in a scattered one, so that a result that depends on
 * either is another one; shared memory begins as NaN. */
#include <math.h>
#include <string.h>

#define EVK_KERNEL(name, Shared, block_function)                                \
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
#define EVK_FORGET()
#define EVK_APART static

template <typename T>
static T *global(void *address) {
    return static_cast<T *>(address);
}

static void __threadfence() {}

static unsigned atomicAdd(unsigned *number, unsigned more) {
    const unsigned before = *number;
    *number += more;
    return before;
}

static double cospi(double x) { return cos(3.141592653589793 * x); }
