"""Data sets, batches, networks and the registry of tasks."""

import dataclasses
import importlib.resources
import itertools
import os
import re
import urllib.error
import zipfile

import numpy as np
import pytest
import torch

from evokernels import tasks
from evokernels.errors import DatasetError
from evokernels.tasks import (
    TASKS,
    CharTransformer,
    CifarCNN,
    ImageData,
    SmallCNN,
    get_task,
    load_images,
)

# (name, image shape in an archive, image shape in a tensor) of the data sets outside the package
OUTSIDE = [
    ("mnist", (28, 28), (1, 28, 28)),
    ("fashion_mnist", (28, 28), (1, 28, 28)),
    ("cifar10", (32, 32, 3), (3, 32, 32)),
]


def random_arrays(image_shape, train=30, test=20):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"x_{split}"] = generator.integers(256, size=(count, *image_shape), dtype=np.uint8)
        arrays[f"y_{split}"] = generator.integers(10, size=count, dtype=np.uint8)
    return arrays


def image_data(train=30, test=20, shape=(3, 32, 32), augment=False):
    """Random images whose label is their place, so that a batch tells which images it has."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[0]
    return ImageData(
        name="random",
        x_train=torch.randint(256, (train, *shape), generator=generator, dtype=torch.uint8),
        y_train=torch.arange(train),
        x_test=torch.randint(256, (test, *shape), generator=generator, dtype=torch.uint8),
        y_test=torch.arange(test),
        mean=(0.4914, 0.4822, 0.4465)[:channels],
        std=(0.2470, 0.2435, 0.2616)[:channels],
        classes=10,
        augment=augment,
    )


def pixels(x, data):
    """The uint8 images that were normalised to x."""
    mean = torch.tensor(data.mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(data.std, dtype=torch.float64).view(-1, 1, 1)
    return ((x.double() * std + mean) * 255).round().to(torch.uint8)


def labels_by_image(data):
    images = (image.numpy().tobytes() for image in data.x_train)
    return dict(zip(images, data.y_train.tolist(), strict=True))


def same_batches(left, right):
    return all(
        torch.equal(x, other_x) and torch.equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(left, right, strict=True)
    )


# Networks and registry


@pytest.mark.parametrize(
    ("model", "parameters", "shape"),
    [(SmallCNN, 824_458, (1, 28, 28)), (CifarCNN, 2_168_554, (3, 32, 32))],
)
def test_networks_have_the_size_of_the_source_system(model, parameters, shape):
    network = model()
    assert sum(p.numel() for p in network.parameters()) == parameters
    logits = network(torch.zeros(2, *shape))
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32


def test_networks_have_the_layers_of_the_source_system():
    def dropouts(network):
        return [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)]

    assert dropouts(SmallCNN()) == [0.3]
    assert dropouts(CifarCNN()) == [0.25, 0.25, 0.5]
    norms = [m.num_features for m in CifarCNN().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [32, 64]


def test_registry_holds_the_tasks_of_the_source_system():
    assert {(task.name, task.model) for task in TASKS.values()} == {
        ("mnist", SmallCNN),
        ("fashion_mnist", SmallCNN),
        ("fashion_mnist_mini", SmallCNN),
        ("cifar10", CifarCNN),
        ("text", CharTransformer),
    }


@pytest.mark.parametrize(("name", "stored", "_"), OUTSIDE)
def test_only_colour_images_are_augmented(name, stored, _, tmp_path):
    np.savez(tmp_path / f"{name}.npz", **random_arrays(stored))
    data = get_task(name).load(tmp_path, 20, 10)
    assert (data.name, len(data.y_train), len(data.y_validation)) == (name, 20, 10)
    assert data.augment is (name == "cifar10")


@pytest.mark.parametrize("name", TASKS)
def test_get_task_finds_every_row(name):
    assert get_task(name).name == name


def test_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(DatasetError, match=r"unknown task 'imagenet'; use one of mnist, .*cifar10"):
        get_task("imagenet")


# The embedded data set


def test_embedded_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOKERNELS_DATA", str(tmp_path / "absent"))
    data = load_images("fashion_mnist_mini")
    assert data.x_train.shape == (5000, 1, 28, 28)
    assert data.x_test.shape == (1500, 1, 28, 28)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == torch.uint8
        assert x.is_contiguous()
        assert y.dtype == torch.int64
        assert torch.bincount(y).tolist() == [len(y) // 10] * 10
    # An image belongs to one split only, and the constants are those of these images.
    train = {image.numpy().tobytes() for image in data.x_train}
    assert train.isdisjoint(image.numpy().tobytes() for image in data.x_test)
    unit = data.x_train.double() / 255
    assert data.mean == pytest.approx([unit.mean().item()], abs=0.01)
    assert data.std == pytest.approx([unit.std().item()], abs=0.01)


def test_embedded_archive_is_small_and_carries_its_licence():
    folder = importlib.resources.files("evokernels.tasks") / "data"
    assert len((folder / "fashion_mnist_mini.npz").read_bytes()) <= 3_000_000
    licence = (folder / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "Copyright © 2017 Zalando SE" in licence


def test_small_network_learns_the_embedded_data_set():
    torch.manual_seed(0)
    data = load_images("fashion_mnist_mini")
    network = SmallCNN()
    optimizer = torch.optim.Adam(network.parameters())
    for x, y in tasks.training_batches(data, 32, steps=20, seed=0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.eval()
    x, y = next(iter(tasks.Batches(data).split("test", 300)))
    with torch.no_grad():
        accuracy = (network(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.4  # guessing is right in one of ten


# Archives in a data folder


@pytest.mark.parametrize(("name", "stored", "tensor"), OUTSIDE)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive_comes_back_as_it_was_saved(name, stored, tensor, save, tmp_path):
    arrays = random_arrays(stored)
    arrays["x_test"] = np.asfortranarray(arrays["x_test"])
    save(tmp_path / f"{name}.npz", **arrays)
    data = load_images(name, data_dir=tmp_path)
    assert data.name == name
    assert len(data.mean) == len(data.std) == tensor[0]
    for split, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        assert x.shape[1:] == tensor
        assert x.dtype == torch.uint8
        assert x.is_contiguous()
        back = x[:, 0] if tensor[0] == 1 else x.permute(0, 2, 3, 1)
        np.testing.assert_array_equal(back.numpy(), arrays[f"x_{split}"])
        assert y.dtype == torch.int64
        assert y.tolist() == arrays[f"y_{split}"].tolist()


def test_data_folder_is_the_argument_then_the_variable_then_the_cache(monkeypatch, tmp_path):
    for count, folder in enumerate(("argument", "variable", "home/.cache/evokernels/data"), 1):
        (tmp_path / folder).mkdir(parents=True)
        np.savez(tmp_path / folder / "mnist.npz", **random_arrays((28, 28), train=count))
    monkeypatch.setenv("EVOKERNELS_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(load_images("mnist", data_dir=tmp_path / "argument").y_train) == 1
    assert len(load_images("mnist").y_train) == 2
    monkeypatch.delenv("EVOKERNELS_DATA")
    assert len(load_images("mnist").y_train) == 3


def test_train_samples_are_one_fixed_subset_with_their_labels():
    everything = load_images("fashion_mnist_mini")
    some = load_images("fashion_mnist_mini", train_samples=100)
    more = load_images("fashion_mnist_mini", train_samples=200)
    assert torch.equal(some.x_train, more.x_train[:100])
    assert torch.equal(some.x_test, everything.x_test)
    # These are the images for good: runs of different releases are compared with each other.
    assert some.y_train[:20].tolist() == [
        2,
        2,
        4,
        0,
        7,
        4,
        1,
        7,
        8,
        9,
        5,
        2,
        0,
        8,
        6,
        6,
        2,
        6,
        2,
        6,
    ]
    assert len(labels_by_image(some)) == 100
    assert labels_by_image(some).items() <= labels_by_image(everything).items()


@pytest.mark.parametrize("wanted", [0, -1, 5001, 2.5, True, "100"])
def test_impossible_train_samples_are_answered_with_the_number_there_is(wanted):
    message = f"train_samples is {wanted!r}, but 'fashion_mnist_mini' has 5000 training images"
    with pytest.raises(DatasetError, match=re.escape(message)):
        load_images("fashion_mnist_mini", train_samples=wanted)


@pytest.mark.parametrize(
    ("train_samples", "validation_samples", "trained"), [(100, 50, 100), (None, 50, 4950)]
)
def test_validation_images_are_the_next_ones_of_the_shuffle(
    train_samples, validation_samples, trained
):
    split = load_images("fashion_mnist_mini", None, train_samples, validation_samples)
    shuffled = load_images("fashion_mnist_mini", train_samples=5000)
    for images, start, stop in (
        ((split.x_train, split.y_train), 0, trained),
        ((split.x_validation, split.y_validation), trained, trained + 50),
    ):
        assert torch.equal(images[0], shuffled.x_train[start:stop])
        assert torch.equal(images[1], shuffled.y_train[start:stop])
    assert torch.equal(split.x_test, shuffled.x_test)


@pytest.mark.parametrize(
    ("train_samples", "validation_samples", "message"),
    [
        (4000, 1001, "train_samples is 4000, but .* 5000 training images here, 1001 of them for"),
        (4000, 1001, r"a whole number from 1 to 3999, or None for all$"),
        (None, 5000, r"validation_samples is 5000, but .* a whole number from 0 to 4999$"),
        (10, -1, "validation_samples is -1, but 'fashion_mnist_mini' has 5000 training images"),
        (10, 2.0, "validation_samples is 2.0, but 'fashion_mnist_mini' has 5000 training images"),
        (10, None, "validation_samples is None, but 'fashion_mnist_mini' has 5000 training"),
    ],
)
def test_more_images_than_there_are_cannot_be_held_back(train_samples, validation_samples, message):
    with pytest.raises(DatasetError, match=message):
        load_images("fashion_mnist_mini", None, train_samples, validation_samples)


def test_digests_of_the_embedded_data_set_are_for_good():
    # journals hold them, and a run goes on only with the data that it began with
    digests = {
        samples: load_images("fashion_mnist_mini", None, *samples).digest()
        for samples in ((None, 0), (128, 0), (128, 32), (128, 33))
    }
    assert digests[None, 0] == "5f709a668b4e97de"
    assert digests[128, 0] == "57429e27bfffb365"
    assert len(set(digests.values())) == 4


def test_all_train_samples_are_the_whole_split():
    data = load_images("fashion_mnist_mini", train_samples=5000)
    assert torch.bincount(data.y_train).tolist() == [500] * 10


def test_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(DatasetError, match=r"unknown data set 'imagenet'; use one of mnist, "):
        load_images("imagenet")


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


def first_label(arrays, label):
    labels = arrays["y_test"].copy()
    labels[0] = label
    return labels


GREY = random_arrays((28, 28))
WRONG_FORMS = {
    "missing array": (without(GREY, "y_test"), "must hold exactly x_train, y_train, x_test"),
    "extra array": ({**GREY, "x_valid": GREY["x_test"]}, "must hold exactly x_train, y_train"),
    "strange name": ({**GREY, "x\ny": GREY["x_test"]}, r"'x\ny'; it must hold exactly"),
    "no arrays": ({}, "holds no arrays"),
    "float images": ({**GREY, "x_train": GREY["x_train"] / 255}, "x_train is float64 of shape"),
    "objects": ({**GREY, "x_train": np.array([None])}, "cannot read"),
    "colour": ({**GREY, "x_test": random_arrays((32, 32, 3))["x_test"]}, "x_test is uint8"),
    "flat": ({**GREY, "x_train": GREY["x_train"].reshape(30, 784)}, "uint8 of shape (30, 784)"),
    "no images": ({**GREY, "x_test": GREY["x_test"][:0]}, "with N at least 1"),
    "scalar": ({**GREY, "x_train": np.uint8(3)}, "x_train is uint8 of shape ()"),
    "wide labels": ({**GREY, "y_train": GREY["y_train"].astype(int)}, "y_train is int64 of shape"),
    "one-hot labels": ({**GREY, "y_test": np.eye(20, dtype=np.uint8)}, "of shape (20, 20)"),
    "too few labels": ({**GREY, "y_train": GREY["y_train"][1:]}, "must be uint8 of shape (30,)"),
    "label": ({**GREY, "y_test": first_label(GREY, 10)}, "y_test[0] is 10; classes are numbered"),
}


def one_line_of_error(name, folder):
    with pytest.raises(DatasetError) as caught:
        load_images(name, data_dir=folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", WRONG_FORMS)
def test_archive_of_another_form_is_refused(case, tmp_path):
    arrays, message = WRONG_FORMS[case]
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    before = path.read_bytes()
    error = one_line_of_error("mnist", tmp_path)
    assert message in error
    assert str(path) in error
    assert path.read_bytes() == before


def test_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **GREY)
    whole = path.read_bytes()
    damaged = [whole[: len(whole) * part // 8] for part in range(8)]
    damaged += [b"not an archive", whole[:9000] + bytes(2000) + whole[11000:]]
    for content in damaged:
        path.write_bytes(content)
        assert f"cannot read {path}" in one_line_of_error("mnist", tmp_path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "dangling link", "single array", "no array"])
def test_archive_that_is_something_else_is_refused(kind, tmp_path):
    path = tmp_path / "mnist.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "absent")
    elif kind == "single array":
        with path.open("wb") as file:
            np.save(file, GREY["x_train"])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in GREY:
                archive.writestr(name, b"no array")
    assert str(path) in one_line_of_error("mnist", tmp_path)


# torchvision and the network, which tests never touch


def replace_torchvision(monkeypatch, class_name, behaviour):
    """Put `behaviour(root, train, download) -> (images, labels)` in torchvision's place."""
    import torchvision.datasets  # here, because it is slow and few tests need it

    class Replacement:
        def __init__(self, root, train, download):
            self.data, self.targets = behaviour(root, train, download)

    monkeypatch.setattr(torchvision.datasets, class_name, Replacement)


