"""bench/gpu.py without a GPU: exit codes, and all of its code with the host in a GPU's place."""

import copy
import dataclasses
import json
import pathlib
import re
import shutil
import statistics
import sys
import time
import types

import gpu
import gpu_evaluation
import gpu_report
import gpu_steps
import gpu_tests
import gpu_timing
import own_terms
import pytest
import timing
import torch
from contestants import Work
from gpu_timing import DeviceStopwatch, Gpu
from timing import median_of

from evokernels import zoo
from evokernels.evolution import evaluator
from evokernels.evolution.trial import Conditions

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")


class HostEvent:
    """Stands for a CUDA event: nothing is queued on the host, so a mark is a time."""

    def __init__(self, log):
        self.log, self.time = log, None

    def record(self):
        self.log.append("event")
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


class Host:
    """Stands for a `Gpu`, and keeps what was asked of it."""

    device = torch.device("cpu")
    cache = 1000
    copied = 4096

    def __init__(self):
        self.log, self.stalls = [], []

    def wait(self):
        self.log.append("wait")

    def event(self):
        return HostEvent(self.log)

    def stall(self, seconds):
        self.log.append("stall")
        self.stalls.append(seconds)

    def describe(self):
        return {"gpu": "Tesla T4", "compute capability": "7.5"}

    def clocks(self):
        return {"clocks.sm [MHz]": "1590 MHz"}


@pytest.fixture
def tiny(monkeypatch):
    """Ours on the CPU, two cases of little work, short passes, everybody there but torch.compile"""
    for module in (gpu_steps, gpu_report):
        monkeypatch.setattr(module, "OURS", {"cpu": "ours, CPU", "triton": "ours, Triton"})
    monkeypatch.setitem(gpu_steps.CASES, "SmallCNN", Work(((5, 3), (7,))))
    monkeypatch.setitem(gpu_steps.CASES, "64M", Work(((100,),), dtype=torch.bfloat16))
    for case in ("SmallCNN", "64M"):
        monkeypatch.setitem(gpu_steps.LEFT_OUT, (case, "torch.compile"), "it takes long")
    monkeypatch.setattr(timing, "MOST", 2)
    monkeypatch.setattr(gpu_evaluation, "PROTOCOL", Conditions(2, 16, 64))
    monkeypatch.setattr(gpu, "SHORT", Conditions(2, 16, None))
    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = lambda *args, adam_w_mode, **kwargs: torch.optim.AdamW(
        *args, **kwargs, fused=adam_w_mode
    )
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs gpu.py on a `Host`; returns exit code, stdout and stderr."""

    def run(*arguments, device=Host):
        monkeypatch.setattr(gpu, "find_gpu", device)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), *arguments])
        return gpu.main(), *capsys.readouterr()

    return run


def marked_tests(folder, text):
    """A folder of tests like python_tests, in a process that believes it has a GPU."""
    folder.mkdir()
    shutil.copy(CONFTEST, folder)
    believe = "import pytest, torch\ntorch.cuda.is_available = lambda: True\n"
    (folder / "test_marked.py").write_text(believe + text)
    return folder


ALL_RIGHT = """
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_right(backend):
    pass

def test_not_marked():
    assert False
"""
ONE_OF_EACH = """
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_some(number, backend):
    assert (backend, number) != ("cuda", 1), "planted"
    if (backend, number) == ("triton", 2):
        pytest.skip("only one of two GPUs is here")

@pytest.fixture
def broken():
    raise OSError("no such thing")

@pytest.mark.gpu
def test_of_none(broken):
    pass
