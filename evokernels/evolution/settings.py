"""The settings of a search by training: what all have in common, and those of an evolution run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from evokernels.errors import SettingsError
from evokernels.evolution.devices import named_device
from evokernels.evolution.precision import PRECISIONS
from evokernels.evolution.trial import Conditions
from evokernels.search.genetic import GeneticConfig
from evokernels.search.refinement import LEAST_EVALUATIONS
from evokernels.tasks import get_task

__all__ = ["SEED_LIMIT", "RunSettings", "TrainingSettings", "at_least"]

SEED_LIMIT = 2**31  # of all seeds; the upper half is there to draw from


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a search trains its candidates on, and how it chooses among the best.

    Args:
        tasks: names of the tasks that every candidate is trained on.
        seeds: of the training runs on each task; the same for every candidate.
        conditions: of each training run.
        comparison_seeds: how many seeds the winner is compared with others on; they follow the
            largest of ``seeds``, so that selection has seen none of them.
        threads: torch threads of a training run (they decide the last bits of its numbers).
        device: where training runs take place: "cpu", "cuda" or "cuda:N" (it decides them too).
        finalists: how many candidates, the best ones of the search, are trained with
            ``comparison_seeds`` further seeds before the best of them is the winner; with 1 the
            best score of the search decides.

    Raises:
        SettingsError, DatasetError: naming the setting, the value given and the values allowed;
            the device must be there only where training runs take place.
    """

    SEARCH: ClassVar[type]  # the kind of ``search``, a dataclass with a seed, which all have

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    conditions: Conditions
    comparison_seeds: int
    threads: int
    device: str = "cpu"
    finalists: int = 1

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        named_device(self.device)
        for name, value, least in (
            ("steps", self.conditions.steps, 1),
            ("batch_size", self.conditions.batch_size, 1),
            ("train_samples", self.conditions.train_samples, self.conditions.batch_size),
            ("validation_samples", self.conditions.validation_samples, 0),
            ("comparison_seeds", self.comparison_seeds, 1),
            ("threads", self.threads, 1),
            ("finalists", self.finalists, 1),
            *(("seeds", seed, 0) for seed in self.seeds),
        ):
            if value is not None:
                at_least(name, value, least)
        if max(self.seeds, default=0) >= SEED_LIMIT // 2:
            raise SettingsError(f"seeds must be below {SEED_LIMIT // 2}, got {max(self.seeds)}")
        for name, values in (("tasks", self.tasks), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                listed = " ".join(map(str, values)) or "none"
                raise SettingsError(f"{name} must be one or more different values, got {listed}")
        if self.conditions.precision not in PRECISIONS:
            allowed = " or ".join(PRECISIONS)
            raise SettingsError(f"precision must be {allowed}, got {self.conditions.precision!r}")

    @property
    def parity(self) -> bool:
        """Whether this is the protocol of the source system."""
        return False

    @property
    def selection_split(self) -> str:
        """The split that fitness is measured on: "validation" or "test"."""
        return "validation" if self.conditions.validation_samples else "test"

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """The seeds of the final comparison."""
        first = max(self.seeds) + 1
        return tuple(range(first, first + self.comparison_seeds))

    @property
    def final_seeds(self) -> tuple[int, ...]:
        """The seeds that decide among the finalists."""
        first = self.fresh_seeds[-1] + 1
        return tuple(range(first, first + self.comparison_seeds))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; lists do for tuples."""
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        values["seed"] = values.pop("run_seed")

        def taken(kind: type) -> Any:
            return kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind)})

        return cls(search=taken(cls.SEARCH), conditions=taken(Conditions), **values)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the journal keeps it; named like the options of the command line."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        search, conditions = map(
            dataclasses.asdict, (values.pop("search"), values.pop("conditions"))
        )
        return {"run_seed": search.pop("seed"), **search, **conditions, **values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(TrainingSettings):
    """All that the history of an evolution run depends on.

    Finalists are the best genome of the search and then the best of the last generation; the
    comparison is with Adam and AdamW.

    Args:
        search: of the genetic algorithm.
        race: leave out the further seeds of genomes that their first seeds show to be hopeless
            (`evokernels.search.racing`).
        rotate_seeds: draw as many seeds anew for every generation; a genome that stays is trained
            again and is worth its mean over all of its seeds. Needs an elite, since it is in every
            generation that a genome must stay to be held against new ones.
        refine: candidates by which ENES refines the numbers of each of the best genomes, every few
            generations (`evokernels.evolution.refining`); 0: none. One candidate costs what a
            genome of a generation does: a training run for each task and seed.
        plateau: end after this many generations in a row without a better genome; 0: never.
        The others: see `TrainingSettings`.

    Raises:
        SettingsError, DatasetError: as `TrainingSettings`.
    """

    SEARCH: ClassVar[type] = GeneticConfig

    search: GeneticConfig
    race: bool = False
    rotate_seeds: bool = False
    plateau: int = 0
    refine: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("plateau", self.plateau, 0)
        at_least("refine", self.refine, 0)
        if self.refine and self.refine < LEAST_EVALUATIONS:
            raise SettingsError(
                f"refine must be 0, or at least {LEAST_EVALUATIONS}, a generation of ENES and what "
                f"it leads to, got {self.refine}"
            )
        if self.rotate_seeds and not self.search.elites:
            raise SettingsError(
                "elites must be at least 1 with rotate_seeds, got 0: a genome is held against new "
                "ones by being trained again beside them"
            )

    @property
    def parity(self) -> bool:
        """The test split selects, no run but a diverged one is cut short, and there is no search
        but the genetic one, among the source system's terms."""
        return not (
            self.conditions.validation_samples
            or self.conditions.hurdle
            or self.race
            or self.rotate_seeds
            or self.finalists > 1
            or self.refine
            or self.search.catalogue != "classic"
            or self.search.own_terms
        )

    def training_seeds(self, generation: int) -> tuple[int, ...]:
        """The seeds that the genomes of a generation are trained with."""
        if not self.rotate_seeds:
            return self.seeds
        rng = random.Random(f"evokernels seeds {self.search.seed} generation {generation}")
        unused = range(self.final_seeds[-1] + 1, SEED_LIMIT)
        return tuple(rng.sample(unused, len(self.seeds)))


def at_least(name: str, value: int, least: int) -> None:
    """Raises SettingsError for a smaller value."""
    if value < least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")
