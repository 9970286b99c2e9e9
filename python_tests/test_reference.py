"""The float64 reference against values worked out by hand, and against torch.optim."""

import math

import numpy as np
import pytest
import torch
from eager import eager_update
from oracle import random_genome

from evokernels import Genome, Term, zoo
from evokernels.compiler.evaluate import reference_step, run_program
from evokernels.compiler.lower import lower
from evokernels.compiler.terms import genome_scalars
from evokernels.genome import CATALOGUES

# One element: p = 2, g = -0.5, m = 0.25, v = 0.09 before step t = 2; with beta1 = 0.5 and
# beta2 = 0.75 and eps = 0.001:
#   m' = 0.5 * 0.25 + 0.5 * -0.5  = -0.125      bias1 = 1 - 0.25   = 0.75
#   v' = 0.75 * 0.09 + 0.25 * 0.25 = 0.13       bias2 = 1 - 0.5625 = 0.4375
M, V, EPS = -0.125, 0.13, 0.001
PLAIN = {
    "lr_log10": -1,
    "beta1": 0.5,
    "beta2": 0.75,
    "eps_log10": -3,
    "wd_log10": -math.inf,
    "use_bias_correction": False,
}

BY_HAND = [
    # term, changed genes, the value of the term
    (Term.GRAD, {}, -0.5),
    (Term.MOMENTUM, {}, M),
    (Term.MOMENTUM, {"use_m": False}, -0.5),
    (Term.MOMENTUM, {"use_bias_correction": True}, M / 0.75),
    (Term.RMS_NORM, {}, -0.5 / (math.sqrt(V) + EPS)),
    (Term.RMS_NORM, {"use_v": False}, -0.5 / (0.5 + EPS)),
    (Term.RMS_NORM, {"use_bias_correction": True}, -0.5 / (math.sqrt(V / 0.4375) + EPS)),
    (Term.ADAM_TERM, {}, M / (math.sqrt(V) + EPS)),
    (Term.ADAM_TERM, {"use_m": False}, -0.5 / (math.sqrt(V) + EPS)),
    (Term.ADAM_TERM, {"use_v": False}, M / (0.5 + EPS)),
    (Term.ADAM_TERM, {"use_bias_correction": True}, M / 0.75 / (math.sqrt(V / 0.4375) + EPS)),
    (Term.ADAM_TERM, {"use_bias_correction": True, "use_m": False, "use_v": False}, -0.5 / 0.501),
    (Term.SIGN_GRAD, {}, -1.0),
    (Term.SQRT_GRAD, {}, -0.5 / (0.5 + EPS)),
    (Term.NESTEROV, {}, M + 0.9 * (-0.5 - M)),
    (Term.NESTEROV, {"use_m": False}, -0.5),
    (Term.NESTEROV, {"use_bias_correction": True}, M / 0.75 + 0.9 * (-0.5 - M / 0.75)),
    # clipped to -0.2 before everything else: m' = 0.125 - 0.1
    (Term.GRAD, {"use_gradient_clipping": True, "clip_value": 0.2}, -0.2),
    (Term.MOMENTUM, {"use_gradient_clipping": True, "clip_value": 0.2}, 0.025),
    (Term.SIGN_GRAD, {"use_gradient_clipping": True, "clip_value": 0.2}, -1.0),
]


def one(genome, g=-0.5, t=2, lr_factor=1.0, gradient_factor=1.0):
    arrays = [np.array([x]) for x in (2.0, g, 0.25, 0.09)]
    return [float(x[0]) for x in reference_step(genome, *arrays, t, lr_factor, gradient_factor)]


@pytest.mark.parametrize(("term", "genes", "value"), BY_HAND)
def test_term_by_hand(term, genes, value):
    p, m, v = one(Genome(term_types=[term], alphas=[3.0], **{**PLAIN, **genes}))
    assert p == pytest.approx(2 - 0.1 * 3 * value, rel=1e-14)
    clipped = genes.get("use_gradient_clipping", False)
    g = -0.2 if clipped else -0.5
    expected_m = 0.125 + 0.5 * g if genes.get("use_m", True) else 0.25
    expected_v = 0.0675 + 0.25 * g * g if genes.get("use_v", True) else 0.09
    assert (m, v) == (pytest.approx(expected_m, rel=1e-14), pytest.approx(expected_v, rel=1e-14))


