"""Where trials run: in this process, or in worker processes that keep their data sets loaded."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from evokernels.errors import WorkerError
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.tasks import TaskData, get_task

__all__ = ["Pool", "open_pool"]


class InlineExecutor(concurrent.futures.Executor):
    """Runs every call at once, in the calling thread."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # handed to whoever asks for the result, as a pool does
            future.set_exception(error)
        return future


class Pool:
    """Evaluates trials through an executor.

    Args:
        executor: any `concurrent.futures.Executor` whose workers can import this package.
        in_flight: trials handed to it at a time; the number of its workers keeps all of them busy,
            and no more than that many trials are lost when the run is killed.
        conditions: of every trial.
        device: where every trial runs.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
    """

    def __init__(
        self,
        executor: concurrent.futures.Executor,
        in_flight: int,
        conditions: Conditions,
        device: str,
        data_dir: str | None,
    ) -> None:
        self._executor = executor
        self._in_flight = in_flight
        self._evaluate = functools.partial(
            _evaluate, conditions=conditions, device=device, data_dir=data_dir
        )

    def run(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Each trial with its outcome, in the order in which they end.

        Raises:
            WorkerError: a worker process was ended from outside, for instance for its memory.
        """
        waiting = iter(trials)
        running: dict[concurrent.futures.Future, Trial] = {}
        try:
            while True:
                for trial in itertools.islice(waiting, self._in_flight - len(running)):
                    running[self._executor.submit(self._evaluate, trial)] = trial
                if not running:
                    return
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise WorkerError(
                "a worker process ended in the middle of an evaluation, perhaps for lack of "
                "memory; start again with fewer workers"
            ) from None


@contextlib.contextmanager
def open_pool(
    conditions: Conditions,
    *,
    workers: int,
    threads: int,
    device: str = "cpu",
    data_dir: str | None = None,
) -> Iterator[Pool]:
    """A pool of ``workers`` processes with ``threads`` torch threads each; one worker is inline.

    The results depend on ``threads`` and ``device`` ("cpu", "cuda" or "cuda:N", which all workers
    share), never on ``workers``. Leaving the context by an error or
    Ctrl-C ends the workers at once, in the middle of what they do.
    """
    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield Pool(InlineExecutor(), 1, conditions, device, data_dir)
        finally:
            torch.set_num_threads(before)
        return

    others = set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=workers,
        # a forked child would inherit torch's thread pools without their threads, and hang; and it
        # could not use CUDA
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    ) as executor:
        try:
            yield Pool(executor, workers, conditions, device, data_dir)
        except BaseException:
            # the executor would wait for the trials in flight, up to a minute each
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _start_worker(threads: int) -> None:
    # Ctrl-C in a terminal reaches the whole process group; the parent alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A worker waits on a queue whose writing end it holds itself, so it would never notice that a
    killed parent is gone, and would keep its memory for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _evaluate(
    trial: Trial, *, conditions: Conditions, device: str, data_dir: str | None
) -> Outcome:
    samples = conditions.train_samples, conditions.validation_samples
    return evaluate(trial, conditions, _data(trial.task, data_dir, *samples), device)


@functools.cache  # a process loads each data set once
def _data(
    task: str, data_dir: str | None, train_samples: int | None, validation_samples: int
) -> TaskData:
    return get_task(task).load(data_dir, train_samples, validation_samples)
