"""Comparisons: tables by hand, tuning, and runs that are killed and go on."""

import collections
import csv
import dataclasses
import hashlib
import io
import itertools
import math
import statistics

import pytest

from evokernels import Genome, genome, terms, zoo
from evokernels.errors import DatasetError, JournalError, SettingsError
from evokernels.evolution import pool, report, tuning
from evokernels.evolution.baselines import BASELINES, Baseline, optimizer_key
from evokernels.evolution.comparison import Comparison, Estimate, Row
from evokernels.evolution.contest import Contest, compare
from evokernels.evolution.journal import Entry, open_journal
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial
from evokernels.search.score import Score, Status

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(steps=20, batch_size=32, train_samples=128, validation_samples=100)
OPTIMIZERS = {
    "adam": zoo.adam,
    "again": zoo.adam,
    "sgd": BASELINES["sgd"],
    "sophia": BASELINES["sophia"],
}
CONTEST = Contest(OPTIMIZERS, (MINI, "mnist"), (0, 1), CONDITIONS, threads=1, trials=4)


# Tables


def test_estimates_by_hand():
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert str(Estimate.of([0.5, 0.7])) == "0.6000 ± 0.1000"
    assert str(Estimate.of([0.5])) == "0.5000"


def ended(fitness, **changes):
    """An outcome whose test split is not the split that selects."""
    outcome = Outcome(Status.OK, 0.7, 0.7, 1.5, 10, 1.0, "digest", test_accuracy=fitness)
    return dataclasses.replace(outcome, **changes)


def rows(fitness_of):
    return [
        Row(name, Trial(optimizer, task, seed), ended(fitness_of[name, task] + 0.1 * seed))
        for name, optimizer in (("a", zoo.adam), ("bc", BASELINES["sophia"]))
        for task in ("x", "y")
        for seed in (0, 1)
    ]


BY_HAND = rows({("a", "x"): 0.2, ("a", "y"): 0.4, ("bc", "x"): 0.0, ("bc", "y"): 0.8})
TUNED = rows({("a", "x"): 0.3, ("a", "y"): 0.5, ("bc", "x"): 0.1, ("bc", "y"): 0.7})


def test_tables_by_hand():
    assert (
        Comparison(BY_HAND).tables()
        == """\
| optimizer | overall fitness |   test accuracy | gradient passes |
|-----------|----------------:|----------------:|----------------:|
| a         | 0.3500 ± 0.0500 | 0.3500 ± 0.0500 |              10 |
| bc        | 0.4500 ± 0.0500 | 0.4500 ± 0.0500 |          10 + 1 |

| optimizer |    fitness on x |    fitness on y |
|-----------|----------------:|----------------:|
| a         | 0.2500 ± 0.0500 | 0.4500 ± 0.0500 |
| bc        | 0.0500 ± 0.0500 | 0.8500 ± 0.0500 |"""
    )


def test_tuned_columns_by_hand():
    text = Comparison(BY_HAND).tables(Comparison(TUNED))
    assert [line for line in text.splitlines() if line.startswith(("| optimizer", "| bc"))] == [
        "| optimizer | overall fitness |           tuned |   test accuracy |           tuned "
        "| gradient passes |",
        "| bc        | 0.4500 ± 0.0500 | 0.4500 ± 0.0500 | 0.4500 ± 0.0500 | 0.4500 ± 0.0500 "
        "|          10 + 1 |",
        "| optimizer |    fitness on x |           tuned |    fitness on y |           tuned |",
        "| bc        | 0.0500 ± 0.0500 | 0.1500 ± 0.0500 | 0.8500 ± 0.0500 | 0.7500 ± 0.0500 |",
    ]


