"""What every scalar operation means, as NumPy functions.

This table is the definition that executors are compared with. It follows XLA, checked against ``jax.jit`` on the CPU:

* Integer arithmetic wraps. ``x / 0`` is all ones (-1), ``x % 0`` is x, ``INT_MIN / -1`` is INT_MIN with remainder 0;
  quotients are truncated and remainders have the dividend's sign.
* A shift by the width or more (or by a negative number) gives 0, or copies of the sign for ``shr_arith``.
* ``convert`` from float to integer truncates, saturates, and maps NaN to 0; to ``b1`` it is ``x != 0`` (NaN: true);
  between integers it wraps; to ``f16`` and ``bf16`` it goes through ``f32`` (f64 and integers are rounded twice).
* ``max`` and ``min`` return NaN if either side is NaN and order -0 below +0. ``sign`` keeps -0 and NaN.
* ``round_even`` and ``round_away`` (halves away from zero) keep the sign of zero; float ``rem`` is C's fmod.
* Comparisons with NaN are false, except ``ne``.
* ``reduce_precision`` rounds the mantissa to nearest even, then overflows to infinity and flushes to (signed) zero
  what the smaller exponent cannot hold; NaN stays NaN.

Transcendental functions of f32 are computed in f64 and rounded once; executors may differ in the last places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special  # type: ignore[import-untyped]

from jax_mpk.graph import dtypes, reference_special
from jax_mpk.graph.scalar import Node

Array = np.ndarray[Any, Any]


def apply(node: Node, args: list[Array]) -> Array:
    """Result of one operation on arrays of its arguments' types (which broadcast)."""
    with np.errstate(all="ignore"):
        special = _SPECIAL.get(node.op)
        if special is not None:
            return special(node, args)
        if node.op in _WIDE:
            wide = [np.asarray(a, np.float64) for a in args]
            return np.asarray(_WIDE[node.op](*wide), dtypes.to_numpy(node.dtype))
        return np.asarray(_DIRECT[node.op](*args))


