"""How steps are timed on a GPU: what the device takes and what the host takes, apart.

Device time is that between two CUDA events around a step. Before the first one the device is kept
busy for longer than the host needs to launch the step, so that launches are queued and the device
never waits for the host in between; before that, a buffer of twice the size of the L2 cache is
overwritten, so that every step finds its tensors in memory, as behind a backward pass. A step of
more launches than the queue takes (about a thousand) is timed with the host's pauses in it.

Host time is that of the call of a step while the device has nothing to do, without waiting for it;
gradients are newly allocated, as backward leaves them.
"""

from __future__ import annotations

import csv
import functools
import shutil
import subprocess
import time
from typing import Any, Protocol

import torch
from contestants import Contestant, Work
from timing import Way, median_of

__all__ = ["DEVICE", "HOST", "DeviceStopwatch", "Event", "Gpu", "find_gpu"]

DEVICE, HOST = "device", "host"

WARM_UP = 0.5  # seconds until a GPU that had nothing to do runs at its clock
SPIN = 10_000_000  # cycles
STALL = 2.0  # times as long as the host takes
LAUNCH = 100e-6  # seconds more, for what the host does around a step


class Event(Protocol):
    """A mark in the work of a device, as `torch.cuda.Event` has it."""

    def record(self) -> None:
        """Mark what was launched up to now."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this mark to a later one, both reached."""


class Gpu:
    """A GPU as far as timing asks it anything; all calls of torch.cuda are here.

    Attributes:
        device: for tensors.
        cache: bytes of the L2 cache.
        copied: elements of float32 whose copy tells what memory can give.
    """

    copied = 64_000_000

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache = self._properties.L2_cache_size
        self._cycles_a_second = self._measured_clock()

    def wait(self) -> None:
        """Until the device has nothing to do."""
        torch.cuda.synchronize(self.device)

    def event(self) -> Event:
        """One that has not been recorded."""
        return torch.cuda.Event(enable_timing=True)

    def stall(self, seconds: float) -> None:
        """Keep the device busy for about as long; does not wait."""
        torch.cuda._sleep(round(seconds * self._cycles_a_second))

    def describe(self) -> dict[str, Any]:
        """Name, capability, driver and versions, for the report."""
        found = self._properties
        return {
            "gpu": found.name,
            "compute capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory, bytes": found.total_memory,
            "L2 cache, bytes": found.L2_cache_size,
            "GPUs in this machine": torch.cuda.device_count(),
            "CUDA of torch": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            **self._ask("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit"),
        }

    def clocks(self) -> dict[str, str]:
        """Clocks and heat of now, as far as they are known."""
        return self._ask("clocks.sm", "clocks.memory", "temperature.gpu")

    def _measured_clock(self) -> float:
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_UP:
            start, end = self.event(), self.event()
            start.record()
            torch.cuda._sleep(SPIN)
            end.record()
            self.wait()
        return SPIN / (start.elapsed_time(end) / 1e3)

    def _ask(self, *fields: str) -> dict[str, str]:
        """What nvidia-smi says; empty where it is not there or does not answer."""
        if shutil.which("nvidia-smi") is None:
            return {}
        uuid = f"GPU-{self._properties.uuid}"  # numbers differ where some devices are hidden
        done = subprocess.run(
            ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {}
        names, values = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
        return dict(zip(names, values, strict=True))


def find_gpu() -> Gpu | None:
    """The current device of torch, None if it finds none."""
    return Gpu() if torch.cuda.is_available() else None


class DeviceStopwatch:
    """Times as the head of this file says; as `timing.Stopwatch` has it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._flushed = torch.empty(2 * gpu.cache, dtype=torch.int8, device=gpu.device)

    def ways(self, entrant: Contestant) -> dict[str, Way]:
        """Device and host."""
        return {
            DEVICE: functools.partial(self._on_device, entrant),
            HOST: functools.partial(median_of, functools.partial(self._host_seconds, entrant)),
        }

    def wall(self, work: Work) -> dict[str, Way]:
        """A copy of `Gpu.copied` elements, beside every case: clocks change with the heat."""
        source = torch.ones(self._gpu.copied, device=self._gpu.device)
        target = torch.empty_like(source)
        copy = functools.partial(target.copy_, source)
        return {
            DEVICE: functools.partial(median_of, lambda: self._device_seconds(copy, stall=LAUNCH))
        }

    def _on_device(self, entrant: Contestant) -> float:
        launching = max(self._host_seconds(entrant) for _ in range(2))

        def timed() -> float:
            entrant.prepare(new=False)
            return self._device_seconds(entrant.step, STALL * launching + LAUNCH)

        return median_of(timed)

    def _device_seconds(self, step: Any, stall: float) -> float:
        start, end = self._gpu.event(), self._gpu.event()
        self._flushed.zero_()
        self._gpu.stall(stall)
        start.record()
        step()
        end.record()
        self._gpu.wait()
        return start.elapsed_time(end) / 1e3

    def _host_seconds(self, entrant: Contestant) -> float:
        entrant.prepare(new=True)
        self._gpu.wait()
        begin = time.perf_counter()
        entrant.step()
        seconds = time.perf_counter() - begin
        self._gpu.wait()
        return seconds
