"""The CUDA launcher against a driver that only writes down what it is asked for."""

import ctypes
import enum
import functools
import os
import pathlib
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from cuda_on_host import CudaOnHost, built_for_host
from device_steps import Guarded, Steps

from evokernels import zoo
from evokernels.compiler.lower import lower
from evokernels.compiler.spelling import Kind
from evokernels.compiler.structure import structure_of
from evokernels.errors import BackendError
from evokernels.kernels import cuda, noise_device, nvrtc
from evokernels.kernels.cuda import CudaBackend, capacity
from evokernels.kernels.driver import Driver
from evokernels.kernels.noise import NoisyTensor
from evokernels.kernels.noise_device import WORDS, CudaNoise

pytestmark = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))

RULE = lower(zoo.adamw)
KINDS = (Kind(structure_of(RULE), "float32", "float32", False),)
CONTEXT, MODULE = "context of device {}", "module"


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NEW = 4711


class FakeApi(types.SimpleNamespace):
    """As `cuda.bindings.driver`: functions return a status and results.

    Attributes:
        calls: names and arguments, in order.
        launched: words that a kernel would have seen.
        fail: the functions that return this status.
    """

    CUresult = Status
    CU_STREAM_LEGACY = 1

    def __init__(self, words=64, version=13000):
        super().__init__()
        self.calls, self.launched, self.fail, self.stack = [], [], {}, []
        self.words, self.number = words, version

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return value

        def recorded(*arguments):
            self.calls.append((name, *arguments))
            status = self.fail.get(name, Status.CUDA_SUCCESS)
            results = value(*arguments) if status == Status.CUDA_SUCCESS else (None,)
            return (status, *(r for r in results or () if r is not None))

        return recorded

    def names(self):
        return [name for name, *_ in self.calls]

    def cuGetErrorName(self, status):
        return (
            Status.CUDA_SUCCESS,
            None if status == Status.CUDA_ERROR_NEW else status.name.encode(),
        )

    def cuGetErrorString(self, status):
        known = status != Status.CUDA_ERROR_NEW
        return Status.CUDA_SUCCESS, b"what it means" if known else None

    def cuInit(self, flags):
        assert flags == 0

    def cuDriverGetVersion(self):
        return (self.number,)

    def cuDeviceGet(self, index):
        return (index,)

    def cuDevicePrimaryCtxRetain(self, device):
        return (CONTEXT.format(device),)

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)

    def cuCtxPopCurrent(self):
        return (self.stack.pop(),)

    def cuModuleLoadData(self, code):
        assert code.startswith(b"\x7fELF")
        assert self.stack, "no context is current"
        return (MODULE,)

    def cuModuleGetFunction(self, module, name):
        assert module == MODULE
        assert self.stack, "no context is current"
        return (name.decode(),)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared):
        assert (threads, shared, bool(self.stack)) == (256, 0, True)
        assert function in ("evk_update", "evk_perturb")
        return (3,)

    def cuLaunchKernel(self, *arguments):
        assert self.stack, "no context is current"
        parameters = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p))[0]
        seen = (ctypes.c_int64 * self.words).from_address(parameters)
        self.launched.append(np.array(seen))


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def backend(api, monkeypatch, tmp_path):
    """The CUDA backend as it would be beside two T4."""
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "driver", lambda: Driver(api))
    monkeypatch.setattr(nvrtc, "cubin", lambda source, architecture: b"\x7fELF" + source.encode())
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda device: (7, 5),
        "get_device_name": lambda device: "Tesla T4",
        "get_device_properties": lambda device: types.SimpleNamespace(multi_processor_count=40),
        "current_device": lambda: 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    streams = {0: 0, 1: 0xA1}  # the default stream, and another one
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    return CudaBackend()


def load(backend, words=40, device="cuda:1"):
    return backend.load(KINDS, words, torch.device(device))


