"""What a run leaves for TensorBoard, read back from its event files."""

import dataclasses
import json
import sqlite3
import sys

import commandline
import pytest
from synthetic import SyntheticTraining, killed_after

from evokernels.errors import SettingsError
from evokernels.evolution import journal, pool
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.coevolving import coevolve
from evokernels.evolution.journal import JOURNAL
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.tensorboard import TensorBoardLog
from evokernels.evolution.trial import Conditions
from evokernels.search.coevolution import CoevolutionConfig
from evokernels.search.genetic import GeneticConfig

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(
    steps=200, batch_size=32, train_samples=128, validation_samples=100, hurdle=True
)
SETTINGS = RunSettings(
    search=GeneticConfig(population=8, generations=4, elites=2, tournament=3, seed=1),
    tasks=(MINI, "mnist"),
    seeds=(0, 1),
    conditions=CONDITIONS,
    comparison_seeds=2,
    threads=1,
)


@pytest.fixture
def training(monkeypatch):
    fake = SyntheticTraining()
    monkeypatch.setattr(pool, "evaluate", fake)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    return fake


def logged(folder):
    """Of every name the steps and values in the event files, in the order in which they are read;
    told apart from each other, however many files there are."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = {}
    for path in sorted(folder.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def run(folder):
    with TensorBoardLog(folder / "tensorboard") as log:
        return evolve(SETTINGS, folder, on_generation=log.add)


def test_the_events_are_the_history_and_the_journal(training, tmp_path):
    history = run(tmp_path).history
    found = logged(tmp_path / "tensorboard")
    with sqlite3.connect(tmp_path / JOURNAL) as connection:
        genomes = connection.execute("SELECT generation, genome FROM candidate").fetchall()
    connection.close()
    steps = [1, 2, 3, 4]
    for name, values in {
        "fitness/best": [entry.best for entry in history],
        "fitness/best_so_far": [entry.best_so_far for entry in history],
        "fitness/mean": [entry.spread.mean for entry in history],
        "mnist/best": [entry.task_best["mnist"] for entry in history],
        f"{MINI}/mean": [entry.task_spread[MINI].mean for entry in history],
        "runs/evaluations": [entry.evaluations for entry in history],
        "genomes/stopped": [entry.stopped for entry in history],
    }.items():
        assert [step for step, _ in found[name]] == steps
        assert [value for _, value in found[name]] == pytest.approx(values)
    for name in ("ADAM_TERM", "MOMENTUM"):
        shares = {step: share for step, share in found[f"terms/{name}"]}
        for number in steps:
            asked = [json.loads(text) for of, text in genomes if of == number - 1]
            having = sum(name in genome["term_types"] for genome in asked)
            assert shares.get(number, 0.0) == pytest.approx(having / 8)


def test_a_run_that_resumes_logs_nothing_twice(training, tmp_path):
    run(tmp_path / "whole")
    whole, count = logged(tmp_path / "whole" / "tensorboard"), len(training.trials)
    for killed in (count // 2, count // 4, 1):
        with killed_after(training, killed):
            run(tmp_path / "killed")
    run(tmp_path / "killed")
    run(tmp_path / "killed")
    assert logged(tmp_path / "killed" / "tensorboard") == whole


def test_a_run_that_began_without_logs_all_of_its_generations(training, tmp_path):
    evolve(SETTINGS, tmp_path)
    run(tmp_path)
    assert [step for step, _ in logged(tmp_path / "tensorboard")["fitness/best"]] == [1, 2, 3, 4]


def test_a_coevolution_is_logged(training, tmp_path):
    settings = CoevolutionSettings(
        search=CoevolutionConfig(first=4, second=3, generations=2, elites=1, tournament=2),
        tasks=(MINI,),
        seeds=(0,),
        conditions=dataclasses.replace(CONDITIONS, hurdle=False),
        comparison_seeds=1,
        threads=1,
        max_parameters=20_000,
    )
    with TensorBoardLog(tmp_path / "tensorboard") as log:
        history = coevolve(settings, tmp_path, on_generation=log.add).history
    found = logged(tmp_path / "tensorboard")
    best = [(entry.number + 1, pytest.approx(entry.best.fitness)) for entry in history]
    assert found["pair/fitness"] == best
    means = [entry.architectures.mean for entry in history]
    assert [value for _, value in found["architectures/mean"]] == pytest.approx(means)
    assert any(name.startswith("terms/") for name in found)


def test_without_tensorboard_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"pip install evokernels\[tensorboard\]"):
        TensorBoardLog(tmp_path)


def test_the_option_opens_a_log_in_the_run_folder(tmp_path):
    class Options:
        tensorboard = True
        out = tmp_path

    with commandline.generation_log(Options) as log:
        log(1, {"fitness/best": 0.5})
    assert logged(tmp_path / "tensorboard") == {"fitness/best": [(1, 0.5)]}
    Options.tensorboard = False
    Options.out = tmp_path / "other"
    with commandline.generation_log(Options) as log:
        log(1, {"fitness/best": 0.5})
    assert not Options.out.exists()
