"""Text as a task: characters, splits, windows, the network, and its evaluation."""

import collections
import dataclasses
import math
import re

import pytest
import torch
from as_on_device import OnDeviceOnly, Repeated

from evokernels import zoo
from evokernels.errors import DatasetError
from evokernels.evolution.devices import reproducible
from evokernels.evolution.evaluator import evaluate
from evokernels.evolution.fitness import run_fitness
from evokernels.evolution.training import TrainingStep, train, train_on_device
from evokernels.evolution.trial import Conditions, Purpose, Trial
from evokernels.optim import FusedEvolvedOptimizer
from evokernels.search.score import Status
from evokernels.tasks import (
    Batches,
    CharTransformer,
    Draw,
    get_task,
    load_text,
    stack_draws,
    training_batches,
)

ROMAN = "".join(f"{number:b} bottles, {number * number:x}\n" for number in range(200))


@pytest.fixture(autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def file(tmp_path):
    """Writes a text and gives its path, as a task names it."""

    def write(text, name="some.txt"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def letters(text):
    """The character of each class, the most frequent first; of equals the lower code point."""
    counts = collections.Counter(text)
    return sorted(counts, key=lambda letter: (-counts[letter], letter))


def decoded(classes, text):
    of_class = letters(text)
    return "".join(of_class[number] for number in classes.tolist())


# The text


def test_the_default_text_is_one_that_python_carries(monkeypatch):
    data = load_text()
    assert len(data.characters) > 400_000
    assert 80 < data.classes <= 256
    assert data.digest() == load_text().digest()
    for name in ("EVOKERNELS_DATA", "HOME"):  # and no file
        monkeypatch.setenv(name, "/nowhere")
    assert get_task("text").load(None, 5000, 1000).train == 5000


def test_a_class_is_a_character_by_how_frequent_it_is(file):
    data = load_text(file=file(ROMAN))
    assert data.classes == len(set(ROMAN))
    assert data.characters.dtype == torch.uint8
    assert decoded(data.characters, ROMAN) == ROMAN


@pytest.mark.parametrize(("different", "classes"), [(1, 1), (255, 255), (256, 256), (400, 256)])
def test_rare_characters_share_the_last_class(file, different, classes):
    text = "".join(chr(0x4E00 + i) * (400 - i) for i in range(different))
    data = load_text(file=file(text))
    assert data.classes == classes
    expected = [min(i, 255) for i in range(different) for _ in range(400 - i)]
    assert data.characters.tolist() == expected


def test_the_mark_at_the_beginning_of_a_file_is_no_character(file):
    marked, plain = (load_text(file=file(mark + ROMAN)) for mark in ("\ufeff", ""))
    assert marked.digest() == plain.digest()


def test_a_text_is_found_in_the_data_folder_or_by_its_whole_path(file, tmp_path, monkeypatch):
    whole = file(ROMAN)
    monkeypatch.setenv("EVOKERNELS_DATA", str(tmp_path))
    named = {
        (task.name, task.load(data_dir, None, 0).digest())
        for task, data_dir in (
            (get_task("text:some.txt"), tmp_path),
            (get_task("text:some.txt"), None),
            (get_task(f"text:{whole}"), "/nowhere"),
        )
    }
    digest = load_text(file=whole).digest()
    assert named == {("text:some.txt", digest), (f"text:{whole}", digest)}
    assert get_task("text:some.txt").load(tmp_path, None, 0).name == "text:some.txt"


def test_other_texts_and_other_splits_have_other_digests(file):
    loads = [
        load_text(file=file(ROMAN)),
        load_text(file=file(ROMAN[:-1] + "!", "other")),
        load_text(file=file(ROMAN), train_samples=20),
        load_text(file=file(ROMAN), train_samples=20, validation_samples=5),
        load_text(file=file(ROMAN), train_samples=15, validation_samples=5),
    ]
    assert len({data.digest() for data in loads}) == len(loads)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"some.txt has 0 characters; a text to learn from needs at least 131"),
        (b"a" * 130, r"some.txt has 130 characters; a text"),
        (b"a" * 200 + b"\xff\xfe", r"some.txt is no text in UTF-8: byte 0xff at offset 200 \("),
        ("é".encode() * 90 + b"\xc3", r"some.txt is no text in UTF-8: byte 0xc3 at offset 180 \("),
    ],
)
def test_what_is_no_text_to_learn_from_is_refused(file, tmp_path, content, message):
    with pytest.raises(DatasetError, match=f"^{re.escape(str(tmp_path))}/{message}") as caught:
        load_text(file=file(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", ".", "a\0b"])
def test_a_text_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(DatasetError, match=r"cannot read the text file .* text:FILE"):
        get_task(f"text:{name}").load(tmp_path, None, 0)


@pytest.mark.parametrize("name", ["text:", "texts:a", ":a", "Text", "mnist:a"])
def test_a_task_without_a_file_is_no_text(name):
    with pytest.raises(
        DatasetError, match=r"unknown task .* use one of mnist, .*, text, text:FILE"
    ):
        get_task(name)


# Splits


@pytest.mark.parametrize(
    ("length", "train_samples", "validation_samples", "sizes"),
    [
        (131, None, 0, (1, 0, 1)),
        (194, None, 0, (1, 0, 1)),
        (195, None, 0, (2, 0, 1)),
        (195, None, 1, (1, 1, 1)),
        (6400, None, 0, (89, 0, 10)),
        (6400, None, 30, (59, 30, 10)),
        (6400, 40, 30, (40, 30, 10)),
        (6400, 59, 30, (59, 30, 10)),
    ],
)
def test_no_character_belongs_to_two_splits(file, length, train_samples, validation_samples, sizes):
    # a text whose every window tells its place
    text = "".join(f"{number:05d}" for number in range(length))[:length]
    data = load_text(None, train_samples, validation_samples, file(text))
    assert (data.train, data.validation, data.test) == sizes
    make, parts = data.maker(), {}
    for split in ("train", "validation", "test"):
        x, y = make(split, Draw(data.samples(split)))
        assert x.shape == y.shape == (getattr(data, split), 64)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1]), "windows lie side by side"
        parts[split] = decoded(torch.cat([x.flatten(), y.flatten()[-1:]]), text)
    assert text.startswith(parts["train"])
    assert text.endswith(parts["test"])
    assert parts["validation"] in text[len(parts["train"]) : length - len(parts["test"])]


