"""Losses of a whole population of perceptrons, without a network for each of its members.

A member's numbers are made of its noise where they are used, and a block of samples goes through
all layers while it is in the caches (csrc/perceptron.h); nothing is kept but a sum.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from evokernels.errors import BackendError, StrategyError
from evokernels.es.strategy import EvolutionStrategy
from evokernels.kernels import native
from evokernels.optim.checks import check_parameter
from evokernels.optim.sharding import lacks_memory

__all__ = ["LOSSES", "PopulationForward"]

BLOCK = 128  # EVK_SAMPLES

ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.Tanh: 2, nn.Sigmoid: 3}

LOSSES = {"squares": 0, "cross_entropy": 1, "mistakes": 2}  # EVK_SQUARES and so on


class _Dense(ctypes.Structure):
    """evk_dense."""

    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("weight", native.NoisyRecord),
        ("bias", native.NoisyRecord),
        ("activation", ctypes.c_int32),
    )


class _Population(ctypes.Structure):
    """evk_population."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("generation", ctypes.c_uint32),
        ("noises", ctypes.POINTER(ctypes.c_uint32)),
        ("scales", ctypes.POINTER(ctypes.c_double)),
        ("members", ctypes.c_int64),
    )

    @classmethod
    def of(cls, strategy: EvolutionStrategy | None) -> _Population:
        """A strategy's; without one, a single member that has nothing added."""
        members = [(0, 0.0)] if strategy is None else strategy.noises()
        place = (0, 0) if strategy is None else (strategy.seed, strategy.generation)
        noises, scales = zip(*members, strict=True)
        count = len(members)
        return cls(
            *place, (ctypes.c_uint32 * count)(*noises), (ctypes.c_double * count)(*scales), count
        )


