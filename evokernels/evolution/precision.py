"""In which precision networks compute; weights, moments and updates are float32 in all of them."""

from __future__ import annotations

import pathlib
import re

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from evokernels.errors import SettingsError
from evokernels.tasks import ConvNet, NativeNetwork

__all__ = ["PRECISIONS", "best_precision", "computing"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Features of a processor that multiplies bfloat16 faster than float32; with less, oneDNN converts
# every operand first, which takes longer than it saves.
FASTER_IN_BFLOAT16 = ("amx_bf16", "avx512_bf16")
PROCESSORS = pathlib.Path("/proc/cpuinfo")


def best_precision(device: torch.device) -> tuple[str, str]:
    """The precision that is the faster one on ``device``, and why."""
    if device.type != "cpu":
        return "float32", f"bfloat16 is for those who ask for it on {device.type}"
    features = _features()
    for feature in FASTER_IN_BFLOAT16:
        if feature in features:
            return "bfloat16", f"the processor has {feature}"
    return "float32", f"the processor has neither {' nor '.join(FASTER_IN_BFLOAT16)}"


def computing(
    model: torch.nn.Module, device: torch.device, precision: str, *, plain: bool = False
) -> torch.nn.Module:
    """What to call in place of ``model``, with its parameters, for logits in float32.

    Networks for images (`ConvNet`, those of architectures too) go through the native layers on a
    CPU, unless second derivatives are needed. Everything else is torch's own operations.

    Args:
        model: on ``device``.
        device: where it is.
        precision: "float32" or "bfloat16".
        plain: only operations that have second derivatives, for whoever needs those.

    Raises:
        SettingsError: another precision.
        BackendError: the native library is missing, which the image networks need on a CPU.
    """
    if precision not in PRECISIONS:
        raise SettingsError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = PRECISIONS[precision]
    if plain:
        model = TwiceDifferentiable(model)
    elif device.type == "cpu" and isinstance(model, ConvNet):
        return NativeNetwork(model, dtype)
    return model if dtype is torch.float32 else Autocast(model, device.type, dtype)


class TwiceDifferentiable(torch.nn.Module):
    """A model whose attention is computed step by step: fused, it has first derivatives only."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the model returns."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(x)


class Autocast(torch.nn.Module):
    """A model whose products torch's autocast computes in ``dtype``; logits are float32."""

    def __init__(self, model: torch.nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        # without the cache of cast weights, which a CUDA graph would not refill
        self._settings = {"device_type": device_type, "dtype": dtype, "cache_enabled": False}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, whatever their shape."""
        with torch.autocast(**self._settings):
            return self.model(x).float()


def _features() -> list[str]:
    if not PROCESSORS.exists():
        return []
    flags = re.search(r"^flags\s*:(.*)$", PROCESSORS.read_text(), re.MULTILINE)
    return flags[1].split() if flags else []
