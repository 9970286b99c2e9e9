"""When two genomes are one optimizer: the canonical key."""

from __future__ import annotations

import functools
import hashlib

from evokernels.compiler import terms
from evokernels.compiler.expr import compiled
from evokernels.compiler.linear import linear
from evokernels.compiler.lower import RATE, assemble, update_of
from evokernels.genome import Genome

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
    program, formulas, averages = assemble(update, clipping=genome.use_gradient_clipping)
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
    if averages:
        identity += repr(averages)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _scalars(genome: Genome, t: int) -> dict[str, float]:
    """Those of a step, with the bias corrections to the digits that the keys in journals have."""
    corrections = {"bias1": 1.0 - genome.beta1**t, "bias2": 1.0 - genome.beta2**t}
    return {**terms.genome_scalars(genome, t, training_steps=4), **corrections}
