"""What is right: random genomes, their steps in float64 and in single torch calls, and the one rule
that says how near is near. The tests and fuzz.py share it.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from eager import eager_update

from evokernels import Genome
from evokernels.compiler.evaluate import reference_step, reference_update
from evokernels.compiler.expr import ON_ARRAYS, Average
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.genome import CATALOGUES
from evokernels.kernels.plan import ARITHMETIC

__all__ = [
    *("DTYPES", "SHAPES", "allowed_distance", "assert_near", "eager_formulas", "eager_step"),
    *("eager_steps", "exact_step", "exact_steps", "exact_update", "precise", "random_genome"),
    "undecided",
]

SHAPES = [(), (0,), (1,), (63,), (1000,), (17, 241)]  # the last: 4097 elements
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_genome(seed: int) -> Genome:
    """A genome from anywhere in the space, not only from where the search starts."""
    r = random.Random(seed)
    count = r.randint(1, 7)
    return Genome(
        term_types=[r.choice(CATALOGUES["classic"]) for _ in range(count)],
        alphas=[r.choice([0.0, r.uniform(-3, 3), r.uniform(-1, 1)]) for _ in range(count)],
        lr_log10=r.uniform(-5, -1),
        beta1=r.choice([0.0, r.uniform(0.0, 0.999)]),
        beta2=r.choice([0.0, r.uniform(0.5, 0.9999)]),
        eps_log10=r.uniform(-10, -4),
        wd_log10=r.choice([float("-inf"), r.uniform(-6, -1)]),
        use_m=r.random() < 0.7,
        use_v=r.random() < 0.7,
        use_bias_correction=r.random() < 0.6,
        use_gradient_clipping=r.random() < 0.3,
        clip_value=r.uniform(0.1, 2),
        use_warmup=r.random() < 0.3,
        warmup_steps=r.randint(0, 8),
        use_cosine_decay=r.random() < 0.3,
    )


def exact_steps(
    genome: Genome, start: torch.Tensor, gradients: Sequence[torch.Tensor], total_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameter and moments after these gradients, without any rounding that would show."""
    p = precise(start)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        p, m, v = exact_step(genome, p, precise(g), m, v, t, total_steps)
    return p, m, v


