"""`EvolutionStrategy`: a module trained by scores of perturbed copies, without backpropagation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from evokernels.errors import StrategyError
from evokernels.es.centre import Centre, common_seed
from evokernels.es.checks import check_groups, check_optimizer, positive, trainable, whole
from evokernels.es.utility import UTILITIES, ordered, scores_of
from evokernels.kernels.memory import overlaps_itself
from evokernels.kernels.noise import ModelNoise, NoisyTensor
from evokernels.optim.checks import check_apart

__all__ = ["EvolutionStrategy"]

# It moves no parameter, and what is divided by it is finite.
_LEAST_SIGMA = sys.float_info.min


class EvolutionStrategy:
    """Trains any module, by any optimizer, from scores alone.

    In each generation ``population`` members are scored, whose parameters are p + sigma * eps_j
    with standard normal eps_j. Scores become utilities u_j, and every parameter gets::

        grad = -1 / (population * sigma) * sum_j u_j * eps_j

    on which the optimizer takes its step: downhill, so that the fitness rises. ::

        optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.evolved_2025)
        strategy = EvolutionStrategy(model, optimizer, population=100, sigma=0.01)
        for _ in range(generations):
            strategy.tell(strategy.ask(lambda model: -loss(model(x), y)))

    Noise is never stored: it is computed where it is needed from seed, generation, member,
    parameter and element, so memory does not grow with the population, and neither threads nor
    devices nor who scores which members change it. Members may be scored anywhere, in any order,
    with `perturbed`; whoever is told the same scores makes the same step.

    Parameters with ``requires_grad``, in float32, float64, bfloat16 or float16 and however they
    lie in memory, are perturbed; frozen ones are not. Tied ones are perturbed once. A 16-bit
    parameter is rounded to nearest after it was perturbed: sigma should exceed its spacing.

    Args:
        model: the module, changed in place.
        optimizer: holds all its parameters that require gradients.
        population: members in a generation, from 2 on; even where `antithetic`.
        sigma: standard deviation of the noise.
        seed: of the noise, and of what members find in torch's generators; below 2^64.
        antithetic: members 2k and 2k + 1 have the same noise with opposite signs.
        utility: "standardized" (scores minus their mean, over their standard deviation) or
            "centered_ranks" (from -1/2 to 1/2).
        sigma_decay: sigma is multiplied by it after every generation, in (0, 1], but stays a
            number above zero.
        backend: "auto", or a name in `evokernels.kernels.noise.NOISE_BACKENDS`.

    Attributes:
        generation: how many were told.
        sigma: of this generation.

    Raises:
        StrategyError: options, model or optimizer that it cannot use.
        OptimizerError: parameters that no kernel can write, or that share memory.
        BackendError: the backend asked for cannot run.

    Source: Salimans, Ho, Chen, Sidor & Sutskever 2017, "Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning", algorithms 1 and 2.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        population: int = 100,
        sigma: float = 0.01,
        seed: int = 0,
        antithetic: bool = False,
        utility: str = "standardized",
        sigma_decay: float = 1.0,
        backend: str = "auto",
    ) -> None:
        self.population = whole("population", population, 2, 2**32)
        if not isinstance(antithetic, bool):
            raise StrategyError(f"antithetic must be True or False, got {antithetic!r}")
        if antithetic and population % 2:
            raise StrategyError(f"an antithetic population must be even, got {population}")
        if utility not in UTILITIES:
            raise StrategyError(
                f"unknown utility {utility!r}; use {' or '.join(map(repr, UTILITIES))}"
            )
        self.model, self.optimizer = model, optimizer
        self.antithetic, self.utility = antithetic, utility
        self.sigma = positive("sigma", sigma, math.inf)
        self.sigma_decay = positive("sigma_decay", sigma_decay, 1.0)
        self.seed = whole("seed", seed, 0, 2**64)
        self.generation = 0
        self._backend = backend
        self._away = False
        parameters = trainable(model)
        check_apart(list(parameters.values()))
        check_optimizer(optimizer)
        check_groups(optimizer, model, parameters)
        self._bound([p.detach() for p in parameters.values()], parameters)  # or says why not

    def ask(self, fitness: Callable[[torch.nn.Module], Any]) -> np.ndarray:
        """The scores of all members of this generation: (population,), float64.

        Args:
            fitness: of the model, which is the member: one number, higher is better. It is called
                without gradients (`torch.enable_grad` brings them back) and finds torch's
                generators and the model's buffers in the same state for each member; afterwards
                both, and the parameters, are what they were before, also where it raises.
                So members do not move the running means of a BatchNorm: a forward pass of the
                model between generations does.
        """
        scores = []
        with self._kept() as centre, torch.no_grad():
            for member in range(self.population):
                self._place(centre, member)
                scores.append(_detached(fitness(self.model)))
        return np.array([float(score) for score in scores])

    @contextmanager
    def perturbed(self, member: int) -> Iterator[torch.nn.Module]:
        """The model as one member, under the conditions of `ask`, for as long as the block lasts.

        Args:
            member: from 0 on, below `population`.
        """
        whole("member", member, 0, self.population)
        with self._kept() as centre, torch.no_grad():
            self._place(centre, member)
            yield self.model

    def noises(self) -> list[tuple[int, float]]:
        """The noise of each member of this generation: its number, and what it is multiplied by."""
        self._check_not_away("say how members differ from it")
        return [self._noise_of(member) for member in range(self.population)]

    def tell(self, scores: Sequence[float] | np.ndarray | torch.Tensor) -> None:
        """One step of the optimizer by the scores of all members; the next generation begins.

        NaN and -inf count as the worst finite score, +inf as the best; scores that are all equal
        make a gradient of zero.

        Args:
            scores: (population,), in the order of members.

        Raises:
            StrategyError: not one number for each member, or none is finite; nothing has changed.
        """
        self._check_not_away("tell")
        utilities = UTILITIES[self.utility](ordered(scores_of(scores, self.population)))
        if self.antithetic:
            utilities = utilities[0::2] - utilities[1::2]
        parameters = trainable(self.model)
        check_groups(self.optimizer, self.model, parameters)
        gradients = [_gradient(parameter) for parameter in parameters.values()]
        weights = utilities * (-1 / (self.population * self.sigma))
        self._bound(gradients, parameters).estimate(self.seed, self.generation, weights.tolist())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = None  # of a generation before it was frozen
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.generation += 1
        self.sigma = max(self.sigma * self.sigma_decay, _LEAST_SIGMA)

    def state_dict(self) -> dict[str, Any]:
        """What changes from generation to generation, and the seed.

        With the states of model and optimizer a run goes on bit by bit where it was; the options
        are those of the object that loads it.
        """
        return {"seed": self.seed, "generation": self.generation, "sigma": self.sigma}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            StrategyError: not such a state; nothing has changed.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, dict) or state_dict.keys() != expected.keys():
            given = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise StrategyError(f"the state must have {', '.join(expected)}, got {given}")
        seed = whole("seed", state_dict["seed"], 0, 2**64)
        generation = whole("generation", state_dict["generation"], 0, 2**32)
        self.sigma = positive("sigma", state_dict["sigma"], math.inf)
        self.seed, self.generation = seed, generation

    @contextmanager
    def _kept(self) -> Iterator[Centre]:
        """The model may be a member until the block ends."""
        self._check_not_away("score members")
        random_seed = common_seed(self.seed, self.generation)
        centre = Centre(self.model, trainable(self.model), random_seed, self._backend)
        with centre.kept():
            self._away = True
            try:
                yield centre
            finally:
                self._away = False

    def _noise_of(self, member: int) -> tuple[int, float]:
        drawn, sign = (member // 2, 1 - 2 * (member % 2)) if self.antithetic else (member, 1)
        return drawn, sign * self.sigma

    def _place(self, centre: Centre, member: int) -> None:
        centre.place(self.seed, self.generation, *self._noise_of(member))

    def _bound(
        self, targets: Sequence[torch.Tensor], parameters: dict[int, torch.nn.Parameter]
    ) -> ModelNoise:
        noisy = [NoisyTensor(*pair) for pair in zip(targets, parameters, strict=True)]
        return ModelNoise(noisy, self._backend)

    def _check_not_away(self, what: str) -> None:
        if self._away:
            raise StrategyError(
                f"cannot {what} while the model is a member; leave the block of `perturbed` first"
            )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Memory for a gradient: that of the last one, where each element has a place of its own."""
    gradient = parameter.grad
    if gradient is None or gradient.is_neg() or overlaps_itself(gradient):
        return torch.empty_like(parameter.detach(), memory_format=torch.preserve_format)
    return gradient


def _detached(score: Any) -> Any:
    """A number; a tensor as a copy that nothing overwrites, so that no member waits for a GPU."""
    if isinstance(score, torch.Tensor) and score.numel() == 1 and not score.is_complex():
        return score.detach().reshape(()).to(torch.float64, copy=True)
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(score.shape)}" if hasattr(score, "shape") else ""
        raise StrategyError(
            f"fitness must return one number, got {type(score).__name__}{shape}; "
            "add up or average what it scores"
        ) from None
