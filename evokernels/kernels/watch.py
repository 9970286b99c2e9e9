"""One native call that tells whether all that a step rests on is as it was: csrc/look.h."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evokernels.errors import BackendError
from evokernels.kernels import native
from evokernels.kernels.foreign import Foreign, dtype_number, foreign, tensor_address

__all__ = ["Watch", "can_watch"]

_Pointers = ctypes.POINTER(ctypes.c_void_p)


class _Seen(ctypes.Structure):
    """evk_seen."""

    _fields_ = (
        ("tensor", ctypes.c_void_p),
        ("address", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("dimensions", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _Watch(ctypes.Structure):
    """evk_watch."""

    _fields_ = (
        ("foreign", ctypes.POINTER(Foreign)),
        ("parameter_count", ctypes.c_int64),
        ("parameters", ctypes.POINTER(_Seen)),
        ("gradients", ctypes.POINTER(_Seen)),
        ("moment_count", ctypes.c_int64),
        ("moments", _Pointers),
        ("moment_addresses", _Pointers),
        ("waiting_count", ctypes.c_int64),
        ("waiting", _Pointers),
        ("counts", ctypes.c_void_p),
        ("expected_counts", ctypes.c_void_p),
        ("object_count", ctypes.c_int64),
        ("objects", _Pointers),
        ("key_count", ctypes.c_int64),
        ("keys", _Pointers),
        ("params_key", ctypes.py_object),
    )


class Watch:
    """What parameters, gradients, moments, groups and state were like when it was made.

    Args:
        parameters, gradients: of one length; a gradient may be None.
        moments: tensors whose address must stay: all moments and the step counts.
        waiting: parameters that must go on having no gradient.
        counts, expected_counts: how often each parameter was updated, float64; and as this
            object counts them.
        keys: options of a group that must stay the same objects.
        objects: each group, its values of `keys` and its parameters, then all values of the state.
        addresses: where `unchanged` writes the addresses of the gradients.

    Raises:
        BackendError: this torch or Python cannot be read natively.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        moments: Sequence[torch.Tensor],
        waiting: Sequence[torch.Tensor],
        counts: np.ndarray,
        expected_counts: np.ndarray,
        keys: Sequence[str],
        objects: Sequence[Any],
        addresses: ctypes.Array,
    ) -> None:
        self._alive = (
            parameters,
            moments,
            waiting,
            counts,
            expected_counts,
            keys,
            objects,
            addresses,
        )
        tensors = [*parameters, *(g for g in gradients if g is not None)]
        # sizes and strides of all: side by side, since a look walks through them in this order
        self._numbers = (ctypes.c_int64 * sum(2 * tensor.dim() for tensor in tensors))()
        self._filled = 0
        self._watch = _Watch(
            ctypes.pointer(foreign()),
            len(parameters),
            (_Seen * len(parameters))(*map(self._seen, parameters)),
            (_Seen * len(parameters))(*map(self._seen, gradients)),
            len(moments),
            _pointers([tensor_address(moment) for moment in moments]),
            _pointers([moment.data_ptr() for moment in moments]),
            len(waiting),
            _pointers([tensor_address(parameter) for parameter in waiting]),
            counts.ctypes.data,
            expected_counts.ctypes.data,
            len(objects),
            _pointers([id(thing) for thing in objects]),
            len(keys),
            _pointers([id(key) for key in keys]),
            "params",
        )
        self._reference = ctypes.addressof(self._watch)
        self._address_array = ctypes.addressof(addresses)
        self._library = native.library_with_lock()

    def unchanged(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether everything is as it was; if so, the gradients' addresses are up to date."""
        return self._library.evk_look(self._reference, groups, state, self._address_array) == 1

    def commit(self, cleared: bool) -> None:
        """Count the step for the parameters with gradients; tell autograd what was written to."""
        self._library.evk_commit(self._reference, cleared)

    def _seen(self, tensor: torch.Tensor | None) -> _Seen:
        if tensor is None:
            return _Seen()
        place = ctypes.addressof(self._numbers) + 8 * self._filled
        self._numbers[self._filled : self._filled + 2 * tensor.dim()] = [
            *tensor.shape,
            *tensor.stride(),
        ]
        self._filled += 2 * tensor.dim()
        return _Seen(
            tensor_address(tensor),
            tensor.data_ptr(),
            place,
            place + 8 * tensor.dim(),
            tensor.dim(),
            dtype_number(tensor.dtype),
        )


def can_watch(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether torch's own tensor types are all there is, and this torch can be read."""
    try:
        foreign()
    except BackendError:
        return False
    # inference tensors count no versions; other types may mean other memory than they show
    return all(
        type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_inference() for t in tensors
    )


def _pointers(addresses: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_void_p * len(addresses))(*addresses)
