"""How commands end, whatever ends them: an exit code and at most one line on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable

from evokernels.errors import EvokernelsError

__all__ = ["exit_code"]


def exit_code(command: Callable[[], None], hint: str | None = None) -> int:
    """Run a command.

    Args:
        hint: what is left when it is cut off, for people; None if it does nothing but print.

    Returns:
        0; 2 after an error, 130 after Ctrl-C, 141 if nobody reads what it prints before it is done,
        each with one line on stderr. A command that only prints is done when nobody reads.
    """
    _prepare_standard_streams()
    try:
        command()
    except EvokernelsError as error:
        code = _failed(error)
    except KeyboardInterrupt:
        _say(f"interrupted; {hint}" if hint else "interrupted")
        code = 130
    except OSError as error:
        code = 0
        if not _is_unread(error):
            code = _failed(f"{_place(error)}: {error.strerror or error}")
        elif hint:
            _say(f"nobody reads what this prints; {hint}")
            code = 141  # as if SIGPIPE had ended it
    else:
        code = 0
    try:
        sys.stdout.flush()
    except OSError as error:
        if not _is_unread(error):
            code = code or _failed(f"{_place(error)}: {error.strerror or error}")
        # so that what is left of it does not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _place(error: OSError) -> str:
    if error.filename is None:
        return "cannot write to standard output or a file"
    return f"cannot use {error.filename!r}"


def _failed(reason: object) -> int:
    _say("error: " + " ".join(str(reason).splitlines()))
    return 2


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads that either
        print(line, file=sys.stderr, flush=True)


def _is_unread(error: OSError) -> bool:
    """Whether nobody reads standard output any more; other pipes may break, too."""
    if not isinstance(error, BrokenPipeError):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in output.poll(0))


def _prepare_standard_streams() -> None:
    """Opens those that a shell has closed (``>&-``): else a file that is opened later gets their
    numbers, and what is printed with them. Whatever is printed for nobody still fails."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # takes the lowest number that is free; standard output cannot be written to
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without arrows is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
