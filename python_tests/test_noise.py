"""Noise: normal numbers that depend on their place alone, and what is made of them."""

import ctypes
import math
import pathlib
import platform
import re
import subprocess

import numpy as np
import pytest
import torch
from cases import flat
from cuda_on_host import built_for_host

from evokernels.errors import BackendError
from evokernels.kernels import native, noise_backends, nvrtc
from evokernels.kernels.cuda_source import noise_source, with_included
from evokernels.kernels.noise import NOISE_BACKENDS, ModelNoise, NoisyTensor, select_noise
from evokernels.kernels.noise_device import WORDS, CudaNoise, DeviceNoise
from evokernels.kernels.normal import normal, normal_pair
from evokernels.kernels.plan import ARITHMETIC
from evokernels.kernels.rounding import philox


class HostNoise(DeviceNoise):
    """The kernels of a GPU compiled for the host, in fewer blocks than there are chunks."""

    @staticmethod
    def why_not(device, dtype):
        return None if device.type == "cpu" else "it runs on the CPU"

    def _launch(self, name, words, chunks):
        block = np.array(words)
        assert block.shape == (WORDS,)
        kernel = getattr(built_for_host(noise_source()), name)
        kernel(ctypes.c_void_p(block.ctypes.data), ctypes.c_int64(min(chunks, 3)))


@pytest.fixture(autouse=True)
def _device_on_host(monkeypatch):
    monkeypatch.setitem(NOISE_BACKENDS, "on host", HostNoise)


CSRC = pathlib.Path(__file__).parents[1] / "csrc"
BACKENDS = ["cpu", "eager", "on host"]
DTYPES = list(ARITHMETIC)


