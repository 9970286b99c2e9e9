"""What a genome can be trained on: a data set and a network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from evokernels.errors import DatasetError
from evokernels.tasks.batches import TaskData
from evokernels.tasks.datasets import load_images
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
    """

    name: str
    load: Callable[[str | None, int | None, int], TaskData]
    model: Callable[[int], nn.Module]


def _images(name: str, model: Callable[[int], nn.Module], augment: bool = False) -> Task:
    return Task(name, functools.partial(load_images, name, augment=augment), model)


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
