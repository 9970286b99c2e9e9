"""Terms beyond the classic catalogue: how long a first step takes, and every later one.

    python bench/own_terms.py

Writes bench/results/own_terms.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

import torch
from commandline import Bar, exit_code, markdown, positive
from contestants import FUSED, OURS, Contestant, Work, adamw, ours, state_of
from timing import NEW, measure

from evokernels import Genome, zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.render_torch import render_torch
from evokernels.terms import average, eps, exp, g, m, register, sqrt, tanh, v

ELEMENTS = ((1_000_000,),) * 16
OWN = register("THREE_MOMENTS", tanh(m / (sqrt(v) + eps)) * exp(-abs(g)) + average(g, 0.99))
# They correct no bias: torch.compile compiles anew for numbers that differ from step to step.
WIDE = {
    name: dataclasses.replace(genome, use_bias_correction=False)
    for name, genome in zoo.WIDE.items()
}
OWN_RULE = Genome([OWN], use_bias_correction=False)
RULES = {**WIDE, f"own: {OWN.formula}": OWN_RULE}
EXPORTED, COMPILED, EAGER = "exported", "exported, torch.compile", "eager backend"

# A first step in a process of its own: seconds beyond those of a rule that the package has a kernel
# or has just compiled, with everything imported, and twice, since the second one finds neither
# parameters nor plan. The words are dtype, device and backend.
FIRST_STEP = """
import sys, time, torch
from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.terms import register, g, m, tanh, average
dtype, device, backend = sys.argv[1:]
def seconds(genome):
    value = torch.ones(1000, dtype=getattr(torch, dtype), device=device)
    parameter = torch.nn.Parameter(value)
    start = time.perf_counter()
    optimizer = FusedEvolvedOptimizer([parameter], genome, backend=backend)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter[0].item()  # a GPU is waited for
    return time.perf_counter() - start
own = Genome([register("OWN", tanh(g) + average(m, 0.9))])
known = [seconds(zoo.adam) for _ in range(2)][1]
print(seconds(own) - known)
"""


def main() -> int:
    """The command; its exit code."""
    options = parse()
    return exit_code(lambda: run(options), "nothing is written before all is measured")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=positive, default=9, help="of each measurement (9)")
    results = pathlib.Path(__file__).parent / "results" / "own_terms.md"
    parser.add_argument("--out", type=pathlib.Path, default=results, help="the page (%(default)s)")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    with Bar("measurement") as bar:
        lines = [
            "# Terms beyond the classic catalogue\n",
            f"`python bench/own_terms.py`, {torch.get_num_threads()} threads, medians of "
            f"{options.passes} passes.\n",
            "The first step of a structure, in a new process, beyond that of one that is known:\n",
            *first_steps(options.passes, bar),
            "\nOne update of 16 tensors of a million elements, with new gradients in every step; "
            "in brackets: times ours. `exported` is the file of `python -m evokernels export`; "
            "AdamW has a rule of its own. None corrects its bias: torch.compile compiles anew for "
            "numbers that differ from step to step.\n",
            *later_steps(options.passes, bar),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.write_text(text, encoding="utf-8")


def first_steps(passes: int, bar: Bar) -> Iterable[str]:
    """The table of compiling, milliseconds."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        compiled, cached = [], []
        for number in range(passes):
            bar.show(number, passes, f"first steps, {dtype}")
            for found, seconds in zip((compiled, cached), first_step(dtype), strict=True):
                found.append(seconds)
        times = (f"{statistics.median(seconds) * 1e3:.1f} ms" for seconds in (compiled, cached))
        rows.append([dtype, *times])
    return markdown(["parameters", "compiled", "from disk"], rows)


def first_step(dtype: str, device: str = "cpu", backend: str = "auto") -> list[float]:
    """Seconds of one that compiles, and of one that finds what the other has left on disk."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {"EVOKERNELS_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, "-c", FIRST_STEP, dtype, device, backend]
        found = []
        for _ in range(2):
            done = subprocess.run(
                command, env={**os.environ, **kept}, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"a first step failed: {done.stderr}")
            found.append(float(done.stdout))
        return found


def later_steps(passes: int, bar: Bar) -> Iterable[str]:
    """The table of updates."""
    entrants: dict[str, Callable[[Work], Contestant]] = {
        OURS: ours,
        FUSED: functools.partial(adamw, fused=True),
        COMPILED: functools.partial(exported, compiled=True),
        EXPORTED: exported,
        EAGER: functools.partial(ours, backend="eager"),
    }
    rows = []
    for number, (name, genome) in enumerate(RULES.items()):
        bar.show(number, len(RULES), name)
        measured = measure(Work(ELEMENTS, genome), entrants, passes)
        others = [
            f"{measured.seconds(each, NEW) * 1e3:.1f} ms ({measured.ratio(each, OURS, NEW):.2f}x)"
            for each in list(entrants)[1:]
        ]
        mine = f"{measured.seconds(OURS, NEW) * 1e3:.1f} ms"
        cell = name.replace("|", "\\|")
        rows.append([cell, str(measured.traffic[OURS]), measured.backends[OURS], mine, *others])
    return markdown(["rule", "bytes an element", "backend", OURS, *list(entrants)[1:]], rows)


def exported(work: Work, compiled: bool = False) -> Contestant:
    """The optimizer that stands alone, its update through torch.compile if asked for."""
    contestant = Contestant(work, work.genome)
    namespace: dict[str, object] = {"__name__": "exported"}
    exec(render_torch(work.genome, "Exported"), namespace)
    if compiled:
        torch._dynamo.reset()
        update = namespace["_update_lists"]
        namespace["_update_lists"] = torch.compile(update, fullgraph=True)
    # in one graph for all tensors; as it comes, one tensor after the other on a CPU
    optimizer = namespace["Exported"](contestant.parameters, foreach=True if compiled else None)
    contestant.step = optimizer.step
    names = lower(work.genome).state_names.values()
    contestant.state = functools.partial(state_of, optimizer, names)
    return contestant


if __name__ == "__main__":
    sys.exit(main())
