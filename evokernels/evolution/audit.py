"""Whether the rules that stop genomes early are right: a sample of them is trained to the end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.files import csv_text
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.journal import Journal
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.score import Score, Status

__all__ = ["Audit", "Verdict", "audit", "audit_csv", "audit_line"]

TOP = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a stopped genome would have come to.

    Attributes:
        generation: that it was stopped in, counted from 0.
        place: in that generation.
        rule: "hurdle" or "race"; the hurdle if both.
        told: the fitness that the search was told.
        audited: the fitness of the genome trained to the end, with all seeds of that generation.
        status: of its worst run then.
        third_best: the third best fitness of the other genomes of that generation; None where
            there are not three other optimizers: then there was no place to lose.
        false_kill: it would have been one of the best three.
    """

    generation: int
    place: int
    rule: str
    told: float
    audited: float
    status: str
    third_best: float | None
    false_kill: bool


@dataclasses.dataclass(frozen=True)
class Audit:
    """A sample of the stopped genomes, and of how many it is one."""

    verdicts: tuple[Verdict, ...]
    stopped: int

    @property
    def false_kills(self) -> int:
        """Genomes of the sample that should not have been stopped."""
        return sum(verdict.false_kill for verdict in self.verdicts)


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A genome that was stopped in a generation."""

    generation: int
    place: int
    key: str
    rule: str
    genome: Genome


def audit(
    settings: RunSettings, evaluations: Evaluations, sample: int, still_to_come: int
) -> Audit | None:
    """Train a sample of the stopped genomes to the end; None for a sample of none.

    Args:
        sample: genomes, drawn by the seed of the run; a larger sample has those of a smaller one.
        still_to_come: as in `Evaluations.make`.
    """
    if not sample:
        return None
    stopped = find_stopped(evaluations.journal, settings.search.population)
    random.Random(f"evokernels audit {settings.search.seed}").shuffle(stopped)
    sampled = stopped[:sample]
    trials = {
        genome: [
            missing_trial(evaluations.journal, genome, task, seed)
            for task in settings.tasks
            for seed in settings.training_seeds(genome.generation)
        ]
        for genome in sampled
    }
    evaluations.make(
        [
            Request(trial, genome.key)
            for genome, needed in trials.items()
            for trial in needed
            if trial.purpose is Purpose.AUDIT
        ],
        still_to_come,
        "audit of stopped genomes",
    )
    population = settings.search.population
    verdicts = [judge(evaluations, genome, needed, population) for genome, needed in trials.items()]
    verdicts.sort(key=lambda verdict: (verdict.generation, verdict.place))
    return Audit(tuple(verdicts), len(stopped))


def find_stopped(journal: Journal, population: int) -> list[Stopped]:
    """All of them, generation after generation; without the candidates of refinements, which are
    held against other ones than children are."""
    return [
        Stopped(generation, place, key, rule, Genome.from_json(genome))
        for generation, place, key, rule, genome in journal.query(
            "SELECT generation, place, key, rule, genome "
            "FROM stopped_genome JOIN candidate USING (generation, place, key) "
            "WHERE place < ? ORDER BY generation, place",
            population,
        )
    ]


def missing_trial(journal: Journal, stopped: Stopped, task: str, seed: int) -> Trial:
    """The one that says how the genome does: of the search, unless it was stopped or left out."""
    entry = journal.find(stopped.key, task, seed, Purpose.SEARCH)
    complete = entry is not None and entry.outcome.status is not Status.STOPPED
    return Trial(stopped.genome, task, seed, Purpose.SEARCH if complete else Purpose.AUDIT)


def judge(
    evaluations: Evaluations, stopped: Stopped, trials: Sequence[Trial], population: int
) -> Verdict:
    """How a genome did in all these trials, beside the others of its generation."""
    runs: dict[str, list[Outcome]] = {}
    for trial in trials:
        entry = evaluations.entry(stopped.key, trial.task, trial.seed, trial.purpose)
        runs.setdefault(trial.task, []).append(entry.outcome)
    score = genome_score(runs)
    told = {
        key: Score(fitness, Status(status))
        for key, fitness, status in evaluations.journal.query(
            "SELECT key, score, status FROM candidate WHERE generation = ? AND place < ?",
            *(stopped.generation, population),
        )
    }
    own = told.pop(stopped.key)
    best = sorted(told.values(), key=lambda other: other.rank)[-TOP:]
    third = best[0] if len(best) == TOP else None
    return Verdict(
        generation=stopped.generation,
        place=stopped.place,
        rule=stopped.rule,
        told=own.fitness,
        audited=score.fitness,
        status=score.status.value,
        third_best=third.fitness if third else None,
        false_kill=third is not None and score.rank > third.rank,
    )


def audit_csv(audited: Audit) -> str:
    """One line a genome of the sample; generations count from 1, as on screen."""
    return csv_text(
        (field.name for field in dataclasses.fields(Verdict)),
        (
            dataclasses.astuple(dataclasses.replace(verdict, generation=verdict.generation + 1))
            for verdict in audited.verdicts
        ),
    )


def audit_line(audited: Audit) -> str:
    """The verdicts in one sentence."""
    return (
        f"Audit: of {audited.stopped} genomes that hurdle or race stopped, "
        f"{len(audited.verdicts)} were trained to the end; {audited.false_kills} of them would "
        f"have been among the best {TOP} of their generation."
    )
