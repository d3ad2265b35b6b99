"""Bodies of every kind of operator, over sizes that take every path: against ``jax.jit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from tests.codegen.harness import expected, run

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(7)


def f32(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def f64(*shape: int) -> Any:
    return RNG.standard_normal(shape)


def bf16(*shape: int) -> Any:
    return f32(*shape).astype(ml_dtypes.bfloat16)


def f16(*shape: int) -> Any:
    return f32(*shape).astype(np.float16)


def ints(low: int, high: int, *shape: int, dtype: Any = np.int32) -> Any:
    return RNG.integers(low, high, shape).astype(dtype)


def _attention(q: Any, k: Any, v: Any, new_k: Any, new_v: Any, at: Any) -> Any:
    """Writes one step into a cache and attends to all of it."""
    k = lax.dynamic_update_slice(k, new_k, (np.int32(0), at, np.int32(0), np.int32(0)))
    v = lax.dynamic_update_slice(v, new_v, (np.int32(0), at, np.int32(0), np.int32(0)))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.125
    scores = jnp.where(jnp.arange(k.shape[1]) <= at, scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v), k, v


def _generic(x: Any, y: Any, dims: tuple[int, ...]) -> Any:
    """A reduction of two values that is no familiar operation: the smallest x and its y."""

    def join(a: Any, b: Any) -> Any:
        first = a[0] <= b[0]
        return lax.select(first, a[0], b[0]), lax.select(first, a[1], b[1])

    return lax.reduce((x, y), (np.float32(np.inf), np.int32(-1)), join, dims)


#: name → (function, arguments, tolerance)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]] = {
    "map of one long row": (lambda x, y: x * y + 1, (f32(5000), f32(5000)), 1e-6),
    "map with a transpose": (lambda x: x.T + 1, (f32(300, 70),), 1e-6),
    "map with tiny rows": (lambda x, y: x.transpose(0, 2, 1) * y, (f32(400, 3, 2), f32(400, 2, 3)), 1e-6),
    "map with tiny rows of bf16": (lambda x: x.transpose(2, 0, 1) + 1, (bf16(5, 6, 700),), 1e-2),
    "rows and columns": (lambda x, r, c: (x - r[:, None]) * c, (f32(40, 600), f32(40), f32(600)), 1e-6),
    "a scalar": (lambda x, y: jnp.sin(x) * y, (f32(), f32()), 1e-5),
    "strided slices": (lambda x: x[::3, ::-2] * 2, (f32(50, 333),), 1e-6),
    "concatenation": (lambda x, y: jnp.concatenate([x, y, x], 1) * 2, (f32(9, 700), f32(9, 5)), 1e-6),
    "padding": (lambda x: lax.pad(x, np.float32(1.5), [(2, 1, 1), (-3, 5, 0)]), (f32(20, 700),), 1e-6),
    "rows by index": (lambda x, i: x[i] * 2, (f32(50, 700), ints(0, 50, 33)), 1e-6),
    "elements by index": (
        lambda x, i: jnp.take(x, i, mode="fill"),
        (f32(5000), ints(-6000, 6000, 3000)),
        1e-6,
    ),
    "reshape": (lambda x: (x * 2).reshape(70, 30, 10).transpose(2, 0, 1), (f32(210, 100),), 1e-6),
    "rotation": (lambda x: jnp.roll(x, 5, 1) + x, (f32(7, 1000),), 1e-6),
    "integers of many widths": (
        lambda a, b: (a + b.astype(np.int16)).astype(np.uint8) // 3,
        (ints(-3000, 3000, 3000, dtype=np.int16), ints(-100, 100, 3000, dtype=np.int8)),
        0,
    ),
    "long indices": (
        lambda i: (i // 7 * 5 + i % 11, -i // 4, i % 7),
        (ints(-(1 << 60), 1 << 60, 3000, dtype=np.int64),),
        0,
    ),
    "sum of rows": (lambda x: x.sum(1), (f32(20, 5000),), 1e-5),
    "sum of short rows": (lambda x: x.sum(1), (f32(3000, 7),), 1e-5),
    "sum of columns": (lambda x: x.sum(0), (f32(300, 1700),), 1e-5),
    "sum of everything": (lambda x: x.sum(), (f32(300, 1700),), 1e-4),
    "sum over outer and inner axes": (lambda x: x.sum((0, 2)), (f32(30, 17, 70),), 1e-5),
    "sum over the middle": (lambda x: x.sum(1), (f32(30, 170, 7),), 1e-5),
    "large tile": (lambda x: x.sum(-1) * 2, (f32(300, 200, 3),), 1e-5),
    "products and extrema": (lambda x: (x.prod(1), x.max(0), x.min(1), x.max()), (f32(90, 130),), 1e-5),
    "extrema of NaN": (
        lambda x: (x.max(1), x.min(0), jnp.argmax(x, 1), jnp.argmin(x, 0)),
        (np.where(f32(60, 90) > 2, np.float32(np.nan), f32(60, 90)),),
        0,
    ),
    "bits": (
        lambda x: (jnp.bitwise_or.reduce(x, 1), jnp.bitwise_and.reduce(x, 0), lax.reduce_xor(x, (0, 1))),
        (ints(0, 1 << 30, 60, 900),),
        0,
    ),
    "bools": (lambda x: ((x > 1).any(1), (x < 2).all(0), (x > 0).sum()), (f32(60, 900),), 0),
    "argmax of a vocabulary": (lambda x: jnp.argmax(x, -1), (np.round(f32(2, 50000), 1),), 0),
    "argmax of columns": (lambda x: jnp.argmax(x, 0), (np.round(f32(50, 3000), 1),), 0),
    "generic reduction of rows": (
        lambda x, y: _generic(x, y, (1,)),
        (np.round(f32(9, 2500), 2), ints(0, 999, 9, 2500)),
        0,
    ),
    "generic reduction of columns": (
        lambda x, y: _generic(x, y, (0,)),
        (np.round(f32(90, 700), 1), ints(0, 999, 90, 700)),
        0,
    ),
    "norm": (
        lambda x, w: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w,
        (f32(4, 576), f32(576)),
        1e-5,
    ),
    "softmax": (lambda x: jax.nn.softmax(x, -1), (f32(40, 1500),), 1e-5),
    "log-softmax of bf16": (lambda x: jax.nn.log_softmax(x, 0), (bf16(300, 70),), 2e-2),
    "matrix product": (lambda x, y: x @ y, (f32(40, 300), f32(300, 700)), 1e-4),
    "matrix-vector product": (lambda x, y: x @ y, (f32(1, 600), f32(600, 50000)), 1e-4),
    "batched product": (lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y), (f32(2, 9, 3, 64), f32(2, 50, 3, 64)), 1e-4),
    "product over two axes": (lambda x, y: jnp.einsum("abc,cdb->ad", x, y), (f32(8, 9, 10), f32(10, 11, 9)), 1e-4),
    "product of bf16 and f32": (
        lambda x, y: lax.dot(x, y, preferred_element_type=np.float32),
        (bf16(9, 70), bf16(70, 90)),
        1e-4,
    ),
    "product of f16": (lambda x, y: x @ y, (f16(9, 70), f16(70, 90)), 2e-2),
    "product of f64": (lambda x, y: x @ y, (f64(30, 70), f64(70, 90)), 1e-12),
    "product of s8": (
        lambda x, y: lax.dot(x, y, preferred_element_type=np.int32),
        (ints(-128, 128, 9, 700, dtype=np.int8), ints(-128, 128, 700, 30, dtype=np.int8)),
        0,
    ),
    "product of u16": (
        lambda x, y: x @ y,
        (ints(0, 65536, 9, 700, dtype=np.uint16), ints(0, 65536, 700, 30, dtype=np.uint16)),
        0,
    ),
    "product of s64": (
        lambda x, y: x @ y,
        (ints(-9, 9, 9, 70, dtype=np.int64), ints(-9, 9, 70, 30, dtype=np.int64)),
        0,
    ),
    "product with everything around": (
        lambda x, w, b, r: jax.nn.gelu(x @ w + b) + r,
        (f32(6, 128), f32(128, 300), f32(300), f32(6, 300)),
        1e-4,
    ),
    "cache and attention": (
        _attention,
        (f32(1, 1, 4, 16), f32(1, 50, 4, 16), f32(1, 50, 4, 16), f32(1, 1, 4, 16), f32(1, 1, 4, 16), np.int32(20)),
        1e-5,
    ),
    "cache and attention of bf16, at the end": (
        _attention,
        (bf16(1, 2, 4, 16), bf16(1, 50, 4, 16), bf16(1, 50, 4, 16), bf16(1, 2, 4, 16), bf16(1, 2, 4, 16), np.int32(77)),
        3e-2,
    ),
    "slice update": (
        lambda x, y, i, j: lax.dynamic_update_slice(x, y, (i, j)),
        (f32(60, 700), f32(5, 300), np.int32(55), np.int32(-9)),
        0,
    ),
    "scatter of rows": (lambda x, i, y: x.at[i].set(y), (f32(50, 700), ints(-5, 60, 20), f32(20, 700)), 0),
    "scatter-add of rows": (lambda x, i, y: x.at[i].add(y), (f32(50, 700), ints(-5, 60, 90), f32(90, 700)), 1e-5),
    "scatter-add of elements": (lambda x, i, y: x.at[i].add(y), (f32(300), ints(-5, 400, 3000), f32(3000)), 1e-4),
    "scatter-add of bf16": (lambda x, i, y: x.at[i].add(y), (bf16(300), np.arange(0, 300, 2), bf16(150)), 1e-2),
    "scatter of extrema": (
        lambda x, i, y: (x.at[i].max(y), x.at[:, 3].min(y[:300, 0]), x.at[i, 0].multiply(2.0)),
        (f32(300, 4), ints(0, 300, 3000), f32(3000, 4)),
        1e-5,
    ),
    "scatter of columns": (lambda x, y: x.at[:, 1::3].set(y), (f32(50, 700), f32(50, 233)), 0),
    "running sums": (lambda x: (jnp.cumsum(x, 0), jnp.cumsum(x, 1)), (f32(60, 700),), 1e-4),
    "running sum of a vocabulary": (lambda x: jnp.cumsum(x), (np.abs(f32(50000)),), 1e-4),
    "backwards": (
        lambda x: (lax.cummax(x, 0, reverse=True), lax.cummin(x, 2, reverse=True), lax.cumprod(x, 1, reverse=True)),
        (f32(9, 6, 300),),
        1e-4,
    ),
    "running logarithms": (lambda x: lax.cumlogsumexp(x, axis=1), (f32(9, 3000),), 1e-4),
    "running sums of integers": (lambda x: jnp.cumsum(x, 1), (ints(-99, 99, 5, 3000, dtype=np.int16),), 0),
    "sorted rows": (lambda x: (jnp.sort(x, 1), jnp.sort(x, 0), jnp.argsort(x, 1)), (np.round(f32(9, 3000), 2),), 0),
    "sorted bf16": (lambda x: jnp.sort(x, 0), (bf16(700, 9),), 0),
    "sorted by two keys": (
        lambda x, y, z: lax.sort((x, y, z), dimension=0, num_keys=2),
        (ints(0, 9, 700, 3, dtype=np.int64), np.round(f64(700, 3), 1), f32(700, 3)),
        0,
    ),
    "sorted specials": (
        lambda x: (jnp.sort(x), jnp.argsort(x), lax.top_k(x, 5)),
        (np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1, -1, 0.0, -np.nan, 3], np.float32),),
        0,
    ),
    "top of a vocabulary": (lambda x: lax.top_k(x, 50), (np.round(f32(2, 50000), 2),), 0),
    "top of everything": (lambda x: lax.top_k(x, 300), (np.round(f64(2, 300), 1),), 0),
    "nothing": (lambda x: (x + 1, x.sum(0), jnp.concatenate([x, x])), (f32(0, 7),), 0),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("workers", "tagged"), [(1, False), (5, False), (5, True)], ids=["1", "5", "5+tagged"])
@pytest.mark.parametrize("name", CASES)
def test_body(name: str, workers: int, tagged: bool, fused: bool) -> None:
    fn, args, tolerance = CASES[name]
    got = run(fn, *args, workers=workers, tagged=tagged, fused=fused)
    for g, want in zip(got, expected(fn, *args), strict=True):
        assert (g.dtype, g.shape) == (want.dtype, want.shape)
        if tolerance == 0:
            np.testing.assert_array_equal(g, want)
        else:
            np.testing.assert_allclose(g.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance)
