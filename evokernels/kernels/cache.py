"""Compiled kernels on disk: what was compiled once on this machine is read from then on.

One file an entry, named after everything that decides what is in it; the file begins with the
digest of the rest. Files appear whole (written elsewhere, then renamed), so that any number of
processes may share the folder, and any of them may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence

__all__ = ["cached", "folder"]

_DIGEST = hashlib.sha256
_told: set[object] = set()  # folders of which this process has warned


def folder() -> pathlib.Path:
    """Where entries are: ``$EVOKERNELS_CACHE_DIR``, else ``$XDG_CACHE_HOME/evokernels``, else
    ``~/.cache/evokernels``; in it, ``kernels``.
    """
    chosen = os.environ.get("EVOKERNELS_CACHE_DIR")
    if not chosen:
        # "All paths set in these environment variables must be absolute", or else be ignored
        # (XDG Base Directory Specification)
        base = os.environ.get("XDG_CACHE_HOME", "")
        chosen = os.path.join(base if os.path.isabs(base) else "~/.cache", "evokernels")
    return pathlib.Path(chosen).expanduser() / "kernels"


def cached(decisive: Sequence[str], compile: Callable[[], bytes]) -> bytes:
    """What `compile` returns, from disk if it has been there before.

    A folder that cannot be used is told in a RuntimeWarning, once in a process.

    Args:
        decisive: everything on which the result depends, this package's version apart.
    """
    try:
        directory = folder()
    except RuntimeError as error:  # pathlib finds no home
        _tell("the user's cache folder", error)
        return compile()
    path = directory / _name(decisive)
    code = _read(path)
    if code is None:
        code = compile()
        try:
            _write(path, code)
        except OSError as error:
            _tell(directory, error)
    return code


def _name(decisive: Sequence[str]) -> str:
    digest = _DIGEST()
    for part in (_version(), *decisive):
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("evokernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read(path: pathlib.Path) -> bytes | None:
    """An entry; None if there is none, or not the one that was written."""
    try:
        _check_owner(path.parent)
        content = path.read_bytes()
    except OSError:
        return None
    size = _DIGEST().digest_size
    digest, code = content[:size], content[size:]
    return code if _DIGEST(code).digest() == digest else None


def _write(path: pathlib.Path, code: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(path.parent)
    handle, temporary = tempfile.mkstemp(prefix="incomplete-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_DIGEST(code).digest() + code)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _check_owner(directory: pathlib.Path) -> None:
    """PermissionError where others could put code that we would run."""
    status = directory.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(
            f"it belongs to user {status.st_uid}, not {os.getuid()}; "
            "set EVOKERNELS_CACHE_DIR to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError("others may write there; chmod 700 it")


def _tell(where: object, error: Exception) -> None:
    if where not in _told:
        _told.add(where)
        reason = getattr(error, "strerror", None) or error  # without the temporary file's name
        warnings.warn(
            f"compiled kernels cannot be kept in {where} ({reason}); every process compiles them",
            RuntimeWarning,
            stacklevel=3,
        )
