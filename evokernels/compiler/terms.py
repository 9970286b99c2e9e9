"""THE catalogue: every formula of an update step, once. Everything else derives from these lines.

Per element of a parameter ``p`` with gradient ``g`` and moments ``m`` and ``v``; ARCHITECTURE.md,
"The rule", says in which order and under which flags they apply.
"""

import math
from collections.abc import Mapping

from evokernels.compiler import schedule
from evokernels.compiler.expr import Expr, Symbol, clamp, compiled, expm1, minimum, sign, sqrt
from evokernels.genome import Genome, Term

g, m, v, p = (Symbol(name, per_element=True) for name in "gmvp")

# one value a step: what they are is in `scalar_values`; lr is the scheduled learning rate
lr, weight_decay, beta1, beta2, bias1, bias2, eps, clip = (
    Symbol(name, per_element=False)
    for name in ("lr", "weight_decay", "beta1", "beta2", "bias1", "bias2", "eps", "clip")
)
# no part of the rule: what the training loop does to all gradients of a step
gradient_factor = Symbol("gradient_factor", per_element=False)

# what these are made of, in step t
base_lr, log_beta1, log_beta2, direction, grad_scale, max_norm, squares = (
    Symbol(name, per_element=False)
    for name in (
        *("base_lr", "log_beta1", "log_beta2", "direction", "grad_scale", "max_norm", "squares"),
    )
)

# Kingma & Ba 2015, Algorithm 1: 1 - beta^t, without its cancellation
BIAS1 = -expm1(schedule.t * log_beta1)
BIAS2 = -expm1(schedule.t * log_beta2)

# Unscaled, limited to `max_norm` by the root of `squares`, the sum of the squares of all gradients
# as they come (torch.nn.utils.clip_grad_norm_; Pascanu et al. 2013, Algorithm 1), up or down.
_unscale = 1.0 / grad_scale
GRADIENT_FACTOR = direction * (
    _unscale * minimum(1.0, max_norm / (sqrt(squares) * _unscale + 1e-6))
)

# Every scalar that a step derives from its inputs.
DERIVED: Mapping[Symbol, Expr] = {
    lr: base_lr * schedule.FACTOR,
    bias1: BIAS1,
    bias2: BIAS2,
    gradient_factor: GRADIENT_FACTOR,
}

# before anything else: every formula below sees the scaled gradient as g
SCALED_GRADIENT = gradient_factor * g

CLIPPED_GRADIENT = clamp(g, -clip, clip)

# Kingma & Ba 2015, Algorithm 1
FIRST_MOMENT = beta1 * m + (1 - beta1) * g
SECOND_MOMENT = beta2 * v + (1 - beta2) * g * g
CORRECTED_M = m / bias1
CORRECTED_V = v / bias2

# Loshchilov & Hutter 2019, Algorithm 2: decay apart from the gradient. p - lr * (wd * p) and not
# p * (1 - lr * wd): in float32 1 - 1e-7 is off by a fifth of the decay.
DECAY = weight_decay * p

# What derived scalars are made of besides `schedule.t`, which every parameter counts for itself:
# what is the same for all groups of a step, and what a group of parameters brings to it.
STEP_INPUTS = (grad_scale, max_norm, squares)
GROUP_INPUTS = (
    *(base_lr, weight_decay, beta1, beta2, log_beta1, log_beta2, eps, clip, direction),
    *(schedule.warmup_steps, schedule.total_steps),
)

# What a term sees as m and v is the corrected moment, or what stands in for an unused one.
CATALOGUE = {
    Term.GRAD: g,
    Term.MOMENTUM: m,
    Term.RMS_NORM: g / (sqrt(v) + eps),
    Term.ADAM_TERM: m / (sqrt(v) + eps),
    Term.SIGN_GRAD: sign(g),
    Term.SQRT_GRAD: g / (abs(g) + eps),
    Term.NESTEROV: m + 0.9 * (g - m),
}
UNUSED_M = g
UNUSED_V = g * g


def scalar_values(
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    t: int,
    gradient_factor: float = 1.0,
) -> dict[str, float]:
    """The values of the scalar symbols, by name, in step `t` (from 1)."""
    corrections = _corrections(t=t, log_beta1=log_of(beta1), log_beta2=log_of(beta2))
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "beta1": beta1,
        "beta2": beta2,
        "bias1": corrections[0],
        "bias2": corrections[1],
        "eps": eps,
        "clip": clip,
        "gradient_factor": gradient_factor,
    }


_corrections = compiled(BIAS1, BIAS2)


def log_of(beta: float) -> float:
    """The natural logarithm, -infinity of 0."""
    return math.log(beta) if beta else -math.inf


def genome_scalars(genome: Genome, t: int, lr_factor: float = 1.0) -> dict[str, float]:
    """The same for a genome, with `lr_factor` of its learning rate."""
    return scalar_values(
        lr=genome.lr * lr_factor,
        weight_decay=genome.weight_decay,
        beta1=genome.beta1,
        beta2=genome.beta2,
        eps=genome.eps,
        clip=genome.clip_value,
        t=t,
    )
