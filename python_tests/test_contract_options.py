"""What the optimizer adds to a rule: maximize, gradient scaling, clipping by norm, storage formats.

Each option is held against the same thing done with torch around the optimizer: negated gradients,
`GradScaler.unscale_`, `clip_grad_norm_`, rounding by `Tensor.to`.
"""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from cases import DTYPES
from contract import (
    PRESETS,
    assert_trained,
    definition,
    gradients,
    ours,
    parameter,
    snapshot,
    train,
    trained_by_torch,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.errors import OptimizerError

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GRAD = PRESETS["sgd"]


@pytest.fixture(params=["cpu", "eager"])
def backend(request):
    return request.param


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


# Options as such

OPTIMIZER_OPTIONS = {"max_grad_norm": None, "zero_grads": False, "backend": "auto"}
GROUP_OPTIONS = {
    "total_steps": None,
    "maximize": False,
    "state_dtype": None,
    "stochastic_rounding": False,
    "seed": 0,
}
OTHER_VALUES = {
    "total_steps": 9,
    "maximize": True,
    "state_dtype": BF16,
    "stochastic_rounding": True,
    "seed": 5,
}


def test_signature():
    parameters = dict(inspect.signature(FusedEvolvedOptimizer).parameters)
    assert list(parameters)[:2] == ["params", "genome"]
    by_name = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert by_name == OPTIMIZER_OPTIONS | GROUP_OPTIONS
    assert FusedEvolvedOptimizer._step_supports_amp_scaling is True


def test_options_are_those_of_the_group(backend):
    ps = [parameter(4, seed=i) for i in range(3)]
    groups = [{"params": ps[0]}, {"params": ps[1], **OTHER_VALUES}]
    optimizer = FusedEvolvedOptimizer(groups, zoo.adamw, backend=backend)
    optimizer.add_param_group({"params": ps[2], "maximize": True})
    expected = [GROUP_OPTIONS, OTHER_VALUES, {**GROUP_OPTIONS, "maximize": True}]
    for kept in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
        assert [{name: group[name] for name in GROUP_OPTIONS} for group in kept] == expected
    defaults = FusedEvolvedOptimizer([parameter(4)], zoo.adamw, **OTHER_VALUES, backend=backend)
    assert OTHER_VALUES.items() <= defaults.param_groups[0].items()


def test_options_are_loaded_from_a_file(backend):
    optimizer = ours([{"params": [parameter(4)], **OTHER_VALUES}], "adamw", backend=backend)
    train(optimizer, (p := optimizer.param_groups[0]["params"][0], gradients(1, p)))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = ours([parameter(4)], "adamw", backend=backend)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert OTHER_VALUES.items() <= other.param_groups[0].items()


def test_a_state_from_before_the_options_loads(backend):
    p, q = parameter(4), parameter(4)
    optimizer = ours([p], "adamw", backend=backend)
    train(optimizer, (p, gradients(2, p)))
    state = optimizer.state_dict()
    for name in set(GROUP_OPTIONS) - {"total_steps"}:
        del state["param_groups"][0][name]
    other = ours([q], "adamw", maximize=True, backend=backend)
    other.load_state_dict(state)
    assert other.param_groups[0]["maximize"] is True  # its own, as the state says nothing
    assert other.state[q]["step"].item() == 2


BAD_OPTIONS = [
    ("maximize", "no"),
    ("state_dtype", FP16),
    ("state_dtype", FP64),
    ("state_dtype", torch.int8),
    ("state_dtype", "bf16"),
    ("stochastic_rounding", "no"),
    ("seed", 1.5),
    ("seed", "x"),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", math.nan),
    ("max_grad_norm", "x"),
    ("zero_grads", "no"),
]


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS, ids=str)
def test_bad_options_are_turned_down_by_name(backend, option, value):
    p = parameter(4, dtype=FP32)
    with pytest.raises(OptimizerError, match=option):
        ours([p], "adamw", **{option: value}, backend=backend)
    if option in GROUP_OPTIONS:
        optimizer = ours([p], "adamw", backend=backend)
        before = snapshot(optimizer)
        with pytest.raises(OptimizerError, match=option):
            optimizer.add_param_group({"params": parameter(4), option: value})
        assert snapshot(optimizer) == before


