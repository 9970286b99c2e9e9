"""Exact Natural Evolution Strategy: a Gaussian search distribution that follows its natural gradient.

    enes = ENES(
        {"fitness_function": rosenbrock, "ndim_problem": 2,
         "lower_boundary": [-5, -5], "upper_boundary": [5, 5]},
        {"max_function_evaluations": 5000, "seed_rng": 2022, "mean": [3, 3]},
    )
    enes.optimize()["best_so_far_y"]

    state = enes.start()                            # or, evaluating elsewhere:
    while len(candidates := enes.ask(state)):
        state = enes.tell(state, [fitness(x) for x in candidates])

Yi, Wierstra, Schaul & Schmidhuber 2009, "Stochastic search using the natural gradient"; Schaul 2011,
"Studies in continuous black-box optimization"; Wierstra et al. 2014, "Natural evolution
strategies". `natural` has the equations. Keys, defaults, random numbers and restarts are those of
``pypop7.optimizers.nes.enes.ENES``: the same options find the same candidates.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evokernels.errors import FitnessError, SettingsError
from evokernels.search.enes_settings import read_settings
from evokernels.search.natural import natural_gradient, utilities

__all__ = ["ENES", "State", "Termination"]

STAGNANT = 1e-12  # a run that gains less than this in a window of generations is over


class Termination(enum.IntEnum):
    """Why a search ended; the numbers are pypop7's."""

    MAX_FUNCTION_EVALUATIONS = 1
    MAX_RUNTIME = 2
    FITNESS_THRESHOLD = 3
    EARLY_STOPPING = 4  # the distribution has left the range of float64


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


