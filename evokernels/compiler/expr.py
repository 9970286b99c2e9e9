"""Expressions over tensors and scalars, built by writing them down in Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evokernels.compiler.ops import OPS

__all__ = [
    "ON_ARRAYS",
    "Call",
    "Constant",
    "Expr",
    "Line",
    "Symbol",
    "assignments",
    "clamp",
    "compiled",
    "cospi",
    "expm1",
    "minimum",
    "sign",
    "sqrt",
    "substitute",
    "symbols_of",
]


class Expr:
    """An immutable expression; Python's arithmetic operators build larger ones."""

    __slots__ = ()

    def __add__(self, other: Expr | float) -> Expr:
        return Call("add", (self, _expr(other)))

    def __radd__(self, other: float) -> Expr:
        return Call("add", (_expr(other), self))

    def __sub__(self, other: Expr | float) -> Expr:
        return Call("sub", (self, _expr(other)))

    def __rsub__(self, other: float) -> Expr:
        return Call("sub", (_expr(other), self))

    def __mul__(self, other: Expr | float) -> Expr:
        return Call("mul", (self, _expr(other)))

    def __rmul__(self, other: float) -> Expr:
        return Call("mul", (_expr(other), self))

    def __truediv__(self, other: Expr | float) -> Expr:
        return Call("div", (self, _expr(other)))

    def __rtruediv__(self, other: float) -> Expr:
        return Call("div", (_expr(other), self))

    def __neg__(self) -> Expr:
        return -1.0 * self

    def __abs__(self) -> Expr:
        return Call("abs", (self,))


@dataclass(frozen=True)
class Constant(Expr):
    """A number."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:.6g}"


@dataclass(frozen=True)
class Symbol(Expr):
    """A named input: one value an element (a tensor), or one a step (a scalar)."""

    name: str
    per_element: bool

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call(Expr):
    """An operation of `OPS` on its operands."""

    op: str
    args: tuple[Expr, ...]

    def __post_init__(self) -> None:
        if len(self.args) != OPS[self.op].arity:
            raise TypeError(f"{self.op} takes {OPS[self.op].arity} operands, got {len(self.args)}")

    @property
    def per_element(self) -> bool:
        """Whether the value differs between elements."""
        return any(getattr(arg, "per_element", False) for arg in self.args)

    def __str__(self) -> str:
        """Infix text with only the brackets that it needs."""
        binds = OPS[self.op].binds
        texts = [str(arg) for arg in self.args]
        if binds < 9:  # infix; the right operand of - and / needs brackets at equal strength too
            strengths = (binds, binds + (self.op in ("sub", "div")))
            for i, (arg, strength) in enumerate(zip(self.args, strengths, strict=True)):
                if isinstance(arg, Call) and OPS[arg.op].binds < strength:
                    texts[i] = f"({texts[i]})"
        return OPS[self.op].text.format(*texts)


def sqrt(x: Expr) -> Expr:
    """Square root."""
    return Call("sqrt", (x,))


def sign(x: Expr) -> Expr:
    """-1, 0 or 1; NaN for NaN."""
    return Call("sign", (x,))


def expm1(x: Expr) -> Expr:
    """e to the power of x, less 1."""
    return Call("expm1", (x,))


def cospi(x: Expr) -> Expr:
    """The cosine of pi times x."""
    return Call("cospi", (x,))


def minimum(a: Expr | float, b: Expr) -> Expr:
    """The smaller one; NaN where `b` is."""
    return Call("min", (_expr(a), b))


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    """`x` limited to [low, high]; NaN stays NaN."""
    return Call("min", (high, Call("max", (low, x))))


def substitute(expr: Expr, values: Mapping[Symbol, Expr]) -> Expr:
    """The expression with symbols replaced."""
    if isinstance(expr, Symbol):
        return values.get(expr, expr)
    if isinstance(expr, Call):
        return Call(expr.op, tuple(substitute(arg, values) for arg in expr.args))
    return expr


# What operations mean on NumPy arrays, and on Python's own floats: ten times faster there.
ON_ARRAYS = {name: op.meaning for name, op in OPS.items()}
_ON_FLOATS = {
    **ON_ARRAYS,
    "sqrt": math.sqrt,
    "expm1": math.expm1,
    "cospi": lambda x: math.cos(math.pi * x),
    "min": "{0} if {0} < {1} else {1}",
    "max": "{0} if {0} > {1} else {1}",
}


def compiled(
    *exprs: Expr,
    parameters: Sequence[Symbol] = (),
    meanings: Mapping[str, Callable | str] = _ON_FLOATS,
) -> Callable[..., list[Any]]:
    """One Python function for all expressions: values of symbols in, a list of values back.

    Written out as text and compiled: an optimizer calls it every step, and a tree of closures
    costs twice as much.

    Args:
        parameters: symbols whose values are given by position; those of all others by keyword.
        meanings: a function or text for each operation; by default for Python floats.
    """
    lines, results = assignments(exprs)
    others = set().union(*map(symbols_of, exprs)) - set(parameters)
    # others may come along: callers pass all they have
    by_keyword = ["*", *sorted(symbol.name for symbol in others)] if others else []
    names = [*(symbol.name for symbol in parameters), *by_keyword, "**_"]
    source = f"def function({', '.join(names)}):\n"
    source += "".join(f"    {line.target} = {_python(line, meanings)}\n" for line in lines)
    source += f"    return [{', '.join(results)}]\n"
    namespace: dict[str, Any] = dict(meanings)
    exec(source, namespace)
    return namespace["function"]


@dataclass(frozen=True)
class Line:
    """``target = op(args)``; operands are inputs, scalars, numbers or earlier targets."""

    target: str
    op: str
    args: tuple[str, ...]


def assignments(exprs: Sequence[Expr]) -> tuple[list[Line], list[str]]:
    """Expressions as single assignments, equal operations once.

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


def symbols_of(expr: Expr) -> set[Symbol]:
    """The symbols that an expression reads."""
    if isinstance(expr, Call):
        return set().union(*(symbols_of(arg) for arg in expr.args))
    return {expr} if isinstance(expr, Symbol) else set()


def _python(line: Line, meanings: Mapping[str, Callable | str]) -> str:
    meaning = meanings[line.op]
    if isinstance(meaning, str):
        return meaning.format(*line.args)
    if meaning.__module__ == operator.add.__module__:
        return OPS[line.op].text.format(*line.args)
    return f"{line.op}({', '.join(line.args)})"


def _expr(value: Expr | float) -> Expr:
    return value if isinstance(value, Expr) else Constant(float(value))
