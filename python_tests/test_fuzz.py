"""A short run of bench/fuzz.py, and that it sees what it is there to see."""

import math

import fuzz
import pytest
import torch

from evokernels import FusedEvolvedOptimizer
from evokernels.kernels.plan import Rounding
from evokernels.optim import optimizer, parts


def test_two_thousand_random_cases():
    assert fuzz.first_failure(range(2000)) is None


def beside(parameter, gradient):
    """A write beyond the end of the parameter."""
    storage = torch.empty(0, dtype=parameter.dtype).set_(parameter.untyped_storage())
    storage[-1] += 1


def beyond_rounding(parameter, gradient):
    parameter.detach().mul_(1 + 8 * torch.finfo(parameter.dtype).eps)


def in_the_gradient(parameter, gradient):
    gradient.add_(1)


@pytest.mark.parametrize("defect", [beside, beyond_rounding, in_the_gradient])
def test_a_planted_defect_is_found(monkeypatch, defect):
    step = FusedEvolvedOptimizer.step

    def defective(self):
        step(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() == 1 and parameter.numel() > 1:
                    defect(parameter, parameter.grad)

    monkeypatch.setattr(FusedEvolvedOptimizer, "step", defective)
    assert "python bench/fuzz.py --case" in fuzz.first_failure(range(100))


def unlimited(scaling, squares):
    """`max_grad_norm` is forgotten."""
    return 1.0, math.inf, 0.0


def to_nearest(group, parameter, position):
    """`stochastic_rounding` is forgotten."""


def of_the_neighbour(group, parameter, position):
    """The random bits of another parameter."""
    return Rounding(group["seed"], position + 1) if group["stochastic_rounding"] else None


@pytest.mark.parametrize(
    ("module", "name", "defective"),
    [
        (parts, "_step_inputs", unlimited),
        (optimizer, "_rounding", to_nearest),
        (optimizer, "_rounding", of_the_neighbour),
    ],
)
def test_a_defective_option_is_found(monkeypatch, module, name, defective):
    monkeypatch.setattr(module, name, defective)
    assert "python bench/fuzz.py --case" in fuzz.first_failure(range(100))
