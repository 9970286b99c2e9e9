"""What genomes are trained on: images or text in memory, its batches and the networks."""

from evokernels.tasks.batches import Batches, Draw, TaskData, stack_draws, training_batches
from evokernels.tasks.datasets import load_images
from evokernels.tasks.images import ImageData
from evokernels.tasks.layers import NativeNetwork
from evokernels.tasks.models import CifarCNN, ConvNet, SmallCNN
from evokernels.tasks.registry import TASKS, Task, get_task
from evokernels.tasks.texts import TextData, load_text
from evokernels.tasks.transformer import CharTransformer

__all__ = [
    "TASKS",
    "Batches",
    "CharTransformer",
    "CifarCNN",
    "ConvNet",
    "Draw",
    "ImageData",
    "NativeNetwork",
    "SmallCNN",
    "Task",
    "TaskData",
    "TextData",
    "get_task",
    "load_images",
    "load_text",
    "stack_draws",
    "training_batches",
]
