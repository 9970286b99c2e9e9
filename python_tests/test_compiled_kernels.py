"""The kernels of both GPU backends compiled for real GPUs: what their machine code needs and moves.

For sm_75, which has the fewest threads and registers, every structure in every pair of dtypes. What
differs between architectures is the assembler, not what is rendered: for sm_80 the largest rule in
all dtypes, for sm_90 all rules in float32. `bench/gpu_code.py` compiles everything for all three.
"""

import itertools
import math
import re
import struct

import pytest
from gpu_code import COMPILERS, Case, all_kinds, compiled, structures, tensor_bytes
from machine_code import occupancy
from own_rules import AVERAGED, FORMULAS, WIDE, rule_of

from evokernels import terms
from evokernels.compiler.covers import COVERS
from evokernels.compiler.lower import lower
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.compiler.structure import structure_of
from evokernels.genome import CATALOGUES

KINDS = list(all_kinds())
FLOAT32 = [kind for kind in KINDS if (kind.parameter, kind.state) == ("float32", "float32")]
LARGEST = [kind for kind in KINDS if kind.structure.name == "g_m_v_abs"]
CASES = [
    Case(backend, architecture, kind)
    for backend in COMPILERS
    for architecture, kinds in {75: KINDS, 80: LARGEST, 90: FLOAT32}.items()
    for kind in kinds
]

# Registers of a thread that leave room for so many blocks of 256 threads at a time.
MOST_REGISTERS = {1: 255, 2: 128, 3: 80}


def blocks_wanted(backend, architecture, states):
    """At a time: two from sm_80 on, but three with Triton, which is told a number of registers
    whatever the architecture; fewer beside many states."""
    if backend == "triton":
        return 2 if states > 4 else 3
    return 1 if states > 4 else 2 if states > 2 or architecture >= 80 else 3


# Whose code others have too, and more.
PARTS_OF_OTHERS = {"one average", "SIGN_MOMENTUM", "CAUTIOUS_MOMENTUM", "TANH_GRAD"}


