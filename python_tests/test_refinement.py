"""Numbers of a genome as a vector, ENES on them, and both inside an evolution."""

import collections
import concurrent.futures
import dataclasses
import json
import math
import pathlib
import random
import sqlite3

import numpy as np
import pytest
import refine
from synthetic import SyntheticTraining, killed_after

from evokernels import zoo
from evokernels.compiler import terms
from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.genes import independent_terms, numbers_read
from evokernels.compiler.lower import RATE, lower
from evokernels.errors import JournalError, SettingsError
from evokernels.evolution import journal, pool, report, run
from evokernels.evolution.history import Result
from evokernels.evolution.journal import JOURNAL
from evokernels.evolution.ledger import ledger_line
from evokernels.evolution.refining import Refiner, best_of_structures, coordinates_of
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome, Purpose
from evokernels.genome import Genome
from evokernels.search.coordinates import Coordinates
from evokernels.search.genetic import GeneticConfig, GeneticSearch, Scored
from evokernels.search.natural import utilities
from evokernels.search.operators import NUMERIC, RATES, crossover, random_genome
from evokernels.search.refinement import Refinement, generation_size
from evokernels.search.score import Score, Status

GOLDEN = pathlib.Path(__file__).with_name("golden_history.csv")


# What can be refined


@pytest.mark.parametrize(
    ("change", "numbers", "weights"),
    [
        ({}, "lr wd beta1 beta2 eps", (0,)),
        ({"use_v": False}, "lr wd beta1 eps", (0,)),
        ({"use_m": False}, "lr wd beta2 eps", (0,)),
        ({"term_types": ["GRAD"], "alphas": [2]}, "lr wd", (0,)),
        ({"term_types": ["GRAD"], "alphas": [0]}, "lr wd", ()),
        ({"term_types": ["SQRT_GRAD"], "alphas": [1]}, "lr wd eps", (0,)),
        (
            {"term_types": ["GRAD"], "alphas": [1], "use_gradient_clipping": True},
            "lr wd clip",
            (0,),
        ),
        ({"term_types": ["MOMENTUM", "GRAD"], "alphas": [1, -3]}, "lr wd beta1", (1, 0)),
        # the same thing said twice, or three times
        ({"term_types": ["GRAD", "GRAD"], "alphas": [1, 2]}, "lr wd", (1,)),
        ({"term_types": ["MOMENTUM", "GRAD"], "alphas": [1, 2], "use_m": False}, "lr wd", (1,)),
        (
            {"term_types": ["GRAD", "NESTEROV", "MOMENTUM"], "alphas": [1, 3, 2]},
            *("lr wd beta1", (1, 2)),
        ),
        # what cancels is no part of the structure, and must not come back
        ({"term_types": ["GRAD", "GRAD"], "alphas": [1, -1]}, "lr wd", ()),
        ({"term_types": ["SIGN_GRAD", "GRAD", "GRAD"], "alphas": [1, 2, -2]}, "lr wd", (0,)),
    ],
)
def test_what_a_rule_reads_and_which_weights_are_independent(change, numbers, weights):
    genome = dataclasses.replace(Genome(term_types=["ADAM_TERM"]), **change)
    assert independent_terms(genome) == weights
    assert {name.split("_")[0] for name in numbers_read(genome)} == set(numbers.split())


