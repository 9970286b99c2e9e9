"""Train one network with one genome and say how it went.

Runs with the same seed share everything but the optimizer: initial weights, order of the batches,
augmentation and dropout (common random numbers), so that their difference is the optimizers'.
"""

from __future__ import annotations

import functools
import hashlib
import time

import torch

from evokernels.evolution.devices import CudaGraph, find_device, keep_memory, reproducible
from evokernels.evolution.fitness import DIVERGED_FITNESS, diverged, final_loss, run_fitness
from evokernels.evolution.precision import computing
from evokernels.evolution.training import LAYOUT, train, train_on_device
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Status
from evokernels.tasks import (
    Batches,
    ImageData,
    draw_batches,
    get_task,
    stack_draws,
    test_batches,
    training_batches,
)

__all__ = ["evaluate"]

# Images in a batch of the test. On a CPU the time of an image falls by a tenth from 100 to 500, and
# in float32 it rises beyond 250, when activations leave the caches (measured). A GPU needs more.
TEST_BATCH = {"cpu": 250, "cuda": 1000}


def evaluate(trial: Trial, conditions: Conditions, data: ImageData, device: str = "cpu") -> Outcome:
    """Train within the conditions, then test.

    Bit-reproducible for a given device and number of torch threads. Initial weights and batches
    are the same on every device, dropout is not. Leaves torch's global random generators as they
    were.

    Args:
        trial: what to train.
        conditions: how long, with what.
        data: the images of ``trial.task``, on the CPU.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        SettingsError: a device that is not there.
    """
    start = time.perf_counter()
    place = find_device(device)
    images = _copy(data, place)
    keep_memory()
    with reproducible(place, trial.seed):  # initial weights, then dropout
        model = get_task(trial.task).model().to(device=place, memory_format=LAYOUT)
        model = computing(model, place, conditions.precision)
        losses = _train(model, trial, conditions, images)
        if diverged(losses[-1]):
            accuracy = loss = None
            status, fitness, steps = Status.DIVERGED, DIVERGED_FITNESS, len(losses) - 1
        else:
            accuracy, loss = _accuracy(model, images), final_loss(losses)
            status, fitness, steps = Status.OK, run_fitness(accuracy, loss), len(losses)
    seconds = time.perf_counter() - start
    return Outcome(status, fitness, accuracy, loss, steps, seconds, _digest(data))


def _train(
    model: torch.nn.Module, trial: Trial, conditions: Conditions, data: ImageData
) -> list[float]:
    """The loss before each step; ends with the first loss that counts as diverged."""
    optimizer = FusedEvolvedOptimizer(
        model.parameters(), trial.optimizer, total_steps=conditions.steps
    )
    augment = get_task(trial.task).augment
    settings = data, conditions.batch_size, conditions.steps, trial.seed, augment
    device = data.x_train.device
    if device.type == "cpu":
        return train(model, optimizer, training_batches(*settings))
    draws = stack_draws(draw_batches(*settings)).map(lambda drawn: drawn.to(device))
    return train_on_device(model, optimizer, Batches(data), draws, CudaGraph(device))


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, data: ImageData) -> float:
    """Share of the test images that the model classifies correctly."""
    model.eval()
    correct = sum(
        (model(x.contiguous(memory_format=LAYOUT)).argmax(dim=1) == y).sum()
        for x, y in test_batches(data, TEST_BATCH[data.x_test.device.type])
    )
    return int(correct) / len(data.y_test)


@functools.cache  # by identity, as `_digest`
def _copy(data: ImageData, device: torch.device) -> ImageData:
    return data.to(device)


@functools.cache  # by identity: a process computes it once for each data set it has loaded
def _digest(data: ImageData) -> str:
    """16 hexadecimal digits that tell data sets of the same name apart."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()
