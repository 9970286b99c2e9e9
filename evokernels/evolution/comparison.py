"""Optimizers side by side: the two tables of the source system, with standard errors."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from evokernels.evolution.baselines import Baseline, hessian_passes
from evokernels.evolution.files import csv_text
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.evolution.tuning import setting
from evokernels.genome import Genome

__all__ = ["Comparison", "Estimate", "Row", "table"]


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

    name: str
    trial: Trial
    outcome: Outcome

    @property
    def test_accuracy(self) -> float:
        """On the test split; a run that was not measured classified nothing correctly."""
        return self.outcome.test_accuracy or 0.0

    @property
    def hessian_passes(self) -> int:
        """Passes through the network beside the one of each step."""
        return hessian_passes(self.trial.optimizer, self.outcome.steps)


class Comparison:
    """Runs of several optimizers on the same tasks with the same seeds, judged on the test split.

    Args:
        rows: one for each name, task and seed; their order gives the order of the tables.
    """

    @classmethod
    def of(
        cls,
        optimizers: Mapping[str, Genome | Baseline],
        tasks: Sequence[str],
        seeds: Sequence[int],
        outcome: Callable[[Trial], Outcome],
    ) -> Comparison:
        """Of every named optimizer on every task with every seed, as looked up in ``outcome``."""
        return cls(
            [
                Row(name, trial, outcome(trial))
                for name, optimizer in optimizers.items()
                for trial in cls.trials([optimizer], tasks, seeds)
            ]
        )

    @staticmethod
    def trials(
        optimizers: Iterable[Genome | Baseline], tasks: Sequence[str], seeds: Sequence[int]
    ) -> list[Trial]:
        """The training runs that a comparison is made of."""
        return [
            Trial(optimizer, task, seed, Purpose.REPORT)
            for optimizer in optimizers
            for task in tasks
            for seed in seeds
        ]

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self.optimizers = tuple(dict.fromkeys(row.name for row in rows))
        self.tasks = tuple(dict.fromkeys(row.trial.task for row in rows))
        self.seeds = tuple(dict.fromkeys(row.trial.seed for row in rows))
        self._rows = {(row.name, row.trial.task, row.trial.seed): row for row in rows}

    def row(self, name: str, task: str, seed: int) -> Row:
        """One of its runs."""
        return self._rows[name, task, seed]

    def task_fitness(self, name: str, task: str) -> Estimate:
        """Mean fitness on one task over the seeds."""
        return Estimate.of(self._rows[name, task, seed].outcome.test_fitness for seed in self.seeds)

    def overall_fitness(self, name: str) -> Estimate:
        """Mean over the seeds of the mean over the tasks."""
        return self._overall(name, lambda row: row.outcome.test_fitness)

    def overall_accuracy(self, name: str) -> Estimate:
        """Like `overall_fitness`; a diverged run counts as nothing classified correctly."""
        return self._overall(name, lambda row: row.test_accuracy)

    def gradient_passes(self, name: str) -> str:
        """Passes through the network in the longest run: one a step, then those beside them."""
        longest = max(
            (row for row in self.rows if row.name == name), key=lambda row: row.outcome.steps
        )
        extra = longest.hessian_passes
        return f"{longest.outcome.steps} + {extra}" if extra else str(longest.outcome.steps)

    def tables(self, tuned: Comparison | None = None) -> str:
        """In Markdown: overall, then per task where there are several tasks.

        Args:
            tuned: the same optimizers tuned, for a column beside each.
        """
        versions = [self] if tuned is None else [self, tuned]

        def columns(title: str) -> list[str]:
            return [title] if tuned is None else [title, "tuned"]

        overall = table(
            [
                "optimizer",
                *columns("overall fitness"),
                *columns("test accuracy"),
                "gradient passes",
            ],
            [
                (
                    name,
                    *(str(version.overall_fitness(name)) for version in versions),
                    *(str(version.overall_accuracy(name)) for version in versions),
                    self.gradient_passes(name),
                )
                for name in self.optimizers
            ],
        )
        if len(self.tasks) == 1:
            return overall
        titles = (title for task in self.tasks for title in columns(f"fitness on {task}"))
        per_task = table(
            ["optimizer", *titles],
            [
                (
                    name,
                    *(
                        str(version.task_fitness(name, task))
                        for task in self.tasks
                        for version in versions
                    ),
                )
                for name in self.optimizers
            ],
        )
        return f"{overall}\n\n{per_task}"

    def csv(self, tuned: Comparison | None = None) -> str:
        """Every run as one line, those of ``tuned`` behind the others.

        Fitness and accuracy are of the test split. No wall-clock times, so that equal results are
        equal files.
        """
        measured = "fitness", "accuracy", "final_loss", "steps", "gradient_passes"
        header = "optimizer", "tuned", "setting", "task", "seed", "status", *measured
        lines = []
        for version, answer in ((self, "no"), (tuned, "yes")):
            for row in version.rows if version else ():
                trial, end = row.trial, row.outcome
                passes = end.steps + row.hessian_passes
                measured = end.test_fitness, end.test_accuracy, end.final_loss, end.steps, passes
                what = row.name, answer, setting(trial.optimizer), trial.task, trial.seed
                lines.append((*what, end.status.value, *measured))
        return csv_text(header, lines)

    def _overall(self, name: str, value: Callable[[Row], float]) -> Estimate:
        return Estimate.of(
            statistics.fmean(value(self._rows[name, task, seed]) for task in self.tasks)
            for seed in self.seeds
        )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right, columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(cells)} |"

    first, *others = widths
    rule = f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in others)
    return "\n".join((line(header), rule, *map(line, rows)))
