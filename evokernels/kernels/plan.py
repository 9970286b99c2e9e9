"""What an optimizer and a backend say to each other: tensors bound once, numbers every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from evokernels.compiler.program import Program

__all__ = ["ARITHMETIC", "Backend", "BoundTensor", "Numbers", "Plan"]

# The dtype in which an update is computed and moments are kept, for each parameter dtype.
ARITHMETIC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Rounding:
    seed: int
    position: int


@dataclass(frozen=True)
class BoundTensor:
    """A parameter, its moments by the name the program gives them, and the program itself."""

    program: Program
    parameter: torch.Tensor
    moments: dict[str, torch.Tensor]
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Numbers:
    """Values for the scalars of a program, in its order; shared by the tensors of a group."""

    program: Program
    values: Sequence[float]
    t: int


class Plan(Protocol):
    """Tensors of a model bound to kernels."""

    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Sequence[int],
        numbers: Sequence[Numbers],
    ) -> None:
        """One step.

        Args:
            gradients: one for each bound tensor, of its shape and dtype; None leaves it alone.
            rows: for each bound tensor the entry of `numbers` that it uses.
            numbers: the scalars, of the program to which the tensors that use them are bound.
        """


class Backend(Protocol):
    """A way to run programs."""

    name: str

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why this backend cannot run a program there, None if it can."""

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """The kernel that runs a program, in words."""

    def bind(self, tensors: Sequence[BoundTensor]) -> Plan:
        """A plan for tensors that `why_not` did not turn down."""
