"""CUDA sources → machine code: parameters, errors, and what is kept on disk."""

import functools
import os
import subprocess
import sys
import time

import pytest
from gpu_code import all_kinds
from own_rules import AVERAGED, FORMULAS, rule_of

from evokernels.compiler.lower import lower
from evokernels.compiler.spelling import Kind
from evokernels.compiler.structure import structure_of
from evokernels.errors import BackendError
from evokernels.kernels import cache, nvrtc
from evokernels.kernels.cuda_source import cuda_source
from evokernels.terms import exp, g, m, progress

pytestmark = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))


@pytest.mark.parametrize("words", [64, 4095])
def test_parameters_are_as_large_as_words_say(words):
    compiled = nvrtc.compiled(cuda_source([next(all_kinds())], words), 75)
    for entry in ("evk_update", "evk_squares"):
        assert f"{entry}_param_0[{8 * words}]" in compiled.ptx


def test_numbers_without_a_literal(monkeypatch):
    monkeypatch.setattr("evokernels.genome._own_terms", {})
    huge = 1e200 * progress * 1e200
    rule = lower(rule_of(exp(-huge) * g + exp(huge) * abs(g) + exp(huge - 2 * huge) * m))
    kind = Kind(structure_of(rule), "float32", "float32", False)
    ptx = nvrtc.compiled(cuda_source([kind], 64), 75).ptx
    assert all(f"0d{bits}" in ptx for bits in ("7FF0000000000000", "FFF0000000000000"))


def test_an_error_carries_what_the_compiler_says():
    with pytest.raises(BackendError, match=r"for sm_75 .*NVRTC_ERROR_COMPILATION(.|\n)*bogus"):
        nvrtc.compiled("bogus", 75)
    with pytest.raises(BackendError, match=r"for sm_42 .*INVALID_OPTION"):
        nvrtc.compiled("", 42)


def test_everything_decisive_is_in_the_key(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path))
    calls = []
    monkeypatch.setattr(nvrtc, "compiled", functools.partial(fake_compiled, calls))
    assert nvrtc.cubin("a", 75) == nvrtc.cubin("a", 75) == b"a for 75"
    assert len(calls) == 1
    assert nvrtc.cubin("a", 80) == b"a for 80"
    nvrtc.cubin("b", 75)
    with monkeypatch.context() as changed:
        changed.setattr(nvrtc, "OPTIONS", ("--another",))
        nvrtc.cubin("a", 75)
    with monkeypatch.context() as changed:
        changed.setattr(nvrtc, "version", lambda: (99, 1))
        nvrtc.cubin("a", 75)
    with monkeypatch.context() as changed:
        changed.setattr(cache, "_version", lambda: "99")
        nvrtc.cubin("a", 75)
    assert len(calls) == 6


def fake_compiled(calls, source, architecture):
    calls.append((source, architecture))
    return nvrtc.Compiled(f"{source} for {architecture}".encode(), "", "")


PROCESS = """
import sys
from evokernels.compiler.lower import lower
from evokernels.compiler.structure import structure_of
from evokernels.kernels import nvrtc
from evokernels.kernels.cuda_source import cuda_source
from evokernels.terms import exp, g, m, progress
from evokernels.compiler.spelling import Kind
from evokernels.zoo import adam
if sys.argv[1] == "reads":
    def compiled(*_):
        raise AssertionError("compiled although it was there")
    nvrtc.compiled = compiled
kind = Kind(structure_of(lower(adam)), "float32", "float32", False)
code = nvrtc.cubin(cuda_source([kind], 64), 75)
sys.stdout.buffer.write(code)
"""


def test_a_new_structure_is_compiled_within_a_second(monkeypatch, tmp_path):
    """And within 5 ms where that was done before, rendering and reading included."""
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("evokernels.genome._own_terms", {})
    rule = lower(rule_of(AVERAGED["four averages"], FORMULAS["tanh"]))
    kind = Kind(structure_of(rule), "float32", "float32", False)
    nvrtc.cubin(cuda_source([next(all_kinds())], 64), 75)  # the library itself is loaded
    seconds = []
    for _ in range(6):
        start = time.process_time()
        nvrtc.cubin(cuda_source([kind], 64), 75)
        seconds.append(time.process_time() - start)
    assert 0.05 < seconds[0] < 1
    assert min(seconds[1:]) < 0.005


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {
        **os.environ,
        "EVOKERNELS_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def process(how):
        return subprocess.run(
            [sys.executable, "-c", PROCESS, how], env=environment, capture_output=True
        )

    first = process("compiles")
    assert first.returncode == 0, first.stderr
    second = process("reads")
    assert second.returncode == 0, second.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith(b"\x7fELF")
    (entry,) = (tmp_path / "kernels").iterdir()
    entry.unlink()
    assert b"compiled although it was there" in process("reads").stderr
