"""Which genome a run ends with, how honest its fitness is, and what ends a run early."""

import collections
import csv
import dataclasses
import itertools
import sqlite3
import statistics

import pytest
from synthetic import SyntheticTraining, killed_after

from evokernels.compiler.canonical import canonical_key
from evokernels.errors import SettingsError
from evokernels.evolution import journal, pool, report
from evokernels.evolution.comparison import Estimate
from evokernels.evolution.history import plateaued
from evokernels.evolution.journal import JOURNAL
from evokernels.evolution.ledger import ledger_line
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome, Purpose
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.racing import SeedModel
from evokernels.search.score import Status

TASKS = ("fashion_mnist_mini", "mnist")
SETTINGS = RunSettings(
    search=GeneticConfig(population=12, generations=5, elites=2, seed=4),
    tasks=TASKS,
    seeds=(0, 1),
    conditions=Conditions(500, 128, 1000, validation_samples=100),
    comparison_seeds=3,
    threads=1,
)
ROTATING = dataclasses.replace(SETTINGS, rotate_seeds=True)


@pytest.fixture
def training(monkeypatch):
    synthetic = SyntheticTraining()
    monkeypatch.setattr(pool, "evaluate", synthetic)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(report, "plot_history", lambda *args: None)
    return synthetic


def altered(training, monkeypatch, change):
    """Puts ``change(trial, outcome)`` in place of every outcome."""
    monkeypatch.setattr(
        pool, "evaluate", lambda trial, *args: change(trial, training(trial, *args))
    )


def query(folder, sql, *values):
    with sqlite3.connect(folder / JOURNAL) as connection:
        rows = connection.execute(sql, values).fetchall()
    connection.close()
    return rows


# Rotating seeds


def test_every_generation_has_seeds_that_nothing_else_has(training, tmp_path):
    settings = dataclasses.replace(ROTATING, finalists=2)
    seeds = [settings.training_seeds(generation) for generation in range(50)]
    used = [*itertools.chain(*seeds), *settings.seeds, *settings.fresh_seeds, *settings.final_seeds]
    assert len(set(used)) == len(used) == 50 * 2 + 2 + 3 + 3
    other = dataclasses.replace(settings, search=dataclasses.replace(settings.search, seed=5))
    assert not set(itertools.chain(*seeds)) & set(other.training_seeds(0))
    last = dataclasses.replace(settings, seeds=(0, 2**30 - 1))
    assert last.final_seeds[-1] < min(last.training_seeds(0))
    evolve(settings, tmp_path)
    drawn = query(
        tmp_path, "SELECT DISTINCT generation, seed FROM evaluation WHERE purpose='search'"
    )
    assert sorted(drawn) == sorted(
        (generation, seed) for generation in range(5) for seed in seeds[generation]
    )


def test_without_rotation_the_seeds_stay():
    assert {SETTINGS.training_seeds(generation) for generation in range(5)} == {(0, 1)}


def test_a_genome_that_stays_is_worth_the_mean_over_all_its_seeds(training, tmp_path):
    evolve(ROTATING, tmp_path)
    stayed = 0
    for generation, key, score in query(tmp_path, "SELECT generation, key, score FROM candidate"):
        runs = query(
            tmp_path,
            "SELECT fitness, generation FROM evaluation "
            "WHERE key = ? AND purpose = 'search' AND generation <= ?",
            *(key, generation),
        )
        assert score == pytest.approx(statistics.fmean(fitness for fitness, _ in runs))
        trained_in = collections.Counter(number for _, number in runs)
        assert trained_in[generation] == 4  # two tasks, two fresh seeds, staying or not
        stayed = max(stayed, len(trained_in))
    assert stayed >= 3


def test_a_lucky_genome_loses_its_crown_when_it_is_trained_again(training, tmp_path, monkeypatch):
    lucky = {}

    def change(trial, outcome):
        if trial.purpose is Purpose.SEARCH and not lucky:
            lucky["key"], lucky["seeds"] = (
                canonical_key(trial.optimizer),
                ROTATING.training_seeds(0),
            )
        if canonical_key(trial.optimizer) == lucky["key"]:
            fitness = 2.0 if trial.seed in lucky["seeds"] else 0.0
            return dataclasses.replace(outcome, status=Status.OK, fitness=fitness)
        return outcome

    altered(training, monkeypatch, change)
    result = evolve(ROTATING, tmp_path)
    assert result.history[0].best_so_far == 2.0
    assert result.history[1].best_so_far == 1.0
    assert result.history[3].best_so_far < 1.0
    assert canonical_key(result.best.genome) != lucky["key"]


def test_rotating_seeds_need_an_elite():
    search = dataclasses.replace(SETTINGS.search, elites=0)
    with pytest.raises(SettingsError, match="elites must be at least 1 with rotate_seeds, got 0"):
        dataclasses.replace(ROTATING, search=search)


