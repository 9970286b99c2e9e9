"""The compiler: linear forms, equivalence of genomes, programs, covers and the C it writes."""

import ctypes
import dataclasses
import itertools
import math
import pathlib
import re
import subprocess

import numpy as np
import pytest
from oracle import random_genome

from evokernels import Genome, zoo
from evokernels.compiler import terms
from evokernels.compiler.canonical import canonical_key
from evokernels.compiler.covers import COVERS, find_cover
from evokernels.compiler.describe import formula
from evokernels.compiler.expr import (
    ON_ARRAYS,
    Call,
    Constant,
    Line,
    clamp,
    compiled,
    exp,
    log1p,
    sign,
    sqrt,
    substitute,
    tanh,
    where,
)
from evokernels.compiler.linear import linear, linear_expr
from evokernels.compiler.lower import lower
from evokernels.compiler.ops import OPS
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import STORED, render_function
from evokernels.genome import CATALOGUES

CSRC = pathlib.Path(__file__).parents[1] / "csrc"
GOLDEN = pathlib.Path(__file__).with_name("golden_adam_float32.c")

g, m, v, eps, beta1, bias1, bias2 = (
    terms.g, terms.m, terms.v, terms.eps, terms.beta1, terms.bias1, terms.bias2
)  # fmt: skip


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (g + g, "2 * g"),
        (g - g, "0"),
        (0.0 * m + g, "g"),
        (m + 0.9 * (g - m), "0.9 * g + 0.1 * m"),
        (sqrt(g * g), "|g|"),
        (sqrt(4.0 * (g * g)), "2 * |g|"),
        (sqrt(v / bias2), "sqrt(1 / bias2) * v".replace("* v", "* sqrt(v)")),
        ((m / bias1) / (sqrt(v) + eps), "1 / bias1 * m / (sqrt(v) + eps)"),
        ((g + m) / (sqrt(v) + eps), "g / (sqrt(v) + eps) + m / (sqrt(v) + eps)"),
        (2.0 * (g / (abs(g) + eps)) - g / (abs(g) + eps), "g / (|g| + eps)"),
        (g / (beta1 + 1.0), "1 / (1 + beta1) * g"),
        (g / (4.0 * bias1), "0.25 / bias1 * g"),
        (sign(g * 1.0) * eps, "eps * sign(g)"),
        (clamp(g, -eps, eps), "min(eps, max(-1 * eps, g))"),
        (g * m, "g * m"),
    ],
)
def test_linear_form(expr, text):
    assert str(linear_expr(linear(expr))) == text


progress = terms.progress
OF_A_STEP = [
    *(sqrt(progress + beta1), sqrt(progress - 0.5), sqrt(-1.0 * progress), sqrt(Constant(-1.0))),
    *(exp(progress + 1), log1p(progress), tanh(progress - beta1), sign(progress - 0.5)),
    *(abs(progress - 0.5), where(progress > beta1, eps, 2.0), clamp(progress, -eps, eps)),
]


@pytest.mark.parametrize("scalar", OF_A_STEP, ids=str)
@pytest.mark.parametrize("hidden", [0.0, g - g])
def test_a_function_of_step_scalars_is_one_number_a_step(scalar, hidden):
    """Also where a tensor only seems to be in it; elements are left with what is of elements."""
    (atom,) = scalar.args[:1]
    scalar = substitute(scalar, {atom: atom + hidden})
    assert list(linear(scalar * g)) == [g]
    assert list(linear(g / (scalar * 2.0))) == [g]


