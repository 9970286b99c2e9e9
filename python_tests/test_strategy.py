"""`EvolutionStrategy`: any module and any optimizer, from scores alone."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from cases import flat
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import BackendError, OptimizerError, StrategyError
from evokernels.es import EvolutionStrategy
from evokernels.es.utility import UTILITIES, centered_ranks, ordered, standardized
from evokernels.kernels.normal import normal
from evokernels.kernels.plan import ARITHMETIC

DTYPES = list(ARITHMETIC)
X = torch.linspace(-1, 1, 24)[:, None]
Y = 2 * X * X + 0.5


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def fitness(model):
    dtype = next(model.parameters()).dtype
    return -(model(X.to(dtype)).float() - Y).square().mean()


@torch.no_grad()
def loss_of(model):
    return -float(fitness(model))


def strategy_for(model, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return EvolutionStrategy(model, optimizer, **{"population": 8, "sigma": 0.05, **options})


def fitness_at(strategy, member):
    with strategy.perturbed(member) as model:
        return float(fitness(model))


def noise_of(model, seed, generation, member):
    return [
        normal(seed, generation, member, i, 0, p.numel()).view(p.shape)
        for i, p in enumerate(model.parameters())
    ]


# utilities


def test_standardized_is_numpys_in_high_precision():
    scores = np.random.default_rng(0).normal(3, 2, 101)
    exact = scores.astype(np.longdouble)
    exact = (exact - exact.mean()) / exact.std()
    np.testing.assert_allclose(standardized(scores), exact.astype(float), rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 2.0**-40, 2.0**40, 1e150, 1e300])
def test_standardized_does_not_know_the_scale(scale):
    scores = np.array([1.0, 2.0, 4.0, -3.0])
    np.testing.assert_allclose(standardized(scores * scale), standardized(scores), 1e-13, 1e-15)


def test_centered_ranks_share_ties():
    assert centered_ranks(np.array([3.0, 1.0, 2.0])).tolist() == [0.5, -0.5, 0.0]
    assert centered_ranks(np.array([1.0, 5.0, 1.0, 9.0, 1.0])).tolist() == [
        *(-0.25, 0.25, -0.25, 0.5, -0.25)
    ]
    shuffled = np.random.default_rng(0).permutation(100).astype(float)
    np.testing.assert_allclose(centered_ranks(shuffled), shuffled / 99 - 0.5, atol=1e-15)


@pytest.mark.parametrize("utility", UTILITIES.values(), ids=UTILITIES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 5e-324])
def test_equal_scores_are_worth_nothing(utility, value):
    assert utility(np.full(7, value)).tolist() == [0.0] * 7


def test_what_is_not_finite_counts_as_the_next_finite_score():
    given = np.array([math.nan, 2.0, -math.inf, 5.0, math.inf, 3.0])
    assert ordered(given).tolist() == [2.0, 2.0, 2.0, 5.0, 5.0, 3.0]
    with pytest.raises(StrategyError, match="none of 2 scores is finite"):
        ordered(np.array([math.nan, math.inf]))


# the estimate


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("utility", UTILITIES)
def test_the_gradient_is_the_papers_formula(utility, antithetic):
    model = network()
    strategy = strategy_for(model, utility=utility, antithetic=antithetic, seed=9)
    strategy.load_state_dict({"seed": 9, "generation": 3, "sigma": 0.05})
    scores = np.array([0.3, -1.0, 2.5, 0.0, 0.7, 4.0, -2.0, 1.0])
    before = [p.detach().clone() for p in model.parameters()]
    strategy.tell(scores)
    utilities = UTILITIES[utility](scores)
    expected = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for j, u in enumerate(utilities):
        number, sign = (j // 2, (-1) ** j) if antithetic else (j, 1)
        for total, eps in zip(expected, noise_of(model, 9, 3, number), strict=True):
            total -= u * sign * eps.double() / (8 * 0.05)
    for p, old, exact in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)
    assert strategy.generation == 4


def test_members_are_the_model_and_its_noise():
    model = network()
    strategy = strategy_for(model, antithetic=True, seed=4)
    before = [p.detach().clone() for p in model.parameters()]
    for member in (0, 1, 6, 7):
        with strategy.perturbed(member) as perturbed:
            assert perturbed is model
            noise = noise_of(model, 4, 0, member // 2)
            for p, old, eps in zip(model.parameters(), before, noise, strict=True):
                assert torch.equal(p, old + eps * (0.05 if member % 2 == 0 else -0.05))
        assert torch.equal(flat(model.parameters()), flat(before))


def test_ask_scores_each_member_as_perturbed_does():
    model = network()
    strategy = strategy_for(model)
    scores = strategy.ask(fitness)
    assert scores.dtype == np.float64
    assert scores.shape == (8,)
    for member in reversed(range(8)):
        assert fitness_at(strategy, member) == scores[member]
    assert len(set(scores)) == 8


def test_the_estimate_of_a_quadratic_is_its_gradient():
    """Of many antithetic pairs, without standardising: E[estimate] = gradient for a quadratic."""
    parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    curvature = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
    model = nn.ParameterList([parameter])
    strategy = strategy_for(model, population=20_000, sigma=0.1, antithetic=True)
    scores = strategy.ask(lambda m: -0.5 * (curvature * m[0] ** 2).sum())
    gradient = curvature * parameter.detach()
    strategy.tell(scores)
    # standardised scores are scores over their standard deviation, which is known here
    torch.testing.assert_close(
        parameter.grad * float(scores.std()),
        gradient,
        rtol=0.03,
        atol=0.03 * gradient.norm().item(),
    )


def trained(model, optimizer, generations, **options):
    strategy = strategy_for(model, optimizer, **options)
    for _ in range(generations):
        strategy.tell(strategy.ask(fitness))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_learns_in_every_dtype(dtype):
    model = network(dtype)
    start = loss_of(model)
    optimizer = FusedEvolvedOptimizer([{"params": model.parameters(), "lr": 0.05}], zoo.adam)
    trained(model, optimizer, 40, population=20, antithetic=True, sigma=0.1)
    assert loss_of(model) < 0.6 * start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_train_to_the_same_bits(dtype):
    def train(backend):
        model = network(dtype)
        optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adam)
        return flat(trained(model, optimizer, 3, backend=backend).parameters())

    assert torch.equal(train("cpu"), train("eager"))
    assert not torch.equal(train("cpu"), flat(network(dtype).parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.RMSprop(p, lr=0.02),
        lambda p: FusedEvolvedOptimizer(p, zoo.sgd_momentum, zero_grads=True),
        lambda p: FusedEvolvedOptimizer(p, zoo.adam, max_grad_norm=1.0),
        lambda p: FusedEvolvedOptimizer(p, zoo.evolved_2025, total_steps=30),
    ],
)
def test_any_optimizer_will_do(make):
    model = network()
    start = loss_of(model)
    optimizer = make(model.parameters())
    trained(model, optimizer, 30, population=16, utility="centered_ranks")
    assert loss_of(model) < 0.97 * start


def test_optimizers_with_schedulers_and_wrapped_steps():
    class Wrapped(torch.optim.SGD):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    model = network()
    optimizer = Wrapped(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    strategy = strategy_for(model, optimizer)  # by now `optimizer.step` is the scheduler's
    before = flat(model.parameters())
    strategy.tell(range(8))
    moved = flat(model.parameters())
    assert not torch.equal(moved, before)
    scheduler.step()
    strategy.tell(range(8))
    assert torch.equal(flat(model.parameters()), moved)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_as_the_original_does(again):
    model = network()
    original = strategy_for(model, FusedEvolvedOptimizer(model.parameters(), zoo.adam))
    original.tell(original.ask(fitness))
    copied = again(original)
    for strategy in (original, copied):
        strategy.tell(strategy.ask(fitness))
    assert copied.model is not model
    assert torch.equal(*(flat(s.model.parameters()) for s in (original, copied)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_may_change_its_dtype_between_generations(dtype):
    model = network()
    strategy = strategy_for(model)
    strategy.tell(strategy.ask(fitness))
    before = flat(model.to(dtype).parameters())
    strategy.tell(strategy.ask(fitness))
    assert flat(model.parameters()).dtype == dtype
    assert not torch.equal(flat(model.parameters()), before)


# what it leaves alone, and what members share


class Everything(nn.Module):
    """Tied, frozen, transposed, empty and 0-d parameters; buffers of all kinds; dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("expanded", torch.ones(1).expand(6))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls = self.calls + 1  # another tensor in its place
        hidden = self.frozen(self.dropout(self.norm(self.tied(self.first(x))))) + self.expanded
        return self.scale * hidden @ self.transposed


