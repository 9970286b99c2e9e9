"""The Triton kernels, interpreted on the CPU, against the definition; and what the backend says."""

import sys

import device_cases as cases
import numpy as np
import pytest
import torch
from oracle import DTYPES
from triton_interpreter import TritonInterpreted, interpreted, interpreted_module

from evokernels import zoo
from evokernels.compiler.lower import lower
from evokernels.kernels.plan import STATE_DTYPES, Rounding
from evokernels.kernels.triton import TritonBackend

pytest.importorskip("triton")

BACKEND = TritonInterpreted()
FORMATS = [(dtype, state) for dtype, states in STATE_DTYPES.items() for state in states]
ROUNDINGS = {"nearest": None, "stochastic": Rounding(2**63 + 5, 6)}

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_format = pytest.mark.parametrize(("dtype", "state"), FORMATS, ids=str)
per_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)


@per_dtype
def test_random_genomes_match_the_reference(dtype):
    cases.check_random_genomes(BACKEND, dtype, range(4))
    cases.check_random_genomes(BACKEND, dtype, range(4, 8))


@per_format
def test_moments_of_every_format_match_the_reference(dtype, state):
    cases.check_formats(BACKEND, dtype, state, range(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_gradients_show(bad):
    cases.check_not_finite(BACKEND, bad, range(3))


def test_a_term_that_is_not_there_adds_nothing():
    cases.check_absent_terms(BACKEND)


@pytest.mark.parametrize("name", cases.SCHEDULED)
def test_schedule_and_bias_correction_of_any_step(name):
    cases.check_schedule(BACKEND, name)


@per_rounding
@per_format
def test_no_layout_changes_a_bit(dtype, state, rounding):
    cases.check_layouts(BACKEND, dtype, state, rounding)


@per_rounding
@per_format
def test_any_length_and_alignment(dtype, state, rounding):
    if rounding is None or torch.bfloat16 in (dtype, state):
        cases.check_tails(BACKEND, dtype, state, rounding)


def test_the_layout_of_a_gradient_may_change():
    cases.check_changing_layouts(BACKEND)


@pytest.mark.parametrize(("dtype", "state"), [f for f in FORMATS if torch.bfloat16 in f], ids=str)
def test_random_bits_are_those_of_the_eager_backend(dtype, state):
    cases.check_stochastic_bits(BACKEND, dtype, state)


def test_every_random_number_decides():
    cases.check_every_random_number_decides(BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_rounded_once(dtype):
    cases.check_moments_are_rounded_once(BACKEND, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype):
    cases.check_16_bit_values(BACKEND, dtype)


def test_missing_gradients():
    cases.check_missing_gradients(BACKEND)


@per_dtype
def test_scale_norm_and_direction(dtype):
    cases.check_scaling(BACKEND, dtype)


@per_dtype
def test_a_step_that_must_not_be_taken(dtype):
    cases.check_found_inf(BACKEND, dtype)


def test_learning_rates_on_the_device():
    cases.check_learning_rate_on_the_device(BACKEND)


@per_dtype
def test_cleared_gradients_are_zero_and_nothing_else_is(dtype):
    cases.check_clear(BACKEND, dtype)


@pytest.mark.parametrize("share", cases.SHARED)
def test_gradients_that_share_memory_are_cleared_when_all_are_read(share):
    cases.check_clear_shared(BACKEND, share)


@per_dtype
def test_sum_of_squares(dtype):
    cases.check_sum_of_squares(BACKEND, dtype)


def test_one_launch_for_all_kinds():
    cases.check_one_launch(BACKEND)


def test_tensors_of_a_group_count_for_themselves():
    cases.check_counts(BACKEND)


def test_counts_may_be_set_back():
    cases.check_counts_set_back(BACKEND)


def test_several_launches():
    cases.check_several_launches(BACKEND)


PROBE = """\
@triton.jit
def probe(x, y, what: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, what(tl.load(x + i)))


@triton.jit
def cospi_probe(x, y, n: tl.constexpr):
    probe(x, y, cospi, n)


@triton.jit
def expm1_probe(x, y, n: tl.constexpr):
    probe(x, y, expm1, n)
"""


def probed(name, values):
    x = torch.from_numpy(values)
    y = torch.empty_like(x)
    with interpreted():
        module = interpreted_module(PROBE)
        getattr(module, f"{name}_probe")[(1,)](x, y, len(x))
    return y.numpy()


def test_cospi():
    halves = np.arange(-8, 8) / 2
    expected = np.array([1, 0, -1, 0] * 4, float)
    assert np.array_equal(probed("cospi", halves), expected)
    x = np.random.default_rng(0).uniform(-2, 2, 1024)
    exact = np.cos(np.longdouble("3.14159265358979323846264338327950288") * x)
    assert np.abs(probed("cospi", x) - exact).max() < 1.2e-16
    assert probed("cospi", np.array([0.0, 1e-300]))[1] == 1.0


def test_expm1():
    x = -np.logspace(-320, 2.9, 1024)
    exact = np.expm1(x.astype(np.longdouble))
    assert (
        np.abs(probed("expm1", x) - exact) <= 2.5 * np.spacing(np.abs(exact.astype(float)))
    ).all()
    assert probed("expm1", np.array([-np.inf, 0.0])).tolist() == [-1.0, 0.0]


# the backend


def test_it_says_why_not(monkeypatch):
    program = lower(zoo.adam).program
    why_not = TritonBackend().why_not
    cuda = torch.device("cuda")
    assert "the tensors are on cpu" in why_not(program, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(program, cuda, torch.float32) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not(program, cuda, torch.float32) is None


def test_it_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = TritonBackend().why_not(lower(zoo.adam).program, torch.device("cuda"), torch.float32)
    assert reason.startswith("Triton cannot be imported")
