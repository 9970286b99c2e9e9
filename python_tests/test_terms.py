"""Terms of a user's own and the wide catalogue: what they mean, and what is turned down."""

import dataclasses
import fractions
import io
import json
import math
import pathlib
import pickle
import random
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_near, eager_formulas, exact_update, precise
from own_rules import FORMULAS

from evokernels import FusedEvolvedOptimizer, Genome, Term, genome, terms, zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.describe import formula
from evokernels.compiler.evaluate import reference_update, run_program
from evokernels.compiler.expr import Average, Constant
from evokernels.compiler.linear import linear
from evokernels.compiler.lower import kept_average, lower
from evokernels.compiler.terms import CATALOGUE, genome_scalars
from evokernels.errors import (
    GenomeError,
    JournalError,
    OptimizerError,
    SettingsError,
    TermError,
    TermWarning,
)
from evokernels.evolution import report, run
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions
from evokernels.genome import CATALOGUES, find_term
from evokernels.kernels.plan import ARITHMETIC
from evokernels.search import operators
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.terms import (
    average,
    beta1,
    beta2,
    beta3,
    clip,
    eps,
    exp,
    g,
    log1p,
    m,
    m_before,
    m_hat,
    maximum,
    minimum,
    p,
    progress,
    register,
    sign,
    sqrt,
    tanh,
    v,
    v_hat,
    where,
)

QUICK = RunSettings(
    search=GeneticConfig(population=4, generations=2, elites=1, tournament=2),
    tasks=("fashion_mnist_mini",),
    seeds=(0,),
    conditions=Conditions(
        steps=5, batch_size=16, train_samples=None, validation_samples=100, hurdle=False
    ),
    comparison_seeds=1,
    threads=1,
)
WIDE = CATALOGUES["wide"][len(CATALOGUES["classic"]) :]


@pytest.fixture(autouse=True)
def _no_terms_are_left(monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})


# In the second step: m = 0.3 and v = 0.4 are corrected, betas 0.5, 0.75 and 0.8; m_before = 0.2.
BEFORE = {"p": 2.0, "g": -0.5, "m": 0.2, "v": 0.3}
M, V, EPS = 0.5 * 0.2 + 0.5 * -0.5, 0.75 * 0.3 + 0.25 * 0.25, 1e-4
M_HAT, V_HAT = M / 0.75, V / 0.4375
PLAIN = {
    **{"lr_log10": 0.0, "beta1": 0.5, "beta2": 0.75, "beta3": 0.8},
    **{"eps_log10": -4.0, "wd_log10": -math.inf},
}

# formula, what it comes to without and with bias correction
BY_HAND = [
    (g, -0.5, -0.5),
    (p * g, -1.0, -1.0),
    (m, M, M_HAT),
    (v, V, V_HAT),
    (m_hat + v_hat, M_HAT + V_HAT, M_HAT + V_HAT),
    (m_before, 0.2, 0.2),
    (g + eps + beta1 - beta2, -0.75 + EPS, -0.75 + EPS),
    (progress * g, -0.1, -0.1),
    (average(g, 0.9), -0.05, -0.05 / 0.19),
    (average(g * g, beta2), 0.0625, 0.0625 / 0.4375),
    (average(g, beta3), -0.1, -0.1 / 0.36),
    (average(g, beta3) + beta3 * m, -0.1 + 0.8 * M, -0.1 / 0.36 + 0.8 * M_HAT),
    (average((g - m) ** 2, beta1), (-0.5 - M) ** 2 / 2, (-0.5 - M) ** 2 / 2 / 0.75),
    (average(m_hat + m_before, 0.9), 0.1 * (M_HAT + 0.2), 0.1 * (M_HAT + 0.2) / 0.19),
    (exp(g), math.exp(-0.5), math.exp(-0.5)),
    (log1p(abs(g)), math.log(1.5), math.log(1.5)),
    (tanh(3 * g), math.tanh(-1.5), math.tanh(-1.5)),
    (minimum(g, -1) + maximum(g, 0.25), -0.75, -0.75),
    (clip(4 * g, -1, 1) + clip(g, -1, 1) + clip(g, 0, 1), -1.5, -1.5),
    (where(g > p, 1, 3) + where(g < p, 10, 20), 13.0, 13.0),
    (where(g > 0, exp(p), m) / sqrt(v), M / math.sqrt(V), M_HAT / math.sqrt(V_HAT)),
    (1 - g / 2 + -p, -0.75, -0.75),
    (g**3, -0.125, -0.125),
    (2.5, 2.5, 2.5),
    # two negative factors under one root
    (sqrt(tanh(progress - 0.8) * g), math.sqrt(math.tanh(-0.6) * -0.5), None),
    (exp(-progress) * g + g / (1 - progress), -0.5 * math.exp(-0.2) - 0.625, None),
]