def score_everything(model):
    x = torch.linspace(-1, 1, 60).view(10, 6)
    return model(x).square().mean() + torch.rand(()) + model.calls


def test_a_member_leaves_no_trace():
    torch.manual_seed(0)
    model = Everything()
    strategy = strategy_for(model)
    buffers = dict(model.named_buffers())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    forwards = strategy.ask(score_everything)
    backwards = np.zeros(8)
    for member in reversed(range(8)):
        with strategy.perturbed(member):
            backwards[member] = score_everything(model)
    assert forwards.tolist() == backwards.tolist()
    assert len(set(forwards)) == 8
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


@pytest.mark.gpu
def test_members_on_a_gpu_are_those_on_a_cpu():
    models = [network(), network().to("cuda")]
    here, there = map(strategy_for, models)
    state = torch.cuda.get_rng_state()
    with here.perturbed(3), there.perturbed(3):
        assert torch.equal(*(flat(model.parameters()).cpu() for model in models))
    drawn = there.ask(lambda _: torch.rand((), device="cuda"))
    assert len(set(drawn)) == 1
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for strategy in (here, there):
        strategy.tell(range(8))
    gradients = ([p.grad for p in model.parameters()] for model in models)
    assert torch.equal(*(flat(each).cpu() for each in gradients))


