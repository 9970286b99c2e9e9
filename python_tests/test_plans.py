"""Plans as optimizers use them: storage formats, rounding, clearing, sums of squares, addresses."""

import ctypes
import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch
from bound import (
    BEYOND,
    BOTH,
    FORMATS,
    FULL,
    HOST_BACKENDS,
    MOMENTUM,
    SIGN,
    bound,
    everything,
    random,
    same_bits,
    untouched,
)
from cases import between_bfloat16, layouts
from eager import eager_update
from oracle import DTYPES, SHAPES, assert_near, random_genome

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.compiler.evaluate import reference_step
from evokernels.compiler.lower import lower
from evokernels.compiler.terms import genome_scalars
from evokernels.errors import OptimizerError
from evokernels.kernels import native
from evokernels.kernels.plan import ARITHMETIC, STATE_DTYPES, Numbers, Rounding
from evokernels.kernels.rounding import philox, random_bits


def numbers(genome, t=1, **changes):
    rule = lower(genome)
    return Numbers(rule.program, rule.numbers(**{**genome_scalars(genome, t), **changes}), t)


def run(genome, tensors, gradients, backend="cpu", t=1, clear=False, **changes):
    plan = HOST_BACKENDS[backend].bind(tensors)
    plan.run(gradients, [0] * len(tensors), [numbers(genome, t, **changes)], clear=clear)
    return plan


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# the gradient's factor


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_factor_scales_the_gradient(backend, dtype):
    for seed, factor in itertools.product(range(20), (-1.0, 4.0)):  # exact in every dtype
        genome = random_genome(seed)
        g = random((500,), dtype, seed)
        scaled, plain = (bound(genome, random((500,), dtype, -seed)) for _ in range(2))
        for t in (1, 2):
            run(genome, [scaled], [g], backend, t, gradient_factor=factor)
            run(genome, [plain], [factor * g], backend, t)
        assert all(map(same_bits, everything(scaled), everything(plain))), (genome, factor)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_a_factor_of_zero_is_a_number_like_any_other(backend):
    tensor = bound(SIGN, torch.ones(2))
    run(SIGN, [tensor], [torch.tensor([3.0, math.inf])], backend, gradient_factor=0.0)
    assert [tensor.parameter[0] == 1, tensor.parameter[1].isnan()] == [True, True]


# formats of moments


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_moments_of_every_format_match_the_reference(backend, dtype, state):
    arithmetic = ARITHMETIC[dtype]
    for seed in range(12):
        genome = random_genome(seed)
        shape = (sum(math.prod(shape) for shape in SHAPES),)
        tensor = bound(genome, random(shape, dtype, seed), state)
        exact = [x.numpy() for x in (tensor.parameter.double(), *torch.zeros(2, *shape).double())]
        yardstick = [tensor.parameter.clone(), *torch.zeros(2, *shape, dtype=state)]
        for t in range(1, 5):
            g = random(shape, dtype, 1000 * t + seed)
            run(genome, [tensor], [g], backend, t)
            exact = reference_step(genome, exact[0], g.double().numpy(), *exact[1:], t)
            computed = [x.to(arithmetic) for x in yardstick]
            eager_update(genome, computed[0], g.to(arithmetic), *computed[1:], t, genome.lr)
            for stored, value in zip(yardstick, computed, strict=True):
                stored.copy_(value)
        for name, i in (("p", 0), ("m", 1), ("v", 2)):
            actual = tensor.parameter if name == "p" else tensor.moments.get(name)
            if actual is not None:
                assert_near(actual, exact[i], yardstick[i], actual.dtype, f"{seed} {name}")


