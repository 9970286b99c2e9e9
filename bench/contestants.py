"""Who is measured: the same work as one update of ours, of torch's optimizers, of torch.compile.

Every contestant starts from the same values. Its first step is compared with the source system's
eager code, so that a fast wrong answer does not get into a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from eager import eager_update
from oracle import eager_formulas

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.kernels.plan import ARITHMETIC
from evokernels.kernels.registry import select

__all__ = [
    *("COMPILED", "CONTESTANTS", "FUSED", "NATIVE", "OURS", "SOURCE"),
    *("Contestant", "Work", "adamw", "apex_adam", "compiled", "enter", "ours", "ours_as_adam"),
    "source_eager",
]

TOTAL_STEPS = 1_000_000
COMPARED = 100_000  # elements of each tensor that must agree with the eager code
LOSS_SCALE = 1024.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What is to be updated, and by which rule.

    Attributes:
        max_grad_norm: if given, a step unscales the gradients with a GradScaler, clips their norm
            to this, updates, and leaves zeros in them.
        device: where all of it lies.
    """

    shapes: tuple[tuple[int, ...], ...]
    genome: Genome = zoo.evolved_2025
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    max_grad_norm: float | None = None
    device: torch.device = CPU

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def values(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Parameters and gradients from which every contestant starts."""
        scale = 1.0 if self.max_grad_norm is None else LOSS_SCALE
        return starting_values(self.shapes, self.dtype, scale, self.device)


@functools.lru_cache(maxsize=1)
def starting_values(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    gradient_scale: float,
    device: torch.device,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random parameters and gradients; those of the last work are kept."""
    generator = torch.Generator().manual_seed(0)

    def tensors(scale: float) -> list[torch.Tensor]:
        values = (torch.randn(shape, generator=generator).mul_(scale) for shape in shapes)
        return [value.to(device, dtype) for value in values]

    return tensors(1.0), tensors(gradient_scale)


class Contestant:
    """Parameters with gradients, and a function that updates them once.

    Attributes:
        step: what is timed.
        state: the tensors that it keeps from step to step.
        rule: the genome by whose definition it updates.
        traffic: bytes that a step has to move for each element; None where nobody has counted.
        backend: what ran it.
        rounds_to: dtype of what it computes on the way to the new parameter.
        keeps_gradients: it has their addresses, so they may not move.
    """

    def __init__(self, work: Work, rule: Genome) -> None:
        start, self._gradients = work.values
        self.parameters = [torch.nn.Parameter(value.clone()) for value in start]
        self.rule = rule
        self.step: Callable[[], object]
        self.state: Callable[[], list[torch.Tensor]]
        self.traffic: int | None = None
        self.backend = "torch"
        self.rounds_to = torch.float32
        self.keeps_gradients = False
        self._zeroes_gradients = work.max_grad_norm is not None
        self.prepare(new=self._zeroes_gradients)

    def prepare(self, *, new: bool) -> None:
        """Gradients for the next step, at new addresses or where they have been."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if new:  # made while the old one is still there, so that it lies elsewhere
                parameter.grad = gradient.clone()
            elif self._zeroes_gradients:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient


def ours(work: Work, backend: str = "cpu") -> Contestant:
    """The whole ``step()`` of our optimizer, as its user calls it."""
    contestant = Contestant(work, work.genome)
    optimizer = FusedEvolvedOptimizer(
        contestant.parameters,
        work.genome,
        total_steps=TOTAL_STEPS,
        state_dtype=work.state_dtype,
        max_grad_norm=work.max_grad_norm,
        zero_grads=work.max_grad_norm is not None,
        backend=backend,
    )
    contestant.step = optimizer.step
    contestant.state = functools.partial(state_of, optimizer)
    if work.max_grad_norm is not None:
        contestant.step = functools.partial(scaled_step, grad_scaler(work.device), optimizer)
    program = lower(work.genome).program
    chosen = select(program, work.device, work.dtype, backend).backend
    contestant.backend = f"{chosen.name}: {chosen.kernel(program, work.dtype)}"
    moment = work.state_dtype or ARITHMETIC[work.dtype]
    contestant.traffic = 3 * work.dtype.itemsize + 2 * len(program.state) * moment.itemsize
    if work.max_grad_norm is not None:  # read for the norm, written as zero
        contestant.traffic += 2 * work.dtype.itemsize
    return contestant


def our_native_call(work: Work) -> Contestant:
    """The native call alone, without what Python does around it."""
    contestant = ours(work)
    optimizer = contestant.step.__self__
    optimizer.step()
    (plan,) = optimizer._binding.plans
    contestant.step = plan.launch
    contestant.keeps_gradients = True
    return contestant


def ours_as_adam(work: Work) -> Contestant:
    """Ours with the rule of Adam, as a yardstick for longer rules."""
    return ours(replace(work, genome=zoo.adam))


def adamw(work: Work, **implementation: bool) -> Contestant:
    """Torch's AdamW, with ``fused`` or ``foreach`` as given."""
    contestant = Contestant(work, zoo.adamw)
    optimizer = torch.optim.AdamW(
        contestant.parameters, lr=1e-3, weight_decay=1e-2, **implementation
    )
    contestant.step = optimizer.step
    contestant.state = functools.partial(state_of, optimizer)
    if implementation.get("fused"):
        contestant.traffic = 7 * work.dtype.itemsize
    else:
        contestant.rounds_to = work.dtype
    if work.max_grad_norm is not None:
        contestant.step = functools.partial(
            four_calls,
            grad_scaler(work.device),
            optimizer,
            contestant.parameters,
            work.max_grad_norm,
        )
        # unscaling and clipping read and write every gradient, its norm reads it, zeroing writes it
        contestant.traffic += 6 * work.dtype.itemsize
    return contestant


def apex_adam(work: Work) -> Contestant:
    """FusedAdam of NVIDIA's apex, which decays as AdamW does; ImportError without apex."""
    from apex.optimizers import FusedAdam

    contestant = Contestant(work, zoo.adamw)
    optimizer = FusedAdam(contestant.parameters, lr=1e-3, weight_decay=1e-2, adam_w_mode=True)
    contestant.step = optimizer.step
    contestant.state = functools.partial(state_of, optimizer)
    contestant.backend = "apex"
    return contestant


def state_of(
    optimizer: torch.optim.Optimizer, names: Iterable[str] = ("exp_avg", "exp_avg_sq")
) -> list[torch.Tensor]:
    """The moments of all parameters."""
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


def scaled_step(scaler: torch.amp.GradScaler, optimizer: FusedEvolvedOptimizer) -> None:
    """Everything in one call; the gradients are unscaled, clipped and zeroed in the step."""
    scaler.step(optimizer)
    scaler.update()


def four_calls(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.Tensor],
    max_grad_norm: float,
) -> None:
    """The same with torch."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """One whose scale stays as it is; it makes its tensors when it first scales a loss."""
    scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, growth_interval=2**31 - 1)
    scaler.scale(torch.ones((), device=device))
    return scaler


def source_eager(work: Work) -> Contestant:
    """The source's update of every tensor, one torch call at a time."""
    return _by_source(work, update_all)


