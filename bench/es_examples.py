"""What es.py trains without gradients, by which updates, and how such a training is resumed."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import source_es
import torch
from torch import nn

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.errors import JournalError
from evokernels.es import EvolutionStrategy, PopulationForward
from evokernels.evolution.files import write_atomically
from evokernels.tasks import Draw, load_images

__all__ = ["EXAMPLES", "Example", "Row", "Settings", "curve_network", "image_network", "train"]

HELD_BACK = 1_000  # training images that only learning rates are chosen by
SAVE_SECONDS = 10.0  # of training that an interruption may cost

Parameters = Iterable[nn.Parameter]
Update = Callable[[Parameters, int], torch.optim.Optimizer]  # of so many iterations


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the example and the update.

    Attributes:
        iterations: generations.
        population: members of a generation.
        sigma: standard deviation of the noise.
        samples: that score the members of a generation.
        every: iterations from one row to the next.
        seed: of the first weights, the noise and the samples.
    """

    iterations: int
    population: int
    sigma: float
    samples: int
    every: int
    seed: int = 0


class Row(NamedTuple):
    """What a training had come to.

    Attributes:
        iteration: generations told.
        evaluations: members scored.
        value: of the example's quantity.
    """

    iteration: int
    evaluations: int
    value: float


class Example(Protocol):
    """Something to learn; made of its settings.

    Attributes:
        quantity: what is measured of the model.
        target: the value to reach, None if there is none.
        strategy: options of `EvolutionStrategy`.
        updates: optimizers by name.
        defaults: settings.
    """

    quantity: str
    target: float | None
    strategy: Mapping[str, Any]
    updates: Mapping[str, Update]
    defaults: Settings

    def __init__(self, settings: Settings) -> None: ...

    def network(self) -> nn.Sequential:
        """A new one, from torch's generator."""

    def fitness(self, forward: PopulationForward, strategy: EvolutionStrategy) -> torch.Tensor:
        """Of the members of this generation: (population,), higher is better."""

    def measure(self, forward: PopulationForward) -> float:
        """The quantity, of the model as it is."""


def genome_update(genome: Genome) -> Update:
    """A genome's optimizer, its schedule as long as the training."""
    return lambda parameters, steps: FusedEvolvedOptimizer(parameters, genome, total_steps=steps)


def scheduled(genome: Genome, lr_log10: float) -> Genome:
    """Another learning rate, with the warmup and the cosine that evolved_2025 has."""
    evolved = zoo.evolved_2025
    return dataclasses.replace(
        genome,
        lr_log10=lr_log10,
        use_warmup=evolved.use_warmup,
        warmup_steps=evolved.warmup_steps,
        use_cosine_decay=evolved.use_cosine_decay,
    )