def test_the_file_has_every_run_and_the_test_split():
    sophia = dataclasses.replace(
        BASELINES["sophia"], use_warmup=True, warmup_steps=2, use_cosine_decay=True
    )
    diverged = Outcome(Status.DIVERGED, -1.0, None, None, 3, 1.0, "digest")
    untuned = Comparison([Row("s", Trial(BASELINES["sophia"], "x", 0), diverged)])
    tuned = Comparison([Row("s", Trial(sophia, "x", 0), ended(0.25, final_loss=0.5))])
    assert untuned.csv(tuned).splitlines() == [
        "optimizer,tuned,setting,task,seed,status,fitness,accuracy,final_loss,steps,"
        "gradient_passes",
        's,no,"lr 0.06, constant",x,0,diverged,-1.0,,,3,4',
        's,yes,"lr 0.06, 2 steps of warmup, cosine",x,0,ok,0.275,0.25,0.5,10,11',
    ]
    assert untuned.overall_accuracy("s").mean == 0.0


def test_a_run_that_was_not_tested_has_no_test_fitness():
    selected = ended(None)
    with pytest.raises(ValueError, match="only a trial for a report"):
        _ = selected.test_fitness


# Tuning


@pytest.mark.parametrize(
    "optimizer", [zoo.evolved_2025, *BASELINES.values()], ids=lambda o: getattr(o, "name", "genome")
)
def test_the_same_is_tried_of_every_optimizer(optimizer):
    def tried(optimizer):
        several = tuning.candidates(optimizer, 9, 200)
        assert several[0] is optimizer
        return [
            (
                pytest.approx(candidate.lr / optimizer.lr),
                *(candidate.use_warmup, candidate.warmup_steps, candidate.use_cosine_decay),
            )
            for candidate in several[1:]
        ]

    assert tried(optimizer) == tried(zoo.adam)


def test_settings_lie_evenly():
    several = tuning.candidates(zoo.adam, 41, 200)
    logs = sorted(math.log10(candidate.lr / zoo.adam.lr) for candidate in several[1:])
    assert -1 <= logs[0] < -0.9
    assert 0.9 < logs[-1] <= 1
    assert max(b - a for a, b in itertools.pairwise(logs)) < 0.1
    assert statistics.fmean(logs) == pytest.approx(0, abs=0.05)
    schedules = [(c.use_warmup, c.use_cosine_decay, c.warmup_steps) for c in several[1:]]
    assert schedules == [(True, True, 20), (False, False, 0)] * 20


def test_more_trials_begin_with_the_same_ones():
    assert tuning.candidates(zoo.adam, 12, 50)[:5] == tuning.candidates(zoo.adam, 5, 50)
    assert tuning.candidates(zoo.adam, 1, 50) == (zoo.adam,)


def test_only_rate_and_schedule_are_tuned():
    for candidate in tuning.candidates(zoo.evolved_2025, 5, 50):
        schedule = {"use_warmup": True, "warmup_steps": 100, "use_cosine_decay": True}
        rate = {"lr_log10": zoo.evolved_2025.lr_log10}
        assert dataclasses.replace(candidate, **schedule, **rate) == zoo.evolved_2025


@pytest.mark.parametrize(
    ("fitness", "best"),
    [
        ({"x": (0.5, 0.6, 0.1), "y": (0.5, 0.5, 0.1)}, 1),
        ({"x": (0.5, 0.9, 0.1), "y": (0.5, 0.0, 0.1)}, 0),
        ({"x": (0.5, 0.5, 0.5), "y": (0.5, 0.5, 0.5)}, 0),  # the default, where all are equal
        # -1: diverged, on one task; no mean makes up for it
        ({"x": (-1.0, 0.9, 0.01), "y": (1.04, -1.0, 0.01)}, 2),
    ],
)
def test_the_best_over_all_tasks_is_chosen(fitness, best):
    several = tuning.candidates(zoo.adam, 3, 50)

    def outcome(trial):
        assert (trial.seed, trial.purpose) == (tuning.TUNING_SEED, Purpose.SEARCH)
        value = fitness[trial.task][several.index(trial.optimizer)]
        status = Status.DIVERGED if value == -1.0 else Status.OK
        # what the test split says must not matter
        return Outcome(status, value, 0.5, 0.1, 10, 1.0, "digest", test_accuracy=1 - value)

    choice = tuning.choose(several, ["x", "y"], outcome)
    assert choice.optimizer == several[best]
    mean = statistics.fmean(values[best] for values in fitness.values())
    assert choice.score == Score(mean)
    assert choice.default_score.fitness == statistics.fmean(v[0] for v in fitness.values())


