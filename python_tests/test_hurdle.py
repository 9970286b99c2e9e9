"""The hurdle at step 50: which runs it ends, and what they leave."""

import dataclasses
import math

import pytest
import torch
from as_on_device import Repeated

from evokernels import zoo
from evokernels.evolution import evaluator, training
from evokernels.evolution.devices import reproducible
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.fitness import Hurdle, run_fitness
from evokernels.evolution.trial import Conditions, Purpose, Trial
from evokernels.genome import Genome
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Score, Status
from evokernels.tasks import Batches, load_images, stack_draws

MINI = "fashion_mnist_mini"
BATCH = 4
HIGH, LOW = Hurdle(classes=2), Hurdle(classes=10**9)  # ln 2 fails a slow run, 20.7 fails none
GUESSING = math.log(10)

slow = dataclasses.replace(zoo.adam, lr_log10=-6.0)
wild = Genome(term_types=["SIGN_GRAD"], lr_log10=2.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return load_images(MINI, None, 64, 50)


@pytest.mark.parametrize(
    ("losses", "fails"),
    [
        ([GUESSING + 0.01] * 50, True),
        ([GUESSING - 0.01] * 50, False),
        ([GUESSING] * 50, False),  # above it, not at it
        ([9.0] * 40 + [2.0] * 10, False),
        ([2.0] * 40 + [2.4] * 10, True),
        ([2.0] * 40 + [2.2] * 5 + [2.41] * 5, True),  # the mean
        ([2.0] * 39 + [99.0] + [2.0] * 10, False),
        ([9.0] * 49, False),
        ([9.0] * 51, False),
        ([], False),
    ],
)
def test_the_hurdle_is_the_loss_of_guessing_in_the_last_ten_of_fifty_steps(losses, fails):
    assert Hurdle(classes=10).fails(losses) is fails


def trained(data, steps, hurdle, graph=None):
    """Losses and weights after training, on the host or as on a device."""
    with reproducible(torch.device("cpu"), 0):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        optimizer = FusedEvolvedOptimizer(model.parameters(), slow)
        draws = list(data.draw_batches(BATCH, steps, 0))
        batches = Batches(data)
        if graph is None:
            made = map(batches.training, draws)
            losses = training.train(model, optimizer, made, hurdle)
        else:
            stacked = stack_draws(draws)
            losses = training.train_on_device(model, optimizer, batches, stacked, graph, hurdle)
    return losses, list(model.parameters())


@pytest.mark.parametrize(
    ("hurdle", "steps", "taken"),
    [(HIGH, 70, 50), (HIGH, 50, 50), (HIGH, 49, 49), (LOW, 70, 70), (None, 70, 70)],
)
def test_a_run_ends_after_exactly_fifty_steps(monkeypatch, data, hurdle, steps, taken):
    losses, weights = trained(data, taken, None)
    assert len(losses) == taken
    runs = [trained(data, steps, hurdle)]
    for look_every in (1, 7, 32, 50, 64):
        monkeypatch.setattr(training, "LOOK_EVERY", look_every)
        graph = Repeated()
        runs.append(trained(data, steps, hurdle, graph))
        assert graph.replays == taken
    for other_losses, other_weights in runs:
        assert other_losses == losses
        assert all(map(torch.equal, other_weights, weights))


@pytest.mark.parametrize(
    ("hurdle", "purpose", "steps", "status", "taken"),
    [
        (True, Purpose.SEARCH, 60, Status.STOPPED, 50),
        (True, Purpose.AUDIT, 60, Status.OK, 60),
        (True, Purpose.REPORT, 60, Status.OK, 60),
        (False, Purpose.SEARCH, 60, Status.OK, 60),
        (True, Purpose.SEARCH, 50, Status.OK, 50),  # that was its end anyway
        (True, Purpose.SEARCH, 49, Status.OK, 49),
    ],
)
def test_only_runs_of_the_search_are_stopped(
    monkeypatch, data, hurdle, purpose, steps, status, taken
):
    monkeypatch.setattr(evaluator, "Hurdle", lambda classes: Hurdle(classes - 8))
    conditions = Conditions(steps, BATCH, 64, validation_samples=50, hurdle=hurdle)
    outcome = evaluate(Trial(slow, MINI, 0, purpose), conditions, data)
    assert (outcome.status, outcome.steps) == (status, taken)
    assert 0 <= outcome.accuracy < 0.5
    assert outcome.final_loss > HIGH.classes
    assert outcome.fitness == run_fitness(outcome.accuracy, outcome.final_loss)


def test_a_run_that_learns_is_not_stopped_and_a_diverged_one_is_diverged(data):
    conditions = Conditions(60, 16, 64, validation_samples=50, hurdle=True)
    outcomes = [evaluate(Trial(genome, MINI, 0), conditions, data) for genome in (zoo.adam, wild)]
    assert [outcome.status for outcome in outcomes] == [Status.OK, Status.DIVERGED]


def test_a_stopped_score_ranks_by_its_fitness():
    scores = [
        Score(0.9, Status.DIVERGED),
        Score(0.1),
        Score(0.2, Status.STOPPED),
        Score(0.3),
    ]
    assert sorted(scores, key=lambda score: score.rank) == scores
