"""Where trials run: in this process, in worker processes, or wherever an executor runs them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from evokernels.errors import SettingsError, WorkerError
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.executor import (
    InlineExecutor,
    WorkerDied,
    WorkerExecutor,
    WorkerLost,
    WorkerProcesses,
)
from evokernels.evolution.fitness import DIVERGED_FITNESS
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.search.score import Status
from evokernels.tasks import TaskData, get_task

__all__ = ["Pool", "default_time_limit", "open_pool"]

# One optimizer may crash a worker, or hang. Where so many evaluations fail in a row, the machine or
# the program is to blame, and all further ones would be marked too.
FAILURES_IN_A_ROW = 10

# Seconds after which the pool looks again whether a trial is past its limit, at most.
LOOK = 1.0

# How errors that are none of MemoryError say it: torch on a CPU and on CUDA, C++, CUDA's libraries
# and its driver.
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "out of memory", "bad_alloc"),
    *("STATUS_ALLOC_FAILED", "ERROR_OUT_OF_MEMORY"),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a worker does with a trial; it keeps the data sets in memory.

    Args:
        conditions: of every trial.
        threads: of torch.
        device: where every trial runs.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
    """

    conditions: Conditions
    threads: int
    device: str
    data_dir: str | None

    def prepare(self, trial: Trial) -> None:
        """Load the data: on a worker's first trial that may take longer than the trial."""
        try:
            self._data(trial)
        except Exception as error:
            if not _is_out_of_memory(error):  # that one is the trial's, which will run into it too
                raise

    def __call__(self, trial: Trial) -> Outcome:
        """The outcome, also of running out of memory; raises what is nobody's optimizer's fault."""
        start = time.perf_counter()
        try:
            with ALONE:
                torch.set_num_threads(self.threads)
                return evaluate(trial, self.conditions, self._data(trial), self.device)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
        return _failed(Status.OUT_OF_MEMORY, time.perf_counter() - start)

    def _data(self, trial: Trial) -> TaskData:
        samples = self.conditions.train_samples, self.conditions.validation_samples
        return _data(trial.task, self.data_dir, *samples)


# torch's random generators belong to the process: the threads of a pool take turns
ALONE = threading.Lock()


@functools.cache  # a process loads each data set once
def _data(
    task: str, data_dir: str | None, train_samples: int | None, validation_samples: int
) -> TaskData:
    return get_task(task).load(data_dir, train_samples, validation_samples)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _failed(status: Status, seconds: float) -> Outcome:
    """Of a trial that ended before it could be measured."""
    return Outcome(status, DIVERGED_FITNESS, None, None, steps=0, seconds=seconds, data="")


@dataclasses.dataclass
class _Run:
    """A trial on its way.

    Attributes:
        submitted: when it was handed over.
        ran: seconds that it has been seen running, None before it is; at most what it ran.
        lost: how often its worker was lost before, by the kind of loss.
    """

    trial: Trial
    submitted: float
    ran: float | None = None
    lost: Counter[type[WorkerLost]] = dataclasses.field(default_factory=Counter)


# a trial, its outcome, and what happened if it failed
Ended = tuple[Trial, Outcome, str | None]


