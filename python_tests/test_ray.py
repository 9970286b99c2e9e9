"""Workers of a real Ray cluster, of machines with their own addresses, which are killed."""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: pip install 'evokernels[ray]'")

import ray
from ray.cluster_utils import Cluster
from test_cli import DEADLINE, TINY, ended_at_last, rows, wait_until

from evokernels import genome, terms, zoo
from evokernels.errors import DatasetError, JournalError, SettingsError, WorkerError
from evokernels.evolution import executor as executors
from evokernels.evolution import pool, ray_cluster, ray_executor
from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.executor import InlineExecutor
from evokernels.evolution.journal import JOURNAL, open_journal
from evokernels.evolution.pool import Evaluation, Pool
from evokernels.evolution.ray_cluster import Need
from evokernels.evolution.ray_executor import RayExecutor
from evokernels.evolution.run import RunSettings, evolve
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.search.genetic import GeneticConfig
from evokernels.search.score import Status

ROOT = pathlib.Path(__file__).parents[1]
MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(steps=3, batch_size=32, train_samples=64)
STORE = 80 * 2**20


def node(cluster, address, **resources):
    """A machine with an address of its own."""
    return cluster.add_node(node_ip_address=address, object_store_memory=STORE, **resources)


@pytest.fixture(scope="module")
def cluster():
    """A head that has no room for workers, and two machines with room for one each."""
    noticed_soon = {"health_check_period_ms": 300, "health_check_failure_threshold": 5}
    head = {
        **{"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
        "_system_config": {"health_check_initial_delay_ms": 0, **noticed_soon},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'python_tests'}")
        machines = Cluster(initialize_head=True, head_node_args=head)
        for address in ("127.0.0.2", "127.0.0.3"):
            node(machines, address, num_cpus=1, num_gpus=0)
        yield machines
        machines.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ray_executor, "LOOK", 0.2)


def actors():
    """Process ids of workers, with what they are at."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().partition(b"\0")[0].decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words.startswith("ray::_Actor"):
            found[int(path.parent.name)] = words.removeprefix("ray::_Actor").strip(".")
    return found


def kill_one_in_the_middle():
    """SIGKILL to a worker that trains."""
    wait_until(lambda: "finish" in actors().values())
    os.kill(next(pid for pid, at in actors().items() if at == "finish"), signal.SIGKILL)


# What may happen to an evaluation, by the name of the task: before it begins, and then. ``first``
# is true only once.
PREPARE = {"death at the first start": lambda first: first() and os._exit(9)}
SCRIPT = {
    "crash": lambda first: (first(), os._exit(7)),
    "killed once": lambda first: first() and os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda first: time.sleep(1e6),
    "memory": lambda first: torch.empty(10**15),
    "other data": lambda first: time.sleep(0.2),
}
STATUSES = {
    "crash": Status.CRASHED,
    "killed once": Status.OK,
    "hang": Status.TIMED_OUT,
    "memory": Status.OUT_OF_MEMORY,
    "death at the first start": Status.OK,
    "plain": Status.OK,
}


class Scripted(Evaluation):
    """An evaluation as it is, but for the training; ``data_dir`` takes notes."""

    def _first(self, trial):
        """Whether it is; a line for every time."""
        with open(pathlib.Path(self.data_dir) / trial.task, "a+") as file:
            file.write("again\n")
            return file.tell() == len("again\n")

    def prepare(self, trial):
        if trial.task == "no data":
            raise DatasetError("mnist.npz is missing")
        PREPARE.get(trial.task, lambda first: None)(lambda: self._first(trial))

    def __call__(self, trial):
        def scripted(*_):
            SCRIPT.get(trial.task, lambda first: None)(lambda: self._first(trial))
            data = ray.util.get_node_ip_address() if trial.task == "other data" else "digest"
            return Outcome(Status.OK, float(trial.seed), 0.5, 1.0, 3, 0.1, data)

        with mock.patch.object(pool, "evaluate", scripted):
            return super().__call__(trial)

    def _data(self, trial):
        return None


@pytest.fixture(scope="module", autouse=True)
def fewer_tries():
    """A crash costs the start of a process each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors.WorkerLost, "tries", 2)
        yield