def curve_network() -> nn.Sequential:
    """The source document's: 140 numbers, all of them normal at first."""
    network = nn.Sequential(
        *(nn.Linear(source_es.IL, source_es.HL1), nn.ReLU()),
        *(nn.Linear(source_es.HL1, source_es.HL2), nn.ReLU()),
        nn.Linear(source_es.HL2, source_es.OL, bias=False),
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def image_network() -> nn.Sequential:
    """25,450 numbers, as torch makes them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


class Curve:
    """The source document's task: y = 2x^2 + 5 of normal x; fitness is 1 / NMSE."""

    quantity = "NMSE"
    target = 1.3e-4
    strategy: Mapping[str, Any] = {}
    updates: Mapping[str, Update] = {
        "plain step": lambda parameters, steps: torch.optim.SGD(parameters, lr=source_es.STEP),
        "Adam": genome_update(scheduled(zoo.adam, -2.0)),
        "evolved_2025": genome_update(zoo.evolved_2025),
    }
    defaults = Settings(5_000, source_es.POPULATION, source_es.SIGMA, source_es.SAMPLES, every=1)

    def __init__(self, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        self._x = torch.randn(settings.samples, 1, generator=generator)
        self._y = source_es.curve(self._x)
        self._size = self._y.double().square().sum()

    def network(self) -> nn.Sequential:
        """As `Example` says."""
        return curve_network()

    def fitness(self, forward: PopulationForward, strategy: EvolutionStrategy) -> torch.Tensor:
        """As `Example` says."""
        return self._size / forward.losses(self._x, self._y, "squares", strategy)

    def measure(self, forward: PopulationForward) -> float:
        """As `Example` says."""
        return float(forward.losses(self._x, self._y, "squares") / self._size)


class Images:
    """Classes of images; fitness is minus the cross entropy of a batch, new in each generation."""

    quantity = "test accuracy"
    split = "test"
    target = None
    strategy: Mapping[str, Any] = {"antithetic": True, "utility": "centered_ranks"}
    updates: Mapping[str, Update] = {  # of `Rates` the ones with the best end
        "Adam": genome_update(scheduled(zoo.adam, -2.5)),
        "evolved_2025": genome_update(scheduled(zoo.evolved_2025, -3.0)),
    }
    defaults = Settings(1_000, population=100, sigma=0.02, samples=256, every=20)

    def __init__(self, settings: Settings) -> None:
        data = load_images("fashion_mnist_mini", validation_samples=HELD_BACK)
        make = data.maker()
        self._train, self._measured = (
            make(split, Draw(data.samples(split))) for split in ("train", self.split)
        )
        self._settings = settings

    def network(self) -> nn.Sequential:
        """As `Example` says."""
        return image_network()

    def fitness(self, forward: PopulationForward, strategy: EvolutionStrategy) -> torch.Tensor:
        """As `Example` says."""
        generator = np.random.default_rng((self._settings.seed, strategy.generation))
        x, y = self._train
        chosen = torch.from_numpy(generator.integers(len(y), size=self._settings.samples))
        return -forward.losses(x[chosen], y[chosen], "cross_entropy", strategy)

    def measure(self, forward: PopulationForward) -> float:
        """As `Example` says."""
        x, y = self._measured
        return 1 - forward.losses(x, y, "mistakes").item() / len(y)


class Rates(Images):
    """Learning rates of the images' updates, measured on images held back from the training."""

    quantity = "validation accuracy"
    split = "validation"
    updates: Mapping[str, Update] = {
        f"{name} 10^{rate}": genome_update(scheduled(genome, rate))
        for name, genome in {"Adam": zoo.adam, "evolved_2025": zoo.evolved_2025}.items()
        for rate in (-2.0, -2.5, -3.0, -3.5)
    }


EXAMPLES: dict[str, type[Example]] = {"curve": Curve, "images": Images, "rates": Rates}


def train(
    example: Example,
    update: str,
    settings: Settings,
    path: pathlib.Path,
) -> Iterator[Row]:
    """Train from the beginning, or from where ``path`` is; every row when it is measured.

    Args:
        path: of the state, written every few seconds and at the end.

    Raises:
        JournalError: the state is of other settings or damaged, or cannot be written.
    """
    torch.manual_seed(settings.seed)
    network = example.network()
    optimizer = example.updates[update](network.parameters(), settings.iterations)
    strategy = EvolutionStrategy(
        network,
        optimizer,
        population=settings.population,
        sigma=settings.sigma,
        seed=settings.seed,
        **example.strategy,
    )
    forward = PopulationForward.of(network)
    parts = {"network": network, "optimizer": optimizer, "strategy": strategy}
    rows = load(path, settings, parts)
    yield from rows
    saved = time.monotonic()
    while strategy.generation < settings.iterations:
        strategy.tell(example.fitness(forward, strategy))
        done = strategy.generation
        measured = done % settings.every == 0 or done == settings.iterations
        if measured:
            rows.append(Row(done, done * settings.population, example.measure(forward)))
        if done == settings.iterations or time.monotonic() > saved + SAVE_SECONDS:
            save(path, settings, parts, rows)
            saved = time.monotonic()
        if measured:
            yield rows[-1]


def save(path: pathlib.Path, settings: Settings, parts: Mapping[str, Any], rows: list[Row]) -> None:
    """Write the state of a training; raises JournalError if it cannot."""
    state = {name: part.state_dict() for name, part in parts.items()}
    kept = {"settings": dataclasses.asdict(settings), "rows": [tuple(row) for row in rows]}
    file = io.BytesIO()
    torch.save({**state, **kept}, file)
    write_atomically(path, file.getvalue())


def load(path: pathlib.Path, settings: Settings, parts: Mapping[str, Any]) -> list[Row]:
    """The rows of the state in ``path``, and its parts as they were; [] if there is none."""
    if not path.exists():
        return []
    try:
        state = torch.load(path, weights_only=True)
        given = Settings(**state["settings"])
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        raise JournalError(
            f"{path} is no state of a training that es.py has written; remove it, or choose "
            "another folder with --out"
        ) from None
    if given != settings:
        raise JournalError(
            f"{path} is of a training with {given}; give the same options, or choose another "
            "folder with --out"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return [Row(*row) for row in state["rows"]]
