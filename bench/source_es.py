"""The source document's training without gradients, as it stands there: what es.py is timed
against.

A population in float64, one member after another, each a few NumPy calls that numba compiles; the
reward of a member is 1 / NMSE. Its "relu" is `where(h < 0, h, 0)`, the negative part: of w1, b1,
b2 and w3 with the other sign it is the network of relus. The document's loop runs 5,000 iterations
and prints each; here one is a call, and its noise another. It needs numba, and scipy, by which
numba multiplies matrices: ``pip install "evokernels[bench]"``. As it stands there the products
are shared out to all cores, which are slower together than one: they are too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from evokernels.errors import BackendError

__all__ = ["NUMBERS", "POPULATION", "SAMPLES", "SHAPES", "SIGMA", "STEP", "SourceProgram", "curve"]

SAMPLES, POPULATION, SIGMA, STEP = 10_000, 100, 0.01, 0.0001

IL, HL1, HL2, OL = 1, 10, 10, 1  # nodes of each layer
# in the order in which they lie in the vector of all
SHAPES = {"w1": (HL1, IL), "w2": (HL2, HL1), "w3": (OL, HL2), "b1": (HL1, 1), "b2": (HL2, 1)}
ENDS = np.cumsum([math.prod(shape) for shape in SHAPES.values()]).tolist()
NUMBERS = ENDS[-1]

Iteration = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]


def curve(s: np.ndarray) -> np.ndarray:
    """What the network is to make of its inputs."""
    return 2 * s**2 + 5


class SourceProgram:
    """The compiled program; numba compiles each function when it is called first.

    Args:
        s: inputs, float64 (1, samples).

    Raises:
        BackendError: numba, scipy or threadpoolctl cannot be loaded.
    """

    def __init__(self, s: np.ndarray) -> None:
        try:
            from numba import jit
            from scipy.linalg import cython_blas  # noqa: F401 loads what shall be limited
            from threadpoolctl import ThreadpoolController
        except ImportError as error:
            raise BackendError(
                "the source's program needs numba, scipy and threadpoolctl, but: "
                f'{error}; install them with: pip install "evokernels[bench]"'
            ) from None
        self._libraries = ThreadpoolController()
        self._draw, self._iterate = _compiled(s, curve(s), jit)

    def on_one_thread(self) -> AbstractContextManager[object]:
        """Keeps products of matrices on the calling thread for as long as the block lasts."""
        return self._libraries.limit(limits=1, user_api="blas")

    def draw(self, members: int) -> np.ndarray:
        """Noise of a population, float64 (members, NUMBERS), from numba's generator."""
        return self._draw(members)

    def iterate(self, w: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, float]:
        """One iteration from w, float64 (NUMBERS,): w after it, and its NMSE."""
        return self._iterate(w, noise)


def _compiled(
    s: np.ndarray, x: np.ndarray, jit: Callable
) -> tuple[Callable[[int], np.ndarray], Iteration]:
    """The document's functions, with its expressions, but for what it says twice."""
    sigma, alpha, numbers = SIGMA, STEP, NUMBERS
    end_w1, end_w2, end_w3, end_b1, _ = ENDS
    shape_w1, shape_w2, shape_w3, shape_b1, shape_b2 = SHAPES.values()

    @jit
    def draw(npop: int) -> np.ndarray:
        return np.random.randn(npop, numbers)  # noqa: NPY002 as the document has it

    @jit
    def predict(
        s: np.ndarray,
        w1: np.ndarray,
        w2: np.ndarray,
        w3: np.ndarray,
        b1: np.ndarray,
        b2: np.ndarray,
    ) -> np.ndarray:
        h1 = np.dot(w1, s) + b1
        h1 = np.where(h1 < 0, h1, 0)
        h2 = np.dot(w2, h1) + b2
        h2 = np.where(h2 < 0, h2, 0)
        return np.dot(w3, h2)

    @jit
    def f(out: np.ndarray) -> float:
        return np.linalg.norm(x) ** 2 / np.linalg.norm(out - x) ** 2

    @jit
    def reward(w: np.ndarray) -> float:
        w1 = w[:end_w1].reshape(shape_w1)
        w2 = w[end_w1:end_w2].reshape(shape_w2)
        w3 = w[end_w2:end_w3].reshape(shape_w3)
        b1 = w[end_w3:end_b1].reshape(shape_b1)
        b2 = w[end_b1:].reshape(shape_b2)
        return f(predict(s, w1, w2, w3, b1, b2))

    @jit
    def iterate(w: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, float]:
        npop = len(noise)
        rewards = np.zeros(npop)
        for j in range(npop):
            rewards[j] = reward(w + sigma * noise[j])
        standardised = (rewards - np.mean(rewards)) / np.std(rewards)
        w = w + alpha / (npop * sigma) * np.dot(noise.T, standardised)
        return w, 1 / reward(w)

    return draw, iterate