# maximize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", PRESETS)
def test_maximizing_is_minimizing_with_negated_gradients(backend, rule, dtype):
    (p,), (q,) = twins((33,), dtype=dtype)
    gs = gradients(4, p)
    up, down = ours([p], rule, maximize=True, backend=backend), ours([q], rule, backend=backend)
    train(up, (p, gs))
    train(down, (q, [-g for g in gs]))
    assert_same_training(up, down)


def test_maximizing_is_an_option_of_the_group_and_may_change(backend):
    ps, qs = twins((5,), (5,))
    gs = gradients(4, ps[0])
    groups = [{"params": ps[0]}, {"params": ps[1], "maximize": True}]
    optimizer, plain = ours(groups, "adamw", backend=backend), ours(qs, "adamw", backend=backend)
    train(optimizer, (ps[0], gs[:2]), (ps[1], gs[:2]))
    optimizer.param_groups[0]["maximize"] = True
    optimizer.param_groups[1]["maximize"] = False
    train(optimizer, (ps[0], gs[2:]), (ps[1], gs[2:]))
    signs = [1, 1, -1, -1]
    negated = [sign * g for sign, g in zip(signs, gs, strict=True)]
    train(plain, (qs[0], negated), (qs[1], [-g for g in negated]))
    assert_same(ps, qs)


def test_a_maximizing_adamw_goes_on_here(backend):
    p = parameter(5)
    start, gs = p.detach().clone(), gradients(6, p)
    torchs = torch.optim.AdamW([p], lr=1e-3, maximize=True)
    train(torchs, (p, gs[:3]))
    optimizer = ours([p], "adamw", backend=backend)
    optimizer.load_state_dict(torchs.state_dict())
    train(optimizer, (p, gs[3:]))
    expected = torch.from_numpy(trained_by_torch("adamw", start, gs, maximize=True))
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


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
    optimizer = ours([p], "adamw", backend=backend)
    optimizer.grad_scale = torch.tensor(1000.0)
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, (p, gs))
    exact = definition(zoo.adamw, start, [g.double() / 1000 for g in gs])
    rounded = [(g.float() / 1000).to(dtype) for g in gs]
    assert_trained(p, zoo.adamw, start, rounded, "scale 1000", exact)


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

