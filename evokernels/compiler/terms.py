"""THE catalogue: every formula of an update step, once. Everything else derives from these lines.

Per element of a parameter ``p`` with gradient ``g`` and moments ``m`` and ``v``; ARCHITECTURE.md,
"The rule", says in which order and under which flags they apply.
"""

import math
from collections.abc import Mapping

from evokernels.compiler import schedule
from evokernels.compiler.expr import (
    Average,
    Constant,
    Expr,
    Symbol,
    clamp,
    compiled,
    expm1,
    minimum,
    sign,
    sqrt,
    tanh,
    where,
)
from evokernels.genome import Genome, OwnTerm, Term

g, m, v, p = (Symbol(name, per_element=True) for name in "gmvp")
# for terms alone: the moments corrected whatever the flag says, and the first one before this step
m_hat, v_hat, m_before = (Symbol(name, per_element=True) for name in ("m_hat", "v_hat", "m_before"))

# one value a step: what they are is in `scalar_values`; lr is the scheduled learning rate
lr, weight_decay, eps, clip = (
    Symbol(name, per_element=False) for name in ("lr", "weight_decay", "eps", "clip")
)
beta1, beta2, beta3, bias1, bias2, bias3, log_beta1, log_beta2, log_beta3 = (
    Symbol(f"{name}{i}", per_element=False)
    for name in ("beta", "bias", "log_beta")
    for i in (1, 2, 3)
)
# how far the training is, for terms that ask
progress = Symbol("progress", per_element=False)
# no part of the rule: what the training loop does to all gradients of a step
gradient_factor = Symbol("gradient_factor", per_element=False)

# what these are made of, in step t
base_lr, direction, grad_scale, max_norm, squares = (
    Symbol(name, per_element=False)
    for name in ("base_lr", "direction", "grad_scale", "max_norm", "squares")
)

# What an average with each of these betas is divided by to correct its bias.
BIASES: Mapping[Symbol, Symbol] = {beta1: bias1, beta2: bias2, beta3: bias3}

# Kingma & Ba 2015, Algorithm 1: 1 - beta^t, without its cancellation
CORRECTIONS: Mapping[Symbol, Expr] = {
    bias1: -expm1(schedule.t * log_beta1),
    bias2: -expm1(schedule.t * log_beta2),
    bias3: -expm1(schedule.t * log_beta3),
}

# Unscaled, limited to `max_norm` by the root of `squares`, the sum of the squares of all gradients
# as they come (torch.nn.utils.clip_grad_norm_; Pascanu et al. 2013, Algorithm 1), up or down.
_unscale = 1.0 / grad_scale
GRADIENT_FACTOR = direction * (
    _unscale * minimum(1.0, max_norm / (sqrt(squares) * _unscale + 1e-6))
)

# Every scalar that a step derives from its inputs.
DERIVED: Mapping[Symbol, Expr] = {
    lr: base_lr * schedule.FACTOR,
    **CORRECTIONS,
    progress: schedule.PROGRESS,
    gradient_factor: GRADIENT_FACTOR,
}

# before anything else: every formula below sees the scaled gradient as g
SCALED_GRADIENT = gradient_factor * g

CLIPPED_GRADIENT = clamp(g, -clip, clip)


def averaged(beta: Expr, before: Expr, value: Expr) -> Expr:
    """An exponential moving average after one more value (Kingma & Ba 2015, Algorithm 1)."""
    return beta * before + (1 - beta) * value


FIRST_MOMENT = averaged(beta1, m, g)
SECOND_MOMENT = beta2 * v + (1 - beta2) * g * g
CORRECTED_M = m / bias1
CORRECTED_V = v / bias2


def bias_of(beta: Expr) -> Expr:
    """What an average with this beta is divided by to correct its bias."""
    if isinstance(beta, Constant):
        return -expm1(schedule.t * math.log(beta.value))
    return BIASES[beta]


