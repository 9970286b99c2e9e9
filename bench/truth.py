"""Hold searches against the truth: co-evolution, one joint genetic algorithm, random search.

The space is that of bench/truth_table.py, in which every pair has been trained. Each search may
look up the same number of different pairs, a tenth of the space, with each of 20 seeds; what counts
is how far the best pair that it has seen is from the best pair that there is. Co-evolution is there
twice: as it runs elsewhere, and with every individual meeting nobody but the other side's champion.
Writes truth.md and truth.png.

With --tune it shows instead what other settings come to, on seeds that are not reported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from commandline import exit_code, markdown
from truth_table import (
    BLOCKS,
    CONDITIONS,
    LONGEST,
    PAIRS,
    RECIPES,
    RESULTS,
    SEQUENCES,
    TASK,
    Blocks,
    Pair,
    Recipe,
    read_table,
)

from evokernels.evolution.figures import new_figure, save_figure
from evokernels.evolution.files import write_atomically
from evokernels.search import architecture_operators
from evokernels.search.coevolution import Coevolution, CoevolutionConfig
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.score import Score
from evokernels.search.spaces import FixedSpace, PairSpace

__all__ = ["BUDGET", "SEARCHES", "SEEDS", "WITHIN", "BlockSpace", "gaps", "neighbours"]

BUDGET = len(PAIRS) // 10  # different pairs that a search may look up
WITHIN = 0.005  # of the best pair's fitness
SEEDS = range(20)

# Chosen by `--tune` on seeds of its own; generations enough to spend the budget.
SETTINGS: dict[str, dict[str, int]] = {
    "co-evolution": {
        **{"first": 4, "second": 6, "collaborators": 2, "elites": 2, "tournament": 3},
        "generations": 40,
    },
    "co-evolution, champions alone": {
        **{"first": 4, "second": 6, "collaborators": 1, "elites": 2, "tournament": 2},
        "generations": 40,
    },
    "joint genetic algorithm": {
        **{"population": 12, "elites": 2, "tournament": 3, "generations": 40},
    },
}

# All combinations of these are tried: 64, 64 and 90.
SIZES = {"first": (4, 6, 8, 12), "second": (4, 6, 8, 12), "elites": (1, 2), "tournament": (2, 3)}
TRIED: dict[str, dict[str, tuple[int, ...]]] = {
    "co-evolution": {**SIZES, "collaborators": (2,), "generations": (40,)},
    "co-evolution, champions alone": {**SIZES, "collaborators": (1,), "generations": (40,)},
    "joint genetic algorithm": {
        **{"population": (8, 12, 16, 24, 32), "elites": (1, 2, 4), "tournament": (2, 3, 4)},
        "generations": (20, 40),
    },
}
TUNING_SEEDS = range(1000, 1100)
TUNED_SHOWN = 5

Table = Mapping[Pair, Score]
Search = Coevolution[Blocks, Recipe] | GeneticSearch[Pair]


class BlockSpace:
    """Sequences of blocks, with moves like those that `ArchitectureSpace` has for components."""

    def start(self, size: int, rng: random.Random) -> tuple[Blocks, ...]:
        """Different ones at random."""
        return FixedSpace(SEQUENCES).start(size, rng)

    def crossover(self, first: Blocks, second: Blocks, rng: random.Random) -> Blocks:
        """The head of one and the tail of the other."""
        return architecture_operators.crossover(first, second, rng)

    def mutate(self, individual: Blocks, rng: random.Random, progress: float) -> Blocks:
        """A block more, one less, or another one in its place."""
        return rng.choice(neighbours(individual))


def neighbours(blocks: Blocks) -> list[Blocks]:
    """What one block more, one less or another one makes of a sequence; each once, in order."""
    cuts = [(blocks[:place], blocks[place:]) for place in range(len(blocks) + 1)]
    found = {(*head, *tail[1:]) for head, tail in cuts}
    for block in BLOCKS:
        found |= {(*head, block, *tail[1:]) for head, tail in cuts}
        found |= {(*head, block, *tail) for head, tail in cuts}
    return sorted(other for other in found if other != blocks and len(other) <= LONGEST)


# The same for both searches that move.
ARCHITECTURES, OPTIMIZERS = BlockSpace(), FixedSpace(RECIPES)


def search_with(settings: Mapping[str, int], seed: int) -> Search:
    """One population of pairs, or else one of architectures beside one of optimizers."""
    if "population" in settings:
        space = PairSpace(ARCHITECTURES, OPTIMIZERS)
        return GeneticSearch(GeneticConfig(**settings, seed=seed), space)
    return Coevolution(CoevolutionConfig(**settings, seed=seed), ARCHITECTURES, OPTIMIZERS)


def looked_up(settings: Mapping[str, int], table: Table, seed: int) -> list[Pair]:
    """The different pairs that a search asks for, in this order, as far as the budget goes."""
    search = search_with(settings, seed)
    seen: dict[Pair, None] = {}
    state = search.start()
    while len(seen) < BUDGET and (pairs := search.ask(state)):
        seen |= dict.fromkeys(pairs)
        state = search.tell(state, [table[pair] for pair in pairs])
    return list(seen)[:BUDGET]


def drawn(table: Table, seed: int) -> list[Pair]:
    """As many pairs at random."""
    return random.Random(f"truth {seed}").sample(PAIRS, BUDGET)


# What each search looks up, given the table and a seed.
SEARCHES: dict[str, Callable[[Table, int], list[Pair]]] = {
    **{name: functools.partial(looked_up, settings) for name, settings in SETTINGS.items()},
    "random search": drawn,
}


def gaps(table: Table, pairs: Iterable[Pair]) -> list[float]:
    """After each look-up, by which share the best pair so far is below the best there is."""
    best = max(score.fitness for score in table.values())
    seen = itertools.accumulate((table[pair].fitness for pair in pairs), max)
    return [1.0 - fitness / best for fitness in seen]


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="show what other settings come to")
    command = tune if parser.parse_args().tune else report
    return exit_code(command, "nothing was written")


def report() -> None:
    """Search with the settings above, write the results, print them."""
    table = read_table()
    curves = {
        name: [gaps(table, pairs_of(table, seed)) for seed in SEEDS]
        for name, pairs_of in SEARCHES.items()
    }
    text = summary(table, curves)
    write_atomically(RESULTS / "truth.md", text.encode())
    draw(RESULTS / "truth.png", curves)
    print(text)


def summary(table: Table, curves: Mapping[str, list[list[float]]]) -> str:
    """The page of results, in Markdown."""
    best = max(PAIRS, key=lambda pair: table[pair].fitness)
    alone = [gap for pair in PAIRS for gap in gaps(table, [pair])]
    head = (
        *("search", "median gap", "quartiles", "largest", f"seeds within {WITHIN:.1%}"),
        *("seeds with the best pair", f"pairs until within {WITHIN:.1%}", "pairs in all"),
    )
    rows = markdown(head, [(name, *row(several)) for name, several in curves.items()])
    settings = [f"- {name}: {shown(settings)}." for name, settings in SETTINGS.items()]
    return "\n".join(
        (
            "# Co-evolution against the truth",
            "",
            f"Written by `python bench/truth.py` from `pairs.csv`, which `python "
            f"bench/truth_table.py` has made: {len(SEQUENCES)} architectures × {len(RECIPES)} "
            f"optimizers = {len(PAIRS):,} pairs, each trained once on {TASK} ({CONDITIONS.steps} "
            f"steps, batches of {CONDITIONS.batch_size}, fitness on "
            f"{CONDITIONS.validation_samples:,} validation images).",
            "",
            f"- Best pair: {' + '.join(best[0])}, {named(best[1])}; fitness "
            f"{table[best].fitness:.4f}.",
            f"- Within {WITHIN:.1%} of it, itself included: {sum(gap <= WITHIN for gap in alone)} "
            f"pairs. Median of all pairs: "
            f"{statistics.median(score.fitness for score in table.values()):.4f}. Failed: "
            f"{sum(score.status.failed for score in table.values())}.",
            *(f"- {sentence}" for sentence in interaction(table)),
            "",
            f"Each search looks up at most {BUDGET} different pairs "
            f"({BUDGET / len(PAIRS):.0%}), with each of {len(SEEDS)} seeds. The gap is the share "
            "by which the best pair that it has seen is below the best there is. The last two "
            "columns are medians; a search without anything new to ask for ends early.",
            "",
            *rows,
            "",
            f"All but random search were tuned alike (`--tune`), on seeds {TUNING_SEEDS[0]} to "
            f"{TUNING_SEEDS[-1]}, none of which is among the {len(SEEDS)} reported:",
            "",
            *settings,
            "",
            "![gap against pairs looked up](truth.png)",
            "",
        )
    )


def row(several: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Of a search: what its seeds have come to."""
    last = [curve[-1] for curve in several]
    low, middle, high = statistics.quantiles(last, n=4, method="inclusive")
    needed = statistics.median(
        next((count for count, gap in enumerate(curve, 1) if gap <= WITHIN), math.inf)
        for curve in several
    )
    return (
        f"{middle:.2%}",
        f"{low:.2%} to {high:.2%}",
        f"{max(last):.2%}",
        f"{sum(gap <= WITHIN for gap in last)} of {len(last)}",
        f"{sum(gap == 0.0 for gap in last)} of {len(last)}",
        f"{needed:g}" if math.isfinite(needed) else "never",
        f"{statistics.median(map(len, several)):g}",
    )


