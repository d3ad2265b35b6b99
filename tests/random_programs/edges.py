"""Edge values of every type, and what is done with them.

A :class:`Group` is one program of many independent results: expressions of named arrays. Arrays are arguments, never
constants: XLA evaluates constants when it compiles, by other code than it runs (and dies of integer division by zero).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import lax

from tests.random_programs.values import ALL, FLOATS, INTS, NUMPY, PRECISION, SIGNED, UNSIGNED, bits, int_range

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One result.

    Attributes:
      code: an expression of the group's arrays.
      ulps: how many units in the last place it may be off; 0: bitwise equal, NaNs being all alike.
      lenient: signs of zeros do not count, and subnormals count as zeros: XLA's own choice depends on shapes.
      unsure: names of arrays; where one of them is subnormal, XLA's own choice depends on its version and on the
        processor, and nothing is compared.
    """

    code: str
    ulps: int = 0
    lenient: bool = False
    unsure: str = ""


@dataclass(frozen=True)
class Group:
    """Results computed by one program.

    Attributes:
      arrays: arguments by name.
      cases: the results.
    """

    arrays: dict[str, Array]
    cases: list[Case] = field(default_factory=list)

    def add(self, *codes: str, ulps: int = 0, lenient: bool = False, unsure: str = "") -> None:
        self.cases.extend(Case(code, ulps, lenient, unsure) for code in codes)


def float_edges(dtype: str) -> Array:
    """Zeros, denormals, extremes, infinities, NaNs, halves, neighbours of one, and values around integer limits."""
    info = np.finfo(np.float32) if dtype == "bf16" else np.finfo(NUMPY[dtype])
    word = np.dtype(f"u{np.dtype(NUMPY[dtype]).itemsize}")
    digits = PRECISION[dtype] - 1
    sign = 1 << (bits(dtype) - 1)
    infinity = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0000000000000}[dtype]
    one = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000, "f64": 0x3FF0000000000000}[dtype]
    patterns = [
        *(0, 1, 2, (1 << digits) - 1, 1 << digits, (1 << digits) + 1),  # zero, denormals, smallest normal
        *(infinity - 1, infinity, infinity | 1 << (digits - 1), infinity | 3 << (digits - 2)),  # largest, inf, NaNs
        *(one, one + 1, one - 1),
    ]
    patterns += [p | sign for p in patterns]
    special = np.array(patterns, word).view(NUMPY[dtype])
    plain = [0.25, 0.5, 0.75, 1.5, 2.5, 3.5, 2, 3, 10, 100, 127.5, 128, 255.5, 256, 32768, 65504, 3.14159265]
    if info.maxexp > 16:
        plain += [2.0**k for k in (16, 23, 24, 31, 32, 33, 52, 53, 62, 63, 64, 65)] + [2.0**31 - 1, 1e10, 1e30]
        plain += [88.5, 89.5, 104.0]
    signed = np.array([*plain, *(-p for p in plain)], np.float64).astype(NUMPY[dtype])
    return np.concatenate([special, signed])


