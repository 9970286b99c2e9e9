"""Every backend against the float64 reference: genomes × dtypes × shapes, layouts, odd values."""

import ctypes
import math
import pathlib
import platform
import random
import subprocess
import warnings

import numpy as np
import pytest
import torch
from bound import FULL, HOST_BACKENDS, bound, own
from cases import TOTAL_STEPS, case, flat, layouts
from oracle import (
    DTYPES,
    assert_near,
    eager_formulas,
    eager_steps,
    exact_steps,
    exact_update,
    precise,
    random_genome,
)
from test_terms import random_formula

from evokernels import FusedEvolvedOptimizer, Genome, Term, zoo
from evokernels.compiler.covers import COVERS, find_cover
from evokernels.compiler.evaluate import run_program
from evokernels.compiler.lower import lower
from evokernels.compiler.render_c import C_FLAGS, STORED, cover_symbol, render_covers
from evokernels.compiler.terms import genome_scalars
from evokernels.errors import OptimizerError
from evokernels.kernels import native
from evokernels.kernels.memory import find_overlap, lies_densely, overlaps_itself
from evokernels.kernels.own_kernels import own_kernels
from evokernels.kernels.plan import ARITHMETIC, Numbers
from evokernels.terms import (
    average,
    beta1,
    beta3,
    eps,
    exp,
    g,
    log1p,
    m,
    m_before,
    progress,
    sqrt,
    tanh,
    v_hat,
    where,
)

CSRC = pathlib.Path(__file__).parents[1] / "csrc"


def train(genome, parameters, gradients, backend):
    """Five or so steps on given gradients; the parameters change in place."""
    optimizer = FusedEvolvedOptimizer(parameters, genome, total_steps=TOTAL_STEPS, backend=backend)
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_random_genomes_match_the_reference(backend, dtype):
    for seed in range(300):
        genome = random_genome(seed)
        start, gradients = case(seed, dtype)
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = train(genome, parameters, gradients, backend)

        gradients = [flat(step) for step in gradients]
        exact = exact_steps(genome, flat(start), gradients, TOTAL_STEPS)
        yardstick = eager_steps(genome, flat(start), gradients, TOTAL_STEPS)
        what = f"genome {seed}: {genome}"
        assert_near(flat(parameters), exact[0], yardstick[0], dtype, what)
        for name, moment in (("exp_avg", 1), ("exp_avg_sq", 2)):
            states = [optimizer.state[p] for p in parameters]
            if name in states[0]:
                kept = flat([state[name] for state in states])
                assert kept.dtype == ARITHMETIC[dtype]
                assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)


