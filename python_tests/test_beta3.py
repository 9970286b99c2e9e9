"""A beta of averages that is a number of the genome: who has it, and who moves it."""

import copy
import dataclasses
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from oracle import exact_update
from test_export import exported

from evokernels import FusedEvolvedOptimizer, Genome, genome, inspection, terms, zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.describe import formula
from evokernels.compiler.expr import Average
from evokernels.compiler.genes import numbers_read
from evokernels.compiler.lower import lower
from evokernels.compiler.terms import CATALOGUE
from evokernels.errors import GenomeError, OptimizerError
from evokernels.evolution.refining import coordinates_of
from evokernels.evolution.tuning import candidates
from evokernels.genome import CATALOGUES, Term
from evokernels.search import operators
from evokernels.search.genetic import GeneticConfig, GeneticSearch
from evokernels.search.operators import BETA3, RATES
from evokernels.search.score import Score
from evokernels.search.spaces import OptimizerSpace, PairSpace
from evokernels.terms import average, beta2, beta3, g, register, sqrt, tanh, v


@pytest.fixture(autouse=True)
def _one_term_reads_it(monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})
    register("SLOW", average(g, beta3) / (sqrt(v) + 1))
    register("FIXED", average(g, 0.5) / (sqrt(v) + 1))


def slow(*others, **genes):
    names = ["SLOW", *others]
    return Genome(names, [1.0] * len(names), **genes)


# Genomes


def test_no_built_in_term_reads_it():
    """`Genome.reads_beta3` looks at own terms alone."""
    assert not any(formula.reads("beta3") for formula in CATALOGUE.values())
    register("FACTOR", beta3 * g)
    register("DEEP", tanh(g + average(tanh(g) * beta3, beta2)))
    assert all(Genome([name]).reads_beta3 for name in ("SLOW", "FACTOR", "DEEP"))
    assert not Genome(["FIXED", *Term], [1.0] * (1 + len(Term))).reads_beta3


def test_a_genome_has_it_where_a_term_reads_it():
    assert slow().beta3 == 0.99
    assert slow(beta3=0.5).to_dict()["beta3"] == 0.5
    assert slow(beta3=0.5) != slow(beta3=0.6)
    assert Genome.from_json(slow(beta3=0.1 + 0.2).to_json()) == slow(beta3=0.1 + 0.2)
    # where none does, any value means the same
    without = dataclasses.replace(slow(beta3=0.5), term_types=["FIXED"])
    assert (without, hash(without), repr(without)) == (
        *(Genome(["FIXED"]), hash(Genome(["FIXED"])), repr(Genome(["FIXED"]))),
    )
    assert "beta3" not in without.to_json()
    with pytest.raises(GenomeError, match=r"beta3 must lie in \[0, 1\), got 1"):
        Genome(beta3=1)
    with pytest.raises(TypeError, match="positional"):
        Genome(["GRAD"], [1.0], *[0.0] * 13, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta3": 1.0}, r"beta3 must lie in \[0, 1\), got 1.0"),
        ({"beta3": None}, "beta3 must be a number"),
        ({"term_types": ["FIXED"]}, "has beta3, which none of its terms reads; leave it out"),
        ({"beta_3": 0.9}, "unknown genome field 'beta_3'; did you mean 'beta3'"),
    ],
)
@pytest.mark.parametrize("versioned", [True, False])
def test_json_with_a_beta3_that_is_wrong(change, message, versioned):
    data = {**slow().to_dict(), **change}
    if not versioned:
        del data["schema_version"]
    with pytest.raises(GenomeError, match=message):
        Genome.from_dict(data)


def test_versioned_json_says_what_it_is():
    data = slow(beta3=0.5).to_dict()
    del data["beta3"]
    with pytest.raises(GenomeError, match="lacks beta3, which one of its terms reads; say what"):
        Genome.from_dict(data)
    del data["schema_version"]
    assert Genome.from_dict(data) == slow()


def test_genomes_that_were_pickled_before_there_was_one_load():
    old = Genome(["FIXED"])
    del old.__dict__["beta3"]
    assert pickle.loads(pickle.dumps(old)) == Genome(["FIXED"])


