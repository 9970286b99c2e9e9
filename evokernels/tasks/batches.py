"""Batches of a data set in memory, made as whole tensors where it lies.

What is random in them is drawn apart from making them (`TaskData.draw_batches`, `Batches`): a CPU
draws the same numbers wherever the data lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from evokernels.tasks.splits import check_whole

__all__ = ["Batches", "Draw", "TaskData", "random_streams", "stack_draws", "training_batches"]


class Draw(NamedTuple):
    """What decides a batch; stacked, each tensor has a dimension (steps,) in front.

    Attributes:
        chosen: int64 (B,), its samples: places of images in their split, or places in a text at
            which windows begin.
        mirrored: bool (B,), which images are mirrored; None without augmentation, as the rest.
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


class TaskData(Protocol):
    """A data set as training and its measure see it, split into "train", "validation" and "test".

    Attributes:
        name: the data set.
        classes: number of classes, of images or of characters.
        device: where it lies.
    """

    name: str
    classes: int

    @property
    def device(self) -> torch.device:
        """See the class."""

    def to(self, device: torch.device) -> Self:
        """The same data set on ``device``."""

    def digest(self) -> str:
        """16 hexadecimal digits that tell data sets of the same name apart; on the CPU only."""

    def draw_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Draw]:
        """What is random in exactly ``steps`` training batches, on the CPU.

        The draws depend on the data set and the arguments alone: not on torch's global generator,
        nor on the number of threads, nor on where the data lies.

        Args:
            batch_size: samples in a batch, at least 1.
            steps: number of batches, at least 0.
            seed: whole number, at least 0.

        Raises:
            DatasetError: an argument out of these bounds; at the call, before the first draw.
        """

    def samples(self, split: str) -> torch.Tensor:
        """All samples of a split in order, as `Draw.chosen` has them; on the device."""

    def maker(self) -> Callable[[str, Draw], tuple[torch.Tensor, torch.Tensor]]:
        """What makes x and y of a split and a draw; neither waits for the device nor copies to it.

        y are classes, int64, (B,) or (B, T); of each, x gives the network what it needs.
        """


class Batches:
    """Makes the batches of a data set where it lies.

    Args:
        data: the data set, on any device.
    """

    def __init__(self, data: TaskData) -> None:
        self._data = data
        self._make = data.maker()

    def training(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of a draw that lies on the same device."""
        return self._make("train", draw)

    def split(self, split: str, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The "validation" or "test" split in order; the last batch has what is left over.

        Raises:
            DatasetError: a ``batch_size`` below 1; at the call.
        """
        check_whole("batch_size", batch_size, least=1)
        chosen = self._data.samples(split).split(batch_size)
        return (self._make(split, Draw(some)) for some in chosen)


def stack_draws(draws: Iterable[Draw]) -> Draw:
    """At least one draw, all of them in one: every tensor (steps, B)."""
    columns = zip(*draws, strict=True)
    return Draw(*(None if column[0] is None else torch.stack(column) for column in columns))


def training_batches(
    data: TaskData, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of `TaskData.draw_batches`, made of ``data`` on the CPU."""
    return map(Batches(data).training, data.draw_batches(batch_size, steps, seed))


def random_streams(batch_size: int, steps: int, seed: int) -> tuple[torch.Generator, ...]:
    """Generators of a data set's draws: one chooses samples, the other augments them.

    Raises:
        DatasetError: as `TaskData.draw_batches` says.
    """
    check_whole("batch_size", batch_size, least=1)
    check_whole("steps", steps, least=0)
    check_whole("seed", seed, least=0)
    # Two streams, so that augmentation does not change the order. Mixed seeds, because a run
    # seeds its weights and dropout with the same number, and because torch's generator would
    # take 2**32 + 1 for 1.
    seeds = np.random.SeedSequence(seed).generate_state(2)
    return tuple(torch.Generator().manual_seed(int(mixed)) for mixed in seeds)
