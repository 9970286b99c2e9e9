"""Parameters and their state, bound to plans: the part of a step that knows which tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evokernels.compiler.expr import compiled
from evokernels.compiler.lower import Rule
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.compiler.terms import GRADIENT_FACTOR, scalar_values
from evokernels.kernels.cpu import CpuPlan
from evokernels.kernels.memory import memory_keys
from evokernels.kernels.plan import Backend, BoundTensor, Numbers, Plan
from evokernels.kernels.watch import Watch, can_watch
from evokernels.optim.checks import beta_pair, check_counts, check_parameter, nonnegative
from evokernels.optim.sharding import PLAIN, SumOverShards, local_gradient

__all__ = ["Binding", "Member"]

_EXPECTED = PLAIN | {type(None)}  # classes of gradients that need no closer look

# Options of a group that are looked at when parameters are bound: others mean binding again.
_STRUCTURE = (
    *("genome", "total_steps", "maximize"),
    *("state_dtype", "stochastic_rounding", "seed"),
)


@dataclass(frozen=True)
class Member:
    """A parameter that takes part, its group, and what was made of both."""

    parameter: torch.Tensor
    group: dict[str, Any]
    rule: Rule
    backend: Backend
    bound: BoundTensor


class Binding:
    """Parameters and their state, bound to plans; valid until one of them moves in memory.

    Args:
        members: the parameters that have state.
        waiting: those that get theirs with their first gradient.
        steps: how often each member was updated: one array, of which every ``state["step"]`` is a
            view, so that counting is one operation for the whole model.
        groups, state: the optimizer's.
    """

    def __init__(
        self,
        members: Sequence[Member],
        waiting: Sequence[torch.Tensor],
        steps: torch.Tensor,
        groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
    ) -> None:
        self._members = members
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
        self._kept = [*moments, steps]
        self._storages = [tensor.untyped_storage() for tensor in self._kept]
        self._addresses = [tensor.data_ptr() for tensor in self._kept]
        self._counts = steps.numpy()
        self._expected_counts = self._counts.copy()
        self._present: list[bool] = []
        self._rows: list[int] = []
        self._first_of_row: list[int] = []
        self._plans: list[tuple[Plan, list[int]]] = []
        for backend in dict.fromkeys(member.backend for member in members):
            chosen = [i for i, member in enumerate(members) if member.backend is backend]
            self._plans.append((backend.bind([members[i].bound for i in chosen]), chosen))
        self._watch: Watch | None = None
        tensors = [*self._parameters, *waiting, *self._kept]
        one_native = [type(plan) for plan, _ in self._plans] == [CpuPlan]
        self._can_watch = one_native and can_watch(tensors)

    @property
    def plans(self) -> list[Plan]:
        """One for each backend."""
        return [plan for plan, _ in self._plans]

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
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
        grad_scale: float,
        max_grad_norm: float | None,
        clear: bool,
    ) -> bool:
        """`step`, if nothing but numbers is another than in the last one.

        Returns False, with nothing done, if anything is: `is_current` and `step` find out what.
        """
        watch = self._watch
        if watch is None or not watch.unchanged(groups, state):
            return False
        plan, _ = self._plans[0]
        factor = _gradient_factor(grad_scale, max_grad_norm, plan.squares)
        numbers = [self._numbers(i, int(self._counts[i]) + 1, factor) for i in self._first_of_row]
        # first, since Ctrl-C during the native call is raised behind it, when all is updated
        watch.commit(clear)
        plan.relaunch(numbers, clear)
        return True

    def step(self, grad_scale: float, max_grad_norm: float | None, clear: bool) -> None:
        """Count the step and update.

        Args:
            grad_scale: what all gradients were multiplied with, and are divided by.
            max_grad_norm: limit on the norm of all gradients together, after that.
            clear: whether gradients become zero.
        """
        self._watch = None
        gradients = [parameter.grad for parameter in self._parameters]
        for i in self._sharded:
            gradients[i] = local_gradient(self._parameters[i])
        strange = set(map(type, gradients)) - _EXPECTED
        if strange or not {g.layout for g in gradients if g is not None} <= {torch.strided}:
            for parameter in self._parameters:
                check_parameter(parameter)
        present = [gradient is not None for gradient in gradients]
        as_before = present == self._present
        if not as_before or (self._counts != self._expected_counts).any():
            check_counts(self._counts)
            self._rows = []  # tensors with gradients in the same steps keep counting alike
        self._present = present
        if not self._rows:
            self._assign_rows()
        factor = _gradient_factor(
            grad_scale,
            max_grad_norm,
            lambda: self._sum_over_shards(lambda members: self._squares(gradients, members)),
        )
        numbers = [self._numbers(i, int(self._counts[i]) + 1, factor) for i in self._first_of_row]
        self._counts += present  # first, as in `repeat`
        try:
            for plan, m in self._plans:
                plan.run(
                    [gradients[i] for i in m], [self._rows[i] for i in m], numbers, clear=clear
                )
        except Exception:
            self._counts -= present
            raise
        self._expected_counts[:] = self._counts
        self._tell_dtensors(gradients, clear)
        if as_before and self._can_watch and can_watch([g for g in gradients if g is not None]):
            self._watch = Watch(
                self._parameters,
                gradients,
                self._kept,
                self._waiting,
                self._counts,
                self._expected_counts,
                _STRUCTURE,
                self._foundation,
                self._plans[0][0].addresses,
            )

    def _squares(self, gradients: Sequence[torch.Tensor | None], chosen: Collection[int]) -> float:
        """The sum of the squares of some gradients."""
        return sum(
            plan.sum_of_squares([gradients[i] if i in chosen else None for i in members])
            for plan, members in self._plans
        )

    def _tell_dtensors(self, gradients: Sequence[torch.Tensor | None], clear: bool) -> None:
        """What was done to their local parts."""
        changed = [self._parameters[i] for i in self._sharded if gradients[i] is not None]
        torch.autograd.graph.increment_version(changed)
        if clear:  # the local part may have been a copy, gathered from other processes
            for parameter in changed:
                parameter.grad.zero_()

    def _assign_rows(self) -> None:
        """One row of numbers for each group and step count among the tensors with gradients."""
        rows: dict[tuple[int, float], int] = {}
        self._rows, self._first_of_row = [], []
        for i, (member, present) in enumerate(zip(self._members, self._present, strict=True)):
            if not present:
                self._rows.append(0)
                continue
            row = rows.setdefault((id(member.group), self._counts[i]), len(rows))
            if row == len(self._first_of_row):
                self._first_of_row.append(i)
            self._rows.append(row)

    def _numbers(self, i: int, t: int, factor: float) -> Numbers:
        """The scalars of step `t` for the tensors that share group and count with tensor `i`."""
        group, rule = self._members[i].group, self._members[i].rule
        lr = nonnegative("lr", group["lr"])
        beta1, beta2 = beta_pair(group["betas"])
        values = scalar_values(
            lr=lr * learning_rate_factor(rule.genome, t - 1, group["total_steps"]),
            weight_decay=nonnegative("weight_decay", group["weight_decay"]),
            beta1=beta1,
            beta2=beta2,
            eps=nonnegative("eps", group["eps"]),
            clip=rule.genome.clip_value,
            t=t,
            gradient_factor=-factor if group["maximize"] else factor,
        )
        return Numbers(rule.program, rule.numbers(**values), t)


_factor = compiled(GRADIENT_FACTOR)


def _gradient_factor(
    grad_scale: float, max_grad_norm: float | None, squares: Callable[[], float]
) -> float:
    """What every gradient is multiplied by, direction aside."""
    limited = max_grad_norm is not None
    return _factor(
        direction=1.0,
        grad_scale=grad_scale,
        max_norm=max_grad_norm if limited else math.inf,
        squares=squares() if limited else 0.0,
    )[0]


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
