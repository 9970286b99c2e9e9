"""What is evaluated, under which conditions, and how it ended: the words of the evaluation."""

from __future__ import annotations

import dataclasses
import enum
import hashlib

from evokernels.architecture import Architecture
from evokernels.evolution.baselines import Baseline, optimizer_key
from evokernels.evolution.fitness import run_fitness
from evokernels.genome import Genome
from evokernels.search.score import Status
from evokernels.tasks import get_task

__all__ = ["Conditions", "Outcome", "Purpose", "Trial"]


class Purpose(enum.Enum):
    """What a training run is made for, which decides what is measured and what may end it early."""

    SEARCH = "search"  # measured on the split that selects; a hurdle may end it
    AUDIT = "audit"  # the same, trained to the end whatever its loss
    REPORT = "report"  # trained to the end, and measured on the test split too


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: what is trained, on what (task), with which randomness (seed), and why.

    Without an architecture the task's own network is trained.
    """

    optimizer: Genome | Baseline
    task: str
    seed: int
    purpose: Purpose = Purpose.SEARCH
    architecture: Architecture | None = None

    @property
    def key(self) -> str:
        """Equal for trials that are one optimizer and one network, if their tasks are equal.

        The key of the optimizer; behind it, where there is an architecture, a digest of what that
        decodes to on the task: architectures that decode alike are trained once.

        Raises:
            ArchitectureError: the task has no network of this architecture.
        """
        optimizer = optimizer_key(self.optimizer)
        if self.architecture is None:
            return optimizer
        components = get_task(self.task).decode(self.architecture).components
        digest = hashlib.sha256("\n".join(components).encode()).hexdigest()[:16]
        return f"{optimizer} on {digest}"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What all training runs of an experiment have in common.

    Args:
        steps: of each run, each of ``batch_size`` samples.
        batch_size: samples in a batch.
        train_samples: samples of the training split that are used (None: all of them).
        validation_samples: further samples of the training split that no run trains with, and that
            fitness is measured on. 0: fitness is measured on the test split, as in the source
            system ("parity").
        precision: "float32", or "bfloat16" for what torch's autocast would compute so.
        hurdle: end a run of the search whose loss is no better than guessing after 50 steps.
    """

    steps: int
    batch_size: int
    train_samples: int | None
    validation_samples: int = 0
    precision: str = "float32"
    hurdle: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        status: see `Status`.
        fitness: as `evokernels.evolution.fitness` defines it; -1 for a run that has none.
        accuracy: on the split that selects, in [0, 1]; None for a run that was not measured.
        final_loss: mean training loss of the last 50 steps; None like ``accuracy``.
        steps: optimizer steps taken; fewer than the conditions ask for if the run ended early.
        seconds: wall-clock time of training and test.
        data: digest of the data set, so that a run cannot go on with other data unnoticed; empty
            if the trial failed in a way that leaves it unknown.
        test_accuracy: on the test split; None unless the purpose is `Purpose.REPORT`.
    """

    status: Status
    fitness: float
    accuracy: float | None
    final_loss: float | None
    steps: int
    seconds: float
    data: str
    test_accuracy: float | None = None

    @property
    def test_fitness(self) -> float:
        """Like ``fitness``, of the test split; raises ValueError where that was not measured."""
        if self.status.failed:
            return self.fitness
        if self.test_accuracy is None or self.final_loss is None:
            raise ValueError("only a trial for a report is measured on the test split")
        return run_fitness(self.test_accuracy, self.final_loss)
