"""Reductions, contractions, running sums, windows."""

from __future__ import annotations

import math
from functools import partial

from tests.random_programs import values
from tests.random_programs.generator import Gen, Skip, Value
from tests.random_programs.registry import op
from tests.random_programs.values import ALL, FLOATS, INTS, LOOSE, NUMBERS, PRECISION, ROUGH, ROUGH_BOUND, Info


def addable(g: Gen, x: Value, terms: int) -> Value:
    """``x`` small enough that so many of its elements can be added in any order."""
    terms = max(terms, 1)
    dtype = x.info.dtype
    if not values.is_float(dtype):
        return x
    if x.info.rough:
        # f16 must hold the sum, and later instructions want moderate values.
        return x if x.info.bound * terms <= ROUGH_BOUND else g.tame(x, 2.0 ** -math.ceil(math.log2(terms)), ROUGH)
    if x.info.exact(terms):
        return x
    room = 2 ** PRECISION[dtype] // terms
    if room < 1:
        raise Skip("too many terms")
    return g.tame(x, min(room, g.small(dtype)[0]), 0)


def summed(x: Info, terms: int, shape: tuple[int, ...]) -> Info:
    """Info of sums; a reduction may start from +0 or from its first element."""
    if not values.is_float(x.dtype):
        return values.full(shape, x.dtype)
    lo, hi = min(0, x.lo * terms), max(0, x.hi * terms)
    return values.number(shape, x.dtype, lo, hi, x.frac, LOOSE)


def _axes(g: Gen, x: Value) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Reduced axes, the shape that is left, and the number of terms."""
    rank = x.info.rank
    axes = tuple(d for d in range(rank) if g.chance(0.5)) or ((g.rng.randrange(rank),) if rank else ())
    shape = tuple(n for d, n in enumerate(x.info.shape) if d not in axes)
    return axes, shape, math.prod(x.info.shape[d] for d in axes)


def _limit(g: Gen, dtype: str) -> int:
    return min(g.limit, 2 ** PRECISION[dtype]) if g.exact and values.is_float(dtype) else g.limit


@op("reduce_sum", exact=NUMBERS, smooth=NUMBERS, weight=2)
def _reduce_sum(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, limit=_limit(g, dtype))
    axes, shape, terms = _axes(g, x)
    x = addable(g, x, terms)
    g.emit(f"lax.reduce_sum({{0}}, {axes})", [x], summed(x.info, terms, shape))


@op("mean", smooth=FLOATS)
def _mean(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, nonempty=True)
    axis = g.rng.randrange(x.info.rank)
    shape = tuple(1 if d == axis else n for d, n in enumerate(x.info.shape))
    g.emit(f"jnp.mean({{0}}, axis={axis}, keepdims=True)", [x], x.info.of_shape(*shape))


@op("reduce_prod", exact=NUMBERS, smooth=INTS)
def _reduce_prod(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    axes, shape, _ = _axes(g, x)
    if values.is_float(dtype):
        x = g.tame(x, 1, 0)
        info = values.number(shape, dtype, -1, 1, 0, LOOSE)
    else:
        info = values.full(shape, dtype)
    g.emit(f"lax.reduce_prod({{0}}, {axes})", [x], info)


def _extreme(g: Gen, dtype: str, name: str) -> None:
    x = g.take(dtype, 1, nonempty=dtype in FLOATS)
    axes, shape, terms = _axes(g, x)
    info = x.info.of_shape(*shape)
    if terms == 0:
        info = values.full(shape, dtype)
    elif info.zeros:
        info = values.number(shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    g.emit(f"lax.{name}({{0}}, {axes})", [x], info)


for _name in ("reduce_max", "reduce_min"):
    op(_name, exact=ALL, smooth=ALL)(partial(_extreme, name=_name))


def _bitwise(g: Gen, dtype: str, name: str) -> None:
    x = g.take(dtype, 1)
    axes, shape, _ = _axes(g, x)
    g.emit(f"lax.{name}({{0}}, {axes})", [x], values.full(shape, dtype))


for _name in ("reduce_and", "reduce_or", "reduce_xor"):
    op(_name, exact=("b1", *INTS))(partial(_bitwise, name=_name))


def _position(g: Gen, dtype: str, name: str) -> None:
    x = g.take(dtype, 1, nonempty=True)
    axis = g.rng.randrange(x.info.rank)
    n = x.info.shape[axis]
    shape = tuple(m for d, m in enumerate(x.info.shape) if d != axis)
    to = g.rng.choice(["s32", "s32", "s64", "u32", "u64"] + (["u8", "s8", "s16"] if n < 128 else []))
    g.emit(f"lax.{name}({{0}}, {axis}, {to})", [x], values.integer(shape, to, 0, n - 1))


for _name in ("argmax", "argmin"):
    op(_name, exact=ALL)(partial(_position, name=_name))


@op("reduce", exact=ALL, weight=0.5)
def _reduce(g: Gen, dtype: str) -> None:
    """The largest element and where it is, by a computation of the user's."""
    x = g.take(dtype, 1, nonempty=True)
    axes, shape, terms = _axes(g, x)
    if terms < 2:
        raise Skip("empty, or XLA forgets the start")
    if x.info.zeros == LOOSE:
        absolute = values.number(x.info.shape, dtype, 0, x.info.bound, x.info.frac)
        x = g.emit("lax.abs({0})", [x], absolute)
    start = -1 if values.is_float(dtype) else max(-1, values.int_range(dtype)[0])
    lo, hi = min(x.info.lo, start), max(x.info.hi, start)
    infos = [
        values.number(shape, dtype, lo, hi, x.info.frac, LOOSE if x.info.zeros else 0),
        values.integer(shape, "s32", -1, x.info.size),
    ]
    code = f"helpers.largest({{0}}, {dtype}({start}), {axes})"
    g.emit_many(code, [x], infos)


