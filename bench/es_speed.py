"""How long one generation of an evolution strategy takes: the source's program, torch.bmm, ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import source_es
import torch
from commandline import markdown
from es_examples import curve_network, image_network
from torch import nn
from torch.nn import functional

from evokernels.es import EvolutionStrategy, PopulationForward
from evokernels.evolution.machine import processor

__all__ = [
    "BATCHED",
    "OURS",
    "SOURCE",
    "SOURCE_ALONE",
    "batched_losses",
    "contestants",
    "our_iteration",
    "speed_table",
]

SOURCE, BATCHED, OURS = "source, numba", "torch.bmm", "evokernels"
SOURCE_ALONE = f"{SOURCE}, products on one thread"

Iteration = Callable[[], float]  # a generation and the model's new loss, which it returns
IMAGES = 1_000
WARM = 2  # passes that are not timed
TURN = 0.2  # seconds: as in a training, each iteration finds what the one before left warm


def contestants() -> dict[str, dict[str, Iteration]]:
    """By case and name. Each draws noise, scores 100 members, takes a plain step, scores itself."""
    s = np.random.default_rng(0).standard_normal((1, source_es.SAMPLES))
    source = source_es.SourceProgram(s)
    alone = source_iteration(source)

    def on_one_thread() -> float:
        with source.on_one_thread():
            return alone()

    inputs = torch.from_numpy(s.T).float()
    curve = inputs, source_es.curve(inputs), "squares"
    images = torch.rand(IMAGES, 784), torch.randint(10, (IMAGES,)), "cross_entropy"
    return {
        f"1-10-10-1, {source_es.SAMPLES:,} samples": {
            SOURCE: source_iteration(source),
            SOURCE_ALONE: on_one_thread,
            BATCHED: batched_iteration(curve_network(), *curve),
            OURS: our_iteration(curve_network(), *curve),
        },
        f"784-32-10, {IMAGES:,} images": {
            BATCHED: batched_iteration(image_network(), *images),
            OURS: our_iteration(image_network(), *images),
        },
    }


def source_iteration(program: source_es.SourceProgram) -> Iteration:
    """The source's."""
    w = np.random.default_rng(1).standard_normal(source_es.NUMBERS)

    def iterate() -> float:
        nonlocal w
        w, nmse = program.iterate(w, program.draw(source_es.POPULATION))
        return nmse

    return iterate


def our_iteration(network: nn.Sequential, x: torch.Tensor, y: torch.Tensor, loss: str) -> Iteration:
    """Through `EvolutionStrategy` and `PopulationForward`."""
    optimizer = torch.optim.SGD(network.parameters(), lr=source_es.STEP)
    strategy = EvolutionStrategy(
        network, optimizer, population=source_es.POPULATION, sigma=source_es.SIGMA
    )
    forward = PopulationForward.of(network)

    def iterate() -> float:
        strategy.tell(1 / forward.losses(x, y, loss, strategy))
        return forward.losses(x, y, loss).item()

    return iterate


def batched_losses(
    network: nn.Sequential, members: torch.Tensor, x: torch.Tensor, y: torch.Tensor, loss: str
) -> torch.Tensor:
    """As one would write it with torch: (members,) of parameters (members, numbers).

    All members go through a layer together, features before samples.
    """
    parts = iter(members.split([p.numel() for p in network.parameters()], 1))
    h = x.T.expand(len(members), -1, -1)
    for layer in network:
        if isinstance(layer, nn.Linear):
            weight = next(parts).view(-1, *layer.weight.shape)
            bias = torch.zeros(()) if layer.bias is None else next(parts)[:, :, None]
            h = torch.baddbmm(bias, weight, h)
        elif isinstance(layer, nn.ReLU):
            h = h.relu_()
    if loss == "squares":
        return (h - y.T).square().sum((1, 2))
    return functional.cross_entropy(h, y.expand(len(h), -1), reduction="none").sum(1)


def batched_iteration(
    network: nn.Sequential, x: torch.Tensor, y: torch.Tensor, loss: str
) -> Iteration:
    """With the noise of the population as a matrix."""
    w = nn.utils.parameters_to_vector(network.parameters()).detach()

    @torch.no_grad()
    def iterate() -> float:
        nonlocal w
        noise = torch.randn(source_es.POPULATION, len(w))
        fitness = 1 / batched_losses(network, w + source_es.SIGMA * noise, x, y, loss)
        utility = (fitness - fitness.mean()) / fitness.std(correction=0)
        w = w + source_es.STEP / (len(noise) * source_es.SIGMA) * (utility @ noise)
        return batched_losses(network, w[None], x, y, loss).item()

    return iterate


def take_turns(iterations: Mapping[str, Iteration], passes: int) -> dict[str, list[float]]:
    """Seconds of an iteration in each turn.

    Every pass has a turn of each, so that they meet the same machine: as many iterations as begin
    within `TURN`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in iterations}
    for number in range(WARM + passes):
        for name, iterate in iterations.items():
            start, elapsed, count = time.perf_counter(), 0.0, 0
            while elapsed < TURN:
                iterate()
                elapsed, count = time.perf_counter() - start, count + 1
            if number >= WARM:
                seconds[name].append(elapsed / count)
    return seconds


def speed_table(passes: int) -> Iterator[str]:
    """Measure, and say it in Markdown."""
    yield (
        f"One generation of {source_es.POPULATION} members on {processor()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {passes} turns of each, "
        f"medians. A turn is as many iterations as begin within {TURN} s, and their mean. "
        "The source computes in float64, the others in float32."
    )
    for case, iterations in contestants().items():
        yield ""
        yield from markdown(
            [case, "ms", "from–to", "times ours"], rows(take_turns(iterations, passes))
        )


def rows(seconds: Mapping[str, list[float]]) -> Iterator[list[str]]:
    """Each contestant's times; ratios are taken pass by pass."""
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[OURS], strict=True)]
        yield [
            name,
            f"{statistics.median(times) * 1e3:.2f}",
            f"{min(times) * 1e3:.2f}–{max(times) * 1e3:.2f}",
            f"{statistics.median(ratios):.1f}",
        ]
