"""The table of cases for backends that compute a step on the device, whichever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import layouts
from eager import eager_update
from oracle import SHAPES, assert_near, eager_steps, exact_steps, random_genome

from evokernels import Genome, Term, zoo
from evokernels.compiler.evaluate import reference_step
from evokernels.compiler.lower import lower
from evokernels.compiler.schedule import learning_rate_factor, schedule_lengths
from evokernels.compiler.terms import GROUP_INPUTS, genome_scalars, log_of
from evokernels.errors import OptimizerError
from evokernels.kernels.device import DeviceBackend, DevicePlan, Scaling
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers, Rounding
from evokernels.kernels.registry import BACKENDS
from evokernels.kernels.rounding import random_bits

TOTAL_STEPS = 7
PLAIN = {"wd_log10": -math.inf, "lr_log10": 0}
SIGN = Genome(term_types=[Term.SIGN_GRAD], **PLAIN)
MOMENTUM = Genome(term_types=[Term.MOMENTUM], beta1=0.0, **PLAIN)  # m is the gradient itself
BOTH = Genome(
    term_types=["MOMENTUM", "RMS_NORM"], alphas=[1.0, 1.0], beta1=0.5, beta2=0.75, **PLAIN
)


class Model:
    """Tensors bound to a device plan, and what a step of them takes.

    Args:
        genomes: one for each group.
        parameters: they change in place.
        groups: for each parameter its group.
        state: the dtype of moments, that of the arithmetic unless given.
        total: length of the cosine.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        genomes: Sequence[Genome],
        parameters: Sequence[torch.Tensor],
        groups: Sequence[int] | None = None,
        state: torch.dtype | None = None,
        rounding: Rounding | None = None,
        total: int = TOTAL_STEPS,
    ) -> None:
        self.genomes, self.total = genomes, total
        self.groups = groups or [0] * len(parameters)
        self.tensors = [
            bound(genomes[group], parameter, state, rounding)
            for group, parameter in zip(self.groups, parameters, strict=True)
        ]
        self.counts = torch.zeros(len(parameters), dtype=torch.float64)
        self._backend = backend
        self._plan: DevicePlan | None = None

    @property
    def plan(self) -> DevicePlan:
        """Made when it is first used: until then moments may be replaced."""
        if self._plan is None:
            rules = [lower(genome) for genome in self.genomes]
            self._plan = DevicePlan(self._backend, self.tensors, self.groups, rules, self.counts)
        return self._plan

    def step(self, gradients, scaling=Scaling(), lr=None, direction=1.0):  # noqa: B008
        values = [hyperparameters(g, self.total, lr, direction) for g in self.genomes]
        self.plan.run(gradients, values, scaling)

    def everything(self):
        return [t for tensor in self.tensors for t in everything(tensor)]


def hyperparameters(genome, total=None, lr=None, direction=1.0):
    """The values of GROUP_INPUTS."""
    values = {
        "base_lr": genome.lr if lr is None else lr,
        "weight_decay": genome.weight_decay,
        "beta1": genome.beta1,
        "beta2": genome.beta2,
        "log_beta1": log_of(genome.beta1),
        "log_beta2": log_of(genome.beta2),
        "eps": genome.eps,
        "clip": genome.clip_value,
        "direction": direction,
        **schedule_lengths(genome, total),
    }
    return [values[symbol.name] for symbol in GROUP_INPUTS]


def bound(genome, parameter, state=None, rounding=None):
    program = lower(genome).program
    moments = {
        name: torch.zeros_like(parameter, dtype=state or ARITHMETIC[parameter.dtype])
        for name in program.state
    }
    return BoundTensor(program, parameter, moments, rounding)


def everything(tensor):
    return [tensor.parameter, *tensor.moments.values()]


