"""The settings of an evolution run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from evokernels.errors import SettingsError
from evokernels.evolution.devices import find_device
from evokernels.evolution.precision import PRECISIONS
from evokernels.evolution.trial import Conditions
from evokernels.search.genetic import GeneticConfig
from evokernels.search.refinement import LEAST_EVALUATIONS
from evokernels.tasks import get_task

__all__ = ["SEED_LIMIT", "RunSettings"]

SEED_LIMIT = 2**31  # of all seeds; the upper half is there to draw from


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All that the history of a run depends on.

    Args:
        search: of the genetic algorithm.
        tasks: names of the tasks that every genome is trained on.
        seeds: of the training runs on each task; the same for every genome.
        conditions: of each training run.
        comparison_seeds: how many seeds the best genome is compared with Adam and AdamW on; they
            follow the largest of ``seeds``, so that selection has seen none of them.
        threads: torch threads of a training run (they decide the last bits of its numbers).
        device: where training runs take place: "cpu", "cuda" or "cuda:N" (it decides them too).
        race: leave out the further seeds of genomes that their first seeds show to be hopeless
            (`evokernels.search.racing`).
        rotate_seeds: draw as many seeds anew for every generation; a genome that stays is trained
            again and is worth its mean over all of its seeds. Needs an elite, since it is in every
            generation that a genome must stay to be held against new ones.
        finalists: how many genomes, the best of the search and then of the last generation, are
            trained with ``comparison_seeds`` further seeds before the best of them is the winner;
            with 1 the best score of the search decides.
        refine: candidates by which ENES refines the numbers of each of the best genomes, every few
            generations (`evokernels.evolution.refining`); 0: none. One candidate costs what a
            genome of a generation does: a training run for each task and seed.
        plateau: end after this many generations in a row without a better genome; 0: never.

    Raises:
        SettingsError, DatasetError: naming the setting, the value given and the values allowed;
            a device must be there.
    """

    search: GeneticConfig
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    conditions: Conditions
    comparison_seeds: int
    threads: int
    device: str = "cpu"
    race: bool = False
    rotate_seeds: bool = False
    finalists: int = 1
    plateau: int = 0
    refine: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        find_device(self.device)
        for name, value, least in (
            ("steps", self.conditions.steps, 1),
            ("batch_size", self.conditions.batch_size, 1),
            ("train_samples", self.conditions.train_samples, self.conditions.batch_size),
            ("validation_samples", self.conditions.validation_samples, 0),
            ("comparison_seeds", self.comparison_seeds, 1),
            ("threads", self.threads, 1),
            ("finalists", self.finalists, 1),
            ("plateau", self.plateau, 0),
            ("refine", self.refine, 0),
            *(("seeds", seed, 0) for seed in self.seeds),
        ):
            if value is not None and value < least:
                raise SettingsError(f"{name} must be at least {least}, got {value}")
        if max(self.seeds, default=0) >= SEED_LIMIT // 2:
            raise SettingsError(f"seeds must be below {SEED_LIMIT // 2}, got {max(self.seeds)}")
        for name, values in (("tasks", self.tasks), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                listed = " ".join(map(str, values)) or "none"
                raise SettingsError(f"{name} must be one or more different values, got {listed}")
        if self.conditions.precision not in PRECISIONS:
            allowed = " or ".join(PRECISIONS)
            raise SettingsError(f"precision must be {allowed}, got {self.conditions.precision!r}")
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
        """Whether this is the protocol of the source system: the test split selects, no run but a
        diverged one is cut short, and there is no search but the genetic one."""
        return not (
            self.conditions.validation_samples
            or self.conditions.hurdle
            or self.race
            or self.rotate_seeds
            or self.finalists > 1
            or self.refine
        )

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

    def training_seeds(self, generation: int) -> tuple[int, ...]:
        """The seeds that the genomes of a generation are trained with."""
        if not self.rotate_seeds:
            return self.seeds
        rng = random.Random(f"evokernels seeds {self.search.seed} generation {generation}")
        unused = range(self.final_seeds[-1] + 1, SEED_LIMIT)
        return tuple(rng.sample(unused, len(self.seeds)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunSettings:
        """The inverse of `to_dict`; lists do for tuples."""
        values = dict(settings, seed=settings["run_seed"])
        del values["run_seed"]

        def taken(kind: type) -> dict[str, Any]:
            return {f.name: values.pop(f.name) for f in dataclasses.fields(kind)}

        search, conditions = GeneticConfig(**taken(GeneticConfig)), Conditions(**taken(Conditions))
        tasks, seeds = tuple(values.pop("tasks")), tuple(values.pop("seeds"))
        return cls(search=search, tasks=tasks, seeds=seeds, conditions=conditions, **values)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the journal keeps it; named like the options of the command line."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        search, conditions = map(
            dataclasses.asdict, (values.pop("search"), values.pop("conditions"))
        )
        return {"run_seed": search.pop("seed"), **search, **conditions, **values}
