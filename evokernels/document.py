"""Frozen data as JSON and as files: what the genomes of optimizers and networks have in common."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from evokernels.errors import EvokernelsError

__all__ = ["Document", "write_whole"]

_MOST_BYTES = 2**20


def write_whole(
    path: str | os.PathLike[str], content: bytes, unfinished: pathlib.Path | None = None
) -> None:
    """Write a file of which a reader never sees a half.

    Args:
        path: of the file.
        content: of the file.
        unfinished: a file beside it for what is not whole yet. Whoever is killed often gives one:
            nothing else is ever left behind. None: one that no other process has.

    Raises:
        OSError: it cannot be written; what was there before stays, and nothing else.
    """
    path = pathlib.Path(path)
    if unfinished is None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            write_whole(path, content, pathlib.Path(folder, "part"))
        return
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # half a file would take what is left of a full disk
        raise


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Document:
    """Base of a frozen dataclass that is read and written as a JSON object.

    A child says what it is called in messages (``NOUN``), which error they are (``ERROR``), the
    version of its fields (``SCHEMA_VERSION``), what to write in place of NaN and Infinity
    (``NO_CONSTANT``), which fields may be missing (``SOMETIMES``), and has `to_dict` and
    `from_dict`.
    """

    NOUN: ClassVar[str]
    ERROR: ClassVar[type[EvokernelsError]]
    SCHEMA_VERSION: ClassVar[int] = 1
    NO_CONSTANT: ClassVar[str]
    SOMETIMES: ClassVar[Collection[str]] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with all fields and ``schema_version``."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        raise NotImplementedError

    @classmethod
    def _fields(cls, data: Mapping[str, Any], versioned: bool) -> dict[str, Any]:
        """The fields of a dict, without ``schema_version``; raises ``ERROR`` for other ones.

        Args:
            versioned: a dict must have its version. With a version all fields must be there.
        """
        if not isinstance(data, Mapping):
            raise cls.ERROR(f"{_a(cls.NOUN)} is a JSON object, got {type(data).__name__}")
        fields = dict(data)
        for other in Document.__subclasses__():
            if other is not cls and set(other._always()) <= fields.keys():
                raise cls.ERROR(f"this is {_a(other.NOUN)}, not {_a(cls.NOUN)}")
        versioned = versioned or "schema_version" in fields
        version = fields.pop("schema_version", None if versioned else cls.SCHEMA_VERSION)
        if version != cls.SCHEMA_VERSION or isinstance(version, bool):
            raise cls.ERROR(
                f"schema_version is {version!r}, this release reads {cls.SCHEMA_VERSION}; "
                "read the file with the release of evokernels that wrote it"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise cls.ERROR(f"unknown {cls.NOUN} field {name!r}; {hint}")
        missing = [name for name in cls._always() if name not in fields]
        if versioned and missing:
            raise cls.ERROR(
                f"{cls.NOUN} lacks {', '.join(missing)}; a versioned {cls.NOUN} has them all"
            )
        return fields

    @classmethod
    def _always(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if f.name not in cls.SOMETIMES]

    def to_json(self) -> str:
        """Standard JSON (no NaN or Infinity), every digit kept, newline at the end."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; raises ``ERROR`` for text that is not valid."""
        try:
            data = json.loads(
                text, parse_constant=cls._no_constant, object_pairs_hook=cls._each_once
            )
        except (ValueError, RecursionError) as error:  # also numbers and nesting beyond all bounds
            raise cls.ERROR(f"not JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def _no_constant(cls, token: str) -> float:
        """Python's json reads NaN and Infinity, which JSON does not have."""
        raise ValueError(f"{token} is no number in JSON; {cls.NO_CONSTANT}")

    @classmethod
    def _each_once(cls, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Python's json takes the last of several values, of which nobody knows which is meant."""
        fields = dict(pairs)
        if len(fields) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name!r} is there more than once")
        return fields

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a reader never sees half a file.

        Raises:
            EvokernelsError: of type ``ERROR``, naming the file that cannot be written; what was
                there before stays.
        """
        try:
            write_whole(path, self.to_json().encode())
        except OSError as error:
            reason = error.strerror or error
            raise self.ERROR(f"cannot write {self.NOUN} {os.fspath(path)!r}: {reason}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file; raises ``ERROR`` naming the file."""
        try:
            with open(path, "rb") as file:
                content = file.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise cls.ERROR(f"it is longer than the {_MOST_BYTES:,} bytes of any {cls.NOUN}")
            return cls.from_json(content.decode("utf-8-sig"))  # Windows may write a mark in front
        except (OSError, UnicodeDecodeError, cls.ERROR) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            if isinstance(error, UnicodeDecodeError):
                reason = "it is no text in UTF-8, as JSON is"
            raise cls.ERROR(f"cannot read {cls.NOUN} {os.fspath(path)!r}: {reason}") from None
