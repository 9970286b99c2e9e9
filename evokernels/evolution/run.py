"""An evolution run: ask the search, train what the journal lacks, journal it, tell the scores."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import pathlib

from evokernels import zoo
from evokernels.evolution import report
from evokernels.evolution.audit import Audit, audit
from evokernels.evolution.comparison import Comparison
from evokernels.evolution.evaluations import (
    Evaluations,
    OnGeneration,
    OnProgress,
    Request,
    open_evaluations,
)
from evokernels.evolution.history import Generation, plateaued, scalars, summarise
from evokernels.evolution.html_report.run import running_page, write_run_report
from evokernels.evolution.html_report.running import RunningReport
from evokernels.evolution.ledger import Cost, read_ledger
from evokernels.evolution.lineage import Lineage
from evokernels.evolution.refining import Refiner
from evokernels.evolution.rounds import Rounds
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.winner import Winner, choose_winner, measure_winner, trials_of
from evokernels.search.genetic import GeneticSearch, Scored, State

__all__ = ["RunResult", "evolve"]

CONTENDERS = {"adam": zoo.adam, "adamw": zoo.adamw}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A complete run.

    Attributes:
        best: the winner, with the score that the search was told.
        history: one entry a generation.
        comparison: the winner ("evolved") with Adam and AdamW, on fresh seeds.
        winner: how the winner does there, beside the score that selected it.
        ledger: what the run cost, and what each rule saved.
        audit: of the genomes that were stopped early; None if none was asked for.
        evaluations: training runs that this call made; 0 if the run was complete before.
    """

    best: Scored
    history: tuple[Generation, ...]
    comparison: Comparison
    winner: Winner
    ledger: tuple[Cost, ...]
    audit: Audit | None
    evaluations: int


def evolve(
    settings: RunSettings,
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    executor: concurrent.futures.Executor | None = None,
    audits: int = 0,
    on_progress: OnProgress = lambda done, expected, note: None,
    on_generation: OnGeneration = lambda number, scalars: None,
) -> RunResult:
    """Run the evolution in ``folder``, or what is left of it; bit-identical either way.

    Writes ``history.csv`` and ``best_genome.json`` after every generation that it trains, a
    ``report.html`` after the first of them and as often as `RunningReport` has it, and the whole
    report and the rest of `evokernels.evolution.report.FILES` at the end.

    Args:
        settings: of the run.
        folder: the run folder.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        workers: processes that train; the history does not depend on it.
        time_limit: see `evokernels.evolution.pool.open_pool`.
        executor: likewise.
        audits: how many of the genomes that hurdle and race stopped are trained to the end after
            the search, to see whether that was right (`evokernels.evolution.audit`).
        on_progress: called after every training run with the number of runs in the journal, the
            number expected in the end, and where the evolution stands.
        on_generation: called after every generation, also one that is replayed, with its number,
            counted from 1, and what one watches of it, by name
            (`evokernels.evolution.history.scalars`).

    Raises:
        JournalError: see `evokernels.evolution.journal.open_journal`.
        DatasetError: a data set is missing or has not enough images.
        WorkerError: the workers fail, not single evaluations (`Pool.run`).
    """
    with open_evaluations(
        folder,
        settings.to_dict(),
        settings.conditions,
        on_progress,
        data_dir=data_dir,
        workers=workers,
        time_limit=time_limit,
        executor=executor,
    ) as evaluations:
        run = _Run(settings, pathlib.Path(folder), evaluations, audits, on_generation)
        return run.complete()


