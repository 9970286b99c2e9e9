"""Result files that a reader never sees half-written."""

from __future__ import annotations

import csv
import io
import pathlib
import tempfile
from collections.abc import Iterable

from evokernels.document import write_whole
from evokernels.errors import JournalError

__all__ = ["csv_text", "make_folder", "write_atomically"]


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table as a CSV file has it; floats with all their digits, None as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def make_folder(folder: pathlib.Path) -> None:
    """Make sure, before any work, that results can be written; raises JournalError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_write(folder, error) from None


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write a file, or leave the one that was there; raises JournalError naming the file."""
    try:
        # one name for all: runs are killed often, and one process alone has the folder
        write_whole(path, content, path.with_name(f"{path.name}.new"))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: pathlib.Path, error: OSError) -> JournalError:
    return JournalError(
        f"cannot write {path}: {error.strerror}; choose a folder that can be written"
    )
