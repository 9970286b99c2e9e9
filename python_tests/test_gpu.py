"""What only a GPU can show: graphs of captured steps, memory, launches, streams, several devices.

Each test also runs on the host, where the CUDA kernels are compiled for it and what a graph would
launch is kept and launched again: the tests themselves are tried that way.
"""

import contextlib
import copy
import dataclasses
import io
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from contract import (
    BF16,
    FP16,
    FP32,
    FP64,
    PRESETS,
    RICH,
    TOTAL_STEPS,
    assert_same,
    assert_trained,
    gradients,
    ours,
    parameter,
    train,
)
from cuda_on_host import CudaOnHost
from oracle import DTYPES
from sanitized_steps import take_steps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evokernels
from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import OptimizerError
from evokernels.evolution.devices import CudaGraph
from evokernels.kernels import device as device_module
from evokernels.kernels.device import DevicePlan
from evokernels.kernels.registry import BACKENDS
from evokernels.optim import checks, parts

STEPS = 1000
SCHEDULED = dataclasses.replace(
    RICH, use_warmup=True, warmup_steps=40, use_cosine_decay=True, lr_log10=-3.0
)
SIGN = evokernels.Genome(["SIGN_GRAD"], lr_log10=-1, use_m=False, use_v=False)
STALL = 50_000_000  # cycles: some hundredths of a second
SANITIZER = "compute-sanitizer"


