"""How a step is cut: into launches, a launch into chunks, the chunks over blocks; pure arithmetic.

Resident blocks walk the chunks in turns: neighbours in memory are read at the same time, and what a
block computes once a step (the schedule) is computed as often as there are blocks, not chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evokernels.compiler.words import CHUNK, GROUP, HEADER

__all__ = ["Launch", "block_count", "chunk_length", "cut", "split"]

# Elements: a vector of four for each of 256 threads, and a multiple of the eight elements that
# share a random number. Every chunk begins at a multiple of it.
SHORTEST_CHUNK = 1024
# Past this a chunk's own cost (two reads from the cache) no longer shows.
LONGEST_CHUNK = 8 * SHORTEST_CHUNK
# For each resident block: with fewer, those that are done early wait long for the others.
CHUNKS_A_BLOCK = 16


@dataclass(frozen=True)
class Launch:
    """Consecutive tensors of a plan that are updated together.

    Attributes:
        first, end: which tensors.
        groups: those of the plan's groups that they are in.
        group_of_tensor: for each tensor the place of its group in `groups`.
    """

    first: int
    end: int
    groups: tuple[int, ...]
    group_of_tensor: tuple[int, ...]

    @property
    def words(self) -> int:
        """Words of its block: see `compiler.words`."""
        return len(HEADER) + len(self.groups) * len(GROUP) + self.end - self.first


def split(groups: Sequence[int], most_words: int) -> list[Launch]:
    """As few launches as can take the addresses of all gradients and the groups they need.

    Args:
        groups: for each tensor its group.
        most_words: that one launch can take.
    """
    launches, first, places = [], 0, {}
    chosen: list[int] = []
    for i, group in enumerate(groups):
        words = len(HEADER) + (len(places) + (group not in places)) * len(GROUP) + i + 1 - first
        if words > most_words:
            launches.append(Launch(first, i, tuple(places), tuple(chosen)))
            first, places, chosen = i, {}, []
        chosen.append(places.setdefault(group, len(places)))
    return [*launches, Launch(first, len(groups), tuple(places), tuple(chosen))]


def chunk_length(elements: int, resident: int) -> int:
    """How many elements a chunk has at most.

    Args:
        elements: of all tensors of a launch.
        resident: blocks that the device can hold at a time.
    """
    fair = elements // (resident * CHUNKS_A_BLOCK) // SHORTEST_CHUNK * SHORTEST_CHUNK
    return min(max(fair, SHORTEST_CHUNK), LONGEST_CHUNK)


def cut(elements: Sequence[int], groups: Sequence[int], length: int) -> np.ndarray:
    """The chunks of the tensors of a launch: int64 of shape (chunks, `CHUNK` fields).

    Group by group, because a block computes the numbers of a group anew whenever it meets another
    one; within a group the long ones first, so that blocks that take them in turns differ by no
    more than one chunk. In the order of the tensors, every second block would get the weights of a
    model and the others its biases.

    Args:
        elements: of each tensor.
        groups: of each tensor.
        length: of a chunk, at most; a multiple of `SHORTEST_CHUNK`.
    """
    sizes = np.asarray(elements, np.int64)
    chunks = -(-sizes // length)
    tensor = np.repeat(np.arange(len(sizes)), chunks)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * length
    end = np.minimum(first + length, sizes[tensor])
    table = np.stack([tensor, first, end], axis=1)
    assert table.shape[1] == len(CHUNK)
    order = np.lexsort((first - end, np.asarray(groups, np.int64)[tensor]))  # stable
    return table[order].astype(np.int64)


def block_count(chunks: int, resident: int) -> int:
    """How many blocks walk the chunks: as many as the device holds, none without work.

    One at least: what is launched counts steps and starts sums even where no tensor has elements.
    """
    return max(1, min(chunks, resident))
