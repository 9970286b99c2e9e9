"""Co-evolution as a run: its cost, resuming, who wins, its files; and one that really trains."""

import collections
import concurrent.futures
import csv
import dataclasses
import io
import itertools
import json
import random
import runpy
import sqlite3
import statistics
import sys

import pytest
from report_page import lasting
from synthetic import SyntheticTraining, killed_after

from evokernels import Architecture, Genome, genome, terms, zoo
from evokernels.errors import ArchitectureError, JournalError, SettingsError
from evokernels.evolution import coevolution_pictures, coevolution_report, journal, pool
from evokernels.evolution.coevolution_history import (
    OWN,
    WINNER,
    Population,
    pareto_front,
)
from evokernels.evolution.coevolution_report import FILES
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.coevolving import coevolve
from evokernels.evolution.html_report.page import REPORT
from evokernels.evolution.journal import JOURNAL
from evokernels.evolution.pairs import Measured, Pair, worth
from evokernels.evolution.trial import Conditions, Outcome, Purpose
from evokernels.search.bounded import BoundedSpace
from evokernels.search.coevolution import CoevolutionConfig
from evokernels.search.score import Score, Status
from evokernels.search.spaces import ArchitectureSpace
from evokernels.tasks import cost_of, own_cost

TASKS = ("fashion_mnist_mini", "mnist")
SETTINGS = CoevolutionSettings(
    search=CoevolutionConfig(first=5, second=4, generations=3, seed=4),
    tasks=TASKS,
    seeds=(0,),
    conditions=Conditions(500, 128, 1000, validation_samples=100),
    comparison_seeds=2,
    threads=1,
    finalists=2,
)
PICTURES = ("coevolution.png", "pareto.png")


class PairTraining(SyntheticTraining):
    """Convolutions are worth something up to three of them, on top of what the genome is; on the
    test split twice as much."""

    def __call__(self, trial, conditions, data, device):
        outcome = super().__call__(trial, conditions, data, device)
        if outcome.status.failed or trial.architecture is None:
            return outcome
        convolutions = sum("conv" in name for name in trial.architecture.components)
        gain = 0.02 * min(convolutions, 3) - 0.05
        changes = {"fitness": outcome.fitness + gain, "accuracy": outcome.accuracy + gain}
        if outcome.test_accuracy is not None:
            changes["test_accuracy"] = outcome.test_accuracy + 2 * gain
        return dataclasses.replace(outcome, **changes)


@pytest.fixture
def training(monkeypatch):
    synthetic = PairTraining()
    monkeypatch.setattr(pool, "evaluate", synthetic)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    for plot in ("plot_history", "plot_pareto"):
        monkeypatch.setattr(coevolution_report, plot, lambda *args: None)
    return synthetic


def altered(training, monkeypatch, change):
    """Puts ``change(trial, outcome)`` in place of every outcome."""
    monkeypatch.setattr(
        pool, "evaluate", lambda trial, *args: change(trial, training(trial, *args))
    )


def searching(**changes):
    """The settings with another search."""
    return dataclasses.replace(SETTINGS, search=dataclasses.replace(SETTINGS.search, **changes))


def query(folder, sql):
    with sqlite3.connect(folder / JOURNAL) as connection:
        rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def contents(folder):
    files = {name: (folder / name).read_bytes() for name in FILES if name not in PICTURES}
    return {**files, REPORT: lasting(files[REPORT].decode())}


def failed(trial, outcome):
    return Outcome(Status.DIVERGED, -1.0, None, None, 30, 0.1, "digest")


