"""Instructions that address elements by computed positions: dynamic slices, gathers, scatters, sorts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from tests.random_programs import values
from tests.random_programs.generator import Gen, Skip, Value
from tests.random_programs.registry import op
from tests.random_programs.values import ALL, FLOATS, INTS, LOOSE, NUMBERS, ROUGH, Info


def _starts(g: Gen, rank: int) -> list[Value]:
    dtype = g.rng.choice(["s32", "s32", "s64", "u8", "s8", "u32", "u64", "s16"])
    return [g.make((), dtype) for _ in range(rank)]


def _window(g: Gen, shape: tuple[int, ...]) -> list[int]:
    return [g.rng.randint(0 if n == 0 or g.chance(0.03) else 1, n) for n in shape]


def _places(first: int, count: int) -> str:
    return ", ".join(f"{{{first + k}}}" for k in range(count))


@op("dynamic_slice", exact=ALL, smooth=ALL, weight=1.5)
def _dynamic_slice(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    starts, sizes = _starts(g, x.info.rank), _window(g, x.info.shape)
    code = f"lax.dynamic_slice({{0}}, [{_places(1, len(starts))}], {sizes})"
    g.emit(code, [x, *starts], x.info.of_shape(*sizes))


@op("dynamic_update_slice", exact=ALL, smooth=ALL, weight=2)
def _dynamic_update_slice(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    starts = _starts(g, x.info.rank)
    new = g.make(tuple(_window(g, x.info.shape)), dtype)
    code = f"lax.dynamic_update_slice({{0}}, {{1}}, [{_places(2, len(starts))}])"
    g.emit(code, [x, new, *starts], values.union(x.info, new.info))


def _indices(g: Gen, batch: tuple[int, ...], limits: list[int], *, inside: bool) -> Value:
    """Start positions, one per axis with a limit: mostly in bounds, or all of them."""
    dtype = g.rng.choice(["s32", "s32", "s32", "s64", "u32", "s8", "u8", "u16", "s16", "u64"])
    shape = (*batch, len(limits))
    if inside or g.chance(0.5):
        top = min(limits, default=0)
        if inside and top < 0:
            raise Skip("nothing is in bounds")
        low, high = (0, top) if inside else (-2, max(limits, default=0) + 2)
        low, high = max(low, values.int_range(dtype)[0]), min(high, values.int_range(dtype)[1])
        found = g.make(shape, dtype)
        if low <= found.info.lo and found.info.hi <= high:
            return found
        if g.chance(0.5) or low < 0:
            info = values.integer(shape, dtype, low, high)
            return g.emit(f"lax.clamp({dtype}({low}), {{0}}, {dtype}({high}))", [found], info)
        if high + 1 > values.int_range(dtype)[1]:
            raise Skip("too many positions for the type")
        info = values.integer(shape, dtype, 0, high)
        return g.emit(f"jnp.remainder({{0}}, {dtype}({high + 1}))", [found], info)
    return g.make(shape, dtype)


@dataclass(frozen=True)
class _Windows:
    """Windows of an array at computed positions.

    Attributes:
        addressed: axes with a start position, in random order.
        collapsed: those of them that disappear (window size 1).
        batching: axes that go along with the first axes of the positions.
        sizes: of a window, along every axis of the array.
        limits: last start position in bounds of each addressed axis.
        batch: shape of the positions.
    """

    addressed: list[int]
    collapsed: list[int]
    batching: list[int]
    sizes: list[int]
    limits: list[int]
    batch: tuple[int, ...]

    def interleaved(self, g: Gen, limit: int) -> tuple[list[int], list[int]]:
        """Places of the window's axes among those of the positions, and the shape of all."""
        window = [n for d, n in enumerate(self.sizes) if d not in self.collapsed and d not in self.batching]
        rank = len(self.batch) + len(window)
        if rank > 5:
            raise Skip("rank")
        places = sorted(g.rng.sample(range(rank), len(window)))
        shape, batch_left, window_left = [], list(self.batch), list(window)
        for axis in range(rank):
            shape.append(window_left.pop(0) if axis in places else batch_left.pop(0))
        if math.prod(shape) > limit:
            raise Skip("too large")
        return places, shape

    def numbers(self, name: str, places: list[int]) -> str:
        """The dimension numbers, an object of lax."""
        lists = (places, self.collapsed, self.addressed, self.batching, range(len(self.batching)))
        return f"lax.{name}({', '.join(str(tuple(numbers)) for numbers in lists)})"


