"""Expressions over tensors and scalars, built by writing them down in Python."""

from __future__ import annotations

import functools
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from evokernels.compiler.ops import OPS
from evokernels.compiler.unwritable import Unwritable
from evokernels.errors import TermError

__all__ = [
    "ON_ARRAYS",
    "Average",
    "Call",
    "Condition",
    "Constant",
    "Expr",
    "Line",
    "Symbol",
    "assignments",
    "averages_of",
    "clamp",
    "compiled",
    "cospi",
    "exp",
    "expm1",
    "expression",
    "log1p",
    "minimum",
    "shown",
    "sign",
    "sqrt",
    "substitute",
    "symbols_of",
    "tanh",
    "where",
]


_MOST_POWER = 64


class Expr(Unwritable):
    """An immutable expression; Python's arithmetic operators build larger ones."""

    __slots__ = ()

    def __add__(self, other: Expr | float) -> Expr:
        return Call("add", (self, expression(other)))

    def __radd__(self, other: float) -> Expr:
        return Call("add", (expression(other), self))

    def __sub__(self, other: Expr | float) -> Expr:
        return Call("sub", (self, expression(other)))

    def __rsub__(self, other: float) -> Expr:
        return Call("sub", (expression(other), self))

    def __mul__(self, other: Expr | float) -> Expr:
        return Call("mul", (self, expression(other)))

    def __rmul__(self, other: float) -> Expr:
        return Call("mul", (expression(other), self))

    def __truediv__(self, other: Expr | float) -> Expr:
        return Call("div", (self, expression(other)))

    def __rtruediv__(self, other: float) -> Expr:
        return Call("div", (expression(other), self))

    def __neg__(self) -> Expr:
        return -1.0 * self

    def __format__(self, spec: str) -> str:
        """As text, whose numbers have six digits, or with "full" all; with "python" as one writes
        it, with all digits, too."""
        if spec in ("full", "python"):
            return str(_in_full(self, python=spec == "python"))
        return format(str(self), spec)

    def reads(self, name: str) -> bool:
        """Whether a symbol of that name is anywhere in it."""
        return any(symbol.name == name for symbol in symbols_of(self))

    def __abs__(self) -> Expr:
        return Call("abs", (self,))

    def __pow__(self, exponent: int) -> Expr:
        whole = isinstance(exponent, numbers.Integral) and not isinstance(exponent, bool)
        if not whole or not 1 <= exponent <= _MOST_POWER:
            raise TermError(
                f"powers are whole numbers from 1 to {_MOST_POWER}, got {shown(exponent)}; there "
                "are sqrt, and / for negative ones"
            )
        return functools.reduce(operator.mul, [self] * int(exponent))

    def __gt__(self, other: Expr | float) -> Condition:
        return Condition(self, expression(other))

    def __lt__(self, other: Expr | float) -> Condition:
        return Condition(expression(other), self)


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
        if self.op == "add" and (taken := _negated(self.args[1])) is not None:
            return str(self.args[0] - taken)
        binds = OPS[self.op].binds
        texts = [str(arg) for arg in self.args]
        if binds < 9:  # infix; the right operand of - and / needs brackets at equal strength too
            strengths = (binds, binds + (self.op in ("sub", "div")))
            for i, (arg, strength) in enumerate(zip(self.args, strengths, strict=True)):
                if isinstance(arg, Call) and OPS[arg.op].binds < strength:
                    texts[i] = f"({texts[i]})"
        return OPS[self.op].text.format(*texts)


@dataclass(frozen=True)
class Average(Expr):
    """A moment of its own: the exponential moving average of a value over the steps.

    Args:
        value: of each element in each step.
        beta: the weight of what was averaged before.
    """

    value: Expr
    beta: Expr

    per_element: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"average({self.value}, {self.beta})"


@dataclass(frozen=True)
class Condition(Unwritable):
    """Whether one value is above another, for `where`."""

    above: Expr
    below: Expr

    def __str__(self) -> str:
        return f"{self.above} > {self.below}"

    def _is_no_number(self, *_: Any) -> NoReturn:
        raise TermError(f"{self} is a comparison, not a number; where({self}, 1, 0) makes one")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _is_no_number
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __abs__ = __gt__ = __lt__ = _is_no_number


def sqrt(x: Expr) -> Expr:
    """Square root."""
    return Call("sqrt", (expression(x),))


def exp(x: Expr) -> Expr:
    """e to the power of x."""
    return Call("exp", (expression(x),))