def compiled(work: Work) -> Contestant:
    """The source's update of all tensors in one graph, through torch.compile."""
    torch._dynamo.reset()  # whoever was here before does not count as a recompilation
    return _by_source(work, torch.compile(update_all, fullgraph=True))


def _by_source(work: Work, update: Callable[..., None]) -> Contestant:
    contestant = Contestant(work, work.genome)
    parameters = [parameter.detach() for parameter in contestant.parameters]
    m, v = (_moments(work, kept) for kept in (work.genome.use_m, work.genome.use_v))
    steps = 0

    def step() -> None:
        nonlocal steps
        lr = work.genome.lr * learning_rate_factor(work.genome, steps, TOTAL_STEPS)
        steps += 1
        gradients = [parameter.grad for parameter in contestant.parameters]
        update(work.genome, parameters, gradients, m, v, lr)

    contestant.step = step
    contestant.state = lambda: [*m, *v]
    return contestant


def _moments(work: Work, kept: bool) -> list[torch.Tensor]:
    dtype = work.state_dtype or ARITHMETIC[work.dtype]
    shapes = work.shapes if kept else [(0,)] * len(work.shapes)
    return [torch.zeros(shape, dtype=dtype, device=work.device) for shape in shapes]


def update_all(
    genome: Genome,
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    m: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    lr: float,
) -> None:
    """One step, in place and in float32; `lr` may change from step to step without recompiling.

    The rules that are measured correct no bias: the number of the step does not matter.
    """
    for tensors in zip(parameters, gradients, m, v, strict=True):
        working = [tensor.float() for tensor in tensors]  # float32 tensors are themselves
        eager_update(genome, *working, 1, lr)
        for stored, new in zip(tensors, working, strict=True):
            if stored.dtype != torch.float32 and stored is not tensors[1]:
                stored.copy_(new)


OURS = "ours"
NATIVE = "ours, native call"
FUSED = "AdamW(fused=True)"
COMPILED = "torch.compile"
SOURCE = "source eager"
CONTESTANTS: dict[str, Callable[[Work], Contestant]] = {
    OURS: ours,
    NATIVE: our_native_call,
    FUSED: functools.partial(adamw, fused=True),
    COMPILED: compiled,
    SOURCE: source_eager,
}


def enter(make: Callable[[Work], Contestant], work: Work) -> Contestant:
    """A contestant after its first step, which must be right."""
    contestant = make(work)
    if not contestant.keeps_gradients:  # or it has taken its first step already
        contestant.step()
    _check_first_step(contestant, work)
    return contestant


def _check_first_step(contestant: Contestant, work: Work) -> None:
    start, gradients = work.values
    factor = 1.0
    if work.max_grad_norm is not None:
        norm = torch.nn.utils.get_total_norm(gradients).item() / LOSS_SCALE
        factor = min(1.0, work.max_grad_norm / norm) / LOSS_SCALE
    relative = max(1e-5, 2 * torch.finfo(work.dtype).eps)
    for parameter, before, gradient in zip(contestant.parameters, start, gradients, strict=True):
        p, g = (t.flatten()[:COMPARED].to(torch.float32, copy=True) for t in (before, gradient))
        tensors = {"p": p, "g": g * factor, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        p = eager_formulas(contestant.rule, tensors, 1, TOTAL_STEPS)["p"]
        actual = parameter.detach().flatten()[:COMPARED].float()
        # of a parameter near zero, what is added to it is most of what there is
        moved = (p - before.flatten()[:COMPARED]).abs().max().item()
        absolute = max(1e-6, 2 * torch.finfo(contestant.rounds_to).eps * moved)
        torch.testing.assert_close(actual, p, rtol=relative, atol=absolute)
