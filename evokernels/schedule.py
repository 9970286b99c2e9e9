"""Warmup and cosine decay: the learning rate of a step as a fraction of the genome's."""

from __future__ import annotations

import math

from evokernels.genome import Genome

__all__ = ["learning_rate_factor"]


def learning_rate_factor(genome: Genome, step: int, total_steps: int | None) -> float:
    """The factor on the learning rate at ``step`` (0 for the first one).

    Linear warmup reaches the full rate at step ``warmup_steps - 1``; half a cosine falls from 1
    at step 0 to 0 at ``total_steps`` and stays there. Both multiply, as in the source system.

    Args:
        total_steps: length of the training; read only where the genome decays by cosine.
    """
    factor = 1.0
    if genome.use_warmup and step < genome.warmup_steps:
        factor = (step + 1) / genome.warmup_steps
    if genome.use_cosine_decay:
        factor *= 0.5 * (1.0 + math.cos(math.pi * min(step, total_steps) / total_steps))
    return factor
