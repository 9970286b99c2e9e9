"""Where tensors lie in memory: whether a kernel may walk them together, or must not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["find_overlap", "lie_alike_and_densely", "memory_keys", "overlaps_itself"]


def memory_keys(tensors: Iterable[torch.Tensor]) -> list[tuple]:
    """Equal as long as the tensors mean the same memory in the same way.

    Never the address alone: allocators hand the same one out again for another size.
    """
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


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