def run(executor, folder, tasks, limit=2.0):
    workers = Pool(executor, None, Scripted(CONDITIONS, 1, "cpu", str(folder)), limit)
    trials = [Trial(zoo.adam, task, seed) for seed, task in enumerate(tasks)]
    return {trial.task: outcome for trial, outcome in workers.run(trials)}


@pytest.fixture(scope="module")
def two(cluster):
    """Two workers."""
    with RayExecutor(Need(1), address=cluster.address) as executor:
        yield executor
    wait_until(lambda: not actors())


# One evaluation


@pytest.fixture(scope="module")
def outcomes(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    return folder, run(two, folder, list(STATUSES))


@pytest.mark.parametrize("task", STATUSES)
def test_what_happens_to_one_evaluation_is_its_outcome(task, outcomes):
    _, ended = outcomes
    assert ended[task].status is STATUSES[task]
    if ended[task].status is Status.OK:
        assert ended[task].fitness == list(STATUSES).index(task)


def test_what_always_crashes_is_not_tried_for_ever(outcomes):
    folder, _ = outcomes
    tries = {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()}
    assert tries == {"crash": 2, "killed once": 2, "death at the first start": 2}


def test_an_error_says_on_which_machine(two, tmp_path):
    with pytest.raises(DatasetError, match=r"on the machine 127\.0\.0\.[23]: mnist.npz is missing"):
        run(two, tmp_path, ["no data"])


def test_only_genomes_and_scores_travel(two, tmp_path, monkeypatch):
    sent = []
    take = ray_executor._Call
    monkeypatch.setattr(
        ray_executor, "_Call", lambda message: sent.append(len(message)) or take(message)
    )
    run(two, tmp_path, ["plain"])
    assert 100 < sum(sent) < 3000


def test_terms_of_this_process_alone_travel_with_the_genome(two, monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})
    own = genome.Genome([terms.register("OF_THIS_PROCESS", terms.tanh(terms.m) * terms.progress)])
    trials = [Trial(optimizer, MINI, 0) for optimizer in (own, zoo.adam)]

    def outcomes(executor, in_flight):
        made = Pool(executor, in_flight, Evaluation(CONDITIONS, 1, "cpu", None)).run(trials)
        return {trial: dataclasses.replace(outcome, seconds=0.0) for trial, outcome in made}

    ours = outcomes(InlineExecutor(), 1)
    assert outcomes(two, None) == ours
    assert len(set(ours.values())) == 2


class Unreadable:
    """What can be pickled, and not read again."""

    def __reduce__(self):
        return int, ("no number",)


