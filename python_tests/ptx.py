"""What a compiled kernel is like: registers, spills, accesses of its loops over vectors."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Accesses", "Resources", "resources", "vector_loops"]


@dataclass(frozen=True)
class Resources:
    """Of one thread; spills and stack in bytes."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Accesses:
    """Of one turn of a loop, the bytes of each access to global memory."""

    loads: tuple[int, ...]
    stores: tuple[int, ...]


def resources(ptxas: Path, ptx: str, folder: Path) -> Resources:
    """As the assembler tells them, the largest of all functions."""
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [ptxas, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    assert "Used" in told, told

    def most(pattern):
        return max(int(number) for number in re.findall(pattern, told))

    return Resources(
        most(r"Used (\d+) registers"),
        most(r"(\d+) bytes stack frame"),
        most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
    )


def vector_loops(ptx: str) -> list[Accesses]:
    """The loops without branches inside that have 128-bit accesses to global memory.

    Only accesses behind a predicate count: those of elements, of which a last turn has fewer. Where
    all threads read one scalar, there is none.
    """
    loops, label, block = [], None, []
    for line in map(str.strip, ptx.splitlines()):
        if found := re.match(r"(\$L__BB\w+):", line):
            label, block = found[1], []
        elif re.search(r"\bbra\b", line):
            if re.search(rf"\bbra(\.uni)?\s+{re.escape(label or ' ')};", line):
                loops.append(block)
            label, block = None, []
        else:
            block.append(line)
    accesses = [Accesses(_bytes("ld", block), _bytes("st", block)) for block in loops]
    return [found for found in accesses if 16 in (*found.loads, *found.stores)]


def _bytes(kind: str, block: list[str]) -> tuple[int, ...]:
    pattern = rf"@!?%p\d+ {kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    found = filter(None, (re.match(pattern, line) for line in block))
    return tuple(sorted(int(m[1] or 1) * int(m[2]) // 8 for m in found))
