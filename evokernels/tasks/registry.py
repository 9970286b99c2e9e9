"""What a genome can be trained on: a data set, a network and whether images are augmented."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from evokernels.errors import DatasetError
from evokernels.tasks.models import CifarCNN, SmallCNN

__all__ = ["TASKS", "Task", "get_task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to train.

    Args:
        name: what `get_task` knows it by.
        dataset: name of its data set, for `load_images`.
        model: returns a new, freshly initialised network.
        augment: flip and crop the training images at random.
    """

    name: str
    dataset: str
    model: Callable[[], nn.Module]
    augment: bool = False


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mnist", "mnist", SmallCNN),
        Task("fashion_mnist", "fashion_mnist", SmallCNN),
        Task("fashion_mnist_mini", "fashion_mnist_mini", SmallCNN),
        Task("cifar10", "cifar10", CifarCNN, augment=True),
    )
}


def get_task(name: str) -> Task:
    """The task of that name; raises DatasetError naming the tasks there are."""
    if name not in TASKS:
        raise DatasetError(f"unknown task {name!r}; use one of {', '.join(TASKS)}")
    return TASKS[name]
