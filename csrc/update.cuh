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
    int64_t group; /* whose they are, none at first, */
    double t;      /* and in which step */
    Step step;
    double products[EVK_PRODUCTS];
    double wide[EVK_SCALARS];
    float narrow[EVK_SCALARS];
    bool last; /* whether this block is the last one at work */
};

EVK_INLINE const float *scalars_of(const Numbers &numbers, float) { return numbers.narrow; }
EVK_INLINE const double *scalars_of(const Numbers &numbers, double) { return numbers.wide; }

/* The scalars of a program as an element's update reads them: from shared memory, again for each
 * element, or else the compiler would keep them in registers; */
template <typename Real>
struct InShared {
    const Real *values;
    EVK_MEMBER InShared(const Numbers &numbers) : values(scalars_of(numbers, Real())) {}
    EVK_MEMBER Real operator[](int i) const { return values[i]; }
    EVK_MEMBER void next_element() const { EVK_FORGET(); }
};

/* or from registers, for as long as this lives. */
template <typename Real, int COUNT>
struct InRegisters {
    Real values[COUNT];
    EVK_MEMBER InRegisters(const Numbers &numbers) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = scalars_of(numbers, Real())[i];
    }
    EVK_MEMBER Real operator[](int i) const { return values[i]; }
    EVK_MEMBER void next_element() const {}
};

template <bool CONDITION, typename Yes, typename No>
struct Choice {
    using Type = Yes;
};

template <typename Yes, typename No>
struct Choice<false, Yes, No> {
    using Type = No;
};

/* What vectors are updated with: registers do not hold doubles, nor floats beside random bits, nor
 * more floats than the largest rule of the classic catalogue has: with the 38 of the whole wide
 * catalogue an sm_75 has two blocks at a time, with those in shared memory three. */
#define EVK_MOST_IN_REGISTERS 20

template <typename Kind>
using ForVectors =
    typename Choice<sizeof(typename Kind::Real) == sizeof(double) ||
                        (Kind::Structure::SCALARS > EVK_MOST_IN_REGISTERS) ||
                        Kind::Parameter::ROUNDS_RANDOMLY || Kind::State::ROUNDS_RANDOMLY,
                    InShared<typename Kind::Real>,
                    InRegisters<typename Kind::Real, Kind::Structure::SCALARS>>::Type;

/* A number for each thread (the others in further rounds), neighbours in different warps: threads
 * of one warp that compute different things wait for each other. */
EVK_INLINE int number_of(int thread) {
    return thread % EVK_WARP * (EVK_THREADS / EVK_WARP) + thread / EVK_WARP;
}

