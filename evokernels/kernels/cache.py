"""Compiled kernels on disk: what was compiled once on this machine is read from then on.

One file an entry, named after everything that decides what is in it; the file begins with the
digest of the rest. Files appear whole (written elsewhere, then renamed), so that any number of
processes may share the folder, and any of them may be deleted at any time. Folder and files are
checked as they have been opened: what a path leads to may change in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

__all__ = ["cached", "folder"]

_DIGEST = hashlib.sha256
_MOST_KEPT = 10_000  # entries, of some 20 kB each
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
        text = part.encode(errors="surrogateescape")  # paths may be of any bytes
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
        with _opened(path.parent) as folder, _file(folder, path.name, "rb") as file:
            status = os.fstat(file.fileno())
            _check_owner(status)
            content = file.read() if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return None
    size = _DIGEST().digest_size
    digest, code = content[:size], content[size:]
    return code if _DIGEST(code).digest() == digest else None


def _write(path: pathlib.Path, code: bytes) -> None:
    for directory in reversed(path.parents):
        if not directory.exists():
            directory.mkdir(mode=0o700, exist_ok=True)  # "parents=True" would ask the umask
    with _opened(path.parent) as folder:
        temporary = f"incomplete-{secrets.token_hex(8)}"
        try:
            with _file(folder, temporary, "xb") as file:
                file.write(_DIGEST(code).digest() + code)
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        _make_room(folder)


@contextlib.contextmanager
def _opened(directory: pathlib.Path) -> Iterator[int]:
    """A folder in which nobody else can put code that we would run."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check_owner(os.fstat(folder))
        yield folder
    finally:
        os.close(folder)


def _file(folder: int, name: str, mode: str) -> BinaryIO:
    """A file of an opened folder, for this user alone if it is new."""
    # a link may lead to anything, a pipe would be waited for
    how = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(name, mode, opener=lambda n, flags: os.open(n, flags | how, 0o600, dir_fd=folder))


def _make_room(folder: int) -> None:
    """Delete the oldest tenth where there are too many, with what killed processes have left."""
    names = os.listdir(folder)
    if len(names) > _MOST_KEPT:
        written = {}
        for name in names:
            with contextlib.suppress(OSError):  # another process makes room too
                written[name] = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns
        for name in sorted(written, key=written.get)[: len(names) // 10]:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)


def _check_owner(status: os.stat_result) -> None:
    """PermissionError where somebody else may have written."""
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
