"""`FusedEvolvedOptimizer`: PyTorch's optimizer protocol around a genome; no arithmetic here."""

from __future__ import annotations

import functools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from evokernels.compiler.lower import Rule, lower
from evokernels.compiler.terms import scalar_values
from evokernels.errors import OptimizerError
from evokernels.genome import Genome
from evokernels.kernels.memory import find_overlap, memory_keys, overlaps_itself
from evokernels.kernels.plan import (
    ARITHMETIC,
    Backend,
    BoundTensor,
    Numbers,
    Plan,
)
from evokernels.kernels.registry import select
from evokernels.schedule import learning_rate_factor

__all__ = ["FusedEvolvedOptimizer"]

# Names of the moments in `state`: torch's own, so that Adam's state can be read.
_STATE_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}


class FusedEvolvedOptimizer(torch.optim.Optimizer):
    """Trains with the update rule of a genome; stands where ``torch.optim.AdamW`` stood.

    One native call updates all parameters; each is read and written once. Parameters may be
    float32, float64, bfloat16 or float16, dense or strided, on any device (beyond the CPU: with
    torch operations). Arithmetic and moments are float32, float64 for float64 parameters.

    Each group has ``genome``, ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``total_steps``.
    They come from the genome where a group does not give its own; learning-rate schedulers change
    ``lr``, on which the genome's own warmup and cosine then act.

    State of each parameter, from its first gradient on: ``step`` (float64, 0-d: the steps in which
    it had a gradient), and as far as the rule reads them ``exp_avg`` and ``exp_avg_sq`` (moments,
    of its shape).

    Args:
        params: parameters, (name, parameter) pairs or groups, as for every torch optimizer.
        genome: the update rule.
        total_steps: length of the training in steps; needed where the genome decays by cosine.
        backend: "auto", or the name of one; see `evokernels.explain`.

    Raises:
        OptimizerError: options or parameters that it cannot use.
        BackendError: the backend asked for cannot run.

    Source of the update rule: M. Marfinetz, "Evolutionary Optimizer Discovery", 2025, section 2.1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        genome: Genome,
        *,
        total_steps: int | None = None,
        backend: str = "auto",
    ) -> None:
        _check_genome(genome)
        self._backend = backend
        self._binding: _Binding | None = None
        super().__init__(params, {**_group_options(genome), "total_steps": total_steps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; options that the group leaves out come from its genome."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        genome = param_group.get("genome", self.defaults["genome"])
        _check_genome(genome)
        super().add_param_group({**_group_options(genome), **param_group})
        try:
            _check_group(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                _check_parameter(parameter)
                _select(lower(genome), parameter, self._backend)
            _check_apart([p for group in self.param_groups for p in group["params"]])
        except Exception:
            del self.param_groups[-1]
            raise
        self._binding = None

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

        return step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._binding is None or not self._binding.is_current(self.param_groups, self.state):
            self._binding = self._bind()
        self._binding.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values and tensors; genomes as dicts."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["genome"] = group["genome"].to_dict()
        return state

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
        self._binding = None
        for parameter in (p for group in self.param_groups for p in group["params"]):
            for name, value in self.state.get(parameter, {}).items():
                if isinstance(value, _Uncast):
                    self.state[parameter][name] = value.tensor.to(
                        parameter.device, ARITHMETIC[parameter.dtype], copy=True
                    )

    def __getstate__(self) -> dict[str, Any]:
        # torch's list leaves out what a subclass adds; the binding points into memory
        return {**super().__getstate__(), "_backend": self._backend}

    def _bind(self) -> _Binding:
        bound, groups, waiting, backends, steps = [], [], [], [], []
        for group in self.param_groups:
            _check_group(group)
            rule = lower(group["genome"])
            for parameter in dict.fromkeys(group["params"]):  # of duplicates torch warns
                state = self.state.get(parameter, {})
                if parameter.grad is None and not state:
                    waiting.append(parameter)
                    continue
                _check_parameter(parameter)
                bound.append(BoundTensor(rule.program, parameter, _moments(rule, parameter, state)))
                groups.append(group)
                backends.append(_select(rule, parameter, self._backend))
                steps.append(float(state.get("step", 0.0)))
        _check_apart([b.parameter for b in bound])
        # nothing has changed up to here, and nothing fails from here on
        all_steps = torch.tensor(steps, dtype=torch.float64)
        for b, step in zip(bound, all_steps, strict=True):
            moments = {_STATE_NAMES[name]: moment for name, moment in b.moments.items()}
            self.state[b.parameter].update(step=step, **moments)
        return _Binding(
            bound, groups, waiting, backends, all_steps, _foundation(self.param_groups, self.state)
        )


class _Binding:
    """Parameters and their state, bound to plans; valid until one of them moves in memory."""

    def __init__(
        self,
        bound: list[BoundTensor],
        groups: list[dict[str, Any]],
        waiting: list[torch.Tensor],
        backends: list[Backend],
        steps: torch.Tensor,
        foundation: list[Any],
    ) -> None:
        self.parameters = [b.parameter for b in bound]
        self._groups = groups
        self._waiting = waiting
        self._foundation = foundation
        self._keys = memory_keys(self.parameters)
        # a moment is told by its address alone: its memory is kept, so nothing else moves in there
        self._moments = [moment for b in bound for moment in b.moments.values()]
        self._kept = [moment.untyped_storage() for moment in self._moments]
        self._addresses = [moment.data_ptr() for moment in self._moments]
        # one array for all counts, of which every state["step"] is a view: counting is one
        # operation for the whole model
        self._counts = steps.numpy()
        self._counted = self._counts.tobytes()
        self._rules = [lower(group["genome"]) for group in groups]
        self._present: list[bool] = []
        self._rows: list[int] = []
        self._first_of_row: list[int] = []
        self.plans: list[tuple[Plan, list[int]]] = []
        for backend in dict.fromkeys(backends):
            members = [i for i, b in enumerate(backends) if b is backend]
            self.plans.append((backend.bind([bound[i] for i in members]), members))

    def is_current(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether all is as it was bound, and none of the waiting parameters has a gradient."""
        foundation = _foundation(groups, state)
        return (
            len(foundation) == len(self._foundation)
            and all(map(operator.is_, foundation, self._foundation))
            and memory_keys(self.parameters) == self._keys
            and [moment.data_ptr() for moment in self._moments] == self._addresses
            and all(parameter.grad is None for parameter in self._waiting)
        )

    def step(self) -> None:
        """Count the step and update."""
        gradients = [parameter.grad for parameter in self.parameters]
        present = [gradient is not None for gradient in gradients]
        if not {g.layout for g in gradients if g is not None} <= {torch.strided}:
            for parameter in self.parameters:
                _check_parameter(parameter)
        if present != self._present or self._counts.tobytes() != self._counted:
            self._present = present
            self._rows = []  # tensors with gradients in the same steps keep counting alike
        self._counts += present
        try:
            if not self._rows:
                self._assign_rows()
            numbers = [self._numbers(i) for i in self._first_of_row]
            for plan, members in self.plans:
                plan.run([gradients[i] for i in members], [self._rows[i] for i in members], numbers)
        except Exception:
            self._counts -= present
            raise
        self._counted = self._counts.tobytes()

    def _assign_rows(self) -> None:
        """One row of numbers for each group and step count among the tensors with gradients."""
        rows: dict[tuple[int, float], int] = {}
        self._rows, self._first_of_row = [], []
        for i, (group, present) in enumerate(zip(self._groups, self._present, strict=True)):
            if not present:
                self._rows.append(0)
                continue
            row = rows.setdefault((id(group), self._counts[i]), len(rows))
            if row == len(self._first_of_row):
                self._first_of_row.append(i)
            self._rows.append(row)

    def _numbers(self, i: int) -> Numbers:
        """The scalars of this step for the tensors that share group and count with tensor `i`."""
        group, rule, t = self._groups[i], self._rules[i], int(self._counts[i])
        genome = rule.genome
        lr = _number("lr", group["lr"])
        beta1, beta2 = group["betas"]
        values = scalar_values(
            lr=lr * learning_rate_factor(genome, t - 1, group["total_steps"]),
            weight_decay=group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            clip=genome.clip_value,
            t=t,
        )
        return Numbers(rule.program, rule.numbers(**values))