# What it costs


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        searching(collaborators=1),
        searching(collaborators=3, elites=0),
        searching(first=2, second=1, collaborators=4, elites=0, tournament=1),
        searching(first=1, second=6, generations=1),
        dataclasses.replace(SETTINGS, seeds=(0, 5), tasks=("mnist",), finalists=1),
        dataclasses.replace(SETTINGS, recipes=("adam", "evolved_2025")),
    ],
    ids=lambda settings: " ".join(map(str, dataclasses.astuple(settings.search))),
)
def test_a_run_never_costs_more_than_was_planned(training, tmp_path, settings):
    announced = []
    result = coevolve(settings, tmp_path, on_progress=lambda *now: announced.append(now))
    search = settings.search
    each = len(settings.tasks) * len(settings.seeds)
    bound = search.collaborators * (search.first + search.second)
    assert settings.search_runs == search.generations * bound * each
    for entry in result.history:
        assert entry.pairs <= bound
        assert entry.evaluations + entry.reused == entry.pairs * each
    made = collections.Counter(trial.purpose for trial in training.trials)
    assert made[Purpose.SEARCH] == sum(entry.evaluations for entry in result.history)
    assert made[Purpose.SEARCH] <= settings.search_runs
    assert made[Purpose.AUDIT] <= settings.final_runs
    assert made[Purpose.REPORT] <= settings.comparison_runs
    assert result.evaluations == len(training.trials) <= settings.planned_runs
    expected = [expected for _, expected, _ in announced]
    assert max(expected) <= settings.planned_runs
    assert expected[-1] == announced[-1][0] == len(training.trials)
    assert expected == sorted(expected, reverse=True)


def test_nothing_is_trained_twice(training, tmp_path):
    result = coevolve(SETTINGS, tmp_path)
    made = [(trial.key, trial.task, trial.seed, trial.purpose) for trial in training.trials]
    assert len(set(made)) == len(made)
    assert sum(entry.reused for entry in result.history) > 0  # pairs of elites
    assert len({each.pair.key(TASKS) for each in result.pairs}) == len(result.pairs)
    assert made[0][3] is Purpose.SEARCH
    assert len(result.pairs) * len(TASKS) == sum(entry.evaluations for entry in result.history)


# Resuming


