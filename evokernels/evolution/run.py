"""An evolution run: ask the search, train what the journal lacks, journal it, tell the scores."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.comparison import Comparison
from evokernels.evolution.evaluator import Budget, Outcome, Trial
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.journal import Entry, Journal, open_journal
from evokernels.evolution.pool import Pool, open_pool
from evokernels.genome import Genome
from evokernels.search.genetic import GeneticConfig, GeneticSearch, Scored, SettingsError
from evokernels.search.score import Score, Status
from evokernels.tasks import get_task

__all__ = ["Generation", "Progress", "RunResult", "RunSettings", "evolve"]


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All that the history of a run depends on.

    Args:
        search: of the genetic algorithm.
        tasks: names of the tasks that every genome is trained on.
        seeds: of the training runs on each task; the same for every genome.
        budget: of each training run.
        comparison_seeds: how many seeds the best genome is compared with Adam and AdamW on; they
            follow the largest of ``seeds``, so that selection has seen none of them.
        threads: torch threads of a training run (they decide the last bits of its numbers).

    Raises:
        SettingsError, DatasetError: naming the setting, the value given and the values allowed.
    """

    search: GeneticConfig
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    comparison_seeds: int
    threads: int

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        for name, value, least in (
            ("steps", self.budget.steps, 1),
            ("batch_size", self.budget.batch_size, 1),
            ("train_samples", self.budget.train_samples, self.budget.batch_size),
            ("comparison_seeds", self.comparison_seeds, 1),
            ("threads", self.threads, 1),
            *(("seeds", seed, 0) for seed in self.seeds),
        ):
            if value is not None and value < least:
                raise SettingsError(f"{name} must be at least {least}, got {value}")
        for name, values in (("tasks", self.tasks), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                listed = " ".join(map(str, values)) or "none"
                raise SettingsError(f"{name} must be one or more different values, got {listed}")

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """The seeds of the final comparison."""
        first = max(self.seeds) + 1
        return tuple(range(first, first + self.comparison_seeds))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunSettings:
        """The inverse of `to_dict`; lists do for tuples."""
        values = dict(settings)
        budget = Budget(**{f.name: values.pop(f.name) for f in dataclasses.fields(Budget)})
        tasks, seeds = tuple(values.pop("tasks")), tuple(values.pop("seeds"))
        comparison_seeds, threads = values.pop("comparison_seeds"), values.pop("threads")
        search = GeneticConfig(seed=values.pop("run_seed"), **values)
        return cls(search, tasks, seeds, budget, comparison_seeds, threads)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the journal keeps it; named like the options of the command line."""
        search = dataclasses.asdict(self.search)
        return {
            "run_seed": search.pop("seed"),
            **search,
            "tasks": self.tasks,
            "seeds": self.seeds,
            **dataclasses.asdict(self.budget),
            "comparison_seeds": self.comparison_seeds,
            "threads": self.threads,
        }


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one generation came to; nothing in it depends on time or on an interruption.

    Attributes:
        number: counted from 0.
        best: the highest fitness; a genome that diverged in any run comes after all others.
        mean: of the fitness of all genomes, diverged runs counted at -1.
        best_so_far: the highest fitness of this and all earlier generations.
        best_accuracy: of the best genome, mean over its runs; None if it diverged in any.
        task_best: the highest fitness on each task, reached by any genome.
        task_mean: the mean fitness of all genomes on each task.
        evaluations: training runs that this generation needed.
        reused: training runs that it shares with genomes before.
        diverged: genomes that diverged in at least one run.
    """

    number: int
    best: float
    mean: float
    best_so_far: float
    best_accuracy: float | None
    task_best: Mapping[str, float]
    task_mean: Mapping[str, float]
    evaluations: int
    reused: int
    diverged: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """Training runs in the journal, training runs expected at the end, and where the run stands."""

    done: int
    expected: int
    note: str


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A complete run.

    Attributes:
        best: the best genome of all generations, with the score that selected it.
        history: one entry a generation.
        comparison: the best genome ("evolved") with Adam and AdamW, on fresh seeds.
        evaluations: training runs that this call made; 0 if the run was complete before.
    """

    best: Scored
    history: tuple[Generation, ...]
    comparison: Comparison
    evaluations: int


def evolve(
    settings: RunSettings,
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    workers: int = 1,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    on_generation: Callable[[Scored, Sequence[Generation]], object] = lambda best, history: None,
) -> RunResult:
    """Run the evolution in ``folder``, or what is left of it; bit-identical either way.

    Args:
        settings: of the run; those of the journal if the folder has one.
        folder: the run folder, created if it is missing.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        workers: processes that train; the history does not depend on it.
        on_progress: called after every training run.
        on_generation: called after every generation, with the best genome and the history so far.

    Raises:
        JournalError: see `evokernels.evolution.journal.open_journal`.
        DatasetError: a data set is missing or has not enough images.
        WorkerError: a worker process died.
    """
    with (
        open_journal(folder, settings.to_dict()) as journal,
        open_pool(
            settings.budget, workers=workers, threads=settings.threads, data_dir=data_dir
        ) as pool,
    ):
        return _Run(settings, journal, pool, on_progress).complete(on_generation)


class _Run:
    """The loop and what it works on."""

    def __init__(
        self,
        settings: RunSettings,
        journal: Journal,
        pool: Pool,
        on_progress: Callable[[Progress], object],
    ) -> None:
        self.settings = settings
        self.journal = journal
        self.pool = pool
        self.on_progress = on_progress
        self.contenders = {"adam": zoo.adam, "adamw": zoo.adamw}

    def complete(
        self, on_generation: Callable[[Scored, Sequence[Generation]], object]
    ) -> RunResult:
        """Everything from the first generation on, whatever the journal already has."""
        before = len(self.journal)
        search = GeneticSearch(self.settings.search)
        state = search.start()
        history: list[Generation] = []
        while genomes := search.ask(state):
            number = state.generation
            self.journal.check_replay(number, genomes)
            note = f"generation {number + 1}/{self.settings.search.generations}"
            if state.best is not None:
                note += f", best {state.best.score.fitness:.4f}"
            self._train(genomes, self.settings.seeds, number, note)
            results = [self._results(genome) for genome in genomes]
            scores = [_score(result) for result in results]
            state = search.tell(state, scores)
            best_so_far = state.best.score.fitness
            history.append(self._summary(number, genomes, results, scores, best_so_far))
            on_generation(state.best, history)

        optimizers = {"evolved": state.best.genome, **self.contenders}
        fresh = self.settings.fresh_seeds
        self._train(tuple(optimizers.values()), fresh, None, "comparison on fresh seeds")
        comparison = Comparison.of(optimizers, self.settings.tasks, fresh, self._outcome)
        return RunResult(state.best, tuple(history), comparison, len(self.journal) - before)

    def _train(
        self,
        genomes: Sequence[Genome],
        seeds: Sequence[int],
        generation: int | None,
        note: str,
    ) -> None:
        """Evaluate what the journal lacks of these genomes; ``generation`` None: the comparison.

        Of genomes that are one optimizer the first is trained. It is chosen here, before anything
        runs, so that the history does not depend on which evaluation ends first.
        """
        missing: dict[tuple[str, str, int], tuple[int, Trial]] = {}
        for place, genome in enumerate(genomes):
            key = canonical_key(genome)
            for task in self.settings.tasks:
                for seed in seeds:
                    if self.journal.find(key, task, seed) is None:
                        trial = Trial(genome, task, seed)
                        missing.setdefault((key, task, seed), (place, trial))
        if not missing:
            return
        origin = {trial: (key, place) for (key, _, _), (place, trial) in missing.items()}
        expected = len(self.journal) + len(missing) + self._still_to_come(generation)
        self.on_progress(Progress(len(self.journal), expected, note))
        for trial, outcome in self.pool.run(origin):
            key, place = origin[trial]
            row_place = None if generation is None else place
            self.journal.add(Entry(generation, row_place, key, trial, outcome))
            self.on_progress(Progress(len(self.journal), expected, note))

    def _still_to_come(self, generation: int | None) -> int:
        """Training runs after ``generation``, if no two children are one optimizer."""
        if generation is None:
            return 0
        search = self.settings.search
        children = (search.generations - 1 - generation) * (search.population - search.elites)
        compared = 1 + len(self.contenders)
        runs = children * len(self.settings.seeds) + compared * self.settings.comparison_seeds
        return runs * len(self.settings.tasks)

    def _entry(self, trial: Trial) -> Entry:
        entry = self.journal.find(canonical_key(trial.genome), trial.task, trial.seed)
        assert entry is not None, "only asked for what `_train` has made sure of"
        return entry

    def _outcome(self, trial: Trial) -> Outcome:
        return self._entry(trial).outcome

    def _results(self, genome: Genome) -> dict[str, list[Entry]]:
        """The journal's entries of a genome: for each task, one for each seed."""
        return {
            task: [self._entry(Trial(genome, task, seed)) for seed in self.settings.seeds]
            for task in self.settings.tasks
        }

    def _summary(
        self,
        number: int,
        genomes: Sequence[Genome],
        results: Sequence[Mapping[str, Sequence[Entry]]],
        scores: Sequence[Score],
        best_so_far: float,
    ) -> Generation:
        champion = max(range(len(genomes)), key=lambda place: scores[place].rank)
        accuracies = [entry.outcome.accuracy for entry in _entries(results[champion])]
        task_fitness = {
            task: [_fitness(result[task]) for result in results] for task in self.settings.tasks
        }
        entries = [entry for result in results for entry in _entries(result)]
        trained = {entry for entry in entries if entry.generation == number}
        return Generation(
            number=number,
            best=scores[champion].fitness,
            mean=statistics.fmean(score.fitness for score in scores),
            best_so_far=best_so_far,
            best_accuracy=None if None in accuracies else statistics.fmean(accuracies),
            task_best={task: max(values) for task, values in task_fitness.items()},
            task_mean={task: statistics.fmean(values) for task, values in task_fitness.items()},
            evaluations=len(trained),
            reused=len(entries) - len(trained),
            diverged=sum(score.status is Status.DIVERGED for score in scores),
        )


def _entries(result: Mapping[str, Sequence[Entry]]) -> list[Entry]:
    return [entry for entries in result.values() for entry in entries]


def _fitness(entries: Sequence[Entry]) -> float:
    return statistics.fmean(entry.outcome.fitness for entry in entries)


def _score(result: Mapping[str, Sequence[Entry]]) -> Score:
    return genome_score(
        {
            task: [(entry.outcome.fitness, entry.outcome.status) for entry in entries]
            for task, entries in result.items()
        }
    )
