"""Optimizers that are no genomes, to compare with; and how any optimizer becomes one of torch.

They come from torch.optim and from pytorch_optimizer (Apache License 2.0), which is imported when
one of its optimizers is built. None of them decays weights: the decay of their papers was chosen
for other networks.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.errors import SettingsError
from evokernels.evolution.devices import forked_generators
from evokernels.genome import Genome
from evokernels.optim import FusedEvolvedOptimizer

__all__ = [
    "BASELINES",
    "METHODS",
    "Baseline",
    "Method",
    "build_optimizer",
    "hessian_passes",
    "optimizer_from_json",
    "optimizer_key",
]

MOMENTUM = 0.9
HESSIAN_EVERY = 10
KIND = "baseline"  # the field of JSON that tells a baseline from a genome


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method of `METHODS` with a learning rate and a schedule: immutable, hashable, validated.

    The fields of the schedule mean what they mean in a `Genome`.

    Args:
        name: of the method.
        lr: learning rate, positive and finite; where a method has several, that of most weights.
        use_warmup: raise the learning rate linearly over the first ``warmup_steps`` steps.
        warmup_steps: a whole number of steps, at least 0.
        use_cosine_decay: lower the learning rate along half a cosine over the whole training.

    Raises:
        SettingsError: naming the field, the value given and the values allowed.
    """

    name: str
    lr: float
    use_warmup: bool = False
    warmup_steps: int = 0
    use_cosine_decay: bool = False

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            close = difflib.get_close_matches(str(self.name), METHODS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METHODS)}"
            raise SettingsError(f"there is no baseline {self.name!r}; {hint}")
        is_number = isinstance(self.lr, numbers.Real) and not isinstance(self.lr, bool)
        whole = isinstance(self.warmup_steps, int) and not isinstance(self.warmup_steps, bool)
        for field, fits, allowed in (
            ("lr", is_number and 0 < self.lr < math.inf, "positive and finite"),
            ("use_warmup", isinstance(self.use_warmup, bool), "true or false"),
            ("warmup_steps", whole and self.warmup_steps >= 0, "a whole number of at least 0"),
            ("use_cosine_decay", isinstance(self.use_cosine_decay, bool), "true or false"),
        ):
            if not fits:
                raise SettingsError(
                    f"{field} of {self.name} must be {allowed}, got {getattr(self, field)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        fields = dataclasses.asdict(self)
        return {KIND: fields.pop("name"), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Baseline:
        """The inverse of `to_dict`; raises SettingsError for other fields."""
        fields = {"name" if field == KIND else field: value for field, value in data.items()}
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise SettingsError(
                f"a baseline has the fields {', '.join(sorted(expected))}; missing or unknown: "
                f"{', '.join(sorted(map(str, set(fields) ^ expected)))}"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a baseline is built.

    Attributes:
        lr: default learning rate.
        build: the optimizer of a model with a learning rate.
        source: of the method and of everything else that is set.
        hessian_every: steps between passes for second derivatives, from the first step on; None:
            there are no such passes. Where there are, the optimizer's ``backward(loss)`` takes the
            place of ``loss.backward()``.
    """

    lr: float
    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    source: str
    hessian_every: int | None = None


def build_optimizer(
    optimizer: Genome | Baseline, model: nn.Module, total_steps: int
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of ``model``, its schedule included.

    Args:
        optimizer: what to build.
        model: where its parameters shall be, nothing trained yet. Muon reads off it what is hidden.
        total_steps: length of the training, for the schedule.

    Raises:
        SettingsError: pytorch_optimizer is not installed, and the baseline needs it.
    """
    if isinstance(optimizer, Genome):
        return FusedEvolvedOptimizer(model.parameters(), optimizer, total_steps=total_steps)
    built = METHODS[optimizer.name].build(model, optimizer.lr)
    if optimizer.use_warmup or optimizer.use_cosine_decay:
        schedule = torch.optim.lr_scheduler.LambdaLR(
            built, lambda step: learning_rate_factor(optimizer, step, total_steps)
        )
        built.register_step_post_hook(lambda *_: schedule.step())
    return built


def hessian_passes(optimizer: Genome | Baseline, steps: int) -> int:
    """Passes through the network for second derivatives, beside one for the gradients of a step."""
    every = METHODS[optimizer.name].hessian_every if isinstance(optimizer, Baseline) else None
    return math.ceil(steps / every) if every else 0


def optimizer_key(optimizer: Genome | Baseline) -> str:
    """A text that is equal for equal optimizers: a genome's canonical key, a baseline's JSON."""
    if isinstance(optimizer, Genome):
        return canonical_key(optimizer)
    return json.dumps(optimizer.to_dict(), sort_keys=True)


def optimizer_from_json(text: str) -> Genome | Baseline:
    """The inverse of ``to_dict`` of both, as JSON.

    Raises:
        GenomeError, SettingsError: the text is neither.
    """
    try:
        data = json.loads(text)
    except ValueError:
        data = None  # the genome says what is wrong
    if isinstance(data, dict) and KIND in data:
        return Baseline.from_dict(data)
    return Genome.from_json(text)


def _sgd(model: nn.Module, lr: float, nesterov: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, nesterov=nesterov)


def _nadam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=lr)


def _adafactor(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=lr)


def _lion(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return _library().Lion(model.parameters(), lr=lr, betas=(0.9, 0.99))


# The author's rates for hidden matrices and, with AdamW, for everything else; their ratio stays.
MUON_LR, MUON_ADAMW_LR = 0.02, 3e-4


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    hidden = _hidden_matrices(model)
    taken = set(map(id, hidden))
    others = [p for p in model.parameters() if id(p) not in taken]
    # the defaults for both are the author's
    groups = (
        {"params": hidden, "lr": lr, "use_muon": True},
        {"params": others, "lr": lr * MUON_ADAMW_LR / MUON_LR, "use_muon": False},
    )
    return _library().Muon([group for group in groups if group["params"]])


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What the author of Muon has it train: weights between the first layer and the last one.

    Of convolutions too, as matrices (channels out, all the rest). Embeddings are no such weights.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [p for p in matrices[1:-1] if id(p) not in embeddings]


def _sophia(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    # betas, epsilon and limit of the update are the paper's, and the library's
    return _sophia_class()(model.parameters(), lr=lr, update_period=HESSIAN_EVERY)


@functools.cache
def _sophia_class() -> type[torch.optim.Optimizer]:
    """The library's SophiaH, with the backward pass that its estimates need.

    An estimate of the diagonal of the Hessian differentiates the gradients of the same batch once
    more, so their graph must be kept.
    """

    class Sophia(_library().SophiaH):
        def backward(self, loss: torch.Tensor) -> None:
            """In place of ``loss.backward()``: gradients for the next `step`."""
            if self._taken() % self.update_period:
                loss.backward()
                return
            parameters = self._parameters()
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

        # not around `step`: torch runs the hooks of one that calls another one twice
        def compute_hutchinson_hessian(self, **settings: Any) -> None:
            """The library's; its noise leaves dropout and all else that is random as it is."""
            parameters = self._parameters()
            # mixed, since torch's generator reads 32 bits of a seed; spawned, so that it is apart
            # from what the run draws itself
            seed = np.random.SeedSequence(torch.initial_seed(), spawn_key=(self._taken(),))
            with forked_generators(parameters[0].device):
                torch.manual_seed(int(seed.generate_state(1)[0]))
                super().compute_hutchinson_hessian(**settings)
            for parameter in parameters:
                # a gradient with its graph holds the parameter that holds it: nobody frees them
                parameter.grad = parameter.grad.detach()

        def _parameters(self) -> list[nn.Parameter]:
            return [p for group in self.param_groups for p in group["params"]]

        def _taken(self) -> int:
            return self.param_groups[0].get("step", 0)

    return Sophia


def _library() -> Any:
    """pytorch_optimizer, imported here because that takes half a second."""
    try:
        import pytorch_optimizer
    except ImportError:
        raise SettingsError(
            "lion, muon and sophia come from pytorch_optimizer, which is not installed; "
            "install evokernels with its extra: pip install evokernels[baselines]"
        ) from None
    return pytorch_optimizer


METHODS = {
    # the rate and the momentum of the source system's SGD, as torch understands them: a sum of
    # gradients, ten times larger than the average of `zoo.sgd_momentum`
    "sgd": Method(1e-2, functools.partial(_sgd, nesterov=False), "torch.optim; Polyak 1964"),
    "nesterov": Method(
        1e-2, functools.partial(_sgd, nesterov=True), "torch.optim; Sutskever et al. 2013"
    ),
    "nadam": Method(2e-3, _nadam, "torch.optim and its defaults; Dozat 2016"),
    "lion": Method(1e-4, _lion, "pytorch_optimizer; Chen et al. 2023, arXiv:2302.06675"),
    "adafactor": Method(
        1e-2, _adafactor, "torch.optim and its defaults; Shazeer & Stern 2018, arXiv:1804.04235"
    ),
    "muon": Method(MUON_LR, _muon, "pytorch_optimizer; Jordan 2024, github.com/KellerJordan/Muon"),
    "sophia": Method(
        6e-2, _sophia, "pytorch_optimizer; Liu et al. 2023, arXiv:2305.14342", HESSIAN_EVERY
    ),
}

BASELINES = {name: Baseline(name, method.lr) for name, method in METHODS.items()}
