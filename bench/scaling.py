"""Time of one update over the number of elements and of tensors, as a picture."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from contestants import COMPILED, CONTESTANTS, FUSED, NATIVE, OURS, SOURCE, Work
from timing import NEW, SAME, Measured, measure

__all__ = ["draw", "sweep"]

SIZES = [4**i for i in range(3, 14)]  # elements of one tensor: 2^6 to 2^26
COUNTS = [4**i for i in range(7)]  # tensors of 64 elements: 1 to 4,096
COLOURS = {OURS: "C0", NATIVE: "C9", FUSED: "C3", COMPILED: "C2", SOURCE: "C7"}

# panel, what it varies; where in it somebody stops, because a step or its compilation takes long
PANELS = {
    "elements of one tensor": ({n: Work(((n,),)) for n in SIZES}, {SOURCE: 4**12}),
    "tensors of 64 elements": (
        {n: Work(((64,),) * n) for n in COUNTS},
        {SOURCE: 4**5, COMPILED: 4**3},
    ),
}

Sweep = dict[str, dict[int, Measured]]


def sweep(passes: int) -> Sweep:
    """Measure every size of every panel."""
    return {
        panel: {
            n: measure(
                work,
                {k: make for k, make in CONTESTANTS.items() if n <= stops.get(k, n)},
                passes,
            )
            for n, work in works.items()
        }
        for panel, (works, stops) in PANELS.items()
    }


def draw(path: pathlib.Path, measured: Sweep) -> None:
    """Two panels with logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (panel, points) in zip(axes, measured.items(), strict=True):
        for name, colour in COLOURS.items():
            kind = SAME if name == NATIVE else NEW
            line = {n: m.seconds(name, kind) for n, m in points.items() if name in m.passes}
            microseconds = [seconds * 1e6 for seconds in line.values()]
            axis.loglog(list(line), microseconds, "o-", color=colour, label=name, markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(panel)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("one update, µs")
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
