"""The population forward of perceptrons against the members themselves, in torch and float64."""

import copy
import itertools
import math

import pytest
import torch
from guarded import Memory
from torch import nn
from torch.nn import functional

from evokernels.errors import BackendError, OptimizerError, StrategyError
from evokernels.es import EvolutionStrategy, PopulationForward
from evokernels.es.perceptron import LOSSES

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def strategy_of(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return EvolutionStrategy(model, optimizer, **{"population": 4, "sigma": 0.1, **options})


def samples(inputs, outputs, count):
    """x, and y of each loss."""
    classes = torch.randint(outputs, (count,))
    y = {"squares": torch.randn(count, outputs), "cross_entropy": classes, "mistakes": classes}
    return torch.randn(count, inputs), y


def loss_of(model, x, y, loss):
    """What the loss means, by torch."""
    z = model(x)
    if loss == "squares":
        return (z - y).square().sum()
    if loss == "cross_entropy":
        return functional.cross_entropy(z, y, reduction="sum")
    return (z.argmax(1) != y).sum()


def exact(model, x, y, loss):
    wide = y.double() if y.is_floating_point() else y
    return loss_of(copy.deepcopy(model).double(), x.double(), wide, loss).item()


# layers, activation, samples: tiles left over, inputs beyond one depth, blocks and stretches
NETWORKS = [
    ((1, 10, 10, 1), nn.ReLU, 1),
    ((7, 33, 5), nn.Tanh, 127),
    ((3, 2), nn.Sigmoid, 128),
    ((65, 6, 3), nn.Sigmoid, 129),
    ((130, 4, 7, 11), nn.ReLU, 2048),
    ((2, 1, 3), nn.Identity, 2100),
]


def network(sizes, activation, bias=True):
    parts = []
    for inputs, outputs in itertools.pairwise(sizes):
        parts += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("sizes", "activation", "count"), NETWORKS)