class _Run:
    """The loop and what it works on."""

    def __init__(
        self,
        settings: RunSettings,
        folder: pathlib.Path,
        evaluations: Evaluations,
        audits: int,
        on_generation: OnGeneration,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.evaluations = evaluations
        self.audits = audits
        self.on_generation = on_generation
        self.lineage = Lineage()
        self.running = RunningReport(folder, settings.search.generations)

    def complete(self) -> RunResult:
        """Everything from the first generation on, whatever the journal already has."""
        journal = self.evaluations.journal
        before = len(journal)
        state, last, history = self._search()
        self._write_progress(history, state.best)
        report.plot_history(self.folder, history)
        best = choose_winner(
            self.settings,
            self.evaluations,
            state.best,
            last,
            self._reports() + self._audits(),
        )
        report.write_best_genome(self.folder, best.genome)
        comparison = self._compare(best)
        winner = measure_winner(
            self.settings, self.evaluations, best.score.fitness, trials_of(best.genome)
        )
        report.write_winner(self.folder, winner, self.settings)
        audited = audit(self.settings, self.evaluations, self.audits, 0)
        if audited is not None:
            report.write_audit(self.folder, audited)
        ledger = read_ledger(journal)
        report.write_ledger(self.folder, ledger)
        made = len(journal) - before
        result = RunResult(best, tuple(history), comparison, winner, ledger, audited, made)
        write_run_report(self.folder, self.settings, result, self.lineage, journal)
        return result

    def _search(self) -> tuple[State, list[Scored], list[Generation]]:
        """The search to its end: its last state, its last generation, its history."""
        before = len(self.evaluations.journal)
        search = GeneticSearch(self.settings.search)
        rounds = Rounds(self.settings, self.evaluations)
        refiner = Refiner(self.settings, rounds)
        state = search.start()
        history: list[Generation] = []
        scored: list[Scored] = []
        while genomes := search.ask(state):
            number = state.generation
            note = f"generation {number + 1}/{self.settings.search.generations}"
            if state.best is not None:
                note += f", best {state.best.score.fitness:.4f}"
            to_come = self._still_to_come(number)
            results = rounds.run(number, genomes, to_come + refiner.still_to_come(number), note)
            to_come += refiner.still_to_come(number + 1)
            refined = refiner.run(number, genomes, results, to_come, f"{note}, refining")
            scores = [result.score for result in results]
            asked = list(map(Scored, genomes, scores))
            better = [improvement.scored for improvement in refined.better]
            scored = asked + better
            self.lineage.add(asked, state.parents, refined.better)
            joined = search.join(state, [entry.genome for entry in better])
            state = search.tell(joined, [entry.score for entry in scored])
            refining = refined.runs if self.settings.refine else None
            history.append(summarise(number, results, state.best.score, refining))
            self.on_generation(number + 1, scalars(history[-1], genomes))
            if len(self.evaluations.journal) > before:  # a replay is behind the files that it finds
                self._write_progress(history, state.best)
                page = functools.partial(
                    running_page,
                    *(self.settings, history, state.best, self.lineage, self.evaluations.journal),
                )
                self.running.show(number + 1, page)
            if plateaued(history, self.settings.plateau):
                break
        return state, scored, history

    def _write_progress(self, history: list[Generation], best: Scored) -> None:
        report.write_history(self.folder, history)
        report.write_best_genome(self.folder, best.genome)

    def _compare(self, best: Scored) -> Comparison:
        """The winner and others on seeds that neither search nor final has seen."""
        optimizers = {"evolved": best.genome, **CONTENDERS}
        tasks, seeds = self.settings.tasks, self.settings.fresh_seeds
        trials = Comparison.trials(optimizers.values(), tasks, seeds)
        requests = map(Request.after_search, trials)
        self.evaluations.make(requests, self._audits(), "comparison on fresh seeds")
        return Comparison.of(optimizers, tasks, seeds, self.evaluations.outcome)

    def _still_to_come(self, generation: int) -> int:
        """Training runs after ``generation``, if no two children are one optimizer and none is
        raced out, those of refining apart."""
        search = self.settings.search
        elites = 0 if self.settings.rotate_seeds else search.elites
        children = (search.generations - 1 - generation) * (search.population - elites)
        runs = children * len(self.settings.seeds)
        if self.settings.finalists > 1:
            runs += self.settings.finalists * self.settings.comparison_seeds
        return runs * len(self.settings.tasks) + self._reports() + self._audits()

    def _reports(self) -> int:
        """Training runs of the comparison."""
        optimizers = 1 + len(CONTENDERS)
        return optimizers * self.settings.comparison_seeds * len(self.settings.tasks)

    def _audits(self) -> int:
        """Training runs of the audit, at most."""
        return self.audits * len(self.settings.seeds) * len(self.settings.tasks)
