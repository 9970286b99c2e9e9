"""The numbers of a genome as a vector, in coordinates in which equal steps are equally bold.

A vector says how far a genome is from another one, the origin, in units of one mutation's sigma
(`evokernels.search.operators.RATES`):

- learning rate, eps and weight decay in decades, as the genome has them;
- a beta as log(1 / (1 - beta)), the logarithm of how many gradients it averages over: from 0.9 to
  0.99 is as far as from 0.99 to 0.999, and 0 is a point like others, which it is not for a logit;
- a weight as the logarithm of its size, as the search mutates it. It keeps its sign and is never
  zero: that would be another structure.

At the zero vector is the origin to the last bit.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from evokernels.genome import Genome
from evokernels.search.operators import ALPHA, BETA3, NUMERIC, RATES

__all__ = ["NUMBERS", "Coordinates"]

DECADES = ("lr_log10", "eps_log10", "wd_log10")
BETAS = ("beta1", "beta2", "beta3")
NUMBERS = (*DECADES, *BETAS)
GENES = {**NUMERIC, "beta3": BETA3}
WEIGHT_LIMITS = (1e-4, ALPHA.limits[1])  # of its size; the least is as good as none


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The space of the genomes that differ from ``origin`` in some numbers only.

    Args:
        origin: the genome at zero.
        numbers: those of `NUMBERS` that move, each finite in the origin.
        weights: places of the alphas that move, none of them zero in the origin.
    """

    origin: Genome
    numbers: tuple[str, ...]
    weights: tuple[int, ...]

    def __len__(self) -> int:
        """How many coordinates there are: ``numbers``, then ``weights``."""
        return len(self.numbers) + len(self.weights)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest vector, (d,) each: what the search explores, and the origin
        where that is outside of it."""
        low, high = (
            self._offsets(
                [GENES[name].limits[end] for name in self.numbers],
                [WEIGHT_LIMITS[end]] * len(self.weights),
            )
            for end in (0, 1)
        )
        return np.minimum(low, 0.0), np.maximum(high, 0.0)

    def genome(self, vector: np.ndarray) -> Genome:
        """The genome at a vector (d,), or at the nearest one within `bounds`."""
        offsets = (np.clip(vector, *self.bounds) * RATES.sigma).tolist()
        changes = {
            name: _moved(name, getattr(self.origin, name), offset)
            for name, offset in zip(self.numbers, offsets, strict=False)
        }
        alphas = list(self.origin.alphas)
        for place, offset in zip(self.weights, offsets[len(self.numbers) :], strict=True):
            alphas[place] *= math.exp(offset)
        return dataclasses.replace(self.origin, alphas=alphas, **changes)

    def vector(self, genome: Genome) -> np.ndarray:
        """Where a genome is, (d,) in float64.

        Raises:
            ValueError: it is not in this space.
        """
        here = {name: getattr(self.origin, name) for name in self.numbers}
        alphas = list(genome.alphas)
        for place in self.weights:
            if place < len(alphas) and alphas[place] * self.origin.alphas[place] > 0.0:
                alphas[place] = self.origin.alphas[place]
        if dataclasses.replace(genome, alphas=alphas, **here) != self.origin:
            raise ValueError(
                f"{genome} differs from {self.origin} in more than the numbers that move: "
                f"{', '.join(self.numbers)}, alphas {list(self.weights)} with their signs"
            )
        return self._offsets(
            [getattr(genome, name) for name in self.numbers],
            [abs(genome.alphas[place]) for place in self.weights],
        )

    def _offsets(self, numbers: list[float], sizes: list[float]) -> np.ndarray:
        """The vector of these values of the numbers and these sizes of the weights."""
        offsets = [
            _coordinate(name, value) - _coordinate(name, getattr(self.origin, name))
            for name, value in zip(self.numbers, numbers, strict=True)
        ]
        offsets += [
            math.log(size) - math.log(abs(self.origin.alphas[place]))
            for place, size in zip(self.weights, sizes, strict=True)
        ]
        return np.array(offsets) / RATES.sigma


def _coordinate(name: str, value: float) -> float:
    return -math.log1p(-value) if name in BETAS else value


def _moved(name: str, value: float, offset: float) -> float:
    """The number whose coordinate is ``offset`` above that of ``value``."""
    if name not in BETAS:
        return value + offset
    # 1 - (1 - value) * exp(-offset), which would not be the value itself where the offset is 0
    return max(value - (1.0 - value) * math.expm1(-offset), 0.0)
