"""ENES: the equations, the search step by step, its face and its limits."""

import dataclasses
import itertools
import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import enes as bench
import numpy as np
import pypop7_runs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evokernels.errors import BackendError, FitnessError, SettingsError
from evokernels.search import ENES
from evokernels.search.enes import Termination
from evokernels.search.natural import natural_gradient, utilities

D = 3
PROBLEM = {
    "fitness_function": lambda x: float(np.square(x - 1).sum()),
    "ndim_problem": D,
    "lower_boundary": -2 * np.ones(D),
    "upper_boundary": 4 * np.ones(D),
}
OPTIONS = {"seed_rng": 5, "max_function_evaluations": 200, "n_individuals": 12}


def enes(fitness=PROBLEM["fitness_function"], **options):
    return ENES({**PROBLEM, "fitness_function": fitness}, {**OPTIONS, **options})


def run(search, state=None, fitness=PROBLEM["fitness_function"]):
    """All states from one on, told what the fitness function says."""
    states = [search.start() if state is None else state]
    while len(candidates := search.ask(states[-1])):
        states.append(search.tell(states[-1], [fitness(x) for x in candidates]))
    return states


def assert_same(one, other):
    """All fields of two states, down to the last bit."""
    for name, value in dataclasses.asdict(one).items():
        np.testing.assert_equal(getattr(other, name), value, err_msg=name)


def example(n, d, seed=0):
    """Numbers, utilities and a triangular factor far from the identity."""
    rng = np.random.default_rng(seed)
    a = np.triu(rng.standard_normal((d, d))) * np.exp(rng.standard_normal(d))[:, None]
    return rng.standard_normal((n, d)), rng.random(n), a


# The equations


def log_density(parameters, x):
    """Of the Gaussian with these mean and triangular factor, up to a constant."""
    d = len(x)
    a = np.zeros((d, d))
    a[np.triu_indices(d)] = parameters[d:]
    z = np.linalg.solve(a.T, x - parameters[:d])
    return -0.5 * z @ z - math.log(abs(np.linalg.det(a)))