def exact_step(
    genome: Genome,
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    t: int,
    total_steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameter and moments after step `t` (from 1), on the schedule of the genome."""
    return reference_step(genome, p, g, m, v, t, learning_rate_factor(genome, t - 1, total_steps))


def exact_update(
    genome: Genome, tensors: Mapping[str | Average, np.ndarray], t: int, total_steps: int
) -> dict[str | Average, np.ndarray]:
    """`exact_step` of any genome: with averages, too, and with terms that ask for progress."""
    factor = learning_rate_factor(genome, t - 1, total_steps)
    return reference_update(genome, tensors, t, factor, training_steps=total_steps)


def eager_formulas(
    genome: Genome, tensors: Mapping[str | Average, torch.Tensor], t: int, total_steps: int
) -> dict[str | Average, torch.Tensor]:
    """The same in single torch calls, one an operation, rounded where a step stores it."""
    arithmetic = ARITHMETIC[tensors["p"].dtype]
    wide = {name: tensor.to(arithmetic) for name, tensor in tensors.items()}
    factor = learning_rate_factor(genome, t - 1, total_steps)
    new = reference_update(
        genome, wide, t, factor, training_steps=total_steps, meanings=_ON_TENSORS
    )
    return {
        name: tensor.to(tensors[name].dtype if name in tensors else arithmetic)
        for name, tensor in new.items()
    }


def undecided(
    genome: Genome,
    exact: Mapping[str | Average, np.ndarray],
    eager: Mapping[str | Average, torch.Tensor],
    t: int,
    total_steps: int,
) -> np.ndarray:
    """Elements at which a sign or a choice of the update hangs on a rounding: what it is taken of
    is as near to the switch as the tolerance rule lets it be wrong.

    Args:
        exact: what `exact_update` takes.
        eager: what `eager_formulas` takes, of the same step.
    """
    margins: list[np.ndarray] = []
    rounded: list[torch.Tensor] = []
    reference = functools.partial(
        reference_update,
        genome,
        t=t,
        lr_factor=learning_rate_factor(genome, t - 1, total_steps),
        training_steps=total_steps,
    )
    reference(exact, meanings=_noting(ON_ARRAYS, margins))
    reference(eager, meanings=_noting(_ON_TENSORS, rounded))
    found = np.zeros(exact["p"].shape, bool)
    # where nothing has ever come, nothing is rounded
    moved = np.any([x != 0 for name, x in exact.items() if name != "p"], axis=0)
    for margin, near in zip(margins, rounded, strict=True):
        if np.ndim(margin):  # else the choice is the same for all elements
            # what an earlier switch has led elsewhere says nothing of rounding
            sound = ~found
            exactly, nearly = margin[sound], near[torch.from_numpy(sound)]
            distance = allowed_distance(exactly, nearly, nearly.dtype)
            found[sound] = (np.abs(exactly) <= distance) & moved[sound]
    return found


def _noting(meanings: Mapping[str, Callable], margins: list) -> dict[str, Callable]:
    """Operations that note how far from its switch each operand is."""

    def sign(x: Any) -> Any:
        margins.append(x)
        return meanings["sign"](x)

    def where(a: Any, b: Any, x: Any, y: Any) -> Any:
        margins.append(a - b)
        return meanings["where"](a, b, x, y)

    return {**meanings, "sign": sign, "where": where}


def _on_tensors(operation: Callable) -> Callable:
    """A torch operation that takes numbers, too."""

    def on_tensors(*args: torch.Tensor | float) -> torch.Tensor | float:
        if not any(isinstance(arg, torch.Tensor) for arg in args):
            return operation(*(torch.tensor(arg, dtype=torch.float64) for arg in args)).item()
        return operation(*(torch.as_tensor(arg) for arg in args))

    return on_tensors


def _compared(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    chosen = torch.where(a > b, x, y)
    return torch.where(a.isnan() | b.isnan(), math.nan, chosen)


_ON_TENSORS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul")},
    "div": operator.truediv,
    **{name: _on_tensors(getattr(torch, name)) for name in ("sqrt", "abs", "exp", "log1p", "tanh")},
    "expm1": _on_tensors(torch.expm1),
    "sign": _on_tensors(lambda x: torch.where(x.isnan(), x, x.sign())),
    "min": _on_tensors(lambda a, b: torch.where(a < b, a, b)),
    "max": _on_tensors(lambda a, b: torch.where(a > b, a, b)),
    "where": _on_tensors(_compared),
}


def precise(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of more digits than its dtype has."""
    wider = np.longdouble if tensor.dtype == torch.float64 else np.float64
    return tensor.double().numpy().astype(wider)


def eager_steps(
    genome: Genome, start: torch.Tensor, gradients: Sequence[torch.Tensor], total_steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as `exact_steps`, as the source system does it."""
    p, m = start, torch.zeros_like(start, dtype=ARITHMETIC[start.dtype])
    v = m
    for t, g in enumerate(gradients, start=1):
        p, m, v = eager_step(genome, p, g, m, v, t, total_steps)
    return p, m, v


def eager_step(
    genome: Genome,
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: int,
    total_steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as `exact_step`, in the arithmetic of the dtype, rounded where a step stores it."""
    arithmetic = ARITHMETIC[p.dtype]
    lr = genome.lr * learning_rate_factor(genome, t - 1, total_steps)
    new_p, new_m, new_v = (tensor.to(arithmetic, copy=True) for tensor in (p, m, v))
    eager_update(genome, new_p, g.to(arithmetic), new_m, new_v, t, lr)
    return new_p.to(p.dtype), new_m.to(m.dtype), new_v.to(v.dtype)


def assert_near(
    actual: torch.Tensor, exact: np.ndarray, eager: torch.Tensor, dtype: torch.dtype, what: str
) -> None:
    """The error is at most twice that of the eager path in the same dtype, plus 1 % of epsilon.

    Errors are relative to the element, or to the mean where the element is smaller: with absolute
    ones, a single large element, and the luck of its rounding, would decide alone.

    Args:
        exact: the reference.
        eager: what one torch call at a time made of the same step, with the arithmetic of `dtype`.
    """
    if exact.size == 0:
        return
    error, allowed = _error(actual, exact), _allowed_error(exact, eager, dtype)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def allowed_distance(exact: np.ndarray, eager: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """How far from the exact value the same rule lets each element be."""
    return _allowed_error(exact, eager, dtype) * _scale(exact) if exact.size else exact


def _allowed_error(exact: np.ndarray, eager: torch.Tensor, dtype: torch.dtype) -> float:
    return 2 * _error(eager, exact) + 0.01 * torch.finfo(dtype).eps


def _error(tensor: torch.Tensor, exact: np.ndarray) -> float:
    return (np.abs(tensor.double().numpy() - exact) / _scale(exact)).max()


def _scale(exact: np.ndarray) -> np.ndarray:
    """What the error of each element is relative to."""
    scale = np.maximum(np.abs(exact), np.abs(exact).mean())
    scale[scale == 0] = 1
    return scale
