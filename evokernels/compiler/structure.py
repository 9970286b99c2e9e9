"""What a device needs to know of a rule to compute a step by itself, schedule included.

The scalars of a program are sums of weighted products: "weight of m / (sqrt(v) + 1)" is a number of
the genome over ``bias1``. Which products occur is the *structure*, from which a kernel is rendered;
the weights are data, uploaded once. The values of the products change from step to step and are
computed on the device from what `GROUP_INPUTS` and `STEP_INPUTS` name, so that nothing but these
has to reach it, and a captured step goes on counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evokernels.compiler import schedule, terms
from evokernels.compiler.covers import find_cover
from evokernels.compiler.expr import Call, Constant, Expr, Symbol, substitute
from evokernels.compiler.linear import ONE, Coefficient, Monomial, linear
from evokernels.compiler.lower import Rule
from evokernels.compiler.program import Line, Program

__all__ = [
    *("GROUP_INPUTS", "STEP_INPUTS", "Structure", "assignments", "structure_of", "value_of"),
    "weights_of",
]

# What a group of parameters brings to a step, and what a step is the same for all of them; besides
# `schedule.t`, which every parameter counts for itself.
GROUP_INPUTS: tuple[Symbol, ...] = (
    *(terms.base_lr, terms.weight_decay, terms.beta1, terms.beta2, terms.log_beta1),
    *(terms.log_beta2, terms.eps, terms.clip, terms.direction),
    *(schedule.warmup_steps, schedule.total_steps),
)
STEP_INPUTS: tuple[Symbol, ...] = (terms.grad_scale, terms.max_norm, terms.squares)


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


def assignments(exprs: Sequence[Expr]) -> tuple[list[Line], list[str]]:
    """Expressions over scalars as single assignments, equal operations once, for renderers.

    Returns:
        The lines, whose targets are ``s0``, ``s1``, … and whose operands are those, names of
        symbols and numbers; and the operand that stands for each expression.
    """
    targets: dict[tuple[str, ...], str] = {}

    def operand(expr: Expr) -> str:
        if isinstance(expr, Call):
            key = (expr.op, *map(operand, expr.args))
            return targets.setdefault(key, f"s{len(targets)}")
        return repr(expr.value) if isinstance(expr, Constant) else expr.name

    results = [operand(expr) for expr in exprs]
    return [Line(target, op, tuple(args)) for (op, *args), target in targets.items()], results


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
