"""Which genome a run ends with, and how much of its fitness is luck.

The best of many noisy scores is better on paper than in truth. So the finalists are trained again
on seeds that the search has not seen before one of them is the winner, and the winner's fitness on
yet other seeds is put beside the one that selected it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.comparison import Estimate
from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.files import csv_text
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.genetic import Scored
from evokernels.search.score import Score

__all__ = ["Winner", "choose_winner", "measure_winner", "winner_csv"]


@dataclasses.dataclass(frozen=True)
class Winner:
    """How the winner does on fresh seeds.

    Attributes:
        selected: its fitness in the search, which made it a finalist or, alone, the winner.
        fresh: its fitness on the same split with fresh seeds.
        test: its fitness on the test split with the same fresh seeds.
    """

    selected: float
    fresh: Estimate
    test: Estimate

    @property
    def bias(self) -> Estimate:
        """How far selection has overestimated it; the error is that of `fresh`."""
        return Estimate(self.selected - self.fresh.mean, self.fresh.error)


def choose_winner(
    settings: RunSettings,
    evaluations: Evaluations,
    best: Scored,
    last: Sequence[Scored],
    still_to_come: int,
) -> Scored:
    """The finalist with the best mean on the final seeds, with the score that the search was told.

    A genome that failed in the search is no finalist, unless it is the best.

    Args:
        best: the best genome of the search.
        last: the last generation.
        still_to_come: as in `Evaluations.make`.
    """
    sound = [scored for scored in last if not scored.score.status.failed]
    ranked = sorted(sound, key=lambda scored: scored.score.rank, reverse=True)
    finalists: dict[str, Scored] = {}
    for scored in (best, *ranked):
        finalists.setdefault(canonical_key(scored.genome), scored)
    chosen = dict(list(finalists.items())[: settings.finalists])
    if len(chosen) == 1:
        return best

    def trial(scored: Scored, task: str, seed: int) -> Trial:
        return Trial(scored.genome, task, seed, Purpose.AUDIT)

    evaluations.make(
        [
            Request(trial(scored, task, seed), key)
            for key, scored in chosen.items()
            for task in settings.tasks
            for seed in settings.final_seeds
        ],
        still_to_come,
        "finalists",
    )

    def final_score(scored: Scored) -> Score:
        return genome_score(
            {
                task: [
                    evaluations.outcome(trial(scored, task, seed)) for seed in settings.final_seeds
                ]
                for task in settings.tasks
            }
        )

    # of equals the one that the search ranks higher
    return max(chosen.values(), key=lambda scored: final_score(scored).rank)


def measure_winner(settings: RunSettings, evaluations: Evaluations, winner: Scored) -> Winner:
    """From the runs of the comparison, which must have been made."""

    def estimate(genome: Genome, worth: str) -> Estimate:
        def of_seed(seed: int) -> float:
            outcomes: list[Outcome] = [
                evaluations.outcome(Trial(genome, task, seed, Purpose.REPORT))
                for task in settings.tasks
            ]
            return statistics.fmean(getattr(outcome, worth) for outcome in outcomes)

        return Estimate.of(map(of_seed, settings.fresh_seeds))

    return Winner(
        winner.score.fitness,
        estimate(winner.genome, "fitness"),
        estimate(winner.genome, "test_fitness"),
    )


def winner_csv(winner: Winner, settings: RunSettings) -> str:
    """One line: how the winner was selected, what fresh seeds say, and the bias.

    The protocol is "parity" where it is that of the source system.
    """
    row = {
        "protocol": "parity" if settings.parity else "own",
        "split": settings.selection_split,
        "selected_fitness": winner.selected,
        "fresh_seeds": len(settings.fresh_seeds),
        "fresh_fitness": winner.fresh.mean,
        "fresh_error": winner.fresh.error,
        "selection_bias": winner.bias.mean,
        "bias_error": winner.bias.error,
        "test_fitness": winner.test.mean,
        "test_error": winner.test.error,
    }
    return csv_text(row.keys(), [row.values()])