# Loshchilov & Hutter 2019, Algorithm 2: decay apart from the gradient. p - lr * (wd * p) and not
# p * (1 - lr * wd): in float32 1 - 1e-7 is off by a fifth of the decay.
DECAY = weight_decay * p

# What derived scalars are made of besides `schedule.t`, which every parameter counts for itself:
# what is the same for all groups of a step, and what a group of parameters brings to it.
STEP_INPUTS = (grad_scale, max_norm, squares)
GROUP_INPUTS = (
    *(base_lr, weight_decay, beta1, beta2, log_beta1, log_beta2, eps, clip, direction),
    *(schedule.warmup_steps, schedule.total_steps, schedule.training_steps),
    *(beta3, log_beta3),  # of groups whose rule reads them
)

# What a term sees as m and v is the corrected moment, or what stands in for an unused one. Within
# an average it is the moment itself.
CATALOGUE: dict[Term, Expr] = {
    Term.GRAD: g,
    Term.MOMENTUM: m,
    Term.RMS_NORM: g / (sqrt(v) + eps),
    Term.ADAM_TERM: m / (sqrt(v) + eps),
    Term.SIGN_GRAD: sign(g),
    Term.SQRT_GRAD: g / (abs(g) + eps),
    Term.NESTEROV: m + 0.9 * (g - m),
    # the wide catalogue
    Term.SIGN_MOMENTUM: sign(m),
    # Chen et al. 2023, Algorithm 2, whose beta2 is beta1 here, and whose beta1 is 0.9
    Term.LION: sign(0.9 * m_before + 0.1 * g),
    # Liang et al. 2024, Algorithm 1, without the factor that makes up for what is masked: that
    # would be another pass over the tensor
    Term.CAUTIOUS_MOMENTUM: where(g * sign(m) > 0, m, 0.0),
    Term.CAUTIOUS_ADAM: where(g * sign(m) > 0, m, 0.0) / (sqrt(v) + eps),
    # Zhuang et al. 2020, Algorithm 2
    Term.BELIEF: m / (sqrt(Average((g - m) ** 2, beta2)) + eps),
    Term.TANH_GRAD: tanh(g),
    Term.RMS_ABS: g / (abs(m) + eps),
}
UNUSED_M = g
UNUSED_V = g * g


def formula_of(term: Term | OwnTerm) -> Expr:
    """What a term adds to the update, times its weight."""
    return term.formula if isinstance(term, OwnTerm) else CATALOGUE[term]


def scalar_values(
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    clip: float,
    t: int,
    gradient_factor: float = 1.0,
    training_steps: float = math.inf,
) -> dict[str, float]:
    """The values of the scalar symbols, by name, in step `t` (from 1) of `training_steps`."""
    betas = {"beta1": beta1, "beta2": beta2, "beta3": beta3}
    logarithms = {f"log_{name}": log_of(beta) for name, beta in betas.items()}
    corrections = _corrections(t=t, **logarithms)
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        **betas,
        **{bias.name: x for bias, x in zip(CORRECTIONS, corrections, strict=True)},
        "eps": eps,
        "clip": clip,
        "progress": _progress(t=float(t), training_steps=training_steps)[0],
        "t": t,
        "gradient_factor": gradient_factor,
    }


_corrections = compiled(*CORRECTIONS.values())
_progress = compiled(schedule.PROGRESS)


def log_of(beta: float) -> float:
    """The natural logarithm, -infinity of 0."""
    return math.log(beta) if beta else -math.inf


def genome_scalars(
    genome: Genome, t: int, lr_factor: float = 1.0, training_steps: float = math.inf
) -> dict[str, float]:
    """`scalar_values` of a genome, with `lr_factor` of its learning rate."""
    return scalar_values(
        lr=genome.lr * lr_factor,
        weight_decay=genome.weight_decay,
        beta1=genome.beta1,
        beta2=genome.beta2,
        beta3=genome.beta3,
        eps=genome.eps,
        clip=genome.clip_value,
        t=t,
        training_steps=training_steps,
    )