@pytest.mark.parametrize(
    ("train_samples", "validation_samples", "message"),
    [
        (90, 0, "train_samples is 90, but .*some.txt has 89 training windows of 64 characters"),
        (0, 0, "train_samples is 0, but .* a whole number from 1 to 89, or None for all$"),
        (60, 30, "train_samples is 60, but .* here, 30 of them for validation; .* 1 to 59"),
        (None, 89, "validation_samples is 89, but .* a whole number from 0 to 88$"),
    ],
)
def test_more_windows_than_there_are_are_refused(file, train_samples, validation_samples, message):
    with pytest.raises(DatasetError, match=message):
        load_text(None, train_samples, validation_samples, file("a" * 6400))


# Batches


@pytest.fixture(scope="module")
def roman(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "roman.txt"
    path.write_text(ROMAN, encoding="utf-8")
    return load_text(None, 40, 10, str(path))


def test_batches_depend_on_the_seed_and_on_nothing_else(roman):
    def batches(seed):
        return [(x.tolist(), y.tolist()) for x, y in training_batches(roman, 4, 3, seed)]

    torch.manual_seed(1)
    first = batches(5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "the global generator was used"
    assert batches(5) == first
    assert all(batches(seed) != first for seed in (0, 6, 5 + 2**32))


def test_batches_are_windows_and_what_comes_next(roman):
    for x, y in training_batches(roman, batch_size=50, steps=3, seed=0):
        assert x.shape == y.shape == (50, 64)
        assert x.dtype == y.dtype == torch.int64
        for window, following in zip(x, y, strict=True):
            assert decoded(window, ROMAN) + decoded(following[-1:], ROMAN) in ROMAN[: 40 * 64 + 1]
            assert torch.equal(window[1:], following[:-1])


def test_a_window_begins_anywhere_in_the_training_split(roman):
    data = dataclasses.replace(roman, train=2)
    starts = torch.cat([draw.chosen for draw in data.draw_batches(500, 20, 0)])
    counts = torch.bincount(starts, minlength=65)
    # 10,000 draws of 65 places, 154 on average; the seed is fixed
    assert len(counts) == 65
    assert 100 < counts.min() <= counts.max() < 210


def test_validation_and_test_come_whole_and_in_order(roman):
    for split in ("validation", "test"):
        batches = list(Batches(roman).split(split, 4))
        assert [len(y) for _, y in batches[:-1]] == [4] * (len(batches) - 1)
        x = torch.cat([x for x, _ in batches])
        assert torch.equal(x, roman.maker()(split, Draw(roman.samples(split)))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "batch_size must be a whole number of at least 1, got 0"),
        ((1, -1, 0), "steps must be a whole number of at least 0, got -1"),
        ((1, 1, None), "seed must be a whole number of at least 0, got None"),
    ],
)
def test_impossible_batches_are_refused_at_the_call(roman, arguments, message):
    with pytest.raises(DatasetError, match=message):
        training_batches(roman, *arguments)


