"""What ENES is asked to do, read from the mappings of its source and checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evokernels.errors import SettingsError

__all__ = ["Settings", "read_settings"]

PROBLEM = ("fitness_function", "ndim_problem", "lower_boundary", "upper_boundary")
OPTIONS = (
    *("max_function_evaluations", "max_runtime", "fitness_threshold", "seed_rng", "n_individuals"),
    *("n_parents", "mean", "lr_mean", "lr_sigma", "is_restart", "verbose", "batched"),
)


@dataclass(frozen=True)
class Settings:
    """Problem and options of `ENES`, which documents them; all arrays are (d,) float64."""

    fitness_function: Callable[[np.ndarray], Any] | None
    dimensions: int
    lower: np.ndarray
    upper: np.ndarray
    seed: int
    mean: np.ndarray | None
    individuals: int
    parents: float
    window: int  # generations without a gain that end a run
    lr_mean: float
    lr_sigma: float
    max_evaluations: float
    max_runtime: float
    threshold: float
    restarts: bool
    verbose: int
    batched: bool


def read_settings(problem: Mapping[str, Any], options: Mapping[str, Any]) -> Settings:
    """The settings that two mappings with the source's keys describe.

    Raises:
        SettingsError: naming the key, the value given and the values allowed.
    """
    _known(problem, PROBLEM, "problem")
    _known(options, OPTIONS, "option")
    dimensions = _whole(problem, "ndim_problem", None, low=1)
    lower = _vector(problem, "lower_boundary", dimensions)
    upper = _vector(problem, "upper_boundary", dimensions)
    if not (lower < upper).all():
        k = int(np.argmin(lower < upper))
        raise SettingsError(
            f"lower_boundary must lie below upper_boundary everywhere, got {lower[k]} and "
            f"{upper[k]} in dimension {k}"
        )
    individuals = _whole(options, "n_individuals", 100, low=3)
    return Settings(
        fitness_function=_function(problem),
        dimensions=dimensions,
        lower=lower,
        upper=upper,
        seed=_whole(options, "seed_rng", None, low=0),
        mean=_mean(options, lower, upper),
        individuals=individuals,
        parents=_whole(options, "n_parents", individuals / 2, low=2, high=individuals),
        window=10 + math.ceil(30 * dimensions / individuals),
        lr_mean=_positive(options, "lr_mean", 1.0),
        lr_sigma=_positive(options, "lr_sigma", 1.0),
        max_evaluations=_whole(options, "max_function_evaluations", math.inf, low=1),
        max_runtime=_positive(options, "max_runtime", math.inf),
        threshold=_threshold(options),
        restarts=bool(options.get("is_restart", True)),
        verbose=_whole(options, "verbose", 0, low=0),
        batched=bool(options.get("batched", False)),
    )


def _known(given: Mapping[str, Any], keys: tuple[str, ...], kind: str) -> None:
    unknown = [key for key in given if key not in keys]
    if unknown:
        raise SettingsError(f"unknown {kind} {unknown[0]!r}; known are {', '.join(keys)}")


def _function(problem: Mapping[str, Any]) -> Callable[[np.ndarray], Any] | None:
    function = problem.get("fitness_function")
    if function is not None and not callable(function):
        raise SettingsError(f"fitness_function must be callable, got {function!r}")
    return function


def _whole(
    given: Mapping[str, Any], key: str, default: float | None, low: int, high: int | None = None
) -> Any:
    """A whole number, also one written as 5e3; the default as it is, which may be given if inf."""
    value = given.get(key)
    real = isinstance(value, numbers.Real)
    if default is not None and (value is None or (real and value == default == math.inf)):
        return default
    whole = real and value % 1 == 0
    if not whole or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SettingsError(f"{key} must be a whole number {allowed}, got {value!r}")
    return int(value)


def _positive(given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key)
    if value is None:
        return default
    if not isinstance(value, numbers.Real) or not value > 0 or (value == math.inf != default):
        raise SettingsError(f"{key} must be a number above 0, got {value!r}")
    return float(value)


def _threshold(options: Mapping[str, Any]) -> float:
    value = options.get("fitness_threshold", -math.inf)
    if not isinstance(value, numbers.Real) or math.isnan(value):
        raise SettingsError(f"fitness_threshold must be a number, got {value!r}")
    return float(value)


def _vector(given: Mapping[str, Any], key: str, dimensions: int) -> np.ndarray:
    """``dimensions`` finite numbers, a copy."""
    if given.get(key) is None:
        raise SettingsError(f"{key} is missing; give {dimensions} numbers, one a dimension")
    try:
        vector = np.array(given[key], dtype=np.float64)
    except (TypeError, ValueError):
        raise SettingsError(f"{key} must hold numbers, got {given[key]!r}") from None
    if vector.shape != (dimensions,):
        raise SettingsError(
            f"{key} must have shape ({dimensions},) for ndim_problem {dimensions}, got shape "
            f"{vector.shape}"
        )
    if not np.isfinite(vector).all():
        raise SettingsError(f"{key} must be finite, got {vector}")
    return vector


def _mean(options: Mapping[str, Any], lower: np.ndarray, upper: np.ndarray) -> np.ndarray | None:
    if options.get("mean") is None:
        return None
    mean = _vector(options, "mean", len(lower))
    outside = (mean < lower) | (mean > upper)
    if outside.any():
        k = int(np.argmax(outside))
        raise SettingsError(
            f"mean must lie within the boundaries, got {mean[k]} outside [{lower[k]}, {upper[k]}] "
            f"in dimension {k}; move it or widen them"
        )
    return mean
