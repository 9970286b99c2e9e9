"""Training on a device, step by step like the plain loop; on the CPU, and on CUDA where it is."""

import copy
import dataclasses

import pytest
import torch
from as_on_device import OnDeviceOnly, Repeated

from evokernels import zoo
from evokernels.errors import SettingsError
from evokernels.evolution import evaluator, training
from evokernels.evolution.devices import CudaGraph, find_device, reproducible
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.fitness import diverged, within_limit
from evokernels.evolution.training import LAYOUT, TrainingStep, train, train_on_device
from evokernels.evolution.trial import Conditions, Trial
from evokernels.genome import Genome
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Status
from evokernels.tasks import Batches, ImageData, get_task, stack_draws

MINI = "fashion_mnist_mini"
CPU = torch.device("cpu")
BATCH = 16
STEPS = 7

scheduled = dataclasses.replace(
    zoo.evolved_2025, use_warmup=True, warmup_steps=3, use_cosine_decay=True
)
climber = dataclasses.replace(zoo.adam, lr_log10=-3.0, alphas=[-1.0])  # lost after 6 to 8 steps
wild = Genome(term_types=["SIGN_GRAD"], lr_log10=2.0)  # lost after one


@pytest.fixture(autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_images(task):
    """Random images of the shape that a task has; 70 to train with and 130 to test."""
    shape = (3, 32, 32) if task == "cifar10" else (1, 28, 28)
    generator = torch.Generator().manual_seed(0)

    def split(count):
        images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
        return images, torch.randint(10, (count,), generator=generator)

    constants = (0.5,) * shape[0], (0.25,) * shape[0]
    return ImageData(
        "random", *split(70), *split(130), *constants, classes=10, augment=task == "cifar10"
    )


class Run:
    """A network trained in a loop of its own, and all that it leaves."""

    def __init__(self, task, genome, steps=STEPS, *, graph=None, device=CPU):
        data = random_images(task).to(device)
        with reproducible(device, 3):
            self.model = get_task(task).model().to(device=device, memory_format=LAYOUT)
            self.optimizer = FusedEvolvedOptimizer(
                self.model.parameters(), genome, total_steps=steps
            )
            draws = list(data.draw_batches(BATCH, steps, 3))
            batches = Batches(data)
            if graph is None:
                placed = (draw.map(lambda drawn: drawn.to(device)) for draw in draws)
                self.losses = train(self.model, self.optimizer, map(batches.training, placed))
            else:
                stacked = stack_draws(draws).map(lambda drawn: drawn.to(device))
                self.losses = train_on_device(self.model, self.optimizer, batches, stacked, graph)
            self.generator = torch.get_rng_state()
        self.weights = dict(self.model.named_parameters())
        self.states = [
            {name: tensor.clone() for name, tensor in state.items()}
            for state in self.optimizer.state.values()
        ]
        self.statistics = {name: tensor.clone() for name, tensor in self.model.named_buffers()}
        self.accuracy = evaluator._accuracy(self.model, data, "test")


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


# Like the plain loop


@pytest.mark.parametrize("task", [MINI, "cifar10"])  # both networks; the second one augments
@pytest.mark.parametrize(
    ("genome", "steps", "look_every"),
    [
        (zoo.adam, 1, 32),
        (zoo.adam, STEPS, 1),
        (zoo.sgd_momentum, STEPS, STEPS),
        (scheduled, STEPS, 4),
        (scheduled, STEPS + 1, 4),
    ],
)
def test_the_device_step_trains_as_the_plain_loop(monkeypatch, task, genome, steps, look_every):
    monkeypatch.setattr(training, "LOOK_EVERY", look_every)
    graph = Repeated()
    plain, other = Run(task, genome, steps), Run(task, genome, steps, graph=graph)
    assert graph.replays == len(plain.losses) == steps
    assert plain.losses == other.losses
    assert_same(plain.weights, other.weights)
    assert_same(plain.statistics, other.statistics)
    assert_same(plain.states, other.states)
    assert torch.equal(plain.generator, other.generator), "dropout"
    assert plain.accuracy == other.accuracy


@pytest.mark.parametrize("task", [MINI, "cifar10"])
@pytest.mark.parametrize("genome", [climber, wild])
@pytest.mark.parametrize("look_every", [1, 4, 32])
def test_a_diverged_run_ends_as_in_the_plain_loop(monkeypatch, task, genome, look_every):
    monkeypatch.setattr(training, "LOOK_EVERY", look_every)
    graph = Repeated()
    plain, other = Run(task, genome, 30), Run(task, genome, 30, graph=graph)
    *healthy, last = plain.losses
    assert 0 < len(healthy) < 28, "it has to diverge, and to have steps left"
    assert other.losses[:-1] == healthy
    assert diverged(last)
    assert diverged(other.losses[-1])
    assert_same(plain.weights, other.weights)
    assert_same(plain.states, other.states)
    assert graph.replays == min(-(-len(plain.losses) // look_every) * look_every, 30)


@pytest.mark.parametrize("loss", [0.0, 50.0, 50.001, torch.inf, -torch.inf, torch.nan])
def test_the_limit_of_a_loss_is_one_for_numbers_and_tensors(loss):
    assert within_limit(torch.tensor(loss, dtype=torch.float64)).item() is (not diverged(loss))


def test_a_loss_that_recovers_stays_diverged(monkeypatch):
    # the flag, not the last loss, decides
    losses = iter([1.0] * training.WARM_UPS + [2.0, 60.0, 3.0, 4.0])
    monkeypatch.setattr(
        training, "_loss", lambda model, x, y: model.weight.sum() * 0 + next(losses)
    )
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adamw)
    data = random_images(MINI)
    draws = stack_draws(data.draw_batches(BATCH, 4, 0))
    assert train_on_device(model, optimizer, Batches(data), draws, Repeated()) == [2.0, 60.0]
    (state,) = optimizer.state.values()
    assert state["step"].item() == 1


# What a recorded step needs


@pytest.fixture
def first_step():
    """A step of the larger network that has not been taken."""
    data = random_images("cifar10")
    torch.manual_seed(0)
    model = get_task("cifar10").model().to(memory_format=LAYOUT)
    optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adam)
    draws = stack_draws(data.draw_batches(BATCH, 2, 0))
    return TrainingStep(model, optimizer, Batches(data), draws)


def test_warming_up_leaves_nothing_but_memory(first_step):
    model, optimizer = first_step._model, first_step._optimizer
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    first_step.warm_up()
    assert_same(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    for state in optimizer.state.values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(tensor.any() for tensor in state.values())
    assert first_step.losses.isnan().all()
    assert not first_step.diverged


def memory(step):
    """Addresses of everything that outlives a step."""
    tensors = [
        *step._model.state_dict().values(),
        *(tensor for state in step._optimizer.state.values() for tensor in state.values()),
        *(group["lr"] for group in step._optimizer.param_groups),
        *(drawn for drawn in step._draws if drawn is not None),
        *(step._number, step.losses, step.diverged, step._optimizer.found_inf),
    ]
    return [tensor.data_ptr() for tensor in tensors]


def test_a_step_works_on_memory_that_stays_where_it_is(first_step):
    weights = [parameter.data_ptr() for parameter in first_step._model.parameters()]
    first_step()
    before = memory(first_step)
    first_step.warm_up()
    first_step._rewind(copy.deepcopy(first_step._model.state_dict()))
    for _ in range(2):
        first_step()
    assert memory(first_step) == before
    assert [parameter.data_ptr() for parameter in first_step._model.parameters()] == weights
    assert first_step._optimizer.found_inf is first_step.diverged


@pytest.mark.parametrize("task", [MINI, "cifar10"])
def test_a_step_never_asks_for_a_value(task):
    meta = torch.device("meta")
    data = random_images(task)
    draws = stack_draws(data.draw_batches(BATCH, 2, 0))
    model = get_task(task).model().to(device=meta, memory_format=LAYOUT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = lambda: None  # updates depend on the backend: the tests of each look at that
    draws = draws.map(lambda drawn: drawn.to(meta))
    step = TrainingStep(model, optimizer, Batches(data.to(meta)), draws)
    with OnDeviceOnly():
        step()
        step._rewind(dict(model.state_dict()))


@pytest.mark.parametrize(
    "asks",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor[torch.arange(2)],
        lambda tensor: tensor + torch.tensor(1.0),
        lambda tensor: tensor.cpu(),
    ],
)
def test_a_question_for_a_value_is_found(asks):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnDeviceOnly():
        asks(torch.ones(3, device="meta"))


def test_beyond_the_cpu_evaluations_train_on_the_device(monkeypatch):
    called = []
    monkeypatch.setattr(evaluator, "CudaGraph", lambda device: f"graph on {device}")
    monkeypatch.setattr(evaluator, "train_on_device", lambda *arguments: called.append(arguments))
    model = get_task("cifar10").model()
    data = random_images("cifar10").to(torch.device("meta"))
    trial, conditions = Trial(zoo.adam, "cifar10", 0), Conditions(5, BATCH, None)
    evaluator._train(model, trial, conditions, data, None)
    ((trained, _, _, draws, graph, _),) = called
    assert trained is model
    assert graph == "graph on meta"
    assert all(drawn.is_meta and drawn.shape == (5, BATCH) for drawn in draws)


# Devices


@pytest.fixture
def cuda_devices(monkeypatch):
    def there_are(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there_are


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1",) * 2]
)
def test_a_device_is_found_by_its_name(cuda_devices, name, device):
    cuda_devices(2)
    assert find_device(name) == torch.device(device)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:01", "cuda:-1", "CPU", "mps", ""])
def test_another_name_is_refused(cuda_devices, name):
    cuda_devices(2)
    with pytest.raises(SettingsError, match=f"must be cpu, cuda or cuda:N, got '{name}'"):
        find_device(name)


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "cuda", "device is 'cuda', but torch .* finds no CUDA device here; use cpu, or"),
        (0, "cuda:1", "device is 'cuda:1', but torch .* finds no CUDA device here; use cpu, or"),
        (1, "cuda:1", "device is 'cuda:1', but there is cuda:0 here; use that or cpu"),
        (2, "cuda:2", "device is 'cuda:2', but there is cuda:0, cuda:1 here; use that or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(cuda_devices, count, name, message):
    cuda_devices(count)
    with pytest.raises(SettingsError, match=message) as caught:
        evaluate(Trial(zoo.adam, MINI, 0), Conditions(1, BATCH, None), random_images(MINI), name)
    assert "\n" not in str(caught.value)


# On CUDA. Convolutions of the CPU add in another order, and dropout draws other numbers there, so
# the plain loop on the same device is what a graph is held against.

CUDA = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("task", [MINI, "cifar10"])
@pytest.mark.parametrize("genome", [zoo.adam, scheduled])
def test_a_graph_trains_as_the_plain_loop_on_cuda(monkeypatch, task, genome):
    monkeypatch.setattr(training, "LOOK_EVERY", 4)
    plain = Run(task, genome, device=CUDA)
    graph, again = (Run(task, genome, graph=CudaGraph(CUDA), device=CUDA) for _ in range(2))
    assert graph.losses == again.losses
    assert_same(graph.weights, again.weights)
    # the learning rate is a number of the host there and of the device here: its last bits
    assert graph.losses == pytest.approx(plain.losses, rel=1e-4)
    torch.testing.assert_close(graph.weights, plain.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("genome", [climber, wild])
def test_a_diverged_run_ends_as_in_the_plain_loop_on_cuda(genome):
    plain = Run("cifar10", genome, 30, device=CUDA)
    graph = Run("cifar10", genome, 30, graph=CudaGraph(CUDA), device=CUDA)
    assert len(graph.losses) == len(plain.losses) < 30
    assert all(parameter.isfinite().all() for parameter in graph.weights.values())


@pytest.mark.gpu
def test_an_evaluation_on_cuda_is_reproducible_and_leaves_torch_as_it_was():
    conditions, data = Conditions(40, BATCH, None), random_images(MINI)
    before = torch.cuda.get_rng_state(CUDA), torch.backends.cudnn.deterministic
    first, again = (evaluate(Trial(zoo.adam, MINI, 0), conditions, data, "cuda") for _ in range(2))
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert (first.status, first.steps) == (Status.OK, 40)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before[0])
    assert torch.backends.cudnn.deterministic is before[1]
