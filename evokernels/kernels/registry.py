"""Which backend runs what: asked for by name it runs or says why not; "auto" tells its choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from evokernels.compiler.program import Program
from evokernels.errors import BackendError
from evokernels.kernels.cpu import CpuBackend
from evokernels.kernels.cuda import CudaBackend
from evokernels.kernels.device import DeviceBackend
from evokernels.kernels.eager import EagerBackend
from evokernels.kernels.plan import Backend
from evokernels.kernels.triton import TritonBackend

__all__ = ["BACKENDS", "Selection", "choose", "select"]

T = TypeVar("T")

# In the order in which "auto" tries them.
BACKENDS: dict[str, Backend | DeviceBackend] = {
    backend.name: backend
    for backend in (CpuBackend(), CudaBackend(), TritonBackend(), EagerBackend())
}


@dataclass(frozen=True)
class Selection:
    """The backend chosen, and the reasons of those that were tried before it."""

    backend: Backend | DeviceBackend
    rejected: dict[str, str]


def select(
    program: Program, device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> Selection:
    """The backend for a program, device and parameter dtype.

    Args:
        backend: a name in `BACKENDS`, or "auto" for the first that can.

    Raises:
        BackendError: unknown name, or the backend asked for cannot run there, with its reason.
    """
    chosen, rejected = choose(BACKENDS, lambda b: b.why_not(program, device, dtype), backend)
    return Selection(chosen, rejected)


def choose(
    backends: Mapping[str, T], why_not: Callable[[T], str | None], backend: str
) -> tuple[T, dict[str, str]]:
    """The backend asked for, or for "auto" the first without a reason against it.

    Args:
        why_not: the reason why one cannot run, None if it can.

    Returns:
        The backend, and the reasons of those that were tried before it.

    Raises:
        BackendError: as `select` says.
    """
    if backend != "auto" and backend not in backends:
        raise BackendError(
            f"unknown backend {backend!r}; use 'auto', {', '.join(map(repr, backends))}"
        )
    rejected = {}
    for name in backends if backend == "auto" else (backend,):
        reason = why_not(backends[name])
        if reason is None:
            return backends[name], rejected
        rejected[name] = reason
    raise BackendError("; ".join(f"backend {name!r}: {why}" for name, why in rejected.items()))
