"""The whole source of a CUDA kernel as one text: what is compiled, and what it is known by."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from evokernels.compiler.render_cuda import THREADS, render_cuda
from evokernels.compiler.spelling import Kind
from evokernels.compiler.words import DENSE

__all__ = ["cuda_source", "noise_source", "with_included"]

CSRC = pathlib.Path(__file__).parent / "csrc"


def cuda_source(kinds: Sequence[Kind], words: int) -> str:
    """The source for tensors of these kinds, files that it includes in their places.

    Args:
        kinds: a record's ``kind`` is the place in here.
        words: that a launch can take.
    """
    return with_included(render_cuda(kinds, words), "kernel.cu", set())


def noise_source() -> str:
    """The source of the kernels of csrc/noise.cuh."""
    text = f'#define EVK_THREADS {THREADS}\n#define EVK_DENSE ({DENSE})\n#include "noise.cuh"\n'
    return with_included(text, "noise.cu", set())


def with_included(text: str, name: str, known: set[str]) -> str:
    """A text with its own includes replaced; messages of a compiler name the right lines."""
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.splitlines(), start=1):
        include = line.startswith("#") and re.fullmatch(r'#include "(.+)"', line)
        if not include:
            lines.append(line)
        elif include[1] not in known:
            known.add(include[1])
            included = (CSRC / include[1]).read_text(encoding="utf-8")
            lines += [with_included(included, include[1], known), f'#line {number + 1} "{name}"']
    return "\n".join(lines)
