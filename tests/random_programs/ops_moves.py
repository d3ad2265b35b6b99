"""Instructions that move elements: shapes, slices, concatenation, padding."""

from __future__ import annotations

import math

from jax import lax

from tests.random_programs import values
from tests.random_programs.generator import Gen, Skip
from tests.random_programs.registry import op
from tests.random_programs.values import ALL, NUMBERS, Info


def factored(g: Gen, size: int, most: int = 4) -> tuple[int, ...]:
    """A random shape of so many elements."""
    shape: list[int] = []
    for _ in range(g.rng.randint(0, most - 1)):
        divisors = [d for d in range(1, size + 1) if size % d == 0] if size else [0, 1, 3]
        shape.append(g.rng.choice(divisors))
        size = size // shape[-1] if shape[-1] else 1
    shape.insert(g.rng.randint(0, len(shape)), size)
    if math.prod(shape) == 1 and g.chance(0.3):
        return ()
    return tuple(shape)


@op("reshape", exact=ALL, smooth=ALL)
def _reshape(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    shape = factored(g, x.info.size)
    if math.prod(shape) != x.info.size:
        raise Skip("empty")
    g.emit(f"lax.reshape({{0}}, {shape})", [x], x.info.of_shape(*shape))


@op("squeeze", exact=ALL, smooth=ALL)
def _squeeze(g: Gen, dtype: str) -> None:
    found = g.find(lambda i: i.dtype == dtype and 1 in i.shape)
    x = found if found is not None else g.make((1, *g.shape(0, 3)), dtype)
    axis = g.rng.choice([d for d, n in enumerate(x.info.shape) if n == 1])
    shape = x.info.shape[:axis] + x.info.shape[axis + 1 :]
    g.emit(f"lax.squeeze({{0}}, ({axis},))", [x], x.info.of_shape(*shape))


@op("broadcast_in_dim", exact=ALL, smooth=ALL)
def _broadcast(g: Gen, dtype: str) -> None:
    x = g.take(dtype, max_rank=3)
    shape = list(x.info.shape)
    axes = list(range(len(shape)))
    for _ in range(g.rng.randint(0, 4 - len(shape))):
        place = g.rng.randint(0, len(shape))
        shape.insert(place, g.rng.choice([1, 2, 3, 5]))
        axes = [a + (a >= place) for a in axes]
    for k, axis in enumerate(axes):
        if x.info.shape[k] == 1 and g.chance(0.5):
            shape[axis] = g.rng.choice([1, 2, 7])
    if math.prod(shape) > g.limit:
        raise Skip("too large")
    g.emit(f"lax.broadcast_in_dim({{0}}, {tuple(shape)}, {tuple(axes)})", [x], x.info.of_shape(*shape))


@op("transpose", exact=ALL, smooth=ALL, weight=1.5)
def _transpose(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 2)
    order = list(range(x.info.rank))
    g.rng.shuffle(order)
    if order == sorted(order):
        order.reverse()
    shape = [x.info.shape[d] for d in order]
    g.emit(f"lax.transpose({{0}}, {tuple(order)})", [x], x.info.of_shape(*shape))


@op("rev", exact=ALL, smooth=ALL)
def _rev(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    axes = [d for d in range(x.info.rank) if g.chance(0.6)] or [0]
    g.emit(f"lax.rev({{0}}, {tuple(axes)})", [x], x.info)


@op("slice", exact=ALL, smooth=ALL, weight=1.5)
def _slice(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    starts, limits, strides, shape = [], [], [], []
    for n in x.info.shape:
        a = g.rng.randint(0, n)
        a, b = sorted((a if g.chance(0.5) else 0, g.rng.randint(0, n) if g.chance(0.6) else n))
        if b == a and n and g.chance(0.9):
            a, b = 0, n
        step = g.rng.choice([1, 1, 1, 2, 3])
        starts.append(a)
        limits.append(b)
        strides.append(step)
        shape.append(-(-(b - a) // step))
    g.emit(f"lax.slice({{0}}, {starts}, {limits}, {strides})", [x], x.info.of_shape(*shape))


@op("pad", exact=ALL, smooth=ALL, weight=1.5)
def _pad(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    fill = g.make((), dtype)
    config, shape = [], []
    for n in x.info.shape:
        low, high = g.rng.randint(-2, 3), g.rng.randint(-2, 3)
        interior = g.rng.choice([0, 0, 1, 2])
        grown = n + max(n - 1, 0) * interior
        if grown + low + high < 0:
            low, high = 0, 1
        config.append((low, high, interior))
        shape.append(grown + low + high)
    if math.prod(shape) > g.limit:
        raise Skip("too large")
    info = values.union(x.info, fill.info).of_shape(*shape)
    g.emit(f"lax.pad({{0}}, {{1}}, {config})", [x, fill], info)


@op("concatenate", exact=ALL, smooth=ALL, weight=1.5)
def _concatenate(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, limit=g.limit // 2)
    axis = g.rng.randrange(x.info.rank)
    parts = [x]
    for _ in range(g.rng.randint(1, 3)):
        shape = list(x.info.shape)
        shape[axis] = g.rng.choice([0, 1, 2, 5, x.info.shape[axis]])
        parts.append(g.make(tuple(shape), dtype) if g.chance(0.9) else x)
    g.rng.shuffle(parts)
    shape = list(x.info.shape)
    shape[axis] = sum(p.info.shape[axis] for p in parts)
    if math.prod(shape) > g.limit:
        raise Skip("too large")
    places = ", ".join(f"{{{k}}}" for k in range(len(parts)))
    info = values.union(*(p.info for p in parts)).of_shape(*shape)
    g.emit(f"lax.concatenate([{places}], {axis})", parts, info)


@op("stack", exact=ALL, smooth=ALL)
def _stack(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 0, 3, limit=g.limit // 3)
    parts = [x, *(g.make(x.info.shape, dtype) for _ in range(g.rng.randint(0, 2)))]
    axis = g.rng.randint(0, x.info.rank)
    shape = (*x.info.shape[:axis], len(parts), *x.info.shape[axis:])
    places = ", ".join(f"{{{k}}}" for k in range(len(parts)))
    info = values.union(*(p.info for p in parts)).of_shape(*shape)
    g.emit(f"jnp.stack([{places}], {axis})", parts, info)


@op("split", exact=ALL, smooth=ALL)
def _split(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    axis = g.rng.randrange(x.info.rank)
    n = x.info.shape[axis]
    cuts = sorted(g.rng.randint(0, n) for _ in range(g.rng.randint(1, 2)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, n])]
    infos = [x.info.of_shape(*x.info.shape[:axis], k, *x.info.shape[axis + 1 :]) for k in sizes]
    g.emit_many(f"lax.split({{0}}, {sizes}, {axis})", [x], infos)


@op("unstack", exact=ALL, smooth=ALL)
def _unstack(g: Gen, dtype: str) -> None:
    found = g.find(lambda i: i.dtype == dtype and any(1 <= n <= 4 for n in i.shape))
    x = found if found is not None else g.make((g.rng.randint(1, 3), *g.shape(0, 2)), dtype)
    axis = g.rng.choice([d for d, n in enumerate(x.info.shape) if 1 <= n <= 4])
    info = x.info.of_shape(*x.info.shape[:axis], *x.info.shape[axis + 1 :])
    g.emit_many(f"jnp.unstack({{0}}, axis={axis})", [x], [info] * x.info.shape[axis])


@op("tile", exact=ALL, smooth=ALL)
def _tile(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, limit=g.limit // 4)
    times = [g.rng.choice([1, 2, 3]) for _ in x.info.shape]
    shape = [n * k for n, k in zip(x.info.shape, times)]
    if math.prod(shape) > g.limit:
        raise Skip("too large")
    name = "lax.tile" if hasattr(lax, "tile") else "jnp.tile"
    g.emit(f"{name}({{0}}, {tuple(times)})", [x], x.info.of_shape(*shape))


@op("iota", exact=NUMBERS, smooth=NUMBERS, weight=0.7)
def _iota(g: Gen, dtype: str) -> None:
    shape = g.shape(1)
    axis = g.rng.randrange(len(shape))
    top = max(shape[axis] - 1, 0)
    info = values.number(shape, dtype, 0, top)
    if not g.exact and values.is_float(dtype):
        info = Info(shape, dtype, 0, top, values.ROUGH)
    if not info.exact():
        raise Skip("too long")
    g.emit(f"lax.broadcasted_iota({dtype}, {shape}, {axis})", [], info)