def random_genomes(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield crossover(random_genome(rng, 4), random_genome(rng, 4), rng, 4)


def around(coordinates, sigma, rng):
    return coordinates.genome(rng.normal(0.0, sigma, len(coordinates)))


@pytest.mark.parametrize("genome", [*zoo.GENOMES.values(), *random_genomes(60)])
def test_every_coordinate_moves_the_optimizer_and_its_structure_stays(genome):
    coordinates = coordinates_of(genome)
    for step in (0.5, -0.5, 1e6, -1e6):
        for place in range(len(coordinates)):
            moved = coordinates.genome(step * np.eye(len(coordinates))[place])
            if abs(coordinates.bounds[int(step > 0)][place]) > 0.01:
                assert canonical_key(moved) != canonical_key(genome)
            assert lower(moved).program == lower(genome).program


def effect(genome):
    """The numbers that decide what the rule does in its third step, the rate multiplied in."""
    rule = lower(genome)
    values = rule.numbers(**terms.genome_scalars(genome, 3))
    numbers = dict(zip(rule.program.scalars, values, strict=True))
    rate = numbers.pop(str(RATE))
    numerators = {role for role in numbers if role.startswith("weight of") and " in " not in role}
    return np.array(
        [value * (rate if role in numerators else 1) for role, value in numbers.items()]
    )


@pytest.mark.parametrize("genome", [*zoo.GENOMES.values(), *random_genomes(30)])
def test_no_direction_leaves_the_optimizer_as_it_is(genome):
    """As one would in which lr falls by what all weights rise by."""
    coordinates = coordinates_of(genome)
    low, high = coordinates.bounds
    steps = np.diag(np.where(high > -low, 1e-3, -1e-3))
    here = effect(genome)
    changes = np.array([effect(coordinates.genome(step)) - here for step in steps])
    changes /= np.where(here == 0.0, 1.0, np.abs(here))
    changes /= np.linalg.norm(changes, axis=1)[:, None]
    assert np.linalg.matrix_rank(changes, 1e-6) == len(coordinates)


# Coordinates

SPACE = Coordinates(
    Genome(term_types=["GRAD", "ADAM_TERM", "SIGN_GRAD"], alphas=[2.0, -0.5, 0.25], beta1=0.3),
    ("lr_log10", "eps_log10", "wd_log10", "beta1", "beta2"),
    (1, 2),
)
UNIT = RATES.sigma


@pytest.mark.parametrize(
    ("place", "offset", "change"),
    [
        (0, 1.0, {"lr_log10": -3.0 + UNIT}),
        (1, -1.0, {"eps_log10": -8.0 - UNIT}),
        (2, 2.0, {"wd_log10": -4.0 + 2 * UNIT}),
        (3, math.log(7) / UNIT, {"beta1": 0.9}),
        (3, math.log(0.7) / UNIT, {"beta1": 0.0}),
        (4, -math.log(10) / UNIT, {"beta2": 0.99}),
        (5, math.log(3) / UNIT, {"alphas": (2.0, -1.5, 0.25)}),
        (6, -math.log(5) / UNIT, {"alphas": (2.0, -0.5, 0.05)}),
        # the ends of what the search explores
        (0, 99.0, {"lr_log10": -1.0}),
        (2, -1e9, {"wd_log10": -6.0}),
        (3, 1e9, {"beta1": 0.999}),
        (3, -1e9, {"beta1": 0.0}),
        (4, 1e9, {"beta2": 0.9999}),
        (5, 1e9, {"alphas": (2.0, -5.0, 0.25)}),
        (6, -1e9, {"alphas": (2.0, -0.5, 1e-4)}),
    ],
)
def test_a_coordinate_by_hand(place, offset, change):
    vector = offset * np.eye(7)[place]
    expected = dataclasses.replace(SPACE.origin, **change)
    (name,) = change
    made = SPACE.genome(vector)
    assert getattr(made, name) == pytest.approx(getattr(expected, name), rel=1e-12, abs=1e-15)
    assert dataclasses.replace(made, **change) == expected


@pytest.mark.parametrize("genome", [*zoo.GENOMES.values(), *random_genomes(60, seed=2)])
def test_genomes_and_vectors_round_trip(genome):
    coordinates = coordinates_of(genome)
    zero = np.zeros(len(coordinates))
    assert coordinates.genome(zero) == genome  # to the last bit
    assert np.array_equal(coordinates.vector(genome), zero)
    low, high = coordinates.bounds
    assert (np.minimum(high, -low) >= 0).all()
    assert (low < high).all()
    rng = np.random.default_rng(0)
    for vector in (*rng.normal(0, 2, (5, len(zero))), *rng.normal(0, 99, (5, len(zero)))):
        made = coordinates.genome(vector)
        assert coordinates.vector(made) == pytest.approx(np.clip(vector, low, high), abs=1e-9)
        for name in coordinates.numbers:
            least, greatest = NUMERIC[name].limits
            own = getattr(genome, name)
            inside = min(least, own), max(greatest, own)
            assert inside[0] - 1e-12 <= getattr(made, name) <= inside[1] + 1e-12


def test_an_origin_beyond_what_the_search_explores_stays_within_the_bounds():
    origin = dataclasses.replace(zoo.adam, lr_log10=-6.5, beta2=0.99999)
    coordinates = Coordinates(origin, ("lr_log10", "beta2"), ())
    assert coordinates.genome(np.zeros(2)) == origin
    assert coordinates.genome(np.array([-9.0, 9.0])) == origin
    assert coordinates.genome(np.array([99.0, -1.0])).lr_log10 == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"use_m": False},
        {"clip_value": 2.0},
        {"alphas": [1, -0.5, 0.25]},
        {"alphas": [2, 0.5, 0.25]},
    ],
)
def test_a_genome_outside_of_the_space_has_no_vector(change):
    with pytest.raises(ValueError, match=r"differs from .* in more than"):
        SPACE.vector(dataclasses.replace(SPACE.origin, **change))