# The network


def test_the_network_has_the_size_of_the_source_system():
    # by hand: embeddings; four matrices of attention, two of the perceptron, biases, norms; head
    layer = 4 * 128 * 128 + 2 * 128 * 512 + (3 + 1 + 4 + 1) * 128 + 4 * 128
    for classes in (2, 103):
        network = CharTransformer(classes)
        expected = (classes + 64) * 128 + 2 * layer + 2 * 128 + 128 * classes + classes
        assert sum(p.numel() for p in network.parameters()) == expected
        logits = network(torch.zeros(3, 64, dtype=torch.int64))
        assert logits.shape == (3, 64, classes)


def written_out(network, x):
    """Logits of one window, int64 (T,), from the weights and the formulas of Vaswani et al. 2017
    and of a layer that is normalised before each part."""
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}

    def linear(name, v):
        return v @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, v):
        centred = v - v.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = weights["characters.weight"][x] + weights["positions"][: len(x)]
    for layer in ("layers.0", "layers.1"):
        q, k, v = linear(f"{layer}.attention.qkv", norm(f"{layer}.attention_norm", h)).split(128, 1)
        read = torch.zeros_like(h)
        for head in range(0, 128, 32):
            part = slice(head, head + 32)
            for t in range(len(x)):
                scores = k[: t + 1, part] @ q[t, part] / math.sqrt(32)
                read[t, part] = scores.softmax(0) @ v[: t + 1, part]
        h = h + linear(f"{layer}.attention.out", read)
        inner = linear(f"{layer}.mlp.0", norm(f"{layer}.mlp_norm", h))
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        h = h + linear(f"{layer}.mlp.2", inner)
    return linear("head", norm("norm", h))


def test_the_network_computes_what_the_formulas_say():
    torch.manual_seed(0)
    network = CharTransformer(11)
    with torch.no_grad():
        for parameter in network.parameters():  # larger, so that everything takes part
            parameter.add_(torch.randn_like(parameter) * 0.1)
        x = torch.randint(11, (2, 64))
        logits = network(x).double()
        expected = torch.stack([written_out(network, window) for window in x])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5


def test_a_prediction_does_not_see_what_comes_after():
    torch.manual_seed(0)
    network, x = CharTransformer(11), torch.randint(11, (1, 64))
    changed = x.clone()
    changed[0, 30] = (x[0, 30] + 1) % 11
    differs = (network(x) != network(changed)).any(dim=2)[0]
    assert differs.nonzero().flatten().tolist() == list(range(30, 64))


def test_an_untrained_network_guesses(roman):
    torch.manual_seed(0)
    x, y = next(training_batches(roman, 32, 1, 0))
    logits = CharTransformer(roman.classes)(x)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
    assert loss.item() == pytest.approx(math.log(roman.classes), abs=0.1)


def test_weights_begin_as_in_gpt_2():
    torch.manual_seed(0)
    for name, tensor in CharTransformer(103).state_dict().items():
        if tensor.dim() == 2:
            added = "attention.out" in name or "mlp.2" in name  # to the residual stream
            assert tensor.std().item() == pytest.approx(0.01 if added else 0.02, rel=0.05), name
        else:
            assert (tensor == (1 if "norm" in name and "weight" in name else 0)).all(), name


def test_the_network_works_under_autocast(monkeypatch):
    torch.manual_seed(0)
    network, x = CharTransformer(11), torch.randint(11, (2, 64))
    expected = network(x)
    attend, attended = torch.nn.functional.scaled_dot_product_attention, []

    def attending(q, k, v, is_causal):
        read = attend(q, k, v, is_causal=is_causal)
        attended.append(read.dtype)
        return read

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attending)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    assert attended == [torch.float32] * 2, "three times as slow in bfloat16 on a CPU"
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.02)
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert all(p.grad.isfinite().all() for p in network.parameters())


