"""What an evolution strategy turns down: options, models and optimizers."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from evokernels.errors import StrategyError
from evokernels.optim.checks import check_parameter
from evokernels.optim.sharding import is_dtensor

__all__ = ["check_groups", "check_optimizer", "positive", "trainable", "whole"]


def whole(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int in [low, high); raises StrategyError naming the option."""
    if (
        not isinstance(value, numbers.Integral)
        or isinstance(value, bool)
        or not low <= value < high
    ):
        raise StrategyError(f"{name} must be a whole number in [{low}, {high}), got {value!r}")
    return int(value)


def positive(name: str, value: Any, most: float) -> float:
    """The value as a float in (0, most]; raises StrategyError naming the option."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= most or not math.isfinite(number):
        allowed = f"positive and at most {most:g}" if most < math.inf else "positive and finite"
        raise StrategyError(f"{name} must be {allowed}, got {value!r}")
    return number


def trainable(model: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Parameters that require gradients, by their position among all parameters of the model.

    Frozen ones are counted, so that freezing one changes no other's noise; tied ones count once.

    Raises:
        StrategyError: no module, or none of its parameters does, or one is a DTensor.
        OptimizerError: one that no kernel can write.
    """
    if not isinstance(model, torch.nn.Module):
        raise StrategyError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {i: p for i, p in enumerate(model.parameters()) if p.requires_grad}
    if not found:
        raise StrategyError(
            f"no parameter of this {type(model).__name__} requires gradients, so there is nothing "
            "to train; call requires_grad_() on those that shall be"
        )
    for parameter in found.values():
        if is_dtensor(parameter):
            raise StrategyError(
                f"a parameter of shape {tuple(parameter.shape)} is a DTensor; keep a whole model "
                "in each process and share out the members instead"
            )
        check_parameter(parameter)
    return found


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises StrategyError for one that cannot step down a gradient that it is given."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise StrategyError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    try:
        # of the class: a scheduler puts a function of another signature in place of the method
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError:
        raise StrategyError(
            f"{type(optimizer).__name__} needs a closure in every step, to compute gradients "
            "again and again; take an optimizer that steps without one"
        ) from None


def check_groups(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    parameters: Mapping[int, torch.nn.Parameter],
) -> None:
    """Raises StrategyError if a step would not move all of these parameters uphill."""
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise StrategyError(
            "the optimizer has maximize=True, but gradients are of the negative fitness, so that "
            "descending them makes it better; set maximize=False"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = {id(p) for p in parameters.values()} - held
    if missing:
        names = ", ".join(name for name, p in model.named_parameters() if id(p) in missing)
        raise StrategyError(
            f"the optimizer does not hold {names}; make it from model.parameters(), "
            "or freeze those with requires_grad_(False)"
        )
