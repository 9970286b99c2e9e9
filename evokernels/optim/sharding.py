"""DTensors: parameters of which each process holds a part, as FSDP2 and tensor parallelism make.

A kernel sees the local part alone, which is a plain tensor; moments stay DTensors in the state, so
that torch.distributed.checkpoint saves and reshards them. Nothing here imports
torch.distributed.tensor (0.7 s): where nobody else has, there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
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
    "shard_number",
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
    """Whether a tensor's address is null: a class that only wraps others, or storage was freed."""
    return tensor.numel() > 0 and tensor.data_ptr() == 0


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


def shard_number(tensor: torch.Tensor) -> int:
    """Which part of a tensor this process holds: 0 for all of it, one number for equal parts."""
    number = 0
    if is_dtensor(tensor):
        mesh = tensor.device_mesh
        for dimension, part in enumerate(tensor.placements):
            if not part.is_replicate():
                number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


class SumOverShards:
    """A sum over the whole model, as norms need it, of which this process knows its parts.

    What is said of a DTensor tells of its local part: it is added up over the processes that hold
    other parts, and counted once where they hold the same. Plain parameters are the same in every
    process. One collective for each mesh dimension over which anything is sharded: one for FSDP2.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._plain = {i for i, p in enumerate(parameters) if not is_dtensor(p)}
        # mesh → which of its dimensions a tensor is sharded over → positions of such tensors
        self._meshes: dict[Any, dict[tuple[bool, ...], set[int]]] = {}
        for i, parameter in enumerate(parameters):
            if is_dtensor(parameter):
                split = tuple(not placement.is_replicate() for placement in parameter.placements)
                patterns = self._meshes.setdefault(parameter.device_mesh, {})
                patterns.setdefault(split, set()).add(i)

    def __call__(self, local_sum: Callable[[Collection[int]], torch.Tensor]) -> torch.Tensor:
        """The sum, the same bits in every process, on the device of the local ones.

        Every process must call it, whether or not it has gradients.

        Args:
            local_sum: the sum over the parameters at the given positions, as far as they are here:
                float64, 0-d.
        """
        total = local_sum(self._plain) if self._plain or not self._meshes else None
        for mesh, patterns in self._meshes.items():
            sums = [local_sum(members) for members in patterns.values()]
            for dimension in range(mesh.ndim):
                split = [k for k, pattern in enumerate(patterns) if pattern[dimension]]
                if split and mesh.size(dimension) > 1:
                    # parameters may wait on the CPU while their processes talk over GPUs
                    part = torch.stack([sums[k] for k in split]).to(mesh.device_type)
                    torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
                    for k, value in zip(split, part.unbind(), strict=True):
                        sums[k] = value.to(sums[k].device)
            total = sum(sums) if total is None else total + sum(sums)
        return total
