"""What the tests share: random genomes, shapes, and the one rule that says how near is near."""

from __future__ import annotations

import random

import numpy as np
import torch

from evokernels import Genome, Term

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


def layouts(
    dtype: torch.dtype,
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Parameters and gradients that lie differently, with guarded memory around the parameters."""
    guarded = torch.full((3, 64, 40), 7.0, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    guarded[1, 8:41, 5:28] = random(33, 23)
    channels = random(5, 4, 3, 3)
    return guarded, {
        "transposed parameter": (random(23, 33).t(), random(33, 23)),
        "transposed gradient": (random(33, 23), random(23, 33).t()),
        "both transposed": (random(23, 33).t(), random(23, 33).t()),
        "channels last": (channels.to(memory_format=torch.channels_last), random(5, 4, 3, 3)),
        "size one": (random(4, 1, 3, 3), random(4, 1, 3, 3).to(memory_format=torch.channels_last)),
        "sliced parameter": (guarded[1, 8:41, 5:28], random(33, 23)),
        "sliced gradient": (random(33, 23), random(66, 46)[::2, ::2]),
        "expanded gradient": (random(33, 23), random(1, 1).expand(33, 23)),
        "long": (random(1000, 3).t(), random(3, 1000)),
        "scalar": (random()[None][0], random(1).expand(3)[1]),
    }