class Cuda:
    """A CUDA device, and how tests ask it things."""

    device = "cuda"
    automatic = ("cuda", "triton")  # what "auto" may choose
    many = 2**31 + 1030

    @property
    def free(self):
        """Bytes."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    @property
    def devices(self):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]

    def capture(self, prepare, work):
        """A function that does the work, after it was captured into a graph."""
        graph = CudaGraph(torch.device("cuda", torch.cuda.current_device()))
        graph.capture(prepare, work)
        return graph.replay

    @contextlib.contextmanager
    def capturing(self):
        spare = torch.zeros(1, device=self.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            spare.add_(1)  # a graph of nothing warns
            yield

    @contextlib.contextmanager
    def never_waiting(self):
        """Whatever waits for the device is an error."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def launches(self, work):
        """Names of what was launched, copies included."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            work()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return [
            event.name
            for event in profiler.events()
            # the name that torch's optimizers give a step is no launch
            if event.device_type == on_device and not event.is_user_annotation
        ]

    def borrowed(self, work):
        """Bytes that were allocated at once, and bytes that still are."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before

    @contextlib.contextmanager
    def busy_side_stream(self):
        """A stream that is behind with its work; waited for at the end."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(STALL)
            yield
        torch.cuda.synchronize()


class Host(CudaOnHost):
    """The same questions to the host, whose graphs are lists of launches."""

    device = "cpu"
    automatic = ("cpu",)
    devices = ("cpu", "cpu")
    many = 5001  # 2^31 would take the host too long
    free = 2**31

    def __init__(self, monkeypatch):
        super().__init__()
        self._monkeypatch = monkeypatch
        self._kept, self._launched = None, []

    def load(self, kinds, words, device):
        kernel = super().load(kinds, words, device)
        update, squares = kernel.update, kernel.squares
        kernel.update = lambda *launch: self._launch(update, *launch)
        kernel.squares = lambda *launch: self._launch(squares, *launch)
        return kernel

    def _launch(self, function, words, blocks):
        if self._kept is not None:  # a capture does nothing
            self._kept.append((function, words.copy(), blocks))
        else:
            self._launched.append(function.__name__)
            function(words, blocks)

    def capture(self, prepare, work):
        prepare()
        with self.capturing():
            work()
            launches = self._kept
        return lambda: [function(*launch) for function, *launch in launches]

    @contextlib.contextmanager
    def capturing(self):
        self._kept = []
        with self._monkeypatch.context() as patch:
            for module in (device_module, checks, parts):
                patch.setattr(module, "capturing", lambda device: True)
            # the memory of a graph is its own as long as it lives
            squares = DevicePlan.squares
            patch.setattr(DevicePlan, "squares", lambda *args: self._keep(squares(*args)))
            try:
                yield
            finally:
                self._kept = None

    def _keep(self, tensor):
        self._kept.append((lambda tensor: None, tensor))
        return tensor

    @contextlib.contextmanager
    def never_waiting(self):
        with Operations() as operations:
            yield
        assert "aten._local_scalar_dense.default" not in operations.names

    def launches(self, work):
        self._launched.clear()
        work()
        return list(self._launched)

    def borrowed(self, work):
        with Operations() as operations:
            work()
        return operations.allocated, 0

    def busy_side_stream(self):
        return contextlib.nullcontext()


class Operations(TorchDispatchMode):
    """Names of the operations of torch, and bytes of what they made anew."""

    def __init__(self):
        super().__init__()
        self.names, self.allocated = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        before, after = (
            {t.untyped_storage().data_ptr(): t.nbytes for t in tree_leaves(tree) if is_tensor(t)}
            for tree in ((args, kwargs), result)
        )
        self.allocated += sum(size for place, size in after.items() if place not in before)
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.fixture(
    params=[
        CudaOnHost.name,
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    """The backends that count steps on their device."""
    return request.param


@pytest.fixture
def stage(backend, monkeypatch):
    """Where a test runs."""
    if backend != CudaOnHost.name:
        return Cuda()
    host = Host(monkeypatch)
    monkeypatch.setitem(BACKENDS, backend, host)
    return host


def model_of(device, dtypes=DTYPES):
    """A group for each dtype: parameters with gradients, odd sizes among them."""
    generator = torch.Generator().manual_seed(0)

    def random(shape, dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    groups = []
    for dtype in dtypes:
        params = [nn.Parameter(random(shape, dtype)) for shape in ((33, 23), (7,), (1025,))]
        for p in params:
            p.grad = random(p.shape, dtype)
        groups.append(params)
    return groups


def optimizer_of(groups, backend, device, **options):
    """A rule, learning rate and rounding of its own for each group."""
    rules = (SCHEDULED, zoo.adamw, zoo.evolved_2025, SIGN)
    dtypes = (FP64, FP32, FP64, FP32)
    described = [
        {
            "params": params,
            "genome": genome,
            "lr": torch.tensor(genome.lr, dtype=dtype, device=device),
            "stochastic_rounding": params[0].dtype == BF16,
        }
        for params, genome, dtype in zip(groups, rules, dtypes, strict=False)
    ]
    return FusedEvolvedOptimizer(
        described, zoo.adam, total_steps=STEPS - 200, backend=backend, **options
    )


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same_training(a, b):
    """Parameters and state, bit by bit."""
    assert_same(parameters_of(a), parameters_of(b))
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert_same(a.state[p].values(), b.state[q].values())


# Graphs


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 3.0}, {"zero_grads": True}], ids=["plain", "norm", "clear"]
)
def test_a_step_replayed_a_thousand_times_equals_a_thousand_steps(backend, stage, options):
    """Nothing is frozen: count, warmup, cosine, bias correction, rounding, norm, loss scale,
    found_inf, learning rates that schedulers change, gradients."""
    runs = []
    for captured in (False, True):
        optimizer = optimizer_of(model_of(stage.device), backend, stage.device, **options)
        optimizer.grad_scale = torch.ones(1, device=stage.device)
        optimizer.found_inf = torch.zeros(1, device=stage.device)
        params = parameters_of(optimizer)
        start = [p.grad.clone() for p in params]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
        step = stage.capture(optimizer.step, optimizer.step) if captured else optimizer.step
        if not captured:
            step()
        for t in range(STEPS):
            for p, g in zip(params, start, strict=True):
                p.grad.copy_(g).mul_(1 - t % 7 / 4)
            optimizer.grad_scale.fill_(1 + t % 4)
            optimizer.found_inf.fill_(t % 10 == 7)
            step()
            if options.get("zero_grads"):
                assert not any(p.grad.any() for p in params)
            scheduler.step()
        runs.append(optimizer)
    assert_same_training(*runs)
    taken = {state["step"].item() for state in runs[1].state.values()}
    assert taken == {1 + STEPS - STEPS // 10}
    # and that the numbers which changed were not without effect
    assert all(
        (p != q).any() for p, q in zip(parameters_of(runs[1]), moved_once(stage), strict=True)
    )


def moved_once(stage):
    """The parameters after the first step alone."""
    optimizer = optimizer_of(model_of(stage.device), "eager", stage.device)
    optimizer.step()
    return parameters_of(optimizer)


def test_steps_between_replays_count_on(backend, stage):
    optimizers = [optimizer_of(model_of(stage.device), backend, stage.device) for _ in range(2)]
    graphed, eager = optimizers
    replay = stage.capture(graphed.step, graphed.step)
    for step in (replay, graphed.step, replay, replay, graphed.step):
        step()
    for _ in range(6):
        eager.step()
    assert_same_training(graphed, eager)


def refused(stage, optimizer, message):
    """A captured step that must be turned down, leaving everything as it was."""
    before = copy.deepcopy(optimizer)
    with pytest.raises(OptimizerError, match=message), stage.capturing():
        optimizer.step()
    assert_same_training(optimizer, before)


def test_a_learning_rate_that_a_graph_would_freeze_is_refused(backend, stage):
    optimizer = optimizer_of(model_of(stage.device), backend, stage.device)
    optimizer.step()
    for lr, message in (
        (1e-3, r"lr is 0\.001, which a captured step would keep for ever"),
        (torch.tensor(1, device=stage.device), r"lr is a torch\.int64 tensor on"),
    ):
        optimizer.param_groups[1]["lr"] = lr
        refused(stage, optimizer, message)


def test_a_first_step_in_a_graph_is_refused(backend, stage):
    optimizer = optimizer_of(model_of(stage.device), backend, stage.device)
    refused(stage, optimizer, "take one before the capture")
    optimizer.step()
    assert len(optimizer.state) == len(parameters_of(optimizer))


def test_gradients_that_lie_otherwise_in_a_graph_are_refused(backend, stage):
    optimizer = optimizer_of(model_of(stage.device), backend, stage.device)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    for p, q in zip(parameters_of(optimizer), parameters_of(twin), strict=True):
        q.grad = p.grad
    p = parameters_of(optimizer)[0]
    p.grad = p.grad.t().contiguous().t()
    refused(stage, optimizer, "with such gradients before")
    optimizer.step()
    stage.capture(lambda: None, optimizer.step)()  # they are known now
    for _ in range(2):
        twin.step()
    assert_same_training(optimizer, twin)


def test_a_backend_that_counts_on_the_host_is_refused_in_a_graph(stage):
    optimizer = optimizer_of(model_of(stage.device), "eager", stage.device)
    optimizer.step()
    refused(stage, optimizer, "backends other than 'cuda' and 'triton' count steps on the host")


# What a step costs


def stepped(backend, stage, **options):
    """An optimizer that has taken both the long way and the short one."""
    optimizer = optimizer_of(model_of(stage.device), backend, stage.device, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("zero_grads", [False, True])
def test_a_step_allocates_nothing(backend, stage, zero_grads):
    optimizer = stepped(backend, stage, zero_grads=zero_grads)
    assert stage.borrowed(optimizer.step) == (0, 0)


def test_a_step_that_limits_the_norm_borrows_a_sum_for_each_chunk(backend, stage):
    optimizer = stepped(backend, stage, max_grad_norm=1.0)
    tensors = len(parameters_of(optimizer))
    most, kept = stage.borrowed(optimizer.step)
    assert kept == 0
    assert 0 < most <= 8 * (2 * tensors + 1) + 512  # the allocator's granularity


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"zero_grads": True}], ids=str)
def test_a_step_waits_for_nothing(backend, stage, options):
    optimizer = stepped(backend, stage, **options)
    optimizer.grad_scale = torch.full((1,), 2.0, device=stage.device)
    optimizer.found_inf = torch.zeros(1, device=stage.device)
    with stage.never_waiting():
        optimizer.step()
        optimizer.step()
        for p in parameters_of(optimizer):
            p.grad = p.grad.clone()
        optimizer.step()
        parameters_of(optimizer)[0].grad = None
        optimizer.step()


@pytest.mark.parametrize(("options", "launches"), [({}, 1), ({"max_grad_norm": 1.0}, 2)])
def test_a_step_is_one_launch_and_a_norm_one_more(backend, stage, options, launches):
    optimizer = stepped(backend, stage, **options)
    stage.launches(optimizer.step)  # what a profiler loads at first
    found = stage.launches(lambda: [optimizer.step() for _ in range(5)])
    assert len(found) == 5 * launches, found
    assert len(set(found)) == launches


def test_a_step_runs_on_the_current_stream(backend, stage):
    """Behind what is queued there: gradients that are not yet written when it is launched."""
    optimizers = [optimizer_of(model_of(stage.device), backend, stage.device) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.step()
    late, plain = optimizers
    with stage.busy_side_stream():
        for p in parameters_of(late):
            p.grad.mul_(-3)
        late.step()
    for p in parameters_of(plain):
        p.grad.mul_(-3)
    plain.step()
    assert_same_training(late, plain)


# Right


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize("rule", [*PRESETS, "rich"])
def test_device_and_cpu_train_alike(backend, stage, rule, dtype):
    genome = PRESETS.get(rule, RICH)
    start = parameter(33, 17, dtype=dtype)
    gs = gradients(TOTAL_STEPS, start)
    for device, name in ((stage.device, backend), ("cpu", "cpu")):
        p = nn.Parameter(start.detach().to(device, copy=True))
        train(ours([p], genome, backend=name), (p, [g.to(device) for g in gs]))
        assert_trained(p.detach().cpu(), genome, start, gs, f"{name}, {rule}, {dtype}")


def trained_network(device, backend, steps=20):
    """Losses of a small network on the same batches everywhere."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(64, 12, dtype=FP64), torch.randint(3, (64,))
    network, x, y = network.to(device), x.to(device), y.to(device)
    optimizer = FusedEvolvedOptimizer(
        network.parameters(), SCHEDULED, total_steps=steps, max_grad_norm=0.02, backend=backend
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_network_trains_as_on_the_cpu(backend, stage):
    found, expected = trained_network(stage.device, backend), trained_network("cpu", "cpu")
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]


