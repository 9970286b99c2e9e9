"""Steps that a device counts itself: what reaches it, what a captured step goes on with, what is
refused. The device is the host: the CUDA kernels are compiled for it."""

import contextlib
import copy
import dataclasses
import itertools
import math
import weakref

import pytest
import torch
from contract import RICH, assert_same
from cuda_on_host import CudaOnHost
from own_rules import AVERAGED, FORMULAS, rule_of
from torch import nn

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.compiler.words import GROUP, HEADER
from evokernels.errors import BackendError, OptimizerError
from evokernels.kernels import device as device_module
from evokernels.kernels.device import DevicePlan
from evokernels.kernels.registry import BACKENDS
from evokernels.optim import checks, parts

SHAPES = [(33, 23), (7,), (1000,)]
SCHEDULED = dataclasses.replace(
    RICH, use_warmup=True, warmup_steps=40, use_cosine_decay=True, lr_log10=-3.0
)


class Recording(CudaOnHost):
    """Keeps the launches; what is kept can be done again, as a CUDA graph does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.launched = []

    def load(self, kinds, words, device):
        kernel = super().load(kinds, words, device)
        launched = self.launched

        class Kernel:
            resident = kernel.resident

            def update(self, words, blocks):
                launched.append((kernel.update, words.copy(), blocks))
                kernel.update(words, blocks)

            def squares(self, words, blocks):
                launched.append((kernel.squares, words.copy(), blocks))
                kernel.squares(words, blocks)

        return Kernel()

    def replay(self):
        for launch, words, blocks in self.launched:
            launch(words, blocks)


@pytest.fixture
def recording(monkeypatch):
    backend = Recording()
    monkeypatch.setitem(BACKENDS, "recording", backend)
    # the memory of a graph is its own as long as it lives
    sums, squares = [], DevicePlan.squares
    monkeypatch.setattr(
        DevicePlan, "squares", lambda *args: sums.append(squares(*args)) or sums[-1]
    )
    return backend


@pytest.fixture
def capture(monkeypatch):
    """Call it with True and False: whether a step goes into a graph."""

    def set_to(captured):
        for module in (device_module, checks, parts):
            monkeypatch.setattr(module, "capturing", lambda device: captured)

    return set_to


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def optimizer_of(params, genome=SCHEDULED, backend="recording", **options):
    lr = torch.tensor(genome.lr, dtype=torch.float64)
    groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "genome": zoo.adam}]
    groups[1]["lr"] = torch.tensor(1e-3)
    return FusedEvolvedOptimizer(groups, genome, total_steps=800, backend=backend, **options)


@pytest.mark.parametrize("genome", [SCHEDULED, "own"], ids=["classic", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_replayed_equals_as_many_steps(recording, monkeypatch, dtype, genome):
    """Counting, schedule, bias correction, learning rate, loss scale, found_inf and norm go on; and
    so do progress and averages with a bias of their own."""
    if genome == "own":
        monkeypatch.setattr("evokernels.genome._own_terms", {})
        own = (FORMULAS["exp"], FORMULAS["where"], AVERAGED["four averages"])
        genome = rule_of(*own, use_bias_correction=True, lr_log10=-3.0)
    steps = 1000
    runs = []
    for replayed in (False, True):
        params = parameters(dtype)
        options = {"stochastic_rounding": True} if dtype == torch.bfloat16 else {}
        optimizer = optimizer_of(params, genome, max_grad_norm=3.0, **options)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([1.0]), torch.tensor([0.0])
        schedulers = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        optimizer.step()
        for t in range(2, steps + 1):
            optimizer.found_inf.fill_(t % 10 == 7)
            optimizer.grad_scale.fill_(1 + t % 4)
            if t == 2 or not replayed:
                recording.launched.clear()
                optimizer.step()
            else:
                recording.replay()
            schedulers.step()
        runs.append((params, optimizer))
    (ps, eager), (qs, graphed) = runs
    assert_same(ps, qs)
    for p, q in zip(ps, qs, strict=True):
        assert eager.state[p]["step"] == graphed.state[q]["step"] == steps - steps // 10
        for name in eager.state[p]:
            assert torch.equal(eager.state[p][name], graphed.state[q][name])


def test_the_long_way_looks_at_each_gradient_once_and_the_short_one_at_none(recording, monkeypatch):
    looked = []
    layout_key = device_module.layout_key
    monkeypatch.setattr(device_module, "layout_key", lambda g: looked.append(g) or layout_key(g))
    params = parameters()
    optimizer = optimizer_of(params, max_grad_norm=1.0)
    counts = []
    for _ in range(4):
        looked.clear()
        optimizer.step()
        counts.append(len(looked))
    assert counts == [len(params)] * 2 + [0] * 2


def test_a_step_is_one_launch(recording):
    params = parameters()
    optimizer = optimizer_of(params)
    for _ in range(4):  # the long way, then the short one
        recording.launched.clear()
        optimizer.step()
        assert len(recording.launched) == 1


def test_steps_take_the_short_way_and_it_changes_nothing(recording, monkeypatch):
    """With gradients that move, are cleared, clipped; autograd is told both times."""
    short = []
    repeat = parts.DevicePart.repeat
    monkeypatch.setattr(
        parts.DevicePart, "repeat", lambda *args: short.append(repeat(*args)) or short[-1]
    )
    ps, qs = parameters(), parameters()
    optimizers = [optimizer_of(x, max_grad_norm=1.0, zero_grads=True) for x in (ps, qs)]
    for t in range(6):
        for optimizer, params in zip(optimizers, (ps, qs), strict=True):
            kept = [p.grad for p in params]
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * (t + i + 1))
            if params is qs:
                optimizer._binding = None  # the long way
            versions = [p._version for p in params], [p.grad._version for p in params]
            optimizer.step()
            assert [p._version for p in params] == [v + 1 for v in versions[0]]
            assert [p.grad._version for p in params] == [v + 1 for v in versions[1]]
            assert not any(p.grad.any() for p in params)
            del kept
    assert_same(ps, qs)
    assert len(short) >= 3


def test_autograd_is_told_of_gradients_that_the_short_way_clears(recording):
    params = parameters()
    optimizer = optimizer_of(params, zero_grads=True)
    for _ in range(5):  # where they are known to lie apart
        versions = [p.grad._version for p in params]
        optimizer.step()
        assert [p.grad._version for p in params] == [v + 1 for v in versions]


def test_a_short_step_with_shared_gradients_goes_the_long_way(recording):
    ps, qs = parameters(), parameters()
    shared = torch.arange(1000.0) - 500
    for params, backend in ((ps, "recording"), (qs, "eager")):
        optimizer = optimizer_of(params, backend=backend, zero_grads=True)
        for t in range(5):
            memory = shared.clone() + t
            for p in params:
                p.grad = memory[: p.numel()].view(p.shape) if t % 2 else torch.ones_like(p) * t
            optimizer.step()
            assert not any(p.grad.any() for p in params)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_a_graph_would_freeze_is_refused(recording, capture):
    params = parameters()
    optimizer = optimizer_of(params)
    start = [p.detach().clone() for p in params]
    capture(True)
    with pytest.raises(OptimizerError, match="take one before the capture"):
        optimizer.step()
    assert not optimizer.state
    capture(False)
    optimizer.step()
    capture(True)
    optimizer.step()
    params[0].grad = params[0].grad.t().contiguous().t()
    with pytest.raises(OptimizerError, match="run one with such gradients before"):
        optimizer.step()
    params[0].grad = params[0].grad.contiguous()
    optimizer.param_groups[1]["lr"] = 1e-3
    with pytest.raises(OptimizerError, match=r"lr is 0\.001, which a captured step would keep"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = torch.tensor(1, dtype=torch.int64)
    with pytest.raises(OptimizerError, match=r"lr is a torch\.int64 tensor on cpu"):
        optimizer.step()
    assert {s["step"].item() for s in optimizer.state.values()} == {2.0}
    assert not any(torch.equal(p, s) for p, s in zip(params, start, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_backends_that_count_on_the_host_cannot_be_captured(backend, capture):
    params = parameters()
    optimizer = optimizer_of(params, backend=backend)
    optimizer.step()
    before = copy.deepcopy(params)
    capture(True)
    with pytest.raises(OptimizerError, match="count steps on the host"):
        optimizer.step()
    assert_same(params, before)


def test_what_a_graph_reads_is_kept(recording, capture):
    params = parameters()
    optimizer = optimizer_of(params)
    optimizer.step()
    capture(True)
    optimizer.step()
    capture(False)
    captured = optimizer._binding
    params[1].data = params[1].data.clone()
    optimizer.step()
    assert optimizer._binding is not captured
    assert optimizer._captured == [captured]
    assert copy.deepcopy(optimizer)._captured == []


def test_what_a_graph_reads_outlives_other_rates_and_states(recording, capture):
    params = parameters()
    optimizer = optimizer_of(params)
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(2e-3)  # of which the long way knows nothing
    capture(True)
    optimizer.step()
    capture(False)
    captured = optimizer._binding
    rate = weakref.ref(optimizer.param_groups[0]["lr"])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = torch.tensor(0.5)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(saved))
    del saved
    optimizer.step()
    assert optimizer._captured == [captured]
    assert rate() is not None


@pytest.mark.parametrize(
    "lr", [torch.empty((), device="meta"), torch.ones(2)], ids=["elsewhere", "two"]
)
def test_a_learning_rate_that_the_kernel_cannot_read_is_asked_for_its_value(recording, lr):
    params = parameters()
    optimizer = optimizer_of(params)
    for _ in range(3):  # the long way, then the short one
        optimizer.step()
    before = copy.deepcopy(params)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(OptimizerError, match="lr must lie in"):
        optimizer.step()
    assert_same(params, before)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", (0.9, torch.tensor(0.99))),
        ("eps", torch.tensor(1e-8)),
        ("weight_decay", torch.tensor(0.1)),
        ("beta3", torch.tensor(0.9)),
    ],
)
def test_tensors_that_only_a_capture_would_read_are_refused(recording, capture, name, value):
    params = parameters()
    optimizer = optimizer_of(params, rule_of(AVERAGED["one average"]))
    optimizer.param_groups[0][name] = value
    optimizer.step()
    before = copy.deepcopy(params)
    capture(True)
    with pytest.raises(OptimizerError, match=f"{name} of a captured step must be numbers"):
        optimizer.step()
    assert_same(params, before)


@pytest.mark.parametrize(("backend", "steps"), [("recording", 0), ("eager", 1)])
def test_a_captured_step_is_refused_before_it_asks_for_found_inf(
    recording, capture, backend, steps
):
    optimizer = optimizer_of(parameters(), backend=backend)
    for _ in range(steps):
        optimizer.step()
    # no value to ask for, as in a capture
    optimizer.found_inf = torch.zeros(1, device="meta")
    capture(True)
    with pytest.raises(OptimizerError, match="cannot be captured"):
        optimizer.step()


def test_a_capture_is_one_of_the_devices_own_stream(monkeypatch):
    """Torch tells of the current device, whichever tensors are asked about."""
    current = []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(
        torch.cuda,
        "is_current_stream_capturing",
        lambda: current == [torch.device("cuda", 1)],
    )
    assert device_module.capturing(torch.device("cuda", 1))
    assert not device_module.capturing(torch.device("cuda", 0))
    assert not device_module.capturing(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_what_scales_gradients_may_be_of_any_dtype(recording, dtype):
    """GradScaler's are float32, which is what the kernel reads."""
    ps, qs = parameters(), parameters()
    for params, backend in ((ps, "recording"), (qs, "cpu")):
        optimizer = optimizer_of(params, backend=backend)
        for forbidden in (0, 0, 1, 1, 0):
            optimizer.found_inf = torch.tensor(forbidden).to(dtype)
            optimizer.grad_scale = torch.tensor([4]).to(dtype)
            optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_gradient_expanded_where_a_dense_one_was_is_cleared_behind_the_step(recording):
    memory = torch.empty(40, 40)
    ps, qs = ([nn.Parameter(torch.ones(40, 40))] for _ in range(2))
    for params, backend in ((ps, "recording"), (qs, "eager")):
        optimizer = FusedEvolvedOptimizer(
            params, zoo.sgd_momentum, backend=backend, zero_grads=True
        )
        for gradient in (memory, memory[0].expand(40, 40), memory, memory[0].expand(40, 40)):
            memory.fill_(1.0)
            params[0].grad = gradient
            optimizer.step()
            assert not gradient.any()
    torch.testing.assert_close(ps[0], qs[0])


