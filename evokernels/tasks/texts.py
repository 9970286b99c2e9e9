"""Text in memory, one number a character, to learn its next character from the ones before.

The text is split by position: the beginning is trained with, what follows is held back for
validation, and the last tenth is the test split. No character belongs to two splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from evokernels.errors import DatasetError
from evokernels.tasks.batches import Draw, random_streams
from evokernels.tasks.folder import data_folder
from evokernels.tasks.splits import training_size

__all__ = ["CONTEXT", "TextData", "load_text"]

CONTEXT = 64  # characters that are read, and predicted, in a window

# Windows of the test split are one in so many.
TEST_SHARE = 10

# What is rarer than the 255 most frequent characters is one class. It bounds the network for texts
# of any script, and a class is a byte.
MOST_CLASSES = 256
CODE_POINTS = 0x110000

# One window in each of two splits, each with the character after its last, and one such for a
# validation split.
FEWEST_CHARACTERS = 2 * (CONTEXT + 1) + 1


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A text and its splits, counted in windows of 64 characters; a `TaskData`.

    Its batches are x int64 (B, 64), windows of the text, and y int64 (B, 64), for each character
    of x the one after it. A training window begins anywhere in its split; those of the other
    splits lie side by side.

    Args:
        name: the data set.
        characters: their classes, uint8 (N,), in [0, ``classes``).
        classes: number of classes: of different characters, 256 at most.
        train: windows at the beginning of the text. The last character of a split is only
            predicted, so the windows of the next begin after it.
        validation: windows that follow.
        test: windows at the end.
    """

    name: str
    characters: torch.Tensor = dataclasses.field(repr=False)
    classes: int
    train: int
    validation: int
    test: int

    @property
    def device(self) -> torch.device:
        """Where the text lies."""
        return self.characters.device

    def to(self, device: torch.device) -> TextData:
        """The same text on ``device``."""
        return dataclasses.replace(self, characters=self.characters.to(device))

    def digest(self) -> str:
        """As `TaskData.digest` says."""
        sizes = self.classes, self.train, self.validation, self.test
        digest = hashlib.blake2b(repr(sizes).encode(), digest_size=8)
        digest.update(self.characters.numpy())
        return digest.hexdigest()

    def draw_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Draw]:
        """As `TaskData.draw_batches` says."""
        generator, _ = random_streams(batch_size, steps, seed)
        starts = CONTEXT * (self.train - 1) + 1
        return (
            Draw(torch.randint(starts, (batch_size,), generator=generator)) for _ in range(steps)
        )

    def samples(self, split: str) -> torch.Tensor:
        """As `TaskData.samples` says: places of the first characters of the windows."""
        windows = getattr(self, split)
        start = {
            "train": 0,
            "validation": _length(self.train),
            "test": len(self.characters) - _length(self.test),
        }[split]
        return start + CONTEXT * torch.arange(windows, device=self.device)

    def maker(self) -> Callable[[str, Draw], tuple[torch.Tensor, torch.Tensor]]:
        """As `TaskData.maker` says."""
        window = torch.arange(CONTEXT + 1, device=self.device)

        def make(split: str, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
            characters = self.characters[draw.chosen.unsqueeze(1) + window].to(torch.int64)
            return characters[:, :-1], characters[:, 1:]

        return make


def load_text(
    data_dir: str | os.PathLike[str] | None = None,
    train_samples: int | None = None,
    validation_samples: int = 0,
    file: str | None = None,
) -> TextData:
    """A text file, or the text that every Python carries: the help topics of `pydoc`.

    Args:
        data_dir: the data folder, in which ``file`` is found; see `data_folder`.
        train_samples: train with that many windows of 64 characters, from the beginning on; None
            for all that are not held back. The test split, the last tenth, is always whole.
        validation_samples: hold that many windows back, those that follow.
        file: a text file in UTF-8; relative to the data folder, or a whole path. None for the help
            topics, whose text depends on Python's version.

    Raises:
        DatasetError: a file that is missing, cannot be read or decoded, or is too short, or fewer
            windows than asked for.
    """
    if file is None:
        name, holder, text = "text", "the text of Python's help topics", _help_topics()
    else:
        path = data_folder(data_dir) / os.path.expanduser(file)
        name, holder, text = f"text:{file}", str(path), _read(path)
    if len(text) < FEWEST_CHARACTERS:
        raise DatasetError(
            f"{holder} has {len(text)} characters; a text to learn from needs at least "
            f"{FEWEST_CHARACTERS}, and thousands to be worth it"
        )
    characters, classes = _classes(text)
    test = max(1, len(text) // CONTEXT // TEST_SHARE)
    # the other two splits have a character after their last window each
    available = (len(text) - _length(test) - 2) // CONTEXT
    samples = f"windows of {CONTEXT} characters"
    train = training_size(available, train_samples, validation_samples, holder, samples)
    return TextData(name, characters, classes, train, int(validation_samples), test)


def _length(windows: int) -> int:
    """Characters of so many windows side by side, and the one after the last."""
    return CONTEXT * windows + 1


def _help_topics() -> str:
    try:
        from pydoc_data.topics import topics  # here: most of a megabyte that few runs need
    except ImportError:
        raise DatasetError(
            "this Python carries no pydoc_data, the text of the task 'text'; install Python's "
            "standard library as a whole, or name a text file: text:FILE"
        ) from None
    return "".join(topics[topic] for topic in sorted(topics))


def _read(path: os.PathLike[str]) -> str:
    try:
        with open(path, "rb") as file:
            # the mark that some editors begin a file with is no part of its text
            return file.read().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is no text in UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); convert it, for instance with iconv -t UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", error)
        raise DatasetError(
            f"cannot read the text file {path} ({reason}); name one in the data folder, or a whole "
            "path: text:FILE"
        ) from None


def _classes(text: str) -> tuple[torch.Tensor, int]:
    """The class of each character, uint8 (N,), by how frequent it is, and how many there are."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    counts = np.bincount(points, minlength=CODE_POINTS)
    by_frequency = np.argsort(-counts, kind="stable")  # of equally many the lower code point
    present = np.count_nonzero(counts)
    table = np.zeros(CODE_POINTS, np.uint8)
    table[by_frequency[:present]] = np.minimum(np.arange(present), MOST_CLASSES - 1)
    return torch.from_numpy(table[points]), min(int(present), MOST_CLASSES)
