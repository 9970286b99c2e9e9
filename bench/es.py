"""Networks trained without gradients, by evolution strategies.

    python bench/es.py curve     # y = 2x^2 + 5 by a 1-10-10-1 network: the source document's task
    python bench/es.py images    # a 784-32-10 network on the embedded Fashion-MNIST images
    python bench/es.py rates     # which learning rates "images" should have: validation images
    python bench/es.py speed     # an iteration: the source's program, torch.bmm, ours

The first three train with each update in turn and write a CSV and a picture, after Ctrl-C too; run
again with the same options they resume, or show the result of a training that is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from commandline import Bar, exit_code, markdown, positive
from es_examples import EXAMPLES, Example, Row, Settings, train
from es_speed import speed_table

from evokernels.evolution.figures import new_figure, save_figure
from evokernels.evolution.files import csv_text, make_folder, write_atomically

# option, type, meaning
SETTINGS = (
    ("iterations", positive, "generations"),
    ("population", positive, "members of a generation"),
    ("sigma", float, "standard deviation of the noise"),
    ("samples", positive, "samples that score the members of a generation"),
    ("every", positive, "iterations from one row of the CSV to the next"),
    ("seed", int, "of the first weights, the noise and the samples"),
)

Curves = Mapping[str, Sequence[Row]]


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: options.run(options), "the same command resumes a training")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and in ``run`` what to do with them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, example in EXAMPLES.items():
        command = commands.add_parser(name, help=example.__doc__)
        for option, kind, meaning in SETTINGS:
            default = getattr(example.defaults, option)
            command.add_argument(
                f"--{option}", type=kind, default=default, help=f"{meaning} ({default:,})"
            )
        command.add_argument(
            "--updates",
            nargs="+",
            choices=example.updates,
            default=list(example.updates),
            metavar="UPDATE",
            help=f"who takes the step, of {', '.join(map(repr, example.updates))} (all)",
        )
        command.add_argument(
            "--out",
            type=pathlib.Path,
            default=pathlib.Path("runs") / f"es_{name}",
            metavar="DIR",
            help=f"folder for {name}.csv, {name}.png and the state (runs/es_{name})",
        )
        command.set_defaults(run=learn, example=name)
    command = commands.add_parser("speed", help="time one iteration, in turns")
    command.add_argument("--passes", type=positive, default=20, help="turns of each (20)")
    command.set_defaults(run=lambda options: print("\n".join(speed_table(options.passes))))
    return parser.parse_args(arguments)


def learn(options: argparse.Namespace) -> None:
    """Train with every update, write the CSV and the picture, print what came of it."""
    make_folder(options.out)
    fields = dataclasses.fields(Settings)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields})
    example = EXAMPLES[options.example](settings)
    curves: dict[str, list[Row]] = {}
    try:
        with Bar("iteration") as bar:
            for place, update in enumerate(options.updates):
                path = options.out / f"{update.replace(' ', '_')}.pt"
                for row in train(example, update, settings, path):
                    curves.setdefault(update, []).append(row)
                    done = place * settings.iterations + row.iteration
                    total = len(options.updates) * settings.iterations
                    bar.show(done, total, f"{update} {row.value:.3g}")
    except KeyboardInterrupt:
        if curves:
            report(options.out / options.example, example, settings, curves)
        raise
    report(options.out / options.example, example, settings, curves)


def report(path: pathlib.Path, example: Example, settings: Settings, curves: Curves) -> None:
    """Write ``path`` with .csv and .png added, print what came of it."""
    given = dataclasses.asdict(settings)
    rows = ((u, *row, *given.values()) for u, curve in curves.items() for row in curve)
    table = csv_text(["update", "iteration", "evaluations", example.quantity, *given], rows)
    write_atomically(path.with_suffix(".csv"), table.encode())
    words = ", ".join(f"{name} {value:,}" for name, value in given.items())
    draw(path.with_suffix(".png"), example, words, curves)
    print(f"{path.name}: {words}\n")
    print("\n".join(result(example, curves)))


def result(example: Example, curves: Curves) -> Iterator[str]:
    """The last value of each update, and when it reached the target."""
    head = ["update", example.quantity, "evaluations", f"evaluations to {example.target}"]
    rows = []
    for update, curve in curves.items():
        last = curve[-1]
        there = (row.evaluations for row in curve if example.target and row.value <= example.target)
        first = next(there, None)
        rows.append(
            [
                *(update, f"{last.value:.4g}", f"{last.evaluations:,}"),
                "—" if first is None else f"{first:,}",
            ]
        )
    columns = slice(None if example.target else -1)
    yield from markdown(head[columns], (row[columns] for row in rows))


def draw(path: pathlib.Path, example: Example, title: str, curves: Curves) -> None:
    """The quantity over evaluations; one with a target to fall to has logarithmic axes."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for update, curve in curves.items():
        axes.plot([r.evaluations for r in curve], [r.value for r in curve], label=update, lw=1)
    if example.target:
        axes.loglog()
        axes.axhline(example.target, color="black", lw=0.8, ls="--", label="target")
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("evaluations (members scored)")
    axes.set_ylabel(example.quantity)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
