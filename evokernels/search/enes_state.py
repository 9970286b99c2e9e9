"""Where an ENES search stands, and what follows when fitness is told: functions without memory."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from evokernels.search.enes_settings import Settings
from evokernels.search.natural import natural_gradient, utilities

__all__ = ["State", "first_state", "next_state"]

STAGNANT = 1e-12  # a run that gains less than this in a window of generations is over


class _Scratch(threading.local):
    """A generator for each thread, whose state is set before it draws: making one takes longer."""

    def __init__(self) -> None:
        self.bits = np.random.PCG64(0)
        self.generator = np.random.Generator(self.bits)


_scratch = _Scratch()


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Where a search stands; equal beginnings told equal values make equal states.

    A search goes on from a state that was pickled, or from ``State(**mapping)`` of its
    `dataclasses.asdict`. Arrays are float64 and read-only.

    Attributes:
        mean: (d,) of the search distribution.
        a: (d, d) upper triangular factor of its covariance aᵀa.
        z: (n, d) standard normal numbers that the candidates were made of.
        candidates: (n, d), to be scored next; n = 0 at the end, and less than ``n_individuals``
            where the budget ends within a generation.
        n_individuals: candidates in a full generation; doubles with every restart.
        n_evaluations: values told.
        generation: of this run, counted from 0: the updates of its distribution.
        best_x: (d,) best candidate ever told, None before there is one.
        best_y: its fitness, inf before there is one.
        bests: best fitness of this run after each of its last generations.
        initial_mean: (d,) that this run started from.
        runs: of each run before this one, its generations and where it started from.
        placing: state of the generator that draws the means of new runs.
        sampling: state of the generator that draws z.
    """

    mean: np.ndarray
    a: np.ndarray
    z: np.ndarray
    candidates: np.ndarray
    n_individuals: int
    n_evaluations: int
    generation: int
    best_x: np.ndarray | None
    best_y: float
    bests: tuple[float, ...]
    initial_mean: np.ndarray
    runs: tuple[tuple[int, np.ndarray], ...]
    placing: Mapping[str, Any]
    sampling: Mapping[str, Any]


def first_state(settings: Settings) -> State:
    """The first generation, not yet scored."""
    seeds = np.random.default_rng(settings.seed).integers(np.iinfo(np.int64).max, size=2)
    placing, sampling = (np.random.PCG64(int(seed)).state for seed in seeds)
    mean = settings.mean
    if mean is None:
        mean, placing = _place(settings, placing)
    return _drawn(
        settings,
        mean=mean,
        a=np.eye(settings.dimensions),
        n_individuals=settings.individuals,
        n_evaluations=0,
        generation=0,
        best_x=None,
        best_y=math.inf,
        bests=(),
        initial_mean=mean,
        runs=(),
        placing=placing,
        sampling=sampling,
    )


@np.errstate(over="ignore", invalid="ignore")  # it is looked at whether the update is finite
def next_state(settings: Settings, state: State, fitness: np.ndarray) -> State:
    """The state after a generation was scored.

    Args:
        settings: of the search.
        state: one that has candidates.
        fitness: (n,) float64 of the candidates; one that ends before they do ends the search.
    """
    finite = np.isfinite(fitness)
    failures = not finite.all()
    ranked = np.where(finite, fitness, math.inf) if failures else fitness
    first = int(ranked.argmin())
    lowest = float(ranked[first])
    better = lowest < state.best_y
    told = {
        "n_evaluations": state.n_evaluations + len(fitness),
        "best_x": state.candidates[first] if better else state.best_x,
        "best_y": lowest if better else state.best_y,
    }
    if (
        len(fitness) < state.n_individuals
        or told["n_evaluations"] >= settings.max_evaluations
        or told["best_y"] <= settings.threshold
    ):
        return _ended(state, told)

    bests = (*state.bests, min([lowest, *state.bests[-1:]]))[-settings.window :]
    # not (... >= ...): inf - inf, of a run without any finite fitness, is no gain either
    stagnant = len(bests) == settings.window and not bests[0] - bests[-1] >= STAGNANT
    if stagnant and settings.restarts:
        return _restarted(settings, state, told)

    n = state.n_individuals
    utility = np.empty(n)
    utility[ranked.argsort(kind="stable")] = utilities(
        n, settings.parents * (n // settings.individuals)
    )
    if failures:
        utility[~finite] = 0.0
    by_mean, by_a = natural_gradient(state.z, utility, state.a)
    mean = state.mean + settings.lr_mean * by_mean
    a = state.a + settings.lr_sigma * by_a
    if not math.isfinite(mean.sum() + a.sum()):
        return _restarted(settings, state, told) if settings.restarts else _ended(state, told)
    return _drawn(
        settings,
        mean=mean,
        a=a,
        n_individuals=n,
        generation=state.generation + 1,
        bests=bests,
        initial_mean=state.initial_mean,
        runs=state.runs,
        placing=state.placing,
        sampling=state.sampling,
        **told,
    )


def _ended(state: State, told: Mapping[str, Any]) -> State:
    """The last state: nothing is left to score."""
    return dataclasses.replace(state, z=state.z[:0], candidates=state.candidates[:0], **told)


def _restarted(settings: Settings, state: State, told: Mapping[str, Any]) -> State:
    """The first generation of a run that follows one that is over."""
    mean, placing = _place(settings, state.placing)
    return _drawn(
        settings,
        mean=mean,
        a=np.eye(settings.dimensions),
        n_individuals=2 * state.n_individuals,
        generation=0,
        bests=(),
        initial_mean=mean,
        runs=(*state.runs, (state.generation + 1, state.initial_mean)),
        placing=placing,
        sampling=state.sampling,
        **told,
    )


def _place(settings: Settings, placing: Mapping[str, Any]) -> tuple[np.ndarray, Mapping[str, Any]]:
    """A mean drawn within the boundaries, and the generator's state after it."""
    _scratch.bits.state = placing
    mean = _scratch.generator.uniform(settings.lower, settings.upper)
    return mean, _scratch.bits.state


def _drawn(
    settings: Settings,
    mean: np.ndarray,
    a: np.ndarray,
    n_individuals: int,
    n_evaluations: int,
    sampling: Mapping[str, Any],
    **rest: Any,
) -> State:
    """A state with its candidates, as many as the budget allows."""
    _scratch.bits.state = sampling
    n = min(n_individuals, settings.max_evaluations - n_evaluations)
    z = _scratch.generator.standard_normal((n, settings.dimensions))
    candidates = mean + z @ a
    for array in (mean, a, z, candidates):
        array.setflags(write=False)
    return State(
        mean=mean,
        a=a,
        z=z,
        candidates=candidates,
        n_individuals=n_individuals,
        n_evaluations=n_evaluations,
        sampling=_scratch.bits.state,
        **rest,
    )