@pytest.mark.parametrize("seed", range(30))
def test_linear_form_keeps_the_value(seed):
    """Random expressions, before and after."""
    rng = np.random.default_rng(seed)
    leaves = [g, m, v * v + 0.1, eps, bias1, 0.5]

    def random_expr(depth):
        if depth == 0:
            return leaves[rng.integers(len(leaves))] * 1.0 + g * 0.0
        kind = rng.integers(5)
        a, b = random_expr(depth - 1), random_expr(depth - 1)
        return [a + b, a - b, a * b, a / (abs(b) + 1.0), sqrt(abs(a)) + sign(b)][kind]

    expr = random_expr(3)
    values = {"g": rng.standard_normal(20), "m": rng.standard_normal(20), "v": rng.random(20)}
    values |= {"eps": 0.3, "bias1": 0.7}
    np.testing.assert_allclose(
        compiled(linear_expr(linear(expr)), meanings=ON_ARRAYS)(**values)[0] + np.zeros(20),
        compiled(expr, meanings=ON_ARRAYS)(**values)[0] + np.zeros(20),
        rtol=1e-9,
        atol=1e-12,
    )


BASE = Genome(term_types=["SIGN_GRAD", "ADAM_TERM"], alphas=[0.5, 2.0])
SAME = [
    ({"term_types": ["ADAM_TERM", "SIGN_GRAD"], "alphas": [2.0, 0.5]}, {}),
    ({"term_types": ["SIGN_GRAD", "ADAM_TERM", "SIGN_GRAD"], "alphas": [0.2, 2.0, 0.3]}, {}),
    ({"term_types": ["SIGN_GRAD", "ADAM_TERM", "GRAD"], "alphas": [0.5, 2.0, 0.0]}, {}),
    ({"clip_value": 7.0}, {}),
    ({"warmup_steps": 7}, {}),
    ({"use_warmup": True, "warmup_steps": 1}, {}),
    # lr and alphas share a factor, and decay with them
    ({"lr_log10": -2.0, "alphas": [0.05, 0.2], "wd_log10": -5.0}, {}),
    # nothing reads the moments
    (
        {"term_types": ["GRAD"], "alphas": [1.0], "beta1": 0.5, "eps_log10": -5},
        {"term_types": ["MOMENTUM"], "alphas": [1.0], "use_m": False, "use_v": False},
    ),
    # without v both are g / (|g| + eps)
    (
        {"term_types": ["RMS_NORM"], "alphas": [1.0], "use_v": False},
        {"term_types": ["SQRT_GRAD"], "alphas": [1.0], "beta2": 0.3},
    ),
]
DIFFERENT = [
    {"alphas": [0.5, 2.0000001]},
    {"lr_log10": -3.0001},
    {"beta1": 0.91},
    {"beta2": 0.99},
    {"eps_log10": -7},
    {"wd_log10": -3},
    {"use_m": False},
    {"use_v": False},
    {"use_bias_correction": False},
    {"use_gradient_clipping": True},
    {"use_warmup": True},
    {"use_cosine_decay": True},
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_optimizer_has_one_key(one, other):
    a, b = dataclasses.replace(BASE, **one), dataclasses.replace(BASE, **other)
    assert canonical_key(a) == canonical_key(b)
    assert lower(a).program == lower(b).program


def test_other_optimizers_have_other_keys():
    genomes = [BASE, *(dataclasses.replace(BASE, **change) for change in DIFFERENT)]
    assert len({canonical_key(genome) for genome in genomes}) == len(genomes)


def test_keys_are_for_keeps():
    """Journals hold them: another process, and the next release, must find the same."""
    assert canonical_key(zoo.evolved_2025) == "87b4bd79077e06c2617e631c0f068222"


@pytest.mark.parametrize(
    ("genome", "state"),
    [
        (zoo.evolved_2025, ("m", "v")),
        (zoo.sgd_momentum, ("m",)),
        (zoo.rmsprop, ("v",)),
        (Genome(), ()),
        (Genome(term_types=["SIGN_GRAD"]), ()),
        (Genome(term_types=["MOMENTUM", "ADAM_TERM"], alphas=[1.0, 0.0]), ("m",)),
        (Genome(term_types=["ADAM_TERM", "ADAM_TERM"], alphas=[1.0, -1.0]), ()),
        (Genome(term_types=["ADAM_TERM"], use_v=False), ("m",)),
    ],
)
def test_moments_that_nothing_reads_are_dropped(genome, state):
    assert lower(genome).program.state == state


def test_the_verifier_finds_what_is_wrong():
    good = lower(zoo.adam).program
    assert good.verify() is good
    for broken in (
        dataclasses.replace(good, lines=good.lines[1:]),
        dataclasses.replace(good, lines=good.lines + good.lines[:1]),
        dataclasses.replace(good, lines=(Line("t0", "sqrt", ("g", "g")),)),
        dataclasses.replace(good, results=good.results[:1]),
        Program((), (), (), (("p", "nothing"),)),
    ):
        with pytest.raises(AssertionError):
            broken.verify()


def test_eight_covers_serve_the_catalogue():
    assert len(COVERS) == 8
    kinds = CATALOGUES["classic"]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(kinds, n) for n in range(1, len(kinds) + 1)
    )
    for subset in subsets:
        for use_m, use_v, clip in itertools.product((True, False), repeat=3):
            genome = Genome(
                term_types=subset, alphas=[1.5] * len(subset), use_m=use_m, use_v=use_v,
                use_gradient_clipping=clip,
            )  # fmt: skip
            assert find_cover(lower(genome).program) is not None, genome


