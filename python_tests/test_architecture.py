"""Architectures as data: what is turned down, JSON, the journal."""

import dataclasses
import json

import numpy as np
import pytest

import evokernels
from evokernels import Architecture, zoo
from evokernels.architecture import CATALOGUE, SIZES, kind_and_size
from evokernels.errors import ArchitectureError, EvokernelsError, GenomeError, JournalError
from evokernels.evolution.baselines import BASELINES, optimizer_key
from evokernels.evolution.journal import JOURNAL, Entry, open_journal
from evokernels.evolution.records import individual_from_json, to_json, trained_from_json
from evokernels.evolution.trial import Outcome, Purpose, Trial, network_key
from evokernels.search.score import Status

MINI = "fashion_mnist_mini"
NET = Architecture(["conv3x3 8", "relu", "maxpool", "dropout 0.25", "dense 32"], 50_000)


def test_every_kind_is_in_the_catalogue_in_every_size():
    assert len(CATALOGUE) == len(set(CATALOGUE)) == 5 + 5 + 7 + 4 + 5
    for name in CATALOGUE:
        kind, size = kind_and_size(name)
        assert size in SIZES[kind] if SIZES[kind] else size is None
    assert {"conv5x5 128", "depthwise3x3", "dropout 0.25", "dense 512"} < set(CATALOGUE)


def test_an_architecture_is_immutable_and_hashable():
    again = Architecture(tuple(NET.components), 50_000)
    assert again == NET
    assert hash(again) == hash(NET)
    assert again != dataclasses.replace(NET, max_parameters=50_001)
    assert isinstance(NET.components, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NET.components = ()


def test_what_numpy_has_drawn_is_kept_as_python_s_own():
    drawn = Architecture(list(np.array(NET.components)), np.int64(50_000))
    assert repr(drawn) == repr(NET)


def test_it_is_part_of_the_public_names():
    assert "Architecture" in evokernels.__all__
    assert evokernels.Architecture is Architecture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"components": "relu"}, "components must be a list or tuple of names, got 'relu'"),
        ({"components": None}, "components must be a list or tuple of names, got None"),
        ({"components": ["relu"] * 25}, "components has 25 entries; .* at most 24"),
        ({"components": ["conv3x3 33"]}, "'conv3x3 33', which is no component; did you mean"),
        ({"components": ["conv3x3"]}, "'conv3x3', which is no component; did you mean 'conv3x3"),
        ({"components": ["relu", 7]}, "holds 7, which is no component; use one of conv3x3 8, "),
        ({"components": [["relu"]]}, r"holds \['relu'\], which is no component"),
        ({"components": [np.zeros(2)]}, r"holds array\(.* is no component"),
        ({"max_parameters": 999}, "max_parameters must be .* at least 1,000, got 999"),
        ({"max_parameters": True}, "got True"),
        ({"max_parameters": 1e6}, r"got 1000000\.0"),
        ({"max_parameters": None}, "got None"),
    ],
)
def test_what_cannot_be_is_turned_down(fields, message):
    with pytest.raises(ArchitectureError, match=message):
        Architecture(**fields)


@pytest.mark.parametrize("at", [(["relu"] * 24, 1_000), ((), 10**9)])
def test_the_bounds_themselves_are_allowed(at):
    Architecture(*at)


@pytest.mark.parametrize("architecture", [Architecture(), NET, *zoo.ARCHITECTURES.values()])
def test_no_field_is_lost_on_the_way_through_json(architecture, tmp_path):
    text = architecture.to_json()
    assert Architecture.from_json(text) == architecture
    assert json.loads(text) == architecture.to_dict()
    assert set(architecture.to_dict()) == {"schema_version", "components", "max_parameters"}
    architecture.save(tmp_path / "net.json")
    assert (tmp_path / "net.json").read_text(encoding="utf-8") == text
    assert Architecture.load(tmp_path / "net.json") == architecture


VALID = NET.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an architecture is a JSON object, got list"),
        ('{"components": [], "max_parameters": 2000}', "schema_version is None, this release"),
        (json.dumps(VALID | {"schema_version": 2}), "schema_version is 2, this release reads 1"),
        (json.dumps(VALID | {"schema_version": True}), "schema_version is True"),
        (json.dumps(VALID | {"component": []}), "field 'component'; did you mean 'components'"),
        ('{"schema_version": 1, "components": []}', "architecture lacks max_parameters"),
        (json.dumps(VALID | {"components": ["sigmoid"]}), "'sigmoid', which is no component"),
        ('{"max_parameters": NaN}', "NaN is no number in JSON; an architecture has whole numbers"),
        (zoo.adam.to_json(), "this is a genome, not an architecture"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ArchitectureError, match=message):
        Architecture.from_json(text)


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(ArchitectureError, match=r"cannot read architecture '.*absent.json'"):
        Architecture.load(tmp_path / "absent.json")
    with pytest.raises(ArchitectureError, match=r"cannot write architecture '.*net.json'"):
        NET.save(tmp_path / "absent" / "net.json")


