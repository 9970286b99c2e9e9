"""Co-evolution: who meets whom, what that is worth, and where it leads."""

import dataclasses
import itertools
import pickle
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evokernels.errors import SettingsError
from evokernels.search import (
    ArchitectureSpace,
    Coevolution,
    CoevolutionConfig,
    FixedSpace,
    GeneticConfig,
    GeneticSearch,
    OptimizerSpace,
    Score,
    Status,
)

SMALL = CoevolutionConfig(first=7, second=5, generations=6, seed=3)
FAILED = Score(100.0, Status.DIVERGED)


def smooth(pair):
    """Some worth of an architecture and an optimizer, with failures."""
    architecture, genome = pair
    fitness = len(architecture.components) * (genome.lr_log10 + 3.0) - genome.beta1
    return Score(fitness, Status.DIVERGED if genome.alphas[0] < -0.5 else Status.OK)


def noise(pair):
    """A worth that only the pair itself decides, and that has no structure."""
    return Score(random.Random(repr(pair)).random())


def search_of(config=SMALL):
    """A co-evolution of architectures and optimizers."""
    return Coevolution(config, ArchitectureSpace(8), OptimizerSpace(3))


def numbers(config=SMALL, first=40, second=40):
    """A co-evolution of two fixed lists."""
    return Coevolution(config, FixedSpace(range(first)), FixedSpace(range(second)))


def play(search, scoring):
    """All states of a search, and the pairs asked in each of them but the last."""
    states, asked = [search.start()], []
    while pairs := search.ask(states[-1]):
        asked.append(pairs)
        states.append(search.tell(states[-1], [scoring(pair) for pair in pairs]))
    return states, asked


# The same scores lead to the same states


def test_the_same_seed_and_scores_give_the_same_states():
    states, asked = play(search_of(), smooth)
    assert play(search_of(), smooth) == (states, asked)
    other, _ = play(search_of(dataclasses.replace(SMALL, seed=4)), smooth)
    assert other[-1].best != states[-1].best


def test_a_search_goes_on_from_any_state_and_can_be_told_twice():
    states, asked = play(search_of(), smooth)
    for place, pairs in enumerate(asked):
        state = pickle.loads(pickle.dumps(states[place]))
        search = search_of()
        for _ in range(2):
            assert search.ask(state) == pairs
            assert search.tell(state, [smooth(pair) for pair in pairs]) == states[place + 1]


def test_a_replay_from_recorded_scores_ends_in_the_same_state():
    recorded = {}

    def recording(pair):
        return recorded.setdefault(pair, smooth(pair))

    states, _ = play(search_of(), recording)
    assert play(search_of(), recorded.__getitem__)[0] == states


def test_the_global_generator_is_neither_read_nor_touched():
    random.seed(1)
    before = random.getstate()
    first = play(search_of(), smooth)
    assert random.getstate() == before
    random.seed(2)
    assert play(search_of(), smooth) == first


class Draws:
    """A space whose children are the numbers drawn for them; it notes the progress."""

    def __init__(self):
        self.progress = []

    def start(self, size, rng):
        return tuple(range(size))

    def crossover(self, first, second, rng):
        return first

    def mutate(self, individual, rng, progress):
        self.progress.append(progress)
        return rng.random()


def test_every_generation_and_side_has_its_own_random_numbers():
    config = CoevolutionConfig(first=7, second=7, generations=4, collaborators=3, elites=0)
    first, second = Draws(), Draws()
    states, asked = play(Coevolution(config, first, second), noise)
    born = [each for state in states[1:] for side in state.populations for each in side]
    assert len(set(born)) == len(born) == 3 * 14
    # both sides are the same at the start, but not whom they meet
    assert partners(asked[0], range(7), 0) != partners(asked[0], range(7), 1)
    search = numbers(dataclasses.replace(SMALL, first=7, second=7))
    assert search.start().populations[0] != search.start().populations[1]
    later = dataclasses.replace(search.start(), generation=1)
    assert search.ask(later) != search.ask(search.start())


def test_mutation_is_told_how_far_the_search_is():
    first, second = Draws(), Draws()
    play(Coevolution(dataclasses.replace(SMALL, generations=4), first, second), noise)
    assert sorted(set(first.progress)) == sorted(set(second.progress)) == [0.0, 0.25, 0.5]
    space = Draws()
    config = GeneticConfig(population=6, generations=5)
    search = GeneticSearch(config, space)
    state = search.start()
    while genomes := search.ask(state):
        state = search.tell(state, [Score(genome) for genome in genomes])
    assert sorted(set(space.progress)) == [0.0, 0.2, 0.4, 0.6]


