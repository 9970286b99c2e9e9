"""Images in memory, as uint8 tensors: shuffled, augmented and normalised a batch at a time."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Iterator

import torch

from evokernels.errors import DatasetError
from evokernels.kernels import native
from evokernels.tasks.batches import Draw, random_streams

__all__ = ["ImageData"]

CROP_PADDING = 4  # pixels on each side, as in the source system

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
VALIDATION = ("x_validation", "y_validation")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels of a data set, not normalised; a `TaskData`.

    Its batches are x float32 (B, C, H, W), normalised, and y int64 (B,). Every epoch is a new
    permutation of the training images; images left over at its end that do not fill a batch are
    dropped.

    Args:
        name: the data set.
        x_train: training images, uint8 (N, C, H, W), contiguous.
        y_train: their classes, int64 (N,), in [0, ``classes``).
        x_test: images of the test split, like ``x_train``.
        y_test: their classes, like ``y_train``.
        mean: mean of each channel, pixels counted from 0 to 1.
        std: standard deviation of each channel, in the same unit.
        classes: number of classes.
        x_validation: images held back from the training split, like ``x_train``; may be empty.
        y_validation: their classes, like ``y_train``.
        augment: mirror a training image with probability 1/2 and crop it, at a random place, from
            itself padded with 4 black pixels on each side.
    """

    name: str
    x_train: torch.Tensor = dataclasses.field(repr=False)
    y_train: torch.Tensor = dataclasses.field(repr=False)
    x_test: torch.Tensor = dataclasses.field(repr=False)
    y_test: torch.Tensor = dataclasses.field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    x_validation: torch.Tensor = dataclasses.field(
        default_factory=lambda: torch.empty(0, dtype=torch.uint8), repr=False
    )
    y_validation: torch.Tensor = dataclasses.field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False
    )
    augment: bool = False

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.x_train.device

    def to(self, device: torch.device) -> ImageData:
        """The same data set with its tensors on ``device``."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in (*ARRAYS, *VALIDATION)}
        )

    def digest(self) -> str:
        """As `TaskData.digest` says."""
        digest = hashlib.blake2b(digest_size=8)
        # without validation images it is what it was before there were any: journals hold it
        for name in (*ARRAYS, *(VALIDATION if len(self.y_validation) else ())):
            tensor = getattr(self, name)
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy())
        return digest.hexdigest()

    def draw_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Draw]:
        """As `TaskData.draw_batches` says; ``batch_size`` is at most the number of images."""
        order, augmentation = random_streams(batch_size, steps, seed)
        images = len(self.y_train)
        if batch_size > images:
            raise DatasetError(
                f"batch_size is {batch_size}, but {self.name!r} has {images} training "
                "images here; use a smaller batch or more train_samples"
            )
        chosen = _in_epochs(images, batch_size, steps, order)
        return (self._augmented(some, augmentation) for some in chosen)

    def samples(self, split: str) -> torch.Tensor:
        """As `TaskData.samples` says: 0, 1, 2 and so on."""
        return torch.arange(len(getattr(self, f"y_{split}")), device=self.device)

    def maker(self) -> ImageMaker:
        """As `TaskData.maker` says."""
        return ImageMaker(self)

    def _augmented(self, chosen: torch.Tensor, generator: torch.Generator) -> Draw:
        if not self.augment:
            return Draw(chosen)
        batch = len(chosen)
        mirrored = torch.randint(2, (batch,), generator=generator, dtype=torch.bool)
        top, left = torch.randint(2 * CROP_PADDING + 1, (2, batch), generator=generator)
        return Draw(chosen, mirrored, top, left)


class Batch(ctypes.Structure):
    """evk_batch."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("chosen", "mirrored", "down", "right")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width")),
    )


class ImageMaker:
    """Makes x and y of a draw, as `ImageData` says; on a CPU with the channels innermost."""

    def __init__(self, data: ImageData) -> None:
        self._data = data
        self._mean = torch.tensor(data.mean, dtype=torch.float32, device=data.device).view(-1, 1, 1)
        self._std = torch.tensor(data.std, dtype=torch.float32, device=data.device).view(-1, 1, 1)
        every = torch.arange(256, dtype=torch.uint8, device=data.device)
        self._levels = self._normalised(every.expand(len(data.mean), 1, 256))

    def __call__(self, split: str, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        images = getattr(self._data, f"x_{split}")
        # first: this raises for what is not in the split
        y = getattr(self._data, f"y_{split}")[draw.chosen]
        make = self._in_one_pass if images.device.type == "cpu" else self._by_operations
        return make(images, draw), y

    def _by_operations(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        x = images[draw.chosen]
        if draw.mirrored is not None:
            x = _mirrored_and_cropped(x, draw)
        return self._normalised(x)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    def _in_one_pass(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        shape = len(draw.chosen), *images.shape[1:]
        x = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        if draw.mirrored is None:
            nowhere = torch.zeros_like(draw.chosen)
            moved = nowhere.to(torch.bool), nowhere, nowhere
        else:
            moved = draw.mirrored, draw.top - CROP_PADDING, draw.left - CROP_PADDING
        arrays = [tensor.contiguous() for tensor in (draw.chosen, *moved)]
        batch = Batch(*(array.data_ptr() for array in arrays), *shape)
        native.library().evk_make_batch(
            *(images.data_ptr(), self._levels.data_ptr(), x.data_ptr(), ctypes.byref(batch))
        )
        return x


def _in_epochs(
    images: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """The images of each batch, int64 (B,)."""
    for step in range(steps):
        start = step % (images // batch_size) * batch_size
        if start == 0:
            permutation = torch.randperm(images, generator=generator)
        yield permutation[start : start + batch_size]


def _mirrored_and_cropped(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Each image of a uint8 batch (B, C, H, W) mirrored or not and moved by up to 4 pixels."""
    batch, _, height, width = x.shape
    x = torch.where(draw.mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    padded = torch.nn.functional.pad(x, (CROP_PADDING,) * 4)
    # All crops of every image as a view (B, C, 9, 9, H, W) without a copy; one of them is taken.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch, device=x.device), :, draw.top, draw.left]