def test_an_optimizer_that_a_generation_has_twice_counts_once_for_the_seeds(
    training, tmp_path, monkeypatch
):
    told = []
    model_of = SeedModel.of

    def noting(rows):
        told.append([tuple(row.values()) for row in rows])
        return model_of(dict(enumerate(row)) for row in told[-1])

    monkeypatch.setattr(GeneticSearch, "ask", lambda search, state: 2 * state.population[:6])
    monkeypatch.setattr(SeedModel, "of", noting)
    settings = dataclasses.replace(
        SETTINGS, search=dataclasses.replace(SETTINGS.search, generations=1)
    )
    evolve(settings, tmp_path)
    ((*rows,),) = told
    assert 3 <= len(set(rows)) == len(rows) <= 6


# The winner


def test_the_bias_is_what_selection_promised_beyond_what_fresh_seeds_keep(training, tmp_path):
    result = evolve(SETTINGS, tmp_path)
    key = canonical_key(result.best.genome)
    by_seed = collections.defaultdict(list)
    for seed, fitness in query(
        tmp_path, "SELECT seed, fitness FROM evaluation WHERE key = ? AND purpose = 'report'", key
    ):
        by_seed[seed].append(fitness)
    assert sorted(by_seed) == [2, 3, 4]
    fresh = Estimate.of(statistics.fmean(by_seed[seed]) for seed in sorted(by_seed))
    winner = result.winner
    assert winner.fresh == fresh
    assert winner.selected == result.best.score.fitness
    assert winner.bias.mean == pytest.approx(result.best.score.fitness - fresh.mean)
    assert winner.bias.error == fresh.error
    # the synthetic test split is 0.01 harder, and a low loss is worth nothing there
    assert winner.test.mean == pytest.approx(fresh.mean - 0.01)
    with (tmp_path / "winner.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["protocol"], row["split"]) == ("own", "validation")
    assert float(row["selection_bias"]) == winner.bias.mean
    assert float(row["test_fitness"]) == winner.test.mean


def test_the_best_of_many_noisy_scores_is_overestimated(training, tmp_path):
    training.noise, training.common = 0.05, 0.0
    biases = [
        evolve(
            dataclasses.replace(SETTINGS, search=dataclasses.replace(SETTINGS.search, seed=seed)),
            tmp_path / str(seed),
        ).winner.bias.mean
        for seed in range(4)
    ]
    assert statistics.fmean(biases) > 0.03


def test_the_finalist_that_holds_on_further_seeds_wins(training, tmp_path, monkeypatch):
    before = evolve(SETTINGS, tmp_path / "one")
    favourite = canonical_key(before.best.genome)
    settings = dataclasses.replace(SETTINGS, finalists=3)

    def change(trial, outcome):
        assert trial.purpose is not Purpose.AUDIT or trial.seed in settings.final_seeds
        if trial.purpose is Purpose.AUDIT and canonical_key(trial.optimizer) == favourite:
            return dataclasses.replace(outcome, fitness=0.2)
        return outcome

    altered(training, monkeypatch, change)
    result = evolve(settings, tmp_path / "three")
    assert result.history == before.history
    assert canonical_key(result.best.genome) != favourite
    finals = query(
        tmp_path / "three",
        "SELECT key, avg(fitness) FROM evaluation WHERE purpose = 'audit' GROUP BY key ORDER BY 2",
    )
    assert len(finals) == 3
    assert finals[0] == (favourite, pytest.approx(0.2))
    assert finals[-1][0] == canonical_key(result.best.genome)
    told = query(
        tmp_path / "three",
        "SELECT DISTINCT key, score FROM candidate WHERE generation = 4 "
        "AND status = 'ok' ORDER BY score DESC LIMIT 3",
    )
    assert {key for key, _ in told} == {key for key, _ in finals}
    assert result.winner.selected == dict(told)[finals[-1][0]]
    assert (tmp_path / "three" / "best_genome.json").read_text() == result.best.genome.to_json()


def test_a_genome_that_failed_in_the_search_is_no_finalist(training, tmp_path, monkeypatch):
    """However well it does on the final seeds."""
    search = GeneticConfig(population=3, generations=1, elites=0, tournament=1)
    best, second, failing = map(canonical_key, GeneticSearch(search).start().population)

    def change(trial, outcome):
        key = canonical_key(trial.optimizer)
        fitness = {best: 0.9, second: 0.8, failing: 1.0}.get(key, 0.5)
        if trial.purpose is Purpose.SEARCH and key == failing:
            return Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, "digest")
        return Outcome(Status.OK, fitness, fitness, 1.5, 500, 0.1, "digest", test_accuracy=fitness)

    altered(training, monkeypatch, change)
    settings = dataclasses.replace(SETTINGS, search=search, finalists=3)
    assert canonical_key(evolve(settings, tmp_path).best.genome) == best
    finals = "SELECT DISTINCT key FROM evaluation WHERE purpose = 'audit'"
    assert {key for (key,) in query(tmp_path, finals)} == {best, second}


