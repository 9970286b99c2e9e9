"""Two populations that evolve beside each other: architectures and optimizers, or any two spaces.

    search = Coevolution(CoevolutionConfig(), ArchitectureSpace(), OptimizerSpace())
    state = search.start()
    while pairs := search.ask(state):
        state = search.tell(state, [score(first, second) for first, second in pairs])
    state.best.pair

Only pairs can be scored. In each generation every individual meets c collaborators of the other
side: the champion, which is that side's part of the best pair so far, and c - 1 others drawn at
random, the same ones for all individuals of its population, so that luck with partners does not
decide between them. It is worth the mean of its pairs. So a generation asks for at most c (m + n)
pairs of m and n individuals, and fewer where pairs coincide: all of it is polynomial in the sizes,
as the approximate architecture search problem wants it (de Wynter 2019, arXiv:1908.09942). That
article publishes no algorithm; this one is ours.

A failed pair does not say which of its two has failed. It counts as the worst pair of its
generation that held; an individual with nothing but failed pairs is failed itself.

The state is immutable and holds no generator, as in `evokernels.search.genetic`: the same scores
always lead to the same states, and a run resumes by telling the scores that it has recorded.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from evokernels.search.genetic import Scored, check_bounds, children, rank
from evokernels.search.score import Score
from evokernels.search.spaces import Space

__all__ = ["Coevolution", "CoevolutionConfig", "ScoredPair", "State"]

First = TypeVar("First", bound=Hashable)
Second = TypeVar("Second", bound=Hashable)

# Children drawn for one place, until one is new to its population. An individual that is there
# twice is no dearer, but says nothing new either.
ATTEMPTS = 50


@dataclasses.dataclass(frozen=True)
class CoevolutionConfig:
    """The settings of a co-evolution.

    Args:
        first: individuals of the first population, at least 1.
        second: individuals of the second population, at least 1.
        generations: generations evaluated, at least 1.
        collaborators: c, at least 1; of a smaller population each individual meets all.
        elites: best individuals of each population that pass on unchanged, the champion first;
            fewer than the larger population has. Of a smaller one all but one pass on.
        tournament: individuals drawn for each parent, of which the best wins; 1 to the larger
            population. Of a smaller one all are drawn.
        seed: names the random streams.

    Raises:
        SettingsError: naming the setting, the value given and the values allowed.
    """

    first: int = 12
    second: int = 8
    generations: int = 8
    collaborators: int = 2
    elites: int = 2
    tournament: int = 3
    seed: int = 42

    def __post_init__(self) -> None:
        larger = max(self.first, self.second)
        check_bounds(
            self,
            ("first", 1, None),
            ("second", 1, None),
            ("generations", 1, None),
            ("collaborators", 1, None),
            ("elites", 0, larger - 1),
            ("tournament", 1, larger),
        )

    @property
    def evaluations_per_generation(self) -> int:
        """c (m + n): the most pairs that a generation asks for."""
        return self.collaborators * (self.first + self.second)


@dataclasses.dataclass(frozen=True)
class ScoredPair(Generic[First, Second]):
    """A pair and what it was told to be worth."""

    pair: tuple[First, Second]
    score: Score


@dataclasses.dataclass(frozen=True)
class State(Generic[First, Second]):
    """Where a co-evolution stands.

    Attributes:
        generation: of ``populations``, counted from 0; equals ``generations`` at the end.
        populations: the individuals of both sides, champions and elites first; both empty at the
            end.
        best: the best pair ever told, the earliest among equals; None at the start. What counts is
            what a pair was told last, as in a genetic search.
        scored: what each individual of the generation before was worth, in the order of its
            ``populations``; None at the start.
        parents: on each side, of each of its individuals, as `evokernels.search.genetic.State` has
            them.
    """

    generation: int
    populations: tuple[tuple[First, ...], tuple[Second, ...]]
    best: ScoredPair[First, Second] | None
    scored: tuple[tuple[Score, ...], tuple[Score, ...]] | None
    parents: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = ((), ())

    @property
    def champions(self) -> tuple[First, Second] | None:
        """The two of the best pair, which every individual of the other side meets next."""
        return self.best.pair if self.best else None


class Coevolution(Generic[First, Second]):
    """Ask for the pairs of a generation, tell their scores; see the module's docstring."""

    def __init__(
        self, config: CoevolutionConfig, first: Space[First], second: Space[Second]
    ) -> None:
        self.config = config
        self.spaces = (first, second)

    def start(self) -> State[First, Second]:
        """Both start populations; nothing is scored yet."""
        sizes = (self.config.first, self.config.second)
        first, second = (
            space.start(size, self._stream(f"start {side}"))
            for side, (space, size) in enumerate(zip(self.spaces, sizes, strict=True))
        )
        parents = ((),) * len(first), ((),) * len(second)
        return State(0, (first, second), best=None, scored=None, parents=parents)

    def ask(self, state: State[First, Second]) -> tuple[tuple[First, Second], ...]:
        """The different pairs to score, at most c (m + n); empty when the search is over."""
        met = self._met(state)
        return tuple(dict.fromkeys(pair for side in met for pairs in side for pair in pairs))

    def tell(self, state: State[First, Second], scores: Sequence[Score]) -> State[First, Second]:
        """The state that follows; ``scores`` in the order of ``ask``.

        Raises:
            ValueError: not one score for each pair asked, or the search is over.
        """
        pairs = self.ask(state)
        if not pairs or len(scores) != len(pairs):
            raise ValueError(
                f"told {len(scores)} scores for {len(pairs)} pairs; "
                "give one for each pair that ask() returned, until it returns none"
            )
        told = dict(zip(pairs, scores, strict=True))
        # max keeps the order of equals: ties go to the earlier pair, always
        retold = state.best is None or state.best.pair in told
        champions = [ScoredPair(*entry) for entry in told.items()]
        best = max(champions if retold else [state.best, *champions], key=lambda it: it.score.rank)

        floor = min((score.fitness for score in scores if not score.status.failed), default=None)
        first, second = (
            tuple(_mean([told[pair] for pair in pairs], floor) for pairs in side)
            for side in self._met(state)
        )
        generation = state.generation + 1
        following = State(generation, ((), ()), best, (first, second))
        if generation == self.config.generations:
            return following
        populations, parents = zip(
            *(self._offspring(state, following, side) for side in (0, 1)), strict=True
        )
        return dataclasses.replace(following, populations=populations, parents=parents)

    def _met(self, state: State) -> list[list[list[tuple[Any, Any]]]]:
        """The pairs that count for each individual of the first side, and of the second one."""
        first, second = state.populations
        partners = self._collaborators(state, 1), self._collaborators(state, 0)
        return [
            [[(each, partner) for partner in partners[0]] for each in first],
            [[(partner, each) for partner in partners[1]] for each in second],
        ]

    def _collaborators(self, state: State, side: int) -> list[Any]:
        """Whom the other side meets: this side's champion, then different ones at random."""
        chosen = [state.champions[side]] if state.champions else []
        others = [each for each in dict.fromkeys(state.populations[side]) if each not in chosen]
        rng = self._stream(f"generation {state.generation} collaborators {side}")
        return chosen + rng.sample(
            others, min(self.config.collaborators - len(chosen), len(others))
        )

    def _offspring(
        self, state: State, following: State, side: int
    ) -> tuple[tuple[Hashable, ...], tuple[tuple[int, ...], ...]]:
        """The champion and the elites unchanged, then children, new ones if possible; the places
        of the parents of each."""
        config = self.config
        population = state.populations[side]
        scored = [Scored(*pair) for pair in zip(population, following.scored[side], strict=True)]
        ranked = [entry.genome for entry in sorted(scored, key=rank, reverse=True)]
        elites = min(config.elites, len(population) - 1)
        offspring = list(dict.fromkeys([following.champions[side], *ranked]))[:elites]
        # where there are elites, the champion has been one since it was found
        parents: list[tuple[int, ...]] = [
            (population.index(each),) if each in population else () for each in offspring
        ]
        brood = children(
            self.spaces[side],
            scored,
            min(config.tournament, len(scored)),
            self._stream(f"generation {state.generation} offspring {side}"),
            progress=state.generation / config.generations,
        )
        while len(offspring) < len(population):
            child, of = _newcomer(brood, offspring)
            offspring.append(child)
            parents.append(of)
        return tuple(offspring), tuple(parents)

    def _stream(self, name: str) -> random.Random:
        return random.Random(f"evokernels coevolution {self.config.seed} {name}")


def _newcomer(
    brood: Iterator[tuple[Hashable, tuple[int, int]]], known: Sequence[Hashable]
) -> tuple[Hashable, tuple[int, int]]:
    """The first child that is not known; one that is after so many attempts. With its parents."""
    for newcomer in itertools.islice(brood, ATTEMPTS):
        if newcomer[0] not in known:
            break
    return newcomer


def _mean(scores: Sequence[Score], floor: float | None) -> Score:
    """What an individual with these pairs is worth; ``floor`` stands in for a failed pair."""
    if all(score.status.failed for score in scores):
        return Score(statistics.fmean(score.fitness for score in scores), scores[0].status)
    return Score(
        statistics.fmean(floor if score.status.failed else score.fitness for score in scores)
    )