def test_all_members_find_the_same_random_numbers_and_generations_others():
    strategy = strategy_for(network())
    drawn = []
    for _ in range(2):
        scores = strategy.ask(lambda _: torch.rand(()))
        assert len(set(scores)) == 1
        drawn.append(scores[0])
        strategy.tell(range(8))
    other = strategy_for(network(), seed=1).ask(lambda _: torch.rand(()))
    assert len({*drawn, other[0]}) == 3


def test_only_trainable_parameters_move_and_tied_ones_stay_tied():
    torch.manual_seed(0)
    model = Everything()
    strategy = strategy_for(model)
    before = copy.deepcopy(model.state_dict())
    with strategy.perturbed(3):
        assert torch.equal(model.frozen.weight, before["frozen.weight"])
        assert model.first.weight is model.tied.weight
        assert not torch.equal(model.first.weight, before["first.weight"])
    strategy.tell(strategy.ask(score_everything))
    assert model.frozen.weight.grad is None
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {
        *("first.weight", "tied.weight", "first.bias", "tied.bias", "transposed", "scale"),
        *("norm.weight", "norm.bias"),
    }


def test_freezing_changes_no_other_noise_and_old_gradients_are_not_used():
    model, other = network(), network()
    strategy, unfrozen = strategy_for(model), strategy_for(other)
    for s in (strategy, unfrozen):
        s.tell(range(8))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    with strategy.perturbed(2), unfrozen.perturbed(2):
        assert torch.equal(model[2].weight, other[2].weight)
        assert torch.equal(model[0].weight, before)
    strategy.tell(range(8))
    assert torch.equal(model[0].weight, before)


def test_what_raises_in_the_fitness_leaves_no_trace():
    model = Everything()
    strategy = strategy_for(model)
    before = copy.deepcopy(model.state_dict())

    def failing(model):
        score_everything(model)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        strategy.ask(failing)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    strategy.ask(score_everything)  # and it goes on


