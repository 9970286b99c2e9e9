"""What genomes are trained on: image data in memory, its batches and the networks."""

from evokernels.tasks.batches import (
    Batches,
    Draw,
    draw_batches,
    stack_draws,
    test_batches,
    training_batches,
)
from evokernels.tasks.datasets import ImageData, load_images
from evokernels.tasks.models import CifarCNN, SmallCNN
from evokernels.tasks.registry import TASKS, Task, get_task

__all__ = [
    "TASKS",
    "Batches",
    "CifarCNN",
    "Draw",
    "ImageData",
    "SmallCNN",
    "Task",
    "draw_batches",
    "get_task",
    "load_images",
    "stack_draws",
    "test_batches",
    "training_batches",
]
