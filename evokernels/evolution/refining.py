"""The best genomes of some generations have their numbers refined; the genetic search goes on with
what became of them.

One evaluation is what it is in the search: a candidate is trained on every task with every seed of
the generation, under the conditions of the run, the hurdle and the seed race included. The race is
against that generation, not against other candidates, which are all near its best. So a candidate
and the genome that it came from have had the same initial weights, batches and dropout, and the
better of them is better on the very same trials. It joins the generation beside its origin if it
is, and only then: both can become parents and elites, and, as both were told, finalists.
"""

from __future__ import annotations

import dataclasses
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

__all__ = ["Refined", "Refiner", "coordinates_of"]

EVERY = 3  # generations, counted back from the last, which is always refined
GENOMES = 1  # refined at a time, each the best of its structure


@dataclasses.dataclass(frozen=True)
class Refined:
    """What a refinement came to.

    Attributes:
        better: candidates that did better than the genome that they came from.
        results: of all candidates, in the order in which they were asked for.
    """

    better: tuple[Scored, ...] = ()
    results: tuple[Result, ...] = ()


class Refiner:
    """Refines after the generations that `Rounds` runs."""
