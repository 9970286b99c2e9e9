"""torch.compile around a training step: the same numbers, and no compilation after the first step.

`step` itself is never traced: Dynamo ends its graph before it and goes on behind it.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import OptimizerError
from evokernels.optim import compiling

# Dynamo's own, where it goes on behind backward() with the loss at hand
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

STEPS = 5
EAGER = "eager"
INPUTS = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def trainer(genome=zoo.evolved_2025, lr=None, scheduled=False):
    """(model, optimizer, a function that trains for one step, one that goes on to the next)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    group = {"params": list(model.parameters()), **({} if lr is None else {"lr": lr})}
    optimizer = FusedEvolvedOptimizer([group], genome, total_steps=9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if scheduled else None

    def loss(x):
        return (model(x) ** 2).mean()

    def all_in_one(x):
        value = loss(x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return model, optimizer, loss, all_in_one, scheduler


def run(step, scheduler):
    """The losses, and how many graphs were compiled in each step."""
    losses, compiled = [], []
    for x in INPUTS:
        before = counters["stats"]["unique_graphs"]
        losses.append(step(x).item())
        compiled.append(counters["stats"]["unique_graphs"] - before)
        if scheduler is not None:
            scheduler.step()
    return losses, compiled


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


LEARNING_RATES = {"float": lambda: 1e-3, "tensor": lambda: torch.tensor(1e-3)}


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_compiles_once(backend, lr, scheduled):
    model, _, _, step, scheduler = trainer(lr=LEARNING_RATES[lr](), scheduled=scheduled)
    expected_losses, _ = run(step, scheduler)
    expected = parameters(model)

    model, _, _, step, scheduler = trainer(lr=LEARNING_RATES[lr](), scheduled=scheduled)
    counter = CompileCounterWithBackend(backend)
    losses, compiled = run(torch.compile(step, backend=counter), scheduler)
    assert losses == expected_losses
    assert all(map(torch.equal, parameters(model), expected))
    # the forward is one graph; Dynamo does not trace backward() or step()
    assert compiled == [1] + [0] * (STEPS - 1)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("lr", LEARNING_RATES)
def test_a_function_that_only_steps_compiles_nothing(lr, scheduled):
    model, _, _, step, scheduler = trainer(lr=LEARNING_RATES[lr](), scheduled=scheduled)
    expected_losses, _ = run(step, scheduler)
    expected = parameters(model)

    model, optimizer, loss, _, scheduler = trainer(lr=LEARNING_RATES[lr](), scheduled=scheduled)
    update = torch.compile(lambda: optimizer.step(), backend=EAGER)

    def eager_but_for_the_update(x):
        value = loss(x)
        value.backward()
        update()
        optimizer.zero_grad()
        return value

    losses, compiled = run(eager_but_for_the_update, scheduler)
    assert losses == expected_losses
    assert all(map(torch.equal, parameters(model), expected))
    assert compiled == [0] * STEPS


def test_step_itself_may_be_compiled():
    model, _, _, step, _ = trainer()
    run(step, None)
    expected = parameters(model)
    model, optimizer, loss, _, _ = trainer()
    compiled = torch.compile(optimizer.step, backend=EAGER)
    for x in INPUTS:
        optimizer.zero_grad()
        loss(x).backward()
        compiled()
    assert all(map(torch.equal, parameters(model), expected))
    assert counters["stats"]["unique_graphs"] == 0


def test_with_inductor():
    model, _, _, step, scheduler = trainer(zoo.adamw, scheduled=True)
    run(step, scheduler)
    expected = parameters(model)
    model, _, _, step, scheduler = trainer(zoo.adamw, scheduled=True)
    _, compiled = run(torch.compile(step), scheduler)
    assert compiled == [1] + [0] * (STEPS - 1)
    # inductor's own arithmetic differs in the last bits of the gradients
    for actual, right in zip(parameters(model), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-6)


def test_what_stands_behind_the_step_is_compiled():
    _, optimizer, loss, _, _ = trainer()

    @torch.compile(backend=EAGER)
    def step(x):
        optimizer.step()
        return torch.sin(x) + 1

    loss(INPUTS[0]).backward()
    step(INPUTS[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["stats"]["calls_captured"] == 2  # sin and add


def test_a_closure_and_hooks_run_as_they_are():
    _, optimizer, loss, _, _ = trainer()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))

    def closure():
        optimizer.zero_grad()
        value = loss(INPUTS[0])
        value.backward()
        seen.append("closure")
        return value

    compiled = torch.compile(lambda: optimizer.step(closure), backend=EAGER)
    losses = [compiled().item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert seen == ["closure", "hook"] * 3
    assert counters["stats"]["unique_graphs"] == 0


def test_an_error_comes_through_and_leaves_dynamo_at_work():
    _, optimizer, loss, _, _ = trainer()
    loss(INPUTS[0]).backward()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(OptimizerError, match="lr must lie in"):
        torch.compile(lambda: optimizer.step(), backend=EAGER)()
    torch.compile(lambda x: x + 1, backend=EAGER)(INPUTS[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_where_torch_lacks_the_means_its_public_way_is_taken(monkeypatch):
    monkeypatch.setattr(compiling, "_EVAL_FRAME", object())
    seen = []

    def work(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    disabled = compiling.never_compiled(work)
    assert disabled is not work
    assert torch.compile(lambda x: disabled(x), backend=EAGER)(torch.ones(2)).tolist() == [2, 2]
    assert seen == [False]
    assert counters["stats"]["unique_graphs"] == 0


def test_the_import_brings_neither_dynamo_nor_dtensor():
    program = """
import sys, evokernels
print([name for name in ("torch._dynamo", "torch.distributed.tensor") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
