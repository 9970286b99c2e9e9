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
from timing import WALL, Measured, take_turns

from evokernels.errors import BackendError

__all__ = ["CASES", "OURS", "measure_case"]

# The backends of ours, and what they are called in tables.
OURS = {"cuda": "ours, CUDA", "triton": "ours, Triton"}
FOREACH = "AdamW(foreach=True)"
APEX = "apex FusedAdam"

CASES = {
    **{name: HOST_CASES[name].work for name in ("SmallCNN", "CIFAR net", "MLP of 100K")},
    "1,000 x 64": Work(((64,),) * 1000),
    **{name: HOST_CASES[name].work for name in ("ResNet-18 of 12.5M", "64M")},
    "64M bfloat16, float32 state": Work(ONE_64M, dtype=torch.bfloat16),
    "64M bfloat16, bfloat16 state": Work(ONE_64M, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
}
# Who does not take part, and why.
LEFT_OUT = {("1,000 x 64", COMPILED): "it compiles 1,000 tensors for minutes"}


def contestants() -> dict[str, Callable[[Work], Contestant]]:
    """All of them, ours first."""
    return {
        **{name: functools.partial(ours, backend=backend) for backend, name in OURS.items()},
        FUSED: functools.partial(adamw, fused=True),
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


def _enter_all(
    name: str, work: Work
) -> tuple[dict[str, Contestant], dict[str, str], dict[str, str]]:
    """Those whose first step was right, the reasons of those that are not here, and failures."""
    entrants, absent, failed = {}, {}, {}
    for contestant, make in contestants().items():
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
