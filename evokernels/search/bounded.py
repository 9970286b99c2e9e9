"""A space without the individuals that one cannot afford."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from evokernels.errors import SettingsError
from evokernels.search.spaces import Space

__all__ = ["BoundedSpace"]

Individual = TypeVar("Individual", bound=Hashable)

# Drawn for one place before what was there already stays.
ATTEMPTS = 32


class BoundedSpace(Generic[Individual]):
    """The individuals of a space that are admitted; whoever is not is drawn again.

    Args:
        space: where they come from.
        admits: whether an individual is one of them; the same answer every time.
    """

    def __init__(self, space: Space[Individual], admits: Callable[[Individual], bool]) -> None:
        self._space = space
        self._admits = admits

    def start(self, size: int, rng: random.Random) -> tuple[Individual, ...]:
        """The first that are admitted of a start population as large as need be.

        Raises:
            SettingsError: hardly any is admitted.
        """
        drawn = self._space.start(ATTEMPTS * size, rng)
        admitted = tuple(itertools.islice(filter(self._admits, drawn), size))
        if len(admitted) < size:
            raise SettingsError(
                f"only {len(admitted)} of {len(drawn)} individuals to start with are within the "
                f"bounds, and {size} are needed; widen the bounds"
            )
        return admitted

    def crossover(self, first: Individual, second: Individual, rng: random.Random) -> Individual:
        """A child of two, who must be admitted; the first of them if no child is."""
        return self._admitted(lambda: self._space.crossover(first, second, rng), first)

    def mutate(self, individual: Individual, rng: random.Random, progress: float) -> Individual:
        """A neighbour of an admitted individual; itself if no neighbour is admitted."""
        return self._admitted(lambda: self._space.mutate(individual, rng, progress), individual)

    def _admitted(self, draw: Callable[[], Individual], otherwise: Individual) -> Individual:
        drawn = (draw() for _ in range(ATTEMPTS))
        return next(filter(self._admits, drawn), otherwise)