# Runs, with a fake in place of training


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


class FakeTraining:
    """Outcomes from a hash of what is trained; can fail at a chosen run."""

    def __init__(self):
        self.trials = []
        self.fails_at = None

    def __call__(self, trial, conditions, data, device):
        if len(self.trials) == self.fails_at:
            raise Killed
        self.trials.append(trial)
        name = f"{optimizer_key(trial.optimizer)}{trial.task}{trial.seed}"
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 / 1000
        if number < 0.1:
            return Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, "digest")
        tested = number if trial.purpose is Purpose.REPORT else None
        return Outcome(Status.OK, number, number, 1.5, conditions.steps, 0.1, "digest", tested)


@pytest.fixture
def training(monkeypatch):
    fake = FakeTraining()
    monkeypatch.setattr(pool, "evaluate", fake)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    # half a second each
    monkeypatch.setattr(report, "_plot_comparison", lambda *args: None)
    return fake


def test_every_optimizer_has_the_same_trials(training, tmp_path):
    result = compare(CONTEST, tmp_path)
    selection = collections.Counter()
    for trial in training.trials:
        if trial.seed == tuning.TUNING_SEED:
            method = getattr(trial.optimizer, "name", "adam")
            selection[method, trial.task] += 1
            assert trial.purpose is Purpose.SEARCH
        else:
            assert trial.seed in CONTEST.seeds
            assert trial.purpose is Purpose.REPORT
    assert selection == {
        (name, task): CONTEST.trials for name in ("adam", "sgd", "sophia") for task in CONTEST.tasks
    }
    assert list(result.choices) == list(OPTIMIZERS)
    assert result.choices["adam"] == result.choices["again"]
    assert result.evaluations == len(training.trials) == len(set(training.trials))


