"""Elementwise primitives against ``jax.jit``, over all element types each accepts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.graph.harness import check, run

pytestmark = pytest.mark.usefixtures("x64")

FLOATS = ("float16", "bfloat16", "float32", "float64")
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
INTS = SIGNED + UNSIGNED
BOOL = ("bool",)

_ORDINARY = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.75, -7.25, 100.0]
_SPECIAL = [np.inf, -np.inf, np.nan]


def values(dtype: str) -> np.ndarray:
    """A few small values of a type, its extremes, and special ones."""
    if dtype == "bool":
        return np.array([False, True])
    if dtype in FLOATS:
        return np.array([*_ORDINARY, *_SPECIAL]).astype(jnp.dtype(dtype))
    info = np.iinfo(dtype)
    small = [0, 1, 2, 3, 5, 7, 100] + ([-1, -2, -3, -100] if info.min < 0 else [])
    return np.array([*small, info.min, info.max, info.max - 1], dtype)


def grid(dtype: str, count: int = 2) -> list[np.ndarray]:
    """All combinations of values, as flat arrays."""
    return [a.reshape(-1) for a in np.meshgrid(*[values(dtype)] * count, indexing="ij")]


def over_types(fn: Callable[..., Any], operands: list[list[np.ndarray]], ulps: float = 0.0) -> None:
    """Checks one function on several operand lists in a single compilation."""
    check(lambda xs: [fn(*x) for x in xs], operands, ulps=ulps)


EXACT_UNARY = {
    "abs": (lax.abs, SIGNED + FLOATS),
    "ceil": (lax.ceil, FLOATS),
    "clz": (lax.clz, INTS),
    "floor": (lax.floor, FLOATS),
    "is_finite": (lax.is_finite, FLOATS),
    "neg": (lax.neg, INTS + FLOATS),
    "not": (lax.bitwise_not, INTS + BOOL),
    "population_count": (lax.population_count, INTS),
    "round_even": (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), FLOATS),
    "round_away": (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), FLOATS),
    "sign": (lax.sign, INTS + FLOATS),
    "square": (lax.square, INTS + ("float32", "float64")),
    "stop_gradient": (lax.stop_gradient, FLOATS),
}


@pytest.mark.parametrize("name", EXACT_UNARY)
def test_unary(name: str) -> None:
    fn, types = EXACT_UNARY[name]
    over_types(fn, [[values(t)] for t in types])


EXACT_BINARY = {
    "add": (lax.add, INTS + ("float32", "float64")),
    "and": (lax.bitwise_and, INTS + BOOL),
    "div": (lax.div, INTS + ("float32", "float64")),
    "eq": (lax.eq, INTS + FLOATS + BOOL),
    "ge": (lax.ge, INTS + FLOATS + BOOL),
    "gt": (lax.gt, INTS + FLOATS + BOOL),
    "le": (lax.le, INTS + FLOATS + BOOL),
    "lt": (lax.lt, INTS + FLOATS + BOOL),
    "max": (lax.max, INTS + FLOATS + BOOL),
    "min": (lax.min, INTS + FLOATS + BOOL),
    "mul": (lax.mul, INTS + ("float32", "float64")),
    "ne": (lax.ne, INTS + FLOATS + BOOL),
    "nextafter": (lax.nextafter, ("float32", "float64")),
    "or": (lax.bitwise_or, INTS + BOOL),
    "rem": (lax.rem, INTS + ("float32", "float64")),
    "shift_left": (lax.shift_left, INTS),
    "shift_right_arithmetic": (lax.shift_right_arithmetic, INTS),
    "shift_right_logical": (lax.shift_right_logical, INTS),
    "sub": (lax.sub, INTS + ("float32", "float64")),
    "xor": (lax.bitwise_xor, INTS + BOOL),
}


@pytest.mark.parametrize("name", EXACT_BINARY)
def test_binary(name: str) -> None:
    fn, types = EXACT_BINARY[name]
    over_types(fn, [grid(t) for t in types])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_sixteen_bit_arithmetic(name: str) -> None:
    """Computed in f32 and rounded, which is also what IEEE arithmetic in the type gives."""
    over_types(EXACT_BINARY[name][0], [grid(t) for t in ("float16", "bfloat16")])


@pytest.mark.parametrize("name", ["eq_to", "le_to", "lt_to"])
def test_total_order(name: str) -> None:
    bind = getattr(lax, f"{name}_p").bind if hasattr(lax, f"{name}_p") else None
    if bind is None:
        from jax._src.lax import lax as internal

        bind = getattr(internal, f"{name}_p").bind
    over_types(bind, [grid(t) for t in (*FLOATS, "int32", "uint8")])


TRANSCENDENTAL = {
    "acos": (lax.acos, -1, 1),
    "acosh": (lax.acosh, 1, 30),
    "asin": (lax.asin, -1, 1),
    "asinh": (lax.asinh, -20, 20),
    "atan": (lax.atan, -20, 20),
    "atanh": (lax.atanh, -0.99, 0.99),
    "cbrt": (lax.cbrt, -30, 30),
    "cos": (lax.cos, -20, 20),
    "cosh": (lax.cosh, -8, 8),
    "erf": (lax.erf, -3, 3),
    "erfc": (lax.erfc, -3, 3),
    "exp": (lax.exp, -20, 20),
    "exp2": (lax.exp2, -20, 20),
    "expm1": (lax.expm1, -5, 5),
    "log": (lax.log, 1e-3, 100),
    "log1p": (lax.log1p, -0.9, 100),
    "logistic": (lax.logistic, -10, 10),
    "rsqrt": (lax.rsqrt, 1e-3, 100),
    "sin": (lax.sin, -20, 20),
    "sinh": (lax.sinh, -8, 8),
    "sqrt": (lax.sqrt, 0, 100),
    "tan": (lax.tan, -1.5, 1.5),
    "tanh": (lax.tanh, -5, 5),
}


@pytest.mark.parametrize("name", TRANSCENDENTAL)
def test_transcendental(name: str) -> None:
    fn, low, high = TRANSCENDENTAL[name]
    x = np.linspace(low, high, 64)
    x = np.concatenate([x, [np.nan] if name in ("cos", "sin", "tan") else [np.inf, -np.inf, np.nan]])
    # XLA computes exp2 of 16-bit types less exactly than by rounding the f32 result.
    narrow_ulps = 16 if name == "exp2" else 1
    for dtypes, ulps, atol in ((("float16", "bfloat16"), narrow_ulps, 1e-3), (("float32", "float64"), 16, 4e-15)):
        operands = [[x.astype(jnp.dtype(t))] for t in dtypes]
        check(lambda xs: [fn(*a) for a in xs], operands, ulps=ulps, atol=atol)


def test_binary_transcendental() -> None:
    a, b = (
        v.reshape(-1) for v in np.meshgrid([-2.0, -0.5, 0.0, 0.5, 2.0, np.inf, np.nan], [-3.0, -1.0, 0.0, 2.0, 7.5])
    )
    operands = [[a.astype(t), b.astype(t)] for t in ("float32", "float64")]
    over_types(lax.atan2, operands, ulps=8)
    over_types(lax.pow, operands, ulps=8)
    x = np.array([-2.0, -1.0, 0.5, 3.0], np.float32)
    check(lax.pow, x, np.array([3, -2, 5, -1], np.int32), ulps=8)


@pytest.mark.parametrize("power", [-7, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 11])
def test_integer_pow(power: int) -> None:
    x = np.random.default_rng(0).standard_normal(50)
    check(lambda x: lax.integer_pow(x, power), x.astype(np.float32))
    check(lambda x: lax.integer_pow(x, power), x)
    if power >= 0:
        check(lambda x: lax.integer_pow(x, power), values("int32"))


@pytest.mark.skipif(not hasattr(lax, "polynomial"), reason="not in this version of JAX")
@pytest.mark.parametrize("terms", [1, 8, 9])
def test_polynomial(terms: int) -> None:
    """More terms than JAX unrolls start from zero, and zero times an infinity is NaN."""
    whole = np.arange(terms) % 5 - 2
    operands = [[values(t), whole.astype(t)] for t in ("float32", "float64", "int32", "uint8")]
    over_types(lambda x, c: lax.polynomial(x, list(c)), operands, ulps=16)
    column, few = np.linspace(-2, 2, 7).reshape(7, 1), np.ones((terms, 1, 3))
    check(lambda x, c: lax.polynomial(x, [2.0, *c, 3.0], unroll=3), column, few, ulps=16)


def test_nextafter_of_sixteen_bits() -> None:
    x = [1.0, -1.0, 0.0, -0.0, 1.0, 2.0, np.inf, np.nan, 1.0, 65504.0, 3.0]
    y = [2.0, -2.0, 1.0, -1.0, 1.0, -np.inf, 0.0, 1.0, np.nan, np.inf, 3.0]
    # Subnormal results: the CPU backend of XLA prints them as they are.
    over_types(lax.nextafter, [[np.array(v, jnp.dtype(t)) for v in (x, y)] for t in ("float16", "bfloat16")])


@pytest.mark.parametrize("source", [*FLOATS, *INTS, *BOOL])
def test_convert(source: str) -> None:
    x = values(source)
    if source in FLOATS:
        more = np.array([300.0, -300.0, 3e9, -3e9, 1e30, -1e30, 1.9, -1.9, 65519.0, 257.0])
        with np.errstate(over="ignore"):
            x = np.concatenate([x, more.astype(x.dtype)])
    targets = [*FLOATS, *INTS, *BOOL]
    check(lambda x: [lax.convert_element_type(x, jnp.dtype(t)) for t in targets], x)


def test_convert_rounds_twice_on_the_way_to_sixteen_bits() -> None:
    x = np.array([1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40, 1 + 2**-9])
    n = np.array([257, 16777217 + 2**15, 2**24 + 1, 2**53 + 1, 2**63 - 1])
    for t in (jnp.float16, jnp.bfloat16, jnp.float32):
        got = run(lambda x, n, t=t: (lax.convert_element_type(x, t), lax.convert_element_type(n, t)), x, n)
        # XLA does the same, except on processors with instructions for f16.
        with np.errstate(over="ignore"):
            for a, b in zip(got, (x, n), strict=True):
                np.testing.assert_array_equal(a, b.astype(np.float32).astype(t))


BITCASTS = [
    ("float32", "int32"), ("float32", "uint8"), ("float32", "uint16"), ("float32", "bfloat16"),
    ("bfloat16", "uint16"), ("bfloat16", "int8"), ("float16", "bfloat16"), ("float64", "uint32"),
    ("int64", "float32"), ("uint8", "int8"), ("int16", "uint8"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), BITCASTS)
def test_bitcast(source: str, target: str) -> None:
    x = values(source)
    x = x[~np.isnan(x.astype(np.float64))]
    check(lambda x: lax.bitcast_convert_type(x, jnp.dtype(target)), x)


def test_bitcast_to_wider() -> None:
    x = np.arange(48, dtype=np.uint8)
    check(lambda x: lax.bitcast_convert_type(x.reshape(12, 4), jnp.float32), x)
    check(lambda x: lax.bitcast_convert_type(x.reshape(3, 2, 8), jnp.int64), x)
    check(lambda x: lax.bitcast_convert_type(x.reshape(24, 2), jnp.bfloat16), x)
    check(lambda x: lax.bitcast_convert_type(x.view(np.int16).reshape(12, 2), jnp.uint32), x)


@pytest.mark.parametrize(("exponent", "mantissa"), [(5, 10), (8, 7), (8, 23), (4, 3), (11, 52), (8, 0), (5, 2)])
def test_reduce_precision(exponent: int, mantissa: int) -> None:
    x = np.array([*_ORDINARY, *_SPECIAL, 1e-8, 6e-5, 65520, 65504, 3e38, 1.0004883, 1.00390625, 1.01171875, -1e-9])
    for t in FLOATS:
        with np.errstate(over="ignore"):
            check(lambda x: lax.reduce_precision(x, exponent, mantissa), x.astype(jnp.dtype(t)))


def test_clamp() -> None:
    for t in ("float32", "bfloat16", "int8", "uint32"):
        x = values(t)
        check(lambda x, t=t: lax.clamp(jnp.array(1, t), x, jnp.array(3, t)), x)
        check(lambda low, x, high: lax.clamp(low, x, high), x[::-1], x, np.roll(x, 3))


def test_select_n() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    pred = x % 2 == 0
    check(lambda p, x: lax.select_n(p, x, -x), pred, x)
    check(lambda p, x: lax.select_n(p[0, 0], x, -x), pred, x)
    check(lambda p, x: lax.select_n(p, x.astype(jnp.bfloat16), -x.astype(jnp.bfloat16)), pred, x)
    check(lambda p, x: lax.select_n(p, x > 2, x > 3), pred, x)
    which = np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    check(lambda w, x: lax.select_n(w, x, -x, x * 2), which, x)
    check(lambda w, x: lax.select_n(w[0, 2], x, -x, x * 2), which, x)
    # Out of range: the nearest case.
    check(lambda w, x: lax.select_n(w, x, -x, x * 2), which * 5 - 3, x)


def test_iota() -> None:
    for t in ("int8", "int32", "uint16", "float32", "bfloat16", "int64"):
        check(lambda t=t: lax.broadcasted_iota(jnp.dtype(t), (3, 5, 2), 1))
    check(lambda: lax.iota(jnp.int8, 100))


def test_operands_of_other_shapes() -> None:
    """Scalars meet arrays in jaxprs."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    check(lambda x: (x + 1.5, 2 / (x + 1), jnp.maximum(x, 3), x > 2, jnp.where(x > 2, x, 0.0)), x)