"""


# Without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_writes_nothing(command, tmp_path):
    code, out, err = command(device=gpu_timing.find_gpu)
    assert (code, out) == (gpu.NO_GPU, "")
    assert gpu.NO_GPU == 3
    assert err.startswith("no GPU: torch ")
    assert err.endswith("; nothing was run or written\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_line_says_what_was_looked_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, finds no CUDA device" in gpu.what_torch_has()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.what_torch_has().endswith("is built without CUDA")


def test_help_documents_options_and_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as exit:
        command("--help")
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("parts", "cases", "passes", "quick", "task", "data-dir", "out"):
        assert f"--{option} " in text
    for meaning in ("0 all that ran is right", "1 something is not", "2 an error", "3 there is no"):
        assert meaning in text


@pytest.mark.parametrize(
    "arguments", [("--parts", "all"), ("--cases", "65M"), ("--passes", "0"), ("--passes", "few")]
)
def test_wrong_options_are_turned_down(command, arguments):
    with pytest.raises(SystemExit) as exit:
        command(*arguments)
    assert exit.value.code == 2


def test_an_unknown_task_is_an_error_before_anything_runs(command, tmp_path):
    code, out, err = command("--task", "imagenet")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown task 'imagenet'")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_an_error(command, tmp_path):
    (tmp_path / "out").write_text("precious")
    code, _, err = command("--parts", "steps")
    assert code == 2
    assert err.startswith("error: cannot write")
    assert (tmp_path / "out").read_text() == "precious"


# All of it, on the host


def test_a_whole_run(command, tiny, tmp_path, monkeypatch):
    folder = marked_tests(tmp_path / "tests", ALL_RIGHT)
    monkeypatch.setattr(gpu, "run_tests", lambda: gpu_tests.run_tests(folder))
    monkeypatch.setitem(gpu_steps.LEFT_OUT, ("SmallCNN", "ours, Triton"), "it is not here")
    code, out, _ = command("--cases", "SmallCNN", "64M", "--quick", "--passes", "2")
    page = (tmp_path / "out" / "gpu_tesla_t4.md").read_text()
    results = json.loads((tmp_path / "out" / "gpu_tesla_t4.json").read_text())
    assert code == 0, page
    assert out.startswith(page)
    assert "All that ran (tests, steps, first steps, evaluation) is right." in page

    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["apex"] == "not installed"
    assert "| compute capability | 7.5 |" in page

    right = {"passed": 1, "failed": 0, "skipped": 0}
    assert results["tests"]["python_tests"]["backends"] == {"cpu": right, "triton": right}
    assert "| triton | 1 | 0 | 0 |" in page

    assert list(results["steps"]) == ["SmallCNN", "64M"]
    small, large = results["steps"].values()
    assert (small["elements"], small["tensors"]) == (22, 2)
    assert "22 elements in 2 tensors" in page
    assert "100 elements in 1 tensor;" in page
    there = ["ours, CPU", "AdamW(fused=True)", "AdamW(foreach=True)", "apex FusedAdam"]
    there.append("source eager")
    assert [row["contestant"] for row in small["contestants"]] == there
    assert small["absent"]["torch.compile"] == "it takes long"
    assert "- torch.compile was not measured: it takes long" in page
    # on the host there is no such backend
    assert "ours, Triton" in large["absent"]
    for case, bytes_each in ((small, [28, 28, None, None, None]), (large, [22, 14, *[None] * 3])):
        assert [row["bytes an element"] for row in case["contestants"]] == bytes_each
        for row in case["contestants"]:
            assert row["device, seconds"] > 0 < row["host, seconds"]
            assert {kind: len(times) for kind, times in row["passes"].items()} == {
                "device": 2,
                "host": 2,
            }
    ours = large["contestants"][0]
    assert ours["backend"].startswith("cpu: evk_g_m_v_bfloat16")
    assert ours["times the first"] == 1
    assert ours["bytes a second"] == pytest.approx(22 * 100 / ours["device, seconds"])
    copied = 2 * 4 * Host.copied  # bytes read and written
    taken = statistics.median(large["passes of the copy"])
    assert large["copy, bytes a second"] == pytest.approx(copied / taken)
    assert ours["of the copy"] == ours["bytes a second"] / large["copy, bytes a second"]

    first = results["first steps"]["own terms"]
    assert first["seconds"]["ours, CPU"]["compiled"] > first["seconds"]["ours, CPU"]["from disk"]
    assert list(first["absent"]) == ["ours, Triton"]
    assert re.search(r"## The first step of a rule.*\n\| ours, CPU \| [0-9.]+ .?s \|", page, re.S)

    evaluation = results["evaluation"]["fashion_mnist_mini"]
    assert (evaluation["steps"], evaluation["training images"]) == (2, 5000)
    evaluator, source = evaluation["fitness"].values()
    assert evaluator == pytest.approx(source, abs=0.02)
    assert evaluation["times as fast"] > 0
    assert "fashion_mnist_mini: 2 steps of 16 images, out of 5,000" in page
    assert "Afterwards: clocks.sm [MHz] 1590 MHz." in page


def test_a_part_alone(command, tiny, tmp_path):
    code, out, _ = command("--parts", "steps", "--cases", "64M", "--passes", "1")
    assert code == 0
    assert "All that ran (steps) is right." in out
    assert json.loads((tmp_path / "out" / "gpu_tesla_t4.json").read_text()).keys() == {
        *("environment", "broken", "steps")
    }


def test_a_case_that_breaks_off_leaves_the_others(command, tiny, monkeypatch):
    measure_case = gpu.measure_case

    def breaks(name, *rest):
        if name == "64M":
            raise RuntimeError("an illegal memory access")
        return measure_case(name, *rest)

    monkeypatch.setattr(gpu, "measure_case", breaks)
    code, out, _ = command("--parts", "steps", "--cases", "64M", "SmallCNN", "--passes", "1")
    assert code == 1
    assert "- **64M broke off: RuntimeError: an illegal memory access**" in out
    assert "Traceback" in out
    assert "### SmallCNN" in out


def test_a_contestant_that_is_wrong_has_no_row(command, tiny, monkeypatch):
    def wrong(genome, parameters, *rest):
        for p in parameters:
            p.add_(0.1)

    monkeypatch.setattr("contestants.update_all", wrong)
    code, out, _ = command("--parts", "steps", "--cases", "64M", "--passes", "1")
    assert code == 1
    assert "- **64M: source eager: AssertionError: Tensor-likes are not close!" in out
    assert "- source eager was not measured: " in out
    assert "| source eager |" not in out


def test_both_evaluations_train_alike(monkeypatch):
    # with dropout as torch has it, which is what a GPU trains with
    monkeypatch.setattr(evaluator, "computing", lambda model, *_, plain: model)
    found = gpu_evaluation.compare_evaluations(
        "fashion_mnist_mini", Conditions(20, 64, None), None, torch.device("cpu"), passes=1
    )
    ours, source = found["fitness"].values()
    assert ours == pytest.approx(source, abs=0.01)
    assert ours > 0.3  # chance is 0.1


# Timing


def test_the_cases_are_those_of_the_issue():
    sizes = {name: (work.elements, len(work.shapes)) for name, work in gpu_steps.CASES.items()}
    assert sizes == {
        "SmallCNN": (824_458, 8),
        "CIFAR net": (sizes["CIFAR net"][0], sizes["CIFAR net"][1]),
        "MLP of 100K": (101_770, 4),
        "1,000 x 64": (64_000, 1000),
        "ResNet-18 of 12.5M": (sizes["ResNet-18 of 12.5M"][0], 62),
        "64M": (64_000_000, 1),
        "64M bfloat16, float32 state": (64_000_000, 1),
        "64M bfloat16, bfloat16 state": (64_000_000, 1),
        **{
            f"16M, {rule}": (16_000_000, 16)
            for rule in ("lion", "adabelief", "cautious_adam", "three moments, exp and tanh")
        },
    }
    assert sizes["ResNet-18 of 12.5M"][0] == pytest.approx(12.5e6, rel=0.01)
    classic = [work for name, work in gpu_steps.CASES.items() if name not in gpu_steps.OWN_CASES]
    kinds = [(work.dtype, work.state_dtype) for work in classic]
    assert kinds[-3:] == [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
    ]
    assert {work.genome for work in classic} == {zoo.evolved_2025}


@pytest.mark.parametrize("case", gpu_steps.OWN_CASES)
def test_rules_beyond_the_classic_catalogue_are_timed(command, tiny, monkeypatch, case):
    work = dataclasses.replace(gpu_steps.CASES[case], shapes=((5, 3), (7,)))
    monkeypatch.setitem(gpu_steps.CASES, case, work)
    monkeypatch.setitem(gpu_steps.LEFT_OUT, (case, gpu_steps.EXPORTED_COMPILED), "it takes long")
    code, out, _ = command("--parts", "steps", "--cases", case, "--passes", "1")
    assert code == 0, out
    rows = re.findall(r"^\| ([^|]+) \| [0-9.]+ .?s ", out, re.M)
    assert rows == ["ours, CPU", "AdamW(fused=True)", "exported"]
    assert "- exported, torch.compile was not measured: it takes long" in out


def test_a_first_step_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(own_terms, "FIRST_STEP", "raise SystemExit('out of memory')")
    with pytest.raises(RuntimeError, match="out of memory"):
        own_terms.first_step("float32")


class Slow:
    """A contestant whose step takes the host a while, and who logs what happens."""

    def __init__(self, log):
        self.log = log

    def prepare(self, *, new):
        self.log.append("new gradients" if new else "same gradients")

    def step(self):
        time.sleep(0.002)
        self.log.append("step")


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(timing, "MOST", 3)
    return Host()


def test_device_time_is_between_events_with_the_device_held_back_before(host):
    stopwatch = DeviceStopwatch(host)
    stopwatch._flushed = types.SimpleNamespace(zero_=lambda: host.log.append("flush"))
    ways = stopwatch.ways(Slow(host.log))
    assert ways["device"]() > 0.001
    warm_up, rounds = host.log[:8], host.log[8:]
    assert warm_up == ["new gradients", "wait", "step", "wait"] * 2
    one = ["same gradients", "flush", "stall", "event", "step", "event", "wait"]
    assert rounds == one * (len(rounds) // len(one))
    assert len(rounds) >= 4 * len(one)
    assert min(host.stalls) > 2 * 0.002  # longer than the host takes to launch the step


def test_host_time_neither_waits_nor_has_the_device_busy(host):
    assert DeviceStopwatch(host).ways(Slow(host.log))["host"]() > 0.001
    assert host.log[:4] == ["new gradients", "wait", "step", "wait"]
    assert set(host.log) == {"new gradients", "wait", "step"}


def test_the_copy_moves_what_it_says(host):
    (way,) = DeviceStopwatch(host).wall(Work(((1,),))).values()
    assert way() > 0


def test_a_pass_has_as_many_steps_as_fit_into_it(monkeypatch):
    calls = []

    def timed(seconds):
        calls.append(seconds)
        return seconds

    for seconds, rounds in ((1.0, timing.FEWEST), (0.003, 10), (1e-6, timing.MOST)):
        calls.clear()
        median_of(lambda seconds=seconds: timed(seconds))
        assert len(calls) == 2 + rounds


T4 = types.SimpleNamespace(
    **{"name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40, "uuid": "4e1f"},
    **{"total_memory": 16 << 30, "L2_cache_size": 4 << 20},
)


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as `Gpu` calls it; a device whose clock makes 10^9 cycles a second."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = sum(slept)

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e9 * 1e3

    if hasattr(torch._C, "_CudaDeviceProperties"):  # torch is built for CUDA
        assert vars(T4).keys() <= set(dir(torch._C._CudaDeviceProperties))
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda device: T4,
        "synchronize": lambda device: None,
        "Event": Event,
        "_sleep": slept.append,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "WARM_UP", 0.01)
    return slept


def test_a_gpu_is_described_and_its_clock_measured(fake_cuda, monkeypatch, tmp_path):
    answers = tmp_path / "nvidia-smi"
    answers.write_text(
        "#!/bin/sh\n"
        'test "$1" = --id=GPU-4e1f || exit 6\n'
        'echo "driver_version, clocks.max.sm [MHz]"\n'
        'echo "580.65.06, 1590 MHz"\n'
    )
    answers.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = gpu_timing.find_gpu()
    assert found.device == torch.device("cuda", 0)
    described = found.describe()
    assert (described["gpu"], described["compute capability"]) == ("Tesla T4", "7.5")
    assert described["clocks.max.sm [MHz]"] == "1590 MHz"
    found.stall(0.25)
    assert fake_cuda[-1] == 250_000_000
    answers.write_text("#!/bin/sh\nexit 9\n")
    assert found.clocks() == {}
    answers.unlink()
    assert found.clocks() == {}


@pytest.mark.parametrize("path", ["bench/gpu_timing.py", "python_tests/test_gpu.py"])
def test_what_is_asked_of_torch_cuda_is_there(path):
    """No typo waits for the day on which there is a GPU."""
    text = (gpu.ROOT / path).read_text(encoding="utf-8")
    names = set(re.findall(r"torch\.cuda\.(\w+)", text))
    assert len(names) >= 5
    assert {name for name in names if not hasattr(torch.cuda, name)} == set()


def test_the_stand_in_has_what_a_gpu_has(fake_cuda):
    def names(value):
        return {name for name in dir(value) if not name.startswith("_")}

    assert names(Host()) == names(Gpu()) | {"log", "stalls"}


# Tests in a process of their own


def test_results_are_counted_by_backend(tmp_path):
    found = gpu_tests.run_tests(marked_tests(tmp_path / "tests", ONE_OF_EACH))
    assert found["command"] is None
    assert found["backends"] == {
        "cuda": {"passed": 2, "failed": 1, "skipped": 0},
        "triton": {"passed": 2, "failed": 0, "skipped": 1},
        gpu_tests.ELSE: {"passed": 0, "failed": 1, "skipped": 0},
    }
    assert found["skips"] == {"only one of two GPUs is here": 1}
    planted, error = found["failures"].items()
    assert planted[0].endswith("test_some[1-cuda]")
    assert "planted" in planted[1]
    assert "no such thing" in error[1]


def test_tests_that_cannot_run_are_a_problem(tmp_path):
    for name, text, part in (
        ("none", "def test_not_marked():\n    pass\n", "pytest found no tests"),
        ("bad", "import no_such_module\n", "pytest did not finish"),
    ):
        found = gpu_tests.run_tests(marked_tests(tmp_path / name, text))
        assert part in found["command"]
        assert gpu_report.problems({"broken": {}, "tests": {"python_tests": found}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_marked_tests_are_skipped_with_a_reason_where_there_is_no_gpu(tmp_path):
    folder = marked_tests(tmp_path / "tests", ONE_OF_EACH)
    text = (folder / "test_marked.py").read_text()
    (folder / "test_marked.py").write_text(text.replace("lambda: True", "lambda: False"))
    found = gpu_tests.run_tests(folder)
    assert found["skips"] == {f"torch {torch.__version__} finds no CUDA device": 7}
    assert gpu_report.problems({"broken": {}, "tests": {"python_tests": found}}) == [
        "no test of backend cuda passed",
        "no test of backend triton passed",
    ]


# The report


def row(contestant, seconds, share):
    return {
        "contestant": contestant,
        "backend": "cuda: g_m_v, float32",
        "device, seconds": seconds,
        "host, seconds": 8e-6,
        "spread": 0.02,
        "times the first": 1.0,
        "bytes an element": 28,
        "bytes a second": share * 270e9,
        "of the copy": share,
        "passes": {},
    }


def case(*rows):
    return {
        "elements": 1,
        "tensors": 1,
        "copy, bytes a second": 270e9,
        "contestants": list(rows),
        "absent": {},
        "failed": {},
        "passes of the copy": [],
        "afterwards": {},
    }


RESULTS = {
    "environment": {"gpu": "Tesla T4"},
    "broken": {},
    "steps": {
        "SmallCNN": case(row("ours, CUDA", 99e-6, 0.7), row("ours, Triton", 101e-6, 0.7)),
        "64M": case(row("ours, CUDA", 6.5e-3, 0.8501), row("ours, Triton", 6.7e-3, 0.8499)),
    },
}


def test_figures_stand_beside_what_is_expected_of_a_t4():
    page = "\n".join(gpu_report.page(RESULTS))
    for line in (
        "| SmallCNN | ours, CUDA | device | ≤ 100 µs | 99 µs | yes |",
        "| SmallCNN | ours, Triton | device | ≤ 100 µs | 101 µs | NO |",
        "| 64M | ours, CUDA | device | ≤ 6.6 ms | 6.5 ms | yes |",
        "| 64M | ours, Triton | device | ≤ 6.6 ms | 6.7 ms | NO |",
        "| 64M | ours, CUDA | of the copy | ≥ 85 % | 85 % | yes |",
        "| 64M | ours, Triton | of the copy | ≥ 85 % | 84 % | NO |",
    ):
        assert line in page.splitlines()
    better = copy.deepcopy(RESULTS)
    better["steps"]["64M"]["contestants"][0]["of the copy"] = 1.02
    assert "| 64M | ours, CUDA | of the copy | ≥ 85 % | 102 % | yes |" in "\n".join(
        gpu_report.page(better)
    )
    other = copy.deepcopy(RESULTS)
    other["environment"]["gpu"] = "NVIDIA H100 80GB HBM3"
    assert "Expected of this GPU" not in "\n".join(gpu_report.page(other))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["broken"].update(steps="Traceback\nOSError: gone\n"), "steps broke off: OSEr"),
        (
            lambda r: r["steps"]["64M"]["failed"].update({"ours, CUDA": "far\noff"}),
            "ours, CUDA: far",
        ),
        (lambda r: r.update(tests={"t": {"command": "pytest was killed"}}), "pytest was killed"),
    ],
)
def test_problems_stand_at_the_head(change, problem):
    results = copy.deepcopy(RESULTS)
    assert gpu_report.problems(results) == []
    change(results)
    assert any(problem in line for line in gpu_report.problems(results))
    page = list(gpu_report.page(results))
    assert page[2].startswith("- **")
    assert problem in page[2]


def test_a_report_replaces_the_last_one(tmp_path):
    results = {"environment": {"gpu": "NVIDIA GeForce RTX 4090"}, "broken": {}}
    for _ in range(2):
        files = gpu_report.write(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in files]
    assert files[0].name == "gpu_nvidia_geforce_rtx_4090.json"
