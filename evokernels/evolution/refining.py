"""The best genomes of some generations have their numbers refined, and what does better joins them.

One evaluation is what it is in the search: a candidate is trained on every task with every seed of
the generation, under the conditions of the run, hurdle and seed race included. The race is against
that generation, not against other candidates, which are all near its best. So a candidate has had
the initial weights, batches and dropout of the genome that it came from, and is better if it is
better on the very same trials. Then it joins the generation beside its origin, as the best of the
candidates alone: both can become parents, elites and finalists.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from evokernels.compiler.genes import independent_terms, numbers_read
from evokernels.compiler.lower import lower
from evokernels.compiler.program import Program
from evokernels.evolution.history import Result
from evokernels.evolution.rounds import Rounds
from evokernels.evolution.settings import RunSettings
from evokernels.genome import Genome
from evokernels.search.coordinates import NUMBERS, Coordinates
from evokernels.search.genetic import Scored
from evokernels.search.refinement import Refinement

__all__ = ["Improvement", "Refined", "Refiner", "coordinates_of"]

EVERY = 3  # generations, counted back from the last, which is refined too
GENOMES = 2  # refined at a time, each the best of its structure


@dataclasses.dataclass(frozen=True)
class Improvement:
    """A candidate that is better than the genome that it came from.

    Attributes:
        scored: the candidate.
        place: its place in the generation, behind the genomes that the search asked for.
        origin: the place of the genome that it came from.
    """

    scored: Scored
    place: int
    origin: int


@dataclasses.dataclass(frozen=True)
class Refined:
    """What refining a generation came to.

    Attributes:
        better: of the candidates of each genome the best, if it is better than that genome.
        runs: training runs that were made.
    """

    better: tuple[Improvement, ...]
    runs: int


class Refiner:
    """Refines generations that `Rounds` has run."""

    def __init__(self, settings: RunSettings, rounds: Rounds) -> None:
        self._settings = settings
        self._rounds = rounds

    def still_to_come(self, generation: int) -> int:
        """Training runs for refining ``generation`` and all after it, if none is raced out."""
        due = sum(map(self._due, range(generation, self._settings.search.generations)))
        return due * GENOMES * self._runs(self._settings.refine)

    def run(
        self,
        number: int,
        genomes: Sequence[Genome],
        results: Sequence[Result],
        still_to_come: int,
        note: str,
    ) -> Refined:
        """Refine generation ``number``, the last that was run.

        Args:
            genomes: of the generation.
            results: of these genomes.
            still_to_come: training runs after those of this refinement.
            note: where the evolution stands.
        """
        better: list[Improvement] = []
        runs = 0
        place = len(genomes)
        origins = best_of_structures(genomes, results) if self._due(number) else []
        for rank, (origin, result) in enumerate(origins):
            to_come = still_to_come + (len(origins) - 1 - rank) * self._runs(self._settings.refine)
            candidates = self._candidates(number, place, origin, to_come, note)
            runs += sum(of_candidate.runs for _, of_candidate in candidates)
            at_origin = genomes.index(origin)
            placed = [(genome, of, at) for at, (genome, of) in enumerate(candidates, place)]
            complete = [entry for entry in placed if entry[1].paired is not None]
            best, of_best, at = max([(origin, result, at_origin), *complete], key=paired_rank)
            if best is not origin:
                better.append(Improvement(Scored(best, of_best.score), at, at_origin))
            place += len(candidates)
        return Refined(tuple(better), runs)

    def _candidates(
        self, number: int, first: int, origin: Genome, still_to_come: int, note: str
    ) -> list[tuple[Genome, Result]]:
        """What became of all candidates for ``origin``, which are at places from ``first`` on."""
        run_seed = self._settings.search.seed
        stream = f"evokernels refinement {run_seed} generation {number} place {first}"
        seed = random.Random(stream).getrandbits(63)
        refinement = Refinement(coordinates_of(origin), self._settings.refine, seed)
        state = refinement.start()
        tried: list[tuple[Genome, Result]] = []
        while asked := refinement.ask(state):
            to_come = still_to_come + self._runs(state.left - len(asked))
            results = self._rounds.run_beside(number, first + len(tried), asked, to_come, note)
            tried += zip(asked, results, strict=True)
            state = refinement.tell(state, [result.score for result in results])
        return tried

    def _due(self, generation: int) -> bool:
        last = self._settings.search.generations - 1
        return self._settings.refine > 0 and (last - generation) % EVERY == 0

    def _runs(self, candidates: int) -> int:
        """Training runs of so many candidates, if none is raced out."""
        return candidates * len(self._settings.seeds) * len(self._settings.tasks)


def best_of_structures(
    genomes: Sequence[Genome], results: Sequence[Result]
) -> list[tuple[Genome, Result]]:
    """The genomes to refine: the best of a generation, one of each structure, none that failed."""
    chosen: dict[Program, tuple[Genome, Result]] = {}
    entries = zip(genomes, results, strict=True)
    for genome, result in sorted(entries, key=lambda entry: entry[1].score.rank, reverse=True):
        if result.paired is not None and not result.score.status.failed:
            chosen.setdefault(lower(genome).program, (genome, result))
    return list(chosen.values())[:GENOMES]


def coordinates_of(genome: Genome) -> Coordinates:
    """All that can be refined in a genome, and each optimizer once.

    Numbers that the rule does not read stay; so do the clip value, which the search never mutates
    either, and a weight decay of zero, which has no logarithm. Of the weights it takes those that
    move the rule independently of each other and, since the learning rate multiplies them all,
    without the heaviest.
    """
    read = numbers_read(genome)
    numbers = tuple(
        name for name in NUMBERS if name in read and math.isfinite(getattr(genome, name))
    )
    return Coordinates(genome, numbers, independent_terms(genome)[1:])


def paired_rank(entry: tuple[Genome, Result, int]) -> tuple[bool, float]:
    """Sort key of candidates that were trained with all seeds of the generation."""
    return entry[1].paired.rank
