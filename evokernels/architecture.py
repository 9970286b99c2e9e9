"""The architecture genome: a network as a bounded sequence of components from a fixed catalogue.

What a sequence becomes for images of a given shape, `evokernels.tasks.decoding` says.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from evokernels.document import Document
from evokernels.errors import ArchitectureError

__all__ = ["CATALOGUE", "LEAST_PARAMETERS", "MAX_LENGTH", "SIZES", "Architecture", "kind_and_size"]

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
    "dropout": (0.1, 0.25, 0.3, 0.5),
    "dense": (32, 64, 128, 256, 512),
}

# Every component by its name: "conv3x3 32", "maxpool", "dropout 0.25", …
CATALOGUE: tuple[str, ...] = tuple(
    name
    for kind, sizes in SIZES.items()
    for name in ([f"{kind} {size:g}" for size in sizes] if sizes else [kind])
)


def kind_and_size(component: str) -> tuple[str, float | None]:
    """Of a name of `CATALOGUE`; no size (None) for a kind that has none."""
    kind, _, size = component.partition(" ")
    return kind, float(size) if size else None


@dataclasses.dataclass(frozen=True)
class Architecture(Document):
    """A network as a sequence of components: immutable, hashable, validated on construction.

    Args:
        components: names from `CATALOGUE`, at most 24, the first next to the images; none is a
            linear classifier. A classifier follows the last one.
        max_parameters: what the network may have at most; at least 1,000.

    Raises:
        ArchitectureError: naming the field, the value given and the values allowed.
    """

    NOUN: ClassVar[str] = "architecture"
    ERROR: ClassVar[type[ArchitectureError]] = ArchitectureError
    NO_CONSTANT: ClassVar[str] = "an architecture has whole numbers only"

    components: Sequence[str] = ()
    max_parameters: int = 1_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", _checked_components(self.components))
        object.__setattr__(self, "max_parameters", _checked_budget(self.max_parameters))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "schema_version": self.SCHEMA_VERSION,
            "components": list(self.components),
            "max_parameters": self.max_parameters,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`.

        Raises:
            ArchitectureError: unknown or missing field, unknown version, or an invalid value.
        """
        return cls(**cls._fields(data, versioned=True))


def _checked_components(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ArchitectureError(f"components must be a list or tuple of names, got {value!r}")
    if len(value) > MAX_LENGTH:
        raise ArchitectureError(
            f"components has {len(value)} entries; an architecture has at most {MAX_LENGTH}"
        )
    for name in value:
        if not isinstance(name, str) or name not in CATALOGUE:
            close = difflib.get_close_matches(str(name), CATALOGUE, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(CATALOGUE)}"
            raise ArchitectureError(f"components holds {name!r}, which is no component; {hint}")
    return tuple(map(str, value))  # also where NumPy has drawn them


def _checked_budget(value: Any) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < LEAST_PARAMETERS:
        raise ArchitectureError(
            f"max_parameters must be a whole number of at least {LEAST_PARAMETERS:,}, got {value!r}"
        )
    return int(value)
