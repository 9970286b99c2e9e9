"""The optimizers that are compared with: their steps against their papers' formulas, in float64."""

import ast
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.errors import GenomeError, SettingsError
from evokernels.evolution import baselines, evaluator
from evokernels.evolution.baselines import (
    BASELINES,
    METHODS,
    Baseline,
    build_optimizer,
    hessian_passes,
    optimizer_from_json,
    optimizer_key,
)
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.precision import PRECISIONS, computing
from evokernels.evolution.trial import Conditions, Trial
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Status
from evokernels.tasks import CharTransformer, CifarCNN, SmallCNN, load_images

MINI = "fashion_mnist_mini"
STEPS = 3


class Matrix(nn.Module):
    """One parameter p (4, 3), float64; its loss is a quadratic form and the slope times p."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        self.p = nn.Parameter(torch.from_numpy(rng.normal(size=(4, 3))))
        root = rng.normal(size=(12, 12))
        self.hessian = root @ root.T / 12
        self.slope = rng.normal(size=(4, 3))

    def loss(self):
        flat = self.p.flatten()
        quadratic = flat @ torch.from_numpy(self.hessian) @ flat / 2
        return quadratic + (self.p * torch.from_numpy(self.slope)).sum()

    def gradient(self, p):
        return (self.hessian @ p.ravel()).reshape(p.shape) + self.slope


# Each yields the update of a step, to be subtracted, given the parameter and its gradient.


def sgd(lr):
    total = 0.0
    _, g = yield
    while True:
        total = 0.9 * total + g
        _, g = yield lr * total


def nesterov(lr):
    total = 0.0
    _, g = yield
    while True:
        total = 0.9 * total + g
        _, g = yield lr * (g + 0.9 * total)


def nadam(lr):
    # Dozat 2016, Algorithm 2, with the momentum schedule of its section 3
    def mu(t):
        return 0.9 * (1 - 0.5 * 0.96 ** (0.004 * t))

    m = v = 0.0
    product = 1.0
    _, g = yield
    for t in itertools.count(1):
        product *= mu(t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        average = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * g / (1 - product)
        _, g = yield lr * average / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def lion(lr):
    # Chen et al. 2023, Algorithm 2
    m = 0.0
    _, g = yield
    while True:
        update = np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        _, g = yield lr * update


def adafactor(lr):
    # Shazeer & Stern 2018, Algorithm 4; gradients here are far above epsilon 1
    def rms(x):
        return math.sqrt((x * x).mean())

    rows = columns = 0.0
    p, g = yield
    for t in itertools.count(1):
        keep = 1 - t**-0.8
        rows = keep * rows + (1 - keep) * (g * g).mean(axis=1)
        columns = keep * columns + (1 - keep) * (g * g).mean(axis=0)
        update = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        update /= max(1.0, rms(update))
        p, g = yield max(1e-3, rms(p)) * min(lr, 1 / math.sqrt(t)) * update


REFERENCES = (sgd, nesterov, nadam, lion, adafactor)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.__name__)
def test_steps_by_the_formulas(reference):
    name = reference.__name__
    model = Matrix()
    optimizer = build_optimizer(BASELINES[name], model, STEPS)
    expected = model.p.detach().numpy().copy()
    updates = reference(METHODS[name].lr)
    next(updates)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        expected -= updates.send((expected, model.gradient(expected)))
        # torch keeps NAdam's product of momenta in float32
        np.testing.assert_allclose(model.p.detach().numpy(), expected, rtol=1e-7)


def test_every_baseline_has_its_formula_tested():
    # muon and sophia have tests of their own, below
    tested = {reference.__name__ for reference in REFERENCES} | {"muon", "sophia"}
    assert tested == set(METHODS) == set(BASELINES)


def test_sophia_by_the_formulas(monkeypatch):
    # Liu et al. 2023, Algorithms 1 and 3, with the limit of its first version: 0.01
    model = Matrix()
    model.slope[:] = 0.0
    with torch.no_grad():
        model.p.mul_(3e-3)  # some updates reach the limit, some do not
    optimizer = build_optimizer(BASELINES["sophia"], model, 12)
    expected = model.p.detach().numpy().copy()
    m = h = np.zeros((4, 3))
    noise = []
    draw = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda p: noise.append(draw(p)) or noise[-1])
    torch.manual_seed(7)
    of_the_run = torch.randn(4, 3, dtype=torch.float64)
    clipped = set()
    for step in range(12):
        optimizer.zero_grad()
        optimizer.backward(model.loss())
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        if step in (0, 10):
            z = noise[-1].numpy()
            h = 0.99 * h + 0.01 * z * (model.hessian @ z.ravel()).reshape(4, 3)
        m = 0.96 * m + 0.04 * model.gradient(expected)
        ratio = m / np.maximum(h, 1e-12)
        clipped |= set((np.abs(ratio) > 0.01).ravel())
        expected -= 6e-2 * np.clip(ratio, -0.01, 0.01)
        np.testing.assert_allclose(model.p.detach().numpy(), expected, rtol=1e-9)
    assert clipped == {True, False}
    assert len(noise) == 2
    for one, other in itertools.combinations([of_the_run, *noise], 2):
        assert not torch.equal(one, other)


def test_sophia_counts_its_passes_and_frees_its_graphs(monkeypatch):
    calls = []
    estimate = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or estimate(*args, **kwargs)
    )
    model = Matrix()
    optimizer = build_optimizer(BASELINES["sophia"], model, 21)
    for step in range(21):
        optimizer.zero_grad()
        optimizer.backward(model.loss())
        optimizer.step()
        assert not model.p.grad.requires_grad
        # two calls an estimate: the gradients with their graph, and their product with the noise
        assert len(calls) == 2 * hessian_passes(BASELINES["sophia"], step + 1)
    assert len(calls) == 6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("network", "shape"), [(SmallCNN, (2, 1, 28, 28)), (CifarCNN, (2, 3, 32, 32))]
)
def test_sophia_trains_every_network_of_images(network, shape, precision):
    assert_sophia_moves(network(), torch.randn(shape), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sophia_trains_the_transformer(precision):
    assert_sophia_moves(CharTransformer(9), torch.randint(9, (2, 64)), precision)


def assert_sophia_moves(network, x, precision):
    """All parameters, in a step that estimates the Hessian."""
    model = computing(network, torch.device("cpu"), precision, plain=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(BASELINES["sophia"], model, 1)
    optimizer.backward(model(x).square().mean())
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all()
        assert not torch.equal(p, before[name]), name
        assert "hessian" in optimizer.state[p]


def test_only_sophia_makes_passes_of_its_own():
    names = {name for name in BASELINES if hessian_passes(BASELINES[name], 1000)}
    assert names == {"sophia"}
    assert [hessian_passes(BASELINES["sophia"], steps) for steps in (0, 1, 10, 11, 1000)] == [
        *(0, 1, 1, 2, 100)
    ]
    assert hessian_passes(zoo.adam, 1000) == 0


def orthogonalised(matrix):
    """Jordan 2024: five Newton-Schulz iterations, here in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_muon_by_the_formulas(layout):
    rng = np.random.default_rng(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 2)
    )
    model = model.double().to(memory_format=layout)
    optimizer = build_optimizer(dataclasses.replace(BASELINES["muon"], lr=0.1), model, STEPS)
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    gradients = [
        {name: rng.normal(size=p.shape) for name, p in start.items()} for _ in range(STEPS)
    ]
    for step in range(STEPS):
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[step][name].copy())
        optimizer.step()
    for name, p in model.named_parameters():
        expected, m, v = start[name], 0.0, 0.0
        for t in range(1, STEPS + 1):
            g = gradients[t - 1][name]
            if name in ("1.weight", "3.weight"):
                m = 0.95 * m + 0.05 * g
                matrix = (0.05 * g + 0.95 * m).reshape(len(g), -1)
                long_side = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                expected = expected - 0.1 * long_side * orthogonalised(matrix).reshape(g.shape)
            else:
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                change = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-10)
                expected = expected - 0.1 * (3e-4 / 0.02) * change
        # the iterations are made in bfloat16
        tolerance = {"atol": 0.01} if name in ("1.weight", "3.weight") else {"rtol": 1e-9}
        np.testing.assert_allclose(p.detach().numpy(), expected, **tolerance)
        assert np.abs(start[name] - expected).max() > 1e-3


