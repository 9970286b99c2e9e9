"""The program: what a kernel computes for one element, as single assignments; no numbers in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evokernels.compiler.expr import Line
from evokernels.compiler.ops import OPS

__all__ = ["AVERAGES", "OPERANDS", "Program", "interpret"]

# The operands of the averages that terms keep: as many as a kernel has room for.
AVERAGES = ("a0", "a1", "a2", "a3")

# The tensors of a parameter: their order in all tables, which random bits depend on too.
OPERANDS = ("p", "g", "m", "v", *AVERAGES)


@dataclass(frozen=True)
class Program:
    """One element's update. Equal programs are the same kernel.

    Attributes:
        state: the moments it reads and writes, of "m", "v" and then `AVERAGES`.
        scalars: what each run-time number stands for; number ``i`` is the operand ``k{i}``.
        lines: the assignments in order, over the inputs "p", "g" and the state.
        results: which value becomes the new parameter and which the new state.
    """

    state: tuple[str, ...]
    scalars: tuple[str, ...]
    lines: tuple[Line, ...]
    results: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the per-element inputs."""
        return ("p", "g", *self.state)

    @functools.cached_property
    def last_reads(self) -> tuple[frozenset[str], ...]:
        """For each line the values that it is the last to read."""
        kept = {value for _, value in self.results}
        reads = []
        for line in reversed(self.lines):
            reads.append(frozenset(line.args) - kept)
            kept |= reads[-1]
        return tuple(reversed(reads))

    def verify(self) -> Program:
        """Itself, if it is well formed; the error of the compiler otherwise names the line."""
        known = {*self.inputs, *(f"k{i}" for i in range(len(self.scalars)))}
        for line in self.lines:
            if line.op not in OPS or len(line.args) != OPS[line.op].arity:
                raise AssertionError(f"malformed operation in {line}")
            if unknown := set(line.args) - known:
                raise AssertionError(f"{sorted(unknown)} used before assignment in {line}")
            if line.target in known:
                raise AssertionError(f"second assignment in {line}")
            known.add(line.target)
        if [name for name, _ in self.results] != ["p", *self.state]:
            raise AssertionError(f"results {self.results} do not match state {self.state}")
        if unknown := {value for _, value in self.results} - known:
            raise AssertionError(f"results {sorted(unknown)} are never assigned")
        return self


def interpret(
    program: Program,
    inputs: Mapping[str, Any],
    scalars: Sequence[float],
    meanings: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a program line by line with the given meaning of each operation.

    Args:
        inputs: the arrays or tensors named by ``program.inputs``, all of one shape.
        scalars: the numbers named by ``program.scalars``.
        meanings: a function for each operation.

    Returns:
        The new values of "p" and of the state, by name.
    """
    values = dict(inputs)
    values.update((f"k{i}", number) for i, number in enumerate(scalars))
    for line, done in zip(program.lines, program.last_reads, strict=True):
        values[line.target] = meanings[line.op](*(values[arg] for arg in line.args))
        for name in done:  # memory for the next line
            del values[name]
    return {name: values[value] for name, value in program.results}