@pytest.mark.parametrize("rounding", [None, Rounding(5, 6)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_no_layout_changes_a_bit(dtype, state, rounding):
    """Every layout of gradient and moments against contiguous ones; the parameter's own order is
    the one in which elements are counted."""
    guarded, cases = layouts(dtype)
    guard = guarded == 7.0
    for genome in (BOTH, zoo.evolved_2025, SIGN, FULL):
        for name, (parameter, gradient) in cases.items():
            if rounding and not parameter.is_contiguous() and not name.startswith("sliced"):
                continue
            dense = bound(
                genome, parameter.clone(memory_format=torch.contiguous_format), state, rounding
            )
            other = bound(genome, parameter, state, rounding)
            for moment in other.moments:  # moments that lie like neither, between guards
                around = torch.full((2, *parameter.shape, 3), 5.0, dtype=state)
                around[1, ..., 1] = 0
                other.moments[moment] = around[1, ..., 1]
            for t in (1, 2, 3):
                run(genome, [dense], [gradient.contiguous()], t=t)
                run(genome, [other], [gradient], t=t)
            assert all(map(same_bits, everything(other), everything(dense))), name
            for moment in other.moments.values():
                base = moment._base
                assert (base[0] == 5).all(), name
                assert (base[1, ..., ::2] == 5).all(), name
    assert (guarded[guard] == 7.0).all(), "a neighbour was written to"


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_rounded_once(backend, dtype):
    """To the nearest bfloat16, the even one of two, whatever the arithmetic."""
    inputs, nearest = between_bfloat16(dtype)
    g = torch.from_numpy(inputs).to(dtype)
    assert np.array_equal(g.double().numpy(), inputs)
    tensor = bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16)
    run(MOMENTUM, [tensor], [g], backend)
    assert np.array_equal(tensor.moments["m"].double().numpy(), nearest)

    g = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    tensor = bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16)
    run(MOMENTUM, [tensor], [g], backend)
    assert tensor.moments["m"].isnan().tolist() == [True, False, False]
    assert tensor.moments["m"][1:].tolist() == [math.inf, -math.inf]


def test_moments_of_other_formats_are_an_error():
    for dtype, state in itertools.product(DTYPES, DTYPES):
        if state not in STATE_DTYPES[dtype]:
            with pytest.raises(OptimizerError, match=f"is {state}; it may be {ARITHMETIC[dtype]}"):
                bound(MOMENTUM, torch.zeros(3, dtype=dtype), state)


# stochastic rounding

