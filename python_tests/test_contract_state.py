"""Closures, hooks, copies and states of the optimizer, held against torch.optim's own.

What test_optim.py does not have already.
"""

import copy
import io
import pickle

import pytest
import torch
from contract import (
    PRESETS,
    RICH,
    assert_close,
    gradients,
    ours,
    parameter,
    snapshot,
    train,
)
from oracle import DTYPES
from torch import nn
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer

from evokernels.kernels.plan import ARITHMETIC

# Closures and hooks


def test_a_closure_that_fails_leaves_everything_as_it_was(backend):
    p = parameter(3)
    optimizer = ours([p], RICH, backend=backend)
    train(optimizer, (p, gradients(1, p)))
    before = snapshot(optimizer)

    def closure():
        (p * p).sum().backward()
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


def test_a_closure_brings_the_first_gradients(backend):
    p, q = parameter(3), parameter(3)
    optimizer, torchs = ours([p], "adamw", backend=backend), torch.optim.AdamW([q])
    for o, x in ((optimizer, p), (torchs, q)):
        for _ in range(3):
            o.zero_grad()
            assert x.grad is None

            def closure(x=x):
                assert torch.is_grad_enabled()
                loss = (x**2).sum()
                loss.backward()
                return loss.item()

            with torch.no_grad():
                before = (x**2).sum().item()
                assert o.step(closure) == before
    assert_close(p, q.detach())


def test_step_hooks_run_in_torchs_order(backend):
    def order(optimizer, p):
        seen, handles = [], []
        for register, name in [
            (optimizer.register_step_post_hook, "post"),
            (optimizer.register_step_pre_hook, "pre"),
            (torch_optimizer.register_optimizer_step_post_hook, "global post"),
            (torch_optimizer.register_optimizer_step_pre_hook, "global pre"),
        ]:
            handles.append(register(lambda o, args, kwargs, name=name: seen.append((name, o))))
        train(optimizer, (p, gradients(1, p)))
        for handle in handles:
            handle.remove()
        train(optimizer, (p, gradients(1, p)))
        assert all(o is optimizer for _, o in seen)
        return [name for name, _ in seen]

    p, q = parameter(3), parameter(3)
    seen = order(ours([p], "adam", backend=backend), p)
    assert seen == order(torch.optim.Adam([q]), q) == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_hook_may_replace_the_closure(backend, by_name):
    p = parameter(3)
    optimizer = ours([p], "sgd", backend=backend)

    def replace(o, args, kwargs):
        return ((o,), {"closure": lambda: 7.0}) if by_name else ((o, lambda: 7.0), {})

    optimizer.register_step_pre_hook(replace)
    assert optimizer.step(lambda: pytest.fail("the closure was replaced")) == 7.0
    assert optimizer.step() == 7.0


def test_a_hook_that_returns_nonsense_is_torchs_error(backend):
    optimizer = ours([parameter(3)], "sgd", backend=backend)
    optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_hooks_of_saving_see_and_change_what_is_saved(backend):
    p = parameter(3)
    optimizer = ours([p], RICH, backend=backend)
    train(optimizer, (p, gradients(1, p)))
    plain, seen = optimizer.state_dict(), []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))

    def note(o, state):
        seen.append(("post", state["param_groups"][0]["genome"]))

    optimizer.register_state_dict_post_hook(note)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    saved = optimizer.state_dict()
    assert saved.pop("note") == 1
    assert saved.keys() == plain.keys()
    assert seen == [("pre", optimizer), ("post", RICH.to_dict())]


def test_a_hook_of_saving_may_keep_the_moments_alone(backend):
    p = parameter(3)
    optimizer = ours([p], RICH, backend=backend)
    train(optimizer, (p, gradients(1, p)))
    optimizer.register_state_dict_post_hook(lambda o, state: {"state": state["state"]})
    assert optimizer.state_dict().keys() == {"state"}


def test_hooks_of_loading_run_in_torchs_order(backend):
    p = parameter(3)
    optimizer = ours([p], "adam", backend=backend)
    train(optimizer, (p, gradients(1, p)))
    state, seen = optimizer.state_dict(), []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("second"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].dtype))
    optimizer.load_state_dict(state)
    assert seen == ["first", "second", torch.float64]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2


def test_steps_show_in_a_profile(backend):
    p = parameter(3)
    optimizer = ours([p], "adam", backend=backend)
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, (p, gradients(1, p)))
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.{m}#FusedEvolvedOptimizer.{m}" for m in ("step", "zero_grad")} <= names


# Copies and states