@pytest.mark.parametrize("count", [-1.0, math.nan, math.inf])
def test_a_count_that_nobody_can_have_taken_is_refused(recording, count):
    params = parameters()
    optimizer = optimizer_of(params)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][1]["step"] = torch.tensor(count)
    optimizer.load_state_dict(saved)
    before = copy.deepcopy(params)
    with pytest.raises(OptimizerError, match="step in the state must be a whole number"):
        optimizer.step()
    assert_same(params, before)


def test_a_failed_step_leaves_nothing_half_known(recording):
    """Of two gradients one lies otherwise and one has no memory; then both are as before."""
    ps, qs = parameters(), parameters()
    for params, backend in ((ps, "recording"), (qs, "eager")):
        optimizer = optimizer_of(params, backend=backend)
        for _ in range(3):
            optimizer.step()
        if params is ps:
            kept = [p.grad for p in params]
            params[0].grad = kept[0].t().contiguous().t()
            params[2].grad = torch.ones(1000)
            params[2].grad.untyped_storage().resize_(0)
            with pytest.raises(OptimizerError, match="no memory"):
                optimizer.step()
            for p, gradient in zip(params, kept, strict=True):
                p.grad = gradient
        optimizer.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradients_that_change_how_they_lie_take_no_memory_each_time(recording):
    params = parameters()
    optimizer = optimizer_of(params)
    one, other = params[0].grad, params[0].grad.t().contiguous().t()
    tables = []
    for t in range(20):
        params[0].grad = other if t % 2 else one
        optimizer.step()
        (plan,) = optimizer._binding.plans
        tables.append(len(plan._tables))
    assert tables[2:] == tables[2:3] * 18


