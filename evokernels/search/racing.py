"""The seed race: a genome that its first seeds show to be hopeless is not trained with the others.

A genome is trained with its next seed only if its mean over the seeds so far is within two standard
deviations of the k-th best genome of the generation before, k = 0.3 of the population: about as
many as have children. The standard deviation is that of the score of one seed, so that a genome
which belongs to the best k is stopped after one seed in 2 % of the cases, and a better one less.

What a seed adds to the scores of all genomes alike (an easy start, an easy order of the batches)
says nothing about any of them. With x[g, s] the score of genome g with seed s, of n genomes that
were trained with all S seeds,

    effect[s] = mean over g of x[g, s] - mean of all x
    noise²    = sum of (x[g, s] - mean of x[g, :] - effect[s])² / ((n - 1) (S - 1))

which is the residual of a two-way layout without interaction. Both are of the better half of these
genomes: bad optimizers are far noisier than those between which the race decides.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from evokernels.search.score import Score

__all__ = ["Bar", "SeedModel", "corrected_mean", "next_bar"]

SHARE = 0.3  # of the population: 15 of 50
DEVIATIONS = 2.0
LEAST = 3  # genomes that are enough to tell a seed's effect from noise


@dataclasses.dataclass(frozen=True)
class SeedModel:
    """What the seeds of a generation do to its scores; the module's docstring has the formulas.

    Attributes:
        effects: what each seed adds to the scores of all genomes; they sum to zero.
        noise: standard deviation of the score of one seed without that effect.
    """

    effects: Mapping[int, float]
    noise: float

    @classmethod
    def of(cls, complete: Iterable[Mapping[int, float]]) -> SeedModel | None:
        """From each genome's scores by seed; None if there is one seed, or too few genomes.

        Args:
            complete: each different genome that was trained to the end with all seeds and failed
                with none; every one has the same seeds.
        """
        ranked = sorted(complete, key=lambda row: statistics.fmean(row.values()), reverse=True)
        table = ranked[: math.ceil(len(ranked) / 2)]
        if len(table) < LEAST or len(table[0]) < 2:
            return None
        means = {seed: statistics.fmean(row[seed] for row in table) for seed in table[0]}
        middle = statistics.fmean(means.values())
        effects = {seed: mean - middle for seed, mean in means.items()}
        squares = sum(
            (score - statistics.fmean(row.values()) - effects[seed]) ** 2
            for row in table
            for seed, score in row.items()
        )
        return cls(effects, math.sqrt(squares / ((len(table) - 1) * (len(means) - 1))))


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a genome must reach to be trained with its next seed.

    Attributes:
        fitness: the least mean over its seeds so far.
        effects: what each seed adds to the scores of all genomes, where it is known.
    """

    fitness: float
    effects: Mapping[int, float]

    def admits(self, scores: Mapping[int, float]) -> bool:
        """Whether a genome with these scores, by seed, is trained further."""
        return corrected_mean(scores, self.effects) >= self.fitness


def corrected_mean(scores: Mapping[int, float], effects: Mapping[int, float]) -> float:
    """Mean score over seeds without their common effects; an unknown effect counts as none."""
    return statistics.fmean(score - effects.get(seed, 0.0) for seed, score in scores.items())


def next_bar(scores: Sequence[Score], seeds: SeedModel | None) -> Bar | None:
    """The bar for the generation after this one; None where too little is known for a race.

    Args:
        scores: of all genomes of the generation.
        seeds: what its seeds did.
    """
    ranked = sorted(scores, key=lambda score: score.rank, reverse=True)
    last = ranked[math.ceil(SHARE * len(ranked)) - 1]
    if seeds is None or last.status.failed:
        return None
    return Bar(last.fitness - DEVIATIONS * seeds.noise, seeds.effects)
