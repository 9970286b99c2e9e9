"""The report of an evolution run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evokernels.evolution.audit import audit_line
from evokernels.evolution.history import Generation
from evokernels.evolution.html_report import parts, pictures
from evokernels.evolution.html_report.family import family, rule_text
from evokernels.evolution.html_report.page import (
    Drawing,
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
from evokernels.evolution.ledger import Cost, ledger_line
from evokernels.evolution.lineage import Descent, Lineage, Member
from evokernels.evolution.settings import RunSettings
from evokernels.genome import Genome

if TYPE_CHECKING:
    from evokernels.evolution.run import RunResult

__all__ = ["family_section", "fitness_sections", "run_page", "write_run_report"]

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
    numbers = [entry.number + 1 for entry in result.history]
    asked = [
        [member.genome for member in generation if member.descent is not Descent.REFINED]
        for generation in lineage.generations
    ]
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
        _winner(result),
        compared,
        parts.luck(settings, result.winner),
        *fitness_sections(numbers, settings, result.history),
        family_section(lineage, result.best.genome),
        parts.terms(numbers, asked),
        _ledger(result),
        parts.evaluations(journal),
        parts.configuration(settings.to_dict()),
        parts.machine_section(journal, settings.device),
    ]
    protocol = "the protocol of the source system" if settings.parity else "selection by validation"
    if not settings.parity and settings.selection_split == "test":
        protocol = "the test split selects"
    return Page(
        "An optimizer evolved by evokernels",
        f"{len(result.history)} generations of {settings.search.population} genomes, trained on "
        f"{', '.join(settings.tasks)}; {protocol}.",
        _facts(settings, result),
        sections,
    )


def _facts(settings: RunSettings, result: RunResult) -> list[tuple[str, str, str]]:
    comparison, search = result.comparison, result.ledger[0]
    best = max(comparison.optimizers[1:], key=lambda name: comparison.overall_fitness(name).mean)
    evolved, other = map(comparison.overall_fitness, ("evolved", best))
    return [
        ("test fitness of the winner", f"{evolved.mean:.4f}", f"{best}: {other.mean:.4f}"),
        ("selection bias", f"{result.winner.bias.mean:+.4f}", "search less fresh seeds"),
        ("training runs of the search", f"{search.runs:,}", f"{search.steps_taken:,} steps"),
        ("fewer steps by", f"{search.factor or 1.0:.2f} ×", "cache, hurdle and race"),
    ]


def _winner(result: RunResult) -> Section:
    genome = result.best.genome
    failed = result.best.score.status.failed
    items: list[Item] = [
        Rule(genome),
        Text(
            "p: parameters, g: their gradient, m and v: its moments, with a hat where corrected "
            "for their start at zero; t: the step, counted from 1. Every assignment is a step's, "
            "and for each element. In best_genome.json."
        ),
        Listing(genome.to_json(), "as JSON"),
    ]
    if failed:
        items.insert(0, Text("Every genome failed in at least one of its training runs."))
    return Section("winner", "The winning rule", items)


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


def family_section(lineage: Lineage, winner: Genome) -> Section:
    """From whom the winner descends."""
    tree = family(lineage.find(winner))
    oldest = tree.line[-1]
    line = list(tree.line)
    return Section(
        "family",
        "The family of the winner",
        [
            Text(
                f"The winner came up in generation {line[0].generation + 1} "
                f"({line[0].descent.value}) and descends from {len(tree.nodes) - 1} other genomes; "
                "the line of its better parents begins in generation "
                f"{oldest.generation + 1}. A genome stands where it first appeared. "
                "Dashed: refined by ENES."
            ),
            Drawing(tree),
            Table(
                [
                    "generation",
                    "came as",
                    "fitness",
                    "terms",
                    "changed, from the better parent",
                ],
                [
                    [
                        *(str(member.generation + 1), member.descent.value, _worth(member)),
                        *(rule_text(member.genome), _changes(member)),
                    ]
                    for member in line
                ],
                "the winner and its better parents, back to the first" if len(line) > 8 else "",
                words=5,
            ),
        ],
    )


def _worth(member: Member) -> str:
    score = member.score
    return score.status.value if score.status.failed else parts.number(score.fitness)


def _changes(member: Member) -> str:
    """What makes a genome different from the better one of its parents."""
    parent = member.better_parent
    if parent is None:
        return "–"
    changed = []
    both = parent.genome.to_dict().keys() & member.genome.to_dict().keys()  # beta3 may be new
    for field in dataclasses.fields(Genome):
        before, after = (getattr(each.genome, field.name) for each in (parent, member))
        if before == after or field.name in ("term_types", "alphas") or field.name not in both:
            continue
        if isinstance(after, bool):
            changed.append(f"{field.name} {'on' if after else 'off'}")
        else:
            changed.append(f"{field.name} {before:.4g} → {after:.4g}")
    if rule_text(parent.genome) != rule_text(member.genome):
        changed.append("terms")
    return ", ".join(changed) or "nothing that is written with four digits"


def _ledger(result: RunResult) -> Section:
    by_rule = {cost.rule: cost for cost in result.ledger}
    taken = [
        (meaning, by_rule[rule].steps_taken, "best" if rule == "search" else "other")
        for rule, meaning in TAKEN.items()
        if rule in by_rule
    ]
    saved = [(meaning, by_rule[rule].steps_saved, "warn") for rule, meaning in SAVED.items()]
    items: list[Item] = [
        Text(ledger_line(result.ledger)),
        Picture("Training steps taken", pictures.bars("taken", taken)),
        Picture("Training steps saved in the search", pictures.bars("saved", saved)),
        Table(
            ["rule", "runs", "steps taken", "steps saved", "factor"],
            [_cost(cost) for cost in result.ledger],
            "the ledger",
        ),
    ]
    if result.audit:
        items.append(Text(audit_line(result.audit)))
    return Section("steps", "Where the steps went", items)


def _cost(cost: Cost) -> list[str]:
    factor = "–" if cost.factor is None else f"{cost.factor:.2f}"
    return [cost.rule, f"{cost.runs:,}", f"{cost.steps_taken:,}", f"{cost.steps_saved:,}", factor]