@pytest.mark.parametrize(("own", "plain", "corrected"), BY_HAND, ids=lambda x: str(x)[:40])
def test_terms_by_hand(own, plain, corrected):
    """The definition and the program, against arithmetic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TermWarning)
        term = register("OWN", own)
    for use_bias_correction, expected in ((False, plain), (True, corrected or plain)):
        rule = Genome([term], [2.0], use_bias_correction=use_bias_correction, **PLAIN)
        tensors = {name: np.array([x]) for name, x in BEFORE.items()}
        new = reference_update(rule, tensors, t=2, training_steps=10)
        assert new["p"][0] == pytest.approx(2.0 - 2 * expected, rel=1e-12)
        program = lower(rule)
        scalars = {**genome_scalars(rule, 2, training_steps=10), "gradient_factor": 1.0}
        numbers = program.numbers(**scalars)
        inputs = {**dict.fromkeys(program.program.inputs, np.zeros(1)), **tensors}
        assert run_program(program.program, inputs, numbers)["p"] == pytest.approx(new["p"])


def random_formula(rng, depth=3):
    """An expression of any kind, of bounded values mostly."""
    if depth == 0 or rng.random() < 0.15:
        leaves = (g, m, v, p, m_hat, v_hat, m_before, eps, beta1, progress, rng.uniform(-2, 2))
        return rng.choice(leaves)

    def part():
        return random_formula(rng, depth - 1)

    def tensor():
        return g + part()

    makers = (
        *(lambda: part() + tensor(), lambda: tensor() - part(), lambda: tensor() * part()),
        *(lambda: part() / (abs(tensor()) + 0.1), lambda: sign(tensor()), lambda: abs(tensor())),
        *(lambda: sqrt(abs(tensor())), lambda: exp(-abs(tensor())), lambda: log1p(abs(tensor()))),
        *(lambda: tanh(tensor()), lambda: clip(tensor(), -1, 0.5), lambda: minimum(tensor(), 0)),
        *(lambda: where(tensor() > part(), part(), tensor()), lambda: maximum(part(), tensor())),
    )
    return rng.choice(makers)()


def random_own_genome(seed):
    """Terms of all catalogues and two of its own, one of which keeps an average."""
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TermWarning)
        beta = rng.choice((beta1, beta2, beta3, rng.uniform(0.1, 0.99)))
        kept = average(g + random_formula(rng), beta)
        own = [
            register(f"OWN{seed}A", g + random_formula(rng)),
            register(f"OWN{seed}B", random_formula(rng) + tanh(kept) / (1 + sqrt(abs(kept)))),
        ]
    count = rng.randint(1, 4)
    return Genome(
        term_types=[rng.choice((*own, *own, *WIDE, *Term)) for _ in range(count)],
        alphas=[rng.choice((0.0, rng.uniform(-2, 2), 1.0)) for _ in range(count)],
        lr_log10=rng.uniform(-3, -1),
        beta1=rng.uniform(0.0, 0.99),
        beta2=rng.uniform(0.5, 0.999),
        beta3=rng.uniform(0.5, 0.999),
        eps_log10=rng.uniform(-8, -2),
        **{
            flag: rng.random() < 0.6
            for flag in ("use_m", "use_v", "use_bias_correction", "use_gradient_clipping")
        },
    )


@pytest.mark.parametrize("seed", range(150))
def test_programs_are_what_the_definition_says(seed, monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    own = random_own_genome(seed)
    rule = lower(own)
    rng = np.random.default_rng(seed)
    exact = {"p": rng.standard_normal(50), "m": np.zeros(50), "v": np.zeros(50)}
    program = dict.fromkeys(rule.program.state, np.zeros(50)) | {"p": exact["p"]}
    for t in range(1, 5):
        exact["g"] = program["g"] = rng.standard_normal(50)
        scalars = {**genome_scalars(own, t, training_steps=6), "gradient_factor": 0.5}
        program |= run_program(rule.program, program, rule.numbers(**scalars))
        exact |= reference_update(own, exact, t, gradient_factor=0.5, training_steps=6)
        np.testing.assert_allclose(program["p"], exact["p"], rtol=1e-9, atol=1e-11)
    kept = {
        str(atom): exact[each]
        for each in exact
        if isinstance(each, Average)
        for atom in linear(kept_average(own, each))
    }
    for operand, name in rule.state_names.items():
        if operand.startswith("a"):
            np.testing.assert_allclose(program[operand], kept[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("term", WIDE)
@pytest.mark.parametrize("use_m", [True, False])
def test_not_a_number_is_never_hidden(term, use_m):
    rule = Genome([term], [1.0], use_m=use_m, **PLAIN)
    tensors = {name: np.array([x]) for name, x in BEFORE.items()} | {"g": np.array([math.nan])}
    assert math.isnan(reference_update(rule, tensors, 2)["p"][0])


def test_the_classic_catalogue_is_unharmed():
    """Keys that stand in journals."""
    assert canonical_key(zoo.evolved_2025) == "87b4bd79077e06c2617e631c0f068222"
    assert canonical_key(zoo.adam) == canonical_key(
        Genome(["ADAM_TERM"], wd_log10=-math.inf, clip_value=2.0)
    )


# Each pair has had one key: where a number stands told nobody of which part it was.
UNLIKE = [
    ((g + v_hat) * v, (g + v_hat) * v_hat, {"use_bias_correction": False}),
    (where(g > 2 * g, g, 2 * g), where(2 * g > g, g, 2 * g), {}),
    (m * (m + 2 * g), 2 * g * (m + 2 * g), {"use_m": False}),
    (maximum(progress, 0.8) * g, 0.8 * g, {}),
    (minimum(1000 * progress, 1) * g, g, {}),
    (tanh(0.5 * g + m), tanh(g + 0.5 * m), {}),
    # with one number for both betas
    (average(g, beta2), average(g, beta3), {"beta2": 0.99}),
]
ALIKE = [
    (2 * g + m, m + g + g, {}),
    (sign(g), CATALOGUE[Term.SIGN_GRAD], {}),
    (tanh(g + 2 * m) * g, tanh(m + g + m) * g, {}),
    (average(0.1 * g * 3, 0.9), average(0.3 * g, 0.9), {}),
    (m_hat * tanh(m_hat), g * tanh(m), {"use_m": False}),
]


@pytest.mark.parametrize(("one", "other", "options"), [*UNLIKE, *ALIKE], ids=str)
def test_equal_rules_have_equal_keys_and_others_have_not(one, other, options):
    keys = set()
    for own in (one, other):
        genome._own_terms.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TermWarning)
            keys.add(canonical_key(Genome([register("X", own)], **options)))
    assert len(keys) == (1 if (one, other, options) in ALIKE else 2)


def test_averages_with_one_text_are_kept_apart():
    rule = Genome([register("X", average(0.1 * g * 3, 0.9) + tanh(average(0.3 * g, 0.9)))])
    names = [*lower(rule).state_names.values()]
    assert names == ["average(0.3 * g, 0.9)", "average(0.3 * g, 0.9)'"]
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = FusedEvolvedOptimizer([parameter], rule, backend="eager")
    optimizer.step()
    assert optimizer.state[parameter].keys() == {"step", *names}


def lion(p, g, state, lr, t):
    """Chen et al. 2023, Algorithm 2."""
    before = state.setdefault("m", torch.zeros_like(p))
    update = torch.sign(0.9 * before + 0.1 * g)
    state["m"] = 0.99 * before + 0.01 * g
    return p - lr * (update + 0.1 * p)


def adabelief(p, g, state, lr, t):
    """Zhuang et al. 2020, Algorithm 2."""
    state["m"] = m = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g
    state["s"] = s = 0.999 * state.get("s", torch.zeros_like(p)) + 0.001 * (g - m) ** 2
    return p - lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)


def cautious_adam(p, g, state, lr, t):
    """Liang et al. 2024, Algorithm 1, without the mean of the mask."""
    state["m"] = m = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g
    state["v"] = v = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * g * g
    update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p - lr * (update * (update * g > 0)) - lr * 0.01 * p


def ademamix(p, g, state, lr, t):
    """Pagliardini et al. 2024, Algorithm 1, with constant alpha = 5 and beta3 = 0.9999."""
    state["m1"] = m1 = 0.9 * state.get("m1", torch.zeros_like(p)) + 0.1 * g
    state["m2"] = m2 = 0.9999 * state.get("m2", torch.zeros_like(p)) + (1 - 0.9999) * g
    state["v"] = v = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * g * g
    update = (m1 / (1 - 0.9**t) + 5 * m2) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p - lr * (update + 0.01 * p)


def ademamix_rule():
    """As docs/terms.md has it: without the flag the slow average stays as it is."""
    register("FAST", m_hat / (sqrt(v_hat) + eps))
    register("SLOW", average(g, beta3) / (sqrt(v_hat) + eps))
    options = {"beta3": 0.9999, "wd_log10": -2.0, "use_bias_correction": False}
    return Genome(["FAST", "SLOW"], [1.0, 5.0], **options)


REFERENCES = {
    "lion": lion,
    "adabelief": adabelief,
    "cautious_adam": cautious_adam,
    "ademamix": ademamix,
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (17, 241)])
def test_the_zoo_equals_reference_implementations(name, dtype, shape):
    rule = ademamix_rule() if name == "ademamix" else zoo.WIDE[name]
    torch.manual_seed(0)
    start, state, exact_state = torch.randn(shape, dtype=dtype), {}, {}
    parameter = torch.nn.Parameter(start.clone())
    optimizer = FusedEvolvedOptimizer([parameter], rule)
    p, exact = start, start.double()
    for t in range(1, 8):
        gradient = torch.randn(shape, dtype=dtype)
        parameter.grad = gradient.clone()
        optimizer.step()
        p = REFERENCES[name](p, gradient, state, rule.lr, t)
        exact = REFERENCES[name](exact, gradient.double(), exact_state, rule.lr, t)
    if dtype == torch.float64:
        torch.testing.assert_close(parameter.detach(), exact, rtol=1e-12, atol=1e-14)
    else:
        assert_near(parameter.detach().flatten(), exact.flatten().numpy(), p.flatten(), dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_optimizers_train_with_own_terms(backend, dtype):
    """Every backend here, by the tolerance rule, state by name."""
    own = register("OWN", progress * average(abs(g), 0.8) * tanh(m))
    rule = Genome([own, "BELIEF"], [1.0, 0.5], lr_log10=-2.0)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(1000).to(dtype))
    optimizer = FusedEvolvedOptimizer([parameter], rule, total_steps=5, backend=backend)
    zeros = torch.zeros(1000, dtype=ARITHMETIC[dtype])
    start = {"p": parameter.detach().clone(), "m": zeros, "v": zeros}
    eager = dict(start)
    exact = {name: precise(tensor) for name, tensor in start.items()}
    for t in range(1, 8):  # progress ends at 1
        gradient = torch.randn(1000).to(dtype)
        parameter.grad = gradient.clone()
        optimizer.step()
        eager = eager_formulas(rule, {**eager, "g": gradient}, t, 5)
        exact = exact_update(rule, {**exact, "g": precise(gradient)}, t, 5)
        if dtype in (torch.bfloat16, torch.float16):  # what was stored is where the next begins
            exact["p"] = precise(parameter.detach())
            eager["p"] = parameter.detach().clone()
    state = optimizer.state[parameter]
    kept = {str(each): each for each in exact if isinstance(each, Average)}
    assert state.keys() == {"step", "exp_avg", *kept}
    for name, each in kept.items():
        assert_near(state[name], exact[each], eager[each], state[name].dtype, name)
    if dtype in (torch.float32, torch.float64):
        assert_near(parameter.detach(), exact["p"], eager["p"], dtype, "p")
    loaded = FusedEvolvedOptimizer([parameter], rule, total_steps=5, backend=backend)
    loaded.load_state_dict(optimizer.state_dict())
    for name, value in state.items():
        assert torch.equal(loaded.state[parameter][name], value)


def test_functions_of_what_fades_away(backend):
    """At the last step nothing is left in the functions; a sum without a term is zero there."""
    rest = 1 - progress
    for i, own in enumerate((tanh(rest * g), sign(rest * g), where(rest * g > rest * m, 1.0, p))):
        rule = Genome([register(f"FADING{i}", own)], lr_log10=0.0, wd_log10=-math.inf)
        parameter = torch.full((3,), 2.0, requires_grad=True)
        optimizer = FusedEvolvedOptimizer([parameter], rule, backend=backend, total_steps=1)
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert parameter.tolist() == [0.0 if i == 2 else 2.0] * 3


def test_terms_that_ask_for_progress_need_the_length_of_the_training():
    rule = Genome([register("LATE", progress * g)])
    with pytest.raises(OptimizerError, match=r"how far the training is; .*total_steps="):
        FusedEvolvedOptimizer([torch.nn.Parameter(torch.ones(3))], rule)


UNFIT = [
    ("A B", g, "a term's name is a word .* got 'A B'"),
    ("", g, "a term's name is a word"),
    (3, g, "a term's name is a word .* got 3"),
    ("MOMENTUM", 2 * m, "MOMENTUM is a built-in term of another formula"),
    ("X", g > 0, r"g > 0 is a comparison, not a number; where\(g > 0, 1, 0\) makes one"),
    ("X", "g", "made of what evokernels.terms has and of numbers, got 'g'"),
    ("X", None, "made of what evokernels.terms has and of numbers, got None"),
    ("X", 10**400, r"10+\.\.\.0+ is beyond all floating-point numbers"),
    ("X", average(math.inf * g, 0.5), "X has a number that is not finite"),
    ("X", 1e200 * g * 1e200, "X has numbers that come to more than 1e"),
    ("X", tanh(g / 1e-320), "X has numbers that come to more than 1e"),
    ("X", average(g, 0.9) + average(g, 0.90000001), "differs from another one in late digits"),
    ("X", True, "made of what evokernels.terms has, got True"),
    ("X", CATALOGUE[Term.GRAD].__class__("h", True) * g, "X reads h; a term may read beta1, "),
]


@pytest.mark.parametrize(("name", "own", "message"), UNFIT)
def test_what_is_no_term_is_turned_down(name, own, message):
    with pytest.raises(TermError, match=message):
        register(name, own)
    assert not terms.registered()
    assert not genome.own_terms()


# What somebody who knows Python, NumPy and torch may write, by what is said of it.
UNWRITABLE = {
    "differs from element to element, .*there is where()": (
        *("bool(g)", "not g", "g and m", "g or m", "m if g else v", "m if g > 0 else v"),
        *("where(g > 0 and m > 0, g, m)", "where(0 < g < 1, g, m)", "where(not g > 0, g, m)"),
        *("max(g, m)", "min(g, 0)", "sorted([g, m])", "np.where(g > 0, g, m)"),
    ),
    "formulas have no >=: where(a >= b, x, y) is where(a < b, y, x)": ("g >= m", "0 <= g"),
    "formulas have no <=: where(a <= b, x, y) is where(a > b, y, x)": ("g <= m", "0 >= g"),
    "formulas have no &: where(a & b, x, y) is where(a, where(b, x, y), y)": (
        *("where((g > 0) & (m > 0), g, m)", "g & 1", "1 & g"),
    ),
    "formulas have no |: where(a | b, x, y) is where(a, x, where(b, x, y))": ("(g > 0) | (m > 0)",),
    "formulas have no ~: where(~a, x, y) is where(a, y, x)": ("~(g > 0)",),
    "formulas have no //: ": ("g // m", "2 // g"),
    "formulas have no %: ": ("g % m", "2 % g"),
    "formulas have no @: ": ("g @ m",),
    "formulas have no ** to a formula: there are exp": ("2 ** g",),
    "powers are whole numbers from 1 to 64, got ": (
        *("g ** 0.5", "g ** -1", "g ** 0", "g ** 2.0", "g ** True", "g ** 65", "g ** m"),
    ),
    "takes a comparison with > or <, such as g > 0, got ": (
        *("where(g, g, m)", "where(g == m, g, m)", "where(g != np.float64(1), g, m)"),
    ),
    "g > m is a comparison, not a number; where(g > m, 1, 0) makes one": (
        *("(g > m) * 2", "2 - (g > m)", "m * (g > m)", "sqrt(g > m)", "where(g > 0, g > m, 0)"),
        *("average(g > m, 0.9)", "minimum(g > m, 0)", "-(g > m)", "abs(g > m)", "(g > m) ** 2"),
    ),
    "Python's ==, != and not decide before there are elements": (
        *("m + (g == m)", "where(g > 0, g != m, 0)", "tanh(g is m)", "True * g"),
    ),
    "of what evokernels.terms has and of numbers, got ": (
        *("g + 'a'", "None * g", "g * 1j", "[1] * g", "sqrt('g')", "tanh(None)", "tanh([g])"),
        *("g * np.array([1, 2])", "np.array([1, 2]) * g", "g * torch.tensor(2.0)", "g > 'a'"),
    ),
    "NumPy's sqrt takes no formulas; evokernels.terms has sign, sqrt,": ("np.sqrt(g)",),
    "NumPy's maximum takes no formulas; ": ("np.maximum(g, 0)", "np.maximum(0, g)"),
    "NumPy's power takes no formulas; ": ("np.float64(2) ** g",),
    "torch's sqrt takes no formulas, nor formulas tensors": ("torch.sqrt(g)",),
    "torch's mul takes no formulas, nor formulas tensors": ("torch.ones(2) * g",),
    "a formula is no number yet, ": ("math.exp(g)", "float(g)", "math.floor(g)"),
    "beta must be beta1, beta2, beta3 or a number between 0 and 1, got ": (
        *("average(g, 0)", "average(g, 1)", "average(g, -0.5)", "average(g, math.nan)"),
        *("average(g, 'beta1')", "average(g, True)", "average(g, eps)", "average(g, m)"),
        *("average(g, np.array([0.9]))", "average(g, torch.tensor(0.9))", "average(g, g > 0)"),
    ),
    "averages of averages are not kept": ("average(average(g, 0.9), 0.9)",),
    "the lower limit before the upper one, got 1 and -1": ("clip(g, 1, -1)",),
}


@pytest.mark.parametrize(
    ("text", "message"), [(text, key) for key, texts in UNWRITABLE.items() for text in texts]
)
def test_what_cannot_be_written_says_what_can(text, message):
    with pytest.raises(TermError, match=".*".join(map(re.escape, message.split(".*")))):
        eval(text)


def test_numbers_of_every_kind_are_numbers():
    half = np.float32(0.5)
    kinds = (half, np.float64(0.5), np.array(0.5), fractions.Fraction(1, 2))
    for x in kinds:
        assert (x * g, x + g, x - g, x / g) == (0.5 * g, 0.5 + g, 0.5 - g, 0.5 / g)
        assert (x > g, x < g) == (g < 0.5, g > 0.5)
        assert g != x
        assert x != g
    assert (g * half, g ** np.int64(2)) == (g * 0.5, g**2)
    assert (sqrt(2), average(g, half)) == (sqrt(Constant(2.0)), average(g, 0.5))
    assert sum([g, m]) == 0 + g + m


def nested(count, step):
    formula = g
    for i in range(count):
        formula = step(formula, i)
    return formula


TOO_LONG = {
    "deep": lambda: nested(65, lambda x, _: tanh(x)),
    "far deeper than Python goes": lambda: nested(9999, lambda x, _: tanh(x)),
    "squared again and again": lambda: nested(60, lambda x, _: x * x),
    "twice at each level": lambda: nested(30, lambda x, _: tanh(x) + x),
    "in an average": lambda: average(nested(65, lambda x, _: abs(x)), 0.9),
}


@pytest.mark.parametrize("formula", TOO_LONG)
def test_formulas_that_are_too_long(formula):
    with pytest.raises(TermError, match=r"is too long: .* 1000 operands, .* nests at most 64 op"):
        register("LONG", TOO_LONG[formula]())


LONG = {
    "64 operations": lambda: nested(64, lambda x, i: tanh(x) if i % 2 else x * m),
    "sums in each other": lambda: nested(32, lambda x, _: abs(x + m)),
    "clipped again and again": lambda: nested(3, lambda x, i: clip(x, -1 - i, 2 + i)),
    # 2^20 products if all were multiplied out
    "sums of step numbers": lambda: nested(20, lambda x, i: x * (1 + exp(-(i + 1) * beta1))),
}


@pytest.mark.parametrize("formula", LONG)
def test_formulas_as_long_as_may_be(formula):
    """Compiled in a moment, and right."""
    began = time.process_time()
    own = Genome([register("LONG", LONG[formula]())], **PLAIN)
    rule = lower(own)
    assert time.process_time() - began < 2
    inputs = {"p": np.ones(3), "g": np.array([-0.5, 1e-3, 2.0]), "m": np.zeros(3), "v": np.zeros(3)}
    program = run_program(rule.program, inputs, rule.numbers(**genome_scalars(own, 1)))
    exact = reference_update(own, inputs, 1)
    np.testing.assert_allclose(program["p"], exact["p"], rtol=1e-9, atol=1e-11)


def test_a_name_stands_for_one_formula():
    term = register("SQUASHED", tanh(g))
    assert register("SQUASHED", tanh(g)) is term
    with pytest.raises(TermError, match=r"SQUASHED is tanh\(g\) already, not tanh\(m\)"):
        register("SQUASHED", tanh(m))
    # a built-in term's own formula is that term, which a search then draws
    assert register("SIGN_MOMENTUM", sign(m)) is Term.SIGN_MOMENTUM
    assert terms.definitions() == ("SQUASHED = tanh(g)", "SIGN_MOMENTUM = sign(m)")


def test_kernels_have_room_for_all_averages():
    for i in range(3):  # and one of the wide catalogue
        register(f"SLOW{i}", average(g, 0.9 + i / 100))
    register("SAME", m * average(g, 0.9))
    with pytest.raises(TermError, match="room for 4 of all terms together, and 4 are taken"):
        register("ONE_MORE", average(g, 0.5))
    everything = Genome(["SLOW0", "SLOW1", "SLOW2", "BELIEF"], [1.0] * 4)
    assert lower(everything).program.state == ("m", "a0", "a1", "a2", "a3")


NOT_FINITE = [
    (g / m, "is nan for g = 0, m = 0"),
    (exp(g), "is inf for g = 10000"),
    (log1p(m), "is -inf for m = -1"),
    (sqrt(v - m * m), "is nan for m = 1, v = 0"),
    (g / (1 - progress), "progress = 1"),
    (sqrt(average(g, 0.5)), "average(g, 0.5) = -1"),
    (g / eps / eps / eps / eps, "is inf for"),
]


@pytest.mark.parametrize(("own", "example"), NOT_FINITE, ids=str)
def test_what_is_not_finite_is_reported(own, example):
    with pytest.warns(TermWarning) as caught:
        register("RISKY", own)
    assert example in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("own", [*CATALOGUE.values(), sqrt(average(abs(g), 0.5)), g**8])
def test_what_is_finite_is_not_reported(own):
    register("SAFE", own)


def test_genomes_hold_own_terms_by_name(tmp_path):
    rule = Genome([register("SQUASHED", tanh(g)), "GRAD"], [1.0, 2.0])
    data = rule.to_dict()
    assert data["term_types"] == ["SQUASHED", "GRAD"]
    assert Genome.from_dict(data) == rule
    assert "tanh(g)" in formula(rule)
    genome._own_terms.clear()
    with pytest.raises(GenomeError, match=r"'SQUASHED', which is no term; .*register it before"):
        Genome.from_dict(data)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "four averages"])
def test_the_python_of_a_term_registers_it(name):
    term = register("OWN", FORMULAS[name] + g / (abs(m * -1e-7 - 0.1) + 1 / 3))
    text = terms.registration([Term.GRAD, term])
    genome._own_terms.clear()
    exec(text, {})
    assert genome.own_terms() == {"OWN": term}
    assert terms.registration([Term.GRAD]) == ""


def test_the_usage_of_a_winner_registers_its_terms(tmp_path):
    rule = Genome([register("OWN", tanh(g) * progress)])
    report.write_best_genome(tmp_path, rule)
    lines = report.usage(tmp_path, rule, 5)
    genome._own_terms.clear()
    made = {"model": torch.nn.Linear(2, 1)}
    exec(lines, made)
    assert made["optimizer"].param_groups[0]["genome"] == rule
    assert "terms" not in report.usage(tmp_path, zoo.adam, 5)


def test_a_checkpoint_knows_its_formulas():
    """A name that now means something else would train on with another rule."""
    rule = Genome([register("OWN", average(g, 0.9))])
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = FusedEvolvedOptimizer([parameter], rule)
    optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    optimizer.load_state_dict(state)
    assert state["param_groups"][0].keys() - optimizer.param_groups[0].keys() == {"own_terms"}
    del state["param_groups"][0]["own_terms"]  # one of before it had them
    optimizer.load_state_dict(state)
    genome._own_terms.clear()
    register("OWN", average(g, 0.9 + 1e-12))
    other = FusedEvolvedOptimizer([parameter], zoo.adam)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    words = r"saved with OWN = average\(g, 0\.9\), but here it is OWN = average\(g, 0\.9000"
    with pytest.raises(OptimizerError, match=words):
        other.load_state_dict(state)


def test_pickled_genomes_bring_their_terms():
    rule = Genome([register("SQUASHED", tanh(g) * average(m, beta3))], beta3=0.75)
    sent = pickle.dumps(rule)
    code = (
        "import pickle, sys; rule = pickle.load(sys.stdin.buffer); "
        "from evokernels.compiler.canonical import canonical_key; "
        "print(rule.beta3, rule.reads_beta3, canonical_key(rule))"
    )
    told = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert told.stdout.decode().split() == ["0.75", "True", canonical_key(rule)]
    genome._own_terms.clear()
    register("SQUASHED", tanh(m))
    with pytest.raises(TermError, match="SQUASHED is"):
        pickle.loads(sent)


def test_a_search_draws_the_terms_that_it_is_given():
    register("SQUASHED", tanh(g))
    config = GeneticConfig(
        population=30, generations=2, catalogue="wide", own_terms=terms.definitions()
    )
    search = GeneticSearch(config)
    drawn = {term for each in search.start().population for term in each.term_types}
    assert drawn == {*CATALOGUES["wide"], find_term("SQUASHED")}
    classic = GeneticSearch(GeneticConfig(population=30, generations=2))
    assert {t for each in classic.start().population for t in each.term_types} <= set(
        CATALOGUES["classic"]
    )
    rng = random.Random(0)
    changed = [
        operators.mutate(zoo.adam, rng, operators.Rates(0, 1, 0, 0), 4, search.space.terms)
        for _ in range(300)
    ]
    assert {t for each in changed for t in each.term_types} == set(search.space.terms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"catalogue": "narrow"}, "catalogue must be classic or wide, got 'narrow'"),
        ({"own_terms": ("NOBODY = tanh(g)",)}, "NOBODY = tanh.g., which is not registered"),
        (
            {"own_terms": ("KNOWN = tanh(m)",)},
            r"the search has KNOWN = tanh\(m\), but .* tanh\(g\)",
        ),
    ],
)
def test_a_search_knows_its_terms(settings, message):
    register("KNOWN", tanh(g))
    with pytest.raises(SettingsError, match=message):
        GeneticConfig(**settings)


def test_definitions_have_all_digits():
    """A journal tells formulas apart that people read alike."""
    register("NEARLY", tanh((1 + 1e-9) * g) - average(m, 0.1 + 0.2))
    (definition,) = terms.definitions()
    assert definition == "NEARLY = tanh(1.000000001 * g) - average(m, 0.30000000000000004)"
    assert genome.own_terms()["NEARLY"].definition == definition
    assert "tanh(1 * g)" in formula(Genome(["NEARLY"]))


def test_terms_from_a_file(tmp_path):
    path, searched = pathlib.Path(tmp_path, "mine.py"), list(sys.path)
    (tmp_path / "beside_mine.py").write_text("from evokernels.terms import g, tanh\nX = tanh(g)\n")
    path.write_text(
        "from beside_mine import X\nfrom evokernels import terms\nterms.register('SQUASHED', X)\n"
    )
    terms.load(path)
    terms.load(path)  # again: a script may ask for it twice
    assert sys.path == searched
    assert terms.definitions() == ("SQUASHED = tanh(g)",)
    for text, message in (
        ("x = 1", "registers no term"),
        ("\n\n1 / 0", "cannot read terms from .*mine.py', line 3: ZeroDivisionError"),
        ("1\ndef", r"cannot read terms from .*SyntaxError: .*mine.py, line 2\)"),
        ("raise SystemExit(3)", "cannot read terms from .*SystemExit: 3"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("from evokernels.terms import *\nregister('SQUASHED', m)", "line 2: SQUASHED is"),
    ):
        path.write_text(text)
        with pytest.raises(TermError, match=message):
            terms.load(path)
    for name, reason in (("missing.py", "FileNotFoundError"), ("", "IsADirectoryError")):
        with pytest.raises(TermError, match=f"cannot read terms from .*: {reason}"):
            terms.load(tmp_path / name)


def test_a_file_of_terms_runs_as_a_script(tmp_path, monkeypatch, capsys):
    """Options of the command are not its own, and what it prints is no part of what that writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evolve.py", "--terms", "mine/terms.py"])
    pathlib.Path("mine").mkdir()
    pathlib.Path("mine", "terms_beside.py").write_text("beta = 0.5")
    pathlib.Path("mine", "terms.py").write_text(
        "import argparse, os\n"
        "from terms_beside import beta\n"
        "from evokernels.terms import *\n"
        "argparse.ArgumentParser().parse_args()\n"
        "print(register('BESIDE', average(g, beta)))\n"
        "os.chdir('/')\n"
    )
    before = [*sys.path]
    terms.load("mine/terms.py")
    assert terms.definitions() == ("BESIDE = average(g, 0.5)",)
    assert capsys.readouterr() == ("", "'BESIDE'\n")
    assert (pathlib.Path.cwd(), sys.path, sys.argv[0]) == (tmp_path, before, "evolve.py")


