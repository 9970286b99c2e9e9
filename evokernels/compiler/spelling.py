"""What C and CUDA C++ have in common: types, and how single assignments are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Line

__all__ = ["DTYPES", "ElementType", "assignment", "indented"]


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

# Of the functions of the C library, for each type of arithmetic.
_SUFFIXES = {"float": "f", "double": ""}


def assignment(line: Line, real: str) -> str:
    """A line as a statement, in the arithmetic of a C type."""
    value = OPS[line.op].c.format(*line.args, f=_SUFFIXES[real])
    return f"const {real} {line.target} = {value};"


def indented(depth: int, lines: Iterable[str]) -> str:
    """Lines of text, `depth` levels deep."""
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)
