"""The image networks through the native library, against torch's operations in float64."""

import copy
import ctypes
import dataclasses
import pickle
import resource

import pytest
import torch
from guarded import Memory
from torch import nn
from torch.nn import functional

from evokernels import Architecture, zoo
from evokernels.errors import BackendError, SettingsError
from evokernels.evolution import precision
from evokernels.evolution.devices import keep_memory
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.precision import Autocast, best_precision, computing
from evokernels.evolution.trial import Conditions, Trial
from evokernels.kernels import native
from evokernels.tasks import (
    CifarCNN,
    ConvNet,
    NativeNetwork,
    SmallCNN,
    build,
    layers,
    load_images,
    training_batches,
)
from evokernels.tasks.images import Batch, ImageData, ImageMaker
from evokernels.tasks.layers import Dropout, Images, Norm
from evokernels.tasks.models import Residual

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
NO_DROPOUT = Dropout(0, 0, 1.0)

# (images, channels, height, width): odd ones are cut off, channels fill vectors or do not
SHAPES = [
    *((1, 1, 2, 2), (1, 1, 1, 1), (1, 3, 5, 7), (2, 32, 9, 4)),
    *((3, 33, 4, 6), (2, 16, 3, 3), (2, 64, 6, 1)),
]


@pytest.fixture(autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def last(x):
    """(N, C, H, W) → contiguous (N, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def first(x):
    return x.permute(0, 3, 1, 2)


def numbers(shape, dtype, seed=0):
    """Halves between -2 and 2, so that many are equal, and exact in both types."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 5, shape, generator=generator) / 2).to(dtype)


def pool(x, gradient, dropout=NO_DROPOUT, threads=1):
    """y, code and the gradient of x, its sums for each image, all (N, H, W, C)."""
    memory, library = Memory(), native.library()
    images, height, width, channels = x.shape
    half = images, height // 2, width // 2, channels
    shape, kind = Images(images, height, width, channels), native.FORMATS[x.dtype]
    x, gradient = memory.of(x), memory.of(gradient)
    y, code = memory.empty(*half, dtype=x.dtype), memory.empty(*half, dtype=torch.uint8)
    result = memory.empty(*x.shape, dtype=x.dtype)
    sums = memory.empty(images, channels, dtype=torch.float32)
    library.evk_pool(
        *(x.data_ptr(), y.data_ptr(), code.data_ptr()),
        *(ctypes.byref(shape), ctypes.byref(dropout), kind, threads),
    )
    library.evk_pool_backward(
        *(gradient.data_ptr(), code.data_ptr(), result.data_ptr(), sums.data_ptr()),
        *(ctypes.byref(shape), dropout.scale, kind, threads),
    )
    memory.check()
    return y, code, result, sums


def torch_pool(x, gradient):
    """y and the gradient of x, in float64, by torch."""
    x = first(x).double().contiguous().requires_grad_()
    if min(x.shape[2:]) < 2:  # torch refuses what has no pixel left
        return torch.empty(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2), torch.zeros_like(x)
    y = functional.max_pool2d(functional.relu(x), 2)
    y.backward(first(gradient).double())
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_is_that_of_torch(shape, dtype):
    x = last(numbers(shape, dtype))
    gradient = last(numbers((*shape[:2], shape[2] // 2, shape[3] // 2), dtype, seed=1))
    y, _, result, sums = pool(x, gradient)
    expected, of_x = torch_pool(x, gradient)
    assert torch.equal(first(y).double(), expected.double())
    assert torch.equal(first(result).double(), of_x)
    assert torch.equal(sums.double(), of_x.sum((2, 3)))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "y", "places"),
    [
        ([-1.0, -2.0, -0.0, -INF], 0.0, []),
        ([-1.0, INF, 3.0, INF], INF, [1]),
        ([1.0, INF, NAN, 2.0], NAN, [2]),
        ([NAN, -1.0, NAN, 2.0], NAN, [0, 2]),  # which of them is no part of any promise
        ([-NAN, 1.0, 2.0, 3.0], NAN, [0]),
        ([1e-40, 0.0, -1.0, 0.0], 1e-40, [0]),
    ],
)
def test_what_is_not_finite_is_pooled_as_in_torch(dtype, window, y, places):
    x = torch.tensor(window).copysign(torch.tensor(window)).to(dtype).view(1, 2, 2, 1)
    if window[0] != window[0] and len(places) == 1:
        x.view(torch.int32 if dtype is torch.float32 else torch.int16)[0, 0, 0, 0] = -1  # -NaN
    got, _, result, _ = pool(x, torch.ones(1, 1, 1, 1, dtype=dtype))
    torch.testing.assert_close(got.item(), x.new_tensor(y).item(), equal_nan=True, rtol=0, atol=0)
    chosen = result.flatten().nonzero().flatten().tolist()
    assert len(chosen) == bool(places)
    assert set(chosen) <= set(places)


def dropout(p, seed):
    module = nn.Dropout(p)
    torch.manual_seed(seed)
    return Dropout.of(module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "exact"), [(0.25, 0.25), (0.5, 0.5), (0.3, 19661 / 65536)])
def test_dropout_drops_so_many_and_scales_the_rest(dtype, p, exact):
    x = torch.full((8, 64, 64, 33), 1.5).to(dtype)
    gradient = torch.ones(8, 32, 32, 33, dtype=dtype)
    drawn = dropout(p, seed=1)
    y, code, result, sums = pool(x, gradient, drawn)
    kept = y != 0
    share = (~kept).double().mean().item()
    assert share == pytest.approx(exact, abs=4 * (exact * (1 - exact) / y.numel()) ** 0.5)
    scale = torch.tensor(1 / (1 - exact), dtype=torch.float64)
    torch.testing.assert_close(y[kept].unique().double(), (1.5 * scale).view(1).to(dtype).double())
    # backward lets through exactly what forward kept
    assert torch.equal(kept, code != 4)
    assert torch.equal(first(result).unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5)) != 0, first(kept))
    torch.testing.assert_close(result[result != 0].unique(), scale.view(1).to(dtype))
    assert torch.allclose(sums, (kept.sum((1, 2)) * scale).float())


