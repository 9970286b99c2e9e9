"""FusedEvolvedOptimizer as a PyTorch optimizer: groups, state, errors, and what moves in memory.

Right numbers come from the float64 reference, with one step count a parameter, or from torch.optim.
"""

import copy
import dataclasses
import io
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from contract import RICH
from torch import nn

import evokernels
from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.compiler.evaluate import reference_step
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.errors import BackendError, EvokernelsError, GenomeError, OptimizerError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SIGN = Genome(["SIGN_GRAD"], wd_log10=-math.inf)  # keeps no moments


def parameter(*shape, seed=0, dtype=torch.float64):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(values.to(dtype))


def gradients(count, p, seed=100):
    """Gradients for `count` steps of a parameter."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for _ in range(count)
    ]


def train(optimizer, *columns):
    """One step for each row of gradients; a column is (parameter, its gradients or None)."""
    for row in zip(*(gs for _, gs in columns), strict=True):
        for (p, _), g in zip(columns, row, strict=True):
            p.grad = g
        optimizer.step()


def trained(genome, p, gs, *, total_steps=None, lr_factors=None):
    """The oracle: the parameter after these gradients; None leaves it alone and counts no step."""
    p = p.detach().double().numpy().copy()
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    for i, g in enumerate(gs):
        if g is None:
            continue
        t += 1
        factor = learning_rate_factor(genome, t - 1, total_steps)
        factor *= lr_factors[i] if lr_factors else 1.0
        p, m, v = reference_step(genome, p, g.double().numpy(), m, v, t, factor)
    return torch.from_numpy(p)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def snapshot(optimizer):
    """Parameters and state as they are now, in a form that == compares bit by bit."""
    buffer = io.BytesIO()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.save(([p.detach() for p in parameters], optimizer.state_dict()), buffer)
    return buffer.getvalue()


# Steps


@pytest.mark.parametrize(
    "genome", [*zoo.GENOMES.values(), RICH, SIGN], ids=lambda g: g.term_types[0].name
)
def test_steps_match_the_reference(backend, genome):
    p = parameter(7)
    gs = gradients(5, p)
    expected = trained(genome, p, gs, total_steps=4)
    optimizer = FusedEvolvedOptimizer([p], genome, total_steps=4, backend=backend)
    train(optimizer, (p, gs))
    assert_close(p, expected)


def test_steps_without_a_gradient_do_not_count(backend):
    # b misses steps, c gets its first gradient late (an unfrozen layer), d never gets one
    p = {name: parameter(5, seed=i) for i, name in enumerate("abcd")}
    gs = {name: gradients(6, p[name], seed=i) for i, name in enumerate("abc")}
    gs["b"][1] = gs["b"][4] = None
    gs["c"][:3] = [None] * 3
    gs["d"] = [None] * 6
    expected = {name: trained(RICH, p[name], gs[name], total_steps=5) for name in "abcd"}
    optimizer = FusedEvolvedOptimizer(p.values(), RICH, total_steps=5, backend=backend)
    train(optimizer, *((p[name], gs[name]) for name in "abcd"))
    for name in "abcd":
        assert_close(p[name], expected[name])
    assert {name: optimizer.state[p[name]]["step"].item() for name in "abc"} == {
        "a": 6,
        "b": 4,
        "c": 3,
    }
    assert p["d"] not in optimizer.state


def test_a_frozen_layer_stays_as_it_is(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adamw, backend=backend)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model[0].state_dict().items())
    assert set(optimizer.state) == set(model[1].parameters())


def test_without_gradients_nothing_happens(backend):
    p = parameter(3)
    optimizer = FusedEvolvedOptimizer([p], zoo.adamw, backend=backend)
    before, version = snapshot(optimizer), p._version
    assert optimizer.step() is None
    assert (snapshot(optimizer), p._version, len(optimizer.state)) == (before, version, 0)


def test_an_expanded_gradient_is_read_as_it_is(backend):
    p = parameter(4, 3)
    gs = [
        torch.ones(3, dtype=torch.float64).expand(4, 3),
        torch.ones(1, dtype=p.dtype).expand(4, 3),
    ]
    expected = trained(RICH, p, gs, total_steps=9)
    train(FusedEvolvedOptimizer([p], RICH, total_steps=9, backend=backend), (p, gs))
    assert_close(p, expected)


def test_closure_is_run_with_gradients_and_its_loss_returned(backend):
    p = parameter(3)
    start, calls = p.detach().clone(), []
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [loss.item()] == [(start * start).sum().item()]
    assert_close(p, trained(zoo.adam, start, [2 * start]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(backend, set_to_none):
    p = parameter(3)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p))


def test_autograd_notices_the_update(backend):
    p = parameter(3)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    loss = (p * p).sum()  # saves p for its backward
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_without_a_gradient_is_not_marked_as_changed(backend):
    p, q = parameter(3), parameter(3)
    optimizer = FusedEvolvedOptimizer([p, q], zoo.adam, backend=backend)
    train(optimizer, (p, gradients(1, p)), (q, gradients(1, q)))
    version = q._version
    train(optimizer, (p, gradients(1, p)), (q, [None]))
    assert q._version == version


def test_the_loop_of_the_source_document(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(64, 4)
    train_loader = [(x, (x.sum(1) > 0).long())] * 200
    criterion, losses = nn.CrossEntropyLoss(), []

    optimizer = FusedEvolvedOptimizer(
        model.parameters(), zoo.evolved_2025, total_steps=len(train_loader), backend=backend
    )
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_class_is_found_by_an_import_statement():
    import evokernels.FusedEvolvedOptimizer
    import evokernels.FusedEvolvedOptimizer as imported

    assert evokernels.FusedEvolvedOptimizer is imported is FusedEvolvedOptimizer
    assert issubclass(imported, torch.optim.Optimizer)


# Groups


def test_groups_have_their_own_genome_and_options(backend):
    ps = [parameter(4, seed=i) for i in range(5)]
    gs = [gradients(4, p, seed=i) for i, p in enumerate(ps)]
    own = {"genome": RICH, "total_steps": 3}
    options = [{}, {"lr": 1e-2}, {"weight_decay": 0.5}, own, {**own, "lr": 1e-3, "total_steps": 8}]
    expected = [
        trained(zoo.adamw, ps[0], gs[0]),
        trained(zoo.adamw, ps[1], gs[1], lr_factors=[10.0] * 4),
        trained(dataclasses.replace(zoo.adamw, wd_log10=math.log10(0.5)), ps[2], gs[2]),
        trained(RICH, ps[3], gs[3], total_steps=3),
        trained(RICH, ps[4], gs[4], total_steps=8, lr_factors=[0.1] * 4),
    ]
    groups = [{"params": p, **extra} for p, extra in zip(ps, options, strict=True)]
    optimizer = FusedEvolvedOptimizer(groups, zoo.adamw, backend=backend)
    train(optimizer, *zip(ps, gs, strict=True))
    for p, right in zip(ps, expected, strict=True):
        assert_close(p, right)


@pytest.mark.parametrize(
    ("option", "value", "changed"),
    [
        ("lr", 1e-2, {"lr_log10": -2}),
        ("betas", (0.5, 0.6), {"beta1": 0.5, "beta2": 0.6}),
        ("eps", 1e-1, {"eps_log10": -1}),
        ("weight_decay", 1e-1, {"wd_log10": -1}),
        ("genome", zoo.sgd_momentum, None),
    ],
)
def test_options_changed_between_steps_count_from_the_next_one(backend, option, value, changed):
    p = parameter(4)
    (first, second), start = gradients(2, p), p.detach().clone()
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    train(optimizer, (p, [first]))
    optimizer.param_groups[0][option] = value
    train(optimizer, (p, [second]))

    # a new genome brings its rule; the group's lr, betas and the rest stay
    later = (
        dataclasses.replace(zoo.adam, **changed)
        if changed
        else dataclasses.replace(zoo.sgd_momentum, lr_log10=zoo.adam.lr_log10, beta2=zoo.adam.beta2)
    )
    numbers = start.numpy(), first.numpy(), np.zeros(4), np.zeros(4)
    p1, m, v = reference_step(zoo.adam, *numbers, t=1)
    p2, _, _ = reference_step(later, p1, second.numpy(), m, v, t=2)
    assert_close(p, torch.from_numpy(p2))


def test_added_groups_train_from_then_on(backend):
    a, b = parameter(4), parameter(3, seed=1)
    ga, gb = gradients(4, a), [None, None, *gradients(2, b)]
    expected = trained(zoo.adamw, a, ga), trained(RICH, b, gb, total_steps=9)
    optimizer = FusedEvolvedOptimizer([a], zoo.adamw, backend=backend)
    train(optimizer, (a, ga[:2]))
    optimizer.add_param_group({"params": [b], "genome": RICH, "total_steps": 9})
    train(optimizer, (a, ga[2:]), (b, gb[2:]))
    assert_close(a, expected[0])
    assert_close(b, expected[1])


def test_parameters_may_have_names(backend):
    model = nn.Linear(2, 2)
    optimizer = FusedEvolvedOptimizer(model.named_parameters(), zoo.adam, backend=backend)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert set(optimizer.state) == set(model.parameters())


def test_duplicates_in_a_group_are_warned_of_as_in_torch_and_updated_once(backend):
    p = parameter(4)
    gs = gradients(3, p)
    expected = trained(zoo.adam, p, gs)
    with pytest.warns(UserWarning, match="parameter group with duplicate parameters"):
        optimizer = FusedEvolvedOptimizer([p, p], zoo.adam, backend=backend)
    train(optimizer, (p, gs))
    assert_close(p, expected)


# Saving and loading


def saved_and_loaded(state):
    """Through a file, in the mode that runs no code from it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_state_dict(p, optimizer):
    """Into an optimizer that was made for another genome."""
    q = nn.Parameter(p.detach().clone())
    other = FusedEvolvedOptimizer([q], zoo.sgd_momentum, backend=optimizer._backend)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return q, other


