/* Whether all that a step rests on is as it was: one pass over torch's tensors and Python's
 * containers, without running any Python.
 *
 * Built without headers of torch or Python: their functions come as addresses at run time, the
 * tensors' through torch's stable C interface. Mirrored by evokernels/kernels/watch.py. */
#ifndef EVK_LOOK_H
#define EVK_LOOK_H

#include <stdbool.h>
#include <stdint.h>

/* Functions of torch and Python. A `tensor` is the address of an at::Tensor, which is one pointer:
 * to its implementation. */
typedef struct {
    int32_t (*get_layout)(void *tensor, int32_t *result);
    int32_t (*get_dtype)(void *tensor, int32_t *result);
    int32_t (*get_dim)(void *tensor, int64_t *result);
    int32_t (*get_sizes)(void *tensor, int64_t **result);
    int32_t (*get_strides)(void *tensor, int64_t **result);
    int32_t (*get_data_ptr)(void *tensor, void **result);
    void *(*get_grad)(const void *implementation);
    bool (*is_neg)(const void *tensor);
    bool (*is_inference)(const void *tensor);
    void (*bump_version)(const void *tensor);
    void *(*dict_get)(void *dict, void *key);
    int (*dict_next)(void *dict, intptr_t *position, void **key, void **value);
    intptr_t (*list_size)(void *list);
    void *(*list_get)(void *list, intptr_t i);
    void (*clear_error)(void);
    int64_t strided; /* torch's number for dense, strided tensors */
    void *undefined; /* the implementation of a tensor that is not there */
} evk_foreign;

/* A dense, strided tensor as it was seen. */
typedef struct {
    void *tensor; /* NULL: a gradient that was not there */
    void *address;
    const int64_t *sizes, *strides;
    int64_t dimensions;
    int64_t dtype; /* as torch numbers them */
} evk_seen;

typedef struct {
    const evk_foreign *foreign;
    /* parameters, and their gradients (of which `tensor` only says whether there was one) */
    int64_t parameter_count;
    const evk_seen *parameters, *gradients;
    /* moments, and the array of counts as a tensor: told by their address, since their memory is
     * kept and nothing else moves in there */
    int64_t moment_count;
    void *const *moments;
    void *const *moment_addresses;
    /* parameters that had no gradient yet, and have no state */
    int64_t waiting_count;
    void *const *waiting;
    /* how often each parameter was updated, as Python may read and change it; and as it should be */
    double *counts, *expected_counts;
    /* Python objects: each group, its values of `keys` and its parameters, then all values of the
     * state */
    int64_t object_count;
    void *const *objects;
    int64_t key_count;
    void *const *keys;
    void *params_key;
} evk_watch;

/* 1 if everything is as it was, with the gradients' addresses now (NULL: none) in `addresses`;
 * 0 if anything differs or cannot be told. Needs the interpreter lock. */
int32_t evk_look(const evk_watch *watch, void *groups, void *state, void **addresses);

/* The step is done: count it for every parameter with a gradient, and tell autograd that the
 * parameter was written to, and the gradient if it was `cleared`. */
void evk_commit(const evk_watch *watch, int32_t cleared);

#endif
