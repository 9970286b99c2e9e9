"""The report of a run that goes on."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

from evokernels.evolution.figures import new_figure
from evokernels.evolution.html_report.page import Page, write

__all__ = ["RunningReport"]

SHARE = 0.01


class RunningReport:
    """Writes ``report.html`` as generations end, so that a run that was killed has one too.

    The first generation is always reported; further ones as long as all pages together take at
    most a hundredth of the time, so that no run waits for its report, however short its
    generations or long its history.

    Args:
        folder: of the run.
        generations: how many there are, at most.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        generations: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._generations = generations
        self._clock = clock
        self._began = clock()
        self._spent = 0.0

    def show(self, number: int, make: Callable[[str], Page]) -> None:
        """Write the page, unless that has taken too long already; warns as `page.write` does.

        Args:
            number: of the generation that has ended, counted from 1.
            make: makes the page, given what it has to say of the state of the run.
        """
        started = self._clock()
        if self._spent > SHARE * (started - self._began):
            return

        def page() -> Page:
            nonlocal started
            new_figure(1.0, 1.0)  # imports what the end of the run needs anyway: no cost of this
            started = self._clock()
            return make(self._state(number))

        write(self._folder, page, "the run goes on")
        self._spent += self._clock() - started

    def _state(self, number: int) -> str:
        return (
            f"Generation {number} of {self._generations} had ended when this page was written, "
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC. The winner is chosen, and "
            "compared on fresh seeds, after the last one. While the run goes on, load the page "
            "again for a newer one; if it was interrupted, the same command goes on with it."
        )