def _windows(g: Gen, shape: tuple[int, ...], batching_chance: float, least: int = 0) -> _Windows:
    """Windows that address at least so many axes."""
    axes = [d for d, n in enumerate(shape) if n > 0]
    if len(axes) < least:
        raise Skip("nothing to address")
    g.rng.shuffle(axes)
    addressed = axes[: g.rng.randint(least if g.chance(0.1) else min(1, len(axes)), len(axes))]
    collapsed = sorted(d for d in addressed if g.chance(0.6))
    batching: list[int] = []
    if len(shape) > 1 and shape[0] in (1, 2, 3, 4, 5) and 0 not in addressed and g.chance(batching_chance):
        batching = [0]
    sizes = [1 if d in collapsed or d in batching else g.rng.randint(1, n) if n else 0 for d, n in enumerate(shape)]
    batch = g.shape(0, 2)
    if batching:
        batch = (shape[0], *batch[:1])
    return _Windows(addressed, collapsed, batching, sizes, [shape[d] - sizes[d] for d in addressed], batch)


@op("gather", exact=ALL, smooth=ALL, weight=2.5)
def _gather(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, 3)
    if g.chance(0.3):
        _take(g, x)
        return
    windows = _windows(g, x.info.shape, 0.5)
    mode = g.rng.choice(["clip", "clip", "fill", "fill", "promise_in_bounds"])
    indices = _indices(g, windows.batch, windows.limits, inside=mode == "promise_in_bounds")
    places, out = windows.interleaved(g, g.limit)
    extra, info = "", x.info.of_shape(*out)
    if mode == "fill":
        info, extra = _filled(g, info)
    numbers = windows.numbers("GatherDimensionNumbers", places)
    code = f"lax.gather({{0}}, {{1}}, {numbers}, {tuple(windows.sizes)}, mode='{mode}'{extra})"
    g.emit(code, [x, indices], info)


def _filled(g: Gen, info: Info) -> tuple[Info, str]:
    """What a gather in "fill" mode yields; without a fill value floats would be NaN and integers extreme."""
    dtype = info.dtype
    if not values.is_float(dtype) and g.chance(0.5):
        return values.full(info.shape, dtype), ""
    c = True if dtype == "b1" else g.constant(dtype)
    frac = g.small(dtype)[1] if values.is_float(dtype) else 0
    fill = values.number(info.shape, dtype, c, c, frac)
    return values.union(info, fill), f", fill_value={dtype}({c})"


def _take(g: Gen, x: Value) -> None:
    """Indexing as users write it."""
    axis = g.rng.randrange(x.info.rank)
    n = x.info.shape[axis]
    batch = g.shape(0, 2)
    if n == 0:
        raise Skip("empty axis")
    shape = (*x.info.shape[:axis], *batch, *x.info.shape[axis + 1 :])
    if math.prod(shape) > g.limit or len(shape) > 5:
        raise Skip("too large")
    indices = g.make(batch, g.rng.choice(["s32", "s64", "u8"]))
    code = f"jnp.take({{0}}, {{1}}, axis={axis}, mode='clip')"
    g.emit(code, [x, indices], x.info.of_shape(*shape))


