"""The CUDA backend's source compiled for the host, grid and block as loops: what a GPU runs, on CPU
tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import subprocess
import tempfile

import numpy as np
import torch

from evokernels.compiler.program import Program
from evokernels.compiler.spelling import Kind
from evokernels.kernels.cuda_source import cuda_source
from evokernels.kernels.device import DeviceBackend

__all__ = ["MOST_WORDS", "THREADED", "CudaOnHost", "built_for_host"]

SHIM = pathlib.Path(__file__).with_name("cuda_on_host.h")

# What 32,764 bytes of arguments hold.
MOST_WORDS = 4095

COMMON = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    "-Wno-unused-parameter",  # of moments that a rule does not keep
)
LOOPS = (
    *COMMON,
    # what a GPU would fault at, or compute otherwise, ends the process here
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,null",
    "-fsanitize-undefined-trap-on-error",
)
# Blocks and threads at the same time, under ThreadSanitizer.
THREADED = (*COMMON, "-DEVK_REAL_THREADS", "-fsanitize=thread", "-pthread", "-g")


class CudaOnHost(DeviceBackend):
    """A `DeviceBackend`.

    Args:
        most_words: as if a launch could take no more.
        resident: as if a device could hold as many blocks.
        flags: of the compiler.
    """

    name = "cuda on the host"

    def __init__(
        self, most_words: int = MOST_WORDS, resident: int = 7, flags: tuple[str, ...] = LOOPS
    ) -> None:
        self.most_words, self._resident, self._flags = most_words, resident, flags

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices."""
        return None if device.type == "cpu" else "it runs on the CPU"

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """What it is."""
        return self.name

    def load(self, kinds: tuple[Kind, ...], words: int, device: torch.device) -> HostKernel:
        """The kernel for these kinds; compiled once, whatever part of its words a launch fills."""
        assert words <= self.most_words
        source = cuda_source(kinds, MOST_WORDS)
        return HostKernel(built_for_host(source, self._flags), self._resident)


class HostKernel:
    """A `DeviceKernel`."""

    def __init__(self, library: ctypes.CDLL, resident: int) -> None:
        self._library, self.resident = library, resident
        self.launches = 0

    def update(self, words: np.ndarray, blocks: int) -> None:
        """One launch."""
        self._launch(self._library.evk_update, words, blocks)

    def squares(self, words: np.ndarray, blocks: int) -> None:
        """One launch."""
        self._launch(self._library.evk_squares, words, blocks)

    def _launch(self, function: ctypes._CFuncPtr, words: np.ndarray, blocks: int) -> None:
        self.launches += 1
        block = np.full(MOST_WORDS, -1, np.int64)  # behind the words that were given: nonsense
        block[: len(words)] = words
        function(ctypes.c_void_p(block.ctypes.data), ctypes.c_int64(blocks))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Until the process ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def built_for_host(source: str, flags: tuple[str, ...] = LOOPS) -> ctypes.CDLL:
    """The library of a kernel's source; it stays until the process ends."""
    folder = pathlib.Path(_folder().name)
    text = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.cpp"
    text.write_text(source, encoding="utf-8")
    library = text.with_suffix(".so")
    command = ["c++", *flags, "-include", SHIM, text, "-o", library]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))
