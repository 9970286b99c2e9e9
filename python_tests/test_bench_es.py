"""bench/es.py in tiny settings, and the source's program against NumPy."""

import contextlib
import copy
import csv
import itertools
import sys
import types

import es
import es_examples
import numpy as np
import pytest
import source_es
import torch
from es_speed import batched_losses, our_iteration

from evokernels.errors import BackendError, JournalError
from evokernels.es import EvolutionStrategy, PopulationForward

TINY = ("--iterations", "6", "--population", "4", "--samples", "70")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs es.py in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["es.py", *map(str, arguments)])
        code = es.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def uncompiled(monkeypatch):
    """The source's program as plain Python, whether numba is there or not."""
    monkeypatch.setitem(sys.modules, "numba", types.SimpleNamespace(jit=lambda function: function))
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    linalg = types.SimpleNamespace(cython_blas=None)
    monkeypatch.setitem(sys.modules, "scipy.linalg", linalg)
    libraries = types.SimpleNamespace(limit=lambda **_: contextlib.nullcontext())
    pools = types.SimpleNamespace(ThreadpoolController=lambda: libraries)
    monkeypatch.setitem(sys.modules, "threadpoolctl", pools)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The source's program


def forward(w, s):
    """The document's network, written as matrices of one sample after another."""
    w1, w2, w3, b1, b2 = np.split(w, [10, 110, 120, 130])
    h1 = np.minimum(s.T @ w1[None, :] + b1, 0)
    h2 = np.minimum(h1 @ w2.reshape(10, 10).T + b2, 0)
    return (h2 @ w3)[None, :]


def nmse(w, s):
    x = 2 * s * s + 5
    return np.sum((forward(w, s) - x) ** 2) / np.sum(x * x)


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    return generator.standard_normal((1, 300)), generator.standard_normal(140)


def test_the_source_s_iteration_is_the_document_s(data, uncompiled):
    s, w = data
    noise = np.random.default_rng(1).standard_normal((6, 140))
    got, value = source_es.SourceProgram(s).iterate(w, noise)
    rewards = np.array([1 / nmse(w + 0.01 * eps, s) for eps in noise])
    utilities = (rewards - rewards.mean()) / rewards.std()
    right = w + 0.0001 / (6 * 0.01) * np.einsum("j,ji->i", utilities, noise)
    np.testing.assert_allclose(got, right, rtol=1e-10)
    assert value == pytest.approx(nmse(right, s), rel=1e-9)
    assert source_es.SourceProgram(s).draw(3).shape == (3, 140)


def test_the_source_s_network_is_ours_with_signs_turned_round(data):
    s, w = data
    w1, w2, w3, b1, b2 = (torch.from_numpy(part) for part in np.split(w, [10, 110, 120, 130]))
    network = es_examples.curve_network()
    values = (-w1[:, None], -b1, w2.view(10, 10), -b2, -w3[None])
    for parameter, value in zip(network.parameters(), values, strict=True):
        assert parameter.shape == value.shape
        parameter.data = value.float()
    x, y = torch.from_numpy(s.T).float(), torch.from_numpy(source_es.curve(s).T).float()
    loss = PopulationForward.of(network).losses(x, y, "squares").item()
    assert loss / y.double().square().sum().item() == pytest.approx(nmse(w, s), rel=1e-5)


def vector_of(network):
    """The source's w of our network."""
    w1, b1, w2, b2, w3 = (p.detach().double().flatten().numpy() for p in network.parameters())
    return np.concatenate([-w1, w2, -w3, -b1, -b2])


def test_an_iteration_of_ours_is_one_of_the_source_s(data, uncompiled):
    s, _ = data
    network = es_examples.curve_network()
    zero = copy.deepcopy(network).double()
    for parameter in zero.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(zero.parameters(), lr=1.0)
    noise = []
    strategy = EvolutionStrategy(zero, optimizer, sigma=1.0)  # members are the noise alone
    strategy.ask(lambda member: noise.append(vector_of(member)) or 0.0)
    before = vector_of(network)
    right, value = source_es.SourceProgram(s).iterate(before, np.array(noise))
    x = torch.from_numpy(s.T).float()
    y = source_es.curve(x)
    loss = our_iteration(network, x, y, "squares")()
    np.testing.assert_allclose(vector_of(network) - before, right - before, rtol=1e-2, atol=2e-6)
    assert loss / y.double().square().sum().item() == pytest.approx(value, rel=1e-5)


def test_without_numba_the_error_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r'pip install "evokernels\[bench\]"'):
        source_es.SourceProgram(data[0])


@pytest.mark.parametrize("loss", ["squares", "cross_entropy"])
def test_torch_in_batches_finds_the_same_losses(loss):
    network = es_examples.curve_network() if loss == "squares" else es_examples.image_network()
    inputs = 1 if loss == "squares" else 784
    x = torch.randn(30, inputs)
    y = source_es.curve(x) if loss == "squares" else torch.randint(10, (30,))
    numbers = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    got = batched_losses(network, torch.stack([numbers, numbers * 2]), x, y, loss)
    for one, factor in zip(got, (1, 2), strict=True):
        torch.nn.utils.vector_to_parameters(numbers * factor, network.parameters())
        right = PopulationForward.of(network).losses(x, y, loss).item()
        assert one.item() == pytest.approx(right, rel=1e-4)


# The command