def arrays_of(image_shape, train):
    split = "train" if train else "test"
    arrays = random_arrays(image_shape)
    return arrays[f"x_{split}"], arrays[f"y_{split}"].tolist()


def test_torchvision_copy_in_the_folder_is_read_without_the_network(monkeypatch, tmp_path):
    def present(root, train, download):
        assert root == str(tmp_path)
        assert not download
        images, labels = arrays_of((28, 28), train)
        return torch.from_numpy(images), torch.tensor(labels)  # as torchvision's MNIST has them

    replace_torchvision(monkeypatch, "FashionMNIST", present)
    data = load_images("fashion_mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(data.x_train[:, 0].numpy(), GREY["x_train"])
    assert data.y_test.tolist() == GREY["y_test"].tolist()
    assert os.listdir(tmp_path) == []


def test_download_is_stored_as_an_archive_and_done_once(monkeypatch, tmp_path):
    def remote(root, train, download):
        if not download:
            raise RuntimeError("Dataset not found or corrupted.")
        with open(os.path.join(root, "cifar-10-python.tar.gz"), "wb"):
            pass
        return arrays_of((32, 32, 3), train)

    folder = tmp_path / "new" / "folder"
    replace_torchvision(monkeypatch, "CIFAR10", remote)
    first = load_images("cifar10", data_dir=folder)
    assert os.listdir(folder) == ["cifar10.npz"]

    replace_torchvision(monkeypatch, "CIFAR10", None)
    second = load_images("cifar10", data_dir=folder)
    for field in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, field), getattr(second, field))


