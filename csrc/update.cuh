/* One step of all tensors of a launch. What depends on the rules is generated and stands before
 * this: the records that the host fills (Header, Group, Tensor, Chunk), the numbers of a step
 * (`product` and `scalar` of each structure) and the kinds of tensors (how they are stored, and the
 * update of one element).
 *
 * Blocks stay as long as there is something to do and walk the chunks in turns.
 */
#ifndef EVK_UPDATE_CUH
#define EVK_UPDATE_CUH

#include "launch.cuh"

/* The numbers of a rule in one step. Both widths: one thread converts each, not all threads all. */
struct Numbers {
    Step step;
    double products[EVK_PRODUCTS];
    double wide[EVK_SCALARS];
    float narrow[EVK_SCALARS];
    bool last; /* whether this block is the last one at work */
};

/* The scalars of a program as it reads them. Floats stay in registers for a whole chunk; doubles
 * would take too many, and are read for each element. */
template <typename Real, int COUNT>
struct Scalars;

template <int COUNT>
struct Scalars<float, COUNT> {
    float values[COUNT];
    EVK_MEMBER Scalars(const Numbers &numbers) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = numbers.narrow[i];
    }
    EVK_MEMBER float operator[](int i) const { return values[i]; }
    EVK_MEMBER void next_element() const {}
};

template <int COUNT>
struct Scalars<double, COUNT> {
    const double *values;
    EVK_MEMBER Scalars(const Numbers &numbers) : values(numbers.wide) {}
    EVK_MEMBER double operator[](int i) const { return values[i]; }
    EVK_MEMBER void next_element() const { EVK_FORGET(); }
};

/* A number for each thread, neighbours in different warps: threads of one warp that compute
 * different things wait for each other. */
EVK_INLINE int number_of(int thread) {
    return thread % EVK_WARP * (EVK_THREADS / EVK_WARP) + thread / EVK_WARP;
}

EVK_INLINE Step step_of(const Header &header, const Group &group, double t) {
    Step step;
    step.t = t;
    step.base_lr = group.base_lr;
    if (group.lr_address)
        step.base_lr = group.lr_is_float64 ? *global<const double>(group.lr_address)
                                           : *global<const float>(group.lr_address);
    step.grad_scale = header.grad_scale ? *global<const float>(header.grad_scale) : 1.0;
    step.squares = header.squares ? *global<const double>(header.squares) : 0.0;
    step.max_norm = header.max_norm;
    return step;
}

/* Compute the numbers of a tensor's group in its step. */
EVK_INLINE void compute_numbers(const Words &words, const Tensor &tensor, double t,
                                Numbers &numbers) {
    const Group &group = group_of(words, tensor.group);
    EVK_EACH_THREAD(thread) {
        if (thread == 0) numbers.step = step_of(words.header, group, t);
    }
    EVK_BARRIER();
    EVK_EACH_THREAD(thread) {
        const int i = number_of(thread);
        EVK_WITH_KIND(tensor.kind, if (i < Kind::Structure::PRODUCTS) numbers.products[i] =
                                       Kind::Structure::product(i, group, numbers.step);)
    }
    EVK_BARRIER(); /* behind it all threads are done with the numbers that were there before, too */
    const double *weights = global<const double>(words.header.weights) + tensor.weights;
    EVK_EACH_THREAD(thread) {
        const int i = number_of(thread);
        EVK_WITH_KIND(tensor.kind, if (i < Kind::Structure::SCALARS) numbers.wide[i] =
                                       Kind::Structure::scalar(i, weights, numbers.products);)
        if (i < EVK_SCALARS) numbers.narrow[i] = static_cast<float>(numbers.wide[i]);
    }
    EVK_BARRIER();
}

/* The random bits of eight elements, and of one, where anything is rounded by them. */
struct Draws {
    quad p, m, v;
};

struct Draw {
    uint16_t p, m, v;
};

template <typename Kind>
EVK_INLINE Draws draw_eight(const Tensor &tensor, double t, uint64_t eighth) {
    evk_stream stream = {static_cast<uint64_t>(tensor.seed), EVK_OPERAND_P,
                         static_cast<uint32_t>(tensor.position),
                         static_cast<uint32_t>(static_cast<uint64_t>(t))};
    Draws draws = {};
    if constexpr (Kind::Parameter::ROUNDS_RANDOMLY) draws.p = random_eight(&stream, eighth);
    stream.operand = EVK_OPERAND_M;
    if constexpr (Kind::M && Kind::State::ROUNDS_RANDOMLY) draws.m = random_eight(&stream, eighth);
    stream.operand = EVK_OPERAND_V;
    if constexpr (Kind::V && Kind::State::ROUNDS_RANDOMLY) draws.v = random_eight(&stream, eighth);
    return draws;
}

EVK_INLINE Draw one_of(const Draws &eight, int i) {
    return {random_of(eight.p, i), random_of(eight.m, i), random_of(eight.v, i)};
}

/* One element as it is stored, with its random bits. */
template <typename Kind, typename Scalars>
EVK_INLINE void update_element(const Scalars &k, typename Kind::Parameter::Stored &p,
                               typename Kind::Parameter::Stored g, typename Kind::State::Stored &m,
                               typename Kind::State::Stored &v, Draw draw) {
    using Parameter = typename Kind::Parameter;
    using State = typename Kind::State;
    typename Kind::Real wide_p = Parameter::load(p), wide_m = State::load(m),
                        wide_v = State::load(v);
    k.next_element();
    Kind::update(k, wide_p, Parameter::load(g), wide_m, wide_v);
    p = Parameter::store(wide_p, draw.p);
    m = State::store(wide_m, draw.m);
    v = State::store(wide_v, draw.v);
}

