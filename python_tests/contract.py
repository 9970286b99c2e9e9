"""What the contract tests share: the rules they run over, and what a training must come to."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from eager import eager_update
from oracle import assert_near
from torch import nn

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.compiler.evaluate import reference_step
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.kernels.plan import ARITHMETIC

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

TOTAL_STEPS = 7
SHAPES = [(17, 9), (33,), (), (0,), (1,)]

# Everything that a step can depend on.
RICH = Genome(
    term_types=["ADAM_TERM", "SIGN_GRAD", "NESTEROV", "SQRT_GRAD"],
    alphas=[1.0, 0.3, -0.5, 0.2],
    lr_log10=-2,
    eps_log10=-3,
    wd_log10=-1,
    use_gradient_clipping=True,
    use_warmup=True,
    warmup_steps=4,
    use_cosine_decay=True,
)

PRESETS = {
    "sgd": Genome(term_types=["GRAD"], lr_log10=-2, wd_log10=-math.inf),
    "momentum": zoo.sgd_momentum,
    "rmsprop": zoo.rmsprop,
    "adam": zoo.adam,
    "adamw": zoo.adamw,
    "sign": Genome(term_types=["SIGN_GRAD"], lr_log10=-2, wd_log10=-2),
    # the published warmup is longer than these tests train
    "evolved_2025": dataclasses.replace(zoo.evolved_2025, warmup_steps=3),
}

# The same rules in torch.optim, where it has them.
TORCH = {
    "sgd": lambda ps, **kw: torch.optim.SGD(ps, **{"lr": 1e-2, **kw}),
    "momentum": lambda ps, **kw: torch.optim.SGD(ps, **{"lr": 1e-3, "momentum": 0.9, **kw}),
    "rmsprop": lambda ps, **kw: torch.optim.RMSprop(ps, **{"lr": 1e-3, **kw}),
    "adam": lambda ps, **kw: torch.optim.Adam(ps, **{"lr": 1e-3, **kw}),
    "adamw": lambda ps, **kw: torch.optim.AdamW(ps, **{"lr": 1e-3, **kw}),
}

Gradients = Sequence[torch.Tensor | None]


def ours(params, rule, **options) -> FusedEvolvedOptimizer:
    """An optimizer for a preset, by name, or a genome."""
    genome = PRESETS.get(rule, rule) if isinstance(rule, str) else rule
    return FusedEvolvedOptimizer(params, genome, **{"total_steps": TOTAL_STEPS, **options})


def parameter(*shape, seed=0, dtype=torch.float64) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(values.to(dtype))


def gradients(count, p, seed=100) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for _ in range(count)
    ]


def train(optimizer, *columns) -> None:
    """One step for each row of gradients; a column is (parameter, its gradients or None)."""
    for row in zip(*(gs for _, gs in columns), strict=True):
        for (p, _), g in zip(columns, row, strict=True):
            p.grad = g
        optimizer.step()


def snapshot(optimizer) -> bytes:
    """Parameters and state as they are now, in a form that == compares bit by bit."""
    buffer = io.BytesIO()
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    torch.save((parameters, optimizer.state_dict()), buffer)
    return buffer.getvalue()


def definition(genome, start, gs: Gradients, lrs=None) -> np.ndarray:
    """The parameter after these gradients as the float64 definition has it.

    Args:
        gs: None leaves the parameter alone and counts no step.
        lrs: the learning rate of each row, before the genome's own schedule; its own by default.
    """
    p = start.detach().double().numpy().astype(np.longdouble)
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    for row, g in enumerate(gs):
        if g is None:
            continue
        factor = learning_rate_factor(genome, t, TOTAL_STEPS)
        factor *= lrs[row] / genome.lr if lrs else 1.0
        t += 1
        p, m, v = reference_step(genome, p, g.double().numpy().astype(p.dtype), m, v, t, factor)
    return p


def yardstick(genome, start, gs: Gradients, moments=None) -> torch.Tensor:
    """The parameter after single torch calls in the arithmetic of its dtype.

    Args:
        moments: the dtype to which moments are rounded after each step; the arithmetic's by default
    """
    arithmetic = ARITHMETIC[start.dtype]
    stored, t = start.detach().clone(), 0
    m = torch.zeros_like(stored, dtype=arithmetic)
    v = m.clone()
    for g in gs:
        if g is None:
            continue
        lr = genome.lr * learning_rate_factor(genome, t, TOTAL_STEPS)
        t += 1
        p = stored.to(arithmetic)
        eager_update(genome, p, g.to(arithmetic), m, v, t, lr)
        stored = p.to(start.dtype)
        for moment in (m, v) if moments else ():
            moment.copy_(moment.to(moments))
    return stored


def trained_by_torch(name, start, gs: Gradients, **options) -> np.ndarray:
    """The parameter after these gradients as torch.optim has it, in float64."""
    p = nn.Parameter(start.detach().double())
    train(TORCH[name]([p], **options), (p, [g if g is None else g.double() for g in gs]))
    return p.detach().numpy()


def assert_trained(p, genome, start, gs: Gradients, what, exact=None, moments=None) -> None:
    """By the rule of cases.py: against the definition, or against `exact`."""
    exact = definition(genome, start, gs) if exact is None else exact
    eager = yardstick(genome, start, gs, moments).flatten()
    assert_near(p.detach().flatten(), np.reshape(exact, -1), eager, start.dtype, what)


def twins(*shapes, dtype=FP64):
    """Two lists of equal parameters."""
    ps = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    return ps, copy.deepcopy(ps)


def assert_same(ps, qs, what=None):
    for p, q in zip(ps, qs, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0, equal_nan=True, msg=what)


def assert_same_training(a, b):
    """Parameters and state of two optimizers, bit by bit."""
    pairs = [[p for group in o.param_groups for p in group["params"]] for o in (a, b)]
    assert_same(*pairs)
    for p, q in zip(*pairs, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert_same(list(a.state[p].values()), [b.state[q][name] for name in a.state[p]])


def assert_close(actual, expected):
    expected = torch.as_tensor(np.asarray(expected, dtype=np.float64))
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=1e-14)
