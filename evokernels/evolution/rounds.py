"""One generation after the other is trained, seed after seed; equal optimizers and hopeless ones
are left out.

Everything here follows from the settings, the genomes and the outcomes: neither from what the
journal happens to have already, nor from the order in which evaluations end. A run that is resumed
takes the same decisions again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.history import Result
from evokernels.evolution.journal import Entry, Saving
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.racing import Bar, SeedModel, corrected_mean, next_bar
from evokernels.search.score import Score, Status

__all__ = ["Rounds"]


class Runner:
    """An optimizer of a generation: the runs that it has, seed by seed, then task by task."""

    def __init__(self, key: str, place: int, genome: Genome) -> None:
        self.key = key
        self.place = place  # of the first genome of the generation that is this optimizer
        self.genome = genome
        self.runs: dict[int, dict[str, Entry]] = {}
        self.trained: list[int] = []  # the seeds that it was trained with in this generation

    @property
    def scores(self) -> dict[int, float]:
        """Its score with each seed: the mean over the tasks."""
        return {
            seed: statistics.fmean(entry.outcome.fitness for entry in by_task.values())
            for seed, by_task in self.runs.items()
        }

    @property
    def by_task(self) -> dict[str, list[Entry]]:
        """Its runs the other way round."""
        tasks = next(iter(self.runs.values()))
        return {task: [by_task[task] for by_task in self.runs.values()] for task in tasks}

    def score_with(self, seeds: Sequence[int]) -> Score | None:
        """With these seeds alone; None if it was not trained with all of them."""
        if not self.runs.keys() >= set(seeds):
            return None
        part = Runner(self.key, self.place, self.genome)
        part.runs = {seed: self.runs[seed] for seed in seeds}
        return part.score

    @property
    def score(self) -> Score:
        """The mean over its seeds, then over the tasks."""
        return genome_score(
            {task: [entry.outcome for entry in entries] for task, entries in self.by_task.items()}
        )


class Rounds:
    """Evaluates generations, which must come in order from the first."""

    def __init__(self, settings: RunSettings, evaluations: Evaluations) -> None:
        self._settings = settings
        self._evaluations = evaluations
        self._seeds_of: dict[str, list[int]] = {}  # of each key, those it was trained with so far
        self._bar: Bar | None = None
        self._model: SeedModel | None = None  # of the last generation

    def run(
        self, number: int, genomes: Sequence[Genome], still_to_come: int, note: str
    ) -> list[Result]:
        """The results of generation ``number``, in the order of its genomes; all in the journal."""
        runners = self._evaluate(number, 0, genomes, still_to_come, note)
        seeds = self._settings.training_seeds(number)
        self._model = SeedModel.of(complete_scores(dict.fromkeys(runners), seeds))
        results = self._end(number, 0, runners)
        if self._settings.race:
            self._bar = next_bar([result.score for result in results], self._model)
        return results

    def run_beside(
        self, number: int, first: int, genomes: Sequence[Genome], still_to_come: int, note: str
    ) -> list[Result]:
        """The results of further genomes of generation ``number``, at places from ``first`` on.

        It must be the last that was run. They are raced against its genomes, whose seeds they have,
        and change nothing for the next generation's race.
        """
        return self._end(number, first, self._evaluate(number, first, genomes, still_to_come, note))

    def _evaluate(
        self, number: int, first: int, genomes: Sequence[Genome], still_to_come: int, note: str
    ) -> list[Runner]:
        """The optimizer that each genome is, trained; genomes that are one optimizer share it."""
        keys = [canonical_key(genome) for genome in genomes]
        journal = self._evaluations.journal
        journal.begin_generation(number, list(zip(keys, genomes, strict=True)), first)
        runners: dict[str, Runner] = {}
        for place, (key, genome) in enumerate(zip(keys, genomes, strict=True), start=first):
            runners.setdefault(key, Runner(key, place, genome))
        seeds = self._settings.training_seeds(number)
        self._train(number, list(runners.values()), seeds, still_to_come, note)
        return [runners[key] for key in keys]

    def _end(self, number: int, first: int, runners: Sequence[Runner]) -> list[Result]:
        """What came of each genome; recorded."""
        seeds = self._settings.training_seeds(number)
        results = []
        savings: list[Saving] = []
        for place, runner in enumerate(runners, start=first):
            own = runner.trained if place == runner.place else []
            without = savings_of(place, runner, [seed for seed in seeds if seed not in own])
            savings += without
            score = told(runner, seeds, self._model)
            results.append(Result(runner.by_task, score, runner.score_with(seeds), own, without))
        scores = [result.score for result in results]
        self._evaluations.journal.end_generation(number, scores, savings, first)
        return results

    def _train(
        self,
        number: int,
        runners: Sequence[Runner],
        seeds: Sequence[int],
        still_to_come: int,
        note: str,
    ) -> None:
        """Train with one seed after the other."""
        tasks = self._settings.tasks
        before: dict[str, Score] = {}
        for runner in runners:
            for seed in self._seeds_of.setdefault(runner.key, []):
                self._look_up(runner, seed)
            if runner.runs:
                before[runner.key] = runner.score
        racing = list(runners)
        for position, seed in enumerate(seeds):
            due = [runner for runner in racing if seed not in runner.runs]
            later = sum(
                other not in runner.runs for runner in racing for other in seeds[position + 1 :]
            )
            self._evaluations.make(
                [
                    Request(Trial(runner.genome, task, seed), runner.key, number, runner.place)
                    for runner in due
                    for task in tasks
                ],
                still_to_come + later * len(tasks),
                note,
            )
            for runner in due:
                self._look_up(runner, seed)
                self._seeds_of[runner.key].append(seed)
                runner.trained.append(seed)
            admits = self._judge(runners, before, seeds[: position + 1])
            racing = [runner for runner in racing if admits(runner)]

    def _look_up(self, runner: Runner, seed: int) -> None:
        runner.runs[seed] = {
            task: self._evaluations.entry(runner.key, task, seed, Purpose.SEARCH)
            for task in self._settings.tasks
        }

    def _judge(
        self, runners: Sequence[Runner], before: dict[str, Score], seeds: Sequence[int]
    ) -> Callable[[Runner], bool]:
        """Who is trained with the next seed after ``seeds``."""
        bar = self._bar
        if bar is None:
            return lambda runner: True
        if not set(seeds) <= bar.effects.keys():
            # Seeds rotate: what new ones do is seen in the genomes that stayed.
            stayed = [
                runner
                for runner in runners
                if runner.key in before
                and runner.score.status is Status.OK
                and runner.runs.keys() >= set(seeds)
            ]
            if not stayed:
                return lambda runner: True
            effects = {
                seed: statistics.fmean(
                    runner.scores[seed] - before[runner.key].fitness for runner in stayed
                )
                for seed in seeds
            }
            bar = dataclasses.replace(bar, effects=effects)
        return lambda runner: bar.admits(runner.scores)


def complete_scores(runners: Sequence[Runner], seeds: Sequence[int]) -> list[dict[int, float]]:
    """The scores with these seeds of all that have them and were neither stopped nor failed."""
    return [
        {seed: runner.scores[seed] for seed in seeds}
        for runner in runners
        if runner.score.status is Status.OK and runner.runs.keys() >= set(seeds)
    ]


def told(runner: Runner, seeds: Sequence[int], model: SeedModel | None) -> Score:
    """What the search is told: the mean; where seeds are missing, without what the others do."""
    score = runner.score
    if model is None or runner.runs.keys() >= set(seeds):
        return score
    return dataclasses.replace(score, fitness=corrected_mean(runner.scores, model.effects))


def savings_of(place: int, runner: Runner, seeds: Sequence[int]) -> list[Saving]:
    """The runs that the genome at ``place`` did without, of these seeds."""
    first = next(iter(runner.runs.values()))
    return [
        Saving(place, runner.key, task, seed, rule, runs[task].outcome.steps)
        for seed in seeds
        for rule, runs in [("cache", runner.runs[seed]) if seed in runner.runs else ("race", first)]
        for task in runs
    ]
