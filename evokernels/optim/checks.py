"""What the optimizer turns down, before anything is touched: options, parameters, moments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch

from evokernels.compiler.lower import lower
from evokernels.errors import OptimizerError
from evokernels.genome import Genome
from evokernels.kernels.device import capturing
from evokernels.kernels.memory import find_overlap, overlaps_itself
from evokernels.kernels.plan import ARITHMETIC
from evokernels.optim.sharding import is_dtensor, lacks_memory, local, placement

__all__ = [
    "beta_pair",
    "check_apart",
    "check_counts",
    "check_definitions",
    "check_flag",
    "check_genome",
    "check_group",
    "check_moment",
    "check_moment_memory",
    "check_not_captured",
    "check_numbers",
    "check_parameter",
    "nonnegative",
]


def check_genome(genome: Any) -> None:
    """Raises OptimizerError for anything that is no genome."""
    if not isinstance(genome, Genome):
        raise OptimizerError(
            f"genome must be an evokernels.Genome, got {type(genome).__name__}; "
            "take one from evokernels.zoo or Genome.load(path)"
        )


def check_group(group: dict[str, Any]) -> None:
    """Raises OptimizerError for options that no rule can work with."""
    genome, total_steps = group["genome"], group["total_steps"]
    check_genome(genome)
    for name in ("lr", "eps", "weight_decay"):
        nonnegative(name, group[name])
    beta_pair(group["betas"])
    if genome.reads_beta3:
        nonnegative("beta3", group["beta3"], 1.0)
    if group.get("amsgrad"):  # of torch's Adam
        raise OptimizerError("amsgrad=True asks for a rule that no genome has; set it to False")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
        raise OptimizerError(
            "this is a state of torch.optim.Adam with weight_decay, which adds to the gradient; "
            "genomes decay apart from it, as AdamW does: set weight_decay to 0 or use AdamW's state"
        )
    if genome.use_cosine_decay and total_steps is None:
        raise OptimizerError(
            "this genome decays its learning rate by cosine over the whole training; "
            "say how long that is: FusedEvolvedOptimizer(params, genome, total_steps=...)"
        )
    if total_steps is None and lower(genome).reads_progress:
        raise OptimizerError(
            "a term of this genome reads how far the training is; say how long that is: "
            "FusedEvolvedOptimizer(params, genome, total_steps=...)"
        )
    if total_steps is not None and not (_is_whole(total_steps) and total_steps > 0):
        raise OptimizerError(f"total_steps must be a positive whole number, got {total_steps!r}")
    for name in ("maximize", "stochastic_rounding"):
        check_flag(name, group[name])
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise OptimizerError(
            "state_dtype must be None, torch.float32 or torch.bfloat16, "
            f"got {group['state_dtype']!r}; None keeps the dtype of the arithmetic"
        )
    if not _is_whole(group["seed"]) or not 0 <= group["seed"] < 2**64:
        raise OptimizerError(f"seed must be a whole number in [0, 2^64), got {group['seed']!r}")


def check_counts(steps: Iterable[float]) -> None:
    """Raises OptimizerError for numbers of steps that nobody can have taken."""
    for step in steps:
        if not 0 <= step < math.inf:
            raise OptimizerError(f"step in the state must be a whole number from 0 on, got {step}")


def check_definitions(genome: Genome, definitions: list[str] | None) -> None:
    """Raises OptimizerError if terms of a genome had other formulas when its state was saved.

    Args:
        definitions: those of the state; None where it has none.
    """
    if definitions is not None and definitions != genome.definitions:
        raise OptimizerError(
            f"the state was saved with {'; '.join(definitions)}, but here it is "
            f"{'; '.join(genome.definitions)}; register the terms that it was saved with"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises OptimizerError for anything but True and False."""
    if not isinstance(value, bool):
        raise OptimizerError(f"{name} must be True or False, got {value!r}")


def nonnegative(name: str, value: Any, below: float = math.inf) -> float:
    """The value as a float in [0, `below`); raises OptimizerError naming the option."""
    if type(value) is float and 0.0 <= value < below:  # every step asks
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # no number, or a tensor of several
        number = math.nan
    if not 0.0 <= number < below:
        raise OptimizerError(f"{name} must lie in [0, {below:g}), got {value!r}")
    return number


