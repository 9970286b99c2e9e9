"""Warmup and cosine decay: the learning rate of a step as a fraction of the genome's."""

from __future__ import annotations

import math
from typing import Protocol

from evokernels.compiler.expr import Symbol, compiled, cospi, minimum

__all__ = [
    "FACTOR",
    "PROGRESS",
    "Scheduled",
    "learning_rate_factor",
    "schedule_lengths",
    "t",
    "total_steps",
    "training_steps",
    "warms_up",
    "warmup_steps",
]

t, warmup_steps, total_steps, training_steps = (
    Symbol(name, per_element=False)
    for name in ("t", "warmup_steps", "total_steps", "training_steps")
)

# In step t, from 1. Linear warmup reaches the full rate at t = warmup_steps; half a cosine falls
# from 1 at t = 1 to 0 behind total_steps and stays there. Both multiply, as in the source system.
FACTOR = minimum(1.0, t / warmup_steps) * (
    0.5 * (1.0 + cospi(minimum(t - 1.0, total_steps) / total_steps))
)

_factor = compiled(FACTOR)

# How far the training is, up to 1. Its length is infinite where no term asks: the length of the
# cosine stands for its flag.
PROGRESS = minimum(t, training_steps) / training_steps


class Scheduled(Protocol):
    """The fields of a genome that make its schedule; baselines have them too."""

    use_warmup: bool
    warmup_steps: int
    use_cosine_decay: bool


def warms_up(scheduled: Scheduled) -> bool:
    """Whether warmup changes the rate of any step."""
    return scheduled.use_warmup and scheduled.warmup_steps > 1


def schedule_lengths(scheduled: Scheduled, total: int | None) -> dict[str, float]:
    """The lengths that `FACTOR` reads, those at which it is 1 where there is no schedule.

    Args:
        total: length of the training in steps; read only where the rate decays by cosine.
    """
    return {
        "warmup_steps": float(max(scheduled.warmup_steps, 1)) if scheduled.use_warmup else 1.0,
        "total_steps": float(total) if scheduled.use_cosine_decay else math.inf,
    }


def learning_rate_factor(scheduled: Scheduled, step: int, total: int | None) -> float:
    """The factor on the learning rate at ``step`` (0 for the first one), as `FACTOR` says."""
    if not (scheduled.use_warmup or scheduled.use_cosine_decay):
        return 1.0
    return _factor(t=step + 1.0, **schedule_lengths(scheduled, total))[0]
