"""What is kept between steps, and how it is rounded: state_dtype and stochastic_rounding."""

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
    assert_same,
    assert_same_training,
    assert_trained,
    gradients,
    ours,
    parameter,
    snapshot,
    train,
    twins,
)
from oracle import DTYPES
from torch import nn

from evokernels import Genome, zoo

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
    start, gs = p.detach().clone(), gradients(6, p)
    optimizer = ours([p], "adamw", backend=backend)
    for rows, state_dtype in ((gs[:2], None), (gs[2:4], BF16), (gs[4:], None)):
        optimizer.param_groups[0]["state_dtype"] = state_dtype
        train(optimizer, (p, rows))
        kept = {optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")}
        assert kept == {state_dtype or FP32}
    assert optimizer.state[p]["step"].item() == 6
    assert_trained(p, zoo.adamw, start, gs, "moments in bfloat16 for two steps", moments=BF16)


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