def names_by_rule(model):
    named = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(BASELINES["muon"], model, 1).param_groups
    return {group["use_muon"]: {named[id(p)] for p in group["params"]} for group in groups}


def test_muon_takes_what_is_hidden():
    found = names_by_rule(SmallCNN())
    assert found[True] == {"features.3.weight", "classifier.1.weight"}
    assert len(found[False]) == 6
    language = nn.Sequential(
        nn.Linear(3, 4),
        nn.Embedding(5, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 4),
        nn.Linear(4, 5, bias=False),
    )
    assert names_by_rule(language)[True] == {"3.weight"}
    assert names_by_rule(nn.Linear(3, 2)) == {False: {"weight", "bias"}}


def test_muon_takes_the_layers_of_the_transformer():
    places = "attention.qkv", "attention.out", "mlp.0", "mlp.2"
    assert names_by_rule(CharTransformer(9))[True] == {
        f"layers.{layer}.{place}.weight" for layer in (0, 1) for place in places
    }


def test_a_schedule_by_hand():
    baseline = Baseline("lion", 0.1, use_warmup=True, warmup_steps=2, use_cosine_decay=True)
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = build_optimizer(baseline, model, 4)
    moved = []
    for _ in range(5):
        before = model.weight.item()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        moved.append(before - model.weight.item())
    half = 0.5 * (1 + math.sqrt(0.5))
    assert moved == pytest.approx([0.05, 0.1 * half, 0.05, 0.1 * (1 - half), 0.0], abs=1e-12)


def test_a_schedule_is_for_all_groups():
    baseline = dataclasses.replace(BASELINES["muon"], use_warmup=True, warmup_steps=4)
    optimizer = build_optimizer(baseline, SmallCNN(), 10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.75e-4])


