"""Does refining pay? Evolutions with --refine and without, at about equal numbers of training runs.

For each run seed the refining run comes first. The plain one has as many more generations as the
refinement's training runs would have paid for; the table says what each came to, in training steps
too, since candidates near the best are seldom stopped early. Run it again with the same options
and it resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence

import evolve
from commandline import (
    Bar,
    add_machine_options,
    add_precision,
    markdown,
    positive,
    run_exit_code,
    training_workers,
    with_options,
)
from landscape import Landscape, truth

from evokernels.errors import SettingsError
from evokernels.evolution.comparison import Estimate
from evokernels.evolution.run import RunResult
from evokernels.evolution.run import evolve as run_evolution
from evokernels.evolution.settings import RunSettings


def main() -> int:
    """The command; its exit code."""
    return run_exit_code(run, parse(sys.argv[1:]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=evolve.PRESETS, default="quick", help="(quick)")
    parser.add_argument("--refine", type=positive, default=40, metavar="N", help="candidates (40)")
    parser.add_argument(
        "--run-seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(1 2 3)"
    )
    parser.add_argument("--generations", type=positive, help="of the refining runs (the preset's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (the preset's)")
    parser.add_argument(
        "--comparison-seeds",
        type=positive,
        default=10,
        metavar="N",
        help="fresh seeds that the winners are measured on (10)",
    )
    parser.add_argument(
        "--landscape",
        action="store_true",
        help="look fitness up in a formula instead of training: seconds, to see the effect",
    )
    add_precision(parser)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/refine"))
    add_machine_options(parser)
    return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one evolution came to.

    Attributes:
        runs: training runs of its search.
        steps: training steps of these runs.
        fresh: fitness of its winner on fresh seeds, on the split that selects.
        test: and on the test split; in the landscape, its true fitness.
    """

    runs: int
    steps: int
    fresh: float
    test: float


def run(options: argparse.Namespace) -> None:
    """Both variants for each run seed, then the table."""
    if len(set(options.run_seeds)) < len(options.run_seeds):
        given = " ".join(map(str, options.run_seeds))
        raise SettingsError(f"run-seeds must be different values, got {given}")
    refining, plain = [], []
    for seed in options.run_seeds:
        settings = chosen_settings(options, seed)
        result = evolution(options, settings, f"refining {seed}")
        refining.append(measured(options, result))
        result = evolution(options, equally_costly(settings, result), f"plain {seed}")
        plain.append(measured(options, result))
    print("\n".join(table(options, refining, plain)))


def chosen_settings(options: argparse.Namespace, seed: int) -> RunSettings:
    """Of the refining run."""
    given = {
        "refine": options.refine,
        "run_seed": seed,
        "generations": options.generations,
        "seeds": options.seeds,
        "comparison_seeds": options.comparison_seeds,
    }
    chosen = argparse.Namespace(**given, precision=options.precision)
    return RunSettings.from_dict(with_options(evolve.PRESETS[options.preset].to_dict(), chosen))


def equally_costly(settings: RunSettings, result: RunResult) -> RunSettings:
    """The settings without refinement, and with generations for about as many training runs.

    What a generation costs is seen in the refining run; its first, without elites, costs more. One
    run then comes to within a generation of the other; or three, where the seed race leaves out
    more of one than of the other, on average none. The table says what was spent.
    """
    usual = statistics.fmean(entry.evaluations for entry in result.history[1:] or result.history)
    extra = math.ceil(sum(entry.refining for entry in result.history) / usual)
    generations = settings.search.generations + extra
    search = dataclasses.replace(settings.search, generations=generations)
    return dataclasses.replace(settings, search=search, refine=0)


def evolution(options: argparse.Namespace, settings: RunSettings, name: str) -> RunResult:
    """Made, or looked up, in a folder of that name."""
    with contextlib.ExitStack() as stack:
        if options.landscape:
            workers = {"executor": Landscape()}
        else:
            opened = training_workers(options, settings.threads, settings.device)
            workers = stack.enter_context(opened)
        bar = stack.enter_context(Bar())
        return run_evolution(
            settings,
            options.out / name,
            **workers,
            on_progress=lambda done, expected, note: bar.show(done, expected, f"{name}, {note}"),
        )


def measured(options: argparse.Namespace, result: RunResult) -> Measured:
    """From a complete run."""
    cost = next(cost for cost in result.ledger if cost.rule == "search")
    test = truth(result.best.genome) if options.landscape else result.winner.test.mean
    return Measured(cost.runs, cost.steps_taken, result.winner.fresh.mean, test)


def table(
    options: argparse.Namespace, refining: Sequence[Measured], plain: Sequence[Measured]
) -> Iterator[str]:
    """Mean ± standard error over the run seeds, and of the differences in pairs."""
    seeds = len(options.run_seeds)
    worth = "true fitness" if options.landscape else "test split"
    yield (
        f"{options.preset}, --refine {options.refine}, {seeds} run seeds; "
        f"winners measured on {options.comparison_seeds} fresh seeds."
    )
    yield ""
    rows = [
        [
            label,
            f"{statistics.fmean(entry.runs for entry in entries):.0f}",
            f"{statistics.fmean(entry.steps for entry in entries):,.0f}",
            str(Estimate.of(entry.fresh for entry in entries)),
            str(Estimate.of(entry.test for entry in entries)),
        ]
        for label, entries in (("refining", refining), ("plain, more generations", plain))
    ]
    gains = [
        Estimate.of(
            getattr(a, name) - getattr(b, name) for a, b in zip(refining, plain, strict=True)
        )
        for name in ("fresh", "test")
    ]
    rows.append(["difference", "", "", *map(str, gains)])
    cost = ["training runs of the search", "their steps"]
    yield from markdown(["evolution", *cost, "fresh seeds", worth], rows)


if __name__ == "__main__":
    sys.exit(main())
