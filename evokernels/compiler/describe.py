"""A genome in words: its rule as formulas with numbers, for people."""

from __future__ import annotations

from evokernels.compiler import terms
from evokernels.compiler.expr import Average, Constant, Expr, Symbol, substitute
from evokernels.compiler.linear import linear, linear_expr
from evokernels.compiler.lower import lower, weighted_terms
from evokernels.compiler.schedule import warms_up
from evokernels.genome import Genome

__all__ = ["formula"]


def formula(genome: Genome, *, named: bool = False) -> str:
    """The rule of one step, a line an assignment; moments that nothing reads are left out.

    Args:
        named: whether learning rate, betas, eps, decay and limit have names instead of numbers.
    """
    rule = lower(genome)
    numbers: dict[Symbol, Expr] = {
        symbol: Constant(terms.genome_scalars(genome, t=1)[symbol.name])
        for symbol in (terms.weight_decay, *terms.BIASES, terms.eps, terms.clip)
    }
    if named:
        decay = {} if genome.weight_decay else {terms.weight_decay: Constant(0.0)}
        numbers = {terms.clip: Symbol("clip_value", per_element=False), **decay}
    # of terms that correct moments themselves
    for beta, bias in terms.BIASES.items():
        numbers[bias] = Symbol(f"(1 - {numbers.get(beta, beta)}^t)", per_element=False)
    lines = _named_schedule(genome) if named else [_schedule(genome)]
    if genome.use_gradient_clipping:
        lines.append(f"g ← {linear_expr(linear(substitute(terms.CLIPPED_GRADIENT, numbers)))}")
    corrected: dict[Symbol, Expr] = {}
    for moment, update, beta in (
        (terms.m, terms.FIRST_MOMENT, terms.beta1),
        (terms.v, terms.SECOND_MOMENT, terms.beta2),
    ):
        if moment.name in rule.program.state:
            lines.append(f"{moment} ← {linear_expr(linear(substitute(update, numbers)))}")
            if genome.use_bias_correction:
                corrected[moment] = Symbol(f"{moment}^", per_element=True)
                lines.append(f"{moment}^ = {moment} / (1 - {numbers.get(beta, beta)}^t)")
    averages: dict[Average, Symbol] = {}
    for operand, average in rule.named_averages.items():
        averages[average] = seen = Symbol(operand, per_element=True)
        new = terms.averaged(average.beta, seen, average.value)
        lines.append(f"{seen} ← {linear_expr(linear(substitute(new, numbers)))}")
        if genome.use_bias_correction:
            averages[average] = corrected_average = Symbol(f"{seen}^", per_element=True)
            beta = substitute(average.beta, numbers)
            lines.append(f"{corrected_average} = {seen} / (1 - {beta}^t)")
    update = linear(substitute(linear_expr(linear(weighted_terms(genome, corrected))), averages))
    update = linear(substitute(linear_expr(update), numbers))
    rate = "lr_t" if named and _named_schedule(genome) else "lr"
    lines.append(f"p ← p - {rate} * ({linear_expr(update)})")
    return "\n".join(lines)


def _schedule(genome: Genome) -> str:
    text = f"lr = {genome.lr:.6g}"
    if genome.use_warmup:
        text += f", reached linearly over {genome.warmup_steps} steps"
    if genome.use_cosine_decay:
        text += ", falling along half a cosine to 0 over the training"
    return text


def _named_schedule(genome: Genome) -> list[str]:
    lines = []
    if warms_up(genome):
        lines.append("lr_t = lr * min(1, t / warmup_steps)")
    if genome.use_cosine_decay:
        rate = "lr_t" if lines else "lr"
        lines.append(f"lr_t = {rate} * (1 + cos(pi * min(t - 1, total_steps) / total_steps)) / 2")
    return lines
