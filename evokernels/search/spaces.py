"""What a search moves in: individuals of one kind, how they begin, mix and change."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from evokernels.architecture import MAX_LENGTH, Architecture
from evokernels.errors import GenomeError, SettingsError
from evokernels.genome import CATALOGUES, Genome, OwnTerm, find_term
from evokernels.search import architecture_operators, operators
from evokernels.search.operators import CLASSIC, RATES, Terms

__all__ = [
    "ArchitectureSpace",
    "FixedSpace",
    "OptimizerSpace",
    "PairSpace",
    "Space",
    "catalogue_terms",
]

Individual = TypeVar("Individual", bound=Hashable)
First = TypeVar("First", bound=Hashable)
Second = TypeVar("Second", bound=Hashable)

# The chance that a fixed individual changes to any other one instead of to a neighbour; it falls
# to half during the search, as the rates of an optimizer's mutation do.
ANY_OTHER = 0.5


class Space(Protocol[Individual]):
    """Individuals are immutable and hashable; equal ones are one individual."""

    def start(self, size: int, rng: random.Random) -> tuple[Individual, ...]:
        """A first population: known individuals first, then random ones."""

    def crossover(self, first: Individual, second: Individual, rng: random.Random) -> Individual:
        """A child of two."""

    def mutate(self, individual: Individual, rng: random.Random, progress: float) -> Individual:
        """A neighbour; ``progress`` through the search goes from 0 to 1, and moves get smaller."""


def catalogue_terms(catalogue: str, own_terms: Sequence[str]) -> Terms:
    """The terms of a catalogue and those of a user's own, each of which is registered.

    Args:
        catalogue: "classic" or "wide".
        own_terms: their definitions: name, " = ", formula (`evokernels.terms.definitions`).

    Raises:
        SettingsError: an unknown catalogue; a term that is not registered, or not so.
    """
    if catalogue not in CATALOGUES:
        raise SettingsError(f"catalogue must be {' or '.join(CATALOGUES)}, got {catalogue!r}")
    terms = dict.fromkeys(CATALOGUES[catalogue])
    for definition in own_terms:
        name, _, _ = definition.partition(" = ")
        try:
            term = find_term(name)
        except GenomeError:
            raise SettingsError(
                f"the search has a term of your own, {definition}, which is not registered; "
                f"register it first (bench/evolve.py --terms FILE)"
            ) from None
        if isinstance(term, OwnTerm) and term.definition != definition:
            raise SettingsError(f"the search has {definition}, but here it is {term.definition}")
        terms[term] = None
    return tuple(terms)


class OptimizerSpace:
    """Genomes of at most ``max_terms`` terms; `evokernels.search.operators` has the operators.

    Args:
        terms: those that new genomes are made of.

    Raises:
        SettingsError: ``max_terms`` is below 1.
    """

    def __init__(self, max_terms: int = 4, terms: Terms = CLASSIC) -> None:
        if max_terms < 1:
            raise SettingsError(f"max_terms must be at least 1, got {max_terms!r}")
        self.max_terms = max_terms
        self.terms = terms

    def start(self, size: int, rng: random.Random) -> tuple[Genome, ...]:
        """The four known optimizers, then random genomes."""
        return operators.start_population(size, self.max_terms, rng, self.terms)

    def crossover(self, first: Genome, second: Genome, rng: random.Random) -> Genome:
        """The head of one term list and the tail of the other; the rest from either parent."""
        return operators.crossover(first, second, rng, self.max_terms)

    def mutate(self, individual: Genome, rng: random.Random, progress: float) -> Genome:
        """Each number, the term list and each flag change with rates that fall to half."""
        rates = RATES.annealed(progress)
        return operators.mutate(individual, rng, rates, self.max_terms, self.terms)


class ArchitectureSpace:
    """Architectures; `evokernels.search.architecture_operators` has the operators.

    Args:
        max_length: components that an architecture may have, 1 to 24.
        max_parameters: what each of them is allowed, as `Architecture` has it.

    Raises:
        SettingsError: ``max_length`` is out of its range.
        ArchitectureError: ``max_parameters`` is.
    """

    def __init__(self, max_length: int = 16, max_parameters: int = 1_000_000) -> None:
        if not 1 <= max_length <= MAX_LENGTH:
            raise SettingsError(f"max_length must be from 1 to {MAX_LENGTH}, got {max_length!r}")
        self.max_length = max_length
        self.max_parameters = Architecture((), max_parameters).max_parameters

    def start(self, size: int, rng: random.Random) -> tuple[Architecture, ...]:
        """A few sensible networks, then random stages of convolutions."""
        sequences = architecture_operators.start_sequences(size, self.max_length, rng)
        return tuple(self._architecture(components) for components in sequences)

    def crossover(
        self, first: Architecture, second: Architecture, rng: random.Random
    ) -> Architecture:
        """The head of one sequence and the tail of the other, cut at the same share of each."""
        return self._architecture(
            architecture_operators.crossover(first.components, second.components, rng)
        )

    def mutate(self, individual: Architecture, rng: random.Random, progress: float) -> Architecture:
        """One move or two, the second one ever more rarely."""
        return self._architecture(
            architecture_operators.mutate(individual.components, rng, progress, self.max_length)
        )

    def _architecture(self, components: Sequence[str]) -> Architecture:
        return Architecture(components, self.max_parameters)


class FixedSpace(Generic[Individual]):
    """A list of individuals to which nothing new is ever added, such as known recipes.

    Args:
        individuals: at least one, all different; those side by side are neighbours.

    Raises:
        SettingsError: there are none, or some are equal.
    """

    def __init__(self, individuals: Sequence[Individual]) -> None:
        self.individuals = tuple(individuals)
        if not self.individuals:
            raise SettingsError("a fixed space has no individuals; give at least one")
        self._places: dict[Individual, int] = {}
        for place, individual in enumerate(self.individuals):
            if self._places.setdefault(individual, place) != place:
                raise SettingsError(
                    f"a fixed space has {individual!r} more than once; give each individual once"
                )

    def start(self, size: int, rng: random.Random) -> tuple[Individual, ...]:
        """Different ones at random; some again only when all of them are there."""
        drawn: list[Individual] = []
        while len(drawn) < size:
            drawn += rng.sample(self.individuals, min(size - len(drawn), len(self.individuals)))
        return tuple(drawn)

    def crossover(self, first: Individual, second: Individual, rng: random.Random) -> Individual:
        """Either of the two."""
        return rng.choice((first, second))

    def mutate(self, individual: Individual, rng: random.Random, progress: float) -> Individual:
        """A neighbour in the list, or any other one; itself where it is the only one."""
        place = self._places[individual]
        if rng.random() < ANY_OTHER * (1.0 - 0.5 * progress):
            others = [other for other in range(len(self.individuals)) if other != place]
        else:
            others = [other for other in (place - 1, place + 1) if self._holds(other)]
        return self.individuals[rng.choice(others)] if others else individual

    def _holds(self, place: int) -> bool:
        return 0 <= place < len(self.individuals)


class PairSpace(Generic[First, Second]):
    """Pairs of an individual from each of two spaces: what one joint search moves in."""

    def __init__(self, first: Space[First], second: Space[Second]) -> None:
        self.first = first
        self.second = second

    def start(self, size: int, rng: random.Random) -> tuple[tuple[First, Second], ...]:
        """The n-th of one start population with the n-th of the other."""
        return tuple(zip(self.first.start(size, rng), self.second.start(size, rng), strict=True))

    def crossover(
        self, first: tuple[First, Second], second: tuple[First, Second], rng: random.Random
    ) -> tuple[First, Second]:
        """A child on each side."""
        return (
            self.first.crossover(first[0], second[0], rng),
            self.second.crossover(first[1], second[1], rng),
        )

    def mutate(
        self, individual: tuple[First, Second], rng: random.Random, progress: float
    ) -> tuple[First, Second]:
        """One side mutates, or the other, or both, with equal chances."""
        first, second = individual
        sides = rng.choice(("first", "second", "both"))
        if sides != "second":
            first = self.first.mutate(first, rng, progress)
        if sides != "first":
            second = self.second.mutate(second, rng, progress)
        return first, second
