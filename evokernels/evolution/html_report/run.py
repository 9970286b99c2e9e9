"""The report of an evolution run."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evokernels.evolution.audit import Audit, audit_line
from evokernels.evolution.history import Generation
from evokernels.evolution.html_report import parts, pictures
from evokernels.evolution.html_report.ancestry import family_section
from evokernels.evolution.html_report.page import (
    Item,
    Listing,
    Page,
    Picture,
    Rule,
    Section,
    Table,
    Text,
    write,
)
from evokernels.evolution.journal import Journal
from evokernels.evolution.ledger import Cost, ledger_line, read_ledger
from evokernels.evolution.lineage import Descent, Lineage
from evokernels.evolution.settings import RunSettings
from evokernels.search.genetic import Scored

if TYPE_CHECKING:
    from evokernels.evolution.run import RunResult

__all__ = ["fitness_sections", "run_page", "running_page", "write_run_report"]

TITLE = "An optimizer evolved by evokernels"

# Of the ledger: in which colour, and as what.
TAKEN = {
    "search": "the search",
    "refinement": "of it, refining numbers",
    "audit": "finalists and audit",
    "report": "the comparison",
}
SAVED = {
    "cache": "one optimizer is trained once",
    "hurdle": "stopped by the hurdle",
    "race": "left out by the seed race",
    "divergence": "stopped when diverged",
}


def write_run_report(
    folder: pathlib.Path,
    settings: RunSettings,
    result: RunResult,
    lineage: Lineage,
    journal: Journal,
) -> None:
    """Write ``report.html``, or warn that it cannot be."""
    write(folder, lambda: run_page(settings, result, lineage, journal))


def run_page(settings: RunSettings, result: RunResult, lineage: Lineage, journal: Journal) -> Page:
    """What the report says.

    Args:
        settings: of the run.
        result: the complete run.
        lineage: of its search.
        journal: of the run.
    """
    compared = Section(
        "comparison",
        "The winner beside Adam and AdamW",
        [
            Text(
                f"{settings.conditions.steps:,} steps on seeds "
                f"{' '.join(map(str, settings.fresh_seeds))}, which the selection has not seen; "
                "fitness and accuracy of the test split, mean ± standard error over the seeds."
            ),
            *parts.comparison_pictures("compared", result.comparison, "evolved"),
            *parts.comparison_tables(result.comparison),
        ],
    )
    sections = [
        _rule("The winning rule", result.best, "as JSON (best_genome.json)"),
        compared,
        parts.luck(settings, result.winner),
        *_search_sections(settings, result.history, lineage, "the winner", result.best),
        _ledger(result.ledger, result.audit),
        *parts.closing(journal, settings.to_dict(), settings.device),
    ]
    return Page(TITLE, _subtitle(settings, len(result.history)), _facts(settings, result), sections)


def running_page(
    settings: RunSettings,
    history: Sequence[Generation],
    best: Scored,
    lineage: Lineage,
    journal: Journal,
    state: str,
) -> Page:
    """What the report says of a run whose search goes on.

    Args:
        settings: of the run.
        history: of the generations that have ended, at least one.
        best: the best genome so far.
        lineage: of the search.
        journal: of the run.
        state: of the run, in words.
    """
    ledger = read_ledger(journal)
    search = ledger[0]
    return Page(
        TITLE,
        _subtitle(settings, settings.search.generations),
        [
            ("generations", f"{len(history)}", f"of {settings.search.generations}"),
            (
                f"best fitness, {settings.selection_split} split",
                f"{best.score.fitness:.4f}",
                "the best of many: partly luck",
            ),
            *_search_facts(search),
        ],
        [
            _rule("The best rule so far", best, parts.OF_THIS_PAGE),
            *_search_sections(settings, history, lineage, "the best so far", best),
            _ledger(ledger),
            *parts.closing(journal, settings.to_dict(), settings.device),
        ],
        state,
    )


def _subtitle(settings: RunSettings, generations: int) -> str:
    protocol = "the protocol of the source system" if settings.parity else "selection by validation"
    if not settings.parity and settings.selection_split == "test":
        protocol = "the test split selects"
    return (
        f"{parts.counted(generations, 'generation')} of {settings.search.population} genomes, "
        f"trained on {', '.join(settings.tasks)}; {protocol}."
    )


def _search_sections(
    settings: RunSettings,
    history: Sequence[Generation],
    lineage: Lineage,
    subject: str,
    best: Scored,
) -> list[Section]:
    """What the search has come to."""
    numbers = [entry.number + 1 for entry in history]
    asked = [
        [member.genome for member in generation if member.descent is not Descent.REFINED]
        for generation in lineage.generations
    ]
    return [
        *fitness_sections(numbers, settings, history),
        family_section("family", subject, lineage, best.genome),
        parts.terms(numbers, asked),
    ]


def _facts(settings: RunSettings, result: RunResult) -> list[tuple[str, str, str]]:
    comparison, search = result.comparison, result.ledger[0]
    best = max(comparison.optimizers[1:], key=lambda name: comparison.overall_fitness(name).mean)
    evolved, other = map(comparison.overall_fitness, ("evolved", best))
    return [
        ("test fitness of the winner", f"{evolved.mean:.4f}", f"{best}: {other.mean:.4f}"),
        ("selection bias", parts.signed(result.winner.bias.mean), "search less fresh seeds"),
        *_search_facts(search),
    ]


def _search_facts(search: Cost) -> list[tuple[str, str, str]]:
    return [
        ("training runs of the search", f"{search.runs:,}", f"{search.steps_taken:,} steps"),
        ("fewer steps by", f"{search.factor or 1.0:.2f} ×", "cache, hurdle and race"),
    ]


def _rule(title: str, best: Scored, listed: str) -> Section:
    genome = best.genome
    items: list[Item] = [
        Rule(genome),
        Text(
            "p: parameters, g: their gradient, m and v: its moments, with a hat where corrected "
            "for their start at zero; t: the step, counted from 1. Every assignment is a step's, "
            "and for each element."
        ),
        Listing(genome.to_json(), listed),
    ]
    if best.score.status.failed:
        items.insert(0, Text("Every genome failed in at least one of its training runs."))
    return Section("winner", title, items)


def fitness_sections(
    numbers: Sequence[int], settings: RunSettings, history: Sequence[Generation]
) -> list[Section]:
    """Fitness over the generations, and on each task where there are several."""
    failures = {
        "stopped by the hurdle": ("other", [entry.stopped for entry in history]),
        "diverged": ("warn", [entry.diverged for entry in history]),
        "lost": ("bad", [entry.failed for entry in history]),
    }
    rotating = (
        " Every generation is trained with seeds of its own, which lift or lower all of its values."
        if settings.rotate_seeds
        else ""
    )
    overall = parts.spread_pictures(
        "fitness",
        "Fitness" if len(settings.tasks) == 1 else "Fitness, mean over the tasks",
        numbers,
        [entry.best for entry in history],
        [entry.spread for entry in history],
        further={"best so far": [entry.best_so_far for entry in history]}
        if settings.rotate_seeds
        else None,
        failures=failures,
    )
    sections = [
        Section(
            "fitness",
            "Fitness over the generations",
            [
                Text(
                    "Fitness is accuracy, and a little more for a low loss, on the "
                    f"{settings.selection_split} split. Mean and quartiles are of the "
                    "genomes that were trained to the end; how many were stopped by the hurdle, "
                    f"diverged or were lost with their worker is shown below them.{rotating}"
                ),
                overall,
                Table(
                    [
                        *("generation", "best", "upper quartile", "median", "lower quartile"),
                        *("mean", "best so far", "trained to the end", "stopped", "diverged"),
                        "lost",
                    ],
                    [
                        [str(entry.number + 1), number_if(entry, entry.best)]
                        + [number_of(entry, name) for name in ("high", "median", "low", "mean")]
                        + [parts.number(entry.best_so_far)]
                        + [str(entry.sound), str(entry.stopped)]
                        + [str(entry.diverged), str(entry.failed)]
                        for entry in history
                    ],
                    "the numbers",
                ),
            ],
        )
    ]
    if len(settings.tasks) > 1:
        sections.append(_tasks(numbers, settings, history))
    return sections


def number_if(entry: Generation, value: float) -> str:
    """A value of the genomes that were trained to the end, if there were any."""
    return parts.number(value if entry.spread else None)


def number_of(entry: Generation, name: str) -> str:
    """One of the values of a generation's spread."""
    return parts.number(getattr(entry.spread, name) if entry.spread else None)


