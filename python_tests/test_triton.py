"""The Triton backend: the functions that its kernels bring along, and what it says."""

import sys

import numpy as np
import pytest
import torch
from triton_interpreter import interpreted, interpreted_module

from evokernels import zoo
from evokernels.compiler.lower import lower
from evokernels.kernels.triton import TritonBackend

pytest.importorskip("triton")

PROBE = """\
@triton.jit
def probe(x, y, what: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, what(tl.load(x + i)))


"""
FUNCTIONS = ("cospi", "expm1", "exponential", "log1p", "tanh")
for _name in FUNCTIONS:
    PROBE += f"""

@triton.jit
def {_name}_probe(x, y, n: tl.constexpr):
    probe(x, y, {_name}, n)
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
