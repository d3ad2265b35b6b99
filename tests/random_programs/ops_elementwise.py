"""Elementwise instructions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from jax import lax

from tests.random_programs import values
from tests.random_programs.generator import Gen, Skip, Value
from tests.random_programs.registry import op
from tests.random_programs.values import (
    ALL,
    DEFINED,
    FLOATS,
    INTS,
    LOOSE,
    NUMBERS,
    POSITIVE,
    ROUGH,
    SIGNED,
    UNSIGNED,
    Info,
)

Transfer = Callable[..., Info]


def with_zeros(info: Info, *operands: Info, least: int = POSITIVE) -> Info:
    """``info`` with what is known of signs of zeros: the worst of the operands, ``least`` if zero can occur."""
    if not values.is_float(info.dtype) or info.rough:
        return info
    worst = max([i.zeros for i in operands], default=POSITIVE)
    if info.lo <= 0 <= info.hi:
        worst = max(worst, least)
    return values.number(info.shape, info.dtype, info.lo, info.hi, info.frac, worst)


def _monotone(fn: Callable[[float], float], frac: int | None = None) -> Transfer:
    def transfer(x: Info) -> Info:
        lo, hi = sorted((fn(x.lo), fn(x.hi)))
        out = values.number(x.shape, x.dtype, lo, hi, x.frac if frac is None or x.rough else frac)
        return with_zeros(out, x, least=DEFINED)

    return transfer


def _abs(x: Info) -> Info:
    if x.dtype in INTS:
        return values.integer(x.shape, x.dtype, 0, x.bound)
    return values.number(x.shape, x.dtype, 0, x.bound, x.frac)


def _sign(x: Info) -> Info:
    lo, hi = -1 if x.lo < 0 else 0, 1 if x.hi > 0 else 0
    return with_zeros(values.number(x.shape, x.dtype, lo, hi), x)


def _square(x: Info) -> Info:
    return values.number(x.shape, x.dtype, 0, x.bound * x.bound, values.frac_of(x, x, add=True))


def _counted(x: Info) -> Info:
    return values.integer(x.shape, x.dtype, 0, values.bits(x.dtype))


def _full(x: Info, *_: Info) -> Info:
    return values.full(x.shape, x.dtype)


def _bool(x: Info, *_: Info) -> Info:
    return values.full(x.shape, "b1")


#: Name: (code, types in the exact family, types in the smooth family, bounds of the result).
_UNARY: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Transfer]] = {
    "neg": ("lax.neg({0})", NUMBERS, FLOATS, _monotone(lambda x: -x)),
    "abs": ("lax.abs({0})", (*SIGNED, *FLOATS), FLOATS, _abs),
    "sign": ("lax.sign({0})", NUMBERS, (), _sign),
    "floor": ("lax.floor({0})", FLOATS, (), _monotone(math.floor, 0)),
    "ceil": ("lax.ceil({0})", FLOATS, (), _monotone(math.ceil, 0)),
    "round": (
        "lax.round({0}, lax.RoundingMethod.AWAY_FROM_ZERO)",
        FLOATS,
        (),
        _monotone(lambda x: math.copysign(math.floor(abs(x) + 0.5), x), 0),
    ),
    "round_even": ("lax.round({0}, lax.RoundingMethod.TO_NEAREST_EVEN)", FLOATS, (), _monotone(round, 0)),
    "square": ("lax.square({0})", NUMBERS, FLOATS, _square),
    "is_finite": ("lax.is_finite({0})", FLOATS, FLOATS, _bool),
    "not": ("lax.bitwise_not({0})", ("b1", *INTS), ("b1", *INTS), _full),
    "population_count": ("lax.population_count({0})", INTS, INTS, _counted),
    # XLA folds the count of a negative constant to a wrong one; the edge values have negative numbers.
    "clz": ("lax.clz({0} & helpers.most({0}))", INTS, INTS, _counted),
    "copy": ("jnp.copy({0})", ALL, FLOATS, lambda x: x),
    "optimization_barrier": ("lax.optimization_barrier({0})", ALL, FLOATS, lambda x: x),
    "name": ("helpers.bound('name', {0}, name='here')", ALL, FLOATS, lambda x: x),
    "reduce_precision_none": ("lax.reduce_precision({0}, 11, 52)", FLOATS, FLOATS, lambda x: x),
    "relu": ("jax.nn.relu({0})", NUMBERS, FLOATS, lambda x: with_zeros(_clipped(x), x, least=LOOSE)),
    "relu6": ("jax.nn.relu6({0})", FLOATS, FLOATS, lambda x: with_zeros(_clipped(x, 6), x, least=LOOSE)),
    "halved": ("helpers.halved({0})", FLOATS, FLOATS, lambda x: _halved(x)),
    "through": ("helpers.through({0})", FLOATS, FLOATS, _monotone(lambda x: -x)),
    "checkpoint": ("jax.checkpoint(lambda x: x + x)({0})", NUMBERS, FLOATS, lambda x: _sum(x, x)),
    "jit": ("jax.jit(jnp.square)({0})", NUMBERS, FLOATS, _square),
    "platform_index": (
        "lax.platform_dependent({0}, tpu=jnp.square, default=jnp.negative)",
        NUMBERS,
        FLOATS,
        _monotone(lambda x: -x),
    ),
}


def _clipped(x: Info, most: float = math.inf) -> Info:
    lo, hi = (min(most, max(0, bound)) for bound in (x.lo, x.hi))
    return values.number(x.shape, x.dtype, lo, hi, x.frac, x.zeros)


def _halved(x: Info) -> Info:
    frac = ROUGH if x.rough else x.frac + 1
    return with_zeros(values.number(x.shape, x.dtype, x.lo / 2, x.hi / 2, frac), x, least=DEFINED)


def _sum(x: Info, y: Info) -> Info:
    lo, hi = x.lo + y.lo, x.hi + y.hi
    # XLA drops the addition of a constant zero, which would turn -0 into +0.
    zeros = LOOSE if max(x.zeros, y.zeros) else POSITIVE
    return values.number(x.shape, x.dtype, lo, hi, values.frac_of(x, y), zeros)


def _difference(x: Info, y: Info) -> Info:
    zeros = LOOSE if max(x.zeros, y.zeros) else POSITIVE
    return values.number(x.shape, x.dtype, x.lo - y.hi, x.hi - y.lo, values.frac_of(x, y), zeros)


def multiplied(x: Info, y: Info) -> Info:
    lo, hi = values.product(x, y)
    out = values.number(x.shape, x.dtype, lo, hi, values.frac_of(x, y, add=True))
    return with_zeros(out, x, y, least=DEFINED if min(x.lo, y.lo) < 0 else POSITIVE)


def _max(x: Info, y: Info) -> Info:
    zeros = LOOSE if max(x.zeros, y.zeros) else POSITIVE
    return values.number(x.shape, x.dtype, max(x.lo, y.lo), max(x.hi, y.hi), values.frac_of(x, y), zeros)


def _min(x: Info, y: Info) -> Info:
    zeros = LOOSE if max(x.zeros, y.zeros) else POSITIVE
    return values.number(x.shape, x.dtype, min(x.lo, y.lo), min(x.hi, y.hi), values.frac_of(x, y), zeros)


def _unary(g: Gen, dtype: str, code: str, transfer: Transfer) -> None:
    info, (x,) = g.fit(transfer, g.take(dtype))
    g.emit(code, [x], info)


for _name, (_code, _exact, _smooth, _transfer) in _UNARY.items():
    op(_name, exact=_exact, smooth=_smooth)(functools.partial(_unary, code=_code, transfer=_transfer))

_BINARY: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Transfer]] = {
    "add": ("lax.add({0}, {1})", NUMBERS, NUMBERS, _sum),
    "sub": ("lax.sub({0}, {1})", NUMBERS, NUMBERS, _difference),
    "mul": ("lax.mul({0}, {1})", NUMBERS, NUMBERS, multiplied),
    "max": ("lax.max({0}, {1})", ALL, ALL, _max),
    "min": ("lax.min({0}, {1})", ALL, ALL, _min),
    "add_any": ("helpers.add_any({0}, {1})", FLOATS, FLOATS, _sum),
    "and": ("lax.bitwise_and({0}, {1})", ("b1", *INTS), (), _full),
    "or": ("lax.bitwise_or({0}, {1})", ("b1", *INTS), (), _full),
    "xor": ("lax.bitwise_xor({0}, {1})", ("b1", *INTS), (), _full),
    "shift_left": ("lax.shift_left({0}, {1})", INTS, (), _full),
    "shift_right_logical": ("lax.shift_right_logical({0}, {1})", INTS, (), _full),
    "shift_right_arithmetic": ("lax.shift_right_arithmetic({0}, {1})", INTS, (), _full),
    "eq": ("lax.eq({0}, {1})", ALL, (), _bool),
    "ne": ("lax.ne({0}, {1})", ALL, (), _bool),
    "lt": ("lax.lt({0}, {1})", ALL, (), _bool),
    "le": ("lax.le({0}, {1})", ALL, (), _bool),
    "gt": ("lax.gt({0}, {1})", ALL, (), _bool),
    "ge": ("lax.ge({0}, {1})", ALL, (), _bool),
    # Of signed integers it is nothing that XLA of JAX 0.10 compiles inside a fusion.
    "mulhi": ("lax.mulhi({0}, {1})", UNSIGNED, (), _full),
    "polynomial": ("lax.polynomial({0}, [{1}, {0}])", NUMBERS, FLOATS, lambda x, y: _sum(multiplied(x, x), y)),
}
#: Not in every version of JAX.
_NEW = ("mulhi", "polynomial")


def _binary(g: Gen, dtype: str, code: str, transfer: Transfer) -> None:
    info, (x, y) = g.fit(transfer, *g.pair(dtype))
    g.emit(code, [x, y], info)


for _name, (_code, _exact, _smooth, _transfer) in _BINARY.items():
    if _name not in _NEW or hasattr(lax, _name):
        op(_name, exact=_exact, smooth=_smooth)(functools.partial(_binary, code=_code, transfer=_transfer))


def _divided(g: Gen, dtype: str, name: str) -> None:
    """Any divisor, zero too, but no constant one: XLA divides constants by zero when it compiles, and dies of it."""
    x, y = g.pair(dtype)
    known = [i.name for i in g.inputs if i.info.dtype == dtype and i.info.shape == ()]
    s = next((v for v in g.frames[0].values if v.name in known), None) or g.input((), dtype)
    y = g.emit("{0} + {1}", [y, s], values.full(y.info.shape, dtype))
    g.emit(f"lax.{name}({{0}}, {{1}})", [x, y], values.full(x.info.shape, dtype))


@op("int_div", exact=INTS)
def _int_div(g: Gen, dtype: str) -> None:
    _divided(g, dtype, "div")


@op("int_rem", exact=INTS)
def _int_rem(g: Gen, dtype: str) -> None:
    _divided(g, dtype, "rem")


@op("scaled", exact=NUMBERS, smooth=FLOATS)
def _scaled(g: Gen, dtype: str) -> None:
    """Arithmetic with a scalar literal."""
    x = g.take(dtype)
    c = g.constant(dtype)
    frac = g.small(dtype)[1] if values.is_float(dtype) else 0
    scalar = values.number((), dtype, c, c, frac)
    sign, transfer = g.rng.choice([("+", _sum), ("-", _difference), ("*", multiplied)])
    info, (x,) = g.fit(lambda a: transfer(a, scalar), x)
    g.emit(f"{{0}} {sign} {dtype}({c})", [x], info)


def masked(g: Gen, x: Value, choices: list[float], dtype: str) -> Value:
    """A float value that is one of two constants where ``x`` is false or true."""
    low, high = choices[0], choices[-1]
    frac = 0 if g.exact else ROUGH
    while g.exact and any(c * 2**frac != int(c * 2**frac) for c in choices):
        frac += 1
    info = values.number(x.info.shape, dtype, min(low, high), max(low, high), frac)
    code = f"lax.select({{0}}, lax.full({x.info.shape}, {dtype}({high})), lax.full({x.info.shape}, {dtype}({low})))"
    return g.emit(code, [x], info)


@op("div", exact=FLOATS, smooth=FLOATS)
def _div(g: Gen, dtype: str) -> None:
    if not g.exact:
        x, y = g.pair(dtype)
        y = away_from_zero(g, y)
        info, (x,) = g.fit(lambda a: values.rough(a.shape, dtype, -a.bound * 4, a.bound * 4), x)
        g.emit("lax.div({0}, {1})", [x, y], info)
        return
    mask = g.take("b1")
    divisor = masked(g, mask, g.rng.choice([[1, 2], [0.5, 4], [-2, 1], [2]]), dtype)
    x = g.make(mask.info.shape, dtype)

    def transfer(a: Info) -> Info:
        lo, hi = -a.bound * 2, a.bound * 2
        return with_zeros(values.number(a.shape, dtype, lo, hi, a.frac + 2), a, least=DEFINED)

    info, (x,) = g.fit(transfer, x)
    g.emit("lax.div({0}, {1})", [x, divisor], info)


def away_from_zero(g: Gen, y: Value) -> Value:
    """A smooth positive function of ``y``, at least 1/4."""
    dtype = y.info.dtype
    if g.chance(0.5):
        return g.tame(y, 4, ROUGH, 0.25)
    y = g.tame(y, 4, ROUGH)
    return g.emit(f"lax.square({{0}}) + {dtype}(0.25)", [y], values.rough(y.info.shape, dtype, 0.25, 16.25))


@op("rem", exact=FLOATS)
def _rem(g: Gen, dtype: str) -> None:
    x, y = g.pair(dtype)
    bound, frac = g.small(dtype)
    y = g.tame(y, bound, frac)
    shifted = values.number(y.info.shape, dtype, 1, y.info.bound + 1, y.info.frac)
    y = g.emit(f"lax.abs({{0}}) + {dtype}(1)", [y], shifted)

    def transfer(a: Info, b: Info) -> Info:
        top = min(a.bound, b.bound)
        out = values.number(a.shape, dtype, -top, top, max(a.frac, b.frac))
        return with_zeros(out, a, least=DEFINED)

    info, (x, y) = g.fit(transfer, x, y)
    g.emit("lax.rem({0}, {1})", [x, y], info)


@op("integer_pow", exact=NUMBERS, smooth=FLOATS)
def _integer_pow(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    if not g.exact and values.is_float(dtype) and g.chance(0.4):
        x = away_from_zero(g, x)
        x = g.tame(x, 4, ROUGH, 0.25)
        y = g.rng.choice([-1, -2])
        g.emit(f"lax.integer_pow({{0}}, {y})", [x], values.rough(x.info.shape, dtype, 0, 16))
        return
    y = g.rng.choice([2, 3, 3, 4, 5])

    def transfer(a: Info) -> Info:
        frac = ROUGH if a.rough else a.frac * y
        top = a.bound**y
        return with_zeros(values.number(a.shape, dtype, 0 if y % 2 == 0 else -top, top, frac), a, least=DEFINED)

    info, (x,) = g.fit(transfer, x)
    g.emit(f"lax.integer_pow({{0}}, {y})", [x], info)


@op("pow", exact=INTS, smooth=FLOATS, weight=0.5)
def _pow(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    if not values.is_float(dtype):
        # A negative power of an integer is not defined.
        y = g.tame(g.make(x.info.shape, g.rng.choice(INTS)), 6, 0, 0)
        g.emit("jnp.power({0}, {1})", [x, g.convert(y, dtype)], values.full(x.info.shape, dtype))
        return
    y = g.make(x.info.shape, g.rng.choice([dtype, dtype, "s32"]))
    x = away_from_zero(g, x)
    x = g.tame(x, 4, ROUGH, 0.25)
    y = g.tame(y, 2, ROUGH if values.is_float(y.info.dtype) else 0)
    g.emit("lax.pow({0}, {1})", [x, y], values.rough(x.info.shape, dtype, 0.05, 16))


@op("nextafter", exact=FLOATS)
def _nextafter(g: Gen, dtype: str) -> None:
    """The neighbours have too many digits to go on with: only their bits are used."""
    x, y = g.pair(dtype)
    if y.info.zeros == LOOSE:
        y = g.emit("lax.abs({0})", [y], _abs(y.info))
    width = values.bits(dtype)
    code = f"lax.bitcast_convert_type(lax.nextafter({{0}}, {{1}}), u{width})"
    g.emit(code, [x, y], values.full(x.info.shape, f"u{width}"))


def _total_order(g: Gen, dtype: str, name: str) -> None:
    x, y = g.pair(dtype)
    if max(x.info.zeros, y.info.zeros) == LOOSE:
        raise Skip("tells zeros apart")
    g.emit(f"helpers.bound('{name}', {{0}}, {{1}})", [x, y], _bool(x.info))


for _name in ("eq_to", "le_to", "lt_to"):
    op(_name, exact=ALL, weight=0.4)(functools.partial(_total_order, name=_name))


@op("reduce_precision", exact=FLOATS)
def _reduce_precision(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    exponent = g.rng.choice([5, 6, 8, 11])
    mantissa = g.rng.choice([0, 1, 2, 3, 5, 7, 10])

    def transfer(a: Info) -> Info:
        top = 2.0 ** math.ceil(math.log2(max(a.bound, 1)))
        zeros = DEFINED if a.lo < 0 and a.zeros == POSITIVE else a.zeros
        return values.number(a.shape, dtype, -top, top, a.frac, zeros)

    info, (x,) = g.fit(transfer, x)
    g.emit(f"lax.reduce_precision({{0}}, {exponent}, {mantissa})", [x], info)


@op("convert_element_type", exact=ALL, smooth=FLOATS, weight=2)
def _convert(g: Gen, dtype: str) -> None:
    """From ``dtype`` to another type."""
    v = g.take(dtype)
    targets = [t for t in ALL if t != dtype and g.may_convert(v.info, t)]
    g.convert(v, g.rng.choice(targets))


@op("bitcast_convert_type", exact=NUMBERS, smooth=INTS)
def _bitcast(g: Gen, dtype: str) -> None:
    width = values.bits(dtype)
    if values.is_float(dtype):
        x = g.take(dtype)
        if x.info.zeros == LOOSE:
            raise Skip("tells zeros apart")
        _bits_as(g, x, f"{g.rng.choice('su')}{width}")
        return
    other = g.rng.choice(INTS)
    factor = values.bits(other) // width
    if factor <= 1:
        _bits_as(g, g.take(dtype, max_rank=3), other)
        return
    shape = (*g.shape(0, 3), factor)
    _bits_as(g, g.make(shape, dtype), other)


def _bits_as(g: Gen, x: Value, dtype: str) -> None:
    shape, old, new = x.info.shape, values.bits(x.info.dtype), values.bits(dtype)
    if old > new:
        shape = (*shape, old // new)
    elif new > old:
        shape = shape[:-1]
    if values.size(shape) > g.limit:
        raise Skip("too large")
    g.emit(f"lax.bitcast_convert_type({{0}}, {dtype})", [x], values.full(shape, dtype))


@op("float_from_bits", exact=("u16", "u32", "u64"), smooth=("u16", "u32", "u64"))
def _float_from_bits(g: Gen, dtype: str) -> None:
    """Random significands under the exponent of 1: floats in [1, 2) from integers, as random numbers are made."""
    x = g.take(dtype)
    width = values.bits(dtype)
    to = "bf16" if width == 16 and g.chance(0.5) else f"f{width}"
    digits = values.PRECISION[to] - 1
    if not g.exact:
        raise Skip("the f64 evaluation has other bits")
    exponent = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000, "f64": 0x3FF0000000000000}[to]
    kept = max(1, min(digits, 6))
    mask = ((1 << kept) - 1) << (digits - kept)
    info = values.number(x.info.shape, to, 1, 2, kept)
    code = f"lax.bitcast_convert_type({{0}} & {dtype}({mask}) | {dtype}({exponent}), {to})"
    g.emit(code, [x], info)


@op("select_n", exact=ALL, smooth=ALL, weight=2)
def _select_n(g: Gen, dtype: str) -> None:
    x, y = g.pair(dtype)
    shape = x.info.shape
    where = shape if g.chance(0.7) else ()
    if g.chance(0.7):
        which, cases = g.make(where, "b1"), [x, y]
    else:
        which = g.make(where, "s32")
        cases = [x, y, g.make(shape, dtype)]
        if which.info.lo < 0 or which.info.hi > 2:
            info = values.integer(where, "s32", 0, 2)
            which = g.emit("lax.clamp(s32(0), {0}, s32(2))", [which], info)
    places = ", ".join(f"{{{k + 1}}}" for k in range(len(cases)))
    g.emit(f"lax.select_n({{0}}, {places})", [which, *cases], values.union(*(c.info for c in cases)))


@op("clamp", exact=ALL, smooth=NUMBERS)
def _clamp(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    shape = x.info.shape if g.chance(0.5) else ()
    low, high = g.make(shape, dtype), g.make(shape, dtype)
    info = values.union(x.info, low.info, high.info)
    if info.zeros:
        info = values.number(info.shape, dtype, info.lo, info.hi, info.frac, LOOSE)
    g.emit("lax.clamp({0}, {1}, {2})", [low, x, high], info)


@op("sqrt_of_square", exact=FLOATS)
def _sqrt_of_square(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    info, (x,) = g.fit(_square, x)
    squared = g.emit("lax.square({0})", [x], info)
    g.emit("lax.sqrt({0})", [squared], _abs(x.info))
