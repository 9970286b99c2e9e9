"""Kernels of rules that no cover serves, made by the C compiler of the machine they run on.

A rule is compiled once for its structure, and kept on disk (`cache.py`). What is loaded is a
private copy of bytes whose digest was right: nobody can change it in between.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import os
import pathlib
import platform
import tempfile
import threading
import weakref

from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import C_FLAGS, STORED, own_symbol, render_own
from evokernels.compiler.spelling import DTYPES
from evokernels.errors import BackendError
from evokernels.kernels import native
from evokernels.kernels.c_compiler import CCompiler
from evokernels.kernels.cache import cached
from evokernels.kernels.cuda_source import with_included

__all__ = ["OwnKernels", "own_kernels"]

# That no plan needs: each takes five mappings of memory, of which there are 65,530.
_MOST_KEPT = 256

_MOST_TOLD = 300  # characters of a rule, so that what the compiler says is not lost behind it

# Where $CC has the contrary. It would not only round otherwise: a library linked with it makes
# the processor flush subnormal numbers to zero, in all of the process that loads it.
_EXACT = ("-fno-fast-math", "-fno-unsafe-math-optimizations")


class OwnKernels:
    """Addresses of the kernels of one rule, valid as long as this object lives.

    Attributes:
        direct: reads and writes tensors of the dtypes that were asked for; None where only
            `staged` serves them.
        staged: reads and writes buffers of the arithmetic type.
    """

    def __init__(self, library: ctypes.CDLL, dtype: str, state: str) -> None:
        pair, arithmetic = (dtype, state), DTYPES[dtype].arithmetic
        self.staged = native.address_of(library, own_symbol(arithmetic, arithmetic))
        self.direct = native.address_of(library, own_symbol(*pair)) if pair in STORED else None
        unload = weakref.finalize(self, _ctypes.dlclose, library._handle)
        unload.atexit = False  # other threads may still run


def own_kernels(program: Program, dtype: str, state: str) -> OwnKernels:
    """The kernels for parameters of one dtype with moments of another.

    Compiled or read from disk at the first call; so is a failure kept, until $CC or $PATH change.

    Raises:
        BackendError: there is no compiler, or it cannot compile or load this, and why.
    """
    environment = os.environ.get("CC"), os.environ.get("PATH")
    with _one_at_a_time:
        kernels = _known(program, dtype, state, environment)
    if isinstance(kernels, str):
        raise BackendError(kernels)
    return kernels


_one_at_a_time = threading.Lock()


def _renew_lock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


# another thread may have held it, which a forked process does not have
os.register_at_fork(after_in_child=_renew_lock)


@functools.lru_cache(_MOST_KEPT)
def _known(
    program: Program, dtype: str, state: str, environment: tuple[str | None, ...]
) -> OwnKernels | str:
    """The kernels, or why there are none."""
    del environment  # another one may have another compiler
    try:
        compiler = CCompiler.find()
        source = with_included(render_own(program, dtype, state), "rule.c", set())
        options = _options()
        decisive = [source, *options, platform.machine(), *compiler.identity()]
        pair = dtype, state

        def compiled() -> bytes:
            code = _compiled(compiler, source, options, program)
            _loaded(code, pair)  # what cannot be is not kept either
            return code

        return _loaded(cached(decisive, compiled), pair)
    except BackendError as error:
        return str(error)


def _options() -> list[str]:
    """For this machine alone, with the instructions for which the package's own kernels run."""
    level = native.instruction_set()
    machine = [f"-march={level}"] if level.startswith("x86-64") else []
    shared = ["-fPIC", "-shared", "-DEVK_ONE_INSTRUCTION_SET"]
    return [*_EXACT, *C_FLAGS, *shared, *machine]


def _compiled(compiler: CCompiler, source: str, options: list[str], program: Program) -> bytes:
    try:
        return compiler.shared_library(source, options)
    except BackendError as error:
        rule = _in_words(program)
        raise BackendError(f"{compiler.name} cannot compile the rule {rule}: {error}") from None


def _loaded(code: bytes, pair: tuple[str, str]) -> OwnKernels:
    """What is in a library, from a file of its own, which nobody else can write to."""
    try:
        with tempfile.TemporaryDirectory(prefix="evokernels-") as folder:
            path = pathlib.Path(folder, "rule.so")
            path.write_bytes(code)
            return OwnKernels(ctypes.CDLL(str(path)), *pair)
    except AttributeError as error:  # not a file that a compiler has made of the source
        raise BackendError(f"a compiled rule lacks a function ({error})") from None
    except OSError as error:
        raise BackendError(
            f"a compiled rule cannot be loaded ({error}); if programs may not run from "
            f"{tempfile.gettempdir()}, set TMPDIR to a folder from which they may"
        ) from None


def _in_words(program: Program) -> str:
    """The assignments of a program, or the first of them, in one line."""
    names = {f"k{i}": f"[{role}]" for i, role in enumerate(program.scalars)}
    text = "; ".join(
        f"{line.target} = {OPS[line.op].text.format(*(names.get(a, a) for a in line.args))}"
        for line in program.lines
    )
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"
