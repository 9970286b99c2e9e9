"""Training whose outcome is known beforehand: a smooth function of the genome, and noise."""

import contextlib
import math
import random

from evokernels.compiler.canonical import canonical_key
from evokernels.evolution.trial import Outcome, Purpose
from evokernels.search.score import Status

EASE = {"fashion_mnist_mini": 0.95, "mnist": 0.9}
CHANCE = 0.1
HURDLE = 50  # steps after which a hopeless run is stopped


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def truth(genome, task):
    """The mean fitness of a genome over all seeds."""
    rate = genome.lr_log10 + math.log10(sum(map(abs, genome.alphas)) + 1e-3)
    misses = 0.05 * (rate + 3) ** 2 + 0.1 * abs(genome.beta1 - 0.9)
    misses += 0.02 * (not genome.use_cosine_decay) + 0.01 * abs(len(genome.alphas) - 2)
    uphill = 0.9 * (sum(genome.alphas) < 0)
    return max(EASE[task] - misses - uphill, CHANCE)


def normal(*name):
    """A standard normal number, the same for the same name."""
    return random.Random(repr(name)).gauss(0.0, 1.0)


class SyntheticTraining:
    """Takes the place of `evaluate`.

    Attributes:
        trials: all that were made.
        fails_at: how many trials are made before the process is killed; None: all.
        noise: standard deviation of a good genome's score with one seed; bad ones have more.
        common: that of what a seed does to all genomes.
    """

    def __init__(self):
        self.trials = []
        self.fails_at = None
        self.noise = 0.005
        self.common = 0.01

    def __call__(self, trial, conditions, data, device):
        if len(self.trials) == self.fails_at:
            raise Killed
        self.trials.append(trial)
        if trial.optimizer.lr_log10 > -2.1 and trial.seed % 4 == 2:
            return Outcome(Status.DIVERGED, -1.0, None, None, 30, 0.1, "digest")
        expected = truth(trial.optimizer, trial.task)
        if expected == CHANCE and conditions.hurdle and trial.purpose is Purpose.SEARCH:
            return Outcome(Status.STOPPED, CHANCE, CHANCE, 2.4, HURDLE, 0.1, "digest")
        deviation = self.noise + 0.1 * (EASE[trial.task] - expected)
        fitness = (
            expected
            + self.common * normal(trial.task, trial.seed)
            + deviation * normal(canonical_key(trial.optimizer), trial.task, trial.seed)
        )
        tested = fitness - 0.01 if trial.purpose is Purpose.REPORT else None
        return Outcome(Status.OK, fitness, fitness, 1.5, conditions.steps, 0.1, "digest", tested)


@contextlib.contextmanager
def killed_after(training, count):
    """A block in which the process is killed after ``count`` more trials."""
    training.fails_at = len(training.trials) + count
    try:
        yield
    except Killed:
        pass
    else:
        raise AssertionError(f"there were no {count + 1} trials to make")
    finally:
        training.fails_at = None
