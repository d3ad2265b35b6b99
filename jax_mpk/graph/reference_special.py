"""Special functions in NumPy, with XLA's values where the textbook leaves a choice.

Arguments are arrays of one float type, f32 or f64, which the result has too. All but ``erf_inv`` are computed in f64
and rounded once. ``erf_inv`` is XLA's polynomial, step by step: in f32 it is up to 65 units in the last place away from
the true value, and normal samples are made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special  # type: ignore[import-untyped]

Array = np.ndarray[Any, Any]

# Approximation of erf_inv(x) / x in w = −log(1 − x²): for w < 5 in w − 2.5, beyond in √w − 3 (M. Giles).
_ERF_INV_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_ERF_INV_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)

# The same in f64: for w < 6.25 in w − 3.125, for w < 16 in √w − 3.25, beyond in √w − 5.
_ERF_INV64_CENTRE = (
    -3.64441206401782e-21,
    -1.6850591381820166e-19,
    1.28584807152564e-18,
    1.1157877678025181e-17,
    -1.333171662854621e-16,
    2.0972767875968562e-17,
    6.637638134358324e-15,
    -4.054566272975207e-14,
    -8.151934197605472e-14,
    2.6335093153082323e-12,
    -1.2975133253453532e-11,
    -5.415412054294628e-11,
    1.0512122733215323e-09,
    -4.112633980346984e-09,
    -2.9070369957882005e-08,
    4.2347877827932404e-07,
    -1.3654692000834679e-06,
    -1.3882523362786469e-05,
    0.00018673420803405714,
    -0.000740702534166267,
    -0.006033670871430149,
    0.24015818242558962,
    1.6536545626831027,
)
_ERF_INV64_MIDDLE = (
    2.2137376921775787e-09,
    9.075656193888539e-08,
    -2.7517406297064545e-07,
    1.8239629214389228e-08,
    1.5027403968909828e-06,
    -4.013867526981546e-06,
    2.9234449089955446e-06,
    1.2475304481671779e-05,
    -4.7318229009055734e-05,
    6.828485145957318e-05,
    2.4031110387097894e-05,
    -0.0003550375203628475,
    0.0009532893797373805,
    -0.0016882755560235047,
    0.002491442096107851,
    -0.003751208507569241,
    0.005370914553590064,
    1.0052589676941592,
    3.0838856104922208,
)
_ERF_INV64_TAIL = (
    -2.7109920616438573e-11,
    -2.555641816996525e-10,
    1.5076572693500548e-09,
    -3.789465440126737e-09,
    7.61570120807834e-09,
    -1.496002662714924e-08,
    2.914795345090108e-08,
    -6.771199775845234e-08,
    2.2900482228026655e-07,
    -9.9298272942317e-07,
    4.526062597223154e-06,
    -1.968177810553167e-05,
    7.599527703001776e-05,
    -0.00021503011930044477,
    -0.00013871931833623122,
    1.0103004648645344,
    4.849906401408584,
)

# (2k)! / B(2k), the Euler-Maclaurin terms of the zeta function, the last one first.
_ZETA_TERMS = (
    -7.1661652561756670113e18,
    1.8152105401943546773e17,
    -4.5979787224074726105e15,
    1.1646782814350067249e14,
    -2.950130727918164224e12,
    7.47242496e10,
    -1.8924375803183791606e9,
    47900160.0,
    -1209600.0,
    30240.0,
    -720.0,
    12.0,
)


def _erf_inv(x: Array) -> Array:
    with np.errstate(all="ignore"):
        inverse = _erf_inv64(x) if x.dtype == np.float64 else _erf_inv32(x)
        return np.where(np.abs(x) == 1, x * x.dtype.type(np.inf), inverse)


def _erf_inv64(x: Array) -> Array:
    w = -np.log1p(x * -x)
    centre = np.polyval(_ERF_INV64_CENTRE, w - 3.125)
    middle = np.polyval(_ERF_INV64_MIDDLE, np.sqrt(w) - 3.25)
    tail = np.polyval(_ERF_INV64_TAIL, np.sqrt(w) - 5.0)
    return x * np.where(w < 6.25, centre, np.where(w < 16.0, middle, tail))


def _erf_inv32(x: Array) -> Array:
    def f32(a: Array) -> Array:
        return a.astype(np.float32)

    w = f32(-np.log1p(f32(x * -x).astype(np.float64)))
    centre = w < 5
    w = f32(np.where(centre, w - np.float32(2.5), np.sqrt(w) - np.float32(3)))
    out = np.zeros_like(x)
    for a, b in zip(_ERF_INV_CENTRE, _ERF_INV_TAIL, strict=True):
        # Fused multiply and add: a product of two f32 is exact in f64.
        term = f32(np.where(centre, a, b)).astype(np.float64)
        out = f32(out.astype(np.float64) * w + term)
    return f32(out * x)


def _lgamma(x: Array) -> Array:
    return np.where(np.isinf(x), np.inf, scipy.special.gammaln(x))


def _digamma(x: Array) -> Array:
    # JAX before 0.11 gives NaN at 0.
    return np.where(x == 0, -np.inf, scipy.special.digamma(x))


def _igamma(a: Array, x: Array) -> Array:
    return np.where((a == 0) & (x < 1), np.nan, scipy.special.gammainc(a, x))


def _zeta(x: Array, q: Array) -> Array:
    """Hurwitz zeta: ten terms of the series, then Euler-Maclaurin."""
    total, a, power = np.power(q, -x), q, q
    for _ in range(9):
        a = a + 1
        power = np.power(a, -x)
        total = total + power
    a = a + 1
    power = np.power(a, -x)
    out = total + power * a / (x - 1)
    inverse_square, horner = 1 / (a * a), np.zeros_like(a)
    for k, term in enumerate(_ZETA_TERMS[:-1]):
        factor = (x + (22 - 2 * k)) * (x + (21 - 2 * k))
        horner = factor * inverse_square * (horner + 1 / term)
    out = out + power * (0.5 + x / a * (1 / _ZETA_TERMS[-1] + horner))
    out = np.where(np.abs(power) < np.abs(total) * np.finfo(np.float64).eps, total, out)
    whole = x == np.floor(x)
    out = np.where((x < 1) | np.isinf(x) | ((q <= 0) & ~whole), np.nan, out)
    pole = (q <= 0) & (q == np.floor(q))
    out = np.where(pole, np.where(whole & (np.fmod(x, 2) == 0), np.inf, np.nan), out)
    return np.where(x == 1, np.inf, out)


def _polygamma(order: Array, x: Array) -> Array:
    sign = np.where(np.fmod(order, 2) == 0, -1.0, 1.0)
    out = sign * np.exp(scipy.special.gammaln(order + 1)) * _zeta(order + 1, x)
    out = np.where(order == 0, _digamma(x), out)
    return np.where((order < 0) | (order != np.floor(order)), np.nan, out)


def _in_f64(fn: Callable[..., Array]) -> Callable[..., Array]:
    def rounded(*args: Array) -> Array:
        wide = [np.asarray(a, np.float64) for a in np.broadcast_arrays(*args)]
        with np.errstate(all="ignore"):
            return np.asarray(fn(*wide)).astype(args[0].dtype)

    return rounded


#: By name of the scalar operation.
FUNCTIONS: dict[str, Callable[..., Array]] = {
    "bessel_i0e": _in_f64(scipy.special.i0e),
    "bessel_i1e": _in_f64(scipy.special.i1e),
    "betainc": _in_f64(scipy.special.betainc),
    "digamma": _in_f64(_digamma),
    "erf_inv": _erf_inv,
    "igamma": _in_f64(_igamma),
    "igammac": _in_f64(scipy.special.gammaincc),
    "lgamma": _in_f64(_lgamma),
    "polygamma": _in_f64(_polygamma),
    "zeta": _in_f64(_zeta),
}
