"""`FusedEvolvedOptimizer`, the public face of the kernels."""

from evokernels.optim.optimizer import FusedEvolvedOptimizer

__all__ = ["FusedEvolvedOptimizer"]
