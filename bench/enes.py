"""ENES, ours and pypop7's: seconds of a whole search on Rosenbrock's function, side by side.

    python bench/enes.py                              # d = 2 to 400; a pass takes about a minute
    python bench/enes.py --dimensions 2 10 --passes 9

pypop7 is no dependency: ``pip install --no-deps pypop7==0.0.82 && pip install scipy numba``. Both
search with the same options and random numbers, and must find the same before their times count;
ours once with all candidates of a generation in one call of the fitness function, and once with a
call for each, as pypop7 has it. The searches take turns, pass by pass. Writes enes.md and
enes.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from commandline import Bar, exit_code, markdown, positive
from pypop7_runs import case, rosenbrock

from evokernels.errors import BackendError
from evokernels.evolution.files import make_folder, write_atomically
from evokernels.evolution.machine import processor
from evokernels.search import ENES

PYPOP7, BATCHED, SINGLE = "pypop7", "ours, batched", "ours, one by one"
TARGETS = {2: 20.0, 10: 10.0, 30: 10.0, 60: 10.0, 100: 7.0, 400: 7.0}  # of ours, batched
SHARE = 0.2  # seconds that a searcher repeats its search for in a pass
SAME = 1e-6  # relative difference of the best fitness; rounding grows over the generations

Times = dict[str, float]  # seconds by searcher


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "nothing was written")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dimensions",
        type=positive,
        nargs="+",
        default=list(TARGETS),
        choices=list(TARGETS),
        metavar="D",
        help=f"of {', '.join(map(str, TARGETS))} (all)",
    )
    parser.add_argument("--passes", type=positive, default=5, help="passes (5)")
    parser.add_argument(
        "--evaluations", type=positive, default=5000, metavar="N", help="of a search (5000)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("bench/results"),
        metavar="DIR",
        help="folder for enes.md and enes.json (bench/results)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    make_folder(options.out)
    results = measure(options, searchers())
    text = "\n".join(page(results)) + "\n"
    write_atomically(options.out / "enes.json", json.dumps(results, indent=1).encode())
    write_atomically(options.out / "enes.md", text.encode())
    print(text)


def searchers() -> dict[str, tuple[type, dict[str, Any]]]:
    """Who takes part, with the options that are theirs alone."""
    try:
        theirs = importlib.import_module("pypop7.optimizers.nes.enes").ENES
    except ImportError as error:
        raise BackendError(
            f"pypop7 cannot be imported ({error}); install it as the first lines of this script say"
        ) from None
    return {PYPOP7: (theirs, {}), BATCHED: (ENES, {"batched": True}), SINGLE: (ENES, {})}


def measure(
    options: argparse.Namespace, entrants: Mapping[str, tuple[type, dict[str, Any]]]
) -> dict[str, Any]:
    """Everything that `page` tells."""
    passes: list[dict[int, Times]] = []
    with Bar() as bar:
        for number in range(options.passes):
            passes.append({})
            for at, d in enumerate(options.dimensions):
                done = number * len(options.dimensions) + at
                bar.show(done, options.passes * len(options.dimensions), f"d = {d}")
                passes[-1][d] = one_pass(entrants, d, options.evaluations)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "processor": processor(),
        "blas threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            PYPOP7: importlib.metadata.version("pypop7"),
        },
        "evaluations": options.evaluations,
        "passes": passes,
    }


def one_pass(
    entrants: Mapping[str, tuple[type, dict[str, Any]]], d: int, evaluations: int
) -> Times:
    """Everybody in turn: the median over as many searches as make a share of the pass.

    Raises:
        BackendError: they did not find the same, so that their times mean nothing.
    """
    taken: Times = {}
    found: dict[str, float] = {}
    for name, (enes, own) in entrants.items():
        times: list[float] = []
        while sum(times) < SHARE:
            problem, options = case(rosenbrock, d, evaluations, **own)
            start = time.perf_counter()
            results = enes(problem, options).optimize()
            times.append(time.perf_counter() - start)
        taken[name] = statistics.median(times)
        found[name] = float(results["best_so_far_y"])
        if not math.isclose(found[name], found[PYPOP7], rel_tol=SAME):
            raise BackendError(
                f"d = {d}: {name} found {found[name]!r}, {PYPOP7} {found[PYPOP7]!r}; there is "
                "nothing to compare before they find the same"
            )
    return taken


def page(results: dict[str, Any]) -> Iterable[str]:
    """enes.md."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield from (
        "# ENES: pypop7's and ours",
        "",
        f"`{results['command']}` on {results['processor']}, BLAS threads: "
        f"{results['blas threads']}, {versions}.",
        "",
        f"Seconds of a search of {results['evaluations']} evaluations, 100 in a generation: best "
        f"and median of {len(results['passes'])} passes. How many times faster ours is: the ratio "
        "of the best, and the median of the ratios within a pass.",
        "",
    )
    head = ["d", PYPOP7, BATCHED, "times faster", "target", "met", SINGLE, "times faster"]
    yield from markdown(head, [row(results["passes"], d) for d in results["passes"][0]])


def row(passes: Sequence[Mapping[int, Times]], d: int) -> list[str]:
    """One dimension."""
    met = faster(passes, d, BATCHED)[1] >= TARGETS[d]
    return [
        str(d),
        *(seconds(passes, d, name) for name in (PYPOP7, BATCHED)),
        "{:.1f}, {:.1f}".format(*faster(passes, d, BATCHED)),
        f"{TARGETS[d]:.0f}",
        "yes" if met else "NO",
        seconds(passes, d, SINGLE),
        "{:.1f}, {:.1f}".format(*faster(passes, d, SINGLE)),
    ]


def seconds(passes: Sequence[Mapping[int, Times]], d: int, name: str) -> str:
    """Best and median."""
    times = [measured[d][name] for measured in passes]
    return f"{min(times):.4g}, {statistics.median(times):.4g}"


def faster(passes: Sequence[Mapping[int, Times]], d: int, name: str) -> tuple[float, float]:
    """How many times longer pypop7 takes: of the best times, and the median over the passes."""
    theirs, ours = ([measured[d][who] for measured in passes] for who in (PYPOP7, name))
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return min(theirs) / min(ours), statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
