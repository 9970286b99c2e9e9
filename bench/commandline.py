"""What the scripts beside this file share: options, a progress bar, tables, errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from evokernels.errors import EvokernelsError
from evokernels.evolution.devices import find_device
from evokernels.evolution.precision import PRECISIONS, best_precision

__all__ = [
    "Bar",
    "add_machine_options",
    "add_precision",
    "exit_code",
    "markdown",
    "resolved_precision",
    "worker_count",
]


def exit_code(command: Callable[[], None], resume_hint: str) -> int:
    """Run a command; 0, or 2 after an error and 130 after Ctrl-C, each with one line on stderr."""
    try:
        command()
    except EvokernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {resume_hint}", file=sys.stderr)
        return 130
    return 0


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What a machine has, not what an experiment is: where data are, who trains, how patiently."""
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with data sets ($EVOKERNELS_DATA, else ~/.cache/evokernels/data)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes that train; the result does not depend on them "
        "(as many as the processor has cores for; 1 on a CUDA device)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of a training run, which counts as failed beyond it (more than any should take)",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """``--precision``, for `resolved_precision`."""
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the networks' arithmetic; auto: the faster one on this processor (auto)",
    )


def resolved_precision(name: str, device: str) -> str:
    """``--precision`` as `Conditions` have it."""
    return best_precision(find_device(device))[0] if name == "auto" else name


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """A table, line by line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def worker_count(options: argparse.Namespace, threads: int, device: str) -> int:
    """``--workers``, else one for every ``threads`` cores that this process may use.

    One on a CUDA device: the processes on it take turns, and each needs memory of its own.
    """
    if options.workers is not None:
        return options.workers
    if device != "cpu":
        return 1
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, available // threads)


class Bar:
    """Progress with the time left; shows up with the first `show`, and also in a log file.

    Args:
        unit: what is counted: training runs, if nothing else.
    """

    def __init__(self, unit: str = "run") -> None:
        self._unit = unit
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, expected: int, note: str) -> None:
        """Units done and expected in all, and what is being done."""
        if self._bar is None:
            self._bar = tqdm(
                desc=note,
                initial=done,
                total=expected,
                unit=self._unit,
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
            )
        self._bar.total = expected
        self._bar.set_description(note, refresh=False)
        self._bar.update(done - self._bar.n)
