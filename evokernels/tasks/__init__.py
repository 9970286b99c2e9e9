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
from evokernels.tasks.layers import NativeNetwork
from evokernels.tasks.models import CifarCNN, ConvNet, SmallCNN
from evokernels.tasks.registry import TASKS, Task, get_task

__all__ = [
    "TASKS",
    "Batches",
    "CifarCNN",
    "ConvNet",
    "Draw",
    "ImageData",
    "NativeNetwork",
    "SmallCNN",
    "Task",
    "draw_batches",
    "get_task",
    "load_images",
    "stack_draws",
    "test_batches",
    "training_batches",
]
