"""The section of a report that says from whom an individual descends."""

from __future__ import annotations

import dataclasses
import difflib

from evokernels.architecture import Architecture
from evokernels.evolution.html_report import parts
from evokernels.evolution.html_report.family import family, individual_text
from evokernels.evolution.html_report.page import Drawing, Section, Table, Text
from evokernels.evolution.lineage import Descent, Individual, Lineage, Member
from evokernels.genome import Genome

__all__ = ["family_section"]


def family_section(
    anchor: str, subject: str, lineage: Lineage, individual: Individual, measure: str = "fitness"
) -> Section:
    """From whom one of the individuals of a lineage descends.

    Args:
        anchor: of the section.
        subject: what the individual is called, such as "the winner".
        lineage: of its population.
        individual: whose family it is.
        measure: what its scores are called.
    """
    tree = family(lineage.find(individual), measure)
    line = list(tree.line)
    noun, parts_of_it = (
        ("architecture", "components")
        if isinstance(individual, Architecture)
        else ("genome", "terms")
    )
    others = len(tree.nodes) - 1
    refined = any(member.descent is Descent.REFINED for member in tree.members)
    descends = (
        f"descends from {parts.counted(others, f'other {noun}')}; the line of its better "
        f"parents begins in generation {line[-1].generation + 1}. Each {noun} stands where it "
        f"first appeared.{' Dashed: refined by ENES.' if refined else ''}"
        if others
        else "descends from nobody."
    )
    return Section(
        anchor,
        f"The family of {subject}",
        [
            Text(
                f"{subject[0].upper()}{subject[1:]} came up in generation "
                f"{line[0].generation + 1} ({line[0].descent.value}) and {descends}"
            ),
            *([Drawing(tree, subject)] if others else []),
            Table(
                [
                    *("generation", "came as", measure, parts_of_it),
                    "changed, from the better parent",
                ],
                [
                    [
                        *(str(member.generation + 1), member.descent.value, _worth(member)),
                        *(individual_text(member.genome), _changes(member)),
                    ]
                    for member in line
                ],
                f"{subject} and its better parents, back to the first" if len(line) > 8 else "",
                words=5,
            ),
        ],
    )


def _worth(member: Member) -> str:
    score = member.score
    return score.status.value if score.status.failed else parts.number(score.fitness)


def _changes(member: Member) -> str:
    """What makes an individual different from the better one of its parents."""
    parent = member.better_parent
    if parent is None:
        return "–"
    if isinstance(member.genome, Architecture):
        return _component_changes(parent.genome, member.genome)
    return _genome_changes(parent.genome, member.genome)


def _component_changes(before: Architecture, after: Architecture) -> str:
    matcher = difflib.SequenceMatcher(None, before.components, after.components, autojunk=False)
    changed = []
    for kind, *(a, b, c, d) in matcher.get_opcodes():
        gone, come = ", ".join(before.components[a:b]), ", ".join(after.components[c:d])
        if kind == "delete":
            changed.append(f"without {gone}")
        elif kind == "insert":
            changed.append(f"with {come}")
        elif kind == "replace":
            changed.append(f"{gone} → {come}")
    return "; ".join(changed) or "nothing"


def _genome_changes(before: Genome, after: Genome) -> str:
    changed = []
    both = before.to_dict().keys() & after.to_dict().keys()  # beta3 may be new
    for field in dataclasses.fields(Genome):
        old, new = (getattr(each, field.name) for each in (before, after))
        if old == new or field.name in ("term_types", "alphas") or field.name not in both:
            continue
        if isinstance(new, bool):
            changed.append(f"{field.name} {'on' if new else 'off'}")
        else:
            changed.append(f"{field.name} {old:.4g} → {new:.4g}")
    if individual_text(before) != individual_text(after):
        changed.append("terms")
    return ", ".join(changed) or "nothing that is written with four digits"