def test_faster_process_keeps_its_archive(monkeypatch, tmp_path):
    def remote(root, train, download):
        if not download:
            raise RuntimeError("Dataset not found.")
        (tmp_path / "mnist.npz").write_bytes(b"of another process")
        return arrays_of((28, 28), train)

    replace_torchvision(monkeypatch, "MNIST", remote)
    assert len(load_images("mnist", data_dir=tmp_path).y_train) == 30
    assert (tmp_path / "mnist.npz").read_bytes() == b"of another process"


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        RuntimeError("Error downloading x.gz:\nTried somewhere, got:\nno route"),
        EOFError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failed_download_leaves_nothing_and_says_what_to_do(monkeypatch, tmp_path, error):
    def broken(root, train, download):
        if not download:
            raise RuntimeError("Dataset not found.")
        with open(os.path.join(root, "half"), "wb") as file:
            file.write(b"half")
        raise error

    replace_torchvision(monkeypatch, "MNIST", broken)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            load_images("mnist", data_dir=tmp_path)
    else:
        message = one_line_of_error("mnist", tmp_path)
        assert f"no intact data set 'mnist' in {tmp_path}, and it cannot be downloaded" in message
        assert "put mnist.npz there" in message
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_no_half_archive(monkeypatch, tmp_path):
    def remote(root, train, download):
        if not download:
            raise RuntimeError("Dataset not found.")
        return arrays_of((28, 28), train)

    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    replace_torchvision(monkeypatch, "MNIST", remote)
    monkeypatch.setattr(np, "savez", full)
    assert "No space left on device" in one_line_of_error("mnist", tmp_path)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "data"
    message = one_line_of_error("mnist", folder)
    assert f"in {folder}, and that folder cannot be written to" in message


