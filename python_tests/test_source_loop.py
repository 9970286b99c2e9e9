"""bench/source_loop.py trains as the package does: the same mathematics, done the source's way."""

import dataclasses
import itertools
import statistics

import pytest
import source_loop
import torch
from source_loop import NETWORKS, evaluate_source, train_source, transform_of
from torch import nn
from torchvision.transforms.functional import to_pil_image

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.evolution.training import LAYOUT, train
from evokernels.evolution.trial import Conditions, Trial
from evokernels.tasks import Batches, Draw, ImageData, get_task, load_images, training_batches

MINI = "fashion_mnist_mini"
STEPS = 5

clipped = Genome(
    ["GRAD", "NESTEROV"], [0.5, 1.0], use_gradient_clipping=True, clip_value=1e-3, wd_log10=-1.0
)
wild = Genome(["SIGN_GRAD"], lr_log10=2.0)  # lost after one step


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mini_images():
    """The embedded images, few of them to test with."""
    data = load_images(MINI)
    return dataclasses.replace(data, x_test=data.x_test[:200], y_test=data.y_test[:200])


def random_images(shape=(3, 32, 32), augment=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (70,), generator=generator)
    constants = (0.5, 0.4, 0.3)[: shape[0]], (0.25, 0.2, 0.3)[: shape[0]]
    return ImageData(
        "random", images, labels, images, labels, *constants, classes=10, augment=augment
    )


def both_networks(task):
    """The source's and ours, of the same seed, without dropout."""
    models = []
    for make in (NETWORKS[task], get_task(task).model):
        torch.manual_seed(3)
        models.append(make())
        dropouts = [module for module in models[-1].modules() if isinstance(module, nn.Dropout)]
        assert dropouts
        for dropout in dropouts:
            dropout.p = 0.0
    return models


@pytest.mark.parametrize("task", [MINI, "cifar10"])
def test_the_networks_begin_with_the_same_weights(task):
    theirs, ours = (list(model.parameters()) for model in both_networks(task))
    assert [p.shape for p in theirs] == [p.shape for p in ours]
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("task", [MINI, "cifar10"])
@pytest.mark.parametrize(
    ("genome", "apart"),
    [
        (zoo.sgd_momentum, 0.001),
        (clipped, 0.001),
        # Rounding, which differs between the memory layouts, decides the signs of gradients near
        # zero, and these rules make whole steps of them: only the way that all weights together
        # have gone can agree.
        (dataclasses.replace(zoo.rmsprop, lr_log10=-4.0), 0.1),
        (dataclasses.replace(zoo.evolved_2025, warmup_steps=3), 0.1),
        (dataclasses.replace(zoo.adamw, use_cosine_decay=True), 0.1),
    ],
)
def test_the_same_batches_lead_to_the_same_losses_and_weights(task, genome, apart):
    data = random_images(augment=True) if task == "cifar10" else load_images(MINI)
    batches = list(training_batches(data, 16, STEPS, 0))
    theirs, ours = both_networks(task)
    start = [p.detach().clone() for p in ours.parameters()]

    losses, diverged = train_source(theirs, genome, batches, STEPS)
    ours.to(memory_format=LAYOUT)
    optimizer = FusedEvolvedOptimizer(ours.parameters(), genome, total_steps=STEPS)
    expected = train(ours, optimizer, batches)

    assert not diverged
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    way = distance(start, ours.parameters())
    assert way > 0
    assert distance(theirs.parameters(), ours.parameters()) < apart * way


def distance(one, other):
    """Between all weights of two networks."""
    pairs = zip(one, other, strict=True)
    return sum((a.detach() - b.detach()).double().square().sum() for a, b in pairs).sqrt().item()


def test_an_epoch_follows_the_other():
    batches = list(training_batches(load_images(MINI), 16, 3, 0))
    one, other = both_networks(MINI)[0], both_networks(MINI)[0]
    three_times, _ = train_source(one, zoo.adam, batches, 8)
    in_a_row, _ = train_source(other, zoo.adam, [*batches, *batches, *batches], 8)
    assert len(three_times) == 8
    assert three_times == in_a_row


# Divergence


@pytest.mark.parametrize(
    ("loss", "diverges"),
    [(50.0, False), (50.001, True), (torch.inf, True), (-torch.inf, True), (torch.nan, True)],
)
def test_a_loss_out_of_bounds_ends_the_training_before_its_step(monkeypatch, loss, diverges):
    script = iter([1.0, 2.0, loss, 3.0])
    model = nn.Linear(1, 1, bias=False)
    monkeypatch.setattr(
        nn, "CrossEntropyLoss", lambda: lambda logits, y: model.weight.sum() * 0 + next(script)
    )
    updates = []
    monkeypatch.setattr(source_loop, "eager_update", lambda *args: updates.append(args))
    batches = [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))] * 4
    losses, diverged = train_source(model, zoo.adam, batches, 4)
    assert diverged is diverges
    assert losses == ([1.0, 2.0] if diverges else [1.0, 2.0, 50.0, 3.0])
    assert len(updates) == len(losses)


def test_a_diverged_run_has_the_fitness_of_the_source():
    run = evaluate_source(Trial(wild, MINI, 0), Conditions(20, 16, None), mini_images(), 0)
    assert (run.fitness, run.accuracy) == (-1.0, None)
    assert 0 < len(run.losses) < 20


# Evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_fitness_is_accuracy_and_a_share_of_the_loss(workers):
    data = mini_images()
    before = torch.get_rng_state()
    run = evaluate_source(Trial(zoo.adam, MINI, 1), Conditions(70, 32, None), data, workers)
    mean = statistics.fmean(run.losses[20:])
    assert mean < 1
    assert len(run.losses) == 70
    assert run.accuracy * len(data.y_test) == pytest.approx(round(run.accuracy * len(data.y_test)))
    assert 0.5 < run.accuracy < 0.9
    assert run.fitness == pytest.approx(run.accuracy + 0.05 * (1 - mean), abs=1e-12)
    assert run.seconds == run.train_seconds + run.test_seconds
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_is_the_same_run():
    def losses(seed):
        trial = Trial(zoo.adam, MINI, seed)
        return evaluate_source(trial, Conditions(3, 16, None), mini_images(), 0).losses

    assert losses(0) == losses(0) != losses(1)


# Images


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_images_are_normalised_as_ours(shape):
    data = random_images(shape)
    expected, _ = Batches(data).training(Draw(torch.arange(5)))
    images = source_loop.PilImages(data.x_train, data.y_train, transform_of(data, augment=False))
    assert len(images) == 70
    for place in range(5):
        x, y = images[place]
        torch.testing.assert_close(x, expected[place], rtol=0, atol=1e-6)
        assert y == data.y_train[place]


def test_images_are_mirrored_and_cropped_as_ours():
    data = random_images()
    ways = list(itertools.product([False, True], range(9), range(9)))
    mirrored, top, left = (torch.tensor(column) for column in zip(*ways, strict=True))
    draw = Draw(torch.zeros(len(ways), dtype=torch.int64), mirrored, top, left)
    expected, _ = Batches(data).training(draw)
    image, transform = to_pil_image(data.x_train[0]), transform_of(data, augment=True)
    seen = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(400):
            off = (expected - transform(image)).abs().amax((1, 2, 3))
            assert off.min() < 1e-6
            seen.add(ways[off.argmin()])
    for position, values in enumerate(zip(*ways, strict=True)):
        assert {way[position] for way in seen} == set(values)
    assert len(seen) > 0.8 * len(ways)  # 1 - exp(-400 / 162) is 0.92