# The plateau


def history(*best):
    summary = collections.namedtuple("Summary", "best_so_far")
    return [summary(value) for value in best]


@pytest.mark.parametrize(
    ("best", "length", "ends"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0, False),
        ((0.5, 0.5), 2, False),
        ((0.5, 0.5, 0.5), 2, True),
        ((0.5, 0.5, 0.6), 2, False),
        ((0.5, 0.6, 0.6, 0.5), 2, True),
        ((0.5, 0.7, 0.6, 0.65), 2, True),
        ((0.5, 0.7, 0.6, 0.71), 2, False),
        ((0.5, 0.7, 0.8, 0.65), 2, False),
        ((0.7, 0.5, 0.6, 0.65), 2, True),
    ],
)
def test_a_plateau(best, length, ends):
    assert plateaued(history(*best), length) == ends


def test_a_plateau_ends_the_search_and_only_that(training, tmp_path):
    search = dataclasses.replace(SETTINGS.search, generations=40)
    settings = dataclasses.replace(SETTINGS, search=search, plateau=3)
    result = evolve(settings, tmp_path / "whole")
    length = len(result.history)
    best = [entry.best_so_far for entry in result.history]
    assert 4 <= length < 40
    assert best[-4] == best[-1]
    assert all(max(best[i : i + 3]) > best[i - 1] for i in range(1, length - 3))
    assert len(result.comparison.rows) == 3 * 3 * 2
    total = len(training.trials)
    with killed_after(training, total // 2):
        evolve(settings, tmp_path / "broken")
    assert evolve(settings, tmp_path / "broken").history == result.history
    assert evolve(settings, tmp_path / "broken").evaluations == 0


# Evaluations that fail


@pytest.mark.parametrize("status", [Status.CRASHED, Status.TIMED_OUT, Status.OUT_OF_MEMORY])
def test_failed_evaluations_rank_last_and_break_nothing(training, tmp_path, monkeypatch, status):
    def change(trial, outcome):
        if len(training.trials) % 7 == 0:
            return Outcome(status, -1.0, None, None, 0, 0.1, data="")
        return outcome

    altered(training, monkeypatch, change)
    settings = dataclasses.replace(SETTINGS, race=True, finalists=2)
    result = evolve(settings, tmp_path, audits=5)
    assert sum(entry.failed for entry in result.history) > 5
    assert result.best.score.status is Status.OK
    assert all(entry.best > 0 for entry in result.history)
    for generation in range(5):
        statuses = query(tmp_path, "SELECT status FROM candidate WHERE generation = ?", generation)
        lost = sum(found == status.value for (found,) in statuses)
        assert lost == result.history[generation].failed
    again = evolve(settings, tmp_path, audits=5)
    assert again.evaluations == 0
    assert again.history == result.history


def test_a_generation_of_failures_is_survived(training, tmp_path, monkeypatch):
    def change(trial, outcome):
        if trial.purpose is Purpose.SEARCH:
            return Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, "digest")
        return outcome

    altered(training, monkeypatch, change)
    for settings in (SETTINGS, ROTATING):
        settings = dataclasses.replace(settings, race=True, finalists=2)
        result = evolve(settings, tmp_path / str(settings.rotate_seeds), audits=3)
        assert [entry.diverged for entry in result.history] == [12] * 5
        assert result.winner.selected == -1.0


def test_a_run_in_which_nothing_is_trained_is_reported(training, tmp_path, monkeypatch):
    lost = Outcome(Status.TIMED_OUT, -1.0, None, None, 0, 0.1, data="")
    altered(training, monkeypatch, lambda trial, outcome: lost)
    search = GeneticConfig(population=2, generations=1, elites=0, tournament=1)
    result = evolve(dataclasses.replace(SETTINGS, search=search, seeds=(0,)), tmp_path)
    assert ledger_line(result.ledger) == (
        "The search took 0 training steps in 4 runs. Steps saved by equal optimizers 0, the "
        "hurdle 0, the seed race 0, divergence 0: 1.00 times fewer steps, divergence not counted."
    )


# Parity


@pytest.mark.parametrize(
    ("change", "parity"),
    [
        ({}, True),
        ({"conditions": Conditions(500, 128, 1000, validation_samples=1)}, False),
        ({"conditions": Conditions(500, 128, 1000, hurdle=True)}, False),
        ({"race": True}, False),
        ({"rotate_seeds": True}, False),
        ({"finalists": 2}, False),
        ({"refine": 20}, False),
        ({"plateau": 4}, True),
    ],
)
def test_parity_is_the_protocol_of_the_source_system(change, parity):
    plain = dataclasses.replace(SETTINGS, conditions=Conditions(500, 128, 1000))
    settings = dataclasses.replace(plain, **change)
    assert settings.parity == parity
    assert settings.selection_split == (
        "validation" if settings.conditions.validation_samples else "test"
    )
