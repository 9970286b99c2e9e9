"""Steps over every dtype and memory layout, for a checker of memory accesses to watch:
``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python sanitized_steps.py BACKEND``. Else
tensors lie side by side in torch's memory, and it does not see who writes where."""

from __future__ import annotations

import sys

import torch
from cases import layouts
from contract import RICH
from oracle import DTYPES

from evokernels import FusedEvolvedOptimizer

ODD = (1, 7, 63, 1025, 4097)


def take_steps(backend: str, device: str) -> None:
    """A few steps of everything, by the long way and by the short one."""
    for dtype in DTYPES:
        _, pairs = layouts(dtype)
        pairs = [tuple(elsewhere(t, device) for t in pair) for pair in pairs.values()]
        pairs += [(torch.ones(n, dtype=dtype, device=device),) * 2 for n in ODD]
        params = [torch.nn.Parameter(p) for p, _ in pairs]
        for stochastic in (False, True):
            optimizer = FusedEvolvedOptimizer(
                params,
                RICH,
                total_steps=9,
                stochastic_rounding=stochastic,
                state_dtype=torch.bfloat16 if stochastic and dtype != torch.float16 else None,
                max_grad_norm=1.0,
                zero_grads=True,
                backend=backend,
            )
            for _ in range(3):
                for p, (_, g) in zip(params, pairs, strict=True):
                    p.grad = g.clone() if g.is_contiguous() else g
                optimizer.step()


def elsewhere(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The whole storage of a tensor on a device, and the tensor as it lies in there."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    place = tensor.shape, tensor.stride(), tensor.storage_offset()
    return memory.to(device).as_strided(*place)


if __name__ == "__main__":
    take_steps(sys.argv[1], "cuda")
    torch.cuda.synchronize()
