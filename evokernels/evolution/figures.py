"""Pictures as files."""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from evokernels.evolution.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BEST_COLOUR", "MEAN_COLOUR", "accuracy_axis", "new_figure", "save_figure"]

BEST_COLOUR, MEAN_COLOUR = "#0b6e4f", "#8a8a8a"

# The axis of accuracies: what it has beyond 1, and where it is marked.
ROOM = 1.02
TICKS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0)


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of that many inches, drawn without a display and without pyplot's global state."""
    # imported here: it takes half a second, which `--help` and every worker would pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def accuracy_axis(axes: Axes, top: float) -> None:
    """Make the upright axis one of accuracies, the wider the nearer to 1, where it gets harder.

    Args:
        axes: of the picture.
        top: the greatest accuracy.
    """

    def up(accuracy: np.ndarray) -> np.ndarray:
        # error bars may end above 1, where they are cut off
        return -np.log(np.maximum(ROOM - accuracy, 0.5 * (ROOM - 1.0)))

    axes.set_yscale("function", functions=(up, lambda place: ROOM - np.exp(-place)))
    axes.set_yticks([tick for tick in TICKS if tick <= top + 0.05], minor=False)


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Write it as PNG; raises JournalError if it cannot."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())
