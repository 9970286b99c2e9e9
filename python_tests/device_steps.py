"""What the tests of device plans share: plans as an optimizer makes and runs them, a backend made
narrower, and memory that notices when a neighbour is written to."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence

import torch

from evokernels import Genome
from evokernels.compiler.lower import lower
from evokernels.compiler.schedule import schedule_lengths
from evokernels.compiler.spelling import Kind
from evokernels.compiler.terms import GROUP_INPUTS, log_of
from evokernels.kernels.device import DeviceBackend, DeviceKernel, DevicePlan, Scaling
from evokernels.kernels.plan import BoundTensor, Rounding

__all__ = ["Guarded", "Limited", "Steps", "hyperparameters"]


def hyperparameters(
    genome: Genome, total_steps: int | None = 7, **changes: float | torch.Tensor
) -> list[float | torch.Tensor]:
    """The values of `GROUP_INPUTS`."""
    values = {
        "base_lr": genome.lr,
        "weight_decay": genome.weight_decay,
        "beta1": genome.beta1,
        "beta2": genome.beta2,
        "beta3": genome.beta3,
        "log_beta1": log_of(genome.beta1),
        "log_beta2": log_of(genome.beta2),
        "log_beta3": log_of(genome.beta3),
        "eps": genome.eps,
        "clip": genome.clip_value,
        "direction": 1.0,
        **schedule_lengths(genome, total_steps),
        "training_steps": math.inf if total_steps is None else float(total_steps),
        **changes,
    }
    return [values[symbol.name] for symbol in GROUP_INPUTS]


class Limited:
    """A backend of which a launch can take fewer words, or whose device holds fewer blocks."""

    def __init__(
        self, backend: DeviceBackend, most_words: int = 2**31, resident: int = 2**31
    ) -> None:
        self._backend, self._resident = backend, resident
        self.most_words = min(most_words, backend.most_words)

    def load(self, kinds: tuple[Kind, ...], words: int, device: torch.device) -> DeviceKernel:
        """As `DeviceBackend` says."""
        kernel = self._backend.load(kinds, words, device)
        return types.SimpleNamespace(
            update=kernel.update,
            squares=kernel.squares,
            resident=min(self._resident, kernel.resident),
        )


class Guarded:
    """Copies of tensors, each in the middle of memory that must stay as it is.

    Args:
        device: where the copies are.
    """

    PADDING = 64  # bytes, a multiple of what vectors need

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def copy(self, tensor: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """A tensor of the same values and strides, wherever the one that is copied is.

        Args:
            shift: elements by which its memory is away from a multiple of 64 bytes.
        """
        like = {"dtype": tensor.dtype, "device": self._device}
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        whole.set_(tensor.untyped_storage())
        around = self.PADDING // tensor.element_size()
        memory = torch.full((3 * around + shift + whole.numel(),), 7.0, **like)
        first = around + -memory.data_ptr() % self.PADDING // tensor.element_size() + shift
        memory[first : first + whole.numel()].copy_(whole)
        place = (tensor.shape, tensor.stride(), first + tensor.storage_offset())
        ours = torch.zeros_like(memory, dtype=torch.bool)
        ours.as_strided(*place).fill_(True)
        self._blocks.append((memory, memory.clone(), ours))
        return memory.as_strided(*place)

    def bound(
        self,
        genome: Genome,
        parameter: torch.Tensor,
        state: torch.dtype,
        rounding: Rounding | None = None,
        shift: int = 0,
    ) -> BoundTensor:
        """A copy of a parameter, with moments of zeros of another dtype."""
        program = lower(genome).program
        moments = {
            name: self.copy(torch.zeros_like(parameter, dtype=state), shift)
            for name in program.state
        }
        return BoundTensor(program, self.copy(parameter, shift), moments, rounding)

    def check(self) -> None:
        """AssertionError if anything beside the tensors has changed."""
        for memory, before, ours in self._blocks:
            now, then = (
                each.view(torch.uint8).view(-1, memory.element_size()) for each in (memory, before)
            )
            assert ((now == then).all(1) | ours).all(), "a neighbour was written to"


class Steps:
    """A plan over tensors, a group for each genome, and its steps.

    Args:
        genomes: for each tensor the one that it is bound to.
        taken: the steps that all of them have taken, or each.
    """

    def __init__(
        self,
        backend: DeviceBackend | Limited,
        tensors: Sequence[BoundTensor],
        genomes: Sequence[Genome],
        taken: float | Sequence[float] = 0,
        total_steps: int | None = 7,
    ) -> None:
        self.tensors = tensors
        groups = list(dict.fromkeys(genomes))
        rules = [lower(genome) for genome in groups]
        places = {genome: i for i, genome in enumerate(groups)}
        self.hyperparameters = [hyperparameters(genome, total_steps) for genome in groups]
        counts = torch.tensor(taken, dtype=torch.float64).expand(len(tensors))
        self.counts = counts.clone().to(tensors[0].parameter.device)
        self.plan = DevicePlan(
            backend, tensors, [places[genome] for genome in genomes], rules, self.counts
        )

    def run(self, gradients: Sequence[torch.Tensor | None], **scaling: object) -> None:
        """One step; `scaling` as in `Scaling`."""
        self.plan.run(gradients, self.hyperparameters, Scaling(**scaling))

    @property
    def results(self) -> list[torch.Tensor]:
        """Parameters and moments."""
        return [x for b in self.tensors for x in (b.parameter, *b.moments.values())]
