"""Spaces: what each search may count on, and what each kind of individual does."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evokernels import zoo
from evokernels.architecture import Architecture
from evokernels.errors import ArchitectureError, SettingsError
from evokernels.genome import Genome
from evokernels.search import (
    ArchitectureSpace,
    FixedSpace,
    GeneticConfig,
    GeneticSearch,
    OptimizerSpace,
    PairSpace,
    Score,
    operators,
)

SEEDS = st.integers(0, 2**32)
RECIPES = ("a", "b", "c", "d", "e")


def is_genome(individual):
    return isinstance(individual, Genome) and len(individual.term_types) <= 3


def is_architecture(individual):
    return (
        isinstance(individual, Architecture)
        and len(individual.components) <= 7
        and individual.max_parameters == 5000
    )


# name → space, and whether something is one of its individuals
SPACES = {
    "optimizers": (OptimizerSpace(3), is_genome),
    "architectures": (ArchitectureSpace(7, 5000), is_architecture),
    "fixed": (FixedSpace(RECIPES), RECIPES.__contains__),
    "one": (FixedSpace(RECIPES[:1]), RECIPES[:1].__contains__),
    "pairs": (
        PairSpace(ArchitectureSpace(7, 5000), FixedSpace(RECIPES)),
        lambda pair: is_architecture(pair[0]) and pair[1] in RECIPES,
    ),
}


@pytest.mark.parametrize(("space", "holds"), SPACES.values(), ids=SPACES)
@given(size=st.integers(0, 12), seed=SEEDS, progress=st.floats(0, 1))
def test_nothing_leaves_its_space_and_the_generator_decides_all(space, holds, size, seed, progress):
    def family(rng):
        members = [*space.start(size, rng)]
        assert len(members) == size
        for _ in range(10 if members else 0):
            child = space.crossover(rng.choice(members), rng.choice(members), rng)
            members += child, space.mutate(child, rng, progress)
        return members

    members = family(random.Random(seed))
    assert all(map(holds, set(members)))
    assert members == family(random.Random(seed))


@pytest.mark.parametrize(("space", "holds"), SPACES.values(), ids=SPACES)
def test_a_genetic_search_runs_in_every_space(space, holds):
    config = GeneticConfig(population=6, generations=4, elites=2, tournament=2)
    search = GeneticSearch(config, space)
    state, generations = search.start(), 0
    while genomes := search.ask(state):
        assert len(genomes) == 6
        assert all(map(holds, genomes))
        state = search.tell(state, [Score(float(place)) for place in range(6)])
        assert state.best.score == Score(5.0)
        generations += 1
    assert generations == 4


def test_the_optimizer_space_draws_as_its_operators_do():
    space, rng, again = OptimizerSpace(3), random.Random(1), random.Random(1)
    genomes = space.start(8, rng)
    assert genomes == operators.start_population(8, 3, again)
    child = space.crossover(genomes[6], genomes[7], rng)
    assert child == operators.crossover(genomes[6], genomes[7], again, 3)
    rates = operators.RATES.annealed(0.5)
    assert space.mutate(child, rng, 0.5) == operators.mutate(child, again, rates, 3)


def test_architectures_begin_with_the_known_ones_that_are_short_enough():
    assert ArchitectureSpace(9).start(3, random.Random(0))[0] == zoo.small_cnn
    shorter = ArchitectureSpace(8).start(3, random.Random(0))
    assert zoo.small_cnn not in shorter


# Fixed individuals


@given(st.integers(1, 8), st.integers(0, 20), SEEDS)
def test_fixed_individuals_come_again_only_when_all_are_there(count, size, seed):
    individuals = range(count)
    started = FixedSpace(individuals).start(size, random.Random(seed))
    times = Counter(started)
    assert set(times) <= set(individuals)
    assert max(times.values(), default=0) <= -(-size // count)
    assert len(times) == min(size, count)


def test_a_fixed_child_is_either_of_its_parents():
    space, rng = FixedSpace(RECIPES), random.Random(0)
    children = Counter(space.crossover("a", "d", rng) for _ in range(2000))
    assert set(children) == {"a", "d"}
    assert children["a"] == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(("progress", "elsewhere"), [(0.0, 0.5), (1.0, 0.25)])
def test_a_fixed_mutant_is_a_neighbour_or_later_more_rarely_any_other(progress, elsewhere):
    space, rng = FixedSpace(range(11)), random.Random(0)
    mutants = Counter(space.mutate(5, rng, progress) for _ in range(8000))
    assert set(mutants) == set(range(11)) - {5}
    # any of ten, or else one of the two beside it
    for individual, count in mutants.items():
        beside = (1 - elsewhere) / 2 if individual in (4, 6) else 0.0
        assert count / 8000 == pytest.approx(elsewhere / 10 + beside, abs=0.02), individual


def test_the_ends_of_the_list_have_one_neighbour():
    space, rng = FixedSpace(range(50)), random.Random(0)
    for end, neighbour in ((0, 1), (49, 48)):
        mutants = Counter(space.mutate(end, rng, 1.0) for _ in range(1000))
        assert mutants[neighbour] / 1000 == pytest.approx(0.75, abs=0.05)
        assert end not in mutants


def test_the_only_individual_stays():
    space, rng = FixedSpace(["only"]), random.Random(0)
    assert {space.mutate("only", rng, 0.5) for _ in range(50)} == {"only"}


# Pairs


def test_a_pair_mutates_on_one_side_or_the_other_or_both():
    space, rng = PairSpace(FixedSpace(range(5)), FixedSpace(range(5))), random.Random(0)
    mutants = [space.mutate((2, 2), rng, 0.0) for _ in range(6000)]
    changed = Counter((first != 2, second != 2) for first, second in mutants)
    assert set(changed) == {(True, False), (False, True), (True, True)}
    assert all(count == pytest.approx(2000, abs=150) for count in changed.values())


def test_a_pair_inherits_each_side_from_either_parent():
    space, rng = PairSpace(FixedSpace(range(5)), FixedSpace(range(5))), random.Random(0)
    children = Counter(space.crossover((0, 1), (2, 3), rng) for _ in range(4000))
    assert set(children) == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert all(count == pytest.approx(1000, abs=120) for count in children.values())


# Settings


@pytest.mark.parametrize(
    ("making", "error", "message"),
    [
        (lambda: OptimizerSpace(0), SettingsError, "max_terms must be at least 1, got 0"),
        (lambda: ArchitectureSpace(0), SettingsError, "max_length must be from 1 to 24, got 0"),
        (lambda: ArchitectureSpace(25), SettingsError, "max_length must be from 1 to 24, got 25"),
        (lambda: ArchitectureSpace(5, 10), ArchitectureError, "max_parameters .* got 10"),
        (lambda: FixedSpace([]), SettingsError, "at least one"),
        (lambda: FixedSpace("aba"), SettingsError, "'a' more than once"),
    ],
)
def test_settings_out_of_range_are_named(making, error, message):
    with pytest.raises(error, match=message):
        making()
