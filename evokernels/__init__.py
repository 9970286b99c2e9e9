"""Evolved optimizer update rules, compiled into fused kernels."""

import sys

from evokernels import terms, zoo
from evokernels.architecture import Architecture
from evokernels.errors import EvokernelsError
from evokernels.explain import explain
from evokernels.genome import Genome, Term
from evokernels.optim import FusedEvolvedOptimizer

__all__ = [
    "Architecture",
    "EvokernelsError",
    "FusedEvolvedOptimizer",
    "Genome",
    "Term",
    "explain",
    "terms",
    "zoo",
]

# `import evokernels.FusedEvolvedOptimizer` is how the class has been asked for: a name listed here
# is found by the import statement, although it is no module.
sys.modules["evokernels.FusedEvolvedOptimizer"] = FusedEvolvedOptimizer