def test_loading(backend, api):
    kernel = load(backend)
    assert kernel.resident == 40 * 3
    context = CONTEXT.format(1)
    assert [
        call for call in api.calls if call[0] not in ("cuModuleLoadData", "cuDriverGetVersion")
    ] == [
        ("cuInit", 0),
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuCtxPushCurrent", context),
        ("cuCtxPopCurrent",),
        ("cuCtxPushCurrent", context),
        ("cuModuleGetFunction", MODULE, b"evk_update"),
        ("cuCtxPopCurrent",),
        ("cuCtxPushCurrent", context),
        ("cuModuleGetFunction", MODULE, b"evk_squares"),
        ("cuCtxPopCurrent",),
        ("cuCtxPushCurrent", context),
        ("cuOccupancyMaxActiveBlocksPerMultiprocessor", "evk_update", 256, 0),
        ("cuCtxPopCurrent",),
    ]
    assert api.stack == []


def test_noise_is_launched_with_its_words(backend, api, monkeypatch):
    monkeypatch.setattr(noise_device, "driver", lambda: Driver(api))
    for name in ("_module", "_resident"):  # nothing is kept beyond this test
        monkeypatch.setattr(
            noise_device, name, functools.cache(getattr(noise_device, name).__wrapped__)
        )
    api.words = WORDS
    noise = CudaNoise([NoisyTensor(torch.zeros(2), 0, torch.ones(2)) for _ in range(300)])
    noise._device = torch.device("cuda:1")  # its tables are still here
    noise.perturb(2**64 - 1, 7, 8, -0.5)
    noise.perturb(1, 2, 3, 0.5)
    first, second = (words[3:].tolist() for words in api.launched)
    assert first == [300, 300, 0, -1, 7, 8, int(np.float64(-0.5).view(np.int64))]
    assert second == [300, 300, 0, 1, 2, 3, int(np.float64(0.5).view(np.int64))]
    launches = [call[1:8] for call in api.calls if call[0] == "cuLaunchKernel"]
    assert launches == [("evk_perturb", 120, 1, 1, 256, 1, 1)] * 2  # as many as are resident
    assert api.names().count("cuModuleLoadData") == 1


@pytest.mark.parametrize(("what", "name"), [("update", b"evk_update"), ("squares", b"evk_squares")])
def test_a_launch(backend, api, what, name):
    kernel = load(backend)
    api.calls.clear()
    words = np.arange(100, 140)
    getattr(kernel, what)(words, 7)
    (_, context), (_, *arguments), pop = api.calls
    assert api.names() == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert (context, pop) == (CONTEXT.format(1), ("cuCtxPopCurrent",))
    function, *numbers, stream, parameters, extra = arguments
    assert function == name.decode()
    assert numbers == [7, 1, 1, 256, 1, 1, 0]  # grid, block, shared memory
    assert (stream, extra) == (0xA1, 0)
    assert isinstance(parameters, int)
    assert (api.launched[0][:40] == words).all()


def test_the_default_stream_is_that_of_torch(backend, api):
    """Not one of this thread, which 0 stands for if cuda-bindings are told so."""
    load(backend, device="cuda:0").update(np.zeros(40, np.int64), 1)
    (stream,) = (call[9] for call in api.calls if call[0] == "cuLaunchKernel")
    assert stream == 1  # CU_STREAM_LEGACY


def test_each_launch_has_its_own_words_though_none_allocates(backend, api):
    kernel = load(backend)
    kernel.update(np.full(40, 1), 1)
    kernel.update(np.full(30, 2), 1)
    kernel.squares(np.full(40, 3), 1)
    assert [list(seen[[0, 29]]) for seen in api.launched] == [[1, 1], [2, 2], [3, 3]]
    addresses = {call[10] for call in api.calls if call[0] == "cuLaunchKernel"}
    assert len(addresses) == 1


