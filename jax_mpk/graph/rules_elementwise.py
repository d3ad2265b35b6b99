"""Rules of the elementwise primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, Sharding

from jax_mpk.capture import jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Body, Load, element_type, rule, unsupported
from jax_mpk.graph.ir import Value
from jax_mpk.graph.scalar import Builder

#: (builder, operand nodes in compute types) → result node.
Formula = Callable[..., int]

#: Primitives that are one scalar operation, where the names differ.
_RENAMED = {
    "add_any": "add",
    "population_count": "popcount",
    "shift_left": "shl",
    "shift_right_arithmetic": "shr_arith",
    "shift_right_logical": "shr_logical",
}
_SAME_NAME = (
    "abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clz cos cosh div eq erf erfc exp exp2 "
    "expm1 floor ge gt is_finite le log log1p logistic lt mul ne neg not or rem rsqrt sin sinh sqrt sub tan tanh xor"
).split()
#: Order of bools: false before true.
_ON_BOOLS = {"max": "or", "min": "and"}


def at_operand(b: Builder, at: Sequence[int], value: Value, space: Sequence[int]) -> list[int]:
    """Indices of an elementwise operand: scalars and axes of extent 1 are broadcast."""
    if not value.shape:
        return []
    return [
        b.index(0) if size == 1 and extent != 1 else index
        for index, size, extent in zip(at, value.shape, space, strict=True)
    ]


def elementwise(bb: BlockBuilder, eqn: JaxprEqn, xs: Sequence[Value], formula: Formula) -> list[Value]:
    """A map that applies ``formula`` to the operands' elements in their compute types."""
    aval: Any = eqn.outvars[0].aval
    shape, dtype = jaxprs.physical(aval)[0], element_type(aval)
    assert dtype is not None

    def body(b: Builder, at: list[int], load: Load) -> int:
        return formula(b, *(b.compute(load(k, at_operand(b, at, x, shape))) for k, x in enumerate(xs)))

    return list(bb.map(shape, xs, body, [dtype]))