def host_steps(backend, model, gradients, **changes):
    """The same steps as `Model.step` takes, by a backend of the registry; a model of one genome."""
    (genome,) = model.genomes
    plan = BACKENDS[backend].bind(model.tensors)
    rule = lower(genome)
    for t, row in enumerate(gradients, start=1):
        factor = learning_rate_factor(genome, t - 1, model.total)
        values = rule.numbers(**{**genome_scalars(genome, t, factor), **changes})
        plan.run(row, [0] * len(row), [Numbers(rule.program, values, t)])


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def guarded(n, dtype, offset):
    """Memory with guards, and the n elements in its middle that may change."""
    memory = torch.full((n + 128 + offset,), 7.0, dtype=dtype)
    return memory, memory[64 + offset : 64 + offset + n]


def unharmed(memory, inner):
    outside = torch.ones(len(memory), dtype=torch.bool)
    start = inner.storage_offset()
    outside[start : start + len(inner)] = False
    return bool((memory[outside] == 7).all())


# against the definition


def check_random_genomes(backend, dtype, seeds):
    """All shapes, five steps; all genomes in one launch."""
    genomes = [random_genome(seed) for seed in seeds]
    starts, gradients = zip(*(_case(seed, dtype) for seed in seeds), strict=True)
    parameters = [p.clone() for start in starts for p in start]
    groups = [group for group, start in enumerate(starts) for _ in start]
    model = Model(backend, genomes, parameters, groups)
    for t in range(5):
        model.step([g for steps in gradients for g in steps[t]])
    assert len(model.plan.launches) == 1
    assert model.counts.tolist() == [5.0] * len(parameters)
    for i, (seed, genome) in enumerate(zip(seeds, genomes, strict=True)):
        own = model.tensors[i * len(SHAPES) : (i + 1) * len(SHAPES)]
        rows = [flat(step) for step in gradients[i]]
        exact = exact_steps(genome, flat(starts[i]), rows, TOTAL_STEPS)
        yardstick = eager_steps(genome, flat(starts[i]), rows, TOTAL_STEPS)
        what = f"genome {seed}: {genome}"
        assert_near(flat([b.parameter for b in own]), exact[0], yardstick[0], dtype, what)
        for name, moment in (("m", 1), ("v", 2)):
            if name in own[0].moments:
                kept = flat([b.moments[name] for b in own])
                assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)


def check_formats(backend, dtype, state, seeds):
    """Moments of every format, four steps from what was stored."""
    arithmetic = ARITHMETIC[dtype]
    for seed in seeds:
        genome = random_genome(seed)
        shape = (1500,)
        model = Model(backend, [genome], [random(shape, dtype, seed)], state=state)
        (tensor,) = model.tensors
        exact = [x.numpy() for x in (tensor.parameter.double(), *torch.zeros(2, *shape).double())]
        yardstick = [tensor.parameter.clone(), *torch.zeros(2, *shape, dtype=state)]
        for t in range(1, 5):
            g = random(shape, dtype, 1000 * t + seed)
            model.step([g])
            factor = learning_rate_factor(genome, t - 1, TOTAL_STEPS)
            exact = reference_step(genome, exact[0], g.double().numpy(), *exact[1:], t, factor)
            computed = [x.to(arithmetic) for x in yardstick]
            lr = genome.lr * factor
            eager_update(genome, computed[0], g.to(arithmetic), *computed[1:], t, lr)
            for stored, value in zip(yardstick, computed, strict=True):
                stored.copy_(value)
        for name, i in (("p", 0), ("m", 1), ("v", 2)):
            actual = tensor.parameter if name == "p" else tensor.moments.get(name)
            if actual is not None:
                assert_near(actual, exact[i], yardstick[i], actual.dtype, f"{seed} {name}")


