"""Workers that crash, hang or run out of memory, for real; and executors of every kind."""

import concurrent.futures
import ctypes
import dataclasses
import itertools
import logging
import math
import multiprocessing
import os
import pathlib
import signal
import sqlite3
import threading
import time
import types
from unittest import mock

import pytest
import torch

from evokernels import zoo
from evokernels.errors import DatasetError, JournalError, SettingsError, WorkerError
from evokernels.evolution import executor, pool
from evokernels.evolution.executor import InlineExecutor, WorkerProcesses
from evokernels.evolution.journal import JOURNAL, Entry, open_journal
from evokernels.evolution.pool import Evaluation, Pool, default_time_limit, open_pool
from evokernels.evolution.run import RunSettings, evolve
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial
from evokernels.search.genetic import GeneticConfig
from evokernels.search.score import Score, Status

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(steps=3, batch_size=32, train_samples=64)
LIMIT = 1.0  # seconds; more than a scripted evaluation takes that is to end well


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def fail(error):
    raise error


released = threading.Event()  # ends what hangs in a thread of this process

# What a worker does with a trial, by the name of the task: before it begins, and then
PREPARE = {
    "slow start": lambda marker: time.sleep(1.5 * LIMIT),
    "death at every start": lambda marker: os._exit(9),
    "death at the first start": lambda marker: marker.exists() or (marker.touch(), os._exit(9)),
}
CRASHES = {
    "exit": lambda: os._exit(7),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segmentation fault": lambda: ctypes.string_at(0),
}
HANGS = {
    "hang that holds Python's lock": lambda: ctypes.PyDLL(None).sleep(1_000_000),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
OUT_OF_MEMORY = {
    "Python": lambda: bytearray(1 << 62),
    "torch on the CPU": lambda: torch.empty(10**15),
    "torch on CUDA": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to ...")),
    "a library of CUDA": lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED ...")),
    "the operating system": lambda: fail(OSError(12, "Cannot allocate memory")),
}
ERRORS = {
    "user": (
        DatasetError,
        "mnist.npz is damaged",
        lambda: fail(DatasetError("mnist.npz is damaged")),
    ),
    "bug": (ZeroDivisionError, "division by zero", lambda: 1 / 0),
    "file": (FileNotFoundError, "/no/such/file", lambda: os.stat("/no/such/file")),
    "torch": (RuntimeError, "must match", lambda: torch.ones(2) + torch.ones(3)),
    "pipe": (EOFError, "the file ends early", lambda: fail(EOFError("the file ends early"))),
    "unpicklable": (RuntimeError, "Unpicklable: a b", lambda: fail(Unpicklable("a", "b"))),
}
WAITS = {"short": lambda: time.sleep(0.3), "until released": lambda: released.wait(30)}
SCRIPT = {
    **CRASHES,
    **HANGS,
    **OUT_OF_MEMORY,
    **{name: act for name, (_, _, act) in ERRORS.items()},
    **WAITS,
}

STATUSES = {
    **dict.fromkeys(CRASHES, Status.CRASHED),
    **dict.fromkeys(HANGS, Status.TIMED_OUT),
    **dict.fromkeys(OUT_OF_MEMORY, Status.OUT_OF_MEMORY),
    **dict.fromkeys(["slow start", "death at the first start", *"abcdefghijkl"], Status.OK),
}


def scripted(trial, conditions, data, device):
    """In place of `evaluate`."""
    SCRIPT.get(trial.task, lambda: None)()
    return Outcome(Status.OK, float(trial.seed), 0.5, 1.0, 3, 0.1, "digest")


class Scripted(Evaluation):
    """An evaluation as it is, but for the data, which are the path of a file, and the training."""

    def _data(self, trial):
        return None

    def prepare(self, trial):
        PREPARE.get(trial.task, lambda marker: None)(pathlib.Path(self.data_dir))

    def __call__(self, trial):
        if trial.task in WAITS:  # an evaluation as it is lets no other thread go on
            return scripted(trial, None, None, None)
        if multiprocessing.parent_process() is None:
            return super().__call__(trial)
        with mock.patch.object(pool, "evaluate", scripted):
            return super().__call__(trial)


@pytest.fixture
def scripted_here(monkeypatch):
    monkeypatch.setattr(pool, "evaluate", scripted)


def open_scripted(executor, in_flight, limit=LIMIT, marker="/no/such/marker"):
    return Pool(executor, in_flight, Scripted(CONDITIONS, 1, "cpu", str(marker)), limit)


def run(workers, tasks):
    """The outcomes of one trial on each task, by the task, in the order in which they come."""
    trials = [Trial(zoo.adam, task, seed) for seed, task in enumerate(tasks)]
    return {trial.task: outcome for trial, outcome in workers.run(trials)}


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def two():
    """Two worker processes, for most tests: they take seconds to start."""
    before = set(multiprocessing.active_children())
    with WorkerProcesses(2) as processes:
        yield processes
        pids = [child.pid for child in set(multiprocessing.active_children()) - before]
        assert len(pids) == 2
    assert not any(map(alive, pids))


# One evaluation, never the run


@pytest.fixture(scope="module")
def outcomes(two, tmp_path_factory):
    """Of all that may happen to an evaluation, in one run."""
    marker = tmp_path_factory.mktemp("workers") / "marker"
    bad, good = (
        [task for task, status in STATUSES.items() if (status is Status.OK) == is_good]
        for is_good in (False, True)
    )
    tasks = [task for pair in itertools.zip_longest(bad, good) for task in pair if task]
    return tasks, run(open_scripted(two, 2, marker=marker), tasks)


@pytest.mark.parametrize("task", STATUSES)
def test_what_happens_to_one_evaluation_is_its_outcome(task, outcomes):
    tasks, ended = outcomes
    outcome = ended[task]
    assert outcome.status is STATUSES[task]
    if outcome.status is Status.OK:
        assert outcome.fitness == tasks.index(task)
        return
    assert (outcome.fitness, outcome.accuracy, outcome.final_loss) == (-1.0, None, None)
    assert (outcome.steps, outcome.data) == (0, "")
    assert (LIMIT if task in HANGS else 0) <= outcome.seconds < 30


def test_every_trial_ends_once(outcomes):
    tasks, ended = outcomes
    assert sorted(ended) == sorted(tasks)


@pytest.mark.parametrize("task", ERRORS)
def test_an_error_that_is_not_the_optimizers_ends_the_run(task, two):
    kind, words, _ = ERRORS[task]
    with pytest.raises(kind, match=words) as caught:
        run(open_scripted(two, 2), ["a", task, "b"])
    (note,) = caught.value.__notes__
    assert "in a worker process" in note
    assert "in scripted" in note  # the traceback over there


def test_errors_in_this_process_are_the_same(scripted_here):
    for task, (kind, words, _) in ERRORS.items():
        with pytest.raises(Unpicklable if task == "unpicklable" else kind, match=words[-3:]):
            run(open_scripted(InlineExecutor(), 1), [task])
    ended = run(open_scripted(InlineExecutor(), 1), ["a", *OUT_OF_MEMORY])
    assert [ended[task].status for task in OUT_OF_MEMORY] == [Status.OUT_OF_MEMORY] * 5


def test_running_out_of_memory_while_data_are_loaded_is_the_trials(monkeypatch):
    monkeypatch.setattr(pool, "_data", lambda *args: fail(MemoryError()))
    evaluation = Evaluation(CONDITIONS, 1, "cpu", "/no/such/folder")
    trial = Trial(zoo.adam, MINI, 0)
    evaluation.prepare(trial)
    assert evaluation(trial).status is Status.OUT_OF_MEMORY


# Where it is not one evaluation


def test_workers_that_never_start_end_the_run(two, monkeypatch):
    monkeypatch.setattr(executor, "STARTS", 1)
    with pytest.raises(WorkerError, match="ended with exit code 9 before it began"):
        run(open_scripted(two, 2), ["death at every start"])


def test_many_failures_in_a_row_end_the_run_unrecorded(scripted_here, caplog):
    workers = open_scripted(InlineExecutor(), 1)
    seen = []

    def take(names):
        trials = [Trial(zoo.adam, name, seed) for seed, name in enumerate(names)]
        seen.extend(trial.task for trial, _ in workers.run(trials))

    most = pool.FAILURES_IN_A_ROW - 1
    with caplog.at_level(logging.CRITICAL, logger=pool.__name__):
        take(["Python"] * most + ["a"] + ["Python"] * 2)
        assert seen == ["Python"] * most + ["a"] + ["Python"] * 2
        del seen[:]
        with pytest.raises(WorkerError, match=r"10 evaluations in a row .*Python, seed 7: out of"):
            take(["Python"] * 20)  # a new batch of trials does not begin the count anew
    assert seen == []


def test_a_failure_is_said(scripted_here, caplog):
    run(open_scripted(InlineExecutor(), 1), ["Python"])
    assert caplog.messages == ["evaluation failed (Python, seed 0: out of memory)"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with exit code 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGKILL, "was killed by SIGKILL, as the system does when memory runs out"),
        (-60, "was killed by signal 60"),
    ],
)
def test_how_a_worker_ended_in_words(code, words):
    assert executor._describe(code) == words


