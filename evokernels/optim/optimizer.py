"""`FusedEvolvedOptimizer`: PyTorch's optimizer protocol around a genome; no arithmetic here."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from evokernels.compiler.lower import MOMENT_NAMES, Rule, lower
from evokernels.genome import Genome
from evokernels.kernels.device import Scaling
from evokernels.kernels.plan import ARITHMETIC, Backend, BoundTensor, Rounding
from evokernels.kernels.registry import select
from evokernels.optim.binding import Binding
from evokernels.optim.checks import (
    check_apart,
    check_counts,
    check_definitions,
    check_flag,
    check_genome,
    check_group,
    check_moment,
    check_moment_memory,
    check_not_captured,
    check_parameter,
    nonnegative,
)
from evokernels.optim.compiling import never_compiled
from evokernels.optim.parts import Member
from evokernels.optim.sharding import local, shard_number

__all__ = ["FusedEvolvedOptimizer"]

# Between the seeds of the shards of a tensor: 2^64 over the golden ratio, which keeps them off the
# small numbers that people choose.
_SEEDS_APART = 0x9E3779B97F4A7C15

# What a state calls the formulas that its genome has by name.
_OWN_TERMS = "own_terms"


class FusedEvolvedOptimizer(torch.optim.Optimizer):
    """Trains with the update rule of a genome; stands where ``torch.optim.AdamW`` stood.

    One native call updates all parameters; each is read and written once. Parameters may be
    float32, float64, bfloat16 or float16, dense or strided, on any device (beyond CPUs and GPUs:
    with torch operations). Arithmetic is in float32, in float64 for float64 parameters.

    Each group has ``genome``, ``lr``, ``betas``, ``eps``, ``weight_decay``, ``total_steps``,
    ``maximize``, ``state_dtype``, ``stochastic_rounding`` and ``seed``. The first five come from
    the genome where a group does not give its own, and so does ``beta3`` where a term reads it;
    learning-rate schedulers change ``lr``, on which the genome's own warmup and cosine then act.

    State of each parameter, from its first gradient on: ``step`` (float64, 0-d: the steps in which
    it had a gradient), and as far as the rule reads them ``exp_avg`` and ``exp_avg_sq`` (moments,
    of its shape).

    With ``torch.amp.GradScaler`` gradients are unscaled inside the step, and a step with infinite
    gradients leaves parameters and state alone.

    On a GPU ``step`` counts are there, no step waits for the device, and one may be captured into a
    CUDA graph behind a first one, if ``lr`` is a float32 or float64 tensor on the device in each
    group. Replays count, follow the schedule, and read ``lr``, ``grad_scale`` and ``found_inf``.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for every torch optimizer.
        genome: the update rule.
        total_steps: length of the training in steps; needed where the genome decays by cosine.
        maximize: go up the gradient instead of down.
        state_dtype: dtype of the moments: ``torch.float32``, ``torch.bfloat16``, or None for that
            of the arithmetic.
        stochastic_rounding: round bfloat16 parameters and moments up or down at random, so that
            small updates are not lost on average. The random numbers depend on ``seed``, the
            position of the parameter, step and element alone (Philox4x32-10, Salmon et al. 2011).
        seed: of stochastic rounding, a whole number below 2^64.
        max_grad_norm: scale all gradients down together where their norm is larger, as
            ``torch.nn.utils.clip_grad_norm_`` does; the gradients themselves stay as they are.
        zero_grads: set gradients to zero in the same pass.
        backend: "auto", or the name of one; see `evokernels.explain`.

    Raises:
        OptimizerError: options or parameters that it cannot use.
        BackendError: the backend asked for cannot run.

    Source of the update rule: M. Marfinetz, "Evolutionary Optimizer Discovery", 2025, section 2.1.
    """

    # torch.amp.GradScaler then leaves gradients scaled and sets `grad_scale` and `found_inf`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        genome: Genome,
        *,
        total_steps: int | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        zero_grads: bool = False,
        backend: str = "auto",
    ) -> None:
        check_genome(genome)
        if max_grad_norm is not None:
            max_grad_norm = nonnegative("max_grad_norm", max_grad_norm)
        check_flag("zero_grads", zero_grads)
        self.max_grad_norm = max_grad_norm
        self.zero_grads = zero_grads
        self._backend = backend
        self._binding: Binding | None = None
        self._captured: list[Binding] = []
        options = {
            "total_steps": total_steps,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, {**_genome_options(genome), **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; options that the group leaves out come from its genome."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        genome = param_group.get("genome", self.defaults["genome"])
        check_genome(genome)
        super().add_param_group({**_genome_options(genome), **param_group})
        _fit_options(self.param_groups[-1])  # torch has added those of the first genome
        try:
            check_group(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                check_parameter(parameter)
                _select(lower(genome), parameter, self._backend)
            check_apart([p for group in self.param_groups for p in group["params"]])
        except Exception:
            del self.param_groups[-1]
            raise
        self._unbind()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of `step`, passed by where no hook and no profiler would notice.

        It costs as much as updating 100,000 parameters.
        """
        wrapped = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedEvolvedOptimizer, *args: Any, **kwargs: Any) -> Any:
            noticed = (
                torch.autograd._profiler_enabled()
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or torch_optimizer._global_optimizer_pre_hooks
                or torch_optimizer._global_optimizer_post_hooks
            )
            return (wrapped if noticed else func)(self, *args, **kwargs)

        return never_compiled(step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # set by torch.amp.GradScaler while it calls step
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        scaling = Scaling(found_inf, grad_scale, max_norm, None, self.zero_grads)
        binding = self._binding
        if found_inf is not None and (binding is None or binding.needs_host):
            check_not_captured([found_inf])
            if found_inf.item():
                if self.zero_grads:
                    self.zero_grad(set_to_none=False)
                return loss
        if binding is None or not binding.repeat(self.param_groups, self.state, scaling):
            if binding is None or not binding.is_current(self.param_groups, self.state):
                self._unbind()
                self._binding = binding = self._bind()
            binding.step(scaling)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values and tensors; genomes as dicts."""
        # the first hook to run, so that those of the user see what is saved
        pack = self.register_state_dict_post_hook(_pack_genomes, prepend=True)
        try:
            return super().state_dict()
        finally:
            pack.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`: genome, options, moments and step counts, lossless."""
        # the last hook to run, so that it sees what those of the user have made of the state
        prepare = self.register_load_state_dict_pre_hook(_prepare_to_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            prepare.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a new object has neither; graphs outlive the loading of a state
        self._binding = getattr(self, "_binding", None)
        self._captured = getattr(self, "_captured", [])
        self._unbind()
        for group in self.param_groups:
            for parameter in group["params"]:
                values = self.state.get(parameter, {})
                for name, value in values.items():
                    if isinstance(value, _Uncast):
                        dtype = torch.float64 if name == "step" else _state_dtype(group, parameter)
                        values[name] = value.tensor.to(parameter.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch's list leaves out what a subclass adds; the binding points into memory
        own = ("max_grad_norm", "zero_grads", "_backend")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _unbind(self) -> None:
        if self._binding is not None and self._binding.captured:
            self._captured.append(self._binding)  # a graph goes on reading its tables
        self._binding = None

    def _bind(self) -> Binding:
        check_not_captured(p for group in self.param_groups for p in group["params"])
        members, waiting, states = [], [], []
        position = 0
        for group in self.param_groups:
            _fit_options(group)  # the genome may be another one by now
            check_group(group)
            rule = lower(group["genome"])
            for parameter in dict.fromkeys(group["params"]):  # of duplicates torch warns
                position += 1
                state = self.state.get(parameter, {})
                if parameter.grad is None and not state:
                    waiting.append(parameter)
                    continue
                check_parameter(parameter)
                moments = _moments(rule, parameter, state, _state_dtype(group, parameter))
                bound = BoundTensor(
                    rule.program,
                    local(parameter),
                    {name: local(moment) for name, moment in moments.items()},
                    _rounding(group, parameter, position),
                )
                backend = _select(rule, parameter, self._backend)
                members.append(Member(parameter, group, rule, backend, bound))
                named = {rule.state_names[name]: moment for name, moment in moments.items()}
                states.append((float(state.get("step", 0.0)), named))
        check_apart([member.parameter for member in members])
        check_counts(count for count, _ in states)
        steps, views = {}, []
        for place in dict.fromkeys(member.place for member in members):
            chosen = [i for i, member in enumerate(members) if member.place == place]
            steps[place] = torch.tensor(
                [states[i][0] for i in chosen],
                dtype=torch.float64,
                device="cpu" if place is None else place[1],
            )
            views += zip(chosen, steps[place], strict=True)
        binding = Binding(members, waiting, steps)
        # nothing has changed up to here, and nothing fails from here on
        for i, step in views:
            self.state[members[i].parameter].update(step=step, **states[i][1])
        binding.rest_on(self.param_groups, self.state)
        return binding


def _pack_genomes(optimizer: FusedEvolvedOptimizer, state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        genome = group["genome"]
        group["genome"] = genome.to_dict()
        if genome.definitions:  # which may be others where the state is loaded
            group[_OWN_TERMS] = genome.definitions


@dataclass(frozen=True)
class _Uncast:
    """A moment or step count on its way through torch's load_state_dict.

    Torch casts every tensor of the state to the dtype of its parameter; moments of a 16-bit
    parameter would lose half their digits. Counts become float32 where the state once was that of
    a fused or capturable AdamW, and would end at 2^24.
    """

    tensor: torch.Tensor


def _prepare_to_load(
    optimizer: FusedEvolvedOptimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """What `load_state_dict` hands to torch: complete groups, moments out of reach of its cast."""
    groups, state = [], dict(state_dict["state"])
    for ours, theirs in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        group = {**ours, **theirs}  # a state of torch's Adam brings no genome
        if isinstance(group["genome"], dict):
            group["genome"] = Genome.from_dict(group["genome"])
        check_definitions(group["genome"], group.pop(_OWN_TERMS, None))
        _fit_options(group)
        check_group(group)
        groups.append(group)
        # also those that another rule has kept
        names = {*MOMENT_NAMES.values(), *lower(group["genome"]).state_names.values()}
        for parameter, i in zip(ours["params"], theirs["params"], strict=False):
            kept = {n: t for n, t in state.get(i, {}).items() if n in names or n == "step"}
            for name, moment in kept.items():
                if name != "step":
                    check_moment(name, moment, parameter)
            uncast = {n: _Uncast(tensor) for n, tensor in kept.items() if torch.is_tensor(tensor)}
            if uncast:
                state[i] = {**state[i], **uncast}
    groups += state_dict["param_groups"][len(groups) :]  # too many: torch's error says so
    return {**state_dict, "state": state, "param_groups": groups}


def _moments(
    rule: Rule, parameter: torch.Tensor, state: dict[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The moments that a rule keeps of a parameter, zero where there are none yet."""
    moments = {}
    for moment, name in rule.state_names.items():
        if name in state:
            check_moment(name, state[name], parameter)
            moments[moment] = state[name].to(parameter.device, dtype)
            check_moment_memory(name, moments[moment])
        else:
            moments[moment] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.preserve_format
            )
    return moments


def _state_dtype(group: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    return group["state_dtype"] or ARITHMETIC[parameter.dtype]


def _rounding(group: dict[str, Any], parameter: torch.Tensor, position: int) -> Rounding | None:
    """Shards draw bits of their own, replicas the same."""
    if not group["stochastic_rounding"]:
        return None
    seed = group["seed"] + shard_number(parameter) * _SEEDS_APART
    return Rounding(seed % 2**64, position)


def _select(rule: Rule, parameter: torch.Tensor, backend: str) -> Backend:
    selection = select(rule.program, parameter.device, parameter.dtype, backend)
    if selection.rejected and not selection.backend.fused:  # "auto" found nothing better
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.rejected.items())
        warnings.warn(
            f"updating with the slow {selection.backend.name!r} backend ({reasons})",
            RuntimeWarning,
            stacklevel=2,
        )
    return selection.backend


def _genome_options(genome: Genome) -> dict[str, Any]:
    options = {
        "genome": genome,
        "lr": genome.lr,
        "betas": (genome.beta1, genome.beta2),
        "eps": genome.eps,
        "weight_decay": genome.weight_decay,
    }
    _fit_options(options)
    return options


def _fit_options(group: dict[str, Any]) -> None:
    """Give a group ``beta3`` if a term of its genome reads it; others are as AdamW has them."""
    genome = group["genome"]
    check_genome(genome)
    if genome.reads_beta3:
        group.setdefault("beta3", genome.beta3)
    else:
        group.pop("beta3", None)
