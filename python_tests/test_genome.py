"""The genome: fields, bounds, JSON; the named genomes; warmup and cosine."""

import dataclasses
import fractions
import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evokernels import Genome, Term, zoo
from evokernels.compiler.schedule import learning_rate_factor
from evokernels.errors import EvokernelsError, GenomeError
from evokernels.genome import CATALOGUES

# Field and default, in the order of the source system.
DEFAULTS = {
    "term_types": (Term.GRAD,),
    "alphas": (1.0,),
    "lr_log10": -3.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps_log10": -8.0,
    "wd_log10": -4.0,
    "use_m": True,
    "use_v": True,
    "use_bias_correction": True,
    "use_gradient_clipping": False,
    "clip_value": 1.0,
    "use_warmup": False,
    "warmup_steps": 100,
    "use_cosine_decay": False,
}
FLAGS = [name for name, default in DEFAULTS.items() if isinstance(default, bool)]

CLASSIC = ["GRAD", "MOMENTUM", "RMS_NORM", "ADAM_TERM", "SIGN_GRAD", "SQRT_GRAD", "NESTEROV"]
TERMS = [
    *CLASSIC,
    *("SIGN_MOMENTUM", "LION", "CAUTIOUS_MOMENTUM", "CAUTIOUS_ADAM"),
    *("BELIEF", "TANH_GRAD", "RMS_ABS"),
]

# Every field at another value than its default.
OTHER = {
    "term_types": (Term.NESTEROV, Term.SQRT_GRAD),
    "alphas": (-0.1, 1 / 3),
    "lr_log10": -2.9198932483267144,
    "beta1": 0.8553020861538518,
    "beta2": 0.9357561078635277,
    "eps_log10": -8.26423960220415,
    "wd_log10": -math.inf,
    "use_m": False,
    "use_v": False,
    "use_bias_correction": False,
    "use_gradient_clipping": True,
    "clip_value": 0.1 + 0.2,
    "use_warmup": True,
    "warmup_steps": 7,
    "use_cosine_decay": True,
}


def stored(genome):
    """All that JSON has of it: no beta3, which no built-in term reads."""
    names = (field.name for field in dataclasses.fields(genome) if field.name in genome.to_dict())
    return {name: getattr(genome, name) for name in names}


# Construction


def test_fields_and_defaults_are_those_of_the_source_system():
    assert list(stored(Genome()).items()) == list(DEFAULTS.items())
    # 1 == True: the types, too
    assert [type(v) for v in stored(Genome()).values()] == [type(v) for v in DEFAULTS.values()]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_genome_is_immutable(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Genome(), name, DEFAULTS[name])


def test_a_genome_does_not_change_with_the_list_it_was_made_from():
    alphas = [1.0]
    genome = Genome(alphas=alphas)
    alphas.append(2.0)
    assert genome.alphas == (1.0,)


@pytest.mark.parametrize("name", [name for name in OTHER if name not in ("term_types", "alphas")])
def test_equality_and_hash_follow_every_field(name):
    changed = dataclasses.replace(Genome(), **{name: OTHER[name]})
    assert changed != Genome()
    assert len({changed, Genome(), dataclasses.replace(changed)}) == 2


def test_equal_values_of_other_types_make_equal_genomes():
    plain = Genome(["MOMENTUM"], [2.0], lr_log10=-3.0, beta1=0.5, warmup_steps=10)
    same = Genome(
        (np.int64(1),),
        (np.float64(2),),
        lr_log10=-3,
        beta1=fractions.Fraction(1, 2),
        warmup_steps=10.0,
    )
    assert (same, hash(same), repr(same)) == (plain, hash(plain), repr(plain))
    assert type(same.warmup_steps) is int


@pytest.mark.parametrize(("code", "name"), list(enumerate(TERMS)))
def test_terms_by_name_code_and_member(code, name):
    for given_term in (code, name, Term[name], np.int32(code)):
        assert Genome([given_term]).term_types == (Term[name],)
    assert Term[name] == code


def test_there_are_no_terms_beyond_the_table():
    assert [term.name for term in Term] == TERMS
    assert [term.name for term in CATALOGUES["classic"]] == CLASSIC
    assert CATALOGUES["wide"] == tuple(Term)


