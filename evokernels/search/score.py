"""What an evaluation tells a search: a number, and whether the training held together."""

from __future__ import annotations

import dataclasses
import enum
import math

__all__ = ["MEASURED", "Score", "Status"]


class Status(enum.Enum):
    """How an evaluation ended."""

    OK = "ok"
    STOPPED = "stopped"  # by a hurdle: measured as it was then, and ranked by that
    DIVERGED = "diverged"
    CRASHED = "crashed"  # its worker process ended in the middle of it
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"


# the statuses whose fitness was measured
MEASURED = frozenset({Status.OK, Status.STOPPED})


@dataclasses.dataclass(frozen=True)
class Score:
    """The worth of one candidate.

    Args:
        fitness: higher is better; finite, so that every comparison means something.
        status: one that is not in `MEASURED` ranks below every one that is, whatever its fitness.

    Raises:
        ValueError: the fitness is NaN or infinite: a failed evaluation is a status, not a number.
    """

    fitness: float
    status: Status = Status.OK

    def __post_init__(self) -> None:
        if not math.isfinite(self.fitness):
            raise ValueError(
                f"fitness must be finite, got {self.fitness!r}; "
                "give a failed evaluation a finite fitness and Status.DIVERGED"
            )

    @property
    def rank(self) -> tuple[bool, float]:
        """Sort key, best last."""
        return self.status in MEASURED, self.fitness
