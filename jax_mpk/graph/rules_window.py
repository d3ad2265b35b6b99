"""Rules for reductions over sliding windows and for convolutions.

Windows may be padded, strided and dilated, and so may the operand; :class:`Windows` turns an output position and a
position inside the window into an operand position and says whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import JaxprEqn

from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, identity, rule, unsupported
from jax_mpk.graph.builder import Epilogue
from jax_mpk.graph.combiners import Join, compute_types, familiar, generic, joiner
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder

_SCALAR = {
    "sum": "add",
    "prod": "mul",
    "max": "max",
    "min": "min",
    "and": "and",
    "or": "or",
    "xor": "xor",
}
#: What a combination is called on truth values.
_ON_BOOLS = {"sum": "or", "prod": "and", "max": "or", "min": "and"}


@dataclass(frozen=True)
class Windows:
    """Sliding windows over some axes of an operand; every field has one entry per axis.

    Attributes:
      operand: extents of the operand.
      out: numbers of window positions.
      window: extents of the window.
      strides: distance between window positions.
      low: padding before the first element (negative: elements cut off).
      base_dilation: distance between neighbouring elements of the operand.
      window_dilation: distance between neighbouring elements of the window.
    """

    operand: tuple[int, ...]
    out: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    low: tuple[int, ...]
    base_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]

    @property
    def inside(self) -> bool:
        """Whether every element of every window is an element of the operand."""
        return all(
            self.base_dilation[d] == 1
            and self.low[d] <= 0
            and (self.out[d] - 1) * self.strides[d] + (self.window[d] - 1) * self.window_dilation[d] - self.low[d]
            < self.operand[d]
            for d in range(len(self.operand))
        )

    def position(self, b: Builder, out: Sequence[int], window: Sequence[int]) -> tuple[list[int], int]:
        """Operand position of an element of a window, and whether the operand has it."""
        found, inside = [], b.const(True, "b1")
        for d, size in enumerate(self.operand):
            dilation, low = self.base_dilation[d], self.low[d]
            at = b.add(
                b.mul(out[d], b.index(self.strides[d])),
                b.mul(window[d], b.index(self.window_dilation[d])),
            )
            at = b.sub(at, b.index(low))
            fits = b.in_bounds(at, 0, (size - 1) * dilation + 1)
            if dilation > 1:
                # Division is for positions that are not negative: shift by whole elements.
                whole = max(0, -(-low // dilation))
                shifted = b.add(at, b.index(whole * dilation))
                hit = b.op("eq", b.mod(shifted, dilation), b.index(0))
                fits = b.op("and", fits, hit)
                at = b.sub(b.floordiv(shifted, dilation), b.index(whole))
            found.append(at)
            inside = b.op("and", inside, fits)
        return found, inside

    def selected(self, b: Builder, out: Sequence[int], number: int) -> tuple[list[int], int]:
        """Operand position of a window's element, given by its number, row by row."""
        element = b.clamp(b.index(0), number, b.index(math.prod(self.window) - 1))
        return self.position(b, out, b.delinearize(element, self.window))


def _windows(eqn: JaxprEqn, operand: Value, out: Sequence[int]) -> Windows:
    """The windows of a reduce_window or select_and_… equation."""
    ones = (1,) * len(operand.shape)
    params = eqn.params
    return Windows(
        operand=operand.shape,
        out=tuple(out),
        window=tuple(params["window_dimensions"]),
        strides=tuple(params["window_strides"]),
        low=tuple(low for low, _ in params["padding"]),
        base_dilation=tuple(params.get("base_dilation", ones)),
        window_dilation=tuple(params.get("window_dilation", ones)),
    )