def test_identities() -> None:
    x = np.arange(6, dtype=np.float32)
    check(lambda x: lax.optimization_barrier((x, x + 1)), x)
    check(lambda x: jnp.copy(x), x)
    check(lambda x: jax.device_put(x), x)
    check(lambda x: jax.grad(lambda y: (y * y + y).sum())(x), x)


def test_keys() -> None:
    keys = jax.random.split(jax.random.key(7), 6)
    check(lambda k: k.reshape(2, 3).T[::-1, 1:], keys)
    check(lambda k: (jnp.concatenate([k[3:], k[:2]]), jnp.broadcast_to(k[0], (2, 3)), k[jnp.array(5)]), keys)
    check(lambda k: lax.dynamic_slice(k, (3,), (2,)), keys)
    check(lambda k: lax.dynamic_update_slice(k, k[:2], (3,)), keys)
    check(lambda k: jnp.where(jnp.arange(6) % 2 == 0, k, k[::-1]), keys)
    check(lambda k: (k == k[::-1], k != k[0]), keys)
    check(lambda k: lax.scan(lambda c, x: (x, c), k[0], k), keys)
    check(lambda k: lax.cond(True, lambda k: k, lambda k: k[::-1], k), keys)
    check(lambda k: jnp.expand_dims(k, 1).squeeze(), keys)
