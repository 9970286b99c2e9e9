"""Noise on a GPU: one launch of csrc/noise.cuh for all tensors of a device; nothing comes back."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from evokernels.compiler.render_cuda import THREADS
from evokernels.compiler.words import DENSE
from evokernels.kernels import cuda, native
from evokernels.kernels.cuda_source import noise_source
from evokernels.kernels.driver import driver
from evokernels.kernels.memory import strided_rows
from evokernels.kernels.noise_backends import NoisyTensor, row_order

__all__ = ["WORDS", "CudaNoise", "DeviceNoise"]

# Elements of a chunk, which is the work of a block: four of each thread.
_CHUNK = 4 * THREADS

# Of the record Words, as 64-bit integers.
WORDS = 10


class DeviceNoise(abc.ABC):
    """A `TensorNoise` over tensors of one device; what differs is how kernels are launched."""

    def __init__(self, tensors: Sequence[NoisyTensor]) -> None:
        self._tensors = tensors  # their memory stays
        self._targets = [noisy.target for noisy in tensors]
        self._device = self._targets[0].device
        layouts: list[int] = []
        records, chunks = [], 0
        for noisy in tensors:
            target, centre = noisy.target, noisy.centre
            chunks += math.ceil(target.numel() / _CHUNK)
            places = [DENSE if t is None else _place(t, layouts) for t in (target, centre)]
            records.append(
                (
                    *(target.data_ptr(), 0 if centre is None else centre.data_ptr()),
                    *(target.numel(), native.FORMATS[target.dtype], noisy.position),
                    *(*places, chunks),
                )
            )
        self._records, self._layouts = self._table(records), self._table(layouts)
        self._sizes = (len(tensors), chunks)

    def perturb(self, seed: int, generation: int, member: int, scale: float) -> None:
        """As `ModelNoise` says."""
        self._run("evk_perturb", None, 0, seed, generation, member, scale)

    def estimate(self, seed: int, generation: int, weights: Sequence[float]) -> None:
        """As `ModelNoise` says."""
        table = torch.tensor(weights, dtype=torch.float64).to(self._device)
        self._run("evk_estimate", table, len(weights), seed, generation, 0, 0.0)

    @abc.abstractmethod
    def _launch(self, name: str, words: np.ndarray, chunks: int) -> None:
        """A kernel of csrc/noise.cuh, with `WORDS` words, int64."""

    def _run(
        self,
        name: str,
        weights: torch.Tensor | None,
        members: int,
        seed: int,
        generation: int,
        member: int,
        scale: float,
    ) -> None:
        tables = (self._records, self._layouts, weights)
        addresses = (0 if table is None else table.data_ptr() for table in tables)
        numbers = (*self._sizes, members, seed, generation, member)
        words = np.array([*addresses, *numbers, 0], np.uint64)
        words[-1:].view(np.float64)[:] = scale
        if self._sizes[1]:
            self._launch(name, words.view(np.int64), self._sizes[1])
        # autograd does not see writes through pointers
        torch.autograd.graph.increment_version(self._targets)

    def _table(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)


class CudaNoise(DeviceNoise):
    """On NVIDIA GPUs."""

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        """As the backend of that name for updates."""
        return cuda.why_not(device)

    def _launch(self, name: str, words: np.ndarray, chunks: int) -> None:
        index = self._device.index
        _module(index).launch(name, words, min(chunks, _resident(index, name)))


@functools.cache
def _module(index: int) -> cuda.CudaModule:
    """The kernels on one device; what has been loaded once stays."""
    return cuda.CudaModule(driver(), noise_source(), ("evk_perturb", "evk_estimate"), WORDS, index)


@functools.cache
def _resident(index: int, name: str) -> int:
    return _module(index).blocks_at_a_time(name)


def _place(tensor: torch.Tensor, layouts: list[int]) -> int:
    """Where the layout of a tensor is in the table, to which it is added."""
    order = row_order(tensor)
    if order is None:
        return DENSE
    rows = strided_rows(tensor, order)
    layouts += [len(rows), *(number for row in rows for number in row)]
    return len(layouts) - 1 - 2 * len(rows)
