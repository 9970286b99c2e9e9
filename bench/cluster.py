"""What an evaluation costs beside its training, here and in a Ray cluster, and how that scales.

Needs Ray (pip install 'evokernels[ray]'). Measured on this machine: the overhead of each executor,
the bytes that travel, one and two workers in a real evolution. From these numbers alone a model
says what 8 and 64 workers would take. Writes results/cluster.md; takes two to three minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import heapq
import pathlib
import pickle
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence

import ray
from commandline import exit_code, markdown
from microbench import machine
from no_training import Nothing

from evokernels import zoo
from evokernels.evolution.evaluations import Evaluations, Request
from evokernels.evolution.executor import InlineExecutor, WorkerExecutor, WorkerProcesses, answering
from evokernels.evolution.files import write_atomically
from evokernels.evolution.journal import JOURNAL, open_journal
from evokernels.evolution.pool import Evaluation, Pool
from evokernels.evolution.ray_cluster import Need
from evokernels.evolution.ray_executor import RayExecutor
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Trial
from evokernels.search.genetic import GeneticConfig

RESULT = pathlib.Path(__file__).parent / "results" / "cluster.md"
TASK = "fashion_mnist_mini"
TRAFFIC = pathlib.Path("/proc/net/dev")
CALLS = 400  # that do nothing, of which the mean is taken
WORKERS = 2

# of real training runs, so long that a run takes about a second
SETTINGS = RunSettings(
    search=GeneticConfig(population=8, generations=3, elites=2),
    tasks=(TASK,),
    seeds=(0,),
    conditions=Conditions(
        steps=100, batch_size=64, train_samples=None, validation_samples=1000, hurdle=True
    ),
    comparison_seeds=2,
    threads=1,
)

# trainings between two barriers: the preset "paper", whose first seed trains every genome on every
# task, and all must have ended before the race says who is trained with the second
ROUND = 50 * 3
PREDICTED = (1, 2, 8, 64)
DRAWS = 400  # rounds that a prediction is the mean of


NOTHING = Nothing(SETTINGS.conditions, 1, "cpu", None)


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What an evaluation costs beside its training.

    Attributes:
        alone: seconds from handing it over to its outcome, with nothing else going on.
        together: seconds for each of many, on `WORKERS` workers.
    """

    alone: float
    together: float


