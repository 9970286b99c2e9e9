"""What architectures become: the repair rule, the networks, their parameters, their evaluation."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evokernels import Architecture, zoo
from evokernels.architecture import CATALOGUE, MAX_LENGTH
from evokernels.errors import ArchitectureError, DatasetError
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.precision import computing
from evokernels.evolution.trial import Conditions, Trial
from evokernels.search.score import Status
from evokernels.tasks import (
    TASKS,
    CifarCNN,
    NativeNetwork,
    SmallCNN,
    build,
    decode,
    get_task,
    load_images,
)

CPU = torch.device("cpu")
GREY, COLOUR = (1, 28, 28), (3, 32, 32)


@pytest.fixture(autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What is left out


@pytest.mark.parametrize(
    ("components", "kept"),
    [
        ([], []),
        (["relu", "gelu", "relu"], ["relu"]),
        (["relu", "maxpool", "dropout 0.1", "relu"], ["relu", "maxpool", "dropout 0.1"]),
        (["relu", "avgpool", "relu"], ["relu", "avgpool"]),
        (["gelu", "maxpool", "relu"], ["gelu", "maxpool", "relu"]),
        (["relu", "maxpool", "gelu"], ["relu", "maxpool", "gelu"]),
        (["relu", "batchnorm", "relu"], ["relu", "batchnorm", "relu"]),
        (["batchnorm", "batchnorm", "relu"], ["batchnorm", "relu"]),
        (["batchnorm", "relu", "batchnorm"], ["batchnorm", "relu", "batchnorm"]),
        # what is left out separates nothing
        (["dense 32", "relu", "maxpool", "relu"], ["dense 32", "relu"]),
        (["dense 32", "conv3x3 8", "batchnorm", "residual", "gelu"], ["dense 32", "gelu"]),
        (["dense 32", "dense 32"], ["dense 32", "dense 32"]),
        # 8×8, 4×4, 2×2, 1×1
        (["maxpool", "avgpool"] * 2, ["maxpool", "avgpool", "maxpool"]),
        (["avgpool"] * 3 + ["batchnorm", "conv3x3 8"], ["avgpool"] * 3 + ["conv3x3 8"]),
        (["avgpool"] * 2 + ["batchnorm"], ["avgpool"] * 2 + ["batchnorm"]),
        # too many parameters; what comes behind may fit
        (["dense 512", "dense 64", "dense 32"], ["dense 64"]),
        (["conv3x3 32", "conv5x5 8", "residual", "conv3x3 8"], ["conv3x3 32", "conv3x3 8"]),
    ],
)
def test_a_component_is_left_out_where_it_cannot_act(components, kept):
    budget = 5_000
    assert list(decode(Architecture(components, budget), (1, 8, 8), 10).components) == kept


@pytest.mark.parametrize(
    ("components", "shape", "classes", "parameters"),
    [
        ([], (3, 5, 4), 7, (3 + 1) * 7),
        (["conv3x3 8"], (3, 5, 4), 7, 8 * (27 + 1) + 9 * 7),
        (["conv5x5 8"], (3, 5, 4), 7, 8 * (75 + 1) + 9 * 7),
        (["depthwise3x3"], (3, 5, 4), 7, 3 * 10 + 4 * 7),
        (["residual"], (3, 5, 4), 7, 2 * 3 * 28 + 4 * 7),
        (["batchnorm", "gelu", "avgpool", "dropout 0.5"], (3, 5, 4), 7, 6 + 4 * 7),
        (["maxpool", "dense 32"], (3, 5, 4), 7, (3 * 2 * 2 + 1) * 32 + 33 * 7),
        (zoo.small_cnn.components, GREY, 10, 824_458),
        (zoo.cifar_cnn.components, COLOUR, 10, 2_168_554),
    ],
)
def test_parameters_are_counted(components, shape, classes, parameters):
    at_most = Architecture(components, max(parameters, 1_000))
    assert decode(at_most, shape, classes).parameters == parameters
    assert list(decode(at_most, shape, classes).components) == list(components)
    if parameters > 1_000:  # one fewer, and something has to go
        less = dataclasses.replace(at_most, max_parameters=parameters - 1)
        assert decode(less, shape, classes).parameters < parameters


def test_a_classifier_that_is_too_large_is_told_before_anything_is_built():
    with pytest.raises(ArchitectureError, match=r"1,000, but a classifier of 3 channels .* 4,000;"):
        decode(Architecture([], 1_000), (3, 8, 8), 1_000)


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 28), (1, 28, -1), (1, 1, 28, 28)])
@pytest.mark.parametrize("make", [decode, build])
def test_images_without_pixels_are_turned_down(make, shape):
    with pytest.raises(ArchitectureError, match=r"shape \(channels, height, width\) .*, got \("):
        make(zoo.small_cnn, shape, 10)
    with pytest.raises(ArchitectureError, match=r"at least one of each, got \(1, 28, 28\) and 0"):
        make(zoo.small_cnn, GREY, 0)


# Whatever the sequence, there is a network

SMALL = [name for name in CATALOGUE if not name.endswith(("64", "128", "256", "512"))]


@settings(max_examples=120, deadline=None)
@given(
    components=st.lists(st.sampled_from(SMALL), max_size=MAX_LENGTH),
    budget=st.sampled_from([1_000, 5_000, 100_000, 1_000_000]),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    classes=st.sampled_from([1, 2, 10]),
    batch=st.sampled_from([1, 3]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    plain=st.booleans(),
)
def test_every_sequence_decodes_to_a_network_that_trains(
    components, budget, shape, classes, batch, precision, plain
):
    architecture = Architecture(components, budget)
    decoded = decode(architecture, shape, classes)
    rest = iter(components)
    assert all(component in rest for component in decoded.components)  # in this order
    assert decoded.parameters <= budget
    # nothing more is left out of what is kept
    assert decode(Architecture(decoded.components, budget), shape, classes) == decoded

    network = build(architecture, shape, classes)
    assert sum(p.numel() for p in network.parameters()) == decoded.parameters
    model = computing(network, CPU, precision, plain=plain)
    x = torch.randn(batch, *shape)
    for _ in range(2):
        logits = model(x)
        assert logits.shape == (batch, classes)
        assert logits.dtype == torch.float32 or plain
        logits.square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.isfinite().all()
    model.eval()
    with torch.inference_mode():
        assert model(x).isfinite().all()


def test_large_components_work_too():
    rng = random.Random(0)
    for name in set(CATALOGUE) - set(SMALL):
        architecture = Architecture([name, rng.choice(SMALL), "relu"], 10_000_000)
        assert name in decode(architecture, (1, 4, 4), 10).components
        assert computing(build(architecture, (1, 4, 4), 10), CPU, "float32")(
            torch.randn(2, 1, 4, 4)
        ).shape == (2, 10)


def test_a_network_computes_what_its_components_say():
    components = ["residual", "avgpool", "gelu", "dense 32", "relu"]
    network = build(Architecture(components), (2, 4, 6), 5).double()
    weights = dict(network.named_parameters())
    names = ["features.0.first", "features.0.second", "classifier.1", "classifier.3"]
    (a, b), (c, d), (e, f), (g, h) = (
        (weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names
    )
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    y = x + torch.conv2d(torch.conv2d(x, a, b, padding=1).clamp(min=0), c, d, padding=1)
    y = sum(y[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    y = (y.reshape(3, -1) @ e.T + f).clamp(min=0) @ g.T + h
    torch.testing.assert_close(network(x), y)


def test_an_image_at_the_end_is_averaged():
    network = build(Architecture(["batchnorm"]), (2, 4, 6), 5).eval()
    linear, x = network.classifier[-1], torch.randn(3, 2, 4, 6)
    mean = x.mean((2, 3)) / (1 + network.features[0].eps) ** 0.5
    torch.testing.assert_close(network(x), linear(mean))


# The networks of the source system


@pytest.mark.parametrize(
    ("architecture", "model", "shape"),
    [(zoo.small_cnn, SmallCNN, GREY), (zoo.cifar_cnn, CifarCNN, COLOUR)],
)
def test_the_networks_of_the_source_system_are_architectures(architecture, model, shape):
    torch.manual_seed(0)
    own = model()
    torch.manual_seed(0)
    built = build(architecture, shape, 10)

    def layers(network):
        return [repr(module) for module in network.modules() if not list(module.children())]

    assert layers(built) == layers(own)
    for mine, other in zip(built.parameters(), own.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert isinstance(computing(built, CPU, "float32"), NativeNetwork)


CONDITIONS = Conditions(steps=6, batch_size=16, train_samples=64, precision="bfloat16")
MINI = "fashion_mnist_mini"


def test_an_evaluation_trains_the_network_of_the_architecture():
    data = load_images(MINI, train_samples=64)
    data = dataclasses.replace(data, x_test=data.x_test[:100], y_test=data.y_test[:100])

    def outcome(architecture, seed=0):
        trial = Trial(zoo.adam, MINI, seed, architecture=architecture)
        return dataclasses.replace(evaluate(trial, CONDITIONS, data), seconds=0.0)

    own = outcome(None)
    assert own.status is Status.OK
    assert outcome(zoo.small_cnn) == own
    tiny = Architecture(["conv5x5 8", "gelu", "avgpool", "dropout 0.5", "dense 32"])
    assert outcome(tiny) == outcome(tiny)
    assert outcome(tiny).final_loss != own.final_loss
    assert outcome(tiny, seed=1).final_loss != outcome(tiny).final_loss


# Tasks


def test_parameters_are_known_before_data_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOKERNELS_DATA", str(tmp_path / "absent"))
    assert get_task("fashion_mnist").decode(zoo.small_cnn).parameters == 824_458
    assert get_task("cifar10").decode(zoo.cifar_cnn).parameters == 2_168_554
    for task in TASKS.values():
        if task.shape:
            assert next(task.model(task.classes).parameters()).shape[1] == task.shape[0]


def test_shape_and_classes_are_those_of_the_images():
    data, task = load_images(MINI), get_task(MINI)
    assert (*data.x_train.shape[1:], data.classes) == (*task.shape, task.classes)


def test_a_task_without_images_has_no_architectures():
    for ask in (
        lambda: get_task("text").decode(zoo.small_cnn),
        lambda: get_task("text").build(zoo.small_cnn),
        lambda: Trial(zoo.adam, "text", 0, architecture=zoo.small_cnn).key,
    ):
        with pytest.raises(ArchitectureError, match=r"'text' has no images, .* mnist, .*cifar10"):
            ask()
    with pytest.raises(DatasetError, match="unknown task"):
        get_task("imagenet").decode(zoo.small_cnn)


def test_second_derivatives_are_there_where_they_are_asked_for():
    components = ["residual", "gelu", "conv5x5 8", "avgpool", "relu"]
    network = build(Architecture(components), (1, 6, 6), 3)
    model, weight = computing(network, CPU, "float32", plain=True), next(network.parameters())
    loss = nn.functional.cross_entropy(model(torch.randn(2, 1, 6, 6)), torch.tensor([0, 2]))
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.isfinite().all()
