"""Kernels of rules that no cover serves, made by the C compiler of the machine they run on.

A rule is compiled once for its structure, and kept on disk (`cache.py`). What is loaded is a
private copy of bytes whose digest was right: nobody can change it in between.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence

from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import C_FLAGS, STORED, own_symbol, render_own
from evokernels.compiler.spelling import DTYPES
from evokernels.errors import BackendError
from evokernels.kernels import native
from evokernels.kernels.cache import cached
from evokernels.kernels.cuda_source import with_included

__all__ = ["OwnKernels", "compiler_name", "own_kernels"]

# Tried in this order where $CC names none.
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 60  # seconds after which a compiler is given up
_MOST_LOADED = 256  # of which no plan needs to be left; each takes five mappings of memory
_MOST_TOLD = 2000  # characters of what a compiler says


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


def compiler_name() -> str:
    """What people call the compiler."""
    return shlex.join([os.path.basename(word) for word in _find_compiler()])


_one_at_a_time = threading.Lock()


def _renew_lock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


# another thread may have held it, which a forked process does not have
os.register_at_fork(after_in_child=_renew_lock)


@functools.lru_cache(_MOST_LOADED)
def _known(
    program: Program, dtype: str, state: str, environment: tuple[str | None, ...]
) -> OwnKernels | str:
    """The kernels, or why there are none."""
    del environment  # another one may have another compiler
    try:
        command = _find_compiler()
        source = with_included(render_own(program, dtype, state), "rule.c", set())
        options = _options()
        decisive = [source, *options, platform.machine(), *_identity(command)]
        code = cached(decisive, lambda: _compiled([*command, *options], source, program))
        return _loaded(code, (dtype, state))
    except BackendError as error:
        return str(error)


def _find_compiler() -> list[str]:
    """Its command: $CC, or else the first on the PATH."""
    chosen = os.environ.get("CC")
    if chosen:
        with contextlib.suppress(ValueError):  # quotes that are not closed
            command = shlex.split(chosen)
            if command and shutil.which(command[0]):
                return command
        raise BackendError(f"CC is {chosen!r}, and there is no such command")
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise BackendError(
        f"there is no C compiler to compile this rule with: none of {', '.join(_COMPILERS)} is on "
        "the PATH; install one, or set CC"
    )


def _identity(command: Sequence[str]) -> list[str]:
    """What tells a compiler from another one, without running it."""
    identity = list(command)
    for path in filter(None, map(shutil.which, command)):
        status = os.stat(path)
        identity.append(f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}")
    return identity


def _options() -> list[str]:
    """For this machine alone, with the instructions for which the package's own kernels run."""
    level = native.instruction_set()
    machine = [f"-march={level}"] if level.startswith("x86-64") else []
    return [*C_FLAGS, "-fPIC", "-shared", "-DEVK_ONE_INSTRUCTION_SET", *machine]


def _compiled(command: Sequence[str], source: str, program: Program) -> bytes:
    """A shared library, as bytes."""
    try:
        with tempfile.TemporaryDirectory(prefix="evokernels-") as folder:
            library = pathlib.Path(folder, "rule.so")
            files = ["-x", "c", "-", "-o", str(library), "-lm"]
            said = _run([*command, *files], source, folder)
            if said is None:
                return library.read_bytes()
    except OSError as error:
        said = f"{error.strerror} ({error.filename})"
    raise BackendError(f"{command[0]} cannot compile the rule {_in_words(program)}: {said}")


def _run(command: Sequence[str], source: str, folder: str) -> str | None:
    """Why a compiler failed, in its own words; None if it did not.

    Args:
        folder: for its temporary files too, which are then deleted whatever becomes of it.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": folder, "LC_ALL": "C"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(source, _TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"it has not finished after {_TIMEOUT} seconds"
    finally:
        if process.poll() is None:  # with all processes that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if not process.returncode:
        return None
    status = process.returncode
    how = f"exit code {status}" if status > 0 else f"killed by signal {-status}"
    return f"{how}; {output.strip()[:_MOST_TOLD]}"


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
    """The assignments of a program, in one line."""
    names = {f"k{i}": f"[{role}]" for i, role in enumerate(program.scalars)}
    return "; ".join(
        f"{line.target} = {OPS[line.op].text.format(*(names.get(a, a) for a in line.args))}"
        for line in program.lines
    )