def int_edges(dtype: str) -> Array:
    low, high = int_range(dtype)
    found = {low, low + 1, -low - 1, high, high - 1, high // 2, high // 2 + 1, high // 3}
    found |= {-1, 0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, -2, -7, -8, -31, -32, -64}
    found |= {2**k for k in range(0, bits(dtype), 5)}
    if dtype in UNSIGNED:
        # What small negative numbers wrap to.
        found |= {high + 1 - k for k in (1, 2, 8, 32)}
    return np.array(sorted(v for v in found if low <= v <= high), NUMPY[dtype])


def edges(dtype: str) -> Array:
    if dtype == "b1":
        return np.array([False, True])
    return float_edges(dtype) if dtype in FLOATS else int_edges(dtype)


def crossed(*arrays: Array) -> list[Array]:
    """All combinations of the elements of several arrays, one array each."""
    index = list(itertools.product(*(range(len(a)) for a in arrays)))
    return [a[[i[k] for i in index]] for k, a in enumerate(arrays)]


# -- elementwise -----------------------------------------------------------------------------------------------

_EXACT_UNARY = "abs neg sign floor ceil round is_finite square sqrt"
#: Functions that are rounded somewhere: allowed distance from ``jax.jit`` in units of the last place, for f32 and for
#: f64. Both sides are off by a few; f16 and bf16 are computed in f32 and rounded once, so they differ by one at most.
_ULPS = {
    "rsqrt": (2, 2),
    "cbrt": (2, 4),
    "exp": (2, 2),
    "exp2": (2, 4),
    "expm1": (4, 4),
    "log": (2, 2),
    "log1p": (4, 4),
    "sin": (2, 2),
    "cos": (2, 2),
    "tan": (4, 4),
    "asin": (4, 4),
    "acos": (4, 4),
    "atan": (2, 2),
    "sinh": (4, 4),
    "cosh": (4, 4),
    "tanh": (4, 4),
    "asinh": (4, 4),
    "acosh": (4, 4),
    "atanh": (4, 4),
    "logistic": (4, 4),
    "erf": (4, 4),
    "erfc": (8, 8),
    "erf_inv": (8, 8),
    "lgamma": (16, 16),
    "digamma": (16, 32),
    "bessel_i0e": (8, 8),
    "bessel_i1e": (8, 8),
    "log2": (4, 4),
    "atan2": (4, 4),
    "pow": (4, 4),
}


def ulps(name: str, dtype: str) -> int:
    """How far a function may be from ``jax.jit``."""
    narrow, wide = _ULPS.get(name, (0, 0))
    return {"f64": wide, "f32": narrow}.get(dtype, min(narrow, 1))


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
    for name in _ULPS:
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
    if hasattr(lax, "mulhi") and bits(dtype) < 64:
        group.add("lax.mulhi(x, y)")
    return group


def _bool(dtype: str) -> Group:
    x, y, z = crossed(*[edges(dtype)] * 3)
    group = Group({"x": x, "y": y, "z": z})
    names = "max min bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge"
    group.add(*(f"lax.{name}(x, y)" for name in names.split()))
    group.add("lax.bitwise_not(x)", "lax.clamp(x, y, z)", "lax.select(x, y, z)", "lax.argmax(x, 0, np.int32)")
    group.add("lax.reduce_and(x, (0,))", "lax.reduce_or(x, (0,))", "lax.reduce_xor(x, (0,))", "lax.sort(x)")
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


# -- reductions, sorts -----------------------------------------------------------------------------------------


def _rows(dtype: str) -> Array:
    """Rows that each hold some edge values among plain ones, and all-NaN and all-zero rows for floats."""
    edge = edges(dtype)
    rng = np.random.default_rng(3)
    rows = rng.choice(edge, (24, 13))
    if dtype in FLOATS:
        finite = edge[np.isfinite(edge.astype(np.float64)) & (np.abs(edge.astype(np.float64)) < 200)]
        rows[:6] = rng.choice(finite, (6, 13))
        zeros = np.array([0.0, -0.0], NUMPY[dtype])
        rows[6:8] = rng.choice(zeros, (2, 13))
        rows[8] = zeros[1]
        rows[9] = np.array(np.nan, NUMPY[dtype])
        rows[10, ::2] = -rows[9, ::2]
        rows[11] = np.array(-np.inf, NUMPY[dtype])
        rows[12] = np.array(np.inf, NUMPY[dtype])
    elif dtype != "b1":
        rows[:2] = int_range(dtype)[0]
        rows[2:4] = int_range(dtype)[1]
    return rows


def _reductions(dtype: str) -> Group:
    x = _rows(dtype)
    group = Group({"x": x})
    for name in ("max", "min"):
        group.add(f"lax.reduce_{name}(x, (1,))", f"lax.reduce_{name}(x, (0,))", lenient=True)
        for axis in (0, 1):
            group.add(*(f"lax.arg{name}(x, {axis}, {to})" for to in ("s32", "s64", "u8")))
        group.add(f"lax.reduce_{name}(x[:, :0], (1,))")
        group.add(f"lax.cum{name}(x, axis=1)", f"lax.cum{name}(x, axis=0, reverse=True)", lenient=True)
    if dtype in FLOATS:
        # Special values and signs only, so that no sum is rounded.
        wide = x.astype(np.float64)
        group.arrays["s"] = np.where(np.isfinite(wide), np.copysign(np.sign(wide), wide), wide).astype(x.dtype)
        summed = "s"
    else:
        summed = "x"
    group.add(f"lax.reduce_sum({summed}, (1,))", f"lax.reduce_prod({summed}, (1,))", f"lax.cumsum({summed}, axis=1)")
    group.add(f"lax.reduce_sum({summed}[:, :0], (1,))", f"lax.reduce_prod({summed}[:0], (0,))")
    if dtype in INTS:
        group.add(*(f"lax.reduce_{name}(x, (1,))" for name in ("and", "or", "xor")))
        group.add(*(f"lax.reduce_{name}(x[:, :0], (1,))" for name in ("and", "or", "xor")))
        group.add("lax.cumprod(x, axis=1)", "lax.dot_general(x, x, (((1,), (1,)), ((), ())))")
    return group


def _sorts(dtype: str) -> Group:
    x = _rows(dtype)
    group = Group({"x": x, "i": np.broadcast_to(np.arange(13, dtype=np.int32), x.shape).copy()})
    group.add("lax.sort(x, dimension=1)", "lax.sort(x, dimension=0)", "jnp.argsort(x, axis=1)")
    group.add(*(f"lax.sort((x, i), dimension=1, num_keys={k}, is_stable=True)[{j}]" for k in (1, 2) for j in (0, 1)))
    group.add("lax.sort((i // 5, x, i), dimension=1, num_keys=2)[2]", "jnp.argsort(x, axis=1, descending=True)")
    ranked = "x"
    if dtype == "bf16":
        # Processors differ in whether XLA's ranking sees a subnormal or a zero.
        ranked = "normal"
        group.arrays["normal"] = np.where(abs(x) < np.finfo(np.float32).tiny, np.copysign(x.dtype.type(0), x), x)
    group.add(*(f"lax.top_k({ranked}, {k})[{j}]" for k in (13, 3) for j in (0, 1)))
    return group


def _products(dtype: str) -> Group:
    """Contractions of special values: every sum is special, zero or a power of two."""
    edge = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1, -1, 2], NUMPY[dtype])
    rng = np.random.default_rng(5)
    x = np.where(rng.random((9, 7)) < 0.2, rng.choice(edge, (9, 7)), np.array(1, NUMPY[dtype]))
    group = Group({"x": x, "y": np.roll(x, 2)})
    group.add("lax.dot_general(x, y, (((1,), (1,)), ((), ())))", "lax.dot_general(x, y, (((0,), (0,)), ((), ())))")
    group.add("lax.dot_general(x[:, :0], y[:, :0], (((1,), (1,)), ((), ())))", "x[0] @ y[1]")
    group.add(
        "lax.conv_general_dilated(x[None], y[:3, None].swapaxes(1, 2), (1,), [(0, 0)], "
        "dimension_numbers=('NHC', 'HIO', 'NHC'))"
    )
    return group


