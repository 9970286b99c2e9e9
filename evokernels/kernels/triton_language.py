"""The shape of the Triton kernels: chunks, vectors, elements, formats, random bits, the end.

`compiler/render_triton.py` writes what differs from rule to rule, and `kernels/triton.py` makes one
module of that, this file and `triton_functions.py`. Both are read, not imported, because a
decorated function belongs for good either to the compiler or to the interpreter.
`compiler/words.py` says what the words are, and csrc/numeric.h and csrc/random.c what the
conversions and random bits must be.
"""

import triton
import triton.language as tl

from evokernels.compiler.words import CHUNK, DENSE, GROUP, HEADER, STATES, TENSOR

# Of a block; `kernels/triton.py` launches as many.
THREADS = tl.constexpr(256)
# Bytes of the widest access, and what tensors that are accessed so are aligned to.
VECTOR_BYTES = tl.constexpr(16)
# Every chunk begins at a multiple of it: `SHORTEST_CHUNK` of kernels/launches.py.
CHUNK_ALIGNMENT = tl.constexpr(1024)


def _place(field, table):
    """Of a field among the words of its table. Globals that kernels read must be constexpr."""
    return tl.constexpr(list(table).index(field))


TENSORS = _place("tensors", HEADER)
CHUNKS = _place("chunks", HEADER)
WEIGHTS = _place("weights", HEADER)
LAYOUTS = _place("layouts", HEADER)
COUNTS = _place("counts", HEADER)
TICKET = _place("ticket", HEADER)
CHUNK_COUNT = _place("chunk_count", HEADER)
TENSOR_COUNT = _place("tensor_count", HEADER)
GROUP_COUNT = _place("group_count", HEADER)
FOUND_INF = _place("found_inf", HEADER)
GRAD_SCALE = _place("grad_scale", HEADER)
SQUARES = _place("squares", HEADER)
MAX_NORM = _place("max_norm", HEADER)
CLEAR = _place("clear", HEADER)
PARTIAL_SUMS = _place("partial_sums", HEADER)
GO_ON = _place("go_on", HEADER)
HEADER_WORDS = tl.constexpr(len(HEADER))

LR_ADDRESS = _place("lr_address", GROUP)
LR_IS_FLOAT64 = _place("lr_is_float64", GROUP)
BASE_LR = _place("base_lr", GROUP)
GROUP_WORDS = tl.constexpr(len(GROUP))

P = _place("p", TENSOR)
FIRST_STATE = _place(STATES[0], TENSOR)  # the others behind it
KIND = _place("kind", TENSOR)
TENSOR_GROUP = _place("group", TENSOR)
TENSOR_WEIGHTS = _place("weights", TENSOR)
ALIGNED = _place("aligned", TENSOR)
SEED = _place("seed", TENSOR)
POSITION = _place("position", TENSOR)
P_LAYOUT = _place("p_layout", TENSOR)
G_LAYOUT = _place("g_layout", TENSOR)
FIRST_LAYOUT = _place(f"{STATES[0]}_layout", TENSOR)  # of a state, the others behind it
TENSOR_WORDS = tl.constexpr(len(TENSOR))

CHUNK_TENSOR = _place("tensor", CHUNK)
CHUNK_FIRST = _place("first", CHUNK)
CHUNK_END = _place("end", CHUNK)
CHUNK_WORDS = tl.constexpr(len(CHUNK))

NO_LAYOUT = tl.constexpr(DENSE)


# Words


@triton.jit
def pointer(words, place, element: tl.constexpr):
    """The address in a word."""
    return tl.load(words + place).to(tl.pointer_type(element))


@triton.jit
def float64_in(words, place):
    """The number in a word."""
    return tl.load(words + place).to(tl.float64, bitcast=True)


@triton.jit
def float32_at(words, place, otherwise: tl.constexpr):
    """The number at the address in a word."""
    address = pointer(words, place, tl.float32)
    return tl.load(address, mask=tl.load(words + place) != 0, other=otherwise)


@triton.jit
def step_inputs(words):
    """`STEP_INPUTS` of compiler/terms.py."""
    squares = pointer(words, SQUARES, tl.float64)
    return (
        float32_at(words, GRAD_SCALE, 1.0).to(tl.float64),
        float64_in(words, MAX_NORM),
        tl.load(squares, mask=tl.load(words + SQUARES) != 0, other=0.0),
    )


@triton.jit
def learning_rate(group):
    """Of a group, before the schedule."""
    rate = float64_in(group, BASE_LR)
    if tl.load(group + LR_ADDRESS) != 0:
        if tl.load(group + LR_IS_FLOAT64) != 0:
            rate = tl.load(pointer(group, LR_ADDRESS, tl.float64))
        else:
            rate = tl.load(pointer(group, LR_ADDRESS, tl.float32)).to(tl.float64)
    return rate


