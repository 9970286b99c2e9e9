"""How long one genome takes: the source system's loop, and ours, on the same two cores.

    python bench/evaluation.py                     # 50 and 100 steps; the protocol's 500 from them
    python bench/evaluation.py --full              # 500 steps, nothing extrapolated
    python bench/evaluation.py --profile           # and where the time of a step goes
    python bench/evaluation.py --agreement FILE    # instead: whether both find the same fitness

A genome is trained as the source's protocol has it: three tasks, two seeds, 15,000 images, batches
of 128, then the whole test split. The source's loop trains one network after the other, with all
of torch's threads, and with the number of loading processes that suits it best; ours has as many
workers of one thread as the source has threads. The loops take turns, pass by pass. Writes
evaluation.md and evaluation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torchvision
from agreement import LOOPS, SOURCE, all_jobs, compare_means, run_jobs
from commandline import Bar, exit_code, markdown, positive
from contestants import Work, ours
from microbench import shapes_of
from source_loop import NETWORKS, evaluate_source
from step_profile import UPDATE, milliseconds_a_step

from evokernels import Genome, zoo
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.files import make_folder, write_atomically
from evokernels.evolution.machine import processor
from evokernels.evolution.pool import open_pool
from evokernels.evolution.trial import Conditions, Trial
from evokernels.tasks import ImageData, get_task

GENOME = zoo.evolved_2025
WILD = Genome(["SIGN_GRAD"], lr_log10=2.0)  # diverges at once: it warms a worker up, and no more
PROTOCOL = Conditions(steps=500, batch_size=128, train_samples=15_000)
TASKS = ("fashion_mnist", "cifar10", "mnist")
SEEDS = (0, 1)
PROFILED = ("fashion_mnist", "cifar10")  # MNIST has the network of Fashion-MNIST
LOADERS = (2, 0)  # loading processes: as the source has it, and none
PROBE_STEPS = 20

Results = dict[str, Any]


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    hint = "the rows that are there stay" if options.agreement else "nothing was written"
    return exit_code(lambda: run(options), hint)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loops",
        nargs="+",
        default=list(LOOPS),
        choices=LOOPS,
        metavar="LOOP",
        help=f"who trains, of {', '.join(LOOPS)} (all)",
    )
    parser.add_argument("--passes", type=positive, default=3, help="passes (3)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=positive, default=50, metavar="N", help="measure N and 2 N steps (50)"
    )
    length.add_argument("--full", action="store_true", help="measure the protocol's 500 steps")
    parser.add_argument(
        "--profile",
        type=positive,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="profile that many steps too (20)",
    )
    parser.add_argument(
        "--agreement",
        type=pathlib.Path,
        metavar="CSV",
        help="train 8 genomes with 3 seeds instead, append what the file lacks, compare the means",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with data sets ($EVOKERNELS_DATA, else ~/.cache/evokernels/data)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("bench/results"),
        metavar="DIR",
        help="folder for evaluation.md and evaluation.json (bench/results)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write; or train and compare."""
    if options.agreement:
        agree(options)
        return
    make_folder(options.out)
    results = measure(options)
    text = "\n".join(page(results)) + "\n"
    write_atomically(options.out / "evaluation.json", json.dumps(results, indent=1).encode())
    write_atomically(options.out / "evaluation.md", text.encode())
    print(text)


def agree(options: argparse.Namespace) -> None:
    """One thread: fitness depends on their number no more than on the order of a sum."""
    torch.set_num_threads(1)
    with Bar() as bar:
        run_jobs(all_jobs(options.loops), PROTOCOL, options.agreement, options.data_dir, bar.show)
    print("\n".join(compare_means(options.agreement, PROTOCOL)))


