"""Expressions over tensors and scalars, built by writing them down in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evokernels.compiler.ops import OPS

__all__ = ["Call", "Constant", "Expr", "Symbol", "clamp", "compiled", "sign", "sqrt", "substitute"]


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


def compiled(expr: Expr) -> Callable[[Mapping[str, Any]], Any]:
    """A function from the values of the symbols (by name) to the value of the expression."""
    if isinstance(expr, Constant):
        return lambda values, value=expr.value: value
    if isinstance(expr, Symbol):
        return lambda values, name=expr.name: values[name]
    meaning, args = OPS[expr.op].meaning, [compiled(arg) for arg in expr.args]
    if len(args) == 2:  # most operations; twice as fast as the general line below
        left, right = args
        return lambda values: meaning(left(values), right(values))
    return lambda values: meaning(*[arg(values) for arg in args])


def _expr(value: Expr | float) -> Expr:
    return value if isinstance(value, Expr) else Constant(float(value))
