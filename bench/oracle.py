"""What is right: random genomes, their steps in float64 and in single torch calls, and the one rule
that says how near is near. The tests and fuzz.py share it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from eager import eager_update

from evokernels import Genome, Term
from evokernels.compiler.evaluate import reference_step
from evokernels.kernels.plan import ARITHMETIC
from evokernels.schedule import learning_rate_factor

__all__ = ["DTYPES", "SHAPES", "assert_near", "eager_steps", "exact_steps", "random_genome"]

SHAPES = [(), (0,), (1,), (63,), (1000,), (17, 241)]  # the last: 4097 elements
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_genome(seed: int) -> Genome:
    """A genome from anywhere in the space, not only from where the search starts."""
    r = random.Random(seed)
    count = r.randint(1, 7)
    return Genome(
        term_types=[r.choice(list(Term)) for _ in range(count)],
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
    genome: Genome,
    start: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    total_steps: int,
    *,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameter and moments after these gradients, more exactly than the dtype of `start` can be.

    A step without a gradient does not count.
    """
    precise = np.longdouble if start.dtype == torch.float64 else np.float64
    p = start.double().numpy().astype(precise)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for s, gradient in enumerate(g for g in gradients if g is not None):
        factor = learning_rate_factor(genome, s, total_steps)
        g = gradient.double().numpy().astype(precise)
        p, m, v = reference_step(genome, p, -g if maximize else g, m, v, s + 1, factor)
    return p, m, v


def eager_steps(
    genome: Genome,
    start: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    total_steps: int,
    *,
    maximize: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as the source system does it, in the arithmetic of the dtype of `start`.

    Parameter and moments are rounded where a step stores them.
    """
    arithmetic = ARITHMETIC[start.dtype]
    kept = state_dtype or arithmetic
    p, m = start.clone(), torch.zeros_like(start, dtype=kept)
    v = m.clone()
    for s, gradient in enumerate(g for g in gradients if g is not None):
        lr = genome.lr * learning_rate_factor(genome, s, total_steps)
        g = gradient.to(arithmetic)
        working = [tensor.to(arithmetic, copy=True) for tensor in (p, m, v)]
        eager_update(genome, working[0], -g if maximize else g, *working[1:], s + 1, lr)
        p, m, v = working[0].to(start.dtype), working[1].to(kept), working[2].to(kept)
    return p, m, v


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
    scale = np.maximum(np.abs(exact), np.abs(exact).mean())
    scale[scale == 0] = 1

    def error(tensor: torch.Tensor) -> float:
        return (np.abs(tensor.double().numpy() - exact) / scale).max()

    allowed = 2 * error(eager) + 0.01 * torch.finfo(dtype).eps
    assert error(actual) <= allowed, f"{what}: error {error(actual):.3g}, allowed {allowed:.3g}"
