"""A network's plain modules run through the native layers, piece by piece.

A piece is the longest run of modules that there is a native operation for (`OPERATIONS`), else one
module of `TORCHS`, which computes itself in the type of the network: torch is as fast there as we
would be (measured), or the module is rare. The modules hold parameters and statistics as ever;
nothing about them changes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from evokernels.errors import BackendError
from evokernels.kernels import native
from evokernels.tasks.layers import (
    LANES,
    Conv,
    ConvNorm,
    ConvPool,
    Drop,
    Dropout,
    Flatten,
    GreyConvPool,
    LinearReLU,
)
from evokernels.tasks.models import ConvNet, Residual

__all__ = ["NativeNetwork"]


class NativeNetwork(nn.Module):
    """A network whose forward and backward pass go through the native library.

    Parameters, buffers and training mode are those of ``network``, float32; gradients are float32
    and can be taken once (no second derivatives).

    Args:
        network: of modules in a row, of which ``OPERATIONS`` and ``TORCHS`` have all pieces.
        dtype: float32 or bfloat16: of activations, and of the weights in products.

    Raises:
        BackendError: the native library does not load, or there is no operation for a module.
    """

    def __init__(self, network: ConvNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        native.library()
        if dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(
                f"native networks compute in torch.float32 or torch.bfloat16, not in {dtype}"
            )
        self.network = network
        self._dtype = dtype
        self._operations = _operations([*network.features, *network.classifier], dtype)

    def __reduce__(self) -> tuple[type, tuple]:  # a copy's operations are of its own modules
        return NativeNetwork, (self.network, self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits float32 (N, classes) of images (N, C, H, W) on the CPU, of any real type.

        Raises:
            BackendError: images are elsewhere; parameters or statistics are no longer float32 on
                the CPU, those of batch norms contiguous.
        """
        x = x.float().contiguous(memory_format=torch.channels_last)
        for tensor in itertools.chain([x], self.parameters(), self.buffers()):
            _check(tensor)
        for operation in self._operations:
            x = operation(x)
        return x.float()


def _check(tensor: torch.Tensor) -> None:
    """The native library is told an address, and takes the rest for granted."""
    if not tensor.is_floating_point():
        return
    place = tensor.dtype, tensor.device.type, tensor.ndim > 1 or tensor.is_contiguous()
    if place != (torch.float32, "cpu", True):
        raise BackendError(
            "a native network is for contiguous torch.float32 tensors on the CPU, but one is "
            f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}; convert it back, "
            "or run the network itself"
        )


Operation = Callable[[torch.Tensor], torch.Tensor]


