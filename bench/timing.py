"""How contestants are timed: in turns, pass by pass."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from contestants import Contestant, Work, enter

__all__ = [
    *("NEW", "SAME", "WALL", "Measured", "Stopwatch", "Way", "measure", "median_of"),
    "take_turns",
]

NEW, SAME = "new", "same"  # gradients: allocated for each step, or the same ones
WALL = "memory"  # what it can give: mul_ in place on the host, a copy on a GPU
IN_CACHE = 4_000_000  # elements below which memory is no limit
TIME = 0.03  # seconds of steps in one pass, as far as FEWEST and MOST steps allow
FEWEST, MOST = 2, 40

Way = Callable[[], float]  # takes a time when it is called: median seconds


@dataclass
class Measured:
    """What was measured of a case: median seconds of each pass, by contestant and kind."""

    passes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, int | None] = field(default_factory=dict)

    def seconds(self, contestant: str, kind: str) -> float | None:
        """The median over the passes, None for who was not measured."""
        passes = self.passes.get(contestant, {}).get(kind)
        return statistics.median(passes) if passes else None

    def ratio(self, one: str, other: str, kind: str) -> float:
        """How many times longer one takes than another: the median over the passes."""
        pairs = zip(self.passes[one][kind], self.passes[other][kind], strict=True)
        return statistics.median(a / b for a, b in pairs)


class Stopwatch(Protocol):
    """What is timed of whom, and with which clock."""

    def ways(self, entrant: Contestant) -> dict[str, Way]:
        """The kinds of times of a contestant's steps, and how each is taken."""

    def wall(self, work: Work) -> dict[str, Way]:
        """The same of what memory can give; empty where it is no limit."""


class HostStopwatch:
    """The host's clock, with gradients that are new in every step, and with the same ones."""

    def ways(self, entrant: Contestant) -> dict[str, Way]:
        """As `Stopwatch` says."""
        kinds = (SAME,) if entrant.keeps_gradients else (NEW, SAME)
        return {
            kind: functools.partial(
                median_time, entrant.step, functools.partial(entrant.prepare, new=kind == NEW)
            )
            for kind in kinds
        }

    def wall(self, work: Work) -> dict[str, Way]:
        """A multiplication in place of as many elements."""
        if work.elements < IN_CACHE:
            return {}
        block = torch.ones(work.elements)
        return {SAME: functools.partial(median_time, lambda: block.mul_(1.0), lambda: None)}


def measure(work: Work, make: Mapping[str, Callable[[Work], Contestant]], passes: int) -> Measured:
    """Let contestants take turns on the host's clock; all must agree first."""
    entrants = {name: enter(factory, work) for name, factory in make.items()}
    return take_turns(work, entrants, passes, HostStopwatch())


def take_turns(
    work: Work, entrants: Mapping[str, Contestant], passes: int, stopwatch: Stopwatch
) -> Measured:
    """Every pass times everybody once, so that a slow phase of the machine meets all alike."""
    measured = Measured()
    ways = {name: stopwatch.ways(entrant) for name, entrant in entrants.items()}
    for name, entrant in entrants.items():
        measured.backends[name] = entrant.backend
        measured.traffic[name] = entrant.traffic
    ways[WALL] = stopwatch.wall(work)
    measured.passes = {name: {kind: [] for kind in kinds} for name, kinds in ways.items()}
    for _ in range(passes):
        for name, kinds in ways.items():
            for kind, way in kinds.items():
                measured.passes[name][kind].append(way())
    return measured


def median_time(step: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Seconds of a step by the host's clock, the preparation left out; warms up before."""

    def timed() -> float:
        prepare()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return median_of(timed)


def median_of(timed: Callable[[], float]) -> float:
    """The median of as many times as make a pass; warms up before."""
    warm = min(timed() for _ in range(2))
    rounds = max(FEWEST, min(MOST, round(TIME / warm)))
    # what compiles anew in a step that is timed has not been understood
    with torch.compiler.set_stance("fail_on_recompile"):
        times = [timed() for _ in range(rounds)]
    return statistics.median(times)
