"""Training whose outcome is a formula: an evolution takes a second, and what a genome is worth in
truth is known.

Each structure (its terms and flags) has a worth of its own and its own best learning rate, betas,
weight decay and ratios of weights, all drawn from its name; what a genome misses by is quadratic in
its distances from those. Scores of single runs scatter around that as those of short trainings do:
half of the variance is the seed's, common to all genomes, half is the run's, and bad optimizers
scatter more.
"""

from __future__ import annotations

import concurrent.futures
import math
import random
from collections.abc import Callable

from evokernels import Genome
from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.refining import coordinates_of
from evokernels.evolution.trial import Outcome, Trial
from evokernels.search.score import Status

__all__ = ["Landscape", "truth"]

CHANCE, CEILING = 0.1, 0.92
SCATTER = 0.004  # standard deviation of each half of a good genome's score with one seed

# of each number: the range of its best values, and what a genome loses by one unit beside them
RATE = (-3.5, -2.5), 0.05  # decades of lr times the sum of the weights' sizes
AVERAGED = {"beta1": ((0.7, 4.6), 0.006), "beta2": ((2.3, 6.9), 0.002)}  # ln 1 / (1 - beta)
DECAY = (-5.0, -3.0), 0.002  # decades
RATIO = (-1.5, 1.5), 0.006  # ln of a weight's size by that of the first


def truth(genome: Genome) -> float:
    """The mean score of a genome over all seeds."""
    flags = genome.use_m, genome.use_v, genome.use_bias_correction, genome.use_cosine_decay
    structure = f"{sorted(set(genome.term_types))} {flags}"
    worth = CEILING + 0.008 * random.Random(f"worth {structure}").gauss(0.0, 1.0)
    reads = coordinates_of(genome).numbers

    def loss(name: str, value: float, best: tuple[float, float], weight: float) -> float:
        ideal = random.Random(f"{name} {structure}").uniform(*best)
        return weight * (value - ideal) ** 2

    sizes = [abs(alpha) + 1e-6 for alpha in genome.alphas]
    misses = loss("rate", genome.lr_log10 + math.log10(sum(sizes)), *RATE)
    for name, row in AVERAGED.items():
        if name in reads:
            misses += loss(name, -math.log1p(-getattr(genome, name)), *row)
    if "wd_log10" in reads:
        misses += loss("decay", genome.wd_log10, *DECAY)
    for place, size in enumerate(sizes[1:], start=1):
        misses += loss(f"ratio {place}", math.log(size / sizes[0]), *RATIO)
    uphill = 1.0 if sum(genome.alphas) < 0.0 else 0.0
    return max(worth - misses - uphill, CHANCE)


class Landscape(concurrent.futures.Executor):
    """An executor that looks trials up in the landscape instead of training."""

    def submit(self, fn: Callable, /, *args: Trial) -> concurrent.futures.Future:
        """The outcome of the trial, at once."""
        (trial,) = args
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(_outcome(trial, fn.conditions.steps))
        return future


def _outcome(trial: Trial, steps: int) -> Outcome:
    genome = trial.optimizer
    expected = truth(genome)
    scatter = SCATTER + 0.1 * (CEILING - min(expected, CEILING))
    shared, own = (
        random.Random(f"{name} {trial.task} {trial.seed}").gauss(0.0, 1.0)
        for name in ("", canonical_key(genome))
    )
    fitness = expected + SCATTER * shared + scatter * own
    return Outcome(Status.OK, fitness, fitness, 1.0, steps, 0.0, "landscape", fitness)
