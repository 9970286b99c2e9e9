"""Which numbers of a genome its rule reads, and which weights move the rule in different ways."""

from __future__ import annotations

import dataclasses

import numpy as np

from evokernels.compiler import terms
from evokernels.compiler.expr import symbols_of
from evokernels.compiler.linear import Linear, linear
from evokernels.compiler.lower import lower, update_of
from evokernels.genome import Genome

__all__ = ["independent_terms", "numbers_read"]

# what each scalar of a step is made of
GENE = {
    terms.lr: "lr_log10",
    terms.weight_decay: "wd_log10",
    **{symbol: pair[0].name for pair in terms.BIASES.items() for symbol in pair},
    terms.eps: "eps_log10",
    terms.clip: "clip_value",
}


def numbers_read(genome: Genome) -> frozenset[str]:
    """The numeric fields, alphas apart, that any scalar of the genome's rule depends on."""
    symbols = set().union(*(symbols_of(formula) for formula in lower(genome).formulas))
    return frozenset(gene for symbol, gene in GENE.items() if symbol in symbols)


def independent_terms(genome: Genome) -> tuple[int, ...]:
    """Places of terms whose weights can move without changing the structure, the heaviest first.

    No two sets of their weights are one rule: of terms that say the same (two MOMENTUM terms;
    GRAD and MOMENTUM without a first moment; NESTEROV beside both) only the heavier ones are there.
    Nor are terms of weight zero, or that others cancel: to move those would bring back what the
    rule does without.
    """
    update = linear(update_of(genome))
    chosen: list[int] = []
    forms: list[Linear] = []
    for place in sorted(range(len(genome.alphas)), key=lambda place: -abs(genome.alphas[place])):
        form = _form(genome, place)
        if genome.alphas[place] and form.keys() <= update.keys() and _independent([*forms, form]):
            chosen.append(place)
            forms.append(form)
    return tuple(chosen)


def _form(genome: Genome, place: int) -> Linear:
    """The linear form of one term, of weight one, seen as the genome sees it."""
    single = dataclasses.replace(genome, term_types=[genome.term_types[place]], alphas=[1.0])
    return {atom: weight for atom, weight in linear(update_of(single)).items() if atom != terms.p}


def _independent(forms: list[Linear]) -> bool:
    columns = {(atom, product) for form in forms for atom in form for product in form[atom]}
    table = [[form.get(atom, {}).get(product, 0.0) for atom, product in columns] for form in forms]
    return int(np.linalg.matrix_rank(np.array(table))) == len(forms)