# ENES as ask and tell


def refined(worth, evaluations, seed=0, space=SPACE):
    """Every batch of genomes asked, with scores by ``worth``."""
    refinement = Refinement(space, evaluations, seed)
    state = refinement.start()
    batches = []
    while genomes := refinement.ask(state):
        scores = [worth(genome) for genome in genomes]
        batches.append(list(zip(genomes, scores, strict=True)))
        state = refinement.tell(state, scores)
    return batches


def bowl(genome):
    return Score(-float(np.sum((SPACE.vector(genome) - [2, 0, -1, 1, 0, -2, 0.5]) ** 2)))


def test_every_evaluation_is_asked_for_and_no_more():
    size = generation_size(len(SPACE))
    assert size == 9
    for evaluations in (1, 8, 9, 10, 18, 19, 26, 40):
        lengths = [len(batch) for batch in refined(bowl, evaluations)]
        assert sum(lengths) == evaluations
        assert all(length == size for length in lengths[:-1])
        assert lengths[-1] <= size


def test_the_refinement_finds_what_is_better():
    first, *_, last = refined(bowl, 400)
    start = bowl(SPACE.origin).fitness
    assert np.mean([score.fitness for _, score in last]) > 0.2 * start
    assert np.mean([score.fitness for _, score in first]) < start
    _, of_mean = last[0]
    assert of_mean.fitness > 0.05 * start


def test_the_last_candidates_begin_with_the_mean():
    refinement = Refinement(SPACE, 12, 0)
    state = refinement.start()
    assert state.search.mean.tolist() == [0.0] * 7
    state = refinement.tell(state, [bowl(genome) for genome in refinement.ask(state)])
    mean, *rest = refinement.ask(state)
    assert SPACE.vector(mean) == pytest.approx(state.search.mean, abs=1e-8)
    assert np.abs(state.search.mean).max() > 1e-3
    assert len(rest) == len({*rest} - {mean}) == 2


def test_a_generation_moves_the_mean_most_of_the_way_to_its_better_half():
    """Not a quarter of it; the baseline takes the mean of all candidates off."""
    size = generation_size(len(SPACE))
    shares = []
    for seed in range(20):
        refinement = Refinement(SPACE, 40, seed)
        state = refinement.start()
        told = refinement.tell(state, [Score(-float(place)) for place in range(size)])
        u = utilities(size, size / 2)
        aim = u @ state.search.candidates / u.sum()
        shares.append(told.search.mean @ aim / (aim @ aim))
    assert 0.5 < np.mean(shares) < 1.1


def test_equal_scores_make_equal_candidates_and_other_seeds_others():
    assert refined(bowl, 30) == refined(bowl, 30)
    assert refined(bowl, 30)[0] != refined(bowl, 30, seed=1)[0]


