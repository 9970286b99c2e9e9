"""What a genome is and what each backend makes of it: `python -m evokernels inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from evokernels.compiler import terms
from evokernels.compiler.covers import find_cover
from evokernels.compiler.expr import Constant, Expr, Symbol, substitute
from evokernels.compiler.linear import linear, linear_expr
from evokernels.compiler.lower import Rule, lower, update_of
from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import cover_symbol, render_function, render_own
from evokernels.compiler.render_cuda import render_cuda
from evokernels.compiler.render_triton import render_module
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.compiler.structure import structure_of
from evokernels.explain import facts
from evokernels.genome import Genome
from evokernels.kernels.cuda import LEAST_WORDS
from evokernels.kernels.plan import ARITHMETIC
from evokernels.kernels.registry import BACKENDS

__all__ = ["SOURCES", "source", "summary"]


def summary(genome: Genome, dtype: torch.dtype) -> str:
    """Rule, canonical form, state, bytes; which backends run it here, and why others do not.

    Args:
        dtype: of the parameters.
    """
    program = lower(genome).program
    moments = len(program.state) * ARITHMETIC[dtype].itemsize
    lines = [
        *facts(genome, dtype),
        f"memory   {moments} bytes of state an element",
        f"update   {_canonical_update(genome)}",
        *_backends(program, dtype),
    ]
    return "\n".join(lines) + "\n"


def source(genome: Genome, backend: str, dtype: torch.dtype) -> str:
    """The text of the kernel that a backend makes of a genome; no device is needed for it.

    Args:
        backend: a name in `SOURCES`.
        dtype: of the parameters; moments have the dtype of the arithmetic.
    """
    return SOURCES[backend](lower(genome), str(dtype).removeprefix("torch."))


def _canonical_update(genome: Genome) -> str:
    """What the learning rate multiplies: equal terms added up, bias corrections in the weights."""
    scalars = terms.genome_scalars(genome, t=1)
    fixed = (terms.weight_decay, *terms.BIASES, terms.eps)
    numbers: dict[Symbol, Expr] = {each: Constant(scalars[each.name]) for each in fixed}
    for beta, bias in terms.BIASES.items():
        numbers[bias] = Symbol(f"(1 - {numbers[beta]}^t)", per_element=False)
    return str(linear_expr(linear(substitute(update_of(genome), numbers))))


def _backends(program: Program, dtype: torch.dtype) -> Iterable[str]:
    """A line for each: asked about CPU tensors, or where it does not run on CPUs about CUDA's."""
    yield f"backends for {dtype} parameters on this machine:"
    for name, backend in BACKENDS.items():
        device = torch.device("cuda" if name in ("cuda", "triton") else "cpu")
        reason = backend.why_not(program, device, dtype)
        answer = f"not here: {reason}" if reason else backend.kernel(program, dtype)
        yield f"  {name:<7}{answer}"


def _c(rule: Rule, dtype: str) -> str:
    arithmetic = DTYPES[dtype].arithmetic
    cover = find_cover(rule.program)
    if cover is None:
        return render_own(rule.program, dtype, arithmetic)
    return render_function(cover.program, dtype, arithmetic, cover_symbol(cover, dtype, arithmetic))


def _cuda(rule: Rule, dtype: str) -> str:
    return render_cuda((_kind(rule, dtype),), LEAST_WORDS)


def _triton(rule: Rule, dtype: str) -> str:
    return render_module((_kind(rule, dtype),))


def _kind(rule: Rule, dtype: str) -> Kind:
    return Kind(structure_of(rule), dtype, DTYPES[dtype].arithmetic, stochastic=False)


def _operations(rule: Rule, dtype: str) -> str:
    """The program, which the eager backend goes through with a torch call for each line."""
    lines = [
        *(f"k{i} = {formula}" for i, formula in enumerate(rule.formulas)),
        *(f"{line.target} = {OPS[line.op].text.format(*line.args)}" for line in rule.program.lines),
        *(f"{name} ← {value}" for name, value in rule.program.results),
    ]
    return "\n".join(lines) + "\n"


# What makes the text, by backend: of a rule, for parameters of a dtype. What it includes and does
# not depend on the rule is in evokernels/kernels/: csrc/ and triton_language.py.
SOURCES: dict[str, Callable[[Rule, str], str]] = {
    "cpu": _c,
    "cuda": _cuda,
    "triton": _triton,
    "eager": _operations,
}
