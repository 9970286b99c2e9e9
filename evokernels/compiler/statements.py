"""Program → statements that change tensors in place, as somebody who writes torch code would.

A genome's numbers are known here, so that less is to be done than in a program, which has none:
factors of one and terms of weight zero are gone. What is left keeps the program's operations and
their order, and with them its roundings.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evokernels.compiler import schedule, terms
from evokernels.compiler.expr import Call, Constant, Expr, substitute, symbols_of
from evokernels.compiler.linear import ONE, linear, linear_expr
from evokernels.compiler.lower import Rule

__all__ = ["NEVER_ZERO", "Operand", "Statement", "statements_of"]

Operand = str | Expr  # a tensor by its name, or a number

ZERO, MINUS_ONE = Constant(0.0), Constant(-1.0)

# Those that can change their first operand: all that make one tensor of others but these.
_NEVER_IN_PLACE = ("sign", "where", "over")

# The catalogue has limits in their first operands; this is what torch calls them.
_CLAMPS = {"max": "clamp_min", "min": "clamp_max"}

# Numbers that are always above zero; a weight that reads any other one may be.
NEVER_ZERO = {*terms.BIASES.values(), schedule.t}


@dataclass(frozen=True)
class Statement:
    """``target = op(args)``, or, in place, ``target`` changed by the other operands.

    Operations are those of `compiler.ops` without "fma", "weigh", "weigh_add", "min" and "max". In
    their place: "axpy", a + k * x for (a, x, k); "addcmul", a + k * x * y for (a, x, y, k); "over",
    k / x for (x, k); "clamp_min", "clamp_max", "clone", "copy". But for "where", tensors come
    before numbers.

    Attributes:
        args: in place, the first one is the target.
        guard: a number; the statement is there only where it is not zero.
    """

    target: str
    op: str
    args: tuple[Operand, ...]
    in_place: bool = False
    guard: Expr | None = None


def statements_of(rule: Rule) -> list[Statement]:
    """The update of a parameter "p" with the gradient "g", and of its state by the names that the
    program has for it. Other values are named after what they are."""
    folding = _Folding(rule)
    return _Naming(folding.lines, folding.results).statements()


class _Folding:
    """The lines of a program with the numbers of its genome: single assignments.

    Attributes:
        lines: not in place; every target is new.
        results: which value becomes "p" and which the state.
    """

    def __init__(self, rule: Rule) -> None:
        known = {terms.gradient_factor: ONE}  # of the training loop
        if not rule.genome.weight_decay:
            known[terms.weight_decay] = ZERO
        self._made: list[Statement] = []
        # None is a sum that has no term
        values: dict[str, Operand | None] = {name: name for name in rule.program.inputs}
        for i, formula in enumerate(rule.formulas):
            values[f"k{i}"] = linear_expr(linear(substitute(formula, known)))
        for line in rule.program.lines:
            values[line.target] = self._value(line.op, [values[arg] for arg in line.args])
        self.results = {name: values[value] for name, value in rule.program.results}
        read = set(self.results.values())
        for line in reversed(self._made):
            if line.target in read:
                read.update(line.args)
        self.lines = [line for line in self._made if line.target in read]

    def _value(self, op: str, args: list[Operand | None]) -> Operand | None:
        if op == "weigh" and args[0] == ZERO:
            return None
        if all(isinstance(arg, Expr) for arg in args) and op not in ("weigh", "weigh_add", "fma"):
            return Call(op, tuple(args))
        if op in ("mul", "weigh"):
            return self._product(*args)
        if op == "weigh_add":
            weight, x, total = args
            return total if weight == ZERO else self._sum(total, x, weight, weighed=True)
        if op == "fma":
            factor, x, total = args
            if isinstance(x, Expr):
                factor, x = x, factor
            return self._sum(total, x, factor) if isinstance(factor, Expr) else self._fma(*args)
        if op == "div" and isinstance(args[0], Expr):
            return self._line("over", args[1], args[0])
        if op in _CLAMPS or (op == "add" and isinstance(args[0], Expr)):
            args.reverse()
        return self._line(_CLAMPS.get(op, op), *args)

    def _product(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, Expr) and isinstance(b, Expr):
            return b if a == ONE else a * b
        factor, x = (a, b) if isinstance(a, Expr) else (b, a)
        return x if factor == ONE else self._line("mul", x, factor)

    def _sum(
        self, total: Operand | None, x: Operand | None, weight: Expr, weighed: bool = False
    ) -> Operand | None:
        """total + weight * x."""
        if x is None:
            return total
        if total is None:
            return self._product(weight, x)
        if isinstance(total, Expr) or isinstance(x, Expr):
            product = self._product(weight, x)
            return product if total == ZERO else self._value("add", [total, product])
        first = self._made_as(total, "mul")
        if weighed and first and _may_vanish(first.args[1]) and not _may_vanish(weight):
            # what may vanish comes behind what does not
            return self._sum(self._product(weight, x), *first.args, weighed=True)
        guard = weight if weighed and _may_vanish(weight) else None
        if weight in (ONE, MINUS_ONE):
            return self._line("add" if weight == ONE else "sub", total, x)
        return self._line("axpy", total, x, weight, guard=guard)

    def _fma(self, x: str, y: str, total: Operand) -> Operand:
        if isinstance(total, Expr):
            return self._value("add", [self._line("mul", x, y), total])
        factor = self._made_as(x, "mul")
        if factor and isinstance(factor.args[1], Expr):
            return self._line("addcmul", total, factor.args[0], y, factor.args[1])
        return self._line("addcmul", total, x, y, ONE)

    def _made_as(self, value: Operand, op: str) -> Statement | None:
        return next((line for line in self._made if (line.target, line.op) == (value, op)), None)

    def _line(self, op: str, *args: Operand, guard: Expr | None = None) -> str:
        for line in self._made:
            if (line.op, line.args, line.guard) == (op, args, guard):
                return line.target
        self._made.append(Statement(f"t{len(self._made)}", op, args, guard=guard))
        return self._made[-1].target


def _may_vanish(weight: Operand) -> bool:
    return isinstance(weight, Expr) and not symbols_of(weight) <= NEVER_ZERO


class _Naming:
    """Statements with names, in place where nothing is lost."""

    def __init__(self, lines: Sequence[Statement], results: Mapping[str, Operand]) -> None:
        self._made = {line.target: line for line in lines}
        self._results = results
        self._readers = Counter(arg for line in lines for arg in set(line.args))
        self._wishes: dict[Operand, str] = {}
        overwriters = {}
        for name, value in results.items():
            chain = self._chain(value)
            overwrites = bool(chain) and self._made[chain[-1]].args[0] == name
            if overwrites:
                overwriters[name] = chain[-1]
            self._wish(name if overwrites else f"new_{name}", chain)
        self._lines = _in_order(lines, overwriters)
        for line in reversed(self._lines):
            if line.target == results["p"] and line.op in ("axpy", "addcmul"):
                self._wish("update", self._chain(line.args[1]))
            elif line.op == "div":
                self._wish("denominator", self._chain(line.args[1]))
            elif line.op == "clamp_max":
                self._wish("g", self._chain(line.target))

    def _wish(self, name: str, chain: Sequence[str]) -> None:
        for value in chain:
            self._wishes.setdefault(value, name)

    def _chain(self, value: Operand) -> list[str]:
        """The value and those before it that it can be made of in place, the last one first."""
        chain = []
        while value in self._made:
            chain.append(value)
            line = self._made[value]
            if line.op in _NEVER_IN_PLACE:
                break
            value = line.args[0]
            if self._readers[value] > 1:
                break
        return chain

    def statements(self) -> list[Statement]:
        """All of them, in order."""
        last_read = {arg: i for i, line in enumerate(self._lines) for arg in line.args}
        last_read |= {value: len(self._lines) for value in self._results.values()}
        names: dict[Operand, str] = {name: name for name in ("g", *self._results)}
        statements = []
        for i, line in enumerate(self._lines):
            first, wish = line.args[0], self._wishes.get(line.target)
            in_place = (
                line.op not in _NEVER_IN_PLACE
                and last_read[first] == i
                and (names[first] == wish if wish else names[first] != "g")
                and (first in self._made or first == wish != "g")
            )
            if in_place:
                name = names[first]
            else:
                live = {
                    names[value] for value, end in last_read.items() if value in names and end > i
                }
                name = _unused(wish or _called(line, names), live | set(self._results))
            args = tuple(names.get(arg, arg) for arg in line.args)
            if line.guard is not None and not in_place:  # there must be something without it
                statements.append(Statement(name, "clone", args[:1]))
                args, in_place = (name, *args[1:]), True
            guard = line.guard
            statements.append(Statement(name, line.op, args, in_place, guard))
            names[line.target] = name
        for name, value in self._results.items():
            if names[value] != name:
                statements.append(Statement(name, "copy", (name, names[value]), in_place=True))
        return statements


def _in_order(lines: Sequence[Statement], overwriters: Mapping[str, str]) -> list[Statement]:
    """Whoever reads a state as it was comes before the line that overwrites it, if that can be."""
    waiting, ordered = list(lines), []
    known: set[str] = set()
    made = {line.target for line in lines}
    before = {
        overwriter: {other.target for other in lines if name in other.args} - {overwriter}
        for name, overwriter in overwriters.items()
    }
    while waiting:
        ready = [line for line in waiting if made.intersection(line.args) <= known]
        free = (line for line in ready if before.get(line.target, set()) <= known)
        line = next(free, ready[0])
        waiting.remove(line)
        ordered.append(line)
        known.add(line.target)
    return ordered


# What a value is called that goes into another one, by the operation that makes it.
_CALLED = {"where": "chosen", "div": "ratio", "over": "ratio"}


def _called(line: Statement, names: Mapping[Operand, str]) -> str:
    first = names.get(line.args[0], "")
    if line.op == "mul" and line.args[1] in [ONE / bias for bias in terms.BIASES.values()]:
        return f"{first}_hat"
    if len(line.args) == 1 and first in ("g", "m", "v", "m_hat", "v_hat"):
        return f"{line.op}_{first}"
    return _CALLED.get(line.op, "mix")


def _unused(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)
