"""bench/evolve.py and bench/compare.py as a user runs them, killed processes included."""

import argparse
import contextlib
import csv
import importlib
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch

from evokernels import zoo
from evokernels.evolution.baselines import BASELINES
from evokernels.evolution.journal import JOURNAL

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    *("--population", "4", "--generations", "3", "--elites", "1", "--tournament", "2"),
    *("--steps", "2", "--train-samples", "64", "--validation-samples", "64"),
    *("--batch-size", "32", "--comparison-seeds", "1"),
)
DEADLINE = 60  # seconds until a step of a test counts as hung


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script of bench/ in this process; returns exit code, stdout and stderr."""
    monkeypatch.syspath_prepend(ROOT / "bench")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = importlib.import_module(script).main()
        return code, *capsys.readouterr()

    return run


# Settings


# the source system: its README, section 3, and the defaults of its notebook
SOURCE_SYSTEM = {
    "population": 50,
    "generations": 50,
    "elites": 3,
    "tournament": 4,
    "max_terms": 4,
    "run_seed": 42,
    "tasks": ("fashion_mnist", "cifar10", "mnist"),
    "seeds": (0, 1),
    "steps": 500,
    "batch_size": 128,
    "train_samples": 15000,
    "validation_samples": 0,
    "precision": "float32",
    "hurdle": False,
    "comparison_seeds": 3,
    "threads": 1,
    "device": "cpu",
    "race": False,
    "rotate_seeds": False,
    "finalists": 1,
    "plateau": 0,
    "refine": 0,
    "catalogue": "classic",
    "own_terms": (),
}
HONEST = {"validation_samples": 5000, "hurdle": True, "race": True, "finalists": 3}


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--parity"], {}),
        ([], HONEST),
        (["--no-race", "--no-hurdle"], {**HONEST, "race": False, "hurdle": False}),
        (["--parity", "--race"], {"race": True}),
        (["--rotate-seeds", "--plateau", "5"], {**HONEST, "rotate_seeds": True, "plateau": 5}),
        (["--refine", "40"], {**HONEST, "refine": 40}),
        (["--parity", "--catalogue", "wide"], {"catalogue": "wide"}),
        (["--precision", "bfloat16"], {**HONEST, "precision": "bfloat16"}),
    ],
)
def test_the_paper_preset_is_the_source_system_or_selects_honestly(monkeypatch, arguments, changed):
    monkeypatch.syspath_prepend(ROOT / "bench")
    evolve = importlib.import_module("evolve")
    precision = ["--precision", "float32"] if "--precision" not in arguments else []
    options = evolve.parse(["--preset", "paper", *precision, *arguments])
    settings = evolve.chosen_settings(options)
    assert settings.to_dict() == {**SOURCE_SYSTEM, **changed}
    assert settings.parity == (not changed)


def test_help_names_every_setting(command, capsys):
    with pytest.raises(SystemExit) as exit:
        command("evolve", "--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in (
        *("population", "generations", "elites", "tournament", "max-terms", "run-seed", "tasks"),
        *("seeds", "steps", "batch-size", "train-samples", "comparison-seeds", "threads"),
        *("validation-samples", "finalists", "plateau", "refine", "precision", "audit", "parity"),
        *("device", "preset", "out", "data-dir", "workers", "catalogue", "terms"),
    ):
        assert f"--{option} " in text
    for switch in ("hurdle", "race", "rotate-seeds"):
        assert f"--{switch}, --no-{switch}" in text


def test_options_override_the_preset(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    options = importlib.import_module("evolve").parse(["--preset", "paper", "--seeds", "3", "4"])
    assert (options.seeds, options.steps) == ([3, 4], None)
    assert options.out == pathlib.Path("runs/paper")


def test_workers_fill_the_cores(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    worker_count = importlib.import_module("commandline").worker_count
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    options = argparse.Namespace(workers=None)
    assert [worker_count(options, threads, "cpu") for threads in (1, 3, 16)] == [8, 2, 1]
    assert worker_count(options, 1, "cuda") == 1
    for device in ("cpu", "cuda"):
        assert worker_count(argparse.Namespace(workers=5), 4, device) == 5


# Errors: one line, exit code 2, nothing overwritten


def assert_one_line(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--tasks", "imagenet"), "imagenet"),
        (("--population", "1"), "population must be at least 2, got 1"),
        (("--seeds", "0", "0"), "seeds must be one or more different values, got 0 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--device", "tpu"), "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_a_bad_setting(command, tmp_path, arguments, part):
    result = command("evolve", *TINY, *arguments, "--out", tmp_path / "run")
    assert_one_line(result, part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["evolve", "compare"])
def test_a_device_that_is_not_there(command, tmp_path, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    mini = ("--tasks", "fashion_mnist_mini", "--steps", "1", "--device", "cuda")
    result = command(script, *mini, "--out", tmp_path / "run")
    assert_one_line(result, "device is 'cuda', but", "no CUDA device here; use cpu")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_folder(command, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    assert_one_line(command("evolve", *TINY, "--out", tmp_path), "is not a run folder")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_foreign_journal(command, tmp_path):
    (tmp_path / JOURNAL).write_bytes(b"precious" * 100)
    assert_one_line(command("evolve", *TINY, "--out", tmp_path), "not a journal of evokernels")
    assert (tmp_path / JOURNAL).read_bytes() == b"precious" * 100


@pytest.mark.parametrize("script", ["evolve", "compare"])
def test_a_folder_that_cannot_be_made(command, tmp_path, script):
    (tmp_path / "file").write_text("precious")
    mini = ("--tasks", "fashion_mnist_mini", "--steps", "1")
    assert_one_line(command(script, *mini, "--out", tmp_path / "file" / "run"), "cannot")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_unwritable_folder(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    result = subprocess.run(evolve_command(tmp_path / "run"), capture_output=True, text=True)
    assert_one_line((result.returncode, result.stdout, result.stderr), "cannot use")


def test_a_genome_file_with_a_typo(command, tmp_path):
    path = tmp_path / "typo.json"
    path.write_text(zoo.adam.to_json().replace("beta1", "bta1"))
    assert_one_line(command("compare", path, "--out", tmp_path / "out"), "typo.json", "bta1")
    assert not (tmp_path / "out").exists()


def test_an_optimizer_that_does_not_exist(command, tmp_path):
    result = command("compare", "adaam", "--out", tmp_path / "out")
    assert_one_line(result, "'adaam' is neither a genome file nor one of ", "adamw", "lion")


def test_a_missing_data_set(command, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: 1 / 0)  # no network
    arguments = ("--tasks", "mnist", "--data-dir", tmp_path / "data", "--workers", "1")
    code, out, err = command("evolve", *TINY, *arguments, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "mnist" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_other_settings_are_named(command, killed_and_resumed):
    _, broken = killed_and_resumed
    before = (broken / JOURNAL).read_bytes()
    result = command("evolve", *TINY, "--population", "5", "--out", broken)
    assert_one_line(result, "population 4 (now 5)", "--out")
    assert (broken / JOURNAL).read_bytes() == before


# Runs


def evolve_command(folder, workers=1):
    script = str(ROOT / "bench" / "evolve.py")
    return [sys.executable, script, *TINY, "--workers", str(workers), "--out", str(folder)]


def start(folder, workers, *options):
    """A run in a process group of its own; its stderr goes to a file beside its folder."""
    with errors_of(folder).open("w") as errors:
        return subprocess.Popen(
            [*evolve_command(folder, workers), *options],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            # a shell that runs the tests in its background has had them ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@contextlib.contextmanager
def ended_at_last(process):
    """Kills the process (SIGKILL) if it still runs at the end of the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE)


