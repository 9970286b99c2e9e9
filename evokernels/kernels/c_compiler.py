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
import time
from collections.abc import Sequence
from dataclasses import dataclass

from evokernels.errors import BackendError

__all__ = ["CCompiler"]

# Tried in this order where $CC names none.
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 60  # seconds after which it is given up
_PAUSE = 0.001  # seconds between two looks whether it has finished
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
            # what it has started may still write there
            with tempfile.TemporaryDirectory(
                prefix="evokernels-", ignore_cleanup_errors=True
            ) as folder:
                library, text = pathlib.Path(folder, "rule.so"), pathlib.Path(folder, "rule.c")
                text.write_text(source, encoding="utf-8")
                files = ["-x", "c", str(text), "-o", str(library), "-lm"]
                said = _run([*self.command, *options, *files], folder)
                if said is None and library.exists():
                    return library.read_bytes()
                said = said or "it makes no file, and says that all is well"
        except OSError as error:
            said = f"{error.strerror} ({error.filename})"
        raise BackendError(said)


def _run(command: Sequence[str], folder: str) -> str | None:
    """Why a compiler failed, in its own words; None if it did not.

    Args:
        folder: for its temporary files too, which are then deleted whatever becomes of it.
    """
    # into a file: a pipe would have to be read until all that it has started has ended
    with pathlib.Path(folder, "said").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder, "LC_ALL": "C"},
            start_new_session=True,
        )
        try:
            until = time.monotonic() + _TIMEOUT
            while process.poll() is None:  # `wait` looks every 50 ms only
                if time.monotonic() > until:
                    return f"it has not finished after {_TIMEOUT} seconds"
                time.sleep(_PAUSE)
        finally:
            if process.poll() is None:  # with all processes that it has started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not process.returncode:
            return None
        output.seek(0)
        said = output.read(_MOST_TOLD).strip()
    status = process.returncode
    how = f"exit code {status}" if status > 0 else f"killed by signal {-status}"
    return f"{how}; {said}"