def test_dropout_is_that_of_the_seed_for_every_number_of_threads():
    x = torch.rand(5, 7, 6, 33) + 0.5
    gradient = torch.rand(5, 3, 3, 33)
    one = pool(x, gradient, dropout(0.5, 1))
    for threads in (1, 2, 3, 8):
        for left, right in zip(one, pool(x, gradient, dropout(0.5, 1), threads), strict=True):
            assert torch.equal(left, right)
    other = pool(x, gradient, dropout(0.5, 2))
    assert 0.4 < ((one[0] != 0) == (other[0] != 0)).double().mean() < 0.6


def test_dropout_is_drawn_from_the_generator_of_torch_and_only_in_training():
    module = nn.Dropout(0.5)
    torch.manual_seed(0)
    draws = [Dropout.of(module).seed for _ in range(2)]
    torch.manual_seed(0)
    assert [Dropout.of(module).seed for _ in range(2)] == draws
    assert draws[0] != draws[1]
    before = torch.get_rng_state()
    assert Dropout.of(module.eval()).threshold == Dropout.of().threshold == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 15, 256, 257, 5000])
def test_relu_is_that_of_torch(dtype, count):
    library, kind = native.library(), native.FORMATS[dtype]
    z, gradient = numbers((count,), dtype), numbers((count,), dtype, seed=1)
    expected = z.relu()
    z[0] = gradient[0] = 1.0
    expected[0] = 1.0
    for threads, drawn in ((1, NO_DROPOUT), (1, dropout(0.5, 3)), (3, dropout(0.5, 3))):
        memory = Memory()
        y, g, result = memory.of(z), memory.of(gradient), memory.empty(count, dtype=dtype)
        library.evk_relu(y.data_ptr(), count, ctypes.byref(drawn), kind, threads)
        pointers = g.data_ptr(), y.data_ptr(), result.data_ptr()
        library.evk_relu_backward(*pointers, count, drawn.scale, kind, threads)
        memory.check()
        if not drawn.threshold:
            assert torch.equal(y, expected)
        else:
            assert torch.equal(y[y != 0], 2 * expected[y != 0])
            assert count < 5000 or 0.4 < (y != 0).sum() / (expected != 0).sum() < 0.6
        assert torch.equal(result, torch.where(y > 0, gradient * drawn.scale, 0).to(dtype))
    nans = torch.tensor([NAN, -NAN, INF, -INF]).to(dtype)
    library.evk_relu(nans.data_ptr(), 4, ctypes.byref(NO_DROPOUT), kind, 1)
    torch.testing.assert_close(nans.float(), torch.tensor([NAN, NAN, INF, 0]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (15, 40), (40, 15), (16, 16), (49, 64), (64, 49), (17, 35)]
)
def test_matrices_are_transposed(dtype, rows, columns):
    memory = Memory()
    x = memory.of(torch.randn(5, rows, columns).to(dtype))
    for threads in (1, 2):
        y = memory.empty(5, columns, rows, dtype=dtype)
        native.library().evk_transpose(
            *(x.data_ptr(), y.data_ptr(), 5, rows, columns, native.FORMATS[dtype], threads)
        )
        memory.check()
        assert torch.equal(y, x.transpose(1, 2))


