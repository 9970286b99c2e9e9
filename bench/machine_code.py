"""What compiled GPU code does with registers and with memory: read from PTX and ptxas's log.

PTX as NVRTC and as Triton write it. Triton's has lines and labels for debuggers, and conditions on
accesses where NVRTC's branches around them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Resources", "Traffic", "occupancy", "resources", "streaming_loops"]


@dataclass(frozen=True)
class Resources:
    """Of one function; stack and spills in bytes a thread.

    Attributes:
        registers: a thread; None for a function that kernels call.
    """

    registers: int | None
    stack: int
    spills: int


def resources(log: str) -> dict[str, Resources]:
    """By function, from what ``ptxas -v`` says."""
    found = {}
    for text in log.split("Function properties for ")[1:]:
        name, frame, *rest = text.splitlines()
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes", frame))
        used = re.search(r"Used (\d+) registers", rest[0]) if rest else None
        found[name.strip()] = Resources(used and int(used[1]), stack, stores + loads)
    return found


# Threads that a multiprocessor holds, by architecture; each has 65,536 registers (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
MOST_THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536


def occupancy(registers: int, architecture: int, threads: int) -> float:
    """The part of the threads of a multiprocessor that blocks of `threads` can use."""
    # warps get registers in units of 256, and come in fours: one for each scheduler
    of_warp = -(-registers * 32 // 256) * 256
    warps = REGISTERS // of_warp // 4 * 4
    most = MOST_THREADS[architecture]
    return min(warps * 32 // threads, most // threads) * threads / most


@dataclass(frozen=True)
class Traffic:
    """Global memory that one pass through a loop moves, in bytes a thread.

    Attributes:
        loaded, stored: on the way with the least and on the one with the most.
        loads, stores: the bytes of each of these accesses, of all ways together.
        reread: loaded from addresses that are the same in every pass, and so come from the cache.
        doubles: instructions in double precision, of which small GPUs do few at a time.
    """

    loaded: tuple[int, int]
    stored: tuple[int, int]
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    reread: int
    doubles: int


def streaming_loops(ptx: str, entry: str) -> list[Traffic]:
    """The loops of a kernel that access 16 bytes at a time.

    Loops inside them may compute, but not access global memory: how often they would is not known.
    """
    blocks = _blocks(_body(ptx, entry))
    loops = _loops(blocks)
    found = []
    for head, body in loops.items():
        inside = frozenset().union(*(loops[other] for other in loops.keys() & body - {head}))
        if not any(_ACCESS.match(line) for i in inside for line in blocks[i].lines):
            found.append(_traffic(blocks, head, body))
    return [loop for loop in found if 16 in (*loop.loads, *loop.stores)]


# Of global memory, or by an address of whatever memory.
_ACCESS = re.compile(
    r"(@!?%p\d+\s+)?(ld|st)(?!\S*\.(?:shared|local|param|const)\b)(\.\S+)\s.*\[\s*([^\s+\]]+)"
)
_DOUBLE = re.compile(r"(@!?%p\d+\s+)?(?!mov|ld|st)\w+\S*\.f64")
_BRANCH = re.compile(r"(@!?%p\d+\s+)?(?:bra(?:\.uni)?|brx\.idx(?:\.uni)?\s+\S+,)\s+(\S+);")
_TABLE = re.compile(r"(\$\w+):\s*\.branchtargets\s([^;]*);")
_LABEL = re.compile(r"(\$\w+):")
_END = re.compile(r"(@!?%p\d+\s+)?(?:ret|trap|exit);")


@dataclass
class _Block:
    """Instructions that run one after another, and the blocks that may follow."""

    lines: list[str]
    next: list[int]


def _body(ptx: str, entry: str) -> str:
    """What stands between the braces of a kernel."""
    start = re.search(rf"\.entry {re.escape(entry)}\b", ptx)
    text = ptx[ptx.index("\n{", start.start()) + 2 :]
    return text[: text.index("\n}")]


def _blocks(body: str) -> list[_Block]:
    """Basic blocks; the first is where the kernel begins."""
    tables = {name: re.findall(r"\$\w+", targets) for name, targets in _TABLE.findall(body)}
    lines = [line.strip() for line in _TABLE.sub("", body).splitlines()]
    branches = filter(None, map(_BRANCH.match, lines))
    targets = {target for found in branches for target in tables.get(found[2], [found[2]])}
    parts: list[list[str]] = [[]]
    labels = {}
    for line in lines:
        label = _LABEL.match(line)
        if label and label[1] in targets:
            labels[label[1]] = len(parts)
            parts.append([])
        elif line and not label and not line.startswith((".", "//")):  # nor for debuggers
            parts[-1].append(line)
            if _BRANCH.match(line) or _END.match(line):
                parts.append([])
    if not targets <= labels.keys():
        raise ValueError(f"where branches go is not read: {sorted(targets - labels.keys())}")
    blocks = []
    for i, part in enumerate(parts):
        last = part[-1] if part else ""
        branch = _BRANCH.match(last)
        leaves = branch or _END.match(last)
        ends = leaves and not leaves[1]
        after = [] if ends or i + 1 == len(parts) else [i + 1]
        aims = tables.get(branch[2], [branch[2]]) if branch else []
        blocks.append(_Block(part, after + [labels[aim] for aim in aims]))
    return blocks


def _loops(blocks: list[_Block]) -> dict[int, frozenset[int]]:
    """All blocks of each loop, by its head."""
    before: dict[int, list[int]] = {0: []}
    waiting = [0]
    while waiting:  # blocks that cannot be reached are in no loop
        i = waiting.pop()
        for after in blocks[i].next:
            if after not in before:
                waiting.append(after)
            before.setdefault(after, []).append(i)
    bodies: dict[int, set[int]] = {}
    for tail, head in _backward(blocks):
        body, waiting = bodies.setdefault(head, {head}), [tail]
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting += before[i]
    return {head: frozenset(body) for head, body in bodies.items()}


def _backward(blocks: list[_Block]) -> Iterator[tuple[int, int]]:
    """Edges that close a loop: to a block on the way from the entry to where they begin."""
    done: set[int] = set()
    way = [(0, iter(blocks[0].next))]
    on_way = {0}
    while way:
        i, rest = way[-1]
        after = next(rest, None)
        if after is None:
            way.pop()
            on_way.remove(i)
            done.add(i)
        elif after in on_way:
            yield i, after
        elif after not in done:
            on_way.add(after)
            way.append((after, iter(blocks[after].next)))


def _traffic(blocks: list[_Block], head: int, body: frozenset[int]) -> Traffic:
    """Of one pass through a loop: from its head back to it, through loops inside it once."""
    again = set(_backward(blocks))
    lines = [line for i in body for line in blocks[i].lines]
    changing = {name for line in lines for name in _assigned(line)}
    accesses = {i: list(_accesses(blocks[i], changing)) for i in body}

    def moved(what: str, choose: Callable[..., int]) -> int:
        @functools.cache
        def rest(i: int) -> int | None:
            """From a block to the end of the pass; None if the loop is left."""
            own = [
                choose(0, a.size) if a.condition else a.size for a in accesses[i] if a.what == what
            ]
            after = [n for n in blocks[i].next if n == head or (n in body and (i, n) not in again)]
            ends = [0 if n == head else rest(n) for n in after]
            ends = [end for end in ends if end is not None]
            return sum(own) + choose(ends) if ends else None

        return rest(head)

    def sizes(what: str) -> tuple[int, ...]:
        found = (access for of_block in accesses.values() for access in of_block)
        return tuple(sorted(access.size for access in found if access.what == what))

    return Traffic(
        *((moved(what, min), moved(what, max)) for what in ("ld", "st")),
        *map(sizes, ("ld", "st")),
        moved("reread", max),
        sum(bool(_DOUBLE.match(line)) for line in lines),
    )


class _Access(NamedTuple):
    """Of global memory: "ld", "st" or "reread", bytes, and whether only under some condition."""

    what: str
    size: int
    condition: bool


def _accesses(block: _Block, changing: set[str]) -> Iterator[_Access]:
    """Those of a block; `changing` are the registers that its loop assigns."""
    for line in block.lines:
        found = _ACCESS.match(line)
        if found:
            vector = re.search(r"\.v(\d)", found[3])
            bits = re.search(r"\.[a-z]+(\d+)$", found[3])
            fixed = found[2] == "ld" and found[4] not in changing
            size = int(bits[1]) // 8 * int(vector[1] if vector else 1)
            yield _Access("reread" if fixed else found[2], size, bool(found[1]))


def _assigned(line: str) -> list[str]:
    """The registers that an instruction writes: its first operand, or all in its first braces."""
    found = re.match(r"(?:@!?%p\d+\s+)?([\w.]+)\s+(\{[^}]*\}|[^,;]+)", line)
    if found is None or found[1].startswith(("st.", "bra", "bar", "red.")):
        return []
    return re.findall(r"%\w+", found[2])
