"""The living definition in float64: the rule as ARCHITECTURE.md states it, and programs.

`reference_step` follows the definition line by line and knows nothing of the compiler;
`run_program` runs what the compiler made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from evokernels.compiler import terms
from evokernels.compiler.expr import ON_ARRAYS, Expr, compiled
from evokernels.compiler.program import Program, interpret
from evokernels.genome import Genome

__all__ = ["reference_step", "run_program"]

# of the catalogue's formulas, which are few
_compiled = functools.cache(functools.partial(compiled, meanings=ON_ARRAYS))


def reference_step(
    genome: Genome,
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    t: int,
    lr_factor: float = 1.0,
    gradient_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of a genome on float64 arrays of one shape, straight from the definition.

    Args:
        t: number of this step, from 1.
        lr_factor: what the schedule makes of the learning rate (`learning_rate_factor`).
        gradient_factor: what the gradient is multiplied with before anything else.

    Returns:
        The new (p, m, v); a moment that the genome does not use is returned as it came.
    """
    values = {"p": p, "g": g, "m": m, "v": v, **terms.genome_scalars(genome, t, lr_factor)}
    values["gradient_factor"] = gradient_factor

    def value(formula: Expr) -> np.ndarray:
        return _compiled(formula)(**values)[0]

    with np.errstate(all="ignore"):
        values["g"] = value(terms.SCALED_GRADIENT)
        if genome.use_gradient_clipping:
            values["g"] = value(terms.CLIPPED_GRADIENT)
        if genome.use_m:
            values["m"] = m = value(terms.FIRST_MOMENT)
        if genome.use_v:
            values["v"] = v = value(terms.SECOND_MOMENT)
        seen_m = value(terms.CORRECTED_M) if genome.use_bias_correction else m
        seen_v = value(terms.CORRECTED_V) if genome.use_bias_correction else v
        values["m"] = seen_m if genome.use_m else value(terms.UNUSED_M)
        values["v"] = seen_v if genome.use_v else value(terms.UNUSED_V)
        weighted = [(1.0, terms.DECAY)] if genome.weight_decay else []
        weighted += [
            (alpha, terms.CATALOGUE[term])
            for term, alpha in zip(genome.term_types, genome.alphas, strict=True)
        ]
        update = sum((alpha * value(f) for alpha, f in weighted if alpha), np.zeros_like(p))
        return p - values["lr"] * update, m, v


def run_program(
    program: Program, inputs: Mapping[str, np.ndarray], scalars: Sequence[float]
) -> dict[str, np.ndarray]:
    """One step of a program on float64 arrays."""
    with np.errstate(all="ignore"):
        return interpret(program, inputs, scalars, ON_ARRAYS)
