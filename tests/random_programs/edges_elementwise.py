"""Edge values in elementwise primitives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jax import lax

from tests.random_programs.edges import Group, crossed, edges, float_edges, int_edges
from tests.random_programs.values import ALL, FLOATS, INTS, NUMPY, SIGNED, bits

_EXACT_UNARY = "abs neg sign floor ceil round is_finite square sqrt"
#: Functions that are rounded somewhere.
_ROUNDED = (
    "rsqrt cbrt exp exp2 expm1 log log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh logistic erf "
    "erfc erf_inv lgamma digamma bessel_i0e bessel_i1e log2 atan2 pow"
).split()
#: Allowed distance from ``jax.jit`` in units of the last place, if not 2; f16 and bf16 are computed in f32 and rounded
#: once, so they differ by one at most.
_ULPS = {("erfc", "f64"): 6, ("digamma", "f64"): 16, ("bessel_i0e", "f64"): 6, ("bessel_i1e", "f64"): 6}


def ulps(name: str, dtype: str) -> int:
    """How far a function may be from ``jax.jit``."""
    return 1 if dtype in ("f16", "bf16") else _ULPS.get((name, dtype), 2)


def _float_unary(dtype: str) -> Group:
    group = Group({"x": float_edges(dtype)})
    group.add(*(f"lax.{name}(x)" for name in _EXACT_UNARY.split()))
    group.add("lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)", "jax.nn.relu(x)", "jnp.nan_to_num(x)")
    group.add("jnp.trunc(x)", "jnp.isnan(x)", "jnp.isinf(x)", "jnp.signbit(x)")
    group.add(*(f"lax.integer_pow(x, {n})" for n in (0, 1, 2)))
    if dtype in ("f32", "f64"):
        # XLA may or may not round f16 and bf16 between two multiplications.
        group.add(*(f"lax.integer_pow(x, {n})" for n in (3, -1, -2)))
    for exponent, mantissa in ((5, 10), (8, 7), (8, 23), (4, 3), (5, 2), (2, 1), (11, 52), (8, 0)):
        group.add(f"lax.reduce_precision(x, {exponent}, {mantissa})")
    for name in _ROUNDED:
        if name == "cbrt":
            # XLA turns subnormals into numbers around 1e-16.
            group.add("lax.cbrt(jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, 0, x))", ulps=ulps(name, dtype))
        elif name == "lgamma" and dtype == "f64":
            # XLA loses digits beside the roots at one, at two and among the negative numbers.
            group.add("lax.lgamma(jnp.where((x > -4) & (x < 2.1) & (jnp.abs(x) > 0.1), 3, x))", ulps=ulps(name, dtype))
        elif name == "lgamma" and dtype in ("f32", "bf16"):
            # From JAX 0.12 on, subnormals are no zeros here.
            group.add("lax.lgamma(x)", ulps=ulps(name, dtype), unsure="x")
        elif name == "digamma":
            # Versions of JAX differ at the pole: NaN or an infinity.
            group.add("lax.digamma(jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, 3, x))", ulps=ulps(name, dtype))
        elif hasattr(lax, name) and name not in ("atan2", "pow"):
            group.add(f"lax.{name}(x)", ulps=ulps(name, dtype))
    return group


def _float_binary(dtype: str) -> Group:
    edge = float_edges(dtype)
    x, y = crossed(edge, edge)
    group = Group({"x": x, "y": y, "low": np.roll(y, 7), "mask": np.arange(len(x)) % 3 == 0})
    group.add(*(f"lax.{name}(x, y)" for name in "add sub mul div nextafter".split()))
    group.add("lax.rem(x, y)", "jnp.fmod(x, y)", unsure="y")
    group.add("lax.max(x, y)", "lax.min(x, y)", "lax.clamp(low, x, y)", unsure="low x y" if dtype == "bf16" else "")
    group.add(*(f"lax.{name}(x, y)" for name in "eq ne lt le gt ge".split()))
    group.add(*(f"helpers.bound('{name}', x, y)" for name in "eq_to le_to lt_to".split()))
    group.add("lax.select(mask, x, y)", "jnp.copysign(x, y)")
    for name in ("atan2", "pow"):
        group.add(f"lax.{name}(x, y)", ulps=ulps(name, dtype))
    return group


def _int_unary(dtype: str) -> Group:
    group = Group({"x": int_edges(dtype)})
    group.add(*(f"lax.{name}(x)" for name in "neg sign square bitwise_not population_count clz".split()))
    group.add(*(f"lax.integer_pow(x, {n})" for n in (0, 1, 2, 3, 7)))
    if dtype in SIGNED:
        group.add("lax.abs(x)")
    return group


def _int_binary(dtype: str) -> Group:
    edge = int_edges(dtype)
    x, y = crossed(edge, edge)
    group = Group({"x": x, "y": y, "low": np.roll(y, 7)})
    names = "add sub mul div rem max min bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge"
    group.add(*(f"lax.{name}(x, y)" for name in names.split()))
    group.add(*(f"lax.shift_{name}(x, y)" for name in "left right_logical right_arithmetic".split()))
    group.add("lax.clamp(low, x, y)", "jnp.floor_divide(x, y)", "jnp.remainder(x, y)")
    group.add(*(f"helpers.bound('{name}', x, y)" for name in "eq_to le_to lt_to".split()))
    if hasattr(lax, "mulhi"):
        group.add("lax.mulhi(x, y)")
    return group


def _bool(dtype: str) -> Group:
    x, y, z = crossed(*[edges(dtype)] * 3)
    group = Group({"x": x, "y": y, "z": z})
    names = "max min bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge"
    group.add(*(f"lax.{name}(x, y)" for name in names.split()))
    group.add(*(f"helpers.bound('{name}', x, y)" for name in "eq_to le_to lt_to".split()))
    group.add(
        "lax.argmin(x, 0, np.int32)",
        "lax.bitwise_not(x)",
        "lax.clamp(x, y, z)",
        "lax.select(x, y, z)",
        "lax.argmax(x, 0, np.int32)",
    )
    group.add("lax.reduce_and(x, (0,))", "lax.reduce_or(x, (0,))", "lax.reduce_xor(x, (0,))", "lax.sort(x)")
    group.add(*(f"helpers.largest(x, x[0], (0,))[{k}]" for k in (0, 1)))
    for name in ("max", "min", "bitwise_and", "bitwise_or", "bitwise_xor"):
        group.add(f"lax.reduce(x, x[-1], lax.{name}, (0,))", f"lax.reduce(x[:0], x[-1], lax.{name}, (0,))")
    group.add("lax.reduce_max(x, (0,))", "lax.reduce_min(x, (0,))", "lax.cumsum(x.astype(s32))", "lax.top_k(x, 3)[1]")
    group.add("lax.reduce_and(x[:0], (0,))", "lax.reduce_or(x[:0], (0,))", "lax.reduce_xor(x[:0], (0,))")
    return group


def _conversions(dtype: str) -> Group:
    group = Group({"x": edges(dtype)})
    for to in ALL:
        if to != dtype:
            group.add(f"lax.convert_element_type(x, {to})", unsure="x" if (dtype, to) == ("bf16", "b1") else "")
    if dtype != "b1":
        width = bits(dtype)
        group.add(*(f"lax.bitcast_convert_type(x, {to})" for to in (*INTS, *FLOATS) if bits(to) <= width))
    return group


#: Of f32 and of f64. XLA's own functions are a composition of others in the type itself.
_SPECIAL_ULPS = {"f32": 16, "f64": 256}


def _special(dtype: str) -> Group:
    """Functions of two arguments, at the ends of their domains, beyond them and at poles."""
    plain = [0.0, 1, 0.5, 2, 1.5, 3, 12, 0.125]
    values = [*plain, *(-v for v in plain), np.inf, -np.inf, np.nan]
    x, y = crossed(*[np.array(values, np.float64).astype(NUMPY[dtype])] * 2)
    group = Group({"x": x, "y": y})
    # From JAX 0.11 on, an infinite shape has a limit, and the pole of digamma is infinite.
    codes = [f"lax.{name}(jnp.where(x == jnp.inf, 3, x), y)" for name in ("igamma", "igammac")]
    codes.append("lax.polygamma(x, jnp.where((x == 0) & (y == 0), 3, y))")
    codes += [f"lax.{name}(x, y)" for name in ("igamma_grad_a", "random_gamma_grad", "zeta")]
    group.add(*codes, ulps=_SPECIAL_ULPS.get(dtype, 1))
    return group


def _betainc(dtype: str) -> Group:
    values = [0.0, -0.0, -1, 1, 2, 0.5, 0.25, 30, 1e-3, np.inf, -np.inf, np.nan]
    a, b, x = crossed(*[np.array(values, np.float64).astype(NUMPY[dtype])] * 3)
    group = Group({"a": a, "b": b, "x": x})
    group.add("lax.betainc(a, b, x)", ulps=_SPECIAL_ULPS.get(dtype, 1))
    return group


def groups() -> Iterator[tuple[str, Group]]:
    """Every group, by name."""
    yield "elementwise b1", _bool("b1")
    for dtype in FLOATS:
        yield f"unary {dtype}", _float_unary(dtype)
        yield f"binary {dtype}", _float_binary(dtype)
        yield f"special {dtype}", _special(dtype)
        yield f"betainc {dtype}", _betainc(dtype)
    for dtype in INTS:
        yield f"unary {dtype}", _int_unary(dtype)
        yield f"binary {dtype}", _int_binary(dtype)
    for dtype in ALL:
        yield f"conversions {dtype}", _conversions(dtype)