# Batch norm


def normed(x, gradient, weight, bias, threads=1):
    """y, the gradients of x, weight and bias, and the running statistics."""
    memory, library, kind = Memory(), native.library(), native.FORMATS[x.dtype]
    rows, channels = x.shape
    room = -(-rows // layers.NORM_ROWS), 2, channels
    single = {"dtype": torch.float32}
    x, gradient = memory.of(x), memory.of(gradient)
    weight, bias = memory.of(weight), memory.of(bias)
    mean, variance = memory.of(torch.zeros(channels)), memory.of(torch.ones(channels))
    saved, sums = memory.empty(4, channels, **single), memory.empty(*room, **single)
    y, result = (memory.empty(rows, channels, dtype=x.dtype) for _ in range(2))
    parameters = memory.empty(2, channels, **single)
    norm = Norm(*(t.data_ptr() for t in (weight, bias, mean, variance)), 0.1, 1e-5)
    library.evk_norm_relu(
        *(x.data_ptr(), y.data_ptr(), ctypes.byref(norm), saved.data_ptr(), sums.data_ptr()),
        *(rows, channels, kind, threads),
    )
    library.evk_norm_relu_backward(
        *(gradient.data_ptr(), x.data_ptr(), saved.data_ptr(), result.data_ptr()),
        *(parameters.data_ptr(), sums.data_ptr(), rows, channels, kind, threads),
    )
    memory.check()
    return y, result, *parameters, mean, variance


def torch_normed(x, gradient, weight, bias, dtype):
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
    mean, variance = torch.zeros_like(bias), torch.ones_like(bias)
    y = functional.batch_norm(
        x[:, :, None], *(mean.detach_(), variance.detach_(), weight, bias), training=True
    )
    y.relu()[:, :, 0].backward(gradient.to(dtype))
    return y.detach().relu()[:, :, 0], x.grad, weight.grad, bias.grad, mean, variance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 255, 256, 257, 3000])
@pytest.mark.parametrize("channels", [1, 3, 32, 33])
@pytest.mark.parametrize("offset", [0.0, 30.0, -3000.0])
def test_batch_norm_is_that_of_torch(dtype, rows, channels, offset):
    torch.manual_seed(rows + channels)
    # bfloat16 has 8 bits: what it makes of a large offset is no test of sums
    x = (offset + torch.randn(rows, channels)).to(dtype if abs(offset) < 100 else torch.float32)
    gradient = torch.randn(rows, channels).to(x.dtype)
    weight, bias = torch.randn(channels), torch.randn(channels)
    if offset:  # relu far from where rounding could decide
        bias = torch.tensor([40.0, -40.0]).repeat(channels)[:channels]
    ours = normed(x, gradient, weight, bias)
    exact = torch_normed(x, gradient, weight, bias, torch.float64)
    single = torch_normed(x, gradient, weight, bias, torch.float32)
    epsilons = [torch.finfo(x.dtype).eps] * 2 + [torch.finfo(torch.float32).eps] * 4
    # Squares are added up in float, 256 one after another and around the first row. With that row
    # two deviations out, their rounding moves the sum by up to 5 epsilon and the variance, a fifth
    # of it, by 25; the gradient of weight has half of that, as nothing else has.
    factors = [4, 4, 16, 4, 4, 4]
    for got, expected, eager, epsilon, factor in zip(
        ours, exact, single, epsilons, factors, strict=True
    ):
        # sums of terms that may cancel: the scale is that of the largest
        scale = expected.abs().max() + gradient.abs().max() * weight.abs().max()
        allowed = 2 * (eager - expected).abs().max() + factor * epsilon * scale
        assert (got - expected).abs().max() <= allowed
    for threads in (2, 3):
        again = normed(x, gradient, weight, bias, threads)
        assert all(torch.equal(left, right) for left, right in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_of_what_is_not_finite(dtype):
    x = torch.randn(300, 4).to(dtype)
    x[299, 1], x[0, 2] = NAN, INF
    y, result, *parameters, mean, _ = normed(x, torch.ones_like(x), torch.ones(4), torch.zeros(4))
    for tensor in (y[:, [0, 3]], result[:, [0, 3]], *(p[[0, 3]] for p in (*parameters, mean))):
        assert tensor.isfinite().all()
    assert y[299, 1].isnan()
    assert y[0, 2].isnan()
    assert result[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000])
