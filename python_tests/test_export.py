"""Exported optimizers: the searched rule on random states, and what torch asks of an optimizer."""

import ast
import copy
import functools
import io
import math
import pathlib
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
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
from test_terms import BY_HAND, PLAIN, random_own_genome

from evokernels import FusedEvolvedOptimizer, Genome, genome, terms, zoo
from evokernels.compiler.expr import Average
from evokernels.compiler.lower import lower
from evokernels.compiler.ops import OPS
from evokernels.compiler.render_torch import class_name, render_torch
from evokernels.errors import GenomeError
from evokernels.genome import CATALOGUES
from evokernels.kernels.plan import ARITHMETIC
from evokernels.terms import exp, log1p, sqrt, where

NAMED = {**zoo.GENOMES, **zoo.WIDE}
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_terms_are_left(monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})


@functools.cache
def exported(rule):
    """The class that is written for a genome."""
    namespace = {"__name__": "exported"}
    exec(render_torch(rule, "Exported"), namespace)
    return namespace["Exported"]


def needs_length(rule):
    return rule.use_cosine_decay or lower(rule).reads_progress


def make(rule, params, **options):
    if needs_length(rule):
        options = {"total_steps": TOTAL_STEPS, **options}
    return exported(rule)(params, **options)


def fused(rule, params, **options):
    return FusedEvolvedOptimizer(params, rule, total_steps=TOTAL_STEPS, **options)


def train(optimizer, parameters, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return optimizer


def trained(rule, start, gradients, make_optimizer=make, **options):
    """Parameters after these gradients, and the optimizer."""
    parameters = [p.clone().requires_grad_() for p in start]
    return parameters, train(make_optimizer(rule, parameters, **options), parameters, gradients)


def changes(rule):
    """Whether it ever changes a parameter: what does not is not exported."""
    try:
        return bool(render_torch(rule, "Exported"))
    except GenomeError:
        return False


@functools.cache
def random_rules(count):
    """The first random genomes that do anything."""
    found = []
    seed = 0
    while len(found) < count:
        if changes(random_genome(seed)):
            found.append(seed)
        seed += 1
    return found


def assert_equal(actual, expected, what=""):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num()), what
        assert torch.equal(a.isnan(), b.isnan()), what


# Against the definition

