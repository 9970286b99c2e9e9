"""What a run leaves behind: its files, and how to use the best genome."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from evokernels.evolution.audit import Audit, audit_csv
from evokernels.evolution.comparison import Comparison
from evokernels.evolution.figures import BEST_COLOUR, MEAN_COLOUR, new_figure, save_figure
from evokernels.evolution.files import csv_text, write_atomically
from evokernels.evolution.history import Generation
from evokernels.evolution.html_report.page import REPORT
from evokernels.evolution.ledger import Cost, ledger_csv
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.winner import Winner, winner_csv
from evokernels.genome import Genome
from evokernels.terms import registration

__all__ = [
    "COMPARISON_FILES",
    "FILES",
    "history_csv",
    "plot_history",
    "usage",
    "write_audit",
    "write_best_genome",
    "write_comparison",
    "write_history",
    "write_ledger",
    "write_winner",
]

BEST_GENOME, HISTORY, EVOLUTION_PLOT = "best_genome.json", "history.csv", "evolution.png"
WINNER, LEDGER, AUDIT = "winner.csv", "ledger.csv", "audit.csv"
# and AUDIT, if one was asked for
FILES = REPORT, BEST_GENOME, HISTORY, EVOLUTION_PLOT, WINNER, LEDGER
COMPARISON_TABLE, COMPARISON_PLOT = "comparison.csv", "comparison.png"
COMPARISON_FILES = REPORT, COMPARISON_TABLE, COMPARISON_PLOT


def history_csv(history: Sequence[Generation]) -> str:
    """One line a generation, floats with all their digits; no times, so that an interrupted and
    an unbroken run give the same bytes. Generations count from 1, as on screen. The last column is
    there only if the run refines."""
    tasks = list(history[0].task_best)
    refines = history[0].refining is not None
    return csv_text(
        ["generation", "best_fitness", "mean_fitness", "best_so_far", "best_accuracy"]
        + [f"{kind}_{task}" for task in tasks for kind in ("best", "mean")]
        + ["evaluations", "reused", "raced", "stopped", "diverged", "failed"]
        + ["refining"] * refines,
        [
            [entry.number + 1, entry.best, entry.mean, entry.best_so_far, entry.best_accuracy]
            + [values[task] for task in tasks for values in (entry.task_best, entry.task_mean)]
            + [entry.evaluations, entry.reused, entry.raced]
            + [entry.stopped, entry.diverged, entry.failed]
            + [entry.refining] * refines
            for entry in history
        ],
    )


def write_history(folder: pathlib.Path, history: Sequence[Generation]) -> None:
    """Write ``history.csv``; raises JournalError if it cannot."""
    write_atomically(folder / HISTORY, history_csv(history).encode())


def write_best_genome(folder: pathlib.Path, genome: Genome) -> None:
    """Write ``best_genome.json``; raises JournalError if it cannot."""
    write_atomically(folder / BEST_GENOME, genome.to_json().encode())


def write_winner(folder: pathlib.Path, winner: Winner, settings: RunSettings) -> None:
    """Write ``winner.csv``; raises JournalError if it cannot."""
    write_atomically(folder / WINNER, winner_csv(winner, settings).encode())


def write_ledger(folder: pathlib.Path, ledger: Sequence[Cost]) -> None:
    """Write ``ledger.csv``; raises JournalError if it cannot."""
    write_atomically(folder / LEDGER, ledger_csv(ledger).encode())


def write_audit(folder: pathlib.Path, audit: Audit) -> None:
    """Write ``audit.csv``; raises JournalError if it cannot."""
    write_atomically(folder / AUDIT, audit_csv(audit).encode())


def usage(folder: pathlib.Path, genome: Genome, steps: int) -> str:
    """Lines of Python that put the best genome to work on a ``model``.

    Args:
        folder: the run folder.
        genome: the best one, whose own terms are registered.
        steps: the length of training to fill in: the one that the genome was selected at.
    """
    path = str((folder / BEST_GENOME).resolve())
    return (
        "from evokernels import FusedEvolvedOptimizer, Genome\n"
        f"{registration(genome.term_types)}"
        f"genome = Genome.load({path!r})\n"
        f"optimizer = FusedEvolvedOptimizer(model.parameters(), genome, total_steps={steps})"
    )


def plot_history(folder: pathlib.Path, history: Sequence[Generation]) -> None:
    """Write ``evolution.png``: best and mean fitness over the generations, overall and per task."""
    tasks = list(history[0].task_best)
    panels = [("all tasks", [e.best for e in history], [e.mean for e in history])]
    if len(tasks) > 1:
        panels += [
            (task, [e.task_best[task] for e in history], [e.task_mean[task] for e in history])
            for task in tasks
        ]
    else:
        panels[0] = (tasks[0], *panels[0][1:])
    numbers = [entry.number + 1 for entry in history]
    figure = new_figure(3.6 * len(panels) + 0.6, 3.4)
    for place, (title, best, mean) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.plot(numbers, best, color=BEST_COLOUR, marker="o", markersize=3, label="best")
        axes.plot(
            numbers, mean, color=MEAN_COLOUR, marker="o", markersize=3, label="mean (failed: -1)"
        )
        axes.set_title(title)
        axes.set_xlabel("generation")
        axes.set_ylabel("fitness")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    save_figure(figure, folder / EVOLUTION_PLOT)


def write_comparison(
    folder: pathlib.Path, comparison: Comparison, tuned: Comparison | None = None
) -> None:
    """Write ``comparison.csv`` and ``comparison.png``; raises JournalError if it cannot."""
    write_atomically(folder / COMPARISON_TABLE, comparison.csv(tuned).encode())
    _plot_comparison(folder / COMPARISON_PLOT, comparison, tuned)


def _plot_comparison(path: pathlib.Path, comparison: Comparison, tuned: Comparison | None) -> None:
    """Bar charts: fitness of each optimizer on each task and overall, ± standard error.

    One chart, or one above the other: as they were given, and tuned.
    """
    import matplotlib  # here, as in `_figure`

    versions = [comparison] if tuned is None else [comparison, tuned]
    groups = [*comparison.tasks, "overall"] if len(comparison.tasks) > 1 else comparison.tasks
    count = len(comparison.optimizers)
    width = 0.8 / count
    # a genome file by its name and folder, so that a long path leaves room for the bars
    labels = ["/".join(pathlib.PurePath(name).parts[-2:]) for name in comparison.optimizers]
    legend_width = 0.7 + 0.09 * max(map(len, labels))
    wide = 1.5 + 0.4 * len(groups) * max(count, 3) + legend_width
    figure = new_figure(wide, 3.6 * len(versions))
    # the usual ten, or more in pairs of dark and light
    colours = matplotlib.color_sequences["tab10" if count <= 10 else "tab20"]
    for row, (version, title) in enumerate(zip(versions, ("untuned", "tuned"), strict=False), 1):
        axes = figure.add_subplot(len(versions), 1, row)
        for place, name in enumerate(version.optimizers):
            estimates = [
                version.overall_fitness(name)
                if group == "overall"
                else version.task_fitness(name, group)
                for group in groups
            ]
            centres = [group + (place - (count - 1) / 2) * width for group in range(len(groups))]
            axes.bar(
                centres,
                [estimate.mean for estimate in estimates],
                width=0.92 * width,
                yerr=[estimate.error for estimate in estimates],
                capsize=2,
                color=colours[place % len(colours)],
                label=labels[place] if row == 1 else None,
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("fitness (mean ± standard error over seeds)")
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if tuned is not None:
            axes.set_title(title)
    figure.legend(loc="outside right upper")
    save_figure(figure, path)