def test_a_kernel_that_cannot_be_made_leaves_no_state(monkeypatch):
    class Unable(CudaOnHost):
        def load(self, kinds, words, device):
            raise BackendError("no compiler")

    monkeypatch.setitem(BACKENDS, "unable", Unable())
    optimizer = optimizer_of(parameters(), backend="unable")
    with pytest.raises(BackendError, match="no compiler"):
        optimizer.step()
    assert not optimizer.state


@pytest.fixture
def mixed(monkeypatch):
    """float32 on the device, everything else on the host."""

    class OnlyFloat32(CudaOnHost):
        def why_not(self, program, device, dtype):
            return None if dtype == torch.float32 else f"{dtype}"

    mine = {"device": OnlyFloat32(), **BACKENDS}
    monkeypatch.setattr("evokernels.kernels.registry.BACKENDS", mine)


def of_both_kinds():
    params = parameters()
    params[1:] = [nn.Parameter(p.detach().double()) for p in params[1:]]
    for p in params:
        p.grad = torch.linspace(-2, 1, p.numel(), dtype=p.dtype).view(p.shape)
    return params


def test_a_model_on_host_and_device_shares_a_norm(mixed):
    ps, qs = of_both_kinds(), of_both_kinds()
    for params, backend in ((ps, "auto"), (qs, "eager")):
        optimizer = optimizer_of(params, backend=backend, max_grad_norm=0.5)
        for t in range(4):
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.found_inf = torch.tensor(float(t == 1))
            optimizer.step()
        assert len(optimizer._binding.plans) == (2 if params is ps else 1)
        assert params is qs or optimizer._binding._watch is None  # it would watch one of them
        assert {s["step"].item() for s in optimizer.state.values()} == {3.0}
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_gradient_of_one_part_leaves_the_others_alone(mixed, wrong):
    params = of_both_kinds()
    optimizer = optimizer_of(params, backend="auto")
    optimizer.step()
    before = copy.deepcopy(params)
    params[wrong].grad = torch._neg_view(params[wrong].grad)
    with pytest.raises(OptimizerError, match="negated view"):
        optimizer.step()
    assert_same(params, before)
    assert {s["step"].item() for s in optimizer.state.values()} == {1.0}


def test_more_tensors_than_a_launch_can_take(monkeypatch):
    backend = Recording(most_words=40)
    monkeypatch.setitem(BACKENDS, "narrow", backend)
    generator = torch.Generator().manual_seed(1)
    ps = [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(30)]
    qs = copy.deepcopy(ps)
    for params, name in ((ps, "narrow"), (qs, "eager")):
        optimizer = FusedEvolvedOptimizer(params, zoo.adamw, backend=name, max_grad_norm=1.0)
        for t, (i, p) in itertools.product(range(3), enumerate(params)):
            p.grad = None if i == t else torch.full_like(p, i - 15.0)
            if i == len(params) - 1:
                backend.launched.clear()
                optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * 3 + [3.0] * 27
        if name == "narrow":
            assert len(backend.launched) == 2 * math.ceil(30 / (40 - len(HEADER) - len(GROUP)))
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_elements_counts_like_others(recording):
    params = [*parameters(), nn.Parameter(torch.empty(0))]
    params[-1].grad = torch.empty(0)
    optimizer = optimizer_of(params)
    for _ in range(4):
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4.0] * 4
