"""The optimizer under DDP, FSDP2 and torch.distributed.checkpoint, in two gloo processes.

The processes start once and run every function marked `@in_two_processes`; pytest shows each as a
test of its own. The network has a dimension of 7 (uneven shards) and one of 1 (the second process
holds nothing of it).

Where both processes see the same batch, (g + g) / 2 is g, so training must give the bits that one
process gives. Where each sees half of it, sums are rounded in another order: 1e-9 in float64, that
is 2^-53 times what division by a small sqrt(v) makes of it, and far below the 1e-3 of one step.
"""

import functools
import json
import pathlib
import traceback
import warnings
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cuda_on_host import CudaOnHost
from torch import nn
from torch.distributed._functional_collectives import all_reduce as all_reduce_later
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.errors import OptimizerError
from evokernels.genome import add_own_term
from evokernels.kernels.registry import BACKENDS
from evokernels.optim.sharding import SumOverShards, local
from evokernels.terms import average, g, m

AVERAGED = add_own_term("DISTRIBUTED", average(g * m, 0.8) + average(g, 0.5))
GENOMES = {
    "evolved_2025": zoo.evolved_2025,
    "adamw": zoo.adamw,
    "averages": Genome([AVERAGED, "BELIEF"], [0.1, 1.0]),
}
STEPS, SAVED_AT = 6, 3
# torch says so where a checkpoint is written or read by one process
ALONE = "ignore:torch.distributed is disabled, unavailable or uninitialized"
pytestmark = pytest.mark.filterwarnings(ALONE)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


KINDS = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "ddp with views": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "fsdp": fully_shard,
}
SPREAD = [kind for kind in KINDS if kind != "plain"]


def training(kind, genome="evolved_2025", *, seed=0, dtype=torch.float32, **options):
    model = KINDS[kind](network(seed, dtype))
    options = {"total_steps": 20, **options}
    return model, FusedEvolvedOptimizer(model.parameters(), GENOMES[genome], **options)


def batch(step, dtype=torch.float32):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def wholes(model):
    return [whole(p) for p in model.parameters()]


@functools.cache
def expected(genome="evolved_2025", dtype=torch.float32, steps=STEPS):
    """The parameters after uninterrupted training in one process."""
    model, optimizer = training("plain", genome, dtype=dtype)
    train(model, optimizer, [batch(i, dtype) for i in range(steps)])
    return wholes(model)


def assert_near(actual, right):
    for a, b in zip(actual, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def assert_same(actual, right):
    assert len(actual) == len(right)
    for i, (a, b) in enumerate(zip(actual, right, strict=True)):
        assert torch.equal(a, b), f"tensor {i} is off by {(a - b).abs().max()}"


# Two processes

CHECKS = {}


def in_two_processes(check):
    """Makes `check(rank, folder)` one of the tests; all run in the same two processes."""
    CHECKS[check.__name__] = check
    return check


def work(rank, folder):
    """What one process does: every check in turn, until one fails."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="evokernels")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting_point",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    outcomes = dict.fromkeys(CHECKS, "not run, because a check before it failed")
    for name, check in CHECKS.items():
        try:
            check(rank, folder)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break
    (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes have been; checkpoints of one process lie there before they start."""
    folder = tmp_path_factory.mktemp("distributed")
    for genome in GENOMES:
        model, optimizer = training("plain", genome)
        train(model, optimizer, map(batch, range(SAVED_AT)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE.partition(":")[2])
            save_all(model, optimizer, "plain", genome, folder)
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    return [json.loads((folder / f"outcomes{rank}.json").read_text("utf-8")) for rank in range(2)]


# Training


@in_two_processes
def check_half_batches_train_as_the_whole_one(rank, folder):
    for genome in GENOMES:
        right = expected(genome, torch.float64)
        for kind in SPREAD:
            model, optimizer = training(kind, genome, dtype=torch.float64)
            train(model, optimizer, [batch(i, torch.float64).chunk(2)[rank] for i in range(STEPS)])
            assert_near(wholes(model), right)


@in_two_processes
def check_equal_batches_give_the_bits_of_one_process(rank, folder):
    for genome in GENOMES:
        for kind in SPREAD:
            for backend in ("cpu", "eager"):
                model, optimizer = training(kind, genome, backend=backend)
                train(model, optimizer, map(batch, range(STEPS)))
                if backend == "cpu":
                    assert_same(wholes(model), expected(genome))
                else:
                    alone, other = training("plain", genome, backend=backend)
                    train(alone, other, map(batch, range(STEPS)))
                    assert_same(wholes(model), wholes(alone))


@in_two_processes
def check_what_came_before_fsdp2_gives_these_bits_too(rank, folder):
    options = {"genome": zoo.evolved_2025, "total_steps": 20}
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), FusedEvolvedOptimizer, **options)
    train(model, optimizer, map(batch, range(STEPS)))
    assert_same(wholes(model), expected())

    for separate in (True, False):
        model = FullyShardedDataParallel(
            network(), use_orig_params=separate, device_id=torch.device("cpu")
        )
        optimizer = FusedEvolvedOptimizer(model.parameters(), **options)
        train(model, optimizer, map(batch, range(STEPS)))
        assert_same(list(model.state_dict().values()), expected())


