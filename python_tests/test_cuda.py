"""The CUDA backend without a GPU: its source, compiled for the host, against the definition."""

import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from bound import BEYOND, BOTH, FORMATS, MOMENTUM, SIGN, bound, everything, random, same_bits
from bound import untouched
from cases import TOTAL_STEPS, case, flat, layouts
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
from evokernels.kernels.device import DevicePlan, Scaling
from evokernels.kernels.memory import memory_order
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
    assert {bool(r["aligned"]) for r in steps.plan._records if r["elements"]} == {not {*"pmv"} & {*shifted}}
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