# Trials and the journal


def test_a_trial_of_a_task_s_own_network_has_the_key_of_its_optimizer():
    for optimizer in (zoo.adam, BASELINES["lion"]):
        assert Trial(optimizer, MINI, 0).key == optimizer_key(optimizer)


def test_the_key_is_that_of_what_an_architecture_decodes_to():
    def key(*components, optimizer=zoo.adam, task=MINI, seed=0, most=250_000):
        architecture = Architecture(components, most)
        return Trial(optimizer, task, seed, architecture=architecture).key

    known = key("conv3x3 8", "relu", "dense 32")
    alike = [
        key("conv3x3 8", "relu", "relu", "dense 32", "maxpool"),
        key("conv3x3 8", "relu", "dense 512", "dense 32"),  # too large
        key("conv3x3 8", "relu", "dense 32", most=300_000),
        key("conv3x3 8", "relu", "dense 32", seed=1),
    ]
    assert set(alike) == {known}
    others = [
        key("conv3x3 8", "relu", "dense 64", most=500_000),
        key("relu", "conv3x3 8", "dense 32"),
        key("conv3x3 8", "relu", "dense 32", optimizer=zoo.rmsprop),
        Trial(zoo.adam, MINI, 0).key,
    ]
    assert len({known, *others}) == 1 + len(others)


def test_architectures_may_decode_alike_on_one_task_only():
    few, many = (Architecture(["dense 32"], most) for most in (50_000, 200_000))
    for tasks, alike in ((["mnist"], True), (["cifar10"], False), (["mnist", "cifar10"], False)):
        assert (network_key(few, tasks) == network_key(many, tasks)) == alike


OUTCOME = Outcome(Status.OK, 0.1 + 0.2, 1 / 3, 1e-17, 500, 1.25, "digest")


@pytest.mark.parametrize("optimizer", [zoo.evolved_2025, BASELINES["lion"]], ids=["genome", "lion"])
@pytest.mark.parametrize("architecture", [None, NET], ids=["own", "architecture"])
def test_a_journal_keeps_what_was_trained(tmp_path, optimizer, architecture):
    trial = Trial(optimizer, MINI, 7, Purpose.AUDIT, architecture)
    entry = Entry(1, 2, trial.key, trial, OUTCOME)
    for _ in range(2):  # opened again, it is checked
        with open_journal(tmp_path, {}) as journal:
            if not len(journal):
                journal.add(entry)
            assert journal.find(trial.key, MINI, 7, Purpose.AUDIT) == entry
            [(text,)] = journal.query("SELECT genome FROM evaluation")
    both = {"optimizer": optimizer.to_dict(), "architecture": NET.to_dict()}
    assert json.loads(text) == (optimizer.to_dict() if architecture is None else both)


def test_candidates_are_optimizers_or_architectures(tmp_path):
    candidates = [("a", NET), ("b", zoo.adam)]
    with open_journal(tmp_path, {}) as journal:
        for _ in range(2):  # the second time they are compared
            journal.begin_generation(0, candidates)
        with pytest.raises(JournalError, match="genome 0 of generation 0 differs"):
            journal.begin_generation(0, candidates[::-1])
    for _, individual in candidates:
        assert individual_from_json(to_json(individual)) == individual


@pytest.mark.parametrize("table", ["candidate", "evaluation"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "7", '{"components": ["sigmoid"]}', '{"architecture": 7, "optimizer": {}}', "{}x"),
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_journal_with_other_things_in_it_is_damaged(tmp_path, table, text):
    with open_journal(tmp_path, {}) as journal:
        trial = Trial(zoo.adam, MINI, 0, architecture=NET)
        journal.begin_generation(0, [(trial.key, NET)])
        journal.add(Entry(0, 0, trial.key, trial, OUTCOME))
        journal.query(f"UPDATE {table} SET genome = ?", text)
    with (
        pytest.raises(JournalError, match=rf"{JOURNAL} is damaged"),
        open_journal(tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ({"optimizer": None, "architecture": VALID}, GenomeError),
        ({"architecture": VALID}, GenomeError),
        ({"optimizer": zoo.adam.to_dict(), "architecture": None}, ArchitectureError),
    ],
)
def test_half_of_a_pair_is_no_pair(text, error):
    with pytest.raises(error) as caught:
        trained_from_json(json.dumps(text))
    assert isinstance(caught.value, EvokernelsError)