# the last chooses between numbers that float32 does not have
OWN = [*(each for each, *_ in BY_HAND), terms.where(terms.g > terms.p, 0.1, 0.7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_genomes_match_the_reference(dtype):
    """In every other tensor one gradient is missing."""
    count = 300 if dtype in (torch.float32, torch.float64) else 100  # as float32, but for casts
    for seed in random_rules(300)[:count]:
        rule = random_genome(seed)
        start, gradients = case(seed, dtype)
        missing = [
            [None if step == seed % 5 and i % 2 else g for i, g in enumerate(each)]
            for step, each in enumerate(gradients)
        ]
        parameters, optimizer = trained(rule, start, missing, foreach=True)
        others, other = trained(rule, start, missing, foreach=False)
        beside, _ = trained(rule, start, missing, fused if seed % 3 == 0 else make)
        assert_equal(others, parameters, rule)
        for odd in (0, 1):
            chosen = slice(odd, None, 2)
            states = [optimizer.state[p] for p in parameters[chosen]]
            seen = [
                flat(g for g in each[chosen] if g is not None)
                for each in missing
                if each[odd] is not None
            ]
            exact = exact_steps(rule, flat(start[chosen]), seen, TOTAL_STEPS)
            yardstick = eager_steps(rule, flat(start[chosen]), seen, TOTAL_STEPS)
            what = f"genome {seed}: {rule}"
            assert {state["step"] for state in states} == {len(seen)} == {5 - odd}
            assert_near(flat(parameters[chosen]), exact[0], yardstick[0], dtype, what)
            assert_near(flat(beside[chosen]), exact[0], yardstick[0], dtype, what)
            for name, moment in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if name in states[0]:
                    kept = flat([state[name] for state in states])
                    assert kept.dtype == ARITHMETIC[dtype]
                    assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)
        for a, b in zip(others, parameters, strict=True):
            assert other.state[a].keys() == optimizer.state[b].keys()
            for name, value in optimizer.state[b].items():
                assert name == "step" or torch.equal(other.state[a][name], value)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("seed", range(100))
def test_own_terms_and_averages_match_the_definition(seed, foreach):
    rule = random_own_genome(seed)
    if not changes(rule):
        return
    rng = np.random.default_rng(seed)
    exact = {"p": rng.standard_normal(50), "m": np.zeros(50), "v": np.zeros(50)}
    parameter = torch.tensor(exact["p"], requires_grad=True)
    optimizer = make(rule, [parameter], foreach=foreach)
    for t in range(1, 6):
        exact["g"] = rng.standard_normal(50)
        train(optimizer, [parameter], [[torch.tensor(exact["g"])]])
        exact |= exact_update(rule, exact, t, TOTAL_STEPS)
        np.testing.assert_allclose(parameter.detach().numpy(), exact["p"], rtol=1e-9, atol=1e-11)
    beside = torch.tensor(exact["p"], requires_grad=True)
    assert optimizer.state[parameter].keys() == {"step", *lower(rule).state_names.values()}
    fused(rule, [beside], backend="eager").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("own", OWN, ids=lambda x: str(x)[:40])
def test_terms_by_hand(own, foreach):
    """Every leaf and operation; numbers where tensors are usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", terms.TermWarning)
        term = terms.register("OWN", own)
    for corrects in (False, True):
        rule = Genome([term], [2.0], use_bias_correction=corrects, **PLAIN)
        parameter = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = make(rule, [parameter], foreach=foreach)
        exact = {"p": np.array([2.0, -1.0]), "m": np.zeros(2), "v": np.zeros(2)}
        for t in range(1, 5):
            exact["g"] = np.array([-0.5, 0.25]) * t
            train(optimizer, [parameter], [[torch.tensor(exact["g"])]])
            exact |= exact_update(rule, exact, t, TOTAL_STEPS)
            np.testing.assert_allclose(parameter.detach().numpy(), exact["p"], rtol=1e-10)


@pytest.mark.parametrize("foreach", [True, False])
def test_numbers_of_a_step_may_be_infinite_or_none(foreach):
    """Where Python's own operations raise an error: the last steps of a training must not."""
    rest = 1 - terms.progress
    own = {
        "RATIO": (terms.g / rest, -math.inf),
        "EXP": (terms.g * terms.exp(1e4 / (1.1 - terms.progress)), -math.inf),
        "ROOT": (terms.g * terms.sqrt(rest - 0.5), math.nan),
        "LOG": (terms.g * terms.log1p(rest - 2), math.nan),
    }
    for name, (formula, expected) in own.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", terms.TermWarning)
            rule = Genome([terms.register(name, formula)], wd_log10=-math.inf)
        gradients = [[torch.ones(1)]] * TOTAL_STEPS
        (parameter,), _ = trained(rule, [torch.ones(1)], gradients, foreach=foreach)
        assert str(parameter.item()) == str(expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_wide_catalogue_matches_the_reference(dtype):
    rng = random.Random(0)
    rules = [*zoo.WIDE.values()]
    while len(rules) < 40:
        wide = [rng.choice(CATALOGUES["wide"]) for _ in range(rng.randint(1, 4))]
        alphas = [rng.uniform(-2, 2) for _ in wide]
        corrects = rng.random() < 0.5
        rules.append(Genome(wide, alphas, eps_log10=-4, use_bias_correction=corrects))
    for rule in rules:
        torch.manual_seed(0)
        parameter = torch.randn(1000).to(dtype).requires_grad_()
        optimizer = make(rule, [parameter])
        zeros = torch.zeros(1000, dtype=ARITHMETIC[dtype])
        # at the first step signs of sums that are zero but for their rounding decide nothing
        for t in range(1, 6):
            eager = {"p": parameter.detach().clone(), "m": zeros, "v": zeros}
            state = optimizer.state[parameter]
            averages = zip(exact_averages(rule), lower(rule).averages, strict=True)
            named = {"m": "exp_avg", "v": "exp_avg_sq", **{a: str(b) for a, b in averages}}
            eager |= {key: state[name].clone() for key, name in named.items() if name in state}
            eager["g"] = torch.randn(1000).to(dtype)
            exact = {name: precise(tensor) for name, tensor in eager.items()}
            train(optimizer, [parameter], [[eager["g"]]])
            exact = exact_update(rule, exact, t, TOTAL_STEPS)
            eager = eager_formulas(rule, eager, t, TOTAL_STEPS)
            assert_near(parameter.detach(), exact["p"], eager["p"], dtype, f"{rule} at {t}")


@pytest.mark.parametrize(
    "backend",
    ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton"))],
)
@pytest.mark.parametrize("name", NAMED)
def test_lists_of_tensors_match_the_kernel_on_its_device(name, backend):
    """Both from the same state in every step, within what float32 leaves open."""
    rule, device = NAMED[name], "cpu" if backend == "cpu" else "cuda"
    start, gradients = case(0, torch.float32)
    start, *gradients = ([t.to(device) for t in each] for each in (start, *gradients))
    lists = {} if device == "cuda" else {"foreach": True}  # there it is what one gets
    parameters, beside = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizer = make(rule, parameters, **lists)
    kernel = fused(rule, beside, backend=backend)
    for step in gradients:
        train(optimizer, parameters, [step])
        train(kernel, beside, [step])
        for a, b in zip(parameters, beside, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
            b.data.copy_(a.detach())
        kernel.load_state_dict(optimizer.state_dict())


def exact_averages(rule):
    """The averages of a rule as `exact_update` names them, in the order of the program."""
    zeros = dict.fromkeys("pgmv", np.zeros(1))
    found = [each for each in exact_update(rule, zeros, 1, 1) if isinstance(each, Average)]
    return sorted(found, key=str)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("foreach", [True, False])
def test_not_finite_gradients_show(foreach, bad):
    for seed in random_rules(40):
        rule = random_genome(seed)
        start, gradients = case(seed, torch.float32)
        for i in (2, 3, 4, 5):
            gradients[1][i].view(-1)[::5] = bad
        parameters, _ = trained(rule, start, gradients[:3], foreach=foreach)
        gradients = [flat(step) for step in gradients[:3]]
        exact, _, _ = exact_steps(rule, flat(start), gradients, TOTAL_STEPS)
        actual = flat(parameters).numpy()
        # an infinite sum may come out as NaN or infinite, depending on the order of its terms
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), rule
        if np.isnan(bad):
            assert np.array_equal(np.isnan(actual), np.isnan(exact)), rule


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("term", CATALOGUES["wide"])
def test_not_a_number_is_never_hidden(term, foreach):
    start, gradient = torch.ones(2), torch.tensor([math.nan, 0.5])
    (parameter,), _ = trained(Genome([term]), [start], [[gradient]], foreach=foreach)
    assert parameter.isnan().tolist() == [True, False]


@pytest.mark.parametrize("foreach", [True, False])
def test_a_term_of_weight_zero_is_not_there(foreach):
    rule = Genome(["GRAD"], wd_log10=-1.0, lr_log10=-1.0)
    for options, expected in (({}, math.nan), ({"weight_decay": 0.0}, math.inf)):
        start = torch.tensor([math.inf])
        (parameter,), _ = trained(rule, [start], [[torch.ones(1)]], foreach=foreach, **options)
        assert str(parameter.item()) == str(expected)
    cancelled = Genome(["GRAD", "SIGN_GRAD", "GRAD"], [0.5, 1.0, -0.5], wd_log10=-math.inf)
    (parameter,), _ = trained(cancelled, [torch.ones(1)], [[torch.tensor([math.inf])]])
    assert parameter.item() == pytest.approx(0.999)


def test_a_genome_that_changes_nothing_is_not_exported():
    with pytest.raises(GenomeError, match="leaves every parameter as it is"):
        render_torch(Genome(["GRAD"], [0.0], wd_log10=-math.inf), "Nothing")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_any_layout_gives_the_contiguous_result(foreach, dtype):
    guarded, cases = layouts(dtype)
    guard = guarded == 7.0
    for name, (parameter, gradient) in cases.items():
        contiguous, _ = trained(
            zoo.evolved_2025, [parameter.contiguous()], [[gradient.contiguous()]] * 3
        )
        optimizer = make(zoo.evolved_2025, [parameter.requires_grad_()], foreach=foreach)
        for _ in range(3):
            parameter.grad = gradient
            optimizer.step()
        assert torch.equal(parameter, contiguous[0]), name
    assert (guarded.detach()[guard] == 7.0).all(), "a neighbour was written to"


# What torch asks of an optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("first", [make, fused])
def test_checkpoints_load_into_each_other(first, name, dtype):
    """Written by one, the other goes on as the one would have; a missing gradient in between."""
    rule = NAMED[name]
    start, gradients = case(1, dtype)
    gradients[1] = [None if i % 2 else g for i, g in enumerate(gradients[1])]
    parameters, optimizer = trained(rule, start, gradients[:3], first)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    other = (fused if first is make else make)(rule, copies)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(parameters, copies, strict=True):
        for key, value in optimizer.state[a].items():
            loaded = other.state[b][key]
            assert float(loaded) == float(value) if key == "step" else torch.equal(loaded, value)
            assert key == "step" or loaded.dtype == ARITHMETIC[dtype]
    train(optimizer, parameters, gradients[3:])
    train(other, copies, gradients[3:])
    eps = torch.finfo(dtype).eps
    for a, b in zip(parameters, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps)
        assert float(optimizer.state[a]["step"]) == float(other.state[b]["step"])
    # and back
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == rule.lr


@pytest.mark.parametrize("name", NAMED)
def test_groups_have_options_of_their_own(name):
    rule = NAMED[name]
    start, gradients = case(2, torch.float32)
    results = []
    for make_optimizer in (make, fused):
        parameters = [p.clone().requires_grad_() for p in start]
        defaults = make_optimizer(rule, parameters[:1]).param_groups[0]
        own = {"lr": 0.01, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}
        given = {key: value for key, value in own.items() if key in make(rule, [start[0]]).defaults}
        groups = [
            {"params": parameters[:2]},
            {"params": parameters[2:4], **given},
            {"params": parameters[4:], "maximize": True},
        ]
        optimizer = train(make_optimizer(rule, groups), parameters, gradients)
        assert [group["lr"] for group in optimizer.param_groups] == [rule.lr, 0.01, rule.lr]
        assert defaults["maximize"] is False
        results.append(parameters)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_schedulers_and_closures():
    rule = zoo.evolved_2025
    start, gradients = case(3, torch.float32)
    results = []
    for make_optimizer in (make, fused):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = make_optimizer(rule, parameters)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for each in gradients:

            def closure(each=each, parameters=parameters):
                assert torch.is_grad_enabled()
                for parameter, gradient in zip(parameters, each, strict=True):
                    parameter.grad = gradient.clone()
                return 3.5

            assert optimizer.step(closure) == 3.5
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] < 1e-9
        results.append(parameters)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(again, monkeypatch):
    kind = exported(zoo.evolved_2025)
    monkeypatch.setitem(sys.modules, "exported", kind)
    monkeypatch.setattr(kind, "Exported", kind, raising=False)
    start, gradients = case(4, torch.float32)
    parameters, optimizer = trained(zoo.evolved_2025, start, gradients[:3])
    copied = again(optimizer)
    others = [p for group in copied.param_groups for p in group["params"]]
    train(optimizer, parameters, gradients[3:])
    train(copied, others, gradients[3:])
    assert_equal(others, parameters)


def test_a_state_of_adam_loads():
    start, gradients = case(5, torch.float32)
    parameters = [p.clone().requires_grad_() for p in start]
    adam = train(torch.optim.Adam(parameters, lr=1e-3), parameters, gradients[:3])
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    optimizer = make(zoo.adam, copies)
    optimizer.load_state_dict(adam.state_dict())
    train(adam, parameters, gradients[3:])
    train(optimizer, copies, gradients[3:])
    for ours, theirs in zip(copies, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (name, value, f"{name} must be {allowed}, got {value!r}")
        for names, allowed, values in (
            (
                "lr eps weight_decay",
                "a number from 0 on",
                (-1.0, math.nan, math.inf, "1", None, 1j),
            ),
            ("eps weight_decay", "a number from 0 on", (torch.ones(1), [0.1])),
            (
                "betas",
                "two numbers in [0, 1)",
                ((0.9,), (0.9, 1.0), 0.9, None, (0.9, "0"), [0.9] * 3),
            ),
            ("clip_value", "a number above 0", (0.0, -1.0, None, math.inf)),
            ("warmup_steps total_steps", "a whole number from 1 on", (0, -3, 1.5, None, "7")),
            ("maximize foreach", "True or False", ("no", 2)),
        )
        for name in names.split()
        for value in values
    ],
)
def test_options_that_no_rule_can_work_with(name, value, message):
    full = Genome(["ADAM_TERM"], use_gradient_clipping=True, use_warmup=True, use_cosine_decay=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        make(full, [torch.ones(2)], **{name: value})
    optimizer = make(full, [torch.ones(2)])
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [torch.ones(2)], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("number", [float, np.float32, np.float64, torch.tensor])
def test_options_of_other_kinds(number):
    """A tensor as learning rate, numbers and whole numbers of NumPy."""
    parameter = torch.ones(2, requires_grad=True)
    counts = {} if number is float else {"total_steps": np.int64(9), "warmup_steps": np.int32(1)}
    beside = make(zoo.evolved_2025, [parameter], lr=0.5, **counts)
    train(beside, [parameter], [[torch.ones(2)]])
    expected, parameter = parameter, torch.ones(2, requires_grad=True)
    options = {} if number is torch.tensor else {"eps": number(beside.defaults["eps"])}
    optimizer = make(zoo.evolved_2025, [parameter], lr=number(0.5), **counts, **options)
    train(optimizer, [parameter], [[torch.ones(2)]])
    torch.testing.assert_close(parameter, expected)


def test_gradients_that_it_cannot_use():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    dense = torch.ones(2, requires_grad=True)
    optimizer = make(zoo.adam, [dense, *embedding.parameters()])
    (embedding(torch.tensor([1, 2])).sum() + dense.sum()).backward()
    with pytest.raises(ValueError, match=r"dense and of real numbers, got a torch.sparse_coo"):
        optimizer.step()
    assert dense.tolist() == [1.0, 1.0]
    parameter = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"of a torch\.complex64 parameter"):
        make(zoo.adam, [parameter]).step()


