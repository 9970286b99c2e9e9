/* What lets a header serve C, CUDA C++ (NVRTC, which has no headers of its own) and C++. */
#ifndef EVK_PORTABLE_H
#define EVK_PORTABLE_H

#ifdef __CUDACC_RTC__

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define EVK_INLINE static __device__ __forceinline__
#define EVK_MEMBER __device__ __forceinline__
/* Before a loop: registers are scarcer than instructions. */
#define EVK_ROLLED _Pragma("unroll 1")

#else

#include <math.h>
#include <stdint.h>
#include <string.h>
#define EVK_INLINE static inline
#define EVK_MEMBER inline
#define EVK_ROLLED

#endif

#endif