# Who meets whom


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    choices=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    generations=st.integers(1, 4),
    collaborators=st.integers(1, 11),
    elites=st.integers(0, 8),
    tournament=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    worth=st.randoms(use_true_random=False),
)
def test_no_generation_asks_for_more_than_was_announced(
    sizes, choices, generations, collaborators, elites, tournament, seed, worth
):
    larger = max(sizes)
    config = CoevolutionConfig(
        *sizes,
        generations=generations,
        collaborators=collaborators,
        elites=min(elites, larger - 1),
        tournament=min(tournament, larger),
        seed=seed,
    )
    assert config.evaluations_per_generation == collaborators * sum(sizes)
    search = numbers(config, *choices)

    def scoring(pair):
        # few values, so that there are ties
        return Score(
            float(worth.randint(0, 3)), worth.choice([Status.OK, Status.OK, Status.CRASHED])
        )

    states, asked = play(search, scoring)
    assert len(asked) == generations
    for state, pairs in zip(states, asked, strict=False):
        assert 1 <= len(pairs) <= collaborators * sum(sizes)
        assert len(set(pairs)) == len(pairs)
        for side in (0, 1):
            members = state.populations[side]
            assert len(members) == sizes[side]
            known = {*members, state.champions[side]} if state.champions else {*members}
            assert {pair[side] for pair in pairs} <= known
            assert {pair[side] for pair in pairs} >= set(members)
    assert [state.generation for state in states] == list(range(generations + 1))
    assert states[-1].populations == ((), ())
    assert search.ask(states[-1]) == ()


def partners(pairs, members, side):
    """Whom all of one side have met."""
    met = [{pair[1 - side] for pair in pairs if pair[side] == each} for each in members]
    return set.intersection(*met)


@pytest.mark.parametrize("collaborators", [1, 2, 3])
def test_all_of_a_population_meet_the_champion_and_the_same_others(collaborators):
    config = dataclasses.replace(SMALL, collaborators=collaborators)
    states, asked = play(numbers(config), noise)
    drawn = [set(), set()]
    for state, following, pairs in zip(states, states[1:], asked, strict=False):
        told = {pair: noise(pair) for pair in pairs}
        for side in (0, 1):
            met = partners(pairs, state.populations[side], side)
            assert len(met) == collaborators
            if state.champions:
                assert state.champions[1 - side] in met
            for each, score in zip(state.populations[side], following.scored[side], strict=True):
                worth = [
                    told[(each, other) if side == 0 else (other, each)].fitness for other in met
                ]
                assert score.fitness == pytest.approx(statistics.fmean(worth))
                assert score.status is Status.OK
            drawn[side] |= met - {state.champions and state.champions[1 - side]}
    if collaborators > 1:
        assert all(len(others) > collaborators for others in drawn)  # not the same ones always


@pytest.mark.parametrize("seed", range(10))
def test_equal_individuals_are_one(seed):
    search = numbers(CoevolutionConfig(first=4, second=4, seed=seed))
    state = dataclasses.replace(search.start(), populations=((5, 5, 5, 6), (7, 8, 7, 7)))
    assert set(search.ask(state)) == {(5, 7), (5, 8), (6, 7), (6, 8)}


def test_more_collaborators_than_there_are_means_all():
    search = numbers(CoevolutionConfig(first=3, second=5, collaborators=9, generations=3))
    for state, pairs in zip(*play(search, noise), strict=False):
        assert set(pairs) == set(itertools.product(*state.populations))
        assert len(pairs) == 15


# Champions, elites and offspring


def test_champions_and_elites_pass_on_unchanged():
    states, _ = play(numbers(dataclasses.replace(SMALL, elites=3)), noise)
    for state, following in itertools.pairwise(states[:-1]):
        for side in (0, 1):
            worth = dict(zip(state.populations[side], following.scored[side], strict=True))
            ranked = sorted(worth, key=lambda each: worth[each].fitness, reverse=True)
            champion = following.champions[side]
            expected = [champion, *(each for each in ranked if each != champion)]
            assert following.populations[side][:3] == tuple(expected[:3])


def test_without_elites_the_champions_are_met_all_the_same():
    search = numbers(dataclasses.replace(SMALL, elites=0), 400, 400)
    states, asked = play(search, noise)
    left = 0
    for state, pairs in list(zip(states, asked, strict=False))[1:]:
        left += state.champions[0] not in state.populations[0]
        for side in (0, 1):
            assert state.champions[1 - side] in partners(pairs, state.populations[side], side)
    assert left


