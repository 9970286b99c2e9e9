"""Train one network with one genome and say how it went.

Runs with the same seed share everything but the optimizer: initial weights, order of the batches,
augmentation and dropout (common random numbers), so that their difference is the optimizers'.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time

import torch
from torch.nn import functional

from evokernels.evolution.fitness import DIVERGED_FITNESS, diverged, final_loss, run_fitness
from evokernels.genome import Genome
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Status
from evokernels.tasks import ImageData, get_task, test_batches, training_batches

__all__ = ["Budget", "Outcome", "Trial", "evaluate"]

# Activations of 100 images stay near the caches; in batches of 500 the test takes up to twice as
# long (measured).
TEST_BATCH = 100

# Convolution, pooling and batch norm of the two networks are 1.2 to 1.5 times faster with the
# channels innermost (measured with one thread, training), twice as fast in the test.
LAYOUT = torch.channels_last


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: what is trained (genome), on what (task), with which randomness (seed)."""

    genome: Genome
    task: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every training run of an experiment may cost: steps of ``batch_size`` images, drawn
    from ``train_samples`` training images (None: all of them)."""

    steps: int
    batch_size: int
    train_samples: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        status: ``DIVERGED`` where the loss became NaN, infinite or larger than 50.
        fitness: as `evokernels.evolution.fitness` defines it; -1 for a diverged run.
        accuracy: on the whole test split, in [0, 1]; None for a diverged run.
        final_loss: mean training loss of the last 50 steps; None for a diverged run.
        steps: optimizer steps taken; fewer than the budget for a diverged run.
        seconds: wall-clock time of training and test.
        images: digest of the data set, so that a run cannot go on with other images unnoticed.
    """

    status: Status
    fitness: float
    accuracy: float | None
    final_loss: float | None
    steps: int
    seconds: float
    images: str


def evaluate(trial: Trial, budget: Budget, data: ImageData) -> Outcome:
    """Train within the budget, then test; bit-reproducible for a given number of torch threads.

    Leaves torch's global random generator as it was.

    Args:
        trial: what to train.
        budget: how long.
        data: the images of ``trial.task``.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)  # initial weights, then dropout
        model = get_task(trial.task).model().to(memory_format=LAYOUT)
        losses = _train(model, trial, budget, data)
    if diverged(losses[-1]):
        accuracy = loss = None
        status, fitness, steps = Status.DIVERGED, DIVERGED_FITNESS, len(losses) - 1
    else:
        accuracy, loss = _accuracy(model, data), final_loss(losses)
        status, fitness, steps = Status.OK, run_fitness(accuracy, loss), len(losses)
    seconds = time.perf_counter() - start
    return Outcome(status, fitness, accuracy, loss, steps, seconds, _digest(data))


def _train(model: torch.nn.Module, trial: Trial, budget: Budget, data: ImageData) -> list[float]:
    """The loss before each step; ends early with the first loss that counts as diverged."""
    augment = get_task(trial.task).augment
    optimizer = FusedEvolvedOptimizer(model.parameters(), trial.genome, total_steps=budget.steps)
    losses: list[float] = []
    model.train()
    for x, y in training_batches(data, budget.batch_size, budget.steps, trial.seed, augment):
        loss = functional.cross_entropy(model(x.contiguous(memory_format=LAYOUT)), y)
        losses.append(loss.item())
        if diverged(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, data: ImageData) -> float:
    """Share of the test images that the model classifies correctly."""
    model.eval()
    correct = total = 0
    for x, y in test_batches(data, TEST_BATCH):
        logits = model(x.contiguous(memory_format=LAYOUT))
        correct += int((logits.argmax(dim=1) == y).sum())
        total += len(y)
    return correct / total


@functools.cache  # by identity: a process computes it once for each data set it has loaded
def _digest(data: ImageData) -> str:
    """16 hexadecimal digits that tell data sets of the same name apart."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()
