"""The sections that reports have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evokernels.architecture import Architecture
from evokernels.evolution.comparison import Comparison, Estimate
from evokernels.evolution.history import Spread, component_shares, term_shares
from evokernels.evolution.html_report import pictures
from evokernels.evolution.html_report.page import Picture, Section, Table, Text
from evokernels.evolution.journal import Journal
from evokernels.evolution.machine import machine, versions
from evokernels.evolution.settings import TrainingSettings
from evokernels.evolution.winner import Winner
from evokernels.genome import Genome

__all__ = [
    "OF_THIS_PAGE",
    "closing",
    "comparison_pictures",
    "comparison_tables",
    "components",
    "configuration",
    "counted",
    "luck",
    "number",
    "signed",
    "spread_pictures",
    "terms",
]

# Files follow every generation, the page of a run that goes on does not.
OF_THIS_PAGE = "as JSON (the files of the run may have a later one)"


def number(value: float | None) -> str:
    """To four digits, as everywhere; a dash for nothing."""
    return "–" if value is None else f"{value:.4f}"


def signed(value: float) -> str:
    """To four digits, with its sign; nothing is +0."""
    return f"{round(value, 4) + 0.0:+.4f}"


def counted(count: int, noun: str) -> str:
    """How many, with the noun in its number."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def spread_pictures(
    name: str,
    title: str,
    numbers: Sequence[int],
    best: Sequence[float],
    spreads: Sequence[Spread | None],
    *,
    further: Mapping[str, Sequence[float]] | None = None,
    failures: Mapping[str, tuple[str, Sequence[int]]] | None = None,
) -> Picture:
    """Best, mean and quartiles of a population over the generations.

    Args:
        name: of the picture, different from all others of the page.
        title: of the picture.
        numbers: of the generations.
        best: the highest value; left out where there is no spread.
        spreads: of the values of those that were trained to the end.
        further: another line, by what it means.
        failures: by what it means, the colour and how many of each generation.
    """
    failures = failures or {}
    known = [value if spread else None for value, spread in zip(best, spreads, strict=True)]
    lines = [
        ([spread and spread.mean for spread in spreads], "mean", "-"),
        (known, "best", "-"),
    ]
    legend = {"best": "best", "mean": "mean, and the quartiles as a band"}
    for meaning, values in (further or {}).items():
        lines.append((values, "ink", ":"))
        legend["ink"] = meaning
    band = (
        [spread and spread.low for spread in spreads],
        [spread and spread.high for spread in spreads],
    )
    for meaning, (colour, counts) in failures.items():
        if any(counts):
            legend[colour] = f"{meaning} (how many)"
    return Picture(
        title, pictures.fitness(name, numbers, lines, band, dict(failures.values())), legend
    )


def terms(numbers: Sequence[int], generations: Sequence[Sequence[Genome]]) -> Section:
    """How common each term is in the generations of a search."""
    return _shares(
        "terms",
        "Terms",
        "The share of the genomes of each generation that have a term, counted once a genome "
        "whatever its weight",
        "Share of genomes with each term",
        numbers,
        [term_shares(genomes) for genomes in generations],
    )


def components(numbers: Sequence[int], generations: Sequence[Sequence[Architecture]]) -> Section:
    """How common each kind of component is in the generations of a search."""
    return _shares(
        "components",
        "Components",
        "The share of the architectures of each generation that have a component, of whatever "
        "size, as it is written, counted once an architecture",
        "Share of architectures with each component",
        numbers,
        [component_shares(architectures) for architectures in generations],
    )


def _shares(
    anchor: str,
    title: str,
    meaning: str,
    caption: str,
    numbers: Sequence[int],
    shares: Sequence[Mapping[str, float]],
) -> Section:
    """Shares that names have in each generation; the most common at last come first."""
    names = dict.fromkeys(name for of_generation in shares for name in of_generation)
    rows = {name: [each.get(name, 0.0) for each in shares] for name in names}
    ordered = dict(sorted(rows.items(), key=lambda row: (row[1][-1], sum(row[1])), reverse=True))
    return Section(
        anchor,
        title,
        [
            Text(
                f"{meaning}: the fuller the colour, the more. To the right the share in the first "
                "and in the last generation."
            ),
            Picture(caption, pictures.heat(anchor, numbers, ordered)),
            Table(
                [anchor[:-1], *map(str, numbers)],
                [[name, *(f"{share:.0%}" for share in of)] for name, of in ordered.items()],
                "share in each generation",
            ),
        ],
    )


def comparison_pictures(
    name: str, comparison: Comparison, outstanding: str, note: str = ""
) -> list[Picture]:
    """Test fitness with standard errors, overall and on each task.

    Args:
        name: of the pictures, different from all others of the page.
        outstanding: the optimizer that stands out.
        note: behind the title of each.
    """

    def picture(place: int, title: str, of: Callable[[str], Estimate]) -> Picture:
        rows = [
            (each, of(each), "best" if each == outstanding else "other")
            for each in comparison.optimizers
        ]
        return Picture(f"Test fitness{title}{note}", pictures.dots(f"{name}{place}", rows))

    if len(comparison.tasks) == 1:
        return [picture(0, f" on {comparison.tasks[0]}", comparison.overall_fitness)]

    def on_task(task: str) -> Callable[[str], Estimate]:
        return lambda each: comparison.task_fitness(each, task)

    return [
        picture(0, ", mean over the tasks", comparison.overall_fitness),
        *(picture(at, f" on {task}", on_task(task)) for at, task in enumerate(comparison.tasks, 1)),
    ]


