"""Co-evolution against the truth: the table, the space, and what the searches find in it."""

import math
import random
import statistics

import pytest
import truth
import truth_table
from truth import BUDGET, SEARCHES, SEEDS, WITHIN, BlockSpace, gaps, neighbours
from truth_table import PAIRS, RECIPES, RESULTS, SEQUENCES, Recipe, read_table

from evokernels.errors import JournalError
from evokernels.evolution.pool import Evaluation
from evokernels.search.score import Score


@pytest.fixture(scope="module")
def table():
    return read_table()


@pytest.fixture(scope="module")
def last_gaps(table):
    """Of each search: the gap at the end, for each seed."""
    return {
        name: [gaps(table, search(table, seed))[-1] for seed in SEEDS]
        for name, search in SEARCHES.items()
    }


# The space


def test_the_space_has_40_by_40_pairs_of_different_networks_and_optimizers():
    assert (len(SEQUENCES), len(RECIPES), len(PAIRS)) == (1 + 3 + 9 + 27, 5 * 8, 1600)
    keys = {truth_table.trial(*pair).key for pair in PAIRS}
    assert len(keys) == len(PAIRS)


@pytest.mark.parametrize("blocks", SEQUENCES, ids=" ".join)
def test_neighbours_are_the_sequences_one_edit_away(blocks):
    assert neighbours(blocks) == sorted(it for it in SEQUENCES if edits(blocks, it) == 1)


def edits(one, other):
    """Levenshtein's distance, by its definition."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        edits(one[1:], other) + 1,
        edits(one, other[1:]) + 1,
        edits(one[1:], other[1:]) + (one[0] != other[0]),
    )


def test_every_move_of_the_block_space_stays_in_it():
    space, rng = BlockSpace(), random.Random(0)
    assert len(set(space.start(len(SEQUENCES), rng))) == len(SEQUENCES)
    for one in SEQUENCES:
        for other in SEQUENCES:
            assert space.crossover(one, other, rng) in SEQUENCES
        assert space.mutate(one, rng, 0.5) in SEQUENCES


# The table


def test_the_table_has_every_pair_and_a_spread_that_is_worth_searching(table):
    assert list(table) == list(PAIRS)
    good = [score.fitness for score in table.values() if not score.status.failed]
    assert 0.0 < min(good) < 0.2 < 0.8 < max(good) < 1.05


@pytest.mark.parametrize(
    "pair",
    [
        ((), Recipe("adam", 1)),
        (("plain",), Recipe("evolved_2025", 2)),
        (("normed", "residual"), Recipe("sgd_momentum", 3)),
        (("residual", "plain"), Recipe("rmsprop", 4)),
    ],
    ids=str,
)
def test_a_pair_that_is_trained_again_is_worth_what_the_table_says(pair, table):
    train = Evaluation(truth_table.CONDITIONS, truth_table.THREADS, "cpu", data_dir=None)
    outcome = train(truth_table.trial(*pair))
    assert outcome.status is table[pair].status
    # another processor sums in another order, and 60 steps make more of it: a few images of 1,000
    assert outcome.fitness == pytest.approx(table[pair].fitness, abs=0.02)


def test_no_pair_of_the_table_is_above_the_one_that_the_page_names(table):
    best = max(table.items(), key=lambda entry: entry[1].fitness)
    (blocks, recipe), score = best
    page = (RESULTS / "truth.md").read_text(encoding="utf-8")
    line = f"{' + '.join(blocks)}, {truth.named(recipe)}; fitness {score.fitness:.4f}."
    assert line in page
    assert gaps(table, [best[0]]) == [0.0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-1], "1599 rows for 1600 pairs"),
        (lambda lines: [*lines[:-1], lines[1]], "has not every pair once"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(damage, message, tmp_path):
    lines = truth_table.TABLE.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(damage(lines)), encoding="utf-8")
    with pytest.raises(JournalError, match=message):
        read_table(path)


def test_a_table_that_is_missing_says_what_makes_it(tmp_path):
    with pytest.raises(JournalError, match=r"bench/truth_table\.py makes it"):
        read_table(tmp_path / "pairs.csv")


# The searches


def test_a_gap_is_the_share_below_the_best_of_what_was_seen_so_far():
    table = dict(zip("abcd", map(Score, (0.5, 0.2, 0.8, 0.6)), strict=True))
    assert gaps(table, "badc") == pytest.approx([0.75, 0.375, 0.25, 0.0])


@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_looks_up_more_than_a_tenth_of_the_pairs_or_one_of_them_twice(name, table):
    assert len(PAIRS) / 10 == BUDGET
    for seed in SEEDS[:5]:
        pairs = SEARCHES[name](table, seed)
        assert len(set(pairs)) == len(pairs) <= BUDGET
        assert set(pairs) <= set(PAIRS)
        assert pairs == SEARCHES[name](table, seed)


def test_what_a_search_sees_before_it_ends_decides_what_it_looks_up(table):
    turned = {pair: Score(-score.fitness) for pair, score in table.items()}
    for name in truth.SETTINGS:
        assert SEARCHES[name](table, 0) != SEARCHES[name](turned, 0), name


def test_co_evolution_comes_within_half_a_percent_in_the_median_of_20_seeds(last_gaps):
    assert len(SEEDS) == 20
    assert statistics.median(last_gaps["co-evolution"]) <= WITHIN == 0.005


def test_what_was_tuned_is_reported_on_other_seeds():
    assert set(truth.TUNING_SEEDS).isdisjoint(SEEDS)
    assert truth.TRIED.keys() == truth.SETTINGS.keys()
    for name, settings in truth.SETTINGS.items():
        tried = truth.TRIED[name]
        assert settings.keys() == tried.keys()
        assert all(value in tried[setting] for setting, value in settings.items())


def test_random_search_succeeds_as_often_as_chance_says(table):
    good = sum(gap <= WITHIN for pair in PAIRS for gap in gaps(table, [pair]))
    misses = math.comb(len(PAIRS) - good, BUDGET) / math.comb(len(PAIRS), BUDGET)
    seeds = 1000
    found = sum(
        gaps(table, SEARCHES["random search"](table, seed))[-1] <= WITHIN for seed in range(seeds)
    )
    deviation = math.sqrt(seeds * misses * (1 - misses))
    assert abs(found - seeds * (1 - misses)) < 4 * deviation


def test_the_page_has_what_the_searches_come_to(last_gaps):
    page = (RESULTS / "truth.md").read_text(encoding="utf-8")
    for name, last in last_gaps.items():
        within = sum(gap <= WITHIN for gap in last)
        assert f"| {name} | {statistics.median(last):.2%} |" in page
        assert f"| {within} of 20 |" in page
