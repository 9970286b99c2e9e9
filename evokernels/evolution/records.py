"""Individuals as the JSON text that journals hold."""

from __future__ import annotations

import json
from typing import Any

from evokernels.architecture import Architecture
from evokernels.evolution.baselines import Baseline, optimizer_from_json
from evokernels.evolution.trial import Trial
from evokernels.genome import Genome

__all__ = ["individual_from_json", "to_json", "trained_from_json", "trained_to_json"]

# The fields of JSON that holds both; one of an optimizer or of an architecture has neither.
OPTIMIZER, ARCHITECTURE = "optimizer", "architecture"


def to_json(individual: Genome | Baseline | Architecture) -> str:
    """On one line."""
    return _line(individual.to_dict())


def individual_from_json(text: str) -> Genome | Architecture:
    """A candidate of a search; raises GenomeError or ArchitectureError."""
    fields = _fields(text)
    return Architecture.from_dict(fields) if "components" in fields else Genome.from_json(text)


def trained_to_json(trial: Trial) -> str:
    """What a trial trains: an optimizer, with an architecture where the trial has one."""
    if trial.architecture is None:
        return to_json(trial.optimizer)
    both = {OPTIMIZER: trial.optimizer.to_dict(), ARCHITECTURE: trial.architecture.to_dict()}
    return _line(both)


def trained_from_json(text: str) -> tuple[Genome | Baseline, Architecture | None]:
    """The inverse of `trained_to_json`.

    Raises:
        GenomeError, SettingsError, ArchitectureError: the text is no such thing.
    """
    fields = _fields(text)
    if ARCHITECTURE not in fields:
        return optimizer_from_json(text), None
    architecture = Architecture.from_dict(fields[ARCHITECTURE])
    return optimizer_from_json(_line(fields.get(OPTIMIZER))), architecture


def _line(data: Any) -> str:
    return json.dumps(data, allow_nan=False)


def _fields(text: str) -> dict[str, Any]:
    """Of a JSON object; none of any other text, of which `Genome` says what is wrong."""
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
