"""Exact Natural Evolution Strategy: a Gaussian that follows its natural gradient.

    enes = ENES(
        {"fitness_function": rosenbrock, "ndim_problem": 2,
         "lower_boundary": [-5, -5], "upper_boundary": [5, 5]},
        {"max_function_evaluations": 5000, "seed_rng": 2022, "mean": [3, 3]},
    )
    enes.optimize()["best_so_far_y"]

    state = enes.start()                            # or, evaluating elsewhere:
    while len(candidates := enes.ask(state)):
        state = enes.tell(state, [fitness(x) for x in candidates])

Yi, Wierstra, Schaul & Schmidhuber 2009, "Stochastic search using the natural gradient"; Schaul
2011, "Studies in continuous black-box optimization"; Wierstra et al. 2014, "Natural evolution
strategies". `natural` has the equations. Keys, defaults, random numbers and restarts are those of
``pypop7.optimizers.nes.enes.ENES``: the same options find the same candidates.
"""

from __future__ import annotations

import contextlib
import enum
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evokernels.errors import FitnessError, SettingsError
from evokernels.search.enes_settings import read_settings
from evokernels.search.enes_state import State, first_state, next_state

__all__ = ["ENES", "State", "Termination"]


class Termination(enum.IntEnum):
    """Why a search ended; the numbers are pypop7's."""

    MAX_FUNCTION_EVALUATIONS = 1
    MAX_RUNTIME = 2
    FITNESS_THRESHOLD = 3
    EARLY_STOPPING = 4  # the distribution has left the range of float64


class ENES:
    """Minimise a function of d real numbers, by `optimize` or by `ask` and `tell`.

    A fitness that is not finite (NaN, inf, -inf) ranks worst: it has no share in an update and is
    never the best. Of equals the earlier ranks better. Candidates may lie outside the boundaries,
    which only say where means are drawn.

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

    def start(self) -> State:
        """The first generation, not yet scored."""
        return first_state(self.settings)

    def ask(self, state: State) -> np.ndarray:
        """The candidates to evaluate, (n, d) float64, the caller's own; n = 0 when all is over."""
        return state.candidates.copy()

    def tell(self, state: State, fitness: Sequence[float] | np.ndarray) -> State:
        """The state that follows; ``fitness`` is (n,), in the order of `ask`.

        Raises:
            FitnessError: not one number for each candidate, or the search is over.
        """
        expected = len(state.candidates)
        if not expected:
            raise FitnessError("the search is over, there is nothing to tell; start() begins anew")
        return next_state(self.settings, state, _numbers(fitness, expected))

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
            state = next_state(settings, state, fitness)
            curve.append((state.n_evaluations, state.best_y))
            if settings.verbose and len(curve) % settings.verbose == 0:
                print(
                    f"generation {len(curve)}: best {state.best_y:.6g} after "
                    f"{state.n_evaluations} evaluations"
                )
        ended = time.perf_counter()
        if state.n_evaluations >= settings.max_evaluations:
            signal = Termination.MAX_FUNCTION_EVALUATIONS
        elif state.best_y <= settings.threshold:
            signal = Termination.FITNESS_THRESHOLD
        elif ended >= deadline:
            signal = Termination.MAX_RUNTIME
        else:
            signal = Termination.EARLY_STOPPING
        return {
            "termination_signal": signal,
            "runtime": ended - begun,
            "time_function_evaluations": evaluating,
            "fitness": np.array(curve).reshape(-1, 2),
            **self._found(state),
        }

    def _evaluate(self, candidates: np.ndarray, deadline: float) -> np.ndarray:
        """The fitness of candidates, or of the first of them where a limit is reached."""
        function, threshold = self.settings.fitness_function, self.settings.threshold
        if self.settings.batched:
            return _numbers(function(candidates), len(candidates))
        fitness = []
        for candidate in candidates:
            fitness.append(_number(function(candidate)))
            # a fitness of -inf has failed, as any that is not finite
            if -math.inf < fitness[-1] <= threshold or time.perf_counter() >= deadline:
                break
        return np.array(fitness)

    def _found(self, state: State) -> dict[str, Any]:
        """The results that follow from the last state alone."""
        x = None if state.best_x is None else state.best_x.copy()
        with np.errstate(divide="ignore"):  # log 0 = -inf: the distribution has shrunk to nothing
            sigma = float(np.exp(np.log(np.abs(state.a.diagonal())).mean()))
        return {
            "best_so_far_x": x,
            "best_so_far_y": state.best_y,
            "n_function_evaluations": state.n_evaluations,
            "success": x is not None
            and bool(((self.settings.lower <= x) & (x <= self.settings.upper)).all()),
            "mean": state.mean.copy(),
            "initial_mean": state.initial_mean.copy(),
            "sigma": sigma,
            "_n_restart": len(state.runs),
            "_n_generations": state.generation,
            "_list_initial_mean": [mean.copy() for _, mean in state.runs],
            "_list_generations": [generations for generations, _ in state.runs],
        }


def _number(value: Any) -> float:
    """What a fitness function returned for one candidate."""
    if getattr(value, "shape", ()) == ():
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise FitnessError(
        f"fitness_function must return one real number for a candidate, got {value!r}; one that "
        "takes all candidates at once needs the option batched"
    )


def _numbers(fitness: Any, expected: int) -> np.ndarray:
    """``expected`` float64 numbers."""
    try:
        values = np.asarray(fitness)
        real = values.dtype.kind in "biuf"  # asked for float64, numpy would make None a NaN
    except (TypeError, ValueError):
        real = False
    if not real:
        raise FitnessError(f"a fitness must be a real number, got {fitness!r}")
    if values.shape != (expected,):
        raise FitnessError(
            f"fitness of shape {values.shape} for {expected} candidates; give one number for each, "
            f"shape ({expected},)"
        )
    return values.astype(np.float64, copy=False)
