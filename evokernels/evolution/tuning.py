"""Learning rate and schedule of every optimizer, chosen in the same number of trials.

What is tried is the same for all: factors on an optimizer's own learning rate, and schedules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from evokernels.evolution.baselines import Baseline
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.trial import Outcome, Trial
from evokernels.genome import Genome
from evokernels.search.score import Score

__all__ = ["LARGEST_FACTOR", "TUNING_SEED", "Choice", "candidates", "choose", "setting", "trials"]

# Factors lie between its inverse and itself. From a default that is any good, more than ten times
# up diverges and more than ten times down has not arrived when these trainings end.
LARGEST_FACTOR = 10.0
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0

# A tenth of the training; the source system's genomes warm up for 50 to 200 of 500 steps.
WARMUP_SHARE = 0.1

# The one seed that all trials are trained with. Far from those that anybody compares with, and
# always the same: whoever adds seeds to a comparison need not tune again.
TUNING_SEED = 10_000


@dataclasses.dataclass(frozen=True)
class Choice:
    """What tuning made of an optimizer.

    Attributes:
        optimizer: the best of the candidates.
        score: its score on the split that selects.
        default_score: that of the optimizer as it was, which is the first candidate.
    """

    optimizer: Genome | Baseline
    score: Score
    default_score: Score


def candidates(
    optimizer: Genome | Baseline, count: int, steps: int
) -> tuple[Genome | Baseline, ...]:
    """What is tried of an optimizer: itself, then ``count - 1`` other settings of it.

    Those alternate between warmup with cosine decay and a constant rate, and the logarithms of
    their factors are multiples of the golden ratio modulo 1 (Weyl): however many there are, they
    lie evenly. A larger ``count`` begins with the same candidates.

    Args:
        count: at least 1.
        steps: of a training run.
    """
    found = [optimizer]
    for place in range(1, count):
        factor = LARGEST_FACTOR ** (2.0 * (place * GOLDEN_RATIO % 1.0) - 1.0)
        found.append(_changed(optimizer, factor, scheduled=place % 2 == 1, steps=steps))
    return tuple(found)


def trials(optimizers: Sequence[Genome | Baseline], tasks: Sequence[str]) -> Iterator[Trial]:
    """The training runs of candidates: each on every task, with the one seed."""
    for optimizer in optimizers:
        for task in tasks:
            yield Trial(optimizer, task, TUNING_SEED)


def choose(
    optimizers: Sequence[Genome | Baseline],
    tasks: Sequence[str],
    outcome: Callable[[Trial], Outcome],
) -> Choice:
    """The best of the candidates, the first of equals.

    Args:
        optimizers: `candidates` of one optimizer.
        outcome: looks up how one of their `trials` ended.
    """
    scores = [
        genome_score({trial.task: [outcome(trial)] for trial in trials([optimizer], tasks)})
        for optimizer in optimizers
    ]
    best = max(range(len(scores)), key=lambda place: scores[place].rank)
    return Choice(optimizers[best], scores[best], scores[0])


def setting(optimizer: Genome | Baseline) -> str:
    """Learning rate and schedule in words."""
    parts = [f"lr {optimizer.lr:.3g}"]
    if optimizer.use_warmup:
        parts.append(f"{optimizer.warmup_steps} steps of warmup")
    if optimizer.use_cosine_decay:
        parts.append("cosine")
    return ", ".join(parts) if len(parts) > 1 else f"{parts[0]}, constant"


def _changed(
    optimizer: Genome | Baseline, factor: float, *, scheduled: bool, steps: int
) -> Genome | Baseline:
    rate = (
        {"lr_log10": optimizer.lr_log10 + math.log10(factor)}
        if isinstance(optimizer, Genome)
        else {"lr": optimizer.lr * factor}
    )
    return dataclasses.replace(
        optimizer,
        **rate,
        use_warmup=scheduled,
        warmup_steps=math.ceil(WARMUP_SHARE * steps) if scheduled else 0,
        use_cosine_decay=scheduled,
    )
