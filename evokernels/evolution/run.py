"""An evolution run: ask the search, train what the journal lacks, journal it, tell the scores."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.errors import SettingsError
from evokernels.evolution import report
from evokernels.evolution.comparison import Comparison
from evokernels.evolution.devices import find_device
from evokernels.evolution.history import Generation, Result, summarise
from evokernels.evolution.journal import Entry, Journal, open_journal
from evokernels.evolution.pool import Pool, open_pool
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.genome import Genome
from evokernels.search.genetic import GeneticConfig, GeneticSearch, Scored
from evokernels.tasks import get_task

__all__ = ["RunResult", "RunSettings", "evolve"]

OnProgress = Callable[[int, int, str], object]


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All that the history of a run depends on.

    Args:
        search: of the genetic algorithm.
        tasks: names of the tasks that every genome is trained on.
        seeds: of the training runs on each task; the same for every genome.
        conditions: of each training run.
        comparison_seeds: how many seeds the best genome is compared with Adam and AdamW on; they
            follow the largest of ``seeds``, so that selection has seen none of them.
        threads: torch threads of a training run (they decide the last bits of its numbers).
        device: where training runs take place: "cpu", "cuda" or "cuda:N" (it decides them too).

    Raises:
        SettingsError, DatasetError: naming the setting, the value given and the values allowed;
            a device must be there.
    """

    search: GeneticConfig
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    conditions: Conditions
    comparison_seeds: int
    threads: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        find_device(self.device)
        for name, value, least in (
            ("steps", self.conditions.steps, 1),
            ("batch_size", self.conditions.batch_size, 1),
            ("train_samples", self.conditions.train_samples, self.conditions.batch_size),
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
        conditions = Conditions(
            **{f.name: values.pop(f.name) for f in dataclasses.fields(Conditions)}
        )
        tasks, seeds = tuple(values.pop("tasks")), tuple(values.pop("seeds"))
        comparison_seeds, threads = values.pop("comparison_seeds"), values.pop("threads")
        device = values.pop("device", "cpu")
        search = GeneticConfig(seed=values.pop("run_seed"), **values)
        return cls(search, tasks, seeds, conditions, comparison_seeds, threads, device)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the journal keeps it; named like the options of the command line."""
        search = dataclasses.asdict(self.search)
        return {
            "run_seed": search.pop("seed"),
            **search,
            "tasks": self.tasks,
            "seeds": self.seeds,
            **dataclasses.asdict(self.conditions),
            "comparison_seeds": self.comparison_seeds,
            "threads": self.threads,
            "device": self.device,
        }


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
    on_progress: OnProgress = lambda done, expected, note: None,
) -> RunResult:
    """Run the evolution in ``folder``, or what is left of it; bit-identical either way.

    Writes ``history.csv`` and ``best_genome.json`` after every generation and ``evolution.png``
    after the last one.

    Args:
        settings: of the run; those of the journal if the folder has one.
        folder: the run folder, created if it is missing.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        workers: processes that train; the history does not depend on it.
        on_progress: called after every training run with the number of runs in the journal, the
            number expected in the end, and where the evolution stands.

    Raises:
        JournalError: see `evokernels.evolution.journal.open_journal`.
        DatasetError: a data set is missing or has not enough images.
        WorkerError: a worker process died.
    """
    with (
        open_journal(folder, settings.to_dict()) as journal,
        open_pool(
            settings.conditions,
            workers=workers,
            threads=settings.threads,
            device=settings.device,
            data_dir=data_dir,
        ) as pool,
    ):
        return _Run(settings, pathlib.Path(folder), journal, pool, on_progress).complete()


class _Run:
    """The loop and what it works on."""

    def __init__(
        self,
        settings: RunSettings,
        folder: pathlib.Path,
        journal: Journal,
        pool: Pool,
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.journal = journal
        self.pool = pool
        self.on_progress = on_progress
        self.contenders = {"adam": zoo.adam, "adamw": zoo.adamw}

    def complete(self) -> RunResult:
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
            results = [self._result(genome) for genome in genomes]
            state = search.tell(state, [result.score for result in results])
            history.append(summarise(number, results, state.best.score))
            report.write_history(self.folder, history)
            report.write_best_genome(self.folder, state.best.genome)
        report.plot_history(self.folder, history)

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
        self.on_progress(len(self.journal), expected, note)
        for trial, outcome in self.pool.run(origin):
            key, place = origin[trial]
            row_place = None if generation is None else place
            self.journal.add(Entry(generation, row_place, key, trial, outcome))
            self.on_progress(len(self.journal), expected, note)

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
        entry = self.journal.find(canonical_key(trial.optimizer), trial.task, trial.seed)
        assert entry is not None, "only asked for what `_train` has made sure of"
        return entry

    def _outcome(self, trial: Trial) -> Outcome:
        return self._entry(trial).outcome

    def _result(self, genome: Genome) -> Result:
        return Result(
            {
                task: [self._entry(Trial(genome, task, seed)) for seed in self.settings.seeds]
                for task in self.settings.tasks
            }
        )