/* This thread's share of a chunk. */
template <typename Kind>
EVK_INLINE void update_chunk(const Words &words, const Tensor &tensor, void *gradient,
                             const Chunk &chunk, double t, const Numbers &numbers, int thread) {
    using Stored = typename Kind::Parameter::Stored;
    using Moment = typename Kind::State::Stored;
    constexpr int N = Kind::WIDTH;
    const bool clear = words.header.clear;
    Stored *p = global<Stored>(tensor.p), *g = global<Stored>(gradient);
    Moment *m = global<Moment>(tensor.m), *v = global<Moment>(tensor.v);
    const int64_t *layouts = global<const int64_t>(words.header.layouts);
    const Scalars<typename Kind::Real, Kind::Structure::SCALARS> k(numbers);

    int64_t done = chunk.first;
    if (tensor.aligned && tensor.g_layout == EVK_DENSE && fits_vectors(gradient)) {
        done += (chunk.end - chunk.first) / N * N;
#pragma unroll 1
        for (int64_t i = chunk.first + thread * N; i < done; i += EVK_THREADS * N) {
            Vector<Stored> ps, gs, zeros = {};
            Vector<Moment> ms = {}, vs = {};
            const Draws draws = draw_eight<Kind>(tensor, t, i / 8);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (j % gs.SIZE == 0) {
                    load_vector(ps, p + i + j);
                    load_vector(gs, g + i + j);
                }
                if (Kind::M && j % ms.SIZE == 0) load_vector(ms, m + i + j);
                if (Kind::V && j % vs.SIZE == 0) load_vector(vs, v + i + j);
                Stored one_p = get(ps, j);
                Moment one_m = get(ms, j), one_v = get(vs, j);
                update_element<Kind>(k, one_p, get(gs, j), one_m, one_v, one_of(draws, j));
                set(ps, j, one_p);
                set(ms, j, one_m);
                set(vs, j, one_v);
                if ((j + 1) % ps.SIZE == 0) {
                    store_vector(p + i + j + 1 - ps.SIZE, ps);
                    if (clear) store_vector(g + i + j + 1 - gs.SIZE, zeros);
                }
                if (Kind::M && (j + 1) % ms.SIZE == 0) store_vector(m + i + j + 1 - ms.SIZE, ms);
                if (Kind::V && (j + 1) % vs.SIZE == 0) store_vector(v + i + j + 1 - vs.SIZE, vs);
            }
        }
    }
    /* whatever is left, or does not lie like that: one by one */
#pragma unroll 1
    for (int64_t i = done + thread; i < chunk.end; i += EVK_THREADS) {
        Stored &one_p = p[offset_of(i, layouts, tensor.p_layout)];
        Stored &one_g = g[offset_of(i, layouts, tensor.g_layout)];
        Moment none = 0, *one_m = &none, *one_v = &none;
        if constexpr (Kind::M) one_m = &m[offset_of(i, layouts, tensor.m_layout)];
        if constexpr (Kind::V) one_v = &v[offset_of(i, layouts, tensor.v_layout)];
        const Draw draw = one_of(draw_eight<Kind>(tensor, t, i / 8), i % 8);
        update_element<Kind>(k, one_p, one_g, *one_m, *one_v, draw);
        if (clear) one_g = 0;
    }
}

/* Zeros in this thread's share of a chunk. */
template <typename Kind>
EVK_INLINE void clear_chunk(const Words &words, const Tensor &tensor, void *gradient,
                            const Chunk &chunk, int thread) {
    auto *g = global<typename Kind::Parameter::Stored>(gradient);
    const int64_t *layouts = global<const int64_t>(words.header.layouts);
    for (int64_t i = chunk.first + thread; i < chunk.end; i += EVK_THREADS)
        g[offset_of(i, layouts, tensor.g_layout)] = 0;
}

EVK_INLINE void update_block(const Words &words, Numbers &numbers, int64_t block, int64_t blocks) {
    const Header &header = words.header;
    const bool forbidden = header.found_inf && *global<const float>(header.found_inf) != 0;
    int64_t known_group = -1; /* whose numbers are there, */
    double known_t = 0;       /* and of which step */
    for (int64_t c = block; c < header.chunk_count; c += blocks) {
        const Chunk &chunk = chunk_of(words, c);
        const Tensor &tensor = tensor_of(words, chunk.tensor);
        void *gradient = gradient_of(words, chunk.tensor);
        if (!gradient) continue;
        if (forbidden) {
            if (header.clear) EVK_EACH_THREAD(thread) {
                EVK_WITH_KIND(tensor.kind,
                              clear_chunk<Kind>(words, tensor, gradient, chunk, thread))
            }
            continue;
        }
        const double t = count_of(words, chunk.tensor) + 1;
        if (tensor.group != known_group || t != known_t) {
            compute_numbers(words, tensor, t, numbers);
            known_group = tensor.group;
            known_t = t;
        }
        EVK_EACH_THREAD(thread) {
            EVK_WITH_KIND(tensor.kind, update_chunk<Kind>(words, tensor, gradient, chunk, t,
                                                          numbers, thread))
        }
    }
    if (is_last(words, blocks, numbers.last) && !forbidden) EVK_EACH_THREAD(thread) {
        for (int64_t i = thread; i < header.tensor_count; i += EVK_THREADS)
            if (gradient_of(words, i)) count_of(words, i) += 1;
    }
}

EVK_KERNEL(evk_update, Numbers, update_block)

#endif