def test_a_run_with_own_terms_resumes_and_knows_its_formulas(tmp_path):
    """In worker processes, which nobody has told of the terms."""
    register("DAMPED", g / (1 + average(abs(g), beta3)))
    search = GeneticConfig(
        population=8, generations=2, elites=1, tournament=2, own_terms=terms.definitions()
    )
    settings = dataclasses.replace(QUICK, search=search)
    runs = [run.evolve(settings, tmp_path / f"{workers}", workers=workers) for workers in (1, 2)]
    assert runs[0].history == runs[1].history
    text = (tmp_path / "1" / "journal.sqlite").read_bytes()
    assert b"DAMPED = g / (1 + average(|g|, beta3))" in text
    assert b'"DAMPED"' in text  # in a genome
    assert b'"beta3": 0.9' in text
    resumed = run.evolve(settings, tmp_path / "1")
    assert (resumed.evaluations, resumed.best) == (0, runs[0].best)
    for changed in (None, g / (2 + abs(g))):
        genome._own_terms.clear()
        terms._registered.clear()
        if changed is not None:
            register("DAMPED", changed)
        other = dataclasses.replace(search, own_terms=terms.definitions())
        with pytest.raises(JournalError, match="other settings: own_terms"):
            run.evolve(dataclasses.replace(settings, search=other), tmp_path / "1")
    assert (tmp_path / "1" / "journal.sqlite").read_bytes() == text


def test_json_of_the_wide_catalogue_needs_no_registration():
    assert Genome.from_dict(json.loads(zoo.lion.to_json())) == zoo.lion