SHAPES = [(17, 9), (33,), (), (0,), (1,)]


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
        eager = [(g.float() * f).to(g.dtype) for g, f in zip(column, factors, strict=True)]
        if g_is_double := column[0].dtype == FP64:
            eager = exact
        assert_trained(
            p, genome, start, eager, f"double: {g_is_double}", definition(genome, start, exact)
        )


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
    optimizer = ours([p], "adamw", max_grad_norm=0.5, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for g in gs:
        scaler.scale(torch.zeros(()))
        p.grad = g * 64
        scaler.step(optimizer)
        scaler.update()
    exact = [g.double() * 0.5 / (g.double().norm() + 1e-6) for g in gs]
    assert_trained(
        p,
        zoo.adamw,
        start,
        [g.to(FP16) for g in exact],
        "fp16",
        definition(zoo.adamw, start, exact),
    )


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


# zero_grads


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_zero_after_the_step_where_they_were(backend, dtype, found_inf):
    ps, qs = twins(*SHAPES, (40, 30), dtype=dtype)
    guarded = torch.full((3, 64, 40), 7.0, dtype=dtype)
    optimizer = ours(ps, "adamw", zero_grads=True, backend=backend)
    plain = ours(qs, "adamw", backend=backend)
    for seed in range(3):
        gs = [gradients(1, p, seed=seed)[0] for p in ps]
        gs[1] = None
        guarded[1, 8:48, 5:35] = gs[-1]
        for q, g in zip(qs, gs, strict=True):
            q.grad = g if g is None else g.clone()
        gs[-1] = guarded[1, 8:48, 5:35]
        for p, g in zip(ps, gs, strict=True):
            p.grad = g
        if found_inf is not None:
            optimizer.found_inf = plain.found_inf = torch.tensor(found_inf)
        versions = [g._version for g in gs if g is not None and g.numel()]
        optimizer.step()
        plain.step()
        for p, q, g in zip(ps, qs, gs, strict=True):
            assert p.grad is g
            assert g is None or not g.any()
            assert q.grad is None or not q.numel() or q.grad.any()
        # autograd is told of the write
        assert all(
            g._version > version
            for g, version in zip(
                (g for g in gs if g is not None and g.numel()), versions, strict=True
            )
        )
    assert_same(ps, qs)
    inside = torch.zeros_like(guarded, dtype=torch.bool)
    inside[1, 8:48, 5:35] = True
    assert (guarded[~inside] == 7.0).all(), "a neighbour was zeroed"


def test_zeroed_gradients_may_be_infinite_transposed_or_expanded(backend):
    p = parameter(4, 3, dtype=FP32)
    optimizer = ours([p], "adamw", zero_grads=True, backend=backend)
    for g in (torch.full((4, 3), math.nan), torch.ones(3, 4).t(), torch.ones(3).expand(4, 3)):
        p.grad = g
        optimizer.step()
        assert torch.equal(p.grad, torch.zeros(4, 3))


def test_backward_adds_to_zeroed_gradients(backend):
    (p,), (q,) = twins((6,))
    optimizer = ours([p], "adam", zero_grads=True, backend=backend)
    plain = ours([q], "adam", backend=backend)
    for _ in range(4):
        (p**3).sum().backward()
        optimizer.step()
        plain.zero_grad()
        (q**3).sum().backward()
        plain.step()
    assert_same([p], [q])


# state_dtype


def rounded_state(parameter_dtype, state_dtype):
    arithmetic = FP64 if parameter_dtype == FP64 else FP32
    return state_dtype or arithmetic


STATE_DTYPES = [(d, s) for d in DTYPES for s in (None, FP32, BF16)]


@pytest.mark.parametrize(("dtype", "state_dtype"), STATE_DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["momentum", "rmsprop", "adamw", "evolved_2025"])
def test_moments_are_kept_in_the_dtype_asked_for(backend, rule, dtype, state_dtype):
    p = parameter(300, dtype=dtype)
    start, gs = p.detach().clone(), gradients(6, p)
    optimizer = ours([p], rule, state_dtype=state_dtype, backend=backend)
    train(optimizer, (p, gs))
    kept = rounded_state(dtype, state_dtype)
    moments = {name: x.dtype for name, x in optimizer.state[p].items() if name != "step"}
    assert moments
    assert set(moments.values()) == {kept}
    assert optimizer.state[p]["step"].dtype == FP64
    assert_trained(p, PRESETS[rule], start, gs, f"moments in {kept}", moments=kept)


@pytest.mark.parametrize(("dtype", "state_dtype"), STATE_DTYPES, ids=str)
def test_moments_are_rounded_when_they_are_stored_and_not_before(backend, dtype, state_dtype):
    (p,), (q,) = twins((300,), dtype=dtype)
    g = gradients(1, p)
    full, kept = ours([p], "adamw", backend=backend), rounded_state(dtype, state_dtype)
    small = ours([q], "adamw", state_dtype=state_dtype, backend=backend)
    train(full, (p, g))
    train(small, (q, g))
    assert_same([p], [q])
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same([full.state[p][name].to(kept)], [small.state[q][name]])


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
def test_training_with_small_moments_continues_bit_for_bit(backend, dtype):
    p, q = (parameter(70, dtype=dtype) for _ in range(2))
    gs = gradients(6, p)
    options = {"state_dtype": BF16, "backend": backend}
    optimizer, other = ours([p], "evolved_2025", **options), ours([q], "sgd", backend=backend)
    train(optimizer, (p, gs[:3]))
    q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[q]["exp_avg"].dtype == BF16
    train(optimizer, (p, gs[3:]))
    train(other, (q, gs[3:]))
    assert_same_training(optimizer, other)


def test_the_dtype_of_moments_may_change_while_training(backend):
    p = parameter(70, dtype=FP32)
    gs = gradients(4, p)
    optimizer = ours([p], "adamw", backend=backend)
    train(optimizer, (p, gs[:2]))
    moments = {n: optimizer.state[p][n].clone() for n in ("exp_avg", "exp_avg_sq")}
    optimizer.param_groups[0]["state_dtype"] = BF16
    q = nn.Parameter(p.detach().clone())
    other = ours([q], "adamw", state_dtype=BF16, backend=backend)
    other.state[q] = {"step": torch.tensor(2.0), **{n: x.to(BF16) for n, x in moments.items()}}
    train(optimizer, (p, gs[2:]))
    train(other, (q, gs[2:]))
    assert_same_training(optimizer, other)


# stochastic_rounding

# 1 - 2^-10 lies a quarter of the way from 1 to the next smaller bfloat16, 1 - 2^-8
QUARTER = Genome(term_types=["GRAD"], alphas=[2.0**-10], lr_log10=0, wd_log10=-math.inf)
COUNT = 40_000


def ones(n=COUNT, dtype=BF16):
    return nn.Parameter(torch.ones(n, dtype=dtype))


def rounded(*ps, steps=1, **options):
    optimizer = ours(ps, QUARTER, stochastic_rounding=True, **options)
    train(optimizer, *((p, [torch.ones_like(p)] * steps) for p in ps))
    return optimizer


def five_sigma(probability, n=COUNT):
    return pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / n))