def test_a_failed_candidate_ranks_last_whatever_its_number():
    def failing(genome):
        score = bowl(genome)
        return score if genome.lr_log10 < -3.0 else Score(1e9, Status.DIVERGED)

    *_, last = refined(failing, 100)
    assert np.mean([genome.lr_log10 for genome, _ in last]) < -3.05


def test_candidates_do_not_depend_on_the_last_bits_of_a_matrix_product():
    refinement = Refinement(SPACE, 40, 0)
    state = refinement.start()
    shaken = dataclasses.replace(state.search, candidates=state.search.candidates * (1 + 4e-16))
    assert refinement.ask(dataclasses.replace(state, search=shaken)) == refinement.ask(state)
    assert not np.array_equal(shaken.candidates, state.search.candidates)


# Inside the evolution

# the quick preset as it was when `golden_history.csv` was recorded, before anything was refined
QUICK = RunSettings(
    search=GeneticConfig(population=12, generations=6, elites=2),
    tasks=("fashion_mnist_mini",),
    seeds=(0,),
    conditions=Conditions(100, 64, None, validation_samples=1000, hurdle=True),
    comparison_seeds=3,
    threads=1,
    race=True,
    finalists=3,
)
SETTINGS = dataclasses.replace(
    QUICK,
    search=GeneticConfig(population=8, generations=4, elites=2, seed=3),
    tasks=("fashion_mnist_mini", "mnist"),
    seeds=(0, 1),
    refine=15,
)
REFINED_GENERATIONS = (0, 3)
SEARCHED = "SELECT * FROM evaluation WHERE purpose = 'search'"


@pytest.fixture
def training(monkeypatch):
    synthetic = SyntheticTraining()
    monkeypatch.setattr(pool, "evaluate", synthetic)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(report, "plot_history", lambda *args: None)
    return synthetic


def query(folder, sql, *values):
    with sqlite3.connect(folder / JOURNAL) as connection:
        rows = connection.execute(sql, values).fetchall()
    connection.close()
    return rows


def files(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".csv", ".json")
    }