@in_two_processes
def check_a_process_may_hold_nothing_of_a_parameter(rank, folder):
    model, optimizer = training("fsdp")
    train(model, optimizer, [batch(0)])
    shapes = [tuple(local(p).shape) for p in model.parameters()]
    assert shapes == ([(4, 6), (4,), (1, 7), (1,)] if rank == 0 else [(3, 6), (3,), (0, 7), (0,)])
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert [tuple(local(moment).shape) for moment in moments] == shapes


@in_two_processes
def check_dtensors_and_plain_parameters_train_together(rank, folder):
    model = network()
    fully_shard(model[0])
    optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.evolved_2025, total_steps=20)
    train(model, optimizer, map(batch, range(STEPS)))
    assert [isinstance(p, DTensor) for p in model.parameters()] == [True, True, False, False]
    assert_same(wholes(model), expected())


@in_two_processes
def check_moved_shards_are_found_again(rank, folder):
    model, optimizer = training("fsdp")
    train(model, optimizer, map(batch, range(SAVED_AT)))
    before = [local(p) for p in model.parameters()]
    model._apply(torch.clone)
    assert all(local(p) is not b for p, b in zip(model.parameters(), before, strict=True))
    train(model, optimizer, map(batch, range(SAVED_AT, STEPS)))
    assert_same(wholes(model), expected())


