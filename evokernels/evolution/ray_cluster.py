"""A Ray cluster: joined, or started on this machine; how many workers it has room for."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping

import ray
import torch

from evokernels.errors import BackendError, SettingsError, WorkerError
from evokernels.evolution.evaluator import EVALUATION_VERSION
from evokernels.kernels.c_compiler import CCompiler

__all__ = ["Head", "Need", "compiles", "connect", "processor", "room", "versions"]

# Seconds that a cluster may take to answer. Ray itself would try for minutes, and then end the
# process.
ANSWER = 20.0

# Bytes that a machine keeps for large objects; calls and answers are small and travel without.
OBJECT_STORE = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Need:
    """What a worker takes of its machine.

    Args:
        cpus: processor cores; a worker that has a GPU is counted by that alone.
        gpus: share of a GPU, 0 for none.

    Raises:
        SettingsError: not a share.
    """

    cpus: int
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gpus <= 1:
            raise SettingsError(
                f"gpus-per-worker must be above 0 and at most 1, got {self.gpus:g}: one training "
                "run uses one GPU, or shares it with others"
            )

    @property
    def options(self) -> dict[str, float]:
        """As Ray's options of an actor."""
        return {"num_cpus": 0 if self.gpus else self.cpus, "num_gpus": self.gpus}

    def fits(self, resources: Mapping[str, float]) -> int:
        """Workers that a machine with these resources has room for."""
        if self.gpus:
            # a share is one of one GPU; Ray counts in ten-thousandths
            return int(resources.get("GPU", 0)) * int((1 + 1e-6) / self.gpus)
        return int(resources.get("CPU", 0) / self.cpus)

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPU"


def connect(address: str | None, need: Need, most: int | None) -> bool:
    """Connect this process, unless it is; whether that was done here.

    `ray.shutdown` ends the connection, and a cluster that was started for it.

    Args:
        address: "auto" (the cluster that this machine belongs to) or "host:port". None: a cluster
            is started, of this machine alone; it ends with this process, even if that is killed.
        need: of a worker.
        most: workers, for which a cluster that is started has room even where cores are fewer.

    Raises:
        SettingsError: no such address.
        WorkerError: there is no cluster, or Ray refuses to connect; within half a minute.
    """
    if address not in (None, "auto") and ("/" in address or ":" not in address):
        raise SettingsError(f"address must be auto or HOST:PORT, got {address!r}")
    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    quietly = {"log_to_driver": False, "configure_logging": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of this run is reported
        cores = max(_cores(), need.cpus * (most or 1))
        size = {"num_cpus": cores, "object_store_memory": OBJECT_STORE}
        quietly |= {"address": "local", "include_dashboard": False, **size}
    else:
        _look_for(address)
        quietly |= {"address": address}
    try:
        ray.init(**quietly)
    except (Exception, SystemExit) as error:  # it ends the process where a cluster falls silent
        place = "on this machine" if address is None else f"at {address}"
        raise WorkerError(f"cannot use Ray {place}: {error}".splitlines()[0]) from None
    return True


def _look_for(address: str) -> None:
    """Connect in another process, which may be ended; raises WorkerError if that does not work."""
    program = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    command = [sys.executable, "-c", program, address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {ANSWER:g} seconds"
    else:
        if answer.returncode == 0:
            return
        reason = _reason(answer.stderr) or "refused"
    raise WorkerError(
        f"no Ray cluster to join at {address!r} ({reason}); on a machine of the cluster, give auto "
        "or the HOST:PORT that ray start --head has shown; a cluster with a token lets in who has "
        "it and RAY_AUTH_MODE=token"
    )


def _reason(stderr: str) -> str:
    """The first line of the error at the end of a traceback, without Ray's advice."""
    message = stderr.rpartition('\n  File "')[2].splitlines()
    lines = [line for line in message if line and not line.startswith(" ")]
    return lines[0].partition(": ")[2].partition(". ")[0] if lines else ""


@dataclasses.dataclass(frozen=True)
class Head:
    """The machine that the cluster cannot be without.

    Args:
        address: "host:port" of its server, an IPv6 host in brackets.
    """

    address: str

    @classmethod
    def of_this_cluster(cls) -> Head:
        """Of the one that this process is connected to."""
        return cls(ray.get_runtime_context().gcs_address)

    def answers(self) -> bool:
        """Whether it lets itself be connected to; within two seconds."""
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
            return True
        return False


def room(need: Need) -> int:
    """Workers that all machines have room for that are there now."""
    return sum(need.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])


def versions() -> dict[str, str]:
    """What results may depend on, of this process; all workers must have the same."""
    try:
        release = importlib.metadata.version("evokernels")
    except importlib.metadata.PackageNotFoundError:
        release = "as source"
    return {
        "evokernels": f"{release} ({_source_digest()})",
        "evaluation version": str(EVALUATION_VERSION),
        "torch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "Ray": ray.__version__,
    }


def _source_digest() -> str:
    """What tells two checkouts of one release apart."""
    folder = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def processor(need: Need) -> str:
    """What decides the last bits of results that are computed in this process."""
    if need.gpus and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def compiles(need: Need) -> bool:
    """Whether rules beyond the classic catalogue have kernels in this process, as far as a CPU is
    asked for: without a C compiler they are computed otherwise."""
    if need.gpus:
        return True
    try:
        CCompiler.find()
    except BackendError:
        return False
    return True


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