def measure(options: argparse.Namespace) -> Results:
    """Everything that `page` tells."""
    data = {
        task: get_task(task).load(options.data_dir, PROTOCOL.train_samples, 0) for task in TASKS
    }
    lengths = [PROTOCOL.steps] if options.full else [options.steps, 2 * options.steps]
    threads = torch.get_num_threads()
    with Bar() as bar:
        bar.show(0, options.passes, "loaders")
        loaders = {task: best_loader(task, data[task]) for task in TASKS}
        passes: list[dict[str, dict[str, float]]] = []
        for number in range(options.passes):
            passes.append({})
            for loop in options.loops:
                bar.show(number, options.passes, loop)
                passes[-1][loop] = (
                    time_source(data, loaders, lengths)
                    if loop == SOURCE
                    else time_ours(loop, lengths, threads, options.data_dir)
                )
        bar.show(options.passes, options.passes, "profile")
        profiles: dict[str, dict[str, dict[str, float]]] = {
            task: {} for task in (PROFILED if options.profile else ())
        }
        # the source's for all tasks first: our evaluation changes how this process keeps memory
        for loop in options.loops:
            for task, groups in profiles.items():
                loader = loaders[task]["chosen"]
                groups[loop] = profile_loop(loop, task, data[task], loader, options.profile)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "processor": processor(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "update": ours(Work(shapes_of(NETWORKS["cifar10"]()), GENOME)).backend,
        "steps measured": lengths,
        "loaders": loaders,
        "passes": passes,
        "profiles": profiles,
    }


def best_loader(task: str, data: ImageData) -> dict[str, Any]:
    """Seconds of a short evaluation with each number of loading processes, and the best of them."""
    trial, conditions = Trial(GENOME, task, 0), of_steps(PROBE_STEPS)
    seconds = {n: evaluate_source(trial, conditions, data, n).seconds for n in LOADERS}
    return {"seconds": seconds, "chosen": min(seconds, key=seconds.__getitem__)}


def time_source(
    data: dict[str, ImageData], loaders: dict[str, dict[str, Any]], lengths: Sequence[int]
) -> dict[str, float]:
    """Seconds of a genome by length, as text; its fitness."""
    measured = {}
    for steps in lengths:
        start = time.perf_counter()
        fitness = [
            evaluate_source(
                Trial(GENOME, task, seed), of_steps(steps), data[task], loaders[task]["chosen"]
            ).fitness
            for task in TASKS
            for seed in SEEDS
        ]
        measured[str(steps)] = time.perf_counter() - start
    return {**measured, "fitness": statistics.fmean(fitness)}


def time_ours(
    precision: str, lengths: Sequence[int], workers: int, data_dir: str | None
) -> dict[str, float]:
    """The same, and the seconds in which the workers start and load their data."""
    measured = {}
    trials = [Trial(GENOME, task, seed) for task in TASKS for seed in SEEDS]
    for steps in lengths:
        conditions = of_steps(steps, precision)
        start = time.perf_counter()
        with open_pool(conditions, workers=workers, threads=1, data_dir=data_dir) as pool:
            # once more than there are workers, so that each of them meets every task
            wild = [Trial(WILD, task, 0) for task in TASKS for _ in range(workers + 1)]
            list(pool.run(wild))
            ready = time.perf_counter()
            fitness = [outcome.fitness for _, outcome in pool.run(trials)]
            measured[str(steps)] = time.perf_counter() - ready
        measured["start"] = ready - start
    return {**measured, "fitness": statistics.fmean(fitness)}


