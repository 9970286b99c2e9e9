"""The two ways to take a step: with numbers worked out here, or by a device that has its own."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evokernels.compiler.lower import Rule
from evokernels.compiler.schedule import schedule_lengths
from evokernels.compiler.terms import log_of
from evokernels.errors import OptimizerError
from evokernels.kernels.cpu import CpuPlan
from evokernels.kernels.device import DeviceBackend, DevicePlan, Scaling, capturing
from evokernels.kernels.plan import Backend, BoundTensor, Numbers, Plan
from evokernels.optim.checks import beta_pair, check_counts, check_numbers, nonnegative

__all__ = ["DevicePart", "HostPart", "Member", "Place"]


@dataclass(frozen=True)
class Member:
    """A parameter that takes part, its group, and what was made of both."""

    parameter: torch.Tensor
    group: dict[str, Any]
    rule: Rule
    backend: Backend | DeviceBackend
    bound: BoundTensor

    @functools.cached_property
    def fixed_inputs(self) -> tuple[float, ...]:
        """The values of `GROUP_INPUTS` from clip to training_steps: others mean binding again."""
        genome = self.rule.genome
        return (
            # a limit that is not there is infinite in the weights of the rule
            genome.clip_value if genome.use_gradient_clipping else 1.0,
            -1.0 if self.group["maximize"] else 1.0,
            *schedule_lengths(genome, self.group["total_steps"]).values(),
            float(self.group["total_steps"]) if self.rule.reads_progress else math.inf,
        )

    @functools.cached_property  # every step asks
    def reads_beta3(self) -> bool:
        """Whether the group has that number, and not only the pair ``betas``."""
        return self.rule.genome.reads_beta3

    @property
    def place(self) -> Place | None:
        """Where its steps are counted, None for here."""
        counted_there = isinstance(self.backend, DeviceBackend)
        return (self.backend, self.bound.parameter.device) if counted_there else None


Gradients = Sequence[torch.Tensor | None]

# A backend that counts steps itself, on one device.
Place = tuple[DeviceBackend, torch.device]


class HostPart:
    """Members whose step counts, and what follows from them, are kept here.

    Args:
        members: at least one.
        steps: how often each was updated: float64, on the CPU; `step` counts.
    """

    def __init__(self, members: Sequence[Member], steps: torch.Tensor) -> None:
        self._members = members
        self._counts = steps.numpy()
        self._expected_counts = self._counts.copy()
        self._present: list[bool] = []
        self._rows: list[int] = []
        self._first_of_row: list[int] = []
        self._plans: list[tuple[Plan, list[int]]] = []
        for backend in dict.fromkeys(member.backend for member in members):
            chosen = [i for i, member in enumerate(members) if member.backend is backend]
            self._plans.append((backend.bind([members[i].bound for i in chosen]), chosen))

    @property
    def plans(self) -> list[Plan]:
        """One for each backend."""
        return [plan for plan, _ in self._plans]

    @property
    def addresses(self) -> ctypes.Array | None:
        """Where the addresses of the gradients go before `repeat`, if the only plan is native."""
        plan, *others = self.plans
        return plan.addresses if isinstance(plan, CpuPlan) and not others else None

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """How often each member was updated, and as this object has counted."""
        return self._counts, self._expected_counts

    def look(self, gradients: Gradients) -> bool:
        """Get ready for a step; whether the same members have gradients as in the last one."""
        present = [gradient is not None for gradient in gradients]
        as_before = present == self._present
        if not as_before or (self._counts != self._expected_counts).any():
            check_counts(self._counts)
            self._rows = []  # tensors with gradients in the same steps keep counting alike
        self._present = present
        if not self._rows:
            self._assign_rows()
        return as_before

    def step(self, gradients: Gradients, scaling: Scaling) -> None:
        """Count the step and update, after `look`."""
        numbers = self._numbers(scaling, lambda: scaling.squares.item())
        # first: Ctrl-C during a native call is raised behind it, when all is updated
        self._counts += self._present
        try:
            for plan, m in self._plans:
                rows = [self._rows[i] for i in m]
                plan.run([gradients[i] for i in m], rows, numbers, clear=scaling.clear)
        except Exception:
            self._counts -= self._present
            raise
        self._expected_counts[:] = self._counts

    def repeat(self, scaling: Scaling, commit: Callable[[bool], None]) -> bool:
        """`step` with gradients as in the last one, whose addresses are in `addresses`.

        Args:
            commit: counts, and tells autograd what was written to.

        Returns:
            Whether it was done.
        """
        (plan,) = self.plans
        numbers = self._numbers(scaling, plan.squares)
        commit(scaling.clear)  # first, as in `step`
        plan.relaunch(numbers, scaling.clear)
        return True

    def squares(self, gradients: Gradients) -> torch.Tensor:
        """The sum of the squares of these gradients: float64, 0-d."""
        squares = [plan.sum_of_squares([gradients[i] for i in m]) for plan, m in self._plans]
        return torch.tensor(sum(squares), dtype=torch.float64, device="cpu")

    def _assign_rows(self) -> None:
        """One row of numbers for each group and step count among the members with gradients."""
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

    def _numbers(self, scaling: Scaling, squares: Callable[[], float]) -> list[Numbers]:
        """The rows of numbers of the next step."""
        step = _step_inputs(scaling, squares)
        return [self._row(i, int(self._counts[i]) + 1, step) for i in self._first_of_row]

    def _row(self, i: int, t: int, step: tuple[float, ...]) -> Numbers:
        """The scalars of step `t` for the members that share group and count with member `i`."""
        member = self._members[i]
        inputs = _group_inputs(member, nonnegative("lr", member.group["lr"]))
        return Numbers(member.rule.program, member.rule.numbers_of_step(t, *step, *inputs), t)


class DevicePart:
    """Members on one device, whose backend counts steps and computes their numbers there.

    Args:
        members: at least one, all of one backend and device.
        steps: how often each was updated: float64, on that device; the kernel counts.
    """

    def __init__(self, members: Sequence[Member], steps: torch.Tensor) -> None:
        self._device = steps.device
        owners = {id(member.group): member for member in members}
        self._owners = list(owners.values())  # one member of each group
        places = {key: place for place, key in enumerate(owners)}
        self._plan = DevicePlan(
            members[0].backend,
            [member.bound for member in members],
            [places[id(member.group)] for member in members],
            [member.rule for member in self._owners],
            steps,
        )
        self._nothing = np.zeros(len(members))
        self.captured = False  # whether a graph may read the plan's tables at any time
        self._captured_rates: list[torch.Tensor] = []  # which it reads as well

    @property
    def plans(self) -> list[DevicePlan]:
        """The plan."""
        return [self._plan]

    @property
    def addresses(self) -> ctypes.Array | None:
        """Where the addresses of the gradients go before `repeat`, if one launch takes them."""
        return self._plan.addresses

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of no meaning: the kernel counts, and what it finds in the state is right."""
        return self._nothing, self._nothing

    def look(self, gradients: Gradients) -> bool:
        """Get ready for a step; whether gradients lie as in the last one."""
        self._hyperparameters = self._current_hyperparameters()
        return self._plan.look(gradients)

    def step(self, gradients: Gradients, scaling: Scaling) -> None:
        """Count the step and update, all of it on the device, after `look`."""
        self._plan.update(gradients, self._hyperparameters, scaling.on(self._device))

    def repeat(self, scaling: Scaling, commit: Callable[[bool], None]) -> bool:
        """As that of `HostPart`."""
        if scaling.clear and not self._plan.lie_apart:
            return False
        hyperparameters = self._current_hyperparameters()
        if scaling.max_norm < math.inf:
            scaling = scaling._replace(squares=self._plan.squares())
        commit(scaling.clear)
        self._plan.relaunch(hyperparameters, scaling.on(self._device))
        return True

    def squares(self, gradients: Gradients) -> torch.Tensor:
        """The sum of the squares of these gradients: float64, 0-d, on the device.

        Args:
            gradients: those of the last `look`, or None in the place of some.
        """
        return self._plan.squares([gradient is not None for gradient in gradients])

    def _current_hyperparameters(self) -> list[tuple[float | torch.Tensor, ...]]:
        """For each group of the plan its values of `GROUP_INPUTS`."""
        captured = capturing(self._device)
        if captured:
            for member in self._owners:
                check_numbers(member.group)
        inputs = [
            _group_inputs(member, self._learning_rate(member.group["lr"], captured))
            for member in self._owners
        ]
        if captured:
            self.captured = True
            self._captured_rates += (rate for rate, *_ in inputs)
        return inputs

    def _learning_rate(self, lr: Any, captured: bool) -> float | torch.Tensor:
        """A tensor that the kernel reads, where it can; otherwise its value."""
        if (
            isinstance(lr, torch.Tensor)
            and lr.device == self._device
            and lr.dtype in (torch.float32, torch.float64)
            and lr.numel() == 1
        ):
            return lr
        if captured:
            was = f"a {lr.dtype} tensor on {lr.device}" if isinstance(lr, torch.Tensor) else lr
            raise OptimizerError(
                f"lr is {was}, which a captured step would keep for ever, whatever a scheduler "
                f"sets; make it a tensor of one number: torch.tensor(1e-3, device='{self._device}')"
            )
        return nonnegative("lr", lr)


def _group_inputs(member: Member, lr: float | torch.Tensor) -> tuple[float | torch.Tensor, ...]:
    """What a member's group brings to a step: the values of `GROUP_INPUTS`."""
    group = member.group
    beta1, beta2 = beta_pair(group["betas"])
    return (
        lr,
        nonnegative("weight_decay", group["weight_decay"]),
        beta1,
        beta2,
        log_of(beta1),
        log_of(beta2),
        nonnegative("eps", group["eps"]),
        *member.fixed_inputs,
        *(_beta3(group) if member.reads_beta3 else _NO_BETA3),
    )


_NO_BETA3 = (0.0, -math.inf)


def _beta3(group: dict[str, Any]) -> tuple[float, float]:
    """It and its logarithm."""
    beta3 = nonnegative("beta3", group["beta3"], 1.0)
    return beta3, log_of(beta3)


def _step_inputs(scaling: Scaling, squares: Callable[[], float]) -> tuple[float, ...]:
    """What a step has besides its number: the values of `STEP_INPUTS`."""
    return (
        1.0 if scaling.grad_scale is None else scaling.grad_scale.item(),
        scaling.max_norm,
        squares() if scaling.max_norm < math.inf else 0.0,
    )