@pytest.mark.parametrize(
    ("log", "plain", "value", "expected"),
    [
        ("lr_log10", "lr", -3, 1e-3),
        ("eps_log10", "eps", -8, 1e-8),
        ("wd_log10", "weight_decay", -2, 1e-2),
        ("wd_log10", "weight_decay", -math.inf, 0.0),
    ],
)
def test_logarithms_have_their_plain_value(log, plain, value, expected):
    assert getattr(Genome(**{log: value}), plain) == pytest.approx(expected, rel=1e-15, abs=0)


# Bounds. Values just inside are good, so that a bound cannot be narrower than it says.

IN_BOUNDS = {
    "alphas": [(-1e6,), (1e6,), (0.0,)],
    "lr_log10": [-12, 2],
    "beta1": [0.0, math.nextafter(1.0, 0.0)],
    "beta2": [0.0, math.nextafter(1.0, 0.0)],
    "eps_log10": [-16, 0],
    "wd_log10": [-math.inf, -300, 0],
    "clip_value": [5e-324, 1e308],
    "warmup_steps": [0, 10**9],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in IN_BOUNDS.items() for value in values]
)
def test_values_on_the_bounds_are_valid(name, value):
    assert getattr(Genome(**{name: value}), name) == value


# (field, values, what the message says is allowed)
OUT_OF_BOUNDS = [
    ("lr_log10", [-12.01, 2.01, math.inf, -math.inf, math.nan, 10**400], "[-12, 2]"),
    ("beta1", [-1e-9, 1.0, 1, math.nan], "[0, 1)"),
    ("beta2", [-1e-9, 1.0, 1, math.nan], "[0, 1)"),
    ("eps_log10", [-16.01, 0.01, -math.inf, math.nan], "[-16, 0]"),
    ("wd_log10", [0.01, math.inf, math.nan], "[-inf, 0]"),
    ("clip_value", [0.0, -1.0, math.inf, math.nan], "(0, inf)"),
    ("warmup_steps", [-1, 10**9 + 1, math.nan, math.inf], "[0, 1e+09]"),
    ("lr_log10", ["-3", None, True, 1j, [1.0]], "[-12, 2]"),
    ("beta1", ["0.9", None, False], "[0, 1)"),
    ("wd_log10", [None, "none"], "[-inf, 0]"),
    ("clip_value", [True], "(0, inf)"),
    ("warmup_steps", [1.5], "whole number"),
    ("warmup_steps", [True, "10"], "[0, 1e+09]"),
    *((flag, [0, 1, None, "True", np.True_], "True or False") for flag in FLAGS),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, values, allowed in OUT_OF_BOUNDS for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_an_invalid_value_is_named_with_its_field_and_what_is_allowed(name, value, allowed):
    with pytest.raises(GenomeError) as error:
        Genome(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} ")
    assert allowed in message
    assert "got " + repr(value)[:18] in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"term_types": [], "alphas": []}, "term_types is empty"),
        (
            {"term_types": [0] * 257, "alphas": [1] * 257},
            "257 entries; a genome has at most 256",
        ),
        ({"term_types": ["X" * 99]}, "term_types holds 'XXXXXXXXXXXX...XXXXXXXXXXXXX'"),
        ({"term_types": "GRAD"}, "term_types must be a list or tuple, got 'GRAD'"),
        ({"term_types": b"\0"}, "term_types must be a list or tuple, got b'"),
        ({"term_types": 0}, "term_types must be a list or tuple, got 0"),
        ({"term_types": {"GRAD"}}, "term_types must be a list or tuple, got {'GRAD'}"),
        ({"alphas": 1.0}, "alphas must be a list or tuple, got 1.0"),
        ({"alphas": None}, "alphas must be a list or tuple, got None"),
        ({"alphas": [1.0, 2.0]}, "alphas has 2 entries for 1 term_types"),
        ({"alphas": []}, "alphas has 0 entries for 1 term_types"),
        ({"alphas": [math.nan]}, "alphas must lie in [-1e+06, 1e+06], got nan"),
        ({"alphas": [-math.inf]}, "alphas must lie in [-1e+06, 1e+06], got -inf"),
        ({"alphas": [1000001]}, "alphas must lie in [-1e+06, 1e+06], got 1000001"),
        ({"alphas": ["1"]}, "alphas must be a number in [-1e+06, 1e+06], got '1'"),
        ({"term_types": ["ADAM"]}, "term_types holds 'ADAM'"),
        ({"term_types": ["grad"]}, "term_types holds 'grad'"),
        ({"term_types": [99]}, "term_types holds 99"),
        ({"term_types": [-1]}, "term_types holds -1"),
        ({"term_types": [True]}, "term_types holds True"),
        ({"term_types": [0.0]}, "term_types holds 0.0"),
        ({"term_types": [None]}, "term_types holds None"),
    ],
)
def test_invalid_terms_and_weights(fields, message):
    with pytest.raises(GenomeError, match=re.escape(message)):
        Genome(**fields)


