"""What renderers have in common: dtypes, kinds of tensors, how C and CUDA C++ write assignments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from evokernels.compiler.expr import Line
from evokernels.compiler.ops import OPS
from evokernels.compiler.structure import Structure

__all__ = ["DTYPES", "ElementType", "Kind", "assignment", "indented"]


@dataclass(frozen=True)
class ElementType:
    """How elements of one dtype are stored, and the dtype in which parameters are computed."""

    storage: str
    arithmetic: str
    bytes: int

    @property
    def real(self) -> str:
        """The type of the arithmetic."""
        return DTYPES[self.arithmetic].storage


DTYPES = {
    "float32": ElementType("float", "float32", 4),
    "float64": ElementType("double", "float64", 8),
    "bfloat16": ElementType("uint16_t", "float32", 2),
    "float16": ElementType("uint16_t", "float32", 2),
}


class Kind(NamedTuple):
    """What the code of one element depends on; a device kernel has an update for each kind.

    Attributes:
        parameter, state: dtypes by name; how parameter and gradient, and moments, are stored.
        stochastic: whether bfloat16 is rounded by random bits.
    """

    structure: Structure
    parameter: str
    state: str
    stochastic: bool

    @property
    def arithmetic(self) -> str:
        """The dtype in which it is computed."""
        return DTYPES[self.parameter].arithmetic

    @property
    def stored(self) -> tuple[str, ...]:
        """The dtypes of its tensors: parameter and gradient, moments if there are any."""
        return (self.parameter, *((self.state,) if self.structure.program.state else ()))


# Of the functions of the C library, for each type of arithmetic.
_SUFFIXES = {"float": "f", "double": ""}


def assignment(line: Line, real: str) -> str:
    """A line as a statement, in the arithmetic of a C type."""
    value = OPS[line.op].c.format(*line.args, f=_SUFFIXES[real])
    return f"const {real} {line.target} = {value};"


def indented(depth: int, lines: Iterable[str]) -> str:
    """Lines of text, `depth` levels deep."""
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)
