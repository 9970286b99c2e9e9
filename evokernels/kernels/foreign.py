"""Functions of torch and Python that the native library calls, by address: evk_foreign.

Most belong to torch's stable C interface; four C++ functions have names that may change with
torch, and where a Python tensor keeps its implementation is nowhere written down. So nothing is
taken on trust: all of it is tried on tensors made for that, and where one answer is not torch's
own, the library looks at no tensor and Python does it, slower.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys
from collections.abc import Callable

import torch

from evokernels.errors import BackendError

__all__ = ["Foreign", "dtype_number", "foreign", "tensor_address"]

# field of evk_foreign: symbol
_TORCH_STABLE = {
    "get_layout": "aoti_torch_get_layout",
    "get_dtype": "aoti_torch_get_dtype",
    "get_dim": "aoti_torch_get_dim",
    "get_sizes": "aoti_torch_get_sizes",
    "get_strides": "aoti_torch_get_strides",
    "get_data_ptr": "aoti_torch_get_data_ptr",
}
_TORCH_CORE = {"get_grad": "_ZNK3c1010TensorImpl4gradEv"}  # c10::TensorImpl::grad() const
_TORCH = {
    "is_neg": "_ZN2at6native6is_negERKNS_6TensorE",  # at::native::is_neg
    "is_inference": "_ZN2at6native12is_inferenceERKNS_6TensorE",  # at::native::is_inference
    # torch::autograd::impl::bump_version
    "bump_version": "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
}
_PYTHON = {
    "dict_get": "PyDict_GetItem",
    "dict_next": "PyDict_Next",
    "list_size": "PyList_Size",
    "list_get": "PyList_GetItem",
    "clear_error": "PyErr_Clear",
}


class Foreign(ctypes.Structure):
    """evk_foreign."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_TORCH_STABLE, *_TORCH_CORE, *_TORCH, *_PYTHON)),
        ("strided", ctypes.c_int64),
        ("undefined", ctypes.c_void_p),
    )


@functools.cache
def foreign() -> Foreign:
    """The table.

    Raises:
        BackendError: this torch or this Python cannot be read natively; why.
    """
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise BackendError("its containers can be read in a CPython with the global lock only")
    try:
        torch_cpu, c10 = _torch_library("torch_cpu"), _torch_library("c10")
        libraries = (
            *((torch_cpu, _TORCH_STABLE), (c10, _TORCH_CORE)),
            *((torch_cpu, _TORCH), (ctypes.pythonapi, _PYTHON)),
        )
        addresses = {
            field: ctypes.cast(library[symbol], ctypes.c_void_p).value
            for library, symbols in libraries
            for field, symbol in symbols.items()
        }
        table = Foreign(**addresses, strided=torch_cpu.aoti_torch_layout_strided())
        table.undefined = _content(_getter(table)(torch.empty(0, device="cpu")._cdata))
        _try_out(table)
    except (OSError, AttributeError, ValueError) as error:
        raise BackendError(f"torch {torch.__version__} is another than expected: {error}") from None
    return table


def tensor_address(tensor: torch.Tensor) -> int:
    """Where the at::Tensor of a Python tensor lies."""
    return id(tensor) + _offset()


@functools.cache
def dtype_number(dtype: torch.dtype) -> int:
    """Torch's number for a dtype, in its C interface."""
    return getattr(_torch_library("torch_cpu"), f"aoti_torch_dtype_{dtype}".replace("torch.", ""))()


def _torch_library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / f"lib{name}.so"))


@functools.cache
def _offset() -> int:
    """Where in a Python tensor the address of its implementation stands: the one place where it is
    found in several tensors."""
    probes = [torch.empty(shape, device="cpu") for shape in (1, (2, 3))]
    probes.append(torch.nn.Parameter(probes[0]))
    words = torch.Tensor.__basicsize__ // ctypes.sizeof(ctypes.c_void_p)
    places = set(range(words))
    for probe in probes:
        content = (ctypes.c_void_p * words).from_address(id(probe))
        places &= {i for i in range(words) if content[i] == probe._cdata}
    (place,) = places  # ValueError if there is none, or another one by chance
    return place * ctypes.sizeof(ctypes.c_void_p)


@torch.inference_mode(False)  # whose tensors count no versions
def _try_out(table: Foreign) -> None:
    """Raises ValueError if the table says anything else about a tensor than torch does."""
    get_grad = _getter(table)
    is_neg, is_inference = (
        ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(function)
        for function in (table.is_neg, table.is_inference)
    )
    bump_version = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(table.bump_version)
    get_data_ptr = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(
        table.get_data_ptr
    )
    plain = torch.zeros(3, 4, device="cpu")
    with torch.inference_mode():
        inference = torch.zeros(1, device="cpu")
    parameter = torch.nn.Parameter(plain.t()[1:])
    if _content(get_grad(parameter._cdata)) != table.undefined:
        raise ValueError("gradients are not where they were")
    for gradient in (torch.zeros_like(parameter), torch.zeros_like(parameter)._neg_view()):
        parameter.grad = gradient
        address, data = get_grad(parameter._cdata), ctypes.c_void_p()
        get_data_ptr(address, ctypes.addressof(data))
        expected = (gradient._cdata, gradient.data_ptr(), gradient.is_neg())
        if (_content(address), data.value, is_neg(address)) != expected:
            raise ValueError("gradients are not what they were")
    if is_inference(tensor_address(plain)) or not is_inference(tensor_address(inference)):
        raise ValueError("inference tensors are not what they were")
    before = plain._version
    bump_version(tensor_address(plain))
    if plain._version != before + 1:
        raise ValueError("versions of tensors are not counted where they were")


def _getter(table: Foreign) -> Callable[[int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(table.get_grad)


def _content(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value
