"""What the scores of a population are worth to the estimate: utilities, zero on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evokernels.errors import StrategyError

__all__ = ["UTILITIES", "centered_ranks", "ordered", "scores_of", "standardized"]


def scores_of(values: Any, population: int) -> np.ndarray:
    """Scores as they were told: (population,), float64.

    Raises:
        StrategyError: anything but one number for each member.
    """
    if isinstance(values, torch.Tensor) and not values.is_complex():
        values = values.detach().cpu().double()
    try:
        scores = np.asarray(values).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError) as error:
        raise StrategyError(f"scores must be numbers, one for each member: {error}") from None
    if scores.shape != (population,):
        raise StrategyError(
            f"scores have shape {scores.shape}, the population has {population} members; "
            "tell one number for each, in their order"
        )
    return scores


def ordered(scores: np.ndarray) -> np.ndarray:
    """Scores that can be compared and averaged: infinite ones and NaN become the next finite one.

    NaN and -inf are as bad as the worst finite score, +inf is as good as the best: a member that
    diverged pulls the model away from itself, and its size counts for nothing.

    Raises:
        StrategyError: no score is finite.
    """
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        raise StrategyError(
            f"none of {len(scores)} scores is finite, so nothing says which way is better; "
            "lower sigma or the learning rate, or give failed members a finite score"
        )
    return np.clip(np.where(np.isnan(scores), -np.inf, scores), finite.min(), finite.max())


def standardized(scores: np.ndarray) -> np.ndarray:
    """(score - mean) / standard deviation, of the population as a whole; all equal: zeros.

    Keeps how much better a member is (as in Wierstra et al. 2014, section 3.1, "fitness baseline").

    Args:
        scores: (population,), float64, finite.
    """
    if scores.min() == scores.max():  # whose mean may be another number
        return np.zeros_like(scores)
    # by a power of two, which changes no digits: the squares of large numbers overflow
    scaled = np.ldexp(scores, -int(np.frexp(np.abs(scores).max())[1]))
    centered = scaled - scaled.mean()
    return centered / np.sqrt(np.mean(centered * centered))


def centered_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from -1/2, the worst, to 1/2 (Salimans et al. 2017, section 2: "rank transformation").

    Equal scores share the mean of their ranks. Outliers and the scale of scores count for nothing.

    Args:
        scores: (population,), float64, finite.
    """
    values, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    if len(values) == 1:
        return np.zeros_like(scores)
    below = np.cumsum(counts) - counts
    return ((below + (counts - 1) / 2) / (len(scores) - 1) - 0.5)[place]


UTILITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "standardized": standardized,
    "centered_ranks": centered_ranks,
}
