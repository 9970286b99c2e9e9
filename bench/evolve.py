"""Evolve an optimizer: a genetic search whose fitness is the training of small networks.

Run it again with the same options and it resumes, or shows the result of a run that is complete.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from commandline import Bar, add_machine_options, exit_code, worker_count

from evokernels.compiler.describe import formula
from evokernels.evolution import report
from evokernels.evolution.run import RunResult, RunSettings, evolve
from evokernels.evolution.trial import Conditions
from evokernels.search.genetic import GeneticConfig

PRESETS = {
    # embedded images; under five minutes on two cores
    "quick": RunSettings(
        search=GeneticConfig(population=12, generations=6, elites=2),
        tasks=("fashion_mnist_mini",),
        seeds=(0,),
        conditions=Conditions(steps=100, batch_size=64, train_samples=None),
        comparison_seeds=3,
        threads=1,
    ),
    # the source system: its README, section 3, and the defaults of its notebook
    "paper": RunSettings(
        search=GeneticConfig(population=50, generations=50, elites=3, tournament=4, max_terms=4),
        tasks=("fashion_mnist", "cifar10", "mnist"),
        seeds=(0, 1),
        conditions=Conditions(steps=500, batch_size=128, train_samples=15_000),
        comparison_seeds=3,
        threads=1,
    ),
}

# option, type, whether it takes several values, meaning
SETTINGS = (
    ("population", int, False, "genomes in a generation"),
    ("generations", int, False, "generations"),
    ("elites", int, False, "best genomes that pass on unchanged"),
    ("tournament", int, False, "genomes drawn for each parent, of which the best wins"),
    ("max-terms", int, False, "terms that a genome may have"),
    ("run-seed", int, False, "seed of the search"),
    ("tasks", str, True, "tasks that every genome is trained on"),
    ("seeds", int, True, "seeds of the training runs on each task"),
    ("steps", int, False, "training steps of each run"),
    ("batch-size", int, False, "images in a batch"),
    ("train-samples", int, False, "training images that are used"),
    ("comparison-seeds", int, False, "number of fresh seeds of the comparison with Adam and AdamW"),
    ("threads", int, False, "torch threads of each training run; they decide its last bits"),
    ("device", str, False, "where training runs: cpu, cuda or cuda:N; decides its last bits too"),
)


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    hint = f"all finished training runs are in {options.out}, the same command resumes there"
    return exit_code(lambda: run(options), hint)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the settings that are not given are None."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="settings where none are given (quick)"
    )
    presets = {preset: settings.to_dict() for preset, settings in PRESETS.items()}
    for name, kind, several, meaning in SETTINGS:
        values = ", ".join(
            f"{preset}: {shown(settings[name.replace('-', '_')])}"
            for preset, settings in presets.items()
        )
        parser.add_argument(
            f"--{name}",
            type=kind,
            nargs="+" if several else None,
            metavar="N" if kind is int and not several else name.rstrip("s").upper(),
            help=f"{meaning} ({values})",
        )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="the run folder (runs/<preset>)"
    )
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    options.out = options.out or pathlib.Path("runs") / options.preset
    return options


def shown(value: object) -> str:
    """A setting as one would type it."""
    if value is None:
        return "all"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(options: argparse.Namespace) -> None:
    """Run or resume, write the report, print the result."""
    values = PRESETS[options.preset].to_dict()
    given = {name: getattr(options, name, None) for name in values}
    values.update((name, value) for name, value in given.items() if value is not None)
    settings = RunSettings.from_dict(values)
    with Bar() as bar:
        result = evolve(
            settings,
            options.out,
            data_dir=options.data_dir,
            workers=worker_count(options, settings.threads, settings.device),
            on_progress=bar.show,
        )
    print(summary(settings, options.out, result))


def summary(settings: RunSettings, folder: pathlib.Path, result: RunResult) -> str:
    """The result in words, with the comparison and how to use it."""
    state = "is complete" if result.evaluations else "was complete already"
    seeds = " ".join(map(str, settings.fresh_seeds))
    best = result.best
    return f"""\
The run in {folder} {state}. The best genome, of fitness {best.score.fitness:.4f} on the seeds
that selected it:

{textwrap.indent(formula(best.genome), "    ")}

Compared with as many steps ({settings.conditions.steps}) on seeds {seeds}, which the selection
has not seen. Selection and comparison both use the test split, as in the source protocol.

{result.comparison.tables()}

{folder} has {", ".join(report.FILES)} and the journal. To train with the genome:

{textwrap.indent(report.usage(folder, settings.conditions.steps), "    ")}"""


if __name__ == "__main__":
    sys.exit(main())
