"""Where tensors lie in memory: whether a kernel may walk them together, or must not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = [
    "find_overlap",
    "lies_densely",
    "memory_keys",
    "memory_order",
    "overlaps_itself",
    "strided_rows",
]


def memory_keys(tensors: Iterable[torch.Tensor]) -> list[tuple]:
    """Equal as long as the tensors mean the same memory in the same way.

    Never the address alone: allocators hand the same one out again for another size.
    """
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


def memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions of more than one element, the one with the longest stride first."""
    dimensions = [d for d, size in enumerate(tensor.shape) if size > 1]
    return sorted(dimensions, key=tensor.stride, reverse=True)


def strided_rows(tensor: torch.Tensor, order: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and strides by which the elements are walked in an order of dimensions.

    Dimensions that continue each other are one; what is dense in this order is one row of stride 1.
    """
    rows: list[tuple[int, int]] = []
    for dimension in order:
        size, stride = tensor.shape[dimension], tensor.stride(dimension)
        if rows and rows[-1][1] == size * stride:
            size *= rows.pop()[0]
        rows.append((size, stride))
    return rows


def lies_densely(tensor: torch.Tensor, order: Sequence[int] | None = None) -> bool:
    """Whether the elements fill a block of memory, in an order of dimensions or in any."""
    rows = strided_rows(tensor, memory_order(tensor) if order is None else order)
    # two rows of stride 1 overlap: (4, 3) by (1, 1)
    return [stride for _, stride in rows] in ([], [1])


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory (expanded tensors and the like).

    Errs on the safe side for interleaved views that only torch.as_strided can make.
    """
    if tensor.is_contiguous():  # as one without elements is, too
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
            dense = lies_densely(tensor) and lies_densely(other)
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
    addresses = torch.tensor(tensor.data_ptr(), device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        steps = torch.arange(size, device="cpu") * stride * tensor.element_size()
        addresses = addresses[..., None] + steps
    return addresses
