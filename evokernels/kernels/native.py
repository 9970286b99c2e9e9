"""The native library, loaded with ctypes: csrc/runtime.h in Python."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Sequence

import torch  # first, so that the library shares torch's OpenMP runtime and threads

from evokernels.compiler.program import OPERANDS
from evokernels.errors import BackendError
from evokernels.kernels.memory import strided_rows

__all__ = [
    "FORMATS",
    "PLACES",
    "Layout",
    "LayoutTable",
    "NoisyRecord",
    "NumbersRecord",
    "Span",
    "TensorRecord",
    "address_of",
    "has_convolution_weights",
    "instruction_set",
    "kernel_address",
    "library",
    "library_with_lock",
    "why_not",
]

PATH = pathlib.Path(__file__).with_name("libevokernels.so")


# The place of each tensor in arrays of operands: EVK_P and so on.
PLACES = {name: place for place, name in enumerate(OPERANDS)}

# EVK_FLOAT32 and so on.
FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Layout(ctypes.Structure):
    """evk_layout."""

    _fields_ = (
        ("dimensions", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )


class LayoutTable:
    """An evk_layout and the memory it points to.

    Args:
        order: of dimensions, in which elements count.
    """

    def __init__(self, tensor: torch.Tensor, order: Sequence[int]) -> None:
        shape, strides = zip(*strided_rows(tensor, order), strict=True)
        numbers = ctypes.c_int64 * len(shape)
        self._memory = numbers(*shape), numbers(*strides)
        addresses = [ctypes.cast(m, ctypes.POINTER(ctypes.c_int64)) for m in self._memory]
        self.pointer = ctypes.pointer(Layout(len(shape), *addresses))


class TensorRecord(ctypes.Structure):
    """evk_tensor."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p * len(OPERANDS)),
        ("layouts", ctypes.POINTER(Layout) * len(OPERANDS)),
        ("elements", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_uint32),
        ("formats", ctypes.c_int32 * len(OPERANDS)),
        ("operands", ctypes.c_int32),
        ("float64", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("staged", ctypes.c_int32),
        ("gradient_overlaps", ctypes.c_int32),
    )


class NumbersRecord(ctypes.Structure):
    """evk_numbers."""

    _fields_ = (("scalars", ctypes.POINTER(ctypes.c_double)), ("t", ctypes.c_int64))


class Span(ctypes.Structure):
    """evk_span."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("tensor", ctypes.c_int64),
    )


class NoisyRecord(ctypes.Structure):
    """evk_noisy."""

    _fields_ = (
        ("target", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("target_layout", ctypes.POINTER(Layout)),
        ("centre_layout", ctypes.POINTER(Layout)),
        ("elements", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("position", ctypes.c_uint32),
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
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    native.evk_step.restype = None
    native.evk_step.argtypes = (
        *(pointer, pointer, pointer, pointer, int64, int32, int32, pointer),
    )
    native.evk_update.restype = None
    native.evk_update.argtypes = (pointer, pointer, pointer, int64, int64, int32)
    native.evk_sum_of_squares.restype = ctypes.c_double
    native.evk_sum_of_squares.argtypes = (pointer, pointer, int64, int32)
    native.evk_instruction_set.restype = ctypes.c_char_p
    uint32, uint64 = ctypes.c_uint32, ctypes.c_uint64
    others = {
        "evk_perturb": (pointer, int64, uint64, uint32, uint32, ctypes.c_double, int32),
        "evk_estimate": (pointer, int64, uint64, uint32, pointer, int64, int32),
        "evk_arrange": (pointer, int64, int64, pointer),
        "evk_population_losses": (*(pointer, int64), *(pointer,) * 5, int32),
        "evk_pool": (pointer, pointer, pointer, pointer, pointer, int32, int32),
        "evk_pool_backward": (*(pointer,) * 5, ctypes.c_float, int32, int32),
        "evk_convolve_pool": (*(pointer,) * 5, int32, int32),
        "evk_convolve_pool_backward": (*(pointer,) * 5, int32, int32),
        "evk_relu": (pointer, int64, pointer, int32, int32),
        "evk_relu_backward": (*(pointer,) * 3, int64, ctypes.c_float, int32, int32),
        "evk_norm_relu": (*(pointer,) * 5, int64, int64, int32, int32),
        "evk_scale_relu": (*(pointer,) * 3, int64, int64, int32, int32),
        "evk_norm_relu_backward": (*(pointer,) * 6, int64, int64, int32, int32),
        "evk_transpose": (pointer, pointer, int64, int64, int64, int32, int32),
        "evk_make_batch": (pointer,) * 4,
        "evk_convolution_weights": (*(pointer,) * 5, int64, int32, int32),
    }
    for name, arguments in others.items():
        function = getattr(native, name)
        function.restype, function.argtypes = None, arguments
    native.evk_perceptron_room.restype = native.evk_perceptron_sums.restype = int64
    native.evk_perceptron_room.argtypes = (pointer, int64)
    native.evk_perceptron_sums.argtypes = (pointer, pointer)
    native.evk_has_convolution_weights.restype = int32
    native.evk_has_convolution_weights.argtypes = ()
    native.evk_convolution_room.restype = int64
    native.evk_convolution_room.argtypes = (pointer, int64, int32)
    return native


def why_not() -> str | None:
    """Why the library cannot be used here, None if it can."""
    try:
        library()
    except BackendError as error:
        return str(error)
    return None


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


def has_convolution_weights() -> bool:
    """Whether the processor is one for csrc/convolution.h: AVX512-BF16, and no AMX."""
    return bool(library().evk_has_convolution_weights())


def kernel_address(symbol: str) -> int:
    """The address of a kernel by its name."""
    return address_of(library(), symbol)


def address_of(loaded: ctypes.CDLL, symbol: str) -> int:
    """Where a function of a library is."""
    return ctypes.cast(loaded[symbol], ctypes.c_void_p).value


def instruction_set() -> str:
    """The instruction set for which the kernels run on this machine."""
    return library().evk_instruction_set().decode()
