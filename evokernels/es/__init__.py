"""Evolution strategies: any module trained without gradients, through any torch optimizer."""

from evokernels.es.perceptron import PopulationForward
from evokernels.es.strategy import EvolutionStrategy

__all__ = ["EvolutionStrategy", "PopulationForward"]