def test_stores_are_right_on_average(backend):
    p, nearest = ones(), ones()
    rounded(p, backend=backend)
    assert set(p.unique().tolist()) == {1 - 2**-8, 1.0}
    assert (p < 1).float().mean().item() == five_sigma(0.25)
    train(ours([nearest], QUARTER, backend=backend), (nearest, [torch.ones(COUNT, dtype=BF16)]))
    assert (nearest == 1).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stores_go_both_ways_alike(backend, sign):
    # from 1: a quarter of an interval down, an eighth (of one twice as wide) up
    p = ones()
    p.data.mul_(-1)
    optimizer = ours([p], QUARTER, stochastic_rounding=True, backend=backend)
    train(optimizer, (p, [torch.full_like(p, sign)]))
    moved = {1.0: -1 - 2**-7, -1.0: -1 + 2**-8}[sign]
    assert set(p.unique().tolist()) == {moved, -1.0}
    assert (p == moved).float().mean().item() == five_sigma({1.0: 0.125, -1.0: 0.25}[sign])


def test_steps_elements_tensors_and_seeds_have_their_own_noise(backend):
    a, b, c = ones(), ones(), ones()
    rounded(a, b, seed=1, backend=backend)
    rounded(c, seed=2, backend=backend)
    first = a.detach().clone() < 1
    optimizer = ours([d := ones()], QUARTER, stochastic_rounding=True, seed=1, backend=backend)
    train(optimizer, (d, [torch.zeros_like(d), torch.ones_like(d)]))
    for name, second in [
        ("tensor", b < 1),
        ("seed", c < 1),
        ("step", d < 1),
        ("neighbour", first.roll(1)),
        ("vector", first.roll(8)),
    ]:
        both = (first & second).float().mean().item()
        assert both == five_sigma(1 / 16), name


def test_what_bfloat16_holds_is_stored_as_it_is(backend):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    p = nn.Parameter(every.clone())
    optimizer = ours([p], QUARTER, stochastic_rounding=True, backend=backend)
    train(optimizer, (p, [torch.zeros_like(p)] * 2))
    nan = every.isnan()
    # -0 - 0 * lr may be either zero; NaN has many forms
    assert torch.equal(p[~nan], every[~nan])
    assert p[nan].isnan().all()


@pytest.mark.parametrize("dtype", [FP32, FP64, FP16], ids=str)
def test_other_stores_are_not_touched(backend, dtype):
    (p,), (q,) = twins((300,), dtype=dtype)
    gs = gradients(3, p)
    first = ours([p], "adamw", stochastic_rounding=True, backend=backend)
    second = ours([q], "adamw", backend=backend)
    train(first, (p, gs))
    train(second, (q, gs))
    assert_same_training(first, second)


