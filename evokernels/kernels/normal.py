"""The normal numbers of csrc/noise.h in torch operations, the same bits on every device."""

from __future__ import annotations

import torch

from evokernels.kernels.rounding import philox

__all__ = ["normal", "normal_pair"]

# Coefficients of csrc/noise.h, highest power first.
_LOGARITHM = (
    *("-0x1.65c778p-3", "0x1.25049ep-2", "-0x1.318526p-2", "0x1.535d30p-2"),
    *("-0x1.98d2c0p-2", "0x1.00049ap-1", "-0x1.5556f4p-1", "0x1.fffffap-1", "-2.0"),
)
_COSINE = ("-0x1.4e844ap-6", "0x1.03b090p-2", "-0x1.3bd39cp+0", "1.0")
_SINE = ("-0x1.2d9302p-8", "0x1.465e92p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0")
_TWO_LOG_2 = float.fromhex("0x1.62e430p+0")
_ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)


def normal(
    seed: int,
    generation: int,
    member: int,
    position: int,
    first: int,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Elements first, …, first + count - 1 of a tensor's noise: float32, standard normal.

    Args:
        seed: of 64 bits; `generation` and `member` of 32; `position` is below 2^24 - 1.
    """
    skipped = first % 4
    quarter = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    zeros = torch.zeros_like(quarter)
    counter = (
        quarter & 0xFFFFFFFF,
        quarter >> 32 | (position + 1) << 8,
        zeros + member,
        zeros + generation,
    )
    a, b, c, d = philox(counter, seed)
    pairs = [*normal_pair(a, b), *normal_pair(c, d)]
    return torch.stack(pairs, dim=-1).flatten()[skipped : skipped + count]


def normal_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Box & Muller 1958, of words in int64."""
    radius = _radius(a)
    x, y = _direction(b)
    return x * radius, y * radius


def _radius(word: torch.Tensor) -> torch.Tensor:
    bits = ((word >> 1).to(torch.float32) + 0.5).view(torch.int32) - _ROOT_HALF
    exponent = ((bits >> 23) - 31).to(torch.float32)
    f = ((bits & 0x007FFFFF) + _ROOT_HALF).view(torch.float32) - 1.0
    square = f * _polynomial(_LOGARITHM, f) - exponent * _TWO_LOG_2
    # torch's root of a float32 is not always the nearest one on a CPU; by way of float64 it is
    return square.double().sqrt().float()


def _direction(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lower = word << 2 & 0xFFFFFFFF
    t = (lower - (lower >> 31 << 32)).to(torch.float32) * 2.0**-32
    cosine, sine = _polynomial(_COSINE, t * t), _polynomial(_SINE, t * t) * t
    cosine = torch.where(word >> 31 == 1, -cosine, cosine)
    swapped = (word >> 30 & 1) == 1
    return torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)


def _polynomial(coefficients: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """Horner's rule, each product and sum rounded."""
    highest, *others = map(float.fromhex, coefficients)
    value = torch.full_like(x, highest)
    for coefficient in others:
        value = value * x + coefficient
    return value