CONTINUATIONS = {
    "state_dict": by_state_dict,
    "deepcopy": lambda p, optimizer: copy.deepcopy((p, optimizer)),
    "pickle": lambda p, optimizer: pickle.loads(pickle.dumps((p, optimizer))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", CONTINUATIONS)
def test_training_continues_bit_for_bit(backend, dtype, way):
    p = parameter(70, dtype=dtype)
    first, second = gradients(3, p), gradients(3, p, seed=7)
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=8, backend=backend)
    train(optimizer, (p, first))

    q, other = CONTINUATIONS[way](p, optimizer)
    assert q is not p
    assert snapshot(other) == snapshot(optimizer)
    train(optimizer, (p, second))
    train(other, (q, second))
    assert snapshot(other) == snapshot(optimizer)
    assert other.param_groups[0]["genome"] == RICH
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    assert {other.state[q][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {moment}


def test_what_was_loaded_is_a_copy(backend):
    p, q = parameter(4), parameter(4)
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=9, backend=backend)
    train(optimizer, (p, gradients(2, p)))
    other = FusedEvolvedOptimizer([q], RICH, total_steps=9, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    train(other, (q, gradients(2, q)))
    assert snapshot(optimizer) == before


def test_a_state_of_plain_values():
    p = parameter(4, dtype=torch.float32)
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=9)
    train(optimizer, (p, gradients(2, p)))
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    assert group == {
        "params": [0],
        "genome": RICH.to_dict(),
        "lr": RICH.lr,
        "betas": (RICH.beta1, RICH.beta2),
        "eps": RICH.eps,
        "weight_decay": RICH.weight_decay,
        "total_steps": 9,
        "maximize": False,
        "state_dtype": None,
        "stochastic_rounding": False,
        "seed": 0,
    }
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["genome"] is RICH  # packing the state left it alone


def test_a_rule_saves_no_state_that_it_does_not_keep(backend):
    p = parameter(4)
    for genome, names in [
        (zoo.sgd_momentum, {"step", "exp_avg"}),
        (zoo.rmsprop, {"step", "exp_avg_sq"}),
        (SIGN, {"step"}),
    ]:
        optimizer = FusedEvolvedOptimizer([p], genome, backend=backend)
        train(optimizer, (p, gradients(1, p)))
        assert set(optimizer.state[p]) == names


# With a state from AdamW, and the other way round: (who trains first, who goes on)
def ours(ps, backend):
    return FusedEvolvedOptimizer(ps, zoo.adamw, backend=backend)


def adamw(ps, backend):
    return torch.optim.AdamW(ps, lr=1e-3, weight_decay=1e-2)


@pytest.mark.parametrize(("before", "after"), [(adamw, ours), (ours, adamw)])
def test_states_are_exchanged_with_adamw(backend, before, after):
    p, q = parameter(5), parameter(5)
    gs = gradients(6, p)
    train(adamw([q], backend), (q, gs))

    first = before([p], backend)
    train(first, (p, gs[:3]))
    second = after([p], backend)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(second, (p, gs[3:]))
    assert_close(p, q)


def test_moments_of_half_parameters_keep_all_their_digits_from_adamw_too(backend):
    p = parameter(4, dtype=torch.bfloat16)
    moment = torch.tensor([1 / 3, 1e-9, 1e30, 7.0])
    state = {"step": torch.tensor(2.0), "exp_avg": moment, "exp_avg_sq": moment}
    optimizer = FusedEvolvedOptimizer([p], zoo.adamw, backend=backend)
    groups = torch.optim.AdamW([p]).state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert torch.equal(optimizer.state[p]["exp_avg"], moment)
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], moment)