def test_all_that_describes_a_rule_knows_it():
    rule = slow(beta3=0.75, use_v=False)
    assert numbers_read(rule) == {"lr_log10", "wd_log10", "beta3"}
    assert numbers_read(dataclasses.replace(rule, use_bias_correction=False)) == numbers_read(rule)
    assert canonical_key(rule) != canonical_key(slow(beta3=0.8, use_v=False))
    # where a weight of zero leaves it out, it is no part of the optimizer
    unread = dataclasses.replace(rule, term_types=["SLOW", "GRAD"], alphas=[0.0, 1.0])
    assert canonical_key(unread) == canonical_key(Genome(["GRAD"], use_v=False))
    assert "a0 ← 0.25 * g + 0.75 * a0\na0^ = a0 / (1 - 0.75^t)" in formula(rule)
    assert "a0 ← (1 - beta3) * g + beta3 * a0" in formula(rule, named=True)
    update = inspection.summary(rule, torch.float32).partition("update ")[2].splitlines()[0]
    assert "1 / (1 - 0.75^t) * average(g, 0.75) / " in update


# Groups


def stepped(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def exact(rules, gradients):
    """Of float64 ones, each step by the rule at its place."""
    now = {"p": np.ones(3), "m": np.zeros(3), "v": np.zeros(3)}
    for t, (rule, gradient) in enumerate(zip(rules, gradients, strict=True), start=1):
        now |= exact_update(rule, {**now, "g": gradient.numpy()}, t, len(rules))
    return torch.from_numpy(now["p"])


def ones():
    return torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


GRADIENTS = list(torch.randn((6, 3), generator=torch.Generator().manual_seed(0)).double())


@pytest.mark.parametrize("corrects", [True, False])
def test_a_group_may_have_its_own_and_change_it(backend, corrects):
    rule = slow("MOMENTUM", beta3=0.5, use_bias_correction=corrects)
    a, b, c = ones(), ones(), ones()
    groups = [
        {"params": [a]},
        {"params": [b], "beta3": torch.tensor(0.75)},
        {"params": [c], "genome": zoo.adam},
    ]
    optimizer = FusedEvolvedOptimizer(groups, rule, backend=backend)
    assert ["beta3" in group for group in optimizer.param_groups] == [True, True, False]
    for i, gradient in enumerate(GRADIENTS):
        if i == 4:  # where the short way is taken
            optimizer.param_groups[0]["beta3"] = 0.25
        for each in (a, b, c):
            each.grad = gradient.clone()
        optimizer.step()
    changed = [dataclasses.replace(rule, beta3=0.5 if i < 4 else 0.25) for i in range(6)]
    expected = [changed, [dataclasses.replace(rule, beta3=0.75)] * 6, [zoo.adam] * 6]
    for each, rules in zip((a, b, c), expected, strict=True):
        torch.testing.assert_close(each.detach(), exact(rules, GRADIENTS), rtol=1e-12, atol=1e-14)


def test_a_training_goes_on_from_its_state(backend):
    rule = slow("ADAM_TERM", beta3=0.5)
    whole, half, rest = ones(), ones(), ones()
    expected = stepped(FusedEvolvedOptimizer([whole], rule, backend=backend), whole, GRADIENTS)
    first = FusedEvolvedOptimizer([half], rule, backend=backend)
    rest.data = stepped(first, half, GRADIENTS[:3])
    # a default of another genome gives way
    second = FusedEvolvedOptimizer([rest], slow(beta3=0.875), backend=backend)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["beta3"] == 0.5
    assert torch.equal(stepped(second, rest, GRADIENTS[3:]), expected)
    assert copy.deepcopy(second).param_groups[0]["beta3"] == 0.5


def test_groups_have_it_where_their_genome_reads_it():
    optimizer = FusedEvolvedOptimizer([ones()], zoo.adam)
    (group,) = optimizer.param_groups
    adam_state = optimizer.state_dict()
    assert "beta3" not in group
    group["genome"] = slow(beta3=0.5)  # a search swaps rules
    stepped(optimizer, group["params"][0], GRADIENTS[:1])
    assert group["beta3"] == 0.5
    optimizer.load_state_dict(adam_state)
    assert "beta3" not in optimizer.param_groups[0]
    # of torch's AdamW, which knows none, ours stays; and the other way round
    p = ones()
    mixed = FusedEvolvedOptimizer([p], slow("ADAM_TERM", beta3=0.5))
    torchs = torch.optim.AdamW([p])
    stepped(torchs, p, GRADIENTS[:2])
    mixed.load_state_dict(torchs.state_dict())
    assert mixed.param_groups[0]["beta3"] == 0.5
    stepped(mixed, p, GRADIENTS[2:4])
    torchs.load_state_dict(mixed.state_dict())
    stepped(torchs, p, GRADIENTS[4:])


@pytest.mark.parametrize("value", [1.0, -0.1, "a", None, math.nan])
def test_a_group_is_asked_for_a_number_below_one(backend, value):
    p = ones()
    with pytest.raises(OptimizerError, match=r"beta3 must lie in \[0, 1\), got"):
        FusedEvolvedOptimizer([{"params": [p], "beta3": value}], slow(), backend=backend)
    optimizer = FusedEvolvedOptimizer([p], slow(), backend=backend)
    stepped(optimizer, p, GRADIENTS[:3])
    before = p.detach().clone()
    optimizer.param_groups[0]["beta3"] = value
    with pytest.raises(OptimizerError, match=r"beta3 must lie in \[0, 1\), got"):
        optimizer.step()
    assert torch.equal(p, before)


# Exports


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("corrects", [True, False])
def test_an_exported_file_has_it_among_its_defaults(foreach, corrects):
    rule = slow("ADAM_TERM", beta3=0.5, use_bias_correction=corrects)
    a, b, c, d = ones(), ones(), ones(), ones()
    kind = exported(rule)
    groups = [{"params": [a]}, {"params": [b], "beta3": 0.75}]
    ours = kind(groups, foreach=foreach)
    theirs = FusedEvolvedOptimizer([{"params": [c]}, {"params": [d], "beta3": 0.75}], rule)
    assert ours.defaults["beta3"] == 0.5
    for gradient in GRADIENTS[:4]:
        for each in (a, b, c, d):
            each.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, c, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(b, d, rtol=1e-13, atol=1e-15)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [group["beta3"] for group in theirs.param_groups] == [0.5, 0.75]
    assert '"beta3": 0.5' in kind.__doc__
    with pytest.raises(ValueError, match=r"beta3 must be a number in \[0, 1\), got 1.0"):
        kind([a], beta3=1.0)
    alone = exported(slow(use_v=False))([a])
    assert list(alone.defaults)[:2] == ["lr", "beta3"]  # no betas, which nothing reads


# Searches


def test_what_other_genomes_draw_is_as_without_it():
    """One number more, behind all else."""
    for seed in range(50):
        drawn = []
        for name in ("SLOW", "FIXED"):
            rng = random.Random(seed)
            drawn.append((operators.random_genome(rng, 1, (genome.find_term(name),)), rng))
        (reader, after), (other, rng) = drawn
        assert dataclasses.replace(reader, term_types=["FIXED"]) == other
        assert BETA3.start[0] <= reader.beta3 <= BETA3.start[1]
        assert rng.uniform(*BETA3.start) == reader.beta3
        assert rng.getstate() == after.getstate()
        mutants = [
            operators.mutate(each, random.Random(seed), RATES, 1, CATALOGUES["classic"])
            for each in (reader, other)
        ]
        if mutants[0].reads_beta3:
            assert dataclasses.replace(mutants[0], term_types=["FIXED"]) == mutants[1]
        else:
            assert mutants[0] == mutants[1]


def test_a_child_takes_it_from_a_parent_that_has_it():
    rng = random.Random(0)
    first, second, plain = (
        slow(beta3=0.91),
        slow("GRAD", beta3=0.92),
        Genome(["GRAD", "FIXED"], [1, 1]),
    )
    both = {operators.crossover(first, second, rng, 4).beta3 for _ in range(50)}
    assert both == {0.91, 0.92}
    for parents in ((first, plain), (plain, first)):
        children = [operators.crossover(*parents, rng, 4) for _ in range(50)]
        assert {child.beta3 for child in children if child.reads_beta3} == {0.91}
    dropped = operators.crossover(plain, second, rng, 1)
    assert dropped == dataclasses.replace(dropped, beta3=0.3)


def test_it_mutates_with_the_rate_of_numbers_and_is_drawn_with_the_term():
    rng = random.Random(0)
    still = dataclasses.replace(RATES, structure=0.0)
    mutants = [operators.mutate(slow(beta3=0.95), rng, still, 4) for _ in range(4000)]
    moved = [mutant.beta3 for mutant in mutants if mutant.beta3 != 0.95]
    assert len(moved) / 4000 == pytest.approx(0.35, abs=0.03)
    below = [0.95 - value for value in moved if value < 0.95]
    assert math.sqrt(np.square(below).mean()) == pytest.approx(0.03, rel=0.1)
    assert max(moved) == BETA3.limits[1]
    always = dataclasses.replace(RATES, structure=1.0)
    new = [
        operators.mutate(zoo.adam, rng, always, 4, (genome.find_term("SLOW"),)) for _ in range(300)
    ]
    drawn = [mutant.beta3 for mutant in new if mutant.reads_beta3]
    assert len(set(drawn)) == len(drawn) > 100
    assert BETA3.start[0] <= min(drawn) < 0.91 < 0.99 < max(drawn) <= BETA3.start[1]
    # and goes with it
    gone = [operators.mutate(slow("GRAD", beta3=0.9), rng, always, 4) for _ in range(100)]
    assert {"beta3" in mutant.to_dict() for mutant in gone} == {True, False}


def best_of(space, number):
    """The best individual of a search whose fitness is that of its `number`."""
    config = GeneticConfig(population=20, generations=25, elites=2, tournament=3)
    search = GeneticSearch(config, space)
    state = search.start()
    while asked := search.ask(state):
        state = search.tell(state, [Score(number(each)) for each in asked])
    return state.best.genome


def test_searches_move_it():
    """To where none begins."""

    def fitness(each):
        return -abs(each.beta3 - 0.8) if each.reads_beta3 else -1.0

    space = OptimizerSpace(2, (Term.GRAD, genome.find_term("SLOW")))
    assert best_of(space, fitness).beta3 == pytest.approx(0.8, abs=0.01)
    pairs = PairSpace(space, space)  # as a co-evolution has them
    assert best_of(pairs, lambda pair: fitness(pair[1]))[1].beta3 == pytest.approx(0.8, abs=0.01)


def test_a_refinement_moves_it_as_it_moves_other_betas():
    coordinates = coordinates_of(slow("ADAM_TERM", beta3=0.9))
    assert coordinates.numbers == ("lr_log10", "eps_log10", "wd_log10", "beta1", "beta2", "beta3")
    assert "beta3" not in coordinates_of(Genome(["FIXED", "GRAD"], [1, 1])).numbers
    place = coordinates.numbers.index("beta3")
    for offset, value in ((0.0, 0.9), (math.log(10), 0.99), (99, 0.9999), (-99, 0.0)):
        vector = np.eye(len(coordinates))[place] * offset / RATES.sigma
        moved = coordinates.genome(vector)
        assert moved == dataclasses.replace(coordinates.origin, beta3=moved.beta3)
        assert moved.beta3 == pytest.approx(value, rel=1e-12, abs=1e-15)
        within = np.clip(vector, *coordinates.bounds)
        assert coordinates.vector(moved) == pytest.approx(within, abs=1e-9)


def test_tuning_leaves_it_alone():
    assert {each.beta3 for each in candidates(slow(beta3=0.5), 6, 100)} == {0.5}


def test_a_state_is_named_after_it_whatever_it_is():
    for value in (0.0, 0.5):
        names = lower(slow(beta3=value)).state_names
        assert set(names.values()) == {"exp_avg_sq", "average(g, beta3)"}
    assert isinstance(average(g, beta3), Average)
    assert json.loads(slow(beta3=0.0).to_json())["beta3"] == 0.0