def test_threads_do_not_share_the_parameters(backend, api):
    """The interpreter is free during a launch: another thread's words must not get in."""
    kernel = load(backend)
    kernel.update(np.zeros(40, np.int64), 1)
    thread = threading.Thread(target=kernel.update, args=(np.ones(40, np.int64), 1))
    thread.start()
    thread.join()
    addresses = {call[10] for call in api.calls if call[0] == "cuLaunchKernel"}
    assert len(addresses) == 2


def test_kernels_are_loaded_once(backend, api):
    first = load(backend)
    assert load(backend) is load(backend, words=64) is load(backend, device="cuda") is first
    assert api.names().count("cuModuleLoadData") == 1
    others = {load(backend, words=65), load(backend, device="cuda:0")}
    others.add(backend.load((KINDS[0], KINDS[0]), 40, torch.device("cuda:1")))
    assert len(others | {first}) == 4


@pytest.mark.parametrize(
    ("words", "most", "expected"),
    [
        *((1, 4095, 64), (64, 4095, 64), (65, 4095, 128), (2049, 4095, 4095)),
        *((4095, 4095, 4095), (300, 512, 512), (512, 512, 512)),
    ],
)
def test_room_for_parameters(words, most, expected):
    assert capacity(words, most) == expected


@pytest.mark.parametrize(
    ("driver_version", "compiler", "expected"),
    [
        (13000, (13, 0), 4095),
        (12010, (12, 1), 4095),
        (12000, (12, 9), 512),
        (12090, (12, 0), 512),
        (11080, (11, 8), 512),
    ],
)
def test_large_parameters_need_driver_and_compiler(
    backend, api, monkeypatch, driver_version, compiler, expected
):
    api.number = driver_version
    monkeypatch.setattr(nvrtc, "version", lambda: compiler)
    assert backend.most_words == expected
    assert 8 * expected <= (32764 if expected > 512 else 4096)


