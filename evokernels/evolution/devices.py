"""The device of a training run: which there are, what torch keeps for it, graphs of its work."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import re
from collections.abc import Callable, Iterator

import torch

from evokernels.errors import SettingsError

__all__ = ["CudaGraph", "find_device", "keep_memory", "named_device", "reproducible"]

# Of glibc's mallopt, see its manual page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def find_device(name: str) -> torch.device:
    """The device of a name, as `named_device` has it, which must be there.

    Raises:
        SettingsError: another name, or a device that is not there.
    """
    device = named_device(name)
    if device.type == "cpu":
        return device
    index, found = device.index, torch.cuda.device_count()
    if not found:
        raise SettingsError(
            f"device is {name!r}, but torch {torch.__version__} finds no CUDA device here; "
            "use cpu, or a machine, driver and build of torch that have one"
        )
    if index >= found:
        listed = ", ".join(f"cuda:{i}" for i in range(found))
        raise SettingsError(f"device is {name!r}, but there is {listed} here; use that or cpu")
    return device


def named_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda" (the first one) or "cuda:N", here or on another machine.

    Raises:
        SettingsError: another name.
    """
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]*))?", name)
    if match is None:
        raise SettingsError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    return torch.device("cuda", int(match[1] or 0))


@functools.cache  # once a process
def keep_memory() -> None:
    """Have this process keep the memory of a training step for the next one.

    glibc hands large blocks back to the system when they are freed, so that every page of all
    activations is asked for, and cleared, in every step. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that every glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """What torch keeps globally, set for one training run on ``device``; restored afterwards.

    Random generators of the CPU and of ``device`` begin at ``seed``. On CUDA the device is the
    current one, and convolutions are those of the CPU: the same bits every time, in float32.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(
                # benchmarking chooses another algorithm from run to run; TF32 has 10 bits
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                )
            )
        stack.enter_context(forked_generators(device))
        torch.manual_seed(seed)
        yield


def forked_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leaves the random generators of the CPU and of ``device`` as they were."""
    on_cuda = device.type == "cuda"
    return torch.random.fork_rng(devices=[device] if on_cuda else [], device_type="cuda")


class CudaGraph:
    """Work on a CUDA device that is recorded once, and then launched by one call each time.

    Follows "CUDA Graphs" in the notes of the PyTorch documentation.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = _side_stream(device)

    def capture(self, prepare: Callable[[], None], work: Callable[[], None]) -> None:
        """Run ``prepare``, then record ``work``, which does nothing yet.

        Args:
            prepare: makes everything that is made only once: handles, workspaces, kernels, state.
            work: never waits for the device; works on the same memory in every call.
        """
        # on the stream of the capture: libraries keep workspaces, autograd its nodes, by stream
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            prepare()
        torch.cuda.current_stream().wait_stream(self._stream)
        with torch.cuda.graph(self._graph, stream=self._stream):
            work()

    def replay(self) -> None:
        """Launch the recorded work; does not wait for it."""
        self._graph.replay()


@functools.cache  # one for all graphs of a process, since cuBLAS keeps a workspace for each stream
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
