"""CUDA C++ → machine code with NVRTC, NVIDIA's compiler as a library; needs no GPU, no toolkit.

Through cuda-bindings, which torch's CUDA wheels bring along with NVRTC itself; imported when it is
first needed. cuda-core, the layer above, would be one more dependency, and what it adds (objects
for programs, streams and launches) costs more in each launch than the launch itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from evokernels.errors import BackendError
from evokernels.kernels.cache import cached

__all__ = [
    "Compiled",
    "architecture_for",
    "architectures",
    "compiled",
    "cubin",
    "version",
    "why_not",
]

# Nothing is contracted, approximated or flushed: the operations are those of the other backends.
OPTIONS = (*("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"),)
# Jetson, Drive and their like ("binary compatibility between desktop and Tegra is not supported",
# CUDA C++ Programming Guide); 101 is what 110 was called before CUDA 13.
EMBEDDED = {53, 62, 72, 87, 88, 101, 110}
# Registers, stack and spills of every kernel, in the log.
VERBOSE = "--ptxas-options=-v"


@dataclass(frozen=True)
class Compiled:
    """What NVRTC makes of a source, and what it says of it."""

    cubin: bytes
    ptx: str
    log: str


def why_not() -> str | None:
    """The reason why nothing can be compiled here, None if it can."""
    major = (torch.version.cuda or "").partition(".")[0]
    wanted = f"cuda-bindings[all]=={major}.*" if major else "cuda-bindings[all]"
    try:
        version()
    except ImportError as error:
        return f"cuda-bindings is missing ({error}): pip install '{wanted}'"
    except RuntimeError as error:  # the library is missing, or lacks a function
        return f"NVRTC cannot be loaded ({error}): pip install '{wanted}'"
    return None


@functools.cache
def version() -> tuple[int, int]:
    """Of NVRTC."""
    return _call("nvrtcVersion")


@functools.cache
def architectures() -> tuple[int, ...]:
    """Those for which it compiles, in ascending order: 75 is compute capability 7.5."""
    return tuple(sorted(_call("nvrtcGetSupportedArchs")[0]))


def architecture_for(capability: tuple[int, int]) -> int | None:
    """What to compile for a device; None if this NVRTC does not know its generation.

    Code for a compute capability runs on those with the same major number and a greater minor one,
    but never on a card if it is for an embedded device, nor the other way round.
    """
    major, minor = capability
    own = 10 * major + minor
    if own in architectures():
        return own
    fitting = [a for a in architectures() if a // 10 == major and a < own]
    return None if own in EMBEDDED else max(set(fitting) - EMBEDDED, default=None)


def cubin(source: str, architecture: int) -> bytes:
    """The machine code of a source for an architecture, from disk if it was compiled before."""
    decisive = (source, f"sm_{architecture}", *OPTIONS, "NVRTC {}.{}".format(*version()))
    return cached(decisive, lambda: compiled(source, architecture).cubin)


def compiled(source: str, architecture: int, *options: str) -> Compiled:
    """Compile a source.

    Raises:
        BackendError: with what the compiler says.
    """
    program = _call("nvrtcCreateProgram", source.encode(), b"evokernels.cu", 0, [], [])[0]
    try:
        chosen = [f"--gpu-architecture=sm_{architecture}", *OPTIONS, *options]
        try:
            _call("nvrtcCompileProgram", program, len(chosen), [o.encode() for o in chosen])
        except BackendError as error:
            log = _text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise BackendError(
                f"a generated kernel does not compile for sm_{architecture} ({error}); please "
                f"report it, and use another backend until then:\n{log}"
            ) from None
        return Compiled(
            _text(program, "CUBIN"),
            _text(program, "PTX").rstrip(b"\0").decode(),
            _text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"),
        )
    finally:
        _call("nvrtcDestroyProgram", program)


def _text(program: Any, what: str) -> bytes:
    """``nvrtcGetCUBIN`` and its like."""
    (size,) = _call(f"nvrtcGet{what}Size", program)
    buffer = bytearray(size)
    _call(f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)


def _call(function: str, *arguments: Any) -> tuple:
    """What a function of NVRTC returns besides its status, which is checked."""
    from cuda.bindings import nvrtc

    status, *results = getattr(nvrtc, function)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, meaning = nvrtc.nvrtcGetErrorString(status)
        raise BackendError(f"{function}: {meaning.decode()}")
    return tuple(results)
