"""Training runs that are made once: what a journal has is not trained again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evokernels.evolution.baselines import optimizer_key
from evokernels.evolution.journal import Entry, Journal
from evokernels.evolution.pool import Pool
from evokernels.evolution.trial import Outcome, Trial

__all__ = ["recorded", "train_missing"]


def recorded(journal: Journal, trial: Trial) -> Outcome | None:
    """How ``trial``, or that of an optimizer that is the same one, has ended; None if not yet."""
    entry = journal.find(optimizer_key(trial.optimizer), trial.task, trial.seed)
    return None if entry is None else entry.outcome


def train_missing(
    journal: Journal,
    pool: Pool,
    trials: Iterable[Trial],
    on_progress: Callable[[int, int], object],
) -> None:
    """Make the training runs that the journal lacks, each committed as soon as it ends.

    Args:
        trials: that `recorded` shall know afterwards; of optimizers that are one, the first runs.
        on_progress: called before the first training run and after each with the number of runs
            that the journal has and of all, optimizers that are one counted once.
    """
    wanted: dict[tuple, Trial] = {}
    for trial in trials:
        wanted.setdefault((optimizer_key(trial.optimizer), trial.task, trial.seed), trial)
    missing = [trial for trial in wanted.values() if recorded(journal, trial) is None]
    if not missing:
        return
    done = len(wanted) - len(missing)
    on_progress(done, len(wanted))
    for trial, outcome in pool.run(missing):
        journal.add(Entry(None, None, optimizer_key(trial.optimizer), trial, outcome))
        done += 1
        on_progress(done, len(wanted))
