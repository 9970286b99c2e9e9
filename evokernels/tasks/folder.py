"""The folder that data sets are found in."""

from __future__ import annotations

import os
import pathlib

__all__ = ["data_folder"]


def data_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """``data_dir``; else the environment variable ``EVOKERNELS_DATA``, else the user's cache."""
    chosen = data_dir or os.environ.get("EVOKERNELS_DATA") or "~/.cache/evokernels/data"
    return pathlib.Path(chosen).expanduser()
