"""What a genome becomes: rule, state, memory traffic and the kernel that runs it."""

from __future__ import annotations

import sys
from typing import TextIO

import torch

from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.describe import formula
from evokernels.compiler.lower import lower
from evokernels.errors import GenomeError, OptimizerError
from evokernels.genome import Genome
from evokernels.kernels.plan import ARITHMETIC
from evokernels.kernels.registry import select

__all__ = ["explain", "facts"]


def explain(
    genome: Genome,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    file: TextIO | None = None,
) -> None:
    """Print what an optimizer with this genome does to parameters of a device and dtype.

    Printed are the canonical rule, the moments it keeps, the bytes that one step moves for each
    element, the kernel that will run, and why backends that come before it will not.

    Args:
        file: where to print; standard output by default.

    Raises:
        GenomeError: `genome` is none.
        OptimizerError: parameters cannot be of this dtype.
        BackendError: the backend asked for cannot run there.
    """
    if not isinstance(genome, Genome):
        raise GenomeError(f"explain takes an evokernels.Genome, got {type(genome).__name__}")
    if dtype not in ARITHMETIC:
        allowed = ", ".join(map(str, ARITHMETIC))
        raise OptimizerError(f"dtype is {dtype}; parameters may be {allowed}")
    program = lower(genome).program
    selection = select(program, torch.device(device), dtype, backend)
    lines = [
        *facts(genome, dtype),
        f"backend  {selection.backend.name}: {selection.backend.kernel(program, dtype)}",
        *(f"         not {name}: {reason}" for name, reason in selection.rejected.items()),
    ]
    print("\n".join(lines), file=file or sys.stdout)


def facts(genome: Genome, dtype: torch.dtype) -> list[str]:
    """What is the same on every device: the rule, its key, its state, the bytes that it moves."""
    program = lower(genome).program
    moment = ARITHMETIC[dtype]
    moved = 3 * dtype.itemsize + 2 * len(program.state) * moment.itemsize
    state = f"{', '.join(program.state)} in {moment}" if program.state else "none"
    return [
        formula(genome),
        f"key      {canonical_key(genome)}",
        f"state    {state}",
        f"traffic  {moved} bytes an element and step",
    ]
