#include "look.h"

#include <stddef.h>
#include <string.h>

/* Whether a tensor has the dtype, shape and strides that were seen; its address now. */
static bool looks_the_same(const evk_foreign *f, void *tensor, const evk_seen *seen,
                           void **address) {
    int32_t layout, dtype;
    int64_t dimensions, *sizes, *strides;
    if (f->get_layout(tensor, &layout) || layout != f->strided) return false;
    if (f->get_dtype(tensor, &dtype) || dtype != seen->dtype) return false;
    if (f->get_dim(tensor, &dimensions) || dimensions != seen->dimensions) return false;
    const size_t bytes = (size_t)dimensions * sizeof(int64_t);
    if (f->get_sizes(tensor, &sizes) || memcmp(sizes, seen->sizes, bytes)) return false;
    if (f->get_strides(tensor, &strides) || memcmp(strides, seen->strides, bytes)) return false;
    return !f->is_neg(tensor) && !f->get_data_ptr(tensor, address);
}

/* The gradient of a parameter, NULL if it has none. */
static void *gradient_of(const evk_foreign *f, void *parameter) {
    void *gradient = f->get_grad(*(void **)parameter);
    return *(void **)gradient == f->undefined ? NULL : gradient;
}

/* -1 for anything but a list. */
static intptr_t size_of(const evk_foreign *f, void *list) {
    const intptr_t size = list ? f->list_size(list) : -1;
    if (size < 0) f->clear_error();
    return size;
}

static bool same_objects(const evk_watch *watch, void *groups, void *state) {
    const evk_foreign *f = watch->foreign;
    void *const *expected = watch->objects, *const *end = expected + watch->object_count;
    const intptr_t group_count = size_of(f, groups);
    for (intptr_t i = 0; i < group_count; ++i) {
        void *group = f->list_get(groups, i);
        void *parameters = f->dict_get(group, watch->params_key);
        const intptr_t count = size_of(f, parameters);
        if (count < 0 || end - expected < 1 + watch->key_count + count) return false;
        if (group != *expected++) return false;
        for (int64_t k = 0; k < watch->key_count; ++k)
            if (f->dict_get(group, watch->keys[k]) != *expected++) return false;
        for (intptr_t k = 0; k < count; ++k)
            if (f->list_get(parameters, k) != *expected++) return false;
    }
    void *key, *values, *value;
    for (intptr_t i = 0; f->dict_next(state, &i, &key, &values);)
        for (intptr_t k = 0; f->dict_next(values, &k, &key, &value);)
            if (expected == end || value != *expected++) return false;
    return expected == end;
}

int32_t evk_look(const evk_watch *watch, void *groups, void *state, void **addresses) {
    const evk_foreign *f = watch->foreign;
    void *address;
    const size_t bytes = (size_t)watch->parameter_count * sizeof(double);
    if (memcmp(watch->counts, watch->expected_counts, bytes)) return 0;
    if (!same_objects(watch, groups, state)) return 0;
    for (int64_t i = 0; i < watch->parameter_count; ++i) {
        const evk_seen *parameter = &watch->parameters[i], *seen = &watch->gradients[i];
        if (!looks_the_same(f, parameter->tensor, parameter, &address)) return 0;
        if (address != parameter->address) return 0;
        void *gradient = gradient_of(f, parameter->tensor);
        if (!gradient != !seen->tensor) return 0;
        addresses[i] = NULL;
        if (gradient && !looks_the_same(f, gradient, seen, &addresses[i])) return 0;
        /* classes that only wrap other tensors have no address of their own; empty ones neither */
        if (!addresses[i] != !seen->address) return 0;
    }
    for (int64_t i = 0; i < watch->moment_count; ++i)
        if (f->get_data_ptr(watch->moments[i], &address) || address != watch->moment_addresses[i])
            return 0;
    for (int64_t i = 0; i < watch->waiting_count; ++i)
        if (gradient_of(f, watch->waiting[i])) return 0;
    return 1;
}

void evk_commit(const evk_watch *watch, int32_t cleared) {
    const evk_foreign *f = watch->foreign;
    for (int64_t i = 0; i < watch->parameter_count; ++i) {
        if (!watch->gradients[i].tensor) continue;
        watch->counts[i] = watch->expected_counts[i] += 1;
        f->bump_version(watch->parameters[i].tensor);
        if (!cleared) continue;
        /* torch throws at inference tensors, which count no versions; C cannot catch that */
        void *gradient = gradient_of(f, watch->parameters[i].tensor);
        if (gradient && !f->is_inference(gradient)) f->bump_version(gradient);
    }
}
