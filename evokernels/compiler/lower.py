"""Genome → rule: the linear form of its update, the program that computes it, its numbers.

The passes, in order:

1. add up the weighted terms of the catalogue and the weight decay;
2. substitute corrected moments, and what stands in for unused ones;
3. bring the sum into linear form: equal terms merge, bias correction folds into scalars, quotients
   over equal denominators can be collected, terms whose weights cancel disappear;
4. assemble single assignments; moments that nothing reads are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evokernels.compiler import schedule, terms
from evokernels.compiler.expr import (
    Call,
    Constant,
    Expr,
    Line,
    Symbol,
    compiled,
    substitute,
    symbols_of,
)
from evokernels.compiler.linear import ONE, Linear, coefficient_expr, linear
from evokernels.compiler.program import Program
from evokernels.genome import Genome

__all__ = ["RATE", "Rule", "assemble", "lower", "update_of", "weighted_terms"]

RATE = -terms.lr


@dataclass(frozen=True)
class Rule:
    """A genome, compiled as far as it goes without a machine.

    Attributes:
        program: the structure; genomes that differ in numbers only share it.
        formulas: the scalar formula of each of ``program.scalars``, over ``lr``,
            ``weight_decay``, ``beta1``, ``beta2``, ``bias1``, ``bias2``, ``eps``, ``clip``,
            ``gradient_factor``.
    """

    genome: Genome
    program: Program
    formulas: tuple[Expr, ...]

    @functools.cached_property
    def numbers(self) -> Callable[..., list[float]]:
        """A function from the scalars of a step (`terms.scalar_values`, by keyword) to those of the
        program, in float64."""
        return compiled(*self.formulas)

    @functools.cached_property
    def numbers_of_step(self) -> Callable[..., list[float]]:
        """The same from what they are made of, schedule and bias correction included: the number
        of the step, the values of `terms.STEP_INPUTS` and those of `terms.GROUP_INPUTS`."""
        formulas = [substitute(formula, terms.DERIVED) for formula in self.formulas]
        return compiled(*formulas, parameters=(schedule.t, *terms.STEP_INPUTS, *terms.GROUP_INPUTS))


@functools.lru_cache(maxsize=4096)
def lower(genome: Genome) -> Rule:
    """Compile a genome into its rule."""
    return Rule(genome, *assemble(linear(update_of(genome)), clipping=genome.use_gradient_clipping))


def update_of(genome: Genome) -> Expr:
    """What the learning rate multiplies, in each step."""
    corrected = {terms.m: terms.CORRECTED_M, terms.v: terms.CORRECTED_V}
    return weighted_terms(genome, corrected if genome.use_bias_correction else {})


def weighted_terms(genome: Genome, moments: Mapping[Symbol, Expr]) -> Expr:
    """Passes 1 and 2: what the learning rate multiplies.

    Args:
        moments: what terms see in place of ``m`` and ``v`` where the genome uses them.
    """
    seen = dict(moments)
    if not genome.use_m:
        seen[terms.m] = terms.UNUSED_M
    if not genome.use_v:
        seen[terms.v] = terms.UNUSED_V
    total: Expr = terms.DECAY
    for term, alpha in zip(genome.term_types, genome.alphas, strict=True):
        total = total + alpha * terms.CATALOGUE[term]
    return substitute(total, seen)


def assemble(update: Linear, *, clipping: bool) -> tuple[Program, tuple[Expr, ...]]:
    """Pass 4: the program that applies an update, and the formulas of its scalars."""
    assembler = _Assembler()
    assembler.values[terms.g] = assembler.value(terms.SCALED_GRADIENT)
    if clipping:
        assembler.values[terms.g] = assembler.value(terms.CLIPPED_GRADIENT)
    read = {symbol for atom in update for symbol in symbols_of(atom)}
    state = []
    for moment, formula in ((terms.m, terms.FIRST_MOMENT), (terms.v, terms.SECOND_MOMENT)):
        if moment in read:
            assembler.values[moment] = assembler.value(formula)
            state.append(moment.name)
    total = assembler.total(update)
    # rounded once; and a learning rate apart from the weights leaves both as exact as they came
    rate = assembler.scalar(str(RATE), RATE)
    results = (
        ("p", assembler.line("fma", rate, total, assembler.value(terms.p))),
        *((name, assembler.values[Symbol(name, per_element=True)]) for name in state),
    )
    program = Program(tuple(state), tuple(assembler.scalars), tuple(assembler.lines), results)
    return program.verify(), tuple(assembler.scalars.values())


class _Assembler:
    """Collects assignments; equal operations are assigned once.

    A scalar is named after what it does in the structure ("weight of m / (sqrt(v) + 1)"), never
    after its number, so that rules of equal structure get equal programs.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.scalars: dict[str, Expr] = {}
        self.values: dict[Expr, str] = {}
        self._assigned: dict[tuple[str, ...], str] = {}

    def line(self, op: str, *args: str) -> str:
        """The name of a value computed from named values."""
        key = (op, *args)
        if key not in self._assigned:
            self._assigned[key] = f"t{len(self.lines)}"
            self.lines.append(Line(self._assigned[key], op, args))
        return self._assigned[key]

    def scalar(self, role: str, formula: Expr) -> str:
        """The operand of a run-time number."""
        if self.scalars.setdefault(role, formula) != formula:
            role += "'"  # a second sum of the same shape with other numbers
            return self.scalar(role, formula)
        return f"k{list(self.scalars).index(role)}"

    def value(self, expr: Expr) -> str:
        """A formula of the catalogue as it is written."""
        if expr in self.values:
            return self.values[expr]
        if isinstance(expr, Symbol) and expr.per_element:
            return expr.name
        if not getattr(expr, "per_element", False):
            return self.scalar(str(expr), expr)
        if expr.op == "add" and isinstance(expr.args[1], Call) and expr.args[1].op == "mul":
            factors = [self.value(factor) for factor in expr.args[1].args]
            return self.line("fma", *factors, self.value(expr.args[0]))
        return self.line(expr.op, *(self.value(arg) for arg in expr.args))

    def total(self, form: Linear) -> str:
        """The update: one quotient for each denominator, then plain atoms on top.

        What is bounded comes first, a gradient that may be large last: fewer roundings are large.
        """
        groups: dict[Expr | None, Linear] = {}
        for item in form.items():
            groups.setdefault(_denominator(item), {}).update([item])
        plain = self.weights(groups.pop(None, {}), "")
        quotients = [self.quotient(denominator, group) for denominator, group in groups.items()]
        total = (
            functools.reduce(functools.partial(self.line, "add"), quotients) if quotients else None
        )
        return self.weighted_sum(dict(reversed(plain.items())), total, "weigh", "weigh_add")

    def quotient(self, denominator: Expr, group: Linear) -> str:
        """All atoms over one denominator."""
        shape = f" / ({_shape(denominator)})"
        numerators = {atom.args[0]: coefficient for atom, coefficient in group.items()}
        dividend = self.weighted_sum(self.weights(numerators, shape), None, "weigh", "weigh_add")
        divisor = self.weighted_sum(self.weights(linear(denominator), f" in{shape}"))
        return self.line("div", dividend, divisor)

    def weights(self, form: Linear, role: str) -> dict[Expr, str]:
        """A run-time number for each atom of a sum, named after the atom and `role`."""
        return {
            atom: self.scalar(f"weight of {_shape(atom)}{role}", coefficient_expr(coefficient))
            for atom, coefficient in form.items()
        }

    def weighted_sum(
        self, weights: dict[Expr, str], total: str | None = None, mul: str = "mul", fma: str = "fma"
    ) -> str:
        """A sum of atoms, each times its number, and of `total` if there is one."""
        weights = dict(weights)
        total = weights.pop(ONE, total)
        for atom, weight in weights.items():
            value = self.atom(atom)
            total = self.line(fma, weight, value, total) if total else self.line(mul, weight, value)
        return total

    def atom(self, atom: Expr) -> str:
        """An atom, whose operands are linear forms of their own."""
        if isinstance(atom, Symbol):
            return self.value(atom)
        return self.line(atom.op, *(self.operand(arg, atom.op) for arg in atom.args))

    def operand(self, expr: Expr, role: str) -> str:
        """An operand of an atom: another atom as it is, or a weighted sum."""
        form = linear(expr)
        if list(form.values()) == [{(): 1.0}] and ONE not in form:
            return self.atom(next(iter(form)))
        return self.weighted_sum(self.weights(form, f" in {role}"))


def _denominator(item: tuple[Expr, object]) -> Expr | None:
    atom, _ = item
    return atom.args[1] if isinstance(atom, Call) and atom.op == "div" else None


def _shape(expr: Expr) -> str:
    """An expression with its numbers left out, as text."""
    form = linear(expr)
    bare = [
        atom
        if isinstance(atom, (Symbol, Constant))
        else f"{atom.op}({', '.join(_shape(arg) for arg in atom.args)})"
        for atom in form
    ]
    return " + ".join(str(atom) for atom in bare)