def _div(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    zero = b == 0
    if a.dtype.kind == "u":
        return np.where(zero, np.iinfo(a.dtype).max, a // np.where(zero, 1, b)).astype(a.dtype)
    minus = b == -1
    safe = np.where(zero | minus, 1, b).astype(b.dtype)
    quotient = a // safe
    # NumPy rounds down; add one back where the signs differ and the division was not exact.
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, -1, np.where(minus, -a, quotient)).astype(a.dtype)


def _rem(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.fmod(a, b)
    zero = b == 0
    trivial = zero if a.dtype.kind == "u" else zero | (b == -1)
    out = np.fmod(a, np.where(trivial, 1, b).astype(b.dtype))
    return np.where(zero, a, out).astype(a.dtype)


def _pow(a: Array, b: Array) -> Array:
    return np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)


def maximum(a: Array, b: Array) -> Array:
    """The larger one; NaN wins, +0 is above -0."""
    out = np.maximum(a, b)
    if a.dtype.kind == "f":
        return np.where(a == b, np.where(np.signbit(a), b, a), out)
    return out


def minimum(a: Array, b: Array) -> Array:
    """The smaller one; NaN wins, -0 is below +0."""
    out = np.minimum(a, b)
    if a.dtype.kind == "f":
        return np.where(a == b, np.where(np.signbit(a), a, b), out)
    return out


def _sign(a: Array) -> Array:
    return np.copysign(np.sign(a), a) if a.dtype.kind == "f" else np.sign(a)


def _round_away(a: Array) -> Array:
    whole = np.trunc(a)
    out = whole + np.where(np.abs(a - whole) >= 0.5, np.copysign(1.0, a), 0.0)
    return np.copysign(out, a).astype(a.dtype)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _signed(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"i{dtype.itemsize}")


def _shift(name: str) -> Callable[[Array, Array], Array]:
    def shift(a: Array, b: Array) -> Array:
        width = a.dtype.itemsize * 8
        amount = b.astype(_unsigned(b.dtype))
        too_far = amount >= width
        if name == "shr_arith":
            last = _unsigned(a.dtype).type(width - 1)
            out = a.astype(_signed(a.dtype)) >> np.where(too_far, last, amount).astype(_signed(a.dtype))
            return out.astype(a.dtype)
        bits = a.astype(_unsigned(a.dtype))
        safe = np.where(too_far, 0, amount).astype(bits.dtype)
        out = bits << safe if name == "shl" else bits >> safe
        return np.where(too_far, 0, out).astype(a.dtype)

    return shift


def _clz(a: Array) -> Array:
    width = a.dtype.itemsize * 8
    bits = a.astype(_unsigned(a.dtype)).astype(np.uint64)
    count = np.full(bits.shape, width, np.int64)
    for k in range(width):
        count = np.where((bits >> np.uint64(k)) != 0, width - 1 - k, count)
    return count.astype(a.dtype)


def _popcount(a: Array) -> Array:
    return np.bitwise_count(a.astype(_unsigned(a.dtype))).astype(a.dtype)


def _convert(node: Node, args: list[Array]) -> Array:
    (a,) = args
    dtype = dtypes.to_numpy(node.dtype)
    if node.dtype == "b1":
        return a != 0
    if not dtypes.is_float(node.dtype):
        if a.dtype.kind in "iub":
            return a.astype(dtype)
        return _float_to_int(a.astype(np.float64), dtype)
    if node.dtype in ("f16", "bf16"):
        return a.astype(np.float32).astype(dtype)
    return a.astype(dtype)


def _float_to_int(a: Array, dtype: np.dtype) -> Array:
    info = np.iinfo(dtype)
    low, high = float(info.min), float(info.max)  # high may round up, which `>=` below allows for
    inside = (a > low) & (a < high)
    out = np.where(inside, np.trunc(a), 0.0)
    # uint64 values above 2**63 need a cast that NumPy defines.
    whole = out.astype(dtype)
    return np.where(a >= high, info.max, np.where(a <= low, info.min, whole)).astype(dtype)


def _bitcast(node: Node, args: list[Array]) -> Array:
    return np.ascontiguousarray(args[0]).reshape(args[0].shape).view(dtypes.to_numpy(node.dtype))


def _reduce_precision(node: Node, args: list[Array]) -> Array:
    (a,) = args
    assert isinstance(node.attr, tuple)
    exponent_bits, mantissa_bits = node.attr
    f64 = a.dtype == np.float64
    word: Any = np.uint64 if f64 else np.uint32
    own_mantissa, own_exponent = (52, 11) if f64 else (23, 8)
    sign_mask = word(1 << (63 if f64 else 31))
    bits = np.ascontiguousarray(a).reshape(a.shape).view(word)
    nan = np.isnan(a)
    if mantissa_bits < own_mantissa:
        drop = own_mantissa - mantissa_bits
        last = (bits >> word(drop)) & word(1)
        bits = bits + ((word(1) << word(drop - 1)) - word(1)) + last
        bits = bits & ~word((1 << drop) - 1)
    if exponent_bits < own_exponent:
        bias = (1 << (own_exponent - 1)) - 1
        reduced_bias = (1 << (exponent_bits - 1)) - 1
        exponent = bits & word(((1 << own_exponent) - 1) << own_mantissa)
        sign = bits & sign_mask
        infinity = word(((1 << own_exponent) - 1) << own_mantissa)
        bits = np.where(exponent > word((bias + reduced_bias) << own_mantissa), sign | infinity, bits)
        bits = np.where(exponent <= word((bias - reduced_bias) << own_mantissa), sign, bits)
    out = np.asarray(bits, word).view(a.dtype)
    return np.where(nan, a, out).astype(a.dtype)


def _select(node: Node, args: list[Array]) -> Array:
    return np.where(*args)


def _from_jax(node: Node, args: list[Array]) -> Array:
    """Functions that neither NumPy nor SciPy has: JAX's own, in f64."""
    import jax

    with jax.enable_x64(True):
        cpu = jax.devices("cpu")[0]
        wide = [jax.device_put(np.asarray(a, np.float64), cpu) for a in np.broadcast_arrays(*args)]
        out = getattr(jax.lax, node.op)(*wide)
        return np.asarray(out, dtypes.to_numpy(node.dtype))


_SPECIAL: dict[str, Callable[[Node, list[Array]], Array]] = {
    "bitcast": _bitcast,
    "convert": _convert,
    "igamma_grad_a": _from_jax,
    "random_gamma_grad": _from_jax,
    "reduce_precision": _reduce_precision,
    "select": _select,
}

#: Computed in the arguments' own type.
_DIRECT: dict[str, Callable[..., Any]] = {
    **reference_special.FUNCTIONS,
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "ceil": np.ceil,
    "clz": _clz,
    "div": _div,
    "eq": np.equal,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lt": np.less,
    "max": maximum,
    "min": minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "nextafter": np.nextafter,
    "not": np.invert,
    "or": np.bitwise_or,
    "popcount": _popcount,
    "pow": _pow,
    "rem": _rem,
    "round_away": _round_away,
    "round_even": np.rint,
    "shl": _shift("shl"),
    "shr_arith": _shift("shr_arith"),
    "shr_logical": _shift("shr_logical"),
    "sign": _sign,
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}

#: Float functions, computed in f64.
_WIDE: dict[str, Callable[..., Any]] = {
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": scipy.special.erf,
    "erfc": scipy.special.erfc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": scipy.special.expit,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "sin": np.sin,
    "sinh": np.sinh,
    "tan": np.tan,
    "tanh": np.tanh,
}
