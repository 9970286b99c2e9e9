"""Random genomes, crossover and mutation, with the ranges and rates of the source system.

Every function takes its generator as an argument and returns a valid genome whose explored fields
lie within `NUMERIC` and `BETA3` or are inherited from a parent.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from evokernels import zoo
from evokernels.genome import CATALOGUES, Genome, OwnTerm, Term

__all__ = [
    "ALPHA",
    "BETA3",
    "FLAGS",
    "NUMERIC",
    "RATES",
    "crossover",
    "mutate",
    "random_genome",
    "start_population",
]


@dataclasses.dataclass(frozen=True)
class Gene:
    """How one number is explored: drawn uniformly from ``start``, mutated within ``limits``.

    ``spread`` scales the mutation's sigma; 0 means that only crossover moves the gene.
    """

    start: tuple[float, float]
    limits: tuple[float, float]
    spread: float

    def clamp(self, value: float) -> float:
        low, high = self.limits
        return min(max(value, low), high)

    def mutated(self, value: float, rng: random.Random, rates: Rates) -> float:
        """The value, or one nearby within the limits."""
        if self.spread and rng.random() < rates.number:
            return self.clamp(value + rng.gauss(0.0, rates.sigma * self.spread))
        return value


@dataclasses.dataclass(frozen=True)
class Rates:
    """Mutation probabilities (of each number, of the term list, of each flag) and sigma."""

    number: float
    structure: float
    flag: float
    sigma: float

    def annealed(self, progress: float) -> Rates:
        """All four, falling linearly to half as ``progress`` goes from 0 to 1."""
        factor = 1.0 - 0.5 * progress
        return Rates(*(factor * rate for rate in dataclasses.astuple(self)))


NUMERIC = {
    "lr_log10": Gene(start=(-4.0, -2.0), limits=(-5.0, -1.0), spread=1.0),
    "beta1": Gene(start=(0.5, 0.99), limits=(0.0, 0.999), spread=0.2),
    "beta2": Gene(start=(0.9, 0.9999), limits=(0.0, 0.9999), spread=0.1),
    "eps_log10": Gene(start=(-9.0, -6.0), limits=(-10.0, -4.0), spread=1.0),
    "wd_log10": Gene(start=(-5.0, -3.0), limits=(-6.0, -2.0), spread=1.0),
    "clip_value": Gene(start=(0.5, 2.0), limits=(0.5, 2.0), spread=0.0),
}
# Of genomes with a term that reads it; drawn behind all else, which other genomes have alike.
BETA3 = Gene(start=(0.9, 0.9999), limits=(0.0, 0.9999), spread=0.1)
ALPHA = Gene(start=(-1.0, 1.0), limits=(-5.0, 5.0), spread=1.0)
WARMUP_STEPS = (50, 200)
START_TERMS = 3

# the probability that a random genome has the flag set
FLAGS = {
    "use_m": 0.7,
    "use_v": 0.7,
    "use_bias_correction": 0.6,
    "use_gradient_clipping": 0.2,
    "use_warmup": 0.3,
    "use_cosine_decay": 0.3,
}

RATES = Rates(number=0.35, structure=0.15, flag=0.1, sigma=0.3)

Terms = Sequence[Term | OwnTerm]
CLASSIC: Terms = CATALOGUES["classic"]

KNOWN = (zoo.sgd_momentum, zoo.adam, zoo.adamw, zoo.rmsprop)


def start_population(
    size: int, max_terms: int, rng: random.Random, terms: Terms = CLASSIC
) -> tuple[Genome, ...]:
    """The four known optimizers, then random genomes; ``size`` genomes in all."""
    strangers = (random_genome(rng, max_terms, terms) for _ in range(size - len(KNOWN)))
    return (*KNOWN[:size], *strangers)


def random_genome(rng: random.Random, max_terms: int, terms: Terms = CLASSIC) -> Genome:
    """A genome of one to three ``terms`` (at most ``max_terms``), drawn from the start ranges."""
    count = rng.randint(1, min(START_TERMS, max_terms))
    stranger = Genome(
        term_types=[rng.choice(terms) for _ in range(count)],
        alphas=[rng.uniform(*ALPHA.start) for _ in range(count)],
        warmup_steps=rng.randint(*WARMUP_STEPS),
        **{name: rng.uniform(*gene.start) for name, gene in NUMERIC.items()},
        **{name: rng.random() < probability for name, probability in FLAGS.items()},
    )
    return _with_new_beta3(stranger, rng)


def crossover(first: Genome, second: Genome, rng: random.Random, max_terms: int) -> Genome:
    """The head of one term list joined to the tail of the other; the rest from either parent.

    The head has at least one term and so has the tail: no child is ever empty.
    """
    head = rng.randint(1, len(first.term_types))
    tail = rng.randrange(len(second.term_types))

    def joined(ours: Sequence, theirs: Sequence) -> list:
        return [*ours[:head], *theirs[tail:]][:max_terms]

    child = Genome(
        term_types=joined(first.term_types, second.term_types),
        alphas=joined(first.alphas, second.alphas),
        **{
            name: getattr(rng.choice((first, second)), name)
            for name in (*NUMERIC, *FLAGS, "warmup_steps")
        },
    )
    if not child.reads_beta3:
        return child
    having = [parent for parent in (first, second) if parent.reads_beta3]
    return dataclasses.replace(child, beta3=rng.choice(having).beta3)


def mutate(
    genome: Genome, rng: random.Random, rates: Rates, max_terms: int, terms: Terms = CLASSIC
) -> Genome:
    """A neighbour of ``genome``; each number, the term list and each flag change independently.

    A number that mutates is clamped into its limits: no decay at all (``wd_log10 = -inf``)
    becomes the smallest decay that the search explores.
    """
    changes: dict[str, float | bool] = {
        name: gene.mutated(getattr(genome, name), rng, rates) for name, gene in NUMERIC.items()
    }
    for name in FLAGS:
        if rng.random() < rates.flag:
            changes[name] = not getattr(genome, name)

    weighted = [
        (term, _mutated_alpha(alpha, rng, rates))
        for term, alpha in zip(genome.term_types, genome.alphas, strict=True)
    ]
    if rng.random() < rates.structure:
        weighted = _restructured(weighted, rng, max_terms, terms)
    term_types, alphas = zip(*weighted, strict=True)
    mutant = dataclasses.replace(genome, term_types=term_types, alphas=alphas, **changes)
    if not genome.reads_beta3:
        return _with_new_beta3(mutant, rng)
    if not mutant.reads_beta3:
        return mutant
    return dataclasses.replace(mutant, beta3=BETA3.mutated(genome.beta3, rng, rates))


def _with_new_beta3(genome: Genome, rng: random.Random) -> Genome:
    """A genome whose parents had none, if it has to have one."""
    if not genome.reads_beta3:
        return genome
    return dataclasses.replace(genome, beta3=rng.uniform(*BETA3.start))


def _mutated_alpha(alpha: float, rng: random.Random, rates: Rates) -> float:
    """Scaled by the exponential of a Gaussian, so a weight keeps its sign."""
    if rng.random() < rates.number:
        return ALPHA.clamp(alpha * math.exp(rng.gauss(0.0, rates.sigma * ALPHA.spread)))
    return alpha


def _restructured(
    weighted: list[tuple[Term | OwnTerm, float]], rng: random.Random, max_terms: int, terms: Terms
) -> list[tuple[Term | OwnTerm, float]]:
    """One term added, removed or changed; nothing where the length forbids the move drawn."""
    move = rng.choice(("add", "remove", "change"))
    weighted = list(weighted)
    if move == "add" and len(weighted) < max_terms:
        weighted.append((rng.choice(terms), rng.uniform(*ALPHA.start)))
    elif move == "remove" and len(weighted) > 1:
        weighted.pop(rng.randrange(len(weighted)))
    elif move == "change":
        place = rng.randrange(len(weighted))
        weighted[place] = (rng.choice(terms), weighted[place][1])
    return weighted
