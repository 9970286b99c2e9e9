"""Layers on a CPU: what lies between products, read once and written once by csrc/layers.h.

Relu, pooling and dropout are one operation, batch norm and relu another one. Convolutions and
matrix products are torch's, but for the weight gradients of convolutions where csrc/convolution.h
has them.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from evokernels.errors import BackendError
from evokernels.kernels import native

__all__ = [
    "LANES",
    "Conv",
    "ConvNorm",
    "ConvPool",
    "Drop",
    "Dropout",
    "Flatten",
    "GreyConvPool",
    "LinearReLU",
    "weight_gradient",
]

NORM_ROWS = 256  # EVK_NORM_ROWS
LANES = 16  # EVK_LANES
GROUP_IMAGES = 32  # EVK_GROUP_IMAGES
GROUP_OUTPUTS = 32  # EVK_GROUP_OUTPUTS
RANDOM_STEPS = 2**16  # of the 16 random bits of an element


class Images(ctypes.Structure):
    """evk_images."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("images", "height", "width", "channels"))


class Dropout(ctypes.Structure):
    """evk_dropout."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    )

    @classmethod
    def of(cls, module: nn.Dropout | None = None) -> Dropout:
        """Of a module as it is now, with a seed from torch's default generator.

        The probability is that of the module, rounded to a multiple of 2**-16; what is kept is
        scaled by what makes the mean exact.
        """
        if module is None or not module.training:
            return cls(0, 0, 1.0)
        threshold = round(module.p * RANDOM_STEPS)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return cls(seed, threshold, RANDOM_STEPS / max(RANDOM_STEPS - threshold, 1))


class Norm(ctypes.Structure):
    """evk_norm."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "variance")),
        ("momentum", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


Gradients = tuple[torch.Tensor | None, ...]


class GreyConvPool(torch.autograd.Function):
    """Convolution of one channel, relu and pooling of 2×2, in float32, rounded once to ``dtype``.

    (N, 1, H, W) with weights (K, 1, 3, 3) → (N, K, H // 2, W // 2), channels_last. There is no
    gradient of the images.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        images, colours, height, width = x.shape
        if colours != 1:
            raise BackendError(f"the network is for images of one channel, got {colours}")
        channels = len(weight)
        x = nn.functional.pad(x.float(), (1, 1, 1, 1)).contiguous()
        weights = torch.cat([weight.reshape(channels, -1).t(), bias[None]])
        shape = Images(images, height, width, channels)
        y = _empty_images(dtype, images, channels, height // 2, width // 2)
        code = torch.empty(y.numel(), dtype=torch.uint8)
        native.library().evk_convolve_pool(
            *(x.data_ptr(), weights.data_ptr(), y.data_ptr(), code.data_ptr()),
            *(ctypes.byref(shape), *_format_and_threads(y)),
        )
        ctx.save_for_backward(x, code)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        if ctx.needs_input_grad[0]:
            raise BackendError(
                "the native network has no gradient of its images; run the network itself"
            )
        x, code = ctx.saved_tensors
        shape = ctx.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums = _floats(shape.images, 10, shape.channels)
        native.library().evk_convolve_pool_backward(
            *(gradient.data_ptr(), code.data_ptr(), x.data_ptr(), sums.data_ptr()),
            *(ctypes.byref(shape), *_format_and_threads(gradient)),
        )
        sums = sums.sum(0)
        return None, sums[:9].t().reshape(-1, 1, 3, 3), sums[9], None


class Conv(torch.autograd.Function):
    """Convolution: (N, C, H, W) with weights (K, C, 3, 3) → (N, K, H, W), channels_last."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        # added up in float32, and rounded once: to be returned in float32 takes three times as long
        of_bias = gradient.sum((0, 2, 3)).float()
        return *_convolution_gradients(ctx, gradient, *ctx.saved_tensors), of_bias


class ConvPool(torch.autograd.Function):
    """Convolution, relu, pooling of 2×2 and dropout.

    (N, C, H, W) with weights (K, C, 3, 3) → (N, K, H // 2, W // 2), channels_last.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dropout: Dropout
    ) -> torch.Tensor:
        weight = weight.to(x.dtype)
        full = _convolved(x, weight, bias)
        images, channels, height, width = full.shape
        shape = Images(images, height, width, channels)
        y = _empty_images(full.dtype, images, channels, height // 2, width // 2)
        code = torch.empty(y.numel(), dtype=torch.uint8)
        native.library().evk_pool(
            *(full.data_ptr(), y.data_ptr(), code.data_ptr()),
            *(ctypes.byref(shape), ctypes.byref(dropout), *_format_and_threads(full)),
        )
        ctx.save_for_backward(x, weight, code)
        ctx.shape, ctx.scale = shape, dropout.scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        x, weight, code = ctx.saved_tensors
        shape = ctx.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        full = _empty_images(
            gradient.dtype, shape.images, shape.channels, shape.height, shape.width
        )
        sums = _floats(shape.images, shape.channels)
        native.library().evk_pool_backward(
            *(gradient.data_ptr(), code.data_ptr(), full.data_ptr(), sums.data_ptr()),
            *(ctypes.byref(shape), ctx.scale, *_format_and_threads(gradient)),
        )
        return *_convolution_gradients(ctx, full, x, weight), sums.sum(0), None


class ConvNorm(torch.autograd.Function):
    """Convolution, batch norm and relu: (N, C, H, W) → (N, K, H, W), channels_last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        norm: nn.BatchNorm2d,
    ) -> torch.Tensor:
        weight = weight.to(x.dtype)
        full = _convolved(x, weight, bias)
        channels = full.shape[1]
        rows = full.numel() // channels
        y = torch.empty_like(full)
        if norm.training:
            if rows < 2:
                raise BackendError(
                    f"a batch norm needs more than one value a channel to train with, got {rows}; "
                    "use larger batches"
                )
            saved, sums = _floats(4, channels), _room_for_sums(rows, channels)
            native.library().evk_norm_relu(
                *(full.data_ptr(), y.data_ptr(), ctypes.byref(_norm(norm)), saved.data_ptr()),
                *(sums.data_ptr(), rows, channels),
                *_format_and_threads(full),
            )
            norm.num_batches_tracked += 1
            ctx.save_for_backward(x, weight, full, saved)
        else:
            factor = norm_weight * (norm.running_var + norm.eps).rsqrt()
            saved = torch.stack([norm.running_mean, factor, factor, norm_bias])
            native.library().evk_scale_relu(
                *(full.data_ptr(), y.data_ptr(), saved.data_ptr(), rows, channels),
                *_format_and_threads(full),
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        if not ctx.saved_tensors:
            raise BackendError(
                "a native batch norm has no gradient in eval mode; run the network itself"
            )
        x, weight, full, saved = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        channels = full.shape[1]
        rows = full.numel() // channels
        result = torch.empty_like(full)
        parameters, sums = _floats(2, channels), _room_for_sums(rows, channels)
        native.library().evk_norm_relu_backward(
            *(gradient.data_ptr(), full.data_ptr(), saved.data_ptr(), result.data_ptr()),
            *(parameters.data_ptr(), sums.data_ptr()),
            *(rows, channels, *_format_and_threads(full)),
        )
        # a constant before the norm changes nothing behind it
        bias = torch.zeros(channels, dtype=torch.float32)
        return *_convolution_gradients(ctx, result, x, weight), bias, *parameters, None


class Flatten(torch.autograd.Function):
    """Flattening as of images with the channels outermost: (N, C, H, W) → (N, C · H · W)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = ctx.shape = x.shape
        y = torch.empty(images, channels * height * width, dtype=x.dtype)
        _transpose(x, y, images, height * width, channels)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = ctx.shape
        gradient = gradient.contiguous()
        result = _empty_images(gradient.dtype, *ctx.shape)
        _transpose(gradient, result, images, channels, height * width)
        return result


class LinearReLU(torch.autograd.Function):
    """Linear layer, relu and dropout: (N, I) with weights (O, I) → (N, O)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dropout: Dropout
    ) -> torch.Tensor:
        weight = weight.to(x.dtype)
        y = _product(x, weight, bias.to(x.dtype))
        native.library().evk_relu(
            y.data_ptr(), y.numel(), ctypes.byref(dropout), *_format_and_threads(y)
        )
        ctx.save_for_backward(x, weight, y)
        ctx.scale = dropout.scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        x, weight, y = ctx.saved_tensors
        gradient = gradient.contiguous()
        before = torch.empty_like(gradient)
        native.library().evk_relu_backward(
            *(gradient.data_ptr(), y.data_ptr(), before.data_ptr(), y.numel()),
            *(ctx.scale, *_format_and_threads(y)),
        )
        of_x = _product(before, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _product(before.t(), x.t()).float()
        return of_x, of_weight, before.sum(0, dtype=torch.float32), None


class Drop(torch.autograd.Function):
    """Dropout. As in torch, what is dropped is multiplied by zero: a NaN stays one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
        kept = torch.ones_like(x)
        # of ones, relu and dropout leave exactly what is kept; scaled apart, it is rounded once
        unscaled = Dropout(dropout.seed, dropout.threshold, 1.0)
        native.library().evk_relu(
            kept.data_ptr(), kept.numel(), ctypes.byref(unscaled), *_format_and_threads(kept)
        )
        ctx.save_for_backward(kept)
        ctx.scale = dropout.scale
        return (x * kept).mul_(dropout.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def _transpose(x: torch.Tensor, y: torch.Tensor, *shape: int) -> None:
    """Matrices, rows and columns of x, as they lie, to y."""
    native.library().evk_transpose(x.data_ptr(), y.data_ptr(), *shape, *_format_and_threads(x))


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (N, I) times the transpose of weight (O, I), and bias."""
    if torch.backends.mkldnn.is_available() and (
        x.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        # oneDNN also for float32, where torch takes BLAS: MKL leaves AVX-512 of other makers'
        # processors unused, and takes twice as long there (measured)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    full = torch.conv2d(x, weight, bias.to(x.dtype), padding=1)
    # one channel lies alike in both layouts, and torch chooses the other one
    return full.contiguous(memory_format=torch.channels_last)


def _convolution_gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Of x, where anyone asks for it, and of the weights, float32."""
    native_weights = native.has_convolution_weights()
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *(gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        [ctx.needs_input_grad[0], not native_weights, False],
    )
    return of_x, weight_gradient(gradient, x) if native_weights else of_weight.float()


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of a convolution's weights, where `native.has_convolution_weights()`.

    Args:
        gradient: (N, K, H, W), channels_last.
        x: (N, C, H, W), channels_last, of the same type: float32 or bfloat16.

    Returns:
        float32 (K, C, 3, 3), channels_last.
    """
    outputs, library = gradient.shape[1], native.library()
    images, channels, height, width = x.shape
    shape = Images(images, height, width, channels)
    kind, threads = _format_and_threads(x)
    padded = math.ceil(outputs / GROUP_OUTPUTS) * GROUP_OUTPUTS
    sums = _floats(math.ceil(images / GROUP_IMAGES), 9 * channels, padded)
    room = _floats(threads, library.evk_convolution_room(ctypes.byref(shape), outputs, kind))
    library.evk_convolution_weights(
        *(gradient.data_ptr(), x.data_ptr(), sums.data_ptr(), room.data_ptr()),
        *(ctypes.byref(shape), outputs, kind, threads),
    )
    rows = sums.sum(0)[:, :outputs].t().contiguous()
    return rows.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32)  # whatever torch's default type is


def _empty_images(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def _room_for_sums(rows: int, channels: int) -> torch.Tensor:
    return _floats(math.ceil(rows / NORM_ROWS), 2, channels)


def _norm(norm: nn.BatchNorm2d) -> Norm:
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return Norm(*(tensor.data_ptr() for tensor in tensors), norm.momentum, norm.eps)


def _format_and_threads(tensor: torch.Tensor) -> tuple[int, int]:
    return native.FORMATS[tensor.dtype], torch.get_num_threads()