@pytest.mark.parametrize("elites", [0, 2])
def test_a_state_says_who_the_parents_of_its_individuals_are(elites):
    class Crossing:
        """Individuals are a number and founders; a child has those of both."""

        def start(self, size, rng):
            return tuple((place, frozenset({place})) for place in range(size))

        def crossover(self, first, second, rng):
            return rng.random(), first[1] | second[1]

        def mutate(self, individual, rng, progress):
            return individual

    search = Coevolution(dataclasses.replace(SMALL, elites=elites), Crossing(), Crossing())
    states, _ = play(search, noise)
    assert states[0].parents == (((),) * 7, ((),) * 5)
    assert states[-1].parents == ((), ())
    for before, state in itertools.pairwise(states[:-1]):
        for side in (0, 1):
            known, parents = before.populations[side], state.parents[side]
            assert list(map(len, parents)) == [1] * elites + [2] * (len(known) - elites)
            for each, places in zip(state.populations[side], parents, strict=True):
                assert each[1] == frozenset().union(*(known[place][1] for place in places))
                assert len(places) == 2 or each == known[places[0]]


def test_the_best_pair_is_the_best_ever_told():
    for elites in (0, 2):
        states, asked = play(search_of(dataclasses.replace(SMALL, elites=elites)), smooth)
        told = []
        for state, pairs in zip(states[1:], asked, strict=True):
            told += [smooth(pair).rank for pair in pairs]
            assert state.best.score.rank == max(told)
            assert smooth(state.best.pair) == state.best.score
            assert state.champions == state.best.pair


def test_what_a_pair_is_told_again_replaces_what_it_was_told_before():
    search = numbers()
    state = search.tell(search.start(), [noise(pair) for pair in search.ask(search.start())])
    champions, pairs = state.best.pair, search.ask(state)
    assert champions in pairs

    def fallen(pair):
        return Score(-9.0) if pair == champions else noise(pair)

    following = search.tell(state, [fallen(pair) for pair in pairs])
    assert following.best.score == max((fallen(pair) for pair in pairs), key=lambda it: it.rank)
    # one that is not told again keeps what it was told
    elsewhere = dataclasses.replace(
        state, best=dataclasses.replace(state.best, pair=(-1, -1)), populations=((1, 2), (3, 4))
    )
    pairs = search.ask(elsewhere)
    assert (-1, -1) not in pairs
    assert search.tell(elsewhere, [Score(-9.0)] * len(pairs)).best == elsewhere.best


def test_nobody_is_twice_in_a_population_where_there_are_others():
    # with this tournament the best alone has children, all of them its neighbours
    config = CoevolutionConfig(first=9, second=9, generations=8, tournament=9)
    for state in play(numbers(config), noise)[0][:-1]:
        assert all(len(set(population)) == 9 for population in state.populations)


def test_ties_go_to_the_earlier():
    search = numbers(dataclasses.replace(SMALL, elites=3))
    state = search.start()
    pairs = search.ask(state)
    following = search.tell(state, [Score(0.5)] * len(pairs))
    assert following.best.pair == pairs[0]
    for side in (0, 1):
        champion, members = pairs[0][side], state.populations[side]
        expected = [champion, *(each for each in members if each != champion)]
        assert following.populations[side][:3] == tuple(expected[:3])


# Failed pairs


def told(search, scoring):
    state = search.start()
    return state, search.tell(state, [scoring(pair) for pair in search.ask(state)])


@pytest.mark.parametrize("fitness", [-100.0, 100.0])
def test_a_failed_pair_counts_as_the_worst_that_held(fitness):
    # everybody meets everybody: 3 and 2, worth 10 a + b, and (2, 1) fails
    search = numbers(CoevolutionConfig(first=3, second=2, collaborators=3, generations=2), 3, 2)

    def scoring(pair):
        failed = Score(fitness, Status.DIVERGED)
        return failed if pair == (2, 1) else Score(10.0 * pair[0] + pair[1])

    state, following = told(search, scoring)
    worth = [
        dict(zip(state.populations[side], following.scored[side], strict=True)) for side in (0, 1)
    ]
    assert worth[0] == {0: Score(0.5), 1: Score(10.5), 2: Score(10.0)}
    assert worth[1] == {0: Score(10.0), 1: Score(4.0)}
    assert following.best.pair == (2, 0)


def test_one_that_fails_with_all_is_failed_and_brings_down_nobody_else():
    search = numbers(CoevolutionConfig(first=4, second=4, collaborators=4, elites=3), 4, 4)
    state, following = told(search, lambda pair: FAILED if pair[1] == 2 else Score(float(pair[0])))
    assert all(score.status is Status.OK for score in following.scored[0])
    ranked = sorted(
        zip(following.scored[0], state.populations[0], strict=True), key=lambda it: it[0].fitness
    )
    assert [each for _, each in ranked] == [0, 1, 2, 3]
    for score, each in zip(following.scored[1], state.populations[1], strict=True):
        assert score.status is (Status.DIVERGED if each == 2 else Status.OK)
    assert 2 not in following.populations[1][:3]


