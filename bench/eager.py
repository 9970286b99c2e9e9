"""The update as the source system does it: one torch call at a time, straight from its formulas.

Written down a second time on purpose, apart from the compiler: the yardstick of speed in
microbench.py and, in python_tests, of correctness and of rounding.
"""

from __future__ import annotations

import torch

from evokernels import Genome, Term

__all__ = ["eager_update"]


def eager_update(
    genome: Genome,
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: int,
    lr: float,
) -> None:
    """Step `t` (from 1) with scheduled learning rate `lr`: changes `p`, `m` and `v` in place."""
    eps = genome.eps
    if genome.use_gradient_clipping:
        g = torch.clamp(g, -genome.clip_value, genome.clip_value)
    if genome.weight_decay > 0:
        p.mul_(1 - lr * genome.weight_decay)
    seen_m = g
    if genome.use_m:
        m.mul_(genome.beta1).add_(g, alpha=1 - genome.beta1)
        seen_m = m / (1 - genome.beta1**t) if genome.use_bias_correction else m
    if genome.use_v:
        v.mul_(genome.beta2).addcmul_(g, g, value=1 - genome.beta2)
        seen_v = v / (1 - genome.beta2**t) if genome.use_bias_correction else v
    else:
        seen_v = g * g
    update = torch.zeros_like(p)
    for term, alpha in zip(genome.term_types, genome.alphas, strict=True):
        if term == Term.GRAD:
            value = g
        elif term == Term.MOMENTUM:
            value = seen_m
        elif term == Term.RMS_NORM:
            value = g / (torch.sqrt(seen_v) + eps)
        elif term == Term.ADAM_TERM:
            value = seen_m / (torch.sqrt(seen_v) + eps)
        elif term == Term.SIGN_GRAD:
            value = torch.sign(g)
        elif term == Term.SQRT_GRAD:
            value = g / (torch.abs(g) + eps)
        elif term == Term.NESTEROV:
            value = seen_m + 0.9 * (g - seen_m)
        update.add_(value, alpha=alpha)
    p.add_(update, alpha=-lr)
