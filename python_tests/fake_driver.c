/* A libcuda.so.1 that writes down what cuda-bindings hand it: no GPU needed to see that types,
 * numbers and addresses arrive. */
#include <stdio.h>
#include <string.h>

typedef int CUresult;
#define FUNCTION(name, ...) CUresult name(__VA_ARGS__)

static void say(const char *text) {
    printf("%s\n", text);
    fflush(stdout);
}

#define SAY(...) (snprintf(line, sizeof line, __VA_ARGS__), say(line))
static char line[256];

FUNCTION(cuInit, unsigned flags) { return flags != 0; }
FUNCTION(cuDriverGetVersion, int *version) { return *version = 13000, 0; }

FUNCTION(cuGetErrorName, CUresult error, const char **name) {
    return *name = error == 1 ? "CUDA_ERROR_INVALID_VALUE" : NULL, 0;
}

FUNCTION(cuGetErrorString, CUresult error, const char **text) {
    return *text = error == 1 ? "invalid argument" : NULL, 0;
}

FUNCTION(cuDeviceGet, int *device, int ordinal) { return *device = ordinal, 0; }

FUNCTION(cuDevicePrimaryCtxRetain, void **context, int device) {
    return *context = (void *)(0xc0l + device), 0;
}

FUNCTION(cuCtxPushCurrent, void *context) { return SAY("push %p", context), 0; }
FUNCTION(cuCtxPopCurrent, void **context) { return *context = NULL, say("pop"), 0; }

FUNCTION(cuModuleLoadData, void **module, const char *code) {
    return *module = (void *)0xd0, SAY("load %s", code + 1), 0;
}

FUNCTION(cuModuleGetFunction, void **function, void *module, const char *name) {
    return *function = (void *)0xf0, SAY("function %s of %p", name, module), 0;
}

FUNCTION(cuOccupancyMaxActiveBlocksPerMultiprocessor, int *blocks, void *function, int threads,
         size_t shared) {
    return *blocks = 3, SAY("occupancy %p %d %zu", function, threads, shared), 0;
}

FUNCTION(cuLaunchKernel, void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
         unsigned by, unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
    if (gx == 0) return 1;
    const long long *words = parameters[0];
    SAY("launch %p grid %u %u %u block %u %u %u shared %u stream %p words %lld %lld %lld", function,
        gx, gy, gz, bx, by, bz, shared, stream, words[0], words[1], words[4094]);
    return extra != NULL;
}

/* How the bindings find all of these. */
FUNCTION(cuGetProcAddress_v2, const char *name, void **function, int version,
         unsigned long long flags, int *status) {
#define KNOWN(name) {#name, (void *)name}
    const struct {
        const char *name;
        void *function;
    } known[] = {
        KNOWN(cuInit),
        KNOWN(cuDriverGetVersion),
        KNOWN(cuGetErrorName),
        KNOWN(cuGetErrorString),
        KNOWN(cuDeviceGet),
        KNOWN(cuDevicePrimaryCtxRetain),
        KNOWN(cuCtxPushCurrent),
        KNOWN(cuCtxPopCurrent),
        KNOWN(cuModuleLoadData),
        KNOWN(cuModuleGetFunction),
        KNOWN(cuOccupancyMaxActiveBlocksPerMultiprocessor),
        KNOWN(cuLaunchKernel),
        {"cuGetProcAddress", (void *)cuGetProcAddress_v2},
    };
    (void)version, (void)flags, (void)status;
    *function = NULL;
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
        if (strcmp(known[i].name, name) == 0) *function = known[i].function;
    return *function ? 0 : 500; /* CUDA_ERROR_NOT_FOUND */
}
