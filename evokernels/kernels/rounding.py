"""How results are stored, in torch operations: rounded once, to nearest or stochastically.

The same bits as csrc/numeric.h and csrc/random.c. Integers of 32 bits live in int64 tensors, which
every device has; products of two wrap around in 64 bits, as they do in C.
"""

from __future__ import annotations

import torch

from evokernels.compiler.program import OPERANDS
from evokernels.kernels.memory import memory_order
from evokernels.kernels.plan import Rounding

__all__ = ["philox", "random_bits", "round_to_bfloat16", "round_to_bfloat16_stochastically"]

_MASK = 0xFFFFFFFF


def round_to_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """To nearest even, from float32 or float64."""
    return _narrowed(value).to(torch.bfloat16)


def round_to_bfloat16_stochastically(value: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Up with the probability that makes the mean exact.

    Args:
        random: 16 random bits for each element.
    """
    bits = _narrowed(value).view(torch.int32).to(torch.int64) & _MASK
    # from the largest finite number on there is no next one to make a mean with: there to nearest
    nearest = 0x7FFF + (bits >> 16 & 1)
    rounded = bits + torch.where((bits & 0x7FFFFFFF) >= 0x7F7F0000, nearest, random) >> 16
    rounded = torch.where(value.isnan(), 0x7FC0, rounded & 0xFFFF)
    return rounded.to(torch.int16).view(torch.bfloat16)


def random_bits(parameter: torch.Tensor, name: str, rounding: Rounding, t: int) -> torch.Tensor:
    """16 bits for each element of a parameter or moment, of the parameter's shape.

    Elements are counted in the order in which the parameter holds them in memory.
    """
    count = parameter.numel()
    if not count:  # in no order of dimensions
        return torch.empty(parameter.shape, dtype=torch.int64, device=parameter.device)
    eighth = torch.arange((count + 7) // 8, dtype=torch.int64, device=parameter.device)
    zeros = torch.zeros_like(eighth)
    operand = OPERANDS.index(name)  # each draws bits of its own
    counter = (
        eighth & _MASK,
        eighth >> 32 | (operand & 3) << 30 | operand >> 2 << 28,
        zeros + (rounding.position & _MASK),
        zeros + (t & _MASK),
    )
    words = philox(counter, rounding.seed)
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    order = memory_order(parameter)
    in_memory = bits.flatten()[:count].view([parameter.shape[d] for d in order])
    places = sorted(range(len(order)), key=order.__getitem__)
    return in_memory.permute(places).reshape(parameter.shape)


def philox(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers".

    Args:
        counter: four tensors of numbers below 2^32.
        key: of 64 bits, the lower half first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = b >> 32 & _MASK ^ c1 ^ k0, a >> 32 & _MASK ^ c3 ^ k1
        c1, c3 = b & _MASK, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _narrowed(value: torch.Tensor) -> torch.Tensor:
    """A float32 from which a bfloat16 is rounded as from the value itself.

    From float64 towards zero, the last bit set where anything was lost (Boldo & Melquiond 2008):
    rounding twice to nearest would err where the first lands in the middle between two bfloat16.
    """
    if value.dtype != torch.float64:
        return value
    near = value.float()
    widened = near.double()
    bits = near.view(torch.int32) - (widened.abs() > value.abs()).int()
    odd = (bits | (widened != value).int()).view(torch.float32)
    return torch.where(value.isnan(), near, odd)
