"""What PyTorch asks of an optimizer, held against torch.optim and its own test inputs.

The inputs and error inputs are torch's, the test bodies ours: torch does not ship its own. What
evokernels adds to an optimizer's options is in test_contract_options.py.
"""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from contract import (
    PRESETS,
    RICH,
    TORCH,
    TOTAL_STEPS,
    assert_close,
    assert_trained,
    definition,
    gradients,
    ours,
    parameter,
    snapshot,
    train,
    trained_by_torch,
)
from oracle import DTYPES
from torch import nn
from torch.optim import lr_scheduler
from torch.testing._internal import common_optimizers as torch_inputs

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import OptimizerError

# torch.testing._internal.common_optimizers drives the class


def stand_in(name):
    """A class as torch's machinery expects it: the rule is its own, options are arguments."""

    class StandIn(FusedEvolvedOptimizer):
        def __init__(self, params, **options):
            backend = options.pop("backend", "auto")
            maximize = {"maximize": True} if options.pop("maximize", False) else {}
            if not isinstance(params, torch.Tensor):
                groups = params if isinstance(params[0], dict) else [{"params": params}]
                params = [{**options, **group} for group in groups]
            super().__init__(
                params, PRESETS[name], total_steps=TOTAL_STEPS, backend=backend, **maximize
            )

    StandIn.__name__ = name
    return StandIn


def translated(name, options):
    """Options of torch's optimizer in ours; None where they ask for a rule that is another one."""
    options = dict(options)
    coupled = options.get("weight_decay") and name in ("momentum", "rmsprop", "adam")
    if coupled or {"amsgrad", "centered", "nesterov", "dampening", "foreach"} & set(options):
        return None
    if name != "momentum":
        return None if "momentum" in options else options
    if "momentum" not in options:
        return None
    # torch's buffer is a sum, ours an average
    beta = options.pop("momentum")
    return {**options, "lr": options.get("lr", 1e-3) / (1 - beta), "betas": (beta, 0.0)}


def inputs_in_ours(name, torch_function, device, dtype=None):
    return [
        torch_inputs.OptimizerInput(None, kwargs, i.desc)
        for i in torch_function(device)
        if (kwargs := translated(name, i.kwargs)) is not None
    ]


def info(name, like):
    inputs = getattr(torch_inputs, f"optim_inputs_func_{like}")
    return torch_inputs.OptimizerInfo(
        stand_in(name),
        optim_inputs_func=partial(inputs_in_ours, name, inputs),
        optim_error_inputs_func=getattr(torch_inputs, f"optim_error_inputs_func_{like}"),
        supported_impls=(),
        supports_complex=False,
    )


# The rules, and the torch optimizer whose inputs they are given.
INFOS = [
    info("sgd", "sgd"),
    info("momentum", "sgd"),
    info("rmsprop", "rmsprop"),
    info("adam", "adam"),
    info("adamw", "adamw"),
    info("sign", "adamw"),
    info("evolved_2025", "adamw"),
]
INPUTS = [
    pytest.param(i, given, id=f"{i.name}-{given.desc}")
    for i in INFOS
    for given in i.optim_inputs_func(device="cpu")
]


def with_options(genome, options):
    """The genome whose own numbers are these options."""
    genes = {"lr_log10": math.log10(options["lr"])} if "lr" in options else {}
    if options.get("weight_decay"):
        genes["wd_log10"] = math.log10(options["weight_decay"])
    if "betas" in options:
        genes["beta1"], genes["beta2"] = options["betas"]
    return dataclasses.replace(genome, **genes)


@pytest.mark.parametrize(("info", "given"), INPUTS)
def test_torchs_inputs(backend, info, given):
    p = parameter(6)
    start, gs = p.detach().clone(), gradients(7, p)
    gs[3] = None
    train(info.optim_cls([p], **given.kwargs, backend=backend), (p, gs))

    options = {k: float(v) if k == "lr" else v for k, v in given.kwargs.items()}
    sign = -1 if options.get("maximize") else 1
    genome = with_options(PRESETS[info.name], options)
    assert_close(p, definition(genome, start, [g if g is None else sign * g for g in gs]))
    if info.name in TORCH:
        if info.name == "momentum":
            beta, _ = options.pop("betas")
            options.update(lr=options["lr"] * (1 - beta), momentum=beta)
        if info.name in ("sgd", "rmsprop") and "lr" not in options:
            options["lr"] = genome.lr  # torch's default is another one
        assert_close(p, trained_by_torch(info.name, start, gs, **options))


def test_torchs_inputs_are_many():
    per_rule = {i.name: len(i.optim_inputs_func(device="cpu")) for i in INFOS}
    assert min(per_rule.values()) >= 1
    assert sum(per_rule.values()) >= 18, per_rule


