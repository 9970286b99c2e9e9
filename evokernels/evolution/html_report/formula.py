"""A rule as MathML, which browsers typeset by themselves: fractions, roots, aligned sums.

What is typeset is the text of `evokernels.compiler.describe.formula`, so nothing is said twice:

    sum      = product (("+" | "-") product)*
    product  = power (("*" | "/") power)*
    power    = ["-"] atom ["^" atom]
    atom     = number | name ["^"] | name "(" compared ("," compared)* ")"
             | "(" sum ")" | "|" sum "|"
    compared = sum [(">" | "<" | ">=" | "<=") sum]

A name with "^" and nothing to raise it to is a bias-corrected moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

__all__ = ["mathml"]

TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|[A-Za-z_]\w*|<=|>=|[-+*/^(),<>|])")
NUMBER = re.compile(r"\d")
NAME = re.compile(r"[A-Za-z_]")
SCIENTIFIC = re.compile(r"(.*)e([+-]?)0*(\d+)")
SUBSCRIPTED = re.compile(r"(a)(\d+)")
ENDS = {"|", "+", "-", "*", "/", ")", ",", "<", ">", "<=", ">=", None}


class NotTypeset(ValueError):
    """Text beyond the grammar of this module."""


def mathml(formula: str) -> str:
    """One ``<math>`` with a row for each line, or for each summand of the last one's sum.

    Args:
        formula: text of `evokernels.compiler.describe.formula`. A line that is no formula, or not
            one of the grammar above, stands there as text.
    """
    rows = [row for line in formula.splitlines() for row in _rows(line)]
    table = f'<mtable class="rule" displaystyle="true">{"".join(rows)}</mtable>'
    return f'<math display="block">{table}</math>'


def _rows(line: str) -> Iterable[str]:
    for sign in (" ← ", " = "):
        left, found, right = line.partition(sign)
        if found:
            break
    else:
        return [_text_row(line)]
    value, comma, remark = right.partition(", ") if left == "lr" else (right, "", "")
    try:
        target = _Parser(left).whole()
        opening = "p - lr * ("
        if left == "p" and value.startswith(opening) and value.endswith(")"):
            return _update_rows(target, value[len(opening) : -1])
        parsed = _Parser(value).whole()
    except NotTypeset:
        return [_text_row(line)]
    remarks = remark.split(", ") if comma else []
    return [
        _row(target, found.strip(), parsed),
        *map(_text_row, remarks),
    ]


def _update_rows(target: str, update: str) -> list[str]:
    """The step: a row for each summand, so that a long rule stays narrow."""
    first, *others = _Parser(update).summands()
    lr = "<mi>p</mi><mo>−</mo><mi>lr</mi><mo>·</mo>"
    if not others and first[0] == "+":
        return [_row(target, "←", lr + _bracketed(first[1]))]
    sign = "" if first[0] == "+" else "<mo>−</mo>"
    rows = [_row(target, "←", f'{lr}<mo stretchy="false">(</mo>{sign}{first[1]}')]
    closing = '<mo stretchy="false">)</mo>'
    for place, (sign, summand) in enumerate(others, start=1):
        sign = "−" if sign == "-" else "+"
        end = closing if place == len(others) else ""
        rows.append(
            _row("", "", f'<mspace width="2em"/><mo form="infix">{sign}</mo>{summand}{end}')
        )
    if not others:
        rows[0] = _row(target, "←", f'{lr}<mo stretchy="false">(</mo>{sign}{first[1]}{closing}')
    return rows


def _row(left: str, sign: str, right: str) -> str:
    middle = f"<mo>{sign}</mo>" if sign else ""
    return f"<mtr><mtd>{left}</mtd><mtd>{middle}</mtd><mtd>{right}</mtd></mtr>"


def _text_row(line: str) -> str:
    """Over all columns, as it does not wrap."""
    return f'<mtr><mtd columnspan="3"><mtext>{escape(line)}</mtext></mtd></mtr>'


def _bracketed(inner: str) -> str:
    return f"<mrow><mo>(</mo>{inner}<mo>)</mo></mrow>"


def _absolute(inner: str) -> str:
    return f"<mrow><mo>|</mo>{inner}<mo>|</mo></mrow>"


class _Parser:
    """Recursive descent over the tokens of a text; raises NotTypeset."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                raise NotTypeset(text)
            self.tokens.append(match[1])
            at = match.end()
        self.place = 0

    def whole(self) -> str:
        """All of it as one sum."""
        return self._joined(self.summands())

    def summands(self) -> list[tuple[str, str]]:
        """All of it as signs and what they are of."""
        found = self._sum()
        if self._next is not None:
            raise NotTypeset(self._next)
        return found

    @property
    def _next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _take(self, *expected: str) -> str:
        token = self._next
        if token is None or (expected and token not in expected):
            raise NotTypeset(token)
        self.place += 1
        return token

    def _sum(self) -> list[tuple[str, str]]:
        sign = self._take() if self._next == "-" else "+"
        found = [(sign, self._product())]
        while self._next in ("+", "-"):
            sign = self._take()
            found.append((sign, self._product()))
        return found

    @staticmethod
    def _joined(summands: list[tuple[str, str]]) -> str:
        (first, value), *others = summands
        text = value if first == "+" else f"<mo>−</mo>{value}"
        return text + "".join(
            f"<mo>{'−' if sign == '-' else '+'}</mo>{value}" for sign, value in others
        )

    def _product(self) -> str:
        first, bare = self._power()
        factors: list[list] = [[first, 1]]  # each with how often it follows itself
        while self._next in ("*", "/"):
            divides = self._take() == "/"
            other, inside = self._power()
            if divides:
                above = bare or _factors(factors)
                ratio = f"<mfrac><mrow>{above}</mrow><mrow>{inside or other}</mrow></mfrac>"
                factors = [[ratio, 1]]
            elif factors[-1][0] == other:
                factors[-1][1] += 1
            else:
                factors.append([other, 1])
            bare = ""
        return _factors(factors)

    def _power(self) -> tuple[str, str]:
        """What it is, and if it is in brackets what is inside them: a fraction needs none."""
        if self._next == "-":
            self._take()
            value, _ = self._power()
            return f"<mrow><mo>−</mo>{value}</mrow>", ""
        value, inside = self._atom()
        if self._next == "^":
            self._take()
            if self._next in ENDS:
                return f'<mover accent="true">{value}<mo>^</mo></mover>', ""
            exponent, _ = self._atom()
            return f"<msup>{value}{exponent}</msup>", ""
        return value, inside

    def _atom(self) -> tuple[str, str]:
        token = self._take()
        if token == "(":
            inside = self._joined(self._sum())
            self._take(")")
            return _bracketed(inside), inside
        if token == "|":
            inside = self._joined(self._sum())
            self._take("|")
            return _absolute(inside), ""
        if NUMBER.match(token):
            return _number(token), ""
        if not NAME.match(token):
            raise NotTypeset(token)
        if self._next == "(":
            return self._call(token), ""
        return _name(token), ""

    def _call(self, name: str) -> str:
        self._take("(")
        values = [self._compared()]
        while self._next == ",":
            self._take()
            values.append(self._compared())
        self._take(")")
        if name == "sqrt" and len(values) == 1:
            return f"<msqrt>{values[0]}</msqrt>"
        if name == "abs" and len(values) == 1:
            return _absolute(values[0])
        inner = "<mo>,</mo>".join(f"<mrow>{value}</mrow>" for value in values)
        return f"<mrow><mi mathvariant='normal'>{escape(name)}</mi>{_bracketed(inner)}</mrow>"

    def _compared(self) -> str:
        value = self._joined(self._sum())
        if self._next in ("<", ">", "<=", ">="):
            sign = {"<": "&lt;", ">": "&gt;", "<=": "≤", ">=": "≥"}[self._take()]
            value = f"{value}<mo>{sign}</mo>{self._joined(self._sum())}"
        return value


def _factors(factors: Iterable[tuple[str, int]]) -> str:
    powers = (
        factor if power == 1 else f"<msup>{factor}<mn>{power}</mn></msup>"
        for factor, power in factors
    )
    return '<mspace width="0.17em"/>'.join(powers)


def _number(text: str) -> str:
    match = SCIENTIFIC.fullmatch(text)
    if match is None:
        return f"<mn>{text}</mn>"
    sign = "−" if match[2] == "-" else ""
    power = f"<msup><mn>10</mn><mn>{sign}{match[3]}</mn></msup>"
    if match[1] == "1":
        return power
    return f"<mrow><mn>{match[1]}</mn><mo>·</mo>{power}</mrow>"


def _name(text: str) -> str:
    match = SUBSCRIPTED.fullmatch(text)
    if match:
        return f"<msub><mi>{match[1]}</mi><mn>{match[2]}</mn></msub>"
    return f"<mi>{escape(text)}</mi>"
