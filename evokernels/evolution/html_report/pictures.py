"""The charts of a report: matplotlib's SVG, in colours that the page sets for light and dark.

Each is as wide as a phone, so that its text stays legible there; a wide page puts several beside
each other. Legends are text of the page (`page.Picture.legend`), which wraps.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evokernels.evolution.comparison import Estimate
from evokernels.evolution.figures import accuracy_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Band", "Line", "bars", "dots", "fitness", "heat", "scatter"]

# Colours that stand for those of the page: matplotlib knows no variables of CSS.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "best": "#040404",
    "mean": "#050505",
    "other": "#060606",
    "bad": "#070707",
    "warn": "#080808",
}
WIDTH, MARGIN = 4.4, 0.12  # inches; 72 points each, and the page shows a point as a pixel or more
TEXT, SMALL = 10, 9
ROW = 48  # letters above a row, capital ones

Line = tuple[Sequence[float | None], str, str]  # values, colour, line style
Band = tuple[Sequence[float | None], Sequence[float | None]]  # from, to

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": TEXT,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "axes.grid": False,
}


def fitness(
    name: str,
    numbers: Sequence[int],
    lines: Sequence[Line],
    band: Band,
    failures: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """Values over the generations; below them, if any failed, how many did.

    Args:
        name: of the picture, different from those of all others on the page.
        numbers: of the generations.
        lines, band: None where there is no value.
        failures: for each colour, how many failed in each generation; stacked.
    """
    import matplotlib

    failed = {colour: counts for colour, counts in (failures or {}).items() if any(counts)}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, 3.3 if failed else 2.8, layout=None)
        axes = figure.add_subplot()
        _place(figure, left=0.5, bottom=1.05 if failed else 0.42)
        low, high = ([math.nan if value is None else value for value in side] for side in band)
        style = dict(color=COLOURS["mean"], alpha=0.22)
        if len(numbers) > 1:
            axes.fill_between(numbers, low, high, linewidth=0, **style)
        else:
            axes.vlines(numbers, low, high, linewidth=14, **style)
        for values, colour, style in lines:
            known = [math.nan if value is None else value for value in values]
            marker = "o" if len(numbers) <= 20 and style == "-" else None
            size = 3 if len(numbers) > 1 else 6
            axes.plot(
                *(numbers, known),
                **dict(color=COLOURS[colour], linestyle=style, marker=marker, markersize=size),
            )
        axes.grid(axis="y")
        if all(value is None for values, _, style in lines if style == "-" for value in values):
            axes.set_yticks([])
            axes.text(
                *(0.5, 0.5, "nothing was trained to the end"),
                **dict(transform=axes.transAxes, ha="center", color=COLOURS["muted"]),
            )
        _generations(axes, numbers)
        if failed:
            axes.set_xlabel("")
            below = figure.add_axes((0, 0, 1, 1), sharex=axes)
            _place(figure, left=0.5, bottom=0.42, top=0.85, axes=below)
            base = [0] * len(numbers)
            for colour, counts in failed.items():
                below.bar(numbers, counts, bottom=base, color=COLOURS[colour], width=0.7)
                base = list(map(sum, zip(base, counts, strict=True)))
            below.set_ylim(0, max(1, *base))
            below.yaxis.get_major_locator().set_params(integer=True, nbins=2)
            axes.tick_params(labelbottom=False)
            _generations(below, numbers)
        return _svg(figure, name)


def dots(name: str, rows: Sequence[tuple[str, Estimate, str]]) -> str:
    """Means with their standard errors, a row each, the name above it.

    Args:
        rows: name, mean and error, colour.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, 0.55 + 0.42 * len(rows), layout=None)
        axes = figure.add_subplot()
        _place(figure, left=MARGIN, bottom=0.32, top=0.02)
        for place, (label, estimate, colour) in enumerate(rows):
            error = 0.0 if math.isnan(estimate.error) else estimate.error
            style = dict(color=COLOURS[colour], ecolor=COLOURS[colour], capsize=3, markersize=6)
            axes.errorbar([estimate.mean], [place], xerr=[error], fmt="o", **style)
            _label(axes, place - 0.3, label, str(estimate))
        axes.set_ylim(len(rows) - 0.6, -0.65)
        axes.margins(x=0.08)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.xaxis.get_major_locator().set_params(nbins=5)
        _clear_of_edges(axes, left=True)
        axes.set_axisbelow(True)
        return _svg(figure, name)


