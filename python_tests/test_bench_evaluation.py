"""bench/evaluation.py on the embedded images: its figures, its page, and what it resumes."""

import csv
import dataclasses
import json
import math
import re
import statistics
import sys
from collections import Counter
from types import SimpleNamespace

import agreement
import evaluation
import pytest
import step_profile
import torch
from agreement import GENOMES, Job, all_jobs, compare_means, run_jobs
from evaluation import page, profile_loop, seconds_a_genome

from evokernels.errors import SettingsError
from evokernels.evolution.trial import Conditions
from evokernels.tasks import ImageData, load_images

MINI = "fashion_mnist_mini"
SHORT = Conditions(steps=3, batch_size=16, train_samples=64)


@pytest.fixture(autouse=True)
def one_thread():
    """One worker too, then: it is this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_few(*_):
    """The embedded images, few of them to test with."""
    data = load_images(MINI)
    return dataclasses.replace(data, x_test=data.x_test[:100], y_test=data.y_test[:100])


@pytest.fixture
def small(monkeypatch):
    """A protocol of seconds."""
    monkeypatch.setattr(evaluation, "PROTOCOL", SHORT)
    monkeypatch.setattr(evaluation, "TASKS", (MINI,))
    monkeypatch.setattr(evaluation, "PROFILED", (MINI,))
    monkeypatch.setattr(evaluation, "SEEDS", (0,))
    monkeypatch.setattr(evaluation, "LOADERS", (0,))
    monkeypatch.setattr(evaluation, "PROBE_STEPS", 1)
    monkeypatch.setattr(evaluation, "get_task", lambda name: SimpleNamespace(load=load_few))


def test_the_command_writes_what_it_measured(small, monkeypatch, tmp_path, capsys):
    options = "--loops source float32 --passes 1 --steps 1 --profile 2 --out"
    monkeypatch.setattr(sys, "argv", ["bench/evaluation.py", *options.split(), str(tmp_path)])
    assert evaluation.main() == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["steps measured"] == [1, 2]
    assert results["command"].startswith("python bench/evaluation.py --loops source float32")
    text = (tmp_path / "evaluation.md").read_text()
    assert text == "\n".join(page(results)) + "\n"
    assert text.strip() in capsys.readouterr().out
    assert "Extrapolated" in text
    assert "| fitness, 2 steps |" in text
    (measured,) = results["passes"]
    assert measured.keys() == {"source", "float32"}
    for loop in measured.values():
        assert loop["1"] > 0
        assert loop["2"] > 0
        assert 0 < loop["fitness"] < 1
    assert measured["float32"]["start"] > 0
    for loop in results["profiles"][MINI].values():
        assert {"update", "batches", "convolution, backward"} <= loop.keys()


def results(passes, lengths):
    return {
        "command": "the command",
        "processor": "a processor",
        "threads": 2,
        "versions": {"torch": "1.0"},
        "update": "cpu: m v",
        "steps measured": lengths,
        "loaders": {"cifar10": {"seconds": {"2": 3.0, "0": 4.0}, "chosen": 2}},
        "passes": passes,
        "profiles": {"cifar10": {"source": {"update": 10.0, "rest": 30.0}, "float32": {"rest": 4}}},
    }


def test_ratios_are_medians_of_ratios_within_a_pass():
    passes = [
        {
            "source": {"500": source, "fitness": 0.5},
            "float32": {"500": ours, "start": 1.0, "fitness": 0.5},
        }
        for source, ours in ((100.0, 50.0), (200.0, 50.0), (90.0, 30.0))
    ]
    text = "\n".join(page(results(passes, [500])))
    assert "| source | 100.0 | 90.0–200.0 | 1.00 | 0.5000 | — |" in text
    assert "| ours, float32 | 50.0 | 30.0–50.0 | 3.00 | 0.5000 | 1.0 |" in text
    assert "Measured as it stands" in text
    assert "| update | 10.00 ms, 25.0% | — |" in text
    assert "| **step** | **40.00 ms** | **4.00 ms** |" in text
    assert "source 25.0%, float32 0.0%" in text


@pytest.mark.parametrize(
    ("measured", "lengths", "seconds"),
    [({"500": 7.0}, [500], 7.0), ({"50": 15.0, "100": 20.0}, [50, 100], 60.0)],
)
def test_a_shorter_run_is_extrapolated_along_a_line(measured, lengths, seconds):
    assert seconds_a_genome(measured, lengths) == pytest.approx(seconds)


# Profile


@pytest.mark.parametrize("loop", ["source", "float32"])
def test_a_profile_knows_what_operations_are_for(small, loop):
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (64,))
    constants = ((0.5,) * 3,) * 2
    data = ImageData("random", images, labels, images, labels, *constants, classes=10)
    spent = profile_loop(loop, "cifar10", data, 0, 1)
    expected = {"update", "batches", "convolution, forward", "convolution, backward"}
    assert expected | {"matrix products", "loss"} <= spent.keys()


def test_what_happens_once_is_not_in_a_step(monkeypatch):
    profiles = {
        1: Counter({"update": 2.0, "rest": 5.0, "start": 3.0}),
        11: Counter({"update": 12.0, "rest": 25.0, "start": 3.0, "copies": 10.0}),
    }
    monkeypatch.setattr(step_profile, "_profiled", lambda train, steps: profiles[steps])
    spent = step_profile.milliseconds_a_step(lambda steps: None, 10)
    assert spent == {"update": 1.0, "rest": 2.0, "start": 0.0, "copies": 1.0}


@pytest.mark.parametrize(
    ("chain", "group"),
    [
        (["aten::mul_", "update"], "update"),
        (["aten::mul", "Optimizer.step#FusedEvolvedOptimizer.step"], "update"),
        (["aten::index", "batches"], "batches"),
        (["enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__"], "batches"),
        (["aten::copy_", "aten::contiguous", "aten::conv2d"], "copies"),
        (["aten::mkldnn_convolution", "aten::_convolution"], "convolution, forward"),
        (["aten::empty", "aten::convolution_backward"], "convolution, backward"),
        (["aten::sum", "autograd::engine::evaluate_function: AddmmBackward0"], "matrix products"),
        (["aten::mul", "autograd::engine::evaluate_function: MulBackward0"], "dropout"),
        (["aten::native_batch_norm_backward"], "batch norm"),
        (["aten::max_pool2d_with_indices_backward"], "pooling"),
        (["aten::threshold_backward"], "ReLU"),
        (["ConvPool"], "fused: ConvPool"),
        (["aten::mkldnn_convolution", "ConvPool"], "convolution, forward"),
        (["ConvPoolBackward"], "fused: ConvPoolBackward"),
        (["aten::item"], "rest"),
        (["AddmmBackward0"], "rest"),
    ],
)
def test_operations_are_grouped(chain, group):
    class Event:
        def __init__(self, name, cpu_parent):
            self.name, self.cpu_parent = name, cpu_parent

    event = None
    for name in reversed(chain):
        event = Event(name, event)
    assert step_profile._group(event) == group


# Agreement


@pytest.fixture
def counted(monkeypatch):
    """Training that takes no time; what was trained."""
    trained = []

    def train(job, conditions, data_dir):
        trained.append(job)
        bonus = {"source": 0.0, "float32": 0.001, "bfloat16": 0.1}[job.loop]
        return {"fitness": 0.5 + 0.01 * job.seed + bonus, "accuracy": 0.5, "seconds": "1"}

    monkeypatch.setattr(agreement, "_train", train)
    return trained


def nothing(*progress):
    pass


def test_what_has_a_row_is_not_trained_again(counted, tmp_path):
    path = tmp_path / "agreement.csv"
    jobs = all_jobs(["source"])
    assert len(jobs) == len(set(jobs)) == 72
    assert {job.seed for job in jobs[:24]} == {0}
    run_jobs(jobs[:5], SHORT, path, None, nothing)
    run_jobs(jobs[:8], SHORT, path, None, nothing)
    assert counted == jobs[:8]
    with path.open() as file:
        assert [row["genome"] for row in csv.DictReader(file)] == list(GENOMES)
    run_jobs(jobs[:2], dataclasses.replace(SHORT, steps=4), path, None, nothing)
    assert counted[8:] == jobs[:2], "other conditions are other runs"


def test_means_are_compared_with_their_standard_error(counted, tmp_path):
    path = tmp_path / "agreement.csv"
    run_jobs(all_jobs(["source", "float32", "bfloat16"]), SHORT, path, None, nothing)
    text = "\n".join(compare_means(path, SHORT))
    # of each genome: seeds .00 .01 .02 beside its mean, in both loops
    error = math.sqrt(2 * statistics.variance([0.0, 0.01, 0.02]) / 3)
    assert f"| adam | 3 | 0.5100 | 0.5110 | +0.0010 | {error:.4f} |" in text
    found = re.findall(
        r"in (\w+) differs by (\S+), (less|NOT less) than the standard error (\S+)", text
    )
    assert [(loop, verdict) for loop, _, verdict, _ in found] == [
        ("float32", "less"),
        ("bfloat16", "NOT less"),
    ]
    assert float(found[0][1]) == pytest.approx(0.001)
    assert float(found[0][3]) == pytest.approx(error / math.sqrt(len(GENOMES)), abs=1e-5)
    assert not list(compare_means(path, dataclasses.replace(SHORT, steps=4)))


def test_a_real_row(monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "get_task", lambda name: SimpleNamespace(load=load_few))
    path = tmp_path / "agreement.csv"
    jobs = [Job(loop, "adam", MINI, 0) for loop in ("source", "float32")]
    run_jobs(jobs, SHORT, path, None, nothing)
    with path.open() as file:
        source, ours = csv.DictReader(file)
    assert source["rule"] == ours["rule"]
    assert 0 < float(source["fitness"]) < 1
    assert 0 < float(ours["fitness"]) < 1


def test_a_file_of_another_form_is_refused(counted, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SettingsError, match="columns"):
        run_jobs(all_jobs(["source"]), SHORT, path, None, nothing)
    assert path.read_text() == "a,b\n1,2\n"
