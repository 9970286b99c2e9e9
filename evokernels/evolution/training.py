"""Training loops: one on the host, and one that the host only launches.

Both train with the same batches and end with the same losses. The second is for devices on which
a step takes less time than the host needs to ask for its operations: the whole step, from the
gathering of its samples to the update, is recorded once and replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch.nn import functional

from evokernels.evolution.devices import forked_generators
from evokernels.evolution.fitness import Hurdle, diverged, within_limit
from evokernels.tasks import Batches, Draw

__all__ = ["LAYOUT", "Graph", "logits", "train", "train_on_device"]

# Convolution, pooling and batch norm of the two networks are 1.2 to 1.5 times faster with the
# channels innermost (measured on a CPU with one thread, training), twice as fast in the test.
LAYOUT = torch.channels_last

# Steps before the capture; "CUDA Graphs" in the notes of the PyTorch documentation has three.
WARM_UPS = 3

# Replays between two looks at the divergence flag. A look waits for the device; a run that
# diverges goes on for as many steps at most, which change nothing.
LOOK_EVERY = 32


class Graph(Protocol):
    """Records a function once and repeats it, as `evokernels.evolution.devices.CudaGraph` does."""

    def capture(self, prepare: Callable[[], None], work: Callable[[], None]) -> None:
        """Run ``prepare``, then record ``work`` without running it."""

    def replay(self) -> None:
        """Do what was recorded."""


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    hurdle: Hurdle | None = None,
) -> list[float]:
    """One step for each batch; ends early with the first loss that counts as diverged.

    A hurdle that is not taken ends it too, after its step.

    Args:
        model: on the device of the batches.
        optimizer: of its parameters. Where it has a function ``backward`` of the loss, that takes
            the place of the loss's own: Sophia differentiates some gradients once more.
        batches: x and y of each step.
        hurdle: None where there is none.

    Returns:
        The loss before each step.
    """
    losses: list[float] = []
    backward = getattr(optimizer, "backward", torch.Tensor.backward)
    model.train()
    for x, y in batches:
        loss = _loss(model, x, y)
        losses.append(loss.item())
        if diverged(losses[-1]):
            break
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        if hurdle and hurdle.fails(losses):
            break
    return losses


def train_on_device(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    draws: Draw,
    graph: Graph,
    hurdle: Hurdle | None = None,
) -> list[float]:
    """`train` without the host: the steps are replays of one that was recorded.

    Args:
        model: on the device, not yet trained.
        optimizer: of its parameters, with no state yet. The ``lr`` of its groups becomes a tensor
            on the device, and ``found_inf`` the flag that holds it back after divergence.
        batches: of data on the device.
        draws: stacked, one for each step, on the device.
        graph: not yet used.
        hurdle: as in `train`.

    Returns:
        The loss before each step, up to and with the first that counts as diverged. The weights
        are those before that loss, as `train` leaves them; statistics of batch norms are not.
    """
    model.train()
    step = TrainingStep(model, optimizer, batches, draws)
    graph.capture(step.warm_up, step)
    done = 0
    while done < len(step.losses) and not step.diverged.item():
        look = min(done + LOOK_EVERY, len(step.losses))
        if hurdle and done < hurdle.STEP < look:
            look = hurdle.STEP
        for _ in range(done, look):
            graph.replay()
        done = look
        if hurdle and hurdle.fails(step.losses[:done].tolist()):
            break
    losses = step.losses[:done].tolist()
    healthy = sum(1 for _ in itertools.takewhile(lambda loss: not diverged(loss), losses))
    return losses[: healthy + 1]


class TrainingStep:
    """One step of training, as a function that neither waits for the device nor tells it anything.

    What differs from step to step lies on the device, in memory that stays where it is: the number
    of the step, the draws of all batches, and what is learnt. Arguments as in `train_on_device`.

    Attributes:
        losses: float32 (steps,), the loss before each step; NaN where there was none yet.
        diverged: float32 0-d, 1 from the first diverged loss on; no weight changes any more.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        draws: Draw,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._batches, self._draws = batches, draws
        steps, device = len(draws.chosen), draws.chosen.device
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.full((steps,), torch.nan, device=device)
        self.diverged = torch.zeros((), device=device)
        # what an optimizer reads on the device: a step that must not be taken, as GradScaler says
        # it, and the learning rate
        optimizer.found_inf = self.diverged
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float64, device=device)

    def __call__(self) -> None:
        """Train with the next batch."""
        draw = self._draws.map(lambda drawn: drawn.index_select(0, self._number).squeeze(0))
        loss = _loss(self._model, *self._batches.training(draw))
        self.losses.index_copy_(0, self._number, loss.detach().view(1))
        self.diverged.logical_or_(within_limit(loss.detach()).logical_not())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._number += 1

    def warm_up(self) -> None:
        """Take the first step a few times and leave no trace of it but memory that is set up."""
        start = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        with forked_generators(self.losses.device):
            for _ in range(WARM_UPS):
                self()
                self._rewind(start)

    def _rewind(self, start: dict[str, torch.Tensor]) -> None:
        """Everything in place: the recorded step, and plans of the optimizer, know its address."""
        self._model.load_state_dict(start)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        # gradients made while recording lie in memory of the graph
        self._optimizer.zero_grad()
        self._number.zero_()
        self.losses.fill_(torch.nan)
        self.diverged.zero_()


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the model says of a batch, images (4 dimensions) with the channels innermost."""
    return model(x.contiguous(memory_format=LAYOUT) if x.ndim == 4 else x)


def _loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of all predictions of a batch, 0-d."""
    return functional.cross_entropy(logits(model, x).flatten(0, -2), y.flatten())