# -- addresses -------------------------------------------------------------------------------------------------


def _positions(dtype: str) -> Array:
    """Positions in, around and far outside an axis of 5."""
    low, high = int_range(dtype)
    found = [-(2**40), -300, -6, -5, -1, 0, 1, 3, 4, 5, 6, 200, 2**33, 2**33 + 1, low, high, high - 1]
    return np.array([v for v in found if low <= v <= high], NUMPY[dtype])


def _addresses(dtype: str) -> Group:
    at = _positions(dtype)
    x = np.arange(15, dtype=np.float32).reshape(5, 3) + 1
    group = Group({"x": x, "at": at, "u": np.arange(len(at) * 3, dtype=np.float32).reshape(-1, 3) + 100})
    group.arrays["n"] = np.arange(15, dtype=np.int16).reshape(5, 3)
    rows = "lax.GatherDimensionNumbers((1,), (0,), (0,))"
    pieces = "lax.GatherDimensionNumbers((1, 2), (), (0,))"
    for mode in ("clip", "fill", "promise_in_bounds"):
        given = "at[:, None]"
        if mode == "promise_in_bounds":
            given = "lax.clamp(at.dtype.type(0), at, at.dtype.type(3))[:, None]"
        group.add(f"lax.gather(x, {given}, {rows}, (1, 3), mode='{mode}')")
        group.add(f"lax.gather(n, {given}, {rows}, (1, 3), mode='{mode}')")
        group.add(f"lax.gather(x, {given}, {pieces}, (2, 3), mode='{mode}')")
        group.add(f"lax.gather(x, {given}, {pieces}, (2, 2), mode='{mode}', fill_value=-7)")
        where = "lax.ScatterDimensionNumbers((1,), (0,), (0,))"
        for name in ("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"):
            group.add(f"lax.{name}(x, {given}, u, {where}, mode='{mode}')")
        where = "lax.ScatterDimensionNumbers((1, 2), (), (0,))"
        group.add(f"lax.scatter(x, {given}, jnp.stack([u, u + 50], 1), {where}, mode='{mode}')")
    for k in range(len(at)):
        group.add(f"lax.dynamic_slice(x, (at[{k}], at[{k}]), (2, 2))")
        group.add(f"lax.dynamic_update_slice(x, u[:2, :2], (at[{k}], at[{k}]))")
        group.add(f"lax.switch(at[{k}], [lambda: u[0], lambda: u[1], lambda: -u[0]])")
    group.add("x[at]", "x.at[at].set(u)", "x.at[at].add(u)", "jnp.take(x, at, axis=0)")
    group.add("jnp.take(x, at, 0, mode='wrap')", "x.at[at].get(mode='fill', fill_value=3)")
    group.add("x.at[at].max(u, mode='clip')", "jnp.take_along_axis(x, u[:, :1].astype(s32), 0)")
    return group


