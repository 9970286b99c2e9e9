"""Compiled kernels on disk: found again, never believed when damaged, never in the way."""

import os
import pathlib
import stat
import subprocess
import sys
import threading

import pytest

from evokernels.kernels import cache
from evokernels.kernels.cache import cached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_told", set())
    return tmp_path / "cache" / "kernels"


class Compiler:
    """Counts how often it is asked."""

    def __init__(self, code=b"code " * 1000):
        self.code, self.calls = code, 0

    def __call__(self):
        self.calls += 1
        return self.code


def test_compiled_once(folder):
    compiler = Compiler()
    assert cached(["source", "sm_75"], compiler) == compiler.code
    assert cached(["source", "sm_75"], compiler) == compiler.code
    assert compiler.calls == 1
    assert len(list(folder.iterdir())) == 1


def test_everything_decisive_counts(monkeypatch):
    compiler = Compiler()
    variants = [["a", "b"], ["ab", ""], ["a", "c"], ["a"], ["b", "a"], ["a", "b", ""]]
    for decisive in variants:
        cached(decisive, compiler)
    assert compiler.calls == len(variants)
    monkeypatch.setattr(cache, "_version", lambda: "another")
    cached(variants[0], compiler)
    assert compiler.calls == len(variants) + 1


def test_empty_code_is_code():
    compiler = Compiler(b"")
    assert cached(["a"], compiler) == cached(["a"], compiler) == b""
    assert compiler.calls == 1


def truncated(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped_in_the_code(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def flipped_in_the_digest(content):
    return bytes([content[0] ^ 1]) + content[1:]


def longer(content):
    return content + b"\0"


@pytest.mark.parametrize(
    "damage", [truncated, emptied, flipped_in_the_code, flipped_in_the_digest, longer]
)
def test_a_damaged_entry_is_compiled_anew(folder, damage):
    compiler = Compiler()
    cached(["a"], compiler)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert cached(["a"], compiler) == compiler.code
    assert compiler.calls == 2
    assert entry.read_bytes() == whole  # mended


def planted_by_others(entry):
    """In a folder that was open to all until a moment ago."""
    try:
        os.chown(entry, 65534, -1)
    except PermissionError:  # which takes root
        entry.chmod(0o666)


def linked(entry):
    entry.rename(entry.parent.parent / "elsewhere")
    entry.symlink_to(entry.parent.parent / "elsewhere")


def a_pipe(entry):
    entry.unlink()
    os.mkfifo(entry)


@pytest.mark.parametrize("plant", [planted_by_others, linked, a_pipe])
def test_only_a_file_of_ones_own_is_an_entry(folder, plant):
    compiler = Compiler()
    cached(["a"], compiler)
    (entry,) = folder.iterdir()
    plant(entry)
    for _ in range(2):
        assert cached(["a"], compiler) == compiler.code
    assert compiler.calls == 2
    assert entry.lstat().st_mode == stat.S_IFREG | 0o600  # one's own by now


def test_what_is_checked_is_what_is_read(folder, tmp_path, monkeypatch):
    """Though somebody who may rename what is above puts another folder there in between."""
    compiler = Compiler()
    cached(["a"], compiler)
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path / "evil"))
    cached(["a"], Compiler(b"evil"))
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(folder.parent))
    check, swapped = cache._check_owner, []

    def checked(status):
        check(status)
        if not swapped:
            swapped.append(folder.rename(tmp_path / "aside"))
            (tmp_path / "evil" / "kernels").rename(folder)

    monkeypatch.setattr(cache, "_check_owner", checked)
    assert cached(["a"], compiler) == compiler.code
    assert swapped


def test_the_folder_is_private(folder):
    umask = os.umask(0)
    try:
        cached(["a"], Compiler())
    finally:
        os.umask(umask)
    for directory in (folder, folder.parent):
        assert directory.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o077 == 0


def test_the_folder_does_not_grow_for_ever(folder, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_KEPT", 20)
    cached(["first"], Compiler())
    for age, path in enumerate([next(folder.iterdir()), folder / "incomplete-of-a-killed-process"]):
        path.touch()
        os.utime(path, (age, age))
    for i in range(50):
        cached([str(i)], Compiler())
    assert 18 <= len(list(folder.iterdir())) <= 20
    assert not (folder / "incomplete-of-a-killed-process").exists()
    kept, gone = Compiler(), Compiler()
    cached(["49"], kept)
    cached(["first"], gone)
    assert (kept.calls, gone.calls) == (0, 1)


def test_code_that_others_could_have_written_is_not_run(folder):
    compiler = Compiler()
    cached(["a"], compiler)
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others may write there; chmod 700"):
        cached(["a"], compiler)
    assert compiler.calls == 2


def test_a_folder_of_somebody_else_is_not_used(folder, monkeypatch):
    compiler = Compiler()
    cached(["a"], compiler)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to user .* set EVOKERNELS_CACHE_DIR"):
        cached(["a"], compiler)
    assert compiler.calls == 2


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path / "file"))
    compiler = Compiler()
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*file.kernels \(Not a directory"):
        assert cached(["a"], compiler) == compiler.code
    assert cached(["a"], compiler) == compiler.code  # a second warning would be an error
    assert cached(["b"], compiler) == compiler.code
    assert compiler.calls == 3


def test_a_full_disk_is_told_once_and_leaves_nothing(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cached(["a"], Compiler())
    cached(["b"], Compiler())
    assert list(folder.iterdir()) == []


def test_without_a_home_it_compiles(monkeypatch):
    def lost(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", lost)
    compiler = Compiler()
    with pytest.warns(RuntimeWarning, match="Could not determine home directory"):
        assert cached(["a"], compiler) == compiler.code


@pytest.mark.parametrize(
    ("chosen", "xdg", "expected"),
    [
        ("/a", "/b", "/a/kernels"),
        ("~/a", None, "/home/me/a/kernels"),
        (None, "/b", "/b/evokernels/kernels"),
        (None, "relative", "/home/me/.cache/evokernels/kernels"),
        ("", "", "/home/me/.cache/evokernels/kernels"),
        (None, None, "/home/me/.cache/evokernels/kernels"),
    ],
)
def test_where_the_folder_is(monkeypatch, chosen, xdg, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in {"EVOKERNELS_CACHE_DIR": chosen, "XDG_CACHE_HOME": xdg}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache.folder() == pathlib.Path(expected)


def test_an_error_of_the_compiler_is_the_callers(folder):
    def broken():
        raise ValueError("syntax error")

    with pytest.raises(ValueError, match="syntax error"):
        cached(["a"], broken)
    assert not folder.exists()


def test_threads_that_compile_the_same_at_once(folder):
    barrier = threading.Barrier(4)
    found = []

    def compiler():
        barrier.wait()  # all have missed
        return b"code"

    threads = [
        threading.Thread(target=lambda: found.append(cached(["a"], compiler))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"code"] * 4
    assert len(list(folder.iterdir())) == 1


# Reads while others write: what is found is whole, whoever has written it.
HAMMER = """
from evokernels.kernels import cache
code = bytes(range(256)) * 4096
for round in range(100):
    cache._write(cache.folder() / cache._name(["a"]), code)
    assert cache._read(cache.folder() / cache._name(["a"])) == code
"""


def test_processes_that_write_the_same_entry_at_once(folder):
    processes = [subprocess.Popen([sys.executable, "-c", HAMMER]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(list(folder.iterdir())) == 1
