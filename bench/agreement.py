"""Whether the source's loop and ours find the same fitness: trainings of both, and their means.

Every training is a row of a CSV file, appended when it ends; what has a row is not trained again.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from commandline import markdown
from source_loop import evaluate_source

from evokernels import Genome, zoo
from evokernels.errors import SettingsError
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.trial import Conditions, Trial
from evokernels.tasks import ImageData, get_task

__all__ = ["GENOMES", "LOOPS", "SOURCE", "Job", "all_jobs", "compare_means", "run_jobs"]

SOURCE = "source"
LOOPS = (SOURCE, "float32", "bfloat16")  # the source's, ours in a precision
TASKS = ("mnist", "fashion_mnist", "cifar10")  # the cheap ones first
SEEDS = (0, 1, 2)

# The source system's, and three drawn as the search draws its first population: those of the first
# twelve draws that learn without resembling each other; rounded.
GENOMES = {
    "sgd_momentum": zoo.sgd_momentum,
    "rmsprop": zoo.rmsprop,
    "adam": zoo.adam,
    "adamw": zoo.adamw,
    "evolved_2025": zoo.evolved_2025,
    "random_adam": Genome(
        ["NESTEROV", "ADAM_TERM"],
        [-0.919, 0.931],
        lr_log10=-3.19,
        beta1=0.884,
        beta2=0.93,
        eps_log10=-7.57,
        wd_log10=-3.83,
        use_bias_correction=False,
        use_warmup=True,
        warmup_steps=174,
    ),
    "random_rms": Genome(
        ["RMS_NORM"],
        [0.925],
        lr_log10=-3.614,
        beta2=0.914,
        eps_log10=-6.57,
        wd_log10=-3.99,
    ),
    "random_sign": Genome(
        ["NESTEROV", "SIGN_GRAD"],
        [0.714, 0.562],
        lr_log10=-2.984,
        beta1=0.788,
        wd_log10=-3.74,
        use_cosine_decay=True,
    ),
}

FIELDS = (
    *("loop", "genome", "rule", "task", "seed", "steps", "batch_size", "train_samples"),
    *("fitness", "accuracy", "seconds"),
)


class Job(NamedTuple):
    """A training run of one of the `LOOPS`, by a genome of `GENOMES`."""

    loop: str
    genome: str
    task: str
    seed: int


class Key(NamedTuple):
    """What decides the fitness of a row, as the file spells it."""

    loop: str
    rule: str
    task: str
    seed: str
    steps: str
    batch_size: str
    train_samples: str


def all_jobs(loops: Iterable[str]) -> list[Job]:
    """All of them, so that what has been done is always of use: seed by seed."""
    return [
        Job(loop, genome, task, seed)
        for loop in loops
        for seed in SEEDS
        for task in TASKS
        for genome in GENOMES
    ]


def run_jobs(
    jobs: Sequence[Job],
    conditions: Conditions,
    path: pathlib.Path,
    data_dir: str | None,
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Train what has no row yet, in this process, and append its row.

    Several processes may append to one file at a time, if they run different jobs.

    Args:
        jobs: see `all_jobs`.
        conditions: of every run; its precision is not read, the loop says it.
        path: the file; made with its header if it is not there.
        data_dir: folder with data sets, or None.
        on_progress: called with the number of jobs done, of all jobs, and what comes next.

    Raises:
        SettingsError: the file has other columns.
    """
    finished = {_key(row) for row in _read(path)}
    if not path.exists():
        _append(path, FIELDS)
    for done, job in enumerate(jobs):
        on_progress(done, len(jobs), f"{job.loop}, {job.task}, {job.genome}, seed {job.seed}")
        row = _described(job, conditions)
        if _key(row) not in finished:
            row.update(_train(job, conditions, data_dir))
            _append(path, [row[field] for field in FIELDS])
    on_progress(len(jobs), len(jobs), "done")


