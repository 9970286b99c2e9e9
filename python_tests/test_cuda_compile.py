"""The CUDA kernels compiled for real GPUs: what NVRTC says of them, and what their loops move."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from gpu_code import all_kinds, cuda_code, least_traffic, structures
from machine_code import occupancy, resources, streaming_loops

from evokernels.compiler.covers import COVERS
from evokernels.compiler.render_cuda import THREADS
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.errors import BackendError
from evokernels.kernels import cache, nvrtc
from evokernels.kernels.cuda_source import cuda_source

pytestmark = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))

KINDS = list(all_kinds())


CASES = [(kind, architecture) for architecture in (75, 80, 90) for kind in KINDS]


def case_name(case):
    kind, architecture = case
    rounding = ["stochastic"] if kind.stochastic else []
    return "-".join(
        [kind.structure.name, kind.parameter, kind.state, *rounding, f"sm_{architecture}"]
    )


@pytest.fixture(scope="module")
def code_of():
    """Everything compiled, on all cores: NVRTC runs without the interpreter lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = {case: threads.submit(cuda_code, *case) for case in CASES}
        yield lambda *case: waiting[case].result()
        threads.shutdown(cancel_futures=True)


def test_every_structure_and_pair_of_dtypes_is_compiled():
    assert [structure.name for structure in structures()] == [cover.name for cover in COVERS]
    assert len(KINDS) == len(set(KINDS)) == 2 * 5 + 6 * 14


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_registers_and_memory(code_of, case):
    kind, code = case[0], code_of(*case)
    assert code.spills == 0
    if case[1] == 75:
        assert occupancy(code.registers, 75, THREADS) >= 0.75
    # the loop over elements: accesses of 16 bytes, each tensor once
    traffic = code.traffic
    assert traffic.widths == {16}
    parameter = DTYPES[kind.parameter].bytes
    elements = 16 // min(DTYPES[dtype].bytes for dtype in kind.stored)
    loaded, stored = (elements * size for size in least_traffic(kind))
    assert traffic.loaded == (loaded, loaded)
    assert traffic.stored == (stored, stored + elements * parameter)  # cleared
    # what random bits depend on, the same address for all threads: seed and position. Doubles
    # leave no registers for the bits of eight elements; they are drawn for each.
    draws = (elements if kind.parameter == "float64" else 1) if kind.stochastic else 0
    assert traffic.reread <= 16 * draws
    assert (traffic.doubles > 0) == (kind.arithmetic == "float64")


@pytest.mark.parametrize("parameter", ["float32", "float64", "bfloat16"])
def test_the_sum_of_squares_reads_each_element_once(parameter):
    kind = Kind(next(structures()), parameter, "float32", False)
    compiled = nvrtc.compiled(cuda_source([kind], 64), 75, nvrtc.VERBOSE)
    loops = streaming_loops(compiled.ptx, "evk_squares")
    assert loops
    for loop in loops:
        assert loop.widths == {16}
        assert loop.stored == (0, 0)
        assert loop.loaded[0] == loop.loaded[1]  # several times 16 bytes where it is unrolled
        an_element = 1 if parameter == "float64" else 2  # converted, multiplied and added
        assert loop.doubles == loop.loaded[0] // DTYPES[parameter].bytes * an_element
    functions = resources(compiled.log)
    assert occupancy(functions["evk_squares"].registers, 75, THREADS) >= 0.75


@pytest.mark.parametrize("mixed", ["structure", "parameter"])
def test_a_kernel_of_several_kinds(mixed):
    """A model with two genomes, or in all dtypes, runs on one kernel."""
    if mixed == "structure":
        names = ("g_m_v", "g_m")
        kinds = [k for k in KINDS if k.structure.name in names and k.parameter == k.state]
        kinds = [kind for kind in kinds if kind.parameter == "float32"]
    else:
        kinds = [k for k in KINDS if k.structure.name == "g_m_v" and not k.stochastic]
        kinds = [kind for kind in kinds if kind.state == kind.arithmetic]
    assert len(kinds) == {"structure": 2, "parameter": 4}[mixed]
    compiled = nvrtc.compiled(cuda_source(kinds, 4095), 75, nvrtc.VERBOSE)
    functions = resources(compiled.log)
    assert {"evk_update", "evk_squares"} <= functions.keys()
    assert sum(function.stack + function.spills for function in functions.values()) == 0
    assert occupancy(functions["evk_update"].registers, 75, THREADS) >= 0.75


@pytest.mark.parametrize("words", [64, 4095])
def test_parameters_are_as_large_as_words_say(words):
    compiled = nvrtc.compiled(cuda_source(KINDS[:1], words), 75)
    for entry in ("evk_update", "evk_squares"):
        assert f"{entry}_param_0[{8 * words}]" in compiled.ptx


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
