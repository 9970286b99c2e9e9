"""What Python, NumPy and torch have and formulas have not: errors that say what to write instead.

Without them Python would decide at once what each element decides for itself: ``g and m`` is ``m``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from evokernels.errors import TermError

__all__ = ["Unwritable"]

_FUNCTIONS = "evokernels.terms has sign, sqrt, exp, log1p, tanh, minimum, maximum and clip"

# Operators of Python → what is written in their place.
_OPERATORS = {
    ">=": "where(a >= b, x, y) is where(a < b, y, x)",
    "<=": "where(a <= b, x, y) is where(a > b, y, x)",
    "&": "where(a & b, x, y) is where(a, where(b, x, y), y)",
    "|": "where(a | b, x, y) is where(a, x, where(b, x, y))",
    "~": "where(~a, x, y) is where(a, y, x)",
    "//": "there are + - * / and whole powers",
    "%": "there are + - * / and whole powers",
    "@": "every formula is of one element",
    "** to a formula": "there are exp and whole powers",
}
_METHODS = {
    **{"__ge__": ">=", "__le__": "<=", "__invert__": "~", "__rpow__": "** to a formula"},
    **{f"__{side}and__": "&" for side in ("", "r")},
    **{f"__{side}or__": "|" for side in ("", "r")},
    **{f"__{side}floordiv__": "//" for side in ("", "r")},
    **{f"__{side}mod__": "%" for side in ("", "r")},
    **{f"__{side}matmul__": "@" for side in ("", "r")},
}

# A number of NumPy on the left of an operator calls one of these.
_REFLECTED = {
    np.add: "__radd__",
    np.subtract: "__rsub__",
    np.multiply: "__rmul__",
    np.divide: "__rtruediv__",
    np.greater: "__lt__",
    np.less: "__gt__",
}


def _without(operator: str) -> Callable[..., NoReturn]:
    def method(*_: object) -> NoReturn:
        raise TermError(f"formulas have no {operator}: {_OPERATORS[operator]}")

    return method


class Unwritable:
    """Base of formulas and comparisons: whatever they do not define themselves."""

    __slots__ = ()

    locals().update({name: _without(operator) for name, operator in _METHODS.items()})

    def __bool__(self) -> NoReturn:
        raise TermError(
            "what a formula is differs from element to element, so Python cannot choose by it: for "
            "if, and, or, not and chains of comparisons there is where(), for min and max "
            "minimum() and maximum()"
        )

    def __float__(self) -> NoReturn:
        raise TermError(f"a formula is no number yet, as functions of math want one; {_FUNCTIONS}")

    def __array_ufunc__(self, function: np.ufunc, method: str, *inputs: Any, **_: Any) -> Any:
        """Operators whose left operand is a number of NumPy; all else is an error."""
        if function in (np.equal, np.not_equal):
            return function is np.not_equal
        if method == "__call__" and function in _REFLECTED and inputs[-1] is self:
            return getattr(self, _REFLECTED[function])(np.asarray(inputs[0])[()])
        raise TermError(f"NumPy's {function.__name__} takes no formulas; {_FUNCTIONS}")

    @classmethod
    def __torch_function__(cls, function: Callable, *_: Any) -> NoReturn:
        name = getattr(function, "__name__", function)
        raise TermError(
            f"torch's {name} takes no formulas, nor formulas tensors: x.item() is the number of a "
            f"tensor x; {_FUNCTIONS}"
        )
