"""An evaluation without a training run, in a module that worker processes can import."""

from __future__ import annotations

from evokernels.evolution.pool import Evaluation
from evokernels.evolution.trial import Outcome, Trial
from evokernels.search.score import Status

__all__ = ["Nothing"]


class Nothing(Evaluation):
    """An evaluation that neither loads data nor trains."""

    def prepare(self, trial: Trial) -> None:
        """There is nothing to load."""

    def __call__(self, trial: Trial) -> Outcome:
        """The outcome of a training run, but without one."""
        return Outcome(Status.OK, 0.5, 0.5, 1.0, 100, 0.1, "0123456789abcdef")