class ENES:
    """Minimise a function of d real numbers, by `optimize` or by `ask` and `tell`.

    A fitness that is not finite (NaN, inf, -inf) ranks worst: it has no share in an update and is
    never the best. Candidates may lie outside the boundaries, which only say where means are drawn.

    Args:
        problem: with the keys

            - ``fitness_function``: takes a (d,) float64 array and returns a number to be minimised;
              only `optimize` needs it;
            - ``ndim_problem``: d, at least 1;
            - ``lower_boundary``, ``upper_boundary``: (d,), finite.
        options: with the keys

            - ``seed_rng``: whole number from 0; must be given;
            - ``max_function_evaluations``: the budget, default inf. The candidates of a last,
              partial generation are evaluated, but do not change the distribution; so a budget
              below ``n_individuals`` is a random search around the first mean;
            - ``max_runtime``: seconds, default inf; looked at by `optimize` alone;
            - ``fitness_threshold``: a fitness that ends the search, default -inf;
            - ``n_individuals``: n, candidates in a generation, at least 3, default 100;
            - ``n_parents``: how many of the best have a share in an update, the last one's being 0;
              2 to n, default n / 2. (pypop7 documents this option, and does not use it.)
            - ``mean``: (d,) to start from, within the boundaries; drawn between them by default;
            - ``lr_mean``, ``lr_sigma``: learning rates of the mean and of A, above 0, default 1;
            - ``is_restart``: whether a run whose best fitness gained less than 1e-12 over
              10 + ⌈30 d / n⌉ generations is followed by one with twice as many individuals from
              a new mean, default True;
            - ``batched``: the fitness function takes (n, d) and returns (n,), default False. Time
              and threshold are then looked at after a whole generation, else after each candidate;
            - ``verbose``: `optimize` prints a line every so many generations, default 0: none.

    Raises:
        SettingsError: naming the key, the value given and the values allowed.
    """

    def __init__(self, problem: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.settings = read_settings(problem, options)
        d, n = self.settings.dimensions, self.settings.individuals
        self._window = 10 + math.ceil(30 * d / n)

    def start(self) -> State:
        """The first generation, not yet scored."""
        seeds = np.random.default_rng(self.settings.seed).integers(np.iinfo(np.int64).max, size=2)
        placing, sampling = (np.random.PCG64(int(seed)).state for seed in seeds)
        mean = self.settings.mean
        if mean is None:
            mean, placing = self._place(placing)
        return self._state(
            mean=mean,
            a=np.eye(self.settings.dimensions),
            n_individuals=self.settings.individuals,
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

    def ask(self, state: State) -> np.ndarray:
        """The candidates to evaluate, (n, d) float64, the caller's own; n = 0 when all is over."""
        return state.candidates.copy()

    def tell(self, state: State, fitness: Sequence[float] | np.ndarray) -> State:
        """The state that follows; ``fitness`` is (n,), in the order of `ask`.

        Raises:
            FitnessError: not one number for each candidate, or the search is over.
        """
        return self._tell(state, _numbers(fitness, len(state.candidates)))

    def optimize(self) -> dict[str, Any]:
        """Search until a limit is reached.

        Returns:
            the keys of the source: ``best_so_far_x`` (d,) and ``best_so_far_y``;
            ``n_function_evaluations``; ``runtime`` and ``time_function_evaluations``, seconds;
            ``termination_signal``, a `Termination`; ``fitness``, (generations, 2): evaluations and
            the best fitness after them; ``success``: the best is finite and within the boundaries;
            ``mean`` (d,) and ``sigma``, |det A|^(1/d), of the last distribution; ``initial_mean``,
            ``_n_generations`` of the last run, ``_list_initial_mean``, ``_list_generations`` of the
            runs before; ``_n_restart``.

        Raises:
            SettingsError: there is no fitness function, or nothing that could end the search.
            FitnessError: the fitness function returned something else than it should.
        """
        settings = self.settings
        if settings.fitness_function is None:
            raise SettingsError("optimize() needs a fitness_function; give one, or ask and tell")
        limits = (settings.max_evaluations, settings.max_runtime, -settings.threshold)
        if min(limits) == math.inf:
            raise SettingsError(
                "nothing would end the search; set max_function_evaluations, max_runtime or "
                "fitness_threshold"
            )
        begun = time.perf_counter()
        deadline = begun + settings.max_runtime
        evaluating, curve = 0.0, []
        state = self.start()
        while len(state.candidates) and time.perf_counter() < deadline:
            before = time.perf_counter()
            fitness = self._evaluate(self.ask(state), deadline)
            evaluating += time.perf_counter() - before
            state = self._tell(state, fitness)
            curve.append((state.n_evaluations, state.best_y))
            if settings.verbose and len(curve) % settings.verbose == 0:
                print(
                    f"generation {len(curve)}: best {state.best_y:.6g} after "
                    f"{state.n_evaluations} evaluations, this time {fitness.min():.6g}"
                )
        return {
            **self._results(state),
            "runtime": time.perf_counter() - begun,
            "time_function_evaluations": evaluating,
            "fitness": np.array(curve),
        }

    def _evaluate(self, candidates: np.ndarray, deadline: float) -> np.ndarray:
        """The fitness of candidates, or of the first of them where a limit is reached."""
        function, threshold = self.settings.fitness_function, self.settings.threshold
        if self.settings.batched:
            return _numbers(function(candidates), len(candidates))
        fitness = []
        for candidate in candidates:
            fitness.append(function(candidate))
            if fitness[-1] <= threshold or time.perf_counter() >= deadline:
                break
        return _numbers(fitness, len(fitness))

    def _tell(self, state: State, fitness: np.ndarray) -> State:
        """As `tell`; ``fitness`` may end before the candidates do, which ends the search."""
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
        if len(fitness) < state.n_individuals or self._over(**told):
            return dataclasses.replace(
                state, z=state.z[:0], candidates=state.candidates[:0], **told
            )

        bests = (*state.bests, min([lowest, *state.bests[-1:]]))[-self._window :]
        # written so that inf - inf, a run without any finite fitness, is stagnant too
        stagnant = len(bests) == self._window and not bests[0] - bests[-1] >= STAGNANT
        if stagnant and self.settings.restarts:
            return self._restarted(state, **told)
        n = state.n_individuals
        utility = np.empty(n)
        utility[ranked.argsort(kind="stable")] = utilities(
            n, self.settings.parents * n / self.settings.individuals
        )
        if failures:
            utility[~finite] = 0.0
        by_mean, by_a = natural_gradient(state.z, utility, state.a)
        return self._state(
            mean=state.mean + self.settings.lr_mean * by_mean,
            a=state.a + self.settings.lr_sigma * by_a,
            n_individuals=n,
            generation=state.generation + 1,
            bests=bests,
            initial_mean=state.initial_mean,
            runs=state.runs,
            placing=state.placing,
            sampling=state.sampling,
            **told,
        )

    def _restarted(self, state: State, **told: Any) -> State:
        """The first generation of a run that follows a stagnant one."""
        mean, placing = self._place(state.placing)
        return self._state(
            mean=mean,
            a=np.eye(self.settings.dimensions),
            n_individuals=2 * state.n_individuals,
            generation=0,
            bests=(),
            initial_mean=mean,
            runs=(*state.runs, (state.generation + 1, state.initial_mean)),
            placing=placing,
            sampling=state.sampling,
            **told,
        )

    def _place(self, placing: Mapping[str, Any]) -> tuple[np.ndarray, Mapping[str, Any]]:
        """A mean drawn within the boundaries, and the generator's state after it."""
        generator = _generator(placing)
        mean = generator.uniform(self.settings.lower, self.settings.upper)
        return mean, generator.bit_generator.state

    def _state(
        self,
        mean: np.ndarray,
        a: np.ndarray,
        n_individuals: int,
        n_evaluations: int,
        sampling: Mapping[str, Any],
        **rest: Any,
    ) -> State:
        """A state whose candidates have been drawn."""
        generator = _generator(sampling)
        n = min(n_individuals, self.settings.max_evaluations - n_evaluations)
        z = generator.standard_normal((n, self.settings.dimensions))
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
            sampling=generator.bit_generator.state,
            **rest,
        )

    def _over(self, n_evaluations: int, best_y: float, **_: Any) -> bool:
        settings = self.settings
        return n_evaluations >= settings.max_evaluations or best_y <= settings.threshold

    def _results(self, state: State) -> dict[str, Any]:
        """What `optimize` returns, but for the clock's."""
        settings = self.settings
        if state.n_evaluations >= settings.max_evaluations:
            signal = Termination.MAX_FUNCTION_EVALUATIONS
        elif state.best_y <= settings.threshold:
            signal = Termination.FITNESS_THRESHOLD
        else:
            signal = Termination.MAX_RUNTIME
        inside = state.best_x is not None and bool(
            ((settings.lower <= state.best_x) & (state.best_x <= settings.upper)).all()
        )
        return {
            "best_so_far_x": state.best_x,
            "best_so_far_y": state.best_y,
            "n_function_evaluations": state.n_evaluations,
            "termination_signal": signal,
            "success": inside,
            "mean": state.mean,
            "initial_mean": state.initial_mean,
            "sigma": math.exp(np.log(np.abs(state.a.diagonal())).mean()),
            "_n_restart": len(state.runs),
            "_n_generations": state.generation,
            "_list_initial_mean": [mean for _, mean in state.runs],
            "_list_generations": [generations for generations, _ in state.runs],
        }


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on from a state."""
    bits = np.random.PCG64(0)
    bits.state = state
    return np.random.Generator(bits)


def _numbers(fitness: Any, expected: int) -> np.ndarray:
    """``expected`` float64 numbers."""
    if not expected:
        raise FitnessError("the search is over, there is nothing to tell; start() begins another")
    try:
        values = np.asarray(fitness, dtype=np.float64)
    except (TypeError, ValueError):
        raise FitnessError(f"a fitness must be a real number, got {fitness!r}") from None
    if values.shape != (expected,):
        raise FitnessError(
            f"fitness of shape {values.shape} for {expected} candidates; give one number for each, "
            f"shape ({expected},)"
        )
    return values
