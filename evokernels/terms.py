"""Terms of your own: one line adds a primitive to the catalogue.

    from evokernels.terms import register, m, sign

    register("SIGN_MOMENTUM", sign(m))

From then on genomes may have the term, by its name; a search that is asked to draws it
(`bench/evolve.py --terms`); every backend compiles it, and the interpreter in float64 defines it.

Per element, a formula may read:

- ``g``: the gradient, as clipping leaves it; ``p``: the parameter before the step;
- ``m`` and ``v``: the moments, corrected if the genome corrects their bias; ``m_hat`` and
  ``v_hat``: corrected whatever it says; ``m_before``: the first moment before this step. Where a
  genome keeps no first moment, all three are ``g``; where it keeps no second one, ``v`` and
  ``v_hat`` are ``g * g``;
- ``average(x, beta)``: a moment of its own, with a beta of its own: a number, ``beta1``, ``beta2``
  or ``beta3``, which genomes have for such terms alone and a search moves. In ``x``, ``m`` and
  ``v`` are the moments themselves, not corrected.

Also ``eps``, the betas, numbers, and ``progress``: the step as a part of the training's
``total_steps``, 1 at the end. Operations are ``+ - * /``, whole powers, ``abs``, ``>`` and ``<`` in
`where`, and the functions below.
"""

from __future__ import annotations

import contextlib
import errno
import math
import numbers
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from evokernels.compiler.expr import (
    ON_ARRAYS,
    Average,
    Constant,
    Expr,
    Symbol,
    averages_of,
    compiled,
    exp,
    expression,
    log1p,
    shown,
    sign,
    sqrt,
    substitute,
    symbols_of,
    tanh,
    where,
)
from evokernels.compiler.linear import linear, linear_expr
from evokernels.compiler.program import AVERAGES
from evokernels.compiler.terms import (
    CATALOGUE,
    beta1,
    beta2,
    beta3,
    eps,
    formula_of,
    g,
    m,
    m_before,
    m_hat,
    p,
    progress,
    v,
    v_hat,
)
from evokernels.errors import TermError, TermWarning
from evokernels.genome import OwnTerm, Term, add_own_term, own_terms

__all__ = [
    "average",
    "beta1",
    "beta2",
    "beta3",
    "clip",
    "definitions",
    "eps",
    "exp",
    "g",
    "load",
    "log1p",
    "m",
    "m_before",
    "m_hat",
    "maximum",
    "minimum",
    "p",
    "progress",
    "register",
    "registered",
    "registration",
    "sign",
    "sqrt",
    "tanh",
    "v",
    "v_hat",
    "where",
]

LEAVES = frozenset((g, m, v, p, m_hat, v_hat, m_before, eps, beta1, beta2, beta3, progress))

_LARGEST = 1e100  # number of a formula, multiplied out
# A chain of functions this deep compiles for several seconds, a sum this long for three.
_MOST_OPERANDS, _DEEPEST = 1000, 64

_registered: dict[str, Term | OwnTerm] = {}


def register(name: str, formula: Expr | float) -> Term | OwnTerm:
    """Add a term to the catalogue, under a name that is used for nothing else.

    Again with the same formula, or with a built-in term's, changes nothing but that a search draws
    the term.

    Args:
        name: a word of letters, digits and underscores; files hold the term by it.
        formula: what the term adds to the update, times its weight; an expression of what this
            module has.

    Returns:
        The term, as a genome's ``term_types`` may hold it.

    Raises:
        TermError: another term has the name, or the formula reads something else, keeps too many
            averages, or is none.

    Warns:
        TermWarning: finite numbers, which the message has, make something that is not finite.
    """
    formula = _checked(name, formula)
    term: Term | OwnTerm
    if name in Term.__members__ and CATALOGUE[Term[name]] == formula:
        term = Term[name]
    else:
        _check_averages(name, formula)
        term = add_own_term(name, formula)
    if example := not_finite(formula):
        warnings.warn(f"{name}: {formula} {example}", TermWarning, stacklevel=2)
    _registered[name] = term
    return term


def registered() -> Mapping[str, Term | OwnTerm]:
    """The terms that this process has registered, by name, in order."""
    return dict(_registered)


def definitions() -> tuple[str, ...]:
    """The same in words: name, " = ", formula with all digits."""
    return tuple(f"{name} = {formula_of(term):full}" for name, term in _registered.items())