def check_not_finite(backend, bad, seeds):
    for seed in seeds:
        genome = random_genome(seed)
        start, gradients = _case(seed, torch.float32)
        for i in (2, 3, 4, 5):
            gradients[1][i].view(-1)[::5] = bad
        parameters = [p.clone() for p in start]
        model = Model(backend, [genome], parameters)
        for row in gradients[:3]:
            model.step(row)
        rows = [flat(step) for step in gradients[:3]]
        exact, _, _ = exact_steps(genome, flat(start), rows, TOTAL_STEPS)
        actual = flat(parameters).numpy()
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), genome
        if np.isnan(bad):
            assert np.array_equal(np.isnan(actual), np.isnan(exact)), genome


def check_absent_terms(backend):
    sign = Genome(term_types=[Term.SIGN_GRAD], wd_log10=-math.inf, lr_log10=-1)
    p = torch.tensor([1.0, 1.0, -math.inf])
    Model(backend, [sign], [p]).step([torch.tensor([math.inf, -2.0, 0.0])])
    # 0 * inf of the gradient term that the cover kernel has too, and 0 * -inf of the decay
    assert torch.equal(p, torch.tensor([0.9, 1.1, -math.inf]))


STEPS = [1, 2, 10, 99, 100, 101, 1000, 10**6]
SCHEDULED = {
    "warmup": Genome(term_types=["GRAD"], use_warmup=True, warmup_steps=100, **PLAIN),
    "cosine": Genome(term_types=["GRAD"], use_cosine_decay=True, **PLAIN),
    "both": Genome(
        term_types=["GRAD"], use_warmup=True, warmup_steps=10, use_cosine_decay=True, **PLAIN
    ),
    "bias1": Genome(
        term_types=["MOMENTUM"], use_bias_correction=True, beta1=0.9, beta2=0.5, **PLAIN
    ),
    "slow bias1": Genome(
        term_types=["MOMENTUM"], use_bias_correction=True, beta1=0.999, beta2=0.5, **PLAIN
    ),
    "bias2": Genome(
        term_types=["RMS_NORM"], use_bias_correction=True, beta2=0.9999, eps_log10=-10, **PLAIN
    ),
}


def check_schedule(backend, name):
    """Each number of the step within a few last digits of the host's, by what it does to zero."""
    genome = SCHEDULED[name]
    for t, total in ((t, total) for t in STEPS for total in (100, 1001, 3 * 10**6)):
        p = torch.zeros(3, dtype=torch.float64)
        model = Model(backend, [genome], [p], total=total)
        model.counts.fill_(t - 1)
        for moment in model.tensors[0].moments.values():
            moment.fill_(0.25)
        g = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
        model.step([g])
        assert model.counts.item() == t
        factor = learning_rate_factor(genome, t - 1, total)
        start = np.zeros(3, np.longdouble)
        inputs = (g.numpy().astype(np.longdouble), start + 0.25, start + 0.25)
        exact = reference_step(genome, start, *inputs, t, factor)[0]
        np.testing.assert_allclose(p.numpy(), exact.astype(float), rtol=2e-15, atol=0)
        if not genome.use_cosine_decay:
            break


# layouts, tails, alignment


def check_layouts(backend, dtype, state, rounding, genomes=(BOTH,)):
    """Every layout of parameter, gradient and moments gives the bits of contiguous ones, with all
    of them in one launch; elements are counted in the order of the parameter."""
    for genome in genomes:
        memory, cases = layouts(dtype)
        guard = memory == 7.0
        names = [
            name
            for name, (parameter, _) in cases.items()
            if not rounding or parameter.is_contiguous() or name.startswith("sliced")
        ]
        parameters = [cases[name][0] for name in names]
        gradients = [cases[name][1] for name in names]
        dense = Model(
            backend,
            [genome],
            [p.clone(memory_format=torch.contiguous_format) for p in parameters],
            state=state,
            rounding=rounding,
        )
        other = Model(backend, [genome], parameters, state=state, rounding=rounding)
        for tensor in other.tensors:  # moments that lie like neither, between guards
            for moment in tensor.moments:
                around = torch.full((2, *tensor.parameter.shape, 3), 5.0, dtype=state)
                around[1, ..., 1] = 0
                tensor.moments[moment] = around[1, ..., 1]
        for _ in range(2):
            dense.step([g.contiguous() for g in gradients])
            other.step(gradients)
        for name, a, b in zip(names, dense.tensors, other.tensors, strict=True):
            assert all(map(same_bits, everything(a), everything(b))), name
            for moment in b.moments.values():
                assert (moment._base[0] == 5).all(), name
                assert (moment._base[1, ..., ::2] == 5).all(), name
        assert (memory[guard] == 7.0).all(), "a neighbour was written to"


