"""Warmup and cosine decay: the learning rate of a step as a fraction of the genome's."""

from __future__ import annotations

import math

from evokernels.compiler.expr import Symbol, compiled, cospi, minimum
from evokernels.genome import Genome

__all__ = ["FACTOR", "learning_rate_factor", "schedule_lengths", "t", "total_steps", "warmup_steps"]

t, warmup_steps, total_steps = (
    Symbol(name, per_element=False) for name in ("t", "warmup_steps", "total_steps")
)

# In step t, from 1. Linear warmup reaches the full rate at t = warmup_steps; half a cosine falls
# from 1 at t = 1 to 0 behind total_steps and stays there. Both multiply, as in the source system.
FACTOR = minimum(1.0, t / warmup_steps) * (
    0.5 * (1.0 + cospi(minimum(t - 1.0, total_steps) / total_steps))
)

_factor = compiled(FACTOR)


def schedule_lengths(genome: Genome, total: int | None) -> dict[str, float]:
    """The lengths that `FACTOR` reads, those at which it is 1 where a genome has no schedule.

    Args:
        total: length of the training in steps; read only where the genome decays by cosine.
    """
    return {
        "warmup_steps": float(max(genome.warmup_steps, 1)) if genome.use_warmup else 1.0,
        "total_steps": float(total) if genome.use_cosine_decay else math.inf,
    }


def learning_rate_factor(genome: Genome, step: int, total: int | None) -> float:
    """The factor on the learning rate at ``step`` (0 for the first one), as `FACTOR` says."""
    if not (genome.use_warmup or genome.use_cosine_decay):
        return 1.0
    return _factor(t=step + 1.0, **schedule_lengths(genome, total))[0]
