"""Rules of terms that are not in the source system: what the tests of kernels run besides it."""

from __future__ import annotations

import itertools
import math

from evokernels import Genome
from evokernels.compiler.expr import Average, Expr, averages_of
from evokernels.compiler.linear import linear
from evokernels.compiler.lower import kept_average, lower
from evokernels.compiler.terms import formula_of
from evokernels.genome import CATALOGUES, OwnTerm, Term, add_own_term, own_terms
from evokernels.terms import (
    average,
    beta1,
    beta2,
    beta3,
    clip,
    eps,
    exp,
    g,
    log1p,
    m,
    m_before,
    maximum,
    p,
    progress,
    sign,
    sqrt,
    tanh,
    v,
    where,
)

__all__ = ["AVERAGED", "FORMULAS", "WIDE", "averages_by_operand", "rule_of"]

AVERAGED = {
    "one average": average(g, beta3),
    "two averages": average(g, 0.9) / (sqrt(average(g * g, beta2)) + eps),
    "four averages": (average(g, beta1) + average(abs(g), 0.5) * m)
    / (sqrt(average(g * g, beta2)) + abs(average(g, beta2)) + 1),
    "average of moments": average((g - m) ** 2, 0.75) + v,
}

# Of every operation, in values that differ from element to element and in those of a step.
FORMULAS = {
    **AVERAGED,
    "exp": exp(-abs(g)) * m + exp(-progress) * g,
    "log1p": sign(g) * log1p(abs(g)) + log1p(progress) * m,
    "tanh": tanh(3 * g) + tanh(progress) * p,
    "where": where(g > m_before, g, 0.5 * m) + where(progress > 0.3, 0.5, 2) * g,
    "parameters": tanh(p) * g + average(p * abs(p), 0.9) + p * p,
    "limits": clip(g, -0.5, progress) + maximum(m, -0.25),
}

# What the wide catalogue has besides.
WIDE = [term for term in CATALOGUES["wide"] if term not in CATALOGUES["classic"]]


def rule_of(*terms: Expr | Term, **options: object) -> Genome:
    """A genome of terms, those that are formulas registered for this process."""
    known = {term.formula: term for term in own_terms().values()}

    def term_of(formula: Expr | Term) -> OwnTerm | Term:
        if isinstance(formula, Term):
            return formula
        free = (f"OWN_{i}" for i in itertools.count() if f"OWN_{i}" not in own_terms())
        return known.get(formula) or add_own_term(next(free), formula)

    chosen = [term_of(term) for term in terms]
    options = {"wd_log10": -math.inf, "lr_log10": 0.0, "use_bias_correction": False, **options}
    return Genome(chosen, [1.0] * len(chosen), **options)


def averages_by_operand(genome: Genome) -> dict[str, Average]:
    """The averages of a genome's terms, as the terms have them, by the operand that holds them."""
    found = {each for term in genome.term_types for each in averages_of(formula_of(term))}
    by_name = {str(atom): each for each in found for atom in linear(kept_average(genome, each))}
    names = lower(genome).state_names
    return {operand: by_name[name] for operand, name in names.items() if operand[0] == "a"}
