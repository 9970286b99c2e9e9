"""Who descends from whom: every individual of a search with its parents."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from evokernels.architecture import Architecture
from evokernels.evolution.refining import Improvement
from evokernels.genome import Genome
from evokernels.search.genetic import Scored
from evokernels.search.score import Score

__all__ = ["Descent", "Individual", "Lineage", "Member", "ancestors", "better_line"]

Individual = Genome | Architecture


class Descent(enum.Enum):
    """How an individual came into its generation."""

    START = "start population"
    ELITE = "elite"
    CHILD = "child"
    REFINED = "refined by ENES"


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An individual of a generation.

    Attributes:
        generation: counted from 0.
        place: in that generation, on its side.
        genome, score: what it is, and what the search was told of it.
        descent: how it came there.
        parents: of a child two, which may be one and the same; of an elite itself in the
            generation before; of a refined genome the one that it came from, in its own generation.
    """

    generation: int
    place: int
    genome: Individual
    score: Score
    descent: Descent
    parents: tuple[Member, ...] = dataclasses.field(repr=False)

    @property
    def first(self) -> Member:
        """The same genome where it first appeared, before it was an elite."""
        member = self
        while member.descent is Descent.ELITE:
            (member,) = member.parents
        return member

    @property
    def better_parent(self) -> Member | None:
        """The parent of the higher score, where it first appeared; None without parents."""
        best = max(self.parents, key=lambda parent: parent.score.rank, default=None)
        return best and best.first


class Lineage:
    """The generations of a search, or of one side of a co-evolution, added one after the other."""

    def __init__(self) -> None:
        self.generations: list[list[Member]] = []

    def add(
        self,
        scored: Sequence[Scored],
        parents: Sequence[Sequence[int]],
        improvements: Sequence[Improvement] = (),
    ) -> None:
        """The next generation.

        Args:
            scored: its individuals as the search asked for them.
            parents: of each, as `evokernels.search.genetic.State` has them.
            improvements: the genomes that joined it.
        """
        number = len(self.generations)
        before = self.generations[-1] if self.generations else []
        descents = {0: Descent.START, 1: Descent.ELITE, 2: Descent.CHILD}
        members = [
            Member(
                *(number, place, entry.genome, entry.score, descents[len(places)]),
                parents=tuple(before[parent] for parent in places),
            )
            for place, (entry, places) in enumerate(zip(scored, parents, strict=True))
        ]
        joined = [
            Member(
                *(number, better.place, better.scored.genome, better.scored.score),
                Descent.REFINED,
                parents=(members[better.origin],),
            )
            for better in improvements
        ]
        self.generations.append(members + joined)

    def find(self, genome: Individual) -> Member:
        """Where an individual first appeared; raises KeyError."""
        for generation in self.generations:
            for member in generation:
                if member.genome == genome:
                    return member
        raise KeyError("no generation has this individual")


def ancestors(member: Member) -> list[Member]:
    """The member and all that it descends from, each genome where it first appeared; in order."""
    found = {member.first: None}
    open_ = [member.first]
    while open_:
        for parent in open_.pop().parents:
            if parent.first not in found:
                found[parent.first] = None
                open_.append(parent.first)
    return sorted(found, key=lambda each: (each.generation, each.place))


def better_line(member: Member) -> Iterator[Member]:
    """The member, the better one of its parents, the better one of that one's, and so on."""
    step: Member | None = member.first
    while step is not None:
        yield step
        step = step.better_parent
