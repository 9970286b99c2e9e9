"""Search strategies: ask for candidates, tell their scores. No torch, no hidden randomness."""

from evokernels.search.coevolution import Coevolution, CoevolutionConfig
from evokernels.search.enes import ENES
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.score import Score, Status
from evokernels.search.spaces import ArchitectureSpace, FixedSpace, OptimizerSpace, PairSpace, Space

__all__ = [
    "ENES",
    "ArchitectureSpace",
    "Coevolution",
    "CoevolutionConfig",
    "FixedSpace",
    "GeneticConfig",
    "GeneticSearch",
    "OptimizerSpace",
    "PairSpace",
    "Score",
    "Space",
    "Status",
]
