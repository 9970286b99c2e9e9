"""The genetic search: operators, ask and tell, scores."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evokernels import zoo
from evokernels.errors import SettingsError
from evokernels.genome import Genome
from evokernels.search import operators
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.operators import ALPHA, CLASSIC, FLAGS, NUMERIC, RATES
from evokernels.search.racing import SeedModel, next_bar
from evokernels.search.score import Score, Status

SEEDS = st.integers(0, 2**32)
MAX_TERMS = 4


def stranger(seed, max_terms=MAX_TERMS):
    return operators.random_genome(random.Random(seed), max_terms)


def assert_explored(genome, max_terms=MAX_TERMS):
    assert 1 <= len(genome.term_types) <= max_terms
    assert all(ALPHA.limits[0] <= alpha <= ALPHA.limits[1] for alpha in genome.alphas)
    for name, gene in NUMERIC.items():
        assert gene.limits[0] <= getattr(genome, name) <= gene.limits[1], name
    low, high = operators.WARMUP_STEPS
    assert low <= genome.warmup_steps <= high


# Operators


@given(SEEDS, st.integers(1, 6))
def test_random_genomes_lie_in_the_start_ranges(seed, max_terms):
    genome = stranger(seed, max_terms)
    assert len(genome.term_types) <= min(3, max_terms)
    assert all(-1 <= alpha <= 1 for alpha in genome.alphas)
    for name, gene in NUMERIC.items():
        assert gene.start[0] <= getattr(genome, name) <= gene.start[1], name
    assert_explored(genome, max_terms)


@given(SEEDS, SEEDS, SEEDS)
def test_a_child_has_a_head_of_one_parent_and_a_tail_of_the_other(one, two, seed):
    first, second = stranger(one), stranger(two)
    child = operators.crossover(first, second, random.Random(seed), MAX_TERMS)
    assert_explored(child)
    pairs = list(zip(child.term_types, child.alphas, strict=True))
    ours = list(zip(first.term_types, first.alphas, strict=True))
    theirs = list(zip(second.term_types, second.alphas, strict=True))
    assert any(
        pairs == (ours[:head] + theirs[tail:])[:MAX_TERMS]
        for head in range(1, len(ours) + 1)
        for tail in range(len(theirs))
    )
    for name in (*NUMERIC, *FLAGS, "warmup_steps"):
        assert getattr(child, name) in (getattr(first, name), getattr(second, name))


def test_a_child_takes_each_field_from_either_parent_with_equal_chance():
    first, second = stranger(1), dataclasses.replace(stranger(2), use_m=not stranger(1).use_m)
    rng = random.Random(0)
    children = [operators.crossover(first, second, rng, MAX_TERMS) for _ in range(1000)]
    for name in ("lr_log10", "beta2", "clip_value", "use_m"):
        share = sum(getattr(child, name) == getattr(first, name) for child in children) / 1000
        assert 0.45 < share < 0.55, name


@given(SEEDS, SEEDS, st.floats(0, 1))
def test_a_mutant_is_valid_and_explored(one, seed, progress):
    rng = random.Random(seed)
    genome = stranger(one)
    for _ in range(20):
        genome = operators.mutate(genome, rng, RATES.annealed(progress), MAX_TERMS)
        assert_explored(genome)


@given(SEEDS)
def test_one_term_is_never_lost_and_no_fifth_is_gained(seed):
    rng = random.Random(seed)
    always = dataclasses.replace(RATES, structure=1.0)
    short, long = Genome(), Genome(term_types=[0] * 4, alphas=[1.0] * 4)
    assert 1 <= len(operators.mutate(short, rng, always, MAX_TERMS).term_types) <= 2
    assert 3 <= len(operators.mutate(long, rng, always, MAX_TERMS).term_types) <= 4


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_mutation_rates_are_those_of_the_protocol(progress, factor):
    parent = dataclasses.replace(stranger(7), lr_log10=-3.0, beta1=0.7, beta2=0.5)
    rng, rates = random.Random(1), RATES.annealed(progress)
    mutants = [operators.mutate(parent, rng, rates, MAX_TERMS) for _ in range(4000)]

    def changed(name):
        return [m for m in mutants if getattr(m, name) != getattr(parent, name)]

    def spread(name):
        steps = [getattr(m, name) - getattr(parent, name) for m in changed(name)]
        return math.sqrt(sum(step**2 for step in steps) / len(steps))

    for name in ("lr_log10", "beta1", "beta2", "eps_log10", "wd_log10"):
        assert len(changed(name)) / 4000 == pytest.approx(0.35 * factor, abs=0.03), name
    for name in FLAGS:
        assert len(changed(name)) / 4000 == pytest.approx(0.1 * factor, abs=0.02), name
    assert not changed("clip_value")  # only inherited, as in the source system
    assert not changed("warmup_steps")
    assert spread("lr_log10") == pytest.approx(0.3 * factor, rel=0.08)
    assert spread("beta1") == pytest.approx(0.06 * factor, rel=0.08)
    assert spread("beta2") == pytest.approx(0.03 * factor, rel=0.08)


def test_structure_mutates_with_its_rate():
    parent = Genome(term_types=[1, 1], alphas=[1.0, 1.0])
    rng = random.Random(3)
    mutants = [operators.mutate(parent, rng, RATES, MAX_TERMS) for _ in range(4000)]
    lengths = [len(mutant.term_types) for mutant in mutants]
    assert lengths.count(1) / 4000 == pytest.approx(0.05, abs=0.012)
    assert lengths.count(3) / 4000 == pytest.approx(0.05, abs=0.012)
    assert all(mutant.alphas[0] > 0 for mutant in mutants if len(mutant.term_types) == 2)


def test_flags_of_random_genomes_have_the_probabilities_of_the_protocol():
    rng = random.Random(5)
    genomes = [operators.random_genome(rng, MAX_TERMS) for _ in range(3000)]
    for name, probability in (
        ("use_m", 0.7),
        ("use_v", 0.7),
        ("use_bias_correction", 0.6),
        ("use_gradient_clipping", 0.2),
        ("use_warmup", 0.3),
        ("use_cosine_decay", 0.3),
    ):
        share = sum(getattr(genome, name) for genome in genomes) / len(genomes)
        assert share == pytest.approx(probability, abs=0.03), name
    terms = [term for genome in genomes for term in genome.term_types]
    assert all(terms.count(term) / len(terms) == pytest.approx(1 / 7, abs=0.02) for term in CLASSIC)


def test_no_decay_becomes_the_least_decay_when_it_mutates():
    rng = random.Random(0)
    mutants = [operators.mutate(zoo.adam, rng, RATES, MAX_TERMS) for _ in range(100)]
    assert {mutant.wd_log10 for mutant in mutants} == {-math.inf, NUMERIC["wd_log10"].limits[0]}


@pytest.mark.parametrize("size", [2, 4, 10])
def test_the_start_population_begins_with_the_known_optimizers(size):
    genomes = operators.start_population(size, MAX_TERMS, random.Random(0))
    known = (zoo.sgd_momentum, zoo.adam, zoo.adamw, zoo.rmsprop)
    assert len(genomes) == size
    assert genomes[:4] == known[:size]


# Ask and tell


def score(genome):
    """Some smooth function of a genome, with failures."""
    fitness = -abs(genome.lr_log10 + 2.5) - abs(genome.beta1 - 0.8) + 0.1 * len(genome.alphas)
    return Score(fitness, Status.DIVERGED if genome.alphas[0] < -0.5 else Status.OK)


def play(config, scoring=score):
    """All states of a search."""
    search = GeneticSearch(config)
    states = [search.start()]
    while genomes := search.ask(states[-1]):
        states.append(search.tell(states[-1], [scoring(genome) for genome in genomes]))
    return states


SMALL = GeneticConfig(population=12, generations=8, elites=3, seed=11)


def test_defaults_are_those_of_the_source_system():
    assert GeneticConfig() == GeneticConfig(50, 50, 3, 4, 4, 42)


def test_the_same_seed_and_scores_give_the_same_search():
    assert play(SMALL) == play(SMALL)
    other = play(dataclasses.replace(SMALL, seed=12))
    assert other[0].population[4:] != play(SMALL)[0].population[4:]
    assert other[-1] != play(SMALL)[-1]


def test_every_generation_has_its_own_random_numbers():
    search = GeneticSearch(SMALL)
    start = search.start()
    scores = [score(genome) for genome in start.population]

    def offspring(generation):
        state = dataclasses.replace(start, generation=generation)
        return [genome.term_types for genome in search.tell(state, scores).population[3:]]

    assert offspring(0) != offspring(1)


def test_the_global_generator_is_neither_read_nor_touched():
    random.seed(1)
    before = random.getstate()
    first = play(SMALL)
    assert random.getstate() == before
    random.seed(2)
    assert play(SMALL) == first


def test_a_state_can_be_told_twice():
    search = GeneticSearch(SMALL)
    state = search.start()
    scores = [score(genome) for genome in search.ask(state)]
    assert search.tell(state, scores) == search.tell(state, scores)


def test_elites_pass_on_unchanged_and_the_best_never_falls():
    states = play(SMALL)
    best = -math.inf
    for state, following in itertools.pairwise(states[:-1]):
        ranked = sorted(state.population, key=lambda genome: score(genome).rank, reverse=True)
        assert following.population[:3] == tuple(ranked[:3])
        reached = max(score(genome).rank for genome in state.population)[1]
        assert reached >= best
        best = reached
        assert following.best.score.fitness == best
    assert [state.generation for state in states] == list(range(9))
    assert all(len(state.population) == 12 for state in states[:-1])
    assert states[-1].population == ()


def test_the_search_improves_on_its_start():
    states = play(SMALL)
    assert states[-1].best.score.fitness > states[1].best.score.fitness


def test_the_best_ever_survives_without_elites():
    states = play(dataclasses.replace(SMALL, elites=0))
    told = [score(genome) for state in states[:-1] for genome in state.population]
    assert states[-1].best.score.rank == max(entry.rank for entry in told)


def test_what_a_genome_is_told_again_replaces_what_it_was_told_before():
    search = GeneticSearch(SMALL)
    state = search.tell(search.start(), [score(genome) for genome in search.start().population])
    champion = state.best.genome
    assert champion in state.population

    def fallen(genome):
        return Score(-9.0) if genome == champion else score(genome)

    following = search.tell(state, [fallen(genome) for genome in state.population])
    assert following.best.genome != champion
    assert following.best.score.rank == max(fallen(genome).rank for genome in state.population)
    # one that is not told again keeps what it was told
    others = dataclasses.replace(state, population=(zoo.rmsprop,) * 12)
    assert search.tell(others, [Score(-9.0)] * 12).best == state.best


def test_a_stopped_genome_ranks_by_its_number_and_a_failed_one_below_all():
    stopped = Score(0.1, Status.STOPPED)
    assert Score(0.0).rank < stopped.rank < Score(0.2).rank
    failed = [status for status in Status if status.failed]
    assert set(Status) - set(failed) == {Status.OK, Status.STOPPED}
    assert all(Score(9.0, status).rank < Score(-9.0).rank for status in failed)


def test_a_diverged_genome_ranks_last_whatever_its_number():
    def failing(genome):
        return Score(100.0, Status.DIVERGED) if genome == zoo.adam else score(genome)

    state = play(SMALL, failing)[1]
    assert state.best.genome != zoo.adam
    assert zoo.adam not in state.population[:3]


@pytest.mark.parametrize("fitness", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("status", Status)
def test_no_fitness_is_nan_or_infinite(fitness, status):
    with pytest.raises(ValueError, match="finite"):
        Score(fitness, status)


def test_scores_and_genomes_must_be_as_many():
    search = GeneticSearch(SMALL)
    with pytest.raises(ValueError, match="11 scores for 12 genomes"):
        search.tell(search.start(), [Score(0.0)] * 11)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("population", 1), ("generations", 0), ("elites", 50), ("tournament", 51), ("max_terms", 0)],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(SettingsError, match=f"{setting} must be .*got {value}"):
        GeneticConfig(**{setting: value})


# The seed race


def table_of(rng, genomes, seeds, noise):
    """Scores of genomes on two levels, the better ones first, with effects of seeds and noise."""
    effects = rng.normal(0, 0.1, seeds)
    levels = np.where(np.arange(2 * genomes) < genomes, 5.0, 0.0)
    scores = levels[:, None] + effects + rng.normal(0, noise, (2 * genomes, seeds))
    return scores - 0.001 * np.arange(2 * genomes)[:, None]  # no two genomes are equally good


@pytest.mark.parametrize(("genomes", "seeds"), [(3, 2), (5, 2), (4, 3), (20, 5)])
def test_effects_and_noise_are_those_of_least_squares(genomes, seeds):
    scores = table_of(np.random.default_rng(genomes), genomes, seeds, noise=0.05)
    model = SeedModel.of([dict(enumerate(row)) for row in scores])
    # the better half, as a linear model: one unknown a genome, one a seed but the last
    better = scores[:genomes]
    design = np.zeros((genomes, seeds, genomes + seeds - 1))
    for genome, seed in itertools.product(range(genomes), range(seeds)):
        design[genome, seed, genome] = 1
        if seed < seeds - 1:
            design[genome, seed, genomes + seed] = 1
        else:
            design[genome, seed, genomes:] = -1
    design = design.reshape(genomes * seeds, -1)
    solution, squares, rank, _ = np.linalg.lstsq(design, better.ravel())
    freedom = genomes * seeds - rank
    assert model.noise == pytest.approx(math.sqrt(squares[0] / freedom))
    assert list(model.effects.values())[:-1] == pytest.approx(solution[genomes:])
    assert sum(model.effects.values()) == pytest.approx(0, abs=1e-12)


def test_the_noise_is_that_of_good_genomes():
    scores = table_of(np.random.default_rng(0), 40, 2, noise=0.05)
    scores[40:] += np.random.default_rng(1).normal(0, 2, (40, 2))
    model = SeedModel.of([dict(enumerate(row)) for row in scores])
    assert model.noise == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize(
    "complete",
    [[], [{0: 0.5, 1: 0.6}] * 4, [{0: 0.5}] * 50],
    ids=["none", "too few genomes", "one seed"],
)
def test_too_little_for_a_race(complete):
    assert SeedModel.of(complete) is None
    assert next_bar([Score(0.5)] * 10, None) is None


@pytest.mark.parametrize(("population", "place"), [(50, 15), (10, 3), (11, 4), (3, 1)])
def test_the_bar_is_two_deviations_below_the_genome_at_three_tenths(population, place):
    model = SeedModel({0: 0.1, 1: -0.1}, noise=0.01)
    scores = [Score(float(number)) for number in range(population)]
    bar = next_bar(scores, model)
    assert bar.fitness == pytest.approx(population - place - 0.02)
    # without its effect, the easier seed must bring 0.1 more
    assert bar.admits({0: bar.fitness + 0.1001})
    assert not bar.admits({0: bar.fitness + 0.0999})
    assert bar.admits({1: bar.fitness - 0.0999})
    assert bar.admits({0: bar.fitness + 0.3, 1: bar.fitness - 0.2999})
    assert not bar.admits({0: bar.fitness + 0.3, 1: bar.fitness - 0.3001})
    assert not bar.admits({7: bar.fitness - 0.0001})  # nothing is known of this seed


def test_failures_at_the_bar_mean_no_race():
    model = SeedModel({0: 0.0, 1: 0.0}, noise=0.01)
    scores = [Score(0.9)] * 2 + [Score(-1.0, Status.DIVERGED)] * 8
    assert next_bar(scores, model) is None
    assert next_bar([Score(0.8), *scores[:-1]], model).fitness == pytest.approx(0.78)


def test_one_genome_in_fifty_at_the_bar_is_stopped_by_bad_luck():
    rng = np.random.default_rng(5)
    bar = next_bar([Score(0.8)] * 50, SeedModel({0: 0.0}, noise=0.01))
    stopped = sum(not bar.admits({0: score}) for score in rng.normal(0.8, 0.01, 20_000)) / 20_000
    assert stopped == pytest.approx(0.0228, abs=0.004)
