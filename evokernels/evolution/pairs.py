"""An architecture and an optimizer as one thing to train, and what it is worth."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from evokernels.architecture import Architecture
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.score import Score
from evokernels.tasks import cost_of, own_cost

__all__ = ["Measured", "Pair", "worth"]

MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is trained: an architecture, or each task's own network (None), with an optimizer."""

    architecture: Architecture | None
    optimizer: Genome

    def trial(self, task: str, seed: int, purpose: Purpose = Purpose.SEARCH) -> Trial:
        """One training run."""
        return Trial(self.optimizer, task, seed, purpose, self.architecture)

    def parameters(self, task: str) -> int:
        """Of the network on a task."""
        if self.architecture is None:
            return own_cost(task).parameters
        return cost_of(self.architecture, task).parameters

    def mean_parameters(self, tasks: Sequence[str]) -> float:
        """Of the networks on these tasks."""
        return statistics.fmean(map(self.parameters, tasks))

    def key(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Equal for pairs that are trained alike on these tasks."""
        return tuple(self.trial(task, seed=0).key for task in tasks)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A pair and what came of it in the search.

    Attributes:
        generation: that met it first, counted from 0.
        parameters: of its networks, the mean over the tasks.
        fitness: the mean over seeds and tasks, without the penalty.
        accuracy: likewise, on the split that selects; None if a run was not measured.
        score: its worth, which the search was told: the fitness less the penalty.
    """

    pair: Pair
    generation: int
    parameters: float
    fitness: float
    accuracy: float | None
    score: Score

    @classmethod
    def of(
        cls,
        pair: Pair,
        generation: int,
        runs: Mapping[str, Sequence[Outcome]],
        penalty: float,
    ) -> Measured:
        """From its runs on each task."""
        parameters = pair.mean_parameters(list(runs))
        accuracies = [outcome.accuracy for outcomes in runs.values() for outcome in outcomes]
        accuracy = None if None in accuracies else statistics.fmean(accuracies)
        fitness = genome_score(runs).fitness
        score = worth(runs, parameters, penalty)
        return cls(pair, generation, parameters, fitness, accuracy, score)


def worth(runs: Mapping[str, Sequence[Outcome]], parameters: float, penalty: float) -> Score:
    """The mean fitness over seeds and tasks, less the penalty; the status of the worst run.

    Args:
        runs: on each task.
        parameters: of the networks, the mean over the tasks.
        penalty: for a million of them.
    """
    score = genome_score(runs)
    return dataclasses.replace(score, fitness=score.fitness - penalty * parameters / MILLION)
