/* What the generated kernels include. */
#ifndef EVK_KERNELS_H
#define EVK_KERNELS_H

#include "functions.h"
#include "numeric.h"
#include "runtime.h"

/* One copy of a function for each instruction set, chosen when the library is loaded: a library
 * built on one machine runs on all of its family. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(EVK_ONE_INSTRUCTION_SET)
#define EVK_DISPATCH
#define EVK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVK_CLONES
#endif

#endif