# The text


def test_only_what_a_rule_needs_is_an_option():
    options = {name: list(make(rule, [torch.ones(1)]).defaults) for name, rule in NAMED.items()}
    assert options["adam"] == ["lr", "betas", "eps", "maximize", "foreach"]
    assert options["adamw"] == ["lr", "betas", "eps", "weight_decay", "maximize", "foreach"]
    assert options["sgd_momentum"] == ["lr", "betas", "maximize", "foreach"]
    schedule = ["warmup_steps", "total_steps"]
    assert options["evolved_2025"] == options["adamw"][:4] + schedule + ["maximize", "foreach"]
    with pytest.raises(TypeError, match="total_steps"):
        exported(zoo.evolved_2025)([torch.ones(1)])
    sign = Genome(["SIGN_GRAD"], wd_log10=-math.inf)
    assert list(make(sign, [torch.ones(1)]).defaults) == ["lr", "maximize", "foreach"]
    text = render_torch(sign, "Sign")
    assert not {word for word in ("exp_avg", "MOMENTS", '"betas"', "_where") if word in text}


def test_the_documentation_has_rule_and_genome():
    for rule in NAMED.values():
        text = exported(rule).__doc__
        start, end = text.index("{"), text.index("\n        }") + len("\n        }")
        assert Genome.from_json(text[start:end]) == rule
    text = exported(zoo.evolved_2025).__doc__
    assert "m ← (1 - beta1) * g + beta1 * m\n" in text
    assert "0.734444 * sign(g) + 3.6352 * m / (sqrt(v) + eps))" in text


