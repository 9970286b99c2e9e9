"""Train every pair of a small space of architectures and optimizers once, and write down what each
is worth: the truth that bench/truth.py holds searches against.

Architectures: every sequence of up to three blocks of three kinds, in front of one hidden layer.
Optimizers: five rules of the zoo at eight learning rates each. 40 × 40 pairs, each trained on the
embedded images with the same seed. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from commandline import Bar, add_machine_options, run_exit_code, training_workers

from evokernels import Architecture, Genome, zoo
from evokernels.errors import JournalError
from evokernels.evolution.evaluations import Request, open_evaluations
from evokernels.evolution.files import csv_text, make_folder, write_atomically
from evokernels.evolution.trial import Conditions, Trial
from evokernels.search.score import Score, Status

__all__ = ["PAIRS", "RECIPES", "RESULTS", "SEQUENCES", "Recipe", "read_table"]

RESULTS = pathlib.Path(__file__).parent / "results" / "truth"
TABLE = RESULTS / "pairs.csv"
HEADER = ("blocks", "rule", "half_decades", "status", "fitness")
DIGITS = 6  # of the fitness

BLOCKS = {
    "plain": ("conv3x3 16", "relu", "maxpool"),
    "normed": ("conv3x3 16", "batchnorm", "relu", "maxpool"),
    "residual": ("residual", "relu"),
}
HEAD = ("dense 32", "relu")
LONGEST = 3  # blocks

# The names of an architecture's blocks, the first next to the images.
Blocks = tuple[str, ...]

SEQUENCES: tuple[Blocks, ...] = tuple(
    blocks for length in range(LONGEST + 1) for blocks in itertools.product(BLOCKS, repeat=length)
)


class Recipe(NamedTuple):
    """A rule of the zoo at a learning rate.

    Attributes:
        rule: its name.
        half_decades: by which the learning rate is above the rule's own.
    """

    rule: str
    half_decades: int


# Of a rule side by side, from the lowest learning rate to the highest. Within 60 steps every rule
# is best somewhere in between.
RECIPES: tuple[Recipe, ...] = tuple(
    Recipe(rule, half_decades)
    for rule in ("sgd_momentum", "rmsprop", "adam", "evolved_2025", "evolved_2026")
    for half_decades in range(-3, 5)
)

Pair = tuple[Blocks, Recipe]
PAIRS: tuple[Pair, ...] = tuple(itertools.product(SEQUENCES, RECIPES))

TASK, SEED, THREADS = "fashion_mnist_mini", 0, 1
CONDITIONS = Conditions(steps=60, batch_size=64, train_samples=None, validation_samples=1000)


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/truth"),
        metavar="DIR",
        help="folder of the journal (runs/truth)",
    )
    add_machine_options(parser)
    return run_exit_code(run, parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Train what the journal lacks, then write the table."""
    make_folder(RESULTS)
    trials = {pair: trial(*pair) for pair in PAIRS}
    settings = {**dataclasses.asdict(CONDITIONS), "threads": THREADS, "device": "cpu"}
    with (
        training_workers(options, THREADS, "cpu") as workers,
        Bar() as bar,
        open_evaluations(
            options.out,
            settings,
            CONDITIONS,
            bar.show,
            **workers,
        ) as evaluations,
    ):
        evaluations.make(map(Request.after_search, trials.values()), 0, "pairs")
        outcomes = {pair: evaluations.outcome(trial) for pair, trial in trials.items()}
    rows = (
        (" ".join(blocks), *recipe, outcome.status.value, round(outcome.fitness, DIGITS))
        for (blocks, recipe), outcome in outcomes.items()
    )
    write_atomically(TABLE, csv_text(HEADER, rows).encode())
    print(f"{TABLE} has {len(outcomes):,} pairs")


def trial(blocks: Blocks, recipe: Recipe) -> Trial:
    """The one training run of a pair."""
    return Trial(optimizer(recipe), TASK, SEED, architecture=architecture(blocks))


def architecture(blocks: Sequence[str]) -> Architecture:
    """The components of the blocks, then the hidden layer."""
    return Architecture([*(name for block in blocks for name in BLOCKS[block]), *HEAD])


def optimizer(recipe: Recipe) -> Genome:
    """The rule with its learning rate changed."""
    genome = zoo.GENOMES[recipe.rule]
    return dataclasses.replace(genome, lr_log10=genome.lr_log10 + recipe.half_decades / 2)


def read_table(path: pathlib.Path = TABLE) -> Mapping[Pair, Score]:
    """What each pair is worth.

    Raises:
        JournalError: the file is missing, or it does not have every pair once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JournalError(
            f"cannot read {path}: {error.strerror}; python bench/truth_table.py makes it"
        ) from None
    rows = list(csv.DictReader(text.splitlines()))
    table = {
        (tuple(row["blocks"].split()), Recipe(row["rule"], int(row["half_decades"]))): Score(
            float(row["fitness"]), Status(row["status"])
        )
        for row in rows
    }
    if len(rows) != len(PAIRS) or set(table) != set(PAIRS):
        raise JournalError(
            f"{path} has not every pair once ({len(rows)} rows for {len(PAIRS)} pairs); "
            "python bench/truth_table.py makes it anew"
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