def test_elements_beyond_31_bits(backend, stage):
    needed = stage.many * (2 + 2 + 1) + 2**30  # parameter, gradient, what comparing makes
    if stage.free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {stage.free >> 30} are free")
    p = nn.Parameter(torch.zeros(stage.many, dtype=BF16, device=stage.device))
    p.grad = torch.ones_like(p)
    p.grad[-3:] = -1
    FusedEvolvedOptimizer([p], SIGN, backend=backend).step()
    step = torch.tensor(SIGN.lr).to(BF16).item()
    assert (p[:-3] == -step).all()
    assert (p[-3:] == step).all()


# The protocol


@pytest.fixture
def devices(stage):
    if len(stage.devices) < 2:
        pytest.skip("needs two GPUs")
    return stage.devices[:2]


def test_a_model_on_two_devices_shares_a_norm(backend, stage, devices):
    runs = []
    for places in (devices, [devices[0]] * 2):
        groups = [group for d in places for group in model_of(d, [FP32])]
        params = [p for group in groups for p in group]
        optimizer = FusedEvolvedOptimizer(params, zoo.adamw, max_grad_norm=0.5, backend=backend)
        optimizer.grad_scale = torch.full((1,), 2.0, device=places[0])
        optimizer.found_inf = torch.zeros(1, device=places[0])
        for _ in range(4):
            optimizer.step()
        assert len(optimizer._binding.plans) == len(set(places))
        runs.append(params)
    # the two sums are added in another order than the chunks of one
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=1e-6, atol=1e-7)


