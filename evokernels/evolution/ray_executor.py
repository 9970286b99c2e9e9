"""Workers on the machines of a Ray cluster, any of which may die at any time.

A worker is an actor: a process that keeps data and compiled kernels. A call travels there as a
pickled function and trial, a kilobyte, and an outcome travels back. All decisions are taken by one
thread, which reads events from a queue: calls that come, answers, deaths, the clock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

from evokernels.errors import EvokernelsError, WorkerError
from evokernels.evolution.executor import (
    BEGAN,
    STARTS,
    NodeLost,
    WorkerDied,
    WorkerExecutor,
    WorkerLost,
    answering,
)
from evokernels.evolution.ray_cluster import (
    Head,
    Need,
    compiles,
    connect,
    processor,
    room,
    versions,
)

__all__ = ["RayExecutor"]

LOOK = 2.0  # seconds after which it looks again how many machines there are

# Seconds in which a worker must start if none is there: other work may hold the cluster, and torch
# may come from a slow disk.
PATIENCE = 120.0

# Seconds in which the head may be silent. Ray itself would end this process after a minute.
SILENCE = 15.0


class RayExecutor(WorkerExecutor):
    """Worker processes on all machines of a Ray cluster, each on its own.

    There are as many as the machines have room for, those too that join the cluster later. They
    start when there is a call for them, stay, and end with this process, even if it is killed. One
    that dies is replaced, wherever there is room. From outside nobody can tell whether a process
    crashed or was killed with its machine, by another user or for lack of memory; so a death in
    the middle of a call is always one of `WorkerLost`.

    Args:
        need: of each worker.
        most: workers, at most; None: all that there is room for.
        address: see `evokernels.evolution.ray_cluster.connect`; of no account in a program that
            is connected already, and stays so.

    Raises:
        WorkerError: there is no such cluster, or no machine with room for a worker.
    """

    def __init__(self, need: Need, most: int | None = None, address: str | None = None) -> None:
        self._connected = connect(address, need, most)
        self._need, self._most = need, most
        self._head = Head.of_this_cluster()
        self._slots = self._room()
        if not self._slots:
            self._disconnect()
            raise WorkerError(
                f"no machine of the Ray cluster has the {need} that a worker takes; use fewer "
                "threads, a smaller share of a GPU, or machines that have it"
            )
        self._actors = ray.remote(_Actor).options(**need.options, max_restarts=0)
        self._open = True
        self._error: WorkerError | None = None  # why no call can be made any more
        self._failed_starts = 0  # in a row
        self._waiting: deque[_Call] = deque()
        self._workers: list[_Worker] = []
        self._processors: list[str] = []
        self._without_compiler: set[str] = set()  # addresses of machines
        self._looked = self._moved = self._answered = time.monotonic()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> int:
        """Twice the workers: an answer is recorded while its worker is at the next call.

        A cluster whose machines are all gone has the calls of one worker, which wait for another.
        """
        return 2 * max(self._slots, 1)

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        """See `concurrent.futures.Executor.submit` and `WorkerExecutor`."""
        if not self._open:
            raise RuntimeError("cannot submit a call after shutdown")
        call = _Call(pickle.dumps((fn, args, kwargs)))
        self._events.put(functools.partial(self._take, call))
        return call.future

    def end(self, future: concurrent.futures.Future) -> None:
        """Kill the worker that this call runs on, if it does."""
        self._events.put(functools.partial(self._end, future))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`; it waits in any case."""
        self._open = False
        if cancel_futures:
            self._events.put(self._cancel)
        self._events.put(lambda: None)  # to see that it is closed
        self._thread.join()
        self._disconnect()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what they do may take minutes
            self._events.put(lambda: self._break(WorkerError("the executor was left by an error")))
        self.shutdown(cancel_futures=kind is not None)

    def _disconnect(self) -> None:
        if self._connected:
            ray.shutdown()

    # All that follows is called by the one thread.

    def _serve(self) -> None:
        while self._open or self._waiting or any(worker.call for worker in self._workers):
            try:
                with contextlib.suppress(queue.Empty):
                    self._events.get(timeout=LOOK)()
                if time.monotonic() - self._looked > LOOK:
                    self._look()
                self._assign()
            except Exception as error:  # of Ray, whose head is gone; nobody else would notice
                self._break(WorkerError(f"the Ray cluster fails: {_reason(error)}"))
        self._kill_all()

    def _room(self) -> int:
        found = room(self._need)
        return found if self._most is None else min(found, self._most)

    def _look(self) -> None:
        """At the machines, and whether anything moves."""
        self._looked = now = time.monotonic()
        if self._head.answers():
            self._answered = now
        elif now - self._answered > SILENCE:
            self._break(
                WorkerError(
                    f"the head of the Ray cluster, {self._head.address}, is gone; start the "
                    "cluster and the same command again"
                )
            )
        if self._answered != now:  # Ray would wait for it
            return
        self._slots = self._room()
        if not self._waiting or any(worker.where for worker in self._workers):
            self._moved = now
        elif now - self._moved > PATIENCE:
            self._break(
                WorkerError(
                    f"no worker started within {PATIENCE:g} seconds: machines of the Ray cluster "
                    f"have room for {self._slots}, if nothing else runs there; see ray status"
                )
            )

    def _take(self, call: _Call) -> None:
        self._waiting.append(call)

    def _assign(self) -> None:
        """Calls to workers that have none, and new workers for the rest."""
        if self._error is not None:
            while self._waiting:
                self._waiting.popleft().settle(self._error)
        for worker in self._workers:
            while self._waiting and worker.where and worker.call is None:
                call = self._waiting.popleft()
                if not call.future.cancelled():
                    worker.call = call
                    begins = worker.actor.begin.remote(call.message)
                    self._watch(begins, functools.partial(self._begun, worker, call))
        starting = sum(not worker.where for worker in self._workers)
        missing = min(len(self._waiting) - starting, self._slots - len(self._workers))
        machines = _machines() if missing > 0 else frozenset()
        for _ in range(missing):
            worker = _Worker(self._actors.remote(), machines)
            self._workers.append(worker)
            about = worker.actor.about.remote(self._need)
            self._watch(about, functools.partial(self._started, worker))

    def _watch(self, reference: Any, then: Callable[[concurrent.futures.Future], None]) -> None:
        """Call ``then`` with the answer when it is there, in this thread."""
        answer = reference.future()
        answer.add_done_callback(lambda done: self._events.put(functools.partial(then, done)))

    def _started(self, worker: _Worker, answer: concurrent.futures.Future) -> None:
        self._moved = time.monotonic()
        if worker not in self._workers:  # killed
            return
        try:
            about = answer.result()
        except Exception as error:  # whatever Ray says of an actor that did not come to be
            self._workers.remove(worker)
            # nobody knows where it was to start, so that the loss of any machine excuses it
            self._failed_starts += worker.machines <= _machines()
            if self._failed_starts == STARTS:
                self._break(
                    WorkerError(
                        f"workers of the Ray cluster end before they begin, {STARTS} times in a "
                        f"row ({_reason(error)}); all machines need evokernels and what it needs"
                    )
                )
            return
        self._failed_starts = 0
        worker.where, worker.node, worker.pid = about.where, about.node, about.pid
        if differing := [
            f"{name} {about.versions.get(name)} (here {version})"
            for name, version in versions().items()
            if about.versions.get(name) != version
        ]:
            self._break(
                WorkerError(
                    f"the machine {worker.where} has {', '.join(differing)}; results may depend "
                    "on it, so install the same on all"
                )
            )
        if about.processor not in self._processors:
            self._processors.append(about.processor)
            if len(self._processors) > 1:
                words = "workers have different processors (%s): the last bits of results differ"
                logging.getLogger(__name__).warning(words, ", ".join(self._processors))
        if not about.compiles and worker.where not in self._without_compiler:
            self._without_compiler.add(worker.where)
            words = (
                "the machine %s has no C compiler: rules with terms beyond the classic catalogue "
                "are slow there, and the last bits of their results differ"
            )
            logging.getLogger(__name__).warning(words, worker.where)

    def _begun(self, worker: _Worker, call: _Call, answer: concurrent.futures.Future) -> None:
        if worker not in self._workers:  # killed, and its call settled
            return
        try:
            began = answer.result()
        except Exception as error:  # whatever Ray says of an actor that is gone
            self._lost(worker, call, error)
            return
        if began:
            call.began = True
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                call.future.set_running_or_notify_cancel()
        # not before this is known: what crashes at once would take the first answer along
        ends = worker.actor.finish.remote()
        self._watch(ends, functools.partial(self._ended, worker, call))

    def _ended(self, worker: _Worker, call: _Call, answer: concurrent.futures.Future) -> None:
        if worker not in self._workers:
            return
        self._moved = time.monotonic()
        try:
            message = answer.result()
        except Exception as error:
            self._lost(worker, call, error)
            return
        worker.call = None
        try:
            succeeded, value = pickle.loads(message)
        except Exception as error:  # the worker is well, what it says is not
            succeeded, value = False, error
        if isinstance(value, EvokernelsError):
            value.args = (f"on the machine {worker.where}: {value}",)
        call.settle(value, succeeded)

    def _lost(self, worker: _Worker, call: _Call, error: Exception) -> None:
        """What the death of a worker means for its call."""
        gone = worker.node not in _machines()
        self._workers.remove(worker)
        reason = _reason(error)
        if worker.ended:
            call.settle(WorkerDied("was ended"))
        elif call.began:
            kind = NodeLost if gone else WorkerLost
            fate = "went with its machine" if gone else "died"
            call.settle(kind(f"{fate}, process {worker.pid} on {worker.where}: {reason}"))
        else:
            call.deaths += not gone
            if call.deaths == STARTS:
                call.settle(
                    WorkerError(
                        f"workers of the Ray cluster died before they began an evaluation, "
                        f"{STARTS} times in a row ({reason}); free memory, or use fewer workers"
                    )
                )
            else:
                self._waiting.appendleft(call)

    def _end(self, future: concurrent.futures.Future) -> None:
        for worker in self._workers:
            if worker.call is not None and worker.call.future is future:
                worker.ended = True
                ray.kill(worker.actor)

    def _cancel(self) -> None:
        while self._waiting:
            self._waiting.popleft().future.cancel()

    def _break(self, error: WorkerError) -> None:
        """No call is made any more; those on their way end with the error."""
        self._error = error
        self._kill_all()

    def _kill_all(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(Exception):  # where Ray itself is gone, so are they
                ray.kill(worker.actor)
            if worker.call is not None:
                worker.call.settle(self._error)
        self._workers.clear()


@dataclasses.dataclass(eq=False)
class _Call:
    """What is to be called, pickled, and what came of it.

    Attributes:
        began: the function runs; loading data is over.
        deaths: of workers before it began.
    """

    message: bytes
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    began: bool = False
    deaths: int = 0

    def settle(self, value: Any, succeeded: bool = False) -> None:
        """The end of it, unless it was cancelled."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            (self.future.set_result if succeeded else self.future.set_exception)(value)


@dataclasses.dataclass(eq=False)
class _Worker:
    """An actor as this process knows it.

    Attributes:
        machines: Ray's names of those that were there when it was asked for.
        where: the address of its machine; empty until it has started.
        node: Ray's name of that machine.
        pid: of the process, there.
        call: that it is at.
        ended: it was told to die.
    """

    actor: Any
    machines: frozenset[str]
    where: str = ""
    node: str = ""
    pid: int = 0
    call: _Call | None = None
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class _About:
    """What a worker says about itself; see `evokernels.evolution.ray_cluster`."""

    where: str
    node: str
    pid: int
    versions: dict[str, str]
    processor: str
    compiles: bool


class _Actor:
    """The process of a worker. Calls come one at a time, each as `begin` and `finish`."""

    def about(self, need: Need) -> _About:
        """Asked once, first."""
        node = ray.get_runtime_context().get_node_id()
        where, pid = ray.util.get_node_ip_address(), os.getpid()
        return _About(where, node, pid, versions(), processor(need), compiles(need))

    def begin(self, call: bytes) -> bool:
        """Prepare for it; whether that went well."""
        self._messages = answering(call)
        self._message = next(self._messages)
        return self._message == BEGAN

    def finish(self) -> bytes:
        """Its answer."""
        return next(self._messages, self._message)


def _machines() -> frozenset[str]:
    """Ray's names of all that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _reason(error: Exception) -> str:
    """The last line of what Ray says, up to its advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].partition(". ")[0].strip()
