"""DTensors: parameters of which each process holds a part, as FSDP2 and tensor parallelism make.

A kernel sees the local part alone, which is a plain tensor; moments stay DTensors in the state, so
that torch.distributed.checkpoint saves and reshards them. Nothing here imports
torch.distributed.tensor (0.7 s): where nobody else has, there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from evokernels.errors import OptimizerError

__all__ = [
    "PLAIN",
    "SumOverShards",
    "is_dtensor",
    "lacks_memory",
    "local",
    "local_gradient",
    "placement",
]

# Classes that are certainly neither DTensors nor other wrappers around tensors.
PLAIN = frozenset({torch.nn.Parameter, torch.Tensor})


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, replicated ones included."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, without a copy: the tensor if it is plain."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def lacks_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that only wraps others: its address is null."""
    return type(tensor) not in PLAIN and tensor.numel() > 0 and tensor.data_ptr() == 0


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient of the part of a DTensor that this process holds."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if not is_dtensor(gradient):
        raise OptimizerError(
            f"a parameter of shape {tuple(parameter.shape)} is a DTensor, its gradient a plain "
            f"tensor of shape {tuple(gradient.shape)}; both must be the same: make the gradient "
            "with distribute_tensor or DTensor.from_local"
        )
    if gradient._spec.placements != parameter._spec.placements:
        # tensor parallelism leaves sums for later: the gradient of a replicated parameter may be
        # Partial, each process holding one summand
        gradient = gradient.redistribute(placements=parameter._spec.placements)
    part = gradient._local_tensor
    # a collective in flight is another class of tensor, without memory of its own
    return part if type(part) is torch.Tensor else part.wait()


def placement(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Where the parts of a DTensor are; equal if their local parts belong together."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


class SumOverShards:
    """The sum of one number for each of some parameters over the whole model, as norms need it.

    A number of a DTensor tells of its local part: it is added up over the processes that hold
    other parts, and counted once where they hold the same. Plain parameters are the same in every
    process. One collective for each mesh dimension over which anything is sharded: one for FSDP2.

    Attributes:
        groups: positions of parameters that are sharded alike, whose numbers can be added up first.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        groups: dict[Any, list[int]] = {}
        for i, parameter in enumerate(parameters):
            groups.setdefault(_divided(parameter), []).append(i)
        self.groups = list(groups.values())
        # mesh dimension → the groups that are sharded over it
        self._collectives: dict[Any, list[int]] = {}
        for k, divided in enumerate(groups):
            for mesh, dimension in divided:
                self._collectives.setdefault((mesh, dimension), []).append(k)

    def __call__(self, sums: Sequence[float]) -> float:
        """The sum over the model, the same bits in every process that holds parts of it.

        Args:
            sums: one for each group. Every process must call, also without any gradient.
        """
        totals = torch.tensor(sums, dtype=torch.float64)
        for (mesh, dimension), members in self._collectives.items():
            part = totals[members].to(mesh.device_type)
            torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
            totals[members] = part.cpu()
        return totals.sum().item()


def _divided(parameter: torch.Tensor) -> tuple[tuple[Any, int], ...]:
    """The (mesh, dimension) pairs over which a tensor is sharded."""
    if not is_dtensor(parameter):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        (mesh, dimension)
        for dimension, part in enumerate(parameter.placements)
        if not part.is_replicate() and mesh.size(dimension) > 1
    )