def log_derivatives(parameters, x, h=1e-3):
    """By central differences of sixth order."""
    unit = h * np.eye(len(parameters))
    weights = ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))
    return sum(
        weight
        * np.array(
            [log_density(parameters + k * e, x) - log_density(parameters - k * e, x) for e in unit]
        )
        / h
        for k, weight in weights
    )


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_natural_gradient_is_that_of_the_inverse_fisher_matrix(d):
    z, u, _ = example(9, d)
    a = np.triu(np.random.default_rng(1).uniform(0.5, 1.5, (d, d)))
    mean = np.arange(d)
    parameters = np.concatenate([mean, a[np.triu_indices(d)]])
    # log-derivatives are of second degree in z, so that five nodes integrate their products
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    fisher = 0
    for chosen in itertools.product(range(5), repeat=d):
        s = log_derivatives(parameters, mean + nodes[list(chosen)] @ a)
        fisher += np.prod(weights[list(chosen)] / weights.sum()) * np.outer(s, s)
    v = np.array([np.linalg.solve(fisher, log_derivatives(parameters, x)) for x in mean + z @ a])

    blocks = np.concatenate([np.full(d, -1), np.triu_indices(d)[0]])  # the mean, then each row
    expected = np.empty(len(parameters))
    for block in range(-1, d):
        part = v[:, blocks == block]
        squares = np.square(part).sum(1)
        expected[blocks == block] = (u - u @ squares / squares.sum()) @ part / len(u)
    by_mean, by_a = natural_gradient(z, u, a)
    np.testing.assert_allclose(by_mean, expected[:d], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(by_a[np.triu_indices(d)], expected[d:], rtol=1e-7, atol=1e-9)


def spelled_out(z, u, a):
    """Equations (1) to (4) with every vector formed, one individual after the other."""
    n, d = z.shape
    vectors = np.zeros((n, d + 1, d))
    for i, k in itertools.product(range(n), range(d)):
        rest = z[i, k + 1 :] @ a[k + 1 :]
        vectors[i, k] = z[i, k] * rest + 0.5 * (z[i, k] ** 2 - 1) * a[k]
    vectors[:, d] = z @ a
    squares = np.square(vectors).sum(2)
    centred = u[:, None] - (u @ squares) / squares.sum(0)
    gradient = np.einsum("ik,ikj->kj", centred, vectors) / n
    return gradient[d], gradient[:d]


@pytest.mark.parametrize(
    ("n", "d"), [(3, 1), (4, 7), (10, 31), (10, 32), (10, 33), (7, 64), (5, 70)]
)
def test_blocks_of_rows_give_what_the_equations_say(n, d):
    numbers = example(n, d)
    for ours, theirs in zip(natural_gradient(*numbers), spelled_out(*numbers), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13 * np.abs(theirs).max())
        assert ours.shape == theirs.shape
    assert (np.tril(natural_gradient(*numbers)[1], -1) == 0).all()


def test_a_factor_that_has_shrunk_to_nothing_stays_there():
    z, u, a = example(6, 3)
    a[1:] = 0.0
    by_mean, by_a = natural_gradient(z, u, a)
    assert np.isfinite(by_mean).all()
    assert (by_a[1:] == 0).all()
    assert (by_a[0] != 0).all()


@pytest.mark.parametrize(
    ("individuals", "parents", "shares"),
    [
        (6, 3, [1, 0.5, 0, 0, 0, 0]),
        (7, 3.5, [1, 0.6, 0.2, 0, 0, 0, 0]),
        (3, 1.5, [1, 0, 0]),
        (4, 4, [1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_utilities_fall_linearly_to_the_last_parent(individuals, parents, shares):
    np.testing.assert_allclose(utilities(individuals, parents), shares, rtol=1e-15)


# The search, held against pypop7


def assert_agree(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", pypop7_runs.CASES)
def test_every_generation_is_that_of_pypop7(name):
    assert_agree(pypop7_runs.trace(ENES, name), pypop7_runs.recorded(name))


@pytest.mark.filterwarnings("ignore:the matrix subclass")  # pypop7 uses it
@pytest.mark.parametrize("name", pypop7_runs.CASES)
def test_the_record_is_what_pypop7_does(name):
    theirs = pytest.importorskip("pypop7.optimizers.nes.enes", exc_type=ImportError).ENES
    assert_agree(pypop7_runs.trace(theirs, name), pypop7_runs.recorded(name))


@pytest.mark.parametrize("batched", [False, True])
def test_the_documented_example(batched):
    problem, options = pypop7_runs.CASES[pypop7_runs.DOCUMENTED]
    results = ENES(problem, {**options, "batched": batched}).optimize()
    assert results["n_function_evaluations"] == 5000
    np.testing.assert_allclose(results["best_so_far_y"], 0.00035668252927080496, rtol=1e-9)


def test_without_restarts_the_documented_example_goes_further():
    problem, options = pypop7_runs.CASES[pypop7_runs.DOCUMENTED]
    options = {**options, "is_restart": False, "batched": True, "max_function_evaluations": 20000}
    assert ENES(problem, options).optimize()["best_so_far_y"] < 1e-17


# Ask and tell


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("budget", [5, 12, 13, 24, 200])
def test_ask_and_tell_find_what_optimize_finds(budget, batched):
    fitness = PROBLEM["fitness_function"]
    search = enes(
        (lambda x: np.array([fitness(row) for row in x])) if batched else fitness,
        batched=batched,
        max_function_evaluations=budget,
    )
    state = run(search)[-1]
    results = search.optimize()
    assert results["best_so_far_y"] == state.best_y == fitness(state.best_x)
    assert results["n_function_evaluations"] == state.n_evaluations == budget
    np.testing.assert_equal(results["best_so_far_x"], state.best_x)
    np.testing.assert_equal(results["mean"], state.mean)
    # the generation that ends the budget is evaluated, but not used
    assert results["_n_generations"] == state.generation == (budget - 1) // 12
    results["best_so_far_x"] += 1.0  # the caller's own
    assert results["fitness"].shape == (math.ceil(budget / 12), 2)
    assert tuple(results["fitness"][-1]) == (budget, state.best_y)


@pytest.mark.parametrize(
    "passed_on",
    [
        lambda state: pickle.loads(pickle.dumps(state)),
        lambda state: type(state)(**dataclasses.asdict(state)),
    ],
    ids=["pickle", "mapping"],
)
def test_a_search_goes_on_from_any_state(passed_on):
    def fitness(x):  # no gain: a restart within the budget
        return -1e-16 * x.sum()

    states = run(enes(max_function_evaluations=700), fitness=fitness)
    assert states[-1].runs
    for k in (0, 1, 17, 18, len(states) - 1):
        again = run(enes(max_function_evaluations=700), passed_on(states[k]), fitness)
        for one, other in zip(states[k:], again, strict=True):
            assert_same(one, other)


def test_states_do_not_change():
    search = enes()
    state = search.start()
    before = pickle.dumps(state)
    candidates = search.ask(state)
    fitness = np.arange(len(candidates), dtype=float)
    one = search.tell(state, fitness)
    candidates += 1.0  # the caller's own
    fitness += 1.0
    other = search.tell(state, np.arange(len(candidates)))
    assert pickle.dumps(state) == before
    assert_same(one, other)
    with pytest.raises(ValueError, match="read-only"):
        state.mean[0] = 1.0


def test_searches_in_threads_do_not_meet():
    def ends(seed):
        return run(enes(seed_rng=seed, max_function_evaluations=600))[-1].best_x

    with ThreadPoolExecutor(4) as threads:
        np.testing.assert_equal(list(threads.map(ends, range(8))), [ends(k) for k in range(8)])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(3, 20), st.integers(0, 2**63))
def test_the_budget_is_spent_to_the_last_evaluation(budget, individuals, seed):
    search = enes(max_function_evaluations=budget, n_individuals=individuals, seed_rng=seed)
    states = run(search)
    counts = [len(state.candidates) for state in states]
    assert counts == [
        min(individuals, budget - individuals * k) for k in range(len(counts) - 1)
    ] + [0]
    assert states[-1].n_evaluations == budget
    np.testing.assert_equal(states[-1].mean, states[-2].mean)


@given(st.permutations(range(12)), st.floats(-5, 5), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_only_the_order_of_fitness_counts(order, shift, scale):
    search = enes()
    state = search.start()
    plain = search.tell(state, order)
    other = search.tell(state, shift + scale * np.array(order))
    np.testing.assert_equal(other.mean, plain.mean)
    np.testing.assert_equal(other.a, plain.a)


def test_of_equals_the_earlier_ranks_better():
    search = enes(n_individuals=100)
    state = search.start()
    fitness = np.random.default_rng(0).integers(0, 3, 100).astype(float)
    told = search.tell(state, fitness)
    np.testing.assert_equal(told.mean, search.tell(state, fitness + np.arange(100) / 1e3).mean)
    np.testing.assert_equal(told.best_x, state.candidates[fitness.argmin()])


@pytest.mark.parametrize(("gain", "restarts"), [(0.95e-12, True), (1.05e-12, False)])
def test_a_run_ends_with_too_small_a_gain(gain, restarts):
    search = enes(max_function_evaluations=12 * 30)
    state = search.start()
    for generation in range(18):  # 10 + ceil(30 * 3 / 12), of which the last gains on the first
        state = search.tell(state, np.full(12, -generation * gain / 17))
        assert state.generation == (0 if restarts and generation == 17 else generation + 1)
    assert bool(state.runs) == restarts


def test_parents_decide_who_has_a_share():
    state = enes().start()
    fitness = np.arange(12.0)
    worst = np.concatenate([fitness[:6], fitness[:5:-1] + 10.0])  # the other half in another order
    for parents, same in ((6, True), (12, False)):
        search = enes(n_parents=parents)
        one, other = (search.tell(state, told).mean for told in (fitness, worst))
        assert (one == other).all() == same
    np.testing.assert_equal(
        enes(n_parents=6).tell(state, fitness).mean, enes().tell(state, fitness).mean
    )


# What is not finite


@pytest.mark.parametrize("failure", [math.nan, math.inf, -math.inf])
def test_a_failure_ranks_worst_and_is_never_the_best(failure):
    search = enes()
    state = search.start()
    fitness = np.arange(12.0)
    fitness[[0, 7]] = failure
    failed = search.tell(state, fitness)
    assert failed.best_y == 1.0
    fitness[[0, 7]] = 100.0, 101.0
    np.testing.assert_equal(failed.mean, search.tell(state, fitness).mean)
    np.testing.assert_equal(failed.best_x, state.candidates[1])


def test_failures_have_no_share_even_among_the_better_half():
    search = enes()
    state = search.start()
    fitness = np.full(12, math.nan)
    fitness[4] = 1.0
    utility = np.zeros(12)
    utility[4] = 1.0
    by_mean, by_a = natural_gradient(state.z, utility, state.a)
    told = search.tell(state, fitness)
    np.testing.assert_equal(told.mean, state.mean + by_mean)
    np.testing.assert_equal(told.a, state.a + by_a)


def test_an_infinitely_low_fitness_does_not_end_a_search():
    results = enes(lambda x: -math.inf if x[0] > 1 else float(x[0])).optimize()
    assert results["n_function_evaluations"] == OPTIONS["max_function_evaluations"]
    assert math.isfinite(results["best_so_far_y"])


def test_where_everything_fails_a_run_stands_still_and_the_next_one_begins():
    search = enes(lambda x: math.nan, max_function_evaluations=12 * 19 + 1)
    states = run(search, fitness=lambda x: math.nan)
    for state in states[:18]:
        np.testing.assert_equal(state.mean, states[0].mean)
        np.testing.assert_equal(state.a, np.eye(D))
    assert states[18].runs[0][0] == 18  # 10 + ceil(30 * 3 / 12)
    assert states[18].n_individuals == 24
    results = search.optimize()
    assert results["best_so_far_x"] is None
    assert results["best_so_far_y"] == math.inf
    assert not results["success"]


@pytest.mark.parametrize("is_restart", [True, False])
def test_a_distribution_that_leaves_the_range_of_floats_ends_its_run(is_restart):
    def fitness(x):
        assert np.isfinite(x).all()
        return float(x[0])

    options = {"lr_sigma": 1e200, "is_restart": is_restart, "max_function_evaluations": 60}
    results = enes(fitness, **options).optimize()
    assert np.isfinite(results["mean"]).all()
    if is_restart:
        assert results["_n_restart"] >= 1
        assert results["n_function_evaluations"] == 60
    else:
        assert results["termination_signal"] is Termination.EARLY_STOPPING
        assert results["n_function_evaluations"] < 60


def test_a_factor_out_of_range_ends_a_run_whose_mean_is_within():
    search = enes(lr_sigma=1e200, is_restart=False)
    state = dataclasses.replace(search.start(), a=1e150 * np.eye(D))
    assert len(search.ask(search.tell(state, np.arange(12)))) == 0
    assert len(search.ask(enes(is_restart=False).tell(state, np.arange(12)))) == 12


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_numbers_whose_squares_are_out_of_range_are_searched(scale):
    problem, options = {**PROBLEM}, {**OPTIONS, "mean": np.full(D, 3 * scale)}
    for name in ("lower_boundary", "upper_boundary"):
        problem[name] = scale * PROBLEM[name]
    problem["fitness_function"] = lambda x: float(np.abs(x / scale - 1).sum())
    results = ENES(problem, {**options, "is_restart": False}).optimize()
    assert results["n_function_evaluations"] == options["max_function_evaluations"]
    assert np.isfinite(results["mean"]).all()


# Limits


def test_a_threshold_ends_the_search_at_the_candidate_that_reaches_it():
    one_by_one = enes(fitness_threshold=0.5).optimize()
    assert one_by_one["termination_signal"] is Termination.FITNESS_THRESHOLD
    assert one_by_one["best_so_far_y"] <= 0.5
    batched = enes(
        lambda x: np.square(x - 1).sum(1), fitness_threshold=0.5, batched=True
    ).optimize()
    spent = one_by_one["n_function_evaluations"]
    assert batched["n_function_evaluations"] == math.ceil(spent / 12) * 12
    assert batched["_n_generations"] == one_by_one["_n_generations"]


@pytest.mark.parametrize(("batched", "evaluations"), [(False, 4), (True, 12)])
def test_time_ends_a_search(monkeypatch, batched, evaluations):
    now = 0.0

    def fitness(x):
        nonlocal now
        now += 0.25
        return np.arange(len(x)) if batched else now

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    search = enes(
        fitness, max_runtime=0.25 if batched else 1.0, max_function_evaluations=1e6, batched=batched
    )
    results = search.optimize()
    assert results["n_function_evaluations"] == evaluations
    assert results["termination_signal"] is Termination.MAX_RUNTIME
    assert results["runtime"] == results["time_function_evaluations"] == now


def test_a_search_without_time_for_a_generation_has_found_nothing(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    results = enes(max_runtime=1).optimize()
    assert results["termination_signal"] is Termination.MAX_RUNTIME
    assert results["fitness"].shape == (0, 2)
    assert results["best_so_far_x"] is None


def test_success_is_a_best_candidate_within_the_boundaries():
    assert enes().optimize()["success"]
    assert not enes(lambda x: float(x[0])).optimize()["success"]  # downhill for ever


def test_sigma_is_the_root_of_the_determinant():
    search = enes(max_function_evaluations=60)
    a = run(search)[-1].a
    expected = abs(np.linalg.det(a)) ** (1 / D)
    assert search.optimize()["sigma"] == pytest.approx(expected, rel=1e-12)


def test_verbose_prints_a_line_every_so_many_generations(capsys):
    enes(verbose=4).optimize()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"generation {k}" for k in (4, 8, 12, 16)]
    enes().optimize()
    assert not capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ndim_problem", 0, "ndim_problem must be a whole number at least 1, got 0"),
        ("ndim_problem", None, "ndim_problem must be a whole number"),
        ("lower_boundary", None, "lower_boundary is missing; give 3 numbers"),
        ("lower_boundary", [-1, -1], r"lower_boundary must have shape \(3,\).* got shape \(2,\)"),
        ("upper_boundary", 4.0, r"upper_boundary must have shape \(3,\).* got shape \(\)"),
        ("upper_boundary", [4, math.inf, 4], "upper_boundary must be finite"),
        ("upper_boundary", ["a", "b", "c"], "upper_boundary must hold numbers"),
        ("upper_boundary", [4, -2, 4], "got -2.0 and -2.0 in dimension 1"),
        ("fitness_function", 3, "fitness_function must be callable, got 3"),
        ("bounds", 3, "unknown problem 'bounds'; known are fitness_function"),
        ("seed_rng", None, "seed_rng must be a whole number at least 0, got None"),
        ("seed_rng", -1, "seed_rng must be a whole number at least 0, got -1"),
        ("mean", [1, 1], r"mean must have shape \(3,\)"),
        (
            "mean",
            [1, 4.5, 1],
            r"mean must lie within.* got 4.5 outside \[-2.0, 4.0\] in dimension 1",
        ),
        ("mean", [1, math.nan, 1], "mean must be finite"),
        ("n_individuals", 2, "n_individuals must be a whole number at least 3, got 2"),
        ("n_individuals", 12.5, "n_individuals must be a whole number"),
        ("n_individuals", math.inf, "n_individuals must be a whole number"),
        ("n_parents", 1, "n_parents must be a whole number from 2 to 12, got 1"),
        ("n_parents", 13, "n_parents must be a whole number from 2 to 12, got 13"),
        ("max_function_evaluations", 0, "max_function_evaluations must be a whole number"),
        ("max_function_evaluations", np.ones(2), "max_function_evaluations must be a whole number"),
        ("max_function_evaluations", math.nan, "max_function_evaluations must be a whole number"),
        ("max_runtime", 0, "max_runtime must be a number above 0, got 0"),
        ("max_runtime", math.nan, "max_runtime must be a number above 0"),
        ("fitness_threshold", math.nan, "fitness_threshold must be a number, got nan"),
        ("lr_mean", 0, "lr_mean must be a number above 0, got 0"),
        ("lr_sigma", math.inf, "lr_sigma must be a number above 0, got inf"),
        ("lr_sigma", "1", "lr_sigma must be a number above 0, got '1'"),
        ("verbose", -1, "verbose must be a whole number"),
        ("sigma", 1.0, "unknown option 'sigma'; known are max_function_evaluations"),
    ],
)
def test_bad_settings_are_named(key, value, message):
    problem, options = dict(PROBLEM), dict(OPTIONS)
    (problem if key in (*PROBLEM, "bounds") else options)[key] = value
    with pytest.raises(SettingsError, match=message):
        ENES(problem, options)


@pytest.mark.parametrize(
    ("fitness", "message"),
    [
        ([1.0] * 11, r"shape \(11,\) for 12 candidates"),
        (np.ones((12, 1)), r"shape \(12, 1\) for 12 candidates"),
        (1.0, r"shape \(\) for 12 candidates"),
        (["low"] * 12, "must be a real number"),
        (["1.0"] * 12, "must be a real number"),
        ([1j] * 12, "must be a real number"),
        (np.full(12, 1j), "must be a real number"),
        ([None] + [1.0] * 11, "must be a real number"),  # not a NaN, which would rank last
        (None, "shape|real number"),
    ],
)
def test_what_is_told_is_one_number_for_each_candidate(fitness, message):
    search = enes()
    with pytest.raises(FitnessError, match=message):
        search.tell(search.start(), fitness)
    if fitness is not None:
        with pytest.raises(FitnessError, match=message):
            enes(lambda x: fitness, batched=True).optimize()


@pytest.mark.parametrize("fitness", [np.ones(3), np.ones(1), "low", 1j, None])
def test_a_fitness_function_returns_one_number(fitness):
    with pytest.raises(FitnessError, match="must return one real number for a candidate, got"):
        enes(lambda x: fitness).optimize()


def test_nothing_is_told_when_all_is_over():
    search = enes()
    with pytest.raises(FitnessError, match="the search is over"):
        search.tell(run(search)[-1], [])


def test_optimize_needs_a_function_and_an_end():
    with pytest.raises(SettingsError, match="needs a fitness_function"):
        enes(None).optimize()
    with pytest.raises(SettingsError, match="nothing would end the search"):
        enes(max_function_evaluations=math.inf).optimize()


# The benchmark


def test_the_benchmark_times_nobody_who_finds_something_else(monkeypatch):
    monkeypatch.setattr(bench, "SHARE", 1e-9)
    entrants = {name: (ENES, {"batched": True}) for name in (bench.PYPOP7, bench.BATCHED)}
    assert all(seconds > 0 for seconds in bench.one_pass(entrants, 2, 500).values())
    entrants[bench.BATCHED] = (ENES, {"batched": True, "lr_mean": 0.5})
    with pytest.raises(BackendError, match="there is nothing to compare"):
        bench.one_pass(entrants, 2, 500)


def test_the_benchmark_compares_best_times_and_medians():
    passes = [
        {2: {bench.PYPOP7: 3.0, bench.BATCHED: 0.1, bench.SINGLE: 1.0}},
        {2: {bench.PYPOP7: 2.0, bench.BATCHED: 0.2, bench.SINGLE: 2.0}},
        {2: {bench.PYPOP7: 4.0, bench.BATCHED: 0.2, bench.SINGLE: 4.0}},
    ]
    assert bench.row(passes, 2) == [
        *("2", "2, 3", "0.1, 0.2", "20.0, 20.0", "20", "yes", "1, 2", "2.0, 1.0"),
    ]
