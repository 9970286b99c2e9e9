"""csrc/functions.h against NumPy with more digits: every range, odd values, instruction sets."""

import ctypes
import pathlib
import platform
import subprocess

import numpy as np
import pytest

from evokernels.compiler.render_c import C_FLAGS
from evokernels.kernels import native

CSRC = pathlib.Path(__file__).parents[1] / "csrc"
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4") if platform.machine() == "x86_64" else (None,)
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
INTEGERS = {np.float32: np.uint32, np.float64: np.uint64}
SUFFIXES = {np.float32: "f", np.float64: ""}
C_TYPES = {np.float32: "float", np.float64: "double"}

# The functions, and the largest error in units of the last place.
FUNCTIONS = {"exp": (np.exp, 0.8), "log1p": (np.log1p, 0.95), "tanh": (np.tanh, 0.95)}

# Between which numbers something happens, in each dtype.
INTERVALS = ((-1, 1), (-0.3, 0.4), (0.5, 0.75), (-2, 30), (-110, 95), (-750, 712))

LIMITS = {
    "exp": {-0.0: 1.0, np.inf: np.inf, -np.inf: 0.0, 1e4: np.inf, -1e4: 0.0},
    "log1p": {np.inf: np.inf, -1.0: -np.inf, -1.5: np.nan, -np.inf: np.nan},
    "tanh": {np.inf: 1.0, -np.inf: -1.0, 50.0: 1.0, -50.0: -1.0},
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A loop over each function for each instruction set; nothing of the C library is linked."""
    folder = tmp_path_factory.mktemp("functions")
    loops = "".join(
        f"void {name}{SUFFIXES[dtype]}_(const {real} *restrict x, {real} *restrict y, long n) {{\n"
        f"#pragma omp simd\n"
        f"for (long i = 0; i < n; ++i) y[i] = evk_{name}{SUFFIXES[dtype]}(x[i]); }}\n"
        for name in FUNCTIONS
        for dtype, real in C_TYPES.items()
    )
    (folder / "loops.c").write_text(f'#include "functions.h"\n{loops}')
    flags = [*C_FLAGS, "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-nostdlib", f"-I{CSRC}"]
    built = []
    for level in LEVELS:
        if level is None or level <= native.instruction_set():
            library = folder / f"{level}.so"
            machine = [f"-march={level}"] if level else []
            command = ["cc", *flags, *machine, "-Wl,-z,defs", "loops.c", "-o", library]
            subprocess.run(command, check=True, cwd=folder)
            built.append(ctypes.CDLL(str(library)))
    return built


def called(library, name, x):
    """The function of an array."""
    y = np.empty_like(x)
    function = library[f"{name}{SUFFIXES[x.dtype.type]}_"]
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_long(x.size))
    return y


def arguments(dtype):
    """Bits of all kinds, and many numbers where something happens."""
    rng = np.random.default_rng(0)
    integer = INTEGERS[dtype]
    everywhere = rng.integers(0, np.iinfo(integer).max, 300_000, integer).view(dtype)
    dense = [rng.uniform(low, high, 100_000) for low, high in INTERVALS]
    tiny = np.finfo(dtype).smallest_subnormal
    odd = [np.nan, 0.0, -0.0, tiny, -tiny, 3 * tiny, np.finfo(dtype).max, -np.finfo(dtype).max]
    near = [dtype(x) + np.arange(-50, 51) * np.spacing(dtype(x)) for x in (-1, 0.625, 88.72, 709.8)]
    return np.concatenate([np.asarray(part, dtype) for part in (everywhere, *dense, odd, *near)])


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_below_one_unit_in_the_last_place(libraries, name, dtype):
    function, most = FUNCTIONS[name]
    x = arguments(dtype)
    y = called(libraries[-1], name, x)
    with np.errstate(all="ignore"):
        exact = function(x.astype(WIDER[dtype]))
        near = exact.astype(dtype)
    finite = np.isfinite(near) & np.isfinite(y)
    errors = np.abs(y[finite].astype(WIDER[dtype]) - exact[finite]) / np.spacing(
        np.abs(near[finite])
    )
    assert errors.max() < most, x[finite][errors.argmax()]
    np.testing.assert_array_equal(y[~finite], near[~finite])  # NaN and infinity where they belong
    zero = near == 0
    assert np.array_equal(np.signbit(y[zero]), np.signbit(near[zero]))


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_limits_are_exact(libraries, name, dtype):
    x, expected = (
        np.array(list(values), dtype) for values in zip(*LIMITS[name].items(), strict=True)
    )
    for library in libraries:
        np.testing.assert_array_equal(called(library, name, x), expected)


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_instruction_set_computes_the_same_bits(libraries, name, dtype):
    x = arguments(dtype)[:-3]  # no multiple of a vector
    results = [called(library, name, x) for library in libraries]
    for other in results[1:]:
        same = other.view(INTEGERS[dtype]) == results[0].view(INTEGERS[dtype])
        assert (same | (np.isnan(other) & np.isnan(results[0]))).all()