def test_a_failed_load_changes_nothing(backend):
    def optimizer_of(*shapes, genome=zoo.adamw):
        ps = [parameter(*shape) for shape in shapes]
        optimizer = FusedEvolvedOptimizer(ps, genome, backend=backend)
        train(optimizer, *((p, gradients(1, p)) for p in ps))
        return optimizer

    good = optimizer_of((4,)).state_dict()
    (group,) = good["param_groups"]

    def with_group(**changes):
        return {**good, "param_groups": [{**group, **changes}]}

    bad_moment = {0: {**good["state"][0], "exp_avg": 1.0}}
    cases = [
        (optimizer_of((5,)).state_dict(), OptimizerError, "exp_avg of a parameter of shape"),
        ({**good, "state": bad_moment}, OptimizerError, "is float; the state belongs to another"),
        (optimizer_of((4,), (4,)).state_dict(), ValueError, "doesn't match the size"),
        ({**good, "param_groups": [group, group]}, ValueError, "different number of parameter"),
        (with_group(genome={"schema_version": 1}), GenomeError, "genome lacks"),
        (with_group(genome=zoo.evolved_2025.to_dict()), OptimizerError, "total_steps="),
        (with_group(genome="adam"), OptimizerError, "genome must be an evokernels.Genome"),
        (with_group(lr=-1.0), OptimizerError, "lr must lie in"),
        (with_group(maximize=2), OptimizerError, "maximize must be True or False"),
        (with_group(amsgrad=True), OptimizerError, "amsgrad=True"),
    ]
    optimizer = optimizer_of((4,))
    before = snapshot(optimizer)
    for state, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(state)
        assert snapshot(optimizer) == before, message


