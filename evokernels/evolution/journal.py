"""The journal of a run: an SQLite file with a row for every evaluation and every genome.

The search is deterministic given its seed and its scores, so the journal is all there is to save:
a run resumes by replaying it. Every row is committed as soon as its evaluation ends, so a run
killed at any moment loses only what was in flight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evokernels.architecture import Architecture
from evokernels.errors import JournalError, UnknownTermError
from evokernels.evolution.records import (
    individual_from_json,
    to_json,
    trained_from_json,
    trained_to_json,
)
from evokernels.evolution.schema import SCHEMA, SCHEMA_VERSION
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.score import Score, Status

__all__ = ["Entry", "Journal", "Saving", "open_journal"]

JOURNAL = "journal.sqlite"
LOCK = "lock"
UNFINISHED = "journal.sqlite.new"
SYNCHRONOUS = "FULL"  # a row survives the machine, too; beside seconds of training: free

# What runs did that were recorded before these settings existed.
BEFORE = {"refine": 0, "catalogue": "classic", "own_terms": []}

APPLICATION_ID = int.from_bytes(b"EVOK", "big")
COLUMNS = (
    "generation, place, genome, key, task, seed, purpose, "
    "status, fitness, accuracy, final_loss, steps, seconds, data, test_accuracy"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One evaluation and where in the run it was first needed.

    Attributes:
        generation: of the search; None after it.
        place: in that generation; None after the search.
        key: of the trial.
    """

    generation: int | None
    place: int | None
    key: str
    trial: Trial
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Saving:
    """One evaluation that was not made.

    Attributes:
        place: in the generation, of the genome that did without it.
        key: of that genome.
        rule: "cache" (one optimizer is trained once) or "race" (`evokernels.search.racing`).
        steps: that it would have taken; see `evokernels.evolution.schema`.
    """

    place: int
    key: str
    task: str
    seed: int
    rule: str
    steps: int