def test_damaged_torchvision_copy_is_named_and_kept(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1")):
        (raw / f"{split}-{kind}-ubyte").write_bytes(b"half a file")
    message = one_line_of_error("mnist", tmp_path)
    assert f"torchvision's files of MNIST in {tmp_path} are damaged" in message
    assert len(os.listdir(raw)) == 4


# Batches


@pytest.mark.parametrize("augment", [False, True])
def test_batches_depend_on_the_seed_and_on_nothing_else(augment):
    data = image_data(train=100, augment=augment)

    def batches(seed):
        return list(tasks.training_batches(data, 32, steps=7, seed=seed))

    torch.manual_seed(1)
    first = batches(seed=5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "the global generator was used"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = batches(seed=np.int64(5))
    finally:
        torch.set_num_threads(threads)
    assert same_batches(first, again)
    for other in (0, 6, 5 + 2**32):
        assert not same_batches(first, batches(other))


def test_batches_have_the_documented_shapes_and_types():
    for augment in (False, True):
        data = image_data(train=100, augment=augment)
        before = data.x_train.clone()
        for x, y in tasks.training_batches(data, 32, steps=4, seed=0):
            assert x.shape == (32, 3, 32, 32)
            assert x.dtype == torch.float32
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert y.shape == (32,)
            assert y.dtype == torch.int64
        assert torch.equal(data.x_train, before)


@pytest.mark.parametrize(
    ("batch_size", "steps", "batches_in_an_epoch"),
    [(10, 9, 3), (7, 8, 4), (30, 3, 1), (16, 3, 1), (10, 1, 3), (10, 0, 3)],
)
def test_every_image_comes_once_an_epoch(batch_size, steps, batches_in_an_epoch):
    data = image_data(train=30)
    batches = list(tasks.training_batches(data, batch_size, steps, seed=0))
    assert len(batches) == steps
    epochs = []
    for start in range(0, steps, batches_in_an_epoch):
        epoch = [y for _, y in batches[start : start + batches_in_an_epoch]]
        epochs.append(torch.cat(epoch).tolist())
        assert len(set(epochs[-1])) == len(epochs[-1])
    assert all(len(e) == batches_in_an_epoch * batch_size for e in epochs[: steps // 3])
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "epochs are in one order"


def test_images_keep_their_labels_and_the_order_does_not_depend_on_augmentation():
    data = image_data(train=40)
    plain = list(tasks.training_batches(data, 16, steps=6, seed=3))
    augmented = list(tasks.training_batches(image_data(train=40, augment=True), 16, 6, 3))
    for (x, y), (_, augmented_y) in zip(plain, augmented, strict=True):
        assert torch.equal(pixels(x, data), data.x_train[y])
        assert torch.equal(y, augmented_y)


@pytest.mark.parametrize("name", ["fashion_mnist_mini", "random colours"])
def test_normalisation_is_that_of_torchvision(name):
    from torchvision.transforms import v2

    colour = name == "random colours"
    data = image_data() if colour else load_images(name, train_samples=10)
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    )
    x, _ = next(iter(tasks.Batches(data).split("test", 5)))
    torch.testing.assert_close(x, transform(data.x_test[:5]), rtol=1e-6, atol=1e-6)
    by_hand = (data.x_test[4, -1, 9, 9].item() / 255 - data.mean[-1]) / data.std[-1]
    assert x[4, -1, 9, 9].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)


def test_augmented_images_are_crops_of_the_padded_original_in_every_way():
    data = image_data(train=50, augment=True)
    seen = {}
    for x, y in tasks.training_batches(data, 50, steps=40, seed=0):
        for image, place in zip(pixels(x, data).numpy(), y.tolist(), strict=True):
            original = data.x_train[place].numpy()
            ways = []
            for mirrored in (False, True):
                source = original[:, :, ::-1] if mirrored else original
                padded = np.pad(source, ((0, 0), (4, 4), (4, 4)))  # black, before normalisation
                for top, left in itertools.product(range(9), range(9)):
                    crop = padded[:, top : top + 32, left : left + 32]
                    # one pixel first: comparing all of them 324,000 times is slow
                    if crop[0, 9, 9] == image[0, 9, 9] and np.array_equal(crop, image):
                        ways.append((mirrored, top, left))
            assert len(ways) == 1, "not one of the 162 crops"
            seen[ways[0]] = seen.get(ways[0], 0) + 1
    # 2,000 draws of 162 ways: each is drawn 12.3 times on average, none missing by chance
    # (probability 162 * e**-12.3 = 0.0007; the seed is fixed), and no way is preferred.
    assert len(seen) == 162
    assert max(seen.values()) < 35
    counts = np.zeros((2, 9, 9))
    for way, count in seen.items():
        counts[int(way[0]), way[1], way[2]] = count
    for axis, ways in ((0, 2), (1, 9), (2, 9)):
        marginal = counts.sum(axis=tuple({0, 1, 2} - {axis}))
        chi_square = ((marginal - 2000 / ways) ** 2 / (2000 / ways)).sum()
        assert chi_square < {2: 10.8, 9: 26.1}[ways]  # 0.1 % of fair draws exceed it


def test_test_batches_are_the_whole_split_in_order():
    data = image_data(test=20)
    batches = list(tasks.Batches(data).split("test", 8))
    assert [len(y) for _, y in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([y for _, y in batches]), data.y_test)
    assert torch.equal(pixels(torch.cat([x for x, _ in batches]), data), data.x_test)
    assert [len(y) for _, y in tasks.Batches(data).split("test", 100)] == [20]


def test_validation_batches_are_the_held_back_images_in_order():
    data = load_images("fashion_mnist_mini", None, 10, 20)
    batches = list(tasks.Batches(data).split("validation", 8))
    assert [len(y) for _, y in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([y for _, y in batches]), data.y_validation)
    assert torch.equal(pixels(torch.cat([x for x, _ in batches]), data), data.x_validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 31}, "batch_size is 31, but 'random' has 30 training images here"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1, got 2.0"),
        ({"steps": -1}, "steps must be a whole number of at least 0, got -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_batches_are_refused_at_the_call(arguments, message):
    usual = {"batch_size": 8, "steps": 1, "seed": 0}
    with pytest.raises(DatasetError, match=re.escape(message)):
        tasks.training_batches(image_data(), **{**usual, **arguments})


def test_impossible_test_batches_are_refused_at_the_call():
    with pytest.raises(DatasetError, match="batch_size must be a whole number of at least 1"):
        tasks.Batches(image_data()).split("test", 0)


def test_image_data_is_frozen_and_prints_short():
    data = image_data()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"
    assert len(repr(data)) < 200


# Real data, where there is some


@pytest.mark.skipif(
    not os.environ.get("EVOKERNELS_DATA"), reason="EVOKERNELS_DATA names no folder with real data"
)
@pytest.mark.parametrize("name", [name for name, *_ in OUTSIDE])
def test_real_data(name):
    archive = os.path.join(os.environ["EVOKERNELS_DATA"], f"{name}.npz")
    if not os.path.exists(archive):
        pytest.skip(f"no {archive}")
    task = get_task(name)
    data = task.load(None, 15_000, 0)
    assert len(data.y_train) == 15_000
    assert len(data.y_test) == 10_000
    assert torch.bincount(data.y_train, minlength=10).min() > 1_300
    unit = data.x_train.float() / 255
    assert unit.mean(dim=(0, 2, 3)).tolist() == pytest.approx(data.mean, abs=0.01)
    assert unit.std(dim=(0, 2, 3)).tolist() == pytest.approx(data.std, abs=0.01)
    x, y = next(tasks.training_batches(data, 32, steps=1, seed=0))
    assert torch.isfinite(torch.nn.functional.cross_entropy(task.model()(x), y))
