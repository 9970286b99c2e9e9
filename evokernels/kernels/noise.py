"""Noise of a model's tensors: added to them, or a whole population's summed up, never stored.

The noise of an element is a standard normal float32 number, a function of seed, generation, member,
the tensor's position in its model and the element's number in it alone (csrc/noise.h). Elements
count row by row, however they lie in memory. Every backend computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evokernels.kernels.noise_backends import NativeNoise, NoisyTensor, TensorNoise, TorchNoise
from evokernels.kernels.noise_device import CudaNoise
from evokernels.kernels.plan import ARITHMETIC
from evokernels.kernels.registry import choose

__all__ = ["NOISE_BACKENDS", "ModelNoise", "NoisyTensor", "select_noise"]

# In the order in which "auto" tries them.
NOISE_BACKENDS: dict[str, type[TensorNoise]] = {
    "cpu": NativeNoise,
    "cuda": CudaNoise,
    "eager": TorchNoise,
}


def select_noise(
    device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> tuple[str, dict[str, str]]:
    """The name of the backend for a device and dtype, and why those before it cannot run there.

    Raises:
        BackendError: unknown name, or the backend asked for cannot run there, with its reason.
    """
    chosen, rejected = choose(
        {name: name for name in NOISE_BACKENDS},
        lambda name: _unknown(dtype) or NOISE_BACKENDS[name].why_not(device, dtype),
        backend,
    )
    return chosen, rejected


class ModelNoise:
    """The noise of a model's tensors, each through the backend that its device has.

    Args:
        tensors: they may be of several dtypes and devices; kept as long as this is.
        backend: "auto", or a name in `NOISE_BACKENDS`.

    Raises:
        BackendError: as `select_noise` says.
    """

    def __init__(self, tensors: Sequence[NoisyTensor], backend: str = "auto") -> None:
        chosen: dict[tuple[str, torch.device], list[NoisyTensor]] = {}
        for noisy in tensors:
            device = noisy.target.device
            name, _ = select_noise(device, noisy.target.dtype, backend)
            chosen.setdefault((name, device), []).append(noisy)
        self._parts = [NOISE_BACKENDS[name](part) for (name, _), part in chosen.items()]

    def perturb(self, seed: int, generation: int, member: int, scale: float) -> None:
        """target = centre + scale * noise, for one member of a generation.

        In float32 (float64 for float64 tensors): a product and a sum, each rounded, then one
        rounding to nearest in the target's dtype.

        Args:
            seed: of 64 bits; `generation` and `member` of 32.
            scale: sigma, with the member's sign.
        """
        for part in self._parts:
            part.perturb(seed, generation, member, scale)

    def estimate(self, seed: int, generation: int, weights: Sequence[float]) -> None:
        """target = sum_k weights[k] * (noise of member k), added up in float64 in that order.

        One pass over the tensors, whatever the number of members. Rounded to float32 (but for
        float64 tensors), then to the target's dtype.
        """
        for part in self._parts:
            part.estimate(seed, generation, weights)


def _unknown(dtype: torch.dtype) -> str | None:
    allowed = ", ".join(map(str, ARITHMETIC))
    return None if dtype in ARITHMETIC else f"tensors are {dtype}; they may be {allowed}"
