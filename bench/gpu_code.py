"""What the compilers make of the GPU kernels, without a GPU: registers, spills, memory traffic.

Every structure of the classic catalogue in every pair of parameter and state dtype, and some rules
beyond it in some, compiled by NVRTC (for the backend "cuda") and by Triton, as a Markdown table
each. It takes minutes, on all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from commandline import exit_code, markdown
from machine_code import Traffic, occupancy, resources, streaming_loops

from evokernels import Genome, Term, zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.render_cuda import THREADS
from evokernels.compiler.render_triton import render_module
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.compiler.structure import Structure, structure_of
from evokernels.errors import BackendError
from evokernels.genome import CATALOGUES
from evokernels.kernels import nvrtc
from evokernels.kernels.cuda import LEAST_WORDS
from evokernels.kernels.cuda_source import cuda_source
from evokernels.kernels.plan import STATE_DTYPES
from evokernels.kernels.triton import module_of, options_of_nvidia
from evokernels.terms import average, beta2, eps, g, m, register, sqrt

__all__ = [
    *("COMPILERS", "Case", "Code", "all_kinds", "compiled", "kinds_of", "structures"),
    "tensor_bytes",
]

ARCHITECTURES = (75, 80, 90)
# Of rules beyond the classic catalogue: dtypes, and whether rounding is stochastic.
FORMATS = (("float32", "float32", False), ("bfloat16", "float32", False))
OUTPUT = pathlib.Path(__file__).parent / "results" / "gpu_code.md"


@dataclass(frozen=True)
class Code:
    """A kernel, compiled for one architecture.

    Attributes:
        threads: of a block.
        registers: a thread.
        spills: bytes of stack, and bytes stored to it and loaded from it, functions included.
        loops: those over vectors of elements.
        seconds: of processor time that the compiler took.
        size: of the machine code, in bytes.
    """

    ptx: str
    threads: int
    registers: int
    spills: int
    loops: list[Traffic]
    seconds: float
    size: int


def cuda_code(kinds: Sequence[Kind], architecture: int, kernel: str = "update") -> Code:
    """What NVRTC makes of it; both kernels are one source, which is compiled as a whole."""
    source = cuda_source(kinds, LEAST_WORDS)
    start = _processor_time()
    made = nvrtc.compiled(source, architecture, nvrtc.VERBOSE)
    seconds = _processor_time() - start
    return _code(f"evk_{kernel}", THREADS, made.ptx, made.log, seconds, len(made.cubin))


def triton_code(kinds: Sequence[Kind], architecture: int, kernel: str = "update") -> Code:
    """What Triton makes of it; it compiles each kernel by itself."""
    import triton

    function = getattr(module_of(render_module(kinds)), kernel)
    options = options_of_nvidia(kinds)
    pointers = {"words": "*i64", "numbers": "*fp64"}
    signature = {name: pointers[name] for name in function.arg_names}
    # as a launch says of tensors that torch has allocated
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    source = triton.compiler.ASTSource(function, signature, constexprs={}, attrs=aligned)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    log = io.StringIO()
    start = _processor_time()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=target, options=options).asm
    seconds = _processor_time() - start
    threads = 32 * options["num_warps"]
    return _code(kernel, threads, made["ptx"], log.getvalue(), seconds, len(made["cubin"]))


def _code(entry: str, threads: int, ptx: str, log: str, seconds: float, size: int) -> Code:
    functions = resources(log)
    return Code(
        *(ptx, threads, functions[entry].registers),
        sum(function.stack + function.spills for function in functions.values()),
        *(streaming_loops(ptx, entry), seconds, size),
    )


def _processor_time() -> float:
    """Of this process and of those it has waited for: others may be at work on this machine."""
    return sum(os.times()[:4])


def _version_of_triton() -> str:
    import triton

    return f"Triton {triton.__version__}"


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@dataclass(frozen=True)
class Compiler:
    """What makes the code of a backend.

    Attributes:
        code: of a kernel for tensors of some kinds.
        narrow: whether a thread has as many elements at a time as 16 bytes hold of its narrowest
            tensor, and accesses wider ones several times; or else of the widest.
        masked: whether threads behind the last element leave out accesses, not a pass of the loop.
        why_not: the reason why it is not there, None if it is.
        version: of it, with its name.
    """

    code: Callable[..., Code]
    narrow: bool
    masked: bool
    why_not: Callable[[], str | None]
    version: Callable[[], str]

    def elements(self, kind: Kind) -> int:
        """That a thread updates in one pass of the loop over vectors."""
        return 16 // (min if self.narrow else max)(tensor_bytes(kind))


# By the name of the backend.
COMPILERS = {
    "cuda": Compiler(
        *(cuda_code, True, False, nvrtc.why_not),
        lambda: "NVRTC {}.{}".format(*nvrtc.version()),
    ),
    "triton": Compiler(triton_code, False, True, _no_triton, _version_of_triton),
}


class Case(NamedTuple):
    """The update of tensors of one kind, compiled for an architecture."""

    backend: str
    architecture: int
    kind: Kind


@contextlib.contextmanager
def compiled(cases: Iterable[Case]) -> Iterator[dict[Case, Future[Code]]]:
    """Compile them, on all cores; what has not begun when the block is left does not begin."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, _warm_up) as pool:
        try:
            yield {case: pool.submit(_compile, case) for case in cases}
        finally:
            pool.shutdown(cancel_futures=True)


