"""Program → C: a plain loop for each program and its dtypes, which the compiler vectorises.

The function updates ``n`` consecutive elements::

    void name(void *p, const void *g, void *m, void *v, int64_t n, const double *scalars)

Loads, stores and the run-time choice of the instruction set are in ``csrc/``.
"""

from __future__ import annotations

from evokernels.compiler.covers import COVERS, Cover
from evokernels.compiler.program import Program
from evokernels.compiler.spelling import DTYPES, assignment, indented

__all__ = ["STORED", "cover_symbol", "render_covers", "render_function"]


# Dtypes of parameters and of their moments for which there are kernels. Other pairs go through
# buffers and the kernels of the arithmetic type.
STORED = (
    ("float32", "float32"),
    ("float64", "float64"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
)


def render_function(program: Program, dtype: str, state: str, name: str) -> str:
    """The C function of a program for parameters and gradients of one dtype, moments of another."""
    real = DTYPES[dtype].real
    dtypes = {"p": dtype, "g": dtype, "m": state, "v": state}
    results = dict(program.results)

    def load(value: str) -> str:
        return f"load_{dtypes[value]}({value}_[i])"

    def store(value: str) -> str:
        return f"store_{dtypes[value]}({results[value]})"

    def pointer(value: str) -> str:
        const = "" if value in results else "const "
        return f"{const}{DTYPES[dtypes[value]].storage} *restrict {value}_ = {value}_tensor;"

    def scalar(i: int, role: str) -> str:
        return f"const {real} k{i} = ({real})scalars[{i}]; /* {role} */"

    unused = "".join(f"    (void){s}_tensor;\n" for s in "mv" if s not in program.state)
    return (
        f"EVK_CLONES void {name}(void *p_tensor, const void *g_tensor, void *m_tensor,\n"
        f"                       void *v_tensor, int64_t n, const double *scalars) {{\n"
        f"{unused}"
        f"{indented(1, (pointer(value) for value in program.inputs))}"
        f"{indented(1, (scalar(i, role) for i, role in enumerate(program.scalars)))}"
        "    for (int64_t i = 0; i < n; ++i) {\n"
        f"{indented(2, (f'const {real} {value} = {load(value)};' for value in program.inputs))}"
        f"{indented(2, (assignment(line, real) for line in program.lines))}"
        f"{indented(2, (f'{value}_[i] = {store(value)};' for value in results))}"
        "    }\n"
        "}\n"
    )


def render_covers(dtype: str, state: str) -> str:
    """A C file with every cover kernel of parameters of one dtype with moments of another.

    Those without moments come with moments of the arithmetic type.
    """
    functions = (
        render_function(cover.program, dtype, state, cover_symbol(cover, dtype, state))
        for cover in COVERS
        if cover.program.state or state == DTYPES[dtype].arithmetic
    )
    return "\n".join(['#include "kernels.h"\n', *functions])


def cover_symbol(cover: Cover, dtype: str, state: str) -> str:
    """The name of a cover kernel in the native library."""
    stored = cover.program.state and state != DTYPES[dtype].arithmetic
    return f"evk_{cover.name}_{dtype}" + (f"_{state}" if stored else "")
