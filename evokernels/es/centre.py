"""A model and its members: what all of them share, and how the model comes back from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from evokernels.kernels.memory import overlaps_itself
from evokernels.kernels.noise import ModelNoise, NoisyTensor

__all__ = ["Centre", "common_seed"]


def common_seed(seed: int, generation: int) -> int:
    """The seed of torch's generators while members of a generation are scored: 64 bits."""
    return int(np.random.SeedSequence((seed, generation)).generate_state(1, np.uint64)[0])


class Centre:
    """Parameters and buffers of a model as they are now, kept while members take their place.

    One copy of either, however large the population.

    Args:
        parameters: that get noise, by their position in the model.
        random_seed: of torch's generators, of the CPU and the parameters' devices, when a member
            takes its place.
        backend: of the noise.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[int, torch.Tensor],
        random_seed: int,
        backend: str,
    ) -> None:
        # a fitness may write into tensors, put others in their place and add some
        self._parameters = [(p, p.detach(), p.detach().clone()) for p in parameters.values()]
        noisy = zip(parameters, self._parameters, strict=True)
        self._noise = ModelNoise(
            [NoisyTensor(memory, i, kept) for i, (_, memory, kept) in noisy], backend
        )
        self._places = [(m._buffers, dict(m._buffers)) for m in model.modules()]
        self._buffers = [(buffer, _copy(buffer)) for buffer in model.buffers()]
        self._random_seed = random_seed
        accelerators = {p.device for p in parameters.values() if p.device.type != "cpu"}
        # torch.manual_seed looks at devices of every kind, which takes longer than a small network
        self._generators = [
            torch.default_generator,
            *(torch.get_device_module(d).default_generators[d.index] for d in accelerators),
        ]

    def place(self, seed: int, generation: int, member: int, scale: float) -> None:
        """A member in the model's place: buffers and random numbers are the same for each."""
        self._restore_places()
        self._noise.perturb(seed, generation, member, scale)
        for generator in self._generators:
            generator.manual_seed(self._random_seed)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Parameters, buffers and torch's generators are afterwards what they were."""
        states = [generator.get_state() for generator in self._generators]
        try:
            yield
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            self._restore_places()
            with torch.no_grad():
                for parameter, _, kept in self._parameters:
                    parameter.copy_(kept)

    @torch.no_grad()
    def _restore_places(self) -> None:
        """Buffers as they were; parameters where they were, whatever their values."""
        for parameter, memory, _ in self._parameters:
            parameter.data = memory
        for place, buffers in self._places:
            place.clear()
            place.update(buffers)
        for buffer, kept in self._buffers:
            if kept is not None:
                buffer.copy_(kept)


def _copy(buffer: torch.Tensor) -> torch.Tensor | None:
    """None for an expanded tensor, into which torch writes nothing."""
    expanded = buffer.layout == torch.strided and overlaps_itself(buffer)
    return None if expanded else buffer.detach().clone()
