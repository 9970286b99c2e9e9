"""Evolve an optimizer: a genetic search whose fitness is the training of small networks.

Run it again with the same options and it resumes, or shows the result of a run that is complete.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from tqdm import tqdm

from evokernels.compiler.describe import formula
from evokernels.errors import EvokernelsError
from evokernels.evolution import report
from evokernels.evolution.evaluator import Budget
from evokernels.evolution.run import Generation, Progress, RunResult, RunSettings, evolve
from evokernels.search.genetic import GeneticConfig, Scored

PRESETS = {
    # embedded images; under five minutes on two cores
    "quick": RunSettings(
        search=GeneticConfig(population=12, generations=6, elites=2),
        tasks=("fashion_mnist_mini",),
        seeds=(0,),
        budget=Budget(steps=100, batch_size=64, train_samples=None),
        comparison_seeds=3,
        threads=1,
    ),
    # the source system: its README, section 3, and the defaults of its notebook
    "paper": RunSettings(
        search=GeneticConfig(population=50, generations=50, elites=3, tournament=4, max_terms=4),
        tasks=("fashion_mnist", "cifar10", "mnist"),
        seeds=(0, 1),
        budget=Budget(steps=500, batch_size=128, train_samples=15_000),
        comparison_seeds=3,
        threads=1,
    ),
}

# option, whether it takes several values, its type and what it means
SETTINGS = (
    ("population", False, int, "genomes in a generation"),
    ("generations", False, int, "generations"),
    ("elites", False, int, "best genomes that pass on unchanged"),
    ("tournament", False, int, "genomes drawn for each parent, of which the best wins"),
    ("max-terms", False, int, "terms that a genome may have"),
    ("run-seed", False, int, "seed of the search"),
    ("tasks", True, str, "tasks that every genome is trained on"),
    ("seeds", True, int, "seeds of the training runs on each task"),
    ("steps", False, int, "training steps of each run"),
    ("batch-size", False, int, "images in a batch"),
    ("train-samples", False, int, "training images that are used; all if not given"),
    ("comparison-seeds", False, int, "fresh seeds that the best genome meets Adam and AdamW on"),
    ("threads", False, int, "torch threads of each training run; they decide its last bits"),
)


def main() -> int:
    options = parse(sys.argv[1:])
    bar = Bar()
    try:
        settings = settings_from(options)
        result = evolve(
            settings,
            options.out,
            data_dir=options.data_dir,
            workers=options.workers or max(1, cores() // settings.threads),
            on_progress=bar.show,
            on_generation=lambda best, history: save(options.out, best, history),
        )
        bar.close()
        report.plot_history(options.out, result.history)
        print(summary(settings, options.out, result))
    except EvokernelsError as error:
        bar.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bar.close()
        print(
            f"interrupted; all finished evaluations are in {options.out}: "
            "the same command resumes there",
            file=sys.stderr,
        )
        return 130
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="where settings not given come from"
    )
    presets = {name: preset.to_dict() for name, preset in PRESETS.items()}
    for name, several, kind, meaning in SETTINGS:
        values = ", ".join(
            f"{preset}: {shown(settings[name.replace('-', '_')])}"
            for preset, settings in presets.items()
        )
        parser.add_argument(
            f"--{name}",
            type=kind,
            nargs="+" if several else None,
            metavar=name.rstrip("s").upper() if several else "N",
            help=f"{meaning} ({values})",
        )
    parser.add_argument("--out", type=pathlib.Path, help="run folder (runs/<preset>)")
    parser.add_argument(
        "--data-dir", help="folder with data sets (EVOKERNELS_DATA, else ~/.cache/evokernels/data)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train; the result does not depend on them (one for each free core)",
    )
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    options.out = options.out or pathlib.Path("runs") / options.preset
    return options


def settings_from(options: argparse.Namespace) -> RunSettings:
    """The preset with the options given on top; raises EvokernelsError."""
    chosen = PRESETS[options.preset].to_dict()
    for name in chosen:
        value = getattr(options, name)
        if value is not None:
            chosen[name] = value
    return RunSettings.from_dict(chosen)


def shown(value: object) -> str:
    if value is None:
        return "all"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(folder: pathlib.Path, best: Scored, history: Sequence[Generation]) -> None:
    report.write_history(folder, history)
    report.write_best_genome(folder, best.genome)


def summary(settings: RunSettings, folder: pathlib.Path, result: RunResult) -> str:
    state = "is complete" if result.evaluations else "was complete already"
    seeds = " ".join(map(str, settings.fresh_seeds))
    return "\n".join(
        (
            f"The run in {folder} {state}. The best genome has fitness "
            f"{result.best.score.fitness:.4f} on the seeds it was selected on:",
            "",
            indented(formula(result.best.genome)),
            "",
            f"Compared at the same budget ({settings.budget.steps} steps) on seeds {seeds}, which "
            "the selection has not seen.",
            "Selection and comparison both use the test split, as in the source protocol.",
            "",
            result.comparison.tables(),
            "",
            f"{folder} has {report.HISTORY}, {report.BEST_GENOME}, {report.EVOLUTION_PLOT} and "
            "the journal. To train with the genome:",
            "",
            indented(report.usage(folder, settings.budget.steps)),
        )
    )


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


class Bar:
    """The progress bar; it appears with the first training run and estimates the time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def show(self, progress: Progress) -> None:
        if self.bar is None:
            self.bar = tqdm(
                initial=progress.done,
                unit="run",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
            )
        self.bar.total = progress.expected
        self.bar.set_description(progress.note, refresh=False)
        self.bar.update(progress.done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