def test_grad_scaler_end_to_end(backend, stage):
    """A scale that is a power of two changes no bit; a step with an infinite gradient is none."""
    x = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0)).to(stage.device)
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(stage.device)
        optimizer = FusedEvolvedOptimizer(
            model.parameters(), SCHEDULED, total_steps=9, max_grad_norm=0.5, backend=backend
        )
        scaler = torch.amp.GradScaler(
            stage.device, init_scale=1024.0, growth_interval=2, enabled=scaled
        )
        for i, batch in enumerate(x):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            if scaled and i == 3:
                optimizer.zero_grad()
                scaler.scale(loss * torch.inf).backward()
                before = copy.deepcopy((list(model.parameters()), optimizer))
                scaler.step(optimizer)
                scaler.update()
                assert_same(model.parameters(), before[0])
                assert_same_training(optimizer, before[1])
                optimizer.zero_grad()
                loss = model(batch).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scaled:
            assert scaler.get_scale() == 1024 * 2 * 0.5 * 2
        runs.append(optimizer)
    assert_same_training(*runs)


def test_a_state_goes_to_the_cpu_and_back(backend, stage):
    """Resumed on the CPU it has the same bits, and brought back it trains on bit by bit."""
    optimizer = stepped(backend, stage)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)

    on_cpu = optimizer_of(model_of("cpu"), "cpu", "cpu")
    on_cpu.load_state_dict(state)
    for p, q in zip(parameters_of(optimizer), parameters_of(on_cpu), strict=True):
        with torch.no_grad():
            q.copy_(p)
        for name, value in optimizer.state[p].items():
            assert on_cpu.state[q][name].device.type == "cpu"
            assert_same([value.cpu()], [on_cpu.state[q][name]])
    back = optimizer_of(model_of(stage.device), backend, stage.device)
    back.load_state_dict(copy.deepcopy(on_cpu.state_dict()))
    for p, q in zip(parameters_of(back), parameters_of(on_cpu), strict=True):
        with torch.no_grad():
            p.copy_(q)
    on_cpu.step()
    for each in (optimizer, back):
        for group, lr in zip(each.param_groups, (1e-3, 1e-3, 1e-3, 1e-3), strict=True):
            group["lr"] = torch.tensor(lr, device=stage.device)
        each.step()
    assert_same_training(optimizer, back)
    steps = {state["step"].item() for each in (back, on_cpu) for state in each.state.values()}
    assert steps == {4.0}


def test_a_copy_trains_on_by_itself(backend, stage):
    optimizer = stepped(backend, stage)
    copied, again = (copy.deepcopy(optimizer) for _ in range(2))
    for p, q in zip(parameters_of(optimizer), parameters_of(copied), strict=True):
        q.grad = p.grad.clone()
    copied.step()
    assert_same_training(optimizer, again)
    optimizer.step()
    assert_same_training(optimizer, copied)


def test_explain_names_the_backend(backend, stage, capsys):
    evokernels.explain(zoo.evolved_2025, device=stage.device, backend=backend)
    assert f"backend  {backend}: " in capsys.readouterr().out
    evokernels.explain(zoo.evolved_2025, device=stage.device)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("backend")]
    assert line.split()[1].rstrip(":") in stage.automatic


# Memory accesses


def test_the_steps_for_the_sanitizer_run(backend, stage):
    take_steps(backend, stage.device)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_access_outside_of_tensors(backend):
    found = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip(f"{SANITIZER} is not installed")
    script = pathlib.Path(__file__).with_name("sanitized_steps.py")
    root = script.parents[1]
    done = subprocess.run(
        [found, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script, backend],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{root / 'bench'}:{script.parent}",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
