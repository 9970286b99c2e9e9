"""Train one network with one optimizer and say how it went.

Runs with the same seed share everything but the optimizer: initial weights, order of the batches,
augmentation and dropout (common random numbers), so that their difference is the optimizers'. Only
where second derivatives are needed is dropout another, since it must be torch's own.
"""

from __future__ import annotations

import functools
import time

import torch

from evokernels.errors import DatasetError
from evokernels.evolution.baselines import Baseline, build_optimizer, hessian_passes
from evokernels.evolution.devices import CudaGraph, find_device, keep_memory, reproducible
from evokernels.evolution.fitness import DIVERGED_FITNESS, Hurdle, diverged, final_loss, run_fitness
from evokernels.evolution.precision import computing
from evokernels.evolution.training import LAYOUT, logits, train, train_on_device
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial
from evokernels.search.score import Status
from evokernels.tasks import (
    Batches,
    TaskData,
    get_task,
    stack_draws,
    training_batches,
)

__all__ = ["EVALUATION_VERSION", "evaluate"]

# Counts up whenever the same trial under the same conditions ends with other numbers: journals know
# it, so that no run mixes the numbers of two releases.
EVALUATION_VERSION = 3

# Samples in a batch of the test. On a CPU the time of an image falls by a tenth from 100 to 500,
# and in float32 it rises beyond 250, when activations leave the caches (measured). A GPU needs
# more to have something to do.
TEST_BATCH = {"cpu": 250, "cuda": 1000}


def evaluate(trial: Trial, conditions: Conditions, data: TaskData, device: str = "cpu") -> Outcome:
    """Train within the conditions, then measure on the split that they select by.

    Bit-reproducible for a given device and number of torch threads. Initial weights and batches
    are the same on every device, dropout is not. Leaves torch's global random generators as they
    were. The process keeps data sets that it has seen, and from then on memory that it frees (see
    `keep_memory`).

    Args:
        trial: what to train.
        conditions: how long, with what.
        data: of ``trial.task``, loaded as the conditions say, on the CPU.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        SettingsError: a device that is not there.
        DatasetError: the conditions have a validation split, and the data have none.
    """
    start = time.perf_counter()
    place = find_device(device)
    copied = _copy(data, place)
    stops = conditions.hurdle and trial.purpose is Purpose.SEARCH
    hurdle = Hurdle(data.classes) if stops else None
    selection = "validation" if conditions.validation_samples else "test"
    if not len(data.samples(selection)):
        raise DatasetError(
            f"validation_samples is {conditions.validation_samples}, but {data.name!r} was loaded "
            "without any; load it as the conditions say, or give 0 to measure on the test split"
        )
    accuracy = loss = test_accuracy = None
    keep_memory()
    with reproducible(place, trial.seed):  # initial weights, then dropout
        model = _network(trial, data.classes).to(device=place, memory_format=LAYOUT)
        twice = hessian_passes(trial.optimizer, conditions.steps) > 0
        model = computing(model, place, conditions.precision, plain=twice)
        losses = _train(model, trial, conditions, copied, hurdle)
        if diverged(losses[-1]):
            status, fitness, steps = Status.DIVERGED, DIVERGED_FITNESS, len(losses) - 1
        else:
            accuracy, loss = _accuracy(model, copied, selection), final_loss(losses)
            fitness, steps = run_fitness(accuracy, loss), len(losses)
            status = Status.OK if steps == conditions.steps else Status.STOPPED
            if trial.purpose is Purpose.REPORT:
                parity = selection == "test"
                test_accuracy = accuracy if parity else _accuracy(model, copied, "test")
    seconds = time.perf_counter() - start
    return Outcome(status, fitness, accuracy, loss, steps, seconds, _digest(data), test_accuracy)


def _network(trial: Trial, classes: int) -> torch.nn.Module:
    """The architecture's where there is one, else the task's own."""
    task = get_task(trial.task)
    return task.model(classes) if trial.architecture is None else task.build(trial.architecture)


def _train(
    model: torch.nn.Module,
    trial: Trial,
    conditions: Conditions,
    data: TaskData,
    hurdle: Hurdle | None,
) -> list[float]:
    """The loss before each step; ends with the first loss that counts as diverged, or early."""
    optimizer = build_optimizer(trial.optimizer, model, conditions.steps)
    settings = conditions.batch_size, conditions.steps, trial.seed
    if data.device.type == "cpu":
        return train(model, optimizer, training_batches(data, *settings), hurdle)
    draws = (draw.map(lambda drawn: drawn.to(data.device)) for draw in data.draw_batches(*settings))
    batches = Batches(data)
    if isinstance(trial.optimizer, Baseline):  # most of them ask the device for numbers in a step
        return train(model, optimizer, map(batches.training, draws), hurdle)
    graph = CudaGraph(data.device)
    return train_on_device(model, optimizer, batches, stack_draws(draws), graph, hurdle)


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, data: TaskData, split: str) -> float:
    """Share of a split, of its images or of its characters, that the model predicts right."""
    model.eval()
    right = total = 0
    for x, y in Batches(data).split(split, TEST_BATCH[data.device.type]):
        right += (logits(model, x).argmax(dim=-1) == y).sum()
        total += y.numel()
    return int(right) / total


@functools.cache  # by identity, as `_digest`
def _copy(data: TaskData, device: torch.device) -> TaskData:
    return data.to(device)


@functools.cache  # by identity: a process computes it once for each data set it has loaded
def _digest(data: TaskData) -> str:
    return data.digest()