def test_losses_are_those_of_the_members(sizes, activation, count, loss, antithetic):
    model = network(sizes, activation, bias=not antithetic)
    strategy = strategy_of(model, antithetic=antithetic, seed=2**63 + 5)
    strategy.load_state_dict({**strategy.state_dict(), "generation": 3})
    x, y = samples(sizes[0], sizes[-1], count)
    got = PopulationForward.of(model).losses(x, y[loss], loss, strategy)
    assert (got.dtype, got.shape) == (torch.float64, (4,))
    for member, one in enumerate(got):
        with strategy.perturbed(member) as perturbed:
            right = exact(perturbed, x, y[loss], loss)
            error = abs(loss_of(perturbed, x, y[loss], loss).item() - right)
        assert abs(one - right) <= 2 * error + 1e-6 * (right + count), member
    centre = PopulationForward.of(model).losses(x, y[loss], loss)
    assert centre.tolist() == pytest.approx([exact(model, x, y[loss], loss)], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_bit_depends_on_threads_or_on_what_was_in_memory(loss, monkeypatch):
    model = network((70, 9, 3), nn.Tanh)
    strategy, forward = strategy_of(model, population=3), PopulationForward.of(model)
    x, y = samples(70, 3, 4200)
    expected = forward.losses(x, y[loss], loss, strategy)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        memory = Memory()
        with monkeypatch.context() as patch:
            patch.setattr(
                torch,
                "empty",
                lambda *shape, dtype, device, memory=memory: memory.empty(
                    *shape, dtype=dtype
                ).fill_(NAN),
            )
            got = forward.losses(x, y[loss], loss, strategy)
        memory.check()
        assert torch.equal(got, expected), threads


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_torch_s_defaults_change_nothing(default, monkeypatch):
    model = network((70, 9, 3), nn.Tanh)
    forward = PopulationForward.of(model)
    x, y = samples(70, 3, 70)
    expected = forward.losses(x, y["squares"], "squares")
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(empty(*a, **k)) or taken[-1])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("cpu" if default == torch.float16 else "meta"):
            got = forward.losses(x, y["squares"], "squares")
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in taken} == {torch.float32, torch.float64}
    assert torch.equal(got, expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
def test_what_is_not_finite_reaches_the_loss_as_in_torch(bad, activation):
    model = network((2, 5, 3), activation)
    x, y = samples(2, 3, 140)
    x[130, 1] = bad
    y["mistakes"][130] = 0  # which is where argmax finds the first NaN
    forward = PopulationForward.of(model)
    for loss in ("squares", "cross_entropy"):
        got, right = forward.losses(x, y[loss], loss), exact(model, x, y[loss], loss)
        assert got.tolist() == pytest.approx([right], rel=1e-5, nan_ok=True)
    z = model(x)
    wrong = (z.argmax(1) != y["mistakes"]) | z.isnan().any(1)
    assert forward.losses(x, y["mistakes"], "mistakes").item() == wrong.sum()


def of_one(activation, values):
    """The activation of each value, from squares whose target is 0; never negative."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), activation())
    nn.init.ones_(model[0].weight)
    forward, zero = PopulationForward.of(model), torch.zeros(1, 1)
    return torch.cat([forward.losses(v.view(1, 1), zero, "squares") for v in values]).sqrt()


@pytest.mark.parametrize(
    ("activation", "meaning"), [(nn.Tanh, torch.tanh), (nn.Sigmoid, torch.sigmoid)]
)
def test_activations_have_all_digits(activation, meaning):
    sizes = torch.cat([torch.logspace(-8, 1.935, 300), torch.linspace(0.3, 12, 300)])
    values = torch.cat([sizes, -sizes, torch.zeros(1)])
    right = meaning(values.double()).abs()
    assert ((of_one(activation, values) - right).abs() <= 3e-7 * right).all()


def test_cross_entropy_of_large_logits_and_the_first_of_equal_outputs():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[0].weight)
    forward = PopulationForward.of(model)
    x = torch.tensor([[1e30, 0.0, -1e30], [0.0, 500.0, 499.0], [7.0, 7.0, 7.0], [1.0, 2.0, 2.0]])
    y = torch.tensor([2, 2, 1, 1])
    right = exact(model, x, y, "cross_entropy")
    assert forward.losses(x, y, "cross_entropy").item() == pytest.approx(right, rel=1e-6)
    assert forward.losses(x[1:], y[1:], "cross_entropy").item() == pytest.approx(
        exact(model, x[1:], y[1:], "cross_entropy"), rel=1e-6
    )
    assert forward.losses(x, y, "mistakes").item() == 3


def test_many_classes_overflow_no_product():
    model = nn.Sequential(nn.Linear(1, 70_000))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x, y = torch.zeros(64, 1), torch.arange(64)
    got = PopulationForward.of(model).losses(x, y, "cross_entropy").item()
    assert got == pytest.approx(64 * math.log(70_000), rel=1e-6)


def test_it_is_the_strategy_s_fitness_also_of_a_part_of_its_model():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), nn.Tanh())
    strategies = [strategy_of(copy.deepcopy(model)) for _ in range(2)]
    x, y = samples(3, 2, 40)
    for _ in range(3):
        told, asked = strategies
        told.tell(-PopulationForward.of(told.model[0]).losses(x, y["squares"], "squares", told))
        asked.tell(asked.ask(lambda m: -loss_of(m[0], x, y["squares"], "squares")))
    for one, other in zip(told.model.parameters(), asked.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with told.perturbed(0), pytest.raises(StrategyError, match="is a member"):
        PopulationForward.of(told.model[0]).losses(x, y["squares"], "squares", told)


def test_images_are_flattened_and_no_samples_lose_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Identity())
    x, y = (
        torch.randn(5, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.arange(5) % 3,
    )
    got = PopulationForward.of(model).losses(x, y, "cross_entropy")
    assert got.item() == pytest.approx(exact(model, x, y, "cross_entropy"), rel=1e-6)
    assert PopulationForward.of(model).losses(x[:0], y[:0], "mistakes").tolist() == [0]


class Hooked(nn.Linear):
    pass


def hooked(module):
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(2, 2), "only an nn.Sequential"),
        (nn.Sequential(), "it has no Linear layer"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), r"for ReLU\(\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh()), r"for Tanh\(\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), "at most one of Identity, ReLU, Tanh, Sigmoid"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten()), "for Flatten"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(2, 2)), "for Flatten"),
        (nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2)), "other inputs than"),
        (nn.Sequential(Hooked(2, 2)), "for Hooked"),
        (nn.Sequential(hooked(nn.Linear(1, 1))), "hooks would not be called"),
        (hooked(nn.Sequential(nn.Linear(1, 1))), "hooks would not be called"),
    ],
)
def test_modules_that_it_has_no_forward_for(module, reason):
    with pytest.raises(BackendError, match=reason) as raised:
        PopulationForward.of(module)
    assert "EvolutionStrategy.ask" in str(raised.value)


def transposed():
    return nn.Parameter(torch.zeros(3, 2).t())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": "l1"}, "unknown loss 'l1'; use one of squares, cross_entropy, mistakes"),
        ({"x": torch.zeros(4, 2)}, r"x must be torch.float32 of shape \(4, 3\)"),
        ({"x": torch.tensor(1.0)}, "x must be a tensor, a row for each sample"),
        ({"y": [[0.0, 0.0]] * 4}, "y must be a tensor, .* got a list"),
        ({"x": torch.zeros(4)}, r"got torch.float32 of shape \(4,\)"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, "got torch.float64"),
        ({"x": torch.zeros(4, 3, device="meta")}, "on meta"),
        ({"y": torch.zeros(4)}, r"y must be torch.float32 of shape \(4, 2\)"),
        (
            {"loss": "mistakes", "y": torch.tensor([0, 1, 2, 0])},
            "from 0 to 1, .* got some from 0 to 2",
        ),
        ({"loss": "cross_entropy", "y": torch.tensor([0, 1, -1, 0])}, "from -1 to 1"),
        ({"weight": nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))}, "a parameter must be"),
        ({"weight": transposed()}, r"has strides \(1, 2\)"),
        ({"weight": nn.Parameter(torch.zeros(2, 3), requires_grad=False)}, "does not train"),
    ],
)
def test_samples_and_parameters_that_it_turns_down(change, reason):
    model = nn.Sequential(nn.Linear(3, 2))
    strategy, forward = strategy_of(model), PopulationForward.of(model)
    if "weight" in change:
        model[0].weight = change.pop("weight")
    given = {"x": torch.zeros(4, 3), "y": torch.zeros(4, 2), "loss": "squares", **change}
    with pytest.raises(StrategyError, match=reason):
        forward.losses(**given, strategy=strategy)


def test_a_parameter_whose_memory_holds_something_else_is_turned_down():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch._neg_view(torch.ones(2, 3)))
    with pytest.raises(OptimizerError, match="negated view"):
        PopulationForward.of(model).losses(torch.zeros(4, 3), torch.zeros(4, 2), "squares")


def test_samples_without_memory_of_their_own_are_turned_down_and_negated_ones_read_as_such():
    forward, y = PopulationForward.of(network((3, 2), nn.Identity)), torch.zeros(4, 2)
    with pytest.raises(StrategyError, match="x is a Tensor without memory"):
        forward.losses(torch._efficientzerotensor((4, 3)), y, "squares")
    x = torch.randn(4, 3)
    assert forward.losses(torch._neg_view(-x), y, "squares") == forward.losses(x, y, "squares")
