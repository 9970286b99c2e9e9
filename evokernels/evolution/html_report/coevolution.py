"""The report of a co-evolution."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from evokernels.evolution.coevolution_history import (
    OWN,
    WINNER,
    CoevolutionResult,
    Round,
    fresh_accuracy,
    pareto_front,
)
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.history import Spread
from evokernels.evolution.html_report import parts, pictures
from evokernels.evolution.html_report.ancestry import family_section
from evokernels.evolution.html_report.family import rule_text
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
from evokernels.evolution.lineage import Lineage
from evokernels.evolution.pairs import Measured
from evokernels.evolution.trial import Purpose
from evokernels.tasks import get_task

__all__ = ["Lineages", "coevolution_page", "running_page", "write_coevolution_report"]

Lineages = tuple[Lineage, Lineage]  # of architectures, of optimizers

TITLE = "An architecture and an optimizer, co-evolved by evokernels"

SIDES = ("architectures", "optimizers")


def write_coevolution_report(
    folder: pathlib.Path,
    settings: CoevolutionSettings,
    result: CoevolutionResult,
    lineages: Lineages,
    journal: Journal,
) -> None:
    """Write ``report.html``, or warn that it cannot be."""
    write(folder, lambda: coevolution_page(settings, result, lineages, journal))


def coevolution_page(
    settings: CoevolutionSettings, result: CoevolutionResult, lineages: Lineages, journal: Journal
) -> Page:
    """What the report says.

    Args:
        settings: of the run.
        result: the complete run.
        lineages: of its search: architectures, optimizers.
        journal: of the run.
    """
    own = result.comparison.overall_fitness(OWN)
    best = result.comparison.overall_fitness(WINNER)
    return Page(
        TITLE,
        _subtitle(settings),
        [
            ("test fitness of the pair", f"{best.mean:.4f}", f"{OWN}: {own.mean:.4f}"),
            ("ahead, seed by seed", parts.signed(result.lead.mean), f"± {result.lead.error:.4f}"),
            ("selection bias", parts.signed(result.winner.bias.mean), "search less fresh seeds"),
            _trained(settings, result.history),
        ],
        [
            _pair(
                "The winning pair",
                settings,
                result.best,
                "as JSON (best_architecture.json, best_genome.json)",
            ),
            Section(
                "comparison",
                "The pair beside the tasks' own networks",
                [
                    Text(
                        f"{settings.conditions.steps:,} steps on seeds "
                        f"{' '.join(map(str, settings.fresh_seeds))}, which the selection has not "
                        "seen; of the test split, mean ± standard error over the seeds. Seed by "
                        f"seed the winner is ahead of ({OWN}) by {result.lead}."
                    ),
                    *parts.comparison_pictures("compared", result.comparison, WINNER),
                    *parts.comparison_tables(
                        result.comparison,
                        lambda name: result.contenders[name].mean_parameters(settings.tasks),
                    ),
                ],
            ),
            parts.luck(settings, result.winner),
            *_search_sections(
                settings, result.history, result.pairs, lineages, result.best, journal, result
            ),
        ],
    )


def running_page(
    settings: CoevolutionSettings,
    history: Sequence[Round],
    pairs: Sequence[Measured],
    lineages: Lineages,
    journal: Journal,
    state: str,
) -> Page:
    """What the report says of a run whose search goes on.

    Args:
        settings: of the run.
        history: of the generations that have ended, at least one.
        pairs: all that were trained alike once.
        lineages: of the search: architectures, optimizers.
        journal: of the run.
        state: of the run, in words.
    """
    best = history[-1].best
    return Page(
        TITLE,
        _subtitle(settings),
        [
            ("generations", f"{len(history)}", f"of {settings.search.generations}"),
            (
                f"fitness of the best pair, {settings.selection_split} split",
                f"{best.fitness:.4f}",
                "the best of many: partly luck",
            ),
            ("its parameters", f"{best.parameters:,.0f}", "mean over the tasks"),
            _trained(settings, history),
        ],
        [
            _pair("The best pair so far", settings, best, parts.OF_THIS_PAGE),
            *_search_sections(settings, history, pairs, lineages, best, journal),
        ],
        state,
    )


def _subtitle(settings: CoevolutionSettings) -> str:
    search = settings.search
    return (
        f"{parts.counted(search.generations, 'generation')} of "
        f"{parts.counted(search.first, 'architecture')} and "
        f"{parts.counted(search.second, 'optimizer')}, trained on {', '.join(settings.tasks)}."
    )


def _trained(settings: CoevolutionSettings, history: Sequence[Round]) -> tuple[str, str, str]:
    trained = sum(entry.evaluations for entry in history)
    return "training runs of the search", f"{trained:,}", f"of {settings.search_runs:,} planned"


def _search_sections(
    settings: CoevolutionSettings,
    history: Sequence[Round],
    pairs: Sequence[Measured],
    lineages: Lineages,
    best: Measured,
    journal: Journal,
    result: CoevolutionResult | None = None,
) -> list[Section]:
    """What the search has come to, and what it was; with the result of a complete run."""
    numbers = [entry.number + 1 for entry in history]
    architectures, optimizers = (
        [[member.genome for member in generation] for generation in lineage.generations]
        for lineage in lineages
    )
    return [
        _populations(numbers, settings, history, journal),
        _pareto(settings, pairs, result),
        *(
            family_section(f"family-{name}", f"the {name}", lineage, individual, "worth")
            for name, lineage, individual in zip(
                ("architecture", "optimizer"),
                lineages,
                (best.pair.architecture, best.pair.optimizer),
                strict=True,
            )
        ),
        parts.components(numbers, architectures),
        parts.terms(numbers, optimizers),
        _plan(settings, history, journal),
        *parts.closing(journal, settings.to_dict(), settings.device),
    ]


def _pair(title: str, settings: CoevolutionSettings, best: Measured, listed: str) -> Section:
    pair = best.pair
    decoded = [(task, get_task(task).decode(pair.architecture)) for task in settings.tasks]
    items: list[Item] = [
        Text("The architecture, as each task decodes it:"),
        Table(
            ["task", "layers", "parameters"],
            [
                [task, ", ".join(network.components), f"{network.parameters:,}"]
                for task, network in decoded
            ],
            words=2,
        ),
        Text("The optimizer:"),
        Rule(pair.optimizer),
        Listing(
            f"{pair.architecture.to_json()}\n{pair.optimizer.to_json()}",
            listed,
        ),
    ]
    if best.score.status.failed:
        items.insert(0, Text("It failed in at least one of its training runs."))
    return Section("winner", title, items)


def _populations(
    numbers: Sequence[int],
    settings: CoevolutionSettings,
    history: Sequence[Round],
    journal: Journal,
) -> Section:
    best_pair = [entry.best.score.fitness for entry in history]
    items: list[Item] = [
        Text(
            "An individual is worth the mean over its collaborators: fitness less "
            f"{settings.penalty:g} for a million parameters. Individuals of which no pair held are "
            "in neither mean nor quartiles."
        )
    ]
    for side, name in enumerate(SIDES):
        populations = [getattr(entry, name) for entry in history]
        spreads = [_spread(journal, entry.number, side, settings) for entry in history]
        items.append(
            parts.spread_pictures(
                name,
                f"Worth of the {name}",
                numbers,
                [population.best for population in populations],
                spreads,
                further={"best pair so far": best_pair},
                failures={
                    "no pair held": ("bad", [population.failed for population in populations])
                },
            )
        )
    items.append(
        Table(
            [
                "generation",
                *(f"{kind} {side[:-1]}" for side in SIDES for kind in ("best", "mean")),
                *("best pair", "pairs", "runs made", "known before", "failed pairs"),
            ],
            [
                [
                    str(entry.number + 1),
                    *(
                        parts.number(value)
                        for side in SIDES
                        for value in (getattr(entry, side).best, getattr(entry, side).mean)
                    ),
                    parts.number(entry.best.score.fitness),
                    *map(str, (entry.pairs, entry.evaluations, entry.reused, entry.failed)),
                ]
                for entry in history
            ],
            "the numbers",
        )
    )
    return Section("populations", "Both populations", items)


def _spread(
    journal: Journal, generation: int, side: int, settings: CoevolutionSettings
) -> Spread | None:
    """Of what the individuals of a side were worth, as the journal has it."""
    rows = journal.query(
        "SELECT score FROM candidate WHERE generation = ? AND (place >= ?) = ? "
        "AND status IN ('ok', 'stopped')",
        *(generation, settings.search.first, side),
    )
    return Spread.of(score for (score,) in rows)


def _pareto(
    settings: CoevolutionSettings, pairs: Sequence[Measured], result: CoevolutionResult | None
) -> Section:
    front = pareto_front(pairs)
    on_front = set(front)
    others = [each for each in pairs if each.accuracy is not None and each not in on_front]

    def places(of: Sequence[Measured]) -> tuple[list[float], list[float]]:
        return [each.parameters for each in of], [each.accuracy for each in of]

    stars = []
    legend = {"best": "on the front", "other": "other pairs of the search"}
    note = "Measured once, the best of many are lucky"
    if result is not None:
        stars = [
            (
                result.contenders[name].mean_parameters(settings.tasks),
                fresh_accuracy(result.comparison, name),
                colour,
            )
            for name, colour in ((WINNER, "best"), (OWN, "bad"))
        ]
        legend["best"] += "; star: the winner on fresh seeds"
        legend["bad"] = f"star: {OWN}, fresh seeds"
        note += "; the stars are on fresh seeds"
    svg = pictures.scatter(
        "pareto",
        [(*places(others), "other", 0.5), (*places(front), "best", 1.0)],
        places(front),
        stars,
        ("parameters, mean over the tasks", f"accuracy, {settings.selection_split} split"),
    )
    return Section(
        "pareto",
        "Accuracy and parameters",
        [
            Text(
                f"Each of {len(pairs):,} pairs as the search measured it; on the front are "
                "those that no other surpasses with as few parameters. "
                f"{note}."
            ),
            Picture("Accuracy against parameters", svg, legend),
            Table(
                ["parameters", "accuracy", "generation", "architecture", "terms"],
                [
                    [
                        *(f"{each.parameters:,.0f}", parts.number(each.accuracy)),
                        str(each.generation + 1),
                        ", ".join(each.pair.architecture.components),
                        rule_text(each.pair.optimizer),
                    ]
                    for each in front
                ],
                "the front",
                words=5,
            ),
        ],
    )


def _plan(settings: CoevolutionSettings, history: Sequence[Round], journal: Journal) -> Section:
    made = dict(journal.query("SELECT purpose, count(*) FROM evaluation GROUP BY purpose"))
    planned = {
        Purpose.SEARCH: ("the search", settings.search_runs),
        Purpose.AUDIT: ("the finalists", settings.final_runs),
        Purpose.REPORT: ("the comparison", settings.comparison_runs),
    }
    reused = sum(entry.reused for entry in history)
    search = settings.search
    return Section(
        "plan",
        "Plan and cost",
        [
            Text(
                f"A generation asks for at most {search.collaborators} × ({search.first} + "
                f"{search.second}) = {search.evaluations_per_generation} pairs. A network has at "
                f"most {settings.budget:,} parameters and {settings.max_work:g} times the "
                "multiply-adds of its task's own network. In the search "
                f"{reused:,} training runs were known already."
            ),
            Table(
                ["training runs of", "planned, at most", "made"],
                [
                    *(
                        [name, f"{runs:,}", f"{made.get(purpose.value, 0):,}"]
                        for purpose, (name, runs) in planned.items()
                    ),
                    ["all", f"{settings.planned_runs:,}", f"{sum(made.values()):,}"],
                ],
            ),
        ],
    )
