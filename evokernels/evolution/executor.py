"""Executors: calls run in this process, or in worker processes that may die without harm."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from evokernels.errors import WorkerError

__all__ = [
    "InlineExecutor",
    "NodeLost",
    "WorkerDied",
    "WorkerExecutor",
    "WorkerLost",
    "WorkerProcesses",
]

# A worker that ends before its call begins does so because of the machine or the program, not
# because of the call, which is then tried again: so often in all.
STARTS = 3

# What a worker says when a call begins; its next message is the answer.
BEGAN = b""


class WorkerDied(Exception):
    """A worker process ended in the middle of a call; the message says how."""


class WorkerLost(WorkerDied):
    """The same, of a worker that the call need not have ended: it may be made again."""

    tries = 3  # after so many the call is to blame: what crashes its process does so every time


class NodeLost(WorkerLost):
    """The machine of the worker is gone with all that ran there."""

    # machines that are lent for a while go often; a call that takes one along does so every time
    tries = 10


class WorkerExecutor(concurrent.futures.Executor, abc.ABC):
    """An executor whose workers are processes of their own, so that a call can be ended.

    If the function of a call has a method ``prepare``, a worker calls that first, with the same
    arguments; the future of the call is running only from then on. The future raises what the call
    raises; `WorkerDied`, or one of its kinds, if its worker ends in the middle of it; `WorkerError`
    if workers end before they begin it, again and again, or there are none.
    """

    @property
    @abc.abstractmethod
    def wanted(self) -> int:
        """Calls that it should have at a time, so that all workers are busy."""

    @abc.abstractmethod
    def end(self, future: concurrent.futures.Future) -> None:
        """Kill the worker that this call runs on, if it does."""


class InlineExecutor(concurrent.futures.Executor):
    """Runs every call at once, in the calling thread."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        """See `concurrent.futures.Executor.submit`; the future is done."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # handed to whoever asks for the result, as a pool does
            future.set_exception(error)
        return future


class WorkerProcesses(WorkerExecutor):
    """Worker processes, each on its own: one that dies fails its own call and is replaced.

    (A `concurrent.futures.ProcessPoolExecutor` is broken as a whole by the first death, and cannot
    end a call.) Processes start when there is a call for them, and stay. They end with this
    process, even if it is killed, and at once if the ``with`` block is left by an error or Ctrl-C.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._open = True
        self._workers = [_Worker(self._calls) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        """See `concurrent.futures.Executor.submit` and `WorkerExecutor`."""
        if not self._open:
            raise RuntimeError("cannot submit a call after shutdown")
        future: concurrent.futures.Future = concurrent.futures.Future()
        # not as multiprocessing would: torch has taught that to pass tensors as open files
        self._calls.put((future, pickle.dumps((fn, args, kwargs))))
        return future

    @property
    def wanted(self) -> int:
        """As many as there are workers."""
        return len(self._workers)

    def end(self, future: concurrent.futures.Future) -> None:
        """Kill the worker that this call runs on, if it does."""
        for worker in self._workers:
            worker.end(future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`."""
        self._open = False
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while (item := self._calls.get_nowait()) is not None:
                    item[0].cancel()
        for _ in self._workers:
            self._calls.put(None)
        if wait:
            for worker in self._workers:
                worker.join()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for worker in self._workers:  # what they do may take minutes
                worker.close()
        self.shutdown(cancel_futures=kind is not None)