class Noise(ctypes.Structure):
    """evk_noise."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("generation", ctypes.c_uint32),
        ("member", ctypes.c_uint32),
        ("position", ctypes.c_uint32),
    )


def native_normal(seed, generation, member, position, first, count, library=None):
    values = torch.full((count,), math.nan)
    (library or native.library()).evk_normal(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.byref(Noise(seed, generation, member, position)),
        ctypes.c_int64(first),
        ctypes.c_int64(count),
    )
    return values


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# seed, generation, member, position; the largest of each
KEYS = [(0, 0, 0, 0), (7 << 40 | 9, 11, 13, 17), (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**24 - 2)]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("first", [0, 1, 255, 2**34 - 6, 2**42 - 1003])
def test_torch_draws_the_same_bits(key, first):
    drawn = native_normal(*key, first, 1003)
    assert same_bits(drawn, normal(*key, first, 1003))
    assert drawn.isfinite().all()


def test_any_part_is_that_part_of_the_whole():
    whole = native_normal(1, 2, 3, 4, 0, 1500)
    for first in (0, 1, 2, 3, 4, 62, 255, 256, 700):
        for count in (0, 1, 3, 4, 63, 64, 65, 255, 256, 257, 700):
            part = whole[first : first + count]
            assert same_bits(native_normal(1, 2, 3, 4, first, count), part)
            assert same_bits(normal(1, 2, 3, 4, first, count), part)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86-64's")
def test_the_bits_do_not_depend_on_the_instruction_set(tmp_path):
    flags = [
        *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
        *("-DEVK_ONE_INSTRUCTION_SET", "-Wno-psabi", f"-I{CSRC}"),
    ]
    expected = native_normal(5, 6, 7, 8, 9, 5003)
    for level in ("x86-64", "x86-64-v3", "x86-64-v4"):
        if level <= native.instruction_set():
            built = tmp_path / f"{level}.so"
            command = ["cc", *flags, f"-march={level}", CSRC / "noise.c", "-o", built, "-lm"]
            subprocess.run(command, check=True)
            assert same_bits(native_normal(5, 6, 7, 8, 9, 5003, ctypes.CDLL(str(built))), expected)


def words_to_try():
    """Random ones, and all where something changes: powers of two, quadrants, the ends."""
    edges = {(sign * (1 << bit) + off) % 2**32 for bit in range(33) for sign in (1, -1)
             for off in (-1, 0, 1)}  # fmt: skip
    # around sqrt(1/2) and its half, where the power of two changes
    edges |= {int(math.sqrt(0.5) * 2.0**power) + off for power in (32, 31) for off in range(-4, 5)}
    generator = torch.Generator().manual_seed(0)
    edge = torch.tensor(sorted(edges))
    a = torch.cat([edge, torch.randint(2**32, (50_000,), generator=generator)])
    b = torch.cat([edge.flip(0), torch.randint(2**32, (50_000,), generator=generator)])
    return a, b


def exact_pair(a, b):
    """Box & Muller 1958 in float64, from the definitions in csrc/noise.h."""
    a, b = a.numpy().astype(np.uint64), b.numpy().astype(np.uint64)
    uniform = ((a >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-31
    radius = np.sqrt(-2 * np.log(uniform))
    lower = (b & np.uint64(2**30 - 1)).astype(np.int64)
    angle = np.pi / 2 * np.where(lower >= 2**29, lower - 2**30, lower) * 2.0**-30
    x = np.cos(angle) * np.where(b >> np.uint64(31), -1, 1)
    y = np.sin(angle)
    swap = (b >> np.uint64(30) & np.uint64(1)).astype(bool)
    return radius, radius * np.where(swap, y, x), radius * np.where(swap, x, y)


def test_normals_are_those_of_the_exact_formula():
    a, b = words_to_try()
    radius, *exact = exact_pair(a, b)
    # a few roundings, and that of the uniform number: where it is near 1 the radius feels it most
    bound = 2.0**-24 * (3 * radius + 1 / radius)
    for drawn, expected in zip(normal_pair(a, b), exact, strict=True):
        error = np.abs(drawn.double().numpy() - expected)
        assert (error <= np.minimum(bound, 2.0**-12)).all()
        assert np.abs(drawn.numpy()).max() < 6.67


HEADER_ALONE = """
#include "noise.h"
extern "C" EVK_ENTRY void pairs(const uint32_t *a, const uint32_t *b, float *x, float *y, int n) {
    for (int i = 0; i < n; ++i) normal_pair(a[i], b[i], x + i, y + i);
}
"""


def test_the_header_gives_the_same_bits_for_every_word():
    library = built_for_host(
        with_included("#define EVK_ENTRY\n" + HEADER_ALONE, "pairs.cpp", set())
    )
    a, b = words_to_try()
    x, y = torch.empty(len(a)), torch.empty(len(a))
    words = [(word - (word >> 31 << 32)).to(torch.int32) for word in (a, b)]
    library.pairs(*(ctypes.c_void_p(t.data_ptr()) for t in (*words, x, y)), len(a))
    for drawn, expected in zip((x, y), normal_pair(a, b), strict=True):
        assert same_bits(drawn, expected)


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
def test_the_header_compiles_for_a_gpu_without_fused_arithmetic():
    text = with_included("#define EVK_ENTRY __global__\n" + HEADER_ALONE, "pairs.cu", set())
    ptx = nvrtc.compiled(text, 75).ptx
    assert "sqrt.rn.f32" in ptx
    assert "fma." not in ptx


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
def test_the_kernels_compile_for_a_gpu():
    compiled = nvrtc.compiled(noise_source(), 75)
    for entry in ("evk_perturb", "evk_estimate"):
        assert f"{entry}_param_0[{8 * WORDS}]" in compiled.ptx
    assert "fma." not in compiled.ptx
    spills = re.findall(r"(\d+) bytes spill", nvrtc.compiled(noise_source(), 75, nvrtc.VERBOSE).log)
    assert spills
    assert set(spills) == {"0"}


def correlation(a, b):
    return float((a * b).mean())


def test_the_numbers_are_normal():
    x = native_normal(3, 1, 4, 1, 0, 2**20).double()
    n = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - expected) < 4 * math.sqrt(variance / n)
    # Kolmogorov & Smirnov: 1.95 / sqrt(n) is passed once in a thousand times
    cumulative = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1) / n
    assert max((cumulative - steps[:-1]).max(), (steps[1:] - cumulative).max()) < 1.95 / n**0.5
    # as many beyond 4 as there should be
    beyond = int((x.abs() > 4).sum())
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs(beyond - expected) < 4 * math.sqrt(expected)


def test_the_numbers_are_independent():
    n = 2**18
    key = (3, 1, 4, 1)
    x = native_normal(*key, 0, n).double()
    others = [torch.roll(x, shift) for shift in (1, 2, 3, 4, 64, 256)]
    for place in range(4):  # seed, generation, member, position
        for bit in (0, 1, 8, 23):
            other = list(key)
            other[place] ^= 1 << bit
            others.append(native_normal(*other, 0, n).double())
    others.append(native_normal(*key, 2**34, n).double())
    for other in others:
        assert abs(correlation(x, other)) < 4.5 / n**0.5
        assert abs(correlation(x**2 - 1, other**2 - 1)) < 4.5 * 2 / n**0.5


# tensors in every layout: shape and what is done to a dense one
SHAPES = [(), (0,), (1,), (63,), (1000,), (4097,), (3, 0, 2), (1, 5, 1), (17, 33)]
LAYOUTS = {
    "transposed": lambda make: make(37, 29).t(),
    "channels last": lambda make: make(5, 4, 3, 3).to(memory_format=torch.channels_last),
    "sliced": lambda make: make(41, 50)[3:40, 7:36],
    "every third": lambda make: make(700, 3)[:, 1],
    "permuted": lambda make: make(6, 7, 8).permute(1, 2, 0)[::2],
}


def maker(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def tensors_of(dtype, seed=0):
    make = maker(dtype, seed)
    return [make(*shape) for shape in SHAPES] + [layout(make) for layout in LAYOUTS.values()]


def exact_noise(tensor, position, member, seed=5, generation=6):
    drawn = native_normal(seed, generation, member, position, 0, tensor.numel())
    return drawn.view(tensor.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbing_adds_the_noise_and_rounds_once(backend, dtype):
    dense = [[t.contiguous() for t in tensors_of(dtype, seed)] for seed in (3, 4)]
    centres = [*tensors_of(dtype), *tensors_of(dtype, 1), *dense[0]]  # either may be strided
    targets = [*tensors_of(dtype, 2), *dense[1], *tensors_of(dtype, 5)]
    bound = [NoisyTensor(t, i, c) for i, (t, c) in enumerate(zip(targets, centres, strict=True))]
    versions = [t._version for t in targets]
    ModelNoise(bound, backend).perturb(5, 6, 7, -0.03)
    arithmetic = np.float64 if dtype == torch.float64 else np.float32
    for i, (target, centre) in enumerate(zip(targets, centres, strict=True)):
        eps = exact_noise(target, i, 7).numpy().astype(arithmetic)
        sum_ = centre.to(ARITHMETIC[dtype]).numpy() + arithmetic(-0.03) * eps
        assert torch.equal(target, torch.as_tensor(sum_).to(dtype))
    assert all(t._version > v for t, v in zip(targets, versions, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_estimate_is_the_weighted_sum_of_the_noise(dtype):
    weights = [0.5, 0.0, -1.25, 1e-3, math.pi]
    results = {}
    for backend in BACKENDS:
        targets = tensors_of(dtype)
        versions = [t._version for t in targets]
        bound = [NoisyTensor(t, i) for i, t in enumerate(targets)]
        ModelNoise(bound, backend).estimate(5, 6, weights)
        assert all(t._version > v for t, v in zip(targets, versions, strict=True))
        results[backend] = targets
    for i, group in enumerate(zip(*results.values(), strict=True)):
        drawn = [exact_noise(group[0], i, k).double().flatten() for k in range(len(weights))]
        exact = torch.tensor(
            [math.fsum(w * float(e) for w, e in zip(weights, at, strict=True))
             for at in zip(*drawn, strict=True)], dtype=torch.float64
        ).view(group[0].shape)  # fmt: skip
        tolerance = 1e-15 if dtype == torch.float64 else 0.51 * torch.finfo(dtype).eps
        for target in group:
            torch.testing.assert_close(target.double(), exact, rtol=tolerance, atol=1e-15)
            assert torch.equal(target, group[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_computes_the_same_bits(backend, dtype):
    results = []
    for device, name in (("cpu", "cpu"), ("cuda", backend)):
        perturbed, estimated = ([t.to(device) for t in tensors_of(dtype, s)] for s in (1, 2))
        centres = [t.to(device) for t in tensors_of(dtype)]
        pairs = enumerate(zip(perturbed, centres, strict=True))
        ModelNoise([NoisyTensor(t, i, c) for i, (t, c) in pairs], name).perturb(5, 6, 7, -0.03)
        noisy = [NoisyTensor(t, i) for i, t in enumerate(estimated)]
        ModelNoise(noisy, name).estimate(5, 6, [0.5, 0.0, -1.25, 1e-3, math.pi])
        results.append([t.cpu() for t in (*perturbed, *estimated)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_memory_around_a_slice_is_left_alone():
    guarded = torch.full((60, 50), 7.0)
    noisy = NoisyTensor(guarded[3:40, 7:36], 0, torch.zeros(37, 29))
    ModelNoise([noisy]).perturb(1, 2, 3, 1.0)
    assert (guarded != 7).sum() == 37 * 29
    ModelNoise([NoisyTensor(guarded[3:40, 7:36], 0)]).estimate(1, 2, [0.0])
    assert (guarded == 0).sum() == 37 * 29
    assert (guarded == 7).sum() == 60 * 50 - 37 * 29


def test_neither_threads_nor_chunks_change_a_bit(monkeypatch):
    """More elements than one thread is given, in tensors of all sizes."""
    shapes = [(3,), (257, 130), (256,), (40_000,), (1, 1), (255, 3)]

    def run(backend, threads):
        torch.set_num_threads(threads)
        centres = [torch.zeros(shape) for shape in shapes]
        perturbed, estimated = ([torch.empty_like(c) for c in centres] for _ in range(2))
        tensors = zip(perturbed, centres, strict=True)
        noisy = [NoisyTensor(t, i, c) for i, (t, c) in enumerate(tensors)]
        ModelNoise(noisy, backend).perturb(1, 2, 3, 0.1)
        noisy = [NoisyTensor(t, i) for i, t in enumerate(estimated)]
        ModelNoise(noisy, backend).estimate(1, 2, [0.1, -0.2, 0.3])
        return torch.cat([flat(perturbed), flat(estimated)])

    threads = torch.get_num_threads()
    try:
        expected = run("cpu", 1)
        assert all(same_bits(run("cpu", n), expected) for n in (2, 3, 7))
        monkeypatch.setattr(noise_backends, "_CHUNK", 1001)
        assert same_bits(run("eager", 1), expected)
        assert same_bits(run("on host", 1), expected)
    finally:
        torch.set_num_threads(threads)
    assert expected.unique().numel() > 0.9 * len(expected)


def test_the_choice_explains_itself(monkeypatch):
    cpu, other = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_noise(cpu, torch.float32) == ("cpu", {})
    name, rejected = select_noise(other, torch.float32)
    assert (name, list(rejected)) == ("eager", ["cpu", "cuda"])
    assert rejected["cpu"] == "it runs on the CPU, the tensors are on cuda:0"
    assert rejected["cuda"] == CudaNoise.why_not(other, torch.float32)
    with pytest.raises(BackendError, match="'cpu': it runs on the CPU, the tensors are on cuda:0"):
        select_noise(other, torch.float32, "cpu")
    with pytest.raises(
        BackendError, match="unknown backend 'gpu'; use 'auto', 'cpu', 'cuda', 'eager'"
    ):
        select_noise(cpu, torch.float32, "gpu")
    with pytest.raises(BackendError, match=r"are torch.complex64; they may be torch.float32, "):
        ModelNoise([NoisyTensor(torch.zeros(3, dtype=torch.complex64), 0)])
    with pytest.raises(BackendError, match="float64, which mps lacks"):
        select_noise(torch.device("mps"), torch.float32)


def test_where_the_library_is_missing_torch_takes_over(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    assert select_noise(torch.device("cpu"), torch.float32) == (
        "eager",
        {"cpu": "not built", "cuda": "it runs on NVIDIA GPUs, the tensors are on cpu"},
    )


def test_words_come_from_philox_as_the_header_says():
    """Element 4 * quarter + 2 of the noise, from its words by the exact formula."""
    seed, generation, member, position, quarter = 2**63 + 5, 6, 7, 2**23 + 8, 2**33 + 9
    counter = (quarter % 2**32, quarter >> 32 | (position + 1) << 8, member, generation)
    words = philox(tuple(torch.tensor([word]) for word in counter), seed)
    _, x, y = exact_pair(*words[2:])
    drawn = native_normal(seed, generation, member, position, 4 * quarter + 2, 2)
    torch.testing.assert_close(drawn.double(), torch.tensor([*x, *y]), rtol=1e-6, atol=1e-6)
