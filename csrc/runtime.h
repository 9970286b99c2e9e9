/* The native library's interface: one call updates all tensors of a model.
 *
 * It knows neither Python nor torch: addresses, sizes and numbers, nothing else. Mirrored by
 * evokernels/kernels/native.py. */
#ifndef EVK_RUNTIME_H
#define EVK_RUNTIME_H

#include <stdint.h>

/* The tensors of one parameter, in the order of every array of operands below: the moments, then
 * the averages that terms keep, which are moments too. */
enum { EVK_P, EVK_G, EVK_M, EVK_V, EVK_A0, EVK_A1, EVK_A2, EVK_A3, EVK_OPERANDS };

/* How elements are stored. */
enum { EVK_FLOAT32, EVK_FLOAT64, EVK_BFLOAT16, EVK_FLOAT16 };

/* Updates n consecutive elements of its operands; those that it does not have are not looked at. */
typedef void (*evk_kernel)(void *const *tensors, int64_t n, const double *scalars);

/* Where the elements of a tensor lie, from its first one on: the order of elements is that of the
 * parameter's memory, for all tensors of the parameter. Strides are in elements; the last dimension
 * is the innermost; there is at least one. */
typedef struct {
    int64_t dimensions;
    const int64_t *shape;
    const int64_t *strides;
} evk_layout;

/* One parameter with its moments. */
typedef struct {
    evk_kernel kernel; /* of the formats below, or of the arithmetic type where `staged` */
    void *tensors[EVK_OPERANDS]; /* gradient: unused; moments that are not there: NULL */
    const evk_layout *layouts[EVK_OPERANDS]; /* NULL: one element after another */
    int64_t elements;
    uint64_t seed;     /* of stochastic rounding */
    uint32_t position; /* of the parameter in its model: it has random bits of its own */
    int32_t formats[EVK_OPERANDS];
    int32_t operands;   /* how many there are: EVK_A0, or more with averages */
    int32_t float64;    /* whether arithmetic is in double */
    int32_t stochastic; /* whether bfloat16 stores are rounded stochastically */
    int32_t staged;     /* whether the update goes through buffers of the arithmetic type */
    int32_t gradient_overlaps; /* whether elements of the gradient share memory */
} evk_tensor;

/* The numbers of one step for the tensors that share them. */
typedef struct {
    const double *scalars;
    int64_t t; /* which step it is, for stochastic rounding */
} evk_numbers;

/* Scratch memory of a model, one for each tensor. At first `tensor` counts from 0; afterwards the
 * spans stay in the order in which the gradients lay in memory. */
typedef struct {
    const char *start, *end;
    int64_t tensor;
} evk_span;

/* Update `count` tensors. A tensor whose entry in `gradients` is NULL is left alone; the others
 * use `numbers[rows[i]]`. The result does not depend on `threads`. Where `clear` is not 0, every
 * gradient is zero afterwards. */
void evk_step(const evk_tensor *tensors, void *const *gradients, const evk_numbers *numbers,
              const int32_t *rows, int64_t count, int32_t threads, int32_t clear,
              evk_span *spans);

/* The same for elements [first, end) of one tensor, on the calling thread. */
void evk_update(const evk_tensor *tensor, void *gradient, const evk_numbers *numbers,
                int64_t first, int64_t end, int32_t clear);

/* The sum of the squares of all gradients, added up in double. Does not depend on `threads`. */
double evk_sum_of_squares(const evk_tensor *tensors, void *const *gradients, int64_t count,
                          int32_t threads);

/* The instruction set for which the kernels run here, e.g. "x86-64-v4". */
const char *evk_instruction_set(void);

#endif
