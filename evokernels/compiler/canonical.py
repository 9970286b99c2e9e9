"""When two genomes are one optimizer: the canonical key."""

from __future__ import annotations

import functools
import hashlib

from evokernels.compiler.lower import lower
from evokernels.compiler.terms import genome_scalars, gradient_factor
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
    # Not the gradient's factor: it belongs to the training loop, not to the rule.
    # 12 digits: a product taken in another order differs in the last one or two of 17
    own = [i for i, role in enumerate(rule.program.scalars) if role != str(gradient_factor)]
    numbers = []
    for t in (1, 2, 3):
        of_step = rule.numbers(**genome_scalars(genome, t))
        numbers += [f"{of_step[i]:.12g}" for i in own]
    roles = tuple(rule.program.scalars[i] for i in own)
    warmup = genome.warmup_steps if genome.use_warmup and genome.warmup_steps > 1 else 0
    identity = repr((roles, numbers, warmup, genome.use_cosine_decay))
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