def test_what_a_fitness_puts_in_another_place_is_put_back():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.register_buffer("later", None)

        def forward(self, x):
            self.later = x.new_zeros(()) if self.later is None else self.later + 1
            if not hasattr(self, "calls"):
                self.register_buffer("calls", x.new_zeros(()))
            self.calls += 1
            return self.inner(x) + self.later + self.calls

    model = Lazy()
    strategy = strategy_for(model)
    expected = [fitness_at(strategy, member) for member in range(8)]
    memory = [p.data_ptr() for p in model.parameters()]

    def moving(model):
        score = fitness(model)
        model.to(torch.float64)  # gives each parameter other memory
        return score

    assert strategy.ask(moving).tolist() == expected
    assert len(set(expected)) == 8
    assert (model.later, dict(model.named_buffers())) == (None, {})
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradients_can_be_had_in_a_fitness():
    def slope(model):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
        return -gradient.square().mean()

    strategy = strategy_for(network())
    scores = strategy.ask(slope)
    assert len(set(scores)) == 8
    with strategy.perturbed(3) as member:
        assert float(slope(member)) == scores[3]


def test_a_backward_pass_through_perturbed_parameters_fails():
    model = network()
    loss = -fitness(model)
    with strategy_for(model).perturbed(0):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes += result.nbytes
        return result


def test_memory_does_not_grow_with_the_population():
    made = []
    for population in (4, 400):
        model = network()
        strategy = strategy_for(model, population=population)
        with Allocations() as allocations:
            strategy.tell(strategy.ask(lambda _: random.random()))
        made.append(allocations.bytes)
    size = sum(p.nbytes for p in model.parameters())
    assert made[0] == made[1]
    assert 2 * size <= made[0] < 8 * size  # the centre, gradients, the step


# resuming


def test_a_resumed_run_is_the_same_run():
    def build():
        model = nn.Sequential(network(), nn.Dropout(0.3))
        optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.evolved_2025, total_steps=9)
        return model, optimizer, strategy_for(model, optimizer, sigma_decay=0.9, seed=2**63 + 1)

    def go(strategy, generations):
        for _ in range(generations):
            strategy.tell(strategy.ask(fitness))

    whole = build()
    go(whole[2], 5)
    first = build()
    go(first[2], 2)
    saved = copy.deepcopy([part.state_dict() for part in first])
    assert saved[2] == {"seed": 2**63 + 1, "generation": 2, "sigma": 0.05 * 0.9 * 0.9}
    second = build()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    torch.rand(100)  # of what the generators have seen nothing depends
    go(second[2], 3)
    assert torch.equal(flat(whole[0].parameters()), flat(second[0].parameters()))
    assert whole[2].state_dict() == second[2].state_dict()
    assert not torch.equal(flat(first[0].parameters()), flat(second[0].parameters()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seed": 1}, r"must have seed, generation, sigma, got \['seed'\]"),
        (None, "got NoneType"),
        ({"seed": -1, "generation": 0, "sigma": 1.0}, "seed must be a whole number"),
        ({"seed": 1, "generation": 0.5, "sigma": 1.0}, "generation must be a whole number"),
        ({"seed": 1, "generation": 0, "sigma": 0}, "sigma must be positive and finite, got 0"),
    ],
)
def test_another_state_is_turned_down(state, message):
    strategy = strategy_for(network())
    with pytest.raises(StrategyError, match=message):
        strategy.load_state_dict(state)
    assert strategy.state_dict() == {"seed": 0, "generation": 0, "sigma": 0.05}


# what it turns down


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, r"population must be a whole number in \[2, 4294967296\), got 1"),
        ({"population": 8.0}, "population must be a whole number"),
        ({"population": 7, "antithetic": True}, "must be even, got 7"),
        ({"sigma": -1.0}, "sigma must be positive and finite, got -1.0"),
        ({"sigma": math.nan}, "sigma must be positive"),
        ({"sigma": "x"}, "sigma must be positive"),
        ({"sigma": 10**400}, "sigma must be positive"),
        ({"antithetic": "no"}, "antithetic must be True or False, got 'no'"),
        ({"sigma_decay": 1.5}, "sigma_decay must be positive and at most 1, got 1.5"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"utility": "ranks"}, "'ranks'; use 'standardized' or 'centered_ranks'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(StrategyError, match=message):
        strategy_for(network(), **options)


