"""Weight gradients of convolutions by the native library, against torch's in float64."""

import ctypes
import pathlib

import pytest
import torch
from guarded import Memory
from torch import nn

from evokernels.kernels import native
from evokernels.tasks import ConvNet, NativeNetwork, layers
from evokernels.tasks.layers import Images, weight_gradient

DTYPES = [torch.float32, torch.bfloat16]
PROCESSOR = pathlib.Path("/proc/cpuinfo")

native_only = pytest.mark.skipif(not native.has_convolution_weights(), reason="another processor")


def images(*shape, dtype, seed=0):
    """Halves between -2 and 2, exact in both types, and so are sums of their products."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randint(-4, 5, shape, generator=generator) / 2).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def torch_gradient(gradient, x, dtype=torch.float64):
    weight = torch.zeros(gradient.shape[1], x.shape[1], 3, 3, dtype=dtype)
    return torch.ops.aten.convolution_backward(
        *(gradient.to(dtype), x.to(dtype), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        [False, True, False],
    )[1]


# (images, channels, outputs, height, width): rows of sums left over, lanes left out, odd heights,
# more than one group of images
SHAPES = [
    *((1, 1, 1, 1, 1), (1, 3, 32, 1, 1), (2, 3, 5, 5, 7), (3, 4, 33, 1, 6), (2, 5, 64, 6, 1)),
    *((1, 6, 31, 2, 2), (2, 7, 16, 3, 4), (65, 2, 3, 3, 3), (33, 32, 64, 4, 5), (1, 36, 40, 8, 7)),
]


@native_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_torch_for_every_number_of_threads(shape, dtype):
    count, channels, outputs, height, width = shape
    x = images(count, channels, height, width, dtype=dtype)
    gradient = images(count, outputs, height, width, dtype=dtype, seed=1)
    expected = torch_gradient(gradient, x)
    library, kind = native.library(), native.FORMATS[dtype]
    of = ctypes.byref(Images(count, height, width, channels))
    lanes = layers.GROUP_OUTPUTS
    groups, padded = -(-count // layers.GROUP_IMAGES), -(-outputs // lanes) * lanes
    for threads in (1, 2, 3, 8):
        memory = Memory()
        room = memory.empty(
            threads, library.evk_convolution_room(of, outputs, kind), dtype=torch.float32
        ).fill_(float("nan"))
        sums = memory.empty(groups, 3, 3, channels, padded, dtype=torch.float32)
        memory_of = [memory.of(t.permute(0, 2, 3, 1)).data_ptr() for t in (gradient, x)]
        library.evk_convolution_weights(
            *(*memory_of, sums.data_ptr(), room.data_ptr(), of, outputs, kind, threads)
        )
        memory.check()
        got = sums.double().sum(0)[..., :outputs].permute(3, 2, 0, 1)
        assert torch.equal(got, expected)
    assert torch.equal(weight_gradient(gradient, x).double(), expected)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_depends_on_no_thread_and_errs_less_than_that_of_torch(dtype):
    torch.manual_seed(0)
    x, gradient = (
        torch.randn(70, channels, 15, 16).to(dtype).contiguous(memory_format=torch.channels_last)
        for channels in (32, 64)
    )
    one = weight_gradient(gradient, x)
    assert one.dtype == torch.float32
    assert one.is_contiguous(memory_format=torch.channels_last)
    exact, theirs = torch_gradient(gradient, x), torch_gradient(gradient, x, dtype)
    error, allowed = ((g - exact).norm() / exact.norm() for g in (one, theirs))
    assert error <= allowed
    assert error < 1e-6
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(weight_gradient(gradient, x), one)
    finally:
        torch.set_num_threads(threads)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 6), (2, 3)])
def test_what_is_not_finite_stays_in_its_channel(dtype, value, place):
    x, gradient = (images(2, 5, 5, 7, dtype=dtype, seed=seed) for seed in (0, 1))
    expected = torch_gradient(gradient, x)
    x[1, 2, *place] = value
    got = weight_gradient(gradient, x)
    assert not got[:, 2, 1, 1].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(got[:, others].double(), expected[:, others])
    x[1, 2, *place], gradient[1, 3, *place] = 0, value
    got = weight_gradient(gradient, x)
    assert not got[3, :, 1, 1].isfinite().any()
    assert got[[0, 1, 2, 4]].isfinite().all()


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_images_there_is_nothing_to_add(dtype):
    x, gradient = (torch.empty(0, channels, 4, 4, dtype=dtype) for channels in (3, 5))
    assert torch.equal(weight_gradient(gradient, x), torch.zeros(5, 3, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("there", [False, pytest.param(True, marks=native_only)])
def test_it_is_asked_for_where_it_is_there(monkeypatch, dtype, there):
    asked = []

    def watched(gradient, x):
        asked.append(x.dtype)
        return weight_gradient(gradient, x)

    monkeypatch.setattr(native, "has_convolution_weights", lambda: there)
    monkeypatch.setattr(layers, "weight_gradient", watched)
    network = ConvNet()
    network.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    network.classifier = nn.Sequential()
    network.to(memory_format=torch.channels_last)
    x = images(3, 3, 6, 6, dtype=torch.float32)
    NativeNetwork(network, dtype)(x).sum().backward()
    assert asked == [dtype] * there
    got = network.features[0].weight.grad
    network.zero_grad()
    rounded = network.double()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).double()
    rounded(x.double()).sum().backward()
    # which of four is the largest may depend on rounding
    assert (got - rounded.features[0].weight.grad).norm() < 0.05 * got.norm()


@pytest.mark.skipif(not PROCESSOR.exists(), reason="the system does not tell its processor")
def test_it_is_there_where_the_processor_has_the_instructions():
    flags = PROCESSOR.read_text().split()
    dispatched = native.instruction_set() != "baseline"
    fits = "avx512_bf16" in flags and "amx_bf16" not in flags
    assert native.has_convolution_weights() == (dispatched and fits)