@pytest.mark.parametrize("status", [status for status in Status if status.failed])
def test_a_search_in_which_everything_fails_goes_on(status):
    states, asked = play(search_of(), lambda pair: Score(-1.0, status))
    assert len(asked) == SMALL.generations
    assert states[-1].best.score == Score(-1.0, status)
    assert all(score.status is status for side in states[-1].scored for score in side)


def test_a_stopped_pair_counts_as_measured():
    search = numbers(CoevolutionConfig(first=2, second=2, collaborators=2, tournament=2, elites=1))
    _, following = told(search, lambda pair: Score(0.25, Status.STOPPED))
    assert following.scored == ((Score(0.25),) * 2,) * 2


# Small populations


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 6)])
@pytest.mark.parametrize("collaborators", [1, 2])
def test_populations_of_one_or_two(sizes, collaborators):
    config = CoevolutionConfig(
        *sizes, 12, collaborators, elites=max(sizes) - 1, tournament=max(sizes)
    )
    states, asked = play(numbers(config), noise)
    assert len(asked) == 12
    for side in (0, 1):
        assert len({each for state in states for each in state.populations[side]}) > 2
    assert states[-1].best.score == max(
        (noise(pair) for pairs in asked for pair in pairs), key=lambda it: it.rank
    )


def test_one_recipe_and_one_architecture_are_one_pair():
    search = numbers(CoevolutionConfig(first=5, second=4), 1, 1)
    states, asked = play(search, noise)
    assert asked == [((0, 0),)] * 8
    assert states[3].populations == ((0,) * 5, (0,) * 4)


def test_one_fixed_side_leaves_an_ordinary_search():
    config = CoevolutionConfig(first=1, second=10, generations=12, collaborators=1, elites=2)
    states, asked = play(numbers(config, 1, 200), lambda pair: Score(-abs(pair[1] - 77.0)))
    assert all(len(pairs) == 10 for pairs in asked)
    assert states[-1].best.score.fitness > states[1].best.score.fitness


# Where it leads

SIDE = 40
PEAK = (31, 9)


def ridge(pair):
    """Two sides that must suit each other, so that neither has a best individual of its own.

    On the ridge both add up to 40. Along it the worth rises slowly to the peak, across it falls
    steeply, and most partners lie far from the ridge.
    """
    first, second = pair
    return Score(1.0 - 0.02 * abs(first + second - sum(PEAK)) - 0.004 * abs(first - PEAK[0]))


def test_it_finds_the_best_pair_of_a_landscape_with_interaction():
    table = {pair: ridge(pair).fitness for pair in itertools.product(range(SIDE), range(SIDE))}
    assert max(table, key=table.get) == PEAK
    # what suits everybody on average is not what suits each other
    alone = tuple(
        max(range(SIDE), key=lambda each: sum(v for p, v in table.items() if p[side] == each))
        for side in (0, 1)
    )
    assert table[PEAK] - table[alone] > 0.03

    gaps, by_chance = [], []
    for seed in range(20):
        states, asked = play(numbers(CoevolutionConfig(generations=16, seed=seed)), ridge)
        evaluated = {pair for pairs in asked for pair in pairs}
        assert len(evaluated) <= 0.26 * len(table)
        gaps.append(table[PEAK] - states[-1].best.score.fitness)
        drawn = random.Random(seed).sample(sorted(table), len(evaluated))
        by_chance.append(table[PEAK] - max(map(table.get, drawn)))
    assert statistics.median(gaps) == 0.0
    assert statistics.fmean(gaps) < 0.5 * statistics.fmean(by_chance)


# Settings


def test_defaults():
    assert CoevolutionConfig() == CoevolutionConfig(12, 8, 8, 2, 2, 3, 42)
    assert CoevolutionConfig().evaluations_per_generation == 40


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("first", 0, "at least 1"),
        ("second", 0, "at least 1"),
        ("generations", 0, "at least 1"),
        ("collaborators", 0, "at least 1"),
        ("elites", -1, "from 0 to 11"),
        ("elites", 12, "from 0 to 11"),
        ("tournament", 0, "from 1 to 12"),
        ("tournament", 13, "from 1 to 12"),
    ],
)
def test_settings_out_of_range_are_named(setting, value, allowed):
    with pytest.raises(SettingsError, match=f"{setting} must be {allowed}, got {value}"):
        CoevolutionConfig(**{setting: value})


def test_scores_and_pairs_must_be_as_many():
    search = numbers()
    state = search.start()
    pairs = len(search.ask(state))
    with pytest.raises(ValueError, match=f"{pairs - 1} scores for {pairs} pairs"):
        search.tell(state, [Score(0.0)] * (pairs - 1))
    with pytest.raises(ValueError, match="0 scores for 0 pairs"):
        search.tell(play(search, noise)[0][-1], [])
