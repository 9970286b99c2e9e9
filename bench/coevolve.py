"""Co-evolve architectures and optimizers; fitness is the training of the one with the other.

Prints first how many training runs that can take at most. Run it again with the same options and
it resumes, or shows the result of a run that is complete.
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
    run_exit_code,
    training_workers,
    with_folder,
    with_options,
)

from evokernels.compiler.describe import formula
from evokernels.evolution.coevolution_history import OWN, CoevolutionResult
from evokernels.evolution.coevolution_report import FILES
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.coevolving import coevolve
from evokernels.evolution.comparison import table
from evokernels.evolution.trial import Conditions
from evokernels.search.coevolution import CoevolutionConfig
from evokernels.tasks import get_task

PRESETS = {
    # embedded images; under five minutes on two cores
    "quick": CoevolutionSettings(
        search=CoevolutionConfig(generations=6),
        tasks=("fashion_mnist_mini",),
        seeds=(0,),
        conditions=Conditions(
            steps=100, batch_size=64, train_samples=None, validation_samples=1000, hurdle=True
        ),
        comparison_seeds=3,
        threads=1,
        finalists=3,
    ),
    # training runs as an evolution of optimizers has them (bench/evolve.py, "paper"), but for the
    # second seed; about four hours on two cores, one task at a time an hour or two
    "real": CoevolutionSettings(
        search=CoevolutionConfig(generations=10),
        tasks=("fashion_mnist", "cifar10", "mnist"),
        seeds=(0,),
        conditions=Conditions(
            steps=500, batch_size=128, train_samples=15_000, validation_samples=5_000, hurdle=True
        ),
        comparison_seeds=5,
        threads=1,
        finalists=3,
    ),
}

SETTINGS = (
    ("architectures", int, False, "architectures in a generation"),
    ("optimizers", int, False, "optimizers in a generation"),
    ("generations", int, False, "generations"),
    ("collaborators", int, False, "of the other side that each individual is trained with"),
    ("elites", int, False, "best individuals of each side that pass on unchanged"),
    ("tournament", int, False, "individuals drawn for each parent, of which the best wins"),
    ("max-length", int, False, "components that an architecture may have"),
    ("max-parameters", int, False, "of a network; 0: those of the tasks' smallest own network"),
    ("max-work", float, False, "multiply-adds of a network, in those of the task's own"),
    ("penalty", float, False, "what a million parameters take from a pair's worth"),
    ("max-terms", int, False, "terms that a genome may have"),
    ("catalogue", str, False, "what terms there are: classic or wide"),
    ("recipes", str, True, "named genomes to choose among, instead of genomes that evolve"),
    ("run-seed", int, False, "seed of the search"),
    ("tasks", str, True, "tasks that every pair is trained on"),
    ("seeds", int, True, "seeds of the training runs on each task"),
    ("steps", int, False, "training steps of each run"),
    ("batch-size", int, False, "samples in a batch"),
    ("train-samples", int, False, "training samples that are used"),
    ("validation-samples", int, False, "further ones that select; 0: the test split does"),
    ("comparison-seeds", int, False, "number of fresh seeds of the comparison"),
    ("finalists", int, False, "pairs that further seeds choose the winner from"),
    ("threads", int, False, "torch threads of each training run; they decide its last bits"),
    ("device", str, False, "where training runs: cpu, cuda or cuda:N; decides its last bits too"),
)
SWITCHES = (("hurdle", "end runs that are no better than guessing after 50 steps"),)


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
    add_run_options(parser, prefix="coevolve-")
    return with_folder(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Say what it costs, run or resume, write the report, print the result."""
    values = PRESETS[options.preset].to_dict()
    settings = CoevolutionSettings.from_dict(with_options(values, options))
    print(plan(settings), flush=True)
    with (
        training_workers(options, settings.threads, settings.device) as workers,
        Bar() as bar,
        generation_log(options) as log,
    ):
        result = coevolve(
            settings,
            options.out,
            **workers,
            on_progress=bar.show,
            on_generation=log,
        )
    print(summary(settings, options.out, result))