def profile_loop(
    loop: str, task: str, data: ImageData, loader: int, steps: int
) -> dict[str, float]:
    """Milliseconds a step by group; the source's with all threads, ours with one, as a worker."""
    few = dataclasses.replace(
        data,
        x_test=data.x_test[: PROTOCOL.batch_size],
        y_test=data.y_test[: PROTOCOL.batch_size],
    )
    trial = Trial(GENOME, task, 0)
    if loop == SOURCE:
        return milliseconds_a_step(
            lambda count: evaluate_source(trial, of_steps(count), few, loader), steps
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return milliseconds_a_step(lambda count: evaluate(trial, of_steps(count, loop), few), steps)
    finally:
        torch.set_num_threads(threads)


def of_steps(steps: int, precision: str = "float32") -> Conditions:
    """The protocol, shorter."""
    return dataclasses.replace(PROTOCOL, steps=steps, precision=precision)


def seconds_a_genome(measured: dict[str, float], lengths: Sequence[int]) -> float:
    """Of the protocol's length: measured, or on the line through two shorter ones."""
    if lengths == [PROTOCOL.steps]:
        return measured[str(PROTOCOL.steps)]
    short, long = lengths
    a_step = (measured[str(long)] - measured[str(short)]) / (long - short)
    return measured[str(short)] + (PROTOCOL.steps - short) * a_step


def page(results: Results) -> Iterator[str]:
    """What was found, in Markdown; made of the results alone."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads, lengths = results["threads"], results["steps measured"]
    yield "# One genome: the source's loop and ours"
    yield ""
    yield f"`{results['command']}` on {results['processor']}, {threads} threads, {versions}."
    yield ""
    yield (
        f"Three tasks, two seeds, {PROTOCOL.steps} steps of {PROTOCOL.batch_size}, "
        f"{PROTOCOL.train_samples:,} training images, test on the whole split; the published "
        f"genome. The source's loop has {threads} threads and trains one network at a time; ours "
        f"has {threads} workers of one thread, which have loaded their data. Medians of "
        f"{len(results['passes'])} passes; the update of ours ran on {results['update']}."
    )
    yield ""
    if lengths == [PROTOCOL.steps]:
        yield "Measured as it stands, nothing is extrapolated."
    else:
        yield (
            f"**Extrapolated**: measured with {lengths[0]} and with {lengths[1]} steps, test and "
            f"start included; {PROTOCOL.steps} steps lie on the line through both."
        )
    yield ""
    yield from genome_table(results)
    yield ""
    for task, loader in results["loaders"].items():
        times = ", ".join(f"{n}: {seconds:.1f} s" for n, seconds in loader["seconds"].items())
        yield (
            f"Loading processes on {task}, {PROBE_STEPS} steps and the test: {times}; "
            f"{loader['chosen']} were taken.  "
        )
    for task, loops in results["profiles"].items():
        yield ""
        yield f"## A training step on {task}"
        yield ""
        yield from profile_table(loops)
    if results["profiles"]:
        yield ""
        yield (
            f"Profiled alone: the source's with {threads} threads, ours with one, of which "
            f"{threads} run at a time. Batches are the wait for the next one; rest is the "
            "interpreter. A fused operation is one of ours that does the work of several layers, "
            "without their products."
        )


def genome_table(results: Results) -> Iterable[str]:
    """Seconds, ratios to the source's loop, fitness, and the start of the workers."""
    lengths, passes = results["steps measured"], results["passes"]
    seconds = {loop: [seconds_a_genome(one[loop], lengths) for one in passes] for loop in passes[0]}
    fitness = f"fitness, {lengths[-1]} steps"
    head = ["loop", "seconds a genome", "from–to", "times as fast", fitness, "start, seconds"]
    rows = []
    for loop, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds.get(SOURCE, times), times, strict=True)]
        starts = [one[loop]["start"] for one in passes if "start" in one[loop]]
        rows.append(
            [
                loop if loop == SOURCE else f"ours, {loop}",
                f"{statistics.median(times):.1f}",
                f"{min(times):.1f}–{max(times):.1f}",
                f"{statistics.median(ratios):.2f}" if SOURCE in seconds else "—",
                f"{passes[-1][loop]['fitness']:.4f}",
                f"{statistics.median(starts):.1f}" if starts else "—",
            ]
        )
    return markdown(head, rows)


def profile_table(loops: dict[str, dict[str, float]]) -> Iterator[str]:
    """Groups of operations, the largest of the first loop first; then the share of the update."""
    totals = {loop: sum(groups.values()) for loop, groups in loops.items()}
    groups = dict.fromkeys(
        group
        for spent in loops.values()
        for group in sorted(spent, key=spent.__getitem__, reverse=True)
    )

    def cells(group: str) -> Iterator[str]:
        for loop, spent in loops.items():
            share = spent.get(group, 0.0) / totals[loop]
            yield f"{spent[group]:.2f} ms, {share:.1%}" if group in spent else "—"

    head = ["", *(loop if loop == SOURCE else f"ours, {loop}" for loop in loops)]
    rows = [[group, *cells(group)] for group in groups]
    rows.append(["**step**", *(f"**{total:.2f} ms**" for total in totals.values())])
    yield from markdown(head, rows)
    shares = (
        f"{loop} {spent.get(UPDATE, 0.0) / totals[loop]:.1%}" for loop, spent in loops.items()
    )
    yield ""
    yield f"The optimizer's share: {', '.join(shares)}."


if __name__ == "__main__":
    sys.exit(main())
