"""What an evaluation tells a search: a number, and whether the training held together."""

from __future__ import annotations

import dataclasses
import enum
import math

__all__ = ["Score", "Status"]


class Status(enum.Enum):
    """How an evaluation ended."""

    OK = "ok"
    STOPPED = "stopped"  # by a hurdle: worth what it had reached
    DIVERGED = "diverged"
    CRASHED = "crashed"  # its worker process ended in the middle of it
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"

    @property
    def failed(self) -> bool:
        """Whether there is nothing to rank: the number beside it means nothing."""
        return self not in (Status.OK, Status.STOPPED)


@dataclasses.dataclass(frozen=True)
class Score:
    """The worth of one candidate.

    Args:
        fitness: higher is better; finite, so that every comparison means something.
        status: one that `failed` ranks below every other, whatever its fitness.

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
        return not self.status.failed, self.fitness
