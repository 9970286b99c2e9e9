"""Optimizers side by side: the two tables of the source system, with standard errors."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from evokernels.evolution.pool import Pool
from evokernels.evolution.trial import Outcome, Trial
from evokernels.genome import Genome

__all__ = ["Comparison", "Estimate", "Row", "compare"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over seeds; the error of a single seed is not known (NaN)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """From one value a seed."""
        values = list(values)
        if len(values) < 2:
            return cls(statistics.fmean(values), math.nan)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.mean:.4f}{error}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One training run of a named optimizer."""

    optimizer: str
    task: str
    seed: int
    outcome: Outcome


class Comparison:
    """Runs of several optimizers on the same tasks with the same seeds.

    Args:
        rows: one for each optimizer, task and seed; their order gives the order of the tables.
    """

    @classmethod
    def of(
        cls,
        genomes: Mapping[str, Genome],
        tasks: Sequence[str],
        seeds: Sequence[int],
        outcome: Callable[[Trial], Outcome],
    ) -> Comparison:
        """Of every named genome on every task with every seed, as looked up in ``outcome``."""
        return cls(
            [
                Row(name, task, seed, outcome(Trial(genome, task, seed)))
                for name, genome in genomes.items()
                for task in tasks
                for seed in seeds
            ]
        )

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self.optimizers = tuple(dict.fromkeys(row.optimizer for row in rows))
        self.tasks = tuple(dict.fromkeys(row.task for row in rows))
        self.seeds = tuple(dict.fromkeys(row.seed for row in rows))
        self._outcomes = {(row.optimizer, row.task, row.seed): row.outcome for row in rows}

    def task_fitness(self, optimizer: str, task: str) -> Estimate:
        """Mean fitness on one task over the seeds."""
        return Estimate.of(self._outcomes[optimizer, task, seed].fitness for seed in self.seeds)

    def overall_fitness(self, optimizer: str) -> Estimate:
        """Mean over the seeds of the mean over the tasks."""
        return Estimate.of(
            statistics.fmean(self._outcomes[optimizer, task, seed].fitness for task in self.tasks)
            for seed in self.seeds
        )

    def overall_accuracy(self, optimizer: str) -> Estimate:
        """Like `overall_fitness`; a diverged run counts as no image classified correctly."""
        return Estimate.of(
            statistics.fmean(
                self._outcomes[optimizer, task, seed].accuracy or 0.0 for task in self.tasks
            )
            for seed in self.seeds
        )

    def tables(self) -> str:
        """In Markdown: overall, then per task where there are several tasks."""
        overall = _table(
            ("optimizer", "overall fitness", "test accuracy"),
            [
                (name, str(self.overall_fitness(name)), str(self.overall_accuracy(name)))
                for name in self.optimizers
            ],
        )
        if len(self.tasks) == 1:
            return overall
        per_task = _table(
            ("optimizer", *(f"fitness on {task}" for task in self.tasks)),
            [
                (name, *(str(self.task_fitness(name, task)) for task in self.tasks))
                for name in self.optimizers
            ],
        )
        return f"{overall}\n\n{per_task}"

    def csv(self) -> str:
        """Every run as one line; no wall-clock times, so that equal results are equal files."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ("optimizer", "task", "seed", "status", "fitness", "accuracy", "final_loss", "steps")
        )
        for row in self.rows:
            end = row.outcome
            measured = (end.status.value, end.fitness, end.accuracy, end.final_loss, end.steps)
            writer.writerow((row.optimizer, row.task, row.seed, *measured))
        return text.getvalue()


def compare(
    pool: Pool,
    genomes: Mapping[str, Genome],
    tasks: Sequence[str],
    seeds: Sequence[int],
    on_progress: Callable[[int, int], object],
) -> Comparison:
    """Train every genome on every task with every seed.

    Args:
        on_progress: called at the start and after every training run with the number of runs
            made and the number of all runs; genomes that are equal share theirs.
    """
    trials = dict.fromkeys(
        Trial(genome, task, seed) for genome in genomes.values() for task in tasks for seed in seeds
    )
    outcomes: dict[Trial, Outcome] = {}
    on_progress(0, len(trials))
    for trial, outcome in pool.run(trials):
        outcomes[trial] = outcome
        on_progress(len(outcomes), len(trials))
    return Comparison.of(genomes, tasks, seeds, outcomes.__getitem__)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right, columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(cells)} |"

    first, *others = widths
    rule = f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in others)
    return "\n".join((line(header), rule, *map(line, rows)))
