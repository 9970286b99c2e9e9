"""What the optimizer adds to a rule: how options travel, maximize, zero_grads, all of them at once.

Each option is held against the same thing done with torch around the optimizer.
"""

import inspect
import io
import math

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
    gradients,
    ours,
    parameter,
    snapshot,
    train,
    trained_by_torch,
    twins,
)
from oracle import DTYPES
from torch import nn

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import OptimizerError

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
        written = [g for g in gs if g is not None and g.numel()]
        versions = [g._version for g in written]
        optimizer.step()
        plain.step()
        for p, q, g in zip(ps, qs, gs, strict=True):
            assert p.grad is g
            assert g is None or not g.any()
            assert q.grad is None or not q.numel() or q.grad.any()
        told = [g._version for g in written]
        assert all(new > old for new, old in zip(told, versions, strict=True)), "not autograd"
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


# All together


def test_options_agree_with_each_other_in_any_layout(backend):
    """Scaled, clipped, maximized, with small moments, zeroed: strided as contiguous."""
    guarded = torch.full((3, 64, 40), 7.0)
    inner = guarded[1, 8:41, 5:28]
    inner.copy_(torch.arange(33 * 23).view(33, 23))
    channels = parameter(5, 4, 3, 3, dtype=FP32).detach()
    cases = {
        "transposed": (parameter(23, 33, dtype=FP32).detach().t(), torch.ones(33, 23)),
        "channels last": (channels.to(memory_format=torch.channels_last), channels + 1),
        "sliced": (inner, torch.ones(23, 33).t()),
    }
    options = {"max_grad_norm": 0.7, "maximize": True, "state_dtype": BF16, "zero_grads": True}
    for name, (start, g) in cases.items():
        q = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        p = nn.Parameter(start)  # in the same memory
        for x in (p, q):
            optimizer = ours([x], "evolved_2025", backend=backend, **options)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            for t in range(3):
                x.grad = (g + t) if x is p else (g + t).contiguous()
                optimizer.step()
        assert_same([p], [q], name)
    outside = torch.ones_like(guarded, dtype=torch.bool)
    outside[1, 8:41, 5:28] = False
    assert (guarded[outside] == 7.0).all(), "a neighbour was written to"


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