def _compile(case: Case) -> Code:
    return COMPILERS[case.backend].code([case.kind], case.architecture)


def _warm_up() -> None:
    """The first compilation of a process takes longer: it loads what compiles."""
    for backend, compiler in COMPILERS.items():
        if compiler.why_not() is None:
            _compile(Case(backend, ARCHITECTURES[0], next(all_kinds())))


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
        yield from kinds_of(structure)


def further_kinds() -> Iterator[tuple[str, Kind]]:
    """Of rules beyond the classic catalogue, with their names: the zoo's, all that a search draws
    from, and as many averages as there can be."""
    fast, slow = average(g, 0.9), average(abs(g), 0.99)
    with_belief = fast / (sqrt(average(g * g, beta2)) + average((g - m) ** 2, beta2) + eps)
    four = register("FOUR_AVERAGES", with_belief + slow)
    rules = {
        **zoo.WIDE,
        "the whole wide catalogue": Genome(CATALOGUES["wide"], [1.0] * len(CATALOGUES["wide"])),
        "four averages, m": Genome([four]),
        "four averages, m, v": Genome([four, Term.RMS_NORM], [1.0, 1.0]),
    }
    for name, genome in rules.items():
        structure = structure_of(lower(genome))
        for formats in FORMATS:
            yield name, Kind(structure, *formats)


def kinds_of(structure: Structure) -> Iterator[Kind]:
    """A structure with all dtypes that parameters and moments may have."""
    moments = structure.program.state
    for parameter, states in STATE_DTYPES.items():
        for state in states if moments else states[:1]:
            kind = Kind(structure, _name(parameter), _name(state), False)
            yield kind
            if "bfloat16" in kind.stored:
                yield kind._replace(stochastic=True)


def tensor_bytes(kind: Kind) -> list[int]:
    """Bytes of an element in each tensor: parameter, gradient, moments."""
    parameter, state = DTYPES[kind.parameter].bytes, DTYPES[kind.state].bytes
    return [parameter, parameter, *(state for _ in kind.structure.program.state)]


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "no table is written before all is compiled")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backends",
        **{"nargs": "+", "choices": COMPILERS, "default": list(COMPILERS)},
        help="whose kernels (default: both)",
    )
    parser.add_argument(
        *("--architectures", "-a"),
        **{"nargs": "+", "type": int, "default": list(ARCHITECTURES), "metavar": "SM"},
        help="75 is compute capability 7.5 (default: 75 80 90)",
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, metavar="FILE")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Compile everything and write the tables."""
    for backend in options.backends:
        reason = COMPILERS[backend].why_not()
        if reason is not None:
            raise BackendError(reason)
    lines = [_EXPLANATION]
    for backend in options.backends:
        lines += table(backend, options.architectures)
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print(f"written to {options.output}")


_EXPLANATION = """\
# What the compilers make of the GPU kernels

Written by `bench/gpu_code.py`. A row is a kernel for tensors of one kind. Registers are those of a
thread; occupancy is the part of a multiprocessor's threads that blocks of 256 can use with them.
Loaded and stored is what the loop over vectors moves, counted in PTX; a gradient that becomes zero
is stored beside it. Times are processor time. Last come rules beyond the classic catalogue.
"""


def table(backend: str, architectures: Sequence[int]) -> list[str]:
    """Of one backend: a row for each kind, architectures side by side."""
    sms = " / ".join(f"sm_{architecture}" for architecture in architectures)
    head = [
        *("structure", "parameter", "state", f"registers, {sms}", "occupancy, %", "spills, bytes"),
        *("loaded, bytes an element", "stored", "accesses, bytes", "compiled in, s", "code, KB"),
    ]
    kinds = [*((kind.structure.name, kind) for kind in all_kinds()), *further_kinds()]
    rows = []
    with compiled(Case(backend, a, kind) for _, kind in kinds for a in architectures) as codes:
        for name, kind in kinds:
            of_kind = [codes[Case(backend, a, kind)].result() for a in architectures]
            rows.append([name, *_row(backend, kind, of_kind, architectures)])
            print(*rows[-1], sep="  ", file=sys.stderr)
    return [
        f"## {backend}, compiled by {COMPILERS[backend].version()}",
        *("", *markdown(head, rows), ""),
    ]


def _row(
    backend: str, kind: Kind, codes: Sequence[Code], architectures: Sequence[int]
) -> list[str]:
    used = [
        occupancy(code.registers, architecture, code.threads)
        for code, architecture in zip(codes, architectures, strict=True)
    ]
    elements = COMPILERS[backend].elements(kind)
    loops = [loop for code in codes for loop in code.loops]
    cleared = tensor_bytes(kind)[0]
    return [
        kind.parameter,
        kind.state + (", stochastic" if kind.stochastic else ""),
        _each(code.registers for code in codes),
        _each(f"{part:.0%}".rstrip("%") for part in used),
        _each(code.spills for code in codes),
        _each(f"{loop.loaded[1] / elements:g}" for loop in loops),
        _each(f"{loop.stored[1] / elements - cleared:g}" for loop in loops),
        _each(", ".join(map(str, sorted({*loop.loads, *loop.stores}))) for loop in loops),
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
