"""What an optimizer and a backend say to each other: tensors bound once, numbers every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from evokernels.compiler.program import Program

__all__ = [
    "ARITHMETIC",
    "Backend",
    "BoundTensor",
    "Numbers",
    "Plan",
    "find_overlap",
    "lie_alike_and_densely",
    "memory_key",
    "overlaps_itself",
]

# The dtype in which an update is computed and moments are kept, for each parameter dtype.
ARITHMETIC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class BoundTensor:
    """A parameter, its moments by the name the program gives them, and the program itself."""

    program: Program
    parameter: torch.Tensor
    moments: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Numbers:
    """Values for the scalars of a program, in its order; shared by the tensors of a group."""

    program: Program
    values: Sequence[float]


class Plan(Protocol):
    """Tensors of a model bound to kernels."""

    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Sequence[int],
        numbers: Sequence[Numbers],
    ) -> None:
        """One step.

        Args:
            gradients: one for each bound tensor, of its shape and dtype; None leaves it alone.
            rows: for each bound tensor the entry of `numbers` that it uses.
            numbers: the scalars, of the program to which the tensors that use them are bound.
        """


class Backend(Protocol):
    """A way to run programs."""

    name: str

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why this backend cannot run a program there, None if it can."""

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """The kernel that runs a program, in words."""

    def bind(self, tensors: Sequence[BoundTensor]) -> Plan:
        """A plan for tensors that `why_not` did not turn down."""


def memory_key(tensor: torch.Tensor) -> tuple:
    """Equal as long as a tensor means the same memory in the same way.

    Never the address alone: allocators hand the same one out again for another size.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def lie_alike_and_densely(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of one shape each fill a block of memory, all in the same order.

    Then the i-th element in memory is the same one in all of them. Strides of dimensions of size 1
    say nothing: torch gives them whatever value it likes.
    """
    strides = {
        tuple((d, s) for d, (s, n) in enumerate(zip(t.stride(), t.shape, strict=True)) if n > 1)
        for t in tensors
    }
    if len(strides) > 1:
        return False
    expected = 1
    for dimension, stride in sorted(strides.pop(), key=lambda pair: pair[1]):
        if stride != expected:
            return False
        expected *= tensors[0].shape[dimension]
    return True


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory (expanded tensors and the like).

    Errs on the safe side for interleaved views that only torch.as_strided can make.
    """
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def find_overlap(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two tensors that share memory, if there are any."""
    spans = sorted(
        ((*_span(tensor), i, tensor) for i, tensor in enumerate(tensors) if tensor.numel()),
        key=lambda span: span[:3],
    )
    open_spans: list[tuple[int, torch.Tensor]] = []
    for start, end, _, tensor in spans:
        open_spans = [(other_end, other) for other_end, other in open_spans if other_end > start]
        for _, other in open_spans:
            dense = lie_alike_and_densely([tensor]) and lie_alike_and_densely([other])
            # columns of one matrix interleave without sharing anything: look at the elements
            if dense or torch.isin(_addresses(tensor), _addresses(other)).any():
                return other, tensor
        open_spans.append((end, tensor))
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _addresses(tensor: torch.Tensor) -> torch.Tensor:
    """The addresses of all elements."""
    addresses = torch.tensor(tensor.data_ptr())
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        addresses = addresses[..., None] + torch.arange(size) * stride * tensor.element_size()
    return addresses