# from the Random123 distribution, kat_vectors
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize("vectors", PHILOX)
def test_philox_gives_the_published_numbers(vectors):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in vectors)
    result = (ctypes.c_uint32 * 4)()
    native.library().evk_philox(
        (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), result
    )
    assert list(result) == expected
    eager = philox(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert [int(word) for word in eager] == expected


class Stream(ctypes.Structure):
    """evk_stream."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("operand", ctypes.c_uint32),
        ("position", ctypes.c_uint32),
        ("t", ctypes.c_uint32),
    )


@pytest.mark.parametrize(("operand", "bits"), [(0, 0), (3, 0b1100), (4, 0b0001), (7, 0b1101)])
@pytest.mark.parametrize("first", [0, 5, 2**31 + 3, 2**35 - 256, 2**35 + 8])
def test_random_bits_are_those_of_the_element(first, operand, bits):
    buffer, n = (ctypes.c_uint16 * 256)(), 200
    draw = native.library().evk_random_bits
    draw.restype = ctypes.POINTER(ctypes.c_uint16)
    stream = Stream(7 << 40 | 9, operand, 11, 13)
    drawn = draw(buffer, ctypes.byref(stream), ctypes.c_int64(first), ctypes.c_int64(n))[:n]
    eighth = torch.arange(first, first + n) // 8
    words = philox(
        (
            eighth & 0xFFFFFFFF,
            eighth >> 32 | bits << 28,
            torch.full_like(eighth, 11),
            torch.full_like(eighth, 13),
        ),
        stream.seed,
    )
    expected = [
        int(words[i % 8 // 2][i - first]) >> 16 * (i % 2) & 0xFFFF for i in range(first, first + n)
    ]
    assert drawn == expected


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_stochastic_rounding_is_unbiased(backend, dtype):
    """As often up as the number lies near the upper neighbour, bit by bit; never further."""
    n = 40_000
    for i, part in enumerate((0.5, 2**-3, 0.999, 1e-3, 1 / 3)):
        exact = -(1 + part / 128)  # between two bfloat16
        tensor = bound(MOMENTUM, torch.zeros(n, dtype=dtype), torch.bfloat16, Rounding(3, i))
        g = torch.ones(n, dtype=dtype)
        run(MOMENTUM, [tensor], [g], backend, gradient_factor=exact)
        m = tensor.moments["m"].double()
        assert set(m.tolist()) <= {-1.0, -1.0078125}
        up = (m != -1).double().mean().item()
        assert abs(up - part) < 5 * math.sqrt(part * (1 - part) / n) + 2**-16


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_every_random_number_decides(backend):
    """Rounded up exactly where the bits that are cut off and the random ones make a carry."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:6] = 0x7F7F7FFF, 0x7F7F8000, 0xFF7F8001, 0x7F800000, 0xFF800000, 0x7FC00001
    bits[6:] = np.where((bits[6:] & 0x7FFFFFFF) >= 0x7F7F0000, 0x3F8000FF, bits[6:])
    g = torch.from_numpy(bits.view(np.float32).copy())
    rounding = Rounding(2**64 - 1, 2**32 - 1)
    tensor = bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16, rounding)
    run(MOMENTUM, [tensor], [g], backend, t=2**32 - 1)
    random = random_bits(tensor.parameter, "m", rounding, 2**32 - 1).numpy()
    expected = ((bits.astype(np.int64) + random) >> 16).astype(np.uint16)
    # the largest finite number has no neighbour above it: to nearest, as without random bits
    expected[:6] = 0x7F7F, 0x7F80, 0xFF80, 0x7F80, 0xFF80, 0x7FC0
    stored = tensor.moments["m"].view(torch.int16).numpy().view(np.uint16)
    # -0 becomes 0 in 0 * m + g
    assert np.array_equal(stored[bits != 0x80000000], expected[bits != 0x80000000])


@pytest.mark.parametrize("genome", [BOTH, FULL], ids=["two", "six"])
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_both_backends_draw_the_same_bits(genome, dtype, state):
    for parameter, gradient in layouts(dtype)[1].values():
        results = []
        for backend in HOST_BACKENDS:
            copy = torch.empty_like(parameter).copy_(parameter)
            tensor = bound(genome, copy, state, Rounding(12345678901234567890, 3))
            for t in (1, 2):
                run(genome, [tensor], [gradient.clone()], backend, t)
            results.append(everything(tensor))
        if state == torch.bfloat16:
            assert all(map(same_bits, results[0][1:], results[1][1:]))
        if dtype == torch.bfloat16:
            assert same_bits(results[0][0], results[1][0])


def test_every_operand_position_step_and_seed_draws_bits_of_its_own():
    p = torch.zeros(64)
    draws = [
        random_bits(p, *which)
        for which in (
            ("p", Rounding(0, 0), 1),
            ("m", Rounding(0, 0), 1),
            ("v", Rounding(0, 0), 1),
            *((f"a{i}", Rounding(0, 0), 1) for i in range(4)),
            ("p", Rounding(1, 0), 1),
            ("p", Rounding(2**32, 0), 1),
            ("p", Rounding(0, 1), 1),
            ("p", Rounding(0, 0), 2),
        )
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    tensor = bound(BOTH, torch.zeros(3000, dtype=torch.bfloat16), torch.bfloat16, Rounding(0, 0))
    run(BOTH, [tensor], [random((3000,), torch.bfloat16, 0)])
    assert len({t.double().sum().item() for t in everything(tensor)}) == 3


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 1)], ids=str)
def test_nothing_is_rounded_stochastically_too(backend, shape):
    empty = torch.zeros(shape, dtype=torch.bfloat16)
    run(BOTH, [bound(BOTH, empty, torch.bfloat16, Rounding(0, 0))], [empty.clone()], backend)


