"""Cover kernels: a few programs that between them run every rule over the built-in catalogue.

A cover has all the terms that its state and denominators allow; a rule with fewer terms gives the
others a weight of zero, which the operation "weigh" turns into "not there". They are compiled when
the package is built, so no rule over the catalogue ever waits for a compiler.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from evokernels.compiler import terms
from evokernels.compiler.expr import Expr, sign, sqrt, substitute
from evokernels.compiler.linear import linear
from evokernels.compiler.lower import assemble
from evokernels.compiler.program import Program

__all__ = ["COVERS", "Cover", "find_cover"]


@dataclass(frozen=True)
class Cover:
    """A program with more terms than a rule may have.

    Attributes:
        name: the moments and denominators it has, usable in a C identifier.
        formulas: for each scalar of the program those that it has with and without bias
            correction, in a rule that lacks nothing.
        absent: for the scalars that a rule may lack, the number that stands for "not there".
    """

    name: str
    program: Program
    formulas: tuple[tuple[Expr, Expr], ...]
    absent: dict[str, float]

    def serves(self, program: Program) -> bool:
        """Whether it computes what `program` does, given the numbers for absent scalars."""
        wanted, offered = set(program.scalars), set(self.program.scalars)
        return wanted <= offered and offered - wanted <= self.absent.keys()


def _cover(with_m: bool, with_v: bool, with_abs: bool) -> Cover:
    linear_terms = terms.g + terms.m if with_m else terms.g
    update: Expr = terms.DECAY + sign(terms.g) + linear_terms
    if with_v:
        update = update + linear_terms / (sqrt(terms.v) + terms.eps)
    if with_abs:
        update = update + linear_terms / (abs(terms.g) + terms.eps)
    program, plain, _ = assemble(linear(update), clipping=True)
    corrected = substitute(update, {terms.m: terms.CORRECTED_M, terms.v: terms.CORRECTED_V})
    same_program, others, _ = assemble(linear(corrected), clipping=True)
    assert same_program == program, "bias correction only changes numbers"
    absent = {str(-terms.clip): -math.inf, str(terms.clip): math.inf}
    for line in program.lines:
        if line.op in ("weigh", "weigh_add"):
            absent[program.scalars[int(line.args[0][1:])]] = 0.0
    has = {"g": True, "m": with_m, "v": with_v, "abs": with_abs}
    return Cover(
        "_".join(part for part, there in has.items() if there),
        program,
        tuple(zip(plain, others, strict=True)),
        absent,
    )


COVERS = tuple(_cover(*flags) for flags in itertools.product((False, True), repeat=3))


@functools.lru_cache(maxsize=4096)
def find_cover(program: Program) -> Cover | None:
    """The cover that runs a program, the one with the least to compute; None if there is none."""
    serving = [cover for cover in COVERS if cover.serves(program)]
    return min(serving, key=lambda cover: len(cover.program.lines), default=None)