class _Worker(threading.Thread):
    """One worker process after the other, and the thread that gives it calls and waits for it."""

    def __init__(self, calls: queue.SimpleQueue) -> None:
        super().__init__(daemon=True)
        self._calls = calls
        self._lock = threading.Lock()  # of the rest, which other threads use too
        self._closed = False
        self._future: concurrent.futures.Future | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: multiprocessing.connection.Connection | None = None

    def run(self) -> None:
        """Until the queue of calls says None."""
        while (item := self._calls.get()) is not None:
            future, call = item
            with self._lock:
                self._future = future
            try:
                succeeded, value = self._perform(call, future)
            except Exception as error:
                succeeded, value = False, error
            with self._lock:
                self._future = None
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled
                (future.set_result if succeeded else future.set_exception)(value)
            del item, future, call, value  # not to be kept until the next call comes
        self._bury()

    def end(self, future: concurrent.futures.Future) -> None:
        """Kill the process if this call is what it runs."""
        with self._lock:
            if self._future is future and self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Kill the process, and start no other."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _perform(self, call: bytes, future: concurrent.futures.Future) -> tuple[bool, Any]:
        """What a process answers: whether the call succeeded, with its result or its error."""
        for _ in range(STARTS):
            began = False
            try:
                connection = self._launched()
                connection.send_bytes(call)
                answer = connection.recv_bytes()
                if answer == BEGAN:
                    began = True
                    future.set_running_or_notify_cancel()
                    answer = connection.recv_bytes()
            except (EOFError, ConnectionError):  # its end of the pipe is closed: it is gone
                death = self._bury()
            else:
                return pickle.loads(answer)
            if began or self._closed:
                raise WorkerDied(death)
        raise WorkerError(
            f"a worker process {death} before it began an evaluation, {STARTS} times in a row; "
            "see what it wrote to stderr, free memory, or use fewer workers"
        )

    def _launched(self) -> multiprocessing.connection.Connection:
        """The connection to a process, started if there is none."""
        with self._lock:
            if self._closed:
                raise WorkerDied("was not started: the executor is closed")
            if self._process is None:
                # a forked child would inherit torch's thread pools without their threads, and
                # hang; and it could not use CUDA
                context = multiprocessing.get_context("spawn")
                self._connection, theirs = context.Pipe()
                with theirs:
                    self._process = context.Process(target=_work, args=(theirs,), daemon=True)
                    with _ctrl_c_blocked():
                        self._process.start()
            return self._connection

    def _bury(self) -> str:
        """Make sure that the process, if there is one, is gone; how it ended."""
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if process is None:
            return "was not started"
        process.kill()
        process.join()
        while (code := process.exitcode) is None:  # another thread has just waited for it
            time.sleep(0.001)
        process.close()
        connection.close()
        return _describe(code)


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """For a child: it inherits what this thread blocks, and a worker that has not yet come so far
    as to ignore Ctrl-C would print a traceback."""
    multiprocessing.resource_tracker.ensure_running()  # which unblocks, once, when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe(exitcode: int) -> str:
    """How a process ended, as a part of a sentence."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = f"signal {-exitcode}"
    with contextlib.suppress(ValueError):  # not all have a name
        name = signal.Signals(-exitcode).name
    hint = ", as the system does when memory runs out" if exitcode == -signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _work(connection: multiprocessing.connection.Connection) -> None:
    """A worker process: answer calls until the other end of the pipe is closed."""
    # Ctrl-C in a terminal reaches the whole process group; the parent alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            for message in answering(connection.recv_bytes()):
                connection.send_bytes(message)


def _end_with_parent() -> None:
    """A worker that trains would notice only at the end that its parent is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def answering(call: bytes) -> Iterator[bytes]:
    """What a worker says to a call, as it goes on: ``BEGAN``, unless it fails before; the answer.

    Args:
        call: a function, its positional and its keyword arguments, pickled.

    Yields:
        At last whether the call succeeded, with its result or its error, pickled.
    """
    try:
        fn, args, kwargs = pickle.loads(call)
        if prepare := getattr(fn, "prepare", None):
            prepare(*args, **kwargs)
        yield BEGAN
        answer = pickle.dumps((True, fn(*args, **kwargs)))
    except Exception as error:
        answer = pickle.dumps((False, _portable(error)))
    yield answer


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, as another process can have it."""
    note = f"in a worker process:\n{''.join(traceback.format_exception(error))}"
    with contextlib.suppress(Exception):  # whatever its own methods of pickling may raise
        copy = pickle.loads(pickle.dumps(error))
        copy.add_note(note)
        return copy
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note(note)
    return other