# -- running combinations --------------------------------------------------------------------------------------


def _running(g: Gen, dtype: str, name: str) -> None:
    x = g.take(dtype, 1, limit=_limit(g, dtype))
    axis = g.rng.randrange(x.info.rank)
    n = x.info.shape[axis]
    info = x.info
    if name == "cumsum":
        x = addable(g, x, n)
        info = summed(x.info, n, x.info.shape)
    elif name == "cumprod":
        if values.is_float(dtype):
            x = g.tame(x, 1, 0)
            info = values.number(x.info.shape, dtype, -1, 1, 0, LOOSE)
        else:
            info = values.full(x.info.shape, dtype)
    elif info.zeros:
        info = values.number(info.shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    g.emit(f"lax.{name}({{0}}, axis={axis}, reverse={g.chance(0.4)})", [x], info)


for _name in ("cumsum", "cumprod", "cummax", "cummin"):
    op(_name, exact=NUMBERS, smooth=INTS if _name == "cumprod" else NUMBERS)(partial(_running, name=_name))


@op("cumlogsumexp", smooth=FLOATS)
def _cumlogsumexp(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    x = g.tame(x, 4, ROUGH)
    axis = g.rng.randrange(x.info.rank)
    code = f"lax.cumlogsumexp({{0}}, axis={axis}, reverse={g.chance(0.4)})"
    g.emit(code, [x], values.rough(x.info.shape, dtype, -4, 12))


@op("softmax", smooth=FLOATS)
def _softmax(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, nonempty=True)
    x = g.tame(x, 16, ROUGH)
    axis = g.rng.randrange(x.info.rank)
    name, lo, hi = g.rng.choice([("softmax", 0, 1), ("log_softmax", -32, 0)])
    g.emit(f"jax.nn.{name}({{0}}, axis={axis})", [x], values.rough(x.info.shape, dtype, lo, hi))


@op("logsumexp", smooth=FLOATS)
def _logsumexp(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1, nonempty=True)
    x = g.tame(x, 8, ROUGH)
    axes, shape, _ = _axes(g, x)
    g.emit(f"jax.nn.logsumexp({{0}}, axis={axes})", [x], values.rough(shape, dtype, -8, 16))


# -- contractions ----------------------------------------------------------------------------------------------


@op("dot_general", exact=ALL, smooth=NUMBERS, weight=3)
def _dot_general(g: Gen, dtype: str) -> None:
    """Any number of batch, contracted and free axes, in any order on both sides."""
    a = g.take(dtype, 1, 3, limit=g.limit // 2)
    axes = list(range(a.info.rank))
    g.rng.shuffle(axes)
    contracted = axes[: g.rng.choice([0, 1, 1, 1, 2])]
    batch = [d for d in axes if d not in contracted][: g.rng.choice([0, 0, 1])]
    b_axes = [(d, a.info.shape[d]) for d in [*contracted, *batch]]
    b_free = [g.rng.choice([1, 2, 3, 5, 8, 16, 17]) for _ in range(g.rng.randint(0, 2))]
    b_axes += [(-1 - k, n) for k, n in enumerate(b_free)]
    g.rng.shuffle(b_axes)
    shape = tuple(n for _, n in b_axes)
    where = [d for d, _ in b_axes]
    out = [a.info.shape[d] for d in batch]
    out += [n for d, n in enumerate(a.info.shape) if d not in contracted and d not in batch]
    out += [n for d, n in b_axes if d < 0]
    terms = math.prod(a.info.shape[d] for d in contracted)
    if math.prod(shape) > g.limit or math.prod(out) > g.limit or math.prod(out) * max(terms, 1) > 1 << 15:
        raise Skip("too large")
    b = g.make(shape, dtype)
    numbers = (
        f"(({tuple(contracted)}, {tuple(where.index(d) for d in contracted)}), "
        f"({tuple(batch)}, {tuple(where.index(d) for d in batch)}))"
    )
    extra, to = "", dtype
    wider = {"bf16": "f32", "f16": "f32", "s8": "s32", "s16": "s32", "u8": "u32", "s32": "s64", "u16": "u32"}
    if dtype in wider and g.chance(0.4):
        to = wider[dtype]
        extra = f", preferred_element_type={to}"
    a, b, info = _products(g, a, b, max(terms, 1), tuple(out), to)
    if dtype == "f32" and g.chance(0.3):
        extra += ", precision=lax.Precision.HIGHEST"
    g.emit(f"lax.dot_general({{0}}, {{1}}, {numbers}{extra})", [a, b], info)


def _products(g: Gen, a: Value, b: Value, terms: int, shape: tuple[int, ...], to: str) -> tuple[Value, Value, Info]:
    """Factors small enough for a sum of so many products, and the info of the sum."""
    if not values.is_float(to):
        return a, b, values.full(shape, to)

    def result(x: Info, y: Info) -> Info:
        lo, hi = values.product(x, y)
        frac = values.frac_of(x, y, add=True)
        return values.number(shape, to, min(0, lo * terms), max(0, hi * terms), frac, LOOSE)

    for bound in (None, g.small(a.info.dtype)[0], 2, 1):
        if bound is not None:
            a, b = g.tame(a, bound, 0), g.tame(b, bound, 0)
        info = result(a.info, b.info)
        if info.bound <= ROUGH_BOUND if info.rough else info.exact():
            return a, b, info
    if not g.exact:
        a = g.tame(a, 1, ROUGH)
        b = addable(g, b, terms)
        return a, b, result(a.info, b.info)
    raise Skip("too many terms")


@op("conv_general_dilated", exact=ALL, smooth=FLOATS, weight=0.7)
def _conv(g: Gen, dtype: str) -> None:
    spatial = g.rng.choice([1, 1, 2])
    groups = g.rng.choice([1, 1, 1, 2])
    features = g.rng.choice([1, 2, 3])
    batch = g.rng.choice([1, 2])
    lhs_spec, rhs_spec, out_spec = g.rng.choice(
        [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("NHWC", "OIHW", "NCHW"), ("CNHW", "IOHW", "CNHW")]
    )
    if spatial == 1:
        lhs_spec, rhs_spec, out_spec = (s.replace("W", "") for s in (lhs_spec, rhs_spec, out_spec))
    size = {"H": g.rng.randint(1, 9), "W": g.rng.randint(1, 7), "N": batch, "C": features * groups}
    kernel = {"H": g.rng.randint(1, 3), "W": g.rng.randint(1, 3), "I": features, "O": groups * g.rng.choice([1, 2])}
    a = g.make(tuple(size[c] for c in lhs_spec), dtype)
    b = g.make(tuple(kernel[c] for c in rhs_spec), dtype)
    strides = [g.rng.choice([1, 1, 2]) for _ in range(spatial)]
    padding = [(g.rng.randint(-1, 2), g.rng.randint(-1, 2)) for _ in range(spatial)]
    lhs_dilation = [g.rng.choice([1, 1, 2]) for _ in range(spatial)]
    rhs_dilation = [g.rng.choice([1, 1, 2]) for _ in range(spatial)]
    out = {"N": batch, "C": kernel["O"]}
    for k, axis in enumerate("HW"[:spatial]):
        low, high = padding[k]
        dilated = (size[axis] - 1) * lhs_dilation[k] + 1
        window = (kernel[axis] - 1) * rhs_dilation[k] + 1
        if dilated + low < 1 or dilated + high < 1 or dilated + low + high < window:
            padding[k] = (window, 0)
            low, high = padding[k]
        out[axis] = (dilated + low + high - window) // strides[k] + 1
    terms = features * math.prod(kernel[c] for c in "HW"[:spatial])
    shape = tuple(out[c] for c in out_spec)
    a, b, info = _products(g, a, b, terms, shape, dtype)
    code = (
        f"lax.conv_general_dilated({{0}}, {{1}}, {strides}, {padding}, {lhs_dilation}, {rhs_dilation}, "
        f"('{lhs_spec}', '{rhs_spec}', '{out_spec}'), feature_group_count={groups})"
    )
    g.emit(code, [a, b], info)


# -- windows ---------------------------------------------------------------------------------------------------


def _windows(g: Gen, shape: tuple[int, ...], *, padded: bool = True) -> tuple[str, tuple[int, ...], int] | None:
    """Window parameters as code, the shape of the result, and the elements of a window."""
    sizes, strides, padding, base, window, out = [], [], [], [], [], []
    for n in shape:
        size, stride = g.rng.choice([1, 2, 3]), g.rng.choice([1, 1, 2])
        low, high = (g.rng.randint(0, 2), g.rng.randint(0, 2)) if padded else (0, 0)
        grow, spread = (g.rng.choice([1, 1, 2]), g.rng.choice([1, 1, 2])) if padded else (1, 1)
        dilated = 0 if n == 0 else (n - 1) * grow + 1
        reach = (size - 1) * spread + 1
        if dilated + low + high < reach:
            if not padded:
                size = reach = spread = 1
                if n == 0:
                    return None
            else:
                low = reach
        out.append((dilated + low + high - reach) // stride + 1)
        sizes.append(size)
        strides.append(stride)
        padding.append((low, high))
        base.append(grow)
        window.append(spread)
    if math.prod(out) > g.limit or math.prod(sizes) > 27:
        return None
    code = f"{tuple(sizes)}, {tuple(strides)}, {padding}"
    if padded:
        code += f", {tuple(base)}, {tuple(window)}"
    return code, tuple(out), math.prod(sizes)


def _reduce_window(g: Gen, dtype: str, name: str) -> None:
    """Sums, products, and extremes from a start of the user's own, which shows where a window holds padding only."""
    x = g.take(dtype, 1, 3)
    found = _windows(g, x.info.shape)
    if found is None:
        raise Skip("too large")
    window, shape, terms = found
    info = x.info.of_shape(*shape)
    if name == "add":
        x = addable(g, x, terms)
        info, start = summed(x.info, terms, shape), "0"
    elif name == "mul":
        start = "1"
        if values.is_float(dtype):
            x = g.tame(x, 1, 0)
            info = values.number(shape, dtype, -1, 1, 0, LOOSE)
        else:
            info = values.full(shape, dtype)
    else:
        bound = min(100 if g.exact else ROUGH_BOUND, 2 ** PRECISION.get(dtype, 6))
        c = bound if name == "min" else 0 if dtype in values.UNSIGNED else -bound
        start = str(c)
        info = values.union(info, values.number(shape, dtype, c, c, info.frac if info.rough else 0))
        if info.zeros:
            info = values.number(shape, dtype, info.lo, info.hi, info.frac, LOOSE)
        if not info.exact():
            raise Skip("the start does not fit")
    g.emit(f"lax.reduce_window({{0}}, {dtype}({start}), lax.{name}, {window})", [x], info)


def _extreme_window(g: Gen, dtype: str, name: str) -> None:
    """The extreme of a window of padding would be infinite: only integers are padded."""
    x = g.take(dtype, 1, 3)
    found = _windows(g, x.info.shape, padded=not values.is_float(dtype))
    if found is None:
        raise Skip("too large")
    window, shape, _ = found
    info = x.info.of_shape(*shape)
    if not values.is_float(dtype):
        info = values.full(shape, dtype)
    elif info.zeros:
        info = values.number(shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    start = "least" if name == "max" else "most"
    g.emit(f"lax.reduce_window({{0}}, helpers.{start}({{0}}), lax.{name}, {window})", [x], info)


for _name in ("max", "min"):
    op(f"reduce_window_{_name}", exact=NUMBERS, smooth=NUMBERS, weight=0.4)(partial(_extreme_window, name=_name))
for _name in ("add", "mul", "max", "min"):
    _smooth = NUMBERS if _name == "add" else FLOATS if _name != "mul" else ()
    op(f"reduce_window_{_name}_from", exact=NUMBERS, smooth=_smooth, weight=0.4)(partial(_reduce_window, name=_name))


def _pooling(g: Gen, x: Value) -> tuple[str, int]:
    """Code of a pooling function and how many windows an element may be in."""
    found = _windows(g, x.info.shape, padded=False)
    if found is None:
        raise Skip("empty")
    window, _, terms = found
    name, start = g.rng.choice([("max", "-jnp.inf"), ("min", "jnp.inf")])
    return f"lambda x: lax.reduce_window(x, {x.info.dtype}({start}), lax.{name}, {window})", terms


@op("select_and_scatter_add", exact=FLOATS, weight=0.5)
def _pooling_transposed(g: Gen, dtype: str) -> None:
    """Max pooling backwards: how many windows chose an element."""
    x = g.take(dtype, 1, 3, nonempty=True, limit=64)
    pool, terms = _pooling(g, x)
    info = values.number(x.info.shape, dtype, 0, terms, 0, LOOSE)
    g.emit(f"jax.grad(lambda v: jnp.sum(({pool})(v)))({{0}})", [x], info)


@op("select_and_gather_add", exact=FLOATS, weight=0.5)
def _pooling_forward(g: Gen, dtype: str) -> None:
    """The derivative of max pooling in one direction."""
    x, t = g.pair(dtype, min_rank=1, max_rank=3, nonempty=True, limit=64)
    found = _windows(g, x.info.shape, padded=False)
    if found is None:
        raise Skip("empty")
    window, shape, _ = found
    name, start = g.rng.choice([("max", "-jnp.inf"), ("min", "jnp.inf")])
    pool = f"lambda x: lax.reduce_window(x, {dtype}({start}), lax.{name}, {window})"
    info = values.number(shape, dtype, min(0, t.info.lo), max(0, t.info.hi), t.info.frac, LOOSE)
    g.emit(f"jax.jvp({pool}, [{{0}}], [{{1}}])[1]", [x, t], info)