@rule(*_SAME_NAME, *_RENAMED)
def _one_operation(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    name = _RENAMED.get(eqn.primitive.name, eqn.primitive.name)
    aval: Any = eqn.invars[0].aval
    if jaxprs.trailing(aval):
        return _compare_keys(bb, eqn, xs)
    return elementwise(bb, eqn, xs, lambda b, *args: b.op(name, *args))


def _compare_keys(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """PRNG keys are equal where all their words are."""
    aval: Any = eqn.invars[0].aval
    name, shape = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
    words = jaxprs.trailing(aval)
    if name not in ("eq", "ne") or len(words) != 1 or words != jaxprs.trailing(eqn.invars[1].aval):
        raise unsupported(eqn, "PRNG keys can only be compared for equality")

    def body(b: Builder, at: list[int], load: Load) -> int:
        join = "and" if name == "eq" else "or"
        index = [at if len(x.shape) > 1 else [] for x in xs]
        out = []
        for k in range(words[0]):
            left, right = (load(slot, [*index[slot], b.index(k)]) for slot in (0, 1))
            out.append(b.op(name, left, right))
        while len(out) > 1:
            out = [b.op(join, out[0], out[1]), *out[2:]]
        return out[0]

    return bb.map(shape, xs, body, ["b1"])


@rule("max", "min")
def _max_min(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    name = eqn.primitive.name
    if xs[0].dtype == "b1":
        name = _ON_BOOLS[name]
    return elementwise(bb, eqn, xs, lambda b, x, y: b.op(name, x, y))


@rule("sign")
def _sign(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    dtype = xs[0].dtype
    if dtypes.is_unsigned(dtype):
        return elementwise(bb, eqn, xs, lambda b, x: b.op("min", x, b.const(1, dtype)))
    return elementwise(bb, eqn, xs, lambda b, x: b.op("sign", x))


@rule("square")
def _square(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return elementwise(bb, eqn, xs, lambda b, x: b.mul(x, x))


@rule("one_minus_square")
def _one_minus_square(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    def formula(b: Builder, x: int) -> int:
        one = b.const(1, b.nodes[x].dtype)
        return b.mul(b.add(one, x), b.sub(one, x))

    return elementwise(bb, eqn, xs, formula)


@rule("polynomial")
def _polynomial(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Horner's rule, in the order of JAX's own lowering."""
    unroll = eqn.params.get("unroll")

    def formula(b: Builder, x: int, *coefficients: int) -> int:
        out, *rest = reversed(coefficients)
        if len(coefficients) > (8 if unroll is None else unroll):
            # There, JAX loops and starts from zero, which makes NaN of infinities.
            out, rest = b.const(0, b.nodes[x].dtype), [out, *rest]
        for coefficient in rest:
            out = b.add(b.mul(out, x), coefficient)
        return out

    return elementwise(bb, eqn, xs, formula)


@rule("log2")
def _log2(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    def formula(b: Builder, x: int) -> int:
        return b.mul(b.op("log", x), b.const(1.4426950408889634, b.nodes[x].dtype))

    return elementwise(bb, eqn, xs, formula)


@rule("pow")
def _pow(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    def formula(b: Builder, x: int, y: int) -> int:
        return b.op("pow", x, b.convert(y, b.nodes[x].dtype))

    return elementwise(bb, eqn, xs, formula)


@rule("integer_pow")
def _integer_pow(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    power: int = eqn.params["y"]

    def formula(b: Builder, x: int) -> int:
        one = b.const(1, b.nodes[x].dtype)
        if power == 3:  # XLA's own order for the commonest odd power
            return b.mul(b.mul(x, x), x)
        left, out = abs(power), None
        while left > 0:
            if left & 1:
                out = x if out is None else b.mul(out, x)
            left >>= 1
            if left > 0:
                x = b.mul(x, x)
        if out is None:
            return one
        return b.op("div", one, out) if power < 0 else out

    return elementwise(bb, eqn, xs, formula)


@rule("mulhi")
def _mulhi(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    dtype = xs[0].dtype
    bits = dtypes.itemsize(dtype) * 8
    wide, shift = ("s64", "shr_arith") if dtypes.is_signed(dtype) else ("u64", "shr_logical")

    def formula(b: Builder, x: int, y: int) -> int:
        product = b.mul(b.convert(x, wide), b.convert(y, wide))
        return b.convert(b.op(shift, product, b.const(bits, wide)), dtype)

    def by_halves(b: Builder, x: int, y: int) -> int:
        """Long multiplication of digits of 32 bits: no type holds the product of 64-bit integers."""
        half, low = b.const(32, wide), b.const(2**32 - 1, wide)
        (x0, x1), (y0, y1) = ((b.op("and", v, low), b.op(shift, v, half)) for v in (x, y))
        outer = b.add(b.mul(x1, y0), b.op("shr_logical", b.mul(x0, y0), half))
        inner = b.add(b.mul(x0, y1), b.op("and", outer, low))
        return b.add(b.mul(x1, y1), b.add(b.op(shift, outer, half), b.op(shift, inner, half)))

    return elementwise(bb, eqn, xs, by_halves if bits == 64 else formula)


@rule("round")
def _round(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    to_even = int(eqn.params["rounding_method"]) == 1
    name = "round_even" if to_even else "round_away"
    return elementwise(bb, eqn, xs, lambda b, x: b.op(name, x))


@rule("clamp")
def _clamp(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    if xs[1].dtype == "b1":
        return elementwise(bb, eqn, xs, lambda b, low, x, high: b.op("and", b.op("or", x, low), high))
    return elementwise(bb, eqn, xs, lambda b, low, x, high: b.clamp(low, x, high))


@rule("eq_to", "le_to", "lt_to")
def _total_order(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    name = eqn.primitive.name.removesuffix("_to")
    dtype = xs[0].dtype
    space = tuple(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]

    def body(b: Builder, at: list[int], load: Load) -> int:
        sides = [load(k, at_operand(b, at, x, space)) for k, x in enumerate(xs)]
        return b.op(name, *(total_order(b, side) if dtypes.is_float(dtype) else side for side in sides))

    return bb.map(space, xs, body, ["b1"])


def total_order(b: Builder, x: int) -> int:
    """A signed integer that orders like float ``x`` in the total order (-NaN first, -0 before +0, NaN last)."""
    bits = dtypes.itemsize(b.nodes[x].dtype) * 8
    kind = f"s{bits}"
    raw = b.op("bitcast", x, dtype=kind)
    flip = b.const((1 << (bits - 1)) - 1, kind)
    return b.op("select", b.op("lt", raw, b.const(0, kind)), b.op("xor", raw, flip), raw)


@rule("nextafter")
def _nextafter(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    dtype = xs[0].dtype
    if dtype not in ("f16", "bf16"):
        return elementwise(bb, eqn, xs, lambda b, x, y: b.op("nextafter", x, y))
    space = tuple(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]

    def body(b: Builder, at: list[int], load: Load) -> int:
        # Neighbours in the storage type: steps of one in the bit pattern.
        x, y = (load(k, at_operand(b, at, value, space)) for k, value in enumerate(xs))
        wide_x, wide_y = b.compute(x), b.compute(y)
        bits_x, bits_y = (b.op("bitcast", v, dtype="u16") for v in (x, y))
        low, sign = b.const(0x7FFF, "u16"), b.const(0x8000, "u16")
        size_x, size_y = (b.op("and", v, low) for v in (bits_x, bits_y))
        differ = b.op("ne", b.op("and", b.op("xor", bits_x, bits_y), sign), b.const(0, "u16"))
        inward = b.op("or", b.op("gt", size_x, size_y), differ)
        step = b.op("select", inward, b.const(0xFFFF, "u16"), b.const(1, "u16"))
        out = b.add(bits_x, step)
        smallest = b.op("or", b.op("and", bits_y, sign), b.const(1, "u16"))
        out = b.op("select", b.op("eq", size_x, b.const(0, "u16")), smallest, out)
        out = b.op("select", b.op("eq", wide_x, wide_y), bits_y, out)
        nan = b.op("or", b.op("ne", wide_x, wide_x), b.op("ne", wide_y, wide_y))
        out = b.op("select", nan, b.const(dtypes.to_bits(float("nan"), dtype), "u16"), out)
        return b.op("bitcast", out, dtype=dtype)

    return bb.map(space, xs, body, [dtype])


@rule("select_n")
def _select_n(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    which, *cases = xs
    aval: Any = eqn.outvars[0].aval
    space, rank = cases[0].shape, len(aval.shape)

    def body(b: Builder, at: list[int], load: Load) -> int:
        chosen = load(0, at[:rank] if which.shape else [])
        arms = [b.compute(load(k, at)) for k in range(1, len(xs))]
        if which.dtype == "b1":
            return b.op("select", chosen, arms[1], arms[0]) if len(arms) > 1 else arms[0]
        out = arms[-1]
        for k in range(len(arms) - 2, -1, -1):
            # Beyond the last case the last is meant, below the first the first.
            out = b.op("select", b.op("lt", chosen, b.const(k + 1, which.dtype)), arms[k], out)
        return out

    return bb.map(space, xs, body, [cases[0].dtype])


@rule("convert_element_type")
def _convert(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    dtype = element_type(eqn.outvars[0].aval)
    assert dtype is not None
    if dtype == xs[0].dtype:
        return xs
    return elementwise(bb, eqn, xs, lambda b, x: b.convert(x, dtype))


@rule("reduce_precision")
def _reduce_precision(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    dtype = xs[0].dtype
    exponent, mantissa = int(eqn.params["exponent_bits"]), int(eqn.params["mantissa_bits"])
    own = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
    full = own[dtypes.compute_type(dtype)]
    # What the storage type holds anyway must not be touched: f32 would flush f16's subnormals to zero.
    attr = (
        full[0] if exponent >= own[dtype][0] else exponent,
        full[1] if mantissa >= own[dtype][1] else mantissa,
    )
    if attr == full:
        return xs
    if dtype == "f16" and attr[0] == full[0]:
        return bb.map(xs[0].shape, xs, _rounded_f16(own[dtype][1] - mantissa), [dtype])
    return elementwise(bb, eqn, xs, lambda b, x: b.op("reduce_precision", x, attr=attr))


def _rounded_f16(drop: int) -> Body:
    """Rounds off the last bits of a significand; in f32, f16's subnormals would have more of them than they do."""

    def body(b: Builder, at: list[int], load: Load) -> int:
        x = load(0, at)
        raw, wide = b.op("bitcast", x, dtype="u16"), b.compute(x)
        odd = b.op("and", b.op("shr_logical", raw, b.const(drop, "u16")), b.const(1, "u16"))
        out = b.add(b.add(raw, b.const((1 << (drop - 1)) - 1, "u16")), odd)
        out = b.op("and", out, b.const(0x10000 - (1 << drop), "u16"))
        return b.op("bitcast", b.op("select", b.op("ne", wide, wide), raw, out), dtype="f16")

    return body


@rule("bitcast_convert_type")
def _bitcast(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    aval: Any = eqn.outvars[0].aval
    space, new = tuple(aval.shape), element_type(aval)
    old = xs[0].dtype
    assert new is not None
    if "b1" in (old, new):
        if old == new:
            return xs
        raise unsupported(eqn, "bool has no bit pattern to convert")
    bits_old, bits_new = dtypes.itemsize(old) * 8, dtypes.itemsize(new) * 8

    def same(b: Builder, at: list[int], load: Load) -> int:
        return b.op("bitcast", load(0, at), dtype=new)

    def narrower(b: Builder, at: list[int], load: Load) -> int:
        # The last axis counts the parts of an element, lowest bits first.
        whole = b.op("bitcast", load(0, at[:-1]), dtype=f"u{bits_old}")
        shift = b.convert(b.mul(at[-1], b.index(bits_new)), f"u{bits_old}")
        part = b.convert(b.op("shr_logical", whole, shift), f"u{bits_new}")
        return b.op("bitcast", part, dtype=new)

    def wider(b: Builder, at: list[int], load: Load) -> int:
        out = b.const(0, f"u{bits_new}")
        for k in range(bits_new // bits_old):
            # XLA lets a scalar stand for an axis of extent 1, which does not occur here: widths differ.
            part = b.op("bitcast", load(0, [*at, b.index(k)]), dtype=f"u{bits_old}")
            placed = b.op("shl", b.convert(part, f"u{bits_new}"), b.const(k * bits_old, f"u{bits_new}"))
            out = b.op("or", out, placed)
        return b.op("bitcast", out, dtype=new)

    body = same if bits_old == bits_new else narrower if bits_old > bits_new else wider
    return bb.map(space, xs, body, [new])


@rule("iota")
def _iota(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    if xs:
        raise unsupported(eqn, "shapes known only at run time are not supported")
    dtype = element_type(eqn.outvars[0].aval)
    axis: int = eqn.params["dimension"]
    assert dtype is not None

    def body(b: Builder, at: list[int], load: Load) -> int:
        return b.convert(at[axis], dtype)

    return bb.map(tuple(eqn.params["shape"]), [], body, [dtype])


#: One device, no aliasing, no differentiation: these primitives return their operands.
_IDENTITIES = (
    "copy copy_p from_edtype layout_constraint mesh_cast name optimization_barrier pcast pvary "
    "reduced_vary_cast reduced_vary_cast_p stage stop_gradient to_edtype xla_metadata_value"
).split()


@rule(*_IDENTITIES)
def _identity(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return xs


@rule("sharding_constraint", "reshard", "device_put")
def _sharding_constraint(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """The operands, as long as a kernel on one device can put them where they are wanted."""
    params = eqn.params
    wanted = params["devices"] if "devices" in params else [params.get("sharding", params.get("dst_sharding"))]
    for sharding in wanted:
        if isinstance(sharding, Sharding) and _is_spread(sharding):
            raise unsupported(
                eqn,
                f"it spreads an array over several devices ({sharding}), and a megakernel runs on one; apply it to "
                "arguments or results outside, or call the megakernel inside jax.shard_map",
            )
    return xs


def _is_spread(sharding: Sharding) -> bool:
    """Whether devices hold different parts of an array."""
    if isinstance(sharding, NamedSharding):
        entries = [(entry,) if isinstance(entry, str) else entry for entry in sharding.spec]
        # Anything else says nothing about its axis: None, PartitionSpec.UNCONSTRAINED.
        names = [name for entry in entries if isinstance(entry, tuple) for name in entry]
        return any(sharding.mesh.shape[name] > 1 for name in names)
    return sharding.num_devices > 1 and not sharding.is_fully_replicated


@rule("add_dependency")
def _add_dependency(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return xs[:1]


@rule("empty", "zeros_like")
def _zeros(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    aval: Any = eqn.outvars[0].aval
    dtype = element_type(aval)
    assert dtype is not None
    return [bb.constant(0, dtype, jaxprs.physical(aval)[0])]
