"""Random sequences of components, crossover and mutation: what a search does to architectures.

A sequence is that of `Architecture.components`. Whatever comes out of here is a valid one; what
cannot act in it, for images of some shape, is left out when it is decoded.
"""

from __future__ import annotations

import random

from evokernels import zoo
from evokernels.architecture import SIZES, kind_and_size

__all__ = ["MOVES", "crossover", "mutate", "random_sequence", "start_sequences"]

Components = tuple[str, ...]

# Where a search begins: the networks of the source system; one without a hidden layer, one
# with batch norm, one with a residual pair; a hidden layer alone.
KNOWN: tuple[Components, ...] = (
    *(architecture.components for architecture in zoo.ARCHITECTURES.values()),
    ("conv3x3 16", "relu", "maxpool", "conv3x3 32", "relu", "maxpool"),
    ("conv3x3 32", "batchnorm", "relu", "maxpool", "conv3x3 64", "batchnorm", "relu", "maxpool"),
    ("conv3x3 16", "batchnorm", "relu", "maxpool", "residual", "relu", "maxpool"),
    ("dense 128", "relu"),
)

# Of a random sequence: stages are as many as halve 28 or 32 pixels to something worth looking at.
# Convolutions are of the widths that a short training on a processor can pay for.
STAGES = 3
START_WIDTHS = (8, 16, 32, 64)
ACTIVATIONS = ("relu", "gelu")
POOLINGS = ("maxpool", "avgpool")

SECOND_MOVE = 0.5  # the chance of it, falling to half during the search
LONGEST_RUN = 4  # that is duplicated at once: a convolution, norm, activation and pooling


def start_sequences(size: int, max_length: int, rng: random.Random) -> tuple[Components, ...]:
    """The known sequences that are short enough, then random ones; ``size`` in all."""
    known = [components for components in KNOWN if len(components) <= max_length][:size]
    return (*known, *(random_sequence(rng, max_length) for _ in range(size - len(known))))


def random_sequence(rng: random.Random, max_length: int) -> Components:
    """One to three stages, then perhaps a hidden layer; cut to ``max_length``.

    A stage is a convolution, perhaps a batch norm, an activation and perhaps a pooling.
    """
    components: list[str] = []
    for _ in range(rng.randint(1, STAGES)):
        components.append(f"{rng.choice(('conv3x3', 'conv5x5'))} {rng.choice(START_WIDTHS)}")
        if rng.random() < 0.5:
            components.append("batchnorm")
        components.append(rng.choice(ACTIVATIONS))
        if rng.random() < 0.75:
            components.append(rng.choice(POOLINGS))
    if rng.random() < 0.5:
        components += [_sized("dense", rng), rng.choice(ACTIVATIONS)]
    return tuple(components[:max_length])


def crossover(first: Components, second: Components, rng: random.Random) -> Components:
    """The head of one sequence joined to the tail of the other: one point, cut at the same share
    of both, so that what was near the images stays there.

    The child is no shorter than the shorter parent and no longer than the longer one, since
    floor(u m) - floor(u n) lies between 0 and m - n for every share u in [0, 1).
    """
    share = rng.random()
    return (*first[: int(share * len(first))], *second[int(share * len(second)) :])


def mutate(
    components: Components, rng: random.Random, progress: float, max_length: int
) -> Components:
    """One or two of `MOVES`; ``progress`` through the search makes a second one rarer."""
    components = _moved(components, rng, max_length)
    if rng.random() < SECOND_MOVE * (1.0 - 0.5 * progress):
        components = _moved(components, rng, max_length)
    return components


def _moved(components: Components, rng: random.Random, max_length: int) -> Components:
    """After a move that changes something: one that cannot, here, is drawn again."""
    while (moved := rng.choice(MOVES)(components, rng, max_length)) == components:
        pass  # ends: whatever is not empty can be replaced, and into nothing one can insert
    return moved


def _insert(components: Components, rng: random.Random, max_length: int) -> Components:
    if len(components) >= max_length:
        return components
    place = rng.randint(0, len(components))
    return (*components[:place], _any(rng), *components[place:])


def _remove(components: Components, rng: random.Random, max_length: int) -> Components:
    if len(components) < 2:
        return components
    place = rng.randrange(len(components))
    return (*components[:place], *components[place + 1 :])


def _replace(components: Components, rng: random.Random, max_length: int) -> Components:
    if not components:
        return components
    place = rng.randrange(len(components))
    return (*components[:place], _any(rng), *components[place + 1 :])


def _resize(components: Components, rng: random.Random, max_length: int) -> Components:
    """A component in the next size up or down."""
    sized = [place for place, name in enumerate(components) if SIZES[kind_and_size(name)[0]]]
    if not sized:
        return components
    place = rng.choice(sized)
    kind, size = kind_and_size(components[place])
    there = SIZES[kind].index(size) + rng.choice((-1, 1))
    if not 0 <= there < len(SIZES[kind]):
        return components
    return (*components[:place], f"{kind} {SIZES[kind][there]:g}", *components[place + 1 :])


def _swap(components: Components, rng: random.Random, max_length: int) -> Components:
    if len(components) < 2:
        return components
    one, other = rng.sample(range(len(components)), 2)
    swapped = list(components)
    swapped[one], swapped[other] = components[other], components[one]
    return tuple(swapped)


def _duplicate(components: Components, rng: random.Random, max_length: int) -> Components:
    """A run of components once more, right behind itself."""
    longest = min(LONGEST_RUN, len(components), max_length - len(components))
    if longest < 1:
        return components
    length = rng.randint(1, longest)
    start = rng.randint(0, len(components) - length)
    return (*components[: start + length], *components[start:])


MOVES = (_insert, _remove, _replace, _resize, _swap, _duplicate)


def _any(rng: random.Random) -> str:
    """Each kind with the same chance, however many sizes it comes in."""
    return _sized(rng.choice(list(SIZES)), rng)


def _sized(kind: str, rng: random.Random) -> str:
    return f"{kind} {rng.choice(SIZES[kind]):g}" if SIZES[kind] else kind
