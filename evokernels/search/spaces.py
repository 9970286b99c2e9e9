"""What a search moves in: individuals of one kind, how they begin, mix and change."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Protocol, TypeVar

__all__ = ["Space"]

Individual = TypeVar("Individual", bound=Hashable)


class Space(Protocol[Individual]):
    """Individuals are immutable and hashable; equal ones are one individual."""

    def start(self, size: int, rng: random.Random) -> tuple[Individual, ...]:
        """A first population: known individuals first, then random ones."""

    def crossover(
        self, first: Individual, second: Individual, rng: random.Random
    ) -> Individual:
        """A child of two."""

    def mutate(self, individual: Individual, rng: random.Random, progress: float) -> Individual:
        """A neighbour; ``progress`` through the search goes from 0 to 1, and moves get smaller."""
