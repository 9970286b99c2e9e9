"""What the compilers make of the GPU kernels, without a GPU: registers, spills, memory traffic.

Every structure of the catalogue in every pair of parameter and state dtype, as a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from commandline import exit_code, markdown
from machine_code import Traffic, occupancy, resources, streaming_loops

from evokernels import Genome, Term
from evokernels.compiler.lower import lower
from evokernels.compiler.render_cuda import THREADS
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.compiler.structure import Structure, structure_of
from evokernels.errors import BackendError
from evokernels.kernels import nvrtc
from evokernels.kernels.cuda import LEAST_WORDS
from evokernels.kernels.cuda_source import cuda_source
from evokernels.kernels.plan import STATE_DTYPES

__all__ = ["Code", "all_kinds", "cuda_code", "least_traffic", "structures"]

ARCHITECTURES = (75, 80, 90)
OUTPUT = pathlib.Path(__file__).parent / "results" / "gpu_code.md"


@dataclass(frozen=True)
class Code:
    """A kernel that updates tensors of one kind, compiled for one architecture.

    Attributes:
        threads: of a block.
        registers: a thread.
        spills: bytes of stack, and bytes stored to it and loaded from it.
        traffic: of the loop over elements, one pass of one thread.
        seconds: of processor time that the compiler took.
        size: of the machine code, in bytes.
    """

    threads: int
    registers: int
    spills: int
    traffic: Traffic
    seconds: float
    size: int


def cuda_code(kind: Kind, architecture: int) -> Code:
    """What NVRTC makes of it."""
    source = cuda_source([kind], LEAST_WORDS)
    start = time.thread_time()  # others may be at work on this machine
    compiled = nvrtc.compiled(source, architecture, nvrtc.VERBOSE)
    seconds = time.thread_time() - start
    functions = resources(compiled.log)
    (traffic,) = (t for t in streaming_loops(compiled.ptx, "evk_update") if t.stored[1])
    return Code(
        THREADS,
        functions["evk_update"].registers,
        sum(function.stack + function.spills for function in functions.values()),
        traffic,
        seconds,
        len(compiled.cubin),
    )


# What compiles a kind for an architecture, by the name of the backend.
COMPILERS: dict[str, Callable[[Kind, int], Code]] = {"cuda": cuda_code}


def structures() -> Iterator[Structure]:
    """All that rules over the catalogue have."""
    for with_m, with_v, with_abs in itertools.product((False, True), repeat=3):
        wanted = {Term.MOMENTUM: with_m, Term.RMS_NORM: with_v, Term.SQRT_GRAD: with_abs}
        chosen = [Term.GRAD, *(term for term, there in wanted.items() if there)]
        rule = lower(
            Genome(term_types=chosen, alphas=[1.0] * len(chosen), use_m=with_m, use_v=with_v)
        )
        yield structure_of(rule)


def all_kinds() -> Iterator[Kind]:
    """Every structure, with all dtypes that parameters and moments may have."""
    for structure in structures():
        moments = structure.program.state
        for parameter, states in STATE_DTYPES.items():
            for state in states if moments else states[:1]:
                kind = Kind(structure, _name(parameter), _name(state), False)
                yield kind
                if "bfloat16" in kind.stored:
                    yield kind._replace(stochastic=True)


def least_traffic(kind: Kind) -> tuple[int, int]:
    """Bytes that an element must load and store: parameter, gradient and moments once each."""
    parameter, state = DTYPES[kind.parameter].bytes, DTYPES[kind.state].bytes
    moments = len(kind.structure.program.state) * state
    return 2 * parameter + moments, parameter + moments


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "no table is written before all is compiled")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=COMPILERS, default=list(COMPILERS))
    parser.add_argument(
        *("--architectures", "-a"),
        **{"nargs": "+", "type": int, "default": list(ARCHITECTURES), "metavar": "SM"},
        help="75 is compute capability 7.5 (default: 75 80 90)",
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, metavar="FILE")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Compile everything and write the tables."""
    reason = nvrtc.why_not()
    if reason is not None:
        raise BackendError(reason)
    tables = [line for name in options.backends for line in table(name, options.architectures)]
    options.output.write_text("\n".join(tables), encoding="utf-8")
    print(f"written to {options.output}")


def table(backend: str, architectures: Sequence[int]) -> list[str]:
    """Of one backend: a row for each kind, architectures side by side."""
    version = "{}.{}".format(*nvrtc.version())
    sms = " / ".join(f"sm_{architecture}" for architecture in architectures)
    head = [
        *("structure", "parameter", "state", f"registers, {sms}", "occupancy, %", "spills, bytes"),
        *("loaded, bytes an element", "stored", "accesses, bytes", "compiled in, s", "code, KB"),
    ]
    rows = []
    for kind in all_kinds():
        codes = [COMPILERS[backend](kind, architecture) for architecture in architectures]
        rows.append(_row(kind, codes, architectures))
        print(*rows[-1], sep="  ", file=sys.stderr)
    return [
        f"## {backend}, one kind a kernel, NVRTC {version}",
        "",
        "Loaded and stored is what the loop over elements moves, counted in PTX; a gradient that "
        "becomes zero is stored beside it.",
        "",
        *markdown(head, rows),
        "",
    ]


def _row(kind: Kind, codes: Sequence[Code], architectures: Sequence[int]) -> list[str]:
    used = [
        occupancy(code.registers, architecture, code.threads)
        for code, architecture in zip(codes, architectures, strict=True)
    ]
    first = codes[0]
    # bytes of a pass → bytes of an element: it stores each element's parameter once, and moments
    elements = first.traffic.stored[0] / least_traffic(kind)[1]
    return [
        kind.structure.name,
        kind.parameter,
        kind.state + (", stochastic" if kind.stochastic else ""),
        _each(code.registers for code in codes),
        _each(f"{part:.0%}".rstrip("%") for part in used),
        _each(code.spills for code in codes),
        f"{first.traffic.loaded[0] / elements:g}",
        f"{first.traffic.stored[0] / elements:g}",
        ", ".join(map(str, sorted(first.traffic.widths))),
        _each(f"{code.seconds:.2f}" for code in codes),
        _each(f"{code.size / 1000:.0f}" for code in codes),
    ]


def _each(values: Iterator[object]) -> str:
    """One value where all are equal."""
    texts = list(map(str, values))
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
