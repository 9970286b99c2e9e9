"""The living definition in float64: the rule as ARCHITECTURE.md states it, and programs.

`reference_update` follows the definition line by line and knows nothing of the compiler;
`run_program` runs what the compiler made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evokernels.compiler import terms
from evokernels.compiler.expr import (
    ON_ARRAYS,
    Average,
    Call,
    Constant,
    Expr,
    Symbol,
    averages_of,
)
from evokernels.compiler.program import Program, interpret
from evokernels.genome import Genome

__all__ = ["reference_step", "reference_update", "run_program"]

Value = Any  # an array, a number, or what else the operations have a meaning for


def evaluated(expr: Expr, values: Mapping[str | Average, Value], meanings: Mapping) -> Value:
    """The value of an expression as it is written, symbols by name."""
    if isinstance(expr, Call):
        return meanings[expr.op](*(evaluated(arg, values, meanings) for arg in expr.args))
    if isinstance(expr, Constant):
        return expr.value
    return values[expr if isinstance(expr, Average) else expr.name]


def reference_update(
    genome: Genome,
    tensors: Mapping[str | Average, Value],
    t: int,
    lr_factor: float = 1.0,
    gradient_factor: float = 1.0,
    training_steps: float = math.inf,
    meanings: Mapping[str, Callable] = ON_ARRAYS,
) -> dict[str | Average, Value]:
    """One step of a genome on float64 arrays of one shape, straight from the definition.

    Args:
        tensors: "p", "g", "m", "v" and the averages of its terms, as the terms have them; one that
            is missing is zero so far.
        t: number of this step, from 1.
        lr_factor: what the schedule makes of the learning rate (`learning_rate_factor`).
        gradient_factor: what the gradient is multiplied with before anything else.
        training_steps: what `progress` is a part of.
        meanings: of the operations, for something else than arrays.

    Returns:
        The new ones, without "g"; a moment that the genome does not use is returned as it came.
    """
    values: dict[str | Average, Value] = {name: tensors[name] for name in "pgmv"}
    values.update(terms.genome_scalars(genome, t, lr_factor, training_steps))
    values["gradient_factor"] = gradient_factor

    def value(formula: Expr) -> Value:
        return evaluated(formula, values, meanings)

    with np.errstate(all="ignore"):
        values["m_before"] = values["m"]
        values["g"] = value(terms.SCALED_GRADIENT)
        if genome.use_gradient_clipping:
            values["g"] = value(terms.CLIPPED_GRADIENT)
        new: dict[str | Average, Value] = {name: values[name] for name in "mv"}
        if genome.use_m:
            values["m"] = new["m"] = value(terms.FIRST_MOMENT)
        else:
            values["m"] = values["m_before"] = value(terms.UNUSED_M)
        if genome.use_v:
            values["v"] = new["v"] = value(terms.SECOND_MOMENT)
        else:
            values["v"] = value(terms.UNUSED_V)
        values["m_hat"] = value(terms.CORRECTED_M) if genome.use_m else values["m"]
        values["v_hat"] = value(terms.CORRECTED_V) if genome.use_v else values["v"]
        own = [terms.formula_of(term) for term in genome.term_types]
        averages = {average for formula in own for average in averages_of(formula)}
        for average in averages:
            before = Symbol("before", per_element=True)
            values["before"] = tensors.get(average, 0.0)
            new[average] = value(terms.averaged(average.beta, before, average.value))
        for average in averages:
            values[average] = new[average]
            if genome.use_bias_correction:
                values[average] = value(average / terms.bias_of(average.beta))
        if genome.use_bias_correction:
            values["m"], values["v"] = values["m_hat"], values["v_hat"]
        weighted = [(1.0, terms.DECAY)] if genome.weight_decay else []
        weighted += zip(genome.alphas, own, strict=True)
        update = sum((alpha * value(f) for alpha, f in weighted if alpha), 0.0)
        return {"p": values["p"] - values["lr"] * update, **new}


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
    """`reference_update` of a genome whose terms keep no averages: the new (p, m, v)."""
    tensors = {"p": p, "g": g, "m": m, "v": v}
    new = reference_update(genome, tensors, t, lr_factor, gradient_factor)
    if len(new) > 3:
        raise ValueError("the genome's terms keep averages: reference_update has room for them")
    return new["p"], new["m"], new["v"]


def run_program(
    program: Program, inputs: Mapping[str, np.ndarray], scalars: Sequence[float]
) -> dict[str, np.ndarray]:
    """One step of a program on float64 arrays."""
    with np.errstate(all="ignore"):
        return interpret(program, inputs, scalars, ON_ARRAYS)