class Journal:
    """The record of a run; made by `open_journal`. Looks up what it is asked for on disk."""

    def __init__(self, path: pathlib.Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        (self._count,) = connection.execute("SELECT count(*) FROM evaluation").fetchone()
        self._data = dict(
            connection.execute("SELECT DISTINCT task, data FROM evaluation WHERE data <> ''")
        )

    def __len__(self) -> int:
        """Evaluations recorded."""
        return self._count

    def find(self, key: str, task: str, seed: int, purpose: Purpose) -> Entry | None:
        """The evaluation of what has this key on this task with this seed, if there is one."""
        with _clear_errors(self.path):
            row = self._connection.execute(
                f"SELECT {COLUMNS} FROM evaluation "
                "WHERE key = ? AND task = ? AND seed = ? AND purpose = ?",
                (key, task, seed, purpose.value),
            ).fetchone()
            return None if row is None else _entry(row)

    def begin_generation(
        self, generation: int, genomes: Sequence[tuple[str, Genome | Architecture]], first: int = 0
    ) -> None:
        """Record genomes of a generation, or see that they are those that were recorded.

        Args:
            genomes: each with its key.
            first: place of the first of them.

        Raises:
            JournalError: it has recorded others.
        """
        rows = {place: (to_json(genome), key) for place, (key, genome) in enumerate(genomes, first)}
        with _clear_errors(self.path):
            recorded = {
                place: (genome, key)
                for place, genome, key in self._connection.execute(
                    "SELECT place, genome, key FROM candidate "
                    "WHERE generation = ? AND place BETWEEN ? AND ?",
                    [generation, first, first + len(rows) - 1],
                )
            }
            if not recorded:
                with self._transaction():
                    self._connection.executemany(
                        "INSERT INTO candidate VALUES (?, ?, ?, ?, NULL, NULL)",
                        [(generation, place, *row) for place, row in rows.items()],
                    )
        if recorded:
            self._check_replay(generation, recorded, rows)

    def end_generation(
        self,
        generation: int,
        scores: Sequence[Score],
        savings: Iterable[Saving],
        first: int = 0,
    ) -> None:
        """Record what genomes of a generation came to, or see that it is what was recorded.

        Args:
            scores: of the genomes, in order.
            savings: the evaluations that they did without.
            first: place of the first of them.

        Raises:
            JournalError: it has recorded others.
        """
        rows = {
            place: (score.fitness, score.status.value) for place, score in enumerate(scores, first)
        }
        with _clear_errors(self.path):
            recorded = {
                place: (score, status)
                for place, score, status in self._connection.execute(
                    "SELECT place, score, status FROM candidate "
                    "WHERE generation = ? AND place BETWEEN ? AND ? AND score IS NOT NULL",
                    [generation, first, first + len(rows) - 1],
                )
            }
            if not recorded:
                with self._transaction():
                    self._connection.executemany(
                        "UPDATE candidate SET score = ?, status = ? "
                        "WHERE generation = ? AND place = ?",
                        [(*row, generation, place) for place, row in rows.items()],
                    )
                    self._connection.executemany(
                        "INSERT INTO saving VALUES (?, ?, ?, ?, ?, ?, ?)",
                        [(generation, *dataclasses.astuple(saving)) for saving in savings],
                    )
        if recorded:
            self._check_replay(generation, recorded, rows)

    def add(self, entry: Entry) -> None:
        """Commit one evaluation to disk.

        Raises:
            JournalError: it cannot be written, or was not made with the data of the run.
        """
        trial, outcome = entry.trial, entry.outcome
        # a worker that is gone has not said which data it had
        if outcome.data and self._data.setdefault(trial.task, outcome.data) != outcome.data:
            raise JournalError(
                f"the data of {trial.task} are not those that the run in {self.path.parent} "
                "began with; point the data folder back at those, or use another run folder"
            )
        row = (
            *(entry.generation, entry.place, trained_to_json(trial)),
            *(entry.key, trial.task, trial.seed, trial.purpose.value),
            *(outcome.status.value, outcome.fitness, outcome.accuracy, outcome.final_loss),
            *(outcome.steps, outcome.seconds, outcome.data, outcome.test_accuracy),
        )
        with _clear_errors(self.path):
            marks = ", ".join("?" * len(row))
            self._connection.execute(f"INSERT INTO evaluation ({COLUMNS}) VALUES ({marks})", row)
        self._count += 1

    def query(self, sql: str, *values: int | str) -> list[tuple]:
        """The rows that a statement selects; `evokernels.evolution.schema` has what there is."""
        with _clear_errors(self.path):
            return self._connection.execute(sql, values).fetchall()

    def _check_replay(
        self, generation: int, recorded: Mapping[int, tuple], rows: Mapping[int, tuple]
    ) -> None:
        for place in sorted({*recorded, *rows}):
            if recorded.get(place) != rows.get(place):
                raise JournalError(
                    f"{self.path} was written by another version of the search: genome {place} of "
                    f"generation {generation} differs; resume with the version that began the "
                    "run, or use another run folder"
                )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All statements of the block, or none; outside of one, each is committed at once."""
        self._connection.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


@contextlib.contextmanager
def open_journal(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the run in ``folder``; a new or empty folder begins a new run.

    Args:
        folder: the run folder; created if it is missing.
        settings: JSON values, all that the history of the run depends on.

    Raises:
        JournalError: the folder holds something else, belongs to a run with other settings or to
            a newer release, is in use by another process, or is damaged or not writable. Nothing
            in it is changed.
    """
    folder = pathlib.Path(folder)
    path = folder / JOURNAL
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
    with _clear_errors(path):
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        with _clear_errors(path):
            if not path.exists():
                _create(path, settings)
            _check(path, settings)
        with contextlib.closing(_connect(path, "rw")) as connection:
            with _clear_errors(path):
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
                journal = Journal(path, connection)
                if not len(journal):  # `_check` let other settings pass
                    connection.execute("DELETE FROM candidate")
                    connection.execute("UPDATE run SET settings = ?", [json.dumps(settings)])
            yield journal


def _refuse_foreign(folder: pathlib.Path) -> None:
    """A run folder has a journal, or nothing but what a run killed at its start leaves behind."""
    if not folder.exists() or (folder / JOURNAL).exists():
        return
    others = sorted(
        item.name
        for item in folder.iterdir()
        if item.name != LOCK and not item.name.startswith(UNFINISHED)  # and SQLite's file beside it
    )
    if others:
        raise JournalError(
            f"{folder} is not a run folder: it has {others[0]!r} but no {JOURNAL}; "
            "use a new or an empty folder"
        )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the run folder; the kernel lets go of it when this process ends, however it ends."""
    with _clear_errors(folder / LOCK):
        lock = open(folder / LOCK, "a+")  # noqa: SIM115 (closed below)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise JournalError(
                f"{folder} is in use by process {lock.read().strip() or 'unknown'}; "
                "wait for it to end, or use another run folder"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _create(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Write an empty journal under another name first: a journal that exists is whole."""
    unfinished = path.with_name(UNFINISHED)
    for left in path.parent.glob(f"{UNFINISHED}*"):
        left.unlink()
    with contextlib.closing(_connect(unfinished, "rwc")) as connection:
        connection.executescript(SCHEMA)
        connection.execute("INSERT INTO run VALUES (?)", [json.dumps(settings)])
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    unfinished.replace(path)


def _check(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Look at an existing journal without writing to it; raises JournalError."""
    with path.open("rb") as file:
        header = file.read(100)
    # the file format of SQLite, section 1.3; read here because opening a foreign database could
    # already write to it (a recovery, a checkpoint)
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if not header.startswith(b"SQLite format 3\0") or application != APPLICATION_ID:
        raise JournalError(f"{path} is not a journal of evokernels; use another run folder")
    if version != SCHEMA_VERSION:
        raise JournalError(
            f"{path} has schema version {version}, this release reads {SCHEMA_VERSION}; "
            "resume with the release that began the run, or use another run folder"
        )
    # A reader of a database in WAL mode creates the files beside it; where a kill has left none to
    # recover from, it is told not to look.
    left = path.with_name(f"{path.name}-wal").exists()
    with contextlib.closing(_connect(path, "ro" if left else "ro&immutable=1")) as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(" ".join(verdict.split()))
        (text,) = connection.execute("SELECT settings FROM run").fetchone()
        (evaluations,) = connection.execute("SELECT count(*) FROM evaluation").fetchone()
        if not evaluations:
            return  # a run that failed at its start, perhaps because of its settings
        # first, since genomes may have terms that other settings know
        _check_settings(path, json.loads(text), settings)
        # what lies inside a value is not SQLite's to check
        for row in connection.execute(f"SELECT {COLUMNS} FROM evaluation"):
            _entry(row)
        for (genome,) in connection.execute("SELECT genome FROM candidate"):
            individual_from_json(genome)


def _check_settings(
    path: pathlib.Path, recorded: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Raises JournalError where those of a run have changed."""
    recorded, given = ({**BEFORE, **values} for values in (recorded, given))
    differing = [
        f"{name} {json.dumps(recorded.get(name))} (now {json.dumps(given.get(name))})"
        for name in sorted({*recorded, *given})
        if recorded.get(name) != given.get(name)
    ]
    if differing:
        raise JournalError(
            f"{path} belongs to a run with other settings: {', '.join(differing)}; "
            "repeat the old settings to resume it, or use another run folder (--out)"
        )


def _connect(path: pathlib.Path, mode: str) -> sqlite3.Connection:
    """A connection that commits every statement; only mode "rwc" creates a file."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None
    )


def _entry(row: tuple) -> Entry:
    generation, place, genome, key, task, seed, purpose, status, *measured = row
    optimizer, architecture = trained_from_json(genome)
    trial = Trial(optimizer, task, seed, Purpose(purpose), architecture)
    return Entry(generation, place, key, trial, Outcome(Status(status), *measured))


@contextlib.contextmanager
def _clear_errors(path: pathlib.Path) -> Iterator[None]:
    """What goes wrong with a file, as one line that says which file and what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise JournalError(f"cannot use {path}: {error}; check the folder and the disk") from None
    except UnknownTermError as error:
        raise JournalError(f"cannot read {path}: {error}") from None
    except (sqlite3.DatabaseError, ValueError, TypeError, RecursionError) as error:
        raise JournalError(
            f"{path} is damaged: {error}; restore it from a copy, or use another run folder"
        ) from None
    except OSError as error:
        raise JournalError(
            f"cannot use {path}: {error.strerror}; choose a folder that can be written"
        ) from None