def comparison_tables(
    comparison: Comparison, parameters: Callable[[str], float] | None = None
) -> list[Table]:
    """What the pictures show, and every run of it.

    Args:
        parameters: of the networks of a contender, where they differ.
    """
    several = comparison.tasks if len(comparison.tasks) > 1 else ()
    sized = parameters is not None
    overall = Table(
        ["optimizer", *["parameters"] * sized, "test fitness", "test accuracy"]
        + [f"fitness on {task}" for task in several]
        + ["gradient passes"],
        [
            [name, *([f"{parameters(name):,.0f}"] if sized else [])]
            + [str(comparison.overall_fitness(name)), str(comparison.overall_accuracy(name))]
            + [str(comparison.task_fitness(name, task)) for task in several]
            + [comparison.gradient_passes(name)]
            for name in comparison.optimizers
        ],
    )
    runs = Table(
        ["optimizer", "task", "seed", "status", "test fitness", "test accuracy", "final loss"],
        [
            [
                *(row.name, row.trial.task, str(row.trial.seed), row.outcome.status.value),
                *(number(row.outcome.test_fitness), number(row.outcome.test_accuracy)),
                number(row.outcome.final_loss),
            ]
            for row in comparison.rows
        ],
        "every training run of it",
        words=2,
    )
    return [overall, runs]


def luck(settings: TrainingSettings, winner: Winner) -> Section:
    """How far selection has overestimated the winner."""
    seeds = " ".join(map(str, settings.fresh_seeds))
    split = settings.selection_split
    final = (
        f" It is the best of {settings.finalists} finalists on seeds "
        f"{' '.join(map(str, settings.final_seeds))}; the fitness that another one had in the "
        "search may be higher."
        if settings.finalists > 1
        else ""
    )
    rows = [
        (f"in the search, {split} split", Estimate(winner.selected, float("nan")), "other"),
        (f"fresh seeds, {split} split", winner.fresh, "best"),
        ("fresh seeds, test split", winner.test, "best"),
    ]
    return Section(
        "luck",
        "How much of it is luck",
        [
            Text(
                "The best of many noisy scores is better on paper than in truth. On seeds "
                f"{seeds}, which the selection has not seen, the winner's fitness on the same "
                f"split is {winner.fresh}: selection has overestimated it by {winner.bias}.{final}"
            ),
            Picture(
                "Fitness of the winner (± standard error over seeds)", pictures.dots("luck", rows)
            ),
        ],
    )


def closing(journal: Journal, settings: Mapping[str, Any], device: str) -> list[Section]:
    """The last sections of every report: training runs, configuration, machine.

    Args:
        journal: of the run.
        settings: of the run, by name.
        device: where it trains.
    """
    return [_evaluations(journal), configuration(settings), _machine(journal, device)]


def _evaluations(journal: Journal) -> Section:
    """How the training runs of a journal ended."""
    rows = journal.query(
        "SELECT purpose, status, count(*), sum(steps), avg(CASE WHEN status = 'ok' "
        "THEN fitness END) FROM evaluation GROUP BY purpose, status ORDER BY "
        "instr('search audit report', purpose), instr('ok stopped diverged', status) = 0, "
        "instr('ok stopped diverged', status), status"
    )
    return Section(
        "evaluations",
        "Training runs",
        [
            Text(
                "Search: what a search was told. Audit: trained to the end whatever its loss, as "
                "finalists are. Report: trained to the end and measured on the test split. Ok: to "
                "the end; stopped: by the hurdle; diverged: the loss was lost; all others: the "
                "worker was."
            ),
            Table(
                ["made for", "status", "runs", "training steps", "mean fitness"],
                [
                    [purpose, status.replace("_", " "), f"{count:,}", f"{steps:,}", number(mean)]
                    for purpose, status, count, steps, mean in rows
                ],
                words=2,
            ),
        ],
    )


def configuration(settings: Mapping[str, Any]) -> Section:
    """All settings of a run, named like the options of its command."""
    rows = [[name.replace("_", "-"), _setting(value)] for name, value in sorted(settings.items())]
    return Section("configuration", "Configuration", [Table(["setting", "value"], rows, words=2)])


def _setting(value: object) -> str:
    if isinstance(value, (tuple, list)):
        texts = list(map(str, value))
        return ("; " if any(" " in text for text in texts) else " ").join(texts) or "none"
    if value is None:
        return "all"
    return value if isinstance(value, str) else json.dumps(value)


def _machine(journal: Journal, device: str) -> Section:
    """All of a report that may differ between two runs of one history: times, machine, versions."""
    seconds = journal.query(
        "SELECT purpose, count(*), sum(steps), sum(seconds) FROM evaluation GROUP BY purpose "
        "ORDER BY instr('search audit report', purpose)"
    )
    totals = [sum(column) for column in zip(*(row[1:] for row in seconds), strict=True)]
    rows = [*seconds, ("all", *totals)] if seconds else []
    return Section(
        "machine",
        "Machine, versions and time",
        [
            Text("Of the process that wrote this page; it need not have made all training runs."),
            Table(["", ""], [*map(list, versions()), *map(list, machine(device))], words=2),
            Text("Time that the training runs took, one after the other:"),
            Table(
                ["made for", "runs", "training steps", "time", "ms a step"],
                [
                    [purpose, f"{runs:,}", f"{steps:,}", _time(taken), _rate(taken, steps)]
                    for purpose, runs, steps, taken in rows
                ],
            ),
        ],
    )


def _rate(seconds: float, steps: int) -> str:
    return f"{1000 * seconds / steps:.2f}" if steps else "–"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
