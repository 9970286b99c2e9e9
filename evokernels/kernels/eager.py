"""The eager backend: a program run line by line with torch operations, on any device."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from evokernels.compiler.program import Program, interpret
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers
from evokernels.kernels.rounding import (
    random_bits,
    round_to_bfloat16,
    round_to_bfloat16_stochastically,
)

__all__ = ["EagerBackend"]

Value = torch.Tensor | float  # scalars are Python numbers


def _sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), x, x.sign())  # torch.sign(nan) is 0


def _fma(a: Value, b: torch.Tensor, c: Value) -> torch.Tensor:
    # torch's add and addcmul round once where the processor can
    if isinstance(c, float):
        return a * b + c
    return torch.add(c, b, alpha=a) if isinstance(a, float) else torch.addcmul(c, a, b)


def _weigh(weight: float, x: torch.Tensor) -> torch.Tensor:
    return weight * x if weight != 0 else torch.zeros_like(x)


def _weigh_add(weight: float, x: torch.Tensor, total: Value) -> Value:
    return _fma(weight, x, total) if weight != 0 else total


def _where(a: Value, b: Value, x: Value, y: Value) -> torch.Tensor:
    like = next(value for value in (a, b, x, y) if isinstance(value, torch.Tensor))
    # all of one dtype: torch would take two Python numbers for float32
    a, b, x, y = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (a, b, x, y))
    return torch.where(a > b, x, torch.where(a <= b, y, math.nan))


# compiler/ops.py, in torch
_MEANINGS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sign": _sign,
    "min": lambda a, b: torch.where(a < b, a, b),
    "max": lambda a, b: torch.where(a > b, a, b),
    "exp": torch.exp,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "where": _where,
    "fma": _fma,
    "weigh": _weigh,
    "weigh_add": _weigh_add,
}


class EagerBackend:
    """Runs everything, one torch call an operation."""

    name = "eager"
    fused = False

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
        *,
        clear: bool = False,
    ) -> None:
        for bound, gradient, row in zip(self._tensors, gradients, rows, strict=True):
            if gradient is None:
                continue
            arithmetic = ARITHMETIC[bound.parameter.dtype]
            tensors = {"p": bound.parameter, **bound.moments}
            inputs = {name: t.to(arithmetic) for name, t in (*tensors.items(), ("g", gradient))}
            results = interpret(bound.program, inputs, numbers[row].values, _MEANINGS)
            for name, value in results.items():
                tensors[name].copy_(_rounded(value, name, bound, numbers[row].t))
        if clear:  # only now: gradients may share memory
            for gradient in gradients:
                if gradient is not None:
                    gradient.zero_()

    @torch.no_grad()
    def sum_of_squares(self, gradients: Sequence[torch.Tensor | None]) -> float:
        return sum(float(g.double().square().sum()) for g in gradients if g is not None)


def _rounded(value: torch.Tensor, name: str, bound: BoundTensor, t: int) -> torch.Tensor:
    """What is stored for "p" or a moment, where torch's own conversion would not do."""
    dtype = (bound.parameter if name == "p" else bound.moments[name]).dtype
    if dtype != torch.bfloat16:
        return value
    if bound.rounding is None:
        return round_to_bfloat16(value)
    random = random_bits(bound.parameter, name, bound.rounding, t)
    return round_to_bfloat16_stochastically(value, random)