def _loops(dtype: str) -> Group:
    """Trip counts from data, none among them."""
    x = np.array([1.0, -0.0, np.inf, np.nan], np.float32)
    group = Group({"n": np.array([-3, 0, 1, 2, 7], NUMPY[dtype]), "x": x})
    for k in range(5):
        group.add(f"lax.fori_loop(n.dtype.type(0), n[{k}], lambda i, v: v * 2 + 1, x)")
        group.add(f"lax.while_loop(lambda c: c[0] < n[{k}], lambda c: (c[0] + 1, c[1] - 3), (n[2], x))[1]")
        group.add(f"lax.cond(n[{k}] > 0, lambda v: v + 1, lambda v: -v, x)")
    group.add("lax.scan(lambda c, r: (c + r, c * r), x, x[:0, None] + x[None])[0]")
    return group


def _random(dtype: str) -> Group:
    group = Group({"seed": int_edges(dtype)})
    for k in range(len(group.arrays["seed"])):
        group.add(f"jax.random.key_data(jax.random.key(seed[{k}]))")
    return group


def groups() -> Iterator[tuple[str, Group]]:
    """Every group, by name."""
    yield "bool", _bool("b1")
    for dtype in FLOATS:
        yield f"unary {dtype}", _float_unary(dtype)
        yield f"binary {dtype}", _float_binary(dtype)
        yield f"products {dtype}", _products(dtype)
    for dtype in INTS:
        yield f"unary {dtype}", _int_unary(dtype)
        yield f"binary {dtype}", _int_binary(dtype)
        yield f"addresses {dtype}", _addresses(dtype)
    for dtype in ALL:
        yield f"conversions {dtype}", _conversions(dtype)
    for dtype in (*INTS, *FLOATS):
        yield f"reductions {dtype}", _reductions(dtype)
        yield f"sorts {dtype}", _sorts(dtype)
    for dtype in ("s32", "s64"):
        yield f"loops {dtype}", _loops(dtype)
        yield f"random {dtype}", _random(dtype)
