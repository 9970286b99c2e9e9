"""Which backend runs what: asked for by name it runs or says why not; "auto" tells its choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evokernels.compiler.program import Program
from evokernels.errors import BackendError
from evokernels.kernels.cpu import CpuBackend
from evokernels.kernels.cuda import CudaBackend
from evokernels.kernels.device import DeviceBackend
from evokernels.kernels.eager import EagerBackend
from evokernels.kernels.plan import Backend
from evokernels.kernels.triton import TritonBackend

__all__ = ["BACKENDS", "Selection", "select"]

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
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(
            f"unknown backend {backend!r}; use 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    rejected = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = BACKENDS[name].why_not(program, device, dtype)
        if reason is None:
            return Selection(BACKENDS[name], rejected)
        rejected[name] = reason
    raise BackendError("; ".join(f"backend {name!r}: {why}" for name, why in rejected.items()))
