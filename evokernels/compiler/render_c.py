"""Program → C: a plain loop for each program and its dtypes, which the compiler vectorises.

The function updates ``n`` consecutive elements (``csrc/runtime.h``, ``evk_kernel``)::

    void name(void *const *tensors, int64_t n, const double *scalars)

Loads, stores and the run-time choice of the instruction set are in ``csrc/``.
"""

from __future__ import annotations

from collections.abc import Iterable

from evokernels.compiler.covers import COVERS, Cover
from evokernels.compiler.program import Program
from evokernels.compiler.spelling import DTYPES, assignment, indented

__all__ = [
    "C_FLAGS",
    "STORED",
    "cover_symbol",
    "own_symbol",
    "render_covers",
    "render_function",
    "render_own",
]

# How all C is compiled, with the package and later on.
C_FLAGS = (
    *("-std=c11", "-O3", "-g0"),
    # the same result for every instruction set, thread count and loop tail
    "-ffp-contract=off",
    # nothing reads errno or the floating-point flags; without these no root and no select
    # becomes vector code. Not -ffast-math: NaN, infinity and rounding stay as they are.
    *("-fno-math-errno", "-fno-trapping-math"),
    # "weigh" tests run-time numbers: one loop with selects, not one loop for each combination
    "-fno-unswitch-loops",
    # iterations touch elements of their own: no look whether any two of eight tensors overlap,
    # which compilers give up
    "-fopenmp-simd",
)

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
    dtypes = {"p": dtype, "g": dtype, **dict.fromkeys(program.state, state)}
    results = dict(program.results)

    def load(value: str) -> str:
        return f"load_{dtypes[value]}({value}_[i])"

    def store(value: str) -> str:
        return f"store_{dtypes[value]}({results[value]})"

    def pointer(value: str) -> str:
        const = "" if value in results else "const "
        storage = DTYPES[dtypes[value]].storage
        return f"{const}{storage} *restrict {value}_ = tensors[EVK_{value.upper()}];"

    def scalar(i: int, role: str) -> str:
        return f"const {real} k{i} = ({real})scalars[{i}]; /* {role} */"

    return (
        f"EVK_CLONES void {name}(void *const *tensors, int64_t n, const double *scalars) {{\n"
        f"{indented(1, (pointer(value) for value in program.inputs))}"
        f"{indented(1, (scalar(i, role) for i, role in enumerate(program.scalars)))}"
        "#pragma omp simd\n"
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
    return _file(functions)


def render_own(program: Program, dtype: str, state: str) -> str:
    """A C file with all kernels that a rule needs for parameters of one dtype with moments of
    another."""
    arithmetic = DTYPES[dtype].arithmetic
    pairs = {(arithmetic, arithmetic), (dtype, state)} & set(STORED)
    return _file(render_function(program, *pair, own_symbol(*pair)) for pair in sorted(pairs))


def own_symbol(dtype: str, state: str) -> str:
    """The name of a kernel in there."""
    return f"evk_own_{dtype}_{state}"


def cover_symbol(cover: Cover, dtype: str, state: str) -> str:
    """The name of a cover kernel in the native library."""
    stored = cover.program.state and state != DTYPES[dtype].arithmetic
    return f"evk_{cover.name}_{dtype}" + (f"_{state}" if stored else "")


def _file(functions: Iterable[str]) -> str:
    return "\n".join(['#include "kernels.h"\n', *functions])
