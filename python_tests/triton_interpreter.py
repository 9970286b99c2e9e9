"""The Triton backend on the CPU: its own kernels, run by Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import numpy as np

from evokernels.kernels.triton import (
    OPTIONS,
    TritonBackend,
    TritonKernel,
    module_of,
)

__all__ = ["TritonInterpreted"]

# So few that a block has several chunks, and an update several blocks.
RESIDENT = 3


class TritonInterpreted(TritonBackend):
    """Runs on CPU tensors."""

    name = "triton interpreted"

    def why_not(self, program, device, dtype):
        return None if device.type == "cpu" else f"it is interpreted, the tensors are on {device}"

    def load(self, kinds, words, device):
        with interpreted():
            return InterpretedKernel(kinds, words, device, RESIDENT, OPTIONS)


class InterpretedKernel(TritonKernel):
    def update(self, words, blocks):
        with interpreted():
            super().update(words, blocks)

    def squares(self, words, blocks):
        with interpreted():
            super().squares(words, blocks)


@contextlib.contextmanager
def interpreted():
    """Functions that are decorated here are interpreted, and so are those that are called."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_fma", fused))
        stack.enter_context(mock.patch.object(InterpretedFunction, "__call__", call))
        stack.enter_context(mock.patch("evokernels.kernels.triton.module_of", interpreted_module))
        for module, functions in library().items():
            stack.enter_context(mock.patch.multiple(module, **functions))
        yield


@functools.cache
def library():
    """Triton's own functions, which were decorated for the compiler when it was imported."""
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    modules = (tl, tl.standard, tl.random)
    decorated = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}
    replaced = {i: InterpretedFunction(f.fn) for i, f in decorated.items()}
    return {
        module: {
            name: replaced[id(value)]
            for name, value in vars(module).items()
            if id(value) in replaced
        }
        for module in modules
    }


@functools.cache
def interpreted_module(rendered):
    import triton

    module = module_of.__wrapped__(rendered)
    module.core = triton.language.core  # which makes the interpreter take its functions over too
    return module


def call(self, *args, **kwargs):
    """A function that a kernel calls. Triton's own takes the language over for each call, which
    costs most of the time, and never gives it back to the compiler."""
    return self.rewrite()(*args, **kwargs)


def fused(self, x, y, z):
    """Multiply and add with one rounding, as processors do; the interpreter's own rounds twice.

    Rounded twice here too, but from so many more digits that it shows in one of 2^29 float32 and
    one of 2^11 float64, by half a last digit.
    """
    from triton.runtime.interpreter import TensorHandle

    wider = np.float64 if z.data.dtype == np.float32 else np.longdouble
    exact = x.data.astype(wider) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)