def test_models_and_optimizers_that_cannot_be_used():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StrategyError, match=r"does not hold 2\.weight, 2\.bias; make it from"):
        strategy_for(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(StrategyError, match="set maximize=False"):
        strategy_for(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    with pytest.raises(StrategyError, match="LBFGS needs a closure"):
        strategy_for(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(StrategyError, match="got str"):
        strategy_for(model, "adam")
    with pytest.raises(StrategyError, match=r"must be a torch\.nn\.Module, got list"):
        strategy_for([], optimizer)
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        strategy_for(model, backend="gpu")
    with pytest.raises(StrategyError, match="no parameter of this Sequential requires gradients"):
        strategy_for(model.requires_grad_(False), optimizer)
    memory = torch.zeros(8)
    shared = nn.ParameterList([nn.Parameter(memory[:5]), nn.Parameter(memory[3:])])
    with pytest.raises(OptimizerError, match="share memory"):
        strategy_for(shared)
    with pytest.raises(OptimizerError, match="elements that share memory"):
        strategy_for(nn.ParameterList([nn.Parameter(torch.zeros(1).expand(3))]))
    with pytest.raises(OptimizerError, match="complex64"):
        strategy_for(nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.complex64))]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (range(7), r"shape \(7,\), the population has 8 members"),
        (np.zeros((8, 1)), r"shape \(8, 1\)"),
        (["a"] * 8, "must be numbers"),
        (np.zeros(8, complex), "must be numbers"),
        (torch.zeros(8, dtype=torch.complex64), "must be numbers"),
        ([torch.zeros((), requires_grad=True)] * 8, r"Use tensor\.detach"),
        ([math.nan] * 8, "none of 8 scores is finite"),
    ],
)
def test_scores_that_cannot_be_used_change_nothing(scores, message):
    model = network()
    strategy = strategy_for(model)
    before = flat(model.parameters())
    with pytest.raises(StrategyError, match=message):
        strategy.tell(scores)
    assert torch.equal(flat(model.parameters()), before)
    assert strategy.generation == 0


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.zeros(3), r"one number, got Tensor of shape \(3,\); add up or average"),
        (None, "one number, got NoneType"),
        (1j, "one number, got complex"),
    ],
)
def test_a_fitness_returns_one_number(score, message):
    with pytest.raises(StrategyError, match=message):
        strategy_for(network()).ask(lambda _: score)


def test_a_score_may_be_a_tensor_that_is_used_again():
    total = torch.zeros(1, dtype=torch.float64)
    scores = strategy_for(network()).ask(lambda _: total.add_(1))
    assert scores.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_one_member_at_a_time():
    strategy = strategy_for(network())
    with strategy.perturbed(0):
        with pytest.raises(StrategyError, match="cannot tell while the model is a member"):
            strategy.tell(range(8))
        with (
            pytest.raises(StrategyError, match="cannot score members while the model is a member"),
            strategy.perturbed(1),
        ):
            pass
    with pytest.raises(StrategyError, match=r"member must be a whole number in \[0, 8\), got 8"):
        strategy.perturbed(8).__enter__()
    strategy.tell(range(8))


def test_equal_scores_leave_the_model_where_it_is():
    model = network()
    strategy = strategy_for(model)
    before = flat(model.parameters())
    strategy.tell([0.1] * 8)
    assert torch.equal(flat(model.parameters()), before)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_sigma_decays_and_never_to_zero():
    model = network()
    strategy = strategy_for(model, sigma_decay=1e-200)
    for _ in range(3):
        strategy.tell(strategy.ask(fitness))
    assert strategy.sigma > 0
    assert flat(model.parameters()).isfinite().all()


def test_gradients_keep_their_memory_unless_it_is_shared():
    model = network()
    strategy = strategy_for(model)
    model[0].bias.grad = torch.zeros(1).expand(7)
    strategy.tell(range(8))
    gradients = [p.grad for p in model.parameters()]
    assert len(gradients[1].unique()) == 7
    strategy.tell(range(8))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