def registration(terms: Iterable[Term | OwnTerm]) -> str:
    """Lines of Python that register those of these terms that are a user's own."""
    formulas = {term.name: f"{term.formula:python}" for term in terms if isinstance(term, OwnTerm)}
    if not formulas:
        return ""
    words = {word for text in formulas.values() for word in re.findall(r"[a-z]\w*", text)}
    names = ", ".join(sorted({"register", *words.intersection(__all__)}))
    calls = "".join(f"register({name!r}, {text})\n" for name, text in formulas.items())
    return f"from evokernels.terms import {names}\n{calls}"


def load(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers terms, as if it were run in its own folder.

    It finds modules beside it and no arguments; what it prints goes to stderr, and the working
    directory stays as it is.

    Raises:
        TermError: it cannot be run, or registers none; with the line at which it ended.
    """
    path = os.fspath(path)
    before = dict(_registered)
    _registered.clear()
    try:
        with _as_a_script(path):
            runpy.run_path(path, run_name="evokernels_terms")
    except (Exception, SystemExit) as error:  # whatever a user's file does
        reason = str(error) if isinstance(error, TermError) else f"{type(error).__name__}: {error}"
        place = _place(path, error)
        raise TermError(f"cannot read terms from {place}: {' '.join(reason.split())}") from error
    finally:
        found = dict(_registered)
        _registered.clear()
        _registered.update({**before, **found})
    if not found:
        raise TermError(
            f"{path!r} registers no term; a line such as register('SIGN_MOMENTUM', sign(m)) does"
        )


@contextlib.contextmanager
def _as_a_script(path: str) -> Iterator[None]:
    """What a file finds when it is run by itself; all as before when it has run."""
    if os.path.isdir(path):  # Python would run a __main__.py in it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    arguments, places, folder = sys.argv, sys.path, os.getcwd()
    sys.argv, sys.path = [path], [os.path.dirname(os.path.abspath(path)), *places]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv, sys.path = arguments, places
        os.chdir(folder)


def _place(path: str, error: BaseException) -> str:
    """The file, and which of its lines was the last one that ran."""
    steps = traceback.extract_tb(error.__traceback__)
    lines = [step.lineno for step in steps if step.filename == path]
    return f"{path!r}, line {lines[-1]}" if lines else repr(path)


def average(x: Expr, beta: Expr | float) -> Average:
    """A moment of its own: ``x`` averaged over the steps, ``beta * before + (1 - beta) * x``.

    Args:
        x: read anew in each step; holds no other average.
        beta: a number between 0 and 1, ``beta1``, ``beta2`` or ``beta3``.

    Raises:
        TermError: it is of another kind.
    """
    x = expression(x)
    _check_size("what is averaged", x)
    if averages_of(x):
        raise TermError(f"{x} holds an average already, and averages of averages are not kept")
    if isinstance(beta, Expr) and beta in (beta1, beta2, beta3):
        return Average(x, beta)
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not 0 < beta < 1:
        raise TermError(
            f"beta must be beta1, beta2, beta3 or a number between 0 and 1, got {shown(beta)}"
        )
    return Average(x, Constant(float(beta)))


def minimum(a: Expr | float, b: Expr | float) -> Expr:
    """The smaller one; NaN where either is."""
    a, b = expression(a), expression(b)
    return where(a < b, a, b)


def maximum(a: Expr | float, b: Expr | float) -> Expr:
    """The larger one; NaN where either is."""
    a, b = expression(a), expression(b)
    return where(a > b, a, b)


def clip(x: Expr, low: Expr | float, high: Expr | float) -> Expr:
    """``x``, limited to [low, high]; NaN stays NaN."""
    low, high = expression(low), expression(high)
    if isinstance(low, Constant) and isinstance(high, Constant) and low.value > high.value:
        raise TermError(f"clip takes the lower limit before the upper one, got {low} and {high}")
    return minimum(maximum(x, low), high)


def _checked(name: str, formula: Expr | float) -> Expr:
    """The formula as an expression that reads nothing but leaves."""
    formula = expression(formula)
    _check_size(name, formula)
    if strange := {str(symbol) for symbol in symbols_of(formula) - LEAVES}:
        allowed = ", ".join(sorted(map(str, LEAVES)))
        raise TermError(f"{name} reads {', '.join(sorted(strange))}; a term may read {allowed}")
    if not all(map(math.isfinite, _numbers_of(formula))):
        raise TermError(f"{name} has a number that is not finite: {formula}")
    # alphas, and numbers of other terms, are multiplied with these
    if not all(abs(x) <= _LARGEST for x in _numbers_of(linear_expr(linear(formula)))):
        raise TermError(f"{name} has numbers that come to more than {_LARGEST:g}: {formula}")
    return formula


def _check_size(name: str, formula: Expr) -> None:
    """TermError before anything is done for each operation, or calls itself for each level."""
    operands = depth = 0
    level = [formula]
    while level := [part for each in level for part in _parts_of(each)]:
        depth += 1
        operands += len(level)
        if operands > _MOST_OPERANDS or depth > _DEEPEST:
            raise TermError(
                f"{name} is too long: a formula has at most {_MOST_OPERANDS} operands, those of "
                f"a value that is used twice counted twice, and nests at most {_DEEPEST} "
                "operations; a genome adds up several terms, so a long sum may be more than one"
            )


def _parts_of(expr: Expr) -> tuple[Expr, ...]:
    return (expr.value, expr.beta) if isinstance(expr, Average) else getattr(expr, "args", ())


def _numbers_of(formula: Expr) -> list[float]:
    if isinstance(formula, Constant):
        return [formula.value]
    if isinstance(formula, Average):
        return _numbers_of(formula.value)
    return [number for arg in getattr(formula, "args", ()) for number in _numbers_of(arg)]


def _check_averages(name: str, formula: Expr) -> None:
    others = [*CATALOGUE.values(), *(term.formula for term in own_terms().values())]
    kept = {average for other in others for average in averages_of(other)}
    own = {average for average in averages_of(formula) if average not in kept}
    if len({*kept, *own}) > len(AVERAGES):
        raise TermError(
            f"{name} needs {len(own)} averages that no term has had; kernels have room for "
            f"{len(AVERAGES)} of all terms together, and {len(kept)} are taken: "
            f"{'; '.join(sorted(map(str, kept)))}"
        )
    if len(set(map(str, {*kept, *own}))) < len({*kept, *own}):
        raise TermError(f"{name} has an average that differs from another one in late digits only")


# What leaves are tried with. Larger numbers overflow in any square.
_MAGNITUDES = (0.0, 1.0, 1e-20, 1e-6, 1e4)
_SIGNED = (0.0, 1.0, -1.0, 1e-20, -1e-20, 1e-6, -1e-6, 1e4, -1e4)
_TRIED = {
    v: _MAGNITUDES,
    v_hat: _MAGNITUDES,
    eps: (1e-8, 1e-10, 1e-4),
    beta1: (0.9, 0.0, 0.999),
    beta2: (0.999, 0.0, 0.9999),
    beta3: (0.99, 0.0, 0.9999),
    progress: (0.5, 1e-3, 1.0),
}
_MOST_TRIED = 2**18


def not_finite(formula: Expr) -> str | None:
    """Numbers, none above ten thousand, of which the formula makes something that is not finite in
    float32; None where none are found."""
    tried = dict(_TRIED)
    averages = {
        average: Symbol(operand, per_element=True)
        for operand, average in zip(AVERAGES, averages_of(formula), strict=False)
    }
    for average, symbol in averages.items():
        _, values = _values(average.value, tried)
        # an average of what is never negative is not
        tried[symbol] = _MAGNITUDES if (values >= 0).all() else _SIGNED
    inputs, values = _values(substitute(formula, averages), tried)
    bad = np.flatnonzero(~np.isfinite(values))
    if not bad.size:
        return None
    first = bad[0]
    names = {symbol: str(average) for average, symbol in averages.items()}
    example = ", ".join(f"{names.get(s, s)} = {x[first]:g}" for s, x in inputs.items())
    return f"is {values[first]:g} for {example or 'all inputs'}"


def _values(
    formula: Expr, tried: Mapping[Symbol, Sequence[float]]
) -> tuple[dict[Symbol, np.ndarray], np.ndarray]:
    """The formula for all inputs that are tried, or many of them, the plainest first."""
    symbols = sorted(symbols_of(formula), key=str)
    choices = [np.array(tried.get(symbol, _SIGNED), np.float32) for symbol in symbols]
    sizes = [len(choice) for choice in choices]
    count = math.prod(sizes)
    chosen = np.arange(count)
    if count > _MOST_TRIED:
        chosen = np.sort(np.random.default_rng(0).integers(count, size=_MOST_TRIED))
    places = np.unravel_index(chosen, sizes) if sizes else ()
    inputs = {s: c[i] for s, c, i in zip(symbols, choices, places, strict=True)}
    function = compiled(formula, parameters=symbols, meanings=ON_ARRAYS)
    with np.errstate(all="ignore"):
        return inputs, np.broadcast_to(function(*inputs.values())[0], chosen.shape)
