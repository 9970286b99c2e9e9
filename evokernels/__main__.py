"""What is done with a genome from a shell: `python -m evokernels --help`."""

from __future__ import annotations

import argparse
import difflib
import os
import pathlib
import sys
from collections.abc import Sequence

import torch

from evokernels import terms, zoo
from evokernels.compiler.render_torch import class_name, render_torch
from evokernels.compiler.spelling import DTYPES
from evokernels.console import exit_code
from evokernels.document import write_whole
from evokernels.errors import ExportError, GenomeError
from evokernels.genome import Genome
from evokernels.inspection import SOURCES, source, summary

__all__ = ["main"]

BEST_GENOME = "best_genome.json"  # of a run folder

_NAMED = {**zoo.GENOMES, **zoo.WIDE}

EXAMPLES = """\
examples:
  python -m evokernels export runs/quick/best_genome.json -o my_optimizer.py
  python -m evokernels inspect evolved_2025 --backend cuda
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.terms is not None:
        terms.load(options.terms)
    options.command(_genome(options.genome), options)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evokernels",
        description="Take an evolved optimizer anywhere, and look into it.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="write a genome as a torch optimizer, or as JSON")
    export.set_defaults(command=_export)
    _add_genome(export)
    export.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="where to write; names the class, too: MyOptimizer in my_optimizer.py (stdout)",
    )
    export.add_argument(
        "--format",
        choices=("torch", "json"),
        default="torch",
        help="torch: a standalone torch.optim.Optimizer; json: the genome, to be loaded again "
        "(torch)",
    )
    export.add_argument("--force", action="store_true", help="replace a file that exists")

    inspect = commands.add_parser(
        "inspect",
        help="show what a genome is and what runs it",
        description="Show a genome's rule, canonical form, state, bytes, and which backends run it "
        "here; with --backend instead the source of a kernel, for which no GPU is needed.",
    )
    inspect.set_defaults(command=_inspect)
    _add_genome(inspect)
    inspect.add_argument(
        "--backend",
        choices=(*SOURCES, "all"),
        help="print the source of this backend's kernel (a summary without sources)",
    )
    inspect.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the parameters (float32)"
    )
    return parser


def _add_genome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "genome", help=f"a JSON file (-: stdin), or a name of the zoo: {', '.join(_NAMED)}"
    )
    parser.add_argument(
        "--terms", metavar="FILE", help="Python file that registers the terms of its own"
    )


def _genome(name: str) -> Genome:
    """From standard input, a file, or the zoo."""
    if name == "-":
        return Genome.load("/dev/stdin")
    if os.path.exists(name):
        return _loaded(pathlib.Path(name))
    if name in _NAMED:
        return _NAMED[name]
    close = difflib.get_close_matches(name, _NAMED, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise GenomeError(
        f"there is no file {name!r}, and no such genome in the zoo: {', '.join(_NAMED)}{hint}"
    )


def _loaded(path: pathlib.Path) -> Genome:
    """From a file; an error names the genome of the run folder that was meant, perhaps."""
    try:
        return Genome.load(path)
    except GenomeError as error:
        meant = (path if path.is_dir() else path.parent) / BEST_GENOME
        if path.name == BEST_GENOME or not meant.exists():
            raise
        raise GenomeError(f"{error}; the best genome of that run is in {str(meant)!r}") from None


def _export(genome: Genome, options: argparse.Namespace) -> None:
    path = pathlib.Path(options.output)
    if options.format == "json":
        text = genome.to_json()
    else:
        named_after = options.genome if options.output == "-" else path
        text = render_torch(genome, class_name(pathlib.Path(named_after).stem))
    if options.output == "-":
        print(text, end="")
        return
    if path.suffix == ".py" and path.stem in {"torch", *sys.stdlib_module_names}:
        raise ExportError(
            f"{options.output!r} would hide Python's module {path.stem} from all that runs beside "
            "it; choose another name"
        )
    if path.exists() and not path.is_file():
        # a folder, or a device such as /dev/null, which root could replace by a file
        raise ExportError(f"cannot write {options.output!r}: it is no regular file")
    if path.exists() and not options.force:
        raise ExportError(
            f"{options.output!r} exists; choose another name, or --force to replace it"
        )
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ExportError(f"cannot write {options.output!r}: {error.strerror or error}") from None


def _inspect(genome: Genome, options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    if options.backend is None:
        print(summary(genome, dtype), end="")
    elif options.backend == "all":
        for name in SOURCES:
            print(f"======== {name}\n{source(genome, name, dtype)}")
    else:
        print(source(genome, options.backend, dtype), end="")


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(encoding="utf-8")  # what Python files have to be, wherever they go
    sys.exit(main())