# Hooks


def test_step_hooks_run_around_the_step(backend):
    p = parameter(3)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(p.detach().clone()))
    train(optimizer, (p, gradients(1, p)))
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], p)


def test_hooks_of_loading_have_a_say(backend):
    p, q = parameter(3), parameter(3)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    train(optimizer, (p, gradients(2, p)))
    other = FusedEvolvedOptimizer([q], zoo.adam, backend=backend)
    named = {f"moment {k}" if k != "step" else k: v for k, v in optimizer.state[p].items()}

    def rename(_, state):
        state["state"] = {0: {k.removeprefix("moment "): v for k, v in state["state"][0].items()}}

    def halve(loaded):
        loaded.state[q]["exp_avg"] /= 2

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(halve)
    other.load_state_dict({**optimizer.state_dict(), "state": {0: named}})
    assert torch.equal(2 * other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])
    assert torch.equal(other.state[q]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


# Learning rates from outside


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    # moves betas, too
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_adamw(backend, name, as_tensor):
    p, q = parameter(5), parameter(5)
    lr = [torch.tensor(1e-3, dtype=torch.float64) if as_tensor else 1e-3 for _ in range(2)]
    ours = FusedEvolvedOptimizer([{"params": p, "lr": lr[0]}], zoo.adamw, backend=backend)
    theirs = torch.optim.AdamW([{"params": q, "lr": lr[1]}], weight_decay=1e-2, foreach=False)
    for optimizer, parameter_ in ((ours, p), (theirs, q)):
        scheduler = SCHEDULERS[name](optimizer)
        for g in gradients(8, p):
            train(optimizer, (parameter_, [g]))
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
    assert float(ours.param_groups[0]["lr"]) != 1e-3
    assert_close(p, q)


def test_the_schedule_of_the_genome_acts_on_top(backend):
    p = parameter(4)
    gs = gradients(5, p)
    expected = trained(RICH, p, gs, total_steps=6, lr_factors=[0.5**i for i in range(5)])
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=6, backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for g in gs:
        train(optimizer, (p, [g]))
        scheduler.step()
    assert_close(p, expected)


def test_a_gradient_scaler_skips_a_step_that_overflowed(backend):
    p = parameter(4, dtype=torch.float32)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = p.detach().double()
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"].item() == 2
    expected = trained(zoo.adam, start, [torch.ones(4)] * 2)
    torch.testing.assert_close(p.detach(), expected.float())


# What a user may do to parameters and state between two steps. Each must be noticed: the optimizer
# works on addresses, and an old one means a lost update or somebody else's memory.


def new_memory(p, optimizer):
    p.data = p.data.clone()


def transposed(p, optimizer):
    p.data = p.data.t().contiguous().t()


def swapped_axes_in_place(p, optimizer):
    """The same memory in another order."""
    values = p.data.clone()
    p.data = p.data.t()
    p.data.copy_(values)


def strided(p, optimizer):
    p.data = p.data.repeat_interleave(2, dim=1)[:, ::2]


def moments_in_new_memory(p, optimizer):
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[p][name]
        moment.data, old = moment.data.clone(), moment.data
        old.fill_(math.nan)


def moments_replaced(p, optimizer):
    state = optimizer.state[p]
    for name, moment in list(state.items()):
        state[name] = moment.clone()
        moment.fill_(math.nan)


def moments_transposed(p, optimizer):
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name].t().contiguous().t()


