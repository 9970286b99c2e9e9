"""Tensors bound to rules as plans take them, and what plans are asked about."""

from __future__ import annotations

import math
import mmap
from unittest import mock

import torch

from evokernels import Genome, Term, genome
from evokernels.compiler.expr import Expr
from evokernels.compiler.lower import lower
from evokernels.kernels.device import DeviceBackend
from evokernels.kernels.plan import ARITHMETIC, STATE_DTYPES, BoundTensor
from evokernels.kernels.registry import BACKENDS
from evokernels.terms import average, g, m, v

# Those that take their numbers from the host.
HOST_BACKENDS = {
    name: backend for name, backend in BACKENDS.items() if not isinstance(backend, DeviceBackend)
}

FORMATS = [(dtype, state) for dtype, states in STATE_DTYPES.items() for state in states]
PLAIN = {"wd_log10": -math.inf, "lr_log10": 0}
SIGN = Genome(term_types=[Term.SIGN_GRAD], **PLAIN)
MOMENTUM = Genome(term_types=[Term.MOMENTUM], beta1=0.0, **PLAIN)  # m is the gradient itself
BOTH = Genome(
    term_types=["MOMENTUM", "RMS_NORM"], alphas=[1.0, 1.0], beta1=0.5, beta2=0.75, **PLAIN
)


def own(*formulas: Expr, **genes) -> Genome:
    """A genome of terms that nobody else hears of."""
    with mock.patch.object(genome, "_own_terms", {}):
        terms = [genome.add_own_term(f"OWN{i}", formula) for i, formula in enumerate(formulas)]
        return Genome(terms, [1.0] * len(terms), **{**PLAIN, **genes})


# As many operands as there may be, in single operations that torch rounds alike.
FULL = own(
    *(average(x, beta) for x, beta in ((g, 0.875), (abs(g), 0.5), (g * g, 0.25), (g - 1, 0.75))),
    *(m, v),
    beta1=0.5,
    beta2=0.75,
)


def bound(genome, parameter, state=None, rounding=None):
    program = lower(genome).program
    moments = {
        name: torch.zeros_like(parameter, dtype=state or ARITHMETIC[parameter.dtype])
        for name in program.state
    }
    return BoundTensor(program, parameter, moments, rounding)


def everything(tensor):
    return [tensor.parameter, *tensor.moments.values()]


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(*(x.cpu().contiguous().view(integers) for x in (a, b)))


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# more elements than 32 bits can count
BEYOND = 2**31 + 100_000


def untouched(elements):
    """Memory of which only the pages that are used exist."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE; mmap has the name from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)