class Pool:
    """Evaluates trials through an executor; an evaluation that fails is an outcome, not an error.

    Args:
        executor: any `concurrent.futures.Executor` whose workers can import this package.
        in_flight: trials handed to it at a time; the number of its workers keeps all of them busy,
            and no more than that many trials are lost when the run is killed. None: as many as a
            `WorkerExecutor` wants.
        evaluation: what it does with them.
        time_limit: seconds that a trial may run; a time in which this process is stopped does not
            count. A trial past it is ended by a `WorkerExecutor`. Any other counts the start of
            a worker in, cannot end the trial, and lacks its worker until it ends itself.
    """

    def __init__(
        self,
        executor: concurrent.futures.Executor,
        in_flight: int | None,
        evaluation: Evaluation,
        time_limit: float = math.inf,
    ) -> None:
        self._executor = executor
        self._in_flight = in_flight
        self._evaluation = evaluation
        self._time_limit = time_limit
        self._look = min(LOOK, time_limit / 10)
        self._given_up: set[concurrent.futures.Future] = set()
        self._failures_in_a_row = 0

    def run(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Each trial with its outcome, in the order in which they end.

        One that failed (`Status.CRASHED`, ``TIMED_OUT``, ``OUT_OF_MEMORY``) is kept back until
        one has not, so that no run has recorded what many failures in a row turn out to be.

        Raises:
            WorkerError: workers cannot be started, many evaluations in a row fail, every worker
                hangs and cannot be ended, or the executor is broken.
            Exception: whatever else an evaluation raises.
        """
        kept_back: list[tuple[Trial, Outcome]] = []
        with contextlib.closing(self._ended(trials)) as ended:
            for trial, outcome, failure in ended:
                if failure is None:
                    self._failures_in_a_row = 0
                    yield from kept_back
                    kept_back.clear()
                    yield trial, outcome
                else:
                    self._count(f"{trial.task}, seed {trial.seed}: {failure}")
                    kept_back.append((trial, outcome))
        yield from kept_back

    def _count(self, failure: str) -> None:
        """Say it; raises WorkerError if it is one too many."""
        logging.getLogger(__name__).warning("evaluation failed (%s)", failure)
        self._failures_in_a_row += 1
        if self._failures_in_a_row == FAILURES_IN_A_ROW:
            raise WorkerError(
                f"{FAILURES_IN_A_ROW} evaluations in a row failed, so it is not the optimizers "
                f"(the last: {failure}); free memory, use fewer workers or a longer time limit, "
                "and start again: these failures are not recorded"
            )

    def _ended(self, trials: Iterable[Trial]) -> Iterator[Ended]:
        waiting = iter(trials)
        following = next(waiting, None)
        running: dict[concurrent.futures.Future, _Run] = {}
        try:
            while following is not None or running:
                while following is not None and len(running) + len(self._given_up) < self._most():
                    self._submit(running, _Run(following, time.monotonic()))
                    following = next(waiting, None)
                yield from self._wait(running)
        except concurrent.futures.BrokenExecutor:
            raise WorkerError(
                "a worker process ended in the middle of an evaluation, perhaps for lack of "
                "memory; start again with fewer workers"
            ) from None
        finally:
            for future in running:
                future.cancel()

    def _most(self) -> int:
        """Trials that the executor should have now."""
        return self._executor.wanted if self._in_flight is None else self._in_flight

    def _submit(self, running: dict[concurrent.futures.Future, _Run], run: _Run) -> None:
        running[self._executor.submit(self._evaluation, run.trial)] = run

    def _wait(self, running: dict[concurrent.futures.Future, _Run]) -> Iterator[Ended]:
        """Until something may have changed; those that ended are no longer running."""
        # a killed process takes its time to be gone, where memory is short or the disk is slow
        patience = None if isinstance(self._executor, WorkerExecutor) else self._time_limit
        since = time.monotonic()
        done, _ = concurrent.futures.wait(
            {*running, *self._given_up},
            timeout=self._look if running else patience,
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        # no more than the wait was to take: beyond that this process has been stopped
        passed = min(time.monotonic() - since, self._look)
        if not running and not done:
            raise WorkerError(
                f"all {self._most()} workers are past the time limit of {self._time_limit:g} "
                "seconds, and this executor cannot end them; use one that can, or none"
            )
        self._given_up -= done
        for future, run in list(running.items()):
            if future in done:
                del running[future]
                if (again := _again(future, run)) is not None:
                    self._submit(running, again)
                else:
                    yield run.trial, *_ending(future, run)
            elif run.ran is not None:
                run.ran += passed
            elif future.running():
                run.ran = 0.0
        for future, run in list(running.items()):
            if run.ran is not None and run.ran > self._time_limit and not future.done():
                del running[future]
                self._given_up.add(future)
                if isinstance(self._executor, WorkerExecutor):
                    self._executor.end(future)
                outcome = _failed(Status.TIMED_OUT, time.monotonic() - run.submitted)
                yield run.trial, outcome, f"past the time limit of {self._time_limit:g} seconds"


def _again(future: concurrent.futures.Future, run: _Run) -> _Run | None:
    """The trial once more, if it may be the machine that failed and not the optimizer."""
    loss = future.exception()
    if not isinstance(loss, WorkerLost):
        return None
    lost = run.lost + Counter([type(loss)])
    if lost[type(loss)] == loss.tries:
        return None
    words = "an evaluation is made again (%s, seed %d: its worker %s)"
    logging.getLogger(__name__).warning(words, run.trial.task, run.trial.seed, loss)
    return _Run(run.trial, time.monotonic(), lost=lost)


def _ending(future: concurrent.futures.Future, run: _Run) -> tuple[Outcome, str | None]:
    """The outcome, and what happened if it is a failure; raises what is not the optimizer's."""
    try:
        outcome = future.result()
    except WorkerDied as death:
        return _failed(Status.CRASHED, time.monotonic() - run.submitted), f"its worker {death}"
    return outcome, "out of memory" if outcome.status is Status.OUT_OF_MEMORY else None


@contextlib.contextmanager
def open_pool(
    conditions: Conditions,
    *,
    workers: int,
    threads: int,
    device: str = "cpu",
    data_dir: str | None = None,
    time_limit: float | None = None,
    executor: concurrent.futures.Executor | None = None,
) -> Iterator[Pool]:
    """A pool that evaluates trials within the conditions, ``workers`` at a time.

    The results depend on ``threads`` and ``device`` ("cpu", "cuda" or "cuda:N", which all workers
    share), never on ``workers``. Leaving the context by an error or Ctrl-C ends worker processes
    at once, in the middle of what they do.

    Args:
        conditions: of every trial.
        workers: processes. A single one is this process, unless there is a ``time_limit``.
        threads: torch threads of each.
        device: where every trial runs.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        time_limit: seconds that a trial may run, starting a worker and loading data not counted;
            None: `default_time_limit`.
        executor: with at least that many workers, instead of processes of the pool's own; it
            stays open. A `WorkerExecutor` may have any number. In one process trials take turns,
            however many threads it has.

    Raises:
        SettingsError: a time limit that is not positive.
    """
    if time_limit is not None and not time_limit > 0:
        raise SettingsError(f"time_limit must be above 0 seconds, got {time_limit}")
    evaluation = Evaluation(conditions, threads, device, data_dir)
    limit = default_time_limit(conditions) if time_limit is None else time_limit
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)  # trials may have run in this thread
        if executor is None and workers == 1 and time_limit is None:
            executor = InlineExecutor()
        elif executor is None:
            executor = stack.enter_context(WorkerProcesses(workers))
        in_flight = None if isinstance(executor, WorkerExecutor) else workers
        yield Pool(executor, in_flight, evaluation, limit)


def default_time_limit(conditions: Conditions) -> float:
    """Seconds after which a training run can only be hanging.

    A sample takes 0.1 ms (the grey network) to 3 ms (the transformer) of training on one core, and
    a test seconds; this is many times that, for slow and busy machines.
    """
    return 600.0 + 0.02 * conditions.steps * conditions.batch_size
