"""Everything that only a GPU can show, in one run: tests, the microbenchmark, one evaluation.

    python bench/gpu.py                              # all of it
    python bench/gpu.py --quick                      # fewer passes and steps, to see that it works
    python bench/gpu.py --parts steps --cases 64M    # some of it

It runs the tests that need a GPU (numeric cases of both backends, graph capture and replay,
memory, exported optimizers, workers that share the GPU), then times one update side by side, device
and host apart, then first steps that have to compile, then evaluates one genome. What was found
goes to gpu_<name of the GPU>.json and .md, after every part, so that a run that breaks off leaves
what it has.

exit codes: 0 all that ran is right, 1 something is not (the report begins with it), 2 an error,
3 there is no GPU and nothing was run, 130 interrupted
"""

from __future__ import annotations

import argparse
import datetime
import functools
import pathlib
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import gpu_report
import torch
from commandline import Bar, exit_code, positive
from gpu_evaluation import PROTOCOL, SHORT, compare_evaluations
from gpu_steps import CASES, measure_case, measure_first_steps
from gpu_tests import ROOT, TESTS, run_tests
from gpu_timing import Gpu, find_gpu

from evokernels.errors import EvokernelsError
from evokernels.evolution.files import make_folder
from evokernels.tasks import get_task

__all__ = ["NO_GPU"]

NO_GPU = 3  # exit code
PARTS = ("tests", "steps", "first steps", "evaluation")
PASSES, QUICK_PASSES = 9, 3
FIRSTS, QUICK_FIRSTS = 3, 1
EVALUATIONS, QUICK_EVALUATIONS = 3, 1
PACKAGES = ("triton", "cuda-bindings", "nvidia-cuda-nvrtc", "apex", "evokernels")


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    gpu = find_gpu()
    if gpu is None:
        print(f"no GPU: {what_torch_has()}; nothing was run or written", file=sys.stderr)
        return NO_GPU
    found: list[str] = []
    hint = f"the parts that were done are in {options.out}"
    code = exit_code(lambda: found.extend(run(options, gpu)), hint)
    return code or (1 if found else 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="; ".join(PARTS)
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="CASE",
        help=f"of the microbenchmark: {'; '.join(CASES)} (all)",
    )
    parser.add_argument(
        "--passes", type=positive, metavar="N", help=f"over each case ({PASSES}; quick: 3)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_PASSES} passes, one evaluation of {SHORT.steps} steps",
    )
    parser.add_argument(
        "--task", default="fashion_mnist_mini", help="of the evaluation (fashion_mnist_mini)"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with data sets ($EVOKERNELS_DATA, else ~/.cache/evokernels/data)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "bench" / "results",
        metavar="DIR",
        help="folder for the report (bench/results)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, gpu: Gpu) -> list[str]:
    """Do the parts asked for, write after each job, print the page; returns the problems."""
    get_task(options.task)
    make_folder(options.out)
    results: dict[str, Any] = {"environment": environment(gpu), "broken": {}}
    files = gpu_report.write(results, options.out)
    jobs = jobs_of(options, gpu)
    with Bar() as bar:
        for done, (part, name, job) in enumerate(jobs):
            bar.show(done, len(jobs), name)
            try:
                results.setdefault(part, {})[name] = job()
            except EvokernelsError as error:  # says what to do
                results["broken"][name] = str(error)
            except Exception:  # whatever it is: others can be done, and a GPU is not always at hand
                results["broken"][name] = traceback.format_exc()
            gpu_report.write(results, options.out)
    print(files[-1].read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return gpu_report.problems(results)


def jobs_of(
    options: argparse.Namespace, gpu: Gpu
) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """What is to be done: of which part, what it is, and the function that does it."""
    passes = options.passes or (QUICK_PASSES if options.quick else PASSES)
    firsts = QUICK_FIRSTS if options.quick else FIRSTS
    times, conditions = (QUICK_EVALUATIONS, SHORT) if options.quick else (EVALUATIONS, PROTOCOL)
    jobs = {
        "tests": {TESTS.name: run_tests},
        "steps": {
            case: functools.partial(measure_case, case, gpu, passes) for case in options.cases
        },
        "first steps": {"own terms": functools.partial(measure_first_steps, gpu, firsts)},
        "evaluation": {
            options.task: functools.partial(
                compare_evaluations, options.task, conditions, options.data_dir, gpu.device, times
            )
        },
    }
    assert tuple(jobs) == PARTS
    return [
        (part, name, job)
        for part in PARTS
        if part in options.parts
        for name, job in jobs[part].items()
    ]


def environment(gpu: Gpu) -> dict[str, Any]:
    """What everything was measured with."""
    return {
        **gpu.describe(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
        "Python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of this folder, and whether files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def what_torch_has() -> str:
    """Why there is no device, as far as torch knows."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no CUDA device"


if __name__ == "__main__":
    sys.exit(main())
