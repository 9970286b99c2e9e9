"""What a training run is worth, and what a genome is worth over many runs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from evokernels.search.score import Score, Status

if TYPE_CHECKING:
    from evokernels.evolution.trial import Outcome

__all__ = [
    "DIVERGED_FITNESS",
    "FINAL_STEPS",
    "Hurdle",
    "diverged",
    "final_loss",
    "genome_score",
    "run_fitness",
    "within_limit",
]

# The fitness of the source system, section 3.3: accuracy decides, and a low training loss is
# worth at most 0.05 beside it.
LOSS_WEIGHT = 0.05
LOSS_LIMIT = 50.0
FINAL_STEPS = 50
DIVERGED_FITNESS = -1.0


def within_limit(loss: float | torch.Tensor) -> bool | torch.Tensor:
    """Whether a training loss, or each in a tensor, is at most 50; NaN and infinity are not."""
    return loss <= LOSS_LIMIT  # NaN compares False


def diverged(loss: float) -> bool:
    """Whether a training loss is NaN, infinite or above 50: the run is lost."""
    return not within_limit(loss)


def final_loss(losses: Sequence[float]) -> float:
    """Mean training loss of the last 50 steps, or of all of them where there are fewer."""
    return statistics.fmean(losses[-FINAL_STEPS:])


@dataclasses.dataclass(frozen=True)
class Hurdle:
    """Ends a run that has learnt nothing by step 50: its loss is no better than guessing's.

    Args:
        classes: number of classes; guessing has the loss ln(classes).
    """

    classes: int

    STEP = 50
    AVERAGED = 10  # losses, the last before the hurdle

    def fails(self, losses: Sequence[float]) -> bool:
        """Whether a run that has taken exactly 50 steps, with these losses, ends there."""
        recent = losses[-self.AVERAGED :]
        return len(losses) == self.STEP and statistics.fmean(recent) > math.log(self.classes)


def run_fitness(accuracy: float, loss: float) -> float:
    """Fitness of one training run that did not diverge.

    Args:
        accuracy: share of test images classified correctly, in [0, 1].
        loss: `final_loss` of the run.
    """
    return accuracy + LOSS_WEIGHT * max(0.0, 1.0 - loss)


def genome_score(runs: Mapping[str, Iterable[Outcome]]) -> Score:
    """Score of a genome: the mean over the seeds of each task, then over the tasks.

    A genome has the status of its worst run: an optimizer that fails one training in six is no
    optimizer, however good the other five are.

    Args:
        runs: for each task, how each of its runs ended.
    """
    by_task = [list(outcomes) for outcomes in runs.values()]
    means = [statistics.fmean(outcome.fitness for outcome in outcomes) for outcomes in by_task]
    statuses = {outcome.status for outcomes in by_task for outcome in outcomes}
    # listed from the best to the worst
    return Score(statistics.fmean(means), max(statuses, key=list(Status).index))