def state_in_a_new_dict(p, optimizer):
    old = optimizer.state
    optimizer.state = defaultdict(dict, copy.deepcopy({p: dict(old[p])}, {id(p): p}))
    old[p]["exp_avg"].fill_(math.nan)


def groups_replaced(p, optimizer):
    old = optimizer.param_groups
    optimizer.param_groups = [dict(group) for group in old]
    old[0]["lr"] = math.nan


def another_gradient_layout(p, optimizer):
    p.grad = None


@pytest.mark.parametrize(
    "action",
    [
        new_memory,
        transposed,
        swapped_axes_in_place,
        strided,
        moments_in_new_memory,
        moments_replaced,
        moments_transposed,
        state_in_a_new_dict,
        groups_replaced,
        another_gradient_layout,
    ],
    ids=lambda action: action.__name__,
)
def test_training_goes_on_after(backend, action):
    p = parameter(3, 3)
    gs = gradients(4, p)
    expected = trained(RICH, p, gs, total_steps=9)
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=9, backend=backend)
    train(optimizer, (p, gs[:2]))
    action(p, optimizer)
    train(optimizer, (p, [g.t().contiguous().t() for g in gs[2:]]))
    assert_close(p, expected)
    assert optimizer.state[p]["step"].item() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_may_change_its_dtype_while_training(backend, dtype):
    model = nn.Linear(300, 3)
    optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adamw, backend=backend)
    train(optimizer, (model.weight, gradients(2, model.weight)))
    start = optimizer.state[model.weight]["exp_avg"].clone()
    model.to(dtype)
    train(optimizer, (model.weight, [torch.zeros_like(model.weight)]))
    state = optimizer.state[model.weight]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == arithmetic
    torch.testing.assert_close(state["exp_avg"].float(), 0.9 * start)
    assert state["step"].item() == 3


@pytest.mark.parametrize("everything", [True, False], ids=["all", "one"])
def test_state_taken_away_starts_afresh(backend, everything):
    p = parameter(4)
    gs = gradients(4, p)
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=9, backend=backend)
    train(optimizer, (p, gs[:2]))
    expected = trained(RICH, p, gs[2:], total_steps=9)
    if everything:
        optimizer.state.clear()
    else:
        optimizer.state[p] = {}
    train(optimizer, (p, gs[2:]))
    assert_close(p, expected)


def test_a_step_count_may_be_set(backend):
    ps = parameter(4), parameter(4)
    gs = gradients(1, ps[0])
    genome = dataclasses.replace(SIGN, use_warmup=True, warmup_steps=100)
    optimizer = FusedEvolvedOptimizer(ps, genome, backend=backend)
    train(optimizer, *((p, gs) for p in ps))
    optimizer.state[ps[1]]["step"].fill_(49)
    before = [p.detach().clone() for p in ps]
    train(optimizer, *((p, gs) for p in ps))
    steps = [(old - p).abs().mean().item() for old, p in zip(before, ps, strict=True)]
    assert steps == pytest.approx([genome.lr * 2 / 100, genome.lr * 50 / 100])


def test_a_parameter_may_be_replaced_with_part_of_its_state(backend):
    # as codes do that prune or grow a model while it trains
    p = parameter(6)
    gs = gradients(4, p)
    expected = trained(RICH, p, gs, total_steps=9)[:3]
    optimizer = FusedEvolvedOptimizer([p], RICH, total_steps=9, backend=backend)
    train(optimizer, (p, gs[:2]))
    state = optimizer.state.pop(p)
    q = nn.Parameter(p.detach()[:3].clone())
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name][:3].clone()
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state[q] = state
    train(optimizer, (q, [g[:3] for g in gs[2:]]))
    assert_close(q, expected)


@pytest.mark.parametrize("how", ["group", "parameter"])
def test_what_was_taken_out_is_left_alone(backend, how):
    a, b = parameter(4), parameter(4)
    optimizer = FusedEvolvedOptimizer([{"params": [a]}, {"params": [b]}], SIGN, backend=backend)
    train(optimizer, (a, gradients(1, a)), (b, gradients(1, b)))
    before = b.detach().clone()
    if how == "group":
        del optimizer.param_groups[1]
    else:
        optimizer.param_groups[1]["params"].clear()
    train(optimizer, (a, gradients(1, a)), (b, gradients(1, b)))
    assert torch.equal(b, before)