def interaction(table: Table) -> list[str]:
    """How far one side's best depends on the other side, in sentences."""

    def optimizer_for(blocks: Blocks) -> Recipe:
        return max(RECIPES, key=lambda recipe: table[blocks, recipe].fitness)

    def architecture_for(recipe: Recipe) -> Blocks:
        return max(SEQUENCES, key=lambda blocks: table[blocks, recipe].fitness)

    on_average = (
        max(SEQUENCES, key=lambda it: sum(table[it, recipe].fitness for recipe in RECIPES)),
        max(RECIPES, key=lambda it: sum(table[blocks, it].fitness for blocks in SEQUENCES)),
    )
    in_turn = [
        *((architecture_for(recipe), recipe) for recipe in map(optimizer_for, SEQUENCES)),
        *((blocks, optimizer_for(blocks)) for blocks in map(architecture_for, RECIPES)),
    ]
    good = sum(gaps(table, [pair])[0] <= WITHIN for pair in in_turn)
    return [
        f"The architectures have {len(set(map(optimizer_for, SEQUENCES)))} different best "
        f"optimizers, the optimizers {len(set(map(architecture_for, RECIPES)))} different best "
        f"architectures.",
        f"The architecture and the optimizer that are best on average make a pair with a gap of "
        f"{gaps(table, [on_average])[0]:.2%}.",
        "Whoever takes one side as given, finds the best of the other for it, then the best of the "
        f"first one for that, is within {WITHIN:.1%} from {good} of {len(in_turn)} starts.",
    ]


