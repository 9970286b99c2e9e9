"""The Triton kernels compiled for GPUs, without one: what the generated code is like."""

import functools
import math
import re
import struct
from pathlib import Path

import pytest
from ptx import resources, vector_loops

from evokernels.compiler.covers import COVERS
from evokernels.compiler.lower import lower
from evokernels.compiler.render_triton import TritonKind, render_module
from evokernels.compiler.structure import structure_of
from evokernels.genome import Genome
from evokernels.kernels.plan import ARITHMETIC, STATE_DTYPES
from evokernels.kernels.triton import OPTIONS_OF_NVIDIA, module_of

triton = pytest.importorskip("triton")

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
FORMATS = [
    (str(parameter).removeprefix("torch."), str(state).removeprefix("torch."))
    for parameter, states in STATE_DTYPES.items()
    for state in states
]
OWN = {str(p).removeprefix("torch."): str(a).removeprefix("torch.") for p, a in ARITHMETIC.items()}


@functools.cache
def structures():
    """One for each cover, by name."""
    found = {}
    for use_m in (False, True):
        for use_v in (False, True):
            for term in ("GRAD", "SQRT_GRAD"):
                genome = Genome(
                    term_types=[term, "MOMENTUM", "RMS_NORM" if use_v else "SIGN_GRAD"],
                    alphas=[1.0, 0.5, 0.25],
                    use_m=use_m,
                    use_v=use_v,
                )
                structure = structure_of(lower(genome))
                found[structure.name] = structure
    return found


def kinds(names, stochastic=False):
    """Of some structures in all formats; without moments there is one for each parameter dtype."""
    return [
        TritonKind(structure, parameter, state, stochastic)
        for name, structure in structures().items()
        for parameter, state in FORMATS
        if name in names
        and (structure.program.state or state == OWN[parameter])
        and (not stochastic or "bfloat16" in (parameter, state))
    ]


ALL = [cover.name for cover in COVERS]
LARGEST = ["g_m_v_abs"]

# Everything for the oldest, which has the fewest registers for its threads; for the others the
# largest rule in all formats and all rules in one.
CASES = [
    *((75, kind) for kind in kinds(ALL)),
    *((75, kind) for kind in kinds(LARGEST, stochastic=True)),
    *((80, kind) for kind in kinds(LARGEST)),
    *((90, kind) for kind in kinds(ALL) if (kind.parameter, kind.state) == ("float32", "float32")),
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
    assert sorted(structures()) == sorted(ALL)
    assert {kind.structure.name for _, kind in CASES} == set(ALL)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_update(case, tmp_path):
    architecture, kind = case
    ptx = compiled(
        render_module([kind]), "update", {"words": "*i64", "numbers": "*fp64"}, architecture
    )
    used = resources(ptxas(), ptx, tmp_path)
    assert used.registers <= 80  # three blocks of 256 threads: 75 % of those of an sm_75
    assert (used.stack, used.spilled) == (0, 0)

    state = [SIZES[kind.state]] * len(kind.structure.program.state)
    parameter = SIZES[kind.parameter]
    (loop,) = vector_loops(ptx)
    # one access for each tensor, of 16 bytes for the widest: as many bytes as there must be
    assert loop.loads == tuple(sorted(kind.vector * b for b in [parameter, parameter, *state]))
    assert loop.stores == tuple(sorted(kind.vector * b for b in [parameter, parameter, *state]))
    assert max(loop.loads) == 16
    assert ".ftz.f32" not in ptx
    if kind.arithmetic == "float32" and "abs" in kind.structure.name:
        assert "div.rn.f32" in ptx
    assert not re.search(r"(div|sqrt|rcp)\.(approx|full)\S*\.f32", ptx)


@pytest.mark.parametrize("parameter", SIZES)
def test_squares(parameter, tmp_path):
    kind = TritonKind(structures()["g"], parameter, OWN[parameter], False)
    ptx = compiled(render_module([kind]), "squares", {"words": "*i64"}, 75)
    used = resources(ptxas(), ptx, tmp_path)
    assert used.registers <= 80
    assert (used.stack, used.spilled) == (0, 0)
    (loop,) = vector_loops(ptx)
    assert (loop.loads, loop.stores) == ((16,), ())
    assert "fma.rn" not in ptx  # products and sums stay apart


def test_numbers_keep_all_digits():
    """Constants of the step's formulas are float64 in the code, not float32 made longer."""
    kind = TritonKind(structures()["g_m_v_abs"], "float64", "float64", False)
    ptx = compiled(render_module([kind]), "update", {"words": "*i64", "numbers": "*fp64"}, 75)
    for number in (1e-06, math.pi, 0.5):
        assert f"0d{struct.pack('>d', number).hex().upper()}" in ptx
