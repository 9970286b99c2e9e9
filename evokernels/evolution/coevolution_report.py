"""What a co-evolution leaves behind: its files, and a script that trains the best pair."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from evokernels.evolution.coevolution_history import CoevolutionResult, Round, pareto_front
from evokernels.evolution.coevolution_pictures import plot_history, plot_pareto
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.comparison import Row
from evokernels.evolution.files import csv_text, write_atomically
from evokernels.evolution.html_report.page import REPORT
from evokernels.evolution.pairs import Measured, Pair
from evokernels.evolution.tuning import setting
from evokernels.evolution.winner import winner_csv
from evokernels.genome import Genome
from evokernels.terms import registration

__all__ = ["FILES", "write_progress", "write_result"]

ARCHITECTURE, GENOME = "best_architecture.json", "best_genome.json"
HISTORY, HISTORY_PLOT = "history.csv", "coevolution.png"
PARETO, PARETO_PLOT = "pareto.csv", "pareto.png"
COMPARISON, WINNER_FILE, SCRIPT = "comparison.csv", "winner.csv", "train_best.py"
FILES = (
    *(REPORT, ARCHITECTURE, GENOME, HISTORY, HISTORY_PLOT, PARETO, PARETO_PLOT),
    *(COMPARISON, WINNER_FILE, SCRIPT),
)


def write_progress(folder: pathlib.Path, history: Sequence[Round], best: Pair) -> None:
    """Write the history and the best pair's two files; raises JournalError if it cannot."""
    write_atomically(folder / HISTORY, history_csv(history).encode())
    write_atomically(folder / ARCHITECTURE, best.architecture.to_json().encode())
    write_atomically(folder / GENOME, best.optimizer.to_json().encode())


def write_result(
    folder: pathlib.Path, settings: CoevolutionSettings, result: CoevolutionResult
) -> None:
    """Write all the rest; raises JournalError if it cannot."""
    write_atomically(folder / PARETO, pareto_csv(result.pairs).encode())
    write_atomically(folder / COMPARISON, comparison_csv(result).encode())
    write_atomically(folder / WINNER_FILE, winner_csv(result.winner, settings).encode())
    write_atomically(
        folder / SCRIPT, training_script(settings, result.best.pair.optimizer).encode()
    )
    plot_history(folder / HISTORY_PLOT, result.history)
    plot_pareto(folder / PARETO_PLOT, settings, result)


def history_csv(history: Sequence[Round]) -> str:
    """One line a generation, floats with all their digits; no times, so that an interrupted and
    an unbroken run give the same bytes. Generations count from 1, as on screen."""
    columns: dict[str, Callable[[Round], object]] = {
        "generation": lambda entry: entry.number + 1,
        "best_architecture": lambda entry: entry.architectures.best,
        "mean_architecture": lambda entry: entry.architectures.mean,
        "best_optimizer": lambda entry: entry.optimizers.best,
        "mean_optimizer": lambda entry: entry.optimizers.mean,
        "best_pair": lambda entry: entry.best.score.fitness,
        "best_fitness": lambda entry: entry.best.fitness,
        "best_accuracy": lambda entry: entry.best.accuracy,
        "best_parameters": lambda entry: entry.best.parameters,
        "pairs": lambda entry: entry.pairs,
        "evaluations": lambda entry: entry.evaluations,
        "reused": lambda entry: entry.reused,
        "failed_pairs": lambda entry: entry.failed,
        "failed_architectures": lambda entry: entry.architectures.failed,
        "failed_optimizers": lambda entry: entry.optimizers.failed,
    }
    return _csv(columns, history)


def pareto_csv(pairs: Sequence[Measured]) -> str:
    """One line for each pair that was measured, in the order of the search; which of them are on
    the front of accuracy against parameters. Accuracy is that of the split that selects."""
    front = set(pareto_front(pairs))
    columns: dict[str, Callable[[Measured], object]] = {
        "generation": lambda each: each.generation + 1,
        "parameters": lambda each: each.parameters,
        "accuracy": lambda each: each.accuracy,
        "fitness": lambda each: each.fitness,
        "worth": lambda each: each.score.fitness,
        "status": lambda each: each.score.status.value,
        "front": lambda each: "yes" if each in front else "no",
        "components": lambda each: ", ".join(each.pair.architecture.components),
        "terms": lambda each: " + ".join(term.name for term in each.pair.optimizer.term_types),
        "setting": lambda each: setting(each.pair.optimizer),
    }
    return _csv(columns, pairs)


def comparison_csv(result: CoevolutionResult) -> str:
    """Every run of the comparison as one line; fitness and accuracy are of the test split."""
    columns: dict[str, Callable[[Row], object]] = {
        "contender": lambda row: row.name,
        "task": lambda row: row.trial.task,
        "seed": lambda row: row.trial.seed,
        "parameters": lambda row: result.contenders[row.name].parameters(row.trial.task),
        "status": lambda row: row.outcome.status.value,
        "fitness": lambda row: row.outcome.test_fitness,
        "accuracy": lambda row: row.outcome.test_accuracy,
        "final_loss": lambda row: row.outcome.final_loss,
        "steps": lambda row: row.outcome.steps,
    }
    return _csv(columns, result.comparison.rows)


Line = TypeVar("Line")


def _csv(columns: Mapping[str, Callable[[Line], object]], lines: Sequence[Line]) -> str:
    return csv_text(columns, [[value(line) for value in columns.values()] for line in lines])


def training_script(settings: CoevolutionSettings, optimizer: Genome) -> str:
    """Python that rebuilds the best pair from its two files and trains it on the first task."""
    conditions = settings.conditions
    return f'''\
"""Trains the pair that is in this folder, as the co-evolution did but for its arithmetic.

python {SCRIPT} [STEPS]
"""

import pathlib
import sys

import torch

from evokernels import Architecture, FusedEvolvedOptimizer, Genome
from evokernels.tasks import Batches, get_task, training_batches
{registration(optimizer.term_types)}
FOLDER = pathlib.Path(__file__).parent
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else {conditions.steps}

torch.manual_seed(0)
task = get_task({settings.tasks[0]!r})
# data are looked for in $EVOKERNELS_DATA, else in ~/.cache/evokernels/data
data = task.load(None, {conditions.train_samples}, {conditions.validation_samples})
model = task.build(Architecture.load(FOLDER / "{ARCHITECTURE}"))
genome = Genome.load(FOLDER / "{GENOME}")
optimizer = FusedEvolvedOptimizer(model.parameters(), genome, total_steps=STEPS)

for x, y in training_batches(data, {conditions.batch_size}, STEPS, seed=0):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
with torch.inference_mode():
    right = [model(x).argmax(dim=1) == y for x, y in Batches(data).split("test", 250)]
print(f"{{STEPS}} steps: test accuracy {{torch.cat(right).float().mean():.4f}}")
'''
