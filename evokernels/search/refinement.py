"""The numbers of one genome refined by ENES, its structure fixed, as ask/tell.

    refinement = Refinement(coordinates, evaluations=40, seed=0)
    state = refinement.start()
    while candidates := refinement.ask(state):
        state = refinement.tell(state, [score(genome) for genome in candidates])

ENES starts at the origin of the coordinates, one mutation's sigma wide in each of them. Its
generations are small (`generation_size`, where its own default is 100), since each candidate costs
training runs. What is left of the evaluations after the last whole generation goes to the mean that
ENES has come to and to candidates around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from evokernels.genome import Genome
from evokernels.search import enes
from evokernels.search.coordinates import Coordinates
from evokernels.search.enes import ENES
from evokernels.search.score import Score

__all__ = ["LEAST_EVALUATIONS", "Refinement", "State", "generation_size"]

# A generation in the ten dimensions that a genome of classic terms has at most, and its mean
# afterwards.
LEAST_EVALUATIONS = 11

# The utilities of ENES fall from 1 to 0 over the better half: a quarter on average. With this rate
# the mean goes all the way to the weighted mean of that half, as it does with the rate of 1 and the
# utilities of Wierstra et al. 2014, which add up to 1. A quarter of the way leads nowhere in so few
# generations: 40 candidates in `bench/landscape.py` gain 0.0036 so, and 0.0028 with the default.
LR_MEAN = 4.0

# The last bits of a matrix product depend on the machine. Those of a genome must not: a run can be
# resumed on another one.
DECIMALS = 9


def generation_size(dimensions: int) -> int:
    """4 + 3 ln(d), rounded down (Wierstra et al. 2014, table 1)."""
    return 4 + math.floor(3.0 * math.log(dimensions))


@dataclasses.dataclass(frozen=True)
class State:
    """Where a refinement stands: ENES, and how many candidates may still be evaluated."""

    search: enes.State
    left: int


class Refinement:
    """Ask for candidates, tell their scores; see the module's docstring.

    Args:
        coordinates: of the genome; at least one.
        evaluations: candidates in all.
        seed: of the candidates.
    """

    def __init__(self, coordinates: Coordinates, evaluations: int, seed: int) -> None:
        self._coordinates = coordinates
        self._evaluations = evaluations
        low, high = coordinates.bounds
        dimensions = len(coordinates)
        self._enes = ENES(
            {"ndim_problem": dimensions, "lower_boundary": low, "upper_boundary": high},
            {
                "n_individuals": generation_size(dimensions),
                "lr_mean": LR_MEAN,
                "mean": np.zeros(dimensions),
                "seed_rng": seed,
                "is_restart": False,
            },
        )

    def start(self) -> State:
        """Nothing asked yet."""
        return State(self._enes.start(), self._evaluations)

    def ask(self, state: State) -> tuple[Genome, ...]:
        """The genomes to score, within the bounds of the coordinates; empty at the end."""
        vectors = self._enes.ask(state.search)
        if state.left <= len(vectors):
            vectors = np.stack([state.search.mean, *vectors])[: state.left]
        return tuple(self._coordinates.genome(vector) for vector in vectors.round(DECIMALS))

    def tell(self, state: State, scores: Sequence[Score]) -> State:
        """The state that follows; ``scores`` in the order of ``ask``. A failed one ranks last."""
        search = state.search
        if len(scores) < state.left:
            costs = [math.inf if score.status.failed else -score.fitness for score in scores]
            search = self._enes.tell(search, costs)
        return State(search, state.left - len(scores))
