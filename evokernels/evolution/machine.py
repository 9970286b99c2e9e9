"""On what a report was written: versions, processor, memory, and by which command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys

import numpy as np
import torch

from evokernels.evolution.devices import named_device

__all__ = ["machine", "processor", "versions"]


def versions() -> list[tuple[str, str]]:
    """Of what decides the last bits of a training run."""
    return [
        ("evokernels", _own_version()),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("numpy", np.__version__),
    ]


def _own_version() -> str:
    try:
        return importlib.metadata.version("evokernels")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def machine(device: str) -> list[tuple[str, str]]:
    """What this process runs on and was started as, and now as the time.

    Args:
        device: where training took place, as the settings name it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = named_device(device)
    here = found.type == "cuda" and found.index < torch.cuda.device_count()
    name = f" ({torch.cuda.get_device_name(found)})" if here else ""
    return [
        ("processor", processor()),
        ("cores of this process", str(cores)),
        ("memory", memory()),
        ("system", f"{platform.system()} {platform.release()}"),
        ("device of the training runs", f"{device}{name}"),
        ("written by the command", shlex.join(["python", *sys.orig_argv[1:]])),
        ("written at", datetime.datetime.now().astimezone().isoformat(" ", "seconds")),
    ]


def processor() -> str:
    """The processor's name as Linux knows it, elsewhere its kind."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory() -> str:
    """Of the whole machine."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{size / 2**30:.1f} GiB"
