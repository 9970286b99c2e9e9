"""What genomes are trained on: images or text in memory, its batches and the networks."""

from evokernels.tasks.batches import Batches, Draw, TaskData, stack_draws, training_batches
from evokernels.tasks.costs import Cost, cost_of, own_cost
from evokernels.tasks.datasets import load_images
from evokernels.tasks.decoding import Decoded, build, decode
from evokernels.tasks.images import ImageData
from evokernels.tasks.models import CifarCNN, ConvNet, SmallCNN
from evokernels.tasks.native_network import NativeNetwork
from evokernels.tasks.registry import TASKS, Task, get_task
from evokernels.tasks.texts import TextData, load_text
from evokernels.tasks.transformer import CharTransformer

__all__ = [
    "TASKS",
    "Batches",
    "CharTransformer",
    "CifarCNN",
    "ConvNet",
    "Cost",
    "Decoded",
    "Draw",
    "ImageData",
    "NativeNetwork",
    "SmallCNN",
    "Task",
    "TaskData",
    "TextData",
    "build",
    "cost_of",
    "decode",
    "get_task",
    "load_images",
    "load_text",
    "own_cost",
    "stack_draws",
    "training_batches",
]