# Errors


def test_total_steps_is_asked_for_where_the_genome_needs_it(backend):
    with pytest.raises(OptimizerError) as error:
        FusedEvolvedOptimizer([parameter(2)], zoo.evolved_2025, backend=backend)
    assert "cosine" in str(error.value)
    assert "FusedEvolvedOptimizer(params, genome, total_steps=...)" in str(error.value)


def negated():
    return nn.Parameter(torch.ones(2, dtype=torch.complex64).conj().imag)


def overlapping():
    return nn.Parameter(torch.as_strided(torch.ones(4), (3, 2), (1, 1)))


def tied():
    memory = torch.zeros(10)
    return [nn.Parameter(memory[:6]), nn.Parameter(memory[5:])]


# (parameters, options of their group, error, message)
BAD_GROUPS = [
    (
        lambda: torch.ones(2, dtype=torch.int64),
        {},
        OptimizerError,
        "torch.int64; parameters may be",
    ),
    (lambda: torch.ones(2, dtype=torch.complex64), {}, OptimizerError, "torch.complex64; param"),
    (lambda: torch.ones(2).to_sparse(), {}, OptimizerError, "sparse_coo; parameters must be dense"),
    (lambda: torch.ones(2, device="meta"), {}, OptimizerError, "materialise the model first"),
    (lambda: torch.ones(1).expand(3), {}, OptimizerError, "strides (0,) has elements that share"),
    (negated, {}, OptimizerError, "is a negated view; call .resolve_neg()"),
    (overlapping, {}, OptimizerError, "strides (1, 1) has elements that share"),
    (tied, {}, OptimizerError, "share memory, so each would be updated twice"),
    (None, {"lr": -1e-3}, OptimizerError, "lr must lie in [0, inf), got -0.001"),
    (None, {"lr": math.nan}, OptimizerError, "lr must lie in [0, inf), got nan"),
    (None, {"lr": "fast"}, OptimizerError, "lr must lie in [0, inf), got 'fast'"),
    (None, {"lr": None}, OptimizerError, "lr must lie in [0, inf), got None"),
    (None, {"lr": torch.ones(2)}, OptimizerError, "lr must lie in [0, inf), got tensor"),
    (None, {"eps": -1e-8}, OptimizerError, "eps must lie in [0, inf), got -1e-08"),
    (None, {"eps": math.inf}, OptimizerError, "eps must lie in [0, inf), got inf"),
    (None, {"weight_decay": -1}, OptimizerError, "weight_decay must lie in [0, inf), got -1"),
    (None, {"betas": (0.9, 1.0)}, OptimizerError, "betas must lie in [0, 1), got 1.0"),
    (None, {"betas": (-0.1, 0.9)}, OptimizerError, "betas must lie in [0, 1), got -0.1"),
    (None, {"betas": ("a", 0.9)}, OptimizerError, "betas must lie in [0, 1), got 'a'"),
    (None, {"betas": (0.9,)}, OptimizerError, "betas must be two numbers in [0, 1), got (0.9,)"),
    (None, {"betas": 0.9}, OptimizerError, "betas must be two numbers in [0, 1), got 0.9"),
    (
        None,
        {"total_steps": 0},
        OptimizerError,
        "total_steps must be a positive whole number, got 0",
    ),
    (None, {"total_steps": 1.5}, OptimizerError, "total_steps must be a positive whole number"),
    (None, {"total_steps": True}, OptimizerError, "total_steps must be a positive whole number"),
    (None, {"genome": zoo.evolved_2025}, OptimizerError, "total_steps="),
    (None, {"genome": "adam"}, OptimizerError, "genome must be an evokernels.Genome, got str"),
    (None, {"genome": None}, OptimizerError, "genome must be an evokernels.Genome, got NoneType"),
    (
        None,
        {"genome": zoo.adam.to_dict()},
        OptimizerError,
        "got dict; take one from evokernels.zoo",
    ),
    (None, {"amsgrad": True}, OptimizerError, "amsgrad=True asks for a rule that no genome has"),
    (None, {"maximize": "yes"}, OptimizerError, "maximize must be True or False, got 'yes'"),
    (None, {"stochastic_rounding": 1}, OptimizerError, "stochastic_rounding must be True or False"),
    (None, {"seed": -1}, OptimizerError, "seed must be a whole number in [0, 2^64), got -1"),
    (None, {"seed": 1.0}, OptimizerError, "seed must be a whole number"),
    (
        None,
        {"state_dtype": torch.float16},
        OptimizerError,
        "state_dtype must be None, torch.float32 or torch.bfloat16, got torch.float16",
    ),
    # torch's own
    (lambda: parameter(2) * 1, {}, ValueError, "can't optimize a non-leaf Tensor"),
    (lambda: [1.0], {}, TypeError, "optimizer can only optimize Tensors"),
    (lambda: {parameter(2)}, {}, TypeError, "ordered collections"),
]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"), BAD_GROUPS, ids=[row[3][:30] for row in BAD_GROUPS]
)
def test_bad_groups_are_turned_down_and_leave_no_trace(backend, make, options, error, message):
    group = {"params": make() if make else parameter(2), **options}
    with pytest.raises(error) as raised:
        FusedEvolvedOptimizer([group], zoo.adam, backend=backend)
    assert message in str(raised.value)

    p = parameter(4)
    gs = gradients(4, p)
    expected = trained(zoo.adam, p, gs)
    optimizer = FusedEvolvedOptimizer([p], zoo.adam, backend=backend)
    train(optimizer, (p, gs[:2]))
    before = snapshot(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert snapshot(optimizer) == before
    train(optimizer, (p, gs[2:]))
    assert_close(p, expected)


def test_errors_of_the_arguments(backend):
    p = parameter(2)
    for params, genome, options, error, message in [
        ([], zoo.adam, {}, ValueError, "empty parameter list"),
        (p, zoo.adam, {}, TypeError, "should be an iterable of Tensors"),
        ([p], "adam", {}, OptimizerError, "genome must be an evokernels.Genome"),
        (
            [p],
            zoo.adam,
            {"backend": "cuda++"},
            BackendError,
            "unknown backend 'cuda\\+\\+'; use 'auto'",
        ),
        ([p], zoo.adam, {"total_steps": -1}, OptimizerError, "total_steps must be"),
        ([{"params": p}, {"params": p}], zoo.adam, {}, ValueError, "more than one parameter group"),
    ]:
        with pytest.raises(error, match=message):
            FusedEvolvedOptimizer(params, genome, **{"backend": backend, **options})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        FusedEvolvedOptimizer([p], zoo.adam).add_param_group([parameter(2)])
    assert issubclass(OptimizerError, EvokernelsError)


def sparse_gradient(p, optimizer):
    p.grad = torch.ones_like(p).to_sparse()


def stale_gradient(p, optimizer):
    p.data = torch.ones(5, dtype=p.dtype)


def gradient_of_another_dtype(p, optimizer):
    p.data = p.data.float()


def bad_lr(p, optimizer):
    optimizer.param_groups[0]["lr"] = -1.0


def moment_of_another_shape(p, optimizer):
    optimizer.state[p]["exp_avg"] = torch.zeros(9, dtype=p.dtype)


@pytest.mark.parametrize("running", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            sparse_gradient,
            "sparse_coo; gradients must be dense: build the embedding with sparse=False",
        ),
        (stale_gradient, "call zero_grad() after giving"),
        (gradient_of_another_dtype, "its gradient (3,) and torch.float64"),
        (bad_lr, "lr must lie in"),
        (moment_of_another_shape, "exp_avg of a parameter of shape (3,) is (9,)"),
    ],
)
def test_a_failed_step_changes_nothing(backend, harm, message, running):
    other, p = parameter(3), parameter(3, seed=1)
    optimizer = FusedEvolvedOptimizer([other, p], zoo.adamw, backend=backend)
    if running:
        train(optimizer, *((q, gradients(2, q)) for q in (other, p)))
    other.grad, p.grad = torch.ones_like(other), torch.ones_like(p)
    harm(p, optimizer)
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError) as error:
        optimizer.step()
    assert message in str(error.value)
    assert snapshot(optimizer) == before


