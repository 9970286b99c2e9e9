"""The microbenchmark on a GPU: one update, by ours and by others, taking turns.

What is measured is data that JSON can hold; `gpu_report.py` makes tables of it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from contestants import (
    COMPILED,
    FUSED,
    SOURCE,
    Contestant,
    Work,
    adamw,
    apex_adam,
    compiled,
    enter,
    ours,
    source_eager,
)
from gpu_timing import DEVICE, HOST, DeviceStopwatch, Gpu
from microbench import CASES as HOST_CASES
from microbench import ONE_64M
from own_terms import COMPILED as EXPORTED_COMPILED
from own_terms import ELEMENTS, EXPORTED, OWN_RULE, WIDE, exported, first_step
from timing import WALL, Measured, take_turns

from evokernels.compiler.lower import lower
from evokernels.errors import BackendError
from evokernels.kernels.registry import select

__all__ = ["CASES", "OURS", "OWN_CASES", "measure_case", "measure_first_steps"]

# The backends of ours, and what they are called in tables.
OURS = {"cuda": "ours, CUDA", "triton": "ours, Triton"}
FOREACH = "AdamW(foreach=True)"
APEX = "apex FusedAdam"

# Rules of terms beyond the classic catalogue; the last is a user's own.
OWN_CASES = {
    **{f"16M, {name}": Work(ELEMENTS, genome) for name, genome in WIDE.items()},
    "16M, three moments, exp and tanh": Work(ELEMENTS, OWN_RULE),
}
CASES = {
    **{name: HOST_CASES[name].work for name in ("SmallCNN", "CIFAR net", "MLP of 100K")},
    "1,000 x 64": Work(((64,),) * 1000),
    **{name: HOST_CASES[name].work for name in ("ResNet-18 of 12.5M", "64M")},
    "64M bfloat16, float32 state": Work(ONE_64M, dtype=torch.bfloat16),
    "64M bfloat16, bfloat16 state": Work(ONE_64M, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    **OWN_CASES,
}
# Who does not take part, and why.
LEFT_OUT = {("1,000 x 64", COMPILED): "it compiles 1,000 tensors for minutes"}


def contestants(case: str) -> dict[str, Callable[[Work], Contestant]]:
    """Those of a case, ours first: the source system has no terms beyond the classic ones."""
    everywhere = {
        **{name: functools.partial(ours, backend=backend) for backend, name in OURS.items()},
        FUSED: functools.partial(adamw, fused=True),
    }
    if case in OWN_CASES:
        return {
            **everywhere,
            EXPORTED_COMPILED: functools.partial(exported, compiled=True),
            EXPORTED: exported,
        }
    return {
        **everywhere,
        FOREACH: functools.partial(adamw, foreach=True),
        COMPILED: compiled,
        APEX: apex_adam,
        SOURCE: source_eager,
    }


def measure_case(name: str, gpu: Gpu, passes: int) -> dict[str, Any]:
    """What was measured of a case: a row for each contestant, and who has none for what reason."""
    work = replace(CASES[name], device=gpu.device)
    entrants, absent, failed = _enter_all(name, work)
    measured = take_turns(work, entrants, passes, DeviceStopwatch(gpu))
    copy = 2 * torch.float32.itemsize * gpu.copied / measured.seconds(WALL, DEVICE)
    return {
        "elements": work.elements,
        "tensors": len(work.shapes),
        "copy, bytes a second": copy,
        "contestants": [_row(entrant, work, measured, copy) for entrant in entrants],
        "absent": absent,
        "failed": failed,
        "passes of the copy": measured.passes[WALL][DEVICE],
        "afterwards": gpu.clocks(),
    }


def measure_first_steps(gpu: Gpu, passes: int) -> dict[str, Any]:
    """Seconds of first steps of a rule of own terms, by backend; who has none for what reason."""
    found, absent = {}, {}
    for backend, name in OURS.items():
        try:
            select(lower(OWN_RULE).program, gpu.device, torch.float32, backend)
        except BackendError as reason:
            absent[name] = str(reason)
            continue
        times = [first_step("float32", str(gpu.device), backend) for _ in range(passes)]
        compiled_in, read_in = map(statistics.median, zip(*times, strict=True))
        found[name] = {"compiled": compiled_in, "from disk": read_in}
    return {"seconds": found, "absent": absent}


def _enter_all(
    name: str, work: Work
) -> tuple[dict[str, Contestant], dict[str, str], dict[str, str]]:
    """Those whose first step was right, the reasons of those that are not here, and failures."""
    entrants, absent, failed = {}, {}, {}
    for contestant, make in contestants(name).items():
        if (name, contestant) in LEFT_OUT:
            absent[contestant] = LEFT_OUT[name, contestant]
            continue
        try:
            entrants[contestant] = enter(make, work)
        except (ImportError, BackendError) as reason:
            absent[contestant] = str(reason)
        except Exception as error:  # whatever it is, the others can be measured
            failed[contestant] = f"{type(error).__name__}: {error}"
    return entrants, absent, failed


def _row(name: str, work: Work, measured: Measured, copy: float) -> dict[str, Any]:
    """One contestant: seconds on device and host; the speed of its bytes, if they are known."""
    device, traffic = measured.seconds(name, DEVICE), measured.traffic[name]
    speed = traffic * work.elements / device if traffic else None
    first = next(iter(measured.passes))
    return {
        "contestant": name,
        "backend": measured.backends[name],
        "device, seconds": device,
        "host, seconds": measured.seconds(name, HOST),
        "spread": _spread(measured.passes[name][DEVICE]),
        "times the first": measured.ratio(name, first, DEVICE),
        "bytes an element": traffic,
        "bytes a second": speed,
        "of the copy": speed and speed / copy,
        "passes": measured.passes[name],
    }


def _spread(passes: list[float]) -> float:
    """How far the passes lie apart, as a share of their median."""
    return (max(passes) - min(passes)) / statistics.median(passes)
