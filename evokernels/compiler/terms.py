"""THE catalogue: every formula of an update step, once. Everything else derives from these lines.

Per element of a parameter ``p`` with gradient ``g`` and moments ``m`` and ``v``; ARCHITECTURE.md,
"The rule", says in which order and under which flags they apply.
"""

from evokernels.compiler.expr import Symbol, clamp, sign, sqrt
from evokernels.genome import Genome, Term

g, m, v, p = (Symbol(name, per_element=True) for name in "gmvp")

# one value a step: what they are is in `scalar_values`; lr is the scheduled learning rate
lr, weight_decay, beta1, beta2, bias1, bias2, eps, clip = (
    Symbol(name, per_element=False)
    for name in ("lr", "weight_decay", "beta1", "beta2", "bias1", "bias2", "eps", "clip")
)
# no part of the rule: what the training loop does to all gradients of a step
gradient_factor = Symbol("gradient_factor", per_element=False)

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
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "beta1": beta1,
        "beta2": beta2,
        # Kingma & Ba 2015, Algorithm 1; in float64: in float32 1 - beta2 loses ten bits
        "bias1": 1.0 - beta1**t,
        "bias2": 1.0 - beta2**t,
        "eps": eps,
        "clip": clip,
        "gradient_factor": gradient_factor,
    }


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
