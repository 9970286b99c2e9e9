"""What genomes are trained on: image data in memory, its batches and the networks."""

from evokernels.tasks.batches import test_batches, training_batches
from evokernels.tasks.datasets import ImageData, load_images
from evokernels.tasks.models import CifarCNN, SmallCNN
from evokernels.tasks.registry import TASKS, Task, get_task

__all__ = [
    "TASKS",
    "CifarCNN",
    "ImageData",
    "SmallCNN",
    "Task",
    "get_task",
    "load_images",
    "test_batches",
    "training_batches",
]