def _element(b: Builder, load: Load, slot: int, at: list[int], inside: int, dtype: str, kind: str) -> int:
    """An operand's element in its compute type, or outside it what does not change a combination."""
    found = b.compute(load(slot, at, inside))
    if kind in ("sum", "or", "xor"):
        return found  # a load that is switched off reads 0
    acc = dtypes.compute_type(dtype)
    return b.op("select", inside, found, b.const(identity(kind, acc), acc))


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window_monoid(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return _familiar(bb, eqn, xs, eqn.primitive.name.removeprefix("reduce_window_"))


@rule("reduce_window")
def _reduce_window(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    jaxpr, consts = eqn.params["jaxpr"], eqn.params["consts"]
    kind = familiar(jaxpr) if len(xs) == 2 else None
    if kind is not None:
        return _familiar(bb, eqn, xs, kind)
    operands = xs[: len(xs) // 2]
    aval: Any = eqn.outvars[0].aval
    windows = _windows(eqn, operands[0], aval.shape)
    join = joiner(bb, eqn, jaxpr, consts)
    acc = compute_types(operands)
    count, rank = len(operands), len(aval.shape)

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        where, inside = windows.position(b, at[:rank], at[rank:])
        out = [b.compute(load(k, where, inside)) for k in range(count)]
        return out if windows.inside else [*out, inside]

    def epilogue(b: Builder, at: list[int], accs: list[int], load: Load) -> list[int]:
        init = [b.compute(load(count + k, [])) for k in range(count)]
        out = list(join(b, init, accs[:count]))
        if windows.inside:
            return out
        return [b.op("select", accs[count], x, y) for x, y in zip(out, init, strict=True)]

    # Padding does not take part, whatever the initial value: an accumulator says whether a part has any element.
    flagged = acc if windows.inside else [*acc, "b1"]
    combine = generic(join if windows.inside else _skipping(join), flagged)
    out_dtypes = [x.dtype for x in operands]
    return bb.reduce(aval.shape, windows.window, xs, body, combine, flagged, out_dtypes, epilogue)


def _skipping(join: Join) -> Join:
    """``join`` for parts that may be empty: their last accumulator says whether they are not."""

    def skipping(b: Builder, left: list[int], right: list[int]) -> list[int]:
        (*a, a_some), (*c, c_some) = left, right
        out = []
        for x, y, both in zip(a, c, join(b, a, c), strict=True):
            out.append(b.op("select", a_some, b.op("select", c_some, both, x), y))
        return [*out, b.op("or", a_some, c_some)]

    return skipping


def _familiar(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value], kind: str) -> Sequence[Value]:
    """A reduction over windows by a combination with an identity; xs may end in an initial value."""
    operand = xs[0]
    if operand.dtype == "b1":
        kind = _ON_BOOLS.get(kind, kind)
    aval: Any = eqn.outvars[0].aval
    windows = _windows(eqn, operand, aval.shape)
    rank = len(aval.shape)
    acc = dtypes.compute_type(operand.dtype)

    def body(b: Builder, at: list[int], load: Load) -> int:
        where, inside = windows.position(b, at[:rank], at[rank:])
        return _element(b, load, 0, where, inside, operand.dtype, kind)

    def epilogue(b: Builder, at: list[int], accs: list[int], load: Load) -> int:
        return accs[0] if len(xs) == 1 else b.op(_SCALAR[kind], b.compute(load(1, [])), accs[0])

    return bb.reduce(aval.shape, windows.window, xs, body, Combine(kind), [acc], [operand.dtype], epilogue)


# -- the element a window selects ------------------------------------------------------------------------------


def _selection(eqn: JaxprEqn) -> str:
    """What a select_and_… equation looks for, "max" or "min"; the first of equals is taken."""
    name = eqn.params["select_prim"].name
    if name not in _STAYS.values():
        raise unsupported(eqn, f"it selects by {name}")
    return "max" if name == _STAYS["max"] else "min"


#: The comparison with the next element by which an element stays selected.
_STAYS = {"max": "ge", "min": "le"}


def _select(
    bb: BlockBuilder, windows: Windows, xs: list[Value], kind: str, out: str, epilogue: Epilogue, *, padding: bool
) -> list[Value]:
    """A reduction that selects an element of each window of ``xs[0]``.

    XLA goes through a window in order, and what is selected gives way to the next element unless it compares well with
    it. So NaN replaces whatever comes before it and is replaced by whatever comes after. A part of a window can be
    summed up as the element it ends with and whether it holds a NaN: then nothing before it counts.

    Args:
      epilogue: its accumulators are the element, its number in the window, and whether there is a NaN.
      padding: whether padding can be selected; it is less than any element then.
    """
    rank = len(windows.out)
    accs = [dtypes.compute_type(xs[0].dtype), INDEX, "b1"]
    skips = not (padding or windows.inside)

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        where, inside = windows.position(b, at[:rank], b.delinearize(at[rank], windows.window))
        x = _element(b, load, 0, where, inside, xs[0].dtype, kind)
        return [x, at[rank], b.op("ne", x, x), *([inside] if skips else [])]

    def join(b: Builder, left: list[int], right: list[int]) -> list[int]:
        stays = b.op("and", b.op(_STAYS[kind], left[0], right[0]), b.op("not", right[2]))
        chosen = [b.op("select", stays, x, y) for x, y in zip(left[:2], right[:2], strict=True)]
        return [*chosen, b.op("or", left[2], right[2])]

    flagged = [*accs, "b1"] if skips else accs
    combine = generic(_skipping(join) if skips else join, flagged)
    return list(bb.reduce(windows.out, [math.prod(windows.window)], xs, body, combine, flagged, [out], epilogue))


@rule("select_and_scatter_add")
def _select_and_scatter_add(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Adds each source element to the operand position that its window selects: max pooling backwards."""
    source, operand = xs
    windows = _windows(eqn, operand, source.shape)
    if 0 in source.shape:
        return [bb.constant(0, operand.dtype, operand.shape)]

    def number(b: Builder, at: list[int], found: list[int], load: Load) -> int:
        return found[1]

    (chosen,) = _select(bb, windows, [operand], _selection(eqn), INDEX, number, padding=True)

    def index(b: Builder, at: list[int], load: Load) -> list[int]:
        where, inside = windows.selected(b, at, load(0, at))
        return [*where, inside]

    def value(b: Builder, at: list[int], load: Load) -> int:
        return b.compute(load(1, at))

    zeros = bb.constant(0, operand.dtype, operand.shape)
    return [bb.update(zeros, source.shape, [chosen, source], index, value, Combine("sum"))]


@rule("select_and_gather_add")
def _select_and_gather_add(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """The tangent at the operand position that each window selects: max pooling's derivative."""
    tangents, operand = xs
    kind = _selection(eqn)
    aval: Any = eqn.outvars[0].aval
    windows = _windows(eqn, operand, aval.shape)

    def tangent(b: Builder, at: list[int], found: list[int], load: Load) -> int:
        element, number, nan = found[:3]
        where, inside = windows.selected(b, at, number)
        # In front of every window stands the least of all values, with a tangent of zero.
        dtype = b.nodes[element].dtype
        least = b.op(_STAYS[kind], b.const(identity(kind, dtype), dtype), element)
        moved = b.op("or", nan, b.op("not", least))
        return load(1, where, b.op("and", inside, moved))

    return _select(bb, windows, [operand, tangents], kind, tangents.dtype, tangent, padding=False)


# -- convolution -----------------------------------------------------------------------------------------------


@rule("conv_general_dilated")
def _conv(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """A sum of products over input features and window elements.

    Where no padding, dilation or group comes between, both factors are plain affine loads and the sum is a
    contraction; otherwise it is a reduction whose body multiplies.
    """
    lhs, rhs = xs
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    aval: Any = eqn.outvars[0].aval
    shape, rank = aval.shape, len(aval.shape)
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    features = rhs.shape[rhs_spec[1]]
    windows = Windows(
        operand=tuple(lhs.shape[axis] for axis in lhs_spec[2:]),
        out=tuple(shape[axis] for axis in out_spec[2:]),
        window=tuple(rhs.shape[axis] for axis in rhs_spec[2:]),
        strides=tuple(params["window_strides"]),
        low=tuple(low for low, _ in params["padding"]),
        base_dilation=tuple(params["lhs_dilation"]),
        window_dilation=tuple(params["rhs_dilation"]),
    )
    out_dtype = dtypes.from_numpy(aval.dtype)
    assert out_dtype is not None
    acc = dtypes.compute_type(out_dtype)

    def factors(b: Builder, at: list[int], load: Load) -> tuple[int, int]:
        batch, feature = at[out_spec[0]], at[out_spec[1]]
        element = at[rank + 1 :]
        where, inside = windows.position(b, [at[axis] for axis in out_spec[2:]], element)
        left = dict(zip(lhs_spec[2:], where, strict=True))
        group = b.floordiv(feature, max(1, rhs.shape[rhs_spec[0]] // max(groups, batch_groups)))
        left[lhs_spec[0]], left[lhs_spec[1]] = batch, at[rank]
        if groups > 1:
            left[lhs_spec[1]] = b.add(b.mul(group, b.index(features)), at[rank])
        if batch_groups > 1:
            left[lhs_spec[0]] = b.add(b.mul(group, b.index(shape[out_spec[0]])), batch)
        right = dict(zip(rhs_spec, [feature, at[rank], *element], strict=True))
        return (
            load(0, [left[axis] for axis in range(rank)], inside),
            load(1, [right[axis] for axis in range(rank)]),
        )

    def product(b: Builder, at: list[int], load: Load) -> int:
        x, y = (b.convert(b.compute(factor), acc) for factor in factors(b, at, load))
        return b.mul(x, y)

    def both(b: Builder, at: list[int], load: Load) -> int:
        return b.op("and", *factors(b, at, load))

    rspace = [features, *windows.window]
    if out_dtype == "b1":
        return bb.reduce(shape, rspace, xs, both, Combine("or"), ["b1"], ["b1"])
    if groups == batch_groups == 1 and windows.inside:
        return bb.contract(shape, rspace, xs, factors, acc, [out_dtype])
    return bb.reduce(shape, rspace, xs, product, Combine("sum"), [acc], [out_dtype])
