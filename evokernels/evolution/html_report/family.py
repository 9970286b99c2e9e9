"""The family tree of an individual as a drawing: generations from left to right."""

from __future__ import annotations

import dataclasses
import statistics

from evokernels.architecture import Architecture
from evokernels.evolution.lineage import Descent, Individual, Member, ancestors, better_line
from evokernels.genome import Genome

__all__ = ["Family", "family", "individual_text", "rule_text"]

# Units of the drawing, which are pixels where it is not scaled.
WIDTH, EDGE, FOOT = 400.0, 14.0, 18.0
LEAST_COLUMN = 11.0  # narrower ones are scrolled
GREATEST_ROW, LEAST_ROW, HEIGHT = 22.0, 6.0, 300.0
LABELS = 12  # generations that are written below, at most


@dataclasses.dataclass(frozen=True)
class Node:
    """An individual of the tree.

    Attributes:
        x, y, radius: where it is drawn.
        kind: "main" on the line of the better parents, "start" in the start population, or "other".
        title: what is told of it where one points at it.
    """

    x: float
    y: float
    radius: float
    kind: str
    title: str


@dataclasses.dataclass(frozen=True)
class Edge:
    """From a parent to its child; ``kind`` is "main" or "other", and then "refined" if it was."""

    path: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A tree as `report.html.j2` draws it.

    Attributes:
        width, height: of the drawing; ``least`` the pixels that it must not be narrower than.
        labels: x and text of the numbers of generations.
        members: all that are drawn, in the order of ``nodes``.
        line: the individual, its better parent, the better one of that one's, and so on.
    """

    width: float
    height: float
    least: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    labels: tuple[tuple[float, str], ...]
    members: tuple[Member, ...]
    line: tuple[Member, ...]


def family(member: Member, measure: str = "fitness") -> Family:
    """All that an individual descends from, each where it first appeared.

    Args:
        member: the individual.
        measure: what scores are called.
    """
    members = ancestors(member)
    line = tuple(better_line(member))
    generations = range(members[0].generation, members[-1].generation + 1)
    column = max(LEAST_COLUMN, (WIDTH - 2 * EDGE) / max(1, len(generations) - 1))
    width = 2 * EDGE + column * max(1, len(generations) - 1)
    rows = _rows(members)
    tallest = max(max(rows.values()), -min(rows.values()))
    row = max(LEAST_ROW, min(GREATEST_ROW, HEIGHT / max(1.0, 2 * tallest)))
    middle = EDGE + row * tallest
    radius = max(2.2, min(5.5, 0.4 * row, 0.3 * column))

    def x(each: Member) -> float:
        # what was refined in a generation lies behind the genome that it came from
        beside = 0.45 * column if each.descent is Descent.REFINED else 0.0
        return EDGE + column * (each.generation - generations[0]) + beside

    if any(each.descent is Descent.REFINED for each in members):
        width += 0.45 * column

    def y(each: Member) -> float:
        return middle + row * rows[each]

    nodes = tuple(
        Node(
            *(round(x(each), 1), round(y(each), 1)),
            round(radius * (1.25 if each in line else 1.0), 1),
            "main" if each in line else "start" if not each.parents else "other",
            _title(each, measure),
        )
        for each in members
    )
    edges = []
    for each in members:
        for parent in dict.fromkeys(parent.first for parent in each.parents):
            half = (x(parent) + x(each)) / 2
            path = (
                f"M{x(parent):.1f} {y(parent):.1f}C{half:.1f} {y(parent):.1f} "
                f"{half:.1f} {y(each):.1f} {x(each):.1f} {y(each):.1f}"
            )
            main = each in line and parent is each.better_parent
            refined = " refined" if each.descent is Descent.REFINED else ""
            edges.append(Edge(path, ("main" if main else "other") + refined))
    edges.sort(key=lambda edge: edge.kind.startswith("main"))  # drawn last, so on top
    every = -(-len(generations) // LABELS)
    labels = tuple(
        (round(EDGE + column * place, 1), str(number + 1))
        for place, number in enumerate(generations)
        if place % every == 0
    )
    least = LEAST_COLUMN * len(generations)
    height = 2 * (EDGE + row * tallest) + FOOT
    return Family(width, height, least, nodes, tuple(edges), labels, tuple(members), line)


def _rows(members: list[Member]) -> dict[Member, float]:
    """For each member a row, 0 in the middle: near its children, a row apart from its neighbours.

    From the last generation back, as the youngest has no children.
    """
    children: dict[Member, list[Member]] = {member: [] for member in members}
    for member in members:
        for parent in member.parents:
            children[parent.first].append(member)
    rows: dict[Member, float] = {}
    columns: dict[tuple[int, bool], list[Member]] = {}
    for member in members:
        columns.setdefault((member.generation, member.descent is Descent.REFINED), []).append(
            member
        )
    for column in sorted(columns, reverse=True):

        def wanted(member: Member) -> tuple[float, int]:
            near = [rows[child] for child in children[member]]
            return (statistics.fmean(near) if near else 0.0, member.place)

        ordered = sorted(columns[column], key=wanted)
        for place, member in enumerate(ordered):
            rows[member] = place - (len(ordered) - 1) / 2
    return rows


def rule_text(genome: Genome) -> str:
    """The terms of a genome with their weights."""
    pairs = zip(genome.alphas, genome.term_types, strict=True)
    return " + ".join(f"{alpha:.3g} {term.name}" for alpha, term in pairs)


def individual_text(individual: Individual) -> str:
    """What an individual is made of."""
    if isinstance(individual, Architecture):
        return ", ".join(individual.components) or "a classifier alone"
    return rule_text(individual)


def _title(member: Member, measure: str) -> str:
    score = member.score
    worth = score.status.value if score.status.failed else f"{measure} {score.fitness:.4f}"
    return (
        f"generation {member.generation + 1}, place {member.place}, {member.descent.value}, "
        f"{worth}: {individual_text(member.genome)}"
    )