@dataclass(frozen=True)
class _Uncast:
    """A moment on its way through torch's load_state_dict.

    Torch casts every tensor of the state to the dtype of its parameter; moments of a 16-bit
    parameter would lose half their digits.
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
        _check_group(group)
        groups.append(group)
        for parameter, i in zip(ours["params"], theirs["params"], strict=False):
            moments = {n: state[i][n] for n in _STATE_NAMES.values() if n in state.get(i, {})}
            for name, moment in moments.items():
                _check_moment(name, moment, parameter)
            if moments:
                state[i] = {**state[i], **{n: _Uncast(moment) for n, moment in moments.items()}}
    groups += state_dict["param_groups"][len(groups) :]  # too many: torch's error says so
    return {**state_dict, "state": state, "param_groups": groups}


def _foundation(groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> list[Any]:
    """All objects that a binding rests on; others in their place mean that it is out of date."""

    objects: list[Any] = []
    for group in groups:
        objects += (group, group["genome"], *group["params"])
    for values in state.values():
        objects += values.values()
    return objects


def _moments(rule: Rule, parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The moments that a rule keeps of a parameter, zero where there are none yet."""
    arithmetic = ARITHMETIC[parameter.dtype]
    moments = {}
    for moment in rule.program.state:
        name = _STATE_NAMES[moment]
        if name in state:
            _check_moment(name, state[name], parameter)
            moments[moment] = state[name].to(parameter.device, arithmetic)
        else:
            moments[moment] = torch.zeros_like(
                parameter, dtype=arithmetic, memory_format=torch.preserve_format
            )
    return moments


