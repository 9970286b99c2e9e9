"""Where the time of a training step goes, by what the operations are for."""

from __future__ import annotations

import collections
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import source_loop
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from evokernels.tasks import Batches

__all__ = ["BATCHES", "REST", "UPDATE", "milliseconds_a_step"]

UPDATE, BATCHES, REST = "update", "batches", "rest"

# Whatever happens inside an operation of these names is theirs.
ENCLOSING = {
    UPDATE: re.compile(rf"^{UPDATE}$|^Optimizer\."),
    BATCHES: re.compile(rf"^{BATCHES}$|^enumerate\(DataLoader\)"),
}
# Of what remains, the innermost operation that has one of these names; the first that fits.
INNERMOST = {
    "convolution, backward": re.compile("convolution_?backward", re.IGNORECASE),
    "convolution, forward": re.compile("convolution|conv2d", re.IGNORECASE),
    "matrix products": re.compile(r"addmm|::mm$|matmul|linear\b", re.IGNORECASE),
    "batch norm": re.compile("batch_?norm", re.IGNORECASE),
    "pooling": re.compile("max_?pool", re.IGNORECASE),
    "dropout": re.compile("dropout|bernoulli|^autograd.*: MulBackward0", re.IGNORECASE),
    "ReLU": re.compile("relu|threshold|clamp_min", re.IGNORECASE),
    "loss": re.compile("cross_entropy|log_?softmax|nll_?loss", re.IGNORECASE),
    "copies": re.compile(r"copy_|contiguous|clone|::to$"),
}
# An autograd.Function of Python has a name of its own, and torch's numbers its own.
FUSED = re.compile(r"^[A-Z]\w*$")
OF_TORCH = re.compile(r"Backward\d+$")


def milliseconds_a_step(train: Callable[[int], object], steps: int) -> dict[str, float]:
    """Milliseconds that a step spends in each group; all together are what it takes.

    The time of one step is taken away from that of ``steps`` and one: what happens once is in
    both. The profiler's own share is in it: a few microseconds an operation.

    Args:
        train: trains with as many steps as it is told, and tests next to nothing.
        steps: some.
    """
    train(1)  # what the first run of a process has to set up
    one, more = _profiled(train, 1), _profiled(train, 1 + steps)
    return {group: (more[group] - one[group]) / steps for group in {*one, *more}}


def _profiled(train: Callable[[int], object], steps: int) -> collections.Counter[str]:
    """Milliseconds of a whole evaluation, by group."""
    with (
        _labelled(source_loop.SourceUpdate, "step", UPDATE),
        _labelled(Batches, "training", BATCHES),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        start = time.perf_counter()
        train(steps)
        wall = (time.perf_counter() - start) * 1e3
    spent: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        spent[_group(event)] += event.self_cpu_time_total / 1e3
    # the interpreter, and what waits: between the operations
    spent[REST] = wall - sum(ms for group, ms in spent.items() if group != REST)
    return spent


@contextlib.contextmanager
def _labelled(owner: type, method: str, label: str) -> Iterator[None]:
    """Make calls of a method show up in a profile."""
    original = getattr(owner, method)

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    with mock.patch.object(owner, method, labelled):
        yield


def _group(event: FunctionEvent) -> str:
    names = [event.name, *(parent.name for parent in _parents(event))]
    for group, pattern in ENCLOSING.items():
        if any(pattern.search(name) for name in names):
            return group
    for name in names:
        for group, pattern in INNERMOST.items():
            if name.startswith(("aten::", "autograd::")) and pattern.search(name):
                return group
        if FUSED.search(name) and not OF_TORCH.search(name):
            return f"fused: {name}"
    return REST


def _parents(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while (event := event.cpu_parent) is not None:
        yield event
