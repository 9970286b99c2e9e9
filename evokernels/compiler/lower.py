"""Genome → rule: the linear form of its update, the program that computes it, its numbers.

The passes, in order:

1. add up the weighted terms of the catalogue and the weight decay;
2. substitute corrected moments, and what stands in for unused ones;
3. bring the sum into linear form: equal terms merge, bias correction folds into scalars, quotients
   over equal denominators can be collected, terms whose weights cancel disappear;
4. name the averages that are left: from here on they are moments like the others;
5. assemble single assignments; moments that nothing reads are dropped.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evokernels.compiler import schedule, terms
from evokernels.compiler.expr import (
    Average,
    Call,
    Constant,
    Expr,
    Line,
    Symbol,
    averages_of,
    compiled,
    substitute,
    symbols_of,
)
from evokernels.compiler.linear import ONE, Linear, coefficient_expr, linear, linear_expr
from evokernels.compiler.program import AVERAGES, Program
from evokernels.genome import Genome

__all__ = [
    "MOMENT_NAMES",
    "RATE",
    "Rule",
    "assemble",
    "kept_average",
    "lower",
    "shape_of",
    "update_of",
    "weighted_terms",
]

RATE = -terms.lr

# torch's own names of the moments, so that Adam's state can be read
MOMENT_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}


@dataclass(frozen=True)
class Rule:
    """A genome, compiled as far as it goes without a machine.

    Attributes:
        program: the structure; genomes that differ in numbers only share it.
        formulas: the scalar formula of each of ``program.scalars``, over ``lr``,
            ``weight_decay``, ``beta1``, ``beta2``, ``beta3``, ``bias1``, ``bias2``, ``bias3``,
            ``eps``, ``clip``, ``progress``, ``t``, ``gradient_factor``.
        averages: what the operands "a0", "a1", … of the program's state are.
    """

    genome: Genome
    program: Program
    formulas: tuple[Expr, ...]
    averages: tuple[Average, ...] = ()

    @property
    def named_averages(self) -> dict[str, Average]:
        """The averages by operand."""
        return dict(zip(AVERAGES, self.averages, strict=False))

    @functools.cached_property  # asked for each parameter
    def state_names(self) -> dict[str, str]:
        """What the program's state is called where it outlives the program, by operand."""
        named = dict(MOMENT_NAMES)
        for operand, average in self.named_averages.items():
            name = str(average)
            while name in named.values():
                name += "'"  # texts leave out late digits
            named[operand] = name
        return {operand: named[operand] for operand in self.program.state}

    @functools.cached_property
    def reads_progress(self) -> bool:
        """Whether it needs to know how long the training is."""
        return any(terms.progress in symbols_of(formula) for formula in self.formulas)

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
    if not genome.use_bias_correction:
        return weighted_terms(genome)
    corrected = {terms.m: terms.CORRECTED_M, terms.v: terms.CORRECTED_V}
    return weighted_terms(genome, corrected, lambda a: a / terms.bias_of(a.beta))


def weighted_terms(
    genome: Genome,
    moments: Mapping[Symbol, Expr] = types.MappingProxyType({}),
    average: Callable[[Average], Expr] = lambda average: average,
) -> Expr:
    """Passes 1 and 2: what the learning rate multiplies.

    Args:
        moments: what terms see in place of ``m`` and ``v`` where the genome uses them.
        average: what they see in place of an average.
    """
    total: Expr = terms.DECAY
    for term, alpha in zip(genome.term_types, genome.alphas, strict=True):
        total = total + alpha * terms.formula_of(term)
    averages = {each: average(kept_average(genome, each)) for each in averages_of(total)}
    return substitute(total, {**moments, **_moments_within(genome), **averages})


def kept_average(genome: Genome, average: Average) -> Average:
    """What a genome keeps as an average of one of its terms."""
    return substitute(average, _moments_within(genome))


def _moments_within(genome: Genome) -> dict[Symbol, Expr]:
    """What averages see in place of moments: the moments themselves, if the genome uses them."""
    seen: dict[Symbol, Expr] = {terms.m_hat: terms.CORRECTED_M, terms.v_hat: terms.CORRECTED_V}
    if not genome.use_m:
        seen.update(dict.fromkeys((terms.m, terms.m_hat, terms.m_before), terms.UNUSED_M))
    if not genome.use_v:
        seen.update(dict.fromkeys((terms.v, terms.v_hat), terms.UNUSED_V))
    return seen