def own_structures():
    """Of rules that no cover serves, by what is special about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evokernels.genome._own_terms", {})
        rules = {**FORMULAS, **{term.name: term for term in WIDE}}
        rules["six states"] = AVERAGED["four averages"] + terms.v
        kept = rules.keys() - PARTS_OF_OTHERS
        return {name: structure_of(lower(rule_of(rules[name]))) for name in rules if name in kept}


OWN = own_structures()
ALL_FLOAT32 = ("float32", "float32", False)
# Those that take most registers, where states are many; how tensors of other pairs are accessed,
# the cases above show.
FORMATS_OF_MANY_STATES = [
    ALL_FLOAT32,
    ("float32", "bfloat16", True),
    ("float64", "float32", False),
    ("float64", "bfloat16", True),
]


def own_cases():
    """What differs between architectures is the assembler: the most states on the newest, too."""
    for backend, (name, structure) in itertools.product(COMPILERS, OWN.items()):
        many = name == "six states" or (name, backend) == ("two averages", "cuda")
        for formats in FORMATS_OF_MANY_STATES if many else [ALL_FLOAT32]:
            yield name, Case(backend, 75, Kind(structure, *formats))
        if name == "six states":
            yield name, Case(backend, 90, Kind(structure, *ALL_FLOAT32))


OWN_CASES = list(own_cases())


def where_there_is(backend):
    reason = COMPILERS[backend].why_not()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def case_name(case):
    structure, parameter, state, stochastic = case.kind
    rounding = ["stochastic"] if stochastic else []
    names = [case.backend, f"sm_{case.architecture}", structure.name, parameter, state]
    return "-".join([*names, *rounding])


each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=where_there_is(backend)) for backend in COMPILERS]
)
each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=where_there_is(c.backend), id=case_name(c)) for c in CASES],
)
each_own_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=where_there_is(c.backend), id=f"{name}-{case_name(c)}")
        for name, c in OWN_CASES
    ],
)


@pytest.fixture(scope="module")
def code_of(request):
    """The code of a case. All that have been selected are compiled from the first one on."""
    updates = (test_update, test_update_of_a_rule_without_a_cover)
    selected = (i.callspec.params["case"] for i in request.session.items if i.obj in updates)
    with compiled(c for c in selected if COMPILERS[c.backend].why_not() is None) as codes:
        yield lambda case: codes[case].result()


def test_every_structure_and_pair_of_dtypes_is_compiled():
    assert [structure.name for structure in structures()] == [cover.name for cover in COVERS]
    assert len(KINDS) == len(set(KINDS)) == 2 * 5 + 6 * 14
    assert (len(FLOAT32), len(LARGEST)) == (8, 14)


def assert_fits(code, backend, architecture, states=2):
    assert code.spills == 0
    blocks = blocks_wanted(backend, architecture, states)
    assert code.registers <= MOST_REGISTERS[blocks]
    if architecture == 75:
        assert occupancy(code.registers, 75, code.threads) >= blocks * 0.25


def assert_moves_what_it_must(case, code):
    """One loop over vectors, and nothing in double precision that need not be."""
    kind, compiler = case.kind, COMPILERS[case.backend]
    assert_fits(code, case.backend, case.architecture, len(kind.structure.program.state))

    # one loop over vectors; in it each tensor once: 16 bytes at a time, or with fewer the elements
    # that another tensor has in 16
    (loop,) = code.loops
    sizes = [compiler.elements(kind) * size for size in tensor_bytes(kind)]
    accesses = sorted(a for size in sizes for a in [min(16, size)] * math.ceil(size / 16))
    assert max(accesses) == 16
    assert loop.loads == loop.stores == tuple(accesses)
    # all of it, or nothing behind the last element; a gradient is cleared only where that is wanted
    loaded, stored = sum(sizes), sum(sizes[1:])
    assert loop.loaded == (0 if compiler.masked else loaded, loaded)
    assert loop.stored == (0 if compiler.masked else stored, stored + sizes[1])
    assert loop.reread <= most_reread(case)
    # of which small GPUs do few at a time
    assert (loop.doubles > 0) == (kind.arithmetic == "float64")


@each_case
def test_update(code_of, case):
    kind, code = case.kind, code_of(case)
    assert_moves_what_it_must(case, code)
    assert ".ftz.f32" not in code.ptx
    assert not re.search(r"(div|sqrt|rcp)\.(approx|full)\S*\.f32", code.ptx)
    if kind.arithmetic == "float32" and "abs" in kind.structure.name:
        assert "div.rn.f32" in code.ptx


@each_own_case
def test_update_of_a_rule_without_a_cover(code_of, case):
    code = code_of(case)
    assert_moves_what_it_must(case, code)
    # in the functions that come with CUDA, which scale what they flush: accurate all the same
    of_functions = {"ex2.approx.ftz.f32", "rcp.approx.ftz.f32"} if case.backend == "cuda" else set()
    assert set(re.findall(r"\w+\.\S*ftz\S*\.f32", code.ptx)) <= of_functions
    assert not re.search(r"(div|sqrt|tanh|lg2)\.(approx|full)\S*\.f32", code.ptx)


@pytest.mark.skipif(COMPILERS["cuda"].why_not() is not None, reason="NVRTC is not here")
@pytest.mark.parametrize("parameter", ["float32", "bfloat16"])
def test_many_scalars_take_no_registers(monkeypatch, parameter):
    """The whole wide catalogue with an average keeps three states, and yet three blocks fit."""
    monkeypatch.setattr("evokernels.genome._own_terms", {})
    structure = structure_of(lower(rule_of(*CATALOGUES["wide"])))
    assert len(structure.program.state) == 3
    assert len(structure.program.scalars) > max(len(each.program.scalars) for each in structures())
    code = COMPILERS["cuda"].code([Kind(structure, parameter, "float32", False)], 75)
    assert (code.spills, code.registers <= MOST_REGISTERS[3]) == (0, True)


def most_reread(case):
    """Bytes that all threads read from the same addresses in each pass, and so from a cache."""
    kind = case.kind
    drawn = 16 if kind.stochastic else 0  # seed and position, on which random bits depend
    if case.backend == "triton":  # and the numbers of the rule, which would take registers
        return drawn + len(kind.structure.program.scalars) * DTYPES[kind.arithmetic].bytes
    # beside doubles there is no room for the random bits of eight elements: drawn for each
    return drawn * (COMPILERS["cuda"].elements(kind) if kind.parameter == "float64" else 1)


@each_backend
@pytest.mark.parametrize("parameter", DTYPES)
def test_the_sum_of_squares_reads_each_element_once(backend, parameter):
    kind = Kind(KINDS[0].structure, parameter, DTYPES[parameter].arithmetic, False)
    code = COMPILERS[backend].code([kind], 75, "squares")
    assert_fits(code, backend, 75)
    assert code.loops
    for loop in code.loops:  # several times 16 bytes where it is unrolled
        assert set(loop.loads) == {16}
        assert loop.loaded == (0 if COMPILERS[backend].masked else sum(loop.loads), sum(loop.loads))
        assert (loop.stored, loop.stores) == ((0, 0), ())
        if backend == "cuda":  # converted, then one operation: a T4 has few units for doubles
            an_element = 1 + (parameter != "float64")
            assert loop.doubles == sum(loop.loads) // DTYPES[parameter].bytes * an_element


@each_backend
@pytest.mark.parametrize("mixed", ["structure", "parameter"])
def test_a_kernel_of_several_kinds(backend, mixed):
    """A model with two genomes, or in all dtypes, runs on one kernel."""
    if mixed == "structure":
        kinds = [kind for kind in FLOAT32 if kind.structure.name in ("g_m_v", "g_m")]
    else:
        kinds = [k for k in KINDS if k.structure.name == "g_m_v" and not k.stochastic]
        kinds = [kind for kind in kinds if kind.state == kind.arithmetic]
    assert len(kinds) == {"structure": 2, "parameter": 4}[mixed]
    code = COMPILERS[backend].code(kinds, 75)
    assert_fits(code, backend, 75)
    assert len(code.loops) == len(kinds)


@each_backend
def test_numbers_keep_all_digits(backend):
    """Constants of the step's formulas are float64 in the code, not float32 made longer."""
    kind = Kind(LARGEST[0].structure, "float64", "float64", False)
    code = COMPILERS[backend].code([kind], 75)
    for number in (1e-06, math.pi, 0.5):
        assert f"0d{struct.pack('>d', number).hex().upper()}" in code.ptx