FUNCTIONS = {
    "cuInit": load,
    "cuDevicePrimaryCtxRetain": load,
    "cuCtxPushCurrent": load,
    "cuModuleLoadData": load,
    "cuModuleGetFunction": load,
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": load,
    "cuLaunchKernel": None,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_error_of_the_driver_is_told(backend, api, name):
    kernel = load(backend, words=65) if name == "cuLaunchKernel" else None
    api.words = 128
    api.fail[name] = Status.CUDA_ERROR_INVALID_VALUE
    message = rf"{name}: what it means \(CUDA_ERROR_INVALID_VALUE\)$"
    with pytest.raises(BackendError, match=message):
        kernel.update(np.zeros(65, np.int64), 1) if kernel else load(backend)
    assert api.stack == []  # whatever was current is current again
    api.fail.clear()
    (kernel or load(backend)).update(np.zeros(4, np.int64), 1)  # nothing is left half done


def test_what_to_do_about_an_error(backend, api):
    kernel = load(backend)
    api.fail["cuCtxPushCurrent"] = Status.CUDA_ERROR_NOT_INITIALIZED
    with pytest.raises(BackendError, match=r"cuLaunchKernel: .*NOT_INITIALIZED.*; .*'spawn'"):
        kernel.update(np.zeros(4, np.int64), 1)
    assert "cuLaunchKernel" not in api.names()


def test_an_error_that_the_driver_does_not_know(backend, api):
    api.fail["cuModuleLoadData"] = Status.CUDA_ERROR_NEW
    with pytest.raises(BackendError, match=r"unknown to this driver \(.*4711"):
        load(backend)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads
def test_a_forked_process_is_told(backend, api):
    kernel = load(backend)
    api.calls.clear()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kernel.update(np.zeros(4, np.int64), 1)
            os.write(write, b"launched")
        except BackendError as error:
            os.write(write, f"{error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "forked process cannot use CUDA" in (told := pipe.read()), told
    kernel.update(np.zeros(4, np.int64), 1)


# whole steps: what the driver is asked to launch runs on the host


@pytest.fixture
def on_host(backend, api, monkeypatch):
    """The backend, on a driver that runs the same source compiled for the host."""
    built = []

    def compiled(source, architecture):
        assert architecture == 75
        built.append(built_for_host(source))
        return b"\x7fELF"

    def launch(*arguments):
        function, blocks, stream, parameters = (arguments[i] for i in (0, 1, 8, 9))
        assert stream == 0xA1
        (library,) = built
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        getattr(library, function)(ctypes.c_void_p(pointers[0]), ctypes.c_int64(blocks))

    monkeypatch.setattr(nvrtc, "cubin", compiled)
    api.cuLaunchKernel = launch
    return backend


def steps_of(backend, counts):
    """Three steps of tensors of these sizes, and the sum of the squares of the last gradients."""
    random = torch.Generator().manual_seed(0)
    memory = Guarded()
    tensors = [
        memory.bound(zoo.adamw, torch.randn(count, generator=random), torch.float32)
        for count in counts
    ]
    steps = Steps(backend, tensors, [zoo.adamw] * len(counts))
    for _ in range(3):
        gradients = [torch.randn(count, generator=random) for count in counts]
        steps.run(gradients)
    memory.check()
    assert (steps.counts == 3).all()
    return [*steps.results, steps.plan.sum_of_squares(gradients)], len(steps.plan.launches)


@pytest.mark.parametrize(
    ("counts", "version", "launches"),
    [
        ([1000, 3, 4097], 13000, 1),
        ([7] * 500, 13000, 1),
        ([7] * 500, 12000, 2),  # parameters of 4 KB: the addresses of 482 gradients
    ],
)
def test_whole_steps(on_host, api, counts, version, launches):
    api.number = version
    # in as many launches: the sum of the squares is rounded in another order in more
    expected, _ = steps_of(CudaOnHost(on_host.most_words, resident=120), counts)
    actual, taken = steps_of(on_host, counts)
    assert taken == launches
    assert api.names().count("cuLaunchKernel") == 4 * launches
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_plans_of_one_kernel_do_not_disturb_each_other(on_host, api):
    """A shorter block of words leaves those of a longer one behind itself."""
    sizes = ([5] * 20, [6])
    expected = [steps_of(CudaOnHost(resident=120), counts)[0] for counts in sizes]
    actual = [steps_of(on_host, counts)[0] for counts in sizes]
    assert api.names().count("cuModuleLoadData") == 1
    for a, b in zip(actual, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# why not


def why_not(backend, device="cuda:0"):
    return backend.why_not(RULE.program, torch.device(device), torch.float32)


def test_nothing_is_against_a_t4(backend):
    assert why_not(backend) is None


def test_code_of_a_later_minor_version_runs_on_an_older_driver(backend, api, monkeypatch):
    """CUDA's minor version compatibility holds for machine code."""
    api.number = 12040
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    assert why_not(backend) is None


def no_bindings():
    raise ImportError("No module named 'cuda'")


def no_library():
    raise RuntimeError("Failed to find libnvrtc")


REASONS = [
    ("cuda 12.6 driver", {"number": 12060}, "supports CUDA 12.6, NVRTC is of CUDA 13.0: update"),
    ("amd", {"version.hip": "6.4", "version.cuda": None}, "AMD GPUs .ROCm 6.4.; use 'auto'"),
    ("no device", {"cuda.is_available": lambda: False}, "torch finds no CUDA device"),
    (
        "bindings",
        {"nvrtc.version": no_bindings, "version.cuda": "12.8"},
        r"cuda-bindings is missing .No module named 'cuda'.: .*cuda-bindings\[all\]==12\.\*",
    ),
    ("library", {"nvrtc.version": no_library}, "NVRTC cannot be loaded .Failed to find libnvrtc"),
    (
        "pascal",
        {"cuda.get_device_capability": lambda device: (6, 1)},
        "needs compute capability 7.0 or above, cuda:0 is a Tesla T4, compute capability 6.1",
    ),
    (
        "volta with a compiler that has dropped it",
        {"cuda.get_device_capability": lambda device: (7, 0)},
        r"NVRTC 13.0 compiles for compute capabilities 7.5 to \d+.\d, cuda:0 is a .* 7.0: install",
    ),
    (
        "a GPU of the future",
        {"cuda.get_device_capability": lambda device: (99, 0)},
        "NVRTC 13.0 compiles for .*, compute capability 99.0",
    ),
]


@pytest.mark.parametrize(
    ("changes", "reason"), [r[1:] for r in REASONS], ids=[r[0] for r in REASONS]
)
def test_reasons(backend, api, monkeypatch, changes, reason):
    for name, value in changes.items():
        if name == "number":
            api.number = value
        elif name.startswith("nvrtc."):
            monkeypatch.setattr(nvrtc, name.partition(".")[2], value)
        else:
            monkeypatch.setattr(f"torch.{name}", value)
    assert re.search(reason, why_not(backend) or "none")


def test_other_devices():
    backend = CudaBackend()
    assert why_not(backend, "cpu") == "it runs on NVIDIA GPUs, the tensors are on cpu"
    if not torch.cuda.is_available():
        assert why_not(backend) == "torch finds no CUDA device"


def test_what_runs_in_words(backend):
    name = backend.kernel(RULE.program, torch.bfloat16)
    assert name == "g_m_v, bfloat16 (CUDA C++, NVRTC {}.{})".format(*nvrtc.version())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), 75), ((8, 0), 80), ((8, 9), 89), ((9, 0), 90), ((7, 2), None), ((6, 9), None)],
)
def test_the_architecture_to_compile_for(monkeypatch, capability, expected):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 87, 89, 90, 100))
    assert nvrtc.architecture_for(capability) == expected