class Fussy(WorkerError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")

    def __reduce__(self):
        return Fussy, ("one", "two"), self.__dict__


def raise_fussy():
    raise Fussy("one", "two")


def test_answers_that_cannot_be_had_and_errors_of_any_kind(two):
    with pytest.raises(ValueError, match="no number"):
        two.submit(Unreadable).result(DEADLINE)
    with pytest.raises(Fussy, match=r"on the machine 127\.0\.0\.[23]: one two") as caught:
        two.submit(raise_fussy).result(DEADLINE)
    assert "in a worker process" in caught.value.__notes__[0]


def test_a_cluster_without_machines_waits_for_one(two, monkeypatch):
    monkeypatch.setattr(two, "_slots", 0)
    assert two.wanted == 2


# Runs

SETTINGS = RunSettings(
    search=GeneticConfig(population=4, generations=3, elites=1, tournament=2, seed=1),
    tasks=(MINI,),
    seeds=(0, 1),
    conditions=Conditions(steps=20, batch_size=64, train_samples=640, validation_samples=256),
    comparison_seeds=1,
    threads=1,
)
FILES = ("history.csv", "best_genome.json")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Files of a run in this process."""
    folder = tmp_path_factory.mktemp("runs") / "inline"
    evolve(SETTINGS, folder)
    return [(folder / name).read_bytes() for name in FILES]


def files(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_the_history_is_that_of_one_process_whatever_dies(cluster, two, expected, tmp_path, caplog):
    """A worker is killed while it trains; later a machine goes, and another one comes."""
    stopped = []

    def training():
        return next((w for w in two._workers if w.call is not None and w.call.began), None)

    def replace_a_machine():
        wait_until(training)
        worker = training()
        os.kill(worker.pid, signal.SIGSTOP)  # it shall not end before its machine does
        stopped.append(worker.pid)
        (lost,) = (m for m in cluster.worker_nodes if m.node_ip_address == worker.where)
        cluster.remove_node(lost, allow_graceful=False)
        node(cluster, "127.0.0.4", num_cpus=1, num_gpus=0)

    acts = {3: kill_one_in_the_middle, 9: replace_a_machine}  # by the evaluations recorded
    evolve(
        SETTINGS,
        tmp_path,
        executor=two,
        on_progress=lambda done, expected, note: acts.pop(done, lambda: None)(),
    )
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped[0], signal.SIGKILL)
    assert files(tmp_path) == expected
    first, *lost = caplog.messages
    assert re.match(
        r"an evaluation is made again .* worker died, process \d+ on 127\.0\.0\.", first
    )
    assert any("went with its machine" in message for message in lost)
    assert "127.0.0.4" in {worker.where for worker in two._workers}


def test_other_data_on_one_machine_end_the_run(two, tmp_path):
    trials = [Trial(zoo.adam, "other data", seed) for seed in range(8)]
    workers = Pool(two, None, Scripted(CONDITIONS, 1, "cpu", str(tmp_path)))
    with open_journal(tmp_path / "run", {}) as journal:
        evaluations = Evaluations(journal, workers, lambda *_: None)
        with pytest.raises(JournalError, match="the data of other data are not those"):
            evaluations.make(map(Request.after_search, trials), 0, "")


# Resources


@pytest.mark.parametrize(
    ("need", "resources", "workers"),
    [
        (Need(1), {"CPU": 2.0}, 2),
        (Need(4), {"CPU": 7.0}, 1),
        (Need(1), {}, 0),
        (Need(1, 1.0), {"CPU": 1.0, "GPU": 4.0}, 4),
        (Need(1, 0.5), {"GPU": 2.0}, 4),
        (Need(1, 0.4), {"GPU": 2.0}, 4),
        (Need(1, 0.1), {"GPU": 1.0}, 10),
        (Need(1, 1 / 3), {"GPU": 1.0}, 3),
        (Need(1, 1.0), {"CPU": 8.0}, 0),
    ],
)
def test_workers_that_a_machine_has_room_for(need, resources, workers):
    assert need.fits(resources) == workers


def visible(folder, workers):
    """The GPUs that this worker has, when all have begun."""
    (pathlib.Path(folder) / str(os.getpid())).touch()
    wait_until(lambda: len(os.listdir(folder)) == workers)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_every_gpu_of_a_machine_is_used(cluster, two, tmp_path):
    machine = node(cluster, "127.0.0.5", num_cpus=1, num_gpus=2)
    try:
        with RayExecutor(Need(1, 0.5), address=cluster.address) as executor:
            assert executor.wanted == 2 * 4
            calls = [executor.submit(visible, tmp_path, 4) for _ in range(4)]
            devices = [call.result(DEADLINE) for call in calls]
    finally:
        cluster.remove_node(machine)
    assert sorted(devices) == ["0", "0", "1", "1"]


# Cores that others hold


def refused(cluster, words):
    with RayExecutor(Need(1), 1, cluster.address) as executor:
        calls = [executor.submit(os.getpid) for _ in range(3)]
        for call in calls:
            with pytest.raises(WorkerError, match=words):
                call.result(DEADLINE)
        with pytest.raises(WorkerError, match=words):
            executor.submit(os.getpid).result(DEADLINE)


def busy_until(path):
    """What other work does, until the file is there."""
    wait_until(path.exists)


def test_a_cluster_that_is_busy(cluster, two, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "PATIENCE", 0.5)
    done = tmp_path / "done"
    busy = [two.submit(busy_until, done) for _ in range(2)]
    wait_until(lambda: all(call.running() for call in busy))
    refused(cluster, "no worker started within 0.5 seconds: .* have room for 1, if nothing")
    done.touch()
    for call in busy:
        call.result(DEADLINE)


# Ends


@pytest.fixture(scope="module")
def free(cluster):
    """One more machine; the others are taken."""
    node(cluster, "127.0.0.6", num_cpus=1, num_gpus=0)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs bench/evolve.py in this process; returns exit code, stdout and stderr."""
    monkeypatch.syspath_prepend(ROOT / "bench")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evolve", *TINY, *map(str, arguments)])
        code = importlib.import_module("evolve").main()
        return code, *capsys.readouterr()

    return run


def start(folder, *arguments):
    """bench/evolve.py in a process group of its own, as a terminal starts it."""
    script = [sys.executable, ROOT / "bench/evolve.py", *TINY, "--executor", "ray"]
    with folder.with_name("errors").open("a") as errors:
        return subprocess.Popen(
            [*map(str, script), "--out", str(folder), *map(str, arguments)],
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def test_a_coordinator_that_is_killed_leaves_nothing_and_resumes(
    cluster, two, free, command, tmp_path, monkeypatch
):
    """With terms of its own, of which only the coordinators have read."""
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})
    file = tmp_path / "terms.py"
    file.write_text(
        "from evokernels.terms import *\n"
        "for i in range(20): register(f'OWN_{i}', tanh(average(g, 0.5)) * progress + i * m)\n"
    )
    given = ("--terms", file, "--population", "6", "--generations", "2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("--out", whole, "--workers", "1", *given)[0] == 0
    with contextlib.closing(sqlite3.connect(whole / JOURNAL)) as journal:
        genomes = journal.execute("SELECT genome FROM evaluation").fetchall()
    assert sum("OWN_" in text for (text,) in genomes) >= 2
    own = set(actors())
    with ended_at_last(start(broken, "--address", cluster.address, *given)) as process:
        wait_until(lambda: rows(broken) >= 3 or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "errors").read_text()
    wait_until(lambda: set(actors()) <= own)
    made = rows(broken)
    ray_there = ("--executor", "ray", "--address", cluster.address)
    code, _, err = command(*ray_there, "--out", broken, *given)
    assert code == 0, err
    assert 3 <= made < rows(broken) == rows(whole)
    assert files(broken) == files(whole)


def offspring(group):
    """Processes of a group or session."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(group) in (pgrp, session) and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_ctrl_c_ends_workers_and_the_cluster_that_was_started(tmp_path):
    with ended_at_last(start(tmp_path / "run", "--steps", "1000000")) as process:
        wait_until(lambda: rows(tmp_path / "run") or "finish" in actors().values())
        assert len(offspring(process.pid)) > 3
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    wait_until(lambda: not offspring(process.pid))
    errors = (tmp_path / "errors").read_text()
    assert errors.splitlines()[-1].startswith("interrupted; all finished training runs are in ")
    assert "Traceback" not in errors


# Errors: one line, in bounded time


def test_a_head_that_is_silent(cluster, two, free, monkeypatch):
    monkeypatch.setattr(ray_executor, "SILENCE", 0.5)
    with RayExecutor(Need(1), 1, cluster.address) as executor:
        call = executor.submit(time.sleep, 1e6)
        wait_until(call.running)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        executor._head = ray_cluster.Head(nobody)
        with pytest.raises(WorkerError, match=f"the head of the Ray cluster, {nobody}, is gone"):
            call.result(DEADLINE)


def test_an_error_of_ray_ends_all_calls(cluster, two, free, monkeypatch, caplog):
    """And a machine without a C compiler is named."""

    class Bare(ray_executor._Actor):
        def about(self, need):
            os.environ["CC"] = "none"
            return super().about(need)

    monkeypatch.setattr(ray_executor, "_Actor", Bare)
    with RayExecutor(Need(1), 1, cluster.address) as executor:
        call = executor.submit(time.sleep, 1e6)
        wait_until(call.running)
        monkeypatch.setattr(executor, "_room", lambda: 1 / 0)
        with pytest.raises(WorkerError, match="the Ray cluster fails: division by zero"):
            call.result(DEADLINE)
    (warning,) = caplog.messages
    assert re.match(
        r"the machine 127\.0\.0\.\d has no C compiler: rules with terms beyond", warning
    )


def test_a_machine_that_goes_excuses_workers_that_do_not_start(
    cluster, two, free, tmp_path, monkeypatch
):
    class Broken(ray_executor._Actor):
        def __init__(self):
            with open(tmp_path / "starts", "a+") as file:
                file.write("again\n")
                if file.tell() <= len("again\n"):
                    raise OSError("not yet")

    monkeypatch.setattr(ray_executor, "_Actor", Broken)
    monkeypatch.setattr(ray_executor, "STARTS", 1)
    other = iter("abcdefgh")  # at every look there is another machine
    monkeypatch.setattr(ray_executor, "_machines", lambda: frozenset(next(other)))
    with RayExecutor(Need(1), 1, cluster.address) as executor:
        assert executor.submit(abs, -1).result(DEADLINE) == 1


def test_the_coordinator_needs_no_gpu(cluster, two, free, command, tmp_path):
    """The run begins: it is the worker that finds no GPU, as all do here."""
    node(cluster, "127.0.0.7", num_cpus=0, num_gpus=1)
    given = ("--executor", "ray", "--address", cluster.address, "--device", "cuda")
    code, _, err = command(*given, "--out", tmp_path / "run")
    assert code == 2
    words = r"error: on the machine 127\.0\.0\.\d: device is 'cuda', but torch .* finds no CUDA"
    assert re.match(words, err.splitlines()[-1])


@pytest.mark.gpu
def test_workers_that_share_a_gpu_find_what_this_process_finds(command, tmp_path):
    """A cluster of its own, which Ray starts with the GPUs of this machine."""
    assert command("--device", "cuda", "--out", tmp_path / "here")[0] == 0
    given = ("--device", "cuda", "--executor", "ray", "--gpus-per-worker", "0.5")
    done = subprocess.run(
        [sys.executable, ROOT / "bench/evolve.py", *TINY, *given, "--out", tmp_path / "ray"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here, there = ((tmp_path / name / "history.csv").read_text() for name in ("here", "ray"))
    assert there == here


def test_errors_of_options(command, tmp_path, monkeypatch):
    ray_here = ("--executor", "ray")
    for arguments, part in (
        ([*ray_here, "--gpus-per-worker", "1"], "is above 0 and for --device cuda, got 1 for cpu"),
        (
            [*ray_here, "--device", "cuda", "--gpus-per-worker", "0"],
            "is above 0 and for --device cuda, got 0 for cuda",
        ),
        ([*ray_here, "--address", "ray://head:10001"], "address must be auto or HOST:PORT"),
        ([*ray_here, "--address", ""], "address must be auto or HOST:PORT"),
        (["--address", "auto"], "--address is for --executor ray alone"),
        (["--gpus-per-worker", "1"], "--gpus-per-worker is for --executor ray alone"),
    ):
        code, out, err = command(*arguments, "--out", tmp_path / "run")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert part in err
    monkeypatch.setitem(sys.modules, "evokernels.evolution.ray_executor", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "evokernels.evolution.ray_executor")
    monkeypatch.delitem(sys.modules, "evokernels.evolution.ray_cluster")
    code, _, err = command("--executor", "ray", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'evokernels[ray]'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [-0.5, 1.5, float("nan")])
def test_a_share_of_a_gpu(share):
    with pytest.raises(SettingsError, match="at most 1, got"):
        Need(1, share)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1"])
def test_no_cluster_there(address, monkeypatch):
    monkeypatch.setattr(ray_cluster, "ANSWER", 2.0)
    with pytest.raises(WorkerError, match=f"no Ray cluster to join at '{address}' "):
        ray_cluster._look_for(address)


def test_no_machine_has_room(cluster, two):
    with pytest.raises(WorkerError, match="has the 99 CPU that a worker takes"):
        RayExecutor(Need(99), address=cluster.address)


def test_other_versions_on_a_machine(cluster, two, free, monkeypatch):
    ours = {**ray_cluster.versions(), "torch": "1.0"}
    monkeypatch.setattr(ray_executor, "versions", lambda: ours)
    words = rf"the machine 127.* has torch {re.escape(torch.__version__)} \(here 1\.0\)"
    refused(cluster, words)


def test_workers_that_cannot_start(cluster, two, free, monkeypatch):
    class Broken(ray_executor._Actor):
        def __init__(self):
            raise OSError("no torch here")

    monkeypatch.setattr(ray_executor, "_Actor", Broken)
    monkeypatch.setattr(ray_executor, "STARTS", 1)
    refused(cluster, "end before they begin, 1 times in a row .*no torch here")
