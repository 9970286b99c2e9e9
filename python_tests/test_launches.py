"""How a step is cut into launches, chunks and blocks: no GPU needed to know."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evokernels.compiler.words import GROUP, HEADER
from evokernels.kernels.launches import SHORTEST_CHUNK, block_count, chunk_length, cut, split
from evokernels.tasks.models import CifarCNN, SmallCNN

# A Tesla T4 has 40 multiprocessors of 1,024 threads, four blocks of 256; an H100 132 of 2,048.
T4, H100 = 40 * 4, 132 * 8
# What a launch can take where the driver knows large parameters, and where it does not.
LARGE, CLASSIC = 4095, 512
ONE_TENSOR = len(HEADER) + len(GROUP) + 1  # words of a launch of no more than that


def planned(elements, resident=T4, groups=None, most_words=LARGE):
    """Of each launch its chunks and its number of blocks."""
    groups = [0] * len(elements) if groups is None else groups
    plan = []
    for launch in split(groups, most_words):
        own = elements[launch.first : launch.end]
        chunks = cut(own, launch.group_of_tensor, chunk_length(sum(own), resident))
        plan.append((chunks, block_count(len(chunks), resident)))
    return plan


def loads(chunks, blocks):
    """Elements of each block, which takes every `blocks`th chunk."""
    lengths = chunks[:, 2] - chunks[:, 1]
    return np.array([lengths[block::blocks].sum() for block in range(blocks)])


def sizes_of(model):
    return [parameter.numel() for parameter in model().parameters()]


# elements → launches, chunks, blocks on a T4
EXPECTED = {
    "SmallCNN": (sizes_of(SmallCNN), 1, 810, 160),
    "CifarCNN": (sizes_of(CifarCNN), 1, 2127, 160),
    "1,000 tensors of 64": ([64] * 1000, 1, 1000, 160),
    "10,000 tensors of 64": ([64] * 10_000, 3, 10_000, 480),
    "one tensor of 64M": ([64_000_000], 1, 7813, 160),
    "one tensor of 2^33": ([2**33], 1, 2**20, 160),
    "100,000 elements": ([100_000], 1, 98, 98),
    "one element": ([1], 1, 1, 1),
    "nothing": ([0, 0], 1, 0, 1),
    "no tensor": ([], 1, 0, 1),
}


@pytest.mark.parametrize(
    ("elements", "launches", "chunks", "blocks"), EXPECTED.values(), ids=EXPECTED
)
def test_known_models(elements, launches, chunks, blocks):
    plan = planned(elements)
    assert len(plan) == launches
    assert sum(len(table) for table, _ in plan) == chunks
    assert sum(count for _, count in plan) == blocks


def test_the_sizes_of_the_networks():
    assert (sum(sizes_of(SmallCNN)), sum(sizes_of(CifarCNN))) == (824_458, 2_168_554)


@pytest.mark.parametrize(("resident", "multiprocessors"), [(T4, 40), (H100, 132)])
def test_a_small_model_keeps_every_multiprocessor_busy(resident, multiprocessors):
    """Blocks go to the multiprocessors in turns as long as none is full."""
    ((_, blocks),) = planned([100_000 if resident == T4 else 300_000], resident)
    assert blocks >= 2 * multiprocessors


@pytest.mark.parametrize("resident", [T4, H100])
@pytest.mark.parametrize(
    "elements",
    [
        [64_000_000],
        [16_000_000] * 4,
        [64_000] * 1000,
        [1_000_003] * 64,
        [8 * 1024 * 7, 1000] * 1100,  # every second chunk but seven is short
        [1024 * 64, 16] * 2000,
    ],
)
def test_no_block_of_a_large_model_has_much_more_than_its_share(elements, resident):
    for chunks, blocks in planned(elements, resident):
        of_block = loads(chunks, blocks)
        assert of_block.max() <= 1.05 * of_block.mean()


def test_weights_and_biases_in_turns_are_shared_out_evenly():
    """In the order of the tensors, odd blocks would get nothing but biases."""
    ((chunks, blocks),) = planned([1024, 16] * 1600)
    of_block = loads(chunks, blocks)
    assert blocks == 160
    assert of_block.max() == of_block.min() == 10 * (1024 + 16)


def test_a_block_meets_each_group_once():
    """What it computes for a group, it computes once, however groups and tensors alternate."""
    ((chunks, blocks),) = planned([5000, 16] * 400, groups=[0, 1] * 400)
    for block in range(blocks):
        groups = chunks[block::blocks, 0] % 2
        assert np.count_nonzero(np.diff(groups)) <= 1


@given(
    elements=st.lists(st.integers(0, 20_000), max_size=40),
    length=st.integers(1, 8).map(lambda n: n * SHORTEST_CHUNK),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_chunks_cover_each_element_once(elements, length, data):
    groups = data.draw(
        st.lists(st.integers(0, 3), min_size=len(elements), max_size=len(elements)), "groups"
    )
    chunks = cut(elements, groups, length)
    covered = [np.zeros(n, np.int64) for n in elements]
    for tensor, first, end in chunks:
        assert 0 < end - first <= length
        assert first % SHORTEST_CHUNK == 0
        assert end <= elements[tensor]
        covered[tensor][first:end] += 1
    assert all((counts == 1).all() for counts in covered)

    # evenly shared out: the bound that the order of the chunks gives
    of_group = np.array(groups, np.int64)[chunks[:, 0]]
    order = list(zip(of_group, chunks[:, 1] - chunks[:, 2], strict=True))
    assert order == sorted(order)  # by group, long ones first
    blocks = data.draw(st.integers(1, 20), "blocks")
    assert np.ptp(loads(chunks, blocks)) <= length * max(1, len(set(of_group)))


@given(elements=st.integers(0, 2**40), resident=st.integers(1, 4096))
def test_the_length_of_chunks(elements, resident):
    length = chunk_length(elements, resident)
    assert length in range(SHORTEST_CHUNK, 8 * SHORTEST_CHUNK + 1, SHORTEST_CHUNK)
    # blocks that have something to do have it in sixteen pieces at least, until pieces are short
    assert length == SHORTEST_CHUNK or elements >= 16 * resident * length


@given(groups=st.lists(st.integers(0, 12), max_size=300), most=st.integers(ONE_TENSOR, 300))
@settings(max_examples=200, deadline=None)
def test_launches_are_full_and_take_every_tensor_once(groups, most):
    launches = split(groups, most)
    assert [i for launch in launches for i in range(launch.first, launch.end)] == list(
        range(len(groups))
    )
    for number, launch in enumerate(launches):
        own = groups[launch.first : launch.end]
        assert [launch.groups[place] for place in launch.group_of_tensor] == own
        assert Counter(launch.groups) == dict.fromkeys(own, 1)
        assert launch.words == len(HEADER) + len(set(own)) * len(GROUP) + len(own)
        assert launch.words <= most
        if number + 1 < len(launches):  # the next tensor did not fit
            longer = groups[launch.first : launch.end + 1]
            assert len(HEADER) + len(set(longer)) * len(GROUP) + len(longer) > most


@pytest.mark.parametrize(
    ("tensors", "groups", "most_words", "launches"),
    [
        (10_000, 1, 4000, 3),
        (4_000, 1, LARGE, 1),
        (480, 1, CLASSIC, 1),
        (1000, 1, CLASSIC, 3),
        (1000, 1000, LARGE, 5),  # one group a tensor
        (1000, 1000, CLASSIC, 35),
        (1000, 2, LARGE, 1),
    ],
)
def test_launches_of_many_tensors(tensors, groups, most_words, launches):
    assert len(split([i % groups for i in range(tensors)], most_words)) == launches