def test_an_unknown_term_is_told_all_terms():
    with pytest.raises(GenomeError) as error:
        Genome(["ADAM"])
    for code, name in enumerate(TERMS):
        assert f"{name} ({code})" in str(error.value)


def test_a_genome_error_is_a_value_error():
    assert issubclass(GenomeError, EvokernelsError)
    assert issubclass(GenomeError, ValueError)


# Dicts and JSON


def test_to_dict_holds_every_field_in_plain_json_values():
    assert Genome(**OTHER).to_dict() == {
        "schema_version": 1,
        **OTHER,
        "term_types": ["NESTEROV", "SQRT_GRAD"],
        "alphas": [-0.1, 1 / 3],
        "wd_log10": None,
    }


@pytest.mark.parametrize("name", OTHER)
def test_no_field_is_lost_on_the_way_through_json(name):
    pair = ("term_types", "alphas")  # they go together, being of equal length
    names = pair if name in pair else (name,)
    genome = Genome(**{n: OTHER[n] for n in names})
    assert stored(Genome.from_json(genome.to_json())) == {
        **DEFAULTS,
        **{n: OTHER[n] for n in names},
    }


def bounded(low, high, **options):
    return st.floats(low, high, allow_nan=False, **options)


weighted = st.tuples(st.sampled_from([*TERMS, *range(7)]), bounded(-1e6, 1e6))
genomes = st.builds(
    lambda terms, fields: Genome(
        term_types=[term for term, _ in terms], alphas=[alpha for _, alpha in terms], **fields
    ),
    st.lists(weighted, min_size=1, max_size=6),
    st.fixed_dictionaries(
        {
            "lr_log10": bounded(-12, 2),
            "beta1": bounded(0, 1, exclude_max=True),
            "beta2": bounded(0, 1, exclude_max=True),
            "eps_log10": bounded(-16, 0),
            "wd_log10": bounded(-1e308, 0) | st.just(-math.inf),
            "clip_value": bounded(0, 1e308, exclude_min=True),
            "warmup_steps": st.integers(0, 10**9),
            **{flag: st.booleans() for flag in FLAGS},
        }
    ),
)


@settings(deadline=None, database=None)
@given(genomes)
def test_json_keeps_every_digit(genome):
    text = genome.to_json()
    back = Genome.from_json(text)
    # repr tells -0.0 from 0.0 and 1 from 1.0; == does not
    assert repr(back) == repr(genome)
    assert back.to_json() == text
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert text.endswith("}\n")


def test_dicts_of_the_source_system_load():
    published = {
        "term_types": [4, 4, 3, 3],
        "alphas": [0.41205802174892475, 0.32238621456272765, 2.0030004279455267, 1.632201163006054],
        "use_bias_correction": False,
        "use_warmup": True,
    }
    genome = Genome.from_dict(published)
    assert stored(genome) == {
        **DEFAULTS,
        **published,
        "term_types": (Term.SIGN_GRAD,) * 2 + (Term.ADAM_TERM,) * 2,
        "alphas": tuple(published["alphas"]),
    }
    assert "schema_version" not in published  # what was given is left as it was


def test_no_weight_decay_is_null_or_minus_infinity_in_a_dict():
    for none in (None, -math.inf):
        assert Genome.from_dict({"wd_log10": none}).weight_decay == 0.0