@in_two_processes
def check_autograd_notices_the_update_of_a_dtensor(rank, folder):
    p = nn.Parameter(distribute_tensor(torch.ones(5), init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = FusedEvolvedOptimizer([p], zoo.adam)
    loss = (p * p).sum()  # saves p for its backward
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class CountDTensors(TorchDispatchMode):
    """Counts torch calls that go through DTensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(issubclass(t, DTensor) for t in types)
        return function(*args, **(kwargs or {}))


@in_two_processes
def check_dtensors_are_unwrapped_once(rank, folder):
    model, optimizer = training("fsdp")
    train(model, optimizer, [batch(0)])
    with CountDTensors() as counted, mock.patch.object(DTensor, "to_local") as to_local:
        for _ in range(3):
            optimizer.step()
    assert (counted.count, to_local.call_count) == (0, 0)
    yardstick = torch.optim.AdamW(model.parameters())
    with CountDTensors() as counted:
        yardstick.step()
    assert counted.count > 0


@in_two_processes
def check_gradients_placed_otherwise_are_brought_to_their_parameter(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    values = torch.arange(1.0, 6.0)
    p = nn.Parameter(torch.ones(5))
    alone = FusedEvolvedOptimizer([p], zoo.adamw)
    p.grad = values
    alone.step()

    # sums that tensor parallelism has left for later, other shards, and a collective in flight
    half = values / 2
    gradients = [
        (Replicate(), lambda: DTensor.from_local(half, mesh, [Partial()])),
        (Shard(0), lambda: DTensor.from_local(half, mesh, [Partial()])),
        (Replicate(), lambda: distribute_tensor(values, mesh, [Shard(0)])),
        (Shard(0), lambda: distribute_tensor(values, mesh, [Replicate()])),
        (
            Replicate(),
            lambda: DTensor.from_local(
                all_reduce_later(half, "sum", mesh), mesh, [Replicate()], run_check=False
            ),
        ),
    ]
    for placement, gradient in gradients:
        q = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [placement]))
        optimizer = FusedEvolvedOptimizer([q], zoo.adamw)
        q.grad = gradient()
        optimizer.step()
        assert torch.equal(whole(q), p.detach())


@in_two_processes
def check_what_does_not_belong_together_is_turned_down(rank, folder):
    mesh = init_device_mesh("cpu", (2,))

    def sharded(placement=Shard(0)):  # noqa: B008, an immutable value
        return nn.Parameter(distribute_tensor(torch.ones(4), mesh, [placement]))

    def step(p, gradient, **state):
        optimizer = FusedEvolvedOptimizer([p], zoo.adamw)
        p.grad = gradient
        if state:
            optimizer.state[p].update(state)
        optimizer.step()

    summands = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    with pytest.raises(OptimizerError, match="parameters must be sharded or replicated"):
        FusedEvolvedOptimizer([summands], zoo.adamw)
    with pytest.raises(OptimizerError, match="is a DTensor, its gradient a plain tensor of shape"):
        step(sharded(), torch.ones(4))
    with pytest.raises(OptimizerError, match="is a DTensor, the parameter a plain tensor"):
        step(nn.Parameter(torch.ones(4)), sharded().detach())
    for moment in (torch.zeros(4), torch.zeros_like(sharded(Replicate()))):
        p = sharded()
        with pytest.raises(OptimizerError, match="set_optimizer_state_dict, which shards it"):
            step(p, torch.ones_like(p), step=torch.tensor(1.0), exp_avg=moment)


# Norms


@in_two_processes
def check_a_norm_includes_every_shard_once(rank, folder):
    line, tall, wide = (init_device_mesh("cpu", shape) for shape in ((2,), (2, 1), (1, 2)))
    tensors = [torch.full((n,), float(n)) for n in (3, 1, 5, 4, 2, 7)]
    placed = [
        tensors[0],
        distribute_tensor(tensors[1], line, [Shard(0)]),  # the second process holds nothing
        distribute_tensor(tensors[2], line, [Shard(0)]),
        distribute_tensor(tensors[3], line, [Replicate()]),
        distribute_tensor(tensors[4], tall, [Shard(0), Shard(0)]),
        distribute_tensor(tensors[5], wide, [Replicate(), Shard(0)]),
    ]
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        assert sum_of_squares(placed) == sum((t**2).sum().item() for t in tensors)
    assert reduce.call_count == 3  # one for each mesh
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        assert sum_of_squares(placed[1:3]) == 1 + 5**3
        assert sum_of_squares(tensors[:2]) == 3**3 + 1
        assert sum_of_squares(placed[3:4]) == 4**3
    assert reduce.call_count == 1


def sum_of_squares(tensors):
    seen = []

    def local_sum(members):
        seen.extend(members)
        return sum((local(tensors[i]) ** 2).sum().double() for i in members)

    total = SumOverShards(tensors)(local_sum)
    assert sorted(seen) == list(range(len(tensors)))
    return total


@in_two_processes
def check_the_norm_of_all_gradients_is_limited(rank, folder):
    batches = [batch(i, torch.float64) for i in range(STEPS)]

    def limited(kind, batches):
        model, optimizer = training(kind, "adamw", dtype=torch.float64, max_grad_norm=1e-3)
        train(model, optimizer, batches)
        return wholes(model)

    right = limited("plain", batches)
    assert not torch.equal(right[0], expected("adamw", torch.float64)[0])
    for kind in SPREAD:
        assert_near(limited(kind, [x.chunk(2)[rank] for x in batches]), right)

    on_device = CudaOnHost()
    for backend in ("cpu", on_device.name):
        partly = network(dtype=torch.float64)
        fully_shard(partly[0])
        with mock.patch.dict(BACKENDS, {on_device.name: on_device}):
            optimizer = FusedEvolvedOptimizer(
                partly.parameters(), zoo.adamw, max_grad_norm=1e-3, backend=backend
            )
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
                train(partly, optimizer, batches)
        assert reduce.call_count == STEPS  # one in each, for all shards together
        assert_near(wholes(partly), right)


@in_two_processes
def check_gradients_are_cleared_wherever_they_are(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    for gradient in (
        distribute_tensor(torch.ones(5), mesh, [Shard(0)]),
        DTensor.from_local(torch.ones(5), mesh, [Partial()]),  # kernels see a copy
    ):
        p = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
        optimizer = FusedEvolvedOptimizer([p], zoo.adamw, zero_grads=True)
        p.grad = gradient
        version = gradient._version
        optimizer.step()
        assert not whole(p).eq(1).any()
        assert p.grad is gradient
        assert not whole(gradient).any()
        assert gradient._version > version


@in_two_processes
def check_shards_are_rounded_by_random_numbers_of_their_own(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    ones = torch.ones(128, dtype=torch.bfloat16)

    def rounded(values, seed):
        p = nn.Parameter(values)
        optimizer = FusedEvolvedOptimizer([p], zoo.adamw, stochastic_rounding=True, seed=seed)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return whole(p)

    first, second = rounded(distribute_tensor(ones, mesh, [Shard(0)]), seed=5).chunk(2)
    assert not torch.equal(first, second)
    alone = rounded(ones.clone(), seed=5)
    assert torch.equal(first, alone[:64])
    assert torch.equal(rounded(distribute_tensor(ones, mesh, [Replicate()]), seed=5), alone)


# Saving and loading


@in_two_processes
def check_state_is_placed_as_that_of_adamw(rank, folder):
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = training("fsdp", "adamw", dtype=dtype)
        train(model, optimizer, [batch(0, dtype)])
        yardstick = torch.optim.AdamW(model.parameters())
        yardstick.step()
        for p in model.parameters():
            ours, theirs = optimizer.state[p], yardstick.state[p]
            assert set(ours) == set(theirs)
            assert not isinstance(ours["step"], DTensor)
            for name in ("exp_avg", "exp_avg_sq"):
                assert type(ours[name]) is type(theirs[name]) is DTensor
                assert ours[name].placements == theirs[name].placements == p.placements
                assert ours[name].device_mesh == p.device_mesh
                assert (ours[name].shape, ours[name].dtype) == (p.shape, torch.float32)


FORMS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def save_all(model, optimizer, kind, genome, folder):
    """Checkpoints in every form; `load` reads them."""
    for form, options in FORMS.items():
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        parts = {"model": of_model, "optimizer": of_optimizer}
        dcp.save(parts, checkpoint_id=folder / f"{kind}-{genome}-{form}")
    parts = {"model": of_model, "optimizer": optimizer.state_dict()}
    dcp.save(parts, checkpoint_id=folder / f"{kind}-{genome}-direct")


def load(kind, path, genome, form):
    """A model and optimizer that were made for something else and hold what the file says."""
    model, optimizer = training(kind, genome, seed=1, total_steps=7)
    optimizer.param_groups[0].update(lr=0.5, betas=(0.1, 0.2))
    if form == "direct":
        train(model, optimizer, [batch(9)])  # what is loaded needs a place to be loaded into
        of_model, _ = get_state_dict(model, optimizer)
        of_optimizer = optimizer.state_dict()
    else:
        of_model, of_optimizer = get_state_dict(model, optimizer, options=FORMS[form])
    parts = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(parts, checkpoint_id=path)
    if form == "direct":
        set_state_dict(model, [], model_state_dict=parts["model"], optim_state_dict={})
        optimizer.load_state_dict(parts["optimizer"])
    else:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=FORMS[form],
        )
    return model, optimizer


def assert_goes_on(model, optimizer, genome):
    """Options as they were saved, and the bits of a training that was never interrupted."""
    (group,) = optimizer.param_groups
    was = GENOMES[genome]
    assert group["genome"] == was
    assert group["lr"] == was.lr
    assert tuple(group["betas"]) == (was.beta1, was.beta2)  # torch gathers tuples as lists
    assert (group["eps"], group["weight_decay"]) == (was.eps, was.weight_decay)
    assert group["total_steps"] == 20
    train(model, optimizer, map(batch, range(SAVED_AT, STEPS)))
    assert_same(wholes(model), expected(genome))


FORMS_AND_DIRECT = [*FORMS, "direct"]
SAVED = ["plain", "ddp", "fsdp"]


@in_two_processes
def check_checkpoints_are_saved(rank, folder):
    for genome in GENOMES:
        for kind in ("ddp", "fsdp"):
            model, optimizer = training(kind, genome)
            train(model, optimizer, map(batch, range(SAVED_AT)))
            save_all(model, optimizer, kind, genome, folder)
            train(model, optimizer, map(batch, range(SAVED_AT, STEPS)))  # saving changed nothing
            assert_same(wholes(model), expected(genome))


@in_two_processes
def check_two_processes_go_on_from_every_checkpoint(rank, folder):
    for genome in GENOMES:
        for saved in SAVED:
            for kind in ("ddp", "fsdp"):
                for form in FORMS_AND_DIRECT:
                    path = folder / f"{saved}-{genome}-{form}"
                    assert_goes_on(*load(kind, path, genome, form), genome)


@in_two_processes
def check_the_optimizer_itself_may_be_saved_and_loaded(rank, folder):
    model, optimizer = training("fsdp")
    train(model, optimizer, map(batch, range(SAVED_AT)))
    dcp.save({"optimizer": optimizer}, checkpoint_id=folder / "stateful")
    values = [local(p).detach().clone() for p in model.parameters()]
    other, its = training("fsdp", seed=1, total_steps=7)
    train(other, its, [batch(9)])
    dcp.load({"optimizer": its}, checkpoint_id=folder / "stateful")
    with torch.no_grad():
        for p, value in zip(other.parameters(), values, strict=True):
            local(p).copy_(value)
    assert_goes_on(other, its, "evolved_2025")


@in_two_processes
def check_a_state_gathered_in_one_place_is_spread_again(rank, folder):
    for genome in GENOMES:
        model, optimizer = training("fsdp", genome)
        train(model, optimizer, map(batch, range(SAVED_AT)))
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = [get_optimizer_state_dict(model, optimizer, options=gather)]
        assert bool(gathered[0]) == (rank == 0)
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        other, its = training("fsdp", genome, total_steps=7)
        set_optimizer_state_dict(other, its, gathered[0], options=spread)
        other.load_state_dict(model.state_dict())
        assert_goes_on(other, its, genome)

        dist.broadcast_object_list(gathered, 0)
        other, its = training("fsdp", genome, total_steps=7)
        set_optimizer_state_dict(other, its, gathered[0], options=gather)
        other.load_state_dict(model.state_dict())
        assert_goes_on(other, its, genome)


@pytest.mark.parametrize("form", FORMS_AND_DIRECT)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("genome", GENOMES)
def test_one_process_goes_on_from_every_checkpoint(folder, genome, saved, form):
    path = pathlib.Path(folder) / f"{saved}-{genome}-{form}"
    assert_goes_on(*load("plain", path, genome, form), genome)


@pytest.mark.parametrize("check", CHECKS)
def test_in_two_processes(outcomes, check):
    assert [outcome[check] for outcome in outcomes] == ["", ""]
