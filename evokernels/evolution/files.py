"""Result files that a reader never sees half-written."""

from __future__ import annotations

import os
import pathlib

from evokernels.errors import JournalError

__all__ = ["write_atomically"]


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write a file, or leave the one that was there; raises JournalError naming the file."""
    unfinished = path.with_name(f"{path.name}.new")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise JournalError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        ) from None