VERSIONED = Genome().to_dict()


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_versioned_dict_has_every_field(name):
    with pytest.raises(GenomeError, match=f"genome lacks {name};"):
        Genome.from_dict({k: v for k, v in VERSIONED.items() if k != name})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**VERSIONED, "schema_version": 2}, "schema_version is 2, this release reads 1"),
        ({**VERSIONED, "schema_version": "1"}, "schema_version is '1'"),
        ({**VERSIONED, "schema_version": True}, "schema_version is True"),
        ({"schema_version": None}, "schema_version is None"),
        ({"use_momentum": True}, "unknown genome field 'use_momentum'"),
        ({"beta_1": 0.9}, "unknown genome field 'beta_1'; did you mean 'beta1'?"),
        ({"learning_rate": 0.9}, "unknown genome field 'learning_rate'; known: term_types, alphas"),
        ({**VERSIONED, "use_vv": True}, "did you mean 'use_v'?"),
        ({5: 0.9}, "unknown genome field 5"),
        ({**VERSIONED, "beta1": 1.5}, "beta1 must lie in [0, 1), got 1.5"),
        ({**VERSIONED, "lr_log10": None}, "lr_log10 must be a number in [-12, 2], got None"),
        ([VERSIONED], "a genome is a JSON object, got list"),
        ("adam", "a genome is a JSON object, got str"),
        (None, "a genome is a JSON object, got NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_dicts(data, message):
    with pytest.raises(GenomeError, match=re.escape(message)):
        Genome.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"beta1": 0.9', "not JSON"),
        ("{'beta1': 0.9}", "not JSON"),
        ('{"beta1": NaN}', "not JSON: NaN is no number"),
        ('{"alphas": [Infinity]}', "not JSON: Infinity is no number"),
        ('{"wd_log10": -Infinity}', "not JSON: -Infinity is no number in JSON; no weight decay is"),
        ('{"lr_log10": 1e999}', "lr_log10 must lie in [-12, 2], got inf"),
        ('{"lr_log10": 1' + "0" * 400 + "}", "lr_log10 must lie in [-12, 2], got 1000"),
        # longer than Python reads, and deeper
        ('{"lr_log10": 1' + "0" * 5000 + "}", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "a genome is a JSON object, got list"),
        ("null", "a genome is a JSON object, got NoneType"),
        ('"adam"', "a genome is a JSON object, got str"),
    ],
    ids=range(13),
)
def test_bad_json(text, message):
    with pytest.raises(GenomeError, match=re.escape(message)) as error:
        Genome.from_json(text)
    assert "\n" not in str(error.value)


# Files


def test_a_mark_in_front_is_no_part_of_it(tmp_path):
    path = tmp_path / "windows.json"
    path.write_text(zoo.adam.to_json().replace("\n", "\r\n"), encoding="utf-8-sig")
    assert Genome.load(path) == zoo.adam


def test_save_and_load(tmp_path):
    path = tmp_path / "best genome.json"
    zoo.evolved_2025.save(path)
    assert Genome.load(path) == zoo.evolved_2025
    assert Genome.load(str(path)) == zoo.evolved_2025
    zoo.adam.save(str(path))
    assert Genome.load(path) == zoo.adam
    assert os.listdir(tmp_path) == [path.name]


def test_saved_files_are_as_readable_as_any_other(tmp_path):
    zoo.adam.save(tmp_path / "genome.json")
    (tmp_path / "other").touch()
    assert (tmp_path / "genome.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"),
    [(os, "replace"), (pathlib.Path, "write_bytes")],
    ids=["replace", "write"],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, module, function
):
    path = tmp_path / "genome.json"
    zoo.adam.save(path)
    with monkeypatch.context() as patched:
        patched.setattr(module, function, failing)
        with pytest.raises(GenomeError) as error:
            zoo.sgd_momentum.save(path)
    assert str(error.value) == f"cannot write genome {str(path)!r}: No space left on device"
    assert os.listdir(tmp_path) == ["genome.json"]
    assert Genome.load(path) == zoo.adam


@pytest.mark.parametrize("place", ["missing/genome.json", "."])
def test_a_genome_cannot_be_saved_where_no_file_can_be(tmp_path, place):
    path = tmp_path / place
    with pytest.raises(GenomeError, match=re.escape(f"cannot write genome {str(path)!r}: ")):
        zoo.adam.save(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not JSON"),
        (b'{"beta1": 0.9', "not JSON"),
        (b"\xff\xfe", "it is no text in UTF-8"),
        (b" " * 2**20 + b"{}", "it is longer than the 1,048,576 bytes of any genome"),
        (b'{"beta1": 0.9, "beta2": 0.9, "beta1": 0.8}', "not JSON: 'beta1' is there more than"),
        (b'{"beta_1": 0.9}', "did you mean 'beta1'"),
        (b'{"beta1": 2}', "beta1 must lie in [0, 1), got 2"),
    ],
)
def test_an_unreadable_genome_file_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "genome.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GenomeError) as error:
        Genome.load(path)
    message = str(error.value)
    assert message.startswith(f"cannot read genome {str(path)!r}: ")
    assert reason in message
    assert "\n" not in message


