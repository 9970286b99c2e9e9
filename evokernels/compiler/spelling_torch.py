"""How statements are written in torch: for one tensor, and for lists of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from evokernels.compiler import terms
from evokernels.compiler.expr import Call, Constant, Expr, symbols_of
from evokernels.compiler.statements import NEVER_ZERO, Operand, Statement

__all__ = ["WIDTH", "list_lines", "number_text", "tensor_lines"]

WIDTH = 100  # of a line
LONG = 40  # a number that takes more has a line of its own

_UNARY = ("sqrt", "abs", "exp", "log1p", "tanh")
_BINARY = ("add", "sub", "mul", "div", "copy")
_CLAMPS = ("clamp_min", "clamp_max")

# One tensor: a new one, and the first operand changed.
_NEW = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{1} * {0}",
    "div": "{0} / {1}",
    "over": "{1} / {0}",
    "axpy": "torch.add({0}, {1}, alpha={2})",
    "addcmul": "torch.addcmul({0}, {1}, {2}, value={3})",
    "clone": "{0}.clone()",
    "sign": "_sign({0})",
    "where": "_where({0}, {1}, {2}, {3})",
    **{name: f"{{0}}.{name}()" for name in _UNARY},
    **{name: f"{{0}}.{name}({{1}})" for name in _CLAMPS},
}
_IN_PLACE = {
    "axpy": "{0}.add_({1}, alpha={2})",
    "addcmul": "{0}.addcmul_({1}, {2}, value={3})",
    **{name: f"{{0}}.{name}_({{1}})" for name in (*_BINARY, *_CLAMPS)},
    **{name: f"{{0}}.{name}_()" for name in _UNARY},
}

# Lists of tensors. In place, a function's name ends in an underscore.
_LISTS = {
    "axpy": "torch._foreach_add{_}({0}, {1}, alpha={2})",
    "addcmul": "torch._foreach_addcmul{_}({0}, {1}, {2}, value={3})",
    "sign": "_foreach_sign({0})",
    **{name: f"torch._foreach_{name}{{_}}({{0}}, {{1}})" for name in (*_BINARY, *_CLAMPS)},
    **{name: f"torch._foreach_{name}{{_}}({{0}})" for name in _UNARY},
}


def tensor_lines(statements: Sequence[Statement]) -> list[str]:
    """Statements whose operands are tensors, as lines of Python."""
    lines: list[str] = []
    last: Statement | None = None
    for statement, text in _lines(statements, _of_tensor):
        if last and _continues(last, statement, lines[-1], text):
            lines[-1] += text.removeprefix(statement.target)
        else:
            lines.append(text)
        last = statement
    return lines


def list_lines(statements: Sequence[Statement]) -> list[str]:
    """The same where operands are lists of tensors."""
    return [text for _, text in _lines(statements, _of_lists)]


def number_text(expr: Expr) -> str:
    """An expression over the numbers of a step in Python."""
    return _number(expr)[0]


def _lines(
    statements: Sequence[Statement], spell: Callable[[Statement], str]
) -> Iterable[tuple[Statement, str]]:
    """Each statement and its text, with lines for long numbers before, and guards."""
    long: dict[Expr, str] = {}
    for statement in _nested(statements, spell):
        for expr in (arg for arg in statement.args if isinstance(arg, Expr)):
            text = number_text(expr)
            if len(text) > LONG and expr not in long:
                long[expr] = f"weight_{len(long)}"
                yield dataclasses.replace(statement, op="number"), f"{long[expr]} = {_broken(expr)}"
        args = tuple(long.get(arg, arg) if isinstance(arg, Expr) else arg for arg in statement.args)
        text = spell(dataclasses.replace(statement, args=args))
        text = text if statement.in_place else f"{statement.target} = {text}"
        if statement.guard is not None:
            guard = long.get(statement.guard) or number_text(statement.guard)
            text = f"if {guard}:\n    {text}"
        yield statement, text


def _nested(
    statements: Sequence[Statement], spell: Callable[[Statement], str]
) -> Iterable[Statement]:
    """Statements with the functions of one tensor inside of the only statement that reads them."""
    inner: dict[Operand, str] = {}
    for i, statement in enumerate(statements):
        args = (statement.args[0], *(inner.get(arg, arg) for arg in statement.args[1:]))
        statement = dataclasses.replace(statement, args=args)
        inner = {}
        reader = statements[i + 1] if i + 1 < len(statements) else None
        if (
            reader
            and statement.op in ("sign", *_UNARY)
            and not statement.in_place
            and reader.in_place
            and reader.guard is None
            and statement.target in reader.args[1:]
            and not any(statement.target in other.args for other in statements[i + 2 :])
        ):
            inner = {statement.target: spell(statement)}
        else:
            yield statement


def _continues(last: Statement, statement: Statement, line: str, text: str) -> bool:
    """Whether a statement may follow the one before in the same line."""
    return (
        statement.in_place
        and statement.target == last.target
        and statement.guard is None
        and last.op not in ("number", "where")
        and (last.in_place or last.op in (*_UNARY, *_CLAMPS))
        and last.guard is None
        and statement.target not in ("p", "update")
        and statement.target not in statement.args[1:]
        and len(line) + len(text) < WIDTH - 4
    )


def _of_tensor(statement: Statement) -> str:
    if statement.in_place:
        return _IN_PLACE[statement.op].format(*map(_operand, statement.args))
    args = list(statement.args)
    if statement.op == "where":
        args = _typed(args)
    if statement.op == "mul" and not isinstance(args[1], Expr):
        return f"{args[0]} * {args[1]}"
    if statement.op in ("mul", "over"):
        return _NEW[statement.op].format(args[0], _operand(args[1], binds=2))
    if statement.op == "div":
        return _NEW["div"].format(args[0], _operand(args[1], binds=3))
    return _NEW[statement.op].format(*map(_operand, args))


def _of_lists(statement: Statement) -> str:
    if statement.op in _LISTS:
        args = map(_operand, statement.args)
        return _LISTS[statement.op].format(*args, _="_" if statement.in_place else "")
    # torch has none for lists
    tensors = list(dict.fromkeys(arg for arg in statement.args if isinstance(arg, str)))
    names = dict(zip(tensors, "abxy", strict=False))
    each = dataclasses.replace(statement, args=tuple(names.get(a, a) for a in statement.args))
    loop = ", ".join(names.values())
    lists = tensors[0] if len(tensors) == 1 else f"zip({', '.join(tensors)}, strict=True)"
    return f"[{_of_tensor(each)} for {loop} in {lists}]"


def _typed(args: list[Operand]) -> list[Operand]:
    """Operands of "where", of which one that is chosen must have the dtype of the tensors."""
    above, below, then, otherwise = args
    if isinstance(then, str) or isinstance(otherwise, str):
        return args
    like = above if isinstance(above, str) else below
    return [above, below, f"torch.full_like({like}, {number_text(then)})", otherwise]


def _operand(operand: Operand, binds: int = 0) -> str:
    if isinstance(operand, str):
        return operand
    text, strength = _number(operand)
    return text if strength >= binds else f"({text})"


# What Python's numbers have no operator for, and where they would raise an error instead of
# becoming infinite or no number.
_FUNCTIONS = {
    **{name: f"math.{name}({{0}})" for name in ("expm1", "tanh")},
    **{name: f"_of(torch.{name}, {{0}})" for name in ("sqrt", "exp", "log1p")},
    "div": "_ratio({0}, {1})",
    "abs": "abs({0})",
    "sign": "(({0} > 0) - ({0} < 0))",
    "where": "({2} if {0} > {1} else {3})",
}
_STRENGTHS = {"add": 1, "sub": 1, "mul": 2, "div": 2}


def _number(expr: Expr) -> tuple[str, int]:
    """The text of a number, and how strongly it binds: 1 a sum, 2 a product, 3 all else."""
    if isinstance(expr, Constant):
        whole = expr.value.is_integer() and abs(expr.value) < 1e6
        return repr(int(expr.value) if whole else expr.value), 3 if expr.value >= 0 else 2
    if not isinstance(expr, Call):
        return ("clip_value" if expr == terms.clip else str(expr)), 3
    last = expr.args[-1]
    positive = last.value > 0 if isinstance(last, Constant) else symbols_of(last) <= NEVER_ZERO
    if expr.op == "sqrt" and positive:
        return f"math.sqrt({number_text(last)})", 3
    if expr.op not in _STRENGTHS or (expr.op == "div" and not positive):
        return _FUNCTIONS[expr.op].format(*map(number_text, expr.args)), 3
    binds = _STRENGTHS[expr.op]
    first, second = expr.args
    if expr.op == "mul" and first == Constant(-1.0):
        return f"-{_operand(second, 2)}", 2
    right = _operand(second, binds + (expr.op in ("sub", "div")))
    if expr.op == "add" and right.startswith("-"):
        return f"{_operand(first, binds)} - {right[1:]}", binds
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[expr.op]
    return f"{_operand(first, binds)} {sign} {right}", binds


def _broken(expr: Expr) -> str:
    """The text of a number, in several lines if it must be: a summand or a choice in each."""
    text = number_text(expr)
    if len(text) < WIDTH - 20:
        return text
    if isinstance(expr, Call) and expr.op == "where":
        above, below, then, otherwise = map(number_text, expr.args)
        return "\n    ".join(["(", then, f"if {above} > {below}", f"else {otherwise}"]) + "\n)"
    summands = [expr]
    while isinstance(summands[0], Call) and summands[0].op == "add":
        summands[:1] = summands[0].args
    first, *others = map(number_text, summands)
    signed = (f"- {text[1:]}" if text.startswith("-") else f"+ {text}" for text in others)
    return "\n    ".join(["(", first, *signed]) + "\n)"
