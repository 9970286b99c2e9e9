"""What a genome can be trained on: a data set and a network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from evokernels.architecture import Architecture
from evokernels.errors import ArchitectureError, DatasetError
from evokernels.tasks.batches import TaskData
from evokernels.tasks.datasets import SOURCES, load_images
from evokernels.tasks.decoding import Decoded, build, decode
from evokernels.tasks.models import CifarCNN, SmallCNN
from evokernels.tasks.texts import load_text
from evokernels.tasks.transformer import CharTransformer

__all__ = ["TASKS", "Task", "get_task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to train.

    Args:
        name: what `get_task` knows it by.
        load: returns its data, given the data folder, train_samples and validation_samples (see
            `load_images`); the data says whether it is augmented.
        model: returns a new, freshly initialised network, given the number of classes.
        shape: of its images, channels first; None for a task without images.
        classes: of its images; None for a task without images.
    """

    name: str
    load: Callable[[str | None, int | None, int], TaskData]
    model: Callable[[int], nn.Module]
    shape: tuple[int, int, int] | None = None
    classes: int | None = None

    def decode(self, architecture: Architecture) -> Decoded:
        """What the architecture becomes on this task.

        Raises:
            ArchitectureError: the task has no images, or as `evokernels.tasks.decode`.
        """
        return decode(architecture, *self._images())

    def build(self, architecture: Architecture) -> nn.Module:
        """Its network, new and freshly initialised; raises like `decode`."""
        return build(architecture, *self._images())

    def _images(self) -> tuple[tuple[int, int, int], int]:
        if self.shape is None or self.classes is None:
            raise ArchitectureError(
                f"the task {self.name!r} has no images, and architectures are networks for images; "
                f"use one of {', '.join(task.name for task in TASKS.values() if task.shape)}"
            )
        return self.shape, self.classes


def _images(name: str, model: Callable[[int], nn.Module], augment: bool = False) -> Task:
    source = SOURCES[name]
    load = functools.partial(load_images, name, augment=augment)
    return Task(name, load, model, source.channels_first, source.classes)


def _text(name: str, file: str | None = None) -> Task:
    return Task(name, functools.partial(load_text, file=file), CharTransformer)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _images("mnist", SmallCNN),
        _images("fashion_mnist", SmallCNN),
        _images("fashion_mnist_mini", SmallCNN),
        _images("cifar10", CifarCNN, augment=True),
        _text("text"),
    )
}


def get_task(name: str) -> Task:
    """The task of that name, or for "text:FILE" the one of that text file (see `load_text`).

    Raises:
        DatasetError: there is no such task; names those there are.
    """
    kind, _, file = name.partition(":")
    if kind == "text" and file:
        return _text(name, file)
    if name not in TASKS:
        known = ", ".join((*TASKS, "text:FILE"))
        raise DatasetError(f"unknown task {name!r}; use one of {known}")
    return TASKS[name]