def test_numbers_have_all_their_digits():
    group = make(zoo.evolved_2025, [torch.ones(1)]).param_groups[0]
    rule = zoo.evolved_2025
    assert (group["lr"], group["eps"], group["weight_decay"]) == (
        rule.lr,
        rule.eps,
        rule.weight_decay,
    )
    assert group["betas"] == (rule.beta1, rule.beta2)
    assert group["warmup_steps"] == rule.warmup_steps


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my_optimizer", "MyOptimizer"),
        ("evolved-2025 v2", "Evolved2025V2"),
        ("2025", "Optimizer2025"),
        ("none", "OptimizerNone"),
        ("tensor", "OptimizerTensor"),
        ("MOMENTS", "OptimizerMOMENTS"),
        ("ValueError", "OptimizerValueError"),
        ("ß", "Optimizer"),
        ("n" * 99, "N" + "n" * 39),
    ],
)
def test_names_of_classes(text, name):
    assert class_name(text) == name


def test_no_name_of_a_class_hides_one_that_the_file_needs():
    """Those of classes begin with a capital letter and have no underscore."""
    tree = ast.parse(render_torch(zoo.evolved_2025, "Exported"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())}
    for name in used - {"Exported"}:
        assert class_name(name) != name, name


def test_every_operation_of_a_rule_is_written(monkeypatch):
    """Those that tensors may have: the random rules, which are held against the definition, do."""
    missing = set(OPS) - {"sub", "expm1", "cospi"}
    for seed in range(100):
        monkeypatch.setattr(genome, "_own_terms", {})
        missing -= {line.op for line in lower(random_own_genome(seed)).program.lines}
        if not missing:
            break
    assert not missing


