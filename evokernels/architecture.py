"""The architecture genome: a network as a bounded sequence of components from a fixed catalogue.

What a sequence becomes for images of a given shape, `evokernels.tasks.decoding` says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from evokernels.errors import ArchitectureError

__all__ = ["CATALOGUE", "MAX_LENGTH", "Architecture"]

SCHEMA_VERSION = 1

MAX_LENGTH = 24
LEAST_PARAMETERS = 1_000

# Kind of component → the sizes that it comes in: channels, units or a probability.
SIZES: dict[str, tuple[float, ...]] = {
    "conv3x3": (8, 16, 32, 64, 128),
    "conv5x5": (8, 16, 32, 64, 128),
    "depthwise3x3": (),
    "residual": (),  # x + conv3x3(relu(conv3x3(x))), as many channels as there are
    "maxpool": (),
    "avgpool": (),
    "batchnorm": (),
    "relu": (),
    "gelu": (),
    "dropout": (0.1, 0.25, 0.5),
    "dense": (32, 64, 128, 256, 512),
}

# Every component by its name: "conv3x3 32", "maxpool", "dropout 0.25", …
CATALOGUE: tuple[str, ...] = tuple(
    name
    for kind, sizes in SIZES.items()
    for name in ([f"{kind} {size:g}" for size in sizes] if sizes else [kind])
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network as a sequence of components: immutable, hashable, validated on construction.

    Args:
        components: names from `CATALOGUE`, at most 24, the first next to the images; none is a
            linear classifier. A classifier follows the last one.
        max_parameters: what the network may have at most; at least 1,000.

    Raises:
        ArchitectureError: naming the field, the value given and the values allowed.
    """

    components: Sequence[str] = ()
    max_parameters: int = 1_000_000
