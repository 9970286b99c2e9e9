"""A comparison as a run: tune, train what the journal lacks, and put side by side."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from evokernels.errors import SettingsError
from evokernels.evolution import report, tuning
from evokernels.evolution.baselines import Baseline
from evokernels.evolution.comparison import Comparison, table
from evokernels.evolution.devices import named_device
from evokernels.evolution.evaluations import (
    Evaluations,
    OnProgress,
    Request,
    open_evaluations,
)
from evokernels.evolution.html_report.contest import write_contest_report
from evokernels.evolution.settings import SEED_LIMIT
from evokernels.evolution.trial import Conditions
from evokernels.genome import Genome
from evokernels.tasks import get_task

__all__ = ["Contest", "ContestResult", "compare"]


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is compared, and how.

    Args:
        optimizers: by the names that the tables give them.
        tasks: that each is trained on.
        seeds: of the training runs on each task.
        conditions: of every training run. Tuning needs a validation split.
        threads: torch threads of a training run.
        device: where training runs take place: "cpu", "cuda" or "cuda:N".
        trials: settings that are tried of each optimizer; 0: none is tuned.

    Raises:
        SettingsError, DatasetError: naming the setting, the value given and the values allowed;
            the device must be there only where training runs take place.
    """

    optimizers: Mapping[str, Genome | Baseline]
    tasks: Sequence[str]
    seeds: Sequence[int]
    conditions: Conditions
    threads: int
    device: str = "cpu"
    trials: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        named_device(self.device)
        for name, values in (
            ("optimizers", tuple(self.optimizers)),
            ("tasks", self.tasks),
            ("seeds", self.seeds),
        ):
            if not values or len(set(values)) < len(values):
                listed = " ".join(map(str, values)) or "none"
                raise SettingsError(f"{name} must be one or more different values, got {listed}")
        for seed in self.seeds:
            if not 0 <= seed < SEED_LIMIT:
                raise SettingsError(f"seeds must be from 0 to {SEED_LIMIT - 1}, got {seed}")
        if self.trials < 0:
            raise SettingsError(f"trials must be at least 0, got {self.trials}")
        if self.trials and not self.conditions.validation_samples:
            raise SettingsError(
                "tuning chooses by a validation split, and there is none; give validation samples"
            )
        if self.trials and tuning.TUNING_SEED in self.seeds:
            raise SettingsError(
                f"seed {tuning.TUNING_SEED} is the one that tuning chooses by; compare with others"
            )

    def journal_settings(self) -> dict[str, Any]:
        """All that a single training run depends on, beside what its row in the journal has.

        Not optimizers, tasks, seeds and trials: a folder goes on with more of them.
        """
        return {
            **dataclasses.asdict(self.conditions),
            "threads": self.threads,
            "device": self.device,
        }


@dataclasses.dataclass(frozen=True)
class ContestResult:
    """A complete comparison.

    Attributes:
        untuned: every optimizer as it was given.
        tuned: every optimizer as chosen; None where none was tuned.
        choices: what was chosen, by name; empty where none was tuned.
        evaluations: training runs that this call made; 0 if all were made before.
    """

    untuned: Comparison
    tuned: Comparison | None
    choices: Mapping[str, tuning.Choice]
    evaluations: int

    def tables(self) -> str:
        """In Markdown: fitness, then what was chosen."""
        tables = self.untuned.tables(self.tuned)
        if self.tuned is None:
            return tables
        chosen = table(
            ("optimizer", "validation fitness", "of the default", "chosen"),
            [
                (
                    name,
                    f"{choice.score.fitness:.4f}",
                    f"{choice.default_score.fitness:.4f}",
                    tuning.setting(choice.optimizer),
                )
                for name, choice in self.choices.items()
            ],
        )
        return f"{tables}\n\n{chosen}"


def compare(
    contest: Contest,
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    on_progress: OnProgress = lambda done, expected, note: None,
) -> ContestResult:
    """Make the comparison in ``folder``, or what is left of it; the same numbers either way.

    Writes ``comparison.csv``, ``comparison.png`` and ``report.html``.

    Args:
        contest: what is compared. A folder with a journal must have been made under the same
            conditions; runs that it has are not made again.
        folder: the run folder, created if it is missing.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        workers: processes that train; the result does not depend on it.
        time_limit: see `evokernels.evolution.pool.open_pool`.
        on_progress: called after every training run with the number of runs made, the number
            expected in the end, and what is being done.

    Raises:
        JournalError: see `evokernels.evolution.journal.open_journal`.
        DatasetError: a data set is missing or has not enough samples.
        WorkerError: the workers fail, not single evaluations (`Pool.run`).
    """
    with open_evaluations(
        folder,
        contest.journal_settings(),
        contest.conditions,
        on_progress,
        data_dir=data_dir,
        workers=workers,
        time_limit=time_limit,
    ) as evaluations:
        before = len(evaluations.journal)
        untuned, tuned, choices = _complete(contest, evaluations)
        made = len(evaluations.journal) - before
        result = ContestResult(untuned, tuned, choices, made)
        report.write_comparison(pathlib.Path(folder), untuned, tuned)
        write_contest_report(pathlib.Path(folder), contest, result, evaluations.journal)
    return result


def _complete(
    contest: Contest, evaluations: Evaluations
) -> tuple[Comparison, Comparison | None, dict[str, tuning.Choice]]:
    """Both phases, whatever the journal already has: the untuned, the tuned, what was chosen."""
    given, tasks, seeds = contest.optimizers, contest.tasks, contest.seeds
    tried = {
        name: tuning.candidates(optimizer, contest.trials, contest.conditions.steps)
        for name, optimizer in given.items()
        if contest.trials
    }
    selection = (trial for several in tried.values() for trial in tuning.trials(several, tasks))
    compared = (1 + bool(tried)) * len(given) * len(tasks) * len(seeds)
    evaluations.make(map(Request.after_search, selection), compared, "tuning")
    choices = {
        name: tuning.choose(several, tasks, evaluations.outcome) for name, several in tried.items()
    }

    chosen = {name: choice.optimizer for name, choice in choices.items()}
    reports = Comparison.trials((*given.values(), *chosen.values()), tasks, seeds)
    evaluations.make(map(Request.after_search, reports), 0, "comparison")
    untuned = Comparison.of(given, tasks, seeds, evaluations.outcome)
    tuned = Comparison.of(chosen, tasks, seeds, evaluations.outcome) if chosen else None
    return untuned, tuned, choices
