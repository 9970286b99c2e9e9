"""The few functions of the CUDA driver that a launch needs, each result checked.

Through cuda-bindings, in the primary context of a device, which is the one that torch works in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from evokernels.errors import BackendError

__all__ = ["Driver", "driver"]

# What to do about an error, where it is not of this package's making.
ADVICE = {
    "CUDA_ERROR_NOT_INITIALIZED": "a forked process cannot use CUDA: start processes with 'spawn'",
    "CUDA_ERROR_DEINITIALIZED": "the process is ending",
    "CUDA_ERROR_OUT_OF_MEMORY": "the device has no memory left",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel is for another device: please report it",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel launched before, perhaps not one of this package, "
    "touched memory that is not its own; CUDA_LAUNCH_BLOCKING=1 shows which",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "something before broke the capture of a CUDA graph",
}


@functools.cache
def driver() -> Driver:
    """The driver of this machine, on which torch has found a device."""
    from cuda.bindings import driver as api

    return Driver(api)


class Driver:
    """The driver API as `cuda.bindings.driver` has it: functions return a status and results.

    Contexts, modules and functions are what the API returns for them.
    """

    def __init__(self, api: ModuleType) -> None:
        self._api = api
        self._success = api.CUresult.CUDA_SUCCESS
        # looked up once: these are called in every step
        self._push, self._pop = api.cuCtxPushCurrent, api.cuCtxPopCurrent
        self._launch = api.cuLaunchKernel
        self._default_stream = int(api.CU_STREAM_LEGACY)

    def version(self) -> tuple[int, int]:
        """The newest CUDA that it can run."""
        number = self._call("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def primary_context(self, device: int) -> Any:
        """Of the device with this number; it is never given back, as torch never gives it back."""
        self._call("cuInit", 0)
        return self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))

    def module(self, context: Any, code: bytes) -> Any:
        """Machine code, loaded into the memory of the device."""
        with self._within(context):
            return self._call("cuModuleLoadData", code)

    def function(self, context: Any, module: Any, name: str) -> Any:
        """A kernel of a module; where modules load lazily, this is when its code is loaded."""
        with self._within(context):
            return self._call("cuModuleGetFunction", module, name.encode())

    def blocks_at_a_time(self, context: Any, function: Any, threads: int) -> int:
        """How many blocks of so many threads a multiprocessor holds."""
        name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        with self._within(context):
            return self._call(name, function, threads, 0)

    def launch(
        self, context: Any, function: Any, blocks: int, threads: int, stream: int, parameters: int
    ) -> None:
        """Launch a kernel.

        Args:
            stream: its address; 0 is the default stream of torch, with which all other streams
                wait for each other, also where cuda-bindings are told to give each thread its own
                (``CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM``).
            parameters: the address of an array of pointers, one to each parameter of the kernel;
                parameters are read before this returns.
        """
        # Whatever device is current in this thread, or none: a thread begins without a context.
        # Not `_within`: a generator costs as much as the launch.
        (status,) = self._push(context)
        if status == self._success:
            stream = stream or self._default_stream
            (status,) = self._launch(
                *(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, 0)
            )
            self._pop()
            if status == self._success:
                return
        raise self._error("cuLaunchKernel", status)

    @contextlib.contextmanager
    def _within(self, context: Any) -> Iterator[None]:
        self._call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a function that has at most one."""
        status, *results = getattr(self._api, name)(*arguments)
        if status != self._success:
            raise self._error(name, status)
        return results[0] if results else None

    def _error(self, name: str, status: Any) -> BackendError:
        _, code = self._api.cuGetErrorName(status)
        _, meaning = self._api.cuGetErrorString(status)
        # an error that this driver does not know has neither
        code = code.decode() if code else str(status)
        meaning = meaning.decode() if meaning else "an error unknown to this driver"
        advice = ADVICE.get(code)
        return BackendError(f"{name}: {meaning} ({code})" + (f"; {advice}" if advice else ""))
