"""Parameters and their state, bound to plans: the part of a step that knows which tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from evokernels.kernels.device import DevicePlan, Scaling
from evokernels.kernels.memory import memory_keys
from evokernels.kernels.plan import Plan
from evokernels.kernels.watch import Watch, can_watch
from evokernels.optim.checks import check_not_captured, check_parameter
from evokernels.optim.parts import DevicePart, Gradients, HostPart, Member, Place, gradient_factor
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
        groups, state: the optimizer's.
    """

    def __init__(
        self,
        members: Sequence[Member],
        waiting: Sequence[torch.Tensor],
        steps: Mapping[Place | None, torch.Tensor],
        groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
    ) -> None:
        self._waiting = waiting
        self._foundation = _foundation(groups, state)
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
        self._host: tuple[HostPart, list[int]] | None = None
        self._devices: list[tuple[DevicePart, list[int]]] = []
        for place, counts in steps.items():
            chosen = [i for i, member in enumerate(members) if member.place == place]
            mine = [members[i] for i in chosen]
            if place is None:
                self._host = HostPart(mine, counts), chosen
            else:
                self._devices.append((DevicePart(mine, counts), chosen))
        self._watch: Watch | None = None
        tensors = [*self._parameters, *waiting, *self._kept]
        native = self._host and not self._devices and self._host[0].native_plan
        self._native_plan = native if native and can_watch(tensors) else None

    @property
    def plans(self) -> list[Plan | DevicePlan]:
        """One for each backend and device."""
        host = self._host[0].plans if self._host else []
        return [*host, *(part.plan for part, _ in self._devices)]

    @property
    def needs_host(self) -> bool:
        """Whether a step reads numbers on the host: found_inf, grad_scale, the norm."""
        return self._host is not None

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
        watch, plan = self._watch, self._native_plan
        if watch is None or not watch.unchanged(groups, state):
            return False
        part, _ = self._host
        numbers = part.numbers(_factor(scaling, plan.squares))
        # first, since Ctrl-C during the native call is raised behind it, when all is updated
        watch.commit(scaling.clear)
        plan.relaunch(numbers, scaling.clear)
        return True

    def step(self, scaling: Scaling) -> None:
        """Count the step and update.

        Args:
            scaling: what is done to all gradients; `squares` is filled in here. Without host
                members nothing in it is read here: a step then waits for no device.
        """
        self._watch = None
        gradients = [parameter.grad for parameter in self._parameters]
        for i in self._sharded:
            gradients[i] = local_gradient(self._parameters[i])
        if self._host:
            check_not_captured(self._parameters)
        strange = set(map(type, gradients)) - _EXPECTED
        if strange or not {g.layout for g in gradients if g is not None} <= {torch.strided}:
            for parameter in self._parameters:
                check_parameter(parameter)
        # first, all that can fail
        as_before = self._host is not None and self._host[0].look(_of(gradients, self._host[1]))
        if len(self.plans) > 1:
            for part, chosen in self._devices:
                part.plan.look(_of(gradients, chosen))
        if scaling.max_norm < math.inf:
            squares = self._sum_over_shards(lambda members: self._squares(gradients, members))
            scaling = scaling._replace(squares=squares)
        if self._host:
            part, chosen = self._host
            factor = _factor(scaling, lambda: scaling.squares.item())
            part.step(_of(gradients, chosen), factor, scaling.clear)
        for part, chosen in self._devices:
            part.step(_of(gradients, chosen), scaling)
        self._tell_dtensors(gradients, scaling.clear)
        if as_before and self._native_plan and can_watch([g for g in gradients if g is not None]):
            self._watch = Watch(
                self._parameters,
                gradients,
                self._kept,
                self._waiting,
                *self._host[0].counts,
                _STRUCTURE,
                self._foundation,
                self._native_plan.addresses,
            )

    def _squares(self, gradients: Gradients, members: Collection[int]) -> torch.Tensor:
        """The sum of the squares of the gradients of some members: float64, 0-d.

        On the CPU if a host part waits for it, else on the device of the first part.
        """
        chosen = [g if i in members else None for i, g in enumerate(gradients)]
        sums = []
        if self._host:
            part, mine = self._host
            squares = part.squares(_of(chosen, mine))
            sums.append(torch.tensor(squares, dtype=torch.float64, device="cpu"))
        sums += (part.plan.sum_of_squares(_of(chosen, mine)) for part, mine in self._devices)
        return sum(value.to(sums[0].device) for value in sums)

    def _tell_dtensors(self, gradients: Gradients, clear: bool) -> None:
        """What was done to their local parts."""
        changed = [self._parameters[i] for i in self._sharded if gradients[i] is not None]
        torch.autograd.graph.increment_version(changed)
        if clear:  # the local part may have been a copy, gathered from other processes
            for parameter in changed:
                parameter.grad.zero_()


def _of(gradients: Gradients, members: Sequence[int]) -> list[torch.Tensor | None]:
    return [gradients[i] for i in members]


def _factor(scaling: Scaling, squares: Callable[[], float]) -> float:
    """What every gradient is multiplied with, direction aside."""
    limited = scaling.max_norm < math.inf
    if scaling.grad_scale is None and not limited:
        return 1.0
    scale = 1.0 if scaling.grad_scale is None else scaling.grad_scale.item()
    return gradient_factor(scale, scaling.max_norm, squares() if limited else 0.0)


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