def _tasks(numbers: Sequence[int], settings: RunSettings, history: Sequence[Generation]) -> Section:
    return Section(
        "tasks",
        "Fitness on each task",
        [
            Text("The best on a task need not be the best over all of them."),
            *(
                parts.spread_pictures(
                    f"task{place}",
                    task,
                    numbers,
                    [entry.task_best[task] for entry in history],
                    [entry.task_spread[task] for entry in history],
                )
                for place, task in enumerate(settings.tasks)
            ),
        ],
    )


def _ledger(ledger: Sequence[Cost], audited: Audit | None = None) -> Section:
    by_rule = {cost.rule: cost for cost in ledger}
    taken = [
        (meaning, by_rule[rule].steps_taken, "best" if rule == "search" else "other")
        for rule, meaning in TAKEN.items()
        if rule in by_rule
    ]
    saved = [(meaning, by_rule[rule].steps_saved, "warn") for rule, meaning in SAVED.items()]
    items: list[Item] = [
        Text(ledger_line(ledger)),
        Picture("Training steps taken", pictures.bars("taken", taken)),
        Picture("Training steps saved in the search", pictures.bars("saved", saved)),
        Table(
            ["rule", "runs", "steps taken", "steps saved", "factor"],
            [_cost(cost) for cost in ledger],
            "the ledger",
        ),
    ]
    if audited:
        items.append(Text(audit_line(audited)))
    return Section("steps", "Where the steps went", items)


def _cost(cost: Cost) -> list[str]:
    factor = "–" if cost.factor is None else f"{cost.factor:.2f}"
    return [cost.rule, f"{cost.runs:,}", f"{cost.steps_taken:,}", f"{cost.steps_saved:,}", factor]
