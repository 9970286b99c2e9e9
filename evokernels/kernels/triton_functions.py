"""The arithmetic of the Triton kernels, as `compiler/ops.py` spells it.

Read behind `triton_language.py`, as that says. The functions are the same on every GPU and in
Triton's interpreter, so they are made of operations that all of these round to nearest.
"""

import math

import triton
import triton.language as tl

# Taylor's coefficients of sin(pi x) / x and cos(pi x) in powers of x^2, enough for |x| <= 1/4.
TERMS = tl.constexpr(10)
SINE, COSINE = (
    tl.constexpr(
        tuple((-1) ** n * math.pi**k / math.factorial(k) for n in range(10) for k in [2 * n + odd])
    )
    for odd in (1, 0)
)


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
def polynomial(coefficients: tl.constexpr, x):
    """The lowest power first."""
    total = constant(coefficients[TERMS - 1])
    for i in tl.static_range(2, TERMS + 1):
        total = tl.fma(total, x, constant(coefficients[TERMS - i]))
    return total


@triton.jit
def cospi(x):
    """Taylor's series on an eighth of a turn; exact at multiples of 1/2.

    The library's cosine reduces large arguments with a table in local memory.
    """
    turn = x - 2.0 * tl.floor(0.5 * x)  # from 0 to 2, exact
    y = tl.abs(turn - 1.0) - 0.5  # cos(pi x) = sin(pi y), -1/2 <= y <= 1/2, exact
    sine = y * polynomial(SINE, y * y)
    z = 0.5 - tl.abs(y)
    cosine = polynomial(COSINE, z * z)
    return tl.where(tl.abs(y) <= 0.25, sine, tl.where(y < 0.0, -cosine, cosine))
