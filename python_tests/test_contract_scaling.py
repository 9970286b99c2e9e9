"""Gradients that come scaled, infinite or too long: GradScaler and max_grad_norm.

Held against `GradScaler.unscale_` and `clip_grad_norm_`, and against the definition in float64.
"""

import copy
import math
import pickle

import pytest
import torch
from contract import (
    BF16,
    FP16,
    FP32,
    FP64,
    PRESETS,
    SHAPES,
    assert_same,
    assert_same_training,
    assert_trained,
    definition,
    gradients,
    ours,
    parameter,
    snapshot,
    train,
    twins,
)
from oracle import DTYPES
from torch.nn.utils import clip_grad_norm_

from evokernels import Genome, zoo

# shows the scale of its gradients, where Adam and sign do not
GRAD = Genome(term_types=["GRAD"], lr_log10=-1, wd_log10=-math.inf)


# Gradient scaling


def scaled_loss(scaler, ps, gs):
    """A loss whose gradients are `gs` times the scale."""
    return scaler.scale(sum((p.float() * g.float()).sum() for p, g in zip(ps, gs, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", PRESETS)
def test_a_scaler_trains_as_if_there_were_none(backend, rule, dtype):
    p = parameter(40, dtype=dtype)
    start = p.detach().clone()
    # of few digits: what the loss makes of them is exact
    gs = [(16 * g).round() / 16 for g in gradients(6, p)]
    optimizer = ours([p], rule, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    scales, counts = [], []
    for t, g in enumerate(gs):
        optimizer.zero_grad()
        infinite = t in (0, 3)  # the very first step, and a later one
        factor = torch.full_like(g, math.inf if t else math.nan) if infinite else g
        before = snapshot(optimizer) if t else p.detach().clone()
        scaled_loss(scaler, [p], [factor]).backward()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()
        if t == 0:
            assert torch.equal(p, before)
        elif infinite:
            assert snapshot(optimizer) == before
        scales.append(scaler.get_scale())
        counts.append(float(optimizer.state[p].get("step", 0)))
    assert scales == [32, 32, 32, 16, 16, 16]
    assert counts == [0, 1, 2, 2, 3, 4]
    done = [g for t, g in enumerate(gs) if t not in (0, 3)]
    assert_trained(p, PRESETS[rule], start, done, rule)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)  # torch unscales no fp16
@pytest.mark.parametrize("rule", PRESETS)
def test_unscaling_before_is_the_same(backend, rule, dtype):
    (p,), (q,) = twins((70,), dtype=dtype)
    ours_alone, after_unscale = (ours([x], rule, backend=backend) for x in (p, q))
    for optimizer, x in ((ours_alone, p), (after_unscale, q)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for t, g in enumerate(gradients(4, x)):
            x.grad = g * 2.0**12
            if t == 1:
                x.grad[3] = math.inf
            scaler.scale(torch.zeros(()))  # makes the scaler's tensor, as a loss would
            if optimizer is after_unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(2.0**12)
        assert optimizer.state[x]["step"].item() == 3
    assert_same_training(ours_alone, after_unscale)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_scales_need_not_be_powers_of_two(backend, dtype):
    p = parameter(500, dtype=dtype)
    start, gs = p.detach().clone(), [g * 1000 for g in gradients(3, p)]
    optimizer = ours([p], GRAD, backend=backend)
    optimizer.grad_scale = torch.tensor(1000.0)
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, (p, gs))
    exact = [g.double() / 1000 for g in gs]
    rounded = [(g.float() / 1000).to(dtype) for g in gs]
    assert_trained(p, GRAD, start, rounded, "scale 1000", definition(GRAD, start, exact))


# (grad_scale, found_inf): whether the step is taken, and the scale it undoes
BY_HAND = [
    (8.0, 0.0, True, 8.0),
    (8.0, 1.0, False, 8.0),
    (8.0, 2.0, False, 8.0),  # the sum over two devices
    (None, 0.0, True, 1.0),
    (None, 1.0, False, 1.0),
    (8.0, None, True, 8.0),
    (None, None, True, 1.0),
]


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(("scale", "found", "taken", "undone"), BY_HAND)
def test_scale_and_infinity_set_by_hand(backend, scale, found, taken, undone, shape):
    def tensor(value):
        return None if value is None else torch.full(shape, value)

    (p,), (q,) = twins((9,), dtype=FP32)
    gs = gradients(4, p)
    optimizer, plain = (ours([x], "evolved_2025", backend=backend) for x in (p, q))
    for o, x in ((optimizer, p), (plain, q)):
        train(o, (x, gs[:1]))
    before = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = tensor(scale), tensor(found)
    train(optimizer, (p, [g * undone for g in gs[1:3]]))
    if taken:
        train(plain, (q, gs[1:3]))
    else:
        assert snapshot(optimizer) == before
    del optimizer.grad_scale, optimizer.found_inf
    for o, x in ((optimizer, p), (plain, q)):
        train(o, (x, gs[3:]))
    assert_same_training(optimizer, plain)


def test_a_scale_of_ones_own_multiplies_that_of_the_scaler(backend):
    (p,), (q,) = twins((9,), dtype=FP32)
    g = gradients(1, p)[0]
    optimizer, plain = (ours([x], "adam", backend=backend) for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer.grad_scale = torch.tensor(4.0)
    scaled_loss(scaler, [p], [4 * g]).backward()
    scaler.step(optimizer)
    train(plain, (q, [g]))
    assert_same_training(optimizer, plain)


def test_a_scaler_that_is_switched_off_does_nothing(backend):
    (p,), (q,) = twins((9,), dtype=FP32)
    gs = gradients(3, p)
    optimizer, plain = (ours([x], "adam", backend=backend) for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for g in gs:
        p.grad = g
        scaler.step(optimizer)
        scaler.update()
    train(plain, (q, gs))
    assert_same_training(optimizer, plain)


# max_grad_norm


def clipped(optimizer, ps, columns, max_norm):
    """Torch's way: clip_grad_norm_ over all parameters, then the step."""
    norms = []
    for row in zip(*columns, strict=True):
        for p, g in zip(ps, row, strict=True):
            p.grad = None if g is None else g.clone()
        norms.append(clip_grad_norm_(ps, max_norm).item())
        optimizer.step()
    return norms


def columns_of(ps, count=4):
    columns = [gradients(count, p, seed=i) for i, p in enumerate(ps)]
    columns[1][1] = columns[0][2] = None
    return columns


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("max_norm", [0.5, 13.5, 100.0])
@pytest.mark.parametrize("rule", PRESETS)
def test_clipping_by_norm_is_torchs(backend, rule, max_norm, maximize):
    ps, qs = twins(*SHAPES)
    columns = columns_of(ps)
    options = {"backend": backend, "maximize": maximize}
    train(ours(ps, rule, max_grad_norm=max_norm, **options), *zip(ps, columns, strict=True))
    norms = clipped(ours(qs, rule, **options), qs, columns, max_norm)
    assert (min(norms) < 13.5 < max(norms)) or max_norm != 13.5
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_norm_below_the_limit_changes_no_bit(backend):
    for dtype in DTYPES:
        ps, qs = twins(*SHAPES, dtype=dtype)
        columns = columns_of(ps)
        first = ours(ps, "evolved_2025", max_grad_norm=1e3, backend=backend)
        second = ours(qs, "evolved_2025", backend=backend)
        train(first, *zip(ps, columns, strict=True))
        train(second, *zip(qs, columns, strict=True))
        assert_same_training(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_exact_over_many_elements_groups_and_dtypes(backend, dtype):
    ps = [parameter(70_001, dtype=dtype), parameter(300, seed=1, dtype=FP32)]
    starts, gs = [p.detach().clone() for p in ps], [gradients(3, p, seed=2) for p in ps]
    groups = [{"params": ps[0]}, {"params": ps[1], "genome": zoo.sgd_momentum}]
    optimizer = ours(groups, GRAD, max_grad_norm=2.0, backend=backend)
    train(optimizer, *zip(ps, gs, strict=True))
    squares = [sum(g.double().square().sum() for g in row) for row in zip(*gs, strict=True)]
    factors = [min(1.0, 2.0 / (square.sqrt().item() + 1e-6)) for square in squares]
    for p, start, column, genome in zip(ps, starts, gs, (GRAD, zoo.sgd_momentum), strict=True):
        exact = [g.double() * f for g, f in zip(column, factors, strict=True)]
        eager = [(g * f).to(p.dtype) for g, f in zip(column, factors, strict=True)]
        assert_trained(p, genome, start, eager, str(p.dtype), definition(genome, start, exact))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_shows_as_in_torch(backend, bad):
    ps, qs = twins((5,), (4,), dtype=FP32)
    columns = [gradients(1, p, seed=i) for i, p in enumerate(ps)]
    columns[0][0][2] = bad
    train(ours(ps, "sgd", max_grad_norm=1.0, backend=backend), *zip(ps, columns, strict=True))
    clipped(ours(qs, "sgd", backend=backend), qs, columns, 1.0)
    assert not torch.cat([q.detach() for q in qs]).isfinite().all()
    assert_same(ps, qs)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_clipping_under_a_scaler_is_unscale_clip_step(backend, dtype):
    ps, qs = twins(*SHAPES, dtype=dtype)
    starts = [p.detach().clone() for p in ps]
    columns = [gradients(4, p, seed=i) for i, p in enumerate(ps)]
    fused = ours(ps, "adamw", max_grad_norm=0.5, backend=backend)
    apart = ours(qs, "adamw", backend=backend)
    factors = []
    for optimizer, params in ((fused, ps), (apart, qs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t, row in enumerate(zip(*columns, strict=True)):
            scaler.scale(torch.zeros(()))
            for p, g in zip(params, row, strict=True):
                p.grad = g * 2.0**10
            if t == 2:
                params[0].grad[1] = math.inf
            if optimizer is apart:
                scaler.unscale_(optimizer)
                norm = clip_grad_norm_(params, 0.5).double().item()
                factors += [0.5 / (norm + 1e-6)] if t != 2 else []
            scaler.step(optimizer)
            scaler.update(2.0**10)
        assert {optimizer.state[p]["step"].item() for p in params} == {3}
    for p, q, start, column in zip(ps, qs, starts, columns, strict=True):
        if dtype == FP64:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        done = [g * f for g, f in zip(column[:2] + column[3:], factors, strict=True)]
        assert_trained(p, zoo.adamw, start, done, f"shape {tuple(p.shape)}")


def test_clipping_fp16_under_a_scaler_which_torch_refuses(backend):
    p = parameter(60, dtype=FP16)
    start, gs = p.detach().clone(), gradients(3, p)
    optimizer = ours([p], GRAD, max_grad_norm=5.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for g in gs:
        scaler.scale(torch.zeros(()))
        p.grad = g * 64
        scaler.step(optimizer)
        scaler.update()
    exact = [g.double() * 5.0 / (g.double().norm() + 1e-6) for g in gs]
    rounded = [g.to(FP16) for g in exact]
    assert_trained(p, GRAD, start, rounded, "fp16", definition(GRAD, start, exact))


def test_the_optimizers_own_options_come_along_in_copies(backend):
    options = {"max_grad_norm": 0.1, "zero_grads": True, "backend": backend}
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        p = parameter(5)
        optimizer = ours([p], "sgd", **options)
        other = duplicate(optimizer)
        (q,) = other.param_groups[0]["params"]
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
        optimizer.step()
        other.step()
        assert_same_training(optimizer, other)
        assert not q.grad.any()
