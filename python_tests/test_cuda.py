"""The CUDA backend without a GPU: its source, compiled for the host, against the definition."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from bound import (
    BEYOND,
    BOTH,
    FORMATS,
    MOMENTUM,
    SIGN,
    bound,
    everything,
    random,
    same_bits,
    untouched,
)
from cases import TOTAL_STEPS, between_bfloat16, case, flat, layouts
from cuda_on_host import CudaOnHost
from device_steps import Guarded, Steps, hyperparameters
from oracle import (
    DTYPES,
    SHAPES,
    assert_near,
    eager_step,
    eager_steps,
    exact_step,
    exact_steps,
    precise,
    random_genome,
)

from evokernels import Genome, Term, zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.compiler.terms import genome_scalars
from evokernels.kernels.device import Scaling
from evokernels.kernels.memory import memory_order, overlaps_itself
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers, Rounding
from evokernels.kernels.registry import BACKENDS

GENOMES = 300
# of vectors of two to eight elements, of chunks, of what all threads of a block take at a time
SIZES = [0, 1, 2, 7, 8, 9, 1023, 1024, 1025, 2047, 2049, 4097, 8192, 8193]


@pytest.fixture
def guarded():
    """Every test that uses it fails if a kernel writes beside its tensors."""
    memory = Guarded()
    yield memory
    memory.check()


def bits(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(actual, expected, what=None):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, b), (what, i)


# against the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_genomes_match_the_reference(dtype, guarded):
    genomes = [random_genome(seed) for seed in range(GENOMES)]
    cases = [case(seed, dtype) for seed in range(GENOMES)]
    owners = [genome for genome in genomes for _ in SHAPES]
    starts = [start for starts, _ in cases for start in starts]
    tensors = [
        guarded.bound(genome, start, ARITHMETIC[dtype])
        for genome, start in zip(owners, starts, strict=True)
    ]
    steps = Steps(CudaOnHost(), tensors, owners, total_steps=TOTAL_STEPS)
    assert len(steps.plan.launches) > 1
    for t in range(5):
        gradients = [guarded.copy(g) for _, rows in cases for g in rows[t]]
        before = bits(gradients)
        steps.run(gradients)
        assert_same_bits(gradients, before)
    assert (steps.counts == 5).all()

    for i, (genome, (start, rows)) in enumerate(zip(genomes, cases, strict=True)):
        mine = tensors[i * len(SHAPES) : (i + 1) * len(SHAPES)]
        rows = [flat(row) for row in rows]
        exact = exact_steps(genome, flat(start), rows, TOTAL_STEPS)
        yardstick = eager_steps(genome, flat(start), rows, TOTAL_STEPS)
        what = f"genome {i}: {genome}"
        assert_near(flat([b.parameter for b in mine]), exact[0], yardstick[0], dtype, what)
        for name, moment in (("m", 1), ("v", 2)):
            if name in mine[0].moments:
                kept = flat([b.moments[name] for b in mine])
                assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)


@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_moments_of_every_format_match_the_reference(dtype, state, guarded):
    genomes = [random_genome(seed) for seed in range(12)]
    n = 5162
    tensors = [guarded.bound(g, random((n,), dtype, i), state) for i, g in enumerate(genomes)]
    steps = Steps(CudaOnHost(), tensors, genomes, total_steps=TOTAL_STEPS)
    exact = [(precise(b.parameter), np.zeros(n), np.zeros(n)) for b in tensors]
    yardstick = [(b.parameter.clone(), *torch.zeros(2, n, dtype=state)) for b in tensors]
    for t in range(1, 5):
        gradients = [random((n,), dtype, 1000 * t + i) for i in range(len(genomes))]
        steps.run([guarded.copy(g) for g in gradients])
        for i, (genome, g) in enumerate(zip(genomes, gradients, strict=True)):
            p, m, v = exact[i]
            exact[i] = exact_step(genome, p, precise(g), m, v, t, TOTAL_STEPS)
            p, m, v = yardstick[i]
            yardstick[i] = eager_step(genome, p, g, m, v, t, TOTAL_STEPS)
    for i, b in enumerate(tensors):
        for name, place in (("p", 0), ("m", 1), ("v", 2)):
            actual = b.parameter if name == "p" else b.moments.get(name)
            if actual is not None:
                what = f"{genomes[i]} {name}"
                assert_near(actual, exact[i][place], yardstick[i][place], actual.dtype, what)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_gradients_show(bad, guarded):
    genomes = [random_genome(seed) for seed in range(40)]
    starts, rows = [], []
    for seed in range(40):
        parameters, gradients = case(seed, torch.float32)
        starts.append(flat(parameters))
        rows.append([flat(row) for row in gradients[:3]])
        rows[-1][1][::5] = bad
    tensors = [
        guarded.bound(genome, start, torch.float32)
        for genome, start in zip(genomes, starts, strict=True)
    ]
    steps = Steps(CudaOnHost(), tensors, genomes, total_steps=TOTAL_STEPS)
    for t in range(3):
        steps.run([row[t] for row in rows])
    for genome, start, row, b in zip(genomes, starts, rows, tensors, strict=True):
        exact, _, _ = exact_steps(genome, start, row, TOTAL_STEPS)
        actual = b.parameter.numpy()
        # an infinite sum may come out as NaN or infinite, depending on the order of its terms
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), genome
        if np.isnan(bad):
            assert np.array_equal(np.isnan(actual), np.isnan(exact)), genome


def test_a_term_that_is_not_there_adds_nothing(guarded):
    genome = dataclasses.replace(SIGN, lr_log10=-1.0)
    start = torch.tensor([1.0, 1.0, -math.inf])
    tensor = guarded.bound(genome, start, torch.float32)
    Steps(CudaOnHost(), [tensor], [genome]).run([torch.tensor([math.inf, -2.0, 0.0])])
    assert torch.equal(tensor.parameter, torch.tensor([0.9, 1.1, -math.inf]))


# where tensors lie


@pytest.mark.parametrize("shifted", ["", "p", "g", "m", "v", "pgmv"])
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_every_size_and_alignment(dtype, state, shifted, guarded):
    """Of small numbers the moments are exact in every format."""
    tensors, gradients = [], []
    for n in SIZES:
        start, g = (torch.arange(n).mul(k).remainder(13).sub(6).to(dtype) for k in (5, 7))
        zeros = torch.zeros(n, dtype=state)
        moments = {name: guarded.copy(zeros, name in shifted) for name in "mv"}
        parameter = guarded.copy(start, "p" in shifted)
        tensors.append(BoundTensor(lower(BOTH).program, parameter, moments))
        gradients.append(guarded.copy(g, "g" in shifted))
    start, g = flat([b.parameter for b in tensors]), flat(gradients)
    steps = Steps(CudaOnHost(), tensors, [BOTH] * len(tensors))
    assert {bool(r["aligned"]) for r in steps.plan._records if r["elements"]} == {
        not {*"pmv"} & {*shifted}
    }
    steps.run(gradients, clear=True)
    p, m, v = (flat(each) for each in zip(*map(everything, tensors), strict=True))
    assert_same_bits((m, v), ((0.5 * g.double()).to(state), (0.25 * g.double() ** 2).to(state)))
    zeros = torch.zeros_like(start, dtype=ARITHMETIC[dtype])
    exact = exact_step(BOTH, *map(precise, (start, g, zeros, zeros)), 1, TOTAL_STEPS)
    eager = eager_step(BOTH, start, g, zeros, zeros, 1, TOTAL_STEPS)
    assert_near(p, exact[0], eager[0], dtype, "parameter")
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("rounding", [None, Rounding(5, 6)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_no_layout_changes_a_bit(dtype, state, rounding, guarded):
    """Against the same elements one after another, in the order in which they are counted."""
    dense, strided, owners, gradients = [], [], [], []
    for genome in (BOTH, zoo.evolved_2025, SIGN):
        for parameter, gradient in layouts(dtype)[1].values():
            tensor = guarded.bound(genome, parameter, state, rounding)
            for name in tensor.moments:  # moments that lie like neither, between others
                around = torch.zeros((2, *parameter.shape, 3), dtype=state)
                tensor.moments[name] = guarded.copy(around[1, ..., 1])
            strided.append(tensor)
            line = in_memory_order(parameter, parameter)
            dense.append(guarded.bound(genome, line, state, rounding))
            gradients.append((in_memory_order(gradient, parameter), guarded.copy(gradient)))
            owners.append(genome)
    for tensors, row in zip((dense, strided), zip(*gradients, strict=True), strict=True):
        steps = Steps(CudaOnHost(), tensors, owners)
        for _ in range(3):
            steps.run(row)
    for a, b in zip(dense, strided, strict=True):
        lines = [in_memory_order(x, b.parameter) for x in everything(b)]
        assert_same_bits(lines, everything(a))


def in_memory_order(tensor, parameter):
    """The elements of a tensor one after another, as its parameter has them in memory."""
    order = memory_order(parameter)
    return tensor.permute([*order, *{*range(parameter.dim())} - {*order}]).flatten()


# stochastic rounding


@pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
def test_the_same_bits_are_drawn_as_elsewhere(dtype, state, guarded):
    """As the eager backend does, whatever the layout; and in vectors as one by one."""
    rounding = Rounding(12345678901234567890, 3)
    pairs = [*layouts(dtype)[1].values()]
    pairs += [(random((n,), dtype, n), random((n,), dtype, -n)) for n in (1025, 8200)]
    for taken in (0, 2**32 - 2):  # the number of the step wraps around
        mine = [guarded.bound(BOTH, p, state, rounding) for p, _ in pairs]
        eager = [guarded.bound(BOTH, p, state, rounding) for p, _ in pairs]
        gradients = [g for _, g in pairs]
        steps = Steps(CudaOnHost(), mine, [BOTH] * len(mine), taken)
        plan = BACKENDS["eager"].bind(eager)
        rule = lower(BOTH)
        for t in (taken + 1, taken + 2):
            steps.run(gradients)
            values = rule.numbers(**genome_scalars(BOTH, t))
            plan.run(gradients, [0] * len(eager), [Numbers(rule.program, values, t)])
        for a, b in zip(mine, eager, strict=True):
            if state == torch.bfloat16:
                assert_same_bits(a.moments.values(), b.moments.values())
            if dtype == torch.bfloat16:
                assert_same_bits([a.parameter], [b.parameter])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_rounded_once(dtype, guarded):
    """To the nearest bfloat16, the even one of two, whatever the arithmetic."""
    inputs, nearest = between_bfloat16(dtype)
    g = torch.from_numpy(inputs).to(dtype)
    tensor = guarded.bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16)
    Steps(CudaOnHost(), [tensor], [MOMENTUM]).run([g])
    assert np.array_equal(tensor.moments["m"].double().numpy(), nearest)


# what a step does besides


def some(guarded, genome=BOTH, dtype=torch.float32, sizes=(5, 3000, 1), shift=0):
    """Tensors and gradients."""
    tensors = [
        guarded.bound(genome, random((n,), dtype, i), ARITHMETIC[dtype], shift=shift)
        for i, n in enumerate(sizes)
    ]
    return tensors, [guarded.copy(random((n,), dtype, 9 + i), shift) for i, n in enumerate(sizes)]


def stepped(guarded, gradients_of=lambda gs: gs, **scaling):
    """What two steps make of `some`."""
    tensors, gradients = some(guarded, zoo.evolved_2025)
    steps = Steps(CudaOnHost(), tensors, [zoo.evolved_2025] * len(tensors))
    for _ in range(2):
        steps.run(gradients_of(gradients), **scaling)
    return steps


@pytest.mark.parametrize("resident", [1, 7])
def test_tensors_without_a_gradient_are_left_alone_and_not_counted(resident, guarded):
    """One block then has tensors of one group and several steps after one another."""
    tensors, gradients = some(guarded, zoo.adamw)
    alone, _ = some(guarded, zoo.adamw)
    steps = Steps(CudaOnHost(resident=resident), tensors, [zoo.adamw] * 3)
    there = [(1, 0, 1), (0, 0, 1), (1, 1, 0), (0, 0, 0), (1, 1, 1)]
    for row in there:
        steps.run([g if here else None for g, here in zip(gradients, row, strict=True)])
    assert steps.counts.tolist() == [3, 2, 3]
    for tensor, expected, g, count in zip(tensors, alone, gradients, (3, 2, 3), strict=True):
        by_itself = Steps(CudaOnHost(), [expected], [zoo.adamw])
        for _ in range(count):
            by_itself.run([g])
        assert_same_bits(everything(tensor), everything(expected))


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_forbidden_step_does_nothing_but_clear(clear, shift, guarded):
    tensors, gradients = some(guarded, shift=shift)
    gradients[1] = guarded.copy(torch.stack([gradients[1]] * 2, 1)[:, 1])  # every other element
    steps = Steps(CudaOnHost(), tensors, [BOTH] * 3)
    before, values = bits(steps.results), bits(gradients)
    steps.run([*gradients[:2], None], found_inf=torch.tensor([1.0]), clear=clear)
    assert_same_bits(steps.results, before)
    assert not steps.counts.any()
    for g, value in zip(gradients[:2], values, strict=False):
        assert torch.equal(g, torch.zeros_like(g) if clear else value)
    assert torch.equal(gradients[2], values[2])
    assert steps.plan._ticket == 0
    steps.run(values, found_inf=torch.tensor([0.0]))
    assert not any(map(same_bits, steps.results, before))
    assert (steps.counts == 1).all()


def test_gradients_are_unscaled(guarded):
    plain = stepped(guarded)
    scaled = stepped(guarded, lambda gs: [1024 * g for g in gs], grad_scale=torch.tensor([1024.0]))
    assert_same_bits(scaled.results, plain.results)


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("most", [math.inf, 1e9, 0.5])
def test_the_norm_is_limited(most, scale, guarded):
    genome = dataclasses.replace(SIGN, term_types=(Term.GRAD,), alphas=(1.0,))
    tensors, gradients = some(guarded, genome, torch.float64)
    start = bits([b.parameter for b in tensors])
    scaled = [scale * g for g in gradients]
    steps = Steps(CudaOnHost(), tensors, [genome] * 3)
    squares = steps.plan.sum_of_squares(scaled)
    steps.run(scaled, grad_scale=torch.tensor([scale]), max_norm=most, squares=squares)
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, most)
    for tensor, before, parameter in zip(tensors, start, parameters, strict=True):
        expected = before - parameter.grad
        torch.testing.assert_close(tensor.parameter, expected, rtol=1e-14, atol=1e-14)


def test_the_direction_turns_round(guarded):
    plain = stepped(guarded)
    tensors, gradients = some(guarded, zoo.evolved_2025)
    turned = Steps(CudaOnHost(), tensors, [zoo.evolved_2025] * 3)
    turned.hyperparameters = [hyperparameters(zoo.evolved_2025, direction=-1.0)]
    for _ in range(2):
        turned.run([-g for g in gradients])
    assert_same_bits(turned.results, plain.results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cleared_gradients_are_zero_and_nothing_else_is(dtype, guarded):
    cases = [(p, g) for p, g in layouts(dtype)[1].values() if not overlaps_itself(g)]
    tensors, twins = ([guarded.bound(BOTH, p, ARITHMETIC[dtype]) for p, _ in cases] for _ in "ab")
    gradients = [guarded.copy(g) for _, g in cases]
    steps = Steps(CudaOnHost(), tensors, [BOTH] * len(cases))
    other = Steps(CudaOnHost(), twins, [BOTH] * len(cases))
    other.run([g.clone() for g in gradients])
    steps.run(gradients, clear=True)
    assert_same_bits(steps.results, other.results)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "share",
    [
        lambda g: [g[:4000], g[:4000]],
        lambda g: [g[2000:6000], g[:4000]],
        lambda g: [g[:8000:2], g[1:8001:2]],
        lambda g: [g[:1].expand(5000), None, g[1:2].expand(5000), g[2:2]],
        lambda g: [g.as_strided((4000, 2), (1, 1)), g[5000:5001]],
    ],
)
def test_gradients_that_share_memory_are_cleared_when_all_are_read(share, guarded):
    results = []
    for clear in (False, True):
        gradients = share(random((10_000,), torch.float32, 0))
        tensors = [
            guarded.bound(SIGN, torch.zeros((100,) if g is None else g.shape), torch.float32)
            for g in gradients
        ]
        steps = Steps(CudaOnHost(), tensors, [SIGN] * len(tensors))
        steps.run(gradients, clear=clear)
        results.append(steps.results)
    assert all(map(torch.equal, *results))
    assert not any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("most_words", [4095, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_squares(dtype, most_words, guarded):
    gradients = [random(shape, dtype, i) for i, shape in enumerate(SHAPES)]
    gradients += [gradient for _, gradient in layouts(dtype)[1].values()]
    gradients += [guarded.copy(random((9000,), dtype, 77) * 1e-3, shift) for shift in (0, 1)]
    tensors = [bound(SIGN, torch.zeros_like(g)) for g in gradients]
    steps = Steps(CudaOnHost(most_words), tensors, [SIGN] * len(tensors))
    assert (len(steps.plan.launches) > 1) == (most_words == 40)
    without = [None if i % 2 else g for i, g in enumerate(gradients)]
    for gs in (gradients, without, gradients, [None] * len(gradients)):
        there = [g.double().square().flatten() for g in gs if g is not None]
        exact = math.fsum(x for squares in there for x in squares.tolist())
        assert steps.plan.sum_of_squares(gs).item() == pytest.approx(exact, rel=1e-14)
    assert steps.plan._ticket == 0
    for bad in (math.inf, -math.inf, math.nan):
        gradients[4] = gradients[4].clone()
        gradients[4][777] = bad
        assert str(steps.plan.sum_of_squares(gradients).item()) == str(abs(bad))


def test_sum_of_squares_of_more_chunks_than_threads(guarded):
    n = 300_001
    sizes = [n, 3, n]
    tensors = [bound(SIGN, torch.zeros(size)) for size in sizes]
    plan = Steps(CudaOnHost(resident=500), tensors, [SIGN] * 3).plan
    assert len(plan.launches[0].chunks) > 2 * 256
    assert plan.sum_of_squares([torch.tensor([3.0]).expand(size) for size in sizes]) == 9 * sum(
        sizes
    )


# launches


def mixed(guarded):
    """Tensors of all dtypes under several rules, and gradients for two steps."""
    genomes, tensors, rows = [], [], ([], [])
    for i, (dtype, state) in enumerate(FORMATS * 3):
        genome = [zoo.evolved_2025, zoo.adamw, BOTH, random_genome(1), random_genome(7)][i % 5]
        rounding = Rounding(4, i) if i % 3 else None
        n = (3, 1000, 4097, 20_000)[i % 4]
        tensors.append(guarded.bound(genome, random((n,), dtype, i), state, rounding))
        genomes.append(genome)
        for t, row in enumerate(rows):
            row.append(random((n,), dtype, 100 * t + i))
    return tensors, genomes, rows


@pytest.mark.parametrize(("most_words", "resident"), [(4095, 1), (4095, 500), (60, 3), (31, 2)])
def test_neither_launches_nor_blocks_change_a_bit(most_words, resident, guarded):
    results = []
    for backend in (CudaOnHost(), CudaOnHost(most_words, resident)):
        tensors, genomes, rows = mixed(guarded)
        steps = Steps(backend, tensors, genomes)
        for row in rows:
            steps.run(row)
        assert (steps.counts == 2).all()
        results.append(steps.results)
    assert (len(steps.plan.launches) > 1) == (most_words < 100)
    assert_same_bits(*results)


def test_a_tensor_among_others_is_updated_as_if_alone(guarded):
    tensors, genomes, rows = mixed(guarded)
    steps = Steps(CudaOnHost(), tensors, genomes)
    assert len(steps.plan.kinds) > 15
    assert {kind.stochastic for kind in steps.plan.kinds} == {False, True}
    alone, _, _ = mixed(guarded)
    for row in rows:
        steps.run(row)
    for i in range(0, len(alone), 4):
        by_itself = Steps(CudaOnHost(), [alone[i]], [genomes[i]])
        for row in rows:
            by_itself.run([row[i]])
        assert_same_bits(everything(tensors[i]), everything(alone[i]), genomes[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_learning_rate_may_be_on_the_device(dtype, guarded):
    lr = torch.tensor([0.0078125], dtype=dtype)
    results = []
    for given in (lr.item(), lr):
        tensors, gradients = some(guarded)
        steps = Steps(CudaOnHost(), tensors, [BOTH] * 3)
        steps.hyperparameters = [hyperparameters(BOTH, base_lr=given)]
        steps.run(gradients)
        results.append(steps.results)
    assert_same_bits(*results)
    before = bits(steps.results)
    lr.fill_(0)  # and is read there in every step
    steps.run(gradients)
    assert_same_bits([steps.results[0]], [before[0]])
    assert not same_bits(steps.results[1], before[1])


# the numbers of a step

STEPS = [1, 2, 10, 99, 100, 101, 1000, 10**6]
ALONE = {"lr_log10": -2.0, "wd_log10": -math.inf}


def change(guarded, genome, t, total_steps, moments=(0.0, 0.0)):
    """By how much step `t` moves a float64 parameter of 0 whose gradient is 1."""
    tensor = guarded.bound(genome, torch.zeros(1, dtype=torch.float64), torch.float64)
    for name, value in zip("mv", moments, strict=True):
        if name in tensor.moments:
            tensor.moments[name].fill_(value)
    steps = Steps(CudaOnHost(), [tensor], [genome], t - 1, total_steps)
    steps.run([torch.ones(1, dtype=torch.float64)])
    return -tensor.parameter.item()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("warmup", [None, 0, 1, 100])
@pytest.mark.parametrize("total_steps", [100, 10**6])
def test_the_schedule_is_that_of_the_host(warmup, cosine, total_steps, guarded):
    genome = Genome(
        term_types=["GRAD"],
        use_warmup=warmup is not None,
        warmup_steps=warmup or 0,
        use_cosine_decay=cosine,
        **ALONE,
    )
    for t in STEPS:
        expected = genome.lr * learning_rate_factor(genome, t - 1, total_steps)
        assert change(guarded, genome, t, total_steps) == pytest.approx(
            expected, rel=1e-15, abs=1e-18
        )


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_bias_correction_is_that_of_the_definition(beta, guarded):
    momentum = Genome(term_types=["MOMENTUM"], beta1=beta, **ALONE)
    root = Genome(term_types=["RMS_NORM"], beta2=beta, eps_log10=-12, use_m=False, **ALONE)
    for t in STEPS:
        bias = 1 - np.longdouble(beta) ** t
        factors = {momentum: 1 / bias, root: 1 / (np.sqrt(1 / bias) + root.eps)}
        for genome, factor in factors.items():
            expected = pytest.approx(float(genome.lr * factor), rel=1e-14)
            assert change(guarded, genome, t, None, (1, 1)) == expected, t


# more elements than 32 bits can count


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@pytest.mark.parametrize("rounding", [None, Rounding(1, 1)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("step", "shift"), [(1, 0), (1, 1), (2, 0)])
def test_offsets_beyond_32_bits(step, shift, rounding):
    parameter, gradient = (untouched(step * BEYOND + shift)[shift::step] for _ in range(2))
    tensor = bound(SIGN, parameter, rounding=rounding)
    plan = Steps(CudaOnHost(), [tensor], [SIGN]).plan
    (launch,) = plan.launches
    # only some of its chunks, which begin where they always do
    middles = sorted({2**31 // step, 2**31, BEYOND // 1024 * 1024 - 1024})
    chunks = torch.tensor([(0, m - 1024, m + 1000) for m in middles])
    launch.header["chunks"], launch.header["chunk_count"] = chunks.data_ptr(), len(chunks)
    for m in middles:
        gradient[m - 1030 : m + 1010] = -2
    assert plan.sum_of_squares([gradient]) == 4 * 2024 * len(middles)
    plan.run([gradient], [hyperparameters(SIGN)], Scaling(clear=True))
    for m in middles:
        near = slice(m - 1026, m + 1002)
        assert (parameter[near][2:-2] == 1).all()
        assert not gradient[near][2:-2].any()
        for values, outside in ((parameter, 0), (gradient, -2)):
            assert values[near][:2].tolist() == values[near][-2:].tolist() == [outside] * 2