def log1p(x: Expr) -> Expr:
    """The natural logarithm of 1 + x."""
    return Call("log1p", (expression(x),))


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent."""
    return Call("tanh", (expression(x),))


def where(condition: Condition, then: Expr | float, otherwise: Expr | float) -> Expr:
    """One value where the condition holds, another one elsewhere; NaN where it compares a NaN."""
    if not isinstance(condition, Condition):
        raise TermError(
            f"where takes a comparison with > or <, such as g > 0, got {shown(condition)}"
        )
    chosen = expression(then), expression(otherwise)
    return Call("where", (condition.above, condition.below, *chosen))


def sign(x: Expr) -> Expr:
    """-1, 0 or 1; NaN for NaN."""
    return Call("sign", (expression(x),))


def expm1(x: Expr) -> Expr:
    """e to the power of x, less 1."""
    return Call("expm1", (expression(x),))


def cospi(x: Expr) -> Expr:
    """The cosine of pi times x."""
    return Call("cospi", (expression(x),))


def minimum(a: Expr | float, b: Expr) -> Expr:
    """The smaller one; NaN where `b` is."""
    return Call("min", (expression(a), b))


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    """`x` limited to [low, high]; NaN stays NaN."""
    return Call("min", (high, Call("max", (low, x))))


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """The expression with symbols, and averages as a whole, replaced."""
    if isinstance(expr, Call):
        return Call(expr.op, tuple(substitute(arg, values) for arg in expr.args))
    if isinstance(expr, Average) and expr not in values:
        return Average(substitute(expr.value, values), substitute(expr.beta, values))
    return values.get(expr, expr)


def _on_a_float(meaning: Callable) -> Callable[..., float]:
    """An operation without NumPy's warnings."""

    def quietly(*args: float) -> float:
        with np.errstate(all="ignore"):
            return float(meaning(*args))

    return quietly


# What operations mean on NumPy arrays, and on Python's own floats, where those of a schedule are
# ten times faster.
ON_ARRAYS = {name: op.meaning for name, op in OPS.items()}
_ON_FLOATS = {
    **ON_ARRAYS,
    **{name: _on_a_float(OPS[name].meaning) for name in ("sign", "exp", "log1p", "tanh", "where")},
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "expm1": math.expm1,
    "cospi": lambda x: math.cos(math.pi * x),
    "min": "{0} if {0} < {1} else {1}",
    "max": "{0} if {0} > {1} else {1}",
}
# Python raises an error there, which costs nothing until it happens.
_DIVIDED_BY_ZERO = _on_a_float(np.divide)


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
    # numbers that are not finite come out of finite ones that are multiplied while compiling
    not_finite = {"inf": math.inf, "nan": math.nan}
    namespace: dict[str, Any] = {**meanings, **not_finite, "divide": _DIVIDED_BY_ZERO}

    def body(meanings: Mapping[str, Callable | str]) -> str:
        text = "".join(f"        {line.target} = {_python(line, meanings)}\n" for line in lines)
        return f"{text}        return [{', '.join(results)}]\n"

    exec(
        f"def function({', '.join(names)}):\n"
        f"    try:\n{body(meanings)}"
        f"    except ZeroDivisionError:\n{body({**meanings, 'div': 'divide({0}, {1})'})}",
        namespace,
    )
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
        symbols and numbers, which may be "inf", "-inf" and "nan"; and the operand that stands for
        each expression.
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
        return set().union(*map(symbols_of, expr.args))
    if isinstance(expr, Average):
        return symbols_of(expr.value) | symbols_of(expr.beta)
    return {expr} if isinstance(expr, Symbol) else set()


def averages_of(expr: Expr) -> dict[Average, None]:
    """The averages that an expression reads, in the order in which it does."""
    if isinstance(expr, Call):
        return {average: None for arg in expr.args for average in averages_of(arg)}
    return {expr: None} if isinstance(expr, Average) else {}


def _python(line: Line, meanings: Mapping[str, Callable | str]) -> str:
    meaning = meanings[line.op]
    if isinstance(meaning, str):
        return meaning.format(*line.args)
    if meaning.__module__ == operator.add.__module__:
        return OPS[line.op].text.format(*line.args)
    return f"{line.op}({', '.join(line.args)})"


def _negated(expr: Expr) -> Expr | None:
    """What is multiplied with -1, None if nothing is."""
    minus = isinstance(expr, Call) and expr.op == "mul" and expr.args[0] == Constant(-1.0)
    return expr.args[1] if minus else None


def _in_full(expr: Expr, python: bool) -> Expr:
    """An expression whose text has all digits of its numbers, and may have to be Python."""
    if isinstance(expr, Call):
        args = tuple(_in_full(arg, python) for arg in expr.args)
        if python and expr.op == "abs":  # |x| elsewhere
            return Symbol(f"abs({args[0]})", per_element=True)
        return Call(expr.op, args)
    if isinstance(expr, Average):
        return Average(_in_full(expr.value, python), _in_full(expr.beta, python))
    if isinstance(expr, Constant) and float(str(expr)) != expr.value:
        return Symbol(repr(expr.value), per_element=False)
    return expr


def expression(value: Expr | float) -> Expr:
    """A formula or a number as a formula; raises TermError for anything else."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, Condition):
        value._is_no_number()
    if isinstance(value, bool):  # g == m, not g
        raise TermError(
            f"a formula is made of what evokernels.terms has, got {value}; Python's ==, != and not "
            "decide before there are elements, where() with > or < decides for each of them"
        )
    if not isinstance(value, numbers.Real):
        raise TermError(
            f"a formula is made of what evokernels.terms has and of numbers, got {shown(value)}"
        )
    try:
        return Constant(float(value))
    except OverflowError:
        raise TermError(f"{shown(value)} is beyond all floating-point numbers") from None


def shown(value: object) -> str:
    """What a user gave, as text that is not too long."""
    return str(value) if isinstance(value, Unwritable) else reprlib.repr(value)
