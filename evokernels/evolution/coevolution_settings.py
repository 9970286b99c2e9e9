"""The settings of a co-evolution of architectures and optimizers, and what it costs at most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from evokernels import zoo
from evokernels.architecture import MAX_LENGTH, Architecture
from evokernels.errors import SettingsError
from evokernels.evolution.settings import TrainingSettings, at_least
from evokernels.genome import Genome
from evokernels.search.bounded import BoundedSpace
from evokernels.search.coevolution import Coevolution, CoevolutionConfig
from evokernels.search.spaces import (
    ArchitectureSpace,
    FixedSpace,
    OptimizerSpace,
    catalogue_terms,
)
from evokernels.tasks import cost_of, own_cost

__all__ = ["CONTENDERS", "CoevolutionSettings"]

# The winner, what it is held against, and each with the other's optimizer.
CONTENDERS = 4

# The sizes of the two populations, as `CoevolutionConfig` calls them and as the journal does.
NAMES = {"first": "architectures", "second": "optimizers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoevolutionSettings(TrainingSettings):
    """All that the history of a co-evolution depends on.

    Args:
        search: of the co-evolution: first architectures, second optimizers.
        max_terms: terms that a genome may have.
        catalogue, own_terms: what new ones are made of (`evokernels.search.spaces`).
        recipes: names from `evokernels.zoo`; the optimizers are these and no others. Without any
            they are genomes that evolve.
        max_length: components that an architecture may have.
        max_parameters: that a network may have. 0: as many as the smallest of the tasks' own
            networks, so that none has more than what it is held against.
        max_work: multiply-adds that a network may take on each task, as a multiple of those of the
            task's own network. Without such a bound a training run may take any time: few
            parameters do not make a convolution of large images cheap.
        penalty: what a million parameters take from the worth of a pair, whose fitness is an
            accuracy and a little more; parameters are the mean over the tasks.
        The others: see `TrainingSettings`.

    Raises:
        SettingsError, DatasetError: as `TrainingSettings`.
        ArchitectureError: a task has no images, or ``max_parameters`` does not do for a classifier.
    """

    SEARCH: ClassVar[type] = CoevolutionConfig

    search: CoevolutionConfig
    max_terms: int = 4
    catalogue: str = "classic"
    own_terms: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    max_length: int = 16
    max_parameters: int = 0
    max_work: float = 1.0
    penalty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("max_terms", self.max_terms, 1)
        catalogue_terms(self.catalogue, self.own_terms)
        for recipe in self.recipes:
            if recipe not in zoo.GENOMES:
                known = ", ".join(zoo.GENOMES)
                raise SettingsError(f"unknown recipe {recipe!r}; use one or more of {known}")
        if len(set(self.recipes)) < len(self.recipes):
            raise SettingsError(f"recipes must be different, got {' '.join(self.recipes)}")
        if not 1 <= self.max_length <= MAX_LENGTH:
            raise SettingsError(f"max_length must be from 1 to {MAX_LENGTH}, got {self.max_length}")
        for name, value in (("max_work", self.max_work), ("penalty", self.penalty)):
            if not 0 <= value < math.inf:
                raise SettingsError(f"{name} must be a number of at least 0, got {value}")
        for task in self.tasks:
            cost_of(Architecture((), self.budget), task)

    @property
    def budget(self) -> int:
        """Parameters that a network may have."""
        return self.max_parameters or min(own_cost(task).parameters for task in self.tasks)

    @property
    def search_runs(self) -> int:
        """Training runs of the search, at most: c (m + n) pairs a generation."""
        pairs = self.search.generations * self.search.evaluations_per_generation
        return pairs * len(self.tasks) * len(self.seeds)

    @property
    def final_runs(self) -> int:
        """Those that choose among the finalists, at most."""
        if self.finalists == 1:
            return 0
        return self.finalists * self.comparison_seeds * len(self.tasks)

    @property
    def comparison_runs(self) -> int:
        """Those of the winner and what it is held against, at most."""
        return CONTENDERS * self.comparison_seeds * len(self.tasks)

    @property
    def planned_runs(self) -> int:
        """Training runs in all, at most."""
        return self.search_runs + self.final_runs + self.comparison_runs

    def coevolution(self) -> Coevolution[Architecture, Genome]:
        """The search."""
        architectures = ArchitectureSpace(self.max_length, self.budget)
        return Coevolution(
            self.search,
            BoundedSpace(architectures, self._affordable),
            FixedSpace([zoo.GENOMES[name] for name in self.recipes])
            if self.recipes
            else OptimizerSpace(self.max_terms, catalogue_terms(self.catalogue, self.own_terms)),
        )

    def _affordable(self, architecture: Architecture) -> bool:
        return all(
            cost_of(architecture, task).multiply_adds
            <= self.max_work * own_cost(task).multiply_adds
            for task in self.tasks
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; lists do for tuples."""
        values = dict(settings)
        for name, shown in NAMES.items():
            values[name] = values.pop(shown)
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the journal keeps it; named like the options of the command line."""
        return {NAMES.get(name, name): value for name, value in super().to_dict().items()}
