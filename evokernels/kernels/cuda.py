"""The CUDA backend: generated CUDA C++, compiled by NVRTC, launched through the driver."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import numpy as np
import torch

from evokernels.compiler.covers import find_cover
from evokernels.compiler.program import Program
from evokernels.compiler.render_cuda import THREADS
from evokernels.compiler.spelling import Kind
from evokernels.errors import BackendError
from evokernels.kernels import nvrtc
from evokernels.kernels.cuda_source import cuda_source
from evokernels.kernels.device import DeviceBackend
from evokernels.kernels.driver import Driver, driver

__all__ = ["CudaBackend", "CudaKernel", "CudaModule", "why_not"]

# Words of 64 bits that a kernel takes as its parameter: 4 KB, and 32,764 bytes since CUDA 12.1
# ("CUDA 12.1 Supports Large Kernel Parameters", NVIDIA 2023), on compute capability 7.0 and above.
CLASSIC_WORDS, LARGE_WORDS = 4096 // 8, 32764 // 8
LARGE_SINCE = (12, 1)
# Room for parameters is rounded up to powers of two from here on, so that models of all sizes
# share few kernels.
LEAST_WORDS = 64


class CudaBackend(DeviceBackend):
    """Every rule, on NVIDIA GPUs from compute capability 7.0 on."""

    name = "cuda"

    def __init__(self) -> None:
        self._kernels: dict[tuple, CudaKernel] = {}
        self._lock = threading.Lock()

    @property
    def most_words(self) -> int:
        """That a launch can take, by what compiler and driver can do."""
        large = min(nvrtc.version(), driver().version()) >= LARGE_SINCE
        return LARGE_WORDS if large else CLASSIC_WORDS

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices, or what is missing: bindings, compiler, a new enough driver or GPU."""
        return why_not(device)

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """Structure, dtype and compiler."""
        cover = find_cover(program)
        structure = cover.name if cover else "own structure"
        parameter = str(dtype).removeprefix("torch.")
        return f"{structure}, {parameter} (CUDA C++, NVRTC {_dotted(nvrtc.version())})"

    def load(self, kinds: tuple[Kind, ...], words: int, device: torch.device) -> CudaKernel:
        """As `DeviceBackend` says; what has been loaded once stays."""
        index = torch.cuda.current_device() if device.index is None else device.index
        key = (kinds, capacity(words, self.most_words), index)
        with self._lock:
            if key not in self._kernels:
                self._kernels[key] = CudaKernel(driver(), *key)
            return self._kernels[key]


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot be compiled for a device and launched there, None if they can."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device}"
    if torch.version.hip:
        return f"this torch is built for AMD GPUs (ROCm {torch.version.hip}); use 'auto'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = nvrtc.why_not()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, compute capability {_dotted(capability)}"
    if capability < (7, 0):
        return f"it needs compute capability 7.0 or above, {device} is a {name}"
    compiler, able = nvrtc.version(), driver().version()
    if nvrtc.architecture_for(capability) is None:
        known = nvrtc.architectures()
        return (
            f"NVRTC {_dotted(compiler)} compiles for compute capabilities "
            f"{known[0] / 10} to {known[-1] / 10}, {device} is a {name}: install a torch and "
            "cuda-bindings of a CUDA version that supports it"
        )
    if able[0] < compiler[0]:  # code of one major version runs on all drivers of that version
        return (
            f"the driver supports CUDA {_dotted(able)}, NVRTC is of CUDA {_dotted(compiler)}: "
            f"update the driver, or install a torch and cuda-bindings for CUDA {able[0]}"
        )
    return None


class CudaModule:
    """Compiled kernels on one device, each of which takes one block of words.

    Args:
        source: of the kernels.
        words: that a launch hands over, those that were asked for or more.
        index: number of the device.
    """

    def __init__(
        self, driver: Driver, source: str, names: Sequence[str], words: int, index: int
    ) -> None:
        capability = torch.cuda.get_device_capability(index)
        code = nvrtc.cubin(source, nvrtc.architecture_for(capability))
        self._driver = driver
        self._context = driver.primary_context(index)
        module = driver.module(self._context, code)
        self._functions = {name: driver.function(self._context, module, name) for name in names}
        self._index = index
        self._process = os.getpid()
        self._parameters = _Parameters(words)
        # what torch.cuda.current_stream(index).cuda_stream is, without the objects
        self._current_stream = torch._C._cuda_getCurrentRawStream

    def blocks_at_a_time(self, name: str) -> int:
        """How many blocks of a kernel the device can hold at a time."""
        blocks = self._driver.blocks_at_a_time(self._context, self._functions[name], THREADS)
        return blocks * torch.cuda.get_device_properties(self._index).multi_processor_count

    def launch(self, name: str, words: np.ndarray, blocks: int) -> None:
        """Launch a kernel on the current stream.

        Args:
            words: int64; read before this returns.
        """
        if os.getpid() != self._process:
            raise BackendError(
                "a forked process cannot use CUDA, which its parent has begun to use: start "
                "processes with torch.multiprocessing.get_context('spawn')"
            )
        parameters = self._parameters
        # what stands behind is of an earlier launch and not read
        parameters.words[: len(words)] = words
        stream = self._current_stream(self._index)
        self._driver.launch(
            *(self._context, self._functions[name], blocks, THREADS, stream, parameters.pointers)
        )


class CudaKernel(CudaModule):
    """A kernel on one device, as `DeviceKernel` says.

    Args:
        words: as of `CudaModule`.
    """

    def __init__(self, driver: Driver, kinds: tuple[Kind, ...], words: int, index: int) -> None:
        super().__init__(
            driver, cuda_source(kinds, words), ("evk_update", "evk_squares"), words, index
        )
        self.resident = self.blocks_at_a_time("evk_update")

    def update(self, words: np.ndarray, blocks: int) -> None:
        """As `DeviceKernel` says."""
        self.launch("evk_update", words, blocks)

    def squares(self, words: np.ndarray, blocks: int) -> None:
        """As `DeviceKernel` says."""
        self.launch("evk_squares", words, blocks)


class _Parameters(threading.local):
    """The parameter of a kernel in host memory, of each thread its own.

    The driver reads as many words as the kernel was compiled for, which a plan may not have.

    Attributes:
        pointers: address of the array of addresses that the driver takes.
    """

    def __init__(self, words: int) -> None:
        self.words = np.zeros(words, np.int64)
        self._pointers = (ctypes.c_void_p * 1)(self.words.ctypes.data)
        self.pointers = ctypes.addressof(self._pointers)


def capacity(words: int, most: int) -> int:
    """For how many words a kernel is compiled that has to take `words`."""
    return min(max(LEAST_WORDS, 1 << (words - 1).bit_length()), most)


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)