def _select(rule: Rule, parameter: torch.Tensor, backend: str) -> Backend:
    selection = select(rule.program, parameter.device, parameter.dtype, backend)
    if selection.rejected:  # only "auto" gets past a rejection
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.rejected.items())
        warnings.warn(
            f"updating with the slow {selection.backend.name!r} backend ({reasons})",
            RuntimeWarning,
            stacklevel=2,
        )
    return selection.backend


def _group_options(genome: Genome) -> dict[str, Any]:
    return {
        "genome": genome,
        "lr": genome.lr,
        "betas": (genome.beta1, genome.beta2),
        "eps": genome.eps,
        "weight_decay": genome.weight_decay,
    }


def _check_genome(genome: Any) -> None:
    if not isinstance(genome, Genome):
        raise OptimizerError(
            f"genome must be an evokernels.Genome, got {type(genome).__name__}; "
            "take one from evokernels.zoo or Genome.load(path)"
        )


def _check_group(group: dict[str, Any]) -> None:
    genome, total_steps = group["genome"], group["total_steps"]
    _check_genome(genome)
    for name in ("lr", "eps", "weight_decay"):
        _number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise OptimizerError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for beta in betas:
        _number("betas", beta, below=1.0)
    for name in ("amsgrad", "maximize"):  # of torch's Adam
        if group.get(name):
            raise OptimizerError(f"{name}=True asks for a rule that no genome has; set it to False")
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
    is_whole = isinstance(total_steps, numbers.Integral) and not isinstance(total_steps, bool)
    if total_steps is not None and not (is_whole and total_steps > 0):
        raise OptimizerError(f"total_steps must be a positive whole number, got {total_steps!r}")


def _number(name: str, value: Any, below: float = math.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # no number, or a tensor of several
        number = math.nan
    if not 0.0 <= number < below:
        raise OptimizerError(f"{name} must lie in [0, {below:g}), got {value!r}")
    return number


def _check_parameter(parameter: torch.Tensor) -> None:
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
    if overlaps_itself(parameter):
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


def _check_apart(parameters: list[torch.Tensor]) -> None:
    unique = dict.fromkeys(parameters)  # of duplicates torch warns
    for device in {parameter.device for parameter in unique}:
        shared = find_overlap(p for p in unique if p.device == device)
        if shared:
            shapes = " and ".join(str(tuple(parameter.shape)) for parameter in shared)
            raise OptimizerError(
                f"two parameters of shapes {shapes} share memory, so each would be updated twice; "
                "tie weights by using one Parameter in both places"
            )


def _check_moment(name: str, moment: Any, parameter: torch.Tensor) -> None:
    shape = tuple(moment.shape) if isinstance(moment, torch.Tensor) else type(moment).__name__
    if shape != tuple(parameter.shape):
        raise OptimizerError(
            f"{name} of a parameter of shape {tuple(parameter.shape)} is {shape}; "
            "the state belongs to another model"
        )
