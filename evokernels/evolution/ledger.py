"""What a search cost, and what each of its rules saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evokernels.evolution.files import csv_text
from evokernels.evolution.journal import Journal

__all__ = ["Cost", "ledger_csv", "ledger_line", "read_ledger"]

MEANINGS = {
    "cache": "equal optimizers",
    "hurdle": "the hurdle",
    "race": "the seed race",
    "divergence": "divergence",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """A line of the ledger, a row of the view ``cost_ledger`` (`evokernels.evolution.schema`).

    Attributes:
        rule: what the steps were taken for ("search", of it "refinement", if there was any,
            "audit", which finalists are trained as too, and "report"), or what saved them.
        runs: training runs that were made, that the rule ended, or that it left out.
        steps_taken: by these runs.
        steps_saved: that these runs would have taken besides.
        factor: by how much the search would have cost more without the rule; of "search", without
            cache, hurdle and race together. None before the first step.
    """

    rule: str
    runs: int
    steps_taken: int
    steps_saved: int
    factor: float | None


def read_ledger(journal: Journal) -> tuple[Cost, ...]:
    """The ledger as it stands."""
    return tuple(Cost(*row) for row in journal.query("SELECT * FROM cost_ledger"))


def ledger_csv(ledger: Sequence[Cost]) -> str:
    """One line a rule."""
    return csv_text(
        (field.name for field in dataclasses.fields(Cost)), map(dataclasses.astuple, ledger)
    )


def ledger_line(ledger: Sequence[Cost]) -> str:
    """The ledger as one sentence."""
    by_rule = {cost.rule: cost for cost in ledger}
    search = by_rule["search"]
    saved = ", ".join(
        f"{meaning} {by_rule[rule].steps_saved:,}" for rule, meaning in MEANINGS.items()
    )
    refinement = by_rule.get("refinement")
    share = f", of them {refinement.steps_taken:,} to refine numbers" if refinement else ""
    return (
        f"The search took {search.steps_taken:,} training steps in {search.runs:,} runs{share}. "
        f"Steps saved by {saved}: {search.factor or 1.0:.2f} times fewer steps, divergence not "
        "counted."
    )
