"""The rules that save training in a run: what they leave out, count, and get wrong."""

import collections
import dataclasses
import itertools
import sqlite3
import statistics

import pytest
from synthetic import HURDLE, SyntheticTraining, killed_after, truth

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.evolution import journal, pool, report, rounds
from evokernels.evolution.journal import JOURNAL, Entry
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search import racing
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.score import Status

TASKS = ("fashion_mnist_mini", "mnist")
SETTINGS = RunSettings(
    search=GeneticConfig(population=14, generations=5, elites=2, seed=3),
    tasks=TASKS,
    seeds=(0, 2),
    conditions=Conditions(500, 128, 1000, validation_samples=100, hurdle=True),
    comparison_seeds=2,
    threads=1,
    race=True,
    finalists=2,
)
ROTATING = dataclasses.replace(SETTINGS, rotate_seeds=True)
RUNS = SETTINGS.search.population * len(TASKS) * len(SETTINGS.seeds)  # of a generation


@pytest.fixture
def training(monkeypatch):
    synthetic = SyntheticTraining()
    monkeypatch.setattr(pool, "evaluate", synthetic)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(report, "plot_history", lambda *args: None)  # most of the time
    return synthetic


def query(folder, sql, *values):
    connection = sqlite3.connect(f"file:{folder / JOURNAL}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


def table(folder, name):
    return [dict(row) for row in query(folder, f"SELECT * FROM {name}")]


def record(folder):
    """All that a journal says but times and the order of its rows."""
    rows = [
        (name, *sorted((key, str(value)) for key, value in row.items() if key != "seconds"))
        for name in ("run", "candidate", "evaluation", "saving")
        for row in table(folder, name)
    ]
    return sorted(rows)


# What is trained


def test_every_run_of_a_generation_is_made_or_saved(training, tmp_path):
    for settings in (SETTINGS, ROTATING):
        folder = tmp_path / str(settings.rotate_seeds)
        evolve(settings, folder)
        candidates = table(folder, "candidate")
        assert len(candidates) == 14 * 5
        runs = collections.Counter(
            (row["generation"], row["place"], row["task"], row["seed"])
            for name in ("evaluation", "saving")
            for row in table(folder, name)
            if row["generation"] is not None
        )
        assert set(runs) == {
            (generation, place, task, seed)
            for generation, place in itertools.product(range(5), range(14))
            for task in TASKS
            for seed in settings.training_seeds(generation)
        }
        assert set(runs.values()) == {1}


def first_seeds(folder, generation):
    """Mean fitness with the first seed, and whether there is a second, of its new genomes."""
    runs = collections.defaultdict(dict)
    for row in table(folder, "evaluation"):
        if row["generation"] == generation:
            runs[row["key"]].setdefault(row["seed"], []).append(row["fitness"])
    return [
        (statistics.fmean(by_seed[0]), 2 in by_seed) for by_seed in runs.values() if 0 in by_seed
    ]


def test_the_race_leaves_out_the_worst_of_a_generation(training, tmp_path):
    result = evolve(SETTINGS, tmp_path)
    assert all(further for _, further in first_seeds(tmp_path, 0))
    raced = 0
    for generation in range(1, 5):
        scores = first_seeds(tmp_path, generation)
        out = [score for score, further in scores if not further]
        through = [score for score, further in scores if further]
        assert max(out, default=-1.0) < min(through, default=1.0)
        raced += len(out)
    assert raced > 5
    assert sum(entry.raced for entry in result.history) >= raced * len(TASKS)


def test_a_generation_with_harder_seeds_is_not_raced_out(training, tmp_path):
    training.common = 0.3
    search = dataclasses.replace(SETTINGS.search, generations=8)
    result = evolve(dataclasses.replace(ROTATING, search=search), tmp_path, audits=1000)
    assert all(entry.raced <= 8 * len(TASKS) for entry in result.history)
    assert sum(entry.raced > 0 for entry in result.history) >= 4
    assert result.audit.false_kills == 0


def test_a_genome_that_stays_and_fails_says_nothing_about_the_seeds(
    training, tmp_path, monkeypatch
):
    training.noise, training.common = 0.002, 0.0
    first = ROTATING.training_seeds(2)[0]
    before = evolve(ROTATING, tmp_path / "before")
    (champion,) = query(
        tmp_path / "before", "SELECT key FROM best_per_generation WHERE generation = 1"
    )

    def champion_fails(trial, *args):
        if canonical_key(trial.optimizer) == champion["key"] and trial.seed == first:
            return Outcome(Status.DIVERGED, -1.0, None, None, 30, 0.1, "digest")
        return training(trial, *args)

    monkeypatch.setattr(pool, "evaluate", champion_fails)
    after = evolve(ROTATING, tmp_path / "after")
    assert after.history[2].diverged == before.history[2].diverged + 1
    assert after.history[2].raced >= before.history[2].raced > 10


def test_what_failed_was_stopped_or_left_out_says_nothing_about_the_seeds():
    def runner(*outcomes):
        made = rounds.Runner("key", 0, zoo.adam)
        for seed, (fitness, status) in enumerate(outcomes):
            outcome = Outcome(status, fitness, None, None, 500, 0.1, "digest")
            made.runs[seed] = {"x": Entry(0, 0, "key", Trial(zoo.adam, "x", seed), outcome)}
        return made

    ok, stopped, lost = Status.OK, Status.STOPPED, Status.DIVERGED
    runners = [
        runner((0.5, ok), (0.7, ok), (0.9, ok)),
        runner((0.5, ok)),
        runner((0.5, ok), (0.1, stopped)),
        runner((0.5, ok), (-1.0, lost)),
    ]
    assert rounds.complete_scores(runners, (0, 1)) == [{0: 0.5, 1: 0.7}]


@pytest.mark.parametrize("change", [{"race": False}, {"seeds": (0,)}])
def test_without_race_or_second_seed_nothing_is_left_out(training, tmp_path, change):
    evolve(dataclasses.replace(SETTINGS, **change), tmp_path)
    assert {row["rule"] for row in table(tmp_path, "saving")} == {"cache"}


def test_a_genome_without_its_last_seed_is_not_held_to_the_luck_of_the_first(
    training, tmp_path, monkeypatch
):
    # the first seed is 0.3 easier for all
    training.common = 0.0

    def easy(trial, *args):
        outcome = training(trial, *args)
        if trial.seed == 0 and outcome.status is Status.OK:
            outcome = dataclasses.replace(outcome, fitness=outcome.fitness + 0.3)
        return outcome

    monkeypatch.setattr(pool, "evaluate", easy)
    evolve(SETTINGS, tmp_path)
    raced = {
        (row["generation"], row["place"])
        for row in table(tmp_path, "saving")
        if row["rule"] == "race"
    }
    told = [
        (row["score"], statistics.fmean(truth(Genome.from_json(row["genome"]), t) for t in TASKS))
        for row in table(tmp_path, "candidate")
        if (row["generation"], row["place"]) in raced and row["status"] == "ok"
    ]
    assert len(told) > 3
    # the mean of an easy seed and another is 0.15 above the truth; the easy one alone 0.3
    assert statistics.fmean(score - true for score, true in told) == pytest.approx(0.15, abs=0.05)


def test_each_purpose_has_its_trials(training, tmp_path):
    evolve(SETTINGS, tmp_path, audits=1000)
    seeds = collections.defaultdict(set)
    for trial in training.trials:
        seeds[trial.purpose].add(trial.seed)
    assert seeds[Purpose.SEARCH] == {0, 2}
    assert seeds[Purpose.REPORT] == {3, 4}
    assert seeds[Purpose.AUDIT] == {0, 2, 5, 6}  # of the audit, and of the finalists


# Replay


class Reversed(pool.Pool):
    """Eight trials at a time end in the opposite order."""

    def run(self, trials):
        waiting = iter(trials)
        while batch := list(itertools.islice(waiting, 8)):
            yield from reversed(list(super().run(batch)))


@pytest.mark.parametrize("settings", [SETTINGS, ROTATING], ids=["fixed", "rotating"])
def test_the_order_in_which_trainings_end_changes_nothing(
    training, tmp_path, monkeypatch, settings
):
    result = evolve(settings, tmp_path / "one", audits=2)
    monkeypatch.setattr(pool, "Pool", Reversed)
    other = evolve(settings, tmp_path / "many", audits=2)
    assert record(tmp_path / "many") == record(tmp_path / "one")
    assert (other.history, other.best, other.audit) == (result.history, result.best, result.audit)


@pytest.mark.parametrize("settings", [SETTINGS, ROTATING], ids=["fixed", "rotating"])
def test_killed_anywhere_a_run_with_all_rules_resumes_bit_identically(training, tmp_path, settings):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    calls = []
    result = evolve(settings, whole, audits=4, on_progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == len(training.trials)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    total = len(training.trials)
    # in the waves of both seeds, between generations, in final, comparison and audit
    for stops in (0, 1, 27, 28, 40, total // 2, total - 20, total - 10, total - 2):
        already = len(table(broken, "evaluation")) if broken.exists() else 0
        with killed_after(training, stops - already):
            evolve(settings, broken, audits=4)
    again = evolve(settings, broken, audits=4)
    assert again.evaluations == 2
    assert record(broken) == record(whole)
    for name in ("history.csv", "best_genome.json", "winner.csv", "ledger.csv", "audit.csv"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert (again.history, again.winner) == (result.history, result.winner)


# The ledger and the other views


def test_the_ledger_is_the_sum_of_the_rows(training, tmp_path):
    result = evolve(SETTINGS, tmp_path, audits=3)
    evaluations, savings = table(tmp_path, "evaluation"), table(tmp_path, "saving")
    ledger = {cost.rule: cost for cost in result.ledger}
    assert list(ledger) == ["search", "cache", "hurdle", "race", "divergence", "audit", "report"]
    for purpose in ("search", "audit", "report"):
        rows = [row for row in evaluations if row["purpose"] == purpose]
        assert ledger[purpose].runs == len(rows) > 0
        assert ledger[purpose].steps_taken == sum(row["steps"] for row in rows)
    for rule in ("cache", "race"):
        rows = [row for row in savings if row["rule"] == rule]
        assert ledger[rule].runs == len(rows) > 0
        assert ledger[rule].steps_saved == sum(row["steps"] for row in rows)
    for rule, status, steps in (("hurdle", "stopped", HURDLE), ("divergence", "diverged", 30)):
        count = sum(row["status"] == status and row["purpose"] == "search" for row in evaluations)
        assert ledger[rule].runs == count > 0
        assert ledger[rule].steps_taken == count * steps
        assert ledger[rule].steps_saved == count * (500 - steps)
    saved = sum(ledger[rule].steps_saved for rule in ("cache", "hurdle", "race"))
    taken = ledger["search"].steps_taken
    assert ledger["search"].steps_saved == saved
    assert ledger["search"].factor == pytest.approx((taken + saved) / taken)
    assert ledger["race"].factor == pytest.approx(1 + ledger["race"].steps_saved / taken)


def test_what_the_race_saves_is_what_the_first_seed_took(training, tmp_path):
    evolve(SETTINGS, tmp_path)
    rows = {(row["key"], row["task"], row["seed"]): row for row in table(tmp_path, "evaluation")}
    savings = [row for row in table(tmp_path, "saving") if row["rule"] == "race"]
    assert {row["seed"] for row in savings} == {2}
    assert {HURDLE, 500} >= {row["steps"] for row in savings}
    assert all(row["steps"] == rows[row["key"], row["task"], 0]["steps"] for row in savings)


def test_the_best_of_each_generation_is_that_of_the_history(training, tmp_path):
    result = evolve(SETTINGS, tmp_path)
    rows = table(tmp_path, "best_per_generation")
    assert [row["score"] for row in rows] == [entry.best for entry in result.history]
    assert [row["generation"] for row in rows] == [entry.number for entry in result.history]


def test_all_trials_of_a_genome(training, tmp_path):
    evolve(SETTINGS, tmp_path)
    (best,) = query(tmp_path, "SELECT * FROM best_per_generation WHERE generation = 4")
    rows = query(
        tmp_path,
        "SELECT * FROM trials_of_genome WHERE generation = 4 AND place = ? AND purpose = 'search'",
        best["place"],
    )
    assert sorted((row["task"], row["seed"]) for row in rows) == sorted(
        itertools.product(TASKS, SETTINGS.seeds)
    )
    assert statistics.fmean(row["fitness"] for row in rows) == pytest.approx(best["score"])


# The audit


def test_a_larger_audit_only_adds_to_a_smaller_one_even_later(training, tmp_path):
    assert evolve(SETTINGS, tmp_path).audit is None
    small = evolve(SETTINGS, tmp_path, audits=3)
    assert {trial.purpose for trial in training.trials[-small.evaluations :]} == {Purpose.AUDIT}
    large = evolve(SETTINGS, tmp_path, audits=1000)
    assert len(small.audit.verdicts) == 3
    assert set(small.audit.verdicts) < set(large.audit.verdicts)
    assert len(large.audit.verdicts) == large.audit.stopped == small.audit.stopped
    assert {verdict.rule for verdict in large.audit.verdicts} == {"hurdle", "race"}


def test_what_failed_and_was_left_out_is_not_audited(training, tmp_path, monkeypatch):
    def the_worst_fail(trial, *args):
        outcome = training(trial, *args)
        lost = outcome.fitness < 0.86 and trial.purpose is Purpose.SEARCH
        changed = {"status": Status.DIVERGED, "fitness": -1.0} if lost else {}
        return dataclasses.replace(outcome, **changed)

    monkeypatch.setattr(pool, "evaluate", the_worst_fail)
    audited = evolve(SETTINGS, tmp_path, audits=1000).audit
    left_out = query(
        tmp_path,
        "SELECT DISTINCT generation, place FROM saving "
        "JOIN candidate USING (generation, place) WHERE rule = 'race' AND status = 'diverged'",
    )
    verdicts = {(verdict.generation, verdict.place) for verdict in audited.verdicts}
    assert left_out
    assert not {tuple(row) for row in left_out} & verdicts


def test_an_audited_genome_is_trained_with_all_seeds_to_the_end(training, tmp_path):
    audited = evolve(SETTINGS, tmp_path, audits=1000).audit
    for verdict in audited.verdicts:
        rows = query(
            tmp_path,
            "SELECT task, seed, fitness FROM trials_of_genome "
            "WHERE generation = ? AND place = ? AND status <> 'stopped' AND seed IN (0, 2)",
            verdict.generation,
            verdict.place,
        )
        assert len(rows) == 4
        fitness = statistics.fmean(row["fitness"] for row in rows)
        assert verdict.audited == pytest.approx(fitness)


def test_the_audit_finds_what_a_reckless_race_kills(training, tmp_path, monkeypatch):
    assert evolve(SETTINGS, tmp_path / "careful", audits=1000).audit.false_kills == 0
    monkeypatch.setattr(racing, "DEVIATIONS", -6.0)
    training.noise = 0.02
    audited = evolve(SETTINGS, tmp_path / "reckless", audits=1000).audit
    assert audited.false_kills > 0
    for verdict in audited.verdicts:
        others = [
            row["score"]
            for row in table(tmp_path / "reckless", "candidate")
            if row["generation"] == verdict.generation
            and row["place"] != verdict.place
            and row["status"] in ("ok", "stopped")
        ]
        better = sum(score > verdict.audited for score in others)
        if verdict.status == "ok":
            assert verdict.false_kill == (better < 3), verdict


@pytest.mark.parametrize(
    ("population", "ends", "kills"),
    [(2, Status.OK, 0), (3, Status.OK, 0), (4, Status.OK, 1), (4, Status.DIVERGED, 0)],
)
def test_a_false_kill_is_a_sound_genome_that_had_a_place_to_lose(
    training, tmp_path, monkeypatch, population, ends, kills
):
    def first_is_stopped(trial, *args):
        status, fitness = Status.OK, 0.5
        if canonical_key(trial.optimizer) == first:
            stopped = trial.purpose is Purpose.SEARCH
            status, fitness = (Status.STOPPED, 0.0) if stopped else (ends, 1.0)
        return dataclasses.replace(
            training(trial, *args), status=status, fitness=fitness, test_accuracy=0.5
        )

    search = GeneticConfig(population=population, generations=1, elites=0, tournament=1)
    first = canonical_key(GeneticSearch(search).start().population[0])
    monkeypatch.setattr(pool, "evaluate", first_is_stopped)
    settings = dataclasses.replace(SETTINGS, search=search, finalists=1)
    audited = evolve(settings, tmp_path, audits=5).audit
    (verdict,) = audited.verdicts
    assert audited.false_kills == kills
    assert (verdict.place, verdict.told, verdict.audited) == (0, 0.0, 1.0)


# The claim: 1.2 times fewer steps, and no genome of the best three lost


@pytest.mark.parametrize("run_seed", [1, 2, 3])
def test_a_fifth_of_the_steps_is_saved_and_no_top_genome_lost(training, tmp_path, run_seed):
    settings = RunSettings(
        search=GeneticConfig(population=50, generations=9, elites=3, seed=run_seed),
        tasks=("mnist",),
        seeds=(0, 2),
        conditions=Conditions(500, 128, 15_000, validation_samples=5_000, hurdle=True),
        comparison_seeds=1,
        threads=1,
        race=True,
    )
    result = evolve(settings, tmp_path, audits=10_000)
    ledger = {cost.rule: cost for cost in result.ledger}
    assert ledger["search"].factor >= 1.2
    assert min(ledger[rule].factor for rule in ("cache", "hurdle", "race")) > 1.01
    assert result.audit.stopped > 30
    assert result.audit.false_kills == 0
    # in truth, too: what was stopped is worse than the best three of its generation
    true = collections.defaultdict(dict)
    for row in table(tmp_path, "candidate"):
        true[row["generation"]][row["place"]] = truth(Genome.from_json(row["genome"]), "mnist")
    for verdict in result.audit.verdicts:
        generation = true[verdict.generation]
        assert generation[verdict.place] < sorted(generation.values())[-3]
