"""What the scripts beside this file share: options, a progress bar, tables, how they end."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from evokernels import terms
from evokernels.console import exit_code
from evokernels.errors import SettingsError, WorkerError
from evokernels.evolution.devices import named_device
from evokernels.evolution.evaluations import OnGeneration
from evokernels.evolution.precision import PRECISIONS, best_precision
from evokernels.evolution.tensorboard import TensorBoardLog

__all__ = [
    "Bar",
    "add_machine_options",
    "add_precision",
    "add_run_options",
    "add_settings",
    "add_terms",
    "exit_code",
    "generation_log",
    "markdown",
    "resolved_precision",
    "run_exit_code",
    "training_workers",
    "with_folder",
    "with_options",
    "worker_count",
]

LOGS = "tensorboard"


def run_exit_code(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """`exit_code` of a command that resumes in its run folder, ``options.out``."""
    hint = f"all finished training runs are in {options.out}, the same command resumes there"
    with warnings.catch_warnings():
        warnings.showwarning = _one_line
        return exit_code(lambda: run(options), hint)


def _one_line(message: Warning | str, category: type[Warning], *place: object) -> None:
    """A warning as users need it, whichever line of ours it comes from; below a bar, if any."""
    tqdm.write(f"{category.__name__}: {message}", file=sys.stderr)


def add_settings(
    parser: argparse.ArgumentParser,
    presets: Mapping[str, Mapping[str, object]],
    settings: Iterable[tuple[str, type, bool, str]],
    switches: Iterable[tuple[str, str]],
) -> None:
    """``--preset`` and an option for each setting, which is None where it is not given.

    Args:
        presets: by name, of which the first is the default.
        settings: option, type, whether it takes several values, meaning.
        switches: option, what it switches.
    """
    default = next(iter(presets))
    parser.add_argument(
        "--preset",
        choices=presets,
        default=default,
        help=f"settings where none are given ({default})",
    )

    def values(name: str) -> str:
        given = {preset: each[name.replace("-", "_")] for preset, each in presets.items()}
        return ", ".join(f"{preset}: {_shown(value)}" for preset, value in given.items())

    for name, kind, several, meaning in settings:
        parser.add_argument(
            f"--{name}",
            type=kind,
            nargs="+" if several else None,
            metavar=name.rstrip("s").upper() if kind is str or several else "N",
            help=f"{meaning} ({values(name)})",
        )
    for name, meaning in switches:
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, help=f"{meaning} ({values(name)})"
        )


def _shown(value: object) -> str:
    """A setting as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "all" if value is None else str(value)


def with_options(settings: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a preset, replaced by those that are given; precision as it is computed."""
    if getattr(options, "terms", None) is not None:
        terms.load(options.terms)
        options.own_terms = terms.definitions()
    given = {name: getattr(options, name, None) for name in settings}
    values = {name: settings[name] if value is None else value for name, value in given.items()}
    return {**values, "precision": resolved_precision(values["precision"], values["device"])}


def add_run_options(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """``--terms``, ``--precision``, ``--out`` and what a machine has; for `with_options` and
    `with_folder`.

    Args:
        prefix: of the run folder's name, where none is given.
    """
    add_terms(parser, "which the search then uses")
    add_precision(parser)
    parser.set_defaults(prefix=prefix, own_terms=None)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help=f"the run folder (runs/{prefix}<preset>)"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help=f"log every generation for TensorBoard into {LOGS} in the run folder",
    )
    add_machine_options(parser)


def add_terms(parser: argparse.ArgumentParser, purpose: str) -> None:
    """``--terms``, a file for `evokernels.terms.load`."""
    parser.add_argument(
        "--terms",
        type=pathlib.Path,
        metavar="FILE",
        help=f"Python file that registers terms of your own, {purpose}",
    )


def with_folder(options: argparse.Namespace) -> argparse.Namespace:
    """With a run folder named after the preset, where none is given."""
    options.out = options.out or pathlib.Path("runs") / f"{options.prefix}{options.preset}"
    return options


@contextlib.contextmanager
def generation_log(options: argparse.Namespace) -> Iterator[OnGeneration]:
    """What ``--tensorboard`` asks for; raises SettingsError where that is not installed."""
    if not options.tensorboard:
        yield lambda number, scalars: None
        return
    with TensorBoardLog(options.out / LOGS) as log:
        yield log.add


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What a machine has, not what an experiment is: where data are, who trains, how patiently."""
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with data sets ($EVOKERNELS_DATA, else ~/.cache/evokernels/data)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes that train; the result does not depend on them "
        "(as many as the processor has cores for; 1 on a CUDA device; in a cluster, all that there "
        "is room for)",
    )
    parser.add_argument(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="who trains: processes of this machine, or workers of a Ray cluster (processes)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster, or auto: the one of this machine (one is started here)",
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="SHARE",
        help="of a GPU, that each worker of a Ray cluster has on a CUDA device (1)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of a training run, which counts as failed beyond it (more than any should take)",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """``--precision``, for `resolved_precision`."""
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the networks' arithmetic; auto: the faster one on this processor (auto)",
    )


def resolved_precision(name: str, device: str) -> str:
    """``--precision`` as `Conditions` have it."""
    return best_precision(named_device(device))[0] if name == "auto" else name


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """A table, line by line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def worker_count(options: argparse.Namespace, threads: int, device: str) -> int:
    """``--workers``, else one for every ``threads`` cores that this process may use.

    One on a CUDA device: the processes on it take turns, and each needs memory of its own.
    """
    if options.workers is not None:
        return options.workers
    if device != "cpu":
        return 1
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, available // threads)


@contextlib.contextmanager
def training_workers(
    options: argparse.Namespace, threads: int, device: str
) -> Iterator[dict[str, Any]]:
    """Who trains, where data are and how long a run may take, as the arguments of a run.

    Raises:
        SettingsError: options that do not belong together.
        WorkerError: there is no such cluster.
    """
    common = {"data_dir": options.data_dir, "time_limit": options.time_limit}
    if options.executor == "processes":
        for name in ("address", "gpus_per_worker"):
            if getattr(options, name) is not None:
                raise SettingsError(f"--{name.replace('_', '-')} is for --executor ray alone")
        yield {**common, "workers": worker_count(options, threads, device)}
        return
    if device not in ("cpu", "cuda"):
        raise SettingsError(
            f"with --executor ray the device is cpu or cuda, got {device!r}: the cluster says "
            "which GPU a worker has"
        )
    share = options.gpus_per_worker
    if share is not None and (device == "cpu" or not share > 0):
        raise SettingsError(
            f"--gpus-per-worker is above 0 and for --device cuda, got {share:g} for {device}"
        )
    try:
        from evokernels.evolution.ray_executor import Need, RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise WorkerError(
            "--executor ray needs Ray, which is not installed: pip install 'evokernels[ray]'"
        ) from None
    need = Need(threads, 1.0 if share is None and device == "cuda" else share or 0.0)
    with RayExecutor(need, options.workers, options.address) as executor:
        yield {**common, "executor": executor}


class Bar:
    """Progress with the time left; shows up with the first `show`, and also in a log file.

    Args:
        unit: what is counted: training runs, if nothing else.
    """

    def __init__(self, unit: str = "run") -> None:
        self._unit = unit
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, expected: int, note: str) -> None:
        """Units done and expected in all, and what is being done."""
        if self._bar is None:
            self._bar = tqdm(
                desc=note,
                initial=done,
                total=expected,
                unit=self._unit,
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
            )
        self._bar.total = expected
        self._bar.set_description(note, refresh=False)
        self._bar.update(done - self._bar.n)