def test_the_chosen_are_compared_beside_the_given(training, tmp_path):
    result = compare(CONTEST, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert len(lines) == 2 * 4 * 2 * 2
    for name, choice in result.choices.items():
        settings = {(line["tuned"], line["setting"]) for line in lines if line["optimizer"] == name}
        assert settings == {
            ("no", tuning.setting(OPTIMIZERS[name])),
            ("yes", tuning.setting(choice.optimizer)),
        }
    assert any(choice.optimizer != OPTIMIZERS[name] for name, choice in result.choices.items())
    overall, _, chosen = result.tables().split("\n\n")
    assert "gradient passes" in overall
    assert "| 20 + 2 |" in overall.replace(" " * 10, " ")
    assert chosen.count("\n") == 5
    for choice in result.choices.values():
        assert tuning.setting(choice.optimizer) in chosen


@pytest.mark.parametrize("fails_at", [0, 1, 13, 24, 25, 30])
def test_a_killed_comparison_ends_like_an_unbroken_one(training, tmp_path, fails_at):
    compare(CONTEST, tmp_path / "unbroken")
    expected, training.trials = training.trials, []
    training.fails_at = fails_at
    with pytest.raises(Killed):
        compare(CONTEST, tmp_path / "broken")
    training.fails_at = None
    result = compare(CONTEST, tmp_path / "broken")
    assert training.trials == expected
    assert result.evaluations == len(expected) - fails_at
    contents = [
        (tmp_path / name / "comparison.csv").read_bytes() for name in ("unbroken", "broken")
    ]
    assert contents[0] == contents[1]


def test_a_complete_comparison_trains_nothing(training, tmp_path):
    first = compare(CONTEST, tmp_path)
    before = (tmp_path / "comparison.csv").read_bytes()
    calls = []
    training.fails_at = len(training.trials)
    again = compare(CONTEST, tmp_path, on_progress=lambda *progress: calls.append(progress))
    assert (again.evaluations, calls) == (0, [])
    assert (tmp_path / "comparison.csv").read_bytes() == before
    assert again.tables() == first.tables()


def test_a_folder_takes_more_optimizers_tasks_seeds_and_trials(training, tmp_path):
    small = dataclasses.replace(
        CONTEST, optimizers={"adam": zoo.adam}, tasks=(MINI,), seeds=(1,), trials=2
    )
    before = compare(small, tmp_path).evaluations
    compare(CONTEST, tmp_path)
    grown = len(training.trials)
    training.trials = []
    assert compare(CONTEST, tmp_path / "new").evaluations <= grown
    assert before >= 2 + 1
    assert set(training.trials) >= {Trial(zoo.adam, MINI, 1, Purpose.REPORT)}
    contents = [(folder / "comparison.csv").read_bytes() for folder in (tmp_path, tmp_path / "new")]
    assert contents[0] == contents[1]


def test_progress_ends_where_it_said(training, tmp_path):
    calls = []
    compare(CONTEST, tmp_path, on_progress=lambda *progress: calls.append(progress))
    assert [done for done, _, note in calls if note == "tuning"] == list(range(25))
    assert next(done for done, _, note in calls if note == "comparison") == 24
    assert calls[-1][0] == calls[-1][1] == len(training.trials)


def test_without_tuning_there_is_one_column_each(training, tmp_path):
    plain = dataclasses.replace(CONTEST, trials=0)
    result = compare(plain, tmp_path)
    assert (result.tuned, result.choices) == (None, {})
    assert "tuned" not in result.tables()
    # three optimizers, since two of the four are one
    assert len(training.trials) == 3 * 2 * 2
    assert result.untuned.overall_fitness("adam") == result.untuned.overall_fitness("again")


def test_other_conditions_are_refused(training, tmp_path):
    compare(CONTEST, tmp_path)
    before = (tmp_path / "comparison.csv").read_bytes()
    other = dataclasses.replace(CONDITIONS, steps=21)
    with pytest.raises(JournalError, match=r"other settings: steps 20 \(now 21\)"):
        compare(dataclasses.replace(CONTEST, conditions=other), tmp_path)
    assert (tmp_path / "comparison.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ("imagenet",)}, DatasetError, "imagenet"),
        ({"tasks": ()}, SettingsError, "tasks must be one or more different values, got none"),
        ({"seeds": (1, 1)}, SettingsError, "seeds must be one or more different values, got 1 1"),
        ({"seeds": (-1,)}, SettingsError, "seeds must be from 0 to 2147483647, got -1"),
        ({"seeds": (0, 2**31)}, SettingsError, "seeds must be from .*, got 2147483648"),
        ({"optimizers": {}}, SettingsError, "optimizers must be one or more"),
        ({"device": "tpu"}, SettingsError, "device must be cpu"),
        ({"trials": -1}, SettingsError, "trials must be at least 0, got -1"),
        (
            {"conditions": dataclasses.replace(CONDITIONS, validation_samples=0)},
            SettingsError,
            "give validation samples",
        ),
        ({"seeds": (0, 10_000)}, SettingsError, "seed 10000 is the one that tuning chooses by"),
    ],
)
def test_settings_that_cannot_be(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(CONTEST, **change)


def test_a_journal_of_terms_that_nobody_has_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    optimizer = Genome([genome.add_own_term("OWN", terms.tanh(terms.m))])
    outcome = Outcome(Status.OK, 0.5, 0.5, 1.0, 500, 1.0, "digest")
    with open_journal(tmp_path, {}) as journal:
        journal.add(Entry(None, None, "key", Trial(optimizer, MINI, 7), outcome))
    genome._own_terms.clear()
    with (
        pytest.raises(JournalError, match=r"cannot read .*: term_types holds 'OWN', .* --terms"),
        open_journal(tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize(
    "optimizer", [zoo.evolved_2025, Baseline("lion", 1 / 3, True, 7, True)], ids=["genome", "lion"]
)
def test_a_journal_keeps_any_optimizer(tmp_path, optimizer):
    outcome = Outcome(Status.OK, 0.1 + 0.2, 1 / 3, 1e-17, 500, 1.25, "digest")
    entry = Entry(None, None, optimizer_key(optimizer), Trial(optimizer, MINI, 7), outcome)
    with open_journal(tmp_path, {}) as journal:
        journal.add(entry)
    with open_journal(tmp_path, {}) as journal:
        assert journal.find(entry.key, MINI, 7, Purpose.SEARCH) == entry
