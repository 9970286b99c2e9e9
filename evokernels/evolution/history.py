"""The story of a run: what each generation came to."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from evokernels.architecture import Architecture, kind_and_size
from evokernels.evolution.journal import Entry, Saving
from evokernels.genome import Genome
from evokernels.search.score import Score, Status

__all__ = [
    "Generation",
    "Result",
    "Spread",
    "component_shares",
    "plateaued",
    "scalars",
    "summarise",
    "term_shares",
]

LOST = (Status.CRASHED, Status.TIMED_OUT, Status.OUT_OF_MEMORY)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a genome.

    Attributes:
        by_task: for each task, one journal entry for each seed it was trained with.
        score: what the search is told.
        paired: with the seeds of this generation alone, for a comparison in which all have the
            same; None if it was not trained with all of them.
        trained: the seeds that it was trained with in this generation, on all tasks.
        savings: the evaluations that it did without.
    """

    by_task: Mapping[str, Sequence[Entry]]
    score: Score
    paired: Score | None
    trained: Sequence[int]
    savings: Sequence[Saving]

    @property
    def runs(self) -> int:
        """Training runs that were made for it."""
        return len(self.trained) * len(self.by_task)

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy on the split that selects; None if a run was not measured."""
        entries = [entry for entries in self.by_task.values() for entry in entries]
        accuracies = [entry.outcome.accuracy for entry in entries]
        return None if None in accuracies else statistics.fmean(accuracies)

    def task_fitness(self, task: str) -> float:
        """Mean fitness over the seeds of one task."""
        return statistics.fmean(entry.outcome.fitness for entry in self.by_task[task])

    def held_on(self, task: str) -> bool:
        """Whether all its runs on the task went to the end."""
        return all(entry.outcome.status is Status.OK for entry in self.by_task[task])

    def saved(self, rule: str) -> int:
        """Training runs that a rule left out."""
        return sum(saving.rule == rule for saving in self.savings)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How values lie: their quartiles, mean and greatest."""

    low: float
    median: float
    high: float
    mean: float
    best: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Quartiles between the values, which include the least and the greatest (NumPy's and R's
        default); None of no values."""
        values = sorted(values)
        if not values:
            return None
        quartiles = statistics.quantiles(
            values * 2 if len(values) == 1 else values, method="inclusive"
        )
        return cls(*quartiles, statistics.fmean(values), values[-1])


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one generation came to; nothing in it depends on time or on an interruption.

    Attributes:
        number: counted from 0.
        population: genomes that the search asked for.
        best: the highest fitness; a genome that failed in any run comes after all others.
        mean: of the fitness of all genomes, failed runs counted at -1.
        best_so_far: the fitness of the best genome of this and all earlier generations; it falls
            only where seeds rotate and that genome is told a lower one.
        best_accuracy: of the best genome, mean over its runs; None if it failed in any.
        task_best: the highest fitness on each task, reached by any genome.
        task_mean: the mean fitness of all genomes on each task.
        evaluations: training runs that this generation needed.
        reused: training runs that it shares with genomes before.
        raced: training runs that the seed race left out.
        stopped: genomes that the hurdle stopped in their worst run.
        diverged: genomes that diverged in their worst run.
        failed: genomes whose worst run was lost: it crashed, hung or ran out of memory.
        refining: training runs that refining its best genomes needed besides; None in a run that
            refines nothing.
        spread: of the fitness of the genomes that were trained to the end, neither failed nor
            stopped by the hurdle; None if there is none.
        task_spread: likewise on each task.
    """

    number: int
    population: int
    best: float
    mean: float
    best_so_far: float
    best_accuracy: float | None
    task_best: Mapping[str, float]
    task_mean: Mapping[str, float]
    evaluations: int
    reused: int
    raced: int
    stopped: int
    diverged: int
    failed: int
    refining: int | None
    spread: Spread | None
    task_spread: Mapping[str, Spread | None]

    @property
    def sound(self) -> int:
        """Genomes that did neither fail nor were stopped by the hurdle."""
        return self.population - self.stopped - self.diverged - self.failed


def summarise(
    number: int, results: Sequence[Result], best_so_far: Score, refining: int | None = None
) -> Generation:
    """What generation ``number`` came to, given the results of its genomes in their order."""
    champion = max(results, key=lambda result: result.score.rank)
    by_task = {task: [result.task_fitness(task) for result in results] for task in champion.by_task}
    statuses = collections.Counter(result.score.status for result in results)
    return Generation(
        number=number,
        population=len(results),
        best=champion.score.fitness,
        mean=statistics.fmean(result.score.fitness for result in results),
        best_so_far=best_so_far.fitness,
        best_accuracy=champion.accuracy,
        task_best={task: max(values) for task, values in by_task.items()},
        task_mean={task: statistics.fmean(values) for task, values in by_task.items()},
        evaluations=sum(result.runs for result in results),
        reused=sum(result.saved("cache") for result in results),
        raced=sum(result.saved("race") for result in results),
        stopped=statuses[Status.STOPPED],
        diverged=statuses[Status.DIVERGED],
        failed=sum(statuses[lost] for lost in LOST),
        refining=refining,
        spread=Spread.of(r.score.fitness for r in results if r.score.status is Status.OK),
        task_spread={
            task: Spread.of(result.task_fitness(task) for result in results if result.held_on(task))
            for task in champion.by_task
        },
    )


def scalars(entry: Generation, genomes: Sequence[Genome]) -> dict[str, float]:
    """What one watches of a generation, by name; means are of what was trained to the end."""
    fitness = {"best": entry.best, "best_so_far": entry.best_so_far}
    by_task = {f"{task}/best": best for task, best in entry.task_best.items()}
    means = {"fitness/mean": entry.spread} | {
        f"{task}/mean": spread for task, spread in entry.task_spread.items()
    }
    return {
        **{f"fitness/{name}": value for name, value in fitness.items()},
        **by_task,
        **{name: spread.mean for name, spread in means.items() if spread},
        **{f"runs/{name}": getattr(entry, name) for name in ("evaluations", "reused", "raced")},
        **{f"genomes/{name}": getattr(entry, name) for name in ("stopped", "diverged", "failed")},
        **{f"terms/{name}": share for name, share in term_shares(genomes).items()},
    }


def term_shares(genomes: Sequence[Genome]) -> dict[str, float]:
    """The share of genomes that have a term, for every term that any has; in alphabetical order.

    A genome that has a term counts once, however often it has it and with which weight.
    """
    return _shares([{term.name for term in genome.term_types} for genome in genomes])


def component_shares(architectures: Sequence[Architecture]) -> dict[str, float]:
    """The share of architectures that have a kind of component, whatever its size; likewise."""
    return _shares([{kind_and_size(name)[0] for name in each.components} for each in architectures])


def _shares(having: Sequence[set[str]]) -> dict[str, float]:
    counts = collections.Counter(name for names in having for name in names)
    return {name: count / len(having) for name, count in sorted(counts.items())}


def plateaued(history: Sequence[Generation], length: int) -> bool:
    """Whether the last ``length`` generations brought nothing better than all before them.

    However little better counts: with the same seeds for all, a better score is one on the very
    same trials. 0: never.
    """
    if not length or len(history) <= length:
        return False
    best = [entry.best_so_far for entry in history]
    return max(best[-length:]) <= max(best[:-length])