def test_an_embedding_with_sparse_gradients_is_told_what_to_do(backend):
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = FusedEvolvedOptimizer(embedding.parameters(), zoo.adam, backend=backend)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptimizerError, match="sparse=False"):
        optimizer.step()


# explain

# (genome, options, what is printed, what is not)
EXPLAINED = [
    (
        zoo.adamw,
        {},
        ["state    m, v in torch.float32", "traffic  28 bytes", "backend  cpu: evk_"],
        [],
    ),
    (zoo.adamw, {"dtype": torch.float64}, ["m, v in torch.float64", "traffic  56 bytes"], []),
    (zoo.adamw, {"dtype": torch.bfloat16}, ["m, v in torch.float32", "traffic  22 bytes"], []),
    (zoo.sgd_momentum, {}, ["state    m in torch.float32", "traffic  20 bytes", "m ← "], ["v ← "]),
    (zoo.rmsprop, {}, ["state    v in", "traffic  20 bytes", "v ← "], ["m ← "]),
    (SIGN, {}, ["state    none", "traffic  12 bytes", "sign(g)", "lr = 0.001"], ["m ← ", "v ← "]),
    (SIGN, {"backend": "eager"}, ["backend  eager: "], ["not cpu"]),
    (SIGN, {"device": "cuda"}, ["backend  eager: ", "not cpu: it runs on the CPU, the"], []),
    (zoo.evolved_2025, {}, ["100 steps", "cosine", "sign(g)", "p ← p - lr * (", "key      "], []),
]