def main() -> int:
    """The command; its exit code."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # none but --help
    return exit_code(run, "nothing is kept")


def run() -> None:
    """Measure, predict, write."""
    with tempfile.TemporaryDirectory() as folder:
        evolve(SETTINGS, folder)  # its kernels are on disk from now on, for whoever trains
    overheads = {"in this process": overhead(InlineExecutor())}
    with WorkerProcesses(WORKERS) as processes:
        overheads["worker processes"] = overhead(processes)
        two_processes, _ = search(processes)
    with WorkerProcesses(1) as processes:
        one_process, _ = search(processes)
    with RayExecutor(Need(1), WORKERS) as cluster:
        overheads["Ray"] = overhead(cluster)
        # Ray talks about itself now and then, much at a time
        on_wire = statistics.median(loopback(cluster) for _ in range(5))
        two_in_ray, _ = search(cluster)
    with RayExecutor(Need(1), 1) as cluster:
        one_in_ray, durations = search(cluster)
    searches = {
        "worker processes": (one_process, two_processes),
        "Ray": (one_in_ray, two_in_ray),
    }
    recording = journal_cost()
    lines = [
        "# Training in a cluster: what it costs, what it gains",
        "",
        f"Written by `bench/cluster.py`. {machine()}, Ray {ray.__version__}; coordinator, Ray and "
        "workers share these cores.",
        "",
        *told_overheads(overheads, recording),
        *told_bytes(on_wire),
        *told_scaling(searches, durations),
        *told_predictions(durations, overheads["Ray"], recording),
    ]
    write_atomically(RESULT, ("\n".join(lines).strip() + "\n").encode())
    print("\n".join(lines))


def trials(count: int) -> list[Trial]:
    """Different ones."""
    return [Trial(zoo.evolved_2026, TASK, seed) for seed in range(count)]


def overhead(executor: concurrent.futures.Executor) -> Overhead:
    """Of evaluations that do nothing, once the workers have started."""
    warm(executor)
    start = time.perf_counter()
    for trial in trials(CALLS // 4):
        executor.submit(NOTHING, trial).result()
    alone = (time.perf_counter() - start) / (CALLS // 4)
    in_flight = 1 if isinstance(executor, InlineExecutor) else None
    pool = Pool(executor, in_flight, NOTHING)
    start = time.perf_counter()
    made = sum(1 for _ in pool.run(trials(CALLS)))
    return Overhead(alone, (time.perf_counter() - start) / made)


def warm(executor: concurrent.futures.Executor) -> None:
    """Until all workers have started."""
    for call in [executor.submit(time.sleep, 4.0) for _ in range(getattr(executor, "wanted", 0))]:
        call.result()


def loopback(executor: RayExecutor) -> float:
    """Bytes that an evaluation sends through the loopback device, what else Ray sends left out."""
    pool = Pool(executor, None, NOTHING)
    before, start = received(), time.perf_counter()
    made = sum(1 for _ in pool.run(trials(CALLS)))
    during, seconds = received() - before, time.perf_counter() - start
    before = received()
    time.sleep(3.0)
    idle = (received() - before) / 3.0
    return (during - idle * seconds) / made


def received() -> int:
    """Bytes through the loopback device so far; 0 where there are no such counters."""
    if not TRAFFIC.exists():
        return 0
    (line,) = (line for line in TRAFFIC.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def search(executor: WorkerExecutor) -> tuple[float, list[float]]:
    """Seconds from the first training run of an evolution to the last, and of each of them."""
    pool = Pool(executor, None, Evaluation(SETTINGS.conditions, 1, "cpu", None))
    sum(1 for _ in pool.run(trials(executor.wanted)))  # data are loaded, kernels compiled
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        evolve(
            SETTINGS,
            folder,
            executor=executor,
            on_progress=lambda *_: times.append(time.perf_counter()),
        )
        with contextlib.closing(sqlite3.connect(pathlib.Path(folder) / JOURNAL)) as journal:
            rows = journal.execute("SELECT seconds FROM evaluation").fetchall()
    return times[-1] - times[0], [seconds for (seconds,) in rows]


def journal_cost() -> float:
    """Seconds that the coordinator takes to record an evaluation."""
    pool = Pool(InlineExecutor(), 1, NOTHING)
    with tempfile.TemporaryDirectory() as folder, open_journal(folder, {}) as journal:
        evaluations = Evaluations(journal, pool, lambda *_: None)
        start = time.perf_counter()
        evaluations.make(map(Request.after_search, trials(CALLS)), 0, "")
        return (time.perf_counter() - start) / CALLS


def predicted(durations: Sequence[float], workers: int, wait: float, cost: float) -> float:
    """Seconds of a round: each free worker takes the next run, whose durations are drawn.

    It waits ``wait`` seconds for it. The coordinator hands over and records one after the other,
    ``cost`` seconds each, so that no round is shorter than that.
    """
    draw = random.Random(0)
    rounds = []
    for _ in range(DRAWS):
        free = [0.0] * workers
        for _ in range(ROUND):
            heapq.heapreplace(free, free[0] + wait + draw.choice(durations))
        rounds.append(max(*free, ROUND * cost))
    return statistics.fmean(rounds)


def told_overheads(overheads: Mapping[str, Overhead], cost: float) -> Iterable[str]:
    """What executors add to a training run."""
    yield "## An evaluation that does nothing"
    yield ""
    rows = [
        [name, f"{one.alone * 1e3:.2f}", f"{one.together * 1e3:.2f}"]
        for name, one in overheads.items()
    ]
    yield from markdown(["evaluated", "one at a time, ms", f"each of {CALLS}, ms"], rows)
    yield ""
    yield f"To record an evaluation in the journal takes {cost * 1e3:.2f} ms."
    yield ""


def told_bytes(on_wire: float) -> Iterable[str]:
    """What travels."""
    (trial,) = trials(1)
    call = pickle.dumps((NOTHING, (trial,), {}))
    *_, answer = answering(call)
    yield (
        f"An evaluation travels as {len(call):,} bytes, its outcome as {len(answer):,}; with all "
        f"that Ray says beside, {on_wire:,.0f} bytes go over the network. Data never do."
    )
    yield ""


def told_scaling(
    searches: Mapping[str, tuple[float, float]], durations: Sequence[float]
) -> Iterable[str]:
    """One worker and two, with Ray and without: what both lose is the machine's."""
    yield "## One worker and two, measured"
    yield ""
    yield (
        f"An evolution of {len(durations)} training runs of {SETTINGS.conditions.steps} steps "
        f"({statistics.fmean(durations):.2f} s each with one worker, the longest "
        f"{max(durations):.2f} s), by one worker and by two, which share caches, memory and clock "
        "of this machine, with Ray and without."
    )
    yield ""
    rows = [
        [name, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}"]
        for name, (one, two) in searches.items()
    ]
    yield from markdown(["evaluated by", "one worker, s", "two, s", "times as fast"], rows)
    yield ""


def told_predictions(
    durations: Sequence[float], overhead: Overhead, recording: float
) -> Iterable[str]:
    """What the model says of more workers."""
    wait, cost = overhead.alone, overhead.together + recording
    mean, longest = statistics.fmean(durations), max(durations)
    yield "## More workers, predicted"
    yield ""
    yield (
        f"The model, of a round of n = {ROUND} training runs (50 genomes on 3 tasks) between two "
        f"barriers: each free worker takes the next run, {wait * 1e3:.1f} ms later; durations are "
        f"drawn from those measured with one worker (mean {mean:.2f} s, longest {longest:.2f} s); "
        f"the coordinator spends at most c = {cost * 1e3:.1f} ms on each, while workers train. "
        "A round takes about the larger of n × mean / W + (what the last ones wait for, "
        "at most the "
        "longest) and n × c. Every worker has a core of its own; machines are alike."
    )
    yield ""
    base = predicted(durations, 1, wait, cost)
    rows = []
    for workers in PREDICTED:
        seconds = predicted(durations, workers, wait, cost)
        rows.append(
            [
                str(workers),
                f"{ROUND * mean / workers:.1f}",
                f"{ROUND * cost:.2f}",
                f"{seconds:.1f}",
                f"{base / seconds:.1f}",
                f"{base / seconds / workers:.0%}",
            ]
        )
    head = ["workers", "n × mean / W, s", "n × c, s", "round, s", "times as fast", "efficiency"]
    yield from markdown(head, rows)
    yield ""
    yield (
        f"The coordinator is busy with {mean / cost:,.0f} workers at such runs; longer runs allow "
        "more in proportion."
    )


if __name__ == "__main__":
    sys.exit(main())