def test_a_shallow_copy_shares_the_training(backend):
    p, q = parameter(4), parameter(4)
    gs = gradients(6, p)
    train(ours([q], RICH, backend=backend), (q, gs))

    first = ours([p], RICH, backend=backend)
    train(first, (p, gs[:2]))
    second = copy.copy(first)
    train(second, (p, gs[2:4]))
    train(first, (p, gs[4:]))
    assert torch.equal(p, q)
    assert second.state is first.state


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_have_all_that_the_original_has(duplicate, backend):
    p = parameter(4)
    optimizer = ours([p], RICH, backend=backend)
    train(optimizer, (p, gradients(1, p)))
    other = duplicate(optimizer)
    of_torchs = {"_warned_capturable_if_run_uncaptured"}  # made by its constructor alone
    assert vars(other).keys() | of_torchs == vars(optimizer).keys() | of_torchs
    assert other.defaults.items() >= optimizer.defaults.items()
    assert snapshot(other) == snapshot(optimizer)
    (q,) = other.param_groups[0]["params"]
    assert q is not p
    p.grad, q.grad = torch.ones_like(p), 2 * torch.ones_like(q)
    other.step()
    assert optimizer.state[p]["step"].item() == 1


PLAIN = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor, torch.dtype)


def assert_plain(value, where="state_dict"):
    assert type(value) in PLAIN, f"{where} is {type(value)}"
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            assert type(key) in (str, int), where
            assert_plain(item, f"{where}[{key!r}]")


def test_a_state_is_plain_and_the_same_each_time(backend):
    def one():
        ps = [parameter(4, dtype=dtype) for dtype in DTYPES]
        groups = [{"params": ps[:2]}, {"params": ps[2:], "genome": PRESETS["evolved_2025"]}]
        optimizer = ours(groups, "adamw", backend=backend)
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        train(optimizer, *((p, gradients(3, p)) for p in ps))
        return optimizer

    first, second = one(), one()
    assert_plain(first.state_dict())
    assert snapshot(first) == snapshot(first) == snapshot(second)


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)], ids=str)
def test_names_of_parameters_survive_as_they_do_in_torch(backend, named):
    def names(make):
        optimizers = []
        for with_names in named:
            model = nn.Linear(2, 2)
            optimizers.append(make(model.named_parameters() if with_names else model.parameters()))
        source, target = optimizers
        target.load_state_dict(source.state_dict())
        return [o.state_dict()["param_groups"][0].get("param_names") for o in optimizers]

    mine = names(lambda ps: ours(ps, "adamw", backend=backend))
    assert mine == names(torch.optim.AdamW)
    assert mine[0] == (["weight", "bias"] if named[0] else None)


@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_a_state_loads_into_a_model_of_another_dtype(backend, before, after):
    p, q = parameter(40, dtype=before), parameter(40, dtype=after)
    optimizer = ours([p], RICH, backend=backend)
    train(optimizer, (p, gradients(3, p)))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = ours([q], "sgd", backend=backend)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[p][name].to(ARITHMETIC[after])
        assert other.state[q][name].dtype == moment.dtype
        assert torch.equal(other.state[q][name], moment)
    assert other.state[q]["step"].item() == 3

    by_hand = nn.Parameter(q.detach().clone())
    third = ours([by_hand], RICH, backend=backend)
    third.state[by_hand] = {name: value.clone() for name, value in optimizer.state[p].items()}
    train(other, (q, gradients(2, q)))
    train(third, (by_hand, gradients(2, q)))
    assert torch.equal(q, by_hand)


def test_what_was_loaded_does_not_follow_its_source(backend):
    p, q = parameter(4), parameter(4)
    first, second = (ours([x], RICH, backend=backend) for x in (p, q))
    train(first, (p, gradients(2, p)))
    second.load_state_dict(first.state_dict())
    before = snapshot(second)
    train(first, (p, gradients(2, p)))
    assert snapshot(second) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["foreach", "fused", "single"])
def test_states_of_every_adamw_are_understood(backend, kind, dtype):
    options = {} if kind == "single" else {kind: True}
    p, q = parameter(40, dtype=dtype), parameter(40, dtype=dtype)
    torchs = torch.optim.AdamW([p], lr=2e-3, betas=(0.8, 0.9), eps=1e-4, **options)
    train(torchs, (p, gradients(3, p)))
    mine = ours([q], "adamw", backend=backend)
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    group = mine.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.9), 1e-4)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(mine.state[q][name].to(dtype), torchs.state[p][name])

    back = torch.optim.AdamW([nn.Parameter(p.detach().clone())], **options)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))  # torch's loading shares memory
    (r,) = back.param_groups[0]["params"]
    for name, value in torchs.state[p].items():
        assert torch.equal(back.state[r][name].double(), value.double()), name
    train(back, (r, gradients(2, r)))
    train(torchs, (p, gradients(2, p)))
    assert torch.equal(r, p)


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_counts_stay_exact_in_a_state_that_once_was_adamws(backend, option):
    p, q = parameter(4), parameter(4)
    torchs = torch.optim.AdamW([p])
    train(torchs, (p, gradients(1, p)))
    state = torchs.state_dict()
    state["param_groups"][0][option] = True  # torch then loads counts as float32
    mine = ours([p], "adamw", backend=backend)
    mine.load_state_dict(state)
    train(mine, (p, gradients(1, p)))
    mine.state[p]["step"].fill_(2.0**24 + 1)
    other = ours([q], "adamw", backend=backend)
    other.load_state_dict(mine.state_dict())
    assert other.state[q]["step"].item() == 2**24 + 1
    train(other, (q, gradients(1, q)))
    assert other.state[q]["step"].item() == 2**24 + 2