def test_moments_are_rounded_stochastically_too(backend):
    # after one step, exp_avg is a tenth of the gradient
    p = nn.Parameter(torch.zeros(COUNT))
    optimizer = ours(
        [p], "momentum", state_dtype=BF16, stochastic_rounding=True, seed=3, backend=backend
    )
    train(optimizer, (p, [torch.ones(COUNT)]))
    moment = optimizer.state[p]["exp_avg"].double()
    low, high = moment.min().item(), moment.max().item()
    assert low < 0.1 < high
    assert high - low == 2.0**-11  # neighbours
    assert (moment == high).double().mean().item() == five_sigma((0.1 - low) / (high - low))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_noise_depends_on_the_seed_and_not_on_the_threads(backend, dtype):
    sizes = [1, 63, 4097, 70_001, 131_072, 5]
    results, threads = {}, torch.get_num_threads()
    try:
        for seed, count in [(1, 1), (1, 2), (1, 3), (2, 1)]:
            torch.set_num_threads(count)
            ps = [parameter(n, seed=i, dtype=dtype) for i, n in enumerate(sizes)]
            optimizer = ours(
                ps, "adamw", state_dtype=BF16, stochastic_rounding=True, seed=seed, backend=backend
            )
            train(optimizer, *((p, gradients(2, p)) for p in ps))
            results[seed, count] = snapshot(optimizer)
    finally:
        torch.set_num_threads(threads)
    assert results[1, 1] == results[1, 2] == results[1, 3]
    assert results[1, 1] != results[2, 1]


CONTINUATIONS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_the_noise_goes_on_after_a_resume(backend, way):
    options = {"state_dtype": BF16, "stochastic_rounding": True, "seed": 9, "backend": backend}
    ps = [parameter(70, seed=i, dtype=BF16) for i in range(2)]
    gs = [gradients(6, p) for p in ps]
    gs[0][1] = None
    optimizer = ours(ps, "adamw", **options)
    train(optimizer, *((p, g[:3]) for p, g in zip(ps, gs, strict=True)))
    if way == "state_dict":
        qs = copy.deepcopy(ps)
        other = ours(qs, "sgd", backend=backend)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        qs, other = CONTINUATIONS[way]((ps, optimizer))
    for params, o in ((ps, optimizer), (qs, other)):
        train(o, *((p, g[3:]) for p, g in zip(params, gs, strict=True)))
    assert_same_training(optimizer, other)


# All together


def test_options_agree_with_each_other_in_any_layout(backend):
    """Scaled, clipped, maximized, with small moments, zeroed: strided as contiguous."""
    guarded = torch.full((3, 64, 40), 7.0)
    inner = guarded[1, 8:41, 5:28]
    channels = parameter(5, 4, 3, 3, dtype=FP32).detach()
    cases = {
        "transposed parameter": (parameter(23, 33, dtype=FP32).detach().t(), torch.ones(33, 23)),
        "channels last": (channels.to(memory_format=torch.channels_last), channels + 1),
        "sliced": (inner.copy_(parameter(33, 23, dtype=FP32).detach()), torch.ones(23, 33).t()),
    }
    options = {"max_grad_norm": 0.7, "maximize": True, "state_dtype": BF16, "zero_grads": True}
    for name, (start, g) in cases.items():
        p = start.requires_grad_() if name == "sliced" else nn.Parameter(start)
        if name == "sliced":
            p = inner.detach().requires_grad_()
        q = nn.Parameter(start.detach().clone(memory_format=torch.contiguous_format))
        optimizers = [ours([x], "evolved_2025", backend=backend, **options) for x in (p, q)]
        for optimizer, x in zip(optimizers, (p, q), strict=True):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            for t in range(3):
                x.grad = (g + t) if x is p else (g + t).contiguous()
                optimizer.step()
        assert_same([p], [q], name)
    outside = torch.ones_like(guarded, dtype=torch.bool)
    outside[1, 8:41, 5:28] = False
    assert (guarded.detach()[outside] == 7.0).all(), "a neighbour was written to"


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"zero_grads": True}, {"state_dtype": BF16}, {"maximize": True}],
    ids=lambda options: next(iter(options)),
)
def test_a_bad_gradient_is_found_before_anything_is_touched(backend, options):
    first, second = parameter(4, 3, dtype=FP32), parameter(4, 3, seed=1, dtype=FP32)
    optimizer = ours([first, second], "adamw", backend=backend, **options)
    train(optimizer, *((p, gradients(1, p)) for p in (first, second)))
    g = torch.ones(4, 3)
    first.grad, second.grad = g, torch.ones(4, 3).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError, match="gradients must be dense"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert (g == 1).all()
