"""Named genomes: the four baselines of the source system, its published result, our own, and three
of the wide catalogue.

Also its two networks as architectures.

The baselines coincide with torch.optim (python_tests/test_reference.py holds them to it):
``rmsprop`` with ``RMSprop(lr=1e-3, alpha=0.99)``, ``adam`` with ``Adam(lr=1e-3)``, ``adamw`` with
``AdamW(lr=1e-3, weight_decay=1e-2)`` and ``sgd_momentum`` with ``SGD(lr=1e-3, momentum=0.9)``: the
first moment is an average, ten times smaller than torch's sum, so lr 1e-2 here is lr 1e-3 there.
"""

import math

from evokernels.architecture import Architecture
from evokernels.genome import Genome, Term

__all__ = [
    "ARCHITECTURES",
    "GENOMES",
    "WIDE",
    "adabelief",
    "adam",
    "adamw",
    "cautious_adam",
    "cifar_cnn",
    "evolved_2025",
    "evolved_2026",
    "lion",
    "rmsprop",
    "sgd_momentum",
    "small_cnn",
]

sgd_momentum = Genome(
    term_types=[Term.MOMENTUM],
    lr_log10=-2.0,
    wd_log10=-math.inf,
    use_v=False,
    use_bias_correction=False,
)

rmsprop = Genome(
    term_types=[Term.RMS_NORM],
    beta2=0.99,
    wd_log10=-math.inf,
    use_m=False,
    use_bias_correction=False,
)

adam = Genome(term_types=[Term.ADAM_TERM], wd_log10=-math.inf)

adamw = Genome(term_types=[Term.ADAM_TERM], wd_log10=-2.0)

# M. Marfinetz, "Evolutionary Optimizer Discovery", 2025, section 8: all digits, all flags.
evolved_2025 = Genome(
    term_types=[Term.SIGN_GRAD, Term.SIGN_GRAD, Term.ADAM_TERM, Term.ADAM_TERM],
    alphas=[0.41205802174892475, 0.32238621456272765, 2.0030004279455267, 1.6322011630060542],
    lr_log10=-2.9198932483267144,
    beta1=0.8553020861538518,
    beta2=0.9357561078635277,
    eps_log10=-8.26423960220415,
    wd_log10=-3.0112238437153316,
    use_m=True,
    use_v=True,
    use_bias_correction=False,
    use_gradient_clipping=False,
    use_warmup=True,
    warmup_steps=100,
    use_cosine_decay=True,
)

# The winner of bench/results/paper: four Adam terms, which are one.
evolved_2026 = Genome(
    term_types=[Term.ADAM_TERM, Term.ADAM_TERM, Term.ADAM_TERM, Term.ADAM_TERM],
    alphas=[0.7151711091615751, 1.052861791231629, -0.010251099229753754, 0.7968245553222923],
    lr_log10=-3.130986606840545,
    beta1=0.6032826292699346,
    beta2=0.8937168818803995,
    eps_log10=-8.166371547235908,
    wd_log10=-2.0,
    use_m=True,
    use_v=True,
    use_bias_correction=False,
    use_gradient_clipping=False,
    clip_value=1.2271999233493838,
    use_warmup=True,
    warmup_steps=97,
    use_cosine_decay=True,
)

# Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2: betas 0.9 (in the
# term) and 0.99; learning rate and decay are those of its reference implementation and section 5.
lion = Genome(
    term_types=[Term.LION],
    lr_log10=-4.0,
    beta1=0.99,
    wd_log10=-1.0,
    use_v=False,
    use_bias_correction=False,
)

# Zhuang et al. 2020, "AdaBelief Optimizer", Algorithm 2, without the eps that it adds to the second
# moment in every step.
adabelief = Genome(term_types=[Term.BELIEF], use_v=False, wd_log10=-math.inf)

# Liang et al. 2024, "Cautious Optimizers", Algorithm 1, without the factor that makes up for what
# is masked.
cautious_adam = Genome(term_types=[Term.CAUTIOUS_ADAM], wd_log10=-2.0)

GENOMES = {
    "sgd_momentum": sgd_momentum,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "evolved_2025": evolved_2025,
    "evolved_2026": evolved_2026,
}

# Of terms of the wide catalogue, for which a kernel is compiled when they are first used.
WIDE = {"lion": lion, "adabelief": adabelief, "cautious_adam": cautious_adam}

# On grey images of 28×28 the layers of `evokernels.tasks.SmallCNN`: 824,458 parameters.
small_cnn = Architecture(
    components=[
        *("conv3x3 32", "relu", "maxpool"),
        *("conv3x3 64", "relu", "maxpool"),
        *("dense 256", "relu", "dropout 0.3"),
    ]
)

# On colour images of 32×32 the layers of `evokernels.tasks.CifarCNN`: 2,168,554 parameters.
cifar_cnn = Architecture(
    components=[
        *("conv3x3 32", "batchnorm", "relu", "conv3x3 32", "relu", "maxpool", "dropout 0.25"),
        *("conv3x3 64", "batchnorm", "relu", "conv3x3 64", "relu", "maxpool", "dropout 0.25"),
        *("dense 512", "relu", "dropout 0.5"),
    ],
    max_parameters=2_500_000,
)

ARCHITECTURES = {"small_cnn": small_cnn, "cifar_cnn": cifar_cnn}