@pytest.mark.parametrize("name", BASELINES)
def test_a_schedule_counts_each_step_once(name):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    # torch then wraps the step of the class that ours is made of, too
    pytorch_optimizer.SophiaH([nn.Parameter(torch.ones(2, 2))])
    baseline = dataclasses.replace(BASELINES[name], use_warmup=True, warmup_steps=4)
    optimizer = build_optimizer(baseline, model, 10)
    factors = []
    for _ in range(4):
        loss = model(torch.ones(1, 2)).square().sum()
        getattr(optimizer, "backward", torch.Tensor.backward)(loss)
        factors.append(optimizer.param_groups[0]["lr"] / baseline.lr)
        optimizer.step()
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_genome_is_built_with_its_length():
    optimizer = build_optimizer(zoo.evolved_2025, Matrix(), 17)
    assert isinstance(optimizer, FusedEvolvedOptimizer)
    assert optimizer.param_groups[0]["total_steps"] == 17


# In the evaluation


@pytest.fixture(scope="module")
def images():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_images(MINI, train_samples=256)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BASELINES)
def test_training_learns(images, losses, name):
    outcome = evaluate(Trial(BASELINES[name], MINI, 0), Conditions(20, 16, 256), images)
    assert (outcome.status, outcome.steps) == (Status.OK, 20)
    (found,) = losses
    assert sum(found[-5:]) / 5 < 0.95 * found[0]


def test_the_noise_of_estimates_moves_nothing_else(images, losses, monkeypatch):
    # steps too small to change a loss: what is left is weights, batches and, in networks of torch's
    # own operations, dropout; estimates are made in steps 1 and 11
    monkeypatch.setattr(evaluator, "hessian_passes", lambda optimizer, steps: 1)
    for name in ("sgd", "sophia"):
        idle = dataclasses.replace(BASELINES[name], lr=1e-14)
        evaluate(Trial(idle, MINI, 3), Conditions(12, 32, 256), images)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_diverged_baseline_is_a_value(images):
    wild = dataclasses.replace(BASELINES["sgd"], lr=1e4)
    outcome = evaluate(Trial(wild, MINI, 0), Conditions(12, 32, 256), images)
    assert (outcome.status, outcome.fitness) == (Status.DIVERGED, -1.0)


# As data


@pytest.mark.parametrize(
    "optimizer",
    [
        *BASELINES.values(),
        Baseline("lion", 1 / 3, use_warmup=True, warmup_steps=7, use_cosine_decay=True),
        zoo.evolved_2025,
    ],
    ids=lambda optimizer: getattr(optimizer, "name", "genome"),
)
def test_json_keeps_everything(optimizer):
    again = optimizer_from_json(json.dumps(optimizer.to_dict()))
    assert again == optimizer
    assert hash(again) == hash(optimizer)
    assert optimizer_key(again) == optimizer_key(optimizer)


def test_keys_tell_optimizers_apart():
    lion = BASELINES["lion"]
    others = [
        dataclasses.replace(lion, **change)
        for change in (
            {"name": "sgd"},
            {"lr": 2e-4},
            {"use_warmup": True},
            {"warmup_steps": 3},
            {"use_cosine_decay": True},
        )
    ]
    assert len({optimizer_key(optimizer) for optimizer in (lion, *others)}) == 6
    assert optimizer_key(copy.copy(lion)) == optimizer_key(lion)
    assert optimizer_key(zoo.adam) == canonical_key(zoo.adam)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lyon"}, "no baseline 'lyon'; did you mean 'lion'"),
        ({"name": "xyz"}, "use one of sgd, nesterov"),
        ({"lr": 0.0}, "lr of lion must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "got nan"),
        ({"lr": math.inf}, "got inf"),
        ({"lr": True}, "got True"),
        ({"lr": "1e-3"}, "got '1e-3'"),
        ({"warmup_steps": -1}, "a whole number of at least 0, got -1"),
        ({"warmup_steps": 1.5}, "got 1.5"),
        ({"use_warmup": 1}, "use_warmup of lion must be true or false, got 1"),
        ({"use_cosine_decay": None}, "use_cosine_decay of lion must be true or false, got None"),
    ],
)
def test_invalid_baselines_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(BASELINES["lion"], **change)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", GenomeError, "not JSON"),
        ("[]", GenomeError, "a genome is a JSON object"),
        ('{"baseline": "lion"}', SettingsError, "missing or unknown: lr, use_cosine_decay"),
        (
            json.dumps({**BASELINES["lion"].to_dict(), "beta": 1}),
            SettingsError,
            "missing or unknown: beta",
        ),
    ],
)
def test_invalid_json_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        optimizer_from_json(text)


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_a_library_that_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(SettingsError, match=r"pip install evokernels\[baselines\]"):
        build_optimizer(BASELINES[name], Matrix(), 1)
    build_optimizer(BASELINES["nadam"], Matrix(), 1)


def test_the_library_is_imported_where_it_is_needed():
    # it takes half a second, which every worker would pay
    tree = ast.parse(pathlib.Path(baselines.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    library = [node for node in imports if "pytorch_optimizer" in ast.unparse(node)]
    assert len(library) == 1
    assert library[0] not in tree.body
