"""The evaluations of a run: made once, looked up ever after."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from evokernels.evolution.devices import find_device
from evokernels.evolution.evaluator import EVALUATION_VERSION
from evokernels.evolution.executor import WorkerExecutor
from evokernels.evolution.journal import Entry, Journal, open_journal
from evokernels.evolution.pool import Pool, open_pool
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial

__all__ = ["Evaluations", "OnGeneration", "OnProgress", "Request", "open_evaluations"]

OnProgress = Callable[[int, int, str], object]
OnGeneration = Callable[[int, Mapping[str, float]], object]


@dataclasses.dataclass(frozen=True)
class Request:
    """A trial that is needed, and where in the run; None for both after the search."""

    trial: Trial
    key: str
    generation: int | None = None
    place: int | None = None

    @classmethod
    def after_search(cls, trial: Trial) -> Request:
        """Of what no generation needs."""
        return cls(trial, trial.key)


class Evaluations:
    """Makes what the journal lacks, with what workers there are.

    Args:
        on_progress: called after every training run with the number of runs in the journal, the
            number expected in the end, and where the evolution stands.
    """

    def __init__(self, journal: Journal, pool: Pool, on_progress: OnProgress) -> None:
        self.journal = journal
        self._pool = pool
        self._on_progress = on_progress

    def make(self, requests: Iterable[Request], still_to_come: int, note: str) -> None:
        """Train what is missing; of requests that are one trial of one optimizer the first.

        Which one that is does not depend on what ends first, nor does anything else but the order
        of the rows.

        Args:
            still_to_come: runs that will be needed after these, as far as one can tell.
            note: where the evolution stands.
        """
        missing: dict[tuple[str, str, int, Purpose], Request] = {}
        for request in requests:
            trial = request.trial
            identity = request.key, trial.task, trial.seed, trial.purpose
            if self.journal.find(*identity) is None:
                missing.setdefault(identity, request)
        if not missing:
            return
        by_trial = {request.trial: request for request in missing.values()}
        expected = len(self.journal) + len(missing) + still_to_come
        self._on_progress(len(self.journal), expected, note)
        for trial, outcome in self._pool.run(by_trial):
            request = by_trial[trial]
            entry = Entry(request.generation, request.place, request.key, trial, outcome)
            self.journal.add(entry)
            self._on_progress(len(self.journal), expected, note)

    def entry(self, key: str, task: str, seed: int, purpose: Purpose) -> Entry:
        """What was made before."""
        entry = self.journal.find(key, task, seed, purpose)
        assert entry is not None, "only asked for what `make` has made sure of"
        return entry

    def outcome(self, trial: Trial) -> Outcome:
        """How a trial ended that was made before."""
        return self.entry(trial.key, trial.task, trial.seed, trial.purpose).outcome


@contextlib.contextmanager
def open_evaluations(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    conditions: Conditions,
    on_progress: OnProgress,
    **workers: Any,
) -> Iterator[Evaluations]:
    """Those of the run in ``folder``: its journal, and workers for what it lacks.

    Args:
        folder: the run folder.
        settings: JSON values, all that the numbers depend on, the conditions and ``threads`` and
            ``device`` of a training run among them.
        conditions: of every training run.
        on_progress: see `Evaluations`.
        workers: the other arguments of `open_pool`.

    Raises:
        SettingsError: the device is not there, and no `WorkerExecutor` knows another machine.
        JournalError: see `open_journal`.
    """
    recorded = {**settings, "evaluation_version": EVALUATION_VERSION}
    place = {name: settings[name] for name in ("threads", "device")}
    if not isinstance(workers.get("executor"), WorkerExecutor):
        find_device(settings["device"])  # before there is a journal of a run that cannot be
    with (
        open_journal(folder, recorded) as journal,
        open_pool(conditions, **place, **workers) as pool,
    ):
        yield Evaluations(journal, pool, on_progress)