def named(recipe: Recipe) -> str:
    """A recipe in words."""
    return f"{recipe.rule} at {10 ** (recipe.half_decades / 2):.3g} times its learning rate"


def shown(settings: Mapping[str, int]) -> str:
    """Settings as a part of a sentence."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def draw(path: pathlib.Path, curves: Mapping[str, list[list[float]]]) -> None:
    """The median gap of each search against the pairs looked up, with its quartiles."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for name, several in curves.items():
        # a search that ends early stays where it is
        whole = ([*curve, *[curve[-1]] * (BUDGET - len(curve))] for curve in several)
        at_each = zip(*whole, strict=True)
        quartiles = [statistics.quantiles(gap, n=4, method="inclusive") for gap in at_each]
        low, middle, high = zip(*quartiles, strict=True)
        pairs = range(1, BUDGET + 1)
        axes.plot(pairs, [100 * gap for gap in middle], label=name)
        axes.fill_between(pairs, [100 * gap for gap in low], [100 * gap for gap in high], alpha=0.2)
    axes.axhline(100 * WITHIN, color="black", linestyle=":", label=f"{WITHIN:.1%}")
    axes.set(xlabel="different pairs looked up", ylabel="gap to the best pair (%)", ylim=(0, 8))
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def tune() -> None:
    """Print what the best of the settings tried come to on the tuning seeds."""
    table = read_table()
    for name, tried in TRIED.items():
        found = []
        for values in itertools.product(*tried.values()):
            settings = dict(zip(tried, values, strict=True))
            last = [gaps(table, looked_up(settings, table, seed))[-1] for seed in TUNING_SEEDS]
            within = sum(gap <= WITHIN for gap in last)
            found.append((within, statistics.fmean(last), settings))
        reached = sum(2 * within >= len(TUNING_SEEDS) for within, _, _ in found)
        print(
            f"{name}: {reached} of {len(found)} settings are within {WITHIN:.1%} with half of "
            f"{len(TUNING_SEEDS)} seeds or more; the best of them:"
        )
        for within, mean, settings in sorted(found, key=lambda it: (-it[0], it[1]))[:TUNED_SHOWN]:
            print(f"  {within} within {WITHIN:.1%}, mean gap {mean:.3%}: {shown(settings)}")


if __name__ == "__main__":
    sys.exit(main())
