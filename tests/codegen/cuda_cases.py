"""Functions whose kernels use every kind of task, every element type and every way a routine is written.

Used by tests that compile kernels, run them without a GPU, and run them on one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class Case:
    """A function and what its kernel must contain.

    Attributes:
      name: of the test.
      fn: the function; needs 64-bit types where its arguments have them.
      shapes: shapes and types of the arguments: ``"3x4 float32"``; integers and bools may end in ``=value``.
      text: parts of the kernel's source.
      rough: results are rounded differently than by ``jax.jit``.
      sass: beginnings of names of machine instructions: those a fast body exists for.
    """

    name: str
    fn: Callable[..., Any]
    shapes: Sequence[str]
    text: Sequence[str] = ()
    rough: bool = False
    sass: Sequence[str] = ()

    def arguments(self, seed: int = 0) -> list[np.ndarray[Any, Any]]:
        return [_drawn(spec, np.random.default_rng([seed, k])) for k, spec in enumerate(self.shapes)]


def _drawn(spec: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    *shape_text, typed = spec.split()
    name, _, value = typed.partition("=")
    shape = tuple(int(e) for e in shape_text[0].split("x")) if shape_text else ()
    dtype = jnp.dtype(name)
    if value:
        return np.full(shape, float(value) if name in FLOATS else int(value), dtype)
    if name == "bool":
        return rng.integers(0, 2, shape).astype(dtype)
    if name in FLOATS:
        # Multiples of an eighth: sums are exact, and there are equal elements to sort.
        return (rng.integers(-40, 41, shape) / 8).astype(dtype)
    low = 0 if name.startswith("u") else -50
    return rng.integers(low, 50, shape).astype(dtype)


def _pooling(x: Any) -> Any:
    """What a window selects, in reductions of three and of four accumulators."""

    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (2, 3), (2, 2), [(0, 0), (1, 2)])

    return jax.grad(lambda x: pool(x).sum())(x), jax.jvp(pool, [x], [x[::-1]])[1]


def _generic(x: jax.Array) -> Any:
    """A product of 2×2 matrices, which does not commute."""
    rows = jnp.stack([x, x + 1], axis=-1)

    def join(a: Any, b: Any) -> Any:
        return a[0] * b[0] % 101, (a[1] * b[0] + b[1]) % 101

    return lax.associative_scan(join, (rows[..., 0] % 7, rows[..., 1] % 7))


def _reduce_two(x: jax.Array, y: jax.Array) -> Any:
    def join(a: Any, b: Any) -> Any:
        keep = a[0] >= b[0]
        return jnp.where(keep, a[0], b[0]), jnp.where(keep, a[1], b[1])

    return lax.reduce((x, y), (x.dtype.type(-100), y.dtype.type(0)), join, (1,))


def _normalized(x: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.tanh(x)
    return jnp.einsum("bk,nk->bn", y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True)), w)


def _mlp(x: jax.Array, w: jax.Array, v: jax.Array) -> Any:
    return jnp.tanh(x @ w.T) @ v.T + x


def _mlp_by_default(x: jax.Array, w: jax.Array, v: jax.Array) -> Any:
    """Weights as JAX lays them out by default: [in, out]."""
    return jnp.tanh(x @ w) @ v + x


def _heads(x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    x = x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1).astype(x.dtype)
    return jnp.einsum("bd,dhk->bhk", x, q), jnp.einsum("bd,dhk->bhk", x, k), x @ v


def _columns_loop(x: jax.Array, w: jax.Array, n: jax.Array) -> Any:
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w / 64), x)


def _both(x: jax.Array, w: jax.Array, v: jax.Array) -> Any:
    """Weights of either kind: tiles of rows, and columns."""
    return x @ w, jnp.einsum("bk,nk->bn", x, v)


def _attention(x: jax.Array, w: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array) -> Any:
    q, k, v = jnp.split((x @ w.T).reshape(3, 4, 16), 3)
    keys = lax.dynamic_update_slice_in_dim(keys, k, at, 0)
    values = lax.dynamic_update_slice_in_dim(values, v, at, 0)
    scores = jnp.einsum("qhd,khd->hqk", q, keys)
    scores = jnp.where(jnp.arange(keys.shape[0]) <= at, scores * 0.25, -1e9)
    out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, -1), values)
    return out, keys, values


def _grouped(nothing: float) -> Callable[..., Any]:
    """Several queries for each key, with keys and values too many to be copied to scratch; all of them are read where
    masked scores are merely small.
    """

    def fn(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array) -> Any:
        keys = lax.dynamic_update_slice_in_dim(keys, k, at, 0)
        values = lax.dynamic_update_slice_in_dim(values, v, at, 0)
        scores = jnp.einsum("hgd,khd->hgk", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.arange(keys.shape[0]) <= at, scores * 0.0625, nothing)
        weights = jax.nn.softmax(scores, -1).astype(values.dtype)
        return jnp.einsum("hgk,khd->hgd", weights, values), keys, values

    return fn


def _casts(*arrays: jax.Array) -> Any:
    return [a.astype(t) for a in arrays for t in (*FLOATS, *INTS, "bool")]


def _while(x: jax.Array, n: jax.Array) -> Any:
    return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 2 - s[1] @ s[1] % 3), (0, x))


def _nested(x: jax.Array, n: jax.Array) -> Any:
    def inner(j: Any, y: jax.Array) -> jax.Array:
        return lax.cond(y[0, 0] > j, lambda y: (y @ x) % 5 - 2, lambda y: y, y)

    return lax.fori_loop(0, n, lambda i, x: lax.fori_loop(0, i, inner, x) + 1, x)


def _switches(x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    def second(x: jax.Array) -> jax.Array:
        return lax.switch(b, [lambda x: x + 1, lambda x: (x @ x) % 5, lambda x: x], x)

    return lax.switch(a, [lambda x: (x @ x) % 3, second, lambda x: x], x)


def _streamed_loop(x: jax.Array, w: jax.Array, n: jax.Array) -> Any:
    def body(i: Any, x: jax.Array) -> jax.Array:
        return lax.cond(i % 2 == 0, lambda x: jnp.tanh(w @ x / 64), lambda x: (x @ w) / 64, x)

    return lax.fori_loop(0, n, body, x)


def _cumulative(axis: int, reverse: bool) -> Callable[..., Any]:
    fns = (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp)

    def fn(x: jax.Array, y: jax.Array) -> Any:
        floats = [f(x / 8, axis=axis, reverse=reverse) for f in fns]
        return floats + [f(y, axis=axis, reverse=reverse) for f in fns[:4]]

    return fn


def _sorts(axis: int, keys: int) -> Callable[..., Any]:
    return lambda *arrays: lax.sort(arrays, dimension=axis, num_keys=keys)


def _reductions(axis: int) -> Callable[..., Any]:
    fns = (jnp.sum, jnp.max, jnp.min, jnp.argmax, jnp.argmin)
    return lambda x: [f(x, axis=axis) for f in fns]


def _convolution(x: jax.Array, w: jax.Array) -> Any:
    return lax.conv_general_dilated(x, w, (1, 2), "SAME"), lax.reduce_window(
        x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 1), "SAME"
    )


def _scatter(mode: str) -> Callable[..., Any]:
    def fn(x: jax.Array, at: jax.Array, updates: jax.Array) -> Any:
        return getattr(x.at[at % x.shape[0]], mode)(updates)

    return fn


#: Weights through the ring: bulk copies, and barriers that count their bytes.
RING = ("UBLKCP.", "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK.TRANS64")
#: Tensor cores, by the type of the factors.
CORES = {"bfloat16": ("HMMA.16816.F32.BF16",), "float16": ("HMMA.16816.F32",), "float32": ("FFMA",)}
#: The same of whole rows, of a multiple of 128 elements.
MATRICES = ("LDSM.16.M88.4",)
#: Copies in the background.
COPIES = ("LDGSTS.",)
#: Blocks of columns through the ring, which are read transposed.
TRANSPOSED = ("LDGSTS.", "ARRIVES.LDGSTSBAR", "LDSM.16.MT88")


CASES: list[Case] = [
    Case("map", lambda x, y: (x * y + 1, x.T, x[::-1, 1:], jnp.where(x > y, x, y)), ["70x40 float32"] * 2, ["map("]),
    Case("scalars", lambda x, n: (x + n, x > n, n), ["float32", "int32=3"]),
    Case(
        "empty", lambda x, y: (x + 1, jnp.sum(x, 0), jnp.concatenate([x, y]), x @ x.T), ["0x4 float32", "3x4 float32"]
    ),
    Case("gather", lambda x, i: (x[i % 70], jnp.take(x, i, axis=1, mode="clip")), ["70x40 bfloat16", "9 int32"]),
    Case("casts", _casts, [f"5 {t}" for t in (*FLOATS, *INTS, "bool")]),
    *(
        Case(f"arithmetic_{t}", lambda x, y: (x + y, x * y, x // (y | 1), x >> 1, x ^ y, -x), [f"33 {t}"] * 2)
        for t in INTS
    ),
    *(Case(f"arithmetic_{t}", lambda x, y: (x + y, x * y, x - y, jnp.abs(x), x > y), [f"33 {t}"] * 2) for t in FLOATS),
    Case("logic", lambda x, y: (x & y, x | y, x ^ y, ~x, jnp.any(x), jnp.all(y)), ["30 bool"] * 2),
    Case("threefry", lambda k: jax.random.bits(jax.random.wrap_key_data(k), (300,)), ["2 uint32"]),
    *(Case(f"reduce_{a}", _reductions(a), ["70x40 float32"], ["reduce<"]) for a in (0, 1)),
    Case("reduce_all", lambda x: (jnp.sum(x), jnp.prod(x % 2 + 1)), ["900x3 int32"]),
    Case("reduce_together", _reductions(0), ["20000 float32"]),
    Case("reduce_argmax_bf16", lambda x: jnp.argmax(x, -1), ["2x3000 bfloat16"], ["reduce_together<Accumulators<"]),
    Case("reduce_generic", _reduce_two, ["6x700 int16", "6x700 uint8"], ["Spread::kRuns"]),
    Case("contract", lambda x, y: x @ y, ["33x50 float32", "50x20 float32"]),
    Case("contract_int", lambda x, y: jnp.einsum("abc,dcb->ad", x, y), ["4x5x6 int8", "3x6x5 int8"]),
    Case("contract_f64", lambda x, y: x @ y, ["7x9 float64", "9x5 float64"], sass=["DFMA"]),
    Case("convolution", _convolution, ["2x3x9x8 float32", "4x3x3x3 float32"]),
    *(
        Case(
            f"streamed_{t}_{m}",
            _mlp,
            [f"{m}x512 {t}", f"1024x512 {t}", f"512x1024 {t}"],
            [f"stream_rows<{t[0]}"],
            True,
            (*RING, *CORES[t], *(MATRICES if t != "float32" else ())),
        )
        for t in ("bfloat16", "float16", "float32")
        for m in (1, 3)
    ),
    # As many sums as registers hold: whole rows that are no power of two, of four columns.
    Case(
        "streamed_sums",
        lambda x, w: jnp.einsum("bk,nk->bn", x, w),
        ["4x576 bfloat16", "2048x576 bfloat16"],
        ["stream_rows<bf16, bf16, 4, 576>"],
        True,
        (*RING, *CORES["bfloat16"]),
    ),
    Case(
        "streamed_parts",
        lambda x, w: jnp.sum(x) + (x - 1) @ w.T,
        ["1x32768 float32", "150x32768 float32"],
        ["stream_rows<f32, f32, 1"],
        True,
    ),
    Case(
        "attention",
        _attention,
        ["1x64 bfloat16", "192x64 bfloat16", "96x4x16 bfloat16", "96x4x16 bfloat16", "int32=70"],
        ["update_each("],
        True,
        COPIES,
    ),
    Case(
        "update_slice",
        lambda x, u, i: lax.dynamic_update_slice_in_dim(x, u, i, 0),
        ["30x8 uint8", "4x8 uint8", "int32=5"],
    ),
    *(
        Case(f"scatter_{mode}", _scatter(mode), [f"40x5 {t}", "17 int32", f"17x5 {t}"], ["update_in_order("])
        for mode, t in (
            ("set", "float16"),
            ("add", "bfloat16"),
            ("multiply", "int32"),
            ("min", "float64"),
            ("max", "uint8"),
        )
    ),
    Case("scan_lines", _cumulative(0, False), ["30x500 float32", "30x500 int32"], ["scan<"], True),
    Case("scan_reverse", _cumulative(1, True), ["30x50 float16", "30x50 int8"], ["scan<"], True),
    Case("scan_together", _cumulative(1, False), ["2x3000 float64", "2x3000 uint64"], ["scan_together<"], True),
    Case("scan_together_reverse", _cumulative(0, True), ["1000x3 bfloat16", "1000x3 int64"], ["scan_together<"], True),
    Case("scan_generic", _generic, ["300 int32"]),
    Case("pooling", _pooling, ["8x30 float32"]),
    Case("sort_lines", _sorts(0, 1), ["60x300 float32"], ["sort_by_counting("]),
    Case("sort_many", _sorts(1, 2), ["8x90 int8", "8x90 float16", "8x90 bool"], ["sort_by_counting("]),
    Case(
        "sort_keys",
        _sorts(1, 3),
        ["2x3000 bool", "2x3000 bfloat16", "2x3000 int16", "2x3000 float64"],
        ["sort_by_digits("],
    ),
    Case("sort_wide", _sorts(0, 2), ["3000x2 int64", "3000x2 float64"], ["sort_by_digits("]),
    Case("sort_large", lambda x: (jnp.sort(x), jnp.argsort(-x)), ["20000 float32"], ["c.template memory<u32>"]),
    Case("top_k", lambda x: lax.top_k(x, 5), ["6x90 float32"], ["sort_by_counting("]),
    Case("top_k_large", lambda x: lax.top_k(x, 50), ["2x9000 bfloat16"], ["sort_by_digits("]),
    Case("loop", lambda x: lax.fori_loop(0, 5, lambda i, x: (x @ x + i) % 5, x), ["20x20 int32"], ["at.rounds[0]"]),
    *(Case(f"while_{n}", _while, ["20x20 int32", f"int32={n}"], ["while (role.running())"]) for n in (0, 3)),
    *(Case(f"nested_{n}", _nested, ["20x20 int32", f"int32={n}"]) for n in (0, 4)),
    *(
        Case(f"switch_{a}_{b}", _switches, ["20x20 int32", f"int32={a}", f"int32={b}"], ["switch (clamped("])
        for a, b in ((-1, 0), (1, 2), (1, 1), (9, 0))
    ),
    *(
        Case(
            f"matmul_{t}_{m}",
            _mlp,
            [f"{m}x512 {t}", f"2048x512 {t}", f"512x2048 {t}"],
            [f"factor<{short}, {m}, 512, kScratch>", "stream_tiles("],
            True,
            (*RING, *CORES[t]),
        )
        for t, short, m in (("bfloat16", "bf16", 5), ("float16", "f16", 16), ("bfloat16", "bf16", 20))
    ),
    # So many that weights are read once for all columns; hidden values that are too large for scratch.
    Case(
        "matmul_large",
        _mlp,
        ["40x512 bfloat16", "4096x512 bfloat16", "512x4096 bfloat16"],
        ["factor<bf16, 40, 512, kHeld>", "stream_tiles("],
        True,
        (*RING, *CORES["bfloat16"]),
    ),
    # The other factor comes from memory, part by part, while the part before is multiplied.
    Case(
        "matmul_far",
        _mlp,
        ["16x256 bfloat16", "6144x256 bfloat16", "256x6144 bfloat16"],
        ["factor<bf16, 16, 256, kScratch>"],
        True,
        (*RING, *CORES["bfloat16"]),
    ),
    # A stage holds two rows of 5 KB, or one of nearly 10.
    Case(
        "rows_of_any_length",
        _mlp,
        ["1x2560 bfloat16", "4864x2560 bfloat16", "2560x4864 bfloat16"],
        ["stream_rows<bf16, bf16, 1, 2560>", "stream_rows<bf16, bf16, 1, 4864>"],
        True,
        RING,
    ),
    # It is held for two contractions, in registers and on a shelf; or comes piece by piece, with registers for one.
    Case(
        "matmul_shelf",
        lambda x, w, v: jnp.einsum("bk,nk->bn", x, w) * jnp.einsum("bk,nk->bn", x, v),
        ["16x4096 bfloat16", *["600x4096 bfloat16"] * 2],
        ["factor<bf16, 16, 4096, kHeld>(c, ", "stream_tiles("],
        True,
        (*RING, *CORES["bfloat16"]),
    ),
    *(
        Case(
            f"matmul_pieces_{m}",
            lambda x, w: jnp.einsum("bk,nk->bn", x, w),
            [f"{m}x{k} bfloat16", f"{n}x{k} bfloat16"],
            [f"factor<bf16, {m}, {k}, kPassing>", "stream_tiles("],
            True,
            (*RING, *CORES["bfloat16"]),
        )
        for m, k, n in ((16, 4096, 1100), (32, 3072, 2200), (64, 1056, 900))
    ),
    Case(
        "matmul_24",
        lambda x, w, v: (g := jnp.einsum("bk,nk->bn", x, w)) * jax.nn.sigmoid(g) * jnp.einsum("bk,nk->bn", x, v),
        ["24x3584 bfloat16", *["700x3584 bfloat16"] * 2],
        ["factor<bf16, 24, 3584, "],
        True,
        (*RING, *CORES["bfloat16"]),
    ),
    # What is normalized takes the place of what was there before.
    Case(
        "matmul_normalized",
        _normalized,
        ["16x1024 bfloat16", "640x1024 bfloat16"],
        ["factor<bf16, "],
        True,
    ),
    # Pieces of different widths, tiles of few rows; sums are exact.
    Case(
        "matmul_odd",
        lambda x, w: jnp.einsum("bk,nk->bn", x, w),
        ["7x1120 bfloat16", "2701x1120 bfloat16"],
        ["stream_tiles("],
    ),
    *(
        Case(
            f"columns_{t}_{m}",
            _mlp_by_default,
            [f"{m}x256 {t}", f"256x1024 {t}", f"1024x256 {t}"],
            [f"stream_columns<{short}, 64, {m}, "],
            True,
            (*TRANSPOSED, *CORES[t]),
        )
        for t, short, m in (
            ("bfloat16", "bf16", 1),
            ("float16", "f16", 9),
            ("bfloat16", "bf16", 32),
        )
    ),
    # Fewer columns than workers have granules: the sum is split. Columns that are no multiple of a wide block.
    Case("columns_parts", lambda x, w: x @ w, ["3x4096 bfloat16", "4096x64 bfloat16"], ["stream_columns<"]),
    Case("columns_odd", lambda x, w: x @ w, ["12x1120 float16", "1120x832 float16"], ["stream_columns<"]),
    Case(
        "columns_heads",
        _heads,
        ["2x1024 bfloat16", "1024x8x64 bfloat16", "1024x4x32 bfloat16", "1024x128 bfloat16"],
        ["stream_columns<"],
        True,
    ),
    # A weight for each of some rows, whose other factor is too large for scratch.
    Case(
        "columns_batch",
        lambda x, w: jnp.einsum("ebk,ekn->ebn", x, w),
        ["3x20x512 bfloat16", "3x512x256 bfloat16"],
        ["stream_columns<bf16, 64, 20, 512, "],
    ),
    Case("columns_loop", _columns_loop, ["1x256 bfloat16", "256x256 bfloat16", "int32=5"], ["stream_columns<"], True),
    Case(
        "columns_and_tiles",
        _both,
        ["7x512 bfloat16", "512x1024 bfloat16", "1024x512 bfloat16"],
        ["stream_columns<", "stream_tiles(", "kTiles = 3"],
        # Fences between the kinds of copies, in two places, and one where the barriers of the ring are made.
        sass=(*RING, *TRANSPOSED, *["FENCE.VIEW.ASYNC"] * 3),
    ),
    *(
        Case(
            f"attention_direct_{g}",
            _grouped(nothing),
            # More heads than half of the workers, so that a task has all keys of one.
            [f"{h}x{g}x{d} bfloat16", *[f"{n}x{h}x{d} bfloat16"] * 2, *[f"448x{h}x{d} bfloat16"] * 2, f"int32={at}"],
            [f"multiply_rows<bf16, {g}, {d}>(\n      c, {rows}", f"multiply_columns<bf16, {g}, {d}>(\n      c, {rows}"],
            True,
            CORES["bfloat16"],
        )
        for n, h, g, d, at, nothing, rows in (
            (1, 67, 4, 64, 300, -jnp.inf, "live0"),
            (3, 67, 9, 128, 2, -1e9, "448"),
            (1, 120, 2, 96, 447, -jnp.inf, "live0"),
        )
    ),
    Case("streamed_loop", _streamed_loop, ["256 float32", "256x256 float32", "int32=5"], ["stream_rows<"], True),
    Case(
        "scan_outputs", lambda x, w: lax.scan(lambda c, a: ((c @ w + a) % 7, c), x[0], x), ["6x30 int32", "30x30 int32"]
    ),
]


@functools.cache
def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
