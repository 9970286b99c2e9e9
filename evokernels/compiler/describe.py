"""A genome in words: its rule as formulas with numbers, for people."""

from __future__ import annotations

from evokernels.compiler import terms
from evokernels.compiler.expr import Average, Constant, Expr, Symbol, substitute
from evokernels.compiler.linear import linear, linear_expr
from evokernels.compiler.lower import lower, weighted_terms
from evokernels.compiler.program import AVERAGES
from evokernels.genome import Genome

__all__ = ["formula"]


def formula(genome: Genome) -> str:
    """The rule of one step, a line an assignment; moments that nothing reads are left out."""
    rule = lower(genome)
    numbers: dict[Symbol, Expr] = {
        symbol: Constant(terms.genome_scalars(genome, t=1)[symbol.name])
        for symbol in (terms.weight_decay, terms.beta1, terms.beta2, terms.eps, terms.clip)
    }
    # of terms that correct moments themselves
    for bias, beta in ((terms.bias1, genome.beta1), (terms.bias2, genome.beta2)):
        numbers[bias] = Symbol(f"(1 - {beta:.6g}^t)", per_element=False)
    lines = [_schedule(genome)]
    if genome.use_gradient_clipping:
        lines.append(f"g ← {linear_expr(linear(substitute(terms.CLIPPED_GRADIENT, numbers)))}")
    corrected: dict[Symbol, Expr] = {}
    for moment, update, beta in (
        (terms.m, terms.FIRST_MOMENT, genome.beta1),
        (terms.v, terms.SECOND_MOMENT, genome.beta2),
    ):
        if moment.name in rule.program.state:
            lines.append(f"{moment} ← {linear_expr(linear(substitute(update, numbers)))}")
            if genome.use_bias_correction:
                corrected[moment] = Symbol(f"{moment}^", per_element=True)
                lines.append(f"{moment}^ = {moment} / (1 - {beta:.6g}^t)")
    averages: dict[Average, Symbol] = {}
    for operand, average in zip(AVERAGES, rule.averages, strict=False):
        averages[average] = seen = Symbol(operand, per_element=True)
        new = terms.averaged(average.beta, seen, average.value)
        lines.append(f"{seen} ← {linear_expr(linear(substitute(new, numbers)))}")
        if genome.use_bias_correction:
            averages[average] = corrected_average = Symbol(f"{seen}^", per_element=True)
            beta = substitute(average.beta, numbers)
            lines.append(f"{corrected_average} = {seen} / (1 - {beta}^t)")
    update = linear(substitute(linear_expr(linear(weighted_terms(genome, corrected))), averages))
    update = linear(substitute(linear_expr(update), numbers))
    lines.append(f"p ← p - lr * ({linear_expr(update)})")
    return "\n".join(lines)


def _schedule(genome: Genome) -> str:
    text = f"lr = {genome.lr:.6g}"
    if genome.use_warmup:
        text += f", reached linearly over {genome.warmup_steps} steps"
    if genome.use_cosine_decay:
        text += ", falling along half a cosine to 0 over the training"
    return text
