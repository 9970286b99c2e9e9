"""What a network costs: its parameters, and the arithmetic that an image takes."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from evokernels.architecture import Architecture
from evokernels.tasks.registry import get_task

__all__ = ["Cost", "cost_of", "own_cost"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a network.

    Attributes:
        parameters: numbers that are trained.
        multiply_adds: of convolutions and linear layers, forwards, for one image.
    """

    parameters: int
    multiply_adds: int


@functools.cache  # a search asks again for everybody who stays
def cost_of(architecture: Architecture, task_name: str) -> Cost:
    """Of what an architecture becomes on a task; no data are loaded.

    Raises:
        ArchitectureError: the task has no images, or its classifier alone has more than
            ``max_parameters``.
        DatasetError: there is no such task.
    """
    task = get_task(task_name)
    with torch.device("meta"):
        return _measured(task.build(architecture), task.shape)


@functools.cache
def own_cost(task_name: str) -> Cost:
    """Of a task's own network.

    Raises:
        ArchitectureError: the task has no images.
        DatasetError: there is no such task.
    """
    task = get_task(task_name)
    task.decode(Architecture())  # says so where there are no images
    with torch.device("meta"):
        return _measured(task.model(task.classes), task.shape)


def _measured(model: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """Of a network without memory, by having it compute nothing at all."""
    # imported here: it takes a quarter of a second, which every worker would pay
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)  # a multiply-add is two
