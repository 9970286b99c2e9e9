"""Parameters and their state, bound to plans: the part of a step that knows which tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from evokernels.compiler.lower import lower
from evokernels.compiler.terms import scalar_values
from evokernels.kernels.memory import memory_keys
from evokernels.kernels.plan import Backend, BoundTensor, Numbers, Plan
from evokernels.optim.checks import check_parameter, nonnegative
from evokernels.optim.sharding import PLAIN, local_gradient
from evokernels.schedule import learning_rate_factor

__all__ = ["Binding", "foundation"]

_EXPECTED = PLAIN | {type(None)}  # classes of gradients that need no closer look


class Binding:
    """Parameters and their state, bound to plans; valid until one of them moves in memory."""

    def __init__(
        self,
        parameters: list[torch.Tensor],
        bound: list[BoundTensor],
        groups: list[dict[str, Any]],
        waiting: list[torch.Tensor],
        backends: list[Backend],
        steps: torch.Tensor,
        foundation: list[Any],
    ) -> None:
        self.parameters = parameters
        self._local = [b.parameter for b in bound]
        self._sharded = [i for i, p in enumerate(parameters) if p is not self._local[i]]
        self._groups = groups
        self._waiting = waiting
        self._foundation = foundation
        self._keys = memory_keys(self._local)
        # a moment is told by its address alone: its memory is kept, so nothing else moves in there
        self._moments = [moment for b in bound for moment in b.moments.values()]
        self._kept = [moment.untyped_storage() for moment in self._moments]
        self._addresses = [moment.data_ptr() for moment in self._moments]
        # one array for all counts, of which every state["step"] is a view: counting is one
        # operation for the whole model
        self._counts = steps.numpy()
        self._counted = self._counts.tobytes()
        self._rules = [lower(group["genome"]) for group in groups]
        self._present: list[bool] = []
        self._rows: list[int] = []
        self._first_of_row: list[int] = []
        self.plans: list[tuple[Plan, list[int]]] = []
        for backend in dict.fromkeys(backends):
            members = [i for i, b in enumerate(backends) if b is backend]
            self.plans.append((backend.bind([bound[i] for i in members]), members))

    def is_current(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether all is as it was bound, and none of the waiting parameters has a gradient."""
        now = foundation(groups, state)
        return (
            len(now) == len(self._foundation)
            and all(map(operator.is_, now, self._foundation))
            # FSDP gives a parameter another local tensor when its module is moved or loaded
            and all(self.parameters[i]._local_tensor is self._local[i] for i in self._sharded)
            and memory_keys(self._local) == self._keys
            and [moment.data_ptr() for moment in self._moments] == self._addresses
            and all(parameter.grad is None for parameter in self._waiting)
        )

    def step(self) -> None:
        """Count the step and update."""
        gradients = [parameter.grad for parameter in self.parameters]
        for i in self._sharded:
            gradients[i] = local_gradient(self.parameters[i])
        present = [gradient is not None for gradient in gradients]
        strange = set(map(type, gradients)) - _EXPECTED
        if strange or not {g.layout for g in gradients if g is not None} <= {torch.strided}:
            for parameter in self.parameters:
                check_parameter(parameter)
        if present != self._present or self._counts.tobytes() != self._counted:
            self._present = present
            self._rows = []  # tensors with gradients in the same steps keep counting alike
        counted = 1.0 if all(present) else present  # a number costs a fifth of a list
        self._counts += counted
        try:
            if not self._rows:
                self._assign_rows()
            numbers = [self._numbers(i) for i in self._first_of_row]
            for plan, members in self.plans:
                plan.run([gradients[i] for i in members], [self._rows[i] for i in members], numbers)
        except Exception:
            self._counts -= counted
            raise
        if self._sharded:  # a DTensor counts its versions apart from its local part
            torch.autograd.graph.increment_version(
                [self.parameters[i] for i in self._sharded if gradients[i] is not None]
            )
        self._counted = self._counts.tobytes()

    def _assign_rows(self) -> None:
        """One row of numbers for each group and step count among the tensors with gradients."""
        rows: dict[tuple[int, float], int] = {}
        self._rows, self._first_of_row = [], []
        for i, (group, present) in enumerate(zip(self._groups, self._present, strict=True)):
            if not present:
                self._rows.append(0)
                continue
            row = rows.setdefault((id(group), self._counts[i]), len(rows))
            if row == len(self._first_of_row):
                self._first_of_row.append(i)
            self._rows.append(row)

    def _numbers(self, i: int) -> Numbers:
        """The scalars of this step for the tensors that share group and count with tensor `i`."""
        group, rule, t = self._groups[i], self._rules[i], int(self._counts[i])
        genome = rule.genome
        lr = nonnegative("lr", group["lr"])
        beta1, beta2 = group["betas"]
        values = scalar_values(
            lr=lr * learning_rate_factor(genome, t - 1, group["total_steps"]),
            weight_decay=group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            clip=genome.clip_value,
            t=t,
        )
        return Numbers(rule.program, rule.numbers(**values))


def foundation(groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> list[Any]:
    """All objects that a binding rests on; others in their place mean that it is out of date."""
    objects: list[Any] = []
    for group in groups:
        objects += (group, group["genome"], *group["params"])
    for values in state.values():
        objects += values.values()
    return objects