def test_batch_norm_with_any_nan_for_a_bias_is_nan(dtype, bits):
    bias = torch.zeros(33)
    bias.view(torch.int32)[[1, 2, 32]] = bits
    y, result, *_ = normed(
        torch.randn(5, 33).to(dtype), torch.ones(5, 33).to(dtype), torch.ones(33), bias
    )
    nan = bias.isnan()
    assert y[:, nan].isnan().all()
    assert y[:, ~nan].isfinite().all()
    assert result[:, ~nan].isfinite().all()


# Networks


class Net(ConvNet):
    """Any modules in a row."""

    def __init__(self, *modules):
        super().__init__()
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Sequential()


def without_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def trained(network, x, weights, *, dtype=torch.float32):
    """The output, and the gradients of images and parameters, of the sum of weighted outputs."""
    x = x.detach().to(dtype).requires_grad_()
    y = network(x)
    (y * weights.to(y.dtype).view(y.shape)).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


NETWORKS = {
    "pool": lambda: Net(nn.Conv2d(3, 33, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    "pool, dropout": lambda: Net(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.0)
    ),
    "norm": lambda: Net(nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    "linear": lambda: Net(nn.Flatten(), nn.Linear(3 * 7 * 6, 20), nn.ReLU(), nn.Linear(20, 3)),
    "two": lambda: Net(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.0)),
        *(nn.Flatten(), nn.Linear(16 * 9, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 2)),
    ),
    "convolution": lambda: Net(nn.Conv2d(3, 33, 3, padding=1)),
    "residual": lambda: Net(Residual(3), nn.ReLU(), Residual(3)),
    "average": lambda: Net(nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    "other convolutions": lambda: Net(
        *(nn.Conv2d(3, 1, 5, padding=2), nn.Conv2d(1, 8, 5, padding=2), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 2, stride=2), nn.Flatten()),
    ),
    "5×5 of one channel": lambda: Net(nn.Conv2d(1, 8, 5, padding=2), nn.Flatten()),
    "one pixel": lambda: Net(
        *(nn.AvgPool2d(2), nn.MaxPool2d(3), nn.Conv2d(3, 8, 5, padding=2), nn.GELU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 4), nn.GELU()),
    ),
    "norm alone": lambda: Net(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.GELU()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("training", [True, False])
def test_every_gradient_is_that_of_torch(name, batch, training):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
            module.running_var.uniform_(0.5, 2)
    channels = {"pool, dropout": 1, "5×5 of one channel": 1, "norm": 2}.get(name, 3)
    x = torch.randn(batch, channels, 7, 6)
    exact = copy.deepcopy(network).double()
    ours = NativeNetwork(network)
    exact.train(training), ours.train(training)
    if not training:  # for evaluation there is no way back
        torch.testing.assert_close(ours(x), exact(x.double()).float())
        return
    weights = torch.randn(exact(x.double()).shape)
    exact.load_state_dict(network.state_dict())
    expected = trained(exact, x, weights, dtype=torch.float64)
    got = trained(ours, x, weights)
    for key, tensor in expected.items():
        mine = got[key] if key in ("y", "x") else got[f"network.{key}"]
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, tensor.float(), rtol=1e-4, atol=2e-5, msg=key)
    for (key, mine), tensor in zip(network.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine, tensor.to(mine.dtype), rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (7, 5), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_convolution_of_grey_images(channels, height, width, dtype):
    torch.manual_seed(0)
    network = Net(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    exact = copy.deepcopy(network).double()
    x = torch.randn(3, 1, height, width)
    expected = exact(x.double())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        network.zero_grad()
        y = NativeNetwork(network, dtype)(x)
        gradient = numbers(y.shape, torch.float32)
        y.backward(gradient)
        once = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected.float(), rtol=once, atol=1e-6)
        if threads == 1:
            expected.backward(gradient.double())
        for mine, other in zip(network.parameters(), exact.parameters(), strict=True):
            error = (mine.grad - other.grad).norm() / other.grad.norm()
            assert error < 1e-5  # which of four is chosen is decided before rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_convolution_stays_in_its_memory(dtype):
    images, height, width, channels = 2, 5, 7, 32
    x, kernel = numbers((images, 1, height, width), torch.float32), numbers((channels, 10), dtype)
    weights = kernel.float().t().contiguous()
    full = functional.conv2d(x, weights[:9].t().view(-1, 1, 3, 3), weights[9], padding=1)
    gradient = last(numbers((images, channels, height // 2, width // 2), dtype, seed=1))
    expected, of_full = torch_pool(last(full), gradient)
    memory, library, kind = Memory(), native.library(), native.FORMATS[dtype]
    shape = Images(images, height, width, channels)
    padded, weights = memory.of(functional.pad(x, (1, 1, 1, 1))), memory.of(weights)
    gradient, y = memory.of(gradient), memory.empty(*gradient.shape, dtype=dtype)
    code = memory.empty(*y.shape, dtype=torch.uint8)
    sums = memory.empty(images, 10, channels, dtype=torch.float32)
    library.evk_convolve_pool(
        *(padded.data_ptr(), weights.data_ptr(), y.data_ptr(), code.data_ptr()),
        *(ctypes.byref(shape), kind, 1),
    )
    library.evk_convolve_pool_backward(
        *(gradient.data_ptr(), code.data_ptr(), padded.data_ptr(), sums.data_ptr()),
        *(ctypes.byref(shape), kind, 1),
    )
    memory.check()
    # all numbers are quarters: nothing is rounded but, in bfloat16, what is stored
    assert torch.equal(first(y), expected.to(dtype))
    assert torch.equal(sums[:, 9].double(), of_full.sum((2, 3)))
    patches = functional.unfold(x.double(), 3, padding=1)
    assert torch.equal(sums[:, :9].double(), patches @ of_full.flatten(2).transpose(1, 2))


def test_the_first_convolution_pools_what_is_not_finite():
    torch.manual_seed(0)
    network = Net(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(1, 1, 12, 12)
    x[0, 0, 1, 1], x[0, 0, 9, 9] = NAN, INF
    torch.testing.assert_close(NativeNetwork(network)(x), network(x), equal_nan=True)


def with_every_kind():
    """Of what the catalogue has and the two networks have not."""
    components = [
        *("depthwise3x3", "conv3x3 16", "batchnorm", "gelu", "conv5x5 32", "relu", "avgpool"),
        *("residual", "gelu", "conv3x3 32", "maxpool", "dense 64", "gelu"),
    ]
    return build(Architecture(components), (3, 32, 32), 10)


def with_a_second_convolution_of_one_channel():
    """Which needs a gradient of what it is given, as that of the images does not."""
    components = ["depthwise3x3", "conv3x3 16", "relu", "maxpool"]
    return build(Architecture(components), (1, 28, 28), 10)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SmallCNN, (1, 28, 28)),
        (CifarCNN, (3, 32, 32)),
        (with_every_kind, (3, 32, 32)),
        (with_a_second_convolution_of_one_channel, (1, 28, 28)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_networks_learn_what_they_learn_with_torch(model, shape, dtype):
    torch.manual_seed(0)
    network = without_dropout(model()).to(memory_format=torch.channels_last)
    x, y = torch.randn(16, *shape), torch.randint(10, (16,))
    exact, eager = copy.deepcopy(network).double(), copy.deepcopy(network)
    loss = functional.cross_entropy
    loss(exact(x.double()), y).backward()
    loss(computing(eager, CPU, precision_name(dtype), plain=True)(x), y).backward()
    logits = computing(network, CPU, precision_name(dtype))(x)
    assert logits.dtype == torch.float32
    loss(logits, y).backward()
    for name, truth in exact.named_parameters():
        if name in IN_FRONT_OF_NORM.get(model, ()):
            continue  # in front of a batch norm: no gradient but what rounding makes of it
        ours, theirs = network.get_parameter(name).grad, eager.get_parameter(name).grad
        error, allowed = ((g - truth.grad).norm() / truth.grad.norm() for g in (ours, theirs))
        assert error <= 1.5 * allowed + torch.finfo(torch.float32).eps * 8, name
    for name, truth in exact.named_buffers():
        torch.testing.assert_close(
            network.get_buffer(name).double(), truth.double(), rtol=0, atol=1e-3, msg=name
        )


IN_FRONT_OF_NORM = {
    CifarCNN: ("features.0.bias", "features.7.bias"),
    with_every_kind: ("features.1.bias",),
}


def precision_name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_pass_is_that_of_its_seed(dtype):
    network = NativeNetwork(CifarCNN(), dtype)
    x = torch.randn(2, 3, 32, 32)

    def logits(seed):
        torch.manual_seed(seed)
        return network(x)

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    network.eval()
    assert torch.equal(logits(0), logits(1))


def test_expanded_and_strided_gradients_and_images_are_taken():
    torch.manual_seed(0)
    network = Net(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(4, 8, 8, 6).permute(0, 3, 1, 2)[:, ::2]
    NativeNetwork(network)(x).sum().backward()  # expands a 0-d tensor
    ours = network.features[0].weight.grad.clone()
    network.zero_grad()
    network(x).sum().backward()
    torch.testing.assert_close(ours, network.features[0].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_of_a_convolution_of_one_row_has_a_gradient(dtype):
    network = Net(nn.Conv2d(128, 16, 5, padding=2))
    exact, x = copy.deepcopy(network).double(), torch.randn(3, 128, 1, 4)
    # what a gradient that nobody writes would hold
    dirty = [torch.full((16, 128, 5, 5), NAN, dtype=dtype) for _ in range(8)]
    del dirty
    NativeNetwork(network, dtype)(x).sum().backward()
    exact(x.double()).sum().backward()
    for mine, truth in zip(network.parameters(), exact.parameters(), strict=True):
        error = (mine.grad - truth.grad).norm() / truth.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps
    assert not network.features[0].weight.grad[:, :, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_images_of_every_type_are_taken(dtype):
    # the dropout is the first to be told an address
    network = NativeNetwork(Net(nn.Dropout(0.0), nn.Conv2d(3, 4, 3, padding=1)))
    x = torch.randint(5, (2, 3, 6, 5))
    assert torch.equal(network(x.to(dtype)), network(x.float()))


# What it refuses


CONV, RELU, POOL = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ((nn.Flatten(), nn.Sigmoid()), "Sigmoid()"),
        ((CONV, RELU, nn.Softmax2d()), "Softmax2d("),
        ((nn.Flatten(2), nn.Linear(4, 2)), "Flatten("),
        ((nn.AdaptiveAvgPool2d(2), nn.Flatten()), "AdaptiveAvgPool2d("),
        ((nn.AdaptiveAvgPool2d(1), RELU), "AdaptiveAvgPool2d("),
        ((nn.Linear(4, 2, bias=False),), "Linear("),
    ],
)
def test_what_there_is_no_operation_for_is_named(modules, named):
    with pytest.raises(BackendError, match=r"begins with .*; run the network itself") as caught:
        NativeNetwork(Net(*modules))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "modules",
    [
        (CONV, RELU),
        (CONV, RELU, nn.MaxPool2d(3)),
        (CONV, RELU, nn.MaxPool2d(2, stride=1)),
        (CONV, RELU, nn.MaxPool2d(2, ceil_mode=True)),
        (nn.Conv2d(1, 2, 3), RELU, POOL),
        (nn.Conv2d(1, 2, 5, padding=1), RELU, POOL),
        (nn.Conv2d(1, 2, 3, padding=1, stride=2), RELU, POOL),
        (nn.Conv2d(1, 2, 3, padding=1, bias=False), RELU, POOL),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), RELU, POOL),
        (CONV, nn.BatchNorm2d(2, affine=False), RELU),
        (CONV, nn.BatchNorm2d(2, momentum=None), RELU),
    ],
)
def test_no_operation_stands_for_modules_that_do_something_else(modules):
    network, x = Net(*modules), torch.randn(2, 1, 7, 7)
    expected = copy.deepcopy(network)(x)
    torch.testing.assert_close(NativeNetwork(network)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropout_alone_drops_so_many_and_scales_the_rest(dtype):
    network, x = NativeNetwork(Net(nn.Dropout(0.3)), dtype), torch.ones(8, 3, 64, 64)
    x.requires_grad_()
    y = network(x.to(dtype) * 1.5)
    gradient = torch.rand_like(y) + 1
    y.backward(gradient)
    exact = 19661 / 65536  # as of every native dropout
    kept = y != 0
    deviation = (exact * (1 - exact) / y.numel()) ** 0.5
    assert (~kept).double().mean().item() == pytest.approx(exact, abs=4 * deviation)
    once = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y[kept].unique(), torch.tensor([1.5 / (1 - exact)]), rtol=once, atol=0
    )
    passed = torch.where(kept, gradient * 1.5 / (1 - exact), 0)
    torch.testing.assert_close(x.grad, passed, rtol=3 * once, atol=0)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), x)


def strided_norm(network):
    norm = network.network.features[1]
    norm.weight.data = torch.ones(2 * len(norm.weight))[::2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda network: network.double(), "torch.float64"),
        (lambda network: network.network.half(), "torch.float16"),
        (lambda network: network.to("meta"), "on meta"),
        (strided_norm, "strides (2,)"),
    ],
)
def test_a_network_that_is_changed_is_refused(change, named):
    network = NativeNetwork(CifarCNN())
    change(network)
    with pytest.raises(BackendError, match="run the network itself") as caught:
        network(torch.zeros(2, 3, 32, 32))
    assert named in str(caught.value)