def test_exact_numbers_stay_under_stochastic_rounding():
    values = random((999,), torch.bfloat16, 0)
    tensor = bound(SIGN, values.clone(), rounding=Rounding(1, 1))
    run(SIGN, [tensor], [torch.zeros_like(values)])
    assert same_bits(tensor.parameter, values)


@pytest.mark.parametrize("genome", [BOTH, FULL], ids=["two", "six"])
@pytest.mark.parametrize("rounding", [None, Rounding(9, 1)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_stored_bits_do_not_depend_on_the_number_of_threads(genome, state, rounding, threads):
    sizes = [(1,), (63,), (4097,), (301, 203), (70_001,), (0,), ()]
    results = []
    for count in (1, 2, 3):
        threads(count)
        tensors = [
            bound(genome, random(size, torch.bfloat16, i), state, rounding)
            for i, size in enumerate(sizes)
        ]
        for t in (1, 2):
            gradients = [random(size, torch.bfloat16, 50 * t + i) for i, size in enumerate(sizes)]
            gradients[3] = gradients[3].t().contiguous().t()
            run(genome, tensors, gradients, t=t, clear=True)
            assert not any(g.any() for g in gradients)
        results.append([t for tensor in tensors for t in everything(tensor)])
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))


@pytest.mark.parametrize("genome", [BOTH, FULL], ids=["two", "six"])
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_ranges_may_end_anywhere(genome, dtype, state):
    """evk_update by pieces of awkward lengths, direct and staged, against one run."""
    for rounding, strided in itertools.product((None, Rounding(4, 4)), (False, True)):
        tensors = [bound(genome, random((2999,), dtype, 0), state, rounding) for _ in range(2)]
        g = random((2999, 2), dtype, 1)[:, 0]
        g = g if strided else g.contiguous()
        run(genome, tensors[:1], [g.clone()])
        plan = run(genome, tensors[1:], [g.clone()], gradient_factor=1.0)
        for tensor, start in zip(
            everything(tensors[1]),
            everything(bound(genome, random((2999,), dtype, 0), state)),
            strict=True,
        ):
            tensor.copy_(start)
        ends = [0, 1, 2, 9, 258, 511, 512, 513, 1400, 2998, 2999]
        plan._look_at([g])
        for first, end in itertools.pairwise(ends):
            native.library().evk_update(
                plan._arrays[0], plan.addresses[0], plan._numbers.address, first, end, 1
            )
            assert not g[:end].any()
            assert end == 2999 or g[end:].any()
        assert all(map(same_bits, everything(tensors[1]), everything(tensors[0])))


def test_flushing_denormals_does_not_depend_on_the_number_of_threads(threads):
    """The mode is each thread's own: threads that were there before it was set follow the caller,
    and are left as they were."""
    n = 100_000
    inputs = [torch.full((n,), x) for x in (1e-39, 1e-40)]
    threads(2)
    run(MOMENTUM, [bound(MOMENTUM, torch.zeros(n))], [torch.zeros(n)])
    plan = HOST_BACKENDS["cpu"].bind([bound(SIGN, torch.zeros(n))])
    for flush in (True, False):
        parameter = inputs[0].clone()
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor has no such mode")
        try:
            run(MOMENTUM, [bound(MOMENTUM, parameter)], [inputs[1]])
            squares = plan.sum_of_squares(inputs[:1])
        finally:
            torch.set_flush_denormal(False)
        assert same_bits(inputs[0] * 1, inputs[0])  # by torch, on the same threads
        assert len(set(parameter.view(torch.int32).tolist())) == 1
        assert (parameter[0] == 0, squares == 0) == (flush, flush)