# Executors


@pytest.fixture(scope="module")
def foreign():
    """The standard library's process pool."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as processes:
        yield processes


@pytest.fixture(scope="module")
def expected():
    """Real evaluations, in this process."""
    with open_pool(CONDITIONS, workers=1, threads=1) as workers:
        return real(workers)


def real(workers):
    genomes = (zoo.adam, zoo.evolved_2025)
    trials = [Trial(genome, MINI, seed) for genome in genomes for seed in (0, 1)]
    return {t: dataclasses.replace(outcome, seconds=0.0) for t, outcome in workers.run(trials)}


@pytest.mark.parametrize("kind", ["processes", "foreign processes", "threads"])
def test_results_do_not_depend_on_where_they_come_from(kind, expected, two, foreign):
    before = torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        given = {"processes": two, "foreign processes": foreign, "threads": threads}[kind]
        with open_pool(CONDITIONS, workers=3, threads=1, executor=given) as workers:
            assert real(workers) == expected
    assert torch.get_num_threads() == before
    assert len(set(expected.values())) == len(expected) == 4


@pytest.mark.parametrize(
    ("workers", "time_limit", "kind", "limit"),
    [
        (1, None, InlineExecutor, None),
        (1, 5.0, WorkerProcesses, 5.0),
        (2, None, WorkerProcesses, default_time_limit(CONDITIONS)),
        (2, 5.0, WorkerProcesses, 5.0),
    ],
)
def test_which_executor_and_limit_a_pool_has(workers, time_limit, kind, limit):
    before = multiprocessing.active_children()
    with open_pool(CONDITIONS, workers=workers, threads=1, time_limit=time_limit) as opened:
        assert type(opened._executor) is kind
        assert limit in (None, opened._time_limit)
        assert multiprocessing.active_children() == before  # none before it is needed


@pytest.mark.parametrize("time_limit", [0, -1.0, float("nan")])
def test_a_time_limit_is_positive(time_limit):
    with (
        pytest.raises(SettingsError, match=f"above 0 seconds, got {time_limit}"),
        open_pool(CONDITIONS, workers=2, threads=1, time_limit=time_limit),
    ):
        pass


def test_a_foreign_executor_loses_the_worker_that_hangs(scripted_here):
    released.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        workers = open_scripted(threads, 2, limit=0.2)
        try:
            ended = run(workers, ["until released", *"abcd"])
            assert [ended.pop("until released").status] == [Status.TIMED_OUT]
            assert [outcome.status for outcome in ended.values()] == [Status.OK] * 4
            with pytest.raises(WorkerError, match=r"all 2 workers are past .* of 0\.2 seconds"):
                run(workers, ["until released", "a"])
        finally:
            released.set()
        assert list(run(workers, "abc")) == list("abc")  # they have come back


def test_a_killed_process_may_take_its_time(two, monkeypatch):
    end = WorkerProcesses.end
    monkeypatch.setattr(
        WorkerProcesses, "end", lambda *call: threading.Timer(5 * 0.2, end, call).start()
    )
    ended = run(open_scripted(two, 1, limit=0.2), ["SIGSTOP", "a"])
    assert [outcome.status for outcome in ended.values()] == [Status.TIMED_OUT, Status.OK]


def test_a_foreign_process_pool_that_breaks_ends_the_run(foreign):
    with pytest.raises(WorkerError, match="fewer workers"):
        run(open_scripted(foreign, 2, math.inf), ["SIGKILL"])
    with pytest.raises(WorkerError, match="fewer workers"):  # now at once
        run(open_scripted(foreign, 2, math.inf), ["a"])


def test_a_pause_of_this_process_is_not_the_trials(monkeypatch):
    hours = itertools.count(step=3600)
    paused = types.SimpleNamespace(monotonic=lambda: float(next(hours)), perf_counter=time.time)
    monkeypatch.setattr(pool, "time", paused)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        ended = run(open_scripted(threads, 1, limit=1.0), ["short"])
    assert ended["short"].status is Status.OK


# Ends


def test_an_error_leaves_no_worker_behind():
    before = set(multiprocessing.active_children())
    processes = WorkerProcesses(1)
    stuck, queued = processes.submit(time.sleep, 1e6), processes.submit(time.sleep, 1e6)
    while not stuck.running():
        time.sleep(0.01)
    (worker,) = set(multiprocessing.active_children()) - before
    pid = worker.pid
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), processes:
        raise KeyboardInterrupt
    assert time.monotonic() - start < 5
    assert not alive(pid)
    assert queued.cancelled()
    assert isinstance(stuck.exception(), executor.WorkerDied)
    with pytest.raises(RuntimeError, match="after shutdown"):
        processes.submit(time.sleep, 0)


def test_what_one_call_leaves_the_next_one_finds(two):
    assert {two.submit(os.getpid).result() for _ in range(20)} <= {
        child.pid for child in multiprocessing.active_children()
    }


def test_results_of_any_kind_come_back(two):
    with pytest.raises(TypeError, match="pickle"):
        two.submit(threading.Lock).result()  # it cannot be sent back
    with pytest.raises(Exception, match="lambda"):
        two.submit(lambda: 1)  # it cannot be sent there
    assert two.submit(bytes, 5_000_000).result() == bytes(5_000_000)
    assert torch.equal(two.submit(torch.arange, 3).result(), torch.arange(3))


# Journal and score


FAILURES = [status for status in dict.fromkeys(STATUSES.values()) if status is not Status.OK]


@pytest.mark.parametrize("status", FAILURES)
def test_a_failure_ranks_below_every_result(status):
    assert Score(1e9, status).rank < Score(-1e9, Status.OK).rank


def test_a_failure_in_the_journal_says_nothing_about_the_data(tmp_path):
    def entry(seed, status, data):
        outcome = Outcome(status, -1.0, None, None, 0, 0.1, data)
        return Entry(0, 0, "key", Trial(zoo.adam, MINI, seed), outcome)

    with open_journal(tmp_path, {}) as journal:
        journal.add(entry(0, Status.CRASHED, ""))
        journal.add(entry(1, Status.OK, "one"))
        journal.add(entry(2, Status.TIMED_OUT, ""))
    with open_journal(tmp_path, {}) as journal:
        assert journal.find("key", MINI, 0, Purpose.SEARCH).outcome.status is Status.CRASHED
        journal.add(entry(3, Status.OK, "one"))
        with pytest.raises(JournalError, match="the data of"):
            journal.add(entry(4, Status.OK, "other"))


def test_a_run_goes_on_after_a_failure_and_resumes_with_it(monkeypatch, tmp_path):
    trials = []

    def evaluate(trial, conditions, data, device):
        trials.append(trial)
        if len(trials) == 3:
            raise MemoryError
        return Outcome(Status.OK, 1 / len(trials), 0.5, 1.0, 3, 0.1, "digest", test_accuracy=0.5)

    monkeypatch.setattr(pool, "evaluate", evaluate)
    settings = RunSettings(
        search=GeneticConfig(population=4, generations=2, elites=1, tournament=2, seed=1),
        tasks=(MINI,),
        seeds=(0, 1),
        conditions=CONDITIONS,
        comparison_seeds=1,
        threads=1,
    )
    first = evolve(settings, tmp_path)
    connection = sqlite3.connect(tmp_path / JOURNAL)
    marked = connection.execute("SELECT status, count(*) FROM evaluation GROUP BY 1").fetchall()
    connection.close()
    assert dict(marked) == {"ok": len(trials) - 1, "out_of_memory": 1}
    again = evolve(settings, tmp_path)
    assert (again.evaluations, again.best) == (0, first.best)