def errors_of(folder):
    # no pipe: a worker that outlives its parent would hold it open, and the test would hang
    return folder.with_name(f"{folder.name}.stderr")


def rows(folder):
    """Evaluations in a journal that another process is writing."""
    if not (folder / JOURNAL).exists():
        return 0
    connection = sqlite3.connect(f"file:{folder / JOURNAL}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT count(*) FROM evaluation").fetchone()[0]
    finally:
        connection.close()


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "hung"
        time.sleep(0.01)


def wait_until_rows(folder, count, process):
    wait_until(lambda: rows(folder) >= count or process.poll() is not None)


def wait_until_gone(pids):
    wait_until(lambda: not any(map(alive, pids)))


def children(pid):
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread may end while we look
            found += map(int, (task / "children").read_text().split())
    return found


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """The folders of an unbroken run, and of one that is killed twice on its way."""
    unbroken, broken = (tmp_path_factory.mktemp("runs") / name for name in ("unbroken", "broken"))
    with ended_at_last(start(unbroken, workers=1)) as whole:
        # in the second generation, with two workers; in the comparison, with one
        for kill_at, workers in ((5, 2), (11, 1)):
            with ended_at_last(start(broken, workers)) as process:
                wait_until_rows(broken, kill_at, process)
                offspring = children(process.pid)
                assert len(offspring) >= (workers if workers > 1 else 0)
            wait_until_gone(offspring)
        assert whole.wait(DEADLINE) == 0, errors_of(unbroken).read_text()
    assert rows(broken) < rows(unbroken)
    with ended_at_last(start(broken, workers=1)) as last:
        assert last.wait(DEADLINE) == 0, errors_of(broken).read_text()
    return unbroken, broken


