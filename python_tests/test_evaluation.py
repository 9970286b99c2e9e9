"""What an evaluation measures, for what purpose, and what ends it early."""

import dataclasses

import pytest
import torch

from evokernels import zoo
from evokernels.errors import DatasetError
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.fitness import run_fitness
from evokernels.evolution.trial import Conditions, Purpose, Trial
from evokernels.search.score import Status
from evokernels.tasks import load_images

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(steps=30, batch_size=32, train_samples=128, validation_samples=100)
PARITY = dataclasses.replace(CONDITIONS, validation_samples=0)


@pytest.fixture(scope="module")
def data():
    """Images of which the test split has wrong labels, and the validation split right ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_images(MINI, None, CONDITIONS.train_samples, CONDITIONS.validation_samples)
    yield dataclasses.replace(loaded, y_test=(loaded.y_test + 1) % 10)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("purpose", "conditions", "on_validation", "reported"),
    [
        (Purpose.SEARCH, CONDITIONS, True, False),
        (Purpose.AUDIT, CONDITIONS, True, False),
        (Purpose.REPORT, CONDITIONS, True, True),
        (Purpose.SEARCH, PARITY, False, False),
        (Purpose.REPORT, PARITY, False, True),
    ],
)
def test_a_purpose_says_on_which_splits_a_run_is_measured(
    data, purpose, conditions, on_validation, reported
):
    outcome = evaluate(Trial(zoo.adam, MINI, 0, purpose), conditions, data)
    assert outcome.status is Status.OK
    assert (outcome.accuracy > 0.4) is on_validation
    assert outcome.accuracy > 0.4 or outcome.accuracy < 0.2
    assert outcome.fitness == run_fitness(outcome.accuracy, outcome.final_loss)
    assert (outcome.test_accuracy is not None) is reported
    if reported:
        assert outcome.test_accuracy < 0.2
        assert outcome.test_fitness == run_fitness(outcome.test_accuracy, outcome.final_loss)


def test_a_split_that_was_not_loaded_is_refused():
    data = load_images(MINI, None, CONDITIONS.train_samples)
    with pytest.raises(DatasetError, match=r"validation_samples is 100, but .* without any; load"):
        evaluate(Trial(zoo.adam, MINI, 0), CONDITIONS, data)