def test_a_run_killed_anywhere_ends_with_the_same_bytes(training, tmp_path):
    settings = dataclasses.replace(
        searching(first=3, second=2, generations=2, elites=1, tournament=2),
        tasks=("mnist",),
        comparison_seeds=1,
    )
    coevolve(settings, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    count = len(training.trials)
    assert len({trial.purpose for trial in training.trials}) == 3
    assert {
        each["generation"] for each in csv.DictReader(io.StringIO(whole["pareto.csv"].decode()))
    } == {"1", "2"}
    rows = "SELECT * FROM candidate"
    for killed in range(count):
        folder = tmp_path / str(killed)
        with killed_after(training, killed):
            coevolve(settings, folder)
        assert coevolve(settings, folder).evaluations == count - killed
        assert contents(folder) == whole
        assert query(folder, rows) == query(tmp_path / "whole", rows)


def test_a_run_killed_again_and_again_loses_nothing(training, tmp_path):
    coevolve(SETTINGS, tmp_path / "whole")
    count = len(training.trials)
    for _ in range(count // 7):
        with killed_after(training, 7):
            coevolve(SETTINGS, tmp_path / "broken")
    coevolve(SETTINGS, tmp_path / "broken")
    assert len(training.trials) == 2 * count
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    again = coevolve(SETTINGS, tmp_path / "broken")
    assert again.evaluations == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_workers_change_nothing(training, tmp_path):
    coevolve(SETTINGS, tmp_path / "one")
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        coevolve(SETTINGS, tmp_path / "three", workers=3, executor=executor)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_a_folder_of_other_settings_is_refused(training, tmp_path):
    coevolve(SETTINGS, tmp_path)
    for other, words in (
        (dataclasses.replace(SETTINGS, penalty=0.5), r"penalty 0.01 \(now 0.5\)"),
        (searching(first=6), r"architectures 5 \(now 6\)"),
    ):
        with pytest.raises(JournalError, match=words):
            coevolve(other, tmp_path)


def test_another_version_of_the_search_is_noticed(training, tmp_path):
    coevolve(SETTINGS, tmp_path)
    other = json.dumps(Architecture(["dense 32"]).to_dict())
    with sqlite3.connect(tmp_path / JOURNAL) as connection:
        connection.execute(
            "UPDATE candidate SET genome = ? WHERE generation = 2 AND place = 4", [other]
        )
    connection.close()
    with pytest.raises(JournalError, match="genome 4 of generation 2 differs"):
        coevolve(SETTINGS, tmp_path)


# The journal


def test_the_journal_has_both_populations_and_what_they_were_worth(training, tmp_path):
    result = coevolve(SETTINGS, tmp_path)
    rows = query(tmp_path, "SELECT generation, place, genome, score FROM candidate ORDER BY 1, 2")
    assert [row[:2] for row in rows] == [(g, place) for g in range(3) for place in range(9)]
    for _, place, text, _ in rows:
        kind = Architecture if place < 5 else Genome
        assert kind.from_json(text).to_dict() == json.loads(text)
    for entry in result.history:
        scores = [row[3] for row in rows if row[0] == entry.number]
        assert entry.architectures.best == max(scores[:5])
        assert entry.optimizers.best == max(scores[5:])
    trained = query(tmp_path, "SELECT genome FROM evaluation WHERE generation IS NOT NULL")
    assert {tuple(sorted(json.loads(text))) for (text,) in trained} == {
        ("architecture", "optimizer")
    }


# Worth, and who wins


def outcome(fitness, status=Status.OK):
    return Outcome(status, fitness, fitness, 1.0, 500, 0.1, "digest")


def test_worth_is_the_mean_of_seeds_then_tasks_less_the_penalty():
    runs = {"a": [outcome(0.9), outcome(0.7)], "b": [outcome(0.5)]}
    score = worth(runs, parameters=500_000, penalty=0.1)
    assert (score.fitness, score.status) == (pytest.approx(0.65 - 0.05), Status.OK)
    runs["b"] = [outcome(-1.0, Status.DIVERGED)]
    score = worth(runs, parameters=0, penalty=0.1)
    assert (score.fitness, score.status) == (pytest.approx(-0.1), Status.DIVERGED)


def test_a_pair_has_the_mean_of_its_networks_parameters():
    pair = Pair(Architecture(["dense 32"]), zoo.adam)
    # 32 units of 784 or of 3072 inputs, 10 classes
    grey, colour = 785 * 32 + 330, 3073 * 32 + 330
    assert pair.parameters("mnist") == grey
    assert pair.mean_parameters(["mnist", "cifar10"]) == (grey + colour) / 2
    runs = {"mnist": [outcome(0.9)], "cifar10": [outcome(0.5)]}
    measured = Measured.of(pair, 3, runs, penalty=1.0)
    assert (measured.fitness, measured.accuracy) == (pytest.approx(0.7), pytest.approx(0.7))
    assert measured.score.fitness == pytest.approx(0.7 - (grey + colour) / 2e6)
    assert Pair(None, zoo.adam).mean_parameters(["mnist", "cifar10"]) == (824_458 + 2_168_554) / 2


def test_a_penalty_makes_networks_smaller(training, tmp_path):
    sizes = {}
    for penalty in (0.0, 2.0):
        settings = dataclasses.replace(SETTINGS, penalty=penalty)
        sizes[penalty] = coevolve(settings, tmp_path / str(penalty)).best.parameters
    assert sizes[2.0] < sizes[0.0] / 2


def test_what_the_journal_says_of_a_pair_is_what_was_measured(training, tmp_path):
    settings = dataclasses.replace(SETTINGS, seeds=(0, 5))
    result = coevolve(settings, tmp_path)
    by_pair = collections.defaultdict(list)
    for trial in training.trials:
        if trial.purpose is Purpose.SEARCH:
            by_pair[trial.architecture, trial.optimizer].append(trial)
    for each in result.pairs:
        trials = by_pair[each.pair.architecture, each.pair.optimizer]
        made = sorted((trial.task, trial.seed) for trial in trials)
        assert made == list(itertools.product(TASKS, settings.seeds))
        runs = [PairTraining()(trial, settings.conditions, None, "cpu") for trial in trials]
        assert each.fitness == pytest.approx(statistics.fmean(run.fitness for run in runs))
    best = max(result.pairs, key=lambda each: each.score.rank)
    assert result.history[-1].best.score == best.score


def test_finalists_are_trained_on_seeds_of_their_own_and_luck_does_not_win(
    training, tmp_path, monkeypatch
):
    lucky = {}

    def change(trial, outcome):
        if trial.purpose is Purpose.SEARCH and not outcome.status.failed:
            lucky.setdefault("pair", (trial.architecture, trial.optimizer))
            if (trial.architecture, trial.optimizer) == lucky["pair"]:
                return dataclasses.replace(outcome, fitness=2.0)
        return (
            dataclasses.replace(outcome, fitness=outcome.fitness - 0.4)
            if ((trial.architecture, trial.optimizer) == lucky["pair"])
            else outcome
        )

    altered(training, monkeypatch, change)
    kept = coevolve(dataclasses.replace(SETTINGS, finalists=1), tmp_path / "kept")
    assert (kept.best.pair.architecture, kept.best.pair.optimizer) == lucky["pair"]
    assert kept.winner.bias.mean > 1.0
    result = coevolve(SETTINGS, tmp_path / "finals")
    assert (result.best.pair.architecture, result.best.pair.optimizer) != lucky["pair"]
    seeds = collections.defaultdict(set)
    for trial in training.trials:
        seeds[trial.purpose].add(trial.seed)
    assert seeds == {
        Purpose.SEARCH: {0},
        Purpose.AUDIT: set(SETTINGS.final_seeds),
        Purpose.REPORT: set(SETTINGS.fresh_seeds),
    }
    assert len(set().union(*seeds.values())) == 1 + 2 + 2


def test_of_finalists_that_are_equally_fit_the_smaller_network_wins(
    training, tmp_path, monkeypatch
):
    met = []  # that hold; the first has the largest network, and luck in the search on top

    def change(trial, outcome):
        if outcome.status.failed:
            return outcome
        pair = Pair(trial.architecture, trial.optimizer)
        met.append(pair)
        lucky = trial.purpose is Purpose.SEARCH and pair == met[0]
        return dataclasses.replace(outcome, fitness=2.0 if lucky else 0.5)

    altered(training, monkeypatch, change)
    best = coevolve(SETTINGS, tmp_path).best
    finalists = {
        Pair(trial.architecture, trial.optimizer)
        for trial in training.trials
        if trial.purpose is Purpose.AUDIT
    }
    assert len(finalists) == SETTINGS.finalists
    assert met[0] in finalists
    assert best.pair == min(finalists, key=lambda pair: pair.mean_parameters(TASKS)) != met[0]


def test_the_winner_is_compared_with_the_tasks_own_networks(training, tmp_path):
    result = coevolve(SETTINGS, tmp_path)
    pairs = result.contenders
    assert pairs[WINNER] == result.best.pair
    assert pairs[OWN] == Pair(None, zoo.evolved_2025)
    assert set(pairs.values()) == set(
        itertools.starmap(
            Pair,
            itertools.product(
                (None, result.best.pair.architecture),
                (zoo.evolved_2025, result.best.pair.optimizer),
            ),
        )
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert len(rows) == 4 * len(TASKS) * 2
    assert {row["parameters"] for row in rows if row["contender"] == OWN} == {"824458"}

    def mean(name, seed):
        return statistics.fmean(
            float(row["fitness"])
            for row in rows
            if (row["contender"], row["seed"]) == (name, str(seed))
        )

    leads = [mean(WINNER, seed) - mean(OWN, seed) for seed in SETTINGS.fresh_seeds]
    assert result.lead.mean == pytest.approx(statistics.fmean(leads))
    assert result.lead.error == pytest.approx(abs(leads[0] - leads[1]) / 2)


def test_a_search_in_which_everything_fails_comes_to_its_end(training, tmp_path, monkeypatch):
    altered(training, monkeypatch, failed)
    result = coevolve(SETTINGS, tmp_path)
    assert result.best.score.status is Status.DIVERGED
    assert all(trial.purpose is not Purpose.AUDIT for trial in training.trials)  # no finalists
    assert all(entry.failed == entry.pairs for entry in result.history)
    assert pareto_front(result.pairs) == []
    coevolution_pictures.plot_pareto(tmp_path / "pareto.png", SETTINGS, result)
    coevolution_pictures.plot_history(tmp_path / "coevolution.png", result.history)
    assert {path.name for path in tmp_path.iterdir()} >= set(PICTURES)
    row = next(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert (row["mean_architecture"], row["failed_optimizers"]) == ("", "4")


def test_recipes_are_the_only_optimizers(training, tmp_path):
    recipes = ("adam", "adamw", "evolved_2025")
    result = coevolve(dataclasses.replace(SETTINGS, recipes=recipes), tmp_path)
    allowed = {zoo.GENOMES[name] for name in recipes}
    assert {trial.optimizer for trial in training.trials} <= allowed
    assert result.best.pair.optimizer in allowed


# Bounds of the networks


def test_a_network_of_the_search_is_within_the_bounds(training, tmp_path):
    settings = dataclasses.replace(SETTINGS, max_parameters=20_000, max_work=0.25)
    coevolve(settings, tmp_path)
    for trial in training.trials:
        if trial.purpose is Purpose.SEARCH:
            cost = cost_of(trial.architecture, trial.task)
            assert cost.parameters <= 20_000
            assert cost.multiply_adds <= 0.25 * own_cost(trial.task).multiply_adds


def test_a_network_is_within_the_bounds_on_every_task():
    settings = dataclasses.replace(
        searching(first=12), tasks=("mnist", "cifar10"), max_parameters=20_000, max_work=0.25
    )
    for architecture in settings.coevolution().start().populations[0]:
        for task in settings.tasks:
            cost = cost_of(architecture, task)
            assert cost.parameters <= 20_000
            assert cost.multiply_adds <= 0.25 * own_cost(task).multiply_adds


def test_what_networks_cost_by_hand():
    small = own_cost("mnist")
    convolutions = 9 * 1 * 32 * 28 * 28 + 9 * 32 * 64 * 14 * 14
    assert small.multiply_adds == convolutions + 64 * 7 * 7 * 256 + 256 * 10
    assert small.parameters == 824_458
    assert cost_of(dataclasses.replace(zoo.small_cnn, max_parameters=824_458), "mnist") == small
    assert own_cost("cifar10").parameters == 2_168_554


def test_the_budget_is_that_of_the_smallest_own_network():
    def budget(*tasks, **changes):
        return dataclasses.replace(SETTINGS, tasks=tasks, **changes).budget

    assert budget("fashion_mnist") == budget("cifar10", "mnist") == 824_458
    assert budget("cifar10") == 2_168_554
    assert budget("cifar10", max_parameters=5_000) == 5_000


def test_a_bounded_space_draws_again_or_stays():
    space = BoundedSpace(ArchitectureSpace(max_length=8), lambda each: "relu" in each.components)
    rng = random.Random(1)
    individuals = list(space.start(20, rng))
    for _ in range(100):
        child = space.crossover(*rng.sample(individuals, 2), rng)
        individuals.append(space.mutate(child, rng, progress=0.5))
    assert all("relu" in each.components for each in individuals)
    assert len(set(individuals)) > 60
    only = BoundedSpace(ArchitectureSpace(), lambda each: each == individuals[0])
    assert only.mutate(individuals[0], rng, 0.0) == individuals[0]
    with pytest.raises(SettingsError, match="within the bounds, and 20 are needed"):
        BoundedSpace(ArchitectureSpace(), lambda each: False).start(20, rng)


# Settings


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"penalty": -0.1}, SettingsError, "penalty must be a number of at least 0, got -0.1"),
        ({"penalty": float("nan")}, SettingsError, "penalty must be a number of at least 0"),
        ({"max_work": float("inf")}, SettingsError, "max_work must be a number of at least 0"),
        ({"max_length": 25}, SettingsError, "max_length must be from 1 to 24, got 25"),
        ({"max_terms": 0}, SettingsError, "max_terms must be at least 1, got 0"),
        ({"max_parameters": 999}, ArchitectureError, "at least 1,000, got 999"),
        ({"recipes": ("adam", "adm")}, SettingsError, "unknown recipe 'adm'; use one or more of"),
        ({"recipes": ("adam", "adam")}, SettingsError, "recipes must be different, got adam adam"),
        ({"tasks": ("mnist", "text")}, ArchitectureError, "'text' has no images"),
        ({"seeds": ()}, SettingsError, "seeds must be one or more different values, got none"),
        ({"finalists": 0}, SettingsError, "finalists must be at least 1, got 0"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_settings_survive_the_journal():
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, recipes=("adam",), max_work=0.5)):
        flat = json.loads(json.dumps(settings.to_dict()))
        assert CoevolutionSettings.from_dict(flat) == settings
    assert (flat["architectures"], flat["optimizers"], flat["run_seed"]) == (5, 4, 4)
    assert "first" not in flat


# History and Pareto front


def test_a_population_is_told_by_those_that_held():
    lost = Score(-1.0, Status.DIVERGED)
    assert Population.of([Score(0.5), lost, Score(0.7)]) == Population(0.7, pytest.approx(0.6), 1)
    assert Population.of([lost, lost]) == Population(-1.0, None, 2)


def test_the_pareto_front_has_whom_nobody_surpasses():
    rng = random.Random(3)

    def measured(number):
        accuracy = rng.choice((None, *(rng.randrange(12) / 12 for _ in range(9))))
        status = rng.choice((Status.OK, Status.OK, Status.STOPPED, Status.DIVERGED))
        pair = Pair(Architecture(["dense 32"] * (number % 20)), zoo.adam)
        size = rng.randrange(1, 12)
        return Measured(pair, number, size, accuracy or -1.0, accuracy, Score(0.0, status))

    for count in range(60):
        pairs = [measured(number) for number in range(count)]
        sound = [
            each
            for each in pairs
            if each.accuracy is not None and each.score.status is not Status.DIVERGED
        ]

        def surpassed(each, sound=sound):
            return any(
                (other.parameters, -other.accuracy) != (each.parameters, -each.accuracy)
                and other.parameters <= each.parameters
                and other.accuracy >= each.accuracy
                for other in sound
            )

        points = {(each.parameters, each.accuracy) for each in sound if not surpassed(each)}
        front = pareto_front(pairs)
        assert [(each.parameters, each.accuracy) for each in front] == sorted(points)


def test_the_tables_say_what_the_result_says(training, tmp_path):
    result = coevolve(SETTINGS, tmp_path)
    tables = {
        name: list(csv.DictReader(io.StringIO((tmp_path / f"{name}.csv").read_text())))
        for name in ("history", "pareto", "winner")
    }
    assert [row["generation"] for row in tables["history"]] == ["1", "2", "3"]
    last = tables["history"][-1]
    assert float(last["best_pair"]) == result.history[-1].best.score.fitness
    best = [float(row["best_pair"]) for row in tables["history"]]
    assert best == sorted(best)
    assert len(tables["pareto"]) == len(result.pairs)
    front = [row["front"] == "yes" for row in tables["pareto"]]
    assert list(itertools.compress(result.pairs, front)) == sorted(
        pareto_front(result.pairs), key=result.pairs.index
    )
    assert tables["winner"][0]["protocol"] == "own"
    assert float(tables["winner"][0]["selected_fitness"]) == result.best.fitness
    assert Architecture.load(tmp_path / "best_architecture.json") == result.best.pair.architecture
    assert Genome.load(tmp_path / "best_genome.json") == result.best.pair.optimizer


# For real


def test_a_small_run_trains_and_its_script_trains_the_best_pair(tmp_path, capsys, monkeypatch):
    settings = dataclasses.replace(
        SETTINGS,
        search=CoevolutionConfig(first=3, second=2, generations=2, elites=1, tournament=2),
        tasks=("fashion_mnist_mini",),
        conditions=Conditions(6, 32, 128, validation_samples=64, hurdle=True),
        comparison_seeds=1,
        max_parameters=20_000,
    )
    result = coevolve(settings, tmp_path)
    assert result.evaluations <= settings.planned_runs
    assert {path.name for path in tmp_path.iterdir()} >= set(FILES)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    first = contents(tmp_path)
    assert coevolve(settings, tmp_path).evaluations == 0
    assert contents(tmp_path) == first

    script = str(tmp_path / "train_best.py")
    monkeypatch.setattr(sys, "argv", [script, "3"])
    runpy.run_path(script)
    assert capsys.readouterr().out.startswith("3 steps: test accuracy 0.")
    monkeypatch.setattr(sys, "argv", [script])
    made = runpy.run_path(script)
    printed = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in made["model"].parameters())
    assert parameters == result.best.parameters
    assert made["genome"] == result.best.pair.optimizer
    train = pool.Evaluation(settings.conditions, settings.threads, "cpu", data_dir=None)
    alike = train(result.best.pair.trial(*settings.tasks, seed=0, purpose=Purpose.REPORT))
    accuracy = float(printed.removeprefix("6 steps: test accuracy "))
    assert accuracy == pytest.approx(alike.test_accuracy, abs=0.005)

    monkeypatch.setattr(genome, "_own_terms", {})  # a winner of terms that the script registers
    own = Genome([genome.add_own_term("OWN", terms.average(terms.g, 0.5))])
    coevolution_report.write_progress(
        tmp_path, result.history, Pair(result.best.pair.architecture, own)
    )
    (tmp_path / "train_best.py").write_text(coevolution_report.training_script(settings, own))
    genome._own_terms.clear()
    assert runpy.run_path(script)["genome"] == own


def test_the_script_trains_the_first_of_several_tasks(training, tmp_path):
    coevolve(SETTINGS, tmp_path)
    assert f"get_task({TASKS[0]!r})" in (tmp_path / "train_best.py").read_text()