def test_the_gradient_is_scaled_before_it_is_clipped():
    genome = Genome(
        term_types=["GRAD"], **PLAIN, use_v=False, use_gradient_clipping=True, clip_value=0.2
    )
    for factor, g in ((-1.0, 0.2), (0.25, -0.125), (10.0, -0.2), (0.0, 0.0)):
        p, m, _ = one(genome, gradient_factor=factor)
        assert (p, m) == (pytest.approx(2 - 0.1 * g), pytest.approx(0.125 + 0.5 * g)), factor
    # a factor of zero is a number like any other, not the absence of the gradient
    assert math.isnan(one(genome, g=math.inf, gradient_factor=0.0)[0])


def test_decay_and_schedule_by_hand():
    genome = Genome(**{**PLAIN, "wd_log10": -1})
    # lr 0.1 * 0.5, decay 0.1: 2 * (1 - 0.005) + 0.05 * 0.5
    assert one(genome, lr_factor=0.5)[0] == pytest.approx(2 * 0.995 + 0.025, rel=1e-14)


def test_terms_add_up_with_their_weights():
    genome = Genome(term_types=["GRAD", "SIGN_GRAD", "GRAD"], alphas=[1.0, 0.5, 2.0], **PLAIN)
    assert one(genome)[0] == pytest.approx(2 + 0.1 * (0.5 + 0.5 + 1.0), rel=1e-14)


@pytest.mark.parametrize(("g", "expected"), [(0.0, 0.0), (-0.0, 0.0), (3.0, 1.0), (math.nan, None)])
def test_sign(g, expected):
    p, _, _ = one(Genome(term_types=["SIGN_GRAD"], **PLAIN), g=g)
    assert math.isnan(p) if expected is None else p == 2 - 0.1 * expected


@pytest.mark.parametrize("term", CATALOGUES["classic"])
def test_not_a_number_is_never_hidden(term):
    assert math.isnan(one(Genome(term_types=[term], **PLAIN), g=math.nan)[0])


TORCH = [
    # the torch optimizers with which the rules coincide, decay included
    (zoo.adam, lambda p: torch.optim.Adam(p, lr=1e-3)),
    (zoo.adamw, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2)),
    (zoo.rmsprop, lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.99)),
    (zoo.sgd_momentum, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
    (
        Genome(term_types=["GRAD"], alphas=[0.5], lr_log10=-1, wd_log10=-math.inf),
        lambda p: torch.optim.SGD(p, lr=0.05),
    ),
    (
        Genome(term_types=["ADAM_TERM"], beta1=0.8, beta2=0.9, eps_log10=-4, wd_log10=-1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize(("genome", "make"), TORCH)
def test_matches_torch_optim(genome, make):
    rng = np.random.default_rng(0)
    p = rng.standard_normal(500)
    m, v = np.zeros_like(p), np.zeros_like(p)
    parameter = torch.from_numpy(p.copy()).requires_grad_()
    optimizer = make([parameter])
    for t in range(1, 30):
        g = rng.standard_normal(500) * 10.0 ** rng.integers(-4, 2)
        p, m, v = reference_step(genome, p, g, m, v, t)
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
    np.testing.assert_allclose(p, parameter.detach().numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seed", range(300))
def test_compiled_program_and_source_system_agree_with_the_reference(seed):
    """Three independent roads in float64: definition, compiler, and the source's eager update."""
    genome = random_genome(seed)
    rule = lower(genome)
    rng = np.random.default_rng(seed)
    p, m, v = rng.standard_normal(50), np.zeros(50), np.zeros(50)
    compiled = {"p": p, "m": m, "v": v}
    eager = [torch.from_numpy(x.copy()) for x in (p, m, v)]
    for t in range(1, 5):
        g = rng.standard_normal(50)
        factor = (1.0, -1.0, 0.25, 1 / 3)[t - 1]
        p, m, v = reference_step(genome, p, g, m, v, t, gradient_factor=factor)
        compiled["g"] = g
        scalars = {**genome_scalars(genome, t), "gradient_factor": factor}
        compiled.update(run_program(rule.program, compiled, rule.numbers(**scalars)))
        eager_update(genome, eager[0], torch.from_numpy(factor * g), *eager[1:], t, genome.lr)
        np.testing.assert_allclose(compiled["p"], p, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(eager[0].numpy(), p, rtol=1e-11, atol=1e-12)
        for name, exact in (("m", m), ("v", v)):
            if name in rule.program.state:
                np.testing.assert_allclose(compiled[name], exact, rtol=1e-12, atol=1e-15)
