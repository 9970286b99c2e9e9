"""Linear form: an expression as a sum of weighted atoms, the ground on which rules are compared.

An atom is a per-element value that no linear step takes further apart: ``g``, ``m``, ``sign(g)``,
``g / (sqrt(v) + eps)``. Its coefficient is a sum of products of per-step scalars, such as
``0.1 * lr / bias1``. Sums merge, scalars leave roots and quotients, a quotient is taken apart
along its numerator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from itertools import product

from evokernels.compiler.expr import Average, Call, Constant, Expr, Symbol, sqrt

__all__ = ["ONE", "Coefficient", "Linear", "coefficient_expr", "linear", "linear_expr"]

Monomial = tuple[Expr, ...]  # a product of scalar factors, sorted; () is 1
Coefficient = dict[Monomial, float]
Linear = dict[Expr, Coefficient]

ONE = Constant(1.0)  # the atom of whatever does not depend on the element

_MOST_PRODUCTS = 64  # of two sums: multiplied out further, nested ones would double in each step


@functools.lru_cache(maxsize=4096)  # what is nested is asked for at each level
def linear(expr: Expr) -> Linear:
    """The linear form, atoms in a fixed order; those whose weight cancels to zero are gone.

    It is kept: nobody may change it.
    """
    if isinstance(expr, Constant):
        return _nonzero({ONE: {(): expr.value}})
    if isinstance(expr, Symbol):
        return {expr: {(): 1.0}} if expr.per_element else {ONE: {(expr,): 1.0}}
    if isinstance(expr, Average):
        value = linear(expr.value)
        return {Average(linear_expr(value), expr.beta): {(): 1.0}} if value else {}
    forms = [linear(arg) for arg in expr.args]
    if expr.op == "add":
        return _sum(*forms)
    if expr.op == "sub":
        return _sum(forms[0], _scaled(forms[1], {(): -1.0}))
    if expr.op == "mul" and (factor := _scalar(forms[0])) is not None:
        return _scaled(forms[1], factor)
    if expr.op == "mul" and (factor := _scalar(forms[1])) is not None:
        return _scaled(forms[0], factor)
    if expr.op == "div" and (divisor := _scalar(forms[1])) is not None:
        return _scaled(forms[0], _reciprocal(divisor))
    if expr.op == "div":
        denominator = linear_expr(forms[1])
        return {Call("div", (atom, denominator)): weight for atom, weight in forms[0].items()}
    if expr.op == "sqrt" and len(forms[0]) == 1:
        return _root(*forms[0].items())
    return _whole(_rebuilt(expr, forms))


def linear_expr(form: Linear) -> Expr:
    """The one expression that stands for a linear form: atoms in a fixed order."""
    return _total(
        weight if atom == ONE else (atom if weight == ONE else weight * atom)
        for atom, weight in ((atom, coefficient_expr(form[atom])) for atom in form)
    )


def coefficient_expr(coefficient: Coefficient) -> Expr:
    """A coefficient as an expression over scalars."""
    summands = []
    for monomial, number in sorted(coefficient.items(), key=str):
        term: Expr = Constant(number)
        for factor in monomial:
            if isinstance(factor, Call) and factor.op == "div" and factor.args[0] == ONE:
                term = term / factor.args[1]
            else:
                term = factor if term == ONE else term * factor
        summands.append(term)
    return _total(summands)


def _total(summands: Iterable[Expr]) -> Expr:
    total = None
    for summand in summands:
        total = summand if total is None else total + summand
    return Constant(0.0) if total is None else total


def _order(atom: Expr) -> tuple:
    """Plain atoms before quotients, those by denominator; short before long; the constant last."""
    denominator = str(atom.args[1]) if isinstance(atom, Call) and atom.op == "div" else ""
    return atom == ONE, denominator, len(str(atom)), str(atom)


def _scalar(form: Linear) -> Coefficient | None:
    """The value of a form that does not depend on the element, else None."""
    if not form:
        return {}
    return form[ONE] if set(form) == {ONE} else None


def _sum(*forms: Linear) -> Linear:
    total: Linear = {}
    for form in forms:
        for atom, coefficient in form.items():
            weights = total.setdefault(atom, {})
            for monomial, number in coefficient.items():
                weights[monomial] = weights.get(monomial, 0.0) + number
    return _nonzero(total)


def _scaled(form: Linear, factor: Coefficient) -> Linear:
    if len(factor) > 1 and len(factor) * max(map(len, form.values()), default=0) > _MOST_PRODUCTS:
        factor = {(coefficient_expr(factor),): 1.0}
    return _sum(
        *(
            {atom: {tuple(sorted(a + b, key=str)): x * y}}
            for atom, coefficient in form.items()
            for (a, x), (b, y) in product(coefficient.items(), factor.items())
        )
    )


def _nonzero(form: Linear) -> Linear:
    kept = {
        atom: {monomial: number for monomial, number in form[atom].items() if number != 0.0}
        for atom in sorted(form, key=_order)
    }
    return {atom: coefficient for atom, coefficient in kept.items() if coefficient}


def _reciprocal(coefficient: Coefficient) -> Coefficient:
    if len(coefficient) != 1:
        return {(ONE / coefficient_expr(coefficient),): 1.0}
    ((monomial, number),) = coefficient.items()
    return {tuple(ONE / factor for factor in monomial): 1.0 / number}


def _root(item: tuple[Expr, Coefficient]) -> Linear:
    """sqrt of one weighted atom: the weight leaves the root, and sqrt(x * x) is |x|.

    |x|, not the root of the square: a square of a small x underflows.
    """
    atom, coefficient = item
    ((monomial, number), *others) = coefficient.items()
    if not others and number > 0 and all(map(_never_negative, monomial)):
        weight = {tuple(sqrt(factor) for factor in monomial): math.sqrt(number)}
    elif atom == ONE:
        return _whole(sqrt(coefficient_expr(coefficient)))
    else:
        atom, weight = linear_expr({atom: coefficient}), {(): 1.0}
    if atom == ONE:
        return {ONE: weight}
    if isinstance(atom, Call) and atom.op == "mul" and atom.args[0] == atom.args[1]:
        return {abs(atom.args[0]): weight}
    return {sqrt(atom): weight}


def _never_negative(scalar: Expr) -> bool:
    """Whether a factor may leave a root on its own: two negative ones are fine together alone."""
    if isinstance(scalar, Call):
        known = scalar.op == "div" and all(map(_never_negative, scalar.args))
        return known or scalar.op in ("sqrt", "abs", "exp")
    return isinstance(scalar, Symbol) or scalar.value >= 0


def _whole(call: Call) -> Linear:
    """What is not taken apart: an atom, or a number of the step if it reads no tensor."""
    return {call: {(): 1.0}} if call.per_element else {ONE: {(call,): 1.0}}


def _rebuilt(call: Call, forms: list[Linear]) -> Call:
    return Call(call.op, tuple(linear_expr(form) for form in forms))
