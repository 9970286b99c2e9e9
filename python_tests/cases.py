"""Tensors of all shapes, and in all the ways in which they may lie in memory."""

from __future__ import annotations

import numpy as np
import torch
from oracle import SHAPES

TOTAL_STEPS = 7  # of which tests take five


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def case(seed, dtype):
    """Parameters of all shapes and gradients for five steps."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(scale):
        return [torch.randn(s, generator=generator).mul(scale).to(dtype) for s in SHAPES]

    scale = 10 ** float(torch.rand((), generator=generator) * 4 - 3)
    return tensors(1.0), [tensors(scale) for _ in range(5)]


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
        "overlapping gradient": (random(33, 23), random(60).as_strided((33, 23), (1, 1), 2)),
        "long": (random(1000, 3).t(), random(3, 1000)),
        "scalar": (random()[None][0], random(1).expand(3)[1]),
    }


def between_bfloat16(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a dtype at, in the middle of and just beside the middle of two bfloat16; and which
    of those is the nearest, the even one of two."""
    every = np.arange(2**16, dtype=np.uint32)
    finite = every[(every & 0x7FFF) < 0x7F80]
    values = (finite << 16).view(np.float32).astype(np.float64)
    spacing = np.ldexp(1.0, np.maximum(((finite >> 7) & 0xFF).astype(int), 1) - 134)
    away = values + np.copysign(spacing, values)  # where the next one is, or would be
    middle = (values + away) / 2
    last = 2.0 ** (-8 if dtype == torch.float32 else -36) * np.copysign(spacing, values)
    even = np.where(finite & 1, away, values)
    inputs = np.concatenate([values, middle, middle - last, middle + last])
    nearest = np.concatenate([values, even, values, away])
    nearest[np.abs(nearest) >= 2.0**128] = np.copysign(np.inf, nearest)[np.abs(nearest) >= 2.0**128]
    return inputs, nearest