@pytest.mark.parametrize(("genome", "options", "present", "absent"), EXPLAINED)
def test_explain(capsys, genome, options, present, absent):
    assert evokernels.explain(genome, **options) is None
    printed = capsys.readouterr().out
    assert [text for text in present if text not in printed] == []
    assert [text for text in absent if text in printed] == []


def test_explain_prints_where_it_is_told(capsys):
    file = io.StringIO()
    evokernels.explain(zoo.adam, file=file)
    assert "backend  cpu" in file.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("genome", "options", "error", "message"),
    [
        ("adam", {}, GenomeError, "explain takes an evokernels.Genome, got str"),
        (zoo.adam, {"dtype": torch.int8}, OptimizerError, "dtype is torch.int8; parameters may be"),
        (
            zoo.adam,
            {"backend": "gpu"},
            BackendError,
            "unknown backend 'gpu'; use 'auto', 'cpu', 'cuda', 'triton', 'eager'",
        ),
        (zoo.adam, {"backend": "cpu", "device": "cuda"}, BackendError, "it runs on the CPU"),
    ],
)
def test_explain_errors(genome, options, error, message):
    with pytest.raises(error, match=message):
        evokernels.explain(genome, **options)


@pytest.mark.parametrize(
    "moment",
    [
        torch.zeros(1, dtype=torch.float64).expand(4),
        torch.ones(4, dtype=torch.float64)._neg_view(),
        torch.ones(4, dtype=torch.float64).to_sparse(),
    ],
    ids=["expanded", "negated", "sparse"],
)
def test_moments_that_cannot_be_written_one_by_one_are_an_error(backend, moment):
    p = parameter(4)
    optimizer = FusedEvolvedOptimizer([p], zoo.adamw, backend=backend)
    train(optimizer, (p, gradients(2, p)))
    optimizer.state[p]["exp_avg"] = moment
    before = p.detach().clone()
    with pytest.raises(OptimizerError, match="exp_avg of shape"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 2


def test_the_default_device_does_not_matter(backend):
    p, q = parameter(4), parameter(4)
    given = gradients(3, p)
    for device, x in (("cpu", p), ("meta", q)):
        with torch.device(device):
            # columns of one matrix: whether they share memory is asked element by element
            columns = torch.ones(3, 2, device="cpu").unbind(1)
            ps = [x, *map(nn.Parameter, columns)]
            optimizer = FusedEvolvedOptimizer(ps, zoo.adamw, max_grad_norm=1.0, backend=backend)
            train(optimizer, (x, given))
    assert torch.equal(p, q)


def test_a_gradient_on_another_device_is_an_error():
    p = parameter(4)
    optimizer = FusedEvolvedOptimizer([p], SIGN, backend="cpu")
    train(optimizer, (p, gradients(1, p)))
    (plan,) = optimizer._binding.plans  # of the CPU; p.data = p.cpu() leaves the gradient behind
    with pytest.raises(OptimizerError, match="on meta"):
        plan.sum_of_squares([torch.ones(4, dtype=p.dtype, device="meta")])


def test_a_step_post_hook_alone_is_called():
    p, seen = parameter(3), []
    optimizer = FusedEvolvedOptimizer([p], SIGN)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    train(optimizer, (p, gradients(3, p)))
    assert len(seen) == 3


def test_parameters_that_come_to_share_memory_are_an_error(backend):
    p, q = parameter(3), parameter(3)
    optimizer = FusedEvolvedOptimizer([p, q], SIGN, backend=backend)
    train(optimizer, (p, gradients(3, p)), (q, gradients(3, q)))
    q.data = p.data
    with pytest.raises(OptimizerError, match="share memory"):
        optimizer.step()
