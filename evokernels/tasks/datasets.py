"""Image data sets by name.

`load_images` looks in this order: the package itself (``fashion_mnist_mini``), ``<name>.npz`` in
the data folder, a torchvision copy in the data folder, the network. What comes over the network
is stored in the data folder as ``<name>.npz``, so that it is fetched and converted only once.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch

from evokernels.errors import DatasetError
from evokernels.tasks.folder import data_folder
from evokernels.tasks.images import ARRAYS, ImageData
from evokernels.tasks.splits import training_size

__all__ = ["load_images"]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known about a data set before it is read.

    ``image_shape`` is (H, W) or (H, W, 3); ``torchvision_class`` is its name in
    `torchvision.datasets`, None where the archive ships with the package.
    """

    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    torchvision_class: str | None

    @property
    def channels_first(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        height, width, *channels = self.image_shape
        return (*(channels or [1]), height, width)


SOURCES = {
    "mnist": Source((28, 28), (0.1307,), (0.3081,), 10, "MNIST"),
    "fashion_mnist": Source((28, 28), (0.2860,), (0.3530,), 10, "FashionMNIST"),
    "cifar10": Source(
        (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10, "CIFAR10"
    ),
    "fashion_mnist_mini": Source((28, 28), (0.2860,), (0.3530,), 10, None),
}


def load_images(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    train_samples: int | None = None,
    validation_samples: int = 0,
    augment: bool = False,
) -> ImageData:
    """A data set by name: mnist, fashion_mnist, cifar10 or fashion_mnist_mini (embedded).

    Args:
        name: one of the four.
        data_dir: the data folder; else the environment variable ``EVOKERNELS_DATA``, else
            ``~/.cache/evokernels/data``. An archive ``<name>.npz`` in it has exactly the arrays
            ``x_train``, ``y_train``, ``x_test`` and ``y_test``, all uint8, images N×H×W or
            N×H×W×3.
        train_samples: train with that many images of the training split, the first after one
            fixed shuffle: the same ones for every caller; None for all that are not held back.
            The test split is always whole.
        validation_samples: hold that many further images of the training split back, the next
            ones of that shuffle.
        augment: see `ImageData`.

    Raises:
        DatasetError: unknown name, fewer images than asked for, or a data set that is missing,
            damaged or not of the documented form. Existing files are left as they are.
    """
    if name not in SOURCES:
        raise DatasetError(f"unknown data set {name!r}; use one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    if source.torchvision_class is None:
        embedded = importlib.resources.files("evokernels.tasks") / "data" / f"{name}.npz"
        with importlib.resources.as_file(embedded) as path:
            arrays = _read_npz(path, "install evokernels again")
        origin = f"embedded {name}.npz"
    else:
        folder = data_folder(data_dir)
        path = folder / f"{name}.npz"
        if os.path.lexists(path):  # a dangling link is reported, not replaced by a download
            remedy = "restore the file, or remove it to have the data set downloaded"
            arrays, origin = _read_npz(path, remedy), str(path)
        else:
            arrays = _from_torchvision(name, source.torchvision_class, folder)
            origin = f"torchvision's {source.torchvision_class} in {folder}"
    _check(arrays, source, origin)

    x_train, y_train = arrays["x_train"], arrays["y_train"]
    kept, held_back = _fixed_choice(name, len(y_train), train_samples, validation_samples)
    return ImageData(
        name=name,
        x_train=_channels_first(x_train[kept]),
        y_train=_labels(y_train[kept]),
        x_test=_channels_first(arrays["x_test"]),
        y_test=_labels(arrays["y_test"]),
        mean=source.mean,
        std=source.std,
        classes=source.classes,
        x_validation=_channels_first(x_train[held_back]),
        y_validation=_labels(y_train[held_back]),
        augment=augment,
    )


def _read_npz(path: pathlib.Path, remedy: str) -> dict[str, np.ndarray]:
    """All arrays of an archive; raises DatasetError naming the file and, if damaged, the remedy."""
    # A damaged archive fails inside zipfile, zlib or numpy with a dozen exception types, so
    # whatever comes out of the reading is translated.
    try:
        with open(path, "rb") as file:  # opened here: numpy leaves a file open that is no archive
            archive = np.load(file, allow_pickle=False)
            is_archive = isinstance(archive, np.lib.npyio.NpzFile)
            held = archive.files if is_archive else ["a single array"]
            if sorted(held) == sorted(ARRAYS):
                # asarray: numpy hands out a member that is no array as bytes
                return {name: np.asarray(archive[name]) for name in ARRAYS}
    except Exception as error:
        raise DatasetError(f"cannot read {path} ({_one_line(error)}); {remedy}") from None
    raise DatasetError(
        f"{path} holds {', '.join(map(repr, held)) or 'no arrays'}; "
        f"it must hold exactly {', '.join(ARRAYS)}: write it with numpy.savez_compressed"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _from_torchvision(name: str, class_name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays from torchvision's files in the folder, else from the network."""
    # Imported here: it takes about as long as torch and 160 MB, and a run needs it only for a
    # data set that has no archive yet.
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, class_name)
    try:
        return _split_arrays(dataset, folder, download=False)
    except RuntimeError:  # torchvision's "not found", or files that fail its checksum
        return _download(name, dataset, folder)
    except Exception as error:
        raise DatasetError(
            f"torchvision's files of {class_name} in {folder} are damaged ({_one_line(error)}); "
            "remove them to have the data set downloaded again"
        ) from None


def _download(name: str, dataset: Any, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Fetch a data set and store it in the folder as one archive."""
    # torchvision takes any file that is there for a whole one when it has no checksum for it
    # (what it unpacks). So it works in a folder that vanishes, also after Ctrl-C, and only the
    # finished archive is moved to its place.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-")
    except OSError as error:
        raise DatasetError(
            f"no intact data set {name!r} in {folder}, and that folder cannot be written to "
            f"({_one_line(error)}); set EVOKERNELS_DATA to a folder that has {name}.npz "
            "or can be written to"
        ) from None
    with scratch:
        try:
            arrays = _split_arrays(dataset, pathlib.Path(scratch.name), download=True)
        except Exception as error:
            raise DatasetError(
                f"no intact data set {name!r} in {folder}, and it cannot be downloaded "
                f"({_one_line(error)}); put {name}.npz there, set EVOKERNELS_DATA to a folder "
                "that has it, or use fashion_mnist_mini, which needs no download"
            ) from None
        try:
            finished = pathlib.Path(scratch.name) / f"{name}.npz"
            np.savez(finished, **arrays)
            if not os.path.lexists(folder / finished.name):  # another process may have been faster
                os.replace(finished, folder / finished.name)
        except OSError as error:
            raise DatasetError(
                f"data set {name!r} was downloaded but cannot be stored in {folder} "
                f"({_one_line(error)}); make room there or set EVOKERNELS_DATA to another folder"
            ) from None
    return arrays


def _split_arrays(dataset: Any, root: pathlib.Path, download: bool) -> dict[str, np.ndarray]:
    arrays = {}
    for split in ("train", "test"):
        images = dataset(str(root), train=split == "train", download=download)
        arrays[f"x_{split}"] = np.ascontiguousarray(images.data)
        arrays[f"y_{split}"] = np.asarray(images.targets, dtype=np.uint8)
    return arrays


def _check(arrays: dict[str, np.ndarray], source: Source, origin: str) -> None:
    """Raise DatasetError unless type, shape, lengths and labels are as documented."""
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        sizes = ", ".join(map(str, source.image_shape))
        if images.dtype != np.uint8 or images.shape[1:] != source.image_shape or not images.size:
            raise DatasetError(
                f"{origin}: x_{split} is {images.dtype} of shape {images.shape}; "
                f"it must be uint8 of shape (N, {sizes}) with N at least 1"
            )
        if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise DatasetError(
                f"{origin}: y_{split} is {labels.dtype} of shape {labels.shape}; "
                f"it must be uint8 of shape ({len(images)},), one class for each image"
            )
        if labels.max() >= source.classes:
            at = int(np.argmax(labels >= source.classes))
            raise DatasetError(
                f"{origin}: y_{split}[{at}] is {labels[at]}; "
                f"classes are numbered from 0 to {source.classes - 1}"
            )


def _fixed_choice(
    name: str, available: int, train_samples: int | None, validation_samples: int
) -> tuple[slice | np.ndarray, slice | np.ndarray]:
    """Places of the training images that are trained with, and of those that are held back."""
    train = training_size(available, train_samples, validation_samples, repr(name), "images")
    if train_samples is None and not validation_samples:
        return slice(None), slice(0)
    # numpy keeps the stream of the old RandomState as it is for good; that of Generator or of
    # torch.randperm may change with a release, and with it everybody's fitnesses.
    shuffled = np.random.RandomState(0).permutation(available)
    return shuffled[:train], shuffled[train : train + validation_samples]


def _channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W) or (N, H, W, 3) to a contiguous (N, C, H, W) tensor."""
    tensor = torch.from_numpy(images)
    tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return tensor.contiguous()


def _labels(classes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(classes.astype(np.int64))
