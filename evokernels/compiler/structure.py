"""What a device needs to know of a rule to compute a step by itself, schedule included.

The scalars of a program are sums of weighted products: "weight of m / (sqrt(v) + 1)" is a number of
the genome over ``bias1``. Which products occur is the *structure*, from which a kernel is rendered;
the weights are data, uploaded once. The values of the products change from step to step and are
computed on the device from what `terms.GROUP_INPUTS` and `terms.STEP_INPUTS` name, so that nothing
but these has to reach it, and a captured step goes on counting.
"""

from __future__ import annotations

from dataclasses import dataclass

from evokernels.compiler import terms
from evokernels.compiler.covers import find_cover
from evokernels.compiler.expr import Expr, substitute
from evokernels.compiler.linear import ONE, Coefficient, Monomial, linear
from evokernels.compiler.lower import Rule
from evokernels.compiler.program import Program

__all__ = ["Structure", "structure_of", "value_of", "weights_of"]


@dataclass(frozen=True)
class Structure:
    """Rules of equal structure run on one kernel.

    Attributes:
        name: usable in a C identifier.
        sums: for each scalar of the program the products whose weighted sum it is.
    """

    name: str
    program: Program
    sums: tuple[tuple[Monomial, ...], ...]

    @property
    def products(self) -> tuple[Monomial, ...]:
        """All products that occur, each once."""
        return tuple(dict.fromkeys(product for products in self.sums for product in products))

    @property
    def weights(self) -> int:
        """How many weights a rule brings: one for each product of each sum."""
        return sum(map(len, self.sums))


def value_of(product: Monomial) -> Expr:
    """A product as an expression over the inputs of a step."""
    total: Expr = ONE
    for factor in product:
        factor = substitute(factor, terms.DERIVED)
        total = factor if total == ONE else total * factor
    return total


def structure_of(rule: Rule) -> Structure:
    """The cover's if there is one, else the rule's own."""
    cover = find_cover(rule.program)
    if cover is not None:
        sums = tuple(_products(*formulas) for formulas in cover.formulas)
        structure = Structure(cover.name, cover.program, sums)
        if _fits(rule, structure):
            return structure
    return Structure("own", rule.program, tuple(map(_products, rule.formulas)))


def weights_of(rule: Rule, structure: Structure) -> list[float]:
    """The weights of a rule, in the order of ``structure.sums``."""
    formulas = dict(zip(rule.program.scalars, rule.formulas, strict=True))
    cover = find_cover(rule.program)
    weights: list[float] = []
    for role, products in zip(structure.program.scalars, structure.sums, strict=True):
        if role in formulas:
            own = _weights(formulas[role])
            weights += (own.get(product, 0.0) for product in products)
        else:  # the first product is then 1, so that an infinite limit stays one
            weights += [cover.absent[role]] + [0.0] * (len(products) - 1)
    return weights


def _fits(rule: Rule, structure: Structure) -> bool:
    allowed = dict(zip(structure.program.scalars, structure.sums, strict=True))
    return all(
        set(_weights(formula)) <= set(allowed[role])
        for role, formula in zip(rule.program.scalars, rule.formulas, strict=True)
    )


def _products(*formulas: Expr) -> tuple[Monomial, ...]:
    """Those of a scalar that may have any of these formulas; at least one."""
    found = {product: None for formula in formulas for product in _weights(formula)}
    return tuple(sorted(found, key=str)) or ((),)


def _weights(formula: Expr) -> Coefficient:
    """A scalar formula as a sum of products, each with its weight."""
    return linear(formula).get(ONE, {})