# Smooth, so that no digit more or less decides which way they go.
OWN = {
    "squashed": own(tanh(3 * g), log1p(abs(average(g, 0.9))), lr_log10=-1, use_m=False),
    "damped": own(exp(-abs(average(g, beta1))) * m, progress * g / (1 + v_hat), lr_log10=-1),
    "slow": own(m, average(g, beta3) / (sqrt(v_hat) + eps), lr_log10=-1, eps_log10=-2, beta3=0.97),
    "masked": own(where(g * average(g, 0.5) > 0, average(g, 0.5) * g, 0.0), m_before, lr_log10=-1),
    "full": FULL,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("name", OWN)
def test_own_rules_match_the_reference(name, backend, dtype):
    """All shapes, by the tolerance rule; each step begins where the last one left the parameter."""
    genome, rule = OWN[name], lower(OWN[name])
    start, gradients = case(7, dtype)
    parameters = [p.clone().requires_grad_() for p in start]
    optimizer = FusedEvolvedOptimizer(parameters, genome, total_steps=TOTAL_STEPS, backend=backend)
    zeros = torch.zeros(flat(start).shape, dtype=ARITHMETIC[dtype])
    eager = {"p": flat(start), "m": zeros, "v": zeros, **dict.fromkeys(rule.averages, zeros)}
    exact = {each: precise(tensor) for each, tensor in eager.items()}
    for t, step_gradients in enumerate(gradients, start=1):
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient
        eager["g"], exact["g"] = flat(step_gradients), precise(flat(step_gradients))
        eager |= eager_formulas(genome, eager, t, TOTAL_STEPS)
        exact |= exact_update(genome, exact, t, TOTAL_STEPS)
        optimizer.step()
        assert_near(flat(parameters), exact["p"], eager["p"], dtype, f"p of step {t}")
        eager["p"], exact["p"] = flat(parameters).clone(), precise(flat(parameters))
    states = [optimizer.state[p] for p in parameters]
    for each in rule.averages:
        kept = flat([state[str(each)] for state in states])
        assert kept.dtype == ARITHMETIC[dtype]
        assert_near(kept, exact[each], eager[each], kept.dtype, str(each))


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_random_own_rules_match_the_interpreter(backend):
    """Any operation on anything, in float64: sums and scalars as the program has them."""
    for seed in range(12):
        rng = random.Random(seed)
        formulas = (
            random_formula(rng) + average(g + random_formula(rng, 2), 0.5),
            random_formula(rng),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            genome = own(*(g + each for each in formulas), use_m=seed % 3 > 0, use_v=seed % 2 > 0)
            rule = lower(genome)
        tensor = bound(genome, torch.linspace(-3, 3, 1001, dtype=torch.float64))
        plan = HOST_BACKENDS[backend].bind([tensor])
        exact = {name: x.numpy().copy() for name, x in tensor.moments.items()}
        exact["p"] = tensor.parameter.numpy().copy()
        for t in (1, 2, 3):
            gradient = torch.randn(1001, dtype=torch.float64)
            values = rule.numbers(**genome_scalars(genome, t, training_steps=5))
            plan.run([gradient], [0], [Numbers(rule.program, values, t)])
            exact |= run_program(rule.program, {**exact, "g": gradient.numpy()}, values)
            for name, x in (("p", tensor.parameter), *tensor.moments.items()):
                np.testing.assert_allclose(x.numpy(), exact[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_takes_numbers_in_the_place_of_tensors(dtype):
    """Alike in both backends, and of the arithmetic's dtype: 0.1 is another number in float32."""
    x = torch.tensor([-1.0, 0.0, 0.25, math.nan, math.inf], dtype=dtype)
    rules = [
        own(where(progress > 0.5, g, 0.1)),
        own(where(progress > 0.5, 0.1 * beta1, g)),
        own(where(g > 0.1 * beta1, 0.1 * beta1, progress)),
        own(where(g < 0.25, g, 0.1 * beta1)),
    ]
    expected = [
        [0.1] * 5,
        x.tolist(),
        [0.2, 0.2, 0.09, math.nan, 0.09],
        [-1.0, 0.0, 0.09, math.nan, 0.09],
    ]
    for genome, values in zip(rules, expected, strict=True):
        for backend in HOST_BACKENDS:
            p = torch.zeros(5, dtype=dtype, requires_grad=True)
            optimizer = FusedEvolvedOptimizer([p], genome, total_steps=5, backend=backend)
            p.grad = x.clone()
            optimizer.step()
            torch.testing.assert_close(
                -p.detach(), torch.tensor(values, dtype=dtype), rtol=1e-7, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_gradients_show(backend, bad):
    for seed in range(40):
        genome = random_genome(seed)
        start, gradients = case(seed, torch.float32)
        for i in (2, 3, 4, 5):
            gradients[1][i].view(-1)[::5] = bad
        parameters = [p.clone().requires_grad_() for p in start]
        train(genome, parameters, gradients[:3], backend)
        gradients = [flat(step) for step in gradients[:3]]
        exact, _, _ = exact_steps(genome, flat(start), gradients, TOTAL_STEPS)
        actual = flat(parameters).numpy()
        # an infinite sum may come out as NaN or infinite, depending on the order of its terms
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), genome
        if np.isnan(bad):
            assert np.array_equal(np.isnan(actual), np.isnan(exact)), genome


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_a_term_that_is_not_there_adds_nothing(backend):
    sign = Genome(term_types=[Term.SIGN_GRAD], wd_log10=float("-inf"), lr_log10=-1)
    p = torch.tensor([1.0, 1.0, float("-inf")], requires_grad=True)
    train(sign, [p], [[torch.tensor([float("inf"), -2.0, 0.0])]], backend)
    # 0 * inf of the gradient term that the cover kernel has too, and 0 * -inf of the decay
    assert torch.equal(p.detach(), torch.tensor([0.9, 1.1, float("-inf")]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("genome", [zoo.evolved_2025, zoo.sgd_momentum, zoo.rmsprop])
def test_any_layout_gives_the_contiguous_result(backend, dtype, genome):
    guarded, cases = layouts(dtype)
    guard = guarded == 7.0
    for name, (parameter, gradient) in cases.items():
        contiguous = parameter.clone(memory_format=torch.contiguous_format).requires_grad_()
        train(genome, [contiguous], [[gradient.contiguous()]] * 3, backend)
        train(genome, [parameter.requires_grad_()], [[gradient]] * 3, backend)
        assert torch.equal(parameter.detach(), contiguous.detach()), name
    assert (guarded.detach()[guard] == 7.0).all(), "a neighbour was written to"


def test_gradient_layout_may_change_between_steps():
    start, g = torch.randn(40, 30), torch.randn(40, 30)
    contiguous, changing = start.clone().requires_grad_(), start.clone().requires_grad_()
    train(zoo.adam, [contiguous], [[g]] * 4, "cpu")
    other = g.t().contiguous().t()
    train(zoo.adam, [changing], [[g], [other], [g], [other]], "cpu")
    assert torch.equal(contiguous, changing)


def test_a_failed_step_leaves_no_layout_behind():
    start, g = torch.randn(2, 40, 30), torch.randn(40, 30)
    expected = [p.clone().requires_grad_() for p in start]
    train(zoo.adam, expected, [[g, g]] * 2, "cpu")

    parameters = [p.clone().requires_grad_() for p in start]
    optimizer = train(zoo.adam, parameters, [[g, g]], "cpu")
    parameters[0].grad = g.t().contiguous().t()
    parameters[1].grad = (
        torch.complex(g, g).conj().imag
    )  # turned down after the first was looked at
    with pytest.raises(OptimizerError, match="negated"):
        optimizer.step()
    for parameter in parameters:
        parameter.grad = g
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_the_result_does_not_depend_on_the_number_of_threads():
    sizes = [1, 63, 4097, 70_001, 131_072, 5]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            parameters = [torch.randn(n, requires_grad=True) for n in sizes]
            gradients = [[torch.randn(n) for n in sizes] for _ in range(3)]
            train(zoo.evolved_2025, parameters, gradients, "cpu")
            results.append(flat(parameters))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86-64's")
@pytest.mark.parametrize(
    "stored", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]
)
def test_the_result_does_not_depend_on_the_instruction_set(stored, tmp_path):
    """The same source built for each instruction set alone, against the library's choice."""
    dtype, state = (getattr(torch, name) for name in stored)
    source = tmp_path / "covers.c"
    source.write_text(render_covers(*stored))
    flags = [*C_FLAGS, "-shared", "-fPIC", "-DEVK_ONE_INSTRUCTION_SET", f"-I{CSRC}"]
    built = [native.library()]
    for level in ("x86-64", "x86-64-v3", "x86-64-v4"):
        if level <= native.instruction_set():
            library = tmp_path / f"{level}.so"
            command = ["cc", *flags, f"-march={level}", source, "-o", library, "-lm"]
            subprocess.run(command, check=True)
            built.append(ctypes.CDLL(str(library)))
    generator = torch.Generator().manual_seed(0)
    start = [torch.rand(1003, generator=generator).sub(0.5).to(dtype) for _ in range(2)]
    start += [torch.rand(1003, generator=generator).to(state) for _ in range(2)]
    for cover in COVERS:
        if not cover.program.state and state != ARITHMETIC[dtype]:
            continue
        scalars = (ctypes.c_double * len(cover.program.scalars))(
            *torch.rand(len(cover.program.scalars), generator=generator).tolist()
        )
        results = []
        for library in built:
            tensors = [tensor.clone() for tensor in start]
            addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
            library[cover_symbol(cover, *stored)](addresses, ctypes.c_int64(1003), scalars)
            results.append(flat([tensor.double() for tensor in tensors]))
        assert not torch.equal(results[0], flat([tensor.double() for tensor in start]))
        assert all(torch.equal(result, results[0]) for result in results), cover.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_loads_and_stores_exactly(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    nothing = Genome(term_types=[Term.GRAD], wd_log10=float("-inf"))
    kept = every.clone().requires_grad_()
    train(nothing, [kept], [[torch.zeros_like(every)]], "cpu")
    nan = every.isnan()
    assert torch.equal(kept.detach()[~nan].view(torch.int16), every[~nan].view(torch.int16))
    assert kept.detach()[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lr_log10", [-5.0, -3.3, -1.0, -0.1, 2.0])
def test_16_bit_stores_round_as_torch_does(dtype, lr_log10):
    # 0 - lr * g reaches subnormal values, ties and overflow
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    genome = Genome(term_types=[Term.GRAD], wd_log10=float("-inf"), lr_log10=lr_log10)
    p = torch.zeros_like(every).requires_grad_()
    train(genome, [p], [[every]], "cpu")
    expected = (0 - torch.tensor(genome.lr, dtype=torch.float32) * every.float()).to(dtype)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0, equal_nan=True)


def test_kernels_stay_inside_their_range():
    """Called directly on the middle of poisoned buffers, all covers, dtypes and awkward lengths."""
    for stored in STORED:
        dtype, moment = (getattr(torch, name) for name in stored)
        for cover in COVERS:
            name = cover_symbol(cover, *stored)
            kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(
                native.kernel_address(name)
            )
            scalars = (ctypes.c_double * len(cover.program.scalars))(
                *(0.5 for _ in cover.program.scalars)
            )
            for n in (0, 1, 15, 63, 130):
                buffers = [
                    torch.full((n + 128,), 3.0, dtype=d) for d in (dtype,) * 2 + (moment,) * 2
                ]
                inner = [b[64 : 64 + n] for b in buffers]
                kernel((ctypes.c_void_p * 4)(*(b.data_ptr() for b in inner)), n, scalars)
                for i, buffer in enumerate(buffers):
                    assert (buffer[:64] == 3.0).all(), (name, n, i)
                    assert (buffer[64 + n :] == 3.0).all(), (name, n, i)
                if n:
                    assert (inner[0] != 3.0).all(), (name, n)
                    assert (inner[1] == 3.0).all(), (name, n)
                    written = ("m" in cover.program.state, "v" in cover.program.state)
                    assert ((inner[2] != 3.0).all(), (inner[3] != 3.0).all()) == written


@pytest.mark.parametrize("stored", STORED, ids="-".join)
def test_own_kernels_stay_inside_their_range(stored):
    dtype, moment = (getattr(torch, name) for name in stored)
    program = lower(FULL).program
    kernels = own_kernels(program, *stored)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(
        kernels.direct
    )
    scalars = (ctypes.c_double * len(program.scalars))(*[0.5] * len(program.scalars))
    for n in (0, 1, 15, 63, 130):
        buffers = [torch.full((n + 128,), 3.0, dtype=d) for d in (dtype,) * 2 + (moment,) * 6]
        inner = [b[64 : 64 + n] for b in buffers]
        kernel((ctypes.c_void_p * 8)(*(b.data_ptr() for b in inner)), n, scalars)
        for i, buffer in enumerate(buffers):
            assert (buffer[:64] == 3.0).all(), (n, i)
            assert (buffer[64 + n :] == 3.0).all(), (n, i)
            assert ((inner[i] == 3.0) == (i == 1)).all(), (n, i)


def test_a_mutation_of_a_number_needs_no_other_kernel():
    programs = {
        lower(
            Genome(
                term_types=[3, 4], alphas=[1.0 + i, 2.0], lr_log10=-3 + i / 10, beta1=0.5 + i / 100
            )
        ).program
        for i in range(20)
    }
    assert len(programs) == 1


@pytest.mark.parametrize("seed", range(40))
def test_every_rule_of_the_catalogue_has_a_cover(seed):
    for genome in (random_genome(seed * 50 + i) for i in range(50)):
        cover = find_cover(lower(genome).program)
        assert cover is not None, genome
        assert set(cover.program.state) == set(lower(genome).program.state)


@pytest.mark.parametrize(
    ("make", "dense", "overlapping"),
    [
        (lambda: torch.zeros(3, 4), True, False),
        (lambda: torch.zeros(()), True, False),
        (lambda: torch.zeros(0, 4), True, False),
        (lambda: torch.zeros(3, 4).t(), True, False),
        (lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True, False),
        (lambda: torch.zeros(3, 8)[:, :4], False, False),
        (lambda: torch.zeros(1, 4).expand(3, 4), False, True),
        (lambda: torch.zeros(10).as_strided((4, 4), (2, 1)), False, True),
        (lambda: torch.zeros(10).as_strided((4, 3), (1, 1)), False, True),
        (lambda: torch.zeros(0).expand(3, 0), True, False),
    ],
)
def test_layout_questions(make, dense, overlapping):
    tensor = make()
    if tensor.numel():
        assert lies_densely(tensor) == dense
    assert overlaps_itself(tensor) == overlapping


@pytest.mark.parametrize(
    ("make", "overlap"),
    [
        (lambda x: [x[:50], x[50:]], False),
        (lambda x: [x[:51], x[50:]], True),
        (lambda x: [x, x[50:51]], True),
        (lambda x: [x.view(10, 10)[:, :5], x.view(10, 10)[:, 5:]], False),
        (lambda x: [x.view(10, 10)[:, :6], x.view(10, 10)[:, 5:]], True),
        (lambda x: [x[::2], x[1::2], x[:0]], False),
        (lambda x: [x[::2], x[::3]], True),
    ],
)
def test_tensors_that_share_memory_are_found(make, overlap):
    assert (find_overlap(make(torch.zeros(100))) is not None) == overlap


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(1),
        torch.ones(1000, dtype=torch.float64),
        torch.complex(torch.zeros(1000), torch.ones(1000)).conj().imag,
    ],
    ids=["shape", "dtype", "negated"],
)
def test_a_gradient_of_another_kind_is_an_error_before_anything_is_touched(gradient):
    parameter = torch.ones(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    optimizer = FusedEvolvedOptimizer([parameter], zoo.adam, backend="cpu")
    optimizer.step()
    before = parameter.detach().clone()
    if gradient.is_neg():
        parameter.grad = gradient
    else:
        parameter.grad.data = gradient
    with pytest.raises(OptimizerError, match="gradient"):
        optimizer.step()
    assert torch.equal(parameter.detach(), before)
    assert optimizer.state[parameter]["step"] == 1
