"""When two genomes are one optimizer: the canonical key."""

from __future__ import annotations

import functools
import hashlib

from evokernels.compiler.lower import lower
from evokernels.compiler.terms import genome_scalars
from evokernels.genome import Genome

__all__ = ["canonical_key"]


@functools.lru_cache(maxsize=65536)
def canonical_key(genome: Genome) -> str:
    """A text that is equal for genomes that are the same optimizer.

    Genomes that differ only in the order of their terms, in how equal terms or lr and alphas share
    a factor, or in genes that nothing reads, have one key: 32 hexadecimal digits.
    """
    rule = lower(genome)
    # what each number does and its value determine the rule; three steps tell bias correction from
    # none. Not the program: journals keep these keys, and the compiler may learn to do better.
    # 12 digits: a product taken in another order differs in the last one or two of 17
    numbers = [
        f"{number:.12g}" for t in (1, 2, 3) for number in rule.numbers(**genome_scalars(genome, t))
    ]
    warmup = genome.warmup_steps if genome.use_warmup and genome.warmup_steps > 1 else 0
    identity = repr((rule.program.scalars, numbers, warmup, genome.use_cosine_decay))
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