EVK_APART Step step_of(const Header &header, const Group &group, double t) {
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

/* Compute the numbers of a tensor's group in its step. Behind the first barrier all threads are
 * done with those that were there before, and have seen that these are others. */
EVK_INLINE void compute_numbers(const Words &words, const Tensor &tensor, double t,
                                Numbers &numbers) {
    const Group &group = group_of(words, tensor.group);
    EVK_EACH_THREAD(thread) {
        if (thread == 0) numbers.step = step_of(words.header, group, t);
    }
    EVK_BARRIER();
    EVK_EACH_THREAD(thread) {
        for (int first = 0; first < EVK_PRODUCTS; first += EVK_THREADS) {
            const int i = first + number_of(thread);
            EVK_WITH_KIND(tensor.kind, if (i < Kind::Structure::PRODUCTS) numbers.products[i] =
                                           Kind::Structure::product(i, group, numbers.step);)
        }
    }
    EVK_BARRIER();
    const double *weights = global<const double>(words.header.weights) + tensor.weights;
    EVK_EACH_THREAD(thread) {
        for (int first = 0; first < EVK_SCALARS; first += EVK_THREADS) {
            const int i = first + number_of(thread);
            EVK_WITH_KIND(tensor.kind, if (i < Kind::Structure::SCALARS) numbers.wide[i] =
                                           Kind::Structure::scalar(i, weights, numbers.products);)
            if (i < EVK_SCALARS) numbers.narrow[i] = static_cast<float>(numbers.wide[i]);
        }
        if (thread == 0) {
            numbers.group = tensor.group;
            numbers.t = t;
        }
    }
    EVK_BARRIER();
}

/* The random bits of eight elements, and of one, where anything is rounded by them. */
template <typename Kind>
struct Draws {
    quad p, states[Kind::ROOM];
};

template <typename Kind>
struct Draw {
    uint16_t p, states[Kind::ROOM];
};

template <typename Kind>
EVK_INLINE Draws<Kind> draw_eight(const Tensor &tensor, uint32_t t, uint64_t eighth) {
    evk_stream stream = {static_cast<uint64_t>(tensor.seed), EVK_OPERAND_P,
                         static_cast<uint32_t>(tensor.position), t};
    Draws<Kind> draws = {};
    if constexpr (Kind::Parameter::ROUNDS_RANDOMLY) draws.p = random_eight(&stream, eighth);
    if constexpr (Kind::State::ROUNDS_RANDOMLY) {
#pragma unroll
        for (int s = 0; s < Kind::STATES; ++s) {
            stream.operand = Kind::operand(s);
            draws.states[s] = random_eight(&stream, eighth);
        }
    }
    return draws;
}

template <typename Kind>
EVK_INLINE Draw<Kind> one_of(const Draws<Kind> &eight, int i) {
    Draw<Kind> one = {random_of(eight.p, i), {}};
#pragma unroll
    for (int s = 0; s < Kind::STATES; ++s) one.states[s] = random_of(eight.states[s], i);
    return one;
}

/* One element as it is stored, with its random bits. */
template <typename Kind, typename Scalars>
EVK_INLINE void update_element(const Scalars &k, typename Kind::Parameter::Stored &p,
                               typename Kind::Parameter::Stored g,
                               typename Kind::State::Stored *const (&states)[Kind::ROOM],
                               const Draw<Kind> &draw) {
    using Parameter = typename Kind::Parameter;
    using State = typename Kind::State;
    typename Kind::Real wide_p = Parameter::load(p), wide[Kind::ROOM];
#pragma unroll
    for (int s = 0; s < Kind::STATES; ++s) wide[s] = State::load(*states[s]);
    k.next_element();
    Kind::update(k, wide_p, Parameter::load(g), wide);
    p = Parameter::store(wide_p, draw.p);
#pragma unroll
    for (int s = 0; s < Kind::STATES; ++s) *states[s] = State::store(wide[s], draw.states[s]);
}

/* This thread's share of a chunk. */
template <typename Kind>
EVK_INLINE void update_chunk(const Words &words, const Tensor &tensor, void *gradient,
                             const Chunk &chunk, uint32_t t, const Numbers &numbers, int thread) {
    using Real = typename Kind::Real;
    using Stored = typename Kind::Parameter::Stored;
    using State = typename Kind::State::Stored;
    constexpr int N = Kind::WIDTH, STATES = Kind::STATES, ROOM = Kind::ROOM;
    const bool clear = words.header.clear;
    Stored *p = global<Stored>(tensor.p), *g = global<Stored>(gradient);
    State *states[ROOM];
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        states[s] = global<State>(tensor.states[Kind::operand(s) - EVK_FIRST_STATE]);
    const int64_t *layouts = global<const int64_t>(words.header.layouts);
    int64_t done = chunk.first;
    if (tensor.aligned && tensor.layouts[EVK_OPERAND_G] == EVK_DENSE && fits_vectors(gradient)) {
        done += (chunk.end - chunk.first) / N * N;
        const ForVectors<Kind> k(numbers);
        EVK_ROLLED
        for (int64_t i = chunk.first + thread * N; i < done; i += EVK_THREADS * N) {
            Vector<Stored> ps, gs, zeros = {};
            Vector<State> of[ROOM];
            constexpr int OF_STATE = of[0].SIZE;
            Draws<Kind> draws = draw_eight<Kind>(tensor, t, i / 8);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                /* doubles leave no room for the bits of eight: drawn again for each */
                if (sizeof(Real) == sizeof(double)) draws = draw_eight<Kind>(tensor, t, i / 8);
                if (j % gs.SIZE == 0) {
                    load_vector(ps, p + i + j);
                    load_vector(gs, g + i + j);
                }
#pragma unroll
                for (int s = 0; s < STATES; ++s)
                    if (j % OF_STATE == 0) load_vector(of[s], states[s] + i + j);
                Stored one_p = get(ps, j);
                State one[ROOM], *places[ROOM];
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    one[s] = get(of[s], j);
                    places[s] = &one[s];
                }
                update_element<Kind>(k, one_p, get(gs, j), places, one_of(draws, j));
                set(ps, j, one_p);
#pragma unroll
                for (int s = 0; s < STATES; ++s) set(of[s], j, one[s]);
                if ((j + 1) % ps.SIZE == 0) {
                    store_vector(p + i + j + 1 - ps.SIZE, ps);
                    if (clear) store_vector(g + i + j + 1 - gs.SIZE, zeros);
                }
#pragma unroll
                for (int s = 0; s < STATES; ++s)
                    if ((j + 1) % OF_STATE == 0)
                        store_vector(states[s] + i + j + 1 - OF_STATE, of[s]);
            }
        }
    }
    /* whatever is left, or does not lie like that: one by one */
    const InShared<Real> k(numbers);
    EVK_ROLLED
    for (int64_t i = done + thread; i < chunk.end; i += EVK_THREADS) {
        const Draw<Kind> draw = one_of(draw_eight<Kind>(tensor, t, i / 8), i % 8);
        Stored &one_p = p[offset_of(i, layouts, tensor.layouts[EVK_OPERAND_P])];
        Stored &one_g = g[offset_of(i, layouts, tensor.layouts[EVK_OPERAND_G])];
        State *places[ROOM];
#pragma unroll
        for (int s = 0; s < STATES; ++s)
            places[s] = &states[s][offset_of(i, layouts, tensor.layouts[Kind::operand(s)])];
        update_element<Kind>(k, one_p, one_g, places, draw);
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
        g[offset_of(i, layouts, tensor.layouts[EVK_OPERAND_G])] = 0;
}

