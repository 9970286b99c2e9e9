"""The eager backend: a program run line by line with torch operations, on any device."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from evokernels.compiler.program import Program, interpret
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers

__all__ = ["EagerBackend"]


def _sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), x, x.sign())  # torch.sign(nan) is 0


def _weigh(weight: float, x: torch.Tensor) -> torch.Tensor | float:
    return weight * x if weight != 0 else 0.0


# compiler/ops.py, in torch
_MEANINGS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sign": _sign,
    "clamp": torch.clamp,
    "weigh": _weigh,
}


class EagerBackend:
    """Runs everything, one torch call an operation."""

    name = "eager"

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never turns anything down that the optimizer accepts."""
        return None

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """How many torch calls a tensor costs."""
        return f"{len(program.lines)} torch operations a tensor, in {ARITHMETIC[dtype]}"

    def bind(self, tensors: Sequence[BoundTensor]) -> _EagerPlan:
        """A plan over these tensors."""
        return _EagerPlan(tensors)


class _EagerPlan:
    def __init__(self, tensors: Sequence[BoundTensor]) -> None:
        self._tensors = tensors

    @torch.no_grad()
    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Sequence[int],
        numbers: Sequence[Numbers],
    ) -> None:
        for bound, gradient, row in zip(self._tensors, gradients, rows, strict=True):
            if gradient is None:
                continue
            arithmetic = ARITHMETIC[bound.parameter.dtype]
            inputs = {"p": bound.parameter.to(arithmetic), "g": gradient.to(arithmetic)}
            inputs.update(bound.moments)
            results = interpret(bound.program, inputs, numbers[row].values, _MEANINGS)
            bound.parameter.copy_(results.pop("p"))
            for name, value in results.items():
                bound.moments[name].copy_(value)
