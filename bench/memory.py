"""Peak memory of a step beside parameters and gradients: the state it keeps, what it borrows.

Every contestant runs in a process of its own, in which memory that is given back leaves the process
at once, so that the highest mark of a step is what the step needed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from commandline import exit_code, markdown
from contestants import COMPILED, FUSED, OURS, Contestant, Work, adamw, compiled, ours
from microbench import CASES

CONTESTANTS: dict[str, Callable[[Work], Contestant]] = {
    OURS: ours,
    FUSED: functools.partial(adamw, fused=True),
    "AdamW(foreach=True)": functools.partial(adamw, foreach=True),
    "AdamW(foreach=False)": functools.partial(adamw, foreach=False),
    COMPILED: compiled,
}
WORKS = {
    "64M in 4 tensors": Work(((16_000_000,),) * 4),
    "ResNet-18 of 12.5M": CASES["ResNet-18 of 12.5M"].work,
}
# what is freed does not wait in the process for its next use: from 64 KiB on, it is mapped alone
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "no table is printed before all is measured")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """A table for each work; or, in the process of one contestant, its numbers."""
    if options.one:
        print(json.dumps(step_memory(CONTESTANTS[options.one], WORKS[options.works[0]])))
        return
    head = ["bytes an element", "state", "more in the first step", "more in later steps"]
    for work in options.works:
        rows = []
        for name in CONTESTANTS:
            state, first, later = in_own_process(name, work)
            # compiling takes memory of its own, which has nothing to do with the tensors
            shown = "compiles" if name == COMPILED else f"{first:.2f}"
            rows.append([name, f"{state:.2f}", shown, f"{later:.2f}"])
        print("\n".join([work, "", *markdown(head, rows), ""]))


def in_own_process(contestant: str, work: str) -> list[float]:
    """What `step_memory` says there."""
    command = [sys.executable, __file__, "--works", work, "--one", contestant]
    done = subprocess.run(
        command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def step_memory(make: Callable[[Work], Contestant], work: Work) -> tuple[float, float, float]:
    """Bytes an element: state, and what the first step and later ones borrow beyond it."""
    make(replace(work, shapes=((64,),))).step()  # what is loaded once is not counted
    contestant = make(work)
    first = risen(contestant.step)
    for _ in range(2):  # torch.compile: once more, for a learning rate that changes
        contestant.step()
    later = max(risen(contestant.step) for _ in range(3))
    state = sum(tensor.nbytes for tensor in contestant.state())
    return state / work.elements, (first - state) / work.elements, later / work.elements


def risen(step: Callable[[], object]) -> int:
    """The most bytes that a step had at once beyond those before it."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def memory(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    for line in pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value.split()[0]) * 1024
    raise LookupError(f"Linux does not say {which}")


if __name__ == "__main__":
    sys.exit(main())