@pytest.mark.parametrize(("example", "every"), [("curve", 1), ("images", 4), ("rates", 6)])
def test_an_example_leaves_a_table_and_a_picture(example, every, command, tmp_path):
    code, out, err = command(example, *TINY, "--every", every, "--out", tmp_path)
    assert code == 0, err
    rows = rows_of(tmp_path / f"{example}.csv")
    updates = list(es_examples.EXAMPLES[example].updates)
    iterations = [i for i in range(1, 7) if i % every == 0 or i == 6]
    assert [row["update"] for row in rows] == [u for u in updates for _ in iterations]
    assert [int(row["iteration"]) for row in rows] == iterations * len(updates)
    assert all(int(row["evaluations"]) == 4 * int(row["iteration"]) for row in rows)
    quantity = es_examples.EXAMPLES[example].quantity
    assert all(0 < float(row[quantity]) < 100 for row in rows)
    assert (tmp_path / f"{example}.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"| {update} | " in out for update in updates)
    given = {"iterations": 6, "population": 4, "sigma": 0.01 if example == "curve" else 0.02}
    given |= {"samples": 70, "every": every, "seed": 0}
    assert f"{example}: {', '.join(f'{k} {v}' for k, v in given.items())}\n" in out
    assert all(float(row[name]) == value for row in rows for name, value in given.items())
    assert "iteration" in err  # the progress bar
    before = (tmp_path / f"{example}.csv").read_bytes()
    assert command(example, *TINY, "--every", every, "--out", tmp_path)[:2] == (0, out)
    assert (tmp_path / f"{example}.csv").read_bytes() == before


def test_ctrl_c_leaves_what_was_measured(command, tmp_path, monkeypatch):
    def cut(example, update, settings, path, train=es_examples.train):
        rows = train(example, update, settings, path)
        yield from itertools.islice(rows, 2 if update == "Adam" else None)
        if update == "Adam":
            raise KeyboardInterrupt

    monkeypatch.setattr(es, "train", cut)
    code, out, err = command("curve", *TINY, "--out", tmp_path)
    assert code == 130
    assert "the same command resumes" in err
    rows = rows_of(tmp_path / "curve.csv")
    assert [row["update"] for row in rows] == ["plain step"] * 6 + ["Adam"] * 2
    assert (tmp_path / "curve.png").exists()
    assert "| Adam | " in out


def test_learning_rates_are_chosen_by_images_of_their_own():
    images, rates = (kind(kind.defaults) for kind in (es_examples.Images, es_examples.Rates))
    parts = [images._train, images._measured, rates._measured]
    assert [len(y) for _, y in parts] == [4000, 1500, 1000]
    assert torch.equal(images._train[0], rates._train[0])
    train, test, validation = ({row.numpy().tobytes() for row in x} for x, _ in parts)
    assert not validation & train
    assert not validation & test


def test_batches_of_images_depend_on_seed_and_generation():
    def fitness(seed, generation):
        torch.manual_seed(0)
        settings = es_examples.Settings(1, population=2, sigma=1e-9, samples=9, every=1, seed=seed)
        images, network = es_examples.Images(settings), es_examples.image_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        strategy = EvolutionStrategy(network, optimizer, population=2, sigma=1e-9)
        strategy.generation = generation
        return images.fitness(PopulationForward.of(network), strategy)[0].item()

    values = [fitness(0, 0), fitness(0, 1), fitness(1, 0)]
    assert len(set(values)) == 3
    assert values[0] == fitness(0, 0)


def test_a_training_that_was_interrupted_goes_on_bit_by_bit(tmp_path, monkeypatch):
    settings = es_examples.Settings(6, population=4, sigma=0.01, samples=70, every=1)
    example = es_examples.Curve(settings)

    def run(path, stop=None):
        rows = es_examples.train(example, "evolved_2025", settings, path)
        return list(itertools.islice(rows, stop))

    monkeypatch.setattr(es_examples, "SAVE_SECONDS", -1)
    whole = run(tmp_path / "whole.pt")
    assert run(tmp_path / "cut.pt", stop=4) == whole[:4]
    assert run(tmp_path / "cut.pt") == whole
    assert len(whole) == 6
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt")]
    for name, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][name])


def test_a_state_of_other_settings_or_none_is_left_alone(command, tmp_path):
    arguments = ("curve", "--updates", "Adam", "--out", tmp_path)
    assert command(*arguments, *TINY)[0] == 0
    code, out, err = command(*arguments, *TINY, "--sigma", "0.1")
    assert (code, out) == (2, "")
    assert "sigma=0.01" in err
    assert "--out" in err
    (tmp_path / "Adam.pt").write_bytes(b"no state")
    with pytest.raises(JournalError, match="no state of a training"):
        es_examples.load(tmp_path / "Adam.pt", es_examples.Curve.defaults, {})


def test_speed_lets_all_take_turns(command, uncompiled, monkeypatch):
    for name, value in {"POPULATION": 2, "SAMPLES": 50}.items():
        monkeypatch.setattr(source_es, name, value)
    monkeypatch.setattr("es_speed.IMAGES", 5)
    monkeypatch.setattr("es_speed.TURN", 1e-9)
    code, out, _ = command("speed", "--passes", "2")
    assert code == 0
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    names = [line[0].strip("| ") for line in lines]
    assert names == [
        *("1-10-10-1, 50 samples", "source, numba", "source, numba, products on one thread"),
        *("torch.bmm", "evokernels"),
        *("784-32-10, 5 images", "torch.bmm", "evokernels"),
    ]
    assert lines[4][-1].startswith("1.0 ")


def test_on_one_thread_limits_the_library_that_numba_multiplies_by(data):
    pytest.importorskip("numba")
    pytest.importorskip("scipy")
    pools = pytest.importorskip("threadpoolctl")
    program = source_es.SourceProgram(data[0])
    with program.on_one_thread():
        found = [p for p in pools.threadpool_info() if p["user_api"] == "blas"]
    assert any("scipy.libs" in pool["filepath"] for pool in found)
    assert {pool["num_threads"] for pool in found} == {1}