def test_a_killed_run_ends_like_an_unbroken_one(killed_and_resumed):
    unbroken, broken = killed_and_resumed
    for name in ("history.csv", "best_genome.json"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    assert rows(broken) == rows(unbroken)
    assert (broken / "evolution.png").stat().st_size > 5000


def test_a_complete_run_shows_its_result_and_the_three_lines_run(command, killed_and_resumed):
    _, broken = killed_and_resumed
    code, out, err = command("evolve", *TINY, "--out", broken)
    assert (code, err) == (0, "")
    assert "was complete already" in out
    for part in ("lr = ", "p ← ", "| evolved ", "| adam ", "| adamw ", "overall fitness"):
        assert part in out
    text = " ".join(out.split())
    for part in (
        *("on the seeds and the validation split of the search:", "Steps saved by"),
        *(
            "On seeds 1, which the selection has not seen",
            "the test split, which selected nothing:",
        ),
    ):
        assert part in text
    assert "Parity" not in text
    lines = [line.strip() for line in out.splitlines()[-3:]]
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    scope = {"model": model}
    exec("\n".join(lines), scope)
    model(torch.ones(1, 3)).sum().backward()
    scope["optimizer"].step()
    assert not torch.equal(model.weight, before)


def test_parity_is_labelled_and_an_audit_reported(command, tmp_path):
    parity = (*TINY, "--parity", "--validation-samples", "0", "--workers", "1")
    code, out, _ = command("evolve", *parity, "--audit", "2", "--out", tmp_path)
    assert code == 0
    text = " ".join(out.split())
    for part in (
        *("Parity: this is the protocol of the source system.", "Audit: of 0 genomes that"),
        *("the test split of the search:", "test split, which is the one that selected:"),
        "ledger.csv, audit.csv and the journal",
    ):
        assert part in text
    with (tmp_path / "winner.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["protocol"], row["split"]) == ("parity", "test")


def ignores_ctrl_c(pid):
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", pathlib.Path(f"/proc/{pid}/status").read_text())
    return int(mask, 16) >> (signal.SIGINT - 1) & 1


def test_ctrl_c_in_the_middle_of_long_training_ends_at_once_and_says_how_to_resume(tmp_path):
    folder = tmp_path / "run"
    with ended_at_last(start(folder, 2, "--steps", "1000000")) as process:
        # two workers, ready, and multiprocessing's resource tracker
        wait_until(lambda: sum(map(ignores_ctrl_c, children(process.pid))) == 3)
        offspring = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert process.wait(DEADLINE) == 130
    wait_until_gone(offspring)
    errors = errors_of(folder).read_text()
    assert errors.splitlines()[-1].startswith("interrupted; all finished training runs are in ")
    assert "Traceback" not in errors


COMPARE = (
    *("--tasks", "fashion_mnist_mini", "--steps", "2", "--seeds", "0", "1", "--workers", "1"),
    *("--train-samples", "64", "--batch-size", "32"),
)


def test_compare_prints_and_writes_its_tables_and_goes_on(command, tmp_path):
    path = tmp_path / "mine.json"
    zoo.evolved_2025.save(path)
    folder = tmp_path / "out"
    tuned = *COMPARE, "--tune", "2", "--validation-samples", "64", "--out", folder
    code, out, _ = command("compare", "lion", path, *tuned)
    assert code == 0
    assert f"The comparison in {folder} is complete: 2 steps" in out
    assert "2 trials of each optimizer on seed 10000" in out
    assert "64 validation samples" in out
    assert f"| {path} " in out
    assert (folder / "comparison.png").stat().st_size > 5000
    table = (folder / "comparison.csv").read_bytes()
    runs = list(csv.DictReader(table.decode().splitlines()))
    assert [(run["optimizer"], run["tuned"], run["seed"]) for run in runs] == [
        (name, answer, seed)
        for answer in ("no", "yes")
        for name in ("lion", str(path))
        for seed in ("0", "1")
    ]
    assert all(0 < float(run["accuracy"]) < 1 for run in runs)

    code, again, err = command("compare", "lion", path, *tuned)
    assert (code, err) == (0, "")
    assert again == out.replace("is complete", "was complete already")
    assert (folder / "comparison.csv").read_bytes() == table


def test_compare_all_is_every_name_once(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    script = importlib.import_module("compare")
    contests = []
    monkeypatch.setattr(
        script, "compare", lambda contest, *args, **kwargs: contests.append(contest)
    )
    monkeypatch.setattr(script, "summary", lambda *args: "")
    script.run(script.parse(["adam", "all", *COMPARE]))
    script.run(script.parse([*COMPARE, "--tune", "3", "--precision", "float32"]))
    everything, default = contests
    assert set(everything.optimizers) == {*zoo.GENOMES, *zoo.WIDE, *BASELINES}
    assert next(iter(everything.optimizers)) == "adam"
    assert everything.optimizers["lion"] == BASELINES["lion"]
    assert (everything.trials, everything.conditions.validation_samples) == (0, 0)
    assert default.optimizers == zoo.GENOMES
    assert (default.trials, default.conditions.validation_samples) == (3, 5000)
    assert default.conditions.precision == "float32"


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ("auto", "cpu", "the best"),
        ("float32", "cpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_auto_is_the_best_precision(monkeypatch, given, device, expected):
    monkeypatch.syspath_prepend(ROOT / "bench")
    commandline = importlib.import_module("commandline")
    monkeypatch.setattr(commandline, "best_precision", lambda place: ("the best", "because"))
    assert commandline.resolved_precision(given, device) == expected


# bench/coevolve.py


COEVOLVE = (
    *("--architectures", "3", "--optimizers", "2", "--generations", "2", "--elites", "1"),
    *("--tournament", "2", "--max-parameters", "20000", "--steps", "2", "--train-samples", "64"),
    *("--validation-samples", "64", "--batch-size", "32", "--comparison-seeds", "2"),
)


@pytest.mark.parametrize("preset", ["quick", "real"])
def test_every_setting_of_a_coevolution_is_an_option(monkeypatch, preset):
    monkeypatch.syspath_prepend(ROOT / "bench")
    coevolve = importlib.import_module("coevolve")
    options = coevolve.parse(["--preset", preset, "--precision", "bfloat16"])
    settings = coevolve.PRESETS[preset]
    assert settings.to_dict().keys() <= vars(options).keys()
    assert settings.conditions.validation_samples > 0
    given = coevolve.with_options(settings.to_dict(), options)
    assert given == {**settings.to_dict(), "precision": "bfloat16"}
    assert options.out == pathlib.Path(f"runs/coevolve-{preset}")


@pytest.mark.parametrize(
    ("script", "folder"), [("evolve", "runs/<preset>"), ("coevolve", "runs/coevolve-<preset>")]
)
def test_help_says_where_a_run_goes(command, capsys, script, folder):
    with pytest.raises(SystemExit, match="0"):
        command(script, "--help")
    assert f"({folder})" in capsys.readouterr().out


def test_help_measures_nothing(command, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(importlib.import_module("cluster"), "run", lambda: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="0"):
        command("cluster", "--help")
    assert "Writes results/cluster.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tasks", "text"], "the task 'text' has no images"),
        (["--recipes", "adm"], "unknown recipe 'adm'"),
        (["--collaborators", "0"], "collaborators must be at least 1, got 0"),
        (["--architectures", "1", "--max-work", "0.0001"], "widen the bounds"),
    ],
)
def test_a_bad_setting_of_a_coevolution(command, tmp_path, arguments, part):
    code, _, err = command("coevolve", *arguments, "--workers", "1", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert part in err


def test_a_coevolution_says_what_it_costs_and_shows_its_result(command, tmp_path):
    arguments = (*COEVOLVE, "--workers", "1", "--out", tmp_path)
    code, out, _ = command("coevolve", *arguments)
    assert code == 0
    # 2 generations of 2 * (3 + 2) pairs, 3 finalists on 2 seeds, 4 contenders on 2 seeds
    assert out.startswith("Planned: 2 generations of at most 2 × (3 + 2) = 10 pairs")
    words = " ".join(out.split())
    for part in ("at most 20 training runs of 2 steps", "At most 34 in all", "is complete."):
        assert part in words
    assert "20,000 parameters" in words
    for name in ("co-evolved pair", "own network, evolved_2025"):
        assert f"| {name} " in out
    code, again, _ = command("coevolve", *arguments)
    assert again.split() == out.replace("is complete.", "was complete already.").split()
