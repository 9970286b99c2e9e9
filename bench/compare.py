"""Compare optimizers: train each of them under the same conditions, with the same seeds.

An optimizer is a name of evokernels.zoo or a genome file. Prints fitness overall and per task as
mean ± standard error over the seeds; writes comparison.csv (every run) and comparison.png.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from commandline import Bar, add_machine_options, exit_code, positive, worker_count

from evokernels import zoo
from evokernels.errors import GenomeError
from evokernels.evolution import report
from evokernels.evolution.comparison import compare
from evokernels.evolution.devices import find_device
from evokernels.evolution.files import make_folder
from evokernels.evolution.pool import open_pool
from evokernels.evolution.trial import Conditions
from evokernels.genome import Genome
from evokernels.tasks import get_task


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "nothing is written before the comparison is complete")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the defaults are the comparison of the source system."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "optimizers",
        nargs="*",
        default=list(zoo.GENOMES),
        metavar="OPTIMIZER",
        help="names of the zoo and genome files",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["fashion_mnist", "cifar10", "mnist"],
        metavar="TASK",
        help="tasks to train on",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="SEED",
        help="seeds of the training runs on each task",
    )
    for name, value, meaning in (
        ("steps", 1000, "training steps of each run"),
        ("batch-size", 128, "images in a batch"),
        ("train-samples", 15_000, "training images that are used"),
        ("threads", 1, "torch threads of each training run"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=value, metavar="N", help=meaning)
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="where training runs: cpu, cuda or cuda:N",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/compare"),
        metavar="DIR",
        help="folder for the results",
    )
    add_machine_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train, print the tables, write the results."""
    genomes = {name: genome(name) for name in options.optimizers}
    for task in options.tasks:
        get_task(task)
    find_device(options.device)
    make_folder(options.out)
    conditions = Conditions(options.steps, options.batch_size, options.train_samples)
    workers = worker_count(options, options.threads, options.device)
    with (
        Bar() as bar,
        open_pool(
            conditions,
            workers=workers,
            threads=options.threads,
            device=options.device,
            data_dir=options.data_dir,
        ) as pool,
    ):
        comparison = compare(
            pool,
            genomes,
            options.tasks,
            options.seeds,
            on_progress=lambda done, expected: bar.show(done, expected, "comparison"),
        )
    report.write_comparison(options.out, comparison)
    seeds = " ".join(map(str, options.seeds))
    print(f"{options.steps} steps, batches of {options.batch_size}, seeds {seeds}\n")
    print(comparison.tables())
    print(f"\n{options.out} has {' and '.join(report.COMPARISON_FILES)}.")


def genome(name: str) -> Genome:
    """A genome of the zoo or from a file; raises GenomeError."""
    if name in zoo.GENOMES:
        return zoo.GENOMES[name]
    if not pathlib.Path(name).exists():
        raise GenomeError(
            f"{name!r} is neither a genome file nor one of the zoo ({', '.join(zoo.GENOMES)})"
        )
    return Genome.load(name)


if __name__ == "__main__":
    sys.exit(main())