def _scatter(g: Gen, dtype: str, name: str) -> None:
    x = g.take(dtype, 1, 3)
    # Where no axis is addressed XLA (0.10, 0.11) applies only the last of all updates on the CPU.
    windows = _windows(g, x.info.shape, 0.4, least=1)
    places, updates = windows.interleaved(g, g.limit // 2)
    mode = g.rng.choice(["clip", "fill", "fill", "promise_in_bounds"])
    indices = _indices(g, windows.batch, windows.limits, inside=mode == "promise_in_bounds")
    new = g.make(tuple(updates), dtype)
    x, new, info = _scattered(g, x, new, name, max(1, math.prod(windows.batch)))
    numbers = windows.numbers("ScatterDimensionNumbers", places)
    g.emit(f"lax.{name}({{0}}, {{1}}, {{2}}, {numbers}, mode='{mode}')", [x, indices, new], info)


_SCATTERS = {"scatter": ALL, "scatter_add": NUMBERS, "scatter_sub": NUMBERS, "scatter_mul": INTS}
for _name in ("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"):
    op(
        _name,
        exact=NUMBERS if _name in ("scatter_add", "scatter_sub", "scatter_mul") else ALL,
        smooth=_SCATTERS.get(_name, NUMBERS),
    )(partial(_scatter, name=_name))


def _scattered(g: Gen, x: Value, new: Value, name: str, count: int) -> tuple[Value, Value, Info]:
    """Operands that leave room for ``count`` updates of one element, and what comes out."""
    shape, dtype = x.info.shape, x.info.dtype
    info = values.union(x.info, new.info)
    if not values.is_float(dtype):
        return x, new, info if name in ("scatter", "scatter_min", "scatter_max") else values.full(shape, dtype)
    if name == "scatter":
        return x, new, info
    if name in ("scatter_add", "scatter_sub"):
        bound, frac = g.small(dtype)
        room = values.ROUGH_BOUND if not g.exact else 2.0 ** values.PRECISION[dtype] / 2.0 ** max(x.info.frac, 0) / 2
        if x.info.bound > room / 2 or new.info.bound * count > room / 2 or x.info.frac > frac:
            x = g.tame(x, bound, 0)
            most = 1 if g.exact else 2.0 ** -math.ceil(math.log2(count + 1))
            new = g.tame(new, most, 0 if g.exact else ROUGH)
        top = x.info.bound + count * new.info.bound
        frac = values.frac_of(x.info, new.info)
        return x, new, values.number(shape, dtype, -top, top, frac, LOOSE)
    if name == "scatter_mul":
        # Products of ones and zeros of either sign.
        new = g.tame(new, 1, 0)
        top = x.info.bound
        return x, new, values.number(shape, dtype, -top, top, x.info.frac, LOOSE)
    if max(x.info.zeros, new.info.zeros):
        info = values.number(shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    return x, new, info


@op("scatter_apply", exact=NUMBERS, weight=0.5)
def _scatter_apply(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, 1, nonempty=True)
    n = x.info.shape[0]
    # Distinct positions: a function applied twice would be exact as well, but grow.
    count = g.rng.randint(1, n)
    first = g.rng.randint(0, n - count)

    def transfer(a: Info) -> Info:
        return values.number(a.shape, dtype, min(2 * a.lo, a.lo), max(2 * a.hi, a.hi), a.frac, LOOSE)

    info, (x,) = g.fit(transfer, x)
    code = f"{{0}}.at[{first}:{first + count}].apply(lambda x: x + x)"
    g.emit(code, [x], info)


@op("at_set", exact=ALL, smooth=ALL, weight=0.7)
def _at_set(g: Gen, dtype: str) -> None:
    """An update as users write it; negative positions count from the end, those outside are dropped."""
    x = g.take(dtype, 1, 3, nonempty=True)
    row = g.make(x.info.shape[1:], dtype)
    at = g.make((), g.rng.choice(["s32", "s64"]))
    g.emit("{0}.at[{1}].set({2})", [x, at, row], values.union(x.info, row.info))


@op("sort", exact=ALL, smooth=INTS, weight=1.5)
def _sort(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    axis = g.rng.randrange(x.info.rank)
    if g.chance(0.4):
        _single_sort(g, x, axis)
        return
    others = [g.make(x.info.shape, g.rng.choice(list(ALL))) for _ in range(g.rng.randint(1, 2))]
    keys = g.rng.randint(1, 2)
    if any(v.info.rough for v in [x, *others][:keys]):
        raise Skip("the order of rounded values")
    code = f"lax.sort(({_places(0, 1 + len(others))},), dimension={axis}, num_keys={keys}, is_stable=True)"
    g.emit_many(code, [x, *others], [v.info for v in [x, *others]])


@op("sort_one", exact=NUMBERS, smooth=NUMBERS)
def _sort_one(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    _single_sort(g, x, g.rng.randrange(x.info.rank))


def _single_sort(g: Gen, x: Value, axis: int) -> None:
    stable = g.chance(0.5)
    info = x.info
    if info.zeros and not stable:
        info = values.number(info.shape, info.dtype, info.lo, info.hi, info.frac, LOOSE)
    g.emit(f"lax.sort({{0}}, dimension={axis}, is_stable={stable})", [x], info)


@op("argsort", exact=NUMBERS, smooth=INTS, weight=0.7)
def _argsort(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    axis = g.rng.randrange(x.info.rank)
    info = values.integer(x.info.shape, "s64", 0, max(0, x.info.shape[axis] - 1))
    g.emit(f"jnp.argsort({{0}}, axis={axis})", [x], info)


@op("top_k", exact=ALL, smooth=NUMBERS)
def _top_k(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, nonempty=True)
    if x.info.zeros == LOOSE and not x.info.rough:
        x = Value(x.name, x.info)
        absolute = values.number(x.info.shape, dtype, 0, x.info.bound, x.info.frac)
        x = g.emit("lax.abs({0})", [x], absolute)
    k = g.rng.randint(0 if g.chance(0.05) else 1, x.info.shape[-1])
    shape = (*x.info.shape[:-1], k)
    if x.info.rough:
        g.emit(f"lax.top_k({{0}}, {k})[0]", [x], x.info.of_shape(*shape))
        return
    positions = values.integer(shape, "s32", 0, x.info.shape[-1] - 1)
    g.emit_many(f"lax.top_k({{0}}, {k})", [x], [x.info.of_shape(*shape), positions])


@op("approx_top_k", exact=FLOATS, smooth=FLOATS, weight=0.4)
def _approx_top_k(g: Gen, dtype: str) -> None:
    """Values only: which of equal elements is taken is not promised."""
    x = g.take(dtype, 1, nonempty=True)
    k = g.rng.randint(1, x.info.shape[-1])
    info = x.info.of_shape(*x.info.shape[:-1], k)
    if info.zeros:
        info = values.number(info.shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    g.emit(f"lax.approx_{g.rng.choice(['max', 'min'])}_k({{0}}, {k})[0]", [x], info)
