"""The source system's evaluation of a genome, as its notebook runs it: what evaluation.py is timed
against.

Every image is a PIL image that goes through torchvision's transforms, a DataLoader collects them,
the network is made of plain torch modules in float32, the update is single torch calls, and the
loss is read four times a step. The networks are written down a second time on purpose: those of
`evokernels.tasks` may become faster, these stay.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from eager import eager_update
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from evokernels import Genome
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.evolution.devices import reproducible
from evokernels.evolution.fitness import DIVERGED_FITNESS, final_loss, run_fitness
from evokernels.evolution.trial import Conditions, Trial
from evokernels.tasks import ImageData

__all__ = ["NETWORKS", "PilImages", "SourceRun", "evaluate_source", "train_source", "transform_of"]

LOSS_LIMIT = 50


@dataclass(frozen=True)
class SourceRun:
    """How an evaluation ended.

    Attributes:
        fitness: of the source's section 3.3, on the test split; -1 for a run that diverged.
        accuracy: on the test split; None for a run that diverged.
        losses: before each step that was taken.
        train_seconds: from the making of the network to the last step.
        test_seconds: of the whole test split.
    """

    fitness: float
    accuracy: float | None
    losses: list[float]
    train_seconds: float
    test_seconds: float

    @property
    def seconds(self) -> float:
        """Of training and test."""
        return self.train_seconds + self.test_seconds


class PilImages(Dataset):
    """Images as torchvision's MNIST and CIFAR10 give them out: PIL, transformed one at a time.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        transform: of an image.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, transform: transforms.Compose
    ) -> None:
        pixels = np.ascontiguousarray(images.movedim(1, -1).numpy())
        self._pixels = pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def transform_of(data: ImageData, augment: bool) -> transforms.Compose:
    """From a PIL image to a normalised tensor, float32 (C, H, W); mirrored and cropped or not."""
    size = tuple(data.x_train.shape[2:])
    moved = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(size, padding=4)]
    return transforms.Compose(
        [
            *(moved if augment else []),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )


def small_cnn() -> nn.Module:
    """The source's network for grey images (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


def cifar_cnn() -> nn.Module:
    """The source's network for colour images (N, 3, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(512, 10),
    )


# by task
NETWORKS = {
    "mnist": small_cnn,
    "fashion_mnist": small_cnn,
    "fashion_mnist_mini": small_cnn,
    "cifar10": cifar_cnn,
}


def evaluate_source(
    trial: Trial, conditions: Conditions, data: ImageData, workers: int
) -> SourceRun:
    """Train and test as the source does; its counterpart is `evokernels.evolution.evaluate`.

    Args:
        trial: what to train; a genome, on one of `NETWORKS`.
        conditions: of these, the number of steps and the size of a batch.
        data: the images of ``trial.task``, on the CPU.
        workers: processes of the DataLoader; 0 loads in this one. They are kept from epoch to
            epoch, which the source does not do, but which only makes it faster.
    """

    def loader(images: torch.Tensor, labels: torch.Tensor, *, train: bool) -> DataLoader:
        return DataLoader(
            PilImages(images, labels, transform_of(data, data.augment and train)),
            batch_size=conditions.batch_size,
            shuffle=train,
            num_workers=workers,
            persistent_workers=train and workers > 0,
        )

    start = time.perf_counter()
    with reproducible(torch.device("cpu"), trial.seed):
        model = NETWORKS[trial.task]()
        batches = loader(data.x_train, data.y_train, train=True)
        losses, diverged = train_source(model, trial.optimizer, batches, conditions.steps)
        trained = time.perf_counter()
        if diverged:
            return SourceRun(DIVERGED_FITNESS, None, losses, trained - start, 0.0)
        accuracy = _accuracy(model, loader(data.x_test, data.y_test, train=False))
    tested = time.perf_counter()
    fitness = run_fitness(accuracy, final_loss(losses))
    return SourceRun(fitness, accuracy, losses, trained - start, tested - trained)


def train_source(
    model: nn.Module,
    genome: Genome,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
) -> tuple[list[float], bool]:
    """The source's training loop.

    Args:
        model: not yet trained.
        genome: the update rule.
        batches: x float32 (B, C, H, W) and y int64 (B,); an epoch of them each time it is iterated.
        steps: to take.

    Returns:
        The loss before each step that was taken, and whether the next one was NaN, infinite or
        above 50, which ended the training.
    """
    update = SourceUpdate(model, genome, steps)
    criterion = nn.CrossEntropyLoss()
    losses: list[float] = []
    model.train()
    for x, y in itertools.islice(_epochs(batches), steps):
        loss = criterion(model(x), y)
        # four times, as the source: each waits for the device where there is one
        if math.isnan(loss.item()) or math.isinf(loss.item()) or loss.item() > LOSS_LIMIT:
            return losses, True
        losses.append(loss.item())
        loss.backward()
        update.step()
    return losses, False


class SourceUpdate:
    """The source's optimizer: each parameter in single torch calls, its gradient zeroed behind it.

    Args:
        model: its parameters are updated.
        genome: the update rule.
        steps: length of the training.
    """

    def __init__(self, model: nn.Module, genome: Genome, steps: int) -> None:
        self._genome, self._steps, self._taken = genome, steps, 0
        self._moments = [
            (parameter, *(torch.zeros_like(parameter) for _ in range(2)))
            for parameter in model.parameters()
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        genome = self._genome
        lr = genome.lr * learning_rate_factor(genome, self._taken, self._steps)
        self._taken += 1
        for p, m, v in self._moments:
            eager_update(genome, p, p.grad, m, v, self._taken, lr)
            p.grad.zero_()


def _epochs(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield from batches


@torch.no_grad()
def _accuracy(model: nn.Module, batches: DataLoader) -> float:
    """Share of the images that the model classifies correctly."""
    model.eval()
    correct = total = 0
    for x, y in batches:
        correct += (model(x).argmax(dim=1) == y).sum().item()
        total += len(y)
    return correct / total
