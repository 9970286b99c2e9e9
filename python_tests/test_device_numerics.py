"""What backends compute that take a whole step on the device, against the definition: one table of
cases for CUDA and Triton, on a GPU and without one (CUDA's source compiled for the host, Triton's
kernels interpreted)."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from bound import BOTH, FORMATS, MOMENTUM, PLAIN, SIGN, everything, random, same_bits
from cases import TOTAL_STEPS, between_bfloat16, case, flat, layouts
from cuda_on_host import CudaOnHost
from device_steps import Guarded, Limited, Steps, hyperparameters
from oracle import (
    DTYPES,
    SHAPES,
    assert_near,
    eager_formulas,
    eager_step,
    eager_steps,
    exact_step,
    exact_steps,
    exact_update,
    precise,
    random_genome,
)
from own_rules import AVERAGED, FORMULAS, WIDE, averages_by_operand, rule_of
from triton_interpreter import TritonInterpreted

from evokernels import Genome, Term, terms, zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.compiler.terms import genome_scalars
from evokernels.compiler.words import GROUP, HEADER
from evokernels.errors import OptimizerError
from evokernels.kernels.memory import memory_order, overlaps_itself
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers, Rounding
from evokernels.kernels.registry import BACKENDS
from evokernels.kernels.rounding import random_bits
from evokernels.terms import beta1, beta2, beta3, clip, exp, log1p, progress, sign, tanh, where

# of vectors of two to eight elements, of chunks, of what all threads of a block take at a time
SIZES = [0, 1, 2, 7, 8, 9, 1023, 1024, 1025, 2047, 2049, 4097, 8192, 8193]
FEW_SIZES = [0, 1, 7, 9, 1023, 1025]
ROUNDED_RANDOMLY = [formats for formats in FORMATS if torch.bfloat16 in formats]
ONE_TENSOR = len(HEADER) + len(GROUP) + 1  # words of a launch of no more than that
GRADIENT = Genome(term_types=[Term.GRAD], **PLAIN)

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_format = pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
# stochastic rounding changes no other format
per_format_and_rounding = pytest.mark.parametrize(
    ("dtype", "state", "rounding"),
    [
        *((*formats, None) for formats in FORMATS),
        *((*formats, Rounding(2**63 + 5, 6)) for formats in ROUNDED_RANDOMLY),
    ],
    ids=lambda value: "stochastic" if isinstance(value, Rounding) else str(value),
)


class Target:
    """Where a case runs: tensors there, each between guards, and steps of them.

    Attributes:
        interpreted: every element takes long.
        compiles_slowly: so does every structure and dtype that a kernel has besides others.
    """

    def __init__(self, backend, device):
        self.backend, self.device = backend, device
        self.interpreted = isinstance(backend, TritonInterpreted)
        self.compiles_slowly = backend.name.startswith("triton")
        self._memory = Guarded(device)
        self.bound, self.copy, self.check = (
            getattr(self._memory, name) for name in ("bound", "copy", "check")
        )

    def copies(self, tensors):
        return [None if tensor is None else self.copy(tensor) for tensor in tensors]

    def scalar(self, value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=self.device)

    def steps(self, tensors, genomes, limits=None, **options):
        """`genomes`: one for each tensor, or for all; `limits` as in `Limited`."""
        genomes = [genomes] * len(tensors) if isinstance(genomes, Genome) else genomes
        return Steps(Limited(self.backend, **(limits or {})), tensors, genomes, **options)


@pytest.fixture(autouse=True)
def _no_terms_are_left(monkeypatch):
    monkeypatch.setattr("evokernels.genome._own_terms", {})


@pytest.fixture(
    params=[
        CudaOnHost.name,
        TritonInterpreted.name,
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    """Every backend that takes a whole step on the device."""
    return request.param


@pytest.fixture
def target(backend):
    """Every test that uses it fails if a kernel writes beside its tensors."""
    if backend.startswith("triton"):
        pytest.importorskip("triton")
    on_cpu = {each.name: each for each in (CudaOnHost(), TritonInterpreted())}
    there = Target(on_cpu.get(backend) or BACKENDS[backend], "cpu" if backend in on_cpu else "cuda")
    yield there
    there.check()


def bits(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(actual, expected, what=None):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, b), (what, i)


def on_host(tensors):
    """All elements one after another."""
    return flat(tensors).cpu()


def host_steps(backend, tensors, genome, rows, taken=0):
    """The same steps on CPU tensors, by a backend that takes its numbers from the host."""
    plan, rule = BACKENDS[backend].bind(tensors), lower(genome)
    for t, row in enumerate(rows, start=taken + 1):
        values = rule.numbers(**genome_scalars(genome, t))
        plan.run(row, [0] * len(row), [Numbers(rule.program, values, t)])


# against the definition


@per_dtype
def test_random_genomes_match_the_reference(target, dtype):
    """All genomes and shapes in one plan, five steps."""
    count = 8 if target.interpreted else 300
    genomes = [random_genome(seed) for seed in range(count)]
    cases = [case(seed, dtype) for seed in range(count)]
    owners = [genome for genome in genomes for _ in SHAPES]
    starts = [start for starts, _ in cases for start in starts]
    tensors = [
        target.bound(genome, start, ARITHMETIC[dtype])
        for genome, start in zip(owners, starts, strict=True)
    ]
    steps = target.steps(tensors, owners, total_steps=TOTAL_STEPS)
    for t in range(5):
        gradients = [g for _, rows in cases for g in rows[t]]
        copies = target.copies(gradients)
        steps.run(copies)
        assert same_bits(on_host(copies), flat(gradients))
    assert (steps.counts == 5).all()

    for i, (genome, (start, rows)) in enumerate(zip(genomes, cases, strict=True)):
        mine = tensors[i * len(SHAPES) : (i + 1) * len(SHAPES)]
        rows = [flat(row) for row in rows]
        exact = exact_steps(genome, flat(start), rows, TOTAL_STEPS)
        yardstick = eager_steps(genome, flat(start), rows, TOTAL_STEPS)
        what = f"genome {i}: {genome}"
        assert_near(on_host([b.parameter for b in mine]), exact[0], yardstick[0], dtype, what)
        for name, moment in (("m", 1), ("v", 2)):
            if name in mine[0].moments:
                kept = on_host([b.moments[name] for b in mine])
                assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)


@per_format
def test_moments_of_every_format_match_the_reference(target, dtype, state):
    """Four steps, each from what was stored."""
    genomes = [random_genome(seed) for seed in range(4 if target.compiles_slowly else 12)]
    n = 1500 if target.interpreted else 5162
    tensors = [target.bound(g, random((n,), dtype, i), state) for i, g in enumerate(genomes)]
    steps = target.steps(tensors, genomes, total_steps=TOTAL_STEPS)
    exact = [(precise(b.parameter.cpu()), np.zeros(n), np.zeros(n)) for b in tensors]
    yardstick = [(b.parameter.cpu().clone(), *torch.zeros(2, n, dtype=state)) for b in tensors]
    for t in range(1, 5):
        gradients = [random((n,), dtype, 1000 * t + i) for i in range(len(genomes))]
        steps.run(target.copies(gradients))
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
                assert_near(actual.cpu(), exact[i][place], yardstick[i][place], actual.dtype, what)


@per_format
def test_rules_of_other_terms_match_the_reference(target, dtype, state):
    """Of a user's own and of the wide catalogue, averages included; four steps."""
    plain = dtype == state  # how others are stored, terms without averages do not change
    chosen = [*(FORMULAS if plain else AVERAGED).values()]
    chosen += WIDE if plain and dtype == torch.float32 else []
    # far from quotients of which nobody computes more than a few digits
    genomes = [rule_of(each, lr_log10=-1.0, eps_log10=-2.0) for each in chosen]
    n = 1030 if target.interpreted else 3001
    tensors = [target.bound(g, random((n,), dtype, i), state) for i, g in enumerate(genomes)]
    steps = target.steps(tensors, genomes, total_steps=TOTAL_STEPS)
    zeros = torch.zeros(n, dtype=state)
    starts = [
        {"p": b.parameter.cpu().clone(), **dict.fromkeys(("m", "v", *kept.values()), zeros)}
        for b, kept in zip(tensors, map(averages_by_operand, genomes), strict=True)
    ]
    eager, exact = starts, [{name: precise(x) for name, x in row.items()} for row in starts]
    for t in range(1, 5):
        gradients = [random((n,), dtype, 1000 * t + i) for i in range(len(genomes))]
        steps.run(target.copies(gradients))
        rows = list(zip(genomes, gradients, strict=True))
        exact = [
            exact_update(genome, {**row, "g": precise(g)}, t, TOTAL_STEPS)
            for (genome, g), row in zip(rows, exact, strict=True)
        ]
        eager = [
            eager_formulas(genome, {**row, "g": g}, t, TOTAL_STEPS)
            for (genome, g), row in zip(rows, eager, strict=True)
        ]
    for genome, b, truth, yardstick in zip(genomes, tensors, exact, eager, strict=True):
        kept = averages_by_operand(genome)
        assert b.moments.keys() >= kept.keys()
        for operand, actual in {"p": b.parameter, **b.moments}.items():
            name, what = kept.get(operand, operand), f"{lower(genome).state_names} {operand}"
            assert_near(actual.cpu(), truth[name], yardstick[name], actual.dtype, what)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMULAS)
