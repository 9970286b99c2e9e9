"""The noise of tensors as backends know it, and those that run on a CPU or everywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from evokernels.kernels import native
from evokernels.kernels.memory import lies_densely
from evokernels.kernels.normal import normal
from evokernels.kernels.plan import ARITHMETIC

__all__ = ["NativeNoise", "NoisyTensor", "TensorNoise", "TorchNoise", "row_order"]

# Elements at a time in torch operations: the words behind them are 64-bit integers.
_CHUNK = 2**20


@dataclass(frozen=True)
class NoisyTensor:
    """A tensor to write, and where its noise is.

    Attributes:
        target: of a dtype in `ARITHMETIC`, no two of its elements in one place.
        position: of the tensor in its model, below 2^24 - 1.
        centre: of the target's shape, dtype and device: that to which noise is added; None for
            `estimate`.
    """

    target: torch.Tensor
    position: int
    centre: torch.Tensor | None = None


class TensorNoise(Protocol):
    """Tensors bound to a backend."""

    def __init__(self, tensors: Sequence[NoisyTensor]) -> None: ...

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a device and dtype, None if it can."""

    def perturb(self, seed: int, generation: int, member: int, scale: float) -> None:
        """As `ModelNoise` says."""

    def estimate(self, seed: int, generation: int, weights: Sequence[float]) -> None:
        """As `ModelNoise` says."""


class NativeNoise:
    """A `TensorNoise` in csrc/perturb.c: one call for all tensors."""

    def __init__(self, tensors: Sequence[NoisyTensor]) -> None:
        self._tensors = tensors  # their memory stays
        self._targets = [noisy.target for noisy in tensors]
        self._layouts = [
            None if tensor is None else _layout(tensor)
            for noisy in tensors
            for tensor in (noisy.target, noisy.centre)
        ]
        self._records = (native.NoisyRecord * len(tensors))()
        for i, (noisy, record) in enumerate(zip(tensors, self._records, strict=True)):
            record.target, record.elements = noisy.target.data_ptr(), noisy.target.numel()
            record.format, record.position = native.FORMATS[noisy.target.dtype], noisy.position
            record.centre = None if noisy.centre is None else noisy.centre.data_ptr()
            for name, layout in zip(("target", "centre"), self._layouts[2 * i :], strict=False):
                setattr(record, f"{name}_layout", layout and layout.pointer)
        self._library = native.library()

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices, or a library that does not load."""
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        return native.why_not()

    def perturb(self, seed: int, generation: int, member: int, scale: float) -> None:
        """As `ModelNoise` says; the same for every number of threads."""
        self._library.evk_perturb(
            *(self._records, len(self._records), seed, generation, member, scale),
            torch.get_num_threads(),
        )
        # autograd does not see writes through pointers
        torch.autograd.graph.increment_version(self._targets)

    def estimate(self, seed: int, generation: int, weights: Sequence[float]) -> None:
        """As `ModelNoise` says; the same for every number of threads."""
        numbers = (ctypes.c_double * len(weights))(*weights)
        self._library.evk_estimate(
            *(self._records, len(self._records), seed, generation, numbers, len(weights)),
            torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(self._targets)


class TorchNoise:
    """A `TensorNoise` in torch operations, for any device and to test the others."""

    def __init__(self, tensors: Sequence[NoisyTensor]) -> None:
        self._tensors = tensors

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        """Devices that cannot compute in float64, as sums are."""
        return "it sums in float64, which mps lacks" if device.type == "mps" else None

    @torch.no_grad()
    def perturb(self, seed: int, generation: int, member: int, scale: float) -> None:
        """As `ModelNoise` says."""
        for noisy in self._tensors:
            target, arithmetic = noisy.target, ARITHMETIC[noisy.target.dtype]
            noise = [
                normal(seed, generation, member, noisy.position, first, n, target.device)
                for first, n in _chunks(target)
            ]
            added = torch.cat(noise).view(target.shape).to(arithmetic) * scale
            target.copy_(noisy.centre.to(arithmetic) + added)

    @torch.no_grad()
    def estimate(self, seed: int, generation: int, weights: Sequence[float]) -> None:
        """As `ModelNoise` says."""
        for noisy in self._tensors:
            target, device = noisy.target, noisy.target.device
            sums = []
            for first, n in _chunks(target):
                sums.append(torch.zeros(n, dtype=torch.float64, device=device))
                for member, weight in enumerate(weights):
                    if weight:
                        at = (seed, generation, member, noisy.position, first, n, device)
                        sums[-1] += normal(*at).double() * weight
            target.copy_(torch.cat(sums).to(ARITHMETIC[target.dtype]).view(target.shape))


def row_order(tensor: torch.Tensor) -> list[int] | None:
    """The dimensions row by row, as elements count; None where they lie one after another so."""
    order = [d for d, size in enumerate(tensor.shape) if size != 1]
    return None if lies_densely(tensor, order) else order


def _layout(tensor: torch.Tensor) -> native.LayoutTable | None:
    if tensor.is_contiguous():
        return None
    order = row_order(tensor)
    return None if order is None else native.LayoutTable(tensor, order)


def _chunks(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """First element and length of each chunk; one of length 0 where there are none."""
    count = tensor.numel()
    return [(first, min(_CHUNK, count - first)) for first in range(0, max(count, 1), _CHUNK)]
