"""The C compiler of the machine: found, told from others, run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from evokernels.errors import BackendError

__all__ = ["CCompiler"]

# Tried in this order where $CC names none.
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 60  # seconds after which it is given up
_MOST_TOLD = 2000  # characters of what it says


@dataclass(frozen=True)
class CCompiler:
    """A command that takes the options of GCC."""

    command: tuple[str, ...]

    @classmethod
    def find(cls) -> CCompiler:
        """$CC, or else the first on the PATH; BackendError if there is none."""
        chosen = os.environ.get("CC")
        if chosen:
            with contextlib.suppress(ValueError):  # quotes that are not closed
                command = shlex.split(chosen)
                if command and shutil.which(command[0]):
                    return cls(tuple(command))
            raise BackendError(f"CC is {chosen!r}, and there is no such command")
        for name in _COMPILERS:
            if shutil.which(name):
                return cls((name,))
        raise BackendError(
            f"there is no C compiler to compile this rule with: none of {', '.join(_COMPILERS)} is "
            "on the PATH; install one, or set CC"
        )

    @property
    def name(self) -> str:
        """What people call it."""
        return shlex.join(os.path.basename(word) for word in self.command)

    def identity(self) -> list[str]:
        """What tells it from other compilers and versions, found without running it."""
        identity = list(self.command)
        for path in filter(None, map(shutil.which, self.command)):
            status = os.stat(path)
            identity.append(f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}")
        return identity

    def shared_library(self, source: str, options: Sequence[str]) -> bytes:
        """A shared library made of one source file; BackendError with what the compiler says."""
        try:
            with tempfile.TemporaryDirectory(prefix="evokernels-") as folder:
                library = pathlib.Path(folder, "rule.so")
                files = ["-x", "c", "-", "-o", str(library), "-lm"]
                said = _run([*self.command, *options, *files], source, folder)
                if said is None:
                    return library.read_bytes()
        except OSError as error:
            said = f"{error.strerror} ({error.filename})"
        raise BackendError(said)


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
