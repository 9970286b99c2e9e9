"""The Triton backend: one kernel for all kinds of a plan, rendered as a module that nobody writes.

Triton compiles a module's functions when they first run and keeps the binaries in its own cache,
by the content of their text.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evokernels.compiler.program import Program
from evokernels.compiler.render_triton import render_module, room_for_numbers
from evokernels.compiler.spelling import Kind
from evokernels.kernels.device import DeviceBackend, capturing
from evokernels.kernels.plan import ARITHMETIC

__all__ = ["OPTIONS", "TritonBackend", "TritonKernel", "module_of", "options_of_nvidia"]

# What the compiler may not do: contract products and sums, flush to zero. Reads that follow writes
# leave nothing to pipeline.
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

# Of 256 threads, that a multiprocessor holds at a time: one more would wait until the others end.
# And registers that a thread of theirs can have. Three blocks are three quarters of an sm_75.
BLOCKS, REGISTERS = 3, 80
# The same for rules of more states than for which those suffice.
MANY_STATES = 4
FEWER_BLOCKS, MORE_REGISTERS = 2, 128


def options_of_nvidia(kinds: Sequence[Kind]) -> dict[str, Any]:
    """What the compiler is told for an NVIDIA GPU.

    Denormals are kept by functions of the library that CUDA comes with, too; AMD's does by itself.
    """
    registers = MORE_REGISTERS if _have_many_states(kinds) else REGISTERS
    return {**OPTIONS, "enable_reflect_ftz": False, "maxnreg": registers}


def _have_many_states(kinds: Sequence[Kind]) -> bool:
    return max(len(kind.structure.program.state) for kind in kinds) > MANY_STATES


class TritonBackend(DeviceBackend):
    """Every rule, for all four element types, on GPUs that Triton compiles for."""

    name = "triton"
    most_words = 2**31  # they lie in the device's memory

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices, or no Triton."""
        if device.type != "cuda":
            return f"it runs on CUDA and ROCm devices, the tensors are on {device}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported: {error}"
        return None

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """How many operations it fuses."""
        return (
            f"one Triton kernel for all tensors, {len(program.lines)} operations an element "
            f"in {ARITHMETIC[dtype]}"
        )

    def load(self, kinds: tuple[Kind, ...], words: int, device: torch.device) -> TritonKernel:
        """As `DeviceBackend` says; compiled in the first step."""
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        resident = multiprocessors * (FEWER_BLOCKS if _have_many_states(kinds) else BLOCKS)
        options = OPTIONS if torch.version.hip else options_of_nvidia(kinds)
        return TritonKernel(kinds, words, device, resident, options)


class TritonKernel:
    """The kernels of one plan, and what they read and write besides its tensors.

    Attributes:
        resident: blocks that are launched at most.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        words: int,
        device: torch.device,
        resident: int,
        options: dict[str, Any],
    ) -> None:
        self.resident = resident
        self._options = options
        self._module = module_of(render_module(kinds))
        room = resident * room_for_numbers(kinds)
        self._numbers = torch.empty(room, dtype=torch.float64, device=device)
        # apart: from step to step each of them often stays as it is
        self._update_words, self._squares_words = (_Words(words, device) for _ in range(2))

    def update(self, words: np.ndarray, blocks: int) -> None:
        """As `DeviceKernel` says."""
        with torch.cuda.device_of(self._numbers):  # Triton launches on the current device
            table = self._update_words.upload(words)
            self._module.update[(blocks,)](table, self._numbers, **self._options)

    def squares(self, words: np.ndarray, blocks: int) -> None:
        """As `DeviceKernel` says."""
        with torch.cuda.device_of(self._numbers):
            table = self._squares_words.upload(words)
            self._module.squares[(blocks,)](table, **self._options)


class _Words:
    """A block of words on a device.

    A captured step gets buffers of its own, which a replay copies again: neither other steps nor
    other captures write to them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._table = torch.empty(size, dtype=torch.int64, device=device)
        self._uploaded = np.empty(0, np.int64)
        self._captured: list[torch.Tensor] = []

    def upload(self, words: np.ndarray) -> torch.Tensor:
        """Where they are for kernels that the current stream runs from now on."""
        if capturing(self._table.device):
            staging, table = self._staged(words), torch.empty_like(self._table)
            self._captured += [staging, table]
            table[: len(words)].copy_(staging, non_blocking=True)
            return table
        if not np.array_equal(words, self._uploaded):
            # a new buffer each time: torch's allocator hands one out again when it has been copied
            self._table[: len(words)].copy_(self._staged(words), non_blocking=True)
            self._uploaded = words.copy()
        return self._table

    def _staged(self, words: np.ndarray) -> torch.Tensor:
        """A copy from which a device copies while the host goes on."""
        pinned = self._table.device.type == "cuda"
        staging = torch.empty(len(words), dtype=torch.int64, pin_memory=pinned)
        staging.numpy()[:] = words
        return staging


@functools.cache
def module_of(rendered: str) -> types.ModuleType:
    """A rendered module behind the texts of triton_language.py and its functions, executed."""
    text = f"{_language()}\n\n{rendered}"
    name = f"evokernels_{hashlib.sha256(text.encode()).hexdigest()}"
    # Triton reads the text of functions, tracebacks show it; without a time it is never dropped
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    exec(compile(text, file, "exec"), module.__dict__)
    return module


@functools.cache
def _language() -> str:
    here = pathlib.Path(__file__)
    names = ("triton_language.py", "triton_functions.py")
    return "\n\n".join(here.with_name(name).read_text(encoding="utf-8") for name in names)
