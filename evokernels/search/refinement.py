"""The numbers of one genome refined by ENES, its structure fixed, as ask/tell.

    refinement = Refinement(coordinates, evaluations=40, seed=0)
    state = refinement.start()
    while candidates := refinement.ask(state):
        state = refinement.tell(state, [score(genome) for genome in candidates])
    state.best

ENES starts at the origin of the coordinates, one mutation's sigma wide in each of them. Its
generations have `generation_size` candidates, not the 100 of its own default: each costs training
runs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

from evokernels.genome import Genome
from evokernels.search import enes
from evokernels.search.coordinates import Coordinates
from evokernels.search.enes import ENES
from evokernels.search.genetic import Scored
from evokernels.search.score import Score

__all__ = ["Refinement", "State", "generation_size"]

# The last bits of a matrix product depend on the machine. Those of a genome must not: a run can be
# resumed on another one.
DECIMALS = 9


def generation_size(dimensions: int) -> int:
    """Candidates in a generation of ENES: 4 + 3 ln(d), rounded down (Wierstra et al. 2014, tab. 1)."""
    return 4 + math.floor(3.0 * math.log(dimensions))


@dataclasses.dataclass(frozen=True)
class State:
    """Where a refinement stands.

    Attributes:
        search: of ENES.
        best: the best candidate told, the earliest among equals; None at the start.
    """

    search: enes.State
    best: Scored | None


class Refinement:
    """Ask for candidates, tell their scores; see the module's docstring.

    Args:
        coordinates: of the genome; at least one.
        evaluations: candidates in all, at least 1. The last ones may be less than a generation;
            ENES learns nothing from them, but one of them can be the best.
        seed: of the candidates.
    """

    def __init__(self, coordinates: Coordinates, evaluations: int, seed: int) -> None:
        self._coordinates = coordinates
        low, high = coordinates.bounds
        dimensions = len(coordinates)
        self._enes = ENES(
            {"ndim_problem": dimensions, "lower_boundary": low, "upper_boundary": high},
            {
                "max_function_evaluations": evaluations,
                "n_individuals": generation_size(dimensions),
                "mean": [0.0] * dimensions,
                "seed_rng": seed,
                "is_restart": False,
            },
        )

    def start(self) -> State:
        """Nothing asked yet."""
        return State(self._enes.start(), best=None)

    def ask(self, state: State) -> tuple[Genome, ...]:
        """The genomes to score, within the coordinates' bounds; empty at the end."""
        vectors = self._enes.ask(state.search).round(DECIMALS)
        return tuple(self._coordinates.genome(vector) for vector in vectors)

    def tell(self, state: State, scores: Sequence[Score]) -> State:
        """The state that follows; ``scores`` in the order of ``ask``."""
        scored = [Scored(*pair) for pair in zip(self.ask(state), scores, strict=True)]
        known = scored if state.best is None else [state.best, *scored]
        search = self._enes.tell(state.search, [_cost(score) for score in scores])
        return State(search, max(known, key=lambda entry: entry.score.rank))


def _cost(score: Score) -> float:
    """What ENES minimises; it reads ranks alone, and the largest number is the rank of failure."""
    return sys.float_info.max if score.status.failed else -score.fitness
