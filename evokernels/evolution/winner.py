"""Which genome a run ends with, and how much of its fitness is luck.

The best of many noisy scores is better on paper than in truth. So the finalists are trained again
on seeds that the search has not seen before one of them is the winner, and the winner's fitness on
yet other seeds is put beside the one that selected it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.comparison import Estimate
from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.files import csv_text
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.settings import RunSettings, TrainingSettings
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.genetic import Scored

__all__ = [
    "TrialOf",
    "Winner",
    "choose_winner",
    "final_runs",
    "measure_winner",
    "trials_of",
    "winner_csv",
]


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


# The training run of a candidate: on a task, with a seed, for a purpose.
TrialOf = Callable[[str, int, Purpose], Trial]


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
    chosen = list(finalists.values())[: settings.finalists]
    if len(chosen) == 1:
        return best
    trials = [trials_of(scored.genome) for scored in chosen]
    scores = map(genome_score, final_runs(settings, evaluations, trials, still_to_come))
    # of equals the one that the search ranks higher
    return max(zip(chosen, scores, strict=True), key=lambda entry: entry[1].rank)[0]


def final_runs(
    settings: TrainingSettings,
    evaluations: Evaluations,
    finalists: Sequence[TrialOf],
    still_to_come: int,
) -> list[dict[str, list[Outcome]]]:
    """How each finalist does on the final seeds: for each task, its runs.

    Args:
        still_to_come: as in `Evaluations.make`.
    """
    by_task = [
        {
            task: [trial(task, seed, Purpose.AUDIT) for seed in settings.final_seeds]
            for task in settings.tasks
        }
        for trial in finalists
    ]
    trials = [trial for runs in by_task for several in runs.values() for trial in several]
    evaluations.make(map(Request.after_search, trials), still_to_come, "finalists")
    return [
        {task: [evaluations.outcome(trial) for trial in several] for task, several in runs.items()}
        for runs in by_task
    ]


def measure_winner(
    settings: TrainingSettings, evaluations: Evaluations, selected: float, winner: TrialOf
) -> Winner:
    """From the runs of the comparison, which must have been made.

    Args:
        selected: its fitness in the search.
    """

    def estimate(worth: str) -> Estimate:
        def of_seed(seed: int) -> float:
            return statistics.fmean(
                getattr(evaluations.outcome(winner(task, seed, Purpose.REPORT)), worth)
                for task in settings.tasks
            )

        return Estimate.of(map(of_seed, settings.fresh_seeds))

    return Winner(selected, estimate("fitness"), estimate("test_fitness"))


def trials_of(genome: Genome) -> TrialOf:
    """Of a genome that trains the tasks' own networks."""
    return lambda task, seed, purpose: Trial(genome, task, seed, purpose)


def winner_csv(winner: Winner, settings: TrainingSettings) -> str:
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