def plan(settings: CoevolutionSettings) -> str:
    """The cost, before anything is trained."""
    search, seeds = settings.search, len(settings.seeds)
    return _filled(
        f"Planned: {search.generations} generations of at most {search.collaborators} × "
        f"({search.first} + {search.second}) = {search.evaluations_per_generation} pairs, each "
        f"trained on {', '.join(settings.tasks)} with {seeds} seed{'s' if seeds > 1 else ''}: at "
        f"most {settings.search_runs:,} training runs of {settings.conditions.steps} steps. "
        f"{settings.final_runs:,} more choose among the finalists ({settings.finalists}), and "
        f"{settings.comparison_runs:,} compare the winner on fresh seeds "
        f"({settings.comparison_seeds}). At most {settings.planned_runs:,} in all.",
        f"A network has at most {settings.budget:,} parameters and {settings.max_work:g} times the "
        "multiply-adds of its task's own network; a million parameters take "
        f"{settings.penalty:g} from a pair's worth.",
    )


def summary(settings: CoevolutionSettings, folder: pathlib.Path, result: CoevolutionResult) -> str:
    """The result in words, with the comparison and how to use it."""
    return f"""\
{told(settings, folder, result)}

{textwrap.indent(networks(settings, result), "    ")}

{textwrap.indent(formula(result.best.pair.optimizer), "    ")}

{measured(settings, result)}

{contenders(settings, result)}

{_filled(f"{folder} has {', '.join(FILES)} and the journal. To train the pair:")}

    python {folder / "train_best.py"}"""


def told(settings: CoevolutionSettings, folder: pathlib.Path, result: CoevolutionResult) -> str:
    """What the search cost and came to."""
    state = "is complete" if result.evaluations else "was complete already"
    trained = sum(entry.evaluations for entry in result.history)
    reused = sum(entry.reused for entry in result.history)
    failed = " It failed in at least one of its runs." if result.best.score.status.failed else ""
    return _filled(
        f"The run in {folder} {state}. The search took {trained:,} training runs; {reused:,} more "
        f"were known already.{failed} The best pair, of fitness {result.best.fitness:.4f} on the "
        f"seeds and the {settings.selection_split} split of the search, has "
        f"{result.best.parameters:,.0f} parameters:"
    )


def networks(settings: CoevolutionSettings, result: CoevolutionResult) -> str:
    """What the best architecture becomes on each task."""
    lines = []
    for task in settings.tasks:
        decoded = get_task(task).decode(result.best.pair.architecture)
        text = f"{task}, {decoded.parameters:,} parameters: {', '.join(decoded.components)}"
        lines.append(textwrap.fill(text, 96, subsequent_indent="    "))
    return "\n".join(lines)


def measured(settings: CoevolutionSettings, result: CoevolutionResult) -> str:
    """What is left of the best pair's fitness, and what it is compared on."""
    seeds = " ".join(map(str, settings.fresh_seeds))
    honest = settings.selection_split != "test"
    return _filled(
        f"On seeds {seeds}, which the selection has not seen, its fitness on the same split is "
        f"{result.winner.fresh}: selection has overestimated it by {result.winner.bias}.",
        f"Compared with as many steps ({settings.conditions.steps}) on these seeds, on the test "
        f"split, which {'selected nothing' if honest else 'is the one that selected'}, its fitness "
        f"less that of ({OWN}) is {result.lead}, seed by seed:",
    )


def contenders(settings: CoevolutionSettings, result: CoevolutionResult) -> str:
    """Who is compared, with parameters."""
    comparison = result.comparison
    per_task = settings.tasks if len(settings.tasks) > 1 else ()
    return table(
        ["contender", "parameters", "test fitness", "test accuracy"]
        + [f"fitness on {task}" for task in per_task],
        [
            [name, f"{pair.mean_parameters(settings.tasks):,.0f}"]
            + [str(comparison.overall_fitness(name)), str(comparison.overall_accuracy(name))]
            + [str(comparison.task_fitness(name, task)) for task in per_task]
            for name, pair in result.contenders.items()
        ],
    )


def _filled(*paragraphs: str) -> str:
    return "\n".join(textwrap.fill(text, 100, break_on_hyphens=False) for text in paragraphs)


if __name__ == "__main__":
    sys.exit(main())
