"""What an optimizer and a backend say to each other: tensors bound once, numbers every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from evokernels.compiler.program import Program
from evokernels.errors import OptimizerError

__all__ = [
    *("ARITHMETIC", "STATE_DTYPES", "Backend", "BoundTensor", "Numbers", "Plan", "Rounding"),
    *("addresses_of", "check_gradient", "layout_key"),
]

# The dtypes in which moments may be stored, for each parameter dtype; the first is the dtype in
# which an update is computed, and what moments are unless something else was asked for.
STATE_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.bfloat16),
}

# The dtype in which an update is computed, for each parameter dtype.
ARITHMETIC = {parameter: state[0] for parameter, state in STATE_DTYPES.items()}


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of what is stored as bfloat16, parameter and moments.

    Attributes:
        seed: of 64 bits; chooses the random bits.
        position: of the parameter in its model, below 2^32; gives it bits of its own.
    """

    seed: int
    position: int


@dataclass(frozen=True)
class BoundTensor:
    """A parameter, its moments by the name the program gives them, and the program itself.

    A moment's dtype says how it is stored: one of `STATE_DTYPES`. Stores are rounded to nearest
    unless `rounding` says otherwise.
    """

    program: Program
    parameter: torch.Tensor
    moments: dict[str, torch.Tensor]
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        allowed = STATE_DTYPES[self.parameter.dtype]
        for name, moment in self.moments.items():
            if moment.dtype not in allowed:
                raise OptimizerError(
                    f"moment {name} of a {self.parameter.dtype} parameter is {moment.dtype}; "
                    f"it may be {', '.join(map(str, allowed))}"
                )


def layout_key(gradient: torch.Tensor) -> tuple:
    """Equal as long as a gradient lies in the same way, wherever it is."""
    return (
        *(gradient.stride(), gradient.shape, gradient.dtype, gradient.is_neg(), gradient.device),
    )


def check_gradient(bound: BoundTensor, gradient: torch.Tensor, key: tuple) -> None:
    """Raises OptimizerError for a gradient that is not as its parameter.

    Args:
        key: its `layout_key`.
    """
    parameter = bound.parameter
    if key[1:] != (parameter.shape, parameter.dtype, False, parameter.device):
        raise OptimizerError(
            f"a gradient is {gradient.dtype} of shape {tuple(gradient.shape)} on "
            f"{gradient.device}, its parameter {parameter.dtype} of shape "
            f"{tuple(parameter.shape)} on {parameter.device}; both must be the same, and "
            "no negated view"
        )


def addresses_of(gradients: Sequence[torch.Tensor | None]) -> list[int | None]:
    """Where gradients are, None where there is none; OptimizerError if one has no memory."""
    addresses = [None if g is None else g.data_ptr() for g in gradients]
    # null: freed storage, or zeros that torch has not written; a kernel would pass them over
    if any(address == 0 and g.numel() for address, g in zip(addresses, gradients, strict=True)):
        raise OptimizerError("a gradient has no memory: its storage was freed or never written")
    return addresses


class Numbers(NamedTuple):
    """Values for the scalars of a program, in its order; shared by the tensors of a group.

    Attributes:
        t: number of the step, from 1; stochastic rounding draws other bits in every step.
    """

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
        *,
        clear: bool = False,
    ) -> None:
        """One step.

        Args:
            gradients: one for each bound tensor, of its shape and dtype; None leaves it alone.
            rows: for each bound tensor the entry of `numbers` that it uses.
            numbers: the scalars, of the program to which the tensors that use them are bound.
            clear: whether the gradients become zero.
        """

    def sum_of_squares(self, gradients: Sequence[torch.Tensor | None]) -> float:
        """The sum of the squares of all elements of all gradients, added up in float64."""


class Backend(Protocol):
    """A way to run programs.

    Attributes:
        fused: whether it updates all tensors at once, each read and written once.
    """

    name: str
    fused: bool

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why this backend cannot run a program there, None if it can."""

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """The kernel that runs a program, in words."""

    def bind(self, tensors: Sequence[BoundTensor]) -> Plan:
        """A plan for tensors that `why_not` did not turn down."""
