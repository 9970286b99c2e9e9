"""Co-evolution as a run: ask for pairs, train what the journal lacks, tell what they are worth.

How an architecture and an optimizer are scored together and apart is said in
`evokernels.search.coevolution`, what a run costs at most in `CoevolutionSettings`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Sequence

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.evolution import coevolution_report as report
from evokernels.evolution.coevolution_history import (
    OWN,
    WINNER,
    CoevolutionResult,
    Population,
    Round,
    scalars,
)
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.comparison import Comparison, Row
from evokernels.evolution.evaluations import (
    Evaluations,
    OnGeneration,
    OnProgress,
    Request,
    open_evaluations,
)
from evokernels.evolution.html_report.coevolution import running_page, write_coevolution_report
from evokernels.evolution.html_report.running import RunningReport
from evokernels.evolution.lineage import Lineage
from evokernels.evolution.pairs import Measured, Pair, worth
from evokernels.evolution.trial import Outcome, Purpose, Trial, network_key
from evokernels.evolution.winner import final_runs, measure_winner
from evokernels.search.coevolution import State
from evokernels.search.genetic import Scored
from evokernels.search.score import Score

__all__ = ["coevolve"]


def coevolve(
    settings: CoevolutionSettings,
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    executor: concurrent.futures.Executor | None = None,
    on_progress: OnProgress = lambda done, expected, note: None,
    on_generation: OnGeneration = lambda number, scalars: None,
) -> CoevolutionResult:
    """Run the co-evolution in ``folder``, or what is left of it; bit-identical either way.

    Makes at most ``settings.planned_runs`` training runs. Writes ``history.csv`` and the best pair
    after every generation that it trains, a ``report.html`` after the first of them and as often as
    `RunningReport` has it, and the whole report and the rest of
    `evokernels.evolution.coevolution_report.FILES` at the end.

    Args:
        settings: of the run.
        folder: the run folder.
        data_dir: folder with data sets, or None (see `evokernels.tasks.load_images`).
        workers: processes that train; the history does not depend on it.
        time_limit: see `evokernels.evolution.pool.open_pool`.
        executor: likewise.
        on_progress: called after every training run with the number of runs in the journal, the
            number expected in the end, at most, and where the co-evolution stands.
        on_generation: called after every generation, also one that is replayed, with its number,
            counted from 1, and what one watches of it, by name
            (`evokernels.evolution.coevolution_history.scalars`).

    Raises:
        JournalError: see `evokernels.evolution.journal.open_journal`.
        SettingsError: hardly any architecture is within the bounds of the settings.
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
        run = _Run(settings, pathlib.Path(folder), evaluations, on_generation)
        return run.complete()