def test_formula_in_words():
    assert formula(zoo.adamw).splitlines() == [
        "lr = 0.001",
        "m ← 0.1 * g + 0.9 * m",
        "m^ = m / (1 - 0.9^t)",
        "v ← 0.999 * v + 0.001 * g * g",
        "v^ = v / (1 - 0.999^t)",
        "p ← p - lr * (0.01 * p + m^ / (sqrt(v^) + 1e-08))",
    ]
    assert "g ← min(1, max(-1, g))" in formula(Genome(use_gradient_clipping=True))


def test_the_emitted_kernel_is_the_golden_one():
    """A refactoring leaves the text alone; a real change updates it in the same commit."""
    assert render_function(lower(zoo.adam).program, "float32", "float32", "adam") == (
        GOLDEN.read_text()
    )


SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e-30, 1e30, math.inf, -math.inf, math.nan]


def test_c_spelling_means_what_the_table_says(tmp_path):
    """Each operation, compiled by itself, on every combination of special values."""
    functions = "".join(
        f"double op_{name}({', '.join(f'double {x}' for x in 'abcd'[: op.arity])})"
        f" {{ return {op.c.format(*'abcd', f='')}; }}\n"
        for name, op in OPS.items()
    )
    source, built = tmp_path / "ops.c", tmp_path / "ops.so"
    # which C has from C23 on, and CUDA
    cospi = "static double cospi(double x) { return cos(3.141592653589793 * x); }\n"
    source.write_text(f'#include "functions.h"\n{cospi}{functions}')
    flags = [
        "-O2",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
    ]
    subprocess.run(["cc", *flags, f"-I{CSRC}", source, "-o", built, "-lm"], check=True)
    native = ctypes.CDLL(str(built))
    for name, op in OPS.items():
        function = native[f"op_{name}"]
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double] * op.arity
        for args in itertools.product(SPECIAL, repeat=op.arity):
            with np.errstate(all="ignore"):
                meant = float(op.meaning(*map(np.float64, args)))
            # one unit in the last place: fma is rounded once, its meaning twice
            np.testing.assert_allclose(
                function(*args), meant, rtol=2.3e-16, err_msg=f"{name}{args}"
            )


def test_expression_building():
    assert str(substitute(m / (sqrt(v) + eps), {m: g})) == "g / (sqrt(v) + eps)"
    assert str((g - (m - v)) / (g * m)) == "(g - (m - v)) / (g * m)"
    with pytest.raises(TypeError, match="takes 1"):
        Call("sqrt", (g, m))


@pytest.mark.parametrize(("dtype", "state"), STORED)
def test_generated_code_holds_no_number_of_a_genome(dtype, state):
    """Structure and numbers are apart: the only literals are 0, 1 and -1."""
    for seed in range(20):
        text = render_function(lower(random_genome(seed)).program, dtype, state, "f")
        body = re.sub(r"/\*.*?\*/", "", text)
        literals = set(re.findall(r"(?<![\w\[])\d+\.?\d*(?:e-?\d+)?", body))
        assert literals <= {"0", "1"}, literals
