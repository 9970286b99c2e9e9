"""The operations a rule is made of: one row an operation, everything else derives from it.

``meaning`` defines the operation, NaN and infinity included: the interpreter runs it on float64
(Python floats and NumPy arrays alike) and every other spelling is tested against it. In ``c``,
which CUDA C++ shares, ``{f}`` is the suffix of functions of the C library and of
``csrc/functions.h`` (``f`` for float, nothing for double); ``triton`` may use the functions of
``kernels/triton_functions.py``. Operands are always names, so a spelling may repeat them.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["OPS", "Op"]


@dataclass(frozen=True)
class Op:
    """One operation: how many operands, what it means, how it is spelled."""

    arity: int
    meaning: Callable
    c: str
    triton: str
    text: str
    binds: int = 9  # strength of the infix operator in `text`; function calls bind strongest


def _infix(meaning: Callable, sign: str, binds: int, triton: str | None = None) -> Op:
    spelling = f"{{0}} {sign} {{1}}"
    return Op(2, meaning, spelling, triton or spelling, spelling, binds)


OPS = {
    "add": _infix(operator.add, "+", binds=1),
    "sub": _infix(operator.sub, "-", binds=1),
    "mul": _infix(operator.mul, "*", binds=2),
    "div": _infix(operator.truediv, "/", binds=2, triton="divide({0}, {1})"),
    "sqrt": Op(1, np.sqrt, "sqrt{f}({0})", "root({0})", "sqrt({0})"),
    "abs": Op(1, abs, "fabs{f}({0})", "tl.abs({0})", "|{0}|"),
    # sign(0) = 0 and sign(NaN) = NaN: torch.sign(nan) is 0, which hides a diverged run
    "sign": Op(
        1,
        lambda x: np.where((x < 0) | (x > 0), np.copysign(1.0, x), x),
        "islessgreater({0}, 0) ? copysign{f}(1, {0}) : {0}",  # one comparison and one select
        "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0}))",
        "sign({0})",
    ),
    # a NaN in the second operand stays, as in the processor's own instruction
    "min": Op(
        2,
        lambda a, b: np.where(a < b, a, b),
        "{0} < {1} ? {0} : {1}",
        "tl.where({0} < {1}, {0}, {1})",
        "min({0}, {1})",
    ),
    "max": Op(
        2,
        lambda a, b: np.where(a > b, a, b),
        "{0} > {1} ? {0} : {1}",
        "tl.where({0} > {1}, {0}, {1})",
        "max({0}, {1})",
    ),
    # of csrc/functions.h: calls of the C library keep loops from being vectorised
    "exp": Op(1, np.exp, "evk_exp{f}({0})", "exponential({0})", "exp({0})"),
    "log1p": Op(1, np.log1p, "evk_log1p{f}({0})", "log1p({0})", "log1p({0})"),
    "tanh": Op(1, np.tanh, "evk_tanh{f}({0})", "tanh({0})", "tanh({0})"),
    # {2} where {0} is above {1}, else {3}; where they cannot be compared NaN, which stays in sight
    "where": Op(
        4,
        lambda a, b, x, y: np.where(a > b, x, np.where(a <= b, y, np.nan)),
        "{0} > {1} ? {2} : {0} <= {1} ? {3} : {0} + {1}",
        "tl.where({0} > {1}, {2}, tl.where({0} <= {1}, {3}, {0} + {1}))",
        "where({0} > {1}, {2}, {3})",
    ),
    # {0} * {1} + {2}, rounded once: the kernels and torch's own vector code both do
    "fma": Op(
        3,
        lambda a, b, c: a * b + c,
        "fma{f}({0}, {1}, {2})",
        "tl.fma({0}, {1}, {2})",
        "{0} * {1} + {2}",
        binds=1,
    ),
    # a weight times a value, where a weight of zero means that the term is not there: 0, whatever
    # the value (0 * infinity would be NaN). Lets one kernel serve every rule whose terms are among
    # its own.
    "weigh": Op(
        2,
        lambda weight, x: np.where(weight == 0, 0.0, weight * x),
        "{0} != 0 ? {0} * {1} : 0",
        "tl.where({0} != 0, {0} * {1}, 0.0)",
        "{0} * {1}",
        binds=2,
    ),
    # the same, added to a sum
    "weigh_add": Op(
        3,
        lambda weight, x, total: np.where(weight == 0, total, weight * x + total),
        "{0} != 0 ? fma{f}({0}, {1}, {2}) : {2}",
        "tl.where({0} != 0, tl.fma({0}, {1}, {2}), {2})",
        "{0} * {1} + {2}",
        binds=1,
    ),
    # of scalars alone, once a step: e^x - 1 without cancellation, and cos(pi x), whose reduction is
    # exact and needs no table
    "expm1": Op(1, np.expm1, "expm1({0})", "expm1({0})", "expm1({0})"),
    "cospi": Op(
        1,
        lambda x: np.cos(np.pi * x),
        "cospi({0})",
        "cospi({0})",
        "cospi({0})",
    ),
}
