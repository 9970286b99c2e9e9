"""When two genomes are one optimizer: the canonical key."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

from evokernels.compiler import terms
from evokernels.compiler.expr import Average, Call, Expr, averages_of, compiled, symbols_of
from evokernels.compiler.linear import Coefficient, Linear, coefficient_expr, linear
from evokernels.compiler.lower import RATE, assemble, shape_of, update_of
from evokernels.genome import CATALOGUES, Genome

__all__ = ["canonical_key"]


@functools.lru_cache(maxsize=65536)
def canonical_key(genome: Genome) -> str:
    """A text that is equal for genomes that are the same optimizer.

    Genomes that differ only in the order of their terms, in how equal terms or lr and alphas share
    a factor, or in genes that nothing reads, have one key: 32 hexadecimal digits.
    """
    # what each number does and its value determine the rule; three steps tell bias correction from
    # none. Not the program: journals keep these keys, and the compiler may learn to do better.
    # The learning rate goes into the weights; the gradient's factor belongs to the training loop.
    update = linear(terms.lr * update_of(genome))
    program, formulas, _ = assemble(update, clipping=genome.use_gradient_clipping)
    own = {
        role: formula
        for role, formula in zip(program.scalars, formulas, strict=True)
        if role not in (str(terms.gradient_factor), str(RATE))
    }
    values = compiled(*own.values())
    # 12 digits: a product taken in another order differs in the last one or two of 17
    numbers = [f"{number:.12g}" for t in (1, 2, 3) for number in values(**_scalars(genome, t))]
    warmup = genome.warmup_steps if genome.use_warmup and genome.warmup_steps > 1 else 0
    identity = repr((tuple(own), numbers, warmup, genome.use_cosine_decay))
    if not _told_by_roles(update, own):
        identity += _in_full(update, genome)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _told_by_roles(update: Linear, roles: Iterable[str]) -> bool:
    """Whether it has such atoms alone as the classic catalogue has: what their numbers do leaves
    nothing open. Of ``m * (m + 2 * g)`` it does not say which of the two ``m`` stands alone."""
    return (
        not any(map(averages_of, update))
        and all(map(_classic_shapes().__contains__, map(shape_of, update)))
        and not any(role.endswith("'") for role in roles)
        and not any(terms.progress in symbols_of(c) for c in map(coefficient_expr, update.values()))
    )


@functools.cache
def _classic_shapes() -> frozenset[str]:
    everything = Genome(CATALOGUES["classic"], [1.0] * len(CATALOGUES["classic"]))
    used = (True, False)
    rules = (dataclasses.replace(everything, use_m=m, use_v=v) for m in used for v in used)
    return frozenset(shape_of(atom) for rule in rules for atom in linear(update_of(rule)))


# Steps of a long training: what depends on `progress` may differ early, late or in between alone.
_LONG = 2**20
_STEPS = sorted({*(2**k for k in range(21)), *range(2**14, _LONG, 2**14)})


def _in_full(form: Linear, genome: Genome) -> str:
    """A linear form, and those within its atoms, as text with the values of their coefficients."""

    def text(expr: Expr) -> str:
        if isinstance(expr, Average):
            return f"average({total(linear(expr.value))}, {expr.beta!r})"
        if isinstance(expr, Call):
            return f"{expr.op}({', '.join(total(linear(arg)) for arg in expr.args)})"
        return str(expr)

    def total(form: Linear) -> str:
        return " + ".join(sorted(f"{weight(form[atom])} {text(atom)}" for atom in form))

    def weight(coefficient: Coefficient) -> list[str]:
        formula = coefficient_expr(coefficient)
        values = compiled(formula)
        if terms.progress not in symbols_of(formula):
            scalars = [_scalars(genome, t) for t in (1, 2, 3)]
        else:
            scalars = [_scalars(genome, t, _LONG) for t in _STEPS]
        return [f"{values(**each)[0]:.12g}" for each in scalars]

    return total(form)


def _scalars(genome: Genome, t: int, training_steps: int = 4) -> dict[str, float]:
    """Those of a step, with the bias corrections to the digits that the keys in journals have."""
    corrections = {
        bias.name: 1.0 - getattr(genome, beta.name) ** t for beta, bias in terms.BIASES.items()
    }
    return {**terms.genome_scalars(genome, t, training_steps=training_steps), **corrections}
