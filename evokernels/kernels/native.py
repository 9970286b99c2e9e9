"""The native library, loaded with ctypes: csrc/runtime.h in Python."""

from __future__ import annotations

import ctypes
import functools
import pathlib

import torch  # noqa: F401  first, so that the library shares torch's OpenMP runtime and threads

from evokernels.errors import BackendError

__all__ = [
    "Layout",
    "TensorRecord",
    "instruction_set",
    "kernel_address",
    "library",
    "library_with_lock",
]

PATH = pathlib.Path(__file__).with_name("libevokernels.so")


class Layout(ctypes.Structure):
    """evk_layout; strides in elements, in the order p, g, m, v."""

    _fields_ = (
        ("dimensions", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64) * 4),
    )


class TensorRecord(ctypes.Structure):
    """evk_tensor."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("element_size", ctypes.c_int64),
        ("moment_size", ctypes.c_int64),
        ("layout", ctypes.POINTER(Layout)),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The library; BackendError with the reason if it cannot be loaded."""
    try:
        native = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise BackendError(
            f"the native library cannot be loaded ({error}); "
            "install the package where a C compiler is: pip install ."
        ) from None
    native.evk_step.restype = None
    native.evk_step.argtypes = (
        ctypes.POINTER(TensorRecord),
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.POINTER(ctypes.c_double)),
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int64,
        ctypes.c_int32,
    )
    native.evk_instruction_set.restype = ctypes.c_char_p
    return native


@functools.cache
def library_with_lock() -> ctypes.PyDLL:
    """The same, for functions that need the interpreter lock: csrc/look.h."""
    library()
    native = ctypes.PyDLL(str(PATH))
    native.evk_look.restype = ctypes.c_int32
    native.evk_look.argtypes = (
        *(ctypes.c_void_p, ctypes.py_object, ctypes.py_object, ctypes.c_void_p),
    )
    native.evk_commit.restype = None
    native.evk_commit.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    return native


def kernel_address(symbol: str) -> int:
    """The address of a kernel by its name."""
    return ctypes.cast(library()[symbol], ctypes.c_void_p).value


def instruction_set() -> str:
    """The instruction set for which the kernels run on this machine."""
    return library().evk_instruction_set().decode()