EVK_INLINE void update_block(const Words &words, Numbers &numbers, int64_t block, int64_t blocks) {
    const Header &header = words.header;
    const bool forbidden = header.found_inf && *global<const float>(header.found_inf) != 0;
    EVK_EACH_THREAD(thread) {
        if (thread == 0) numbers.group = -1;
    }
    EVK_BARRIER();
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
        if (tensor.group != numbers.group || t != numbers.t)
            compute_numbers(words, tensor, t, numbers);
        EVK_EACH_THREAD(thread) {
            const uint32_t wrapped = static_cast<uint64_t>(t);
            EVK_WITH_KIND(tensor.kind, update_chunk<Kind>(words, tensor, gradient, chunk, wrapped,
                                                          numbers, thread))
        }
    }
    if (is_last(words, blocks, numbers.last) && !forbidden) EVK_EACH_THREAD(thread) {
        for (int64_t i = thread; i < header.tensor_count; i += EVK_THREADS)
            if (gradient_of(words, i)) count_of(words, i) += 1;
    }
}

/* Three blocks leave 80 registers, too few for more than two states, and two leave 128, not always
 * enough for more than four. Threads that have so much under way at a time need not be as many. */
#define EVK_BLOCKS_FOR_STATES (EVK_STATES > 4 ? 1 : EVK_STATES > 2 ? 2 : EVK_BLOCKS_AN_SM)

EVK_KERNEL(evk_update, Numbers, update_block, EVK_BLOCKS_FOR_STATES)

#endif
