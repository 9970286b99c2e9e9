"""Compare optimizers: train each of them under the same conditions, with the same seeds.

An optimizer is a name or a genome file. Prints fitness overall and per task as mean ± standard
error over the seeds, on the test split; writes report.html, comparison.csv (every run) and
comparison.png.
Interrupted, the same command goes on; with more optimizers, tasks or seeds it trains what is new.

With --tune N, N settings of learning rate and schedule are tried of every optimizer (its own
first), on a seed that is not compared with. The best on a validation split is compared too.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from commandline import (
    Bar,
    add_machine_options,
    add_precision,
    add_terms,
    positive,
    resolved_precision,
    run_exit_code,
    training_workers,
)

from evokernels import terms, zoo
from evokernels.errors import GenomeError
from evokernels.evolution import report
from evokernels.evolution.baselines import BASELINES, Baseline
from evokernels.evolution.contest import Contest, ContestResult, compare
from evokernels.evolution.trial import Conditions
from evokernels.evolution.tuning import LARGEST_FACTOR, TUNING_SEED
from evokernels.genome import Genome

NAMED = {**zoo.WIDE, **zoo.GENOMES, **BASELINES}  # lion: the library's
ALL = "all"
VALIDATION_SAMPLES = 5_000  # where there is tuning


def main() -> int:
    """The command; its exit code."""
    return run_exit_code(run, parse(sys.argv[1:]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the defaults are the comparison of the source system."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "optimizers",
        nargs="*",
        default=list(zoo.GENOMES),
        metavar="OPTIMIZER",
        help=f"a genome file, {ALL}, or one of {', '.join(NAMED)} ({' '.join(zoo.GENOMES)})",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["fashion_mnist", "cifar10", "mnist"],
        metavar="TASK",
        help="tasks to train on (fashion_mnist cifar10 mnist)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="SEED",
        help="seeds of the training runs on each task (0 1 2)",
    )
    for name, value, meaning in (
        ("steps", 1000, "training steps of each run"),
        ("batch-size", 128, "samples in a batch"),
        ("train-samples", 15_000, "training samples that are used"),
        ("threads", 1, "torch threads of each training run"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=value, metavar="N", help=f"{meaning} ({value})"
        )
    parser.add_argument(
        "--tune",
        type=positive,
        default=0,
        metavar="N",
        help="settings that are tried of each optimizer (none)",
    )
    parser.add_argument(
        "--validation-samples",
        type=positive,
        metavar="N",
        help="further training samples, that no run trains with and --tune chooses by "
        f"({VALIDATION_SAMPLES} with --tune)",
    )
    add_terms(parser, "which genomes have")
    add_precision(parser)
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="where training runs: cpu, cuda or cuda:N (cpu)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/compare"),
        metavar="DIR",
        help="the run folder (runs/compare)",
    )
    add_machine_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run or resume, print the result."""
    if options.terms is not None:
        terms.load(options.terms)
    names = list(dict.fromkeys(name for given in options.optimizers for name in expanded(given)))
    conditions = Conditions(
        options.steps,
        options.batch_size,
        options.train_samples,
        validation_samples=options.validation_samples
        or (VALIDATION_SAMPLES if options.tune else 0),
        precision=resolved_precision(options.precision, options.device),
    )
    contest = Contest(
        {name: optimizer(name) for name in names},
        options.tasks,
        options.seeds,
        conditions,
        options.threads,
        options.device,
        options.tune,
    )
    with training_workers(options, options.threads, options.device) as workers, Bar() as bar:
        result = compare(
            contest,
            options.out,
            **workers,
            on_progress=bar.show,
        )
    print(summary(contest, options.out, result))


def expanded(name: str) -> list[str]:
    """The names that a name on the command line stands for."""
    return list(NAMED) if name == ALL else [name]


def optimizer(name: str) -> Genome | Baseline:
    """A named optimizer, or a genome from a file; raises GenomeError."""
    if name in NAMED:
        return NAMED[name]
    if not pathlib.Path(name).exists():
        raise GenomeError(f"{name!r} is neither a genome file nor one of {', '.join(NAMED)}, {ALL}")
    return Genome.load(name)


def summary(contest: Contest, folder: pathlib.Path, result: ContestResult) -> str:
    """The result in words."""
    state = "is complete" if result.evaluations else "was complete already"
    conditions = contest.conditions
    seeds = " ".join(map(str, contest.seeds))
    lines = [
        f"The comparison in {folder} {state}: {conditions.steps} steps, batches of "
        f"{conditions.batch_size}, {conditions.precision}, seeds {seeds}."
    ]
    if contest.trials:
        lines.append(
            f"Tuned: {contest.trials} trials of each optimizer on seed {TUNING_SEED}, its own "
            f"setting first, then learning rates from 1/{LARGEST_FACTOR:g} to "
            f"{LARGEST_FACTOR:g} times its own, with warmup and cosine or constant; chosen on "
            f"{conditions.validation_samples} validation samples."
        )
    has = ", ".join(report.COMPARISON_FILES)
    return "\n".join([*lines, "", result.tables(), "", f"{folder} has {has} and the journal."])


if __name__ == "__main__":
    sys.exit(main())
