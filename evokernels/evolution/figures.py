"""Pictures as files."""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING

from evokernels.evolution.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BEST_COLOUR", "MEAN_COLOUR", "new_figure", "save_figure"]

BEST_COLOUR, MEAN_COLOUR = "#0b6e4f", "#8a8a8a"


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of that many inches, drawn without a display and without pyplot's global state."""
    # imported here: it takes half a second, which `--help` and every worker would pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Write it as PNG; raises JournalError if it cannot."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())
