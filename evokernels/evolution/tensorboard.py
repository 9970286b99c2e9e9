"""The generations of a run as TensorBoard shows them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from evokernels.errors import SettingsError

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """Writes the numbers of generations into event files, each number of a generation once.

    A run that resumes replays its generations, and would write them again; so what the folder has
    already is read first.

    Args:
        folder: of the event files; made with the first generation.

    Raises:
        SettingsError: the package tensorboard is missing.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        try:
            import torch.utils.tensorboard
        except ImportError as error:
            raise SettingsError(
                f"TensorBoard's event files need the package tensorboard ({error}); install it: "
                "'pip install evokernels[tensorboard]', or leave --tensorboard out"
            ) from None
        self._make = torch.utils.tensorboard.SummaryWriter
        self._folder = folder
        self._writer: Any = None
        self._written: set[tuple[str, int]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, number: int, scalars: Mapping[str, float]) -> None:
        """Write what is new of a generation, and have it on disk.

        Args:
            number: of the generation, counted from 1.
            scalars: by name.
        """
        if self._writer is None:
            self._written = _written(self._folder)
            self._writer = self._make(str(self._folder))
        for name, value in scalars.items():
            if (name, number) not in self._written:
                self._writer.add_scalar(name, value, number)
        self._writer.flush()


def _written(folder: pathlib.Path) -> set[tuple[str, int]]:
    """The name and step of every number in the event files of a folder."""
    if not folder.exists():
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        (name, event.step) for name in events.Tags()["scalars"] for event in events.Scalars(name)
    }