# What the operations take for granted of their modules.
ASSUMED: dict[type[nn.Module], dict[str, Any]] = {
    nn.Conv2d: {
        **{"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
        **{"groups": 1, "padding_mode": "zeros"},
    },
    nn.MaxPool2d: {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False},
    nn.BatchNorm2d: {"affine": True, "track_running_stats": True},
    nn.Flatten: {"start_dim": 1, "end_dim": -1},
    nn.AdaptiveAvgPool2d: {"output_size": 1},
}


def _is_assumed(module: nn.Module) -> bool:
    if getattr(module, "bias", 0) is None or getattr(module, "momentum", 0) is None:
        return False
    assumed = ASSUMED.get(type(module), {})
    return all(getattr(module, name) == value for name, value in assumed.items())


def _operations(modules: Sequence[nn.Module], dtype: torch.dtype) -> list[Operation]:
    """What stands for these modules: the longest piece first that there is an operation for.

    Raises:
        BackendError: there is neither one nor a module of torch's that may compute itself.
    """
    operations = []
    while modules:
        for types, operation in OPERATIONS.items():
            head = modules[: len(types)]
            if tuple(map(type, head)) == types and all(map(_is_assumed, head)):
                operations.append(operation(dtype, *head))
                modules = modules[len(types) :]
                break
        else:
            if type(modules[0]) not in TORCHS:
                raise BackendError(
                    f"there is no native operation that begins with {modules[0]}; "
                    "run the network itself"
                )
            operations.append(_torchs(dtype, modules[0]))
            modules = modules[1:]
    return operations


def _conv_pool(
    dtype: torch.dtype, conv: nn.Conv2d, _relu: nn.ReLU, _pool: nn.MaxPool2d, *drop: nn.Dropout
) -> Operation:
    grey = conv.in_channels == 1 and conv.out_channels % LANES == 0 and not drop

    def convolve(x: torch.Tensor) -> torch.Tensor:
        if grey and not x.requires_grad:  # the images themselves, which need no gradient
            return GreyConvPool.apply(x, conv.weight, conv.bias, dtype)
        return ConvPool.apply(x.to(dtype), conv.weight, conv.bias, Dropout.of(*drop))

    return convolve


def _conv_norm(
    dtype: torch.dtype, conv: nn.Conv2d, norm: nn.BatchNorm2d, _relu: nn.ReLU
) -> Operation:
    return lambda x: ConvNorm.apply(
        x.to(dtype), conv.weight, conv.bias, norm.weight, norm.bias, norm
    )


def _flatten(dtype: torch.dtype, _flatten: nn.Flatten) -> Operation:
    return lambda x: Flatten.apply(x.to(dtype))


def _linear_relu(
    dtype: torch.dtype, linear: nn.Linear, _relu: nn.ReLU, *drop: nn.Dropout
) -> Operation:
    return lambda x: LinearReLU.apply(x.to(dtype), linear.weight, linear.bias, Dropout.of(*drop))


def _linear(dtype: torch.dtype, linear: nn.Linear) -> Operation:
    return lambda x: nn.functional.linear(
        x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype)
    )


def _conv(dtype: torch.dtype, conv: nn.Conv2d) -> Operation:
    return lambda x: Conv.apply(x.to(dtype), conv.weight, conv.bias)


def _drop(_dtype: torch.dtype, drop: nn.Dropout) -> Operation:
    return lambda x: Drop.apply(x, Dropout.of(drop)) if drop.training else x


def _average(dtype: torch.dtype, _pool: nn.AdaptiveAvgPool2d, _flatten: nn.Flatten) -> Operation:
    return lambda x: x.to(dtype).mean((2, 3))


def _residual(dtype: torch.dtype, residual: Residual) -> Operation:
    first, relu, second = _operations([residual.first, residual.relu, residual.second], dtype)

    def add(x: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype)
        return x + second(relu(first(x)))

    return add


def _torchs(dtype: torch.dtype, module: nn.Module) -> Operation:
    """The module itself, its weights in ``dtype``."""
    rounds = dtype is not torch.float32
    run = functools.partial(_convolved, module) if type(module) is nn.Conv2d else module

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype if rounds else None, enabled=rounds, cache_enabled=False):
            y = run(x.to(dtype))
        # where an image has one channel or one pixel, torch may choose the other layout behind it
        return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y

    return call


def _convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    of_5x5 = conv.kernel_size, conv.padding, conv.padding_mode
    if x.shape[2] > 1 or of_5x5 != ((5, 5), (2, 2), "zeros"):
        return conv(x)
    # Only the middle row of the weights meets the image. Of the others oneDNN 3.x does not write
    # the gradients in bfloat16: with 128 channels on AMX they are what was in memory before.
    settings = conv.stride, (0, 2), conv.dilation, conv.groups
    return torch.conv2d(x, conv.weight[:, :, 2:3], conv.bias, *settings)


OPERATIONS: dict[tuple[type[nn.Module], ...], Callable[..., Operation]] = {
    (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Dropout): _conv_pool,
    (nn.Conv2d, nn.ReLU, nn.MaxPool2d): _conv_pool,
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU): _conv_norm,
    (nn.Flatten,): _flatten,
    (nn.Linear, nn.ReLU, nn.Dropout): _linear_relu,
    (nn.Linear, nn.ReLU): _linear_relu,
    (nn.Linear,): _linear,
    (nn.Conv2d,): _conv,
    (nn.Dropout,): _drop,
    (nn.AdaptiveAvgPool2d, nn.Flatten): _average,
    (Residual,): _residual,
}

# What lies between products, and products that the native library has no part in.
TORCHS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.ReLU, nn.GELU)