# The longest of them only where it is aligned: elements one by one take an interpreter long.
TAILS = [7, 255, 1023, 1024, 1025, 4097]


def check_tails(backend, dtype, state, rounding):
    """Every length and alignment, between guards, against the bits of the native backend."""
    for offset, tails in ((0, TAILS), (1, TAILS[:-1])):
        starts = [random((n,), dtype, n) for n in tails]
        rows = [[random((n,), dtype, 100 * t + n) for n in tails] for t in (1, 2)]
        native = Model(backend, [BOTH], [s.clone() for s in starts], state=state, rounding=rounding)
        host_steps("cpu", native, rows)
        memory, parameters = zip(*(guarded(n, dtype, offset) for n in tails), strict=True)
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.copy_(start)
        model = Model(backend, [BOTH], parameters, state=state, rounding=rounding)
        around = []
        for tensor in model.tensors:
            for name in tensor.moments:
                outer, inner = guarded(tensor.parameter.numel(), state, offset)
                tensor.moments[name] = inner.zero_()
                around.append((outer, inner))
        for row in rows:
            gradients = [guarded(len(g), dtype, offset)[1].copy_(g) for g in row]
            model.step(gradients, Scaling(clear=True))
            assert not any(g.any() for g in gradients)
            assert all(unharmed(g._base, g) for g in gradients)
        assert all(map(unharmed, memory, parameters))
        assert all(unharmed(*pair) for pair in around)
        if ARITHMETIC[dtype] == torch.float32:  # in float64 the numbers may differ in a last digit
            assert all(map(same_bits, model.everything(), native.everything())), offset
        else:
            for a, b in zip(model.everything(), native.everything(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2 if state != dtype else 1e-13, atol=1e-15)


def check_changing_layouts(backend):
    start, g = random((40, 30), torch.float32, 0), random((40, 30), torch.float32, 1)
    contiguous, changing = (Model(backend, [zoo.adam], [start.clone()]) for _ in range(2))
    other = g.t().contiguous().t()
    for gradient in (g, other, g, other):
        contiguous.step([g])
        changing.step([gradient])
    assert torch.equal(contiguous.tensors[0].parameter, changing.tensors[0].parameter)
    with pytest.raises(OptimizerError, match="negated"):
        changing.step([torch.complex(g, g).conj().imag])


# rounding


def check_stochastic_bits(backend, dtype, state):
    """Those of the eager backend, in every layout."""
    cases = layouts(dtype)[1]
    parameters, gradients = zip(*cases.values(), strict=True)
    rounding = Rounding(12345678901234567890, 3)

    def model():
        copies = [torch.empty_like(p).copy_(p) for p in parameters]
        return Model(backend, [BOTH], copies, state=state, rounding=rounding)

    device, host = model(), model()
    for _ in range(2):
        device.step(gradients)
    host_steps("eager", host, [gradients] * 2)
    for name, a, b in zip(cases, device.tensors, host.tensors, strict=True):
        if state == torch.bfloat16:
            assert all(map(same_bits, a.moments.values(), b.moments.values())), name
        if dtype == torch.bfloat16:
            assert same_bits(a.parameter, b.parameter), name


def check_every_random_number_decides(backend):
    """Rounded up exactly where the bits that are cut off and the random ones make a carry."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[:6] = 0x7F7F7FFF, 0x7F7F8000, 0xFF7F8001, 0x7F800000, 0xFF800000, 0x7FC00001
    bits[6:] = np.where((bits[6:] & 0x7FFFFFFF) >= 0x7F7F0000, 0x3F8000FF, bits[6:])
    g = torch.from_numpy(bits.view(np.float32).copy())
    rounding = Rounding(2**64 - 1, 2**32 - 1)
    model = Model(
        backend, [MOMENTUM], [torch.zeros_like(g)], state=torch.bfloat16, rounding=rounding
    )
    model.counts.fill_(2**32 - 2)
    model.step([g])
    (tensor,) = model.tensors
    drawn = random_bits(tensor.parameter, "m", rounding, 2**32 - 1).numpy()
    expected = ((bits.astype(np.int64) + drawn) >> 16).astype(np.uint16)
    expected[:6] = 0x7F7F, 0x7F80, 0xFF80, 0x7F80, 0xFF80, 0x7FC0
    stored = tensor.moments["m"].view(torch.int16).numpy().view(np.uint16)
    # -0 becomes 0 in 0 * m + g
    assert np.array_equal(stored[bits != 0x80000000], expected[bits != 0x80000000])


def check_moments_are_rounded_once(backend, dtype):
    """To the nearest bfloat16, the even one of two, whatever the arithmetic."""
    every = np.arange(2**16, dtype=np.uint32)
    finite = every[(every & 0x7FFF) < 0x7F80]
    values = (finite << 16).view(np.float32).astype(np.float64)
    spacing = np.ldexp(1.0, np.maximum(((finite >> 7) & 0xFF).astype(int), 1) - 134)
    away = values + np.copysign(spacing, values)  # where the next one is, or would be
    middle = (values + away) / 2
    last = 2.0 ** (-8 if dtype == torch.float32 else -36) * np.copysign(spacing, values)
    even = np.where(finite & 1, away, values)
    inputs = np.concatenate([values, middle, middle - last, middle + last])
    nearest = np.concatenate([values, even, values, away])
    nearest[np.abs(nearest) >= 2.0**128] = np.copysign(np.inf, nearest)[np.abs(nearest) >= 2.0**128]
    g = torch.from_numpy(inputs).to(dtype)
    model = Model(backend, [MOMENTUM], [torch.zeros_like(g)], state=torch.bfloat16)
    model.step([g])
    assert np.array_equal(model.tensors[0].moments["m"].double().numpy(), nearest)


def check_16_bit_values(backend, dtype):
    """All of them load exactly, and stores round as torch's: subnormals, ties, overflow, NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for lr_log10 in (-3.3, -0.1, 2.0):
        genome = Genome(term_types=[Term.GRAD], wd_log10=-math.inf, lr_log10=lr_log10)
        p = torch.zeros_like(every)
        Model(backend, [genome], [p]).step([every])
        expected = (0 - torch.tensor(genome.lr, dtype=torch.float32) * every.float()).to(dtype)
        torch.testing.assert_close(p, expected, rtol=0, atol=0, equal_nan=True)
    kept = every.clone()
    genome = Genome(term_types=[Term.GRAD], wd_log10=-math.inf)
    Model(backend, [genome], [kept]).step([torch.zeros_like(every)])
    nan = every.isnan()
    assert same_bits(kept[~nan], every[~nan])
    assert kept[nan].isnan().all()


# what is done to all gradients


def check_missing_gradients(backend):
    """They leave their tensors alone and do not count; empty ones count."""
    parameters = [random((n,), torch.float32, n) for n in (1500, 0, 40, 1500)]
    starts = [p.clone() for p in parameters]
    model = Model(backend, [zoo.adam], parameters)
    present = [random(p.shape, torch.float32, 9) for p in parameters]
    rows = [[present[0], present[1], None, present[3]], [None, None, None, present[3]], [None] * 4]
    for row in rows:
        model.step(row)
    assert model.counts.tolist() == [1, 1, 0, 2]
    assert same_bits(parameters[2], starts[2])
    expected = [Model(backend, [zoo.adam], [starts[i].clone()]) for i in (0, 3)]
    host_steps("cpu", expected[0], [[present[0]]])
    host_steps("cpu", expected[1], [[present[3]]] * 2)
    for model_, i in zip(expected, (0, 3), strict=True):
        assert same_bits(model_.tensors[0].parameter, parameters[i])


def check_scaling(backend, dtype):
    """grad_scale, max_norm and direction are the native backend's factor on the gradient."""
    shapes = [(1100,), (30, 7), (3,)]
    rows = [[random(s, dtype, 10 * t + i) for i, s in enumerate(shapes)] for t in (1, 2)]
    for scale, max_norm, direction in ((8.0, math.inf, 1.0), (0.5, 3.0, -1.0), (None, 0.1, 1.0)):
        starts = [random(s, dtype, i) for i, s in enumerate(shapes)]
        device, host = (Model(backend, [zoo.evolved_2025], [s.clone() for s in starts], total=7)
                        for _ in range(2))  # fmt: skip
        grad_scale = None if scale is None else torch.tensor([scale])
        for t, row in enumerate(rows, start=1):
            squares = device.plan.sum_of_squares(row) if max_norm < math.inf else None
            exact = math.fsum(float(x) ** 2 for g in row for x in g.flatten())
            scaling = Scaling(grad_scale=grad_scale, max_norm=max_norm, squares=squares)
            device.step(row, scaling, direction=direction)
            unscale = 1 / (scale or 1.0)
            factor = direction * unscale * min(1.0, max_norm / (math.sqrt(exact) * unscale + 1e-6))
            plan, rule = BACKENDS["cpu"].bind(host.tensors), lower(zoo.evolved_2025)
            lr = learning_rate_factor(zoo.evolved_2025, t - 1, 7)
            scalars = {**genome_scalars(zoo.evolved_2025, t, lr), "gradient_factor": factor}
            plan.run(row, [0] * 3, [Numbers(rule.program, rule.numbers(**scalars), t)])
        for a, b in zip(device.everything(), host.everything(), strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


def check_found_inf(backend, dtype):
    """Nothing is updated or counted; gradients are cleared all the same."""
    found, none = torch.ones(1), torch.zeros(1)
    model = Model(backend, [BOTH], [random((n,), dtype, n) for n in (1500, 7)])
    before = [t.clone() for t in model.everything()]
    gradients = [random((n, 2), dtype, n)[:, n % 2] for n in (1500, 7)]
    model.step(gradients, Scaling(found_inf=found))
    assert all(g.any() for g in gradients)
    model.step(gradients, Scaling(found_inf=found, clear=True))
    assert not any(g.any() for g in gradients)
    assert all(g._base[:, 1 - n % 2].all() for n, g in zip((1500, 7), gradients, strict=True))
    assert all(map(same_bits, model.everything(), before))
    assert model.counts.tolist() == [0, 0]
    model.step([random((n,), dtype, n) for n in (1500, 7)], Scaling(found_inf=none))
    assert model.counts.tolist() == [1, 1]
    assert not any(map(same_bits, model.everything(), before))


def check_learning_rate_on_the_device(backend):
    """float32 or float64, read when the step is taken, for each group its own."""
    genome = Genome(term_types=["GRAD"], **PLAIN)
    parameters = [torch.zeros(5, dtype=torch.float64) for _ in range(3)]
    model = Model(backend, [genome] * 3, parameters, [0, 1, 2])
    rates = [torch.tensor(0.1, dtype=torch.float32), torch.tensor(0.1, dtype=torch.float64), 0.25]
    ones = [torch.ones(5, dtype=torch.float64) for _ in range(3)]
    model.plan.run(ones, [hyperparameters(genome, lr=rate) for rate in rates], Scaling())
    rates[0].fill_(3.0)
    rates[1].fill_(-2.0)
    model.plan.run(ones, [hyperparameters(genome, lr=rate) for rate in rates], Scaling())
    first = [float(torch.tensor(0.1, dtype=torch.float32)), 0.1, 0.25]
    for parameter, a, b in zip(parameters, first, (3.0, -2.0, 0.25), strict=True):
        assert (parameter == -a - b).all()


def check_clear(backend, dtype):
    """Cleared gradients are zero and nothing else is."""
    _, cases = layouts(dtype)
    for name, (parameter, gradient) in cases.items():
        tensors = [torch.empty_like(parameter).copy_(parameter) for _ in range(2)]
        models = [Model(backend, [zoo.adam], [tensor]) for tensor in tensors]
        models[0].step([gradient.clone()])
        size = gradient.untyped_storage().nbytes() // gradient.element_size()
        surroundings = torch.as_strided(gradient, (size,), (1,), 0)
        expected = surroundings.clone()
        torch.as_strided(
            expected, gradient.shape, gradient.stride(), gradient.storage_offset()
        ).zero_()
        models[1].step([gradient], Scaling(clear=True))
        assert torch.equal(surroundings, expected), name
        assert all(map(same_bits, models[0].everything(), models[1].everything())), name


SHARED = [
    lambda g: [g[:2000], g[:2000]],
    lambda g: [g[:2000], g[1000:3000]],
    lambda g: [g[1000:3000], g[:2000]],
    lambda g: [g[:4000:2], g[1:4001:2]],
    lambda g: [g[:1].expand(2500), None, g[1:2].expand(2500), g[2:2]],
]


def check_clear_shared(backend, share):
    """Gradients that share memory are cleared when all are read."""
    memory = random((5000,), torch.float32, 0)
    results = []
    for clear in (False, True):
        gradients = share(memory)
        parameters = [torch.zeros((100,) if g is None else g.shape) for g in gradients]
        Model(backend, [SIGN], parameters).step(gradients, Scaling(clear=clear))
        results.append(parameters)
    assert all(map(torch.equal, *results))
    assert not any(g is not None and g.any() for g in gradients)


def check_sum_of_squares(backend, dtype):
    gradients = [random(shape, dtype, i) for i, shape in enumerate(SHAPES)]
    gradients += [gradient for _, gradient in layouts(dtype)[1].values()]
    gradients.append(random((2100,), dtype, 77)[3:] * 1e-3)
    model = Model(backend, [SIGN], [torch.zeros_like(g) for g in gradients])
    squares = model.plan.sum_of_squares
    exact = sum(math.fsum((g.double() ** 2).flatten().tolist()) for g in gradients)
    assert float(squares(gradients)) == pytest.approx(exact, rel=1e-14)
    assert float(squares(gradients)) == float(squares(gradients))
    without = [None if i % 2 else g for i, g in enumerate(gradients)]
    exact = sum(math.fsum((g.double() ** 2).flatten().tolist()) for g in without if g is not None)
    assert float(squares(without)) == pytest.approx(exact, rel=1e-14)
    assert float(squares([None] * len(gradients))) == 0
    for bad in (math.inf, -math.inf, math.nan):
        gradients[4] = gradients[4].clone()
        gradients[4][777] = bad
        assert str(float(squares(gradients))) == str(abs(bad))
    assert model.counts.tolist() == [0] * len(gradients)


# launches


def check_one_launch(backend):
    """Genomes, dtypes, moments and counts of all sorts together, against each alone."""
    kinds = [
        (zoo.evolved_2025, torch.float32, torch.float32, None),
        (zoo.adam, torch.bfloat16, torch.bfloat16, Rounding(5, 0)),
        (SIGN, torch.float16, torch.float32, None),
        (zoo.evolved_2025, torch.float64, torch.bfloat16, None),
        (zoo.sgd_momentum, torch.bfloat16, torch.float32, Rounding(5, 1)),
        (zoo.rmsprop, torch.float32, torch.bfloat16, None),
        (zoo.adam, torch.bfloat16, torch.bfloat16, None),
    ]

    def tensor(i):
        genome, dtype, state, rounding = kinds[i]
        return bound(genome, random((1030 + i,), dtype, i), state, rounding)

    count = len(kinds)
    together = Model(backend, [k[0] for k in kinds], [], [])
    together.groups = [*range(count), *range(count)]
    together.tensors = [tensor(i) for i in together.groups]
    together.counts = torch.tensor([3.0 * (i >= count) for i in range(2 * count)]).double()
    alone = []
    for place, i in enumerate(together.groups):
        model = Model(backend, [kinds[i][0]], [])
        model.groups, model.tensors = [0], [tensor(i)]
        model.counts = together.counts[place : place + 1].clone()
        alone.append(model)
    for t in (1, 2):
        gradients = [random((1030 + i,), kinds[i][1], 50 * t + i) for i in together.groups]
        together.step(gradients)
        for model, gradient in zip(alone, gradients, strict=True):
            model.step([gradient])
    assert len(together.plan.launches) == 1
    for a, b in zip(together.tensors, alone, strict=True):
        assert all(map(same_bits, everything(a), b.everything()))
    assert together.counts.tolist() == [2.0] * count + [5.0] * count


def check_counts(backend):
    """Tensors of one group in different steps, side by side."""
    counts = [0.0, 5.0, 5.0, 2.0, 0.0, 99.0, 98.0, 7.0]
    starts = [random((9 + i,), torch.float32, i) for i in range(len(counts))]
    gradients = [random((9 + i,), torch.float32, 50 + i) for i in range(len(counts))]
    together = Model(backend, [zoo.evolved_2025], [s.clone() for s in starts])
    together.counts.copy_(torch.tensor(counts))
    together.step(gradients)
    assert together.counts.tolist() == [c + 1 for c in counts]
    for count, start, gradient, tensor in zip(
        counts, starts, gradients, together.tensors, strict=True
    ):
        alone = Model(backend, [zoo.evolved_2025], [start])
        alone.counts.fill_(count)
        alone.step([gradient])
        assert all(map(same_bits, alone.everything(), everything(tensor))), count


def check_counts_set_back(backend):
    """A step that was taken before, as after loading a state, is computed again."""
    genome = Genome(term_types=["GRAD"], **PLAIN)
    p, ones = torch.zeros(5), torch.ones(5)
    model = Model(backend, [genome], [p])
    for lr in (1.0, 2.0, 4.0):
        model.counts.zero_()
        model.step([ones], lr=lr)
    assert (p == -7).all()


def check_several_launches(backend):
    """Where a launch cannot take all addresses."""

    class Narrow:
        def __init__(self):
            self.most_words = 32

        def __getattr__(self, name):
            return getattr(backend, name)

    shapes = [(1030,), (3,), (0,), (40, 40), (1,), (7,)]
    gradients = [random(s, torch.float32, 10 + i) for i, s in enumerate(shapes)]
    models = [
        Model(b, [zoo.adam], [random(s, torch.float32, i) for i, s in enumerate(shapes)])
        for b in (backend, Narrow())
    ]
    for model in models:
        squares = model.plan.sum_of_squares(gradients)
        model.step(gradients, Scaling(max_norm=2.0, squares=squares))
    assert [len(model.plan.launches) for model in models] == [1, 2]
    torch.testing.assert_close(*(flat(model.everything()) for model in models))
    assert torch.equal(*(model.counts for model in models))


def _case(seed, dtype):
    """Parameters of all shapes and gradients for five steps."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(scale):
        return [torch.randn(s, generator=generator).mul(scale).to(dtype) for s in SHAPES]

    scale = 10 ** float(torch.rand((), generator=generator) * 4 - 3)
    return tensors(1.0), [tensors(scale) for _ in range(5)]