def test_not_finite_gradients_show_in_own_terms(target, name, bad):
    """As in the definition; what is not finite is never hidden."""
    rule = rule_of(FORMULAS[name])
    kept = averages_by_operand(rule)
    start, g = random((20,), torch.float32, 0), random((20,), torch.float32, 1)
    g[::5] = bad
    tensor = target.bound(rule, start, torch.float32)
    steps = target.steps([tensor], rule, total_steps=TOTAL_STEPS)
    exact = {"p": precise(start), **dict.fromkeys(("m", "v", *kept.values()), np.zeros(20))}
    for t in (1, 2):
        steps.run(target.copies([g]))
        exact = exact_update(rule, {**exact, "g": precise(g)}, t, TOTAL_STEPS)
    actual, expected = tensor.parameter.cpu().numpy(), exact["p"]
    assert np.array_equal(np.isfinite(actual), np.isfinite(expected))
    if np.isnan(bad):
        assert np.array_equal(np.isnan(actual), np.isnan(expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_gradients_show(target, bad):
    genomes = [random_genome(seed) for seed in range(8 if target.interpreted else 40)]
    starts, rows = [], []
    for seed in range(len(genomes)):
        parameters, gradients = case(seed, torch.float32)
        starts.append(flat(parameters))
        rows.append([flat(row) for row in gradients[:3]])
        rows[-1][1][::5] = bad
    tensors = [
        target.bound(genome, start, torch.float32)
        for genome, start in zip(genomes, starts, strict=True)
    ]
    steps = target.steps(tensors, genomes, total_steps=TOTAL_STEPS)
    for t in range(3):
        steps.run(target.copies(row[t] for row in rows))
    for genome, start, row, b in zip(genomes, starts, rows, tensors, strict=True):
        exact, _, _ = exact_steps(genome, start, row, TOTAL_STEPS)
        actual = b.parameter.cpu().numpy()
        # an infinite sum may come out as NaN or infinite, depending on the order of its terms
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), genome
        if np.isnan(bad):
            assert np.array_equal(np.isnan(actual), np.isnan(exact)), genome


def test_a_term_that_is_not_there_adds_nothing(target):
    """0 * inf of the gradient term that the cover kernel has too, and 0 * -inf of the decay."""
    genome = dataclasses.replace(SIGN, lr_log10=-1.0)
    tensor = target.bound(genome, torch.tensor([1.0, 1.0, -math.inf]), torch.float32)
    gradient = torch.tensor([math.inf, -2.0, 0.0])
    target.steps([tensor], genome).run(target.copies([gradient]))
    assert torch.equal(tensor.parameter.cpu(), torch.tensor([0.9, 1.1, -math.inf]))


# where tensors lie


@pytest.mark.parametrize("shifted", ["", "p", "g", "m", "v", "pgmv"])
@per_format
def test_every_size_and_alignment(target, dtype, state, shifted):
    """Of small numbers the moments are exact in every format."""
    tensors, gradients = [], []
    for n in FEW_SIZES if target.interpreted else SIZES:
        start, g = (torch.arange(n).mul(k).remainder(13).sub(6).to(dtype) for k in (5, 7))
        zeros = torch.zeros(n, dtype=state)
        moments = {name: target.copy(zeros, name in shifted) for name in "mv"}
        parameter = target.copy(start, "p" in shifted)
        tensors.append(BoundTensor(lower(BOTH).program, parameter, moments))
        gradients.append(target.copy(g, "g" in shifted))
    start, g = on_host([b.parameter for b in tensors]), on_host(gradients)
    steps = target.steps(tensors, BOTH)
    assert {bool(r["aligned"]) for r in steps.plan._records if r["elements"]} == {
        not {*"pmv"} & {*shifted}
    }
    steps.run(gradients, clear=True)
    p, m, v = (on_host(each) for each in zip(*map(everything, tensors), strict=True))
    assert_same_bits((m, v), ((0.5 * g.double()).to(state), (0.25 * g.double() ** 2).to(state)))
    zeros = torch.zeros_like(start, dtype=ARITHMETIC[dtype])
    exact = exact_step(BOTH, *map(precise, (start, g, zeros, zeros)), 1, TOTAL_STEPS)
    eager = eager_step(BOTH, start, g, zeros, zeros, 1, TOTAL_STEPS)
    assert_near(p, exact[0], eager[0], dtype, "parameter")
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shifted", ["", "a0", "a3", "m"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_averages_of_every_size_and_alignment(target, state, shifted):
    """Of small numbers they are exact in every format."""
    rule = rule_of(AVERAGED["four averages"], beta1=0.5, beta2=0.75)
    tensors, gradients = [], []
    for n in FEW_SIZES if target.interpreted else SIZES:
        g = torch.arange(n).mul(7).remainder(13).sub(6).float()
        tensors.append(target.bound(rule, torch.zeros(n), state))
        for name, moment in tensors[-1].moments.items():
            tensors[-1].moments[name] = target.copy(moment, name in shifted)
        gradients.append(target.copy(g))
    steps = target.steps(tensors, rule)
    assert {bool(r["aligned"]) for r in steps.plan._records if r["elements"]} == {not shifted}
    g = on_host(gradients).double()
    steps.run(gradients, clear=True)
    moments = {name: on_host([b.moments[name] for b in tensors]) for name in tensors[0].moments}
    expected = {
        terms.average(terms.g, beta1): 0.5 * g,
        terms.average(terms.g, beta2): 0.25 * g,
        terms.average(abs(terms.g), 0.5): 0.5 * g.abs(),
        terms.average(terms.g * terms.g, beta2): 0.25 * g * g,
    }
    assert_same_bits([moments.pop("m")], [(0.5 * g).to(state)])
    for operand, average in averages_by_operand(rule).items():
        assert_same_bits([moments.pop(operand)], [expected[average].to(state)], operand)
    assert not moments
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shift", [0, 1])
@per_format_and_rounding
def test_bits_are_those_of_the_native_backend(target, dtype, state, shift, rounding):
    sizes = FEW_SIZES if target.interpreted else SIZES
    starts = [random((n,), dtype, n) for n in sizes]
    rows = [[random((n,), dtype, 100 * t + n) for n in sizes] for t in (1, 2)]
    native = [Guarded().bound(BOTH, start, state, rounding) for start in starts]
    host_steps("cpu", native, BOTH, rows)
    tensors = [target.bound(BOTH, start, state, rounding, shift) for start in starts]
    steps = target.steps(tensors, BOTH)
    for row in rows:
        steps.run([target.copy(g, shift) for g in row])
    if target.interpreted and dtype == torch.float64:  # whose fused multiply-add is not exact
        rtol = 1e-13 if state == dtype else 1e-2
        for a, b in zip(tensors, native, strict=True):
            for pair in zip(everything(a), everything(b), strict=True):
                torch.testing.assert_close(*pair, rtol=rtol, atol=1e-15)
    else:
        for n, a, b in zip(sizes, tensors, native, strict=True):
            assert_same_bits(everything(a), everything(b), n)


@per_format_and_rounding
def test_no_layout_changes_a_bit(target, dtype, state, rounding):
    """Against the same elements one after another, in the order in which they are counted."""
    dense, strided, owners, gradients = [], [], [], []
    rules = [BOTH] if target.compiles_slowly else [BOTH, zoo.evolved_2025, SIGN]
    if (dtype, state) == (torch.float32, torch.bfloat16):  # averages lie as moments do
        rules.append(rule_of(AVERAGED["four averages"]))
    for genome in rules:
        for parameter, gradient in layouts(dtype)[1].values():
            tensor = target.bound(genome, parameter, state, rounding)
            for name in tensor.moments:  # moments that lie like neither, between others
                around = torch.zeros((2, *parameter.shape, 3), dtype=state)
                tensor.moments[name] = target.copy(around[1, ..., 1])
            strided.append(tensor)
            line = in_memory_order(parameter, parameter)
            dense.append(target.bound(genome, line, state, rounding))
            line = in_memory_order(gradient, parameter)
            gradients.append((target.copy(line), target.copy(gradient)))
            owners.append(genome)
    for tensors, row in zip((dense, strided), zip(*gradients, strict=True), strict=True):
        steps = target.steps(tensors, owners)
        for _ in range(2):
            steps.run(row)
    for a, b in zip(dense, strided, strict=True):
        lines = [in_memory_order(x, b.parameter) for x in everything(b)]
        assert_same_bits(lines, everything(a))


def in_memory_order(tensor, parameter):
    """The elements of a tensor one after another, as its parameter has them in memory."""
    order = memory_order(parameter)
    return tensor.permute([*order, *{*range(parameter.dim())} - {*order}]).flatten()


def test_the_layout_of_a_gradient_may_change(target):
    start, g = random((40, 30), torch.float32, 0), random((40, 30), torch.float32, 1)
    tensors = [target.bound(zoo.adam, start, torch.float32) for _ in range(2)]
    steady, changing = (target.steps([tensor], zoo.adam) for tensor in tensors)
    other = g.t().contiguous().t()
    for gradient in (g, other, g, other):
        steady.run(target.copies([g]))
        changing.run(target.copies([gradient]))
    assert_same_bits(steady.results, changing.results)
    with pytest.raises(OptimizerError, match="negated"):
        changing.run([torch.complex(g, g).to(target.device).conj().imag])


# how results are stored


@pytest.mark.parametrize("taken", [0, 2**32 - 2])  # the number of the step wraps around
@pytest.mark.parametrize(("dtype", "state"), ROUNDED_RANDOMLY, ids=str)
def test_the_same_bits_are_drawn_as_elsewhere(target, dtype, state, taken):
    """As the eager backend does, whatever the layout; and in vectors as one by one."""
    rule = BOTH
    if taken == 0 and dtype in (torch.float64, torch.bfloat16):  # vectors of each width
        rule = rule_of(AVERAGED["four averages"], beta1=0.5, beta2=0.75)
    rounding = Rounding(12345678901234567890, 3)
    pairs = [*layouts(dtype)[1].values()]
    sizes = (1025,) if target.interpreted else (1025, 8200)
    pairs += [(random((n,), dtype, n), random((n,), dtype, -n)) for n in sizes]
    mine = [target.bound(rule, p, state, rounding) for p, _ in pairs]
    eager = [Guarded().bound(rule, p, state, rounding) for p, _ in pairs]
    gradients = [g for _, g in pairs]
    steps = target.steps(mine, rule, taken=taken)
    for _ in range(2):
        steps.run(target.copies(gradients))
    host_steps("eager", eager, rule, [gradients] * 2, taken)
    for a, b in zip(mine, eager, strict=True):
        if state == torch.bfloat16:
            assert_same_bits(a.moments.values(), b.moments.values())
        if dtype == torch.bfloat16:
            assert_same_bits([a.parameter], [b.parameter])


def test_every_random_number_decides(target):
    """Rounded up exactly where the bits that are cut off and the random ones make a carry."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[:6] = 0x7F7F7FFF, 0x7F7F8000, 0xFF7F8001, 0x7F800000, 0xFF800000, 0x7FC00001
    bits[6:] = np.where((bits[6:] & 0x7FFFFFFF) >= 0x7F7F0000, 0x3F8000FF, bits[6:])
    g = torch.from_numpy(bits.view(np.float32).copy())
    rounding = Rounding(2**64 - 1, 2**32 - 1)
    tensor = target.bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16, rounding)
    target.steps([tensor], MOMENTUM, taken=2**32 - 2).run(target.copies([g]))
    drawn = random_bits(torch.zeros_like(g), "m", rounding, 2**32 - 1).numpy()
    expected = ((bits.astype(np.int64) + drawn) >> 16).astype(np.uint16)
    expected[:6] = 0x7F7F, 0x7F80, 0xFF80, 0x7F80, 0xFF80, 0x7FC0
    stored = tensor.moments["m"].cpu().view(torch.int16).numpy().view(np.uint16)
    # -0 becomes 0 in 0 * m + g
    assert np.array_equal(stored[bits != 0x80000000], expected[bits != 0x80000000])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_rounded_once(target, dtype):
    """To the nearest bfloat16, the even one of two, whatever the arithmetic."""
    inputs, nearest = between_bfloat16(dtype)
    g = torch.from_numpy(inputs).to(dtype)
    tensor = target.bound(MOMENTUM, torch.zeros_like(g), torch.bfloat16)
    target.steps([tensor], MOMENTUM).run(target.copies([g]))
    assert np.array_equal(tensor.moments["m"].cpu().double().numpy(), nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(target, dtype):
    """All of them load exactly, and stores round as torch's: subnormals, ties, overflow, NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for lr_log10 in (-3.3, -0.1, 2.0):
        genome = dataclasses.replace(GRADIENT, lr_log10=lr_log10)
        tensor = target.bound(genome, torch.zeros_like(every), torch.float32)
        target.steps([tensor], genome).run(target.copies([every]))
        expected = (0 - torch.tensor(genome.lr, dtype=torch.float32) * every.float()).to(dtype)
        torch.testing.assert_close(tensor.parameter.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    tensor = target.bound(GRADIENT, every, torch.float32)
    target.steps([tensor], GRADIENT).run(target.copies([torch.zeros_like(every)]))
    kept, nan = tensor.parameter.cpu(), every.isnan()
    assert same_bits(kept[~nan], every[~nan])
    assert kept[nan].isnan().all()


# what a step does besides


def some(target, genome=BOTH, dtype=torch.float32, sizes=(5, 3000, 1), shift=0):
    """Tensors and gradients."""
    tensors = [
        target.bound(genome, random((n,), dtype, i), ARITHMETIC[dtype], shift=shift)
        for i, n in enumerate(sizes)
    ]
    return tensors, [target.copy(random((n,), dtype, 9 + i), shift) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("resident", [1, 7])
def test_tensors_without_a_gradient_are_left_alone_and_not_counted(target, resident):
    """One block then has tensors of one group and several steps after one another."""
    sizes = (5, 3000, 1, 0)
    tensors, gradients = some(target, zoo.adamw, sizes=sizes)
    alone, _ = some(target, zoo.adamw, sizes=sizes)
    steps = target.steps(tensors, zoo.adamw, {"resident": resident})
    there = [(1, 0, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
    for row in there:
        steps.run([g if here else None for g, here in zip(gradients, row, strict=True)])
    counts = [3, 2, 3, 3]
    assert steps.counts.tolist() == counts
    for tensor, expected, g, count in zip(tensors, alone, gradients, counts, strict=True):
        by_itself = target.steps([expected], zoo.adamw)
        for _ in range(count):
            by_itself.run([g])
        assert_same_bits(everything(tensor), everything(expected))


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@per_dtype
def test_a_forbidden_step_does_nothing_but_clear(target, dtype, clear, shift):
    tensors, gradients = some(target, dtype=dtype, shift=shift)
    gradients[1] = target.copy(torch.stack([gradients[1]] * 2, 1)[:, 1])  # every other element
    steps = target.steps(tensors, BOTH)
    before, values = bits(steps.results), bits(gradients)
    steps.run([*gradients[:2], None], found_inf=target.scalar(1.0), clear=clear)
    assert_same_bits(steps.results, before)
    assert not steps.counts.any()
    for g, value in zip(gradients[:2], values, strict=False):
        assert torch.equal(g, torch.zeros_like(g) if clear else value)
    assert torch.equal(gradients[2], values[2])
    assert steps.plan._ticket.item() == 0
    steps.run(values, found_inf=target.scalar(0.0))
    assert not any(map(same_bits, steps.results, before))
    assert (steps.counts == 1).all()


@per_dtype
def test_gradients_are_unscaled_and_turned_round(target, dtype):
    """By factors that are exact in every dtype."""
    results = []
    for scale, direction in ((1.0, 1.0), (64.0, 1.0), (0.5, -1.0)):
        tensors, gradients = some(target, zoo.evolved_2025, dtype)
        steps = target.steps(tensors, zoo.evolved_2025)
        steps.hyperparameters = [hyperparameters(zoo.evolved_2025, direction=direction)]
        scaled = target.copies(scale * direction * g for g in gradients)
        for _ in range(2):
            steps.run(scaled, grad_scale=None if scale == 1 else target.scalar(scale))
        results.append(steps.results)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("most_words", [2**31, ONE_TENSOR])
@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("most", [math.inf, 1e9, 0.5])
def test_the_norm_is_limited(target, most, scale, most_words):
    """By all gradients together, whatever launch they are in."""
    tensors, gradients = some(target, GRADIENT, torch.float64)
    start = [b.parameter.cpu().clone() for b in tensors]
    scaled = target.copies(scale * g for g in gradients)
    steps = target.steps(tensors, GRADIENT, {"most_words": most_words})
    assert len(steps.plan.launches) == (3 if most_words == ONE_TENSOR else 1)
    squares = steps.plan.sum_of_squares(scaled)
    steps.run(scaled, grad_scale=target.scalar(scale), max_norm=most, squares=squares)
    parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in start]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g.cpu().clone()
    torch.nn.utils.clip_grad_norm_(parameters, most)
    for tensor, before, parameter in zip(tensors, start, parameters, strict=True):
        expected = before - parameter.grad
        torch.testing.assert_close(tensor.parameter.cpu(), expected, rtol=1e-14, atol=1e-14)


@per_dtype
def test_cleared_gradients_are_zero_and_nothing_else_is(target, dtype):
    cases = [(p, g) for p, g in layouts(dtype)[1].values() if not overlaps_itself(g)]
    tensors, twins = ([target.bound(BOTH, p, ARITHMETIC[dtype]) for p, _ in cases] for _ in "ab")
    gradients = target.copies(g for _, g in cases)
    steps, other = (target.steps(each, BOTH) for each in (tensors, twins))
    other.run(bits(gradients))
    steps.run(gradients, clear=True)
    assert_same_bits(steps.results, other.results)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "share",
    [
        lambda g: [g[:2000], g[:2000]],
        lambda g: [g[:2000], g[1000:3000]],
        lambda g: [g[1000:3000], g[:2000]],
        lambda g: [g[:4000:2], g[1:4001:2]],
        lambda g: [g[:1].expand(2500), None, g[1:2].expand(2500), g[2:2]],
        lambda g: [g.as_strided((2000, 2), (1, 1)), g[2500:2501]],
    ],
)
def test_gradients_that_share_memory_are_cleared_when_all_are_read(target, share):
    results = []
    for clear in (False, True):
        gradients = share(target.copy(random((5000,), torch.float32, 0)))
        shapes = [(100,) if g is None else g.shape for g in gradients]
        tensors = [target.bound(SIGN, torch.zeros(shape), torch.float32) for shape in shapes]
        steps = target.steps(tensors, SIGN)
        steps.run(gradients, clear=clear)
        results.append(steps.results)
    assert_same_bits(*results)
    assert not any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("most_words", [2**31, 40])
@per_dtype
def test_sum_of_squares(target, dtype, most_words):
    """Of missing gradients too, the same each time, in as many launches as it takes."""
    gradients = [random(shape, dtype, i) for i, shape in enumerate(SHAPES)]
    gradients += [gradient for _, gradient in layouts(dtype)[1].values()]
    gradients = target.copies(gradients)
    small = random((2100 if target.interpreted else 9000,), dtype, 77) * 1e-3
    gradients += [target.copy(small, shift) for shift in (0, 1)]
    tensors = [target.bound(SIGN, torch.zeros(g.shape, dtype=dtype), dtype) for g in gradients]
    steps = target.steps(tensors, SIGN, {"most_words": most_words})
    assert (len(steps.plan.launches) > 1) == (most_words == 40)
    without = [None if i % 2 else g for i, g in enumerate(gradients)]
    found = []
    for gs in (gradients, without, gradients, [None] * len(gradients)):
        there = [g.cpu().double().square().flatten() for g in gs if g is not None]
        exact = math.fsum(x for squares in there for x in squares.tolist())
        found.append(steps.plan.sum_of_squares(gs).item())
        assert found[-1] == pytest.approx(exact, rel=1e-14)
    assert found[0] == found[2]
    assert steps.plan._ticket.item() == 0
    assert not steps.counts.any()
    for bad in (math.inf, -math.inf, math.nan):
        gradients[4] = gradients[4].clone()
        gradients[4][777] = bad
        assert str(steps.plan.sum_of_squares(gradients).item()) == str(abs(bad))


def test_sum_of_squares_of_more_chunks_than_threads(target):
    sizes = [3] * 600
    gradients = [target.copy(torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    tensors = [target.bound(SIGN, torch.zeros(n), torch.float32) for n in sizes]
    plan = target.steps(tensors, SIGN).plan
    assert len(plan.launches[0].chunks) > 2 * 256
    assert plan.sum_of_squares(gradients).item() == 3 * sum(i * i for i in range(600))


def test_learning_rates_may_be_on_the_device(target):
    """float32 or float64, read when the step is taken, for each group its own."""
    genomes = [dataclasses.replace(GRADIENT, lr_log10=float(i)) for i in range(3)]
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    tensors = [target.bound(genome, zeros, torch.float64) for genome in genomes]
    rates = [target.scalar(0.1), target.scalar(0.1, torch.float64), 0.25]
    steps = target.steps(tensors, genomes)
    steps.hyperparameters = [hyperparameters(GRADIENT, base_lr=rate) for rate in rates]
    gradients = target.copies([ones] * 3)
    steps.run(gradients)
    rates[0].fill_(3.0)
    rates[1].fill_(-2.0)
    steps.run(gradients)
    first = [torch.tensor(0.1, dtype=torch.float32).item(), 0.1, 0.25]
    for tensor, a, b in zip(tensors, first, (3.0, -2.0, 0.25), strict=True):
        assert (tensor.parameter == -a - b).all()


# launches and counts


def mixed(target):
    """Tensors of all formats under several rules, the steps each has taken, gradients for two."""
    genomes, tensors, taken, rows = [], [], [], ([], [])
    for i, (dtype, state) in enumerate(FORMATS * (1 if target.compiles_slowly else 3)):
        genome = [zoo.evolved_2025, zoo.adamw, BOTH, random_genome(1), random_genome(7)][i % 5]
        rounding = Rounding(4, i) if i % 3 else None
        n = (3, 1000, 4097, 1030 if target.interpreted else 20_000)[i % 4]
        tensors.append(target.bound(genome, random((n,), dtype, i), state, rounding))
        genomes.append(genome)
        taken.append(3.0 * (i % 2))
        for t, row in enumerate(rows):
            row.append(target.copy(random((n,), dtype, 100 * t + i)))
    return tensors, genomes, taken, rows


@pytest.mark.parametrize(
    "limits", [{"resident": 1}, {"most_words": 60, "resident": 3}, {"most_words": ONE_TENSOR}]
)
def test_neither_launches_nor_blocks_change_a_bit(target, limits):
    results = []
    for each in ({}, limits):
        tensors, genomes, taken, rows = mixed(target)
        steps = target.steps(tensors, genomes, each, taken=taken)
        assert (len(steps.plan.launches) > 1) == ("most_words" in each)
        for row in rows:
            steps.run(row)
        assert steps.counts.tolist() == [t + 2 for t in taken]
        results.append(steps.results)
    assert_same_bits(*results)


def test_a_tensor_among_others_is_updated_as_if_alone(target):
    tensors, genomes, taken, rows = mixed(target)
    steps = target.steps(tensors, genomes, taken=taken)
    assert len(steps.plan.kinds) > (6 if target.compiles_slowly else 15)
    assert {kind.stochastic for kind in steps.plan.kinds} == {False, True}
    assert len(steps.plan.launches) == 1
    alone, _, _, _ = mixed(target)
    for row in rows:
        steps.run(row)
    for i in range(0, len(alone), 4):
        by_itself = target.steps([alone[i]], [genomes[i]], taken=taken[i])
        for row in rows:
            by_itself.run([row[i]])
        assert_same_bits(everything(tensors[i]), everything(alone[i]), genomes[i])


def test_tensors_of_a_group_count_for_themselves(target):
    """In different steps, side by side."""
    taken = [0.0, 5.0, 5.0, 2.0, 0.0, 99.0, 98.0, 7.0]
    sizes = range(9, 9 + len(taken))
    tensors, gradients = some(target, zoo.evolved_2025, sizes=sizes)
    alone, _ = some(target, zoo.evolved_2025, sizes=sizes)
    together = target.steps(tensors, zoo.evolved_2025, taken=taken)
    together.run(gradients)
    assert together.counts.tolist() == [t + 1 for t in taken]
    for t, tensor, expected, g in zip(taken, tensors, alone, gradients, strict=True):
        target.steps([expected], zoo.evolved_2025, taken=t).run([g])
        assert_same_bits(everything(tensor), everything(expected), t)


def test_counts_may_be_set_back(target):
    """A step that was taken before, as after loading a state, is computed again."""
    tensor = target.bound(GRADIENT, torch.zeros(5), torch.float32)
    steps = target.steps([tensor], GRADIENT)
    for lr in (1.0, 2.0, 4.0):
        steps.counts.zero_()
        steps.hyperparameters = [hyperparameters(GRADIENT, base_lr=lr)]
        steps.run(target.copies([torch.ones(5)]))
    assert (tensor.parameter == -7).all()


# the numbers of a step

STEPS = [1, 2, 10, 99, 100, 101, 1000, 10**6]
ALONE = {"lr_log10": -2.0, "wd_log10": -math.inf}


def changes(target, genomes, total_steps, moments=0.0):
    """By how much each of `STEPS` moves float64 parameters of 0 whose gradients are 1, under each
    genome; all in one plan."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    owners = [genome for genome in genomes for _ in STEPS]
    tensors = [target.bound(genome, zero, torch.float64) for genome in owners]
    for tensor in tensors:
        for moment in tensor.moments.values():
            moment.fill_(moments)
    taken = [t - 1.0 for t in STEPS] * len(genomes)
    steps = target.steps(tensors, owners, taken=taken, total_steps=total_steps)
    steps.run(target.copies([one] * len(tensors)))
    assert steps.counts.tolist() == [t + 1 for t in taken]
    moved = [-tensor.parameter.item() for tensor in tensors]
    return zip(owners, STEPS * len(genomes), moved, strict=True)


@pytest.mark.parametrize("total_steps", [100, 1001, 10**6])
def test_the_schedule_is_that_of_the_host(target, total_steps):
    genomes = [
        Genome(
            term_types=["GRAD"],
            use_warmup=warmup is not None,
            warmup_steps=warmup or 0,
            use_cosine_decay=cosine,
            **ALONE,
        )
        for warmup in (None, 0, 1, 100)
        for cosine in (False, True)
    ]
    for genome, t, moved in changes(target, genomes, total_steps):
        expected = genome.lr * learning_rate_factor(genome, t - 1, total_steps)
        # near the end of the cosine by what two last digits of cos, which CUDA may be off, come to
        expected = pytest.approx(expected, rel=1e-15, abs=genome.lr * 2.0**-52)
        assert moved == expected, (genome, t)


OF_PROGRESS = [
    (exp(-progress), lambda x: math.exp(-x)),
    (log1p(progress), math.log1p),
    (tanh(3 * progress), lambda x: math.tanh(3 * x)),
    (where(progress > 0.5, 2 + progress, 7), lambda x: 2 + x if x > 0.5 else 7.0),
    (clip(progress, 0.02, 0.25), lambda x: min(max(x, 0.02), 0.25)),
]


@pytest.mark.parametrize("total_steps", [100, 1001, 10**6])
def test_progress_is_that_of_the_definition(target, total_steps):
    """And what terms make of it; behind the end it stays 1."""
    rules = {rule_of(f * terms.g, **ALONE): meaning for f, meaning in OF_PROGRESS}
    for rule, t, moved in changes(target, list(rules), total_steps):
        expected = rule.lr * rules[rule](min(t / total_steps, 1.0))
        assert moved == pytest.approx(expected, rel=1e-15), (lower(rule).formulas, t)


# Of numbers that are finite when a term is registered: what is multiplied while it is compiled
# overflows, and so does what a step makes of it.
_huge = (1e200 * progress) * 1e200
NOT_FINITE_IN_A_STEP = [
    (_huge, math.inf),
    (-_huge, -math.inf),
    (_huge - _huge * 2, math.nan),
    (exp(_huge), math.inf),
    (exp(-_huge), 0.0),
    (tanh(-_huge), -1.0),
    (log1p(_huge - 3), math.inf),
    (1 + exp(_huge - 2 * _huge), math.nan),
    (exp(2000 * progress), math.inf),
    (1 / exp(2000 * progress), 0.0),
    (log1p(-2 * progress), -math.inf),
    (log1p(-3 * progress), math.nan),
    (where(log1p(-3 * progress) > 0, 1, 2), math.nan),
    (clip(log1p(-3 * progress), 1, 2), math.nan),
    (1 / (progress - 0.5), math.inf),
    (-1 / (progress - progress), -math.inf),
    (sign(progress - 0.5) / sign(progress - 0.5), math.nan),
    (exp(progress * 5e-324), 1.0),
    (exp(progress * 0.5e-323) - 1 + 2 * (1 / 4), 0.5),
]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_numbers_of_a_step_that_are_not_finite_on_the_host(backend):
    for formula, expected in NOT_FINITE_IN_A_STEP:
        rule = rule_of(formula * terms.g)
        numbers = lower(rule).numbers(**genome_scalars(rule, 1, training_steps=2))
        assert all(type(number) is float for number in numbers)
        zero = torch.zeros(1, dtype=torch.float64)
        moments = {name: zero.clone() for name in lower(rule).program.state}
        tensor = BoundTensor(lower(rule).program, zero, moments)
        values = [Numbers(lower(rule).program, numbers, 1)]
        BACKENDS[backend].bind([tensor]).run([zero + 1], [0], values)
        assert -zero.item() == pytest.approx(expected, rel=1e-15, nan_ok=True), formula


def test_numbers_of_a_step_that_are_not_finite(target):
    """Are what the host has, in each of several groups."""
    rules = [rule_of(formula * terms.g) for formula, _ in NOT_FINITE_IN_A_STEP]
    zero = torch.zeros(1, dtype=torch.float64)
    tensors = [target.bound(rule, zero, torch.float64) for rule in rules]
    steps = target.steps(tensors, rules, total_steps=2)
    steps.run(target.copies([zero + 1] * len(rules)))
    for (formula, expected), tensor in zip(NOT_FINITE_IN_A_STEP, tensors, strict=True):
        moved = -tensor.parameter.item()
        assert moved == pytest.approx(expected, rel=1e-15, nan_ok=True), formula


def test_a_rule_may_have_more_numbers_than_a_block_has_threads(target):
    rule = rule_of(sum(i * abs(i * terms.g + 1) for i in range(1, 131)))
    assert len(lower(rule).formulas) > 256
    tensor = target.bound(rule, torch.zeros(3, dtype=torch.float64), torch.float64)
    target.steps([tensor], rule).run(target.copies([torch.ones(3, dtype=torch.float64)]))
    assert (tensor.parameter == -sum(i * (i + 1) for i in range(1, 131))).all()


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.999999])
def test_averages_have_their_bias_corrected(target, beta):
    """Whether the beta is a number of the formula or of the genome."""
    rules = [
        rule_of(terms.average(terms.g, each), use_bias_correction=True, beta3=beta, **ALONE)
        for each in (beta, beta3)
    ]
    for rule, t, moved in changes(target, rules, None):
        weight = (1 - np.longdouble(beta)) / (1 - np.longdouble(beta) ** t)
        assert moved == pytest.approx(float(rule.lr * weight), rel=1e-14), t


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_bias_correction_is_that_of_the_definition(target, beta):
    momentum = Genome(term_types=["MOMENTUM"], beta1=beta, **ALONE)
    root = Genome(term_types=["RMS_NORM"], beta2=beta, eps_log10=-12, use_m=False, **ALONE)
    for genome, t, moved in changes(target, [momentum, root], None, moments=1.0):
        bias = 1 - np.longdouble(beta) ** t
        factor = 1 / bias if genome is momentum else 1 / (np.sqrt(1 / bias) + root.eps)
        assert moved == pytest.approx(float(genome.lr * factor), rel=1e-14), (genome, t)
