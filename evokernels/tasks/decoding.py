"""What an architecture becomes for images of a given shape: the repair rule, and the network.

Any sequence of components decodes to a network that works. It is read from the images on, and a
component is left out where it cannot act or would be too much:

- what needs an image (convolutions, residual pairs, pooling, batch norm) behind a dense layer;
- pooling of 2×2 where the height or the width is below 2;
- a batch norm of images of one pixel, which have no variance in a batch of one;
- a batch norm right behind a batch norm, an activation right behind an activation, and a relu that
  only pooling and dropout separate from the relu before: they change nothing, or next to nothing;
- what would bring the network, with the classifier that would follow, above ``max_parameters``.

``dense`` flattens an image. An image that is left at the end is averaged over its pixels. Then
comes the classifier, which is linear. Nothing that is left out is made up for later.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from torch import nn

from evokernels.architecture import Architecture, kind_and_size
from evokernels.errors import ArchitectureError
from evokernels.tasks.models import ConvNet, Residual

__all__ = ["Decoded", "build", "decode"]

ACTIVATIONS = ("relu", "gelu")
ANYWHERE = (*ACTIVATIONS, "dropout", "dense")  # everything else needs an image
KEEPS_SIGN = ("maxpool", "avgpool", "dropout")  # of what is not negative


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What an architecture becomes.

    Attributes:
        components: what is kept of the sequence.
        parameters: of the network, its classifier included.
    """

    components: tuple[str, ...]
    parameters: int


@functools.cache
def decode(architecture: Architecture, shape: tuple[int, int, int], classes: int) -> Decoded:
    """What is kept of an architecture.

    Args:
        architecture: any.
        shape: of an image: channels, height, width.
        classes: that the network tells apart.

    Raises:
        ArchitectureError: images without pixels or no classes, or a classifier alone has more than
            ``max_parameters``.
    """
    if len(shape) != 3 or min(*shape, classes) < 1:
        raise ArchitectureError(
            "images have the shape (channels, height, width) and belong to classes, "
            f"at least one of each, got {shape!r} and {classes!r}"
        )
    kept: list[str] = []
    parameters, classifier = 0, _linear(shape[0], classes)
    if classifier > architecture.max_parameters:
        raise ArchitectureError(
            f"max_parameters is {architecture.max_parameters:,}, but a classifier of {shape[0]} "
            f"channels into {classes} classes has {classifier:,}; allow at least as many"
        )
    for component in architecture.components:
        if not _acts(component, kept, shape):
            continue
        following = _shape_behind(component, shape)
        more = parameters + _parameters(component, shape)
        if more + _linear(following[0], classes) <= architecture.max_parameters:
            kept.append(component)
            shape, parameters = following, more
    return Decoded(tuple(kept), parameters + _linear(shape[0], classes))


# Of an image (channels, height, width), or behind a dense layer (units,).
Shape = tuple[int, ...]


def _acts(component: str, kept: list[str], shape: Shape) -> bool:
    kind, _ = kind_and_size(component)
    before = [kind_and_size(name)[0] for name in kept]
    last = before[-1] if before else None
    if kind in ACTIVATIONS and last in ACTIVATIONS:
        return False
    if kind == "relu":
        return next((name for name in reversed(before) if name not in KEEPS_SIGN), "") != "relu"
    if kind in ANYWHERE:
        return True
    if len(shape) == 1:
        return False
    if kind in ("maxpool", "avgpool"):
        return min(shape[1:]) >= 2
    if kind == "batchnorm":
        return last != "batchnorm" and math.prod(shape[1:]) > 1
    return True


def _shape_behind(component: str, shape: Shape) -> Shape:
    kind, size = kind_and_size(component)
    if kind in ("conv3x3", "conv5x5"):
        return int(size), *shape[1:]
    if kind in ("maxpool", "avgpool"):
        return shape[0], shape[1] // 2, shape[2] // 2
    return (int(size),) if kind == "dense" else shape


def _parameters(component: str, shape: Shape) -> int:
    kind, size = kind_and_size(component)
    channels = shape[0]
    match kind:
        case "conv3x3":
            return int(size) * (9 * channels + 1)
        case "conv5x5":
            return int(size) * (25 * channels + 1)
        case "depthwise3x3":
            return channels * (9 + 1)
        case "residual":
            return 2 * channels * (9 * channels + 1)
        case "batchnorm":
            return 2 * channels
        case "dense":
            return _linear(math.prod(shape), int(size))
    return 0


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


class DecodedNetwork(ConvNet):
    """Of an architecture: images go through ``features``, numbers of an image each through
    ``classifier``."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier


def build(architecture: Architecture, shape: tuple[int, int, int], classes: int) -> ConvNet:
    """A new, freshly initialised network of what `decode` keeps.

    Its modules are made from the images on, so that networks of the same modules have the same
    weights with the same seed.

    Args:
        architecture: any.
        shape: of an image: channels, height, width.
        classes: that the network tells apart.

    Raises:
        ArchitectureError: as `decode`.
    """
    features, classifier = [], []
    current: Shape = shape
    for component in decode(architecture, shape, classes).components:
        if component.startswith("dense") and len(current) == 3:
            classifier.append(nn.Flatten())
        part = classifier if classifier else features
        part.append(_module(component, current))
        current = _shape_behind(component, current)
    if len(current) == 3:
        classifier += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    classifier.append(nn.Linear(current[0], classes))
    return DecodedNetwork(nn.Sequential(*features), nn.Sequential(*classifier))


def _module(component: str, shape: Shape) -> nn.Module:
    kind, size = kind_and_size(component)
    channels = shape[0]
    match kind:
        case "conv3x3":
            return nn.Conv2d(channels, int(size), 3, padding=1)
        case "conv5x5":
            return nn.Conv2d(channels, int(size), 5, padding=2)
        case "depthwise3x3":
            return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        case "residual":
            return Residual(channels)
        case "maxpool":
            return nn.MaxPool2d(2)
        case "avgpool":
            return nn.AvgPool2d(2)
        case "batchnorm":
            return nn.BatchNorm2d(channels)
        case "relu":
            return nn.ReLU()
        case "gelu":
            return nn.GELU()
        case "dropout":
            return nn.Dropout(size)
        case "dense":
            return nn.Linear(math.prod(shape), int(size))
    raise AssertionError(f"{kind} is in the catalogue, but has no module")
