"""The arithmetic of the Triton kernels, as `compiler/ops.py` spells it.

Read behind `triton_language.py`, as that says. The functions are the same on every GPU and in
Triton's interpreter, so they are made of operations that all of these round to nearest.
"""

import math

import triton
import triton.language as tl

# Taylor's coefficients of sin(pi x) / x and cos(pi x) in powers of x^2, enough for |x| <= 1/4.
SINE, COSINE = (
    tl.constexpr(
        tuple((-1) ** n * math.pi**k / math.factorial(k) for n in range(10) for k in [2 * n + odd])
    )
    for odd in (1, 0)
)

# For float32, the lowest power first. Moshier 1992, "Methods and Programs for Mathematical
# Functions" (Cephes): (e^x - 1 - x) / x^2 for |x| <= log(2) / 2, and (tanh(x) - x) / x^3 in powers
# of x^2 for |x| < 0.625.
EXPONENTIAL = tl.constexpr(
    (0.50000001201, 0.16666665459, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.98756915e-4)
)
TANH = tl.constexpr(
    (-0.333332819422, 0.133314422036, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3)
)
# The same of tanh for float64, over a denominator.
TANH_ABOVE = tl.constexpr((-1614.6876844170845, -99.28772310019185, -0.9643991794250522))
TANH_BELOW = tl.constexpr((4844.063053251255, 2235.4883906010045, 112.81167849163293, 1.0))
# (log(1 + f) - 2 s) / s for s = f / (2 + f), in powers of s^2, for float32: FreeBSD's e_logf.c.
LOGARITHM = tl.constexpr((0.0, 0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841))

LOG2_E = tl.constexpr(math.log2(math.e))
# log(2) as a sum, whose first part has so few digits that a multiple below 2^9 is exact.
LN2 = tl.constexpr(0.693359375)
LN2_REST = tl.constexpr(math.log(2) - 0.693359375)
ROOT_HALF_BITS = tl.constexpr(0x3F3504F3)  # those of sqrt(1/2) as float32
INFINITY, NAN = tl.constexpr(math.inf), tl.constexpr(math.nan)


@triton.jit
def constant(value: tl.constexpr):
    """A constant of all its digits: a bare one may become float32."""
    return tl.full((), value, tl.float64)


@triton.jit
def divide(a, b):
    """Rounded to nearest."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """Rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def expm1(x):
    """Kahan's: the errors of u - 1 and log(u), both of the rounded u, cancel."""
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.log(u)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, near))


@triton.jit
def polynomial(coefficients: tl.constexpr, terms: tl.constexpr, x):
    """Of so many terms, the lowest power first, in the arithmetic of `x`."""
    total = constant(coefficients[terms - 1]).to(x.dtype)
    for i in tl.static_range(2, terms + 1):
        total = tl.fma(total, x, constant(coefficients[terms - i]).to(x.dtype))
    return total


@triton.jit
def cospi(x):
    """Taylor's series on an eighth of a turn; exact at multiples of 1/2.

    The library's cosine reduces large arguments with a table in local memory.
    """
    turn = x - 2.0 * tl.floor(0.5 * x)  # from 0 to 2, exact
    y = tl.abs(turn - 1.0) - 0.5  # cos(pi x) = sin(pi y), -1/2 <= y <= 1/2, exact
    sine = y * polynomial(SINE, 10, y * y)
    z = 0.5 - tl.abs(y)
    cosine = polynomial(COSINE, 10, z * z)
    return tl.where(tl.abs(y) <= 0.25, sine, tl.where(y < 0.0, -cosine, cosine))


@triton.jit
def power_of_two(n):
    """float32, of a whole float32 between -126 and 127."""
    return (n.to(tl.int32) + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x, wrong by less than one unit in the last place.

    Of float32 `tl.exp` is the power of two of a rounded product, wrong by as many as |x|. Float64
    would do, but small GPUs do few of its operations at a time.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # beyond it is 0 or infinite; NaN stays
        near = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
        n = tl.floor(near * LOG2_E + 0.5)
        rest = (near - n * LN2) - n * LN2_REST
        value = tl.fma(rest * rest, polynomial(EXPONENTIAL, 6, rest), rest) + 1.0
        half = tl.floor(0.5 * n)  # 2^n itself may be out of range; the last product alone rounds
        return value * power_of_two(half) * power_of_two(n - half)


@triton.jit
def logarithm(x):
    """The natural one, of a normal number above 0; as exact near 1, where it is near 0."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        # x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
        bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - ROOT_HALF_BITS)
        n = ((bits >> 23) - 127).to(tl.float32)
        f = ((bits & 0x7FFFFF) + ROOT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
        s = divide(f, f + 2.0)
        half_square = 0.5 * f * f
        small = s * (half_square + polynomial(LOGARITHM, 5, s * s)) + n * LN2_REST
        return small - half_square + f + n * LN2


@triton.jit
def log1p(x):
    """The logarithm of the rounded 1 + x, and what the rounding has lost; wrong by less than two
    units in the last place."""
    u = 1.0 + x
    lost = tl.where(x < 1.0, x - (u - 1.0), 1.0 - (u - x))
    near = logarithm(u) + divide(lost, u)
    beyond = tl.where(x == INFINITY, INFINITY, tl.where(x == -1.0, -INFINITY, NAN))
    return tl.where((x > -1.0) & (x < INFINITY), near, beyond)


@triton.jit
def tanh(x):
    """A polynomial near 0, or else by way of e^2x; wrong by less than two units in the last
    place."""
    square = x * x
    if x.dtype == tl.float64:
        series = divide(polynomial(TANH_ABOVE, 3, square), polynomial(TANH_BELOW, 4, square))
    else:
        series = polynomial(TANH, 5, square)
    size = tl.abs(x)
    large = 1.0 - divide(2.0, exponential(2.0 * size) + 1.0)
    signed = tl.where(x < 0.0, -large, large)
    return tl.where(size < 0.625, tl.fma(x * square, series, x), signed)
