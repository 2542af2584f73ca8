"""Float32 functions as fixed sequences of IEEE additions, products, divisions and square roots.

Every kernel makes the same steps in the same order, without fused multiply-add: each machine gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pennyweight.program.ir import Array

F32 = np.float32
LOG2E = F32(1.44269504088896341)
LN2_HI = F32(0.693359375)
LN2_LO = F32(-2.12194440e-4)
EXP_LOW, EXP_HIGH = F32(-87.0), F32(88.0)
EXP_COEFFICIENTS = tuple(
    F32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
ERF_P = F32(0.3275911)
ERF_COEFFICIENTS = tuple(F32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
HALF, ONE, TWO = F32(0.5), F32(1), F32(2)


def exp(x: Array) -> Array:
    """e^x: `n = rint(x log2 e)`, `r = (x - n h) - n l`, `(p(r) r^2 + r + 1) 2^n`; 0 below -87, clipped above 88.

    Relative error below 2e-7. Source: Cephes expf (Moshier 1989).
    """
    t: Array = np.fmin(np.fmax(x, EXP_LOW), EXP_HIGH)
    n = np.rint(t * LOG2E)
    r: Array = t - n * LN2_HI
    r = r - n * LN2_LO
    p: Array = np.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    y: Array = p * (r * r) + r
    y = y + ONE
    power: Array = ((n.astype(np.int32) + 127) << 23).view(F32)
    return np.where(x < EXP_LOW, F32(0), y * power)


def sigmoid(x: Array) -> Array:
    """`1 / (1 + e^-x)`."""
    return ONE / (ONE + exp(-x))


def tanh(x: Array) -> Array:
    """`sign(x) (1 - e) / (1 + e)`, `e = e^(-2 |x|)`."""
    e = exp(np.abs(x) * F32(-2))
    return np.copysign((ONE - e) / (ONE + e), x)


def erf(x: Array) -> Array:
    """`sign(x) (1 - p(t) t e^(-x^2))`, `t = 1 / (1 + 0.3275911 |x|)`; error below 6e-7.

    Source: Abramowitz and Stegun 1964, 7.1.26.
    """
    a = np.abs(x)
    t = ONE / (ONE + ERF_P * a)
    p = np.full_like(t, ERF_COEFFICIENTS[0])
    for c in ERF_COEFFICIENTS[1:]:
        p = p * t + c
    y: Array = ONE - (p * t) * exp(-(a * a))
    return np.copysign(y, x)


def gelu(x: Array, p: float = 0, q: float = 0) -> Array:
    """`(x / 2) (1 + erf(x / sqrt 2))`."""
    return (HALF * x) * (ONE + erf(x * F32(0.70710678118654752)))


def gelu_tanh(x: Array, p: float = 0, q: float = 0) -> Array:
    """`(x / 2) (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    inner = F32(0.79788456080286536) * (x + F32(0.044715) * ((x * x) * x))
    return (HALF * x) * (ONE + tanh(inner))


def clip(x: Array, p: float, q: float) -> Array:
    """`min(max(x, p), q)`; NaN gives p."""
    return np.fmin(np.fmax(x, F32(p)), F32(q))


def _softplus(x: Array) -> Array:
    return np.fmax(x, F32(0)) + np.log1p(np.exp(-np.abs(x)))


# name -> (function of x and up to two parameters, whether every engine gives the same bits)
UNARY: dict[str, tuple[Callable[[Array, float, float], Array], bool]] = {
    "identity": (lambda x, p, q: x, True),
    "neg": (lambda x, p, q: -x, True),
    "abs": (lambda x, p, q: np.abs(x), True),
    "clip": (clip, True),
    "mul": (lambda x, p, q: x * F32(p), True),
    "add": (lambda x, p, q: x + F32(p), True),
    "rsub": (lambda x, p, q: F32(p) - x, True),
    "div": (lambda x, p, q: x / F32(p), True),
    "rdiv": (lambda x, p, q: F32(p) / x, True),
    "square": (lambda x, p, q: x * x, True),
    "sqrt": (lambda x, p, q: np.sqrt(x), True),
    "rsqrt": (lambda x, p, q: ONE / np.sqrt(x), True),
    "exp": (lambda x, p, q: exp(x), True),
    "sigmoid": (lambda x, p, q: sigmoid(x), True),
    "tanh": (lambda x, p, q: tanh(x), True),
    "erf": (lambda x, p, q: erf(x), True),
    "gelu": (gelu, True),
    "gelu_tanh": (gelu_tanh, True),
    "silu": (lambda x, p, q: x * sigmoid(x), True),
    "hardswish": (lambda x, p, q: (x * clip(x + F32(3), 0, 6)) * F32(1 / 6), True),
    "hardsigmoid": (lambda x, p, q: clip(x + F32(3), 0, 6) * F32(1 / 6), True),
    "leaky_relu": (lambda x, p, q: np.where(x > 0, x, x * F32(p)), True),
    "elu": (lambda x, p, q: np.where(x > 0, x, F32(p) * (exp(x) - ONE)), True),
    "selu": (
        lambda x, p, q: (
            F32(1.0507009873554805) * np.where(x > 0, x, F32(1.6732632423543772) * (exp(x) - ONE))
        ),
        True,
    ),
    "softsign": (lambda x, p, q: x / (ONE + np.abs(x)), True),
    "sign": (lambda x, p, q: np.sign(x), True),
    "rint": (lambda x, p, q: np.rint(x), True),
    "floor": (lambda x, p, q: np.floor(x), True),
    "ceil": (lambda x, p, q: np.ceil(x), True),
    "softplus": (lambda x, p, q: _softplus(x), False),
    "mish": (lambda x, p, q: x * np.tanh(_softplus(x)), False),
    "log": (lambda x, p, q: np.log(x), False),
    "sin": (lambda x, p, q: np.sin(x), False),
    "cos": (lambda x, p, q: np.cos(x), False),
    "pow": (lambda x, p, q: np.power(x, F32(p)), False),
}