def compare_means(path: pathlib.Path, conditions: Conditions) -> Iterator[str]:
    """The tables, in Markdown: each of our precisions beside the source's loop.

    Only rows of these conditions count, and of these only what both loops have. A standard error
    is that of a mean over genomes, tasks and seeds of which only the seeds are a sample.
    """
    fitness: dict[str, dict[tuple[str, int], dict[str, float]]] = collections.defaultdict(
        lambda: collections.defaultdict(dict)
    )
    rules = {name: _rule(genome) for name, genome in GENOMES.items()}
    for row in _read(path):
        job = Job(row["loop"], row["genome"], row["task"], int(row["seed"]))
        known = rules.get(job.genome) == row["rule"]
        if known and _key(row) == _key(_described(job, conditions)):
            fitness[job.loop][job.genome, job.seed][job.task] = float(row["fitness"])
    whole = {
        loop: {run: statistics.fmean(tasks.values()) for run, tasks in runs.items() if _full(tasks)}
        for loop, runs in fitness.items()
    }
    for loop in LOOPS[1:]:
        both = [run for run in whole.get(SOURCE, {}) if run in whole.get(loop, {})]
        if both:
            yield from _table(loop, [(*run, whole[SOURCE][run], whole[loop][run]) for run in both])


def _table(loop: str, runs: Sequence[tuple[str, int, float, float]]) -> Iterator[str]:
    """One of our precisions: genomes, then all of them.

    Args:
        loop: the precision.
        runs: genome, seed, and the fitness over all tasks by the source's loop and by ours.
    """
    by_genome: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for genome, _, theirs, ours in runs:
        by_genome[genome].append((theirs, ours))
    head = ["genome", "seeds", "source", f"ours, {loop}", "difference", "its standard error"]
    rows = []
    differences, variances, paired = [], [], []
    for genome, pairs in by_genome.items():
        theirs, ours = zip(*pairs, strict=True)
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        variance = _variance_of_mean(theirs) + _variance_of_mean(ours)
        differences.append(difference)
        variances.append(variance)
        paired.append(_variance_of_mean([b - a for a, b in pairs]))
        rows.append(
            [
                genome,
                str(len(pairs)),
                f"{statistics.fmean(theirs):.4f}",
                f"{statistics.fmean(ours):.4f}",
                f"{difference:+.4f}",
                f"{math.sqrt(variance):.4f}",
            ]
        )
    yield from markdown(head, rows)
    count = len(differences)
    difference = statistics.fmean(differences)
    error, error_of_pairs = (math.sqrt(sum(terms)) / count for terms in (variances, paired))
    verdict = "less" if abs(difference) < error else "NOT less"
    yield ""
    yield (
        f"All {count} genomes: ours in {loop} differs by {difference:+.5f}, {verdict} than the "
        f"standard error {error:.5f} ({error_of_pairs:.5f} of runs paired by seed)."
    )
    yield ""


def _variance_of_mean(sample: Sequence[float]) -> float:
    """Of the mean of a sample; NaN for a sample of one."""
    return statistics.variance(sample) / len(sample) if len(sample) > 1 else math.nan


def _full(tasks: dict[str, float]) -> bool:
    return tasks.keys() == set(TASKS)


def _train(job: Job, conditions: Conditions, data_dir: str | None) -> dict[str, object]:
    data = _images(job.task, data_dir, conditions.train_samples)
    trial = Trial(GENOMES[job.genome], job.task, job.seed)
    start = time.perf_counter()
    if job.loop == SOURCE:
        run = evaluate_source(trial, conditions, data, workers=0)
    else:
        run = evaluate(trial, dataclasses.replace(conditions, precision=job.loop), data)
    seconds = time.perf_counter() - start
    return {"fitness": run.fitness, "accuracy": run.accuracy, "seconds": f"{seconds:.1f}"}


@functools.cache  # `evaluate` keeps what it knows of a data set as long as the process lives
def _images(task: str, data_dir: str | None, train_samples: int | None) -> ImageData:
    return get_task(task).load(data_dir, train_samples, 0)


def _described(job: Job, conditions: Conditions) -> dict[str, object]:
    """The columns of a row that are known before the run."""
    return {
        **job._asdict(),
        "rule": _rule(GENOMES[job.genome]),
        "steps": conditions.steps,
        "batch_size": conditions.batch_size,
        "train_samples": conditions.train_samples,
    }


def _rule(genome: Genome) -> str:
    return json.dumps(genome.to_dict(), separators=(",", ":"))


def _key(row: dict[str, object]) -> Key:
    return Key(*(str(row[field]) for field in Key._fields))


def _read(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != FIELDS:
            raise SettingsError(
                f"{path} has the columns {rows.fieldnames}, not {', '.join(FIELDS)}; "
                "choose another file"
            )
        return list(rows)


def _append(path: pathlib.Path, row: Sequence[object]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