# What we say where torch says something else, and what we do not turn down.
OUR_WORDS = {
    "Tensor lr must be 1-element": "lr must lie in",
    "beta1 should be between 0 and 1": "betas must lie in",
    "weight_decay should > 0": "weight_decay must lie in",
    "momentum should be between 0 and 1": "betas must lie in",
    "betas must be either both floats or both Tensors": None,
}


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torchs_error_inputs(backend, info):
    seen = 0
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        message = OUR_WORDS.get(given.desc, error.error_regex)
        options = dict(given.kwargs)
        if "momentum" in options:
            options["betas"] = (options.pop("momentum"), 0.0)
        if message is None or "foreach" in options:
            continue
        params = [parameter(2)] if given.params is None else given.params
        expected = (pytest.warns if issubclass(error.error_type, Warning) else pytest.raises)(
            error.error_type, match=message
        )
        with expected:
            info.optim_cls(params, **options, backend=backend)
        seen += 1
    assert seen >= 6


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="lr must lie in"):
        ours([{"params": parameter(2), "lr": -1.0}], "adamw")


# Right numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", PRESETS)
def test_seven_steps_with_pauses(backend, rule, dtype):
    genome = PRESETS[rule]
    ps = {name: parameter(17, 9, seed=i, dtype=dtype) for i, name in enumerate(["free", "frozen"])}
    starts = {name: p.detach().clone() for name, p in ps.items()}
    gs = {name: gradients(7, p, seed=len(name)) for name, p in ps.items()}
    gs["free"][3] = gs["frozen"][3] = None  # nobody has a gradient
    gs["frozen"][4] = gs["frozen"][5] = None
    optimizer = ours(ps.values(), rule, backend=backend)
    for t in range(7):
        ps["frozen"].requires_grad_(t not in (4, 5))
        train(optimizer, *((p, gs[name][t : t + 1]) for name, p in ps.items()))
    for name, p in ps.items():
        assert_trained(p, genome, starts[name], gs[name], f"{name}, definition")
        if rule in TORCH:
            exact = trained_by_torch(rule, starts[name], gs[name])
            if dtype == torch.float64:  # torch itself rounds as often
                assert_close(p, exact)
            else:
                assert_trained(p, genome, starts[name], gs[name], f"{name}, torch", exact)
    assert [optimizer.state[p]["step"].item() for p in ps.values()] == [6, 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", PRESETS)
def test_what_is_not_finite_reaches_the_parameter(backend, rule, dtype):
    for bad in (math.nan, math.inf, -math.inf):
        p = parameter(70, dtype=dtype)
        g = gradients(1, p)[0]
        g[::3] = bad
        touched = torch.arange(70) % 3 == 0
        clean = nn.Parameter(p.detach().clone())
        train(ours([p], rule, backend=backend), (p, [g]))
        train(ours([clean], rule, backend=backend), (clean, [g.masked_fill(touched, 0.5)]))
        if rule == "sign" and bad in (math.inf, -math.inf):
            assert p.isfinite().all()  # the sign of infinity is a number
        else:
            assert not p[touched].isfinite().any()
        if math.isnan(bad):
            assert p[touched].isnan().all()
        assert torch.equal(p[~touched], clean[~touched])


def test_zero_gradients_move_nothing(backend):
    for rule in set(PRESETS) - {"adamw", "sign", "evolved_2025"}:  # those decay
        p = parameter(5)
        start = p.detach().clone()
        optimizer = ours([p], rule, backend=backend)
        train(optimizer, (p, [torch.zeros_like(p)] * 3))
        assert torch.equal(p, start), rule
        assert optimizer.state[p]["step"].item() == 3


def test_a_pause_leaves_every_bit_as_it_is(backend):
    for rule in PRESETS:
        p = parameter(5)
        optimizer = ours([p], rule, backend=backend)
        train(optimizer, (p, gradients(2, p)))
        before, version = snapshot(optimizer), p._version
        train(optimizer, (p, [None, None]))
        assert (snapshot(optimizer), p._version) == (before, version), rule


def test_a_gradient_counts_whether_or_not_it_is_still_required(backend):
    p, q = parameter(5), parameter(5)
    gs = gradients(2, p)
    mine, torchs = ours([p], "adamw", backend=backend), torch.optim.AdamW([q])
    for optimizer, x in ((mine, p), (torchs, q)):
        train(optimizer, (x, gs[:1]))
        x.grad = gs[1]
        x.requires_grad_(False)
        optimizer.step()
    assert_close(p, q.detach())


def test_one_optimizer_over_groups_is_as_many_optimizers(backend):
    options = [{}, {"lr": 3e-2}, {"weight_decay": 0.3}, {"betas": (0.5, 0.7)}, {"eps": 1e-2}]
    cases = [
        (rule, dtype, options[i % len(options)])
        for i, (rule, dtype) in enumerate((r, d) for r in PRESETS for d in DTYPES)
    ]
    together = [parameter(33, seed=i, dtype=dtype) for i, (_, dtype, _) in enumerate(cases)]
    gs = [gradients(4, p, seed=i) for i, p in enumerate(together)]
    for i, g in enumerate(gs):
        g[i % 4] = None
    apart = copy.deepcopy(together)
    groups = [
        {"params": p, "genome": PRESETS[rule], **extra}
        for p, (rule, _, extra) in zip(together, cases, strict=True)
    ]
    train(ours(groups, "sgd", backend=backend), *zip(together, gs, strict=True))
    for p, q, g, (rule, _, extra) in zip(together, apart, gs, cases, strict=True):
        train(ours([{"params": q, **extra}], rule, backend=backend), (q, g))
        assert torch.equal(p, q), (rule, extra)


def test_groups_may_be_empty(backend):
    p = parameter(5)
    start, gs = p.detach().clone(), gradients(3, p)
    optimizer = ours([{"params": []}, {"params": [p]}], "adamw", backend=backend)
    train(optimizer, (p, gs))
    assert_close(p, definition(zoo.adamw, start, gs))
    alone = ours([{"params": []}], "adamw", backend=backend)
    assert alone.step() is None
    alone.load_state_dict(alone.state_dict())


# Learning rates from outside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(
    ("option", "values"),
    [("lr", [0.02]), ("betas", [0.7, 0.9]), ("eps", [1e-3]), ("weight_decay", [0.3])],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_numbers_may_be_tensors(backend, option, values, shape, dtype):
    tensors = [torch.full(shape, value, dtype=dtype) for value in values]
    p, q = parameter(5), parameter(5)

    def given(numbers):
        return {option: tuple(numbers) if option == "betas" else numbers[0]}

    groups = (
        [{"params": p, **given(tensors)}],
        [{"params": q, **given([t.item() for t in tensors])}],
    )
    optimizers = [ours(group, RICH, backend=backend) for group in groups]
    for optimizer, x in zip(optimizers, (p, q), strict=True):
        train(optimizer, (x, gradients(2, x)))
    for tensor in tensors:
        tensor.mul_(0.5)  # in place, as schedulers change a tensor
    optimizers[1].param_groups[0].update(given([t.item() for t in tensors]))
    for optimizer, x in zip(optimizers, (p, q), strict=True):
        train(optimizer, (x, gradients(2, x)))
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", math.nan, "lr must lie in"),
        ("betas", (0.9, 1.0), "betas must lie in"),
        ("betas", (-0.1, 0.9), "betas must lie in"),
        ("eps", -1e-3, "eps must lie in"),
        ("weight_decay", math.inf, "weight_decay must lie in"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_options_spoilt_after_construction_are_turned_down(backend, option, value, message, steps):
    p = parameter(5)
    optimizer = ours([p], "adamw", backend=backend)
    train(optimizer, (p, gradients(steps, p)))
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0][option] = value
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()
    assert snapshot(optimizer) == before


def chained(optimizer):
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=2)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, gamma=0.9)])