def test_without_refinement_a_run_is_what_it_was(training, tmp_path):
    evolve(QUICK, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == GOLDEN.read_bytes()
    assert len(training.trials) == 80
    assert "refinement" not in (tmp_path / "ledger.csv").read_text()


def test_a_run_begun_before_the_setting_existed_resumes(training, tmp_path):
    with killed_after(training, 20):
        evolve(QUICK, tmp_path)
    ((text,),) = query(tmp_path, "SELECT settings FROM run")
    before = json.loads(text)
    assert before.pop("refine") == 0
    query(tmp_path, "UPDATE run SET settings = ?", json.dumps(before))
    with pytest.raises(JournalError, match=r"other settings: refine 0 \(now 20\);"):
        evolve(dataclasses.replace(QUICK, refine=20), tmp_path)
    evolve(QUICK, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == GOLDEN.read_bytes()
    assert len(training.trials) == 80


def test_a_generation_is_refined_before_it_is_told(training, tmp_path):
    calls = []
    result = evolve(SETTINGS, tmp_path, on_progress=lambda *progress: calls.append(progress))
    population = SETTINGS.search.population
    counts = query(tmp_path, "SELECT generation, count(*) FROM candidate GROUP BY generation")
    for number, count in counts:  # one structure may be all that is left
        assert count - population in ((15, 30) if number in REFINED_GENERATIONS else (0,))
    assert [entry.refining > 0 for entry in result.history] == [True, False, False, True]
    for entry in result.history:
        ((runs,),) = query(
            tmp_path,
            "SELECT count(*) FROM evaluation WHERE generation = ? AND place >= ?",
            *(entry.number, population),
        )
        assert runs == entry.refining
    header, first, *_ = (tmp_path / "history.csv").read_text().splitlines()
    assert header.endswith(",failed,refining")
    assert first.endswith(f",{result.history[0].refining}")
    assert calls[-1][0] == calls[-1][1] == len(training.trials)
    assert "generation 1/4, refining" in {note for _, _, note in calls}
    planned = 4 * (8 + 3 * 6 + 2 * 30) + 3 * 3 * 2 + 3 * 3 * 2
    expected = [total for _, total, _ in calls]
    assert expected[0] == planned
    assert expected == sorted(expected, reverse=True)  # less where something need not be trained


@pytest.fixture
def joined(monkeypatch):
    """The keys of what joins each generation."""
    keys = {}
    join = GeneticSearch.join

    def noting(search, state, genomes):
        keys[state.generation] = [canonical_key(genome) for genome in genomes]
        return join(search, state, genomes)

    monkeypatch.setattr(GeneticSearch, "join", noting)
    return keys


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rotate", [False, True])
def test_the_best_candidate_joins_if_it_is_better_on_the_same_seeds(
    training, tmp_path, joined, rotate, seed
):
    """With rotation these are the seeds of the generation: an elite's score has others in it."""
    search = dataclasses.replace(SETTINGS.search, seed=seed)
    settings = dataclasses.replace(SETTINGS, search=search, rotate_seeds=rotate)
    evolve(settings, tmp_path)
    assert sorted(joined) == [0, 1, 2, 3]
    for number, keys in joined.items():
        first, second = settings.training_seeds(number)
        paired = dict(
            query(
                tmp_path,
                "SELECT key, avg(fitness) FROM evaluation "
                "WHERE purpose = 'search' AND seed IN (?, ?) "
                "GROUP BY key HAVING count(*) = 4 AND min(status IN ('ok', 'stopped'))",
                *(first, second),
            )
        )
        structures = collections.defaultdict(lambda: ([], []))
        for refined, key, genome in query(
            tmp_path,
            "SELECT place >= 8, key, genome FROM candidate "
            "WHERE generation = ? AND status IN ('ok', 'stopped') "
            "ORDER BY place >= 8, score DESC, place",
            number,
        ):
            if key in paired:
                structures[lower(Genome.from_json(genome)).program][refined].append(key)
        expected = []
        for own, candidates in list(structures.values())[:2] * (number in REFINED_GENERATIONS):
            best = max([own[0], *candidates], key=paired.get)
            expected += [best] * (best != own[0])
        assert keys == expected


@pytest.mark.parametrize(
    ("origin", "candidates", "joins"),
    [
        ((0.9, 0.5), [(0.6, 0.6), (0.7, 0.7)], 1),
        ((0.5, 0.9), [(0.6, 0.6), (0.7, 0.7)], None),
        ((0.5, 0.5), [(0.5, 0.5), (0.5, 0.5)], None),
        ((0.5, 0.5), [(0.6, 0.6), (0.99, None)], 0),
        ((0.5, 0.5), [(0.99, None), (0.98, None)], None),
    ],
)
def test_scores_on_the_same_seeds_decide_not_those_that_are_told(origin, candidates, joins):
    """Each pair is the score that is told and the one on the seeds of the generation, if any."""

    def result(told, paired):
        return Result({}, Score(told), None if paired is None else Score(paired), (), ())

    class FakeRounds:
        tried = ()

        def run_beside(self, number, first, genomes, still_to_come, note):
            self.tried += tuple(genomes)
            return [result(*candidates[place % 2]) for place in range(len(genomes))]

    rounds = FakeRounds()
    refined = Refiner(SETTINGS, rounds).run(3, [zoo.adam], [result(*origin)], 0, "")
    assert len(rounds.tried) == 15
    expected = [] if joins is None else [Scored(rounds.tried[joins], Score(candidates[joins][0]))]
    assert [improvement.scored for improvement in refined.better] == expected
    places = [] if joins is None else [(1 + joins, 0)]
    assert [(better.place, better.origin) for better in refined.better] == places


def test_a_genome_that_stayed_is_compared_by_its_new_seeds_alone(training, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, rotate_seeds=True)
    refiner_run, stayed = Refiner.run, 0

    def checked(refiner, number, genomes, results, *rest):
        nonlocal stayed
        for genome, result in zip(genomes, results, strict=True):
            rows = query(
                tmp_path,
                "SELECT avg(fitness) FROM evaluation WHERE key = ? AND seed IN (?, ?)",
                *(canonical_key(genome), *settings.training_seeds(number)),
            )
            if result.paired is not None:
                assert result.paired.fitness == pytest.approx(rows[0][0])
                stayed += result.paired != result.score
        return refiner_run(refiner, number, genomes, results, *rest)

    monkeypatch.setattr(Refiner, "run", checked)
    evolve(settings, tmp_path)
    assert stayed >= 3


@pytest.mark.parametrize("rotate", [False, True])
def test_candidates_are_raced_against_the_generation_that_they_are_refined_in(
    training, tmp_path, rotate
):
    settings = dataclasses.replace(SETTINGS, rotate_seeds=rotate)
    evolve(settings, tmp_path)
    for number in REFINED_GENERATIONS:
        rows = query(
            tmp_path,
            "SELECT avg(fitness) FILTER (WHERE seed = ?), max(seed = ?) FROM evaluation "
            "WHERE generation = ? AND place >= 8 GROUP BY key",
            *(*settings.training_seeds(number), number),
        )
        out, through = ([mean for mean, further in rows if further == kind] for kind in (0, 1))
        assert len(through) > 3
        assert out
        assert max(out) < min(through)


@pytest.mark.parametrize("rotate", [False, True])
def test_candidates_of_which_none_is_better_change_nothing(training, tmp_path, monkeypatch, rotate):
    """Above all not the bar of the next generation's race."""
    settings = dataclasses.replace(SETTINGS, rotate_seeds=rotate)
    evolve(dataclasses.replace(settings, refine=0), tmp_path / "plain")
    refiner_run = Refiner.run
    monkeypatch.setattr(
        Refiner, "run", lambda *args: dataclasses.replace(refiner_run(*args), better=())
    )
    evolve(settings, tmp_path / "in vain")
    for table in ("candidate", "saving", "evaluation"):
        columns = (
            "generation, place, key, "
            + {
                "candidate": "score",
                "saving": "task, seed, rule",
                "evaluation": "task, seed, fitness",
            }[table]
        )
        plain, in_vain = (
            query(tmp_path / name, f"SELECT {columns} FROM {table} WHERE place < 8 ORDER BY 1, 2")
            for name in ("plain", "in vain")
        )
        assert plain == in_vain


def test_what_joins_the_last_generation_can_be_a_finalist(training, tmp_path, monkeypatch, joined):
    choose, late = run.choose_winner, 0

    def checked(settings, evaluations, best, last, still_to_come):
        nonlocal late
        late += len(joined[3])
        assert [canonical_key(entry.genome) for entry in last[8:]] == joined[3]
        return choose(settings, evaluations, best, last, still_to_come)

    monkeypatch.setattr(run, "choose_winner", checked)
    for seed in range(3):
        search = dataclasses.replace(SETTINGS.search, seed=seed)
        evolve(dataclasses.replace(SETTINGS, search=search), tmp_path / str(seed))
    assert late


def test_a_refined_genome_can_win(training, tmp_path):
    won = 0
    for seed in range(4):
        search = dataclasses.replace(SETTINGS.search, seed=seed)
        settings = dataclasses.replace(SETTINGS, search=search, refine=40)
        result = evolve(settings, tmp_path / str(seed))
        places = query(
            tmp_path / str(seed),
            "SELECT min(place) FROM candidate WHERE key = ?",
            canonical_key(result.best.genome),
        )
        won += places[0][0] >= 8
        assert result.history[-1].best_so_far >= result.history[-1].best
    assert won


@pytest.mark.parametrize("change", [{}, {"rotate_seeds": True, "race": False}])
def test_interrupted_anywhere_a_run_resumes_bit_identically(training, tmp_path, change):
    settings = dataclasses.replace(SETTINGS, **change)
    whole = evolve(settings, tmp_path / "whole")
    total = len(training.trials)
    training.trials.clear()
    done = 0
    for stop in (3, 33, 40, 60, 75, 90, total - 40, total - 20, total - 1):
        with killed_after(training, stop - done):
            evolve(settings, tmp_path / "broken")
        done = stop
    resumed = evolve(settings, tmp_path / "broken")
    assert len(training.trials) == total
    assert resumed.history == whole.history
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert evolve(settings, tmp_path / "broken").evaluations == 0


def test_the_number_of_workers_changes_nothing(training, tmp_path):
    evolve(SETTINGS, tmp_path / "one")
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        evolve(SETTINGS, tmp_path / "three", workers=3, executor=executor)
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_all_candidates_for_a_genome_are_one_structure(training, tmp_path):
    """A kernel is compiled for a program, so that is what there must be one of."""
    for seed in range(3):
        search = dataclasses.replace(SETTINGS.search, seed=seed)
        evolve(dataclasses.replace(SETTINGS, search=search, refine=40), tmp_path / str(seed))
        for number in REFINED_GENERATIONS:
            texts = query(
                tmp_path / str(seed),
                "SELECT genome FROM candidate WHERE generation = ? AND place >= 8 ORDER BY place",
                number,
            )
            genomes = [Genome.from_json(text) for (text,) in texts]
            programs = [lower(genome).program for genome in genomes]
            assert [len({*programs[first : first + 40]}) for first in (0, 40)] == [1, 1]
            assert programs[0] != programs[40]
            assert len(set(map(canonical_key, genomes))) > 70


def test_the_best_genome_of_each_structure_is_refined():
    def result(fitness, status=Status.OK, complete=True):
        score = Score(fitness, status)
        return Result({}, score, score if complete else None, (), ())

    better_adam = dataclasses.replace(zoo.adam, lr_log10=-3.2)
    entries = [
        (zoo.adam, result(0.8)),
        (zoo.rmsprop, result(0.7)),
        (better_adam, result(0.9)),
        (zoo.sgd_momentum, result(0.6)),
        (zoo.evolved_2025, result(0.99, Status.DIVERGED)),
        (Genome(["SIGN_GRAD"]), result(0.95, complete=False)),
    ]
    chosen = best_of_structures(*zip(*entries, strict=True))
    assert [genome for genome, _ in chosen] == [better_adam, zoo.rmsprop]


def test_each_refinement_has_random_numbers_of_its_own():
    tried = []

    class FakeRounds:
        def run_beside(self, number, first, genomes, still_to_come, note):
            tried.append((number, first, genomes))
            return [Result({}, Score(0.5), Score(0.5), (), ())] * len(genomes)

    results = [Result({}, Score(0.6), Score(0.6), (), ())] * 2
    for seed in (3, 4):
        search = dataclasses.replace(SETTINGS.search, seed=seed)
        settings = dataclasses.replace(SETTINGS, search=search)
        for number in range(settings.search.generations):
            Refiner(settings, FakeRounds()).run(number, [zoo.adam, zoo.rmsprop], results, 0, "")
    firsts = [genomes[0] for *_, genomes in tried]
    assert len(set(firsts)) == len(firsts) >= 16
    assert [place for number, place, _ in tried[:4]] == [2, 10, 17, 24]


def test_the_ledger_says_what_refinement_cost(training, tmp_path):
    result = evolve(SETTINGS, tmp_path)
    costs = {cost.rule: cost for cost in result.ledger}
    refining = sum(entry.refining for entry in result.history)
    own = sum(entry.evaluations for entry in result.history)
    assert (costs["refinement"].runs, costs["search"].runs) == (refining, own + refining)
    assert costs["refinement"].steps_taken < costs["search"].steps_taken
    assert f"of them {costs['refinement'].steps_taken:,} to refine numbers" in ledger_line(
        result.ledger
    )
    assert [cost.rule for cost in result.ledger][:3] == ["search", "refinement", "cache"]


def test_the_audit_looks_at_the_genomes_of_the_population_alone(training, tmp_path):
    result = evolve(SETTINGS, tmp_path, audits=99)
    assert result.audit.verdicts
    for verdict in result.audit.verdicts:
        assert verdict.place < SETTINGS.search.population
        others = query(
            tmp_path,
            "SELECT max(score) FROM candidate WHERE generation = ? AND place < 8 GROUP BY key "
            "ORDER BY 1 DESC",
            verdict.generation,
        )
        assert verdict.third_best in {score for (score,) in others}


def test_where_every_genome_fails_nothing_is_refined(training, tmp_path, monkeypatch):
    lost = Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, "digest", -1.0)
    monkeypatch.setattr(pool, "evaluate", lambda *args: lost)
    result = evolve(SETTINGS, tmp_path)
    assert [entry.refining for entry in result.history] == [0] * 4


def test_candidates_that_fail_break_nothing(training, tmp_path, monkeypatch):
    tried = []

    def evaluate(trial, *args):
        outcome = training(trial, *args)
        tried.append(trial)
        if trial.purpose is Purpose.SEARCH and len(tried) > 32:  # all after generation 0
            return Outcome(Status.DIVERGED, -1.0, None, None, 3, 0.1, "digest")
        return outcome

    monkeypatch.setattr(pool, "evaluate", evaluate)
    result = evolve(SETTINGS, tmp_path)
    assert result.history[0].refining > 0
    assert result.best.score.status is Status.OK


@pytest.mark.parametrize("refine", [-1, 1, 10])
def test_too_few_candidates_are_refused(refine):
    with pytest.raises(SettingsError, match=f"refine must be .*got {refine}"):
        dataclasses.replace(SETTINGS, refine=refine)


def test_the_comparison_at_equal_costs_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(report, "plot_history", lambda *args: None)
    arguments = "--landscape --generations 4 --refine 15 --run-seeds 1 2 --comparison-seeds 2"
    options = refine.parse([*arguments.split(), "--workers", "1", "--out", str(tmp_path)])
    texts = []
    for _ in range(2):
        refine.run(options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    refining, plain = (
        [len(query(tmp_path / f"{name} {seed}", SEARCHED)) for seed in (1, 2)]
        for name in ("refining", "plain")
    )
    for ours, theirs in zip(refining, plain, strict=True):
        assert abs(ours - theirs) <= 12  # a generation
    assert f"| refining | {sum(refining) / 2:.0f} |" in texts[0]
    assert "| difference |" in texts[0]


def test_the_comparison_at_equal_costs_of_a_single_generation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(report, "plot_history", lambda *args: None)
    arguments = "--landscape --generations 1 --refine 11 --run-seeds 1 --comparison-seeds 1"
    refine.run(refine.parse([*arguments.split(), "--workers", "1", "--out", str(tmp_path)]))
    # 12 genomes and 22 candidates of 100 steps; 36 genomes
    refining, plain, _ = capsys.readouterr().out.splitlines()[-3:]
    assert refining.startswith("| refining | 34 | 3,400 |")
    assert plain.startswith("| plain, more generations | 3")


def test_the_comparison_needs_candidates_and_different_run_seeds(tmp_path, capsys):
    with pytest.raises(SystemExit):
        refine.parse(["--refine", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="run-seeds must be different values, got 1 2 1"):
        refine.run(refine.parse(["--run-seeds", "1", "2", "1", "--out", str(tmp_path)]))


def test_further_genomes_of_a_generation_are_told_and_can_have_children():
    search = GeneticSearch(GeneticConfig(population=6, generations=2, elites=1, seed=5))
    state = search.start()
    best = dataclasses.replace(zoo.adam, lr_log10=-3.3)
    after = search.tell(search.join(state, [best]), [Score(0.1)] * 6 + [Score(0.9)])
    assert after.best.genome == best
    assert after.population[0] == best
    assert len(after.population) == 6
    same = search.tell(search.join(state, []), [Score(0.1)] * 6)
    assert same == search.tell(state, [Score(0.1)] * 6)