def test_other_types_and_other_images_are_refused():
    with pytest.raises(BackendError, match=r"float32 or torch.bfloat16, not in"):
        NativeNetwork(SmallCNN(), torch.float16)
    with pytest.raises(BackendError, match="images of one channel, got 3"):
        NativeNetwork(SmallCNN())(torch.zeros(2, 3, 28, 28))
    with pytest.raises(BackendError, match="on meta with"):
        NativeNetwork(Net(nn.Flatten()))(torch.zeros(2, 1, 28, 28, device="meta"))
    network = NativeNetwork(CifarCNN()).eval()
    with pytest.raises(BackendError, match="no gradient in eval mode"):
        network(torch.zeros(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_computes_with_weights_of_its_own(copied):
    network = NativeNetwork(SmallCNN()).eval()
    x = torch.randn(2, 1, 28, 28)
    before, copy_of = network(x), copied(network)
    with torch.no_grad():
        for parameter in copy_of.parameters():
            parameter.zero_()
    assert not copy_of(x).any()
    assert torch.equal(network(x), before)


def test_gradients_do_not_depend_on_the_default_type():
    weights = SmallCNN().state_dict()
    expected = native_gradients(weights)
    torch.set_default_dtype(torch.float64)
    try:
        again = native_gradients(weights)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one, other)


def native_gradients(weights):
    network = SmallCNN().float()
    network.load_state_dict(weights)
    torch.manual_seed(0)
    x = torch.ones(2, 1, 28, 28, dtype=torch.float32)
    NativeNetwork(network)(x).sum().backward()
    return [parameter.grad for parameter in network.parameters()]


def test_a_dropout_may_drop_everything():
    network = Net(CONV, RELU, POOL, nn.Dropout(1.0))
    x = torch.randn(2, 1, 4, 4)
    y = NativeNetwork(network)(x)
    y.sum().backward()
    assert not y.any()
    assert not network.features[0].weight.grad.any()
    network.zero_grad()


def test_second_derivatives_are_refused_and_the_plain_network_has_them():
    def second(network):
        x, weight = torch.randn(2, 3, 32, 32), next(network.parameters())
        (gradient,) = torch.autograd.grad(network(x).square().sum(), weight, create_graph=True)
        gradient.square().sum().backward()
        return weight.grad

    model = CifarCNN()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second(computing(model, CPU, "float32"))
    assert second(computing(model, CPU, "float32", plain=True)).isfinite().all()


def test_grey_images_have_gradients_where_something_before_them_learns():
    torch.manual_seed(0)
    network, x = SmallCNN().eval(), torch.randn(2, 1, 28, 28, requires_grad=True)
    found, expected = (
        torch.autograd.grad(model(x).square().sum(), x)[0]
        for model in (NativeNetwork(network), network)
    )
    torch.testing.assert_close(found, expected)


def test_the_convolution_of_the_images_themselves_refuses_their_gradient():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    y = layers.GreyConvPool.apply(x, torch.randn(16, 1, 3, 3), torch.randn(16), torch.float32)
    with pytest.raises(BackendError, match="no gradient of its images; run the network itself"):
        y.sum().backward()


@pytest.mark.parametrize("images", [0, 1])
def test_a_batch_norm_of_one_value_or_none_is_refused(images):
    network = NativeNetwork(NETWORKS["norm"]())
    with pytest.raises(BackendError, match=f"more than one value a channel .*, got {images};"):
        network(torch.randn(images, 2, 1, 1))


def test_without_the_library_there_is_no_native_network(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setattr(native, "PATH", tmp_path / "absent.so")
    try:
        with pytest.raises(BackendError, match="native library cannot be loaded"):
            computing(SmallCNN(), CPU, "float32")
    finally:
        native.library.cache_clear()


# Batches


def moved(image, mirrored, down, right):
    """An image (C, H, W), mirrored or not, as it is seen from a crop that begins there."""
    _, height, width = image.shape
    crop = torch.zeros_like(image)
    image = image.flip(2) if mirrored else image
    for h in range(height):
        for w in range(width):
            if 0 <= h + down < height and 0 <= w + right < width:
                crop[:, h, w] = image[:, h + down, w + right]
    return crop


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (3, 4, 7), (2, 1, 6)])
def test_a_batch_is_gathered_mirrored_moved_and_normalised(shape):
    torch.manual_seed(0)
    memory, batch = Memory(), 40
    split = memory.of(torch.randint(256, (9, *shape), dtype=torch.uint8))
    levels = memory.of(torch.randn(shape[0], 256))
    x = memory.empty(batch, *shape[1:], shape[0], dtype=torch.float32)
    chosen, mirrored = torch.randint(9, (batch,)), torch.rand(batch) < 0.5
    down, right = torch.randint(-9, 10, (2, batch))  # from far outside to far outside
    arrays = (tensor.data_ptr() for tensor in (chosen, mirrored, down, right))
    native.library().evk_make_batch(
        *(split.data_ptr(), levels.data_ptr(), x.data_ptr()),
        ctypes.byref(Batch(*arrays, batch, *shape)),
    )
    memory.check()
    for i in range(batch):
        image = moved(split[chosen[i]], mirrored[i], int(down[i]), int(right[i]))
        expected = torch.stack([levels[c][image[c].long()] for c in range(shape[0])])
        assert torch.equal(x[i].permute(2, 0, 1), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_batches_of_one_pass_are_those_of_tensor_operations(channels, augment, monkeypatch):
    x = torch.randint(256, (50, channels, 8, 9), dtype=torch.uint8)
    y = torch.randint(10, (50,))
    statistics = (0.1, 0.2, 0.3)[:channels], (0.4, 0.5, 0.6)[:channels]
    data = ImageData("test", x, y, x, y, *statistics, 10, x, y, augment)
    once = list(training_batches(data, 16, 7, seed=3))
    # what batches on another device are made with
    monkeypatch.setattr(ImageMaker, "_in_one_pass", ImageMaker._by_operations)
    for left, right in zip(once, training_batches(data, 16, 7, seed=3), strict=True):
        assert all(map(torch.equal, left, right))


# Precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_is_reproducible_in_both_precisions(dtype):
    data = load_images("fashion_mnist_mini", train_samples=500)
    conditions = Conditions(40, 32, 500, precision=dtype)
    trial = Trial(zoo.adam, "fashion_mnist_mini", 0)
    once, again = (evaluate(trial, conditions, data) for _ in range(2))
    assert dataclasses.replace(again, seconds=once.seconds) == once
    assert once.accuracy > 0.5
    other = evaluate(dataclasses.replace(trial, seed=1), conditions, data)
    assert other.final_loss != once.final_loss


def test_both_precisions_are_asked_for_by_name():
    model, other = SmallCNN(), nn.Linear(3, 2)
    assert isinstance(computing(model, CPU, "float32"), NativeNetwork)
    assert computing(model, torch.device("meta"), "float32") is model
    assert computing(model, CPU, "float32", plain=True).model is model
    assert computing(other, CPU, "float32") is other
    with pytest.raises(SettingsError, match="one of float32, bfloat16, got 'float16'"):
        computing(model, CPU, "float16")


def test_other_networks_compute_in_bfloat16_with_autocast():
    other, x = nn.Linear(300, 2), torch.randn(4, 300)
    network = computing(other, CPU, "bfloat16")
    assert isinstance(network, Autocast)
    logits = network(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(logits, other(x))
    logits.sum().backward()
    assert other.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("processor : 0\nflags\t\t: fpu avx512_bf16 sse\n", "bfloat16", "has avx512_bf16"),
        ("flags : fpu amx_bf16 avx512_bf16\n", "bfloat16", "has amx_bf16"),
        ("flags : fpu avx512f avx512_bf16x\n", "float32", "neither amx_bf16 nor avx512_bf16"),
        ("Features : asimd bf16\n", "float32", "neither"),
        (None, "float32", "neither"),
    ],
)
def test_the_best_precision_is_that_of_the_processor(monkeypatch, tmp_path, text, name, reason):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(precision, "PROCESSORS", path)
    best, why = best_precision(CPU)
    assert best == name
    assert reason in why
    assert best_precision(torch.device("meta"))[0] == "float32"


def test_the_memory_of_a_step_is_kept_for_the_next():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.empty(2**22).fill_(1)  # 4,096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_memory()
    faults()
    assert faults() < 4096
