/* The native library's interface: one call updates all tensors of a model.
 *
 * It knows neither Python nor torch: addresses, sizes and numbers, nothing else. Mirrored by
 * evokernels/kernels/native.py. */
#ifndef EVK_RUNTIME_H
#define EVK_RUNTIME_H

#include <stdint.h>

/* Updates n consecutive elements; m and v may be NULL where the kernel keeps no such moment. */
typedef void (*evk_kernel)(void *p, const void *g, void *m, void *v, int64_t n,
                           const double *scalars);

/* How the four tensors lie in memory where they do not all lie alike and densely.
 * Strides are in elements, in the order p, g, m, v. */
typedef struct {
    int64_t dimensions;
    const int64_t *shape;
    const int64_t *strides[4];
} evk_layout;

/* One parameter with its moments. */
typedef struct {
    evk_kernel kernel;
    void *p, *m, *v;
    int64_t elements;
    int64_t element_size; /* of p and g, in bytes */
    int64_t moment_size;  /* of m and v, in bytes */
    const evk_layout *layout; /* NULL: all dense and alike */
} evk_tensor;

/* Update `count` tensors. A tensor whose entry in `gradients` is NULL is left alone; the others
 * use row `rows[i]` of `scalars`. The result does not depend on `threads`. */
void evk_step(const evk_tensor *tensors, const void *const *gradients,
              const double *const *scalars, const int32_t *rows, int64_t count, int32_t threads);

/* The instruction set for which the kernels run here, e.g. "x86-64-v4". */
const char *evk_instruction_set(void);

#endif
