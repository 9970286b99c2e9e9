"""Batches of a data set in memory: shuffled, augmented and normalised as whole tensors."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import numpy as np
import torch

from evokernels.errors import DatasetError
from evokernels.tasks.datasets import ImageData

__all__ = ["test_batches", "training_batches"]

CROP_PADDING = 4  # pixels on each side, as in the source system


def training_batches(
    data: ImageData, batch_size: int, steps: int, seed: int, augment: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Exactly ``steps`` batches: x float32 (B, C, H, W), normalised, and y int64 (B,).

    Every epoch is a new permutation of the training images; images left over at its end that do
    not fill a batch are dropped. The batches depend on the arguments alone: not on torch's
    global generator, nor on the number of threads.

    Args:
        data: the data set.
        batch_size: images in a batch, at most as many as there are training images.
        steps: number of batches, at least 0.
        seed: whole number, at least 0; of the order and, apart from it, of the augmentation.
        augment: mirror an image with probability 1/2 and crop it, at a random place, from itself
            padded with 4 black pixels on each side.

    Raises:
        DatasetError: an argument out of these bounds; at the call, before the first batch.
    """
    _check_whole("batch_size", batch_size, least=1)
    _check_whole("steps", steps, least=0)
    _check_whole("seed", seed, least=0)
    if batch_size > len(data.y_train):
        raise DatasetError(
            f"batch_size is {batch_size}, but {data.name!r} has {len(data.y_train)} training "
            "images here; use a smaller batch or more train_samples"
        )
    return _training_batches(data, batch_size, steps, seed, augment)


def test_batches(data: ImageData, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test split in order: x float32 (B, C, H, W), normalised, and y int64 (B,).

    The last batch has what is left over. Raises DatasetError for a ``batch_size`` below 1.
    """
    _check_whole("batch_size", batch_size, least=1)
    return (
        (_normalised(x, data), y)
        for x, y in zip(data.x_test.split(batch_size), data.y_test.split(batch_size), strict=True)
    )


def _training_batches(
    data: ImageData, batch_size: int, steps: int, seed: int, augment: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Two streams, so that augmentation does not change the order. Mixed seeds, because a run
    # seeds its weights and dropout with the same number, and because torch's generator would
    # take 2**32 + 1 for 1.
    order_seed, augmentation_seed = np.random.SeedSequence(seed).generate_state(2)
    order = torch.Generator().manual_seed(int(order_seed))
    augmentation = torch.Generator().manual_seed(int(augmentation_seed))
    for step in range(steps):
        start = step % (len(data.y_train) // batch_size) * batch_size
        if start == 0:
            permutation = torch.randperm(len(data.y_train), generator=order)
        chosen = permutation[start : start + batch_size]
        x = data.x_train[chosen]
        if augment:
            x = _mirrored_and_cropped(x, augmentation)
        yield _normalised(x, data), data.y_train[chosen]


def _mirrored_and_cropped(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image of a uint8 batch (B, C, H, W) mirrored or not and moved by up to 4 pixels."""
    batch, _, height, width = x.shape
    mirrored = torch.randint(2, (batch, 1, 1, 1), generator=generator, dtype=torch.bool)
    x = torch.where(mirrored, x.flip(3), x)
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, batch), generator=generator)
    padded = torch.nn.functional.pad(x, (CROP_PADDING,) * 4)
    # All crops of every image as a view (B, C, 9, 9, H, W) without a copy; one of them is taken.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch), :, top, left]


def _normalised(x: torch.Tensor, data: ImageData) -> torch.Tensor:
    """(x / 255 - mean) / std of uint8 (B, C, H, W), as float32."""
    mean = torch.tensor(data.mean, dtype=torch.float32).view(-1, 1, 1)
    std = torch.tensor(data.std, dtype=torch.float32).view(-1, 1, 1)
    return x.to(torch.float32).div_(255).sub_(mean).div_(std)


def _check_whole(name: str, value: int, least: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise DatasetError(f"{name} must be a whole number of at least {least}, got {value!r}")
