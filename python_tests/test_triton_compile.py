"""The Triton kernels compiled for GPUs, without one: what the generated code is like."""

import math
import re
import struct
from pathlib import Path

import pytest
from gpu_code import all_kinds
from ptx import resources, vector_loops

from evokernels.compiler.covers import COVERS
from evokernels.compiler.render_triton import render_module, vector_length
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.kernels.triton import OPTIONS_OF_NVIDIA, module_of

triton = pytest.importorskip("triton")

KINDS = list(all_kinds())
FLOAT32 = [k for k in KINDS if (k.parameter, k.state) == ("float32", "float32")]
LARGEST = [kind for kind in KINDS if kind.structure.name == "g_m_v_abs"]

# Everything for the oldest, which has the fewest registers for its threads (random bits with the
# largest rule); for the others the largest rule in all formats and all rules in one.
CASES = [
    *((75, kind) for kind in KINDS if not kind.stochastic or kind in LARGEST),
    *((80, kind) for kind in LARGEST if not kind.stochastic),
    *((90, kind) for kind in FLOAT32),
]


def compiled(source, name, signature, architecture):
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    function = getattr(module_of(source), name)
    described = triton.compiler.ASTSource(function, signature, constexprs={}, attrs=aligned)
    return triton.compile(described, target=target, options=OPTIONS_OF_NVIDIA).asm["ptx"]


def ptxas():
    return Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def named(case):
    architecture, (structure, parameter, state, stochastic) = case
    rounding = "-stochastic" if stochastic else ""
    return f"sm_{architecture}-{structure.name}-{parameter}-{state}{rounding}"


def test_every_cover_is_compiled():
    assert {kind.structure.name for _, kind in CASES} == {cover.name for cover in COVERS}


@pytest.mark.parametrize("case", CASES, ids=named)
def test_update(case, tmp_path):
    architecture, kind = case
    ptx = compiled(
        render_module([kind]), "update", {"words": "*i64", "numbers": "*fp64"}, architecture
    )
    used = resources(ptxas(), ptx, tmp_path)
    assert used.registers <= 80  # three blocks of 256 threads: 75 % of those of an sm_75
    assert (used.stack, used.spilled) == (0, 0)

    state = [DTYPES[kind.state].bytes] * len(kind.structure.program.state)
    parameter = DTYPES[kind.parameter].bytes
    (loop,) = vector_loops(ptx)
    # one access for each tensor, of 16 bytes for the widest: as many bytes as there must be
    accesses = tuple(sorted(vector_length(kind) * b for b in [parameter, parameter, *state]))
    assert loop.loads == loop.stores == accesses
    assert max(loop.loads) == 16
    assert ".ftz.f32" not in ptx
    if kind.arithmetic == "float32" and "abs" in kind.structure.name:
        assert "div.rn.f32" in ptx
    assert not re.search(r"(div|sqrt|rcp)\.(approx|full)\S*\.f32", ptx)


@pytest.mark.parametrize("parameter", DTYPES)
def test_squares(parameter, tmp_path):
    kind = Kind(KINDS[0].structure, parameter, DTYPES[parameter].arithmetic, False)
    ptx = compiled(render_module([kind]), "squares", {"words": "*i64"}, 75)
    used = resources(ptxas(), ptx, tmp_path)
    assert used.registers <= 80
    assert (used.stack, used.spilled) == (0, 0)
    (loop,) = vector_loops(ptx)
    assert (loop.loads, loop.stores) == ((16,), ())
    assert "fma.rn" not in ptx  # products and sums stay apart


def test_numbers_keep_all_digits():
    """Constants of the step's formulas are float64 in the code, not float32 made longer."""
    kind = Kind(LARGEST[0].structure, "float64", "float64", False)
    ptx = compiled(render_module([kind]), "update", {"words": "*i64", "numbers": "*fp64"}, 75)
    for number in (1e-06, math.pi, 0.5):
        assert f"0d{struct.pack('>d', number).hex().upper()}" in ptx