# Zoo


def test_the_published_genome_has_all_digits_and_flags():
    # section 8 of the source document, typed from there; clip_value is the source's default
    assert stored(zoo.evolved_2025) == {
        "term_types": (4, 4, 3, 3),
        "alphas": (
            0.41205802174892475,
            0.32238621456272765,
            2.0030004279455267,
            1.6322011630060542,
        ),
        "lr_log10": -2.9198932483267144,
        "beta1": 0.8553020861538518,
        "beta2": 0.9357561078635277,
        "eps_log10": -8.26423960220415,
        "wd_log10": -3.0112238437153316,
        "use_m": True,
        "use_v": True,
        "use_bias_correction": False,
        "use_gradient_clipping": False,
        "clip_value": 1.0,
        "use_warmup": True,
        "warmup_steps": 100,
        "use_cosine_decay": True,
    }


def test_the_zoo_lists_its_genomes():
    assert {
        "sgd_momentum": zoo.sgd_momentum,
        "rmsprop": zoo.rmsprop,
        "adam": zoo.adam,
        "adamw": zoo.adamw,
        "evolved_2025": zoo.evolved_2025,
        "evolved_2026": zoo.evolved_2026,
    } == zoo.GENOMES
    assert list(zoo.WIDE.items()) == [
        ("lion", zoo.lion),
        ("adabelief", zoo.adabelief),
        ("cautious_adam", zoo.cautious_adam),
    ]
    assert len({*zoo.GENOMES.values(), *zoo.WIDE.values()}) == 9


def test_evolved_2026_is_what_the_recorded_run_found():
    results = pathlib.Path(__file__).parents[1] / "bench" / "results"
    assert Genome.load(results / "paper" / "best_genome.json") == zoo.evolved_2026


# Schedule: (warmup steps or None, total steps or None for no cosine, step from 0, factor by hand)

HALF_ROOT = math.sqrt(0.5)  # cos(pi / 4)


@pytest.mark.parametrize(
    ("warmup", "total", "step", "factor"),
    [
        (None, None, 0, 1.0),
        (None, None, 10**6, 1.0),
        # a quarter in the first of four steps, all of it in the fourth
        (4, None, 0, 0.25),
        (4, None, 1, 0.5),
        (4, None, 3, 1.0),
        (4, None, 4, 1.0),
        (1, None, 0, 1.0),
        (0, None, 0, 1.0),
        # half a cosine over 8 steps: 1 at the start, 1/2 in the middle, 0 after the last step
        (None, 8, 0, 1.0),
        (None, 8, 2, (1 + HALF_ROOT) / 2),
        (None, 8, 4, 0.5),
        (None, 8, 6, (1 - HALF_ROOT) / 2),
        (None, 8, 8, 0.0),
        (None, 8, 9, 0.0),
        (None, 8, 16, 0.0),  # an unlimited cosine would be back at 1
        # both multiply; the cosine counts from the first step, not from the end of the warmup
        (4, 8, 0, 0.25),
        (4, 8, 2, 0.75 * (1 + HALF_ROOT) / 2),
        (4, 8, 4, 0.5),
        (4, 8, 12, 0.0),
        (4, 2, 2, 0.0),
    ],
)
def test_schedule(warmup, total, step, factor):
    genome = Genome(
        use_warmup=warmup is not None,
        warmup_steps=warmup or 0,
        use_cosine_decay=total is not None,
    )
    assert learning_rate_factor(genome, step, total) == pytest.approx(factor, rel=1e-15, abs=1e-16)


def test_a_schedule_that_is_off_reads_none_of_its_genes():
    genome = Genome(use_warmup=False, warmup_steps=10, use_cosine_decay=False)
    assert [learning_rate_factor(genome, step, 5) for step in (0, 3, 10)] == [1.0, 1.0, 1.0]
