"""The text of an exported optimizer around what differs from rule to rule.

Lines that begin with a tilde are there if the rule keeps moments.
"""

__all__ = ["FILE", "HELPERS"]

FILE = '''\
"""An evolved optimizer in one file, which needs nothing but torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["$name"]
~
~# What the state has of each parameter, besides "step".
~MOMENTS = $moments


class $name(torch.optim.Optimizer):
$documentation

    def __init__(
        self,
        params: Iterable[Any],
$arguments
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        options = {
$options
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; options that the group leaves out have their defaults."""
        group = {**self.defaults, **param_group}
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].item()
$checks
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, t, params in self._batches():
$rates
            dtype = _arithmetic(params[0])
            states = [self.state[p] for p in params]
            values = [p.to(dtype) for p in params]  # itself, if it is of that dtype
            tensors = [
                values,
                [(-p.grad if group["maximize"] else p.grad).to(dtype) for p in params],
~                *([state[name] for state in states] for name in MOMENTS),
            ]
            scalars = {
$numbers
            }
            foreach = group["foreach"]
            if foreach is None:  # as torch's optimizers choose
                foreach = params[0].is_cuda and type(params[0]) in (Tensor, torch.nn.Parameter)
            if foreach:
                _update_lists(*tensors, **scalars)
            else:
                for each in zip(*tensors, strict=True):
                    _update(*each, **scalars)
            for p, value, state in zip(params, values, states, strict=True):
                if value is not p:
                    p.copy_(value)
                state["step"] = t
        return loss

    def _batches(self) -> list[tuple[dict[str, Any], int, list[Tensor]]]:
        """Parameters with gradients, those that can be updated together: group, t, parameters."""
        batches: dict[tuple[Any, ...], tuple[dict[str, Any], int, list[Tensor]]] = {}
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or not p.is_floating_point():
                    raise ValueError(
                        "gradients must be dense and of real numbers, got a "
                        f"{p.grad.layout} gradient of a {p.dtype} parameter"
                    )
                state = self.state[p]
~                for name in MOMENTS:
~                    if name not in state:
~                        state[name] = torch.zeros_like(p, dtype=_arithmetic(p))
                t = int(state.get("step", 0)) + 1
                key = (place, t, p.dtype, p.device, type(p))
                batches.setdefault(key, (group, t, []))[2].append(p)
        return list(batches.values())

~    @torch.no_grad()
~    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
~        """The inverse of `state_dict`; moments keep all their digits."""
~        super().load_state_dict(state_dict)
~        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
~        params = [p for group in self.param_groups for p in group["params"]]
~        for i, p in zip(saved, params, strict=True):
~            for name, value in state_dict["state"].get(i, {}).items():
~                if name in MOMENTS:  # torch has cast them to the dtype of the parameter
~                    self.state[p][name] = value.to(p.device, _arithmetic(p), copy=True)
~                elif name == "step":
~                    self.state[p][name] = int(value)
~
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those of another optimizer may lack some
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _arithmetic(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments, and in which it is updated."""
    return torch.promote_types(p.dtype, torch.float32)


$one


$lists
'''

# What a file has if it is called: checks of options, and what torch has otherwise or not at all.
HELPERS = {
    "_is_number": '''

def _is_number(option: Any, below: float = math.inf) -> bool:
    """Whether it is a number in [0, below)."""
    return isinstance(option, numbers.Real) and 0.0 <= option < below
''',
    "_are_betas": '''

def _are_betas(option: Any) -> bool:
    """Whether it is a pair of numbers in [0, 1)."""
    is_pair = isinstance(option, (tuple, list)) and len(option) == 2
    return is_pair and all(_is_number(beta, below=1.0) for beta in option)
''',
    "_is_count": '''

def _is_count(option: Any) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(option, numbers.Integral) and option >= 1
''',
    "_sign": '''

def _sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN for NaN, of which torch makes 0."""
    return torch.where(x.isnan(), x, x.sign())
''',
    "_foreach_sign": '''

def _foreach_sign(x: list[Tensor]) -> list[Tensor]:
    """The same of each tensor."""
    signs = torch._foreach_sign(x)
    nans = torch._foreach_clamp_min(x, 0.0)
    torch._foreach_clamp_max_(nans, 0.0)  # NaN or 0
    torch._foreach_add_(signs, nans)
    return signs
''',
    "_ratio": '''

def _ratio(a: float, b: float) -> float:
    """a / b; by zero not finite, where Python raises an error."""
    return a / b if b else a * math.inf
''',
    "_of": '''

def _of(function: Callable[[Tensor], Tensor], x: float) -> float:
    """A function of a number; not finite where Python's own raises an error."""
    return function(torch.tensor(x, dtype=torch.float64)).item()
''',
    "_where": '''

def _where(a: Any, b: Any, x: Any, y: Any) -> Tensor:
    """x where a > b, y where a <= b, and NaN where they cannot be compared."""
    return torch.where((a > b) | (a <= b), torch.where(a > b, x, y), math.nan)
''',
}