# Training


def test_an_evaluation_learns_and_is_reproducible(file):
    path = file("the quick brown fox jumps over a lazy dog; " * 200)
    task = f"text:{path}"
    data = get_task(task).load(None, 60, 8)
    conditions = Conditions(50, 4, 60, validation_samples=8)
    trial = Trial(dataclasses.replace(zoo.adam, lr_log10=-2.3), task, 0, Purpose.REPORT)
    outcome, again = (evaluate(trial, conditions, data) for _ in range(2))
    assert dataclasses.replace(again, seconds=outcome.seconds) == outcome
    assert outcome.accuracy > 0.6  # the most frequent character is right in one of five
    assert outcome.test_accuracy == pytest.approx(outcome.accuracy, abs=0.05)
    assert outcome.fitness == run_fitness(outcome.accuracy, outcome.final_loss)
    assert outcome.data == data.digest()


def test_accuracy_counts_characters(monkeypatch, roman):
    # a network that always predicts the most frequent character
    class Constant(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.bias = torch.nn.Parameter(10.0 * (torch.arange(classes) == 0))

        def forward(self, x):
            return self.bias.expand(*x.shape, -1)

    idle = dataclasses.replace(zoo.sgd_momentum, lr_log10=-12.0)
    task = dataclasses.replace(get_task("text"), model=Constant)
    monkeypatch.setattr("evokernels.evolution.evaluator.get_task", lambda name: task)
    outcome = evaluate(
        Trial(idle, "text", 0, Purpose.REPORT), Conditions(1, 4, 40, validation_samples=10), roman
    )
    start = 40 * 64 + 1
    for accuracy, predicted in (
        (outcome.accuracy, ROMAN[start + 1 : start + 641]),
        (outcome.test_accuracy, ROMAN[-64 * roman.test :]),
    ):
        assert accuracy == predicted.count(letters(ROMAN)[0]) / len(predicted)


def test_the_hurdle_is_the_loss_of_guessing_a_character(roman):
    slow = dataclasses.replace(zoo.adam, lr_log10=-8.0)
    conditions = Conditions(51, 2, 40, validation_samples=10, hurdle=True)
    outcome = evaluate(Trial(slow, "text", 0), conditions, roman)
    # it begins at most a tenth above ln(classes), far above ln(10)
    assert (outcome.status, outcome.steps) == (Status.STOPPED, 50)
    steady = dataclasses.replace(zoo.adam, lr_log10=-5.0)
    learning = evaluate(Trial(steady, "text", 0), conditions, roman)
    assert (learning.status, learning.steps) == (Status.OK, 51)
    assert learning.final_loss > 2.8, "a limit of ln(10) would have stopped it"


def test_the_device_step_trains_as_the_plain_loop(roman):
    runs = []
    for graph in (None, Repeated()):
        with reproducible(torch.device("cpu"), 0):
            model = CharTransformer(roman.classes)
            optimizer = FusedEvolvedOptimizer(model.parameters(), zoo.adam, total_steps=5)
            batches, draws = Batches(roman), list(roman.draw_batches(4, 5, 0))
            if graph is None:
                losses = train(model, optimizer, map(batches.training, draws))
            else:
                losses = train_on_device(model, optimizer, batches, stack_draws(draws), graph)
        runs.append((losses, list(model.parameters())))
    (plain, weights), (losses, other_weights) = runs
    assert losses == plain
    assert all(map(torch.equal, weights, other_weights))


def test_a_step_never_asks_for_a_value(roman):
    meta = torch.device("meta")
    draws = stack_draws(roman.draw_batches(4, 2, 0)).map(lambda drawn: drawn.to(meta))
    model = CharTransformer(roman.classes).to(meta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = lambda: None  # updates depend on the backend: the tests of each look at that
    step = TrainingStep(model, optimizer, Batches(roman.to(meta)), draws)
    with OnDeviceOnly():
        step()


@pytest.mark.gpu
def test_an_evaluation_on_cuda_is_reproducible_and_learns_as_on_the_cpu(roman):
    conditions = Conditions(40, 8, 40, validation_samples=10)
    trial = Trial(zoo.adam, "text", 0, Purpose.REPORT)
    first, again, on_cpu = (
        evaluate(trial, conditions, roman, device) for device in ("cuda", "cuda", "cpu")
    )
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert first.final_loss == pytest.approx(on_cpu.final_loss, rel=1e-2)  # there is no dropout
