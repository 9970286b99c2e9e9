"""Evolve an optimizer: a genetic search whose fitness is the training of small networks.

Run it again with the same options and it resumes, or shows the result of a run that is complete.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from commandline import (
    Bar,
    add_run_options,
    add_settings,
    generation_log,
    positive,
    run_exit_code,
    training_workers,
    with_folder,
    with_options,
)

from evokernels.compiler.describe import formula
from evokernels.evolution import report
from evokernels.evolution.audit import audit_line
from evokernels.evolution.ledger import ledger_line
from evokernels.evolution.run import RunResult, evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions
from evokernels.search.genetic import GeneticConfig

PRESETS = {
    # embedded images; under five minutes on two cores
    "quick": RunSettings(
        search=GeneticConfig(population=12, generations=6, elites=2),
        tasks=("fashion_mnist_mini",),
        seeds=(0,),
        conditions=Conditions(
            steps=100, batch_size=64, train_samples=None, validation_samples=1000, hurdle=True
        ),
        comparison_seeds=3,
        threads=1,
        race=True,
        finalists=3,
    ),
    # the source system: its README, section 3, and the defaults of its notebook; but selection is
    # by a validation split, and what is hopeless is stopped, unless --parity is given
    "paper": RunSettings(
        search=GeneticConfig(population=50, generations=50, elites=3, tournament=4, max_terms=4),
        tasks=("fashion_mnist", "cifar10", "mnist"),
        seeds=(0, 1),
        conditions=Conditions(
            steps=500,
            batch_size=128,
            train_samples=15_000,
            validation_samples=5_000,
            hurdle=True,
        ),
        comparison_seeds=3,
        threads=1,
        race=True,
        finalists=3,
    ),
}

# the protocol of the source system, whatever the preset
PARITY = {
    "validation_samples": 0,
    "hurdle": False,
    "race": False,
    "rotate_seeds": False,
    "finalists": 1,
    "refine": 0,
    "catalogue": "classic",
}

SETTINGS = (
    ("population", int, False, "genomes in a generation"),
    ("generations", int, False, "generations"),
    ("elites", int, False, "best genomes that pass on unchanged"),
    ("tournament", int, False, "genomes drawn for each parent, of which the best wins"),
    ("max-terms", int, False, "terms that a genome may have"),
    ("catalogue", str, False, "what terms there are: classic or wide"),
    ("run-seed", int, False, "seed of the search"),
    ("tasks", str, True, "tasks that every genome is trained on"),
    ("seeds", int, True, "seeds of the training runs on each task"),
    ("steps", int, False, "training steps of each run"),
    ("batch-size", int, False, "samples in a batch"),
    ("train-samples", int, False, "training samples that are used"),
    ("validation-samples", int, False, "further ones that select; 0: the test split does"),
    ("comparison-seeds", int, False, "number of fresh seeds of the comparison with Adam and AdamW"),
    ("finalists", int, False, "genomes that further seeds choose the winner from"),
    ("refine", int, False, "candidates by which ENES refines each of the best genomes; 0: off"),
    ("plateau", int, False, "end after so many generations without a better genome; 0: never"),
    ("threads", int, False, "torch threads of each training run; they decide its last bits"),
    ("device", str, False, "where training runs: cpu, cuda or cuda:N; decides its last bits too"),
)

SWITCHES = (
    ("hurdle", "end runs that are no better than guessing after 50 steps"),
    ("race", "leave out further seeds of genomes that the first ones show to be hopeless"),
    ("rotate-seeds", "draw the training seeds anew for every generation"),
)


def main() -> int:
    """The command; its exit code."""
    return run_exit_code(run, parse(sys.argv[1:]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the settings that are not given are None."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(
        parser, {name: preset.to_dict() for name, preset in PRESETS.items()}, SETTINGS, SWITCHES
    )
    parser.add_argument(
        "--parity",
        action="store_true",
        help="the protocol of the source system: the test split selects, and nothing is stopped "
        "early; options given beside it still hold",
    )
    parser.add_argument(
        "--audit",
        type=positive,
        default=0,
        metavar="N",
        help="train N of the genomes that were stopped early to the end, after the search (0)",
    )
    add_run_options(parser)
    return with_folder(parser.parse_args(arguments))


def chosen_settings(options: argparse.Namespace) -> RunSettings:
    """The preset, then parity, then what is given."""
    values = PRESETS[options.preset].to_dict()
    if options.parity:
        values.update(PARITY)
    return RunSettings.from_dict(with_options(values, options))


def run(options: argparse.Namespace) -> None:
    """Run or resume, write the report, print the result."""
    settings = chosen_settings(options)
    with (
        training_workers(options, settings.threads, settings.device) as workers,
        Bar() as bar,
        generation_log(options) as log,
    ):
        result = evolve(
            settings,
            options.out,
            **workers,
            audits=options.audit,
            on_progress=bar.show,
            on_generation=log,
        )
    print(summary(settings, options.out, result))


def summary(settings: RunSettings, folder: pathlib.Path, result: RunResult) -> str:
    """The result in words, with the comparison and how to use it."""
    files = [*report.FILES, *([report.AUDIT] if result.audit else [])]
    return f"""\
{told(settings, folder, result)}

{textwrap.indent(formula(result.best.genome), "    ")}

{measured(settings, result)}

{result.comparison.tables()}

{folder} has {", ".join(files)} and the journal. To train with the genome:

{textwrap.indent(report.usage(folder, result.best.genome, settings.conditions.steps), "    ")}"""


def told(settings: RunSettings, folder: pathlib.Path, result: RunResult) -> str:
    """What the search cost and came to."""
    state = "is complete" if result.evaluations else "was complete already"
    sentences = [f"The run in {folder} {state}."]
    if settings.parity:
        sentences.append("Parity: this is the protocol of the source system.")
    sentences.append(ledger_line(result.ledger))
    if result.audit:
        sentences.append(audit_line(result.audit))
    if result.best.score.status.failed:
        sentences.append("Every genome failed in at least one of its training runs.")
    sentences.append(
        f"The best genome, of fitness {result.best.score.fitness:.4f} on the seeds and the "
        f"{settings.selection_split} split of the search:"
    )
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)


def measured(settings: RunSettings, result: RunResult) -> str:
    """What is left of the best genome's fitness, and what it is compared on."""
    seeds = " ".join(map(str, settings.fresh_seeds))
    winner = result.winner
    honest = settings.selection_split != "test"
    sentences = (
        f"On seeds {seeds}, which the selection has not seen, its fitness on the same split is "
        f"{winner.fresh}: selection has overestimated it by {winner.bias}.",
        f"Compared with as many steps ({settings.conditions.steps}) on these seeds, on the test "
        "split, which " + ("selected nothing:" if honest else "is the one that selected:"),
    )
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
