"""The genetic algorithm of the source system: elites, tournaments, crossover, annealed mutation.

    search = GeneticSearch(GeneticConfig(population=8, generations=3))
    state = search.start()
    while candidates := search.ask(state):
        state = search.tell(state, [score(genome) for genome in candidates])
    state.best.genome

It searches among optimizers, or in any other `Space`, whose individuals are its genomes then.

The state is immutable and holds no generator. The random numbers of a generation come from a
stream named after the seed and the generation, so that the same scores always lead to the same
states: a run resumes by telling the scores that it has recorded.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from evokernels.errors import SettingsError
from evokernels.genome import MOST_TERMS
from evokernels.search.score import Score
from evokernels.search.spaces import OptimizerSpace, Space, catalogue_terms

__all__ = ["GeneticConfig", "GeneticSearch", "Scored", "State", "check_bounds", "children", "rank"]

Individual = TypeVar("Individual", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class GeneticConfig:
    """The settings of a genetic search; the defaults are those of the source system.

    Args:
        population: genomes in a generation, at least 2.
        generations: generations evaluated, at least 1.
        elites: best genomes that pass on unchanged; fewer than ``population``.
        tournament: genomes drawn for each parent, of which the best wins; 1 to ``population``.
        max_terms: terms an optimizer may have, at least 1; of no concern to another space.
        seed: names the random streams.
        catalogue, own_terms: what new optimizers are made of, as `catalogue_terms` has it; of no
            concern to another space either.

    Raises:
        SettingsError: naming the setting, the value given and the values allowed.
    """

    population: int = 50
    generations: int = 50
    elites: int = 3
    tournament: int = 4
    max_terms: int = 4
    seed: int = 42
    catalogue: str = "classic"
    own_terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        catalogue_terms(self.catalogue, self.own_terms)
        check_bounds(
            self,
            ("population", 2, None),
            ("generations", 1, None),
            ("elites", 0, self.population - 1),
            ("tournament", 1, self.population),
            ("max_terms", 1, MOST_TERMS),
        )


@dataclasses.dataclass(frozen=True)
class Scored(Generic[Individual]):
    """A genome and what it was told to be worth."""

    genome: Individual
    score: Score


@dataclasses.dataclass(frozen=True)
class State(Generic[Individual]):
    """Where a search stands.

    Attributes:
        generation: of ``population``, counted from 0; equals ``generations`` at the end.
        population: the genomes to be scored next; empty at the end.
        best: the best genome ever told, the earliest among equals; None at the start. What counts
            is what a genome was told last: one that is told less than before can lose its place, to
            the best of that generation.
        parents: of each genome of ``population``, the places of its parents in the generation
            before: two of a child, one of an elite; none at the start, and of one that joined.
    """

    generation: int
    population: tuple[Individual, ...]
    best: Scored[Individual] | None
    parents: tuple[tuple[int, ...], ...] = ()


class GeneticSearch(Generic[Individual]):
    """Ask for a generation, tell its scores; see the module's docstring.

    Args:
        config: the settings.
        space: what to search in; by default optimizers.
    """

    def __init__(self, config: GeneticConfig, space: Space[Individual] | None = None) -> None:
        self.config = config
        if space is None:
            terms = catalogue_terms(config.catalogue, config.own_terms)
            space = OptimizerSpace(config.max_terms, terms)
        self.space = space

    def start(self) -> State[Individual]:
        """The start population, not yet scored."""
        config = self.config
        rng = random.Random(f"evokernels genetic {config.seed} start")
        population = self.space.start(config.population, rng)
        return State(0, population, best=None, parents=((),) * len(population))

    def ask(self, state: State) -> tuple[Individual, ...]:
        """The genomes to score, elites first; empty when the search is over."""
        return state.population

    def join(self, state: State[Individual], genomes: Sequence[Individual]) -> State[Individual]:
        """A state whose generation has further genomes, found elsewhere, which are told last.

        For that generation alone: what follows has the usual size.
        """
        return dataclasses.replace(
            state,
            population=(*state.population, *genomes),
            parents=(*state.parents, *((),) * len(genomes)),
        )

    def tell(self, state: State[Individual], scores: Sequence[Score]) -> State[Individual]:
        """The state that follows; ``scores`` in the order of ``ask``.

        Raises:
            ValueError: not one score for each genome asked.
        """
        if len(scores) != len(state.population):
            raise ValueError(
                f"told {len(scores)} scores for {len(state.population)} genomes; "
                "give one for each genome that ask() returned"
            )
        scored = [Scored(*pair) for pair in zip(state.population, scores, strict=True)]
        # max and sorted keep the order of equals: ties go to the earlier genome, always
        retold = state.best is None or state.best.genome in state.population
        champions = scored if retold else [state.best, *scored]
        best = max(champions, key=rank)
        generation = state.generation + 1
        if generation == self.config.generations:
            return State(generation, (), best)
        population, parents = zip(*self._offspring(scored, state.generation), strict=True)
        return State(generation, population, best, parents)

    def _offspring(
        self, scored: list[Scored[Individual]], generation: int
    ) -> list[tuple[Individual, tuple[int, ...]]]:
        """The elites of ``generation`` unchanged, then children of tournament winners; each with
        the places of its parents."""
        config = self.config
        rng = random.Random(f"evokernels genetic {config.seed} generation {generation}")
        ranked = sorted(range(len(scored)), key=lambda place: rank(scored[place]), reverse=True)
        elites = ranked[: config.elites]
        brood = children(
            self.space, scored, config.tournament, rng, progress=generation / config.generations
        )
        return [
            *((scored[place].genome, (place,)) for place in elites),
            *itertools.islice(brood, config.population - len(elites)),
        ]


def children(
    space: Space[Individual],
    scored: Sequence[Scored[Individual]],
    tournament: int,
    rng: random.Random,
    progress: float,
) -> Iterator[tuple[Individual, tuple[int, int]]]:
    """Mutated children of two tournament winners each, without end; with the places of the two."""

    def winner() -> int:
        drawn = rng.sample(range(len(scored)), tournament)
        return max(drawn, key=lambda place: rank(scored[place]))

    while True:
        parents = winner(), winner()
        first, second = (scored[place].genome for place in parents)
        yield space.mutate(space.crossover(first, second, rng), rng, progress), parents


def rank(entry: Scored) -> tuple[bool, float]:
    """Sort key, best last."""
    return entry.score.rank


def check_bounds(config: object, *bounds: tuple[str, int, int | None]) -> None:
    """Raises SettingsError for a setting below its least or above its greatest value, if any.

    Args:
        config: the settings.
        bounds: of each: its name, the least and the greatest value.
    """
    for name, low, high in bounds:
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise SettingsError(f"{name} must be {allowed}, got {value!r}")