def test_a_later_device_of_a_generation_runs_the_code_of_an_earlier_one(monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 90))
    assert nvrtc.architecture_for((8, 9)) == 86


def test_cards_do_not_run_the_code_of_embedded_devices_nor_those_theirs(monkeypatch):
    # of CUDA 12.8, which knows Thor (101), but not yet B300 (103)
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 90, 100, 101, 120))
    assert nvrtc.architecture_for((10, 3)) == 100
    assert nvrtc.architecture_for((10, 1)) == 101
    assert nvrtc.architecture_for((8, 7)) is None


# cuda-bindings themselves, on a driver that is none

LAUNCH = """
import numpy as np
from evokernels.errors import BackendError
from evokernels.kernels.cuda import THREADS, _Parameters
from evokernels.kernels.driver import driver

d = driver()
print("version", *d.version())
context = d.primary_context(2)
module = d.module(context, b"\\x7fELF code")
function = d.function(context, module, "evk_update")
print("at a time", d.blocks_at_a_time(context, function, THREADS))
parameters = _Parameters(4095)
parameters.words[:] = np.arange(4095)
d.launch(context, function, 160, THREADS, 0xABCD, parameters.pointers)
d.launch(context, function, 1, THREADS, 0, parameters.pointers)
try:
    d.launch(context, function, 0, THREADS, 0xABCD, parameters.pointers)
except BackendError as error:
    print(error)
"""

EXPECTED = """\
version 13 0
push 0xc2
load ELF code
pop
push 0xc2
function evk_update of 0xd0
pop
push 0xc2
occupancy 0xf0 256 0
pop
at a time 3
push 0xc2
launch 0xf0 grid 160 1 1 block 256 1 1 shared 0 stream 0xabcd words 0 1 4094
pop
push 0xc2
launch 0xf0 grid 1 1 1 block 256 1 1 shared 0 stream 0x1 words 0 1 4094
pop
push 0xc2
pop
cuLaunchKernel: invalid argument (CUDA_ERROR_INVALID_VALUE)
"""


def test_the_bindings_take_what_they_are_given(tmp_path):
    source = pathlib.Path(__file__).with_name("fake_driver.c")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    path = os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH],
        env={**os.environ, "LD_LIBRARY_PATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == (EXPECTED, 0), done.stderr