# clearing


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cleared_gradients_are_zero_and_nothing_else_is(backend, dtype):
    guarded, cases = layouts(dtype)
    del guarded
    for name, (parameter, gradient) in cases.items():
        tensors = [bound(zoo.adam, torch.empty_like(parameter).copy_(parameter)) for _ in range(2)]
        run(zoo.adam, tensors[:1], [gradient.clone()], backend)
        surroundings = torch.as_strided(
            gradient, (gradient.untyped_storage().nbytes() // gradient.element_size(),), (1,), 0
        )
        expected = surroundings.clone()
        torch.as_strided(
            expected, gradient.shape, gradient.stride(), gradient.storage_offset()
        ).zero_()
        run(zoo.adam, tensors[1:], [gradient], backend, clear=True)
        assert torch.equal(surroundings, expected), name
        assert all(map(same_bits, everything(tensors[1]), everything(tensors[0]))), name


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(
    "share",
    [
        lambda g: [g[:40_000], g[:40_000]],
        lambda g: [g[:40_000], g[20_000:60_000]],
        lambda g: [g[:40_000], g[39_999:80_000]],
        lambda g: [g[20_000:60_000], g[:40_000]],
        lambda g: [g[:80_000:2], g[1:80_001:2]],
        lambda g: [g[:80_000].view(40_000, 2).t(), g[80_000:80_001].expand(2, 40_000)],
        lambda g: [g[:1].expand(50_000), None, g[1:2].expand(50_000), g[2:2]],
        lambda g: [g.as_strided((40_000, 2), (1, 1)), g[50_000:50_001]],
    ],
)
def test_gradients_that_share_memory_are_cleared_when_all_are_read(backend, share, threads):
    threads(2)
    memory = random((100_000,), torch.float32, 0)
    results = []
    for clear in (False, True):
        gradients = share(memory)
        tensors = [bound(SIGN, torch.zeros((100,) if g is None else g.shape)) for g in gradients]
        run(SIGN, tensors, gradients, backend, clear=clear)
        results.append([tensor.parameter for tensor in tensors])
    assert all(map(torch.equal, *results))
    assert not any(g is not None and g.any() for g in gradients)


# sums of squares


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_squares(backend, dtype):
    gradients = [random(shape, dtype, i) for i, shape in enumerate(SHAPES)]
    gradients += [gradient for _, gradient in layouts(dtype)[1].values()]
    gradients.append(random((9000,), dtype, 77) * 1e-3)
    plan = HOST_BACKENDS[backend].bind([bound(SIGN, torch.zeros_like(g)) for g in gradients])
    exact = sum(math.fsum((g.double() ** 2).flatten().tolist()) for g in gradients)
    assert plan.sum_of_squares(gradients) == pytest.approx(exact, rel=1e-14)
    without = [None if i % 2 else g for i, g in enumerate(gradients)]
    exact = sum(math.fsum((g.double() ** 2).flatten().tolist()) for g in without if g is not None)
    assert plan.sum_of_squares(without) == pytest.approx(exact, rel=1e-14)
    assert plan.sum_of_squares([None] * len(gradients)) == 0
    for bad in (math.inf, -math.inf, math.nan):
        gradients[4] = gradients[4].clone()
        gradients[4][777] = bad
        assert str(plan.sum_of_squares(gradients)) == str(abs(bad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_squares_depends_on_neither_threads_nor_layout(dtype, threads):
    gradients = [random((n,), dtype, n) for n in (70_001, 3, 8192, 16_384, 0, 500, 131_072)]
    strided = [torch.stack([g, g]).t()[:, 0] for g in gradients]
    sums = set()
    for count, laid in itertools.product((1, 2, 3), (gradients, strided)):
        threads(count)
        plan = HOST_BACKENDS["cpu"].bind([bound(SIGN, torch.zeros_like(g)) for g in laid])
        sums.add(plan.sum_of_squares(laid))
    assert len(sums) == 1


def test_sum_of_squares_of_many_elements(threads):
    """More than chunks of the shortest length would hold."""
    parameter = torch.empty(40_000_003, dtype=torch.bfloat16)
    plan = HOST_BACKENDS["cpu"].bind([bound(SIGN, p) for p in (parameter[:-7], parameter[-7:])])
    three = torch.tensor([3.0], dtype=torch.bfloat16)
    gradients = [three.expand(40_000_003 - 7), three.expand(7)]
    for count in (1, 3):
        threads(count)
        assert plan.sum_of_squares(gradients) == 9 * 40_000_003


# addresses that somebody else writes


def test_relaunch_takes_gradients_from_the_addresses(threads):
    sizes = [(100,), (30, 40), (7,)]
    parameters = [random(size, torch.float32, i) for i, size in enumerate(sizes)]
    expected, actual = ([bound(zoo.adam, p.clone()) for p in parameters] for _ in range(2))
    steps = [
        [random(size, torch.float32, 10 * s + i) for i, size in enumerate(sizes)] for s in (1, 2)
    ]
    steps[0][1], steps[1][1] = (step[1].t().contiguous().t() for step in steps)
    steps[0][2] = steps[1][2] = None
    for t, gradients in enumerate(steps, 1):
        run(zoo.adam, expected, gradients, t=t)
    plan = run(zoo.adam, actual, steps[0])
    addresses, versions = plan.addresses, [b.parameter._version for b in actual]
    addresses[0], addresses[1] = steps[1][0].data_ptr(), steps[1][1].data_ptr()
    assert plan.squares() == plan.sum_of_squares(steps[1])
    plan.relaunch([numbers(zoo.adam, 2)], True)
    assert plan.addresses is addresses
    for a, b in zip(actual, expected, strict=True):
        assert all(map(same_bits, everything(a), everything(b)))
    assert [b.parameter._version for b in actual] == versions  # that is left to the caller
    assert not any(g.any() for g in steps[1][:2])


def test_cleared_gradients_get_a_new_version():
    g, tensor = torch.ones(5), bound(SIGN, torch.zeros(5))
    run(SIGN, [tensor], [g])
    assert (g._version, tensor.parameter._version) == (0, 1)
    run(SIGN, [tensor], [g], clear=True)
    assert (g._version, tensor.parameter._version) == (1, 2)


# more elements than 32 bits can count


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@pytest.mark.parametrize("rounding", [None, Rounding(1, 1)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("step", [1, 2])
def test_offsets_beyond_32_bits(step, rounding):
    parameter, gradient = (untouched(step * BEYOND)[::step] for _ in range(2))
    plan = HOST_BACKENDS["cpu"].bind([bound(SIGN, parameter, rounding=rounding)])
    plan._look_at([gradient])
    table = type(plan._numbers)([numbers(SIGN)])
    table.write([numbers(SIGN)])
    for middle in {2**31 // step, 2**31, BEYOND - 3000}:
        gradient[middle - 1000 : middle + 1000] = -2
        native.library().evk_update(
            plan._arrays[0], plan.addresses[0], table.address, middle - 999, middle + 999, 1
        )
        near = parameter[middle - 1001 : middle + 1001]
        assert near[:3].tolist() == near[-3:].flip(0).tolist() == [0, 0, 1]
        assert (near[2:-2] == 1).all()
        near = gradient[middle - 1000 : middle + 1000]
        assert near[0] == -2 == near[-1]
        assert not near[1:-1].any()


@pytest.mark.skipif("EVOKERNELS_LARGE" not in os.environ, reason="takes 9 GB of memory")
def test_parameters_beyond_32_bits():
    parameter = torch.zeros(BEYOND, dtype=torch.bfloat16, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    FusedEvolvedOptimizer([parameter], SIGN).step()
    assert parameter.min() == parameter.max() == -1
