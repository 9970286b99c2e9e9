"""Evaluation, journal and run loop; killed processes are in test_cli.py."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import sqlite3
import tracemalloc

import pytest
import torch

from evokernels import zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.errors import DatasetError, JournalError, SettingsError
from evokernels.evolution import journal, pool, report
from evokernels.evolution.evaluator import EVALUATION_VERSION, evaluate
from evokernels.evolution.fitness import diverged, final_loss, genome_score, run_fitness
from evokernels.evolution.journal import JOURNAL, Entry, open_journal
from evokernels.evolution.pool import open_pool
from evokernels.evolution.report import FILES, history_csv
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome, Purpose, Trial
from evokernels.genome import Genome
from evokernels.search.genetic import GeneticConfig
from evokernels.search.score import Status
from evokernels.tasks import load_images

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(steps=6, batch_size=32, train_samples=128)


# Fitness


@pytest.mark.parametrize(
    ("accuracy", "loss", "fitness"),
    [(0.9, 0.2, 0.94), (0.9, 1.0, 0.9), (0.9, 30.0, 0.9), (0.5, 0.0, 0.55)],
)
def test_fitness_of_a_run_by_hand(accuracy, loss, fitness):
    assert run_fitness(accuracy, loss) == pytest.approx(fitness, abs=1e-15)


def test_the_final_loss_is_the_mean_of_the_last_fifty_steps():
    assert final_loss([100.0] * 10 + [1.0] * 25 + [2.0] * 25) == 1.5
    assert final_loss([1.0, 2.0]) == 1.5


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf + math.inf, 50.001])
def test_a_lost_run_is_recognised(loss):
    assert diverged(loss)


@pytest.mark.parametrize("loss", [0.0, 2.3, 50.0])
def test_a_high_loss_is_not_yet_lost(loss):
    assert not diverged(loss)


def test_a_genome_is_worth_the_mean_over_seeds_then_tasks():
    def run(fitness, status=Status.OK):
        return Outcome(status, fitness, None, None, steps=1, seconds=1.0, data="")

    # three runs of one task weigh as much as one run of the other
    runs = {"a": [run(0.9), run(0.6), run(0.6)], "b": [run(0.3)]}
    score = genome_score(runs)
    assert (score.fitness, score.status) == (pytest.approx(0.5), Status.OK)
    runs["b"] = [run(-1.0, Status.DIVERGED)]
    score = genome_score(runs)
    assert (score.fitness, score.status) == (pytest.approx(-0.15), Status.DIVERGED)


# Evaluation


@pytest.fixture(scope="module")
def images():
    """Images for evaluations in this process, with one thread, as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_images(MINI, train_samples=CONDITIONS.train_samples)
    torch.set_num_threads(threads)


def test_an_evaluation_is_reproducible_and_leaves_the_global_generator(images, losses):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(Trial(zoo.adam, MINI, 3), CONDITIONS, images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = evaluate(Trial(zoo.adam, MINI, 3), CONDITIONS, images)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert losses[0] == losses[1]
    assert (first.status, first.steps) == (Status.OK, 6)
    assert first.final_loss == pytest.approx(sum(losses[0]) / 6)
    assert first.fitness == run_fitness(first.accuracy, first.final_loss)


def test_a_seed_decides_everything_but_the_optimizer(images, losses):
    # steps too small to change a loss: what is left is initial weights, batches and dropout
    idle = dataclasses.replace(zoo.sgd_momentum, lr_log10=-12.0)
    idle_too = dataclasses.replace(zoo.adam, lr_log10=-12.0)
    for genome, seed in ((idle, 0), (idle_too, 0), (idle, 1)):
        evaluate(Trial(genome, MINI, seed), CONDITIONS, images)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(set(losses[0])) == 6
    assert not set(losses[0]) & set(losses[2])


def test_training_learns(images):
    conditions = Conditions(steps=40, batch_size=32, train_samples=128)
    outcome = evaluate(Trial(zoo.adam, MINI, 0), conditions, images)
    assert outcome.accuracy > 0.5


@pytest.mark.parametrize("lr_log10", [2.0, 0.5])
def test_a_diverged_run_ends_early_with_minus_one(images, lr_log10, losses):
    wild = Genome(term_types=["SIGN_GRAD"], lr_log10=lr_log10)
    outcome = evaluate(Trial(wild, MINI, 0), CONDITIONS, images)
    assert outcome.status is Status.DIVERGED
    assert (outcome.fitness, outcome.accuracy, outcome.final_loss) == (-1.0, None, None)
    assert [diverged(loss) for loss in losses[0]] == [False] * outcome.steps + [True]


def test_other_images_have_another_digest(images):
    other = load_images(MINI, train_samples=129)
    digests = {
        evaluate(Trial(zoo.adam, MINI, 0), CONDITIONS, data).data
        for data in (images, other, images)
    }
    assert len(digests) == 2


# The run loop, with a fake in place of training


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


class FakeTraining:
    """Outcomes from a hash of what an optimizer is; can fail at a chosen evaluation."""

    def __init__(self):
        self.trials = []
        self.devices = set()
        self.fails_at = None
        self.images = "digest"

    def __call__(self, trial, conditions, data, device):
        if len(self.trials) == self.fails_at:
            raise Killed
        self.trials.append(trial)
        self.devices.add(device)
        name = f"{canonical_key(trial.optimizer)}{trial.task}{trial.seed}"
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000
        if number < 100:
            return Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, self.images)
        accuracy = number / 1000
        tested = accuracy if trial.purpose is Purpose.REPORT else None
        return Outcome(Status.OK, accuracy, accuracy, 1.5, 6, 0.1, self.images, tested)


