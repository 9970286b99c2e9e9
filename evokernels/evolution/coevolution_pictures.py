"""The pictures of a co-evolution."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evokernels.evolution.coevolution_history import (
    OWN,
    WINNER,
    CoevolutionResult,
    Round,
    fresh_accuracy,
    pareto_front,
)
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.figures import (
    BEST_COLOUR,
    MEAN_COLOUR,
    accuracy_axis,
    new_figure,
    save_figure,
)
from evokernels.evolution.pairs import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history", "plot_pareto"]

OWN_COLOUR = "#b0413e"


def plot_history(path: pathlib.Path, history: Sequence[Round]) -> None:
    """Best and mean worth of both populations over the generations, and of the best pair."""
    numbers = [entry.number + 1 for entry in history]
    figure = new_figure(8.4, 3.6)
    first = None
    for place, side in enumerate(("architectures", "optimizers"), start=1):
        populations = [getattr(entry, side) for entry in history]
        axes = figure.add_subplot(1, 2, place, sharey=first)
        first = first or axes
        marks = {"marker": "o", "markersize": 3}
        best_pair = [entry.best.score.fitness for entry in history]
        axes.plot(numbers, best_pair, color="black", linestyle=":", label="best pair so far")
        best = [population.best for population in populations]
        axes.plot(numbers, best, color=BEST_COLOUR, label="best", **marks)
        means = (population.mean for population in populations)
        mean = [math.nan if value is None else value for value in means]
        axes.plot(numbers, mean, color=MEAN_COLOUR, label="mean of those that held", **marks)
        axes.set_title(side)
        axes.set_xlabel("generation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    first.set_ylabel("worth: mean over collaborators")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def plot_pareto(
    path: pathlib.Path, settings: CoevolutionSettings, result: CoevolutionResult
) -> None:
    """Accuracy against parameters: every pair measured, the front, and on fresh seeds the winner
    and what it has to beat."""
    front = pareto_front(result.pairs)
    others = [each for each in result.pairs if each.accuracy is not None and each not in front]
    top = max([each.accuracy for each in front], default=0.0)
    figure = new_figure(7.2, 5.2)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    accuracy_axis(axes, top)
    _scatter(axes, others, color=MEAN_COLOUR, s=14, alpha=0.6, label="pair, in the search")
    _scatter(axes, front, color=BEST_COLOUR, s=22, zorder=3, label="on the Pareto front")
    axes.step(
        [each.parameters for each in front],
        [each.accuracy for each in front],
        where="post",
        color=BEST_COLOUR,
    )
    for name, colour in ((WINNER, BEST_COLOUR), (OWN, OWN_COLOUR)):
        accuracy = fresh_accuracy(result.comparison, name)
        axes.errorbar(
            [result.contenders[name].mean_parameters(settings.tasks)],
            [accuracy.mean],
            yerr=[accuracy.error],
            marker="*",
            markersize=13,
            markeredgecolor="black",
            capsize=3,
            linestyle="none",
            color=colour,
            zorder=4,
            label=f"{name}, fresh seeds",
        )
    axes.set_title(", ".join(settings.tasks))
    axes.set_xlabel("parameters (mean over the tasks)")
    axes.set_ylabel(f"accuracy on the {settings.selection_split} split")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


def _scatter(axes: Axes, pairs: Sequence[Measured], **style: object) -> None:
    axes.scatter([each.parameters for each in pairs], [each.accuracy for each in pairs], **style)