class _Run:
    """The loop and what it works on."""

    def __init__(
        self,
        settings: CoevolutionSettings,
        folder: pathlib.Path,
        evaluations: Evaluations,
        on_generation: OnGeneration,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.evaluations = evaluations
        self.on_generation = on_generation
        self.measured: dict[tuple[str, ...], Measured] = {}  # by the key of the pair
        self.lineages = Lineage(), Lineage()  # of architectures, of optimizers
        self.running = RunningReport(folder, settings.search.generations)
        self.trained: set[tuple[str, str, int]] = set()  # key, task and seed of the search's runs

    def complete(self) -> CoevolutionResult:
        """Everything from the first generation on, whatever the journal already has."""
        journal, settings = self.evaluations.journal, self.settings
        before = len(journal)
        history = self._search()
        best = self._choose(history[-1].best)
        report.write_progress(self.folder, history, best.pair)
        contenders = _contenders(best.pair)
        comparison = self._compare(contenders)
        winner = measure_winner(settings, self.evaluations, best.fitness, best.pair.trial)
        result = CoevolutionResult(
            best,
            tuple(history),
            tuple(self.measured.values()),
            contenders,
            comparison,
            winner,
            len(journal) - before,
        )
        report.write_result(self.folder, settings, result)
        write_coevolution_report(self.folder, settings, result, self.lineages, journal)
        return result

    def _search(self) -> list[Round]:
        """The search to its end."""
        before = len(self.evaluations.journal)
        search = self.settings.coevolution()
        state = search.start()
        history: list[Round] = []
        while asked := search.ask(state):
            self._begin(state)
            _, optimizers = state.populations
            pairs = [Pair(*pair) for pair in asked]
            evaluations = self._train(pairs, state, history)
            results = [self._measure(pair, state.generation) for pair in pairs]
            asking, state = state, search.tell(state, [result.score for result in results])
            self._end(state)
            self._remember(asking, state)
            history.append(self._round(results, evaluations, state))
            self.on_generation(len(history), scalars(history[-1], optimizers))
            if len(self.evaluations.journal) > before:  # a replay is behind the files that it finds
                report.write_progress(self.folder, history, history[-1].best.pair)
                page = functools.partial(
                    running_page,
                    *(self.settings, history, tuple(self.measured.values()), self.lineages),
                    self.evaluations.journal,
                )
                self.running.show(len(history), page)
        return history

    def _begin(self, state: State) -> None:
        """Record both populations, architectures first."""
        architectures, optimizers = state.populations
        self.evaluations.journal.begin_generation(
            state.generation,
            [(network_key(each, self.settings.tasks), each) for each in architectures]
            + [(canonical_key(each), each) for each in optimizers],
        )

    def _end(self, state: State) -> None:
        """Record what the individuals of the generation before ``state`` were worth."""
        architectures, optimizers = state.scored
        scores = [*architectures, *optimizers]
        self.evaluations.journal.end_generation(state.generation - 1, scores, savings=())

    def _remember(self, asked: State, told: State) -> None:
        """Who was in both populations of ``asked``, and what each was worth as ``told``."""
        for lineage, population, scores, parents in zip(
            self.lineages, asked.populations, told.scored, asked.parents, strict=True
        ):
            lineage.add(list(map(Scored, population, scores)), parents)

    def _train(self, pairs: Sequence[Pair], state: State, history: Sequence[Round]) -> int:
        """Train the pairs that were not yet; the number of training runs that takes."""
        settings, number = self.settings, state.generation
        requests = []
        for place, pair in enumerate(pairs):
            for trial in self._trials(pair):
                identity = trial.key, trial.task, trial.seed
                if identity not in self.trained:
                    self.trained.add(identity)
                    requests.append(Request(trial, trial.key, number, place))
        generations = settings.search.generations
        note = f"generation {number + 1}/{generations}"
        if history:
            note += f", best {history[-1].best.score.fitness:.4f}"
        to_come = settings.search_runs * (generations - 1 - number) // generations
        to_come += settings.final_runs + settings.comparison_runs
        self.evaluations.make(requests, to_come, note)
        return len(requests)

    def _trials(self, pair: Pair) -> list[Trial]:
        settings = self.settings
        return [pair.trial(task, seed) for task in settings.tasks for seed in settings.seeds]

    def _measure(self, pair: Pair, generation: int) -> Measured:
        """What came of a pair that was trained."""
        settings = self.settings
        key = pair.key(settings.tasks)
        if key not in self.measured:
            runs: dict[str, list[Outcome]] = {task: [] for task in settings.tasks}
            for trial in self._trials(pair):
                runs[trial.task].append(self.evaluations.outcome(trial))
            self.measured[key] = Measured.of(pair, generation, runs, settings.penalty)
        return self.measured[key]

    def _round(self, results: Sequence[Measured], evaluations: int, state: State) -> Round:
        """What the generation before ``state`` came to."""
        architectures, optimizers = map(Population.of, state.scored)
        needed = len(results) * len(self.settings.tasks) * len(self.settings.seeds)
        return Round(
            state.generation - 1,
            architectures,
            optimizers,
            self.measured[Pair(*state.best.pair).key(self.settings.tasks)],
            len(results),
            evaluations,
            needed - evaluations,
            sum(result.score.status.failed for result in results),
        )

    def _choose(self, best: Measured) -> Measured:
        """The finalist that is worth most on the final seeds.

        Finalists are the best pairs of the whole search; one that failed is none, unless it is the
        best.
        """
        settings = self.settings
        ranked = sorted(self.measured.values(), key=lambda each: each.score.rank, reverse=True)
        sound = [each for each in ranked if not each.score.status.failed and each is not best]
        finalists = [best, *sound][: settings.finalists]
        if len(finalists) == 1:
            return best
        trials = [each.pair.trial for each in finalists]
        runs = final_runs(settings, self.evaluations, trials, settings.comparison_runs)

        def final_score(place: int) -> Score:
            return worth(runs[place], finalists[place].parameters, settings.penalty)

        # of equals the one that the search ranks higher
        return finalists[max(range(len(finalists)), key=lambda place: final_score(place).rank)]

    def _compare(self, contenders: dict[str, Pair]) -> Comparison:
        """On seeds that neither search nor final has seen."""
        trials = [
            (name, pair.trial(task, seed, Purpose.REPORT))
            for name, pair in contenders.items()
            for task in self.settings.tasks
            for seed in self.settings.fresh_seeds
        ]
        requests = [Request.after_search(trial) for _, trial in trials]
        self.evaluations.make(requests, 0, "comparison on fresh seeds")
        return Comparison([Row(*entry, self.evaluations.outcome(entry[1])) for entry in trials])


def _contenders(winner: Pair) -> dict[str, Pair]:
    """The winner, what it has to beat, and each network with the other's optimizer."""
    return {
        WINNER: winner,
        "co-evolved network, evolved_2025": Pair(winner.architecture, zoo.evolved_2025),
        "own network, co-evolved optimizer": Pair(None, winner.optimizer),
        OWN: Pair(None, zoo.evolved_2025),
    }