def assemble(
    update: Linear, *, clipping: bool
) -> tuple[Program, tuple[Expr, ...], tuple[Average, ...]]:
    """Passes 4 and 5: the program that applies an update, the formulas of its scalars, and its
    averages."""
    update, averages = _with_named_averages(update)
    assembler = _Assembler()
    assembler.values[terms.g] = assembler.value(terms.SCALED_GRADIENT)
    if clipping:
        assembler.values[terms.g] = assembler.value(terms.CLIPPED_GRADIENT)
    assembler.values[terms.m_before] = terms.m.name  # what comes in
    read = set().union(*map(symbols_of, (*update, *averages.values())))
    if terms.m_before in read:
        read.add(terms.m)
    state = []
    for moment, formula in ((terms.m, terms.FIRST_MOMENT), (terms.v, terms.SECOND_MOMENT)):
        if moment in read:
            assembler.values[moment] = assembler.value(formula)
            state.append(moment.name)
    betas: dict[Symbol, Expr] = {}
    # all from what the others were before this step's averages: none reads another
    for symbol, average in averages.items():
        beta = Symbol(f"beta of {symbol}", per_element=False)  # a role: numbers are no structure
        betas[beta] = average.beta
        assembler.values[_VALUE] = assembler.operand(average.value, symbol.name)
        assembler.values[symbol] = assembler.value(terms.averaged(beta, symbol, _VALUE))
        state.append(symbol.name)
    total = assembler.total(update)
    # rounded once; and a learning rate apart from the weights leaves both as exact as they came
    rate = assembler.scalar(str(RATE), RATE)
    results = (
        ("p", assembler.line("fma", rate, total, assembler.value(terms.p))),
        *((name, assembler.values[Symbol(name, per_element=True)]) for name in state),
    )
    program = Program(tuple(state), tuple(assembler.scalars), tuple(assembler.lines), results)
    formulas = tuple(substitute(formula, betas) for formula in assembler.scalars.values())
    return program.verify(), formulas, tuple(averages.values())


# What is being averaged.
_VALUE = Symbol("value", per_element=True)


def _with_named_averages(update: Linear) -> tuple[Linear, dict[Symbol, Average]]:
    """An update with symbols in the place of averages, and what they stand for."""
    found = {average for atom in update for average in averages_of(atom)}
    if not found:
        return update, {}
    in_order = sorted(found, key=lambda average: (str(average), repr(average)))
    averages = {
        Symbol(operand, per_element=True): average
        for operand, average in zip(AVERAGES[: len(found)], in_order, strict=True)
    }
    symbols = {average: symbol for symbol, average in averages.items()}
    return linear(substitute(linear_expr(update), symbols)), averages


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
        shape = f" / ({shape_of(denominator)})"
        numerators = {atom.args[0]: coefficient for atom, coefficient in group.items()}
        dividend = self.weighted_sum(self.weights(numerators, shape), None, "weigh", "weigh_add")
        divisor = self.weighted_sum(self.weights(linear(denominator), f" in{shape}"))
        return self.line("div", dividend, divisor)

    def weights(self, form: Linear, role: str) -> dict[Expr, str]:
        """A run-time number for each atom of a sum, named after the atom and `role`."""
        return {
            atom: self.scalar(f"weight of {shape_of(atom)}{role}", coefficient_expr(coefficient))
            for atom, coefficient in form.items()
        }

    def weighted_sum(
        self, weights: dict[Expr, str], total: str | None = None, mul: str = "mul", fma: str = "fma"
    ) -> str:
        """A sum of atoms, each times its number, and of `total` if there is one."""
        weights = dict(weights)
        one = weights.pop(ONE, None)
        if one is not None:
            total = self.line("add", total, one) if total else one
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
        if not form:
            return self.scalar("0", Constant(0.0))
        if list(form.values()) == [{(): 1.0}] and ONE not in form:
            return self.atom(next(iter(form)))
        return self.weighted_sum(self.weights(form, f" in {role}"))


def _denominator(item: tuple[Expr, object]) -> Expr | None:
    atom, _ = item
    return atom.args[1] if isinstance(atom, Call) and atom.op == "div" else None


@functools.lru_cache(maxsize=4096)
def shape_of(expr: Expr) -> str:
    """An expression with its numbers left out, as text."""
    form = linear(expr)
    bare = [
        atom
        if isinstance(atom, (Symbol, Constant))
        else f"{atom.op}({', '.join(shape_of(arg) for arg in atom.args)})"
        for atom in form
    ]
    return " + ".join(str(atom) for atom in bare)
