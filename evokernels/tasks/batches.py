"""Batches of a data set in memory: shuffled, augmented and normalised as whole tensors.

What is random in them is drawn apart from making them (`draw_batches`, `Batches`): a CPU draws the
same numbers wherever the images lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from evokernels.errors import DatasetError
from evokernels.tasks.datasets import ImageData
from evokernels.tasks.splits import check_whole

__all__ = ["Batches", "Draw", "draw_batches", "stack_draws", "test_batches", "training_batches"]

CROP_PADDING = 4  # pixels on each side, as in the source system


class Draw(NamedTuple):
    """What is random in a training batch; stacked, each tensor has a dimension (steps,) in front.

    Attributes:
        chosen: int64 (B,), places of its images in the training split.
        mirrored: bool (B,), which of them are mirrored; None without augmentation, as the rest.
        top: int64 (B,), where the crop begins in the padded image, 0 to 8.
        left: like ``top``.
    """

    chosen: torch.Tensor
    mirrored: torch.Tensor | None = None
    top: torch.Tensor | None = None
    left: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Draw:
        """``function`` of each tensor that is there."""
        return Draw(*(None if tensor is None else function(tensor) for tensor in self))


def draw_batches(
    data: ImageData, batch_size: int, steps: int, seed: int, augment: bool
) -> Iterator[Draw]:
    """What is random in exactly ``steps`` batches, on the CPU.

    Every epoch is a new permutation of the training images; images left over at its end that do
    not fill a batch are dropped. The draws depend on the arguments alone: not on torch's global
    generator, nor on the number of threads, nor on where the images lie.

    Args:
        data: the data set.
        batch_size: images in a batch, at most as many as there are training images.
        steps: number of batches, at least 0.
        seed: whole number, at least 0; of the order and, apart from it, of the augmentation.
        augment: mirror an image with probability 1/2 and crop it, at a random place, from itself
            padded with 4 black pixels on each side.

    Raises:
        DatasetError: an argument out of these bounds; at the call, before the first draw.
    """
    check_whole("batch_size", batch_size, least=1)
    check_whole("steps", steps, least=0)
    check_whole("seed", seed, least=0)
    if batch_size > len(data.y_train):
        raise DatasetError(
            f"batch_size is {batch_size}, but {data.name!r} has {len(data.y_train)} training "
            "images here; use a smaller batch or more train_samples"
        )
    return _draw_batches(len(data.y_train), batch_size, steps, seed, augment)


def stack_draws(draws: Iterable[Draw]) -> Draw:
    """At least one draw, all of them in one: every tensor (steps, B)."""
    columns = zip(*draws, strict=True)
    return Draw(*(None if column[0] is None else torch.stack(column) for column in columns))


class Batches:
    """Makes the batches of a data set where its images lie.

    Making a training batch neither waits for the device nor copies anything to it.

    Args:
        data: the data set, on any device.
    """

    def __init__(self, data: ImageData) -> None:
        self._data = data
        device = data.x_train.device
        self._mean = torch.tensor(data.mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._std = torch.tensor(data.std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def training(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """x float32 (B, C, H, W), normalised, and y int64 (B,) of a draw on the same device."""
        x = self._data.x_train[draw.chosen]
        if draw.mirrored is not None:
            x = _mirrored_and_cropped(x, draw)
        return self._normalised(x), self._data.y_train[draw.chosen]

    def split(self, split: str, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The "validation" or "test" split in order, as `test_batches` has the latter."""
        images = getattr(self._data, f"x_{split}").split(batch_size)
        labels = getattr(self._data, f"y_{split}").split(batch_size)
        for x, y in zip(images, labels, strict=True):
            yield self._normalised(x), y

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        """(x / 255 - mean) / std of uint8 (B, C, H, W), as float32."""
        return x.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)


def training_batches(
    data: ImageData, batch_size: int, steps: int, seed: int, augment: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of `draw_batches`, made of ``data`` on the CPU.

    Each is x float32 (B, C, H, W), normalised, and y int64 (B,); arguments and errors are those of
    `draw_batches`.
    """
    return map(Batches(data).training, draw_batches(data, batch_size, steps, seed, augment))


def test_batches(data: ImageData, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test split in order: x float32 (B, C, H, W), normalised, and y int64 (B,).

    The last batch has what is left over. Raises DatasetError for a ``batch_size`` below 1.
    """
    check_whole("batch_size", batch_size, least=1)
    return Batches(data).split("test", batch_size)


def _draw_batches(
    images: int, batch_size: int, steps: int, seed: int, augment: bool
) -> Iterator[Draw]:
    # Two streams, so that augmentation does not change the order. Mixed seeds, because a run
    # seeds its weights and dropout with the same number, and because torch's generator would
    # take 2**32 + 1 for 1.
    order_seed, augmentation_seed = np.random.SeedSequence(seed).generate_state(2)
    order = torch.Generator().manual_seed(int(order_seed))
    augmentation = torch.Generator().manual_seed(int(augmentation_seed))
    for step in range(steps):
        start = step % (images // batch_size) * batch_size
        if start == 0:
            permutation = torch.randperm(images, generator=order)
        chosen = permutation[start : start + batch_size]
        if augment:
            mirrored = torch.randint(2, (batch_size,), generator=augmentation, dtype=torch.bool)
            top, left = torch.randint(2 * CROP_PADDING + 1, (2, batch_size), generator=augmentation)
            yield Draw(chosen, mirrored, top, left)
        else:
            yield Draw(chosen)


def _mirrored_and_cropped(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Each image of a uint8 batch (B, C, H, W) mirrored or not and moved by up to 4 pixels."""
    batch, _, height, width = x.shape
    x = torch.where(draw.mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    padded = torch.nn.functional.pad(x, (CROP_PADDING,) * 4)
    # All crops of every image as a view (B, C, 9, 9, H, W) without a copy; one of them is taken.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch, device=x.device), :, draw.top, draw.left]
