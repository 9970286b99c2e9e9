"""Sequences of components: where a search begins, crossover, and every move of a mutation."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evokernels import zoo
from evokernels.architecture import CATALOGUE, MAX_LENGTH, Architecture
from evokernels.search import architecture_operators as operators
from evokernels.tasks.decoding import decode

SEEDS = st.integers(0, 2**32)
SEQUENCES = st.lists(st.sampled_from(CATALOGUE), max_size=MAX_LENGTH).map(tuple)


def test_a_search_begins_with_networks_of_which_nothing_is_left_out():
    started = operators.start_sequences(6, MAX_LENGTH, random.Random(0))
    assert started[:2] == (zoo.small_cnn.components, zoo.cifar_cnn.components)
    assert len(set(started)) == 6
    for components in started:
        architecture = Architecture(components, max_parameters=10**8)
        assert decode(architecture, (3, 32, 32), 10).components == components


@given(st.integers(0, 40), st.integers(1, MAX_LENGTH), SEEDS)
def test_a_start_has_its_size_and_keeps_to_the_length(size, max_length, seed):
    started = operators.start_sequences(size, max_length, random.Random(seed))
    assert len(started) == size
    for components in started:
        assert Architecture(components).components == components
        assert 1 <= len(components) <= max_length


@given(SEEDS)
def test_a_random_sequence_is_stages_of_convolutions_and_perhaps_a_hidden_layer(seed):
    components = operators.random_sequence(random.Random(seed), MAX_LENGTH)
    stage = r"(conv3x3|conv5x5) (8|16|32|64) (batchnorm )?(relu|gelu) ((max|avg)pool )?"
    hidden = r"dense (32|64|128|256|512) (relu|gelu) "
    assert re.fullmatch(f"({stage}){{1,3}}({hidden})?", " ".join((*components, "")))


@given(SEQUENCES, SEQUENCES, SEEDS)
def test_a_child_is_a_head_and_a_tail_with_a_length_between_those_of_its_parents(one, two, seed):
    child = operators.crossover(one, two, random.Random(seed))
    assert min(len(one), len(two)) <= len(child) <= max(len(one), len(two))
    assert any(
        child == (*one[:head], *two[tail:])
        for head in range(len(one) + 1)
        for tail in range(len(two) + 1)
    )
    assert operators.crossover(one, one, random.Random(seed)) == one


def test_both_parents_are_cut_at_the_same_share():
    one, two = ("relu",) * 4, ("gelu",) * 8
    rng = random.Random(0)
    children = {operators.crossover(one, two, rng) for _ in range(200)}
    # 4 u of one and 8 u of the other, rounded down
    assert children == {("relu",) * (cut // 2) + ("gelu",) * (8 - cut) for cut in range(8)}


def neighbours(parent, max_length):
    """All that one move can make of a sequence, listed move by move."""
    places = range(len(parent))
    found = set()
    for place, name in itertools.product(places, CATALOGUE):  # replace, resize
        found.add((*parent[:place], name, *parent[place + 1 :]))
    for one, two in itertools.combinations(places, 2):  # swap
        between = parent[one + 1 : two]
        found.add((*parent[:one], parent[two], *between, parent[one], *parent[two + 1 :]))
    if len(parent) > 1:
        found |= {(*parent[:place], *parent[place + 1 :]) for place in places}
    if len(parent) < max_length:
        for place, name in itertools.product(range(len(parent) + 1), CATALOGUE):
            found.add((*parent[:place], name, *parent[place:]))
    for start, stop in itertools.combinations(range(len(parent) + 1), 2):  # duplicate
        if stop - start <= min(4, max_length - len(parent)):
            found.add((*parent[:stop], *parent[start:stop], *parent[stop:]))
    return found - {parent}


@pytest.mark.parametrize(
    ("parent", "max_length"),
    [
        (("conv3x3 16", "relu", "maxpool"), 6),
        (("conv3x3 16", "relu", "maxpool"), 5),
        (("conv5x5 8", "relu", "relu"), 3),
        (("relu", "gelu"), 2),
        (("dense 512",), 1),
        ((), 1),
    ],
)
def test_one_move_reaches_every_neighbour_and_nothing_else(parent, max_length, monkeypatch):
    monkeypatch.setattr(operators, "SECOND_MOVE", 0.0)
    rng = random.Random(0)
    reached = {operators.mutate(parent, rng, 0.0, max_length) for _ in range(20_000)}
    assert reached == neighbours(parent, max_length)


def test_at_most_four_components_are_duplicated_at_once():
    parent, rng = CATALOGUE[:10], random.Random(0)
    duplicate = operators.MOVES[-1]
    lengths = {len(duplicate(parent, rng, MAX_LENGTH)) for _ in range(200)}
    assert lengths == {11, 12, 13, 14}


@pytest.mark.parametrize("parent", ["conv3x3 8", "conv5x5 32", "dropout 0.25", "dense 512"])
def test_a_size_changes_to_the_next_one(parent):
    resize, rng = operators.MOVES[3], random.Random(0)
    kind = parent.split()[0]
    sizes = [name for name in CATALOGUE if name.startswith(f"{kind} ")]
    place = sizes.index(parent)
    reached = {resize((parent, "relu"), rng, 2) for _ in range(50)} - {(parent, "relu")}
    assert reached == {(name, "relu") for name in sizes[max(place - 1, 0) : place + 2]} - {
        (parent, "relu")
    }


@given(SEQUENCES.filter(len), st.floats(0, 1), SEEDS)
def test_a_mutant_is_valid(parent, progress, seed):
    mutant = operators.mutate(parent, random.Random(seed), progress, MAX_LENGTH)
    assert Architecture(mutant).components == mutant
    assert mutant  # the classifier alone is where nobody goes


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.5), (0.5, 0.375), (1.0, 0.25)])
def test_a_second_move_becomes_rarer(progress, share, monkeypatch):
    monkeypatch.setattr(operators, "MOVES", (lambda components, rng, most: (*components, "relu"),))
    rng = random.Random(0)
    lengths = [len(operators.mutate((), rng, progress, MAX_LENGTH)) for _ in range(4000)]
    assert set(lengths) == {1, 2}
    assert lengths.count(2) / 4000 == pytest.approx(share, abs=0.025)
