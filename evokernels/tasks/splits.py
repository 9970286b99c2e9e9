"""How many samples of a training split are trained with, and how many are held back."""

from __future__ import annotations

import numbers

from evokernels.errors import DatasetError

__all__ = ["check_whole", "training_size"]


def training_size(
    available: int, train_samples: int | None, validation_samples: int, holder: str, samples: str
) -> int:
    """Samples that are trained with: ``train_samples``, or with None all that are not held back.

    Args:
        available: samples that the training split has.
        train_samples: number of them to train with, or None.
        validation_samples: number of them to hold back.
        holder: names the data set in an error.
        samples: what its samples are, in the plural.

    Raises:
        DatasetError: a number out of bounds, or more than there are.
    """
    there_are = f"but {holder} has {available} training {samples} here"
    if not _is_whole(validation_samples) or not 0 <= validation_samples < available:
        raise DatasetError(
            f"validation_samples is {validation_samples!r}, {there_are}; "
            f"give a whole number from 0 to {available - 1}"
        )
    most = available - validation_samples
    if train_samples is None:
        return most
    if not _is_whole(train_samples) or not 1 <= train_samples <= most:
        held_back = f", {validation_samples} of them for validation" if validation_samples else ""
        raise DatasetError(
            f"train_samples is {train_samples!r}, {there_are}{held_back}; "
            f"give a whole number from 1 to {most}, or None for all"
        )
    return int(train_samples)


def check_whole(name: str, value: int, least: int) -> None:
    """Raise DatasetError unless an argument is a whole number of at least ``least``."""
    if not _is_whole(value) or value < least:
        raise DatasetError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _is_whole(value: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
