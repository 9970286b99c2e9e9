"""What pypop7's ENES does, run as a black box and recorded: `CASES` and `trace`, of theirs or ours.

    pip install --no-deps pypop7==0.0.82 && pip install scipy numba
    python bench/pypop7_runs.py               # writes pypop7_runs.npz beside this file

pypop7 asks for many more packages than its ENES imports, hence no dependencies.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["CASES", "DOCUMENTED", "case", "recorded", "rosenbrock", "trace"]

Case = tuple[dict[str, Any], dict[str, Any]]  # problem and options

FILE = pathlib.Path(__file__).with_suffix(".npz")
DOCUMENTED = "documented example"
PERIOD = 100  # candidates from the start of one kept group to that of the next


def rosenbrock(x: np.ndarray) -> Any:
    """The function of the source's example; of one candidate, or of one in each row."""
    x = x.T
    return 100 * np.square(x[1:] - np.square(x[:-1])).sum(0) + np.square(x[:-1] - 1).sum(0)


def valley(x: np.ndarray) -> Any:
    """A sum of squares with weights from 1 to 100."""
    return np.square(x) @ np.logspace(0, 2, x.shape[-1])


def plain(x: np.ndarray) -> Any:
    """No gain that counts; flat would leave the order of equals to the sort."""
    return 1e-16 * valley(x)


def case(fitness: Callable[[np.ndarray], Any], d: int, evaluations: int, **options: Any) -> Case:
    """A problem and its options, as both implementations take them."""
    problem = {
        "fitness_function": fitness,
        "ndim_problem": d,
        "lower_boundary": np.full(d, -5.0),
        "upper_boundary": np.full(d, 5.0),
    }
    options = {"max_function_evaluations": evaluations, "seed_rng": 2022, "verbose": 0, **options}
    return problem, options


CASES = {
    DOCUMENTED: case(rosenbrock, 2, 5000, mean=3 * np.ones(2)),
    "mean drawn, d = 2": case(valley, 2, 3000, seed_rng=1),
    "mean drawn, d = 5": case(rosenbrock, 5, 3000),
    "mean drawn, d = 12": case(rosenbrock, 12, 3000, seed_rng=7),
    "small steps": case(valley, 5, 2500, lr_mean=0.5, lr_sigma=0.2, n_individuals=50),
    "odd population": case(rosenbrock, 5, 1000, n_individuals=33),
    "nowhere a gain": case(plain, 3, 9000, n_individuals=20),
    "without restarts": case(plain, 3, 2000, n_individuals=20, is_restart=False),
    "down to a threshold": case(valley, 2, 5000, fitness_threshold=0.01),
    "within one generation": case(rosenbrock, 5, 40),
}


def trace(enes: type, name: str) -> dict[str, np.ndarray]:
    """A run of a case: candidates that were evaluated, and what came of them, all as arrays.

    In every period of evaluations the first d + 1 candidates are kept: what they were drawn from
    is known from them, where that of the other implementation is.
    """
    problem, options = CASES[name]
    kept, count = [], 0

    def fitness(x: np.ndarray) -> Any:
        nonlocal count
        if count % PERIOD <= problem["ndim_problem"]:
            kept.append(x.copy())
        count += 1
        return problem["fitness_function"](x)

    # copies: pypop7 adds to its options
    results = enes({**problem, "fitness_function": fitness}, {**options}).optimize()
    names = ("best_so_far_x", "best_so_far_y", "n_function_evaluations", "success", "mean")
    names += ("initial_mean", "_n_restart", "_n_generations", "_list_generations")
    return {
        "candidates": np.array(kept),
        "termination_signal": np.array(int(results["termination_signal"])),
        **{name: np.array(results[name], dtype=np.float64) for name in names},
    }


def recorded(name: str) -> dict[str, np.ndarray]:
    """What pypop7 did when it was recorded."""
    with np.load(FILE) as file:
        return {key.partition("/")[2]: file[key] for key in file if key.startswith(f"{name}/")}


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # none but --help

    from pypop7.optimizers.nes.enes import ENES

    runs = {f"{name}/{key}": v for name in CASES for key, v in trace(ENES, name).items()}
    np.savez_compressed(FILE, **runs)
    print(f"{FILE}: {math.ceil(FILE.stat().st_size / 1024)} KiB, {len(CASES)} runs")