@triton.jit
def gradients_of(words):
    """Where the words with the addresses of the gradients begin."""
    return words + HEADER_WORDS + tl.load(words + GROUP_COUNT) * GROUP_WORDS


# Formats


@triton.jit
def from_bits(x, stored: tl.constexpr):
    """A number as it is stored, bfloat16 as its bits, which become float32."""
    if stored == tl.bfloat16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def narrowed(x):
    """A float32 from which a bfloat16 is rounded as from the float64 itself: rounded to odd."""
    near = x.to(tl.float32)
    widened = near.to(tl.float64)
    too_far = (tl.abs(widened) > tl.abs(x)).to(tl.uint32)
    bits = near.to(tl.uint32, bitcast=True) - too_far
    odd = (bits | (widened != x).to(tl.uint32)).to(tl.float32, bitcast=True)
    return tl.where(x == x, odd, near)


@triton.jit
def bfloat16_bits(x):
    """Those of the float32 from which a bfloat16 is rounded."""
    if x.dtype == tl.float64:
        return narrowed(x).to(tl.uint32, bitcast=True)
    else:
        return x.to(tl.uint32, bitcast=True)


@triton.jit
def to_nearest(bits):
    """What is added before the lower half is cut off; a tie goes to even."""
    return 0x7FFF + (bits >> 16 & 1)