def bars(name: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Amounts, a row each, the name above it.

    Args:
        rows: name, amount, colour.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, 0.45 + 0.42 * len(rows), layout=None)
        axes = figure.add_subplot()
        _place(figure, left=MARGIN, bottom=0.32, top=0.02)
        for place, (label, amount, colour) in enumerate(rows):
            axes.barh([place], [amount], height=0.32, color=COLOURS[colour])
            _label(axes, place - 0.36, label, f"{amount:,.0f}")
        axes.set_ylim(len(rows) - 0.7, -0.7)
        axes.set_xlim(0, max([amount for _, amount, _ in rows] + [1]) * 1.02)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(nbins=4, integer=True)
        _clear_of_edges(axes, left=False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        return _svg(figure, name)


def heat(name: str, numbers: Sequence[int], rows: Mapping[str, Sequence[float]]) -> str:
    """Shares over the generations: a row each, its name above it, the fuller the colour the more.

    Args:
        rows: for each name, a share of 0 to 1 in each generation.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, 0.5 + 0.4 * len(rows), layout=None)
        axes = figure.add_subplot()
        _place(figure, left=MARGIN, bottom=0.42, top=0.02)
        for place, (label, shares) in enumerate(rows.items()):
            # neighbours of one share are one rectangle: a long run has thousands of cells
            at = 0
            for share, same in itertools.groupby(shares):
                count = len(list(same))
                if share:
                    box = matplotlib.patches.Rectangle(
                        (numbers[at] - 0.5, place), count, 0.5, linewidth=0
                    )
                    box.set(facecolor=COLOURS["best"], alpha=0.08 + 0.92 * share)
                    axes.add_patch(box)
                at += count
            ends = [shares[0], shares[-1]] if len(shares) > 1 else [shares[0]]
            _label(axes, place - 0.22, label, " → ".join(f"{share:.0%}" for share in ends))
        axes.set_ylim(len(rows) - 0.4, -0.45)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        _generations(axes, numbers)
        axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        return _svg(figure, name)


def scatter(
    name: str,
    groups: Sequence[tuple[Sequence[float], Sequence[float], str, float]],
    front: tuple[Sequence[float], Sequence[float]],
    stars: Sequence[tuple[float, Estimate, str]],
    labels: tuple[str, str],
) -> str:
    """Accuracies over a logarithmic axis, the steps of a front, and stars with errors.

    Args:
        groups: places across and up, colour, opacity.
        front: places of its corners.
        stars: place across, mean and error up, colour.
        labels: of the axes.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, 3.6, layout=None)
        axes = figure.add_subplot()
        _place(figure, left=0.62, bottom=0.45)
        axes.set_xscale("log")
        accuracy_axis(axes, max([*itertools.chain(*(up for _, up, _, _ in groups))], default=0.0))
        for across, up, colour, opacity in groups:
            style = dict(color=COLOURS[colour], alpha=opacity, markeredgewidth=0)
            axes.plot(across, up, "o", markersize=4, **style)
        axes.step(*front, where="post", color=COLOURS["best"], linewidth=1.2)
        for across, estimate, colour in stars:
            style = dict(color=COLOURS[colour], ecolor=COLOURS[colour], capsize=3, markersize=11)
            error = 0.0 if math.isnan(estimate.error) else estimate.error
            axes.errorbar([across], [estimate.mean], yerr=[error], fmt="*", **style)
        places = [
            *itertools.chain(*(across for across, *_ in groups)),
            *(star[0] for star in stars),
        ]
        if places:  # networks of one size would have an axis without any width
            room = max(1.3, (max(places) / min(places)) ** 0.05)
            axes.set_xlim(min(places) / room, max(places) * room)
        axes.grid()
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(SMALL)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set(xlabel=labels[0], ylabel=labels[1])
        return _svg(figure, name)


def _label(axes: Axes, y: float, name: str, value: str) -> None:
    """Above a row what it is, shortened in its middle to fit, and to the right its value."""
    over = len(name) - (ROW - len(value))
    if over > 0:
        half = (len(name) - over) // 2
        name = f"{name[:half]}…{name[-half:]}"
    style = dict(fontsize=SMALL, va="center", transform=axes.get_yaxis_transform())
    axes.text(0.0, y, name, color=COLOURS["ink"], **style)
    axes.text(1.0, y, value, color=COLOURS["muted"], ha="right", **style)


def _generations(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    if len(numbers) <= 8:
        axes.set_xticks(numbers)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.set_xlabel("generation", fontsize=SMALL)


def _clear_of_edges(axes: Axes, left: bool) -> None:
    """No mark so near to an edge that its text would be cut off there."""
    low, high = axes.get_xlim()
    room = 0.05 * (high - low)
    axes.set_xticks([at for at in axes.get_xticks() if low + left * room <= at <= high - room])


def _place(
    figure: Figure,
    left: float,
    bottom: float,
    top: float | None = None,
    axes: Axes | None = None,
) -> None:
    """Where axes lie, in inches from the edges: nothing has to be measured for it.

    Args:
        top: from the upper edge, or for ``axes`` from the lower one.
    """
    width, height = figure.get_size_inches()
    if axes is None:
        upper = height - (MARGIN if top is None else top)
        axes = figure.axes[0]
    else:
        upper = top
    box = left / width, bottom / height, (width - left - MARGIN) / width, (upper - bottom) / height
    axes.set_position(box)


def _svg(figure: Figure, name: str) -> str:
    """The text of an ``<svg>`` for a page that has others."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart"', svg, count=1)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups: names that other pictures have too
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # that of the page
    names = {colour: name for name, colour in COLOURS.items()}
    svg = re.sub(r"(?<=: )#0[1-8]0[1-8]0[1-8]\b", lambda found: f"var(--{names[found[0]]})", svg)
    return re.sub(r"\s*\n\s*", " ", svg)