RUFF = shutil.which("ruff", path=pathlib.Path(sys.executable).parent) or shutil.which("ruff")


@pytest.mark.skipif(not RUFF, reason="there is no ruff")
def test_ruff_finds_nothing(tmp_path, monkeypatch):
    half, rest = terms.progress > 0.5, 1 - terms.progress
    long = where(half, exp(-rest) * sqrt(rest), log1p(rest) / (2 + terms.beta1 - terms.beta2))
    rules = [*NAMED.values(), Genome([terms.register("L" * 99, long * terms.g)], use_m=False)]
    rules += map(random_genome, random_rules(60))
    for i in range(len(rules) + 40):
        monkeypatch.setattr(genome, "_own_terms", {})
        rule = rules[i] if i < len(rules) else random_own_genome(i)
        if changes(rule):
            (tmp_path / f"rule_{i}.py").write_text(
                render_torch(rule, f"R{i:039}"), encoding="utf-8"
            )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for command in (["check"], ["format", "--diff"]):
        line = [RUFF, *command, "--no-cache", "."]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_it_stands_alone(tmp_path):
    (tmp_path / "mine.py").write_text(render_torch(zoo.evolved_2025, "Mine"), encoding="utf-8")
    script = """
import sys
sys.path[:0] = ["."]
sys.modules["evokernels"] = None  # an import would fail
import torch, mine
w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
optimizer = mine.Mine([w], lr=0.05, warmup_steps=1, total_steps=100)
for _ in range(100):
    optimizer.zero_grad()
    w.square().sum().backward()
    optimizer.step()
assert w.abs().max() < 0.1, w
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
