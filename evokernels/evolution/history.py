"""The story of a run: what each generation came to."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence

from evokernels.evolution.fitness import genome_score
from evokernels.evolution.journal import Entry
from evokernels.search.score import Score, Status

__all__ = ["Generation", "Result", "summarise"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A genome's evaluations: for each task, one journal entry for each seed."""

    by_task: Mapping[str, Sequence[Entry]]

    @functools.cached_property
    def score(self) -> Score:
        """What the search is told."""
        return genome_score(
            {
                task: [(entry.outcome.fitness, entry.outcome.status) for entry in entries]
                for task, entries in self.by_task.items()
            }
        )

    @property
    def entries(self) -> list[Entry]:
        """All of them, task after task."""
        return [entry for entries in self.by_task.values() for entry in entries]

    @property
    def accuracy(self) -> float | None:
        """Mean test accuracy; None if it diverged in any run."""
        accuracies = [entry.outcome.accuracy for entry in self.entries]
        return None if None in accuracies else statistics.fmean(accuracies)

    def task_fitness(self, task: str) -> float:
        """Mean fitness over the seeds of one task."""
        return statistics.fmean(entry.outcome.fitness for entry in self.by_task[task])


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one generation came to; nothing in it depends on time or on an interruption.

    Attributes:
        number: counted from 0.
        best: the highest fitness; a genome that diverged in any run comes after all others.
        mean: of the fitness of all genomes, diverged runs counted at -1.
        best_so_far: the highest fitness of this and all earlier generations.
        best_accuracy: of the best genome, mean over its runs; None if it diverged in any.
        task_best: the highest fitness on each task, reached by any genome.
        task_mean: the mean fitness of all genomes on each task.
        evaluations: training runs that this generation needed.
        reused: training runs that it shares with genomes before.
        diverged: genomes that diverged in at least one run.
    """

    number: int
    best: float
    mean: float
    best_so_far: float
    best_accuracy: float | None
    task_best: Mapping[str, float]
    task_mean: Mapping[str, float]
    evaluations: int
    reused: int
    diverged: int


def summarise(number: int, results: Sequence[Result], best_so_far: Score) -> Generation:
    """What generation ``number`` came to, given the results of its genomes in their order."""
    champion = max(results, key=lambda result: result.score.rank)
    by_task = {task: [result.task_fitness(task) for result in results] for task in champion.by_task}
    entries = [entry for result in results for entry in result.entries]
    trained = {entry for entry in entries if entry.generation == number}
    return Generation(
        number=number,
        best=champion.score.fitness,
        mean=statistics.fmean(result.score.fitness for result in results),
        best_so_far=best_so_far.fitness,
        best_accuracy=champion.accuracy,
        task_best={task: max(values) for task, values in by_task.items()},
        task_mean={task: statistics.fmean(values) for task, values in by_task.items()},
        evaluations=len(trained),
        reused=len(entries) - len(trained),
        diverged=sum(result.score.status is Status.DIVERGED for result in results),
    )
