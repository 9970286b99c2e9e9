"""The report of a comparison."""

from __future__ import annotations

import math
import pathlib
from typing import TYPE_CHECKING

from evokernels.evolution.comparison import Comparison
from evokernels.evolution.html_report import parts
from evokernels.evolution.html_report.page import Item, Page, Section, Table, Text, write
from evokernels.evolution.journal import Journal
from evokernels.evolution.tuning import TUNING_SEED, setting

if TYPE_CHECKING:
    from evokernels.evolution.contest import Contest, ContestResult

__all__ = ["contest_page", "write_contest_report"]


def write_contest_report(
    folder: pathlib.Path, contest: Contest, result: ContestResult, journal: Journal
) -> None:
    """Write ``report.html``, or warn that it cannot be."""
    write(folder, lambda: contest_page(contest, result, journal))


def contest_page(contest: Contest, result: ContestResult, journal: Journal) -> Page:
    """What the report says.

    Args:
        contest: what was compared.
        result: the complete comparison.
        journal: of its folder.
    """
    conditions = contest.conditions
    versions = {"as given": result.untuned}
    if result.tuned is not None:
        versions["tuned"] = result.tuned
    sections = [
        Section(
            f"comparison-{place}",
            f"Optimizers {name}",
            [
                Text(
                    f"{conditions.steps:,} steps on seeds {' '.join(map(str, contest.seeds))}; "
                    "fitness and accuracy of the test split, mean ± standard error over the seeds."
                ),
                *parts.comparison_pictures(
                    f"compared{place}-", comparison, _ranked(comparison)[0], f", {name}"
                ),
                *parts.comparison_tables(comparison),
            ],
        )
        for place, (name, comparison) in enumerate(versions.items())
    ]
    if result.choices:
        sections.append(_tuning(contest, result))
    configured = {
        **contest.journal_settings(),
        "optimizers": tuple(contest.optimizers),
        "tasks": tuple(contest.tasks),
        "seeds": tuple(contest.seeds),
        "tune": contest.trials,
    }
    final = list(versions.values())[-1]
    ranked = _ranked(final)
    places = ("best", "second", "third")[: len(ranked)]
    return Page(
        "Optimizers compared by evokernels",
        f"{len(contest.optimizers)} optimizers on {', '.join(contest.tasks)}, "
        f"{conditions.steps:,} steps of {conditions.batch_size} samples.",
        [
            (f"{place}: {name}", f"{final.overall_fitness(name).mean:.4f}", _error(final, name))
            for place, name in zip(places, ranked, strict=False)
        ],
        [
            *sections,
            *parts.closing(journal, configured, contest.device),
        ],
    )


def _ranked(comparison: Comparison) -> list[str]:
    """Best first."""
    return sorted(
        comparison.optimizers,
        key=lambda name: comparison.overall_fitness(name).mean,
        reverse=True,
    )


def _error(comparison: Comparison, name: str) -> str:
    error = comparison.overall_fitness(name).error
    return "" if math.isnan(error) else f"± {error:.4f}, test fitness"


def _tuning(contest: Contest, result: ContestResult) -> Section:
    items: list[Item] = [
        Text(
            f"{contest.trials} settings of learning rate and schedule of each optimizer on seed "
            f"{TUNING_SEED}, its own first; chosen on {contest.conditions.validation_samples:,} "
            "validation samples."
        ),
        Table(
            ["optimizer", "chosen", "validation fitness", "of its own setting"],
            [
                [
                    *(name, setting(choice.optimizer)),
                    parts.number(choice.score.fitness),
                    parts.number(choice.default_score.fitness),
                ]
                for name, choice in result.choices.items()
            ],
            words=2,
        ),
    ]
    return Section("tuning", "Tuning", items)
