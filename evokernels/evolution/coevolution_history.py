"""The story of a co-evolution: what each generation came to, and which pairs are worth a look."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from evokernels.evolution.comparison import Comparison, Estimate
from evokernels.evolution.history import term_shares
from evokernels.evolution.pairs import Measured, Pair
from evokernels.evolution.winner import Winner
from evokernels.genome import Genome
from evokernels.search.score import Score

__all__ = [
    "OWN",
    "WINNER",
    "CoevolutionResult",
    "Population",
    "Round",
    "fresh_accuracy",
    "pareto_front",
    "scalars",
]

# What the winner is called beside others, and what it has to beat.
WINNER, OWN = "co-evolved pair", "own network, evolved_2025"


@dataclasses.dataclass(frozen=True)
class Population:
    """What the individuals of one side were worth in a generation.

    Attributes:
        best: the highest worth; an individual that failed comes after all others.
        mean: of all that did not fail; None if all failed.
        failed: individuals of which no pair held.
    """

    best: float
    mean: float | None
    failed: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Population:
        """From the scores of its individuals, at least one."""
        sound = [score.fitness for score in scores if not score.status.failed]
        best = max(scores, key=lambda score: score.rank).fitness
        mean = statistics.fmean(sound) if sound else None
        return cls(best, mean, len(scores) - len(sound))


@dataclasses.dataclass(frozen=True)
class Round:
    """What one generation came to; nothing in it depends on time or on an interruption.

    Attributes:
        number: counted from 0.
        architectures: the first population.
        optimizers: the second one.
        best: the best pair of this and all earlier generations.
        pairs: different ones that it asked for.
        evaluations: training runs that it needed.
        reused: training runs of its pairs that were made before, or for another pair of its own
            that is trained alike.
        failed: of its pairs, those with a run that failed.
    """

    number: int
    architectures: Population
    optimizers: Population
    best: Measured
    pairs: int
    evaluations: int
    reused: int
    failed: int


@dataclasses.dataclass(frozen=True)
class CoevolutionResult:
    """A complete co-evolution.

    Attributes:
        best: the winning pair, as the search measured it.
        history: one entry a generation.
        pairs: all that were trained alike once, in the order in which the search met them.
        contenders: who is compared, by name; the winner is `WINNER`.
        comparison: of the contenders, on fresh seeds.
        winner: how the winner does there, beside the fitness that selected it.
        evaluations: training runs that this call made; 0 if the run was complete before.
    """

    best: Measured
    history: tuple[Round, ...]
    pairs: tuple[Measured, ...]
    contenders: Mapping[str, Pair]
    comparison: Comparison
    winner: Winner
    evaluations: int

    @property
    def lead(self) -> Estimate:
        """By how much the winner's test fitness is ahead, seed by seed, of what it has to beat."""
        return Estimate.of(
            statistics.fmean(
                self.comparison.row(WINNER, task, seed).outcome.test_fitness
                - self.comparison.row(OWN, task, seed).outcome.test_fitness
                for task in self.comparison.tasks
            )
            for seed in self.comparison.seeds
        )


def scalars(entry: Round, optimizers: Sequence[Genome]) -> dict[str, float]:
    """What one watches of a generation, by name."""
    sides = {"architectures": entry.architectures, "optimizers": entry.optimizers}
    return {
        **{f"{name}/best": side.best for name, side in sides.items()},
        **{f"{name}/mean": side.mean for name, side in sides.items() if side.mean is not None},
        **{f"{name}/failed": side.failed for name, side in sides.items()},
        "pair/worth": entry.best.score.fitness,
        "pair/fitness": entry.best.fitness,
        "pair/parameters": entry.best.parameters,
        **{f"runs/{name}": getattr(entry, name) for name in ("evaluations", "reused")},
        **{f"terms/{name}": share for name, share in term_shares(optimizers).items()},
    }


def fresh_accuracy(comparison: Comparison, name: str) -> Estimate:
    """Of a contender on the split that selects, with the seeds of the comparison; a run that was
    not measured classified nothing correctly."""
    return Estimate.of(
        statistics.fmean(
            comparison.row(name, task, seed).outcome.accuracy or 0.0 for task in comparison.tasks
        )
        for seed in comparison.seeds
    )


def pareto_front(pairs: Sequence[Measured]) -> list[Measured]:
    """Those that no other pair surpasses: more accurate than all with as few parameters or fewer.

    From few parameters to many, so from low to high accuracy; of equals the first. Pairs that
    failed or were not measured are left out.
    """
    sound = [pair for pair in pairs if pair.accuracy is not None and not pair.score.status.failed]
    front: list[Measured] = []
    for pair in sorted(sound, key=lambda pair: (pair.parameters, -pair.accuracy)):
        if not front or pair.accuracy > front[-1].accuracy:
            front.append(pair)
    return front
