"""One genome evaluated on a GPU: by the evaluator, and by a plain loop with the source's update."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from eager import eager_update
from torch.nn import functional

from evokernels import zoo
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.evolution.devices import reproducible
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.fitness import DIVERGED_FITNESS, diverged, final_loss, run_fitness
from evokernels.evolution.trial import Conditions, Trial
from evokernels.tasks import Batches, TaskData, get_task, training_batches

__all__ = ["PROTOCOL", "SHORT", "compare_evaluations"]

# The published genome on the conditions of the source's protocol, and one to see that it all works.
GENOME = zoo.evolved_2025
PROTOCOL = Conditions(steps=500, batch_size=128, train_samples=15_000)
SHORT = Conditions(steps=50, batch_size=128, train_samples=None)
SEED = 0
WARM_UP_STEPS = 3
TEST_BATCH = 1000


def compare_evaluations(
    task: str, conditions: Conditions, data_dir: str | None, device: torch.device, passes: int
) -> dict[str, Any]:
    """Seconds and fitness of both, in turns; each has run for some steps before.

    Args:
        task: one of `evokernels.tasks`.
        conditions: a data set with fewer training images gives all that it has.
    """
    data = _data(task, conditions.train_samples, data_dir)
    trial = Trial(GENOME, task, SEED)
    conditions = Conditions(conditions.steps, conditions.batch_size, len(data.samples("train")))
    ways = {"evaluate": _by_evaluator, "source, eager loop": _by_source}
    for way in ways.values():
        way(trial, Conditions(WARM_UP_STEPS, conditions.batch_size, None), data, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    fitness = {}
    for _ in range(passes):
        for name, way in ways.items():
            start = time.perf_counter()
            fitness[name] = way(trial, conditions, data, device)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = seconds.values()
    return {
        "steps": conditions.steps,
        "batch size": conditions.batch_size,
        "training images": len(data.samples("train")),
        "fitness": fitness,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "passes": seconds,
        "times as fast": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    }


def _data(task: str, samples: int | None, data_dir: str | None) -> TaskData:
    load = get_task(task).load
    everything = load(data_dir, None, 0)
    if samples is None or len(everything.samples("train")) <= samples:
        return everything
    return load(data_dir, samples, 0)


def _by_evaluator(
    trial: Trial, conditions: Conditions, data: TaskData, device: torch.device
) -> float:
    return evaluate(trial, conditions, data, str(device)).fitness


def _by_source(trial: Trial, conditions: Conditions, data: TaskData, device: torch.device) -> float:
    """The fitness, from the same weights and batches; every step waits for its loss."""
    genome, task = trial.optimizer, get_task(trial.task)
    with reproducible(device, trial.seed):
        model = task.model(data.classes).to(device)
        parameters = list(model.parameters())
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        losses = []
        batches = training_batches(data, conditions.batch_size, conditions.steps, trial.seed)
        for t, (x, y) in enumerate(batches, start=1):
            loss = functional.cross_entropy(
                model(x.to(device)).flatten(0, -2), y.to(device).flatten()
            )
            losses.append(loss.item())
            if diverged(losses[-1]):
                return DIVERGED_FITNESS
            model.zero_grad()
            loss.backward()
            lr = genome.lr * learning_rate_factor(genome, t - 1, conditions.steps)
            with torch.no_grad():
                for p, (m, v) in zip(parameters, moments, strict=True):
                    eager_update(genome, p, p.grad, m, v, t, lr)
        return run_fitness(_accuracy(model, data, device), final_loss(losses))


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, data: TaskData, device: torch.device) -> float:
    model.eval()
    right = total = 0
    for x, y in Batches(data).split("test", TEST_BATCH):
        right += int((model(x.to(device)).argmax(dim=-1) == y.to(device)).sum())
        total += y.numel()
    return right / total