@triton.jit
def rounded(x, bits, added):
    """The bfloat16 of `x`, as its bits."""
    return tl.where(x == x, bits + added >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def to_bits(x, stored: tl.constexpr):
    """A number as it is stored, rounded to nearest even."""
    if stored == tl.bfloat16:
        bits = bfloat16_bits(x)
        return rounded(x, bits, to_nearest(bits))
    else:
        return x.to(stored)


@triton.jit
def to_bits_stochastically(x, random):
    """As bfloat16; to nearest from the largest finite one on, which has no next."""
    bits = bfloat16_bits(x)
    added = tl.where((bits & 0x7FFFFFFF) >= 0x7F7F0000, to_nearest(bits), random)
    return rounded(x, bits, added)


# Random bits


@triton.jit
def philox(eighth, operand: tl.constexpr, stream):
    """Four words for each eight elements. Salmon et al. 2011: Philox4x32-10."""
    seed, position, t = stream
    low = (eighth & 0xFFFFFFFF).to(tl.uint32)
    high = (eighth >> 32).to(tl.uint32) | ((operand & 3) << 30 | (operand >> 2) << 28)
    zero = low & 0
    return tl.philox(seed, low, high, zero + position, zero + t)


@triton.jit
def bits_of_vectors(first, operand: tl.constexpr, stream, tile: tl.constexpr):
    """16 for each of the elements [first, first + tile), both multiples of eight."""
    a, b, c, d = philox(first // 8 + tl.arange(0, tile // 8), operand, stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [tile // 2])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [tile])


@triton.jit
def bits_of_elements(i, operand: tl.constexpr, stream, tile: tl.constexpr):
    """16 for each element."""
    a, b, c, d = philox(i // 8, operand, stream)
    word = i // 2 % 4
    drawn = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return tl.where(i % 2 == 0, drawn & 0xFFFF, drawn >> 16)


# Numbers of a step, which a block computes once for all chunks of a group, in its part of a table


@triton.jit
def set_numbers_of(numbers, group, t):
    """What they are the numbers of."""
    tl.store(numbers, group.to(tl.float64))
    tl.store(numbers + 1, t)


@triton.jit
def are_numbers_of(numbers, group, t):
    """Whether they are those of a group in its step `t`."""
    return (tl.load(numbers) == group.to(tl.float64)) & (tl.load(numbers + 1) == t)


@triton.jit
def forget_numbers(numbers):
    """Those of the last launch."""
    tl.store(numbers, -1.0)
    tl.debug_barrier()


@triton.jit
def store_number(numbers, place: tl.constexpr, x):
    """A scalar of the rule, for arithmetic in float64 and in float32."""
    at = numbers + (2 + 2 * place)
    tl.store(at, x)
    tl.store((at + 1).to(tl.pointer_type(tl.float32)), x.to(tl.float32))


@triton.jit
def load_number(numbers, place: tl.constexpr, arithmetic: tl.constexpr):
    """The same, read."""
    at = numbers + (2 + 2 * place)
    if arithmetic == tl.float64:
        return tl.load(at)
    else:
        return tl.load((at + 1).to(tl.pointer_type(tl.float32)))


# Elements, in rendered functions. They take pointers to `tile` elements of each operand, and:
#   inside        which of them are meant
#   clear         whether the gradient becomes zero
#   numbers       the scalars of the rule
#   draw, where   how, and for which elements, random bits are drawn
#   stream        seed, position and t of these


@triton.jit
def load(at, inside, stored: tl.constexpr, arithmetic: tl.constexpr):
    """Numbers to compute with."""
    return from_bits(tl.load(at, mask=inside), stored).to(arithmetic)


@triton.jit
def store(at, inside, x, stored: tl.constexpr):
    """Rounded to nearest even."""
    tl.store(at, to_bits(x, stored), mask=inside)


@triton.jit
def store_stochastically(at, inside, x, random):
    """As bfloat16."""
    tl.store(at, to_bits_stochastically(x, random), mask=inside)


@triton.jit
def whole_quotient(a, b):
    """a // b below 2^53: a division of int64 is a function call, around which values spill."""
    quotient = (a.to(tl.float64) / b.to(tl.float64)).to(tl.int64)
    return quotient - (quotient * b > a).to(tl.int64)  # where it was rounded up to the next


@triton.jit
def offsets_of(layouts, layout, i):
    """Where the elements numbered `i` are, as csrc/staging.c counts them: row by row."""
    offsets = i
    if layout != NO_LAYOUT:
        dimensions = tl.load(layouts + layout)
        rest = i
        offsets = i - i
        for done in range(0, dimensions):
            row = layouts + layout + 1 + 2 * (dimensions - 1 - done)
            size = tl.load(row)
            rows = whole_quotient(rest, size)
            offsets += (rest - rows * size) * tl.load(row + 1)
            rest = rows
    return offsets


@triton.jit
def elements_at(words, record, place, tensor, layout, i, element: tl.constexpr):
    """Pointers to the elements numbered `i` of any tensor.

    Args:
        record, place: where its address is.
        tensor, layout: where its layout is.
    """
    layouts = pointer(words, LAYOUTS, tl.int64)
    return pointer(record, place, element) + offsets_of(layouts, tl.load(tensor + layout), i)


# Chunks. Whatever does not change is read again where it is used, because a register that holds it
# through a loop over vectors is one that keeps other warps out.


@triton.jit
def chunk_at(words, number):
    """The record of a chunk."""
    return pointer(words, CHUNKS, tl.int64) + number * CHUNK_WORDS


@triton.jit
def tensor_of(words, chunk):
    """The record of a chunk's tensor."""
    return pointer(words, TENSORS, tl.int64) + tl.load(chunk + CHUNK_TENSOR) * TENSOR_WORDS


@triton.jit
def gradient_of(words, chunk):
    """The word with the address of the gradient of a chunk's tensor."""
    return gradients_of(words) + tl.load(chunk + CHUNK_TENSOR)


@triton.jit
def random_stream(tensor, t):
    """What tells the random bits of a tensor in a step from all others."""
    position = tl.load(tensor + POSITION).to(tl.uint32)
    return tl.load(tensor + SEED), position, (t.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def whole_vectors(chunk, address, dense, vector: tl.constexpr):
    """How many elements of a chunk are accessed by vectors."""
    length = (tl.load(chunk + CHUNK_END) - tl.load(chunk + CHUNK_FIRST)).to(tl.int32)
    possible = dense & (address % VECTOR_BYTES == 0)
    return length // vector * possible.to(tl.int32) * vector


@triton.jit
def vectors_for_update(chunk, tensor, gradient, vector: tl.constexpr):
    """The same, for an update."""
    dense = (tl.load(tensor + ALIGNED) != 0) & (tl.load(tensor + G_LAYOUT) == NO_LAYOUT)
    return whole_vectors(chunk, tl.load(gradient), dense, vector)


@triton.jit
def update_vectors(
    words,
    number,
    t,
    numbers,
    update: tl.constexpr,
    parameter: tl.constexpr,
    state: tl.constexpr,
    states: tl.constexpr,
    vector: tl.constexpr,
):
    """What of a chunk can be accessed by vectors.

    Args:
        update: rendered.
        parameter, state: as what they are read.
        states: which ones the rule keeps, of `STATES`.
        vector: elements of the narrower of both in an access.
    """
    chunk = chunk_at(words, number)
    tensor = tensor_of(words, chunk)
    gradient = gradient_of(words, chunk)
    clear = tl.load(words + CLEAR) != 0
    whole = vectors_for_update(chunk, tensor, gradient, vector)
    first = tl.multiple_of(tl.load(chunk + CHUNK_FIRST), CHUNK_ALIGNMENT)
    # casts in place: what is said of the result of a call is lost
    p = tl.multiple_of(tl.load(tensor + P).to(tl.pointer_type(parameter)), VECTOR_BYTES) + first
    g = tl.multiple_of(tl.load(gradient).to(tl.pointer_type(parameter)), VECTOR_BYTES) + first
    kept = ()
    for s in tl.static_range(len(states)):
        at = tl.load(tensor + (FIRST_STATE + states[s])).to(tl.pointer_type(state))
        kept = kept + (tl.multiple_of(at, VECTOR_BYTES) + first,)  # noqa: RUF005
    tile: tl.constexpr = THREADS * vector
    for done in range(0, whole, tile):
        i = done + tl.arange(0, tile)
        inside = i < whole
        kept_here = ()
        for s in tl.static_range(len(states)):
            kept_here = kept_here + (kept[s] + i,)  # noqa: RUF005
        update(
            p + i,
            g + i,
            kept_here,
            inside,
            clear,
            numbers,
            bits_of_vectors,
            first + done,
            random_stream(tensor, t),
            tile,
        )


@triton.jit
def update_elements(
    words,
    number,
    t,
    numbers,
    update: tl.constexpr,
    parameter: tl.constexpr,
    state: tl.constexpr,
    states: tl.constexpr,
    vector: tl.constexpr,
):
    """The others, one a thread."""
    chunk = chunk_at(words, number)
    tensor = tensor_of(words, chunk)
    gradient = gradient_of(words, chunk)
    first = tl.load(chunk + CHUNK_FIRST) + vectors_for_update(chunk, tensor, gradient, vector)
    end = tl.load(chunk + CHUNK_END)
    for done in range(0, end - first, THREADS):
        i = first + (done + tl.arange(0, THREADS))
        kept = ()
        for s in tl.static_range(len(states)):
            place = FIRST_STATE + states[s]
            layout = FIRST_LAYOUT + states[s]
            kept = kept + (elements_at(words, tensor, place, tensor, layout, i, state),)  # noqa: RUF005
        update(
            elements_at(words, tensor, P, tensor, P_LAYOUT, i, parameter),
            elements_at(words, gradient, 0, tensor, G_LAYOUT, i, parameter),
            kept,
            i < end,
            tl.load(words + CLEAR) != 0,
            numbers,
            bits_of_elements,
            i,
            random_stream(tensor, t),
            THREADS,
        )


@triton.jit
def update_chunk(
    words,
    number,
    t,
    numbers,
    update: tl.constexpr,
    parameter: tl.constexpr,
    state: tl.constexpr,
    states: tl.constexpr,
    vector: tl.constexpr,
):
    """All of it."""
    update_vectors(words, number, t, numbers, update, parameter, state, states, vector)
    update_elements(words, number, t, numbers, update, parameter, state, states, vector)


@triton.jit
def clear_chunk(words, number, parameter: tl.constexpr):
    """Zeros into a gradient that is not used."""
    chunk = chunk_at(words, number)
    first = tl.load(chunk + CHUNK_FIRST)
    end = tl.load(chunk + CHUNK_END)
    for done in range(0, end - first, THREADS):
        i = first + (done + tl.arange(0, THREADS))
        gradient = gradient_of(words, chunk)
        at = elements_at(words, gradient, 0, tensor_of(words, chunk), G_LAYOUT, i, parameter)
        tl.store(at, tl.zeros([THREADS], parameter), mask=i < end)


@triton.jit
def squares_of_chunk(words, number, stored: tl.constexpr, memory: tl.constexpr):
    """Their sum: multiplied, then added, each lane for itself and the lanes at the end."""
    vector: tl.constexpr = VECTOR_BYTES * 8 // memory.primitive_bitwidth
    tile: tl.constexpr = THREADS * vector
    chunk = chunk_at(words, number)
    tensor = tensor_of(words, chunk)
    gradient = gradient_of(words, chunk)
    dense = tl.load(tensor + G_LAYOUT) == NO_LAYOUT
    whole = whole_vectors(chunk, tl.load(gradient), dense, vector)
    first = tl.multiple_of(tl.load(chunk + CHUNK_FIRST), CHUNK_ALIGNMENT)
    g = tl.multiple_of(tl.load(gradient).to(tl.pointer_type(memory)), VECTOR_BYTES) + first
    sums = tl.zeros([tile], tl.float64)
    for done in range(0, whole, tile):
        i = done + tl.arange(0, tile)
        x = from_bits(tl.load(g + i, mask=i < whole), stored).to(tl.float64)
        sums += tl.where(i < whole, x * x, 0.0)
    total = tl.sum(sums)
    sums = tl.zeros([THREADS], tl.float64)
    end = tl.load(chunk + CHUNK_END)
    for done in range(whole, end - first, THREADS):
        i = first + (done + tl.arange(0, THREADS))
        at = elements_at(words, gradient, 0, tensor, G_LAYOUT, i, memory)
        x = from_bits(tl.load(at, mask=i < end), stored).to(tl.float64)
        sums += tl.where(i < end, x * x, 0.0)
    return total + tl.sum(sums)


# Launches


@triton.jit
def is_taken(words):
    """Whether the step is: no infinity was found."""
    return float32_at(words, FOUND_INF, 0.0) == 0.0


@triton.jit
def is_last_block(words):
    """Whether all other blocks are done, and what they have read and written is settled."""
    tl.debug_barrier()  # of all threads, before the one that takes the ticket
    done = tl.atomic_add(pointer(words, TICKET, tl.int32), 1, sem="acq_rel")
    last = done == tl.num_programs(0) - 1
    if last:
        tl.store(pointer(words, TICKET, tl.int32), 0)
    return last


@triton.jit
def walk(words, numbers, compute: tl.constexpr, update: tl.constexpr, clear: tl.constexpr):
    """One step: the blocks walk the chunks in turns, the last one counts the step.

    Args:
        words: of compiler/words.py.
        numbers: float64, room for the scalars of each block, apart from those of all others.
        compute, update, clear: rendered, with one part for each kind.
    """
    forget_numbers(numbers)
    number = tl.program_id(0)
    while number < tl.load(words + CHUNK_COUNT).to(tl.int32):
        chunk = chunk_at(words, number)
        tensor = tensor_of(words, chunk)
        kind = tl.load(tensor + KIND)
        if tl.load(gradient_of(words, chunk)) != 0:
            if is_taken(words):
                counts = pointer(words, COUNTS, tl.float64)
                t = tl.load(counts + tl.load(chunk + CHUNK_TENSOR)) + 1.0
                group = tl.load(tensor + TENSOR_GROUP)
                if not are_numbers_of(numbers, group, t):
                    tl.debug_barrier()  # others may still read those before
                    weights = pointer(words, WEIGHTS, tl.float64) + tl.load(tensor + TENSOR_WEIGHTS)
                    inputs = words + HEADER_WORDS + group * GROUP_WORDS
                    compute(kind, words, inputs, t, weights, numbers)
                    set_numbers_of(numbers, group, t)
                    tl.debug_barrier()
                update(kind, words, number, t, numbers)
            elif tl.load(words + CLEAR) != 0:
                clear(kind, words, number)
        number += tl.num_programs(0)
    if is_last_block(words):  # noqa: SIM102
        if is_taken(words):  # apart: `&` of both costs a register, and some kernels spill
            count(words)


@triton.jit
def count(words):
    """The step, for the tensors that have a gradient."""
    gradients = gradients_of(words)
    counts = pointer(words, COUNTS, tl.float64)
    tensor_count = tl.load(words + TENSOR_COUNT)
    for start in range(0, tensor_count, THREADS):
        i = start + tl.arange(0, THREADS)
        present = tl.load(gradients + i, mask=i < tensor_count, other=0) != 0
        steps = tl.load(counts + i, mask=present)
        tl.store(counts + i, steps + 1.0, mask=present)


@triton.jit
def add_squares(words, squares_of: tl.constexpr):
    """The sum of all squares: of chunks first, then by the last block, always in the same order.

    Args:
        squares_of: rendered, with one part for each kind.
    """
    partial_sums = pointer(words, PARTIAL_SUMS, tl.float64)
    chunk_count = tl.load(words + CHUNK_COUNT)
    for number in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
        chunk = chunk_at(words, number)
        kind = tl.load(tensor_of(words, chunk) + KIND)
        total = tl.full((), 0, tl.float64)
        if tl.load(gradient_of(words, chunk)) != 0:
            total = squares_of(kind, words, number)
        tl.store(partial_sums + number, total)
    if is_last_block(words):
        sums = tl.zeros([THREADS], tl.float64)
        for start in range(0, chunk_count, THREADS):
            i = start + tl.arange(0, THREADS)
            sums += tl.load(partial_sums + i, mask=i < chunk_count, other=0.0)
        squares = pointer(words, SQUARES, tl.float64)
        before = tl.load(squares, mask=tl.load(words + GO_ON) != 0, other=0.0)
        tl.store(squares, before + tl.sum(sums))
