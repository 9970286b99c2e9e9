"""How contestants are timed: in turns, pass by pass."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from contestants import Contestant, Work, enter

__all__ = ["NEW", "SAME", "WALL", "Measured", "measure"]

NEW, SAME = "new", "same"  # gradients: allocated for each step, or the same ones
WALL = "mul_"  # in place: what memory can give
IN_CACHE = 4_000_000  # elements below which memory is no limit
TIME = 0.03  # seconds of steps in one pass, as far as FEWEST and MOST steps allow
FEWEST, MOST = 2, 40


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


def measure(work: Work, make: Mapping[str, Callable[[Work], Contestant]], passes: int) -> Measured:
    """Let contestants take turns; all must agree first."""
    measured = Measured()
    entrants = {name: enter(factory, work) for name, factory in make.items()}
    for name, entrant in entrants.items():
        measured.passes[name] = {SAME: []} if entrant.keeps_gradients else {NEW: [], SAME: []}
        measured.backends[name] = entrant.backend
        measured.traffic[name] = entrant.traffic
    at_wall = work.elements >= IN_CACHE
    block = torch.ones(work.elements if at_wall else 0)
    measured.passes[WALL] = {SAME: []}
    for _ in range(passes):
        for name, entrant in entrants.items():
            for kind, medians in measured.passes[name].items():
                prepare = functools.partial(entrant.prepare, new=kind == NEW)
                medians.append(median_time(entrant.step, prepare))
        if at_wall:
            measured.passes[WALL][SAME].append(median_time(lambda: block.mul_(1.0), lambda: None))
    return measured


def median_time(step: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Seconds of a step, the preparation left out; warms up before."""

    def timed() -> float:
        prepare()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    warm = min(timed() for _ in range(2))
    rounds = max(FEWEST, min(MOST, round(TIME / warm)))
    # what compiles anew in a step that is timed has not been understood
    with torch.compiler.set_stance("fail_on_recompile"):
        times = [timed() for _ in range(rounds)]
    return statistics.median(times)