def sequential(optimizer):
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=2)
    second = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}
# each entry is a list of schedulers that act one after the other
SETS = {name: [make] for name, make in SCHEDULERS.items()}
(SGD,) = (i for i in torch_inputs.optim_db if i.name == "SGD")  # has the most schedulers
SETS.update({f"torch's {i}": makes for i, makes in enumerate(SGD.scheduler_inputs)})


@pytest.mark.parametrize("name", SETS)
def test_schedulers_act_on_top_of_the_genomes_own_schedule(name):
    p = parameter(5)
    start, gs = p.detach().clone(), gradients(7, p)
    rates = []

    def run(optimizer, x):
        schedulers = [make(optimizer) for make in SETS[name]]
        for g in gs:
            rates.append(float(optimizer.param_groups[0]["lr"]))
            train(optimizer, (x, [g]))
            for scheduler in schedulers:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))

    run(torch.optim.SGD([parameter(5)], lr=RICH.lr), parameter(5))
    torchs = list(rates)
    rates.clear()
    run(ours([p], RICH), p)
    assert rates == torchs
    assert len(set(rates)) > 1 or name.startswith("torch's")
    assert_close(p, definition(RICH, start, gs, lrs=torchs))


# What no kernel can update


@pytest.mark.parametrize("running", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32], ids=str)
def test_a_model_may_not_change_to_what_no_kernel_can_update(backend, dtype, running):
    first, second = parameter(3), parameter(3)
    optimizer = ours([first, second], "adamw", backend=backend)
    if running:
        train(optimizer, *((p, gradients(1, p)) for p in (first, second)))
    second.requires_grad_(False)  # torch lets nothing else become whole numbers
    second.grad = None
    second.data = second.data.to(dtype)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError, match=f"{dtype}; parameters may be"):
        optimizer.step()
    assert snapshot(optimizer) == before