@pytest.fixture
def training(monkeypatch):
    fake = FakeTraining()
    monkeypatch.setattr(pool, "evaluate", fake)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    return fake


SETTINGS = RunSettings(
    search=GeneticConfig(population=6, generations=4, elites=2, tournament=3, seed=1),
    tasks=(MINI, "mnist"),
    seeds=(0, 1),
    conditions=CONDITIONS,
    comparison_seeds=2,
    threads=1,
)


def read(folder):
    return {name: (folder / name).read_bytes() for name in ("history.csv", "best_genome.json")}


def test_a_run_leaves_its_results(training, tmp_path):
    calls = []
    result = evolve(SETTINGS, tmp_path, on_progress=lambda *progress: calls.append(progress))
    assert all((tmp_path / name).stat().st_size for name in FILES)
    assert Genome.load(tmp_path / "best_genome.json") == result.best.genome
    assert result.evaluations == len(training.trials)
    assert calls[-1][0] == calls[-1][1] == len(training.trials)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    best = [entry.best for entry in result.history]
    assert best == sorted(best)
    assert best[-1] == result.best.score.fitness == result.history[-1].best_so_far
    assert result.comparison.optimizers == ("evolved", "adam", "adamw")
    assert result.comparison.seeds == (2, 3)


def test_the_history_is_what_the_journal_says(training, tmp_path):
    evolve(SETTINGS, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert [row["generation"] for row in rows] == ["1", "2", "3", "4"]
    with sqlite3.connect(tmp_path / JOURNAL) as journal:
        counted = journal.execute(
            "SELECT count(*), min(fitness) FROM evaluation WHERE generation IS NOT NULL "
            "GROUP BY generation ORDER BY generation"
        ).fetchall()
        (means,) = journal.execute(
            "SELECT avg(fitness) FROM evaluation WHERE generation = 0 AND task = 'mnist'"
        )
    journal.close()
    assert [int(row["evaluations"]) for row in rows] == [count for count, _ in counted]
    assert all(int(row["evaluations"]) + int(row["reused"]) == 24 for row in rows)
    assert float(rows[0]["mean_mnist"]) == pytest.approx(means[0])
    assert (int(rows[0]["diverged"]) > 0) == (counted[0][1] == -1.0)


def test_no_optimizer_is_trained_twice_on_the_same_task_and_seed(training, tmp_path):
    result = evolve(SETTINGS, tmp_path)
    trained = [(canonical_key(t.optimizer), t.task, t.seed) for t in training.trials]
    assert len(trained) == len(set(trained))
    # two elites, on two tasks with two seeds, in each generation after the first
    assert all(entry.reused >= 8 for entry in result.history[1:])


def test_one_optimizer_in_two_spellings_is_trained_once(training, tmp_path, monkeypatch):
    twice = Genome(term_types=["GRAD", "GRAD"], alphas=[0.5, 0.5], use_m=False, use_v=False)
    once = dataclasses.replace(twice, term_types=["GRAD"], alphas=[1.0], beta1=0.3)
    monkeypatch.setattr(
        "evokernels.search.operators.start_population", lambda *args: (twice, once) * 3
    )
    result = evolve(SETTINGS, tmp_path)
    assert result.history[0].evaluations == 4


def test_a_complete_run_trains_nothing(training, tmp_path):
    first = evolve(SETTINGS, tmp_path)
    files = read(tmp_path)
    training.fails_at = len(training.trials)
    again = evolve(SETTINGS, tmp_path)
    assert again.evaluations == 0
    assert (again.best, again.history) == (first.best, first.history)
    assert again.comparison.csv() == first.comparison.csv()
    assert read(tmp_path) == files


def test_a_replay_does_not_set_the_files_back(training, tmp_path, monkeypatch):
    written = []
    write = report.write_history
    monkeypatch.setattr(
        report, "write_history", lambda *args: (written.append(len(args[1])), write(*args))
    )
    training.fails_at = 30
    with pytest.raises(Killed):
        evolve(SETTINGS, tmp_path)
    assert written == [1]
    training.fails_at = None
    evolve(SETTINGS, tmp_path)
    evolve(SETTINGS, tmp_path)
    assert written == [1, 2, 3, 4, 4, 4]


def test_interrupted_anywhere_a_run_resumes_bit_identically(training, tmp_path):
    whole = evolve(SETTINGS, tmp_path / "whole")
    total = len(training.trials)
    assert total > 60
    broken = tmp_path / "broken"
    done = 0
    for stop in (0, 1, 5, 23, 24, 25, 40, total - 6, total - 1):
        training.trials.clear()
        training.fails_at = stop - done
        with pytest.raises(Killed):
            evolve(SETTINGS, broken)
        done = stop
    training.trials.clear()
    training.fails_at = None
    resumed = evolve(SETTINGS, broken)
    assert len(training.trials) == 1  # all others were kept
    assert resumed.history == whole.history
    assert resumed.comparison.csv() == whole.comparison.csv()
    assert read(broken) == read(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "tasks must be .*none"),
        ({"seeds": (1, 1)}, "seeds must be .*1 1"),
        ({"seeds": (-1,)}, "seeds must be at least 0, got -1"),
        ({"seeds": (0, 2**30)}, "seeds must be below 1073741824, got 1073741824"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ({"conditions": Conditions(0, 8, None)}, "steps must be at least 1"),
        ({"conditions": Conditions(5, 8, 7)}, "train_samples must be at least 8, got 7"),
        ({"comparison_seeds": 0}, "comparison_seeds must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_an_unknown_task_is_named():
    with pytest.raises(DatasetError, match="imagenet"):
        dataclasses.replace(SETTINGS, tasks=("imagenet",))


@pytest.fixture
def one_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")


def test_settings_survive_the_journal(one_cuda_device):
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, device="cuda")):
        assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_training_of_a_run_is_on_its_device(training, tmp_path, one_cuda_device, device):
    evolve(dataclasses.replace(SETTINGS, device=device), tmp_path)
    assert training.devices == {device}


# The journal


@pytest.fixture
def complete(training, tmp_path):
    """The folder of a complete run."""
    evolve(SETTINGS, tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def recorded(settings):
    """What the journal keeps of them."""
    return {**settings.to_dict(), "evaluation_version": EVALUATION_VERSION}


def assert_refused(folder, match, settings=SETTINGS):
    before = contents(folder)
    with pytest.raises(JournalError, match=match) as caught:
        evolve(settings, folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_run_with_other_settings_is_refused_naming_them(complete):
    other = dataclasses.replace(
        SETTINGS, seeds=(0,), search=dataclasses.replace(SETTINGS.search, population=7)
    )
    assert_refused(complete, r"population 6 \(now 7\), seeds \[0, 1\] \(now \[0\]\)", other)


def test_a_run_without_evaluations_takes_other_settings(training, tmp_path):
    training.fails_at = 0
    with pytest.raises(Killed):
        evolve(SETTINGS, tmp_path)
    training.fails_at = None
    other = dataclasses.replace(SETTINGS, search=dataclasses.replace(SETTINGS.search, seed=2))
    evolve(other, tmp_path)
    assert_refused(tmp_path, "run_seed")


@pytest.mark.parametrize("at", [0, 20, 100, 4096, -5000])
def test_a_damaged_journal_is_refused(complete, at):
    path = complete / JOURNAL
    data = bytearray(path.read_bytes())
    data[at : at + 64] = b"\xa5" * 64
    path.write_bytes(data)
    assert_refused(complete, "damaged|not a journal|schema")


@pytest.mark.parametrize("size", [0, 10, 99, 5000])
def test_a_truncated_journal_is_refused(complete, size):
    path = complete / JOURNAL
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(complete, "damaged|not a journal")


def test_a_foreign_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / JOURNAL)
    connection.execute("CREATE TABLE mine (precious TEXT)")
    connection.close()
    assert_refused(tmp_path, "not a journal of evokernels")


def test_a_newer_schema_is_refused(complete):
    connection = sqlite3.connect(complete / JOURNAL)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    assert_refused(complete, "schema version 3, this release reads 2")


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert_refused(tmp_path, "is not a run folder: it has 'thesis.tex'")
    assert not (tmp_path / "lock").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(JournalError, match=r"cannot use .*choose a folder"):
            evolve(SETTINGS, folder)


def test_a_second_process_is_refused(complete):
    # flock belongs to the open file, so a second open in one process conflicts like another process
    with open_journal(complete, recorded(SETTINGS)):
        assert_refused(complete, r"in use by process \d+")
    evolve(SETTINGS, complete)


def test_a_kill_while_the_journal_is_created_leaves_a_run_folder(training, tmp_path):
    (tmp_path / "lock").write_text("1\n")
    (tmp_path / f"{JOURNAL}.new").write_bytes(b"half")
    (tmp_path / f"{JOURNAL}.new-journal").write_bytes(b"half")
    evolve(SETTINGS, tmp_path)
    assert not list(tmp_path.glob("*.new*"))


def test_other_images_under_the_same_name_are_refused(training, tmp_path):
    training.fails_at = 5
    with pytest.raises(Killed):
        evolve(SETTINGS, tmp_path)
    training.fails_at, training.images = None, "other digest"
    with pytest.raises(JournalError, match=r"data of .* are not those"):
        evolve(SETTINGS, tmp_path)


def test_a_journal_of_another_search_is_refused(complete, monkeypatch):
    population = (zoo.rmsprop,) * SETTINGS.search.population
    monkeypatch.setattr("evokernels.search.operators.start_population", lambda *args: population)
    assert_refused(complete, "genome 0 of generation 0 differs")


def test_a_journal_with_other_scores_is_refused(complete):
    with sqlite3.connect(complete / JOURNAL) as journal:
        journal.execute("UPDATE candidate SET score = 0.5 WHERE generation = 0 AND place = 3")
    journal.close()
    assert_refused(complete, "genome 3 of generation 0 differs")


def test_a_journal_keeps_no_evaluation_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    outcome = Outcome(Status.OK, 0.5, 0.5, 1.5, 500, 1.25, "digest")
    with open_journal(tmp_path, {}) as opened:
        tracemalloc.start()
        for seed in range(3000):
            trial = Trial(zoo.adam, MINI, seed)
            opened.add(Entry(0, 0, f"key {seed}", trial, outcome))
            if seed == 2200:  # the interpreter keeps the memory of 2000 tuples for others
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(opened) == 3000
    assert after - before < 10_000  # bytes; 800 entries take a hundred times as many


def test_an_entry_comes_back_as_it_was(tmp_path):
    trial = Trial(zoo.evolved_2025, MINI, 7, Purpose.REPORT)
    outcome = Outcome(Status.OK, 0.1 + 0.2, 1 / 3, 1e-17, 500, 1.25, "digest", 0.7)
    entry = Entry(3, 4, canonical_key(trial.optimizer), trial, outcome)
    with open_journal(tmp_path, {}) as journal:
        journal.add(entry)
    with open_journal(tmp_path, {}) as journal:
        assert journal.find(entry.key, MINI, 7, Purpose.REPORT) == entry
        assert journal.find(entry.key, MINI, 8, Purpose.REPORT) is None
        assert journal.find(entry.key, MINI, 7, Purpose.SEARCH) is None
        assert len(journal) == 1


def test_a_pool_of_one_leaves_the_number_of_threads(training):
    before = torch.get_num_threads()
    with open_pool(CONDITIONS, workers=1, threads=before + 1) as workers:
        list(workers.run([Trial(zoo.adam, MINI, 0)]))
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_history_has_no_times(training, tmp_path):
    text = history_csv(evolve(SETTINGS, tmp_path).history)
    header = text.splitlines()[0]
    assert "seconds" not in header
    assert header.startswith("generation,best_fitness,mean_fitness,best_so_far,best_accuracy,")
    assert pathlib.Path(tmp_path / "history.csv").read_text() == text