def beta_pair(betas: Any) -> tuple[float, float]:
    """Both as floats in [0, 1); raises OptimizerError."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise OptimizerError(f"betas must be two numbers in [0, 1), got {betas!r}")
    beta1, beta2 = betas
    return nonnegative("betas", beta1, 1.0), nonnegative("betas", beta2, 1.0)


def check_not_captured(tensors: Iterable[torch.Tensor]) -> None:
    """Raises OptimizerError while a step on their devices goes into a CUDA graph."""
    for device in {tensor.device for tensor in tensors}:
        if capturing(device):
            raise OptimizerError(
                f"this step on {device} cannot be captured, since it needs the host: state and "
                "tables are made in the first step, so take one before the capture; and backends "
                "other than 'cuda' and 'triton' count steps on the host"
            )


def check_numbers(group: dict[str, Any]) -> None:
    """Raises OptimizerError for tensors in a captured step whose values are read on the host."""
    for name in ("betas", "beta3", "eps", "weight_decay"):
        value = group.get(name)
        if any(map(torch.is_tensor, value if isinstance(value, (tuple, list)) else (value,))):
            raise OptimizerError(
                f"{name} of a captured step must be numbers, which it keeps for ever: a tensor is "
                "read when it is captured, never in replays"
            )


def check_parameter(parameter: torch.Tensor) -> None:
    """Raises OptimizerError for a parameter, or its gradient, that no kernel can update."""
    what = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype not in ARITHMETIC:
        allowed = ", ".join(str(dtype) for dtype in ARITHMETIC)
        raise OptimizerError(f"{what} is {parameter.dtype}; parameters may be {allowed}")
    if parameter.layout != torch.strided:
        raise OptimizerError(f"{what} is {parameter.layout}; parameters must be dense tensors")
    if parameter.is_meta:
        raise OptimizerError(f"{what} is on the meta device; materialise the model first")
    if parameter.is_neg():  # its memory holds the negated values
        raise OptimizerError(f"{what} is a negated view; call .resolve_neg() before")
    if is_dtensor(parameter) and any(part.is_partial() for part in parameter.placements):
        raise OptimizerError(
            f"{what} is placed {parameter.placements}; parameters must be sharded or replicated: "
            "call redistribute before making it a parameter"
        )
    if lacks_memory(local(parameter)):
        raise OptimizerError(
            f"{what} is a {type(parameter).__name__}, which has no memory of its own that a kernel "
            "could write; parameters must be torch.nn.Parameter or DTensor, their storage allocated"
        )
    if overlaps_itself(local(parameter)):
        raise OptimizerError(
            f"{what} and strides {parameter.stride()} has elements that share memory; "
            "call .contiguous() before making it a parameter"
        )
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise OptimizerError(
            f"the gradient of {what} is {gradient.layout}; gradients must be dense: "
            "build the embedding with sparse=False"
        )
    if (gradient.shape, gradient.dtype) != (parameter.shape, parameter.dtype):
        raise OptimizerError(
            f"{what} is {parameter.dtype}, its gradient {tuple(gradient.shape)} and "
            f"{gradient.dtype}; both must be the same: call zero_grad() after giving a parameter "
            "new data"
        )
    if lacks_memory(gradient) and not is_dtensor(parameter):
        raise OptimizerError(
            f"the gradient of {what} is a {type(gradient).__name__}, the parameter a plain tensor; "
            "both must be the same: give it the local part of the gradient"
        )


def check_apart(parameters: list[torch.Tensor]) -> None:
    """Raises OptimizerError if two parameters share memory."""
    unique = dict.fromkeys(parameters)  # of duplicates torch warns
    for device in {parameter.device for parameter in unique}:
        shared = find_overlap(local(p) for p in unique if p.device == device)
        if shared:
            shapes = " and ".join(str(tuple(parameter.shape)) for parameter in shared)
            raise OptimizerError(
                f"two parameters of shapes {shapes} share memory, so each would be updated twice; "
                "tie weights by using one Parameter in both places"
            )


def check_moment(name: str, moment: Any, parameter: torch.Tensor) -> None:
    """Raises OptimizerError for a moment that is not shaped and sharded as its parameter."""
    shape = tuple(moment.shape) if isinstance(moment, torch.Tensor) else type(moment).__name__
    if shape != tuple(parameter.shape):
        raise OptimizerError(
            f"{name} of a parameter of shape {tuple(parameter.shape)} is {shape}; "
            "the state belongs to another model"
        )
    if placement(moment) != placement(parameter):
        raise OptimizerError(
            f"{name} of a parameter of shape {shape} is placed {_words(moment)}, the parameter "
            f"{_words(parameter)}; load the state with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards it"
        )


def check_moment_memory(name: str, moment: torch.Tensor) -> None:
    """Raises OptimizerError for a moment whose elements a kernel cannot write one by one."""
    part = local(moment)
    if part.layout != torch.strided or part.is_neg() or lacks_memory(part) or overlaps_itself(part):
        raise OptimizerError(
            f"{name} of shape {tuple(moment.shape)} must be a dense tensor with memory for each "
            "element: neither sparse, expanded, a negated view nor with its storage freed"
        )


def _words(tensor: torch.Tensor) -> str:
    return f"{tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "as a whole"


def _is_whole(value: Any) -> bool:
    """Whether a value is an integer, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