class _Samples(ctypes.Structure):
    """evk_samples."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("samples", ctypes.c_int64),
        ("loss", ctypes.c_int32),
    )


class PopulationForward:
    """The losses of a strategy's members, where the model is a perceptron. Made by `of`. ::

        forward = PopulationForward.of(model)
        for _ in range(generations):
            strategy.tell(-forward.losses(x, y, "cross_entropy", strategy))

    Parameters are read whenever it is called.
    """

    def __init__(self, layers: Sequence[tuple[nn.Linear, int]]) -> None:
        self._layers = layers

    @classmethod
    def of(cls, module: nn.Module) -> PopulationForward:
        """Those of a module as it is built now.

        Args:
            module: an ``nn.Sequential`` of ``Linear`` layers, each followed by one of ``ReLU``,
                ``Tanh``, ``Sigmoid``, ``Identity`` or by none; a ``Flatten`` may come first.

        Raises:
            BackendError: it is something else, and the message says which part of it; or the
                native library cannot be loaded.
        """
        native.library()
        if type(module) is not nn.Sequential:
            raise _refusal(module, "only an nn.Sequential says in which order its layers run")
        layers: list[tuple[nn.Linear, int]] = []
        bare = False  # whether the last layer has no activation yet
        for part in (module, *module):
            if part._forward_hooks or part._forward_pre_hooks:
                raise _refusal(part, "its hooks would not be called")
        for place, part in enumerate(module):
            if type(part) is nn.Linear and part.out_features:
                layers.append((part, ACTIVATIONS[nn.Identity]))
            elif type(part) in ACTIVATIONS and bare:
                layers[-1] = layers[-1][0], ACTIVATIONS[type(part)]
            elif place or not _flattens_samples(part):
                known = ", ".join(kind.__name__ for kind in ACTIVATIONS)
                raise _refusal(part, f"a layer is Linear with outputs, then at most one of {known}")
            bare = type(part) is nn.Linear
        if not layers:
            raise _refusal(module, "it has no Linear layer")
        for (before, _), (after, _) in itertools.pairwise(layers):
            if before.out_features != after.in_features:
                raise _refusal(after, f"it takes other inputs than {before} gives")
        return cls(layers)

    @torch.no_grad()
    def losses(
        self, x: torch.Tensor, y: torch.Tensor, loss: str, strategy: EvolutionStrategy | None = None
    ) -> torch.Tensor:
        """What each member of this generation loses on the samples: (population,), float64.

        Sums over samples and outputs, taken in float64 of float32 outputs, in an order that does
        not depend on the number of threads. Each thread has memory for the numbers of one member.

        Args:
            x: inputs, float32 (samples, …) on the CPU; all behind the first dimension is one.
            y: for "squares" float32 (samples, outputs), else classes, int64 (samples,).
            loss: "squares", of differences; "cross_entropy", in nats, of outputs that are logits;
                "mistakes", how many samples have a class that is not the first of the largest
                outputs, or have a NaN among their outputs.
            strategy: of the module, or of one that it is part of; None: the loss of the module
                as it is, (1,).

        Raises:
            StrategyError: unknown loss; samples or parameters of another kind; a parameter that
                the strategy does not train; the model is a member now.
            OptimizerError: a parameter that no kernel can read.
        """
        if loss not in LOSSES:
            raise StrategyError(f"unknown loss {loss!r}; use one of {', '.join(LOSSES)}")
        layers = self._records(strategy)
        for name, given in {"x": x, "y": y}.items():
            if not isinstance(given, torch.Tensor) or not given.ndim:
                kind = type(given).__name__
                raise StrategyError(f"{name} must be a tensor, a row for each sample, got a {kind}")
        x = x.flatten(1) if x.ndim > 1 else x
        _check("x", x, torch.float32, (len(x), layers[0].inputs))
        blocks = _blocks(x), _targets(y, len(x), layers[-1].outputs, loss)
        addresses = (block.data_ptr() for block in blocks)
        samples = _Samples(*addresses, len(x), LOSSES[loss])
        return _losses(layers, _Population.of(strategy), samples)

    def _records(self, strategy: EvolutionStrategy | None) -> ctypes.Array[_Dense]:
        positions = None
        if strategy is not None:
            every = enumerate(strategy.model.parameters())
            positions = {p: i for i, p in every if p.requires_grad}
        records = (_Dense * len(self._layers))()
        for record, (linear, activation) in zip(records, self._layers, strict=True):
            record.inputs, record.outputs = linear.in_features, linear.out_features
            record.weight = _center(linear.weight, (record.outputs, record.inputs), positions)
            if linear.bias is not None:
                record.bias = _center(linear.bias, (record.outputs,), positions)
            record.activation = activation
        return records


def _losses(
    layers: ctypes.Array[_Dense], population: _Population, samples: _Samples
) -> torch.Tensor:
    library, threads = native.library(), torch.get_num_threads()
    given = layers, len(layers), ctypes.byref(population), ctypes.byref(samples)
    room = _memory(torch.float32, threads, library.evk_perceptron_room(*given[:2]))
    sums = _memory(torch.float64, library.evk_perceptron_sums(*given[2:]))
    losses = _memory(torch.float64, population.members)
    addresses = (tensor.data_ptr() for tensor in (losses, room, sums))
    library.evk_population_losses(*given, *addresses, threads)
    return losses


def _memory(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Whatever torch's defaults are now."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _flattens_samples(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _refusal(module: nn.Module, reason: str) -> BackendError:
    return BackendError(
        f"no population forward for {module}: {reason}; score members with EvolutionStrategy.ask"
    )


def _center(
    parameter: torch.Tensor, shape: Sequence[int], positions: Mapping[torch.Tensor, int] | None
) -> native.NoisyRecord:
    """What a member's tensor is made of; without positions, nothing will be added to it."""
    check_parameter(parameter)
    _check("a parameter", parameter, torch.float32, shape)
    if not parameter.is_contiguous():
        raise StrategyError(
            f"a parameter of shape {tuple(shape)} has strides {parameter.stride()}; make it "
            "contiguous, or score members with EvolutionStrategy.ask"
        )
    if positions is not None and parameter not in positions:
        raise StrategyError(
            f"the strategy does not train a parameter of shape {tuple(shape)}; let it require "
            "gradients in the strategy's model, or score members with EvolutionStrategy.ask"
        )
    return native.NoisyRecord(
        centre=parameter.data_ptr(),
        elements=parameter.numel(),
        format=native.FORMATS[parameter.dtype],
        position=0 if positions is None else positions[parameter],
    )


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    given = tensor.dtype, tensor.device.type, tuple(tensor.shape)
    if given != (dtype, "cpu", tuple(shape)):
        raise StrategyError(
            f"{name} must be {dtype} of shape {tuple(shape)} on the CPU, got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)} on {tensor.device}"
        )
    if lacks_memory(tensor):
        raise StrategyError(f"{name} is a {type(tensor).__name__} without memory of its own")


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """A row a sample as (blocks, columns, BLOCK), zeros behind the last sample."""
    rows = rows.resolve_neg().contiguous()
    blocks = _memory(torch.float32, -(-len(rows) // BLOCK), rows.shape[1], BLOCK)
    native.library().evk_arrange(rows.data_ptr(), *rows.shape, blocks.data_ptr())
    return blocks


def _targets(y: torch.Tensor, samples: int, outputs: int, loss: str) -> torch.Tensor:
    if loss == "squares":
        _check("y", y, torch.float32, (samples, outputs))
        return _blocks(y)
    _check("y", y, torch.int64, (samples,))
    if samples and not 0 <= y.min() <= y.max() < outputs:
        raise StrategyError(
            f"classes must be from 0 to {outputs - 1}, as there are {outputs} outputs; got some "
            f"from {int(y.min())} to {int(y.max())}"
        )
    return functional.pad(y.to(torch.int32), (0, -samples % BLOCK))
