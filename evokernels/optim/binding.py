"""Parameters and their state, bound to plans: the part of a step that knows which tensors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from evokernels.kernels.device import DevicePlan, Scaling
from evokernels.kernels.memory import memory_keys
from evokernels.kernels.plan import Plan
from evokernels.kernels.watch import Watch, can_watch
from evokernels.optim.checks import check_not_captured, check_parameter
from evokernels.optim.parts import DevicePart, Gradients, HostPart, Member, Place
from evokernels.optim.sharding import PLAIN, SumOverShards, local_gradient

__all__ = ["Binding"]

_EXPECTED = PLAIN | {type(None)}  # classes of gradients that need no closer look

# Options of a group that are looked at when parameters are bound: others mean binding again.
_STRUCTURE = (
    *("genome", "total_steps", "maximize"),
    *("state_dtype", "stochastic_rounding", "seed"),
)


class Binding:
    """Parameters and their state, bound to plans; valid until one of them moves in memory.

    Args:
        members: the parameters that have state.
        waiting: those that get theirs with their first gradient.
        steps: for each place where members are counted, how often they were updated, in their
            order: one float64 tensor, of which every ``state["step"]`` is a view, so that counting
            is one operation for the whole model.
    """

    def __init__(
        self,
        members: Sequence[Member],
        waiting: Sequence[torch.Tensor],
        steps: Mapping[Place | None, torch.Tensor],
    ) -> None:
        self._waiting = waiting
        self._foundation: list[Any] = []
        self._parameters = [member.parameter for member in members]
        self._local = [member.bound.parameter for member in members]
        self._sharded = [i for i, p in enumerate(self._parameters) if p is not self._local[i]]
        self._sum_over_shards = SumOverShards(self._parameters)
        self._keys = memory_keys(self._local)
        # moments and counts are told by their address alone: their memory is kept, so nothing else
        # moves in there; share_memory_ and sending a state to another process move it
        moments = [moment for m in members for moment in m.bound.moments.values()]
        self._kept = [*moments, *steps.values()]
        self._storages = [tensor.untyped_storage() for tensor in self._kept]
        self._addresses = [tensor.data_ptr() for tensor in self._kept]
        self._parts: list[tuple[HostPart | DevicePart, list[int]]] = []
        for place, counts in sorted(steps.items(), key=lambda item: item[0] is not None):
            chosen = [i for i, member in enumerate(members) if member.place == place]
            part = HostPart if place is None else DevicePart
            self._parts.append((part([members[i] for i in chosen], counts), chosen))
        # whether a step reads numbers here: found_inf, grad_scale, the norm
        self.needs_host = None in steps
        self._watch: Watch | None = None
        tensors = [*self._parameters, *waiting, *self._kept]
        one = len(self._parts) == 1 and self._parts[0][0].addresses is not None
        self._can_watch = one and can_watch(tensors)

    @property
    def plans(self) -> list[Plan | DevicePlan]:
        """One for each backend and device."""
        return [plan for part, _ in self._parts for plan in part.plans]

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph may read the plans' tables at any time."""
        return any(isinstance(part, DevicePart) and part.captured for part, _ in self._parts)

    def rest_on(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        """Take the optimizer's groups and state, as they are now, for what was bound."""
        self._foundation = _foundation(groups, state)

    def is_current(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether all is as it was bound, and none of the waiting parameters has a gradient."""
        now = _foundation(groups, state)
        return (
            len(now) == len(self._foundation)
            and all(map(operator.is_, now, self._foundation))
            # FSDP gives a parameter another local tensor when its module is moved or loaded
            and all(self._parameters[i]._local_tensor is self._local[i] for i in self._sharded)
            and memory_keys(self._local) == self._keys
            and [tensor.data_ptr() for tensor in self._kept] == self._addresses
            and all(parameter.grad is None for parameter in self._waiting)
        )

    def repeat(
        self, groups: list[dict[str, Any]], state: Mapping[Any, Any], scaling: Scaling
    ) -> bool:
        """`step`, if nothing but numbers is another than in the last one.

        Returns False, with nothing done, if anything is: `is_current` and `step` find out what.
        """
        watch = self._watch
        if watch is None or not watch.unchanged(groups, state):
            return False
        part, _ = self._parts[0]
        return part.repeat(scaling, watch.commit)

    def step(self, scaling: Scaling) -> None:
        """Count the step and update.

        Args:
            scaling: what is done to all gradients; `squares` is filled in here. Unless
                `needs_host`, nothing in it is read here: a step then waits for no device.
        """
        self._watch = None
        gradients = [parameter.grad for parameter in self._parameters]
        for i in self._sharded:
            gradients[i] = local_gradient(self._parameters[i])
        if self.needs_host:
            check_not_captured(self._parameters)
        strange = set(map(type, gradients)) - _EXPECTED
        if strange or not {g.layout for g in gradients if g is not None} <= {torch.strided}:
            for parameter in self._parameters:
                check_parameter(parameter)
        # before one is updated: a gradient or a number may be wrong. Members on the host, which
        # come first, are looked at more closely within their step, before they are updated
        as_before = [part.look([gradients[i] for i in members]) for part, members in self._parts]
        if scaling.max_norm < math.inf:
            squares = self._sum_over_shards(lambda members: self._squares(gradients, members))
            scaling = scaling._replace(squares=squares)
        for part, members in self._parts:
            part.step([gradients[i] for i in members], scaling)
        self._tell_dtensors(gradients, scaling.clear)
        present = [gradient for gradient in gradients if gradient is not None]
        if all(as_before) and self._can_watch and can_watch(present):
            part, _ = self._parts[0]
            self._watch = Watch(
                self._parameters,
                gradients,
                self._kept,
                self._waiting,
                *part.counts,
                _STRUCTURE,
                self._foundation,
                part.addresses,
            )

    def _squares(self, gradients: Gradients, chosen: Collection[int]) -> torch.Tensor:
        """The sum of the squares of the gradients of some members: float64, 0-d.

        On the device of the first part: on the CPU if one waits for it there.
        """
        sums = [
            part.squares([gradients[i] if i in chosen else None for i in members])
            for part, members in self._parts
        ]
        if not sums:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        return functools.reduce(torch.add, (value.to(sums[0].device) for value in sums))

    def _tell_dtensors(self, gradients: Gradients, clear: bool) -> None:
        """What was done to their local parts."""
        changed = [self._parameters[i] for i in self._sharded if gradients[i] is not None]
        torch.autograd.graph.increment_version(changed)
        if clear:  # the local part may have been a copy, gathered from other processes
            for parameter in changed:
                parameter.grad.zero_()


def _foundation(groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> list[Any]:
    """All objects that a binding rests on; others in their place mean that it is out of date.

    csrc/look.c walks them in the same order.
    """
    objects: list[Any] = []
    for group in groups:
        objects += (group, *(group[key] for key in _STRUCTURE), *group["params"])
    for values in state.values():
        objects += values.values()
    return objects
