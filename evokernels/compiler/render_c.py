"""Program → C: one function a program and element type, a plain loop that the compiler vectorises.

The function updates ``n`` consecutive elements::

    void name(void *p, const void *g, void *m, void *v, int64_t n, const double *scalars)

Loads, stores and the run-time choice of the instruction set are in ``csrc/``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from evokernels.compiler.covers import COVERS, Cover
from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Program

__all__ = ["DTYPES", "cover_symbol", "render_covers", "render_function"]


@dataclass(frozen=True)
class ElementType:
    """How parameters of one dtype are stored, and in what they are computed."""

    storage: str
    real: str  # arithmetic, and the type in which moments are kept
    suffix: str  # of functions of the C library


DTYPES = {
    "float32": ElementType("float", "float", "f"),
    "float64": ElementType("double", "double", ""),
    "bfloat16": ElementType("uint16_t", "float", "f"),
    "float16": ElementType("uint16_t", "float", "f"),
}


def render_function(program: Program, dtype: str, name: str) -> str:
    """The C function of a program for parameters and gradients of one dtype."""
    element = DTYPES[dtype]
    real = element.real
    storage = {"p": element.storage, "g": element.storage}
    results = dict(program.results)

    def load(value: str) -> str:
        text = f"{value}_[i]"
        return f"load_{dtype}({text})" if value in storage else text

    def store(value: str) -> str:
        text = results[value]
        return f"store_{dtype}({text})" if value in storage else text

    def pointer(value: str) -> str:
        const = "" if value in results else "const "
        return f"{const}{storage.get(value, real)} *restrict {value}_ = {value}_tensor;"

    def scalar(i: int, role: str) -> str:
        return f"const {real} k{i} = ({real})scalars[{i}]; /* {role} */"

    def assignment(target: str, op: str, args: tuple[str, ...]) -> str:
        return f"const {real} {target} = {OPS[op].c.format(*args, f=element.suffix)};"

    unused = "".join(f"    (void){s}_tensor;\n" for s in "mv" if s not in program.state)
    return (
        f"EVK_CLONES void {name}(void *p_tensor, const void *g_tensor, void *m_tensor,\n"
        f"                       void *v_tensor, int64_t n, const double *scalars) {{\n"
        f"{unused}"
        f"{_indented(1, (pointer(value) for value in program.inputs))}"
        f"{_indented(1, (scalar(i, role) for i, role in enumerate(program.scalars)))}"
        "    for (int64_t i = 0; i < n; ++i) {\n"
        f"{_indented(2, (f'const {real} {value} = {load(value)};' for value in program.inputs))}"
        f"{_indented(2, (assignment(line.target, line.op, line.args) for line in program.lines))}"
        f"{_indented(2, (f'{value}_[i] = {store(value)};' for value in results))}"
        "    }\n"
        "}\n"
    )


def render_covers(dtype: str) -> str:
    """A C file with every cover kernel of one dtype."""
    functions = (
        render_function(cover.program, dtype, cover_symbol(cover, dtype)) for cover in COVERS
    )
    return "\n".join(['#include "kernels.h"\n', *functions])


def cover_symbol(cover: Cover, dtype: str) -> str:
    """The name of a cover kernel in the native library."""
    return f"evk_{cover.name}_{dtype}"


def _indented(depth: int, lines: Iterable[str]) -> str:
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)
