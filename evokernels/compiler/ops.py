"""The operations a rule is made of: one row an operation, everything else derives from it.

``meaning`` defines the operation, NaN and infinity included: the interpreter runs it on float64
(Python floats and NumPy arrays alike) and every other spelling is tested against it. In ``c``,
``{f}`` is the suffix of the C library function (``f`` for float, nothing for double); operands are
always names, so a spelling may repeat them.
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
    text: str
    binds: int = 9  # strength of the infix operator in `text`; function calls bind strongest


OPS = {
    "add": Op(2, operator.add, "{0} + {1}", "{0} + {1}", binds=1),
    "sub": Op(2, operator.sub, "{0} - {1}", "{0} - {1}", binds=1),
    "mul": Op(2, operator.mul, "{0} * {1}", "{0} * {1}", binds=2),
    "div": Op(2, operator.truediv, "{0} / {1}", "{0} / {1}", binds=2),
    "sqrt": Op(1, np.sqrt, "sqrt{f}({0})", "sqrt({0})"),
    "abs": Op(1, abs, "fabs{f}({0})", "|{0}|"),
    # sign(0) = 0 and sign(NaN) = NaN: torch.sign(nan) is 0, which hides a diverged run
    "sign": Op(
        1,
        lambda x: np.where((x < 0) | (x > 0), np.copysign(1.0, x), x),
        "islessgreater({0}, 0) ? copysign{f}(1, {0}) : {0}",  # one comparison and one select
        "sign({0})",
    ),
    # a NaN in the second operand stays, as in the processor's own instruction
    "min": Op(2, lambda a, b: np.where(a < b, a, b), "{0} < {1} ? {0} : {1}", "min({0}, {1})"),
    "max": Op(2, lambda a, b: np.where(a > b, a, b), "{0} > {1} ? {0} : {1}", "max({0}, {1})"),
    # {0} * {1} + {2}, rounded once: the kernels and torch's own vector code both do
    "fma": Op(3, lambda a, b, c: a * b + c, "fma{f}({0}, {1}, {2})", "{0} * {1} + {2}", binds=1),
    # a weight times a value, where a weight of zero means that the term is not there: 0, whatever
    # the value (0 * infinity would be NaN). Lets one kernel serve every rule whose terms are among
    # its own.
    "weigh": Op(
        2,
        lambda weight, x: np.where(weight == 0, 0.0, weight * x),
        "{0} != 0 ? {0} * {1} : 0",
        "{0} * {1}",
        binds=2,
    ),
    # the same, added to a sum
    "weigh_add": Op(
        3,
        lambda weight, x, total: np.where(weight == 0, total, weight * x + total),
        "{0} != 0 ? fma{f}({0}, {1}, {2}) : {2}",
        "{0} * {1} + {2}",
        binds=1,
    ),
}
